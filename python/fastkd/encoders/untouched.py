"""Whether a module may be run from its parameters, or has to be called because something was put around it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_PLAIN = (nn.Parameter, Tensor)  # torchao quantises by putting a tensor of another class into a linear layer


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


_KNOWN = ("torch.nn.", "transformers.", "fastkd.")


def are_untouched(module: nn.Module) -> bool:
    """Whether the module and all inside it are untouched, and none is of a class of somebody else, whatever it does."""
    return all(is_untouched(inner) and type(inner).__module__.startswith(_KNOWN) for inner in module.modules())


def quantised_elsewhere(module: nn.Module) -> str | None:
    """The name of the first module inside that PyTorch or torchao quantised; None where there is none."""
    for name, inner in module.named_modules():
        tensors = (*inner._parameters.values(), *inner._buffers.values())
        if type(inner).__module__.startswith("torch.ao.nn.") or any(map(_is_quantised, tensors)):
            return name
    return None


def check_not_quantised_elsewhere(module: nn.Module, argument: str, remedy: str) -> None:
    """Raise ValueError where PyTorch or torchao quantised part of a model; `remedy` says what to do."""
    name = quantised_elsewhere(module)
    if name is not None:
        raise ValueError(f"{argument}: PyTorch or torchao quantised its {name}; {remedy}")


def _is_quantised(tensor: Tensor | None) -> bool:
    return tensor is not None and (tensor.is_quantized or type(tensor).__module__.startswith("torchao."))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is torch's own linear layer with a bias: no adapter, quantised weight, hook or patch."""
    return has_plain_weight(module) and module.bias is not None and is_untouched(module)


def has_plain_weight(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether it is torch's own linear layer, or one of this `kind`, with a tensor of torch's own in it."""
    return type(module) is kind and type(module.weight) in _PLAIN
