"""From a data config to rows: sources, tokenizer, cache, packing, in one call."""

import dataclasses
import itertools
import pathlib
from typing import Iterator, Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from research.config import nearest
from research.data import documents, storage
from research.data.cache import TokenCache, token_cache
from research.data.documents import DocumentSource
from research.data.mixture import Mixture, Weight
from research.data.packing import Rows, SpreadRows, make_rows
from research.data.records import Records
from research.data.sources import make_source
from research.data.tokenizer import TOKENIZERS, Tokenizer, directory_of, load_tokenizer, parse_spec
from research.errors import InputError
from research.schema import DataConfig, Source, Validation

TOKENIZER_SAMPLE_BYTES = 12_000_000  # of text that a vocabulary is trained on
_FIRST_READ = 64  # documents of a source that are sampled before their size is known
_COMPARED_DOCUMENTS = 16  # of an evaluation set with sources of its own, with what is trained on
_VALIDATION_SEED = 0  # of the order of held-out documents: the same set in every run


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run reads.

    Attributes:
      tokenizer: of all sources.
      train: rows of each part; a part is a source, or a group of one that has groups. `weights` are their shares
        (loader.Loader takes both).
      validation: name of the set -> at most `max_rows` rows, evenly spread over it; those of `by_group` after their set.
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
    """A source or a group before it is tokenised.

    label: what `groups` of an evaluation set call it: the group, or the name where there is none.
    share: of its source's weight; None is by its number of tokens.
    """

    number: int
    name: str
    label: str
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
    sets = [_members_of_set(number, wanted, members, data.cache_dir) for number, wanted in enumerate(data.validation)]
    tokenizer = _tokenizer(data, vocab_size, sources, members, corpus_hash, quiet)
    caches = [token_cache(member.source, tokenizer, data.holdout, data.cache_dir, quiet) for member in members]
    kept = [i for i, (member, cache) in enumerate(zip(members, caches)) if _is_kept(member, cache["train"])]
    for number in range(len(sources)):
        if number not in {members[i].number for i in kept}:
            raise InputError(f"data.sources.{number}", "every document is held out",
                             "give more documents or lower data.holdout")
    train = tuple(make_rows(caches[i]["train"], data.seq_len, data.packed, seed) for i in kept)
    held_out = {member.name: cache["validation"] for member, cache in zip(members, caches)}
    trained = [caches[i]["train"] for i in kept]
    validation = {}
    for number, chosen in enumerate(sets):
        for name, rows in _rows_of_set(data, number, chosen, tokenizer, held_out, trained, quiet).items():
            if name in validation:
                raise InputError(f"data.validation.{number}", f"there is another set {name!r}", "name one of them differently")
            validation[name] = rows
    parts = tuple(_part(members[i], caches[i]) for i in kept)
    prepared = Prepared(
        tokenizer, train, _weights([members[i] for i in kept], parts, data.sources), validation, corpus_hash,
        train_tokens=sum(part.tokens for part in parts), train_bytes=sum(part.bytes for part in parts), parts=parts)
    logging.info("corpus %s: %.1f MB to train on, %.1fM tokens of %s, %d rows of %d", corpus_hash[:12],
                 prepared.train_bytes / 1e6, prepared.train_tokens / 1e6, tokenizer.name,
                 sum(len(rows) for rows in train), data.seq_len)
    return prepared


def _members(
    sources: Sequence[DocumentSource], configs: Sequence[Source], field: str = "data.sources", apart: bool = True
) -> list[_Member]:
    """apart: whether groups are members of their own."""
    members = []
    for number, (source, config) in enumerate(zip(sources, configs)):
        name = f"{number}:{config.name}"
        skipped = source.skipped if isinstance(source, Records) else 0
        try:
            groups = source.grouped() if apart and isinstance(source, Records) else {}
        except InputError as error:
            raise error.within(f"{field}.{number}.args") from None
        if not groups:
            members.append(_Member(number, name, name, source, 1.0, skipped))
        for group, part in groups.items():
            share = source.group_weights[group] / sum(source.group_weights.values()) if source.group_weights else None
            members.append(_Member(number, f"{name}/{group}", group or f"{name}/", part, share, skipped))
    return members


def _members_of_set(number: int, wanted: Validation, members: Sequence[_Member], cache_dir: str) -> list[_Member]:
    """Those whose documents the evaluation set has: of its own sources, else of the training's `members`."""
    field = f"data.validation.{number}"
    if wanted.sources:
        sources = make_sources(wanted.sources, f"{field}.sources", cache_dir)
        for i, source in enumerate(sources):
            if isinstance(source, Records) and source.group_weights:
                raise InputError(f"{field}.sources.{i}.args.group_weights", "shares nothing out: the set is read whole",
                                 f"leave it out; {field}.groups names the groups that count")
        members = _members(sources, wanted.sources, f"{field}.sources", bool(wanted.groups or wanted.by_group))
    labels = sorted({member.label for member in members})
    for group in wanted.groups:
        if group not in labels:
            raise InputError(f"{field}.groups", f"there is no group {group!r}", nearest(group, labels))
    if wanted.by_group and len(members) == 1 and members[0].label == members[0].name:
        raise InputError(f"{field}.by_group", "there are no groups", "name the field that makes them: the source's group_by")
    return [member for member in members if not wanted.groups or member.label in wanted.groups]


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
        if not any(points.values()):
            raise InputError(f"data.sources.{member.number}.later_weights", "are nothing from sample 0 on",
                             "leave the source out instead")
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


def _rows_of_set(
    data: DataConfig, number: int, chosen: Sequence[_Member], tokenizer: Tokenizer, held_out: dict[str, TokenCache],
    trained: Sequence[TokenCache], quiet: bool,
) -> dict[str, Rows]:
    """The set `data.validation[number]` by its name, and with `by_group` those of its groups."""
    wanted = data.validation[number]
    caches = held_out
    if wanted.sources:
        caches = {member.name: token_cache(member.source, tokenizer, 0.0, data.cache_dir, quiet)["train"]
                  for member in chosen}
        _warn_of_trained(number, wanted.name, list(caches.values()), trained)
    parts = {wanted.name: chosen}
    for label in sorted({member.label for member in chosen}) if wanted.by_group else ():
        parts[f"{wanted.name}-{label}"] = [member for member in chosen if member.label == label]
    sets = {name: _validation_rows(data, [caches[member.name] for member in part], wanted.max_rows)
            for name, part in parts.items()}
    if not len(sets[wanted.name]):
        raise InputError(
            "data.holdout", f"{data.holdout} holds out no document for the set {wanted.name!r}",
            "raise it, split the text into more documents, or set data.validation in the preset")
    if empty := [name for name, rows in sets.items() if not len(rows)]:
        logging.warning("data.holdout=%s holds out no document for the sets %s: there are none", data.holdout, ", ".join(empty))
    return {name: rows for name, rows in sets.items() if len(rows)}


def _warn_of_trained(number: int, name: str, parts: Sequence[TokenCache], trained: Sequence[TokenCache]) -> None:
    """Says where a set's own sources are the training's, too. Long documents tell: few others are as long."""
    compared = found = 0
    for part in parts:
        for document in np.argsort(-np.diff(part.offsets_D1), kind="stable")[:-(-_COMPARED_DOCUMENTS // len(parts))]:
            ids_T = part.tokens_T[part.offsets_D1[document]:part.offsets_D1[document + 1]]
            compared += 1
            found += any(_holds(cache, ids_T) for cache in trained)
    if found:
        logging.warning("data.validation.%d: %d of the %d documents of %r that were compared are trained on, word for word; "
                        "without `sources` a set has what is held out of data.sources", number, found, compared, name)


def _holds(cache: TokenCache, ids_T: np.ndarray) -> bool:
    """Whether one of its documents is `ids_T`."""
    starts_D = cache.offsets_D1[:-1][np.diff(cache.offsets_D1) == len(ids_T)]
    for place in range(0, len(ids_T), max(len(ids_T) // 8, 1)):  # a few tokens of all of them at once: they leave next to none
        starts_D = starts_D[cache.tokens_T[starts_D + place] == ids_T[place]]
    return any(np.array_equal(cache.tokens_T[start:start + len(ids_T)], ids_T) for start in starts_D)


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
        _check_size(data, found.vocab_size, vocab_size)
        return found
    name, size = parse_spec(data.tokenizer, vocab_size)
    _check_size(data, size, vocab_size)
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


def _check_size(data: DataConfig, size: int, vocab_size: int) -> None:
    """Whether the model has a place for each of the tokenizer's `size` ids; said before anything is tokenised."""
    if size > vocab_size:
        raise InputError("model.vocab_size", f"{vocab_size} is below the {size} of {data.tokenizer}",
                         f"set model.vocab_size={size}")
    if vocab_size > 2 * size:
        logging.warning("model.vocab_size=%d, and %s has %d ids: no text has the others", vocab_size, data.tokenizer, size)


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
        spread = sorted(range(len(names)), key=lambda i: documents.subset_key(names[i]))
        chosen = (i for i in spread if documents.split(names[i], holdout) == "train")
        count = _FIRST_READ
        while left > 0 and (batch := list(itertools.islice(chosen, count))):
            # Read in the order of the source: a Parquet file decodes each of its row groups once a batch.
            texts, size = {i: source.document(i).text for i in sorted(batch)}, 0
            for i in batch:
                if left <= 0:
                    break
                length = len(texts[i].encode("utf-8"))
                left, size = left - length, size + length
                bar.update(length)
                yield texts[i]
            # As many as seem to be left; not at once, should these have been the small ones.
            count = min(8 * len(batch), 1 + int(left * len(batch) / max(size, 1)))
