"""Students compute what their layers say, ignore padding, are saved and loaded, and start from their teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

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
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fastkd.kd.probe import LayerProbe, PseudoClassifiers, encoder_layers
from fastkd.kd.students import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
    GatedCNNConfig,
    GatedCNNForSequenceClassification,
    chosen_layers,
    projected_embeddings,
    student_from_teacher,
)
from fastkd.losses import UniversalKDLoss, UniversalKDMixtureLoss

SMALL: dict[str, Any] = {"vocab_size": 50, "embedding_size": 12, "hidden_size": 16, "num_labels": 3}
NEW = ("bilstm", "gated-cnn")


def teacher_of(family: str, num_labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(4)
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = num_labels
    return AutoModelForSequenceClassification.from_config(config).eval()


def new_student(kind: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(5)
    if kind == "bilstm":
        return BiLSTMForSequenceClassification(BiLSTMConfig(**{**SMALL, **options})).eval()
    return GatedCNNForSequenceClassification(GatedCNNConfig(**{**SMALL, **options})).eval()


def small_batch() -> dict[str, Tensor]:
    batch = random_batch("bert")
    return {"input_ids": batch["input_ids"] % 45 + 1, "attention_mask": batch["attention_mask"]}


# The students' own layers


@torch.no_grad()
def test_bilstm_is_an_lstm_read_in_both_directions() -> None:
    model, batch = new_student("bilstm", num_hidden_layers=1), small_batch()
    lstm = model.layers[0].lstm
    hidden = LayerProbe(model, lambda hidden, mask: hidden.flatten(1))(**batch).hidden_states[0]
    hidden = hidden.view(*batch["input_ids"].shape, 16)
    embedded = model.embeddings_norm(model.embeddings(batch["input_ids"]))
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for suffix, order, columns in (("", 1, slice(0, 8)), ("_reverse", -1, slice(8, 16))):
            state = cell = torch.zeros(8)
            w_i, w_h = getattr(lstm, f"weight_ih_l0{suffix}"), getattr(lstm, f"weight_hh_l0{suffix}")
            bias = getattr(lstm, f"bias_ih_l0{suffix}") + getattr(lstm, f"bias_hh_l0{suffix}")
            for position in list(range(length))[::order]:
                gates = (w_i @ embedded[row, position] + w_h @ state + bias).chunk(4)
                cell = gates[1].sigmoid() * cell + gates[0].sigmoid() * gates[2].tanh()
                state = gates[3].sigmoid() * cell.tanh()
                torch.testing.assert_close(hidden[row, position, columns], state)
        assert hidden[row, length:].abs().max() == 0 if length < hidden.shape[1] else True


@torch.no_grad()
def test_gated_cnn_is_a_gated_convolution() -> None:
    model, batch = new_student("gated-cnn", num_hidden_layers=2, embedding_size=16, kernel_size=5), small_batch()
    hidden = LayerProbe(model, lambda hidden, mask: hidden.flatten(1))(**batch).hidden_states
    hidden = hidden.view(2, *batch["input_ids"].shape, 16)
    embedded = model.embeddings_norm(model.embeddings(batch["input_ids"]))
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        x = embedded[row, :length]
        for layer in range(2):
            convolution = model.layers[layer].convolution
            padded = F.pad(x, (0, 0, 2, 2))
            window = torch.stack([padded[k : k + length] for k in range(5)], dim=-1)
            both = torch.einsum("oik,tik->to", convolution.weight, window) + convolution.bias
            x = x + both[:, :16] * both[:, 16:].sigmoid()
            torch.testing.assert_close(hidden[layer, row, :length], x, rtol=1e-4, atol=1e-5)


def test_gated_cnn_changes_width_without_a_residual() -> None:
    model = new_student("gated-cnn", num_hidden_layers=2)
    assert [layer.residual for layer in model.layers] == [False, True]


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("pool", ["mean", "max", "last", "cls"])
@torch.no_grad()
def test_padding_changes_nothing(kind: str, pool: str) -> None:
    model, batch = new_student(kind, pool=pool), small_batch()
    probe = LayerProbe(model)
    together = probe(**batch)
    wider = probe(
        input_ids=F.pad(batch["input_ids"], (0, 4), value=7), attention_mask=F.pad(batch["attention_mask"], (0, 4))
    )
    torch.testing.assert_close(wider.logits, together.logits)
    torch.testing.assert_close(wider.hidden_states, together.hidden_states)
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        alone = probe(input_ids=batch["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(alone.logits[0], together.logits[row])
        torch.testing.assert_close(alone.hidden_states[:, 0], together.hidden_states[:, row])
    # the classifier reads what the probe shows of the last layer
    torch.testing.assert_close(model.classifier(together.hidden_states[-1]), together.logits)


@pytest.mark.parametrize("kind", NEW)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, batch = new_student(kind, id2label={0: "no", 1: "yes", 2: "perhaps"}, pool="max"), small_batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert loaded.config.pool == AutoConfig.from_pretrained(tmp_path).pool == "max"
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", NEW)
def test_every_layer_of_a_student_learns(kind: str) -> None:
    """Pseudo-classifiers on the students' layers and the whole Universal-KD loss, the paper's CA setting."""
    student, batch = new_student(kind, num_hidden_layers=3).train(), small_batch()
    rows = len(batch["input_ids"])
    heads = PseudoClassifiers(2, 16, 3)
    output = LayerProbe(student)(**batch)
    loss = UniversalKDMixtureLoss(UniversalKDLoss.cross_architecture())
    loss(heads(output.hidden_states, output.logits), torch.randn(6, rows, 3), torch.randint(3, (rows,))).backward()
    for module in (student, heads):
        for name, parameter in module.named_parameters():
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", NEW)
def test_loss_and_outputs(kind: str) -> None:
    batch = small_batch()
    rows = len(batch["input_ids"])
    model, labels = new_student(kind), torch.randint(3, (rows,))
    output = model(**batch, labels=labels, token_type_ids=torch.zeros(1))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert isinstance(model(**batch, labels=labels, return_dict=False), tuple)
    scores = torch.rand(rows)
    output = new_student(kind, num_labels=1)(**batch, labels=scores)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], scores))


@pytest.mark.parametrize("kind", NEW)
def test_masks_that_would_give_wrong_answers_are_errors(kind: str) -> None:
    model, ids = new_student(kind), torch.ones(2, 3, dtype=torch.long)
    for mask in ([[0, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]]):
        with pytest.raises(ValueError, match="attention_mask: a row has no tokens, or padding before a token"):
            model(ids, torch.tensor(mask))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 2\), expected \(2, 3\)"):
        model(ids, torch.ones(2, 2))


def test_configurations_are_checked() -> None:
    with pytest.raises(ValueError, match="hidden_size: got 15, expected an even number"):
        BiLSTMConfig(hidden_size=15)
    with pytest.raises(ValueError, match="kernel_size: got 4, expected an odd number"):
        GatedCNNConfig(kernel_size=4)
    with pytest.raises(ValueError, match="pool: got 'sum', expected one of cls, mean, max, last"):
        BiLSTMConfig(pool="sum")
    with pytest.raises(ValueError, match="num_hidden_layers: got 0"):
        GatedCNNConfig(num_hidden_layers=0)
    with pytest.raises(ValueError, match="problem_type: got 'multi_label_classification'"):
        BiLSTMConfig(problem_type="multi_label_classification")


# Students made of a teacher


@pytest.mark.parametrize(
    ("spec", "teacher_layers", "expected"),
    [
        ("layers:3", 6, (1, 3, 5)),
        ("layers:6", 12, (1, 3, 5, 7, 9, 11)),
        ("layers:4", 12, (2, 5, 8, 11)),
        ("layers:5", 12, (1, 3, 6, 8, 11)),
        ("layers:1", 6, (5,)),
        ("layers:6", 6, (0, 1, 2, 3, 4, 5)),
        ("layers:3:first", 6, (0, 1, 2)),
        ("layers:3:last", 6, (3, 4, 5)),
        ("layers:0,2,4", 6, (0, 2, 4)),
        ("layers:0,2,4,7,9,11", 12, (0, 2, 4, 7, 9, 11)),
        ("layers:5,5", 6, (5, 5)),
    ],
)
def test_chosen_layers(spec: str, teacher_layers: int, expected: tuple[int, ...]) -> None:
    assert chosen_layers(spec, teacher_layers) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layers:7", "spec: got 'layers:7', expected 1 to 6 layers"),
        ("layers:0", "spec: got 'layers:0', expected 1 to 6 layers"),
        ("layers:1,6", "spec: got 'layers:1,6', expected layers from 0 to 5"),
        ("layers:", "spec: got 'layers:', expected \"layers:K\""),
        ("layers:three", "spec: got 'layers:three', expected \"layers:K\""),
        ("layers:3:middle", "spec: got 'layers:3:middle', expected \"layers:K\""),
        ("layers:0,1:first", "spec: got 'layers:0,1:first', expected \"layers:K\""),
    ],
)
def test_layers_that_do_not_exist(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen_layers(spec, 6)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@torch.no_grad()
def test_shallower_teacher(family: str) -> None:
    teacher, batch = teacher_of(family), random_batch(family)
    student = student_from_teacher(teacher, "layers:0,3")
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == len(encoder_layers(student)) == 2
    assert teacher.config.num_hidden_layers == LAYERS
    assert student.config.name_or_path == ""

    # the teacher without the layers between
    pruned = copy.deepcopy(teacher)
    layers = encoder_layers(pruned)
    del layers[1:3]
    pruned.config.num_hidden_layers = 2
    torch.testing.assert_close(student.eval()(**batch).logits, pruned(**batch).logits)

    before = teacher(**batch).logits
    for parameter in student.parameters():
        parameter.add_(1)
    torch.testing.assert_close(teacher(**batch).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_all_layers_are_the_teacher_itself(family: str, tmp_path: Path) -> None:
    teacher, batch = teacher_of(family), random_batch(family)
    student = student_from_teacher(teacher, f"layers:{LAYERS}").eval()
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, rtol=0, atol=0)
    student_from_teacher(teacher, "layers:2").save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_hidden_layers == 2


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_classifier_can_start_anew(family: str) -> None:
    teacher = teacher_of(family)
    student = student_from_teacher(teacher, "layers:2", copy_classifier=False)
    prefix = teacher.base_model_prefix
    weights = teacher.state_dict()
    for name, value in student.state_dict().items():
        copied = name in weights and name.startswith(prefix) and "layer." not in name
        if copied:
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
        elif not name.startswith(prefix) and name.endswith("weight"):
            assert not torch.equal(value, weights[name]), name


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("kind", NEW)
def test_other_architectures(family: str, kind: str, tmp_path: Path) -> None:
    teacher, batch = teacher_of(family, num_labels=5), random_batch(family)
    teacher.config.id2label = {index: f"label {index}" for index in range(5)}
    student = student_from_teacher(teacher, kind, hidden_size=18, num_hidden_layers=2, embedding_size=10).eval()
    assert student.config.id2label == teacher.config.id2label
    assert student.config.pad_token_id == teacher.config.pad_token_id
    assert student.embeddings.weight.shape == (320, 10)
    assert student.embeddings.weight[teacher.config.pad_token_id].abs().max() == 0
    output = LayerProbe(student)(**batch)
    assert output.hidden_states.shape == (2, len(batch["input_ids"]), 18)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, output.logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "roberta"])  # whose padding tokens differ
@pytest.mark.parametrize("kind", NEW)
def test_other_architectures_of_an_early_exit_model(family: str, kind: str, tmp_path: Path) -> None:
    early_exit_model(family, num_labels=5).save_pretrained(tmp_path)
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    student = student_from_teacher(teacher, kind, hidden_size=18, embedding_size=HIDDEN)
    assert student.config.num_labels == 5
    padding = CONFIGS[family].pad_token_id
    assert student.config.pad_token_id == padding
    rows = torch.arange(320) != padding
    assert torch.equal(student.embeddings.weight[rows], teacher.get_input_embeddings().weight[rows])
    assert student.embeddings.weight[padding].abs().max() == 0


@torch.no_grad()
def test_embeddings_keep_the_dot_products_of_words_as_well_as_any() -> None:
    table = torch.randn(200, 24) * torch.linspace(3, 0.1, 24)
    small = projected_embeddings(table, 8)
    u, s, _ = torch.linalg.svd(table.double(), full_matrices=False)
    best = (u[:, :8] * s[:8].square()) @ u[:, :8].T
    torch.testing.assert_close(small @ small.T, best.float(), rtol=1e-3, atol=1e-3)
    assert (small.norm(dim=0).diff() <= 0).all(), "strongest first"
    assert torch.equal(projected_embeddings(table, 24), table)
    assert projected_embeddings(table, 24).data_ptr() != table.data_ptr()


def test_a_new_student_with_its_own_embeddings() -> None:
    teacher = teacher_of("bert")
    torch.manual_seed(0)
    student = student_from_teacher(teacher, "bilstm", copy_embeddings=False, embedding_size=100, hidden_size=8)
    assert student.embeddings.weight.shape == (320, 100)
    with pytest.raises(ValueError, match="embedding_size: got 100, expected at most the 32 of the teacher's"):
        student_from_teacher(teacher, "bilstm", embedding_size=100)
    assert student_from_teacher(teacher, "gated-cnn", hidden_size=8).config.embedding_size == HIDDEN


def test_a_checkpoint_folder(tmp_path: Path) -> None:
    small = copy.deepcopy(CONFIGS["bert"])
    small.num_hidden_layers = 1
    AutoModelForSequenceClassification.from_config(small).save_pretrained(tmp_path)
    teacher = teacher_of("bert", num_labels=2)
    teacher.config.id2label = {0: "bad", 1: "good"}
    teacher.config.label2id = {"bad": 0, "good": 1}
    student = student_from_teacher(teacher, str(tmp_path))
    assert len(encoder_layers(student)) == 1
    assert student.config.id2label == {0: "bad", 1: "good"}
    assert isinstance(student.classifier, nn.Linear)


def test_errors() -> None:
    teacher = teacher_of("bert")
    with pytest.raises(ValueError, match=r"spec: got 'lstm', expected \"layers:K\".* or a checkpoint folder"):
        student_from_teacher(teacher, "lstm")
    with pytest.raises(ValueError, match="hidden_size: 'layers:2' takes no options"):
        student_from_teacher(teacher, "layers:2", hidden_size=4)
    with pytest.raises(ValueError, match="BiLSTMForSequenceClassification has no encoder of its own"):
        student_from_teacher(student_from_teacher(teacher, "bilstm"), "layers:1")
    albert = tiny_config("albert")
    with pytest.raises(ValueError, match="AlbertForSequenceClassification has layers that share weights"):
        student_from_teacher(AutoModelForSequenceClassification.from_config(albert), "layers:1")


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert", "mpnet"])
@torch.no_grad()
def test_layers_of_any_encoder_make_a_student(family: str) -> None:
    config = tiny_config(family)
    config.num_labels = 3
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = random_inputs(99)
    whole = student_from_teacher(teacher, "layers:0,1,2")
    torch.testing.assert_close(whole(**inputs).logits, teacher(**inputs).logits)
    student = student_from_teacher(teacher, "layers:0,2")
    before = LayerProbe(teacher)(**inputs).hidden_states
    assert (len(LayerProbe(student)(**inputs).hidden_states), len(before)) == (2, 3)
    kinds = getattr(config, "layer_types", None)
    assert kinds is None or student.config.layer_types == [kinds[0], kinds[2]]
    if family == "modernbert":
        with pytest.raises(
            ValueError, match="the layers 1, 2 of ModernBertForSequenceClassification have other weights"
        ):
            student_from_teacher(teacher, "layers:1,2")


def test_dtype_follows_the_teacher_and_frozen_weights_do_not() -> None:
    teacher = teacher_of("bert").to(torch.bfloat16).requires_grad_(False)
    for spec in ("layers:2", "bilstm"):
        student = student_from_teacher(teacher, spec)
        assert not student.training
        assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
        assert all(parameter.requires_grad for parameter in student.parameters())
