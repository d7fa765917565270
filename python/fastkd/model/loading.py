"""A model from a checkpoint, with its tokenizer: saved by us, or plain and about to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedTokenizerBase

from fastkd.data.input_format import with_input_format
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.model.checkpoints import check_path, checkpoint_path
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.pretrained import check_has_config, config_explained
from fastkd.model.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from fastkd.data.rows import DataFolder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name that users write."""


def load_plain(
    checkpoint: str,
    folder: DataFolder,
    head: str,
    exit_layers: list[int] | None,
    seed: int,
    layers: str | None = None,
) -> tuple[EarlyExitForSequenceClassification, PreTrainedTokenizerBase]:
    """A checkpoint to be fine-tuned, with new heads for the labels of `folder`, and its tokenizer.

    The new heads are drawn from `seed`; the weights are float32, whatever the checkpoint holds, as training needs them.
    `layers` names the encoder's list of layers where it is not found. The tokenizer pads on the right, because heads
    read the first token.

    Raises:
        ModuleNotFoundError: the packaged checkpoint is asked for and not installed.
        OSError: nothing to load.
        ValueError: an encoder that is not supported, or layers that it does not have.
    """
    path = checkpoint_path(checkpoint)
    names = folder.label_names
    labels: dict[str, Any] = {"id2label": dict(enumerate(names))} if names else {"num_labels": folder.num_labels}
    transformers.set_seed(seed)
    model = EarlyExitForSequenceClassification.from_pretrained(
        path, head=head, exit_layers=exit_layers, layers=layers, dtype=torch.float32, **labels
    )
    tokenizer = load_tokenizer(path)
    tokenizer.padding_side = "right"
    return model, tokenizer


def load_model(
    checkpoint: str, device: str = "auto", dtype: str | None = None, *, safetensors_only: bool = False
) -> tuple[EarlyExitForSequenceClassification, PreTrainedTokenizerBase]:
    """A saved early-exit model in evaluation mode on `device`, and its tokenizer.

    `dtype` is one of `DTYPES` or what torch calls it; default: as it was saved. `safetensors_only` refuses weights in
    files of pickle.

    Raises:
        ValueError: not a model of this project, or an unknown device.
        OSError: nothing to load.
    """
    target = pick_device(device)
    config = load_config(checkpoint)
    options: dict[str, Any] = {} if dtype is None else {"dtype": DTYPES.get(dtype, dtype)}
    if safetensors_only:
        options["use_safetensors"] = True
    model = EarlyExitForSequenceClassification.from_pretrained(checkpoint, **options)
    tokenizer = with_input_format(load_tokenizer(checkpoint), config.input_format)
    return model.to(target).eval(), tokenizer  # type: ignore[arg-type]


def load_config(checkpoint: str) -> EarlyExitConfig:
    """The configuration of a saved early-exit model.

    Raises:
        ValueError: not a model of this project.
        OSError: nothing to load.
    """
    check_path(checkpoint)
    check_has_config(Path(checkpoint), "checkpoint")
    with config_explained(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if not isinstance(config, EarlyExitConfig):
        raise ValueError(
            f"checkpoint: {checkpoint} is a plain {config.model_type} checkpoint without early exits; train them "
            f"first: fastkd finetune {checkpoint} --data DATA -o tuned"
        )
    return config


def pick_device(device: str) -> torch.device:
    """The torch device called `device`; "auto" is a GPU where there is one.

    Raises:
        ValueError: an unknown or absent device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected cpu, cuda, cuda:1... or auto") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, but torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return target
