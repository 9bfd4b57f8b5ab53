"""The cache on disk: what it holds, and that nothing can break it for long."""

import concurrent.futures
import os

import numpy as np
import pytest

from research.data import cache as cache_module
from research.data import documents, storage
from research.data.cache import token_cache
from research.data.sources import make_source
from research.data.tokenizer import BytesTokenizer
from research.errors import InputError
from tests.data.corpora import write_corpus

HOLDOUT = 0.2


@pytest.fixture
def source(tmp_path):
    return make_source("text", {"paths": str(write_corpus(tmp_path / "corpus") / "**/*.txt")})


def check(caches, source, tokenizer=BytesTokenizer()) -> None:
    expected = {"train": [], "validation": []}
    for i in range(len(source)):
        document = source.document(i)
        expected[documents.split(document.id, HOLDOUT)].append(document)
    for name, cache in caches.items():
        assert cache.document_ids == [d.id for d in expected[name]] != []
        assert len(cache.tokens_T) == cache.offsets_D1[-1] and cache.offsets_D1.dtype == np.int64
        assert cache.text_bytes == sum(len(d.text.encode()) for d in expected[name])
        for d, document in enumerate(expected[name]):
            ids = cache.tokens_T[cache.offsets_D1[d]:cache.offsets_D1[d + 1]]
            assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
            assert tokenizer.decode(ids[1:-1]) == document.text


def entries(directory) -> list[str]:
    return sorted(name for name in os.listdir(directory))


@pytest.mark.parametrize("batch_characters", [1, 4_000_000])
def test_cache_holds_every_document_of_its_split(source, tmp_path, monkeypatch, batch_characters):
    monkeypatch.setattr(cache_module, "_BATCH_CHARACTERS", batch_characters)
    caches = token_cache(source, BytesTokenizer(), HOLDOUT, str(tmp_path / "cache"), quiet=True)
    check(caches, source)
    assert caches["train"].tokens_T.dtype == np.uint16 and isinstance(caches["train"].tokens_T.base, np.memmap)


def test_large_vocabularies_have_wide_ids(source, tmp_path):
    tokenizer = BytesTokenizer()
    tokenizer.vocab_size = 65537
    caches = token_cache(source, tokenizer, HOLDOUT, str(tmp_path / "cache"), quiet=True)
    assert caches["train"].tokens_T.dtype == np.uint32
    check(caches, source)


def test_second_opening_reads_and_does_not_tokenise(source, tmp_path, monkeypatch):
    token_cache(source, BytesTokenizer(), HOLDOUT, str(tmp_path / "cache"), quiet=True)
    monkeypatch.setattr(cache_module, "_tokenise", None)  # calling it would fail
    check(token_cache(source, BytesTokenizer(), HOLDOUT, str(tmp_path / "cache"), quiet=True), source)
    assert len(entries(tmp_path / "cache")) == 1


def test_what_decides_the_contents_is_in_the_key(source, tmp_path):
    for holdout in (0.2, 0.3):
        token_cache(source, BytesTokenizer(), holdout, str(tmp_path / "cache"), quiet=True)
    other = make_source("synthetic", {"documents": 3})
    token_cache(other, BytesTokenizer(), 0.2, str(tmp_path / "cache"), quiet=True)
    assert len(entries(tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    "file", ["meta.json", "train/tokens.bin", "train/offsets.bin", "validation/documents.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_broken_cache_is_made_anew(source, tmp_path, file, damage):
    root = tmp_path / "cache"
    token_cache(source, BytesTokenizer(), HOLDOUT, str(root), quiet=True)
    path = root / entries(root)[0] / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"[" + content[1:][::-1])
    check(token_cache(source, BytesTokenizer(), HOLDOUT, str(root), quiet=True), source)
    assert len(entries(root)) == 1  # nothing is left lying about


def test_a_stopped_build_leaves_nothing(source, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module.documents, "split", stop)
    with pytest.raises(KeyboardInterrupt):
        token_cache(source, BytesTokenizer(), HOLDOUT, str(tmp_path / "cache"), quiet=True)
    assert entries(tmp_path / "cache") == []


class Counting(BytesTokenizer):
    """Stops when it is asked for document `stop`; counts what it encodes."""

    def __init__(self, stop: int | None = None):
        super().__init__()
        self.encoded, self._stop = 0, stop

    def encode_batch(self, texts):
        self.encoded += len(texts)
        if self._stop is not None and self.encoded > self._stop:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


def test_a_killed_build_goes_on_with_the_part_that_was_not_finished(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_PART_DOCUMENTS", 7)
    root = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        token_cache(source, Counting(stop=24), HOLDOUT, str(root), quiet=True)  # three parts of 7, and some
    (parts,) = root.iterdir()
    assert entries(parts) == [f"{begin:012d}" for begin in (0, 7, 14)]
    tokens = parts / f"{7:012d}" / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])  # a broken part is done again
    again = Counting()
    check(token_cache(source, again, HOLDOUT, str(root), quiet=True), source)
    assert again.encoded == len(source) - 14 and len(entries(root)) == 1


@pytest.mark.parametrize("size", [1, 3, 39, 40, 41])
def test_parts_of_any_size_join_to_the_same(source, tmp_path, monkeypatch, size):
    monkeypatch.setattr(cache_module, "_PART_DOCUMENTS", size)
    check(token_cache(source, BytesTokenizer(), HOLDOUT, str(tmp_path / "cache"), quiet=True), source)


def test_a_large_source_has_a_bounded_number_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_PART_DOCUMENTS", 2)
    monkeypatch.setattr(cache_module, "_PARTS", 4)
    seen = []
    write = cache_module._write_part
    monkeypatch.setattr(cache_module, "_write_part", lambda source, chosen, *rest: (seen.append(chosen),
                                                                                     write(source, chosen, *rest)))
    token_cache(make_source("synthetic", {"documents": 30}), BytesTokenizer(), 0.1, str(tmp_path), quiet=True)
    assert [list(chosen) for chosen in seen] == [list(range(i, min(i + 8, 30))) for i in (0, 8, 16, 24)]


def test_many_builders_at_once_agree(source, tmp_path):
    def build(_):
        return token_cache(source, BytesTokenizer(), HOLDOUT, str(tmp_path / "cache"), quiet=True)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for caches in pool.map(build, range(6)):
            check(caches, source)
    assert len(entries(tmp_path / "cache")) == 1


def test_building_replaces_what_is_broken_and_keeps_what_is_whole(tmp_path):
    def whole(path):
        return (path / "ok").exists()

    for mark in ("first", "second"):
        with storage.building(tmp_path / "x", whole) as build:
            (build / "ok").write_text(mark)
    assert (tmp_path / "x" / "ok").read_text() == "first"
    (tmp_path / "x" / "ok").rename(tmp_path / "x" / "broken")
    with storage.building(tmp_path / "x", whole) as build:
        (build / "ok").write_text("third")
    assert (tmp_path / "x" / "ok").read_text() == "third" and entries(tmp_path) == ["x"]


def test_bad_cache_directories_name_the_field(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        token_cache(source, BytesTokenizer(), HOLDOUT, str(tmp_path / "file" / "cache"), quiet=True)
    assert caught.value.field == "data.cache_dir"
    with pytest.raises(InputError, match="no documents"):
        empty = make_source("text", {"paths": str(tmp_path / "file")})
        token_cache(empty, BytesTokenizer(), HOLDOUT, str(tmp_path / "cache"), quiet=True)
