"""What every source gives: documents with names, a fingerprint of all, and the rule that holds some out."""

import dataclasses
import hashlib
from typing import Iterable, Protocol, Sequence

from tqdm import tqdm

_PROGRESS_AFTER = 2.0  # seconds; a source that is read sooner shows none


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its name. The name never holds an absolute path, so it means the same on every machine."""

    id: str
    text: str


class DocumentSource(Protocol):
    """Documents by index, in the order of their names. Pure: same arguments and files, same documents."""

    def __len__(self) -> int: ...

    def document_id(self, index: int) -> str:
        """The name alone, without reading the text."""

    def document(self, index: int) -> Document: ...

    def fingerprint(self) -> str:
        """sha256 (hex) over names and contents; independent of absolute paths and times of change."""


def split(document_id: str, holdout: float) -> str:
    """"validation" for the share `holdout` (in [0, 1)) of names with the smallest sha256, else "train".

    It depends on the name alone, so a document stays on its side for as long as it keeps its name, whatever becomes of
    others and of its text. Names of files are relative to the directory that all have in common (files.find_files) and
    rows have numbers: a file from outside that directory renames every document, a row or line put in before others
    renames those, and the sides of what was renamed are drawn anew.
    """
    head = int.from_bytes(hashlib.sha256(document_id.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return "validation" if head < int(holdout * 2**64) else "train"


def subset_key(document_id: str) -> bytes:
    """Sort by this for an evenly spread subset. Salted: unsalted, a small subset would be all validation."""
    return hashlib.sha256(b"subset:" + document_id.encode("utf-8", "surrogateescape")).digest()


def reading(unit: str, items: Sequence | None = None) -> tqdm:
    """The bar of a source's first look at its `items`, or at what is counted by hand; shown on a terminal, if it takes long."""
    return tqdm(items, "reading", unit=unit, delay=_PROGRESS_AFTER, disable=None, dynamic_ncols=True)


def combine(parts: Iterable[str]) -> str:
    """sha256 (hex) of a list of texts; lengths are hashed too, so that no two lists collide by joining."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
