"""The workspace: the files that notebooks exchange, each whole or absent, and what a notebook leaves behind.

Where it lies and on what machine is `platforms`' affair. It knows nothing of scans, ages or models.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainage_nb import platforms
from brainage_nb.in_use import RECORDS, check_use, end_use, use_in_notebook

if TYPE_CHECKING:
    import pandas as pd

MARKER = "brainage_workspace.json"
IDS = ("scan_id", "subject_id", "session_id")
MODALITIES = ("T1w", "T2w", "PDw", "FLAIR", "dwi-FA", "dwi-MD", "bold-fALFF")
"""What may be scanned; the first is `image` in cohort.csv, each of the others a column of its name."""
TEXTS = (*IDS, "image", "sex", "site", "source", "reason", "flags", "detail", "variant", *MODALITIES)
YEARS = ("age", "predicted_age")
MAKERS = {
    **dict.fromkeys(("cohort.csv", "cohort_dropped.csv", "cohort_unmatched.csv"), "01_data_access"),
    "demo": "01_data_access",
    "cleaning.csv": "02_data_cleaning",
    "splits.csv": "02_data_cleaning",
    "volumes": "03_preprocessing_preview",
    "scans_without_volume.csv": "03_preprocessing_preview",
    "runs": "04_train_resnet18 or 05_train_vgg16_svr",
    "features": "05_train_vgg16_svr",
    "evaluation": "06_evaluate",
}
"""File or folder of the workspace: the notebook that makes it."""
NEEDED = {
    "cohort.csv": ("scan_id", "subject_id", "age"),
    "cleaning.csv": ("scan_id", "kept"),
    "splits.csv": ("scan_id", "subject_id", "age", "split"),
    "scans_without_volume.csv": ("scan_id",),
    "history.csv": ("epoch", "val_loss"),
    "predictions.csv": ("scan_id", "split", "age", "predicted_age"),
    "truth.csv": ("scan_id", "subject_id"),
}
"""Columns without which a table is none; it has rows as well, save for `MAY_BE_EMPTY`."""
MAY_BE_EMPTY = ("scans_without_volume.csv", "history.csv")
TEXT = {"type": "string"}
FILES = {"type": "array", "items": {"type": "object", "required": ["path"], "properties": {"path": TEXT}}}
RESULT = {
    "required": ["status", "finished", "duration_s", "parameters", "written"],
    "properties": {
        "status": TEXT,
        "finished": TEXT,
        "duration_s": {"type": "number"},
        "parameters": {"type": "object"},
        "written": FILES,
        "read": FILES,
    },
}
"""What is a notebook's result, as a JSON schema."""
UNWRITABLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "the disk is full"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "this place is read-only"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file lies where a folder is needed"),
}
FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.]*$)")  # a sign before anything but a plain number


class MissingInput(FileNotFoundError):
    """A file that an earlier notebook makes is not in the workspace."""


class DamagedInput(MissingInput, ValueError):
    """A file that an earlier notebook makes is torn, empty or something else than it should be."""


class CannotWrite(OSError):
    """A file cannot be written: where, why and what to do; what was there before is whole."""

    def __str__(self) -> str:
        return self.strerror


# --- files that are whole or absent ---------------------------------------------------------------------


@contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; flush it and rename it over `path` only if the block succeeds.

    `CannotWrite` where the disk is full or the place read-only.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def explain_write_errors(path: Path | str) -> Iterator[None]:
    """Turn a refusal to write at or below `path` into `CannotWrite`; other errors pass."""
    path = Path(path)
    try:
        yield
    except Exception as error:
        number, refused = getattr(error, "errno", None), Path(getattr(error, "filename", None) or path)
        if number is None and path.parent.is_dir():  # torch, NumPy and safetensors have words of their own
            little_left = shutil.disk_usage(path.parent).free < 2**20
            if "os error 28" in str(error) or (little_left and isinstance(error, OSError | RuntimeError)):
                number = errno.ENOSPC
        ours = path.is_relative_to(refused) or refused.is_relative_to(path.parent)
        if isinstance(error, CannotWrite) or number not in UNWRITABLE or not ours:
            raise
        raise CannotWrite(
            number,
            f"{path} cannot be written: {UNWRITABLE[number]}. What was there before is unchanged. Make room, "
            "or choose another folder (for downloads: download_dir; for the workspace: the parameter "
            "`workspace` or the environment variable BRAINAGE_WORKSPACE); then run the same again: finished "
            "work is kept.",
        ) from error


def write_text(text: str, path: Path | str) -> Path:
    """Write UTF-8 text whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_csv(frame: pd.DataFrame, path: Path | str) -> Path:
    """Write a table whole or not at all: UTF-8, comma, LF, no index column."""
    with writing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    return Path(path)


def guard_formula(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula (a file may be named `=1+1.nii`), quoted."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def write_json(content: Any, path: Path | str) -> Path:
    """Write JSON whole or not at all; paths become text, NumPy numbers become numbers, NaN becomes null."""
    return write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def read_json(path: Path | str, *keys: str, kind: type = dict) -> Any:
    """Read a JSON file that holds an object (or a list: `kind`), with these `keys` at least.

    Raises
    ------
    MissingInput, DamagedInput
        It is not there, or torn, empty or of another kind; the message names the file and the notebook that
        makes it.
    """
    with _name_damage(Path(path)):
        content = json.loads(_read_bytes(Path(path)))
        if not isinstance(content, kind) or any(key not in content for key in keys):
            wanted = "an object" if kind is dict else "a list"
            raise ValueError(f"it should hold {wanted}{' with ' * bool(keys)}{', '.join(keys)}")
        return content


def read_csv(path: Path | str) -> pd.DataFrame:
    """Read one of our tables: ids stay text (`007` is not 7), empty cells of text columns stay empty.

    Raises
    ------
    MissingInput, DamagedInput
        As `read_json`: torn, without the columns or rows it must have, or with an age that is no number.
    """
    import pandas as pd

    path = Path(path)
    with _name_damage(path):
        content = _read_bytes(path)
        if not content.endswith(b"\n"):
            raise ValueError("its last line has no end, as in a file that was cut off")
        if content == b"\n":
            return pd.DataFrame()  # as pandas writes a table without columns
        frame = pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(YEARS, float))
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError("its rows have more cells than its first line")
        named = [name for name in TEXTS if name in frame]
        texts = pd.read_csv(io.BytesIO(content), usecols=named, dtype=str, keep_default_na=False)
        frame[named] = texts[named]
        if "kept" in frame and frame["kept"].dtype != bool:
            raise ValueError("its column kept holds something else than True and False")
        needed = NEEDED.get(path.name, ())
        if missing := [name for name in needed if name not in frame]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        if needed and frame.empty and path.name not in MAY_BE_EMPTY:
            raise ValueError("it has no rows")
    return frame


def _read_bytes(path: Path) -> bytes:
    if not (content := path.read_bytes()):
        raise ValueError("it is empty")
    return content


@contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read which it is, and what makes it."""
    maker = _name_maker(path)
    try:
        yield
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is not there.{maker and f' Run notebook {maker} first.'}") from error
    except (ValueError, RecursionError, IsADirectoryError, NotADirectoryError) as error:
        why = getattr(error, "strerror", None) or str(error).strip().rstrip(".")
        anew = f", then run notebook {maker}: it makes this file" if maker else ""
        raise DamagedInput(f"{path} is damaged: {why}. Delete it or put back a whole copy{anew}.") from error


def _name_maker(path: Path) -> str:
    """The notebook that makes a file of the workspace; empty for another file."""
    return next((MAKERS[part] for part in reversed(path.parts) if part in MAKERS), "")


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hash_of(path, "sha256")


def hash_of(path: Path | str, kind: str) -> str:
    """A file's hash in hex, `kind` being one of hashlib's names."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def copy_verified(source: Path | str, target: Path | str) -> Path:
    """Copy a file whole or not at all, and read the copy back before it counts.

    Raises
    ------
    OSError
        Where the copy reads back with other content: the disk is full, or Drive was disconnected.
    """
    with writing(target) as temporary:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())  # what is read back shall be what the disk took
        if sha256_of(temporary) != sha256_of(source):
            raise OSError(f"A copy of {source} to {target} reads back with other content; is the disk full?")
    return Path(target)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


# --- the workspace --------------------------------------------------------------------------------------


@dataclass
class Workspace:
    """A folder that holds everything the notebooks exchange.

    Parameters
    ----------
    root : Path
        The folder; made where it is missing.
    """

    root: Path
    opened: float = field(default_factory=time.time)

    @property
    def scratch(self) -> Path | None:
        """A fast local folder for heavy work where the workspace is on Drive, else None."""
        return platforms.local_disk_for(self.root)

    def path(self, *parts: str) -> Path:
        """A path inside the workspace; nothing is made."""
        return self.root.joinpath(*parts)

    def need(self, name: str) -> Path:
        """The path of a file an earlier notebook makes; where absent, `MissingInput` names that notebook."""
        path = self.path(name)
        if not path.exists():
            raise MissingInput(
                f"{name} is not in the workspace {self.root}. "
                f"Run notebook {_name_maker(path)} first, with this workspace."
            )
        return path

    def read(self, name: str) -> pd.DataFrame:
        """A table of the workspace, ids as text; `MissingInput` or `DamagedInput` where it cannot be read."""
        return read_csv(self.need(name))

    def run(self, name: str) -> Path:
        """The folder of one training run."""
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"run = {name!r}: a run's name is one plain folder name, such as resnet18.")
        folder = self.path("runs", name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def resolve(self, image: str | Path) -> Path:
        """The absolute path of an `image` cell, which is absolute or relative to the workspace.

        `MissingInput` where it was unpacked to the disk of a session that is over.
        """
        path = (self.root / image).absolute()
        if self.scratch is not None and path.is_relative_to(self.scratch) and not path.exists():
            raise MissingInput(
                f"{path} was unpacked to the disk of an earlier session, which is gone. Run notebook "
                "01_data_access again: it unpacks the archive to the same place; nothing else changes."
            )
        return path

    def begin(self, notebook: str) -> Workspace:
        """Mark a notebook as started: its last result is void until it finishes again. Returns itself.

        `WorkspaceInUse` where a run, or a notebook that is at work, has this workspace.
        """
        with explain_write_errors(self.path(MARKER)):
            use_in_notebook(self.root, notebook)
        self.opened = time.time()
        if changed := describe_stale(find_stale(self, notebook)):
            print(changed)
        self.path("results", f"{notebook}.json").unlink(missing_ok=True)
        return self

    def finish(
        self,
        notebook: str,
        parameters: Mapping[str, Any],
        written: Iterable[Path] = (),
        figures: Mapping[str, Any] | None = None,
        status: str = "complete",
        read: Iterable[Path | str] | Mapping[Path | str, str] = (),
    ) -> pd.DataFrame:
        """Write `results/<notebook>.json`, the only sign that a notebook ended well.

        Parameters
        ----------
        notebook : str
            Its name without ending, as `04_train_resnet18`.
        parameters : mapping
            Parameters as resolved.
        written : paths
            Files and folders left behind; each is listed with its rows (CSV) or bytes.
        figures : mapping
            Headline figures; a key names metric, split and unit.
        status : {"complete", "stopped"}
            "stopped" where all is saved and the notebook, run again, goes on.
        read : paths, or mapping from path to SHA-256
            Tables of the workspace, scans and other files whose content the result stands for (see
            `find_stale`).

        Returns
        -------
        DataFrame
            What was written, a row a file, to be shown as the notebook's last output.
        """
        import pandas as pd

        check_use(self.root)
        versions = {name: platforms.version_of(name) for name in ("brainage-nb", "torch", "monai", "numpy")}
        files = [_described(Path(path), self.root) for path in written]
        result = {
            "notebook": notebook,
            "status": status,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "duration_s": round(time.time() - self.opened, 1),
            "platform": platforms.platform(),
            "versions": versions,
            "parameters": dict(parameters),
            "written": files,
            "read": _describe_inputs(self.root, read),
            "figures": dict(figures or {}),
        }
        write_json(result, self.path("results", f"{notebook}.json"))
        end_use(self.root)
        return pd.DataFrame(files, columns=["path", "rows", "bytes"])

    def results(self) -> dict[str, dict[str, Any]]:
        """What each notebook that finished left behind, by its name; a torn file counts as none."""
        from jsonschema import Draft202012Validator

        found = {}
        for path in sorted(self.path("results").glob("*.json")):
            with suppress(MissingInput):
                found[path.stem] = read_json(path)
        valid = Draft202012Validator(RESULT).is_valid
        return {name: content for name, content in found.items() if valid(content)}

    def result(self, notebook: str) -> dict[str, Any] | None:
        """What a notebook left behind, or None where it did not finish."""
        return self.results().get(notebook)


def locate_workspace(root: str | Path = "") -> Path:
    """The folder that `open_workspace` opens."""
    return (Path(root).expanduser() if str(root) else platforms.default_root()).absolute()


def find_stale(workspace: Workspace, up_to: str = "") -> dict[str, list[str]]:
    """The notebooks that read files which have changed since: name -> those files, in the notebooks' order.

    A file of another time but the same content has not changed, and its new time is kept so that it is read
    once only; one that is gone is for others to say.
    `up_to` names the last notebook that is looked at.
    """
    found = {}
    for name, result in workspace.results().items():
        read = result.get("read", []) if name <= (up_to or name) else []
        times = [entry.get("mtime_ns") for entry in read]
        changed = [entry["path"] for entry in read if _has_changed(workspace.path(entry["path"]), entry)]
        if times != [entry.get("mtime_ns") for entry in read]:
            write_json(result, workspace.path("results", f"{name}.json"))
        if changed:
            found[name] = changed
    return found


def describe_stale(changed: Mapping[str, list[str]]) -> str:
    """What has changed and which notebook to run from, in a sentence; empty where nothing has."""
    sentences = [
        f"{name} read {', '.join(files[:3])}{f' and {len(files) - 3} more' * (len(files) > 3)}"
        for name, files in changed.items()
    ]
    first = next(iter(changed), "")
    return f"Changed since: {'; '.join(sentences)}. Run from {first} on." if changed else ""


def _describe_inputs(root: Path, read: Iterable[Path | str] | Mapping[Path | str, str]) -> list[dict]:
    hashes, entries = read if isinstance(read, Mapping) else {}, []
    for name in read:
        path = root / name
        if path.is_file():
            shown = str(path.relative_to(root)) if path.is_relative_to(root) else str(path.absolute())
            entries.append({"path": shown, "sha256": hashes.get(name) or sha256_of(path), **_stamp(path)})
    return entries


def _stamp(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}


def _has_changed(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is another than its entry says; the entry takes the time of one that only looks so."""
    if not path.is_file() or _stamp(path).items() <= entry.items():
        return False
    if path.stat().st_size != entry.get("bytes") or sha256_of(path) != entry.get("sha256"):
        return True
    entry |= _stamp(path)
    return False


def open_workspace(root: str | Path = "") -> Workspace:
    """Open the workspace at `root` (empty: the default place); make it where it is missing.

    A new one on Kaggle starts from the workspace that an attached notebook left as its output, if any.
    """
    folder = locate_workspace(root)
    platforms.require_drive(folder)
    with explain_write_errors(folder / MARKER):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MARKER).exists():
            _take_over(folder)
            write_json({"format": 1}, folder / MARKER)
    return Workspace(folder)


def _take_over(folder: Path) -> None:
    """Copy the newest attached workspace, whose place is read-only, into a new one."""
    finished = {
        place: max((result["finished"] for result in Workspace(place).results().values()), default="")
        for place in platforms.attached_inputs(MARKER)
    }
    if not finished:
        return
    newest = max(finished, key=finished.get)
    others = f" (the newest of {len(finished)})" if len(finished) > 1 else ""
    print(f"Going on from the attached workspace {newest}{others}.")
    shutil.copytree(
        newest, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MARKER, RECORDS, "executed")
    )


def _described(path: Path, root: Path) -> dict[str, Any]:
    rows = None
    if path.suffix == ".csv" and path.is_file():
        with open(path, encoding="utf-8") as stream:
            rows = max(0, sum(1 for _ in stream) - 1)
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    return {"path": str(shown), "rows": rows, "bytes": sum(item.stat().st_size for item in files)}
