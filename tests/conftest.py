"""How every test runs: on CPU with 8 simulated devices, and strict about ranks and dtypes."""

import contextlib
import ctypes
import gc
import hashlib
import os
import stat
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xla_flags import QUICK

# Set before JAX is imported. Tests share compiled programs; two workers share two cores.
os.environ["JAX_PLATFORMS"] = "cpu"
# Flags that are given stay: `XLA_FLAGS=--xla_cpu_max_isa=AVX2 pytest` shows what the tests say of another processor.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "flax_decoder_tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from fault_matrix import count_cases, pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401

from flax_decoder.cli import main

# Tracing makes many objects and few cycles: looking for cycles after each 700 takes a twentieth of all work.
gc.set_threshold(20_000, 20, 20)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --full` also runs what is marked `full`: more cases of what a few have shown."""
    parser.addoption("--full", action="store_true", help="also run the tests marked full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `full`, and all cases but those that `short` names, where they are not asked for."""
    cases = defaultdict(set)
    for item in items:
        if item.get_closest_marker("short"):
            cases[item.nodeid.partition("[")[0]].add(item.callspec.id)
    for item in items if "::" not in "".join(config.args) else ():
        marker = item.get_closest_marker("short")
        if marker and (unknown := set(marker.args) - cases[item.nodeid.partition("[")[0]]):
            raise pytest.UsageError(f"{item.nodeid}: `short` names {unknown}, which are no cases of it")
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if not is_short(item)])
        items[:] = [item for item in items if is_short(item)]


def is_short(item: pytest.Item) -> bool:
    """Whether a test belongs to the short suite."""
    marker = item.get_closest_marker("short")
    return not item.get_closest_marker("full") and (marker is None or item.callspec.id in marker.args)


# A line for each stretch of memory that this process has mapped, and how many pages of it are there; Linux only.
MAPS, STATM = Path("/proc/self/maps"), Path("/proc/self/statm")
MAX_MAPS, MAX_BYTES = 20_000, 900_000_000
# What a worker kept when its programs went last: with less than this more they stay, or each test would compile anew.
GROWTH_BYTES = 150_000_000
_kept_bytes = 0
# The maps are many lines to read, and a test adds a few hundred at most.
TESTS_PER_LOOK_AT_MAPS = 20
_num_tests = 0


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    """Lets compiled programs go before there are too many.

    Each holds some pages of memory of its own. XLA crashes where the system allows no more of them: 65,530 on Linux.
    """
    global _kept_bytes, _num_tests
    yield
    if not STATM.exists():
        return
    _num_tests += 1
    too_many = _num_tests % TESTS_PER_LOOK_AT_MAPS == 0 and MAPS.read_bytes().count(b"\n") > MAX_MAPS
    if too_many or resident_bytes() > max(MAX_BYTES, _kept_bytes + GROWTH_BYTES):
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError):  # a C library that is not glibc
            ctypes.CDLL(None).malloc_trim(0)
        _kept_bytes = resident_bytes()


def snapshot() -> dict[str, str]:
    """Everything in the current folder, by kind and content; only regular files are opened."""
    result = {}
    for path in sorted(Path().rglob("*")):
        mode = path.lstat().st_mode
        is_file = stat.S_ISREG(mode) and path.stat().st_size < 2**28
        result[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else oct(mode)
    return result


@pytest.fixture(name="snapshot")
def _snapshot() -> Callable[[], dict[str, str]]:
    return snapshot


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2, one or two lines, nothing written. Returns the message."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> str:
        before = snapshot()
        capsys.readouterr()
        assert main(arguments) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and len(error.splitlines()) <= 2, error
        assert snapshot() == before
        return error.removeprefix("error: ")

    return run_command
