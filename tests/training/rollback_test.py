"""Faults in real, tiny runs: a passing one leaves no trace, one in the data is skipped, a hopeless one ends with the story."""

import itertools
import json
import time

import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import preset
from research.config import override
from research.data import pipeline
from research.data.mixture import Mixture, sample_at, with_skip
from research.data.sources import make_source
from research.errors import Diverged
from research.training.checkpoint import Checkpointer
from research.training.loop import Launch, run
from research.training.metrics import Recorder
from research.training.program import Program, make_program
from research.training.workdir import read_rows

STEPS, BATCH = 24, 4
GUARD = {"guard.window": 6, "guard.patience": 2, "guard.spike_zscore": 4.0, "guard.rollback_steps": 2, "guard.skip_batches": 3}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = {"data.cache_dir": str(tmp_path_factory.mktemp("cache")), "train.steps": STEPS, "train.log_every": 1,
            "train.eval_every": 6, "checkpoint.every_steps": 4, "checkpoint.keep_last": 3, "model.dim": 16,
            "model.dropout": 0.1, "train.ema": 0.9}
    return override(preset("debug"), base | GUARD)


def launch(workdir, fault=None) -> Launch:
    return Launch(str(workdir), preset("debug"), quiet=True, fault=fault)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = run(config, launch(workdir))
    assert not events(workdir, "alarm")
    return workdir, result


def nan_batch(batch):
    return {**batch, "weights_BxL": batch["weights_BxL"] * np.nan}


def noise_batch(batch):
    """Targets that nothing could have learned."""
    targets = np.random.default_rng(0).permuted(np.arange(batch["targets_BxL"].size) % 264)
    return {**batch, "targets_BxL": targets.reshape(batch["targets_BxL"].shape).astype(np.int32)}


class Passing:
    """Makes the batches of `steps` bad, each the first time only."""

    def __init__(self, make, *steps: int):
        self.make, self.left = make, set(steps)

    def __call__(self, step, sample, batch):
        if step not in self.left:
            return batch
        self.left.remove(step)
        return self.make(batch)


class InTheData:
    """Makes every batch bad that has one of `samples`; keeps what was asked for; dies at call `dies_at`."""

    def __init__(self, make, samples, dies_at: int | None = None):
        self.make, self.samples, self.dies_at = make, set(samples), dies_at
        self.calls: list[tuple[int, int]] = []

    def __call__(self, step, sample, batch):
        self.calls.append((step, sample))
        if len(self.calls) == self.dies_at:
            raise OSError("the machine is gone")
        return self.make(batch) if self.samples & set(range(sample, sample + BATCH)) else batch


def steps_of(workdir) -> list[int]:
    return [row["step"] for row in read_rows(workdir, "metrics-") if "set" not in row]


def told(workdir) -> list[tuple]:
    """What the metrics say about the learning: training losses and evaluations, in order."""
    rows = read_rows(workdir, "metrics-")
    return [(row["step"], row["loss"], row["se"] if "set" in row else row["grad_norm"]) for row in rows]


def events(workdir, *names: str) -> list[dict]:
    return [row for row in read_rows(workdir, "ledger-") if row["event"] in names]


def assert_board_shows_each_step_once(workdir, steps=range(1, STEPS + 1)) -> None:
    board = EventAccumulator(str(workdir), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(steps)
    rows = {row["step"]: row["loss"] for row in read_rows(workdir, "metrics-") if "set" not in row}
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx([rows[step] for step in steps])


@pytest.mark.parametrize("make, steps, back_to", [
    (nan_batch, [2], [0]),  # before there is a checkpoint
    pytest.param(nan_batch, [9, 17], [8, 16], marks=pytest.mark.slow),
    (nan_batch, [12, STEPS], [8, 20]),  # in steps that are due to be saved and evaluated
    (noise_batch, [16, 17], [12]),  # step 16 was saved before it was known to be bad
])
def test_a_passing_fault_leaves_no_trace(undisturbed, config, tmp_path, make, steps, back_to):
    workdir, result = undisturbed
    fault = Passing(make, *steps)
    ended = run(config, launch(tmp_path, fault))
    assert not fault.left
    assert ended["params_sha256"] == result["params_sha256"] and ended["final_eval"] == result["final_eval"]
    assert [row["step"] for row in events(tmp_path, "rolled_back")] == back_to and not events(tmp_path, "skipped")
    assert len(events(tmp_path, "alarm")) == len(back_to)
    assert told(tmp_path) == told(workdir)
    assert_board_shows_each_step_once(tmp_path)
    assert ended["goodput"]["repeated"] > 0 and ended["goodput"]["restoring"] > 0
    saved = [row["step"] for row in events(tmp_path, "saved")]
    assert max(saved) == STEPS and set(saved) == {4, 8, 12, 16, 20, 24}


@pytest.mark.parametrize("broken, lasting, back_to", [
    pytest.param([8], False, [4], marks=pytest.mark.slow),  # the step to go back to
    pytest.param([4, 8], False, [0], marks=pytest.mark.slow),  # all of them
    ([4], True, [8, 8]),  # the step to go back to when the fault comes again: the only one far enough before it
])
def test_a_broken_step_is_no_way_back_and_costs_no_good_one(undisturbed, config, tmp_path, broken, lasting, back_to):
    """Damaged on the disk as the fault comes: it goes to quarantine, and the run back to a good one."""
    fault = InTheData(nan_batch, [10 * BATCH]) if lasting else Passing(nan_batch, 11)

    waiting = list(broken)

    def breaking(step, sample, batch):
        while step == 11 and waiting:
            place = tmp_path / "checkpoints" / str(waiting[-1])
            while not place.exists():  # it is written in the background
                time.sleep(0.01)
            for file in place.glob("optimizer/**/d/*"):
                file.write_bytes(b"")
            waiting.pop()
        return fault(step, sample, batch)

    config = override(config, {"guard.rollback_steps": 4})
    ended = run(config, launch(tmp_path, breaking))
    assert [row["step"] for row in events(tmp_path, "rolled_back")] == back_to
    assert sorted(row["step"] for row in events(tmp_path, "quarantined")) == broken
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))
    if not lasting:
        assert ended["params_sha256"] == undisturbed[1]["params_sha256"]


def test_nothing_is_compiled_again_and_nan_is_found_within_one_step(config, tmp_path, monkeypatch):
    compiled, plain = [], Program.compile
    monkeypatch.setattr(Program, "compile", lambda self, frozen=None: compiled.append(1) or plain(self, frozen))
    fault = InTheData(nan_batch, ())
    passing = Passing(nan_batch, 10)
    run(config, launch(tmp_path, lambda step, sample, batch: passing(step, sample, fault(step, sample, batch))))
    assert compiled == [1]
    steps = [step for step, _ in fault.calls]
    assert steps == [*range(1, 12), *range(9, STEPS + 1)]  # step 11 was dispatched before the metrics of 10 were read


BAD_SAMPLE = 12 * BATCH + 1  # in step 13


@pytest.fixture(scope="module")
def skipped(config, tmp_path_factory):
    workdir, fault = tmp_path_factory.mktemp("skipped"), InTheData(nan_batch, [BAD_SAMPLE])
    return workdir, run(config, launch(workdir, fault)), fault.calls


def test_bad_data_is_replayed_then_skipped(skipped, undisturbed, config):
    workdir, result, calls = skipped
    assert [row["event"] for row in events(workdir, "alarm", "skipped", "rolled_back")] == [
        "alarm", "rolled_back", "alarm", "skipped", "rolled_back"]
    first, second = events(workdir, "rolled_back")
    assert (first["step"], first["batches"]) == (12, 0)
    # About 2 steps before step 13: the newest checkpoint is that of step 8; the data of steps 11 ... 13 goes.
    assert (second["step"], second["skip_from"], second["batches"]) == (8, 10, 3)
    (skip,) = events(workdir, "skipped")
    assert skip["samples"] == [10 * BATCH, 13 * BATCH]
    last = {step: sample for step, sample in calls}  # the last time that each step was trained
    assert [last[step] for step in range(1, STEPS + 1)] == [
        (step - 1 if step <= 10 else step + 2) * BATCH for step in range(1, STEPS + 1)]
    assert result["params_sha256"] != undisturbed[1]["params_sha256"]
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    assert_board_shows_each_step_once(workdir)
    with Checkpointer(epath.Path(workdir), config.checkpoint) as checkpointer:
        _, data = checkpointer.restore(make_program(config).abstract)
    assert data["skips"] == [[40, 52]] and data["sample"] == (STEPS + 3) * BATCH


def test_the_ledger_names_the_skipped_documents(skipped, config):
    workdir, _, _ = skipped
    (skip,) = events(workdir, "skipped")
    data = pipeline.prepare(config.data, config.model.vocab_size, config.seed, quiet=True)
    source = make_source(config.data.sources[0].name, config.data.sources[0].args)
    texts = {source.document_id(i): source.document(i).text for i in range(len(source))}
    mixture, inside = Mixture(data.weights, [len(rows) for rows in data.train], config.seed), set(skip["documents"])
    assert len(inside) == len(skip["documents"]) and inside <= set(texts)
    for sample in range(*skip["samples"]):  # the text between a row's document marks is in one of those documents
        part, row = mixture.sample(sample)
        arrays = data.train[part][row]
        for segment in range(1, arrays["segment_ids_L"].max() + 1):
            ids = arrays["tokens_L"][arrays["segment_ids_L"] == segment]
            text = data.tokenizer.decode([i for i in ids.tolist() if i not in (data.tokenizer.bos_id, data.tokenizer.eos_id)])
            assert any(text in texts[name] for name in inside), (sample, segment)
    assert len(inside) < len(texts) / 2


# Calls: steps 1 ... 14, the replay of 13 and 14, then 9 ... 24 without the skipped ones.
@pytest.mark.parametrize("dies_at", [16, 19, *(pytest.param(call, marks=pytest.mark.slow) for call in (15, 17, 22, 26))])
def test_killed_anywhere_the_order_is_the_same(skipped, config, tmp_path, dies_at):
    _, result, calls = skipped
    assert [step for step, _ in calls] == [*range(1, 15), 13, 14, *range(9, STEPS + 1)]
    with pytest.raises(OSError, match="the machine is gone"):
        run(config, launch(tmp_path, InTheData(nan_batch, [BAD_SAMPLE], dies_at)))
    again = InTheData(nan_batch, [BAD_SAMPLE])
    ended = run(config, launch(tmp_path, again))
    assert ended["params_sha256"] == result["params_sha256"]
    assert steps_of(tmp_path) == list(range(1, STEPS + 1))
    assert len(events(tmp_path, "skipped")) == 1
    last = dict(calls)
    assert all(last[step] == sample for step, sample in dict(again.calls).items())


def test_a_spike_in_the_data_is_skipped(config, tmp_path):
    bad = range(15 * BATCH, 17 * BATCH)  # steps 16 and 17
    ended = run(config, launch(tmp_path, InTheData(noise_batch, bad)))
    assert ended["goodput"]["repeated"] > 0
    (skip,) = events(tmp_path, "skipped")
    assert skip["samples"][0] <= bad[0] and bad[-1] < skip["samples"][1]
    assert all("deviations high" in row["reason"] for row in events(tmp_path, "alarm"))
    assert ended["status"] == "finished" and steps_of(tmp_path) == list(range(1, STEPS + 1))


def test_a_hopeless_run_ends_with_the_story(config, tmp_path):
    config = override(config, {"guard.max_rollbacks": 3})
    fault = InTheData(nan_batch, range(10 * BATCH, 1000 * BATCH))  # all data from step 11 on
    with pytest.raises(Diverged) as caught:
        run(config, launch(tmp_path, fault))
    words = str(caught.value)
    assert words.splitlines() == [
        "step 9: objective is nan; the guard gives up, nothing after step 8 is kept",
        "  before that, step 9: objective is nan; back to step 8, with the same data",
        "  before that, step 11: objective is nan; back to step 8, without 3 batches after step 8",
        "  before that, step 11: objective is nan; back to step 8, with the same data"]
    last = read_rows(tmp_path, "ledger-")[-1]
    assert last["event"] == "alarm" and "\n".join(last["story"]) == words
    assert not (tmp_path / "result.json").exists()
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 8
    with pytest.raises(Diverged):  # the limit holds over launches, too
        run(config, launch(tmp_path, fault))
    ended = run(override(config, {"guard.max_rollbacks": 9}), launch(tmp_path))  # it may be raised; the trouble is over
    assert ended["steps"] == STEPS and steps_of(tmp_path) == list(range(1, STEPS + 1))


def test_without_rollbacks_the_first_alarm_ends_the_run(config, tmp_path):
    """And of a spike, nothing that was saved while it rose (step 16) is left for the next launch."""
    with pytest.raises(Diverged, match="step 17: the loss is .* deviations high; the guard gives up, nothing after step 15"):
        run(override(config, {"guard.max_rollbacks": 0}), launch(tmp_path, Passing(noise_batch, 16, 17)))
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 12
    assert len(events(tmp_path, "alarm")) == 1 and not events(tmp_path, "rolled_back")


def test_the_recorder_goes_back(tmp_path):
    recorder = Recorder(epath.Path(tmp_path), 0)
    row = {"loss": 1.0, "tokens": 1, "flops": 1e15}
    for step in (*range(1, 9), None, 5, 6, None, 3):
        if step is None:
            recorder.rewind(4 if 4 in steps_of(tmp_path) and 8 in steps_of(tmp_path) else 2)
            continue
        recorder.row(step, {**row, "loss": float(10 * step)})
    recorder.close()
    assert steps_of(tmp_path) == [1, 2, 3]
    assert_board_shows_each_step_once(tmp_path, range(1, 4))
    assert len(list(tmp_path.glob("metrics-*"))) == 2  # a part of its own after each rollback; an empty one is gone


def test_checkpoints_of_a_past_left_behind_are_deleted(skipped):
    """Every checkpoint that there is was made without the skipped data."""
    workdir, _, _ = skipped
    for path in sorted((workdir / "checkpoints").iterdir()):
        data = json.loads((path / "data" / "metadata").read_text())
        assert data["skips"] == [[40, 52]] and data["sample"] == (int(path.name) + 3) * BATCH


def test_samples_and_skips_agree_with_a_list():
    """Against the order written out, ranges taken out of it one after the other."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        order, skips = list(range(200)), ()
        for _ in range(5):
            begin = int(rng.integers(0, 40))
            end = begin + int(rng.integers(1, 25))
            skip = order[begin], order[end]
            del order[begin:end]
            skips = with_skip(skips, *skip)
            assert with_skip(skips, *skip) == skips
            assert [sample_at(place, skips) for place in range(60)] == order[:60]
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(skips))
