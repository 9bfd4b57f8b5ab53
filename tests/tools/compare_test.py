"""compare: the figures of two real runs, by hand from their files; sweeps; what it refuses."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import preset
from research.config import override
from research.errors import InputError
from research.evaluation import runs
from research.evaluation.comparison import compare
from research.schema import Source, Validation
from research.training.loop import Launch, run
from research.training.workdir import read_rows

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LEARNING_RATES = {"slow": 1e-3, "fast": 1e-2}


def train(folder, name: str, fault=None, **changes) -> str:
    base = {"data.cache_dir": str(folder / "cache"), "train.steps": 40, "train.log_every": 1, "train.eval_every": 20,
            "model.dim": 16, "checkpoint.every_minutes": 0}
    config = override(preset("debug"), base | {key.replace("__", "."): value for key, value in changes.items()})
    run(config, Launch(str(folder / name), preset("debug"), quiet=True, fault=fault))
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def two(folder):
    return [train(folder, name, optim__lr=lr) for name, lr in LEARNING_RATES.items()]


@pytest.fixture(scope="module")
def summary(two):
    return compare(two)


def copy(source: str, target, changes=None, keep=lambda row: True, document=lambda row: row, **figures) -> str:
    """A run like `source` without a result: other config fields and figures, the metrics rows that `keep` keeps, other
    documents."""
    os.makedirs(target)
    saved = json.load(open(f"{source}/config.json"))
    for path, value in (changes or {}).items():
        *nodes, field = path.split(".")
        node = saved["config"]
        for name in nodes:
            node = node[name]
        assert field in node and node[field] != value
        node[field] = value
    (target / "config.json").write_text(json.dumps(saved))
    rows = [row | figures for row in read_rows(source, "metrics-") if keep(row)]
    (target / "metrics-0000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ledger in pathlib.Path(source).glob("ledger-*"):
        shutil.copy(ledger, target)
    documents = [document(json.loads(line)) for line in open(f"{source}/evaluation-heldout.jsonl")]
    (target / "evaluation-heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    return str(target)


def difference(summary, what: str) -> dict:
    return next(row for row in summary["differences"] if row["what"] == what)


def test_documents_are_paired_as_by_hand(two, summary):
    slow, fast = ([json.loads(line) for line in open(f"{path}/evaluation-heldout.jsonl")] for path in two)
    assert [row["document"] for row in slow] == [row["document"] for row in fast]
    tokens = sum(row["tokens"] for row in slow)
    result = json.load(open(f"{two[0]}/result.json"))
    assert sum(row["nll"] for row in slow) / tokens == pytest.approx(result["final_eval_loss"])
    found = difference(summary, "heldout")
    wanted = (sum(row["nll"] for row in fast) - sum(row["nll"] for row in slow)) / tokens
    assert found["difference"]["value"] == pytest.approx(wanted) and found["n"] == len(slow)
    losses = [run["evaluations"]["heldout"] for run in summary["runs"]]
    assert wanted == pytest.approx(losses[1]["loss"] - losses[0]["loss"])
    assert found["difference"]["low"] < wanted < found["difference"]["high"] < 0
    assert found["se"] < 0.7 * math.hypot(losses[0]["se"], losses[1]["se"])  # what the pairs are for


def test_the_training_tail_is_paired_by_step(two, summary):
    slow, fast = ({row["step"]: row["loss"] for row in read_rows(path, "metrics-") if "set" not in row} for path in two)
    found = difference(summary, "training")
    wanted = np.mean([fast[step] - slow[step] for step in range(31, 41)])
    assert found["difference"]["value"] == pytest.approx(wanted) and found["n"] == 10 and found["note"] == "steps 31-40"
    assert summary["same_data_order"] == {"fast": True}


def test_settings_curves_budgets_and_speed(two, summary):
    assert summary["config"] == {"optim.lr": {"slow": 1e-3, "fast": 1e-2}}
    curve = summary["curves"]["fast"]
    assert curve["steps"] == list(range(1, 41)) and curve["tokens"][-1] == 40 * 4 * 64
    assert np.all(np.diff(curve["seconds"]) > 0) and len(curve["flops"]) == len(curve["loss"]) == 40
    equal = summary["equal_budget"]["tokens"]
    assert equal["at"] == curve["tokens"][-1] and equal["training_loss"]["fast"] == pytest.approx(np.mean(curve["loss"][-4:]))
    assert summary["equal_budget"]["seconds"]["at"] == min(c["seconds"][-1] for c in summary["curves"].values())
    for line in summary["runs"]:
        assert line["tokens_per_second"] > 0 and line["device_bytes"] > 0 and line["status"] == "finished"
        assert list(line["loss_by_position"]["heldout"])[:3] == ["0", "1", "2-3"]
    json.dumps(summary, allow_nan=False)


def test_a_run_against_its_copy_is_no_difference(two, tmp_path):
    found = compare([two[0], copy(two[0], tmp_path / "again")])
    assert found["config"] == {} and [run["status"] for run in found["runs"]] == ["finished", "unfinished"]
    assert [row["what"] for row in found["differences"]] == ["training", "heldout"]
    for row in found["differences"]:
        assert row["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and row["p"] == 1.0


def test_other_data_is_said_or_not_paired(two, tmp_path):
    other = copy(two[1], tmp_path / "other", {"seed": 1})
    found = compare([two[0], other])
    assert found["same_data_order"] == {"other": False} and "not the same data order" in difference(found, "training")["note"]
    assert difference(found, "heldout")["difference"]  # the held-out documents don't depend on the seed
    moved = copy(two[1], tmp_path / "moved", {"data.cache_dir": "elsewhere", "train.microbatches": 2})
    assert compare([two[0], moved])["same_data_order"] == {"moved": True}
    longer = copy(two[1], tmp_path / "longer", document=lambda row: row | {"tokens": row["tokens"] + row["document"] // 5})
    row = difference(compare([two[0], longer]), "heldout")
    assert row["difference"] is None and "compare bits per byte" in row["note"]


def test_documents_are_paired_where_the_same_was_asked(folder, tmp_path):
    """Whatever the models were trained on. The texts of all seeds are of one length: tokens alone don't tell the sets apart."""
    def of(seed: int) -> tuple[Source, ...]:
        return (Source("synthetic", {"documents": 20, "length": 200, "seed": seed}),)

    def trained(name: str, on: int, asked: int) -> str:
        return train(folder, name, data__sources=of(on), data__validation=(Validation(sources=of(asked)),))

    base, mixture, asked = trained("base", 0, 5), trained("mixture", 1, 5), trained("asked", 0, 6)
    found = compare([base, mixture, asked])
    paired, other = (row for row in found["differences"] if row["what"] == "heldout")
    losses = [run["evaluations"]["heldout"]["loss"] for run in found["runs"]]
    assert paired["difference"]["value"] == pytest.approx(losses[1] - losses[0]) and paired["n"] == 20
    assert other["difference"] is None and other["note"] == "other documents or tokens; compare bits per byte"
    assert found["same_data_order"] == {"mixture": False, "asked": True}
    for source, pairs in ((mixture, False), (asked, True)):  # a run that doesn't tell is judged by its corpus
        older = copy(source, tmp_path / os.path.basename(source))
        assert bool(difference(compare([base, older]), "heldout")["difference"]) == pairs


def test_skipped_batches_end_the_common_order(folder, two, tmp_path):
    def fault(step, sample, batch):
        return {**batch, "weights_BxL": batch["weights_BxL"] * np.nan} if sample == 80 else batch  # always that of step 21

    guard = {"checkpoint__every_steps": 10, "guard__rollback_steps": 2, "guard__skip_batches": 3}
    skipped = train(folder, "skipped", fault, **guard)
    assert runs.load(skipped, "skipped").skips == ((72, 84),)  # from step 19 on
    found = compare([two[0], skipped])
    assert found["same_data_order"] == {"skipped": False}
    assert difference(found, "training")["note"] == "steps 31-40, not the same data order"
    again, early = copy(skipped, tmp_path / "again"), copy(skipped, tmp_path / "early", keep=lambda row: row["step"] <= 18)
    branches = []
    for step in (18, 30):  # before and after that; the ledger of a branch has no word of it
        branches.append(copy(skipped, tmp_path / f"from-{step}", {"train.branch_from": f"{skipped}@{step}"},
                             keep=lambda row: row["step"] > step))
        for ledger in pathlib.Path(branches[-1]).glob("ledger-*"):
            ledger.unlink()
    for pair in ([skipped, again], [two[0], early], [two[0], branches[0]], [skipped, branches[1]]):
        found = compare(pair)
        assert list(found["same_data_order"].values()) == [True] and "order" not in difference(found, "training")["note"]


def test_p_values_are_adjusted_over_the_runs(two, tmp_path):
    third = copy(two[0], tmp_path / "third", document=lambda row: row | {"nll": row["nll"] + row["document"] % 3 - 0.9})
    found = compare([two[0], two[1], third])
    p = {row["run"]: (row["p"], row["p_holm"]) for row in found["differences"] if row["what"] == "heldout"}
    smaller, larger = sorted(p.values())
    assert smaller[1] == pytest.approx(2 * smaller[0]) and larger[1] == pytest.approx(max(larger[0], smaller[1]))


def test_a_sweep_stands_for_its_cells(two, tmp_path):
    for name, path in zip(("cell-a", "cell-b"), two):
        os.symlink(path, tmp_path / name)
    found = runs.expand([str(tmp_path)])
    assert runs.labels(found) == ["cell-a", "cell-b"]
    assert runs.expand([two[0], str(tmp_path)]) == [str(tmp_path / "cell-a"), str(tmp_path / "cell-b")]  # each run once


def test_labels_are_the_shortest_that_differ():
    assert runs.labels(["x/a", "y/b"]) == ["a", "b"]
    assert runs.labels(["x/run", "y/run/"]) == ["x/run", "y/run"]


def test_the_command(two, tmp_path):
    env = {**os.environ, "RUNG_CACHE": str(tmp_path), "XLA_FLAGS": ""}

    def call(*words):
        return subprocess.run([sys.executable, "-m", "tools.compare", *words], capture_output=True, text=True, cwd=REPOSITORY,
                              env=env)

    unknown = copy(two[0], tmp_path / "unknown", mfu=None)  # a chip that isn't in the table
    shown = call(*two, unknown, f"--output={tmp_path / 'a.png'}")
    assert shown.returncode == 0, shown.stderr
    assert "optim.lr  0.001  0.01  0.001" in shown.stdout and "heldout" in shown.stdout and "[-" in shown.stdout
    assert (tmp_path / "a.png").stat().st_size > 20_000
    printed = call(*two, "--output=", "--json")
    answer = json.loads(printed.stdout)
    assert answer["picture"] is None and answer["base"] == "slow"


def test_a_short_common_tail_says_so(two, tmp_path):
    short = copy(two[1], tmp_path / "short", keep=lambda row: row["step"] <= 5)
    rows = compare([two[0], short])["differences"]
    assert rows[0]["what"] == "training" and rows[0]["difference"] is None
    assert rows[0]["note"] == "5 common steps, 8 are needed"


def test_bad_input(two, tmp_path):
    os.makedirs(tmp_path / "empty")
    odd = copy(two[0], tmp_path / "odd", keep=lambda row: row["step"] % 2)
    even = copy(two[0], tmp_path / "even", keep=lambda row: row["step"] % 2 == 0)
    none = copy(two[0], tmp_path / "none", keep=lambda row: False)
    for paths, message in [
        ([two[0], "nowhere"], "RUN: nowhere is not a run directory"),
        ([two[0], str(tmp_path / "empty")], "is not a run directory"),
        ([two[0]], "RUN: 1 run to compare"),
        ([two[0], two[0] + "/"], "RUN: 1 run to compare"),
        ([odd, even], "no logged step in common"),
        ([two[0], none], "has logged no training step"),
    ]:
        with pytest.raises(InputError, match=message):
            compare(paths)
    with pytest.raises(InputError, match="--tail: 1.5 is not a share"):
        compare(two, tail=1.5)
    with pytest.raises(InputError, match="--confidence: 1.0 is not a share"):
        compare(two, confidence=1.0)
