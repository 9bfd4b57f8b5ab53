"""Generation: one prefill over the padded prompts, then jitted steps until every row has ended."""

import dataclasses
import functools
from typing import Mapping, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels.cross_entropy import logits as make_logits
from research.decoding.sampling import Sampling, sample
from research.errors import InputError
from research.models.context import Context
from research.models.lm import LanguageModel

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple, so that few lengths are ever compiled


class Generated(NamedTuple):
    """Per prompt: the new token ids (the end token included where it came) and their log-probabilities."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Engine:
    """Generates from `model`; one compiled function for each (batch, padded prompt, new tokens, sampling).

    `eos_id`: the token that ends a row; several, where any of them does.
    """

    model: LanguageModel
    sampling: Sampling
    eos_id: int | tuple[int, ...] | None = None

    def generate(self, params: Mapping, prompts: Sequence[Sequence[int]], max_new_tokens: int, key: jax.Array) -> Generated:
        """Continues each prompt by at most `max_new_tokens`.

        Raises:
          InputError: an empty prompt, an id outside the vocabulary, or more tokens than learned positions allow.
        """
        cfg = self.model.cfg
        longest = max(map(len, prompts), default=0)
        if not longest or not all(prompts):
            raise InputError("prompt", "is empty", "give at least one token")
        bad = [token for prompt in prompts for token in prompt if not 0 <= token < cfg.vocab_size]
        if bad:
            raise InputError("prompt_ids", f"{bad[0]} is outside the vocabulary of {cfg.vocab_size}", "use the run's tokenizer")
        if max_new_tokens < 1:
            raise InputError("max_new_tokens", f"is {max_new_tokens}", "ask for at least 1")
        if longest + max_new_tokens > cfg.max_len:
            raise InputError("max_new_tokens", f"{longest} prompt + {max_new_tokens} new tokens are above "
                             f"model.max_len={cfg.max_len}", "ask for fewer or shorten the prompt")
        padded = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        tokens_BxL = np.zeros((len(prompts), padded), np.int32)
        length_B = np.array([len(prompt) for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BxL[row, :len(prompt)] = prompt
        tokens_BxT, logprobs_BxT, count_B = jax.device_get(
            self._run(params, jnp.asarray(tokens_BxL), jnp.asarray(length_B), key, max_new_tokens))
        return Generated([t[:n].tolist() for t, n in zip(tokens_BxT, count_B)],
                         [p[:n].tolist() for p, n in zip(logprobs_BxT, count_B)])

    @functools.partial(jax.jit, static_argnums=(0, 5))
    def _run(self, params: Mapping, tokens_BxL: jax.Array, length_B: jax.Array, key: jax.Array, new_tokens: int):
        model = self.model
        batch, length = tokens_BxL.shape
        unembedding_DxV = model.unembedding(params)

        def next_token(hidden_BxD: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits_BxV = make_logits(hidden_BxD[:, None], unembedding_DxV, logit_scale=model.cfg.scales.logits)[:, 0]
            return sample(logits_BxV, jax.random.fold_in(key, step), self.sampling)

        positions_BxL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        segments_BxL = (positions_BxL < length_B[:, None]).astype(jnp.int32)
        state = model.init_state(batch, length + new_tokens)
        hidden_BxLxD, state, _ = model.hidden(params, tokens_BxL, Context(positions_BxL, segments_BxL), state)
        last_BxD = jnp.take_along_axis(hidden_BxLxD, (length_B - 1)[:, None, None], axis=1)[:, 0]
        token_B, logprob_B = next_token(last_BxD, jnp.int32(0))
        tokens_BxT = jnp.zeros((batch, new_tokens), jnp.int32).at[:, 0].set(token_B)
        logprobs_BxT = jnp.zeros((batch, new_tokens), jnp.float32).at[:, 0].set(logprob_B)
        ends = () if self.eos_id is None else self.eos_id

        def ended(token_B: jax.Array) -> jax.Array:
            return jnp.isin(token_B, jnp.array(ends, jnp.int32))

        def unfinished(carry):
            step, _, done_B, *_ = carry
            return (step < new_tokens) & ~jnp.all(done_B)

        def decode(carry):
            step, token_B, done_B, count_B, tokens_BxT, logprobs_BxT, state = carry
            # A row that has ended is fed padding: its state stays as it is.
            ctx = Context((length_B + step - 1)[:, None], jnp.where(done_B, 0, 1)[:, None])
            hidden_Bx1xD, state, _ = model.hidden(params, token_B[:, None], ctx, state)
            token_B, logprob_B = next_token(hidden_Bx1xD[:, 0], step)
            tokens_BxT, logprobs_BxT = tokens_BxT.at[:, step].set(token_B), logprobs_BxT.at[:, step].set(logprob_B)
            return step + 1, token_B, done_B | ended(token_B), count_B + ~done_B, tokens_BxT, logprobs_BxT, state

        start = (jnp.int32(1), token_B, ended(token_B), jnp.ones((batch,), jnp.int32), tokens_BxT, logprobs_BxT, state)
        _, _, _, count_B, tokens_BxT, logprobs_BxT, _ = jax.lax.while_loop(unfinished, decode, start)
        return tokens_BxT, logprobs_BxT, count_B
