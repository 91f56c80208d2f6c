"""Fixtures that several tests of the fault matrix share."""

import pytest
from tiny_run import HERE, command, write_text_file

from flax_decoder.cli import main


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text to train on."""
    return write_text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """A finished run in the process of the tests, with the checkpoints of steps 8 and 12, and its arguments."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["train", *command(folder, text, **HERE)[2:]]
    assert main(arguments) == 0
    return folder, arguments
