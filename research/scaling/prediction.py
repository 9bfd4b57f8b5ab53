"""A prediction of a run's final loss: made before the run, sealed, registered at its step 0, scored at its end.

A file is JSON: value, low, high (nats per token of the first evaluation set), law, fit, runs (what the law was fitted to),
target (params, tokens, flops, config_sha256, ...), created (Unix seconds) and sha256 over all of that. The copy in a run's
directory has `registered_at`, too, which the seal doesn't cover. A target of runs that no ladder made has config_sha256 null.
"""

import hashlib
import json
import math
import os
import time
from typing import Any, Mapping

from etils import epath

from research.config import flatten
from research.errors import InputError
from research.schema import PREDICTION_FILE, Config
from research.training.workdir import FREE

Prediction = dict[str, Any]

FIELDS = ("value", "low", "high", "law", "runs", "target", "created", "sha256")
UNSEALED = ("sha256", "registered_at")
CLOCKS = 60.0  # seconds that two machines' clocks may differ by


def config_sha256(config: Config) -> str:
    """Of all that decides what a run computes, but its seed (a prediction is of any seed) and its name."""
    left_out = ("name", "seed", "data.cache_dir", *FREE)
    kept = {path: value for path, value in flatten(config).items() if not path.startswith(left_out)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> Prediction:
    """`content` with the time, where it has none, and with its hash."""
    content = {"created": time.time(), **content}
    return content | {"sha256": _digest(content)}


def _digest(prediction: Mapping[str, Any]) -> str:
    sealed = {name: value for name, value in prediction.items() if name not in UNSEALED}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_prediction(path: str, field: str = "--prediction") -> Prediction:
    """The prediction in a file.

    Raises:
      InputError: no file, no JSON, a missing or ill-typed field, or a content that was changed since it was sealed.
    """
    try:
        found = json.loads(epath.Path(path).expanduser().read_text())
    except FileNotFoundError:
        raise InputError(field, f"{path} does not exist", "name the file that predict wrote") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(field, f"{path} can't be read ({error})", "name the file that predict wrote") from None
    missing = [name for name in FIELDS if not isinstance(found, dict) or name not in found]
    if missing:
        raise InputError(field, f"{path} has no {', '.join(missing)}", "name the file that predict wrote")
    if found["sha256"] != _digest(found):
        raise InputError(field, f"{path} was changed after it was made: its hash isn't that of its content", "predict again")
    numbers = [found[name] for name in ("low", "value", "high")]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers) or numbers != sorted(numbers):
        raise InputError(field, f"{path}: low, value, high are {numbers}", "predict again")
    return found


def check_target(prediction: Prediction, config: Config, field: str = "--prediction") -> None:
    """Raises InputError where the prediction is of another config, or of none."""
    if prediction["target"]["config_sha256"] is None:
        raise InputError(field, "is of no config, as it was made from a CSV file alone: nothing says that it is of this run",
                         "predict from a ladder (--workdir with a plan.json), or compare the losses by hand")
    if prediction["target"]["config_sha256"] != config_sha256(config):
        target = prediction["target"]
        raise InputError(field, f"is of another config: {target['params']:,} parameters, {target['tokens']:,} tokens, "
                         f"settings {target['config_sha256'][:12]}; this one's are {config_sha256(config)[:12]}",
                         "train with the command that predict printed, or predict for this config")


def check_before(prediction: Prediction, started: float, field: str = "--prediction") -> None:
    """Raises InputError where the prediction was made after `started` (Unix seconds), when the run began."""
    late = prediction["created"] - started
    if late > 0:
        raise InputError(field, f"was made {late:.0f} s after the run began", "register a prediction before step 0")


def registered(prediction: Prediction) -> Prediction:
    """As a run's directory holds it."""
    return prediction | {"registered_at": time.time()}


def stored_prediction(workdir: str | os.PathLike) -> Prediction | None:
    """The prediction registered in a run's directory, if there is one. Raises InputError where it was changed since."""
    path = epath.Path(workdir) / PREDICTION_FILE
    return read_prediction(os.fspath(path), PREDICTION_FILE) if path.exists() else None


def score(prediction: Prediction, loss: float | None) -> dict[str, Any]:
    """What became of it. error: predicted - observed; both errors are None for a run without a finite loss, not covered."""
    band = {name: prediction[name] for name in ("value", "low", "high")}
    observed = loss is not None and math.isfinite(loss)
    error = prediction["value"] - loss if observed else None
    return {"predicted": band, "observed": loss if observed else None, "error": error,
            "relative_error": error / loss if observed else None,
            "covered": observed and prediction["low"] <= loss <= prediction["high"],
            "sha256": prediction["sha256"], "law": prediction["law"]}
