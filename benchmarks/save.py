"""What saving costs a run: a checkpoint every 100 steps, compared with none.

    python benchmarks/save.py [CONFIG.toml] [--section.field value ...]

Alternates stretches of 100 steps without a save and with one at the start, which is written while the steps run.
"Blocked" is the time that the loop waits in `save`; "slower" includes what the writing, on the same cores, takes from
the steps. Then the time to verify and to restore a checkpoint.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from measuring import timed

import flax_decoder as fd
from flax_decoder.cli import build_parser
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.checkpoint import Checkpoints, choose_step, newest_manifest, restore_state
from flax_decoder.training.placement import place_batch
from flax_decoder.training.step import init_state, jit_step

STEPS_PER_SAVE = 100
PAIRS = 8


def main() -> None:
    """Measures and prints."""
    options = build_parser().parse_args(["train", *(word.replace("_", "-") for word in sys.argv[1:])])
    settings = {name: value for name, value in vars(options).items() if "." in name}
    config = fd.load_config(options.config, settings)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, corpus = prepare_corpus(config.data, Path(folder))  # its mapped tokens outlive the files
    config = fd.load_config(options.config, {**settings, "model.vocab_size": tokenizer.vocab_size})
    mesh = make_mesh(config, jax.devices())
    state = init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=mesh)
    take_step = jit_step(state, mesh)

    def stretch(state: Any) -> Any:
        for _ in range(STEPS_PER_SAVE):
            length = config.model.context_length
            batch = place_batch(corpus.train, config.training, length, mesh, int(state.step))
            state = jax.block_until_ready(take_step(state, batch)[0])
        return state

    blocked, shares, slower = [], [], []
    with tempfile.TemporaryDirectory() as folder, use_mesh(mesh):
        with Checkpoints(Path(folder), keep_newest=2) as checkpoints:
            state = stretch(state)
            for _ in range(PAIRS):
                without, state = timed(lambda state=state: stretch(state))
                seconds, _ = timed(lambda state=state: checkpoints.save(state, None))
                with_save, state = timed(lambda state=state: stretch(state))
                checkpoints.wait()  # so that the next stretch has no writing
                blocked.append(seconds)
                shares.append(seconds / (seconds + with_save))
                slower.append((seconds + with_save) / without - 1)
        verify_seconds, step = timed(lambda: choose_step(Path(folder), "latest"))
        restore_seconds, _ = timed(lambda: restore_state(Path(folder), step, state))
        num_bytes = sum(file["bytes"] for file in newest_manifest(Path(folder))["files"].values())
    print(f"{num_bytes:,} bytes per checkpoint; medians of {PAIRS} stretches of {STEPS_PER_SAVE} steps:")
    print(f"blocked {1000 * statistics.median(blocked):.1f} ms, {100 * statistics.median(shares):.2f} % of the time")
    print(f"slower by {100 * statistics.median(slower):.1f} % in total")
    print(f"verified in {1000 * verify_seconds:.0f} ms, restored in {1000 * restore_seconds:.0f} ms")


if __name__ == "__main__":
    main()
