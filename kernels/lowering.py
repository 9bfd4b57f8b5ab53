"""Which implementation runs is decided when a program is lowered, so that one compiled for a TPU elsewhere has the TPU's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax


def on_tpu(kernel: Callable[..., Any], otherwise: Callable[..., Any], refusal: str | None, *operands: Any) -> Any:
    """kernel(*operands) where the program is lowered for a TPU, else otherwise(*operands); both differentiable.

    refusal: why the kernel can't serve these operands: then `otherwise` is taken everywhere, with one line in the log.
    """
    if refusal is not None:
        say_once(refusal)
        return otherwise(*operands)
    return jax.lax.platform_dependent(*operands, tpu=kernel, default=otherwise)


@functools.cache
def say_once(refusal: str) -> None:
    """Once in a process: a step has many layers, and is traced again and again."""
    logging.getLogger(__name__).warning("%s; the next implementation is taken", refusal)
