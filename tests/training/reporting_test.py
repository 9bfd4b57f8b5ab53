"""What an evaluation leaves in the run directory, and the stop on saturation: said, and the same after a kill."""

import dataclasses
import json
import math
import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import preset
from research.config import override
from research.errors import InputError, Interrupted
from research.models.attention import Attention
from research.models.moe import Moe
from research.schema import Stage, evaluation_file
from research.training import loop
from research.training.loop import Launch, run
from research.training.workdir import read_rows


def config_in(cache, **changes):
    base = {"data.cache_dir": str(cache), "train.steps": 40, "train.log_every": 5, "model.dim": 16, "optim.warmup_steps": 0}
    return override(preset("debug"), base | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def flat(cache, **changes):
    """Nothing is learned, so evaluations at 4, 8, 12 are the same: the run ends at 12."""
    return config_in(cache, optim__lr=0.0, train__eval_every=4, train__stop_after_flat=2, **changes)


@pytest.fixture(scope="module")
def saturated(cache, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saturated")
    return workdir, run(flat(cache), Launch(str(workdir), preset("debug"), quiet=True))


def evaluated(workdir) -> list[int]:
    return [row["step"] for row in read_rows(workdir, "metrics-") if "set" in row]


def test_saturation_ends_the_run_and_is_said(saturated, cache, caplog):
    workdir, result = saturated
    assert result["status"] == "saturated" and result["steps"] == 12 and result["tokens"] == 12 * 4 * 64
    last = read_rows(workdir, "ledger-")[-1]
    assert (last["event"], last["reason"], last["step"]) == ("finished", "saturated", 12)
    assert evaluated(workdir) == [4, 8, 12]  # the last one is not recorded twice
    caplog.set_level("INFO", logger="absl")  # an earlier command in this process may have quietened it
    assert run(flat(cache), Launch(str(workdir), preset("debug"), quiet=True)) == result
    assert "has saturated at step 12 already" in caplog.text


def test_a_learning_run_goes_on(cache, tmp_path):
    config = config_in(cache, optim__lr=1e-2, train__eval_every=10, train__stop_after_flat=2)
    result = run(config, Launch(str(tmp_path), preset("debug"), quiet=True))
    assert result["status"] == "finished" and result["steps"] == 40
    assert read_rows(tmp_path, "ledger-")[-1]["reason"] == "finished"


def test_a_stopped_run_counts_what_it_evaluated_before(saturated, cache, tmp_path, monkeypatch):
    """Asked to stop after step 9, between the second and the third evaluation: the same end, the same parameters."""
    plain = loop.evaluate_sets

    def asks_to_stop(session, params, number, suffix=""):
        if number == 8:
            os.kill(os.getpid(), 15)
        return plain(session, params, number, suffix)

    monkeypatch.setattr(loop, "evaluate_sets", asks_to_stop)
    with pytest.raises(Interrupted):
        run(flat(cache), Launch(str(tmp_path), preset("debug"), quiet=True))
    monkeypatch.undo()
    result = run(flat(cache), Launch(str(tmp_path), preset("debug"), quiet=True))
    assert (result["steps"], result["status"]) == (12, "saturated")
    assert result["params_sha256"] == saturated[1]["params_sha256"] and evaluated(tmp_path) == [4, 8, 12]


def test_killed_before_the_result_it_does_not_train_on(saturated, cache):
    workdir, result = saturated
    os.rename(workdir / "result.json", workdir / "kept.json")
    again = run(flat(cache), Launch(str(workdir), preset("debug"), quiet=True))
    assert (again["steps"], again["status"], again["params_sha256"]) == (12, "saturated", result["params_sha256"])
    assert evaluated(workdir) == [4, 8, 12]


def test_documents_and_positions_add_up_to_the_loss(saturated):
    workdir, result = saturated
    final = result["final_eval"]["heldout"]
    rows = [json.loads(line) for line in open(workdir / "evaluation-heldout.jsonl")]
    assert len(rows) == final["documents"] and [row["document"] for row in rows] == sorted(row["document"] for row in rows)
    assert sum(row["tokens"] for row in rows) == final["tokens"]
    assert sum(row["nll"] for row in rows) / final["tokens"] == pytest.approx(final["loss"])
    positions = [row for row in read_rows(workdir, "metrics-") if "set" in row][-1]["loss_by_position"]
    assert list(positions) == ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63"]
    assert all(math.isfinite(value) for value in positions.values()) and min(positions.values()) < final["loss"]
    assert evaluation_file("heldout/average") == "evaluation-heldout.average.jsonl"


def test_bad_input():
    with pytest.raises(InputError, match="train.stop_after_flat: 3 counts evaluations, and eval_every is 0"):
        override(preset("debug"), {"train.stop_after_flat": 3})


def test_the_experts_load_is_in_every_row_and_in_tensorboard(cache, tmp_path):
    """How full the fullest and the emptiest expert of a stage are; means over its layers of what is dropped and the losses."""
    mixer = Moe(experts=4, top_k=2, hidden=8, capacity_factor=1.0, balance_rate=1e-3, balance_loss=0.01, z_loss=1e-3)
    config = config_in(cache, train__steps=4, train__log_every=2)
    model = dataclasses.replace(config.model, stages=(Stage((Attention(heads=2),)), Stage((mixer,), 2)))
    run(dataclasses.replace(config, model=model), Launch(str(tmp_path), preset("debug"), quiet=True))
    rows = [row for row in read_rows(tmp_path, "metrics-") if "loss" in row and "set" not in row]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(rows) == 2
    for name in ("max_load", "min_load", "dropped_share", "balance_loss", "router_z_loss"):
        tag = f"stage_1/moe_0/{name}"
        assert [event.value for event in events.Scalars(tag)] == pytest.approx([row[tag] for row in rows])
    assert all(row["stage_1/moe_0/max_load"] >= 1 >= row["stage_1/moe_0/min_load"] >= 0 for row in rows)
    assert all(0 < row["stage_1/moe_0/dropped_share"] < 1 for row in rows)
