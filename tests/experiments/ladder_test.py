"""A ladder from its plan to its report: with runs that were made up by a law, and (slow) with real ones."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from configs import preset
from configs.ladder import BASE_LR, FAMILIES
from experiments import ladder, ladder_report
from experiments.cells import cost_in_words, total_cost
from research.config import override
from research.errors import InputError
from research.scaling.prediction import config_sha256, read_prediction, seal
from research.schema import EXIT_BAD_INPUT, RESULT_FILE
from research.training.workdir import write_config

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
DIMS, BUDGETS = (16, 32, 48, 64), (2e10, 6e10, 1.8e11, 5.4e11, 1.6e12)


def asked(**changes):
    return ladder.asked(**{"family": "transformer", "data": None, "dims": DIMS, "budgets": BUDGETS, "ratios": (0.1, 3000.0),
                           "seed": 0, "changes": {"optim.warmup_steps": "20"}} | changes)


def planned(workdir, **changes):
    return ladder.make_plan(str(workdir), asked(**changes), measured=False)


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A plan whose runs ended as a law says, with 0.2% of noise; one diverged, as its ledger says."""
    workdir = tmp_path_factory.mktemp("ladder")
    plan, rng = planned(workdir), np.random.default_rng(0)
    for row in plan["rungs"]:
        os.makedirs(row["workdir"])
        loss = (1.2 + 60 / row["params"] ** 0.4 + 199 / row["tokens"] ** 0.4) * np.exp(0.002 * rng.standard_normal())
        with open(os.path.join(row["workdir"], RESULT_FILE), "w") as file:
            json.dump({"final_eval_loss": loss, "final_eval_loss_se": 0.01}, file)
    lost = plan["rungs"][-1]
    os.remove(os.path.join(lost["workdir"], RESULT_FILE))
    with open(os.path.join(lost["workdir"], "ledger-0000.jsonl"), "w") as file:
        file.write(json.dumps({"event": "alarm", "step": 3, "story": ["not finite"]}) + "\n")
    return str(workdir), plan, ladder.collect(str(workdir), plan)


def test_a_plan_says_what_each_run_computes_and_a_trunk_serves_all_its_branches(climbed):
    workdir, plan, _ = climbed
    assert ladder.read_plan(workdir) == plan and len(plan["trunks"]) == len(DIMS)
    assert "matmul peak" in plan["seconds_from"] and all(row["seconds"] > 0 for row in plan["trunks"] + plan["rungs"])
    alone = sum(row["flops"] for row in plan["rungs"])
    assert sum(row["trained_flops"] for row in plan["trunks"] + plan["rungs"]) < alone
    for trunk in plan["trunks"]:
        config = override(preset(plan["preset"]), trunk["overrides"])
        branches = [row for row in plan["rungs"] if row["dim"] == trunk["dim"]]
        points = [int(row["overrides"]["train.branch_from"].rpartition("@")[2]) for row in branches]
        assert sorted(config.checkpoint.keep_at) == sorted(points) and config.train.steps == max(points)
        for row, point in zip(branches, points):
            branch = override(preset(plan["preset"]), row["overrides"])
            assert branch.train.steps - branch.optim.decay_steps == point
            assert (branch.optim.lr, branch.seed, branch.model) == (config.optim.lr, config.seed, config.model)


def test_diverged_runs_are_named_and_left_out(climbed):
    workdir, plan, rows = climbed
    assert [row["run"] for row in rows if row["diverged"]] == [plan["rungs"][-1]["cell"]]
    points, excluded, lost = ladder.ladder_points(os.path.join(workdir, ladder.CSV_FILE), {}, [])
    assert lost == [plan["rungs"][-1]["cell"]] and not excluded and len(points) == len(rows) - 1
    assert points.names == tuple(row["run"] for row in rows[:-1])


def test_a_run_that_ended_high_is_in_no_prediction(climbed, tmp_path):
    """Diverged by its loss alone: the fit, the forecast, the backtests and the file's runs are all without it."""
    workdir, plan, rows = climbed
    path, spoilt = tmp_path / "ladder.csv", max((row for row in rows if not row["diverged"]), key=lambda row: row["flops"])
    table = pathlib.Path(workdir, ladder.CSV_FILE).read_text().replace(str(spoilt["loss"]), "6.0")
    path.write_text(table)
    points, _, lost = ladder.ladder_points(str(path), {}, [])
    assert spoilt["run"] in lost and spoilt["run"] not in points.names
    with pytest.raises(InputError, match="--approach: '4' says nothing of a ladder's runs"):
        ladder.predict(points, plan, "4", 1e13, None, "params", 64, 0)


def test_a_branch_of_a_trunk_that_failed_waits_for_it(climbed, monkeypatch):
    workdir, plan, _ = climbed
    called = []
    monkeypatch.setattr(ladder, "run_cells", lambda rows, *_: called.append([row["cell"] for row in rows]) or [])
    ladder.run(workdir, plan, jobs=1, minutes=None)
    trunks = sorted(plan["trunks"], key=lambda row: -row["seconds"])
    assert called == [[row["cell"] for row in trunks], []]  # no trunk has finished


@pytest.fixture(scope="module")
def predicted(climbed):
    workdir, plan, _ = climbed
    points, _, _ = ladder.ladder_points(os.path.join(workdir, ladder.CSV_FILE), {}, [])
    return points, seal(ladder.predict(points, plan, "3", 10 * float(points.flops_P.max()), None, "params", 64, 0))


def test_the_prediction_is_of_the_best_size_and_near_the_truth(climbed, predicted, tmp_path):
    _, plan, _ = climbed
    points, found = predicted
    target = found["target"]
    truth = 1.2 + 60 / target["params"] ** 0.4 + 199 / target["tokens"] ** 0.4
    assert found["low"] < found["value"] < found["high"] and abs(found["value"] / truth - 1) < 0.02
    assert target["times"] == pytest.approx(10, rel=0.01)
    assert 0.6 < target["params"] / found["optimum"]["N_opt"]["value"] < 1.6
    assert len(found["runs"]) == len(points) and found["backtests"]["later"]["runs"] > found["backtests"]["next"]["runs"] > 0
    (tmp_path / "p.json").write_text(json.dumps(found))
    assert read_prediction(str(tmp_path / "p.json")) == found
    text = {key: str(value) for key, value in target["overrides"].items()} | {"seed": "2"}  # as the command line has it
    assert config_sha256(override(preset(plan["preset"]), text)) == target["config_sha256"]


def test_another_width_can_be_asked_for(climbed):
    _, plan, _ = climbed
    rung, config = ladder.target_of(plan, 1e12, 1e9, "params", dim=64)
    assert config.model.dim == 64 and rung.flops == pytest.approx(1e12, rel=0.01)


def test_the_report_has_a_verdict_tables_and_pictures(climbed, predicted, tmp_path):
    workdir, plan, _ = climbed
    points, _ = predicted
    answer = ladder_report.summarise(points, "3", 64, 0)
    answer["crossing"] = ladder_report.crossing(points, points, "3", 64, 0, ("a", "b"))
    answer["verdict"] += ladder_report.compared(answer["crossing"])
    assert {row["prefers"] for row in answer["crossing"]["at"]} == {None}  # with itself
    assert any("a less b is +0.000 (" in words for words in answer["verdict"])
    assert "The laws of a and b don't cross within 1,000 times of what both were measured at" in answer["verdict"][-1]
    ladder_report.draw(str(tmp_path / "report.png"), points, "3", 64, 0, answer["backtests"], {}, [], 1e13)
    ladder_report.write(str(tmp_path), answer, points, ["lost"])
    text = (tmp_path / "report.md").read_text()
    assert "grows as compute to the power" in text and "Left out, diverged: lost." in text and points.names[0] in text
    assert (tmp_path / "report.png").stat().st_size > 20_000
    json.loads((tmp_path / "report.json").read_text())


def test_a_crossing_is_found_with_its_interval(predicted):
    points, _ = predicted
    steeper = ladder.make(points.params_P, 1.1 + (points.loss_P - 1.2) ** 1.3, points.tokens_P, points.flops_P)
    found = ladder_report.crossing(points, steeper, "3", 64, 0, ("a", "b"))
    assert found["measured"] == [points.flops_P.min(), points.flops_P.max()]
    assert found["at"][0]["prefers"] == "a" and found["at"][-1]["prefers"] == "b"
    turn, = found["crossings"]
    assert turn["flops"]["low"] <= turn["flops"]["value"] <= turn["flops"]["high"] and turn["to"] == "b"
    first, last, words = ladder_report.compared(found)
    for sentence, row in zip((first, last), (found["at"][0], found["at"][-1])):
        value, low, high = map(float, re.search(r"lower by ([\d.]+) \(([\d.]+) to ([\d.]+)\)\.$", sentence).groups())
        assert low <= value <= high and value == pytest.approx(abs(row["difference"]["value"]), abs=1e-3)
        assert f"the best of {row['prefers']} is lower" in sentence
    assert words.startswith("The laws of a and b cross at ") and "above, b is lower" in words
    assert ("extrapolated" in words) == turn["extrapolated"]


def test_a_crossing_beyond_the_runs_is_said_to_be_extrapolated(predicted):
    """The second is worse wherever it was measured, and falls faster: equal at a loss of 1.9, ten times as far."""
    points, _ = predicted
    later = ladder.make(points.params_P, 1.15 * points.loss_P - 0.15 * 1.9, points.tokens_P, points.flops_P)
    found = ladder_report.crossing(points, later, "3", 64, 0, ("a", "b"))
    *_, words = ladder_report.compared(found)
    assert [(turn["to"], turn["extrapolated"]) for turn in found["crossings"]] == [("b", True)]
    assert "(extrapolated: both were measured from 2e+10 to 1.6e+12 only)" in words and "lower" in words


def test_ladders_without_common_budgets_are_not_compared(predicted):
    points, _ = predicted
    far = ladder.make(points.params_P, points.loss_P, 1e4 * points.tokens_P, 1e4 * points.flops_P)
    with pytest.raises(InputError, match="--against: of a and b one ends at 1.6e.12 FLOPs, the other begins at .*e.14"):
        ladder_report.crossing(points, far, "3", 64, 0, ("a", "b"))


def test_seeds_of_one_prediction_are_averaged_with_an_interval():
    rows = [{"sha256": "a", "relative_error": error, "covered": True} for error in (0.01, 0.02, 0.03)]
    rows += [{"sha256": name, "relative_error": error, "covered": False} for name, error in (("b", 0.5), ("a", None))]
    rows = [row | {"run": f"seed{i}", "diverged": row["relative_error"] is None} for i, row in enumerate(rows)]
    found = ladder.score_summary(rows)
    assert (found["covered"], found["runs"], found["diverged"]) == (3, 5, ["seed4"]) and len(found["mean_relative_errors"]) == 1
    mean, = found["mean_relative_errors"]
    assert mean["runs"] == 3 and mean["relative_error"]["value"] == pytest.approx(0.02)
    assert mean["relative_error"]["low"] == pytest.approx(0.02 - 4.303 * 0.01 / 3**0.5, rel=1e-3)


def test_costs_add_up_and_an_unknown_one_stays_unknown():
    known = {"chip_seconds": 10.0, "cost": {"value": 2.0, "low": 1.0, "high": 3.0}, "energy_kwh": None}
    total = total_cost([known, known])
    assert total == {"runs": 2, "chip_seconds": 20.0, "cost": {"value": 4.0, "low": 2.0, "high": 6.0}, "energy_kwh": None}
    assert cost_in_words(total) == "2 runs took 20 chip-seconds, 4 (2 to 6) USD."
    assert total_cost([known, known | {"cost": None}])["cost"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_ladder_is_long_enough(family):
    chosen = FAMILIES[family]
    assert np.log10(max(chosen.budgets) / min(chosen.budgets)) >= 1.5
    sizes = [ladder.size_of(chosen.preset, dim, chosen.size(dim), 1e9) for dim in chosen.dims]
    assert len(ladder.grid(sizes, chosen.budgets, preset(chosen.preset).optim.warmup_steps)) >= 12
    for dim in chosen.dims:
        config = override(preset(chosen.preset), chosen.size(dim))
        assert config.model.dim == dim and config.optim.role_lr.input == pytest.approx(dim / 64)
        assert config.optim.lr * config.optim.role_lr.input == pytest.approx(BASE_LR)


def call(*arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, "-m", "experiments.scaling_laws", *arguments], capture_output=True, text=True,
                          cwd=REPOSITORY, env=env)


def test_a_target_that_diverged_is_a_miss_and_named(tmp_path):
    """Of three seeds one diverged: its guard gave up, so it has no result. One that still runs isn't scored."""
    config = preset("debug")
    sealed = seal({"value": 2.0, "low": 1.9, "high": 2.1, "law": "L = E", "runs": [],
                   "target": {"config_sha256": config_sha256(config), "params": 1000, "tokens": 1536, "flops": 1e9}})
    for seed in range(4):
        home = tmp_path / f"target-seed{seed}"
        home.mkdir()
        write_config(home, override(config, {"seed": seed}), "")
        (home / "prediction.json").write_text(json.dumps(sealed))
        if seed < 2:
            (home / RESULT_FILE).write_text(json.dumps({"final_eval_loss": 2.0, "final_eval_loss_se": 0.01, "flops": 1e9}))
        lost = {"story": ["not finite"]} if seed == 2 else {}
        (home / "ledger-0000.jsonl").write_text(json.dumps({"event": "alarm", "step": 3} | lost) + "\n")
    answer = ladder.score_summary(ladder.scores([str(home) for home in sorted(tmp_path.iterdir())]))
    assert (answer["covered"], answer["runs"]) == (2, 3) and answer["diverged"] == [str(tmp_path / "target-seed2")]
    assert [row["seed"] for row in answer["scores"]] == [0, 1, 2] and answer["scores"][2]["observed"] is None
    assert answer["mean_relative_errors"][0]["runs"] == 2
    done = call("score", f"--workdir={tmp_path}")
    assert f"2 of 3 inside the interval; diverged, which is a miss: {tmp_path}/target-seed2" in done.stdout, done.stderr


def test_outside_data_are_predicted_from_and_reported_without_a_ladder(climbed, tmp_path):
    workdir, _, _ = climbed
    csv, sealed = os.path.join(workdir, ladder.CSV_FILE), tmp_path / "new" / "p.json"
    done = call("predict", f"--csv={csv}", f"--output={sealed}", "--budget=1e13", "--bootstrap=40")
    assert done.returncode == 0 and "so no run can register it" in done.stdout, done.stderr
    found = read_prediction(str(sealed))
    target = found["target"]
    assert target["config_sha256"] is None and 6 * target["params"] * target["tokens"] == pytest.approx(1e13, rel=0.5)
    truth = 1.2 + 60 / target["params"] ** 0.4 + 199 / target["tokens"] ** 0.4
    assert found["low"] < truth < found["high"]
    done = call("report", f"--csv={csv}", f"--workdir={tmp_path}/fresh", "--bootstrap=20", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fresh" / "report" / "report.md").exists() and json.loads(done.stdout)["scores"] == []


@pytest.mark.parametrize("arguments, message", [
    (["predict", "--workdir={0}"], "--workdir: {0} has no plan.json"),
    (["predict", "--csv=runs.csv", "--output={0}/p.json", "--dim=64"], "--dim: says nothing without a ladder's plan"),
    (["plan", "--workdir={0}", "--ratios=5,1"], "isn't LOW,HIGH"),
])
def test_bad_input_is_one_line(tmp_path, arguments, message):
    done = call(*[argument.format(tmp_path) for argument in arguments])
    assert done.returncode == EXIT_BAD_INPUT and message.format(tmp_path) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_plan_keeps_what_it_was_asked_for_and_others_flags_are_refused(climbed):
    workdir, plan, _ = climbed
    assert plan["asked"] == asked()
    ladder.check_asked(workdir, ladder.read_plan(workdir), {name: asked()[name] for name in ("dims", "ratios", "set")})
    for changes, message in (({"dims": (16, 32, 48)}, r"--dims: .*plan.json has \[16, 32, 48, 64\], not \[16, 32, 48\]; leave"),
                             ({"changes": {}}, "--set: .*plan.json has .*warmup_steps.*, not {}"),
                             ({"seed": 1}, "--seed: .*plan.json has 0, not 1")):
        with pytest.raises(InputError, match=message):
            ladder.check_asked(workdir, plan, asked(**changes))
        with pytest.raises(InputError, match=message):
            planned(workdir, **changes)  # its runs are there
    old = {name: value for name, value in plan.items() if name != "asked"}
    with pytest.raises(InputError, match="--dims: .*plan.json doesn't say which it has"):
        ladder.check_asked(workdir, old, {"family": "transformer", "dims": [16]})


def test_what_the_ladder_decides_can_not_be_set():
    with pytest.raises(InputError, match="--set: model.dim, optim.lr, train.steps: the ladder decides that"):
        asked(changes={"optim.lr": "1", "train.steps": "5", "model.dim": "3", "optim.warmup_steps": "20"})


@pytest.mark.slow
def test_run_with_another_plans_flags_is_one_line(climbed):
    workdir, _, _ = climbed
    done = call("run", f"--workdir={workdir}", "--budgets=1e12", "--dims=16,32,48,64")
    assert done.returncode == EXIT_BAD_INPUT and "--budgets: " in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_width_that_heads_do_not_divide_is_refused(tmp_path):
    with pytest.raises(InputError, match="--dims: 24 is no multiple of 16"):
        planned(tmp_path, dims=(16, 24))


@pytest.mark.slow
def test_the_whole_chain_with_real_runs(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"def f{i}(x):\n    return x * {i} + {i * i}\n" * 60)
    workdir = tmp_path / "ladder"
    tiny = ["--dims=16,32,48", "--budgets=3e8,9e8,2.7e9", "--ratios=0.001,3000", f"--data={tmp_path}/*.txt", "--nomeasure",
            "--set=optim.warmup_steps=1", f"--set=data.cache_dir={tmp_path}/cache", "--set=train.batch_size=8",
            "--set=data.holdout=0.1", "--set=data.validation.0.max_rows=16"]
    done = call("plan", f"--workdir={workdir}", *tiny, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rungs"]) == 9
    done = call("run", f"--workdir={workdir}", "--jobs=2", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rungs"]) == 9 and not json.loads(done.stdout)["failed"]
    done = call("predict", f"--workdir={workdir}", "--bootstrap=40", "--times=2", "--dim=32", "--json")
    assert done.returncode == 0, done.stderr
    target = json.loads(done.stdout)["target"]
    sets = [f"--set={key}={value}" for key, value in target["overrides"].items()]
    done = subprocess.run([sys.executable, "-m", "experiments.train", f"--config={target['preset']}", *sets,
                           f"--workdir={workdir}/target", f"--prediction={workdir}/prediction.json", "--json"],
                          capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens"] == target["tokens"] and result["flops"] == pytest.approx(target["flops"])
    done = call("score", f"--workdir={workdir}", "--json")
    score, = json.loads(done.stdout)["scores"]
    assert score["observed"] == result["final_eval_loss"] and score["covered"] == result["prediction"]["covered"]
    done = call("report", f"--workdir={workdir}", "--bootstrap=40", "--json")
    assert done.returncode == 0, done.stderr
    assert (workdir / "report" / "report.png").exists() and json.loads(done.stdout)["scores"]


def test_a_grid_that_cannot_be_is_refused_before_a_step_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "step_seconds", lambda _: pytest.fail("a step was timed"))
    with pytest.raises(InputError, match="--budgets"):
        ladder.make_plan(str(tmp_path), asked(ratios=(5.0, 6.0)), measured=True)
