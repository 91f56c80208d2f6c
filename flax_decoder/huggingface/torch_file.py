"""Files of `torch.save`: .pt, .pth, .bin, .ckpt. Tensors and plain values are read; nothing in a file is ever run.

A pickle is a program. `torch.load(weights_only=True)` knows only the steps that make tensors, numbers, texts, lists and
tables, and stops at any other before it does anything. What is not a file of `torch.save` does not get that far.
"""

import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import jax.numpy as jnp
import numpy as np

from flax_decoder.errors import UserError
from flax_decoder.io.foreign_file import open_named
from flax_decoder.io.strict_json import shown

if TYPE_CHECKING:
    import torch

_ZIP = b"PK\x03\x04"
# The pickled number with which the format before PyTorch 1.6 begins.
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_PICKLE_BYTES = 50_000_000  # of the pickle inside of a zip: some 200 bytes per tensor
_MAX_NAME_CHARACTERS = 500
# Where training scripts put the state dict, and what `torch.compile` and data parallelism put before its names.
_NESTED = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("_orig_mod.", "module.")


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of a state dict; its numbers are in the file, at `path`, until they are read."""

    path: Path
    name: str
    tensor: "torch.Tensor"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    def read(self) -> np.ndarray:
        """The numbers in the dtype of the file.

        Raises:
            UserError: the dtype is not supported.
        """
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(
                f"{self.path}: tensor {self.name} is {dtype}; only float32, bfloat16, float16 are read: convert it"
            )
        tensor = self.tensor.detach().contiguous()
        if dtype == "bfloat16":  # NumPy has none of its own
            return tensor.view(torch_module(str(self.path)).int16).numpy().view(jnp.bfloat16)
        numbers: np.ndarray = tensor.numpy()
        return numbers


def torch_module(what: str) -> Any:
    """PyTorch. Raises UserError, which says that `what` needs it, if it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(f'{what}: needs torch, which is not installed: pip install "flax-decoder[torch]"') from None
    return torch


def read_torch_file(path: Path) -> dict[str, Any]:
    """The content of a file of `torch.save`; the numbers of its tensors stay in the file until they are used.

    Raises:
        UserError: it cannot be read, is not such a file, holds other objects than tensors and plain values, or is not a
            table; or PyTorch is not installed.
    """
    with open_named(path) as file:
        start = file.read(len(_BEFORE_ZIP))
        is_zip = start.startswith(_ZIP)
        if not is_zip and start != _BEFORE_ZIP:
            raise UserError(f"{path}: is not a file of torch.save; give the .pt, .pth, .bin or .ckpt file of a model")
        torch = torch_module(str(path))
        if is_zip:
            _check_zip(file, path)
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are about what PyTorch itself does with old files
                # Only zips can be memory-mapped, and only by name.
                document = torch.load(
                    path if is_zip else file, map_location="cpu", weights_only=True, mmap=True if is_zip else None
                )
        except Exception as error:  # a damaged pickle can raise anything
            _refuse(error, path)
        num_file_bytes = file.seek(0, 2)
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds {type(document).__name__}, not a state dict; save model.state_dict()")
    _check_memory(document, num_file_bytes, path)
    return document


def find_state_dict(document: Mapping[str, Any], path: Path) -> dict[str, "torch.Tensor"]:
    """The state dict in what `read_torch_file` gives: a usual entry, or the whole, without the prefixes of wrappers.

    Raises:
        UserError: there is none, or a name is there twice.
    """
    torch = torch_module(str(path))
    nested = next((document[name] for name in _NESTED if isinstance(document.get(name), dict)), document)
    result: dict[str, Any] = {}
    for name, tensor in nested.items():
        if not isinstance(name, str) or len(name) > _MAX_NAME_CHARACTERS or not name.isprintable():
            raise UserError(f"{path}: has the name {shown(name)} in its state dict; save model.state_dict()")
        if not isinstance(tensor, torch.Tensor):
            known = ", ".join(_NESTED)
            raise UserError(
                f"{path}: {name} is {type(tensor).__name__}, not a tensor, so this is no state dict; save "
                f"model.state_dict(), alone or as {known}"
            )
        plain = plain_name(name)
        if plain in result:
            raise UserError(f"{path}: tensor {plain} is there twice, with and without a prefix; remove one")
        result[plain] = tensor
    if not result:
        raise UserError(f"{path}: has no tensors; save model.state_dict()")
    return result


def plain_name(name: str) -> str:
    """The name of a tensor without the prefixes of wrappers."""
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def stored_tensors(state_dict: Mapping[str, "torch.Tensor"], path: Path) -> dict[str, TorchTensor]:
    """The tensors of a state dict as `read_params` takes them, by name."""
    return {name: TorchTensor(path, name, tensor) for name, tensor in state_dict.items()}


def _check_zip(file: BinaryIO, path: Path) -> None:
    """Raises UserError unless the entries of a zip are as torch.save writes them: not compressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is damaged: {error}; get it again") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: {shown(entry.filename)} in it is compressed, as torch.save never does")
        if entry.filename.endswith("data.pkl") and entry.file_size > _MAX_PICKLE_BYTES:
            raise UserError(
                f"{path}: lists its tensors in {entry.file_size:,} bytes, over the limit of {_MAX_PICKLE_BYTES:,}; it "
                "is damaged or malicious"
            )


def _refuse(error: Exception, path: Path) -> NoReturn:
    """Raises the UserError of a file that torch.load refuses."""
    reason = str(error)
    name = re.search(r"GLOBAL (\S+) was not|allowed global (\S+) |whose module (\S+) is blocked", reason)
    if name is not None or "Unsupported" in reason or "weights_only" in reason or "not allowed" in reason:
        what = "" if name is None else f" ({shown(next(filter(None, name.groups())))})"
        raise UserError(
            f"{path}: holds objects other than tensors{what}, which could run any code; nothing was run.\n"
            "Save the tensors alone where you trust it: torch.save(model.state_dict(), FILE)"
        ) from None
    lines = [line for line in reason.splitlines() if line.strip()] or [type(error).__name__]
    raise UserError(f"{path}: is damaged: {shown(lines[0])}; get it again") from None


def _check_memory(value: Any, num_file_bytes: int, path: Path) -> None:
    """Raises UserError if tensors stand for more numbers than the file holds: a few of its bytes, many times over."""
    num_bytes, tables, seen = 0, [value], {id(value)}
    while tables:
        for part in tables.pop().values():
            if isinstance(part, dict) and id(part) not in seen:  # a table may hold itself
                tables.append(part)
                seen.add(id(part))
            elif hasattr(part, "is_sparse"):  # a tensor
                if part.layout != torch_module(str(path)).strided or part.device.type != "cpu":
                    raise UserError(f"{path}: holds a tensor that is not an ordinary one; save model.state_dict()")
                num_bytes += math.prod(part.shape) * part.element_size()
    # A head that is the embedding counts twice.
    if num_bytes > 2 * num_file_bytes:
        raise UserError(
            f"{path}: its tensors would take {num_bytes:,} bytes, but the file has {num_file_bytes:,}; it is "
            "damaged or malicious"
        )
