"""Rows to documents: bad rows, templates, groups, remote and packed files, data sets that aren't there."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from research.data.sources import make_source
from research.errors import InputError
from tests.data.record_files import (
    make_rows,
    write_all,
    write_arrayrecord,
    write_huggingface,
    write_jsonl,
    write_parquet,
)

ROWS = make_rows(12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return write_all(tmp_path_factory.mktemp("records"))


def texts(source) -> list[str]:
    return [source.document(i).text for i in range(len(source))]


def ids(source) -> list[str]:
    return [source.document_id(i) for i in range(len(source))]


# Sources --------------------------------------------------------------------------------------------------------------

KINDS = {
    "jsonl": {"paths": "{}/*.jsonl"}, "parquet": {"paths": "{}/*.parquet"},
    "arrayrecord": {"paths": "{}/*.json.array_record", "format": "json"},
    "tfds": {"dataset": "rung_rows", "data_dir": "{}/tfds"}, "huggingface": {"dataset": "{}/saved"},
}


def make(kind: str, directory: pathlib.Path, **args):
    if kind == "huggingface":
        pytest.importorskip("datasets")
    filled = {key: value.replace("{}", str(directory)) for key, value in KINDS[kind].items()}
    return make_source(kind, {**filled, **args}, str(directory / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_rows_that_were_written(kind, corpus):
    expected = [row["text"] for row in make_rows()]
    found = texts(make(kind, corpus))
    assert sorted(found) == sorted(expected)
    assert found == expected or kind == "tfds"  # which shuffles when it prepares


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_means_the_same_after_a_move(kind, corpus, tmp_path):
    before = make(kind, corpus)
    shutil.copytree(corpus, tmp_path / "some where", ignore=shutil.ignore_patterns("cache"))
    after = make(kind, tmp_path / "some where")
    assert after.fingerprint() == before.fingerprint() and ids(after) == ids(before) and texts(after) == texts(before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fills_templates_and_groups_by_a_field(kind, corpus):
    source = make(kind, corpus, template="{title} of {meta.id}\n{{{lang}}}", group_by="lang")
    assert "title 7 of 7\n{en}" in texts(source)
    groups = source.grouped()
    assert {name: len(group) for name, group in groups.items()} == {"en": 30, "de": 20, "la": 10}
    assert list(groups) == sorted(groups)
    assert all(text.endswith(f"{{{name}}}") for name, group in groups.items() for text in texts(group))
    assert sorted(sum(map(ids, groups.values()), [])) == ids(source)
    assert len({group.fingerprint() for group in groups.values()}) == 3
    some = make(kind, corpus, group_by="lang", groups=("de",))
    assert len(some) == 20 and list(some.grouped()) == ["de"]
    weighted = make(kind, corpus, group_by="lang", group_weights={"en": 1, "de": 0, "la": 2.5})
    assert list(weighted.grouped()) == ["en", "la"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_names_a_field_that_is_missing(kind, corpus):
    argument = "column" if kind == "parquet" else "field"
    with pytest.raises(InputError, match="did you mean title") as caught:
        len(make(kind, corpus, **{argument: "titel"}))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="lang"):
        len(make(kind, corpus, group_by="lnag"))
    with pytest.raises(InputError, match="both given"):
        make(kind, corpus, template="{title}", **{argument: "title"})


# Bad rows -------------------------------------------------------------------------------------------------------------

def bad_file(kind: str, directory: pathlib.Path) -> tuple[dict, int, str]:
    """(args, the bad row's number, words of the problem)."""
    path = directory / f"shard.{kind}"
    args = {"paths": str(path)}
    rows = list(ROWS)
    if kind == "broken json":
        return {**args, "paths": str(write_jsonl(path, [*rows[:3], '{"text": "cut', *rows[3:]]))}, 3, "isn't JSON"
    if kind == "not utf-8":
        return {"paths": str(write_jsonl(path, [*rows[:5], b'{"text": "\xff"}', *rows[5:]]))}, 5, "isn't UTF-8"
    if kind == "a list":
        return {"paths": str(write_jsonl(path, [[1], *rows]))}, 0, "not an object"
    if kind == "a number":
        return {"paths": str(write_jsonl(path, [*rows, {"text": 5}]))}, 12, "not text"
    if kind == "no field":
        return {"paths": str(write_jsonl(path, [*rows, {"txt": "x"}]))}, 12, "did you mean txt"
    if kind == "half a character":
        return {"paths": str(write_jsonl(path, [*rows[:2], '{"text": "\\ud83d"}', *rows[2:]]))}, 2, "surrogate"
    if kind == "null in parquet":
        return {"paths": str(write_parquet(path, [*rows[:6], {**rows[0], "text": None}, *rows[6:]], 4))}, 6, "empty"
    if kind == "json in arrayrecord":
        records = [json.dumps(row).encode() for row in rows]
        write_arrayrecord(path, [*records[:7], b"{", *records[7:]])
        return {**args, "format": "json"}, 7, "isn't JSON"
    raise AssertionError(kind)


BAD = {"broken json": "jsonl", "not utf-8": "jsonl", "a list": "jsonl", "a number": "jsonl", "no field": "jsonl",
       "half a character": "jsonl", "null in parquet": "parquet", "json in arrayrecord": "arrayrecord"}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_stops_with_file_and_row_or_is_skipped_and_counted(kind, tmp_path, caplog):
    args, row, words = bad_file(kind, tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        len(make_source(BAD[kind], args))
    assert caught.value.field == "paths" and f"shard.{kind}, row {row}:" in str(caught.value)
    assert "on_error" in caught.value.cure and "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        source = make_source(BAD[kind], {**args, "on_error": "skip"})
        assert texts(source) == [row["text"] for row in ROWS]
    assert source.skipped == 1 and "left out 1 bad rows of 13" in caplog.text and f"row {row}" in caplog.text
    assert f"shard.{kind}#{row:09d}" not in ids(source)  # the others keep their numbers


def test_a_broken_row_group_is_so_many_bad_rows(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", ROWS, group=4)
    import pyarrow.parquet as pq

    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    place = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2
    content = bytearray(path.read_bytes())
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.parquet, row 4: row group 1 \(rows 4 to 7\)"):
        len(make_source("parquet", {"paths": str(path)}))
    source = make_source("parquet", {"paths": str(path), "on_error": "skip"})
    assert source.skipped == 4 and texts(source) == [row["text"] for row in ROWS[:4] + ROWS[8:]]


def test_a_row_that_a_library_cannot_read_is_a_bad_row(corpus, monkeypatch):
    source = make("tfds", corpus, on_error="skip")
    shard, = source._shards()
    read = type(shard).row

    def row(self, index):
        if index == 3:
            raise RuntimeError("Corrupted file:\nlong story")
        return read(self, index)

    monkeypatch.setattr(type(shard), "row", row)
    assert len(source) == 59 and source.skipped == 1
    with pytest.raises(InputError, match=r"rung_rows/1\.0\.0/train, row 3: can't be read \(Corrupted file:\)"):
        len(make("tfds", corpus))


def test_blank_lines_and_blank_texts_are_left_out_without_counting(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["", ROWS[0], "  ", {"text": " \n"}, ROWS[1]])
    source = make_source("jsonl", {"paths": str(path)})
    assert ids(source) == ["x.jsonl#000000001", "x.jsonl#000000004"] and source.skipped == 0


@pytest.mark.parametrize("kind,name,content", [
    ("parquet", "x.parquet", b"PAR1 no"), ("arrayrecord", "x.array_record", b"no"), ("arrayrecord", "y.array_record", b""),
    ("jsonl", "x.jsonl.gz", b"\x1f\x8b no"), ("jsonl", "y.jsonl.gz", b"not packed")])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_that_is_no_such_file_stops_either_way(kind, name, content, on_error, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is no whole") as caught:
        len(make_source(kind, {"paths": str(tmp_path / name), "on_error": on_error}, str(tmp_path / "cache")))
    assert caught.value.field == "paths" and "\n" not in str(caught.value)


@pytest.mark.parametrize("args,field,words", [
    ({"template": "{}"}, "template", "without a name"), ({"template": "{a!r}"}, "template", "format"),
    ({"template": "{a:>5}"}, "template", "format"), ({"template": "{a"}, "template", "can't be read"),
    ({"template": "none"}, "template", "no field"), ({"groups": ("a",)}, "groups", "group_by"),
    ({"group_by": "lang", "group_weights": {"en": 0}}, "group_weights", "nothing"),
    ({"group_by": "lang", "group_weights": {"en": -1}}, "group_weights.en", "no share"),
    ({"group_by": "lang", "group_weights": {"en": "x"}}, "group_weights.en", "no share"),
    ({"paths": ()}, "paths", "empty"), ({"on_error": "ignore"}, "on_error", "stop"),
])
def test_bad_arguments_name_the_field(args, field, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        make_source("jsonl", {"paths": "x.jsonl", **args})
    assert caught.value.field == f"args.{field}"


def test_groups_that_are_not_there_name_the_nearest(corpus):
    for args, words in (({"groups": ("eng",)}, "no group 'eng'; did you mean en"),
                        ({"group_weights": {"en": 1, "deu": 1}}, "no such group; did you mean de"),
                        ({"group_weights": {"en": 1}}, "no share for de, la")):
        with pytest.raises(InputError, match=words):
            make("jsonl", corpus, group_by="lang", **args).grouped()


def test_a_template_with_commas_survives_the_command_line():
    source = make_source("jsonl", {"paths": "x", "template": ("{a}", " {b}")})  # as config cuts it
    assert source.template == "{a}, {b}"


# Libraries ------------------------------------------------------------------------------------------------------------

def test_tfds_is_read_without_tensorflow(corpus, tmp_path):
    """Even where TensorFlow is installed: here is one that says when it is imported."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('tensorflow was imported')\n")
    code = ("import sys\n"
            "from research.data.sources import make_source\n"
            f"source = make_source('tfds', {{'dataset': 'rung_rows', 'data_dir': {str(corpus / 'tfds')!r}}})\n"
            "assert len(source) == 60 and source.document(3).text.startswith('row ')\n"
            "assert 'tensorflow' not in sys.modules\n"
            "print('read')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(pathlib.Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("read"), done.stdout + done.stderr


@pytest.mark.parametrize("args,field,words", [
    ({"dataset": "imdb_reveiws"}, "dataset", "unknown data set 'imdb_reveiws'; did you mean imdb_reviews"),
    ({"dataset": "rung_rowz"}, "dataset", "did you mean rung_rows"),
    ({"dataset": "ag_news_subset"}, "dataset", "isn't prepared"),
    ({"split": "trian"}, "split", "did you mean train"),
    ({"split": "train[:"}, "split", "no split"),
    ({"dataset": "rung_rows:9.9.9"}, "dataset", "can't be opened"),
])
def test_tfds_that_is_not_there(args, field, words, corpus):
    with pytest.raises(InputError, match=words.replace("[", r"\[")) as caught:
        len(make("tfds", corpus, **args))
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_huggingface_reads_directories_of_files_offline(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", [{"text": row["text"]} for row in ROWS])
    source = make_source("huggingface", {"dataset": str(tmp_path / "files")})
    assert texts(source) == [row["text"] for row in ROWS] and ids(source)[0] == "files/train#000000000"
    with pytest.raises(InputError) as caught:
        len(make_source("huggingface", {"dataset": str(tmp_path / "files"), "split": "test"}))
    assert caught.value.field == "split"


def test_huggingface_that_is_not_there(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    (tmp_path / "org___wikitext").mkdir()
    with pytest.raises(InputError, match="did you mean org/wikitext.*local directory") as caught:
        len(make_source("huggingface", {"dataset": "org/wikitxt"}))
    assert caught.value.field == "dataset" and "\n" not in str(caught.value)
    write_huggingface(tmp_path / "saved", ROWS)
    with pytest.raises(InputError, match="did you mean train"):
        len(make_source("huggingface", {"dataset": str(tmp_path / "saved"), "split": "tran"}))
    shutil.rmtree(tmp_path / "saved" / "train")
    with pytest.raises(InputError, match="can't be read"):
        len(make_source("huggingface", {"dataset": str(tmp_path / "saved")}))


def test_huggingface_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"rung\[hf\]") as caught:
        len(make_source("huggingface", {"dataset": "x"}))
    assert caught.value.field == "name"
