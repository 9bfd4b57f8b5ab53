"""Muon: momentum whose singular values are all brought near 1, for hidden matrices; what isn't one goes through Adam."""

import math
from typing import Mapping

import jax
import jax.numpy as jnp
import optax

from research.params import LAYERS, Weight, unflatten
from research.schema import OptimConfig

MOMENTUM = 0.95  # Jordan 2024 and Liu et al. 2025 alike; b1, b2 and eps belong to the Adam beside it
UPDATE_RMS = 0.2  # what Adam's updates have in practice (Liu et al. 2025, section 2.2)


def matrix_axes(weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """(stacked, input, output) dimensions of a weight seen as a stack of matrices; None where it is no matrix.

    The inputs are the declared ones. As in a matmul, what stands in front of the first of them is a stack (layers,
    experts, blocks); the rest are outputs: attention's query [layers, embed, heads, head_dim] is one embed x (heads *
    head_dim) matrix a layer. Where nothing stands behind, the front axes other than layers are the outputs.
    """
    inputs = tuple(i for i, axis in enumerate(weight.axes) if axis in weight.inputs)
    if weight.role == "vector" or not inputs:
        return None
    others = tuple(i for i in range(len(weight.axes)) if i not in inputs)
    outputs = tuple(i for i in others if i > inputs[0]) or tuple(i for i in others if weight.axes[i] != LAYERS)
    stacked = tuple(i for i in others if i not in outputs)
    return (stacked, inputs, outputs) if outputs else None


def hidden_matrices(weights: Mapping[str, Weight]) -> dict[str, optax.contrib.MuonDimensionNumbers]:
    """Path -> the axes that Muon orthogonalises, for the weights that it takes: hidden matrices, one a layer."""
    numbers = {}
    for path, weight in weights.items():
        axes = matrix_axes(weight)
        if weight.role == "hidden" and axes:
            numbers[path] = optax.contrib.MuonDimensionNumbers(reduction_axis=axes[1], output_axis=axes[2])
    return numbers


def scale_by_shape(numbers: Mapping[str, optax.contrib.MuonDimensionNumbers],
                   weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Times 0.2 * sqrt(max(fan_in, fan_out)), so that an update has the root mean square of Adam's whatever its shape."""
    flat = {path: optax.MaskedNode() for path in weights}
    for path, axes in numbers.items():
        sides = [math.prod(weights[path].shape[i] for i in side) for side in axes]
        flat[path] = UPDATE_RMS * math.sqrt(max(sides))
    factors = unflatten(flat)
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def orthogonal(weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Nesterov momentum through five Newton-Schulz steps: singular values in about [0.7, 1.2], for hidden matrices only."""
    numbers = hidden_matrices(weights)
    tree = unflatten({path: numbers[path] if path in numbers else optax.MaskedNode() for path in weights})
    return optax.contrib.scale_by_muon(beta=MOMENTUM, weight_dimension_numbers=tree)


def muon_direction(config: OptimConfig, weights: Mapping[str, Weight]) -> optax.GradientTransformation:
    """Muon for the hidden matrices, Adam for embeddings, heads and vectors, before decay and learning rate.

    Jordan 2024 (kellerjordan.github.io/posts/muon); the scale of Liu et al. 2025 (arXiv 2502.16982, equation 4), with
    which the learning rate and weight decay found for AdamW serve both groups.
    """
    numbers = hidden_matrices(weights)
    labels = unflatten({path: "muon" if path in numbers else "adam" for path in weights})
    rows = {"muon": optax.chain(orthogonal(weights), scale_by_shape(numbers, weights)),
            "adam": optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)}
    return optax.partition(rows, labels)
