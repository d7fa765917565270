"""`Driver`: how an encoder is run layer by layer, on a fast path of its family or by `Replay`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.encoders import families
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs
from fastkd.encoders.replay import Replay


class Driver(Protocol):
    """Runs encoders of one configuration; it keeps no reference to one."""

    def layers(self, encoder: PreTrainedModel) -> nn.ModuleList:
        """The encoder's list of layers."""
        ...

    def start(self, encoder: PreTrainedModel, inputs: EncoderInputs) -> tuple[Tensor, TokenLayout]:
        """Hidden states [B, T, H] before the first layer, and their layout."""
        ...

    def run_layers(
        self, encoder: PreTrainedModel, numbers: range, hidden_states: Tensor, layout: TokenLayout
    ) -> Tensor:
        """Hidden states after these layers, from 1; the layers are called as they are."""
        ...

    def narrowed(
        self,
        encoder: PreTrainedModel,
        layout: TokenLayout,
        survivors: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
    ) -> TokenLayout:
        """The layout of some rows of a batch.

        Args:
            encoder: that of `start`.
            layout: from `start` or from here.
            survivors: [R], the rows that stay.
            hidden_states: of these rows, [R, W, H]; where W is less than the width of the batch, the rest was padding.
            attention_mask: of these rows, [R, W] bool, or None where nothing is padded any more.
        """
        ...

    def before_heads(self, encoder: PreTrainedModel, hidden_states: Tensor) -> Tensor:
        """Hidden states [B, T, H], or packed [N, H], after what the encoder does behind its last layer (final norm)."""
        ...

    def has_final_norm(self, encoder: PreTrainedModel) -> bool:
        """Whether `before_heads` changes anything."""
        ...

    def reads_padding(self, encoder: PreTrainedModel) -> bool:
        """Whether a row's answer depends on how far it is padded."""
        ...

    def check(self, encoder: PreTrainedModel) -> object:
        """Raise ValueError where this encoder cannot be run layer by layer."""
        ...


class OwnPath:
    """Drives an encoder of a family in `families.FAMILIES` whose layers take hidden states and a mask."""

    def __init__(self, config: EarlyExitConfig) -> None:
        self._family = families.family_of(config.backbone.model_type)
        self._config = config.backbone

    def layers(self, encoder: PreTrainedModel) -> nn.ModuleList:
        return encoder.get_submodule(self._family.layers)  # type: ignore[return-value]

    def start(self, encoder: PreTrainedModel, inputs: EncoderInputs) -> tuple[Tensor, TokenLayout]:
        hidden_states = self._family.embed(
            encoder, inputs.input_ids, inputs.token_type_ids, inputs.position_ids, inputs.inputs_embeds
        )
        return hidden_states, families.padded_layout(self._config, hidden_states, inputs.attention_mask)

    def run_layers(
        self, encoder: PreTrainedModel, numbers: range, hidden_states: Tensor, layout: TokenLayout
    ) -> Tensor:
        layers = self.layers(encoder)
        for number in numbers:
            hidden_states = families.run_layer(layers[number - 1], hidden_states, layout)
        return hidden_states

    def narrowed(
        self,
        encoder: PreTrainedModel,
        layout: TokenLayout,
        survivors: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
    ) -> TokenLayout:
        return families.padded_layout(self._config, hidden_states, attention_mask)

    def before_heads(self, encoder: PreTrainedModel, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def has_final_norm(self, encoder: PreTrainedModel) -> bool:
        return False

    def reads_padding(self, encoder: PreTrainedModel) -> bool:
        return False

    def check(self, encoder: PreTrainedModel) -> None:
        """These families were tested."""


def driver_of(config: EarlyExitConfig, encoder: PreTrainedModel) -> Driver:
    """What drives `encoder`.

    Raises:
        ValueError: its layers are not found, or it is no encoder of text.
    """
    if config.is_replayed:
        return Replay(encoder, config.num_hidden_layers, config.layers)
    return OwnPath(config)
