"""A run that branches from a trunk's checkpoint ends with the bits of one that warms up, stays and decays by itself."""

import pytest

from configs import preset
from research.config import override
from research.errors import InputError
from research.schema import CheckpointConfig
from research.training.checkpoint import Checkpointer, steps_to_delete
from research.training.loop import Launch, run
from research.training.workdir import read_rows

STEPS, DECAY = 14, 4


def config_in(cache, **changes):
    base = {"data.cache_dir": str(cache), "train.log_every": 1, "model.dim": 16, "optim.schedule": "wsd",
            "optim.decay_steps": DECAY, "train.steps": STEPS}
    return override(preset("debug"), base | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    cache, workdir = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("trunk")
    config = config_in(cache, optim__schedule="constant", train__steps=12, checkpoint__keep_at=(6, STEPS - DECAY),
                       checkpoint__keep_last=1)
    run(config, Launch(str(workdir), config, quiet=True))
    return cache, workdir


def test_the_branch_points_are_kept(trunk):
    _, workdir = trunk
    with Checkpointer(workdir, CheckpointConfig()) as checkpointer:
        assert checkpointer.saved_steps() == [6, 10, 12]
    assert steps_to_delete([2, 4, 6, 8], lambda _: True, CheckpointConfig(keep_last=1, keep_at=(4,)), 0) == [6, 2]


def test_a_branch_ends_as_the_whole_run_does(trunk, tmp_path):
    cache, workdir = trunk
    alone = config_in(cache)
    whole = run(alone, Launch(str(tmp_path / "whole"), alone, quiet=True))
    branched = override(alone, {"train.branch_from": f"{workdir}@{STEPS - DECAY}"})
    result = run(branched, Launch(str(tmp_path / "branch"), alone, quiet=True))
    assert result["params_sha256"] == whole["params_sha256"] and result["tokens"] == whole["tokens"]
    assert result["final_eval_loss"] == whole["final_eval_loss"]
    rows = [row for row in read_rows(tmp_path / "branch", "metrics-") if "set" not in row]
    assert [row["step"] for row in rows] == [11, 12, 13, 14]


@pytest.mark.parametrize("place, message", [
    ("{trunk}", "is not RUN@STEP"), ("{trunk}@7", "has no checkpoint of step 7 .found: 6, 10, 12"),
    ("nowhere@3", "nowhere has no checkpoint"),
])
def test_a_place_that_is_none_is_refused(trunk, tmp_path, place, message):
    cache, workdir = trunk
    config = config_in(cache, train__branch_from=place.format(trunk=workdir))
    with pytest.raises(InputError, match=f"train.branch_from: .*{message}"):
        run(config, Launch(str(tmp_path / "run"), config, quiet=True))
