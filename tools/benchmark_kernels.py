"""The kernels' implementations in turns, values and gradients: `python -m tools.benchmark kernels [--json]`.

On a CPU: each against the readable reference at L 2048, and how the memory of its temporaries grows with L (exponent 1 is
linear; counted by the compiler, not timed). On an accelerator every implementation that its back end has, in bfloat16 and at
longer rows, next to what a matrix product and a copy reach there.
"""

import math
import statistics
import time
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from kernels import attention, diagonal_ssm, gated_delta, linear_recurrence, selective_scan, ssd, wkv, wkv7

LENGTHS = (2048, 4096, 8192)  # of which the compiler counts the memory
Arrays = Mapping[str, jax.Array]


def _normal(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.normal(size=shape)


def _log_decay(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: -np.exp(rng.normal(size=shape) - 3)


def _positive(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: np.log1p(np.exp(rng.normal(size=shape) - 3))


def _unit(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    def draw(rng: np.random.Generator) -> np.ndarray:
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)
    return draw


def _decays(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    """A pair, real and imaginary part, of numbers within the unit circle."""
    def draw(rng: np.random.Generator) -> np.ndarray:
        radius, angle = np.exp(-0.1 * rng.random(shape)), np.pi * rng.random(shape)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    return draw


def arguments(kernel: str, B: int, L: int, D: int) -> dict[str, Callable[[np.random.Generator], np.ndarray]]:
    """By name, how each differentiated array is drawn, for a model of width D; heads of 64, or 128 where D is 1024 or more."""
    K = 128 if D >= 1024 else 64
    H = D // K
    heads, gates = (B, L, H, K), (B, L, H)
    return {
        "attention": {"q_BxLxHxK": _normal(*heads), "k_BxSxGxK": _normal(*heads), "v_BxSxGxV": _normal(*heads)},
        "ssd": {"x_BxLxHxK": _normal(*heads), "dt_BxLxH": _positive(*gates), "a_H": _log_decay(H),
                "b_BxLxGxN": _normal(B, L, 1, 128), "c_BxLxGxN": _normal(B, L, 1, 128)},
        "selective_scan": {"x_BxLxI": _normal(B, L, D), "dt_BxLxI": _positive(B, L, D),
                           "a_IxN": lambda rng: -np.broadcast_to(np.arange(1.0, 17.0), (D, 16)),
                           "b_BxLxN": _normal(B, L, 16), "c_BxLxN": _normal(B, L, 16)},
        "diagonal_ssm": {"u_BxLxCxM": _normal(B, L, D, 1), "a_CxN": _decays(D, 32), "c_CxN": _normal(2, D, 32)},
        "gated_delta": {"q_BxLxHxK": _unit(*heads), "k_BxLxHxK": _unit(*heads), "v_BxLxHxV": _normal(*heads),
                        "log_decay_BxLxH": _log_decay(*gates), "write_BxLxH": lambda rng: rng.random(gates)},
        "wkv": {"k_BxLxN": _normal(B, L, D), "v_BxLxN": _normal(B, L, D), "decay_N": _positive(D), "bonus_N": _normal(D)},
        "wkv7": {"r_BxLxHxK": _normal(*heads), "log_decay_BxLxHxK": _log_decay(*heads), "k_BxLxHxK": _normal(*heads),
                 "v_BxLxHxV": _normal(*heads), "key_BxLxHxK": _unit(*heads),
                 "removal_BxLxHxK": lambda rng: 0.5 * _unit(*heads)(rng)},
        "linear_recurrence": {"a_BxLxN": lambda rng: rng.random((B, L, D)), "x_BxLxN": _normal(B, L, D)},
    }[kernel]


KERNELS = {module.__name__.rpartition(".")[2]: module
           for module in (attention, ssd, selective_scan, diagonal_ssm, gated_delta, wkv, wkv7, linear_recurrence)}
# By back end, implementations that are made for another one: there they would only be interpreted.
ELSEWHERE = {"cpu": ("triton", "cudnn"), "tpu": ("triton", "cudnn"), "gpu": ("flash", "pallas")}
FLOAT32 = {"a_H", "a_IxN", "a_CxN", "c_CxN", "decay_N", "bonus_N"}


def gradients(kernel: str, implementation: str, L: int) -> Callable[[Arrays], tuple[jax.Array, Arrays]]:
    """The sum of a kernel's values over packed rows of two documents, and its gradients."""

    def total(arrays: Arrays) -> jax.Array:
        B = next(x.shape[0] for name, x in arrays.items() if "BxL" in name)
        places_L = jnp.arange(L)
        positions_BxL = jnp.broadcast_to(places_L % (L // 2), (B, L))
        segments_BxL = jnp.broadcast_to(1 + places_L // (L // 2), (B, L))
        if kernel == "attention":
            y = attention.attention(**arrays, q_positions_BxL=positions_BxL, k_positions_BxS=positions_BxL,
                                    q_segment_ids_BxL=segments_BxL, k_segment_ids_BxS=segments_BxL,
                                    scale=arrays["q_BxLxHxK"].shape[-1] ** -0.5, implementation=implementation)
        else:
            recurrence = getattr(KERNELS[kernel], kernel)
            y, _ = recurrence(**arrays, positions_BxL=positions_BxL, segment_ids_BxL=segments_BxL,
                              implementation=implementation)
        return jnp.sum(y.astype(jnp.float32))

    return jax.value_and_grad(total)


def drawn(kernel: str, B: int, L: int, D: int, dtype: Any) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(draw(rng), jnp.float32 if name in FLOAT32 else dtype)
            for name, draw in arguments(kernel, B, L, D).items()}


def _abstract(kernel: str, B: int, L: int, D: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(lambda: drawn(kernel, B, L, D, dtype))


def temporaries(kernel: str, implementation: str, D: int, dtype: Any) -> list[int]:
    """Bytes, at each of LENGTHS, for one row."""
    return [jax.jit(gradients(kernel, implementation, L)).lower(_abstract(kernel, 1, L, D, dtype)).compile()
            .memory_analysis().temp_size_in_bytes for L in LENGTHS]


def _seconds(compiled: Callable, arrays: Arrays, least: float) -> float:
    """A call's, over calls that take `least` seconds together."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        jax.block_until_ready(compiled(arrays))
        count += 1
    return (time.perf_counter() - began) / count


def kernels(rounds: int, seconds: float) -> dict[str, Any]:
    """By kernel: seconds of each implementation by length, its speed over the reference (median of paired rounds), memory."""
    small = jax.default_backend() == "cpu"
    B, D, dtype, lengths = (2, 256, jnp.float32, (2048,)) if small else (4, 2048, jnp.bfloat16, (2048, 4096, 8192))
    table: dict[str, Any] = {}
    for kernel, module in KERNELS.items():
        entry: dict[str, Any] = {"speed_over_reference": {}, "seconds": {}}
        for L in lengths:
            arrays = drawn(kernel, B, L, D, dtype)
            compiled = {}
            for name in module.IMPLEMENTATIONS:
                if name == "reference" and not small:
                    continue  # a token at a time, or all scores: minutes, or no room
                if name in ELSEWHERE[jax.default_backend()]:
                    continue
                try:
                    compiled[name] = jax.jit(gradients(kernel, name, L)).lower(arrays).compile()
                except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
                    logging.info("%s %s at L %d isn't for this machine: %s", kernel, name, L, str(error).splitlines()[0])
            for run in compiled.values():
                jax.block_until_ready(run(arrays))
            times: dict[str, list[float]] = {name: [] for name in compiled}
            for _ in range(rounds):
                for name, run in compiled.items():
                    times[name].append(_seconds(run, arrays, seconds))
            entry["seconds"][str(L)] = {name: statistics.median(found) for name, found in times.items()}
            if "reference" in times:
                entry["speed_over_reference"] = {
                    name: statistics.median(a / b for a, b in zip(times["reference"], found)) for name, found in times.items()}
        fast = [name for name in entry["seconds"][str(lengths[0])] if name != "reference"]
        entry["temporaries"] = {name: temporaries(kernel, name, D, dtype) for name in fast}
        entry["memory_exponent"] = {name: math.log(found[-1] / found[0]) / math.log(LENGTHS[-1] / LENGTHS[0])
                                    for name, found in entry["temporaries"].items()}
        table[kernel] = entry
        logging.info("%s: %s", kernel, entry)
    return {"kernels": table, "lengths": LENGTHS, "device": jax.devices()[0].device_kind, "roofs": roofs(dtype, small),
            "rounds": rounds}


def roofs(dtype: Any, small: bool) -> dict[str, float]:
    """What a product of normally distributed square matrices and a copy reach here: FLOP/s and bytes/s, read and written."""
    side, length = (2048, 1 << 26) if small else (8192, 1 << 30)
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    vector = jnp.zeros(length // jnp.dtype(dtype).itemsize, dtype)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    jax.block_until_ready((product(matrix), copy(vector)))
    return {"matmul_flops": 2 * side**3 / min(_seconds(product, matrix, 0.2) for _ in range(3)),
            "copy_bytes_per_second": 2 * length / min(_seconds(copy, vector, 0.2) for _ in range(3))}
