"""Plans: the answer to one row is the batch engine's, whatever was done to the model since the plan was made."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from launches import OpNames
from tiny_models import (
    CONFIGS,
    CRITERIA,
    QUANTISABLE,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    row_of,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import fastkd
import fastkd_kernels as fk
from fastkd.engines import packed_encoder, plan, stream

Model = fastkd.EarlyExitForSequenceClassification

pytestmark = pytest.mark.skipif(
    fk.missing_kernels(("varlen_attention", "layer_norm", "packed", "student_head"), "cpu") is not None,
    reason="without the compiled extension padded batches are the fastest way",
)


def one_row(family: str = "bert", row: int = 1) -> dict[str, Tensor]:
    return row_of(random_batch(family), row)


@torch.no_grad()
def answer(model: Model, **options: Any) -> fastkd.EarlyExitOutput:
    return model(**one_row(), **options)


def planned(model: Model) -> plan.Plan:
    answer(model, speed=0.0)
    found = plan._plans.get(model)
    assert found is not None
    assert found.is_current(model)
    return found


def assert_answers_as_the_batch_engine(model: Model, family: str = "bert", **options: Any) -> None:
    for row in range(3):
        inputs = one_row(family, row)
        with torch.no_grad():
            result, expected = model(**inputs, **options), model(**inputs, engine="batch", **options)
        assert result.exit_layer.tolist() == expected.exit_layer.tolist()
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-4)


@pytest.fixture
def usual_path_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the usual path was taken")

    monkeypatch.setattr(Model, "_run", refuse)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("speed", [0.0, 0.4, 0.8, 1.0])
def test_answers_of_every_family(family: str, speed: float) -> None:
    assert_answers_as_the_batch_engine(early_exit_model(family), family, speed=speed)


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
def test_answers_by_every_criterion(criterion: str, top_n: int | None) -> None:
    assert_answers_as_the_batch_engine(early_exit_model(), speed=0.5, criterion=criterion, top_n=top_n)


@pytest.mark.parametrize("family", ["bert", "electra"])
@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
def test_answers_of_a_batch(family: str, criterion: str, top_n: int | None) -> None:
    model, inputs = early_exit_model(family), random_batch(family, rows=8)
    options = {"speed": 0.5, "criterion": criterion, "top_n": top_n}
    with torch.no_grad():
        result, expected = model(**inputs, **options), model(**inputs, **options, engine="batch")
    assert result.exit_layer.equal(expected.exit_layer)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
def test_one_call_answers_as_stage_after_stage(
    rows: int, criterion: str, top_n: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = early_exit_model(), random_batch(rows=rows)
    asked: list[bool] = []
    run = plan.Plan._run
    monkeypatch.setattr(plan.Plan, "_run", lambda self, rule: asked.append(run(self, rule) is not None))
    with torch.no_grad():
        expected = [model(**inputs, speed=speed, criterion=criterion, top_n=top_n) for speed in (0.0, 0.5, 0.9)]
        monkeypatch.undo()
        results = [model(**inputs, speed=speed, criterion=criterion, top_n=top_n) for speed in (0.0, 0.5, 0.9)]
    assert asked == [True] * 3
    for result, other in zip(results, expected, strict=True):
        assert result.exit_layer.equal(other.exit_layer)
        torch.testing.assert_close(result.logits, other.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.uncertainty, other.uncertainty, rtol=1e-5, atol=1e-5)


def test_layers_that_no_row_reached_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = early_exit_model(), []
    planned(model)
    are_current = plan.Plan._are_current
    monkeypatch.setattr(
        plan.Plan,
        "_are_current",
        lambda self, layers, *heads: asked.append((layers, heads)) or are_current(self, layers, *heads),
    )
    with torch.no_grad():
        assert model(**random_batch(rows=5), speed=1.0).exit_layer.tolist() == [1] * 5
    assert asked == [(range(1, 2), (1,))]


@pytest.mark.parametrize("rows", [1, 5])
def test_answers_of_a_regression(rows: int) -> None:
    model, inputs = early_exit_model(num_labels=1), random_batch(rows=rows)
    with torch.no_grad():
        result, expected = model(**inputs), model(**inputs, engine="batch")
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert result.uncertainty is None
    assert [*result] == [*expected]


@pytest.mark.parametrize("options", [{"head": "linear"}, {"pool": "mean"}, {"exit_layers": [2, 4]}], ids=str)
def test_answers_of_models_of_other_forms(options: dict[str, Any]) -> None:
    assert_answers_as_the_batch_engine(early_exit_model(**options), speed=0.5)


def test_bfloat16() -> None:
    if not fk.onednn_multiplies(torch.bfloat16):
        pytest.skip("this CPU does not multiply bfloat16")
    model = early_exit_model().to(torch.bfloat16)
    with torch.no_grad():
        result, expected = model(**one_row()), model(**one_row(), engine="packed")
    torch.testing.assert_close(result.logits, expected.logits, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("usual_path_raises")
def test_a_batch_takes_no_usual_path() -> None:
    model = early_exit_model()
    with torch.no_grad():
        assert model(**random_batch(rows=8), speed=0.5).logits.shape == (8, 3)


@pytest.mark.usefixtures("usual_path_raises")
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.int32, torch.bool, None])
def test_one_row_takes_no_usual_path(mask_dtype: torch.dtype | None) -> None:
    model, inputs = early_exit_model(), one_row()
    mask = inputs.pop("attention_mask")
    if mask_dtype is not None:
        inputs["attention_mask"] = mask.to(mask_dtype)
    with torch.no_grad():
        assert model(**inputs, speed=0.5).logits.shape == (1, 3)
    model(**inputs, speed=0.5)  # where rows may leave early, no gradient is wanted


def test_padding_on_the_right_is_left_out() -> None:
    model, inputs = early_exit_model(), one_row()
    padded = {name: torch.cat([values, torch.zeros_like(values)], 1) for name, values in inputs.items()}
    with torch.no_grad():
        assert model(**padded, speed=0.4).logits.equal(model(**inputs, speed=0.4).logits)


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 0.5)


def _pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))


def _patch(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda *inputs: original(*inputs) * 0.5  # type: ignore[method-assign]


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


class _HalvingLinear(nn.Linear):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) * 0.5


def _set_class(module: nn.Module) -> None:
    module.__class__ = _HalvingLinear


def _step(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[[Model], None]:
    def change(model: Model) -> None:
        inputs = one_row()
        model(**inputs, speed=0, engine="batch").logits.square().sum().backward()
        optimizer(model.parameters(), lr=0.1, **options).step()

    return change


def _loaded(model: Model) -> None:
    other = early_exit_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.7)
    model.load_state_dict(other.state_dict())


def _in_place(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].output.dense.weight.mul_(0.5)


def _other_data(model: Model) -> None:
    weight = model.layers[1].output.dense.weight
    weight.data = weight.data * 0.5


def _other_parameter(model: Model) -> None:
    linear = model.layers[1].output.dense
    linear.weight = nn.Parameter(linear.weight.detach() * 0.5)


def _swapped_layers(model: Model) -> None:
    layers = model.layers
    layers[0], layers[1] = layers[1], layers[0]


def _other_layer(model: Model) -> None:
    layer = copy.deepcopy(model.layers[1])
    with torch.no_grad():
        layer.output.dense.weight.mul_(0.5)
    model.layers[1] = layer


def _other_head(model: Model) -> None:
    head = copy.deepcopy(model.heads["0"])
    with torch.no_grad():
        head.out_proj.weight.mul_(0.5)
    model.heads.add_module("0", head)


def _other_heads(model: Model) -> None:
    heads = copy.deepcopy(model.heads)
    with torch.no_grad():
        heads["0"].out_proj.weight.mul_(0.5)
    model.heads = heads


def _other_encoder(model: Model) -> None:
    encoder = copy.deepcopy(model.bert)
    with torch.no_grad():
        encoder.encoder.layer[0].output.dense.weight.mul_(0.5)
    model.bert = encoder


def _epsilon(model: Model) -> None:
    model.layers[0].output.LayerNorm.eps = 0.5


def _embedding_epsilon(model: Model) -> None:
    model.bert.embeddings.LayerNorm.eps = 0.5


def _other_activation(model: Model) -> None:
    model.layers[0].intermediate.intermediate_act_fn = nn.ReLU()


CHANGES: dict[str, Callable[[Model], Any]] = {
    "a hook of a layer": lambda model: _hook(model.layers[0]),
    "a hook of a linear layer": lambda model: _hook(model.layers[0].output.dense),
    "a pre-hook": lambda model: _pre_hook(model.layers[0].output.dense),
    "a hook of a block": lambda model: _hook(model.layers[1].output),
    "a hook of a head": lambda model: _hook(model.heads["0"]),
    "a hook of a head's layer": lambda model: _hook(model.heads["0"].narrow),
    "a hook of the embeddings": lambda model: _hook(model.bert.embeddings),
    "a patched forward": lambda model: _patch(model.layers[0].attention.output),
    "a patched head": lambda model: _patch(model.heads["0"].narrow),
    "another class": lambda model: _set_class(model.layers[0].output.dense),
    "a parametrization": lambda model: parametrize.register_parametrization(
        model.layers[0].output.dense, "weight", _Halved()
    ),
    "a step of SGD": _step(torch.optim.SGD),
    "a step of a fused optimizer": _step(torch.optim.AdamW, fused=True),
    "loaded weights": _loaded,
    "a weight in place": _in_place,
    "another memory": _other_data,
    "another parameter": _other_parameter,
    "swapped layers": _swapped_layers,
    "another layer": _other_layer,
    "another head": _other_head,
    "other heads": _other_heads,
    "another encoder": _other_encoder,
    "another epsilon": _epsilon,
    "another epsilon of the embeddings": _embedding_epsilon,
    "another activation": _other_activation,
    "other embeddings": lambda model: model.resize_token_embeddings(400),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_notices(change: Callable[[Model], Any]) -> None:
    model = early_exit_model()
    made = planned(model)
    before = answer(model, speed=0.0).logits, answer(model, speed=1.0).logits
    change(model)
    assert not made.is_current(model)
    with torch.no_grad():
        batch = random_batch(rows=5)
        result, expected = model(**batch, speed=0.5), model(**batch, speed=0.5, engine="batch")
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    plan._plans[model] = made  # whoever asks first has to notice
    for speed in (0.0, 1.0):
        assert_answers_as_the_batch_engine(model, speed=speed)
    if change is not CHANGES["other embeddings"]:
        after = answer(model, speed=0.0).logits, answer(model, speed=1.0).logits
        assert not all(map(torch.equal, before, after))


def _other_scale(model: Model) -> None:
    model.layers[1].output.dense.weight_scale = model.layers[1].output.dense.weight_scale * 0.5


INT8_CHANGES: dict[str, Callable[[Model], Any]] = {
    "a weight in place": lambda model: model.layers[1].output.dense.weight.neg_(),
    "a scale in place": lambda model: model.layers[1].output.dense.weight_scale.mul_(0.5),
    "a bias in place": lambda model: model.layers[1].output.dense.bias.mul_(0.5),
    "another scale": _other_scale,
    "a hook of a linear layer": lambda model: _hook(model.layers[0].output.dense),
    "another epsilon": _epsilon,
}


@pytest.mark.parametrize("change", INT8_CHANGES.values(), ids=INT8_CHANGES)
def test_notices_what_changes_in_int8(change: Callable[[Model], Any]) -> None:
    model = early_exit_model().quantize()
    model.layers[1].output.dense.bias.normal_(generator=torch.Generator().manual_seed(2))
    made = planned(model)
    before = answer(model, speed=0.0).logits
    change(model)
    assert not made.is_current(model)
    assert_answers_as_the_batch_engine(model, speed=0.0)
    assert not answer(model, speed=0.0).logits.equal(before)


@pytest.mark.parametrize("speed", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("family", QUANTISABLE)
@pytest.mark.usefixtures("usual_path_raises")
def test_int8_takes_no_usual_path(family: str, speed: float) -> None:
    model = early_exit_model(family).quantize()
    with torch.no_grad():
        assert model(**one_row(family), speed=speed).exit_layer.numel() == 1


def test_notices_another_dtype_and_back() -> None:
    model = early_exit_model()
    made = planned(model)
    model.double()
    assert answer(model, speed=0.0).logits.dtype == torch.float64
    model.float()
    assert not made.is_current(model)
    assert_answers_as_the_batch_engine(model, speed=0.5)


def test_notices_training_mode() -> None:
    model = early_exit_model(head_dropout=0.5)
    planned(model)
    model.train()
    output = model(**one_row(), speed=0.5)
    assert output.exit_layer is None
    assert output.logits.requires_grad


def test_notices_that_a_gradient_is_wanted() -> None:
    model = early_exit_model()
    planned(model)
    assert model(**one_row(), speed=0.0).logits.requires_grad
    model.requires_grad_(False)
    assert not model(**one_row(), speed=0.0).logits.requires_grad


def test_notices_autocast() -> None:
    model, inputs = early_exit_model(), one_row()
    planned(model)
    plain = answer(model, speed=0.0).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside, expected = model(**inputs, speed=0.0), model(**inputs, speed=0.0, engine="batch")
    assert inside.logits.equal(expected.logits)
    assert not inside.logits.equal(plain)


def test_notices_hooks_of_all_modules() -> None:
    model, called = early_exit_model(), []
    planned(model)
    handle = register_module_forward_hook(lambda module, inputs, output: called.append(type(module).__name__))
    try:
        answer(model, speed=0.0)
    finally:
        handle.remove()
    assert "BertLayer" in called


def test_notices_a_forced_backend() -> None:
    model = early_exit_model()
    planned(model)
    with fk.backend("reference"):
        assert plan.plan_of(model) is None
        answer(model, speed=0.5)


def test_notices_who_watches_ops() -> None:
    model = early_exit_model()
    planned(model)
    with OpNames() as seen:
        answer(model, speed=1.0)
    assert any("fastkd_kernels.pack_" in name for name in seen.names)


def test_notices_that_onednn_was_switched_off() -> None:
    model = early_exit_model()
    made = planned(model)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not made.is_current(model)
        assert_answers_as_the_batch_engine(model, speed=0.5)


def _set_speed(model: Model) -> None:
    model.config.speed = 1.0


def _set_one_speed(model: Model) -> None:
    model.config.speed[0] = 1.0


def _other_config(model: Model) -> None:
    model.config = copy.deepcopy(model.config)
    model.config.speed = 1.0


@pytest.mark.parametrize("change", [_set_speed, _set_one_speed, _other_config])
def test_notices_another_configuration(change: Callable[[Model], None]) -> None:
    model = early_exit_model(speed=[1e-6, 1e-6, 1e-6])
    assert answer(model).exit_layer.tolist() == [4]
    change(model)
    assert answer(model).exit_layer.tolist() == [1]


def test_notices_that_heads_are_not_trained_any_more() -> None:
    model = early_exit_model()
    answer(model, speed=0.5)
    model.config.exits_trained = False
    with pytest.raises(ValueError, match="never trained"):
        answer(model, speed=0.5)


def test_notices_that_tuples_are_wanted() -> None:
    model = early_exit_model()
    answer(model)
    assert isinstance(model(**one_row(), return_dict=False), tuple)
    model.config.return_dict = False
    assert isinstance(answer(model), tuple)


@pytest.mark.parametrize("speed", [True, 1.5, "fast"])
def test_a_wrong_speed_is_refused_after_an_equal_one_was_taken(speed: Any) -> None:
    model = early_exit_model()
    answer(model, speed=1.0)
    with pytest.raises(ValueError, match=r"^speed: got"):
        answer(model, speed=speed)


def test_changed_weights_warn_once(tmp_path: Any) -> None:
    early_exit_model().save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path).eval()
    answer(model, speed=0.5)
    with torch.no_grad():
        model.last_head.out_proj.weight.mul_(0.5)
    with pytest.warns(UserWarning, match="distilled for other weights"):
        answer(model, speed=0.5)
    answer(model, speed=0.5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.ones(1, 3)}, "input_ids: got shape"),
        ({"input_ids": torch.ones(1, 99, dtype=torch.int64)}, "at most 66"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 2)}, "one value per token"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.tensor([[0, 1, 1]])},
            "the first token of a row is masked",
        ),
    ],
)
def test_wrong_inputs_say_what_they_always_said(inputs: dict[str, Tensor], message: str) -> None:
    model = early_exit_model()
    planned(model)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**inputs, speed=0.5)


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    model = early_exit_model()
    planned(model)
    with torch.no_grad(), pytest.raises(IndexError, match="got 999, expected 0 to 319"):
        model(input_ids=torch.tensor([[5, 999, 6]]), speed=0.5)


def test_a_hole_in_the_mask_is_left_to_the_batch_engine() -> None:
    model, inputs = early_exit_model(), one_row()
    inputs["attention_mask"][0, 1] = 0
    with torch.no_grad():
        result, expected = model(**inputs, speed=0.5), model(**inputs, speed=0.5, engine="batch")
    assert result.logits.equal(expected.logits)


def test_nan_warns() -> None:
    model = early_exit_model()
    with torch.no_grad():
        model.last_head.out_proj.weight.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="NaN logits"):
        answer(model, speed=0.0)


def test_a_plan_keeps_no_model_alive() -> None:
    model = early_exit_model()
    planned(model)
    weight = weakref.ref(model.layers[0].output.dense.weight)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert weight() is None


def test_models_with_a_plan_can_be_copied_and_pickled() -> None:
    model = early_exit_model()
    expected = answer(model, speed=0.5).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert answer(other, speed=0.5).logits.equal(expected)
        assert plan._plans[other] is not plan._plans[model]


def test_threads_share_a_plan_while_weights_change() -> None:
    model = early_exit_model()
    states = [copy.deepcopy(model.state_dict()) for _ in range(2)]
    with torch.no_grad():
        for name, value in states[1].items():
            if value.is_floating_point():
                value.mul_(1.05 if "LayerNorm" not in name else 1)
    for _ in range(4):
        for state in states:
            model.load_state_dict(state)
            with ThreadPoolExecutor(4) as pool:
                answers = [*pool.map(lambda _: answer(model, speed=0.5).logits, range(12))]
            with torch.no_grad():
                expected = model(**one_row(), speed=0.5, engine="batch").logits
            for logits in answers:
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    count(packed_encoder, "encoder_of")
    count(stream, "encoder_of")
    count(nn.Module, "named_modules")
    count(nn.Module, "named_parameters")
    return calls


def test_nothing_is_asked_twice(counted: list[str]) -> None:
    model = early_exit_model()
    planned(model)
    counted.clear()
    answer(model, speed=0.0)
    answer(model, speed=0.7)
    assert counted == []


def streamed(model: Model, speed: float) -> list[Tensor]:
    rows = [{"input_ids": one_row(row=row)["input_ids"][0].tolist()} for row in range(5)]
    return [torch.tensor([answer.exit_layer, answer.score]) for answer in model.stream(rows, speed=speed)]


def test_a_stream_asks_nothing_twice(counted: list[str]) -> None:
    model = early_exit_model()
    before = streamed(model, 0.5)
    counted.clear()
    assert all(map(torch.equal, streamed(model, 0.5), before))
    assert "encoder_of" not in counted


@pytest.mark.parametrize("name", ["a hook of a linear layer", "a weight in place", "another head", "swapped layers"])
def test_a_stream_notices(name: str) -> None:
    model, fresh = early_exit_model(), early_exit_model()
    before = streamed(model, 0.0) + streamed(model, 1.0)
    CHANGES[name](model)
    CHANGES[name](fresh)
    after, expected = streamed(model, 0.0) + streamed(model, 1.0), streamed(fresh, 0.0) + streamed(fresh, 1.0)
    for one, other in zip(after, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert not all(map(torch.equal, before, after))
