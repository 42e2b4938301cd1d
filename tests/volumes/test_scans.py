"""What is wrong with a scan file is said, and what was assumed is flagged."""

import gzip
import pickle
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from brainage_nb.volumes.scans import SCAN_ERRORS, SCAN_FLAGS, ScanError, load_scan, voxel_sizes

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 1000, (12, 10, 8)).astype(np.int16)


@pytest.fixture
def scan(array, tmp_path):
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return path


def code_of(path, **options):
    with pytest.raises(ScanError) as caught:
        load_scan(path, **options)
    assert caught.value.code in SCAN_ERRORS
    assert path.name in caught.value.sentence
    return caught.value.code


def test_a_good_scan_comes_back_as_it_was_written(scan, array):
    image = load_scan(scan)
    assert np.array_equal(image.dataobj, array)
    assert np.asarray(image.dataobj).dtype == np.float32
    assert np.array_equal(image.affine, AFFINE)
    assert image.extra == {"flags": {}, "nonfinite_fraction": 0.0, "path": scan}


def test_slope_and_intercept_are_applied(array, tmp_path):
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_slope_inter(0.5, 7)
    nib.save(image, tmp_path / "scaled.nii")
    stored = np.asarray(nib.load(tmp_path / "scaled.nii").dataobj.get_unscaled())
    assert np.allclose(load_scan(tmp_path / "scaled.nii").dataobj, stored * 0.5 + 7)


@pytest.mark.parametrize("name", ["s.nii", "s.mgz", "s.hdr"])
def test_other_formats_are_read(name, array, tmp_path):
    kind = {"s.nii": nib.Nifti2Image, "s.mgz": nib.MGHImage, "s.hdr": nib.Nifti1Pair}[name]
    nib.save(kind(array, AFFINE), tmp_path / name)
    assert np.array_equal(load_scan(tmp_path / name).dataobj, array)


def test_compression_is_seen_from_the_content_and_not_from_the_name(scan, array, tmp_path):
    (tmp_path / "packed.nii").write_bytes(scan.read_bytes())
    (tmp_path / "plain.nii.gz").write_bytes(gzip.decompress(scan.read_bytes()))
    for name in ("packed.nii", "plain.nii.gz"):
        assert np.array_equal(load_scan(tmp_path / name).dataobj, array)


def test_a_gzip_file_of_two_members_is_read_whole(scan, array, tmp_path):
    content = gzip.decompress(scan.read_bytes())
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(content[:700]) + gzip.compress(content[700:]))
    assert np.array_equal(load_scan(tmp_path / "two.nii.gz").dataobj, array)


def test_a_truncated_file_is_truncated_whether_compressed_or_not(scan, tmp_path):
    plain = gzip.decompress(scan.read_bytes())
    (tmp_path / "cut.nii.gz").write_bytes(scan.read_bytes()[:-200])
    (tmp_path / "cut_checksum.nii.gz").write_bytes(scan.read_bytes()[:-3])
    (tmp_path / "cut.nii").write_bytes(plain[:-200])
    (tmp_path / "cut_inside.nii.gz").write_bytes(gzip.compress(plain[:-200]))
    (tmp_path / "empty.nii").write_bytes(b"")
    for path in [*tmp_path.glob("cut*"), tmp_path / "empty.nii"]:
        assert code_of(path) == "truncated"


def test_a_flipped_byte_in_compressed_data_is_found(scan, tmp_path):
    content = bytearray(scan.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.nii.gz").write_bytes(content)
    assert code_of(tmp_path / "flipped.nii.gz") in ("truncated", "unreadable")


def test_what_is_no_image_is_unreadable(tmp_path):
    (tmp_path / "text.nii").write_text("subject,age\n1,30\n" * 100)
    (tmp_path / "link.nii.gz").write_text("/annex/objects/MD5E-s123--abc.nii.gz\n")
    assert code_of(tmp_path / "text.nii") == "unreadable"
    assert code_of(tmp_path / "link.nii.gz") == "unreadable"
    assert code_of(tmp_path / "absent.nii") == "missing"


def test_an_image_of_another_kind_is_refused_with_its_kind(array, tmp_path):
    colours = np.zeros((12, 10, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    images = {
        "not_3d": nib.Nifti1Image(np.stack([array, array], -1), AFFINE),
        "not_scalar": nib.Nifti1Image(colours, AFFINE),
        "blank": nib.Nifti1Image(np.full_like(array, 5), AFFINE),
        "not_finite": nib.Nifti1Image(np.full(array.shape, np.nan, np.float32), AFFINE),
    }
    for code, image in images.items():
        nib.save(image, tmp_path / f"{code}.nii")
        assert code_of(tmp_path / f"{code}.nii") == code
    nib.save(nib.Nifti1Image(array.astype(np.complex64), AFFINE), tmp_path / "complex.nii")
    assert code_of(tmp_path / "complex.nii") == "not_scalar"


def test_a_header_without_its_voxels_is_called_so(array, tmp_path):
    nib.save(nib.Nifti1Pair(array, AFFINE), tmp_path / "lonely.hdr")
    (tmp_path / "lonely.img").unlink()
    assert code_of(tmp_path / "lonely.hdr") == "header_only"


def test_an_affine_without_volume_is_refused(array, tmp_path):
    image = nib.Nifti1Image(array, AFFINE)
    image.header.set_sform(np.diag([2.0, 0.0, 4.0, 1.0]), code=1)
    image.header["qform_code"] = 0
    nib.save(nib.Nifti1Image(array, None, image.header), tmp_path / "flat.nii")
    assert code_of(tmp_path / "flat.nii") == "bad_affine"


def test_more_voxels_than_allowed_are_refused_by_the_header_alone(scan):
    assert code_of(scan, max_voxels=100) == "too_large"


@pytest.mark.parametrize("n_members", [1, 3])
def test_a_file_that_unpacks_to_more_than_its_header_claims_stops_there(array, tmp_path, n_members):
    bomb = tmp_path / "bomb.nii.gz"
    content = nib.Nifti1Image(array, AFFINE).to_bytes() + bytes(2**28)
    step = -(-len(content) // n_members)
    pieces = [content[start : start + step] for start in range(0, len(content), step)]
    bomb.write_bytes(b"".join(gzip.compress(piece, 1) for piece in pieces))
    del content, pieces
    tracemalloc.start()
    assert code_of(bomb) == "unreadable"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27  # the file, and what its header claims with some slack; not the 256 MiB it holds


def test_assumptions_are_flagged(array, tmp_path):
    plain = nib.Nifti1Image(array, None)
    shear = AFFINE.copy()
    shear[0, 1] = 1.0
    some = array.astype(np.float32)
    some[:2] = np.nan
    images = {
        "no_affine": plain,
        "one_volume_4d": nib.Nifti1Image(array[..., None], AFFINE),
        "sheared": nib.Nifti1Image(array, shear),
        "some_not_finite": nib.Nifti1Image(some, AFFINE),
    }
    for flag, image in images.items():
        nib.save(image, tmp_path / f"{flag}.nii.gz")
        loaded = load_scan(tmp_path / f"{flag}.nii.gz")
        assert list(loaded.extra["flags"]) == [flag]
        assert loaded.extra["flags"][flag].endswith(".")
        assert loaded.shape == array.shape
        assert np.isfinite(loaded.dataobj).all()
    assert set(images) <= set(SCAN_FLAGS)
    assert loaded.extra["nonfinite_fraction"] == pytest.approx(2 / 12)


def test_voxel_sizes_of_a_turned_affine_are_edge_lengths():
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
    assert np.allclose(voxel_sizes(turn @ AFFINE[:3, :3]), [2, 3, 4])


def test_the_error_survives_the_way_between_processes():
    again = pickle.loads(pickle.dumps(ScanError("blank", "one value")))
    assert (again.code, again.sentence, str(again)) == ("blank", "one value", "one value")


def test_every_odd_file_is_refused_or_read_and_never_crashes(shared_data):
    expected = {
        "complex.nii.gz": "not_scalar",
        "example4d.nii.gz": "not_3d",
        "functional.nii": "not_3d",
        "test.mgz": "not_3d",
        "nifti1.hdr": "header_only",
        "row_major.dconn.nii": "not_volume",
        "minimal.nii.gz": ("no_affine",),
        "shear.nii.gz": ("sheared",),
        "resampled_anat_moved.nii": ("some_not_finite",),
    }
    for path in sorted((shared_data / "odd_nifti").glob("*.[nmh]*")):
        try:
            found = tuple(load_scan(path).extra["flags"])
        except ScanError as error:
            found = error.code
        assert found == expected.get(path.name, ()), path.name
