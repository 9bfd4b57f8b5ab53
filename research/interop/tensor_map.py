"""Which part of which of their tensors each of our weights is, derived from our paths and declarations by a family's table.

Our layers are scanned, so a weight of ours holds a leading axis of repeats, and experts one more; theirs are a tensor a layer
(and an expert). Rows that name the same tensor of theirs are its parts, in the order of the table, along its output axis.
"""

import math
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np

from research.errors import InputError
from research.models.lm import LanguageModel
from research.params import LAYERS, Weight


class Layout(NamedTuple):
    """How an array of ours, of which the first `inputs` axes are summed over, lies in theirs.

    `shape(shape, inputs)`: theirs; `transposed`: of their matrix, before it takes that shape; `axis`: theirs, along which
    parts are put together.
    """

    shape: Callable[[tuple[int, ...], int], tuple[int, ...]]
    transposed: bool = False
    axis: int = 0


def _matrix(shape: tuple[int, ...], inputs: int) -> tuple[int, int]:
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


LAYOUTS = {
    "same": Layout(lambda shape, inputs: shape),
    "flat": Layout(lambda shape, inputs: (math.prod(shape),)),  # a bias or gain of heads
    "linear": Layout(lambda shape, inputs: _matrix(shape, inputs)[::-1], transposed=True),  # torch's nn.Linear
    "conv1d": Layout(_matrix, axis=1),  # GPT-2's name for a matrix with inputs first
    "row": Layout(lambda shape, inputs: (1, 1, math.prod(shape)), axis=2),
    "depthwise": Layout(lambda shape, inputs: (math.prod(shape[1:]), 1, shape[0]), transposed=True),  # ours: taps first
}


class Row(NamedTuple):
    """`ours`: a mixer's kind and its weight (`attention/query`), the norm of a layer's first mixer (`norm_0/gain`), or a path
    outside the layers. `theirs`: a name with {layer} and {expert}."""

    ours: str
    theirs: str
    layout: str = "same"


class Part(NamedTuple):
    """theirs[start:stop] along the layout's axis is ours[path][index]."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int
    layout: Layout
    start: int
    stop: int

    def take(self, theirs: np.ndarray) -> np.ndarray:
        """Our array, from the whole of their tensor."""
        part = theirs[(slice(None),) * self.layout.axis + (slice(self.start, self.stop),)]
        if self.layout.transposed:
            part = part.reshape(part.shape[0], -1).T
        return np.ascontiguousarray(part).reshape(self.shape)

    def give(self, ours: np.ndarray) -> np.ndarray:
        """Their tensor, or this part of it, from our array."""
        shape = self.layout.shape(self.shape, self.inputs)
        if self.layout.transposed:
            ours = ours.reshape(-1, shape[0]).T
        return ours.reshape(shape)


class Theirs(NamedTuple):
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def assemble(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor, from the values of its parts."""
        given = [part.give(value) for part, value in zip(self.parts, values, strict=True)]
        return given[0] if len(given) == 1 else np.concatenate(given, axis=self.parts[0].layout.axis)


def tensor_map(model: LanguageModel, rows: Sequence[Row], per_layer: int) -> dict[str, Theirs]:
    """Name of each of their tensors -> shape and parts, a weight's layers together, in the order of the table.

    `per_layer`: how many mixers one of their layers is.

    Raises:
      InputError: a weight of the model has no row.
    """
    placed: dict[str, list[tuple[str, Weight, int, int]]] = {}
    for path, weight in model.weights.items():
        key, first, stride = _locate(model, path, per_layer)
        placed.setdefault(key, []).append((path, weight, first, stride))
    known = {row.ours for row in rows}
    for key, weights in placed.items():
        if key not in known:
            raise InputError("model", f"{weights[0][0]} has no counterpart there", "export a model of that family")
    parts: dict[str, list[Part]] = {}
    for row in rows:
        for path, weight, first, stride in placed[row.ours] if row.ours in placed else ():
            for index, name in _indices(row.theirs, weight, first, stride):
                before = parts.setdefault(name, [])
                before.append(_part(path, weight, index, LAYOUTS[row.layout], before[-1].stop if before else 0))
    return {name: Theirs(_shape(found), tuple(found)) for name, found in parts.items()}


def _part(path: str, weight: Weight, index: tuple[int, ...], layout: Layout, start: int) -> Part:
    shape, axes = weight.shape[len(index):], weight.axes[len(index):]
    inputs = sum(axis in weight.inputs for axis in axes)
    return Part(path, index, shape, inputs, layout, start, start + layout.shape(shape, inputs)[layout.axis])


def _shape(parts: Sequence[Part]) -> tuple[int, ...]:
    """Of the whole tensor: the last part's, but as long as all together."""
    last = parts[-1]
    shape = list(last.layout.shape(last.shape, last.inputs))
    shape[last.layout.axis] = last.stop
    return tuple(shape)


def _locate(model: LanguageModel, path: str, per_layer: int) -> tuple[str, int, int]:
    """(the row's name for a weight of ours, their layer of its first repeat, their layers a repeat)."""
    parts = path.split("/")
    if len(parts) != 4 or parts[0] != "decoder":
        return path.removeprefix("decoder/"), 0, 0
    stages, stage = model.cfg.stages, int(parts[1].removeprefix("stage_"))
    kind, number = parts[2].rsplit("_", 1)
    before = sum(s.repeats * len(s.pattern) for s in stages[:stage])
    kind = f"norm_{int(number) % per_layer}" if kind == "norm" else kind
    return f"{kind}/{parts[3]}", (before + int(number)) // per_layer, len(stages[stage].pattern) // per_layer


def _indices(theirs: str, weight: Weight, first: int, stride: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into our weight, name of theirs) for every layer and expert."""
    if weight.axes[:1] != (LAYERS,):
        yield (), theirs
        return
    for repeat in range(weight.shape[0]):
        name = theirs.replace("{layer}", str(first + repeat * stride))
        if "{expert}" not in theirs:
            yield (repeat,), name
            continue
        for expert in range(weight.shape[1]):
            yield (repeat, expert), name.replace("{expert}", str(expert))
