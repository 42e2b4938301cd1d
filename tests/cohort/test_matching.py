"""Which row an image belongs to: tolerant where that is safe, refused where it is not."""

import random
import unicodedata
from datetime import date
from pathlib import Path

import pandas as pd
import pytest

from brainage_nb.cohort.images import describe_images, find_images
from brainage_nb.cohort.matching import match_images


@pytest.fixture
def match(tmp_path):
    """Match image names with ids (or subject-session pairs); gives image -> id or reason."""

    def matched(names, ids, image_ids=None, table_ids=None):
        folder = tmp_path / f"data{len(list(tmp_path.iterdir()))}"  # a new one each call
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        images = find_images(folder)
        pairs = [one if isinstance(one, tuple) else (one, "") for one in ids]
        rows = pd.DataFrame(pairs, columns=["subject_id", "session_id"])
        rows["table_id"] = table_ids or rows["subject_id"]
        if image_ids:
            rows["image_id"] = image_ids
        found = match_images(images, rows)
        shown = [path.removeprefix(f"{folder}/") for path in images["image"]]
        return {
            name: ids[match.row] if match.row is not None else match.reason
            for name, match in zip(shown, found, strict=True)
        }

    return matched


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("IXI002-Guys-0828-T1.nii.gz", "2"),
        ("IXI002-Guys-0828-T1.nii.gz", "002"),
        ("IXI002-Guys-0828-T1.nii.gz", "IXI002"),
        ("IXI002-Guys-0828-T1.nii.gz", "IXI2"),
        ("IXI002-Guys-0828-T1.nii.gz", "ixi002"),
        ("IXI037-Guys-0704-T1.nii/IXI037-Guys-0704-T1.nii", "37"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "01"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "1"),
        ("sub-CMU50642/anat/sub-CMU50642_T1w.nii.gz", "CMU_50642"),
        ("sub-01/T1.nii.gz", "01"),
        ("sub-01-T1.nii.gz", "01"),
        ("CMU_50642/anat/T1.nii.gz", "CMU_50642"),
        ("CMU_50642_mprage.nii.gz", "cmu_50642"),
        ("Pitt_0050003.nii.gz", "Pitt_50003"),
        ("12/T1.nii.gz", "12"),
        ("0012.nii.gz", "12"),
        ("T1_0012.nii.gz", "12"),
        ("subject_12_T1.nii.gz", "12"),
        ("batch2/sub12.nii.gz", "12"),
        ("site3/100307/T1w.nii.gz", "100307"),
        ("row_major.dconn.nii", "row_major.dconn"),
        ("functional.nii", "functional"),
        ("AIL.nii.gz", "AIL.nii.gz"),
        ("test.mgz", "odd/test.mgz"),
        ("IXI002-Guys-0828-T1.nii.gz", "IXI002-Guys-0828-T1.nii.gz"),
        ("anat_T2.nii", "anat_T2"),
        ("10-01-T1.nii.gz", "10-01"),
        ("Study7_078_V2.nii.gz", "78"),
        ("1.5T/78/anat.nii.gz", "78"),
        ("sub78ses2_T1w.nii", "78"),
        ("７８_T1.nii", "78"),
        ("PD_001_V1.nii", "PD_001"),
        ("site1/sub-01/anat/sub-01_T1w.nii.gz", "site1_01"),
        (unicodedata.normalize("NFD", "Jörg_T1.nii"), "Jörg"),
    ],
)
def test_an_image_finds_its_row(match, name, one):
    assert match([name], [one, "another", "77"]) == {name: one}


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("sub-1_T1w.nii.gz", "10"),
        ("sub-10_T1w.nii.gz", "1"),
        ("IXI012-Guys-0828-T1.nii.gz", "828"),
        ("IXI012-Guys-0828-T1.nii.gz", "1"),
        ("scan_13_run_1.nii.gz", "1"),
        ("AB12_T1.nii.gz", "AB1"),
        ("AB12_T1.nii.gz", "B12"),
        ("example4d.nii.gz", "4"),
        ("inia19-t1-brain.nii.gz", "1"),
        ("12/visit2/T1.nii.gz", "2"),
        ("3/12_T1.nii.gz", "3"),
        ("subj-1_23.nii.gz", "12_3"),
        ("AB1_23.nii.gz", "AB12_3"),
    ],
)
def test_a_name_that_only_resembles_an_id_does_not_match(match, name, one):
    assert match([name], [one])[name] != one


def test_a_bare_number_meets_only_the_prefix_that_most_images_share(match):
    names = [
        "IXI002-Guys-0828-T1.nii.gz",
        "IXI012-HH-1211-T1.nii.gz",
        "IXI013-HH-1212-T1.nii.gz",
        "nifti1.hdr",
    ]
    found = match(names, ["1", "2", "12", "13"])
    assert [found[name] for name in names[:3]] == ["2", "12", "13"]
    assert "no id of the table" in found["nifti1.hdr"]


def test_a_bare_number_is_no_choice_between_patients_and_controls(match):
    assert match(["007_T1.nii"], ["IXI007", "IXI008"]) == {"007_T1.nii": "IXI007"}
    # one file for either letter: whichever prefix were preferred, one of the two would be taken
    found = match(["017_T1.nii", "019_T1.nii"], ["A017", "A018", "B019"])
    assert set(found.values()) == {"no id of the table is in its name"}
    names = ["A1.nii", "A2.nii", "A3.nii", "B4.nii", "B5.nii"]
    found = match(names, ["1", "2", "3", "4", "5"])
    assert "'A1' alone does not tell that it is of subject 1" in found["A1.nii"]
    assert all("none taken" in reason for reason in found.values())


def test_images_of_two_prefixes_do_not_share_a_bare_number(match):
    names = ["A12_T1.nii", "A13_T1.nii", "A14_T1.nii", "012_T1.nii"]
    found = match(names, ["12", "13", "14"])
    assert found["A13_T1.nii"] == "13"
    assert "both would be subject 12" in found["A12_T1.nii"]
    assert "both would be subject 12" in found["012_T1.nii"]


def test_ids_that_differ_by_padding_only_meet_their_own_image_and_no_other(match):
    found = match(["sub-1_T1w.nii", "sub-01_T1w.nii", "sub-001_T1w.nii"], ["1", "01"])
    assert found["sub-1_T1w.nii"] == "1"
    assert found["sub-01_T1w.nii"] == "01"
    assert "several subjects of the table (01, 1)" in found["sub-001_T1w.nii"]


def test_of_ids_that_are_alike_the_one_written_most_like_the_image_is_meant(match):
    assert match(["AB_1_T1.nii", "AB-01_T1.nii"], ["AB1", "AB01"]) == {
        "AB-01_T1.nii": "AB01",
        "AB_1_T1.nii": "AB1",
    }


def test_a_path_that_fits_two_subjects_is_refused(match):
    found = match(["AB12/AB13_T1.nii"], ["AB12", "AB13"])
    assert "'AB12' (subject AB12) or 'AB13' (subject AB13)" in found["AB12/AB13_T1.nii"]
    assert "could be the subject" in match(["4/5_T1.nii"], ["4", "5", "5b"])["4/5_T1.nii"]


def test_the_longer_id_wins_where_one_holds_the_other(match):
    assert match(["AB_1_2_T1.nii"], ["AB_1", "AB_1_2"]) == {"AB_1_2_T1.nii": "AB_1_2"}


def test_sessions_are_matched_with_their_rows(match):
    rows = [("01", "1"), ("01", "2"), ("02", "1")]
    names = [
        "sub-01_ses-01_T1w.nii",
        "sub-01_ses-2_T1w.nii",
        "sub-01_ses-3_T1w.nii",
        "sub-02_ses-wave1_T1w.nii",
    ]
    found = match(names, rows)
    assert [found[name] for name in (names[0], names[1], names[3])] == [("01", "1"), ("01", "2"), ("02", "1")]
    assert "no row for session 3 of subject 01, only for 1, 2" in found[names[2]]


def test_months_are_no_visit_numbers(match):
    assert (
        "no row" in match(["sub-01_ses-M12_T1w.nii"], [("01", "12"), ("01", "m06")])["sub-01_ses-M12_T1w.nii"]
    )


def test_a_row_without_session_serves_all_sessions(match):
    names = ["sub-01_ses-1_T1w.nii", "sub-01_ses-2_T1w.nii"]
    assert set(match(names, ["01"]).values()) == {"01"}


def test_an_image_without_session_is_refused_where_rows_have_several(match):
    found = match(["sub-01_T1w.nii"], [("01", "1"), ("01", "2")])
    assert "states no session" in found["sub-01_T1w.nii"]
    assert match(["sub-01_T1w.nii"], [("01", "baseline")]) == {"sub-01_T1w.nii": ("01", "baseline")}


def test_one_row_and_one_session_on_disk_belong_together_unless_numbered_apart(match):
    assert match(["sub-01_ses-pre_T1w.nii"], [("01", "baseline")])["sub-01_ses-pre_T1w.nii"] == (
        "01",
        "baseline",
    )
    assert "no row for session 2" in match(["sub-02_ses-2_T1w.nii"], [("02", "w1")])["sub-02_ses-2_T1w.nii"]


def test_image_ids_and_file_names_in_the_table_decide(match):
    name = "ADNI_002_S_0413_MR_MPRAGE_S13893_I45117.nii"
    rows = [("002_S_0413", "sc"), ("002_S_0413", "m12")]
    assert match([name], rows, image_ids=["I45117", "I45118"]) == {name: rows[0]}
    assert match([name], rows, image_ids=["45116", "45117"]) == {name: rows[1]}
    assert (
        match(["x/q7f.nii.gz"], ["a", "b"], image_ids=["raw/q7g.nii.gz", "raw/q7f.nii.gz"])["x/q7f.nii.gz"]
        == "b"
    )
    oasis = "OAS2_0001_MR2_mpr-1.nifti.hdr"
    rows = [("OAS2_0001", "1"), ("OAS2_0001", "2")]
    assert match([oasis], rows, image_ids=["OAS2_0001_MR1", "OAS2_0001_MR2"])[oasis] == rows[1]


def test_an_image_id_of_another_subject_is_not_believed(match):
    found = match(["sub-01_T1w.nii"], ["01", "02"], image_ids=["", "sub-01_T1w.nii"])
    assert found["sub-01_T1w.nii"] == "01"


def test_ids_that_carry_a_session_name_their_image(match):
    rows = [("BMB_3001", "baseline"), ("BMB_3001", "retest_1")]
    ids = ["BMB_3001_baseline", "BMB_3001_retest_1"]
    found = match(["BMB_3001_retest_1_T1.nii", "BMB_3001_baseline.nii"], rows, table_ids=ids)
    assert found == {"BMB_3001_retest_1_T1.nii": rows[1], "BMB_3001_baseline.nii": rows[0]}


def test_other_contrasts_are_listed_not_matched(match):
    found = match(["AB1_T1.nii", "AB1_T2.nii"], ["AB1"])
    assert found["AB1_T1.nii"] == "AB1"
    assert "no T1-weighted scan" in found["AB1_T2.nii"]


@pytest.mark.parametrize("width", [1, 3, 5])
def test_of_200_numbered_subjects_none_is_taken_for_another(match, width):
    names = [f"sub-{i:0{width}d}/anat/sub-{i:0{width}d}_T1w.nii.gz" for i in range(1, 201)]
    found = match(names, [str(i) for i in range(1, 101)])
    for i, name in enumerate(sorted(names), start=1):
        number = str(int(name.split("/")[0].removeprefix("sub-")))
        assert found[name] == number if int(number) <= 100 else found[name].startswith("no id"), i


# --- the cohort decides ---------------------------------------------------------------------------------


BEFORE = (
    "site v visit ses run scan group day batch img S study north C0 1.5T_ 01-15-2019_ 04.05.2019_ 20190504_"
)


@pytest.mark.parametrize("prefix", BEFORE.split())
@pytest.mark.parametrize("ids", [[f"{i:03d}" for i in range(1, 13)], [str(i) for i in range(1, 13)]])
def test_what_stands_before_the_ids_is_not_taken_for_them(match, prefix, ids):
    tail = "" if prefix.endswith("_") else "_"
    names = [
        f"{prefix}{(i + 2) // 3 if tail else ''}{tail}{one.zfill(3)}.nii"
        for i, one in enumerate(ids, start=1)
    ]
    assert match(names, ids) == dict(zip(names, ids, strict=True))


def test_a_table_of_few_of_the_people_gives_them_their_images(match):
    names = [f"site{i % 3}_{i:03d}.nii" for i in range(1, 13)]
    found = match(names, ["002", "005", "009"])
    assert {name: one for name, one in found.items() if len(one) == 3} == {
        "site2_002.nii": "002",
        "site2_005.nii": "005",
        "site0_009.nii": "009",
    }


def test_an_id_in_a_folder_wins_over_that_of_the_centre(match):
    names = [f"C{(i + 2) // 3:02d}/{i:03d}/anat.nii.gz" for i in range(1, 10)]
    assert match(names, [f"{i:03d}" for i in range(1, 20)]) == {name: name[4:7] for name in names}


def test_two_readings_are_refused_and_both_shown(match):
    found = match(["P001_3.nii", "P002_1.nii", "P003_2.nii"], ["1", "2", "3"])
    assert found["P001_3.nii"] == (
        "several parts of its path could be the subject: 'P001' (subject 1) or '3' (subject 3); none taken"
    ) or found["P001_3.nii"].startswith("several parts of its path could be the subject: '3' (subject 3) or")


@pytest.mark.parametrize(
    "names",
    [
        ["site1/sub-01/anat/sub-01_T1w.nii", "site2/sub-01/anat/sub-01_T1w.nii"],
        ["Study7_901.nii", "Study7_902.nii", "Study7_903.nii"],
        ["north_01.nii", "south_01.nii"],
        ["01_bonn.nii", "01_oslo.nii"],
        ["3T/01.nii", "7T/01.nii"],
        ["sub-1_T1w.nii", "sub-01_T1w.nii"],
        ["7_6916.nii", "1_6023.nii"],
    ],
)
def test_images_that_differ_in_more_than_session_run_and_contrast_share_no_subject(match, names):
    found = match(names, ["1", "7", "8"])
    assert not set(found.values()) & {"1", "7", "8"}


@pytest.mark.parametrize(
    "names",
    [
        ["P1_V1_T1.nii", "P1_V2_T1.nii"],
        ["P1/ses-1/anat/T1w.nii", "P1/ses-2/anat/T1w.nii"],
        ["P1_2019-01-15.nii", "P1_2021-03-20.nii"],
        ["P1_1.nii", "P1_2.nii"],
        ["P1_run-1_mprage.nii", "P1_run-2_mprage.nii"],
        ["baseline/P1.nii", "followup/P1.nii"],
        ["P1_T1.nii", "P1_T1_defaced.nii"],
        ["P1V1.nii", "P1V2.nii"],
    ],
)
def test_sessions_runs_and_contrasts_of_one_person_share_a_subject(match, names):
    assert set(match(names, ["P1", "P2"]).values()) == {"P1"}


def test_an_image_id_that_is_listed_once_serves_one_image_only(match):
    found = match(["site1/scan7.nii", "site2/scan7.nii"], ["a", "b"], image_ids=["scan7.nii", "scan8.nii"])
    assert all("both would be row 1" in reason for reason in found.values())
    rows = match(["site1/T1.nii", "site2/T1.nii"], ["a", "b"], image_ids=["d/site2/T1.nii", "d/site1/T1.nii"])
    assert rows == {"site1/T1.nii": "b", "site2/T1.nii": "a"}


NAMES = [
    *("张三", "李四", "王五", "田中", "鈴木", "김민수", "Иван", "Ольга", "मीरा", "राम", "أحمد", "ليلى"),
    *("Jörg", "Jürg", "Märk", "Mörk", "Anna", "Emil", "Łukasz", "Zoë"),
]
IDS = (
    lambda rng, n: [str(i) for i in range(1, n + 1)],
    lambda rng, n: [f"{i:02d}" for i in range(1, n + 1)],
    lambda rng, n: [f"{i:03d}" for i in range(1, n + 1)],
    lambda rng, n: [str(i) for i in rng.sample(range(100, 9999), n)],
    lambda rng, n: [str(i) for i in rng.sample(range(100000, 999999), n)],
    lambda rng, n: [f"{rng.choice(['P', 'S', 'HC', 'NDAR'])}{i:03d}" for i in range(1, n + 1)],
    lambda rng, n: [f"{rng.randint(10, 14)}-{i:02d}" for i in range(1, n + 1)],
    lambda rng, n: [f"{rng.choice(['CMU_a', 'NYU', 'UCLA_1'])}_{50000 + i}" for i in range(n)],
    lambda rng, n: [f"{rng.randint(2, 99):03d}_S_{i:04d}" for i in rng.sample(range(1, 6000), n)],
    lambda rng, n: rng.sample(NAMES, min(n, len(NAMES))),
)
WRITTEN = ("{}", "{}", "{:03d}", "P{:03d}", "sub-{:03d}", "subj{:02d}")


def a_cohort(rng):
    """Names by one pattern, the id of each, all ids of the table, and whether two people share an id."""
    kind = rng.randrange(len(IDS))
    ids = IDS[kind](rng, rng.choice([1, 2, 3, 5, 8, 12, 18]) + 2)
    form = rng.choice(WRITTEN) if kind < 3 else "{}"
    shared = rng.random() < 0.15
    before = (
        ["place"]
        if shared
        else rng.sample(["place", "date", "project", "scanner", "group"], rng.choice([0, 1, 2]))
    )
    after = rng.sample(["visit", "run", "date", "town"], rng.choice([0, 0, 1, 2]))
    after = [one for one in after if one not in before and not (shared and one in ("town", "date"))]
    place = rng.choice(["site{}", "Site-{:02d}", "centre{}", "batch{}", "group{}", "1.{}T", "day{}"])
    place = rng.choice(["site{}", "centre{}", "hospital{}", "{}T"]) if shared else place
    day = rng.choice(["%d.%m.%Y", "%m-%d-%Y", "%Y%m%d", "%Y-%m-%d", "%d%b%Y"])
    project, visit, run = (
        rng.choice(many.split())
        for many in (
            "STUDY ABIDE study7 MYPROJ2",
            "V{} ses-{} ses-{:02d} visit{} tp{}",
            "run-{} run{:02d} scan{}",
        )
    )
    contrast, gap, nested = rng.choice(["T1", "T1w", "mprage", "anat"]), rng.choice("__- ."), rng.randrange(4)
    names, truth = [], []
    for one in ids[:-2]:
        written = form.format(int(one) if ":" in form else one)
        scanned = date(rng.randint(2001, 2020), rng.randint(1, 12), rng.randint(1, 28))
        fixed = {
            "scanner": rng.choice(["Prisma", "Trio"]),
            "group": rng.choice(["HC", "MCI"]),
            "project": project,
        }
        number, fixed["town"] = rng.randint(1, 4), rng.choice(["Bonn", "Oslo"])
        for site in (1, 2) if shared else (number,):
            for v in (1, 2) if "visit" in after else (1,):
                fixed |= {
                    "place": place.format(site),
                    "date": scanned.replace(year=scanned.year + v).strftime(day),
                }
                fixed |= {"visit": visit.format(v), "run": run.format(1)}
                first, last = [fixed[one] for one in before], [*(fixed[one] for one in after), contrast]
                names.append(
                    [
                        gap.join([*first, written, *last]),
                        "/".join([*first, written, gap.join(last)]),
                        "/".join([*first, written, gap.join([written, *last])]),
                        "/".join([*first[:1], gap.join([*first[1:], written, *last])]),
                    ][nested]
                    + ".nii.gz"
                )
                truth.append(one)
    return names, truth, ids, shared


def try_cohorts(numbers):
    """How many cohorts of one reading were matched whole, in part, and not; wrong rows fail at once."""
    counts = {"whole": 0, "other": 0}
    for number in numbers:
        names, truth, ids, shared = a_cohort(random.Random(number))
        images = describe_images([Path("/d", name) for name in names], Path("/d"))
        found = match_images(images, pd.DataFrame({"subject_id": ids, "session_id": "", "table_id": ids}))
        rows = [None if match.row is None else ids[match.row] for match in found]
        assert all(match.reason for match in found if match.row is None)
        if shared:
            assert not any(rows), (number, names[:4], rows[:4])
            continue
        assert all(row in (None, one) for row, one in zip(rows, truth, strict=True)), (number, names[:4])
        counts["whole" if all(rows) else "other"] += 1
    return counts


@pytest.mark.parametrize(
    "numbers", [range(200), pytest.param(range(200, 2600), marks=pytest.mark.slow)], ids=["200", "2400"]
)
def test_names_by_patterns_that_people_use_give_the_right_row_or_none(numbers):
    counts = try_cohorts(numbers)
    print(counts)
    assert counts["whole"] >= 0.98 * sum(counts.values())


def test_thousands_of_images_are_matched_in_seconds():
    from time import process_time

    names = [f"north{i % 7}/P{i:05d}_V{i % 3}_T1w.nii" for i in range(4000)]
    images = describe_images([Path("/d", name) for name in names], Path("/d"))
    ids = [str(i) for i in range(4000)]
    start = process_time()
    found = match_images(images, pd.DataFrame({"subject_id": ids, "session_id": "", "table_id": ids}))
    assert [match.row for match in found] == list(range(4000))
    assert process_time() - start < 6


@pytest.mark.parametrize(
    "labels", [("m12", "m24"), ("fu1", "fu2"), ("MR1", "MR2"), ("y1", "y2"), ("pre", "post")]
)
def test_a_session_of_the_table_that_stands_in_the_name_is_that_session(match, labels):
    pairs = [(f"{n:03d}", label) for n in range(4) for label in labels]
    found = match([f"{one}_{label}.nii.gz" for one, label in pairs], pairs)
    assert found == {f"{one}_{label}.nii.gz": (one, label) for one, label in pairs}


def test_the_contrast_is_no_session(match):
    found = match(["001_T1.nii.gz"], [("001", "T1"), ("001", "T2")])
    assert "states no session" in found["001_T1.nii.gz"]
