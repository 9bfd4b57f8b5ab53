"""What every command shares: flags, one line an error, exit codes, quiet logs, the compilation cache."""

import json
import os
import sys
from typing import Any, Callable, Mapping

import jax
from absl import app, flags, logging

from configs import preset
from research.config import nearest, override, parse_assignments
from research.errors import Diverged, InputError, Interrupted
from research.schema import EXIT_BAD_INPUT, Config

OURS = ("kernels", "research", "configs", "experiments", "tools")


def define_config_flags(default: str | None = None) -> None:
    flags.DEFINE_string("config", default, "Name of a preset in configs/.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE, overrides one field of the preset: --set optim.lr=3e-4. Repeatable.")


def define_json_flag() -> None:
    flags.DEFINE_boolean("json", False, "Print one JSON object on standard output, and nothing else there.")


def configured() -> tuple[Config, Config]:
    """(config, preset): what --config and --set say, and the preset alone."""
    if not flags.FLAGS["config"].value:
        raise InputError("--config", "is missing", "name a preset, e.g. --config=quickstart")
    chosen = preset(flags.FLAGS["config"].value)
    return override(chosen, parse_assignments(flags.FLAGS["set"].value)), chosen


def print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data, indent=2, allow_nan=False), flush=True)


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
    handler.addFilter(lambda record: record.levelno >= 40 or record.pathname.startswith(ours))
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    handler.use_absl_log_file = lambda *args: None
    handler.python_handler.setFormatter(_Formatter())


class _Formatter(logging.PythonFormatter):
    def format(self, record: Any) -> str:
        line = record.getMessage()
        return line if record.levelno < 30 else f"{record.levelname.lower()}: {line}"


def set_up_jax() -> None:
    """The persistent compilation cache ($RUNG_CACHE/xla), and this process's place in a multi-host job."""
    cache = os.path.expanduser(os.environ["RUNG_CACHE"] if "RUNG_CACHE" in os.environ else "~/.cache/rung")
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def run(main: Callable[[list[str]], int | None], *, arguments: bool = False) -> None:
    """Runs `main(argv)` as a command. `arguments`: it takes positional ones. Errors that are not bugs become one line."""
    global _takes_arguments
    _takes_arguments = arguments

    def guarded(argv: list[str]) -> int | None:
        _quiet_logs()
        set_up_jax()
        try:
            return main(argv)
        except InputError as error:
            _fail(error)
        except (Diverged, Interrupted) as error:
            print(f"{type(error).__name__.lower()}: {error}", file=sys.stderr)
            return error.exit_code

    app.run(guarded, flags_parser=_parse)
