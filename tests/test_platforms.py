"""Whether the TPU runtime is tried: only where there may be a TPU."""

import importlib.util
import os
import sys
import types

import pytest

from flax_decoder import platforms
from flax_decoder.platforms import skip_missing_tpu


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that has libtpu and no TPU; a test adds one by creating its device file."""
    for name in list(os.environ):
        if name.startswith("TPU_") or name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"):
            monkeypatch.delenv(name)
    found = {"libtpu": True, "jax_plugins": None}
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found[name] if name in found else find_spec(name))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    monkeypatch.setattr(platforms, "_PCI_VENDORS", f"{tmp_path}/pci/*/vendor")
    monkeypatch.setattr(platforms, "_DEVICE_FILES", (f"{tmp_path}/accel*",))
    monkeypatch.setitem(sys.modules, "jax", None)
    (tmp_path / "pci/0").mkdir(parents=True)
    (tmp_path / "pci/0/vendor").write_text("0x8086\n")
    yield types.SimpleNamespace(folder=tmp_path, found=found)
    os.environ.pop("JAX_PLATFORMS", None)  # of the test; that of the suite comes back


@pytest.mark.parametrize("is_imported", [False, True])
def test_without_a_tpu_only_the_cpu_is_used(machine, monkeypatch, is_imported):
    if is_imported:
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as JAX does
        monkeypatch.setenv("TPU_LIBRARY_PATH", "/lib/libtpu.so")  # as libtpu does
    skip_missing_tpu()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("known", [None, "cuda"])
def test_a_jax_that_is_imported_is_told(machine, monkeypatch, known):
    told = []
    config = types.SimpleNamespace(jax_platforms=known, update=lambda *setting: told.append(setting))
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(config=config))
    skip_missing_tpu()
    assert told == ([] if known else [("jax_platforms", "cpu")])


@pytest.mark.parametrize("what", ["no libtpu", "chip", "device file", "TPU_WORKER_ID", "JAX_FORCE_TPU_INIT", "plugin"])
def test_where_a_tpu_may_be_nothing_changes(machine, monkeypatch, what):
    if what == "no libtpu":
        machine.found["libtpu"] = None
    elif what == "chip":
        (machine.folder / "pci/0/vendor").write_text("0x1ae0\n")
    elif what == "device file":
        (machine.folder / "accel0").touch()
    elif what == "plugin":
        machine.found["jax_plugins"] = True
    else:
        monkeypatch.setenv(what, "0")
    skip_missing_tpu()
    assert "JAX_PLATFORMS" not in os.environ


def test_what_is_asked_for_stays(machine, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    skip_missing_tpu()
    assert os.environ["JAX_PLATFORMS"] == "tpu,cpu"
