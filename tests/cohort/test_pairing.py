"""Images of other modalities stand beside the T1w scan of their session, or it is said why not."""

import pytest

from brainage_nb.sources.folder import SourceError, match_scans
from brainage_nb.sources.opening import SourceSettings

TWO_PEOPLE = "participant_id\tage\nsub-1001\t30\nsub-1002\t40\n"


@pytest.fixture
def match(tmp_path):
    """Function (names, modalities) -> the cohort of empty files of these names and two people's ages."""

    def put_together(names, modalities):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        (tmp_path / "participants.tsv").write_text(TWO_PEOPLE)
        return match_scans(tmp_path, root=tmp_path, modalities=modalities)

    return put_together


def bids(subject, session, name, folder="anat"):
    return f"sub-{subject}/ses-{session}/{folder}/sub-{subject}_ses-{session}_{name}.nii.gz"


def reasons(found):
    return dict(zip(found.unmatched_images["image"], found.unmatched_images["reason"], strict=True))


def test_bids_sessions_are_paired_and_neither_t2star_nor_pd_is_a_t2w(match):
    names = [bids(1001, 1, name) for name in ("T1w", "acq-tse_T2w", "T2star", "PDw", "FLAIR")]
    names += [bids(1001, 1, "dir-AP_dwi", "dwi"), bids(1002, 1, "T1w"), bids(1002, 1, "T2star")]
    found = match(names, ["T2w", "FLAIR", "dwi-FA"])
    columns = found.cohort[["T2w", "FLAIR", "dwi-FA"]].values.tolist()
    assert columns == [[names[1], names[4], names[5]], ["", "", ""]]
    assert {names[2], names[3], names[7]} == set(reasons(found))
    assert "T2w: 1 of 2 T1w scans have one of their session." in found.notes


def test_another_sessions_scan_is_not_paired_and_of_two_none_is_taken(match):
    later = [bids(1001, 2, "T2w"), "derivatives/x/" + bids(1001, 1, "T2w")]
    twice = [bids(1002, 1, "run-1_T2w"), bids(1002, 1, "run-2_T2w")]
    found = match([bids(1001, 1, "T1w"), bids(1002, 1, "T1w"), *later, *twice], ["T2w"])
    assert "T2w" not in found.cohort
    told = reasons(found)
    assert told[later[0]] == "a T2w scan, and no T1w scan of its session is taken"
    assert "derivatives" in told[later[1]]
    for name in twice:
        assert "2 T2w scans are of one session" in told[name] and "none taken" in told[name]


@pytest.mark.parametrize(
    ("t1w", "others", "apart"),
    [
        ("IXI1001-HH-1211-T1.nii.gz", ["IXI1001-HH-1211-T2.nii.gz", "IXI1001-HH-1211-PD.nii.gz"], []),
        ("T1/1001.nii.gz", ["T2/1001.nii.gz", "PD/1001.nii.gz"], ["T2/1002.nii.gz"]),
        ("1001/1001_mprage.nii", ["1001/1001_t2.nii", "1001/1001_PDw.nii"], ["1001/1001_t2_flair.nii"]),
        ("1001.nii.gz", ["1001_T2.nii.gz", "1001_PD.nii.gz"], ["1001_T2_seg.nii.gz", "1001_T2_star.nii.gz"]),
    ],
)
def test_elsewhere_the_name_of_the_t1w_scan_finds_the_others(match, t1w, others, apart):
    found = match([t1w, *others, *apart], ["T2w", "PDw"])
    assert found.cohort[["image", "T2w", "PDw"]].values.tolist() == [[t1w, *others]]
    assert set(reasons(found)) == set(apart)


def test_a_modality_that_nobody_has_is_said_and_the_cohort_is_what_it_was(match):
    names = [bids(1001, 1, "T1w"), bids(1001, 1, "T2w")]
    plain, asked = match(names, []), match(names, ["FLAIR"])
    assert asked.cohort.equals(plain.cohort) and reasons(asked) == reasons(plain)
    assert "FLAIR: none was found of a session of the 1 T1w scans" in asked.notes[-1]


def test_a_cohort_of_other_modalities_alone_is_refused(match):
    with pytest.raises(SourceError, match="All images with a row are of T2w"):
        match(["T2/1001.nii.gz", "T2/1002.nii.gz"], ["T2w"])


def test_a_name_that_is_no_modality_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="modalities: 'T3w' is none of T1w, T2w, PDw, FLAIR"):
        SourceSettings(modalities="T1w,T3w")
    assert SourceSettings(modalities="T2w,T1w,T2w").further_modalities == ["T2w"]
