"""Ops once each: what an installed wheel is tried with. With --compiled none may lack its C++ kernel."""

import sys

import torch

import fastkd_kernels as fk
from fastkd_kernels import info

logits = torch.tensor([[0.0, 9.0], [0.1, 0.0]])
gate = fk.exit_gate(logits, 0.5)
assert gate.kept().tolist() == [1]
assert fk.compact([logits], gate.survivors, gate.count)[0][0].equal(logits[1])
(packed,), bounds = fk.pack([logits[:, None]], torch.ones(2, dtype=torch.int32))
assert fk.compact_packed([packed], bounds, gate.survivors, gate.count)[0][0][0].equal(logits[1])
assert fk.unpack([packed], bounds, 1)[0].equal(logits[:, None])
heads = packed[:, None]
assert fk.varlen_attention(heads, heads, heads, bounds, 1).allclose(heads)
ones = torch.ones(2)
assert fk.add_layer_norm(packed, None, ones, ones).allclose(torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
assert fk.embed_layer_norm([logits], [torch.tensor([1])], ones, ones).allclose(torch.tensor([[2.0, 0.0]]))

loss = fk.kd_loss(logits.requires_grad_(), logits.detach().flip(0))
loss.backward()
assert loss > 0
assert logits.grad is not None

if "--compiled" in sys.argv:
    report = info.collect()
    print(info.format_report(report))
    assert "missing" not in report["extension"], report["extension"]["missing"]
    assert {op["uses"]["cpu"] for op in report["ops"].values()} == {"cpu"}
