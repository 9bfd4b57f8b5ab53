"""Holds a mixer to a float64 oracle that knows one document alone: values, and gradients of the input and every weight."""

from __future__ import annotations

import numpy as np

from research.config import MixerConfig
from research.models.context import Context
from research.params import flatten, unflatten
from tests.kernels.recurrences import MANY, Document, Problem, check
from tests.models.harness import DIM, apply, make_params, random


def check_mixer(cfg: MixerConfig, document: Document, tolerance: float = 2e-5) -> None:
    """document({"x": x_LxD}, {weight name: array}, None) -> (y_LxD, {})."""

    def kernel(tokens, weights, state, positions_BxL, segment_ids_BxL):
        y_BxLxD, _, _ = apply(cfg, unflatten(weights), tokens["x"], Context(positions_BxL, segment_ids_BxL))
        return y_BxLxD, {}

    weights = {path: np.asarray(x) for path, x in flatten(make_params(cfg)).items()}
    tokens = {"x": random(*MANY.segment_ids_BxL.shape, DIM)}
    check(kernel, document, Problem(tokens, weights, {}, MANY, continues=False), tolerance)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def shifted(x_LxD: np.ndarray) -> np.ndarray:
    """The token before; nothing before the first."""
    return np.concatenate([np.zeros_like(x_LxD[:1]), x_LxD[:-1]])
