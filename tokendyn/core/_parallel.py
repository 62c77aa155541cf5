"""Compiling kernels, and running one over many tiles on several threads.

The kernels release the GIL and write to disjoint places, and no sum is divided among threads, so results are the
same bits for any number of threads. Plain Python threads rather than Numba's ``prange``: its layers either do not
allow calls from several threads (workqueue) or do not survive a fork (OpenMP).

The number of threads is Numba's: the environment variable ``NUMBA_NUM_THREADS``, else the CPUs of this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

from numba import config, njit

#: Blocks of tiles handed to each thread: enough to even out a busy machine, few enough to cost nothing.
BLOCKS_PER_THREAD = 4
#: Nanoseconds of work below which a second thread would cost more than it brings.
SERIAL_WORK = 200_000.0


def inner(*flags: str) -> Callable[[Callable], Any]:
    """Compile the decorated function into the kernels that call it. ``flags``: see :func:`kernel`."""
    return njit(error_model="numpy", fastmath={"contract", *flags})


def kernel(*flags: str) -> Callable[[Callable], Any]:
    """Compile the decorated function when it is first called, keep the code on disk, release the GIL in it.

    Args:
        flags: LLVM's fast-math flags besides ``contract`` (product and sum in one rounding).
    """

    def decorate(function: Callable) -> Any:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", *flags}}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's cache folder can be written
            return njit(**options)(function)

    return decorate


def run_tiles(compute: Callable[[int, int], None], tiles: int, *, work: float, stop: Any = None) -> None:
    """Call ``compute(first, last)`` over blocks that make up ``range(tiles)``.

    Args:
        compute: runs a kernel on the tiles from first up to last.
        tiles: number of tiles.
        work: estimated nanoseconds of all tiles.
        stop: (1,) array that the kernel looks at, optional. Ctrl-C sets it to 1, and is raised again when the
            kernels have left; then all of the work is done away from the calling thread, which must hear it.
    """
    threads = min(config.NUMBA_NUM_THREADS, tiles)  # type: ignore[attr-defined]
    if stop is None and (threads == 1 or work < SERIAL_WORK):
        compute(0, tiles)
        return
    count = min(tiles, BLOCKS_PER_THREAD * threads)
    edges = [tiles * i // count for i in range(count + 1)]
    blocks = [_pool().submit(compute, first, last) for first, last in pairwise(edges)]
    try:
        for block in blocks:
            block.result()
    except BaseException:
        if stop is not None:
            stop[0] = 1
        wait(blocks)  # no kernel may outlive the arrays that it writes to
        raise


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(config.NUMBA_NUM_THREADS, thread_name_prefix="tokendyn")  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the child has the pool but not its threads
