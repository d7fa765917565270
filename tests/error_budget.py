"""The bar of every kernel's numbers: as accurate as plain PyTorch in the same dtype, element by element."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, truth64: Tensor, same_dtype_torch: Tensor, slack: float = 1.0, absolute: float = 0.0
) -> None:
    """Assert |actual - truth| <= |torch - truth| + slack * eps * |truth| + absolute for every element.

    Args:
        actual: what the kernel returned.
        truth64: the float64 reference.
        same_dtype_torch: plain PyTorch in the dtype of the kernel.
        slack: what the kernel may add to the error of PyTorch, in units in the last place of `actual`'s dtype.
        absolute: the same in absolute terms, for results near zero.

    NaN and infinite elements must be the same in all three.
    """
    assert actual.shape == truth64.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth64.shape)}"
    assert truth64.dtype == torch.float64, f"the truth is {truth64.dtype}, expected torch.float64"
    result, baseline = actual.double().cpu(), same_dtype_torch.double().cpu()
    truth = truth64.cpu()
    finite = truth.isfinite()
    torch.testing.assert_close(result[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    error, allowed = (result - truth).abs()[finite], (baseline - truth).abs()[finite]
    allowed = allowed + slack * torch.finfo(actual.dtype).eps * truth[finite].abs() + absolute
    # written so that a NaN on either side fails
    excess = ~(error <= allowed)
    if excess.any():
        worst = int(torch.where(excess, error - allowed, -torch.inf).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{int(excess.sum())} of {excess.numel()} elements are less accurate than the budget; worst: "
            f"{result[finite][worst]:.9g}, truth {truth[finite][worst]:.9g}, PyTorch {baseline[finite][worst]:.9g}, "
            f"error {error[worst]:.3g} > allowed {allowed[worst]:.3g}"
        )
