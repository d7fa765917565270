"""Where the layers of an encoder lie: named, or the longest list of modules of one class."""

from __future__ import annotations

from typing import cast

from torch import nn

REMEDY = 'name its list of layers, as in layers="encoder.layers"'


def layer_path(encoder: nn.Module, named: str | None = None, num_layers: int | None = None) -> str:
    """The name, inside `encoder`, of its list of layers.

    Lists inside an element of another list are parts of a layer, and not looked at.

    Args:
        encoder: any module.
        named: the name that a user gave; it is checked and given back.
        num_layers: of the configuration; lists of so many modules come before longer ones.

    Raises:
        ValueError: `named` is no list of modules; no list of modules of one class, or several that are the longest.
    """
    kind = type(encoder).__name__
    if named is not None:
        if _list_at(encoder, named) is None:
            raise ValueError(
                f"layers: got {named!r}, but {kind} has no list of modules of that name; its lists are "
                f"{_listed(list(_lists(encoder))) or 'none'}"
            )
        return named
    lists = _lists(encoder)
    outer = {path: found for path, found in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    uniform = {path: len(found) for path, found in outer.items() if len({type(layer) for layer in found}) == 1}
    if not uniform:
        raise ValueError(
            f"layers: {kind} has no list of modules of one class, so its layers cannot be found; {REMEDY}, or use an "
            "encoder that keeps them in one"
        )
    most = num_layers if num_layers in uniform.values() else max(uniform.values())
    longest = [path for path, length in uniform.items() if length == most]
    if len(longest) > 1:
        raise ValueError(
            f"layers: {kind} has several lists of {uniform[longest[0]]} modules ({_listed(longest)}), so its layers "
            f"cannot be found; {REMEDY}"
        )
    return longest[0]


def _lists(encoder: nn.Module) -> dict[str, nn.ModuleList]:
    return {path: found for path, found in encoder.named_modules() if path and _is_list(found)}  # type: ignore[misc]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _list_at(encoder: nn.Module, path: str) -> nn.ModuleList | None:
    try:
        found = encoder.get_submodule(path)
    except AttributeError:
        return None
    return cast(nn.ModuleList, found) if path and _is_list(found) else None


def _listed(paths: list[str]) -> str:
    return ", ".join(paths)
