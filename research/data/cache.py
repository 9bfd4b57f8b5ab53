"""Documents tokenised once, as flat files: the ids of all in a row, where each starts, and their names.

They are tokenised in parts, each put in place whole, so that a job that was killed goes on where it was.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tempfile
from typing import Iterator

import numpy as np
from absl import logging
from tqdm import tqdm

from research.data import documents, storage
from research.data.documents import DocumentSource
from research.data.tokenizer import Tokenizer
from research.errors import InputError

SPLITS = ("train", "validation")
_FORMAT = "1"
_META = "meta.json"
_BATCH_CHARACTERS = 4_000_000  # of text in memory at once
_BATCH_DOCUMENTS = 4096
_PARTS = 512  # at most, in directories beside the cache until all are there
_PART_DOCUMENTS = 1024  # at least


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """One split. Document d is `<s>`, its tokens, `</s>`: tokens_T[offsets_D1[d] : offsets_D1[d + 1]].

    Attributes:
      tokens_T: uint16 (uint32 for vocabularies above 65536), mapped from disk.
      offsets_D1: int64, one more than there are documents.
      text_bytes: bytes of text in UTF-8.
      path: its directory.
    """

    tokens_T: np.ndarray
    offsets_D1: np.ndarray
    text_bytes: int
    path: pathlib.Path

    @functools.cached_property
    def document_ids(self) -> list[str]:
        return json.loads((self.path / "documents.json").read_text(encoding="utf-8"))


def token_cache(
    source: DocumentSource, tokenizer: Tokenizer, holdout: float, cache_dir: str, quiet: bool = False
) -> dict[str, TokenCache]:
    """{"train": ..., "validation": ...}, from disk, or made there first.

    The key is what decides the contents: source, tokenizer and `holdout` (documents.split). Files that don't
    match their digests are made anew. Two processes may do this at once; what one that was killed has finished of it is
    not done again.

    Raises:
      InputError: the source has no documents, or the directory can't be written.
    """
    key = documents.combine([_FORMAT, source.fingerprint(), tokenizer.fingerprint(), repr(float(holdout))])
    path = storage.cache_root(cache_dir) / f"tokens-{key[:24]}"
    if not _valid(path):
        if not len(source):
            raise InputError("data.sources", "there are no documents", "correct the source's arguments")
        try:
            _tokenise(source, tokenizer, holdout, path, quiet)
        except FileNotFoundError:
            if not _valid(path):  # else another process was first, and has cleared away the parts
                raise
    return {name: _open(path / name, _dtype(tokenizer)) for name in SPLITS}


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _tokenise(
    source: DocumentSource, tokenizer: Tokenizer, holdout: float, path: pathlib.Path, quiet: bool
) -> None:
    """Fills `path` from parts, of which those that are there are kept."""
    size = max(_PART_DOCUMENTS, -(-len(source) // _PARTS))
    bounds = [(begin, min(begin + size, len(source))) for begin in range(0, len(source), size)]
    parts = path.with_name(f"{path.name}-parts-{size}")
    parts.mkdir(exist_ok=True)
    try:
        with tqdm(total=len(source), desc="tokenising", unit="doc", disable=quiet or None, dynamic_ncols=True) as bar:
            for begin, end in bounds:
                part = parts / f"{begin:012d}"
                if _valid(part):
                    bar.update(end - begin)
                    continue
                with storage.building(part, _valid) as build:
                    _write_part(source, range(begin, end), tokenizer, holdout, build, bar)
        with storage.building(path, _valid) as build:
            counts = _join([parts / f"{begin:012d}" for begin, _ in bounds], build)
        discarded = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            os.rename(parts, discarded / "parts")  # in one step: others see all of the parts or none
        finally:
            shutil.rmtree(discarded, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            parts.rmdir()  # where nothing was finished
    logging.info("tokenised %d documents: %d tokens to train on, %d held out", len(source), *counts)


def _write_part(
    source: DocumentSource, chosen: range, tokenizer: Tokenizer, holdout: float, build: pathlib.Path, bar: tqdm
) -> None:
    """tokens.bin, lengths.bin (int64), documents.json and text_bytes.json of each split of some documents."""
    lengths: dict[str, list[int]] = {name: [] for name in SPLITS}
    names: dict[str, list[str]] = {name: [] for name in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    dtype = _dtype(tokenizer)
    with contextlib.ExitStack() as stack:
        files = {}
        for name in SPLITS:
            (build / name).mkdir()
            files[name] = stack.enter_context(open(build / name / "tokens.bin", "wb"))
        for batch in _batches(source, chosen):
            for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch])):
                side = documents.split(document.id, holdout)
                whole = np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id])).astype(dtype)
                files[side].write(whole.tobytes())
                lengths[side].append(len(whole))
                names[side].append(document.id)
                text_bytes[side] += len(document.text.encode("utf-8"))
            bar.update(len(batch))
    for name in SPLITS:
        np.array(lengths[name], "<i8").tofile(build / name / "lengths.bin")
        (build / name / "documents.json").write_text(json.dumps(names[name]), encoding="utf-8")
        (build / name / "text_bytes.json").write_text(json.dumps(text_bytes[name]), encoding="utf-8")
    _seal(build)


def _join(parts: list[pathlib.Path], build: pathlib.Path) -> list[int]:
    """Writes both splits of all parts into `build`; returns the tokens of each."""
    counts = []
    for name in SPLITS:
        (build / name).mkdir()
        lengths, names, text_bytes = [np.zeros(1, np.int64)], [], 0
        with open(build / name / "tokens.bin", "wb") as file:
            for part in parts:
                with open(part / name / "tokens.bin", "rb") as tokens:
                    shutil.copyfileobj(tokens, file, 1 << 22)
                lengths.append(np.fromfile(part / name / "lengths.bin", "<i8"))
                names += json.loads((part / name / "documents.json").read_text(encoding="utf-8"))
                text_bytes += json.loads((part / name / "text_bytes.json").read_text(encoding="utf-8"))
        offsets_D1 = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        offsets_D1.astype("<i8").tofile(build / name / "offsets.bin")
        (build / name / "documents.json").write_text(json.dumps(names), encoding="utf-8")
        (build / name / "text_bytes.json").write_text(json.dumps(text_bytes), encoding="utf-8")
        counts.append(int(offsets_D1[-1]))
    _seal(build)
    return counts


def _seal(build: pathlib.Path) -> None:
    """Writes the digests of all files; without them a directory isn't valid."""
    digests = {f"{name}/{file.name}": storage.file_digest(file)
               for name in SPLITS for file in sorted((build / name).iterdir())}
    (build / _META).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def _batches(source: DocumentSource, chosen: range) -> Iterator[list[documents.Document]]:
    batch, size = [], 0
    for i in chosen:
        batch.append(source.document(i))
        size += len(batch[-1].text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _valid(path: pathlib.Path) -> bool:
    try:
        digests = json.loads((path / _META).read_text(encoding="utf-8"))
        return all(storage.file_digest(path / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _open(path: pathlib.Path, dtype: np.dtype) -> TokenCache:
    offsets_D1 = np.fromfile(path / "offsets.bin", "<i8")
    # An empty file can't be mapped.
    tokens_T = np.memmap(path / "tokens.bin", dtype, mode="r").view(np.ndarray) if offsets_D1[-1] else np.zeros(0, dtype)
    text_bytes = json.loads((path / "text_bytes.json").read_text(encoding="utf-8"))
    return TokenCache(tokens_T, offsets_D1, text_bytes, path)
