"""Fingerprints of weights and tensors, by which a certificate knows the model and the rows that it was made with.

`model_fingerprint` reads every byte. `WeightsSketch` reads a few of each tensor, in memory or in a file, so that it can
be asked at every start: training, merging and loading change nearly every value of a tensor, and so the few as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastkd.data.tensors import plain_tensors, tensor_bytes
from fastkd.exits.merged_state import merged_state

_BLOCKS, _BLOCK = 4, 16  # of a tensor, so many values lying together at so many places
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # as safetensors calls them


class HasWeights(Protocol):
    """Every `torch.nn.Module`."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


def model_fingerprint(model: HasWeights) -> str:
    """A SHA-256 of all weights, adapters merged, whatever device they are on: another dtype is another model."""
    sha = hashlib.sha256()
    for name, value in plain_tensors(merged_state(model)):
        sha.update(name.encode())
        sha.update(tensor_bytes(value) if isinstance(value, Tensor) else str(value).encode())
    return sha.hexdigest()


@dataclass(frozen=True)
class WeightsSketch:
    """A few values of every tensor of a model, on the host.

    Attributes:
        shapes: of every tensor by its name; None for what is no tensor, as in modules that PyTorch quantised.
        samples: of those whose memory can be read; offloaded tensors have none.
    """

    shapes: Mapping[str, tuple[int, ...] | None]
    samples: Mapping[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, state: Mapping[str, Any]) -> WeightsSketch:
        """The sketch of a state dictionary."""
        state = dict(plain_tensors(state))
        return cls(
            {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()},
            {name: _sample(value) for name, value in state.items() if _is_readable(value)},
        )

    @property
    def fingerprint(self) -> str:
        """The same as `file_fingerprint` of the file that these weights are saved in."""
        sha = hashlib.sha256()
        for name, values in sorted(self.samples.items()):
            shape = self.shapes[name]
            assert shape is not None
            sha.update(_heading(name, _DTYPE_NAMES.get(values.dtype, str(values.dtype)), shape))
            sha.update(tensor_bytes(values))
        return sha.hexdigest()

    def changed(self, now: WeightsSketch) -> list[str]:
        """Names of the tensors that came, went or changed since; rounding to another dtype is no change."""
        if self.shapes.keys() != now.shapes.keys():
            return sorted(self.shapes.keys() ^ now.shapes.keys())
        return [
            name
            for name, shape in self.shapes.items()
            if shape != now.shapes[name]
            or (name in self.samples and name in now.samples and not _same(self.samples[name], now.samples[name]))
        ]


def _is_readable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta"


def _sample(tensor: Tensor) -> Tensor:
    return torch.take(tensor.detach(), _positions(tensor.numel()).to(tensor.device)).cpu()


@lru_cache(maxsize=256)
def _positions(size: int) -> Tensor:
    return torch.tensor([place for start, end in _blocks(size) for place in range(start, end)], dtype=torch.int64)


def _blocks(size: int) -> list[tuple[int, int]]:
    """First and last-but-one place of each block of a tensor of `size` values."""
    if size <= _BLOCKS * _BLOCK:
        return [(0, size)]
    starts = [number * (size - _BLOCK) // (_BLOCKS - 1) for number in range(_BLOCKS)]
    return [(start, start + _BLOCK) for start in starts]


def _same(before: Tensor, now: Tensor) -> bool:
    """Whether the values are equal, as they are or rounded once."""
    roundings = (torch.bfloat16, torch.float16) if before.is_floating_point() else ()
    wide = now.double()
    return any(torch.equal(values.double(), wide) for values in (before, *(before.to(dtype) for dtype in roundings)))


def _heading(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{name} {dtype} {list(shape)}".encode()


def file_fingerprint(folder: str | os.PathLike[str], variant: str | None = None) -> str | None:
    """`WeightsSketch.fingerprint` of the safetensors files in a model folder, of which a few kilobytes are read.

    None where there are none, or where they cannot be read as such.
    """
    try:
        tensors = {name: entry for path in weight_files(Path(folder), variant) for name, entry in _entries(path)}
        if not tensors:
            return None
        sha = hashlib.sha256()
        for name, (path, start, entry) in sorted(tensors.items()):
            sha.update(_heading(name, entry["dtype"], tuple(entry["shape"])))
            _read_blocks(sha, path, start, entry)
        return sha.hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return None  # what is wrong with the file is told by those who read all of it


def weight_files(folder: Path, variant: str | None, stem: str = "model", suffix: str = "safetensors") -> list[Path]:
    """The files of a model folder that hold its weights, as transformers names them; none where there are none."""
    middle = "" if variant is None else f".{variant}"
    whole = folder / f"{stem}{middle}.{suffix}"
    if whole.is_file():
        return [whole]
    index = folder / f"{stem}.{suffix}.index{middle}.json"
    if not index.is_file():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _entries(path: Path) -> list[tuple[str, tuple[Path, int, dict[str, Any]]]]:
    """Every tensor of a safetensors file: its name, and the file, where its data begin there, and its description."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(length))
    return [
        (name, (path, 8 + length + entry["data_offsets"][0], entry))
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _read_blocks(sha: Any, path: Path, start: int, entry: Mapping[str, Any]) -> None:
    first, end = entry["data_offsets"]
    size = 1
    for length in entry["shape"]:
        size *= length
    width = (end - first) // size if size else 0
    with path.open("rb", buffering=0) as file:
        for block_start, block_end in _blocks(size):
            file.seek(start + block_start * width)
            sha.update(file.read((block_end - block_start) * width))
