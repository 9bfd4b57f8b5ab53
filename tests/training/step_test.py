"""What XLA is told of a step on a CPU."""

import pytest

from tests.training.common import one_device, small

YNNPACK = "__ynn_fusion"


@pytest.fixture(scope="module")
def several_rows_use_it():
    if YNNPACK not in one_device(small(train__batch_size=2)).compile().as_text():
        pytest.skip("XLA has no YNNPACK on this processor")


@pytest.mark.parametrize("change", [{"train__batch_size": 1}, {"train__batch_size": 2, "train__microbatches": 2}])
def test_a_single_row_has_no_sum_over_tokens_in_ynnpack(several_rows_use_it, change):
    assert YNNPACK not in one_device(small(**change)).compile().as_text()
