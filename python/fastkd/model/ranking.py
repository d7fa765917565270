"""`model.rank`: documents in the order of their relevance to a query, as a cross-encoder gives it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol, cast

import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.input_format import with_input_format
from fastkd.data.tables import table_of
from fastkd.data.texts import text_problem
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.engines import rank as engine
from fastkd.engines.protocol import ExitModel
from fastkd.engines.stream import NOT_FINITE
from fastkd.engines.stream_reader import EncodedRow, StreamReader, longest_row
from fastkd.exits.certificate import CalibrationWarning
from fastkd.exits.rank_calibration import RankCertificate
from fastkd.exits.ranking import RankRule
from fastkd.exits.scores import score_of
from fastkd.model.tokenizers import load_tokenizer


class RankedModel(ExitModel, Protocol):
    """What ranking needs of an early-exit model."""

    name_or_path: str | None

    @property
    def exit_layers(self) -> list[int]: ...

    @property
    def weights_dtype(self) -> str: ...

    def changed_weights(self) -> str | None: ...

    def check_exits(self) -> None:
        """Raise ValueError where the heads below the last were never trained."""
        ...


class Ranking(list[dict[str, Any]]):
    """The documents asked for, best first: dictionaries with `corpus_id`, `score` and perhaps `text`.

    Attributes:
        exit_layers: after which layer each document of the query left, in the order of the documents, from 1.
    """

    def __init__(self, entries: Iterable[dict[str, Any]], exit_layers: Sequence[int]) -> None:
        super().__init__(entries)
        self.exit_layers = list(exit_layers)


def rank(
    model: RankedModel,
    query: str | None,
    documents: Iterable[str | Mapping[str, Any]],
    top_k: int | None = None,
    return_documents: bool = False,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    speed: float | None = None,
    label: str | int | None = None,
    max_length: int | None = None,
    tokens_per_run: int = 4096,
) -> Ranking:
    """See `EarlyExitForSequenceClassification.rank`."""
    if model.training:
        raise ValueError("model: is in training mode, where no document leaves early; call model.eval() first")
    documents = _listed(documents)
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(f"top_k: got {top_k!r}, expected a whole number, at least 1, or None for all documents")
    if tokens_per_run < 1:
        raise ValueError(f"tokens_per_run: got {tokens_per_run}, expected at least 1")
    number = label_number(model.config, label)
    wanted = len(documents) if top_k is None else min(int(top_k), len(documents))
    rule = rank_rule(model, wanted, speed, number)
    if rule.leaves_early:
        model.check_exits()
    rows = _encoded(model, query, documents, tokenizer, max_length)
    scores, exit_layers = engine.run(model, rows, rule, score_of(model.config.num_classes, number), tokens_per_run)
    reached = exit_layers == rule.layers[-1]
    if not scores[reached].isfinite().all():
        bad = int((reached & ~scores.isfinite()).nonzero()[0])
        raise ValueError(f"documents[{bad}]: {NOT_FINITE}")
    order = scores.masked_fill(~reached, -torch.inf).argsort(descending=True, stable=True)[:wanted].tolist()
    shown = scores if model.config.num_classes == 1 else scores.sigmoid()
    entries = ({"corpus_id": index, "score": shown[index].item()} for index in order)
    if return_documents:
        entries = (entry | {"text": documents[entry["corpus_id"]]} for entry in entries)
    return Ranking(entries, exit_layers.tolist())


def _listed(documents: Any) -> list[Any]:
    """The documents; TypeError for one alone, and for a table, which gives the names of its columns."""
    if isinstance(documents, str | Mapping) or not isinstance(documents, Iterable):
        raise TypeError(f"documents: got one {type(documents).__name__}, expected a list of texts")
    table = table_of(documents, "documents")
    if table is None:
        return list(documents)
    if "input_ids" not in table.columns:
        raise TypeError(
            f"documents: got a {type(documents).__name__} with the columns {', '.join(map(repr, table.columns))}, "
            "expected a list of texts; pass the column of the texts"
        )
    return [table[row] for row in range(len(table))]


def label_number(config: EarlyExitConfig, label: str | int | None) -> int | None:
    """The number of the class whose probability ranks, of its name or number; None for a regression.

    Raises:
        ValueError: a label of a regression, none of a classifier, or one that it does not have.
    """
    names = {str(name): int(number) for number, name in (config.id2label or {}).items()}
    number = names.get(label, label) if isinstance(label, str) else label
    if config.num_classes > 1 and (isinstance(number, bool) or number not in names.values()):
        raise ValueError(
            f"label: got {label!r}, expected the class whose probability ranks documents: {', '.join(names)}, or its "
            "number"
        )
    if config.num_classes == 1 and label is not None:
        raise ValueError(f"label: got {label!r}, but this model is a regression and ranks by its only number")
    return cast("int | None", number)


def rank_rule(model: RankedModel, wanted: int, speed: float | None, label: int | None) -> RankRule:
    """The rule of a speed; where none is given that of the certificate, as far as it reaches, else the full model's.

    Args:
        model: that ranks.
        wanted: how many documents are asked for.
        speed: as `RankRule.at_speed` takes it.
        label: number of the class whose probability ranks; None for a regression.

    Raises:
        ValueError: a speed that ranking has not.
    """
    if speed is not None or model.config.rank_certificate is None:
        return RankRule.at_speed(speed or 0.0, wanted, model.exit_layers)
    certificate = RankCertificate.from_dict(model.config.rank_certificate)
    mismatches = certificate.mismatches(model.config, model.weights_dtype, label)
    changed = model.changed_weights()
    if changed is not None:
        mismatches.append(f"it is for other weights: {changed}; calibrate again")
    if mismatches:
        warnings.warn(
            f"certificate: {'; '.join(mismatches)}, so the full model ranks", CalibrationWarning, stacklevel=4
        )
    if mismatches or wanted > certificate.top_k:
        return RankRule.at_speed(0.0, wanted, model.exit_layers)
    return certificate.rule


def _encoded(
    model: RankedModel,
    query: str | None,
    documents: Sequence[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
) -> list[EncodedRow]:
    are_texts = [not (isinstance(document, Mapping) and "input_ids" in document) for document in documents]
    for index, document in enumerate(documents):
        if are_texts[index] and (problem := text_problem(document)):
            raise ValueError(f"documents[{index}]: {problem}, or pass input_ids of query and document together")
    if any(are_texts):
        if problem := text_problem(query):
            raise ValueError(f"query: {problem}")
        tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
    pairs = [(query, document) if is_text else document for document, is_text in zip(documents, are_texts, strict=True)]
    limit = longest_row(model.config, tokenizer, max_length)
    rows, problems = StreamReader(pairs, tokenizer, limit, truncate=True).read(max(1, len(pairs)), 0.0)
    if problems:
        raise ValueError(f"documents[{problems[0].position}]: {problems[0].text}")
    return rows


def tokenizer_of(model: RankedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights that the model was loaded from.

    Raises:
        ValueError: there is none.
    """
    folder = model.name_or_path
    if not folder or not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        raise ValueError(
            "tokenizer: got None, and the folder of this model has no tokenizer; pass tokenizer=, such as the one from "
            "fastkd.load_model"
        )
    return with_input_format(load_tokenizer(folder), model.config.input_format)
