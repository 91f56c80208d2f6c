"""Pickles under every usual name: never unpickled."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from model_folder import INDEX, WEIGHTS, Bomb, change, make_folder, refusal, split_in_two

import flax_decoder as fd
from flax_decoder.config import DataConfig
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.data.shards import load_corpus

ROW = pytest.mark.fault("pickles")


def plain(bomb):
    return pickle.dumps(bomb)


def torch_zip(bomb):
    """The format of torch.save: a zip with a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(bomb))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def numpy_object(bomb):
    file = io.BytesIO()
    np.save(file, np.array([bomb], object), allow_pickle=True)
    return file.getvalue()


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    pickle.loads(plain(Bomb(path)))
    assert path.exists()  # the pickle works


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model")


NAMES = {
    "pytorch_model.bin": torch_zip,
    "pytorch_model-00001-of-00002.bin": torch_zip,
    "consolidated.00.pth": torch_zip,
    "model.pt": torch_zip,
    "last.ckpt": torch_zip,
    "weights.pkl": plain,
    "params.pickle": plain,
    "model.npy": numpy_object,
    "adapter_model.bin": plain,
}


@ROW
@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_in_place_of_the_weights_is_refused(name, folder, canary):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(NAMES[name](Bomb(canary)))
    message = refusal(folder)
    assert name in message and "can run any code" in message and "save_pretrained" in message


@ROW
@pytest.mark.parametrize("make", [plain, torch_zip, numpy_object])
@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "config.json", "tokenizer.json", "generation_config.json"])
def test_a_pickle_under_another_name_is_refused(name, make, folder, canary):
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(make(Bomb(canary)))
    assert str(folder / name) in refusal(folder)


@ROW
def test_a_pickle_that_the_index_names_is_refused(folder, canary):
    weight_map = split_in_two(folder)
    (folder / "pytorch_model.bin").write_bytes(torch_zip(Bomb(canary)))
    change(folder / INDEX, weight_map=dict.fromkeys(weight_map, "pytorch_model.bin"))
    assert "'pytorch_model.bin' is not the plain name of a safetensors file" in refusal(folder)


@ROW
def test_a_pickle_beside_the_weights_is_left_alone(folder, canary):
    for name, make in NAMES.items():
        (folder / name).write_bytes(make(Bomb(canary)))
    fd.load(folder)


COMMANDS = {
    "generate": ["generate", "CKPT", "--prompt", "a"],
    "draft": ["generate", "model", "--prompt", "a", "--draft", "CKPT"],
    "tokenizer": ["generate", "ckpt.pt", "--prompt", "a", "--tokenizer", "CKPT"],
    "eval": ["eval", "CKPT", "text.txt"],
    "lens": ["lens", "CKPT", "--prompt", "a", "--out", "lens.html"],
    "compare": ["compare", "CKPT"],
    "convert": ["convert", "CKPT", "run"],
    "names": ["convert", "CKPT", "run", "--names", "names.toml"],
    "chat": ["chat", "CKPT"],
    "verify": ["verify", "CKPT"],
}


@ROW
@pytest.mark.parametrize("command", COMMANDS)
def test_a_pickle_in_place_of_a_checkpoint_is_refused(command, folder, canary, refused):
    """Whatever its format: plain, of today's PyTorch, or of that before 1.6, where the bomb comes after the numbers."""
    torch, plain_gpt = pytest.importorskip("torch"), pytest.importorskip("plain_gpt")
    (folder.parent / "text.txt").write_text("a")
    (folder.parent / "names.toml").write_text("[model]\n[names]\n")
    model, model_args = plain_gpt.make_gpt()
    content = plain_gpt.checkpoint(model, model_args)
    torch.save(content, folder.parent / "ckpt.pt")
    old, inside = io.BytesIO(), io.BytesIO()
    torch.save(content | {"config": Bomb(canary)}, old, _use_new_zipfile_serialization=False)
    torch.save(content | {"config": Bomb(canary)}, inside)
    for number, data in enumerate((plain(Bomb(canary)), torch_zip(Bomb(canary)), old.getvalue(), inside.getvalue())):
        path = folder.parent / f"{number}.ckpt"
        path.write_bytes(data)
        message = refused(*(path.name if word == "CKPT" else word for word in COMMANDS[command]))
        assert path.name in message
        if number > 0 and command not in ("tokenizer", "chat", "verify"):
            assert "nothing was run" in message


@ROW
@pytest.mark.parametrize("make", [plain, torch_zip, numpy_object])
def test_a_pickle_in_place_of_tokens_is_refused(make, tmp_path, canary):
    (tmp_path / "text").write_text("to be or not to be\n" * 9)
    prepare_corpus(DataConfig(path=str(tmp_path / "text")), tmp_path)
    for path in tmp_path.glob("*.bin"):
        path.write_bytes(make(Bomb(canary)))
    with pytest.raises(fd.FaultError, match="missing or damaged"):
        load_corpus(tmp_path)
