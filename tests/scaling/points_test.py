"""Runs from a CSV: columns by name, what's missing by C = 6ND, exclusions that are counted, one line for bad input."""

import numpy as np
import pytest

from research.errors import InputError
from research.scaling.points import budgets, make, parse_columns, read_csv

HEAD = "Model Size,Training FLOP,loss,kind\n"
ROWS = "1e6,1.2e14,4.0,a\n2e6,4.8e14,3.5,b\n\n4e6,1.92e15,5.0,c\n"
COLUMNS = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}


def written(tmp_path, text: str) -> str:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_tokens_follow_from_flops_and_the_reverse(tmp_path):
    points, excluded = read_csv(written(tmp_path, "\ufeff" + HEAD + ROWS), COLUMNS)
    np.testing.assert_allclose(points.tokens_P, [2e7, 4e7, 8e7])
    assert points.names == ("line 2", "line 3", "line 5") and excluded == {}
    np.testing.assert_allclose(make([10.0], [1.0], tokens=[5.0]).flops_P, [300.0])
    both = make([10.0, 20.0], [1.0, 1.0], tokens=[5.0, 5.0], flops=[400.0, 800.0])
    assert both.flops_per_weight_token == 8


@pytest.mark.parametrize("condition, left_out", [
    ("loss>4.5", 1), ("loss >= 4", 2), ("params<2e6", 1), ("Model Size==2e6", 1), ("flops!=1.2e14", 2), ("kind==nan", 3),
    ("loss==nan", 0), ("loss<0", 0),
])
def test_exclusions_are_counted(tmp_path, condition, left_out):
    path = written(tmp_path, HEAD + ROWS)
    if left_out == 3:
        with pytest.raises(InputError, match="leaves no rows to fit .3 excluded"):
            read_csv(path, COLUMNS, [condition])
        return
    points, excluded = read_csv(path, COLUMNS, [condition])
    assert excluded == {condition: left_out} and len(points) == 3 - left_out


def test_a_row_counts_for_its_first_condition(tmp_path):
    assert read_csv(written(tmp_path, HEAD + ROWS), COLUMNS, ["loss>3.9", "params>3e6"])[1] == {"loss>3.9": 2, "params>3e6": 0}


def test_a_diverged_run_can_be_left_out_by_name(tmp_path):
    path = written(tmp_path, HEAD + ROWS + "8e6,1e16,nan,d\n")
    with pytest.raises(InputError, match="loss: 1 of 4 runs aren't positive and finite: line 6 has nan;.*'loss==nan'"):
        read_csv(path, COLUMNS)
    points, excluded = read_csv(path, COLUMNS, ["loss==nan"])
    assert len(points) == 3 and excluded == {"loss==nan": 1}


@pytest.mark.parametrize("text, columns, exclude, message", [
    (HEAD + ROWS, {"params": "N"}, [], "--columns: params: .* has no column 'N'; it has Model Size, Training FLOP, loss, kind"),
    (HEAD + ROWS, {"params": "Model Size", "flops": "Training FLOP"}, [], "no column for loss; .*it has|no column for loss"),
    (HEAD + ROWS, {"params": "Model Size", "loss": "loss"}, [], "neither tokens nor flops has a column"),
    (HEAD + ROWS, {}, [], "no column for params; name one: params=NAME; .* has Model Size"),
    (HEAD + ROWS, COLUMNS, ["loss>"], "--exclude: 'loss>' is not COLUMN OP NUMBER"),
    (HEAD + ROWS, COLUMNS, ["loss>x"], "is not COLUMN OP NUMBER"),
    (HEAD + ROWS, COLUMNS, ["loss>nan"], "is not COLUMN OP NUMBER"),
    (HEAD + ROWS, COLUMNS, ["__import__('os').system('true')>1"], "--exclude: no column"),
    (HEAD + ROWS, COLUMNS, ["lss>4"], "--exclude: no column 'lss'; the file has Model Size"),
    (HEAD + "1e6,-1,4,a\n", COLUMNS, [], "flops: 1 of 1 runs aren't positive and finite: line 2 has -1"),
    (HEAD + "1e6,x,4,a\n", COLUMNS, [], "flops: 1 of 1 runs aren't positive and finite: line 2 has nan"),
    (HEAD + "1e6,4\n", COLUMNS, [], "line 2 of .* has 2 cells, the head 4"),
    (HEAD, COLUMNS, [], "leaves no rows to fit"),
    ("", COLUMNS, [], "has no column 'Model Size'"),
])
def test_bad_files_are_one_line(tmp_path, text, columns, exclude, message):
    with pytest.raises(InputError, match=message) as caught:
        read_csv(written(tmp_path, text), columns, exclude)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(InputError, match="--csv: nowhere.csv can't be read"):
        read_csv("nowhere.csv", COLUMNS)


def test_columns_are_parsed():
    columns = {"params": "Model Size", "flops": "C=6ND, a", "loss": "L"}
    assert parse_columns("params=Model Size, flops=C=6ND, a,loss=L") == columns
    for text, message in (("param=N", "is not FIELD=NAME"), ("params=", "is not FIELD=NAME"), ("loss=a,loss=b", "named twice")):
        with pytest.raises(InputError, match=message):
            parse_columns(text)


def test_budgets_are_cut_at_gaps():
    points = make(np.ones(5), np.ones(5), flops=[1e18, 1e20, 1.05e18, 1e19, 0.96e20])
    assert [sorted(index) for index in budgets(points)] == [[0, 2], [3], [1, 4]]


def test_runs_at_any_compute_make_no_wide_budget():
    found = budgets(make(np.ones(100), np.ones(100), flops=np.geomspace(1e18, 1e19, 100)))
    assert len(found) == 10 and np.concatenate(found).tolist() == list(range(100))
