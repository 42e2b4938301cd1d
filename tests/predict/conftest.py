"""Fixtures of the tests of bundles: the tiny store of the models' tests."""

from tests.models.conftest import tiny, tiny_settings

__all__ = ["tiny", "tiny_settings"]
