"""The safetensors format: named arrays in a file, read strictly and one at a time.

A file is a length N (8 bytes, little-endian), N bytes of JSON that say each tensor's dtype, shape and place, and then
the numbers. Everything is checked before a number is read: what is accepted has one meaning.
(https://github.com/huggingface/safetensors, section Format.)
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing
from flax_decoder.io.strict_json import LISTING, parse_object, shown

# All that the format has: a tensor that is not wanted still takes its place in the file.
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_READABLE = {"F32": np.dtype("<f4"), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype("<f2")}
_MAX_AXES = 8  # tensors of the models that are read have at most 3
_BLOCK_BYTES = 16_000_000  # a piece of a tensor on its way out: small beside the tensor, large for a disk


@dataclass(frozen=True)
class Tensor:
    """Where one array lies.

    Attributes:
        file: its file, open.
        path: the path of that, for messages.
        name: its name there.
        dtype: as the file names it, such as BF16.
        shape: its axes.
        start: its first byte in the file.
    """

    file: BinaryIO
    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """The numbers as they are stored: float32 would hold each of them exactly, but may need twice the memory.

        Raises:
            UserError: they are of another dtype, or the file is no longer what its header says.
        """
        if self.dtype not in _READABLE:
            raise UserError(
                f"{self.path}: tensor {self.name} is {self.dtype}; only {', '.join(_READABLE)} are read: convert it"
            )
        # Not mapped into memory: the pages of a file would count as memory of the process.
        self.file.seek(self.start)
        numbers = np.fromfile(self.file, _READABLE[self.dtype], math.prod(self.shape))
        _refuse_if(numbers.size < math.prod(self.shape), self.path, f"became shorter before {self.name} was read")
        return numbers.reshape(self.shape)


def read_header(file: BinaryIO, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Args:
        file: the file, open; it must stay so until the tensors are read.
        path: its path, for messages.

    Raises:
        UserError: the file is not exactly as the format says.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    _refuse_if(num_bytes < 8, path, "is shorter than the 8 bytes that a safetensors file begins with")
    header_bytes = int.from_bytes(file.read(8), "little")
    rest = num_bytes - 8 - header_bytes
    _refuse_if(rest < 0, path, f"says that its header has {header_bytes:,} bytes, but the file has {num_bytes:,}")
    most = LISTING.num_bytes
    _refuse_if(header_bytes > most, path, f"has a header of {header_bytes:,} bytes, over the limit of {most:,}")
    content = file.read(header_bytes)
    _refuse_if(not content.startswith(b"{"), path, "has a header that does not begin with {")
    document = parse_object(content, f"{path}: the header", LISTING)
    metadata = document.pop("__metadata__", {})
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _refuse_if(not is_text, path, "has a __metadata__ that is more than names and texts")

    ends = {name: _checked_end(path, name, entry, rest) for name, entry in document.items()}
    end = 0
    for name in sorted(document, key=lambda name: (document[name]["data_offsets"], name)):
        start = document[name]["data_offsets"][0]
        _refuse_if(start < end, path, f"tensor {name} begins at {shown(start)}, inside of the tensor before it")
        _refuse_if(start > end, path, f"there is a hole before tensor {name}: from {end} to {shown(start)}")
        end = ends[name]
    _refuse_if(end != rest, path, f"holds {rest:,} bytes of numbers, but its tensors take {end:,}")
    return {
        name: Tensor(
            file, path, name, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0]
        )
        for name, entry in document.items()
    }


def write_tensors(path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterable[np.ndarray]) -> None:
    """Writes float32 tensors, one after the other.

    Args:
        path: the new file.
        shapes: of the tensors, by name.
        arrays: their numbers in the same order; each is made when it is its turn.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 loads no file without it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)  # the numbers begin at a multiple of their size
    with replacing(path) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            assert array.shape == shape, (name, array.shape, shape)
            # A transposed array is put in order piece by piece, for want of room for a second one.
            num_rows = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
            for row in range(0, shape[0], num_rows):
                file.write(np.ascontiguousarray(array[row : row + num_rows], "<f4").data)


def _checked_end(path: Path, name: str, entry: Any, num_bytes: int) -> int:
    """Where a tensor ends among the `num_bytes` of all, after a look at all that its header says."""
    what = f"tensor {name}"
    keys = {"dtype", "shape", "data_offsets"}
    _refuse_if(not isinstance(entry, dict) or entry.keys() != keys, path, f"{what} must have just {sorted(keys)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in _ITEM_BYTES
    _refuse_if(not known, path, f"{what} has the unknown dtype {shown(dtype)}")
    for numbers in (shape, offsets):
        valid = isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)
        _refuse_if(not valid, path, f"{what}: {shown(numbers)} must be a list of whole numbers from 0 on")
    _refuse_if(len(shape) > _MAX_AXES, path, f"{what} has {len(shape)} axes")
    # An axis of length 0 would let the others be of any length.
    _refuse_if(max(shape, default=0) > num_bytes, path, f"{what} of shape {shown(shape)} is more than the file holds")
    _refuse_if(len(offsets) != 2, path, f"{what}: data_offsets = {shown(offsets)} must be a start and an end")
    wanted = math.prod(shape) * _ITEM_BYTES[dtype]
    _refuse_if(
        offsets[1] - offsets[0] != wanted,
        path,
        f"{what} of shape {shape} and dtype {dtype} takes {wanted:,} bytes, but its data_offsets are {shown(offsets)}",
    )
    return offsets[1]


def _refuse_if(wrong: bool, path: Path, reason: str) -> None:
    if wrong:
        raise UserError(f"{path}: {reason}: it is damaged or no safetensors file; get it again")
