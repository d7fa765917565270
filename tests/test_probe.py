"""LayerProbe shows what the layers compute and changes nothing; pseudo-classifiers are linear layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from every_encoder import random_inputs, tiny_config
from tiny_models import (
    CONFIGS,
    HIDDEN,
    LAYERS,
    MAIN_FAMILIES,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
)
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastkd.kd.probe import POOLS, LayerProbe, PseudoClassifiers, encoder_layers

FAMILIES = sorted(CONFIGS)


def classifier(family: str, num_labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(4)
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = num_labels
    return AutoModelForSequenceClassification.from_config(config).eval()


def without_padding(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    length = int(batch["attention_mask"][row].sum())
    return {name: values[row : row + 1, :length] for name, values in batch.items()}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_shows_the_hidden_states_of_transformers(family: str) -> None:
    model, batch = classifier(family), random_batch(family)
    expected = model(**batch, output_hidden_states=True)
    output = LayerProbe(model, "cls", keep_sequence=True)(**batch)
    torch.testing.assert_close(output.logits, expected.logits)
    cls = torch.stack([hidden[:, 0] for hidden in expected.hidden_states[1:]])
    assert output.hidden_states.shape == (LAYERS, len(batch["input_ids"]), HIDDEN)
    # where norms come first, the last ones of transformers are those behind the final norm
    if family in ("modernbert", "roberta-prelayernorm", "megatron-bert"):
        torch.testing.assert_close(output.hidden_states[:-1], cls[:-1])
        return
    torch.testing.assert_close(output.hidden_states, cls)
    torch.testing.assert_close(output.sequence_output, expected.hidden_states[-1])


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("pool", sorted(POOLS))
@torch.no_grad()
def test_padding_changes_nothing(family: str, pool: str) -> None:
    model, batch = classifier(family), random_batch(family)
    probe = LayerProbe(model, pool)
    together = probe(**batch)
    for row in range(4):
        alone = probe(**without_padding(batch, row))
        torch.testing.assert_close(alone.hidden_states[:, 0], together.hidden_states[:, row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-4, atol=1e-4)


def test_pools() -> None:
    hidden = torch.tensor([[[1.0, -4], [3, -2], [9, 9]], [[5.0, 1], [7, 3], [2, 2]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = {
        "cls": [[1.0, -4], [5, 1]],
        "mean": [[2.0, -3], [14 / 3, 2]],
        "max": [[3.0, -2], [7, 3]],
        "last": [[3.0, -2], [2, 2]],
    }
    assert set(expected) == set(POOLS)
    for name, values in expected.items():
        torch.testing.assert_close(POOLS[name](hidden, mask), torch.tensor(values))
        unmasked = POOLS[name](hidden, None)
        torch.testing.assert_close(unmasked, POOLS[name](hidden, torch.ones_like(mask)))
    # left padding, for the pools that do not name a position
    for name, value in (("mean", [6.0, 3.5]), ("max", [9.0, 9]), ("last", [9.0, 9])):
        torch.testing.assert_close(POOLS[name](hidden, torch.tensor([[0, 1, 1], [1, 1, 1]]))[0], torch.tensor(value))


@torch.no_grad()
def test_pool_can_be_a_function() -> None:
    model, batch = classifier("bert"), random_batch("bert")
    seen = []

    def second_token(hidden: Tensor, mask: Tensor | None) -> Tensor:
        seen.append(mask)
        return hidden[:, 1]

    output = LayerProbe(model, second_token)(**batch)
    expected = model(**batch, output_hidden_states=True).hidden_states[-1][:, 1]
    torch.testing.assert_close(output.hidden_states[-1], expected)
    assert seen[0] is batch["attention_mask"]


@torch.no_grad()
def test_the_configuration_names_the_pool() -> None:
    model, batch = classifier("bert"), random_batch("bert")
    torch.testing.assert_close(
        LayerProbe(model)(**batch).hidden_states, LayerProbe(model, "cls")(**batch).hidden_states
    )
    model.config.pool = "max"
    torch.testing.assert_close(
        LayerProbe(model)(**batch).hidden_states, LayerProbe(model, "max")(**batch).hidden_states
    )


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_gradient_flows_through_every_layer(family: str) -> None:
    model, batch = classifier(family), random_batch(family)
    output = LayerProbe(model)(**batch)
    (output.hidden_states[0] * torch.randn(HIDDEN)).sum().backward()
    first, second = encoder_layers(model)[:2]
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in first.parameters())
    assert all(parameter.grad is None or parameter.grad.abs().max() == 0 for parameter in second.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_is_that_of_transformers(checkpointing: bool) -> None:
    gradients, weights = [], torch.randn(HIDDEN).double()
    for use_probe in (True, False):
        model, batch = classifier("bert").double(), random_batch("bert")
        if use_probe and checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if use_probe:
            hidden = LayerProbe(model)(**batch).hidden_states
        else:
            states = model(**batch, output_hidden_states=True).hidden_states
            hidden = torch.stack([state[:, 0] for state in states[1:]])
        (hidden * weights).sum().backward()
        named = model.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named if parameter.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_layers_that_run_without_gradients_are_an_error() -> None:
    model, batch = classifier("bert"), random_batch("bert")
    model.bert.encoder.forward = torch.no_grad()(model.bert.encoder.forward)
    probe = LayerProbe(model)
    with pytest.raises(RuntimeError, match="switch to use_reentrant=False, or call the probe"):
        probe(**batch)
    with torch.no_grad():
        assert probe(**batch).hidden_states.isfinite().all()


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_removing_leaves_the_model_as_it_was(family: str) -> None:
    model, batch = classifier(family), random_batch(family)

    def snapshot() -> tuple[object, ...]:
        hooks = [len(module._forward_hooks) for module in model.modules()]
        return hooks, [name for name, _ in model.named_modules()], sorted(model.state_dict()), model.config.to_dict()

    before, weights = snapshot(), {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**batch).logits
    probe = LayerProbe(model, keep_sequence=True)
    probe(**batch)
    assert snapshot() != before
    probe.remove()
    probe.remove()
    assert snapshot() == before
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="this LayerProbe was removed"):
        probe(**batch)


def test_a_probed_model_is_saved_like_any_other(tmp_path: Path) -> None:
    model, batch = classifier("bert"), random_batch("bert")
    probe = LayerProbe(model)
    expected = probe(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)


@torch.no_grad()
def test_two_probes_do_not_disturb_each_other_nor_calls_beside_them() -> None:
    model, batch, other = classifier("bert"), random_batch("bert"), random_batch("bert", seed=6)
    cls, mean = LayerProbe(model, "cls"), LayerProbe(model, "mean")
    expected = cls(**batch).hidden_states
    model(**other)
    mean(**other)
    torch.testing.assert_close(cls(**batch).hidden_states, expected)
    assert not cls._pooled, "nothing is kept alive after a call"
    with pytest.raises(IndexError):
        cls(**{**batch, "input_ids": batch["input_ids"] + 10_000})
    torch.testing.assert_close(cls(**batch).hidden_states, expected)


@torch.no_grad()
def test_early_exit_models() -> None:
    model, batch = early_exit_model("bert"), random_batch("bert")
    output = LayerProbe(model)(**batch)
    assert output.hidden_states.shape[0] == LAYERS
    with pytest.raises(RuntimeError, match=r"layers \[.*3\] \(0-based\) did not run"):
        LayerProbe(model)(**batch, speed=1.0)


def test_under_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:

        class Student(nn.Module):
            """What a caller wraps: the model with the classifiers that are trained beside it."""

            def __init__(self) -> None:
                super().__init__()
                self.model = classifier("bert")
                self.heads = PseudoClassifiers(LAYERS - 1, HIDDEN, 3)
                self.probe = LayerProbe(self.model)

            def forward(self, **batch: Tensor) -> Tensor:
                output = self.probe(**batch)
                return self.heads(output.hidden_states, output.logits)

        torch.manual_seed(3)
        student, batch = Student(), random_batch("bert")
        expected = student(**batch)
        expected.square().sum().backward()
        plain = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
        student.zero_grad()
        wrapped = nn.parallel.DistributedDataParallel(student)
        for _ in range(2):
            student.zero_grad()
            logits = wrapped(**batch)
            torch.testing.assert_close(logits, expected)
            logits.square().sum().backward()
            for name, parameter in student.named_parameters():
                torch.testing.assert_close(parameter.grad, plain[name])

        around = nn.parallel.DistributedDataParallel(classifier("bert"))
        output = LayerProbe(around)(**batch)
        torch.testing.assert_close(output.logits, LayerProbe(classifier("bert"))(**batch).logits)
        assert output.hidden_states.requires_grad
    finally:
        torch.distributed.destroy_process_group()


def test_errors() -> None:
    with pytest.raises(ValueError, match="pool: got 'avg', expected one of cls, mean, max, last, or a function"):
        LayerProbe(classifier("bert"), "avg")
    xlm = AutoModelForSequenceClassification.from_config(tiny_config("xlm"))
    with pytest.raises(ValueError, match=r"XLMModel has several lists of 3 modules \(attentions, .*name its list"):
        LayerProbe(xlm)
    with pytest.raises(ValueError, match=r"layers: got 'blocks', but XLMModel has no list .* its lists are attentions"):
        LayerProbe(xlm, layers="blocks")


@pytest.mark.parametrize("family", ["albert", "deberta-v2", "llama", "modernbert", "mpnet"])
@torch.no_grad()
def test_any_classifier_of_transformers_is_looked_into(family: str) -> None:
    config = tiny_config(family)
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = random_inputs(99)
    expected = model(**batch, output_hidden_states=True)
    pool = POOLS["last" if family == "llama" else "cls"]
    output = LayerProbe(model, keep_sequence=True)(**batch)
    torch.testing.assert_close(output.logits, expected.logits)
    # the last one may have seen the final norm
    pooled = [pool(hidden, batch["attention_mask"]) for hidden in expected.hidden_states[1:-1]]
    torch.testing.assert_close(output.hidden_states[:-1], torch.stack(pooled))
    assert len(output.hidden_states) == config.num_hidden_layers


@torch.no_grad()
def test_a_named_list_of_layers_is_looked_into() -> None:
    config = tiny_config("bart")
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(ValueError, match="BartModel has several lists of 3 modules"):
        LayerProbe(model)
    batch = random_inputs(99)
    batch["input_ids"][:, 0] = 3  # bart reads the last end of sentence
    expected = model(**batch, output_hidden_states=True)
    output = LayerProbe(model, "mean", layers="encoder.layers")(**batch)
    mean = [POOLS["mean"](hidden, batch["attention_mask"]) for hidden in expected.encoder_hidden_states[1:]]
    torch.testing.assert_close(output.hidden_states, torch.stack(mean))


# Pseudo-classifiers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_pseudo_classifiers_are_linear_layers(bias: bool, tied: bool) -> None:
    torch.manual_seed(1)
    heads = PseudoClassifiers(3, 8, 5, bias=bias, tied=tied)
    if bias:
        nn.init.normal_(heads.bias)
    hidden = torch.randn(3, 4, 8, requires_grad=True)
    logits = heads(hidden)
    for layer in range(3):
        index = 0 if tied else layer
        expected = nn.functional.linear(hidden[layer], heads.weight[index], heads.bias[index, 0] if bias else None)
        torch.testing.assert_close(logits[layer], expected)
    assert sum(parameter.numel() for parameter in heads.parameters()) == (1 if tied else 3) * (8 * 5 + 5 * bias)
    logits[1].sum().backward()
    assert hidden.grad[1].abs().max() > 0
    assert hidden.grad[[0, 2]].abs().max() == 0


def test_pseudo_classifiers_reuse_the_models_own() -> None:
    heads, hidden, own = PseudoClassifiers(3, 8, 5), torch.randn(4, 2, 8), torch.randn(2, 5, requires_grad=True)
    logits = heads(hidden, own)
    torch.testing.assert_close(logits[:3], heads(hidden[:3]))
    torch.testing.assert_close(logits[3], own)
    logits[3].sum().backward()
    assert own.grad.eq(1).all()
    with pytest.raises(
        ValueError, match="hidden_states: got 3 layers, expected 4 for 3 pseudo-classifiers and the logits"
    ):
        heads(hidden[:3], own)
    with pytest.raises(ValueError, match="hidden_states: got 4 layers, expected 3 for 3 pseudo-classifiers without"):
        heads(hidden)
    with pytest.raises(ValueError, match="num_layers: got 0, expected at least 1"):
        PseudoClassifiers(0, 8, 5)


def test_pseudo_classifiers_start_like_a_bert_classifier() -> None:
    torch.manual_seed(0)
    heads = PseudoClassifiers(12, 768, 3)
    assert heads.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert heads.bias.abs().max() == 0
