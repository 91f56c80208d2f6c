"""The C library's memory: what a training step has freed is kept for the next one.

XLA on CPU asks for its working memory at each call of a program and frees it at the end. glibc gives blocks that large
back to the system at once, and the next step finds all of their pages missing: the system has to clear each one anew,
which takes a small step a third of its time.
"""

import ctypes
import os
from pathlib import Path

# Set to 0, it leaves the C library as it is.
SWITCH = "FLAX_DECODER_KEEP_MEMORY"
# A user who sets one of these has tuned the C library already.
OWN_SETTINGS = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

# The names that malloc.h gives to what `mallopt` sets.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
KEEPING = {
    M_ARENA_MAX: 1,  # all threads share the main arena, the only one that can keep blocks of more than 64 MB
    M_MMAP_MAX: 0,  # no block has a mapping of its own, which would end with it
    M_TRIM_THRESHOLD: -1,  # the free end of the heap is never given back
}
# What glibc does unasked. Threads that share an arena go on sharing it.
DEFAULTS = {M_MMAP_MAX: 65_536, M_TRIM_THRESHOLD: 128 * 1024}

STATM = Path("/proc/self/statm")  # Linux; its second number is how many pages of the process are in memory
# Two threads of XLA may each hold a step's working memory for a moment, and as much may lie free in holes too small for
# it: a process with this part of the machine's memory could come to need all of it.
MAX_PART = 1 / 3
KEPT = "kept for the next step (glibc)"

_state = "not asked for"


def keep_freed_memory() -> None:
    """Tells glibc to keep what this process frees; elsewhere, or where the user has decided otherwise, does nothing.

    Memory then stays at its peak until the process ends. It works only where JAX has not computed anything yet: threads
    keep the arena that they had.
    """
    global _state
    _state = _keep()


def limit_kept_memory() -> None:
    """Where the process has a third of the machine's memory, lets freed memory go from now on; for a training loop.

    So large a step becomes a little slower by it, and a small one never comes to it.
    """
    global _state
    if _state != KEPT or not STATM.exists():
        return
    resident = int(STATM.read_text().split()[1]) / os.sysconf("SC_PHYS_PAGES")
    if resident > MAX_PART:
        libc = ctypes.CDLL(None)
        for option, value in DEFAULTS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
        _state = f"given back to the system (from {MAX_PART:.0%} of its memory on)"


def describe_freed_memory() -> str:
    """Whether freed memory is kept, and if not, why."""
    return _state


def _keep() -> str:
    if os.environ.get(SWITCH) == "0":
        return f"given back to the system ({SWITCH}=0)"
    own = [name for name in OWN_SETTINGS if name in os.environ]
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        own.append("GLIBC_TUNABLES")
    if own:
        return f"as {own[0]} says"
    libc = _glibc()
    if libc is None:
        return "left to the C library, which is not glibc"
    if not all([libc.mallopt(option, value) for option, value in KEEPING.items()]):
        return "given back to the system (glibc refused)"
    return KEPT


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # a Python that cannot load libraries, and Windows
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
