"""The model card of a saved folder, README.md: what lies there, how it is used, and what is known of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.data.own_files import CARD, CARD_MARK, is_own_card
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.exits.certificate import Certificate, percent
from fastkd.exits.rank_calibration import RankCertificate

TAGS = ("fastkd-kernels", "early-exit")
PLACE = "path/to/this/folder"
"""What a card calls the model where it does not know under which name it will be found."""


def write_card(
    folder: str | os.PathLike[str],
    config: EarlyExitConfig,
    seen: Mapping[str, int],
    *,
    prefix: str,
    name: str = PLACE,
    is_adapter: bool = False,
    changed: str | None = None,
) -> None:
    """Write the card of the model in `folder`, unless somebody else wrote one.

    Args:
        config: of the model.
        seen: how many different rows the weights have seen, by their part in training.
        prefix: of the encoder's parameters.
        name: under which the model will be found.
        is_adapter: whether the folder holds an adapter of peft alone.
        changed: how the weights differ from those that the configuration describes; None where they do not.
    """
    path = Path(folder) / CARD
    if path.is_file() and not is_own_card(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_card(config, seen, prefix, name, is_adapter, changed), encoding="utf-8")


def _card(
    config: EarlyExitConfig, seen: Mapping[str, int], prefix: str, name: str, is_adapter: bool, changed: str | None
) -> str:
    kind = config.backbone.model_type
    tags = "".join(f"- {tag}\n" for tag in (*TAGS, kind, *(["peft"] if is_adapter else [])))
    parts = [
        f"---\nlibrary_name: fastkd-kernels\npipeline_tag: text-classification\ntags:\n{tags}---\n{CARD_MARK}",
        f"# {kind} that leaves early",
        _what(config, is_adapter),
        *([f"**The facts below were found with other weights: {changed}.**"] if changed else []),
        "## Use\n\n" + _use(config, name, is_adapter),
        "## Data\n\n" + _data(config, seen),
        "## Speeds\n\n" + _speeds(config),
        "## Certificate\n\n" + _certificate(config),
    ]
    if not is_adapter and config.quantized is None:
        parts.append("## The encoder without fastkd\n\n" + _encoder(prefix, name))
    return "\n\n".join(parts) + "\n"


def _what(config: EarlyExitConfig, is_adapter: bool) -> str:
    layers = ", ".join(map(str, config.exit_layers))
    answer = "a number" if config.num_classes == 1 else f"one of {config.num_classes} classes"
    if config.num_classes > 1 and config.id2label:
        shown = list(config.id2label.values())
        answer += f" ({', '.join(map(str, shown[:20]))}{', ...' if len(shown) > 20 else ''})"
    lines = [
        f"A text classifier that answers {answer}. Its encoder has {config.num_hidden_layers} layers, "
        f"{config.hidden_size} wide, with {config.head} heads after layers {layers}. A text leaves at the first "
        "head that is certain enough (FastBERT, ACL 2020).",
        "transformers does not contain the class of this model: `pip install fastkd-kernels`.",
    ]
    if config.quantized is not None:
        lines.append(f"Its layers compute in {config.quantized}. Only fastkd runs them, on a CPU.")
    if is_adapter:
        lines.append(
            "This folder holds a PEFT adapter; `adapter_config.json` names the base model that it is loaded onto."
        )
    return "\n\n".join(lines)


def _use(config: EarlyExitConfig, name: str, is_adapter: bool) -> str:
    speed = ", speed=0.5" if config.exits_trained else ""
    makes = f'classify = pipeline("text-classification", model="{name}"{speed})'
    imports = "import fastkd\nfrom transformers import pipeline"
    if is_adapter:
        imports = (
            "import fastkd\nfrom transformers import pipeline\n\n" + f'model, tokenizer = fastkd.load_model("{name}")'
        )
        makes = f'classify = pipeline("text-classification", model=model, tokenizer=tokenizer{speed})'
    code = f'{imports}\n\n{makes}\nprint(classify(["one text", "another text"]))'
    default = f"Without `speed` it runs at {_listed(config.speed)}, with criterion {config.criterion}."
    note = f"Speed 0 is the full model; at 1 every text leaves at the first head. {default}"
    if not config.exits_trained:
        note = "Only the last head is trained, so the full model answers; `fastkd.distill` trains the other heads."
    return f"```python\n{code}\n```\n\n{note}"


def _data(config: EarlyExitConfig, seen: Mapping[str, int]) -> str:
    parts = sorted({*config.training_data, *seen})
    if not parts:
        return "Unknown: no record of the training rows."
    rows = [
        f"| {part} | {f'{seen[part]:,}' if part in seen else 'unknown'} | {config.training_data.get(part, '')[:12]} |"
        for part in parts
    ]
    return "\n".join(["| part | different rows | fingerprint |", "|---|---|---|", *rows])


def _speeds(config: EarlyExitConfig) -> str:
    if not config.speed_table:
        return "Not measured. `fastkd sweep` measures them on your rows."
    first = config.speed_table[0]
    head = f"| speed | {first['measure']} | average layers | speed-up in operations |"
    rows = [
        f"| {row['speed']:g} | {row['quality']:.4f} | {row['average_layers']:.2f} of {config.num_hidden_layers} | "
        f"{row['speedup']:.2f}x |"
        for row in config.speed_table
    ]
    text = f"On the {first['rows']:,} dev rows of the distillation, with criterion {first['criterion']}:"
    return "\n".join([text, "", head, "|---|---|---|---|", *rows])


def _certificate(config: EarlyExitConfig) -> str:
    found = [text for text in (_of_answers(config), _of_rankings(config)) if text is not None]
    if not found:
        return "None. `fastkd calibrate` finds a speed with a guarantee, on rows that the model was not trained on."
    return "\n\n".join(found)


def _of_rankings(config: EarlyExitConfig) -> str | None:
    certificate = RankCertificate.of(config)
    if certificate is None:
        return None
    return (
        f"Ranking by `model.rank`, top {certificate.top_k}, {certificate.dtype or 'unknown'} weights: {certificate}. "
        f"{certificate.speedup:.2f}x fewer operations. Calibrated {certificate.date[:10]} on {certificate.n:,} queries."
    )


def _of_answers(config: EarlyExitConfig) -> str | None:
    certificate = Certificate.of(config)
    if certificate is None:
        return None
    return (
        f"At speed {_listed(certificate.speed)}, criterion {certificate.criterion}, {certificate.dtype or 'unknown'} "
        f"weights: {certificate}. {certificate.speedup:.2f}x fewer operations; agreement with the full model at least "
        f"{percent(certificate.agreement)}. Calibrated {certificate.date[:10]} on {certificate.n:,} rows."
    )


def _encoder(prefix: str, name: str) -> str:
    code = f"""import json
from transformers import AutoConfig, AutoModel

with open("{name}/config.json") as file:
    config = AutoConfig.for_model(**json.load(file)["backbone"])
encoder = AutoModel.from_pretrained("{name}", config=config)"""
    return f"Its weights have their usual names under `{prefix}.`:\n\n```python\n{code}\n```"


def _listed(speed: float | Sequence[float]) -> str:
    values: list[Any] = list(speed) if isinstance(speed, Sequence) else [speed]
    return ", ".join(f"{value:g}" for value in values)
