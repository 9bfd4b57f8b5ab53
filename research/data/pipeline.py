"""From a data config to rows: sources, tokenizer, cache, packing, in one call."""

import dataclasses
import pathlib
from typing import Iterator, Sequence

from absl import logging
from tqdm import tqdm

from research.data import documents, storage, subwords
from research.data.cache import TokenCache, token_cache
from research.data.documents import DocumentSource
from research.data.packing import Rows, SpreadRows, make_rows
from research.data.sources import make_source
from research.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer, parse_spec
from research.errors import InputError
from research.schema import DataConfig, Source

TOKENIZER_SAMPLE_BYTES = 12_000_000  # of text that a vocabulary is trained on
_VALIDATION_SEED = 0  # of the order of held-out documents: the same set in every run


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run reads.

    Attributes:
      tokenizer: of all sources.
      train: rows of each source; `weights` are their shares (loader.Loader takes both).
      validation: name of the set -> at most `max_rows` rows, evenly spread over it.
      corpus_hash: sha256 (hex) over the contents of the training sources, held-out documents included.
      train_tokens, train_bytes: of one pass over the training documents; tokens count <s> and </s>, bytes are
        of text.
    """

    tokenizer: Tokenizer
    train: tuple[Rows, ...]
    weights: tuple[float, ...]
    validation: dict[str, Rows]
    corpus_hash: str
    train_tokens: int
    train_bytes: int


def prepare(data: DataConfig, vocab_size: int, seed: int, *, quiet: bool = False) -> Prepared:
    """Reads the sources, trains or loads the tokenizer, fills or opens the cache, and packs.

    Args:
      data: the config's data node.
      vocab_size: of the model; the size of a trained vocabulary where `data.tokenizer` gives none.
      seed: decides the order of documents in the training stream. The validation sets don't depend on it.
      quiet: no progress bars.

    Raises:
      InputError: any bad input, by its field: an unknown source or argument, a missing file, an empty corpus
        or split, a vocabulary larger than the corpus fills, a cache directory that can't be written.
    """
    sources = _make_sources(data.sources, "data.sources")
    fingerprints = [source.fingerprint() for source in sources]
    corpus_hash = documents.combine(fingerprints)
    tokenizer = _tokenizer(data, vocab_size, sources, corpus_hash, quiet)
    caches = [token_cache(source, tokenizer, data.holdout, data.cache_dir, quiet) for source in sources]
    train = []
    for i, cache in enumerate(caches):
        train.append(make_rows(cache["train"], data.seq_len, data.packed, seed))
        if not len(train[-1]):
            raise InputError(f"data.sources.{i}", "every document is held out",
                             "give more documents or lower data.holdout")
    validation = {}
    for i, wanted in enumerate(data.validation):
        if wanted.sources:
            others = _make_sources(wanted.sources, f"data.validation.{i}.sources")
            parts = [token_cache(source, tokenizer, 0.0, data.cache_dir, quiet)["train"] for source in others]
        else:
            parts = [cache["validation"] for cache in caches]
        validation[wanted.name] = _validation_rows(data, parts, wanted.max_rows)
        if not len(validation[wanted.name]):
            raise InputError(
                "data.holdout", f"{data.holdout} holds out no document for the set {wanted.name!r}",
                "raise it, split the text into more documents, or set data.validation in the preset")
    prepared = Prepared(
        tokenizer, tuple(train), tuple(source.weight for source in data.sources), validation, corpus_hash,
        train_tokens=sum(len(cache["train"].tokens_T) for cache in caches),
        train_bytes=sum(cache["train"].text_bytes for cache in caches))
    logging.info("corpus %s: %.1f MB to train on, %.1fM tokens of %s, %d rows of %d", corpus_hash[:12],
                 prepared.train_bytes / 1e6, prepared.train_tokens / 1e6, tokenizer.name,
                 sum(len(rows) for rows in train), data.seq_len)
    return prepared


def _make_sources(configs: Sequence[Source], field: str) -> list[DocumentSource]:
    """The sources, each looked at once, so that a missing file or an empty corpus is found with its field."""
    sources = []
    for i, config in enumerate(configs):
        source = None
        try:
            source = make_source(config.name, config.args)
            empty = not len(source)
        except InputError as error:
            # What a source finds while it reads is relative to its own arguments.
            prefix = f"{field}.{i}" if source is None else f"{field}.{i}.args"
            raise error.within(prefix) from None
        if empty:
            raise InputError(f"{field}.{i}", f"the source {config.name} has no documents", "correct its args")
        sources.append(source)
    return sources


def _validation_rows(data: DataConfig, parts: Sequence[TokenCache], max_rows: int) -> Rows:
    rows = [make_rows(part, data.seq_len, data.packed, _VALIDATION_SEED) for part in parts]
    return SpreadRows(rows, [len(part.offsets_D1) - 1 for part in parts], max_rows)


def _tokenizer(
    data: DataConfig, vocab_size: int, sources: Sequence[DocumentSource], corpus_hash: str, quiet: bool
) -> Tokenizer:
    """One that needs no training, or a vocabulary trained on the training documents and kept in the cache."""
    name, size = parse_spec(data.tokenizer, vocab_size)
    if name == "bytes":
        return TOKENIZERS[name]()
    shares = [source.weight / sum(s.weight for s in data.sources) for source in data.sources]
    key = documents.combine([corpus_hash, repr(shares), repr(data.holdout), str(size),
                             str(TOKENIZER_SAMPLE_BYTES), subwords.OPTIONS_KEY])
    path = storage.cache_root(data.cache_dir) / f"tokenizer-{key[:24]}"
    if not _loads(path):
        with storage.building(path, _loads) as build:
            logging.info("training a vocabulary of %d on at most %.0f MB", size, TOKENIZER_SAMPLE_BYTES / 1e6)
            bar = tqdm(desc=f"vocabulary of {size}", unit="B", unit_scale=True, disable=quiet or None,
                       dynamic_ncols=True)
            with bar:
                texts = _sample(sources, shares, data.holdout, bar)
                TOKENIZERS[name].train(texts, size).save(build)
    return load_tokenizer(path)


def _loads(path: pathlib.Path) -> bool:
    try:
        load_tokenizer(path)
    except InputError:
        return False
    return True


def _sample(
    sources: Sequence[DocumentSource], shares: Sequence[float], holdout: float, bar: tqdm
) -> Iterator[str]:
    """Training documents, evenly spread over each source, up to its share of TOKENIZER_SAMPLE_BYTES."""
    for source, share in zip(sources, shares):
        left = share * TOKENIZER_SAMPLE_BYTES
        names = [source.document_id(i) for i in range(len(source))]
        for i in sorted(range(len(names)), key=lambda i: documents.subset_key(names[i])):
            if left <= 0:
                break
            if documents.split(names[i], holdout) == "train":
                text = source.document(i).text
                left -= len(text.encode("utf-8"))
                bar.update(len(text.encode("utf-8")))
                yield text
