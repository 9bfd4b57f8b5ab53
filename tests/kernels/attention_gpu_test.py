"""What only the kernels for GPUs have: how they are lowered for one on this CPU, when they run, what they refuse, never read
and count. The battery holds them to the oracle interpreted, and below on a GPU, if there is one."""

from __future__ import annotations

import functools
import itertools
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # what stands for cuDNN where there is none
from jax.extend import backend

from kernels import attention as module
from kernels import attention_triton
from kernels.attention import attention
from kernels.visibility import Context, Rule, visible_blocks
from research import sharding
from research.models.attention import Attention, attend
from research.models.latent_attention import LatentAttention
from research.schema import MeshConfig
from research.training.flops import count_flops
from tests.jaxprs import equations
from tests.kernels.attention_test import CASES, SMALL, Case, arguments, oracle_of, run, values_and_gradients
from tests.kernels.gpu import lowered, triton_kernels

FORWARD = ["triton_attention_forward"]
STEP = FORWARD + ["triton_attention_backward_queries", "triton_attention_backward_keys"]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_triton, "TILES", dict.fromkeys(attention_triton.TILES, (SMALL, SMALL, SMALL)))


def shapes(width: int, dtype, *, queries: int = 300, keys: int | None = None, heads: int = 4, groups: int = 2,
           value_width: int | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    keys, array = keys or queries, jax.ShapeDtypeStruct
    return (array((2, queries, heads, width), dtype), array((2, keys, groups, width), dtype),
            array((2, keys, groups, value_width or width), dtype), array((2, queries), jnp.int32), array((2, keys), jnp.int32))


def total(q, k, v, q_ids, k_ids, *, alibi: bool = False, **static):
    """The sum of an attention over rows of one document a row; ids stand for positions and segments alike."""
    y = attention(q, k, v, q_positions_BxL=q_ids, k_positions_BxS=k_ids, q_segment_ids_BxL=q_ids, k_segment_ids_BxS=k_ids,
                  alibi_slopes_H=q[0, 0, :, 0].astype(jnp.float32) if alibi else None,
                  k_prefix_BxS=k_ids < 9 if "mask_kind" in static else None, scale=0.1, **static)
    return jnp.sum(y.astype(jnp.float32))


def step(**static):
    return jax.grad(functools.partial(total, **static), argnums=(0, 1, 2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_a_training_step_s_attention_is_lowered_for_cuda(width, dtype):
    for static in ({}, dict(softcap=30.0, window=100)):
        assert triton_kernels(lowered(step(**static), *shapes(width, dtype))) == STEP


ODD = {
    "latent attention": (dict(width=192, value_width=128, groups=4), {}),
    "odd lengths and widths": (dict(width=80, value_width=36, queries=77, keys=101, heads=6), dict(window=30)),
    "prefix, alibi, cap": (dict(width=64), dict(mask_kind="prefix", alibi=True, softcap=30.0)),
    "cross": (dict(width=128, queries=200, keys=5), dict(mask_kind="bidirectional")),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_are_lowered_for_cuda(name):
    sizes, static = ODD[name]
    assert triton_kernels(lowered(step(**static), *shapes(dtype=jnp.bfloat16, **sizes))) == STEP


def test_none_is_of_the_platform():
    """Forward and backward. A few queries of a cache take XLA's products on a GPU."""
    training, decoding = shapes(64, jnp.bfloat16), shapes(64, jnp.bfloat16, queries=1, keys=256)
    programs = {platform: lowered(step(), *training, platform=platform) for platform in ("cuda", "tpu", "cpu")}
    assert triton_kernels(programs["cuda"]) == STEP and "tpu_custom_call" not in programs["cuda"]
    assert triton_kernels(programs["tpu"]) == [] and "tpu_custom_call" in programs["tpu"]
    assert "custom_call" not in programs["cpu"]
    assert triton_kernels(lowered(total, *decoding)) == []
    assert triton_kernels(lowered(functools.partial(total, implementation="triton"), *decoding)) == FORWARD


def test_what_it_refuses_runs_chunked_and_says_so(caplog):
    wide = shapes(264, jnp.bfloat16, queries=20)
    with pytest.raises(ValueError, match="triton can't serve this: a head width of 264 is above 256"):
        lowered(functools.partial(total, implementation="triton"), *wide)
    with caplog.at_level("INFO"):
        assert triton_kernels(lowered(step(), *wide)) == []
    assert caplog.messages == ["attention: triton can't serve this: a head width of 264 is above 256; the next implementation "
                               "is taken"]


@pytest.mark.parametrize("sizes", attention_triton.TILES)
def test_tiles_fit_into_shared_memory(sizes):
    """q, or q and dy, or k and v of a program; and for each stage two arrays of the other side. Products need 16 rows."""
    dtype, width = sizes
    for tile, own_arrays in zip(attention_triton.TILES[sizes], (1, 2, 2), strict=True):
        rows = own_arrays * tile.own + 2 * tile.stages * tile.inner
        assert rows * width * jnp.dtype(dtype).itemsize <= attention_triton.SHARED_BYTES
        assert min(tile.own, tile.inner) >= attention_triton.LEAST


@pytest.mark.parametrize("mask_kind, window", itertools.product(("causal", "bidirectional"), (None, 30)))
def test_the_bounds_of_a_row_hold_what_it_sees_and_no_more(mask_kind, window):
    L = 128
    segments = np.repeat([1, 2, 3, 0], [50, 40, 8, 30]).astype(np.int32)[None]
    positions = np.concatenate([np.arange(n) for n in (50, 40, 8, 30)]).astype(np.int32)[None]
    blocks = visible_blocks(Context(positions, positions, segments, segments, None), Rule(mask_kind, window, None, 1.0), 8, 8)
    some_IxJ, all_IxJ = (np.asarray(x)[0] for x in blocks)
    bounds_IxN = np.asarray(attention_triton._bounds(*blocks))[0]
    assert all_IxJ.any()
    for (first, begin, end, last), some, every in zip(bounds_IxN, some_IxJ, all_IxJ, strict=True):
        assert first <= begin <= end <= last <= L // 8
        np.testing.assert_array_equal(np.flatnonzero(some), np.arange(first, last))
        np.testing.assert_array_equal(np.flatnonzero(every), np.arange(begin, end))


def test_the_tiles_at_their_own_size():
    """Once with the tiles that really run: a row has masked blocks, then a run without a mask, then masked ones again."""
    arrays, rest = arguments(Case(("1" * 150,), heads=2, groups=1, window=100))
    shape = arrays["q"].shape
    expected = values_and_gradients(lambda a: run(a, rest, "reference"), arrays, shape)
    got = values_and_gradients(lambda a: run(a, rest, "triton"), arrays, shape)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_what_lies_outside_is_never_read(small_tiles):
    """Other documents, a cache's empty slots: NaNs there leave no trace, though 0 * NaN is NaN."""
    arrays, rest = arguments(Case(("2" * 32,), ("1" * 16 + "2" * 32 + "0" * 16,)))
    for key in "kv":
        arrays[key][:, :16] = arrays[key][:, 48:] = np.nan
    y, gradients = values_and_gradients(lambda a: run(a, rest, "triton"), arrays, arrays["q"].shape)
    assert np.isfinite(y).all() and all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_flops_are_of_the_blocks_that_are_computed(small_tiles):
    """Of 32 rows of blocks, 1 + 2 + ... + 32; both programs of the backward pass make the weights again."""
    arrays, rest = arguments(Case(("1" * 300 + "2" * 212,), heads=4, groups=2, value_dim=6))
    train = jax.value_and_grad(lambda a: run(a, rest, None).sum())
    products = (4 + 6) + (2 * 4 + 6) + (2 * 4 + 2 * 6)
    assert count_flops(train, arrays, platform="cuda") == 2 * 4 * 512 * 512 * products * (32 * 33 // 2) / 32**2


def test_a_sharded_step_has_the_kernels(devices, small_tiles):
    """Through `sharding.local`, two by two devices: each runs them on its own rows and heads."""
    case = Case(("1" * 20 + "2" * 13,) * 4, heads=4, groups=2)
    arrays, rest = arguments(case)
    config = MeshConfig(rules="fsdp_tp", fsdp=2, tensor=2)
    mesh, rules = sharding.make_mesh(config, devices), sharding.rules_named("fsdp_tp")

    def sharded(arrays):
        with sharding.use(mesh, rules):
            return attend(arrays["q"], arrays["k"], arrays["v"], *list(rest.values())[:4], "causal", None,
                          scale=rest["scale"], implementation="triton")

    calls = [eqn for eqn in equations(jax.make_jaxpr(sharded)(arrays).jaxpr) if eqn.primitive.name == "pallas_call"]
    assert {eqn.params["name"] for eqn in calls} == {"triton_attention_forward"}
    assert all(eqn.outvars[0].aval.shape == (2, 48, 2, 16) for eqn in calls)  # of 4 rows and 4 heads, padded
    got = values_and_gradients(sharded, arrays, arrays["q"].shape)
    expected = values_and_gradients(lambda a: run(a, rest, "chunked"), arrays, arrays["q"].shape)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)


@pytest.mark.parametrize("change, words", [
    (dict(softcap=5.0), "it has no softcap"), (dict(alibi=True), "ALiBi would be a bias"),
    (dict(head_dim=260), "a head width of 260 is above 256")])
def test_cudnn_says_why_it_refuses(change, words):
    arrays, rest = arguments(Case(("11",), **change))
    with pytest.raises(ValueError, match=f"cudnn can't serve this: {words}"):
        run(arrays, rest, "cudnn")


@pytest.fixture
def as_if_there_were_cudnn(monkeypatch):
    monkeypatch.setattr(backend, "get_backend", lambda: types.SimpleNamespace(platform_version="cuda 13"))
    monkeypatch.setattr(cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def test_cudnn_s_own_calls_are_made(as_if_there_were_cudnn):
    """What JAX asks of arguments for cuDNN is asked before it is called: here of odd lengths, and widths that differ."""
    train = step(implementation="cudnn")
    sizes = shapes(60, jnp.bfloat16, queries=77, keys=51, value_width=52)
    program = lowered(train, *sizes)
    assert "__cudnn$fmhaScaleBiasSoftmax(" in program and "__cudnn$fmhaScaleBiasSoftmaxBackward" in program
    assert count_flops(train, *sizes) == 2 * (2 + 5) * (2 * 78 * 4 * 64) * 52  # padded; two products forward, five backward
    with pytest.raises(ValueError, match="cudnn can't serve this: q, k and v are float32"):
        lowered(train, *shapes(64, jnp.float32))


def test_the_ring_and_cudnn_do_not_meet():
    """Rows split over a ring take the keys whole by what has no log-sum-exp."""
    with pytest.raises(ValueError, match="cudnn doesn't go round a ring"):
        total(*(jnp.zeros(x.shape, x.dtype) for x in shapes(8, jnp.bfloat16, queries=4)), implementation="cudnn", axis_name="a")


@pytest.fixture
def gpu():
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip("no GPU, or none asked for: JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/attention_gpu_test.py")
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield device


@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_the_kernels_match_the_oracle(name, gpu):
    arrays, rest = arguments(CASES[name])
    expected = oracle_of(name)
    found = values_and_gradients(lambda a: run(a, rest, "triton"), arrays, expected[0].shape)
    for got, true in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = max(1.0, np.abs(true).max())
        np.testing.assert_allclose(got / size, true / size, 2e-5, 2e-5)


@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_on_a_gpu_bfloat16_is_as_near_as_the_reference(width, implementation, gpu):
    """Long enough rows for every block size: several documents, padding, a window."""
    case = Case(("1" * 300 + "2" * 411 + "0" * 66,) * 2, heads=4, groups=2, window=200, head_dim=width, value_dim=width)
    arrays, rest = arguments(case)
    rounded = {key: jnp.asarray(x, jnp.bfloat16) for key, x in arrays.items()}
    exact = {key: x.astype(jnp.float32) for key, x in rounded.items()}
    results = [values_and_gradients(lambda a, by=by: run(a, rest, by), given, rounded["q"].shape)
               for by, given in (("reference", exact), ("reference", rounded), (implementation, rounded))]
    for true, base, got in zip(*map(jax.tree.leaves, results), strict=True):
        error = lambda x, true=true: np.abs(np.float32(x) - true).max() / np.abs(true).max()
        assert error(got) <= 1.5 * error(base) + 2**-8


def test_the_names_are_those_of_the_models():
    for config in (Attention, LatentAttention):
        named, _ = typing.get_args(typing.get_type_hints(config)["implementation"])
        assert typing.get_args(named) == tuple(module.IMPLEMENTATIONS)
