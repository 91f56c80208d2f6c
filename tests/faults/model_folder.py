"""A small model in a Hugging Face folder, to be attacked; and what an attack may cost at most."""

import contextlib
import functools
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
from hypothesis import HealthCheck, settings

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import ByteTokenizer
from flax_decoder.interop.families import FAMILIES
from flax_decoder.interop.hugging_face import write_folder
from flax_decoder.interop.tensor_file import read_header
from flax_decoder.nn.decoder import Decoder

MOST_GROWTH_BYTES = 200_000_000
MOST_SECONDS = 1.0  # of work; on a machine that has much else to do, ten times that may pass
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


def split_in_two(folder: Path) -> dict[str, str]:
    """Spreads the weights over two files and an index; returns which tensor is in which."""
    model, params, _ = fd.load(folder)
    (folder / WEIGHTS).unlink()
    write_folder(folder, model.config, params, ByteTokenizer(), FAMILIES["llama"], shard_bytes=26_000)
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
    """All arrays of a safetensors file, as our reader gives them."""
    with open(path, "rb") as file:
        return {name: tensor.read() for name, tensor in read_header(file, path).items()}


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails where what happens inside takes more memory or time than an attack may; memory on Linux only."""
    is_linux = Path("/proc/self/clear_refs").exists()
    if is_linux:
        Path("/proc/self/clear_refs").write_text("5")  # the highest use of memory so far is forgotten
    before, start, start_work = _peak_bytes() if is_linux else 0, time.perf_counter(), time.process_time()
    # To look through what a long fuzzing itself has collected took more than a second at a time.
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    took, worked = time.perf_counter() - start, time.process_time() - start_work
    growth = _peak_bytes() - before if is_linux else 0
    assert growth < MOST_GROWTH_BYTES, f"memory grew by {growth:,} bytes"
    assert worked < MOST_SECONDS and took < 10 * MOST_SECONDS, f"it took {took:.2f} s, {worked:.2f} s of them work"


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
