"""How long converting a model of 135M parameters takes, and how much memory beyond its parameters.

    python benchmarks/convert.py [--rounds N]

The shape is that of SmolLM2-135M, the weights are random. Seconds are the median time of the command. Memory (Linux
only) is the peak of a process over its level after the imports.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from measuring import timed

from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import ByteTokenizer
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import abstract_params

SHAPE = {
    "vocab_size": 49152,
    "context_length": 2048,
    "num_layers": 30,
    "embed_dim": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "mlp_dim": 1536,
    "positions": "rotary",
    "norm": "rmsnorm",
    "feed_forward": "swiglu",
    "tied_head": True,
}

MEASURE = """
import sys
import jax
import orbax.checkpoint
import flax_decoder as fd
import flax_decoder.loading
from measuring import mib_level

jax.numpy.ones(3).block_until_ready()
before = mib_level("VmRSS")
if len(sys.argv) == 2:
    loaded = fd.load(sys.argv[1])
else:
    fd.loading.convert(*sys.argv[1:])
print(mib_level("VmHWM") - before)
"""


def make_model(folder: Path) -> float:
    """Writes a Hugging Face folder and returns the size of its parameters in MiB."""
    model = Decoder(ModelConfig(**SHAPE))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), abstract_params(model))
    folder.mkdir()
    write_folder(folder, model.config, params, ByteTokenizer(), FAMILIES["llama"])
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20


def seconds_of(source: Path, destination: Path) -> float:
    """The time of the command."""
    shutil.rmtree(destination, ignore_errors=True)
    command = [sys.executable, "-m", "flax_decoder", "convert", str(source), str(destination)]
    return timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))[0]


def mib_of(*folders: Path) -> float:
    """The peak of loading a folder, or of converting the first one into the second, in MiB."""
    for destination in folders[1:]:
        shutil.rmtree(destination)
    command = [sys.executable, "-c", MEASURE, *map(str, folders)]
    here = Path(__file__).parent  # of measuring.py
    return float(subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        model, run, again = (Path(name) / part for part in ("model", "run", "again"))
        size = make_model(model)
        print(f"{size:.0f} MiB of parameters, of which the largest tensor is {49152 * 576 * 4 / 2**20:.0f} MiB\n")
        print("| | seconds | peak beyond the parameters, MiB |\n|---|---|---|")
        print(f"| load Hugging Face folder | | {mib_of(model) - size:.0f} |", flush=True)
        for title, folders in {"Hugging Face to run": (model, run), "run to Hugging Face": (run, again)}.items():
            seconds = statistics.median(seconds_of(*folders) for _ in range(rounds))
            print(f"| convert {title} | {seconds:.1f} | {mib_of(*folders) - size:.0f} |", flush=True)
        assert (model / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


if __name__ == "__main__":
    main()
