"""Every C++ op, and a model that is served, from several threads at once: what `make sanitize-threads` runs.

Each call is one thread of its own (torch.set_num_threads(1)), because torch's OpenMP is not built with ThreadSanitizer,
which would take its barriers for none. What calls share is what a server shares: weights, prepared heads and layers,
stamps, and the memory that each thread keeps. Results are compared with those of one thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from every_op import OPS
from tiny_models import early_exit_model, random_batch, row_of

import fastkd_kernels as fk
from fastkd_kernels import _C

THREADS, REPEATS = 4, 5


def at_once(work: Callable[[], Any], matches: Callable[[Any], bool], name: str) -> None:
    """`work` in several threads; raises where one fails, or its result does not match."""
    ready, wrong = threading.Barrier(THREADS), []

    def body() -> None:
        try:
            ready.wait()
            for _ in range(REPEATS):
                with torch.no_grad():
                    found = work()
                if not matches(found):
                    raise AssertionError("another result than of one thread")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=body) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise RuntimeError(f"{name}: {wrong[0]!r}") from wrong[0]


def same(one: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], bool]:
    return lambda other: all(
        torch.equal(
            a,
            b,
        )
        or torch.allclose(a, b, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def every_op() -> None:
    for op in OPS:
        if fk.missing_kernels((op.backends,), "cpu") is not None:
            continue
        torch.manual_seed(0)
        made = op.make()

        def work(op: Any = op, made: Any = made) -> list[torch.Tensor]:
            # what is written is a thread's own, what is read is shared
            return op.call({name: t.clone() if name in op.written else t for name, t in made.items()})

        with torch.no_grad():
            expected = [tensor.clone() for tensor in work()]
        at_once(work, same(expected), op.name)


def every_model() -> None:
    for family, dtype in (("bert", torch.float32), ("bert", torch.bfloat16), ("modernbert", torch.float32)):
        model, batch = early_exit_model(family, num_labels=3).to(dtype), random_batch(family, rows=5)
        rows = [row_of(batch, row) for row in range(5)]

        def work(model: Any = model, rows: Any = rows, batch: Any = batch) -> list[torch.Tensor]:
            outputs = [model(**row, speed=speed) for row in rows for speed in (0.0, 0.5)]
            return [output.exit_layer for output in [*outputs, model(**batch, speed=0.4)]]

        with torch.no_grad():
            expected = work()
        at_once(work, same(expected), f"{family} in {dtype}")


def main() -> int:
    torch.set_num_threads(1)
    every_op()
    every_model()
    print(f"concurrent_ops: {len(OPS)} calls of ops and three models from {THREADS} threads at once, by {_C.__file__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
