"""The kaggle/ folder: its metadata by our rules, and as the real `kaggle` client takes it."""

import json
import os
import re
import subprocess
import sys
from importlib import util
from itertools import pairwise

import pytest

from tests.platforms.emulation import require_namespaces
from tests.platforms.resolution import ROOT

KAGGLE = ROOT / "kaggle"
sys.path.insert(0, str(KAGGLE))
import push  # noqa: E402

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("0*.ipynb"))
KERNELS = [*NOTEBOOKS, "run_all"]
each_kernel = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture
def client(tmp_path_factory):
    """Run a command with the real client in it, pointed at the stand-in: (status, output, calls)."""
    require_namespaces()
    if util.find_spec("kaggle") is None:
        pytest.skip("the kaggle client is not installed (extra dev)")
    home = tmp_path_factory.mktemp("home")
    environment = {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": "someone",
        "KAGGLE_KEY": "0" * 32,
    }
    environment |= {"HOME": str(home), "KAGGLE_CONFIG_DIR": str(home), "NO_PROXY": "localhost"}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"

    def run(*command):
        stand_in = [sys.executable, ROOT / "tests" / "platforms" / "kaggle_stand_in.py", home / "calls.json"]
        command = ["unshare", "--user", "--map-root-user", "--net", *stand_in, *command]
        done = subprocess.run(
            list(map(str, command)), env=os.environ | environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr, json.loads((home / "calls.json").read_text())

    return run


def test_there_is_a_kernel_for_every_notebook_and_one_for_all():
    assert push.kernels() == KERNELS


@each_kernel
def test_internet_is_set_explicitly_and_a_gpu_is_a_pair_of_t4(name):
    content = push.metadata_of(name, "someone")
    assert content["enable_internet"] is True
    assert content.get("machine_shape") == ("NvidiaTeslaT4" if content["enable_gpu"] else None)
    assert content["enable_gpu"] == (name[:2] in ("04", "05", "07", "ru"))


def test_each_notebook_s_output_is_the_input_of_the_next():
    contents = [push.metadata_of(name, "someone") for name in NOTEBOOKS]
    assert contents[0]["kernel_sources"] == []
    for before, after in pairwise(contents):
        assert after["kernel_sources"] == [before["id"]]


def test_other_data_sets_are_attached_beside_the_wheels():
    content = push.metadata_of("01_data_access", "someone", offline=True, datasets=["other/my-scans"])
    assert content["dataset_sources"] == ["other/my-scans", "someone/brainage-nb-wheels"]


def test_a_later_part_goes_on_from_the_one_before():
    two, three = (push.metadata_of("04_train_resnet18", "someone", part=part) for part in (2, 3))
    assert two["kernel_sources"] == ["someone/brainage-nb-04-train-resnet18"]
    assert three["kernel_sources"] == [two["id"]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "someone/Other"},
        {"title": "another title"},
        {"kernel_sources": ["no-owner"]},
        {"title": "x" * 51, "id": "someone/" + "x" * 51},
    ],
)
def test_an_id_that_kaggle_would_change_or_refuse_is_refused_before(wrong):
    content = push.metadata_of("01_data_access", "someone") | wrong
    with pytest.raises(push.SlugError):
        push.check_slugs(content)
    with pytest.raises(push.SlugError):
        push.metadata_of("01_data_access", "not a user")


@pytest.mark.parametrize(
    "name",  # without a GPU, with one, and the one of another folder; the others differ in their names
    [
        name if name[:2] in ("01", "04", "ru") else pytest.param(name, marks=pytest.mark.slow)
        for name in KERNELS
    ],
)
def test_the_real_client_accepts_the_folder_and_pushes_what_was_prepared(name, client, tmp_path):
    given = ["settings=epochs=3"] if name == "run_all" else ["workspace=elsewhere"]
    content = push.metadata_of(name, "someone", offline=True)
    folder = push.prepare(name, content, given, tmp_path)
    status, said, calls = client("kaggle", "kernels", "push", "-p", folder)
    assert (status, "version 1 successfully pushed" in said) == (0, True), said
    assert "does not resolve to the specified id" not in said
    (sent,) = [request for method, request in calls if method == "SaveKernel"]
    assert (sent["slug"], sent["enableInternet"]) == (content["id"], False)
    assert sent.get("kernelDataSources", []) == content["kernel_sources"]
    assert sent["datasetDataSources"] == ["someone/brainage-nb-wheels"]
    assert sent.get("machineShape") == content.get("machine_shape")
    injected = [
        cell["source"]
        for cell in json.loads(sent["text"])["cells"]
        if "injected-parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(injected) == 1
    assert given[0].split("=")[1] in injected[0]


def test_the_real_client_refuses_what_is_wrong(client, tmp_path):
    content = push.metadata_of("01_data_access", "someone") | {"language": "cobol"}
    folder = push.prepare("01_data_access", content, [], tmp_path)
    status, said, calls = client("kaggle", "kernels", "push", "-p", folder)
    assert status != 0 and "language" in said
    assert calls == []


def test_push_and_status_go_through_the_client(client):
    script = [sys.executable, KAGGLE / "push.py", "--owner", "someone"]
    status, said, calls = client(*script, "02_data_cleaning", "-p", "seed=5", "--dataset", "other/my-scans")
    assert (status, [method for method, _ in calls]) == (0, ["SaveKernel"]), said
    status, said, calls = client(*script, "--status")
    asked = [request["kernelSlug"] for method, request in calls if method == "GetKernelSessionStatus"]
    assert (status, len(asked), said.count("COMPLETE")) == (0, len(KERNELS), len(KERNELS)), said


@pytest.mark.parametrize(
    "given",
    [
        ["--owner", 'a"b', "--status"],
        ["--owner", "me/x", "--status"],
        ["--owner=--help-me!", "02_data_cleaning"],
        ["--owner", "someone", "--part", "0", "02_data_cleaning"],
        ["--owner", "someone", "--part=-1", "02_data_cleaning"],
        ["--owner", "someone", "--part", "two", "02_data_cleaning"],
    ],
)
def test_an_owner_or_a_part_that_cannot_be_is_refused_in_words(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        push.main([*given, "--dry-run"])
    assert re.search("is no Kaggle user name|is no part", capsys.readouterr().err)


def test_a_parameter_that_no_notebook_has_is_refused(capsys):
    assert push.main(["02_data_cleaning", "--owner", "someone", "-p", "sead=5", "--dry-run"]) == 2
    assert "seed" in capsys.readouterr().err


def test_the_real_client_uploads_the_wheel_data_set(client, tmp_path):
    metadata = (KAGGLE / "wheels" / "dataset-metadata.json").read_text().replace("OWNER/", "someone/")
    (tmp_path / "dataset-metadata.json").write_text(metadata)
    (tmp_path / "colab_setup.sh").write_bytes((ROOT / "colab_setup.sh").read_bytes())
    status, said, calls = client("kaggle", "datasets", "create", "-p", tmp_path)
    assert status == 0, said
    (sent,) = [request for method, request in calls if method == "CreateDataset"]
    assert (sent["ownerSlug"], sent["slug"]) == ("someone", "brainage-nb-wheels")
    assert [file["token"] for file in sent["files"]] == ["token"]
