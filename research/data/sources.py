"""The one table of sources. A new source is its file and one row here; the tests' battery then covers it."""

import dataclasses
import typing
from typing import Any, Mapping

from research.config import annotations_of, nearest
from research.data.arrayrecord import ArrayRecord
from research.data.documents import DocumentSource
from research.data.files import DEFAULT_CACHE
from research.data.huggingface import HuggingFace
from research.data.jsonl import JsonLines
from research.data.parquet import Parquet
from research.data.sourcecode import SourceCode
from research.data.synthetic import Synthetic
from research.data.text import Text
from research.data.tfds import TensorFlowDatasets
from research.errors import InputError

SOURCES: dict[str, type] = {
    "sourcecode": SourceCode,
    "text": Text,
    "jsonl": JsonLines,
    "parquet": Parquet,
    "arrayrecord": ArrayRecord,
    "tfds": TensorFlowDatasets,
    "huggingface": HuggingFace,
    "synthetic": Synthetic,
}


def make_source(name: str, args: Mapping[str, Any], cache_dir: str = DEFAULT_CACHE) -> DocumentSource:
    """The source of that name; its arguments are the fields of its class. One text serves for a list.

    `cache_dir` is where remote and packed files are copied to, for sources that have them.

    Raises:
      InputError: an unknown name or argument, a missing one, a value of the wrong type; the field is relative
        to the source's config node.
    """
    if name not in SOURCES:
        raise InputError("name", f"unknown source {name!r}", nearest(name, list(SOURCES)))
    hints = annotations_of(SOURCES[name])
    values = dict(args)
    for key, value in values.items():
        if key not in hints:
            raise InputError(f"args.{key}", f"unknown argument of {name}", nearest(key, list(hints)))
        if isinstance(value, str) and typing.get_origin(hints[key]) is tuple:
            values[key] = (value,)
        elif hints[key] in (str, str | None) and isinstance(value, tuple) and all(isinstance(v, str) for v in value):
            values[key] = ",".join(value)  # a text with commas, cut at them on the command line
    for field in dataclasses.fields(SOURCES[name]):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise InputError(f"args.{field.name}", f"missing; {name} has no default for it", "give a value")
    if "cache_dir" in hints:
        values = {"cache_dir": cache_dir, **values}
    try:
        return SOURCES[name](**values)
    except InputError as error:
        raise error.within("args") from None
