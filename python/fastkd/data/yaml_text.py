"""YAML that people write: plain values, and no more of them than a person would write."""

from __future__ import annotations

from typing import Any

_MOST_VALUES = 100_000
"""In one text; an alias counts each time: nine lines of aliases to aliases can stand for billions."""


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: not YAML, an alias to itself, or aliases that stand for more than 100,000 values.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check_size(node)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("not usable: its values are nested too deep") from None


def _check_size(root: Any) -> None:
    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise ValueError("not usable: an alias refers to a value that contains it; write the value out")
        if known:
            return known
        sizes[id(node)] = None
        value = node.value
        parts = [] if isinstance(value, str) else [part for item in value for part in _nodes(item)]
        total = 1 + sum(size(part) for part in parts)
        if total > _MOST_VALUES:
            raise ValueError(f"not usable: its aliases expand to more than {_MOST_VALUES:,} values; write fewer")
        sizes[id(node)] = total
        return total

    size(root)


def _nodes(item: Any) -> tuple[Any, ...]:
    """The nodes of one entry of a sequence or a mapping."""
    return item if isinstance(item, tuple) else (item,)
