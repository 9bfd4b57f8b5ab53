"""Copies of what a run tells, for those who don't watch its directory: a webhook at its end, Weights & Biases.

Neither can harm the run: a webhook that fails is one warning, and the run directory stays the only record.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Mapping

from absl import logging

from research.config import flatten
from research.errors import InputError, Interrupted
from research.schema import Config

TIMEOUT = 5.0  # seconds


def check_webhook(url: str) -> None:
    """Raises:
      InputError: `url` is no http(s) address.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError("--webhook", f"{url!r} is not an http or https address", "e.g. --webhook=https://example.org/runs")


def post(url: str, message: Mapping[str, Any], timeout: float = TIMEOUT) -> bool:
    """Sends `message` as JSON; True if it was taken. A failure is a warning, never an error."""
    request = urllib.request.Request(url, json.dumps(message, allow_nan=False).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except (OSError, ValueError, urllib.error.URLError) as error:
        logging.warning("the webhook was not reached: %s", error)
        return False


class Announced:
    """As a context around a run: one POST at its end, {event, run, workdir, time, text, ...}; nothing without a URL.

    `event`: "finished" (with the fields of the result that `finished` was given), "preempted" (it can go on), or "alarm"
    with the reason: it diverged, or it failed. Bad input is told to whoever typed it, so it sends nothing.
    """

    RESULT_FIELDS = ("status", "steps", "tokens", "final_eval_loss", "final_eval_loss_se", "bits_per_byte", "tokens_per_second")

    def __init__(self, url: str | None, run: str, workdir: str):
        self._url, self._message = url, {"run": run, "workdir": workdir}
        if url:
            check_webhook(url)

    def finished(self, result: Mapping[str, Any]) -> None:
        self._message |= {name: result[name] for name in self.RESULT_FIELDS}

    def __enter__(self) -> "Announced":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not self._url or isinstance(error, InputError):
            return
        if error is None:
            event, reason = "finished", ""
        else:
            event = "preempted" if isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit)) else "alarm"
            reason = f"{type(error).__name__}: {error}"
        text = f"{self._message['run']} {event}" + (f" ({reason})" if reason else "")
        post(self._url, {"event": event, **self._message, "reason": reason, "time": time.time(), "text": text})


class WandbMirror:
    """Rows of the run directory as a Weights & Biases run; the same workdir goes on with the same one."""

    def __init__(self, project: str, config: Config, name: str, workdir: str):
        """Raises:
          InputError: the package isn't there.
        """
        check_wandb()
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project, name=name, id=hashlib.sha256(os.fspath(workdir).encode()).hexdigest()[:16], resume="allow",
            config=flatten(config), dir=os.fspath(workdir))

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """`row`: tags and numbers, as TensorBoard shows them."""
        self._run.log({tag: value for tag, value in row.items() if isinstance(value, (int, float))}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb() -> None:
    """Raises:
      InputError: the package `wandb` isn't installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb", "the package wandb is not installed", "pip install wandb, or leave --wandb out")
