"""Measures what docs/performance.md quotes: `python -m tools.benchmark VERB [--json]`

`train`: our step and torch + transformers' Llama of the same shapes (extra `hf`, and torch) take turns, each in a process
of its own, so that a slow moment of a shared machine hits both; the ratio is the median over rounds. Ceiling: this machine's
best float32 matrix product, measured between the turns. `mixers`: recurrent ones against attention, by length. `data` compares
tokenizing and loading with Hugging Face's, `start` times a launch to its first step, `memory` counts temporaries of the loss
and of the d256 step, `checkpoint` what saving costs the loop, `watched` what guard, logs and saves cost a run without faults;
`kernels`: implementations in turns; `aot`: what the TPU's compiler says, without a TPU; `gpu`: what is asked of an H200, in a
JSON, where one is (benchmark_gpu.py). Nothing here is a test: of seconds, only the paired ratios mean anything.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any, Mapping

import jax
import numpy as np
from absl import flags, logging

from configs import PRESETS
from experiments import command_line
from research.config import MixerConfig, nearest
from research.environment import keep_freed_memory
from research.errors import InputError
from research.models.attention import Attention
from research.models.gated_delta import GatedDelta
from research.models.h3 import H3
from research.models.mamba import Mamba
from research.models.mamba2 import Mamba2
from research.models.mlp import GatedMlp
from research.models.rglru import RgLru
from research.models.rwkv4 import Rwkv4ChannelMix, Rwkv4TimeMix
from research.models.rwkv7 import Rwkv7ChannelMix, Rwkv7TimeMix
from research.models.s4 import S4
from research.models.s4d import S4d
from research.schema import Config, DataConfig, ModelConfig, OptimConfig, Source, Stage, TrainConfig
from tools.benchmark_compiled import compiled_for_tpu
from tools.benchmark_gpu import PARTS, gpu
from tools.benchmark_gpu_parts import Turns
from tools.benchmark_kernels import kernels
from tools.benchmark_running import batch_of, checkpoints, input_side, loss_memory, running, start, step_memory, watched

command_line.define_json_flag()
flags.DEFINE_list("cases", [], "Which to measure: of train, of mixers, or parts of gpu; all if not given.")
flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
flags.DEFINE_float("seconds", 6.0, "Length of a turn.", lower_bound=0.1)
flags.DEFINE_boolean("torch", True, "Measure torch, too, where it and transformers are installed.")
flags.DEFINE_string("output", None, "Of gpu: a file for the JSON, written after each part, instead of printing it.")
flags.DEFINE_boolean("rehearse", False, "Of gpu: all its parts at tiny shapes on the CPU, to see that the code runs.")
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def case(dim: int, layers: int, heads: int, hidden: int, batch: int) -> Config:
    """Llama of these widths: float32, AdamW, clipping, vocabulary 8192, rows of 256; layers unrolled, as suits a CPU."""
    return Config(
        name=f"d{dim}",
        model=ModelConfig(vocab_size=8192, dim=dim, max_len=256, unroll=layers,
                          stages=(Stage((Attention(heads=heads), GatedMlp(hidden=hidden)), layers),)),
        data=DataConfig(sources=(Source("synthetic"),), seq_len=256),
        optim=OptimConfig(lr=3e-4, weight_decay=0.1, schedule="constant"),
        train=TrainConfig(steps=1000, batch_size=batch))


def row(name: str, pattern: tuple[MixerConfig, ...], repeats: int, length: int, batch: int, remat: str = "none") -> Config:
    """A model of width 256 and about 3.2 million weights in its layers; rows of one document each."""
    return Config(
        name=name,
        model=ModelConfig(vocab_size=1024, dim=256, max_len=length, stages=(Stage(pattern, repeats),), remat=remat),
        data=DataConfig(sources=(Source("synthetic"),), seq_len=length),
        optim=OptimConfig(lr=3e-4, weight_decay=0.1, schedule="constant"),
        train=TrainConfig(steps=1000, batch_size=batch))


ATTENTION = (Attention(heads=4), GatedMlp(hidden=704))
RECURRENT: dict[str, tuple[tuple[MixerConfig, ...], int]] = {
    "mamba2": ((Mamba2(state=64, chunk=64),), 8),
    "linear_attention": ((GatedDelta(heads=4, key_dim=64, delta=False), GatedMlp(hidden=704)), 4),
    "gated_delta": ((GatedDelta(heads=4, key_dim=64), GatedMlp(hidden=704)), 4),
    "mamba": ((Mamba(),), 8),
    "s4": ((S4(), GatedMlp(hidden=704)), 4),
    "s4d": ((S4d(), GatedMlp(hidden=704)), 4),
    "h3": ((H3(), GatedMlp(hidden=704)), 4),
    "rglru": ((RgLru(heads=4), GatedMlp(hidden=704)), 4),
    "rwkv4": ((Rwkv4TimeMix(depth=4), Rwkv4ChannelMix(hidden=1024, depth=4)), 4),
    "rwkv7": ((Rwkv7TimeMix(depth=4), Rwkv7ChannelMix(hidden=1024, depth=4)), 4),
    "control": ((GatedMlp(hidden=704), GatedMlp(hidden=352)), 4),  # no token sees another: what the machine adds with length
}
LENGTHS = (1024, 4096, 16384)
REMAT = {"gated_delta", "mamba2", "rwkv7"}  # with `dots`: as fast for long rows, whose temporaries stay below 2 GB then (docs)

CASES = {"d256": case(256, 6, 4, 704, 8), "d512": case(512, 8, 8, 1408, 4)}


def ours(pipe: Connection, config: Config) -> None:
    """A worker: answers each "seconds" it is sent with (steps, seconds, seconds of its processors); stops at None."""
    keep_freed_memory()
    from research.training.program import make_program
    from research.training.state import init_state

    program = make_program(config)
    began = time.perf_counter()
    compiled = program.compile()
    compile_seconds = time.perf_counter() - began
    state = init_state(program.model.init, program.optimizer, program.layout, 0)
    batch = jax.device_put(batch_of(config), program.layout.batch())
    state, metrics = compiled(state, None, batch)
    jax.block_until_ready(metrics)
    pipe.send({"compile_seconds": compile_seconds, "flops": program.flops_per_token * program.tokens_per_step})
    while (seconds := pipe.recv()) is not None:
        state, metrics = compiled(state, None, batch)  # not counted: after a pause its memory may be cold, or gone
        jax.block_until_ready(metrics)
        steps, began, busy = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            state, metrics = compiled(state, None, batch)
            jax.block_until_ready(metrics)
            steps += 1
        pipe.send((steps, time.perf_counter() - began, time.process_time() - busy))


def theirs(pipe: Connection, config: Config) -> None:
    """The same for transformers' LlamaForCausalLM with torch's AdamW (fused), clipping at 1; eager, as people run it."""
    keep_freed_memory()
    import torch
    import transformers

    attention, mlp = config.model.stages[0].pattern
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.model.vocab_size, hidden_size=config.model.dim, intermediate_size=mlp.hidden,
        num_hidden_layers=config.model.stages[0].repeats, num_attention_heads=attention.heads,
        num_key_value_heads=attention.heads, max_position_embeddings=config.model.max_len, use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    tokens = torch.from_numpy(batch_of(config)["tokens_BxL"][0].astype(np.int64))

    def step() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    pipe.send({"threads": torch.get_num_threads(), "version": torch.__version__})
    while (seconds := pipe.recv()) is not None:
        step()  # not counted
        steps, began, busy = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            step()
            steps += 1
        pipe.send((steps, time.perf_counter() - began, time.process_time() - busy))


def ceiling(pipe: Connection, _: Config) -> None:
    """The best float32 matrix product for a moment: answers (FLOP/s, 1, 1)."""
    from research import hardware

    pipe.send({})
    while pipe.recv() is not None:
        hardware.measured_cpu_peak.cache_clear()
        pipe.send((hardware.measured_cpu_peak(), 1.0, 1.0))


class Worker:
    """A process that measures one side, waiting in between without using the machine."""

    def __init__(self, target: Any, config: Config):
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=target, args=(far, config), daemon=True)
        self._process.start()
        far.close()
        self.about = self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the measuring process ended with exit code {self._process.exitcode}") from None

    def rates(self, seconds: float) -> tuple[float, float]:
        """Steps over a turn, per second and per second of a processor."""
        self._pipe.send(seconds)
        count, took, busy = self._receive()
        return count / took, count / busy

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def turn_alone(target: Any, config: Config, seconds: float) -> tuple[float, float]:
    """The rates of one turn of a process that ends with it: those that wait keep memory, which slows large steps."""
    worker = Worker(target, config)
    try:
        return worker.rates(seconds)
    finally:
        worker.close()


def measure(name: str, config: Config, rounds: int, seconds: float, with_torch: bool) -> dict[str, Any]:
    """The JSON entry of one case: medians over rounds, and every round's ratio."""
    sides = {"ours": Worker(ours, config), "ceiling": Worker(ceiling, config)}
    if with_torch:
        sides["torch"] = Worker(theirs, config)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, worker in sides.items():
            rates[side].append(worker.rates(seconds)[0])
        logging.info("%s round %d/%d: %s", name, number + 1, rounds,
                     ", ".join(f"{side} {values[-1]:.4g}" for side, values in rates.items()))
    for worker in sides.values():
        worker.close()
    tokens = config.train.batch_size * config.data.seq_len
    flops = sides["ours"].about["flops"]
    shares = [rate * flops / peak for rate, peak in zip(rates["ours"], rates["ceiling"])]
    ratios = [a / b for a, b in zip(rates["ours"], rates["torch"])] if with_torch else []
    return {"name": name, "ours_tokens_per_second": statistics.median(rates["ours"]) * tokens,
            "torch_tokens_per_second": statistics.median(rates["torch"]) * tokens if with_torch else None,
            "ratio": statistics.median(ratios) if ratios else None, "ratios": ratios,
            "ceiling_share": statistics.median(shares), "ceiling_flops": statistics.median(rates["ceiling"]),
            "about": {side: worker.about for side, worker in sides.items()}}


def compile_ratio() -> float:
    """Seconds to compile 64 layers over those for 8, without the persistent cache; the least of four tries each."""
    from research.aot.compile import no_cache
    from research.config import override
    from research.training.program import make_program

    times: dict[int, list[float]] = {8: [], 64: []}
    with no_cache():
        for _ in range(4):
            for layers, found in times.items():
                config = override(CASES["d256"], {"model.stages.0.repeats": layers, "model.dim": 64, "train.batch_size": 2,
                                                     "model.unroll": 1})
                program = make_program(config)
                began = time.perf_counter()
                program.compile()
                found.append(time.perf_counter() - began)
    return min(times[64]) / min(times[8])


def has_torch() -> bool:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        logging.warning("torch or transformers is missing: pip install torch -e '.[hf]' to measure against it")
        return False
    return True


def chosen(table: Mapping[str, Any]) -> list[str]:
    """Names of `table` that --cases asks for; all where it isn't given."""
    for name in FLAGS.cases:
        if name not in table:
            raise InputError("--cases", f"unknown {name!r}", nearest(name, list(table)))
    return FLAGS.cases or list(table)


def train() -> dict[str, Any]:
    names, with_torch = chosen(CASES), FLAGS.torch and has_torch()
    cases = [measure(name, CASES[name], FLAGS.rounds, FLAGS.seconds, with_torch) for name in names]
    real = running(PRESETS["quickstart"]())
    return {"cases": cases, "compile_ratio_64_to_8": compile_ratio(), "data_wait_share": real["data_wait_share"],
            "recompilations": real["recompilations"], "rounds": FLAGS.rounds, "seconds": FLAGS.seconds,
            "allocator": "glibc trim_threshold=2^31-1 mmap_max=0 arena_max=1, both sides"}


def mixers() -> dict[str, Any]:
    """Recurrent mixers at L 4096 over attention at L 1024, in turns; and how their whole cost grows with L.

    `ratio`: tokens a second over attention's; `exponent`: of the seconds of one row against L; medians of paired rounds.
    `processor_ratio`, `processor_exponent`: the same of seconds of the processors, which other jobs hardly change.
    """
    names, found = chosen(RECURRENT), []
    attention = row("attention", ATTENTION, 4, 1024, 4)
    with tempfile.TemporaryDirectory() as cache:  # each program is compiled once, whatever the rounds
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        for name in names:
            rows = {length: row(name, *RECURRENT[name], length, 1, "dots" if name in REMAT else "none") for length in LENGTHS}
            rounds = []  # of each: tokens a second, and a processor's second: of attention, and of each length
            for _ in range(FLAGS.rounds):
                base_2 = 4096 * np.array(turn_alone(ours, attention, FLAGS.seconds))
                rounds.append([base_2] + [length * np.array(turn_alone(ours, config, FLAGS.seconds))
                                          for length, config in rows.items()])
            rates_RxCx2 = np.array(rounds)
            ratios_Rx2 = rates_RxCx2[:, 1 + LENGTHS.index(4096)] / rates_RxCx2[:, 0]
            seconds_RxCx2 = np.array(LENGTHS)[:, None] / rates_RxCx2[:, 1:]
            exponents_Rx2 = np.array([np.polyfit(np.log(LENGTHS), np.log(seconds_Cx2), 1)[0] for seconds_Cx2 in seconds_RxCx2])
            (ratio, processor_ratio), (exponent, processor_exponent) = np.median(ratios_Rx2, 0), np.median(exponents_Rx2, 0)
            found.append({"name": name, "ratio": float(ratio), "exponent": float(exponent),
                          "processor_ratio": float(processor_ratio), "processor_exponent": float(processor_exponent),
                          "ratios": ratios_Rx2[:, 0].tolist(), "exponents": exponents_Rx2[:, 0].tolist(),
                          "tokens_per_second": dict(zip(map(str, LENGTHS), np.median(rates_RxCx2[:, 1:, 0], 0).tolist()))})
            logging.info("%s", found[-1])
    return {"mixers": found, "attention_length": 1024, "rounds": FLAGS.rounds, "seconds": FLAGS.seconds}


VERBS = {"train": train, "mixers": mixers, "data": lambda: input_side(FLAGS.rounds), "start": lambda: start(FLAGS.rounds),
         "memory": lambda: {**loss_memory(), "d256_step": step_memory(CASES["d256"])}, "checkpoint": checkpoints,
         "watched": lambda: watched(max(FLAGS.rounds, 2)), "aot": compiled_for_tpu,
         "kernels": lambda: kernels(FLAGS.rounds, FLAGS.seconds / 4),
         "gpu": lambda: gpu(chosen(PARTS), Turns(FLAGS.rounds, FLAGS.seconds / 30, FLAGS.rehearse), FLAGS.output)}


def main(argv: list[str]) -> int:
    verb = argv[1] if len(argv) > 1 else ""
    if verb not in VERBS:
        raise InputError("verb", f"unknown {verb!r}" if verb else "is missing", nearest(verb, list(VERBS)))
    answer = VERBS[verb]()
    if FLAGS.json or (verb != "train" and not FLAGS.output):
        command_line.print_json(answer)
    if FLAGS.json or verb != "train":
        return 1 if "failed" in answer and answer["failed"] else 0
    for entry in answer["cases"]:
        ratio = f"{entry['ratio']:.2f}x torch" if entry["ratio"] else "torch not measured"
        print(f"{entry['name']}: {entry['ours_tokens_per_second']:,.0f} tokens/s, {ratio}, "
              f"{100 * entry['ceiling_share']:.0f}% of the ceiling")
    print(f"waiting for data: {100 * answer['data_wait_share']:.2f}% of the quickstart's steps, {answer['recompilations']} "
          "recompilations after the first")
    print(f"compile time of 64 layers over 8: {answer['compile_ratio_64_to_8']:.2f}")
    return 0


if __name__ == "__main__":
    command_line.run(main, arguments=True)
