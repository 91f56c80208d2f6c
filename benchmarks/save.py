"""What saving costs a run: one checkpoint every 100 steps, beside none.

    python benchmarks/save.py [CONFIG.toml] [--section.field value ...]

Stretches of 100 steps in turn with a save at their beginning and without one, which is then written while the steps
are taken. Blocked is the time that the loop waits in `save`; slower is what the writing, on the same cores, takes from
the steps too. Then the time to verify a checkpoint and to restore it.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import flax_decoder as fd
from flax_decoder.cli import build_parser
from flax_decoder.data.corpus import prepare_corpus
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.checkpoint import Checkpoints, choose_step, newest_manifest, restore_state
from flax_decoder.training.placement import place_batch
from flax_decoder.training.step import init_state, jit_step

STEPS_A_SAVE = 100
PAIRS = 8


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds it takes, and its result."""
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def main() -> None:
    """Measures and prints."""
    options = build_parser().parse_args(["train", *(word.replace("_", "-") for word in sys.argv[1:])])
    settings = {name: value for name, value in vars(options).items() if "." in name}
    config = fd.load_config(options.config, settings)
    tokenizer, corpus = prepare_corpus(config.data, config.model.context_length, config.model.vocab_size)
    config = fd.load_config(options.config, {**settings, "model.vocab_size": tokenizer.vocab_size})
    mesh = make_mesh(config, jax.devices())
    state = init_state(fd.Decoder(config.model), config, rng=jax.random.key(0), mesh=mesh)
    take_step = jit_step(state, mesh)

    def stretch(state: Any) -> Any:
        for _ in range(STEPS_A_SAVE):
            length = config.model.context_length
            batch = place_batch(corpus.train_tokens, config.training, length, mesh, int(state.step))
            state = jax.block_until_ready(take_step(state, batch)[0])
        return state

    blocked, shares, slower = [], [], []
    with tempfile.TemporaryDirectory() as place, use_mesh(mesh):
        with Checkpoints(Path(place), keep_newest=2) as checkpoints:
            state = stretch(state)
            for _ in range(PAIRS):
                without, state = timed(lambda state=state: stretch(state))
                seconds, _ = timed(lambda state=state: checkpoints.save(state, None))
                with_save, state = timed(lambda state=state: stretch(state))
                checkpoints.wait()  # the next stretch has none of it
                blocked.append(seconds)
                shares.append(seconds / (seconds + with_save))
                slower.append((seconds + with_save) / without - 1)
        verify_seconds, step = timed(lambda: choose_step(Path(place), "latest"))
        restore_seconds, _ = timed(lambda: restore_state(Path(place), step, state))
        num_bytes = sum(file["bytes"] for file in newest_manifest(Path(place))["files"].values())
    print(f"{num_bytes:,} bytes a checkpoint; medians of {PAIRS} stretches of {STEPS_A_SAVE} steps:")
    print(f"blocked {1000 * statistics.median(blocked):.1f} ms, {100 * statistics.median(shares):.2f} % of the time")
    print(f"slower by {100 * statistics.median(slower):.1f} % in all")
    print(f"verified in {1000 * verify_seconds:.0f} ms, restored in {1000 * restore_seconds:.0f} ms")


if __name__ == "__main__":
    main()
