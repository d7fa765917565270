"""The encoder families with fast paths: the one table from which checks and the docs are made. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class FamilyEntry(NamedTuple):
    """One family of encoders, which `fastkd.encoders.families.FAMILIES` knows how to drive."""

    title: str
    """What people call it."""
    checkpoint: str
    """A checkpoint of it on the hub."""


FAMILIES: dict[str, FamilyEntry] = {
    "bert": FamilyEntry("BERT", "bert-base-uncased"),
    "roberta": FamilyEntry("RoBERTa", "roberta-base"),
    "xlm-roberta": FamilyEntry("XLM-R", "FacebookAI/xlm-roberta-base"),
    "camembert": FamilyEntry("CamemBERT", "almanach/camembert-base"),
    "data2vec-text": FamilyEntry("Data2Vec", "facebook/data2vec-text-base"),
    "ernie": FamilyEntry("ERNIE", "nghuyong/ernie-3.0-base-zh"),
    "distilbert": FamilyEntry("DistilBERT", "distilbert-base-uncased"),
    "electra": FamilyEntry("ELECTRA", "google/electra-base-discriminator"),
    "modernbert": FamilyEntry("ModernBERT", "answerdotai/ModernBERT-base"),
    "nomic_bert": FamilyEntry("Nomic BERT", "nomic-ai/nomic-embed-text-v1.5"),
    "gte": FamilyEntry("GTE", "alibaba-nlp-community/gte-multilingual-base"),
    "jina_embeddings_v3": FamilyEntry("Jina Embeddings v3", "jinaai/jina-embeddings-v3-hf"),
    "roberta-prelayernorm": FamilyEntry("RoBERTa-PreLayerNorm", "andreasmadsen/efficient_mlm_m0.40"),
    "megatron-bert": FamilyEntry("Megatron-BERT", "nvidia/megatron-bert-uncased-345m"),
}
"""By the `model_type` of Hugging Face, in the order of the docs."""


def check_family(model_type: str) -> None:
    """Raise ValueError for a family that is not in `FAMILIES`."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"engine: got an encoder of family {model_type!r}, but packed tokens (and, for some families, graphs) run "
            f"only {', '.join(sorted(FAMILIES))}; use engine='batch', or model.stream(rows)"
        )
