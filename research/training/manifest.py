"""What a step of the checkpoints consists of, so that a broken one is refused by name before anything of it is used.

checkpoints/STEP/manifest.json: {schema, step, files: {path: [bytes, sha256]}, arrays: {path: checksum}, sha256: of the rest}.
It is there before the directory gets its name, so a named step without one was damaged, never cut short by a kill.
"""

import concurrent.futures
import hashlib
import json
import os
import time
from typing import Any, Mapping

from etils import epath

from research.errors import InputError
from research.schema import QUARANTINE, SCHEMA_VERSION
from research.training.workdir import is_remote, sync, write_text

MANIFEST = "manifest.json"
LATE = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax completes these as it commits the step, so they are listed last
READERS = 8  # files that are read at once
_TEMPORARY, _DELETED = ".orbax-checkpoint-tmp", ".deleted-"


class BrokenStep(InputError):
    """A step that isn't what was saved. `flaw` names the file or the array."""

    def __init__(self, step: int, flaw: str, cure: str = "name a good step, or let the run that made it go on from one"):
        super().__init__("checkpoint", f"step {step} is refused, {flaw}", cure)
        self.step, self.flaw = step, flaw


def saved_steps(directory: epath.Path) -> list[int]:
    """The steps under `directory`, sorted; good or not."""
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.exists() else []


def write_manifest(directory: epath.Path, step: int, arrays: Mapping[str, int]) -> None:
    """Reads every file back; those of LATE are left to `complete_manifest`."""
    files = {name: path for name, path in _files(directory, step).items() if name not in (MANIFEST, *LATE)}
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = dict(zip(files, pool.map(_describe, files.values())))
    _write(directory, {"schema": SCHEMA_VERSION, "step": step, "files": found, "arrays": dict(arrays)})


def complete_manifest(directory: epath.Path, step: int) -> None:
    """Adds the files that Orbax wrote as it committed the step."""
    manifest = read_manifest(directory, step)
    late = {name: _describe(directory / name) for name in LATE if (directory / name).exists()}
    _write(directory, {**manifest, "files": manifest["files"] | late})
    sync(directory / MANIFEST, directory, directory.parent)  # before older steps go


def read_manifest(directory: epath.Path, step: int) -> dict[str, Any]:
    """The manifest of `step` in `directory`. Raises BrokenStep."""
    path = directory / MANIFEST
    if os.path.islink(directory) or os.path.islink(path):
        raise BrokenStep(step, f"{(directory if os.path.islink(directory) else path).name} is a link")
    if not path.exists():
        raise BrokenStep(step, f"it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BrokenStep(step, f"its {MANIFEST} can't be read ({error})") from None
    seal = manifest.pop("sha256") if isinstance(manifest, dict) and "sha256" in manifest else None
    if seal != _seal(manifest):
        raise BrokenStep(step, f"its {MANIFEST} was changed")
    if manifest["step"] != step or manifest["schema"] != SCHEMA_VERSION:
        raise BrokenStep(step, f"its {MANIFEST} is of step {manifest['step']}, schema {manifest['schema']}")
    return manifest


def check_step(directory: epath.Path, step: int, *, items: tuple[str, ...] = ()) -> dict[str, Any]:
    """The manifest of `step`, after every file was read; of the subdirectories at `items` alone, where given.

    Raises:
      BrokenStep: a file is missing, cut short, changed, not in the manifest, or a link.
    """
    manifest = read_manifest(directory, step)
    here = _files(directory, step)
    wanted = {name: entry for name, entry in manifest["files"].items()
              if not items or "/" not in name or name.split("/")[0] in items}
    for name, (size, _) in wanted.items():
        if name not in here:
            raise BrokenStep(step, f"{name} is missing")
        length = here[name].stat().length
        if length != size:
            raise BrokenStep(step, f"{name} has {length} bytes of {size}")
    extra = [name for name in here if name not in manifest["files"] and name not in (MANIFEST, *LATE)]
    if extra:
        raise BrokenStep(step, f"{extra[0]} isn't in its {MANIFEST}")
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for name, found in zip(wanted, pool.map(lambda name: _read(here[name], name, step), wanted)):
            if found != wanted[name]:
                raise BrokenStep(step, f"{name} doesn't have the contents it was saved with")
    return manifest


def quarantine(directory: epath.Path, step: int) -> epath.Path:
    """Moves checkpoints/STEP to checkpoints/quarantine/STEP (STEP.2, ... if one is there) and returns its new place."""
    place, number = directory / QUARANTINE / str(step), 1
    place.parent.mkdir(parents=True, exist_ok=True)
    while place.exists() or os.path.islink(place):
        number += 1
        place = directory / QUARANTINE / f"{step}.{number}"
    return (directory / str(step)).rename(place)


def delete_step(directory: epath.Path, step: int) -> None:
    """Takes the step its name first, so that a kill leaves no half of it."""
    doomed = directory / str(step)
    if not is_remote(directory):
        doomed = doomed.rename(directory / f"{_DELETED}{step}-{time.time_ns()}")
    try:
        doomed.rmtree(missing_ok=True)
    except OSError:  # someone reads it, on a file server; the next start removes it
        pass


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """What a save or a deletion that was cut short has left."""
    found = []
    for path in directory.iterdir():
        # Object stores can't rename: Orbax writes the step in its place there, and says in a file that it is whole.
        cut = is_remote(directory) and path.name.isdigit() and not any((path / name).exists() for name in (MANIFEST, LATE[1]))
        if _TEMPORARY in path.name or path.name.startswith(_DELETED) or cut:
            found.append(path)
    return found


def remove_unfinished(directory: epath.Path) -> None:
    """Removes it; where something still writes there, until that has ended (10 seconds; the next start removes the rest)."""
    still, tries = 0, 0
    while still < (3 if tries else 1) and tries < 100:
        for path in unfinished(directory):
            still, tries = 0, tries + 1
            try:
                path.unlink() if os.path.islink(path) or not path.is_dir() else path.rmtree(missing_ok=True)
            except OSError:  # a file came while its directory was emptied
                pass
        still += not unfinished(directory)
        time.sleep(0.1 if tries else 0)


def written_directory(directory: epath.Path, step: int) -> epath.Path:
    """Where `step` is being written: beside its place, or there already (on object stores)."""
    beside = directory / f"{step}{_TEMPORARY}"
    return beside if beside.exists() else directory / str(step)


def _files(directory: epath.Path, step: int, below: str = "") -> dict[str, epath.Path]:
    """Path within the step -> file; hidden ones (.nfs0001, .DS_Store), which nothing of ours reads, are left out."""
    found = {}
    for entry in sorted(directory.iterdir(), key=lambda path: path.name):
        name = below + entry.name
        if os.path.islink(entry):
            raise BrokenStep(step, f"{name} is a link")
        if entry.is_dir():
            found |= _files(entry, step, f"{name}/")
        elif not entry.name.startswith("."):
            found[name] = entry
    return found


def _describe(path: epath.Path) -> list:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def _read(path: epath.Path, name: str, step: int) -> list:
    try:
        return _describe(path)
    except OSError as error:
        raise BrokenStep(step, f"{name} can't be read ({error})") from None


def _seal(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(directory: epath.Path, manifest: Mapping[str, Any]) -> None:
    write_text(directory / MANIFEST, json.dumps({**manifest, "sha256": _seal(manifest)}, sort_keys=True) + "\n")
