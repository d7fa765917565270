"""Adapters of peft: trained as peft trains them, saved as an adapter, loaded and merged to the same answers."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
pytest.importorskip("peft", reason="peft is not installed: pip install peft")

import peft
import torch
from tiny_models import CONFIGS, early_exit_model, one_thread, random_batch, save_plain_checkpoint, tokenizer_of
from transformers import AutoModelForSequenceClassification

import fastkd
from fastkd import KDOptions, KDTrainer
from fastkd.exits.fingerprints import model_fingerprint
from fastkd.exits.merged_state import merged_state

__all__ = ["one_thread"]

Model = fastkd.EarlyExitForSequenceClassification
TRAIN = [("the film was good", 1), ("a bad plot", 0), ("the actor was not dull", 1), ("cold and boring", 0)]
DEV = [("a great film", 1), ("a dull actor", 0)]
BATCH = random_batch(rows=6, longest=9)
LINEAR = ["query", "value", "dense"]


def options(**changes: Any) -> dict[str, Any]:
    return {"max_steps": 3, "batch_size": 2, "max_length": 12, "progress": False, "bf16": False} | changes


def saved_base(folder: Path, **options: Any) -> Model:
    early_exit_model(num_labels=2, **options).save_pretrained(folder)
    return Model.from_pretrained(folder).eval()


def adapted(base: Model, **changes: Any) -> Any:
    """A LoRA of the encoder and all heads, whose weights are no longer the neutral ones it begins with."""
    config: dict[str, Any] = {"r": 2, "task_type": "SEQ_CLS", "target_modules": LINEAR, "modules_to_save": ["heads"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ("modules_to_save" in name and parameter.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def answers(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH, **options).logits


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("kept", [None, ["heads"]])
def test_a_peft_model_answers_as_its_merged_model(tmp_path: Path, head: str, kept: list[str] | None) -> None:
    model = adapted(saved_base(tmp_path / "base", head=head), modules_to_save=kept)
    full, early = answers(model), answers(model, speed=0.5)
    core = model.get_base_model()
    state = merged_state(core)
    fingerprint = model_fingerprint(core)
    stream = [row.label for row in core.stream(["the film", "a bad plot"], tokenizer_of("bert"), speed=0.5)]
    merged = model.merge_and_unload()
    torch.testing.assert_close(answers(merged), full)
    torch.testing.assert_close(answers(merged, speed=0.5), early)
    assert merged_state(merged).keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in merged_state(merged).items())
    assert model_fingerprint(merged) == fingerprint
    assert [row.label for row in merged.stream(["the film", "a bad plot"], tokenizer_of("bert"), speed=0.5)] == stream
    merged.save_pretrained(tmp_path / "merged")
    loaded = Model.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(answers(loaded), full)
    assert loaded.state_dict().keys() == saved_base(tmp_path / "other", head=head).state_dict().keys()


def test_merging_is_no_change_and_other_weights_are_one(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=LINEAR))
    assert base.changed_weights() is None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert base.changed_weights() is not None
    base.confirm_weights()
    assert model.merge_and_unload().changed_weights() is None


def test_what_is_disabled_does_not_count(tmp_path: Path) -> None:
    model = adapted(saved_base(tmp_path / "base"))
    plain = Model.from_pretrained(tmp_path / "base").eval()
    with model.disable_adapter():
        state = merged_state(model.get_base_model())
        torch.testing.assert_close(answers(model), answers(plain))
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_finetune_and_distill_train_what_peft_trains(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base")
    model = adapted(base)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def changed() -> set[str]:
        return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}

    tokenizer = tokenizer_of("bert")
    result = fastkd.finetune(model, TRAIN, DEV, tmp_path / "tuned", fastkd.FinetuneOptions(**options()), tokenizer)
    assert "accuracy" in result.metrics
    assert changed() <= trainable.keys()
    assert any("lora_A" in name for name in changed())
    assert any("modules_to_save.default.3" in name for name in changed())
    assert not any(f"modules_to_save.default.{number}." in name for name in changed() for number in range(3))
    assert not base.config.exits_trained
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable.keys()

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fastkd.distill(model, TRAIN, DEV, tmp_path / "model", fastkd.DistillOptions(**options()), tokenizer)
    assert changed()
    assert all(any(f"modules_to_save.default.{number}." in name for number in range(3)) for name in changed())
    assert base.config.exits_trained
    assert base.changed_weights() is None

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    along = fastkd.DistillOptions(**options(), train_backbone=True)
    fastkd.distill(model, TRAIN, DEV, tmp_path / "along", along, tokenizer)
    assert changed() <= trainable.keys()
    assert any("lora_A" in name for name in changed())
    assert {f"modules_to_save.default.{number}" for number in range(4)} <= {
        ".".join(part[:3]) for name in changed() if (part := name.split(".heads.")[-1].split(".")) and "heads" in name
    }


@pytest.mark.parametrize("start", ["saved", "plain"])
def test_a_trained_adapter_is_saved_as_one_and_loads_to_the_same_answers(tmp_path: Path, start: str) -> None:
    if start == "plain":
        save_plain_checkpoint(tmp_path / "base", "bert")
        base = Model.from_pretrained(tmp_path / "base", num_labels=2, head_width=16)
    else:
        base = saved_base(tmp_path / "base")
    model, tokenizer = adapted(base), tokenizer_of("bert")
    names = [(text, ["bad", "good"][label]) for text, label in TRAIN]
    rows = fastkd.load_rows([{"text": text, "label": label} for text, label in names])
    fastkd.finetune(model, rows, None, tmp_path / "tuned", fastkd.FinetuneOptions(**options()), tokenizer)
    fastkd.distill(model, rows, None, tmp_path / "model", fastkd.DistillOptions(**options()), tokenizer)
    folder = tmp_path / "model"
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "trainer_log.json"} <= files
    assert "model.safetensors" not in files
    full, early = answers(model), answers(model, speed=0.5)

    if start == "saved":
        by_peft = peft.PeftModel.from_pretrained(Model.from_pretrained(tmp_path / "base"), folder).eval()
        assert torch.equal(answers(by_peft), full)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = Model.from_pretrained(folder).eval()
        torch.testing.assert_close(answers(loaded, speed=0.5), early)
    torch.testing.assert_close(answers(loaded), full)
    assert loaded.config.exits_trained
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    assert loaded.changed_weights() is None
    assert set(loaded.seen_rows) == {"finetune train", "distill train"}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    model_again, tokenizer_again = fastkd.load_model(str(folder), "cpu")
    torch.testing.assert_close(answers(model_again), full)
    assert len(tokenizer_again) == len(tokenizer)

    loaded.save_pretrained(tmp_path / "merged")
    merged = Model.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(answers(merged), answers(loaded))
    assert merged.changed_weights() is None


def test_a_certificate_follows_the_adapter(tmp_path: Path) -> None:
    model = adapted(saved_base(tmp_path / "base"))
    core = model.get_base_model()
    core.confirm_weights()
    trace = core.trace([random_batch(rows=400, longest=6, seed=4)])
    certificate = fastkd.calibrate(trace, 0.95, speeds=[0.05])
    merged = model.merge_and_unload()
    certificate.apply(merged, set_default=True)
    merged.save_pretrained(tmp_path / "merged")
    loaded = Model.from_pretrained(tmp_path / "merged")
    assert loaded.config.certificate == certificate.to_dict()
    assert loaded.changed_weights() is None


def test_an_adapter_without_our_configuration_loads_upon_that_of_its_base(tmp_path: Path) -> None:
    model = adapted(saved_base(tmp_path / "base"))
    full = answers(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(answers(Model.from_pretrained(tmp_path / "adapter").eval()), full)


def test_what_could_not_be_trained_or_loaded_again_is_refused(tmp_path: Path) -> None:
    tokenizer, tuning = tokenizer_of("bert"), fastkd.FinetuneOptions(**options())

    def refused(model: Any, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            fastkd.finetune(model, TRAIN, None, tmp_path / "out", tuning, tokenizer)

    refused(adapted(early_exit_model(num_labels=2)), "no folder or name to reload it from")
    save_plain_checkpoint(tmp_path / "plain", "bert")
    plain = Model.from_pretrained(tmp_path / "plain", num_labels=2)
    refused(adapted(plain, modules_to_save=None), r"heads are new .* modules_to_save=\['heads'\]")
    prompt = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=2, num_layers=4, num_attention_heads=4, token_dim=32
    )
    refused(peft.get_peft_model(saved_base(tmp_path / "a"), prompt), "PROMPT_TUNING.*puts tokens before the input")
    base = saved_base(tmp_path / "b")
    several = adapted(base)
    refused(base, "heads is a peft adapter|is a peft adapter.*pass the PeftModel")
    several.add_adapter("second", peft.LoraConfig(r=2, target_modules=LINEAR))
    refused(several, "the adapters default, second; expected one")
    headless = adapted(
        saved_base(tmp_path / "c"), modules_to_save=None, task_type=None, target_modules=r".*attention.*query"
    )
    with pytest.raises(
        ValueError, match=r"trains none of the weights that are trained here; .*modules_to_save=\['heads'\]"
    ):
        fastkd.distill(headless, TRAIN, None, tmp_path / "out", fastkd.DistillOptions(**options()), tokenizer)
    assert not (tmp_path / "out").exists()


def test_an_adapter_folder_without_base_or_peft_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(saved_base(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        with pytest.raises(ModuleNotFoundError, match="pip install peft"):
            Model.from_pretrained(tmp_path / "adapter")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model its adapter is for"):
        Model.from_pretrained(tmp_path / "adapter")


def test_a_finetuned_model_is_the_base_of_the_next_adapter(tmp_path: Path) -> None:
    """In memory it is what lies in the folder, not what it was loaded from."""
    built = early_exit_model(num_labels=2)
    built.save_pretrained(tmp_path / "built")
    assert adapted(built).peft_config["default"].base_model_name_or_path == str(tmp_path / "built")
    base, tokenizer = saved_base(tmp_path / "base"), tokenizer_of("bert")
    fastkd.finetune(base, TRAIN, None, tmp_path / "tuned", fastkd.FinetuneOptions(**options()), tokenizer)
    assert adapted(base).peft_config["default"].base_model_name_or_path == str(tmp_path / "tuned")


def saved_classifier(folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS["bert"])
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("method", ["kd", "universal-il", "annealing", "rail-kd"])
def test_a_student_of_peft_learns_what_peft_trains(tmp_path: Path, method: str) -> None:
    saved_classifier(tmp_path / "teacher", 1)
    student = peft.get_peft_model(
        saved_classifier(tmp_path / "base", 2),
        peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"]),
    )
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    trainer = KDTrainer(tmp_path / "teacher", student, method, KDOptions(**options()))
    trainer.train(TRAIN, DEV, tmp_path / "student")
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= trainable
    assert any("classifier.modules_to_save" in name for name in changed)
    assert trainer.model is student
    assert not list((tmp_path / "student").glob("model.*"))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "student").eval()
    assert torch.equal(answers(again), answers(student))
    # transformers finds the base by itself
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(answers(alone), answers(student))
    torch.testing.assert_close(answers(student.merge_and_unload()), answers(again))
    with pytest.raises(ValueError, match=r"student: .* holds an adapter; load it with PeftModel.from_pretrained"):
        KDTrainer(tmp_path / "teacher", tmp_path / "student", "kd", KDOptions(**options()))


def test_an_early_exit_student_of_peft_keeps_its_last_head(tmp_path: Path) -> None:
    saved_classifier(tmp_path / "teacher", 1)
    student = adapted(saved_base(tmp_path / "base"))
    KDTrainer(tmp_path / "teacher", student, "kd", KDOptions(**options())).train(TRAIN, DEV, tmp_path / "student")
    full = answers(student, speed=0.0)
    loaded = Model.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(answers(loaded, speed=0.0), full)
    assert not loaded.config.exits_trained
    assert set(loaded.seen_rows) == {"kd train", "kd dev"}


def test_students_of_peft_that_could_not_be_loaded_again_are_refused(tmp_path: Path) -> None:
    saved_classifier(tmp_path / "teacher", 1)
    save_plain_checkpoint(tmp_path / "plain", "bert")
    new = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", num_labels=2)
    lora = peft.LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(ValueError, match="student: its classifier is new and the adapter does not keep it"):
        KDTrainer(tmp_path / "teacher", peft.get_peft_model(new, lora), "kd", KDOptions(**options()))
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    base = saved_classifier(tmp_path / "base", 2)
    with pytest.raises(ValueError, match=r"student: its adapter .* puts tokens before the input"):
        KDTrainer(tmp_path / "teacher", peft.get_peft_model(base, prompts), "kd", KDOptions(**options()))
