"""Whatever happens to a file of the workspace is said in words, or mended, by each that reads it.

Every file x what happened to it x who reads it. Either the reader refuses, in a sentence that names the file
and what to run; or it says what it made again; or its result is that of the whole workspace. What the
sentence says to do helps. `make test` reads each file by one reader, `make test-all` by all.
"""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from brainage_nb.workspace import describe_stale, find_stale, open_workspace
from tests.models.tiny_bundle import SETTINGS
from tests.tiny_workspace import READERS, RUN, STEPS, make_workspace, use_threads

pytestmark = pytest.mark.filterwarnings("ignore:TRAINING ON THE CPU")
VOLUMES, BUNDLE = f"volumes/{SETTINGS.fingerprint}", f"runs/{RUN}/bundle"
FIRST_READER = {
    "brainage_workspace.json": "03",
    "cohort.csv": "02",
    "cohort_unmatched.csv": "plan",
    "cleaning.csv": "06",
    "splits.csv": "04",
    "scans_without_volume.csv": "07",
    "volumes/current": "04",
    f"{VOLUMES}/index.csv": "04",
    f"{VOLUMES}/preprocessing.json": "03",
    f"{VOLUMES}/shard-0000.npy": "03",
    f"runs/{RUN}/settings.json": "06",
    f"runs/{RUN}/history.csv": "06",
    f"runs/{RUN}/predictions.csv": "06",
    f"runs/{RUN}/checkpoints/seed0/weights.safetensors": "04",
    f"runs/{RUN}/checkpoints/seed0/predictions.csv": "04",
    f"runs/{RUN}/checkpoints/seed0/history.csv": "04",
    f"{BUNDLE}/bundle.json": "app",
    f"{BUNDLE}/member-00.safetensors": "predict",
    f"{BUNDLE}/reference.safetensors": "07",
    f"{BUNDLE}/README.md": "predict",
    "results/02_data_cleaning.json": "plan",
    "results/04_train_resnet18.json": "plan",
    "evaluation/results.json": "06",
    "demo/truth.csv": "06",
}
"""File: who reads it in `make test`."""
SECOND_TYPE = {".json": b"[]\n", ".csv": b"other,columns\n1,2\n", ".safetensors": save({"a": np.zeros(2)})}
DAMAGES = {
    "missing": None,
    "empty": lambda content, *_: b"",
    "half": lambda content, *_: content[: len(content) // 2],
    "flipped": lambda content, *_: flip(content),
    "an object": lambda content, *_: b"{}\n",
    "another type": lambda content, file, _: SECOND_TYPE.get(file.suffix, b"something else\n"),
    "another run's": lambda content, file, other: other.read_bytes(),
}
UNPLANNED = ("flipped", "another run's")  # whose reader notices, if there is one
NOTEBOOK = re.compile(r"\b0[1-7](?=\b|_)")
FREE = {  # nothing depends on them
    "brainage_workspace.json",
    f"{BUNDLE}/README.md",
}


def flip(content):
    """Eight bytes in the middle turned round."""
    middle = len(content) // 2
    return (
        content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 8]) + content[middle + 8 :]
    )


class Place:
    """One folder in which a workspace is damaged and put back, over and over."""

    def __init__(self, folder):
        self.root, self.whole, self.other = folder / "work", folder / "whole", folder / "other"
        for kept, seed in ((self.other, 1), (self.whole, 0)):
            make_workspace(self.root, seed)
            self.root.rename(kept)
        self.expected = {}
        for name in READERS:
            self.put_back()
            self.expected[name] = self.read(name)[0]

    def put_back(self):
        """The whole workspace again, with its times."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.whole, self.root)

    def read(self, name):
        """(result, what was said) of one reader."""
        ws, said = open_workspace(self.root), io.StringIO()
        with contextlib.redirect_stdout(said), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if name in (*STEPS, "plan"):
                print(describe_stale(find_stale(ws, f"{name}~" if name in STEPS else "")))
            result = READERS[name](ws)
        return result, said.getvalue() + " ".join(str(one.message) for one in warned)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        use_threads(patch)
        patch.setenv("BRAINAGE_WORKSPACE", str(folder / "work"))
        patch.chdir(folder)
        yield Place(folder)


def check(place, file, damage, reader):
    """One cell of the table; gives what the reader said, or how it ended."""
    place.put_back()
    path = place.root / file
    if DAMAGES[damage] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes(), path, place.other / file))
    left = path.read_bytes() if path.exists() else None
    try:
        result, said = place.read(reader)
    except (ValueError, OSError) as error:
        assert type(error).__module__.startswith("brainage_nb"), f"ended in {error!r}"
        assert names(str(error), file), f"does not name its file: {error}"
        assert (path.read_bytes() if path.exists() else None) == left, "was changed"
        return str(error)
    if reader == "plan":
        assert result or damage in UNPLANNED or file in FREE, "counts as done"
    else:
        assert result == place.expected[reader] or names(said, file), f"used in silence: {said}"
    return said


def names(text, file):
    """Whether a text names a file, or the bundle, model or run it is of."""
    folder = Path(file).parent.name
    of_models = (f"{folder} was begun with other settings", *["bundle"] * (folder == "bundle"))
    return any(name in text for name in (Path(file).name, *of_models))


def remedy(place, file, damage, reader, said):
    """Do what was said, and see that all is as in the whole workspace afterwards."""
    start, found = reader if reader in STEPS else "04", {}
    for _ in range(3):  # what helps may need another thing first, which is said then
        if "Delete it" in said:
            (place.root / file).unlink()
        if "fresh=True" in said:
            shutil.rmtree(place.root / "runs" / RUN)
        start, said = min(NOTEBOOK.findall(said), default=start), ""
        for name in (*(step for step in STEPS if step >= start), "app", "predict"):
            try:
                found[name] = place.read(name)[0]
            except ValueError as error:
                start, said = name, str(error)
                break
        if not said:
            break
    assert not said, f"does not help: {said}"
    # what another workspace's cohort or splits lead to is told, and then followed
    changed = [] if damage == "another run's" else [n for n in found if found[n] != place.expected[n]]
    assert not changed, f"{changed} differ afterwards"


def check_all(place, cells, *, mend=False):
    """The cells that do not hold, with the reason."""
    wrong = {}
    for file, damage, reader in cells:
        try:
            said = check(place, file, damage, reader)
            if mend:
                remedy(place, file, damage, reader, said)
        except Exception as error:
            wrong[f"{file}, {damage}, read by {reader}"] = f"{type(error).__name__}: {error}"[:400]
    return wrong


def test_a_damaged_file_is_named_or_made_again(place):
    quick = [file for file in FIRST_READER if "checkpoints" not in file]  # test_damaged_runs has those
    cells = [(file, damage, FIRST_READER[file]) for file in quick for damage in DAMAGES]
    assert check_all(place, cells) == {}


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_damaged_file_says_so(place, reader):
    cells = [(file, damage, reader) for file in FIRST_READER for damage in DAMAGES]
    assert check_all(place, cells) == {}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_the_sentence_says_to_do_makes_all_well(place, damage):
    cells = [(file, damage, reader) for file, reader in FIRST_READER.items()]
    assert check_all(place, cells, mend=True) == {}


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$2" -m tests.tiny_workspace "$1"
"""


@pytest.mark.slow  # test_workspace has what each kind of refusal to write is called
def test_a_read_only_workspace_is_said_by_who_would_write_and_read_by_the_others(place):
    apart = ["unshare", "-rm"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("needs Linux with user namespaces")
    place.put_back()
    command = [*apart, "sh", "-c", READ_ONLY, "sh", str(place.root), sys.executable]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert not run.returncode, run.stderr
    found = dict(json.loads(run.stdout.splitlines()[-1]))
    for name in STEPS:
        if name != "07":
            kind, text = found.pop(name)
            assert kind == "CannotWrite" and str(place.root) in text and "this place is read-only" in text
    assert found == {name: ["", repr(place.expected[name])] for name in ("07", "plan", "app", "predict")}
