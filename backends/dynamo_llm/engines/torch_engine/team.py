"""Runs compiled kernels on the OpenMP threads of torch's own products.

A second thread pool (numba's, say) would compete with torch's: the threads of either spin for a while after each piece
of work. So a kernel is started by the function that compilers call for `#pragma omp parallel`, taken from the OpenMP
library that torch has loaded. GNU's, LLVM's and Intel's all have it.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Team:
    """Starts kernels on `threads` threads; alone where torch brings no OpenMP."""

    def __init__(self, threads: int) -> None:
        self._parallel = _find_parallel() if threads > 1 else None
        self.threads = threads if self._parallel else 1

    def starter(self, kernel: int, arguments: int) -> Callable[[bool], None]:
        """For the C function at address `kernel` and the pointer `arguments`: a function that calls it, on all threads
        when its argument is true, and returns when all have come back. The GIL is released meanwhile."""
        call, parallel, threads = _KERNEL(kernel), self._parallel, self.threads

        def start(on_all: bool) -> None:
            if on_all and parallel is not None:
                parallel(kernel, arguments, threads, 0)
            else:
                call(arguments)

        return start


_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _find_parallel() -> Any:
    """`GOMP_parallel` of the library that torch's symbols resolve to, or None."""
    folder = Path(torch.__file__).parent
    for name in (None, *sorted((folder / "lib").glob("libgomp*")), *sorted(folder.parent.glob("torch.libs/libgomp*"))):
        try:
            function = ctypes.CDLL(name and str(name)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None
