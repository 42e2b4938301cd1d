"""Fixtures of the cohort's tests."""

from tests.sources.loopback import loopback

__all__ = ["loopback"]
