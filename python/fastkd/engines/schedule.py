"""Which queue of the stream engine runs next.

Sequences wait in one queue a stage (queue 0 holds what was read and not yet run). A full queue costs least a token; a
half-empty one is worth a run only to stay within the memory, to keep a promise on latency, or when nothing more will
come. The rules, in their order:

    1. a sequence that is overdue runs, however empty its queue
    2. of the full queues the deepest runs: it frees memory, and its answers are the oldest
    3. when the tokens in flight reach their bound, the queue with the most tokens runs, of equals the deepest
    4. while there is input, more is read
    5. at the end the first queue that holds anything runs, so that its survivors join those that wait further on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The bounds that the policy keeps.

    Attributes:
        tokens_per_run: a queue with as many tokens is full.
        max_tokens_in_flight: more input is read only while fewer tokens wait in all queues together.
    """

    tokens_per_run: int
    max_tokens_in_flight: int

    def __post_init__(self) -> None:
        if self.tokens_per_run < 1:
            raise ValueError(f"tokens_per_run: got {self.tokens_per_run}, expected at least 1")
        if self.max_tokens_in_flight < self.tokens_per_run:
            raise ValueError(
                f"max_tokens_in_flight: got {self.max_tokens_in_flight}, expected at least tokens_per_run, "
                f"{self.tokens_per_run}"
            )

    def next_queue(self, tokens: Sequence[int], *, input_ended: bool, overdue: int | None = None) -> int | None:
        """The queue to run, or None to read more input (or to stop, where the input ended and nothing waits).

        Args:
            tokens: how many wait in each queue.
            input_ended: nothing more can be read.
            overdue: the queue that holds the oldest sequence, where that one has waited too long.
        """
        if overdue is not None and tokens[overdue]:
            return overdue
        for queue in reversed(range(len(tokens))):
            if tokens[queue] >= self.tokens_per_run:
                return queue
        if sum(tokens) >= self.max_tokens_in_flight:
            return max(range(len(tokens)), key=lambda queue: (tokens[queue], queue))
        if not input_ended:
            return None
        return next((queue for queue, waiting in enumerate(tokens) if waiting), None)
