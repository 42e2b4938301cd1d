"""Fixtures of the cohort's tests."""

from tests.cohort.loopback import loopback

__all__ = ["loopback"]
