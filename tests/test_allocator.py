"""What is kept is counted in page faults: a page that a process still has causes none."""

import ctypes
import os
import subprocess
import sys

import pytest

from flax_decoder import allocator

# A thread of its own, as XLA has them, takes large blocks and gives them back; prints how many pages came anew.
PROGRAM = """
import ctypes, resource, threading
import flax_decoder.allocator

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.memset.argtypes, libc.free.argtypes = (
    [ctypes.c_size_t], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p])

def use_again_and_again():
    for _ in range(10):
        block = libc.malloc(100_000_000)
        libc.memset(block, 1, 100_000_000)
        libc.free(block)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=use_again_and_again)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(flax_decoder.allocator.describe_freed_memory())
"""
PAGES = 100_000_000 // os.sysconf("SC_PAGE_SIZE")  # of one block


def run(**settings):
    """How many pages came anew, and what is said of it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", allocator.SWITCH)}
    environment = {name: value for name, value in inherited.items() if not name.startswith("MALLOC_")} | settings
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    faults, state = done.stdout.splitlines()
    return int(faults), state


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_freed_memory_is_kept_unless_the_user_has_decided_otherwise():
    faults, state = run()
    assert faults < 2 * PAGES and state == "kept for the next step (glibc)"
    for settings, expected in (
        ({allocator.SWITCH: "0"}, "given back to the system (FLAX_DECODER_KEEP_MEMORY=0)"),
        ({"MALLOC_TRIM_THRESHOLD_": "100000"}, "as MALLOC_TRIM_THRESHOLD_ says"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"}, "as GLIBC_TUNABLES says"),
    ):
        faults, state = run(**settings)
        assert faults > 9 * PAGES and state == expected


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    for name in (*allocator.OWN_SETTINGS, "GLIBC_TUNABLES", allocator.SWITCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_state", "")
    allocator.keep_freed_memory()
    assert allocator.describe_freed_memory() == "left to the C library, which is not glibc"
