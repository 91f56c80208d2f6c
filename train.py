"""Trains a model on input.txt, then writes new text: python train.py [CONFIG.toml] [--section.field value ...]."""

import sys

from flax_decoder.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
