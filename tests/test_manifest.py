import hashlib
import json
import os

import pytest

from flax_decoder.errors import BrokenError
from flax_decoder.training.manifest import MANIFEST, read_manifest, verify, write_manifest

FACTS = {"step": 7, "val_loss": None, "config": {"model": {"embed_dim": 13, "init_stddev": 1e-05}}}
FACTS |= {"inputs": {}, "arrays": {"params": {"embed": ["float32", [3, 5]]}}}


@pytest.fixture
def step(tmp_path):
    """A checkpoint of two files."""
    folder = tmp_path / "7"
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "numbers").write_bytes(bytes(range(256)) * 37)
    (folder / "empty").touch()
    write_manifest(folder, FACTS)
    return folder


def rewrite(folder, **changes):
    """Writes a manifest with other contents and a valid hash."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    del manifest["manifest_sha256"]
    text = json.dumps(manifest, indent=1) + "\n"
    manifest["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def test_it_says_what_was_written(step):
    manifest = verify(step)
    assert FACTS.items() <= manifest.items() and manifest["format"] == 1
    numbers = (step / "params" / "d" / "numbers").read_bytes()
    assert manifest["files"] == {
        "empty": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
        "params/d/numbers": {"bytes": 37 * 256, "sha256": hashlib.sha256(numbers).hexdigest()},
    }
    assert read_manifest(step) == manifest


def test_every_bit_of_it_counts(step):
    content = (step / MANIFEST).read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (step / MANIFEST).write_bytes(changed)
        with pytest.raises(BrokenError, match=r"7/manifest\.json: is "):
            read_manifest(step)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b'{"manifest_sha256": NaN}', b"[" * 100_000, b"\xff"])
def test_what_is_no_manifest_is_told(step, content):
    (step / MANIFEST).write_bytes(content)
    with pytest.raises(BrokenError, match=r"7/manifest\.json: is damaged"):
        read_manifest(step)


def test_a_manifest_of_another_time_or_step_is_told(step):
    rewrite(step, format=2)
    with pytest.raises(BrokenError, match="has format 2, but this version reads 1"):
        verify(step)
    rewrite(step, format=1, step=8)
    with pytest.raises(BrokenError, match="belongs to step 8, not to 7"):
        verify(step)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: odd} for name in (*FACTS, "files") for odd in ("5", [1])),
        {"inputs": {"a": None}},
        {"arrays": {"params": 1}},
        {"arrays": {"params": {"embed": 1}}},
        {"files": {"empty": None}},
        {"files": {"empty": {"bytes": "0", "sha256": ""}}},
        {"files": {"empty": {"bytes": 0}}},
    ],
)
def test_entries_of_another_type_are_told(step, changes):
    rewrite(step, **changes)
    with pytest.raises(BrokenError, match=r"7/manifest\.json: is damaged: it lacks an entry, or has one of the wrong"):
        read_manifest(step)


def test_nothing_outside_of_the_folder_is_looked_at(step, tmp_path):
    """A name that leads out of the folder is refused, whatever exists there."""
    (tmp_path / "outside").write_bytes(b"secret")
    facts = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    for name in ("../outside", str(tmp_path / "outside"), "params/../../outside"):
        rewrite(step, files={name: facts})
        with pytest.raises(BrokenError, match="outside: is missing"):
            verify(step)
    rewrite(step, files={"link": facts})
    (step / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(BrokenError, match="link: is a link"):
        verify(step)


def test_pipes_and_devices_are_not_waited_for(step):
    (step / MANIFEST).unlink()
    os.mkfifo(step / MANIFEST)
    with pytest.raises(BrokenError, match="is not a file that a save writes"):
        read_manifest(step)


def test_what_a_system_leaves_in_folders_harms_nothing(step):
    (step / ".DS_Store").write_bytes(b"x")
    verify(step)
