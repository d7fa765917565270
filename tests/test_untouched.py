"""Modules that others have put something around are called, in heads and layers: adapters, hooks, offloading..."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import (
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    tokenizer_of,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import fastkd
from fastkd.encoders.untouched import is_plain_linear, is_untouched
from fastkd.kd.options import KDOptions

ROWS = {"text": ["good", "bad", "so so", "good film"] * 4, "label": ["a", "b", "c", "b"] * 4}

Model = fastkd.EarlyExitForSequenceClassification


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as peft wraps it: the weight stays reachable under its name."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, rows: Tensor) -> Tensor:
        return self.base_layer(rows) + self.up(self.down(rows))

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            merged.weight += self.up.weight @ self.down.weight
        return merged


def wrap(model: Model, wrapping: Callable[[nn.Linear], nn.Module], names: tuple[str, ...]) -> None:
    for head in model.heads.values():
        for name in names:
            setattr(head, name, wrapping(getattr(head, name)))


def answers(model: Model, speed: float, engine: str | None = None) -> Any:
    with torch.no_grad():
        return model(**random_batch(), speed=speed, engine=engine)


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first.exit_layer, second.exit_layer)
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["batch", "packed"])
@pytest.mark.parametrize("speed", [0.0, 0.4])
@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_adapters_in_heads_act_before_they_are_merged(head: str, speed: float, engine: str) -> None:
    model = early_exit_model(head=head)
    plain = answers(model, speed, engine)
    names = ("query", "value", "narrow") if head == "fastbert" else ("out_proj",)
    wrap(model, Adapter, names)
    adapted = answers(model, speed, engine)
    assert not torch.allclose(plain.logits, adapted.logits, atol=1e-2)
    wrap(model, lambda adapter: adapter.merged(), names)  # type: ignore[attr-defined]
    assert_same(adapted, answers(model, speed, engine))


def test_adapters_in_heads_learn() -> None:
    model = early_exit_model().requires_grad_(False)
    wrap(model, Adapter, ("query", "narrow"))
    model.train()
    model.all_exit_logits(**random_batch()).square().sum().backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert len(adapters) == 8
    assert all(adapter.up.weight.grad.abs().sum() > 0 for adapter in adapters)


@pytest.mark.parametrize("engine", [None, "batch", "packed"])
@pytest.mark.parametrize("speed", [0.0, 0.4])
def test_an_offloaded_model_answers_the_same(speed: float, engine: str | None) -> None:
    model = early_exit_model()
    expected = answers(model, speed)
    cpu_offload(model, execution_device="cpu")
    assert_same(expected, answers(model, speed, engine))


@pytest.mark.parametrize("engine", [None, "batch", "packed"])
@pytest.mark.parametrize("speed", [0.0, 0.4])
def test_a_quantised_model_answers_about_the_same(speed: float, engine: str | None) -> None:
    model = early_exit_model()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected, got = answers(model, speed), answers(quantised, speed, engine)
    assert (expected.logits.argmax(1) == got.logits.argmax(1)).float().mean() > 0.7
    assert not torch.equal(expected.logits, got.logits)


def quantise_with_pytorch(model: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def quantise_with_torchao(model: nn.Module) -> None:
    quantization: Any = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: pip install torchao"
    )
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


quantised_by = pytest.mark.parametrize("quantise", [quantise_with_pytorch, quantise_with_torchao])
QUANTISED = r"PyTorch or torchao quantised its \S+attention\.self\.query; "


@quantised_by
@pytest.mark.parametrize("part", ["model", "backbone"])
def test_a_quantised_model_is_traced(quantise: Callable[[nn.Module], None], part: str) -> None:
    model = early_exit_model()
    model.confirm_weights()
    before = model.trace(ROWS, tokenizer=tokenizer_of("bert"), max_length=16)
    quantise(model if part == "model" else model.backbone)
    answers(model, 0.0)
    assert model.changed_weights() is not None
    model.confirm_weights()
    assert model.changed_weights() is None
    traces = [model.trace(ROWS, tokenizer=tokenizer_of("bert"), max_length=16) for _ in range(2)]
    assert traces[0].source.model == traces[1].source.model != before.source.model


@quantised_by
@pytest.mark.parametrize("part", ["model", "backbone"])
def test_a_quantised_model_is_neither_saved_nor_trained(
    quantise: Callable[[nn.Module], None], part: str, tmp_path: Path
) -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    quantise(model if part == "model" else model.backbone)
    teacher, quantised_teacher = fastkd.Teacher(early_exit_model(), tokenizer), fastkd.Teacher(model, tokenizer)
    texts, out = ROWS["text"], tmp_path / "out"
    short, train = KDOptions(max_length=16), "train the unquantised model, then quantise it"
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("save the unquantised model", lambda: model.save_pretrained(out)),
        ("take the first layers of the unquantised model", lambda: model.first_layers(2)),
        (train, lambda: fastkd.distill(model, texts, None, out, fastkd.DistillOptions(), tokenizer)),
        (train, lambda: fastkd.finetune(model, ROWS, None, out, fastkd.FinetuneOptions(), tokenizer)),
        (train, lambda: fastkd.tune(model, ROWS, ROWS, out, fastkd.TuneOptions(), tokenizer)),
        (train, lambda: fastkd.KDTrainer(teacher, model, "kd")),
        (
            "make it from the unquantised teacher",
            lambda: fastkd.KDTrainer(quantised_teacher, "layers:2", "kd", short).train(ROWS, None, out),
        ),
    ]
    for remedy, call in refused:
        with pytest.raises(ValueError, match=f"{QUANTISED}.*{remedy}"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantise", [quantise_with_pytorch, quantise_with_torchao, Model.quantize])
def test_a_quantised_model_teaches(quantise: Callable[[Model], Any], tmp_path: Path) -> None:
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    quantise(model)
    options = KDOptions(max_length=16, max_steps=1, bf16=True, progress=False)
    trainer = fastkd.KDTrainer(fastkd.Teacher(model, tokenizer), early_exit_model(), "kd", options)
    trainer.train(ROWS, None, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("place", ["head", "narrow", "out_proj"])
def test_hooks_in_heads_fire(place: str) -> None:
    model, seen = early_exit_model(), []
    expected = answers(model, 0.4)
    for name, head in model.heads.items():
        module = head if place == "head" else getattr(head, place)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert_same(expected, answers(model, 0.4))
    assert {"0", "1"} <= set(seen)


def test_what_untouched_means() -> None:
    linear = nn.Linear(2, 2)
    assert is_plain_linear(linear)
    for change in (
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
        lambda module: setattr(module, "forward", lambda rows: rows),
    ):
        changed = nn.Linear(2, 2)
        change(changed)
        assert not is_untouched(changed)
        assert not is_plain_linear(changed)
    assert not is_plain_linear(nn.Linear(2, 2, bias=False))
    assert not is_plain_linear(nn.Identity())


def test_hooks_of_all_modules_see_every_head_and_layer() -> None:
    model, seen = early_exit_model(), set[nn.Module]()
    expected = answers(model, 0.0)
    counter = register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        assert_same(expected, answers(model, 0.0))
    finally:
        counter.remove()
    assert {model.last_head, model.last_head.narrow, model.bert.embeddings, *model.layers} <= seen
    assert is_untouched(model.last_head)


def replica_of(network: nn.Module) -> Any:
    """What DataParallel calls: a copy whose parameters are plain attributes."""
    modules = list(network.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                twin._modules[name] = copies[child]
                setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, name, parameter.clone())
    return copies[network]


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("speed", [0.0, 0.6])
def test_replicas_of_data_parallel_answer(training: bool, speed: float, head: str, tmp_path: Any) -> None:
    early_exit_model(head=head, head_dropout=0.0, learned_exit=True).save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    replica, batch = replica_of(model), random_batch()
    expected, got = model(**batch, speed=speed), replica(**batch, speed=speed)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    if not training:
        assert torch.equal(got.exit_layer, expected.exit_layer)
    assert got.logits.requires_grad == expected.logits.requires_grad
    logits = replica.all_exit_logits(**batch)
    torch.testing.assert_close(logits, model.all_exit_logits(**batch), rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
