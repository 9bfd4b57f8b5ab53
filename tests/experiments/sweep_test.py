"""A sweep is data: product, zip and chain over override dicts. Its report compares groups of seeds, from a real run's files."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import preset
from experiments import sweep
from experiments.sweep import axis, cell_id, chain, product, remember, report, together
from experiments.sweep_report import detectable, grouped
from research.config import override
from research.errors import InputError
from research.evaluation.comparison import compare
from research.evaluation.statistics import holm, minimum_detectable_effect, over_seeds, power_of
from research.training.loop import Launch, run


def test_product_takes_every_combination_and_later_axes_win():
    cells = product(axis("optim.lr=1e-3,3e-3"), axis("seed=0,1,2"), [{"seed": "7"}])
    assert len(cells) == 6 and {cell["seed"] for cell in cells} == {"7"}
    assert product(axis("a=1,2"), axis("b=3")) == [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]


def test_together_pairs_and_refuses_other_lengths():
    assert together(axis("a=1,2"), axis("b=3,4")) == [{"a": "1", "b": "3"}, {"a": "2", "b": "4"}]
    with pytest.raises(InputError, match="--together: fields have .1, 2. values"):
        together(axis("a=1,2"), axis("b=3"))


def test_chain_keeps_order_and_drops_repeats():
    assert chain([{"a": 1}, {"b": 2}], [{"a": 1}, {"a": 2}]) == [{"a": 1}, {"b": 2}, {"a": 2}]


def test_a_cell_is_known_by_its_overrides_in_any_order():
    assert cell_id({"a": 1, "b": 2}) == cell_id({"b": 2, "a": 1}) != cell_id({"a": 1, "b": 3})


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim.lr="])
def test_an_axis_needs_a_key_and_values(text):
    with pytest.raises(InputError, match="--vary"):
        axis(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    changes = {"data.cache_dir": str(folder / "cache"), "train.steps": 6, "model.dim": 16, "checkpoint.every_minutes": 0}
    run(override(preset("debug"), changes), Launch(str(folder / "run"), preset("debug"), quiet=True))
    return folder / "run"


LEARNING_RATES = ("1e-3", "3e-3", "1e-2")


def finish(trained, workdir, cell, shift, longer: int = 0) -> str:
    """A finished cell like the run, its loss on every held-out document another by about `shift` nats/token."""
    target = workdir / f"cell-{cell_id(cell)}"
    shutil.copytree(trained, target, ignore=shutil.ignore_patterns("checkpoints", "events*"))
    (target / "cell.json").write_text(json.dumps(cell))
    saved = json.loads((target / "config.json").read_text())
    saved["config"]["seed"], saved["config"]["optim"]["lr"] = int(cell["seed"]), float(cell["optim.lr"])
    (target / "config.json").write_text(json.dumps(saved))
    rows = [json.loads(line) for line in (target / "evaluation-heldout.jsonl").read_text().splitlines()]
    for row in rows:
        row["nll"] += row["tokens"] * shift * (1 + 0.1 * (row["document"] % 3))
        row["tokens"] += longer
    (target / "evaluation-heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    result = json.loads((target / "result.json").read_text()) | {"final_eval_loss": loss}
    (target / "result.json").write_text(json.dumps(result))
    return str(target)


def noise(seed: int) -> float:
    return 0.3 * math.sin(5 * seed)  # of the seed, in every setting: what the pairs take out


@pytest.fixture
def grid(trained, tmp_path):
    """Three learning rates with three seeds, the first of the grid the worst."""
    cells = product(axis("optim.lr=" + ",".join(LEARNING_RATES)), axis("seed=0,1,2"))
    remember(cells, str(tmp_path))
    for cell in cells:
        number = LEARNING_RATES.index(cell["optim.lr"])
        own = 0.01 * math.cos(7 * int(cell["seed"]) + number)
        finish(trained, tmp_path, cell, noise(int(cell["seed"])) + own - 0.02 * number**3)
    return tmp_path


def losses(summary, lr: str) -> list[float]:
    return [row["final_eval_loss"] for row in sorted(summary["results"], key=lambda row: row["seed"])
            if row["overrides"]["optim.lr"] == lr]


def test_groups_are_compared_to_the_grid_s_first_by_seed_and_corrected(grid):
    summary = report(str(grid))
    assert [group["overrides"] for group in summary["groups"]] == [{"optim.lr": lr} for lr in LEARNING_RATES]
    for group, lr in zip(summary["groups"], LEARNING_RATES):
        found = over_seeds(losses(summary, lr))
        assert group["losses"] == dict(zip("012", losses(summary, lr))) and len(group["cells"]) == 3
        assert group["loss"] == {"value": pytest.approx(found.value), "low": found.low, "high": found.high}
        assert group["se"] == pytest.approx(np.std(losses(summary, lr), ddof=1) / 3**0.5)
    for row, lr in zip(summary["differences"], LEARNING_RATES[1:], strict=True):
        wanted = over_seeds(np.subtract(losses(summary, lr), losses(summary, LEARNING_RATES[0])))
        assert (row["run"], row["base"], row["n"], row["note"]) == (f"optim.lr={lr}", "optim.lr=1e-3", 3, "3 seeds")
        assert row["difference"]["value"] == pytest.approx(wanted.value)
        assert row["difference"]["low"] == pytest.approx(wanted.low) and row["p"] == pytest.approx(wanted.p)
        assert row["se"] < 0.2 * summary["groups"][0]["se"]  # what the pairs are for
    assert [row["p_holm"] for row in summary["differences"]] == pytest.approx(holm([r["p"] for r in summary["differences"]]))
    json.dumps(summary, allow_nan=False)
    lines = (grid / "report.md").read_text().splitlines()
    value, row = summary["differences"][1]["difference"], summary["differences"][1]
    shown = f"{value['value']:+.4f} | {value['low']:+.4f} to {value['high']:+.4f} | {row['p_holm']:.2g} | 3 seeds |"
    assert lines[2].startswith("| 1e-3 | 3 |") and lines[2].endswith("| the base |") and lines[4].endswith(shown)
    kept = [json.loads(line)["final_eval_loss"] for line in (grid / "results.jsonl").read_text().splitlines()]
    assert kept == sorted(kept) and len(kept) == 9 and kept[0] == min(losses(summary, "1e-2"))


def test_the_picture_s_bars_are_over_seeds_where_there_are_several(grid, trained, monkeypatch):
    from matplotlib.axes import Axes

    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **how: (drawn.append((x, y, how["yerr"])),
                                                                     errorbar(self, x, y, **how))[1])
    alone = {"optim.lr": "3e-2", "seed": "0"}
    finish(trained, grid, alone, 0.0)
    summary = report(str(grid))
    (xs, means, bars), = drawn
    assert xs == [*LEARNING_RATES, "3e-2"] and means == [group["loss"]["value"] for group in summary["groups"]]
    over_documents = next(row["final_eval_loss_se"] for row in summary["results"] if row["overrides"] == alone)
    assert bars == [*(group["se"] for group in summary["groups"][:3]), over_documents]
    assert summary["groups"][3]["se"] is None and summary["differences"][2]["note"].startswith("seed 0, ")


def test_one_seed_is_paired_by_document_as_tools_compare_does(trained, tmp_path):
    cells = [{"optim.lr": lr, "seed": "0"} for lr in LEARNING_RATES]
    remember(cells, str(tmp_path))
    paths = [finish(trained, tmp_path, cell, 0.01 * number) for number, cell in enumerate(cells)]
    wanted = [row for row in compare(paths)["differences"] if row["what"] == "heldout"]
    for ours, theirs in zip(report(str(tmp_path))["differences"], wanted, strict=True):
        assert {key: ours[key] for key in ("difference", "se", "p", "p_holm", "n")} == {
            key: theirs[key] for key in ("difference", "se", "p", "p_holm", "n")}
        assert ours["note"] == f"seed 0, {theirs['note']}"


@pytest.mark.parametrize("seed,longer,lost,note", [
    ("3", 0, None, "no seed with a held-out loss in common"), ("0", 1, None, "other documents or tokens"),
    ("0", 0, "metrics-0000.jsonl", "has logged no training step"),
    ("0", 0, "evaluation-heldout.jsonl", "no documents of heldout in common"),
])
def test_what_does_not_compare_is_said_and_the_rest_is_a_report(grid, trained, seed, longer, lost, note):
    path = finish(trained, grid, {"optim.lr": "3e-2", "seed": seed}, 0.0, longer)
    if lost:
        os.remove(os.path.join(path, lost))
    *others, row = report(str(grid))["differences"]
    assert note in row["note"] and row["difference"] is None and row["p_holm"] is None
    assert [other["n"] for other in others] == [3, 3] and note in (grid / "report.md").read_text()


def test_a_seed_counts_once_and_a_later_grid_does_not_move_the_base(grid, trained):
    finish(trained, grid, {"optim.lr": "1e-3", "seed": 0}, 50.0)  # as a --cells file would have it
    remember([{"optim.lr": "1e-2", "seed": "0"}, {"optim.lr": "3e-2", "seed": "0"}], str(grid))
    first = report(str(grid))["groups"][0]
    assert first["overrides"] == {"optim.lr": "1e-3"} and len(first["losses"]) == 3 and first["losses"]["0"] < 10


def rows_of(cells, **figures):
    return [{"cell": cell_id(cell), "overrides": cell, "seed": int(cell["seed"]), **figures} for cell in cells]


def test_detectable_asks_finished_pairs_then_cells_then_the_flag(grid):
    planned = rows_of(product(axis("optim.lr=1e-3,3e-3"), axis("seed=0,1,2,3,4")))
    summary, known = report(str(grid)), sweep.finished_cells(str(grid))
    found = detectable(planned, known, 0.5)
    differences = [np.subtract(losses(summary, lr), losses(summary, "1e-3")) for lr in LEARNING_RATES[1:]]
    sd = math.sqrt(np.mean([np.var(values, ddof=1) for values in differences]))
    assert found["sd"] == pytest.approx(sd) and found["sd_from"] == "pairs of finished cells"
    assert found["seeds"] == 5 and found["difference"] == pytest.approx(minimum_detectable_effect(sd, 5))
    assert power_of(found["difference"] / 2, sd, found["seeds_for_half"]) >= 0.8 > power_of(
        found["difference"] / 2, sd, found["seeds_for_half"] - 1)
    one_group = detectable(planned, known[:3], 0.5)
    assert one_group["sd"] == pytest.approx(2**0.5 * np.std(losses(summary, "1e-3"), ddof=1))
    assert one_group["sd_from"] == "finished cells"
    told = detectable(planned, known[:1], 0.5)  # one cell says nothing of seeds
    assert (told["sd"], told["sd_from"]) == (pytest.approx(0.5 * 2**0.5), "--seed_sd")
    assert detectable(planned, [], None) is None


def test_more_seeds_show_less_and_more_settings_cost():
    def difference(settings: int, seeds: int) -> float:
        cells = product([{"optim.lr": str(i)} for i in range(settings)], [{"seed": str(i)} for i in range(seeds)])
        return detectable(rows_of(cells), [], 0.01)["difference"]

    assert difference(2, 3) == pytest.approx(0.0326 * 2**0.5, rel=0.01)  # docs/statistics.md has 0.033
    assert difference(1, 3) == difference(2, 3) < difference(3, 3) < difference(9, 3)
    assert difference(3, 2) > difference(3, 3) > difference(3, 10)
    lone = rows_of([{"optim.lr": "1", "seed": "0"}, {"optim.lr": "2", "seed": "0"}])
    assert detectable(lone, [], 0.01) is None and len(grouped(lone)) == 2


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_standard_deviation_is_above_0(value):
    with pytest.raises(InputError, match="--seed_sd"):
        detectable(rows_of([{"seed": "0"}]), [], value)


def test_plan_says_what_its_seeds_can_show(grid, capfd, monkeypatch):
    program = sweep.make_program(preset("debug"))
    monkeypatch.setattr(sweep, "make_program", lambda config: program)  # the cells' sizes are the same

    def plan(*words: str) -> str:
        before = flagsaver.save_flag_values()
        try:
            arguments = flags.FLAGS(["sweep", "plan", "--config=debug", "--vary=optim.lr=1e-3,1e-2", *words])
            assert sweep.main(arguments) == 0
        finally:
            flagsaver.restore_flag_values(before)
        return capfd.readouterr().out

    known, planned = sweep.finished_cells(str(grid)), product(axis("optim.lr=1e-3,1e-2"), axis("seed=0,1,2,3"))
    wanted = detectable(rows_of(planned), known, None)
    assert json.loads(plan(f"--workdir={grid}", "--seeds=4", "--json"))["detectable"] == wanted
    assert f"4 seeds show a difference of {wanted['difference']:.2g} nats/token" in plan(f"--workdir={grid}", "--seeds=4")
    nowhere = f"--workdir={grid / 'nowhere'}"
    assert "from --seed_sd" in plan(nowhere, "--seeds=2", "--seed_sd=0.01") and not (grid / "nowhere").exists()
    assert "seeds show" not in plan(nowhere, "--seeds=2") + plan(f"--workdir={grid}", "--seed_sd=0.01")
