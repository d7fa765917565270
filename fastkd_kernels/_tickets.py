"""Counters in GPU memory by which the last program of a launch knows that all others have finished."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fastkd_kernels._launch import current_stream, is_capturing, may_keep, next_power_of_2


class Tickets:
    """Zeroed counters for kernels that leave them at zero.

    Launches that may overlap must not share one: every stream has its own, and so has every launch in a CUDA graph.
    """

    CELLS = 1 << 18

    def __init__(self) -> None:
        self._cells: dict[torch.device, Tensor] = {}
        self._of_stream: dict[tuple[int, int], Tensor] = {}
        self._lock = threading.Lock()

    def take(self, tensor: Tensor, count: int) -> Tensor:
        """At least `count` of int32, on the device of `tensor`."""
        capturing = is_capturing(tensor)
        if not tensor.is_cuda or (not may_keep(tensor) and (not capturing or tensor.device not in self._cells)):
            return tensor.new_zeros(count, dtype=torch.int32)
        with self._lock:
            if capturing:
                return self._new_cells(tensor, count)
            key = (tensor.get_device(), current_stream(tensor.get_device()))
            if key not in self._of_stream or self._of_stream[key].shape[0] < count:
                self._of_stream[key] = self._new_cells(tensor, next_power_of_2(count))
            return self._of_stream[key]

    def _new_cells(self, tensor: Tensor, count: int) -> Tensor:
        if tensor.device not in self._cells:
            self._cells[tensor.device] = torch.zeros(self.CELLS, dtype=torch.int32, device=tensor.device)
            # once a device, so that every stream may use them
            torch.cuda.current_stream(tensor.device).synchronize()
        cells = self._cells[tensor.device]
        count = -(-count // 4) * 4  # 16 bytes: another alignment would be another binary, in the middle of a capture
        if cells.shape[0] < count:
            return tensor.new_zeros(count, dtype=torch.int32)
        self._cells[tensor.device] = cells[count:]
        return cells[:count]


tickets = Tickets()
"""Those of this process."""
