"""The page itself: a template, its style and its program, plotly.js and the numbers, in one file."""

from __future__ import annotations

import base64
import gzip
import html
import importlib.resources
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from fastkd.data.files import write_text
from fastkd.exits.rule import check_speed
from fastkd.report.content import SPEEDS, page_content
from fastkd.report.sources import Source


def write_page(
    curves: Mapping[str, tuple[Source, str]],
    path: str | os.PathLike[str],
    *,
    title: str = "What speed costs and wins",
    speed: float = 0.5,
    top_n: int | None = None,
) -> None:
    """Write one self-contained HTML page; it is either whole or absent.

    Args:
        curves: by name, a source and the criterion that decides which rows leave.
        path: the page.
        title: of the page.
        speed: where the slider stands at first, or nearly: it moves in steps of 0.005.
        top_n: classes that the "top_n" criterion looks at.

    Raises:
        ValueError: no curves, a speed outside [0, 1], or as `fastkd_kernels.exit_gate`.
    """
    check_speed(speed)
    nearest = min(SPEEDS, key=lambda known: abs(known - speed))
    content = page_content(curves, title, nearest, top_n)
    page = _part("page.html")
    for name, text in {
        "TITLE": html.escape(title),
        "STYLE": _part("page.css"),
        "DATA": _as_script(content),
        "PLOTLY": _packed_plotly(),
        "PROGRAM": _part("page.js"),
    }.items():
        page = page.replace(f"<!--{name}-->", text)
    write_text(path, page)


def _part(name: str) -> str:
    return (importlib.resources.files("fastkd.report") / name).read_text(encoding="utf-8")


def _as_script(content: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(_finite(content), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _packed_plotly() -> str:
    """plotly.js, compressed, because its 4.8 MB would be nearly the whole page; browsers unpack it themselves."""
    import plotly.offline

    packed = gzip.compress(plotly.offline.get_plotlyjs().encode(), compresslevel=9, mtime=0)
    return base64.b64encode(packed).decode()
