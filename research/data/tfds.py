"""The `tfds` source: a TensorFlow Datasets data set on ArrayRecord files, without importing TensorFlow."""

import dataclasses
import os
from typing import Sequence

from research.config import nearest
from research.data.records import Indexed, Records, first_line, one_of
from research.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFlowDatasets(Records):
    """Documents from `tfds.data_source(dataset, split=split)`.

    Attributes:
      dataset: NAME, NAME/CONFIG or NAME:VERSION, as TensorFlow Datasets writes it.
      split: e.g. "train", "train[:10%]".
      data_dir: where it was prepared, local or gs://; none is the library's default.
      field: of the features, the one whose text is the document; default "text"; not together with `template`.
      download: whether to download and prepare it (as ArrayRecord files) where it isn't there. Some data sets can only
        be prepared where TensorFlow is installed; reading never needs it.

    Raises:
      InputError: an unknown data set or split (with the nearest names), one that isn't prepared, or is in another file
        format; a bad row with on_error="stop".
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    field: str | None = None
    download: bool = False

    def validate(self):
        super().validate()
        one_of(self.field, "field", self.template)

    def _single(self) -> tuple[str, str]:
        return "field", self.field or "text"

    def _shards(self) -> Sequence[Indexed]:
        import tensorflow_datasets as tfds  # seconds that other sources don't need

        directory = None if self.data_dir is None else os.path.expanduser(self.data_dir)
        prepare = "prepare it there as array_record, or set download to true"
        try:
            builder = tfds.builder(self.dataset, data_dir=directory, file_format="array_record")
        except tfds.core.DatasetNotFoundError:
            name = self.dataset.partition(":")[0].partition("/")[0]
            known = tfds.list_builders(with_community_datasets=False)  # the others are asked of a bucket
            here = [entry.name for entry in os.scandir(directory)] if directory and os.path.isdir(directory) else []
            raise InputError("dataset", f"unknown data set {self.dataset!r}",
                             nearest(name, sorted({*known, *here}))) from None
        except (AssertionError, ValueError, RuntimeError, ImportError, OSError) as error:
            raise InputError("dataset", f"{self.dataset!r} can't be opened ({first_line(error)})",
                             "correct its name, config and version") from None
        if self.download:
            try:
                builder.download_and_prepare(file_format="array_record")
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                raise InputError("dataset", f"{self.dataset!r} can't be prepared ({first_line(error)})",
                                 "prepare it where there is a network, and copy it to data_dir") from None
        elif not builder.info.splits:
            raise InputError("dataset", f"{self.dataset!r} isn't prepared in {builder.data_dir}", prepare)
        try:
            rows = builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise InputError("dataset", f"{self.dataset!r} is there, but not as array_record", prepare) from None
        except (ValueError, KeyError, AssertionError):
            raise InputError("split", f"{self.dataset!r} has no split {self.split!r}",
                             nearest(self.split, list(builder.info.splits))) from None
        except OSError as error:
            raise InputError("dataset", f"{self.dataset!r} can't be read ({first_line(error)})", prepare) from None
        return [Indexed(f"{builder.info.full_name}/{self.split}", rows)]
