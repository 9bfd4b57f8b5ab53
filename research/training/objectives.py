"""What is minimised. One table; the same loop, checkpoints and metrics serve every row.

    objective.loss(trainable, frozen, batch, key) -> (loss_sum, weight, metrics, statistics)

Pure. `loss_sum / weight`, each summed over microbatches and devices first, is the loss, so accumulation is exact however the
counted tokens are spread. `metrics`: name -> (sum, weight), reported as their quotient. `frozen` holds what isn't
trained (a reference policy, a teacher, the base under an adapter). `statistics` is for weights that don't learn by gradient
(`LanguageModel.apply_statistics`), summed like the rest.
"""

from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp

from research.config import nearest
from research.errors import InputError
from research.models.context import Context
from research.models.heads import token_loss
from research.models.lm import LanguageModel, read_aux
from research.schema import Config

Batch = Mapping[str, jax.Array]
Loss = tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]], dict[str, jax.Array]]


class Objective(NamedTuple):
    """`heads`: what it needs besides the unembedding. `make(model, config)` returns the loss function."""

    heads: tuple[str, ...]
    make: Callable[[LanguageModel, Config], Callable[[Any, Any, Batch, jax.Array], Loss]]


def row_context(batch: Batch, packed: bool, deterministic: bool, key: jax.Array | None, mask_kind: str = "causal") -> Context:
    """The context of a batch of rows as the data pipeline makes them."""
    return Context(batch["positions_BxL"], batch["segment_ids_BxL"], mask_kind=mask_kind, packed=packed,
                   deterministic=deterministic, key=key)


def next_token(model: LanguageModel, config: Config) -> Callable[[Any, Any, Batch, jax.Array], Loss]:
    """Cross-entropy of the next token within each document, in nats, with the z-loss of PaLM where it is asked for."""

    def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        ctx = row_context(batch, config.data.packed, model.cfg.dropout == 0.0, key)
        hidden_BxLxD, _, aux = model.hidden(params, batch["tokens_BxL"], ctx)
        weights_BxL = batch["weights_BxL"]
        loss_sum, nll_BxL, correct_BxL = token_loss(
            model.cfg, hidden_BxLxD, model.unembedding(params), batch["targets_BxL"], weights_BxL, config.optim.z_loss)
        weight = jnp.sum(weights_BxL)
        auxiliary_loss, aux_metrics, statistics = read_aux(aux)
        metrics = {
            "loss": (jnp.sum(weights_BxL * nll_BxL), weight),
            "accuracy": (jnp.sum(weights_BxL * correct_BxL), weight),
            **row_moments(nll_BxL, weights_BxL),
            **{name: (value * weight, weight) for name, value in aux_metrics.items()},
        }
        return loss_sum + auxiliary_loss * weight, weight, metrics, statistics

    return loss


def row_moments(nll_BxL: jax.Array, weights_BxL: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Mean and mean square of the rows' losses: the standard error of a batch's loss, with rows as the unit."""
    count_B = jnp.sum(weights_BxL, axis=1)
    row_B = jnp.sum(weights_BxL * nll_BxL, axis=1) / jnp.maximum(count_B, 1.0)
    rows = jnp.sum(count_B > 0).astype(jnp.float32)
    return {"row_loss": (jnp.sum(row_B), rows), "row_loss_squared": (jnp.sum(jnp.square(row_B)), rows)}


OBJECTIVES: dict[str, Objective] = {
    "next_token": Objective(heads=(), make=next_token),
}


def objective_named(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise InputError("train.objective", f"unknown {name!r}", nearest(name, list(OBJECTIVES)))
    return OBJECTIVES[name]
