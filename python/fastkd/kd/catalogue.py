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
    "none": MethodEntry("w/o KD", "only the labels"),
    "kd": MethodEntry("Vanilla KD", "labels and the teacher's predictions", "Hinton et al. 2015"),
    "takd": MethodEntry("TAKD", "as `kd`, through assistant models of sizes in between", "Mirzadeh et al. 2020"),
    "pkd-skip": MethodEntry("PKD-skip", "predictions, and [CLS] of evenly spaced layers", "Sun et al. 2019"),
    "pkd-last": MethodEntry("PKD-last", "predictions, and [CLS] of the last layers", "Sun et al. 2019"),
    "alp-kd": MethodEntry(
        "ALP-KD", "predictions, and [CLS] of all layers, weighted by attention", "Passban et al. 2021"
    ),
    "alp-kd-no": MethodEntry(
        "ALP-NO", "as `alp-kd`, but each student layer has its own group of teacher layers", "Passban et al. 2021"
    ),
    "alp-kd-po": MethodEntry(
        "ALP-PO", "as `alp-kd-no`, but neighbouring groups share one layer", "Passban et al. 2021"
    ),
    "rail-kd": MethodEntry(
        "RAIL-KD", "predictions, and mean hidden states of randomly chosen layers", "Haidar et al. 2022"
    ),
    "mhkd": MethodEntry("MHKD", "classifiers on inner layers of both models, in pairs", "Wang et al. 2020"),
    "dih": MethodEntry("DIH", "predictions of classifiers on all teacher layers", "Asadian and Salehi-Abari 2021"),
    "annealing": MethodEntry(
        "Annealing-KD", "first predictions that grow to full scale, then labels", "Jafari et al. 2021"
    ),
    "distilbert": MethodEntry(
        "DistilBERT loss", "predictions, labels and the direction of the last hidden states", "Sanh et al. 2019"
    ),
    "universal-il": MethodEntry(
        "Universal-KD (IL)",
        "predictions, and for each inner layer an attention-weighted mixture of classifiers on the teacher's layers; "
        "for students with layers like the teacher's",
        _UNIVERSAL,
    ),
    "universal-ca": MethodEntry(
        "Universal-KD (CA)",
        "the same loss as `universal-il`, under the paper's name for students of another architecture",
        _UNIVERSAL,
    ),
    "universal-cg": MethodEntry(
        "Universal-KD (CG)",
        "predictions, and one such mixture for the last layer only; for much deeper teachers",
        _UNIVERSAL,
    ),
    "universal-cg-two-stage": MethodEntry(
        "Universal-KD (CG), two stages", "as `universal-cg`, first without labels, then with labels only", _UNIVERSAL
    ),
}
"""By the name that users write, in the order of help texts and docs."""


def markdown_table() -> list[str]:
    """The lines of the table of methods in the docs."""
    rows = [f"| `{name}` | {entry.summary} | {entry.source} |" for name, entry in CATALOGUE.items()]
    return ["| method | the student learns from | paper |", "|---|---|---|", *rows]
