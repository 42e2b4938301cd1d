"""One piece of heavy work at a time on a server: people wait their turn, memory stays that of one."""

from __future__ import annotations

import threading

import streamlit as st


@st.cache_resource
def one_at_a_time() -> threading.Lock:
    """The lock all sessions of this server share."""
    return threading.Lock()
