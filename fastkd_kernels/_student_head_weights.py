"""The weights of a student head: as they are, folded by the formulas of `ops.student_head`, and the folded cached."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastkd_kernels._launch import current_stream, is_captured_op, is_capturing, may_keep
from fastkd_kernels._stamps import ParameterStamp

Affine = tuple[Tensor, Tensor]
"""Weight [out, in] and bias [out] of one linear layer."""


class StudentHeadWeights(NamedTuple):
    """The seven linear layers of one head, as (weight [out, in], bias [out]) pairs."""

    narrow: Affine
    """[D, H]"""
    query: Affine
    """[D, D]"""
    key: Affine
    """[D, D]"""
    value: Affine
    """[D, D]"""
    output: Affine
    """[D, D]"""
    dense: Affine
    """[D, D]"""
    classifier: Affine
    """[C, D]"""
    num_attention_heads: int = 2


def parameters_of(head: StudentHeadWeights) -> list[Tensor]:
    """Weight and bias of every layer, in their order."""
    return [*head.narrow, *head.query, *head.key, *head.value, *head.output, *head.dense, *head.classifier]


def check_head(head: StudentHeadWeights) -> None:
    """Raise ValueError or TypeError for layers whose shapes, dtypes or devices do not fit each other."""
    width, hidden = matrix_shape("narrow", head.narrow[0])
    if width % head.num_attention_heads:
        raise ValueError(
            f"num_attention_heads: got {head.num_attention_heads}, expected a divisor of the head width {width}"
        )
    classes = matrix_shape("classifier", head.classifier[0])[0]
    expected = {"narrow": (width, hidden), "classifier": (classes, width)}
    for name, pair in zip(StudentHeadWeights._fields[:7], head[:7], strict=True):
        weight, bias = pair  # type: ignore[misc]
        shape = expected.get(name, (width, width))
        if tuple(weight.shape) != shape or tuple(bias.shape) != shape[:1]:
            raise ValueError(
                f"{name}: got a weight of shape {tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}, "
                f"expected {list(shape)} and [{shape[0]}]"
            )
        for tensor in (weight, bias):
            if tensor.dtype != head.narrow[0].dtype or tensor.device != head.narrow[0].device:
                raise TypeError(
                    f"{name}: got {tensor.dtype} on {tensor.device}, expected that of narrow, "
                    f"{head.narrow[0].dtype} on {head.narrow[0].device}"
                )


def matrix_shape(name: str, weight: Tensor) -> tuple[int, int]:
    """[out, in] of the weight of one layer."""
    if weight.dim() != 2:
        raise ValueError(f"{name}: got a weight of shape {tuple(weight.shape)}, expected [out, in]")
    return weight.shape[0], weight.shape[1]


@dataclass(frozen=True)
class FoldedStudentHead:
    """A head with its projections folded, in float32 (float64 for a float64 head); matrices are stored [in, out]."""

    narrow: Affine
    """[D, H] and [D], as they are"""
    query_key: Tensor
    """[heads, D, D], U_j transposed"""
    query_bias: Tensor
    """[heads, D], e_j"""
    mix: Tensor
    """[heads, D, D], M_j transposed"""
    mix_bias: Tensor
    """[D], m"""
    classifier: Affine
    """[C, D] and [C]"""

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.narrow, self.query_key, self.query_bias, self.mix, self.mix_bias, *self.classifier

    @property
    def num_attention_heads(self) -> int:
        return self.query_key.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, D and C."""
        return self.narrow[0].shape[1], self.narrow[0].shape[0], self.classifier[0].shape[0]


def fold(head: StudentHeadWeights) -> FoldedStudentHead:
    """Fold query into key and value, output and dense into one matrix a head (docstring of `ops.student_head`).

    The products are formed in float64, so a folded matrix is as exact as its dtype allows.
    """
    heads, width = head.num_attention_heads, head.query[0].shape[0]
    head_width = width // heads
    (query, query_bias), (key, _), (value, value_bias), (output, output_bias), (dense, dense_bias) = (
        (weight.detach().double(), bias.detach().double())
        for weight, bias in (head.query, head.key, head.value, head.output, head.dense)
    )
    key = key.view(heads, head_width, width) * head_width**-0.5
    query_key = query.view(heads, head_width, width).mT @ key
    folded_query_bias = (query_bias.view(heads, 1, head_width) @ key).squeeze(1)
    dense_output = (dense @ output).view(width, heads, head_width).permute(1, 2, 0)
    mix = value.view(heads, head_width, width).mT @ dense_output
    mix_bias = dense @ (output @ value_bias + output_bias) + dense_bias

    accumulated = torch.float64 if head.narrow[0].dtype == torch.float64 else torch.float32
    return FoldedStudentHead(
        narrow=(head.narrow[0].detach().contiguous(), head.narrow[1].detach().contiguous()),
        query_key=query_key.to(accumulated).contiguous(),
        query_bias=folded_query_bias.to(accumulated).contiguous(),
        mix=mix.to(accumulated).contiguous(),
        mix_bias=mix_bias.to(accumulated).contiguous(),
        classifier=(
            head.classifier[0].detach().to(accumulated).contiguous(),
            head.classifier[1].detach().to(accumulated).contiguous(),
        ),
    )


@dataclass(frozen=True)
class _CacheEntry:
    folded: FoldedStudentHead
    stamp: ParameterStamp
    captured: list[FoldedStudentHead]
    """What CUDA graphs point to, kept as long as the head lives."""
    streams: set[int] = field(default_factory=set)
    """Handles of the streams that `keep_for_stream` was told of."""

    def keep_for_stream(self) -> None:
        """Memory of a replaced entry is used again once the current stream has read it too.

        Once a stream: the allocator waits for what the stream holds when the memory is given back, not now.
        """
        device = self.folded.mix.device
        stream = current_stream(device.index)
        if stream not in self.streams:
            for tensor in self.folded.tensors():
                tensor.record_stream(torch.cuda.current_stream(device))
            self.streams.add(stream)


class FoldCache:
    """Folded heads by their query weight, forgotten with it and rebuilt when any parameter changes."""

    def __init__(self) -> None:
        self._entries = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, head: StudentHeadWeights) -> FoldedStudentHead:
        parameters = parameters_of(head)
        entry = self._entries.get(head.query[0])
        # a graph of torch.compile takes the weights as inputs, so it folds those that it is replayed with
        if (
            entry is not None
            and not is_captured_op(head.query[0])
            and head.num_attention_heads == entry.folded.num_attention_heads
            and entry.stamp.is_current(parameters)
        ):
            if is_capturing(head.query[0]):
                entry.captured.append(entry.folded)
            elif head.query[0].is_cuda:
                entry.keep_for_stream()
            return entry.folded
        check_head(head)
        # an inference tensor has no version; and what is folded during a capture exists only once the graph is replayed
        if any(parameter.is_inference() for parameter in parameters) or not may_keep(head.query[0]):
            return fold(head)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            stamp = ParameterStamp(parameters)
            folded = fold(head)
            if head.query[0].is_cuda:
                # once per change of the weights, so that every stream may use them
                torch.cuda.current_stream(head.query[0].device).synchronize()
            made = _CacheEntry(folded, stamp, [] if entry is None else entry.captured)
            if head.query[0].is_cuda:
                made.keep_for_stream()
            self._entries[head.query[0]] = made
        return folded


fold_cache = FoldCache()
"""Those of this process."""
