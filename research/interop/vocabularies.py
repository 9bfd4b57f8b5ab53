"""Tokenizers that come in files other than tokenizer.json, as the tokenizer.json that gives the same ids; ours on export.

SentencePiece's BPE joins the two neighbours whose piece has the best score; the `tokenizers` library, those that come first in
a list of pairs: here all splits of all pieces, by score. Its unigram model breaks ties otherwise than SentencePiece does (3 of
40 modules of the standard library had other ids), so such a vocabulary is not converted.
"""

import json
import pathlib
from typing import Any

from absl import logging
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from research.data.pretrained import KEPT, HuggingFaceTokenizer, Refusals, read_file, token_content, tokenizers_library
from research.data.subwords import SentencePieceTokenizer
from research.data.tokenizer import Tokenizer, load_tokenizer
from research.errors import InputError
from research.interop.safetensors_files import inside
from research.schema import TOKENIZER

SENTENCEPIECE, MERGES = "tokenizer.model", ("vocab.json", "merges.txt")
TOKENIZER_FILES = ("tokenizer.json", *KEPT, SENTENCEPIECE, *MERGES, "added_tokens.json")
_SPACE = "\u2581"  # SentencePiece's stand-in for the space
_BPE = 2  # model_type
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # a piece's type
_PROBE = " two  words\n\n\tif x_1:  # \u00e9\u4f60\U0001f600\u2581<s> 2024 \r\n"


def import_tokenizer(directory: pathlib.Path, model_type: str) -> HuggingFaceTokenizer | None:
    """None where there is none, or none that can be read exactly: a warning says why.

    Raises:
      InputError: a file of it leads out of the directory, or can't be read.
    """
    found = [name for name in TOKENIZER_FILES if (directory / name).exists() or (directory / name).is_symlink()]
    for name in found:
        inside(directory, name)
    if TOKENIZER_FILES[0] in found:
        return HuggingFaceTokenizer.from_directory(directory)
    if SENTENCEPIECE not in found and not set(MERGES) <= set(found):
        logging.warning("%s has no %s: the run can be given token ids, but no text", directory, TOKENIZER_FILES[0])
        return None
    config = read_file(directory / KEPT[1]) if KEPT[1] in found else {}
    added = read_file(directory / "added_tokens.json") if "added_tokens.json" in found else {}
    try:
        data, special = _of_sentencepiece(directory, config) if SENTENCEPIECE in found else _of_merges(
            directory, config, model_type)
        size = len(data["model"]["vocab"])
        if added or ("added_tokens_decoder" in config and not _within(config["added_tokens_decoder"], size)):
            raise _Inexact("tokens beside its vocabulary")
    except _Inexact as error:
        logging.warning("the tokenizer of %s has %s, which isn't converted: the run can be given token ids, but no text; "
                        "save it as tokenizer.json (transformers' save_pretrained)", directory, error)
        return None
    config = special | config | {"tokenizer_class": "PreTrainedTokenizerFast"}  # others would make it anew, by their own rules
    return HuggingFaceTokenizer.from_directory(directory, {TOKENIZER_FILES[0]: data, KEPT[1]: config})


def export_tokenizer(directory: pathlib.Path, output: pathlib.Path) -> Tokenizer | None:
    """Writes a run's tokenizer as transformers' AutoTokenizer reads it, where that gives the same ids; returns it."""
    if not (directory / TOKENIZER).exists():
        return None
    tokenizer = load_tokenizer(directory / TOKENIZER)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.export(output)
        return tokenizer
    data = _of_ours(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else None
    if data is not None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
                  "unk_token": "<unk>", "mask_token": "<mask>", "clean_up_tokenization_spaces": False,
                  "split_special_tokens": True}  # "<s>" in a text is text
        for name, content in ((TOKENIZER_FILES[0], data), (KEPT[1], config)):
            (output / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return tokenizer
    tokenizer.save(output / TOKENIZER)
    logging.warning("the run's tokenizer (%s) has no tokenizer.json that gives the same ids; its own files are in %s",
                    tokenizer.name, output / TOKENIZER)
    return tokenizer


class _Inexact(Exception):
    """Says what a vocabulary has that its conversion hasn't."""


def _within(added: Any, size: int) -> bool:
    return isinstance(added, dict) and set(added) <= set(map(str, range(size)))


def _of_merges(directory: pathlib.Path, config: dict[str, Any], model_type: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(tokenizer.json, the roles' tokens by default), of GPT-2's byte-level BPE (Radford et al. 2019).

    Others have such files, too, but cut a text into words otherwise.
    """
    kind = config["tokenizer_class"] if "tokenizer_class" in config else {"gpt2": "GPT2Tokenizer"}.get(model_type)
    if kind not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        raise _Inexact(f"{' and '.join(MERGES)} of {kind or 'an unnamed class'}")
    library = tokenizers_library()
    names = [str(directory / name) for name in MERGES]
    with Refusals(f"{directory}/{MERGES[0]}"):
        tokenizer = library.Tokenizer(library.models.BPE.from_file(*names, fuse_unk=False))
        prefix = "add_prefix_space" in config and config["add_prefix_space"] is True
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = library.decoders.ByteLevel()
        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        said = [value for value in (roles | {"pad_token": None} | config).items() if value[0] in (*roles, "pad_token")]
        special = {token_content(name, value) for name, value in said if value is not None}
        if any(tokenizer.token_to_id(token) is None for token in special):
            raise _Inexact("tokens beside its vocabulary")
        tokenizer.add_special_tokens(sorted(special))
        return json.loads(tokenizer.to_str()), roles


def _of_sentencepiece(directory: pathlib.Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The same, of Llama's tokenizer.model. Raises _Inexact: of another kind of normalisation."""
    path = directory / SENTENCEPIECE
    broken = InputError("data.tokenizer", f"{path} is no SentencePiece model", "download it again")
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except (DecodeError, OSError):
        raise broken from None
    if not any(piece.type == _CONTROL for piece in proto.pieces) or not any(piece.type == _NORMAL for piece in proto.pieces):
        raise broken
    denied = {name for name, value in config.items() if value is False}
    with Refusals(str(path)):
        data = _converted(proto, _SPACE, proto.normalizer_spec.add_dummy_prefix and "add_prefix_space" not in denied,
                          begins="add_bos_token" not in denied)
    special = {piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return data, {role: token for role, token in roles.items() if token in special}


def _of_ours(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """None where the library is missing, or gives other ids."""
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes())
        data = _converted(proto, " ", prefix=False, begins=True)
    except (InputError, _Inexact):
        return None
    theirs = tokenizers_library().Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    texts = [_PROBE, pathlib.Path(__file__).read_text(encoding="utf-8"), "".join(pieces), "".join(pieces[::-1]), *pieces]
    same = all(found.ids == ours.tolist() for found, ours in zip(
        theirs.encode_batch(texts, add_special_tokens=False), tokenizer.encode_batch(texts), strict=True))
    return data if same else None


def _converted(proto: Any, space: str, prefix: bool, begins: bool) -> dict[str, Any]:
    """A tokenizer.json. `space`: what stands for it in the pieces: with " " itself, U+2581 in a text is no space but its bytes.

    `prefix`: a space is put before every text. `begins`: the first control piece that is called so begins a text.

    Raises:
      _Inexact: the model does what the library doesn't.
    """
    library, normalizer, trainer = tokenizers_library(), proto.normalizer_spec, proto.trainer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise _Inexact(f"the normalisation {normalizer.name}")
    if trainer.treat_whitespace_as_suffix or trainer.model_type != _BPE:
        raise _Inexact("pieces of another kind than BPE's")
    if kinds := {piece.type for piece in proto.pieces} - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        raise _Inexact(f"pieces of the types {sorted(kinds)}")
    pieces = [piece.piece.replace(_SPACE, space) if piece.type == _NORMAL else piece.piece for piece in proto.pieces]
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), None)
    bytes_too = any(piece.type == _BYTE for piece in proto.pieces)
    if unknown is None or len(set(pieces)) < len(pieces):
        raise _Inexact("no unknown piece, or one piece twice")
    tokenizer = library.Tokenizer(library.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=_merges(proto, pieces), unk_token=pieces[unknown],
        fuse_unk=True, byte_fallback=bytes_too))
    normalizers, decoders = library.normalizers, library.decoders
    steps = [*([normalizers.Prepend(space)] if prefix else []),
             *([normalizers.Replace(" ", space)] if space != " " else [])]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([
        *([decoders.Replace(space, " ")] if space != " " else []), decoders.ByteFallback(), decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    tokenizer.add_special_tokens([
        library.AddedToken(piece, normalized=False, special=True)
        for piece, entry in zip(pieces, proto.pieces) if entry.type in (_UNKNOWN, _CONTROL)])
    if begins and tokenizer.token_to_id("<s>") is not None:
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return json.loads(tokenizer.to_str())


def _merges(proto: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """Best score first; of one piece, by the ids of its halves."""
    ids = {pieces[i]: i for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    splits = [(-proto.pieces[i].score, i, ids[piece[:at]], ids[piece[at:]]) for piece, i in ids.items()
              for at in range(1, len(piece)) if piece[:at] in ids and piece[at:] in ids]
    if any(c not in ids for piece in ids for c in piece):
        raise _Inexact("pieces of characters that are no pieces")
    return [(pieces[left], pieces[right]) for _, _, left, right in sorted(splits)]
