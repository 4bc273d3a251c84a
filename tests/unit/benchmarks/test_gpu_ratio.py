"""What the timing scripts share: turns that rotate, the ratio of two contestants, and its text."""

from __future__ import annotations

from harness.ratio import machine, median_ratio, race, ratio_text


def test_turns_rotate_and_columns_stay() -> None:
    order: list[str] = []

    def turn(name: str, value: float) -> float:
        order.append(name)
        return value

    rows = race([lambda: turn("a", 1.0), lambda: turn("b", 2.0), lambda: turn("c", 3.0)], 4)
    assert rows == [[1.0, 2.0, 3.0]] * 4
    assert "".join(order) == "abcbcacababc"


def test_a_ratio_is_the_median_over_rounds_with_its_interval() -> None:
    rows = [[1.0, 2.0], [1.0, 3.0], [1.0, 4.0], [2.0, 6.0], [1.0, 100.0]]
    found = median_ratio(rows, 1, 0)
    assert found["median"] == 3.0
    assert 2.0 <= found["low"] <= 3.0 <= found["high"] <= 100.0
    assert median_ratio(rows, 0, 1)["median"] == 1 / 3
    assert median_ratio([[2.0, 2.0]], 0, 1) == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ratio_text({"median": 1.25, "low": 1.2, "high": 1.3}, 2) == "1.25  [1.20, 1.30]"
    assert set(machine()) == {"torch", "cpu_instruction_set"}
