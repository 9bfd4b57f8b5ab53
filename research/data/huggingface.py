"""The `huggingface` source: a data set of the Hugging Face `datasets` library (extra `hf`)."""

import dataclasses
import os
import pathlib
from typing import Any, Sequence

from research.config import nearest
from research.data.records import Indexed, Records, first_line, one_of
from research.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace(Records):
    """Documents from a local directory (written by `save_to_disk`, or of data files), or from the Hub by name.

    What was downloaded lies in the library's own cache, and is read from there without a network.

    Attributes:
      dataset: a directory, or ORGANISATION/NAME.
      config: of a data set that has several ("subset").
      split: e.g. "train", "train[:10%]".
      field: of the columns, the one whose text is the document; default "text"; not together with `template`.
      revision: of the Hub's repository: a branch, a tag or (which repeats) a commit.

    Raises:
      InputError: `datasets` isn't installed; an unknown or unreachable data set, config or split (with the nearest
        names that are known here); a bad row with on_error="stop".
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    field: str | None = None
    revision: str | None = None

    def validate(self):
        super().validate()
        one_of(self.field, "field", self.template)
        if not self.dataset:
            raise InputError("dataset", "is empty", "name a directory or ORGANISATION/NAME")

    def _single(self) -> tuple[str, str]:
        return "field", self.field or "text"

    def _shards(self) -> Sequence[Indexed]:
        try:
            import datasets
        except ImportError:
            raise InputError("name", "the source huggingface needs the package datasets",
                             'pip install "rung[hf]"') from None
        path = pathlib.Path(os.path.expanduser(self.dataset))
        local = path.is_dir()
        name = path.resolve().name if local else self.dataset
        data = _saved(datasets, path, self.split) if local else None
        if data is None:
            data = self._load(datasets, str(path) if local else self.dataset)
        pieces = [name, *([self.config] if self.config else []), self.split]
        return [Indexed("/".join(pieces), data)]

    def _load(self, datasets: Any, path: str) -> Any:
        disabled = datasets.utils.logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(path, self.config, split=self.split, revision=self.revision)
        except datasets.exceptions.DatasetNotFoundError:
            raise InputError("dataset", f"unknown data set {self.dataset!r}", _known(datasets, self.dataset)) from None
        except ConnectionError as error:
            raise InputError("dataset", f"{self.dataset!r} isn't here, and the Hub not reached ({first_line(error)})",
                             f"{_known(datasets, self.dataset)}, or name a local directory") from None
        except ValueError as error:
            field = "split" if "split" in str(error).lower() else "config"
            raise InputError(field, first_line(error), "correct it") from None
        except (OSError, datasets.exceptions.DatasetGenerationError) as error:
            cause = error.__cause__ or error
            raise InputError("dataset", f"{self.dataset!r} can't be read ({first_line(cause)})",
                             "repair its files, or read them with the source jsonl or parquet") from None
        finally:
            if disabled:
                datasets.enable_progress_bars()


def _saved(datasets: Any, path: pathlib.Path, split: str) -> Any:
    """The split of a directory that `save_to_disk` wrote; None for another directory."""
    try:
        if (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
            if split not in found:
                raise InputError("split", f"{path.name} has no split {split!r}", nearest(split, list(found)))
            return found[split]
        return datasets.load_from_disk(str(path)) if (path / "state.json").exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise InputError("dataset", f"{path.name} can't be read ({first_line(error)})", "write it again") from None


def _known(datasets: Any, wanted: str) -> str:
    """The nearest among the data sets in the library's cache."""
    root = pathlib.Path(datasets.config.HF_DATASETS_CACHE)
    names = [path.name.replace("___", "/") for path in sorted(root.glob("*"))
             if path.is_dir() and path.name != "downloads"]
    return nearest(wanted, names) if names else "no data set is in the cache"
