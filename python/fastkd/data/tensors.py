"""Files of tensors that notice when they were damaged: safetensors with a checksum of all that it holds. And the plain
tensors inside a state dictionary, whoever quantised it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastkd.data.files import atomic_path

_CHECKSUM = "crc32"


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a checksum; it is either whole or absent."""
    values = {name: value.contiguous() for name, value in apart(tensors).items()}
    notes = dict(metadata or {})
    with atomic_path(path) as temporary:
        save_file(values, temporary, metadata=notes | {_CHECKSUM: checksum(values, notes)})


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where one lies in the memory of another, as tied weights do; safetensors takes none such."""
    taken, found = set[int](), {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return found


def plain_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a state dictionary holds, each with its name; quantised tensors as the plain ones they consist of.

    PyTorch puts tuples, dtypes and quantised tensors into it, torchao tensors of its own classes. Anything that is no
    tensor comes as it is.
    """
    for name, value in state.items():
        yield from _parts(name, value)


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        inner = {str(place): part for place, part in enumerate(value)}
    elif isinstance(value, Tensor) and type(value).__module__.startswith("torchao."):
        inner = {part: getattr(value, part) for part in cast(Any, value).__tensor_flatten__()[0]}
    elif isinstance(value, Tensor) and value.is_quantized:
        inner = _parts_of_quantised(value)
    else:
        yield name, value
        return
    for part, found in inner.items():
        yield from _parts(f"{name}.{part}", found)


def _parts_of_quantised(value: Tensor) -> dict[str, Tensor]:
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero = torch.tensor(value.q_scale()), torch.tensor(value.q_zero_point())
    else:
        scale, zero = value.q_per_channel_scales(), value.q_per_channel_zero_points()
    return {"codes": value.int_repr(), "scale": scale, "zero_point": zero}


def tensor_bytes(tensor: Tensor) -> Any:
    """The memory of a tensor of any dtype, without a copy where it lies on the host in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_tensors(
    path: str | os.PathLike[str], argument: str, remedy: str
) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Read a safetensors file.

    Args:
        path: of the file.
        argument: how messages call it.
        remedy: what to do if it is damaged.

    Returns:
        tensors, metadata, and whether a checksum vouched for them: files of earlier versions have none.

    Raises:
        ValueError: the file is not a safetensors file, is cut off, or is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise damaged(path, argument, remedy, str(error)) from error
    stored = metadata.pop(_CHECKSUM, None)
    if stored is not None and stored != checksum(tensors, metadata):
        raise damaged(path, argument, remedy, "its checksum does not match its contents")
    return tensors, metadata, stored is not None


def damaged(path: str | os.PathLike[str], argument: str, remedy: str, reason: str) -> ValueError:
    """The error about a file that is not what fastkd wrote."""
    return ValueError(f"{argument}: {Path(path)} is damaged or of another kind ({' '.join(reason.split())}); {remedy}")


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, types, shapes, bytes and metadata: as fast as memory is read, and no single error escapes it."""
    heads = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    value = zlib.crc32(json.dumps([heads, sorted(metadata.items())]).encode())
    for name in sorted(tensors):
        raw: Any = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(raw, value)
    return f"{value:08x}"
