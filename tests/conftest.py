"""What every test process needs before JAX starts: four CPU devices, a compilation cache, and the spikes in
MIXERS.

RUNG_TEST_CACHE names the directory of compiled programs (default: under pytest's cache), so that a second run
is quick.
"""

import gc
import os
import pathlib
import re

from tests.slow import SLOW

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# For the TPU's compiler, which looks for a machine that isn't there, and may be at work in pytest's other process, too.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | os.environ
MOST_MAPPINGS = 20_000
FITTING = ("scaling", "experiments")  # folders
FLAG = "--xla_force_host_platform_device_count"
os.environ.setdefault("XLA_FLAGS", "")
if FLAG not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {FLAG}=4"

from research import environment  # noqa: E402

environment.avoid_named_shardings()

import jax  # noqa: E402  (after the flags)
import pytest  # noqa: E402

import tests.spikes  # noqa: E402, F401  (adds its rows to MIXERS)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out of `make test`, run by `make test-all`")
    directory = os.environ.get("RUNG_TEST_CACHE") or str(config.cache.mkdir("jax"))
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unused = {(file, name) for file, names in SLOW.items() for name in names}
    collected = set()
    for item in items:
        file = item.nodeid.split("::")[0].removeprefix("tests/")
        collected.add(file)
        for name in SLOW.get(file, ()):
            if re.match(name, item.name):
                item.add_marker(pytest.mark.slow)
                unused.discard((file, name))
    stale = sorted(name for file, name in unused if file in collected)
    partly = any("::" in argument for argument in config.args) or config.getoption("lf", False)  # not all are collected
    if stale and not partly:
        raise pytest.UsageError(f"tests/slow.py: {', '.join(stale)} match no test of their files")


@pytest.fixture(scope="module", autouse=True)
def optimisations(request: pytest.FixtureRequest) -> None:
    """Most of the suite's time goes into compiling, so that most of it does without the compiler's optimisations; fits of laws
    run for longer than they compile. Commands that tests start compile as users' do."""
    jax.config.update("jax_disable_most_optimizations", request.path.parent.name not in FITTING)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets go of compiled programs before a process has as many mappings of memory as Linux allows (65,530).

    Each program that was compiled for the CPU holds some: 130 tests of mixers 12,000. At the limit XLA ends with a
    segmentation fault, wherever it loads the next one.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The four CPU devices that the sharding tests use."""
    found = jax.devices()
    assert len(found) == 4, f"{len(found)} devices: XLA_FLAGS={os.environ['XLA_FLAGS']!r} was read too late"
    return found
