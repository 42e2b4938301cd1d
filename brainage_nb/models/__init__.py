"""Learned: the networks, training, checkpoints, and the classic baseline."""
