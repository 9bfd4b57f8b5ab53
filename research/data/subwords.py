"""`sentencepiece` and `unigram`: byte-pair encoding (Sennrich et al. 2016) and the unigram model (Kudo 2018), both by
SentencePiece (Kudo and Richardson 2018).

Lossless, which SentencePiece's defaults are not: no normalisation, no collapsed or added white space, unknown
characters as bytes, and its own stand-in for the space (U+2581) kept apart from the space.
"""

import hashlib
import io
import pathlib
import re
from typing import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

from research.data.vocabulary import BOS, CHAT_MARKERS, EOS, MASK, PAD, SPECIALS, UNK, resize, save_model
from research.errors import InputError

SMALLEST = len(SPECIALS) + 256 + 1  # specials, bytes, and the stand-in for the space
_SPACE = "\u2581"  # SentencePiece's stand-in for the space inside pieces
_LONGEST = 1 << 20  # characters encoded at once; longer texts are cut after a newline where there is one
_OPTIONS = {
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "add_dummy_prefix": False, "byte_fallback": True, "split_digits": True, "character_coverage": 0.9999,
    "allow_whitespace_only_pieces": True, "max_sentence_length": 1 << 20,
    "pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "unk_id": UNK,
    "pad_piece": SPECIALS[PAD], "bos_piece": SPECIALS[BOS], "eos_piece": SPECIALS[EOS],
    "unk_piece": SPECIALS[UNK],
    # Deterministic with one thread, and hardly slower: the time goes to a part that has only one.
    "num_threads": 1, "hard_vocab_limit": False, "minloglevel": 2,
}


class SentencePieceTokenizer:
    """A trained vocabulary; see `tokenizer.Tokenizer` for the interface.

    Pieces keep runs of spaces and a line's end with what comes before it; digits stand alone; "<s>" in a text
    is three characters, never the special.
    """

    name = "sentencepiece"
    smallest = SMALLEST
    training_key = f"bpe {sentencepiece.__version__} {sorted(_OPTIONS.items())}"
    _model_type = "bpe"
    pad_id, bos_id, eos_id, unk_id, mask_id = PAD, BOS, EOS, UNK, MASK
    begins = (BOS,)

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        # Our own table: SentencePiece's decode drops and changes characters.
        self._pieces = [self._piece(i) for i in range(self.vocab_size)]
        self.token_bytes_V = np.array([len(piece) for piece in self._pieces], np.int32)
        byte_ids = {self._pieces[i]: i for i in range(self.vocab_size) if self._processor.is_byte(i)}
        self.chat_ids = {marker: i for marker in CHAT_MARKERS
                         if self._processor.is_control(i := self._processor.piece_to_id(marker))}
        self._space_ids = [byte_ids[bytes([byte])] for byte in _SPACE.encode("utf-8")]

    @classmethod
    def from_model(cls, model: bytes) -> "SentencePieceTokenizer":
        return cls(model)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, chat: bool = False) -> "SentencePieceTokenizer":
        """Trains on all of `texts`; the same texts give the same model, bit for bit. chat: with CHAT_MARKERS.

        Raises:
          InputError: the texts can't fill so large a vocabulary, or their characters are too many for it.
        """
        field, wanted = "data.tokenizer", f"a vocabulary of {vocab_size}"
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts), model_writer=model, vocab_size=vocab_size,
                model_type=cls._model_type,
                control_symbols=[SPECIALS[MASK], *(CHAT_MARKERS if chat else ())], **_OPTIONS)
        except RuntimeError as error:
            small = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error))
            if small:
                raise InputError(field, f"{wanted} is too small for the characters of the corpus",
                                 resize(int(small[1]), "more", cls.name)) from None
            if "sentences_.empty()" in str(error):
                raise InputError(field, "there is no text to train on", "give data.sources text") from None
            raise
        tokenizer = cls(model.getvalue())
        if tokenizer.vocab_size < vocab_size:
            raise InputError(field, f"{wanted} is larger than the corpus fills",
                             resize(tokenizer.vocab_size, "less", cls.name))
        return tokenizer

    def save(self, directory: str | pathlib.Path) -> None:
        save_model(directory, self.name, self.vocab_size, self.fingerprint(), self._model)

    def model_bytes(self) -> bytes:
        """SentencePiece's own file."""
        return self._model

    @staticmethod
    def fingerprint_of(model: bytes) -> str:
        return hashlib.sha256(b"sentencepiece" + model).hexdigest()

    def fingerprint(self) -> str:
        return self.fingerprint_of(self._model)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        flat, owners = [], []
        for number, text in enumerate(texts):
            for part in _parts(text):
                flat.append(part)
                owners.append(number)
        # SentencePiece encodes on its own threads, one a core (-1), outside Python: no processes to start.
        plain = [part for part in flat if part != _SPACE]
        encoded = iter(self._processor.encode(plain, out_type=int, num_threads=-1) if plain else ())
        pieces: list[list[np.ndarray]] = [[] for _ in texts]
        for part, owner in zip(flat, owners):
            pieces[owner].append(np.array(self._space_ids if part == _SPACE else next(encoded), np.int32))
        return [np.concatenate(found) if found else np.zeros(0, np.int32) for found in pieces]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._pieces[i] for i in np.asarray(ids, np.int64).tolist())

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def _piece(self, i: int) -> bytes:
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b""
        piece = self._processor.id_to_piece(i)
        if self._processor.is_byte(i):  # "<0x41>"
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(_SPACE, " ").encode("utf-8")


class UnigramTokenizer(SentencePieceTokenizer):
    """The same, with the unigram model: pieces by likelihood, not by merges."""

    name = "unigram"
    training_key = SentencePieceTokenizer.training_key.replace("bpe", "unigram", 1)
    _model_type = "unigram"


def _parts(text: str) -> Iterator[str]:
    """Cuts a text at each U+2581 (given as a part of its own) and where it is too long to encode at once."""
    for number, piece in enumerate(text.split(_SPACE)):
        if number:
            yield _SPACE
        start = 0
        while start < len(piece):
            stop = start + _LONGEST
            if stop < len(piece):
                stop = piece.rfind("\n", start, stop) + 1 or stop
            yield piece[start:stop]
            start = stop


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """A few lines at a time, with their ends. The trainer refuses tabs, NUL, its own marks: left to bytes."""
    for text in texts:
        for run in re.split("[\t\0\u2581\u2585]+", text):
            for start in range(0, len(run), 1 << 16):
                lines, size = [], 0
                for line in run[start : start + (1 << 16)].splitlines(keepends=True):
                    lines.append(line)
                    size += len(line)
                    if size > 4096:
                        yield "".join(lines)
                        lines, size = [], 0
                if lines:
                    yield "".join(lines)
