"""Runs from a CSV: columns by name, what's missing by C = 6ND, exclusions that are counted, one line for bad input."""

import numpy as np
import pytest

from research.errors import InputError
from research.scaling.points import budgets, check_falls, make, parse_columns, read_csv, rungs
from tests.scaling.divergence_test import grid, scatter
from tests.scaling.ladder_test import climb
from tests.scaling.laws_test import chinchilla, ladder, parabolas

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


def test_rows_without_positive_numbers_are_left_out_by_name(tmp_path):
    path = written(tmp_path, HEAD + ROWS + "8e6,1e16,nan,d\n8e6,,3,e\n-1,1e16,inf,f\n")
    points, excluded = read_csv(path, COLUMNS)
    assert len(points) == 3 and excluded == {}
    assert points.left_out == (("line 6", "loss is 'nan'"), ("line 7", "flops is empty"),
                               ("line 8", "params is '-1', loss is 'inf'"))
    assert read_csv(path, COLUMNS, ["loss==nan"])[0].left_out == (("line 7", "flops is empty"),)
    assert points.take(np.array([0])).left_out == points.left_out


def test_further_columns_are_carried(tmp_path):
    path = written(tmp_path, HEAD.replace("kind", "Bits") + ROWS.replace("a", "4").replace("b", "8").replace("c", "16"))
    points, _ = read_csv(path, COLUMNS | {"bits": "Bits"})
    np.testing.assert_array_equal(points.extra["bits"], [4, 8, 16])
    np.testing.assert_array_equal(points.take(points.loss_P > 3.9).extra["bits"], [4, 16])
    assert parse_columns("params=N,bits=b,unique_tokens=U,loss=L")["unique_tokens"] == "U"


def test_seeds_are_one_rung():
    points = make([1e6, 1e6, 1e6, 2e6], [4.0, 4.1, 3.9, 3.8], tokens=[1e7, 1e7, 2e7, 1e7])
    assert rungs(points)[0] == rungs(points)[1] and len(set(rungs(points))) == 3
    at_bits = make([1e6] * 2, [4.0, 4.1], tokens=[1e7] * 2, extra={"bits": [4.0, 8.0]})
    assert len(set(rungs(at_bits))) == 2


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
    (HEAD + "1e6,-1,4,a\n", COLUMNS, [], "flops: 1 of 1 rows of .* no positive number in 'Training FLOP', e.g. '-1' in line 2"),
    (HEAD + ROWS.replace("1e6", "1Q").replace("2e6", "2Q"), COLUMNS, [], "params: 2 of 3 rows .* '1Q' in line 2; name another"),
    (HEAD + ROWS.replace("4.0", "4B").replace("3.5", "3B"), COLUMNS, [], "loss: 2 of 3 rows .* '4B' in line 2; name another"),
    (HEAD.replace(",", ";") + "1e6;1e14;2,45;a\n", COLUMNS, [], "runs.csv: '2,45' in 'loss', line 2, has a decimal comma"),
    (HEAD.replace(",", ";") + "70.000;1e14;2,345;a\n", COLUMNS, [], "'2,345' in 'loss', line 2, may be thousands or have"),
    (HEAD + "1e6,1,000,000,4\n1e6,1e14,4,a\n", COLUMNS, [], "line 2 of .* has 5 cells, the head 4; .*needs quotes"),
    (HEAD + ROWS, COLUMNS, ["LOSS>4", "los>4"], "--exclude: no column 'los'; the file has"),
    ("loss,LOSS,Model Size,Training FLOP\n4,4,1e6,1e14\n", COLUMNS | {"loss": "Loss"}, [], "has 2 columns 'Loss'; rename one"),
    (HEAD + "1e6,4\n", COLUMNS, [], "line 2 of .* has 2 cells, the head 4"),
    (HEAD.replace("kind", "loss") + ROWS, COLUMNS, [], "loss: .* has 2 columns 'loss'; rename one"),
    (HEAD + "1e6,1.2e14,4.0,a\n" * 20_001, COLUMNS, [], "has 20001 rows; give one row a run"),
    (HEAD, COLUMNS, [], "leaves no rows to fit"),
    ("", COLUMNS, [], "has no column 'Model Size'"),
])
def test_bad_files_are_one_line(tmp_path, text, columns, exclude, message):
    with pytest.raises(InputError, match=message) as caught:
        read_csv(written(tmp_path, text), columns, exclude)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    HEAD.replace(",", ";") + ROWS.replace(",", ";"),
    "\ufeffsep=;\r\n" + HEAD.replace(",", ";") + ROWS.replace(",", ";"),
    HEAD.replace(",", "\t") + ROWS.replace(",", "\t"),
    (HEAD + ROWS).replace("\n", "\r\n"),
    HEAD.upper() + ROWS,
    "\ufeff# of a paper, 2022\n\n" + HEAD + "# the small ones\n" + ROWS.replace("c\n", "c,\n") + "#\n",
    "# " + HEAD + ROWS,
    HEAD.replace(",", ", ") + ROWS.replace("1e6", '"1,000,000"').replace("2e6", '"2,000,000"'),
    '"Model Size";Training FLOP;"loss, in nats; mean";kind\n' + ROWS.replace(",", ";"),
    HEAD + ROWS.replace("1e6", "1M").replace("2e6", "0.002 B").replace("1.92e15", "1920 trillion"),
    HEAD + ROWS.replace("2e6", "2 000 000").replace("4e6", "4'000'000.0"),
])
def test_a_file_may_be_written_in_many_ways(tmp_path, text):
    """Semicolons, tabs, CRLF, capitals, comments, Excel's and NumPy's heads, trailing commas, 1,000, quoted names, 1M."""
    columns = COLUMNS | ({"loss": "loss, in nats; mean"} if "nats" in text else {})
    points, _ = read_csv(written(tmp_path, text), columns, ["loss>9"])
    np.testing.assert_allclose(points.params_P, [1e6, 2e6, 4e6])
    np.testing.assert_allclose(points.flops_P, [1.2e14, 4.8e14, 1.92e15])
    np.testing.assert_array_equal(points.loss_P, [4.0, 3.5, 5.0])


def test_a_colour_is_no_comment(tmp_path):
    text = "color," + HEAD + "".join(f"#fae{i},{row}\n" for i, row in enumerate(ROWS.split()))
    assert len(read_csv(written(tmp_path, text), COLUMNS)[0]) == 3


def test_one_comma_is_of_thousands_where_another_number_has_a_decimal_point(tmp_path):
    text = HEAD + '"70,000",1.2e14,4.25,a\n"80,000",1.2e14,4.0,a\n'
    np.testing.assert_array_equal(read_csv(written(tmp_path, text), COLUMNS)[0].params_P, [7e4, 8e4])
    with pytest.raises(InputError, match="'70,000' in 'Model Size', line 2, may be thousands"):
        read_csv(written(tmp_path, text.replace("4.25", "4").replace("4.0", "4").replace("1.2", "12")), COLUMNS)


def test_conditions_know_scales_too(tmp_path):
    assert read_csv(written(tmp_path, HEAD + ROWS), COLUMNS, ["Model Size<=2M"])[1] == {"Model Size<=2M": 2}


def test_a_ladders_runs_have_names_and_say_who_diverged(tmp_path):
    text = "params,tokens,loss,run,diverged\n1e6,1e8,4,a,0\n\n2e6,1e8,nan,b,1\n4e6,1e8,,c,0\n4e6,2e8,3,d,0\n2e6,2e8,3,e,0\n"
    points, _ = read_csv(written(tmp_path, text), {})
    assert points.names == ("a", "d", "e")
    assert points.left_out == (("b", "diverged, as its file says"), ("c", "loss is empty"))


def accuracy(points, seed: int = 0):
    """0.70 for the worst loss, 0.78 for the best, a little noise."""
    best, worst = points.loss_P.min(), points.loss_P.max()
    share_P = 0.78 - 0.08 * (points.loss_P - best) / (worst - best)
    share_P += 0.002 * np.random.default_rng(seed).standard_normal(len(points))
    return make(points.params_P, share_P, points.tokens_P, points.flops_P)


@pytest.mark.parametrize("points", [grid, ladder, parabolas, scatter, lambda: climb(0.0)])
def test_what_rises_is_no_loss(points):
    """25 runs of 0.70 rising to 0.78; isoFLOP designs, where the largest size isn't the best; any size at any budget."""
    check_falls(points())
    with pytest.raises(InputError, match="loss: it rises with compute .rank correlation 0.*; name a column that falls"):
        check_falls(accuracy(points()))


def test_a_loss_may_rise_by_overfitting():
    """Repeated 64 times, the largest models and longest runs are the worst."""
    params_P, tokens_P = (a_P.ravel() for a_P in np.meshgrid(np.geomspace(1e6, 1e9, 5), np.geomspace(1e8, 6.4e9, 5)))
    loss_P = 3 + 0.1 * np.log(params_P / 1e6) * np.log(tokens_P / 1e8)
    check_falls(make(params_P, loss_P, tokens_P, extra={"unique_tokens": np.full(25, 1e8)}))
    with pytest.raises(InputError, match="it rises with compute"):
        check_falls(make(params_P, loss_P, tokens_P))
    overtrained = make([1e8] * 20, chinchilla(1e8, np.geomspace(2e9, 1e12, 20)), np.geomspace(2e9, 1e12, 20))
    check_falls(overtrained)


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


def test_scattered_budgets_with_strays_between_them_stay_whole():
    """9 runs within 3% of each of 2 budgets, and a chain of strays around them: windows cut from its left would cut both."""
    near = np.linspace(-0.03, 0.03, 9)
    strays = [0.76, 0.84, 0.92, 1.08, 1.16, 1.25, 1.34, 1.42, 1.58, 1.66]
    found = budgets(make(np.ones(28), np.ones(28), flops=np.exp(np.concatenate([1 + near, 1.5 + near, strays]))))
    assert sorted(np.concatenate(found)) == list(range(28))
    for b in range(2):
        assert any(set(range(9 * b, 9 * b + 9)) <= set(index) for index in found)
