"""Measures how fast a config trains and generates on the available devices."""

import dataclasses
import statistics
import time

import jax
import numpy as np
import optax

from flax_decoder.config import Config
from flax_decoder.data.splits import Split
from flax_decoder.generation.generate import generate
from flax_decoder.nn.decoder import Decoder
from flax_decoder.parallel.mesh import make_mesh, use_mesh
from flax_decoder.training.flops import flops_per_token, utilization
from flax_decoder.training.placement import place_batch
from flax_decoder.training.step import init_state, jit_step

DEFAULT_VOCAB_SIZE = 256  # that of the byte tokenizer, for a config that sets none
TIMED_STEPS = 20
DECODED_TOKENS = 128


def measure_speed(config: Config) -> dict[str, float | str]:
    """Times training steps on random tokens and greedy decoding, both after compilation.

    Returns:
        "step_seconds" (median) and "tokens_per_second" of all devices together; "decode_tokens_per_second" (one row);
        "compile_seconds"; "device" and "num_devices"; "parameters" (count); "flops_per_token" and "mfu", a fraction of
        the devices' peak or "unknown"; the last two again with attention halved, "flops_per_token_causal" and
        "mfu_causal" (see `flops_per_token`, `utilization`).

    Raises:
        UserError: the available devices do not make the mesh.
    """
    config = dataclasses.replace(config, model=config.model.with_vocab_size(DEFAULT_VOCAB_SIZE))
    model, training = config.model, config.training
    mesh = make_mesh(config, jax.devices())
    decoder = Decoder(model, config.lora.adapter)
    state = init_state(decoder, config, rng=jax.random.key(training.seed), mesh=mesh)
    num_tokens = training.batch_size * (model.context_length + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, num_tokens, np.int32)
    batch = place_batch(Split(tokens, np.zeros(1, np.int64), 1), training, model.context_length, mesh, 0)

    with use_mesh(mesh):
        start = time.perf_counter()
        take_step = jit_step(state, mesh, deterministic=training.deterministic).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start
        seconds = []
        for _ in range(3 + TIMED_STEPS):  # the first three warm up
            start = time.perf_counter()
            state, _ = jax.block_until_ready(take_step(state, batch))
            seconds.append(time.perf_counter() - start)
        step_seconds = statistics.median(seconds[3:])
        decode_tokens_per_second = decode_speed(decoder, state.all_params, tokens[None, :1])

    adapters = None if state.frozen is None else optax.tree.size(state.params)
    tokens_per_second = training.batch_size * model.context_length / step_seconds
    device_kind = mesh.devices.flat[0].device_kind
    return {
        "device": device_kind,
        "num_devices": mesh.size,
        "parameters": optax.tree.size(state.all_params),
        "compile_seconds": compile_seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops_per_token(model, "full", adapters),
        "flops_per_token_causal": flops_per_token(model, "causal", adapters),
        **utilization(model, tokens_per_second, device_kind, mesh.size, adapters),
        "decode_tokens_per_second": decode_tokens_per_second,
    }


def decode_speed(model: Decoder, params: object, prompt_tokens_BT: np.ndarray) -> float:
    """New tokens per second of greedy decoding, without compilation."""
    num_tokens = min(DECODED_TOKENS, model.config.context_length)
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(generate(model, params, prompt_tokens_BT, num_tokens, temperature=0.0))
        seconds = time.perf_counter() - start
    return prompt_tokens_BT.shape[0] * num_tokens / seconds
