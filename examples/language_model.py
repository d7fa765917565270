"""A small causal model learns from a larger one, from hidden states: the logits of all tokens are never in memory."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastkd_kernels as fk

CLASSES, TOKENS = 2000, 64


def main() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": CLASSES, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    teacher = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=64, **size)).eval().requires_grad_(False)
    student = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, **size))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    tokens = torch.randint(CLASSES, (8, TOKENS + 1))
    taught = teacher.get_decoder()(tokens[:, :-1]).last_hidden_state
    for step in range(21):
        hidden = student.get_decoder()(tokens[:, :-1]).last_hidden_state
        loss = fk.fused_linear_kd_loss(
            hidden, student.lm_head.weight, taught, teacher.lm_head.weight, temperature=0.1, chunk_tokens=128
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: divergence from the teacher {loss.item():.3f}")


if __name__ == "__main__":
    main()
