"""Configuration: trees of frozen dataclasses, strict overrides, JSON both ways, no magic.

A node is a frozen dataclass that inherits `Node`; its annotations are checked when it is made, so a preset in code, an
override on the command line and a file on disk obey the same rules. The nodes of a run are in `research/schema.py`,
those of the mixers beside each mixer.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Any, Mapping, Sequence

from research.errors import InputError


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds for a number, used as `Annotated[int, Range(least=1)]`; `above`/`below` are exclusive."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        if not math.isfinite(value):
            return "is not a finite number"
        for bound, bad, words in (
            (self.least, lambda b: value < b, "must be at least"),
            (self.most, lambda b: value > b, "must be at most"),
            (self.above, lambda b: value <= b, "must be above"),
            (self.below, lambda b: value >= b, "must be below"),
        ):
            if bound is not None and bad(bound):
                return f"{words} {bound}"
        return None


Positive = typing.Annotated[int, Range(least=1)]
Natural = typing.Annotated[int, Range(least=0)]
Fraction = typing.Annotated[float, Range(least=0.0, below=1.0)]
NonNegative = typing.Annotated[float, Range(least=0.0)]
PositiveFloat = typing.Annotated[float, Range(above=0.0)]


class Node:
    """Base of every config node: checks each field against its annotation when the node is made.

    Raises:
      InputError: a value of the wrong type or out of its range; the field is relative to this node.
    """

    def __post_init__(self):
        for name, annotation in annotations_of(type(self)).items():
            checked = _check(annotation, getattr(self, name), name)
            object.__setattr__(self, name, checked)
        self.validate()

    def validate(self) -> None:
        """Override for rules that span several fields."""


class MixerConfig(Node):
    """Base of the mixers' configs (`research/models/*.py`): the one place where a node's class is chosen by data."""

    def check(self, dim: int) -> None:
        """Override for rules that need the width of the model; called when a ModelConfig is made."""


def annotations_of(cls: type) -> dict[str, Any]:
    """Field name -> annotation, resolved, in the order of declaration."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def nearest(name: str, known: Sequence[str]) -> str:
    """Words for an error: the nearest known names, else all of them."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(sorted(known)) if known else "there are none"


def _describe_type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _describe_type(args[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe_type(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe_type(args[0])}"
    words = {dict: "a table of values", int: "a whole number", float: "a number", bool: "true or false", str: "text",
             type(None): "none"}
    if annotation in words:
        return words[annotation]
    return getattr(annotation, "__name__", str(annotation))


def _check(annotation: Any, value: Any, field: str) -> Any:
    """Returns the value in its canonical form (int -> float, list -> tuple), or raises InputError."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = InputError(field, f"{value!r} is not {_describe_type(annotation)}", "give " + _describe_type(annotation))
    if origin is typing.Annotated:
        value = _check(args[0], value, field)
        for bound in args[1:]:
            if value is not None and (problem := bound.problem(value)):
                raise InputError(field, f"{value} {problem}", "choose a value in range")
        return value
    if origin is typing.Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise InputError(field, f"unknown {value!r}", nearest(str(value), args))
    if origin in (types.UnionType, typing.Union):
        for option in args:
            if option is type(None) and value is None:
                return None
        options = [a for a in args if a is not type(None)]
        if value is None or len(options) != 1:
            raise wrong
        return _check(options[0], value, field)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise wrong
        return tuple(_check(args[0], item, f"{field}.{i}") for i, item in enumerate(value))
    if annotation is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise wrong
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    if annotation is float and type(value) is int:
        return float(value)
    if annotation in (int, float, bool, str):
        if type(value) is annotation:
            return value
        raise wrong
    if isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise wrong


def _parse(annotation: Any, text: str, field: str) -> Any:
    """Text of the command line -> a value of the annotated type (unchecked against its range)."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = InputError(field, f"{text!r} is not {_describe_type(annotation)}", "give " + _describe_type(annotation))
    if origin is typing.Annotated:
        return _parse(args[0], text, field)
    if origin in (types.UnionType, typing.Union):
        if text.lower() in ("none", "null") and type(None) in args:
            return None
        return _parse(next(a for a in args if a is not type(None)), text, field)
    if origin is tuple:
        if isinstance(args[0], type) and issubclass(args[0], Node):
            raise InputError(field, "the shape of a list of nodes is set in code", f"set its numbers: {field}.0.NAME=")
        return tuple(_parse(args[0], part, field) for part in text.split(",") if part)
    if annotation is dict:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            raise wrong from None
        return value
    if origin is typing.Literal or annotation is str:
        return text
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    try:
        if annotation is int:
            number = float(text) if "e" in text.lower() else int(text)
            if number != int(number):
                raise wrong
            return int(number)
        if annotation is float:
            return float(text)
    except (ValueError, OverflowError):
        raise wrong from None
    raise InputError(field, "is a node, not a value", "set one of its fields: " + ", ".join(annotations_of(annotation)))


def _free_value(text: Any) -> Any:
    """A value for an untyped table (a source's args): JSON where it is JSON, else a list at commas, else text."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return tuple(text.split(",")) if "," in text else text


def _override(value: Any, annotation: Any, changes: Mapping, field: str) -> Any:
    """Rebuilds `value` with `changes`, a tree of dicts whose leaves are texts or values; once per node, bottom up."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _override(value, args[0], changes, field)
    if origin in (types.UnionType, typing.Union):
        return _override(value, next(a for a in args if a is not type(None)), changes, field)
    if annotation is dict:
        for key, change in changes.items():
            if not isinstance(change, _Leaf):
                raise InputError(f"{field}.{key}", "is a value, not a node", f"set {field}.{key}= itself")
        return {**value, **{key: _free_value(change.value) for key, change in changes.items()}}
    if origin is tuple:
        items = list(value)
        for key, change in changes.items():
            if not key.isdigit() or int(key) >= len(items):
                raise InputError(f"{field}.{key}" if field else key, f"no such item; there are {len(items)}",
                                 "count from 0")
            items[int(key)] = _leaf_or_node(items[int(key)], args[0], change, f"{field}.{key}")
        return tuple(items)
    if not isinstance(value, Node):
        raise InputError(field, f"has no fields, it is {_describe_type(annotation)}", f"set {field}= itself")
    hints = annotations_of(type(value))
    new = {}
    for key, change in changes.items():
        path = f"{field}.{key}" if field else key
        if key not in hints:
            raise InputError(path, "unknown key", nearest(key, list(hints)))
        new[key] = _leaf_or_node(getattr(value, key), hints[key], change, path)
    try:
        return dataclasses.replace(value, **new)
    except InputError as error:
        raise (error.within(field) if field else error) from None


class _Leaf:
    def __init__(self, value: Any):
        self.value = value


def _leaf_or_node(old: Any, annotation: Any, change: Any, path: str) -> Any:
    if isinstance(change, _Leaf):
        return _parse(annotation, change.value, path) if isinstance(change.value, str) else change.value
    return _override(old, annotation, change, path)


def override(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` with `{"optim.lr": 3e-4, "model.stages.0.repeats": "6"}` applied, all at once.

    Values are texts (parsed by the field's type) or already typed. Rules that span fields are checked after all changes.

    Raises:
      InputError: an unknown key (with the nearest known), a wrong type, a value out of range.
    """
    tree: dict = {}
    for path, value in changes.items():
        node, parts = tree, path.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if isinstance(node, _Leaf):
                raise InputError(path, "is set twice, as a value and as a node", "keep one of the two")
        if isinstance(node, dict) and isinstance(node.get(parts[-1]), dict):
            raise InputError(path, "is set twice, as a value and as a node", "keep one of the two")
        node[parts[-1]] = _Leaf(value)
    return _override(config, type(config), tree, "")


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """`["a.b=c", ...]` -> {"a.b": "c"}; a later one wins, as on any command line."""
    changes = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise InputError("--set", f"{assignment!r} is not KEY=VALUE", "write --set optim.lr=3e-4")
        changes[key.strip()] = value.strip()
    return changes


def to_json(value: Any) -> Any:
    """A node -> plain dicts, lists and scalars; mixers carry their class as `type`."""
    if isinstance(value, Node):
        data = {name: to_json(getattr(value, name)) for name in annotations_of(type(value))}
        return {"type": type(value).__name__, **data} if isinstance(value, MixerConfig) else data
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(annotation: Any, data: Any, kinds: Mapping[str, type], field: str = "") -> Any:
    """The inverse of `to_json`. `kinds` maps the names of mixer configs to their classes.

    Raises:
      InputError: a missing, unknown or ill-typed key.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return from_json(args[0], data, kinds, field)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return from_json(next(a for a in args if a is not type(None)), data, kinds, field)
    if origin is tuple:
        if not isinstance(data, list):
            raise InputError(field or "config", "is not a list", "repair the file or start afresh")
        return tuple(from_json(args[0], item, kinds, f"{field}.{i}") for i, item in enumerate(data))
    if not (isinstance(annotation, type) and issubclass(annotation, Node)):
        return data
    if not isinstance(data, dict):
        raise InputError(field or "config", "is not a table of fields", "repair the file or start afresh")
    data = dict(data)
    cls = annotation
    if issubclass(annotation, MixerConfig):
        name = data.pop("type", None)
        if name not in kinds:
            raise InputError(f"{field}.type", f"unknown mixer {name!r}", nearest(str(name), list(kinds)))
        cls = kinds[name]
    hints = annotations_of(cls)
    prefix = f"{field}." if field else ""
    for key in data:
        if key not in hints:
            raise InputError(prefix + key, "unknown key", nearest(key, list(hints)))
    for key in hints:
        if key not in data:
            raise InputError(prefix + key, "missing", "the file was written by another version")
    new = {key: from_json(hints[key], data[key], kinds, prefix + key) for key in data}
    try:
        return cls(**new)
    except InputError as error:
        raise (error.within(field) if field else error) from None


def flatten(config: Any) -> dict[str, Any]:
    """{"optim.lr": 0.001, ...}: every scalar by its path, as `--set` names it."""
    flat: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, list):
            items = [(str(i), item) for i, item in enumerate(value)]
        else:
            flat[path] = value
            return
        for key, item in items:
            walk(f"{path}.{key}" if path else key, item)

    walk("", to_json(config))
    return flat


def difference(config: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Paths whose values differ: path -> (in config, in other); None where one has no such path."""
    ours, theirs = flatten(config), flatten(other)
    paths = [p for p in ours if p not in theirs or ours[p] != theirs[p]] + [p for p in theirs if p not in ours]
    return {path: (ours.get(path), theirs.get(path)) for path in paths}
