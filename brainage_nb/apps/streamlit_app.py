"""The prediction app: a bundle and scans in, ages with their reasons out. Served by `brainage-nb app`.

What it shows of the results is in `results`; nothing is computed here.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from brainage_nb.apps.results import as_text, keep_results, model_facts, one_at_a_time, show_results
from brainage_nb.apps.uploads import predict_stored, shown_name, stored, together
from brainage_nb.bundle_format import MAX_BYTES, BundleError, find_bundles
from brainage_nb.predict.bundle import Bundle, load_bundle
from brainage_nb.predict.cautions import NOT_A_DEVICE, OLDEST
from brainage_nb.workspace import MissingInput, read_csv

MAX_UPLOADED_BYTES = 2 * 2**30
UPLOADED = "Upload a bundle (.zip)"
STYLE = Path(__file__).with_name("app.css")


def main() -> None:
    """Draw the page; Streamlit runs this anew at every interaction."""
    st.set_page_config("Brain age", "🧠", layout="wide", initial_sidebar_state="collapsed")
    st.html(f"<style>{STYLE.read_text(encoding='utf-8')}</style>")
    st.title("Brain age from a T1 scan")
    st.markdown(
        "Choose a model, add one or more T1-weighted head scans, and read the predicted age, how far it "
        "can be trusted, and what in the picture moved it. Scans stay on this computer and are deleted "
        "after prediction."
    )
    st.html(f"<p class='notice'>{NOT_A_DEVICE}</p>")
    bundle = choose_bundle(_offered())
    if bundle is not None:
        predict_scans(bundle)
        show_results(bundle)


# --- model ----------------------------------------------------------------------------------------------


def _offered() -> list[Path]:
    """The bundle named on the command line and those of the workspace; says which are damaged."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    found, damaged = find_bundles()
    for sentence in damaged:
        st.warning(sentence)
    return parser.parse_known_args(sys.argv[1:])[0].bundle + found


@st.cache_resource(max_entries=3, show_spinner="Opening the model")
def _open(identity: tuple[Any, ...], _source: Any, max_bytes: int) -> Bundle:
    return load_bundle(_source, max_bytes=max_bytes)


def choose_bundle(offered: Sequence[Path]) -> Bundle | None:
    """The chosen model, or None where none is chosen or it cannot be opened (which is said)."""
    st.header("1 · Model", anchor=False)
    labels: dict[str, Path] = {}
    for path in dict.fromkeys(place.absolute() for place in offered):
        labels[str(path) if _label(path) in labels else _label(path)] = path
    choice = UPLOADED
    if labels:
        choice = st.selectbox("Model", [*labels, UPLOADED], label_visibility="collapsed", key="model")
    elif not st.session_state.get("bundle"):
        st.info(
            "Upload the model that you were given: a bundle, one .zip file. The kit comes without a model. "
            "To look around, `brainage-nb run --workspace demo` trains one on artificial heads; notebooks 04 "
            "and 05 train one on your own scans."
        )
    st.session_state["bundle folder"] = labels.get(choice)
    try:
        bundle = _from_upload() if choice == UPLOADED else _from_disk(labels[choice])
    except BundleError as error:
        st.error(str(error))
        return None
    if bundle is not None:
        _describe(bundle)
    return bundle


def _describe(bundle: Bundle) -> None:
    facts = model_facts(bundle)
    told = [f"{name}: {facts[name]}" for name in facts if name.startswith(("training ages", "mean absolute"))]
    st.caption(as_text(". ".join(part[0].upper() + part[1:] for part in [bundle.title, *told])))
    if bundle.is_test_object:
        st.warning(
            "A demonstration model, trained on invented heads. It shows how the app works; its ages mean "
            "nothing for people.",
            icon=":material/science:",
        )


def _label(path: Path) -> str:
    """`resnet18 · demo` for a bundle in a workspace, else its name."""
    run = path.parent
    if path.name == "bundle" and run.parent.name == "runs":
        return f"{run.name} · {run.parent.parent.name}"
    return path.name


def _from_disk(path: Path) -> Bundle:
    inside = path / "bundle.json" if path.is_dir() else path
    return _open((str(path), inside.stat().st_mtime if inside.exists() else 0.0), path, MAX_BYTES)


def _from_upload() -> Bundle | None:
    upload = st.file_uploader("Bundle", type=None, key="bundle", label_visibility="collapsed")
    if upload is None:
        return None
    digest = hashlib.sha256(upload.getbuffer()).hexdigest()
    return _open((digest,), upload, MAX_UPLOADED_BYTES)


# --- scans ----------------------------------------------------------------------------------------------


def predict_scans(bundle: Bundle) -> None:
    """Upload field, true ages, and the button; results go into the session."""
    st.header("2 · Scans", anchor=False)
    _forget_other_models(bundle)
    turn = st.session_state.setdefault("turn", 0)  # a new key empties the field, so uploads leave the memory
    uploads = st.file_uploader(
        "NIfTI (.nii, .nii.gz), FreeSurfer (.mgz), or one DICOM series: its files, or a .zip of them",
        type=None,  # DICOM files of a hospital often have no ending
        accept_multiple_files=True,
        key=f"scans-{turn}",
    )
    others = _other_scans(bundle, turn) if len(together(uploads)) < 2 else {}
    _act(bundle, uploads, _true_ages(uploads), others)


def _other_scans(bundle: Bundle, turn: int) -> dict[str, Any]:
    """A field for each further scan of the session that the model can take; what was uploaded, by name."""
    fields = {
        name: st.file_uploader(f"{name} scan of the same session, if there is one", key=f"{name}-{turn}")
        for name in bundle.others
    }
    return {name: upload for name, upload in fields.items() if upload is not None}


def _act(
    bundle: Bundle, uploads: Sequence[Any], ages: Sequence[float | None], others: Mapping[str, Any]
) -> None:
    """The buttons and what they do."""
    example = _demo_head()
    wanted = {"predict": "Predict"}
    wanted |= {"demo": "Try a demo head"} if example else {}
    wanted |= {"clear": "Clear"} if st.session_state.get("results") else {}
    columns = st.columns([2] * len(wanted) + [10 - 2 * len(wanted)])
    asked = {
        key: column.button(
            label,
            type="primary" if key == "predict" else "secondary",
            disabled=key == "predict" and not uploads,
            width="stretch",
            key=key,
        )
        for (key, label), column in zip(wanted.items(), columns, strict=False)
    }
    if not any(asked.values()):
        return
    if asked["predict"]:
        with st.spinner(f"Predicting {len(uploads)} scan{'s' if len(uploads) > 1 else ''}"):
            keep_results(_predict(bundle, uploads, ages, others))
        _forget([*uploads, *others.values()])
        st.session_state["turn"] += 1
    elif asked.get("demo"):
        with st.spinner("Predicting a demo head"), one_at_a_time():
            keep_results(list(bundle.predict_many([example[0]], [example[1]], n_jobs=1)))
    else:
        keep_results([])
    st.rerun()


def _forget(uploads: Sequence[Any]) -> None:
    """Free uploads now: Streamlit keeps those of a field that is gone until the person closes the page."""
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    here = get_script_run_ctx()
    for upload in uploads if here is not None else ():
        here.uploaded_file_mgr.remove_file(here.session_id, upload.file_id)


def _forget_other_models(bundle: Bundle) -> None:
    """Results of another model must not stand under this one's name."""
    made = (bundle.manifest["run"], bundle.manifest["created"])
    if st.session_state.setdefault("model made", made) != made:
        st.session_state["model made"] = made
        keep_results([])


def _demo_head() -> tuple[Path, float] | None:
    """A test scan of the workspace the model lies in, with its age, where its cohort is the invented one."""
    folder = st.session_state.get("bundle folder")
    if folder is None or not (folder.parents[2] / "demo" / "truth.csv").exists():
        return None
    try:
        rows = read_csv(folder.parents[2] / "splits.csv")
    except MissingInput:
        return None
    test = rows[rows["split"] == "test"].sort_values("age")
    if test.empty:
        return None
    row = test.iloc[2 * len(test) // 3]
    image = folder.parents[2] / row["image"]
    return (image, float(row["age"])) if image.exists() else None


def _true_ages(uploads: Sequence[Any]) -> list[float | None]:
    """A field for each thing uploaded, which keeps its age while others come and go (not one for each name:
    `T1.nii.gz` may be uploaded thrice).
    """
    arrived = st.session_state.setdefault("arrived", {})
    things = together(uploads)
    for thing in things:
        arrived.setdefault(thing[0].file_id, len(arrived))
    labels = ["True age at the scan in years, if known"]
    told = "Give it before you predict. The model does not use it: it is for the gap, predicted minus true."
    if len(things) > 1:
        told += " Of two scans of one person the ages also give a rate of ageing."
        st.caption(f"True ages at the scan in years, where known. {told}")
        labels = [f"{n}. {as_text(shown_name(thing[0].name))}" for n, thing in enumerate(things, start=1)]
    keys = [arrived[thing[0].file_id] for thing in things] or [len(arrived)]
    columns = [column for _ in range(0, len(labels), 3) for column in st.columns(3)]
    return [
        column.number_input(label, 0.0, OLDEST, None, 1.0, key=f"age-{key}", help=told)
        for column, label, key in zip(columns, labels, keys, strict=False)
    ][: len(things)]


def _predict(
    bundle: Bundle, uploads: Sequence[Any], ages: Sequence[float | None], others: Mapping[str, Any]
) -> list[Any]:
    with one_at_a_time(), stored(uploads, ages) as scans:
        results = predict_stored(bundle, scans, others)
    gc.collect()
    return results


if __name__ == "__main__":
    main()
