"""How many operations a training step takes, and which part of the devices' peak it uses (MFU)."""

from typing import Literal

from flax_decoder.config import ModelConfig
from flax_decoder.nn.feed_forward import GATED
from flax_decoder.training.hardware import chip_of

Convention = Literal["full", "causal"]
# The value of a log entry that is not known, such as the MFU of a device without a stated peak.
UNKNOWN = "unknown"


def flops_per_token(config: ModelConfig, convention: Convention, num_adapter_weights: int | None = None) -> int:
    """Floating-point operations of a training step per token.

        6 * (weights in matrix products) + 12 N H * (keys per query, summed over the layers)

    A weight takes one multiplication and one addition in the forward pass and twice as many in the backward pass; a
    query and a key take 4 H per head in the forward pass, for the score and for the average. There are two ways to
    count the keys:

    * "full": all T of the context, or the whole window (Chowdhery et al. 2022, appendix B).
    * "causal": those up to the query's position, T / 2 on average (Dao 2023, section 4.1). With a window of W, a query
      in the first W positions has W / 2 on average, and each later one has W.

    Where only adapters learn, the frozen weights have no gradient: 4 for each of them, and 6 for each of the adapters.

    Neither includes norms, activations, biases, the softmax, the optimizer, or activations that remat recomputes.

    Raises:
        ValueError: `config.vocab_size` is not set.
    """
    attention = 12 * config.num_heads * config.head_width * keys_per_query(config, convention)
    if num_adapter_weights is not None:
        return 4 * num_product_weights(config) + 6 * num_adapter_weights + attention
    return 6 * num_product_weights(config) + attention


def num_product_weights(config: ModelConfig) -> int:
    """Parameters that each token is multiplied with: kernels and head, but not lookups, scales and biases."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not set: give it, or take it from the tokenizer")
    attention = config.embed_dim * config.head_width * 2 * (config.num_heads + config.kv_heads)
    matrices = 3 if config.feed_forward in GATED else 2
    feed_forward = matrices * config.embed_dim * config.mlp_width
    # A tied head is a product too, though its weights are those of the embedding.
    return config.num_layers * (attention + feed_forward) + config.embed_dim * config.vocab_size


def keys_per_query(config: ModelConfig, convention: Convention) -> int:
    """Keys per query, averaged over a full context and summed over the layers."""
    T = config.context_length
    windows = [min(window or T, T) for window in config.windows]
    if convention == "full":
        return sum(windows)
    return round(sum(W - W**2 / (2 * T) for W in windows))


def utilization(
    config: ModelConfig,
    tokens_per_second: float,
    device_kind: str,
    num_devices: int,
    num_adapter_weights: int | None = None,
) -> dict[str, float | str]:
    """Model FLOP/s utilization (MFU): achieved training FLOP/s as a part of the devices' peak.

    The peak is that of dense bfloat16 products, as is usual, whatever dtype the model computes in. Tokens per second
    are those of all devices together.

    Returns:
        "mfu" with the "full" count and "mfu_causal" with the "causal" one; 1 is the peak. Both are "unknown" for a
        device without a stated peak, such as a CPU.
    """
    chip = chip_of(device_kind)
    conventions: dict[str, Convention] = {"mfu": "full", "mfu_causal": "causal"}
    if chip is None:
        return dict.fromkeys(conventions, UNKNOWN)
    tokens_per_device = tokens_per_second / num_devices
    return {
        name: flops_per_token(config, convention, num_adapter_weights) * tokens_per_device / chip.peak_flops
        for name, convention in conventions.items()
    }
