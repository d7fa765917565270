"""Whether a module may be run from its parameters, or has to be called because something was put around it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's `forward` and nothing else: no hooks, no patch."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        # of all modules, as profilers and counters set them
        or torch_module._has_any_global_hook()
    )


def are_untouched(module: nn.Module) -> bool:
    """Whether the module and all modules inside it are untouched."""
    return all(map(is_untouched, module.modules()))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is torch's own linear layer with a bias: no adapter, quantised weight, hook or patch."""
    return type(module) is nn.Linear and module.bias is not None and is_untouched(module)
