"""Which derivatives the kernels have: the first, in reverse mode. All others come from plain PyTorch, or raise.

Forward-mode AD and the transforms of `torch.func` look into the operations of a function, and see none inside a kernel:
`_backend.resolve` asks here and takes the differentiable reference. A gradient that a kernel computed cannot be
differentiated again, and `differentiated_once` makes the attempt raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRANSFORM_REASON = "forward-mode AD and torch.func work with plain PyTorch only"


def transforming() -> bool:
    """Whether forward-mode AD or a transform of `torch.func` is under way, inside a compiled function too."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


# what `torch.compiler.assume_constant_result` sets, which would import the compiler; Dynamo enters transforms while it
# traces them, and guards what it traced by the transforms around it
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_batched(tensor: Tensor) -> bool:
    """Whether a vmap hides several tensors in this one, as `is_grads_batched` does to a backward pass."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_functorch_wrapped_tensor(tensor)


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _DifferentiatedOnce(torch.autograd.Function):
    """Its input, which has no gradient of its own: a penalty on it would otherwise silently count for nothing."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *links: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        raise RuntimeError(
            "the gradient of a fused op cannot be differentiated again; compute the op inside "
            'fastkd_kernels.backend("reference") instead, which is plain PyTorch'
        )


def differentiated_once(gradients: Sequence[Tensor | None], links: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, for a backward pass that records itself: differentiating them raises.

    Args:
        links: outputs of the node whose backward pass this is, and what came into it; without a path to the inputs
            autograd would skip the error.
    """
    return [None if gradient is None else _DifferentiatedOnce.apply(gradient, *links) for gradient in gradients]
