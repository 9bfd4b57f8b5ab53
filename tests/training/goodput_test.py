"""Every second of a run's life is in one category: clocks against hand-made time, and real launches against the wall."""

import json
import threading
import time

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import preset
from research.config import override
from research.training import goodput as module
from research.training.goodput import CATEGORIES, Clock, Goodput
from research.training.loop import Launch, run


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
    clock = Clock()
    with clock.measure("initialising"):
        hands.pass_(2.0)
        with clock.measure("training"):
            hands.pass_(3.0)
            with clock.measure("data_wait"):
                hands.pass_(0.5)
            hands.wall -= 3600.0  # the wall clock plays no part within a launch
            hands.pass_(1.0)
        hands.pass_(4.0)
    assert clock.seconds == {"initialising": 6.0, "training": 4.0, "data_wait": 0.5} and clock.total() == 10.5


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
    assert json.loads((tmp_path / "goodput.json").read_text())["step"] == 300


def test_a_clock_that_was_set_back_adds_nothing(hands, tmp_path):
    live(hands, tmp_path, 10.0, 1)
    hands.wall -= 1000.0
    assert live(hands, tmp_path, 10.0, 2).seconds()["down"] == 0.0


@pytest.mark.parametrize("text", ["", "{", "[1]", "{\"seconds\": {}}", "\u0000\ufffd"])
def test_a_broken_file_ends_no_run(hands, tmp_path, text, caplog):
    (tmp_path / "goodput.json").write_text(text)
    assert sum(live(hands, tmp_path, 10.0, 1).seconds().values()) == 10.0
    assert "the goodput of earlier launches is lost" in caplog.text


@pytest.fixture(scope="module")
def three_launches(tmp_path_factory):
    """Cut off at a random step, cut off again before that step is reached, finished; with the wall's time of all."""
    workdir, began = tmp_path_factory.mktemp("run"), time.time()
    config = override(preset("debug"), {
        "data.cache_dir": str(tmp_path_factory.mktemp("cache")), "model.dim": 16, "train.steps": 20, "train.log_every": 1,
        "checkpoint.every_steps": 5, "train.eval_every": 10})

    def dies_at(last):
        def fault(step, sample, batch):
            if step == last:
                time.sleep(1.1)  # so that what was done is written
            if step > last:
                raise OSError("the machine is gone")
            return batch

        return fault

    for last in (13, 12):
        with pytest.raises(OSError):
            run(config, Launch(str(workdir), preset("debug"), quiet=True, fault=dies_at(last)))
        time.sleep(0.5)
    result = run(config, Launch(str(workdir), preset("debug"), quiet=True))
    return workdir, result, time.time() - began


def test_categories_add_up_to_the_wall_time(three_launches):
    _, result, wall = three_launches
    seconds = result["goodput"]
    assert tuple(seconds) == CATEGORIES and min(seconds.values()) >= 0.0
    assert sum(seconds.values()) == pytest.approx(wall, abs=0.25)
    assert seconds["down"] >= 1.0 and seconds["down"] < 2.0
    assert min(seconds[name] for name in ("initialising", "compiling", "training", "evaluating", "saving", "restoring")) > 0
    assert seconds["data_wait"] > 2.0  # the sleeps
    assert seconds["repeated"] > 0  # steps 11 ... 12, 11 ... 13


def test_what_is_left_of_it(three_launches):
    workdir, result, _ = three_launches
    left = json.loads((workdir / "goodput.json").read_text())
    assert left["step"] == 20 and left["time"] <= time.time()
    assert sum(left["seconds"].values()) == pytest.approx(sum(result["goodput"].values()), abs=0.5)
    up = sum(result["goodput"].values()) - result["goodput"]["down"]
    assert result["chip_seconds"] == pytest.approx(up, rel=0.01)  # the four CPU devices are one chip
    board = EventAccumulator(str(workdir), size_guidance={"scalars": 0})
    board.Reload()
    shares = {name: board.Scalars(f"goodput/{name}")[-1].value for name in CATEGORIES}
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3) and shares["training"] > 0


def test_the_last_line_of_the_log(three_launches, tmp_path, caplog):
    workdir, _, _ = three_launches
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path / "cache"), "model.dim": 16, "train.steps": 2,
                                        "optim.warmup_steps": 0})
    caplog.set_level("INFO", logger="absl")
    run(config, Launch(str(tmp_path / "run"), preset("debug"), quiet=True))
    ours = [record.getMessage() for record in caplog.records  # of this thread: others may be left of other tests
            if "research" in record.pathname and record.thread == threading.get_ident()]
    assert ours[-1].startswith("goodput of ") and "% training" in ours[-1], ours[-5:]
