"""Shows a notebook on the page of its name: its text, its code, and what each cell printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLACE = "<!-- notebook -->"
FOLDER = Path(__file__).parents[1] / "notebooks"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with every page."""
    if PLACE not in markdown:
        return markdown
    path = FOLDER / Path(page.file.src_uri).with_suffix(".ipynb").name
    return markdown.replace(PLACE, as_markdown(json.loads(path.read_text(encoding="utf-8"))))


def as_markdown(notebook: dict[str, Any]) -> str:
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [f"```text\n{''.join(output['text']).rstrip()}\n```" for output in cell["outputs"]]
    return "\n\n".join(parts)
