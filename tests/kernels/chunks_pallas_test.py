"""The recurrences' TPU kernels through the TPU's compiler, forward and backward; their memory; the flops they count.

That they compute the right thing is held by each recurrence's own battery, interpreted (ssd_test, wkv_test, ...).
"""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from configs import preset
from kernels.gated_delta import gated_delta
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from kernels.wkv import Sums, wkv
from kernels.wkv7 import wkv7
from research.aot.compile import no_cache
from research.config import override
from research.models.gated_delta import GatedDelta
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.rwkv4 import Rwkv4TimeMix
from research.models.rwkv7 import Rwkv7TimeMix
from research.schema import Stage
from research.training.flops import count_flops
from research.training.program import make_program
from tests.kernels.tpu import compiled

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32


def shapes(*pairs) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(*pair) for pair in pairs]


def run_ssd(x, dt, a, b, c, h, positions, segments, implementation=None, chunk=256):
    return ssd(x, dt, a, b, c, positions_BxL=positions, segment_ids_BxL=segments, state_BxHxKxN=h, chunk=chunk,
               implementation=implementation)  # fmt: skip


def ssd_shapes(B, L, H=4, K=64, G=1, N=128, dtype=BF16):
    group, ids = ((B, L, G, N), dtype), ((B, L), I32)
    return shapes(((B, L, H, K), dtype), ((B, L, H), F32), ((H,), F32), group, group, ((B, H, K, N), F32), ids, ids)


def run_scan(x, dt, a, b, c, h, positions, segments, implementation=None):
    return selective_scan(x, dt, a, b, c, positions_BxL=positions, segment_ids_BxL=segments, state_BxIxN=h,
                          implementation=implementation)  # fmt: skip


def scan_shapes(B, L, I=256, N=16, dtype=BF16):
    state, ids = ((B, L, N), dtype), ((B, L), I32)
    return shapes(((B, L, I), dtype), ((B, L, I), F32), ((I, N), F32), state, state, ((B, I, N), F32), ids, ids)


def run_delta(q, k, v, log_decay, write, s, positions, segments, implementation=None):
    return gated_delta(q, k, v, log_decay, write, positions_BxL=positions, segment_ids_BxL=segments, state_BxHxKxV=s,
                       implementation=implementation)  # fmt: skip


def delta_shapes(B, L, H=2, K=128, V=128, dtype=BF16):
    key, gate, ids = ((B, L, H, K), dtype), ((B, L, H), F32), ((B, L), I32)
    return shapes(key, key, ((B, L, H, V), dtype), gate, gate, ((B, H, K, V), F32), ids, ids)


def run_linear(q, k, v, log_decay, s, positions, segments, implementation=None):
    return run_delta(q, k, v, log_decay, None, s, positions, segments, implementation)


def linear_shapes(B, L, **sizes):
    q, k, v, log_decay, _, *rest = delta_shapes(B, L, **sizes)
    return [q, k, v, log_decay, *rest]


def run_wkv7(r, log_decay, k, v, key, removal, s, positions, segments, implementation=None):
    return wkv7(r, log_decay, k, v, key, removal, positions_BxL=positions, segment_ids_BxL=segments, state_BxHxKxV=s,
                implementation=implementation)  # fmt: skip


def wkv7_shapes(B, L, H=2, K=64, V=64, dtype=BF16):
    key, ids = ((B, L, H, K), dtype), ((B, L), I32)
    return shapes(key, ((B, L, H, K), F32), key, ((B, L, H, V), dtype), key, key, ((B, H, K, V), F32), ids, ids)


def run_wkv(k, v, decay, bonus, numerator, denominator, exponent, positions, segments, implementation=None):
    y, sums = wkv(k, v, decay, bonus, positions_BxL=positions, segment_ids_BxL=segments,
                  state=Sums(numerator, denominator, exponent), implementation=implementation)  # fmt: skip
    return y, jnp.stack(sums)


def wkv_shapes(B, L, N=1000, dtype=BF16):
    token, channel, ids = ((B, L, N), dtype), ((N,), F32), ((B, L), I32)
    return shapes(token, token, channel, channel, *(((B, N), F32),) * 3, ids, ids)


KERNELS = {
    "ssd": (run_ssd, ssd_shapes),
    "selective_scan": (run_scan, scan_shapes),
    "gated_delta": (run_delta, delta_shapes),
    "wkv7": (run_wkv7, wkv7_shapes),
    "wkv": (run_wkv, wkv_shapes),
}
ODD = {"ssd": dict(L=300, H=6, K=24, G=2, N=20, dtype=F32), "selective_scan": dict(L=100, I=200, N=5, dtype=F32),
       "gated_delta": dict(L=100, H=3, K=20, V=40, dtype=F32),
       "wkv7": dict(L=100, H=3, K=20, V=40, dtype=F32), "wkv": dict(L=100, N=77, dtype=F32)}  # fmt: skip
MOST = {"ssd": dict(L=512, H=4, K=256, N=256, dtype=F32), "selective_scan": dict(L=128, N=256, dtype=F32),
        "gated_delta": dict(L=256, K=256, V=256, dtype=F32), "wkv7": dict(L=256, K=256, V=256, dtype=F32),
        "wkv": dict(L=256, N=4096, dtype=F32)}  # fmt: skip
every_kernel = pytest.mark.parametrize("name", KERNELS)


def gradient(run, implementation=None):
    """Of a sum over values and last state, by every float argument: all but positions and segments."""
    floats = tuple(range(list(inspect.signature(run).parameters).index("positions")))

    def loss(*arrays):
        y, h = run(*arrays, implementation=implementation)
        return jnp.sum(y.astype(F32) ** 2) + jnp.sum(h**2)

    return jax.grad(loss, argnums=floats)


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@every_kernel
def test_a_program_for_v5p_has_the_kernels(name):
    """None takes them where the program is lowered for a TPU, forward and backward. (For v5e: the sharded step below.)"""
    run, make = KERNELS[name]
    text = compiled(gradient(run), make(B=1, L=1000), "v5p:2x2x1").as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert f"{name}_forward" in text and f"{name}_backward" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssd", "selective_scan"])
def test_memory_is_linear_in_length(name):
    """Forward and backward, for v5p: under seven times the arguments at any length; L x D x N or L x Q would be more."""
    run, make = KERNELS[name]
    for L in (8192, 32768):
        args = make(B=4, L=L)
        assert temporaries(compiled(gradient(run), args, "v5p:2x2x1")) < 7 * sum(x.size * x.dtype.itemsize for x in args)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [ODD, MOST], ids=["odd", "most"])
@every_kernel
def test_odd_shapes_and_the_largest_compile(name, shapes):
    run, make = KERNELS[name]
    assert "tpu_custom_call" in compiled(gradient(run, "pallas"), make(B=1, **shapes[name]), "v5e:2x2").as_text()


@pytest.mark.parametrize("name", [*KERNELS, "gated_linear"])
def test_flops_are_those_of_the_chunked_form(name):
    run, make = (KERNELS | {"gated_linear": (run_linear, linear_shapes)})[name]
    for fn in (run, gradient(run)):
        expected = count_flops(fn, *make(B=2, L=300))
        assert (expected > 0) == (name != "wkv")  # which has no product
        assert count_flops(fn, *make(B=2, L=300), platform="tpu") == expected


TOO_MUCH = {"ssd": dict(dtype=jnp.float16), "selective_scan": dict(N=3000), "gated_delta": dict(K=300), "wkv7": dict(K=300)}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_it_cannot_serve_goes_elsewhere(name, caplog):
    run, make = KERNELS[name]
    args = make(B=1, L=8, **TOO_MUCH[name])
    for _ in range(2):
        jax.eval_shape(run, *args)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith(f"{name}: pallas") and said[0].endswith("; the next implementation is taken")
    with pytest.raises(ValueError, match=f"{name}: pallas"):
        jax.eval_shape(lambda *x: run(*x, implementation="pallas"), *args)


@pytest.mark.slow
@every_kernel
def test_gradients_vary_over_the_mesh_as_their_arguments(name, devices):
    """Traced with check_vma: what all rows share has one gradient, summed over devices."""
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    run, make = KERNELS[name]
    row, whole = PartitionSpec("data"), PartitionSpec()
    floats = [row if x.shape[0] == 8 else whole for x in make(B=8, L=256)[:-2]]
    mapped = jax.shard_map(gradient(run), mesh=mesh, in_specs=(*floats, row, row), out_specs=tuple(floats))
    jax.eval_shape(mapped, *make(B=8, L=256))


STEPS = {
    "mamba": ((Mamba2(head_dim=32, state=16, chunk=128), Mamba()), ("ssd", "selective_scan")),
    "delta": ((GatedDelta(heads=2, key_dim=32), Rwkv7TimeMix(1, head_dim=32), Rwkv4TimeMix(1)),
              ("gated_delta", "wkv7", "wkv")),
}


@pytest.mark.parametrize("name", ["mamba", pytest.param("delta", marks=pytest.mark.slow)])
def test_a_sharded_training_step_for_four_chips_has_the_kernels(name):
    """fsdp on v5e 2x2, forward and backward, under the scan over layers."""
    pytest.importorskip("libtpu", reason="the extra tpu is not installed")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mixers, kernels = STEPS[name]
    config = override(preset("quickstart"), {"train.batch_size": 8, "mesh.rules": "fsdp", "model.compute_dtype": "bfloat16"})
    model = dataclasses.replace(config.model, stages=(Stage(mixers, 1),))
    with no_cache():
        text = make_program(dataclasses.replace(config, model=model), devices).compile().as_text()
    for kernel in kernels:
        assert f"{kernel}_forward" in text and f"{kernel}_backward" in text
