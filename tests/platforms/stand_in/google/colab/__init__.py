"""Stands in for Colab's own module: the parts that code of ours may call, behaving as on a headless run."""
