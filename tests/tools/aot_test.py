"""tools.aot on three small sharded layouts, held to golden files by jax's minor version; and what it refuses.

A change that adds an all-gather, or doubles the temporaries, shows here. After a change that is meant, or for another version:
`python -m tests.tools.aot_test` writes what the installed versions give into tests/tools/golden/.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import tools  # noqa: F401  (prepares the environment before JAX starts, as the command does)
from configs import preset
from kernels.cross_entropy import BLOCK_GATHER
from research.aot import advice as aot_advice
from research.aot import compile as aot_compile
from research.aot import hlo
from research.aot import report as aot_report
from research.aot.compile import Compiled, Memory, compile_for, no_cache, tpu_topology
from research.aot.estimate import Interval
from research.aot.hlo import Collective
from research.config import override, parse_assignments
from research.errors import InputError
from research.hardware import CHIPS
from research.training.program import make_program

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
MINOR = ".".join(jax.__version__.split(".")[:2])
TOLERANCE = 0.02  # of bytes: between two builds of one compiler
SETS = {"model.compute_dtype": "bfloat16", "model.remat": "full", "train.batch_size": 8}
CASES = {
    "fsdp": ("llama_tiny", {"mesh.rules": "fsdp"}),
    "tensor": ("llama_tiny", {"mesh.rules": "fsdp_tp", "mesh.tensor": 2}),
    "expert": ("mixtral_tiny", {"mesh.rules": "ep", "mesh.expert": 2}),
}
INSTALLED = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not INSTALLED, reason="the extra tpu is not installed")


def configured(name: str):
    base, sets = CASES[name]
    return override(preset(base), SETS | sets)


def command(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "tools.aot", *words], capture_output=True, text=True, cwd=REPOSITORY,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=200)
    return done.returncode, done.stdout, done.stderr


def answer_of(name: str) -> dict:
    return aot_report.report(compile_for(configured(name), tpu_topology("v5e:2x2")))


def pinned(answer: dict) -> dict:
    return {"memory": {part: answer["memory"][part] for part in ("arguments", "temporaries", "total", "peak")},
            "collectives": answer["collectives"]}


def check(answer: dict, name: str) -> None:
    golden = json.loads((GOLDEN / f"aot-{name}.json").read_text())
    assert answer["memory"]["fits"] and answer["estimated_cycles"] > 0
    assert 0 < answer["parts"]["again"] < answer["parts"]["dense"] and answer["parts"]["unknown_loops"] == 0
    assert answer["flops"]["ratio"] == pytest.approx(answer["flops"]["step"] / answer["flops"]["model"])
    if MINOR in golden:
        found = pinned(answer)
        assert found["collectives"] == golden[MINOR]["collectives"]
        assert found["memory"] == pytest.approx(golden[MINOR]["memory"], rel=TOLERANCE)


@needs_libtpu
@pytest.mark.parametrize("name", ["tensor", "expert"])
def test_golden(name):
    answer = answer_of(name)
    check(answer, name)
    if name == "expert":
        assert any(one["kind"] == "ragged-all-to-all" and one["axis"] == "expert" for one in answer["collectives"])


@needs_libtpu
def test_golden_by_the_command():
    base, sets = CASES["fsdp"]
    words = [f"--set={name}={value}" for name, value in (SETS | sets).items()]
    code, out, err = command(f"--config={base}", "--topology=v5e:2x2", "--json", *words)
    assert code == 0, err
    answer = json.loads(out)
    check(answer, "fsdp")
    assert {one["axis"] for one in answer["collectives"]} == {"fsdp"} and answer["mesh"] == {"fsdp": 4}
    assert set(answer["memory"]) == {"arguments", "temporaries", "total", "peak", "hbm", "fits", "host", "excess"}
    assert answer["memory"]["excess"] == 0 and min(answer["floors"].values()) > 0
    v5e, attention = CHIPS["v5e"], answer["parts"]["attention"]
    assert attention > 0 and answer["floors"]["compute"] == pytest.approx(
        answer["flops"]["step"] / 4 / v5e.peak("bfloat16") - attention)
    assert answer["floors"]["memory"] < 2 * answer["memory"]["arguments"] / v5e.hbm_bandwidth
    assert answer["step_seconds"] is None and answer["mfu"] is None and answer["not_shown"]
    assert answer["compile_seconds"] > 0 and "compiling llama_tiny" in err


def test_the_commands_refusals():
    code, _, err = command("--config=llama_tiny", "--topology=v9:2x2")
    assert code == 2 and err.count("\n") == 1 and "unknown chip 'v9'; one of v5e, v5p, v6e, tpu7x" in err


REFUSED = (
    ((), "--topology: is missing"),
    (("--topology=v5e:2x2",), "--config: is missing"),
    (("--config=llama_tiny", "--topology=v5e:2x2", "--price=nan"), "--price: nan isn't positive"),
    (("--config=llama_tiny", "--topology=v5e:2x2", "--minutes=3"), "--minutes: belongs to a search"),
    (("--config=llama_tiny", "--calibrate"), "--config: doesn't go with --calibrate"),
    (("--calibrate", "--minutes=-1"), "--minutes: -1 is negative"),
    (("--calibrate", "--output=/nowhere/rows.json"), "--output: /nowhere/rows.json can't be written"),
    (("--config=llama_tiny", "--topology=v5e:2x2", "--search", "--minutes=-1"), "--minutes: -1 isn't positive"),
    (("--config=llama_tiny", "--topology=v5e:2x2", "--set=mesh.fsdp=3", "--set=mesh.rules=fsdp"), "do not multiply to the 4"),
)


@pytest.mark.slow
@pytest.mark.parametrize("words, message", REFUSED)
def test_refusals_by_the_command(words, message):
    code, out, err = command(*words)
    assert code == 2 and not out and message in err and len(err.strip().splitlines()) <= 2, err


@pytest.mark.parametrize("text, words", [("v9:2x2", "unknown chip"), ("h100-8", "nothing is compiled for h100"),
                                         ("v5p:4x4", "isn't a shape of 3 axes"), ("v5e-7", "one of 1, 4, 8, .*v5e:4x4"),
                                         ("v5e:4096x4096", "16,777,216 chips"),
                                         ("v5p:4294967296x4294967296x1", "at most 9,216")])
def test_unknown_topologies(text, words):
    with pytest.raises(InputError, match=words):
        tpu_topology(text)


@needs_libtpu
def test_slices_that_the_compiler_does_not_know_and_meshes_that_do_not_fit():
    with pytest.raises(InputError, match="knows no slice v5e:3x3"):
        aot_compile.devices_of(tpu_topology("v5e:3x3"))
    with pytest.raises(InputError, match="do not multiply to the 4 devices"):
        compile_for(override(configured("fsdp"), {"mesh.fsdp": 3}), tpu_topology("v5e:2x2"))


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "rung\[tpu\]"'):
        aot_compile.devices_of(tpu_topology("v5e:2x2"))


MESSAGES = {
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.00G) exceeds available "
    "HBM (15.75G).": (2**30, 15 * 2**30, 16 * 2**30),
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 42.50G of 15.75G hbm. "
    "Exceeded hbm capacity by 26.75G.\n\nTotal hbm usage >= 43.00G:\n    reserved        512.00M \n    program          2.50G"
    "\n    arguments       40.00G": (40 * 2**30, 2.5 * 2**30, 43 * 2**30),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_the_compiler_says_of_too_much(message):
    memory = aot_compile._too_much(message, tpu_topology("v5e:2x2"), 2**30)
    assert (memory.arguments, memory.temporaries, memory.total) == MESSAGES[message]
    assert not memory.fits and memory.hbm == 16 * 2**30


# What the compiler tells, and by how many GiB it is too much. A program may be smaller than the chip's 16 GiB, and too large.
EXCESSES = {
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 15.80G of 15.75G hbm. Exceeded hbm capacity by 50.50M.":
        50.5 / 1024,
    "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (15.80G) exceeds available HBM (15.75G).": 0.05,
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 15.75G of 15.75G hbm.": 2**-30,
    "RESOURCE_EXHAUSTED: Used 17.00G": 1.0,
}


@pytest.mark.parametrize("message", EXCESSES)
def test_what_does_not_fit_is_too_much_by_something(message):
    memory = aot_compile._too_much(message, tpu_topology("v5e:2x2"), 2**30)
    assert memory.excess > 0 and memory.excess == pytest.approx(EXCESSES[message] * 2**30, abs=2)


@pytest.mark.slow
@pytest.mark.parametrize("excess, words", [(1, "less than 0.01 GB more"), (3 * 10**9, "3.00 GB more")])
def test_the_verdict_says_by_how_much(excess, words):
    """In a process of its own: two commands' flags don't go into one."""
    memory = Memory(10**9, 10**9, 2 * 10**9, None, 16 * 2**30, False, excess=excess)
    program = f"from tools import aot; print(aot.verdict({{'memory': {vars(memory)}, 'help': ['--set a.b=c']}}))"
    text = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=200).stdout
    assert text.startswith("does not fit: 2.00 GB a chip, ") and words in text and text.endswith("\n  --set a.b=c\n")


GIB = 2**30
CROWDED = {  # config, sizes of the mesh, memory, what is named
    "dp": ({"mesh.rules": "dp", "mesh.data": 4, "train.batch_size": 64}, {"data": 4},
           ["mesh.rules=fsdp --set mesh.data=0 ", "optim.offload=true", "optim.name=adafactor --set optim.b1=0",
            "model.remat=full", "model.remat=offload", "train.microbatches=2"]),
    "odd": ({"mesh.rules": "fsdp", "train.batch_size": 36, "train.microbatches": 3, "model.remat": "full"}, {"fsdp": 4},
            ["optim.offload=true", "optim.name=adafactor", "model.remat=offload", "train.microbatches=9",
             "--topology=v5e:4x8 --set train.batch_size=96  # 32 chips a slice"]),
    "a row a chip": ({"mesh.rules": "fsdp", "mesh.data": 2, "train.batch_size": 4, "model.remat": "offload",
                      "optim.offload": True, "optim.name": "adafactor"}, {"data": 2, "fsdp": 2},
                     ["mesh.data=0 ", "mesh.rules=cp --set mesh.context=2 --set mesh.data=0 --set train.microbatches=2"]),
}


@pytest.mark.parametrize("name", CROWDED)
def test_what_would_help_can_be_pasted(name, devices):
    """Every line is flags that give a config, and its program on these four devices; what is listed comes in this order."""
    sets, sizes, expected = CROWDED[name]
    memory = Memory(96 * GIB, 8 * GIB, 104 * GIB, None, 16 * GIB, False, excess=88 * GIB + GIB // 4)
    config = override(preset("llama_tiny"), sets)
    lines = aot_advice.what_would_help(config, memory, {"data": 1, "fsdp": 1, "expert": 1, "context": 1} | sizes,
                                       tpu_topology("v5e:2x2"))
    assert len(lines) == len(expected) and all(words in line for words, line in zip(expected, lines)), lines
    for line in lines:
        words = shlex.split(line, comments=True)
        changed = override(config, parse_assignments([word for word in words if "." in word and word[0] != "-"]))
        if not line.startswith("--topology"):
            make_program(changed, devices)
        else:
            assert tpu_topology(words[0].removeprefix("--topology=")).chips == 32


@pytest.mark.parametrize("total, slice", [(15.5, "2x4"), (31.4, "2x4"), (31.8, "4x4")])
def test_a_larger_slice_is_one_with_room_for_what_the_compiler_refused(total, slice):
    """Its room is 15.75 of 16 GiB: half of 31.8 would go into a chip's memory, and not into that."""
    config = override(preset("llama_tiny"), {"mesh.rules": "fsdp", "train.batch_size": 4})
    total = int(total * GIB)
    memory = Memory(total, 0, total, None, 16 * GIB, False, excess=max(1, total - int(15.75 * GIB)))
    line = aot_advice.what_would_help(config, memory, {"fsdp": 4, "context": 1}, tpu_topology("v5e:2x2"))[-1]
    assert line.startswith(f"--topology=v5e:{slice} ")


@needs_libtpu
def test_a_compiled_loop_of_unknown_length_is_told():
    """One that ends by what it computes, around one that is counted: as libtpu writes them."""
    device = aot_compile.devices_of(tpu_topology("v5e:2x2"))[0]

    def run(x_NxN):
        turn = lambda _, y_NxN: jnp.tanh(y_NxN @ x_NxN)
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 9.0, lambda y: jax.lax.fori_loop(0, 6, turn, y), x_NxN)

    with no_cache():
        shape = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=SingleDeviceSharding(device))
        program = hlo.parse(jax.jit(run).lower(shape).compile().as_text())
    counts = [hlo.trip_count(program, where, i) for where, i, _ in hlo.walk(program) if i.opcode == "while"]
    assert sorted(counts, key=str) == [6, None] and hlo.unknown_loops(program) == 1


LOOP = """ENTRY %main (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %carry = (s32[]) tuple(%p)
  ROOT %loop = (s32[]) while(%carry), condition=%condition, body=%body
}
%condition (t: (s32[])) -> pred[] {
  %t = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%body (u: (s32[])) -> (s32[]) {
  %u = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  ROOT %out = (s32[]) tuple(%next)
}
"""


def test_the_answer_says_that_a_loop_was_counted_once(devices):
    topology = tpu_topology("v5e:2x2")
    program = make_program(configured("fsdp"), devices)
    compiled = Compiled(program, topology, 1, Memory(1, 1, 2, 1, 16 * 2**30, True), LOOP, 1.0)
    answer = aot_report.report(compiled)
    assert answer["parts"]["unknown_loops"] == 1 and any("1 loops don't say" in line for line in answer["warnings"])
    known = dataclasses.replace(compiled, text=LOOP.replace("%carry = (s32[]) tuple(%p)", "%zero = s32[] constant(0)\n"
                                                            "  %carry = (s32[]) tuple(%zero)"))
    answer = aot_report.report(known)
    assert answer["parts"]["unknown_loops"] == 0 and not any("don't say" in line for line in answer["warnings"])


def test_the_answer_says_where_its_calibration_is_another_compilers(devices, monkeypatch):
    compiled = Compiled(make_program(configured("fsdp"), devices), tpu_topology("v5e:2x2"), 1,
                        Memory(1, 1, 2, 1, 16 * 2**30, True), LOOP, 1.0)
    monkeypatch.setattr(aot_report.calibration, "strangers", lambda: ["libtpu 0.1"])
    assert not any("libtpu 0.1" in line for line in aot_report.report(compiled)["warnings"])  # no time is shown
    monkeypatch.setattr(aot_report.estimate, "step_seconds", lambda *given: (Interval(1.0, 1.0, 1.0), None))
    assert any("measured with libtpu 0.1" in line for line in aot_report.report(compiled)["warnings"])


def test_warnings_name_gathered_activations_and_wide_sums(devices):
    config = override(preset("llama_tiny"), {"mesh.rules": "fsdp", "train.batch_size": 64, "data.seq_len": 256})
    program = make_program(config, devices)
    rows = 64 * 256 * 32
    gather = Collective("all-gather", "fsdp", 2, 4 * rows, 4, (("f32", (64, 256, 32)),), "jit(step)/x")
    weight = Collective("all-gather", "fsdp", 2, 2 * 32 * 88, 4, (("bf16", (32, 88)),), "jit(step)/w")
    small = Collective("all-reduce", "fsdp", 1, 4, 4, (("f32", ()),), "jit(step)/norm")
    block = dataclasses.replace(gather, arrays=(("bf16", (32, 8064)),), op_name=f"jit(step)/{BLOCK_GATHER}/y")
    found = aot_report.collective_warnings([gather, weight, small, block], program)
    assert [line.split(":")[0] for line in found] == ["all-gather of activations", "float32 collective"]
    assert "jit(step)/x" in found[0]


def test_no_cache_compiles_whatever_was_compiled_before():
    found = []
    listen = lambda name, **_: found.append(name)
    jax.monitoring.register_event_listener(listen)

    def read_back() -> bool:
        found.clear()
        jax.jit(lambda x: 41 * x).lower(jax.ShapeDtypeStruct((7,), "float32")).compile()
        return "/jax/compilation_cache/cache_hits" in found

    read_back()
    assert read_back()
    with no_cache():
        assert not read_back()
    assert read_back()
    jax.monitoring.unregister_event_listener(listen)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        file = GOLDEN / f"aot-{case}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {MINOR: pinned(answer_of(case))}, indent=1, sort_keys=True) + "\n")
