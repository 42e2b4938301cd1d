"""Images in a folder, and what their names say."""

import pytest

from brainage_nb.cohort.images import find_images, take_named

PRODUCTS = """
001_T1_heat.nii.gz heat_maps/001_T1_heat.nii.gz 001_T1_brain.nii.gz bet/001_brain.nii.gz
001_T1_pve_0.nii.gz 001_T1_brain_pve_2.nii.gz 001_T1_seg.nii.gz 001_T1_restore.nii.gz 001_T1_bias.nii.gz
001_T1_warp.nii.gz 001_T1_to_MNI_lin.nii.gz brain_001_T1.nii.gz c1001_T1.nii rc1001_T1.nii wc2001_T1.nii
mwc1001_T1.nii smwc1001_T1.nii s8mwc1001_T1.nii m001_T1.nii wm001_T1.nii y_001_T1.nii iy_001_T1.nii
u_rc1001_T1.nii rc1001_T1_affine.nii mri/mwp1001_T1.nii mri/p0001_T1.nii mri/wm001_T1.nii
BiasField_001_T1.nii 001_T1_biasfield.nii.gz 001_T1Warped.nii.gz 001_T1_InverseWarped.nii.gz
001_T11Warp.nii.gz 001_BrainExtractionBrain.nii.gz 001_BrainSegmentationPosteriors3.nii.gz
001_desc-preproc_T1w.nii.gz 001_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz fs/001/mri/T1.mgz
fs/001/mri/orig/001.mgz 001_T1.anat/T1_biascorr.nii.gz 001_T1-L_Hipp_first.nii.gz
001_T1_Crop_1.nii.gz fs/001.long.base/mri/T1.mgz
"""
PEOPLE = "HEAT_001_T1 NORM_002 brain03 c1_T1 m001 m002 orig_04 orig_05 r7 wm12"
FREESURFER = "T1 brain brain.finalsurfs nu orig rawavg wm aseg aparc+aseg orig/001"


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


def left(images):
    """File names of what was left out, with the reason."""
    found = images.attrs["left_out"]
    return {
        path.rsplit("/", 1)[-1]: reason for path, reason in zip(found["image"], found["reason"], strict=True)
    }


def test_of_a_bids_data_set_only_raw_t1_is_taken_and_the_rest_listed(folder):
    images = folder(
        "sub-01/ses-1/anat/sub-01_ses-1_run-2_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz",
        "sub-01/ses-1/func/sub-01_ses-1_task-rest_bold.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "heat_maps/sub-01_ses-1_run-2_T1w_heat.nii.gz",
        "cat12/mri/mwp1sub-01_ses-1_run-2_T1w.nii",
        "freesurfer/sub-01/mri/T1.mgz",
        "sub-01/ses-1/anat/sub-01_ses-1_space-MNI152_T1w.nii.gz",
        "odd.nii",
    )
    assert sorted(stems(images)) == ["odd", "sub-01_ses-1_run-2_T1w"]
    hints = images.set_index("stem").loc["sub-01_ses-1_run-2_T1w"]
    assert hints[["subject_hint", "session_hint", "run_hint"]].to_list() == ["01", "1", "2"]
    reasons = left(images)
    assert len(reasons) == 7 and all(reasons.values())
    assert "does not end in _T1w" in reasons["sub-01_ses-1_task-rest_bold.nii.gz"]
    assert "derivatives" in reasons["sub-01_desc-preproc_T1w.nii.gz"]
    assert "made from a raw scan" in reasons["T1.mgz"]


@pytest.mark.parametrize("product", PRODUCTS.split())
def test_a_product_of_a_scan_that_is_there_is_no_further_scan(folder, product):
    images = folder("001_T1.nii.gz", product, "002_T1.nii.gz")
    assert stems(images) == ["001_T1", "002_T1"]
    assert left(images)[product.rsplit("/", 1)[-1]].endswith("; 001_T1.nii.gz is taken")


def test_people_whose_ids_begin_or_end_like_products_are_people(folder):
    names = PEOPLE.split()
    assert stems(folder(*(f"{name}.nii" for name in names))) == names
    images = folder("001.nii", "2.nii", "c12.nii", "c1001.nii")
    assert set(left(images)) == {"c12.nii", "c1001.nii", "m001.nii"}
    images = take_named(images, ["C12", "2", "1", "m001"])
    assert set(left(images)) == {"c1001.nii"} and {"c12", "m001"} < set(stems(images))


def test_products_whose_scan_is_not_there_are_taken_with_a_note_but_never_maps(folder):
    images = folder("001_brain.nii.gz", "001_brain_mask.nii.gz", "002_brain.nii.gz", "003_pve_1.nii.gz")
    assert (
        stems(images) == ["001_brain", "002_brain"] and "2, the first 001_brain" in images.attrs["notes"][0]
    )
    assert "no scan" in left(images)["003_pve_1.nii.gz"]
    assert "no scan" in left(folder("mwp1sub-04_T1w.nii"))["mwp1sub-04_T1w.nii"]


def test_one_volume_of_a_freesurfer_subject_is_taken(folder):
    volumes = FREESURFER.split()
    names = [f"fs/{one}/mri/{name}.mgz" for one in ("A", "B") for name in volumes]
    images = folder(*names, "fs/C/mri/orig.mgz", "fs/C/mri/brain.mgz", "D/T1.mgz", "D/brain.mgz", "D/wm.mgz")
    assert list(images["folders"] + "/" + images["stem"]) == [
        "D/T1",
        "fs/A/mri/T1",
        "fs/B/mri/T1",
        "fs/C/mri/orig",
    ]


def test_scans_of_a_workspace_in_the_folder_are_not_taken_and_change_nothing(folder, tmp_path):
    folder("sub-01_T1.nii", "workspace/demo/sub-0001/anat/sub-0001_T1w.nii.gz")
    (tmp_path / "data" / "workspace" / "brainage_workspace.json").touch()
    images = find_images(tmp_path / "data")
    assert stems(images) == ["sub-01_T1"] and "workspace" in left(images)["sub-0001_T1w.nii.gz"]
    assert stems(find_images(tmp_path / "data" / "workspace")) == ["sub-0001_T1w"]


def test_a_product_belongs_to_the_scan_of_its_own_folder(folder):
    images = folder("1/T1.nii", "1/mT1.nii", "1/wmT1.nii", "2/mT1.nii", "3/T1.nii", "bet/3/T1_brain.nii")
    assert list(images["folders"] + "/" + images["stem"]) == ["1/T1", "2/mT1", "3/T1"]


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


@pytest.mark.parametrize("folder", ["FLAIR", "T2", "masks", "brain_masks", "bet", "labelsTr", "lesion_masks"])
def test_a_folder_named_after_what_was_made_or_measured_holds_no_second_scans(tmp_path, folder):
    for name in (f"{one}/{n:03d}.nii.gz" for one in ("T1", folder) for n in range(3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(tmp_path)
    assert list(found["folders"]) == ["T1"] * 3
    assert list(take_named(found, ["000", "001", "002"])["folders"]) == ["T1"] * 3
    assert found.attrs["left_out"]["reason"].str.contains("is taken").all()


@pytest.mark.parametrize("folder", ["FLAIR", "masks", "bet"])
def test_nor_does_such_a_folder_of_each_subject(tmp_path, folder):
    for name in (f"{n:03d}/{one}/x.nii.gz" for one in ("T1", folder) for n in range(3)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(find_images(tmp_path)["folders"]) == ["000/T1", "001/T1", "002/T1"]


@pytest.mark.parametrize("folder", ["bet", "lesion"])
def test_scans_that_lie_in_such_a_folder_only_are_taken(tmp_path, folder):
    for name in (f"{folder}/1.nii.gz", "control/2.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(find_images(tmp_path)) == 2


@pytest.mark.parametrize("word", ["lesions", "WMH", "tumor", "heatmap", "atlas", "labelmap"])
def test_maps_beside_a_scan_are_no_scans(tmp_path, word):
    for name in ("p01.nii.gz", f"p01_{word}.nii.gz"):
        (tmp_path / name).touch()
    assert list(find_images(tmp_path)["stem"]) == ["p01"]
