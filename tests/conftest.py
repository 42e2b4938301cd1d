"""Fixtures every test may use."""

import gc
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """Let the garbage collector, called after each training run, pass over what imports have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scans and tables beside the checkout; tests that need them are skipped where they are absent."""
    folder = Path(os.environ.get("BRAINAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder} (set BRAINAGE_TEST_DATA to its folder)")
    return folder
