"""The webhook at a run's end, against a server of our own; a stand-in for wandb; TensorBoard's layout."""

import contextlib
import http.server
import json
import sys
import threading
import types

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import preset
from research.config import flatten, override
from research.errors import Diverged, InputError, Interrupted
from research.training import mirrors
from research.training.loop import Launch, run
from research.training.metrics import Recorder

RESULT = {"status": "finished", "steps": 5, "tokens": 320, "final_eval_loss": 2.5, "final_eval_loss_se": 0.1,
          "bits_per_byte": 1.1, "tokens_per_second": 9.0, "sample": "not sent"}


@contextlib.contextmanager
def server(status: int = 200, hang: threading.Event | None = None):
    """(address, the JSON bodies that were posted to it)."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if hang:
                hang.wait(20)
            with contextlib.suppress(OSError):
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
    assert caplog.text.count("the webhook was not reached") == 4
    for wrong in ("ftp://a/b", "example.org", "http://"):
        with pytest.raises(InputError, match="--webhook: .* is not an http or https address"):
            mirrors.Announced(wrong, "a", "b")


def stand_in(monkeypatch, calls: list) -> None:
    """A package `wandb` that writes down what it is told."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    told = types.SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finished"))
    module.init = lambda **kwargs: (calls.append(kwargs), told)[1]
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_run_is_announced_and_mirrored(monkeypatch, tmp_path):
    calls = []
    stand_in(monkeypatch, calls)
    config = override(preset("debug"), {"data.cache_dir": str(tmp_path / "cache"), "train.steps": 4, "train.log_every": 2,
                                        "model.dim": 16, "optim.warmup_steps": 0})
    with server() as (url, got):
        result = run(config, Launch(str(tmp_path / "run"), preset("debug"), quiet=True, webhook=url, wandb="climb"))
    assert got[0]["event"] == "finished" and got[0]["final_eval_loss"] == result["final_eval_loss"]
    opened, *rows, end = calls
    assert end == "finished" and opened["project"] == "climb" and opened["config"] == flatten(config)
    assert opened["resume"] == "allow" and opened["name"].startswith("debug,")
    assert [step for step, _ in rows] == [2, 4, 4] and "train/loss" in rows[0][1]
    assert rows[2][1]["eval_heldout/loss"] == result["final_eval_loss"]


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
