"""Downloads against a real server that misbehaves: whole and right, or absent with a word on what to do."""

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from email.utils import formatdate

import numpy as np
import pytest

from brainage_nb.sources import fetch as module
from brainage_nb.sources.fetch import DownloadError, fetch
from brainage_nb.workspace import CannotWrite

TRIES = 3
BODY = np.random.default_rng(0).bytes(400_000)
HALF = len(BODY) // 2


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few tries, short pauses and no long silence."""
    monkeypatch.setattr(module, "RETRY", module.RETRY.new(total=TRIES - 1, backoff_factor=0.01))
    monkeypatch.setattr(module, "TIMEOUT_S", (2, 0.4))


def get(url, path, **how):
    return fetch(url, path, **({"progress": False} | how))


def md5(body):
    return f"md5:{hashlib.md5(body).hexdigest()}"


def left_in(folder):
    """Names a reader could mistake for the file: all that are not hidden."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_a_file_arrives_whole_and_nothing_else_is_left(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY)
    assert get(url, tmp_path / "x" / "a.bin").read_bytes() == BODY
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.bin"]
    get(url, tmp_path / "x" / "a.bin")
    assert len(loopback.asked("/a.bin")) == 1


def test_a_connection_cut_at_half_is_continued_from_there(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, faults=[("cut", HALF)])
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    first, second = loopback.asked("/a.bin")
    assert "Range" not in first
    assert second["Range"] == f"bytes={HALF}-" and second["If-Range"] == f'"{hashlib.md5(BODY).hexdigest()}"'


def test_a_connection_that_drops_again_and_again_still_finishes_while_bytes_come(loopback, tmp_path):
    step = len(BODY) // 10 + 1
    url = loopback.put("/a.bin", BODY, always=("cut", step))
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    assert len(loopback.asked("/a.bin")) == 10 > TRIES


def test_the_wait_that_429_asks_for_is_kept(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, faults=[("status", 429, {"Retry-After": "1"}, b"slow down")])
    begun = time.monotonic()
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    assert time.monotonic() - begun >= 1.0


def test_a_wait_given_as_a_date_is_kept_too(loopback, tmp_path):
    when = formatdate(time.time() + 2, usegmt=True)
    url = loopback.put("/a.bin", BODY, faults=[("status", 503, {"Retry-After": when}, b"")])
    begun = time.monotonic()
    get(url, tmp_path / "a.bin")
    assert time.monotonic() - begun >= 0.9


def test_a_wait_of_an_hour_is_not_sat_out_but_said(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, faults=[("status", 429, {"Retry-After": "3600"}, b"")])
    begun = time.monotonic()
    with pytest.raises(DownloadError, match=r"answers 429.*again in 60 min, as the server asks"):
        get(url, tmp_path / "a.bin")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_server_error_that_passes_is_sat_out(loopback, tmp_path, status):
    url = loopback.put("/a.bin", BODY, faults=[status, status])
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY


def test_a_server_error_that_stays_ends_with_a_word_on_what_to_do(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, always=500)
    with pytest.raises(DownloadError, match=r"answers 500: run the cell again later.*mirror"):
        get(url, tmp_path / "a.bin")
    assert left_in(tmp_path) == []
    assert len(loopback.asked("/a.bin")) == 3


def test_what_came_before_the_server_failed_is_kept_for_the_next_run(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, faults=[("cut", HALF), 500, 500, 500])
    with pytest.raises(DownloadError, match=r"0\.2 MiB are kept and it goes on from there"):
        get(url, tmp_path / "a.bin")
    assert left_in(tmp_path) == []
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    assert loopback.asked("/a.bin")[-1]["Range"] == f"bytes={HALF}-"


@pytest.mark.parametrize(
    ("status", "word"), [(401, "login"), (403, "permission"), (404, "no such file"), (410, "mirror")]
)
def test_a_refusal_that_will_not_pass_is_not_repeated(loopback, tmp_path, status, word):
    url = loopback.put("/a.bin", BODY, always=("status", status, {}, b"<html>no</html>"))
    with pytest.raises(DownloadError, match=rf"answers {status}: .*{word}"):
        get(url, tmp_path / "a.bin")
    assert len(loopback.asked("/a.bin")) == 1 and left_in(tmp_path) == []


def test_a_wrong_hash_is_refused_and_not_downloaded_twice(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY)
    with pytest.raises(
        DownloadError, match=r"its md5 is \w{32}, expected was .*not taken: the publisher has replaced"
    ):
        get(url, tmp_path / "a.bin", checksum=md5(b"other"))
    assert list(tmp_path.iterdir()) == []
    assert len(loopback.asked("/a.bin")) == 1


def test_a_rest_of_another_file_is_not_used(loopback, tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(b"of another file" * 1000)
    url = loopback.put("/a.bin", BODY, etag="")
    assert get(url, tmp_path / "a.bin", checksum=md5(BODY)).read_bytes() == BODY


def test_another_size_than_expected_is_refused_before_it_is_downloaded(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY)
    with pytest.raises(DownloadError, match=r"400000 bytes on the server, 17 were expected"):
        get(url, tmp_path / "a.bin", size=17)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["t1.tar", "t1.zip", "a.nii.gz", "IXI.xls", "participants.tsv"])
@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>",
        b"\n<html><head><title>Sign in</title></head>",
        b'{"code": 403, "message": "Permission denied", "token": "s3cr3t"}',
        b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
    ],
)
def test_a_page_instead_of_the_file_is_refused_with_what_helps(loopback, tmp_path, name, page):
    url = loopback.put(f"/{name}", page + b" " * 5000, type="text/html")
    with pytest.raises(DownloadError, match=r"quota is used up \(wait some hours.*login.*mirror") as refused:
        get(url, tmp_path / name)
    assert "s3cr3t" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    assert len(loopback.asked(f"/{name}")) == 1


@pytest.mark.parametrize("name", ["a.nii", "a.tar", "a.mgh"])
def test_words_instead_of_an_image_or_archive_are_refused(loopback, tmp_path, name):
    url = loopback.put(f"/{name}", b"Error: you do not have permission to this file\n")
    with pytest.raises(DownloadError, match="came a web page or an error message"):
        get(url, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_goes_silent_is_asked_again(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, faults=[("stall", HALF, 1.5)])
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    assert HALF // 2 < int(loopback.asked("/a.bin")[1]["Range"].strip("bytes=-")) <= HALF


def test_a_server_that_stays_silent_ends_with_a_word_on_what_to_do(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, always=("stall", 0, 1.5))
    with pytest.raises(DownloadError, match=r"no connection .* Run the cell again later"):
        get(url, tmp_path / "a.bin")
    assert left_in(tmp_path) == []


def test_without_ranges_it_starts_anew_and_never_glues(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, ranges=False, faults=[("cut", HALF)])
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY


def test_without_anything_that_vouches_for_the_file_it_starts_anew(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, etag="", faults=[("cut", HALF)])
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    assert "Range" not in loopback.asked("/a.bin")[1]


def test_a_file_that_changed_on_the_server_is_not_glued_to_the_old_half(loopback, tmp_path):
    new = BODY[::-1]
    url = loopback.put("/a.bin", BODY, faults=[("cut", HALF), ("swap", new, '"new"')])
    assert get(url, tmp_path / "a.bin").read_bytes() == new


# of a file of the same length without a tag nothing tells: only a hash would
@pytest.mark.parametrize(
    ("new", "told"), [(BODY[::-1], True), (BODY[::-1] + b"longer", True), (BODY[::-1] + b"longer", False)]
)
def test_a_changed_file_is_found_out_even_if_the_server_ignores_if_range(loopback, tmp_path, new, told):
    url = loopback.put("/a.bin", BODY, if_range=False)
    loopback.pages["/a.bin"].faults = [("cut", HALF), ("swap", new, '"new"' if told else "")]
    assert get(url, tmp_path / "a.bin").read_bytes() == new


def test_a_length_announced_too_long_is_settled_by_asking_for_the_rest(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, faults=[("length", len(BODY) + 5000)])
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY


def test_a_full_disk_is_said_and_what_came_is_kept(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY)
    (tmp_path / ".a.bin.part").symlink_to("/dev/full")  # every write there fails as on a full disk
    with pytest.raises(CannotWrite, match=r"a\.bin cannot be written: the disk is full\..*download_dir"):
        get(url, tmp_path / "a.bin")
    assert left_in(tmp_path) == []
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "read-only"), (errno.ENOSPC, "the disk is full")],
)
def test_a_place_that_takes_no_file_is_named_with_what_to_do(loopback, tmp_path, monkeypatch, code, said):
    def refuse(content, path):
        raise OSError(code, os.strerror(code), str(path))

    url = loopback.put("/a.bin", BODY)
    with monkeypatch.context() as broken:
        broken.setattr(module, "write_json", refuse)
        with pytest.raises(CannotWrite, match=rf"{re.escape(str(tmp_path))}.* {said}.*download_dir"):
            get(url, tmp_path / "a.bin")
    assert left_in(tmp_path) == []
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"cannot be written: a file lies where a folder .*download_dir"):
        get("http://127.0.0.1:9/a.bin", tmp_path / "file" / "a.bin")


def test_an_empty_file_is_downloaded_again_and_one_of_another_size_is_named(loopback, tmp_path, capsys):
    url = loopback.put("/a.bin", BODY)
    (tmp_path / "a.bin").write_bytes(b"")
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    (tmp_path / "a.bin").write_bytes(BODY[:HALF])
    assert get(url, tmp_path / "a.bin", size=len(BODY)).stat().st_size == HALF
    assert "a.bin has 200000 bytes, the server's 400000: edited or torn" in capsys.readouterr().out


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"null"])
def test_torn_notes_of_a_partial_download_start_it_from_the_beginning(loopback, tmp_path, torn):
    (tmp_path / ".a.bin.part").write_bytes(BODY[:HALF])
    (tmp_path / ".a.bin.part.json").write_bytes(torn)
    assert get(loopback.put("/a.bin", BODY), tmp_path / "a.bin").read_bytes() == BODY


def test_a_file_larger_than_the_disk_is_not_begun(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, always=("length", 10**16))
    with pytest.raises(DownloadError, match=r"a\.bin needs [\d.]+ GiB more, but .* has [\d.]+ GiB left"):
        get(url, tmp_path / "a.bin")
    assert left_in(tmp_path) == []


def test_a_process_killed_in_the_middle_leaves_no_file_and_the_next_goes_on(loopback, tmp_path):
    url = loopback.put("/a.bin", BODY, faults=[("stall", HALF, 20)])
    program = (
        "import sys; from brainage_nb.sources.fetch import fetch; fetch(sys.argv[1], sys.argv[2], "
        "progress=False)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, url, str(tmp_path / "a.bin")])
    part = tmp_path / ".a.bin.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > HALF // 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert left_in(tmp_path) == []
    had = part.stat().st_size
    assert 0 < had <= HALF
    assert get(url, tmp_path / "a.bin").read_bytes() == BODY
    assert loopback.asked("/a.bin")[1]["Range"] == f"bytes={had}-"


def test_the_next_mirror_is_tried_and_its_file_never_glued_to_the_first(loopback, tmp_path):
    broken = loopback.put("/one.bin", BODY[::-1], faults=[("cut", HALF)], always=500)
    good = loopback.put("/two.bin", BODY, etag='"elsewhere"')
    assert get([broken, good], tmp_path / "a.bin").read_bytes() == BODY


def test_where_all_mirrors_fail_each_is_named(loopback, tmp_path):
    urls = [loopback.put("/one.bin", BODY, always=500), loopback.base + "/gone.bin"]
    with pytest.raises(DownloadError, match=r"(?s)/one\.bin: .*answers 500.*/gone\.bin: .*answers 404"):
        get(urls, tmp_path / "a.bin")


def test_nothing_listening_is_said(tmp_path):
    with pytest.raises(DownloadError, match="no connection"):
        get("http://127.0.0.1:9/a.bin", tmp_path / "a.bin")
    with pytest.raises(DownloadError, match="leads nowhere"):
        get("no-address", tmp_path / "a.bin")


def test_secrets_in_an_address_are_never_shown_or_kept(loopback, tmp_path, capfd):
    url = loopback.put("/a.bin", BODY, faults=[("cut", HALF)], always=500) + "?token=s3cr3t"
    with pytest.raises(DownloadError) as failed:
        get(url, tmp_path / "a.bin", progress=True)
    closed = "http://127.0.0.1:9/a.bin?token=s3cr3t"
    with pytest.raises(DownloadError) as unreachable:
        get(closed, tmp_path / "b.bin", progress=True)
    with pytest.raises(DownloadError, match="holds a user or password") as refused:
        get("http://me:s3cr3t@127.0.0.1:9/a.bin", tmp_path / "c.bin")
    said = capfd.readouterr()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".json").decode()
    for text in (said.out, said.err, kept, str(failed.value), str(unreachable.value), str(refused.value)):
        assert "s3cr3t" not in text
    for error in (failed, unreachable, refused):
        assert "s3cr3t" not in "".join(traceback.format_exception(error.value)).replace("me:s3cr3t@", "")
