import importlib.util
import os
import subprocess
import sys

import pytest

from flax_decoder.errors import UserError
from flax_decoder.planning import topology
from flax_decoder.planning.topology import devices_of, parse_topology, prepare


@pytest.mark.parametrize(
    ("name", "kind", "counts"),
    [
        ("V5P:4x4x8", "v5p", (4, 4, 8)),
        ("v6e:1x1", "v6e", (1, 1)),
        ("v5p:2x2x1", "v5p", (2, 2, 1)),
        ("h200:64", "h200", (64,)),
        ("local", "local", ()),
    ],
)
def test_names_of_topologies(name, kind, counts):
    assert parse_topology(name) == (kind, counts)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:4x4", ["unknown", "v5e:4x4", "v5p:4x4x4", "h100:8", "local"]),
        ("v5e:4x4x4", ["2 dimensions", "v5e:4x4"]),
        ("v5p:4x4", ["3 dimensions", "v5p:4x4x4"]),
        ("v5p:4xx4", ["3 dimensions"]),
        ("v5e:3x4", ["even"]),
        ("v6e:32x32", ["at most 256"]),
        ("h100:12", ["whole nodes of 8"]),
        ("h200:", ["number of GPUs"]),
    ],
)
def test_other_names_are_refused(name, words):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    message = str(error.value)
    assert f"--topology {name}" in message and all(word in message for word in words)
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "cuda13")])
def test_the_error_of_a_missing_compiler_says_how_to_install_it(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setattr(os, "environ", before := dict(os.environ))
    with pytest.raises(UserError, match=rf'pip install "flax-decoder\[{extra}\]"'):
        prepare(name)
    assert before.get("JAX_PLATFORMS") == os.environ["JAX_PLATFORMS"]


def test_given_flags_are_kept(monkeypatch):
    monkeypatch.setattr(topology, "_require", lambda module, extra: None)
    monkeypatch.setattr(os, "environ", {"XLA_FLAGS": "--xla_dump_to=x"})
    prepare("h100:8")
    assert os.environ["XLA_FLAGS"].split()[0] == "--xla_dump_to=x"
    assert os.environ["JAX_PLATFORMS"] == "cpu" and "autotune_level=0" in os.environ["XLA_FLAGS"]


def test_local_devices():
    assert len(devices_of("local")) == 8


COMPILE = """
import sys
from flax_decoder.planning.topology import devices_of, prepare
prepare(sys.argv[1])
import jax
devices = devices_of(sys.argv[1])
mesh = jax.sharding.Mesh(devices, "x")
rows = jax.ShapeDtypeStruct((1024, 128), "bfloat16", sharding=jax.NamedSharding(mesh, jax.P("x")))
compiled = jax.jit(lambda x: x.T @ x).lower(rows).compile()
assert compiled.memory_analysis().argument_size_in_bytes == 1024 * 128 * 2 / len(devices)
print(len(devices), devices[0].device_kind, "all-reduce" in compiled.as_text())
"""


@pytest.mark.parametrize(
    ("module", "name", "says"),
    [
        ("libtpu", "v5p:2x2x1", "4 TPU v5 True"),
        ("libtpu", "v5e:1x1", "1 TPU v5 lite False"),
        ("jax_cuda13_plugin", "h100:8", "8 NVIDIA H100 80GB HBM3 True"),
        ("jax_cuda13_plugin", "h200:1", "1 NVIDIA H200 False"),
    ],
)
def test_real_compilers(module, name, says):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs {module}")
    result = subprocess.run([sys.executable, "-c", COMPILE, name], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == says
