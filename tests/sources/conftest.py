"""Fixtures of the sources' tests."""

from tests.sources.loopback import loopback

__all__ = ["loopback"]
