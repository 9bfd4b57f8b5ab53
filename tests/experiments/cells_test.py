"""Cells that run at the same time don't share cores; this process keeps all of its own."""

import json
import os
import sys

import pytest

from experiments import cells

WHERE = "import json, os, sys, time; time.sleep(1); json.dump(sorted(os.sched_getaffinity(0)), open(sys.argv[1], 'w'))"


@pytest.mark.parametrize("cores", [{0}, {0, 1}, {1, 3, 4, 7, 8}])
@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_shares_are_all_cores_and_none_twice(monkeypatch, cores, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)  # not every system has it
    shares = cells.core_shares(jobs)
    assert len(shares) == jobs
    if len(cores) < jobs:
        assert not any(shares)
    else:
        assert sorted(core for share in shares for core in share) == sorted(cores)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.skipif(not any(cells.core_shares(2)), reason="needs two cores, and a system that says which")
def test_each_of_two_cells_has_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(cells, "command", lambda preset, cell, run, minutes: [sys.executable, "-c", WHERE, f"{run}/cores"])
    rows = [{"cell": name, "overrides": {}, "workdir": str(tmp_path / name), "status": "missing"} for name in "abc"]
    before = os.sched_getaffinity(0)
    assert cells.run_cells(rows, "debug", str(tmp_path), 2, None) == []
    first, second, third = (set(json.loads((tmp_path / name / "cores").read_text())) for name in "abc")
    assert first and second and not first & second and third in (first, second)
    assert os.sched_getaffinity(0) == before == first | second


def test_without_a_word_of_the_system_none_has_its_own(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cells.core_shares(2) == [set(), set()]
