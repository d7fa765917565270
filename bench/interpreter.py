"""Triton's interpreter, under a numpy that is newer than it knows."""

from __future__ import annotations

from fastkd_kernels._triton import interpreting, triton


def mend_interpreter() -> None:
    """Triton 3.6's interpreter takes an array of one element for an index, which numpy 2.5 refuses; 3.7 does not."""
    if not interpreting or not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_its_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor_and_its_index
