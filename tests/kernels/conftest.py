"""The TPU's interpreter for every test here that has an `implementation`, so that no file can forget it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # the finding has no public name
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture(autouse=True)
def interpret_pallas(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test whose `implementation` is "pallas" runs it here, in memory that holds NaN until it is written; a race fails it."""
    if "implementation" not in request.fixturenames or request.getfixturevalue("implementation") != "pallas":
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not interpreter.races.races_found
