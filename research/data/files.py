"""Files by path or glob, local or remote (gs://, s3://, any fsspec protocol), as local files with stable names."""

import contextlib
import dataclasses
import errno
import glob
import gzip
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from typing import Any, Sequence

from absl import logging

from research.data import storage
from research.errors import InputError

DEFAULT_CACHE = "~/.cache/rung"
MOST_OPEN = 32  # files that a source keeps open at once, of however many
_PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# What a protocol's package is called where it isn't part of fsspec; for the cure.
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub", "abfs": "adlfs"}


def find_files(paths: Sequence[str], cache_dir: str, field: str = "paths") -> tuple[tuple[str, pathlib.Path], ...]:
    """((name, local path), ...) of every file that `paths` name, by name.

    A name is the path from the files' common directory, so it is the same after a move to another directory or to an
    object store. Files of two protocols have the protocol in front. A remote file is copied once into
    `cache_dir`/staged; the copy is renewed when the store says that its size, time or tag has changed.

    Args:
      paths: files or globs ("**" crosses directories), each local or PROTOCOL://...
      cache_dir: where remote files are staged.
      field: names the argument in errors.

    Raises:
      InputError: a path that matches no file, a directory, a protocol that isn't installed, a store that can't be read.
    """
    if not paths:
        raise InputError(field, "is empty", "name at least one file")
    found: dict[str, dict[str, pathlib.Path]] = {}  # protocol -> path there -> local path
    for i, pattern in enumerate(paths):
        match = _PROTOCOL.match(pattern)
        protocol = match[1].lower() if match else "file"
        if protocol == "file":
            local = os.path.expanduser(pattern[match.end():] if match else pattern)
            files = {path: pathlib.Path(path) for path in _local(local, pattern, f"{field}.{i}")}
        else:
            files = _remote(pattern, protocol, cache_dir, f"{field}.{i}")
        found.setdefault(protocol, {}).update(files)
    named = []
    for protocol, files in found.items():
        root = os.path.commonpath([os.path.dirname(path) for path in files])
        prefix = f"{protocol}/" if len(found) > 1 else ""
        named += [(prefix + pathlib.PurePosixPath(path).relative_to(root).as_posix(), local)
                  for path, local in files.items()]
    # As the names of documents sort: NAME#NUMBER.
    return tuple(sorted(named, key=lambda item: item[0] + "#"))


def _local(path: str, pattern: str, field: str) -> list[str]:
    files = [os.path.abspath(match) for match in glob.glob(path, recursive=True) if os.path.isfile(match)]
    if not files and os.path.isfile(path):  # a name with a bracket in it
        files = [os.path.abspath(path)]
    if not files and os.path.isdir(path):
        raise InputError(field, f"{pattern!r} is a directory", "name its files: DIRECTORY/**/*.txt")
    if not files:
        raise InputError(field, f"no file matches {pattern!r}", "correct the path or the glob")
    return files


def _remote(pattern: str, protocol: str, cache_dir: str, field: str) -> dict[str, pathlib.Path]:
    import fsspec  # half a second that local files don't need

    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise InputError(field, f"unknown protocol {protocol}://", "use a local path, gs:// or s3://") from None
    except ImportError:
        package = _PACKAGES[protocol] if protocol in _PACKAGES else f"the fsspec package of {protocol}"
        raise InputError(field, f"{protocol}:// needs a package that isn't installed",
                         f"pip install {package}") from None
    with _Told(pattern, field):
        system, path = fsspec.core.url_to_fs(pattern)
        infos = {}
        for name in system.glob(path) if glob.has_magic(path) else [path]:
            with contextlib.suppress(FileNotFoundError):  # `exists` would say no to whatever goes wrong
                infos[name] = system.info(name)
        files = {name: info for name, info in infos.items() if info["type"] == "file"}
        if not files:
            if infos:
                raise InputError(field, f"{pattern!r} is a directory", "name its files: DIRECTORY/**/*.txt")
            raise InputError(field, f"no file matches {pattern!r}", "correct the path or the glob")
        return {name: _staged(system, protocol, name, info, cache_dir) for name, info in files.items()}


@dataclasses.dataclass(frozen=True)
class _Told:
    """Tells in one line what goes wrong in a store: each library has errors of its own, which may be no OSErrors.

    (botocore's of missing credentials and google.auth's.) Python's own that tell of a fault in a program stay as they are.
    """

    pattern: str
    field: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if kind is None or issubclass(kind, InputError) or not issubclass(kind, Exception):
            return
        if issubclass(kind, (OSError, ValueError)) or kind.__module__ != "builtins":
            words = " ".join(str(error).split()) or repr(error)
            raise InputError(self.field, f"{self.pattern!r} can't be read ({words})",
                             "check the name, the network and your credentials") from None


def _staged(system: Any, protocol: str, name: str, info: dict, cache_dir: str) -> pathlib.Path:
    version = [f"{key}={info[key]}" for key in ("size", "etag", "ETag", "md5Hash", "mtime", "LastModified", "created")
               if key in info]
    key = hashlib.sha256("\0".join([protocol, name, *version]).encode()).hexdigest()[:24]
    directory = _directory(cache_dir)
    path = directory / key / pathlib.PurePosixPath(name).name
    size = info["size"]

    def whole(built: pathlib.Path) -> bool:
        copy = built / path.name
        return copy.is_file() and size in (None, copy.stat().st_size)

    if not whole(path.parent):
        logging.info("staging %s://%s", protocol, name)
        with storage.building(path.parent, whole) as build:
            copy = build / path.name
            system.get_file(name, str(copy))
            if size is not None and copy.stat().st_size < size:  # more is no fault: some stores unpack on the way
                raise OSError(f"only {copy.stat().st_size} of the {size} bytes of {name} came")
    return path


def unopened(name: str, code: int) -> InputError:
    """The error for a file that the system doesn't open, `code` being its errno: the file itself may be whole."""
    cure = "raise the limit: ulimit -n 4096" if code == errno.EMFILE else "see that it is there and may be read"
    return InputError("paths", f"{name} can't be opened ({os.strerror(code)})", cure)


def unzipped(name: str, path: pathlib.Path, cache_dir: str, field: str = "paths") -> pathlib.Path:
    """`path` itself, or for a .gz its contents, unpacked once into `cache_dir`/staged: rows are read by place.

    Raises:
      InputError: the file is no whole gzip file.
    """
    if path.suffix != ".gz":
        return path
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    target = _directory(cache_dir) / f"gz-{digest.hexdigest()[:24]}"
    if not target.exists():
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with gzip.open(path, "rb") as packed, open(descriptor, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            os.replace(temporary, target)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(field, f"{name} is no whole gzip file ({error})", "copy it again") from None
        finally:
            pathlib.Path(temporary).unlink(missing_ok=True)
    return target


def _directory(cache_dir: str) -> pathlib.Path:
    directory = storage.cache_root(cache_dir) / "staged"
    directory.mkdir(exist_ok=True)
    return directory
