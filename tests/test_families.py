"""Every supported family computes layer by layer what transformers computes in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    CONFIGS,
    LAYERS,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    save_plain_checkpoint,
)
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    MPNetConfig,
)

import fastkd
from fastkd.encoders import catalogue, families

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(CONFIGS)


def test_the_tests_cover_every_supported_family() -> None:
    too_new = set() if hasattr(transformers, "GteConfig") else {"gte"}
    assert set(CONFIGS) == set(families.FAMILIES) - too_new


def test_the_catalogue_names_every_supported_family() -> None:
    assert set(catalogue.FAMILIES) == set(families.FAMILIES)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_the_docs_name_every_supported_family(page: str) -> None:
    *titles, last = [family.title for family in catalogue.FAMILIES.values()]
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert f"{', '.join(titles)} and {last}" in text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_hidden_states_equal_transformers(tmp_path: Path, family: str, attention: str, padded: bool) -> None:
    if family == "megatron-bert" and attention == "sdpa":
        pytest.skip("Megatron-BERT of transformers has no sdpa attention")
    folder = save_plain_checkpoint(tmp_path, family)
    oracle = AutoModel.from_pretrained(folder, attn_implementation=attention)
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(
        folder, num_labels=3, attn_implementation=attention
    )
    assert model.backbone.config._attn_implementation == attention
    batch = random_batch(family)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    expected = oracle(**batch, output_hidden_states=True).hidden_states

    seen: list[Any] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in model.layers]
    model(**batch)
    for hook in hooks:
        hook.remove()

    assert len(seen) == LAYERS
    seen = [output[0] if isinstance(output, tuple) else output for output in seen]
    # the last ones of transformers are those of its final norm, where it has one
    seen[-1] = model._driver.before_heads(model.backbone, seen[-1])
    for layer, (got, want) in enumerate(zip(seen, expected[1:], strict=True), start=1):
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text, n=layer: f"after layer {n}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_embedded_inputs_and_positions_reach_the_encoder(family: str) -> None:
    model = early_exit_model(family)
    batch = random_batch(family)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch["input_ids"])
        positions = torch.arange(2, 2 + batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        from_ids = model(**batch, position_ids=positions).logits
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        from_embeddings = model(inputs_embeds=embedded, position_ids=positions, **rest).logits
        # rotary tables know differences of positions only
        other_positions = model(**batch, position_ids=positions * 2).logits
    assert torch.equal(from_ids, from_embeddings)
    assert not torch.allclose(from_ids, other_positions)


@pytest.mark.parametrize("task", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_checkpoints_of_any_task_load(tmp_path: Path, family: str, task: Any) -> None:
    original = task.from_config(CONFIGS[family])
    original.save_pretrained(tmp_path)
    model, info = fastkd.EarlyExitForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"], "transformers would print a report about what an early exit does not need"
    encoder = original.base_model.state_dict()
    loaded = model.backbone.state_dict()
    assert loaded.keys() <= encoder.keys()
    assert all(torch.equal(value, encoder[name]) for name, value in loaded.items())


def test_pretraining_checkpoint_with_pooler_loads(tmp_path: Path) -> None:
    BertForPreTraining(CONFIGS["bert"]).save_pretrained(tmp_path)
    model = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model.backbone.pooler is None


@pytest.mark.parametrize("engine", ["packed", "graphs"])
def test_a_family_without_fast_paths_is_told_which_have_some(engine: str) -> None:
    mpnet = MPNetConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = fastkd.EarlyExitForSequenceClassification(fastkd.EarlyExitConfig(mpnet, num_labels=3)).eval()
    with pytest.raises(
        ValueError, match=r"'mpnet'.*graphs\) run only bert, camembert.*distilbert, electra.*roberta.*'batch'"
    ):
        model(torch.full((1, 4), 7), engine=engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_is_the_longest_that_runs(family: str) -> None:
    longest = families.longest_input(CONFIGS[family])
    model = early_exit_model(family)
    has_table = any(name.endswith("position_embeddings.weight") for name, _ in model.named_parameters())
    with torch.no_grad():
        model(torch.full((1, longest), 7))
        if has_table:  # rotary tables are made for any length
            with pytest.raises((IndexError, RuntimeError)):  # out of positions, or of the buffer of their numbers
                model.backbone(torch.full((1, longest + 1), 7))
    with pytest.raises(ValueError, match=f"got {longest + 1} tokens per row"):
        model(torch.full((1, longest + 1), 7))


def test_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone: got a decoder"):
        fastkd.EarlyExitConfig(BertConfig(is_decoder=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_reaches_every_parameter(family: str) -> None:
    model = early_exit_model(family).train()
    model(**random_batch(family), labels=torch.arange(13) % 3).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    students = {name for name, _ in model.named_parameters() if name.startswith("heads.")} - {
        f"heads.{LAYERS - 1}.{name}" for name, _ in model.last_head.named_parameters()
    }
    assert set(trained) == {name for name, _ in model.named_parameters()} - students
