"""Positions of tokens: attention by itself sees a set, these give it an order."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flax_decoder.config import PLAIN_LAYER, LayerKind, ModelConfig
from flax_decoder.nn.call import Call
from flax_decoder.nn.precision import accumulation_dtype


def sinusoidal(positions_BT: jax.Array, width: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Position vectors of fixed waves, for positions = "sinusoidal" (Vaswani et al. 2017, section 3.5).

        P(t, 2i) = sin(t / 10000^(2i/D)),   P(t, 2i+1) = cos(t / 10000^(2i/D))

    Args:
        positions_BT: position of each token, counted from 0.
        width: D, an even number.
        dtype: of the angles and of the result.

    Returns:
        (B, T, D).
    """
    frequencies = 10_000.0 ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = positions_BT[:, :, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None]
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves.reshape(*positions_BT.shape, width)


def rotary_frequencies(
    config: ModelConfig, kind: LayerKind = PLAIN_LAYER, call: Call | None = None
) -> np.ndarray | jax.Array:
    """Angle per position, in radians, of each rotated pair of numbers (Su et al. 2021, equation 15).

        theta_i = base^(-2i / R),   R the rotated part of the head width

    `linear` scaling divides all of them by the factor (Chen et al. 2023). `llama3` divides those whose wavelength is
    long compared with the original context, keeps those with a short one, and blends in between (Llama 3.1). `yarn`
    does so too, and blends by the number of the pair (Peng et al. 2023, section 3.2), between bounds that the authors'
    code rounds to whole numbers (`rotary_truncate`).

    `dynamic` and `longrope` depend on the length of the text; see `_stretched_by_length`.

    Args:
        config: the model.
        kind: of the layer: those with a window may have another base (Gemma 3), and some do not rotate (SmolLM 3).
        call: whose texts are turned; None means texts of up to the original context.

    Returns:
        (R / 2,), float64; with a call, where they depend on its texts, (B, T, 1, R / 2), where B and T may be 1.
    """
    rotated = int(config.head_width * config.rotary_fraction)
    exponents = -np.arange(0, rotated, 2, dtype=np.float64) / rotated
    if not kind.rotates:
        return np.zeros_like(exponents)
    if kind.window is not None and config.rotary_window_base is not None:
        return config.rotary_window_base**exponents
    frequencies: np.ndarray = config.rotary_base**exponents
    factor = config.rotary_scaling_factor
    if config.rotary_scaling == "linear":
        frequencies /= factor
    elif config.rotary_scaling == "llama3":
        turns_in_original_context = config.rotary_original_context * frequencies / (2 * math.pi)
        low, high = config.rotary_low_frequency_factor, config.rotary_high_frequency_factor
        kept = np.clip((turns_in_original_context - low) / (high - low), 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / factor
    elif config.rotary_scaling == "yarn":

        def pair(turns: float) -> float:
            """The number of the pair that turns so often in the original context."""
            return (
                rotated
                * math.log(config.rotary_original_context / (2 * math.pi * turns))
                / (2 * math.log(config.rotary_base))
            )

        first, last = pair(config.rotary_high_frequency_factor), pair(config.rotary_low_frequency_factor)
        if config.rotary_truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotated - 1)
        last = last + 0.001 if last == first else last  # as in the authors' code
        stretched = np.clip((np.arange(rotated // 2) - first) / (last - first), 0, 1)
        frequencies = stretched * frequencies / factor + (1 - stretched) * frequencies
    elif config.rotates_by_length and call is not None:
        return _stretched_by_length(config, frequencies, call.lengths_BT())
    elif config.rotary_scaling == "longrope":
        frequencies /= np.array(config.rotary_short_factors)
    return frequencies


def _stretched_by_length(config: ModelConfig, frequencies: np.ndarray, lengths_BT: jax.Array) -> jax.Array:
    """The frequencies (B, T, 1, R / 2) of tokens whose texts have these lengths.

    Texts of up to the original context C are as in the first training. `longrope` divides by one of two lists of
    factors (Ding et al. 2024). `dynamic` raises the base with the length t, as `transformers` does (NTK scaling):

        base (factor t / C - (factor - 1))^(R / (R - 2))
    """
    dtype = accumulation_dtype(config.dtype)
    lengths_BT11, context = lengths_BT[:, :, None, None], config.rotary_original_context
    if config.rotary_scaling == "longrope":
        short, long = (
            jnp.asarray(frequencies / np.array(factors), dtype)[None, None, None]
            for factors in (config.rotary_short_factors, config.rotary_long_factors)
        )
        return jnp.where(lengths_BT11 > context, long, short)
    half, factor = len(frequencies), config.rotary_scaling_factor
    growth_BT11 = factor * jnp.maximum(lengths_BT11, context).astype(dtype) / context - (factor - 1)
    exponents = jnp.asarray(-np.arange(half) / (half - 1), dtype)  # -2 i / R times R / (R - 2)
    return jnp.asarray(frequencies, dtype)[None, None, None] * growth_BT11 ** exponents[None, None, None]


def turns_alike(config: ModelConfig, first: int, second: int) -> bool:
    """Whether the beginnings of two texts of these lengths, in tokens, have the same keys."""
    if not config.rotates_by_length or first == second:
        return True
    is_long = [length > config.rotary_original_context for length in (first, second)]
    return not any(is_long) or (config.rotary_scaling == "longrope" and all(is_long))


def rotary_magnitude(config: ModelConfig, kind: LayerKind = PLAIN_LAYER) -> float:
    """What is rotated is multiplied by this: only where wavelengths are stretched as in YaRN or LongRoPE."""
    is_plain = not kind.rotates or (kind.window is not None and config.rotary_window_base is not None)
    return config.rotary_magnitude if config.rotary_scaling in ("yarn", "longrope") and not is_plain else 1.0


def scale_queries(config: ModelConfig, q_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Queries that grow with their position, where the model has `rotary_query_scaling` b (Llama 4, Ministral 3).

        q (1 + b ln(1 + floor(position / C))),   C the original context

    More keys flatten a softmax; larger scores sharpen it again.

    Args:
        config: the model.
        q_BTNH: queries.
        positions_BT: position of each token; B may be 1.

    Returns:
        The same shape and dtype.
    """
    if config.rotary_query_scaling == 0:
        return q_BTNH
    dtype = accumulation_dtype(q_BTNH.dtype)
    contexts_BT = (positions_BT // config.rotary_original_context).astype(dtype)
    scale_BT = 1 + config.rotary_query_scaling * jnp.log1p(contexts_BT)
    return (q_BTNH.astype(dtype) * scale_BT[:, :, None, None]).astype(q_BTNH.dtype)


def rotate(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    frequencies: np.ndarray | jax.Array,
    layout: Literal["half", "interleaved"] = "half",
    magnitude: float = 1.0,
) -> jax.Array:
    """Rotates pairs of numbers of each head by an angle proportional to the position.

    The score of a rotated query and a rotated key depends on the distance of their positions only. Numbers from R on
    are not rotated.

    Args:
        x_BTNH: queries or keys.
        positions_BT: position of each token; B may be 1.
        frequencies: from `rotary_frequencies`, (R / 2,) or (B, T, 1, R / 2).
        layout: "half" pairs number i with number i + R/2, as GPT-NeoX and Llama do; "interleaved" number 2 i with
            number 2 i + 1, as the paper and GPT-J do.
        magnitude: factor of the numbers that are rotated.

    Returns:
        The same shape and dtype.
    """
    dtype = accumulation_dtype(x_BTNH.dtype)
    leading = (None,) * (4 - frequencies.ndim)
    angles = positions_BT[:, :, None, None].astype(dtype) * jnp.asarray(frequencies, dtype)[leading]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if magnitude != 1:
        cos, sin = cos * magnitude, sin * magnitude
    half = frequencies.shape[-1]
    x = x_BTNH.astype(dtype)
    rest = x[..., 2 * half :]
    if layout == "interleaved":
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        turned = jnp.concatenate([pairs.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_BTNH.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """How much each head's scores fall per position of distance (Press et al. 2021, section 3).

        slope_n = 2^(-8 n / N),   n = 1 ... N

    If N is no power of two, the slopes of the power below it come first, then every other one of the power above, as in
    the authors' code.

    Returns:
        (N,), float32.
    """

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    below = 2 ** int(math.log2(num_heads))
    slopes = np.concatenate([geometric(below), geometric(2 * below)[::2][: num_heads - below]])
    return slopes.astype(np.float32)
