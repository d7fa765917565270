"""A distillation step with the teacher's answers cached, and with the teacher run in every step.

    pytest bench/bench_kd_trainer.py

Both take the same batches through collator, student, loss, backward pass and AdamW, at a learning rate of 0, so that
every step sees the same student; dropout is off. Their losses are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import datasets
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from fastkd.data.batches import padding_collator, tokenize
from fastkd.data.rows import Rows
from fastkd.kd.cache import TeacherCache, example_ids
from fastkd.kd.methods import Shapes, method_of
from fastkd.kd.stage_run import AnswerCollator, StudentObjective
from fastkd.kd.students import student_from_teacher
from fastkd.kd.teacher import PseudoClassifierOptions, Teacher
from fastkd.training.harness import bf16_is_fast

LAYERS, STUDENT_LAYERS, WIDTH, ROWS, TOKENS = 6, 3, 384, 32, 64
WORDS = [f"w{number}" for number in range(1000)]


@pytest.fixture(scope="module")
def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    # with [CLS] and [SEP] every row has TOKENS tokens
    drawn = torch.randint(len(WORDS), (ROWS, TOKENS - 2), generator=generator).tolist()
    columns = {
        "text_a": [" ".join(WORDS[word] for word in row) for row in drawn],
        "label": [i % 2 for i in range(ROWS)],
    }
    return Rows(datasets.Dataset.from_dict(columns), None, 2, "generated")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """The size of MiniLM: 6 layers, 384 wide."""
    torch.manual_seed(0)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate([*specials, *WORDS])})
    config = BertConfig(
        vocab_size=30522, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=12,
        intermediate_size=4 * WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Teacher(BertForSequenceClassification(config).to(common.DEVICE), tokenizer)


def make_step(
    teacher: Teacher, rows: Rows, cache: TeacherCache | None, method: str, bf16: bool
) -> Callable[[], Tensor]:
    """One whole training step, collation included; gives its loss."""
    stage = method_of(method).stages[0]
    shapes = Shapes(STUDENT_LAYERS, LAYERS, WIDTH, WIDTH)
    torch.manual_seed(1)
    student = student_from_teacher(teacher.model, f"layers:{STUDENT_LAYERS}")
    student.get_input_embeddings().requires_grad_(False)
    objective = StudentObjective(stage, student, stage.loss(shapes, {}), teacher, None).to(common.DEVICE).train()
    optimizer = torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=0.0, fused=True)
    tokens = tokenize(rows, teacher.tokenizer, TOKENS).remove_columns("length")
    numbered = [{**tokens[number], "example": number} for number in range(len(tokens))]
    collate = AnswerCollator(padding_collator(teacher.tokenizer), cache, example_ids(rows), stage)

    def step() -> Tensor:
        batch = collate([dict(row) for row in numbered])
        batch = {name: value.to(common.DEVICE) for name, value in batch.items()}
        with torch.autocast(common.DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = objective(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@pytest.mark.parametrize("method", ["universal-il", "kd"])
@pytest.mark.parametrize("bf16", [False, True])
def test_cached_step(compare: Any, teacher: Teacher, rows: Rows, tmp_path: Path, method: str, bf16: bool) -> None:
    if bf16 and not bf16_is_fast():
        pytest.skip("this device emulates bfloat16")
    options = PseudoClassifierOptions(epochs=1)
    cache = TeacherCache(tmp_path / "cache", teacher, TOKENS, bf16=bf16, pseudo_classifiers=options, batch_size=ROWS)
    cache.ensure(rows, {*method_of(method).teacher_kinds, "layer_logits"})
    cached = make_step(teacher, rows, cache, method, bf16)
    live = make_step(teacher, rows, None, method, bf16)
    expected = live()

    def check(loss: Tensor, *inputs: Sequence[Any]) -> None:
        torch.testing.assert_close(loss, expected, rtol=1e-2 if bf16 else 1e-5, atol=0)

    compare(
        "kd trainer",
        f"{method}, {LAYERS} -> {STUDENT_LAYERS} layers, B={ROWS} T={TOKENS} {'bf16' if bf16 else 'fp32'}",
        {common.OURS: cached, "teacher in every step": live},
        lambda: (),
        check,
        uncapturable=(common.OURS, "teacher in every step"),
        sampling=replace(common.Sampling(), case_seconds=8.0, min_rounds=9),
    )
