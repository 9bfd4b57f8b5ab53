"""The flash kernels through the TPU's own compiler, on this CPU: both ways, every width, and memory that grows with L."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels.attention import attention
from research.aot.compile import no_cache

pytest.importorskip("libtpu", reason="the extra tpu is not installed")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}


@pytest.fixture(scope="module", autouse=True)
def no_persistent_cache():
    with no_cache():
        yield


def compiled(chip: str, width: int, dtype, *, queries=1024, keys=None, heads=4, groups=2, value_width=None, gradient=True,
             alibi=False, **static):
    """A training step's attention (or without `gradient`, a forward pass) for one chip; nothing names an implementation."""
    device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
    keys = keys or queries
    arrays = {"q": array(dtype, 2, queries, heads, width), "k": array(dtype, 2, keys, groups, width),
              "v": array(dtype, 2, keys, groups, value_width or width)}
    if alibi:
        arrays["slopes"] = array(jnp.float32, heads)
    ids = {name: array(jnp.int32, 2, queries if name.endswith("L") else keys)
           for name in ("q_positions_BxL", "k_positions_BxS", "q_segment_ids_BxL", "k_segment_ids_BxS")}
    if "mask_kind" in static and static["mask_kind"] == "prefix":
        ids["k_prefix_BxS"] = array(bool, 2, keys)

    def run(arrays, ids):
        slopes = arrays["slopes"] if alibi else None
        y = attention(arrays["q"], arrays["k"], arrays["v"], alibi_slopes_H=slopes, scale=0.1, **ids, **static)
        return jnp.sum(y.astype(jnp.float32) ** 2) if gradient else y

    return jax.jit(jax.grad(run) if gradient else run).lower(arrays, ids).compile()


def kernels_in(program) -> set[str]:
    """Names of the Mosaic kernels of a compiled program."""
    calls = [line for line in program.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return set(re.findall(r"flash_attention_forward|flash_attention_backward|decode_attention", "".join(calls)))


EVERY = itertools.product(TOPOLOGIES, (64, 128, 256), (jnp.bfloat16, jnp.float32))
ALWAYS = [("v5e", 64, jnp.float32), ("v5e", 128, jnp.bfloat16), ("v5p", 256, jnp.bfloat16)]
TRAINING = [pytest.param(*row, marks=[] if row in ALWAYS else [pytest.mark.slow]) for row in EVERY]


@pytest.mark.parametrize("chip, width, dtype", TRAINING)
def test_a_training_step_s_attention_compiles(chip, width, dtype):
    assert kernels_in(compiled(chip, width, dtype)) == {"flash_attention_forward", "flash_attention_backward"}


ODD = {
    "latent attention": dict(width=192, value_width=128, groups=4),
    "odd lengths and widths": dict(width=80, value_width=36, queries=777, keys=1000, window=300),
    "prefix, alibi, cap": dict(width=64, mask_kind="prefix", alibi=True, softcap=30.0),
    "cross": dict(width=128, queries=200, keys=50, mask_kind="bidirectional"),
    "multi-query, in chunks": dict(width=128, queries=8192, heads=16, groups=1),
    "many heads of one key head": dict(width=64, queries=1024, heads=71, groups=1),
    "more blocks than a list holds": dict(width=128, queries=100_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_compile(name):
    program = compiled("v5e", dtype=jnp.bfloat16, **ODD[name])
    assert kernels_in(program) == {"flash_attention_forward", "flash_attention_backward"}


DECODE = {
    "grouped": dict(width=128, heads=32, groups=8, keys=8192),
    "narrow heads": dict(width=64, heads=8, groups=8, keys=1000),
    "absorbed latents": dict(width=576, value_width=512, heads=128, groups=1, keys=2048),
    "draft of four, alibi, window": dict(width=128, queries=4, heads=8, groups=2, keys=4096, alibi=True, window=1024),
    "float32, odd width": dict(width=80, heads=4, groups=4, keys=300, dtype=jnp.float32),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "grouped" else [pytest.mark.slow]) for n in DECODE])
def test_decoding_compiles(name):
    asked = {"queries": 1, "dtype": jnp.bfloat16, **DECODE[name]}
    assert kernels_in(compiled("v5e", gradient=False, **asked)) == {"decode_attention"}


@pytest.mark.slow
@pytest.mark.parametrize("length", [8192, 16384])
def test_memory_is_linear_in_length(length):
    """At lengths that go backward by chunks of queries: within the same multiple of the queries' own bytes."""
    heads, width = 8, 128
    memory = compiled("v5e", width, jnp.bfloat16, queries=length, heads=heads, groups=1).memory_analysis()
    assert memory.temp_size_in_bytes < 3.2 * (length * heads * width * 2)
