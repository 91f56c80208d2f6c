import contextlib
import hashlib
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from job import SMALL, TEXT

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import fixed_fields, is_used
from flax_decoder.data import tokenizer as tokenizer_module
from flax_decoder.errors import InUseError
from flax_decoder.io.lock import FolderLock
from flax_decoder.io.strict_json import Limits
from flax_decoder.training.checkpoint import saved_steps
from flax_decoder.training.metrics import read_metrics
from flax_decoder.training.run_folder import open_run, same_warmup

ARGUMENTS = [*SMALL, "--training.eval-every=2", "--training.save-every=2", "--training.log-every=2"]
ARGUMENTS += ["--data.path=hamlet.txt", "--run.folder=runs/x"]
RUN = Path("runs/x")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("hamlet.txt").write_text(TEXT)
        assert main(["train", *ARGUMENTS]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of `trained` as the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refusal(refused):
    """Trains with changed arguments, which must be refused with nothing written; returns the message."""
    return lambda *changes: refused("train", *ARGUMENTS, *changes)


def test_a_finished_run_says_so_and_stays_as_it_is(here, capsys, snapshot):
    before = snapshot()
    assert main(["train", *ARGUMENTS]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "4 steps" in out and "--training.num-steps" in out
    assert snapshot() == before


def test_another_text_is_refused(here, refusal):
    Path("other.txt").write_text(TEXT.replace("nobler", "robler"))  # the same characters
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in (TEXT, TEXT.replace("nobler", "robler"))]
    expected = f"SHA-256 of the text: saved {hashes[0]}, asked {hashes[1]}"
    assert expected in refusal("--data.path=other.txt")
    assert "missing.txt" in refusal("--data.path=missing.txt")
    Path("hamlet.txt").write_text(TEXT.replace("nobler", "robler"))
    assert expected in refusal()


@pytest.mark.parametrize("folder", [RUN, "runs/new"])
def test_attention_that_does_not_run_here_is_refused(here, folder, refusal):
    changes = ["--model.attention=cudnn", "--model.dtype=bfloat16", "--model.head-dim=8", f"--run.folder={folder}"]
    assert 'model.attention = "cudnn" needs an NVIDIA GPU, and this runs on cpu' in refusal(*changes)


def test_a_tokenizer_too_large_to_be_read_again_is_not_written(here, monkeypatch, refusal):
    monkeypatch.setattr(tokenizer_module, "VOCABULARY", Limits(300, 10**6))
    error = refusal("--run.folder=runs/new")
    assert (
        "a vocabulary of 23 tokens is too large: its tokenizer.json has " in error and "over the limit of 300;" in error
    )


def test_resume_never_and_must(here, refusal):
    assert 'resume = "never"' in refusal("--run.resume=never")
    error = refusal("--run.resume=must", "--run.folder=runs/new")
    assert 'resume = "must"' in error and "runs/new" in error


@pytest.mark.parametrize("name", ["notes.txt", "config.toml", ".hidden"])
def test_a_folder_with_something_else_in_it_is_refused(here, name, refusal):
    Path("mine").mkdir()
    (Path("mine") / name).write_text("mine")
    assert "is not a run" in refusal("--run.folder=mine")
    assert "exists" in refusal("--run.folder=hamlet.txt")


def test_the_current_folder_is_no_place_for_a_run(tmp_path, monkeypatch, trained, refusal):
    monkeypatch.chdir(tmp_path)
    text = trained / "hamlet.txt"
    assert "is the current folder" in refusal(f"--data.path={text}", "--run.folder=.")


class WatchedPath(type(Path())):
    """A path that calls a function after each look at a folder or file."""

    after_a_look = staticmethod(lambda: None)

    def _look(self, answer):
        WatchedPath.after_a_look()
        return answer

    def exists(self, **options):
        return self._look(super().exists(**options))

    def is_dir(self, **options):
        return self._look(super().is_dir(**options))

    def is_file(self, **options):
        return self._look(super().is_file(**options))

    def iterdir(self):
        return iter(self._look(list(super().iterdir())))


@pytest.mark.parametrize("empty", [False, True])
def test_a_run_that_another_process_creates_meanwhile_is_in_use(here, monkeypatch, empty):
    """However many looks at the folder came before: the other process is named, and not taken for something else."""
    shutil.copytree(RUN, "other")
    overrides = dict(argument.removeprefix("--").split("=") for argument in ARGUMENTS)
    config = fd.load_config(None, overrides | {"run.folder": "runs/new"})
    for num_looks in range(1, 100):
        folder, looks = WatchedPath("runs/new"), []
        if empty:
            folder.mkdir()
        with FolderLock() as others, FolderLock() as ours:

            def appear(number=num_looks, seen=looks, lock=others):
                seen.append(1)
                if len(seen) == number:  # as in `open_run`: locked, then renamed
                    lock.take(Path("other"))
                    Path("other").rename("runs/new")

            monkeypatch.setattr(WatchedPath, "after_a_look", staticmethod(appear))
            try:
                with pytest.raises(InUseError, match=r"runs/new: (is in use by|another process has just created it)"):
                    open_run(config, folder, lambda *_: None, ours)
            except pytest.fail.Exception:
                assert len(looks) < num_looks and num_looks > 3, num_looks  # it looks no more often than that
                return
        Path("runs/new").rename("other")


def test_an_empty_folder_is_as_good_as_none(here):
    Path("empty").mkdir()
    assert main(["train", *ARGUMENTS, "--run.folder=empty"]) == 0
    assert saved_steps(Path("empty"))[-1] == 4


def test_more_steps_and_what_changes_no_number_are_taken(here, capsys):
    more = ["--training.num-steps=6", "--model.attention=reference", "--model.scan-layers=true"]
    more += ["--model.remat=full", "--training.loss-chunk-tokens=5"]
    assert main(["train", *ARGUMENTS, *more, "--training.eval-every=3"]) == 0
    assert "from the checkpoint of step 4" in capsys.readouterr().out
    assert saved_steps(RUN)[-1] == 6
    assert read_metrics(RUN / "metrics.jsonl")[-1]["step"] == 6
    config = fd.load_config(RUN / "config.toml")
    assert config.training.num_steps == 6 and config.model.attention == "reference"


@pytest.mark.full
def test_a_finished_run_goes_on_with_a_schedule_of_its_own(here, capsys):
    """As the message of the finished run says."""
    arguments = ["train", *ARGUMENTS, "--run.folder=runs/anew"]
    assert main(arguments) == 0 and main(arguments) == 0
    more = re.search(r"Continue with (.*), or", capsys.readouterr().out)[1].split()
    assert more == ["--training.num-steps", "8", "--optimizer.restarts", "4"]
    assert main([*arguments, *more, "--training.log-every=1"]) == 0
    assert "where its schedule begins anew" in capsys.readouterr().out
    rates = [row["learning_rate"] for row in read_metrics(Path("runs/anew/metrics.jsonl"))]
    np.testing.assert_allclose(rates[-4:], 1e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2), rtol=1e-6)


# Fields that are used only beside another setting: another value, and the setting with which it counts for nothing.
UNUSED = {
    "model.rotary_base": (5000.0, {}),
    "model.rotary_layout": ("interleaved", {}),
    "model.rotary_magnitude": (1.3, {"model.positions": "rotary", "model.rotary_scaling": "linear"}),
    "model.rotary_truncate": (False, {"model.positions": "rotary", "model.rotary_scaling": "llama3"}),
    "model.qk_norm_position": ("after", {"model.positions": "rotary"}),
    "model.qk_norm_kind": ("layernorm", {}),
    "model.qk_norm_bias": (True, {}),
    "model.rotary_scaling_factor": (4.0, {"model.positions": "rotary"}),
    "model.rotary_low_frequency_factor": (2.0, {"model.positions": "rotary", "model.rotary_scaling": "linear"}),
    "model.rotary_high_frequency_factor": (8.0, {"model.positions": "rotary", "model.rotary_scaling": "linear"}),
    "model.rotary_short_factors": ([1.5, 2.0], {}),
    "model.rotary_long_factors": ([1.5, 2.0], {}),
    "model.rotary_original_context": (4, {"model.positions": "rotary", "model.rotary_scaling": "linear"}),
    "data.bpe_vocab_size": (300, {}),
    "data.bpe_train_bytes": (5000, {}),
    "data.validation_fraction": (0.5, {"data.validation_path": "hamlet.txt"}),
    "optimizer.muon_learning_rate": (0.01, {}),
    "optimizer.muon_momentum": (0.5, {}),
    "optimizer.decay_fraction": (0.5, {}),
    "optimizer.final_fraction": (0.5, {"optimizer.schedule": "constant"}),
    "optimizer.decay": ("all", {"optimizer.weight_decay": 0.0}),
    "lora.alpha": (8.0, {}),
    "lora.rank_stabilised": (True, {}),
    "lora.dropout": (0.5, {}),
    "lora.targets": (["query"], {}),
}


def words(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def test_what_is_not_in_use_may_change_on_resume(here, capsys):
    """The finished run has none of the settings that make these count."""
    unused = {name: value for name, (value, needed) in UNUSED.items() if not needed}
    assert main(["train", *ARGUMENTS, *words(unused)]) == 0
    assert "runs/x is finished" in capsys.readouterr().out
    assert fd.load(RUN)[0].config.rotary_base == 10_000.0  # nothing was written
    path = RUN / "config.toml"
    path.write_text(path.read_text().replace("rotary_base = 10000.0", "rotary_base = 5000.0"))
    assert fd.load(RUN)[0].config.rotary_base == 5000.0  # as good as the other, and not taken for damage


@pytest.mark.full
@pytest.mark.parametrize("name", UNUSED)
def test_what_is_not_in_use_changes_no_number(here, name):
    value, needed = UNUSED[name]
    arguments = ["train", *ARGUMENTS, *words(needed)]
    for folder, change in (("runs/a", {}), ("runs/b", {name: value})):
        assert main([*arguments, f"--run.folder={folder}"]) == 0
        assert main([*arguments, f"--run.folder={folder}", "--training.num-steps=6", *words(change)]) == 0
    (_, params, _), (_, others, _) = fd.load("runs/a"), fd.load("runs/b")
    jax.tree.map(np.testing.assert_array_equal, params, others)
    assert saved_steps(Path("runs/b"))[-1] == 6


def test_each_field_that_is_used_only_beside_another_is_tried():
    needed = {"optimizer.schedule": "constant", "optimizer.weight_decay": 0.0, "data.validation_path": "hamlet.txt"}
    config = fd.load_config(None, needed)
    unused = {f"{section}.{name}" for section, name in fixed_fields() if not is_used(getattr(config, section), name)}
    assert unused == set(UNUSED)


@pytest.mark.full
def test_a_short_trial_goes_on_with_the_warm_up_of_the_whole_run(here, capsys, refusal):
    short = [*ARGUMENTS, "--run.folder=runs/short", "--optimizer.warmup-steps=30", "--training.num-steps=20"]
    short += ["--training.eval-every=20", "--training.save-every=20"]

    def train(*changes):
        assert main(["train", *short, *changes]) == 0
        saved = fd.load_config("runs/short/config.toml")
        return capsys.readouterr(), saved.optimizer.warmup_steps, saved.training.num_steps

    for part in ("step 20", "runs/short is finished"):
        (out, error), *saved = train()
        assert part in out and saved == [1, 20]
        assert error.splitlines() == [
            "warning: optimizer.warmup_steps = 30 is not under training.num_steps = 20: "
            "shortened to 1, a twentieth of the steps"
        ]
    for part in ("the warm-up has 30 steps instead of 1, as the run now has 31", "runs/short is finished"):
        (out, error), *saved = train("--training.num-steps=31")
        assert part in out and error == "" and saved == [30, 31]
    error = refusal(*short[-5:], "--training.num-steps=33", "--optimizer.warmup-steps=29")
    assert "optimizer.warmup_steps: saved 30, asked 29" in error


@pytest.mark.parametrize(
    ("saved", "asked", "same"),
    [
        # (warm-up, number of steps), both as they are once the warm-up is within the steps
        ((1, 20), (100, 5000), True),
        ((100, 5000), (1, 20), True),
        ((3, 60), (1, 20), True),
        ((1, 20), (3, 60), True),
        ((1, 20), (2, 5000), False),
        ((2, 20), (100, 5000), False),
        ((1, 5000), (100, 5000), False),
        ((1, 20), (20, 5000), True),
        ((1, 20), (19, 5000), False),
        ((None, 20), (None, 5000), True),
        ((None, 20), (100, 5000), False),
    ],
)
def test_a_warm_up_is_the_same_where_one_setting_gives_both(saved, asked, same):
    one, other = (
        fd.load_config(
            None, {"training.num_steps": steps} | ({} if warmup is None else {"optimizer.warmup_steps": warmup})
        )
        for warmup, steps in (asked, saved)
    )
    assert same_warmup(one, other) is same


def test_a_run_folder_is_enough(here, snapshot):
    """A run resumes from its own config after its text is deleted, and is loaded after it is moved."""
    Path("hamlet.txt").unlink()
    assert main(["train", str(RUN / "config.toml"), "--training.num-steps=6"]) == 0
    assert saved_steps(RUN)[-1] == 6
    params = fd.load(RUN)[1]
    with contextlib.chdir(RUN):
        before = snapshot()
    shutil.move(RUN, "elsewhere")
    model, moved, tokenizer = fd.load("elsewhere")
    jax.tree.map(np.testing.assert_array_equal, params, moved)
    assert tokenizer.decode(tokenizer.encode("To be")) == "To be"
    assert model.config.vocab_size == tokenizer.vocab_size
    with contextlib.chdir("elsewhere"):
        assert snapshot() == before


def test_a_run_that_was_moved_goes_on_where_it_is(here, capsys):
    shutil.move(RUN, "elsewhere")
    assert main(["train", "elsewhere/config.toml", "--training.num-steps=6"]) == 0
    assert saved_steps(Path("elsewhere"))[-1] == 6
    assert not RUN.exists()


@pytest.mark.parametrize(
    ("name", "value", "module"), [("tensorboard", "true", "tensorboardX"), ("wandb", "a", "wandb")]
)
def test_a_reporter_that_is_not_installed_leaves_nothing_behind(here, monkeypatch, refusal, name, value, module):
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(f"--run.{name}={value}", "--run.folder=runs/new")
    assert error == f'run.{name} needs: pip install "flax-decoder[{name}]"\n'
