"""The memory of one step of language-model distillation: from hidden states, and from all logits of both models.

    python bench/bench_lm_memory.py --tokens 1024 --vocabulary 32000

Small models of the Llama family with random weights, forward and backward; what counts is the peak that a step adds.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from memory import peak_bytes
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fastkd_kernels as fk

TEMPERATURE = 2.0


def causal_model(vocabulary: int, hidden_size: int) -> LlamaForCausalLM:
    """Random weights, two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        )
    )  # fmt: skip


def from_hidden_states(student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Half divergence, half cross entropy, by `fused_linear_kd_loss`."""
    with torch.no_grad():
        taught = teacher.model(ids[:, :-1]).last_hidden_state
    hidden = student.model(ids[:, :-1]).last_hidden_state
    heads = student.lm_head.weight, teacher.lm_head.weight
    return fk.fused_linear_kd_loss(
        hidden, heads[0], taught, heads[1], ids[:, 1:], temperature=TEMPERATURE, label_weight=0.5, kd_weight=0.5
    )


def from_logits(student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    with torch.no_grad():
        taught = teacher(ids[:, :-1]).logits.flatten(0, 1)
    logits = student(ids[:, :-1]).logits.flatten(0, 1)
    log_q, log_p = (logits / TEMPERATURE).log_softmax(-1), (taught / TEMPERATURE).log_softmax(-1)
    soft = TEMPERATURE**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return 0.5 * soft + 0.5 * F.cross_entropy(logits, ids[:, 1:].flatten())


def main(
    tokens: Annotated[int, typer.Option(help="In four sequences.")] = 1024,
    vocabulary: Annotated[int, typer.Option(help="Classes of both heads.")] = 32_000,
    hidden_size: Annotated[int, typer.Option(help="Of the student; the teacher has twice as many.")] = 128,
    threads: Annotated[int, typer.Option(help="Of the processor.")] = 1,
) -> None:
    """Print the peak of both, and how far their losses and gradients are apart."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    student, teacher = causal_model(vocabulary, hidden_size), causal_model(vocabulary, 2 * hidden_size)
    teacher.eval().requires_grad_(False)
    ids = torch.randint(vocabulary, (4, tokens // 4 + 1))
    results, peaks = {}, {}
    for loss_of in (from_logits, from_hidden_states):

        def step(loss_of=loss_of) -> None:
            student.zero_grad()
            loss_of(student, teacher, ids).backward()

        peaks[loss_of] = peak_bytes(step)
        results[loss_of] = [loss_of(student, teacher, ids).detach(), *(p.grad.clone() for p in student.parameters())]
        name = loss_of.__name__.replace("_", " ")
        print(f"{name:20} {peaks[loss_of] / 2**20:8.0f} MiB at its peak")
    logits = tokens * vocabulary * 4
    print(f"{'one model' + chr(39) + 's logits':20} {logits / 2**20:8.0f} MiB")
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(*results.values(), strict=True))
    print(
        f"losses and gradients are {apart:.1e} apart; {peaks[from_logits] / peaks[from_hidden_states]:.1f} times less"
    )


if __name__ == "__main__":
    typer.run(main)
