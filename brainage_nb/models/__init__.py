"""Learned: networks, training, checkpoints, the classic baseline, bundles and explanations."""
