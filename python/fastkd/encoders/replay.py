"""`Replay`: any encoder of transformers, layer by layer, with what its own forward passes to its layers.

Nothing is known of the encoder but that its layers lie in one list. It is checked once, on a few made-up tokens,
whether running the layers one by one gives what the encoder gives, for the rows that stay too; an encoder for which it
does not is refused with the reason.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.encoders.layer_list import REMEDY, layer_path
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs, Observation, Recording, copied_row, observe, record
from fastkd.encoders.rotary import reads_length

_ROWS, _TOKENS = 3, 8  # of the made-up batch
_LENGTHS = (_TOKENS, 3, 5)
_checking = threading.RLock()  # one for all, because models are copied


@dataclass
class _Findings:
    """What the check found of one encoder.

    Attributes:
        sizes: by the place of a layer: how long a tuple it returns, 0 for a tensor.
        tail: the modules between the last layer and the encoder's output, such as a final norm.
        reads_padding: whether a row's answer depends on how far it is padded, as where layers convolve, or where rotary
            frequencies depend on the length of the input.
        dims: by the kind of a recording: which dimension of which argument is the batch's; None where the arguments
            cannot be told apart, and are recorded anew.
    """

    sizes: dict[int, int]
    tail: tuple[str, ...]
    reads_padding: bool
    dims: dict[tuple[Any, ...], dict[int, int] | None] = field(default_factory=dict)


class Replay:
    """Drives one encoder.

    Args:
        encoder: of transformers, in any mode and dtype.
        num_layers: how often its layers are called.
        layers: where they lie; None: the longest list of modules of one class.

    Raises:
        ValueError: an encoder that takes no tokens, or whose layers are not found.
    """

    def __init__(self, encoder: PreTrainedModel, num_layers: int, layers: str | None = None) -> None:
        self.path = layer_path(encoder, layers, num_layers)
        self.num_layers = num_layers
        self._kind = type(encoder).__name__
        self._parameters = tuple(inspect.signature(type(encoder).forward).parameters)
        for name, why in (("input_ids", "it is not a text encoder"), ("attention_mask", "padding would be read")):
            if name not in self._parameters:
                raise ValueError(f"backbone: {self._kind} does not take {name}, so {why}; use another encoder")
        self._findings: _Findings | None = None

    def start(self, encoder: PreTrainedModel, inputs: EncoderInputs) -> tuple[Tensor, TokenLayout]:
        """Hidden states [B, T, H] before the first layer, and a layout that holds what the layers take.

        Raises:
            ValueError: an encoder that cannot be run layer by layer; inputs that it does not take.
        """
        findings = self.check(encoder)
        recording = record(encoder, self.path, findings.sizes, inputs, self._arguments(inputs))
        if len(recording.calls) != self.num_layers:
            raise RuntimeError(
                f"{self._kind} called {len(recording.calls)} of its {self.num_layers} layers; turn off random "
                "skipping of layers in training (layerdrop=0 in its configuration)"
            )
        return recording.hidden_states, TokenLayout(inputs.attention_mask, recording)

    def narrowed(
        self,
        encoder: PreTrainedModel,
        layout: TokenLayout,
        survivors: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
    ) -> TokenLayout:
        """See `Driver.narrowed`."""
        recording = cast(Recording, layout.layer_mask)
        rows, width = survivors.long(), hidden_states.shape[1]
        if width == recording.inputs.shape[1]:
            dims = self._dims(encoder, recording)
            if dims is not None:
                return TokenLayout(attention_mask, recording.selected(rows, dims))
        kept = recording.inputs.changed(lambda value: value.index_select(0, rows)[:, :width])
        return self.start(encoder, kept._replace(attention_mask=attention_mask))[1]

    def run_layers(
        self, encoder: PreTrainedModel, numbers: range, hidden_states: Tensor, layout: TokenLayout
    ) -> Tensor:
        """See `Driver.run_layers`."""
        recording, layers = cast(Recording, layout.layer_mask), self.layers(encoder)
        for number in numbers:
            hidden_states = recording.run(layers, number, hidden_states)
        return hidden_states

    def before_heads(self, encoder: PreTrainedModel, hidden_states: Tensor) -> Tensor:
        """See `Driver.before_heads`."""
        for path in self.check(encoder).tail:
            hidden_states = encoder.get_submodule(path)(hidden_states)
        return hidden_states

    def has_final_norm(self, encoder: PreTrainedModel) -> bool:
        """See `Driver.has_final_norm`."""
        return bool(self.check(encoder).tail)

    def reads_padding(self, encoder: PreTrainedModel) -> bool:
        """See `Driver.reads_padding`."""
        return self.check(encoder).reads_padding

    def check(self, encoder: PreTrainedModel) -> _Findings:
        """Find out, the first time, how to run this encoder layer by layer.

        Raises:
            ValueError: it cannot be; the message says why.
        """
        if self._findings is None:
            with _checking:
                if self._findings is None:
                    self._findings = self._checked(encoder)
        return self._findings

    def layers(self, encoder: PreTrainedModel) -> nn.ModuleList:
        """The list of layers; a layer may be called more than once."""
        return cast(nn.ModuleList, encoder.get_submodule(self.path))

    def _arguments(self, inputs: EncoderInputs) -> dict[str, Any]:
        """The keyword arguments of the encoder's forward."""
        mask = inputs.attention_mask
        given = inputs._replace(attention_mask=None if mask is None else mask.long())._asdict()
        arguments = {name: value for name, value in given.items() if value is not None}
        if "token_type_ids" not in self._parameters:
            # a tokenizer that sends segments to an encoder without any is harmless
            arguments.pop("token_type_ids", None)
        unknown = [name for name in arguments if name not in self._parameters]
        if unknown:
            raise ValueError(f"{unknown[0]}: {self._kind} does not take it; leave it out")
        if "use_cache" in self._parameters:
            arguments["use_cache"] = False
        return arguments

    # What the check asks

    def _checked(self, encoder: PreTrainedModel) -> _Findings:
        modes = {module: module.training for module in encoder.modules()}
        encoder.eval()
        try:
            # some encoders draw random numbers in evaluation mode too
            with torch.random.fork_rng(), torch.inference_mode(False), torch.no_grad():
                return self._found(encoder)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _found(self, encoder: PreTrainedModel) -> _Findings:
        inputs = _made_up(encoder)
        with self._explained(f"cannot run {_ROWS} rows of {_TOKENS} tokens"):
            seen = observe(encoder, self.path, self._arguments(inputs))
        self._check_sees_all(encoder, inputs)
        self._check_calls(seen)
        self._check_shapes(seen)
        findings = _Findings(seen.sizes, self._tail(seen), self._reads_padding(encoder, inputs, seen))
        with self._explained("cannot run without its layers"):
            recording = record(encoder, self.path, seen.sizes, inputs, self._arguments(inputs))
        layers = self.layers(encoder)
        # not the outer two, which a batch turned round keeps
        rows = torch.tensor([0, 1], device=recording.hidden_states.device)
        hidden_states = recording.hidden_states
        dims = findings.dims[recording.kind()] = self._told_apart(encoder, recording, findings.sizes)
        some = None if dims is None else recording.selected(rows, dims)
        kept = hidden_states[rows]
        for number, expected in enumerate(seen.given, start=1):
            with self._explained(f"needs more than hidden states from the layers before layer {number}"):
                hidden_states = recording.run(layers, number, hidden_states)
            if not _is_close(hidden_states, expected):
                raise ValueError(
                    f"backbone: layer {number} of {self._kind} does not repeat the result it gave inside the encoder "
                    "(it needs more than hidden states from the layers before it, or it draws random numbers); use "
                    "another encoder"
                )
            if some is None:
                continue
            kept = some.run(layers, number, kept)
            if not _is_close(kept, expected[rows], roundings=2**12):
                raise ValueError(
                    f"backbone: layer {number} of {self._kind} gives a row a different result once other rows have "
                    "left its batch; use another encoder"
                )
        return findings

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn whatever an encoder raises, which may be anything, into a ValueError that says `what` it does."""
        try:
            yield
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"backbone: {self._kind} {what} ({reason}); use another encoder") from error

    def _check_calls(self, seen: Observation) -> None:
        called = len(seen.calls)
        if called != self.num_layers:
            raise ValueError(
                f"layers: {self._kind} calls the modules in {self.path} {called} times, but its configuration says "
                f"that it has {self.num_layers} layers; {REMEDY}, or use another encoder"
            )

    def _check_shapes(self, seen: Observation) -> None:
        for number, (taken, given) in enumerate(zip(seen.taken, seen.given, strict=True), start=1):
            for verb, states in (("takes", taken), ("gives", given)):
                shape = tuple(states.shape) if isinstance(states, Tensor) else (type(states).__name__,)
                if len(shape) != 3 or shape[:2] != (_ROWS, _TOKENS):
                    raise ValueError(
                        f"backbone: layer {number} of {self._kind} {verb} hidden states of shape {shape} for "
                        f"{_ROWS} rows of {_TOKENS} tokens, expected ({_ROWS}, {_TOKENS}, width), so that rows can "
                        "leave the batch; use another encoder"
                    )
            if number > 1 and not _is_close(taken, seen.given[number - 2]):
                raise ValueError(
                    f"backbone: {self._kind} changes the hidden states between its layers {number - 1} and {number}, "
                    "which fastkd runs one by one; use an encoder that does not"
                )

    def _tail(self, seen: Observation) -> tuple[str, ...]:
        """The modules that make the encoder's output of what the last layer gives, in their order."""
        tail: list[str] = []
        states = seen.output
        while states is not seen.given[-1]:
            if isinstance(states, Tensor) and _is_close(states, seen.given[-1]):
                break
            before = next((heard for heard in reversed(seen.heard) if heard.given is states), None)
            if before is None or not isinstance(before.taken, Tensor):
                raise ValueError(
                    f"backbone: {self._kind} does more after its last layer than call modules in a chain, so fastkd "
                    "cannot repeat it before every head; use another encoder"
                )
            tail.insert(0, before.path)
            states = before.taken
        return tuple(tail)

    def _reads_padding(self, encoder: PreTrainedModel, inputs: EncoderInputs, seen: Observation) -> bool:
        assert inputs.input_ids is not None
        if reads_length(encoder):
            return True
        alone = encoder(**self._arguments(EncoderInputs(inputs.input_ids[1:2, : _LENGTHS[1]])))[0]
        return not _is_close(alone, seen.output[1:2, : _LENGTHS[1]], roundings=2**12)

    def _check_sees_all(self, encoder: PreTrainedModel, inputs: EncoderInputs) -> None:
        """Raise where the first token does not see the last: the heads read the first one."""
        assert inputs.input_ids is not None
        ids = inputs.input_ids[:1].repeat(2, 1)
        ids[1, -1] = ids[0, 1]
        first = hidden_states_at_start(encoder(**self._arguments(EncoderInputs(ids))))
        if torch.equal(first[0], first[1]):
            raise ValueError(
                f"backbone: {self._kind} has causal attention, so its first token, which the heads read, sees no "
                "other token; use an encoder that sees the whole text"
            )

    # Which rows the arguments of the layers belong to

    def _dims(self, encoder: PreTrainedModel, recording: Recording) -> dict[int, int] | None:
        dims, kind = self.check(encoder).dims, recording.kind()
        if kind not in dims:
            with torch.no_grad():
                dims[kind] = self._told_apart(encoder, recording, self.check(encoder).sizes)
        return dims[kind]

    def _told_apart(
        self, encoder: PreTrainedModel, recording: Recording, sizes: dict[int, int]
    ) -> dict[int, int] | None:
        """Which dimension of which argument grows with the batch; a table may have as many rows by accident."""
        inputs = copied_row(recording.inputs)
        larger = record(encoder, self.path, sizes, inputs, self._arguments(inputs))
        dims: dict[int, int] = {}
        try:
            pairs = recording.like(larger)
        except LookupError:
            return None
        rows = recording.inputs.shape[0]
        for place, (few, more) in enumerate(pairs):
            if isinstance(few, Tensor):
                changed = [dim for dim, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if a != b]
                if not changed:
                    continue
                if len(changed) > 1 or (few.shape[changed[0]], more.shape[changed[0]]) != (rows, rows + 1):
                    return None
                dims[place] = changed[0]
            elif not isinstance(few, _SHARED) or few != more:
                return None
        return dims


_SHARED = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


def hidden_states_at_start(output: Any) -> Tensor:
    """[B, H] of the first tokens in what an encoder returned."""
    return cast(Tensor, output[0])[:, 0]


def _made_up(encoder: PreTrainedModel) -> EncoderInputs:
    """A batch with padding of token numbers that every vocabulary has."""
    size = getattr(encoder.config, "vocab_size", None) or _USUAL
    special = {getattr(encoder.config, name, None) for name in _SPECIAL}
    usual = [number for number in range(min(size, _USUAL)) if number not in special]
    numbers = torch.arange(_ROWS * _TOKENS) * 7 % len(usual)
    ids = torch.tensor(usual)[numbers].view(_ROWS, _TOKENS).to(encoder.device)
    lengths = torch.tensor(_LENGTHS, device=encoder.device)
    mask = torch.arange(_TOKENS, device=encoder.device) < lengths[:, None]
    padding = getattr(encoder.config, "pad_token_id", None)
    return EncoderInputs(ids.masked_fill(~mask, 0 if padding is None else padding), mask)


_USUAL = 64
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def _is_close(found: Tensor, expected: Tensor, roundings: int = 32) -> bool:
    """Whether they are equal but for so many roundings of the largest value."""
    if found.shape != expected.shape:
        return False
    unit = torch.finfo(expected.dtype).eps * expected.detach().abs().nan_to_num().amax().item()
    return torch.allclose(found, expected, rtol=0, atol=roundings * unit, equal_nan=True)
