"""Any encoder of transformers runs layer by layer and gives what its own forward gives, or is refused in words."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from every_encoder import LAYERS, PAGE, check_exact, outcome_of, random_inputs, row_of_table, rows_of_page, tiny_config
from every_encoder import text_families as families_of_text
from tiny_models import early_exit_model, one_thread, random_batch, tokenizer_of  # noqa: F401  # one is a fixture
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import fastkd
import fastkd_kernels as fk
from fastkd.encoders.anatomy import NO_LIMIT, anatomy_of
from fastkd.encoders.layer_list import layer_path
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs, hidden_states_of
from fastkd.encoders.replay import Replay
from fastkd.engines.padded_runs import batches_of_like_lengths
from fastkd.model.tracing import record_trace

SOME = ("albert", "convbert", "deberta-v2", "eurobert", "modernbert", "mpnet")


def model_of(family: str, **options: Any) -> fastkd.EarlyExitForSequenceClassification:
    """A random model in evaluation mode whose heads differ."""
    torch.manual_seed(3)
    config = fastkd.EarlyExitConfig(
        tiny_config(family), num_labels=3, **{"head_width": 16, "exits_trained": True, **options}
    )
    model = fastkd.EarlyExitForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(std=0.4)
    return model


# Every family


@pytest.mark.parametrize("family", families_of_text())
def test_every_text_family_is_exact_or_refused_in_words(family: str) -> None:
    """What it finds is the row of docs/models.md; `python tests/every_encoder.py` writes the page anew."""
    found, rows = outcome_of(family), rows_of_page()
    is_same_version = f"With transformers {transformers.__version__}:" in PAGE.read_text(encoding="utf-8")
    if is_same_version:
        assert rows.get(family) == row_of_table(family, found)
    elif family in rows:
        # which other words transformers uses for what it cannot build is not ours
        assert ("| exact" in rows[family] or "layer by layer" in rows[family]) <= (found.status == "exact")


def test_the_page_names_families_that_transformers_has() -> None:
    if f"With transformers {transformers.__version__}:" in PAGE.read_text(encoding="utf-8"):
        assert set(rows_of_page()) == set(families_of_text())


# What is told apart


@torch.no_grad()
def test_a_family_with_a_path_of_its_own_runs_alike_by_replay() -> None:
    model, batch = early_exit_model("bert"), random_batch("bert")
    inputs = EncoderInputs(batch["input_ids"], batch["attention_mask"].bool(), batch["token_type_ids"])
    replay, layers = Replay(model.backbone, model.num_layers), range(1, model.num_layers + 1)
    by_replay = replay.run_layers(model.backbone, layers, *replay.start(model.backbone, inputs))
    assert torch.equal(by_replay, model.run_layers(layers, *model.start(inputs)))


class _Table(nn.Module):
    """A layer with a table that may have as many rows as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, mask: Tensor | None, table: Tensor, scale: int) -> tuple[Tensor, None]:
        mixed = self.linear(hidden_states).tanh() + table.sum(0) * scale
        kept = mixed if mask is None else mixed * mask[..., None]
        return hidden_states + kept.mean(1, keepdim=True) + mixed, None


class _Encoder(transformers.PreTrainedModel):
    """The smallest encoder with such layers."""

    config_class = transformers.BertConfig

    def __init__(self, rows_of_table: int, layer: Any = _Table) -> None:
        super().__init__(transformers.BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=2))
        self.words = nn.Embedding(99, 8)
        self.table = nn.Parameter(torch.randn(rows_of_table, 8))
        self.blocks = nn.ModuleList(layer() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        hidden_states = self.words(input_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states, attention_mask, self.table, scale=2)[0]
        return (hidden_states,)


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 3, 4, 6, 7])
def test_tables_of_as_many_rows_as_the_batch_are_no_batches(rows: int) -> None:
    """Six rows, three of the check, and what is left of them, each once as large as the table."""
    torch.manual_seed(1)
    encoder, inputs = _Encoder(rows).eval(), random_inputs(99)
    replay = Replay(encoder, 2)
    mask = inputs["attention_mask"].bool()
    states, layout = replay.start(encoder, EncoderInputs(inputs["input_ids"], mask))
    expected = encoder(**inputs)[0]
    after = replay.run_layers(encoder, range(1, 2), states, layout)
    for survivors in ([0, 1, 3, 5], [0, 2]):
        kept = torch.tensor(survivors)
        narrowed = replay.narrowed(encoder, layout, kept, after[kept], mask[kept])
        assert torch.allclose(replay.run_layers(encoder, range(2, 3), after[kept], narrowed), expected[kept], atol=1e-5)


@torch.no_grad()
def test_which_rows_are_whose_is_asked_once_for_each_kind_of_batch() -> None:
    model, inputs = model_of("mpnet"), random_inputs(99)
    asked = []
    replay = model._driver
    told_apart = replay._told_apart  # type: ignore[union-attr]
    replay._told_apart = lambda *given: asked.append(1) or told_apart(*given)  # type: ignore[method-assign,union-attr,func-returns-value]

    def narrow(rows: int) -> None:
        mask = inputs["attention_mask"].bool()[:rows]
        states, layout = model.start(EncoderInputs(inputs["input_ids"][:rows], mask))
        kept = torch.tensor([0, 3])
        model.narrowed(layout, kept, states[kept], mask[kept])

    for rows in (6, 5, 6):
        narrow(rows)
    assert len(asked) == 1, "by the check"
    narrow(4)
    narrow(4)
    assert len(asked) == 2, "four rows and four heads of attention are another kind"


@torch.no_grad()
def test_columns_of_padding_are_dropped_by_recording_anew() -> None:
    model, inputs = model_of("deberta-v2"), random_inputs(99)
    mask = inputs["attention_mask"].bool()
    _, layout = model.start(EncoderInputs(inputs["input_ids"], mask))
    kept = torch.tensor([1, 4])  # of 7 and 4 tokens
    narrow = model.narrowed(layout, kept, torch.zeros(2, 7, 32), mask[kept, :7])
    assert narrow.layer_mask.inputs.shape == (2, 7)
    assert torch.equal(narrow.layer_mask.inputs.input_ids, inputs["input_ids"][kept, :7])


# Training


@pytest.mark.parametrize("family", SOME)
def test_gradients_are_those_of_the_encoder_itself(family: str) -> None:
    model, inputs = model_of(family), random_inputs(99)
    labels = torch.arange(6) % 3
    model(**inputs, labels=labels, speed=0.0).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    states, layout = model.backbone(**inputs)[0], TokenLayout(inputs["attention_mask"].bool())
    read = layout.with_mean_first(states) if model.config.pool == "mean" else (states, layout)
    nn.functional.cross_entropy(model.last_head(*read), labels).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert"])
def test_dropout_is_drawn_once_and_checkpointing_changes_nothing(family: str) -> None:
    inputs = random_inputs(99)
    gradients = []
    for checkpoints in (False, True):
        model = model_of(family).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(9)
        model(**inputs, labels=torch.arange(6) % 3).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_check_leaves_modes_and_random_numbers_as_they_were() -> None:
    model = model_of("albert").train()
    model.backbone.embeddings.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(4)
    before = torch.get_rng_state()
    model._driver.check(model.backbone)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


# Hooks, adapters and threads


@torch.no_grad()
def test_layers_are_called_as_they_are_and_by_nobody_else() -> None:
    model, inputs, seen = model_of("deberta-v2"), random_inputs(99), []
    model(**inputs)
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: seen.append(1))
    model(**inputs)
    assert len(seen) == LAYERS, "recording may not be heard"
    before = model(**inputs).logits
    query = model.layers[1].attention.self.query_proj
    query.register_forward_hook(lambda _, __, output: output * 2)
    assert not torch.equal(model(**inputs).logits, before)
    check_exact(model, inputs)


@torch.no_grad()
def test_threads_share_a_model() -> None:
    model, inputs = model_of("mpnet"), random_inputs(99)
    expected = model(**inputs, speed=0.5)
    found: list[Any] = []
    work = [threading.Thread(target=lambda: found.extend(_many(model, inputs))) for _ in range(3)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(output.logits, expected.logits) for output in found)


def _many(model: Any, inputs: dict[str, Tensor]) -> list[Any]:
    with torch.no_grad():
        return [model(**inputs, speed=0.5) for _ in range(5)]


@torch.no_grad()
def test_a_copy_and_embedded_inputs_run_alike() -> None:
    model, inputs = model_of("eurobert"), random_inputs(99)
    expected = model(**inputs).logits
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits, expected)
    # a tokenizer that sends segments to an encoder without any is harmless
    assert torch.equal(model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).logits, expected)
    segmented = model_of("rembert")
    segments = torch.ones_like(inputs["input_ids"])
    assert not torch.equal(segmented(**inputs, token_type_ids=segments).logits, segmented(**inputs).logits)
    with pytest.raises(ValueError, match="input_ids: got 67 tokens per row, but this encoder takes at most 66"):
        segmented(torch.full((1, 67), 7))


@pytest.mark.parametrize("family", SOME)
@torch.no_grad()
def test_first_layers_and_hidden_states_are_the_encoders(family: str, tmp_path: Path) -> None:
    model, inputs = model_of(family), random_inputs(99)
    part = model.first_layers(2).eval()
    expected = model.all_exit_logits(**inputs)[:, 1]
    assert torch.equal(part(**inputs, engine="batch").logits, expected)
    part.save_pretrained(tmp_path)
    loaded = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs, engine="batch").logits, expected)
    states = model(**inputs, speed=0, output_hidden_states=True).hidden_states
    theirs = model.backbone(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(theirs)
    assert all(torch.equal(own, other) for own, other in zip(states, theirs, strict=True))


def test_positions_that_begin_after_padding_are_counted() -> None:
    assert fastkd.EarlyExitConfig(tiny_config("mpnet")).longest_input == 66 - 2
    assert fastkd.EarlyExitConfig(tiny_config("modernbert")).longest_input == 66
    with torch.no_grad():
        model_of("mpnet")(torch.full((1, 64), 7))
    config = tiny_config("modernbert")
    config.max_position_embeddings = 0
    assert fastkd.EarlyExitConfig(config).longest_input == NO_LIMIT


def test_operations_are_those_of_the_linear_layers() -> None:
    config = fastkd.EarlyExitConfig(tiny_config("modernbert"), num_labels=3)
    seen: list[int] = []
    model = fastkd.EarlyExitForSequenceClassification(config).eval()
    model._driver.check(model.backbone)
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, _, out: seen.append(m.in_features * out.numel() // len(out)))
    with torch.no_grad():
        model(torch.full((1, 5), 7))
    counted = fastkd.flops(config, 5, convention="macs") - fastkd.flops(config, 5, layers=0, convention="macs")
    assert counted == sum(seen)


# Pools


@torch.no_grad()
@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_heads_may_read_the_mean(head: str) -> None:
    model, inputs = model_of("eurobert", head=head), random_inputs(99)
    assert model.config.pool == "mean", "the default of EuroBERT's own classifier"
    check_exact(model, inputs)
    if head == "linear":
        kept = inputs["attention_mask"][..., None]
        mean = (model.backbone(**inputs)[0] * kept).sum(1) / kept.sum(1)
        torch.testing.assert_close(model(**inputs).logits, model.last_head.out_proj(mean))
    bert = early_exit_model("bert", head=head, pool="mean")
    batch = random_batch("bert")
    torch.testing.assert_close(
        bert(**batch, engine="packed").logits, bert(**batch, engine="batch").logits, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="pool: got 'max', expected one of cls, mean"):
        fastkd.EarlyExitConfig(pool="max")


# Files


@torch.no_grad()
@pytest.mark.parametrize("task", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("family", SOME)
def test_checkpoints_of_any_task_load_and_saved_models_answer_alike(tmp_path: Path, family: str, task: Any) -> None:
    plain = task.from_config(tiny_config(family))
    plain.save_pretrained(tmp_path / "plain")
    model, info = fastkd.EarlyExitForSequenceClassification.from_pretrained(
        tmp_path / "plain", num_labels=3, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"], "transformers would print a report about what an early exit does not need"
    own, given = model.backbone.state_dict(), plain.base_model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in own.items())

    model.save_pretrained(tmp_path / "saved")
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    inputs = random_inputs(99)
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["backbone"]["model_type"] == family
    model.backbone.save_pretrained(tmp_path / "backbone")
    exported = AutoModel.from_pretrained(tmp_path / "backbone").eval()
    torch.testing.assert_close(exported(**inputs)[0], model.backbone(**inputs)[0])


def test_named_layers_are_kept_in_the_configuration(tmp_path: Path) -> None:
    AutoModel.from_config(tiny_config("mpnet")).save_pretrained(tmp_path / "plain")
    load = fastkd.EarlyExitForSequenceClassification.from_pretrained
    model = load(tmp_path / "plain", num_labels=3, layers="encoder.layer")
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").config.layers == "encoder.layer"
    with pytest.raises(
        ValueError, match=r"layers: got 'encoder.blocks', but MPNetModel .* its lists are encoder.layer"
    ):
        load(tmp_path / "plain", num_labels=3, layers="encoder.blocks")
    with pytest.raises(ValueError, match=r"layers: got 'layer', but the model in .* has 'encoder.layer'"):
        load(tmp_path / "saved", layers="layer")


def test_a_trace_its_certificate_and_its_costs(tmp_path: Path) -> None:
    model, inputs = model_of("deberta-v2"), random_inputs(99)
    trace = record_trace(model, [inputs])
    trace.save(tmp_path / "trace")
    again = fastkd.ExitTrace.load(tmp_path / "trace")
    assert again.shape.linear_products == anatomy_of(model.config.backbone, None).linear_products
    answers = again.answers(0.5)
    with torch.no_grad():
        assert answers.exit_layer.tolist() == model(**inputs, speed=0.5).exit_layer.tolist()


# Streams


def test_batches_of_a_stream_are_of_like_lengths() -> None:
    lengths = [9, 3, 10, 3, 30, 8]
    assert list(batches_of_like_lengths(lengths, 0.125)) == [[1, 3], [5, 0, 2], [4]]
    assert list(batches_of_like_lengths(lengths, 0.0)) == [[1, 3], [5], [0], [2], [4]]
    assert list(batches_of_like_lengths([], 0.0)) == []


def test_streams_of_batches_name_the_stream() -> None:
    with pytest.raises(ValueError, match=r"family 'mpnet', but packed .* or model.stream\(rows\)"):
        model_of("mpnet").stream_batches([random_inputs(99)])


# Errors


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("llama", r"LlamaModel has causal attention"),
        ("gpt2", r"GPT2Model has causal attention"),
        ("fnet", "FNetModel does not take attention_mask, so padding would be read"),
        ("vit", "ViTModel does not take input_ids, so it is not a text encoder"),
        ("xlm", r"XLMModel has several lists of 3 modules \(attentions, .*layers cannot be found; name its list"),
        ("longformer", r"layer 1 of LongformerModel takes hidden states of shape \(3, 512, 32\) for 3 rows of 8"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(tmp_path: Path, family: str, sentence: str) -> None:
    AutoModel.from_config(tiny_config(family)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, num_labels=3)


@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("bart", "'bart' is an encoder-decoder, expected an encoder only"),
        ("gemma3", "'gemma3' reads more than text"),
        ("perceiver", "the configuration of 'perceiver' has no num_hidden_layers"),
        ("vitmatte", "transformers has no encoder of family 'vitmatte'"),
    ],
)
def test_what_the_configuration_tells_is_refused_without_the_weights(
    tmp_path: Path, family: str, sentence: str
) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, num_labels=3)


def test_a_layer_that_changes_the_batch_is_refused() -> None:
    class Halving(_Table):
        def forward(self, hidden_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
            return hidden_states[:, ::2] + hidden_states.mean(1, keepdim=True), None

    class Mixing(_Table):
        def forward(self, hidden_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
            mean = hidden_states.mean(1, keepdim=True)
            return hidden_states + mean + mean.mean(0, keepdim=True), None

    class Turning(_Table):
        def forward(self, hidden_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
            return (hidden_states + hidden_states.mean(1, keepdim=True)).flip(0), None

    class Drawing(_Table):
        def forward(self, hidden_states: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
            return hidden_states + torch.randn_like(hidden_states) + hidden_states.mean(1, keepdim=True), None

    for layer, sentence in (
        (Halving, r"layer 1 of _Encoder gives hidden states of shape \(3, 4, 8\) for 3 rows of 8 tokens"),
        (Mixing, "layer 1 of _Encoder gives a row a different result once other rows have left its batch"),
        (Turning, "layer 1 of _Encoder gives a row a different result once other rows have left its batch"),
        (Drawing, "layer 1 of _Encoder does not repeat the result it gave"),
    ):
        encoder = _Encoder(4, layer).eval()
        with pytest.raises(ValueError, match=sentence):
            Replay(encoder, 2).check(encoder)
    encoder = _Encoder(4).eval()
    with pytest.raises(
        ValueError, match=r"calls the modules in blocks 2 times, but its configuration says .* 5 layers"
    ):
        Replay(encoder, 5, "blocks").check(encoder)
    with pytest.raises(ValueError, match="Linear has no list of modules of one class, so its layers cannot be found"):
        layer_path(nn.Linear(2, 2))


class Halved(nn.Module):
    """A layer that keeps the first half of the batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *rest: Any, **options: Any) -> Any:
        return hidden_states_of(self.layer(hidden_states, *rest, **options))[:3]


@pytest.mark.parametrize("speed", [0.0, 0.5])
@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert"])
def test_a_layer_that_changes_the_batch_later_on_is_refused(family: str, speed: float) -> None:
    model, inputs = model_of(family), random_inputs(99)
    with torch.no_grad():
        model(**inputs, speed=speed, engine="batch")
        model.layers[1] = Halved(model.layers[1])
        for name, value in vars(model.layers[1].layer).items():
            if name == "attention_type":
                model.layers[1].attention_type = value
        with pytest.raises(ValueError, match=r"backbone: a layer Halved took hidden states .* and gave \(3, "):
            model(**inputs, speed=speed, exit_layers=[3], engine="batch")


@torch.no_grad()
def test_frequencies_that_depend_on_the_length_see_the_batch_as_it_was_padded() -> None:
    """Rows that leave make it narrower, and the layers above then took other frequencies."""
    if not hasattr(transformers, "GteConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no gte")
    config = tiny_config("gte")
    half = config.hidden_size // config.num_attention_heads // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "factor": 2.0}
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 12, **factors
    }  # fmt: skip
    torch.manual_seed(3)
    model = fastkd.EarlyExitForSequenceClassification(
        fastkd.EarlyExitConfig(config, num_labels=3, head_width=16, exits_trained=True)
    ).eval()
    assert model.reads_padding
    inputs = {name: value[:2] for name, value in random_inputs(99).items()}
    uncertainty = torch.tensor([1.0, 0.0])
    while uncertainty[0] >= uncertainty[1]:  # until the long row is the one that leaves
        inputs["input_ids"] = torch.randint(4, 99, (2, 20)) * inputs["attention_mask"]
        heads = model.all_exit_logits(**inputs)
        uncertainty = fk.exit_gate(heads[:, 0], 0.0).uncertainty
    result = model(**inputs, speed=uncertainty.mean().item(), exit_layers=[1])
    assert result.exit_layer.tolist() == [1, 3]
    torch.testing.assert_close(result.logits, torch.stack([heads[0, 0], heads[1, 2]]), rtol=1e-4, atol=1e-4)


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    AutoModel.from_config(tiny_config("mpnet")).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="trust_remote_code: got True, but fastkd does not run a checkpoint's own code"
    ):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, num_labels=3, trust_remote_code=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "brand_new", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its own code"):
        fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
