"""Every implementation of the cross entropy against one plain float64 oracle: values and gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.cross_entropy import IMPLEMENTATIONS, cross_entropy, default_block, default_chunk, logits
from tests.jaxprs import equations


@dataclass(frozen=True)
class Case:
    rows: int = 2
    length: int = 11
    dim: int = 5
    vocab: int = 13
    logit_scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    chunk: int | None = 4
    block: int | None = 4
    magnitude: float = 1.0
    weights: str = "uneven"

    @property
    def options(self) -> dict:
        return {key: getattr(self, key) for key in ("logit_scale", "softcap", "z_loss", "chunk", "block")}


CASES = {
    "plain": Case(),
    "one token": Case(rows=1, length=1),
    "one row, odd length": Case(rows=1, length=37, chunk=8),
    "chunks that divide": Case(length=12),
    "a chunk a token": Case(length=5, chunk=1),
    "a chunk beyond the row": Case(chunk=100),
    "chunk and block by shape": Case(chunk=None, block=None, vocab=300),
    "blocks that divide": Case(vocab=16),
    "a block a word": Case(block=1),
    "one word": Case(vocab=1),
    "scale": Case(logit_scale=0.25),
    "softcap": Case(softcap=2.0, magnitude=3.0),
    "z loss": Case(z_loss=0.1),
    "scale, softcap, z loss": Case(logit_scale=0.5, softcap=3.0, z_loss=0.05, magnitude=3.0),
    "large logits": Case(magnitude=100.0),
    "no token counts": Case(weights="none"),
    "a row of padding": Case(weights="last row off"),
}
TABLE = [(name, implementation) for name in CASES for implementation in IMPLEMENTATIONS]


def arguments(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(what has gradients, targets, weights). Where the weight is 0 the target is out of the vocabulary."""
    random = np.random.default_rng(0)
    arrays = {
        "hidden": random.normal(size=(case.rows, case.length, case.dim)).astype(np.float32) * case.magnitude,
        "unembedding": random.normal(size=(case.dim, case.vocab)).astype(np.float32),
    }
    targets = random.integers(case.vocab, size=(case.rows, case.length)).astype(np.int32)
    weights = (random.random(targets.shape) * (random.random(targets.shape) > 0.3)).astype(np.float32)
    weights[:, 0] = 0.5
    if case.weights == "none":
        weights[:] = 0
    if case.weights == "last row off":
        weights[-1] = 0
    outside = np.where(np.arange(case.length) % 2, -100, case.vocab)  # also where the last block is filled up
    return arrays, np.where(weights == 0, outside, targets).astype(np.int32), weights


def oracle(arrays: dict, targets: np.ndarray, weights: np.ndarray, case: Case):
    """By the definition, with one-hot targets. Runs in the dtype of its input."""
    z = case.logit_scale * jnp.einsum("bld,dv->blv", arrays["hidden"], arrays["unembedding"])
    if case.softcap is not None:
        z = case.softcap * jnp.tanh(z / case.softcap)
    highest = jax.lax.stop_gradient(z.max(-1, keepdims=True))
    lse = highest[..., 0] + jnp.log(jnp.exp(z - highest).sum(-1))
    one_hot = np.zeros(z.shape)
    for b, l in np.argwhere((targets >= 0) & (targets < z.shape[-1])):
        one_hot[b, l, targets[b, l]] = 1
    nll = lse - jnp.einsum("blv,blv->bl", z, one_hot)
    return (weights * (nll + case.z_loss * lse**2)).sum(), nll


@functools.cache
def oracle_of(name: str):
    """Computed once, shared by the implementations."""
    arrays, targets, weights = arguments(CASES[name])
    with jax.enable_x64(True):
        in_64 = {key: jnp.asarray(x, jnp.float64) for key, x in arrays.items()}
        return values_and_gradients(lambda a: oracle(a, targets, weights, CASES[name]), in_64)


def run(arrays: dict, targets, weights, case: Case, implementation: str | None):
    hidden, unembedding = arrays["hidden"], arrays["unembedding"]
    return cross_entropy(hidden, unembedding, targets, weights, implementation=implementation, **case.options)


def values_and_gradients(fn, arrays: dict):
    """((loss_sum, the other results), gradients of 1.5 * loss_sum)."""

    def scaled(arrays):
        loss_sum, *others = fn(arrays)
        return 1.5 * loss_sum, (loss_sum, *others)

    (_, results), gradients = jax.jit(jax.value_and_grad(scaled, has_aux=True))(arrays)
    return jax.tree.map(np.asarray, (results, gradients))


@pytest.mark.parametrize("name, implementation", TABLE)
def test_matches_the_oracle(name, implementation):
    case = CASES[name]
    arrays, targets, weights = arguments(case)
    (total, nll), expected = oracle_of(name)
    assert total.dtype == np.float64
    (loss_sum, nll_BxL, correct_BxL), gradients = values_and_gradients(
        lambda a: run(a, targets, weights, case, implementation), arrays
    )
    assert (loss_sum.dtype, nll_BxL.dtype, correct_BxL.dtype) == (np.float32, np.float32, np.bool_)
    size = max(1.0, np.abs(nll).max())
    np.testing.assert_allclose(loss_sum, total, rtol=2e-5, atol=1e-5 * size)
    np.testing.assert_allclose(nll_BxL, nll, rtol=2e-5, atol=1e-5 * size)
    for key, gradient in gradients.items():
        size = max(1.0, np.abs(expected[key]).max())
        np.testing.assert_allclose(gradient / size, expected[key] / size, rtol=2e-5, atol=1e-5, err_msg=key)
    best = np.argmax(logits(arrays["hidden"], arrays["unembedding"], case.logit_scale, case.softcap), axis=-1)
    np.testing.assert_array_equal(correct_BxL, best == targets)


@pytest.mark.parametrize("name, implementation", TABLE)
def test_forward_alone_gives_the_same(name, implementation):
    """The path of evaluation is other code than the one that is differentiated."""
    arrays, targets, weights = arguments(CASES[name])
    fn = lambda a: run(a, targets, weights, CASES[name], implementation)
    results, _ = values_and_gradients(fn, arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.jit(fn)(arrays), results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_loss_has_a_gradient(implementation):
    arrays, targets, weights = arguments(CASES["plain"])
    in_nll = jax.grad(lambda a: run(a, targets, weights, CASES["plain"], implementation)[1].sum())(arrays)
    in_weights = jax.grad(lambda w: run(arrays, targets, w, CASES["plain"], implementation)[0])(weights)
    for leaf in jax.tree.leaves((in_nll, in_weights)):
        assert (np.asarray(leaf) == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_as_near_as_the_reference(implementation):
    case = Case(rows=2, length=64, dim=16, vocab=40, chunk=8, z_loss=1e-3)
    arrays, targets, weights = arguments(case)
    rounded = {key: jnp.asarray(x, jnp.bfloat16) for key, x in arrays.items()}
    exact = {key: x.astype(jnp.float32) for key, x in rounded.items()}
    true = values_and_gradients(lambda a: run(a, targets, weights, case, "reference"), exact)
    base = values_and_gradients(lambda a: run(a, targets, weights, case, "reference"), rounded)
    got = values_and_gradients(lambda a: run(a, targets, weights, case, implementation), rounded)
    assert got[0][0].dtype == np.float32 and got[1]["unembedding"].dtype == jnp.bfloat16

    def error(a, b):
        a, b = np.float32(a), np.float32(b)
        return float(np.abs(a - b).max() / np.abs(b).max())

    assert error(got[0][0], true[0][0]) < 1e-4  # products of bfloat16 are exact in float32
    for key in arrays:
        assert error(got[1][key], true[1][key]) <= 1.5 * error(base[1][key], true[1][key]) + 2**-8, key


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_parameters_get_float32_gradients(implementation):
    """Summed over 256 chunks: in bfloat16 the sum would stall long before."""
    L, D, V = 256, 4, 3
    hidden = jnp.ones((1, L, D), jnp.bfloat16)
    unembedding = jnp.zeros((D, V), jnp.float32)
    fn = lambda w: cross_entropy(
        hidden, w, jnp.zeros((1, L), jnp.int32), jnp.ones((1, L)), chunk=1, implementation=implementation
    )[0]
    gradient = jax.grad(fn)(unembedding)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, np.tile([[-2 / 3, 1 / 3, 1 / 3]], (D, 1)) * L, rtol=2**-8)


def assert_shards_are_the_whole(case: Case, axes, tokens, unembedding, check_vma: bool, **options) -> None:
    """On 2 x 2 devices, tokens and unembedding split by these specs: values and gradients of the reference on one."""
    arrays, targets, weights = arguments(case)
    mesh = jax.make_mesh((2, 2), axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def own(hidden, unembedding, targets, weights):
        loss_sum, nll, correct = cross_entropy(hidden, unembedding, targets, weights, **options, **case.options)
        return loss_sum[None, None], nll, correct

    def everywhere(arrays):
        loss_PxQ, nll, correct = jax.shard_map(
            own, mesh=mesh, in_specs=(tokens, unembedding, tokens, tokens), out_specs=tokens, check_vma=check_vma
        )(arrays["hidden"], arrays["unembedding"], targets, weights)
        return loss_PxQ.sum(), nll, correct

    expected = values_and_gradients(lambda a: run(a, targets, weights, case, "reference"), arrays)
    got = values_and_gradients(everywhere, arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map(implementation, check_vma, devices):
    """Rows and columns split over four devices, the unembedding whole on each: its gradient is their sum."""
    case = Case(rows=4, length=10, chunk=2, softcap=4.0, z_loss=0.1)
    assert_shards_are_the_whole(
        case, ("data", "context"), jax.P("data", "context"), jax.P(), check_vma, implementation=implementation)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("vocab, block", [(13, 4), (16, 8), (13, None)])
def test_a_split_unembedding(check_vma, vocab, block, devices):
    """Rows split over both axes, the unembedding over one: gathered and scattered there by blocks, summed over the other."""
    case = Case(rows=4, length=10, dim=6, vocab=vocab, block=block, softcap=4.0, z_loss=0.1)
    assert_shards_are_the_whole(
        case, ("data", "fsdp"), jax.P(("data", "fsdp")), jax.P("fsdp"), check_vma, split_over=("fsdp",))


def program(implementation: str, differentiate: bool, length: int = 60) -> list:
    case = Case(rows=3, length=length, dim=2, vocab=50, chunk=4, softcap=5.0, z_loss=0.1)
    arrays, targets, weights = arguments(case)
    fn = lambda a: run(a, targets, weights, case, implementation)[0]
    return list(equations(jax.make_jaxpr(jax.grad(fn) if differentiate else fn)(arrays).jaxpr))


@pytest.mark.parametrize("differentiate, matmuls", [(False, 1), (True, 3)])
def test_chunked_never_holds_the_logits(differentiate, matmuls):
    """No value is larger than a chunk's logits, forward or backward; three products, one if no gradients."""
    found = program("chunked", differentiate)
    assert max(int(np.prod(v.aval.shape)) for eqn in found for v in eqn.outvars) == 3 * 4 * 50
    assert sum(eqn.primitive.name == "dot_general" for eqn in found) == matmuls
    whole = program("reference", differentiate)  # the measure sees what it should
    assert max(int(np.prod(v.aval.shape)) for eqn in whole for v in eqn.outvars) == 3 * 60 * 50
    assert len(found) == len(program("chunked", differentiate, length=240))


@pytest.mark.parametrize("differentiate, matmuls", [(False, 1), (True, 4)])
def test_blocked_never_holds_the_logits(differentiate, matmuls):
    """As above, for a block of words: nothing of tokens x words is larger than 4 words for each token, whatever V is."""
    found = program("blocked", differentiate)
    assert max(int(np.prod(v.aval.shape)) for eqn in found for v in eqn.outvars) == 3 * 60 * 4
    assert sum(eqn.primitive.name == "dot_general" for eqn in found) == matmuls


def test_default_block():
    table = {  # (tokens, vocabulary): words
        (4096, 128_256): 8064,  # 16 blocks
        (4096, 128): 128,
        (8192, 32_000): 4096,  # 8 blocks, 768 words filled up
        (2**20, 50_257): 1024,
        (10, 50): 50,
    }
    assert {key: default_block(*key) for key in table} == table


def test_default_chunk():
    table = {  # (rows, length, vocabulary): tokens of a row
        (1, 4096, 32_000): 1024,
        (8, 4096, 32_000): 128,
        (8, 4096, 262_144): 64,
        (4096, 128, 32_000): 1,
        (2, 100, 1000): 100,
        (1, 1025, 1000): 513,  # two even chunks, not one of 1024 and one of 1
    }
    assert {key: default_chunk(*key) for key in table} == table


def test_logits_of_any_leading_axes():
    arrays, *_ = arguments(CASES["plain"])
    hidden, unembedding = jnp.asarray(arrays["hidden"], jnp.bfloat16), arrays["unembedding"]
    whole = logits(hidden, unembedding, 0.5, 3.0)
    assert whole.dtype == jnp.float32 and whole.shape == (2, 11, 13)
    np.testing.assert_allclose(logits(hidden[0, 0], unembedding, 0.5, 3.0), whole[0, 0], rtol=1e-5)
    exact = np.float64(hidden) @ np.float64(jnp.asarray(unembedding, jnp.bfloat16))
    np.testing.assert_allclose(whole, 3 * np.tanh(0.5 * exact / 3), rtol=1e-5, atol=1e-6)


BAD = {
    "no such implementation": (dict(implementation="fused"), "reference, chunked, blocked"),
    "chunk 0": (dict(chunk=0), "chunk 0"),
    "block 0": (dict(block=0), "block 0"),
    "softcap 0": (dict(softcap=0.0), "softcap"),
    "weights of other length": (dict(weights_BxL=np.ones((2, 3))), "aren't BxLxD"),
    "width of another model": (dict(unembedding_DxV=np.ones((7, 13))), "aren't BxLxD"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    change, words = BAD[name]
    arrays, targets, weights = arguments(CASES["plain"])
    good = dict(
        hidden_BxLxD=arrays["hidden"],
        unembedding_DxV=arrays["unembedding"],
        targets_BxL=targets,
        weights_BxL=weights,
    )
    with pytest.raises(ValueError, match=words) as caught:
        cross_entropy(**{**good, **change})
    assert "\n" not in str(caught.value)
