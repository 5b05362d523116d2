"""Triton's interpreter, which runs its kernels where there is no GPU."""

import functools
import os
import threading


def use():
    """Run Triton's kernels on the CPU, one at a time, for threads that stand for ranks."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are first imported
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # tests that need it fail by themselves
        return

    lock, run = threading.RLock(), interpreter.GridExecutor.__call__
    patch_lang = interpreter._patch_lang

    def run_alone(*args, **kwargs):
        with lock:
            run(*args, **kwargs)

    def patch_lang_once(function):
        """It would patch the language anew for each function that a kernel calls."""
        modules = [
            value for value in function.__globals__.values() if value is tl or value is tl.core
        ]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    # They would make a table, and ask for four classes, at each of a million calls.
    of_any = interpreter._get_np_dtype
    of_number = functools.cache(of_any)
    unwrap, plain = tl.core._unwrap_if_constexpr, {bool, int, tl.core.dtype, tl.core.tensor}
    interpreter._get_np_dtype = lambda dtype: (
        of_any(dtype.scalar) if dtype.scalar.is_ptr() else of_number(dtype.scalar)
    )
    tl.core._unwrap_if_constexpr = lambda value: value if type(value) in plain else unwrap(value)
    interpreter.GridExecutor.__call__ = run_alone
    interpreter._patch_lang = patch_lang_once
