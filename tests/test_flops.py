"""Operation counts: FastBERT's published numbers, and what the modules of a real model add up to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, LAYERS, early_exit_model, one_thread, random_batch  # noqa: F401  # one is a fixture
from torch.nn import functional as F
from transformers import BertConfig

import fastkd
from fastkd.exits.flops import CONVENTIONS, FlopsShape

BASE = BertConfig()


def test_fastbert_prints_the_full_model_so() -> None:
    assert fastkd.flops(BASE, convention="fastbert_float32") == 21_785_247_744
    assert fastkd.flops(BASE, num_labels=4, convention="fastbert_float32") == 21_785_247_744
    assert fastkd.flops(BASE) == fastkd.flops(BASE, seq_len=128, layers=12, heads=1, num_labels=2) == 21_785_248_256
    assert fastkd.flops(BASE, num_labels=4) == 21_785_248_768


def test_fastbert_prints_the_first_exit_so() -> None:
    for convention in ("fastbert", "fastbert_float32"):
        assert fastkd.flops(BASE, layers=1, convention=convention) == 1_853_915_648
        assert fastkd.flops(BASE, layers=1, num_labels=4, convention=convention) == 1_853_916_160
    assert fastkd.flops(BASE) / fastkd.flops(BASE, layers=1) == pytest.approx(11.75, abs=0.005)


def test_fastbert_prints_the_worst_case_so() -> None:
    assert fastkd.flops(BASE, heads=12, convention="fastbert_float32") == 22_246_981_632
    assert fastkd.flops(BASE, heads=12) == 12 * fastkd.flops(BASE, layers=1) == 22_246_987_776


def test_later_tools_print_multiply_accumulates() -> None:
    assert fastkd.flops(BASE, convention="macs") == 10_892_624_128
    assert fastkd.flops(BASE, num_labels=4, convention="macs") == 10_892_624_384
    assert fastkd.flops(BASE, layers=1, convention="macs") == 926_957_824
    assert fastkd.flops(BASE, heads=12, convention="macs") == 11_123_493_888


def test_all_matmuls_add_both_products_of_every_attention() -> None:
    assert fastkd.flops(BASE, layers=1, heads=0, convention="all_matmuls") == 1_811_939_328 + 50_331_648
    assert fastkd.flops(BASE, layers=0, convention="all_matmuls") == 41_975_808 + 512 + 8_388_608
    assert fastkd.flops(BASE, convention="all_matmuls") == 21_785_248_256 + 12 * 50_331_648 + 8_388_608


def _counted(model: Any, batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """2 * in * out * tokens of each linear layer that runs, and 4 * T * T * d of every attention product of a layer."""
    model._driver.check(model.backbone)  # which runs some tokens of its own, the first time
    counts = {"linear": 0, "attention": 0}
    linear, attention = F.linear, F.scaled_dot_product_attention

    def counted_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        counts["linear"] += 2 * inputs.numel() * weight.shape[0]
        return linear(inputs, weight, bias)

    def counted_attention(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts["attention"] += 4 * query.numel() * key.shape[-2]
        return attention(query, key, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", counted_linear)
        patched.setattr(F, "scaled_dot_product_attention", counted_attention)
        model(**batch)  # with gradients on, so that the heads run unfolded
    return counts["linear"], counts["attention"]


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_counts_are_those_of_the_layers_that_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seq_len, width = 9, 16
    model = early_exit_model(family, head="linear", num_labels=5)
    batch = {name: value[:1] for name, value in random_batch(family, longest=seq_len).items()}
    linear, attention = _counted(model, batch, monkeypatch)
    if family == "megatron-bert":  # whose attention is written out in transformers
        attention += LAYERS * 4 * seq_len * seq_len * model.config.hidden_size
    assert fastkd.flops(model.config, seq_len) == linear
    assert fastkd.flops(model.config, seq_len, convention="all_matmuls") == linear + attention

    model = early_exit_model(family, num_labels=5, head_width=width)
    linear, attention = _counted(model, batch, monkeypatch)
    if family == "megatron-bert":
        attention += LAYERS * 4 * seq_len * seq_len * model.config.hidden_size
    # the model asks one query of each head, FastBERT's script all of them
    queries_not_run = seq_len - 1
    expected = linear + queries_not_run * 2 * (2 * width * width)
    assert fastkd.flops(model.config, seq_len) == expected
    expected += attention + queries_not_run * 4 * seq_len * width
    assert fastkd.flops(model.config, seq_len, convention="all_matmuls") == expected


def test_defaults_come_from_the_config() -> None:
    config = early_exit_model(num_labels=7, head_width=32).config
    assert fastkd.flops(config) == fastkd.flops(config, layers=LAYERS, num_labels=7)
    assert fastkd.flops(config) == fastkd.flops(FlopsShape.of(config))
    assert FlopsShape.of(config).head_width == 32
    assert FlopsShape.of(CONFIGS["electra"]).embedding_size == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"convention": "flops"}, "convention: got 'flops', expected one of fastbert, macs, all_matmuls"),
        ({"layers": 13}, r"layers: got 13, expected 0 to 12 \(this backbone's depth\)"),
        ({"layers": -1}, "layers: got -1"),
        ({"heads": 13}, "heads: got 13"),
        ({"seq_len": 0}, "seq_len: got 0, expected at least 1"),
        ({"num_labels": 0}, "num_labels: got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastkd.flops(BASE, **arguments)


def test_sweeps_show_these_conventions() -> None:
    assert CONVENTIONS == ("fastbert", "macs", "all_matmuls")
