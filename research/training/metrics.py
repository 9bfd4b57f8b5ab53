"""What a run tells: one row a logged step as JSON lines, and the same in TensorBoard."""

import math
import os
import re
from typing import Any, Mapping, Sequence

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import register_writer_factory
from tensorboardX.summary import hparams

from research.config import difference, flatten
from research.schema import METRICS_PREFIX, Config
from research.training.workdir import Parts, PatientFile, is_remote, read_rows, truncate_rows

# Columns of a metrics row -> TensorBoard tag; what isn't here keeps its name.
TAGS = {"loss": "train/loss", "loss_se": "train/loss_se", "accuracy": "train/accuracy", "objective": "train/objective",
        "lr": "train/lr", "grad_norm": "norms/grad", "param_norm": "norms/param", "update_norm": "norms/update",
        "tokens_per_second": "speed/tokens_per_second", "mfu": "speed/mfu", "data_wait_share": "speed/data_wait_share",
        "step_seconds_p50": "speed/step_seconds_p50", "step_seconds_p95": "speed/step_seconds_p95",
        "device_bytes": "memory/device_bytes", "tokens": "progress/tokens", "flops": "progress/flops",
        "samples": "progress/samples", "weight": "train/counted_tokens"}
NORMS = {"grad_norm/": "norms_by_stage/grad/", "param_norm/": "norms_by_stage/param/", "update_norm/": "norms_by_stage/update/"}

COMPARED = ("train/loss", "train/final_eval_loss", "train/bits_per_byte")  # the metrics of the hparams tab, by tag


def run_name(config: Config, preset: Config) -> str:
    """The preset's name and the fields that differ from it: `quickstart,lr=0.003,steps=200`."""
    changed = [path for path, (ours, _) in difference(config, preset).items() if path != "name" and ours is not None]
    ours = flatten(config)
    last = [path.rsplit(".", 1)[-1] for path in changed]
    words = [f"{path if last.count(name) > 1 else name}={ours[path]}" for path, name in zip(changed, last)]
    return ",".join([config.name, *words])


def tag_of(name: str) -> str:
    if name in TAGS:
        return TAGS[name]
    for prefix, tag in NORMS.items():
        if name.startswith(prefix):
            return tag + name.removeprefix(prefix)
    return name if "/" in name else f"train/{name}"


class _Patient:
    """Opens `patient:PATH` for tensorboardX. Its thread dies of a full disk otherwise, and then its queue blocks the run."""

    PREFIX = "patient"

    def open(self, path: str) -> PatientFile:
        return PatientFile(path.removeprefix(f"{self.PREFIX}:"))

    def directory_check(self, path: str) -> None:
        os.makedirs(path.removeprefix(f"{self.PREFIX}:"), exist_ok=True)


register_writer_factory(_Patient.PREFIX, _Patient())


class Recorder:
    """Writes rows from `start_step` on; rows of later steps (an interrupted run's) are dropped first, so none shows twice."""

    def __init__(self, workdir: epath.Path, start_step: int, mirror: Any = None):
        """`mirror`: also takes what TensorBoard takes, by tag (mirrors.WandbMirror)."""
        self._workdir, self._mirror = workdir, mirror
        board = os.fspath(workdir) if is_remote(workdir) else f"{_Patient.PREFIX}:{os.path.abspath(workdir)}"
        self._board = SummaryWriter(board, flush_secs=20)
        self.rewind(start_step)

    def rewind(self, step: int) -> None:
        """Drops what was told of the steps after `step`: rows here, points when TensorBoard reads that a session started."""
        truncate_rows(self._workdir, METRICS_PREFIX, step)
        self._parts = Parts(self._workdir, METRICS_PREFIX)
        for event in (Event(file_version="brain.Event:2"), Event(session_log=SessionLog(status=SessionLog.START))):
            self._board.file_writer.add_event(event, step + 1)
        for row in read_rows(self._workdir, METRICS_PREFIX):  # their points went, too, where tokens or FLOPs are after `step`
            self._by_cost(row, after=step)

    def hparams(self, config: Config, name: str, final: Mapping[str, float] | None = None) -> None:
        """The run's settings for TensorBoard's hparams tab, under `name`; with the final metrics, that it has ended.

        TensorBoard keeps the first it reads of each of the three, and takes the columns from any one run of those it shows:
        so every run declares the same metrics, from its start.
        """
        settings = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flatten(config).items()}
        columns, start, end = hparams({"run": name, **settings}, dict.fromkeys(COMPARED))
        for summary in (columns, start) if final is None else (end,):
            self._board.file_writer.add_summary(summary)
        if final is None:
            lines = "\n".join(f"    {key} = {value}" for key, value in settings.items())
            self._board.add_text("config", f"**{name}**\n\n{lines}", 0)

    def layout(self, sets: Sequence[str]) -> None:
        """TensorBoard's custom scalars: the charts to look at first, training beside evaluation."""
        names = [re.escape(name) for name in sets]
        losses = ["train/loss$", *(f"eval_{name}/loss$" for name in names)]
        self._board.add_custom_scalars({
            "loss": {"train and held out": ["Multiline", losses],
                     "held out and predicted": ["Multiline", [*losses[1:2], "prediction/"]],
                     "by position": ["Multiline", [f"eval_{names[0]}/by_position/"] if names else ["train/loss$"]]},
            "speed": {"tokens a second": ["Multiline", ["speed/tokens_per_second$"]], "MFU": ["Multiline", ["speed/mfu$"]],
                      "seconds a step": ["Multiline", ["speed/step_seconds_p50$", "speed/step_seconds_p95$"]],
                      "share of time waiting for data": ["Multiline", ["speed/data_wait_share$"]]},
            "norms": {"gradient": ["Multiline", ["norms/grad$", "norms_by_stage/grad/"]],
                      "parameters": ["Multiline", ["norms/param$", "norms_by_stage/param/"]],
                      "updates": ["Multiline", ["norms/update$", "norms_by_stage/update/"]]}})

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """A training row: JSON, and scalars against steps, the loss also against tokens and gigaFLOPs."""
        clean = {key: finite(value) for key, value in row.items()}
        self._parts.write({"step": step, **clean})
        tagged = {tag_of(key): value for key, value in clean.items() if isinstance(value, (int, float))}
        for tag, value in tagged.items():
            self._board.add_scalar(tag, value, step)
        if self._mirror:
            self._mirror.row(step, tagged)
        self._by_cost(clean)

    def _by_cost(self, row: Mapping[str, Any], after: int = -1) -> None:
        """The loss of a training row against tokens and gigaFLOPs (whole numbers, as an axis has), where above `after`."""
        if "flops" not in row or not isinstance(row["loss"], float):
            return
        for unit, spent in (("tokens", row["tokens"]), ("gigaflops", int(row["flops"] / 1e9))):
            if spent > after:
                self._board.add_scalar(f"train/loss_by_{unit}", row["loss"], spent)

    def evaluation(self, step: int, name: str, result: Mapping[str, float], by_position: Mapping[str, float]) -> None:
        """An evaluation of the set `name`: `result` of perplexity.summarise, and the loss in position buckets."""
        self._parts.write({"step": step, "set": name, **{key: finite(value) for key, value in result.items()},
                           "loss_by_position": {key: finite(value) for key, value in by_position.items()}})
        tagged = {f"eval_{name}/{key}": result[key] for key in ("loss", "se", "perplexity", "bits_per_byte")}
        tagged |= {f"eval_{name}/by_position/{bucket}": value for bucket, value in by_position.items()}
        for tag, value in tagged.items():
            self._board.add_scalar(tag, value, step)
        if self._mirror:
            self._mirror.row(step, tagged)

    def scalar(self, step: int, tag: str, value: float) -> None:
        self._board.add_scalar(tag, value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._board.add_text(tag, "    " + text.replace("\n", "\n    "), step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()
        if self._mirror:
            self._mirror.close()


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that isn't finite is written as its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Speed:
    """Step times since the last logged row: their median and 95th percentile, and the share spent waiting for data."""

    def __init__(self):
        self.steps: list[float] = []
        self.waits: list[float] = []

    def add(self, seconds: float, wait: float) -> None:
        self.steps.append(seconds)
        self.waits.append(wait)

    def take(self) -> dict[str, float]:
        steps, waits = np.array(self.steps), np.array(self.waits)
        self.steps, self.waits = [], []
        return {"step_seconds_p50": float(np.median(steps)), "step_seconds_p95": float(np.percentile(steps, 95)),
                "data_wait_share": float(waits.sum() / max(steps.sum(), 1e-9)), "seconds": float(steps.sum()),
                "steps": len(steps)}
