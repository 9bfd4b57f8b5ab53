"""The table of chips: names, slices, devices, and figures that must agree with each other."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from research import hardware
from research.errors import InputError
from research.hardware import CHIPS, chip_count, chip_of, measured_cpu_peak, parse_topology

ACCELERATORS = [name for name, row in CHIPS.items() if row.kind != "cpu"]

TOPOLOGIES = {  # what a person writes: (chip, shape, chips, JAX devices)
    "v5p:4x4x4": ("v5p", (4, 4, 4), 64, 64),
    "v5p-128": ("v5p", (4, 4, 4), 64, 64),
    "v5p-8": ("v5p", (2, 2, 1), 4, 4),
    "v4-64": ("v4", (2, 4, 4), 32, 32),
    "v5litepod-16": ("v5e", (4, 4), 16, 16),
    "v5e-8": ("v5e", (2, 4), 8, 8),
    "v5e:2x2": ("v5e", (2, 2), 4, 4),
    "v6e-256": ("v6e", (16, 16), 256, 256),
    "trillium-32": ("v6e", (4, 8), 32, 32),
    "tpu7x:4x4x4": ("tpu7x", (4, 4, 4), 64, 128),
    "tpu7x-8": ("tpu7x", (2, 2, 1), 4, 8),
    "ironwood:2x2x1": ("tpu7x", (2, 2, 1), 4, 8),
    "V5P:4X4X8": ("v5p", (4, 4, 8), 128, 128),
    "v5p:4x4x12": ("v5p", (4, 4, 12), 192, 192),
    "v6e": ("v6e", (1, 1), 1, 1),
    "tpu7x": ("tpu7x", (1, 1, 1), 1, 2),
    "h100": ("h100", (1,), 1, 1),
    "h100-8": ("h100", (8,), 8, 8),
    "h200:8": ("h200", (8,), 8, 8),
    "a100-80gb": ("a100", (1,), 1, 1),
    "a100-80gb-8": ("a100", (8,), 8, 8),
    "cpu": ("cpu", (1,), 1, 1),
}


@pytest.mark.parametrize("text", TOPOLOGIES)
def test_topology(text):
    name, shape, chips, devices = TOPOLOGIES[text]
    topology = parse_topology(text)
    assert (topology.chip.name, topology.shape) == (name, shape)
    assert (topology.chips, topology.devices) == (chips, devices)
    assert parse_topology(topology.name) == topology


BAD_TOPOLOGIES = {
    "v9-8": "v5p",  # lists the known
    "": "v5p",
    "v5pod-8": "v5p",
    "v5p:4x4": "3 axes",
    "v5e:4x4x4": "2 axes",
    "v5p:4x4xfour": "3 axes",
    "v5p:0x4x4": "3 axes",
    "v5p:": "3 axes",
    "v5p-7": "cores",
    "v5p-": "cores",
    "v6e-0": "number of chips",
    "h100-0": "number of chips",
    "v6e-lots": "chips",
    "v6e--8": "chips",
    "v6e-7": "no usual slice",
}


@pytest.mark.parametrize("text", BAD_TOPOLOGIES)
def test_bad_topology_is_one_clear_line(text):
    with pytest.raises(InputError, match=BAD_TOPOLOGIES[text]) as caught:
        parse_topology(text, where="--topology")
    assert str(caught.value).startswith("--topology: ") and "\n" not in str(caught.value)


def test_an_unknown_chip_lists_every_known_one():
    with pytest.raises(InputError) as caught:
        parse_topology("b200")
    assert all(name in str(caught.value) for name in CHIPS)


SIZES = [(axes, size) for axes, table in hardware.SLICES.items() for size in table]


@pytest.mark.parametrize("axes, size", SIZES)
def test_slices_have_their_size(axes, size):
    shape = hardware.SLICES[axes][size]
    assert len(shape) == axes
    assert hardware.Topology(CHIPS["v5p"], shape).chips == size


def device(kind: str, platform: str, process: int = 0):
    return SimpleNamespace(device_kind=kind, platform=platform, process_index=process)


DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "cpu": "cpu",
}


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_chip_of_a_device(kind):
    assert chip_of(device(kind, "any")).name == DEVICE_KINDS[kind]


@pytest.mark.parametrize("kind", ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "TPU v3", "TPU v5 light"])
def test_a_chip_like_a_known_one_is_not_taken_for_it(kind):
    with pytest.raises(InputError, match="research/hardware.py"):
        chip_of(device(kind, "gpu"))


def test_chip_of_this_machine():
    assert chip_of(jax.devices("cpu")[0]) is CHIPS["cpu"]


def test_chip_count(devices):
    assert chip_count(devices) == 1  # four CPU devices of one process are one host
    assert chip_count([device("cpu", "cpu", 0), device("cpu", "cpu", 0), device("cpu", "cpu", 1)]) == 2
    assert chip_count([device("TPU7x", "tpu")] * 8) == 4
    assert chip_count([device("TPU v5", "tpu")] * 8) == 8


@pytest.mark.parametrize("name", ACCELERATORS)
def test_figures_agree(name):
    """Wrong units and swapped columns show as figures out of all proportion."""
    row = CHIPS[name]
    assert row.name == name == name.lower()
    assert 100e12 < row.peak_flops["bfloat16"] < 5e15
    assert row.peak_flops["float32"] <= row.peak_flops["bfloat16"]
    assert min(row.peak_flops[name] for name in row.peak_flops if "8" in name) >= row.peak_flops["bfloat16"]
    assert 16e9 < row.hbm_bytes < 300e9
    assert 0.5e12 < row.hbm_bandwidth < 10e12
    assert 0.1 < row.link_bandwidth / row.hbm_bandwidth < 0.6
    assert 1e9 < row.clock_hz < 3e9
    # Matrix units make a multiple of 1024 products of 2 FLOPs a cycle. Both figures are rounded: some slack.
    thousands = row.peak_flops["bfloat16"] / row.clock_hz / 2048
    assert abs(thousands / round(thousands) - 1) < 2e-3
    assert row.power_watts is None or 100 < row.power_watts < 1500
    assert 1 < row.price_per_hour < 20 and len(row.price_date) == 7
    dollars_per_exaflop = row.price_per_hour / 3600 / row.peak_flops["bfloat16"] * 1e18
    assert 0.5 < dollars_per_exaflop < 4


def test_names_are_unique():
    names = [known for row in CHIPS.values() for known in (row.name, *row.aliases)]
    kinds = [kind for row in CHIPS.values() for kind in row.device_kinds]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)


def test_peak():
    assert CHIPS["v5p"].peak("bfloat16") == 459e12
    with pytest.raises(InputError, match="v5e.*float64"):
        CHIPS["v5e"].peak("float64")
    assert CHIPS["cpu"].peak("bfloat16") == measured_cpu_peak()


def test_measured_cpu_peak_is_plausible_and_measured_once():
    peak = measured_cpu_peak()
    assert 1e8 < peak < 1e14
    assert measured_cpu_peak() == peak
    with jax.transfer_guard("disallow"):  # as inside the training loop
        measured_cpu_peak.cache_clear()
        assert 1e8 < measured_cpu_peak() < 1e14


def test_rows_can_be_hashed_and_not_changed():
    assert len({*CHIPS.values()}) == len(CHIPS)
    with pytest.raises(TypeError):
        CHIPS["v4"].peak_flops["bfloat16"] = 1.0
    with pytest.raises(AttributeError):
        CHIPS["v4"].hbm_bytes = 1
