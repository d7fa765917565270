"""Colours that readers tell apart, colour-blind ones too: of curves, and of layers.

Neighbouring layers stand beside each other in every picture, so they are of two families, blue and orange, which no
kind of colour blindness confuses; within a family deeper layers are stronger.
"""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's."""
_FAMILIES = ("Blues", "YlOrBr")
_ON_WHITE, _ON_BLACK = (0.4, 1.0), (0.62, 0.2)


def layer_colours(layers: int, on_black: bool = False) -> list[str]:
    """A colour for each layer, the first first, as "#rrggbb"; deeper ones stand out more from the background."""
    first, last = _ON_BLACK if on_black else _ON_WHITE
    return [
        to_hex(colormaps[_FAMILIES[layer % 2]](first + (last - first) * (layer - layer % 2) / max(layers - 1, 1)))
        for layer in range(layers)
    ]


def ink_on(colour: str) -> str:
    """Black or white, whichever stands out more from `colour` (relative luminance of WCAG 2)."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if luminance < 0.179 else "black"
