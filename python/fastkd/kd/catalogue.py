"""Every method of KD: the one table from which the command line, checks and docs are made. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class MethodEntry(NamedTuple):
    """One way to train a student."""

    title: str
    """The name in tables of results."""
    summary: str
    """What the student learns from, for tables."""
    source: str = ""
    """Who published it."""


_UNIVERSAL = "Wu et al. 2021"

CATALOGUE: dict[str, MethodEntry] = {
    "none": MethodEntry("w/o KD", "labels alone"),
    "kd": MethodEntry("Vanilla KD", "labels and the teacher's answer", "Hinton et al. 2015"),
    "takd": MethodEntry("TAKD", "the same, by way of assistants between the two", "Mirzadeh et al. 2020"),
    "pkd-skip": MethodEntry("PKD-skip", "the answer and [CLS] of evenly spaced layers", "Sun et al. 2019"),
    "pkd-last": MethodEntry("PKD-last", "the answer and [CLS] of the last layers", "Sun et al. 2019"),
    "alp-kd": MethodEntry("ALP-KD", "the answer and [CLS] of all layers, mixed by attention", "Passban et al. 2021"),
    "alp-kd-no": MethodEntry("ALP-NO", "the same, each student layer from layers of its own", "Passban et al. 2021"),
    "alp-kd-po": MethodEntry("ALP-PO", "the same, from layers that overlap by one", "Passban et al. 2021"),
    "rail-kd": MethodEntry("RAIL-KD", "the answer and the means of randomly drawn layers", "Haidar et al. 2022"),
    "mhkd": MethodEntry("MHKD", "classifiers on inner layers of both, pair by pair", "Wang et al. 2020"),
    "dih": MethodEntry(
        "DIH", "the answers of classifiers on all of the teacher's layers", "Asadian and Salehi-Abari 2021"
    ),
    "annealing": MethodEntry("Annealing-KD", "first the answer as it grows, then labels", "Jafari et al. 2021"),
    "distilbert": MethodEntry(
        "DistilBERT loss", "the answer, labels and the direction of the last hidden states", "Sanh et al. 2019"
    ),
    "universal-il": MethodEntry(
        "Universal-KD (IL)",
        "the answer, and for each inner layer a mixture of the classifiers on the teacher's layers; for a student with "
        "layers like the teacher's",
        _UNIVERSAL,
    ),
    "universal-ca": MethodEntry(
        "Universal-KD (CA)",
        "the same loss as `universal-il`, under the paper's name for a student of another architecture",
        _UNIVERSAL,
    ),
    "universal-cg": MethodEntry(
        "Universal-KD (CG)",
        "the answer, and for the last layer alone such a mixture; for a much deeper teacher",
        _UNIVERSAL,
    ),
    "universal-cg-two-stage": MethodEntry(
        "Universal-KD (CG), two stages", "the same without labels first, then labels alone", _UNIVERSAL
    ),
}
"""By the name that users write, in the order of help texts and docs."""


def markdown_table() -> list[str]:
    """The lines of the table of methods in the docs."""
    rows = [f"| `{name}` | {entry.summary} | {entry.source} |" for name, entry in CATALOGUE.items()]
    return ["| method | the student learns from | of |", "|---|---|---|", *rows]
