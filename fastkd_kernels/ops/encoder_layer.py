"""Whole layers of a transformer encoder on packed tokens, each from hidden states to hidden states in one call.

    norm after each residual (BERT)                norm before each product (`norm_first`, ModernBERT)
      a = norm_1(x + output(attention(project(x))))  a = x + output(attention(project(norm_1(x))))
      y = norm_2(a + contract(f(expand(a))))         y = a + contract(f(expand(norm_2(a))))

    f(e) = activation(e), or where `gated` activation(first half of e) * second half of e

Attention is that of `varlen_attention`: inside each sequence, with queries, keys and values as the three parts of the
first product; where `window` is given, only between tokens at most that far apart. `rotary` turns queries and keys by
their places in the sequence, the first half of a head against its second half.

The C++ kernel multiplies by instructions for bfloat16 and int8 where the CPU has them (AMX, AVX512-BF16, AVX512-VNNI)
and by float32 elsewhere, adds in float32 or int32, and keeps sums, statistics, softmax and activations in float32. In
int8 weights have a scale a row, and inputs of a product a scale a token, both symmetric:

    q(v) = round(v / s), s = max |v| / 127;  product = (q(x) . q(w)) s_x s_w + b

A token's result depends on its sequence alone: not on the other sequences, nor on the number of threads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels import _extension
from fastkd_kernels._arguments import check_rising, dense, values_are_free
from fastkd_kernels._backend import register_backends, resolve
from fastkd_kernels._derivatives import wants_gradient
from fastkd_kernels._library import library
from fastkd_kernels.checks import check_choice
from fastkd_kernels.ops.varlen_attention import varlen_attention_reference

ACTIVATIONS = ("gelu", "tanh_gelu", "relu", "silu")
"""The numbers of csrc/encoder_layer.h are the places in this tuple."""

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight of a product as whole numbers and a scale for each row, standing for `codes * scales[:, None]`.

    Attributes:
        codes: [out, in] int8.
        scales: [out], of the dtype of the hidden states.

    Raises:
        TypeError: codes that are not int8, or elsewhere than their scales.
        ValueError: shapes that do not fit each other.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.device != self.scales.device:
            raise TypeError(
                f"codes: got {self.codes.dtype} on {self.codes.device}, expected torch.int8 on that of scales, "
                f"{self.scales.device}"
            )
        if self.codes.dim() != 2 or self.scales.shape != self.codes.shape[:1]:
            raise ValueError(
                f"scales: got shape {tuple(self.scales.shape)} for codes {tuple(self.codes.shape)}, expected [out] "
                "for [out, in]"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what it stands for."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device


Affine = tuple[Tensor, Tensor | None]
"""Weight and bias: [out, in] and [out] of a product, [H] and [H] of a normalisation."""

ProductAffine = tuple[Tensor | QuantizedWeight, Tensor | None]
"""The same of a product whose weight may be quantised already."""


@dataclass(frozen=True)
class EncoderLayerWeights:
    """The parameters of one layer with hidden size H, D = heads * head size and intermediate size I, of one dtype.

    Weights of products may be `QuantizedWeight`, which an int8 layer takes as they are.

    Attributes:
        project: queries, keys and values: one product [3 D, H], or three [D, H].
        output: [H, D].
        attention_norm: norm_1; None where a layer has none (the first one of ModernBERT).
        expand: [I, H], or [2 I, H] for a gated layer.
        contract: [H, I].
        feed_forward_norm: norm_2.
    """

    project: tuple[ProductAffine, ...]
    output: ProductAffine
    attention_norm: Affine | None
    expand: ProductAffine
    contract: ProductAffine
    feed_forward_norm: Affine


@dataclass(frozen=True)
class EncoderLayerForm:
    """What a layer computes with its weights.

    Attributes:
        heads: of the attention.
        activation: one of `ACTIVATIONS`.
        gated: whether the activated half of the expanded states is multiplied by the other half.
        norm_first: whether each block normalises its input rather than its sum.
        attention_epsilon, feed_forward_epsilon: of the two normalisations.
        scale: of the scores; None for 1 / sqrt(head size).
        window: how far a token sees to each side; None for its whole sequence.
    """

    heads: int
    activation: str = "gelu"
    gated: bool = False
    norm_first: bool = False
    attention_epsilon: float = 1e-12
    feed_forward_epsilon: float = 1e-12
    scale: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class PackedEncoderLayer:
    """A layer as `encoder_layers` takes it, from `pack_encoder_layer`.

    Attributes:
        weights: as they were given; what the reference reads.
        form: what the layer computes.
        dtype: of its products: float32, bfloat16 or int8.
        rotary: [2, places, head size / 2] float32, cosines and sines of the angles; None without rotary positions.
        packed: uint8, a rearranged copy of the weights for the C++ kernel; None where that kernel does not run.
    """

    weights: EncoderLayerWeights
    form: EncoderLayerForm
    dtype: torch.dtype
    rotary: Tensor | None = None
    packed: Tensor | None = field(default=None, repr=False)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return self.weights.output[0].dtype

    @property
    def hidden_size(self) -> int:
        return self.weights.output[0].shape[0]


def encoder_layer_reference(hidden_states: Tensor, cu_seqlens: Tensor, layer: PackedEncoderLayer) -> Tensor:
    """One layer in plain PyTorch: the oracle of the tests and the fallback on any device."""
    weights, form = layer.weights, layer.form
    quantized = layer.dtype == torch.int8

    def attend(rows: Tensor) -> Tensor:
        parts = [_product_reference(rows, part, quantized) for part in weights.project]
        heads = torch.cat(parts, -1).view(rows.shape[0], 3, form.heads, -1)
        query, key, value = heads.unbind(1)
        if layer.rotary is not None:
            query, key = (_rotated(part, cu_seqlens, layer.rotary) for part in (query, key))
        attended = _attention_reference(query, key, value, cu_seqlens, form)
        return _product_reference(attended.flatten(1), weights.output, quantized)

    def feed_forward(rows: Tensor) -> Tensor:
        expanded = _product_reference(rows, weights.expand, quantized)
        if not form.gated:
            return _product_reference(_activated(expanded, form.activation), weights.contract, quantized)
        first, second = expanded.chunk(2, -1)
        return _product_reference(_activated(first, form.activation) * second, weights.contract, quantized)

    def attention_norm(rows: Tensor) -> Tensor:
        return _norm_reference(rows, weights.attention_norm, form.attention_epsilon)

    def feed_forward_norm(rows: Tensor) -> Tensor:
        return _norm_reference(rows, weights.feed_forward_norm, form.feed_forward_epsilon)

    if form.norm_first:
        middle = hidden_states + attend(attention_norm(hidden_states))
        return middle + feed_forward(feed_forward_norm(middle))
    middle = attention_norm(hidden_states + attend(hidden_states))
    return feed_forward_norm(middle + feed_forward(middle))


def _product_reference(rows: Tensor, affine: ProductAffine, quantized: bool) -> Tensor:
    weight, bias = affine[0], None if affine[1] is None else affine[1].detach()
    if not quantized:
        assert isinstance(weight, Tensor)
        return F.linear(rows, weight.detach(), bias)
    whole_rows, row_scales = _quantized(rows)
    whole_weight, weight_scales = _quantized(weight)
    # float64 adds such integers exactly
    sums = (whole_rows.double() @ whole_weight.double().t()).to(rows.dtype)
    product = sums * (row_scales * weight_scales.t())
    return product if bias is None else product + bias


def _quantized(rows: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and the scale of each row, [N, 1]."""
    if isinstance(rows, QuantizedWeight):
        return rows.codes.to(rows.scales.dtype), rows.scales[:, None]
    rows = rows.detach()
    largest = rows.abs().amax(-1, keepdim=True)
    scales = largest / 127
    # a row of zeros has scale 0
    return (rows * torch.where(largest == 0, 0, 127 / largest)).round(), scales


def _activated(rows: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(rows)
    if activation == "tanh_gelu":
        return F.gelu(rows, approximate="tanh")
    return F.relu(rows) if activation == "relu" else F.silu(rows)


def _norm_reference(rows: Tensor, affine: Affine | None, epsilon: float) -> Tensor:
    if affine is None:
        return rows
    weight, bias = affine
    return F.layer_norm(rows, rows.shape[-1:], weight.detach(), None if bias is None else bias.detach(), epsilon)


def _places(cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of each row the sequence and the place in it; rows of no sequence count on from the last one."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True, out_int32=True)
    return sequence, row - cu_seqlens[sequence.clamp(max=cu_seqlens.shape[0] - 1)]


def _rotated(heads: Tensor, cu_seqlens: Tensor, rotary: Tensor) -> Tensor:
    places = _places(cu_seqlens, heads.shape[0])[1].clamp(max=rotary.shape[1] - 1)
    wide = heads if heads.dtype == torch.float64 else heads.float()
    cosine, sine = rotary.to(wide.dtype)[:, places, None, :]
    first, second = wide.chunk(2, -1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.to(heads.dtype)


def _attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, form: EncoderLayerForm
) -> Tensor:
    if form.window is None:
        longest = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
        return varlen_attention_reference(query, key, value, cu_seqlens, longest, form.scale)
    sequence, place = _places(cu_seqlens, query.shape[0])
    sees = (sequence[:, None] == sequence) & ((place[:, None] - place).abs() <= form.window)
    query, key, value = (rows.transpose(0, 1) for rows in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=form.scale)
    return attended.transpose(0, 1)


library.define(
    "encoder_layers_(Tensor hidden_states, Tensor cu_seqlens, Tensor[] layers, Tensor[] rotary, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define("encoder_layer_instructions() -> int")


@torch.library.register_fake("fastkd_kernels::encoder_layers_", lib=library)
def _encoder_layers_fake(
    hidden_states: Tensor, cu_seqlens: Tensor, layers: Sequence[Tensor], rotary: Sequence[Tensor], out: Tensor
) -> None:
    return None


register_backends(
    "encoder_layer",
    cuda="encoder_layers has a kernel for CPUs only; on a GPU run the layer's parts",
    cpu=_extension.missing_kernel_reason("encoder_layers_", "CPU"),
    interpretable=False,
)

_encoder_layers_op: Any = torch.ops.fastkd_kernels.encoder_layers_.default

INSTRUCTION_SETS = ("default", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
"""What the products can be compiled for, each with all that those before it have."""


def encoder_layer_instructions() -> str | None:
    """The best of `INSTRUCTION_SETS` that this CPU and the environment variables allow; None without the extension."""
    if _extension.missing_kernel_reason("encoder_layers_", "CPU") is not None:
        return None
    return INSTRUCTION_SETS[torch.ops.fastkd_kernels.encoder_layer_instructions()]


def pack_encoder_layer(
    weights: EncoderLayerWeights, form: EncoderLayerForm, *, int8: bool = False, rotary: Tensor | None = None
) -> PackedEncoderLayer:
    """Rearrange the weights of a layer, once, for `encoder_layers`. Inference only: it takes them as they are now.

    Args:
        weights: of one dtype and device; float32 and bfloat16 on a CPU run the kernel.
        form: what the layer computes with them.
        int8: whether the products are those of 8-bit integers; from float32, or from weights that are quantised.
        rotary: [2, places, head size / 2] float32, the cosines and sines of each place's angles.

    Raises:
        ValueError: shapes that do not fit each other, an unknown activation.
        TypeError: dtypes or devices that differ, int8 not from float32, quantised weights without `int8`.
    """
    _check_layer(weights, form, int8, rotary)
    dtype = torch.int8 if int8 else weights.output[0].dtype
    packed = None
    if weights.output[0].device.type == "cpu" and weights.output[0].dtype in _KERNEL_DTYPES:
        instructions = encoder_layer_instructions()
        if instructions is not None:
            with torch.no_grad():
                packed = _pack(weights, form, product_dtype(dtype, instructions))
    return PackedEncoderLayer(weights, form, dtype, None if rotary is None else dense(rotary), packed)


def product_dtype(dtype: torch.dtype, instructions: str) -> torch.dtype:
    """Of the packed weights: without instructions for bfloat16, its numbers are kept as float32."""
    has_bfloat16 = INSTRUCTION_SETS.index(instructions) >= INSTRUCTION_SETS.index("avx512_bf16")
    return torch.float32 if dtype == torch.bfloat16 and not has_bfloat16 else dtype


PANEL = 16  # columns of a product that lie together: as many floats as a vector of 64 bytes has
_MAGIC = 0x6661737462657274
_HEADER = 48  # words of 8 bytes
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def _pack(weights: EncoderLayerWeights, form: EncoderLayerForm, dtype: torch.dtype) -> Tensor:
    """A header, whose words csrc/encoder_layer.h names, and what it says the places of."""
    hidden, width = weights.output[0].shape
    intermediate = weights.contract[0].shape[1]
    head_size = width // form.heads
    project = weights.project
    project_bias = (
        None
        if all(bias is None for _, bias in project)
        else torch.cat([torch.zeros(w.shape[0], dtype=w.dtype) if b is None else b for w, b in project])
    )
    sections: list[Tensor] = []
    for weight, bias in (
        (_stacked([w for w, _ in project]), project_bias),
        weights.output,
        _interleaved(weights.expand) if form.gated else weights.expand,
        weights.contract,
    ):
        sections += _packed_product(weight, bias, dtype)
    for norm in (weights.attention_norm, weights.feed_forward_norm):
        sections += _packed_norm(norm, hidden)
    places, at = [], _HEADER * 8
    for section in sections:
        places.append(at)
        at += -(-section.numel() // 64) * 64
    header = [
        _MAGIC,
        at,
        _NUMBERS[dtype],
        _NUMBERS[weights.output[0].dtype],
        hidden,
        width,
        intermediate,
        form.heads,
        ACTIVATIONS.index(form.activation),
        int(form.gated),
        int(form.norm_first),
        -1 if form.window is None else form.window,
        int(weights.attention_norm is not None),
        _bits(form.attention_epsilon),
        _bits(form.feed_forward_epsilon),
        _bits(head_size**-0.5 if form.scale is None else form.scale),
        *places,
    ]
    packed = torch.zeros(at, dtype=torch.uint8)
    packed[: len(header) * 8] = torch.tensor(header, dtype=torch.int64).view(torch.uint8)
    for place, section in zip(places, sections, strict=True):
        packed[place : place + section.numel()] = section
    return packed


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _stacked(weights: Sequence[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight:
    """Weights of the same input as one; codes keep the scales of their rows."""
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if not quantized:
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    return QuantizedWeight(torch.cat([w.codes for w in quantized]), torch.cat([w.scales for w in quantized]))


def _interleaved(expand: ProductAffine) -> ProductAffine:
    """The two halves of a gated product, a panel of one after a panel of the other, each half filled up with zeros."""
    weight, bias = expand
    half = weight.shape[0] // 2
    missing = -half % PANEL

    def panels(part: Tensor) -> Tensor:
        filled = F.pad(part.unflatten(0, (2, half)).movedim(1, -1), (0, missing)).movedim(-1, 1)
        return filled.unflatten(1, (-1, PANEL)).transpose(0, 1).flatten(0, 2)

    arranged_bias = None if bias is None else panels(bias)
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(panels(weight.codes), panels(weight.scales)), arranged_bias
    return panels(weight), arranged_bias


def _packed_product(weight: Tensor | QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Panels, biases, scales of the columns and their sums, as bytes."""
    scales = sums = torch.zeros(0)
    if dtype == torch.int8:
        weight, scales = _quantized(weight)
        scales, sums = scales[:, 0], weight.sum(-1)
    assert isinstance(weight, Tensor)
    panels = panels_of(weight, dtype)
    columns = panels.shape[0] * PANEL
    bias = torch.zeros(0) if bias is None else bias
    vectors = [_filled(vector.float(), columns) for vector in (bias, scales)]
    whole_sums = _filled(sums, columns).to(torch.int32)
    return [_bytes(part) for part in (panels, *vectors, whole_sums)]


def panels_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [out, in] as own products read it, [panels, lines, 16, terms in a line] of `dtype`.

    A panel is 16 rows of the weight; line k of it holds, for each, the terms that fill 4 bytes: one float32, two
    bfloat16 or four int8. Terms are filled up to whole tiles of 16 lines.
    """
    rows, terms = weight.shape
    in_line = 4 // dtype.itemsize
    filled = F.pad(weight, (0, -terms % (16 * in_line), 0, -rows % PANEL)).to(dtype)
    return filled.view(-1, PANEL, filled.shape[1] // in_line, in_line).transpose(1, 2).contiguous()


def _packed_norm(norm: Affine | None, width: int) -> list[Tensor]:
    if norm is None:
        return [_bytes(torch.zeros(0)), _bytes(torch.zeros(0))]
    weight, bias = norm
    bias = torch.zeros(0) if bias is None else bias
    columns = -(-width // PANEL) * PANEL
    return [_bytes(_filled(vector.float(), columns)) for vector in (weight, bias)]


def _filled(vector: Tensor, count: int) -> Tensor:
    return F.pad(vector, (0, count - vector.shape[0]))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def encoder_layer(hidden_states: Tensor, cu_seqlens: Tensor, layer: PackedEncoderLayer) -> Tensor:
    """One layer: `encoder_layers` with a list of one."""
    return encoder_layers(hidden_states, cu_seqlens, [layer])


def encoder_layers(hidden_states: Tensor, cu_seqlens: Tensor, layers: Sequence[PackedEncoderLayer]) -> Tensor:
    """Layers of an encoder one after the other, on packed sequences; the same as calling each of them by itself.

    Inference only: there is no gradient. On a GPU, and in other dtypes than float32 and bfloat16, plain PyTorch runs.

    Args:
        hidden_states: [R, H] of the dtype of the layers' weights; rows that are not dense are copied.
        cu_seqlens: [B + 1] int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; the first is 0.
        layers: from `pack_encoder_layer`; at least one.

    Returns:
        [R, H]; rows from cu_seqlens[B] on are zero where the C++ kernel runs, else undefined.

    Raises:
        ValueError: shapes that differ, `cu_seqlens` that does not rise from 0 to at most R, a gradient that is wanted.
        TypeError: dtypes or devices that differ, `cu_seqlens` that is not int32.
    """
    _check_call(hidden_states, cu_seqlens, layers)
    backend = resolve("encoder_layer", hidden_states.device)
    packed = [layer.packed for layer in layers if layer.packed is not None]
    if backend != "cpu" or len(packed) < len(layers):
        if values_are_free(cu_seqlens):
            check_rising(cu_seqlens, hidden_states.shape[0], f"R={hidden_states.shape[0]}")
        for layer in layers:
            hidden_states = encoder_layer_reference(hidden_states, cu_seqlens, layer)
        return hidden_states
    rotary = [layer.rotary for layer in layers if layer.rotary is not None]
    out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype)
    try:
        _encoder_layers_op(dense(hidden_states), dense(cu_seqlens), packed, rotary, out)
    except RuntimeError as error:
        raise _extension.as_typed_error(error) from None
    return out


def _check_call(hidden_states: Tensor, cu_seqlens: Tensor, layers: Sequence[PackedEncoderLayer]) -> None:
    if not layers:
        raise ValueError("layers: got none, expected at least one")
    if wants_gradient((hidden_states,)):
        raise ValueError(
            "hidden_states: a gradient is recorded, but encoder_layers has no backward pass; use torch.no_grad(), or "
            "run the layers of the model itself"
        )
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states: got shape {tuple(hidden_states.shape)}, expected [R, H]")
    for number, layer in enumerate(layers):
        if hidden_states.shape[1] != layer.hidden_size:
            raise ValueError(
                f"hidden_states: got shape {tuple(hidden_states.shape)}, expected [R, {layer.hidden_size}] for "
                f"layers[{number}]"
            )
        weight = layer.weights.output[0]
        if hidden_states.dtype != weight.dtype or hidden_states.device != weight.device:
            raise TypeError(
                f"hidden_states: got {hidden_states.dtype} on {hidden_states.device}, expected that of "
                f"layers[{number}], {weight.dtype} on {weight.device}"
            )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device != hidden_states.device:
        raise TypeError(
            f"cu_seqlens: got dtype {cu_seqlens.dtype} on {cu_seqlens.device}, expected torch.int32 on "
            f"{hidden_states.device}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [B + 1]")


def _check_layer(weights: EncoderLayerWeights, form: EncoderLayerForm, int8: bool, rotary: Tensor | None) -> None:
    check_choice("activation", form.activation, ACTIVATIONS)
    if len(weights.output[0].shape) != 2:
        raise ValueError(f"output: got shape {tuple(weights.output[0].shape)}, expected [H, D]")
    hidden, width = weights.output[0].shape
    if form.heads < 1 or width % form.heads:
        raise ValueError(f"heads: got {form.heads} for a width of {width}, expected a divisor of it")
    if form.window is not None and form.window < 0:
        raise ValueError(f"window: got {form.window}, expected 0 or more, or None")
    if len(weights.project) not in (1, 3):
        raise ValueError(f"project: got {len(weights.project)} products, expected one or three")
    intermediate = weights.contract[0].shape[-1]
    expected: dict[str, tuple[int, ...]] = {
        **{f"project[{n}]": (3 * width // len(weights.project), hidden) for n in range(len(weights.project))},
        "output": (hidden, width),
        "expand": (intermediate * (2 if form.gated else 1), hidden),
        "contract": (hidden, intermediate),
        "feed_forward_norm": (hidden,),
    }
    given: dict[str, ProductAffine] = {f"project[{n}]": part for n, part in enumerate(weights.project)}
    given |= {name: getattr(weights, name) for name in ("output", "expand", "contract", "feed_forward_norm")}
    if weights.attention_norm is not None:
        expected["attention_norm"], given["attention_norm"] = (hidden,), weights.attention_norm
    model = weights.output[0]
    for name, (weight, bias) in given.items():
        for part, tensor, shape in (("weight", weight, expected[name]), ("bias", bias, expected[name][:1])):
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(f"{name}: got a {part} of shape {tuple(tensor.shape)}, expected {list(shape)}")
            if tensor.dtype != model.dtype or tensor.device != model.device:
                raise TypeError(
                    f"{name}: got a {part} of {tensor.dtype} on {tensor.device}, expected that of output, "
                    f"{model.dtype} on {model.device}"
                )
    if int8 and model.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"int8: got weights of {model.dtype}, expected torch.float32")
    products = (*weights.project, weights.output, weights.expand, weights.contract)
    quantized = [isinstance(weight, QuantizedWeight) for weight, _ in products]
    if any(quantized) and not (int8 and all(quantized)):
        raise TypeError(
            f"weights: got {sum(quantized)} of {len(quantized)} quantised and int8={int8}, expected all of them with "
            "int8=True, or none"
        )
    head_size = width // form.heads
    if rotary is not None and (
        rotary.dtype != torch.float32 or rotary.dim() != 3 or rotary.shape[0] != 2 or 2 * rotary.shape[2] != head_size
    ):
        raise ValueError(
            f"rotary: got {rotary.dtype} {tuple(rotary.shape)}, expected torch.float32 [2, places, {head_size // 2}]"
        )
    if rotary is not None and rotary.device != model.device:
        raise TypeError(f"rotary: got a tensor on {rotary.device}, expected {model.device}, like the weights")
