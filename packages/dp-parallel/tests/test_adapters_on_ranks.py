import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.parametrize("ranks", [2, 4])]


def test_gradients_of_adapters_equal_one_process_and_frozen_weights_have_none(reports, ranks):
    for report in reports[ranks]:
        found = report["adapters"]
        assert found["same parameters"]
        assert found["adapters only"]
        assert found["error"] <= 1e-10


def test_frozen_weights_are_sharded_too(reports, ranks):
    shares = [report["adapters"]["share"] for report in reports[ranks]]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) < 1.2 / ranks
