"""Every second of a run's life is in one category: clocks against hand-made time, and real launches against the wall."""

import json
import os
import re
import signal
import threading
import time

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import preset
from research.config import override
from research.schema import EXIT_INTERRUPTED
from research.training import gang
from research.training import goodput as module
from research.training.gang import Gang
from research.training.goodput import CATEGORIES, Clock, Goodput
from research.training.loop import Launch, run
from research.training.workdir import read_rows
from tests.training.common import Job


class Time:
    """Hand-made clocks: `wall` and `monotonic` go on together, and the wall clock can be set."""

    def __init__(self):
        self.wall, self.now = 1e9, 50.0

    def pass_(self, seconds: float) -> None:
        self.wall, self.now = self.wall + seconds, self.now + seconds

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch):
    made = Time()
    monkeypatch.setattr(module, "time", made)
    return made


def test_nested_time_counts_once(hands):
    clock = Clock(since=hands.monotonic() - 1.5)  # began before anybody looked
    assert clock.began == hands.time() - 1.5
    hands.pass_(0.5)
    with clock.measure("initialising"):
        with clock.measure("training"):
            hands.pass_(3.0)
            with clock.measure("data_wait"):
                hands.pass_(0.5)
            hands.wall -= 3600.0  # the wall clock plays no part within a launch
            hands.pass_(1.0)
        hands.pass_(4.0)
    spent = {"initialising": 6.0, "training": 4.0, "data_wait": 0.5}
    assert clock.seconds() == {**dict.fromkeys(CATEGORIES, 0.0), **spent} and clock.get("training") == 4.0


class Halting(dict):
    """Between what a thread reads of it and what it writes, others have their turn."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        time.sleep(0.0005)
        return value


def test_who_reads_the_clock_changes_nothing():
    began, over = time.monotonic(), threading.Event()
    clock, read = Clock(began), []
    clock._seconds = Halting(clock._seconds)

    def reads():
        while not over.is_set():
            read.append(sum(clock.seconds().values()))

    threads = [threading.Thread(target=reads) for _ in range(3)]
    for thread in threads:
        thread.start()
    while time.monotonic() < began + 0.5:
        with clock.measure("training"), clock.measure("data_wait"):
            pass
    over.set()
    for thread in threads:
        thread.join()
    before = time.monotonic() - began
    assert before <= sum(clock.seconds().values()) <= time.monotonic() - began and max(read) <= before


def live(hands, workdir, seconds: float, step: int, chips: int = 1) -> Goodput:
    """A launch that trains for so long and is killed right after it wrote."""
    clock = Clock()
    goodput = Goodput(epath.Path(workdir), clock, chips)
    with clock.measure("training"):
        hands.pass_(seconds)
        goodput.reached = max(goodput.reached, step)
    goodput.write()
    return goodput


def test_a_life_of_three_launches(hands, tmp_path):
    live(hands, tmp_path, 10.0, 100)
    hands.pass_(30.0)
    second = live(hands, tmp_path, 20.0, 90, chips=4)
    assert [second.category(step) for step in (1, 100, 101)] == ["repeated", "repeated", "training"]
    hands.pass_(5.0)
    third = live(hands, tmp_path, 35.0, 300, chips=2)
    assert third.seconds() == {**dict.fromkeys(CATEGORIES, 0.0), "training": 65.0, "down": 35.0}
    assert third.chip_seconds() == 10.0 + 4 * 20.0 + 2 * 35.0
    assert third.reached == 300 and third.shares()["training"] == 0.65
    assert str(third) == "goodput of 100 s: 65.0% training, down 35.0%"
    assert told(tmp_path)["step"] == 300


def test_a_clock_that_was_set_back_adds_nothing(hands, tmp_path):
    live(hands, tmp_path, 10.0, 1)
    hands.wall -= 1000.0
    assert live(hands, tmp_path, 10.0, 2).seconds()["down"] == 0.0


@pytest.mark.parametrize("text", ["", "{", "[1]", "{\"seconds\": {}}", "\u0000\ufffd"])
def test_a_broken_file_ends_no_run(hands, tmp_path, text, caplog):
    (tmp_path / "goodput.json").write_text(text)
    assert sum(live(hands, tmp_path, 10.0, 1).seconds().values()) == 10.0
    assert "the goodput of earlier launches is lost" in caplog.text


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The accounts of a launch that has started, written ten times a second."""
    monkeypatch.setattr(module, "WRITE_EVERY", 0.1)
    goodput = Goodput(epath.Path(tmp_path), Clock(), 1)
    goodput.start()
    assert soon((tmp_path / "goodput.json").exists)
    yield goodput
    goodput.close(0.0)


def told(workdir) -> dict:
    return json.loads((workdir / "goodput.json").read_text())


def soon(true) -> bool:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def test_whatever_a_run_is_busy_with_the_file_is_kept(kept, tmp_path):
    for count, category in enumerate(("compiling", "evaluating", "saving", "restoring", "data_wait"), start=1):
        with kept._clock.measure(category):  # one phase that doesn't end
            assert soon(lambda: told(tmp_path)["seconds"][category] > 0.2)
            kept.reached = count
            assert soon(lambda: told(tmp_path)["step"] == count)
            left = told(tmp_path)
            assert sum(left["seconds"].values()) == pytest.approx(left["time"] - kept._clock.began, abs=0.2)


def test_no_run_ends_for_its_accounts(kept, tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    (tmp_path / "goodput.json").rename(tmp_path / "elsewhere")
    (tmp_path / "goodput.json").mkdir()  # can't be replaced
    assert soon(lambda: "goodput.json can't be written" in caplog.text)
    (tmp_path / "goodput.json").rmdir()
    kept.close()
    assert told(tmp_path)["time"] <= time.time() and caplog.messages[-1].startswith("goodput of ")


@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_that_leaves_its_gang_closes_its_accounts(kept, tmp_path, monkeypatch, caplog, hangs):
    """By os._exit, from another thread; a disk that hangs holds up nobody."""
    caplog.set_level("INFO", logger="absl")
    write_json, left, freed = module.write_json, [], threading.Event()
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(gang, "_LAST_ACCOUNTS", gang._LAST_ACCOUNTS if hangs else 10.0)
    monkeypatch.setattr(module, "write_json", lambda *args: freed.wait(10) if hangs else write_json(*args))
    time.sleep(0.2)
    member = Gang(kept._clock, epath.Path(tmp_path))
    member.goodput, kept.reached, began = kept, 7, time.monotonic()
    member._exit(EXIT_INTERRUPTED)
    assert left == [EXIT_INTERRUPTED] and time.monotonic() - began < 8.0
    assert caplog.messages[-1].startswith("goodput of ") and (told(tmp_path)["step"] == 7) != hangs
    freed.set()


@pytest.fixture(scope="module")
def three_launches(tmp_path_factory):
    """Cut off at a random step, cut off again before that step is reached, finished; when it began, and for how long it was
    down, at the least and at the most."""
    workdir, began = tmp_path_factory.mktemp("run"), time.time()
    config = override(preset("debug"), {
        "data.cache_dir": str(tmp_path_factory.mktemp("cache")), "model.dim": 16, "train.steps": 20, "train.log_every": 1000,
        "checkpoint.every_steps": 5, "train.eval_every": 10})

    called, trained, told_last = [], [], []  # by the wall clock, of each launch

    def launch(last):
        def fault(step, sample, batch):
            first.append(time.time())
            if step > last:
                raise OSError("the machine is gone")
            return batch

        first = []
        called.append(time.time())
        try:
            return run(config, Launch(str(workdir), preset("debug"), quiet=True, fault=fault))
        finally:
            trained.append(first[0])
            told_last.append(told(workdir)["time"])

    for last in (13, 12):
        with pytest.raises(OSError):
            launch(last)
        time.sleep(0.5)
    result = launch(20)
    least, most = (sum(again - last for last, again in zip(told_last, ends[1:])) for ends in (called, trained))
    return workdir, result, began, (least, most)


def test_categories_add_up_to_the_wall_time(three_launches):
    workdir, result, began, (least, most) = three_launches
    seconds, left = result["goodput"], told(workdir)
    assert tuple(seconds) == CATEGORIES and min(seconds.values()) >= 0.0
    assert sum(left["seconds"].values()) == pytest.approx(left["time"] - began, abs=0.1)
    assert sum(seconds.values()) == pytest.approx((workdir / "result.json").stat().st_mtime - began, abs=0.5)
    assert 1.0 <= least - 0.01 <= seconds["down"] <= most + 0.01  # milliseconds are rounded
    assert min(seconds.values()) > 0  # repeated: steps 11 ... 12, 11 ... 13


def test_what_is_left_of_it(three_launches):
    workdir, result, *_ = three_launches
    left = told(workdir)
    assert left["step"] == 20 and left["time"] <= time.time()
    assert sum(left["seconds"].values()) == pytest.approx(sum(result["goodput"].values()), abs=0.5)
    up = sum(result["goodput"].values()) - result["goodput"]["down"]
    assert result["chip_seconds"] == pytest.approx(up, rel=0.01)  # the four CPU devices are one chip
    board = EventAccumulator(str(workdir), size_guidance={"scalars": 0})
    board.Reload()
    shares = {name: board.Scalars(f"goodput/{name}")[-1].value for name in CATEGORIES}
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3) and shares["training"] > 0


def test_the_last_line_of_the_log(three_launches, tmp_path, caplog):
    workdir, *_ = three_launches
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path / "cache"), "model.dim": 16, "train.steps": 2,
                                        "optim.warmup_steps": 0})
    caplog.set_level("INFO", logger="absl")
    run(config, Launch(str(tmp_path / "run"), preset("debug"), quiet=True))
    ours = [record.getMessage() for record in caplog.records  # of this thread: others may be left of other tests
            if "research" in record.pathname and record.thread == threading.get_ident()]
    assert ours[-1].startswith("goodput of ") and "% training" in ours[-1], ours[-5:]


STEPS = 500


def lost(seconds: float) -> float:
    """What a launch that took so long may lose: the second since the file was written, and on a busy machine a little more."""
    return 1.5 + 0.05 * seconds


def killed(job: Job, when) -> tuple[float, float]:
    """SIGKILL to a launch of the real command as soon as what goodput.json tells of it is so: its seconds, and until when."""
    began, (process,) = time.time(), job.start()
    try:
        while not ((job.workdir / "goodput.json").exists() and (left := told(job.workdir))["time"] > began and when(left)):
            assert process.poll() is None and time.time() < began + 200, process.communicate()[1][-3000:]
            time.sleep(0.01)
        time.sleep(0.8)  # the longest that may be lost, nearly
    finally:
        process.kill()
        ended = time.time()
        process.communicate()
    return ended - began, ended


def test_killed_launches_are_accounted_for(tmp_path):
    """SIGKILL while it compiles, then long before the first step that is logged; the third launch ends the run."""
    job, began = Job(tmp_path, f"train.steps={STEPS}", f"train.log_every={STEPS}", "checkpoint.every_minutes=0",
                     "train.eval_every=0", "train.batch_size=64"), time.time()
    first, ended = killed(job, lambda left: left["seconds"]["compiling"] > 0)
    left = told(job.workdir)
    assert left["step"] == 0 and left["seconds"]["training"] == 0.0
    assert first - lost(first) < sum(left["seconds"].values()) <= first
    assert left["seconds"]["initialising"] > 0.5 * first  # JAX itself is part of it
    second, ended_again = killed(job, lambda left: left["step"] > 0.4 * STEPS)
    assert not [row for row in read_rows(job.workdir, "metrics-") if "set" not in row]
    left, gap = told(job.workdir), ended_again - second - ended
    assert left["seconds"]["training"] > 0.5 and left["seconds"]["repeated"] == 0.0 and 0.4 * STEPS < left["step"] < STEPS
    assert gap <= left["seconds"]["down"] < gap + lost(first)
    assert first + gap + second - lost(second) < sum(left["seconds"].values()) <= first + gap + second
    assert job.start()[0].communicate()[0] is None
    seconds = json.loads((job.workdir / "result.json").read_text())["goodput"]
    wall = (job.workdir / "result.json").stat().st_mtime - began
    assert sum(seconds.values()) == pytest.approx(wall, abs=0.5 + 0.02 * wall)  # each Python takes a moment to begin
    assert 0.3 * left["seconds"]["training"] < seconds["repeated"] < 3 * left["seconds"]["training"]  # the same steps
    assert seconds["training"] > left["seconds"]["training"] and told(job.workdir)["step"] == STEPS


@pytest.mark.slow
def test_a_lost_process_leaves_the_jobs_accounts_whole(tmp_path):
    """The first process leaves by os._exit, and its last line is of goodput; the time until then is in the file."""
    job = Job(tmp_path, "train.steps=1000000", "train.log_every=1000000", "train.eval_every=0", "checkpoint.every_minutes=0")
    began, (first, other) = time.time(), job.start("--heartbeat=2", processes=2)
    while not ((job.workdir / "goodput.json").exists() and told(job.workdir)["seconds"]["training"] > 1.0):
        assert first.poll() is None and time.time() < began + 200, first.communicate()[1][-3000:]
        time.sleep(0.05)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    log = first.communicate(timeout=60)[1]
    ended, left = time.time(), told(job.workdir)
    assert first.returncode == EXIT_INTERRUPTED, log[-3000:]
    assert re.fullmatch(r"goodput of \d+ s: .*% training.*", log.strip().splitlines()[-1]), log[-1000:]
    assert sum(left["seconds"].values()) == pytest.approx(left["time"] - began, abs=0.5 + 0.02 * (ended - began))
    assert left["time"] > ended - 1.0
