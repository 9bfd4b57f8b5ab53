"""From a config to rows, end to end, and each bad input as one line that names its field."""

import dataclasses

import numpy as np
import pytest

from research.data import pipeline
from research.data.loader import Loader, evaluation_batches
from research.data.mixture import Mixture
from research.errors import InputError
from research.schema import DataConfig, Source, Validation
from tests.data.corpora import write_corpus
from tests.data.record_files import make_rows, write_jsonl


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
        pipeline.prepare(data, 320, 0, quiet=True)
    assert caught.value.field == field and "\n" not in str(caught.value)
