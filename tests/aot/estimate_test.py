"""Floors, parts and the calibration, in numbers that can be checked by hand."""

import dataclasses
import math

import pytest

from configs import preset
from research.aot import estimate, hlo
from research.aot.estimate import Floors, Parts, Run
from research.config import override
from research.hardware import chip

V5P = chip("v5p")
NOTHING = Floors(0.0, 0.0, 0.0)


def collective(kind: str, times: int = 3, size: int = 8, group: int = 4) -> hlo.Collective:
    return hlo.Collective(kind, "fsdp", times, size, group, (("bf16", (4,)),), "")


RECEIVED = {"all-gather": 18.0, "reduce-scatter": 18.0, "all-reduce": 36.0, "all-to-all": 18.0, "collective-permute": 24.0}


@pytest.mark.parametrize("kind", RECEIVED)
def test_floors(kind):
    found = estimate.floors(8e12, 1e9, [collective(kind)], V5P, 4, "bfloat16")
    assert found.compute == 8e12 / 4 / 459e12
    assert found.memory == 2e9 / 2765e9
    assert found.collectives == RECEIVED[kind] / 600e9


def test_what_packed_rows_may_skip_is_in_no_floor():
    found = estimate.floors(8e12, 1e9, [], V5P, 4, "bfloat16", skippable=1e12 / 459e12)
    assert found.compute == pytest.approx(1e12 / 459e12)


@pytest.mark.parametrize("arrays", [((4,), (16,)), ((16,), (4,))])
def test_what_a_router_sends_counts_as_if_it_were_sent_evenly(arrays):
    """Rows go into a buffer with room for those of all four devices, or come back from it: 8 bytes, a quarter stays."""
    buffers = tuple(("bf16", shape) for shape in arrays) + (("s32", (4,)),)
    sent = hlo.Collective("ragged-all-to-all", "expert", 3, 56, 4, buffers, "")
    assert estimate.floors(1.0, 1.0, [sent], V5P, 4, "bfloat16").collectives == 3 * 8 * 3 / 4 / 600e9


def test_two_devices_of_a_chip_share_its_links():
    one = estimate.floors(1.0, 1.0, [collective("all-gather")], V5P, 1, "bfloat16")
    two = estimate.floors(1.0, 1.0, [collective("all-gather")], dataclasses.replace(V5P, devices=2), 1, "bfloat16")
    assert two.collectives == 2 * one.collectives


MAIN = "ENTRY %main (p: bf16[8]) -> bf16[8] {{\n  %p = bf16[8]{{0}} parameter(0)\n  {}\n}}\n"
KERNEL = ('ROOT %{name} = bf16[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", metadata={{op_name="{path}"}}, '
          'backend_config={{"custom_call_config":{{"body":"x","cost_estimate":{{"flops":"459000000000000"}}}}}}')
KINDS = {
    ("ragged-dot-none.3", "jit(step)/moe_1/shard_map/ragged_dot_general"): "grouped",
    ("tgmm.1", "jit(step)/moe_1/jit(tgmm)/pallas_call"): "grouped",
    ("custom-call.5", "jit(step)/attention_0/attention_0._attend/shard_map/pallas_call"): "attention",
    ("selective_scan.2", "jit(step)/mamba_0/shard_map/pallas_call"): "unknown",
}


@pytest.mark.parametrize("name, path", KINDS)
def test_kernels_are_what_they_say_of_themselves(name, path):
    text = MAIN.format(KERNEL.format(name=name, path=path))
    found = estimate.parts(hlo.parse(text), V5P, "bfloat16")
    assert dataclasses.asdict(found) == {part: float(part == KINDS[name, path]) for part in
                                         ("dense", "attention", "grouped", "unknown", "silent", "unknown_loops", "again")}


def test_a_kernel_that_says_nothing_is_no_kernel_without_cost():
    kernel = KERNEL.format(name="custom-call.5", path="jit(step)/attention_0._attend/pallas_call").replace("flops", "none")
    assert estimate.parts(hlo.parse(MAIN.format(kernel)), V5P, "bfloat16") == Parts(0.0, silent=1)


def test_attention_without_a_kernel_is_apart():
    line = '{} = bf16[8]{{0}} copy(%p), metadata={{op_name="jit(step)/{}"}}, backend_config={{"estimated_cycles":"1750000000"}}'
    lines = (line.format("%a", "attention_0/attention_0._attend/shard_map/while/body/exp"),
             line.format("ROOT %b", "attention_0/attention_0._project/dot_general"))
    found = estimate.parts(hlo.parse(MAIN.format("\n  ".join(lines))), V5P, "bfloat16")
    assert (found.dense, found.unknown) == (1.0, 1.0)


def test_what_the_compiler_has_no_idea_of_moves_its_bytes():
    line = f'ROOT %s = bf16[8]{{0}} fusion(%p), kind=kCustom, backend_config={{"estimated_cycles":"{2**63 - 1}"}}'
    assert estimate.parts(hlo.parse(MAIN.format(line)), V5P, "bfloat16") == Parts(0.0, unknown=2 * 8 * 2 / 2765e9)


AGAIN = {  # as libtpu's programs have them
    "transpose(jvp(Backbone))/while/body/closed_call/checkpoint/rematted_computation/stage_0/attention_0/attention_0._project/"
    "dot_general": 1.0,
    "transpose(jvp(Backbone))/while/body/closed_call/checkpoint/rematted_computation/stage_0/attention_0/dot_general": 1.0,
    "transpose(jvp(Backbone))/while/body/closed_call/checkpoint/stage_0/attention_0/attention_0._project/dot_general": 0.0,
    "transpose(jvp(Backbone))/while/body/closed_call/checkpoint/rematted_computation/stage_0/gated_mlp_1/gated_mlp_1.linear/"
    "dot_general": 0.0,
    "jvp(Backbone)/while/body/closed_call/stage_0/attention_0/attention_0._project/dot_general": 0.0,
}


@pytest.mark.parametrize("path", AGAIN)
def test_projections_that_are_made_again_are_known(path):
    line = (f'ROOT %s = bf16[8]{{0}} copy(%p), metadata={{op_name="jit(step)/{path}"}}, '
            'backend_config={"estimated_cycles":"1750000000"}')
    found = estimate.parts(hlo.parse(MAIN.format(line)), V5P, "bfloat16")
    assert (found.dense, found.again) == (1.0, AGAIN[path])


RUNS = tuple(Run(f"run {i}", "v5p", 1.0, Parts(seconds)) for i, seconds in enumerate((1.0, 1.1, 1.0, 1.1)))


def test_each_run_is_judged_by_the_others():
    scale, residuals = estimate.calibration(RUNS)
    assert scale == pytest.approx(math.sqrt(1.1))
    assert residuals["run 0"] == pytest.approx(1.0 / 1.1 ** (2 / 3) - 1)
    assert residuals["run 1"] == pytest.approx(1.1 / 1.1 ** (1 / 3) - 1)


def test_an_interval_is_as_wide_as_the_worst_run():
    found, reason = estimate.step_seconds(Parts(2.0), NOTHING, preset("llama3_8b"), V5P, RUNS)
    error = 1.1 ** (2 / 3) - 1
    assert reason is None and found.value == pytest.approx(2 / math.sqrt(1.1))
    assert (found.low, found.high) == pytest.approx((found.value * (1 - error), found.value * (1 + error)))


def test_no_estimate_is_below_a_floor():
    found, _ = estimate.step_seconds(Parts(2.0), Floors(5.0, 0.0, 0.0), preset("llama3_8b"), V5P, RUNS)
    assert found.low == found.value == found.high == 5.0


WORSE = (*RUNS[:3], Run("run 3", "v5p", 1.0, Parts(1.6)))
SILENT = {
    "isn't calibrated": (Parts(2.0), NOTHING, "llama3_8b", "v5p", RUNS[:3]),
    "off by": (Parts(2.0), NOTHING, "llama3_8b", "v5p", WORSE),
    "no published run on v5e": (Parts(2.0), NOTHING, "llama3_8b", "v5e", RUNS),
    "no published run has Mamba2": (Parts(2.0), NOTHING, "mamba2_2_7b", "v5p", RUNS),
    "33% of the compiler's time": (Parts(2.0, unknown=1.0), NOTHING, "llama3_8b", "v5p", RUNS),
    "as narrow as model.dim=32": (Parts(2.0), NOTHING, "llama_tiny", "v5p", RUNS),
    "2 Pallas kernels don't say": (Parts(2.0, silent=2), NOTHING, "llama3_8b", "v5p", RUNS),
    "1 loops don't say": (Parts(2.0, unknown_loops=1), NOTHING, "llama3_8b", "v5p", RUNS),
    "collectives take more": (Parts(2.0), Floors(0.0, 0.0, 1.0), "llama3_8b", "v5p", RUNS),
}


@pytest.mark.parametrize("sets, reason", [({"mesh.slices": 2}, "several slices"), ({"mesh.rules": "ring"}, "splits rows")])
def test_meshes_of_no_published_run_are_not_shown(sets, reason):
    config = override(preset("llama3_8b"), sets)
    assert reason in estimate.step_seconds(Parts(2.0), NOTHING, config, V5P, RUNS)[1]


@pytest.mark.parametrize("reason", SILENT)
def test_nothing_is_shown_that_the_calibration_does_not_carry(reason):
    step, floors, name, on, runs = SILENT[reason]
    interval, why = estimate.step_seconds(step, floors, preset(name), chip(on), runs)
    assert interval is None and reason in why
