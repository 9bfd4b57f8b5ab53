"""From a data config to rows: sources, tokenizer, cache, packing, in one call."""

import dataclasses
import pathlib
from typing import Iterator, Sequence

from absl import logging
from tqdm import tqdm

from research.data import documents, storage
from research.data.cache import TokenCache, token_cache
from research.data.documents import DocumentSource
from research.data.mixture import Mixture, Weight
from research.data.packing import Rows, SpreadRows, make_rows
from research.data.records import Records
from research.data.sources import make_source
from research.data.tokenizer import TOKENIZERS, Tokenizer, directory_of, load_tokenizer, parse_spec
from research.errors import InputError
from research.schema import DataConfig, Source

TOKENIZER_SAMPLE_BYTES = 12_000_000  # of text that a vocabulary is trained on
_VALIDATION_SEED = 0  # of the order of held-out documents: the same set in every run


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run reads.

    Attributes:
      tokenizer: of all sources.
      train: rows of each part; a part is a source, or a group of one that has groups. `weights` are their shares
        (loader.Loader takes both).
      validation: name of the set -> at most `max_rows` rows, evenly spread over it.
      corpus_hash: sha256 (hex) over the contents of the training sources, held-out documents included.
      train_tokens, train_bytes: of one pass over the training documents; tokens count <s> and </s>, bytes are
        of text.
      parts: what each part of `train` is.
    """

    tokenizer: Tokenizer
    train: tuple[Rows, ...]
    weights: tuple[Weight, ...]
    validation: dict[str, Rows]
    corpus_hash: str
    train_tokens: int
    train_bytes: int
    parts: tuple["Part", ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of training text, or one group of it: its name, and what its training split holds.

    `skipped` counts the bad rows that its source left out; `held_out` the documents of the other split.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    held_out: int
    skipped: int


@dataclasses.dataclass(frozen=True)
class _Member:
    """A source or a group before it is tokenised. share: of its source's weight; None is by its number of tokens."""

    number: int
    name: str
    source: DocumentSource
    share: float | None
    skipped: int


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
    sources = make_sources(data.sources, "data.sources", data.cache_dir)
    corpus_hash = documents.combine([source.fingerprint() for source in sources])
    members = _members(sources, data.sources)
    tokenizer = _tokenizer(data, vocab_size, sources, members, corpus_hash, quiet)
    caches = [token_cache(member.source, tokenizer, data.holdout, data.cache_dir, quiet) for member in members]
    kept = [i for i, (member, cache) in enumerate(zip(members, caches)) if _is_kept(member, cache["train"])]
    for number in range(len(sources)):
        if number not in {members[i].number for i in kept}:
            raise InputError(f"data.sources.{number}", "every document is held out",
                             "give more documents or lower data.holdout")
    train = tuple(make_rows(caches[i]["train"], data.seq_len, data.packed, seed) for i in kept)
    validation = {}
    for i, wanted in enumerate(data.validation):
        if wanted.sources:
            others = make_sources(wanted.sources, f"data.validation.{i}.sources", data.cache_dir)
            parts = [token_cache(source, tokenizer, 0.0, data.cache_dir, quiet)["train"] for source in others]
        else:
            parts = [cache["validation"] for cache in caches]
        validation[wanted.name] = _validation_rows(data, parts, wanted.max_rows)
        if not len(validation[wanted.name]):
            raise InputError(
                "data.holdout", f"{data.holdout} holds out no document for the set {wanted.name!r}",
                "raise it, split the text into more documents, or set data.validation in the preset")
    parts = tuple(_part(members[i], caches[i]) for i in kept)
    prepared = Prepared(
        tokenizer, train, _weights([members[i] for i in kept], parts, data.sources), validation, corpus_hash,
        train_tokens=sum(part.tokens for part in parts), train_bytes=sum(part.bytes for part in parts), parts=parts)
    logging.info("corpus %s: %.1f MB to train on, %.1fM tokens of %s, %d rows of %d", corpus_hash[:12],
                 prepared.train_bytes / 1e6, prepared.train_tokens / 1e6, tokenizer.name,
                 sum(len(rows) for rows in train), data.seq_len)
    return prepared


def _members(sources: Sequence[DocumentSource], configs: Sequence[Source]) -> list[_Member]:
    members = []
    for number, (source, config) in enumerate(zip(sources, configs)):
        name = f"{number}:{config.name}"
        skipped = source.skipped if isinstance(source, Records) else 0
        try:
            groups = source.grouped() if isinstance(source, Records) else {}
        except InputError as error:
            raise error.within(f"data.sources.{number}.args") from None
        if not groups:
            members.append(_Member(number, name, source, 1.0, skipped))
        for group, part in groups.items():
            share = source.group_weights[group] / sum(source.group_weights.values()) if source.group_weights else None
            members.append(_Member(number, f"{name}/{group}", part, share, skipped))
    return members


def _is_kept(member: _Member, cache: TokenCache) -> bool:
    """Whether there is something to train on. A group that is all held out is left out, unless it was given a share."""
    if len(cache.tokens_T):
        return True
    if isinstance(member.share, float) and member.share < 1.0:
        raise InputError(f"data.sources.{member.number}", f"every document of {member.name} is held out",
                         "give more documents or lower data.holdout")
    logging.warning("%s: every document is held out", member.name)
    return False


def _part(member: _Member, caches: dict[str, TokenCache]) -> Part:
    train = caches["train"]
    return Part(member.name, len(train.offsets_D1) - 1, len(train.tokens_T), train.text_bytes,
                len(caches["validation"].offsets_D1) - 1, member.skipped)


def _weights(members: Sequence[_Member], parts: Sequence[Part], configs: Sequence[Source]) -> tuple[Weight, ...]:
    """Each member's share of its source's weight, now and at the source's later points."""
    tokens = [sum(part.tokens for other, part in zip(members, parts) if other.number == number)
              for number in range(len(configs))]
    weights: list[Weight] = []
    for member, part in zip(members, parts):
        config = configs[member.number]
        share = part.tokens / tokens[member.number] if member.share is None else member.share
        if not config.at_samples:
            weights.append(config.weight * share)
            continue
        points = dict(zip((0, *config.at_samples), (config.weight, *config.later_weights)))  # a point at 0 wins
        weights.append(tuple((sample, weight * share) for sample, weight in points.items()))
    Mixture(weights, [1] * len(weights), 0)  # says at once where they sum to nothing
    return tuple(weights)


def make_sources(configs: Sequence[Source], field: str, cache_dir: str) -> list[DocumentSource]:
    """The sources, each looked at once, so that a missing file or an empty corpus is found with its field."""
    sources = []
    for i, config in enumerate(configs):
        source = None
        try:
            source = make_source(config.name, config.args, cache_dir)
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
    data: DataConfig, vocab_size: int, sources: Sequence[DocumentSource], members: Sequence[_Member], corpus_hash: str,
    quiet: bool,
) -> Tokenizer:
    """One that needs no training, or a vocabulary trained on the training documents and kept in the cache."""
    directory = directory_of(data.tokenizer)
    if directory:
        try:
            found = load_tokenizer(directory)
        except InputError as error:
            raise InputError("data.tokenizer", error.problem, error.cure) from None
        if found.vocab_size > vocab_size:  # said before anything is tokenised
            raise InputError("model.vocab_size", f"{vocab_size} is below the {found.vocab_size} of {data.tokenizer}",
                             f"set model.vocab_size={found.vocab_size}")
        return found
    name, size = parse_spec(data.tokenizer, vocab_size)
    if name == "bytes":
        return TOKENIZERS[name]()
    chosen, shares = _shares(data, sources, members)
    key = documents.combine([corpus_hash, repr(shares), repr(data.holdout), str(size),
                             str(TOKENIZER_SAMPLE_BYTES), TOKENIZERS[name].training_key])
    path = storage.cache_root(data.cache_dir) / f"tokenizer-{key[:24]}"
    if not _loads(path):
        with storage.building(path, _loads) as build:
            _train(name, size, chosen, shares, data.holdout, quiet).save(build)
    return load_tokenizer(path)


def train_tokenizer(
    data: DataConfig, name: str, vocab_size: int, *, chat: bool = False, sample_bytes: int | None = None,
    quiet: bool = False,
) -> Tokenizer:
    """A vocabulary of the kind `name` (a row of TOKENIZERS), trained on the training documents of `data`.

    Args:
      chat: with the markers of vocabulary.CHAT_MARKERS.
      sample_bytes: how much text to train on, at most; default TOKENIZER_SAMPLE_BYTES.

    Raises:
      InputError: bad sources, a size that the kind or the text can't fill.
    """
    parse_spec(f"{name}:{vocab_size}", vocab_size)
    sources = make_sources(data.sources, "data.sources", data.cache_dir)
    chosen, shares = _shares(data, sources, _members(sources, data.sources))
    return _train(name, vocab_size, chosen, shares, data.holdout, quiet, chat, sample_bytes)


def _shares(
    data: DataConfig, sources: Sequence[DocumentSource], members: Sequence[_Member]
) -> tuple[list[DocumentSource], list[float]]:
    """What a vocabulary is trained on: groups with shares of their own by them, the other sources whole."""
    chosen, weights = [], []
    for i, member in enumerate(members):
        config = data.sources[member.number]
        weight = max(config.weight, *config.later_weights) if config.later_weights else config.weight
        if member.share is not None:
            chosen.append(member.source)
            weights.append(weight * member.share)
        elif member.number not in {other.number for other in members[:i]}:
            chosen.append(sources[member.number])
            weights.append(weight)
    return chosen, [weight / sum(weights) for weight in weights]


def _train(
    name: str, size: int, chosen: Sequence[DocumentSource], shares: Sequence[float], holdout: float, quiet: bool,
    chat: bool = False, sample_bytes: int | None = None,
) -> Tokenizer:
    most = TOKENIZER_SAMPLE_BYTES if sample_bytes is None else sample_bytes
    logging.info("training a vocabulary of %d on at most %.0f MB", size, most / 1e6)
    name_of_bar = f"vocabulary of {size}"
    with tqdm(desc=name_of_bar, unit="B", unit_scale=True, disable=quiet or None, dynamic_ncols=True) as bar:
        return TOKENIZERS[name].train(sample_texts(chosen, shares, holdout, bar, most), size, chat)


def _loads(path: pathlib.Path) -> bool:
    try:
        load_tokenizer(path)
    except InputError:
        return False
    return True


def sample_texts(
    sources: Sequence[DocumentSource], shares: Sequence[float], holdout: float, bar: tqdm, most: int
) -> Iterator[str]:
    """Training documents, evenly spread over each source, up to its share (they sum to 1) of `most` bytes."""
    for source, share in zip(sources, shares):
        left = share * most
        names = [source.document_id(i) for i in range(len(source))]
        for i in sorted(range(len(names)), key=lambda i: documents.subset_key(names[i])):
            if left <= 0:
                break
            if documents.split(names[i], holdout) == "train":
                text = source.document(i).text
                left -= len(text.encode("utf-8"))
                bar.update(len(text.encode("utf-8")))
                yield text
