"""A run folder from somebody else: whatever links, pipes and folders it has, nothing outside of it changes."""

import itertools
import os
import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from run_state import snapshot

from flax_decoder.cli import main
from flax_decoder.config import RunConfig
from flax_decoder.errors import FaultError, UserError
from flax_decoder.io import files
from flax_decoder.io.lock import LOCK, FolderLock, refuse_if_in_use
from flax_decoder.lens.history import Index, write_index
from flax_decoder.training import checkpoint, run_folder
from flax_decoder.training.checkpoint import Checkpoints, saved_steps
from flax_decoder.training.manifest import read_manifest, write_manifest
from flax_decoder.training.metrics import MetricsLog, read_metrics
from flax_decoder.training.verification import verify_run

pytestmark = pytest.mark.fault("Links and pipes in a run folder: nothing outside changes")

# Every name that a run folder may have, those of unfinished files and folders included, and of ones that come next.
NAMES = [
    LOCK,
    *(
        "config.toml",
        "tokenizer.json",
        "metrics.jsonl",
        "loss.png",
        "sample.txt",
        "run_id",
        "wandb_id",
        "tensorboard",
        "wandb",
    ),
    *(".config.toml.tmp", ".metrics.jsonl.tmp", ".loss.png.tmp", ".sample.txt.tmp", ".wandb_id.tmp"),
    *("corpus", "corpus/corpus.json", "corpus/train-00000.bin", "corpus/train-00000.starts.bin"),
    *("corpus/validation-00000.bin", "corpus/.corpus.json.tmp"),
    *("lens", "lens/0.npy", "lens/16.npy", "lens/history.json", "lens/.history.json.tmp", "lens/.16.npy.tmp", "lens.1"),
    *("checkpoints", "checkpoints/12", "checkpoints/16", "checkpoints/12.broken", "checkpoints/.new-16"),
    *("checkpoints/.old-8", "checkpoints/12/manifest.json", "checkpoints/12/.manifest.json.tmp"),
    *("checkpoints/12/params", "checkpoints/12/params/manifest.ocdbt", "checkpoints/12/params/d"),
]
KINDS = {
    "file": lambda path, outside: path.symlink_to(outside / "canary.txt"),
    "folder": lambda path, outside: path.symlink_to(outside / "folder"),
    "nothing": lambda path, outside: path.symlink_to(outside / "new"),
    "FIFO": lambda path, outside: os.mkfifo(path),
}
LINKS = ("file", "folder", "nothing")


@pytest.fixture
def outside(trained, tmp_path):
    """A folder outside of the run, with everything that a run would write over or delete."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "canary.txt").write_text("canary")
    for name in ("2023.npy", "16.npy", "history.json", ".new-3", ".old-3", "77", "manifest.json", ".a.tmp"):
        (folder / "folder" / name).write_text("canary")
    for name in (".new-4", ".old-4", "99"):
        shutil.copytree(trained[0] / "lens", folder / "folder" / "more" / name)
        shutil.copytree(trained[0] / "lens", folder / "folder" / name)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def put(run: Path, name: str, kind: str, outside: Path) -> Path:
    """Puts a link or a pipe into a run, in place of what has the name."""
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    KINDS[kind](path, outside)
    return path


def resumed(trained, run):
    """A command that trains on in a copy of the run."""
    return [*trained[1], f"--run.folder={run}", "--training.num-steps=16"]


def test_each_is_found_at_its_name(run, outside, trained, capsys, count_cases):
    assert list(files.not_plain(run)) == []
    cases = list(itertools.product(NAMES, KINDS))
    kept = run.with_name("kept")
    for name, kind in cases:
        there = os.path.lexists(run / name)
        if there:
            (run / name).rename(kept)
        path = put(run, name, kind, outside)
        assert list(files.not_plain(run)) == [(path, "a link" if kind in LINKS else "not a regular file")]
        with pytest.raises(UserError, match="cp -rL"):
            run_folder.require_plain(run)
        path.unlink()
        if there:
            kept.rename(path)
    count_cases(len(cases))


# These four wrote or deleted outside of the folder; the others are the other ways to write.
REPORTED = (f"file-{LOCK}", "file-lens/.history.json.tmp", "folder-lens", "folder-checkpoints")


@pytest.mark.short(*REPORTED, "FIFO-.metrics.jsonl.tmp", "nothing-metrics.jsonl")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_refuses_a_folder_with_links_before_it_touches_it(run, outside, trained, capsys, kind, name):
    path = put(run, name, kind, outside)
    before = snapshot(outside), snapshot(run)
    code = main(resumed(trained, run))
    error = capsys.readouterr().err
    assert code == 2
    # Without these two it is no run.
    is_run = (run / "config.toml").is_file() and (run / "corpus").is_dir()
    start, end = (f"error: {path}: is ", "cp -rL") if is_run else (f"error: {run}: ", "exists and is not a run")
    assert error.startswith(start) and end in error, error
    assert len(error.splitlines()) <= 2
    assert before == (snapshot(outside), snapshot(run))


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_writer_follows_a_link_that_comes_after_the_check(
    run, outside, trained, capsys, monkeypatch, count_cases, kind, name
):
    """As if each link was put there after training had looked through the folder."""
    monkeypatch.setattr(run_folder, "require_plain", lambda folder: None)
    put(run, name, kind, outside)
    before = snapshot(outside)
    for words in (
        resumed(trained, run),
        ["lens", str(run), "--prompt=To", f"--out={run.parent / 'page.html'}"],
        ["verify", str(run)],
        ["convert", str(run), str(run.parent / "converted")],
        ["generate", str(run), "--prompt=To", "--max-new-tokens=1"],
    ):
        code = main(words)
        shown = capsys.readouterr().err
        assert code in (0, 1, 2) and "Traceback" not in shown, (words[0], shown)
        assert snapshot(outside) == before, words[0]
    count_cases(5)


@pytest.mark.full
@pytest.mark.parametrize("kind", LINKS)
def test_a_new_run_does_not_begin_through_what_lies_in_its_folder(
    trained, tmp_path, outside, capsys, count_cases, kind
):
    before = snapshot(outside)
    names = [name for name in NAMES if "/" not in name]
    for number, name in enumerate(names):
        run = tmp_path / f"run{number}"
        run.mkdir()
        put(run, name, kind, outside)
        assert main([*trained[1], f"--run.folder={run}"]) == 2
        assert "exists and is not a run" in capsys.readouterr().err
        assert snapshot(outside) == before
    count_cases(len(names))


def test_the_writers_write_where_they_are(tmp_path, outside):
    """Each of them alone, with a link put there just before."""
    before = snapshot(outside)
    canary, folder = outside / "canary.txt", outside / "folder"
    run = tmp_path / "run"
    run.mkdir()

    (run / ".a.tmp").symlink_to(canary)  # a file that is being replaced
    (run / "a").symlink_to(canary)
    files.write_text(run / "a", "new")
    assert not (run / "a").is_symlink() and (run / "a").read_text() == "new"
    os.mkfifo(run / ".a.tmp")
    files.write_text(run / "a", "newer")
    assert (run / "a").read_text() == "newer"

    log = MetricsLog(RunConfig(), run, 0)
    for target in (canary, outside / "new"):
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to(target)
        with pytest.raises(FaultError, match=r"metrics\.jsonl: cannot be written: is a link"):
            log.add({"step": 1})

    for target in (canary, outside / "new"):
        (run / LOCK).symlink_to(target)
        refuse_if_in_use(run)
        with FolderLock() as lock, pytest.raises(FaultError, match=r"\.lock: cannot be locked: is a link"):
            lock.take(run)
        (run / LOCK).unlink()
    os.link(canary, run / LOCK)  # a second name of the file, which is no link to see
    with FolderLock() as lock:
        lock.take(run)
        lock.announce()

    for target in (folder, outside / "new"):
        (run / "lens").symlink_to(target)
        with pytest.raises(OSError, match="is a link"):
            write_index(run / "lens", Index(1, [1], {}))
        (run / "lens").unlink()
    assert snapshot(outside) == before


def test_a_link_that_comes_between_the_look_and_the_opening(tmp_path, outside, monkeypatch):
    before = snapshot(outside)

    def nothing_yet(path):
        raise FileNotFoundError

    for name in (".a.tmp", "log"):
        (tmp_path / name).symlink_to(outside / "canary.txt")
    with monkeypatch.context() as patch, pytest.raises(FileExistsError):
        patch.setattr(Path, "unlink", lambda path, **_: None)
        files.write_text(tmp_path / "a", "new")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many levels of symbolic links"):
        patch.setattr(os, "lstat", nothing_yet)
        files.without_links(tmp_path / "log", os.O_WRONLY | os.O_APPEND)
    assert snapshot(outside) == before


def test_checkpoints_are_not_written_or_deleted_through_a_link(tmp_path, outside, monkeypatch):
    before = snapshot(outside)
    steps = tmp_path / "checkpoints"
    steps.symlink_to(outside / "folder")
    for act in (
        lambda: checkpoint.prune(tmp_path, 1),
        lambda: checkpoint.remove_unfinished(tmp_path, 3),
        lambda: checkpoint.commit(steps / ".new-4", {"step": 4}),
    ):
        with pytest.raises(FaultError, match=r"checkpoints: .*is a link"), checkpoint.as_fault_error(steps):
            act()
    with pytest.raises(UserError, match="is a link"):
        saved_steps(tmp_path)
    state = checkpoint.TrainState(
        step=np.int32(1), params={"a": jax.numpy.ones(3)}, opt_state=(), tx=None, apply_fn=None
    )
    with Checkpoints(tmp_path, 1) as checkpoints, pytest.raises(FaultError, match="is a link"):
        checkpoints.save(state, None)
    assert snapshot(outside) == before


@pytest.mark.short("file-sample.txt")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LINKS)
def test_verify_names_a_link(run, outside, kind, name):
    before = snapshot(outside)
    path = put(run, name, kind, outside)
    found = [result for result in verify_run(run) if result.path == path and result.passed is False]
    assert found and "is a link" in found[0].message
    assert snapshot(outside) == before


def test_the_run_folder_itself_may_be_a_link(trained, tmp_path, text, capsys):
    """To a larger disk, for example: an empty folder there, and then the run in it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with files.new_folder(tmp_path / "link") as unfinished:
        files.write_text(unfinished / "a", "text")
    assert (tmp_path / "disk" / "a").read_text() == "text" and (tmp_path / "link").is_symlink()
    (tmp_path / "run").symlink_to(trained[0])
    run_folder.require_plain(tmp_path / "run")
    assert all(result.passed is not False for result in verify_run(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "run"]


# A place for a value that the manifest of the checkpoint does not name, and what is put there.
UNNAMED = {
    "link": (lambda path, outside: path.symlink_to(outside / "canary.txt"), "is a link"),
    "link to a folder": (lambda path, outside: path.symlink_to(outside / "folder"), "is a link"),
    "FIFO": (lambda path, outside: os.mkfifo(path), "is not a regular file"),
    "file": (lambda path, outside: path.write_text("more"), "is not in the manifest"),
}


@pytest.mark.fault("A checkpoint with links, pipes and files that its manifest does not name")
@pytest.mark.short("link-True", "file-False", "FIFO-False")
@pytest.mark.parametrize(("kind", "listed"), [*((kind, False) for kind in UNNAMED), ("link", True), ("FIFO", True)])
def test_only_the_regular_files_of_the_manifest_are_read(run, outside, capsys, kind, listed):
    """Something else has the name of a file that holds values of the arrays; a forged manifest may list it or not."""
    step = run / "checkpoints" / "12"
    shutil.rmtree(run / "checkpoints" / "8")
    path = max((step / "params" / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    act, message = UNNAMED[kind]
    if listed:
        shutil.copy(path, outside / "canary.txt")  # with the same bytes, so that only its kind tells
        path.unlink()
    else:
        write_manifest_without(step, path)
    act(path, outside)
    before = snapshot(outside)
    asked = [["generate", str(run), "--prompt=To"], ["convert", str(run), str(run.parent / "converted")]]
    for words in [*asked, ["verify", str(run)]]:
        assert main(words) == 1
        shown = "".join(capsys.readouterr())
        assert f"{path}: {message}" in shown.replace(f"{step}: ", ""), shown
        assert not (run.parent / "converted").exists()
    assert snapshot(outside) == before


def write_manifest_without(step: Path, path: Path) -> None:
    """Deletes a file of a checkpoint and makes a manifest that does not have it."""
    facts = read_manifest(step)
    path.unlink()
    (step / "manifest.json").unlink()
    write_manifest(step, {name: value for name, value in facts.items() if name not in ("files", "format")})


@pytest.mark.full
@pytest.mark.fault("A log of very many lines")
def test_verify_keeps_no_lines_of_the_log(run):
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.5, "seconds": 3.5}\n' * 9000)
    (run / "tokenizer.json").unlink()  # for which more is reserved than for this log
    tracemalloc.start()
    try:
        found = {result.path.name: result.message for result in verify_run(run)}
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        rows = read_metrics(run / "metrics.jsonl")
        _, whole_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found["metrics.jsonl"] == "9,000 lines" and len(rows) == 9000
    assert peak_bytes < whole_bytes / 2, (peak_bytes, whole_bytes)
