"""What long work shows while it runs, wherever that is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from transformers import TrainerCallback


class Progress(Protocol):
    """Shows what long work does, as the screen of a command can."""

    def say(self, text: str) -> None:
        """Show one line about what happens now."""

    def progress(self, what: str, total: int | None) -> AbstractContextManager[Callable[..., None]]:
        """Show a bar; what it gives is called with (done so far, what is running, new total)."""


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[..., None]]:
        yield lambda *done: None


@contextmanager
def training_progress(shown: Progress, what: str) -> Iterator[TrainerCallback]:
    """A callback for a Trainer that moves a bar of its own."""
    with shown.progress(what, None) as update:
        yield progress_callback(update, what)


def progress_callback(update: Callable[..., None], what: str) -> TrainerCallback:
    """Moves the bar that `update` belongs to."""

    class Bar(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            update(state.global_step, what, state.max_steps)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            update(state.global_step, what, state.max_steps)

    return Bar()


@contextmanager
def counted(shown: Progress, what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar that moves by one with each call; the call names what was done."""
    done = 0
    with shown.progress(what, total) as update:

        def one_more(now: str) -> None:
            nonlocal done
            done += 1
            update(done, now)

        yield one_more
