"""Runs one mixer by itself: its weights, the context of a layout, and its forward functions."""

import dataclasses
import functools
import zlib
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from research.config import MixerConfig
from research.models import mixers
from research.models.context import Context
from research.params import Declared
from tests.models.cases import DIM

QUICK = {"xla_backend_optimization_level": 0}  # halves the time of compilation, which is nearly all of it
MEMORY_PER_DOCUMENT = 3  # tokens that cross-attention reads for each document


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows of documents. `rows`: for each a list of (segment, length); segment 0 is padding, a segment met
    again goes on."""

    rows: tuple[tuple[tuple[int, int], ...], ...]

    @functools.cached_property
    def segment_ids_BxL(self) -> np.ndarray:
        return np.array(
            [[segment for segment, length in row for _ in range(length)] for row in self.rows], np.int32
        )

    @functools.cached_property
    def positions_BxL(self) -> np.ndarray:
        """From 0 in each document. Padding has position 0, too, which must reset nothing."""
        positions = np.zeros_like(self.segment_ids_BxL)
        for row, segments in zip(positions, self.segment_ids_BxL):
            for segment in set(segments) - {0}:
                row[segments == segment] = np.arange((segments == segment).sum())
        return positions

    @functools.cached_property
    def memory_segment_ids_BxS(self) -> np.ndarray:
        documents = self.segment_ids_BxL.max()
        return np.tile(
            np.repeat(np.arange(1, documents + 1, dtype=np.int32), MEMORY_PER_DOCUMENT), (len(self.rows), 1)
        )


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def memory_of(layout: Layout, seed: int = 7) -> np.ndarray:
    return random(*layout.memory_segment_ids_BxS.shape, DIM, seed=seed)


def context(layout: Layout, columns: slice = slice(None), **fields: Any) -> Context:
    """The context of some columns of a layout; the memory is given apart."""
    return Context(
        jnp.asarray(layout.positions_BxL[:, columns]),
        jnp.asarray(layout.segment_ids_BxL[:, columns]),
        **fields,
    )


def _complete(cfg: MixerConfig, x_BxLxD: jax.Array, ctx: Context) -> Context:
    """Layer 1, and for a mixer that shares across layers a value of layer 0 made of each token alone."""
    ctx = ctx.replace(layer=jnp.int32(1))
    module = mixers.row(cfg).module
    if not hasattr(module, "init_shared"):
        return ctx
    token_BxL = jnp.sin(jnp.sum(x_BxLxD, axis=-1))
    shared = {
        name: jnp.sin(token_BxL[..., None] + jnp.arange(zero.shape[-1])).astype(zero.dtype)
        for name, zero in module.init_shared(cfg, x_BxLxD).items()
    }
    return ctx.replace(shared=shared)


def apply(cfg: MixerConfig, params: Any, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None):
    """(y, state, aux) of the bare mixer."""
    return mixers.row(cfg).module(cfg).apply({"params": params}, x_BxLxD, _complete(cfg, x_BxLxD, ctx), state)


jitted = jax.jit(apply, static_argnums=0, compiler_options=QUICK)


def reads_memory(cfg: MixerConfig) -> bool:
    return getattr(cfg, "cross", False)


def declared(cfg: MixerConfig) -> dict:
    """The tree of boxes that `init` makes, as shapes."""
    layout = Layout((((1, 2),),))
    x, memory = jnp.zeros((1, 2, DIM)), memory_of(layout)
    ctx = context(
        layout, memory_BxSxD=memory, memory_segment_ids_BxS=jnp.asarray(layout.memory_segment_ids_BxS)
    )
    init = mixers.row(cfg).module(cfg).init
    return jax.eval_shape(
        lambda key: init({"params": key}, x, _complete(cfg, x, ctx))["params"], jax.random.key(0)
    )


@functools.cache
def make_params(cfg: MixerConfig) -> dict:
    """Generic weights: no zeros and ones, which would hide a bias or a gain that isn't used."""

    def one(path: tuple, box: Declared) -> jax.Array:
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        fan = np.prod([n for n, axis in zip(box.value.shape, box.names) if axis in box.inputs])
        return jnp.asarray(
            random(*box.value.shape, seed=seed) / np.sqrt(fan) + (0.5 if box.role == "vector" else 0.0),
            jnp.float32,
        )

    return jax.tree_util.tree_map_with_path(
        one, declared(cfg), is_leaf=lambda leaf: isinstance(leaf, Declared)
    )


def statistics_of(aux: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], jax.Array]:
    """Path of a weight -> its statistic, through the nesting of Parallel."""
    found = {}
    for name, value in aux.items():
        if name == "statistics":
            found |= {(*path, weight): statistic for weight, statistic in value.items()}
        elif isinstance(value, dict):
            found |= statistics_of(value, (*path, name))
    return found


def with_memory(cfg: MixerConfig, ctx: Context, layout: Layout, memory_BxSxD: jax.Array) -> Context:
    if not reads_memory(cfg):
        return ctx
    segments = jnp.asarray(layout.memory_segment_ids_BxS)
    return ctx.replace(memory_BxSxD=memory_BxSxD, memory_segment_ids_BxS=segments)


def step_through(cfg: MixerConfig, params: Any, x_BxLxD: np.ndarray, layout: Layout, splits: Sequence[int]):
    """Outputs of all columns, taken in calls of `splits` columns, and the last state; memory is given once,
    at first."""
    batch, length, _ = x_BxLxD.shape
    assert sum(splits) == length
    state = mixers.row(cfg).module.init_state(cfg, batch, DIM, length, jnp.float32)
    outputs, start = [], 0
    for size in splits:
        columns = slice(start, start + size)
        ctx = context(layout, columns)
        if start == 0:
            ctx = with_memory(cfg, ctx, layout, jnp.asarray(memory_of(layout)))
        y, state, _ = jitted(cfg, params, jnp.asarray(x_BxLxD[:, columns]), ctx, state)
        outputs.append(y)
        start += size
    return np.concatenate(outputs, axis=1), state


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5, what: str = "") -> None:
    """Trees of arrays, equal up to `tolerance` times the largest entry (at least one) of each leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), what
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        bound = tolerance * max(1.0, float(np.max(np.abs(e), initial=0.0)))
        np.testing.assert_allclose(a, e, rtol=0, atol=bound, err_msg=f"{what} {jax.tree_util.keystr(path)}")
