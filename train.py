"""Trains a model on input.txt, then writes new text: python train.py [CONFIG.toml] [--section.field value ...]."""

import sys


def refuse(lack: str) -> None:
    """Ends with a line that says what is missing and how to install all of it."""
    install = "python3 -m venv .venv && source .venv/bin/activate && pip install -e ."
    print(f"error: {lack}; in the folder of train.py, once: {install}", file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 11):  # noqa: UP036 (pip would say so, but this file runs without an installation)
    refuse(f"Python {sys.version.split()[0]} is too old, 3.11 is the oldest that will do")
try:
    from flax_decoder.cli import main
except ModuleNotFoundError as error:
    if (error.name or "").startswith("flax_decoder."):
        raise
    refuse(f"{error.name} is not installed for {sys.executable}")

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
