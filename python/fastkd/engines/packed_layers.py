"""The layers of an encoder on packed tokens, or on padded ones where it is known that no gradient is wanted.

The modules of transformers stay the owners of the weights. Layers without hooks, adapters or patches are run from their
parts:

* queries, keys and values are one product; the joined copy of their weights is made again when a parameter changes;
* sums and normalisations are one pass (`fastkd_kernels.add_layer_norm`);
* on a CPU, layers are one call (`fastkd_kernels.encoder_layers`) on weights that are rearranged once, float or int8;
  where it has no kernel, and on padded tokens, products are oneDNN's, in float with the activation inside.

Any other layer runs its own `forward`, with the attention that this file registers with transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import sdpa_mask

import fastkd_kernels as fk
from fastkd.encoders import families, int8
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.untouched import are_untouched, has_plain_weight

ATTENTION = "fastkd_packed"
"""The name under which the packed attention is registered with transformers."""


class JoinedLinear:
    """One or several linear layers of the same input as one product; the weights of a single one are not copied."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._modules = modules
        self._weight: Any = None
        self._bias: Tensor | None = None

    @property
    def parameters(self) -> list[Tensor]:
        return [p for module in self._modules for p in (module.weight, module.bias) if p is not None]

    @property
    def copies(self) -> list[Tensor]:
        """What was made of the parameters, and is not theirs."""
        return [tensor for tensor in (self._weight, self._bias) if tensor is not None]

    def prepare(self) -> None:
        """Take the weights as they are now; needed before the first call, and when they have changed."""
        if len(self._modules) > 1:  # a view of a single one would keep its memory where the model moves
            self._weight, self._bias = self._joined()

    def _joined(self) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            weights: list[Tensor] = [module.weight for module in self._modules]
            biases: list[Tensor] = [module.bias for module in self._modules if module.bias is not None]
            weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
            return weight, (torch.cat(biases) if len(biases) > 1 else biases[0].detach()) if biases else None

    def __call__(self, rows: Tensor) -> Tensor:
        if self._weight is None:
            return F.linear(rows, self._modules[0].weight, self._modules[0].bias)
        return F.linear(rows, self._weight, self._bias)

    def plus(self, rows: Tensor, residual: Tensor) -> Tensor:
        """The product with `residual` added."""
        return self(rows).add_(residual)


class PackedLinear(JoinedLinear):
    """The same with a copy of the weights that is rearranged for oneDNN, and what follows the product inside it.

    Args:
        modules: whose outputs lie side by side.
        activation: as oneDNN calls it.
        half: of the outputs, 0 or 1; None: all.
    """

    def __init__(
        self, modules: Sequence[nn.Linear], activation: tuple[str, str] = ("none", ""), half: int | None = None
    ) -> None:
        super().__init__(modules)
        self._activation, self._half = activation, half

    def prepare(self) -> None:
        weight, self._bias = self._joined()
        if self._half is not None:
            weight = weight.chunk(2)[self._half]
            self._bias = None if self._bias is None else self._bias.chunk(2)[self._half]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def __call__(self, rows: Tensor) -> Tensor:
        attribute, algorithm = self._activation
        return torch.ops.mkldnn._linear_pointwise.default(rows, self._weight, self._bias, attribute, [], algorithm)

    def plus(self, rows: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(rows, residual, self._weight, self._bias, "add")

    def times(self, rows: Tensor, factors: Tensor) -> Tensor:
        """The product times `factors`, element by element."""
        return torch.ops.mkldnn._linear_pointwise.binary(rows, factors, self._weight, self._bias, "mul")


class Int8JoinedLinear(JoinedLinear):
    """The same of quantised layers, whose product oneDNN has in int8."""

    _product: int8.Int8Product | None = None

    @property
    def parameters(self) -> list[Tensor]:
        return [*super().parameters, *(module.weight_scale for module in self._int8_modules)]

    @property
    def _int8_modules(self) -> Sequence[int8.Int8Linear]:
        return cast(Sequence[int8.Int8Linear], self._modules)

    @property
    def copies(self) -> list[Tensor]:
        return [] if self._product is None else self._product.tensors

    def prepare(self) -> None:
        self._product = int8.joined(self._int8_modules)

    def __call__(self, rows: Tensor) -> Tensor:
        assert self._product is not None
        return self._product(rows)


def linear_on(device: torch.device) -> type[JoinedLinear]:
    """The kind of linear layer that is fastest there."""
    return PackedLinear if device.type == "cpu" else JoinedLinear


def _linear_for(parts: families.LayerParts) -> type[JoinedLinear]:
    is_int8 = isinstance(parts.output, int8.Int8Linear)
    return Int8JoinedLinear if is_int8 else linear_on(parts.output.weight.device)


_FUSED_ACTIVATIONS: dict[str, tuple[tuple[str, str], Callable[[Tensor], Tensor]]] = {
    "gelu": (("gelu", "none"), F.gelu),
    "tanh_gelu": (("gelu", "tanh"), partial(F.gelu, approximate="tanh")),
    "relu": (("relu", ""), F.relu),
    "silu": (("swish", ""), F.silu),
}


def _activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name of an activation that is in `_FUSED_ACTIVATIONS`, found out by what it does; None for any other."""
    if isinstance(activation, nn.Module) and activation.state_dict():
        return None
    # far out, too, where some are cut off: relu6, gelu_10
    probe = torch.cat([torch.linspace(-4, 4, 65), torch.tensor([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])])
    found = activation(probe)
    for name, (_, exact) in _FUSED_ACTIVATIONS.items():
        if torch.allclose(found, exact(probe), rtol=0, atol=1e-6):
            return name
    return None


def _fused_activation(activation: Callable[[Tensor], Tensor]) -> tuple[str, str] | None:
    """How oneDNN calls an activation; None where it has no such one."""
    name = _activation_name(activation)
    return None if name is None else _FUSED_ACTIVATIONS[name][0]


class Expansion:
    """The first half of a feed-forward: a product and an activation, of half of it where it is gated."""

    def __init__(self, parts: families.LayerParts, linear: type[JoinedLinear]) -> None:
        self._product = linear(parts.expand)
        self._activation, self._is_gated = parts.activation, parts.is_gated

    @property
    def products(self) -> tuple[JoinedLinear, ...]:
        return (self._product,)

    def __call__(self, rows: Tensor) -> Tensor:
        if not self._is_gated:
            return self._activation(self._product(rows))
        activated, others = self._product(rows).chunk(2, dim=-1)
        return self._activation(activated) * others


class FusedExpansion:
    """The same with the activation inside the product, and the gate inside a second one."""

    def __init__(self, parts: families.LayerParts, activation: tuple[str, str]) -> None:
        self._activated = PackedLinear(parts.expand, activation, half=0 if parts.is_gated else None)
        self._others = PackedLinear(parts.expand, half=1) if parts.is_gated else None

    @property
    def products(self) -> tuple[JoinedLinear, ...]:
        return (self._activated,) if self._others is None else (self._activated, self._others)

    def __call__(self, rows: Tensor) -> Tensor:
        activated = self._activated(rows)
        return activated if self._others is None else self._others.times(rows, activated)


class LayerFromParts:
    """One encoder layer, run from its parts."""

    def __init__(self, parts: families.LayerParts, heads: int, linear: type[JoinedLinear]) -> None:
        self._parts = parts
        self._device = parts.output.weight.device
        self._heads = heads
        self._stamp: fk.ParameterStamp | None = None
        self._epsilons: tuple[float, ...] = ()
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._whole: fk.PackedEncoderLayer | None = None
        self._is_prepared = False
        self._project = linear(parts.projections)
        self._output = linear([parts.output])
        self._contract = linear([parts.contract])
        fused = _fused_activation(parts.activation) if linear is PackedLinear else None
        self._expand = Expansion(parts, linear) if fused is None else FusedExpansion(parts, fused)

    def runs(self, parts: families.LayerParts) -> bool:
        """Whether it was made for these modules where they are now."""
        return self._parts == parts and self._device == parts.output.weight.device

    def refresh(self) -> None:
        """Prepare the weights again if they changed since the last time."""
        parts = self._parts
        parameters = [parameter for linear in self._products for parameter in linear.parameters]
        parameters += [p for norm in parts.norms for p in (norm.weight, norm.bias) if p is not None]
        if parts.rotary is not None:
            parameters.append(parts.rotary.frequencies)
        epsilons = tuple(norm.eps for norm in parts.norms)
        rotary = None if parts.rotary is None else parts.rotary.tables
        is_as_then = epsilons == self._epsilons and (rotary is None or self._turns_by(rotary))
        if self._stamp is not None and is_as_then and self._stamp.is_current(parameters):
            return
        stamp = fk.ParameterStamp(parameters)
        self._rotary = rotary
        self._whole, self._is_prepared = self._packed_whole(), False
        if self._whole is None:
            self._prepare()
        self._stamp, self._epsilons = stamp, epsilons

    def _turns_by(self, tables: tuple[Tensor, Tensor]) -> bool:
        return self._rotary is not None and self._rotary[0] is tables[0]

    def _prepare(self) -> None:
        for linear in self._products:
            linear.prepare()
        self._is_prepared = True

    def _packed_whole(self) -> fk.PackedEncoderLayer | None:
        """The layer for `fastkd_kernels.encoder_layers`, where that has a kernel for it."""
        parts, activation = self._parts, _activation_name(self._parts.activation)
        is_int8 = isinstance(self._output, Int8JoinedLinear)
        has_dtype = is_int8 or parts.output.weight.dtype in (torch.float32, torch.bfloat16)
        is_taken = has_dtype and (is_int8 or isinstance(self._output, PackedLinear))
        if not is_taken or activation is None or fk.missing_kernels(("encoder_layer",), "cpu") is not None:
            return None
        attention_norm = parts.attention_norm
        form = fk.EncoderLayerForm(
            heads=self._heads,
            activation=activation,
            gated=parts.is_gated,
            norm_first=parts.norms_first,
            attention_epsilon=0.0 if attention_norm is None else attention_norm.eps,
            feed_forward_epsilon=parts.feed_forward_norm.eps,
            window=parts.window,
        )
        weights = fk.EncoderLayerWeights(
            project=tuple(map(_affine, parts.projections)),
            output=_affine(parts.output),
            attention_norm=None if attention_norm is None else (attention_norm.weight, attention_norm.bias),
            expand=_joined(parts.expand),
            contract=_affine(parts.contract),
            feed_forward_norm=(parts.feed_forward_norm.weight, parts.feed_forward_norm.bias),
        )
        with torch.inference_mode(False), torch.no_grad():
            rotary = None if self._rotary is None else torch.stack(self._rotary)
            return fk.pack_encoder_layer(weights, form, int8=is_int8, rotary=rotary)

    @property
    def whole(self) -> fk.PackedEncoderLayer | None:
        """What `fastkd_kernels.encoder_layers` takes; None where the layer runs product by product."""
        return self._whole

    @property
    def copies(self) -> list[Tensor]:
        """What it reads beside the parameters; kept alive by a CUDA graph of the layer."""
        return [*(self._rotary or ()), *(tensor for linear in self._products for tensor in linear.copies)]

    @property
    def _products(self) -> tuple[JoinedLinear, ...]:
        return self._project, self._output, *self._expand.products, self._contract

    def __call__(self, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """The layer's output, packed [R, H], where rows behind the last sequence stay finite, or padded [B, T, H]."""
        if layout.cu_seqlens is None:
            if not self._is_prepared:
                self._prepare()
            return self._padded(hidden_states, layout.layer_mask)
        if self._whole is not None:
            return fk.encoder_layer(hidden_states, layout.cu_seqlens, self._whole)
        query, key, value = self._queries_keys_values(hidden_states)
        attended = fk.varlen_attention(
            query,
            key,
            value,
            layout.cu_seqlens,
            layout.max_seqlen,
            window=self._parts.window,
            rotary=self._rotary,
        )
        return self._after_attention(attended.flatten(1), hidden_states)

    def _padded(self, hidden_states: Tensor, layer_mask: Tensor | None) -> Tensor:
        """`layer_mask` bool [B, 1, T, T] or None."""
        assert self._rotary is None, "layers with rotary tables are packed"
        assert self._parts.window is None, "layers with a window are packed"
        rows = hidden_states.flatten(0, 1)
        query, key, value = (
            tensor.unflatten(0, hidden_states.shape[:2]).transpose(1, 2) for tensor in self._queries_keys_values(rows)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=layer_mask)
        return self._after_attention(attended.transpose(1, 2).reshape(rows.shape), rows).view_as(hidden_states)

    def _queries_keys_values(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Each [R, heads, head size]."""
        norm = self._parts.attention_norm
        if self._parts.norms_first and norm is not None:
            rows = fk.add_layer_norm(rows, None, norm.weight, norm.bias, norm.eps)
        return self._project(rows).view(rows.shape[0], 3, self._heads, -1).unbind(1)

    def _after_attention(self, attended: Tensor, rows: Tensor) -> Tensor:
        total, norm = self._output(attended), self._parts.feed_forward_norm
        if self._parts.norms_first:
            middle = fk.add_layer_norm(total, rows, norm.weight, norm.bias, norm.eps, total=total)
            return self._contract.plus(self._expand(middle), total)
        assert self._parts.attention_norm is not None
        middle = _add_norm(total, rows, self._parts.attention_norm)
        return _add_norm(self._contract(self._expand(middle)), middle, norm)


def _affine(linear: nn.Module) -> tuple[Tensor | fk.QuantizedWeight, Tensor | None]:
    """Weight and bias, which keep the memory of the layer."""
    assert isinstance(linear, (nn.Linear, int8.Int8Linear))
    return linear.quantized_weight if isinstance(linear, int8.Int8Linear) else linear.weight, linear.bias


def _joined(linears: Sequence[nn.Module]) -> tuple[Tensor | fk.QuantizedWeight, Tensor | None]:
    """Weight and bias of layers of the same input as those of one."""
    affines = list(map(_affine, linears))
    if len(affines) == 1:
        return affines[0]
    quantized = [weight for weight, _ in affines if isinstance(weight, fk.QuantizedWeight)]
    weights = [weight for weight, _ in affines if isinstance(weight, Tensor)]
    biases = [bias for _, bias in affines if bias is not None]
    with torch.no_grad():
        bias = torch.cat(biases) if biases else None
        if not quantized:
            return torch.cat(weights), bias
        codes, scales = (torch.cat([getattr(weight, name) for weight in quantized]) for name in ("codes", "scales"))
        return fk.QuantizedWeight(codes, scales), bias


def _add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The normalised sum, written over x."""
    return fk.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, out=x)


def _plain_parts(layer: nn.Module, parts_of: Callable[[nn.Module], families.LayerParts]) -> families.LayerParts | None:
    """The parts of a layer, where to run them is all that it does: no adapters, hooks, patches, foreign code."""
    if not are_untouched(layer):
        return None
    try:
        parts = parts_of(layer)
    except AttributeError:  # a layer of another family was put in its place
        return None
    is_plain = (
        (all(map(has_plain_weight, parts.linears)) or all(map(int8.runs, parts.linears)))
        and all(type(norm) is nn.LayerNorm and norm.weight is not None for norm in parts.norms)
        and (parts.rotary is None or parts.rotary.is_fixed)
    )
    return parts if is_plain else None


class ModuleLayer:
    """One encoder layer, run by transformers.

    On packed rows it is a copy of the layer that runs, whose configuration names the attention registered here; the
    parameters, hooks and submodules are the layer's own. So nothing that other threads see changes. A layer whose
    `forward` was replaced cannot be copied, and pads.
    """

    def __init__(self, layer: nn.Module, config: PreTrainedConfig) -> None:
        self._layer = layer
        self._config = config
        self._packed = _with_packed_attention(layer) if _can_be_copied(layer) else None

    def __call__(self, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        if layout.cu_seqlens is None:
            return families.run_layer(self._layer, hidden_states, layout)
        if self._packed is not None:
            return families.run_layer(self._packed, hidden_states, layout)
        return self._padded(hidden_states, layout)

    def _padded(self, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """The output on packed rows [R, H], by way of padded ones; rows behind the last sequence become 0."""
        padded, mask = layout.padded(hidden_states)
        assert mask is not None
        assert layout.cu_seqlens is not None
        padded = padded.masked_fill(~mask[..., None], 0)
        padded = families.run_layer(self._layer, padded, families.padded_layout(self._config, padded, mask))
        packed = torch.zeros_like(hidden_states)
        packed[: int(layout.cu_seqlens[-1])] = padded[mask]
        return packed


def _reads_config(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("config"), PreTrainedConfig)


def _can_be_copied(layer: nn.Module) -> bool:
    """Whether no `forward` on the way to the attention was replaced, which would run the module it was taken from."""
    return not any(
        "forward" in module.__dict__ and any(map(_reads_config, module.modules())) for module in layer.modules()
    )


def _with_packed_attention(module: nn.Module) -> nn.Module:
    """The module itself, or where it reads a configuration or has children that do, a copy around the same parts."""
    children = {
        name: child if child is None else _with_packed_attention(child) for name, child in module._modules.items()
    }
    if not _reads_config(module) and all(child is module._modules[name] for name, child in children.items()):
        return module
    twin: Any = object.__new__(type(module))
    # a compiled call would run the module it was compiled from
    twin.__dict__ = {**module.__dict__, "_modules": children, "_compiled_call_impl": None}
    if _reads_config(module):
        twin.__dict__["config"] = copy.copy(module.config)
        twin.config._attn_implementation = ATTENTION
    return twin


Layer = LayerFromParts | ModuleLayer


def run_layers(layers: Sequence[Layer], hidden_states: Tensor, layout: TokenLayout) -> Tensor:
    """The output of the last of these layers, packed [R, H] or padded [B, T, H] as its input."""
    whole = [layer.whole for layer in layers if isinstance(layer, LayerFromParts) and layer.whole is not None]
    if layout.cu_seqlens is not None and whole and len(whole) == len(layers):
        return fk.encoder_layers(hidden_states, layout.cu_seqlens, whole)
    for layer in layers:
        hidden_states = layer(hidden_states, layout)
    return hidden_states


def current_layers(
    modules: Sequence[nn.Module],
    before: Sequence[Layer],
    parts_of: Callable[[nn.Module], families.LayerParts],
    config: PreTrainedConfig,
    *,
    from_parts: bool,
) -> list[Layer]:
    """What runs these modules as they are now.

    Args:
        modules: the layers of an encoder.
        before: what this returned for them the last time; nothing the first time.
        parts_of: gives the parts of one of them.
        config: of the encoder.
        from_parts: whether layers that are plain run from their parts.
    """
    previous: Sequence[Layer | None] = before or [None] * len(modules)
    return [
        _current_layer(module, old, _plain_parts(module, parts_of) if from_parts else None, config)
        for module, old in zip(modules, previous, strict=True)
    ]


def _current_layer(
    module: nn.Module, old: Layer | None, parts: families.LayerParts | None, config: PreTrainedConfig
) -> Layer:
    if parts is None:
        return ModuleLayer(module, config)
    if not isinstance(old, LayerFromParts) or not old.runs(parts):
        if not parts.fits(config.num_attention_heads):
            return ModuleLayer(module, config)
        old = LayerFromParts(parts, config.num_attention_heads, _linear_for(parts))
    old.refresh()
    return old


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on packed tokens: query, key, value [1, heads, N, head_size]."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return fk.varlen_attention(query, key, value, cu_seqlens, max_seqlen, scaling)[None], None


AttentionInterface.register(ATTENTION, packed_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
