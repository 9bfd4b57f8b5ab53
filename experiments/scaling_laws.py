"""Scaling laws from finished runs: fit.

    python -m experiments.scaling_laws fit --csv=FILE --columns=params=NAME,flops=NAME,loss=NAME \
        --approach=1|2|3|kaplan|repeated|moe|precision|state [--exclude='loss>4.5'] [--bootstrap=1000] [--seed=0] \
        [--budget=1e21 [--at=bits=8] [--served_tokens=1e12]] [--json]

Each figure has a 95% interval; what was excluded is counted, what doesn't fit is named.
"""

import time

from absl import flags

from experiments import command_line
from research.errors import InputError
from research.scaling.analysis import analyse
from research.scaling.points import parse_columns, read_csv

command_line.define_json_flag()
flags.DEFINE_string("csv", None, "A CSV file with a head line and one run a row.")
flags.DEFINE_string("columns", "", "FIELD=NAME,...: the columns of params, tokens or flops (6ND gives the other), and loss; "
                    "for some laws unique_tokens, total_params, bits or state.")
flags.DEFINE_string("approach", "3", "1 (envelope), 2 (isoFLOP parabolas), 3 (parametric), kaplan; with a further column "
                    "repeated, moe, precision, state.")
flags.DEFINE_multi_string("exclude", [], "'COLUMN OP NUMBER': rows to leave out, e.g. 'loss>4.5' or 'loss==nan'. Repeatable.")
flags.DEFINE_integer("bootstrap", 1000, "Resamples that the intervals come from.")
flags.DEFINE_float("budget", None, "FLOPs: also give the best N and D there, and the loss of a run with these.")
flags.DEFINE_string("at", None, "NAME=NUMBER: unique_tokens, expansion (total over active parameters), bits or state there.")
flags.DEFINE_float("served_tokens", None, "Also the cheapest model of the budget's loss that will serve so many tokens.")
flags.DEFINE_integer("seed", 0, "Seed of the resamples.", lower_bound=0)
flags.adopt_module_key_flags(command_line)
FLAGS = flags.FLAGS


def fit() -> dict:
    """The fit that the flags describe."""
    if not FLAGS.csv:
        raise InputError("--csv", "is missing", "name a CSV file with one run a row")
    began = time.monotonic()
    columns = parse_columns(FLAGS.columns)
    points, excluded = read_csv(FLAGS.csv, columns, FLAGS.exclude)
    answer = analyse(points, FLAGS.approach, bootstrap=FLAGS.bootstrap, seed=FLAGS.seed, budget=FLAGS.budget, at=at(),
                     served_tokens=FLAGS.served_tokens)
    column = columns["params"] if columns else "params"
    return answer | {"n_used": f"the column {column!r}", "excluded": sum(excluded.values()) + len(answer["left_out"]),
                     "excluded_by": excluded, "seconds": time.monotonic() - began}


def at() -> tuple[str, float] | None:
    """--at=bits=8 -> ("bits", 8.0)."""
    if FLAGS.at is None:
        return None
    name, _, number = FLAGS.at.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise InputError("--at", f"{FLAGS.at!r} is not NAME=NUMBER", "e.g. --at=bits=8") from None


def show(answer: dict) -> None:
    """The fit as a table and a few lines."""
    print(f"{answer['formula']}; N is {answer['n_used']}")
    print(f"{answer['points']} runs, {answer['excluded']} excluded"
          + "".join(f" ({count} by {text})" for text, count in answer["excluded_by"].items())
          + f"; residual {answer['residual_rms']:.3g} of the loss (rms); {answer['seconds']:.1f} s")
    rows = [("", "value", "low", "high")]
    rows += [(name, *_figures(figure)) for name, figure in answer["parameters"].items()]
    if "optimum" in answer:
        best = answer["optimum"]
        rows += [(f"{name} at {best['flops']:.3g} FLOPs", *_figures(best[name])) for name in ("N_opt", "D_opt", "loss")
                 if best[name]]
        if "served" in best:
            served = best["served"]
            rows += [(f"{name} to serve {served['tokens']:.3g} tokens", *_figures(served[name]))
                     for name in ("N_opt", "D_opt", "flops", "saved")]
    held = answer["leave_largest_out"]
    if held:
        rows.append((f"error at {held['flops']:.3g} FLOPs, left out", *_figures(held["relative_error"])))
    command_line.print_table(rows)
    if held:
        print(f"largest budget: {held['runs']} runs, {held['covered']:.0%} of them inside their 95% interval")
    for found in answer["left_out"]:
        print(f"left out: {found['run']}, {found['reason']}")
    for found in answer["outliers"]:
        print(f"outlier, still in the fit: {found['run']}, {found['residual']:+.3f} in log loss (robust z {found['z']:+.1f})")
    for note in answer["notes"]:
        print(f"note: {note}")


def _figures(figure: dict) -> tuple[str, str, str]:
    return tuple(f"{figure[key]:.5g}" for key in ("value", "low", "high"))


VERBS = {"fit": fit}


def main(argv: list[str]) -> None:
    verb = argv[1] if len(argv) > 1 else ""
    if verb not in VERBS or len(argv) > 2:
        problem = f"unexpected {argv[2]!r}" if verb in VERBS else f"unknown {verb!r}" if verb else "is missing"
        raise InputError("verb", problem, f"choose from: {', '.join(VERBS)}" if verb not in VERBS else "give flags with --")
    answer = VERBS[verb]()
    if FLAGS.json:
        command_line.print_json(answer)
    else:
        show(answer)


if __name__ == "__main__":
    command_line.run(main, arguments=True)
