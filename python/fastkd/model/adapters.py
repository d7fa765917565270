"""Adapters of peft: which early-exit model lies in one, what it can be saved and loaded as. peft is asked only then."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fastkd.data.files import read_json
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.exits.merged_state import is_adapter, take_off_adapters
from fastkd.model.pretrained import saved_config
from fastkd.model.seen_rows import save_seen_rows

_Model = TypeVar("_Model", bound=nn.Module)
_FILE = "adapter_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def is_peft_model(model: object) -> bool:
    """Whether this is a model that peft made around another one."""
    return is_adapter(model) and hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def adapter_base(folder: str | os.PathLike[str]) -> str | None:
    """The base of the adapter in a folder that holds no whole model; None for every other folder or name.

    Raises:
        ValueError: an adapter that does not say what its base is.
    """
    path = Path(folder)
    if not (path / _FILE).is_file() or any((path / name).is_file() for name in _WEIGHTS):
        return None
    base = read_json(path / _FILE, "pretrained_model_name_or_path", "save the adapter again").get(
        "base_model_name_or_path"
    )
    if not base:
        raise ValueError(
            f"pretrained_model_name_or_path: {path / _FILE} does not say which model its adapter is for; write the "
            "folder of that model there as base_model_name_or_path"
        )
    return str(base)


def merge_adapter(model: _Model, folder: str | os.PathLike[str], *, heads_are_new: bool) -> _Model:
    """`model` with the adapter in `folder` merged into it.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: the heads are new and the adapter does not bring them.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"pretrained_model_name_or_path: {folder} holds an adapter, but peft is not installed; run: pip install "
            "peft"
        ) from None
    adapted: Any = peft.PeftModel.from_pretrained(model, os.fspath(folder))
    if heads_are_new:
        _check_heads_are_kept(adapted)
    merged = adapted.merge_and_unload()
    take_off_adapters(merged)
    return merged.requires_grad_(True)


def check_adapter(adapted: Any, argument: str = "model", *, takes_any: bool = False) -> None:
    """Raise where the model in a `PeftModel` could not be loaded again from what peft saves.

    Args:
        adapted: a `PeftModel`.
        argument: what messages call it.
        takes_any: other classifiers than early-exit models too.

    Raises:
        TypeError: another model lies in it.
        ValueError: an adapter that changes the input, several adapters, a base without a name, new heads that are not
            kept.
    """
    model = adapted.get_base_model()
    leaves_early = isinstance(model.config, EarlyExitConfig)
    if not (leaves_early or takes_any):
        raise TypeError(
            f"{argument}: got a {type(adapted).__name__} around a {type(model).__name__}; expected one around an "
            "EarlyExitForSequenceClassification"
        )
    config = adapted.peft_config.get(getattr(adapted, "active_adapter", None))
    if config is None or len(adapted.peft_config) > 1:
        raise ValueError(
            f"{argument}: it has the adapters {', '.join(adapted.peft_config)}; expected one, and active; train "
            "each one on its own base"
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"{argument}: its adapter ({config.peft_type.value}) puts tokens before the input, where heads read [CLS]; "
            "use one that changes layers, such as LoRA"
        )
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{argument}: the base of its adapter has no folder or name to reload it from; save it, load it with "
            "from_pretrained, and call get_peft_model on that"
        )
    saved = saved_config(base, {})
    if leaves_early and not isinstance(saved, EarlyExitConfig):
        _check_heads_are_kept(adapted)
    if not leaves_early and not any(name.endswith("Classification") for name in saved.architectures or ()):
        _check_classifier_is_kept(adapted, argument)


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write the adapter; beside that of an early-exit model its configuration, card and the hashes of rows seen."""
    model = adapted.get_base_model()
    adapted.save_pretrained(folder)
    if not isinstance(model.config, EarlyExitConfig):
        return  # beside a configuration of its own transformers would look for whole weights
    model.describe_weights()
    model.config.save_pretrained(folder)
    save_seen_rows(model.seen_rows, folder)
    model.write_card(folder, is_adapter=True)


def _check_heads_are_kept(adapted: Any) -> None:
    heads: nn.Module = adapted.get_base_model().heads
    if not is_adapter(heads):
        raise ValueError(
            "model: its heads are new and the adapter does not keep them all; pass modules_to_save=['heads'] to its "
            "configuration (LoraConfig(..., modules_to_save=['heads']))"
        )


def _check_classifier_is_kept(adapted: Any, argument: str) -> None:
    model = adapted.get_base_model()
    heads = {name: child for name, child in model.named_children() if name != model.base_model_prefix}
    if not any(map(is_adapter, heads.values())):
        raise ValueError(
            f"{argument}: its classifier is new and the adapter does not keep it; pass task_type='SEQ_CLS' to its "
            f"configuration, or modules_to_save={list(heads)[-1:]}"
        )
