"""A model from a checkpoint, with its tokenizer: saved by us, or plain and about to be trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedTokenizerBase

from fastkd.data.input_format import with_input_format
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.int8 import INT8
from fastkd.exits.certificate import Certificate
from fastkd.model.checkpoints import check_path, checkpoint_path
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.pretrained import check_has_config, config_explained
from fastkd.model.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from fastkd.data.rows import DataFolder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the name that users write."""

PRECISIONS = (*DTYPES, INT8)
"""What a model can be put into."""

AUTO = "auto"
"""The dtype that `choose_dtype` finds."""


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
    checkpoint: str,
    device: str = "auto",
    dtype: str | None = None,
    *,
    safetensors_only: bool = False,
    on_choice: Callable[[str], None] = lambda sentence: None,
) -> tuple[EarlyExitForSequenceClassification, PreTrainedTokenizerBase]:
    """A saved early-exit model in evaluation mode on `device`, and its tokenizer.

    Args:
        checkpoint: folder or hub name.
        device: as for `pick_device`; "auto" is the CPU where the weights are int8.
        dtype: one of `PRECISIONS`, what torch calls it, or "auto", see `choose_dtype`; default: as it was saved. What
            is saved in int8 stays so.
        safetensors_only: refuse weights in files of pickle.
        on_choice: called with a sentence about what "auto" chose, and why.

    Raises:
        ValueError: not a model of this project, an unknown device, or one on which int8 does not run.
        OSError: nothing to load.
    """
    config = load_config(checkpoint)
    is_int8 = INT8 in (dtype, config.quantized)
    target = pick_device("cpu" if is_int8 and device == "auto" else device)
    if is_int8 and target.type != "cpu":
        raise ValueError(f"device: got {device!r}, but int8 runs on a CPU; use --device cpu, or another --dtype")
    options: dict[str, Any] = {}
    if dtype is not None:
        options["dtype"] = torch.float32 if dtype in (INT8, AUTO) else DTYPES.get(dtype, dtype)
    if safetensors_only:
        options["use_safetensors"] = True
    model = EarlyExitForSequenceClassification.from_pretrained(checkpoint, **options)
    tokenizer = with_input_format(load_tokenizer(checkpoint), config.input_format)
    model.to(target).eval()  # type: ignore[arg-type]
    if dtype == AUTO:
        chosen, why = choose_dtype(model)
        on_choice(f"dtype {chosen}: {why}")
        return in_dtype(model, chosen), tokenizer
    return (model.quantize() if dtype == INT8 and config.quantized is None else model), tokenizer


def in_dtype(model: EarlyExitForSequenceClassification, dtype: str) -> EarlyExitForSequenceClassification:
    """The model itself, put into one of `PRECISIONS`; one that is quantised stays so.

    Raises:
        ValueError: another dtype than int8 or fp32 for a quantised model; one that cannot be quantised.
    """
    if model.config.quantized is not None:
        if dtype not in (INT8, "fp32"):
            raise ValueError(f"dtype: got {dtype!r}, but the model is quantised to {INT8}; load the unquantised one")
        return model
    if dtype == INT8:
        return model.quantize()
    nn.Module.to(model, DTYPES[dtype])
    return model


_FASTER = 1.1
"""By how much bfloat16 has to be faster before "auto" takes it: below that float32 is as good, and more exact."""
_ROWS = 256


@torch.no_grad()
def choose_dtype(model: EarlyExitForSequenceClassification) -> tuple[str, str]:
    """The dtype that suits this model on this machine, one of `PRECISIONS`, and why in words.

    A certificate decides: what it promises holds for its dtype alone. Without one the largest product of a layer is
    timed, for a few milliseconds, in float32 and in bfloat16. int8 changes answers more than rounding does, and is
    never chosen, only kept where the weights are quantised.

    Args:
        model: in float32 or quantised, where it will run.
    """
    if model.config.quantized is not None:
        return INT8, "its weights are saved in it"
    certificate = Certificate.of(model.config)
    certified = {f"{dtype}".removeprefix("torch."): name for name, dtype in DTYPES.items()}
    if certificate is not None and certificate.dtype in certified:
        return certified[certificate.dtype], "its certificate is for it"
    weight = max((tensor for tensor in model.layers[0].parameters() if tensor.ndim == 2), key=Tensor.numel)
    taken = {name: _product_seconds(weight.to(DTYPES[name])) for name in ("fp32", "bf16")}
    ratio = taken["fp32"] / taken["bf16"]
    chosen = "bf16" if ratio >= _FASTER else "fp32"
    return chosen, f"a product of {_ROWS} tokens takes {ratio:.2g} times as long in fp32 as in bf16 here (measured)"


def _product_seconds(weight: Tensor) -> float:
    """Of one product with these weights, the best of several."""
    rows = torch.ones(_ROWS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        F.linear(rows, weight)
        if weight.device.type == "cuda":
            torch.cuda.synchronize(weight.device)
        taken.append(time.perf_counter() - started)
    return min(taken)


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
