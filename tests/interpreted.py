"""Triton's interpreter, faster: the same results in a fraction of the time."""

from collections.abc import Callable
from typing import Any


def patch_once() -> None:
    """Let the interpreter replace triton.language once a launch.

    It does so again in every call of a helper, which finds that all is replaced by then and takes longer than what most
    helpers compute.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # wheels for some machines have no Triton: its tests are skipped
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # of releases that do it another way
        return
    replace: Callable[[Any], Any] = interpreter._patch_lang
    modules: dict[Any, list[Any]] = {}  # that the code around each kernel or helper names

    def replace_once(function: Any) -> Any:
        if function not in modules:
            modules[function] = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules[function]):
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
