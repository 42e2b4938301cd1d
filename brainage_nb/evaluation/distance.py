"""How unlike the training scans a new scan is, from numbers that describe scans; says nothing about how wrong
a prediction is."""

from __future__ import annotations

from typing import Any

import numpy as np


class DistanceFromTraining:
    """How unlike the training scans a scan is: Mahalanobis distance of numbers that describe it.

    Give it image statistics or penultimate features, a row a scan. More than 20 numbers a scan are first
    reduced to their leading principal components; the covariance is shrunk (Ledoit & Wolf 2004).

    Attributes
    ----------
    limit_ : float
        Distance that 99 % of unseen training-like scans stay below, from five-fold distances of the training
        scans.
    """

    components = 20

    def fit(self, features: np.ndarray) -> DistanceFromTraining:
        """Learn from training scans: array (n_scans, n_features), at least 20 scans."""
        features = np.asarray(features, dtype=float)
        if features.ndim != 2 or len(features) < 20:
            raise ValueError(f"features {features.shape}: give a row a scan, for at least 20 training scans.")
        fold = np.random.default_rng(0).permutation(len(features)) % 5
        unseen = np.empty(len(features))
        for k in range(5):
            unseen[fold == k] = self._learn(features[fold != k]).distance(features[fold == k])
        self._learn(features)
        self.limit_ = float(np.quantile(unseen, 0.99))
        return self

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Distance (n,) of each scan from the middle of the training scans, in their standard deviations."""
        scaled = (np.asarray(features, dtype=float) - self.mean_) / self.scale_
        return np.sqrt((((scaled @ self.axes_) @ self.whiten_) ** 2).sum(axis=1) / self.whiten_.shape[1])

    def warnings(self, features: np.ndarray, what: str = "image statistics") -> list[str]:
        """A sentence where scans lie beyond `limit_`."""
        far = self.distance(features) > self.limit_
        if not far.any():
            return []
        return [
            f"{int(far.sum())} of {len(far)} scans are further from the training scans (by {what}) than 99 % "
            "of scans like those would be; expect larger errors there."
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything `from_dict` needs, as plain JSON values."""
        arrays = {name: getattr(self, f"{name}_").tolist() for name in ("mean", "scale", "axes", "whiten")}
        return arrays | {"limit": self.limit_}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> DistanceFromTraining:
        """A fitted distance from `to_dict` (values may be arrays); refuses what does not fit together."""
        self = cls()
        for name in ("mean", "scale", "axes", "whiten"):
            setattr(self, f"{name}_", np.asarray(content[name], dtype=float))
        self.limit_ = float(content["limit"])
        arrays = (self.mean_, self.scale_, self.axes_, self.whiten_)
        shapes = [array.shape for array in arrays]
        n, k = shapes[2] if len(shapes[2]) == 2 else (0, 0)
        if not k or shapes != [(n,), (n,), (n, k), (k, k)]:
            raise ValueError(f"a distance has arrays {shapes}; expected (n,), (n,), (n, k), (k, k)")
        finite = all(np.isfinite(array).all() for array in arrays)
        if not (finite and (self.scale_ > 0).all() and 0 < self.limit_ < np.inf):
            raise ValueError("a distance holds values that are not finite or not positive")
        return self

    def _learn(self, features: np.ndarray) -> DistanceFromTraining:
        from sklearn.covariance import ledoit_wolf

        self.mean_, spread = features.mean(axis=0), features.std(axis=0)
        self.scale_ = np.where(spread > 0, spread, 1.0)
        scaled = (features - self.mean_) / self.scale_
        k = min(self.components, scaled.shape[1], len(scaled) // 4)
        self.axes_ = np.linalg.svd(scaled, full_matrices=False)[2][:k].T
        values, vectors = np.linalg.eigh(ledoit_wolf(scaled @ self.axes_, assume_centered=True)[0])
        self.whiten_ = vectors / np.sqrt(np.maximum(values, 1e-9))
        return self
