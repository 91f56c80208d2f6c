"""What a model is called with, checked by name: in Python, so that a compiled program pays nothing for it.

Values are checked where they are known, which they are not inside of `jax.jit`; dtypes and shapes always are.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError, as_one_line, require_type
from flax_decoder.nn.axes import check_axis_types
from flax_decoder.nn.cache import KVCache
from flax_decoder.nn.call import Edit, check_edits
from flax_decoder.nn.feed_forward import GATED
from flax_decoder.nn.precision import check_float64

# How the paths of parameters end that only some models read: the setting that decides, and the values that read them.
READ_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "head": ("tied_head", (False,)),
    "head_bias": ("head_bias", (True,)),
    "positions": ("positions", ("learned",)),
    "embedding_norm/scale": ("embedding_norm", (True,)),
    "final_norm/scale": ("final_norm", (True,)),
    **{
        f"{of}_norm/bias": ("norm_bias", (True,))
        for of in ("attention", "feed_forward", "output", "embedding", "final")
    },
    "norm/scale": ("norm_scale", (True,)),
    "layers/feed_forward_norm/scale": ("shared_norm", (False,)),
    **dict.fromkeys(("attention_norm/scale", "feed_forward_norm/scale"), ("norm_position", ("pre", "post", "both"))),
    "output_norm/scale": ("norm_position", ("both", "output")),
    **dict.fromkeys(("query_norm/scale", "key_norm/scale"), ("qk_norm", ("head", "each_head", "all"))),
    **dict.fromkeys(("query_norm/bias", "key_norm/bias"), ("qk_norm_bias", (True,))),
    **{f"{name}/bias": ("attention_in_bias", (True,)) for name in ("query", "key", "value")},
    "out/bias": ("attention_out_bias", (True,)),
    "gate/kernel": ("feed_forward", GATED),
    **{f"{name}/bias": ("mlp_bias", (True,)) for name in ("up", "gate", "down")},
}


def checked_arguments(
    config: ModelConfig,
    params: Any,
    tokens_BT: ArrayLike,
    cache: KVCache | None,
    positions_BT: ArrayLike | None,
    segments_BT: ArrayLike | None,
    num_tokens_B: ArrayLike | None,
    edits: Mapping[str, Edit] | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """The tokens, positions, segments and numbers of tokens of a call of `Decoder`, as `as_integers`.

    Raises:
        ValueError: arguments that it cannot compute with.
    """
    require_type("the config of a Decoder", config, ModelConfig, "such as config.model")
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is not set: give it, or take it from the tokenizer")
    check_float64(config.dtype)
    check_params(config, params)
    B, T = check_shape(tokens_BT)
    tokens_BT = as_integers(check_tokens(tokens_BT, config.vocab_size))
    # Without a cache, arrays that are in full on each device do no harm.
    check_axis_types((params, tokens_BT, cache), split_only=cache is None)
    if config.positions == "learned" and T > config.context_length:
        raise ValueError(f"{T} tokens are more than context_length = {config.context_length} learned positions")
    if positions_BT is not None and cache is not None:
        raise ValueError("a cache says where its tokens stand: leave out positions_BT")
    if segments_BT is not None and cache is not None:
        raise ValueError("a cache holds one document per row: leave out segments_BT")
    if cache is not None:
        check_cache(config, cache, B)
    end = config.context_length if config.positions == "learned" else None
    positions_BT = _integers("positions_BT", positions_BT, [(B, T), (1, T)], 0, end)
    segments_BT = _integers("segments_BT", segments_BT, [(B, T)])
    num_tokens_B = _integers("num_tokens_B", num_tokens_B, [(B,)], 0, T + 1)
    check_edits(edits or (), has_rotation=config.positions == "rotary")
    return tokens_BT, positions_BT, segments_BT, num_tokens_B


def check_params(config: ModelConfig, params: Any) -> None:
    """Raises ValueError for parameters that would be rounded or passed over without a word; Flax checks the shapes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for end, (field, values) in READ_WITH.items():
            value = getattr(config, field)
            if name.endswith(end) and value not in values:
                shown = json.dumps(value)
                raise ValueError(f"the params have {name!r}, which a model with {field} = {shown} does not read")
        dtype = getattr(leaf, "dtype", None)
        if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating):
            found = dtype if isinstance(dtype, np.dtype) else f"a {type(leaf).__name__}"
            raise ValueError(f"the parameter {name} must be an array of floating-point numbers, not {found}")


def check_shape(tokens_BT: ArrayLike, name: str = "token ids") -> tuple[int, int]:
    """The batch size and the number of tokens. Raises ValueError unless both are at least 1 and the only axes."""
    shape = as_array(tokens_BT, name).shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} have the shape {shape}, but must be (B, T), both at least 1")
    return shape


def check_cache(config: ModelConfig, cache: KVCache, batch_size: int) -> None:
    """Raises ValueError for a cache of another model, or of another number of rows."""
    require_type("the cache", cache, KVCache, "from empty_cache or an earlier call")
    found = [k_BKSH.shape for k_BKSH, _ in cache.layers]
    rows = {shape[0] for shape in found} | {*cache.length_B.shape}
    if rows != {batch_size}:
        raise ValueError(
            f"the cache has {', '.join(map(str, sorted(rows)))} rows, but there are {batch_size} of tokens"
        )
    heads = {(shape[1], shape[3]) for shape in found}
    if len(found) != config.num_layers or heads != {(config.kv_heads, config.head_width)}:
        raise ValueError(
            f"the cache is of another model: it has {len(found)} layers with keys (B, K, S, H) of {found[0]}, but the "
            f"model has {config.num_layers}, K = {config.kv_heads} and H = {config.head_width}"
        )


def _integers(
    name: str, array: Any, shapes: list[tuple[int, ...]], start: int | None = None, end: int | None = None
) -> jax.Array | None:
    """An optional argument as `as_integers`: of one of these shapes and, where it is known, in this range."""
    if array is None:
        return None
    found = as_array(array, name).shape
    if found not in shapes:
        raise ValueError(f"{name} has the shape {found}, but must have {' or '.join(map(str, dict.fromkeys(shapes)))}")
    array = as_integers(array, name)
    if not isinstance(array, jax.core.Tracer) and start is not None:
        values = np.asarray(array)
        outside = values[(values < start) | (False if end is None else values >= end)]
        if outside.size > 0:
            raise ValueError(
                f"{name} has {outside[0]}, but must be {start} {'or more' if end is None else f'to {end - 1}'}"
            )
    return array


def as_array(array: Any, name: str) -> jax.Array | np.ndarray:
    """A JAX array as it is, and what NumPy makes an array of numbers of: lists, or tensors of PyTorch on the CPU.

    Raises:
        ValueError: it is none; names what it is.
    """
    if isinstance(array, jax.Array) and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    try:
        # A masked array would lose its mask.
        made = None if isinstance(array, np.ma.MaskedArray) else np.asarray(array)
    except (ValueError, TypeError, RuntimeError):
        made = None
    if made is None or not any(jnp.issubdtype(made.dtype, kind) for kind in (jnp.number, jnp.bool_)):
        raise ValueError(f"{name} must be an array of numbers, not {type(array).__name__}: {as_one_line(array)}")
    return made.astype(made.dtype.newbyteorder("="), copy=False)


def as_integers(array: Any, name: str = "token ids") -> jax.Array:
    """Signed integers of at least 32 bits, whatever the dtype of the given ones.

    With fewer, as in int8, the size of the vocabulary may not be a number of their dtype; and the difference of two
    unsigned positions is never negative.

    Raises:
        ValueError: they are no integers, or one is known and too large for what JAX computes in, int32 by default.
    """
    array = check_integers(array, name)
    is_wide = jax.dtypes.canonicalize_dtype(array.dtype).itemsize == 8
    dtype = jnp.int64 if is_wide else jnp.int32
    if isinstance(array, np.ndarray):
        differs = array.astype(dtype) != array
        if differs.any():
            raise ValueError(f"{name}: {array[differs][0]} does not fit into {dtype.dtype}, in which JAX computes")
    return jnp.asarray(array.astype(dtype))


def check_tokens(
    tokens: Any, vocab_size: int, mask: ArrayLike | None = None, name: str = "token ids"
) -> jax.Array | np.ndarray:
    """The token ids as `as_array`.

    Raises:
        ValueError: they are no integers; or one that is known (not traced), and that the mask keeps, is not in the
            vocabulary.
    """
    tokens = check_integers(tokens, name)
    if isinstance(tokens, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return tokens
    ids = np.asarray(tokens) if mask is None else np.asarray(tokens)[np.asarray(mask) > 0]
    # In 64 bits, since the size of the vocabulary may not be a number of the dtype of the ids.
    outside = ids[(ids < 0) | (ids.astype(np.uint64) >= vocab_size)]
    if outside.size > 0:
        raise ValueError(f"token id {outside[0]} is not in the vocabulary: 0 to {vocab_size - 1}")
    return tokens


def check_integers(array: Any, name: str) -> jax.Array | np.ndarray:
    """What is given as `as_array`. Raises ValueError for numbers of another kind."""
    array = as_array(array, name)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    return array


def check_key(rng: Any) -> None:
    """Raises UserError for what is no single random key, of the new kind or of the old."""
    try:
        key = rng if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(jnp.asarray(rng))
        is_one = key.shape == ()
    except (AttributeError, TypeError, ValueError):
        is_one = False
    if not is_one:
        raise UserError(f"rng must be one random key, such as jax.random.key(0), not {as_one_line(rng)}")
