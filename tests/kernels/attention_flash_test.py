"""What only the flash kernels have: when they run, what they refuse, what they never read, and what they count."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels import attention as module
from kernels import attention_blocks
from kernels.visibility import Context, Rule, visible_blocks
from research.training.flops import count_flops
from tests.kernels.attention_test import CASES, Case, arguments, oracle_of, run, values_and_gradients


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that short rows take several blocks, in Pallas's TPU interpret mode."""
    monkeypatch.setattr(attention_blocks, "BLOCK", 16)
    monkeypatch.setattr(module, "INTERPRET", pltpu.InterpretParams())


def test_none_is_chunked_off_a_tpu():
    """The flash kernels are in the program until it is lowered."""
    for name in ("gqa", "decode"):
        arrays, rest = arguments(CASES[name])
        program = jax.jit(lambda a: run(a, rest, None))
        assert "pallas_call" in str(program.trace(arrays).jaxpr)
        assert "custom_call_target=\"tpu" not in program.lower(arrays).compile().as_text()
        np.testing.assert_allclose(program(arrays), run(arrays, rest, "reference"), rtol=1e-5, atol=1e-6)


def test_what_flash_refuses_runs_chunked_and_says_so(caplog):
    arrays, rest = arguments(CASES["gqa"])
    halves = {key: x.astype(np.float16) for key, x in arrays.items()}
    with pytest.raises(ValueError, match="flash can't serve this: q, k and v are float16"):
        run(halves, rest, "flash")
    with caplog.at_level("INFO"):
        run(halves, rest, None)
    assert len(caplog.messages) == 1 and "float16" in caplog.text


def test_races_are_looked_for(capfd, monkeypatch):
    """Forward and backward, with what the grid calls parallel on two cores; the detector prints what it finds."""
    monkeypatch.setattr(module, "INTERPRET", pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
    arrays, rest = arguments(CASES["gqa"])
    values_and_gradients(lambda a: run(a, rest, "flash"), arrays, arrays["q"].shape)
    assert "RACE" not in capfd.readouterr().out


# Where a core holds the gradients of a key head's queries (float32, 3 heads, width 64) for 16 of 41 queries; for 16 of a block
# of 32; and the lists of 32 queries' blocks of keys.
ROW = 4 * 3 * 64 * 16
HELD = {"gradients": {"ROW_BYTES": ROW}, "smaller blocks": {"ROW_BYTES": ROW, "BLOCK": 32, "LEAST_BLOCK": 16},
        "lists": {"LONGEST_LIST": 7}}


@pytest.mark.parametrize("name", HELD)
def test_what_a_core_can_not_hold_goes_in_chunks(monkeypatch, name):
    for constant, value in HELD[name].items():
        monkeypatch.setattr(attention_blocks, constant, value)
    arrays, rest = arguments(CASES["gqa"])
    y, gradients = values_and_gradients(lambda a: run(a, rest, "flash"), arrays, oracle_of("gqa")[0].shape)
    np.testing.assert_allclose(y, oracle_of("gqa")[0], rtol=2e-5, atol=2e-5)
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, oracle_of("gqa")[1][key], rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("queries", [1, 32])
def test_a_block_that_nothing_sees_is_never_read(queries):
    """Rows of packed documents, a cache's empty slots: NaNs there leave no trace, though 0 * NaN is NaN."""
    case = Case(("2" * queries,), ("1" * 16 + "2" * 32 + "0" * 16,), q_from=31 if queries == 1 else 0)
    arrays, rest = arguments(case)
    for key in "kv":
        arrays[key][:, :16] = arrays[key][:, 48:] = np.nan
    y, gradients = values_and_gradients(lambda a: run(a, rest, "flash"), arrays, arrays["q"].shape)
    assert np.isfinite(y).all()
    if queries > 1:  # the backward pass of a few queries is the portable one
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_flops_are_of_the_blocks_that_are_computed():
    """The portable form multiplies all pairs; the kernels, of 32 rows of blocks, 1 + 2 + ... + 32 blocks."""
    arrays, rest = arguments(Case(("1" * 300 + "2" * 212,), heads=4, groups=2, value_dim=6))
    step = jax.value_and_grad(lambda a: run(a, rest, None).sum())
    flops = 2 * 4 * 512 * 512 * ((4 + 6) + (3 * 4 + 2 * 6))
    assert count_flops(step, arrays) == flops
    assert count_flops(step, arrays, platform="tpu") == flops * (32 * 33 // 2) / 32**2


def test_flops_do_not_depend_on_the_chunks_of_the_backward_pass(monkeypatch):
    arrays, rest = arguments(Case(("1" * 512,), heads=4, groups=2))
    step = jax.value_and_grad(lambda a: run(a, rest, None).sum())
    whole = count_flops(step, arrays, platform="tpu")
    monkeypatch.setattr(attention_blocks, "ROW_BYTES", 4 * 2 * 64 * 128)  # float32, heads of a key head, width, queries
    assert count_flops(step, arrays, platform="tpu") == whole


RULES = [("causal", None), ("causal", 1), ("causal", 40), ("causal", 129), ("bidirectional", None), ("bidirectional", 17),
         ("bidirectional", 200)]


@pytest.mark.parametrize("queries, keys", [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize("mask_kind, window", RULES)
def test_the_blocks_that_are_counted_are_those_that_are_visited(mask_kind, window, queries, keys):
    rule, L = Rule(mask_kind, window, None, 1.0), 256
    positions, ones = np.arange(L, dtype=np.int32)[None], np.ones((1, L), np.int32)
    some_BxIxJ, _ = visible_blocks(Context(positions, positions, ones, ones, None), rule, queries, keys)
    plan = attention_blocks.Plan(L, L, 64, 64, queries, keys)
    assert attention_blocks.computed_share(plan, rule) == np.mean(some_BxIxJ)
    part = plan._replace(length=L // 4)  # a quarter of the queries, in the mean over the quarters
    assert attention_blocks.computed_share(part, rule) == np.mean(some_BxIxJ)
