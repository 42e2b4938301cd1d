import io
import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from brainage_nb import bundle_format as bundle_files
from brainage_nb.bundle_format import BundleError, open_bundle, write_bundle, zip_bundle
from tests.models.tiny_bundle import manifest

WEIGHTS = {"member-00.safetensors": {"weight": np.arange(6, dtype=np.float16).reshape(2, 3)}}


def sound(**changes):
    """A manifest that holds."""
    return manifest(reference={"likeness": [0.8, 0.9, 1.0], "n_volumes": 3}, **changes)


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", sound(), WEIGHTS, "a card")


def zipped(tmp_path, files, **options):
    path = tmp_path / "made.zip"
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back_from_folder_zip_and_open_file(bundle, tmp_path):
    packed = zip_bundle(bundle, tmp_path / "bundle.zip")
    for source in (bundle, str(packed), io.BytesIO(packed.read_bytes())):
        files = open_bundle(source)
        assert files.manifest["run"] == "tiny" and files.manifest["format"] == 1
        np.testing.assert_array_equal(
            files.arrays("member-00.safetensors")["weight"], np.arange(6).reshape(2, 3)
        )


def test_a_folder_zipped_by_hand_on_a_mac_opens(bundle, tmp_path):
    files = {f"my bundle/{name}": content for name, content in contents(bundle).items()}
    path = zipped(tmp_path, files | {"__MACOSX/my bundle/._bundle.json": b"x", "my bundle/.DS_Store": b"x"})
    assert open_bundle(path).manifest["run"] == "tiny"


def test_saving_again_replaces_the_bundle_and_leaves_nothing_beside_it(bundle):
    write_bundle(bundle, sound(run="newer"), WEIGHTS)
    assert open_bundle(bundle).manifest["run"] == "newer"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    assert not (bundle / "README.md").exists()


def test_a_bundle_that_cannot_be_written_leaves_the_old_one(bundle):
    with pytest.raises(Exception, match="object"):
        write_bundle(bundle, sound(run="broken"), {"member-00.safetensors": {"weight": np.array([object()])}})
    assert open_bundle(bundle).manifest["run"] == "tiny"
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


HOSTILE_FILES = {
    "pickle": (pickle.dumps(Harmful()), "pickle"),
    "pickle, old protocol": (pickle.dumps({"a": 1}, protocol=2), "pickle"),
    "text": (b"hello", "not a zip"),
    "empty": (b"", "is empty"),
    "gzip": (b"\x1f\x8b\x08\x00" + b"\0" * 20, "gzip"),
    "cut zip": (b"PK\x03\x04" + b"\0" * 40, "damaged zip"),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_file_that_is_no_zip_is_refused_and_named(name, tmp_path):
    content, said = HOSTILE_FILES[name]
    path = tmp_path / "bundle.zip"
    path.write_bytes(content)
    for source in (path, io.BytesIO(content)):
        with pytest.raises(BundleError, match=said):
            open_bundle(source)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("../evil.safetensors", "does not belong"),
        ("/etc/passwd", "does not belong"),
        ("a\\..\\evil.json", "does not belong"),
        ("C:evil.json", "does not belong"),
        ("data.pkl", "pickle or PyTorch"),
        ("weights.pt", "pickle or PyTorch"),
        ("run_me.py", "does not belong"),
        ("member-0.safetensors", "does not belong"),
        ("more/member-00.safetensors", "does not belong"),
    ],
)
def test_an_entry_that_does_not_belong_is_refused(entry, said, bundle, tmp_path):
    with pytest.raises(BundleError, match=said):
        open_bundle(zipped(tmp_path, contents(bundle) | {entry: b"content"}))


def test_a_zip_bomb_is_refused_before_it_is_opened(bundle, tmp_path):
    bomb = contents(bundle) | {"member-01.safetensors": b"\0" * 2**24}
    with pytest.raises(BundleError, match="zip bomb"):
        open_bundle(zipped(tmp_path, bomb, compression=zipfile.ZIP_DEFLATED))


def test_a_bundle_larger_than_the_limit_is_refused(bundle):
    with pytest.raises(BundleError, match="opens to"):
        open_bundle(bundle, max_bytes=100)


def test_unusual_compression_is_refused(bundle, tmp_path):
    with pytest.raises(BundleError, match="unusual way"):
        open_bundle(zipped(tmp_path, contents(bundle), compression=zipfile.ZIP_LZMA))


def test_links_are_refused_in_folders_and_are_no_file_of_a_zip(bundle, tmp_path):
    link = zipfile.ZipInfo("member-01.safetensors")
    link.external_attr = 0o120777 << 16
    path = zipped(tmp_path, contents(bundle))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BundleError, match=r"member-01\.safetensors has 11 bytes, expected no"):
        open_bundle(path)
    (bundle / "member-01.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="link"):
        open_bundle(bundle)


def test_two_entries_of_one_name_are_refused(bundle, tmp_path):
    path = zipped(tmp_path, contents(bundle))
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("bundle.json", "{}")
    with pytest.raises(BundleError, match="two files of one name"):
        open_bundle(path)


def test_many_files_are_refused(bundle, tmp_path):
    crowd = {f"member-{number:02d}.safetensors": b"" for number in range(99)}
    with pytest.raises(BundleError, match="at most 64"):
        open_bundle(zipped(tmp_path, contents(bundle) | crowd))


def test_changed_weights_are_noticed(bundle):
    path = bundle / "member-00.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(bundle).arrays("member-00.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "Update brainage-nb"),
        ({"format": "1"}, "format: 1 was expected"),
        ({"format": True}, "format: 1 was expected"),
        ({"files": []}, r"files: \[\] is not of type 'object'"),
        ({"files": {}}, "not the listed files: .*member-00"),
        ({"files": {"member-00.safetensors": {"sha256": "0" * 64, "bytes": 3}}}, "expected 3"),
    ],
)
def test_a_manifest_that_contradicts_is_refused(change, said, bundle):
    path = bundle / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=said):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_no_json_object_is_refused(text, bundle):
    (bundle / "bundle.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"bundle\.json"):
        open_bundle(bundle)


def test_a_huge_manifest_is_refused_unread(bundle, monkeypatch):
    monkeypatch.setattr(bundle_files, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(BundleError, match="at most 10"):
        open_bundle(bundle)


def test_a_missing_manifest_or_bundle_is_said(bundle, tmp_path):
    with pytest.raises(BundleError, match="No bundle at"):
        open_bundle(tmp_path / "nowhere")
    (bundle / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        open_bundle(bundle)


def test_arrays_that_are_no_safetensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.numpy.save", lambda named: b"\xff" * 64)
    folder = write_bundle(tmp_path / "bundle", sound(), WEIGHTS)
    with pytest.raises(BundleError, match="not a readable safetensors"):
        open_bundle(folder).arrays("member-00.safetensors")


def test_a_place_near_a_bundle_is_answered_with_the_bundles_own(bundle, tmp_path):
    run = tmp_path / "ws" / "runs" / "resnet18"
    meant = Path(shutil.copytree(bundle, run / "bundle"))
    (run / "settings.json").write_text("{}")
    (run / "checkpoints" / "seed1").mkdir(parents=True)
    near = (
        run,
        run.parent,
        run.parents[1],
        run / "settings.json",
        run / "checkpoints",
        meant / "bundle.json",
    )
    for place in (*near, run / "bundel"):
        with pytest.raises(BundleError, match=f"Did you mean {re.escape(str(meant))}\\?"):
            open_bundle(place)
    packed = shutil.make_archive(str(tmp_path / "run"), "zip", run.parent, run.name)
    with pytest.raises(BundleError, match="among other files, in bundle/"):
        open_bundle(packed)
