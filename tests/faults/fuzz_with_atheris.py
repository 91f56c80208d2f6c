"""Fuzzes a reader of foreign files with atheris, which keeps the inputs that reach new code. Run by hand:

pip install atheris
python tests/faults/fuzz_with_atheris.py tensors -max_total_time=600        (or settings, or tokenizer)

What must hold is what the tests ask: an input is refused with UserError, or read as safetensors reads it.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
from safetensors import deserialize

with atheris.instrument_imports(include=["flax_decoder.io", "flax_decoder.data", "flax_decoder.huggingface"]):
    from flax_decoder.config import ModelConfig
    from flax_decoder.data.tokenizer import make_tokenizer, parse_tokenizer
    from flax_decoder.errors import UserError
    from flax_decoder.huggingface.config import read_settings, write_settings
    from flax_decoder.huggingface.families import FAMILIES
    from flax_decoder.huggingface.tensor_file import read_header
    from flax_decoder.io.strict_json import SETTINGS, parse_object

FOLDER = tempfile.TemporaryDirectory()
PATH = Path(FOLDER.name) / "fuzzed.safetensors"


def tensors(content: bytes) -> None:
    """A safetensors file, beside the reference implementation."""
    PATH.write_bytes(content)
    with open(PATH, "rb") as file:
        read = read_header(file, PATH)
        numbers = {name: tensor.read().tobytes() for name, tensor in read.items() if tensor.dtype == "F32"}
    expected = {name: value["data"] for name, value in deserialize(content)}
    assert read.keys() == expected.keys()
    assert all(bytes(expected[name]) == data for name, data in numbers.items())


def settings(content: bytes) -> None:
    """A config.json."""
    read_settings(parse_object(content, "x", SETTINGS), "x")


def tokenizer(content: bytes) -> None:
    """A tokenizer.json."""
    made = parse_tokenizer(content, "x")
    made.decode(made.encode("the cat"))


def seed(reader: Callable[[bytes], None]) -> bytes:
    """A valid input to begin with."""
    if reader is settings:
        constants = dict(FAMILIES["llama"].constants) | {"feed_forward": "swiglu", "vocab_size": 7}
        return json.dumps(write_settings(ModelConfig(**constants), FAMILIES["llama"])).encode()
    if reader is tokenizer:
        return make_tokenizer("bpe", "the cat sat", 260).to_json().encode()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"12345678"


def main() -> None:
    """Hands what atheris thinks up to the reader that the first argument names."""
    reader = {"tensors": tensors, "settings": settings, "tokenizer": tokenizer}[sys.argv.pop(1)]
    corpus = Path(FOLDER.name) / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed(reader))
    reader(seed(reader))

    def once(content: bytes) -> None:
        with contextlib.suppress(UserError):
            reader(content)

    atheris.Setup([*sys.argv, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
