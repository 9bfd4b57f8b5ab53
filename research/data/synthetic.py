"""The `synthetic` source: text from a seed, without any file; what a model should reach on it is known."""

import dataclasses
import functools
from typing import Literal

import numpy as np

from research.config import Natural, Node, Positive
from research.data import order
from research.data.documents import Document, combine
from research.errors import InputError

ALPHABET = "abcdefghijklmno "
MARKOV_BITS = 1.75  # entropy of one markov character given the last: probabilities 1/2, 1/4, 1/8, 1/8
# A uniform nibble chooses one of four successors with those probabilities.
_CHOICE = (0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3)


@dataclasses.dataclass(frozen=True)
class Synthetic(Node):
    """`documents` texts of `length` characters each, pure functions of (kind, seed, length, index).

    Attributes:
      documents: how many.
      length: characters in each (at least 3 for "copy").
      kind: "markov": an order-1 chain over 16 characters, the loss that can be reached is MARKOV_BITS a
        character; "copy": random letters, "=", the same letters again (padded with " " where the length is
        even).
      seed: of the chain and of the texts.
    """

    documents: Positive = 1000
    length: Positive = 256
    kind: Literal["markov", "copy"] = "markov"
    seed: Natural = 0

    def validate(self):
        if self.kind == "copy" and self.length < 3:
            raise InputError("length", f"{self.length} is too short to copy", "give at least 3")

    def __len__(self) -> int:
        return self.documents

    def document_id(self, index: int) -> str:
        return f"{self.kind}/{range(self.documents)[index]:09d}"

    def document(self, index: int) -> Document:
        name = self.document_id(index)
        nibbles = _nibbles(self.length, "synthetic", self.seed, name)
        if self.kind == "copy":
            half = "".join(ALPHABET[n] for n in nibbles[: (self.length - 1) // 2] % 15)
            return Document(name, f"{half}={half}".ljust(self.length))
        text, state = [], int(nibbles[-1])
        for nibble in nibbles.tolist():
            state = self._successors[state][_CHOICE[nibble]]
            text.append(ALPHABET[state])
        return Document(name, "".join(text))

    @functools.cached_property
    def _successors(self) -> list[list[int]]:
        """The four characters that may follow each, the most likely first."""
        return [order.permutation(16, "chain", self.seed, state)[:4].tolist() for state in range(16)]

    def fingerprint(self) -> str:
        return combine(["synthetic-1", str(self.documents), str(self.length), self.kind, str(self.seed)])


def _nibbles(count: int, *key: str | int) -> np.ndarray:
    """`count` uniform integers in [0, 16)."""
    words = order.bits(count // 16 + 1, *key)
    nibbles = words[:, None] >> np.arange(0, 64, 4, dtype=np.uint64) & np.uint64(15)
    return nibbles.reshape(-1)[:count].astype(np.int64)
