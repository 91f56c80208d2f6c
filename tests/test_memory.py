"""Memory saved by the memory settings: what the compiler allocates for gradients beside inputs and outputs."""

import itertools

import jax
import numpy as np
import pytest
from job import dotted

import flax_decoder as fd
from flax_decoder.training.step import mean_gradients

B, T = 4, 128
SIZES = {
    "model.vocab_size": 64,
    "model.context_length": T,
    "model.num_layers": 6,
    "model.embed_dim": 32,
    "model.num_heads": 4,
    "model.scan_layers": True,
    "training.batch_size": B,
}


def temporaries(**changes):
    """Bytes of a step that is compiled but not run."""
    config = fd.load_config(None, SIZES | dotted(changes))
    state = jax.eval_shape(lambda: fd.init_state(fd.Decoder(config.model), config, rng=jax.random.key(0)))
    batch = dict.fromkeys(("inputs", "targets"), jax.ShapeDtypeStruct((B, T), np.int32))
    return jax.jit(mean_gradients).lower(state, batch).compile().memory_analysis().temp_size_in_bytes


POLICIES = ["none", "attention", "dots", "full"]


@pytest.mark.parametrize("policies", [["none", "dots"], pytest.param(POLICIES, marks=pytest.mark.full)], ids="-".join)
def test_each_remat_policy_keeps_less_than_the_previous(policies):
    kept = [temporaries(model__remat=policy, model__attention="reference") for policy in policies]
    for before, after in itertools.pairwise(kept):
        assert before > 1.3 * after


def test_chunks_take_an_eighth_of_all_logits():
    """If little else takes memory: here all logits are 64 MiB, and a chunk of them is 1 MiB."""
    large = {"model__vocab_size": 32_768, "model__embed_dim": 8, "model__remat": "full"}
    plain = temporaries(**large, training__loss_chunk_tokens=0)
    assert plain > B * T * 32_768 * 4
    assert temporaries(**large, training__loss_chunk_tokens=8) <= plain / 8
    assert temporaries(**large) == plain  # the default does not chunk logits this small
