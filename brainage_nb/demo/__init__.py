"""Heads with planted ageing, whose answers are known."""
