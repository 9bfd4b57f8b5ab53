"""The benchmarks measure what is there: each kernel's every implementation, each mixer, and nothing under another name."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from research.models.mixers import MIXERS
from research.training.program import make_program
from tools import benchmark, benchmark_kernels, benchmark_running

IMPLEMENTATIONS = [(kernel, name) for kernel, module in benchmark_kernels.KERNELS.items() for name in module.IMPLEMENTATIONS]


@pytest.mark.parametrize("kernel, name", IMPLEMENTATIONS, ids=map("-".join, IMPLEMENTATIONS))
def test_a_kernel_s_gradients_have_the_shapes_of_its_arguments(kernel, name):
    shapes = jax.eval_shape(lambda: benchmark_kernels.drawn(kernel, 1, 128, 128, jnp.float32))
    total, gradients = jax.eval_shape(benchmark_kernels.gradients(kernel, name, 128), shapes)
    assert total.shape == () and gradients == shapes


@pytest.mark.parametrize("name", benchmark.RECURRENT)
def test_a_mixer_s_model_is_one_that_can_be_compared(name):
    """Of about the weights of the attention that it is measured against, and of another mixer."""
    sizes, mixers = [], []
    for pattern, repeats in (benchmark.RECURRENT[name], (benchmark.ATTENTION, 4)):
        program = make_program(benchmark.row(name, pattern, repeats, 64, 4))
        sizes.append(sum(math.prod(x.shape) for x in jax.tree.leaves(program.abstract.params)))
        mixers.append(type(pattern[0]).__name__)
    assert mixers[0] != mixers[1] and set(mixers) <= set(MIXERS)
    assert 0.8 < sizes[0] / sizes[1] < 1.3


@pytest.mark.slow
def test_a_step_s_memory_is_of_both_its_programs():
    config = benchmark.row("two", benchmark.ATTENTION, 2, 64, 4)
    scanned = make_program(config).compile().memory_analysis().temp_size_in_bytes
    found = benchmark_running.step_memory(config)
    assert found["scanned"] == scanned > 0 and found["unrolled"] not in (0, scanned)


def test_a_case_that_is_not_there():
    words = [sys.executable, "-m", "tools.benchmark", "mixers", "--cases=mamba_2"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "--cases" in done.stderr and "mamba2" in done.stderr, done.stderr
