"""Stopping when asked: SIGTERM, SIGINT or the minutes are over; in a job of several processes all stop after the same step."""

import contextlib
import math
import os
import signal
import time
from typing import Any, Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

from research.schema import EXIT_INTERRUPTED


class StopRequests:
    """Whether to stop. `minutes`: of training, from now on; None has no limit."""

    def __init__(self, minutes: float | None = None):
        self._deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self._signal: str | None = None
        self._told = False

    def ask(self, number: int, _: Any = None) -> None:
        """A handler of signals; a second SIGINT ends at once."""
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    def asked(self, step: int) -> str | None:
        """Why to stop after `step`, or None. All processes of a job call it after each step, and get the same answer.

        Among several processes JAX's preemption service decides: SIGTERM at any of them (it has the handler) is told to all,
        which agree on a step that none has passed. What else asks one process to stop is handed to it as a SIGTERM.
        """
        reason = self._signal or ("minutes are over" if time.monotonic() > self._deadline else None)
        if jax.process_count() == 1:
            return reason
        if reason and not self._told:
            self._told = True
            os.kill(os.getpid(), signal.SIGTERM)
        return (reason or "SIGTERM") if multihost_utils.reached_preemption_sync_point(step) else None


@contextlib.contextmanager
def _handling(numbers: tuple[int, ...], handler: Any) -> Iterator[None]:
    """`handler` for these signals; nothing where another thread than the main one asks for it: whoever owns that does."""
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def stop_requests(minutes: float | None = None) -> Iterator[StopRequests]:
    """While the steps run: turns SIGINT and SIGTERM into an answer of the returned object's `asked`."""
    requests = StopRequests(minutes)
    # With several processes SIGTERM belongs to the preemption service: a handler of ours would keep it from the others.
    numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
    with _handling(numbers, requests.ask):
        yield requests


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Around the steps (while it reads data, compiles, evaluates at the end) SIGTERM ends the process at once, with code 75:
    everything that is to be saved is. In a job of several processes it waits for the first step, which they share."""

    def end(number: int, _: Any) -> None:
        logging.warning("%s: stopped outside of training; the same command goes on from the last checkpoint",
                        signal.Signals(number).name)
        raise SystemExit(EXIT_INTERRUPTED)

    with _handling((signal.SIGTERM,) if jax.process_count() == 1 else (), end):
        yield
