"""The table of published runs, the file of what was measured of them, and what docs/tpu.md says of both."""

import configparser
import dataclasses
import json
import pathlib

import jax
import pytest

from configs import preset
from kernels import attention_blocks
from kernels.visibility import Rule
from research.aot import calibration, estimate
from research.aot import compile as aot_compile
from research.aot.calibration import PUBLISHED
from research.aot.compile import tpu_topology
from research.config import override, parse_assignments
from research.errors import InputError
from tools import aot_calibration

ROOT = pathlib.Path(__file__).resolve().parents[2]


def answer(factor: float, **parts: float) -> dict:
    """As `tools.aot --json` gives it, `factor` times as long as the published run, half of which is made again."""
    found = estimate.Parts(**{"dense": factor, "again": 0.5, **parts})
    return {"parts": {**dataclasses.asdict(found), "seconds": found.seconds}, "estimated_cycles": 7, "compile_seconds": 1.0,
            "memory": {"fits": True}, "floors": {"compute": 1.0, "memory": 1.0, "collectives": None}, "chips": 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calibration.json"


def test_rows_go_into_the_file_and_come_out_as_runs(path):
    assert calibration.read(path) == {} and calibration.runs(path) == ()
    last, first = PUBLISHED[2], PUBLISHED[0]
    for published in (last, first):
        calibration.write(path, published, answer(2 * published.seconds))
    assert list(calibration.read(path)) == [first.name, last.name]  # in the table's order
    made = calibration.read(path)[first.name]["made_with"]
    assert set(made) == {"jax", "libtpu", "revision"} and made["jax"] == jax.__version__
    runs = calibration.runs(path)
    assert [(run.name, run.chip, run.seconds) for run in runs] == [(p.name, p.topology[:3], p.seconds) for p in (first, last)]
    assert runs[0].parts.seconds == 2 * first.seconds  # makes its projections again, as we do
    assert last.keeps_projections and runs[1].parts.seconds == 2 * last.seconds - 0.5


def test_what_was_measured_of_other_shapes_is_not_taken(path):
    calibration.write(path, PUBLISHED[0], answer(1.0))
    rows = json.loads(path.read_text())
    rows[PUBLISHED[0].name]["words"][-1] = "--set=train.batch_size=1"
    path.write_text(json.dumps(rows))
    assert calibration.read(path) == {}


@pytest.mark.parametrize("text", ["[]", "{", '{"16B, v5e-256": {"words": []}}', '{"x": {"parts": {"other": 1}}}', '{"x": 1}'])
def test_another_file_is_refused(text, path):
    path.write_text(text)
    with pytest.raises(InputError, match="something else than rows of a calibration"):
        calibration.read(path)


@pytest.mark.parametrize("parts", [{"silent": 1}, {"unknown_loops": 2}, {"again": 0.0}])
def test_a_row_that_would_be_too_low_is_none(parts, path):
    with pytest.raises(ValueError, match="wasn't found in the compiler's text"):
        calibration.write(path, PUBLISHED[2], answer(1.0, **parts))
    assert not path.exists()


def test_the_summary_is_the_estimate_s_own(path):
    found = calibration.summary(path)
    assert not found["shown"] and found["worst"] is None and {one["measured"] for one in found["runs"]} == {None}
    for index, published in enumerate(PUBLISHED):
        kept = 0.5 * published.keeps_projections
        calibration.write(path, published, answer((1.1 if index else 1.0) * published.seconds + kept))
        assert calibration.summary(path)["shown"] == (index >= 3)
    found = calibration.summary(path)
    assert found["scale"] == pytest.approx(1.1 ** (3 / 4))  # of the four that don't offload
    assert found["runs"][0]["residual"] == pytest.approx(1 / 1.1 - 1) and found["worst"] == pytest.approx(1 - 1 / 1.1)
    assert found["runs"][1]["residual"] == pytest.approx(1.1 / 1.1 ** (2 / 3) - 1)
    offloads = PUBLISHED[4]
    assert offloads.offloads and found["runs"][4]["residual"] == pytest.approx(1.1 / 1.1 ** (3 / 4) - 1)
    calibration.write(path, offloads, answer(2 * offloads.seconds + 0.5))
    again = calibration.summary(path)
    assert again["scale"] == found["scale"] and again["worst"] == found["worst"] and again["shown"]
    assert offloads.name not in {run.name for run in calibration.runs(path)}
    calibration.write(path, PUBLISHED[0], answer(1.5 * PUBLISHED[0].seconds))
    assert not calibration.summary(path)["shown"]


def test_what_is_measured_already_stays_and_the_next_call_goes_on(path, monkeypatch):
    compiled = []

    def fake(published):
        compiled.append(published.name)
        return answer(published.seconds + 0.5)

    monkeypatch.setattr(aot_calibration, "compiled", fake)
    monkeypatch.setattr(aot_calibration, "check_libtpu", lambda: None)
    monkeypatch.setattr(calibration, "made_with", lambda: {"revision": "a"})
    assert aot_calibration.calibrate(path, 0.0)["left"] == len(PUBLISHED) and not compiled
    calibration.write(path, PUBLISHED[1], answer(1.0))
    found = aot_calibration.calibrate(path, 60.0)
    assert found["left"] == 0 and compiled == [one.name for one in PUBLISHED if one is not PUBLISHED[1]]
    aot_calibration.show_calibration(found)
    json.dumps(found)
    monkeypatch.setattr(calibration, "made_with", lambda: {"revision": "b"})
    assert aot_calibration.calibrate(path, 60.0)["left"] == 0 and len(compiled) == 2 * len(PUBLISHED) - 1


def test_rows_of_other_versions_are_told(path):
    calibration.write(path, PUBLISHED[0], answer(1.0))
    assert calibration.strangers(path) == []
    rows = json.loads(path.read_text())
    rows[PUBLISHED[0].name]["made_with"] |= {"jax": "0.1", "revision": "another"}
    path.write_text(json.dumps(rows))
    assert calibration.strangers(path) == ["jax 0.1"]


def test_without_libtpu_nothing_is_begun(path, monkeypatch):
    monkeypatch.setattr(aot_compile.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(aot_calibration, "compiled", None)
    with pytest.raises(InputError, match="libtpu: the TPU compiler is not installed"):
        aot_calibration.calibrate(path, 60.0)


def test_a_compile_that_fails_is_one_line(monkeypatch):
    broken = dataclasses.replace(PUBLISHED[0], topology="v9:2x2")
    with pytest.raises(InputError, match="ended with exit code 2"):
        aot_calibration.compiled(broken)


# Heads of 128, layers, sequences a chip, their length: docs/tpu.md.
SHAPES = {"16B": (64, 32, 6, 2048), "32B": (64, 32, 4, 2048), "Llama 2 70B": (64, 80, 4, 4096),
          "Mixtral 8x7B": (32, 32, 36, 4096), "Llama 3.1 8B": (32, 32, 4, 8192)}


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda one: one.name)
def test_the_flags_give_the_published_shapes(published):
    heads, layers, rows, length = SHAPES[published.name.split(",")[0]]
    config = override(preset(published.preset), parse_assignments(published.sets))
    stage, = config.model.stages
    attention = stage.pattern[0]
    assert (attention.heads, attention.width(config.model.dim)) == (heads, 128)
    assert (stage.repeats, config.data.seq_len) == (layers, length)
    assert config.train.batch_size == rows * tpu_topology(published.topology).chips
    assert config.model.remat == "full" and config.mesh.rules == "fsdp"


@pytest.mark.parametrize("run", calibration.summary()["runs"], ids=lambda run: run["name"])
def test_the_calibration_counts_attention_as_the_kernels_do(run):
    """Forward, again under remat, and 2.5 times as much backward: of the blocks that our kernels compute."""
    heads, layers, rows, length = SHAPES[run["name"].split(",")[0]]
    share = attention_blocks.computed_share(attention_blocks.plan(length, length, 128, 128), Rule("causal", None, None, 1.0))
    assert 0.5 < share == 0.5 + 256 / length
    flops = 4.5 * share * 4 * heads * 128 * length**2 * layers * rows
    peak = tpu_topology(run["topology"]).chip.peak("bfloat16")
    assert run["measured"]["parts"]["attention"] == pytest.approx(flops / peak, abs=1e-3)


def test_the_calibration_that_is_shipped_is_whole_and_documented():
    """Every published run is measured, and docs/tpu.md gives its figures and whether an estimate may be shown."""
    found = calibration.summary()
    lines = (ROOT / "docs" / "tpu.md").read_text().splitlines()
    for one in found["runs"]:
        row = next(line for line in lines if line.startswith(f"| {one['name']} |"))
        assert f"{one['seconds']:.2f} s | {one['formula']:.2f} s" in row and f"{one['residual']:+.1%}" in row.replace("*", "")
    assert any(f"off by {found['worst']:.1%}" in line for line in lines)
    assert found["shown"] == (found["worst"] <= estimate.MOST_ERROR)


def test_the_file_goes_with_the_package():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    pattern = parser["options.package_data"]["research"].strip()
    assert calibration.FILE in (ROOT / "research").glob(pattern)
