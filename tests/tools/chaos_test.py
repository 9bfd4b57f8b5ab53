"""The harness: each fault is survived with the bits of the undisturbed run; what isn't is told; trials go on and add up."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from configs import preset
from research.errors import InputError
from research.schema import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from tools import chaos, faults, trials
from tools.chaos import make_job, prepare, summary, trial, trials_in
from tools.faults import BadBatches, Moment, Watch, damage, draw_moment, until
from tools.trials import FAULTS, Missed

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CHEAP, HARD = ("flip", "truncate", "delete", "nan", "spike", "disk_full"), ("kill", "term", "resize", "host_kill", "host_hang")


def given(home: pathlib.Path) -> dict[str, str]:
    return {"data.cache_dir": str(home), "train.steps": "64", "model.dim": "16"}


def moment_of(job, fault: str, number: int) -> Moment:
    """Of a first attempt at flip, truncate or delete."""
    every = job.config.checkpoint.every_steps
    return draw_moment(random.Random(f"{job.seed}/{fault}/{number}/0"), job.config.train.steps, every, first=every + 1)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    home = tmp_path_factory.mktemp("chaos")
    job = make_job("debug", preset("debug"), given(home), home / "job", 3.0, 0)
    prepare(job, CHEAP)
    return job


def test_every_fault_has_a_test():
    assert set(CHEAP) | set(HARD) == set(FAULTS)


@pytest.mark.parametrize("fault,number", [*((fault, 0) for fault in CHEAP), ("nan", 1), ("spike", 1)])
def test_cheap_faults(job, fault, number):
    """Trial 1 of nan and spike is of the lasting kind, whose data is skipped."""
    row = trial(job, fault, number)
    assert row["survived"] and row["note"] == "", row
    assert row["bitwise_expected"] == (number == 0) == row["bitwise_equal"], row
    assert 0 <= row["steps_lost"] <= job.config.checkpoint.every_steps or row["bitwise_expected"] is False
    assert not (job.home / f"{fault}-{number}").exists()


def test_what_does_not_survive_is_told_and_kept(job, monkeypatch):
    def damage_all(kind, step, rng):
        return "; ".join(damage(kind, path, rng) for path in step.parent.iterdir() if path.name.isdigit())

    monkeypatch.setattr(faults, "damage", damage_all)
    number = next(number for number in range(7, 50) if not moment_of(job, "delete", number).in_save)
    row = trial(job, "delete", number)
    assert not row["survived"] and not row["bitwise_equal"], row
    assert row["note"].startswith("InputError: checkpoint: no step in"), row
    assert (job.home / f"delete-{number}").exists()


def test_damage_comes_at_any_moment_and_in_a_save(job):
    """In a save: of a step before the one that is being written, or of that one if it was quick."""
    moments = [moment_of(job, "flip", number) for number in range(300)]
    assert {moment.step for moment in moments if not moment.in_save} == set(range(7, 63))
    assert {moment.step for moment in moments if moment.in_save} == set(range(12, 63, 6))
    number = next(number for number in range(300) if moments[number].in_save)
    row = trial(job, "flip", number)
    assert row["survived"] and row["bitwise_equal"] and not row["note"], row
    save = moments[number].step
    assert row["step"] == save and row["what"].startswith(f"at {moments[number]}: checkpoint "), row
    assert int(row["what"].split("checkpoint ")[1].split(":")[0]) in range(0, save + 1, 6), row


def test_older_steps_are_damaged_too(job, tmp_path, monkeypatch):
    """Seed 0 draws the newest, 1 an older one."""
    struck = []
    monkeypatch.setattr(faults, "damage", lambda kind, step, rng: struck.append(int(step.name)) or "nothing")
    monkeypatch.setattr(faults, "draw_moment", lambda *_, **__: Moment(20))
    monkeypatch.setattr(trials, "in_this_process", lambda *_: "not gone on with")
    for seed in range(2):
        FAULTS["flip"](job, tmp_path / str(seed), "flip", random.Random(seed))
    assert struck == [20, 18]


def test_a_disk_full_at_the_end_has_room_for_the_last_step(job):
    def window(number: int) -> int:
        rng = random.Random(f"0/disk_full/{number}/0")
        return rng.randrange(1, 64 - 6) + 6 * rng.choice((1, 2))

    row = trial(job, "disk_full", next(number for number in range(1, 200) if window(number) > 65))
    assert row["survived"] and row["bitwise_equal"] and "to 64" in row["what"], row


def test_other_bits_and_a_step_shown_twice_are_told(job, tmp_path):
    shutil.copytree(job.reference, tmp_path, dirs_exist_ok=True)
    assert trials.judge(job, tmp_path, job.reference) == (True, True)
    result = json.loads((tmp_path / "result.json").read_text())
    for name, other in (("params_sha256", "0"), ("final_eval_loss", np.nextafter(result["final_eval_loss"], 9.0))):
        (tmp_path / "result.json").write_text(json.dumps({**result, name: other}))
        assert trials.judge(job, tmp_path, job.reference) == (True, False)
    (tmp_path / "result.json").write_text(json.dumps(result))
    with open(tmp_path / "metrics-0000.jsonl", "a") as file:
        file.write(json.dumps({"step": 64, "loss": 1.0}) + "\n")
    assert trials.judge(job, tmp_path, job.reference) == (False, False)
    (tmp_path / "result.json").unlink()
    assert trials.judge(job, tmp_path, job.reference) == (False, False)


def test_the_last_step_must_be_saved_and_good(job, tmp_path):
    shutil.copytree(job.reference, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "64"
    damage("flip", last / "params", random.Random(0))
    assert trials.judge(job, tmp_path, job.reference) == (False, False)
    shutil.rmtree(last)
    assert trials.judge(job, tmp_path, job.reference) == (False, False)


def test_every_later_step_of_a_resize_is_compared(job, tmp_path):
    """Rows of a real run, tampered with at its last steps; the undisturbed runs come apart at step 40."""
    rows = [json.loads(line) for line in (job.reference / "metrics-0000.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "set" not in row]

    def run(name: str, begun: int = 0, **changed) -> pathlib.Path:
        """`changed`: of a step and what is added from it on."""
        (tmp_path / name).mkdir(exist_ok=True)
        lines = [{**row, **{key: row[key] + by for key, (step, by) in changed.items() if row["step"] >= step}} for row in rows]
        (tmp_path / name / "metrics-0000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "ledger-0000.jsonl").write_text(json.dumps({"event": "resumed", "step": begun}) + "\n")
        return tmp_path / name

    before, after, apart = run("before"), run("after"), run("apart", loss=(40, 1e-3))
    for changed, told in (({"loss": (64, 2e-5)}, "the loss of step 64 is off by 2.0e-05"), ({"loss": (30, 9e-6)}, ""),
                          ({"weight": (63, 1)}, "step 63 counts"), ({"loss": (1, float("nan"))}, "the loss of step 21 is off")):
        assert trials.departure(run("moved", 20, **changed), before, after, True).startswith(told), changed
        assert bool(trials.departure(run("moved", 20, **changed), before, after, True)) == bool(told)
    for changed, told in (({"loss": (40, 2.9e-3)}, ""), ({"loss": (39, 2.9e-3)}, "the loss of step 39"),
                          ({"loss": (60, 4e-3)}, "the loss of step 60")):
        assert trials.departure(run("moved", 20, **changed), before, apart, True).startswith(told), changed
        assert bool(trials.departure(run("moved", 20, **changed), before, apart, True)) == bool(told)
    assert trials.departure(run("moved", 20, loss=(60, 1.0)), before, after, exact=False) == ""
    assert trials.departure(run("moved", 64, loss=(1, 1.0), weight=(1, 1)), before, after, exact=True) == ""


@pytest.mark.parametrize("kind", ["host_kill", "host_hang"])
def test_a_host_that_has_just_ended_is_missed(job, tmp_path, monkeypatch, kind):
    """Its supervisor has reaped it: its id is nobody's."""
    workdir = tmp_path / "run"
    script = (f"mkdir -p {workdir}; sleep 0 & p=$!; wait $p; echo process 0 is pid $p; echo process 1 is pid $p; "
              f"echo '{{\"step\": 63}}' > {workdir}/metrics-0000.jsonl; exec sleep 100")
    monkeypatch.setattr(trials.Job, "command", lambda *_: ["sh", "-c", script])
    rng = next(random.Random(seed) for seed in range(50) if not draw_moment(random.Random(seed), 64, 6).in_save)
    began = time.monotonic()
    with pytest.raises(Missed):
        FAULTS[kind](job, workdir, kind, rng)
    assert time.monotonic() - began < 30


def test_a_line_that_a_kill_cut_short_goes(tmp_path):
    path = tmp_path / "trials.jsonl"
    assert trials_in(tmp_path) == []
    lines = [json.dumps({"fault": "kill", "trial": number}) for number in range(3)]
    for cut in range(len(lines[2]) + 1):
        path.write_text("\n".join(lines)[:-len(lines[2])] + lines[2][:cut])
        assert len(trials_in(tmp_path)) == 2
        with open(path, "a") as file:
            file.write(lines[2] + "\n")
        assert [row["trial"] for row in trials_in(tmp_path)] == [0, 1, 2]
    path.write_text(lines[0][:5])
    assert trials_in(tmp_path) == [] and path.read_text() == ""


def test_trials_are_decided_by_their_seeds():
    moments = [draw_moment(random.Random(f"{seed}/kill"), 1000, 100) for seed in range(600)]
    assert moments == [draw_moment(random.Random(f"{seed}/kill"), 1000, 100) for seed in range(600)]
    saves = [moment for moment in moments if moment.in_save]
    assert 150 < len(saves) < 250 and {moment.step for moment in saves} == set(range(100, 999, 100))
    steps = [moment.step for moment in moments if not moment.in_save]
    assert min(steps) >= 1 and max(steps) <= 998 and 400 < np.mean(steps) < 600
    assert draw_moment(random.Random(0), 3, 10).step in (1, 2)


def test_the_moment_in_a_save(tmp_path):
    """It is there as soon as the directory of the step is, under its final name or another one."""
    with Watch(tmp_path) as watch:
        assert not until(Moment(20, True), watch, tmp_path, lambda: True, seconds=0.05)
        (tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir(parents=True)
        assert until(Moment(20, True), watch, tmp_path, lambda: True, seconds=5)
        assert not until(Moment(2, True), watch, tmp_path, lambda: False, seconds=5)


def test_the_watch_sees_the_recovery(tmp_path):
    def add(name: str, row: dict) -> None:
        with open(tmp_path / name, "a") as file:
            file.write(json.dumps(row) + "\n")

    add("ledger-0000.jsonl", {"event": "started", "step": 0})
    for step in range(1, 31):
        add("metrics-0000.jsonl", {"step": step, "loss": 1.0})
    add("metrics-0000.jsonl", {"step": 30, "set": "heldout"})
    with Watch(tmp_path) as watch:
        assert until(Moment(30), watch, tmp_path, lambda: True, seconds=5) and watch.step == 30
        watch.hit()
        assert not until(Moment(31), watch, tmp_path, lambda: True, seconds=0.05) and watch.resumed is None
        (tmp_path / "metrics-0000.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 21)))
        add("ledger-0001.jsonl", {"event": "resumed", "step": 20})
        add("metrics-0001.jsonl", {"step": 21, "loss": 1.0})
        deadline = time.monotonic() + 5
        while watch.recover_seconds is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert watch.resumed == 20 and watch.recover_seconds > 0.04 and not faults.steps_once(tmp_path, 30)
    assert faults.steps_once(tmp_path, 21)


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_damage_changes_one_file(tmp_path, kind):
    for seed in range(20):
        step = tmp_path / f"{seed}"
        (step / "params").mkdir(parents=True)
        before = {"params/a": bytes(range(100)), "meta": b"{}"}
        for name, data in before.items():
            (step / name).write_bytes(data)
        damage(kind, step, random.Random(seed))
        after = {name: (step / name).read_bytes() if (step / name).exists() else None for name in before}
        changed = [name for name in before if after[name] != before[name]]
        assert len(changed) == 1
        old, new = before[changed[0]], after[changed[0]]
        if kind == "flip":
            assert sum(bin(x ^ y).count("1") for x, y in zip(old, new, strict=True)) == 1
        else:
            assert new is None if kind == "delete" else old.startswith(new)


def test_bad_batches_come_once_or_with_their_samples():
    batch = {"weights_BxL": np.ones((2, 4), np.float32), "targets_BxL": np.arange(8).reshape(2, 4)}
    calls = [1, 2, 3, 4, 2, 3, 4]  # steps; after the first four the run goes back to step 1
    for lasting, wanted in ((False, [0, 0, 1, 1, 0, 0, 0]), (True, [0, 0, 1, 1, 0, 1, 1])):
        bad = BadBatches("nan", 3, 2, 8, lasting, 0)
        hit = [bool(np.isnan(bad(step, (step - 1) * 8, batch)["weights_BxL"]).all()) for step in calls]
        assert hit == [bool(x) for x in wanted] and bad.recover_seconds is not None
    shifted = BadBatches("spike", 3, 1, 8, True, 0)  # after a skip another step has those samples
    assert shifted(3, 5 * 8, batch) is batch
    assert not np.array_equal(shifted(9, 2 * 8, batch)["targets_BxL"], batch["targets_BxL"])


def test_the_summary_is_of_the_worst_trial():
    row = {"fault": "kill", "survived": True, "bitwise_equal": True, "bitwise_expected": True, "steps_lost": 3,
           "recover_seconds": 2.0, "note": ""}
    rows = [row, {**row, "steps_lost": 9, "bitwise_equal": False}, {**row, "survived": False, "recover_seconds": None},
            {**row, "recover_seconds": 1.0}, {**row, "recover_seconds": 1.25}]
    none = {"trials": 0, "survived": 0, "bitwise_equal": 0, "bitwise_expected": 0, "steps_lost": None, "recover_seconds": None,
            "recover_seconds_median": None}
    kill = {"trials": 5, "survived": 4, "bitwise_equal": 4, "bitwise_expected": 5, "steps_lost": 9, "recover_seconds": 2.0,
            "recover_seconds_median": 1.62}
    assert summary(rows, ["nan"]) == summary(rows, ["kill", "nan"]) == {"nan": none, "kill": kill}
    assert list(summary(rows, list(FAULTS))) == list(FAULTS)


def test_another_job_is_refused(job):
    with pytest.raises(InputError, match="--workdir: .* holds trials of another job"):
        make_job("debug", preset("debug"), {"train.steps": "65"}, job.home, 3.0, 0)
    settings = given(job.home.parent)
    assert make_job("debug", preset("debug"), settings, job.home, 3.0, 0) == job
    for heartbeat, seed in ((4.0, 0), (3.0, 1)):
        with pytest.raises(InputError, match="--workdir: .* holds trials of another job.*; choose another --workdir"):
            make_job("debug", preset("debug"), settings, job.home, heartbeat, seed)


def test_pieces_by_fault_add_up_in_one_workdir(job, monkeypatch, capfd):
    """Each call prints all trials of the workdir, which other tests have left none in, and goes on from what is there."""
    monkeypatch.setenv("RUNG_CACHE", str(job.home / "cache"))
    cache = jax.config.jax_compilation_cache_dir

    def piece(name: str) -> dict:
        settings = [f"{key}={value}" for key, value in given(job.home.parent).items()]
        with flagsaver.flagsaver(config="debug", set=settings, workdir=str(job.home), faults=[name], trials=1, json=True,
                                 seed=0, heartbeat=3.0, minutes=None):
            assert chaos.main([]) == 0
        return json.loads(capfd.readouterr().out)

    chaos.FLAGS.mark_as_parsed()
    try:
        first, both = piece("flip"), piece("nan")
        assert piece("flip") == both
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    assert set(first["faults"]) == {"flip"} and first["trials"] == both["trials"][:1]
    assert list(both["faults"]) == ["flip", "nan"] and [row["fault"] for row in both["trials"]] == ["flip", "nan"]
    assert both["trials"] == trials_in(job.home) and both["faults"] == summary(trials_in(job.home), [])


def call(home: pathlib.Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "RUNG_CACHE": str(home / "cache"), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tools.chaos", "--config=debug", f"--workdir={home / 'job'}", "--json",
               "--heartbeat=3", f"--set=data.cache_dir={home}", "--set=train.steps=300", "--set=checkpoint.every_steps=50",
               *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)


@pytest.mark.slow
def test_hard_faults_by_the_command(tmp_path):
    """A trial of each, in three calls: the first has no time for any, the second goes on, the third finds all done."""
    faults_flag = f"--faults={','.join(HARD)}"
    stopped = call(tmp_path, faults_flag, "--trials=1", "--minutes=0")
    assert stopped.returncode == EXIT_INTERRUPTED, stopped.stderr
    assert json.loads(stopped.stdout)["faults"]["kill"]["trials"] == 0
    done = call(tmp_path, faults_flag, "--trials=1")
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)["faults"]
    assert json.loads(call(tmp_path, faults_flag, "--trials=1").stdout) == json.loads(done.stdout)
    assert set(table) == set(HARD)
    for fault, row in table.items():
        assert row["trials"] == row["survived"] == 1, (fault, done.stderr)
        assert row["bitwise_expected"] == (0 if fault == "resize" else 1), (fault, done.stderr)
        assert fault == "resize" or row["bitwise_equal"] == 1, (fault, done.stderr)
        # A save that is under way is lost, too; the next one, 50 steps on, waits for its end.
        assert row["recover_seconds"] < 60 and row["steps_lost"] <= 2 * 50, (fault, done.stderr)
    assert table["term"]["steps_lost"] <= 5  # those between what the harness saw and where the run stopped


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path):
    done = call(tmp_path, "--faults=kil")
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert done.stderr.startswith("error: --faults: unknown 'kil'; did you mean kill"), done.stderr


def test_resize_says_where_it_cannot(job, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(InputError, match="resize needs a CPU"):
        trial(job, "resize", 0)


def test_the_table_of_faults_is_that_of_the_help():
    for fault in FAULTS:
        assert fault in chaos.__doc__
