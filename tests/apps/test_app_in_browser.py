"""The app in a real browser: what a person does, from upload to download. Needs Chromium and Selenium."""

import csv
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from brainage_nb.bundle_format import zip_bundle
from brainage_nb.predict.bundle import load_bundle
from tests.models.tiny_bundle import bomb, write_scan, write_tiny_bundle

pytestmark = pytest.mark.slow
PATIENCE = 120
ALERT = "[data-testid=stAlert]"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def served(tmp_path):
    """The app on a free port of this machine; its temporary folder is ours, so that leftovers show."""
    pytest.importorskip("streamlit")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "BRAINAGE_WORKSPACE": str(tmp_path / "none")}
    log = open(tmp_path / "server.log", "wb")  # noqa: SIM115
    command = [sys.executable, "-m", "brainage_nb.cli", "app", "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(lambda: healthy(port), "the server")
        yield server, f"http://127.0.0.1:{port}", scratch, tmp_path / "server.log"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def healthy(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, what):
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"{what} did not appear in {PATIENCE} s")


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def browser(request, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium or its driver is not installed (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    width, height = request.param
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        # A window is never narrower than about 500 px; a phone has to be emulated.
        if width < 500:
            metrics = {"width": width, "height": height, "pixelRatio": 2.0}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield opened
        finally:
            opened.quit()


def all_of(browser, css):
    return browser.find_elements("css selector", css)


def texts(browser, css):
    from selenium.common.exceptions import StaleElementReferenceException

    try:
        return [element.text for element in all_of(browser, css)]
    except StaleElementReferenceException:  # the page is being drawn anew
        return []


def click(browser, label):
    from selenium.common.exceptions import WebDriverException

    def clicked():
        for button in all_of(browser, "button"):
            try:
                if button.text.strip() == label and button.is_enabled():
                    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
                    button.click()
                    return True
            except WebDriverException:
                continue
        return False

    wait_for(clicked, f"the button {label!r}")


def give(browser, number, path):
    """Put a file into the upload field of this number."""
    wait_for(lambda: len(all_of(browser, "input[type=file]")) > number, "the upload field")
    all_of(browser, "input[type=file]")[number].send_keys(str(path))


def keep_picture(browser, name):
    """A picture of the whole page, where a folder for them is named."""
    if folder := os.environ.get("BRAINAGE_SCREENSHOTS"):
        height = browser.execute_script(
            "return Math.max(...[...document.querySelectorAll('[data-testid=stMain]')].map(e => "
            "e.scrollHeight))"
        )
        width = browser.execute_script("return window.innerWidth")
        browser.set_window_size(width, height + 150) if width > 500 else None
        time.sleep(1)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_from_upload_to_download(tiny, served, browser, tmp_path, request):
    server, address, scratch, log = served
    (tmp_path / "downloads").mkdir()
    packed, scan = zip_bundle(tiny, tmp_path / "model.zip"), write_scan(tmp_path / "jane_doe.nii.gz", 5)
    expected = load_bundle(tiny).predict(scan)
    browser.get(address)
    give(browser, 0, packed)
    wait_for(lambda: len(all_of(browser, "input[type=file]")) == 2, "the field for scans")
    give(browser, 1, scan)
    click(browser, "Predict")
    shown = wait_for(lambda: texts(browser, "[data-testid=stMetricValue]"), "the age")
    assert shown[0] == f"{expected.predicted_age:.1f}" and shown[1] == expected.interval_text
    picture = wait_for(
        lambda: all_of(browser, "[data-testid=stImage] img, [data-testid=stImageContainer] img"), "slices"
    )
    wait_for(lambda: picture[0].get_property("naturalWidth") > 300, "the picture")
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 1, "the page is wider than the screen"
    keep_picture(browser, f"result-{request.node.callspec.id}")
    click(browser, "CSV, all scans")
    file = wait_for(lambda: list((tmp_path / "downloads").glob("*.csv")), "the download")[0]
    with open(file, encoding="utf-8") as stream:
        row = next(csv.DictReader(stream))
    assert float(row["predicted_age"]) == pytest.approx(expected.predicted_age, abs=1e-4)
    assert server.poll() is None and not list(scratch.glob("brainage-*"))
    assert "jane_doe" not in log.read_text(errors="replace")


def said_of(browser, name):
    """Whether the page says of this file that it unpacks to too much."""
    return any(f"{name} unpacks to far more" in text for text in texts(browser, ALERT))


def resident_mb(process):
    """Memory of a process and its children, MB."""
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in family) / 1e6


def test_a_file_of_ten_gigabytes_when_open_costs_little_and_the_memory_comes_back(
    tiny, served, browser, tmp_path
):
    psutil = pytest.importorskip("psutil")
    server, address, scratch, _ = served
    file, good = tmp_path / "big.nii.gz", write_scan(tmp_path / "good.nii")
    file.write_bytes(bomb((256, 256, 256)))
    browser.get(address)
    give(browser, 0, zip_bundle(tiny, tmp_path / "model.zip"))
    give(browser, 1, good)  # what a prediction needs anyway is loaded now
    click(browser, "Predict")
    wait_for(
        lambda: all_of(browser, "[data-testid=stImage] img, [data-testid=stImageContainer] img"), "slices"
    )
    process, peak, done = psutil.Process(server.pid), [0.0], threading.Event()
    before = resident_mb(process)

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], resident_mb(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    after = []
    try:
        for again in range(3):
            name = f"big{again}.nii.gz"
            os.link(file, tmp_path / name)
            give(browser, 1, tmp_path / name)
            click(browser, "Predict")
            wait_for(partial(said_of, browser, name), "the refusal")
            time.sleep(2)
            after.append(resident_mb(process))
    finally:
        done.set()
        watcher.join()
    print(f"memory before {before:.0f} MB, at most {peak[0]:.0f} MB, after each {after}")
    assert peak[0] - before < 300, "the file was unpacked"
    assert after[-1] - before < 150, "such files take memory for good"  # three of them, 30 GB when open
    assert server.poll() is None and not list(scratch.glob("brainage-*"))


def test_a_bad_upload_is_answered_and_the_next_one_works(tiny, served, browser, tmp_path):
    server, address, scratch, _ = served
    bad, good = tmp_path / "bad.nii", write_scan(tmp_path / "good.nii")
    bad.write_text("no scan")
    browser.get(address)
    give(browser, 0, zip_bundle(tiny, tmp_path / "model.zip"))
    give(browser, 1, bad)
    click(browser, "Predict")
    said = wait_for(lambda: texts(browser, ALERT), "the message")
    assert any("neither a NIfTI" in text for text in said)
    give(browser, 1, good)
    click(browser, "Predict")
    wait_for(lambda: texts(browser, "[data-testid=stMetricValue]"), "the age")
    assert server.poll() is None and not list(scratch.glob("brainage-*"))
