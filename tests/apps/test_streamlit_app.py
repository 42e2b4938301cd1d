import gzip
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

from brainage_nb import apps
from brainage_nb.bundle_format import zip_bundle
from brainage_nb.evaluation.rates import RateScale
from brainage_nb.predict.bundle import load_bundle
from tests.models.tiny_bundle import (
    bomb,
    head_array,
    noisy_head,
    write_fused_bundle,
    write_scan,
    write_tiny_bundle,
)

SCRIPT = str(Path(apps.__file__).with_name("streamlit_app.py"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def app(tiny, tmp_path, monkeypatch):
    """The app with no bundle in reach, one uploaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "none"))
    page = AppTest.from_file(SCRIPT, default_timeout=120).run()
    assert not page.exception
    packed = zip_bundle(tiny, tmp_path / "model.zip").read_bytes()
    return page.file_uploader(key="bundle").upload("model.zip", packed).run()


def uploader(page):
    return page.file_uploader(key=f"scans-{page.session_state['turn']}")


def predicted(page, name, content):
    page = uploader(page).upload(name, content).run()
    page = page.button(key="predict").click().run()
    assert not page.exception
    return page


def test_without_a_model_the_page_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "none"))
    page = AppTest.from_file(SCRIPT, default_timeout=120).run()
    assert not page.exception and "run --workspace demo" in page.info[0].value
    kinds = [element.type for element in page.main]
    notice = next(element for element in page.main if "not a medical device" in getattr(element, "body", ""))
    assert list(page.main).index(notice) < kinds.index("header")  # read before anything is uploaded


def test_an_uploaded_scan_gets_the_age_the_command_line_gives_and_its_interval_says_who_calibrated(
    app, tiny, tmp_path
):
    scan = write_scan(tmp_path / "head.nii.gz", 5)
    page = predicted(app, "head.nii.gz", scan.read_bytes())
    expected = load_bundle(tiny).predict(scan)
    assert page.metric[0].value == f"{expected.predicted_age:.1f}"
    assert page.metric[1].value == expected.interval_text
    results = page.session_state["results"]
    assert results[0].predicted_age == pytest.approx(expected.predicted_age, abs=1e-4)
    assert list(page.session_state["explanations"]) == [0]
    assert not any("orrected" in text.value for text in page.markdown)  # the correction is no headline
    details, model = (table.value["value"] for table in page.table)
    assert "such ages err by 6.5" in details["corrected for the age bias, to compare gaps [years]"]
    title = "90% conformal interval, calibrated on 50 subjects"
    assert title in model["interval"].replace("\\", "")
    assert any(title in text.value.replace("\\", "") for text in page.caption)  # beside the numbers


def test_an_age_not_to_be_used_is_shown_so_and_its_reason_first(tmp_path, monkeypatch):
    from brainage_nb.apps import results

    bundle = write_tiny_bundle(tmp_path / "bundle", n_scans=30)
    scan = write_scan(tmp_path / "noisy.nii", array=noisy_head(40))
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "none"))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py", "--bundle", str(bundle)])
    page = predicted(AppTest.from_file(SCRIPT, default_timeout=120).run(), "noisy.nii", scan.read_bytes())
    assert page.error[0].value.startswith("Do not use this age: the scan is further from the training scans")
    assert page.metric[0].label == "Not to be used: predicted age [years]"
    kinds = [element.type for element in page.main]
    assert kinds.index("error") < kinds.index("metric")
    assert not any("people like those" in text.value for text in page.markdown)
    result = page.session_state["results"][0]
    told = json.loads(results.result_json([result], load_bundle(bundle)))["results"][0]
    assert told["do_not_use_because"] == page.error[0].value
    printed = results.result_page(result, load_bundle(bundle), {})
    assert printed.index("Do not use this age") < printed.index("years, predicted, not to be used")


def test_the_true_age_gives_a_gap(app, tmp_path):
    page = app.number_input(key="age-0").set_value(40.0).run()
    page = predicted(page, "head.nii", write_scan(tmp_path / "head.nii", 5).read_bytes())
    assert page.session_state["results"][0].gap == pytest.approx(
        page.session_state["results"][0].predicted_age - 40
    )
    assert page.metric[2].value.startswith(("+", "-"))
    result = page.session_state["results"][0]
    said = next(text.value for text in page.markdown if "The true age, 40.0, lies" in text.value)
    assert ("outside the interval" in said) == (not result.low <= 40 <= result.high)
    assert f"at this true age, the gap is {result.adjusted_gap:+.1f}" in said


def test_ages_belong_to_uploads_whatever_they_are_called(app, tmp_path):
    names = ["T1.nii", "T1.nii", "T1.nii", "O'Brien, #1 & co=2.nii"]
    files = [(name, write_scan(tmp_path / "a.nii", n).read_bytes(), "") for n, name in enumerate(names)]
    page = uploader(app).set_value(files).run()
    for field, age in zip(page.number_input, (20.0, 50.0, 80.0, 30.0), strict=True):
        field.set_value(age)
    page = page.run().button(key="predict").click().run()
    assert not page.exception
    results = page.session_state["results"]
    assert [(one.scan, one.age) for one in results] == list(zip(names, (20, 50, 80, 30), strict=True))
    assert len({one.path for one in results}) == 4 and len({one.predicted_age for one in results}) == 4


def test_an_age_stays_with_its_upload_when_another_one_is_taken_away(app, tmp_path):
    files = [(name, "T1.nii", write_scan(tmp_path / "a.nii").read_bytes(), "") for name in ("one", "two")]
    uploader(app)._files = files  # as `set_value` keeps them, but with ids known here
    page = app.run()
    for field, age in zip(page.number_input, (20.0, 80.0), strict=True):
        field.set_value(age)
    page = page.run()
    uploader(page)._files = files[1:]
    assert [field.value for field in page.run().number_input] == [80.0]


def with_two_scans(page, tmp_path, ages):
    files = [(f"{n}.nii", write_scan(tmp_path / "a.nii", n).read_bytes(), "") for n in range(len(ages))]
    page = uploader(page).set_value(files).run()
    for field, age in zip(page.number_input, ages, strict=True):
        field.set_value(age)
    return page.run().button(key="predict").click().run()


def test_two_scans_of_one_person_give_a_rate_with_its_error_and_what_it_is_worth(tmp_path, monkeypatch):
    scale = RateScale(0.8, 1.5, "40 people seen again", mean=1.0, spread=0.3, differs=True, n_subjects=40)
    bundle = write_tiny_bundle(tmp_path / "bundle", rates=vars(scale))
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "none"))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py", "--bundle", str(bundle)])
    page = AppTest.from_file(SCRIPT, default_timeout=120).run()
    page = with_two_scans(page, tmp_path, (60.0, 64.0))
    assert not any("Rate" in text.value for text in page.info)  # whose scans they are is for a person to say
    first, second = (one.predicted_age for one in page.session_state["results"])
    page = page.checkbox[0].check().run()
    told = page.info[0].value.replace("\\", "")
    assert f"{(second - first) / 4 / 0.8:.2f} years a year, standard error 0.66" in told
    assert "40 people seen again" in told and "No verdict on one person" in told


def test_a_fused_model_rates_by_what_ages_from_the_same_scans_are_worth(app, tmp_path):
    scale = RateScale(0.8, 1.5, "all scans", mean=1.0, spread=0.3, differs=True, n_subjects=40)
    bundle = write_fused_bundle(tmp_path / "fused")
    said = json.loads((bundle / "bundle.json").read_text()) | {"rates": vars(scale)}
    said["parts"][1]["rates"] = vars(replace(scale, error=3.0, error_from="the T1w scan alone"))
    (bundle / "bundle.json").write_text(json.dumps(said))
    packed = zip_bundle(bundle, tmp_path / "fused.zip").read_bytes()
    page = app.file_uploader(key="bundle").upload("fused.zip", packed).run()
    page = with_two_scans(page, tmp_path, (60.0, 64.0)).checkbox[0].check().run()
    told = page.info[-1].value.replace("\\", "")
    assert "the T1w scan alone" in told and "standard error 1.33" in told


def test_a_bundle_that_cannot_tell_a_rate_and_scans_of_one_age_are_said_to(app, tmp_path):
    page = with_two_scans(app, tmp_path, (60.0, 60.0)).checkbox[0].check().run()
    assert "this bundle does not say how far" in page.info[0].value


def hostile():
    import nibabel as nib

    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    series = nib.Nifti1Image(np.zeros((8, 8, 8, 5), np.int16), np.eye(4)).to_bytes()
    whole = gzip.compress(nib.Nifti1Image(head_array(), np.eye(4)).to_bytes())
    return {
        "claims 30000^3": ("a.nii", header.binaryblock + b"\0" * 100, "30000"),
        "claims 30000^3, zipped": ("a.nii.gz", gzip.compress(header.binaryblock + b"\0" * 100), "30000"),
        "text": ("a.nii", b"patient notes, not a scan", "neither a NIfTI"),
        "empty": ("a.nii.gz", b"", "empty"),
        "pickle": ("a.nii", pickle.dumps({"a": 1}), "neither a NIfTI"),
        "series": ("a.nii", series, "expected one 3-D volume"),
        "10 GB when open": ("a.nii.gz", bomb((256, 256, 256)), "far more than its header claims"),
        "10 GB, and says so": ("a.nii.gz", bomb((2000, 2000, 1250)), "2000 x 2000 x 1250"),
        "truncated": ("a.nii.gz", whole[: len(whole) // 2], "end early"),
    }


def test_a_fused_model_has_a_field_for_the_other_scan_of_the_session(app, tmp_path):
    bundle = write_fused_bundle(tmp_path / "fused")
    packed = zip_bundle(bundle, tmp_path / "fused.zip").read_bytes()
    page = app.file_uploader(key="bundle").upload("fused.zip", packed).run()
    t1, t2 = (write_scan(tmp_path / f"{name}.nii", n) for n, name in enumerate(("t1", "t2"), 5))
    uploader(page).upload("t1.nii", t1.read_bytes()).run()
    page.file_uploader(key=f"T2w-{page.session_state['turn']}").upload("t2.nii", t2.read_bytes()).run()
    page = page.button(key="predict").click().run()
    expected = load_bundle(bundle).predict(t1, also={"T2w": t2}).predicted_age
    assert page.session_state["results"][0].predicted_age == pytest.approx(expected, abs=1e-4)


def test_hostile_scans_get_clear_messages_and_the_app_goes_on(app, tmp_path):
    import tempfile

    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr("../../out.dcm", "content")
    scans = hostile() | {"leads out": ("a.zip", (tmp_path / "out.zip").read_bytes(), "no DICOM")}
    page = app
    for name, (file, content, said) in scans.items():
        page = predicted(page, file, content)
        assert said in page.error[0].value and not page.metric, name
    page = predicted(page, "good.nii", write_scan(tmp_path / "good.nii").read_bytes())
    assert len(page.metric) >= 1
    assert not list(tmp_path.parent.glob("**/out.dcm"))
    assert not list(Path(tempfile.gettempdir()).glob("brainage-*"))


def test_hostile_bundles_get_clear_messages(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "none"))
    packed = zip_bundle(tiny, tmp_path / "model.zip")
    damaged = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as archive:
        weights = archive.getinfo("member-00.safetensors")
    damaged[weights.header_offset + weights.compress_size // 2] ^= 255
    page = AppTest.from_file(SCRIPT, default_timeout=120).run()
    for content in (pickle.dumps({"weights": 1}), b"", b"PK\x03\x04" + b"x" * 99, bytes(damaged)):
        page = page.file_uploader(key="bundle").set_value(("model.zip", content, "application/zip")).run()
        assert not page.exception and len(page.error) == 1
        assert "bundle" in page.error[0].value or "zip" in page.error[0].value


def test_downloads_hold_the_same_numbers_and_no_outside_reference(tiny, tmp_path):
    from matplotlib.figure import Figure

    from brainage_nb.apps import results

    bundle = load_bundle(tiny)
    result = bundle.predict(write_scan(tmp_path / "=2+2.nii", 5), 40)
    content = json.loads(results.result_json([result], bundle))
    assert content["results"][0]["predicted_age"] == pytest.approx(result.predicted_age, abs=1e-4)
    assert "'=2+2.nii" in results.result_csv([result]) and result.path in results.result_csv([result])
    assert content["results"][0]["path"] == result.path == str(tmp_path / "=2+2.nii")
    page = results.result_page(result, bundle, {"<b>title</b>": Figure()})
    assert f"{result.predicted_age:.1f}" in page and "not a medical device" in page
    assert "<b>title" not in page and "http" not in page and result.path in page
    assert page.index("not a medical device") < page.index("years, predicted")
    assert "An interval like this one holds the true age of about 9 in 10 people" in page


def test_the_demo_head_button_works_out_of_the_box(tiny, tmp_path, monkeypatch):
    import shutil

    import pandas as pd

    from brainage_nb.workspace import write_csv

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BRAINAGE_WORKSPACE", raising=False)
    demo = tmp_path / "workspace" / "demo"
    shutil.copytree(tiny, demo / "runs" / "resnet18" / "bundle")
    (demo / "demo").mkdir()
    write_scan(demo / "demo" / "head.nii")
    write_csv(pd.DataFrame({"scan_id": ["a"]}), demo / "demo" / "truth.csv")
    row = {"scan_id": "a", "subject_id": "a", "image": "demo/head.nii", "age": 61.0, "split": "test"}
    write_csv(pd.DataFrame([row]), demo / "splits.csv")
    page = AppTest.from_file(SCRIPT, default_timeout=120).run()
    page = page.button(key="demo").click().run()
    assert not page.exception and page.session_state["results"][0].age == 61.0


def test_bundles_of_one_label_do_not_hide_each_other(tiny, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRAINAGE_WORKSPACE", str(tmp_path / "other" / "demo"))
    for place in ("workspace", "other"):
        shutil.copytree(tiny, tmp_path / place / "demo" / "runs" / "resnet18" / "bundle")
    page = AppTest.from_file(SCRIPT, default_timeout=120).run()
    label, *others = page.selectbox(key="model").options
    assert label == "resnet18 · demo" and len(others) == 2 and others[0].endswith("runs/resnet18/bundle")
