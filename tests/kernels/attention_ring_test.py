"""Attention around a ring of four devices is attention: values and gradients, in whatever order rows are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels.attention import attention

B, L, H, G, K, V = 2, 32, 4, 2, 8, 6
ORDERS = {
    "in order": np.arange(L),
    "striped": np.arange(L).reshape(-1, 4).T.reshape(-1),  # device 0 has tokens 0, 4, 8, ...
}
RULES = {
    "causal": dict(),
    "window, alibi, cap": dict(window=9, softcap=2.0, alibi_slopes_H=0.5 ** np.arange(1, H + 1, dtype=np.float32)),
    "prefix": dict(mask_kind="prefix"),
}


def arguments():
    """Two rows: a document of 20 with another behind it, and one of 27 with padding behind."""
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape).astype(np.float32) for shape in ((B, L, H, K), (B, L, G, K), (B, L, G, V))]
    positions = np.stack([np.r_[0:20, 0:12], np.r_[0:27, 0:5]]).astype(np.int32)
    segments = np.stack([np.repeat([1, 2], [20, 12]), np.repeat([1, 0], [27, 5])]).astype(np.int32)
    return arrays, positions, segments


@pytest.mark.parametrize("name, order, check_vma, implementation", [
    ("causal", "in order", False, None), ("causal", "striped", True, None), ("prefix", "in order", True, None),
    ("window, alibi, cap", "striped", False, None), ("causal", "striped", False, "triton")])
def test_equals_unsharded_attention(name, order, check_vma, implementation, devices):
    arrays, positions, segments = arguments()
    static = {key: value for key, value in RULES[name].items() if key != "alibi_slopes_H"}
    slopes = RULES[name]["alibi_slopes_H"] if "alibi_slopes_H" in RULES[name] else None

    def run(arrays, slopes, positions, segments, **how):
        prefix = positions < 5 if name == "prefix" else None
        return attention(*arrays, q_positions_BxL=positions, k_positions_BxS=positions, q_segment_ids_BxL=segments,
                         k_segment_ids_BxS=segments, k_prefix_BxS=prefix, alibi_slopes_H=slopes, scale=K**-0.5, **static, **how)

    def around(arrays, slopes):
        mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,), devices=devices)
        rows, whole = PartitionSpec(None, "context"), PartitionSpec()
        local = jax.shard_map(lambda *a: run(*a, implementation=implementation, axis_name="context"), mesh=mesh,
                              in_specs=(rows, whole, rows, rows), out_specs=rows, check_vma=check_vma)
        cut = ORDERS[order]
        y = local([x[:, cut] for x in arrays], slopes, positions[:, cut], segments[:, cut])
        return y[:, np.argsort(cut)]

    cotangent = np.random.default_rng(1).normal(size=(B, L, H, V)).astype(np.float32)

    def gradients(fn):
        def scalar(*args):
            y = fn(*args)
            return jnp.sum(y * cotangent), y
        return jax.jit(jax.grad(scalar, argnums=(0,) if slopes is None else (0, 1), has_aux=True))(arrays, slopes)

    expected = gradients(lambda arrays, slopes: run(arrays, slopes, positions, segments, implementation="reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), gradients(around), expected)


def test_the_reference_says_that_it_can_t():
    arrays, positions, segments = arguments()
    with pytest.raises(ValueError, match="doesn't go round a ring"):
        attention(*arrays, q_positions_BxL=positions, k_positions_BxS=positions, q_segment_ids_BxL=segments,
                  k_segment_ids_BxS=segments, scale=1.0, implementation="reference", axis_name="context")
