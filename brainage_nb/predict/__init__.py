"""Trained models as bundles, and what they say of one scan."""
