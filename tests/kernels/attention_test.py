"""Every implementation of attention against one plain float64 oracle: values and gradients."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import attention as module
from kernels import attention_blocks, attention_triton
from kernels.attention import IMPLEMENTATIONS, attention
from tests.jaxprs import equations


@dataclass(frozen=True)
class Case:
    """One row of the battery. Segments: one string a row, a digit a token; no k_segments: self attention."""

    q_segments: tuple[str, ...]
    k_segments: tuple[str, ...] | None = None
    heads: int = 2
    groups: int = 2
    mask_kind: str = "causal"
    window: int | None = None
    alibi: bool = False
    softcap: float | None = None
    magnitude: float = 1.0
    head_dim: int = 4
    value_dim: int = 4
    q_from: int = 0  # position of the first query, for decoding

    @property
    def keys(self) -> tuple[str, ...]:
        return self.k_segments or self.q_segments


LONG = "1" * 21 + "2" * 9 + "3" * 1 + "4" * 10  # 41 tokens: three chunks of 16, the last one partly filled
PADDED = ("1112222200000", "1110002220044", "0000000000000")

CASES = {
    "mha": Case((LONG,)),
    "gqa": Case((LONG,), heads=6, groups=2),
    "mqa": Case((LONG, LONG[::-1]), heads=4, groups=1),
    "one token": Case(("1",)),
    "exactly one chunk": Case(("1" * 16,)),
    "exactly two chunks": Case(("1" * 32,)),
    "wide values": Case((LONG,), head_dim=3, value_dim=5),
    "every token its own": Case(("123456789",)),
    "padding": Case(PADDED),
    "padding, gqa, bidirectional": Case(PADDED, heads=4, mask_kind="bidirectional"),
    "window 1": Case((LONG,), window=1),
    "window 5": Case((LONG,), window=5),
    "window 5, bidirectional": Case((LONG,), window=5, mask_kind="bidirectional"),
    "window beyond the row": Case((LONG,), window=1000),
    "bidirectional": Case((LONG,), mask_kind="bidirectional"),
    "prefix": Case(PADDED[:2] + (LONG[:13],), mask_kind="prefix"),
    "prefix, window": Case((LONG,), mask_kind="prefix", window=7),
    "alibi": Case((LONG,), heads=4, alibi=True),
    "alibi, bidirectional": Case((LONG,), alibi=True, mask_kind="bidirectional"),
    "alibi, prefix": Case((LONG,), alibi=True, mask_kind="prefix"),
    "softcap": Case((LONG,), softcap=2.0, magnitude=3.0),
    "softcap, alibi, window, gqa": Case(PADDED, heads=4, softcap=1.5, alibi=True, window=3),
    "large scores": Case((LONG,), magnitude=40.0),
    "decode": Case(("1", "1"), ("1" * 20 + "0" * 21, "1" * 41), heads=4, q_from=19),
    "a few queries, of everything": Case(("11110",) * 2, ("1" * 30 + "0" * 11, "2" * 9 + "1" * 32), heads=4, groups=1,
                                         alibi=True, window=12, softcap=2.0, head_dim=3, value_dim=5, q_from=9),
    "decode, prefix": Case(("111",), ("1" * 40,), heads=8, groups=8, mask_kind="prefix", q_from=7),
    "decode, cache with empty slots": Case(("1", "1"), ("1111111000", "1111111111"), q_from=6),
    "prefill on a cache": Case(("11110",), ("1111111110000",), heads=4, q_from=5),
    "cross": Case(("1" * 20, "1122200" + "0" * 13), ("1111110", "1222200"), mask_kind="bidirectional"),
    "cross, empty memory": Case(("111",), ("0000",), mask_kind="bidirectional"),
}


def positions(segments: tuple[str, ...]) -> np.ndarray:
    """From 0 in each document."""
    rows = []
    for row in segments:
        here = []
        for index, segment in enumerate(row):
            here.append(here[-1] + 1 if index and row[index - 1] == segment else 0)
        rows.append(here)
    return np.array(rows, np.int32)


def arguments(case: Case) -> tuple[dict[str, np.ndarray], dict]:
    """(what has gradients, float32; the rest)."""
    random = np.random.default_rng(0)
    rows, L, S = len(case.q_segments), len(case.q_segments[0]), len(case.keys[0])
    arrays = {
        "q": random.normal(size=(rows, L, case.heads, case.head_dim)) * case.magnitude,
        "k": random.normal(size=(rows, S, case.groups, case.head_dim)),
        "v": random.normal(size=(rows, S, case.groups, case.value_dim)),
    }
    if case.alibi:
        arrays["alibi_slopes_H"] = 0.5 ** np.arange(1, case.heads + 1)
    as_ids = lambda rows: np.array([[int(c) for c in row] for row in rows], np.int32)
    rest = dict(
        q_positions_BxL=positions(case.q_segments) + np.int32(case.q_from),
        k_positions_BxS=positions(case.keys),
        q_segment_ids_BxL=as_ids(case.q_segments),
        k_segment_ids_BxS=as_ids(case.keys),
        mask_kind=case.mask_kind,
        window=case.window,
        softcap=case.softcap,
        scale=case.head_dim**-0.5,
    )
    if case.mask_kind == "prefix":
        rest["k_prefix_BxS"] = (rest["k_positions_BxS"] < 4) & (rest["k_segment_ids_BxS"] != 2)
    return {key: x.astype(np.float32) for key, x in arrays.items()}, rest


def may_see(rest: dict, b: int, l: int, s: int) -> bool:
    """The rule in words, one pair at a time."""
    q_segment, k_segment = rest["q_segment_ids_BxL"][b, l], rest["k_segment_ids_BxS"][b, s]
    ahead = int(rest["k_positions_BxS"][b, s]) - int(rest["q_positions_BxL"][b, l])
    if k_segment == 0 or q_segment != k_segment:
        return False
    if rest["mask_kind"] == "causal" and ahead > 0:
        return False
    if rest["mask_kind"] == "prefix" and ahead > 0 and not rest["k_prefix_BxS"][b, s]:
        return False
    if rest["window"] is None:
        return True
    return (abs(ahead) if rest["mask_kind"] == "bidirectional" else -ahead) < rest["window"]


def oracle(arrays: dict, rest: dict) -> jax.Array:
    """One head at a time, the mask one pair at a time. Runs in the dtype of its input."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    (B, L, H, _), (S, G) = q.shape, k.shape[1:3]
    pairs = [[[may_see(rest, b, l, s) for s in range(S)] for l in range(L)] for b in range(B)]
    seen = np.array(pairs).reshape(B, L, S)
    gap = np.abs(rest["q_positions_BxL"][:, :, None] - rest["k_positions_BxS"][:, None, :]).astype(np.float64)
    heads = []
    for h in range(H):
        g = h // (H // G)
        scores = jnp.einsum("blk,bsk->bls", q[:, :, h], k[:, :, g]) * rest["scale"]
        if rest["softcap"] is not None:
            scores = rest["softcap"] * jnp.tanh(scores / rest["softcap"])
        if "alibi_slopes_H" in arrays:
            scores = scores - arrays["alibi_slopes_H"][h] * gap
        highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, where=seen, initial=-1e4, keepdims=True))
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, scores - highest, 0.0)), 0.0)
        total = weights.sum(-1, keepdims=True)
        heads.append(jnp.einsum("bls,bsv->blv", weights / jnp.where(total == 0, 1.0, total), v[:, :, g]))
    return jnp.stack(heads, axis=2)


def run(arrays: dict, rest: dict, implementation: str | None) -> jax.Array:
    slopes = arrays["alibi_slopes_H"] if "alibi_slopes_H" in arrays else None
    return attention(
        arrays["q"], arrays["k"], arrays["v"], alibi_slopes_H=slopes, implementation=implementation, **rest
    )


def values_and_gradients(fn, arrays: dict, shape: tuple[int, ...]):
    """fn's result, and its gradients under one fixed random cotangent."""
    cotangent = np.random.default_rng(1).normal(size=shape)

    def scalar(arrays):
        y = fn(arrays)
        return jnp.sum(y * cotangent.astype(y.dtype)), y

    gradients, y = jax.jit(jax.grad(scalar, has_aux=True))(arrays)
    return jax.tree.map(np.asarray, (y, gradients))


@functools.cache
def oracle_of(name: str):
    """Computed once, shared by the implementations."""
    arrays, rest = arguments(CASES[name])
    shape = (*arrays["q"].shape[:3], arrays["v"].shape[-1])
    with jax.enable_x64(True):
        in_64 = {key: jnp.asarray(x, jnp.float64) for key, x in arrays.items()}
        return values_and_gradients(lambda a: oracle(a, rest), in_64, shape)


SMALL = attention_triton.Tile(16, 16, 4, 1)


@pytest.fixture
def small_chunks(monkeypatch):
    """So that short rows take several chunks, and several blocks of the kernels in Pallas's TPU interpret mode."""
    monkeypatch.setattr(module, "QUERY_CHUNK", 16)
    monkeypatch.setattr(attention_blocks, "BLOCK", 16)
    monkeypatch.setattr(attention_triton, "TILES", dict.fromkeys(attention_triton.TILES, (SMALL, SMALL, SMALL)))
    monkeypatch.setattr(module, "INTERPRET", pltpu.InterpretParams())


# An interpreted kernel takes seconds to compile: all of them run in the slow tests, these always.
ALWAYS = {"flash": ("softcap, alibi, window, gqa", "prefix, window", "window 5, bidirectional", "decode",
                    "a few queries, of everything"),
          "triton": ("softcap, alibi, window, gqa", "prefix, window")}
SLOW = {(name, kernels) for kernels, always in ALWAYS.items() for name in CASES if name not in always}
REFUSED = {(name, "cudnn") for name, case in CASES.items() if case.alibi or case.softcap}
BATTERY = [pytest.param(*row, marks=[pytest.mark.slow] if row in SLOW else [])
           for row in itertools.product(CASES, IMPLEMENTATIONS) if row not in REFUSED]


@pytest.mark.parametrize("name, implementation", BATTERY)
def test_matches_the_oracle(name, implementation, small_chunks):
    arrays, rest = arguments(CASES[name])
    expected = oracle_of(name)
    assert expected[0].dtype == np.float64
    y, gradients = values_and_gradients(lambda a: run(a, rest, implementation), arrays, expected[0].shape)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected[0], rtol=2e-5, atol=2e-5)
    for key, gradient in gradients.items():
        size = max(1.0, np.abs(expected[1][key]).max())
        np.testing.assert_allclose(gradient / size, expected[1][key] / size, 2e-5, 2e-5, err_msg=key)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask_kind", module.MASK_KINDS)
def test_a_query_that_sees_nothing_gives_exact_zeros(mask_kind, implementation, small_chunks):
    more = {} if implementation == "cudnn" else dict(alibi=True, softcap=5.0)
    case = Case(("1" * 10 + "0" * 12,), mask_kind=mask_kind, **more)
    arrays, rest = arguments(case)
    y, gradients = values_and_gradients(lambda a: run(a, rest, implementation), arrays, arrays["q"].shape)
    for name, array in {"y": y, **{key: gradients[key] for key in "qkv"}}.items():
        assert np.isfinite(array).all(), name
        assert (array[:, 10:] == 0).all(), name
        assert (array[:, :10] != 0).any(), name
    with jax.debug_nans(True):  # not even on the way
        run(arrays, rest, implementation)


ROUNDED = ("gqa", "softcap, alibi, window, gqa", "bidirectional", "large scores", "decode")


@pytest.mark.parametrize("name, implementation", [row for row in BATTERY if row.values[0] in ROUNDED])
def test_bfloat16_is_as_near_as_the_reference(name, implementation, small_chunks):
    arrays, rest = arguments(CASES[name])
    rounded = {key: jnp.asarray(x, jnp.bfloat16) for key, x in arrays.items()}
    exact = {key: x.astype(jnp.float32) for key, x in rounded.items()}
    shape = oracle_of(name)[0].shape
    expected = values_and_gradients(lambda a: run(a, rest, "reference"), exact, shape)
    own = values_and_gradients(lambda a: run(a, rest, "reference"), rounded, shape)
    got = values_and_gradients(lambda a: run(a, rest, implementation), rounded, shape)
    for leaf in jax.tree.leaves(got):
        assert leaf.dtype == jnp.bfloat16

    def error(a, b):
        return float(np.abs(np.float32(a) - np.float32(b)).max() / np.abs(np.float32(b)).max())

    for one, base, true in zip(*map(jax.tree.leaves, (got, own, expected)), strict=True):
        assert error(one, true) <= 1.5 * error(base, true) + 2**-8
        assert error(one, true) < 0.05


def all_sizes(jaxpr) -> list[int]:
    """Elements of every value made anywhere in a jaxpr, nested ones included."""
    return [int(np.prod(v.aval.shape)) for eqn in equations(jaxpr) for v in eqn.outvars]


def test_chunked_memory_is_linear_in_length(small_chunks):
    """Forward and backward: no value is larger than a chunk's scores, though B*L*S alone is."""
    C, L = 16, 160
    arrays, rest = arguments(Case(("1" * L,), heads=4, groups=2))
    B, L, H, _ = arrays["q"].shape

    def largest(implementation, fn):
        return max(all_sizes(jax.make_jaxpr(fn(lambda a: run(a, rest, implementation).sum()))(arrays).jaxpr))

    for fn in (lambda f: f, jax.grad):
        assert largest("chunked", fn) == B * H * C * L < B * L * L
        assert largest("reference", fn) == B * H * L * L  # the measure sees what it should


def test_chunked_program_does_not_grow_with_length(small_chunks):
    def program(L):
        arrays, rest = arguments(Case(("1" * L,)))
        gradient = jax.grad(lambda a: run(a, rest, "chunked").sum())
        return len(all_sizes(jax.make_jaxpr(gradient)(arrays).jaxpr))

    assert program(32) == program(320)


def test_the_default_chunk_at_its_own_size():
    """Once with the chunk that really runs: 300 tokens are two chunks of 256."""
    arrays, rest = arguments(Case(("1" * 200 + "2" * 100,), heads=2, groups=1))
    shape = arrays["q"].shape
    expected = values_and_gradients(lambda a: run(a, rest, "reference"), arrays, shape)
    got = values_and_gradients(lambda a: run(a, rest, "chunked"), arrays, shape)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_document_alone_gives_what_it_gives_packed(implementation, small_chunks):
    packed, rest = arguments(Case(("1" * 19 + "2" * 23,), heads=4, alibi=implementation != "cudnn", window=9))
    y = run(packed, rest, implementation)
    alone = {key: x if key == "alibi_slopes_H" else x[:, 19:] for key, x in packed.items()}
    cut = {key: x[:, 19:] if isinstance(x, np.ndarray) else x for key, x in rest.items()}
    np.testing.assert_allclose(run(alone, cut, implementation), y[:, 19:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation, check_vma", [
    (name, check) for name in (*IMPLEMENTATIONS, None) for check in (False, True)
    if not (name in module.KERNELS and check)])  # JAX's interpreter of kernels knows no varying axes; None has the kernels, too
def test_inside_shard_map_and_remat(implementation, check_vma, small_chunks, monkeypatch, devices):
    """Rows split over two devices; the slopes are whole on each, so their gradient is a sum."""
    monkeypatch.setattr(module, "INTERPRET", True)  # the TPU's interpreter has effects, which remat refuses
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:2])
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    case = Case((LONG, LONG), heads=4, alibi=implementation != "cudnn")
    arrays, rest = arguments(case)
    ids = {key: x for key, x in rest.items() if isinstance(x, np.ndarray)}
    static = {key: x for key, x in rest.items() if key not in ids}

    def loss(arrays, ids):
        fn = jax.checkpoint(lambda a: run(a, {**ids, **static}, implementation))
        return fn(arrays)

    specs = {key: whole if key == "alibi_slopes_H" else split for key in arrays}
    local = jax.shard_map(loss, mesh=mesh, in_specs=(specs, split), out_specs=split, check_vma=check_vma)
    expected = jax.grad(lambda a: jnp.sum(run(a, rest, "reference") ** 2))(arrays)
    got = jax.jit(jax.grad(lambda a: jnp.sum(local(a, ids) ** 2)))(arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


BAD = {
    "no such implementation": (dict(implementation="fused"), "reference, chunked, flash, triton, cudnn"),
    "no such mask": (dict(mask_kind="full"), "causal, bidirectional, prefix"),
    "prefix without its mask": (dict(mask_kind="prefix"), "k_prefix_BxS"),
    "window 0": (dict(window=0), "window 0"),
    "softcap 0": (dict(softcap=0.0), "softcap"),
    "heads don't divide": (dict(k=np.ones((1, 41, 4, 4)), v=np.ones((1, 41, 4, 4))), "multiple of G"),
    "widths differ": (dict(k=np.ones((1, 41, 2, 3))), "multiple of G"),
    "values of other length": (dict(v=np.ones((1, 40, 2, 4))), "multiple of G"),
    "positions of other length": (dict(q_positions_BxL=np.zeros((1, 40), np.int32)), "q_positions_BxL"),
    "key segments of other length": (dict(k_segment_ids_BxS=np.zeros((1, 3), np.int32)), "k_segment_ids_BxS"),
    "slopes of other length": (dict(alibi_slopes_H=np.ones(5)), "alibi_slopes_H"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    change, words = BAD[name]
    arrays, rest = arguments(CASES["gqa"])
    everything = {**arrays, **rest, **change}
    q, k, v = (everything.pop(key) for key in "qkv")
    with pytest.raises(ValueError, match=words) as caught:
        attention(q, k, v, **everything)
    assert "\n" not in str(caught.value)
