"""A Kaggle data set: attached to the session, or downloaded by kagglehub, which resumes, checks and caches.

kagglehub reads the key itself (its own file, its variables, the platform's store); it is never seen here, and
what its errors say is not passed on, since they may quote a request. Tried with the real client against a
local server (its own test environment), not against kaggle.com.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brainage_nb.cohort.answers import PASSING
from brainage_nb.cohort.downloads import DownloadError, Patience
from brainage_nb.cohort.half_file import FULL_DISK
from brainage_nb.platforms import attached_dataset

_HANDLE = re.compile(r"[\w-]+/[\w-]+(/versions/\d+)?")
_CACHE = "KAGGLEHUB_CACHE"
_REMEDIES = {
    401: "Kaggle does not know you: make a token on kaggle.com (Settings > API) and put it into the "
    "platform's store, or into the file it is offered as",
    403: "you have no permission: open its page while logged in, accept its terms, or ask its owner",
    404: "there is no such data set: take owner/name from the address of its page",
}


def kaggle_folder(handle: str, folder: Path | str, *, patience: Patience | None = None) -> Path:
    """The folder that holds a data set's files.

    Parameters
    ----------
    handle : str
        As `owner/name`, or with `/versions/3`.
    folder : path
        Where a download goes; an attached data set stays where it is.
    patience : Patience, optional
        Its tries and pauses.

    Raises
    ------
    DownloadError
        Says what to do: attach it, get a token, accept its terms, run again.
    """
    handle = re.sub(r"^https://(www\.)?kaggle\.com/(datasets/)?", "", handle.strip()).strip("/")
    if not _HANDLE.fullmatch(handle):
        raise DownloadError(
            f"kaggle_dataset = {handle!r}: expected owner/name, the end of its page's address."
        )
    if (attached := attached_dataset(handle)) is not None:
        return attached
    try:
        import kagglehub
    except ImportError:
        raise DownloadError(
            "kagglehub is not installed: pip install 'kagglehub>=0.3' (or brainage-nb[data])."
        ) from None
    patience = patience or Patience()
    wait = patience.first_wait_s
    with _cache_in(Path(folder)):
        for left in reversed(range(patience.tries)):
            try:
                return Path(kagglehub.dataset_download(handle))
            except Exception as error:  # kagglehub and requests raise many kinds
                message = _in_words(error, handle, last=left == 0)
            if message:
                raise DownloadError(message)
            time.sleep(wait)
            wait = min(2 * wait, patience.longest_wait_s)
    raise AssertionError("the last try returns or raises")


def _in_words(error: Exception, handle: str, *, last: bool) -> str:
    """What to do about an error; "" where another try may help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "Unauthenticated" in type(error).__name__ or "Credential" in type(error).__name__:
        status = 401
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return "The disk is full. Free some space or set download_dir to a larger disk, then run again."
    # connections and damaged archives (which kagglehub has deleted by now) may go better next time
    passing = status in PASSING or (status is None and isinstance(error, OSError))
    if (passing or "Corruption" in type(error).__name__) and not last:
        return ""
    remedy = _REMEDIES.get(status, "run the cell again later: what was received is kept")
    said = f"status {status}" if status else type(error).__name__
    return (
        f"The Kaggle data set {handle} cannot be had ({said}): {remedy}. Without internet, attach it to the "
        "session (Add input) before you start."
    )


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Let kagglehub keep its files in `folder`, unless the person has chosen a place."""
    if _CACHE in os.environ:
        yield
        return
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        del os.environ[_CACHE]
