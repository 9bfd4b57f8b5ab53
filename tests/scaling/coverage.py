"""How often 95% intervals hold the truth: the table docs/results/scaling-coverage.json.

    python -m tests.scaling.coverage 200 > docs/results/scaling-coverage.json
"""

import json
import sys

from tests.scaling.laws_test import coverage

RESAMPLES, NOISE = 192, 0.005


def main(trials: int, approaches: list[str]) -> None:
    shares = {approach: coverage(approach, trials, RESAMPLES, NOISE) for approach in approaches}
    print(json.dumps({"trials": trials, "resamples": RESAMPLES, "noise": NOISE, "share_inside": shares}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or ["2", "3"])
