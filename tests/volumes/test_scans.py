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


# --- headers that disagree with themselves, and other units ----------------------------------------------


def turned(degrees):
    angle, turn = np.radians(degrees), np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


def write(path, array, *, sform=AFFINE, sform_code=1, qform=AFFINE, qform_code=1, **fields):
    """A NIfTI-1 file whose header says what is given, whether it fits together or not."""
    header = nib.Nifti1Header()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_qform(qform, qform_code)
    header.set_sform(sform, sform_code)
    for name, value in fields.items():
        header[name] = value
    header["vox_offset"] = fields.get("vox_offset", 352)
    header["magic"] = b"n+1"
    path.write_bytes(header.binaryblock + bytes(4) + array.tobytes(order="F"))
    return path


LARGER, MIRRORED = np.diag([2.2, 3.3, 4.4, 1.0]), np.diag([-2.0, 3.0, 4.0, 1.0])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            {"sform": LARGER},
            ["in size:", "sform (code 1) says 2.2 x 3.3 x 4.4 mm, RAS", "says 2 x 3 x 4 mm, RAS"],
        ),
        (
            {"sform": LARGER, "qform_code": 0},
            ["in size:", "pixdim says 2 x 3 x 4 mm", "Used was the sform (code 1)"],
        ),
        (
            {"sform": MIRRORED, "sform_code": 2},
            ["side (one mirrors", "sform (code 2) says 2 x 3 x 4 mm, LAS"],
        ),
        ({"sform": np.diag([-2.0, -3.0, 4.0, 1.0])}, ["in axes (up to 180 degrees apart):", "LPS", "RAS"]),
        ({"sform": turned(10) @ AFFINE}, ["in axes (up to 10 degrees apart):"]),
        ({"sform": turned(180) @ LARGER}, ["in size and axes"]),
        ({"quatern_b": np.nan}, ["no rotation", "length nan", "the sform was used"]),
        ({"quatern_b": 1.4}, ["no rotation", "length 1.4", "the sform was used"]),
    ],
)
def test_a_header_that_disagrees_with_itself_is_flagged_with_what_each_part_says(
    array, tmp_path, header, said
):
    image = load_scan(write(tmp_path / "a.nii", array, **header))
    assert list(image.extra["flags"]) == ["header_disagrees"]
    assert np.allclose(image.affine, header.get("sform", AFFINE))
    for words in said:
        assert words in image.extra["flags"]["header_disagrees"]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"sform_code": 0},
        {"qform_code": 0},
        {"sform": turned(1) @ AFFINE},
        {"sform": np.diag([2.004, 3.004, 4.004, 1.0])},
        {"pixdim": [1, 0, 0, 0, 1, 1, 1, 1]},  # no size is stated beside the sform's
        {"sform": LARGER, "sform_code": 0},  # not in force
    ],
)
def test_a_header_that_agrees_but_for_rounding_is_not_flagged(array, tmp_path, header):
    assert load_scan(write(tmp_path / "a.nii", array, **header)).extra["flags"] == {}


def test_a_turned_head_written_with_both_forms_is_not_flagged_for_the_rounding_of_its_quaternion(
    array, tmp_path
):
    from scipy.spatial.transform import Rotation

    for number in range(20):
        affine = np.diag([0.9375, 0.9375, 1.2, 1.0])
        affine[:3, :3] = Rotation.random(random_state=number).as_matrix() @ affine[:3, :3]
        path = write(tmp_path / "a.nii", array, sform=affine, qform=affine)
        assert load_scan(path).extra["flags"] == {}


def test_metres_and_microns_become_mm_by_the_unit_of_the_header(array, tmp_path):
    for unit, code, factor in (("metre", 1, 1e-3), ("micron", 3, 1e3)):
        affine = np.diag([factor, factor, factor, 1]) @ AFFINE
        path = write(tmp_path / "a.nii", array, sform=affine, qform=affine, xyzt_units=code)
        image = load_scan(path)
        assert np.allclose(image.affine, AFFINE)
        assert list(image.extra["flags"]) == ["unit_not_mm"]
        for words in (f"unit is the {unit}", "read as 2 x 3 x 4 mm"):
            assert words in image.extra["flags"]["unit_not_mm"]
        # the unit is wrong, the numbers are mm
        image = load_scan(write(tmp_path / "b.nii", np.tile(array, (8, 1, 1)), xyzt_units=code))
        assert np.allclose(image.affine, AFFINE)
        assert (
            "is no head: voxels of 2 x 3 x 4 were read as 2 x 3 x 4 mm" in image.extra["flags"]["unit_not_mm"]
        )


@pytest.mark.parametrize(("code", "unit"), [(0, "unknown"), (2, "millimetre"), (7, "unknown")])
def test_a_size_that_no_unit_explains_is_refused_with_the_unit(array, tmp_path, code, unit):
    affine = np.diag([0.002, 0.003, 0.004, 1.0])
    path = write(tmp_path / "a.nii", array, sform=affine, qform=affine, xyzt_units=code)
    with pytest.raises(ScanError, match=f"0.002 x 0.003 x 0.004 .*unit: {unit}") as error:
        load_scan(path)
    assert error.value.code == "bad_affine"


def test_a_voxel_size_of_zero_is_no_millimetre(array, tmp_path):
    path = write(tmp_path / "a.nii", array, sform_code=0, pixdim=[1, 2, 0, 4, 1, 1, 1, 1])
    with pytest.raises(ScanError, match="pixdim says 2 x 0 x 4"):
        load_scan(path)


def test_a_quaternion_a_rounding_too_long_is_read_as_a_rotation(array, tmp_path):
    parts = {"quatern_b": 0.70710712, "quatern_c": 0.70710712, "quatern_d": 0.0}
    image = load_scan(write(tmp_path / "a.nii", array, sform_code=0, **parts))
    assert nib.aff2axcodes(image.affine) == ("A", "R", "I")
    assert np.allclose(voxel_sizes(image.affine), [2, 3, 4])
    assert code_of(write(tmp_path / "b.nii", array, sform_code=0, quatern_b=1.4)) == "bad_affine"


def test_what_spm_keeps_beside_an_analyze_pair_counts_and_is_compared(array, tmp_path):
    image = nib.Spm2AnalyzeImage(array, AFFINE)
    nib.save(image, tmp_path / "a.img")
    assert np.allclose(load_scan(tmp_path / "a.hdr").affine, AFFINE)
    header = nib.Spm2AnalyzeImage(array, LARGER).header
    (tmp_path / "a.hdr").write_bytes(header.binaryblock)
    found = load_scan(tmp_path / "a.img")
    assert np.allclose(found.affine, AFFINE)
    assert (
        "a.mat says 2 x 3 x 4 mm, RAS; pixdim says 2.2 x 3.3 x 4.4 mm"
        in found.extra["flags"]["header_disagrees"]
    )
    (tmp_path / "a.mat").unlink()
    assert list(load_scan(tmp_path / "a.hdr").extra["flags"]) == ["no_affine"]


def test_a_freesurfer_file_without_orientation_is_flagged(array, tmp_path):
    content = bytearray(nib.MGHImage(array, AFFINE).to_bytes())
    content[28:30] = b"\0\0"
    (tmp_path / "a.mgh").write_bytes(content)
    assert list(load_scan(tmp_path / "a.mgh").extra["flags"]) == ["no_affine"]


# --- NaN ------------------------------------------------------------------------------------------------


def test_nan_around_a_brain_is_background_and_nan_all_over_is_no_head(tmp_path):
    rng, affine = np.random.default_rng(0), np.diag([4.0, 4.0, 4.0, 1.0])
    away = np.linalg.norm(np.indices((50, 50, 50)) - 24.5, axis=0) * 4
    brain = np.where(away < 68, rng.normal(0, 1, away.shape), np.nan).astype(np.float32)  # z-scores
    nib.save(nib.Nifti1Image(brain, affine), tmp_path / "stripped.nii.gz")
    image = load_scan(tmp_path / "stripped.nii.gz")
    assert image.extra["nonfinite_fraction"] > 0.8
    assert list(image.extra["flags"]) == ["some_not_finite"]
    assert image.dataobj[0, 0, 0] < -2  # darker than nearly all of the brain
    nib.save(nib.Nifti1Image(np.where(brain < 0, np.nan, brain), affine), tmp_path / "holes.nii.gz")
    nib.save(nib.Nifti1Image(np.where(away < 30, brain, np.nan), affine), tmp_path / "small.nii.gz")
    for name in ("holes", "small"):
        assert code_of(tmp_path / f"{name}.nii.gz") == "not_finite"


# --- bytes ----------------------------------------------------------------------------------------------


def test_what_gunzip_and_nibabel_read_is_read(scan, array, tmp_path):
    header = nib.Nifti1Header()
    header.extensions.append(nib.nifti1.Nifti1Extension("afni", b"x" * 20000))
    nib.save(nib.Nifti1Image(array, AFFINE, header), tmp_path / "extension.nii.gz")
    packed = scan.read_bytes()
    files = {
        "trailing.nii.gz": packed + b"\r\n--boundary--\r\n",
        "zeros.nii.gz": packed + bytes(5000),
        "twice.nii.gz": gzip.compress(packed),
        "twice_trailing.nii.gz": gzip.compress(packed + b"junk") + b"junk",
        "offset_0.nii": write(tmp_path / "x.nii", array, vox_offset=0).read_bytes(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ("extension.nii.gz", *files):
        image = load_scan(tmp_path / name)
        assert np.array_equal(image.dataobj, array), name
        assert np.array_equal(image.affine, AFFINE)


@pytest.mark.parametrize(
    ("header", "voxels"),
    [(".hdr.gz", ".img.gz"), (".HDR", ".IMG"), (".hdr", ".img.gz"), (".HDR.GZ", ".IMG.GZ"), (".hdr", ".img")],
)
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_a_pair_is_read_by_either_half(array, tmp_path, kind, header, voxels):
    nib.save(kind(array, AFFINE), tmp_path / "pair.hdr")
    for old, new in ((".hdr", header), (".img", voxels)):
        content = (tmp_path / f"pair{old}").read_bytes()
        (tmp_path / f"scan{new}").write_bytes(
            gzip.compress(content) if new.lower().endswith("gz") else content
        )
    for ending in (header, voxels):
        image = load_scan(tmp_path / f"scan{ending}")
        assert np.array_equal(image.dataobj, array)
        assert np.array_equal(image.affine, AFFINE)
    (tmp_path / f"scan{header}").unlink()
    with pytest.raises(ScanError, match=r"holds voxels only: its header scan\.hdr is missing"):
        load_scan(tmp_path / f"scan{voxels}")


def test_half_a_pair_that_ends_early_is_truncated(array, tmp_path):
    nib.save(nib.Nifti1Pair(array, AFFINE), tmp_path / "a.hdr")
    content = (tmp_path / "a.img").read_bytes()
    (tmp_path / "a.img").write_bytes(content[:-100])
    assert code_of(tmp_path / "a.hdr") == "truncated"


def test_a_bomb_inside_a_gzip_file_and_an_absurd_offset_stop_early(array, tmp_path):
    content = nib.Nifti1Image(array, AFFINE).to_bytes() + bytes(2**28)
    (tmp_path / "twice.nii.gz").write_bytes(gzip.compress(gzip.compress(content, 1), 1))
    for name, offset in (("far", 1e12), ("inf", np.inf), ("nan", np.nan), ("negative", -1e30)):
        path = write(tmp_path / "x.nii", array, vox_offset=offset)
        (tmp_path / f"{name}.nii.gz").write_bytes(gzip.compress(path.read_bytes() + bytes(2**26), 1))
    del content
    tracemalloc.start()
    for name in ("twice", "far", "inf", "nan", "negative"):
        assert code_of(tmp_path / f"{name}.nii.gz") == "unreadable", name
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def test_whatever_a_reader_raises_becomes_the_reason(scan, monkeypatch):
    for fault in (
        OverflowError("too far"),
        RecursionError("deep"),
        KeyError(7),
        PermissionError(13, "denied"),
    ):

        def broken(*_, fault=fault):
            raise fault

        monkeypatch.setattr("brainage_nb.volumes.scans._repair", broken)
        assert code_of(scan) == "unreadable"
