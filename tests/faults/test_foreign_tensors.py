"""Safetensors files made to do harm, or damaged: refused by name, at little cost; what is read means one thing."""

import copy
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folder import (
    WEIGHTS,
    bounded,
    entry,
    fuzzed,
    make_folder,
    refusal,
    safetensors_bytes,
    tensors_of,
)
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

import flax_decoder as fd
from flax_decoder.huggingface import weights
from flax_decoder.huggingface.tensor_file import read_header

ROW = pytest.mark.fault("safetensors")
FUZZ = pytest.mark.fault("safetensors, fuzzed")
QUERY = "model.layers.1.self_attn.q_proj.weight"


FILES = {
    "nothing": (b"", "is shorter than the 8 bytes"),
    "seven bytes": (b"1234567", "is shorter than the 8 bytes"),
    "length beyond the file": ((2**40).to_bytes(8, "little") + b"{}", "its header has 1,099,511,627,776 bytes"),
    "length one too long": ((3).to_bytes(8, "little") + b"{}", "its header has 3 bytes"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "its header has 18,446,744,073,709,551,615 bytes"),
    "header of 100 MB": (
        lambda: safetensors_bytes(b'{"a":[' + b"[]," * 33_000_000 + b"[]]}"),
        "over the limit of 5,000,000",
    ),
    "header of 4.9 MB in lists": (
        lambda: safetensors_bytes(b'{"a":[' + b"[]," * 1_630_000 + b"[]]}"),
        "bytes of memory",
    ),
    "header of 4.9 MB in names": (lambda: safetensors_bytes(b"{" + b'"":0,' * 980_000 + b'"":0}'), "bytes of memory"),
    "leading space": (safetensors_bytes(b" {}"), "does not begin with {"),
    "a list": (safetensors_bytes(b"[]"), "does not begin with {"),
    "no end": (safetensors_bytes(b'{"a":'), "is not valid JSON"),
    "two documents": (safetensors_bytes(b"{}{}"), "is not valid JSON"),
    "no UTF-8": (safetensors_bytes(b'{"\xff":1}'), "is not valid JSON"),
    "depth of 100,000": (safetensors_bytes(b'{"a":' * 100_000), "levels deep"),
    "depth of 33 behind quotes": (safetensors_bytes(b'{"\\"[":' + b"[" * 32 + b"]" * 32 + b"}"), "levels deep"),
    "NaN": (safetensors_bytes(b'{"a":NaN}'), "has the number 'NaN'"),
    "Infinity": (safetensors_bytes(b'{"a":-Infinity}'), "has the number '-Infinity'"),
    "1e999": (safetensors_bytes(b'{"a":1e999}'), "has the number '1e999'"),
    "5,000 digits": (safetensors_bytes(b'{"a":' + b"1" * 5000 + b"}"), "is not valid JSON"),
    "a name twice": (safetensors_bytes(b'{"a":1,"a":2}'), "has the name 'a' twice"),
    "an inner name twice": (safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "the name 'dtype' twice"),
    "half a surrogate pair": (safetensors_bytes(b'{"a":{"dtype":"\\ud800"}}'), "surrogates not allowed"),
    "an escape in a name": (safetensors_bytes({"a\x1b[2J": entry()}, b"1234"), "cannot be printed"),
    "a name of 501": (safetensors_bytes({"a" * 501: entry()}, b"1234"), "is too long"),
    "a tensor that is a number": (safetensors_bytes({"a": 1}), "tensor a must have exactly"),
    "one more field": (safetensors_bytes({"a": entry() | {"x": 1}}, b"1234"), "tensor a must have exactly"),
    "unknown dtype": (safetensors_bytes({"a": entry("F33")}, b"1234"), "unknown dtype 'F33'"),
    "long dtype": (safetensors_bytes({"a": entry("F" * 9999)}, b"1234"), "unknown dtype 'FFF"),
    "dtype that is a list": (safetensors_bytes({"a": entry(["F32"])}, b"1234"), "unknown dtype ['F32']"),
    "negative axis": (safetensors_bytes({"a": entry(shape=[-1])}, b"1234"), "[-1] must be a list"),
    "axis that is true": (safetensors_bytes({"a": entry(shape=[True])}, b"1234"), "[True] must be a list"),
    "axis that is a float": (safetensors_bytes({"a": entry(shape=[1.0])}, b"1234"), "[1.0] must be a list"),
    "nine axes": (safetensors_bytes({"a": entry(shape=[1] * 9)}, b"1234"), "has 9 axes"),
    "a million axes": (lambda: safetensors_bytes({"a": entry(shape=[9] * 1_000_000)}, b"1234"), "has 1000000 axes"),
    "product over 2^64": (safetensors_bytes({"a": entry(shape=[2**32, 2**32 + 1])}, b"1234"), "larger than the file"),
    "0 times 10^18": (safetensors_bytes({"a": entry(shape=[0, 10**18], end=0)}), "larger than the file"),
    "axis of 4,000 digits": (safetensors_bytes({"a": entry(shape=[10**4000])}, b"1234"), "larger than the file"),
    "shape against offsets": (safetensors_bytes({"a": entry(shape=[2])}, b"1234"), "takes 8 bytes"),
    "offsets against shape": (safetensors_bytes({"a": entry(end=8)}, b"12345678"), "takes 4 bytes"),
    "one offset": (safetensors_bytes({"a": entry() | {"data_offsets": [0]}}, b"1234"), "takes 4 bytes"),
    "offsets the wrong way": (safetensors_bytes({"a": entry(start=4, end=0)}, b"1234"), "takes 4 bytes"),
    "offset of 4,000 digits": (
        safetensors_bytes({"a": entry(start=10**4000, end=10**4000 + 4)}, b"1234"),
        "the numbers before it",
    ),
    "the same bytes twice": (safetensors_bytes({"a": entry(), "b": entry()}, b"1234"), "the numbers before it"),
    "an overlap": (safetensors_bytes({"a": entry(), "b": entry(start=2, end=6)}, b"123456"), "the numbers before it"),
    "a hole": (safetensors_bytes({"a": entry(), "b": entry(start=8, end=12)}, b"1" * 12), "the numbers before it"),
    "a hole at the start": (safetensors_bytes({"a": entry(start=4, end=8)}, b"1" * 8), "the numbers before it"),
    "a byte too many": (safetensors_bytes({"a": entry()}, b"12345"), "its tensors end at byte"),
    "a byte too few": (safetensors_bytes({"a": entry()}, b"123"), "its tensors end at byte"),
    "metadata that is no text": (safetensors_bytes({"__metadata__": {"format": 1}}), "__metadata__"),
}


@ROW
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_just_safetensors_is_refused(name, tmp_path):
    content, part = FILES[name]
    folder = make_folder(tmp_path / "model")
    (folder / WEIGHTS).write_bytes(content() if callable(content) else content)
    message = refusal(folder)
    assert message.startswith(f"{folder / WEIGHTS}: ") and part in message


def damaged(kind, arrays):
    """Arrays of a model with something wrong; what the message says, and of which tensor."""
    if kind == "missing":
        del arrays[QUERY]
        return "is missing", QUERY
    if kind == "extra":
        name = QUERY.replace("weight", "bias")
        arrays[name] = arrays[QUERY][:, 0].copy()
        return "is not part of llama", name
    if kind == "shape":
        arrays[QUERY] = arrays[QUERY].T.copy()
        return "its settings ask for (20, 14)", QUERY
    if kind == "twice":
        arrays[QUERY.removeprefix("model.")] = arrays[QUERY]
        return "twice", QUERY
    value = {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf, "negative NaN": np.copysign(np.nan, -1)}
    arrays[QUERY][19, 13] = value[kind]
    return f"holds {value[kind]} at [19, 13]", QUERY


NOT_FINITE = ["NaN", "infinity", "minus infinity", "negative NaN"]


@ROW
@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "twice", *NOT_FINITE])
def test_tensors_must_be_those_of_the_model(kind, tmp_path):
    folder = make_folder(tmp_path / "model")
    arrays = tensors_of(folder / WEIGHTS)
    part, name = damaged(kind, arrays)
    (folder / WEIGHTS).write_bytes(save(arrays))
    message = refusal(folder)
    assert part in message and name in message
    if kind in NOT_FINITE:
        assert "--allow-nan" in message
        params = fd.load(folder, allow_nan=True)[1]
        # (out, in) there is (in, head, width) here.
        expected = arrays[QUERY].T.reshape(14, 2, 10)
        np.testing.assert_array_equal(params["layers"]["attention"]["query"]["kernel"][1], expected)


@ROW
def test_another_dtype_is_refused(tmp_path):
    folder = make_folder(tmp_path / "model")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    assert "is I32; only F32, BF16, F16 are read" in refusal(folder)


@ROW
def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model")
    check = weights.check_sizes

    def shrink(*arguments):
        check(*arguments)
        os.truncate(folder / WEIGHTS, 5000)

    monkeypatch.setattr("flax_decoder.huggingface.folder.check_sizes", shrink)
    assert "became shorter before" in refusal(folder)


@ROW
def test_a_file_that_is_exchanged_while_it_is_read_does_not_matter(tmp_path, monkeypatch):
    """The file that was checked is the one that is read: it is opened once."""
    folder = make_folder(tmp_path / "model")
    expected = fd.load(folder)[1]["head"]
    check = weights.check_sizes

    def exchange(*arguments):
        check(*arguments)
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).write_bytes(b"\0" * 100_000)

    monkeypatch.setattr("flax_decoder.huggingface.folder.check_sizes", exchange)
    np.testing.assert_array_equal(fd.load(folder)[1]["head"], expected)


@ROW
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**12),
        ("hidden_size", 2**31 - 2),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 9_999),
        ("vocab_size", 2**31 - 1),
        ("num_attention_heads", 2**30),
        ("intermediate_size", 2**30),
        ("head_dim", 2**30),
    ],
)
def test_sizes_that_the_files_cannot_hold_are_refused(field, value, tmp_path):
    folder = make_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    message = refusal(folder)
    assert str(folder / "config.json") in message and field in message


@ROW
def test_an_empty_file_of_a_terabyte_is_refused(tmp_path):
    """A file with a hole takes no room on the disk; its header may say anything that its length allows."""
    folder = make_folder(tmp_path / "model")
    size = 10**12
    header = json.dumps({QUERY: entry("F32", [size // 4], 0, size)}).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert "num_hidden_layers ask for at least 2 tensors, but the files hold 1" in refusal(folder)


# --- Fuzzing: what is read has the meaning that the reference implementation gives it ---

ARRAYS = {
    "embed": ("F32", np.arange(12, dtype="<f4").reshape(3, 4)),
    "half": ("F16", np.arange(6, dtype="<f2").reshape(2, 3)),
    "brain": ("BF16", np.arange(6, dtype="<u2").reshape(3, 2)),
    "mask": ("BOOL", np.ones(5, bool)),
}


def _valid_header():
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, array) in ARRAYS.items():
        header[name] = entry(dtype, array.shape, end, end + array.nbytes)
        end += array.nbytes
    return header


HEADER = _valid_header()
NUMBERS = b"".join(array.tobytes() for _, array in ARRAYS.values())
VALID = safetensors_bytes(HEADER, NUMBERS)

ODD = st.one_of(
    st.integers(-2, 60),
    st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 1.0, 1e308, True, None, "", "F32", "F4"]),
    st.sampled_from(["BF16", "F16", "F64", "I8", "BOOL", "C64", "F8_E4M3", [], [1], [0, 4], {}, {"dtype": "F32"}]),
)


HOSTILE = ODD.map(copy.deepcopy)  # they are changed further


@st.composite
def mutated_bytes(draw):
    """The valid file after some changes of single bytes and of stretches."""
    content = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "copy", "cut"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[place] = draw(st.sampled_from(b'\x00 "[]{},:0123456789-eE.\\FIBU\xff'))
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 8))]
        elif kind == "copy":
            content[place:place] = content[place : place + draw(st.integers(1, 60))]
        else:
            del content[place:]
    return bytes(content)


@st.composite
def mutated_structure(draw):
    """A well-formed file that says something else: other dtypes, shapes, places, names, lengths."""
    pairs = [[name, dict(value)] for name, value in HEADER.items()]
    numbers = bytearray(NUMBERS)
    for _ in range(draw(st.integers(1, 3))):
        pair = draw(st.sampled_from(pairs))
        kind = draw(st.sampled_from(["field", "number", "name", "twice", "order", "numbers", "swap", "lose", "value"]))
        if kind == "field" and isinstance(pair[1], dict):
            pair[1][draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(HOSTILE)
        elif kind == "number" and isinstance(pair[1], dict):
            field = draw(st.sampled_from(["shape", "data_offsets"]))
            values = pair[1].get(field)
            if isinstance(values, list) and values:
                values = list(values)
                values[draw(st.integers(0, len(values) - 1))] = draw(HOSTILE)
                pair[1][field] = values
        elif kind == "name":
            pair[0] = draw(st.one_of(st.sampled_from([*HEADER, "__metadata__", "", "\x1b", "é"]), st.text(max_size=3)))
        elif kind == "twice":
            pairs.append([pair[0], dict(pair[1]) if isinstance(pair[1], dict) else pair[1]])
        elif kind == "order":
            pairs = draw(st.permutations(pairs))
        elif kind == "numbers":
            change = draw(st.integers(-8, 8))
            numbers = numbers + b"\1" * change if change > 0 else numbers[: len(numbers) + change]
        elif kind == "swap":
            other = draw(st.sampled_from(pairs))
            pair[1], other[1] = other[1], pair[1]
        elif kind == "lose" and len(pairs) > 1:
            pairs.remove(pair)
        else:
            pair[1] = draw(HOSTILE)
    header = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}"
    content = header.encode() + b" " * draw(st.integers(0, 3))
    length = len(content) + draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1, 2**40, 2**63]))
    return struct.pack("<Q", max(length, 0)) + content + bytes(numbers)


def check(content, path):
    """Either refused, or read as the reference implementation reads it, bit by bit."""
    path.write_bytes(content)
    with bounded():
        try:
            with open(path, "rb") as file:
                tensors = weights_of(file, path)
        except fd.UserError as error:
            assert str(path) in str(error)
            return
    try:
        expected = {name: value for name, value in deserialize(content)}
    except SafetensorError as error:
        raise AssertionError(f"only we read this: {error}") from None
    assert tensors.keys() == expected.keys()
    for name, (dtype, shape, data) in tensors.items():
        assert dtype == expected[name]["dtype"] and list(shape) == expected[name]["shape"]
        assert data is None or data == bytes(expected[name]["data"])


def weights_of(file, path):
    """Dtype, shape and bytes of each tensor; None for those of dtypes that are not read."""
    result = {}
    for name, tensor in read_header(file, path).items():
        readable = tensor.dtype in ("F32", "F16", "BF16")
        result[name] = tensor.dtype, tensor.shape, tensor.read().tobytes() if readable else None
    return result


SIZES = [300, *(pytest.param(size, marks=pytest.mark.full) for size in (10_000, 120_000))]


@FUZZ
def test_the_file_that_is_fuzzed_is_read(tmp_path):
    (tmp_path / "x").write_bytes(VALID)
    with open(tmp_path / "x", "rb") as file:
        read = weights_of(file, tmp_path / "x")
    assert {name: data for name, (_, _, data) in read.items()} == {
        name: None if dtype == "BOOL" else array.tobytes() for name, (dtype, array) in ARRAYS.items()
    }


@FUZZ
@pytest.mark.parametrize("strategy", [mutated_bytes, mutated_structure])
@pytest.mark.parametrize("num_examples", SIZES)
def test_what_is_read_is_what_the_reference_reads(strategy, num_examples, tmp_path, count_cases):
    cases = 0

    @fuzzed(num_examples)
    @given(strategy())
    def run(content):
        nonlocal cases
        cases += 1
        check(content, tmp_path / "fuzzed.safetensors")

    run()
    count_cases(cases)
