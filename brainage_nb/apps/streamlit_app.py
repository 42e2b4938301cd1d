"""The prediction app: a bundle and scans in, ages with their reasons out. Served by `brainage-nb app`.

The page's order only; its parts are in `app_parts` and `app_results`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import streamlit as st

from brainage_nb.apps import app_parts as parts
from brainage_nb.apps.app_results import show_results
from brainage_nb.apps.predict_cli import bundles_in_reach


def main() -> None:
    """Draw the page; Streamlit runs this anew at every interaction."""
    parts.page_head()
    bundle = parts.choose_bundle(_offered())
    if bundle is None:
        parts.notice()
        return
    parts.predict_scans(bundle)
    show_results(bundle)
    parts.notice()


def _offered() -> list[Path]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bundle", default="")
    given = parser.parse_known_args(sys.argv[1:])[0].bundle
    return ([Path(given)] if given else []) + bundles_in_reach()


st.set_page_config(page_title="Brain age", page_icon="🧠", layout="wide", initial_sidebar_state="collapsed")
main()
