"""A step that isn't what was saved is refused by name, whatever happened to whichever file; the newest good one is used."""

import collections
import errno
import os
import resource
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from research.errors import InputError, Interrupted
from research.params import params_sha256
from research.schema import CheckpointConfig
from research.training import checkpoint, manifest
from research.training.checkpoint import Checkpointer, steps_to_delete
from research.training.manifest import LATE, MANIFEST, BrokenStep, check_step
from research.training.restore import load_params
from research.training.state import init_state
from tests.training.common import one_device, small

KEEP = CheckpointConfig(keep_last=10)


@pytest.fixture(scope="module")
def program():
    return one_device(small())


def state_at(program, step: int):
    """A state whose every value depends on `step`."""
    state = init_state(program.model.init, program.optimizer, program.layout, step)
    return state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding))


@pytest.fixture(scope="module")
def saved(program, tmp_path_factory):
    """A run directory with steps 4, 8 and 12, and the digests of their parameters."""
    workdir, digests = epath.Path(tmp_path_factory.mktemp("saved")), {}
    with Checkpointer(workdir, KEEP) as checkpointer:
        for step in (4, 8, 12):
            state = state_at(program, step)
            checkpointer.save(state, {"sample": 8 * step})
            digests[step] = params_sha256(state.params)
        checkpointer.wait()
        events = checkpointer.events()
    assert [(event, step) for event, step, _ in events] == [("saved", 4), ("saved", 8), ("saved", 12)]
    assert all(0 < details["blocked_seconds"] <= details["seconds"] for _, _, details in events)
    return workdir, digests


@pytest.fixture
def copied(saved, tmp_path):
    """A copy to break, and the digests."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run", saved[1]


def files_of(step_directory) -> list[str]:
    return sorted(os.path.relpath(os.path.join(root, name), step_directory)
                  for root, _, names in os.walk(step_directory) for name in names)


def flip(path):
    data = bytearray(path.read_bytes())
    place = np.random.default_rng(len(data)).integers(8 * len(data))
    data[place // 8] ^= 1 << (place % 8)
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def delete(path):
    path.unlink()


def link_out(path):
    """The very same bytes, outside: what is refused is the link."""
    outside = path.parent / ".outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


FAULTS = {fault.__name__: fault for fault in (flip, truncate, empty, delete, link_out)}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_every_file_is_refused_by_name(saved, tmp_path, fault):
    source, missed, names = saved[0] / "checkpoints" / "12", [], files_of(saved[0] / "checkpoints" / "12")
    kinds = {name.split("/")[0] for name in names}
    assert kinds == {"params", "optimizer", "keys", "data", "meta", MANIFEST, *LATE} and len(names) > 30
    for index, name in enumerate(names):
        broken = tmp_path / str(index) / "12"
        shutil.copytree(source, broken)
        FAULTS[fault](broken / name)
        try:
            check_step(epath.Path(broken), 12)
            missed.append(name)
        except BrokenStep as error:
            assert "step 12" in str(error) and name in str(error) and error.step == 12, str(error)
    assert not missed


def test_good_steps_and_hidden_files_pass(copied):
    for step in (4, 8, 12):
        place = copied[0] / "checkpoints" / str(step)
        (place / "params" / ".nfs0001").write_text("left by a file server")
        found = check_step(epath.Path(place), step)
        assert set(found["files"]) | {MANIFEST, "params/.nfs0001"} == set(files_of(place))


def test_directories_and_strangers_are_refused(copied, tmp_path):
    run, _ = copied
    place = run / "checkpoints" / "12"
    (place / "params" / "array_metadatas" / "process_1").write_text("{}")
    with pytest.raises(BrokenStep, match="params/array_metadatas/process_1 isn't in its manifest"):
        check_step(epath.Path(place), 12)
    (place / "params" / "array_metadatas" / "process_1").unlink()
    shutil.move(place / "keys", tmp_path / "keys")
    (place / "keys").symlink_to(tmp_path / "keys")
    with pytest.raises(BrokenStep, match="step 12 is refused, keys is a link"):
        check_step(epath.Path(place), 12)
    (run / "checkpoints" / "16").symlink_to(run / "checkpoints" / "8")
    with pytest.raises(BrokenStep, match="step 16 is refused, 16 is a link"):
        check_step(epath.Path(run / "checkpoints" / "16"), 16)
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "20")
    with pytest.raises(BrokenStep, match="its manifest.json is of step 4"):
        check_step(epath.Path(run / "checkpoints" / "20"), 20)


def any_file(place, item: str):
    return place / next(name for name in files_of(place) if name.startswith(item))


WALKS = {  # fault -> item of the step in which it happens
    "flip": "optimizer", "truncate": "params/ocdbt", "delete": "meta", "link_out": "data", "empty": MANIFEST}


@pytest.mark.parametrize("fault", WALKS)
def test_the_newest_good_step_is_used_and_the_broken_one_quarantined(program, copied, fault):
    run, digests = copied
    FAULTS[fault](any_file(run / "checkpoints" / "12", WALKS[fault]))
    (run / "checkpoints" / "quarantine" / "12").mkdir(parents=True)  # of an earlier time
    with Checkpointer(epath.Path(run), KEEP) as checkpointer:
        state, data = checkpointer.restore(program.abstract)
        [(event, step, details)] = checkpointer.events()
        assert checkpointer.saved_steps() == [4, 8]
        # The run goes on, and makes that step again.
        checkpointer.save(state_at(program, 12), {"sample": 96})
        checkpointer.wait()
        assert params_sha256(checkpointer.restore(program.abstract)[0].params) == digests[12]
    assert int(state.step) == 8 and data == {"sample": 64} and params_sha256(state.params) == digests[8]
    assert (event, step) == ("quarantined", 12) and WALKS[fault].split("/")[0] in details["reason"]
    assert (run / "checkpoints" / "quarantine" / "12.2").exists()


def test_several_broken_steps(program, copied):
    run, digests = copied
    flip(any_file(run / "checkpoints" / "12", "params/ocdbt"))
    shutil.rmtree(run / "checkpoints" / "8" / "keys")
    with Checkpointer(epath.Path(run), KEEP) as checkpointer:
        assert params_sha256(checkpointer.restore(program.abstract)[0].params) == digests[4]
        assert [event[:2] for event in checkpointer.events()] == [("quarantined", 12), ("quarantined", 8)]


def test_back_to_an_earlier_step(program, copied):
    """That step or none; what was saved since is deleted when that is asked for."""
    run, digests = copied
    delete(any_file(run / "checkpoints" / "8", "meta"))
    with Checkpointer(epath.Path(run), KEEP) as checkpointer:
        assert checkpointer.good_steps() == [4, 12]
        with pytest.raises(BrokenStep) as caught:
            checkpointer.restore_step(program.abstract, 8)
        assert checkpointer.saved_steps() == [4, 8, 12] and checkpointer.events() == []
        checkpointer.quarantine({8: caught.value.flaw})
        assert checkpointer.saved_steps() == [4, 12] and [event[:2] for event in checkpointer.events()] == [("quarantined", 8)]
        assert params_sha256(checkpointer.restore_step(program.abstract, 4)[0].params) == digests[4]
        checkpointer.delete_after(4)
        assert checkpointer.saved_steps() == [4]
        checkpointer.delete_after(0)
        with pytest.raises(InputError, match="no step in .* is good: there is none"):
            checkpointer.restore(program.abstract)


def test_with_none_good_nothing_is_moved_and_one_line_says_so(program, copied):
    run, _ = copied
    for step in (4, 8, 12):
        flip(any_file(run / "checkpoints" / str(step), "optimizer"))
    before = files_of(run)
    for _ in range(2):  # the second start says the same
        with Checkpointer(epath.Path(run), KEEP) as checkpointer:
            with pytest.raises(InputError, match="no step in .*checkpoints is good: step 12, optimizer.*step 8, .*step 4, "):
                checkpointer.restore(program.abstract)
            assert checkpointer.events() == []
    assert files_of(run) == before


def test_another_config_is_no_broken_step(program, copied):
    run, _ = copied
    wider = one_device(small(model__dim=32))
    with Checkpointer(epath.Path(run), KEEP) as checkpointer:
        with pytest.raises(InputError, match="the model wants") as caught:
            checkpointer.restore(wider.abstract)
        assert not isinstance(caught.value, BrokenStep) and checkpointer.saved_steps() == [4, 8, 12]


def test_parameters_alone_are_refused_by_name_and_nothing_is_moved(copied):
    run, digests = copied
    before = files_of(run)
    flip(any_file(run / "checkpoints" / "12", "optimizer"))  # which isn't read
    assert params_sha256(load_params(run)[0]) == digests[12]
    flip(any_file(run / "checkpoints" / "12", "params/ocdbt"))
    with pytest.raises(BrokenStep, match="step 12 is refused, params/ocdbt.* doesn't have the contents"):
        load_params(run)
    assert params_sha256(load_params(run, step=8)[0]) == digests[8]
    assert files_of(run) == before


def test_what_a_kill_leaves_is_removed(program, copied):
    run, digests = copied
    place = run / "checkpoints"
    shutil.copytree(place / "12" / "params", place / "16.orbax-checkpoint-tmp" / "params")
    (place / "12").rename(place / ".deleted-12")
    with Checkpointer(epath.Path(run), KEEP) as checkpointer:
        assert sorted(path.name for path in place.iterdir()) == ["4", "8"]
        assert params_sha256(checkpointer.restore(program.abstract)[0].params) == digests[8]


RETENTION = [  # saved, broken, config, average, deleted
    ([4, 8, 12], [], {"keep_last": 2}, 0, [4]),
    ([4, 8, 12, 16], [], {"keep_last": 2}, 0, [4, 8]),
    ([4, 8, 12], [12], {"keep_last": 2}, 0, []),
    ([4, 8, 12, 16], [8], {"keep_last": 2}, 0, [4, 8]),
    ([4, 8, 12, 16], [16, 12], {"keep_last": 1}, 0, [4]),
    ([4, 8, 12], [4, 8, 12], {"keep_last": 1}, 0, []),
    ([4, 8, 12, 16], [], {"keep_last": 1, "keep_every": 8}, 0, [4, 12]),
    ([4, 8, 9, 12], [], {"keep_last": 1, "every_steps": 4}, 2, [4, 9]),
]


@pytest.mark.parametrize("saved_steps,broken,fields,average,deleted", RETENTION)
def test_retention_counts_good_steps(saved_steps, broken, fields, average, deleted):
    found = steps_to_delete(saved_steps, lambda step: step not in broken, CheckpointConfig(**fields), average)
    assert sorted(found) == deleted


def test_retention_keeps_the_last_good_step_when_newer_ones_break(program, tmp_path):
    """Each step is broken as soon as the next is written: the only good one of before stays."""
    with Checkpointer(epath.Path(tmp_path), CheckpointConfig(keep_last=2)) as checkpointer:
        for step in range(1, 6):
            checkpointer.save(state_at(program, step), {"sample": step})
            checkpointer.wait()
            if step >= 2:
                flip(any_file(tmp_path / "checkpoints" / str(step), "params/ocdbt"))
        assert 1 in checkpointer.saved_steps()
        state, _ = checkpointer.restore(program.abstract)
        assert int(state.step) == 1


def test_saving_goes_on_in_the_background(program, tmp_path, monkeypatch):
    """What reads the files back and waits for checksums isn't waited for by `save`, but by the next one."""
    gate, honest = threading.Event(), manifest.write_manifest

    def waiting(directory, step, arrays):
        assert threading.current_thread() is not threading.main_thread() and gate.wait(60)
        honest(directory, step, arrays)

    monkeypatch.setattr(manifest, "write_manifest", waiting)
    with Checkpointer(epath.Path(tmp_path), KEEP) as checkpointer:
        checkpointer.save(state_at(program, 1), {"sample": 1})
        assert checkpointer.saved_steps() == [] and checkpointer.events() == []
        gate.set()
        checkpointer.save(state_at(program, 2), {"sample": 2})
        assert 1 in checkpointer.saved_steps() and checkpointer.events()[0][:2] == ("saved", 1)


@pytest.mark.parametrize("bytes_allowed", [10, 2000], ids=["at the start", "in the arrays"])
def test_a_full_disk_loses_the_step_that_was_being_written_alone(program, tmp_path, bytes_allowed):
    """The kernel refuses to let files grow (RLIMIT_FSIZE: EFBIG); afterwards saving works again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(epath.Path(tmp_path), CheckpointConfig(keep_last=1)) as checkpointer:
        checkpointer.save(state_at(program, 1), {"sample": 1})
        checkpointer.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, before[1]))
            checkpointer.save(state_at(program, 2), {"sample": 2})
            checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        happened = collections.Counter(event for event, _, _ in checkpointer.events())
        assert happened == {"saved": 1, "alarm": 1}
        assert checkpointer.saved_steps() == [1]
        assert int(checkpointer.restore(program.abstract)[0].step) == 1
        checkpointer.save(state_at(program, 3), {"sample": 3})
        checkpointer.wait()
        assert checkpointer.saved_steps() == [3] == [s for e, s, _ in checkpointer.events() if e == "saved"]


def test_a_full_disk_ends_a_job_of_several(program, tmp_path, monkeypatch):
    """Without room for all arrays nothing is begun; where it fills up all the same, this process leaves."""
    with Checkpointer(epath.Path(tmp_path), KEEP) as checkpointer, monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(checkpoint, "_agreed", lambda words: words)
        patch.setattr(checkpoint.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=1000))
        checkpointer.save(state_at(program, 4), {"sample": 4})
        [(event, step, details)] = checkpointer.events()
        assert (event, step) == ("alarm", 4) and "step 4 isn't saved, nothing is the last" in details["reason"]
        assert not list((tmp_path / "checkpoints").iterdir())
        with pytest.raises(Interrupted, match="the disk is full"):
            checkpointer._give_up(4, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="Input/output"):
            checkpointer._give_up(4, OSError(errno.EIO, "Input/output error"))


@pytest.mark.slow
def test_a_save_blocks_training_for_a_twentieth_of_its_time(tmp_path):
    """25 MB of state, prepared; the middle one of seven saves, as other jobs may hold this machine for a moment."""
    program = one_device(small(model__dim=256, model__vocab_size=4096))
    state = state_at(program, 0)
    with Checkpointer(epath.Path(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.prepare(state)
        for step in range(1, 8):
            checkpointer.save(state.replace(step=jnp.int32(step)), {"sample": step})
            checkpointer.wait()
        shares = sorted(details["blocked_seconds"] / details["seconds"] for _, _, details in checkpointer.events())
    assert len(shares) == 7 and shares[3] < 0.05, shares


def test_another_error_while_writing_is_none_of_a_full_disk(program, tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifest, "write_manifest", failing)
    checkpointer = Checkpointer(epath.Path(tmp_path), KEEP)
    checkpointer.save(state_at(program, 1), {"sample": 1})
    with pytest.raises(OSError, match="Input/output error"):
        checkpointer.close()
