"""Directories in the cache: built aside and put in place in one rename: two processes may build at once."""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Callable, Iterator

from absl import logging

from research.errors import InputError

_HASHED_BYTES = 1 << 28  # a digest covers the size and so much of a file: all of it but for large corpora


def cache_root(cache_dir: str) -> pathlib.Path:
    """The cache's directory, made if needed.

    Raises:
      InputError: it can't be made or written.
    """
    root = pathlib.Path(cache_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("data.cache_dir", f"can't make {cache_dir} ({error.strerror})",
                         "choose another directory") from None
    if not os.access(root, os.W_OK):
        raise InputError("data.cache_dir", f"{cache_dir} can't be written", "choose another directory")
    return root


def file_digest(path: pathlib.Path) -> str:
    """sha256 (hex) of a file's size and first 256 MiB."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with open(path, "rb") as file:
        left = _HASHED_BYTES
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


@contextlib.contextmanager
def building(path: pathlib.Path, valid: Callable[[pathlib.Path], bool]) -> Iterator[pathlib.Path]:
    """Yields an empty directory beside `path`, which becomes `path` when the block ends without an error.

    If another process was first and its directory is `valid`, theirs stays; a broken one is replaced.
    """
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        build = temporary / "new"
        build.mkdir()
        yield build
        while True:
            try:
                os.rename(build, path)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if valid(path):
                return
            logging.warning("%s is broken; built anew", path)
            with contextlib.suppress(FileNotFoundError):  # another process moved it away already
                os.rename(path, pathlib.Path(tempfile.mkdtemp(dir=temporary)) / "broken")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
