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
flax_decoder.allocator.limit_kept_memory()
print(flax_decoder.allocator.describe_freed_memory())
flax_decoder.allocator.MAX_FRACTION = 0
flax_decoder.allocator.limit_kept_memory()
print(flax_decoder.allocator.describe_freed_memory())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use_again_and_again()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 100_000_000 // os.sysconf("SC_PAGE_SIZE")  # of one block


def run(**settings):
    """What the program prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", allocator.SWITCH)}
    environment = {name: value for name, value in inherited.items() if not name.startswith("MALLOC_")} | settings
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    faults, *states, later_faults = done.stdout.splitlines()
    return int(faults), states, int(later_faults)


NEEDS_GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")


@NEEDS_GLIBC
def test_freed_memory_is_kept():
    faults, states, later_faults = run()
    assert faults < 2 * PAGES and states[:2] == [allocator.KEPT] * 2
    # Not in a process that has grown large.
    assert later_faults > 9 * PAGES and states[2].startswith("given back to the system")


@NEEDS_GLIBC
@pytest.mark.short("switch")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({allocator.SWITCH: "0"}, "given back to the system (FLAX_DECODER_KEEP_MEMORY=0)"),
        ({"MALLOC_TRIM_THRESHOLD_": "100000"}, "as MALLOC_TRIM_THRESHOLD_ says"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"}, "as GLIBC_TUNABLES says"),
    ],
    ids=["switch", "variable", "tunable"],
)
def test_the_user_decides(settings, expected):
    faults, states, _ = run(**settings)
    assert faults > 9 * PAGES and states == [expected] * 3


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    for name in (*allocator.GLIBC_SETTINGS, "GLIBC_TUNABLES", allocator.SWITCH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_state", "")
    allocator.keep_freed_memory()
    assert allocator.describe_freed_memory() == "left to the C library, which is not glibc"
