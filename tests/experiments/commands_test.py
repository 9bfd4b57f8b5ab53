"""The commands as a person runs them: what they print, write and return; bad input is one line, and changes nothing."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from research.schema import EXIT_BAD_INPUT, EXIT_INTERRUPTED

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def call(home, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m module` from the repository, with its caches under `home`, on one CPU device."""
    env = {**os.environ, "RUNG_CACHE": str(home), "XLA_FLAGS": "", "COLUMNS": "100", **environment}
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=REPOSITORY, env=env)


def train(home, workdir, *arguments: str) -> subprocess.CompletedProcess:
    return call(home, "experiments.train", f"--workdir={workdir}", f"--set=data.cache_dir={home}", *arguments)


@pytest.fixture(scope="module")
def trained(home):
    """A debug run that samples, made by the command."""
    done = train(home, home / "run", "--config=debug", "--set", "train.steps=12", "--set", "train.sample_every=6", "--json")
    assert done.returncode == 0, done.stderr
    return home / "run", json.loads(done.stdout)


def test_train_prints_one_json_object_and_writes_the_same(trained):
    workdir, printed = trained
    assert printed == json.loads((workdir / "result.json").read_text()) and printed["sample"].startswith("def ")


def test_generate_is_decided_by_its_seed(home, trained):
    flags = [f"--workdir={trained[0]}", "--prompt=def ", "--max_new_tokens=20"]
    first, again, other = (call(home, "tools.generate", *flags, f"--seed={seed}") for seed in (0, 0, 1))
    assert first.returncode == 0 and first.stdout.startswith("def ") and len(first.stdout) > 6, first.stderr
    assert first.stdout == again.stdout != other.stdout


def test_generate_by_ids_as_json(home, trained):
    done = call(home, "tools.generate", f"--workdir={trained[0]}", "--prompt_ids=5,17,3", "--max_new_tokens=8",
                "--temperature=0", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["prompt_ids"] == [5, 17, 3] and 1 <= len(answer["token_ids"]) == len(answer["logprobs"]) <= 8
    assert all(logprob <= 0 for logprob in answer["logprobs"])


def test_inspect_model(home):
    listed = json.loads(call(home, "tools.inspect_model", "--list", "--json").stdout)["configs"]
    assert {"name", "family", "params", "active_params", "flops_per_token", "state_bytes_4096"} <= set(listed[0])
    assert "quickstart" in {row["name"] for row in listed}
    shown = json.loads(call(home, "tools.inspect_model", "--config=quickstart", "--chips=4", "--set=mesh.rules=fsdp",
                            "--json").stdout)
    assert sum(row["params"] for row in shown["weights"]) == shown["params"]
    query = next(row for row in shown["weights"] if row["path"].endswith("attention_0/query"))
    assert query["axes"] == ["layers", "embed", "heads", "head_dim"] and "fsdp" in query["sharding"]
    table = call(home, "tools.inspect_model", "--config=debug").stdout
    assert "decoder/stage_0/attention_0/query" in table and "37,536 parameters" in table


def test_sweep_runs_skips_and_reports(home):
    grid = ["--config=debug", f"--workdir={home / 'sweep'}", "--vary=optim.lr=1e-3,1e-2", "--set=train.steps=6",
            f"--set=data.cache_dir={home}"]
    planned = call(home, "experiments.sweep", "plan", *grid, "--json")
    cells = json.loads(planned.stdout)["cells"]
    assert [cell["status"] for cell in cells] == ["missing"] * 2 and not (home / "sweep").exists()
    stopped = call(home, "experiments.sweep", "run", *grid, "--minutes=0")
    assert stopped.returncode == EXIT_INTERRUPTED, stopped.stderr
    done = call(home, "experiments.sweep", "run", *grid, "--jobs=2", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    assert {row["cell"] for row in rows} == {cell["cell"] for cell in cells}
    losses = {row["overrides"]["optim.lr"]: row["final_eval_loss"] for row in rows}
    assert losses["1e-2"] < losses["1e-3"]
    times = {path: path.stat().st_mtime_ns for path in (home / "sweep").glob("cell-*/result.json")}
    assert call(home, "experiments.sweep", "run", *grid).returncode == 0
    assert times == {path: path.stat().st_mtime_ns for path in (home / "sweep").glob("cell-*/result.json")}
    assert (home / "sweep" / "report.png").stat().st_size > 5000
    assert len((home / "sweep" / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_minutes_stop_a_run_that_goes_on(home):
    flags = ["--config=debug", "--set", "train.steps=60", "--set", "train.log_every=20"]
    workdir = home / "minutes"
    first = train(home, workdir, *flags, "--minutes=0.0001")
    assert first.returncode == EXIT_INTERRUPTED and "the same command goes on" in first.stderr
    assert train(home, workdir, *flags).returncode == 0
    whole = train(home, home / "whole", *flags)
    assert whole.returncode == 0
    digests = [json.loads((path / "result.json").read_text())["params_sha256"] for path in (workdir, home / "whole")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_two_processes_train_like_one(home):
    """Through jax.distributed and gloo: the loss of one process with as many devices, to float32 rounding."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"

    def start(count: int, index: int, devices: int, workdir) -> subprocess.Popen:
        job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        env = {**os.environ, "RUNG_CACHE": str(home), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
               **(job if count > 1 else {})}
        words = [sys.executable, "-m", "experiments.train", "--config=debug", "--set=train.steps=6", "--json",
                 f"--workdir={workdir}", f"--set=data.cache_dir={home}"]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=env)

    results = []
    for processes in ([start(2, i, 2, home / "pair") for i in range(2)], [start(1, 0, 4, home / "alone")]):
        for process in processes:
            output, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors[-3000:]
            results.append(json.loads(output))
    losses = [result["final_eval_loss"] for result in results]
    assert losses[0] == losses[1] and abs(losses[0] - losses[2]) < 1e-5
    assert results[0]["params_sha256"] == results[1]["params_sha256"]


BAD = [
    ("experiments.train", ["--config=quikstart"], "--config: unknown preset 'quikstart'; did you mean quickstart?"),
    ("experiments.train", ["--config=debug", "--set=optim.lrr=1"], "optim.lrr: unknown key; did you mean lr?"),
    ("experiments.train", ["--config=debug", "--set=train.steps=many"], "train.steps: 'many' is not a whole number"),
    ("experiments.train", ["--config=debug", "--set=optim.b1=1.5"], "optim.b1: 1.5 must be below 1.0"),
    ("experiments.train", ["--config=debug", "--set=model.stages.0.pattern.0.heads=5"],
     "model.stages.0.pattern.0.heads: 5 does not divide dim=32"),
    ("experiments.train", ["--config=debug", "--stes=2"], "--stes: unknown flag; did you mean set"),
    ("experiments.train", ["--config=debug", "--set=train.steps"], "--set: 'train.steps' is not KEY=VALUE"),
    ("experiments.train", ["--config=debug", "--prediction=nowhere.json"], "--prediction: nowhere.json does not exist"),
    ("experiments.train", ["--config=text"], "data.sources.0.args.paths: missing"),
    ("experiments.train", ["--config=text", "--set=data.sources.0.args.paths=nowhere/*.txt"], "data.sources.0.args.paths"),
    ("experiments.train", ["--config=debug", "--set=train.init_from=nowhere"], "train.init_from: nowhere has no checkpoint"),
    ("tools.generate", ["--prompt=a"], "has no config.json"),
    ("tools.generate", ["--prompt_ids=1,x"], "has no config.json"),
    ("tools.generate", ["--prompt=a", "--prompt_ids=1"], "--prompt: give either --prompt or --prompt_ids"),
    ("experiments.sweep", ["rum", "--config=debug"], "verb: unknown 'rum'; did you mean run?"),
]


@pytest.mark.parametrize("module,arguments,message", BAD, ids=[" ".join(a) for _, a, _ in BAD])
def test_bad_input_is_one_line_and_changes_nothing(home, tmp_path, module, arguments, message):
    done = call(home, module, *arguments, f"--workdir={tmp_path / 'run'}", *(
        [f"--set=data.cache_dir={home}"] if module == "experiments.train" else []))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == EXIT_BAD_INPUT and len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "run" / "config.json").exists()
