"""Real files of every kind of record, with the same rows: a text, a title, a language."""

import contextlib
import functools
import gzip
import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.corpora import WORDS

LANGUAGES = ("en", "de", "la")


def make_rows(count: int = 60, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"text": f"row {i} é " + " ".join(rng.choice(WORDS, rng.integers(5, 40))), "title": f"title {i}",
             "lang": LANGUAGES[0 if i % 6 < 3 else 1 if i % 6 < 5 else 2], "meta": {"id": i}} for i in range(count)]


def write_jsonl(path: pathlib.Path, rows: list) -> pathlib.Path:
    """A str or bytes among the rows is written as it is."""
    lines = [row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else
             json.dumps(row, ensure_ascii=False).encode() for row in rows]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: pathlib.Path, rows: list[dict], group: int = 16) -> pathlib.Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, compression="snappy",
                   write_page_checksum=True)
    return path


def write_arrayrecord(path: pathlib.Path, records: list[bytes]) -> pathlib.Path:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def write_tfds(directory: pathlib.Path, rows: list[dict]) -> None:
    """Prepares the data set `rung_rows` in `directory`."""
    builder = _builder()
    builder.rows_to_write = rows
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder(data_dir=str(directory), file_format="array_record").download_and_prepare()


@functools.cache  # the library takes a name once
def _builder() -> type:
    import tensorflow_datasets as tfds

    class RungRows(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None
        rows_to_write: list[dict] = []

        def _info(self):
            features = {"text": tfds.features.Text(), "title": tfds.features.Text(), "lang": tfds.features.Text(),
                        "meta": {"id": np.int64}}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(self.rows_to_write)

    return RungRows


def write_huggingface(directory: pathlib.Path, rows: list[dict]) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(directory))


def write_all(directory: pathlib.Path, rows: list[dict] | None = None) -> pathlib.Path:
    """The rows as every kind of file, in two files where a kind has files; returns the directory."""
    rows = make_rows() if rows is None else rows
    half = len(rows) // 2
    directory.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((rows[:half], rows[half:])):
        write_jsonl(directory / f"{number}.jsonl", part)
        write_jsonl(directory / f"{number}.jsonl.gz", part)
        write_parquet(directory / f"{number}.parquet", part)
        write_arrayrecord(directory / f"{number}.text.array_record", [row["text"].encode() for row in part])
        write_arrayrecord(directory / f"{number}.json.array_record", [json.dumps(row).encode() for row in part])
    write_tfds(directory / "tfds", rows)
    with contextlib.suppress(ImportError):  # the extra hf
        write_huggingface(directory / "saved", rows)
    return directory
