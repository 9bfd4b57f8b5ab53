"""Trains a model: `python -m experiments.train --config=quickstart --workdir=runs/quickstart [--set optim.lr=3e-3]...`

The same command again goes on where the run stopped. Ctrl-C saves and stops; so does SIGTERM. Watch it with
`tensorboard --logdir=runs`. Presets are in configs/; every field can be set, see docs/interfaces.md. `--init_from=RUN`
begins with the weights of another run, trained or imported (tools.convert), and, without --config, with its config.
"""

import os
import sys

from absl import flags

from experiments import BEGAN, command_line
from research.config import override, parse_assignments
from research.errors import InputError
from research.schema import HEARTBEAT, TOKENIZER, Config
from research.training.loop import Launch, run
from research.training.workdir import read_config

command_line.define_config_flags()
command_line.define_json_flag()
flags.DEFINE_string("workdir", None, "Directory of the run; made if missing, continued if it holds one.")
flags.DEFINE_string("init_from", None, "A run whose weights this one begins with; its config, too, where --config is missing.")
flags.DEFINE_float("minutes", None, "Stop cleanly after so many minutes (exit code 75); the next call goes on.",
                   lower_bound=0.0)
flags.DEFINE_string("prediction", None, "A prediction file to register at step 0 (copied into the workdir).")
flags.DEFINE_integer("profile_steps", 0, "Trace so many steps for TensorBoard's profile tab.", lower_bound=0)
flags.DEFINE_string("webhook", None, "An address that is sent a JSON POST at each alarm, and when the run ends or fails.")
flags.DEFINE_string("wandb", None, "A Weights & Biases project to mirror the run in (needs the package wandb).")
flags.DEFINE_float("heartbeat", HEARTBEAT, "Seconds without a sign of life after which a process of several is lost; "
                   "the others name it and end with 75.", lower_bound=0.5)
flags.DEFINE_boolean("distributed", False, "Join the job that Cloud TPU, SLURM or Open MPI describes to this process.")
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def main(_: list[str]) -> int:
    if not FLAGS.workdir:
        raise InputError("--workdir", "is missing", "name a directory for the run, e.g. --workdir=runs/first")
    command_line.keep_compiled(FLAGS.workdir)
    config, preset = continued(FLAGS.init_from) if FLAGS.init_from else command_line.configured()
    launch = Launch(FLAGS.workdir, preset, FLAGS.minutes, FLAGS.prediction, FLAGS.profile_steps,
                    webhook=FLAGS.webhook, wandb=FLAGS.wandb, heartbeat=FLAGS.heartbeat, began=BEGAN)
    result = run(config, launch)
    if FLAGS.json:
        command_line.print_json(result)
    else:
        print_summary(config.name, result)
    return 0


def continued(run_directory: str) -> tuple[Config, Config]:
    """(config, preset) of a run that begins with the weights of another: of --config, else of that run itself."""
    changes = {"train.init_from": run_directory}
    if FLAGS.config:
        _, base = command_line.configured()
    else:
        try:
            base = read_config(run_directory)
        except InputError as error:
            raise InputError("--init_from", error.problem, error.cure) from None
        if os.path.isdir(tokenizer := os.path.join(run_directory, TOKENIZER)):
            changes["data.tokenizer"] = tokenizer
    base = override(base, changes)
    return override(base, parse_assignments(FLAGS.set)), base


def print_summary(name: str, result: dict) -> None:
    """What came out, and what a person would want next."""
    mfu = f", MFU {100 * result['mfu']:.0f}%" if result["mfu"] is not None else ""
    print(f"\n{name}: {result['steps']} steps, {result['tokens']:,} tokens, {result['params']['total']:,} parameters, "
          f"{result['tokens_per_second']:,.0f} tokens/s{mfu}")
    if result["status"] == "saturated":
        print(f"  saturated: the held-out loss stopped improving, so the run ended at step {result['steps']}")
    for dataset, r in result["final_eval"].items():
        print(f"  {dataset}: {r['loss']:.4f} +- {r['se']:.4f} nats/token, perplexity {r['perplexity']:.2f}, "
              f"{r['bits_per_byte']:.4f} bits/byte  ({r['tokens']:,} tokens of {r['documents']} documents)")
    if result["sample"]:
        print("\nA sample:\n\n    " + result["sample"].replace("\n", "\n    "))
    python = f"{os.path.relpath(sys.executable)} -m" if ".venv" in sys.executable else "python -m"
    workdir = FLAGS.workdir
    print(f"""
Next:
  {python} tensorboard.main --logdir={workdir}
  {python} tools.generate --workdir={workdir} --prompt="def " --max_new_tokens=40
  {python} tools.inspect_model --config={name}
  {python} experiments.train --config={name} --workdir={workdir}-lr3e-3 --set optim.lr=3e-3""")


if __name__ == "__main__":
    command_line.run(main)
