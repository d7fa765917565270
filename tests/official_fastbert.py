"""What the official FastBERT computes, stated anew in plain PyTorch: the oracle of tests/test_import_fastbert.py.

The statement follows the description of the code at https://github.com/autoliuweijie/FastBERT: UER-py's layer norm with
the unbiased deviation, post-norm transformer layers, a head after each layer, and one sentence at a time that leaves
when its normalised entropy is at most the speed. Weights are a flat dictionary in the official names.

official_fastbert.json holds the statement to the code itself: it has what run_fastbert.py and its tokenizer answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
HEAD_WIDTH = 128
HEAD_ATTENTION_HEADS = 2

# the modules that thop 0.1.1 has no rule for, where it forgets two counters in the state; as the real files have them
_COUNTED = (
    *("", "embedding.", "embedding.word_embedding.", "embedding.position_embedding.", "embedding.segment_embedding."),
    *("embedding.layer_norm.", "encoder.", "encoder.transformer.", "classifiers.", "softmax.", "criterion."),
    "soft_criterion.",
)
_COUNTED_IN_LAYER = ("", "feed_forward.", "layer_norm_1.", "layer_norm_2.", "self_attn.", "self_attn.linear_layers.")
_COUNTED_IN_HEAD = ("", "self_atten.", "self_atten.linear_layers.")


@dataclass(frozen=True)
class Size:
    """The numbers of an official configuration file, and the size of the vocabulary and the label set."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    words: int = 60
    classes: int = 2
    positions: int = 512


def vocabulary(size: Size) -> list[str]:
    return [*SPECIAL, *(f"w{number}" for number in range(size.words - len(SPECIAL)))]


def random_checkpoint(size: Size, seed: int = 0, prefix: str = "") -> dict[str, Tensor]:
    """Random weights in the official format; `prefix` is "" as run_fastbert.py writes it, or "kernel."."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    state: dict[str, Tensor] = {}

    def linear(name: str, inputs: int, outputs: int, gain: float = 1.0) -> None:
        state[f"{name}.weight"] = normal(outputs, inputs, std=gain / math.sqrt(inputs))
        state[f"{name}.bias"] = normal(outputs, std=0.1)

    def norm(name: str) -> None:
        state[f"{name}.gamma"] = 1 + normal(size.hidden, std=0.1)
        state[f"{name}.beta"] = normal(size.hidden, std=0.1)

    for table, entries in (("word", size.words), ("position", size.positions), ("segment", 3)):
        # as small as BERT's own, where the epsilon of the layer norm counts most
        state[f"{prefix}embedding.{table}_embedding.weight"] = normal(entries, size.hidden, std=0.03)
    norm(f"{prefix}embedding.layer_norm")
    for layer in range(size.layers):
        name = f"{prefix}encoder.transformer.{layer}"
        for part in ("linear_layers.0", "linear_layers.1", "linear_layers.2", "final_linear"):
            linear(f"{name}.self_attn.{part}", size.hidden, size.hidden)
        linear(f"{name}.feed_forward.linear_1", size.hidden, size.feed_forward)
        linear(f"{name}.feed_forward.linear_2", size.feed_forward, size.hidden)
        norm(f"{name}.layer_norm_1")
        norm(f"{name}.layer_norm_2")
        head = f"classifiers.{layer}"
        linear(f"{head}.output_layer_0", size.hidden, HEAD_WIDTH)
        for part in ("linear_layers.0", "linear_layers.1", "linear_layers.2", "final_linear"):
            linear(f"{head}.self_atten.{part}", HEAD_WIDTH, HEAD_WIDTH)
        linear(f"{head}.output_layer_1", HEAD_WIDTH, HEAD_WIDTH)
        # deeper heads are more certain, as after distillation
        linear(f"{head}.output_layer_2", HEAD_WIDTH, size.classes, gain=3 + 8 * layer / size.layers)
    if prefix:
        # the pretraining heads, which the package keeps and never uses
        linear(f"{prefix}target.nsp_linear_1", size.hidden, size.hidden)
        norm(f"{prefix}target.layer_norm")
    return state


def counters_of_thop(layers: int) -> dict[str, Tensor]:
    """What thop's `profile` leaves in the state of a model with so many layers, and run_fastbert.py saves with it."""
    modules = list(_COUNTED)
    for layer in range(layers):
        modules += [f"encoder.transformer.{layer}.{part}" for part in _COUNTED_IN_LAYER]
        modules += [f"classifiers.{layer}.{part}" for part in _COUNTED_IN_HEAD]
    return {
        f"{module}total_{of}": torch.zeros(1, dtype=torch.float64) for module in modules for of in ("ops", "params")
    }


def read_row(size: Size, text: str, pair: str | None, seq_length: int) -> tuple[Tensor, Tensor]:
    """Token and segment numbers [seq_length] of a row: no [SEP] after a single text, pairs cut as a whole."""
    number = {token: index for index, token in enumerate(vocabulary(size))}
    first = [number["[CLS]"], *(number[word] for word in text.split())]
    segments = [1] * len(first)
    if pair is not None:
        first.append(number["[SEP]"])
        second = [*(number[word] for word in pair.split()), number["[SEP]"]]
        segments = [1] * len(first) + [2] * len(second)
        first += second
    padding = [0] * max(0, seq_length - len(first))
    return torch.tensor(first[:seq_length] + padding), torch.tensor(segments[:seq_length] + padding)


@dataclass(frozen=True)
class Official:
    """The official model in evaluation mode, on one sentence at a time."""

    state: Mapping[str, Tensor]
    size: Size

    def __post_init__(self) -> None:
        plain = {name.removeprefix("kernel."): value for name, value in self.state.items()}
        object.__setattr__(self, "state", plain)

    def all_logits(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """Every head's answer [layers, classes] to one padded row."""
        is_token = (segments > 0).to(self.state["embedding.layer_norm.gamma"].dtype)
        added = (1 - is_token) * -10000.0
        hidden = (
            self.state["embedding.word_embedding.weight"][tokens]
            + self.state["embedding.position_embedding.weight"][: len(tokens)]
            + self.state["embedding.segment_embedding.weight"][segments]
        )
        hidden = self._norm(hidden, "embedding.layer_norm")
        logits = []
        for layer in range(self.size.layers):
            hidden = self._layer(hidden, added, f"encoder.transformer.{layer}")
            logits.append(self._head(hidden, added, f"classifiers.{layer}"))
        return torch.stack(logits)

    def answer(self, tokens: Tensor, segments: Tensor, speed: float) -> tuple[Tensor, int]:
        """Logits [classes] and the number of layers run: it goes on while the uncertainty is above the speed."""
        logits = self.all_logits(tokens, segments)
        for layer, given in enumerate(logits, start=1):
            if not uncertainty(given) > speed:
                return given, layer
        return logits[-1], self.size.layers

    def _linear(self, inputs: Tensor, name: str) -> Tensor:
        return inputs @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, inputs: Tensor, name: str) -> Tensor:
        mean = inputs.mean(-1, keepdim=True)
        deviation = inputs.std(-1, keepdim=True, unbiased=True)
        return self.state[f"{name}.gamma"] * (inputs - mean) / (deviation + 1e-6) + self.state[f"{name}.beta"]

    def _attention(self, inputs: Tensor, added: Tensor, name: str, heads: int) -> Tensor:
        width = inputs.shape[-1] // heads
        query, key, value = (self._linear(inputs, f"{name}.linear_layers.{part}") for part in range(3))
        outputs = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = query[:, own] @ key[:, own].T / math.sqrt(width) + added
            outputs.append(torch.softmax(scores, dim=-1) @ value[:, own])
        return self._linear(torch.cat(outputs, dim=-1), f"{name}.final_linear")

    def _layer(self, hidden: Tensor, added: Tensor, name: str) -> Tensor:
        attended = self._attention(hidden, added, f"{name}.self_attn", self.size.heads)
        hidden = self._norm(attended + hidden, f"{name}.layer_norm_1")
        inner = self._linear(hidden, f"{name}.feed_forward.linear_1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        return self._norm(self._linear(inner, f"{name}.feed_forward.linear_2") + hidden, f"{name}.layer_norm_2")

    def _head(self, hidden: Tensor, added: Tensor, name: str) -> Tensor:
        narrow = torch.tanh(self._linear(hidden, f"{name}.output_layer_0"))
        attended = self._attention(narrow, added, f"{name}.self_atten", HEAD_ATTENTION_HEADS)
        return self._linear(torch.tanh(self._linear(attended[0], f"{name}.output_layer_1")), f"{name}.output_layer_2")


def uncertainty(logits: Tensor) -> float:
    """Entropy of the softmax over the logarithm of the number of classes."""
    probabilities = torch.softmax(logits, dim=-1)
    entropy = torch.distributions.Categorical(probs=probabilities).entropy()
    return float(entropy / math.log(len(logits)))


def random_rows(size: Size, rows: int, longest: int, *, pairs: bool, seed: int = 1) -> list[tuple[str, str | None]]:
    """Texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    words: Sequence[str] = vocabulary(size)[len(SPECIAL) :]

    def text() -> str:
        count = int(torch.randint(1, longest + 1, (), generator=generator))
        chosen = torch.randint(len(words), (count,), generator=generator)
        return " ".join(words[index] for index in chosen)

    return [(text(), text() if pairs else None) for _ in range(rows)]
