"""The battery that every source passes, and what each of them promises besides."""

import io
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from research.data import documents, sourcecode, synthetic
from research.data.sources import SOURCES, make_source
from research.errors import InputError
from tests.data.corpora import write_corpus
from tests.data.record_files import write_all

# name of the case -> (source, args); `{}` in an argument is the test's directory.
CASES = {
    "sourcecode": ("sourcecode", {"packages": False, "max_bytes": 300_000}),
    "text": ("text", {"paths": ("{}/**/*.txt",)}),
    "text by line": ("text", {"paths": "{}/**/*.txt", "split_on": "line"}),
    "text by blank line": ("text", {"paths": ("{}/*.txt", "{}/deep/*.txt"), "split_on": "blank_line"}),
    "jsonl": ("jsonl", {"paths": "{}/*.jsonl"}),
    "jsonl gzipped": ("jsonl", {"paths": "{}/?.jsonl.gz", "field": "title"}),
    "jsonl template": ("jsonl", {"paths": "{}/*.jsonl", "template": "{title}\n{meta.id} {{{text}}}"}),
    "jsonl groups": ("jsonl", {"paths": "{}/*.jsonl", "group_by": "lang", "groups": ("en", "la")}),
    "parquet": ("parquet", {"paths": "{}/*.parquet"}),
    "parquet template": ("parquet", {"paths": "{}/*.parquet", "template": "{meta.id}: {text}", "group_by": "lang"}),
    "arrayrecord text": ("arrayrecord", {"paths": "{}/*.text.array_record"}),
    "arrayrecord json": ("arrayrecord", {"paths": "{}/*.json.array_record", "format": "json", "field": "title"}),
    "tfds": ("tfds", {"dataset": "rung_rows", "data_dir": "{}/tfds"}),
    "tfds slice": ("tfds", {"dataset": "rung_rows", "data_dir": "{}/tfds", "split": "train[:50%]", "template": "{title}"}),
    "huggingface": ("huggingface", {"dataset": "{}/saved"}),
    "synthetic markov": ("synthetic", {"documents": 30, "length": 50}),
    "synthetic copy": ("synthetic", {"documents": 30, "length": 50, "kind": "copy"}),
}


def build(case: str, directory: pathlib.Path):
    name, args = CASES[case]
    if name == "huggingface":
        pytest.importorskip("datasets")

    def fill(value):
        if isinstance(value, tuple):
            return tuple(map(fill, value))
        return value.replace("{}", str(directory)) if isinstance(value, str) else value

    return make_source(name, {key: fill(value) for key, value in args.items()}, str(directory / "cache"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return write_all(write_corpus(tmp_path_factory.mktemp("corpus")))


def test_every_source_has_a_case():
    assert {name for name, _ in CASES.values()} == set(SOURCES)


@pytest.mark.parametrize("case", CASES)
def test_source_is_deterministic_in_order_of_names(case, corpus):
    source, again = build(case, corpus), build(case, corpus)
    assert len(source) == len(again) > 5
    found = [source.document(i) for i in range(len(source))]
    assert [again.document(i) for i in reversed(range(len(source)))] == found[::-1]
    ids = [document.id for document in found]
    assert ids == [source.document_id(i) for i in range(len(source))]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert not any(name.startswith("/") or str(corpus) in name for name in ids)
    assert source.fingerprint() == again.fingerprint() and len(source.fingerprint()) == 64
    with pytest.raises(IndexError):
        source.document(len(source))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("text")])
def test_text_fingerprint_moves_with_the_directory_and_sees_every_change(case, tmp_path):
    here = write_corpus(tmp_path / "here")
    before = build(case, here).fingerprint()
    there = tmp_path / "some" / "where else"
    shutil.copytree(here, there)  # other paths, other times of change
    assert build(case, there).fingerprint() == before
    assert [build(case, there).document(i) for i in (0, 3)] == [build(case, here).document(i) for i in (0, 3)]
    (there / "001.txt").write_bytes((there / "001.txt").read_bytes()[:-1] + b"!")
    changed = build(case, there).fingerprint()
    (there / "001.txt").rename(there / "0011.txt")
    assert len({before, changed, build(case, there).fingerprint()}) == 3


@pytest.mark.parametrize("split_on,expected", [
    ("file", ["a\r\n\r\n b\n\n\n \nc\n"]), ("blank_line", ["a", " b", "c\n"]), ("line", ["a", " b", "c"])])
def test_text_splits(split_on, expected, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\r\n\r\n b\n\n\n \nc\n")
    source = make_source("text", {"paths": str(tmp_path / "x.txt"), "split_on": split_on})
    assert [source.document(i).text for i in range(len(source))] == expected
    assert source.document_id(0) == ("x.txt" if split_on == "file" else "x.txt#000000000")


def test_split_holds_out_the_share_and_depends_on_the_name_alone():
    names = [f"stdlib/file{i}.py" for i in range(4000)]
    assert not [n for n in names if documents.split(n, 0.0) == "validation"]
    held = {share: {n for n in names if documents.split(n, share) == "validation"} for share in (0.05, 0.2)}
    assert held[0.05] < held[0.2]
    # Written down: a held-out document must stay held out, or old runs have trained on it.
    assert [n for n in names[:30] if n in held[0.2]] == [f"stdlib/file{i}.py" for i in (7, 13, 27, 29)]
    assert len(held[0.05]) / 4000 == pytest.approx(0.05, abs=0.015)
    assert len(held[0.2]) / 4000 == pytest.approx(0.2, abs=0.03)


def test_a_document_keeps_its_side_as_long_as_its_name(tmp_path):
    """As documents.split says: below the common directory nothing moves, a file from outside it renames all."""
    write_corpus(tmp_path / "in")
    paths = [str(tmp_path / "in" / "**" / "*.txt")]

    def sides() -> dict[str, str]:
        source = make_source("text", {"paths": tuple(paths)})
        return {source.document(i).text: documents.split(source.document_id(i), 0.3) for i in range(len(source))}

    before = sides()
    (tmp_path / "in" / "new").mkdir()
    (tmp_path / "in" / "new" / "x.txt").write_text("new")
    assert {text: side for text, side in sides().items() if text != "new"} == before
    (tmp_path / "out.txt").write_text("out")
    paths.append(str(tmp_path / "out.txt"))
    assert {text: side for text, side in sides().items() if text in before} != before


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("case", ["text", "jsonl", "jsonl groups", "parquet", "arrayrecord json"])
def test_a_long_first_look_shows_a_bar_on_a_terminal(case, corpus, monkeypatch):
    def shown(stderr: io.StringIO) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stderr)
            len(build(case, corpus))
        return stderr.getvalue()

    assert shown(Terminal()) == ""  # it was quick
    monkeypatch.setattr(documents, "_PROGRESS_AFTER", 0.0)
    last = shown(Terminal()).splitlines()[-1]
    assert "reading" in last and ("40/40" in last if case == "text" else "60row" in last)
    assert case == "text" or "2 of 2: 1." in last
    assert shown(io.StringIO()) == ""


def test_sourcecode_subset_is_spread_nested_and_as_large_as_asked():
    small, large = (make_source("sourcecode", {"packages": False, "max_bytes": size})
                    for size in (400_000, 1_500_000))
    ids = [{source.document_id(i) for i in range(len(source))} for source in (small, large)]
    assert ids[0] < ids[1]
    texts = [small.document(i).text for i in range(len(small))]
    assert 400_000 <= sum(len(text.encode()) for text in texts) < 1_500_000
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)
    assert len({name.split("/")[1] for name in ids[1]}) > 20
    held = [name for name in ids[1] if documents.split(name, 0.1) == "validation"]
    # Taken in the order of the split's own hash, all of it would be held out.
    assert 0 < len(held) < len(ids[1]) / 3


def test_sourcecode_leaves_out_tests_and_bad_files(tmp_path, monkeypatch):
    for name, content in {
        "json/decoder.py": b"x = 1\r\n", "copy.py": b"x = 1\r\n", "empty.py": b" \n", "latin.py": b"# \xe9\n",
        "test/a.py": b"a", "json/tests/b.py": b"b", "site-packages/c.py": b"c", "dist-packages/d.py": b"d",
        "__pycache__/e.py": b"e", "numpy/testing/h.py": b"h", "notes.txt": b"f", "idlelib/idle_test/g.py": b"g",
        "unittest/case.py": b"# case\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sourcecode.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    source = make_source("sourcecode", {"packages": False})
    texts = {source.document_id(i): source.document(i).text for i in range(len(source))}
    assert sorted(texts.values()) == ["# case\n", "x = 1\r\n"]  # the line ends as they are
    assert "stdlib/unittest/case.py" in texts and len(texts) == 2


def test_sourcecode_reads_the_packages_of_the_closure(monkeypatch):
    monkeypatch.setattr(sourcecode, "_ROOT", "pytest")
    names = sourcecode._requirements("pytest")
    assert "pluggy" in names and "pytest" not in names and "colorama" not in names  # the last is for Windows
    assert not {"hypothesis", "xmlschema"} & set(names)  # extras
    source = make_source("sourcecode", {})
    ids = [source.document_id(i) for i in range(len(source))]
    assert "pluggy/_manager.py" in ids and "stdlib/json/decoder.py" in ids
    assert not [name for name in ids if name.startswith(("_pytest/", "pytest/")) or "site-packages" in name]


def test_sourcecode_leaves_out_the_tests_of_packages(monkeypatch):
    monkeypatch.setattr(sourcecode, "_requirements", lambda root: ["numpy"])
    names = sourcecode._packages()
    assert "numpy/__init__.py" in names and "numpy/lib/_npyio_impl.py" in names
    assert not [name for name in names if {"tests", "test", "testing"} & set(name.split("/")[:-1])]


def test_requirements_follow_markers_extras_and_cycles(monkeypatch):
    table = {
        "root": ["A_a>=1", "gone", 'no; python_version < "3"', 'opt; extra == "opt"'],
        "a-a": ["b[fast]", "root"],
        "b": ["a.a", 'c; extra == "fast"', 'd; extra == "slow"'], "c": None,
    }

    def requires(name):
        if name not in table:
            raise sourcecode.importlib.metadata.PackageNotFoundError(name)
        return table[name]

    fake = types.SimpleNamespace(requires=requires, distribution=requires,
                                 PackageNotFoundError=sourcecode.importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(sourcecode, "importlib", types.SimpleNamespace(metadata=fake))
    assert sourcecode._requirements("root") == ["a-a", "b", "c"]


def test_markov_has_the_entropy_it_names():
    source = make_source("synthetic", {"documents": 200, "length": 500})
    counts = np.zeros((16, 16))
    for i in range(len(source)):
        codes = [synthetic.ALPHABET.index(c) for c in source.document(i).text]
        assert len(codes) == 500
        np.add.at(counts, (codes[:-1], codes[1:]), 1)
    p = counts / counts.sum(1, keepdims=True)
    entropy = -(counts / counts.sum() * np.log2(np.where(p, p, 1))).sum()
    assert entropy == pytest.approx(synthetic.MARKOV_BITS, abs=0.01)
    other = make_source("synthetic", {"documents": 200, "length": 500, "seed": 1})
    assert other.document(0) != source.document(0) and other.fingerprint() != source.fingerprint()


@pytest.mark.parametrize("length", [3, 4, 51])
def test_copy_copies(length):
    source = make_source("synthetic", {"documents": 3, "length": length, "kind": "copy"})
    for i in range(3):
        text = source.document(i).text
        first, second = text.split("=")
        assert len(text) == length and first == second.rstrip() != ""


@pytest.mark.parametrize("name,args,field,words", [
    ("txt", {}, "name", "did you mean text"),
    ("text", {}, "args.paths", "missing"),
    ("text", {"path": "x"}, "args.path", "did you mean paths"),
    ("text", {"paths": ()}, "args.paths", "empty"),
    ("text", {"paths": 3}, "args.paths", "list of text"),
    ("text", {"paths": "x", "split_on": "word"}, "args.split_on", "word"),
    ("synthetic", {"length": 0}, "args.length", "at least 1"),
    ("synthetic", {"kind": "copy", "length": 2}, "args.length", "short"),
    ("synthetic", {"documents": "many"}, "args.documents", "whole number"),
    ("sourcecode", {"max_bytes": -1}, "args.max_bytes", "at least 1"),
])
def test_bad_arguments_name_the_field(name, args, field, words):
    with pytest.raises(InputError) as caught:
        make_source(name, args)
    assert caught.value.field == field and words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_name_the_field(tmp_path, monkeypatch):
    (tmp_path / "bad.txt").write_bytes(b"ok \xff")
    for path, field, words in (
            (tmp_path / "no.txt", "paths.0", "no file"), (tmp_path, "paths.0", "directory"),
            (tmp_path / "*.md", "paths.0", "no file"), (tmp_path / "bad.txt", "paths", "UTF-8")):
        with pytest.raises(InputError, match=words) as caught:
            len(make_source("text", {"paths": str(path)}))
        assert caught.value.field == field
    monkeypatch.setattr(sourcecode, "_ROOT", "no-such-distribution")
    with pytest.raises(InputError, match="pip install -e .") as caught:
        len(make_source("sourcecode", {}))
    assert caught.value.field == "packages"
