"""YAML texts that would never end are refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastkd.commands.kd import parsed_arguments
from fastkd.data.yaml_text import load_yaml
from fastkd.tables.kd_table import GridError, load_grid

BOMB = 'a0: &a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x"]\n' + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


def test_a_bomb_of_aliases_and_an_alias_to_itself_are_refused(tmp_path: Path) -> None:
    for text, words in (
        (BOMB, "aliases expand to more than"),
        ("a: &a [*a]", "an alias refers to a value that contains it"),
    ):
        with pytest.raises(ValueError, match=words):
            load_yaml(text)
        grid = tmp_path / "grid.yaml"
        grid.write_text(text)
        with pytest.raises(GridError, match=words) as raised:
            load_grid(grid)
        assert "grid.yaml" in str(raised.value)
    with pytest.raises(ValueError, match="aliases expand to more than"):
        parsed_arguments([f"weight={{{', '.join(BOMB.splitlines())}}}"])
    with pytest.raises(ValueError, match="too deep"):
        load_yaml("[" * 100_000)


def test_aliases_as_people_write_them_are_read() -> None:
    text = "usual: &usual {epochs: 3, seeds: [1, 2]}\ntasks: {a: *usual, b: {<<: *usual, epochs: 4}}\n"
    assert load_yaml(text)["tasks"] == {"a": {"epochs": 3, "seeds": [1, 2]}, "b": {"epochs": 4, "seeds": [1, 2]}}
    assert load_yaml("") is None
