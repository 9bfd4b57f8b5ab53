"""What every command shares: flags, one line an error, exit codes, quiet logs, the compilation cache."""

import json
import os
import select
import sys
from typing import Any, Callable, Mapping, Sequence

import jax
from absl import app, flags, logging

from configs import preset
from research.config import nearest, override, parse_assignments
from research.errors import Diverged, InputError, Interrupted, is_full
from research.schema import BACKSTOP, COMPILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, HEARTBEAT, Config

OURS = ("kernels", "research", "configs", "experiments", "tools")


def define_config_flags(default: str | None = None) -> None:
    if "config" in flags.FLAGS:  # one command imports another's parts
        return
    flags.DEFINE_string("config", default, "Name of a preset in configs/.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE, overrides one field of the preset: --set optim.lr=3e-4. Repeatable.")


def define_json_flag() -> None:
    if "json" in flags.FLAGS:
        return
    flags.DEFINE_boolean("json", False, "Print one JSON object on standard output, and nothing else there.")


def configured() -> tuple[Config, Config]:
    """(config, preset): what --config and --set say, and the preset alone."""
    if not flags.FLAGS["config"].value:
        raise InputError("--config", "is missing", "name a preset, e.g. --config=quickstart")
    chosen = preset(flags.FLAGS["config"].value)
    return override(chosen, parse_assignments(flags.FLAGS["set"].value)), chosen


_answer = 1  # the file descriptor that print_json writes to


def _claim_output() -> None:
    """Under --json, whatever else writes to standard output (gloo does, in C++) goes to standard error."""
    global _answer
    if "json" in flags.FLAGS and flags.FLAGS["json"].value:
        _answer = os.dup(1)
        os.dup2(2, 1)


def print_json(data: Mapping[str, Any]) -> None:
    sys.stdout.flush()
    with os.fdopen(os.dup(_answer), "w") as file:
        file.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns of text, aligned; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        _fail(InputError(f"--{error.flagname}", "unknown flag", nearest(error.flagname, sorted(_own_flags(argv[0])))))
    except flags.Error as error:
        _fail(InputError("flags", str(error).replace("\n", " "), "see --help"))
    if len(rest) > 1 and not _takes_arguments:
        _fail(InputError(rest[1], "unexpected argument", "flags begin with --; see --help"))
    return rest


_takes_arguments = False


def _own_flags(program: str) -> list[str]:
    return [flag.name for module, found in flags.FLAGS.flags_by_module_dict().items()
            if module == program or module == "__main__" or module.startswith(OURS) for flag in found]


def _fail(error: InputError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _quiet_logs() -> None:
    """Our own lines, short; of the libraries only errors (Orbax warns of its own defaults at every start)."""
    handler = logging.get_absl_handler()
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = tuple(os.path.join(here, name) + os.sep for name in OURS)
    handler.addFilter(lambda record: record.pathname.startswith(ours) or (record.levelno >= 40 and not _told(record)))
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    handler.use_absl_log_file = lambda *args: None
    handler.python_handler.setFormatter(_Formatter())


def _told(record: Any) -> bool:
    """A full disk is one line of ours; Orbax and asyncio have pages on it."""
    return bool(record.exc_info) and is_full(record.exc_info[1])


class _Formatter(logging.PythonFormatter):
    def format(self, record: Any) -> str:
        line = record.getMessage()
        return line if record.levelno < 30 else f"{record.levelname.lower()}: {line}"


def _reader_gone() -> bool:
    """Did who reads the answer (`| head`) leave?"""
    poll = select.poll()
    for descriptor in {1, _answer}:
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def set_up_jax() -> None:
    """The compilation cache ($RUNG_CACHE/xla), and this process's place in a job of several."""
    cache = os.path.expanduser(os.environ["RUNG_CACHE"] if "RUNG_CACHE" in os.environ else "~/.cache/rung")
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    join_job()


def keep_compiled(workdir: str) -> None:
    """What is compiled from here on is kept in WORKDIR/compiled: wherever the run goes on, nothing is compiled twice.

    A cache that the user names, $RUNG_CACHE, stays: one for many runs.
    """
    if "RUNG_CACHE" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(workdir), COMPILED))


def join_job() -> None:
    """jax.distributed, where the environment says that this is one process of several.

    On the hosts of a TPU slice, the runtime's own variables do, and with --distributed those of SLURM or Open MPI. Elsewhere
    set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID; CPU processes then talk through gloo.
    """
    heartbeat = flags.FLAGS["heartbeat"].value if "heartbeat" in flags.FLAGS else HEARTBEAT
    backstop = max(1, round(BACKSTOP * heartbeat))
    asked = "distributed" in flags.FLAGS and flags.FLAGS["distributed"].value
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if name in os.environ]
    if given:
        if len(given) < len(names):
            missing = ", ".join(name for name in names if name not in given)
            raise InputError(missing, f"is missing beside {', '.join(given)}", "set all three or none")
        address, count, index = (os.environ[name] for name in names)
        if not count.isdigit() or not index.isdigit() or int(index) >= int(count):
            raise InputError("JAX_PROCESS_ID", f"{index!r} of JAX_NUM_PROCESSES={count!r}", "count processes from 0")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(count), int(index), heartbeat_timeout_seconds=backstop)
    elif asked or "," in (os.environ["TPU_WORKER_HOSTNAMES"] if "TPU_WORKER_HOSTNAMES" in os.environ else ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=backstop)
        except ValueError as error:
            raise InputError("--distributed", f"no job of several processes was found here ({error})",
                             "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID") from None


def run(main: Callable[[list[str]], int | None], *, arguments: bool = False) -> None:
    """Runs `main(argv)` as a command. `arguments`: it takes positional ones. Errors that are not bugs become one line."""
    global _takes_arguments
    _takes_arguments = arguments

    def guarded(argv: list[str]) -> int | None:
        _quiet_logs()
        _claim_output()
        try:
            set_up_jax()
            code = main(argv)
            sys.stdout.flush()  # a reader that is gone is told of here, not when Python ends
            return code
        except BrokenPipeError:
            if not _reader_gone():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python flushes at its end
            return 0
        except InputError as error:
            _fail(error)
        except (Diverged, Interrupted) as error:
            print(f"{type(error).__name__.lower()}: {error}", file=sys.stderr)
            return error.exit_code
        except OSError as error:
            if not is_full(error):
                raise
            print(f"interrupted: {error}; make room, and the same command goes on", file=sys.stderr)
            return EXIT_INTERRUPTED

    app.run(guarded, flags_parser=_parse)
