"""Damaged files of a checkpoint, and paths that only have a checkpoint's name."""

import errno
import hashlib
import os
import random
import shutil

import jax
import numpy as np
import pytest
from run_state import snapshot

import flax_decoder as fd
from flax_decoder import config_file
from flax_decoder.cli import main
from flax_decoder.config import RunConfig
from flax_decoder.training.checkpoint import choose_step, saved_steps
from flax_decoder.training.metrics import MetricsLog
from flax_decoder.training.run_id import RUN_ID, read_id

NEWEST, OLDER = 12, 8


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of `trained`, to be damaged."""
    run, arguments = trained
    assert saved_steps(run) == [OLDER, NEWEST]
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", [str(tmp_path / "run") if word == str(run) else word for word in arguments]


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# From the content of a file and that of another file to the damaged content; None deletes the file.
DAMAGES = {
    "flipped": lambda content, other: flip(content, len(content) * 4),
    "truncated": lambda content, other: content[: len(content) * 2 // 3],
    "emptied": lambda content, other: b"",
    "deleted": lambda content, other: None,
    "zeroed": lambda content, other: bytes(len(content)),
    "appended": lambda content, other: content + b"\0",
    "swapped": lambda content, other: other,
}


def assert_falls_back(run, path, capsys, damaged=b""):
    """The older checkpoint is chosen, with a warning that names the file and the hash of its content."""
    assert choose_step(run, "latest") == OLDER
    warning = capsys.readouterr().err
    assert f"warning: {path}: " in warning and "trying another checkpoint" in warning
    if "damaged: its SHA-256 is" in warning:
        assert hashlib.sha256(damaged).hexdigest() in warning


@pytest.mark.fault("each file of a checkpoint damaged in 7 ways")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_seen(copied, capsys, count_cases, damage):
    run, _ = copied
    paths = files_of(run / "checkpoints" / str(NEWEST))
    for path in paths:
        content = path.read_bytes()
        other = next(p.read_bytes() for p in paths if p.read_bytes() != content and p.name != path.name)
        changed = DAMAGES[damage](content, other)
        if changed is None:
            path.unlink()
        else:
            path.write_bytes(changed)
        assert_falls_back(run, path, capsys, changed or b"")
        path.write_bytes(content)
    assert choose_step(run, "latest") == NEWEST
    count_cases(len(paths))


@pytest.mark.fault("files swapped with those of another checkpoint")
def test_files_of_another_checkpoint_are_seen(copied, capsys, count_cases):
    run, _ = copied
    steps = [run / "checkpoints" / str(step) for step in (NEWEST, OLDER)]
    names = {path.relative_to(step) for step in steps for path in files_of(step)}
    both = [name for name in names if all((step / name).exists() for step in steps)]
    different = [name for name in both if len({(step / name).read_bytes() for step in steps}) == 2]
    for name in different:
        content = (steps[0] / name).read_bytes()
        (steps[0] / name).write_bytes((steps[1] / name).read_bytes())
        assert choose_step(run, "latest") == OLDER
        (steps[0] / name).write_bytes(content)
    # A valid checkpoint of another step under this step's name.
    shutil.rmtree(steps[0])
    shutil.copytree(steps[1], steps[0])
    assert choose_step(run, "latest") == OLDER
    count_cases(len(different) + 1)


@pytest.mark.fault("random single bits flipped in a checkpoint")
@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.full)])
def test_any_flipped_bit_is_seen(copied, capsys, count_cases, count):
    run, _ = copied
    paths = files_of(run / "checkpoints" / str(NEWEST))
    sizes = [path.stat().st_size for path in paths]
    rng = random.Random(7)
    for _ in range(count):
        (path,) = rng.choices(paths, sizes)
        content = path.read_bytes()
        changed = flip(content, rng.randrange(8 * len(content)))
        path.write_bytes(changed)
        assert_falls_back(run, path, capsys, changed)
        path.write_bytes(content)
    count_cases(count)


@pytest.mark.fault("a run goes on from the checkpoint before a damaged one")
def test_a_run_goes_on_from_the_one_before(copied, capsys, trained):
    run, arguments = copied
    path = run / "checkpoints" / str(NEWEST) / "params" / "manifest.ocdbt"
    path.write_bytes(flip(path.read_bytes(), 99))
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert f"warning: {path}: is damaged" in shown.err
    assert f"continuing {run} from the checkpoint of step {OLDER}" in shown.out
    assert (run / "checkpoints" / f"{NEWEST}.broken").is_dir() and saved_steps(run) == [OLDER, NEWEST]
    for one, other in zip(*(jax.tree.leaves(fd.load(folder)[1]) for folder in (run, trained[0])), strict=True):
        np.testing.assert_array_equal(one, other)


IMPOSTORS = {
    "empty": lambda steps: (steps / "77").mkdir(),
    "file": lambda steps: (steps / "77").write_text("7"),
    "zeros_before": lambda steps: shutil.copytree(steps / str(NEWEST), steps / "0077"),
    "link": lambda steps: (steps / "77").symlink_to(steps / str(NEWEST)),
    "other_step": lambda steps: shutil.copytree(steps / str(NEWEST), steps / "77"),
}


@pytest.mark.fault("what only has a checkpoint's name")
@pytest.mark.short("other_step")
@pytest.mark.parametrize("kind", IMPOSTORS)
def test_what_only_has_the_name_is_no_checkpoint(copied, kind):
    run, arguments = copied
    IMPOSTORS[kind](run / "checkpoints")
    assert choose_step(run, "latest") == NEWEST
    assert main([*arguments, "--training.num-steps=16"]) == 0
    assert saved_steps(run)[-2:] == [NEWEST, 16]
    assert main(["verify", str(run)]) == 0


@pytest.mark.fault("all checkpoints broken")
def test_where_all_are_broken_nothing_is_done(copied, capsys):
    run, arguments = copied
    for step in saved_steps(run):
        (run / "checkpoints" / str(step) / "manifest.json").unlink()
    before = snapshot(run)
    for words in (arguments, ["generate", str(run), "--prompt", "To"], ["verify", str(run)]):
        assert main(words) == 1
        shown = capsys.readouterr()
        assert all(f"checkpoints/{step}/manifest.json: is missing" in shown.err + shown.out for step in (OLDER, NEWEST))
        assert words[0] == "verify" or f"{run}: all its checkpoints are damaged (8, 12)" in shown.err
        assert "Traceback" not in shown.err
    assert snapshot(run) == before


@pytest.mark.fault("one bit flipped in the tokenizer, the corpus, the config, the log")
@pytest.mark.parametrize("name", ["tokenizer.json", "corpus/corpus.json", "config.toml", "metrics.jsonl"])
def test_what_a_checkpoint_hangs_on_is_looked_at_too(copied, capsys, name):
    run, arguments = copied
    text = (run / name).read_text()
    changed = {
        "tokenizer.json": text.replace('"b"', '"Z"'),
        "corpus/corpus.json": text.replace('"tokens": 6', '"tokens": 7'),
        "config.toml": text.replace("embed_dim = 16", "embed_dim = 20"),
        "metrics.jsonl": text.replace('"step"', '"stap"', 1),
    }[name]
    assert changed != text
    (run / name).write_text(changed)
    assert main(["verify", str(run)]) == 1
    assert f"BROKEN   {run / name.removesuffix('/corpus.json')}: " in capsys.readouterr().out
    if name != "config.toml":  # the run takes its config from the command line
        assert main([*arguments, "--training.num-steps=16"]) == 1
    if name in ("tokenizer.json", "config.toml"):
        assert main(["generate", str(run), "--prompt", "To"]) == 1
        assert str(run / name) in capsys.readouterr().err


@pytest.mark.fault("lines of the log are lost")
@pytest.mark.parametrize("change", ["emptied", "cut short", "deleted"])
def test_lost_lines_of_the_log_are_told(copied, capsys, change):
    run, path = copied[0], copied[0] / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = lines[:-1] if change == "cut short" else []
    path.write_bytes(b"".join(kept)) if change != "deleted" else path.unlink()
    missing = NEWEST if change == "cut short" else OLDER
    assert main(["verify", str(run)]) == 1
    told = "has no line of step {}, of which there is a checkpoint: lines are lost, but training can go on"
    assert f"BROKEN   {path}: {told.format(missing)}\n" in capsys.readouterr().out
    MetricsLog(RunConfig(), run, NEWEST, read_id(run / RUN_ID))  # as when training goes on
    assert capsys.readouterr().err == f"warning: {path}: {told.format(NEWEST)}\n"
    assert path.read_bytes().startswith(b"".join(kept))


@pytest.mark.fault("SIGKILL at named points")
def test_leftovers_of_a_finished_run_go(copied, capsys):
    """The deletion of its last old checkpoint may be cut off, or undone by a power cut."""
    run, arguments = copied
    for name in (".old-8", ".new-12"):
        shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / name)
    before = (run / "metrics.jsonl").read_bytes()
    assert main(arguments) == 0
    assert "is finished after 12 steps" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["12", "8"]
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.fault("EIO and EACCES in write, flush, rename, delete, log")
@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 1), (errno.EACCES, 2)])
def test_a_disk_that_fails_is_no_mistake_of_the_user(copied, monkeypatch, capsys, number, code):
    run, _ = copied

    def fail(path, **options):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(config_file, "open_regular", fail)
    assert main(["generate", str(run), "--prompt", "To"]) == code
    word = {1: "fault", 2: "error"}[code]
    assert f"{word}: {run / 'config.toml'}: cannot be read: {os.strerror(number)}" in capsys.readouterr().err
