"""Every source trains the debug preset, from real files that the test makes; nothing depends on where they or the cache lie."""

import json
import shutil

import pytest

from configs import preset
from research.config import override
from research.data.sources import SOURCES
from research.schema import Source
from research.training.loop import run
from research.training.session import Launch
from tests.data.corpora import write_corpus
from tests.data.record_files import make_rows, write_all

ARGS = {
    "sourcecode": {"packages": False, "max_bytes": 100_000}, "text": {"paths": "{}/**/*.txt"}, "synthetic": {"documents": 60},
    "jsonl": {"paths": "{}/*.jsonl.gz", "group_by": "lang"},
    "parquet": {"paths": "{}/*.parquet", "template": "{title}: {text}"},
    "arrayrecord": {"paths": "{}/*.text.array_record"}, "tfds": {"dataset": "rung_rows", "data_dir": "{}/tfds"},
    "huggingface": {"dataset": "{}/saved"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_all(write_corpus(tmp_path_factory.mktemp("corpus")), make_rows(60))


def train(sources: tuple[Source, ...], directory, cache, **changes) -> dict:
    """result.json of a few steps in a run directory of their own."""
    config = override(preset("debug"), {
        "data.sources": sources, "data.cache_dir": str(cache), "data.seq_len": 32, "data.validation.0.max_rows": 4,
        "train.steps": 6, "train.log_every": 2, "model.dim": 16, **changes})
    run(config, Launch(str(directory), preset("debug"), quiet=True))
    return json.loads((directory / "result.json").read_text())


def source(name: str, corpus, **fields) -> Source:
    if name == "huggingface":
        pytest.importorskip("datasets")
    args = {key: value.replace("{}", str(corpus)) if isinstance(value, str) else value for key, value in ARGS[name].items()}
    return Source(name, args, **fields)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_trains(name, corpus, tmp_path):
    result = train((source(name, corpus),), tmp_path / "run", tmp_path / "cache")
    assert result["status"] == "finished" and result["steps"] == 6 and result["samples"] == 24
    assert 2.0 < result["final_eval_loss"] < 6.0  # ln 264 is 5.6


def test_results_are_the_same_after_moving_the_cache_and_the_files(corpus, tmp_path):
    changes = {"data.tokenizer": "sentencepiece:320", "model.vocab_size": 320}

    def mixture(directory):
        return (source("jsonl", directory, weight=2.0), source("parquet", directory, at_samples=(16,), later_weights=(3.0,)),
                source("text", directory))

    first = train(mixture(corpus), tmp_path / "first", tmp_path / "cache", **changes)
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere" / "cache")
    moved = train(mixture(corpus), tmp_path / "moved", tmp_path / "elsewhere" / "cache", **changes)
    shutil.copytree(corpus, tmp_path / "files")
    anew = train(mixture(tmp_path / "files"), tmp_path / "anew", tmp_path / "new cache", **changes)
    assert first["params_sha256"] == moved["params_sha256"] == anew["params_sha256"]
    assert first["final_eval"] == moved["final_eval"] == anew["final_eval"]
    files = {path.name for path in (tmp_path / "elsewhere" / "cache").iterdir()}
    assert files == {path.name for path in (tmp_path / "new cache").iterdir()}  # keys know no paths
