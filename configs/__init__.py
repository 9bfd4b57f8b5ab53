"""Presets: plain functions that return a typed Config. A new preset is its function and a row here."""

from typing import Callable

from configs.quickstart import debug, quickstart, text
from research.config import nearest
from research.errors import InputError
from research.schema import Config

PRESETS: dict[str, Callable[[], Config]] = {
    "debug": debug,
    "quickstart": quickstart,
    "text": text,
}


def preset(name: str) -> Config:
    """The preset called `name`.

    Raises:
      InputError: there is none; names the nearest.
    """
    if name not in PRESETS:
        raise InputError("--config", f"unknown preset {name!r}", nearest(name, list(PRESETS)))
    return PRESETS[name]()
