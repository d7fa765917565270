"""The value that decides where a row leaves: what it is resolved from, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from fastkd.exits.rule import ExitRule, stages_of

EXIT_LAYERS = [1, 2, 4]


def resolve(speed: Any = 0.5, criterion: str = "entropy", top_n: int | None = None, **options: Any) -> ExitRule:
    return ExitRule.resolve(speed, criterion, top_n, **{"exit_layers": EXIT_LAYERS, "num_labels": 3, **options})


@pytest.mark.parametrize(
    ("speed", "asked_layers", "layers", "thresholds"),
    [
        (0.5, None, (1, 2, 4), (0.5, 0.5)),
        (0, None, (4,), ()),
        ([0.0, 0.3], None, (2, 4), (0.3,)),
        ([0.2, 0.3], [1], (1, 4), (0.2,)),
        (0.5, [2, 4], (2, 4), (0.5,)),
        (0.5, [4], (4,), ()),
    ],
)
def test_heads_that_let_no_row_leave_are_not_asked(
    speed: Any, asked_layers: list[int] | None, layers: tuple[int, ...], thresholds: tuple[float, ...]
) -> None:
    rule = resolve(speed, asked_layers=asked_layers)
    assert (rule.layers, rule.thresholds) == (layers, thresholds)
    assert rule.leaves_early == bool(thresholds)
    assert rule.last_layer == 4


def test_the_threshold_is_0_where_no_row_leaves() -> None:
    rule = resolve([0.2, 0.3], asked_layers=[1])
    assert [rule.threshold(layer) for layer in range(1, 5)] == [0.2, 0.0, 0.0, 0.0]


def test_stages_are_the_layers_up_to_each_head() -> None:
    assert resolve().stages == (range(1, 2), range(2, 3), range(3, 5))
    assert resolve(0).stages == (range(1, 5),)
    assert stages_of([3]) == (range(1, 4),)


def test_equal_options_give_equal_rules() -> None:
    assert resolve(0.5) == resolve([0.5, 0.5]) != resolve(0.4)
    assert hash(resolve(0.5)) == hash(resolve([0.5, 0.5]))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("speed: got 1.5", {"speed": 1.5}),
        ("speed: got 3 numbers, expected one, or 2", {"speed": [0.1, 0.2, 0.3]}),
        ("criterion: got 'doubt', expected one of", {"criterion": "doubt"}),
        ("'agreement' compares numbers, got 3 classes", {"criterion": "agreement"}),
        ("top_n: got 9", {"criterion": "top_n", "top_n": 9}),
        (r"exit_layers: got 3, but this model has heads after \[1, 2, 4\]", {"asked_layers": [3]}),
    ],
)
def test_bad_options(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**options)
