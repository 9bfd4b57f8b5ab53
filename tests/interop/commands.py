"""tools.convert as it is called, with its exit code and what it says; many calls in one process, as its start takes seconds."""

import atexit
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# Not in pytest's own process: flags, the compilation cache and the log are one of each, and not this test's alone.
_CALLS = """
import contextlib, io, json, sys, traceback
from experiments import command_line
from tools import convert

for line in sys.stdin:
    sys.argv = ["tools.convert", *json.loads(line)]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            command_line.run(convert.main)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = "traceback"
            traceback.print_exc()
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


@functools.cache
def _process() -> subprocess.Popen:
    env = {**os.environ, "RUNG_CACHE": tempfile.mkdtemp(), "XLA_FLAGS": ""}
    process = subprocess.Popen([sys.executable, "-c", _CALLS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY, env=env)
    atexit.register(process.kill)
    return process


def convert(*arguments: str) -> tuple[int | str | None, str]:
    """(exit code, or "traceback"; what was printed, warnings left out)."""
    process = _process()
    process.stdin.write(json.dumps(arguments) + "\n")
    process.stdin.flush()
    code, said = json.loads(process.stdout.readline())
    return code, said
