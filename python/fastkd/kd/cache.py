"""What a teacher says about every example, computed once: logits of every layer, and hidden states where wanted.

A cache is a folder:

    cache.json                      what the answers depend on: teacher weights, tokenizer, max_length, pool, precision
    pseudo_classifiers.safetensors  and .json: the teacher's pseudo-classifiers, and the rows they were trained on
    <kind>-<number>.safetensors     shards: `ids` uint8 [n, 16], and the answers of one kind [n, ...] float32

An example is found by a digest of its text, so order, subsets, repeated texts and other processes change nothing. A
shard is whole or absent, so an interrupted pass goes on where it stopped. Another teacher, tokenizer, length, pool or
precision, and pseudo-classifiers of other rows, are errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.files import read_json, write_json
from fastkd.data.rows import Rows
from fastkd.data.tensors import damaged, load_tensors, save_tensors
from fastkd.kd.probe import PseudoClassifiers
from fastkd.kd.teacher import PseudoClassifierOptions, Teacher, train_pseudo_classifiers

CACHED_KINDS = ("logits", "layer_logits", "hidden_states")
SHARD_ROWS = 1024
_FORMAT = 1
_KEY_FILE = "cache.json"
_CLASSIFIERS = "pseudo_classifiers"
_ID_BYTES = 16
_SHARD_REMEDY = "delete this file: the teacher is asked again for the rows in it"
_CLASSIFIERS_REMEDY = f"delete {_CLASSIFIERS}.* and layer_logits-* in this folder: they are made again"
_CACHE_REMEDY = "delete the folder to fill it again, or name another"


class StaleCacheError(ValueError):
    """A cache whose answers are not those of this teacher on these rows."""


def example_ids(rows: Rows) -> list[bytes]:
    """A digest of each row's text: the same for the same text, wherever the row stands."""
    columns = [rows.dataset["text_a"][:]] + ([rows.dataset["text_b"][:]] if rows.is_pair else [])
    # json keeps ("a b", "c") and ("a", "b c") apart
    return [
        hashlib.blake2b(json.dumps(texts).encode(), digest_size=_ID_BYTES).digest()
        for texts in zip(*columns, strict=True)
    ]


class TeacherCache:
    """The answers of one teacher in one folder.

    Args:
        folder: made where absent.
        teacher: its pseudo-classifiers are replaced by those trained here or loaded.
        max_length: tokens a row, special ones included.
        bf16: the teacher computes in bfloat16, as a training with autocast does.
        pseudo_classifiers: how they are trained if they have to be.
        batch_size: rows of one pass of the teacher.

    Raises:
        StaleCacheError: the folder holds the answers of another teacher, tokenizer, length, pool or precision.
        FileExistsError: the folder holds something else.
        ValueError: a file in it is damaged; the message says which and what to do. Shards are read and checked when
            they are first asked for.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: Teacher,
        max_length: int,
        *,
        bf16: bool = False,
        pseudo_classifiers: PseudoClassifierOptions | None = None,
        batch_size: int = 64,
    ) -> None:
        self.folder = Path(folder)
        self.teacher = teacher
        self.max_length = max_length
        self.bf16 = bf16
        self.options = pseudo_classifiers or PseudoClassifierOptions()
        self.batch_size = batch_size
        self._check_key()
        self._stores = {kind: _Store(self.folder, kind) for kind in CACHED_KINDS}
        # hidden states that only the training of pseudo-classifiers wants
        self._scratch = _Store(self.folder, "scratch")

    def ensure(self, rows: Rows, kinds: Collection[str], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compute the answers of these kinds that the cache lacks for these rows.

        Args:
            rows: with labels where pseudo-classifiers have to be trained: "layer_logits" trains or loads them.
            kinds: some of `CACHED_KINDS`.
            on_progress: called with the rows done and all rows of the teacher's pass.

        Raises:
            StaleCacheError: the pseudo-classifiers in the folder were trained on other rows or otherwise.
            ValueError: an unknown kind, or one that is too large to cache.
        """
        unknown = set(kinds) - set(CACHED_KINDS)
        if unknown:
            raise ValueError(f"kinds: a cache cannot hold {', '.join(sorted(unknown))}, only {', '.join(CACHED_KINDS)}")
        ids = example_ids(rows)
        wants_layers = "layer_logits" in kinds and self.teacher.num_layers > 1
        if wants_layers:
            self._load_pseudo_classifiers(rows)
        lacks_layers = wants_layers and (
            self.teacher.pseudo_classifiers is None or bool(self._stores["layer_logits"].missing(ids))
        )
        keeps_hidden = "hidden_states" in kinds or not self._stores["hidden_states"].missing(ids)
        hidden = self._stores["hidden_states"] if keeps_hidden else self._scratch
        self._run_teacher(
            rows, ids, [self._stores["logits"], *([hidden] if keeps_hidden or lacks_layers else [])], on_progress
        )
        if wants_layers:
            self._ensure_pseudo_classifiers(rows, ids, hidden)
        if "layer_logits" in kinds:
            self._add_layer_logits(ids, hidden)
        self._scratch.clear()

    def ensure_pseudo_classifiers(self, rows: Rows, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Train or load the teacher's pseudo-classifiers, without keeping any answers."""
        self._load_pseudo_classifiers(rows)
        if self.teacher.num_layers == 1 or self.teacher.pseudo_classifiers is not None:
            return
        ids = example_ids(rows)
        self._run_teacher(rows, ids, [self._scratch], on_progress)
        self._ensure_pseudo_classifiers(rows, ids, self._scratch)
        self._scratch.clear()

    def answers(self, ids: Sequence[bytes], kinds: Collection[str]) -> dict[str, Tensor]:
        """The answers of each kind, [n, ...] float32 on the CPU, in the order of `ids`.

        Raises:
            KeyError: an example that was never given to `ensure`.
        """
        return {kind: self._stores[kind].gather(ids) for kind in kinds}

    # What the answers depend on

    def _key(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            **self.teacher.fingerprint,
            "max_length": self.max_length,
            "pool": str(self.teacher.pool),
            **({} if self.teacher.layers is None else {"layers": self.teacher.layers}),
            "precision": "bfloat16" if self.bf16 else "float32",
        }

    def _check_key(self) -> None:
        key, path = self._key(), self.folder / _KEY_FILE
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise FileExistsError(
                    f"cache: {self.folder} is not empty and holds no teacher cache; name another folder"
                )
            write_json(path, key)
            return
        self._raise_if_stale("answers", read_json(path, "cache", _CACHE_REMEDY), key)

    def _raise_if_stale(self, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        different = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if not different:
            return
        details = ", ".join(
            f"another {name}" if len(str(found.get(name))) > 32 else f"{name} {found.get(name)}, now {wanted.get(name)}"
            for name in different
        )
        raise StaleCacheError(
            f"cache: {self.folder} holds {what} for {details}; name another folder, or delete this one to fill it again"
        )

    # The pass of the teacher

    def _run_teacher(
        self, rows: Rows, ids: list[bytes], stores: Sequence[_Store], on_progress: Callable[[int, int], None] | None
    ) -> None:
        missing = sorted(set().union(*(store.missing(ids) for store in stores)))
        for start in range(0, len(missing), SHARD_ROWS):
            chosen = missing[start : start + SHARD_ROWS]
            kinds = ["logits" if store.kind == "logits" else "hidden_states" for store in stores]
            logits, hidden_states = self._answers_of(rows, chosen, kinds)
            for store in stores:
                values = logits if store.kind == "logits" else hidden_states
                assert values is not None
                lacking = set(store.missing([ids[index] for index in chosen]))
                kept = [number for number in range(len(chosen)) if number in lacking]
                if kept:
                    store.append([ids[chosen[number]] for number in kept], values[kept])
            if on_progress is not None:
                on_progress(start + len(chosen), len(missing))

    def _answers_of(self, rows: Rows, chosen: Sequence[int], kinds: Collection[str]) -> tuple[Tensor, Tensor | None]:
        """Logits [n, C] of the chosen rows, and hidden states [n, N, H] where `kinds` names them."""
        texts = Rows(
            rows.dataset.select(chosen).remove_columns([c for c in rows.dataset.column_names if c == "label"]),
            None,
            None,
            rows.source,
        )
        tokens = tokenize(texts, self.teacher.tokenizer, self.max_length)
        batches = LengthSortedBatches(tokens, self.teacher.tokenizer, self.batch_size)
        device = self.teacher.device
        logits, hidden_states = [], []
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                signals = self.teacher.signals({name: value.to(device) for name, value in batch.items()}, kinds)
            logits.append(signals.logits.cpu())
            if signals.hidden_states is not None:
                hidden_states.append(signals.hidden_states.transpose(0, 1).cpu())
        back = torch.tensor(batches.order).argsort()
        return torch.cat(logits)[back], torch.cat(hidden_states)[back] if hidden_states else None

    # Pseudo-classifiers

    def _classifiers_key(self, rows: Rows) -> dict[str, Any]:
        return {"training rows": rows.digest(), **asdict(self.options)}

    def _load_pseudo_classifiers(self, rows: Rows) -> None:
        path = self.folder / f"{_CLASSIFIERS}.json"
        if not path.exists():
            # those that the teacher may have were trained on other rows
            self.teacher.pseudo_classifiers = None
            return
        found = read_json(path, "cache", _CLASSIFIERS_REMEDY)
        self._raise_if_stale("pseudo-classifiers", found, self._classifiers_key(rows))
        classifiers = self._read_pseudo_classifiers(self.folder / f"{_CLASSIFIERS}.safetensors")
        self.teacher.pseudo_classifiers = classifiers.requires_grad_(False).to(self.teacher.device)

    def _read_pseudo_classifiers(self, path: Path) -> PseudoClassifiers:
        weights, _, _ = load_tensors(path, "cache", _CLASSIFIERS_REMEDY)
        try:
            layers, classes, width = weights["weight"].shape
            classifiers = PseudoClassifiers(layers, width, classes)
            classifiers.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError) as error:
            raise damaged(path, "cache", _CLASSIFIERS_REMEDY, str(error)) from error
        if (layers, classes) != (self.teacher.num_layers - 1, self.teacher.num_labels):
            raise damaged(path, "cache", _CLASSIFIERS_REMEDY, f"it holds {layers} layers of {classes} classes")
        if not all(value.isfinite().all() for value in weights.values()):
            raise damaged(path, "cache", _CLASSIFIERS_REMEDY, "its weights are not finite")
        return classifiers

    def _ensure_pseudo_classifiers(self, rows: Rows, ids: list[bytes], hidden: _Store) -> None:
        if self.teacher.pseudo_classifiers is not None:
            return
        labels = torch.tensor(rows.dataset["label"][:])
        # the last layer has the teacher's own classifier
        features = hidden.gather(ids)[:, :-1]
        classifiers = train_pseudo_classifiers(features, labels, self.teacher.num_labels, self.options)
        weights = {name: value.cpu() for name, value in classifiers.state_dict().items()}
        save_tensors(self.folder / f"{_CLASSIFIERS}.safetensors", weights)
        # written last: it vouches for the weights
        write_json(self.folder / f"{_CLASSIFIERS}.json", self._classifiers_key(rows))
        self.teacher.pseudo_classifiers = classifiers.to(self.teacher.device)

    def _add_layer_logits(self, ids: list[bytes], hidden: _Store) -> None:
        store = self._stores["layer_logits"]
        missing = store.missing(ids)
        for start in range(0, len(missing), SHARD_ROWS):
            chosen = [ids[index] for index in missing[start : start + SHARD_ROWS]]
            logits = self._stores["logits"].gather(chosen).to(self.teacher.device)
            if self.teacher.num_layers == 1:
                layer_logits = logits.unsqueeze(0)
            else:
                layer_logits = self.teacher.layer_logits(
                    hidden.gather(chosen).transpose(0, 1).to(logits.device), logits
                )
            store.append(chosen, layer_logits.transpose(0, 1).cpu())


class _Store:
    """The shards of one kind of answer; they are read and checked when they are first asked for."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self._values: list[Tensor] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._is_open = False

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.kind}-*.safetensors"))

    def _open(self) -> None:
        if self._is_open:
            return
        for path in self._files():
            self._add(self._read(path))
        self._is_open = True

    def _read(self, path: Path) -> dict[str, Tensor]:
        shard, _, is_vouched_for = load_tensors(path, "cache", _SHARD_REMEDY)
        ids, values = shard.get("ids"), shard.get(self.kind)
        if ids is None or values is None or ids.dtype != torch.uint8 or ids.shape != (len(values), _ID_BYTES):
            raise damaged(path, "cache", _SHARD_REMEDY, f"it holds no {self.kind} of examples")
        shapes = {tuple(known.shape[1:]) for known in self._values[:1]}
        if not values.is_floating_point() or (shapes and tuple(values.shape[1:]) not in shapes):
            raise damaged(path, "cache", _SHARD_REMEDY, f"its {self.kind} have the shape {tuple(values.shape)}")
        # the checksum is the faster proof
        if not is_vouched_for and not values.isfinite().all():
            raise damaged(path, "cache", _SHARD_REMEDY, f"its {self.kind} are not finite")
        return shard

    def _add(self, shard: dict[str, Tensor]) -> None:
        number = len(self._values)
        self._values.append(shard[self.kind])
        for row, identity in enumerate(_bytes_of(shard["ids"])):
            self._places[identity] = (number, row)

    def missing(self, ids: Sequence[bytes]) -> list[int]:
        """The first position of each id that the store lacks."""
        self._open()
        first = {identity: index for index, identity in reversed(list(enumerate(ids)))}
        return sorted(index for identity, index in first.items() if identity not in self._places)

    def append(self, ids: Sequence[bytes], values: Tensor) -> None:
        """Keep the answers [n, ...] of these examples.

        Raises:
            ValueError: they are not finite.
        """
        self._open()
        if not values.isfinite().all():
            raise ValueError(
                f"teacher: its {self.kind} are not all finite numbers; check its weights, or compute in float32"
            )
        shard = {
            "ids": torch.frombuffer(bytearray(b"".join(ids)), dtype=torch.uint8).reshape(-1, _ID_BYTES),
            self.kind: values.float().contiguous(),
        }
        save_tensors(self.folder / f"{self.kind}-{self._next_number():05d}.safetensors", shard)
        self._add(shard)

    def _next_number(self) -> int:
        """After the last one: a shard that was deleted leaves a gap."""
        names = [path.stem.rpartition("-")[2] for path in self._files()]
        return max((int(name) for name in names if name.isdigit()), default=-1) + 1

    def gather(self, ids: Sequence[bytes]) -> Tensor:
        """[n, ...] in the order of `ids`."""
        self._open()
        return torch.stack([self._values[shard][row] for shard, row in map(self._places.__getitem__, ids)])

    def clear(self) -> None:
        for path in self._files():
            path.unlink()
        self._values, self._places, self._is_open = [], {}, True


def _bytes_of(ids: Tensor) -> Iterator[bytes]:
    raw = ids.numpy().tobytes()
    return (raw[start : start + _ID_BYTES] for start in range(0, len(raw), _ID_BYTES))
