"""Files of torch.save: what is read, and what is refused before anything in it runs."""

import os
import pickle
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402
from faults.model_folder import Bomb

import flax_decoder as fd
from flax_decoder.huggingface.torch_file import find_state_dict, read_torch_file, stored_tensors

WEIGHT_32 = np.arange(6, dtype=np.float32).reshape(3, 2)


def weights():
    return {"weight": torch.tensor(WEIGHT_32)}


def read(path):
    return {name: tensor.read() for name, tensor in stored(path).items()}


def stored(path):
    return stored_tensors(find_state_dict(read_torch_file(path), path), path)


@pytest.mark.parametrize(
    "content",
    [
        weights(),
        {"model": weights(), "step": 3},
        {"state_dict": {"module.weight": weights()["weight"]}},
        {"model_state_dict": {"_orig_mod.module.weight": torch.nn.Parameter(weights()["weight"])}},
        {"model": {"weight": torch.tensor(WEIGHT_32.T).t()}},  # not contiguous
    ],
    ids=["plain", "model", "data parallel", "compiled", "transposed"],
)
def test_a_state_dict_is_found_wherever_it_is_and_whatever_wraps_it(content, tmp_path):
    for suffix, is_zip in ((".pt", True), (".pth", False)):
        path = tmp_path / f"model{suffix}"
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        np.testing.assert_array_equal(read(path)["weight"], WEIGHT_32)
        assert stored(path)["weight"].shape == (3, 2)


def test_half_precision_stays_half_precision(tmp_path):
    for dtype, ours in ((torch.bfloat16, jnp.bfloat16), (torch.float16, np.float16)):
        torch.save({"weight": weights()["weight"].to(dtype)}, tmp_path / "model.pt")
        numbers = read(tmp_path / "model.pt")["weight"]
        assert numbers.dtype == ours
        np.testing.assert_array_equal(numbers.astype(np.float32), WEIGHT_32)


def itself():
    table = {}
    table["model"] = table
    return table


def refused_content(canary):
    """What is saved, and a part of the refusal."""
    return {
        "bomb": (Bomb(canary), "nothing was run"),
        "bomb inside": ({"model": weights(), "config": Bomb(canary)}, "nothing was run"),
        "module": (torch.nn.Linear(2, 3), "'torch.nn.modules.linear.Linear'"),
        "namespace": ({"model": weights(), "config": types.SimpleNamespace(a=1)}, "'types.SimpleNamespace'"),
        "list": ([1], "holds list"),
        "no tensor": ({"model": weights() | {"epoch": 3}}, "epoch is int"),
        "empty": ({}, "has no tensors"),
        "itself": (itself(), "has no tensors|is dict, not a tensor"),
        "name": ({"a\nb": weights()["weight"]}, "has the name"),
        "number": ({1: weights()["weight"]}, "has the name 1"),
        "twice": (weights() | {"module.weight": weights()["weight"]}, "tensor weight is there twice"),
        "float64": ({"weight": torch.zeros(2, dtype=torch.float64)}, "weight is float64; only float32"),
        "repeated": ({"weight": torch.zeros(1).expand(10**9)}, "would take 4,000,000,000 bytes"),
        "sparse": ({"weight": torch.zeros(3).to_sparse()}, "not an ordinary one"),
        "meta": ({"weight": torch.zeros(3, device="meta")}, "not an ordinary one"),
    }


@pytest.mark.parametrize("kind", refused_content(None))
def test_other_content_is_refused(kind, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    content, part = refused_content(canary)[kind]
    for is_zip in (True, False):
        if kind in ("sparse", "module") and not is_zip:
            continue
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(fd.UserError, match=part) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and len(message.splitlines()) <= 2, message
    assert not canary.exists()


def test_what_is_no_file_of_torch_is_refused(tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "model.bin"
    for content in (b"", pickle.dumps(Bomb(canary)), b"\x80\x02" * 20):
        path.write_bytes(content)
        with pytest.raises(fd.UserError, match=r"is not a file of torch\.save"):
            read(path)
    torch.save(weights(), path)
    content = path.read_bytes()
    for damaged in (content[:-100], content[:200], content.replace(b"data.pkl", b"date.pkl")):
        path.write_bytes(damaged)
        with pytest.raises(fd.UserError, match="is damaged"):
            read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
    with pytest.raises(fd.UserError, match="is compressed"):
        read(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(fd.UserError, match="not a regular file"):
        read(path)
    assert not canary.exists()


def test_without_pytorch_the_message_says_what_to_install(tmp_path, monkeypatch):
    torch.save(weights(), tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(fd.UserError, match=r"needs torch, which is not installed: pip install .flax-decoder\[torch\]"):
        read_torch_file(tmp_path / "model.pt")
