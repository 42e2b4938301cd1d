"""Unpack a tar or zip safely: nothing outside the folder, no links, no bombs, each file whole or absent.

Files that are there from an earlier, killed run are kept; a finished archive is not opened again.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from brainage_nb.cohort.content import ARCHIVE_SUFFIXES, ContentError, check_whole
from brainage_nb.cohort.downloads import Patience, fetch
from brainage_nb.cohort.half_file import FULL_DISK, DownloadError, refuse_full_disk
from brainage_nb.workspace import read_json, write_json

MOST_FILES = 500_000
MOST_TIMES_LARGER = 200  # NIfTI heads shrink to a half or a tenth; a bomb to a thousandth
_SMALL = 256 << 20  # below this no ratio is judged: an empty label map may shrink a thousandfold
_CHUNK = 1 << 20
_DAMAGED = (
    ContentError, tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
    EOFError, NotImplementedError,
)  # fmt: skip
_LITTER = ("__MACOSX", ".DS_Store", "Thumbs.db")


class ArchiveError(DownloadError):
    """An archive that is damaged or not safe to unpack; the message says what to do."""


@dataclass(frozen=True)
class _Member:
    """A file in an archive: its name, its size [bytes] and how to open it."""

    name: str
    size: int
    handle: Any


def is_archive(name: str) -> bool:
    """Whether a name ends like an archive that `unpack` opens."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def unpack(archive: Path | str, folder: Path | str, *, progress: bool = True) -> list[str]:
    """Unpack all regular files of an archive.

    Parameters
    ----------
    archive : path
        `.tar`, `.tar.gz`, `.tgz`, `.tar.bz2`, `.tar.xz` or `.zip`.
    folder : path
        Where its files go; made where it is missing.
    progress : bool
        Show a bar.

    Returns
    -------
    list of str
        What was left out (links, devices), and why.

    Raises
    ------
    ArchiveError
        Where a name leads outside the folder, the archive is damaged, encrypted, or would grow beyond reason.
    DownloadError
        Where the disk is too small.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(archive)
    done = unpacked(folder, archive.name)
    if done is not None and done["identity"] == identity:
        return done["left_out"]
    begun = _begun(folder, archive.name)
    same = begun.get("identity") == identity
    write_json({"identity": identity}, _mark(folder, archive.name, "begun"))
    left_out: list[str] = []
    try:
        if archive.name.lower().endswith(".tar"):
            check_whole(archive)  # a tar cut between two files opens like a shorter one
        with _opened(archive) as members:
            names = _unpack_members(members, archive, folder, left_out, same, progress)
    except _DAMAGED as error:
        raise ArchiveError(
            f"{archive.name} is damaged ({type(error).__name__}: {error}). Delete it and run the cell again: "
            "it is fetched anew; files already unpacked are kept."
        ) from None
    result = {"identity": identity, "files": names, "left_out": left_out}
    write_json(result, _mark(folder, archive.name, "unpacked"))
    _mark(folder, archive.name, "begun").unlink(missing_ok=True)
    return left_out


def fetch_and_unpack(
    urls: Sequence[str],
    archive: Path | str,
    folder: Path | str,
    *,
    checksum: str = "",
    keep: bool = False,
    patience: Patience | None = None,
    progress: bool = True,
) -> list[str]:
    """Download an archive and unpack it; where that was done before, nothing is asked of the server.

    Parameters
    ----------
    urls, checksum, patience, progress
        As `downloads.fetch` takes them.
    archive : path
        Where the archive goes; deleted once it is unpacked, unless `keep`.
    folder : path
        Where its files go.

    Returns
    -------
    list of str
        What was left out of the archive, and why.

    Raises
    ------
    DownloadError
        As `fetch` and `unpack`.
    """
    archive = Path(archive)
    if done := unpacked(folder, archive.name):
        return done["left_out"]
    fetch(urls, archive, checksum=checksum, patience=patience, progress=progress)
    left_out = unpack(archive, folder, progress=progress)
    if not keep:
        archive.unlink()
    return left_out


def unpacked(folder: Path | str, archive: str) -> dict[str, Any] | None:
    """What an archive of this name left in `folder`, if it was unpacked to the end and nothing is missing."""
    try:
        done = read_json(_mark(Path(folder), archive, "unpacked"))
    except (OSError, ValueError):
        return None
    whole = all((Path(folder) / name).is_file() for name in done["files"])
    return done if whole else None


# --- members ----------------------------------------------------------------------------------------------


def _unpack_members(
    members: _Reader, archive: Path, folder: Path, left_out: list[str], same: bool, progress: bool
) -> list[str]:
    from tqdm import tqdm

    names: list[str] = []
    total = 0
    root = folder.resolve()
    files = tqdm(members.files(left_out), desc=f"unpack {archive.name}", unit="file", disable=not progress)
    for member in files:
        target = safe_target(root, member.name, archive.name)
        total += member.size
        _refuse_bomb(archive, total, len(names))
        # a file gets its name only when it is whole, so one of this size from the same archive is done
        if not (same and target.is_file() and target.stat().st_size == member.size):
            refuse_full_disk(folder, member.size, f"{member.name} of {archive.name}")
            _write_member(members, member, target)
        names.append(target.relative_to(root).as_posix())
    return names


def safe_target(root: Path, name: str, archive: str) -> Path:
    """Where a member goes; refused where that is not inside `root`, also by way of links that are there."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    outside = name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name) is not None
    if outside or not parts or "\0" in name:
        raise ArchiveError(
            f"{archive} was not unpacked: '{name}' leads outside the folder. Such an archive is broken or "
            "hostile: get it from its publisher."
        )
    target = root.joinpath(*parts)
    if not target.parent.resolve().is_relative_to(root) or target.is_symlink():
        raise ArchiveError(f"{archive} was not unpacked: '{name}' would go through a link out of {root}.")
    return target


def _refuse_bomb(archive: Path, total: int, count: int) -> None:
    stored = archive.stat().st_size
    if count >= MOST_FILES or (total > _SMALL and total > MOST_TIMES_LARGER * stored):
        raise ArchiveError(
            f"{archive.name} was not unpacked to the end: {stored / 2**20:.1f} MiB hold over "
            f"{total / 2**30:.1f} GiB in {count + 1} files, more than scans can. If it is right, unpack it "
            "by hand and use source = folder."
        )


def _write_member(members: _Reader, member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.unpacking")
    try:
        with members.open(member) as source, open(temporary, "wb") as sink:
            written = 0
            while chunk := source.read(min(_CHUNK, member.size - written + 1)):
                written += sink.write(chunk)
                if written > member.size:
                    break
            sink.flush()
            os.fsync(sink.fileno())
        if written != member.size:
            raise EOFError(f"'{member.name}' has {written} bytes, the archive says {member.size}")
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise DownloadError(
            f"The disk of {target.parent} is full. Free some space or set download_dir to a larger disk, "
            "then run the cell again: files already unpacked are kept."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


# --- tar and zip alike ------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    # the content decides: a tar.gz renamed to .tar is common
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _ZipReader(archive)
    else:
        with tarfile.open(path, "r:*") as archive:
            yield _TarReader(archive)


class _TarReader:
    """Regular files of a tar, in the order they are stored: going back would decompress from the start."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self.archive = archive

    def files(self, left_out: list[str]) -> Iterator[_Member]:
        for info in self.archive:
            if info.isreg() and not _is_litter(info.name):
                yield _Member(info.name, info.size, info)
            elif not info.isdir() and not info.isreg():
                kind = "a link" if info.issym() or info.islnk() else "no regular file"
                left_out.append(f"{info.name}: {kind}, not unpacked")

    def open(self, member: _Member) -> IO[bytes]:
        return self.archive.extractfile(member.handle)


class _ZipReader:
    """Regular files of a zip."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def files(self, left_out: list[str]) -> Iterator[_Member]:
        for info in self.archive.infolist():
            mode = info.external_attr >> 16
            if info.flag_bits & 1:
                raise ArchiveError(
                    f"'{info.filename}' needs a password. Unpack by hand and use source = folder."
                )
            if mode and stat.S_ISLNK(mode):
                left_out.append(f"{info.filename}: a link, not unpacked")
            elif not info.is_dir() and not _is_litter(info.filename):
                yield _Member(info.filename, info.file_size, info)

    def open(self, member: _Member) -> IO[bytes]:
        return self.archive.open(member.handle)


_Reader = _TarReader | _ZipReader


def _is_litter(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(part in _LITTER or part.startswith("._") for part in parts)


def _identity(archive: Path) -> str:
    """Tells two archives of one name apart by size, first and last megabyte."""
    size = archive.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(archive, "rb") as stream:
        digest.update(stream.read(_CHUNK))
        stream.seek(max(0, size - _CHUNK))
        digest.update(stream.read(_CHUNK))
    return digest.hexdigest()


def _mark(folder: Path, archive: str, state: str) -> Path:
    return folder / f".{archive}.{state}.json"


def _begun(folder: Path, archive: str) -> dict[str, Any]:
    try:
        return read_json(_mark(folder, archive, "begun"))
    except (OSError, ValueError):
        return {}
