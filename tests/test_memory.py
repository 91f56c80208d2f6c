"""What the memory settings save, by what the compiler sets aside for a step beside its inputs and outputs."""

import jax
import numpy as np

import flax_decoder as fd

B, T = 4, 128
SIZES = {
    "model.vocab_size": 64,
    "model.context_length": T,
    "model.num_layers": 4,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "model.scan_layers": True,
    "training.batch_size": B,
}


def temporaries(**changes):
    """Bytes; of a step that is compiled and never run."""
    config = fd.load_config(None, SIZES | {name.replace("__", "."): value for name, value in changes.items()})
    state = jax.eval_shape(lambda: fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0)))
    batch = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((B, T), np.int32))
    return jax.jit(fd.train_step).lower(state, batch).compile().memory_analysis().temp_size_in_bytes


def test_each_way_to_recompute_keeps_less_than_the_one_before():
    for attention in ("reference", "blockwise"):
        none, scores, dots, full = (
            temporaries(model__remat=remat, model__attention=attention)
            for remat in ("none", "attention", "dots", "full")
        )
        assert none > 1.3 * scores > 1.3 * 1.3 * dots > 1.3 * 1.3 * 1.3 * full, attention


def test_chunks_take_an_eighth_of_what_all_logits_take():
    """Here logits are 16 MiB in all and 1 MiB in a chunk; the embedding and its gradient are 1 MiB each."""
    large = {"model__vocab_size": 8192, "model__num_layers": 1}
    plain = temporaries(**large, training__loss_chunk_tokens=0)
    assert plain > B * T * 8192 * 4
    assert temporaries(**large, training__loss_chunk_tokens=32) <= plain / 8
    assert temporaries(**large) == plain  # nothing that small is cut unasked
