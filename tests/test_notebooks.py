"""The notebook of the documentation holds what its cells print, and the site shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

from test_docs import assert_same_output, load_module
from tiny_models import one_thread  # noqa: F401  # a fixture

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
runner = load_module(DOCS / "notebooks" / "run.py")
hook = load_module(DOCS / "hooks" / "notebooks.py")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_what_its_cells_print(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell, printed in zip(runner.code_cells(notebook), runner.outputs(notebook), strict=True):
        assert_same_output(printed, runner.stored(cell), f"cell {cell['execution_count']} of {path.name}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_page_shows_code_and_output(path: Path) -> None:
    assert hook.PLACE in path.with_suffix(".md").read_text(encoding="utf-8")
    shown = hook.as_markdown(json.loads(path.read_text(encoding="utf-8")))
    for cell in runner.code_cells(json.loads(path.read_text(encoding="utf-8"))):
        assert "".join(cell["source"]) in shown
        assert runner.stored(cell).rstrip() in shown


def test_running_stores_the_output(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    cells = [{"cell_type": "code", "source": ["x = 2\n", "print(x)"], "outputs": [], "execution_count": None}]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    runner.main(path)
    assert runner.stored(json.loads(path.read_text(encoding="utf-8"))["cells"][0]) == "2\n"
