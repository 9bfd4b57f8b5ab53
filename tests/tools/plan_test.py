"""tools.plan: the textbook command, its table, what it refuses in one line with exit code 2."""

import json
import os
import subprocess
import sys

import pytest

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
GPT3 = ("--params=175e9", "--flops=3.14e23", "--chips=256", "--peak_flops=6.02e13", "--price=2")


def call(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "tools.plan", *words], capture_output=True, text=True, cwd=REPOSITORY,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_textbook_command():
    code, out, err = call(*GPT3, "--utilization=0.7", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["cost"] == pytest.approx(4.14e6, rel=1e-3) and answer["days"] == pytest.approx(236 / 0.7, rel=2e-3)
    assert {"days", "tokens", "cost", "chip_hours", "energy_kwh", "memory"} <= set(answer)
    assert {"days", "tokens", "cost", "chip_hours", "energy_kwh", "memory"} <= set(answer["from"])
    assert set(answer["energy_kwh"]) == {"value", "low", "high"}


@pytest.mark.slow
def test_the_table_of_a_preset_with_an_interval():
    code, out, err = call("--config=debug", "--set", "train.batch_size=4", "--chip=v5p:2x2x1", "--utilization=0.35,0.5",
                          "--exact", "--api_price=1")
    assert code == 0, err
    cells = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "0.425 (0.35 to 0.5)" in cells["utilization"] and "20 tokens a parameter" in cells["tokens"]
    assert "list price of v5p" in cells["price"] and "serving.load_to_break_even" in cells
    assert "x 3" in cells["flops_per_token"]


REFUSED = (
    ((), "nothing is given"),
    (("--params=0", "--tokens=1e9"), "--params: 0 isn't positive"),
    (("--params=1e9", "--tokens=nan"), "--tokens: nan isn't positive"),
    (("--params=1e9", "--config=debug"), "second model"),
    (("--flops=1e20", "--money=5"), "second budget beside --flops"),
    (("--config=quickstrat",), "did you mean quickstart"),
    (("--config=quickstart", "--set=mesh.rules=fdsp"), "mesh.rules: unknown 'fdsp'"),
    (("--params=1e9", "--chip=h1000"), "unknown chip 'h1000'"),
    (("--params=1e9", "--utilization=1.5"), "--utilization: '1.5' isn't a share"),
    (("--params=1e9", "--exact"), "--exact: needs a preset"),
    (("--params=1e9", "--pue=0.5"), "--pue: 0.5 isn't at least 1"),
    (("--params=1e9", "--tokens=1e9", "--flops=1e20"), "give two of budget, model and tokens"),
    (("--params=1e300", "--tokens=1e300"), "--params: 1e+300 is too large to be meant"),
    (("--params=1e9", "--chip=h100", "--utilization=1e-300"), "'1e-300' isn't a share"),
    (("--params=1e9", "--chip=h100", "--price=1e308"), "--price: 1e+308 is too large"),
    (("--params=1e9", "--chips=0"), "--chips=0"),
    (("--params=1e9", "--context=-1"), "--context=-1"),
    (("--params=1e9", "--hbm_bytes=0"), "--hbm_bytes: 0 isn't positive"),
    (("--money=inf", "--chip=h100"), "--money: inf isn't positive"),
)


@pytest.mark.slow
@pytest.mark.parametrize("words, message", REFUSED)
def test_refusals_by_the_command(words, message):
    check_refusal(words, message)


def check_refusal(words, message):
    code, out, err = call(*words)
    assert code == 2 and not out and message in err and len(err.strip().splitlines()) == 1, err


def test_a_refusal():
    check_refusal(*REFUSED[1])


def test_a_reader_that_leaves_is_no_error():
    """`| head`: what is left unread isn't worth a traceback, whether it is told while printing or at the end."""
    for words in (GPT3, (*GPT3, "--json")):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-m", "tools.plan", *words], stdout=write, stderr=subprocess.PIPE, text=True,
                              cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": ""}, timeout=120)
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")
