"""What `tools.benchmark` measures besides the step: data, start-up, checkpoints, watching, and the loss's memory."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from typing import Any, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from configs import PRESETS
from research.config import override
from research.schema import LEDGER_PREFIX, METRICS_PREFIX, Config
from research.training.program import Program, make_program

COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of jax.monitoring for each program that XLA compiles


def running(config: Config, steps: int = 40) -> dict[str, float]:
    """Steps with the real loader, as the loop takes them: share of time waiting for data, programs compiled after step 1."""
    program = make_program(config)
    compiled = program.compile()
    state, loader = _bare_parts(program)
    programs: list[float] = []

    def note(event: str, duration: float, **_: Any) -> None:
        if event == COMPILED:
            programs.append(duration)

    waited, began, pending = 0.0, time.perf_counter(), {}
    for number in range(steps + 1):
        if number == 1:  # the first step also compiles what puts its batch in place
            jax.monitoring.register_event_duration_secs_listener(note)
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        state, metrics = compiled(state, None, batch)
        jax.device_get(pending)  # of the step before, as the loop does
        pending = metrics
    jax.block_until_ready(state)
    took = time.perf_counter() - began
    jax.monitoring.clear_event_listeners()
    loader.close()
    return {"data_wait_share": waited / took, "recompilations": len(programs), "steps": steps, "step_seconds": took / steps}


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """A step's: one microbatch of whole rows of one document, with random tokens."""
    rng = np.random.default_rng(0)
    shape = (1, config.train.batch_size, config.data.seq_len)
    tokens = rng.integers(0, config.model.vocab_size, (*shape[:2], shape[2] + 1)).astype(np.int32)
    return {"tokens_BxL": tokens[..., :-1], "targets_BxL": tokens[..., 1:], "weights_BxL": np.ones(shape, np.float32),
            "positions_BxL": np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape),
            "segment_ids_BxL": np.ones(shape, np.int32)}


def watched(rounds: int, block: int = 20, save_every: int = 100) -> dict[str, Any]:
    """What guard, logs, TensorBoard, goodput and saves cost a run of the quickstart that no fault happens to.

    One process: after each `block` steps of `loop.run` come as many of the bare loop (loader, the same compiled step, the loss
    read a step late), so that a slow moment of a shared machine hits both. They change places half a block after a save is
    due, when its writing should be over; what background threads do in the other side's turn is charged to that side. A round
    is `save_every` steps, and its last block has the save. `between_saves` is what the other blocks take longer, `save_seconds`
    what that one takes longer still, and `slowdown` the first and the second over the preset's own minutes between saves:
    medians (other jobs come in bursts), with 95% bootstrap intervals.
    """
    from research.evaluation.statistics import bootstrap
    from research.training import loop
    from research.training.session import Launch

    preset = PRESETS["quickstart"]()
    config = override(preset, {
        "train.steps": str((rounds + 1) * save_every + block), "optim.warmup_steps": "5", "train.eval_every": "0",
        "train.sample_every": "0", "checkpoint.every_steps": str(save_every), "checkpoint.every_minutes": "0"})
    found: dict[str, list[float]] = {"run": [], "bare": []}
    make_program = loop.make_program

    def make_watched(*arguments: Any) -> Any:
        program = make_program(*arguments)
        return _Alternating(**{field.name: getattr(program, field.name) for field in dataclasses.fields(program)}, block=block,
                            found=found)

    with tempfile.TemporaryDirectory() as directory, unittest.mock.patch.object(loop, "make_program", make_watched):
        loop.run(config, Launch(workdir=directory + "/run", preset=preset))
    blocks = save_every // block
    # What came before the first save warms up.
    run_RxN, bare_RxN = (np.reshape(found[side][blocks:blocks * (rounds + 1)], (rounds, blocks)) for side in ("run", "bare"))
    between_saves = 60 * preset.checkpoint.every_minutes

    def parts(*columns_R: np.ndarray) -> dict[str, np.ndarray]:
        """Of rounds, the last axis: the ratios of the blocks without a save, then both sides' seconds of the one with it."""
        *ratios_R, run_R, bare_R = columns_R
        ratio = np.median(np.concatenate(ratios_R, axis=-1), axis=-1)
        save = np.median(run_R - ratio[..., None] * bare_R, axis=-1)
        return {"between_saves": ratio - 1, "save_seconds": save, "slowdown": ratio - 1 + save / between_saves}

    samples = [*(run_RxN / bare_RxN)[:, :-1].T, run_RxN[:, -1], bare_RxN[:, -1]]
    told = {name: bootstrap(lambda *columns_R, name=name: parts(*columns_R)[name], samples, method="percentile")
            for name in ("slowdown", "between_saves", "save_seconds")}
    return {**{name: {"value": found.value, "low": found.low, "high": found.high} for name, found in told.items()},
            "minutes_between_saves": preset.checkpoint.every_minutes, "steps_a_block": block,
            "seconds_by_round_and_block": {"run": run_RxN.tolist(), "bare": bare_RxN.tolist()}}


@dataclasses.dataclass(frozen=True)
class _Alternating(Program):
    """A program whose compiled step lets the bare loop take its turns, and appends the seconds of both sides' blocks."""

    block: int
    found: dict[str, list[float]]

    def compile(self, frozen: Any = None) -> Any:
        compiled = super().compile(frozen)
        bare, count, began = _bare_steps(compiled, *_bare_parts(self)), 0, 0.0

        def step(state: Any, frozen: Any, batch: Any) -> Any:
            nonlocal count, began
            if count % self.block == self.block // 2:
                jax.block_until_ready(state)
                if count > self.block:  # the first block is not a whole one
                    self.found["run"].append(time.perf_counter() - began)
                began = time.perf_counter()
                for _ in range(self.block):
                    last = next(bare)
                jax.block_until_ready(last)
                if count > self.block:
                    self.found["bare"].append(time.perf_counter() - began)
                began = time.perf_counter()
            count += 1
            return compiled(state, frozen, batch)

        return step


def _bare_steps(compiled: Any, state: Any, loader: Any) -> Iterator[Any]:
    """The state after each step of the loop without anything that watches it."""
    with contextlib.closing(loader):
        pending: Any = {}
        for batch in loader:
            state, metrics = compiled(state, None, batch)
            jax.device_get(pending)  # of the step before, as the loop does
            pending = metrics
            yield state


def _bare_parts(program: Program) -> tuple[Any, Any]:
    """A fresh state and a loader that puts its batches in place."""
    from research.data import pipeline
    from research.data.loader import Loader
    from research.training.loop import put_batch
    from research.training.state import init_state

    config = program.config
    data = pipeline.prepare(config.data, config.model.vocab_size, config.seed, quiet=True)
    state = init_state(program.model.init, program.optimizer, program.layout, config.seed)
    return state, Loader(data.train, data.weights, config.seed, config.train.batch_size, config.train.microbatches,
                         place=functools.partial(put_batch, sharding=program.layout.batch()))


def loss_memory(tokens: int = 4096, dim: int = 256) -> dict[str, Any]:
    """Temporaries (bytes) of the loss and its gradients for two vocabularies, with all logits and in chunks."""
    from kernels.cross_entropy import cross_entropy

    found: dict[str, Any] = {"tokens": tokens, "dim": dim}
    for name in ("reference", "chunked"):
        for vocab in (8192, 65536):
            def loss(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, implementation: str = name) -> jax.Array:
                return cross_entropy(hidden, unembedding, targets, jnp.ones(targets.shape), implementation=implementation)[0]

            shapes = (jax.ShapeDtypeStruct((8, tokens // 8, dim), jnp.float32), jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
                      jax.ShapeDtypeStruct((8, tokens // 8), jnp.int32))
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
            found[f"{name}_{vocab}"] = compiled.memory_analysis().temp_size_in_bytes
    return found


def step_memory(config: Config) -> dict[str, int]:
    """Temporaries (bytes) of a config's step, its layers in a loop and one after another."""
    found = {}
    for name, unroll in (("scanned", 1), ("unrolled", config.model.stages[0].repeats)):
        compiled = make_program(override(config, {"model.unroll": unroll})).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes
    return found


def start(rounds: int) -> dict[str, Any]:
    """Seconds from starting Python to the end of the first step of `debug`, in a new process each, compiled programs kept."""
    seconds = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds + 1):  # the first fills the caches
            began = time.monotonic()
            words = ["--config=debug", f"--workdir={directory}/{number}", "--set=train.steps=100000", "--set=train.log_every=1"]
            launch = subprocess.Popen([sys.executable, "-m", "experiments.train", *words], stderr=subprocess.DEVNULL,
                                      env=os.environ | {"RUNG_CACHE": f"{directory}/compiled"})
            while not list(pathlib.Path(directory).glob(f"{number}/{METRICS_PREFIX}*")):  # the first step's row
                if launch.poll() is not None:
                    raise RuntimeError(f"experiments.train ended with {launch.returncode}")
                time.sleep(0.002)
            seconds.append(time.monotonic() - began)
            launch.kill()
            launch.wait()
    return {"cold": seconds[0], "seconds": statistics.median(seconds[1:]), "all": seconds[1:]}


def checkpoints(steps: int = 60) -> dict[str, Any]:
    """A run that saves: seconds that saving kept the loop, and its share of the whole saves' seconds."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", "experiments.train", "--config=quickstart", f"--workdir={directory}/run",
                        f"--set=train.steps={steps}", "--set=checkpoint.every_steps=10", "--set=optim.warmup_steps=5",
                        "--set=train.eval_every=0", "--set=train.sample_every=0"], check=True, capture_output=True)
        run = pathlib.Path(directory, "run")
        saves = [row for row in _rows(run, LEDGER_PREFIX) if row["event"] == "saved"]
        size = sum(p.stat().st_size for p in (run / "checkpoints").rglob("*") if p.is_file())
    return {"saves": saves, "kept_bytes": size}


def _rows(run: pathlib.Path, prefix: str) -> list[dict]:
    return [json.loads(line) for path in sorted(run.glob(f"{prefix}*")) for line in path.read_text().splitlines()]


def texts(limit: int) -> list[str]:
    """The first `limit` bytes of the quickstart's corpus: Python files of this installation."""
    from research.data import pipeline

    config = PRESETS["quickstart"]()
    source, = pipeline.make_sources(config.data.sources, "data.sources", config.data.cache_dir)
    found, size = [], 0
    for index in range(len(source)):
        found.append(source.document(index).text)
        size += len(found[-1].encode())
        if size >= limit:
            return found
    return found


def input_side(rounds: int, megabytes: float = 4.0) -> dict[str, Any]:
    """Tokenizing and batches a second, ours and Hugging Face's in turns, on the same documents and vocabulary size.

    Tokenizing: documents to ids in a cache on disk. Ours: SentencePiece BPE and the token cache; theirs: a byte-level BPE of
    `tokenizers` in `datasets.map` (batched, one process a core). Loading: rows of 256 in batches of 8 as numpy arrays.
    """
    import datasets
    import tokenizers

    from research.data.pipeline import prepare

    datasets.disable_progress_bars()
    documents, config = texts(int(megabytes * 1e6)), PRESETS["text"]()
    size = sum(len(text.encode()) for text in documents)
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(documents, vocab_size=2048, show_progress=False)
    figures: dict[str, list[float]] = {"ours_tokenize": [], "theirs_tokenize": [], "ours_load": [], "theirs_load": []}
    with tempfile.TemporaryDirectory() as directory:
        for number, text in enumerate(documents):
            pathlib.Path(directory, f"{number:05d}.txt").write_text(text)
        config = override(config, {"data.tokenizer": "sentencepiece", "data.cache_dir": f"{directory}/cache",
                                   "data.holdout": 0.01,
                                   "data.sources.0.args": {"paths": f"{directory}/*.txt", "split_on": "file"}})
        prepare(config.data, 2048, 0, quiet=True)  # trains the vocabulary, which is not measured
        for _ in range(rounds):
            for path in pathlib.Path(directory, "cache").glob("tokens-*"):
                shutil.rmtree(path)
            began = time.perf_counter()
            data = prepare(config.data, 2048, 0, quiet=True)
            figures["ours_tokenize"].append(size / (time.perf_counter() - began))
            began = time.perf_counter()
            encoded = datasets.Dataset.from_dict({"text": documents}).map(
                lambda batch: {"ids": [e.ids for e in theirs.encode_batch(batch["text"])]}, batched=True,
                remove_columns=["text"], num_proc=os.cpu_count(), cache_file_name=None, load_from_cache_file=False)
            figures["theirs_tokenize"].append(size / (time.perf_counter() - began))
            figures["ours_load"].append(_rate(_our_batches(data)))
            figures["theirs_load"].append(_rate(_their_batches(encoded)))
    median = {name: statistics.median(values) for name, values in figures.items()}
    return {"bytes": size, "bytes_per_second": {"ours": median["ours_tokenize"], "theirs": median["theirs_tokenize"]},
            "tokens_per_second": {"ours": median["ours_load"], "theirs": median["theirs_load"]},
            "tokenize_ratio": _paired(figures, "tokenize"), "load_ratio": _paired(figures, "load"), "rounds": figures}


def _paired(figures: dict[str, list[float]], what: str) -> float:
    return statistics.median(a / b for a, b in zip(figures[f"ours_{what}"], figures[f"theirs_{what}"]))


def _rate(batches: Iterator[np.ndarray], seconds: float = 3.0) -> float:
    """Tokens a second."""
    next(batches)
    began, tokens = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        tokens += next(batches).size
    return tokens / passed


def _our_batches(data: Any) -> Iterator[np.ndarray]:
    from research.data.loader import Loader

    loader = Loader(data.train, data.weights, 0, 8)
    try:
        for batch in loader:
            yield batch["tokens_BxL"]
    finally:
        loader.close()


def _their_batches(encoded: Any) -> Iterator[np.ndarray]:
    """As in transformers' run_clm.py: ids joined and cut into rows by `map`, shuffled, in numpy format."""
    def group(batch: dict[str, list]) -> dict[str, list]:
        joined = [token for ids in batch["ids"] for token in ids]
        return {"input_ids": [joined[i:i + 256] for i in range(0, len(joined) - 255, 256)]}

    rows = encoded.map(group, batched=True, remove_columns=["ids"]).with_format("numpy")
    for epoch in range(1 << 30):
        shuffled = rows.shuffle(seed=epoch)
        for batch in shuffled.iter(batch_size=8, drop_last_batch=True):
            yield np.asarray(batch["input_ids"])
