"""What a traced program does, wherever in it."""

from typing import Any, Iterator


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation anywhere in a jaxpr, nested ones included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for inner in param if isinstance(param, (tuple, list)) else (param,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
