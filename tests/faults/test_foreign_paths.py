"""Paths and links that lead out of a model folder, and names of other things than files: refused, never opened."""

import json
import os
import shutil
import sys

import pytest
from model_folder import INDEX, WEIGHTS, change, make_folder, refusal, split_in_two

import flax_decoder as fd
from flax_decoder.data.chat_template import load_chat_template

ROW = pytest.mark.fault("index paths")
OPENED: list[str] = []


def _note(event, arguments):
    """Records the path of every file that Python opens."""
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        OPENED.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_note)  # an audit hook cannot be removed


@pytest.fixture
def canary(tmp_path):
    """A readable weights file outside the model folder, which must not be opened."""
    path = tmp_path / "outside" / "canary.safetensors"
    path.parent.mkdir()
    shutil.copy(make_folder(tmp_path / "source") / WEIGHTS, path)
    OPENED.clear()
    yield path
    assert os.path.realpath(path) not in OPENED
    open(path, "rb").close()
    assert os.path.realpath(path) in OPENED  # the hook works


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model")


NAMES = {
    "one folder up": "../outside/canary.safetensors",
    "up and down": "sub/../../outside/canary.safetensors",
    "absolute": "{canary}",
    "a file of the system": "/etc/hostname",
    "dots": "..",
    "one dot": ".",
    "nothing": "",
    "a folder below": "sub/canary.safetensors",
    "backslashes": "..\\outside\\canary.safetensors",
    "NUL": "model.safetensors\0.json",
    "an escape": "\x1b]0;title\x07.safetensors",
    "5,000 characters": "a" * 5000 + ".safetensors",
    "a URL": "file://{canary}",
    "a number": 3,
    "a list": ["../outside/canary.safetensors"],
}


@ROW
@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_index_that_is_no_file_of_the_folder_is_refused(name, folder, canary):
    weight_map = split_in_two(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "canary.safetensors").symlink_to(canary)
    value = NAMES[name]
    value = value.replace("{canary}", str(canary)) if isinstance(value, str) else value
    change(folder / INDEX, weight_map=weight_map | {next(iter(weight_map)): value})
    message = refusal(folder)
    assert "is not the plain name" in message or "weight_map must say" in message
    assert str(folder / INDEX) in message


@ROW
def test_half_a_surrogate_pair_in_the_index_is_refused(folder, canary):
    weight_map = split_in_two(folder)
    text = json.dumps(weight_map | {next(iter(weight_map)): "\ud800.safetensors"})
    (folder / INDEX).write_text(f'{{"weight_map": {text}}}')
    assert "surrogates not allowed" in refusal(folder)


def _link_to_link(place, canary):
    (place.parent / "middle").symlink_to(canary)
    place.symlink_to("middle")


def _circle(place, canary):
    (place.parent / "other").symlink_to(place.name)
    place.symlink_to("other")


def _linked_folder(place, canary):
    (place.parent / "sub").symlink_to(canary.parent)
    place.symlink_to(f"sub/{canary.name}")


def _device(place, canary):
    try:
        os.mknod(place, 0o20644, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


SPECIAL = {
    "link out": lambda place, canary: place.symlink_to(f"../outside/{canary.name}"),
    "absolute link": lambda place, canary: place.symlink_to(canary),
    "link to a link out": _link_to_link,
    "links in a circle": _circle,
    "link to itself": lambda place, canary: place.symlink_to(place.name),
    "link to nothing": lambda place, canary: place.symlink_to("nothing"),
    "link through a folder": _linked_folder,
    "link to /dev/zero": lambda place, canary: place.symlink_to("/dev/zero"),
    "link to a terminal": lambda place, canary: place.symlink_to("/dev/stdin"),
    "link to memory": lambda place, canary: place.symlink_to("/proc/self/mem"),
    "link to blobs": lambda place, canary: place.symlink_to(f"../../blobs/{canary.name}"),
    "device": _device,
    "FIFO": lambda place, canary: os.mkfifo(place),
    "folder": lambda place, canary: place.mkdir(),
}
REASONS = {
    "link to a link out": "is a link;",
    "links in a circle": "is a link;",
    "link to itself": "is a link;",
    "link to nothing": "cannot be read: No such file",
    "device": "not a regular file",
    "FIFO": "not a regular file",
    "folder": "is a folder",
}
FILES = ["config.json", "generation_config.json", "tokenizer.json", WEIGHTS, INDEX, "shard"]
# All are opened by the same function; for each file, two kinds show that it is.
SHORT = [f"{name}-{kind}" for name in FILES for kind in ("link out", "FIFO")]


@ROW
@pytest.mark.short(*SHORT, *(f"{WEIGHTS}-{kind}" for kind in SPECIAL))
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_the_folder_is_refused(kind, name, folder, canary):
    if name in (INDEX, "shard"):
        weight_map = split_in_two(folder)
        name = name if name == INDEX else next(iter(weight_map.values()))
    (folder / name).unlink(missing_ok=True)
    SPECIAL[kind](folder / name, canary)
    message = refusal(folder)
    assert str(folder / name) in message
    assert REASONS.get(kind, "is a link out of its folder") in message
    assert not any(path.startswith(("/dev/", "/proc/self/mem")) for path in OPENED)


@ROW
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["link out", "FIFO", "device"])
def test_the_same_for_a_chat_template(kind, name, folder, canary):
    (folder / name).unlink(missing_ok=True)
    SPECIAL[kind](folder / name, canary)
    with pytest.raises(fd.UserError, match=name):
        load_chat_template(folder)


@pytest.fixture
def cache(folder, canary):
    """The folder in the layout of Hugging Face's download cache: models--NAME/snapshots/REVISION, links to blobs."""
    model = folder.parent / "models--someone--model"
    (model / "snapshots").mkdir(parents=True)
    (model / "blobs").mkdir()
    snapshot = folder.rename(model / "snapshots" / "abc")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(model / "blobs" / f"f00{number}")
        path.symlink_to(f"../../blobs/f00{number}")
    return snapshot


@ROW
def test_the_download_cache_of_hugging_face_is_read(cache):
    fd.load(cache)
    reached = cache.parent / "main"
    reached.symlink_to("abc")
    fd.load(reached)  # the folder itself may be a link


@ROW
@pytest.mark.parametrize("kind", ["blob is a link", "blobs are a link", "blobs of another", "no such blob", "two up"])
def test_the_download_cache_leads_no_further(kind, cache, canary):
    place, blobs = cache / WEIGHTS, cache.parent.parent / "blobs"
    if kind == "blob is a link":
        (blobs / "bad").symlink_to(canary)
        target = "../../blobs/bad"
    elif kind == "blobs are a link":
        target = os.readlink(place)
        shutil.copytree(blobs, canary.parent, dirs_exist_ok=True)
        shutil.copy(canary, canary.parent / os.path.basename(target))
        shutil.rmtree(blobs)
        blobs.symlink_to(canary.parent)
    elif kind == "blobs of another":
        target = f"../../../outside/{canary.name}"
    else:
        target = "../../blobs/absent" if kind == "no such blob" else f"../../blobs/../../outside/{canary.name}"
    place.unlink()
    place.symlink_to(target)
    OPENED.clear()
    assert str(cache) in refusal(cache)
    assert not any(path.startswith(f"{canary.parent}/") for path in OPENED)
