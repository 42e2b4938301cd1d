"""IXI from its publisher: the archive of T1-weighted scans and the table, to a cohort.

Addresses and the archive's md5 are those of TorchIO's `torchio.datasets.IXI`; they were not tried against the
live server here. The table has no hash on record, so it is taken by what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from brainage_nb.cohort.answers import addresses
from brainage_nb.cohort.archives import fetch_and_unpack
from brainage_nb.cohort.cells import TABLE_SUFFIXES
from brainage_nb.cohort.downloads import Patience, fetch
from brainage_nb.cohort.sources import FolderCohort, folder_cohort

_HOST = "biomedic.doc.ic.ac.uk/brain-development/downloads/IXI"
IMAGES = (f"https://{_HOST}/IXI-T1.tar", f"http://{_HOST}/IXI-T1.tar")
TABLE = (f"https://{_HOST}/IXI.xls", f"http://{_HOST}/IXI.xls")
IMAGES_MD5 = "34901a0593b41dd19c1a1f746eac2d58"


def ixi_cohort(
    folder: Path | str,
    *,
    images_url: str = "",
    table_url: str = "",
    images_md5: str = "",
    keep_archives: bool = False,
    columns: Mapping[str, str] | None = None,
    root: Path | str | None = None,
    patience: Patience | None = None,
) -> FolderCohort:
    """Download IXI and put its scans and ages together.

    Parameters
    ----------
    folder : path
        Where it goes.
    images_url, table_url : str
        Mirrors of IXI-T1.tar and IXI.xls, parted by blanks; "" for the publisher's.
    images_md5 : str
        md5 of the archive, or "none"; "" for the one on record, if the archive comes from the publisher.
    keep_archives : bool
        Keep the archive once it is unpacked.
    columns, root
        As `folder_cohort` takes them.
    patience : Patience, optional

    Returns
    -------
    FolderCohort

    Raises
    ------
    DownloadError
        Where a file cannot be had; the message says what to do.
    """
    folder = Path(folder)
    md5 = images_md5 or ("" if images_url else IMAGES_MD5)
    # the table first: it is small, and without it the scans are of no use
    tables = addresses(table_url) or TABLE
    ending = Path(urlsplit(tables[0]).path).suffix.lower()
    name = f"IXI{ending if ending in TABLE_SUFFIXES else '.xls'}"  # a mirror may hold it as CSV
    table = fetch(tables, folder / name, patience=patience)
    left_out = fetch_and_unpack(
        addresses(images_url) or IMAGES,
        folder / "IXI-T1.tar",
        folder / "images",
        checksum=f"md5:{md5}" if md5 not in ("", "none") else "",
        keep=keep_archives,
        patience=patience,
    )
    found = folder_cohort(folder / "images", table, columns=columns, root=root, source="ixi")
    found.notes.extend(left_out)
    return found
