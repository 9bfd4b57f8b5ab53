"""What of an imported directory has no place in our config: in the run as it was, in `huggingface/`, written back on export.

config.json: the settings that are read, and of all others scalars and lists of them (what isn't would name their code, or how
weights were quantized). generation_config.json: whole. The tokenizer's files go with it (research/data/pretrained.py).
"""

import json
import math
import os
import pathlib
from typing import Any, Mapping

from etils import epath

from research.errors import InputError
from research.interop.family import Family, Settings
from research.interop.safetensors_files import read_json
from research.schema import CONFIG_FILE, TOKENIZER, Config

DIRECTORY, GENERATION = "huggingface", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_kept(directory: pathlib.Path, family: Family, config: Mapping[str, Any]) -> dict[str, Settings]:
    """File -> what is kept of it. Raises InputError: token ids that are none."""
    kept = {CONFIG_FILE: {name: value for name, value in config.items()
                     if name in family.known or name in family.fixed or _is_flat(value)}}
    if os.path.lexists(directory / GENERATION):
        kept[GENERATION] = read_json(directory, GENERATION)
    for file, settings in kept.items():
        for name in IDS:
            _token_ids(f"{file}: {name}", settings[name] if name in settings else None)
    return kept


def write_kept(kept: Mapping[str, Settings], directory: pathlib.Path) -> None:
    directory.mkdir()
    for name, settings in kept.items():
        (directory / name).write_text(json.dumps(settings, indent=2) + "\n")


def load_kept(workdir: str | os.PathLike, config: Config) -> dict[str, Settings]:
    """The inverse of `write_kept` to a run's directory; {} of a run that wasn't imported.

    A run that began with the weights and the tokenizer of another has what that one has, as long as it is there.

    Raises:
      InputError: a file is damaged.
    """
    begun = config.train.init_from
    places = [workdir, *([begun] if begun and config.data.tokenizer == os.path.join(begun, TOKENIZER) else [])]
    directories = [epath.Path(place).expanduser() / DIRECTORY for place in places]
    directory = next((found for found in directories if found.exists()), directories[0])
    kept = {}
    for name in (CONFIG_FILE, GENERATION):
        path = directory / name
        if path.exists():
            try:
                kept[name] = dict(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError, RecursionError):
                raise InputError("--workdir", f"{path} is no table in JSON", "restore the file") from None
    return kept


def end_ids(workdir: str | os.PathLike, config: Config) -> tuple[int, ...]:
    """The tokens that end what an imported model generates: what transformers' generate stops at; () of other runs."""
    kept = load_kept(workdir, config)
    for name in (GENERATION, CONFIG_FILE):
        if name in kept and "eos_token_id" in kept[name] and kept[name]["eos_token_id"] is not None:
            found = _token_ids(f"{name}: eos_token_id", kept[name]["eos_token_id"])
            return tuple(i for i in found if 0 <= i < config.model.vocab_size)
    return ()


def _token_ids(field: str, value: Any) -> list[int]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in found):
        raise InputError(field, f"{value!r} is neither an id nor a list of them", "download the model again")
    return found


def _is_flat(value: Any) -> bool:
    if isinstance(value, list):
        return not any(isinstance(item, (list, dict)) for item in value) and all(map(_is_flat, value))
    return value is None or isinstance(value, (bool, int, str)) or isinstance(value, float) and math.isfinite(value)
