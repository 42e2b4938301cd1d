"""Participants tables of any kind to rows with ages in years."""
