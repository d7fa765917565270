"""The packed engine against the padded one: the same answers and exit layers, for every family."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, MAIN_FAMILIES, clear_speed, early_exit_model, one_thread, random_batch, row_of
from torch import Tensor, nn

import fastkd
import fastkd_kernels as fk
from fastkd.encoders.families import FAMILIES
from fastkd.encoders.layout import TokenLayout
from fastkd.engines import packed, packed_encoder, packed_layers

__all__ = ["one_thread"]


Model = fastkd.EarlyExitForSequenceClassification
REPLAYED = [name for name, family in FAMILIES.items() if family.is_replayed]


def padded(model: Model, inputs: dict[str, Tensor], speed: float, **options: Any) -> fastkd.EarlyExitOutput:
    with torch.no_grad():
        return model(**inputs, speed=speed, engine="batch", **options)


def packed_run(model: Model, inputs: dict[str, Tensor], speed: float, **options: Any) -> fastkd.EarlyExitOutput:
    with torch.no_grad():
        return model(**inputs, speed=speed, engine="packed", **options)


def some_speed(model: Model, inputs: dict[str, Tensor]) -> float:
    with torch.no_grad():
        logits = model.all_exit_logits(**inputs)
    entropy = torch.distributions.Categorical(logits=logits.double(), validate_args=False).entropy()
    return clear_speed(entropy / torch.tensor(float(logits.shape[-1])).log())


def check_packed_tokens_are_refused(model: Model, inputs: dict[str, Tensor]) -> None:
    """In one sentence where they were asked for, and padded where they were not."""
    with pytest.raises(
        ValueError, match=r"model: packed tokens need layers of .* that run from their parts: .*'batch'"
    ):
        packed_run(model, inputs, 0.5)
    with torch.no_grad():
        assert model(**inputs, speed=0.5).logits.equal(padded(model, inputs, 0.5).logits)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layers", ["whole", "product by product", "product by product, as on a GPU", "modules"])
def test_same_answers_and_exits_as_the_padded_engine(family: str, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if layers == "modules":
        monkeypatch.setattr(packed_encoder, "runs_from_parts", lambda model: False)
        if FAMILIES[family].is_replayed:
            return check_packed_tokens_are_refused(early_exit_model(family), random_batch(family))
    if layers == "product by product":
        monkeypatch.setattr(packed_layers.LayerFromParts, "_packed_whole", lambda self: None)
    if layers == "product by product, as on a GPU":
        monkeypatch.setattr(packed_layers, "linear_on", lambda device: packed_layers.JoinedLinear)
    model, inputs = early_exit_model(family), random_batch(family, rows=23)
    speed = some_speed(model, inputs)
    expected, result = padded(model, inputs, speed), packed_run(model, inputs, speed)
    assert result.exit_layer.equal(expected.exit_layer)
    assert len(set(expected.exit_layer.tolist())) > 1
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.uncertainty, expected.uncertainty, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, which runs layers from their parts in bfloat16")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_gpu_runs_layers_from_their_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = early_exit_model(family).bfloat16(), random_batch(family, rows=40)
    truth = padded(copy.deepcopy(model).double(), inputs, 0.0).logits
    model, inputs = nn.Module.to(model, device="cuda"), {name: value.cuda() for name, value in inputs.items()}
    assert packed_encoder.encoder_of(model).is_faster
    from_parts = (packed_run(model, inputs, 0.0).logits.cpu() - truth).abs()
    monkeypatch.setattr(packed_encoder, "runs_from_parts", lambda model: False)
    as_modules = (packed_run(model, inputs, 0.0).logits.cpu() - truth).abs()
    assert from_parts.mean() <= as_modules.mean() * 1.2
    assert from_parts.max() <= as_modules.max() * 2


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("criterion", ["entropy", "patience"])
def test_sequences_that_left_may_stay_in_the_batch(pays: bool, criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where moving the others costs more than running them on: their answers must not change."""
    model, inputs = early_exit_model(), random_batch(rows=23)
    speed = some_speed(model, inputs) if criterion == "entropy" else 0.5
    expected = padded(model, inputs, speed, criterion=criterion)
    rows, run_layers = [], packed_encoder.PackedEncoder.run_layers

    def counted(
        self: packed_encoder.PackedEncoder, numbers: range, hidden_states: Tensor, layout: TokenLayout
    ) -> Tensor:
        rows.extend([layout.cu_seqlens.shape[0] - 1] * len(numbers))
        return run_layers(self, numbers, hidden_states, layout)

    monkeypatch.setattr(packed_encoder.PackedEncoder, "compaction_pays", lambda *_: pays)
    monkeypatch.setattr(packed_encoder.PackedEncoder, "run_layers", counted)
    result = packed_run(model, inputs, speed, criterion=criterion)
    assert result.exit_layer.equal(expected.exit_layer)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
    staying = [int((expected.exit_layer > number).sum()) for number in range(4)]
    # the last head answers every row that is there, so rows that left are dropped before its layer at the latest
    assert rows == (staying if pays else [23, 23, 23, staying[3]])


@pytest.mark.parametrize("engine", ["batch", "packed"])
def test_exit_layers_at_run_time(engine: str) -> None:
    model, inputs = early_exit_model(), random_batch(rows=17)
    logits = model.all_exit_logits(**inputs)
    with torch.no_grad():
        result = model(**inputs, speed=0.6, exit_layers=[2], engine=engine)
    assert set(result.exit_layer.tolist()) == {2, 4}
    at = torch.tensor([number - 1 for number in result.exit_layer.tolist()])
    torch.testing.assert_close(result.logits, logits[torch.arange(17), at], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"exit_layers: got 9, but this model has heads after \[1, 2, 3, 4\]"):
        model(**inputs, speed=0.6, exit_layers=[9])


@pytest.mark.parametrize("criterion", ["max_prob", "margin", "top_n", "patience"])
def test_every_criterion(criterion: str) -> None:
    model, inputs = early_exit_model(num_labels=4), random_batch(rows=17)
    top_n = 2 if criterion == "top_n" else None
    for speed in (0.34, 0.5, 1.0):
        expected = padded(model, inputs, speed, criterion=criterion, top_n=top_n)
        result = packed_run(model, inputs, speed, criterion=criterion, top_n=top_n)
        assert result.exit_layer.equal(expected.exit_layer)


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("exit_layers", [None, [2], [4]])
def test_heads_and_exit_layers(head: str, exit_layers: list[int] | None) -> None:
    model, inputs = early_exit_model(head=head, exit_layers=exit_layers), random_batch(rows=17)
    for speed in (0.0, 0.6, 1.0):
        expected, result = padded(model, inputs, speed), packed_run(model, inputs, speed)
        assert result.exit_layer.equal(expected.exit_layer)
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", *REPLAYED])
def test_bfloat16_is_as_accurate_as_the_padded_engine(family: str) -> None:
    exact = early_exit_model(family).double()
    inputs = random_batch(family, rows=40)
    model = copy.deepcopy(exact).bfloat16()
    # the truth is that of the rounded weights
    truth = padded(copy.deepcopy(model).double(), inputs, 0.0).logits
    ours = (packed_run(model, inputs, 0.0).logits - truth).abs()
    theirs = (padded(model, inputs, 0.0).logits - truth).abs()
    assert ours.mean() <= theirs.mean() * 1.05
    assert ours.max() <= theirs.max() * 1.5


def test_batch_mates_and_padding_change_no_exit() -> None:
    model, inputs = early_exit_model(), random_batch(rows=19)
    speed = some_speed(model, inputs)
    together = packed_run(model, inputs, speed)
    for row in range(19):
        alone = packed_run(model, row_of(inputs, row), speed)
        assert alone.exit_layer[0] == together.exit_layer[row]
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-4, atol=1e-4)


def test_forward_runs_packed_only_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for owner, name in ((packed, "run_packed"), (fk.PreparedRun, "__call__")):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments, run=run: calls.append(1) or run(*arguments))
    model, inputs = early_exit_model(), random_batch()
    left_padded = {name: values.flip(1) for name, values in inputs.items()}
    left_padded["attention_mask"][:, 0] = 1
    with torch.no_grad():
        model(**inputs, speed=0.0)
        assert len(calls) == 1
        model(**left_padded, speed=0.0)
        model(**inputs, position_ids=torch.arange(11)[None], speed=0.0)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs, speed=0.0)
        model(**inputs, speed=0.0, engine="batch")
        with pytest.raises(ValueError, match="engine: got 'packed', which needs"):
            model(**left_padded, engine="packed")
        with pytest.raises(ValueError, match="engine: got 'stream', expected 'batch', 'packed' or 'graphs'"):
            model(**inputs, engine="stream")
    assert len(calls) == 1
    model(**inputs, speed=0.5)  # answers that left early never have a gradient
    assert len(calls) == 2
    model(**inputs, speed=0.0).logits.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("family", REPLAYED)
@torch.no_grad()
def test_streams_answer_as_the_padded_engine(family: str) -> None:
    """Rows of up to 60 tokens, which a window of two on each side cuts."""
    model, inputs = early_exit_model(family), random_batch(family, rows=30, longest=60)
    speed = some_speed(model, inputs)
    expected = padded(model, inputs, speed)
    assert len(set(expected.exit_layer.tolist())) > 1
    names = [name for name in ("input_ids", "token_type_ids") if name in inputs]
    rows = [
        {name: values[0].tolist() for name, values in row_of(inputs, row).items() if name in names} for row in range(30)
    ]
    stream = model.stream(rows, speed=speed, tokens_per_run=200)
    assert isinstance(stream._encoder, packed_encoder.PackedEncoder)
    assert [row.exit_layer for row in stream] == expected.exit_layer.tolist()
    (result,) = model.stream_batches([inputs], speed=speed, tokens_per_run=200)
    assert result.exit_layer.equal(expected.exit_layer)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("obstacle", ["hook", "adapter", "frequencies that depend on the length"])
def test_what_the_parts_cannot_honour_runs_by_replay_or_is_refused(obstacle: str) -> None:
    config, calls = copy.deepcopy(CONFIGS["nomic_bert"]), []
    if obstacle.startswith("frequencies"):
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = Model(fastkd.EarlyExitConfig(config, num_labels=3, head_width=16, exits_trained=True)).eval()
    inputs = random_batch("nomic_bert")
    expected = padded(model, inputs, 0.0)
    if obstacle == "hook":
        model.layers[2].mlp.register_forward_hook(lambda *_: calls.append(1))
    if obstacle == "adapter":
        layer = model.layers[1].mlp
        layer.up_proj = nn.Sequential(layer.up_proj)
    check_packed_tokens_are_refused(model, inputs)
    calls.clear()
    rows = [{"input_ids": row_of(inputs, row)["input_ids"][0].tolist()} for row in range(13)]
    del inputs["token_type_ids"]
    without_segments = padded(model, inputs, 0.0)
    streamed = list(model.stream(rows, speed=0.0))
    assert bool(calls) == (obstacle == "hook")
    names = model.config.id2label
    assert [row.label for row in streamed] == [names[number] for number in without_segments.logits.argmax(-1).tolist()]
    assert expected.logits.isfinite().all()
    with pytest.raises(ValueError, match="model: packed tokens need layers of 'nomic_bert'"):
        model.stream_batches([inputs], speed=0.0)
    with pytest.raises(ValueError, match="engine: got 'graphs', but 'nomic_bert' has no padded layers for it"):
        model(**inputs, speed=0.5, engine="graphs")


@torch.no_grad()
def test_changed_frequencies_and_halves_are_noticed() -> None:
    model, inputs = early_exit_model("modernbert"), random_batch("modernbert")
    packed_run(model, inputs, 0.0)
    model.backbone.rotary_emb.sliding_attention_inv_freq.mul_(2.0)
    model.layers[1].mlp.Wi.weight.mul_(1.5)
    torch.testing.assert_close(
        packed_run(model, inputs, 0.0).logits, padded(model, inputs, 0.0).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("engine", [None, "packed"])
def test_changed_windows_and_scales_are_noticed(engine: str | None) -> None:
    model, inputs = early_exit_model("modernbert"), random_batch("modernbert")

    def check_answers_change() -> None:
        found = model(**inputs, speed=0.0, engine=engine).logits
        torch.testing.assert_close(found, padded(model, inputs, 0.0).logits, rtol=1e-4, atol=1e-4)
        assert not any(torch.equal(found, before) for before in seen)
        seen.append(found)

    seen: list[Tensor] = []
    check_answers_change()
    model.backbone.config.local_attention = 2
    check_answers_change()
    model.backbone.rotary_emb.full_attention_attention_scaling = 1.5
    check_answers_change()


@pytest.mark.parametrize("engine", [None, "packed", "batch"])
def test_integers_of_any_size_are_tokens(engine: str | None) -> None:
    model, inputs = early_exit_model(), random_batch()
    expected = padded(model, inputs, 0.5).logits
    small = {name: value.int() for name, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**small, speed=0.5, engine=engine).logits, expected, rtol=1e-4, atol=1e-4)


def test_changed_weights_and_modules_are_noticed() -> None:
    model, inputs = early_exit_model(), random_batch()
    packed_run(model, inputs, 0.0)
    with torch.no_grad():
        for parameter in model.layers[1].parameters():
            parameter.mul_(1.3)
    torch.testing.assert_close(
        packed_run(model, inputs, 0.0).logits, padded(model, inputs, 0.0).logits, rtol=1e-4, atol=1e-4
    )
    model.resize_token_embeddings(400, mean_resizing=False)
    inputs["input_ids"][0, 1] = 399
    torch.testing.assert_close(
        packed_run(model, inputs, 0.0).logits, padded(model, inputs, 0.0).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("fused", [True, False])
def test_training_between_two_runs_is_noticed(fused: bool) -> None:
    """A fused optimizer raises no version, and copies of the weights went stale in silence."""
    model, inputs = early_exit_model(), random_batch()
    packed_run(model, inputs, 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    model(**inputs, speed=0.0, engine="batch").logits.sum().backward()
    optimizer.step()
    torch.testing.assert_close(
        packed_run(model, inputs, 0.0).logits, padded(model, inputs, 0.0).logits, rtol=1e-4, atol=1e-4
    )


def test_adapters_and_hooks_run() -> None:
    """Whatever is put around a linear layer, or hooked to it, must keep running."""

    class Doubled(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return 2 * super().forward(rows)

    model, inputs = early_exit_model(), random_batch()
    seen = []
    model.layers[2].intermediate.register_forward_hook(lambda *_: seen.append(1))
    dense = model.layers[3].output.dense
    dense.forward = lambda rows: seen.append(2) or nn.Linear.forward(dense, rows)  # as accelerate patches modules
    query = model.layers[0].attention.self.query
    doubled = Doubled(query.in_features, query.out_features)
    doubled.load_state_dict(query.state_dict())
    model.layers[0].attention.self.query = doubled
    result = packed_run(model, inputs, 0.0)
    assert seen == [1, 2]
    torch.testing.assert_close(result.logits, padded(model, inputs, 0.0).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "tanh"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "gte"])
def test_activations(family: str, activation: str) -> None:
    config = copy.deepcopy(CONFIGS[family])
    setattr(config, "hidden_activation" if family == "modernbert" else "hidden_act", activation)
    model = fastkd.EarlyExitForSequenceClassification(fastkd.EarlyExitConfig(config, num_labels=3)).eval()
    inputs = random_batch(family)
    result, expected = packed_run(model, inputs, 0.0), padded(model, inputs, 0.0)
    # products of products: float32 is as far from float64 by either engine
    tolerance = 1e-4 if family == "bert" else 1e-3
    torch.testing.assert_close(result.logits, expected.logits, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu6", "gelu_10", "prelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_that_are_cut_off_far_out_or_hold_weights(activation: str, dtype: torch.dtype) -> None:
    config = copy.deepcopy(CONFIGS["bert"])
    config.hidden_act = activation
    model = Model(fastkd.EarlyExitConfig(config, num_labels=3)).eval()
    for layer in model.layers:
        layer.intermediate.dense.weight.mul_(20)
    model, inputs = model.to(dtype), random_batch()
    truth = padded(copy.deepcopy(model).double(), inputs, 0.0).logits
    ours, theirs = packed_run(model, inputs, 0.0).logits, padded(model, inputs, 0.0).logits
    assert (ours - truth).abs().mean() <= 2 * (theirs - truth).abs().mean()


class Noted(nn.Module):
    """What the classes below do beside their own: they give twice as much."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        given = super().forward(*inputs, **options)
        return (2 * given[0], *given[1:]) if isinstance(given, tuple) else 2 * given


@pytest.mark.parametrize("engine", [None, "packed"])
@pytest.mark.parametrize(
    ("family", "place"),
    [
        ("bert", "encoder.layer.1.attention.self"),
        ("bert", "encoder.layer.2.output"),
        ("bert", "encoder.layer.0"),
        ("bert", "embeddings"),
        ("distilbert", "transformer.layer.1.ffn"),
        ("modernbert", "layers.1.mlp"),
    ],
)
def test_modules_of_classes_of_somebody_else_are_called(family: str, place: str, engine: str | None) -> None:
    """As libraries of adapters give modules other classes, with the same weights under the same names."""
    model, inputs = early_exit_model(family), random_batch(family)
    before = padded(model, inputs, 0.0).logits
    module = model.backbone.get_submodule(place)
    module.__class__ = type(f"{type(module).__name__}WithAdapters", (Noted, type(module)), {})
    expected = padded(model, inputs, 0.0).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    if engine == "packed" and family == "modernbert":
        return check_packed_tokens_are_refused(model, inputs)
    with torch.no_grad():
        result = model(**inputs, speed=0.0, engine=engine)
    torch.testing.assert_close(result.logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_of_another_form_are_called() -> None:
    model, inputs = early_exit_model(), random_batch()
    model.layers[1] = early_exit_model("roberta-prelayernorm").layers[0]
    del model.layers[2].attention.self.key.bias
    model.layers[2].attention.self.key.bias = None
    expected = padded(model, inputs, 0.0).logits
    torch.testing.assert_close(model(**inputs, speed=0.0).logits, expected, rtol=1e-4, atol=1e-4)
    config = copy.deepcopy(CONFIGS["modernbert"])
    config.hidden_size = config.num_attention_heads = 4  # rotary tables that transformers spreads over heads 1 wide
    narrow = Model(fastkd.EarlyExitConfig(config, num_labels=3)).eval()
    expected = padded(narrow, inputs, 0.0).logits
    torch.testing.assert_close(narrow(**inputs, speed=0.0).logits, expected, rtol=1e-4, atol=1e-4)


def reading(model: Any, seen: set[str]) -> None:
    """Have the last layer note what attention the shared configuration names while it runs."""
    config = model.config.backbone
    model.layers[3].register_forward_hook(lambda *_: seen.add(config._attn_implementation))


def test_the_shared_configuration_never_changes() -> None:
    model, inputs = early_exit_model(), random_batch()
    before, seen = model.config.backbone._attn_implementation, set[str]()
    reading(model, seen)
    packed_run(model, inputs, 0.0)
    assert seen == {before} != {packed_layers.ATTENTION}


@pytest.mark.parametrize("kind", ["hooked", "float16"])
def test_one_thread_streams_while_others_call_forward(kind: str) -> None:
    model, inputs = early_exit_model(), random_batch()
    rows = [
        {"input_ids": ids[: int(mask.sum())].tolist()}
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    if kind == "hooked":
        model.layers[1].register_forward_hook(lambda *_: time.sleep(0.001))  # so that the threads take turns
    else:
        model.half()

    def work(number: int) -> list[int]:
        with torch.no_grad():
            if number % 2:
                return [int(row.exit_layer) for row in model.stream(rows, speed=0.4, tokens_per_run=16)]
            return model(**batch, speed=0.4).exit_layer.tolist()

    expected = work(0)
    assert len(set(expected)) > 1
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(work, range(24)))
    assert [number for number, answer in enumerate(answers) if answer != expected] == []


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("patched", ["attention", "layer", "compiled"])
def test_layers_whose_forward_was_replaced_run_as_they_are(family: str, patched: str) -> None:
    model, inputs = early_exit_model(family), random_batch(family)
    expected = padded(model, inputs, 0.0).logits
    layer, calls = model.layers[1], []
    reader = next(module for module in layer.modules() if packed_layers._reads_config(module))
    if patched == "compiled":
        layer.compile(backend="eager")
        layer.register_forward_hook(lambda *_: calls.append(1))
    else:
        module = reader if patched == "attention" else layer
        own = module.forward
        module.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    result = packed_run(model, inputs, 0.0)
    assert calls
    torch.testing.assert_close(result.logits, expected, rtol=1e-4, atol=1e-4)


def test_hooked_embeddings_are_called() -> None:
    model, inputs = early_exit_model(), random_batch()
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output * 2)
    torch.testing.assert_close(
        packed_run(model, inputs, 0.0).logits, padded(model, inputs, 0.0).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (1, 16), (64, 64), (65, 96), (256, 256), (257, 320), (2048, 2048)]
)
def test_tokens_are_rounded_up(tokens: int, expected: int) -> None:
    assert packed_encoder.round_up_tokens(tokens) == expected
