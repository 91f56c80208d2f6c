"""Trains on a disk that is filled up, except for a given number of bytes, just before the first step."""

import shutil
import sys
from pathlib import Path

from flax_decoder.cli import main
from flax_decoder.training import loop

free_bytes, ballast, *arguments = sys.argv[1:]
check = loop.require_space


def check_and_fill(*values):
    check(*values)  # there is enough space until here
    with open(ballast, "wb") as file:
        file.write(bytes(shutil.disk_usage(Path(ballast).parent).free - int(free_bytes)))


loop.require_space = check_and_fill
sys.exit(main(["train", *arguments]))
