import errno
import io
import os
import tempfile
import zipfile
from pathlib import Path

import pytest

from brainage_nb.apps import uploads
from brainage_nb.apps.uploads import StoredScan, plain_name, stored, together
from brainage_nb.predict.cautions import Failure


class Upload(io.BytesIO):
    def __init__(self, name, content):
        super().__init__(content)
        self.name = name


def left_behind():
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("brainage-")]


def test_uploads_are_files_for_as_long_as_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with stored([Upload("a.nii.gz", b"first"), Upload("a.nii.gz", b"second")]) as scans:
        assert [scan.path.read_bytes() for scan in scans] == [b"first", b"second"]
        assert [scan.name for scan in scans] == ["a.nii.gz"] * 2
    assert left_behind() == []


def test_nothing_is_left_when_predicting_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError), stored([Upload("a.nii", b"content")]):
        raise RuntimeError
    assert left_behind() == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\scans\\head.nii", "head.nii"),
        ("<script>.nii", "_script_.nii"),
        ("..", "scan.nii"),
        ("x" * 300 + ".nii.gz", "x" * 93 + ".nii.gz"),
    ],
)
def test_names_are_made_harmless(name, expected):
    assert plain_name(name) == expected


def only(upload):
    with stored([upload]) as found:
        assert len(found) == 1
        return found[0]


def zipped(files, **options):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_an_upload_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOAD", 10)
    assert only(Upload("a.nii", b"x" * 11)).code == "too_large"


def test_a_zip_without_dicom_is_refused_kindly():
    found = only(Upload("a.zip", zipped({"notes.txt": b"hello"})))
    assert found.code == "not_dicom" and "NIfTI" in found.sentence


def test_a_zip_bomb_is_refused_unopened(monkeypatch):
    monkeypatch.setattr(uploads, "MAX_DICOM_BYTES", 2**20)
    content = zipped({"slice.dcm": b"\0" * 2**22}, compression=zipfile.ZIP_DEFLATED)
    assert only(Upload("a.zip", content)).code == "too_large"


def test_a_full_disk_is_not_taken_for_a_damaged_upload(monkeypatch):
    def refuse(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    dicom = b"\0" * 128 + b"DICM"
    for name, content in {"a.nii": b"scan", "a.dcm": dicom, "a.zip": zipped({"a.dcm": dicom})}.items():
        found = only(Upload(name, content))
        assert found.code == "not_stored" and "the disk is full" in found.sentence


def test_a_damaged_zip_is_refused():
    assert only(Upload("a.zip", b"PK\x03\x04" + b"x" * 50)).code == "unreadable"


def test_dicom_files_that_are_none_are_refused_kindly():
    pytest.importorskip("dcm2niix")
    found = only(Upload("a.dcm", b"\0" * 128 + b"DICM" + b"x" * 50))
    assert isinstance(found, Failure) and found.code == "not_converted"


def test_a_dicom_series_becomes_one_scan(tmp_path):
    pytest.importorskip("dcm2niix")
    import nibabel as nib

    series = {
        f"folder/../{k}.dcm": dicom_slice(k) for k in range(5)
    }  # a path that leads out names no file of ours
    with stored([Upload("series.zip", zipped(series))]) as found:
        assert [type(scan) for scan in found] == [StoredScan]
        assert nib.load(found[0].path).shape == (16, 16, 5)
        assert found[0].name == "DICOM series 7"
    assert not list(Path(tempfile.gettempdir()).glob("*.dcm"))


def test_the_age_given_with_dicom_files_is_its_scans_and_nobodys_where_patients_are_mixed():
    pytest.importorskip("dcm2niix")
    one = {f"{k}.dcm": dicom_slice(k, "A") for k in range(5)}
    both = one | {f"b{k}.dcm": dicom_slice(k, "B") for k in range(5)}
    slices = [Upload(name, content) for name, content in one.items()]
    zips = [Upload("a.zip", zipped(one)), Upload("a.zip", zipped(one)), Upload("both.zip", zipped(both))]
    assert [len(thing) for thing in together([*slices, *zips])] == [1, 1, 1, 5]
    with stored([*slices, *zips], [20, 50, 80, 33]) as found:
        assert [scan.age for scan in found if isinstance(scan, StoredScan)] == [20, 50, None, None, 33]
        assert [scan.origin for scan in found[:2]] == ["upload 1/a.zip", "upload 2/a.zip"]
        assert found[4].code == "age" and "several patients" in found[4].sentence


def dicom_slice(number, patient=""):
    """One axial MR slice of 16 x 16 in explicit little-endian DICOM, written by hand."""
    import struct

    def element(tag, kind, value):
        value = value.encode() if isinstance(value, str) else value
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
        head = struct.pack("<HH", *tag) + kind.encode()
        if kind in ("OB", "OW"):
            return head + b"\0\0" + struct.pack("<I", len(value)) + value
        return head + struct.pack("<H", len(value)) + value

    root = "1.2.826.0.1.3680043.2.1125.1"
    meta = [
        ((2, 1), "OB", b"\0\1"),
        ((2, 2), "UI", "1.2.840.10008.5.1.4.1.1.4"),
        ((2, 3), "UI", f"{root}.{number + 1}"),
        ((2, 0x10), "UI", "1.2.840.10008.1.2.1"),
    ]
    data = [
        ((8, 8), "CS", "ORIGINAL\\PRIMARY\\M"),
        ((8, 0x16), "UI", "1.2.840.10008.5.1.4.1.1.4"),
        ((8, 0x18), "UI", f"{root}.{number + 1}"),
        ((8, 0x60), "CS", "MR"),
        ((8, 0x70), "LO", "SIEMENS"),
        ((0x10, 0x20), "LO", patient),
        ((0x18, 0x50), "DS", "3"),
        ((0x18, 0x88), "DS", "3"),
        ((0x20, 0xD), "UI", f"{root}.100{len(patient)}{ord(patient or '0')}"),
        ((0x20, 0xE), "UI", f"{root}.101{len(patient)}{ord(patient or '0')}"),
        ((0x20, 0x11), "IS", "7"),
        ((0x20, 0x13), "IS", str(number + 1)),
        ((0x20, 0x32), "DS", f"0\\0\\{3 * number}"),
        ((0x20, 0x37), "DS", "1\\0\\0\\0\\1\\0"),
        ((0x28, 2), "US", struct.pack("<H", 1)),
        ((0x28, 4), "CS", "MONOCHROME2"),
        ((0x28, 0x10), "US", struct.pack("<H", 16)),
        ((0x28, 0x11), "US", struct.pack("<H", 16)),
        ((0x28, 0x30), "DS", "1\\1"),
        ((0x28, 0x100), "US", struct.pack("<H", 16)),
        ((0x28, 0x101), "US", struct.pack("<H", 16)),
        ((0x28, 0x102), "US", struct.pack("<H", 15)),
        ((0x28, 0x103), "US", struct.pack("<H", 0)),
        ((0x7FE0, 0x10), "OW", bytes(range(256)) * 2),
    ]
    body = b"".join(element(*item) for item in meta)
    length = element((2, 0), "UL", struct.pack("<I", len(body)))
    return b"\0" * 128 + b"DICM" + length + body + b"".join(element(*item) for item in data)
