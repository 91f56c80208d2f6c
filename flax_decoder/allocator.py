"""Tells glibc to keep the memory that a training step frees for the next step.

XLA on CPU allocates its working memory at each call of a program and frees it at the end. By default glibc returns
blocks of that size to the system at once, and the next step faults on all of their pages, which the system must zero
again: a third of the time of a small step.
"""

import ctypes
import os
from pathlib import Path

# The environment variable that switches this off, if 0.
SWITCH = "FLAX_DECODER_KEEP_MEMORY"
# If one of these is set, the user has tuned glibc already.
GLIBC_SETTINGS = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

# Parameters of `mallopt`, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
KEEPING = {
    M_ARENA_MAX: 1,  # all threads share the main arena, the only one that can keep blocks of more than 64 MB
    M_MMAP_MAX: 0,  # no block is a separate mapping, which would be unmapped when it is freed
    M_TRIM_THRESHOLD: -1,  # the free end of the heap is never returned
}
# The defaults of glibc. Threads that share an arena keep sharing it.
DEFAULTS = {M_MMAP_MAX: 65_536, M_TRIM_THRESHOLD: 128 * 1024}

STATM = Path("/proc/self/statm")  # Linux; its second number is the resident pages of the process
# Two threads of XLA may each hold the working memory of a step for a moment, and as much may be free in holes too small
# for it: a process with this fraction of the machine's memory could come to need all of it.
MAX_FRACTION = 1 / 3
KEPT = "kept for the next step (glibc)"

_state = "not asked for"


def keep_freed_memory() -> None:
    """Tells glibc to keep what this process frees; does nothing on another C library, or if the user has tuned glibc.

    Memory then stays at its peak until the process ends. Call it before JAX computes anything: threads keep the arena
    that they started with.
    """
    global _state
    _state = _keep()


def limit_kept_memory() -> None:
    """Returns freed memory to the system from now on, if the process has a third of it; for a training loop.

    Only a large step reaches that, and becomes a little slower.
    """
    global _state
    if _state != KEPT or not STATM.exists():
        return
    resident = int(STATM.read_text().split()[1]) / os.sysconf("SC_PHYS_PAGES")
    if resident > MAX_FRACTION:
        libc = ctypes.CDLL(None)
        for option, value in DEFAULTS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
        _state = f"given back to the system (from {MAX_FRACTION:.0%} of its memory on)"


def describe_freed_memory() -> str:
    """Whether freed memory is kept, and if not, why."""
    return _state


def _keep() -> str:
    if os.environ.get(SWITCH) == "0":
        return f"given back to the system ({SWITCH}=0)"
    tuned = [name for name in GLIBC_SETTINGS if name in os.environ]
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        tuned.append("GLIBC_TUNABLES")
    if tuned:
        return f"as {tuned[0]} says"
    libc = _glibc()
    if libc is None:
        return "left to the C library, which is not glibc"
    if not all([libc.mallopt(option, value) for option, value in KEEPING.items()]):
        return "given back to the system (glibc refused)"
    return KEPT


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # a statically linked Python, or Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
