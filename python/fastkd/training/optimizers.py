"""Optimisers that torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class BiasedAdamW(torch.optim.Optimizer):
    """AdamW without bias correction, as BERT was trained, and FastBERT by its official code (`correct_bias=False`).

        m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- (p - lr m / (sqrt(v) + eps)) (1 - lr weight_decay)

    Args:
        params: parameters, or groups of them with their own `lr` and `weight_decay`.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root of the second moment.
        weight_decay: as above, after the step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                parameter.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-group["lr"])
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
        return loss
