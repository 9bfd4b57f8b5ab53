"""Copies of what a run tells, for those who don't watch its directory: a webhook for alarms and its end, Weights & Biases.

Neither can harm the run: what fails is one warning, and the run directory stays the only record.
"""

import contextlib
import hashlib
import http.client
import importlib
import importlib.util
import json
import os
import queue
import threading
import time
import urllib.parse
import urllib.request
from typing import Any, Mapping

from absl import logging

from research.config import flatten
from research.errors import InputError, Interrupted
from research.schema import Config

TIMEOUT = 5.0  # seconds
WAITING = 16  # alarms at most that wait to be posted


def check_webhook(url: str) -> None:
    """Raises:
      InputError: `url` is no http(s) address.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError("--webhook", f"{url!r} is not an http or https address", "e.g. --webhook=https://example.org/runs")


def post(url: str, message: Mapping[str, Any], timeout: float = TIMEOUT) -> bool:
    """Sends `message` as JSON; True if it was taken. A failure is a warning, never an error."""
    try:
        body = json.dumps(message, allow_nan=False).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=timeout):
            return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        logging.warning("the webhook was not reached: %s", _line(error))
        return False


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


class Announced:
    """As a context around a run: a POST at each alarm and one at the end, {event, run, workdir, reason, time, text, ...}.

    `event`: "finished" (with the fields of the result that `finished` was given), "preempted" (it can go on), or "alarm" with
    the reason: it diverged, it failed or, with the `step`, what the ledger calls an alarm, which it may survive. Bad input is
    told to whoever typed it, so it sends nothing. Alarms are posted by a thread: nobody waits, and beyond `WAITING` they are
    left out with a warning. Nothing is sent without a URL.

    `first`: is this the process that tells the end? An alarm is told by any that is made to write a ledger (gang.py).
    """

    RESULT_FIELDS = ("status", "steps", "tokens", "final_eval_loss", "final_eval_loss_se", "bits_per_byte", "tokens_per_second")

    def __init__(self, url: str | None, run: str, workdir: str, first: bool = True):
        self._url, self._first, self._message = url, first, {"run": run, "workdir": workdir}
        self._result: dict[str, Any] = {}
        self._alarms: queue.Queue[dict[str, Any] | None] = queue.Queue()
        if url:
            check_webhook(url)

    def finished(self, result: Mapping[str, Any]) -> None:
        self._result = {name: result[name] for name in self.RESULT_FIELDS}

    def ledger_line(self, event: str, step: int, details: Mapping[str, Any]) -> None:
        """For `Ledger`: posts its alarms, in the background."""
        if not self._url or event != "alarm":
            return
        if self._alarms.qsize() >= WAITING:
            logging.warning("the webhook is too slow: it isn't told of %s", details["reason"])
            return
        self._alarms.put(self._worded(event, details["reason"], step=step))

    def wait(self, seconds: float) -> None:
        """Until all alarms are posted, but not longer than that."""
        with self._alarms.all_tasks_done:
            self._alarms.all_tasks_done.wait_for(lambda: not self._alarms.unfinished_tasks, seconds)

    def _worded(self, event: str, reason: str, **more: Any) -> dict[str, Any]:
        text = f"{self._message['run']} {event}" + (f" ({reason})" if reason else "")
        return {"event": event, **self._message, **more, "reason": reason, "time": time.time(), "text": text}

    def _post_alarms(self) -> None:
        while message := self._alarms.get():
            post(self._url, message)
            self._alarms.task_done()
        self._alarms.task_done()

    def __enter__(self) -> "Announced":
        if self._url:
            threading.Thread(target=self._post_alarms, name="webhook", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not self._url:
            return
        self.wait(TIMEOUT)
        self._alarms.put(None)
        if isinstance(error, InputError) or not self._first:
            return
        if error is None:
            event, reason = "finished", ""
        else:
            event = "preempted" if isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit)) else "alarm"
            reason = f"{type(error).__name__}: {error}"
        post(self._url, self._worded(event, reason, **self._result))


class WandbMirror:
    """Rows of the run directory as a Weights & Biases run; the same workdir goes on with the same one.

    Where W&B fails (no key, no network, ...), the run goes on without it from there.
    """

    def __init__(self, project: str, config: Config, name: str, workdir: str):
        """Raises:
          InputError: the package isn't there.
        """
        check_wandb()
        self._run: Any = None
        with self._or_without():
            wandb = importlib.import_module("wandb")
            self._run = wandb.init(
                project=project, name=name, id=hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16], resume="allow",
                config=flatten(config), dir=os.fspath(workdir))
            # W&B drops what is logged at a lower step of its own than before: after a rollback or a restart, repeated steps.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """`row`: tags and numbers, as TensorBoard shows them."""
        with self._or_without():
            if self._run:
                self._run.log({"step": step, **{tag: value for tag, value in row.items() if isinstance(value, (int, float))}})

    def close(self) -> None:
        with self._or_without():
            if self._run:
                self._run.finish()

    def _or_without(self) -> contextlib.ExitStack:
        """Goes around calls of W&B and of nothing else: its errors have no common base (MailboxClosedError, CommError, ...)."""
        stack = contextlib.ExitStack()
        stack.push(self._failed)
        return stack

    def _failed(self, _: Any, error: BaseException | None, __: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        logging.warning("no Weights & Biases from here on: %s", _line(error))
        self._run = None
        return True


def check_wandb() -> None:
    """Raises:
      InputError: the package `wandb` isn't installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb", "the package wandb is not installed", "pip install wandb, or leave --wandb out")
