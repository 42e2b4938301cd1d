"""The short list of names at the top of the package."""

import subprocess
import sys

import pytest

import brainage_nb


@pytest.mark.parametrize("name", brainage_nb.__all__)
def test_every_public_name_is_there(name):
    assert callable(getattr(brainage_nb, name))
    assert name in dir(brainage_nb)


def test_an_unknown_name_is_refused_with_the_public_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'load_bundel'.*load_bundle"):
        _ = brainage_nb.load_bundel


def test_importing_the_package_loads_nothing_heavy():
    check = "import sys, brainage_nb; print([m for m in ('numpy', 'torch', 'pandas') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
