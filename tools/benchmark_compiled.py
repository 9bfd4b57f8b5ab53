"""What the TPU's compiler says of our programs, on any machine: `python -m tools.benchmark aot` (the extra `tpu`).

Counts, which don't jitter, but for the seconds of compiling, which are given as a ratio of two taken in turns.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import SingleDeviceSharding

from configs import preset
from kernels.attention import attention
from research import tpu_flags
from research.aot.compile import Compiled, compile_for, devices_of, no_cache, tpu_topology
from research.aot.report import report
from research.config import override
from research.training.program import make_program

EIGHT = "llama3_8b", "v5p:4x4x4", {"mesh.rules": "fsdp", "data.seq_len": 4096, "train.batch_size": 64}
MAXTEXT = {"arguments": 1.51e9, "temporaries": 4.51e9}  # version 0.2.5 of the same (docs/tpu.md)
LENGTHS = (2048, 4096, 8192, 16384, 32768)
VOCABULARIES = (65_536, 131_072, 262_144)


def compiled_for_tpu() -> dict[str, Any]:
    """The JSON of `tools.benchmark aot`: an 8B step's memory, attention's by length, the loss's by vocabulary, and depth."""
    tpu_flags.use("v5p")  # as `tools.aot` does; v5e's are the same
    found: dict[str, Any] = {}
    measures = {"llama3_8b": eight, "attention": lambda: attention_memory("v5p:2x2x1"),
                "attention_v5e": lambda: attention_memory("v5e:2x2"), "vocabulary": vocabulary, "depth": depth}
    for name, measure in measures.items():
        found[name] = measure()
        logging.info("%s: %s", name, found[name])
    return found


def _compile(name: str, topology: str, changes: dict[str, Any]) -> Compiled:
    return compile_for(override(preset(name), changes), tpu_topology(topology))


def eight() -> dict[str, Any]:
    """Bytes a chip and FLOPs of the 8B step that MaxText publishes, and MaxText's own."""
    found = report(_compile(*EIGHT))
    kept = {name: found["memory"][name] for name in ("arguments", "temporaries", "peak")}
    return {**kept, "flops_ratio": found["flops"]["ratio"], "compile_seconds": found["compile_seconds"], "maxtext": MAXTEXT}


def attention_memory(topology: str) -> dict[str, Any]:
    """Temporaries of attention and its gradients by length: one row of 32 heads of 128 over 8 key heads, bfloat16.

    What the compiler places in the core's own memory (VMEM) isn't in them: all of a short row's, where it has room.
    """
    device = devices_of(tpu_topology(topology))[0]
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def total(q, k, v, positions, segments):
        y = attention(q, k, v, q_positions_BxL=positions, k_positions_BxS=positions, q_segment_ids_BxL=segments,
                      k_segment_ids_BxS=segments, scale=128**-0.5)
        return jnp.sum(y.astype(jnp.float32))

    found = []
    with no_cache():
        for L in LENGTHS:
            q, k, ids = array(jnp.bfloat16, 1, L, 32, 128), array(jnp.bfloat16, 1, L, 8, 128), array(jnp.int32, 1, L)
            program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k, ids, ids).compile()
            found.append(program.memory_analysis().temp_size_in_bytes)
    steps = [math.log2(longer / shorter) for shorter, longer in zip(found, found[1:])]
    return {"temporaries": dict(zip(map(str, LENGTHS), found)), "exponents": steps,
            "exponent": math.log(found[-1] / found[0]) / math.log(LENGTHS[-1] / LENGTHS[0])}


def vocabulary() -> dict[str, Any]:
    """Temporaries a chip of the 8B's step cut to two layers, by vocabulary."""
    name, topology, changes = EIGHT
    found = {}
    for size in VOCABULARIES:
        one = _compile(name, topology, {**changes, "model.stages.0.repeats": 2, "model.vocab_size": size})
        found[str(size)] = one.memory.temporaries
    return {"temporaries": found}


# A core's own memory holds the weights of 8 narrow layers and not of 64, which the compiler treats otherwise; wide ones it
# never holds.
WIDTHS = {"narrow": {},
          "wide": {"model.dim": 1024, "model.stages.0.pattern.0.heads": 8, "model.stages.0.pattern.1.hidden": 2816}}


def depth() -> dict[str, Any]:
    """Seconds of a processor to compile and bytes of optimized HLO, 64 layers over 8, of two widths on v5e 2x2 under fsdp."""
    devices, answer = devices_of(tpu_topology("v5e:2x2")), {}
    for width, sets in WIDTHS.items():
        seconds, text = {}, {}
        for layers in (8, 64):
            program = make_program(override(preset("quickstart"), {
                **sets, "model.stages.0.repeats": layers, "mesh.rules": "fsdp", "train.batch_size": 8}), devices)
            began = time.process_time()
            with no_cache():
                text[layers] = len(program.compile().as_text())
            seconds[layers] = time.process_time() - began
        answer[width] = {"compile_ratio_64_to_8": seconds[64] / seconds[8], "hlo_ratio_64_to_8": text[64] / text[8],
                         "processor_seconds": {str(layers): found for layers, found in seconds.items()}}
    return answer
