"""The tools that prove the kernels fail where they should: a proof that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch
from cubins import KernelSpec, compile_kernels
from error_budget import assert_within_budget

import fastkd_kernels as fk

pytest.importorskip("triton")

import triton
import triton.language as tl


@triton.jit
def _copy(
    source,  # [BLOCK]
    target,  # [BLOCK], may overlap: every value must be in a register before the first is stored
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index))


def _spec(alignment: str, block: int = 2048, **options: int) -> KernelSpec:
    arguments = {"source": f"*fp32{alignment}", "target": f"*fp32{alignment}", "BLOCK": block}
    return KernelSpec("test_proof_tools:_copy", arguments, {"num_warps": 1, **options})


def test_spills_and_vector_loads_are_seen() -> None:
    spilling, aligned, unaligned = compile_kernels([_spec(":16", maxnreg=32), _spec(":16"), _spec("")], [90])
    with pytest.raises(AssertionError, match="of stack"):
        spilling.assert_no_spills()
    aligned.assert_no_spills()
    assert aligned.opcodes()["LDG.E.128"] == 2048 // 32 // 4
    assert unaligned.opcodes()["LDG.E.128"] == 0


def test_a_kernel_that_does_not_compile_says_so() -> None:
    with pytest.raises(RuntimeError, match="power of 2"):
        compile_kernels([_spec("", block=63)], [90])


def test_budget_is_that_of_torch_plus_the_slack() -> None:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    exact = truth.float()
    above = exact.nextafter(torch.tensor(torch.inf))
    assert_within_budget(above, truth, exact, slack=1.0)
    assert_within_budget(above, truth, above, slack=0.0)
    with pytest.raises(AssertionError, match="2 of 2 elements"):
        assert_within_budget(above, truth, exact, slack=0.25)


def test_budget_rejects_nan_and_missing_nan() -> None:
    truth = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    assert_within_budget(truth.float(), truth, truth.float())
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([torch.nan, torch.nan]), truth, truth.float())
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, 1.0]), truth, truth.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not in Triton's interpreter")
def test_a_function_called_in_a_kernel_is_not_patched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    patched: list[object] = []
    patch = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda part, *given: (patched.append(part), patch(part, *given)))
    with fk.backend("cuda"):
        fk.exit_gate(torch.randn(2, 5), 0.5)  # the first of a process patches triton.language.core, for good
        patched.clear()
        fk.exit_gate(torch.randn(2, 5), 0.5)
    assert patched
    assert len(patched) == len({*map(id, patched)}), "a part of the language was looked through twice"
