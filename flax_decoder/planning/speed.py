"""How fast a configuration trains and generates on the devices at hand."""

import dataclasses
import statistics
import time

import jax
import numpy as np

from flax_decoder.config import Config
from flax_decoder.generation.generate import generate
from flax_decoder.nn.decoder import Decoder
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.flops import flops_per_token, utilization
from flax_decoder.training.placement import place_batch
from flax_decoder.training.step import init_state, jit_step

# Where the text does not say the vocabulary, that of the byte tokenizer.
DEFAULT_VOCAB_SIZE = 256
TIMED_STEPS = 20
DECODED_TOKENS = 128


def measure_speed(config: Config) -> dict[str, float | str]:
    """Trains a few steps on random tokens and generates a few, and times both after they are compiled.

    Args:
        config: the run; it takes its steps on the devices that its mesh asks for.

    Returns:
        Of all devices together and medians: "step_seconds", "tokens_per_second", "decode_tokens_per_second" (one row);
        "compile_seconds"; "device" and "num_devices"; the count "parameters"; "flops_per_token", and "mfu", the part of
        the devices' peak that those make, or "unknown"; both again with attention halved, "flops_per_token_causal" and
        "mfu_causal" (see `flops_per_token`, `utilization`).

    Raises:
        UserError: the devices at hand do not make the mesh.
    """
    config = dataclasses.replace(config, model=config.model.with_vocab_size(DEFAULT_VOCAB_SIZE))
    model, training = config.model, config.training
    mesh = make_mesh(config, jax.devices())
    state = init_state(Decoder(model), config, rng=jax.random.key(training.seed), mesh=mesh)
    num_tokens = training.batch_size * (model.context_length + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, num_tokens, np.int32)
    batch = place_batch(tokens, training, model.context_length, mesh, 0)

    with use_mesh(mesh):
        start = time.perf_counter()
        take_step = jit_step(state, mesh).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        seconds = []
        for _ in range(3 + TIMED_STEPS):  # the first ones warm up
            start = time.perf_counter()
            state, _ = jax.block_until_ready(take_step(state, batch))
            seconds.append(time.perf_counter() - start)
        step_seconds = statistics.median(seconds[3:])
        decode_tokens_per_second = decode_speed(Decoder(model), state.params, tokens[None, :1])

    tokens_per_second = training.batch_size * model.context_length / step_seconds
    device_kind = mesh.devices.flat[0].device_kind
    return {
        "device": device_kind,
        "num_devices": mesh.size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "compile_seconds": compile_seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops_per_token(model, "full"),
        "flops_per_token_causal": flops_per_token(model, "causal"),
        **utilization(model, tokens_per_second, device_kind, mesh.size),
        "decode_tokens_per_second": decode_tokens_per_second,
    }


def decode_speed(model: Decoder, params: object, prompt_tokens_BT: np.ndarray) -> float:
    """New tokens a second of a greedy continuation, compilation left out."""
    num_tokens = min(DECODED_TOKENS, model.config.context_length)
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(generate(model, params, prompt_tokens_BT, num_tokens, temperature=0.0))
        seconds = time.perf_counter() - start
    return prompt_tokens_BT.shape[0] * num_tokens / seconds
