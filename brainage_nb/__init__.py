"""Notebooks' helper package: from T1-weighted MRI scans and ages to an honestly evaluated brain-age model."""

__version__ = "0.1.0"
