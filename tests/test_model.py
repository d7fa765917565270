"""The early-exit model: its answers do not depend on batching, and transformers treats it like any other model."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    CONFIGS,
    CRITERIA,
    LAYERS,
    MAIN_FAMILIES,
    clear_speed,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    row_of,
    save_plain_checkpoint,
    tokenizer_of,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import fastkd
import fastkd_kernels as fk
from fastkd.encoders.heads import FastBertHead, LinearHead
from fastkd.encoders.layout import TokenLayout

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def uncertainty_of(model: Any, batch: dict[str, Tensor], criterion: str, top_n: int | None) -> Tensor:
    """[B, K], what every head thinks of every row."""
    with torch.no_grad():
        logits = model.all_exit_logits(**batch)
    record = fk.ExitRecord.allocate(*logits.shape[::2], logits.device)
    gates = [
        fk.exit_gate(head, 0.0, criterion, top_n=top_n, record=record, layer=layer)
        for layer, head in zip(model.exit_layers, logits.unbind(1), strict=True)
    ]
    return torch.stack([gate.uncertainty for gate in gates], dim=1)


def mixed_speed(model: Any, batch: dict[str, Tensor], criterion: str = "entropy", top_n: int | None = None) -> float:
    """A speed at which some rows leave early and some do not, with a margin to every decision."""
    if criterion == "patience":
        return 0.6  # rows that repeat a label leave: 1/2 then, 1 before
    uncertainty = uncertainty_of(model, batch, criterion, top_n)
    return clear_speed(uncertainty[:, :-1], share=0.35)


def infer(model: Any, batch: dict[str, Tensor], speed: float, **options: Any) -> fastkd.EarlyExitOutput:
    with torch.no_grad():
        return model(**batch, speed=speed, **options)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every backend in turn, as the device on which it runs."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_triton_interpreter_decides_alike runs the kernels")
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    with fk.backend(request.param):
        try:
            fk.exit_gate(torch.zeros(1, 2, device=device), 0.5)
        except fk.BackendUnavailableError as error:
            pytest.skip(str(error))
        yield device


def batch_on(device: torch.device, family: str = "bert") -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in random_batch(family).items()}


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("num_labels", [2, 3, 40])
def test_batched_equals_one_by_one(
    device: torch.device, head: str, num_labels: int, criterion: str, top_n: int | None
) -> None:
    model = early_exit_model(num_labels=num_labels, head=head).to(device)
    batch = batch_on(device)
    speed = mixed_speed(model, batch, criterion, top_n)
    options = {"criterion": criterion, "top_n": top_n}
    together = infer(model, batch, speed, **options)
    alone = [infer(model, row_of(batch, row), speed, **options) for row in range(13)]
    assert len(together.exit_layer.unique()) > 1, "the speed should split the batch"
    assert torch.equal(together.exit_layer, torch.cat([output.exit_layer for output in alone]))
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in alone]), **TOLERANCE)
    torch.testing.assert_close(together.uncertainty, torch.cat([output.uncertainty for output in alone]), **TOLERANCE)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("mask", ["none", "ones"])
def test_unpadded_batched_equals_one_by_one(device: torch.device, head: str, mask: str) -> None:
    model = early_exit_model(head=head).to(device)
    batch = {**batch_on(device), "input_ids": torch.randint(5, 320, (13, 11)).to(device)}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    speed = mixed_speed(model, batch)
    alone = [infer(model, row_of(batch, row), speed) for row in range(13)]
    if mask == "none":
        del batch["attention_mask"]
    together = infer(model, batch, speed)
    assert len(together.exit_layer.unique()) > 2, "rows should leave at more than one layer"
    assert torch.equal(together.exit_layer, torch.cat([output.exit_layer for output in alone]))
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in alone]), **TOLERANCE)


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_padding_order_and_batch_mates_change_nothing(family: str, criterion: str, top_n: int | None) -> None:
    model = early_exit_model(family)
    batch = random_batch(family)
    speed = mixed_speed(model, batch, criterion, top_n)
    options = {"criterion": criterion, "top_n": top_n}
    expected = infer(model, batch, speed, **options)
    order = torch.randperm(13)
    pad_token = CONFIGS[family].pad_token_id
    variants = {
        "order": ({name: value[order] for name, value in batch.items()}, order),
        "mates": ({name: value[4:9] for name, value in batch.items()}, torch.arange(4, 9)),
        "padding": (
            {name: F.pad(value, (0, 6), value=pad_token * (name == "input_ids")) for name, value in batch.items()},
            torch.arange(13),
        ),
    }
    for name, (variant, rows) in variants.items():
        output = infer(model, variant, speed, **options)
        assert torch.equal(output.exit_layer, expected.exit_layer[rows]), name
        torch.testing.assert_close(output.logits, expected.logits[rows], **TOLERANCE)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_speed_0_is_the_full_model(device: torch.device, family: str, head: str) -> None:
    model = early_exit_model(family, head=head).to(device)
    batch = batch_on(device, family)
    calls = []
    for name, module in model.heads.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        hidden_states = model.backbone(**batch).last_hidden_state
        expected = model.last_head(hidden_states, TokenLayout(batch["attention_mask"].bool()))
        calls.clear()
        output = model(**batch, engine="batch")
    assert calls == [str(LAYERS - 1)], "only the last head runs"
    assert torch.equal(output.logits, expected)
    # on a CPU without the padding, which rounds differently
    torch.testing.assert_close(infer(model, batch, 0.0).logits, expected, **TOLERANCE)
    assert output.exit_layer.tolist() == [LAYERS] * 13
    torch.testing.assert_close(output.uncertainty, fk.exit_gate(expected, 0.0).uncertainty)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_rows_that_never_leave_get_the_last_layer(device: torch.device, head: str) -> None:
    model = early_exit_model(head=head).to(device)
    batch = batch_on(device)
    full = infer(model, batch, 0.0)
    speed = mixed_speed(model, batch)
    output = infer(model, batch, speed)
    stayed = output.exit_layer == LAYERS
    assert 0 < int(stayed.sum()) < 13
    torch.testing.assert_close(output.logits[stayed], full.logits[stayed], **TOLERANCE)
    no_exit = infer(model, batch, 1e-9)
    assert no_exit.exit_layer.tolist() == [LAYERS] * 13
    torch.testing.assert_close(no_exit.logits, full.logits, **TOLERANCE)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_speed_1_answers_every_row_at_the_first_head(device: torch.device, head: str) -> None:
    model = early_exit_model(head=head, exit_layers=[2, 3]).to(device)
    batch = batch_on(device)
    ran = []
    for number, layer in enumerate(model.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    output = infer(model, batch, 1.0)
    assert ran == [1, 2], "no layer runs for an empty batch"
    assert output.exit_layer.tolist() == [2] * 13
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model.all_exit_logits(**batch)[:, 0], **TOLERANCE)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("exit_layers", [None, [1], [2, 4], [3], [4], []])
def test_exit_layers_decide_where_rows_may_leave(head: str, exit_layers: list[int] | None) -> None:
    model = early_exit_model(head=head, exit_layers=exit_layers)
    expected = sorted({*(range(1, LAYERS + 1) if exit_layers is None else exit_layers), LAYERS})
    assert model.exit_layers == expected
    assert sorted(model.heads) == [str(layer - 1) for layer in expected]
    assert len(model.early_heads) == len(expected) - 1
    batch = random_batch()
    with torch.no_grad():
        logits = model.all_exit_logits(**batch)
    assert logits.shape == (13, len(expected), 3)
    speed = clear_speed(uncertainty_of(model, batch, "entropy", None), share=0.4)
    output = infer(model, batch, speed)
    assert set(output.exit_layer.tolist()) <= set(expected)
    chosen = torch.tensor([expected.index(layer) for layer in output.exit_layer.tolist()])
    torch.testing.assert_close(output.logits, logits[torch.arange(13), chosen], **TOLERANCE)


def test_every_layer_sees_only_the_rows_that_stay() -> None:
    model = early_exit_model()
    batch = random_batch()
    speed = mixed_speed(model, batch)
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    output = infer(model, batch, speed)
    staying = [int((output.exit_layer > layer).sum()) for layer in range(LAYERS)]
    assert [shape[0] for shape in seen] == [count for count in staying if count]
    longest = [int(batch["attention_mask"][output.exit_layer > layer].sum(1).max()) for layer in range(len(seen))]
    for previous, shape, width in zip(seen, seen[1:], longest[1:], strict=False):
        # columns that became all padding are dropped whenever rows are
        assert shape[1] == (width if shape[0] < previous[0] else previous[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_follow_their_rows(attention: str) -> None:
    model = early_exit_model(attn_implementation=attention)
    assert model.backbone.config._attn_implementation == attention
    batch = random_batch()
    speed = mixed_speed(model, batch)
    together = infer(model, batch, speed)
    alone = torch.cat([infer(model, row_of(batch, row), speed).logits for row in range(13)])
    torch.testing.assert_close(together.logits, alone, **TOLERANCE)


def test_scattered_padding_is_masked_too() -> None:
    model = early_exit_model()
    batch = random_batch()
    batch["attention_mask"][:, 3] = 0
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 3] = 7
    speed = mixed_speed(model, batch)
    torch.testing.assert_close(infer(model, batch, speed).logits, infer(model, other, speed).logits, **TOLERANCE)


def test_triton_interpreter_decides_alike() -> None:
    model = early_exit_model(exit_layers=[1, 2])
    batch = random_batch()
    speed = clear_speed(uncertainty_of(model, batch, "entropy", None), share=0.4)
    # a batch of one never has to be compacted, which the interpreter cannot do: that kernel is CUDA C++
    rows = [row_of(batch, row) for row in (1, 2, 6)]
    expected = [infer(model, row, speed) for row in rows]
    with fk.backend("cuda"):
        try:
            got = [infer(model, row, speed) for row in rows]
        except fk.BackendUnavailableError as error:
            pytest.skip(str(error))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.exit_layer, other.exit_layer)
        torch.testing.assert_close(one.logits, other.logits, **TOLERANCE)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_nan_logits_stay_and_are_reported(head: str) -> None:
    model = early_exit_model(head=head)
    batch = random_batch()
    speed = mixed_speed(model, batch)
    with torch.no_grad():
        model.heads["1"].out_proj.bias.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match=r"NaN logits.*check the checkpoint"):
        output = infer(model, batch, speed)
    assert 2 not in output.exit_layer.tolist()
    assert output.logits.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer(early_exit_model(head=head), batch, 0.5)


# Heads


@pytest.mark.parametrize("masked", [True, False])
def test_student_head_is_the_unfolded_head(masked: bool) -> None:
    model = early_exit_model().double()
    head = model.last_head
    assert isinstance(head, FastBertHead)
    hidden_states = torch.randn(5, 9, 32, dtype=torch.float64)
    layout = TokenLayout((torch.arange(9) < torch.tensor([9, 1, 4, 7, 2])[:, None]) if masked else None)
    trained_with = head(hidden_states, layout)
    assert trained_with.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(head(hidden_states, layout), trained_with.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            head.train()(hidden_states, layout).mean(), trained_with.detach().mean(), rtol=10, atol=10
        )


def test_student_head_drops_out_in_training_only() -> None:
    head = early_exit_model(head_dropout=0.5).last_head
    hidden_states = torch.randn(4, 8, 32)
    assert torch.equal(head(hidden_states), head(hidden_states))
    head.train()
    assert not torch.equal(head(hidden_states), head(hidden_states))


def test_all_exit_logits_train_every_head() -> None:
    for head in ("fastbert", "linear"):
        model = early_exit_model(head=head)
        model.all_exit_logits(**random_batch()).square().sum().backward()
        for name, parameter in model.heads.named_parameters():
            assert parameter.grad is not None, name
            # the bias of the keys shifts all scores of a query alike
            assert parameter.grad.abs().sum() > 0 or name.endswith("key.bias"), name


def test_head_parameters_have_their_public_names() -> None:
    names = {name for name, _ in early_exit_model().named_parameters() if name.startswith("heads.")}
    layers = ("narrow", "query", "key", "value", "output", "dense", "out_proj")
    assert names == {
        f"heads.{i}.{layer}.{part}" for i in range(LAYERS) for layer in layers for part in ("weight", "bias")
    }
    assert isinstance(early_exit_model(head="linear").last_head, LinearHead)


# A transformers model like any other


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_plain_checkpoint_to_saved_model_and_back(tmp_path: Path, family: str, head: str) -> None:
    plain = save_plain_checkpoint(tmp_path / "plain", family)
    names = {0: "sport", 1: "world", 2: "science", 3: "business"}
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(
        plain, num_labels=4, head=head, id2label=names, exit_layers=[1, 3], exits_trained=True
    )
    assert not model.training
    assert model.exit_layers == [1, 3, 4]
    assert model.config.id2label == names
    assert model.config.label2id == {name: index for index, name in names.items()}
    batch = random_batch(family)
    expected = infer(model, batch, 0.97)
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()
    for auto in (fastkd.EarlyExitForSequenceClassification, AutoModelForSequenceClassification):
        again = auto.from_pretrained(tmp_path / "saved")
        assert isinstance(again, fastkd.EarlyExitForSequenceClassification)
        assert again.config.id2label == names
        assert again.exit_layers == [1, 3, 4]
        output = infer(again, batch, 0.97)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.exit_layer, expected.exit_layer)
        assert torch.equal(output.uncertainty, expected.uncertainty)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "saved"), fastkd.EarlyExitConfig)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_hidden_states_are_those_of_the_encoder(family: str) -> None:
    model, batch = early_exit_model(family), random_batch(family)
    with torch.no_grad():
        expected = model.backbone(**batch, output_hidden_states=True).hidden_states
        output = model(**batch, output_hidden_states=True)
        plain = model(**batch)
    assert plain.hidden_states is None
    assert len(output.hidden_states) == LAYERS + 1
    assert all(map(torch.equal, output.hidden_states, expected))
    torch.testing.assert_close(output.logits, plain.logits)
    assert torch.equal(output.exit_layer, plain.exit_layer)
    as_tuple = model(**batch, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple[1], tuple)
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == LAYERS + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions: .*model.backbone"),
        ({"output_hidden_states": True, "speed": 0.5}, "output_hidden_states: .*use speed=0"),
        ({"output_hidden_states": True, "engine": "packed"}, "only engine 'batch' keeps them"),
    ],
)
def test_what_the_model_does_not_keep_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        early_exit_model()(**random_batch(), **options)


def test_head_keeps_its_numbers_across_dtypes(tmp_path: Path) -> None:
    model = early_exit_model()
    model.save_pretrained(tmp_path)
    half = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch = random_batch()
    for speed in (0.0, 0.5):
        output = infer(half, batch, speed)
        assert output.logits.dtype == output.uncertainty.dtype == torch.float32
        assert output.logits.isfinite().all()
    torch.testing.assert_close(
        infer(half, batch, 0.0).logits.softmax(-1), infer(model, batch, 0.0).logits.softmax(-1), rtol=0, atol=0.2
    )
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(infer(again, batch, 0.5).logits, infer(half, batch, 0.5).logits)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_autocast(head: str) -> None:
    model = early_exit_model(head=head)
    batch = random_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for speed in (0.0, 0.5):
            assert infer(model, batch, speed).logits.dtype == torch.float32
        model.train()
        model(**batch, labels=torch.zeros(13, dtype=torch.long)).loss.backward()


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_pipeline(tmp_path: Path, family: str) -> None:
    plain = save_plain_checkpoint(tmp_path / "plain", family)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = early_exit_model(family, num_labels=2, speed=0.9, id2label={0: "bad", 1: "good"})
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    classify = pipeline("text-classification", model=str(tmp_path / "saved"))
    assert isinstance(classify.model, fastkd.EarlyExitForSequenceClassification)
    texts: list[Any] = ["a good film", "the plot was dull and the actor was not very good", "boring", "great fun"]
    texts += [{"text": "who was cold", "text_pair": "the actor was cold"}, {"text": "what", "text_pair": "a film"}]
    one_by_one = [classify(text) if isinstance(text, dict) else classify(text)[0] for text in texts]
    batched = classify(texts, batch_size=4)
    for text, single, many in zip(texts, one_by_one, batched, strict=True):
        inputs = (
            tokenizer(**text, return_tensors="pt") if isinstance(text, dict) else tokenizer(text, return_tensors="pt")
        )
        probabilities = infer(model, dict(inputs), 0.9).logits.softmax(-1)[0]
        best = int(probabilities.argmax())
        for answer in (single, many):
            assert answer["label"] == ["bad", "good"][best]
            assert answer["score"] == pytest.approx(probabilities[best].item(), abs=1e-4)


@pytest.mark.parametrize("num_labels", [2, 150])
def test_class_counts(tmp_path: Path, num_labels: int) -> None:
    model = early_exit_model(num_labels=num_labels)
    batch = random_batch()
    output = infer(model, batch, 0.8)
    assert output.logits.shape == (13, num_labels)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == num_labels
    assert torch.equal(infer(again, batch, 0.8).logits, output.logits)


def test_loss_is_that_of_the_answers() -> None:
    model = early_exit_model()
    batch, labels = random_batch(), torch.arange(13) % 3
    for speed in (0.0, 0.6):
        output = infer(model, batch, speed, labels=labels)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    regression = early_exit_model(num_labels=1)
    targets = torch.linspace(0, 5, 13)
    output = infer(regression, batch, 0.0, labels=targets)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], targets))
    assert output.uncertainty is None


def test_training_runs_the_full_model_whatever_the_speed() -> None:
    model = early_exit_model(speed=0.9, head_dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = random_batch()
    full = infer(model, batch, 0.0).logits
    model.train()
    output = model(**batch)
    torch.testing.assert_close(output.logits.detach(), full, **TOLERANCE)
    assert output.logits.requires_grad
    model.eval()
    assert not torch.equal(infer(model, batch, 0.9).exit_layer, torch.full((13,), LAYERS))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = early_exit_model(head_dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    batch, labels = random_batch(), torch.arange(13) % 3
    for one in (model, checkpointed):
        one.train()(**batch, labels=labels).loss.backward()
    for (name, one), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_plain_tuple_output() -> None:
    model = early_exit_model()
    batch = random_batch()
    loss, logits, exit_layer, uncertainty = infer(
        model, batch, 0.5, return_dict=False, labels=torch.zeros(13, dtype=torch.long)
    )
    assert loss.dim() == 0
    assert logits.shape == (13, 3)
    assert exit_layer.dtype == torch.int32
    assert uncertainty.shape == (13,)


def test_config_speed_and_criterion_are_the_defaults() -> None:
    model = early_exit_model()
    batch = random_batch()
    expected = infer(model, batch, 0.7, criterion="margin")
    model.config.speed, model.config.criterion = 0.7, "margin"
    with torch.no_grad():
        assert torch.equal(model(**batch).exit_layer, expected.exit_layer)


@pytest.mark.parametrize("dtype", [10**30, "float99", "int32", True, [], {}, 1.5])
def test_a_dtype_that_is_none_is_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"dtype: got dtype=.*, expected a dtype of floating-point numbers"):
        fastkd.EarlyExitConfig(CONFIGS["bert"], dtype=dtype)
    with pytest.raises(ValueError, match=r"backbone: got dtype=.*, expected a dtype of floating-point numbers"):
        fastkd.EarlyExitConfig({"model_type": "bert", "dtype": dtype})


def test_from_config_and_resized_vocabulary() -> None:
    model = AutoModelForSequenceClassification.from_config(early_exit_model().config)
    model.resize_token_embeddings(330)
    assert model.get_input_embeddings().num_embeddings == 330
    assert model.config.backbone.vocab_size == 330


# Bad input


@pytest.mark.parametrize("speed", [-0.1, 1.1, float("nan"), "0.5", None, True, torch.tensor([0.5])])
def test_bad_speed(speed: Any) -> None:
    model = early_exit_model()
    if speed is None:
        model.config.speed = 2.0
    with pytest.raises(ValueError, match="speed: got"):
        model(**random_batch(), speed=speed)


@pytest.mark.parametrize("speed", [0.0, 0.5])
def test_bad_label_shape(speed: float) -> None:
    model = early_exit_model()
    model.layers[0].register_forward_hook(lambda *_: pytest.fail("a layer ran"))
    with pytest.raises(ValueError, match=r"labels: got shape \(4,\), expected \[13\]"):
        infer(model, random_batch(), speed, labels=torch.zeros(4, dtype=torch.long))


def test_untrained_exits_refuse_a_speed() -> None:
    model = early_exit_model(exits_trained=False)
    infer(model, random_batch(), 0.0)
    with pytest.raises(ValueError, match=r"speed: .*never trained.*distil"):
        infer(model, random_batch(), 0.5)
    with pytest.raises(ValueError, match=r"criterion: 'entropy' needs class probabilities.*regression"):
        infer(early_exit_model(num_labels=1, criterion="entropy"), random_batch(), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "confidence"}, "criterion: got 'confidence'"),
        ({"criterion": "top_n"}, "top_n: got None"),
        ({"criterion": "top_n", "top_n": 4}, "top_n: got 4"),
        ({"input_ids": None}, "input_ids: pass exactly one"),
        ({"input_ids": torch.ones(11, dtype=torch.long)}, r"input_ids: got shape \(11,\) of torch.int64, expected"),
        ({"input_ids": torch.ones(13, 11)}, r"input_ids: got shape \(13, 11\) of torch.float32"),
        (
            {"input_ids": torch.ones(1, 67, dtype=torch.long)},
            "input_ids: got 67 tokens per row, .* at most 66; truncate",
        ),
        ({"inputs_embeds": torch.zeros(13, 11, 32)}, "input_ids: pass exactly one"),
        ({"attention_mask": torch.ones(13, 10)}, r"attention_mask: got shape \(13, 10\), expected \(13, 11\)"),
        ({"attention_mask": torch.ones(13, 1, 11, 11)}, "attention_mask: got shape"),
        ({"attention_mask": torch.arange(11).expand(13, 11) > 2}, "attention_mask: .*pad on the right"),
        ({"attention_mask": torch.zeros(13, 11)}, "attention_mask: .*empty rows"),
    ],
)
def test_bad_arguments_raise_before_any_work(change: dict[str, Any], message: str) -> None:
    model = early_exit_model()
    model.layers[0].register_forward_hook(lambda *_: pytest.fail("a layer ran"))
    with pytest.raises(ValueError, match=message):
        infer(model, {**random_batch(), **change}, change.pop("speed", 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "tree"}, "head: got 'tree', expected one of fastbert, linear"),
        ({"exit_layers": [0]}, "exit_layers: got 0, expected whole numbers from 1 to 4"),
        ({"exit_layers": [5]}, "exit_layers: got 5"),
        ({"exit_layers": [1.5]}, "exit_layers: got 1.5"),
        ({"head_width": 15}, "head_width: got 15, expected a multiple of head_attention_heads=2"),
        ({"speed": 1.5}, "speed: got 1.5"),
        ({"criterion": "vibes"}, "criterion: got 'vibes'"),
        ({"problem_type": "multi_label_classification"}, "problem_type: got 'multi_label_classification'"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels: got 3, but id2label names 2 classes"),
        ({"id2label": {1: "a", 2: "b"}}, r"id2label: got the class numbers \[1, 2\]"),
        ({"id2label": {"one": "a", "two": "b"}}, r"id2label: got the class numbers \['one', 'two'\]"),
        ({"id2label": {0: "a", 1: "a"}}, r"id2label: got the labels \['a', 'a'\], expected a different one"),
        ({"id2label": {0: "a", 1: "b"}, "label2id": {"b": 0, "a": 1}}, r"label2id: got .* but id2label says"),
        ({"label2id": {"a": 1, "b": 2}}, r"label2id: got the class numbers \[1, 2\]"),
    ],
)
def test_bad_options_of_a_new_model(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    plain = save_plain_checkpoint(tmp_path, "bert")
    with pytest.raises(ValueError, match=message):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(plain, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_labels": 5},
            "num_labels: got 5, but the model in .* was trained with 2 classes; leave",
        ),
        ({"id2label": {0: "x", 1: "y"}}, r"id2label: got \['x', 'y'\], but .* labels \['bad', 'good'\]"),
        ({"id2label": {0: "bad", 1: "good", 2: "so-so"}}, "id2label: got .*leave the argument out"),
        ({"head": "linear"}, "head: got 'linear', but the model in .* has fastbert heads"),
        ({"exit_layers": [1]}, r"exit_layers: got \[1\], but the model in .* has heads after \[2, 4\]"),
    ],
)
def test_saved_model_keeps_its_heads(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    early_exit_model(num_labels=2, id2label={0: "bad", 1: "good"}, exit_layers=[2]).save_pretrained(tmp_path)
    for same in ({"num_labels": 2}, {"id2label": {0: "bad", 1: "good"}}, {"exit_layers": [2]}, {"speed": 0.25}):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, **same)
    with pytest.raises(ValueError, match=message):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("is_saved", [True, False])
@pytest.mark.parametrize(
    "labels",
    [
        {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
        {"id2label": json.loads('{"0": "a", "1": "b", "2": "c"}')},
        {"num_labels": 3, "id2label": {"2": "c", "0": "a", "1": "b"}, "label2id": {"a": "0", "b": "1", "c": "2"}},
        {"label2id": {"a": 0, "b": 1, "c": 2}},
    ],
)
def test_labels_as_transformers_and_json_give_them(tmp_path: Path, is_saved: bool, labels: dict[str, Any]) -> None:
    if is_saved:
        early_exit_model(num_labels=3).save_pretrained(tmp_path)
        tokenizer_of("bert").save_pretrained(tmp_path)
    else:
        save_plain_checkpoint(tmp_path, "bert")
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, **labels).eval()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2}
    (row,) = model.stream(["a good film"], tokenizer_of("bert"))
    assert row.label in ("a", "b", "c")


def test_auto_class_with_another_label_count(tmp_path: Path) -> None:
    early_exit_model(num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_labels: got 7, but the model in .* was trained with 2"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=7)


def test_generic_label_names_may_be_replaced(tmp_path: Path) -> None:
    early_exit_model(num_labels=2).save_pretrained(tmp_path)
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, id2label={0: "no", 1: "yes"})
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}


@pytest.mark.parametrize("own", [True, False])
def test_truncated_weights(tmp_path: Path, own: bool) -> None:
    if own:
        early_exit_model().save_pretrained(tmp_path)
    else:
        save_plain_checkpoint(tmp_path, "bert")
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for kept in (len(content) * 2 // 3, 20, 0):
        weights.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"weights in .* are damaged or were cut off.*copy or download"):
            fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


def test_truncated_pickled_weights(tmp_path: Path) -> None:
    save_plain_checkpoint(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    weights = tmp_path / "pytorch_model.bin"
    torch.save(early_exit_model().backbone.state_dict(), weights)
    assert fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).num_layers == LAYERS
    content = weights.read_bytes()
    for kept in (len(content) // 2, 10, 0):
        weights.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is (cut short or damaged|not a PyTorch file)"):
            fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


def test_damaged_pickled_weights_of_the_old_format(tmp_path: Path) -> None:
    save_plain_checkpoint(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    weights = tmp_path / "pytorch_model.bin"
    torch.save(early_exit_model().backbone.state_dict(), weights, _use_new_zipfile_serialization=False)
    content = weights.read_bytes()
    # within the weights, the names, the pickle of the names and the first of its five pickles
    for kept in (len(content) // 2, 3000, 300, 20):
        weights.write_bytes(content[:kept])
        with pytest.raises(
            ValueError, match=r"pytorch_model\.bin is cut short or damaged .* copy or download it again"
        ):
            fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


def test_weights_of_another_config(tmp_path: Path) -> None:
    save_plain_checkpoint(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 321}))
    with pytest.raises(ValueError, match=r"word_embeddings.* has shape \(320, 32\), .* asks for \(321, 32\)"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().num_embeddings == 321


def test_incomplete_weights(tmp_path: Path) -> None:
    model = early_exit_model()
    model.save_pretrained(
        tmp_path, state_dict={name: value for name, value in model.state_dict().items() if "heads.1" not in name}
    )
    with pytest.raises(ValueError, match=r"lack 14 tensors of this model, among them heads\.1\."):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    save_plain_checkpoint(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ValueError, match="model_type"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)


def test_config_given_twice(tmp_path: Path) -> None:
    plain = save_plain_checkpoint(tmp_path, "bert")
    config = fastkd.EarlyExitConfig(CONFIGS["bert"], num_labels=3)
    assert fastkd.EarlyExitForSequenceClassification.from_pretrained(plain, config=config).config.num_labels == 3
    with pytest.raises(TypeError, match="config: got BertConfig, expected an EarlyExitConfig"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(plain, config=CONFIGS["bert"])
    with pytest.raises(ValueError, match="num_labels: both this and config were given"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(plain, config=config, num_labels=3)
