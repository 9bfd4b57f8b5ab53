"""Which implementation runs is decided when a program is lowered, so that one compiled for a TPU elsewhere has the TPU's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax


def by_platform(
    *operands: Any,
    otherwise: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    refusal: str | None = None,
) -> Any:
    """f(*operands), f being that of the platform which the program is lowered for, else `otherwise`; all differentiable.

    refusal: why `tpu` can't serve these operands: then it isn't taken, with one line in the log.
    """
    if refusal is not None:
        say_once(refusal)
        tpu = None
    own = {name: run for name, run in (("tpu", tpu), ("cuda", cuda), ("cpu", cpu)) if run is not None}
    return jax.lax.platform_dependent(*operands, **own, default=otherwise) if own else otherwise(*operands)


@functools.cache
def say_once(refusal: str) -> None:
    """Once in a process: a step has many layers, and is traced again and again."""
    logging.getLogger(__name__).warning("%s; the next implementation is taken", refusal)
