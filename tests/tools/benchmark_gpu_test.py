"""`tools.benchmark gpu` without a GPU: every part runs, what fails is named and stops nothing else, and targets are judged by
what was measured alone."""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from absl.testing import flagsaver
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh

from research import sharding
from research.decoding.engine import Engine
from research.decoding.sampling import Sampling
from research.errors import InputError
from research.models.lm import LanguageModel
from research.training.program import make_program
from tools import benchmark, benchmark_gpu, benchmark_gpu_parts
from tools.benchmark_gpu_parts import Turns

QUICK = Turns(rounds=2, seconds=0.01, rehearse=True)
DEVICE = {"kind": "NVIDIA H200", "platform": "gpu", "chip": "h200"}


def command(*words: str) -> subprocess.CompletedProcess:
    words = (sys.executable, "-m", "tools.benchmark", "gpu", "--rounds=1", "--seconds=0.1", *words)
    return subprocess.run(words, capture_output=True, text=True)


@pytest.mark.parametrize("part", benchmark_gpu.PARTS)
def test_every_part_runs_at_tiny_shapes(part):
    """All its cases have figures, and among them, where a CPU has them, those that its targets are about."""
    cases = dict(benchmark_gpu.PARTS[part].cases(QUICK))
    assert cases and [case for case, figures in cases.items() if "failed" in figures] == []
    json.dumps(cases, allow_nan=False)
    for target in benchmark_gpu.PARTS[part].targets:  # tiny rows are never long, and a CPU's bandwidth isn't published
        assert any(target.key in figures for figures in cases.values())
        assert (target._replace(length=0).found(cases) is None) == (target.key == "of_published")


def test_the_command_rehearses(tmp_path):
    done = command("--rehearse", "--cases=roofs", "--json", f"--output={tmp_path}/gpu.json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == json.loads((tmp_path / "gpu.json").read_text())
    assert answer["rehearsal"] and answer["failed"] == [] and answer["device"]["platform"] == "cpu"
    assert answer["device"]["versions"]["jax"] == jax.__version__
    figure = answer["parts"]["roofs"]["cases"]["matmul_128"]["flops_per_second"]
    assert 0 < figure["low"] <= figure["value"] <= figure["high"]


def test_without_a_gpu_it_is_one_line():
    done = command("--json")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and done.stdout == "" and len(errors) == 1, done.stderr
    assert "'cpu'" in errors[0] and ".[cuda]" in errors[0] and "--rehearse" in errors[0]


def test_an_unknown_chip_is_refused():
    with pytest.raises(InputError, match="NVIDIA B1000.*research/hardware.py"):
        benchmark_gpu.refuse({"kind": "NVIDIA B1000", "platform": "gpu", "chip": None})
    benchmark_gpu.refuse(DEVICE)


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}


@pytest.mark.parametrize("whole, rehearsal, expected", [
    (True, False, [True, False]), (False, False, [None, False]), (True, True, [None, None])])
def test_targets_are_judged_by_the_worst_case(whole, rehearsal, expected):
    """Reached only if every case is there; missed as soon as one misses. Attention may win where rows are short."""
    cases = {"length_1024": {"length": 1024, "over_scan": figure(2.5), "over_attention": figure(0.3)},
             "length_8192": {"length": 8192, "over_scan": figure(2.1), "over_attention": figure(0.9)},
             "ahead_of_attention": {"from_length": None}}
    judged = benchmark_gpu.judged("ssd", cases, whole, rehearsal)
    assert [target["found"] for target in judged] == [2.1, 0.9]
    assert [target["reached"] for target in judged] == expected


def test_the_best_batch_counts():
    cases = {"none_8": {"mfu": figure(0.4)}, "none_16": {"mfu": figure(0.52)}, "none_32": {"fits": False}}
    target, = benchmark_gpu.judged("train", cases, True, False)
    assert target["found"] == 0.52 and target["reached"]


def test_what_fails_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    def messages(part, turns, seconds):
        yield DEVICE
        if part == "roofs":
            yield "matmul_64", {"flops_per_second": figure(1.0)}
            raise TimeoutError("not done after 3 s")
        if part == "attention":
            yield "mha", {"failed": "ValueError: no"}
            yield "gqa", {"over_cudnn": figure(0.95)}
        if part == "decode":
            yield "batch_1", {"of_published": figure(0.8)}

    monkeypatch.setattr(benchmark_gpu, "messages", messages)
    answer = benchmark_gpu.gpu(["roofs", "attention", "train", "decode"], Turns(1, 0.1), f"{tmp_path}/gpu.json")
    assert answer == json.loads((tmp_path / "gpu.json").read_text())
    assert answer["failed"] == ["roofs: not done after 3 s", "attention mha: ValueError: no",
                                "train: no case has what its target is about"]
    assert answer["parts"]["roofs"]["cases"] == {"matmul_64": {"flops_per_second": figure(1.0)}}
    reached = [target["reached"] for part in answer["parts"].values() for target in part["targets"]]
    assert reached == [None, None, True]
    with pytest.raises(InputError, match="--output"):
        benchmark_gpu.gpu(["roofs"], QUICK, f"{tmp_path}/missing/gpu.json")


@pytest.mark.parametrize("failed, code", [(["roofs: no"], 1), ([], 0)])
def test_the_exit_code_says_whether_all_is_there(failed, code, monkeypatch, capfd):
    monkeypatch.setitem(benchmark.VERBS, "gpu", lambda: {"failed": failed})
    with flagsaver.flagsaver():
        benchmark.FLAGS(["benchmark", "--json"])
        assert benchmark.main(["benchmark", "gpu"]) == code
    assert json.loads(capfd.readouterr().out) == {"failed": failed}


def dies(*_) -> None:
    os._exit(3)


def test_a_process_that_dies_or_hangs_is_a_failure(monkeypatch):
    with pytest.raises(TimeoutError, match="0 s"):
        list(benchmark_gpu.messages("roofs", QUICK, 0.0))
    monkeypatch.setattr(benchmark_gpu, "work", dies)
    with pytest.raises(EOFError, match="exit code 3"):
        list(benchmark_gpu.messages("roofs", QUICK, 100.0))


def test_a_fast_wrong_kernel_is_a_failure(monkeypatch):
    run = functools.partial(benchmark_gpu_parts._over_cudnn, 1, 32, 4, 2, True, QUICK)
    assert "failed" not in run()
    right = benchmark_gpu_parts.ours
    monkeypatch.setattr(benchmark_gpu_parts, "ours", lambda q, k, v, *rows: right(q, jnp.roll(k, 1, 1), v, *rows))
    assert "differs from cuDNN's" in run()["failed"]
    monkeypatch.setattr(benchmark_gpu_parts, "ours", lambda q, k, v, *rows: right(q, k * jnp.nan, v, *rows))
    figures = run()
    assert "nan" in figures["failed"] and figures["difference"] is None


def test_what_jax_raises_is_one_line():
    def out_of_memory():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocated:")

    assert benchmark_gpu_parts.tried(out_of_memory) == {"failed": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"}
    assert benchmark_gpu_parts.tried(int, "x")["failed"].startswith("ValueError: invalid literal")
    with pytest.raises(TypeError):  # a fault of ours
        benchmark_gpu_parts.tried(int, None)


def test_a_ratio_is_of_paired_rounds():
    found = benchmark_gpu_parts.ratio(theirs=[2.0, 9.0, 4.0], ours=[1.0, 3.0, 4.0])
    assert found == {"value": 2.0, "low": 1.0, "high": 3.0}
    assert benchmark_gpu_parts.rate(6.0, [1.0, 2.0, 3.0]) == {"value": 3.0, "low": 2.0, "high": 6.0}


@pytest.mark.parametrize("lead, expected", [([0.5, 1.2, 0.9, 1.1, 1.3], 8192), ([1.1] * 5, 1024), ([2, 2, 2, 2, 0.9], None),
                                            ([2, 2, None, 2, 2], 8192)])
def test_ahead_is_ahead_at_every_longer_row(lead, expected, monkeypatch):
    left = iter(lead)
    measured = lambda *_: {"failed": "no"} if (found := next(left)) is None else {"over_attention": figure(found)}
    monkeypatch.setattr(benchmark_gpu_parts, "_scans", measured)
    cases = dict(benchmark_gpu_parts.ssd_over_others(Turns(1, 0.1)))
    assert len(cases) == 6 and cases["ahead_of_attention"] == {"from_length": expected}


class Clock(Turns):
    """Says how long each side took."""

    def of(self, sides):
        return {name: [{"prefill": 1.0, "whole": 1.0 + 32 * 0.5, "copy": 2.0}[name]] for name in sides}


class Noise(Turns):
    def of(self, sides):
        return {name: [{"prefill": 1.0, "whole": 0.9, "copy": 2.0}[name]] for name in sides}


def test_noise_is_no_speed_but_no_failure_of_a_rehearsal():
    measure = functools.partial(benchmark_gpu_parts._decoded, benchmark_gpu_parts.eight(small=True), 1)
    assert "of_copy" in measure(Noise(1, 0.1, rehearse=True))
    with pytest.raises(ValueError, match="too coarse"):
        measure(Noise(1, 0.1))


def test_a_decoding_step_reads_each_weight_but_the_embedding_and_the_cache_so_far():
    config = benchmark_gpu_parts.eight(small=True)
    model, figures = LanguageModel(config.model), benchmark_gpu_parts._decoded(config, 3, Clock(1, 0.1, rehearse=True))
    counts = model.param_counts()
    weights = 2 * (counts["total"] - config.model.vocab_size * config.model.dim)
    cache = 3 * model.state_bytes(32 + 16)  # the prompt, and half of what is generated
    assert (figures["weight_bytes"], figures["cache_bytes"]) == (weights, cache)
    assert figures["step_seconds"]["value"] == 0.5 and figures["tokens_per_second"]["value"] == 6.0
    assert figures["bytes_per_second"]["value"] == 2 * (weights + cache)
    assert figures["of_copy"]["value"] == pytest.approx(2 * (weights + cache) / 2**16)  # twice that in two seconds


@pytest.mark.parametrize("early", [True, False], ids=["the compiler refuses", "the count is above the room"])
def test_the_batch_grows_until_memory_s_end(monkeypatch, early):
    def compile(self):
        if early:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        counts = dict(argument_size_in_bytes=50, temp_size_in_bytes=60, output_size_in_bytes=50, alias_size_in_bytes=50)
        return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**counts))

    class Program:
        def __init__(self, config, devices):
            self.model = SimpleNamespace(param_counts=lambda: {"total": 1})

    Program.compile = compile
    monkeypatch.setattr(benchmark_gpu_parts, "make_program", Program)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100})])
    cases = dict(benchmark_gpu_parts.train(Turns(1, 0.1)))
    assert list(cases) == [f"{remat}_{batches[0]}" for remat, batches in benchmark_gpu_parts.TRIES]
    assert all(not figures["fits"] and "failed" not in figures for figures in cases.values())


def test_the_dense_model_has_1_3_billion_parameters():
    model = LanguageModel(benchmark_gpu_parts.dense("none", 8, False).model)
    assert 1.25e9 < model.param_counts()["total"] < 1.4e9
    eight = benchmark_gpu_parts.eight(False).model
    assert 8.0e9 < LanguageModel(eight).param_counts()["total"] < 8.1e9
    assert eight.param_dtype == eight.compute_dtype == "bfloat16"


def lowered_for_cuda(run, *shapes):
    """jax 0.12 asks for the GPU that a Pallas kernel is for."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))):
        return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))


def test_the_portable_form_is_told_from_kernels_for_gpus():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    shape = jax.ShapeDtypeStruct((16,), jnp.float32)
    copy = pl.pallas_call(kernel, shape, compiler_params=triton.CompilerParams(num_warps=1))
    assert benchmark_gpu_parts.implementation(lowered_for_cuda(copy, shape)) == "triton"
    assert benchmark_gpu_parts.implementation(lowered_for_cuda(jnp.cumsum, shape)) == "portable"


@pytest.mark.parametrize("side", ["ssd", "scan", "attention"])
def test_kernels_lower_for_cuda(side):
    """At the real shapes, from here; as all that follow."""
    runs = {}

    def shapes():
        sides = benchmark_gpu_parts.scans(2, 8192, 2048)
        runs.update({name: run for name, (run, *_) in sides.items()})
        return sides[side][1:], benchmark_gpu_parts.rows_of(2, 8192)

    (arrays, dy), rows = jax.eval_shape(shapes)
    lowered = lowered_for_cuda(benchmark_gpu_parts.both_ways(runs[side]), arrays, rows, dy)
    y, *gradients = lowered.out_info
    assert y.shape == dy.shape and [g.shape for g in gradients] == [x.shape for x in arrays]


@pytest.mark.parametrize("remat", [remat for remat, _ in benchmark_gpu_parts.TRIES])
def test_the_training_step_lowers_for_cuda(remat):
    program = make_program(benchmark_gpu_parts.dense(remat, 8, False), jax.devices()[:1])
    with sharding.use(program.layout.mesh, program.layout.rules):
        lowered = lowered_for_cuda(program.step, program.abstract, None, program.abstract_batch())
    state, _ = lowered.out_info
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, program.abstract)


def test_generation_lowers_for_cuda():
    model = LanguageModel(benchmark_gpu_parts.eight(False).model)
    params, key = jax.eval_shape(model.init, jax.random.key(0)), jax.random.key(0)
    tokens, lengths = jax.ShapeDtypeStruct((16, 896), jnp.int32), jax.ShapeDtypeStruct((16,), jnp.int32)
    engine = Engine(model, Sampling(temperature=0.0))
    tokens_BxT, *_ = lowered_for_cuda(lambda *shapes: engine._run(*shapes, 257), params, tokens, lengths, key).out_info
    assert tokens_BxT.shape == (16, 257)
