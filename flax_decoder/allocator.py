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
# Who sets one of these has tuned the C library already.
OWN_SETTINGS = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

# From malloc.h: what `mallopt` sets, and to which value.
SETTINGS = {
    # One arena for all threads: only the main one can keep blocks of more than 64 MB.
    -8: 1,  # M_ARENA_MAX
    -4: 0,  # M_MMAP_MAX: no block has a mapping of its own, which would end with it
    -1: -1,  # M_TRIM_THRESHOLD: never give back the free end of the heap
}

STATM = Path("/proc/self/statm")  # Linux: its second number are the pages that the process has in memory
# What glibc does unasked, but with one arena.
DEFAULTS = {-4: 65_536, -1: 128 * 1024}
# Two threads of XLA may each have a step's working memory for a moment, and beside them lie holes that nothing fits: a
# process that has come to this part of the machine's memory could come to need all of it.
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
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # other C libraries have no such function
    except (OSError, TypeError, AttributeError):
        return "left to the C library, which is not glibc"
    if not all([libc.mallopt(option, value) for option, value in SETTINGS.items()]):
        return "given back to the system (glibc refused)"
    return KEPT
