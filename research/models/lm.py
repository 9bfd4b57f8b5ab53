"""A model: embedding, stages of scanned layers, heads. It returns hidden states; the heads are separate (`heads.py`)."""

import dataclasses
import functools
from typing import Any, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.models import mixers
from research.models.context import Context
from research.models.heads import HEADS
from research.models.norm import NormLayer
from research.params import LAYERS, Declared, Weight, flatten, normal, param, unflatten, weights_of
from research.schema import ModelConfig, Stage
from research.sharding import constrain

BLOCK_AXES = ("batch", "length", "embed")
LAYER_INPUT = "layer_input"
REMAT = {"full": None, "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
         "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
             names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT], offload_src="device",
             offload_dst="pinned_host")}


class Embedding(nn.Module):
    """tokens_BxL -> x_BxLxD in the dtype of the parameters, with positions and norm as configured; no tokens: table_VxD."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens_BxL: jax.Array | None = None, positions_BxL: jax.Array | None = None) -> jax.Array:
        cfg = self.cfg
        role = "input+output" if cfg.tie_embeddings else "input"
        table_VxD = param(self, "table", (cfg.vocab_size, cfg.dim), ("vocab", "embed"), normal(0.02), inputs=("vocab",),
                          role=role)
        if tokens_BxL is None:
            return table_VxD
        x_BxLxD = jnp.take(table_VxD, tokens_BxL, axis=0) * cfg.scales.embedding
        if cfg.positions == "learned":
            table_PxD = param(self, "positions", (cfg.max_len, cfg.dim), ("position", "embed"), normal(0.02),
                              inputs=("position",), role="input")
            x_BxLxD += jnp.take(table_PxD, positions_BxL, axis=0)
        if cfg.positions == "sinusoidal":
            x_BxLxD += sinusoids(positions_BxL, cfg.dim).astype(x_BxLxD.dtype)
        if cfg.embedding_norm:
            x_BxLxD = NormLayer(cfg.norm, name="norm")(x_BxLxD)
        return constrain(x_BxLxD, BLOCK_AXES)


def sinusoids(positions_BxL: jax.Array, dim: int) -> jax.Array:
    """Sines in the first half of the width, cosines in the second (Vaswani et al. 2017, section 3.5), float32."""
    half = dim // 2
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / max(half, 1))
    angle = positions_BxL[..., None].astype(jnp.float32) * frequency
    wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.pad(wave, ((0, 0), (0, 0), (0, dim - 2 * half)))


class Layer(nn.Module):
    """One repeat of a stage's pattern. The block around a mixer owns norm, residual and dropout."""

    cfg: ModelConfig
    stage: Stage

    @nn.compact
    def __call__(self, carry, layer: jax.Array, state: dict | None, ctx: Context):
        x_BxLxD, shared = carry
        if self.cfg.remat == "offload":
            x_BxLxD = checkpoint_name(x_BxLxD, LAYER_INPUT)
        states, auxes = {}, {}
        for index, (name, mixer_cfg) in enumerate(mixers.named(self.stage.pattern)):
            norm = NormLayer(self.cfg.norm, name=f"norm_{index}")
            key = None if ctx.key is None else jax.random.fold_in(jax.random.fold_in(ctx.key, layer), index)
            inner = ctx.replace(layer=layer, shared=shared, key=key)
            pre = self.cfg.norm.placement == "pre"
            y_BxLxD, new_state, aux = mixers.row(mixer_cfg).module(mixer_cfg, name=name)(
                norm(x_BxLxD) if pre else x_BxLxD, inner, None if state is None else state[name])
            if "shared" in aux:
                shared = aux["shared"]
            y_BxLxD = dropout(y_BxLxD * self.cfg.scales.residual, self.cfg.dropout, inner)
            x_BxLxD = x_BxLxD + y_BxLxD if pre else norm(x_BxLxD + y_BxLxD)
            x_BxLxD = constrain(x_BxLxD, BLOCK_AXES)
            states[name] = new_state
            auxes[name] = {key: value for key, value in aux.items() if key != "shared"}
        auxes = {name: aux for name, aux in auxes.items() if aux}
        return (x_BxLxD, shared), (None if state is None else states, auxes)


def dropout(x: jax.Array, rate: float, ctx: Context) -> jax.Array:
    if rate == 0.0 or ctx.deterministic:
        return x
    keep = jax.random.bernoulli(ctx.key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class Backbone(nn.Module):
    """Stages, each one scan, so that compile time doesn't grow with depth; then the final norm of a pre-norm model."""

    cfg: ModelConfig
    stages: tuple[Stage, ...]

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, ctx: Context, state: dict | None = None):
        shared = {} if ctx.shared is None else ctx.shared
        states, auxes, offset = {}, {}, 0
        for index, stage in enumerate(self.stages):
            name = f"stage_{index}"
            layer_class = Layer
            if self.cfg.remat != "none" and state is None:
                layer_class = nn.remat(Layer, policy=REMAT[self.cfg.remat], prevent_cse=False)
            scanned = nn.scan(
                layer_class, variable_axes={"params": 0, "adapters": 0}, split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast), length=stage.repeats, unroll=min(self.cfg.unroll, stage.repeats),
                metadata_params={nn.PARTITION_NAME: LAYERS})
            layers = jnp.arange(offset, offset + stage.repeats)
            (x_BxLxD, shared), (new_state, aux) = scanned(self.cfg, stage, name=name)(
                (x_BxLxD, shared), layers, None if state is None else state[name], ctx)
            states[name] = new_state
            if aux:
                auxes[name] = aux
            offset += stage.repeats
        if self.cfg.norm.placement == "pre":
            x_BxLxD = NormLayer(self.cfg.norm, name="final_norm")(x_BxLxD)
        return x_BxLxD, None if state is None else states, auxes


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A decoder, or an encoder and a decoder, with heads; pure functions of a plain dict of parameters.

    `heads`: names in HEADS besides the unembedding (`reward`, `value`).
    `shared`: what a model passes across layers: names -> trailing shape of a (B, L, ...) array that starts as zeros.
    """

    cfg: ModelConfig
    heads: tuple[str, ...] = ()

    @functools.cached_property
    def weights(self) -> dict[str, Weight]:
        """`describe`: every weight by path, without allocating one."""
        return weights_of(jax.eval_shape(self._boxed, jax.random.key(0)))

    def init(self, key: jax.Array) -> dict:
        """Parameters as nested dicts of arrays in `param_dtype`; jit with `out_shardings` to make them in place."""
        dtype = jnp.dtype(self.cfg.param_dtype)
        boxed = self._boxed(key)
        return jax.tree.map(lambda box: box.value.astype(dtype), boxed, is_leaf=lambda x: isinstance(x, Declared))

    def _boxed(self, key: jax.Array) -> dict:
        cfg = self.cfg
        tokens, ctx = jnp.zeros((1, 1), jnp.int32), Context(*[jnp.ones((1, 1), jnp.int32)] * 2, key=key)
        x_1x1xD = jnp.zeros((1, 1, cfg.dim), jnp.float32)
        modules: dict[str, tuple[nn.Module, tuple]] = {"embedding": (Embedding(cfg), (tokens, tokens))}
        if cfg.encoder_stages:
            modules["encoder"] = (Backbone(cfg, cfg.encoder_stages), (x_1x1xD, ctx))
            ctx = ctx.replace(memory_BxSxD=x_1x1xD, memory_segment_ids_BxS=tokens)
        modules["decoder"] = (Backbone(cfg, cfg.stages), (x_1x1xD, self._with_shared(ctx, x_1x1xD)))
        for name in (*(() if cfg.tie_embeddings else ("unembedding",)), *self.heads):
            modules[name] = (HEADS[name](cfg), ())
        keys = jax.random.split(key, len(modules))
        return {name: module.init({"params": k}, *args)["params"] for k, (name, (module, args)) in zip(keys, modules.items())}

    def _with_shared(self, ctx: Context, x_BxLxD: jax.Array) -> Context:
        """Zeros for what the mixers share across layers, as they declare it."""
        shared: dict[str, jax.Array] = {}
        for stage in self.cfg.stages:
            for mixer in stage.pattern:
                module = mixers.row(mixer).module
                if hasattr(module, "init_shared"):
                    shared |= module.init_shared(mixer, x_BxLxD)
        return ctx.replace(shared=shared)

    def cast(self, params: Mapping) -> dict:
        """Parameters in the compute dtype; vectors stay as they are (their sums are done in float32)."""
        dtype = jnp.dtype(self.cfg.compute_dtype)
        roles = {path: weight.role for path, weight in self.weights.items()}

        def one(path: tuple, value: jax.Array) -> jax.Array:
            return value if roles["/".join(k.key for k in path)] == "vector" else value.astype(dtype)

        return jax.tree_util.tree_map_with_path(one, dict(params))

    def encode(self, params: Mapping, tokens_BxS: jax.Array, ctx: Context, adapters: Mapping | None = None) -> jax.Array:
        """memory_BxSxD of the encoder, which reads in both directions whatever `ctx.mask_kind` says."""
        params = self.cast(params)
        ctx = ctx.replace(mask_kind="bidirectional")
        x = _apply(Embedding(self.cfg), "embedding", params, adapters, tokens_BxS, ctx.positions_BxL)
        memory, _, _ = _apply(Backbone(self.cfg, self.cfg.encoder_stages), "encoder", params, adapters, x, ctx)
        return memory

    def hidden(
        self, params: Mapping, tokens_BxL: jax.Array, ctx: Context, state: dict | None = None,
        adapters: Mapping | None = None,
    ) -> tuple[jax.Array, dict | None, dict]:
        """(hidden_BxLxD in the compute dtype, new state or None, aux by stage and mixer, stacked over layers)."""
        params = self.cast(params)
        x = _apply(Embedding(self.cfg), "embedding", params, adapters, tokens_BxL, ctx.positions_BxL)
        x = dropout(x, self.cfg.dropout, ctx)
        return _apply(Backbone(self.cfg, self.cfg.stages), "decoder", params, adapters, x, self._with_shared(ctx, x), state)

    def unembedding(self, params: Mapping, adapters: Mapping | None = None) -> jax.Array:
        """W_DxV in the compute dtype; the embedding's transpose where they are tied."""
        params = self.cast(params)
        if self.cfg.tie_embeddings:
            return _apply(Embedding(self.cfg), "embedding", params, adapters).T
        return _apply(HEADS["unembedding"](self.cfg), "unembedding", params, adapters)

    def init_state(self, batch: int, max_len: int) -> dict:
        """Decode state for `batch` rows of at most `max_len` tokens, by stage and mixer, stacked over layers."""
        dtype = jnp.dtype(self.cfg.compute_dtype)
        return {
            f"stage_{i}": mixers.stack({
                name: mixers.row(m).module.init_state(m, batch, self.cfg.dim, max_len, dtype)
                for name, m in mixers.named(stage.pattern)}, stage.repeats)
            for i, stage in enumerate(self.cfg.stages)}

    def state_axes(self) -> dict:
        """Logical axes of `init_state`, `layers` in front."""
        return {
            f"stage_{i}": {
                name: jax.tree.map(lambda axes: (LAYERS, *axes), mixers.row(m).module.state_axes(m),
                                   is_leaf=lambda x: isinstance(x, tuple))
                for name, m in mixers.named(stage.pattern)}
            for i, stage in enumerate(self.cfg.stages)}

    def state_bytes(self, seq_len: int) -> int:
        """Bytes of one sequence's decode state after `seq_len` tokens."""
        dtype = jnp.dtype(self.cfg.compute_dtype)
        return sum(stage.repeats * mixers.state_bytes(m, self.cfg.dim, seq_len, dtype)
                   for stage in self.cfg.stages for m in stage.pattern)

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """Algorithmic forward FLOPs a token: mixers and unembedding (an encoder's counted as long as the decoder's row)."""
        total = 2.0 * self.cfg.dim * self.cfg.vocab_size
        for stages, mask in ((self.cfg.stages, causal), (self.cfg.encoder_stages, False)):
            total += sum(stage.repeats * mixers.row(m).module.flops(m, self.cfg.dim, seq_len, mask)
                         for stage in stages for m in stage.pattern)
        return total

    def param_counts(self) -> dict[str, int]:
        """total; active: what one token passes through (experts by their share); non_embedding: hidden and vectors."""
        counts = {"total": 0, "active": 0, "non_embedding": 0}
        for path, weight in self.weights.items():
            share = 1.0
            if "expert" in weight.axes:
                cfg = self.mixer_at(path)
                share = mixers.row(cfg).module.active_share(cfg)
            counts["total"] += weight.size
            counts["active"] += round(weight.size * share)
            counts["non_embedding"] += weight.size if weight.role in ("hidden", "vector") else 0
        return counts

    def mixer_at(self, path: str) -> mixers.MixerConfig:
        """The config of the mixer that owns the weight at `path` (`decoder/stage_0/moe_1/router`), in Parallel, too."""
        tower, stage, *names, _ = path.split("/")
        stages = self.cfg.encoder_stages if tower == "encoder" else self.cfg.stages
        pattern = stages[int(stage.removeprefix("stage_"))].pattern
        for name in names:
            cfg = dict(mixers.named(pattern))[name]
            pattern = cfg.mixers if isinstance(cfg, mixers.Parallel) else ()
        return cfg

    def apply_statistics(self, params: Mapping, statistics: Mapping[str, jax.Array]) -> dict:
        """Weights that learn from statistics, not gradients (a MoE balancing bias), after a whole step's were summed.

        `statistics` maps the weight's path to the stacked sums of its layers; the mixer's `update_weight` has the rule.
        """
        flat = flatten(params)
        for path, statistic in statistics.items():
            cfg = self.mixer_at(path)
            update = functools.partial(mixers.row(cfg).module.update_weight, cfg, path.rsplit("/", 1)[1])
            flat[path] = jax.vmap(update)(flat[path], statistic)
        return unflatten(flat)


def read_aux(aux: Mapping) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """aux of `hidden` -> (sum of the auxiliary losses, metrics, statistics by the path of the weight they are for).

    A metric is the mean over a stage's layers, one called max_* or min_* their extreme: one layer that collapsed is seen.
    """
    loss, metrics, statistics = jnp.float32(0.0), {}, {}

    def walk(path: str, entries: Mapping) -> None:
        nonlocal loss
        for name, value in entries.items():
            if name == "statistics":
                statistics.update({f"decoder/{path}/{weight}": v for weight, v in value.items()})
            elif isinstance(value, Mapping):  # a mixer; within Parallel, one more
                walk(f"{path}/{name}", value)
            else:
                if name.endswith("_loss"):
                    loss += jnp.sum(value)
                over_layers = {"max": jnp.max, "min": jnp.min}
                kind = name.split("_")[0]
                metrics[f"{path}/{name}"] = (over_layers[kind] if kind in over_layers else jnp.mean)(value)

    for stage, by_mixer in aux.items():
        walk(stage, by_mixer)
    return loss, metrics, statistics


def _variables(name: str, params: Mapping, adapters: Mapping | None) -> dict[str, Any]:
    variables = {"params": params[name]}
    if adapters and name in adapters:
        variables["adapters"] = adapters[name]
    return variables


def _apply(module: nn.Module, name: str, params: Mapping, adapters: Mapping | None, *args: Any) -> Any:
    return module.apply(_variables(name, params, adapters), *args)
