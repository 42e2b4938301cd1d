"""Each source from the notebook's parameters to a cohort, against a real server on the loopback interface."""

import csv
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import re
import shutil
import socket
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import requests

from brainage_nb import platforms
from brainage_nb.cohort.rules import CohortRules
from brainage_nb.pipeline import Notebook, notebooks_folder
from brainage_nb.sources import cloud, opening
from brainage_nb.sources.fetch import DownloadError
from brainage_nb.sources.folder import TERMS, SourceError
from brainage_nb.sources.opening import READS, SOURCES, open_source
from brainage_nb.tables.files import TableError
from brainage_nb.workspace import CannotWrite
from tests.sources.loopback import Loopback, Page

IXI_NAMES = ["IXI002-Guys-0828-T1.nii.gz", "IXI012-HH-1211-T1.nii.gz", "IXI013-HH-1212-T1.nii.gz"]


def nifti(seed=0):
    """A real, tiny, compressed NIfTI file as bytes."""
    voxels = np.random.default_rng(seed).integers(0, 200, (16, 17, 18)).astype(np.int16)
    return gzip.compress(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])).to_bytes(), mtime=0)


def tarred(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return stream.getvalue()


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return stream.getvalue()


def ages(opened):
    return opened.cohort.set_index("scan_id")["age"].to_dict()


def assert_images_open(opened, root):
    """Every image of the cohort is a readable scan, inside the workspace."""
    for image in opened.cohort["image"]:
        assert nib.load(root / image).get_fdata().shape == (16, 17, 18)


# --- terms ---------------------------------------------------------------------------------------------


def test_every_source_has_terms_that_name_licence_and_citation():
    assert list(SOURCES) == list(READS) == list(TERMS)
    for terms in TERMS.values():
        shown = terms.markdown()
        assert terms.licence in shown and terms.cite in shown and terms.needs


def test_terms_are_printed_before_anything_is_fetched(tmp_path, capsys):
    with pytest.raises(DownloadError):
        open_source("ixi", {"ixi_table_url": "no-address"}, tmp_path)
    assert "CC BY-SA 3.0" in capsys.readouterr().out


def test_an_unknown_source_lists_all(tmp_path):
    with pytest.raises(SourceError, match="demo, folder, gdown, kaggle_dataset, ixi"):
        open_source("IXI", {}, tmp_path)


# --- IXI -----------------------------------------------------------------------------------------------


@pytest.fixture
def ixi(loopback):
    """Parameters of a small IXI on the loopback server."""
    tar = tarred({name: nifti(seed) for seed, name in enumerate(IXI_NAMES)})
    table = 'IXI_ID,"SEX_ID (1=m, 2=f)",AGE\n2,2,35.80\n12,1,38.78\n13,1,46.71\n13,1,46.71\n99,2,50\n'
    return {
        "ixi_images_url": loopback.put("/IXI-T1.tar", tar),
        "ixi_table_url": loopback.put("/IXI.csv", table.encode()),
        "ixi_md5": hashlib.md5(tar).hexdigest(),
    }


def test_ixi_becomes_a_cohort_and_a_second_run_asks_nothing_of_the_server(loopback, ixi, tmp_path):
    opened = open_source("ixi", ixi, tmp_path)
    assert ages(opened) == {"IXI002": 35.80, "IXI012": 38.78, "IXI013": 46.71}
    assert list(opened.cohort["sex"]) == ["F", "M", "M"]
    assert list(opened.cohort["site"]) == ["Guys", "HH", "HH"]
    assert set(opened.cohort["source"]) == {"ixi"}
    assert list(opened.unmatched_rows["subject_id"]) == ["99"]
    assert "CC BY-SA 3.0" in opened.terms.markdown()
    assert_images_open(opened, tmp_path)
    assert not list(tmp_path.rglob("*.tar"))
    asked = len(loopback.seen)
    assert ages(open_source("ixi", ixi, tmp_path)) == ages(opened)
    assert len(loopback.seen) == asked


def test_ixis_t2_and_pd_archives_come_beside_t1_where_asked(loopback, ixi, tmp_path, monkeypatch):
    more = {}
    for n, (modality, (name, _)) in enumerate(opening.IXI_MORE.items()):
        tar = tarred({IXI_NAMES[1].replace("-T1", f"-{name[4:6]}"): nifti(10 + n)})
        loopback.put(f"/{name}", tar)
        more[modality] = (name, hashlib.md5(tar).hexdigest())
    monkeypatch.setattr(opening, "IXI_MORE", more)
    opened = open_source("ixi", ixi | {"modalities": "T1w,T2w,PDw"}, tmp_path)
    found = opened.cohort.set_index("scan_id")[["T2w", "PDw"]]
    assert found.loc["IXI012"].str.contains("IXI012-HH-1211-(?:T2|PD).nii.gz").all()
    assert (found.drop(index="IXI012") == "").all(axis=None)
    asked = len(loopback.seen)
    open_source("ixi", ixi | {"modalities": "T1w,T2w,PDw"}, tmp_path)
    assert len(loopback.seen) == asked


def test_ixi_through_faults_comes_out_the_same(loopback, ixi, tmp_path):
    loopback.pages["/IXI-T1.tar"].faults = [503, ("cut", 9000), ("cut", 9000)]
    loopback.pages["/IXI.csv"].faults = [("status", 429, {"Retry-After": "0"}, b"")]
    opened = open_source("ixi", ixi, tmp_path)
    assert len(opened.cohort) == 3
    assert_images_open(opened, tmp_path)


def test_ixi_takes_a_mirror_and_refuses_another_archive(loopback, ixi, tmp_path):
    other = loopback.put("/other.tar", tarred({"IXI002-Guys-0828-T1.nii.gz": nifti(9)}))
    with pytest.raises(DownloadError, match="md5"):
        open_source("ixi", ixi | {"ixi_images_url": other}, tmp_path)
    both = f"{other} {ixi['ixi_images_url']}"
    assert len(open_source("ixi", ixi | {"ixi_images_url": both}, tmp_path).cohort) == 3


def test_the_publishers_archive_is_held_against_the_hash_on_record(loopback, ixi, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "IXI_IMAGES", (ixi["ixi_images_url"],))
    with pytest.raises(DownloadError, match="expected was 34901a0593b41dd19c1a1f746eac2d58"):
        open_source("ixi", ixi | {"ixi_images_url": "", "ixi_md5": ""}, tmp_path)


def test_a_downloaded_table_that_is_torn_or_empty_is_named_or_had_again(loopback, ixi, tmp_path):
    opened = open_source("ixi", ixi, tmp_path)
    table = tmp_path / "downloads" / "ixi" / "IXI.csv"
    table.write_bytes(b"")
    assert ages(open_source("ixi", ixi, tmp_path)) == ages(opened)
    table.write_bytes(b"IXI_I")
    with pytest.raises(TableError, match=r"IXI\.csv.*delete it: the next run downloads it again"):
        open_source("ixi", ixi, tmp_path)


def test_ixi_with_its_real_table_and_real_scans(loopback, shared_data, tmp_path):
    images = sorted((shared_data / "ixi_hh" / "images").iterdir())[:4]
    parameters = {
        "ixi_images_url": loopback.put(
            "/IXI-T1.tar", tarred({path.name: path.read_bytes() for path in images})
        ),
        "ixi_table_url": loopback.put("/IXI.xls", (shared_data / "ixi_hh" / "IXI.xls").read_bytes()),
    }
    opened = open_source("ixi", parameters, tmp_path)
    assert list(opened.cohort["scan_id"]) == [path.name[:6] for path in images]
    assert opened.cohort["age"].between(18, 90).all()


# --- OpenNeuro -----------------------------------------------------------------------------------------


class Bucket:
    """A stand-in for the public bucket: keys in pages, XML as S3 writes it."""

    def __init__(self, loopback, files, per_page=4):
        self.files, self.per_page, self.pages = files, per_page, 0
        for key, body in files.items():
            loopback.put(f"/bucket/{key}", body)
        loopback.pages["/bucket"] = self.listing
        self.url = loopback.base + "/bucket"

    def listing(self, query):
        self.pages += 1
        keys = sorted(key for key in self.files if key.startswith(query["prefix"][0]))
        start = int(query.get("continuation-token", ["0"])[0].removeprefix("tok/+="))
        shown = keys[start : start + self.per_page]
        more = start + self.per_page < len(keys)
        entries = "".join(
            f"<Contents><Key>{key}</Key><ETag>&quot;{hashlib.md5(self.files[key]).hexdigest()}&quot;</ETag>"
            f"<Size>{len(self.files[key])}</Size></Contents>"
            for key in shown
        )
        token = (
            f"<NextContinuationToken>tok/+={start + self.per_page}</NextContinuationToken>" if more else ""
        )
        text = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{entries}{token}</ListBucketResult>"
        )
        return Page(text.encode(), type="application/xml")


DATASET = {
    "participants.tsv": b"participant_id\tage\tsex\tgroup\nsub-01\t30\tF\tcontrol\nsub-02\t40\tM\tcontrol\n"
    b"sub-03\t50\tM\tpatient\nsub-10\t60\tF\tcontrol\n",
    "participants.json": b'{"age": {"Units": "years"}}',
    "dataset_description.json": b'{"Name": "Tiny", "License": "CC0", '
    b'"DatasetDOI": "doi:10.18112/openneuro.ds000999.v1"}',
    **{f"sub-{n}/anat/sub-{n}_T1w.nii.gz": nifti(int(n)) for n in ("01", "02", "03")},
    "sub-10/ses-a/anat/sub-10_ses-a_T1w.nii.gz": nifti(10),
    "sub-01/anat/sub-01_T2w.nii.gz": nifti(21),
    "sub-01/func/sub-01_task-rest_bold.nii.gz": b"never fetched",
    "derivatives/fmriprep/sub-01/anat/sub-01_T1w.nii.gz": b"never fetched",
}


@pytest.fixture
def bucket(loopback):
    files = {f"ds000999/{path}": body for path, body in DATASET.items()} | {"ds0009991/x": b"another set"}
    return Bucket(loopback, files)


def test_openneuro_takes_tables_and_t1w_scans_only(loopback, bucket, tmp_path):
    parameters = {"openneuro_id": "ds000999", "openneuro_url": bucket.url}
    opened = open_source("openneuro", parameters, tmp_path)
    assert bucket.pages == 3
    assert ages(opened) == {"01": 30, "02": 40, "10_a": 60}
    assert list(opened.dropped["detail"]) == ["diagnosis 'patient', not a control"]
    assert set(opened.cohort["source"]) == {"openneuro ds000999"}
    fetched = {path for path, _ in loopback.seen}
    assert not any("T2w" in path or "bold" in path or "derivatives" in path for path in fetched)
    assert "CC0" in opened.terms.licence and "10.18112/openneuro.ds000999" in opened.terms.cite
    assert "Markiewicz" in opened.terms.cite
    assert_images_open(opened, tmp_path)
    asked = len(loopback.seen)
    open_source("openneuro", parameters, tmp_path)
    assert len(loopback.seen) == asked


def test_openneuro_fetches_other_modalities_where_they_are_asked_for_later(bucket, tmp_path):
    parameters = {"openneuro_id": "ds000999", "openneuro_url": bucket.url}
    assert "T2w" not in open_source("openneuro", parameters, tmp_path).cohort
    found = open_source("openneuro", parameters | {"modalities": "T1w,T2w"}, tmp_path)
    assert found.cohort["T2w"].str.contains("sub-01_T2w").tolist() == [True, False, False]
    assert "T2w" not in open_source("openneuro", parameters, tmp_path).cohort


def test_openneuro_takes_the_first_subjects_only_where_asked(bucket, tmp_path):
    parameters = {"openneuro_id": "DS000999", "openneuro_url": bucket.url, "max_subjects": 2}
    opened = open_source("openneuro", parameters, tmp_path)
    assert set(opened.cohort["subject_id"]) == {"01", "02"}
    assert set(opened.unmatched_rows["subject_id"]) == {"03", "10"}


def test_openneuro_goes_on_where_a_fault_ended_it(loopback, bucket, tmp_path):
    parameters = {"openneuro_id": "ds000999", "openneuro_url": bucket.url}
    second = loopback.pages["/bucket/ds000999/sub-02/anat/sub-02_T1w.nii.gz"]
    second.faults = [("status", 403, {}, b"<Error><Code>AccessDenied</Code></Error>")]
    with pytest.raises(DownloadError, match=r"answers 403.*delete .*listing\.json"):
        open_source("openneuro", parameters, tmp_path)
    assert len(open_source("openneuro", parameters, tmp_path).cohort) == 3
    assert len(loopback.asked("/bucket/ds000999/sub-01/anat/sub-01_T1w.nii.gz")) == 1


def test_a_scan_that_is_not_the_listed_one_is_refused(loopback, bucket, tmp_path):
    page = loopback.pages["/bucket/ds000999/sub-02/anat/sub-02_T1w.nii.gz"]
    page.body = page.body[:-1] + b"x"
    with pytest.raises(DownloadError, match="md5"):
        open_source("openneuro", {"openneuro_id": "ds000999", "openneuro_url": bucket.url}, tmp_path)
    assert not (tmp_path / "downloads/openneuro/ds000999/sub-02/anat/sub-02_T1w.nii.gz").exists()


def test_openneuro_without_ages_ends_before_any_scan_is_fetched(loopback, tmp_path):
    files = {f"ds000999/{path}": body for path, body in DATASET.items()}
    files["ds000999/participants.tsv"] = b"participant_id\tsex\nsub-01\tF\n"
    bucket = Bucket(loopback, files)
    with pytest.raises(TableError):
        open_source("openneuro", {"openneuro_id": "ds000999", "openneuro_url": bucket.url}, tmp_path)
    assert not any("T1w" in path for path, _ in loopback.seen)


@pytest.mark.parametrize(
    ("number", "said"), [("1", "such as ds000001"), ("ds000998", "nothing under ds000998")]
)
def test_openneuro_numbers_that_are_none_are_said(bucket, tmp_path, number, said):
    with pytest.raises(SourceError, match=said):
        open_source("openneuro", {"openneuro_id": number, "openneuro_url": bucket.url}, tmp_path)


def test_keys_that_lead_outside_are_refused(loopback, tmp_path):
    files = {f"ds000999/{path}": body for path, body in DATASET.items()}
    bucket = Bucket(loopback, files | {"ds000999/sub-../anat/sub-.._T1w.nii.gz": nifti()})
    opened = open_source("openneuro", {"openneuro_id": "ds000999", "openneuro_url": bucket.url}, tmp_path)
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all((tmp_path / "downloads/openneuro/ds000999") in path.parents for path in everything)
    assert len(opened.cohort) == 3


# --- Google Drive --------------------------------------------------------------------------------------

ARCHIVE_ID, TABLE_ID, SCAN_ID, FOLDER_ID = (letter * 28 for letter in "ATSF")
SCANS = {f"scans/{name}": nifti(i) for i, name in enumerate(IXI_NAMES)}


@pytest.fixture
def drive(loopback, monkeypatch):
    """A stand-in for Drive: direct files, the confirmation page, a folder in the forms of gdown 5 and 6."""
    files = {
        ARCHIVE_ID: ("scans.zip", zipped(SCANS)),
        TABLE_ID: ("ages.csv", b"IXI_ID,AGE\n2,35.80\n12,38.78\n13,46.71\n"),
        SCAN_ID: ("IXI002-Guys-0828-T1.nii.gz", nifti(0)),
    }

    def attached(name, body):
        headers = {"Content-Disposition": f"attachment; filename=\"{name}\"; filename*=UTF-8''{name}"}
        return Page(body, headers=headers, etag=f'"{hashlib.md5(body).hexdigest()}"')

    pages = {identity: attached(*file) for identity, file in files.items()}

    def uc(query):
        identity = query["id"][0]
        if identity == ARCHIVE_ID:  # large: not scanned for viruses, asks first
            form = (
                "<html><title>Google Drive - Virus scan warning</title><form id='download-form' method='get' "
                f'action="{loopback.base}/download"><input type="hidden" name="id" value="{identity}">'
                f'<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="'
                f'{len(loopback.seen)}"></form></html>'
            )
            return Page(form.encode(), type="text/html")
        return pages.get(identity)

    loopback.pages["/uc"] = uc
    loopback.pages["/download"] = lambda query: pages[query["id"][0]]
    inside = [(TABLE_ID, "ages.csv"), (SCAN_ID, "IXI002-Guys-0828-T1.nii.gz")]
    links = "".join(f'<a href="https://drive.google.com/file/d/{i}/view">{name}</a>' for i, name in inside)
    loopback.put(
        "/embeddedfolderview", f"<html><title>shared</title>{links}</html>".encode(), type="text/html"
    )
    entries = [[i, "parent", name, "application/octet-stream"] for i, name in inside]
    encoded = str([entries]).replace("'", '"').replace('"', "\\x22")
    old = f"<title>shared - Google Drive</title><script>window['_DRIVE_ivd'] = '{encoded}';</script>"
    loopback.put(f"/drive/folders/{FOLDER_ID}", old.encode(), type="text/html")
    send = requests.adapters.HTTPAdapter.send

    def to_loopback(adapter, request, **how):
        request.url = re.sub(r"^https://drive\.google\.com", loopback.base, request.url)
        return send(adapter, request, **how)

    # gdown has Google's address built in; only that is turned, all else is the real thing
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", to_loopback)
    monkeypatch.setattr(cloud, "WAITS_S", (0.01, 0.01))
    loopback.drive_pages = pages
    return loopback


def test_drive_archive_behind_the_confirmation_page_and_a_table(drive, tmp_path):
    links = f"https://drive.google.com/file/d/{ARCHIVE_ID}/view?usp=sharing {TABLE_ID}"
    parameters = {"drive_links": links}
    opened = open_source("gdown", parameters, tmp_path)
    assert ages(opened) == {"IXI002": 35.80, "IXI012": 38.78, "IXI013": 46.71}
    assert_images_open(opened, tmp_path)
    asked = len(drive.seen)
    assert ages(open_source("gdown", parameters, tmp_path)) == ages(opened)
    assert len(drive.seen) == asked


def test_what_is_left_out_of_a_drive_archive_is_noted_each_time(drive, tmp_path):
    stream = io.BytesIO(tarred({name: nifti(i) for i, name in enumerate(IXI_NAMES)}))
    with tarfile.open(fileobj=stream, mode="a") as archive:
        link = tarfile.TarInfo("elsewhere")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    page = drive.drive_pages[ARCHIVE_ID]
    page.body, page.headers = stream.getvalue(), {"Content-Disposition": 'attachment; filename="scans.tar"'}
    parameters = {"drive_links": f"{ARCHIVE_ID} {TABLE_ID}"}
    for _ in range(2):
        opened = open_source("gdown", parameters, tmp_path)
        assert len(opened.cohort) == 3
        assert "elsewhere: a link, not unpacked" in opened.notes


def test_drive_download_that_is_cut_is_continued_though_its_address_changes(drive, tmp_path):
    parameters = {"drive_links": f"{ARCHIVE_ID} {TABLE_ID}"}
    drive.drive_pages[ARCHIVE_ID].body = zipped(
        {"notes.bin": np.random.default_rng(0).bytes(2_000_000)} | SCANS
    )
    drive.drive_pages[ARCHIVE_ID].faults = [
        ("cut", 1_500_000),
        ("status", 404, {"Content-Type": "text/html"}, b""),
    ]
    with pytest.raises(DownloadError, match="kept for the next run"):
        open_source("gdown", parameters, tmp_path)
    assert len(open_source("gdown", parameters, tmp_path).cohort) == 3
    assert 0 < int(drive.asked("/download")[-1]["Range"].strip("bytes=-")) <= 1_500_000


def test_a_full_disk_under_drive_is_said_at_once_and_the_next_run_goes_on(drive, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    parameters = {"drive_links": f"{ARCHIVE_ID} {TABLE_ID}"}
    for module, name in ((cloud, "write_json"), (pytest.importorskip("gdown"), "download")):
        with monkeypatch.context() as broken:
            broken.setattr(module, name, refuse)
            with pytest.raises(CannotWrite, match=r"drive cannot be written: the disk is full.*download_dir"):
                open_source("gdown", parameters, tmp_path)
        (tmp_path / "downloads" / "drive" / ".drive.json").write_text("{")  # torn: as if nothing were noted
    assert len(open_source("gdown", parameters, tmp_path).cohort) == 3


def test_drive_folder_is_listed_by_gdown_and_fetched(drive, tmp_path):
    link = f"https://drive.google.com/drive/folders/{FOLDER_ID}?usp=drive_link"
    opened = open_source("gdown", {"drive_links": link}, tmp_path)
    assert ages(opened) == {"IXI002": 35.80}
    assert_images_open(opened, tmp_path)


TOO_MANY = (
    b'<html><title>Google Drive - Quota exceeded</title><p class="uc-error-subcaption">Too many</p></html>'
)
NOT_SHARED = "is not shared, not there, or Drive is out of reach.*'Anyone with the link'"
REFUSALS = [
    ("quota is used up: wait", Page(TOO_MANY, type="text/html")),
    (NOT_SHARED, Page(b"<html><title>Sign in - Google Accounts</title></html>", type="text/html")),
    (NOT_SHARED, Page(b"<html><title>Error 404 (Not Found)</title></html>", type="text/html")),
    (NOT_SHARED, Page(b"", always=("status", 403, {"Content-Type": "text/html"}, b"no"))),
    (NOT_SHARED, Page(b"", always=500)),
]


@pytest.mark.parametrize(("said", "answer"), REFUSALS)
def test_what_drive_refuses_is_said_with_what_helps(drive, tmp_path, said, answer):
    drive.drive_pages[SCAN_ID] = answer
    with pytest.raises(DownloadError, match=said):
        open_source("gdown", {"drive_links": SCAN_ID}, tmp_path)
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()]


def test_a_drive_folder_that_is_not_shared_is_said(drive, tmp_path):
    for path in ("/embeddedfolderview", f"/drive/folders/{FOLDER_ID}"):
        drive.pages[path].always = ("status", 404, {"Content-Type": "text/html"}, b"<html></html>")
    with pytest.raises(DownloadError, match="'Anyone with the link'"):
        open_source("gdown", {"drive_links": f"folder:{FOLDER_ID}"}, tmp_path)


def test_what_is_no_share_link_is_said(tmp_path):
    with pytest.raises(DownloadError, match="no share link") as refused:
        open_source("gdown", {"drive_links": "https://example.org/x?resourcekey=s3cr3t"}, tmp_path)
    assert "s3cr3t" not in str(refused.value)
    with pytest.raises(DownloadError, match="drive_links is empty"):
        open_source("gdown", {"drive_links": " "}, tmp_path)


# --- Kaggle --------------------------------------------------------------------------------------------


def test_an_attached_kaggle_data_set_is_read_in_place(tmp_path, monkeypatch):
    attached = tmp_path / "input" / "datasets" / "somebody" / "ixi-t1"
    for seed, name in enumerate(IXI_NAMES):  # Kaggle unpacks each scan into a folder of its name
        inner = attached / "IXI" / name.removesuffix(".gz") / name.removesuffix(".gz")
        inner.parent.mkdir(parents=True)
        inner.write_bytes(gzip.decompress(nifti(seed)))
    (attached / "IXI.csv").write_text("IXI_ID,AGE\n2,35.80\n12,38.78\n13,46.71\n")
    monkeypatch.setattr(platforms, "KAGGLE_INPUT", tmp_path / "input")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    opened = open_source("kaggle_dataset", {"kaggle_dataset": "somebody/ixi-t1"}, tmp_path / "ws")
    assert ages(opened) == {"IXI002": 35.80, "IXI012": 38.78, "IXI013": 46.71}
    assert not (tmp_path / "ws" / "downloads").exists()
    assert opened.terms.url == "https://www.kaggle.com/datasets/somebody/ixi-t1"


@pytest.fixture
def kaggle(monkeypatch):
    """The real kagglehub against a loopback server: its own test environment is localhost, port 7777."""
    pytest.importorskip("kagglehub")
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "s3cr3t-key")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 7777)) == 0:
            pytest.skip("port 7777, which kagglehub's test environment uses, is taken")
    monkeypatch.setattr(cloud, "WAITS_S", (0.01, 0.01))
    server = Loopback(7777)
    yield server
    server.stop()


KAGGLE_PATH = "/api/v1/datasets.DatasetApiService/DownloadDataset"


def test_kagglehub_downloads_into_the_workspace_through_faults(kaggle, tmp_path):
    body = zipped(SCANS | {"IXI.csv": b"IXI_ID,AGE\n2,35.80\n12,38.78\n13,46.71\n"})
    kaggle.put(KAGGLE_PATH, body, headers={"Accept-Ranges": "bytes"}, faults=[("cut", 800), 503])
    parameters = {"kaggle_dataset": "https://www.kaggle.com/datasets/somebody/ixi/versions/2"}
    opened = open_source("kaggle_dataset", parameters, tmp_path)
    assert ages(opened) == {"IXI002": 35.80, "IXI012": 38.78, "IXI013": 46.71}
    assert_images_open(opened, tmp_path)
    assert len(kaggle.asked(KAGGLE_PATH)) == 3


@pytest.mark.parametrize(
    ("status", "said"), [(401, "make a token"), (403, "accept its terms"), (404, "no such data set")]
)
def test_what_kaggle_refuses_is_said_without_the_key(kaggle, tmp_path, status, said):
    kaggle.put(KAGGLE_PATH, b"", always=("status", status, {}, b'{"message": "no, s3cr3t-key"}'))
    with pytest.raises(DownloadError, match=said) as failed:
        open_source("kaggle_dataset", {"kaggle_dataset": "somebody/ixi/versions/2"}, tmp_path)
    assert "s3cr3t" not in str(failed.value) and "attach it" in str(failed.value)
    assert failed.value.__cause__ is None and failed.value.__context__ is None


def test_what_is_no_kaggle_name_is_said(tmp_path):
    with pytest.raises(DownloadError, match="owner/name"):
        open_source("kaggle_dataset", {"kaggle_dataset": "ixi"}, tmp_path)


# --- local copies --------------------------------------------------------------------------------------


def write_pair(path, seed=0):
    """A real `.hdr`/`.img` pair of Analyze, as OASIS has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).integers(0, 200, (16, 17, 18)).astype(np.int16)
    nib.Spm2AnalyzeImage(voxels, None).to_filename(path)


def oasis1_session(folder, session, kinds=("t88_gfc", "t88_masked_gfc", "sbj_111", "mpr-1", "fseg")):
    base = folder / "disc1" / session
    places = {
        "t88_gfc": f"PROCESSED/MPRAGE/T88_111/{session}_mpr_n4_anon_111_t88_gfc.hdr",
        "t88_masked_gfc": f"PROCESSED/MPRAGE/T88_111/{session}_mpr_n4_anon_111_t88_masked_gfc.hdr",
        "sbj_111": f"PROCESSED/MPRAGE/SUBJ_111/{session}_mpr_n4_anon_sbj_111.hdr",
        "mpr-1": f"RAW/{session}_mpr-1_anon.hdr",
        "fseg": f"FSL_SEG/{session}_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr",
    }
    for kind in kinds:
        write_pair(base / places[kind])


OASIS1_TABLE = (
    "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay\n"
    "OAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A\n"
    "OAS1_0003_MR1,F,R,73,4,3,27,0.5,1454,0.708,1.207,N/A\n"
    "OAS1_0061_MR1,F,R,20,,,,,1410,0.85,1.244,N/A\n"
    "OAS1_0061_MR2,F,R,20,,,,,1410,0.85,1.244,40\n"
    "OAS1_0080_MR1,M,R,30,,,,,1410,0.85,1.244,N/A\n"
)


def test_oasis1_takes_one_picture_a_session_drops_dementia_and_groups_retests(tmp_path):
    data = tmp_path / "oasis1"
    for session in ("OAS1_0001_MR1", "OAS1_0003_MR1", "OAS1_0061_MR1", "OAS1_0061_MR2"):
        oasis1_session(data, session)
    oasis1_session(data, "OAS1_0080_MR1", kinds=("sbj_111", "mpr-1"))
    (data / "oasis_cross-sectional.csv").write_text(OASIS1_TABLE)
    (data / "other.csv").write_text("a,b\n1,2\n")
    opened = open_source("oasis1", {"data_dir": str(data)}, tmp_path)
    assert ages(opened) == {"OAS1_0001_MR1": 74, "OAS1_0061_MR1": 20, "OAS1_0061_MR2": 20}
    assert opened.cohort["image"].str.endswith("t88_gfc.hdr").all()
    assert opened.cohort["subject_id"].nunique() == 2
    assert list(opened.dropped["detail"]) == ["CDR 0.5, above 0"]
    reasons = opened.unmatched_images.set_index("image")["reason"]
    sagittal = [image for image in reasons.index if "OAS1_0080" in image]
    assert len(sagittal) == 2 and reasons[sagittal].str.startswith("stored in sagittal slices").all()
    masked = [image for image in reasons.index if "masked_gfc.hdr" in image]
    assert len(masked) == 4 and reasons[masked].str.contains("t88_gfc.hdr is taken").all()
    first = open_source("oasis1", {"data_dir": str(data), "retests": "first"}, tmp_path)
    assert list(first.cohort["scan_id"]) == ["OAS1_0001_MR1", "OAS1_0061_MR1"]
    everybody = open_source("oasis1", {"data_dir": str(data), "max_cdr": -1.0}, tmp_path)
    assert len(everybody.cohort) == 4


def test_the_real_table_of_oasis1_and_its_rules(shared_data, tmp_path):
    table = shared_data / "tables" / "OASIS1_oasis_cross-sectional.csv"
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        folder = tmp_path / "data" / row["iD"]
        folder.mkdir(parents=True)
        (folder / f"{row['iD']}_mpr_n4_anon_111_t88_gfc.nii").touch()
    parameters = {"data_dir": str(tmp_path / "data"), "table": str(table)}
    opened = open_source("oasis1", parameters, tmp_path)
    demented = {row["iD"][:9] for row in rows if row["CDR"] and float(row["CDR"]) > 0}
    assert set(opened.dropped["subject_id"]) == demented
    assert set(opened.cohort["subject_id"]) == {row["iD"][:9] for row in rows} - demented
    assert opened.rules["scans left out"][0] == len(opened.dropped) > 50


OASIS2_TABLE = (
    "Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF\n"
    "OAS2_0001,OAS2_0001_MR1,Nondemented,1,0,M,R,87,14,2,27,0,1987,0.696,0.883\n"
    "OAS2_0001,OAS2_0001_MR2,Nondemented,2,457,M,R,88,14,2,30,0,2004,0.681,0.876\n"
    "OAS2_0002,OAS2_0002_MR1,Demented,1,0,M,R,75,12,,23,0.5,1678,0.736,1.046\n"
    "OAS2_0018,OAS2_0018_MR1,Converted,1,0,F,R,87,14,1,30,0,1406,0.715,1.248\n"
    "OAS2_0018,OAS2_0018_MR3,Converted,3,489,F,R,88,14,1,29,0,1398,0.713,1.255\n"
)


def test_oasis2_takes_the_first_of_the_repeats_and_nondemented_people(tmp_path):
    data = tmp_path / "oasis2"
    for row in csv.DictReader(io.StringIO(OASIS2_TABLE)):
        for number in (1, 2, 3):
            write_pair(data / "OAS2_RAW_PART1" / row["MRI ID"] / "RAW" / f"mpr-{number}.nifti.hdr")
    (data / "oasis_longitudinal_demographics.csv").write_text(OASIS2_TABLE)
    opened = open_source("oasis2", {"data_dir": str(data)}, tmp_path)
    assert list(opened.cohort["subject_id"]) == ["OAS2_0001", "OAS2_0001"]
    assert list(opened.cohort["age"]) == [87, 88]
    assert opened.cohort["image"].str.endswith("mpr-1.nifti.hdr").all()
    by_rule = opened.dropped.groupby("rule")["subject_id"].agg(set).to_dict()
    assert by_rule == {"max_cdr": {"OAS2_0002"}, "controls_only": {"OAS2_0018"}}
    converted = open_source("oasis2", {"data_dir": str(data), "controls_only": False}, tmp_path)
    assert set(converted.cohort["subject_id"]) == {"OAS2_0001", "OAS2_0018"}
    assert converted.cohort.set_index("scan_id")["age"].is_unique is False


def test_openbhb_takes_the_original_scans_and_says_what_arrays_lack(tmp_path):
    data = tmp_path / "openbhb"
    table = "participant_id\tstudy\tsex\tage\tsite\tdiagnosis\tsplit\n"
    for number, (identity, age) in enumerate({"100053248969": 25.5, "100239859343": 61.0}.items()):
        table += f"{identity}\t1\tmale\t{age}\t{number + 3}\tcontrol\ttrain\n"
        arrays = data / "train" / "derivatives" / f"sub-{identity}" / "ses-1"
        arrays.mkdir(parents=True)
        np.save(arrays / f"sub-{identity}_preproc-quasiraw_T1w.npy", np.zeros((2, 2)))
    (data / "participants.tsv").write_text(table)
    with pytest.raises(SourceError, match="no orientation"):
        open_source("openbhb", {"data_dir": str(data)}, tmp_path)
    for identity in ("100053248969", "100239859343"):
        scan = data / "train" / "rawdata" / f"sub-{identity}" / "ses-1" / f"sub-{identity}_T1w.nii.gz"
        scan.parent.mkdir(parents=True)
        scan.write_bytes(nifti())
    opened = open_source("openbhb", {"data_dir": str(data)}, tmp_path)
    assert list(opened.cohort["age"]) == [25.5, 61.0]
    assert list(opened.cohort["site"]) == ["3", "4"] and list(opened.cohort["sex"]) == ["M", "M"]
    assert "contains IXI" in opened.terms.markdown()


ADNI_TABLE = (
    '"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date"\n'
    '"I13722","002_S_0295","CN","M","85","sc","MRI","MP-RAGE","Original","4/18/2006"\n'
    '"I45112","002_S_0295","CN","M","86","m12","MRI","MP-RAGE","Original","5/10/2007"\n'
    '"I14437","002_S_0619","AD","M","78","sc","MRI","MP-RAGE","Original","6/01/2006"\n'
    '"I99999","002_S_0729","MCI","F","65","sc","MRI","MP-RAGE","Original","7/17/2006"\n'
)


def test_adni_matches_by_image_number_keeps_controls_and_groups_visits(tmp_path):
    data = tmp_path / "ADNI"
    for row in csv.DictReader(io.StringIO(ADNI_TABLE)):
        name = f"ADNI_{row['Subject']}_MR_MP-RAGE_br_raw_20060418_1_S13408_{row['Image Data ID']}.nii"
        path = data / row["Subject"] / "MP-RAGE" / "2006-04-18" / row["Image Data ID"] / name
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.decompress(nifti()))
    (data / "study_11_22_2026.csv").write_text(ADNI_TABLE)
    opened = open_source("adni", {"data_dir": str(data)}, tmp_path)
    assert sorted(opened.cohort["age"]) == [85, 86]
    assert set(opened.cohort["subject_id"]) == {"002_S_0295"}
    assert set(opened.dropped["detail"]) == {
        "diagnosis 'AD', not a control",
        "diagnosis 'MCI', not a control",
    }
    assert "Data Use Agreement" in opened.terms.licence
    merged = ADNI_TABLE.replace('"Subject"', '"PTID"').replace('"Group"', '"DX_bl"')
    (data / "study_11_22_2026.csv").write_text(merged)
    assert sorted(open_source("adni", {"data_dir": str(data)}, tmp_path).cohort["age"]) == [85, 86]


@pytest.mark.parametrize("source", ["oasis1", "oasis2", "openbhb", "adni"])
def test_another_table_is_refused_by_name(tmp_path, source):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii.gz").write_bytes(nifti())
    (tmp_path / "scans" / "t.csv").write_text("who,when\na,30\n")
    with pytest.raises(TableError, match=f"not the table of {source}: it has no column"):
        open_source(source, {"data_dir": str(tmp_path / "scans")}, tmp_path)
    with pytest.raises(SourceError, match="data_dir is empty"):
        open_source(source, {}, tmp_path)


# --- demo, folder and rules ------------------------------------------------------------------------------


def test_the_demo_is_read_like_anyone_s_data(tmp_path, monkeypatch):
    def make_demo_cohort(folder, n_subjects, seed, voxel_mm, modalities):
        assert modalities == ("T1w",)
        for session in ("01", "02"):
            scan = folder / "sub-0001" / "anat" / f"sub-0001_ses-{session}_T1w.nii.gz"
            scan.parent.mkdir(parents=True, exist_ok=True)
            scan.write_bytes(nifti())
        table = "participant_id\tsession_id\tage\nsub-0001\tses-01\t30\nsub-0001\tses-02\t32\n"
        (folder / "participants.tsv").write_text(table)
        (folder / "truth.csv").write_text("scan_id,age\nx,1\n")
        return folder

    monkeypatch.setattr("brainage_nb.demo.cohort.make_demo_cohort", make_demo_cohort)
    opened = open_source("demo", {"n_subjects": 1}, tmp_path)
    assert ages(opened) == {"0001_01": 30, "0001_02": 32}
    assert set(opened.cohort["source"]) == {"demo"}


def test_rules_that_leave_nobody_say_which_to_change(tmp_path):
    (tmp_path / "A.nii.gz").write_bytes(nifti())
    (tmp_path / "t.csv").write_text("ID,age,CDR\nA,70,1\n")
    with pytest.raises(SourceError, match=r"left out all 1 scans(.|\n)*max_cdr = -1"):
        open_source("folder", {"data_dir": str(tmp_path)}, tmp_path / "ws")
    opened = open_source("folder", {"data_dir": str(tmp_path), "max_cdr": -1.0}, tmp_path / "ws")
    assert ages(opened) == {"A": 70}


def test_a_shared_drive_folder_that_is_mounted_is_a_folder(tmp_path):
    mounted = tmp_path / "MyDrive" / "scans"
    mounted.mkdir(parents=True)
    (mounted / "A.nii.gz").write_bytes(nifti())
    (mounted / "t.csv").write_text("ID,age\nA,70\n")
    link = tmp_path / "shortcut"
    link.symlink_to(mounted)
    assert ages(open_source("folder", {"data_dir": str(link)}, tmp_path / "ws")) == {"A": 70}
    shutil.rmtree(mounted)
    with pytest.raises(FileNotFoundError, match="Set data_dir"):
        open_source("folder", {"data_dir": str(link)}, tmp_path / "ws")


def test_the_cohort_table_has_the_columns_that_notebooks_read(tmp_path):
    (tmp_path / "A.nii.gz").write_bytes(nifti())
    (tmp_path / "t.csv").write_text("ID,age,group\nA,70,HC\n")
    opened = open_source("folder", {"data_dir": str(tmp_path)}, tmp_path / "ws")
    wanted = ["scan_id", "subject_id", "session_id", "image", "age", "sex", "site", "source"]
    assert list(opened.cohort.columns)[:8] == wanted
    assert isinstance(opened.rules, pd.DataFrame) and len(opened.rules) == 3


def test_the_notebook_offers_every_source_and_the_rules_with_their_defaults():
    parameters = Notebook(notebooks_folder() / "01_data_access.ipynb").parameters()
    for item in dataclasses.fields(CohortRules):
        assert parameters[item.name].default == item.default, item.name
    assert parameters["source"].default in TERMS
    form = (notebooks_folder() / "src" / "01_data_access.py").read_text()
    offered = re.search(r"^source = .*@param (\[.*\])$", form, flags=re.M)[1]
    assert json.loads(offered) == list(SOURCES)
    assert set().union(*READS.values()) <= set(parameters)


def test_the_page_on_data_names_every_source_its_terms_and_its_citation():
    rows = (notebooks_folder().parent / "docs" / "data.md").read_text().splitlines()
    for source, terms in TERMS.items():
        if source == "demo":
            continue
        (row,) = [row for row in rows if row.startswith(f"| `{source}` |")]
        for fact in re.findall(r"CC [A-Z0-9-]+(?: [\d.]+)?|Data Use Agreement", terms.licence):
            assert fact in row, (source, fact)
        for doi in re.findall(r"doi:([\w./]+\w)", terms.cite):
            assert doi in row, (source, doi)


def test_an_archive_on_a_slow_disk_is_unpacked_once_to_the_fast_one(tmp_path, monkeypatch):
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    slow.mkdir()
    scans = {f"scans/sub-0{number}_T1w.nii.gz": nifti(number) for number in (1, 2, 3)}
    (slow / "scans.zip").write_bytes(zipped(scans))
    (slow / "ages.csv").write_text("participant_id,age\n01,30\n02,40\n03,50\n")
    monkeypatch.setenv("BRAINAGE_SCRATCH", str(fast))
    given = {"data_dir": str(slow / "scans.zip"), "table": "ages.csv"}
    opened = open_source("folder", given, slow / "workspace")
    assert sorted(opened.cohort["age"]) == [30, 40, 50]
    images = [Path(image) for image in opened.cohort["image"]]
    assert all(image.is_relative_to(fast) and image.is_file() for image in images)
    before = [image.stat().st_mtime_ns for image in images]
    open_source("folder", given, slow / "workspace")
    assert [image.stat().st_mtime_ns for image in images] == before
    shutil.rmtree(fast)  # a new session, on a new machine
    again = open_source("folder", given, slow / "workspace").cohort["image"]
    assert list(again) == list(opened.cohort["image"]) and all(image.is_file() for image in images)
