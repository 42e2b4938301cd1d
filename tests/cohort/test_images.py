"""Images in a folder, and what their names say."""

import pytest

from brainage_nb.cohort.images import find_images


@pytest.fixture
def folder(tmp_path):
    """Make empty files in a folder and find its images."""

    def filled(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return find_images(tmp_path / "data")

    return filled


def stems(images):
    return list(images["stem"])


def test_images_are_found_at_any_depth_and_by_any_ending(folder):
    images = folder(
        "a.nii", "b.nii.gz", "x/c.mgz", "x/y/d.NII.GZ", "e.hdr", "e.img", "f.img", "g.txt", "h.json"
    )
    assert sorted(stems(images)) == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("names", [("a.hdr.gz", "a.img.gz"), ("A.HDR", "A.IMG"), ("a.hdr", "a.img.gz")])
def test_a_pair_is_one_image_named_by_its_header(folder, names):
    images = folder(*names)
    assert [path.rsplit("/", 1)[1] for path in images["image"]] == [names[0]]
    assert stems(images) == [names[0][0]]


def test_hidden_files_and_those_of_macos_are_passed_over(folder):
    assert stems(folder("a.nii", "._a.nii", ".git/b.nii", "__MACOSX/c.nii", ".hidden.nii")) == ["a"]


def test_a_folder_named_like_an_image_is_a_folder(folder):
    images = folder("IXI002-Guys-0828-T1.nii/IXI002-Guys-0828-T1.nii", "IXI012-HH-1211-T1.nii/scan.nii")
    assert list(images["subject_hint"]) == ["IXI002", "IXI012"]
    assert list(images["site_hint"]) == ["Guys", "HH"]


def test_a_loop_of_links_ends(folder, tmp_path):
    folder("a/x.nii")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    assert stems(find_images(tmp_path / "data")) == ["x"]


def test_an_image_that_was_not_fetched_is_still_listed(folder, tmp_path):
    folder("a.nii")
    (tmp_path / "data" / "sub-01_T1w.nii.gz").symlink_to("gone")
    assert "sub-01_T1w" in stems(find_images(tmp_path / "data"))


def test_of_a_bids_data_set_only_raw_t1_is_taken_and_the_rest_noted(folder):
    images = folder(
        "sub-01/ses-1/anat/sub-01_ses-1_run-2_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz",
        "sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "odd.nii",
    )
    assert sorted(stems(images)) == ["odd", "sub-01_ses-1_run-2_T1w"]
    hints = images.set_index("stem").loc["sub-01_ses-1_run-2_T1w"]
    assert hints[["subject_hint", "session_hint", "run_hint"]].to_list() == ["01", "1", "2"]
    assert images.attrs["notes"] == [
        "BIDS images that are not T1w, left out: 2.",
        "Images in derivatives, sourcedata and code, left out: 1.",
    ]


@pytest.mark.parametrize(
    ("name", "subject", "session"),
    [
        ("IXI002-Guys-0828-T1.nii.gz", "IXI002", ""),
        ("OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img", "OAS1_0001", "MR1"),
        ("OAS30001_MR_d0129/anat2/x.nii.gz", "OAS30001", "d0129"),
        ("ADNI/002_S_0413/MPRAGE/2006/ADNI_002_S_0413_MR_MPRAGE_br_raw_S13893_I45117.nii", "002_S_0413", ""),
        ("sub-07/ses-02/T1.nii.gz", "07", "02"),
        ("ab12/visit2/T1.nii.gz", "", "2"),
        ("BMB_3001_retest_1.nii.gz", "", "retest_1"),
    ],
)
def test_names_of_known_data_sets_are_understood(folder, name, subject, session):
    images = folder(name)
    assert images.loc[0, ["subject_hint", "session_hint"]].to_list() == [subject, session]


@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("a_T1.nii", "T1"),
        ("a_T2.nii", "other"),
        ("a_T1_mask.nii", "other"),
        ("a.nii", ""),
        ("inia19-t1-brain.nii", "T1"),
    ],
)
def test_the_contrast_is_what_the_name_says(folder, name, contrast):
    assert folder(name)["contrast"][0] == contrast


def test_dicom_files_are_noted_and_a_missing_folder_is_refused(folder, tmp_path):
    assert "dcm2niix" in folder("x/1.dcm", "a.nii").attrs["notes"][0]
    with pytest.raises(FileNotFoundError, match="Set data_dir"):
        find_images(tmp_path / "nowhere")
