"""prepare_data and train_tokenizer, as a person runs them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from research.data.tokenizer import load_tokenizer
from research.schema import EXIT_BAD_INPUT
from tests.data.corpora import write_corpus
from tests.data.record_files import make_rows, write_jsonl

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "corpus")
    rows = make_rows(300)
    write_jsonl(home / "good.jsonl", rows)
    write_jsonl(home / "rows.jsonl", [*rows[:70], "broken", *rows[70:]])
    return home


def call(home, module: str, *arguments: str, killed_after: int | None = None) -> subprocess.CompletedProcess:
    """killed_after: the process dies, as by a signal, when it writes that part of the cache."""
    env = {**os.environ, "RUNG_CACHE": str(home), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", module, *arguments]
    if killed_after is not None:
        code = ("import os, runpy, sys\nfrom research.data import cache\ncache._PART_DOCUMENTS = 64\n"
                "write = cache._write_part\n"
                f"def dying(source, chosen, *rest):\n    if chosen.start >= {killed_after}: os._exit(9)\n"
                "    write(source, chosen, *rest)\n"
                f"cache._write_part = dying\nsys.argv = {[module, *arguments]!r}\n"
                f"runpy.run_module({module!r}, run_name='__main__')\n")
        command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=env, timeout=300)


def rows_of(home, cache: str, file: str = "good.jsonl", **args) -> list[str]:
    args = json.dumps({"paths": f"{home}/{file}", **args})
    return ["--config=debug", f"--set=data.cache_dir={home / cache}", "--set=data.sources.0.name=jsonl",
            f"--set=data.sources.0.args={args}"]


def test_prepare_data_says_what_is_in_the_cache_and_goes_on_after_a_kill(home):
    whole = call(home, "tools.prepare_data", "--json", *rows_of(home, "whole"))
    assert whole.returncode == 0, whole.stderr
    report = json.loads(whole.stdout)
    assert report["tokens"] == report["bytes"] + 2 * report["documents"]  # bytes, <s>, </s>
    assert report["documents"] == sum(part["documents"] for part in report["parts"]) > 30 and report["seconds"] > 0
    assert len(report["hash"]) == 64 and report["rows"] == report["parts"][0]["rows"] and report["validation"]["heldout"] > 0

    dead = call(home, "tools.prepare_data", *rows_of(home, "killed"), killed_after=64)
    assert dead.returncode == 9
    (parts,) = (home / "killed").glob("tokens-*-parts-64")
    (part,) = (path for path in parts.iterdir() if not path.name.startswith("."))
    first = (part / "meta.json").stat().st_ino
    dead = call(home, "tools.prepare_data", *rows_of(home, "killed"), killed_after=192)
    assert dead.returncode == 9 and (part / "meta.json").stat().st_ino == first  # not written again
    assert len([path for path in parts.iterdir() if not path.name.startswith(".")]) == 3
    again = call(home, "tools.prepare_data", "--json", *rows_of(home, "killed"), killed_after=10**9)
    assert again.returncode == 0, again.stderr
    assert {**json.loads(again.stdout), "seconds": 0} == {**report, "seconds": 0}
    assert not list((home / "killed").glob("*parts*"))


def test_prepare_data_stops_at_a_bad_row_or_counts_it(home):
    stopped = call(home, "tools.prepare_data", *rows_of(home, "bad", "rows.jsonl"))
    assert stopped.returncode == EXIT_BAD_INPUT
    assert stopped.stderr.startswith("error: data.sources.0.args.paths: rows.jsonl, row 70: isn't JSON"), stopped.stderr
    assert stopped.stderr.count("\n") == 1 and not list((home / "bad").glob("tokens*"))
    skipped = call(home, "tools.prepare_data", "--json", *rows_of(home, "bad", "rows.jsonl", on_error="skip", group_by="lang"),
                   "--set=data.validation.0.by_group=true", "--set=data.holdout=0.2")
    assert skipped.returncode == 0 and "left out 1 bad rows of 301; the first: rows.jsonl, row 70" in skipped.stderr
    parts, sets = (json.loads(skipped.stdout)[key] for key in ("parts", "validation"))
    assert list(sets) == ["heldout", "heldout-de", "heldout-en", "heldout-la"] and all(sets.values())
    assert [part["name"] for part in parts] == ["0:jsonl/de", "0:jsonl/en", "0:jsonl/la"]
    assert all(part["skipped"] == 1 for part in parts) and sum(part["weight"] for part in parts) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_train_tokenizer_gives_a_directory_that_a_run_uses(home, kind):
    if kind == "wordpiece":
        pytest.importorskip("tokenizers")
    size = 530 if kind == "wordpiece" else 310
    output = home / f"tokenizer-{kind}"
    done = call(home, "tools.train_tokenizer", f"--paths={home}/corpus/**/*.txt", f"--kind={kind}", f"--vocab_size={size}",
                f"--output={output}", "--chat", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["vocab_size"] == size and report["chat_ids"]["<|user|>"] == 5 and report["bytes_per_token"] > 1
    tokenizer = load_tokenizer(output)
    assert tokenizer.fingerprint() == report["fingerprint"]
    ids = tokenizer.encode("def f(x): # é <|user|>")
    assert ids.min() > 7 and tokenizer.decode(ids) == "def f(x): # é <|user|>"
    assert json.loads((output / "tokenizer.json").read_text())["specials"] == ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    arguments = [*rows_of(home, "with-" + kind), f"--set=data.tokenizer={output}", f"--set=model.vocab_size={size}", "--json"]
    used = call(home, "tools.prepare_data", *arguments)
    assert used.returncode == 0 and json.loads(used.stdout)["tokenizer"] == report["fingerprint"], used.stderr


def test_train_tokenizer_on_a_preset_measures_on_what_is_held_out(home):
    done = call(home, "tools.train_tokenizer", "--config=debug", f"--set=data.cache_dir={home}", "--vocab_size=280",
                f"--output={home}/preset", "--sample_bytes=20000", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["measured_on"] == "validation", done.stderr
    assert json.loads(done.stdout)["chat_ids"] == {}


@pytest.mark.parametrize("module,arguments,words", [
    ("tools.prepare_data", [], "--config: is missing"),
    ("tools.prepare_data", ["--config=debug", "--set=data.sources.0.name=jsnl"], "did you mean jsonl"),
    ("tools.prepare_data", ["--config=debug", "--set=model.vocab_size=100"], "model.vocab_size"),
    ("tools.train_tokenizer", ["--config=debug"], "--output: is missing"),
    ("tools.train_tokenizer", ["--output={}/x"], "--config: give either"),
    ("tools.train_tokenizer", ["--output={}/x", "--paths={}/corpus/*.txt"], "--vocab_size: is missing"),
    ("tools.train_tokenizer", ["--output={}/x", "--paths={}/no/*.txt", "--vocab_size=300"], "no file matches"),
    ("tools.train_tokenizer", ["--output={}/x", "--paths={}/corpus/*.txt", "--vocab_size=100"], "262"),
    ("tools.train_tokenizer", ["--output={}/x", "--paths={}/corpus/*.txt", "--vocab_size=90000"], "larger than the corpus"),
    ("tools.train_tokenizer", ["--output={}/kept", "--config=debug"], "holds a tokenizer already"),
])
def test_bad_input_is_one_line(home, module, arguments, words):
    (home / "kept").mkdir(exist_ok=True)
    (home / "kept" / "tokenizer.json").write_text("mine")
    done = call(home, module, *(argument.replace("{}", str(home)) for argument in arguments))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == EXIT_BAD_INPUT and len(errors) == 1 and words in errors[0], done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert (home / "kept" / "tokenizer.json").read_text() == "mine" and not (home / "x").exists()
