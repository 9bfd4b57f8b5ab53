"""The `sourcecode` source: Python text that every machine with this project has."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import sysconfig

from absl import logging
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from research.config import Node, Positive
from research.data import documents
from research.errors import InputError

_ROOT = "rung"  # the distribution whose core requirements are read
_TESTS = frozenset(("test", "tests", "testing", "idle_test"))
_SKIPPED_DIRECTORIES = _TESTS | {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class SourceCode(Node):
    """Every *.py of the standard library and of this project's installed requirements, without their tests.

    About 12 MB of standard library and 80 MB of packages; extras don't count as requirements. Files that are
    empty, not UTF-8 or a copy of another are left out. Names are "stdlib/json/decoder.py",
    "jax/_src/core.py".

    Attributes:
      max_bytes: stop once this many bytes are taken, in the order of a hash of the names: an evenly spread
        subset, and a smaller one is part of a larger one. None takes all.
      packages: whether to read the packages, not the standard library alone.

    Raises:
      InputError: packages are wanted and this project isn't installed.
    """

    max_bytes: Positive | None = None
    packages: bool = True

    def __len__(self) -> int:
        return len(self._files)

    def document_id(self, index: int) -> str:
        return self._files[index][0]

    def document(self, index: int) -> documents.Document:
        name, path, _ = self._files[index]
        return documents.Document(name, path.read_bytes().decode("utf-8"))

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        parts = [part for name, _, digest in self._files for part in (name, digest)]
        return documents.combine(["sourcecode", *parts])

    @functools.cached_property
    def _files(self) -> tuple[tuple[str, pathlib.Path, str], ...]:
        """(name, path, sha256 of the contents), by name."""
        paths = _standard_library()
        if self.packages:
            paths.update(_packages())
        taken, seen, size, skipped = [], set(), 0, 0
        for name in sorted(paths, key=documents.subset_key):
            if self.max_bytes is not None and size >= self.max_bytes:
                break
            try:
                content = paths[name].read_bytes()
                content.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                skipped += 1
                continue
            digest = hashlib.sha256(content).hexdigest()
            if not content.strip() or digest in seen:
                skipped += 1
                continue
            seen.add(digest)
            size += len(content)
            taken.append((name, paths[name], digest))
        logging.info("sourcecode: %d files, %.1f MB; left out %d (empty, repeated, unreadable or not UTF-8)",
                     len(taken), size / 1e6, skipped)
        return tuple(sorted(taken))


def _standard_library() -> dict[str, pathlib.Path]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = {}
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        for file in files:
            if file.endswith(".py"):
                path = pathlib.Path(directory, file)
                paths["stdlib/" + path.relative_to(root).as_posix()] = path
    return paths


def _packages() -> dict[str, pathlib.Path]:
    paths = {}
    for name in _requirements(_ROOT):
        for file in importlib.metadata.distribution(name).files or ():
            if file.suffix == ".py" and not file.is_absolute() and not {"..", *_TESTS}.intersection(file.parts[:-1]):
                paths[file.as_posix()] = pathlib.Path(file.locate())
    return paths


def _requirements(root: str) -> list[str]:
    """Installed distributions that `root` needs, directly or not, without itself and its extras; sorted."""
    try:
        importlib.metadata.distribution(root)
    except importlib.metadata.PackageNotFoundError:
        raise InputError("packages", f"{root!r} isn't installed, so its requirements aren't known",
                         "run `pip install -e .` in the project, or set packages to false") from None
    waiting, done = [(canonicalize_name(root), "")], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        try:
            requirements = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            logging.warning("sourcecode: %s is required but isn't installed; left out", name)
            continue
        done.add((name, extra))
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found = canonicalize_name(requirement.name)
                waiting += [(found, wanted) for wanted in ("", *sorted(requirement.extras))]
    return sorted({name for name, _ in done} - {canonicalize_name(root)})
