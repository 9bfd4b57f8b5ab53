"""`tools.aot --search`: what it tries, what it keeps, and what the best layout costs."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import pytest

from configs import preset
from research.aot import calibration
from research.aot import search as aot_search
from research.aot.compile import tpu_topology
from research.aot.estimate import Parts, Run
from research.config import override
from research.errors import InputError
from research.hardware import CHIPS

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra tpu is not installed")


def configured():
    return override(preset("llama_tiny"), {"model.compute_dtype": "bfloat16", "model.remat": "full", "train.batch_size": 8,
                                           "mesh.rules": "fsdp"})


@needs_libtpu
def test_a_search_compiles_nothing_that_its_shapes_rule_out(monkeypatch):
    monkeypatch.setattr(aot_search, "compile_for", None)
    sets = next(aot_search.layouts(preset("llama3_8b"), tpu_topology("v5e:2x2")))
    trial = aot_search._compile(preset("llama3_8b"), tpu_topology("v5e:2x2"), sets)
    assert not trial.fits and trial.problem.startswith("needs 24 GB a chip for the state")
    trial = aot_search._compile(preset("llama3_8b"), tpu_topology("v5e:2x2"), sets | {"mesh.tensor": 3})
    assert not trial.fits and "do not multiply" in trial.problem


def test_a_search_goes_on_from_its_file_and_names_the_fastest_that_fits(tmp_path, monkeypatch):
    compiled = []

    def fake(config, topology, sets):
        compiled.append(sets)
        fits = sets["model.remat"] in ("full", "offload") or sets["train.microbatches"] > 1
        seconds = {"none": 3.0, "dots": 3.5, "full": 4.0, "offload": 5.0}[sets["model.remat"]]
        seconds += 0.1 * sets["train.microbatches"]
        floors = {"collectives": None}
        return aot_search.Trial(sets, {"memory": {"fits": fits}, "parts": {"seconds": seconds}, "floors": floors})

    monkeypatch.setattr(aot_search, "_compile", fake)
    path, topology = str(tmp_path / "trials.jsonl"), tpu_topology("v5e:2x2")
    config = configured()
    first, left = aot_search.search(config, topology, 0.0, path)
    assert len(first) == len(compiled) == 1 and left > 0
    trials, left = aot_search.search(config, topology, 60.0, path)
    assert left == 0 and trials[0] == first[0] and len(trials) == len(compiled)  # nothing twice
    chosen = aot_search.best(trials)
    assert (chosen.sets["model.remat"], chosen.sets["train.microbatches"]) == ("none", 2)
    meshes = [trial.sets for trial in trials if trial.sets["mesh.rules"] == "fsdp" and not trial.sets["mesh.data"]]
    assert [(s["model.remat"], s["train.microbatches"]) for s in meshes] == [
        ("offload", 8), ("none", 1), ("none", 2), ("dots", 1), ("full", 1)]
    other, _ = aot_search.search(override(config, {"seed": 1}), topology, 0.0, path)
    assert len(other) == 1  # another config's trials are not taken
    with open(path, "a") as file:
        file.write('{"sets": 1}\n')
    with pytest.raises(InputError, match="something else than trials"):
        aot_search.search(config, topology, 0.0, path)


def test_a_search_gives_a_mesh_up_where_its_least_memory_does_not_fit(monkeypatch):
    """And tries no mesh twice, whether its sizes are the config's own or the rules'."""
    unfit = {"memory": {"fits": False}}
    monkeypatch.setattr(aot_search, "_compile", lambda config, topology, sets: aot_search.Trial(sets, unfit))
    config = configured()
    trials, left = aot_search.search(config, tpu_topology("v5e:2x2"), 60.0)
    meshes = [tuple(value for name, value in trial.sets.items() if name.startswith("mesh.")) for trial in trials]
    assert left == 0 and len(set(meshes)) == len(meshes) and aot_search.best(trials) is None
    sized = list(aot_search.layouts(override(config, {"mesh.fsdp": 4}), tpu_topology("v5e:2x2")))
    assert len(sized) == len(list(aot_search.layouts(config, tpu_topology("v5e:2x2"))))


FOUND = {"memory": {"fits": True, "total": 10**9}, "flops": {"ratio": 1.3}, "parts": {"dense": 2.0, "seconds": 2.0},
         "floors": {"compute": 1.0, "memory": 0.0, "collectives": 0.0}}
FOUR = tuple(Run(f"run {i}", "v5p", 1.0, Parts(1.0 + i / 100)) for i in range(4))


def test_the_best_layout_has_its_price(monkeypatch):
    """Of the whole run: seconds a step, steps, chips of all slices; where time isn't shown, neither is money."""
    monkeypatch.setattr(calibration, "runs", lambda: FOUR)
    trial = aot_search.Trial({"mesh.rules": "fsdp", "train.steps": 9000}, FOUND)
    found = aot_search.priced(trial, preset("llama3_8b"), tpu_topology("v5p:2x2x1"), 3.0)
    seconds = 2.0 / math.prod(run.parts.dense for run in FOUR) ** 0.25
    assert found["step_seconds"]["value"] == pytest.approx(seconds) and found["price"] == 3.0
    assert found["chip_hours"]["value"] == pytest.approx(seconds * 9000 * 4 / 3600)
    cost = found["cost"]
    assert cost["low"] < cost["value"] < cost["high"] and cost["low"] == pytest.approx(3 * found["chip_hours"]["low"])
    listed = aot_search.priced(trial, preset("llama3_8b"), tpu_topology("v5p:2x2x1"), None)
    assert listed["price"] == CHIPS["v5p"].price_per_hour
    hidden = aot_search.priced(trial, preset("llama_tiny"), tpu_topology("v5p:2x2x1"), 3.0)
    assert hidden["cost"] is hidden["chip_hours"] is None and "narrow" in hidden["not_shown"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3_8b", "llama_tiny"])
def test_a_search_prints_the_price_of_the_best(name):
    """The command, in a process of its own, with trials that nothing was compiled for."""
    program = ("from experiments import command_line\nfrom tests.tools.aot_search_test import FOUND, FOUR\n"
               "from tools import aot\n"
               "trial = aot.Trial({'mesh.rules': 'fsdp'}, FOUND)\naot.search = lambda *given: ([trial], 0)\n"
               "aot.calibration.runs = lambda: FOUR\ncommand_line.run(aot.main)\n")
    words = [sys.executable, "-c", program, f"--config={name}", "--topology=v5p:2x2x1", "--search", "--price=3"]
    run = lambda *more: subprocess.run([*words, *more], capture_output=True, text=True, cwd=REPOSITORY, timeout=200).stdout
    figures, text = json.loads(run("--json"))["best_figures"], run()
    assert figures["price"] == 3.0 and "best: mesh.rules=fsdp" in text
    if name == "llama3_8b":
        assert figures["cost"]["value"] == pytest.approx(3 * figures["chip_hours"]["value"])
        assert f"{figures['cost']['value']:.3g} (" in text and "USD at 3.00 USD a chip-hour" in text
    else:
        assert figures["cost"] is None and "its time and cost aren't shown: no published run is as narrow" in text
