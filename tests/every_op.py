"""Every op of the package as a function of tensors by name, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastkd_kernels as fk

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """One way to call an op.

    Attributes:
        backends: the name under which its backends are registered.
        make: small valid arguments.
        call: the defined part of what comes out.
        differentiable: arguments that get a gradient.
        written: arguments that are written; they are part of what `call` returns.
        distinct: integer arguments whose values must differ, so that they cannot be expanded.
        second_derivative: what the error says by which a second derivative is refused; None where there is one.
        precise: floating-point arguments that are float32 where the others have fewer bits.
        varied: arguments that tests of every argument look at; empty for all, where no other call has them already.
    """

    name: str
    backends: str
    make: Callable[[], Tensors]
    call: Callable[[Tensors], list[Tensor]]
    differentiable: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    distinct: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()
    second_derivative: str | None = None


def _int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _head(width: int, hidden: int, classes: int, tensors: Tensors) -> fk.StudentHeadWeights:
    names = ("narrow", "query", "key", "value", "output", "dense", "classifier")
    pairs = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names]
    return fk.StudentHeadWeights(*pairs, num_attention_heads=2)


def _head_tensors(width: int = 16, hidden: int = 24, classes: int = 3) -> Tensors:
    shapes = dict.fromkeys(("query", "key", "value", "output", "dense"), (width, width))
    shapes = {"narrow": (width, hidden), **shapes, "classifier": (classes, width)}
    made = {}
    for name, (rows, columns) in shapes.items():
        made[f"{name}.weight"] = torch.randn(rows, columns) / columns**0.5
        made[f"{name}.bias"] = torch.randn(rows) / 4
    return made


def _losses() -> list[Op]:
    def pair() -> Tensors:
        return {"student_logits": torch.randn(5, 7), "teacher_logits": torch.randn(5, 7)}

    def layers() -> Tensors:
        return {"student_logits": torch.randn(2, 3, 5), "teacher_logits": torch.randn(2, 3, 5)}

    def tokens() -> Tensors:
        return {**layers(), "labels": torch.tensor([[1, -100, 0], [4, 2, -100]])}

    def mixture() -> Tensors:
        return {
            "student_logits": torch.randn(3, 5),
            "teacher_logits": torch.randn(3, 5),
            "labels": torch.randint(5, (3,)),
            "student_layer_logits": torch.randn(2, 3, 5),
            "teacher_layer_logits": torch.randn(2, 3, 5),
        }

    def regression() -> Tensors:
        return {
            "student_logits": torch.randn(3, 1),
            "teacher_logits": torch.randn(3, 1),
            "labels": torch.randn(3),
            "student_layer_logits": torch.randn(2, 3, 1),
            "teacher_layer_logits": torch.randn(2, 3, 1),
        }

    def linear() -> Tensors:
        return {
            "student_hidden_states": torch.randn(6, 8),
            "student_weight": torch.randn(11, 8),
            "teacher_hidden_states": torch.randn(6, 12),
            "teacher_weight": torch.randn(11, 12),
            "labels": torch.randint(11, (6,)),
            "student_bias": torch.randn(11),
            "teacher_bias": torch.randn(11),
        }

    def known() -> Tensors:
        student = {name: tensor for name, tensor in linear().items() if not name.startswith("teacher")}
        values, indices = torch.randn(6, 11).topk(4)
        return {**student, "teacher_logits": values, "teacher_indices": indices}

    def mixed(tensors: Tensors, **options: str) -> list[Tensor]:
        weights = {"label_weight": 0.2, "kd_weight": 0.3, "intermediate_weight": 0.5}
        return [fk.distillation_loss(**tensors, **weights, temperature=2.0, **options)]

    student, last = ("student_logits",), ("student_logits", "student_layer_logits")
    head = ("student_hidden_states", "student_weight", "student_bias")
    return [
        Op("kd_loss", "kd_loss", pair, lambda t: [fk.kd_loss(**t, temperature=2.0)], student),
        Op("kd_loss jsd", "kd_loss", pair, lambda t: [fk.kd_loss(**t, direction="jsd", beta=0.2)], student),
        Op("kd_loss rows", "kd_loss", pair, lambda t: [fk.kd_loss(**t, reduction="none")], student, varied=student),
        Op(
            "kd_loss tokens",
            "kd_loss",
            tokens,
            lambda t: [fk.kd_loss(**t, temperature=2.0)],
            student,
            varied=("labels", *student),
        ),
        Op("universal_kd_loss", "universal_kd_loss", layers, lambda t: [fk.universal_kd_loss(**t)], student),
        Op("distillation_loss", "distillation_loss", mixture, mixed, last),
        Op(
            "distillation_loss scores",
            "distillation_loss",
            regression,
            lambda t: mixed(t, task="regression"),
            last,
            varied=("labels", *last),
        ),
        Op(
            "fused_linear_kd_loss",
            "fused_linear_kd_loss",
            linear,
            lambda t: [fk.fused_linear_kd_loss(**t, label_weight=0.5, chunk_tokens=4)],
            head,
        ),
        Op(
            "fused_linear_kd_loss tokens",
            "fused_linear_kd_loss",
            linear,
            lambda t: [
                fk.fused_linear_kd_loss(
                    **t,
                    label_weight=0.5,
                    chunk_tokens=4,
                    reduction="none",
                    student_softcap=2.0,
                    teacher_logit_scale=0.5,
                )
            ],
            head,
            varied=("labels", *head),
        ),
        Op(
            "fused_linear_kd_loss known",
            "fused_linear_kd_loss",
            known,
            lambda t: [fk.fused_linear_kd_loss(**t, label_weight=0.5, chunk_tokens=4)],
            head,
            distinct=("teacher_indices",),
            varied=("teacher_logits", "teacher_indices"),
        ),
    ]


def _rows() -> list[Op]:
    def padded() -> Tensors:
        return {"first": torch.randn(3, 4, 5), "second": torch.arange(12).view(3, 4), "lengths": _int32(4, 0, 2)}

    def packed() -> Tensors:
        return {"first": torch.randn(9, 5), "second": torch.arange(9), "cu_seqlens": _int32(0, 3, 4, 8)}

    def chosen() -> Tensors:
        return {**packed(), "survivors": _int32(2, 0, 1), "count": _int32(2)}

    def into() -> Tensors:
        return {**chosen(), "out": torch.zeros(9, 5), "other": torch.zeros(9, dtype=torch.int64)}

    def rows() -> Tensors:
        return {"first": torch.randn(6, 4, 3), "second": torch.arange(6), "survivors": _int32(4, 0, 5, 1)}

    def rows_into() -> Tensors:
        counted = {**rows(), "count": _int32(3)}
        return {**counted, "out": torch.zeros(5, 4, 3), "other": torch.zeros(5, dtype=torch.int64)}

    def pack(t: Tensors) -> list[Tensor]:
        tensors, bounds = fk.pack([t["first"], t["second"]], t["lengths"])
        return [*(tensor[: int(bounds[-1])] for tensor in tensors), bounds]

    def compact_packed(t: Tensors) -> list[Tensor]:
        out = [t["out"], t["other"]] if "out" in t else None
        tensors, bounds = fk.compact_packed(
            [t["first"], t["second"]], t["cu_seqlens"], t["survivors"], t["count"], out=out
        )
        return [*(tensor[: int(bounds[-1])] for tensor in tensors), bounds]

    def compact(t: Tensors) -> list[Tensor]:
        out = [t["out"], t["other"]] if "out" in t else None
        tensors = fk.compact([t["first"], t["second"]], t["survivors"], t.get("count"), out)
        return [tensor[: int(t["count"]) if "count" in t else len(tensor)] for tensor in tensors]

    first = ("first",)
    return [
        Op("pack", "packed", padded, pack, first),
        Op("unpack", "packed", packed, lambda t: fk.unpack([t["first"], t["second"]], t["cu_seqlens"], 5), first),
        Op("compact_packed", "packed", chosen, compact_packed, first),
        Op("compact_packed into", "packed", into, compact_packed, (), ("out", "other")),
        Op("compact", "compact", rows, compact, first),
        Op("compact into", "compact", rows_into, compact, (), ("out", "other")),
    ]


def _layers() -> list[Op]:
    def added() -> Tensors:
        return {"x": torch.randn(5, 8), "residual": torch.randn(5, 8), "weight": torch.randn(8), "bias": torch.randn(8)}

    def embedded() -> Tensors:
        return {
            "words": torch.randn(9, 8),
            "positions": torch.randn(6, 8),
            "ids": torch.tensor([8, 0, 3, 3]),
            "places": torch.arange(4),
            "weight": torch.randn(8),
            "bias": torch.randn(8),
        }

    def embed(t: Tensors) -> list[Tensor]:
        tables, indices = [t["words"], t["positions"]], [t["ids"], t["places"]]
        return [fk.embed_layer_norm(tables, indices, t["weight"], t["bias"], out=t.get("out"))]

    def attended() -> Tensors:
        rows = {name: torch.randn(9, 2, 8) for name in ("query", "key", "value")}
        return {**rows, "cu_seqlens": _int32(0, 3, 4, 8)}

    def attend(t: Tensors) -> list[Tensor]:
        return [fk.varlen_attention(**t, max_seqlen=4)[:8]]

    def attend_nearby(t: Tensors) -> list[Tensor]:
        rest = {name: tensor for name, tensor in t.items() if name not in ("cosines", "sines")}
        return [fk.varlen_attention(**rest, max_seqlen=4, window=1, rotary=(t["cosines"], t["sines"]))[:8]]

    def layered() -> Tensors:
        shapes = {"project": (24, 8), "output": (8, 8), "expand": (24, 8), "contract": (8, 12), "norm": (8, 1)}
        weights = {f"{name}.weight": torch.randn(shape) / 3 for name, shape in shapes.items()}
        biases = {f"{name}.bias": torch.randn(rows) / 4 for name, (rows, _) in shapes.items()}
        angles = torch.rand(4, 2)
        rotary = {"rotary": torch.stack([angles.cos(), angles.sin()])}
        rows = {"hidden_states": torch.randn(9, 8), "cu_seqlens": _int32(0, 3, 4, 8)}
        return {**rows, **weights, **biases, **rotary, "norm.weight": torch.rand(8) + 0.5}

    def run_layers(t: Tensors) -> list[Tensor]:
        pairs = {name: (t[f"{name}.weight"], t[f"{name}.bias"]) for name in ("output", "expand", "contract", "norm")}
        norm = pairs.pop("norm")
        project = ((t["project.weight"], t["project.bias"]),)
        weights = fk.EncoderLayerWeights(project, attention_norm=norm, feed_forward_norm=norm, **pairs)
        form = fk.EncoderLayerForm(heads=2, activation="silu", gated=True, norm_first=True, window=1)
        layer = fk.pack_encoder_layer(weights, form, rotary=t["rotary"])
        made = fk.encoder_layers(t["hidden_states"], t["cu_seqlens"], [layer, layer])
        return [made[: int(t["cu_seqlens"][-1])]]

    affine = ("weight", "bias")
    return [
        Op("encoder_layers", "encoder_layer", layered, run_layers),
        Op("add_layer_norm", "layer_norm", added, lambda t: [fk.add_layer_norm(**t)], ("x", "residual", *affine)),
        Op(
            "add_layer_norm into",
            "layer_norm",
            lambda: {**added(), "out": torch.zeros(5, 8)},
            lambda t: [fk.add_layer_norm(**t)],
            (),
            ("out",),
        ),
        Op(
            "add_layer_norm into, with the sum",
            "layer_norm",
            lambda: {**added(), "out": torch.zeros(5, 8), "total": torch.zeros(5, 8)},
            lambda t: [fk.add_layer_norm(**t)],
            (),
            ("out", "total"),
        ),
        Op("embed_layer_norm", "layer_norm", embedded, embed, ("words", "positions", *affine)),
        Op(
            "embed_layer_norm into",
            "layer_norm",
            lambda: {**embedded(), "out": torch.zeros(4, 8)},
            embed,
            (),
            ("out",),
        ),
        Op("varlen_attention", "varlen_attention", attended, attend, ("query", "key", "value")),
        Op(
            "varlen_attention of a window",
            "varlen_attention",
            lambda: {**attended(), "cosines": torch.randn(4, 4), "sines": torch.randn(4, 4)},
            attend_nearby,
            ("query", "key", "value", "cosines", "sines"),
            precise=("cosines", "sines"),
        ),
    ]


def _exits() -> list[Op]:
    record = ("record.logits", "record.uncertainty", "record.exit_layer", "record.history")

    def decided() -> Tensors:
        return {"logits": torch.randn(6, 3), "speed": torch.rand(6)}

    def recorded() -> Tensors:
        room = fk.ExitRecord.allocate(8, 3)
        filled = dict(zip(record, (room.logits, room.uncertainty, room.exit_layer, room.history), strict=True))
        return {**decided(), "row_ids": _int32(7, 2, 0, 4, 5, 1), **filled}

    def outcome(result: fk.ExitGateOutput) -> list[Tensor]:
        return [result.uncertainty, result.survivors[: int(result.count)], result.count]

    def gate(t: Tensors) -> list[Tensor]:
        return outcome(fk.exit_gate(t["logits"], t["speed"]))

    def gate_recorded(t: Tensors) -> list[Tensor]:
        kept = fk.ExitRecord(*(t[name] for name in record))
        made = fk.exit_gate(t["logits"], t["speed"], "patience", t["row_ids"], record=kept, layer=1)
        return [*outcome(made), *(t[name] for name in record)]

    def sequences() -> Tensors:
        return {"hidden_states": torch.randn(3, 5, 24), **_head_tensors()}

    def lengths() -> Tensors:
        return {**sequences(), "lengths": _int32(5, 1, 3)}

    def masked() -> Tensors:
        return {**sequences(), "attention_mask": torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])}

    def tokens() -> Tensors:
        return {"hidden_states": torch.randn(9, 24), "cu_seqlens": _int32(0, 3, 4, 8), **_head_tensors()}

    def heads(t: Tensors) -> list[Tensor]:
        options = {name: t[name] for name in ("lengths", "attention_mask", "cu_seqlens") if name in t}
        return [fk.student_head(t["hidden_states"], _head(16, 24, 3, t), **options)]

    def heads_exit(t: Tensors) -> list[Tensor]:
        made = fk.student_head_exit(t["hidden_states"], _head(16, 24, 3, t), t["speed"], lengths=t["lengths"])
        assert made.logits is not None
        return [*outcome(made), made.logits]

    differentiable = ("hidden_states", *_head_tensors())
    return [
        Op("exit_gate", "exit_gate", decided, gate),
        Op(
            "exit_gate one speed",
            "exit_gate",
            lambda: {"logits": torch.randn(6, 3)},
            lambda t: outcome(fk.exit_gate(t["logits"], 0.5)),
        ),
        Op("exit_gate recorded", "exit_gate", recorded, gate_recorded, (), record, ("row_ids",)),
        Op(
            "student_head",
            "student_head",
            sequences,
            heads,
            differentiable,
            varied=("hidden_states", "narrow.weight", "narrow.bias", "key.weight", "classifier.weight"),
        ),
        Op("student_head lengths", "student_head", lengths, heads, differentiable, varied=("hidden_states", "lengths")),
        Op(
            "student_head mask",
            "student_head",
            masked,
            heads,
            differentiable,
            varied=("hidden_states", "attention_mask"),
        ),
        Op(
            "student_head packed", "student_head", tokens, heads, differentiable, varied=("hidden_states", "cu_seqlens")
        ),
        Op(
            "student_head_exit",
            "student_head",
            lambda: {**lengths(), "speed": torch.rand(3)},
            heads_exit,
            varied=("hidden_states", "lengths", "speed"),
        ),
    ]


_NO_SECOND = {
    **dict.fromkeys(
        ("kd_loss", "universal_kd_loss", "distillation_loss", "fused_linear_kd_loss"), r'backend\("reference"\)'
    ),
    # PyTorch's own words of its fused attention
    **dict.fromkeys(("varlen_attention", "student_head"), "attention.*is not implemented"),
}
OPS = [
    replace(op, second_derivative=_NO_SECOND.get(op.backends)) for op in [*_losses(), *_rows(), *_layers(), *_exits()]
]
