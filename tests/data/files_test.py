"""Files of a source: remote, packed, staged, many at once."""

import contextlib
import errno
import gzip
import os
import pathlib
import resource
import sys

import pytest

from research.data import arrayrecord, files, parquet
from research.data.sources import make_source
from research.errors import InputError
from tests.data.record_files import make_rows, write_arrayrecord, write_jsonl, write_parquet


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """60 rows in two files of each kind."""
    directory = tmp_path_factory.mktemp("files")
    for number, rows in enumerate((make_rows()[:30], make_rows()[30:])):
        write_jsonl(directory / f"{number}.jsonl", rows)
        write_jsonl(directory / f"{number}.jsonl.gz", rows)
        write_parquet(directory / f"{number}.parquet", rows)
    return directory


def texts(source) -> list[str]:
    return [source.document(i).text for i in range(len(source))]


def ids(source) -> list[str]:
    return [source.document_id(i) for i in range(len(source))]


@pytest.fixture
def store(corpus):
    """The corpus in an object store in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    for path in [*corpus.glob("*.jsonl*"), *corpus.glob("*.parquet")]:
        system.pipe_file(f"/bucket/deep/{path.name}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("kind,pattern", [("jsonl", "*.jsonl"), ("jsonl", "*.jsonl.gz"), ("parquet", "*.parquet")])
@pytest.mark.parametrize("prefix", ["memory://bucket/deep/", "file://{}/"])
def test_remote_files_are_staged_and_mean_the_same(kind, pattern, prefix, store, corpus, tmp_path):
    local = make_source(kind, {"paths": f"{corpus}/{pattern}"}, str(tmp_path / "local"))
    paths = prefix.replace("{}", str(corpus)) + pattern
    remote = make_source(kind, {"paths": paths}, str(tmp_path / "cache"))
    assert remote.fingerprint() == local.fingerprint() and ids(remote) == ids(local) and texts(remote) == texts(local)
    assert (tmp_path / "cache" / "staged").exists() == (prefix.startswith("memory") or pattern.endswith("gz"))


def test_text_reads_remote_files_too_and_a_changed_one_is_staged_anew(store, tmp_path):
    store.pipe_file("/bucket/a.txt", b"one")
    first = make_source("text", {"paths": "memory://bucket/a.txt"}, str(tmp_path))
    assert texts(first) == ["one"] and ids(first) == ["a.txt"]
    store.pipe_file("/bucket/a.txt", b"two, longer")
    assert texts(make_source("text", {"paths": "memory://bucket/a.txt"}, str(tmp_path))) == ["two, longer"]


def test_a_file_is_staged_once(store, tmp_path, monkeypatch):
    args = {"paths": "memory://bucket/deep/*.jsonl"}
    len(make_source("jsonl", args, str(tmp_path)))
    monkeypatch.setattr(type(store), "get_file", None)  # calling it would fail
    assert len(make_source("jsonl", args, str(tmp_path))) == 60


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content + b"x", lambda content: b""])
def test_a_staged_file_of_another_size_is_replaced(damage, store, tmp_path):
    args = {"paths": "memory://bucket/deep/*.jsonl"}
    whole = make_source("jsonl", args, str(tmp_path)).fingerprint()
    staged = next((tmp_path / "staged").glob("*/1.jsonl"))
    staged.write_bytes(damage(staged.read_bytes()))
    assert make_source("jsonl", args, str(tmp_path)).fingerprint() == whole
    assert staged.read_bytes() == store.cat_file("/bucket/deep/1.jsonl")


def test_a_file_that_comes_cut_short_is_not_used(store, tmp_path, monkeypatch):
    def cut(self, name, path):
        pathlib.Path(path).write_bytes(self.cat_file(name)[:100])

    monkeypatch.setattr(type(store), "get_file", cut)
    with pytest.raises(InputError, match="only 100 of the .* came"):
        files.find_files(("memory://bucket/deep/0.jsonl",), str(tmp_path))
    assert not list((tmp_path / "staged").iterdir())


@pytest.mark.parametrize("refused", ["__init__", "glob", "info", "get_file"])
def test_a_store_whose_errors_are_its_own_is_one_line_too(refused, store, tmp_path):
    """botocore's NoCredentialsError and google.auth's DefaultCredentialsError are no OSErrors."""
    import fsspec

    class NoCredentials(Exception):
        pass

    def refuse(*args, **kwargs):
        raise NoCredentials("Unable to locate\ncredentials")

    class Refusing(type(store)):
        protocol = "refusing"
        cachable = False
        exists = fsspec.AbstractFileSystem.exists  # as most stores have it

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("refusing:/"))

    setattr(Refusing, refused, refuse)
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    path = "refusing://bucket/deep/*.jsonl" if refused == "glob" else "refusing://bucket/deep/0.jsonl"
    with pytest.raises(InputError, match="Unable to locate credentials.*your credentials") as caught:
        files.find_files((path,), str(tmp_path))
    assert caught.value.field == "paths.0" and "\n" not in str(caught.value)
    setattr(Refusing, refused, None)
    with pytest.raises(TypeError):  # a fault in a program isn't told as one of the user's
        files.find_files((path,), str(tmp_path))


@pytest.mark.parametrize("split_on", ["file", "line"])
def test_text_is_unpacked_as_jsonl_is(split_on, store, tmp_path):
    for number, text in enumerate(("one\ntwo é", "three")):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    store.put(str(tmp_path / "*.gz"), "/bucket/packed/")
    plain = make_source("text", {"paths": f"{tmp_path}/*.txt", "split_on": split_on})
    for path in (f"{tmp_path}/*.gz", "memory://bucket/packed/*.gz"):
        packed = make_source("text", {"paths": path, "split_on": split_on}, str(tmp_path / "cache"))
        assert texts(packed) == texts(plain) and ids(packed) == [name.replace(".txt", ".txt.gz") for name in ids(plain)]
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 9999)[:-9])
    with pytest.raises(InputError, match="cut.txt.gz is no whole gzip file"):
        len(make_source("text", {"paths": f"{tmp_path}/cut.txt.gz"}, str(tmp_path / "cache")))


def test_two_protocols_keep_their_names_apart(store, corpus, tmp_path):
    source = make_source("jsonl", {"paths": ("memory://bucket/deep/0.jsonl", f"{corpus}/0.jsonl")}, str(tmp_path))
    assert {name.partition("#")[0] for name in ids(source)} == {"memory/0.jsonl", "file/0.jsonl"}
    assert ids(source) == sorted(ids(source))


@pytest.mark.parametrize("path,words", [
    ("memory://bucket/no/*.jsonl", "no file matches"), ("memory://bucket/no.jsonl", "no file matches"),
    ("memory://bucket/deep", "is a directory"), ("nosuch://x/y.jsonl", "unknown protocol")])
def test_remote_paths_that_cannot_be_read_name_the_field(path, words, store, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        files.find_files(("memory://bucket/deep/0.jsonl", path), str(tmp_path))
    assert caught.value.field == "paths.1" and "can't be read" not in str(caught.value)


def test_a_protocol_without_its_package_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match="pip install s3fs"):
        files.find_files(("s3://bucket/x.jsonl",), str(tmp_path))


def test_names_sort_as_documents_do(tmp_path):
    for name in ("a", "a b", "a#b", "a.b"):
        write_jsonl(tmp_path / name, make_rows(2))
    source = make_source("jsonl", {"paths": str(tmp_path / "*")})
    assert ids(source) == sorted(ids(source)) and len(set(ids(source))) == 8
    text = make_source("text", {"paths": str(tmp_path / "*")})
    assert ids(text) == sorted(ids(text))


# Many files ------------------------------------------------------------------------------------------------------------

MANY = 50


def write_many(kind: str, directory: pathlib.Path) -> str:
    """MANY files of four rows; the glob of them."""
    for number, row in enumerate(make_rows(MANY)):
        if kind == "parquet":
            write_parquet(directory / f"{number:03d}", [row] * 4, group=2)
        else:
            write_arrayrecord(directory / f"{number:03d}", [row["text"].encode()] * 4)
    return str(directory / "*")


@contextlib.contextmanager
def only_more_files(count: int):
    """This process may open `count` more files at once."""
    free = os.dup(0)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_more_files_than_may_be_open(kind, tmp_path):
    source = make_source(kind, {"paths": write_many(kind, tmp_path)})
    with only_more_files(files.MOST_OPEN + 8):
        expected = [row["text"] for row in make_rows(MANY) for _ in range(4)]
        assert texts(source) == expected
        assert [source.document(i).text for i in range(0, len(source), 7)] == expected[::7]


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_limit_on_open_files_is_not_taken_for_a_broken_file(kind, on_error, tmp_path, monkeypatch):
    paths = write_many(kind, tmp_path)
    len(make_source(kind, {"paths": paths}))  # imports what it needs
    monkeypatch.setattr({"parquet": parquet, "arrayrecord": arrayrecord}[kind], "MOST_OPEN", None)
    with only_more_files(20), pytest.raises(InputError, match="Too many open files.*ulimit") as caught:
        len(make_source(kind, {"paths": paths, "on_error": on_error}))
    assert caught.value.field == "paths" and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_a_file_that_went_away_is_not_taken_for_bad_rows(kind, tmp_path, monkeypatch):
    monkeypatch.setattr({"parquet": parquet, "arrayrecord": arrayrecord}[kind], "MOST_OPEN", 1)
    source = make_source(kind, {"paths": write_many(kind, tmp_path), "on_error": "skip"})
    shards = source._shards()
    (tmp_path / "000").unlink()
    monkeypatch.setattr(type(source), "_shards", lambda self: shards)
    with pytest.raises(InputError, match=f"000 can't be opened .{os.strerror(errno.ENOENT)}"):
        len(source)


def test_row_groups_of_many_files_do_not_fill_the_memory(tmp_path, monkeypatch):
    import pyarrow as pa

    for number in range(20):
        write_parquet(tmp_path / f"{number:02d}", [{"text": f"{number} {row} " * 5000} for row in range(40)], group=20)
    group = len("11 11 ") * 5000 * 20
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 4 * group)
    source = make_source("parquet", {"paths": str(tmp_path / "*")})
    before = pa.total_allocated_bytes()
    assert len(source) == 800
    assert group / 2 < pa.total_allocated_bytes() - before < 10 * group  # one of each file is 20
    reads, read = [], parquet.Parquet._shards(source)[0]._open().__class__.read_row_group
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read_row_group",
                        lambda self, *args, **kwargs: (reads.append(args), read(self, *args, **kwargs))[1])
    for i in (0, 25, 60, 0, 25, 60, 19, 39, 79):  # three groups of two files
        source.document(i)
    assert len(reads) == 3
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 1)  # the last is kept all the same
    assert [source.document(i).text[:4] for i in (100, 101, 119)] == ["2 20", "2 21", "2 39"] and len(reads) == 4
    monkeypatch.setattr(parquet, "_KEPT_BYTES", 1 << 40)
    monkeypatch.setattr(parquet, "_KEPT_GROUPS", 2)
    for i in (100, 0, 100, 0, 60, 0, 100):  # the last two are kept: of these 0, 60 and again 100 are read
        source.document(i)
    assert len(reads) == 7
