"""Who uses a workspace: one run, or one notebook at a time, also on Drive and other network folders.

Such folders know no dependable locks, and a process number says nothing on another machine. So whoever uses
a workspace leaves a numbered record in it and renews it; the highest number counts. The record of a user that
is gone is followed by the next number, which only one process can create.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from brainage_nb.platforms import find_shell

RECORDS = ".in_use.*.json"
BEAT = 10.0  # seconds between two signs of life
SILENT = 120.0  # seconds without one after which a user on another machine is taken for dead
BETWEEN_CELLS = 3.0  # seconds: a notebook that runs its cells one after the other is not idle
COVERED = "BRAINAGE_IN_USE_BY"  # token of the run that a notebook's kernel belongs to

_uses: dict[Path, Use] = {}


class WorkspaceInUse(OSError):
    """Another run or notebook uses the workspace; the message says which, whose and where."""


class Use:
    """The use of a workspace by this process, until `end` or the end of a `with` block.

    Parameters
    ----------
    root : Path
        The workspace's folder.
    who : str
        What uses it, in words, as `notebook 02_data_cleaning`.
    say : callable
        Receives a line where the record of a user that is gone is taken over.

    Raises
    ------
    WorkspaceInUse
        Somebody else uses it, and lives.
    """

    def __init__(self, root: Path, who: str, say: Callable[[str], Any] = print) -> None:
        self.root, self.busy, self.displaced = root.resolve(), True, False
        end_use(root)
        self.record = {
            "token": uuid.uuid4().hex,
            "who": who,
            "user": psutil.Process().username(),
            "host": platform.node(),
            "machine": _identify_machine(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        }
        self._writing, self._ended = threading.Lock(), threading.Event()
        self.path = self._create(say)
        _uses[self.root] = self
        threading.Thread(target=self._live, daemon=True).start()
        atexit.register(self.end)

    def __enter__(self) -> Use:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def _create(self, say: Callable[[str], Any]) -> Path:
        """Create the record with the next number, once nobody living has the highest one."""
        while True:
            before = _find_newest(self.root)
            if before:
                _refuse_the_living(before, self.root, say)
            number = int(before.name.split(".")[2]) + 1 if before else 1
            path = self.root / RECORDS.replace("*", f"{number:06d}")
            try:
                with open(path, "x", encoding="utf-8") as stream:
                    stream.write(self._text())
            except FileExistsError:
                continue  # another process was quicker
            except OSError:  # the disk is full
                path.unlink(missing_ok=True)
                raise
            if _find_newest(self.root) == path and (before is None or before.exists()):
                break
            path.unlink(missing_ok=True)  # what was seen before was over already
        for old in self.root.glob(RECORDS):
            if old < path:
                old.unlink(missing_ok=True)
        return path

    def _text(self) -> str:
        """The record, of one length whatever it says, so that it can be renewed in place."""
        return json.dumps(self.record | {"time": time.time(), "idle": not self.busy}).ljust(800) + "\n"

    def _live(self) -> None:
        """Give signs of life while something runs; interrupt it where another user has taken over."""
        while not self._ended.wait(BEAT):
            try:
                if self.busy:
                    self.check()
            except WorkspaceInUse as error:
                print(f"INTERRUPTED: {error}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _renew(self) -> bool:
        """Write a sign of life; False where the workspace is another's by now."""
        with self._writing:
            newest = _find_newest(self.root)
            found = _read(newest) if newest else {}
            self.displaced |= found.get("token", self.record["token"]) != self.record["token"]
            if not self.displaced and not self._ended.is_set():
                # the network may be away for a moment, or somebody removed the file
                with suppress(OSError), open(self.path, "r+", encoding="utf-8") as stream:
                    stream.write(self._text())
        return not self.displaced

    def check(self) -> None:
        """Raise `WorkspaceInUse` where another user has taken over meanwhile."""
        if not self._renew():
            raise WorkspaceInUse(
                f"The workspace {self.root} was taken over by another run or notebook while "
                f"{self.record['who']} gave no sign of life. What both wrote may be mixed: run this one "
                "again from its beginning."
            )

    def end(self) -> None:
        """Leave the workspace to others."""
        self._ended.set()
        atexit.unregister(self.end)
        if self.record["pid"] != os.getpid():
            return  # a forked child's copy
        with self._writing:
            if not self.displaced and _read(self.path).get("token") == self.record["token"]:
                self.path.unlink(missing_ok=True)
        if _uses.get(self.root) is self:
            del _uses[self.root]
        self._forget_cells()

    # IPython calls these around each cell of a notebook run by hand: between two cells it is idle, and
    # another notebook may take over, after which its own next cell must not run on.

    def _watch_cells(self) -> None:
        if shell := find_shell():
            shell.ast_transformers.append(self)
            shell.events.register("post_execute", self.pause)

    def _forget_cells(self) -> None:
        shell = find_shell()
        if shell and self in shell.ast_transformers:
            shell.ast_transformers.remove(self)
            shell.events.unregister("post_execute", self.pause)

    def visit(self, cell: Any) -> Any:
        """Before a cell, as one of IPython's `ast_transformers`: go on, or reject it."""
        from IPython.core.error import InputRejected

        self.busy = True
        if not self._renew() or not self.path.exists():
            self.displaced = True
            self._forget_cells()
            raise InputRejected(
                f"Since this notebook's last cell the workspace {self.root} was used by another run or "
                "notebook. Run this notebook again from its first cell."
            )
        return cell

    def pause(self) -> None:
        """After a cell: stand idle."""
        self.busy = False
        self._renew()


def use_in_notebook(root: Path, notebook: str) -> None:
    """Use a workspace for a notebook until `end_use`; by hand, only while a cell runs.

    A notebook that `brainage-nb run` runs is covered by that run's own use.
    """
    newest, before = _find_newest(root), _uses.get(root.resolve())
    if newest and _read(newest).get("token", "") == os.environ.get(COVERED):
        return
    if before and not before.displaced:
        before.record["who"] = f"notebook {notebook}"
    else:
        Use(root, f"notebook {notebook}")._watch_cells()


def check_use(root: Path) -> None:
    """Raise `WorkspaceInUse` where this process used the workspace and another has taken over."""
    if use := _uses.get(root.resolve()):
        use.check()


def end_use(root: Path) -> None:
    """End this process's use of a workspace, if any."""
    if use := _uses.get(root.resolve()):
        use.end()


def _refuse_the_living(path: Path, root: Path, say: Callable[[str], Any]) -> None:
    """Return once the user of a record is known to be gone or idle; raise `WorkspaceInUse` if it lives."""
    seen = _read(path)
    here, idle = seen.get("machine") == _identify_machine(), seen.get("idle", False)
    gone = here and not _lives(seen)
    living = here and not gone and not idle
    if not living and not gone:
        silent = max(2.5 * BEAT, SILENT - max(0.0, time.time() - seen.get("time", 0.0)))
        wait = BETWEEN_CELLS if here else 2.5 * BEAT if idle else silent
        if not here:
            say(f"The workspace was in use by {_describe(seen)}. Watching for {wait:.0f} s whether it lives.")
        living = _is_renewed(path, seen, wait)
    if living:
        raise WorkspaceInUse(
            f"The workspace {root} is in use by {_describe(_read(path))}. Wait for its end or end it, or "
            "take another workspace (brainage-nb run --workspace FOLDER; in a notebook the parameter "
            "`workspace`)."
        )
    if path.exists():  # else it has ended by now
        state = "stands idle" if idle and not gone else "is gone without having ended"
        say(f"Taking over the workspace from {_describe(seen)}, which {state}.")


def _describe(record: dict[str, Any]) -> str:
    facts = dict.fromkeys(("who", "pid", "user", "host", "since"), "?") | record
    return "{who}, process {pid} of {user} on {host}, since {since}".format_map(facts)


def _is_renewed(path: Path, seen: dict[str, Any], seconds: float) -> bool:
    """Whether a record is renewed in so many seconds; its end is no change."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and path.exists():
        time.sleep(min(1.0, seconds / 10))
        if path.exists() and _read(path) not in (seen, {}):
            return True
    return False


def _lives(seen: dict[str, Any]) -> bool:
    """Whether a process of this machine still runs; its number may have gone to a later one."""
    try:
        process = psutil.Process(seen["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < seen["time"] + 2
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _find_newest(root: Path) -> Path | None:
    return max(root.glob(RECORDS), default=None)


def _read(path: Path) -> dict[str, Any]:
    """A record; {} where it is just being written, torn, or gone."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _identify_machine() -> str:
    """This machine until its next start, and this container on it: where a process number means something."""
    facts = [platform.node()]
    with suppress(OSError):  # not Linux, or hidden
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(facts)
