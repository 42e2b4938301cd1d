"""A folder and a table become a cohort; whatever finds no partner is listed."""

import shutil
import unicodedata

import pandas as pd
import pytest

from brainage_nb.sources.folder import SourceError, ages_of_scans, find_table, match_scans
from brainage_nb.tables.files import TableError, read_cells


@pytest.fixture
def data(tmp_path):
    """Write files (an empty one for None) into a folder."""

    def written(files):
        for name, text in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text or "")
        return tmp_path / "data"

    return written


def ages(found):
    return found.cohort.set_index("scan_id")["age"].to_dict()


def test_a_bids_folder_becomes_a_cohort(data):
    folder = data(
        {
            "participants.tsv": "participant_id\tage\tsex\tsite\tdiagnosis\n"
            "sub-01\t30\tF\tA\tHC\nsub-02\t40\tM\tB\tAD\n",
            "sub-01/anat/sub-01_T1w.nii.gz": None,
            "sub-02/anat/sub-02_run-1_T1w.nii.gz": None,
            "sub-02/anat/sub-02_run-2_T1w.nii.gz": None,
        }
    )
    cohort = match_scans(folder).cohort
    assert list(cohort.columns) == [
        *(
            "scan_id",
            "subject_id",
            "session_id",
            "image",
            "age",
            "sex",
            "site",
            "source",
            "diagnosis",
            "age_note",
        )
    ]
    assert list(cohort["scan_id"]) == ["01", "02_1", "02_2"]
    assert list(cohort["age"]) == [30, 40, 40]
    assert set(cohort["source"]) == {"folder"}


def test_every_image_and_every_row_is_matched_or_listed_with_a_reason(data):
    folder = data(
        {
            "t.csv": "ID,age\nAB1,30\nAB2,40\nAB3,89+\nAB4,n/a\nAB5,50\n",
            **dict.fromkeys(["AB1.nii", "AB3.nii", "AB4.nii", "AB9.nii", "AB1_T2.nii", "mAB1.nii"]),
        }
    )
    found = match_scans(folder, folder / "t.csv")
    assert list(found.cohort["scan_id"]) == ["AB1", "AB3", "AB4"]
    assert found.cohort["age"].isna().tolist() == [False, True, True]
    assert "bound" in found.cohort["age_note"][1]
    images = [path.rsplit("/", 1)[1] for path in found.unmatched_images["image"]]
    assert images[-1] == "mAB1.nii"  # people without a row stand before it
    assert sorted(images) == ["AB1_T2.nii", "AB9.nii", "mAB1.nii"] and all(found.unmatched_images["reason"])
    assert dict(zip(found.unmatched_rows["subject_id"], found.unmatched_rows["reason"], strict=True)) == {
        "AB2": "no image carries this id",
        "AB5": "no image carries this id",
    }


def test_a_person_named_like_a_product_is_matched_and_a_folder_of_maps_is_refused(data):
    folder = data({"t.csv": "ID,age\n001,30\nm001,40\n", "001.nii": None, "m001.nii": None})
    assert list(match_scans(folder, "t.csv").cohort["age"]) == [30, 40]
    folder = data({"maps/t.csv": "ID,age\n001,30\n", "maps/mwp1001.nii": None}) / "maps"
    with pytest.raises(SourceError, match=r"mwp1001\.nii: by its name a map .* Set data_dir"):
        match_scans(folder, "t.csv")


def test_ages_at_sessions_go_before_those_of_participants(data):
    folder = data(
        {
            "participants.tsv": "participant_id\tage\tsex\nsub-01\t30\tF\nsub-02\t40\tM\nsub-03\t50\tM\n",
            "sub-01/sub-01_sessions.tsv": "session_id\tage\nses-1\t30.2\nses-2\t33.4\nses-3\tn/a\n",
            "sub-03/sub-03_sessions.tsv": "session_id\tage\nses-1\tn/a\n",
            **{f"sub-01/ses-{i}/anat/sub-01_ses-{i}_T1w.nii.gz": None for i in (1, 2, 3)},
            "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz": None,
            "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz": None,
        }
    )
    found = match_scans(folder)
    assert ages(found) == pytest.approx(
        {"01_1": 30.2, "01_2": 33.4, "01_3": float("nan"), "02_1": 40, "03_1": 50}, nan_ok=True
    )
    assert list(found.cohort["sex"]) == ["F", "F", "F", "M", "M"]


def test_a_first_subject_without_an_age_column_does_not_hide_the_ages_of_the_others(data):
    folder = data(
        {
            "participants.tsv": "participant_id\tage\tsex\nsub-01\t23\tF\nsub-02\t31\tM\n",
            "sub-01/sub-01_sessions.tsv": "session_id\tacq_time\nses-1\t1970-01-01\n",
            "sub-02/sub-02_sessions.tsv": "session_id\tage\nses-1\t31\nses-2\t41\n",
            "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz": None,
            **{f"sub-02/ses-{i}/anat/sub-02_ses-{i}_T1w.nii.gz": None for i in (1, 2)},
        }
    )
    found = match_scans(folder)
    assert ages(found) == {"01_1": 23, "02_1": 31, "02_2": 41}
    assert any("Sessions files without an age: 1 (sub-01)" in note for note in found.notes)


def test_each_sessions_file_has_the_unit_that_it_or_its_sidecar_says(data):
    folder = data(
        {
            "people.tsv": "code\tsexe\nsub-01\tF\nsub-02\tM\nsub-03\tM\n",
            "sub-01/sub-01_sessions.tsv": "session_id\tage\nses-1\t84\n",
            "sub-01/sub-01_sessions.json": '{"age": {"Units": "months"}}',
            "sub-02/sub-02_sessions.tsv": "session_id\tage_months\nses-1\t96\n",
            "sub-03/sub-03_sessions.tsv": "session_id\tage\nses-1\t9\n",
            **{f"sub-0{i}/ses-1/anat/sub-0{i}_ses-1_T1w.nii.gz": None for i in (1, 2, 3)},
        }
    )
    found = match_scans(folder, "people.tsv", columns={"subject_id": "code", "sex": "sexe"})
    assert ages(found) == {"01_1": 7, "02_1": 8, "03_1": 9}
    assert list(found.cohort["sex"]) == ["F", "M", "M"]


def test_a_sessions_file_serves_where_participants_have_no_age(data):
    folder = data(
        {
            "participants.tsv": "participant_id\tsex\nsub-01\tF\n",
            "sub-01/sub-01_sessions.tsv": "session_id\tage\nses-1\t30.2\n",
            "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz": None,
        }
    )
    assert ages(match_scans(folder)) == {"01_1": 30.2}


def test_sessions_without_any_usable_age_leave_the_ages_of_the_table(data):
    folder = data(
        {
            "participants.tsv": "participant_id\tage\nsub-01\t30\nsub-02\t40\n",
            "sub-01/sub-01_sessions.tsv": "session_id\tage\nses-1\tn/a\n",
            **{f"sub-0{i}/ses-1/anat/sub-0{i}_ses-1_T1w.nii.gz": None for i in (1, 2)},
        }
    )
    assert ages(match_scans(folder)) == {"01_1": 30, "02_1": 40}


def test_one_age_for_several_sessions_is_noted(data):
    folder = data(
        {
            "participants.tsv": "participant_id\tage\nsub-01\t30\n",
            **{f"sub-01/ses-{i}/anat/sub-01_ses-{i}_T1w.nii.gz": None for i in (1, 2)},
        }
    )
    found = match_scans(folder)
    assert ages(found) == {"01_1": 30, "01_2": 30}
    assert any("probably that at the first" in note for note in found.notes)


def test_waves_of_a_table_meet_sessions_on_disk(data):
    folder = data(
        {
            "participants.tsv": "participant_id\tAgeMRI_W1\tAgeMRI_W2\nsub-01\t54\t58\n",
            **{f"sub-01/ses-wave{i}/anat/sub-01_ses-wave{i}_T1w.nii.gz": None for i in (1, 2)},
        }
    )
    with pytest.raises(TableError, match="AgeMRI_W1,AgeMRI_W2"):
        match_scans(folder)
    found = match_scans(folder, columns={"age": "AgeMRI_W1,AgeMRI_W2"})
    assert ages(found) == {"01_wave1": 54, "01_wave2": 58}
    first_only = match_scans(folder, columns={"age": "AgeMRI_W1"})
    assert ages(first_only) == {"01_wave1": 54}


def test_a_table_of_file_names_keeps_the_scans_of_a_subject_together(data):
    names = ["sub-01_ses-1_T1w.nii.gz", "sub-01_ses-2_T1w.nii.gz"]
    folder = data({"t.csv": f"filename,age\n{names[0]},30\n{names[1]},32\n", **dict.fromkeys(names)})
    cohort = match_scans(folder).cohort
    assert list(cohort["subject_id"]) == ["01", "01"]
    assert list(cohort["age"]) == [30, 32]


def test_a_mask_is_not_taken_for_the_scan_whose_id_it_carries(data):
    folder = data(
        {"t.csv": "ID,Age\nOAS1_0001_MR1,74\n", "OAS1_0001_MR1_mpr.hdr": None, "OAS1_0001_MR1_fseg.hdr": None}
    )
    found = match_scans(folder)
    assert [path.rsplit("_", 1)[1] for path in found.cohort["image"]] == ["mpr.hdr"]
    assert list(found.cohort["scan_id"]) == ["OAS1_0001_MR1"]


def test_scan_ids_are_unique_even_where_names_repeat(data):
    names = ["anat/AB1.nii", "raw/AB1.nii", "AB1_1.nii", "AB1_2.nii", "ab1 T1.nii", "ab1_T1.nii"]
    folder = data({"t.csv": "ID,age\nAB1,30\n", **dict.fromkeys(names)})
    cohort = match_scans(folder).cohort
    assert cohort["scan_id"].is_unique and len(cohort) == 6
    assert set(cohort["subject_id"]) == {"AB1"}


def test_ids_of_any_script_reach_the_cohort_apart(data):
    ids = ["张三", "李四", "Jörg", "Jürg", "मीरा", "मारा", "Ольга", "أحمد"]
    written = [unicodedata.normalize("NFD", one) for one in ids]
    table = "".join(f"{one}\u200b,{30 + i}\n" for i, one in enumerate(ids)).replace("Jörg", "\u00a0Jörg")
    folder = data({"t.csv": f"id,age\n{table}", **{f"{one}_T1.nii": None for one in written}})
    cohort = match_scans(folder).cohort
    assert dict(zip(cohort["scan_id"], cohort["age"], strict=True)) == {
        one: 30 + i for i, one in enumerate(ids)
    }
    assert all((folder / image).is_file() for image in cohort["image"])


def test_data_sets_side_by_side_are_two_sets_of_people(data):
    files = {f"site{s}/sub-0{i}/anat/sub-0{i}_T1w.nii.gz": None for s in (1, 2) for i in (1, 2)}
    for s in (1, 2):
        files[f"site{s}/participants.tsv"] = f"participant_id\tage\nsub-01\t{s}1\nsub-02\t{s}2\n"
    folder = data(files)
    both = match_scans(folder)
    assert ages(both) == {"site1_01": 11, "site1_02": 12, "site2_01": 21, "site2_02": 22}
    assert list(both.cohort["subject_id"]) == list(both.cohort["scan_id"])
    assert list(both.cohort["site"]) == ["site1", "site1", "site2", "site2"]
    one = match_scans(folder, "site1/participants.tsv")
    assert ages(one) == {"01": 11, "02": 12}
    assert one.unmatched_images["reason"].str.contains("data set of .*site2/participants.tsv").all()
    (folder / "site2" / "participants.tsv").unlink()
    with pytest.raises(SourceError, match="differ in more than session, run and contrast"):
        match_scans(folder, "site1/participants.tsv")


def test_named_scans_get_an_age_or_a_reason(data):
    names = ["sub-01/T1.nii", "sub-02/T1.nii", "derivatives/sub-03/T1.nii", "sub-04/T1.nii"]
    table = "participant_id\tage\nsub-01\t30\nsub-03\t50\nsub-04\t89+\n"
    folder = data({"participants.tsv": table, **dict.fromkeys(names)})
    found = ages_of_scans([folder / name for name in names], folder / "participants.tsv")
    assert found[0] == [30, None, 50, None]
    assert [bool(reason) for reason in found[1]] == [False, True, False, True]
    assert "no row is of subject '02'" in found[1][1] and "89+" in found[1][3]
    alone = ages_of_scans(
        [folder / names[0]], shutil.copy(folder / "participants.tsv", folder.parent / "t.tsv")
    )
    assert alone[0] == [30]


def test_images_inside_the_workspace_are_written_relative_to_it(data, tmp_path):
    folder = data({"t.csv": "ID,age\nAB1,30\n", "AB1.nii": None})
    assert match_scans(folder, root=tmp_path).cohort["image"][0] == "data/AB1.nii"
    assert match_scans(folder, root=tmp_path / "else").cohort["image"][0] == str(folder / "AB1.nii")


def test_the_table_is_found_or_the_candidates_are_listed(data):
    folder = data({"a.csv": "ID,age\nx,30\n"})
    assert find_table(folder) == folder / "a.csv"
    assert find_table(folder, "a.csv") == folder / "a.csv"
    data({"sub/b.xlsx": None})
    with pytest.raises(TableError, match=r"a\.csv, sub/b\.xlsx"):
        find_table(folder)
    data({"participants.tsv": None})
    assert find_table(folder).name == "participants.tsv"


def test_what_makes_no_cohort_says_what_to_set(data):
    folder = data({"t.csv": "ID,age\nAB1,30\n"})
    with pytest.raises(SourceError, match="No NIfTI"):
        match_scans(folder)
    data({"CD7.nii": None})
    with pytest.raises(SourceError, match="Images are named like CD7; ids look like AB1"):
        match_scans(folder)
    with pytest.raises(TableError, match="ages"):
        match_scans(folder, columns={"ages": "age"})


# --- real scans -----------------------------------------------------------------------------------------


def test_all_121_scans_of_ixi_get_the_age_of_their_row(shared_data):
    folder = shared_data / "ixi_hh"
    found = match_scans(folder / "images", folder / "IXI.xls")
    assert len(found.cohort) == 121 and found.cohort["age"].notna().all()
    assert found.unmatched_images.empty
    assert set(found.cohort["site"]) == {"HH"}
    cells = read_cells(folder / "IXI.xls")["Table"]
    written = pd.to_numeric(cells["AGE"], errors="coerce").groupby(cells["IXI_ID"].astype(int)).agg(list)
    for scan in found.cohort.itertuples():
        name = scan.image.rsplit("/", 1)[1]
        assert scan.subject_id == scan.scan_id == name[:6]
        own = written[int(name[3:6])]
        if scan.subject_id == "IXI328":
            assert scan.age == pytest.approx(61.934, abs=1e-3)
            assert scan.age_note.startswith("mean of")
        else:
            assert scan.age in own and scan.age_note == ""


def test_odd_files_with_a_row_each_reach_cleaning_beside_the_121(shared_data, tmp_path):
    odd = [path for path in (shared_data / "odd_nifti").iterdir() if path.name != "SOURCES.tsv"]
    folder = tmp_path / "images"
    folder.mkdir()
    for path in [*odd, *(shared_data / "ixi_hh" / "images").iterdir()]:
        (folder / path.name).symlink_to(path)
    table = read_cells(shared_data / "ixi_hh" / "IXI.xls")["Table"]
    names = [path.name.split(".")[0] for path in odd]
    rows = pd.DataFrame({"IXI_ID": names, "AGE": [str(30 + i) for i in range(len(names))]})
    table = pd.concat([table, rows], ignore_index=True).fillna("")
    table.to_csv(tmp_path / "IXI.csv", index=False)
    found = match_scans(folder, tmp_path / "IXI.csv")
    assert len(found.cohort) == 121 + 13
    assert found.unmatched_images.empty
    taken = found.cohort.set_index("subject_id")["age"]
    assert taken[names].to_list() == [30 + i for i in range(len(names))]


def test_kaggle_folders_named_like_images_match_too(shared_data, tmp_path):
    for path in sorted((shared_data / "ixi_hh" / "images").iterdir())[:5]:
        inner = tmp_path / path.name.removesuffix(".gz") / path.name.removesuffix(".gz")
        inner.parent.mkdir()
        shutil.copyfile(path, inner)
    found = match_scans(tmp_path, shared_data / "ixi_hh" / "IXI.xls")
    assert list(found.cohort["scan_id"]) == ["IXI013", "IXI014", "IXI015", "IXI033", "IXI048"]


def test_visits_that_a_name_calls_follow_ups_are_noted_as_several_sessions(data):
    table = "id,age\n" + "".join(f"{n:03d},{20 + n}\n" for n in range(4))
    folder = data({"ages.csv": table} | {f"{n:03d}_fu{1 + n % 2}.nii.gz": None for n in range(4)})
    data({f"{n:03d}_fu3.nii.gz": None for n in range(4)})
    assert any("one age in the table: 4" in note for note in match_scans(folder).notes)


def test_a_table_that_lies_deeper_is_named(data):
    folder = data({"other/participants.tsv": "id\tage\n01\t30\n", "set/sub-01_T1w.nii.gz": None})
    assert "The only table was read: other/participants.tsv." in match_scans(folder).notes
