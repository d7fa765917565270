"""The processes of one training, as `torchrun` and `accelerate launch` start them.

The first works for all, and what fails there fails everywhere, in the same words.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

from accelerate import PartialState
from torch import distributed
from transformers import TrainingArguments

_Result = TypeVar("_Result")
# a teacher may read its rows for longer than NCCL and gloo wait by themselves
_PATIENCE = timedelta(days=7)


def by_first(work: Callable[[], _Result]) -> _Result | None:
    """Run `work` in the first process, while all others wait for it, however long it takes.

    Returns:
        What `work` gave, in the first process; None in the others.

    Raises:
        Exception: what `work` raised, in every process.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    result, failure = None, None
    if state.is_main_process:
        try:
            result = work()
        except Exception as error:
            failure = error
    told = [_sendable(failure)]
    distributed.broadcast_object_list(told, src=0, group=_patient_group(distributed.group.WORLD))
    raised = failure or told[0]
    if raised is not None:
        raise raised
    return result


def _sendable(error: Exception | None) -> Exception | None:
    """The error as another process can make it again, or one that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@lru_cache(1)
def _patient_group(world: object) -> distributed.ProcessGroup:
    """All processes of `world`, on the CPU."""
    return distributed.new_group(backend="gloo", timeout=_PATIENCE)


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Keep the Trainer from torch's DataParallel, whose replicas no hook sees, where one process sees several GPUs.

    Warns:
        UserWarning: some of them stay idle.
    """
    if arguments.n_gpu <= 1:
        return
    warnings.warn(
        f"this one process sees {arguments.n_gpu} GPUs and trains on the first; torchrun "
        f"--nproc-per-node={arguments.n_gpu} trains on all, CUDA_VISIBLE_DEVICES chooses one",
        stacklevel=2,
    )
    arguments._n_gpu = 1


def refuse_sharding(arguments: TrainingArguments) -> None:
    """Raise ValueError where accelerate would shard, which has its own idea of which weights are whole when."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if arguments.fsdp or launched:
        raise ValueError(
            "fsdp: heads and engines read whole weights, which accelerate's FSDP does not keep; start the processes "
            "with torchrun --nproc-per-node=N, or accelerate launch --multi_gpu, and pass fsdp=True"
        )
