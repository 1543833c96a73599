"""Every probe gives the same values with lite as with detectron2; see runner.py for how."""

import pytest
import runner


@pytest.mark.parametrize("topic", runner.list_probes())
def test_same_values(topic: str, reference_python: str):
    differences, tolerance = runner.compare(topic, reference_python)
    assert differences, "the probe returned nothing"
    too_large = {key: value for key, value in differences.items() if not value <= tolerance}
    assert not too_large, f"differs by more than {tolerance}: {too_large}"


class TestDifference:
    """The comparison itself: it must not call unequal things equal."""

    @pytest.mark.parametrize(
        "a, b",
        [
            (1, 1.0), (1.0, "1"), ("a", "b"), (None, 0), ([1, 2], [1]), ({"a": 1}, {"b": 1}), (True, False),
            (runner.np.zeros(2), runner.np.zeros(3)), (float("nan"), 1.0), (1.0, float("inf")), (3, 4),
        ],
    )
    def test_unequal(self, a, b):
        assert runner.difference(a, b) == float("inf")

    def test_equal_and_relative(self):
        assert runner.difference([None, "x", {"k": 3}], [None, "x", {"k": 3}]) == 0.0
        assert runner.difference(float("nan"), float("nan")) == 0.0
        assert runner.difference(runner.np.array([]), runner.np.array([])) == 0.0
        assert runner.difference(100.0, 101.0) == pytest.approx(0.01)
        assert runner.difference(0.001, 0.002) == pytest.approx(0.001)
