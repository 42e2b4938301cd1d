"""Is a file what its name says, and is it whole? Judged by its bytes, before anything relies on it.

A server that refuses often answers with a web page under the name of the file; a cut file often opens.
Decodes no image: that is for cleaning.
"""

from __future__ import annotations

import gzip
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip", ".tar.bz2", ".tar.xz")
_KINDS = {
    "archive": ARCHIVE_SUFFIXES,
    "image": (".nii.gz", ".nii", ".mgz", ".mgh"),
    "table": (".csv", ".tsv", ".txt", ".xls", ".xlsx", ".xlsm", ".ods"),
}
_SPECIFIC = (".xlsx", ".xls", ".zip", ".tar", ".gz", ".tgz", ".mgz", ".nii", ".bz2", ".xz")
_MAGIC = {
    ".gz": b"\x1f\x8b",
    ".tgz": b"\x1f\x8b",
    ".mgz": b"\x1f\x8b",
    ".zip": b"PK",
    ".xlsx": b"PK",
    ".xls": b"\xd0\xcf\x11\xe0",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ",
}
# What servers say on the page they send instead of a file, and what helps.
_REFUSALS = (
    (
        r"quota exceeded|too many users|download limit|exceeded the limit",
        "the server's download quota is used up: wait some hours (Google says up to a day), make a copy of "
        "the file in your own Drive, or name another mirror",
    ),
    (
        r"\bnot found\b|no longer exists|does ?n.t exist|nosuchkey|\b404\b",
        "the file is not there (any more): check the address or name another mirror",
    ),
    (
        r"access ?denied|permission|forbidden|not authori[sz]ed|need access",
        "you have no permission: accept the data set's terms on its site, or let the owner share it with "
        "'Anyone with the link'",
    ),
    (
        r"sign[ -]?in|log[ -]?in|accounts\.google|password|authenticat",
        "the server asks for a login: download the file in a browser and use source = folder, or share it "
        "with 'Anyone with the link'",
    ),
)
_CHUNK = 1 << 20


class ContentError(ValueError):
    """A file that is not what its name says, or not whole; the message says what to do."""


def kind_of(name: str) -> str:
    """'archive', 'image', 'table' or '' by the ending of a name."""
    lower = name.lower()
    return next((kind for kind, endings in _KINDS.items() if lower.endswith(endings)), "")


def refuse_page(start: bytes, name: str) -> None:
    """Refuse a web page, a JSON or XML error or another file type in place of an archive, image or table.

    Parameters
    ----------
    start : bytes
        The first bytes of the content (a few hundred are enough).
    name : str
        The name that the content came under; endings it does not know are let through, except web pages.

    Raises
    ------
    ContentError
        With what the page says and what to do.
    """
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    page = head[:400].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<!-- html"))
    if kind_of(name):
        page = page or head[:1] == b"<" or (head[:1] in b"{[" and head[1:2] in b'"{ \r\n}]')
    if page:
        raise ContentError(f"Instead of {name} came {_page_in_words(head)}. {_advice(start)}.")
    if kind_of(name) in ("archive", "image") and _is_text(start):
        raise ContentError(f"Instead of {name} came plain text. {_advice(start)}.")
    magic = next((_MAGIC[end] for end in _MAGIC if name.lower().endswith(end)), b"")
    if magic and start and not start.startswith(magic[: len(start)]):
        raise ContentError(
            f"{name} does not begin like such a file (first bytes {start[:8].hex(' ')}): the address leads "
            "to something else. Check the address, or rename the file if only its ending is wrong."
        )


def check_whole(path: Path | str, name: str = "") -> None:
    """Read a file to its end and refuse it where it is cut or damaged.

    Archives: every header up to the end mark (zip: the directory; compressed tar: the checksum). Images: the
    checksum of `.nii.gz` and `.mgz`, and that all voxels the header claims are there. Others: not empty.

    Parameters
    ----------
    path : path
        The file.
    name : str
        Its final name, where `path` is a temporary one.

    Raises
    ------
    ContentError
        Where it is not whole.
    """
    path, name = Path(path), (name or Path(path).name)
    lower = name.lower()
    with open(path, "rb") as stream:
        start = stream.read(1024)
    if not start:
        raise ContentError(f"{name} is empty. Fetch it again; if it stays empty, the server's copy is.")
    refuse_page(start, name)
    try:
        if lower.endswith((".zip", ".xlsx")):
            with zipfile.ZipFile(path) as archive:
                archive.infolist()
        elif lower.endswith(".tar"):
            _walk_tar(path)
        elif start.startswith(_MAGIC[".gz"]):
            _check_gzip(path, name)
        elif lower.endswith(".nii"):
            _check_nifti(start, path.stat().st_size)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, struct.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the content
        raise ContentError(
            f"{name} is cut or damaged ({type(error).__name__}: {error}; {path.stat().st_size} bytes). It "
            "was not taken: fetch it again."
        ) from None


def _is_text(start: bytes) -> bool:
    """Whether bytes are ASCII without a control character: no archive and no image begins like that."""
    return bool(start) and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start[:512])


def _page_in_words(head: bytes) -> str:
    text = head[:4000].decode("utf-8", errors="replace")
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    if title and title[1].strip():
        return f"a web page titled '{' '.join(title[1].split())[:80]}'"
    if head[:1] in b"{[":
        return f"a JSON answer: {' '.join(_without_secrets(text).split())[:120]}"
    code = re.search(r"<Code>(\w+)</Code>", text)
    return f"an XML answer '{code[1]}'" if code else "a web page"


def _without_secrets(text: str) -> str:
    """JSON without the values of what looks like a secret: servers echo tokens in their errors."""
    return re.sub(r'("[^"]*(?:token|key|secret|password)[^"]*"\s*:\s*)"[^"]*"', r'\1"…"', text, flags=re.I)


def _advice(start: bytes) -> str:
    text = start.decode("utf-8", errors="replace")
    for pattern, remedy in _REFUSALS:
        if re.search(pattern, text, re.IGNORECASE):
            return "Probably " + remedy
    return (
        "The server refuses (quota, login or permission) or the address is that of a page, not of the file: "
        "open it in a browser, name another mirror, or download by hand and use source = folder"
    )


def _walk_tar(path: Path) -> None:
    """Follow all headers of an uncompressed tar; after the last file a block of zeros has to stand."""
    size = path.stat().st_size
    end = 0
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            # a sparse file takes less room than its size says; links and folders take none
            stored = member.size if member.isreg() and not member.issparse() else 0
            end = member.offset_data + -(-stored // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > size:
                raise tarfile.ReadError(f"'{member.name}' ends {end - size} bytes behind the end of the file")
    if end + tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("the end mark is missing")


def _check_gzip(path: Path, name: str) -> None:
    """Decompress to the end (the checksum stands there); a NIfTI inside is as long as it says."""
    with gzip.open(path, "rb") as stream:
        start = stream.read(1024)
        length = len(start)
        while chunk := stream.read(_CHUNK):
            length += len(chunk)
    if name.lower().endswith(".nii.gz"):
        _check_nifti(start, length)


def _check_nifti(start: bytes, length: int) -> None:
    """Whether all bytes are there that a NIfTI header claims; other content is let through for cleaning."""
    for order in "<>":
        if start[344:348] == b"n+1\0" and struct.unpack(order + "i", start[:4])[0] == 348:
            dim = struct.unpack(order + "8h", start[40:56])
            bits = struct.unpack(order + "h", start[72:74])[0]
            offset = struct.unpack(order + "f", start[108:112])[0]
            voxels = 1
            for extent in dim[1 : 1 + max(0, min(dim[0], 7))]:
                voxels *= max(extent, 1)
            if length < offset + voxels * bits // 8:
                raise EOFError(f"the header claims {voxels} voxels of {bits} bits, {length} bytes are there")
