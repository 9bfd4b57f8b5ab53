"""The webhook at alarms and the end, against a server of our own; a stand-in for wandb; TensorBoard's layout."""

import contextlib
import http.server
import json
import os
import sys
import threading
import time
import types

import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import preset
from research.config import flatten, override
from research.errors import Diverged, InputError, Interrupted
from research.training import gang, mirrors
from research.training.gang import Beat, Gang, Verdict
from research.training.goodput import Clock
from research.training.loop import Launch, run
from research.training.metrics import Recorder
from research.training.workdir import Ledger, read_rows

RESULT = {"status": "finished", "steps": 5, "tokens": 320, "final_eval_loss": 2.5, "final_eval_loss_se": 0.1,
          "bits_per_byte": 1.1, "tokens_per_second": 9.0, "sample": "not sent"}


@contextlib.contextmanager
def server(status: int = 200, hang: threading.Event | None = None, garbage: bool = False):
    """(address, the JSON bodies that were posted to it)."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if hang:
                hang.wait(20)
            with contextlib.suppress(OSError):
                if garbage:
                    self.wfile.write(b"no HTTP\r\n\r\n")
                    return
                self.send_response(status)
                self.end_headers()

        def log_message(self, *args):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/hook", got
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


ENDINGS = [
    (None, "finished", ""),
    (Interrupted("stopped after step 3"), "preempted", "Interrupted: stopped after step 3"),
    (KeyboardInterrupt(), "preempted", "KeyboardInterrupt: "),
    (Diverged("step 7: objective is nan"), "alarm", "Diverged: step 7: objective is nan"),
    (RuntimeError("out of memory"), "alarm", "RuntimeError: out of memory"),
]


@pytest.mark.parametrize("error, event, reason", ENDINGS, ids=[str(error) for error, _, _ in ENDINGS])
def test_one_message_at_the_end(error, event, reason):
    with server() as (url, got):
        with contextlib.suppress(Interrupted, Diverged, RuntimeError, KeyboardInterrupt):
            with mirrors.Announced(url, "debug,lr=1", "runs/a") as announced:
                if error:
                    raise error
                announced.finished(RESULT)
    assert len(got) == 1 and got[0]["event"] == event and got[0]["reason"] == reason
    assert got[0]["run"] == "debug,lr=1" and got[0]["workdir"] == "runs/a" and event in got[0]["text"]
    assert ("final_eval_loss" in got[0]) == (error is None) and "sample" not in got[0]


def test_errors_pass_through_and_bad_input_sends_nothing():
    with server() as (url, got):
        with pytest.raises(InputError), mirrors.Announced(url, "a", "b"):
            raise InputError("a", "b", "c")
        with pytest.raises(Diverged), mirrors.Announced(None, "a", "b"):
            raise Diverged("nan")
    assert got == []


def test_a_webhook_never_kills(caplog):
    hang = threading.Event()
    with server(500) as (url, got):
        assert not mirrors.post(url, {"a": 1}) and len(got) == 1
    with server(hang=hang) as (slow, _):
        assert not mirrors.post(slow, {"a": 1}, timeout=0.2)
        hang.set()
    assert not mirrors.post(url, {"a": 1})  # nobody listens any more
    with mirrors.Announced(url, "a", "b") as announced:
        announced.finished(RESULT)
    with server(garbage=True) as (wrong, got):
        assert not mirrors.post(wrong, {"a": 1}) and len(got) == 1
    assert not mirrors.post(wrong, {"a": float("nan")})
    assert caplog.text.count("the webhook was not reached") == 6
    for wrong in ("ftp://a/b", "example.org", "http://"):
        with pytest.raises(InputError, match="--webhook: .* is not an http or https address"):
            mirrors.Announced(wrong, "a", "b")


def test_alarms_are_told_in_order_and_before_the_end(tmp_path):
    with server() as (url, got), mirrors.Announced(url, "debug", "runs/a") as announced:
        ledger = Ledger(epath.Path(tmp_path), announced.ledger_line)
        ledger.write("saved", 1, seconds=0.1)
        for step in range(2, 10):
            ledger.write("alarm", step, reason=f"reason {step}", first=step)
        ledger.write("rolled_back", 1)
        announced.finished(RESULT)
    *alarms, end = got
    assert [(told["event"], told["step"], told["reason"]) for told in alarms] == [
        ("alarm", step, f"reason {step}") for step in range(2, 10)]
    assert alarms[0]["run"] == "debug" and alarms[0]["workdir"] == "runs/a" and alarms[0]["text"] == "debug alarm (reason 2)"
    assert end["event"] == "finished" and end["status"] == "finished" and "status" not in alarms[0] and "step" not in end
    for thread in [thread for thread in threading.enumerate() if thread.name == "webhook"]:
        thread.join(10)
        assert not thread.is_alive()


def test_a_webhook_that_hangs_keeps_nobody_waiting(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(mirrors, "TIMEOUT", 0.2)
    hang = threading.Event()
    with server(hang=hang) as (url, got):
        with mirrors.Announced(url, "a", "b", first=False) as announced:
            ledger, began = Ledger(epath.Path(tmp_path), announced.ledger_line), time.monotonic()
            for step in range(100):
                ledger.write("alarm", step, reason="again")
        assert time.monotonic() - began < 100 * mirrors.TIMEOUT / 2 and len(read_rows(tmp_path, "ledger-")) == 100
        hang.set()
        announced.wait(10)
    assert mirrors.WAITING <= len(got) <= mirrors.WAITING + 1 and "too slow" in caplog.text


@pytest.mark.parametrize("process", [0, 1])
def test_who_leaves_a_job_tells_of_the_lost_host_first(devices, monkeypatch, tmp_path, process):
    def leave(code: int) -> None:
        left.append((code, time.monotonic() - began, len(got)))
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(gang, "_LAST_WORDS", 2.0)
    monkeypatch.setattr(mirrors, "TIMEOUT", 60.0)
    monkeypatch.setattr(gang.distributed.global_state, "client",
                        types.SimpleNamespace(key_value_set=lambda *args, **options: None))
    left = []
    for hang in None, threading.Event():
        with server(hang=hang) as (url, got), mirrors.Announced(url, "a", "b", first=False) as announced:
            member = Gang(Clock(), epath.Path(tmp_path), 1.0, announced)
            member._process, member._prefix, member._heard = process, "gang", {0: (Beat(0, "a"), 0.0)}
            if process == 0:
                member.ledger = Ledger(epath.Path(tmp_path), announced.ledger_line)
            began = time.monotonic()
            with pytest.raises(SystemExit, match="75"):
                verdict = Verdict(f"process {1 - process} (h) is lost")
                member._witness(verdict)
                member._end(verdict)
            if hang:
                hang.set()
        assert [told["reason"] for told in got] == [verdict.text]
    (code, seconds, told), (held_code, held_for, _) = left
    assert (code, told) == (75, 1) and seconds < 2  # it was there before the process had gone, which then didn't wait
    assert held_code == 75 and 2 <= held_for < 30


def stand_in(monkeypatch, calls: list, broken: str = "") -> None:
    """A package `wandb` that writes down what it is told; its function `broken` fails."""
    def function(name: str, say):
        def called(*args, **options):
            if name == broken:
                raise RuntimeError(f"no {name}\nand more lines")
            return say(*args, **options)
        return called

    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    told = types.SimpleNamespace(
        define_metric=function("define_metric", lambda name, step_metric=None: calls.append((name, step_metric))),
        log=function("log", lambda row: calls.append(row)), finish=function("finish", lambda: calls.append("finished")))
    module.init = function("init", lambda **kwargs: (calls.append(kwargs), told)[1])
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_run_is_announced_and_mirrored(monkeypatch, tmp_path):
    """With an alarm that it survives: the repeated step is mirrored again, in order."""
    calls, faulty = [], [3]
    stand_in(monkeypatch, calls)
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path / "cache"), "train.steps": 4, "train.log_every": 2,
                                        "model.dim": 16, "optim.warmup_steps": 0})

    def passing(step, sample, batch):
        if step not in faulty:
            return batch
        faulty.remove(step)
        return {**batch, "weights_BxL": batch["weights_BxL"] * np.nan}

    with server() as (url, got):
        result = run(config, Launch(str(tmp_path / "run"), preset("debug"), quiet=True, webhook=url, wandb="climb",
                                    fault=passing))
    assert [told["event"] for told in got] == ["alarm", "finished"]
    assert got[0]["step"] == 3 and got[0]["reason"].endswith("is nan")
    assert got[1]["final_eval_loss"] == result["final_eval_loss"]
    opened, *defined, end = [call for call in calls if not isinstance(call, dict) or "step" not in call]
    rows = [call for call in calls if isinstance(call, dict) and "step" in call]
    assert end == "finished" and opened["project"] == "climb" and opened["config"] == flatten(config)
    assert opened["resume"] == "allow" and opened["name"].startswith("debug,")
    assert defined == [("step", None), ("*", "step")]
    assert [row["step"] for row in rows] == [2, 2, 4, 4] and "train/loss" in rows[0]
    assert rows[3]["eval_heldout/loss"] == result["final_eval_loss"]


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_weights_and_biases_can_fail(monkeypatch, tmp_path, caplog, broken):
    calls = []
    stand_in(monkeypatch, calls, broken)
    mirror = mirrors.WandbMirror("climb", preset("debug"), "debug", str(tmp_path))
    for step in (1, 2):
        mirror.row(step, {"train/loss": 1.0, "text": "no number"})
    mirror.close()
    assert caplog.text.count("no Weights & Biases from here on") == 1
    assert f"no {broken}" in caplog.text and "more lines" not in caplog.text
    rows = [call for call in calls if isinstance(call, dict) and "step" in call]
    assert rows == ([{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}] if broken == "finish" else [])


def test_without_the_package_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(mirrors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--wandb: the package wandb is not installed; pip install wandb"):
        run(preset("debug"), Launch(str(tmp_path / "run"), preset("debug"), wandb="climb"))
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_charts_and_positions(tmp_path):
    recorder = Recorder(epath.Path(tmp_path), 0)
    recorder.layout(["heldout", "code"])
    recorder.evaluation(3, "heldout", {"loss": 2.0, "se": 0.1, "perplexity": 7.4, "bits_per_byte": 1.0}, {"0": 3.0, "2-3": 1.5})
    recorder.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"eval_code/loss$" in layout and b"norms/grad$" in layout and b"speed/mfu$" in layout
    assert events.Scalars("eval_heldout/by_position/2-3")[0].value == 1.5
