"""safetensors files: a strict reader, one tensor at a time, and a writer.

A file is a length N (8 bytes, little-endian), N bytes of JSON with the dtype, shape and offsets of each tensor, and the
numbers (https://github.com/huggingface/safetensors, section Format). The header is checked before a number is read.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from flax_decoder.errors import UserError
from flax_decoder.io.files import replacing
from flax_decoder.io.strict_json import LISTING, parse_object, shown

# All dtypes of the format: the offsets of a tensor that is not read are checked too.
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_READABLE = {"F32": np.dtype("<f4"), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype("<f2")}
_MAX_AXES = 8  # tensors of the supported families have at most 3
_BLOCK_BYTES = 16_000_000  # written at once: small compared with a tensor, large for a disk


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        path: of the open file, for messages.
        dtype: as the header says it, such as BF16.
        start: its first byte in the file.
    """

    file: BinaryIO
    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.start + math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def read(self) -> np.ndarray:
        """The numbers in the dtype of the file: float32 would be exact too, but may take twice the memory.

        Raises:
            UserError: the dtype is not supported, or the file became shorter.
        """
        if self.dtype not in _READABLE:
            raise UserError(
                f"{self.path}: tensor {self.name} is {self.dtype}; only {', '.join(_READABLE)} are read: convert it"
            )
        # Not memory-mapped: the pages of the file would count as memory of the process.
        self.file.seek(self.start)
        numbers = np.fromfile(self.file, _READABLE[self.dtype], math.prod(self.shape))
        _refuse_if(numbers.size < math.prod(self.shape), self.path, f"became shorter before {self.name} was read")
        return numbers.reshape(self.shape)


def read_header(file: BinaryIO, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; it must stay open until they are read. `path` is for messages.

    Raises:
        UserError: the file does not follow the format exactly.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    _refuse_if(num_bytes < 8, path, "is shorter than the 8 bytes that a safetensors file begins with")
    header_bytes = int.from_bytes(file.read(8), "little")
    first = 8 + header_bytes  # byte of the first tensor
    _refuse_if(first > num_bytes, path, f"its header has {header_bytes:,} bytes, but the file {num_bytes:,}")
    limit = LISTING.num_bytes
    _refuse_if(header_bytes > limit, path, f"its header has {header_bytes:,} bytes, over the limit of {limit:,}")
    content = file.read(header_bytes)
    _refuse_if(not content.startswith(b"{"), path, "its header does not begin with {")
    document = parse_object(content, f"{path}: the header", LISTING)
    metadata = document.pop("__metadata__", {})
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _refuse_if(not is_text, path, "its __metadata__ is not an object of strings")
    for name, entry in document.items():
        _check_entry(path, name, entry, num_bytes - first)
    tensors = {
        name: Tensor(file, path, name, entry["dtype"], tuple(entry["shape"]), first + entry["data_offsets"][0])
        for name, entry in document.items()
    }
    end = first
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        expected = f"but the numbers before it end at byte {end}"
        _refuse_if(tensor.start != end, path, f"tensor {tensor.name} begins at byte {shown(tensor.start)}, {expected}")
        end = tensor.end
    _refuse_if(end != num_bytes, path, f"has {num_bytes:,} bytes, but its tensors end at byte {end:,}")
    return tensors


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[np.ndarray]) -> None:
    """Writes float32 tensors, one after the other, to a new file; each array is taken when it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 loads no file without it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)  # aligns the numbers
    with replacing(path) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            assert array.shape == shape, (name, array.shape, shape)
            # A transposed array is copied a block at a time, to save memory.
            num_rows = max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
            for row in range(0, shape[0], num_rows):
                file.write(np.ascontiguousarray(array[row : row + num_rows], "<f4").data)


def _check_entry(path: Path, name: str, entry: Any, num_bytes: int) -> None:
    """Checks what the header says of a tensor; the numbers of all tensors take `num_bytes`."""
    what = f"tensor {name}"
    keys = {"dtype", "shape", "data_offsets"}
    _refuse_if(not isinstance(entry, dict) or entry.keys() != keys, path, f"{what} must have exactly {sorted(keys)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    is_known = isinstance(dtype, str) and dtype in _ITEM_BYTES
    _refuse_if(not is_known, path, f"{what} has the unknown dtype {shown(dtype)}")
    for values in (shape, offsets):
        is_valid = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
        _refuse_if(not is_valid, path, f"{what}: {shown(values)} must be a list of whole numbers, 0 or more")
    _refuse_if(len(shape) > _MAX_AXES, path, f"{what} has {len(shape)} axes, over the limit of {_MAX_AXES}")
    # If an axis is 0, the product says nothing about the others.
    _refuse_if(max(shape, default=0) > num_bytes, path, f"{what} of shape {shown(shape)} is larger than the file")
    size = math.prod(shape) * _ITEM_BYTES[dtype]
    is_valid = len(offsets) == 2 and offsets[1] - offsets[0] == size
    _refuse_if(
        not is_valid,
        path,
        f"{what} of shape {shape} and dtype {dtype} takes {size:,} bytes, but its data_offsets are {shown(offsets)}",
    )


def _refuse_if(condition: bool, path: Path, reason: str) -> None:
    if condition:
        raise UserError(f"{path}: {reason}; the file is damaged or not a safetensors file: get it again")
