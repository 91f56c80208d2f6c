"""A small model in a Hugging Face folder, to be attacked; and what an attack may cost at most."""

import contextlib
import cProfile
import faulthandler
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
from hypothesis import HealthCheck, settings
from limits import HANGS_SECONDS
from safetensors.numpy import load_file

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import ByteTokenizer
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.nn.decoder import Decoder

MAX_GROWTH_BYTES = 200_000_000
# Work is counted, so that neither the machine nor what else runs on it matters: what is read, and calls of functions.
# An ordinary load of the small model takes 170,000 calls, nearly all of them in JAX and Flax.
MAX_READ_BYTES = 60_000_000
MAX_CALLS = 2_000_000
SETTINGS = {
    "vocab_size": 256,
    "context_length": 32,
    "num_layers": 2,
    "embed_dim": 14,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 10,
    "mlp_dim": 13,
    "positions": "rotary",
    "norm": "rmsnorm",
    "feed_forward": "swiglu",
    "tied_head": False,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Bomb:
    """Creates a folder, the canary, when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@functools.cache
def _template() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    model = Decoder(ModelConfig(**SETTINGS))
    write_folder(Path(folder.name), model.config, reference.random_params(model), ByteTokenizer(), FAMILIES["llama"])
    fd.load(folder.name)  # so that no attack pays for what the first load of all does
    return folder


def make_folder(path: Path) -> Path:
    """A model folder of its own for a test, at a path that is free."""
    return Path(shutil.copytree(_template().name, path))


@functools.cache
def _template_in_two() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory()
    model, params, _ = fd.load(_template().name)
    write_folder(Path(folder.name), model.config, params, ByteTokenizer(), FAMILIES["llama"], shard_bytes=26_000)
    return folder


def split_in_two(folder: Path) -> dict[str, str]:
    """Spreads the weights over two files and an index; returns which tensor is in which."""
    (folder / WEIGHTS).unlink()
    for path in Path(_template_in_two().name).glob(f"{WEIGHTS.removesuffix('.safetensors')}*"):
        shutil.copy(path, folder)
    return json.loads((folder / INDEX).read_text())["weight_map"]


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def safetensors_bytes(header: Any, numbers: bytes = b"") -> bytes:
    """A safetensors file with a header as a document or, to be wrong in more ways, as bytes."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + numbers


def entry(dtype: Any = "F32", shape: Any = (1,), start: Any = 0, end: Any = 4) -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def tensors_of(path: Path) -> dict[str, Any]:
    """All arrays of a safetensors file, as the reference implementation reads them."""
    return {name: array.copy() for name, array in load_file(path).items()}


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@contextlib.contextmanager
def bounded(counts_calls: bool = True) -> Iterator[None]:
    """Fails where what happens inside takes more memory or work than an attack may; calls alone where not on Linux.

    Calls are those of this thread, of Python and of libraries. To count those of a whole load makes it take twice as
    long: a fuzzing of thousands leaves it out.
    """
    is_linux = Path("/proc/self/clear_refs").exists()
    if is_linux:
        Path("/proc/self/clear_refs").write_text("5")  # the highest use of memory so far is forgotten
    before, read_before = (_peak_bytes(), _read_bytes()) if is_linux else (0, 0)
    profile = cProfile.Profile()
    # What takes for ever in one call of a library is ended with the whole process.
    faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
    if counts_calls:
        profile.enable()
    try:
        yield
    finally:
        profile.disable()
        faulthandler.cancel_dump_traceback_later()
    growth, read = (_peak_bytes() - before, _read_bytes() - read_before) if is_linux else (0, 0)
    assert growth < MAX_GROWTH_BYTES, f"memory grew by {growth:,} bytes"
    assert read < MAX_READ_BYTES, f"it read {read:,} bytes"
    num_calls = sum(function.callcount for function in profile.getstats())
    assert num_calls < MAX_CALLS, f"it took {num_calls:,} calls of functions"


def refusal(folder: Path) -> str:
    """What `load` says when it refuses a folder: a line or two, of text that is harmless, within the bounds."""
    with bounded(), pytest.raises(fd.UserError) as caught:
        fd.load(folder)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2 and len(message) < 1500, message
    assert message.replace("\n", "").isprintable(), message
    return message


def fuzzed(num_examples: int) -> settings:
    """The same examples each time, as many as are asked for."""
    return settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
