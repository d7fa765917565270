"""Device functions of the exit gate, shared by the Triton kernels of `exit_gate` and `student_head`.

A criterion is its number in `CRITERIA`; the formulas are in the docstring of `exit_gate`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from fastkd_kernels import _triton
from fastkd_kernels._triton import tl

jit = _triton.triton.jit if _triton.available else lambda kernel: kernel


@jit
def uncertainty(
    logits,  # [R, BLOCK_LABELS] float32 in registers; what stands from C on is ignored
    label,  # [BLOCK_LABELS], class numbers
    num_labels,  # C
    top_n,
    CRITERION: tl.constexpr,  # number in CRITERIA, but not that of "patience"
):
    """Uncertainty [R] float32; NaN where the logits hold a NaN or have no finite maximum."""
    known = (label < num_labels)[None, :]
    logits = tl.where(known, logits, float("-inf"))
    largest = tl.max(logits, 1)
    invalid = is_invalid(logits, largest)
    # a finite stand-in, so that invalid rows make no NaN before they are marked
    shifted = logits - tl.where(invalid, 0.0, largest)[:, None]
    terms = num_labels
    if CRITERION == 3:
        shifted = tl.where(label[None, :] < top_n, tl.sort(shifted, descending=True), float("-inf"))
        terms = top_n
    weight = tl.exp(shifted)
    total = tl.sum(weight, 1)
    if CRITERION == 1:
        result = (1 - 1 / total) / (1 - 1 / num_labels.to(tl.float32))
    elif CRITERION == 2:
        is_first = label[None, :] == first_label(logits, largest, label)[:, None]
        second = tl.max(tl.where(is_first, float("-inf"), shifted), 1)
        result = 1 - (1 - tl.exp(second)) / total
    else:
        # a probability of 0 contributes 0, also where its logit is -inf
        weighted = tl.sum(tl.where(weight == 0, 0.0, weight * shifted), 1)
        result = (tl.log(total) - weighted / total) / tl.log(terms.to(tl.float32))
    result = tl.minimum(tl.maximum(result, 0.0), 1.0)
    return tl.where(invalid, float("nan"), result)


@jit
def patience(
    logits,  # [R, BLOCK_LABELS] float32 in registers, -inf from C on
    label,  # [BLOCK_LABELS], class numbers
    history,  # [R] pointers to int32 pairs, a row's last label and its repetitions; updated
):
    """Uncertainty [R] float32; NaN where the logits hold a NaN or have no finite maximum."""
    largest = tl.max(logits, 1)
    invalid = is_invalid(logits, largest)
    answer = first_label(logits, largest, label)
    repeated = tl.where(tl.load(history) == answer, tl.load(history + 1) + 1, 0)
    tl.debug_barrier()  # every thread has read the old history before one of them writes the new
    tl.store(history, tl.where(invalid, -1, answer))
    tl.store(history + 1, repeated)
    return tl.where(invalid, float("nan"), 1 / (1 + repeated.to(tl.float32)))


@jit
def is_invalid(
    logits,  # [R, BLOCK_LABELS], -inf from C on
    largest,  # [R], their maximum
):
    """[R], whether a row holds a NaN or has no finite maximum."""
    has_nan = tl.max((logits != logits).to(tl.int32), 1) != 0
    return has_nan | ~(tl.abs(largest) < float("inf"))


@jit
def first_label(
    logits,  # [R, BLOCK_LABELS], -inf from C on
    largest,  # [R], their maximum
    label,  # [BLOCK_LABELS], class numbers
):
    """[R], the first class that has the largest logit."""
    return tl.min(tl.where(logits == largest[:, None], label[None, :], 2147483647), 1)
