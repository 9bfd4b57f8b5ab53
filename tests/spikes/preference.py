"""A spike of preference objectives: a reward head (Bradley-Terry, as Ouyang et al. 2022) and a frozen reference policy (DPO,
Rafailov et al. 2023) in one loss, through the same contract as next-token prediction.

Rows are pairs: the even ones chosen, the odd ones rejected; a pair counts if both of its rows hold a counted token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from research.models import heads
from research.models.lm import LanguageModel
from research.schema import Config
from research.training.objectives import OBJECTIVES, Batch, Loss, Objective, row_context

BETA = 0.1


def make(model: LanguageModel, config: Config):
    def row_logprob(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden_BxLxD, _, _ = model.hidden(params, batch["tokens_BxL"], row_context(batch, False, True, None))
        logits_BxLxV = hidden_BxLxD @ model.unembedding(params)
        logprob_BxLxV = jax.nn.log_softmax(logits_BxLxV.astype(jnp.float32))
        chosen_BxL = jnp.take_along_axis(logprob_BxLxV, batch["targets_BxL"][..., None], axis=-1)[..., 0]
        return jnp.sum(chosen_BxL * batch["weights_BxL"], axis=1), hidden_BxLxD

    def loss(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        policy_B, hidden_BxLxD = row_logprob(trainable, batch)
        reference_B, _ = row_logprob(frozen, batch)
        reward_BxL = heads.scalar(trainable, "reward", hidden_BxLxD)
        weights_BxL = batch["weights_BxL"]
        reward_B = jnp.sum(reward_BxL * weights_BxL, axis=1) / jnp.maximum(jnp.sum(weights_BxL, axis=1), 1.0)
        counted_B = (jnp.sum(weights_BxL, axis=1) > 0).astype(jnp.float32)
        pair_P = counted_B[0::2] * counted_B[1::2]
        margin_P = BETA * ((policy_B - reference_B)[0::2] - (policy_B - reference_B)[1::2])
        preference_P = -jax.nn.log_sigmoid(margin_P) - jax.nn.log_sigmoid(reward_B[0::2] - reward_B[1::2])
        weight = jnp.sum(pair_P)
        metrics = {"margin": (jnp.sum(pair_P * margin_P), weight)}
        return jnp.sum(pair_P * preference_P), weight, metrics, {}

    return loss


OBJECTIVES["preference"] = Objective(heads=("reward",), make=make)
