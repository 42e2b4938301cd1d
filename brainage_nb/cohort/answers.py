"""What a web server's answer says, and what of an address may be shown. Sends nothing."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import requests

PASSING = {408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524}
"""Codes after which the same request may go through later."""
_REMEDIES = {
    401: "it asks for a login: download in a browser and use source = folder, or name an open address",
    403: "it gives no permission: accept the data set's terms on its site, share the file with 'Anyone with "
    "the link', or wait if a download quota is used up",
    404: "there is no such file: check the address or the accession number, or name another mirror",
    410: "the file was taken away: name another mirror",
    407: "a proxy asks for a login: check this machine's network",
}


def shown(url: str) -> str:
    """An address without what may be secret in it: user, password, query."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(an address that cannot be read)"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}" + ("?…" if parts.query else "")


def addresses(text: str) -> list[str]:
    """Addresses parted by blanks or commas, as parameters hold mirrors."""
    return text.replace(",", " ").split()


def has_password(url: str) -> bool:
    """Whether an address carries a user or password: it would end up in logs and in the executed notebook."""
    return "@" in urlsplit(url).netloc


def remedy(status: int) -> str:
    """What helps against a refusal that will not pass."""
    return _REMEDIES.get(status, "check the address, or name another mirror")


def asked_wait(response: requests.Response) -> float | None:
    """Seconds that the server asks to wait (`Retry-After`, a number or a date), or None."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def length_of(response: requests.Response) -> int | None:
    """Bytes that the answer announces, or None."""
    text = response.headers.get("Content-Length", "")
    return (
        int(text)
        if text.isdigit() and "chunked" not in response.headers.get("Transfer-Encoding", "")
        else None
    )


def range_of(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total length that `Content-Range` states (`bytes 5-9/10`, `bytes */10`), else None."""
    match = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if match is None:
        return None, None
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] != "*" else None


def validator_of(response: requests.Response) -> str:
    """What vouches that a file is still the same: its strong ETag, else its date, else ""."""
    etag = response.headers.get("ETag", "")
    # a weak ETag vouches for the meaning, not for the bytes (RFC 9110, 13.1.5)
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
