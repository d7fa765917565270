"""Whole encoder layers against float64 and PyTorch's own, on every instruction set of this CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from error_budget import assert_within_budget
from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd_kernels.ops.encoder_layer import INSTRUCTION_SETS, _quantized, encoder_layer_reference

DTYPES = (torch.float32, torch.bfloat16)
# what lowers the instruction set of oneDNN and these kernels
LIMITS = {
    "default": "SSE41",
    "avx2": "AVX2",
    "avx512": "AVX512_CORE",
    "avx512_vnni": "AVX512_CORE_VNNI",
    "avx512_bf16": "avx512_core_bf16",
    "amx": "ALL",
}

pytestmark = pytest.mark.skipif(
    fk.encoder_layer_instructions() is None, reason="the compiled extension has no kernel of encoder_layers_"
)


def weights(
    hidden: int, intermediate: int, width: int, dtype: torch.dtype, gated: bool = False, biased: bool = True
) -> fk.EncoderLayerWeights:
    def product(rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        weight = torch.randn(rows, columns, dtype=torch.float64) / columns**0.5
        bias = torch.randn(rows, dtype=torch.float64) / 4 if biased else None
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def norm() -> tuple[Tensor, Tensor | None]:
        weight, bias = product(hidden, 1)
        return weight[:, 0] / 4 + 1, bias

    return fk.EncoderLayerWeights(
        project=tuple(product(width, hidden) for _ in range(3)),
        output=product(hidden, width),
        attention_norm=norm(),
        expand=product(intermediate * (2 if gated else 1), hidden),
        contract=product(hidden, intermediate),
        feed_forward_norm=norm(),
    )


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_reference_is_pytorchs_layer(norm_first: bool) -> None:
    theirs = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", 1e-12, True, norm_first, dtype=torch.float64).eval()
    attention = theirs.self_attn

    def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()

    assert attention.in_proj_weight is not None
    given = fk.EncoderLayerWeights(
        project=((attention.in_proj_weight.detach(), attention.in_proj_bias.detach()),),
        output=affine(attention.out_proj),
        attention_norm=affine(theirs.norm1),
        expand=affine(theirs.linear1),
        contract=affine(theirs.linear2),
        feed_forward_norm=affine(theirs.norm2),
    )
    layer = fk.pack_encoder_layer(given, fk.EncoderLayerForm(3, norm_first=norm_first))
    rows = torch.randn(9, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.cat([theirs(part[None])[0] for part in rows.split([4, 5])])
    torch.testing.assert_close(encoder_layer_reference(rows, bounds([4, 5]), layer), expected)
    torch.testing.assert_close(fk.encoder_layer(rows, bounds([4, 5]), layer), expected)


def wide(given: fk.EncoderLayerWeights) -> fk.EncoderLayerWeights:
    """The same numbers in float64."""

    def affine(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return pair[0].double(), None if pair[1] is None else pair[1].double()

    changed = {field.name: getattr(given, field.name) for field in fields(given)}
    changed = {
        name: tuple(map(affine, value)) if name == "project" else value and affine(value)
        for name, value in changed.items()
    }
    return fk.EncoderLayerWeights(**changed)


def check_layer(
    sizes: tuple[int, int, int],
    lengths: list[int],
    dtype: torch.dtype,
    biased: bool = True,
    rotary: bool = False,
    **form: object,
) -> None:
    """One layer with `sizes` = H, I and head size against float64."""
    hidden, intermediate, head_size = sizes
    heads = max(hidden // head_size, 1)
    described = fk.EncoderLayerForm(heads, **form)  # type: ignore[arg-type]
    given = weights(hidden, intermediate, heads * head_size, dtype, described.gated, biased)
    angles = torch.arange(600.0)[:, None] * 0.9 ** torch.arange(head_size // 2)
    layer = fk.pack_encoder_layer(
        given, described, rotary=torch.stack([angles.cos(), angles.sin()]) if rotary else None
    )
    assert layer.packed is not None
    rows = torch.randn(sum(lengths), hidden).to(dtype)
    with torch.no_grad():
        result = fk.encoder_layer(rows, bounds(lengths), layer)
        truth = encoder_layer_reference(rows.double(), bounds(lengths), replace(layer, weights=wide(given)))
        same_dtype = encoder_layer_reference(rows, bounds(lengths), layer)
    assert result.dtype == dtype
    absolute = (24 if dtype == torch.float32 else 5) * torch.finfo(dtype).eps
    assert_within_budget(result, truth, same_dtype, slack=4.0, absolute=absolute)


def check_int8(sizes: tuple[int, int, int], lengths: list[int], **form: object) -> None:
    """As far from float64 as the same integers added up exactly, but for numbers on the edge between two of them."""
    hidden, intermediate, head_size = sizes
    described = fk.EncoderLayerForm(hidden // head_size, **form)  # type: ignore[arg-type]
    given = weights(hidden, intermediate, hidden // head_size * head_size, torch.float32, described.gated)
    layer = fk.pack_encoder_layer(given, described, int8=True)
    rows = torch.randn(sum(lengths), hidden)
    with torch.no_grad():
        result = fk.encoder_layer(rows, bounds(lengths), layer).double()
        exact = encoder_layer_reference(rows.double(), bounds(lengths), replace(layer, weights=wide(given)))
        float_layer = replace(layer, weights=wide(given), dtype=torch.float64)
        truth = encoder_layer_reference(rows.double(), bounds(lengths), float_layer)
    assert (result - exact).abs().quantile(0.5) < 1e-5
    assert (result - truth).square().mean() <= 1.2 * (exact - truth).square().mean() + 1e-12
    assert (result - exact).abs().max() < 0.2


def check_this_instruction_set() -> None:
    """All that an instruction set must compute; run in a process of its own by the test of every level."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for rows in (1, 2, 7, 15, 16, 17, 31, 32, 33, 50, 70):
            check_layer((64, 96, 32), [rows], dtype)
        check_layer((40, 37, 8), [1, 17, 0, 5], dtype, activation="silu")
        check_layer((33, 70, 11), [3, 5], dtype, biased=False, norm_first=True, activation="tanh_gelu")
        check_layer((36, 50, 12), [20, 2], dtype, gated=True)
        check_layer((48, 33, 7), [9], dtype, gated=True, norm_first=True, activation="relu")
        check_layer((192, 256, 64), [1, 130], dtype, scale=0.2)
        check_layer((32, 64, 32), [512, 1], dtype)
        check_layer((64, 96, 32), [1, 90, 20], dtype, window=8, norm_first=True)
        check_layer((64, 96, 32), [1, 40, 20], dtype, rotary=True)
        check_layer((48, 40, 12), [33], dtype, rotary=True, window=3)
    check_int8((64, 96, 32), [1, 30])
    check_int8((40, 37, 8), [17, 0, 5], activation="silu", norm_first=True)
    check_int8((36, 50, 12), [20], gated=True)
    check_int8((192, 256, 64), [1, 130, 16, 33], scale=0.2)
    check_int8((64, 96, 32), [512])
    for dtype, int8 in KINDS:
        check_same_answers(dtype, int8)


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
def test_error_budget_of_every_instruction_set(level: str) -> None:
    code = (
        "import fastkd_kernels as fk, test_encoder_layer, test_student_head; "
        "test_encoder_layer.check_this_instruction_set(); test_student_head.check_prepared_heads(); "
        "print(fk.encoder_layer_instructions())"
    )
    folder = Path(__file__).parent
    environment = os.environ | {
        "ONEDNN_MAX_CPU_ISA": LIMITS[level],
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    used = done.stdout.strip()
    assert INSTRUCTION_SETS.index(used) <= INSTRUCTION_SETS.index(level)
    if used != level:
        pytest.skip(f"this CPU, or the limit set for these tests, ends at {used}")


@pytest.mark.parametrize(("variable", "value"), [("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "avx2_vnni")])
def test_environment_variables_lower_the_instruction_set(variable: str, value: str) -> None:
    code = "import fastkd_kernels as fk; print(fk.encoder_layer_instructions())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {variable: value}
    )
    assert done.stdout.strip() in ("default", "avx2")


def small_layer(dtype: torch.dtype, int8: bool = False, hidden: int = 64) -> fk.PackedEncoderLayer:
    return fk.pack_encoder_layer(weights(hidden, 96, hidden, dtype), fk.EncoderLayerForm(2), int8=int8)


KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]


@pytest.mark.parametrize(("dtype", "int8"), KINDS)
def test_neither_threads_nor_other_sequences_change_an_answer(dtype: torch.dtype, int8: bool) -> None:
    check_same_answers(dtype, int8)


def check_same_answers(dtype: torch.dtype, int8: bool) -> None:
    layers = [small_layer(dtype, int8) for _ in range(2)]
    lengths = [70, 3, 0, 41, 90, 17, 66, 1]
    rows, packed = torch.randn(sum(lengths), 64).to(dtype), bounds(lengths)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fk.encoder_layers(rows, packed, layers))
            alone = [fk.encoder_layers(part, bounds([len(part)]), layers) for part in rows.split(lengths)]
            results.append(torch.cat(alone))
    finally:
        torch.set_num_threads(before)
    one_by_one = fk.encoder_layer(fk.encoder_layer(rows, packed, layers[0]), packed, layers[1])
    for result in (*results, one_by_one):
        assert result.equal(results[0])


@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sequence(dtype: torch.dtype, int8: bool, bad: float) -> None:
    layer = small_layer(dtype, int8)
    rows, packed = torch.randn(30, 64).to(dtype), bounds([11, 19])
    clean = fk.encoder_layer(rows, packed, layer)
    rows[3, 5] = bad
    result = fk.encoder_layer(rows, packed, layer)
    assert result[3].isnan().all()
    assert result[11:].equal(clean[11:])
    if bad is torch.nan:
        assert result[:11].isnan().all()


def test_rows_of_no_sequence_and_no_rows() -> None:
    layer = small_layer(torch.bfloat16)
    rows = torch.randn(9, 64).bfloat16()
    result = fk.encoder_layer(rows, bounds([2, 4]), layer)
    assert result[:6].equal(fk.encoder_layer(rows[:6], bounds([2, 4]), layer))
    assert not result[6:].any()
    assert fk.encoder_layer(rows[:0], bounds([0, 0]), layer).shape == (0, 64)
    assert not fk.encoder_layer(rows, bounds([]), layer).any()


def test_strided_rows_are_copied() -> None:
    layer = small_layer(torch.float32)
    wider = torch.randn(7, 2 * 64)
    strided, packed = wider[:, ::2], bounds([7])
    assert fk.encoder_layer(strided, packed, layer).equal(fk.encoder_layer(strided.contiguous(), packed, layer))


def test_projections_may_be_one_product_or_three() -> None:
    given = weights(48, 64, 48, torch.float32)
    joined = replace(
        given,
        project=(
            (
                torch.cat([weight for weight, _ in given.project]),
                torch.cat([b for _, b in given.project if b is not None]),
            ),
        ),
    )
    form = fk.EncoderLayerForm(3)
    rows, packed = torch.randn(8, 48), bounds([8])
    one, three = (fk.encoder_layer(rows, packed, fk.pack_encoder_layer(each, form)) for each in (given, joined))
    assert one.equal(three)


@pytest.mark.parametrize("gated", [False, True])
def test_quantised_weights_are_taken_as_they_are(gated: bool) -> None:
    given = weights(48, 50, 48, torch.float32, gated)

    def quantised(affine: tuple[Tensor, Tensor | None]) -> tuple[fk.QuantizedWeight, Tensor | None]:
        codes, scales = _quantized(affine[0])
        return fk.QuantizedWeight(codes.to(torch.int8), scales[:, 0]), affine[1]

    products: dict[str, Any] = {name: quantised(getattr(given, name)) for name in ("output", "expand", "contract")}
    codes = replace(given, project=tuple(map(quantised, given.project)), **products)
    form = fk.EncoderLayerForm(3, gated=gated)
    layers = [fk.pack_encoder_layer(each, form, int8=True) for each in (given, codes)]
    assert layers[0].packed is not None
    assert layers[1].packed is not None
    assert layers[0].packed.equal(layers[1].packed)
    assert layers[1].hidden_dtype == torch.float32
    rows = torch.randn(8, 48)
    expected, found = (encoder_layer_reference(rows, bounds([5, 3]), layer) for layer in layers)
    assert found.equal(expected)
    with fk.backend("reference"):
        torch.testing.assert_close(fk.encoder_layer(rows, bounds([5, 3]), layers[1]), expected)
    # not made of their largest value
    halved = replace(codes, contract=(fk.QuantizedWeight(products["contract"][0].codes // 2, torch.ones(48)), None))
    layer = fk.pack_encoder_layer(halved, form, int8=True)
    result, expected = fk.encoder_layer(rows, bounds([8]), layer), encoder_layer_reference(rows, bounds([8]), layer)
    assert (result - expected).abs().quantile(0.5) < 1e-4


def test_what_is_no_quantised_weight_is_refused() -> None:
    codes, form = torch.ones(64, 64, dtype=torch.int8), fk.EncoderLayerForm(2)
    with pytest.raises(TypeError, match=r"codes: got torch.uint8"):
        fk.QuantizedWeight(codes.byte(), torch.ones(64))
    with pytest.raises(ValueError, match=r"scales: got shape \(63,\) for codes \(64, 64\)"):
        fk.QuantizedWeight(codes, torch.ones(63))
    mixed = replace(weights(64, 96, 64, torch.float32), output=(fk.QuantizedWeight(codes, torch.ones(64)), None))
    for int8 in (True, False):
        with pytest.raises(TypeError, match=rf"weights: got 1 of 6 quantised and int8={int8}"):
            fk.pack_encoder_layer(mixed, form, int8=int8)


def test_other_dtypes_run_the_reference() -> None:
    layer = small_layer(torch.float64)
    assert layer.packed is None
    rows = torch.randn(5, 64, dtype=torch.float64)
    assert fk.encoder_layer(rows, bounds([5]), layer).equal(encoder_layer_reference(rows, bounds([5]), layer))


def test_bad_input_raises_before_any_work() -> None:
    given, form = weights(64, 96, 64, torch.float32), fk.EncoderLayerForm(2)
    layer, rows, packed = fk.pack_encoder_layer(given, form), torch.randn(5, 64), bounds([5])
    with pytest.raises(ValueError, match=r"activation: .*'swish'"):
        fk.pack_encoder_layer(given, replace(form, activation="swish"))
    with pytest.raises(ValueError, match="heads: got 5 for a width of 64"):
        fk.pack_encoder_layer(given, replace(form, heads=5))
    with pytest.raises(ValueError, match=r"contract: got a weight of shape \(64, 95\)|expand: got a weight"):
        fk.pack_encoder_layer(replace(given, contract=(given.contract[0][:, 1:], None)), form)
    with pytest.raises(TypeError, match=r"expand: got a weight of torch.float64"):
        fk.pack_encoder_layer(replace(given, expand=(given.expand[0].double(), None)), form)
    with pytest.raises(TypeError, match=r"int8: got weights of torch.bfloat16"):
        fk.pack_encoder_layer(weights(64, 96, 64, torch.bfloat16), form, int8=True)
    with pytest.raises(ValueError, match="layers: got none"):
        fk.encoder_layers(rows, packed, [])
    with pytest.raises(ValueError, match=r"hidden_states: got shape \(5, 63\), expected \[R, 64\]"):
        fk.encoder_layer(rows[:, 1:], packed, layer)
    with pytest.raises(TypeError, match=r"hidden_states: got torch.float64"):
        fk.encoder_layer(rows.double(), packed, layer)
    with pytest.raises(TypeError, match=r"cu_seqlens: got dtype torch.int64"):
        fk.encoder_layer(rows, packed.long(), layer)
    with pytest.raises(ValueError, match="a gradient is recorded"):
        fk.encoder_layer(rows.clone().requires_grad_(), packed, layer)
    for values in ([0, 6], [1, 5], [0, 4, 2]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            fk.encoder_layer(rows, torch.tensor(values).int(), layer)
    assert layer.packed is not None
    with pytest.raises(ValueError, match="layers: expected the output of this version's pack_encoder_layer"):
        fk.encoder_layer(rows, packed, replace(layer, packed=torch.zeros_like(layer.packed)))


def test_opcheck_and_fullgraph() -> None:
    layer = small_layer(torch.float32)
    rows, packed = torch.randn(5, 64), bounds([2, 3])
    arguments = (rows, packed, [layer.packed], [], torch.zeros(5, 64))
    torch.library.opcheck(torch.ops.fastkd_kernels.encoder_layers_.default, arguments)

    def run(rows: Tensor, packed: Tensor) -> Tensor:
        return fk.encoder_layer(rows * 2, packed, layer) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert compiled(rows, packed).equal(run(rows, packed))
