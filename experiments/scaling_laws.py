"""Scaling laws: a ladder of small runs, the law they follow, what it says of a large one, and whether that held.

    python -m experiments.scaling_laws plan|run --workdir=DIR [--family=transformer|mamba2] [--minutes=25] [--jobs=1] \
        [--data='GLOB'] [--dims=32,48,64] [--budgets=1e11,3e11,1e12] [--ratios=1,250] [--set KEY=VALUE]... [--json]
    python -m experiments.scaling_laws fit --csv=FILE --columns=params=NAME,flops=NAME,loss=NAME \
        --approach=1|2|3|kaplan|repeated|moe|precision|state [--exclude='loss>4.5'] [--bootstrap=1000] [--seed=0] \
        [--budget=1e21 [--at=bits=8] [--served_tokens=1e12]] [--json]

    python -m experiments.scaling_laws predict --workdir=DIR [--csv=FILE] [--approach=3] [--times=10 | --budget=FLOPS] [--dim=N]
    python -m experiments.scaling_laws predict --csv=FILE --output=FILE [--approach=3] [--times=10 | --budget=FLOPS]
    python -m experiments.scaling_laws score --workdir=DIR [--run=RUN]...
    python -m experiments.scaling_laws report --workdir=DIR [--approach=3] [--against=OTHER] [--output=DIRECTORY]

plan says what would run and what it costs here (WORKDIR/plan.json), run does it (resumable) and writes WORKDIR/ladder.csv.
predict writes WORKDIR/prediction.json, which experiments.train --prediction registers at step 0; score says what became of it.
report makes tables, pictures and a verdict; --against says at which budget which of two ladders' laws is lower.
Each figure has a 95% interval; what was excluded is counted, what doesn't fit is named.
"""

import json
import os
import time

import numpy as np
from absl import flags

from configs.ladder import FAMILIES
from experiments import command_line, ladder, ladder_report
from experiments.cells import cost_in_words, total_cost
from research.config import parse_assignments
from research.errors import InputError
from research.scaling.analysis import analyse
from research.scaling.ladder import TOKENS_PER_PARAM
from research.scaling.points import parse_columns, read_csv
from research.scaling.prediction import seal
from research.scaling.uncertainty import MOST
from research.schema import PREDICTION_FILE

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
flags.DEFINE_integer("seed", 0, "Seed of the ladder's runs, and of the resamples.", lower_bound=0)
flags.DEFINE_string("workdir", None, "Directory of the ladder: its plan, runs and CSV file.")
flags.DEFINE_enum("family", "transformer", sorted(FAMILIES), "Whose ladder.")
flags.DEFINE_string("data", None, "A glob of text files in place of the source code that every machine has.")
flags.DEFINE_list("dims", [], "Widths; the family's if not given.")
flags.DEFINE_list("budgets", [], "IsoFLOP budgets in FLOPs; the family's if not given.")
flags.DEFINE_list("ratios", list(map(str, TOKENS_PER_PARAM)), "Tokens a parameter, from and to.")
flags.DEFINE_multi_string("set", [], "KEY=VALUE, overrides one field of all runs. Repeatable.")
flags.DEFINE_float("times", 10.0, "FLOPs of the predicted run over the ladder's largest.", lower_bound=1.0)
flags.DEFINE_integer("dim", None, "Width of the predicted run; the law's optimum, if not given.", lower_bound=1)
flags.DEFINE_string("output", None, "What predict writes (WORKDIR/prediction.json if not given), or report (WORKDIR/report).")
flags.DEFINE_string("against", None, "Another ladder's directory, whose law is compared with this one's.")
flags.DEFINE_multi_string("run", [], "A run to score; those in WORKDIR if not given. Repeatable.")
flags.DEFINE_boolean("measure", True, "Time steps for the plan; else a share of the matmul peak.")
flags.DEFINE_float("minutes", None, "Stop cleanly after so long (exit code 75); the next call goes on.", lower_bound=0.0)
flags.DEFINE_integer("jobs", 1, "Local processes at once.", lower_bound=1)
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
                     for name in ("N_opt", "D_opt", "flops", "saved") if served[name]]
    if "budgets" in answer:
        rows += [(f"N_opt of the parabola at {row['flops']:.3g} FLOPs", *_figures(row["N_opt"])) for row in answer["budgets"]]
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


def numbers(name: str, kind: type) -> list:
    """The values of a list flag, above 0 and finite."""
    try:
        values = [kind(float(text)) for text in FLAGS[name].value]
    except (ValueError, OverflowError):
        values = [0]
    if not all(0 < value < float("inf") for value in values):
        raise InputError(f"--{name}", f"{','.join(FLAGS[name].value)!r} isn't a list of numbers above 0", "e.g. 1,2,3")
    return values


def _asked() -> dict:
    """What the flags ask a ladder to be of."""
    ratios = numbers("ratios", float)
    if len(ratios) != 2 or not 0 < ratios[0] < ratios[1]:
        raise InputError("--ratios", f"{','.join(FLAGS.ratios)!r} isn't LOW,HIGH", "e.g. --ratios=1,250")
    return ladder.asked(FLAGS.family, FLAGS.data, numbers("dims", int), numbers("budgets", float), (ratios[0], ratios[1]),
                        FLAGS.seed, parse_assignments(FLAGS.set))


def _planned(*apart: str) -> dict | None:
    """WORKDIR's plan, if there is one. The flags that are given have to agree with it, but those in `apart`."""
    found = ladder.read_plan(_workdir())
    if found is not None:
        given = {name: value for name, value in _asked().items() if FLAGS[name].present and name not in apart}
        ladder.check_asked(_workdir(), found, given)
    return found


def plan() -> dict:
    """The ladder that the flags describe: what would run, and what it costs here."""
    return ladder.make_plan(_workdir(), _asked(), FLAGS.measure)


def show_plan(answer: dict) -> None:
    rows = [("run", "params", "tokens", "FLOPs", "trained here", "seconds")]
    for row in answer["trunks"] + answer["rungs"]:
        rows.append((row["cell"], f"{row['params']:,}", f"{row['tokens']:,}", f"{row['flops']:.3g}",
                     f"{row['trained_flops']:.3g} FLOPs", f"{row['seconds']:.0f}"))
    command_line.print_table(rows)
    every = answer["trunks"] + answer["rungs"]
    budgets = [row["flops"] for row in answer["rungs"]]
    decades = np.log10(max(budgets) / min(budgets))
    at_once = min(FLAGS.jobs, os.cpu_count() or 1)
    print(f"{len(answer['rungs'])} runs from {len(answer['trunks'])} trunks, {decades:.2f} decades of compute, "
          f"{sum(row['trained_flops'] for row in every):.3g} FLOPs, about "
          f"{sum(row['seconds'] for row in every) / 60 / at_once:.0f} minutes, {at_once} at a time "
          f"({answer['seconds_from']}, and "
          f"{answer['startup_seconds']:.0f} s a run to start, evaluate and save)")


def run() -> dict:
    """Runs what isn't finished of WORKDIR's plan, which it makes where there is none."""
    found = _planned() or plan()
    failed = ladder.run(FLAGS.workdir, found, FLAGS.jobs, FLAGS.minutes)
    return {"rungs": ladder.collect(FLAGS.workdir, found), "failed": failed,
            "csv": os.path.join(FLAGS.workdir, ladder.CSV_FILE)}


def show_run(answer: dict) -> None:
    rows = [("run", "params", "tokens", "FLOPs", "held-out loss")]
    rows += [(row["run"], f"{row['params']:,}", f"{row['tokens']:,}", f"{row['flops']:.3g}",
              "diverged" if row["diverged"] else f"{row['loss']:.4f} +- {row['loss_se']:.4f}") for row in answer["rungs"]]
    command_line.print_table(rows)
    print(answer["csv"] + (f"; failed: {', '.join(answer['failed'])}" if answer["failed"] else ""))


def predict() -> dict:
    """The final loss of a larger run, sealed in a file before it is made."""
    path = FLAGS.output or os.path.join(_workdir(), PREDICTION_FILE)
    if os.path.exists(path):
        raise InputError("--output", f"{path} is a prediction already", "name another file: what was predicted stays")
    found = _planned("seed") if FLAGS.workdir or not FLAGS.csv else None  # here, it's the bootstrap's
    if found is None and not FLAGS.csv:
        raise InputError("--workdir", f"{FLAGS.workdir} has no {ladder.PLAN_FILE}", "name a ladder's directory, or a --csv")
    if found is None and FLAGS.dim:
        raise InputError("--dim", "says nothing without a ladder's plan", "leave it out: the law's best size is predicted")
    columns = parse_columns(FLAGS.columns)
    n_used = columns["params"] if columns else "params"
    if found and n_used not in ("params", "non_embedding"):
        raise InputError("--columns", f"the target's {n_used!r} isn't known", "params=params or params=non_embedding")
    points, excluded, lost = ladder.ladder_points(_csv(), columns, FLAGS.exclude)
    flops = FLAGS.times * float(points.flops_P.max()) if FLAGS.budget is None else FLAGS.budget
    if not 0 < flops < float("inf"):
        raise InputError("--budget", f"{flops:g} FLOPs can't be spent", "give more than 0")
    answer = ladder.predict(points, found, FLAGS.approach, flops, FLAGS.dim, n_used, FLAGS.bootstrap, FLAGS.seed)
    answer = seal(answer | {"diverged": lost, "excluded_by": excluded})
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        json.dump(answer, file, indent=1)
    return answer | {"file": path}


def show_prediction(answer: dict) -> None:
    target, tests = answer["target"], answer["backtests"]
    print(f"{answer['value']:.4f} nats/token, 95% from {answer['low']:.4f} to {answer['high']:.4f}: {answer['law']}, N is "
          f"{answer['n_used']}, {len(answer['runs'])} runs")
    print(f"of a run of {target['params']:,.0f} parameters on {target['tokens']:,.0f} tokens, {target['flops']:.3g} FLOPs, "
          f"{target['times']:.1f} times the largest")
    if answer["drift"]["value"]:
        said, drift = answer["of_law"], answer["drift"]
        band = f"{drift['low']:+.2%} to {drift['high']:+.2%}" if drift["high"] < MOST else "too few budgets for an interval"
        print(f"the law alone says {said['value']:.4f} ({said['low']:.4f} to {said['high']:.4f}); in its backtests runs ended "
              f"{drift['value']:+.2%} ({band}) from it for each factor e of compute, which is carried on: "
              f"{answer['value'] / said['value'] - 1:+.2%}")
    best = answer["optimum"]
    command_line.print_table([("best at this budget", "value", "low", "high")] + [
        (name, *_figures(best[name])) for name in ("N_opt", "D_opt") if best[name]])
    for name, words in (("next", "the next budget"), ("later", "all later budgets")):
        if tests[name]["runs"]:
            found = tests[name]
            print(f"backtests: each prefix of the ladder predicts {words}: {found['covered']} of {found['runs']} inside their "
                  f"interval, mean error {found['mean_absolute_error']:.2%}, worst {found['worst']:.2%}")
    print(f"the interval is {answer['widened']:.2f} times that of the law and its drift" if tests["later"]["runs"] else
          "no backtests: the ladder is too short, and the interval only the bootstrap's")
    for found in answer["left_out"]:
        print(f"left out: {found['run']}, {found['reason']}")
    for note in answer["notes"]:
        print(f"note: {note}")
    if target["preset"] is None:
        print(f"\n{answer['file']}; of no config, so no run can register it: compare its loss by hand")
        return
    sets = " ".join(f"--set '{key}={value}'" for key, value in target["overrides"].items())
    print(f"\n{answer['file']}; register it and see, once or with several seeds:\n"
          f"  python -m experiments.train --config={target['preset']} --workdir={FLAGS.workdir}/target-seed0 "
          f"--prediction={answer['file']} {sets}")


def score() -> dict:
    """What became of the predictions of finished and diverged runs."""
    rows = ladder.scores(_runs())
    if not rows:
        raise InputError("--run", "no finished or diverged run with a registered prediction",
                         "train with --prediction=FILE, to the end")
    return ladder.score_summary(rows)


def show_score(answer: dict) -> None:
    rows = [("run", "seed", "predicted", "95%", "observed", "error", "")]
    for row in answer["scores"]:
        band, seen = row["predicted"], row["observed"] is not None
        nothing = "diverged" if row["diverged"] else "not finite"
        rows.append((row["run"], str(row["seed"]), f"{band['value']:.4f}", f"{band['low']:.4f} to {band['high']:.4f}",
                     f"{row['observed']:.4f} +- {row['observed_se']:.4f}" if seen else nothing,
                     f"{row['error']:+.4f} ({row['relative_error']:+.2%})" if seen else "-",
                     "covered" if row["covered"] else "NOT covered"))
    command_line.print_table(rows)
    print(f"{answer['covered']} of {answer['runs']} inside the interval"
          + (f"; diverged, which is a miss: {', '.join(answer['diverged'])}" if answer["diverged"] else ""))
    for mean in answer["mean_relative_errors"]:
        found = mean["relative_error"]
        print(f"mean error of {mean['runs']} runs of prediction {mean['sha256'][:12]}: {found['value']:+.2%}, 95% from "
              f"{found['low']:+.2%} to {found['high']:+.2%} (Student, over seeds)")


def report() -> dict:
    """Tables, pictures and a verdict from what is there."""
    directory = FLAGS.output or os.path.join(_workdir(), "report")
    points, excluded, lost = ladder.ladder_points(_csv(), parse_columns(FLAGS.columns), FLAGS.exclude)
    for needed in (_workdir(), directory):  # before the work, as this may be what fails
        os.makedirs(needed, exist_ok=True)
    scored, found = ladder.scores(_runs()), _planned("seed")
    answer = ladder_report.summarise(points, FLAGS.approach, FLAGS.bootstrap, FLAGS.seed)
    if FLAGS.against:
        theirs = os.path.join(FLAGS.against, ladder.CSV_FILE)
        other, _, _ = ladder.ladder_points(theirs, parse_columns(FLAGS.columns), FLAGS.exclude)
        answer["crossing"] = ladder_report.crossing(points, other, FLAGS.approach, FLAGS.bootstrap, FLAGS.seed,
                                                    (_workdir(), FLAGS.against))
        answer["verdict"] += ladder_report.compared(answer["crossing"])
    answer |= {"scores": scored, "excluded_by": excluded, "diverged": lost}
    answer |= {"left_out": answer["fits"][FLAGS.approach]["left_out"]}
    if found and (results := ladder.results_of(found)):
        answer["total"] = total_cost(results)
        answer["verdict"].append(cost_in_words(answer["total"]))
    largest = max([10 * float(points.flops_P.max()), *(row["flops"] for row in answer["scores"])])
    ladder_report.draw(os.path.join(directory, "report.png"), points, FLAGS.approach, FLAGS.bootstrap, FLAGS.seed,
                       answer["backtests"], ladder_report.loss_curves(found["trunks"] + found["rungs"]) if found else {},
                       answer["scores"], largest)
    ladder_report.write(directory, answer, points, lost)
    return answer | {"directory": directory}


def show_report(answer: dict) -> None:
    print("\n".join(answer["verdict"]))
    for found in answer["left_out"]:
        print(f"left out: {found['run']}, {found['reason']}")
    if answer["scores"]:
        show_score(ladder.score_summary(answer["scores"]))
    print(f"{answer['directory']}: report.md, report.png, report.json")


def _runs() -> list[str]:
    """Those of --run, else WORKDIR and the directories in it."""
    if FLAGS.run:
        return FLAGS.run
    if not os.path.isdir(_workdir()):
        raise InputError("--workdir", f"{FLAGS.workdir} does not exist", "name a ladder's directory")
    return [FLAGS.workdir, *sorted(entry.path for entry in os.scandir(FLAGS.workdir) if entry.is_dir())]


def _csv() -> str:
    return FLAGS.csv or os.path.join(_workdir(), ladder.CSV_FILE)


def _workdir() -> str:
    if not FLAGS.workdir:
        raise InputError("--workdir", "is missing", "name a directory for the ladder")
    return FLAGS.workdir


VERBS = {"plan": (plan, show_plan), "run": (run, show_run), "fit": (fit, show), "predict": (predict, show_prediction),
         "score": (score, show_score), "report": (report, show_report)}


def main(argv: list[str]) -> int:
    verb = argv[1] if len(argv) > 1 else ""
    if verb not in VERBS or len(argv) > 2:
        problem = f"unexpected {argv[2]!r}" if verb in VERBS else f"unknown {verb!r}" if verb else "is missing"
        raise InputError("verb", problem, f"choose from: {', '.join(VERBS)}" if verb not in VERBS else "give flags with --")
    compute, tell = VERBS[verb]
    answer = compute()
    if FLAGS.json:
        command_line.print_json(answer)
    else:
        tell(answer)
    return 1 if verb == "run" and answer["failed"] else 0


if __name__ == "__main__":
    command_line.run(main, arguments=True)
