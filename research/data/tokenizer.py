"""Text to ids and back, byte for byte: what a tokenizer is, the bytes one, the table, a run's copy."""

import hashlib
import json
import pathlib
from typing import Protocol, Sequence

import numpy as np

from research.config import nearest
from research.data.pretrained import HuggingFaceTokenizer, WordPieceTokenizer
from research.data.subwords import SentencePieceTokenizer, UnigramTokenizer
from research.data.vocabulary import BOS, DESCRIPTION, EOS, MASK, MODEL, PAD, SPECIALS, UNK, resize, save_model
from research.errors import InputError


class Tokenizer(Protocol):
    """Ids 0-4 are `SPECIALS` in every tokenizer of ours; `encode` never gives a special, whatever the text.

    Attributes:
      name: its row in `TOKENIZERS`.
      vocab_size: ids are in [0, vocab_size).
      token_bytes_V: int32; how many bytes of text each id stands for, 0 for the specials. Summed over an
        encoded text it is the text's length in UTF-8, which is what bits per byte divides by.
      begins: what stands before a prompt: bos_id, or nothing where the vocabulary's files say so (documents of the data
        begin with bos_id all the same).
      chat_ids: marker (vocabulary.CHAT_MARKERS) -> id, of those that the vocabulary has.
    """

    name: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    begins: tuple[int, ...]
    token_bytes_V: np.ndarray
    chat_ids: dict[str, int]

    def encode(self, text: str) -> np.ndarray:
        """int32 ids, without specials."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same for each text; on several cores where that helps."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes; specials give none."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text. Bytes that aren't UTF-8 (a character cut in two) become U+FFFD."""

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the ids."""

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes the two files of `load_tokenizer` into `directory`, made if needed."""


class BytesTokenizer:
    """One id a byte: id = byte + 5; a vocabulary of 261."""

    name = "bytes"
    vocab_size = len(SPECIALS) + 256
    pad_id, bos_id, eos_id, unk_id, mask_id = PAD, BOS, EOS, UNK, MASK
    begins = (BOS,)

    def __init__(self):
        self.chat_ids: dict[str, int] = {}
        self.token_bytes_V = np.repeat(np.array([0, 1], np.int32), [len(SPECIALS), 256])

    @classmethod
    def from_model(cls, model: bytes) -> "BytesTokenizer":
        return cls()

    def save(self, directory: str | pathlib.Path) -> None:
        save_model(directory, self.name, self.vocab_size, self.fingerprint(), b"")

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(SPECIALS)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        ids_T = np.asarray(ids, np.int64)
        return (ids_T[ids_T >= len(SPECIALS)] - len(SPECIALS)).astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @staticmethod
    def fingerprint_of(model: bytes) -> str:
        return hashlib.sha256(b"bytes").hexdigest()

    def fingerprint(self) -> str:
        return self.fingerprint_of(b"")


TOKENIZERS: dict[str, type] = {
    "bytes": BytesTokenizer,
    "sentencepiece": SentencePieceTokenizer,
    "unigram": UnigramTokenizer,
    "wordpiece": WordPieceTokenizer,
    "huggingface": HuggingFaceTokenizer,
}


def directory_of(spec: str) -> pathlib.Path | None:
    """The directory that `data.tokenizer` names; None for the name of a kind ("bytes", "sentencepiece:4096").

    Raises:
      InputError: it looks like a path, but there is no such directory.
    """
    path = pathlib.Path(spec).expanduser()
    if spec in TOKENIZERS or not (path.is_dir() or "/" in spec or spec.startswith((".", "~"))):
        return None
    if not path.is_dir():
        raise InputError("data.tokenizer", f"there is no directory {spec!r}",
                         "correct the path, or train one: python -m tools.train_tokenizer")
    return path


def parse_spec(spec: str, vocab_size: int) -> tuple[str, int]:
    """"sentencepiece:4096" -> ("sentencepiece", 4096); without a size it is that of the model, `vocab_size`.

    Raises:
      InputError: an unknown name, a size that isn't a number or is too small.
    """
    name, colon, size = spec.partition(":")
    if name not in TOKENIZERS:
        raise InputError("data.tokenizer", f"unknown tokenizer {name!r}", nearest(name, list(TOKENIZERS)))
    if name == BytesTokenizer.name:
        if colon:
            raise InputError("data.tokenizer", f"{spec!r}: bytes has a fixed vocabulary", "write bytes")
        return name, BytesTokenizer.vocab_size
    if name == HuggingFaceTokenizer.name:
        raise InputError("data.tokenizer", f"{spec!r} names no vocabulary",
                         "give the directory that holds its tokenizer.json")
    if colon and not (size.isascii() and size.isdigit()):
        raise InputError("data.tokenizer", f"{size!r} is no vocabulary size", f"write {name} or {name}:4096")
    wanted = int(size) if colon else vocab_size
    smallest = TOKENIZERS[name].smallest
    if wanted < smallest:
        raise InputError("data.tokenizer", f"a vocabulary of {wanted} can't hold every byte and the specials",
                         resize(smallest, "more", name))
    return name, wanted


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """The inverse of a tokenizer's `save`; a directory of Hugging Face's (its tokenizer.json is another) loads too.

    Raises:
      InputError: the files are missing, or aren't those that were saved together; `tokenizers` is needed and isn't
        installed.
    """
    directory = pathlib.Path(directory)
    broken = InputError("tokenizer", f"{directory} doesn't hold a whole tokenizer",
                        f"give a directory with {DESCRIPTION} and {MODEL} of one run")
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        if isinstance(description, dict) and isinstance(description.get("model"), dict):
            return HuggingFaceTokenizer.from_directory(directory)
        name, fingerprint = description["name"], description["fingerprint"]
        model = (directory / MODEL).read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        raise broken from None
    if name not in TOKENIZERS:
        raise broken
    # Before the model is parsed: a cut one can bring the parser down.
    if TOKENIZERS[name].fingerprint_of(model) != fingerprint:
        raise broken
    return TOKENIZERS[name].from_model(model)
