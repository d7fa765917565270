"""What `from_pretrained` asks before it loads: which configuration results, and whether checkpoint and wishes agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.exits.fingerprints import WeightsSketch, file_fingerprint, weight_files
from fastkd.model.torch_files import load_torch_file

_CONFIG_OPTIONS = (
    "head_width",
    "head_attention_heads",
    "head_dropout",
    "exits_trained",
    "speed",
    "criterion",
    "top_n",
    "input_format",
    "pool",
    "problem_type",
)
_NO_JSON = "not a valid JSON"
"""What transformers says of a configuration that cannot be parsed, as an OSError."""
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


def saved_config(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration beside the weights, of an encoder or of an early-exit model."""
    if kwargs.get("trust_remote_code"):
        raise ValueError(
            "trust_remote_code: got True, but fastkd does not run a checkpoint's own code; use an encoder that comes "
            "with transformers"
        )
    check_has_config(Path(path) / kwargs.get("subfolder", ""), "pretrained_model_name_or_path")
    with config_explained(path):
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        # else transformers would ask whoever sits before the terminal
        return AutoConfig.from_pretrained(path, trust_remote_code=False, **options)


def check_has_config(folder: Path, argument: str) -> None:
    """Raise FileNotFoundError for a folder without a configuration."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{argument}: no config.json in {folder}; expected a folder that save_pretrained wrote")


def local_folder(path: str | os.PathLike[str], kwargs: Mapping[str, Any], besides: str | None = None) -> Path | None:
    """Where a checkpoint that was loaded lies: its folder, or the snapshot of a hub name; None where it is not kept.

    Args:
        path: a folder or a name on the hub.
        kwargs: of `from_pretrained`.
        besides: a file that transformers does not ask for, which is fetched too where the hub has it.
    """
    folder = Path(path) / kwargs.get("subfolder", "")
    if folder.is_dir():
        return folder
    options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs and name != "force_download"}
    with suppress(OSError):
        config = cached_file(str(path), "config.json", **{**options, "local_files_only": True})
        if besides is not None:
            with suppress(OSError):
                cached_file(str(path), besides, _raise_exceptions_for_missing_entries=False, **options)
        return None if config is None else Path(config).parent
    return None


def weights_fingerprint(folder: Path, kwargs: Mapping[str, Any]) -> str | None:
    """`WeightsSketch.fingerprint` of the weights that `from_pretrained` read; None where they cannot be read as such.

    Args:
        folder: with the files.
        kwargs: of `from_pretrained`.
    """
    variant = kwargs.get("variant")
    found = None if kwargs.get("use_safetensors") is False else file_fingerprint(folder, variant)
    if found is not None:
        return found
    state: dict[str, Any] = {}
    for file in weight_files(folder, variant, "pytorch_model", "bin"):
        try:
            # mapped, so that a few kilobytes are read; the format before torch 1.6 cannot be, and is not looked at
            state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # what is wrong with the file was told by who read all of it
            return None
    return WeightsSketch.of(state).fingerprint if state else None


@contextmanager
def config_explained(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn whatever reading a configuration of another form raises into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # transformers and its checks raise a dozen unrelated types
        if isinstance(error, OSError) and _NO_JSON not in str(error):
            raise  # it names the file, or the network
        place = (
            f"{Path(path) / 'config.json'}" if path is not None and Path(path).is_dir() else f"config.json of {path}"
        )
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{place} asks for its own code, which fastkd does not run; use an encoder that comes with transformers"
            ) from error
        # torch appends the stack of its C++
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{place} is not a model configuration that can be loaded ({reason}); correct it, or save or download "
            "the model again"
        ) from error


def config_to_load(
    saved: PreTrainedConfig | None,
    path: str | os.PathLike[str] | None,
    config: EarlyExitConfig | None,
    wanted: Mapping[str, Any],
    kwargs: dict[str, Any],
) -> EarlyExitConfig:
    """The configuration of the model that `from_pretrained` gives.

    Args:
        saved: the configuration beside the weights; None where there is no path.
        path: of the checkpoint, for messages.
        config: used as it is; nothing else may then be asked for.
        wanted: head, exit layers and labels; None where nothing was said.
        kwargs: of `from_pretrained`; those that belong to the configuration are taken out.

    Raises:
        TypeError: a configuration of another model.
        ValueError: what was asked for contradicts `config` or the heads of a saved early-exit model.
    """
    added = {name: value for name, value in wanted.items() if value is not None}
    options = {name: kwargs.pop(name) for name in _CONFIG_OPTIONS if name in kwargs}
    added |= _named_classes(added.get("id2label"), kwargs.pop("label2id", None))
    if config is None:
        return _config_of(saved, path, added, options)
    if not isinstance(config, EarlyExitConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected an EarlyExitConfig")
    if added or options:
        given = ", ".join([*added, *options])
        raise ValueError(f"{given}: both this and config were given; put it into the EarlyExitConfig instead")
    if isinstance(saved, EarlyExitConfig):
        _check_same_heads(saved, path, {"num_labels": config.num_labels, "head": config.head})
    return config


def check_loaded_dtype(config: EarlyExitConfig, path: str | os.PathLike[str] | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where quantised weights are asked for in another dtype: what lies between them is float32."""
    wanted = kwargs.get("dtype", kwargs.get("torch_dtype"))
    if config.quantized is not None and wanted not in (None, "auto", "float32", torch.float32):
        raise ValueError(
            f"dtype: got {wanted}, but the model in {path} is quantised to {config.quantized}, with everything else "
            "in float32; leave dtype out, or load the unquantised model"
        )


@contextmanager
def damage_explained(path: str | os.PathLike[str] | None, build: Callable[[], Any] | None = None) -> Iterator[None]:
    """Turn what reading damaged weights, or weights of another configuration, raises into a ValueError that says so.

    Args:
        path: of the checkpoint.
        build: makes the model of its configuration without the weights.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"pretrained_model_name_or_path: the weights in {path} are damaged or were cut off ({error}); copy or "
            "download the checkpoint again"
        ) from error
    except Exception:
        # a damaged pickle may raise anything, so the file is asked
        for file in () if path is None else sorted(Path(path).glob("pytorch_model*.bin")):
            load_torch_file(file, "pretrained_model_name_or_path")
        if build is not None:
            with config_explained(path), torch.device("meta"):
                build()
        raise


def check_complete(path: str | os.PathLike[str] | None, info: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint lacks tensors of the model or has them in other shapes."""
    remedy = "the checkpoint is incomplete or belongs to another config.json"
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"pretrained_model_name_or_path: {name} in {path} has shape {tuple(found)}, but the configuration asks for "
            f"{tuple(expected)}; {remedy}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"pretrained_model_name_or_path: the weights in {path} lack {len(missing)} tensors of this model, among "
            f"them {missing[0]}; {remedy}"
        )


def _config_of(
    saved: PreTrainedConfig | None,
    path: str | os.PathLike[str] | None,
    added: Mapping[str, Any],
    options: Mapping[str, Any],
) -> EarlyExitConfig:
    """The configuration of the model to load: that of a saved early-exit model, or a new one around `saved`."""
    if saved is None:
        raise ValueError("pretrained_model_name_or_path: got None without a config; pass a folder or a config")
    if isinstance(saved, EarlyExitConfig):
        _check_same_heads(saved, path, added)
        for name, value in options.items():
            setattr(saved, name, value)
        if "id2label" in added:
            saved.id2label = dict(added["id2label"])
            saved.label2id = _numbers_of(saved.id2label)
        return saved
    labels = dict(_labels_of(saved, added))
    return EarlyExitConfig(
        backbone=saved,
        head=added.get("head", "fastbert"),
        exit_layers=added.get("exit_layers"),
        layers=added.get("layers"),
        **labels,
        **options,
    )


def _labels_of(saved: PreTrainedConfig, added: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    names = added.get("id2label")
    count = added.get("num_labels")
    if names is None:
        names = saved.id2label if count in (None, saved.num_labels) else None
    elif count is not None and len(names) != count:
        raise ValueError(f"num_labels: got {count}, but id2label names {len(names)} classes; leave one of them out")
    if names is None:
        return [("num_labels", count)]
    return [("id2label", dict(names)), ("label2id", _numbers_of(names))]


def _named_classes(id2label: Mapping[Any, str] | None, label2id: Mapping[str, Any] | None) -> dict[str, dict[int, str]]:
    """The names of the classes by number, where any are given; keys may be texts, as JSON makes them.

    Raises:
        ValueError: numbers with gaps, a name that is given twice, or two tables that say different things.
    """
    if id2label is None and label2id is None:
        return {}
    name = "label2id" if id2label is None else "id2label"
    given = {number: label for label, number in (label2id or {}).items()} if id2label is None else id2label
    try:
        names = {int(number): str(label) for number, label in given.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got the class numbers {list(given)}, expected 0 to {len(given) - 1}") from None
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{name}: got the class numbers {sorted(names)}, expected 0 to {len(names) - 1} without gaps")
    if len(_numbers_of(names)) < len(names):
        raise ValueError(f"{name}: got the labels {list(names.values())}, expected a different one for each class")
    if label2id is not None and {str(label): int(number) for label, number in label2id.items()} != _numbers_of(names):
        raise ValueError(
            f"label2id: got {dict(label2id)}, but id2label says {_numbers_of(names)}; give one of them, or both alike"
        )
    return {"id2label": dict(sorted(names.items()))}


def _numbers_of(names: Mapping[Any, str]) -> dict[str, int]:
    return {label: number for number, label in names.items()}


def _check_same_heads(saved: EarlyExitConfig, path: str | os.PathLike[str] | None, wanted: Mapping[str, Any]) -> None:
    """Raise where the heads of a saved model are not the ones asked for."""
    remedy = "leave the argument out, or start from the plain checkpoint to get new heads"
    if "id2label" in wanted:
        names = wanted["id2label"]
        generic = {index: f"LABEL_{index}" for index in range(saved.num_labels or 0)}
        if names.keys() != generic.keys() or (saved.id2label != generic and names != saved.id2label):
            raise ValueError(
                f"id2label: got {list(names.values())}, but the model in {path} was trained with the labels "
                f"{list((saved.id2label or {}).values())}; {remedy}"
            )
    if wanted.get("num_labels", saved.num_labels) != saved.num_labels:
        raise ValueError(
            f"num_labels: got {wanted['num_labels']}, but the model in {path} was trained with {saved.num_labels} "
            f"classes; {remedy}"
        )
    if wanted.get("head", saved.head) != saved.head:
        raise ValueError(f"head: got {wanted['head']!r}, but the model in {path} has {saved.head} heads; {remedy}")
    if wanted.get("layers", saved.layers) != saved.layers:
        raise ValueError(f"layers: got {wanted['layers']!r}, but the model in {path} has {saved.layers!r}; {remedy}")
    if "exit_layers" in wanted and sorted({*wanted["exit_layers"], saved.num_hidden_layers}) != saved.exit_layers:
        raise ValueError(
            f"exit_layers: got {wanted['exit_layers']}, but the model in {path} has heads after {saved.exit_layers}; "
            f"{remedy}"
        )
