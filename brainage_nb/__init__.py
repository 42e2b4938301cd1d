"""Notebooks' helper package: from T1-weighted MRI scans and ages to an honestly evaluated brain-age model."""

__version__ = "0.1.0"

import os

# Waiting threads give way to other jobs instead of spinning, which makes a training step beside a busy
# process several times as slow. OpenMP reads this once, as torch is loaded; child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
