"""From a config to rows, end to end, and each bad input as one line that names its field."""

import collections
import dataclasses
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from research.config import override
from research.data import documents, pipeline
from research.data.loader import Loader, evaluation_batches
from research.data.mixture import Mixture
from research.errors import InputError
from research.schema import DataConfig, Source, Validation
from tests.data.corpora import write_corpus
from tests.data.record_files import LANGUAGES, make_rows, write_jsonl, write_parquet


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), files=60)


def config(corpus, cache, **changes) -> DataConfig:
    text = Source("text", {"paths": (f"{corpus}/**/*.txt",)}, weight=3.0)
    values = {"sources": (text, Source("synthetic", {"documents": 50, "length": 80})),
              "tokenizer": "sentencepiece:320", "seq_len": 32, "holdout": 0.1, "cache_dir": str(cache)}
    return DataConfig(**{**values, **changes})


def rows_equal(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(ours[i][key], theirs[i][key]) for i in range(len(ours)) for key in ours[i])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece:320", "sentencepiece"])
def test_prepare_makes_all_that_a_run_reads(corpus, tmp_path, tokenizer, packed):
    data = config(corpus, tmp_path, tokenizer=tokenizer, packed=packed)
    prepared = pipeline.prepare(data, 350, 0, quiet=True)
    sizes = {"bytes": 261, "sentencepiece:320": 320, "sentencepiece": 350}
    assert prepared.tokenizer.vocab_size == sizes[tokenizer]
    assert len(prepared.train) == 2 and prepared.weights == (3.0, 1.0)
    targets, size = 0, 0
    for rows in prepared.train:
        for i in range(len(rows)):
            targets += int(rows[i]["weights_L"].sum())
            size += int((prepared.tokenizer.token_bytes_V[rows[i]["targets_L"]] * rows[i]["weights_L"]).sum())
    documents = prepared.train_tokens - targets  # each document's first token is no target
    assert 90 < documents < 110 and size == prepared.train_bytes
    assert list(prepared.validation) == ["heldout"] and 0 < len(prepared.validation["heldout"]) <= 256
    assert len(list(evaluation_batches(prepared.validation["heldout"], 4, 8))) == 2


def test_the_same_config_gives_the_same_from_cache_and_anew(corpus, tmp_path):
    first = pipeline.prepare(config(corpus, tmp_path / "a"), 320, 7, quiet=True)
    for cache in ("a", "b"):
        again = pipeline.prepare(config(corpus, tmp_path / cache), 320, 7, quiet=True)
        assert again.corpus_hash == first.corpus_hash
        assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
        assert all(rows_equal(a, b) for a, b in zip(first.train, again.train))
        assert rows_equal(first.validation["heldout"], again.validation["heldout"])


def test_the_seed_reorders_training_but_not_validation(corpus, tmp_path):
    one, two = (pipeline.prepare(config(corpus, tmp_path), 320, seed, quiet=True) for seed in (0, 1))
    assert not rows_equal(one.train[0], two.train[0])
    assert rows_equal(one.validation["heldout"], two.validation["heldout"])


def test_held_out_text_is_in_no_training_row_and_not_in_the_vocabulary(corpus, tmp_path, monkeypatch):
    seen = []
    train = pipeline.TOKENIZERS["sentencepiece"].train
    monkeypatch.setattr(pipeline.TOKENIZERS["sentencepiece"], "train",
                        lambda texts, size, chat: train([seen.append(text) or text for text in texts], size))
    text = Source("text", {"paths": f"{corpus}/**/*.txt"})
    data = config(corpus, tmp_path, sources=(text,), packed=False, seq_len=2000)
    prepared = pipeline.prepare(data, 320, 0, quiet=True)

    def texts(rows) -> set[str]:
        return {prepared.tokenizer.decode(rows[i]["tokens_L"]) for i in range(len(rows))}

    held, trained = texts(prepared.validation["heldout"]), texts(prepared.train[0])
    assert held and trained and not held & trained and len(held | trained) == 60
    assert set(seen) == trained


def test_the_sample_for_the_vocabulary_is_capped_by_share(corpus, tmp_path):
    data = config(corpus, tmp_path)
    sources = pipeline.make_sources(data.sources, "data.sources", data.cache_dir)
    texts = list(pipeline.sample_texts(sources, [0.75, 0.25], 0.1, pipeline.tqdm(disable=True), 4000))
    made_up = [text for text in texts if text.startswith("file ")]
    size = sum(map(len, made_up))
    assert 3000 <= size < 4500 and 1000 <= sum(map(len, texts)) - size < 1200


def test_the_sample_for_the_vocabulary_is_read_in_the_order_of_the_file(tmp_path, monkeypatch):
    """The texts and their order are those of reading one by one; 64 documents are read first, then each row group once."""
    rows = make_rows(600)
    for number in range(2):
        write_parquet(tmp_path / f"{number}.parquet", rows[number::2], group=5)
    source, = pipeline.make_sources([Source("parquet", {"paths": str(tmp_path / "*.parquet")})], "", str(tmp_path))
    assert len(source) == 600
    reads = collections.Counter()
    read = pq.ParquetFile.read_row_group

    def counted(self, group, **kwargs):
        reads[id(self), group] += 1
        return read(self, group, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for most, limit in ((1, 64), (5_000, 64 + 64), (30_000, 64 + 120), (10**9, 64 + 120)):
        names = sorted((source.document_id(i), i) for i in range(len(source)))
        expected, left = [], most
        for name, i in sorted(names, key=lambda item: documents.subset_key(item[0])):
            if left > 0 and documents.split(name, 0.1) == "train":
                expected.append(source.document(i).text)
                left -= len(expected[-1].encode())
        reads.clear()
        assert list(pipeline.sample_texts([source], [1.0], 0.1, pipeline.tqdm(disable=True), most)) == expected
        assert reads.total() <= limit


def test_named_validation_sets_of_their_own(corpus, tmp_path):
    other = Source("synthetic", {"documents": 20, "length": 100, "seed": 5})
    sets = (Validation(), Validation("other", (other,), max_rows=6), Validation("both", (other, other)))
    data = config(corpus, tmp_path, tokenizer="bytes", validation=sets)
    prepared = pipeline.prepare(data, 261, 0, quiet=True)
    assert list(prepared.validation) == ["heldout", "other", "both"]
    assert len(prepared.validation["other"]) == 6
    both = prepared.validation["both"]
    last = max(int(both[i]["document_index_L"].max()) for i in range(len(both)))
    assert last == 39  # documents of the second source count on


def test_no_validation_sets_need_no_holdout(corpus, tmp_path):
    data = config(corpus, tmp_path, tokenizer="bytes", validation=(), holdout=0.0)
    assert pipeline.prepare(data, 261, 0, quiet=True).validation == {}


def test_a_broken_vocabulary_is_trained_anew(corpus, tmp_path):
    first = pipeline.prepare(config(corpus, tmp_path), 320, 0, quiet=True)
    directory, = tmp_path.glob("tokenizer-*")
    (directory / "tokenizer.model").write_bytes(b"cut")
    assert pipeline.prepare(config(corpus, tmp_path), 320, 0, quiet=True).tokenizer.fingerprint() == \
        first.tokenizer.fingerprint()


def grouped(directory, **args) -> Source:
    write_jsonl(directory / "rows.jsonl", make_rows(240))
    return Source("jsonl", {"paths": str(directory / "*.jsonl"), "group_by": "lang", **args}, weight=2.0)


def test_groups_are_parts_with_the_share_of_their_tokens_or_their_own(tmp_path):
    other = Source("synthetic", {"documents": 50, "length": 80})
    data = DataConfig((grouped(tmp_path), other), holdout=0.1, seq_len=32, cache_dir=str(tmp_path / "cache"))
    prepared = pipeline.prepare(data, 261, 0, quiet=True)
    assert [part.name for part in prepared.parts] == ["0:jsonl/de", "0:jsonl/en", "0:jsonl/la", "1:synthetic"]
    tokens = np.array([part.tokens for part in prepared.parts[:3]])
    np.testing.assert_allclose(prepared.weights[:3], 2.0 * tokens / tokens.sum())
    assert prepared.weights[3] == 1.0 and prepared.train_tokens == sum(part.tokens for part in prepared.parts)
    for part, rows, lang in zip(prepared.parts, prepared.train, ("de", "en", "la")):
        assert part.documents + part.held_out == {"en": 120, "de": 80, "la": 40}[lang]
        assert len(rows) == -(-(part.tokens - 1) // 32)
    own = grouped(tmp_path, group_weights={"de": 1, "en": 0, "la": 3})
    prepared = pipeline.prepare(dataclasses.replace(data, sources=(own,)), 261, 0, quiet=True)
    assert [part.name for part in prepared.parts] == ["0:jsonl/de", "0:jsonl/la"] and prepared.weights == (0.5, 1.5)
    moving = dataclasses.replace(own, at_samples=(100,), later_weights=(4.0,))
    points = pipeline.prepare(dataclasses.replace(data, sources=(moving,)), 261, 0, quiet=True).weights
    assert points == (((0, 0.5), (100, 1.0)), ((0, 1.5), (100, 3.0)))
    mix = Mixture(prepared.weights, [len(rows) for rows in prepared.train], 0)
    counts = np.bincount([mix.sample(i)[0] for i in range(2048)])
    assert counts.tolist() == [512, 1536]  # of 16,000 tokens and 8,000: several epochs of the smaller


LANGUAGE_OF = {f"rows.jsonl#{i:09d}": row["lang"] for i, row in enumerate(make_rows(240))}


def names(rows) -> set[str]:
    return {name for i in range(len(rows)) for name in rows.documents(i)}


def test_held_out_documents_of_some_groups_are_a_set(tmp_path):
    other = Source("synthetic", {"documents": 50, "length": 80})
    sets = (Validation(), Validation("german", groups=("de",)), Validation("two", groups=("la", "en")),
            Validation("markov", groups=("1:synthetic",)), Validation("each", by_group=True, max_rows=7))
    data = DataConfig((grouped(tmp_path), other), holdout=0.2, seq_len=32, cache_dir=str(tmp_path / "cache"))
    plain = pipeline.prepare(data, 261, 0, quiet=True)
    found = pipeline.prepare(dataclasses.replace(data, validation=sets), 261, 0, quiet=True)
    assert all(rows_equal(ours, theirs) for ours, theirs in zip(found.train, plain.train)) and found.weights == plain.weights
    assert rows_equal(found.validation["heldout"], plain.validation["heldout"])
    assert list(found.validation) == ["heldout", "german", "two", "markov", "each",
                                      "each-1:synthetic", "each-de", "each-en", "each-la"]
    everything = names(found.validation["heldout"])
    assert everything == {name for name in everything if documents.split(name, 0.2) == "validation"}
    of = {label: {name for name in everything if name in LANGUAGE_OF and LANGUAGE_OF[name] == label} for label in LANGUAGES}
    assert all(of.values()) and names(found.validation["german"]) == of["de"]
    assert names(found.validation["two"]) == of["en"] | of["la"]
    assert names(found.validation["markov"]) == everything - set(LANGUAGE_OF) != set()
    assert [len(rows) for name, rows in found.validation.items() if name.startswith("each")] == [7, 7, 7, 7, 7]
    assert names(found.validation["each-de"]) <= of["de"]


def test_groups_of_a_set_are_chosen_on_the_command_line(tmp_path):
    data = DataConfig((grouped(tmp_path),), holdout=0.2, seq_len=32, cache_dir=str(tmp_path / "cache"))
    changed = override(data, {"validation.0.groups": "de,la", "validation.0.by_group": "true"})
    found = pipeline.prepare(changed, 261, 0, quiet=True).validation
    assert list(found) == ["heldout", "heldout-de", "heldout-la"]
    assert names(found["heldout"]) == names(found["heldout-de"]) | names(found["heldout-la"])


def test_a_group_of_which_nothing_is_held_out_has_no_set(tmp_path, warnings):
    rows = [{"text": f"document {i} of many", "lang": "en"} for i in range(60)] + [{"text": "alone", "lang": "fr"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    source = Source("jsonl", {"paths": str(tmp_path / "rows.jsonl"), "group_by": "lang"})
    data = DataConfig((source,), holdout=0.1, cache_dir=str(tmp_path), validation=(Validation(by_group=True),))
    assert documents.split("rows.jsonl#000000060", 0.1) == "train"
    assert list(pipeline.prepare(data, 261, 0, quiet=True).validation) == ["heldout", "heldout-en"]
    assert [line for line in warnings if "heldout-fr" in line] == warnings
    with pytest.raises(InputError, match="for the set 'french'"):
        pipeline.prepare(dataclasses.replace(data, validation=(Validation("french", groups=("fr",)),)), 261, 0, quiet=True)


def test_groups_of_a_set_of_its_own_sources(tmp_path, warnings):
    (tmp_path / "theirs").mkdir()
    write_jsonl(tmp_path / "theirs" / "rows.jsonl", make_rows(240, seed=1))
    theirs = Source("jsonl", {"paths": str(tmp_path / "theirs" / "*.jsonl"), "group_by": "lang"})
    joined = Source("jsonl", {"paths": str(tmp_path / "theirs" / "*.jsonl")})
    sets = (Validation("whole", (theirs,)), Validation("joined", (joined,)),
            Validation("apart", (theirs,), groups=("de", "la"), by_group=True))
    data = DataConfig((grouped(tmp_path),), holdout=0.0, seq_len=32, cache_dir=str(tmp_path / "cache"), validation=sets)
    found = pipeline.prepare(data, 261, 0, quiet=True).validation
    assert list(found) == ["whole", "joined", "apart", "apart-de", "apart-la"]
    assert rows_equal(found["whole"], found["joined"])
    for label in ("de", "la"):
        assert names(found[f"apart-{label}"]) == {name for name in LANGUAGE_OF if LANGUAGE_OF[name] == label}
    assert names(found["apart"]) == names(found["apart-de"]) | names(found["apart-la"]) and not warnings


@pytest.mark.parametrize("own,wanted,field,words", [
    (None, {"groups": ("df",)}, "data.validation.1.groups", "'df'; did you mean de?"),
    ("grouped", {"groups": ("1:synthetic",)}, "data.validation.1.groups", "'1:synthetic'; known: de, en, la"),
    ("weighted", {}, "data.validation.1.sources.0.args.group_weights", "the set is read whole"),
    ("plain", {"by_group": True}, "data.validation.1.by_group", "group_by"),
    (None, {"name": "held", "by_group": True}, "data.validation.1", "another set 'held-de'"),
])
def test_a_bad_set_names_its_field(tmp_path, own, wanted, field, words):
    (tmp_path / "other").mkdir()
    sources = {None: (), "grouped": (grouped(tmp_path / "other"),), "plain": (Source("synthetic"),),
               "weighted": (grouped(tmp_path / "other", group_weights={"en": 1, "de": 0, "la": 0}),)}
    sets = (Validation("held-de"), Validation(**{"name": "v", "sources": sources[own], **wanted}))
    data = DataConfig((grouped(tmp_path),), holdout=0.1, cache_dir=str(tmp_path / "cache"), validation=sets)
    with pytest.raises(InputError) as caught:
        pipeline.prepare(data, 261, 0, quiet=True)
    assert caught.value.field == field and words in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(pipeline.logging, "warning", lambda line, *values: lines.append(line % values))
    return lines


@pytest.mark.parametrize("shares", ["the files", "a copy of one of them", "a group", "nothing"])
def test_a_set_that_reads_what_is_trained_on_is_told(corpus, tmp_path, warnings, shares):
    one = next(path for path in corpus.glob("*.txt") if documents.split(path.name, 0.1) == "train")
    shutil.copy(one, tmp_path / "copy.txt")
    fresh = write_corpus(tmp_path / "fresh", files=30, seed=1)
    text, lines = Source("text", {"paths": f"{corpus}/**/*.txt"}), grouped(tmp_path)
    sources = {"the files": text, "a group": grouped(tmp_path, groups="de"),
               "nothing": Source("text", {"paths": f"{fresh}/*.txt"}),
               "a copy of one of them": Source("text", {"paths": (f"{fresh}/*.txt", str(tmp_path / "copy.txt"))})}
    # Of the same file, but only the documents of another group are trained on.
    english = dataclasses.replace(lines, args={**lines.args, "groups": ("en",)})
    apart = Validation("apart", (dataclasses.replace(lines, args={**lines.args, "groups": ("la",)}),))
    trained = (text, lines if shares == "a group" else english)
    data = config(corpus, tmp_path / "cache", tokenizer="bytes", sources=trained, validation=(
        *(() if shares == "a group" else (apart,)), Validation("leaks", (sources[shares],))))
    pipeline.prepare(data, 261, 0, quiet=True)
    if shares == "nothing":
        assert not warnings
    else:
        line, = warnings
        assert "'leaks'" in line and "are trained on, word for word" in line and "\n" not in line


@pytest.mark.parametrize("tokenizer,size", [("bytes", 261), ("sentencepiece:320", 320)])
def test_a_vocabulary_larger_than_the_models_is_refused_before_anything_is_tokenised(corpus, tmp_path, tokenizer, size):
    data = config(corpus, tmp_path / "cache", tokenizer=tokenizer)
    with pytest.raises(InputError, match=f"is below the {size} of {tokenizer}; set model.vocab_size={size}") as caught:
        pipeline.prepare(data, size - 1, 0, quiet=True)
    assert caught.value.field == "model.vocab_size" and not (tmp_path / "cache").exists()


def test_ids_that_no_text_has_are_told(corpus, tmp_path, warnings):
    for size, told in ((2 * 261, []), (2 * 261 + 1, ["model.vocab_size=523, and bytes has 261 ids: no text has the others"])):
        pipeline.prepare(config(corpus, tmp_path, tokenizer="bytes"), size, 0, quiet=True)
        assert warnings == told


def test_weights_that_are_nothing_name_the_source_not_its_part(tmp_path):
    gone = Source("synthetic", {"documents": 50, "length": 80}, at_samples=(0, 9), later_weights=(0.0, 0.0))
    data = DataConfig((grouped(tmp_path), gone), holdout=0.1, seq_len=32, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="later_weights: are nothing from sample 0 on; leave the source out") as caught:
        pipeline.prepare(data, 261, 0, quiet=True)
    assert caught.value.field == "data.sources.1.later_weights"


def test_a_schedule_reaches_the_loader(tmp_path):
    one = Source("synthetic", {"documents": 50, "length": 80})
    late = Source("synthetic", {"documents": 50, "length": 80, "seed": 1}, at_samples=(0, 4096), later_weights=(0, 1))
    data = DataConfig((one, late), holdout=0.1, seq_len=32, cache_dir=str(tmp_path))
    prepared = pipeline.prepare(data, 261, 0, quiet=True)
    assert prepared.weights == (1.0, ((0, 0.0), (4096, 1.0)))
    loader = Loader(prepared.train, prepared.weights, 0, 8)
    try:
        assert next(loader)["tokens_BxL"].shape == (1, 8, 32)
    finally:
        loader.close()
    for changes, field in (({"at_samples": (5,)}, "later_weights"),
                           ({"at_samples": (5, 5), "later_weights": (1, 2)}, "at_samples")):
        with pytest.raises(InputError) as caught:
            Source("synthetic", **changes)
        assert caught.value.field == field
    gone = dataclasses.replace(one, at_samples=(10,), later_weights=(0.0,))
    with pytest.raises(InputError, match="sum to nothing"):
        pipeline.prepare(dataclasses.replace(data, sources=(gone,)), 261, 0, quiet=True)


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_a_directory_is_a_tokenizer(corpus, tmp_path, kind):
    trained = pipeline.train_tokenizer(config(corpus, tmp_path), kind, 330, chat=True, quiet=True)
    trained.save(tmp_path / "mine")
    data = config(corpus, tmp_path, tokenizer=str(tmp_path / "mine"))
    prepared = pipeline.prepare(data, 400, 0, quiet=True)
    assert prepared.tokenizer.fingerprint() == trained.fingerprint() and len(prepared.tokenizer.chat_ids) == 3
    with pytest.raises(InputError, match="below the 330") as caught:
        pipeline.prepare(data, 300, 0, quiet=True)
    assert caught.value.field == "model.vocab_size"
    (tmp_path / "mine" / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="whole tokenizer") as caught:
        pipeline.prepare(data, 400, 0, quiet=True)
    assert caught.value.field == "data.tokenizer"


@pytest.mark.parametrize("changes,field", [
    ({"sources": (Source("books"),)}, "data.sources.0.name"),
    ({"sources": (Source("synthetic"), Source("text", {"paths": "/no"}))}, "data.sources.1.args.paths.0"),
    ({"sources": (Source("synthetic", {"lenght": 3}),)}, "data.sources.0.args.lenght"),
    ({"sources": (Source("text", {"paths": "{empty}"}),)}, "data.sources.0"),
    ({"validation": (Validation("v", (Source("text", {"paths": "/no"}),)),)},
     "data.validation.0.sources.0.args.paths.0"),
    ({"sources": (Source("jsonl", {"paths": "{bad}"}),)}, "data.sources.0.args.paths"),
    ({"sources": (Source("jsonl", {"paths": "{rows}", "group_by": "lang", "groups": "fr"}),)}, "data.sources.0.args.groups"),
    ({"sources": (Source("jsonl", {"paths": "{rows}", "group_by": "lang", "group_weights": {"fr": 1}}),)},
     "data.sources.0.args.group_weights.fr"),
    ({"tokenizer": "no/such/directory"}, "data.tokenizer"), ({"tokenizer": "huggingface"}, "data.tokenizer"),
    ({"tokenizer": "sentencepeice"}, "data.tokenizer"),
    ({"tokenizer": "sentencepiece:60000"}, "data.tokenizer"),
    ({"holdout": 0.0}, "data.holdout"),
    ({"holdout": 0.9999999}, "data.sources.0"),
])
def test_bad_input_names_its_field(corpus, tmp_path, changes, field):
    (tmp_path / "empty.txt").write_bytes(b"\n")
    (tmp_path / "bad.jsonl").write_bytes(b"{\n")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(20))
    files = {"{empty}": "empty.txt", "{bad}": "bad.jsonl", "{rows}": "rows.jsonl"}
    data = config(corpus, tmp_path / "cache", tokenizer="bytes")
    if "sources" in changes:
        changes = {"sources": tuple(Source(s.name, {k: str(tmp_path / files[v]) if k == "paths" and v in files else v
                                                    for k, v in s.args.items()})
                                    for s in changes["sources"])}
    data = DataConfig(**{**{name: getattr(data, name) for name in data.__dataclass_fields__}, **changes})
    with pytest.raises(InputError) as caught:
        pipeline.prepare(data, 60000, 0, quiet=True)
    assert caught.value.field == field and "\n" not in str(caught.value)
