"""A prediction is sealed, taken at step 0 by the run it is of and by no other, and scored at its end."""

import json
import math

import pytest

from configs import preset
from research.config import override
from research.errors import InputError
from research.scaling import prediction as predictions
from research.scaling.prediction import config_sha256, read_prediction, seal
from research.training.loop import Launch, run
from research.training.workdir import read_rows


def config_in(cache, **changes):
    base = {"data.cache_dir": str(cache), "train.steps": 6, "train.log_every": 2, "train.eval_every": 3, "model.dim": 16}
    return override(preset("debug"), base | {key.replace("__", "."): value for key, value in changes.items()})


def predicted(config, **changes):
    target = {"config_sha256": config_sha256(config), "params": 1000, "tokens": 1536, "flops": 1e9}
    return seal({"value": 5.0, "low": 1.0, "high": 6.0, "law": "L = E", "runs": [], "target": target} | changes)


def write(path, prediction):
    path.write_text(json.dumps(prediction))
    return str(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def registered(cache, tmp_path_factory):
    home = tmp_path_factory.mktemp("registered")
    config = config_in(cache)
    file = write(home / "p.json", predicted(config))
    return home / "run", config, file, run(config, Launch(str(home / "run"), config, quiet=True, prediction=file))


def test_the_seal_holds_all_but_the_time_of_registration(tmp_path):
    sealed = predicted(preset("debug"))
    assert read_prediction(write(tmp_path / "p.json", sealed)) == sealed
    copy = predictions.registered(sealed)
    assert read_prediction(write(tmp_path / "p.json", copy)) == copy and copy["registered_at"] >= sealed["created"]


@pytest.mark.parametrize("change, message", [
    ({"high": 7.0}, "was changed after it was made"), ({"created": 0.0}, "was changed"), ({"target": {}}, "was changed"),
    ({"sha256": None}, "has no sha256"), ({"law": None}, "has no law")])
def test_a_file_that_was_changed_is_refused(tmp_path, change, message):
    content = {name: value for name, value in {**predicted(preset("debug")), **change}.items() if value is not None}
    with pytest.raises(InputError, match=f"--prediction: .*{message}"):
        read_prediction(write(tmp_path / "p.json", content))


def test_a_band_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="low, value, high are"):
        read_prediction(write(tmp_path / "p.json", predicted(preset("debug"), low=9.0)))
    (tmp_path / "p.json").write_text("no")
    with pytest.raises(InputError, match="can't be read"):
        read_prediction(str(tmp_path / "p.json"))


def test_a_config_is_known_by_what_it_computes():
    base = preset("debug")
    same = override(base, {"seed": 3, "name": "other", "train.log_every": 7, "mesh.rules": "fsdp", "checkpoint.keep_last": 9})
    assert config_sha256(base) == config_sha256(same)
    for change in ({"optim.lr": 1.0}, {"train.steps": 31}, {"model.dim": 64}, {"data.holdout": 0.2}):
        assert config_sha256(base) != config_sha256(override(base, change))


def test_a_registered_run_ends_with_its_score(registered):
    workdir, _, _, result = registered
    score, loss = result["prediction"], result["final_eval_loss"]
    assert score["covered"] == (1.0 <= loss <= 6.0) and score["error"] == pytest.approx(5.0 - loss)
    assert score["relative_error"] == pytest.approx(5.0 / loss - 1)
    events = [row["event"] for row in read_rows(workdir, "ledger-")]
    assert events[:2] == ["started", "predicted"] and events[-2:] == ["scored", "finished"] and "alarm" not in events
    assert "registered_at" in json.loads((workdir / "prediction.json").read_text())


def test_the_band_is_shown_beside_the_loss(registered):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(registered[0]))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("prediction/high")] == [(0, 6.0), (3, 6.0), (6, 6.0)]


def test_the_same_file_again_is_no_other_prediction(registered):
    workdir, config, file, result = registered
    assert run(config, Launch(str(workdir), config, quiet=True, prediction=file)) == result


def test_one_made_later_is_refused(registered, cache, tmp_path):
    workdir, config, _, _ = registered
    with pytest.raises(InputError, match="has another one registered"):
        run(config, Launch(str(workdir), config, quiet=True, prediction=write(tmp_path / "p.json", predicted(config))))
    alone = config_in(cache, train__eval_every=0)
    run(alone, Launch(str(tmp_path / "run"), alone, quiet=True))
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(InputError, match="the run is at step 6 already"):
        run(alone, Launch(str(tmp_path / "run"), alone, quiet=True, prediction=write(tmp_path / "p.json", predicted(alone))))
    assert sorted((tmp_path / "run").rglob("*")) == before
    with pytest.raises(InputError, match="was made 5 s after the run began"):
        predictions.check_before({"created": 15.0}, started=10.0)


def test_one_of_another_config_is_refused_before_anything_is_written(cache, tmp_path):
    config = config_in(cache)
    file = write(tmp_path / "p.json", predicted(override(config, {"optim.lr": 0.5})))
    with pytest.raises(InputError, match="is of another config"):
        run(config, Launch(str(tmp_path / "run"), config, quiet=True, prediction=file))
    assert not (tmp_path / "run").exists()


def test_one_of_no_config_is_refused(cache, tmp_path):
    """Of outside data: nothing says that it is of this run."""
    config = config_in(cache)
    target = {"config_sha256": None, "params": 1e9, "tokens": 2e10, "flops": 1.2e20}
    file = write(tmp_path / "p.json", predicted(config, target=target))
    with pytest.raises(InputError, match="--prediction: is of no config, as it was made from a CSV file alone"):
        run(config, Launch(str(tmp_path / "run"), config, quiet=True, prediction=file))
    assert not (tmp_path / "run").exists()


def test_a_loss_outside_the_band_is_told(cache, tmp_path):
    config = config_in(cache)
    file = write(tmp_path / "p.json", predicted(config, low=0.9, value=1.0, high=1.1))
    result = run(config, Launch(str(tmp_path / "run"), config, quiet=True, prediction=file))
    assert not result["prediction"]["covered"]
    alarms = [row for row in read_rows(tmp_path / "run", "ledger-") if row["event"] == "alarm"]
    assert len(alarms) == 1 and alarms[0]["step"] == 6 and "is outside the predicted 0.9000 to 1.1000" in alarms[0]["reason"]


def test_a_run_without_a_finite_loss_is_not_covered():
    for loss in (None, math.nan, math.inf):
        found = predictions.score(predicted(preset("debug")), loss)
        assert found["observed"] is None and found["error"] is None and found["covered"] is False
