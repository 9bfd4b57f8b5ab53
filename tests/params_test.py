"""Declaring weights: what `param` refuses, what `init` draws, and what is derived from the declarations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.errors import InputError
from research.params import (
    AdapterRule,
    Declared,
    Weight,
    constant,
    fan_in,
    flatten,
    init_adapters,
    merge_adapters,
    normal,
    ones,
    param,
    params_sha256,
    unflatten,
    weights_of,
)


class One(nn.Module):
    shape: tuple
    axes: tuple
    inputs: tuple = ()
    role: str = "hidden"

    @nn.compact
    def __call__(self):
        return param(self, "w", self.shape, self.axes, fan_in(), inputs=self.inputs, role=self.role)


BAD_DECLARATIONS = {
    "rank": One((2, 3), ("embed",)),
    "repeated axis": One((2, 2), ("embed", "embed")),
    "input that isn't an axis": One((2,), ("embed",), ("mlp",)),
    "role": One((2,), ("embed",), role="weight"),
}


@pytest.mark.parametrize("module", BAD_DECLARATIONS.values(), ids=BAD_DECLARATIONS.keys())
def test_a_bad_declaration_names_the_weight(module):
    with pytest.raises(ValueError, match=r"/w: shape .* one distinct axis a dimension"):
        module.init(jax.random.key(0))


@pytest.mark.parametrize("role", ["hidden", "input", "output", "input+output", "vector"])
def test_a_box_carries_the_declaration(role):
    box = One((6, 4, 2), ("embed", "heads", "head_dim"), ("embed",), role).init(jax.random.key(0))["params"][
        "w"
    ]
    assert isinstance(box, Declared)
    assert (box.names, box.inputs, box.role) == (("embed", "heads", "head_dim"), ("embed",), role)
    assert box.unbox().shape == (6, 4, 2)


def test_fan_in_is_the_product_of_the_inputs():
    key = jax.random.key(0)
    draw = fan_in(gain=2.0)(key, (400, 300), 50)
    assert float(jnp.std(draw)) == pytest.approx(2 / np.sqrt(50), rel=0.02)
    assert float(jnp.max(jnp.abs(draw))) < 2.3 * 2 / np.sqrt(
        50
    )  # truncated at two deviations of the untruncated
    value = (
        One((30, 40, 20), ("heads", "head_dim", "embed"), ("heads", "head_dim"))
        .init(key)["params"]["w"]
        .value
    )
    assert float(jnp.std(value)) == pytest.approx((30 * 40) ** -0.5, rel=0.05)
    assert (
        Weight(
            (3, 30, 40, 20), ("layers", "heads", "head_dim", "embed"), ("heads", "head_dim"), "hidden", "s"
        ).fan_in
        == 1200
    )
    assert float(jnp.std(normal(0.3)(key, (100, 100), 7))) == pytest.approx(0.3, rel=0.05)
    np.testing.assert_array_equal(constant(4.0)(key, (2,), 1), [4.0, 4.0])
    np.testing.assert_array_equal(ones(key, (2,), 1), [1.0, 1.0])


def test_paths_and_stages():
    boxed = {
        "decoder": {
            "stage_1": {
                "mlp_0": {"up": Declared(jnp.zeros((2, 3, 4)), ("layers", "embed", "mlp"), inputs=("embed",))}
            },
            "final_norm": {"gain": Declared(jnp.ones(3), ("embed",), role="vector")},
        }
    }
    weights = weights_of(boxed)
    assert weights == {
        "decoder/final_norm/gain": Weight((3,), ("embed",), (), "vector", "decoder"),
        "decoder/stage_1/mlp_0/up": Weight(
            (2, 3, 4), ("layers", "embed", "mlp"), ("embed",), "hidden", "decoder/stage_1"
        ),
    }
    assert weights["decoder/stage_1/mlp_0/up"].size == 24
    assert list(weights) == sorted(weights)


def test_flatten_is_sorted_and_inverts():
    tree = {"b": {"c": 1}, "a": {"z": 2, "d": {"e": 3}}}
    assert list(flatten(tree).items()) == [("a/d/e", 3), ("a/z", 2), ("b/c", 1)]
    assert unflatten(flatten(tree)) == tree


def test_sha256_is_of_paths_and_float32_bytes():
    tree = {"a": {"x": jnp.arange(4.0)}, "b": {"y": jnp.ones((2, 2))}}
    digest = params_sha256(tree)
    assert digest == params_sha256({"b": tree["b"], "a": tree["a"]}) and len(digest) == 64
    assert digest == params_sha256(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    )  # these values are exact in bfloat16
    changed = {
        "value": {"a": {"x": jnp.arange(4.0).at[3].add(1e-6)}, "b": tree["b"]},
        "path": {"a": {"w": tree["a"]["x"]}, "b": tree["b"]},
        "sign of zero": {"a": {"x": jnp.arange(4.0).at[0].set(-0.0)}, "b": tree["b"]},
    }
    assert len({params_sha256(other) for other in changed.values()} | {digest}) == 4


SHAPES = {  # axes, inputs -> shapes of A and B at rank 3
    "matrix": ((5, 7), ("embed", "mlp"), ("embed",), (5, 3), (3, 7)),
    "two outputs": ((5, 2, 7), ("embed", "heads", "head_dim"), ("embed",), (5, 3), (3, 2, 7)),
    "two inputs": ((2, 7, 5), ("heads", "head_dim", "embed"), ("heads", "head_dim"), (2, 7, 3), (3, 5)),
    "input last": ((5, 7), ("mlp", "embed"), ("embed",), (7, 3), (3, 5)),
    "stacked": ((4, 5, 7), ("layers", "embed", "mlp"), ("embed",), (4, 5, 3), (4, 3, 7)),
    "experts": ((4, 2, 5, 7), ("layers", "expert", "embed", "mlp"), ("embed",), (4, 5, 3), (4, 3, 2, 7)),
    "scalar head": ((5,), ("embed",), ("embed",), (5, 3), (3,)),
}


@pytest.mark.parametrize("shape, axes, inputs, a_shape, b_shape", SHAPES.values(), ids=SHAPES.keys())
def test_adapters_of_every_shape(shape, axes, inputs, a_shape, b_shape):
    weights = {"m/w": Weight(shape, axes, inputs, "hidden", "m")}
    adapters = init_adapters(weights, (AdapterRule("m/*", 3, 6.0),), jax.random.key(0))
    low = adapters["m"]["w"]
    assert (low.a.shape, low.b.shape, low.scale) == (a_shape, b_shape, 2.0)
    base = {"m": {"w": jnp.ones(shape)}}
    np.testing.assert_array_equal(merge_adapters(base, adapters, weights)["m"]["w"], 1.0)
    b = jax.random.normal(jax.random.key(1), b_shape)
    moved = jax.tree.map(lambda x: x, adapters)
    object.__setattr__(moved["m"]["w"], "b", b)
    delta = np.asarray(merge_adapters(base, moved, weights)["m"]["w"]) - 1.0
    # By the definition: contract the rank, then put every axis where the weight has it.
    layers = axes[0] == "layers"
    ins = [i for i, axis in enumerate(axes) if axis in inputs]
    outs = [i for i, axis in enumerate(axes) if axis not in inputs and axis != "layers"]
    a, b = np.asarray(low.a, np.float64), np.asarray(b, np.float64)
    product = (
        np.stack([np.tensordot(x, y, axes=(-1, 0)) for x, y in zip(a, b)])
        if layers
        else np.tensordot(a, b, axes=(-1, 0))
    )
    expected = 2.0 * np.transpose(product, np.argsort(([0] if layers else []) + ins + outs))
    np.testing.assert_allclose(delta, expected, atol=1e-5)


def test_no_adapter_without_inputs():
    weights = {"m/gain": Weight((5,), ("embed",), (), "vector", "m")}
    with pytest.raises(
        InputError, match=r"^adapters: 'm/\*' matches no weight with an input axis; see the paths"
    ):
        init_adapters(weights, (AdapterRule("m/*", 1, 1.0),), jax.random.key(0))
