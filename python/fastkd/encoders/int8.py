"""Products in int8: weights with one scale for each output channel, activations with one for each token.

    s_n = max_k |W_nk| / 127                    a channel of the weights, once
    t_r = max_k |x_rk| / 127                    a token, at every call
    y_rn = s_n t_r sum_k round(x_rk / t_r) round(W_nk / s_n) + b_n

The sum is exact in int32, so an answer depends neither on batch mates nor on how products are joined. What lies between
the products stays float32. A token's scale needs no calibration rows. Engines on packed tokens run whole layers by
`fastkd_kernels.encoder_layers` (AMX, VNNI, or what the CPU has). `Int8Product` is for all else: padded tokens, layers
that run by their own forward, installations without the extension. There the product is oneDNN's (VNNI, AMX, the dot
product of ARM). With AVX2 alone oneDNN, like `torch._int_mm`, adds pairs of products in 16 bits, which overflow; there,
and without oneDNN, codes are multiplied as float32, exactly up to 1,040 inputs and with its rounding beyond.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd.encoders.untouched import has_plain_weight, is_untouched, quantised_elsewhere
from fastkd.exits.merged_state import is_adapter

INT8 = "int8"
"""What configurations, certificates and options call it."""

_LARGEST = 127.0
_OFFSET = 128 if platform.machine().lower() in ("x86_64", "amd64") else 0
"""Added to the codes of rows for oneDNN: VNNI multiplies unsigned by signed, and two signed ones take a thousand times
as long there; ARM multiplies two signed ones."""


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 of the shape of `values` [..., K] float32, and the scale [..., 1] of each row.

    A row of zeros has codes 0; one that is not finite has a scale that is not.
    """
    scale = values.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(values.dtype).tiny).div_(_LARGEST)
    return (values / scale).round_().to(torch.int8), scale


def reference(rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in plain PyTorch: rows [R, K] float32, codes [N, K] int8, scale [N]; gives [R, N] float32."""
    row_codes, row_scale = quantise(rows)
    # float64 holds every sum of products of codes exactly
    sums = (row_codes.double() @ codes.double().t()).float()
    scaled = sums * scale * row_scale
    return scaled if bias is None else scaled + bias


@lru_cache(maxsize=1)
def _onednn_adds_exactly() -> bool:
    """Whether the largest codes that there are do not overflow in oneDNN's product."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        return False
    outputs, inputs = 128, 128
    with torch.inference_mode(False), torch.no_grad():
        codes = torch.full((outputs, inputs), int(_LARGEST), dtype=torch.int8)
        product = Int8Product(codes, torch.ones(outputs), None, by_onednn=True)
        sums = product.sums(codes)
    return bool((sums == inputs * _LARGEST**2).all())


class Int8Product:
    """Weights arranged once, and the product with rows of float32.

    Args:
        codes: [N, K] int8.
        scale: [N] float32.
        bias: [N] float32, or None.
        by_onednn: whether oneDNN multiplies; None: where it does so exactly.
    """

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, by_onednn: bool | None = None) -> None:
        self._scale = scale
        self._bias = bias
        self._by_onednn = _onednn_adds_exactly() if by_onednn is None else by_onednn
        self._codes: Any = torch.ops.onednn.qlinear_prepack(codes, None) if self._by_onednn else codes.float()
        self._zero = torch.zeros(len(scale), dtype=torch.int32)

    @property
    def tensors(self) -> list[Tensor]:
        """What it reads."""
        return [tensor for tensor in (self._codes, self._scale, self._bias) if tensor is not None]

    def __call__(self, rows: Tensor) -> Tensor:
        """[R, N] float32 of rows [R, K] float32."""
        if not rows.shape[0]:  # which oneDNN does not take
            return rows.new_empty(0, len(self._scale))
        codes, row_scale = quantise(rows)
        scaled = self.sums(codes)
        if self._bias is None:
            return scaled.mul_(row_scale)
        return torch.addcmul(self._bias, scaled, row_scale, out=scaled)

    def sums(self, codes: Tensor) -> Tensor:
        """[R, N] float32 of codes [R, K] int8, of scale 1."""
        if not self._by_onednn:
            return (codes.float() @ self._codes.t()).mul_(self._scale)
        shifted = codes.bitwise_xor(-128).view(torch.uint8) if _OFFSET else codes
        return torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, _OFFSET, self._codes, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )


class Int8Linear(nn.Module):
    """In the place of an `nn.Linear` whose weights were quantised; without a gradient.

    Attributes:
        weight: [out, in] int8.
        weight_scale: [out] float32.
        bias: [out] float32, or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._stamp: fk.ParameterStamp | None = None
        self._product: Int8Product | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """The quantised weights of a linear layer."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight, scale = quantise(linear.weight.detach().float())
        made.weight_scale = scale[:, 0]
        made.bias = None if linear.bias is None else linear.bias.detach().float().clone()
        return made.train(linear.training)

    @property
    def quantized_weight(self) -> fk.QuantizedWeight:
        """The codes and scales themselves, as `fastkd_kernels.encoder_layers` takes them."""
        return fk.QuantizedWeight(self.weight, self.weight_scale)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, values: Tensor) -> Tensor:
        """[..., out] float32 of [..., in].

        Raises:
            ValueError: elsewhere than on a CPU, in another dtype, or where a gradient is wanted.
        """
        rows = values.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            return reference(rows, self.weight, self.weight_scale, self.bias).view(
                *values.shape[:-1], self.out_features
            )
        if values.device.type != "cpu" or values.dtype != torch.float32:
            raise ValueError(
                "model: it is quantised to int8, which runs on a CPU with everything else in float32, but got "
                f"{values.dtype} on {values.device}; load the unquantised model"
            )
        if torch.is_grad_enabled() and values.requires_grad:
            raise ValueError(
                "model: it is quantised to int8, which has no gradients; train the unquantised model, then quantise it"
            )
        with torch.no_grad():
            return self._current_product()(rows).view(*values.shape[:-1], self.out_features)

    def _current_product(self) -> Int8Product:
        tensors = [tensor for tensor in (self.weight, self.weight_scale, self.bias) if tensor is not None]
        if self._product is None or self._stamp is None or not self._stamp.is_current(tensors):
            self._stamp = fk.ParameterStamp(tensors)
            self._product = Int8Product(self.weight, self.weight_scale, self.bias)
        return self._product

    def __getstate__(self) -> dict[str, Any]:
        # what oneDNN arranged can neither be copied nor pickled
        return {**self.__dict__, "_stamp": None, "_product": None}


def joined(modules: Sequence[Int8Linear]) -> Int8Product:
    """Layers of the same input as one product."""
    biases = [module.bias for module in modules if module.bias is not None]
    return Int8Product(
        torch.cat([module.weight for module in modules]),
        torch.cat([module.weight_scale for module in modules]),
        torch.cat(biases) if biases else None,
    )


def runs(module: nn.Module) -> bool:
    """Whether it is a quantised layer that can run where it is: on a CPU, its scales in float32."""
    return (
        isinstance(module, Int8Linear)
        and module.weight.device.type == "cpu"
        and module.weight_scale.dtype == torch.float32
    )


def replace_linears(layers: Iterable[nn.Module], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what `make` gives in the place of every linear layer inside these layers of an encoder."""
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, make(child))


def empty_like(linear: nn.Linear) -> Int8Linear:
    """Room for the weights of a saved model."""
    return Int8Linear(linear.in_features, linear.out_features, linear.bias is not None)


def why_not(layers: Iterable[nn.Module], device: torch.device) -> str | None:
    """Why these layers of an encoder cannot be quantised; None where they can."""
    if device.type != "cpu":
        return f"it is on {device}, and int8 runs on a CPU; move it there first (model.to('cpu'))"
    layers = list(layers)
    modules = [module for layer in layers for module in layer.modules()]
    if any(isinstance(module, Int8Linear) for module in modules):
        return "it is quantised already"
    if any(map(is_adapter, modules)):
        return "an adapter of peft is in its layers; merge it first (merge_and_unload)"
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    are_quantised = any(quantised_elsewhere(layer) is not None for layer in layers)
    if are_quantised or not all(map(has_plain_weight, linears)):
        return "something else has already quantised its layers; load the unquantised model"
    if not all(map(is_untouched, linears)):
        return "its linear layers have hooks; remove them first"
    if not all(bool(module.weight.isfinite().all()) for module in linears):
        return "some of its weights are not finite"
    return None
