"""What `python -m tools.benchmark gpu` measures (benchmark_gpu.py): each part gives its cases' names and figures, one by one.

A rate, a ratio or a time is {value, low, high}: the median over rounds and the extremes. What takes turns with another is
compared with it by paired rounds.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import preset
from kernels.attention import attention
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from research import hardware
from research.config import override
from research.decoding.engine import Engine
from research.decoding.sampling import Sampling
from research.models.attention import Attention, visible_keys
from research.models.lm import LanguageModel
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.mlp import GatedMlp
from research.schema import Config, DataConfig, ModelConfig, OptimConfig, Source, Stage, TrainConfig
from research.training.program import make_program
from research.training.state import init_state
from tools.benchmark_running import batch_of

QUEUE = 50  # calls that wait on the device at most
TRITON = "__gpu$xla.gpu.triton"  # what a Pallas kernel for GPUs is in the lowered text
DIFFERENCE = 0.02  # |ours - cuDNN's| over |cuDNN's|, Euclidean: five roundings of bfloat16; a wrong mask is far above
WIDTH = 128  # of a head
# Of the 1.3B model: what the backward pass keeps, and how many rows of 2,048 tokens; the first that doesn't fit ends a line.
# Compiled for a v5p the step takes 49 GB with none and 8 rows, 74 with 16, 103 with dots and 32.
TRIES = (("none", (8, 16, 32)), ("dots", (32, 64)))
Figures = dict[str, Any]
Cases = Iterator[tuple[str, Figures]]


@dataclasses.dataclass(frozen=True)
class Turns:
    """`rounds` turns of each side, of about `seconds`. `rehearse`: the shapes are tiny."""

    rounds: int
    seconds: float
    rehearse: bool = False

    def of(self, sides: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds a call, of each side and round. A turn's calls are queued and the last is waited for: the device goes
        through them in order, so that the host's time to start one doesn't count."""
        counts, found = {}, {name: [] for name in sides}
        for name, run in sides.items():
            jax.block_until_ready(run())
            began = time.perf_counter()
            jax.block_until_ready(run())
            counts[name] = max(1, min(QUEUE, round(self.seconds / (time.perf_counter() - began))))
        for _ in range(self.rounds):
            for name, run in sides.items():
                began = time.perf_counter()
                for _ in range(counts[name]):
                    last = run()
                jax.block_until_ready(last)
                found[name].append((time.perf_counter() - began) / counts[name])
        return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median over rounds, and the extremes."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def rate(work: float, seconds: Sequence[float]) -> dict[str, float]:
    return spread([work / one for one in seconds])


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How often ours fits into theirs, by paired rounds."""
    return spread([a / b for a, b in zip(theirs, ours)])


def scaled(figure: Mapping[str, float], unit: float | None) -> dict[str, float] | None:
    return None if unit is None else {name: value / unit for name, value in figure.items()}


def tried(measure: Callable[..., Figures], *arguments: Any) -> Figures:
    """Its figures, or why there are none: what JAX raises (JaxRuntimeError, of compiler and device, is a RuntimeError)."""
    try:
        return measure(*arguments)
    except (ValueError, RuntimeError) as error:
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def chip() -> hardware.Chip:
    return hardware.chip_of(jax.devices()[0])


def roofs(turns: Turns) -> Cases:
    for side in (64, 128) if turns.rehearse else (4096, 8192, 16384):
        yield f"matmul_{side}", tried(_matmul, side, turns)
    for size in (2**16,) if turns.rehearse else (2**30, 2**32):
        yield f"copy_{size}", tried(_copy, size, turns)


def _matmul(side: int, turns: Turns) -> Figures:
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    flops = rate(2 * side**3, turns.of({"product": lambda: product(a, b)})["product"])
    return {"flops_per_second": flops, "of_published": scaled(flops, chip().peak("bfloat16"))}


def _copy(size: int, turns: Turns) -> Figures:
    """Bytes read and written a second, of an array of `size` bytes."""
    array, copy = jax.random.normal(jax.random.key(0), size // 2, jnp.bfloat16), jax.jit(lambda x: x + 1)
    found = rate(2 * size, turns.of({"copy": lambda: copy(array)})["copy"])
    return {"bytes_per_second": found, "of_published": scaled(found, chip().hbm_bandwidth)}


def both_ways(run: Callable[..., jax.Array], backward: bool = True) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of (arrays, rows, dy) -> y = run(*arrays, *rows) and, with `backward`, the gradients of the arrays."""

    def forward(arrays, rows, dy):
        return (run(*arrays, *rows),)

    def forward_backward(arrays, rows, dy):
        y, pull = jax.vjp(lambda *arrays: run(*arrays, *rows), *arrays)
        return y, *pull(dy)

    return forward_backward if backward else forward


def ours(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, positions_BxL, segment_ids_BxL) -> jax.Array:
    return attention(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, q_positions_BxL=positions_BxL, k_positions_BxS=positions_BxL,
                     q_segment_ids_BxL=segment_ids_BxL, k_segment_ids_BxS=segment_ids_BxL, scale=q_BxLxHxK.shape[-1] ** -0.5)


def theirs(implementation: str, q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, positions_BxL, segment_ids_BxL) -> jax.Array:
    """JAX's own, for rows of one document."""
    return jax.nn.dot_product_attention(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, is_causal=True, implementation=implementation)


def rows_of(B: int, L: int) -> tuple[jax.Array, jax.Array]:
    """(positions_BxL, segment_ids_BxL) of rows of one document. They come as arguments, as in a model's step."""
    return jnp.tile(jnp.arange(L, dtype=jnp.int32), (B, 1)), jnp.ones((B, L), jnp.int32)


def heads_of(B: int, L: int, H: int, G: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(_normal(i, B, L, heads, WIDTH) for i, heads in enumerate((H, G, G)))


def _normal(number: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape, dtype)


def attention_over_cudnn(turns: Turns) -> Cases:
    H, tokens, lengths = (4, 64, (32,)) if turns.rehearse else (32, 16384, (2048, 4096, 8192, 16384))
    for kind, G in (("mha", H), ("gqa", H // 4)):
        for L in lengths:
            for backward in (False, True):
                name = f"{kind}_{L}_forward{'_backward' if backward else ''}"
                yield name, tried(_over_cudnn, tokens // L, L, H, G, backward, turns)


def _over_cudnn(B: int, L: int, H: int, G: int, backward: bool, turns: Turns) -> Figures:
    """FLOPs are 4 a visible pair, head and feature, and 2.5 times as many backward: five products after two."""
    arrays = heads_of(B, L, H, G), rows_of(B, L), _normal(3, B, L, H, WIDTH)
    cudnn = functools.partial(theirs, "xla" if turns.rehearse else "cudnn")
    lowered = {name: jax.jit(both_ways(run, backward)).lower(*arrays) for name, run in (("ours", ours), ("cudnn", cudnn))}
    runs = {name: functools.partial(program.compile(), *arrays) for name, program in lowered.items()}
    difference = float(_difference(runs["ours"](), runs["cudnn"]()))
    seconds = turns.of(runs)
    flops = (3.5 if backward else 1.0) * 4 * B * L * visible_keys(L, True) * H * WIDTH
    figures = {"length": L, "rows": B, "heads": H, "kv_heads": G, "implementation": implementation(lowered["ours"]),
               "over_cudnn": ratio(seconds["cudnn"], seconds["ours"]),
               "difference": difference if math.isfinite(difference) else None,
               **{name: {"seconds": spread(found), "flops_per_second": rate(flops, found)} for name, found in seconds.items()}}
    if not difference <= DIFFERENCE:  # NaN, too
        figures["failed"] = f"differs from cuDNN's by {difference:.2g} of it, more than {DIFFERENCE}"
    return figures


def implementation(lowered: Any) -> str:
    """Which it was: kernels for GPUs, or the portable form."""
    return "triton" if TRITON in lowered.as_text() else "portable"


@jax.jit
def _difference(ours: Sequence[jax.Array], theirs: Sequence[jax.Array]) -> jax.Array:
    """The largest over the arrays, of |ours - theirs| / |theirs|."""
    pairs = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(ours, theirs, strict=True)]
    return jnp.max(jnp.stack([jnp.linalg.norm(jnp.ravel(a - b)) / jnp.linalg.norm(jnp.ravel(b)) for a, b in pairs]))


def dense(remat: str, batch: int, small: bool) -> Config:
    """1.35B parameters in the shape of Llama, in float32; computed in bfloat16, AdamW, rows of 2,048."""
    dim, layers, hidden, vocab, L = (256, 2, 352, 512, 64) if small else (2048, 24, 5504, 32000, 2048)
    return Config(
        name="dense",
        model=ModelConfig(vocab_size=vocab, dim=dim, max_len=L, compute_dtype="bfloat16", remat=remat,
                          stages=(Stage((Attention(heads=dim // WIDTH), GatedMlp(hidden)), layers),)),
        data=DataConfig(sources=(Source("synthetic"),), seq_len=L),
        optim=OptimConfig(lr=3e-4, weight_decay=0.1, schedule="constant"),
        train=TrainConfig(steps=1000, batch_size=batch))


def train(turns: Turns) -> Cases:
    for remat, batches in (("none", (1,)), ("dots", (1,))) if turns.rehearse else TRIES:
        for batch in batches:
            figures = tried(_steps, dense(remat, batch, turns.rehearse), turns)
            yield f"{remat}_{batch}", figures
            if "mfu" not in figures:
                break


def _steps(config: Config, turns: Turns) -> Figures:
    """`bytes`: by the compiler's count, arguments, temporaries and outputs that aren't written over arguments."""
    device = jax.devices()[0]
    program = make_program(config, [device])
    figures: Figures = {"parameters": program.model.param_counts()["total"], "remat": config.model.remat,
                        "batch": config.train.batch_size, "length": config.data.seq_len}
    began = time.perf_counter()
    try:
        compiled = program.compile()
        memory, limits = compiled.memory_analysis(), device.memory_stats()  # a CPU has none
        figures |= {"compile_seconds": time.perf_counter() - began, "room": limits["bytes_limit"] if limits else None,
                    "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
                    - memory.alias_size_in_bytes}
        if limits and figures["bytes"] > figures["room"]:
            return {**figures, "fits": False}
        state = init_state(program.model.init, program.optimizer, program.layout, 0)
        batch = jax.device_put(batch_of(config), program.layout.batch())

        def step() -> Mapping[str, jax.Array]:
            nonlocal state
            state, metrics = compiled(state, None, batch)
            return metrics

        seconds = turns.of({"step": step})["step"]
        loss = float(step()["objective"])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**figures, "fits": False}
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    flops = rate(program.flops_per_token * program.tokens_per_step, seconds)
    return {**figures, "fits": True, "loss": loss, "step_seconds": spread(seconds), "flops_per_second": flops,
            "tokens_per_second": rate(program.tokens_per_step, seconds), "mfu": scaled(flops, chip().peak("bfloat16"))}


def scans(B: int, L: int, D: int) -> dict[str, tuple[Callable[..., jax.Array], tuple[jax.Array, ...], jax.Array]]:
    """(the function of arrays and rows, its arrays, dy) of each side, as a layer of width D has them in what was published."""
    mamba, mamba2 = Mamba(), Mamba2()
    I, H, groups, state = mamba.expand * D, mamba2.heads(D), (B, L, mamba2.groups, mamba2.state), (B, L, mamba.state)

    def steps(*shape: int) -> jax.Array:
        return jax.nn.softplus(_normal(4, *shape, dtype=jnp.float32) - 3)

    def run_ssd(x, dt, a, b, c, positions, segments):
        return ssd(x, dt, a, b, c, positions_BxL=positions, segment_ids_BxL=segments, chunk=mamba2.chunk)[0]

    def run_scan(x, dt, a, b, c, positions, segments):
        return selective_scan(x, dt, a, b, c, positions_BxL=positions, segment_ids_BxL=segments)[0]

    a_IxN = -jnp.tile(jnp.arange(1.0, mamba.state + 1), (I, 1))
    x_BxLxHxK = _normal(0, B, L, H, mamba2.head_dim)
    q, k, v = heads_of(B, L, D // WIDTH, D // WIDTH)
    return {"ssd": (run_ssd, (x_BxLxHxK, steps(B, L, H), -jnp.linspace(1.0, 16.0, H), _normal(1, *groups), _normal(2, *groups)),
                    _normal(3, *x_BxLxHxK.shape)),
            "scan": (run_scan, (x_BxLxHxK.reshape(B, L, I), steps(B, L, I), a_IxN, _normal(1, *state), _normal(2, *state)),
                     _normal(3, B, L, I)),
            "attention": (ours, (q, k, v), _normal(3, *q.shape))}


def ssd_over_others(turns: Turns) -> Cases:
    D, tokens, lengths = (128, 128, (64,)) if turns.rehearse else (2048, 16384, (1024, 2048, 4096, 8192, 16384))
    ahead = None
    for L in lengths:
        figures = tried(_scans, tokens // L, L, D, turns)
        yield f"length_{L}", figures
        wins = "over_attention" in figures and figures["over_attention"]["value"] > 1
        ahead = (ahead or L) if wins else None
    yield "ahead_of_attention", {"from_length": ahead}  # and at every longer one


def _scans(B: int, L: int, D: int, turns: Turns) -> Figures:
    """Values and all gradients."""
    rows, runs, how = rows_of(B, L), {}, {}
    for name, (run, arrays, dy) in scans(B, L, D).items():
        lowered = jax.jit(both_ways(run)).lower(arrays, rows, dy)
        runs[name], how[name] = functools.partial(lowered.compile(), arrays, rows, dy), implementation(lowered)
    seconds = turns.of(runs)
    return {"length": L, "rows": B, "width": D, "implementation": how, "over_scan": ratio(seconds["scan"], seconds["ssd"]),
            "over_attention": ratio(seconds["attention"], seconds["ssd"]),
            "seconds": {name: spread(found) for name, found in seconds.items()}}


def eight(small: bool) -> Config:
    """Llama 3 8B in bfloat16."""
    sets: dict[str, Any] = {"model.param_dtype": "bfloat16", "model.remat": "none"}
    if small:
        sets |= {"model.vocab_size": 256, "model.dim": 64, "model.stages.0.repeats": 2, "model.stages.0.pattern.0.heads": 4,
                 "model.stages.0.pattern.0.kv_heads": 2, "model.stages.0.pattern.1.hidden": 128}
    return override(preset("llama3_8b"), sets)


def decode(turns: Turns) -> Cases:
    for batch in (2,) if turns.rehearse else (1, 16):
        yield f"batch_{batch}", tried(_decoded, eight(turns.rehearse), batch, turns)


def _decoded(config: Config, batch: int, turns: Turns) -> Figures:
    """A step is what generating one more token takes: a whole generation over one of a single token, which is the prefill.

    Bytes a step are those that it can't do without: every weight but the embedding's table, and the filled part of the cache.
    """
    prompt, new, size = (32, 33, 2**16) if turns.rehearse else (896, 257, 2**32)
    model, key = LanguageModel(config.model), jax.random.key(0)
    params, engine = jax.jit(model.init)(key), Engine(model, Sampling(temperature=0.0))
    prompts = np.random.default_rng(0).integers(0, config.model.vocab_size, (batch, prompt)).tolist()
    seconds = turns.of({"prefill": lambda: engine.generate(params, prompts, 1, key),
                        "whole": lambda: engine.generate(params, prompts, new, key)})
    steps = [(whole - prefill) / (new - 1) for whole, prefill in zip(seconds["whole"], seconds["prefill"])]
    if min(steps) <= 0 and not turns.rehearse:  # tiny steps drown in a busy CPU's noise
        raise ValueError(f"{new} tokens took no longer than one: the clock is too coarse for this")
    context = prompt + new // 2
    weights = sum(x.nbytes for name, tree in params.items() if name != "embedding" for x in jax.tree.leaves(tree))
    cache = batch * model.state_bytes(context)
    moved, copied = rate(weights + cache, steps), _copy(size, turns)["bytes_per_second"]
    return {"batch": batch, "context": context, "new_tokens": new, "weight_bytes": weights, "cache_bytes": cache,
            "step_seconds": spread(steps), "prefill_seconds": spread(seconds["prefill"]),
            "tokens_per_second": rate(batch, steps), "bytes_per_second": moved, "copy_bytes_per_second": copied,
            "of_copy": scaled(moved, copied["value"]), "of_published": scaled(moved, chip().hbm_bandwidth)}
