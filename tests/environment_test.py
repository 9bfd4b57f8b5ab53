"""What is set before JAX starts."""

import os
import subprocess
import sys

from research import environment

SCRIPT = "import os, {package}, jax; print(os.environ['JAX_PLATFORMS'], len(jax.devices()))"


def test_commands_take_the_cpu_quietly_where_there_is_nothing_else():
    if environment.accelerators():
        return  # then JAX chooses
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "TPU_", "XLA_"))}
    for package in ("experiments", "tools"):
        done = subprocess.run([sys.executable, "-c", SCRIPT.format(package=package)], env=clean, capture_output=True, text=True)
        assert done.stdout.split() == ["cpu", "1"] and "TPU" not in done.stderr, done.stderr


def test_what_the_user_says_stays(monkeypatch):
    monkeypatch.setattr(environment, "accelerators", lambda: [])
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    environment.prepare()
    assert os.environ["JAX_PLATFORMS"] == "cuda"
    monkeypatch.setattr(environment, "accelerators", lambda: ["/dev/accel0"])
    monkeypatch.delenv("JAX_PLATFORMS")
    environment.prepare()
    assert "JAX_PLATFORMS" not in os.environ


def test_the_c_library_takes_the_settings():
    has_glibc = sys.platform.startswith("linux") and "glibc" in os.confstr("CS_GNU_LIBC_VERSION")
    assert environment.keep_freed_memory() == has_glibc
