"""How many operations a model's training takes, and what part of the devices' peak it makes of them."""

from typing import Literal

from flax_decoder.config import ModelConfig
from flax_decoder.nn.feed_forward import GATED
from flax_decoder.training.hardware import chip_of

Convention = Literal["full", "causal"]
# What stands for a part of a peak that is in no table.
UNKNOWN = "unknown"


def flops_per_token(config: ModelConfig, convention: Convention) -> int:
    """Floating-point operations of a training step, a token, that the model itself asks for.

        6 * (weights in matrix products) + 12 N H * (keys a query meets, summed over the layers)

    A weight takes a multiplication and an addition forward and twice as much backward; a query and a key take 4 H a
    head forward, for the score and for the average. Papers count the keys in two ways:

    * "full": all T of the context, or those of the window (Chowdhery et al. 2022, appendix B).
    * "causal": those at the query's position and before it, T / 2 on average (Dao 2023, section 4.1). Of a window of W
      a query in the first W positions has W / 2 on average and one behind them all W.

    Norms, activations, biases, the softmax and the optimizer are in neither, nor are activations that remat computes
    again: the count says what is achieved, whatever the device does for it.

    Args:
        config: the model; its `vocab_size` must be set.
        convention: how keys are counted.

    Raises:
        ValueError: there is no `vocab_size`.
    """
    return 6 * num_product_weights(config) + 12 * config.num_heads * config.head_width * keys_met(config, convention)


def num_product_weights(config: ModelConfig) -> int:
    """Parameters that each token is multiplied with: kernels and head, and not what is only looked up or added."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not set: give it, or take it from the tokenizer")
    attention = config.embed_dim * config.head_width * 2 * (config.num_heads + config.kv_heads)
    matrices = 3 if config.feed_forward in GATED else 2
    feed_forward = matrices * config.embed_dim * config.mlp_width
    # A tied head is a product, too, though its weights are those of the embedding.
    return config.num_layers * (attention + feed_forward) + config.embed_dim * config.vocab_size


def keys_met(config: ModelConfig, convention: Convention) -> int:
    """Keys that a query of a whole context meets, on average, summed over the layers."""
    T = config.context_length
    windows = [min(window or T, T) for window in config.windows]
    if convention == "full":
        return sum(windows)
    return round(sum(W - W**2 / (2 * T) for W in windows))


def utilization(
    config: ModelConfig, tokens_per_second: float, device_kind: str, num_devices: int
) -> dict[str, float | str]:
    """Model FLOP/s utilization (MFU): the part of the devices' peak that a speed of training makes.

    The peak is that of dense bfloat16 products whatever the model computes in, as is usual: a float32 model has a lower
    one, which depends on how far the device rounds its inputs (TF32 on GPUs, several bfloat16 passes on TPUs).

    Args:
        config: the model.
        tokens_per_second: of all devices together.
        device_kind: what JAX calls a device.
        num_devices: how many of them work.

    Returns:
        "mfu", with attention counted in full, and "mfu_causal"; 1 is the peak. Both are "unknown" where the device is
        not in the table of peaks, as a CPU is not.
    """
    chip = chip_of(device_kind)
    conventions: dict[str, Convention] = {"mfu": "full", "mfu_causal": "causal"}
    if chip is None:
        return dict.fromkeys(conventions, UNKNOWN)
    tokens_per_second_a_device = tokens_per_second / num_devices
    return {
        name: flops_per_token(config, convention) * tokens_per_second_a_device / chip.peak_flops
        for name, convention in conventions.items()
    }
