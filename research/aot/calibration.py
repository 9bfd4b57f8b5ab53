"""Published runs, and what our compile of each one's shapes measured: `python -m tools.aot --calibrate` makes calibration.json.

What is taken from whom, and how far one carries to another: docs/tpu.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.aot.estimate import LEAST_RUNS, MOST_ERROR, Parts, Run, calibration
from research.errors import InputError
from research.hardware import parse_topology
from research.training.workdir import git

FILE = Path(__file__).with_name("calibration.json")
PACKAGES = ("jax", "libtpu")
MEASURED = ("parts", "estimated_cycles", "memory", "floors", "compile_seconds")  # of what `tools.aot --json` answers


@dataclasses.dataclass(frozen=True)
class Published:
    """One of MaxText's runs: the flags that give its shapes here, its seconds a step, and where they are from.

    keeps_projections: it keeps those of attention, so that its backward pass doesn't make them again, as ours does. offloads:
    it keeps them on the hosts, which isn't modelled: no estimate is shown of such a step, and the scale isn't made with it.
    """

    name: str
    preset: str
    topology: str
    sets: tuple[str, ...]
    seconds: float
    figure: str
    source: str
    keeps_projections: bool = False
    offloads: bool = False

    @property
    def words(self) -> list[str]:
        """The arguments of `tools.aot`."""
        return [f"--config={self.preset}", f"--topology={self.topology}", *(f"--set={text}" for text in self.sets)]


_TIERING = "MaxText, docs/reference/models/tiering.md"
_V5E = "MaxText, src/maxtext/configs/tpu/v5e/README.md, {} beside it"
_LAYER = "model.stages.0.pattern.0."
_SCALED = ("model.stages.0.repeats=32", _LAYER + "kv_heads=64", "data.seq_len=2048")  # global_parameter_scale=16 and 32
PUBLISHED = (
    Published("16B, v5e-256", "llama2_70b", "v5e:16x16",
              ("model.dim=4096", _LAYER + "head_dim=128", *_SCALED, "train.batch_size=1536"),
              10.30, "61.1%: 120 TFLOP/s of 100.6 GFLOP a token, all of attention counted", _V5E.format("16b.sh")),
    Published("32B, v5e-256", "llama2_70b", "v5e:16x16", (*_SCALED, "train.batch_size=1024"),
              12.09, "66.9%: 132 TFLOP/s of 194.9 GFLOP a token, all of attention counted", _V5E.format("32b.sh")),
    Published("Llama 2 70B, v5p-512", "llama2_70b", "v5p:8x8x8", ("data.seq_len=4096", "train.batch_size=2048"),
              23.68, "65.4%, 692 tokens/s a chip", f"{_TIERING}, and benchmarks/maxtext_v5p_model_configs.py that it links",
              keeps_projections=True),
    Published("Mixtral 8x7B, v5p-128", "mixtral_8x7b", "v5p:4x4x8",
              ("data.seq_len=4096", "train.batch_size=4608", "model.param_dtype=bfloat16"),
              50.69, "52.6%, 2,909 tokens/s a chip", f"{_TIERING}; tpu-recipes, training/v5p/Mixtral-8X7B-Maxtext"),
    Published("Llama 3.1 8B, v6e-256", "llama3_8b", "v6e:16x16", ("data.seq_len=8192", "train.batch_size=1024"),
              4.546, "45.5%, 4.546 s", f"{_TIERING}; tpu-recipes, training/trillium/Llama3.1-8B-MaxText/v6e-256",
              keeps_projections=True, offloads=True),
)


def versions() -> dict[str, str | None]:
    """Of PACKAGES; None for what isn't installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def made_with() -> dict[str, str | None]:
    """What decides what a compile measures: versions, and the revision of the code, "+" where it was changed since."""
    ours = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude,top)research/aot/{FILE.name}")
    revision = git("rev-parse", "HEAD")
    return {**versions(), "revision": revision and revision + ("+" if ours else "")}


def strangers(path: str | os.PathLike = FILE) -> list[str]:
    """Versions that rows of the estimate's file were measured with and that aren't the installed ones, in words."""
    here = versions()
    return sorted({f"{name} {row['made_with'][name]}" for row in read(path).values() for name in PACKAGES
                   if row["made_with"][name] != here[name]})


def read(path: str | os.PathLike = FILE) -> dict[str, dict[str, Any]]:
    """Rows by the published run's name, of those whose flags are still the table's. None is there where there is no file.

    Raises InputError for a file that isn't one of ours.
    """
    if not os.path.exists(path):
        return {}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        for row in rows.values():
            _parts(row)
        return {run.name: rows[run.name] for run in PUBLISHED if run.name in rows and rows[run.name]["words"] == run.words}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError("--output", f"{path} holds something else than rows of a calibration", "name another file") from None


def write(path: str | os.PathLike, published: Published, answer: Mapping[str, Any]) -> None:
    """Adds what `tools.aot --json` answered to the rows of the file, at once or not at all.

    Raises ValueError for an answer that would be too low in silence: the compiler's text isn't read as it should be.
    """
    row = {"words": published.words, "made_with": made_with(), **{name: answer[name] for name in MEASURED}}
    parts = _parts(row)
    if parts.silent or parts.unknown_loops or (published.keeps_projections and not parts.again):
        raise ValueError(f"{published.name}: {parts}: something of the step wasn't found in the compiler's text")
    rows = read(path) | {published.name: row}
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(json.dumps({run.name: rows[run.name] for run in PUBLISHED if run.name in rows}, indent=1) + "\n")
    os.replace(f"{path}.new", path)


def runs(path: str | os.PathLike = FILE) -> tuple[Run, ...]:
    """What an estimate is calibrated on."""
    rows = read(path)
    return tuple(_run(one, rows[one.name]) for one in PUBLISHED if one.name in rows and not one.offloads)


def _parts(row: Mapping[str, Any]) -> Parts:
    return Parts(**{name: value for name, value in row["parts"].items() if name != "seconds"})


def _run(published: Published, row: Mapping[str, Any]) -> Run:
    parts = _parts(row)
    if published.keeps_projections:
        parts = dataclasses.replace(parts, dense=parts.dense - parts.again)
    return Run(published.name, parse_topology(published.topology).chip.name, published.seconds, parts)


def summary(path: str | os.PathLike = FILE) -> dict[str, Any]:
    """The JSON of `tools.aot --calibrate`: every published run, what was measured of it, and its residual by the others.

    Residuals are null below two runs of the scale; `worst` is of those; `shown`: may an estimate be shown?
    """
    rows, used = read(path), runs(path)
    scale, residuals = calibration(used) if len(used) > 1 else (None, {})
    worst = max(map(abs, residuals.values())) if residuals else None
    found = []
    for one in PUBLISHED:
        formula = _run(one, rows[one.name]).parts.seconds if one.name in rows else None
        residual = residuals[one.name] if one.name in residuals else None
        if one.offloads and formula is not None and scale is not None:
            residual = formula / scale / one.seconds - 1
        found.append({**dataclasses.asdict(one), "measured": rows[one.name] if one.name in rows else None,
                      "formula": formula, "residual": residual})
    return {"runs": found, "scale": scale, "worst": worst, "limit": MOST_ERROR,
            "shown": len(used) >= LEAST_RUNS and worst is not None and worst <= MOST_ERROR}
