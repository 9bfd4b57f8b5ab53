"""`fit` as a person runs it: JSON, a table, one line for bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from research.schema import EXIT_BAD_INPUT
from tests.scaling.laws_test import ladder

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    points, path = ladder(0.003), tmp_path_factory.mktemp("laws") / "runs.csv"
    rows = [f"{n},{c},{loss}\n" for n, c, loss in zip(points.params_P, points.flops_P, points.loss_P)]
    path.write_text("Model Size,Training FLOP,final loss\n" + "".join(rows) + "1e6,1e14,nan\n1e6,1e14,7.5\n1e6,,3.5\n")
    return path


def call(runs, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "RUNG_CACHE": str(runs.parent), "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, "-m", "experiments.scaling_laws", *arguments], capture_output=True, text=True,
                          cwd=REPOSITORY, env=env)


FIT = ("fit", "--columns=params=Model Size,flops=Training FLOP,loss=final loss", "--exclude=loss==nan", "--exclude=loss>4.5",
       "--bootstrap=50", "--budget=1e22")


def test_fit_prints_one_json_object(runs):
    done = call(runs, *FIT, f"--csv={runs}", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {"A", "B", "E", "alpha", "beta", "a_opt", "b_opt"} <= set(answer["parameters"])
    assert answer["points"] + answer["excluded"] == 83 and answer["excluded_by"]["loss==nan"] == 1
    assert answer["left_out"] == [{"run": "line 84", "reason": "flops is empty"}]
    assert answer["approach"] == "3" and answer["n_used"] == "the column 'Model Size'" and answer["seconds"] > 0
    assert answer["parameters"]["alpha"]["low"] < 0.34 < answer["parameters"]["alpha"]["high"]


def test_fit_prints_a_table(runs):
    done = call(runs, *FIT, f"--csv={runs}", "--approach=2")
    assert done.returncode == 0, done.stderr
    assert "a_opt" in done.stdout and "loss at 1e+22 FLOPs" in done.stdout and "by loss==nan" in done.stdout


@pytest.mark.parametrize("arguments, message", [
    (["guess"], "verb: unknown 'guess'; choose from: plan, run, fit, predict, score, report"),
    (["fit", "--csv={runs}", "--columns=params=N,flops=C,loss=L"], "it has Model Size, Training FLOP, final loss"),
])
def test_bad_input_is_one_line(runs, arguments, message):
    done = call(runs, *[a.format(runs=runs) for a in arguments])
    assert done.returncode == EXIT_BAD_INPUT and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
