"""Which flags a launch on a TPU gets, and that a user's own stay."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest

from research import tpu_flags
from research.aot.compile import TPUS
from research.hardware import CHIPS


def test_every_tpu_has_its_row():
    assert set(tpu_flags.FLAGS) == {name for name, chip in CHIPS.items() if chip.kind == "tpu"} >= set(TPUS)
    assert set(tpu_flags._DEVICES.values()) == set(tpu_flags.FLAGS)


@pytest.mark.parametrize("devices, found", [
    ({"0": ("0x8086", "0x1234"), "1": ("0x1ae0", "0x0062")}, "v5p"), ({"0": ("0x1ae0", "0xffff")}, None), ({}, None)])
def test_the_generation_is_read_from_the_bus(devices, found, tmp_path):
    for name, (vendor, device) in devices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    assert tpu_flags.generation(str(tmp_path)) == found


def test_a_users_flags_stay_and_nothing_is_said_twice(monkeypatch):
    own = "--xla_enable_async_all_gather=false"
    monkeypatch.setenv(tpu_flags.VARIABLE, own)
    tpu_flags.use("v5e")
    words = os.environ[tpu_flags.VARIABLE].split()
    assert set(words) == set(tpu_flags.FLAGS["v5e"]) - {"--xla_enable_async_all_gather=true"} | {own}
    tpu_flags.use("v5e")
    assert words == os.environ[tpu_flags.VARIABLE].split() and len(words) == len(set(words))


@pytest.mark.parametrize("own, limit", [(None, 32768), ("--xla_tpu_scoped_vmem_limit_kib=65536", 65536)])
def test_what_is_compiled_only_has_less_vmem_on_v6e(own, limit, monkeypatch):
    monkeypatch.delenv(tpu_flags.VARIABLE, raising=False)
    if own:
        monkeypatch.setenv(tpu_flags.VARIABLE, own)
    tpu_flags.use("v6e", to_run=False)
    words = os.environ[tpu_flags.VARIABLE].split()
    launch = {flag for flag in tpu_flags.FLAGS["v6e"] if "vmem" not in flag}
    assert set(words) == launch | {f"--xla_tpu_scoped_vmem_limit_kib={limit}"} and len(words) == len(set(words))
    monkeypatch.delenv(tpu_flags.VARIABLE)
    tpu_flags.use("v6e")
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in os.environ[tpu_flags.VARIABLE].split()


@pytest.mark.parametrize("chip, off", [(None, False), ("tpu7x", False), ("v5e", True)])
def test_without_flags_the_environment_stays(chip, off, monkeypatch):
    monkeypatch.delenv(tpu_flags.VARIABLE, raising=False)
    monkeypatch.setenv(tpu_flags.OFF, "0" if off else "1")
    tpu_flags.use(chip)
    assert tpu_flags.VARIABLE not in os.environ


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra tpu is not installed")
@pytest.mark.parametrize("more, known", [((), True), (("--xla_tpu_of_no_libtpu=true",), False)])
def test_libtpu_knows_every_flag(more, known):
    """It ends a process that gives it one that it doesn't know."""
    flags = " ".join({*itertools.chain.from_iterable(tpu_flags.FLAGS.values()), *more})
    code = "from jax.experimental import topologies as t; print(len(t.get_topology_desc('v5e:2x2', platform='tpu').devices))"
    environment = {**os.environ, tpu_flags.VARIABLE: flags}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode == 0 and done.stdout.strip() == "4") == known, done.stderr
    assert known or "xla_tpu_of_no_libtpu" in done.stderr
