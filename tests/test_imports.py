"""Imports flow down only; and what a command refuses, it refuses without waiting for JAX."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flax_decoder

PACKAGE = Path(flax_decoder.__file__).parent

# Bottom to top. Names on one floor may not import each other, except within one package.
FLOORS = [
    {"allocator", "errors", "platforms", "version"},
    {"io"},
    {"config"},
    {"config_file"},
    {"nn", "data", "parallel"},
    {"generation", "huggingface", "lens"},
    {"training"},
    {"comparison", "planning"},
    {"loading"},
    {"cli"},
]
# What gathers the public names, and what only starts the commands.
EXEMPT = {"__init__.py", "__main__.py"}
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported_modules(source, package):
    """The dotted names that a module imports, wherever in it; `package` is where its relative imports start."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from flax_decoder import nn` names a module too.
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base == "flax_decoder" else [base])


def upward_arrows(path, source):
    """Imports of a file in the package that do not go down."""
    here = path.parts[0].removesuffix(".py")
    package = ".".join(["flax_decoder", *path.parts[:-1]])
    for module in imported_modules(source, package):
        if not module.startswith("flax_decoder."):
            if module == "flax_decoder":
                yield f"{path} imports the whole of flax_decoder"
            continue
        there = module.split(".")[1]
        if here != there and (there not in FLOOR_OF or FLOOR_OF[there] >= FLOOR_OF[here]):
            yield f"{path} imports {module}"


def modules():
    return [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]


def test_imports_flow_down():
    paths = [path for path in modules() if str(path) not in EXEMPT]
    assert len(paths) > 20
    assert {path.parts[0].removesuffix(".py") for path in paths} <= FLOOR_OF.keys(), "a new name needs a floor"
    arrows = [arrow for path in paths for arrow in upward_arrows(path, (PACKAGE / path).read_text(encoding="utf-8"))]
    assert arrows == []


@pytest.mark.parametrize(
    ("path", "source", "is_up"),
    [
        ("nn/norm.py", "from flax_decoder.config import ModelConfig", False),
        ("nn/norm.py", "from flax_decoder.nn.linear import Linear", False),
        ("nn/norm.py", "from .linear import Linear", False),
        ("nn/norm.py", "import jax\nfrom flax_decoders import x", False),
        ("nn/norm.py", "from flax_decoder.data.batches import train_windows", True),
        ("nn/norm.py", "def f():\n    from flax_decoder.training import loop", True),
        ("nn/norm.py", "import flax_decoder.training.loop as loop", True),
        ("nn/norm.py", "from flax_decoder import training", True),
        ("nn/norm.py", "from ..training import loop", True),
        ("nn/norm.py", "from flax_decoder import Decoder", True),
        ("nn/norm.py", "import flax_decoder", True),
        ("errors.py", "from flax_decoder.io.files import replacing", True),
        ("config.py", "from flax_decoder.cli import main", True),
        ("cli.py", "def f():\n    from flax_decoder.loading import load", False),
    ],
)
def test_the_walk_sees_every_way_to_import(path, source, is_up):
    assert bool(list(upward_arrows(Path(path), source))) == is_up


@pytest.mark.parametrize("module", ["flax_decoder.config", "flax_decoder.cli", "flax_decoder"])
def test_jax_waits_until_it_is_needed(module):
    code = f"import sys, {module}; print([n for n in ('jax', 'flax', 'numpy', 'matplotlib') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there():
    eager = {"Config", "FaultError", "ModelConfig", "UserError", "load_config"}
    assert flax_decoder.__all__ == sorted(eager | set(flax_decoder._MODULE_OF))
    for name in flax_decoder.__all__:
        assert getattr(flax_decoder, name) is not None
    (block,) = [node for node in ast.parse(inspect.getsource(flax_decoder)).body if isinstance(node, ast.If)]
    for_type_checkers = {alias.name: node.module for node in block.body for alias in node.names}
    assert for_type_checkers == {name: f"flax_decoder.{module}" for name, module in flax_decoder._MODULE_OF.items()}
    assert flax_decoder.__version__ in (PACKAGE / "version.py").read_text(encoding="utf-8")
    assert {"Decoder", "load", "load_config", "generate", "init_state", "train_step"} <= set(dir(flax_decoder))
    with pytest.raises(AttributeError, match="no attribute 'Decodre'"):
        flax_decoder.Decodre  # noqa: B018
