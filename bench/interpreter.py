"""Triton's interpreter: without what it does in vain, and under a numpy that is newer than it knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from fastkd_kernels._triton import interpreting, triton


def mend_interpreter() -> None:
    """Changes Triton's interpreter, where this process uses it."""
    if not interpreting:
        return
    _patch_once()
    if triton.__version__.startswith("3.6."):
        _read_an_index_from_any_array()


def _patch_once() -> None:
    """At every call in a kernel, `tl.sum` included, Triton would look through its whole language for what to patch.

    That is two thirds of the time of a kernel, and finds nothing: the launch has patched it.
    """
    from triton import language
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    @cache
    def languages(function: Callable[..., Any]) -> list[ModuleType]:
        return [module for module in (language, language.core) if module in function.__globals__.values()]

    def patch(function: Callable[..., Any]) -> interpreter._LangPatchScope:
        if any(language.core.is_builtin(module.load) for module in languages(function)):
            return patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def _read_an_index_from_any_array() -> None:
    """Triton 3.6 takes an array of one element for an index, which numpy 2.5 refuses; 3.7 does not."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_its_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_and_its_index
