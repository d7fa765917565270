"""Every loss by its class: the one table from which the package's names, checks and docs are made. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class Loss(NamedTuple):
    """One distillation loss, a class of `fastkd.losses`."""

    module: str
    """The file of `fastkd.losses` that holds it."""
    summary: str
    """What it compares, in one sentence."""


LOSSES: dict[str, Loss] = {
    "KDLoss": Loss("kd", "divergence between the last logits of student and teacher (Hinton et al.)"),
    "VanillaKDLoss": Loss("kd", "labels and the teacher's last logits, in one launch (Hinton et al., TAKD)"),
    "UniversalKDLoss": Loss(
        "universal_kd", "classifiers on student layers, and an attention-weighted mixture of the teacher's"
    ),
    "UniversalKDMixtureLoss": Loss("universal_kd", "labels, last logits and `UniversalKDLoss`, in one launch"),
    "PKDLoss": Loss("pkd", "normalised hidden states of chosen layers"),
    "ALPKDLoss": Loss("alp_kd", "hidden states, and an attention-weighted mixture of the teacher's"),
    "MHKDLoss": Loss("mhkd", "labels and classifiers on chosen layers of both models"),
    "DIHLoss": Loss("dih", "labels, and the student's logits against every classifier of the teacher"),
    "AnnealingKDLoss": Loss("annealing_kd", "logits, with the teacher's growing to full scale"),
    "DistilBertLoss": Loss("distilbert", "labels, last logits, and the direction of the last hidden states"),
    "RAILKDLoss": Loss("rail_kd", "hidden states of layers drawn at random in every epoch"),
}
"""By the name of the class, in the order of the docs."""
