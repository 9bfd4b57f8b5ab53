"""What a run leaves for TensorBoard, as TensorBoard's own back end reads it: the hparams tab, the axes of cost, the trace."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from configs import preset
from research.config import override
from research.training import loop
from research.training.loop import Launch, run
from research.training.metrics import Recorder
from research.training.workdir import read_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return override(preset("debug"), {"data.cache_dir": str(tmp_path_factory.mktemp("cache")), "train.steps": 6,
                                      "train.log_every": 2, "model.dim": 16})


def hparams_table(logdir) -> dict[str, tuple[int, dict[str, float]]]:
    """The rows of the hparams tab over `logdir`: run -> (its status, its values by column)."""
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(logdir))
    runs.Reload()
    context = Context(base_plugin.TBContext(data_provider=MultiplexerDataProvider(runs, str(logdir))))
    content = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, content, [])
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=list(api_pb2.Status.values()),
        col_params=[api_pb2.ColParams(metric=metric.name) for metric in experiment.metric_infos])
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    return {group.name: (group.sessions[0].status, {value.name.tag: value.value for value in group.metric_values})
            for group in groups}


def test_the_hparams_tab_has_the_final_metrics(config, tmp_path):
    """Beside a run that hasn't ended, whose columns TensorBoard may take for all."""
    recorder = Recorder(epath.Path(tmp_path) / "a", 0)
    recorder.hparams(config, "a")
    recorder.close()
    result = run(config, Launch(str(tmp_path / "b"), config, quiet=True))
    table = hparams_table(tmp_path)
    assert table["a"] == (api_pb2.STATUS_UNKNOWN, {})
    status, values = table["b"]
    assert status == api_pb2.STATUS_SUCCESS and values["train/loss"] > 0
    assert values["train/final_eval_loss"] == pytest.approx(result["final_eval_loss"])
    assert values["train/bits_per_byte"] == pytest.approx(result["bits_per_byte"])


def test_the_axes_of_cost_have_every_point_of_a_small_run_after_restarts(tmp_path):
    def row(step: int, loss: float) -> dict:
        return {"loss": loss, "tokens": 64 * step, "flops": 2.5e9 * step, "weight": 1.0}

    for start in (0, 5, 5, 3):  # launches; in the last one also a rollback
        recorder = Recorder(epath.Path(tmp_path), start)
        for step in range(start + 1, 9):
            recorder.row(step, row(step, float(10 * start + step)))
        recorder.evaluation(8, "heldout", {"loss": 2.0, "se": 0.1, "perplexity": 7.4, "bits_per_byte": 1.0}, {"0": 3.0})
        if start == 3:
            recorder.rewind(6)
            recorder.row(7, row(7, 99.0))
        recorder.close()
    kept = [(line["step"], line["loss"]) for line in read_rows(tmp_path, "metrics-")]
    assert kept == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 34.0), (5, 35.0), (6, 36.0), (7, 99.0)]
    board = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    board.Reload()
    for tag, a_step in ("train/loss", 1), ("train/loss_by_tokens", 64), ("train/loss_by_gigaflops", 2.5):
        points = [(event.step, event.value) for event in board.Scalars(tag)]
        assert points == [(int(a_step * step), loss) for step, loss in kept], tag


def traced(workdir) -> list[int]:
    """The numbers of the steps in the run's one trace."""
    path, = workdir.glob("plugins/profile/*/*.xplane.pb")
    return sorted(dict(event.stats)["step_num"] for plane in jax.profiler.ProfileData.from_file(str(path)).planes
                  for line in plane.lines for event in line.events if event.name == "train")


@pytest.mark.parametrize("asked, found, told", [(2, [3, 4], ""), (9, [3, 4, 5, 6], "only 4 were traced")])
def test_the_trace_is_written_however_long_the_run(config, tmp_path, caplog, asked, found, told):
    run(config, Launch(str(tmp_path / "run"), config, quiet=True, profile_steps=asked))
    assert traced(tmp_path / "run") == found
    assert told in caplog.text and ("were traced" in caplog.text) == bool(told)
    jax.profiler.start_trace(str(tmp_path / "next"))  # none is left running
    jax.profiler.stop_trace()


def test_the_trace_ends_with_the_device_and_with_an_error(monkeypatch, tmp_path):
    """It waits for the work of its last step, which is dispatched alone."""
    results, ready = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: ready.append([result.is_ready() for result in results]))
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda i, x: jnp.tanh(x @ x), x))
    x = jnp.ones((600, 600))
    compiled = slow.lower(x).compile()
    assert not compiled(x).is_ready()  # such a step takes its time

    def step(x: jax.Array) -> jax.Array:
        results.append(compiled(x))
        return results[-1]

    with loop._Profile(epath.Path(tmp_path), 2) as profile:
        for number in range(1, 6):
            profile.step(number, step, x)
    assert ready == [[True] * 4]
    with pytest.raises(ZeroDivisionError), loop._Profile(epath.Path(tmp_path), 2) as profile:
        profile.step(3, step, x)
        1 // 0
    assert len(ready) == 2
