"""The run directory: one job at a time, the resolved config, the ledger, the result."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import socket
import subprocess
import threading
import time
from typing import Any, Callable, Mapping

import jax
from etils import epath

from research.config import difference, from_json, to_json
from research.errors import InputError, is_full
from research.models.mixers import kinds
from research.schema import CONFIG_FILE, LEDGER_EVENTS, LEDGER_PREFIX, LOCK_FILE, RESULT_FILE, SCHEMA_VERSION, Config

# What may differ between two launches of one run, because it doesn't change what is computed.
FREE = ("mesh.", "checkpoint.", "guard.", "optim.offload", "data.cache_dir", "train.log_every", "train.eval_every",
        "train.sample_every", "train.sample_prompt")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "grain")


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


class Lock:
    """Holds `workdir`/.lock for this process (local file systems; the kernel frees it when the process dies)."""

    def __init__(self, workdir: epath.Path):
        self._file = None
        if is_remote(workdir):
            return
        path = os.path.join(os.fspath(workdir), LOCK_FILE)
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError("--workdir", f"{workdir} is in use by {holder}", "wait for it or choose another") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def git(*args: str) -> str | None:
    """What git says of the checkout that this file is in; None where it is in none."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        run = subprocess.run(["git", "-C", here, *args], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.decode(errors="replace").strip()


def provenance(corpus_hash: str) -> dict[str, Any]:
    """What a run needs besides its config to be made again."""
    versions = {"rung": SCHEMA_VERSION}
    for name in PACKAGES:
        versions[name] = importlib.metadata.version(name)
    diff = git("diff", "HEAD")
    device = jax.devices()[0]
    return {
        "versions": versions, "devices": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count(),
                                          "processes": jax.process_count()},
        "git": {"revision": git("rev-parse", "HEAD"),
                "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None},
        "corpus_sha256": corpus_hash,
    }


def read_config(workdir: str | os.PathLike) -> Config:
    """The resolved config of the run at `workdir`.

    Raises:
      InputError: there is none, or it is of another schema.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise InputError("--workdir", f"{workdir} has no {CONFIG_FILE}", "name a directory that experiments.train has written")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError("--workdir", f"{path} is not JSON ({error})", "restore the file") from None
    if not isinstance(data, dict) or "config" not in data or data["schema"] != SCHEMA_VERSION:
        raise InputError("--workdir", f"{path} is not of schema {SCHEMA_VERSION}", "use the version that wrote it")
    return from_json(Config, data["config"], kinds())


def check_config(workdir: epath.Path, config: Config) -> bool:
    """True if `workdir` holds a run of this config already.

    Raises:
      InputError: it holds a run of another one; names the fields.
    """
    if not (workdir / CONFIG_FILE).exists():
        return False
    changed = {path: values for path, values in difference(config, read_config(workdir)).items() if not path.startswith(FREE)}
    if changed:
        words = "; ".join(f"{path} is {theirs!r} there, {ours!r} here" for path, (ours, theirs) in list(changed.items())[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise InputError("--workdir", f"{workdir} holds a run of another config ({words}{more})",
                         "choose another --workdir, or the same settings")
    return True


def write_json(path: epath.Path, data: Mapping) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(data, indent=2, sort_keys=False, allow_nan=False) + "\n")


def write_text(path: epath.Path, text: str) -> None:
    """Whole or not at all: written beside, then moved into place."""
    beside = path.parent / f".{path.name}.partial"
    beside.write_text(text)
    beside.rename(path) if is_remote(path) else os.replace(beside, path)


def sync(*paths: epath.Path) -> None:
    """Files and directories to the disk itself, so that they outlast the machine's power; object stores do so by themselves."""
    for path in paths:
        if not is_remote(path):
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system that has no such thing
                    raise
            finally:
                os.close(number)


def write_config(workdir: epath.Path, config: Config, corpus_hash: str) -> None:
    write_json(workdir / CONFIG_FILE, {"schema": SCHEMA_VERSION, "config": to_json(config), **provenance(corpus_hash)})


def write_result(workdir: epath.Path, result: Mapping[str, Any]) -> None:
    write_json(workdir / RESULT_FILE, result)


class Parts:
    """Numbered JSON-lines files, `prefix`NNNN.jsonl: appended to locally, rewritten whole on object stores."""

    def __init__(self, workdir: epath.Path, prefix: str):
        self._workdir, self._prefix = workdir, prefix
        numbers = [int(p.name[len(prefix):-len(".jsonl")]) for p in paths(workdir, prefix)]
        self._path = workdir / f"{prefix}{max(numbers, default=-1) + 1:04d}.jsonl"
        self._lines: list[str] = []
        self._lock = threading.Lock()  # the watching thread of a job of several (gang.py) writes, too

    def write(self, row: Mapping[str, Any]) -> None:
        """While the disk is full, rows wait in memory for one that can be written."""
        with self._lock:
            self._lines.append(json.dumps(row, allow_nan=False) + "\n")
            self._flush()

    def _flush(self) -> None:
        if is_remote(self._path):
            self._path.write_text("".join(self._lines))
            return
        path = os.fspath(self._path)
        length = os.path.getsize(path) if os.path.exists(path) else 0
        try:
            with open(path, "a") as file:
                file.write("".join(self._lines))
        except OSError as error:
            if not is_full(error):
                raise
            if os.path.exists(path):
                os.truncate(path, length)  # no half of a line
            return
        self._lines = []


class PatientFile:
    """A binary file for TensorBoard's writer: while the disk is full, what is flushed waits in memory."""

    def __init__(self, path: str):
        self._file, self._waiting = open(path, "ab", buffering=0), bytearray()

    def write(self, data: bytes) -> None:
        self._waiting += data

    def flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[:self._file.write(self._waiting)]
        except OSError as error:
            if not is_full(error):
                raise

    def close(self) -> None:
        self.flush()
        self._file.close()


def paths(workdir: epath.Path, prefix: str) -> list[epath.Path]:
    """The parts of `prefix` in order."""
    return sorted((p for p in epath.Path(workdir).iterdir() if p.name.startswith(prefix) and p.name.endswith(".jsonl")),
                  key=lambda p: p.name)


def read_rows(workdir: str | os.PathLike, prefix: str) -> list[dict]:
    """All rows in order; a last line cut by a crash is left out."""
    rows = []
    for path in paths(epath.Path(workdir), prefix):
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def truncate_rows(workdir: epath.Path, prefix: str, step: int) -> None:
    """Drops the rows after `step`, which the resumed run will write again."""
    for path in paths(workdir, prefix):
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) == len(lines):
            continue
        if not kept:
            path.unlink()
            continue
        beside = path.parent / f".{path.name}.partial"
        beside.write_text("".join(kept))
        beside.rename(path) if is_remote(path) else os.replace(beside, path)


class Ledger:
    """What happened to the run, in order: {time, event, step, ...}. `heard` is told every line, too: (event, step, details)."""

    def __init__(self, workdir: epath.Path, heard: Callable[[str, int, Mapping[str, Any]], None] | None = None):
        self._parts, self._heard = Parts(workdir, LEDGER_PREFIX), heard

    def write(self, event: str, step: int, **details: Any) -> None:
        if event not in LEDGER_EVENTS:
            raise ValueError(f"unknown ledger event {event!r}")
        if self._heard:  # first: the disk may be what is wrong
            self._heard(event, step, details)
        self._parts.write({"time": time.time(), "event": event, "step": step, **details})
