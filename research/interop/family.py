"""What a family of models is to the conversion: its config both ways, and its table of tensors."""

import dataclasses
from typing import Any, Callable, Mapping

from research.config import nearest
from research.errors import InputError
from research.interop.tensor_map import Row
from research.schema import ModelConfig

Settings = dict[str, Any]  # of a config.json


@dataclasses.dataclass(frozen=True)
class Family:
    """`model_type`, `architecture`: as config.json says them. `known`: the settings that are read, with their defaults.
    `fixed`: settings that may only have the value that is implemented here. `read`: settings -> our model; `write`: back, or
    None for a model of another family. `per_layer`: mixers a layer of theirs. `optional_prefix`: some checkpoints leave it
    out. `ignored`: a pattern of what is stored, but computed: masks, frequencies. A setting that is null has its default, like
    one that isn't there, but for those of `derived`, whose default is a number and whose null follows from other settings.
    """

    model_type: str
    architecture: str
    known: Mapping[str, Any]
    fixed: Mapping[str, Any]
    read: Callable[[Settings], ModelConfig]
    write: Callable[[ModelConfig], Settings | None]
    rows: tuple[Row, ...]
    per_layer: int = 2
    optional_prefix: str = ""
    ignored: str = r"$^"
    derived: tuple[str, ...] = ()

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """The known settings of a config.json. Raises InputError: one of another type, or one that isn't implemented."""
        for name, value in self.fixed.items():
            if name in config and config[name] not in (value, None):
                raise InputError(f"config.json: {name}", f"{config[name]!r} is not implemented", f"only {value!r} is")
        found = dict(self.known)
        for name in found:
            if name in config and config[name] is not None:
                found[name] = _typed(name, config[name], self.known[name])
            elif name in config and name in self.derived:
                found[name] = None
        return found

    def model(self, config: Mapping[str, Any]) -> ModelConfig:
        """Our model of a config.json. Raises InputError, also where its settings don't fit together."""
        try:
            return self.read(self.settings(config))
        except InputError as error:
            raise error if error.field.startswith("config.json") else error.within("config.json") from None


# Of the settings whose default is null, those that aren't whole numbers.
_NULLABLE: Mapping[str, tuple[type, ...]] = {
    "rope_scaling": (dict,), "rope_parameters": (dict,), "time_step_limit": (list, tuple), "mamba_dt_rank": (int, str),
    "time_step_rank": (int, str)}
_LARGEST = 2**31 - 1
_MOST = 10_000  # layers or experts: names of tensors are made for each of them


def _typed(name: str, value: Any, default: Any) -> Any:
    kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if default is None:
        kinds = _NULLABLE[name] if name in _NULLABLE else (int,)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        words = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"config.json: {name}", f"{value!r} is not {words}", "download the model again")
    if type(default) is int and value < 1:
        raise InputError(f"config.json: {name}", f"{value} is below 1", "download the model again")
    most = _MOST if name == "n_layer" or name.startswith("num_") and name.endswith(("layers", "experts")) else _LARGEST
    if isinstance(value, int) and value > most:
        raise InputError(f"config.json: {name}", f"{value} is above {most}", "download the model again")
    return value


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu",
               "gelu_fast": "gelu", "relu": "relu", "relu2": "relu_squared"}


def activation(name: str, value: str) -> str:
    """Our name of an activation. Raises InputError."""
    if value not in ACTIVATIONS:
        raise InputError(f"config.json: {name}", f"unknown activation {value!r}", nearest(value, list(ACTIVATIONS)))
    return ACTIVATIONS[value]


def their_activation(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def same_layers(model: ModelConfig, *kinds: type) -> tuple | None:
    """The mixers of one layer, where every layer has one of each of `kinds` in turn and all layers are alike."""
    patterns = {mixers for stage in model.stages for mixers in _layers(stage.pattern, len(kinds))}
    if len(patterns) != 1:
        return None
    layer = patterns.pop()
    return layer if tuple(map(type, layer)) == kinds else None


def _layers(pattern: tuple, size: int) -> list[tuple]:
    return [pattern[i:i + size] for i in range(0, len(pattern), size)]


def depth(model: ModelConfig, per_layer: int = 2) -> int:
    """Their number of layers."""
    return sum(stage.repeats * len(stage.pattern) for stage in model.stages) // per_layer
