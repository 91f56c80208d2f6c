"""Runs a command again and again; each time another one of its calls to the system fails.

python failing_calls.py FOLDER COMMAND ERROR once|on|both EVERY: every EVERYth call fails, from the first on, with an
error of `file_calls.ERRORS`: that call alone ("once"), or all after it as well ("on"). FOLDER has a `run`, its older
checkpoint as `step 2`, a `model` made of it and a `hamlet.txt`. Prints one JSON object: how many calls failed, what the
exit codes were, and what was not right.
"""

import collections
import contextlib
import io
import json
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import file_calls
import jax
import numpy as np
from run_state import assert_ended_alike, leftovers, snapshot
from tiny_run import HERE, command

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.training.checkpoint import choose_step, saved_steps
from flax_decoder.training.verification import verify_run

FEW = HERE | {"training__num_steps": 4, "training__save_every": 2, "training__eval_every": 2, "training__log_every": 1}
FEW |= {"training__keep_newest": 1, "lens__every": 2}

# A call that reads fails so; the others have to do with writing.
READS = ("EIO", "EINTR")


class Command:
    """A command that is made to fail, and what must hold then.

    Attributes:
        place: the folder below which calls fail.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.place = folder / "place"

    def prepare(self) -> None:
        """Makes the place as it is before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def check(self, code: int) -> None:
        """Asserts that what is on disk is good after the command has failed."""

    def check_again(self) -> None:
        """Asserts that it has its result after it was run again."""


class Train(Command):
    """A run from its start to its end."""

    def arguments(self) -> list[str]:
        return ["train", *command(self.place / "runs" / "x", self.folder / "hamlet.txt", **FEW)[2:]]

    def check(self, code: int) -> None:
        run = self.place / "runs" / "x"
        if run.exists():
            broken = [str(finding) for finding in verify_run(run) if finding.passed is False]
            assert broken == [], broken
        if saved_steps(run):
            assert choose_step(run, "latest") == max(saved_steps(run))
        if code == 0:
            assert_ended_alike(run, self.folder / "run")

    def check_again(self) -> None:
        assert_ended_alike(self.place / "runs" / "x", self.folder / "run")


class Resume(Train):
    """A run that goes on after its last checkpoint was damaged, with leftovers of a save."""

    def prepare(self) -> None:
        super().prepare()
        run = self.place / "runs" / "x"
        shutil.copytree(self.folder / "run", run)
        for name in ("sample.txt", "loss.png"):
            (run / name).unlink()
        shutil.copytree(self.folder / "step 2", run / "checkpoints" / "2")
        (run / "checkpoints" / "4" / "manifest.json").write_text("{}")
        shutil.copytree(self.folder / "step 2", run / "checkpoints" / ".old-1")
        (run / ".config.toml.tmp").write_text("")

    def check(self, code: int) -> None:
        run = self.place / "runs" / "x"
        broken = {finding.path.name for finding in verify_run(run) if finding.passed is False}
        assert broken <= {"4"} and choose_step(run, "latest") in (2, 4), broken
        self._check_end() if code == 0 else None

    def check_again(self) -> None:
        self._check_end()

    def _check_end(self) -> None:
        aside = list((self.place / "runs" / "x" / "checkpoints").glob("*.broken*"))
        assert len(aside) == 1  # renamed, never deleted
        shutil.rmtree(aside[0])
        super().check_again()


class Convert(Command):
    """A run to a Hugging Face folder, or back."""

    def __init__(self, folder: Path, source: str = "run"):
        super().__init__(folder)
        self.source, self.target = folder / source, self.place / "new" / "folder"

    def arguments(self) -> list[str]:
        return ["convert", str(self.source), str(self.target)]

    def check(self, code: int) -> None:
        assert code == 1 or self.target.exists()
        if self.target.exists():  # whole, though perhaps not on disk
            self.check_again()

    def check_again(self) -> None:
        ours, theirs = (fd.load(path)[1] for path in (self.target, self.folder / "model"))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert leftovers(self.target) == []


class ConvertBack(Convert):
    """A Hugging Face folder to a run."""

    def __init__(self, folder: Path):
        super().__init__(folder, "model")


class Reading(Command):
    """A command that reads a run and must leave it as it is."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.before: dict[str, tuple[int, bytes | None]] = {}

    def prepare(self) -> None:
        if not self.before:
            super().prepare()
            shutil.copytree(self.folder / "run", self.place / "run")
            self.before = snapshot(self.place / "run")

    def check(self, code: int) -> None:
        assert snapshot(self.place / "run") == self.before


class Verify(Reading):
    """The check of a run."""

    def arguments(self) -> list[str]:
        return ["verify", str(self.place / "run")]


class Lens(Reading):
    """A page about a run."""

    def arguments(self) -> list[str]:
        return ["lens", str(self.place / "run"), "--prompt", "To be", "--out", str(self.place / "page.html")]

    def prepare(self) -> None:
        super().prepare()
        (self.place / "page.html").write_text("an old page")

    def check(self, code: int) -> None:
        super().check(code)
        page = (self.place / "page.html").read_text()
        assert page.endswith("</html>\n") or (page == "an old page" and code == 1)


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "train": Train,
    "resume": Resume,
    "convert": Convert,
    "convert back": ConvertBack,
    "lens": Lens,
    "verify": Verify,
}


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(arguments)
    return code, output.getvalue(), errors.getvalue()


def is_told(case: Command, output: str, errors: str) -> bool:
    """Whether a command that failed names a file at the place, in at most two lines and a warning."""
    if isinstance(case, Verify):
        return str(case.place) in output and errors == ""
    lines = errors.splitlines()
    is_fault = any(line.startswith("fault: ") for line in lines[-2:])
    return is_fault and "Traceback" not in errors and str(case.place) in errors and len(lines) <= 3


def main_loop(folder: Path, name: str, error: str, modes: list[bool], every: int) -> dict[str, object]:
    case = COMMANDS[name](folder)
    file_calls.watch(case.place)
    found: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    no_bearing: set[str] = set()
    for goes_on in modes:
        number = 1
        while True:
            file_calls.fail(-1, None)
            case.prepare()
            file_calls.fail(number, file_calls.ERRORS[error], all_later=goes_on, reads=error in READS)
            try:
                code, output, errors = run(case.arguments())
            except BaseException:
                code, output, errors = -1, "", traceback.format_exc()
            failed = file_calls.failed_call()
            file_calls.fail(-1, None)
            if not failed:
                assert code == 0, errors
                break
            found["calls"] += 1
            found[f"exit {code}"] += 1
            if code == 0:
                no_bearing.add(failed.replace(str(case.place), ""))
            problem = ""
            if code not in (0, 1) or (code == 1 and not is_told(case, output, errors)):
                problem = f"exit code {code}"
            try:
                case.check(code)
                if code != 0:
                    again, _, complaint = run(case.arguments()) if not isinstance(case, Reading) else (0, "", "")
                    if again == 2 and isinstance(case, Convert) and case.target.exists():
                        again = 0  # it had its name already
                    assert again == 0, complaint
                    case.check_again()
            except BaseException:
                problem += traceback.format_exc()
            if problem:
                found["wrong"] += 1
                wrong.append(f"{error} at call {number}, {failed}: {problem}\n{errors}")
            number += every
    return {**found, "problems": wrong, "no bearing": sorted(no_bearing)}


if __name__ == "__main__":
    place, name, error, mode, every = sys.argv[1:]
    modes = {"once": [False], "on": [True], "both": [False, True]}[mode]
    print(json.dumps(main_loop(Path(place), name, error, modes, int(every))))
