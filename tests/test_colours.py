"""Colours of curves and layers, as readers see them whose eyes lack a kind of cone."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from fastkd.report import colours

SEEN_BY = {
    "everyone": np.eye(3),
    # Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
PAGE = Path(colours.__file__).with_name("page.css").read_text(encoding="utf-8")


def lab(colour: str, eyes: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as these eyes see it."""
    value = np.array(to_rgb(colour))
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SEEN_BY[eyes]) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.array(to_xyz) @ seen / [0.95047, 1.0, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(first: str, second: str, eyes: str) -> float:
    """CIE 1976; 2.3 is a just noticeable difference, 20 is seen at a glance."""
    return float(np.linalg.norm(lab(first, eyes) - lab(second, eyes)))


@pytest.mark.parametrize("eyes", SEEN_BY)
@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12, 24, 48])
@pytest.mark.parametrize("on_black", [False, True])
def test_neighbouring_layers_look_different(layers: int, on_black: bool, eyes: str) -> None:
    chosen = colours.layer_colours(layers, on_black)
    assert len(chosen) == layers
    least = 10 if eyes == "tritanopia" else 25
    assert min((distance(*pair, eyes) for pair in pairwise(chosen)), default=99) > least


@pytest.mark.parametrize("eyes", SEEN_BY)
@pytest.mark.parametrize("on_black", [False, True])
def test_all_layers_of_six_look_different(on_black: bool, eyes: str) -> None:
    chosen = colours.layer_colours(6, on_black)
    assert min(distance(*pair, eyes) for pair in combinations(chosen, 2)) > 10


@pytest.mark.parametrize("eyes", ["everyone", "protanopia", "deuteranopia"])
def test_curves_look_different(eyes: str) -> None:
    assert min(distance(*pair, eyes) for pair in combinations(colours.CURVES, 2)) > 10


@pytest.mark.parametrize("eyes", ["everyone", "protanopia", "deuteranopia"])
@pytest.mark.parametrize("scheme", [0, 1])
def test_neighbouring_curves_of_the_page_look_different(scheme: int, eyes: str) -> None:
    found = re.findall(r"--series-\d: (#[0-9a-f]{6});", PAGE)
    assert len(found) == 12
    chosen = found[6 * scheme : 6 * scheme + 6]
    assert min(distance(*pair, eyes) for pair in pairwise(chosen)) > 10


def test_ink_stands_out() -> None:
    assert colours.ink_on("#ffffff") == colours.ink_on("#febb47") == "black"
    assert colours.ink_on("#000000") == colours.ink_on("#08306b") == "white"
