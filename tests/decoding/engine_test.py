"""Generation: steps = a full forward, batches = single prompts, samplers, stopping, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.config import override
from research.decoding.engine import Engine
from research.decoding.sampling import Sampling, filtered, sample
from research.errors import InputError
from research.models.context import one_document
from research.models.lm import LanguageModel
from tests.training.common import small

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]


@functools.cache
def model_and_params():
    config = override(small(), {"model.stages.0.pattern.0.window": 6})
    model = LanguageModel(config.model)
    # Large weights: the logits must be far apart, or greedy ties would decide the test.
    return model, jax.tree.map(lambda x: 3.0 * x, model.init(jax.random.key(0)))


def continue_by_full_forward(prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy continuation without any state: the oracle. Rows are padded to one length, so that it compiles once."""
    model, params = model_and_params()

    @jax.jit
    def logprobs(tokens_1xL):
        ctx = one_document(1, tokens_1xL.shape[1])
        hidden, _, _ = model.hidden(params, tokens_1xL, ctx)
        return jax.nn.log_softmax(hidden @ model.unembedding(params))

    tokens, found = list(prompt), []
    for _ in range(count):
        row = np.zeros((1, 32), np.int32)
        row[0, :len(tokens)] = tokens
        at = np.asarray(logprobs(row))[0, len(tokens) - 1]
        tokens.append(int(at.argmax()))
        found.append(float(at.max()))
    return tokens[len(prompt):], found


def test_greedy_steps_equal_the_full_forward_for_prompts_of_any_length():
    model, params = model_and_params()
    generated = Engine(model, GREEDY).generate(params, PROMPTS, 12, jax.random.key(0))
    for prompt, tokens, logprobs in zip(PROMPTS, generated.token_ids, generated.logprobs):
        expected, expected_logprobs = continue_by_full_forward(prompt, 12)
        assert tokens == expected
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)


def test_a_row_stops_at_the_end_token_and_the_others_go_on():
    model, params = model_and_params()
    free = Engine(model, GREEDY).generate(params, PROMPTS, 12, jax.random.key(0)).token_ids
    end = free[0][4]
    stopped = Engine(model, GREEDY, eos_id=end).generate(params, PROMPTS, 12, jax.random.key(0)).token_ids
    for tokens, whole in zip(stopped, free):
        expected = whole[:whole.index(end) + 1] if end in whole else whole
        assert tokens == expected
    assert len(stopped[0]) <= 5


def test_sampling_is_decided_by_the_seed():
    model, params = model_and_params()
    engine = Engine(model, Sampling(temperature=1.5))
    first, again, other = (engine.generate(params, PROMPTS, 10, jax.random.key(s)).token_ids for s in (1, 1, 2))
    assert first == again and first != other


def test_filters_keep_what_they_say():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    kept = lambda sampling: np.isfinite(np.asarray(filtered(logits, sampling))).tolist()
    assert kept(Sampling(top_k=2)) == [[True, True, False, False], [False, False, True, True]]
    assert kept(Sampling(top_p=0.6)) == [[True, True, False, False], [False, False, True, True]]
    assert kept(Sampling(top_p=1e-6)) == [[True, False, False, False], [False, False, False, True]]
    assert kept(Sampling(top_p=1.0)) == [[True] * 4] * 2
    np.testing.assert_allclose(filtered(logits, Sampling(temperature=2.0)), logits / 2, rtol=1e-6)


def test_sampled_frequencies_follow_the_distribution():
    logits_BxV = jnp.broadcast_to(jnp.log(jnp.array([0.6, 0.3, 0.1])), (20000, 3))
    tokens, logprobs = sample(logits_BxV, jax.random.key(0), Sampling())
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / 20000, [0.6, 0.3, 0.1], atol=0.015)
    np.testing.assert_allclose(logprobs, np.log([0.6, 0.3, 0.1])[np.asarray(tokens)], rtol=1e-5)
    greedy, _ = sample(logits_BxV[:2], jax.random.key(0), GREEDY)
    assert greedy.tolist() == [0, 0]


@pytest.mark.parametrize("prompts,new,message", [
    ([[]], 4, "prompt: is empty"),
    ([[1], []], 4, "prompt: is empty"),
    ([[1, 40]], 4, "prompt_ids: 40 is outside the vocabulary of 40"),
    ([[-1]], 4, "prompt_ids: -1 is outside"),
    ([[1]], 0, "max_new_tokens: is 0"),
    ([[1] * 100], 100, "max_new_tokens: 100 prompt . 100 new tokens are above model.max_len=128"),
])
def test_bad_input(prompts, new, message):
    model, params = model_and_params()
    with pytest.raises(InputError, match=message):
        Engine(model, GREEDY).generate(params, prompts, new, jax.random.key(0))
