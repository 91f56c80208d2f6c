"""Every call to the system fails once: a command ends with exit code 1 and the name, or as if nothing had been."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import file_calls
import pytest
from failing_calls import FEW
from run_without_arrays import RUN, live, row
from tiny_run import command, finish

from flax_decoder.cli import main
from flax_decoder.config import RunConfig
from flax_decoder.data.shards import load_corpus
from flax_decoder.errors import FaultError
from flax_decoder.training.checkpoint import saved_steps, steps_folder
from flax_decoder.training.manifest import verify
from flax_decoder.training.metrics import MetricsLog

pytestmark = pytest.mark.fault("Each call of a command fails")

CALLS = ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
# Of the calls of a run without arrays, each at which so many have gone before.
EVERY = 5


def test_a_call_that_fails_in_a_run_without_arrays(tmp_path, monkeypatch, capsys, count_cases):
    """As below, for the calls that Python makes."""
    count = 0

    def failing(call):
        def call_or_fail(*arguments, **options):
            nonlocal count
            count -= 1
            if count == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*arguments, **options)

        return call_or_fail

    number = 0
    while True:
        root = tmp_path / str(number)
        root.mkdir()
        count = 1 + EVERY * number
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                live(root)
                if count > 0:
                    break
            except (OSError, FaultError) as error:
                assert os.strerror(errno.EIO) in str(error)
        run = root / RUN
        for step in saved_steps(run):
            verify(steps_folder(run) / str(step))
        if run.exists():
            load_corpus(run / "corpus")
        step = max(saved_steps(run), default=0)
        assert MetricsLog(RunConfig(), run, step, writes=False).rows == [row(one) for one in range(1, step + 1)]
        shutil.rmtree(root)
        number += 1
    assert number > 30 and "warning" not in capsys.readouterr().err
    count_cases(number)


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """What failing_calls.py starts from."""
    folder = tmp_path_factory.mktemp("failing")
    shutil.copy(text, folder)
    settings = FEW | {"training__keep_newest": 2}
    assert main(["train", *command(folder / "run", folder / text.name, **settings)[2:]]) == 0
    (folder / "run" / "checkpoints" / "2").rename(folder / "step 2")
    assert main(["convert", str(folder / "run"), str(folder / "model")]) == 0
    return folder


# Every how many calls one fails. The calls that read count with EIO and EINTR.
STRIDES = {
    ("train", "EIO", "once"): 31,
    ("train", "ENOSPC", "on"): 29,
    ("train", "short", "once"): 43,
    ("train", "EINTR", "once"): 61,
    ("train", "EDQUOT", "on"): 83,
    ("resume", "EIO", "once"): 31,
    ("resume", "ENOSPC", "both"): 53,
    ("convert", "EIO", "both"): 2,
    ("convert", "ENOSPC", "on"): 2,
    ("convert", "short", "once"): 2,
    ("convert back", "EIO", "once"): 9,
    ("convert back", "ENOSPC", "both"): 17,
    ("convert back", "short", "once"): 13,
    ("lens", "EIO", "once"): 1,
    ("lens", "ENOSPC", "both"): 1,
    ("lens", "short", "once"): 1,
    ("verify", "EIO", "both"): 1,
    ("verify", "EINTR", "once"): 3,
}


@pytest.mark.full
@pytest.mark.parametrize(("name", "error", "mode"), STRIDES)
def test_each_call_that_fails_is_told_and_harms_nothing(folder, count_cases, name, error, mode):
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    script = [sys.executable, str(Path(__file__).parent / "failing_calls.py"), str(folder)]
    arguments = [name, error, mode, str(STRIDES[name, error, mode])]
    code, output, errors = finish([*script, *arguments], LD_PRELOAD=file_calls.library(), PYTHONPATH=paths)
    assert code == 0, errors
    found = json.loads(output.splitlines()[-1])
    assert found["calls"] > 0 and found["problems"] == []
    if name == "verify":  # what cannot be read is told; what is only interrupted is read again
        assert found[f"exit {0 if error == 'EINTR' else 1}"] == found["calls"]
    count_cases(found["calls"])
