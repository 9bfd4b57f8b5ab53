"""Rules, meshes, specs and `local`: what falls where, and what is refused with which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research import sharding
from research.errors import InputError
from research.params import Weight
from research.schema import MeshConfig
from research.sharding import (
    RULES,
    Rules,
    activation_spec,
    local,
    make_mesh,
    mesh_shape,
    rules_named,
    weight_specs,
)


def mesh_of(devices, **sizes):
    return make_mesh(MeshConfig(**sizes), devices)


SHAPES = [  # config, devices -> sizes that aren't 1
    (dict(rules="dp"), 4, {"data": 4}),
    (dict(rules="fsdp"), 4, {"fsdp": 4}),
    (dict(rules="fsdp", data=2), 8, {"data": 2, "fsdp": 4}),
    (dict(rules="fsdp_tp", tensor=2), 8, {"fsdp": 4, "tensor": 2}),
    (dict(rules="ep", expert=4, fsdp=1), 4, {"expert": 4}),
    (dict(rules="cp", context=2), 8, {"fsdp": 4, "context": 2}),
    (dict(rules="fsdp", data=2, slices=2), 8, {"data": 2, "fsdp": 4}),
    (dict(rules="dp"), 1, {}),
]


@pytest.mark.parametrize("config, devices, expected", SHAPES)
def test_mesh_shape(config, devices, expected):
    assert {axis: n for axis, n in mesh_shape(MeshConfig(**config), devices).items() if n > 1} == expected


BAD_MESHES = [
    (dict(rules="dpp"), 4, r"^mesh\.rules: unknown 'dpp'; did you mean dp"),
    (dict(rules="tensor"), 4, r"^mesh\.rules: unknown 'tensor'; "),
    (
        dict(rules="fsdp_tp", tensor=3),
        4,
        r"^mesh: tensor=3 do not multiply to the 4 devices here; .* leave mesh\.fsdp=0",
    ),
    (dict(rules="dp", data=2), 4, r"^mesh: data=2 do not multiply to the 4 devices"),
    (dict(rules="dp", data=8), 4, r"^mesh: data=8 do not multiply to the 4 devices"),
    (dict(rules="fsdp_tp", tensor=8), 4, r"^mesh: tensor=8 do not multiply"),
    (dict(rules="dp", slices=3), 4, r"^mesh\.slices: 3 does not divide"),
    (
        dict(rules="fsdp_tp", tensor=4, slices=2),
        4,
        r"^mesh\.slices: 2 does not divide mesh\.data or mesh\.fsdp",
    ),
]


@pytest.mark.parametrize("config, devices, message", BAD_MESHES)
def test_a_bad_mesh_is_one_line(config, devices, message):
    with pytest.raises(InputError, match=message) as caught:
        mesh_shape(MeshConfig(**config), devices)
    assert "\n" not in str(caught.value)


def test_slices_must_be_there(devices):
    with pytest.raises(InputError, match=r"^mesh\.slices: 2 asked, the devices form 1; "):
        mesh_of(devices, rules="dp", slices=2)


def test_mesh_axes_are_automatic(devices):
    mesh = mesh_of(devices, rules="fsdp_tp", tensor=2)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.axis_names == sharding.MESH_AXES and mesh.devices.shape == (1, 2, 1, 1, 2)


def test_weight_specs(devices):
    mesh = mesh_of(devices, rules="fsdp_tp", tensor=2)
    weights = {
        "query": Weight((3, 8, 4, 5), ("layers", "embed", "heads", "head_dim"), ("embed",), "hidden", "s"),
        "key_of_one_head": Weight(
            (3, 8, 1, 5), ("layers", "embed", "kv_heads", "head_dim"), ("embed",), "hidden", "s"
        ),
        "gain": Weight((8,), ("embed",), (), "vector", "s"),
        "odd_but_whole": Weight((7, 3), ("position", "head_dim"), ("position",), "input", "s"),
    }
    assert weight_specs(weights, mesh, RULES["fsdp_tp"]) == {
        "query": P(None, "fsdp", "tensor", None),
        "key_of_one_head": P(None, "fsdp", None, None),
        "gain": P("fsdp"),
        "odd_but_whole": P(None, None),
    }
    assert weight_specs(weights, mesh, RULES["dp"])["query"] == P(None, None, None, None)
    tree = sharding.weight_shardings({"a/b": weights["gain"]}, mesh, RULES["fsdp_tp"])
    assert tree["a"]["b"].spec == P("fsdp")


def test_two_axes_on_one_mesh_axis_are_refused(devices):
    mesh = mesh_of(devices, rules="fsdp_tp", tensor=2)
    rules = Rules({"embed": ("fsdp",), "mlp": ("tensor", "fsdp")}, {}, rest="fsdp")
    weights = {"decoder/up": Weight((8, 8), ("embed", "mlp"), ("embed",), "hidden", "s")}
    with pytest.raises(
        InputError, match=r"^mesh\.rules: decoder/up: axes embed and mlp both fall on mesh axis fsdp; "
    ):
        weight_specs(weights, mesh, rules)
    several = {"decoder/up": Weight((8, 4), ("embed", "mlp"), ("embed",), "hidden", "s")}
    assert weight_specs(several, mesh, Rules({"mlp": ("fsdp", "tensor")}, {}, rest="fsdp")) == {
        "decoder/up": P(None, ("fsdp", "tensor"))
    }


def test_no_rules_collide_on_any_mixer(devices):
    """Every weight of every mixer can rest by every rule, with all mesh axes at once in play."""
    from tests.models.cases import FLAT
    from tests.models.sharded_contract_test import weights_of_mixer

    class AnyMesh:  # specs need only the sizes
        shape = {axis: 2 for axis in sharding.MESH_AXES}

    for rules in RULES.values():
        for case in FLAT.values():
            weight_specs(weights_of_mixer(case.cfg), AnyMesh, rules)


@pytest.mark.parametrize(
    "shape, axes, message",
    [
        (
            (8, 3, 4),
            ("embed", "heads", "head_dim"),
            r"^mesh\.tensor: 2 does not divide heads=3 of a/query; choose a divisor of 3",
        ),
        (
            (5, 4),
            ("embed", "mlp"),
            r"^mesh\.fsdp: 2 does not divide embed=5 of a/query; choose a divisor of 5",
        ),
    ],
)
def test_a_size_that_cannot_be_divided(devices, shape, axes, message):
    mesh = mesh_of(devices, rules="fsdp_tp", tensor=2)
    with pytest.raises(InputError, match=message):
        weight_specs({"a/query": Weight(shape, axes, axes[:1], "hidden", "s")}, mesh, RULES["fsdp_tp"])


def test_activation_specs(devices):
    mesh = mesh_of(devices, rules="cp", context=2)
    spec = lambda axes, shape: activation_spec(axes, shape, mesh, RULES["cp"])
    assert spec(("batch", "length", "embed"), (4, 6, 8)) == P("fsdp", "context", None)
    assert spec(("batch", "length", "embed"), (3, 6, 8)) == P(
        None, "context", None
    )  # a batch that can't be divided
    assert spec(("batch", "length", "embed"), (1, 1, 8)) == P(None, None, None)
    assert sharding.batch_sharding(mesh, RULES["cp"], (None, "batch", "length")).spec == P(
        None, ("fsdp",), ("context",)
    )
    assert sharding.batch_divisor(mesh, RULES["cp"]) == 2
    experts = mesh_of(devices, rules="ep", expert=2)
    assert activation_spec(("batch",), (4,), experts, RULES["ep"]) == P(("fsdp", "expert"))
    assert activation_spec(("expert_batch", "expert"), (4, 8), experts, RULES["ep"]) == P("fsdp", "expert")
    assert sharding.batch_divisor(experts, RULES["ep"]) == 4


def test_constrain_and_local_do_nothing_on_one_device(devices):
    x, function = jnp.ones((2, 3)), lambda x: x
    assert sharding.constrain(x, ("batch", None)) is x
    assert local(function, (("batch", None),), ("batch", None)) is function
    with sharding.use(mesh_of(devices[:1], rules="dp"), RULES["dp"]):
        assert sharding.constrain(x, ("batch", None)) is x
        assert local(function, (("batch", None),), ("batch", None)) is function


def test_constrain_places(devices):
    mesh, rules = mesh_of(devices, rules="dp"), rules_named("dp")
    with sharding.use(mesh, rules):
        y = jax.jit(lambda x: sharding.constrain(x, ("batch", None)))(jnp.ones((4, 3)))
        assert y.sharding.spec[0] == "data" and y.addressable_shards[0].data.shape == (1, 3)
        with pytest.raises(ValueError):
            sharding.constrain(jnp.ones((4, 3)), ("batch",))  # one name a dimension
    assert sharding.constrain(y, ("batch", None)) is y


def test_local_sees_its_shard(devices):
    mesh, rules = mesh_of(devices, rules="fsdp_tp", tensor=2), rules_named("fsdp_tp")
    seen = []

    def kernel(x_BxLxH, w_H, nothing):
        seen.append((x_BxLxH.shape, w_H.shape, nothing))
        return x_BxLxH * w_H, jnp.sum(x_BxLxH)[None]

    axes = ("batch", "length", "heads")
    with sharding.use(mesh, rules):
        call = jax.jit(lambda x, w: local(kernel, (axes, ("heads",), None), [axes, ("shards",)])(x, w, None))
        for batch, shard in ((4, 2), (3, 3), (1, 1)):  # an odd batch is left whole
            x, w = jax.random.normal(jax.random.key(0), (batch, 5, 6)), jnp.arange(6.0)
            y, sums = call(x, w)
            assert seen[-1] == ((shard, 5, 3), (3,), None)
            np.testing.assert_allclose(y, x * w, rtol=1e-6)
            assert sums.shape == (4,)
            if batch == 4:
                np.testing.assert_allclose(jnp.sum(sums), jnp.sum(x), rtol=1e-5)


def test_local_gradients_of_what_is_whole_are_summed(devices):
    mesh, rules = mesh_of(devices, rules="dp"), rules_named("dp")
    x, w = jax.random.normal(jax.random.key(0), (4, 3)), jnp.arange(3.0)

    def loss(x, w):
        return jnp.sum(
            jnp.square(local(lambda x, w: x * w, (("batch", None), (None,)), ("batch", None))(x, w))
        )

    expected = jax.grad(loss, argnums=(0, 1))(x, w)
    with sharding.use(mesh, rules):
        for got, want in zip(jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w), expected):
            np.testing.assert_allclose(got, want, rtol=1e-5)


def test_local_leaves_auto_axes_to_the_compiler(devices):
    mesh, rules = mesh_of(devices, rules="fsdp_tp", tensor=2), rules_named("fsdp_tp")
    seen = []

    def kernel(x, w):
        seen.append((x.shape, w.shape))
        return x @ w

    with sharding.use(mesh, rules):
        in_axes = (("batch", "embed"), ("embed", "vocab"))
        call = jax.jit(lambda x, w: local(kernel, in_axes, ("batch", None), auto=("tensor",))(x, w))
        x, w = jnp.ones((4, 3)), jnp.ones((3, 6))
        np.testing.assert_allclose(call(x, w), x @ w)
    assert seen == [((2, 3), (3, 6))]  # the batch is split by hand, the vocabulary isn't


def test_rules_cover_the_named_families():
    assert set(RULES) == {"dp", "fsdp", "fsdp_tp", "ep", "cp", "ring"}
    for name, rules in RULES.items():
        used = {
            axis for table in (rules.weights, rules.activations) for axes in table.values() for axis in axes
        }
        assert used <= set(sharding.MESH_AXES) and rules.rest in used, name
        assert {"batch", "expert_batch"} <= set(rules.activations)
