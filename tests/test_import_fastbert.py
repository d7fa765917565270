"""Official checkpoints give the official answers, and broken ones are refused by name."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
import torch
from official_fastbert import (
    Official,
    Size,
    counters_of_thop,
    random_checkpoint,
    random_rows,
    read_row,
    vocabulary,
)
from tiny_models import one_thread, save_plain_checkpoint, tokenizer_of  # noqa: F401  # a fixture
from tokenizers.normalizers import NFKC
from transformers import AutoTokenizer, BertTokenizer
from typer.testing import CliRunner

import fastkd
from fastkd.commands import app
from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.input_format import encode, input_format_of, with_input_format
from fastkd.data.rows import Rows
from fastkd.inference.predict import predict
from fastkd.inference.row_reader import InputRow
from fastkd.model import loading
from fastkd.model.import_fastbert import POOLINGS, convert, import_fastbert, read_checkpoint

OFFICIAL_ANSWERS = json.loads(Path(__file__).with_name("official_fastbert.json").read_text(encoding="utf-8"))

# the promise; what is measured stays below 2e-5
LOGITS_WITHIN = 1e-4
SPEEDS = (0.1, 0.5, 0.8)
SEQ_LENGTH = 24

TINY = Size(layers=3, hidden=64, heads=4, feed_forward=96, classes=3)
SIZES = {
    "tiny": TINY,
    "UER tiny, PyPI": Size(layers=3, hidden=384, heads=6, feed_forward=1536),
    "15 classes": Size(layers=5, hidden=128, heads=2, feed_forward=200, classes=15, positions=64),
    "BERT base": Size(layers=12, hidden=768, heads=12, feed_forward=3072, classes=4, positions=32),
}


def save(folder: Path, size: Size, prefix: str = "", **changes: Any) -> tuple[Path, Path]:
    """An official checkpoint file and its vocabulary."""
    folder.mkdir(exist_ok=True)
    state = {**random_checkpoint(size, prefix=prefix), **changes}
    torch.save({name: value for name, value in state.items() if value is not None}, folder / "fastbert.bin")
    (folder / "vocab.txt").write_text("\n".join(vocabulary(size)) + "\n", encoding="utf-8")
    return folder / "fastbert.bin", folder / "vocab.txt"


def as_rows(texts: list[tuple[str, str | None]]) -> Rows:
    columns: dict[str, Any] = {"text_a": [text for text, _ in texts]}
    if texts[0][1] is not None:
        columns["text_b"] = [pair for _, pair in texts]
    return Rows(datasets.Dataset.from_dict(columns), None, None, "generated")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    checkpoint, vocab = save(folder, TINY)
    import_fastbert(checkpoint, folder / "model", vocab=vocab, num_attention_heads=4, max_length=SEQ_LENGTH)
    return folder / "model"


# Parity


@pytest.mark.parametrize(
    ("name", "pairs"),
    [(name, pairs) for name in SIZES for pairs in (False, True) if not (pairs and name == "BERT base")],
)
def test_same_logits_and_exit_layers_as_the_official_model(tmp_path: Path, name: str, pairs: bool) -> None:
    size = SIZES[name]
    checkpoint, vocab = save(tmp_path, size, prefix="kernel." if pairs or "PyPI" in name else "")
    import_fastbert(checkpoint, tmp_path / "model", vocab=vocab, num_attention_heads=size.heads, max_length=SEQ_LENGTH)
    model, tokenizer = loading.load_model(str(tmp_path / "model"), "cpu")
    # some are longer than seq_length, and a pair is cut inside its second text or in the first
    texts = random_rows(size, 6 if size.layers == 12 else 24, longest=30, pairs=pairs)
    encoded = tokenize(as_rows(texts), tokenizer, SEQ_LENGTH)
    batches = LengthSortedBatches(encoded, tokenizer, 5)
    official = Official(torch.load(checkpoint), size)
    official_rows = [read_row(size, *texts[row], SEQ_LENGTH) for row in batches.order]

    with torch.no_grad():
        logits = torch.cat([model.all_exit_logits(**batch) for batch in batches])
    expected = torch.stack([official.all_logits(*row) for row in official_rows])
    assert (logits - expected).abs().max() < LOGITS_WITHIN

    for speed in (0.0, *SPEEDS):
        outputs = [model(**batch, speed=speed) for batch in batches]
        answers = [official.answer(*row, speed) for row in official_rows]
        layers = torch.cat([output.exit_layer for output in outputs]).tolist()
        assert layers == [layer for _, layer in answers]
        given = torch.cat([output.logits for output in outputs])
        assert (given - torch.stack([answer for answer, _ in answers])).abs().max() < LOGITS_WITHIN
        if speed == 0.5:
            assert len(set(layers)) > 1


def test_the_statement_and_the_converted_model_answer_as_the_official_code_did() -> None:
    answers = OFFICIAL_ANSWERS
    state = random_checkpoint(TINY)
    model, official = convert(state, num_attention_heads=4), Official(state, TINY)
    for number, (text, pair) in enumerate(answers["rows"]):
        row = read_row(TINY, text, pair, answers["seq_length"])
        expected = torch.tensor(answers["logits"][number])
        torch.testing.assert_close(official.all_logits(*row), expected, atol=1e-5, rtol=0)
        length = int((row[1] > 0).sum())
        tokens, segments = (part[None, :length] for part in row)
        with torch.no_grad():
            logits = model.all_exit_logits(input_ids=tokens, token_type_ids=segments - 1)
        assert (logits[0] - expected).abs().max() < LOGITS_WITHIN
        for speed, layers in answers["exits"].items():
            output = model(input_ids=tokens, token_type_ids=segments - 1, speed=float(speed))
            assert output.exit_layer.tolist() == [layers[number]]


def test_the_official_statement_masks_padding_and_sees_the_segments() -> None:
    """The oracle itself: what it must depend on, and what not."""
    official = Official(random_checkpoint(TINY), TINY)
    tokens, segments = read_row(TINY, "w1 w2 w3", "w4", 9)
    answer = official.all_logits(tokens, segments)
    torch.testing.assert_close(official.all_logits(*read_row(TINY, "w1 w2 w3", "w4", 20)), answer)
    assert not torch.allclose(official.all_logits(tokens, segments.clamp(max=1)), answer, atol=1e-3)
    assert read_row(TINY, "w1 w2", None, 5)[0].tolist() == [2, 5, 6, 0, 0]


@pytest.mark.parametrize("hidden", [64, 768])
def test_layer_norm_correction_leaves_the_stated_error(hidden: int) -> None:
    size = Size(layers=1, hidden=hidden, heads=2, feed_forward=8)
    state = random_checkpoint(size)
    model = convert(state, num_attention_heads=2)
    norm: Any = model.get_submodule("bert.embeddings.LayerNorm")
    gamma, beta = (state[f"embedding.layer_norm.{name}"].double() for name in ("gamma", "beta"))
    # the weights are exact to float32; the statement is about the arithmetic
    weight = gamma * math.sqrt((hidden - 1) / hidden)
    torch.testing.assert_close(norm.weight.double(), weight, rtol=1e-6, atol=0)
    typical = 0.03 * math.sqrt(3)
    for deviation in (typical / 2, typical, 4 * typical, 1.0, 30.0):
        inputs = torch.randn(40, hidden, dtype=torch.float64)
        inputs = deviation * (inputs - inputs.mean(-1, keepdim=True)) / inputs.std(-1, keepdim=True, correction=0)
        uer = gamma * inputs / (inputs.std(-1, keepdim=True) + 1e-6)
        bert = torch.nn.functional.layer_norm(inputs, (hidden,), weight, None, norm.eps)
        relative = ((bert - uer).norm() / uer.norm()).item()
        # 10 %, because the typical deviation of the embeddings is estimated
        assert relative <= 1.1e-6 / deviation
        if deviation == typical:
            assert relative <= 1e-7 / deviation
    assert beta.shape == (hidden,)


def test_the_correction_is_what_makes_the_logits_agree() -> None:
    """Without it the promise is broken, so the parity tests above cannot pass by luck."""
    size = SIZES["15 classes"]
    state = random_checkpoint(size)
    model = convert(state, num_attention_heads=size.heads)
    row = read_row(size, "w1 w2 w3 w4", None, 5)
    expected = Official(state, size).all_logits(*row)
    with torch.no_grad():
        right = model.all_exit_logits(input_ids=row[0][None])
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.mul_(math.sqrt(size.hidden / (size.hidden - 1)))
        wrong = model.all_exit_logits(input_ids=row[0][None])
    assert (right[0] - expected).abs().max() < LOGITS_WITHIN < (wrong[0] - expected).abs().max()


# The folder


def test_imported_folder_is_a_model_like_any_other(imported: Path) -> None:
    model: Any = fastkd.EarlyExitForSequenceClassification.from_pretrained(imported)
    assert model.config.input_format == "uer"
    assert model.config.exits_trained
    assert model.config.backbone.num_attention_heads == 4
    tokenizer = AutoTokenizer.from_pretrained(imported)
    assert (input_format_of(tokenizer), tokenizer.model_max_length) == ("uer", SEQ_LENGTH)
    # numbers 4.. are the words w0..
    assert tokenizer("w0 W2 nothing")["input_ids"] == [2, 4, 6, 1]

    # the last two are cut, in the first text and in the second
    rows = [
        InputRow(1, "w1 w2"),
        InputRow(2, "w3", "w4 w5"),
        InputRow(3, "w1 " * 30, "w2"),
        InputRow(4, "w6", "w7 " * 30),
    ]
    answers = list(predict(model.eval(), tokenizer, rows, speed=0.5))
    batched = list(predict(model, tokenizer, rows, speed=0.5, batch_size=2))
    assert [(row.label, row.exit_layer) for row in answers] == [(row.label, row.exit_layer) for row in batched]
    official = Official(read_checkpoint(imported.parent / "fastbert.bin"), TINY)
    expected = [official.answer(*read_row(TINY, row.text_a, row.text_b, SEQ_LENGTH), 0.5) for row in rows]
    assert [answer.exit_layer for answer in answers] == [layer for _, layer in expected]
    assert [answer.label for answer in answers] == [f"LABEL_{int(logits.argmax())}" for logits, _ in expected]


def test_without_a_vocabulary_there_is_no_tokenizer(tmp_path: Path) -> None:
    checkpoint, _ = save(tmp_path, TINY)
    done = import_fastbert(checkpoint, tmp_path / "model", num_attention_heads=4, label_names=["a", "b", "c"])
    assert not done.has_tokenizer
    assert done.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert sorted(path.name for path in done.folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_vocabulary_lines_are_read_as_uer_reads_them(tmp_path: Path) -> None:
    checkpoint, vocab = save(tmp_path, TINY)
    lines = vocabulary(TINY)
    # a comment after the token, a line of blanks, and a token that str.splitlines would break at
    lines[7], lines[8], lines[9] = "w3 17", "  ", "\u2028x"
    vocab.write_text("\n".join(lines), encoding="utf-8")
    import_fastbert(checkpoint, tmp_path / "model", vocab=vocab, num_attention_heads=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (len(tokenizer), tokenizer.convert_tokens_to_ids(["w3", "w55"])) == (TINY.words, [7, 59])


# What trainings leave in the file


def assert_same_model(state: dict[str, Any], folder: Path, size: Size = TINY) -> None:
    """`state`, saved, becomes the model that the plain official checkpoint of that size becomes."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "trained.bin")
    plain = convert(random_checkpoint(size), num_attention_heads=size.heads)
    read = convert(read_checkpoint(folder / "trained.bin"), num_attention_heads=size.heads)
    for name, value in plain.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name


def test_counters_of_thop_are_ignored(tmp_path: Path) -> None:
    """The file that run_fastbert.py writes beside today's thop, which leaves 240 counters in 12 layers."""
    size = Size(layers=12, hidden=64, heads=1, feed_forward=8, positions=16)
    counters = counters_of_thop(size.layers)
    assert len(counters) == 240
    assert {"total_ops", "total_params", "encoder.transformer.11.total_ops"} < set(counters)
    assert_same_model({**random_checkpoint(size), **counters}, tmp_path, size)
    assert_same_model(
        {f"module.{name}": value for name, value in {**random_checkpoint(TINY), **counters_of_thop(3)}.items()},
        tmp_path,
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("kernel", ["", "kernel."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str, kernel: str) -> None:
    state = random_checkpoint(TINY, prefix=kernel)
    assert_same_model({prefix + name: value for name, value in state.items()}, tmp_path)


def test_wrapped_parts_are_unwrapped(tmp_path: Path) -> None:
    """torch.compile of single layers, which names them inside."""
    state = random_checkpoint(TINY)
    assert_same_model(
        {name.replace(".self_at", "._orig_mod.self_at"): value for name, value in state.items()}, tmp_path
    )


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict", "module"])
def test_the_state_is_found_beside_the_optimizer(tmp_path: Path, name: str) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    assert_same_model({name: random_checkpoint(TINY), "optimizer": optimizer, "epoch": 3}, tmp_path)


# What the file does not say


def test_what_the_file_does_not_say_is_told(tmp_path: Path) -> None:
    size = SIZES["UER tiny, PyPI"]
    checkpoint, vocab = save(tmp_path, size)
    done = import_fastbert(checkpoint, tmp_path / "assumed", vocab=vocab)
    assert done.assumed == {"pooling": "first", "num_attention_heads": 6, "max_length": 128}
    said: dict[str, Any] = {"pooling": "first", "num_attention_heads": 6, "max_length": 100}
    done = import_fastbert(checkpoint, tmp_path / "said", vocab=vocab, **said)
    assert done.assumed == {}
    arguments = ["import-fastbert", str(checkpoint), "-o", str(tmp_path / "shown"), "--vocab", str(vocab)]
    shown = CliRunner().invoke(app.app, [*arguments, "--max-length", "64"])
    sentence = "the file does not record all of its training; assumed: --pooling first, --attention-heads 6, and UER's"
    assert sentence in " ".join(shown.output.split())


@pytest.mark.parametrize("pooling", POOLINGS[1:])
def test_other_poolings_are_refused_before_any_work(tmp_path: Path, pooling: str) -> None:
    """They read padded positions, and `mean` averages over features: no head here can give their answers."""
    with pytest.raises(
        ValueError, match=f"pooling: with '{pooling}' .* cannot give its answers. Train it with 'first'"
    ):
        import_fastbert(tmp_path / "absent.bin", tmp_path / "model", pooling=pooling)
    refused = CliRunner().invoke(
        app.app, ["import-fastbert", "absent.bin", "-o", str(tmp_path / "model"), "--pooling", pooling]
    )
    assert refused.exit_code == 2
    assert "cannot give its answers" in " ".join(refused.output.split())


def test_an_imported_model_is_trained_further_in_its_own_format(tmp_path: Path) -> None:
    """What the refusal of a pooling advises."""
    checkpoint, vocab = save(tmp_path, Size(layers=2, hidden=64, heads=1, feed_forward=8))
    import_fastbert(checkpoint, tmp_path / "imported", vocab=vocab, pooling="first")
    train = tmp_path / "train.tsv"
    train.write_text("label\ttext_a\n" + "".join(f"{row % 2}\tw{row}\n" for row in range(12)), encoding="utf-8")
    for command, source, output in (("finetune", "imported", "tuned"), ("distill", "tuned", "distilled")):
        arguments = [command, str(tmp_path / source), "--train", str(train), "-o", str(tmp_path / output)]
        done = CliRunner().invoke(app.app, [*arguments, "--max-steps", "1"])
        assert done.exit_code == 0, done.output
        model, tokenizer = loading.load_model(str(tmp_path / output), "cpu")
        assert (model.config.input_format, input_format_of(tokenizer)) == ("uer", "uer")
        assert tokenizer("w0")["input_ids"] == [2, 4]


def test_an_unknown_pooling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pooling: got 'cls', expected one of first, last, max, mean"):
        import_fastbert(tmp_path / "absent.bin", tmp_path / "model", pooling="cls")


# Refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder.transformer.1.layer_norm_1.gamma": None}, "missing encoder.transformer.1.layer_norm_1.gamma"),
        ({"encoder.transformer.3.layer_norm_1.gamma": torch.ones(64)}, "missing classifiers.3.output_layer_0.bias"),
        ({"classifiers.0.extra.weight": torch.ones(2)}, "unexpected classifiers.0.extra.weight"),
        (
            {"classifiers.1.output_layer_2.bias": torch.ones(2)},
            r"2.bias has shape \(2,\), expected \(3,\)",
        ),
        ({"embedding.segment_embedding.weight": torch.ones(2, 64)}, r"\(2, 64\), expected one width and 3 segments"),
        ({"embedding.word_embedding.weight": torch.ones(60)}, r"word_embedding.weight has shape \(60,\)"),
        ({"classifiers.0.output_layer_2.weight": torch.tensor(1.0)}, r"output_layer_2.weight has shape \(\), expected"),
        ({"classifiers.0.output_layer_2.weight": torch.ones(1, 128)}, "its classifiers have only one class"),
        ({"classifiers.0.output_layer_0.weight": torch.ones(127, 64)}, "head_width: got 127"),
        ({"classifiers.123456789.output_layer_0.weight": torch.ones(2)}, "unexpected classifiers.123456789"),
        ({"classifiers.2.output_layer_2.bias": torch.ones(3).int()}, "output_layer_2.bias is torch.int32"),
        ({"classifiers.2.output_layer_2.bias": torch.ones(0)}, r"output_layer_2.bias of shape \(0,\) has no values"),
        (
            {"classifiers.2.output_layer_2.bias": torch.ones(3).to_sparse()},
            "output_layer_2.bias is .* torch.sparse_coo",
        ),
        (
            {"encoder.transformer.0.layer_norm_2.beta": torch.full((64,), math.nan)},
            "64 of 64 values of encoder.transformer.0.layer_norm_2.beta are NaN",
        ),
        ({"module.encoder.transformer.0.layer_norm_2.beta": torch.ones(64)}, "layer_norm_2.beta is there twice"),
        # whatever the embeddings ask for, no such model is built
        (
            {f"embedding.{name}_embedding.weight": torch.zeros(3, 1 << 18) for name in ("word", "position", "segment")},
            r"tensors belong to models of different sizes",
        ),
    ],
)
def test_bad_checkpoints_are_refused_by_the_names_of_their_keys(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    checkpoint, _ = save(tmp_path, TINY, **changes)
    with pytest.raises(ValueError, match=named) as refused:
        import_fastbert(checkpoint, tmp_path / "model", num_attention_heads=4)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model").exists()


def test_a_pretrained_uer_checkpoint_has_no_classifiers(tmp_path: Path) -> None:
    state = {name: value for name, value in random_checkpoint(TINY).items() if not name.startswith("classifiers.")}
    with pytest.raises(
        ValueError, match=r"missing classifiers.0.output_layer_0.bias.* a pretrained UER checkpoint has"
    ):
        convert(state, num_attention_heads=4)
    # a plain Hugging Face checkpoint is something else altogether
    plain = save_plain_checkpoint(tmp_path / "plain", "bert") / "config.json"
    with pytest.raises(ValueError, match=r"is not a PyTorch file, it begins with b'\{"):
        read_checkpoint(plain)


class WholeModel(torch.nn.Linear):
    """What torch.save(model) pickles besides tensors."""


MALFORMED: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is not a PyTorch file, it is empty"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "is not a PyTorch file, it begins with b'version"),
    "a lone pickle": (b"\x80\x02}q\x00.", r"is cut short or damaged .*; copy or download it again"),
    "a lone zip": (b"PK\x03\x04" + b"\x00" * 40, r"is cut short or damaged .*; copy or download it again"),
    "whole model": (WholeModel(2, 2), "holds an object of .*WholeModel besides tensors.* torch.save"),
    "one tensor": (torch.ones(3), "holds one Tensor, expected a dictionary"),
    "a list": ([torch.ones(3)], "holds one list, expected a dictionary"),
    "nothing": ({}, "holds an empty dictionary, expected"),
    "optimizer": ({"state": {}, "param_groups": []}, "holds other things than tensors: state, param_groups"),
    "numbered": ({0: torch.ones(3)}, "holds other things than tensors: 0"),
    "two models": ({"model": {"a": torch.ones(1)}, "module": {}}, "holds several models, model, module"),
    "numbers in the state": ({"model": {"a": torch.ones(1), "epoch": 3}}, "holds other things than tensors: epoch"),
    "of another model": ({"bert.pooler.dense.bias": torch.ones(4)}, "missing .* unexpected bert.pooler.dense.bias"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_get_one_sentence(tmp_path: Path, name: str) -> None:
    content, named = MALFORMED[name]
    path = tmp_path / "fastbert.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=named) as refused:
        import_fastbert(path, tmp_path / "model")
    assert "\n" not in str(refused.value)
    assert name == "of another model" or str(path) in str(refused.value)
    shown = CliRunner().invoke(app.app, ["import-fastbert", str(path), "-o", str(tmp_path / "model")])
    assert (shown.exit_code, shown.exception.__class__) == (2, SystemExit)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.bin does not exist"):
        read_checkpoint(tmp_path / "absent.bin")
    with pytest.raises(FileNotFoundError, match=r"is a folder; expected the \.bin file"):
        read_checkpoint(tmp_path)


def damaged(whole: bytes, how: str, generator: random.Random) -> bytes:
    """`whole` cut, with flipped bits, with a hole of zeros or with bytes that are there twice."""
    place = generator.randrange(len(whole))
    if how == "cut":
        return whole[:place]
    if how == "flipped":
        return whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :]
    if how == "zeros":
        return whole[:place] + bytes(len(whole[place : place + 64])) + whole[place + 64 :]
    return whole[:place] + whole[place : place + 40] + whole[place:]


@pytest.mark.parametrize("how", ["cut", "flipped", "zeros", "doubled"])
@pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_files_get_one_sentence_with_their_name(tmp_path: Path, how: str, is_legacy: bool) -> None:
    """An archive has checksums, so no damage to its tensors goes unnoticed; the format before torch 1.6 has none."""
    path = tmp_path / "fastbert.bin"
    state = {f"encoder.transformer.{layer}.layer_norm_1.gamma": torch.randn(8) for layer in range(6)}
    torch.save(state, path, _use_new_zipfile_serialization=not is_legacy)
    whole = path.read_bytes()
    generator = random.Random(0)
    refusals = []
    for _ in range(100):
        path.write_bytes(damaged(whole, how, generator))
        try:
            read = read_checkpoint(path)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert is_legacy or all(torch.equal(read[name], value) for name, value in state.items())
    assert len(refusals) == 100 if how == "cut" else len(refusals) > 20
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    checkpoint, vocab = save(tmp_path, TINY)
    state = read_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="num_attention_heads: got 5"):
        convert(state, num_attention_heads=5)
    with pytest.raises(ValueError, match=r"label_names: .* expected 3 different names"):
        convert(state, label_names=["a", "b"])
    with pytest.raises(ValueError, match="max_length: got 600"):
        import_fastbert(checkpoint, tmp_path / "model", max_length=600)
    vocab.write_text("[PAD]\n[UNK]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has 2 tokens, the checkpoint embeds 60"):
        import_fastbert(checkpoint, tmp_path / "model", vocab=vocab)
    vocab.write_text("\n".join(f"w{number}" for number in range(60)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\]"):
        import_fastbert(checkpoint, tmp_path / "model", vocab=vocab)
    vocab.write_text("\n".join([*vocabulary(TINY)[:-1], "w3"]), encoding="utf-8")
    with pytest.raises(ValueError, match="has w3 on the lines 8 and 60"):
        import_fastbert(checkpoint, tmp_path / "model", vocab=vocab)
    vocab.write_bytes(b"\xff\xfe[\x00P\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        import_fastbert(checkpoint, tmp_path / "model", vocab=vocab)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        import_fastbert(checkpoint, tmp_path / "model")


# The input format


def test_uer_input_format(tmp_path: Path) -> None:
    plain = tokenizer_of("bert")
    uer = with_input_format(plain, "uer")
    assert input_format_of(plain) == "standard"
    assert with_input_format(uer, "uer") is uer
    assert plain("the film")["input_ids"] == [2, 5, 7, 3]
    uer.save_pretrained(tmp_path)
    for tokenizer in (uer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("the film")["input_ids"] == [2, 5, 7]
        pair = tokenizer("the film", "good")
        assert pair["input_ids"] == [2, 5, 7, 3, 14, 3]
        assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
        assert tokenizer.get_vocab() == plain.get_vocab()
        # the whole is cut from the right, where the standard takes tokens from the longer text
        cut = encode(tokenizer, ["the film was good"], ["dull plot"], 6)
        assert cut["input_ids"] == [[2, 5, 7, 10, 14, 3]]
        assert encode(plain, ["the film was good"], ["dull plot"], 6)["input_ids"] == [[2, 5, 7, 3, 16, 3]]


def test_special_tokens_in_a_text_are_those_of_the_official_tokenizer(tmp_path: Path) -> None:
    """`foo[SEP]bar` has none, and no damage of case, blanks or private characters makes one."""
    vocab = {token: number for number, token in enumerate(OFFICIAL_ANSWERS["vocabulary"])}
    plain = BertTokenizer(vocab=vocab)
    uer = with_input_format(plain, "uer")
    uer.save_pretrained(tmp_path / "once")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "twice")
    for tokenizer in (uer, loaded, AutoTokenizer.from_pretrained(tmp_path / "twice")):
        for text, expected in OFFICIAL_ANSWERS["tokens"].items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.convert_ids_to_tokens(ids) == expected, text
    # the tokenizer that it was made from still finds them anywhere
    assert plain.convert_ids_to_tokens(plain("foo[SEP]bar")["input_ids"])[1:-1] == ["foo", "[SEP]", "bar"]


def test_a_token_that_the_vocabulary_lacks_is_unknown() -> None:
    tokens = [token for token in OFFICIAL_ANSWERS["vocabulary"] if token != "[MASK]"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = with_input_format(BertTokenizer(vocab=vocab, mask_token=None), "uer")
    assert tokenizer.convert_ids_to_tokens(tokenizer("foo [MASK] bar")["input_ids"]) == ["[CLS]", "foo", "[UNK]", "bar"]


def test_a_cased_tokenizer_stays_cased() -> None:
    vocab = {token: number for number, token in enumerate([*OFFICIAL_ANSWERS["vocabulary"], "Foo"])}
    tokenizer = with_input_format(BertTokenizer(vocab=vocab, do_lower_case=False), "uer")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Foo [SEP] foo")["input_ids"]) == ["[CLS]", "Foo", "[SEP]", "foo"]


def test_a_vocabulary_with_its_special_tokens_elsewhere(tmp_path: Path) -> None:
    """run_fastbert.py writes 100, 101 and 102 whatever the vocabulary; the package looks the numbers up."""
    size = Size(layers=1, hidden=64, heads=1, feed_forward=8, words=120)
    checkpoint, vocab = save(tmp_path, size)
    with pytest.raises(ValueError, match=r"has \[UNK\], \[CLS\], \[SEP\] on other lines than run_fastbert.py"):
        import_fastbert(checkpoint, tmp_path / "model", vocab=vocab)
    checkpoint, _ = save(tmp_path, size, prefix="kernel.")
    assert import_fastbert(checkpoint, tmp_path / "package", vocab=vocab).has_tokenizer
    lines = [f"w{number}" for number in range(size.words)]
    lines[0], lines[100:103] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]"]
    vocab.write_text("\n".join(lines), encoding="utf-8")
    checkpoint, _ = save(tmp_path / "script", size)
    assert import_fastbert(checkpoint, tmp_path / "model", vocab=vocab).has_tokenizer


def test_input_formats_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="input_format: got 'byte'"):
        with_input_format(tokenizer_of("bert"), "byte")
    with pytest.raises(ValueError, match="input_format: got 'byte'"):
        fastkd.EarlyExitConfig(input_format="byte")
    with pytest.raises(ValueError, match="'uer' is written by BERT's tokenizers"):
        with_input_format(tokenizer_of("roberta"), "uer")
    other: Any = tokenizer_of("bert")
    other.backend_tokenizer.normalizer = NFKC()
    with pytest.raises(ValueError, match=r"got BertTokenizer\w* with NFKC; use the format 'standard'"):
        with_input_format(other, "uer")
    with pytest.raises(ValueError, match="this tokenizer writes 'uer'"):
        with_input_format(with_input_format(tokenizer_of("bert"), "uer"), "standard")


def test_a_plain_tokenizer_put_beside_the_model_is_made_to_fit(imported: Path, tmp_path: Path) -> None:
    """A folder converted without --vocab, to which somebody added a tokenizer of his own."""
    fastkd.EarlyExitForSequenceClassification.from_pretrained(imported).save_pretrained(tmp_path)
    vocab = {token: number for number, token in enumerate(vocabulary(TINY))}
    BertTokenizer(vocab=vocab).save_pretrained(tmp_path)
    _, tokenizer = loading.load_model(str(tmp_path), "cpu")
    assert tokenizer("w0")["input_ids"] == [2, 4]


# The command


def test_command(tmp_path: Path) -> None:
    checkpoint, vocab = save(tmp_path, SIZES["UER tiny, PyPI"], prefix="kernel.")
    arguments = ["import-fastbert", str(checkpoint), "-o", str(tmp_path / "model"), "--json"]
    refused = CliRunner().invoke(app.app, [*arguments, "--labels", "a,b,c"])
    assert refused.exit_code == 2
    assert "expected 2 different names" in json.loads(refused.stdout)["error"]

    done = CliRunner().invoke(app.app, [*arguments, "--vocab", str(vocab), "--labels", "no,yes"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "model": str(tmp_path / "model"), "num_hidden_layers": 3, "hidden_size": 384, "num_labels": 2,
        "input_format": "uer", "has_tokenizer": True,
        "assumed": {"pooling": "first", "num_attention_heads": 6, "max_length": 128},
    }  # fmt: skip
    (tmp_path / "rows.txt").write_text("w1 w2\nw3\n", encoding="utf-8")
    answered = CliRunner().invoke(app.app, ["predict", str(tmp_path / "model"), str(tmp_path / "rows.txt")])
    assert answered.exit_code == 0, answered.output
    assert {line.split("\t")[0] for line in answered.stdout.splitlines()[1:3]} <= {"no", "yes"}
