"""Tokenizers of the `tokenizers` library (extra `hf`): a directory with a tokenizer.json, and WordPiece to train.

WordPiece (Schuster and Nakajima 2012; Devlin et al. 2018) here works on bytes, so that it is lossless: words are
written in GPT-2's byte alphabet (Radford et al. 2019), every byte is a piece, at a word's start and inside it.
"""

import hashlib
import json
import pathlib
import re
from typing import Any, Iterable, Mapping, Sequence

import numpy as np
from absl import logging

from research.data.vocabulary import CHAT_MARKERS, MASK, SPECIALS, resize, save_model
from research.errors import InputError

_INSIDE = "\u203f"  # begins a piece inside a word; isn't in the byte alphabet, as "##" is
_LONGEST_WORD = 64  # characters; matching is quadratic in it
_SPACE = "\u2581"  # the Metaspace's stand-in for the space
_PROBE = " two  words\n\n\tif x_1:  # \u00e9\u4f60\U0001f600"
# Where a directory doesn't say which tokens begin and end a document, these are looked for, in turn.
_GUESSES = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]"), "unk": ("<unk>", "[UNK]"), "mask": ("<mask>", "[MASK]"),
}
_STAND_INS = {"bos": "cls", "eos": "sep"}  # BERT's names
_TOKENIZER, _CONFIG, _SPECIALS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
KEPT = (_SPECIALS, _CONFIG, "chat_template.jinja")  # files beside tokenizer.json that go with it wherever it goes
_MOST_BYTES = 100_000_000  # of one file; the largest published ones have a third
_LARGEST_ID = 1 << 24


class HuggingFaceTokenizer:
    """See `tokenizer.Tokenizer`. The specials have the ids that the vocabulary gives them, not 0 to 4.

    Lossless where the vocabulary is (byte-level BPE is; one that normalises or drops spaces is not: bits per byte and
    `decode_bytes` are approximate then, and a warning says so). `mask_id` is -1 where there is no mask.
    """

    name = "huggingface"

    def __init__(self, model: bytes):
        data = json.loads(model)
        self._model = model
        self._tokenizer = tokenizers_library().Tokenizer.from_str(json.dumps(data["tokenizer"]))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<s>" in a text is text
        self._roles, self._files = data["roles"], data["files"] if "files" in data else {}
        roles = _filled(self._roles)
        self.pad_id, self.bos_id, self.eos_id = roles["pad"], roles["bos"], roles["eos"]
        self.unk_id, self.mask_id = roles["unk"], roles["mask"]
        config = self._files[_CONFIG] if _CONFIG in self._files else {}
        denied = "add_bos_token" in config and config["add_bos_token"] is False
        self.begins = (self.bos_id,) if "bos" in self._roles and not denied else ()
        self.chat_ids = {marker: token for marker in CHAT_MARKERS
                         if (token := self._tokenizer.token_to_id(marker)) is not None}
        # As the library writes it, every field is there, whatever the file left out.
        self._pieces = _pieces(self._tokenizer, json.loads(self._tokenizer.to_str()))
        self.vocab_size = len(self._pieces)
        self.token_bytes_V = np.array([len(piece) for piece in self._pieces], np.int32)
        self.lossless = self.decode_bytes(self.encode(_PROBE)) == _PROBE.encode("utf-8")
        if not self.lossless:
            logging.warning("this tokenizer changes the text (case, spaces or rare characters): "
                            "bits per byte is approximate")

    @classmethod
    def from_model(cls, model: bytes) -> "HuggingFaceTokenizer":
        return cls(model)

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path, made: Mapping[str, Any] | None = None) -> "HuggingFaceTokenizer":
        """Reads tokenizer.json and, for the roles of tokens, tokenizer_config.json and special_tokens_map.json.

        `made`: what some of these files would hold, where that was made of other files.

        Raises:
          InputError: a file can't be read, or nothing says how a document begins and ends.
        """
        directory = pathlib.Path(directory)
        found = [name for name in KEPT if (directory / name).exists()]
        files = {name: read_file(directory / name) for name in (*found, *([] if made else [_TOKENIZER]))} | (made or {})
        data = files.pop(_TOKENIZER)
        if _CONFIG in files:
            files[_CONFIG].pop("auto_map", None)  # names Python files of theirs, which never come along
        with Refusals(f"{directory}/{_TOKENIZER}"):
            _check_merges(data)
            tokenizer = tokenizers_library().Tokenizer.from_str(json.dumps(data))
            return cls(_bundle(data, _roles(tokenizer, files, directory), files))

    def save(self, directory: str | pathlib.Path) -> None:
        save_model(directory, self.name, self.vocab_size, self.fingerprint(), self._model)

    def export(self, directory: str | pathlib.Path) -> None:
        """Writes tokenizer.json and what was beside it, as transformers' AutoTokenizer reads them."""
        roles = {f"{role}_token": self._tokenizer.id_to_token(i) for role, i in self._roles.items() if i >= 0}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
        for name, content in {_TOKENIZER: json.loads(self._model)["tokenizer"], _CONFIG: config, **self._files}.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            pathlib.Path(directory, name).write_text(text, encoding="utf-8")

    def special_ids(self) -> dict[str, int]:
        """As config.json says them; of roles that the vocabulary has."""
        return {f"{role}_token_id": self._roles[role] for role in ("bos", "eos", "pad") if role in self._roles}

    @staticmethod
    def fingerprint_of(model: bytes) -> str:
        return hashlib.sha256(b"tokenizers" + model).hexdigest()

    def fingerprint(self) -> str:
        return self.fingerprint_of(self._model)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # On the library's own threads, one a core.
        return [np.array(found.ids, np.int32)
                for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._pieces[i] for i in np.asarray(ids, np.int64).tolist())

    def decode(self, ids: Sequence[int]) -> str:
        if not self.lossless:
            return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class WordPieceTokenizer(HuggingFaceTokenizer):
    """A trained WordPiece vocabulary; specials are 0 to 4."""

    name = "wordpiece"
    smallest = len(SPECIALS) + 2 * 256
    training_key = f"wordpiece 1 {_LONGEST_WORD}"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, chat: bool = False) -> "WordPieceTokenizer":
        """Trains on all of `texts`; the same texts give the same model.

        Raises:
          InputError: no text, or too little for so large a vocabulary; `tokenizers` isn't installed.
        """
        from_library = tokenizers_library()
        models, trainers = from_library.models, from_library.trainers
        specials = [*SPECIALS, *(CHAT_MARKERS if chat else ())]
        alphabet = sorted(_BYTE_OF)
        # Pieces inside a word are given first, as specials: the trainer numbers what it finds itself in a hash's order,
        # and breaks ties by number.
        first = [*specials, *alphabet, *(_INSIDE + c for c in alphabet)]
        tokenizer = from_library.Tokenizer(models.WordPiece(unk_token=SPECIALS[3], continuing_subword_prefix=_INSIDE))
        tokenizer.pre_tokenizer = _splitter(from_library)
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, min_frequency=2, special_tokens=first, initial_alphabet=alphabet,
            continuing_subword_prefix=_INSIDE, show_progress=False)
        read = _Counted(texts)
        tokenizer.train_from_iterator(read, trainer)
        if not read.characters:
            raise InputError("data.tokenizer", "there is no text to train on", "give data.sources text")
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if len(vocabulary) < vocab_size:
            raise InputError("data.tokenizer", f"a vocabulary of {vocab_size} is larger than the corpus fills",
                             resize(len(vocabulary), "less", cls.name))
        whole = from_library.Tokenizer(models.WordPiece(
            vocab=vocabulary, unk_token=SPECIALS[3], max_input_chars_per_word=_LONGEST_WORD,
            continuing_subword_prefix=_INSIDE))
        whole.pre_tokenizer = _splitter(from_library)
        whole.add_special_tokens(specials)
        roles = dict(zip(("pad", "bos", "eos", "unk", "mask"), range(MASK + 1)))
        return cls(_bundle(json.loads(whole.to_str()), roles))


class Refusals:
    """The library raises bare Exceptions for a file that it can't read, or panics; those, not subclasses, become ours."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            raise InputError("data.tokenizer", f"{self._name} can't be read ({error})", "save it again") from None


class _Counted:
    """Passes texts on and counts their characters."""

    def __init__(self, texts: Iterable[str]):
        self._texts, self.characters = iter(texts), 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.characters += len(text)
        return text


def tokenizers_library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError("data.tokenizer", "needs the package tokenizers", 'pip install "rung[hf]"') from None
    return tokenizers


def _splitter(library: Any) -> Any:
    split = library.pre_tokenizers
    return split.Sequence([split.ByteLevel(add_prefix_space=False, use_regex=True),
                           split.Split(library.Regex(r"[\s\S]{1,%d}" % _LONGEST_WORD), "isolated")])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: those that print stand for themselves, the others follow from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _pieces(tokenizer: Any, data: Mapping[str, Any]) -> list[bytes]:
    """The bytes of text that each id stands for; specials none."""
    model = data["model"]
    added = {token["id"]: token for token in data["added_tokens"]}
    kinds = set(re.findall(r'"type": ?"(\w+)"', json.dumps([data["pre_tokenizer"], data["decoder"]])))
    inside = model["continuing_subword_prefix"] if model["type"] == "WordPiece" else None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary or max(vocabulary.values()) > _LARGEST_ID:
        raise InputError("data.tokenizer", f"has no pieces, or ids above {_LARGEST_ID}", "save the tokenizer again")
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        if i in added:
            pieces[i] = b"" if added[i]["special"] else piece.encode("utf-8")
            continue
        if inside:
            piece = piece.removeprefix(inside)
        if "ByteLevel" in kinds and all(c in _BYTE_OF for c in piece):
            pieces[i] = bytes(_BYTE_OF[c] for c in piece)
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            pieces[i] = bytes([int(piece[3:-1], 16)])
        else:
            pieces[i] = piece.replace(_SPACE, " ").encode("utf-8")
    return pieces


def _roles(tokenizer: Any, files: Mapping[str, Any], directory: pathlib.Path) -> dict[str, int]:
    """Ids of the roles that there are: as the files say; by a guess where they say nothing, not where they say null."""
    said: dict[str, Any] = {}
    nulls: set[str] = set()
    for name in (_SPECIALS, _CONFIG):
        if name in files:
            said |= {key: value for key, value in files[name].items() if value is not None}
            nulls |= {key for key, value in files[name].items() if value is None}
    roles: dict[str, int] = {}
    for role, guesses in _GUESSES.items():
        keys = [f"{role}_token", *([f"{_STAND_INS[role]}_token"] if role in _STAND_INS else [])]
        names = [token_content(key, said[key]) for key in keys if key in said]
        # Whatever they say, our data needs an end.
        for name in (*names, *(guesses if role == "eos" or keys[0] not in nulls else ())):
            if (token := tokenizer.token_to_id(name)) is not None:
                roles[role] = token
                break
    if "bos" not in roles and "eos" not in roles:
        raise InputError("data.tokenizer", f"nothing in {directory} says which token ends a document",
                         'give "eos_token" in its tokenizer_config.json')
    return roles


def _check_merges(data: Mapping[str, Any]) -> None:
    """The library ends the whole process at a merge whose second half lacks the prefix that the model says it has."""
    model = data["model"] if "model" in data and isinstance(data["model"], dict) else {}
    prefix, merges = (model[name] if name in model else None for name in ("continuing_subword_prefix", "merges"))
    if isinstance(prefix, str) and prefix and isinstance(merges, list):
        halves = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        seconds = [pair[-1] if isinstance(pair, list) and pair else None for pair in halves]
        if not prefix.isascii() or not all(isinstance(second, str) and second.startswith(prefix) for second in seconds):
            raise InputError("data.tokenizer", f"has merges without its continuing_subword_prefix {prefix!r}", "save it again")


def token_content(key: str, value: Any) -> str:
    name = value["content"] if isinstance(value, dict) and "content" in value else value
    if not isinstance(name, str):
        raise InputError("data.tokenizer", f"{key} is {value!r}, which is no token", "save the tokenizer again")
    return name


def _filled(roles: Mapping[str, int]) -> dict[str, int]:
    """With a stand-in for every role that the vocabulary doesn't have; but for the mask, none."""
    filled = {"mask": -1, **roles}
    for role, other in (("bos", "eos"), ("eos", "bos"), ("pad", "eos"), ("unk", "pad")):
        if role not in filled:
            filled[role] = filled[other]
    return filled


def _bundle(data: Mapping[str, Any], roles: Mapping[str, int], files: Mapping[str, Any] | None = None) -> bytes:
    return json.dumps({"roles": roles, "tokenizer": data} | ({"files": files} if files else {}), sort_keys=True).encode("utf-8")


def read_file(path: pathlib.Path) -> Any:
    """A table, or the text of what isn't JSON."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return text
        data = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair can be read, but not written
        if not isinstance(data, dict):
            raise ValueError("no table")
    except (OSError, ValueError, RecursionError):
        raise InputError("data.tokenizer", f"{path} can't be read", "save the tokenizer again") from None
    return data
