"""How fast a configuration trains and generates on the devices at hand."""

import statistics
import time

import jax
import numpy as np

from flax_decoder.config import Config
from flax_decoder.generation.generate import generate
from flax_decoder.nn.decoder import Decoder
from flax_decoder.training.flops import flops_per_token, utilization
from flax_decoder.training.step import init_state, train_steps

# Where the text does not say the vocabulary, that of the byte tokenizer.
DEFAULT_VOCAB_SIZE = 256
STEPS_A_CALL = 4
TIMED_CALLS = 5
DECODED_TOKENS = 128


def measure_speed(config: Config) -> dict[str, float | str]:
    """Trains a few steps on random tokens and generates a few, and times both after they are compiled.

    Returns:
        Medians: "step_seconds", "tokens_per_second", "decode_tokens_per_second" (one row); "compile_seconds"; the count
        "parameters"; "flops_per_token", and "mfu", the part of the device's peak that those make, or "unknown"; both
        again with attention halved, "flops_per_token_causal" and "mfu_causal" (see `flops_per_token`, `utilization`).
    """
    model_config = config.model.with_vocab_size(DEFAULT_VOCAB_SIZE)
    model = Decoder(model_config)
    state = init_state(model, config, rng=jax.random.key(config.training.seed))
    shape = (config.training.batch_size, model_config.context_length + 1)
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, shape, np.int32)
    # Steps are taken as a run takes them, several in one call.
    tokens = np.repeat(tokens[None], STEPS_A_CALL, axis=0)
    batches = {"inputs": tokens[:, :, :-1], "targets": tokens[:, :, 1:]}

    start = time.perf_counter()
    take_steps = jax.jit(train_steps, donate_argnums=0).lower(state, batches, STEPS_A_CALL).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(1 + TIMED_CALLS):  # the first warms up
        start = time.perf_counter()
        state, _ = jax.block_until_ready(take_steps(state, batches, STEPS_A_CALL))
        seconds.append((time.perf_counter() - start) / STEPS_A_CALL)
    step_seconds = statistics.median(seconds[1:])
    tokens_per_second = config.training.batch_size * model_config.context_length / step_seconds

    device_kind = jax.devices()[0].device_kind
    return {
        "device": device_kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "compile_seconds": compile_seconds,
        "step_seconds": step_seconds,
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops_per_token(model_config, "full"),
        "flops_per_token_causal": flops_per_token(model_config, "causal"),
        **utilization(model_config, tokens_per_second, device_kind, num_devices=1),
        "decode_tokens_per_second": decode_speed(model, state.params, tokens[0, :1, :1]),
    }


def decode_speed(model: Decoder, params: object, prompt_tokens_BT: np.ndarray) -> float:
    """New tokens a second of a greedy continuation, compilation left out."""
    num_tokens = min(DECODED_TOKENS, model.config.context_length)
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(generate(model, params, prompt_tokens_BT, num_tokens, temperature=0.0))
        seconds = time.perf_counter() - start
    return prompt_tokens_BT.shape[0] * num_tokens / seconds
