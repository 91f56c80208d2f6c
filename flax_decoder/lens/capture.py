"""Everything between tokens and logits, by name, of every layer and head."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from flax_decoder.nn.cache import KVCache
from flax_decoder.nn.call import Edit
from flax_decoder.nn.decoder import Decoder, check_tokens
from flax_decoder.nn.precision import accumulation_dtype

Seen = dict[str, jax.Array]
"""Arrays by their name; `NAMES` has the axes of each."""
Edits = Mapping[str, Edit | Sequence[Edit]]
"""By the name of what is changed: a function `(array, layer) -> array`, or several that follow each other."""

NAMES = {
    "embeddings": "BTD",  # what the first layer is given
    "q": "LBTNH",  # queries, before they are turned by position
    "k": "LBSKH",  # keys, likewise
    "v": "LBSKH",  # values
    "q_rotated": "LBTNH",  # queries as they meet keys; q itself where positions are not rotary
    "k_rotated": "LBSKH",  # keys as they meet queries
    "scores": "LBNTS",  # how well they match: scaled, capped, biased by position; minus infinity behind the mask
    "weights": "LBNTS",  # their softmax over S
    "key_positions": "LBS",  # which position each S is; negative for a slot of a cache that is empty
    "heads": "LBTNH",  # the average of the values, by these weights
    "head_writes": "LBTND",  # what each head adds to the residual stream
    "attention_write": "LBTD",  # what all heads of a layer add, and the bias of their projection
    "hidden": "LBTF",  # inside the feed-forward network
    "feed_forward_write": "LBTD",  # what it adds to the residual stream
    "residual": "LBTD",  # the residual stream after the layer
    "logits": "BTV",
}
# What stands in the slots that one layer's cache has more than another's.
_PADDING = {"scores": -jnp.inf, "weights": 0.0, "key_positions": -1}
_IN_ATTENTION = ("q", "k", "v", "scores", "weights", "key_positions", "heads")


def capture(
    model: Decoder,
    params: Any,
    tokens_BT: jax.typing.ArrayLike,
    cache: KVCache | None = None,
    *,
    edits: Edits | None = None,
    names: Sequence[str] | None = None,
) -> Any:
    """Runs a model and gives what it computed on the way, by the names and with the axes of `NAMES`.

    It is compiled once a shape of tokens, and may itself be called inside of `jax.jit`. Dropout is off.

    An edit is a pure function `(array, layer) -> array` of what goes by a name in one layer; `layer` is an int32
    scalar, traced where layers are scanned, so compare it by `jnp.where`. The array has the axes of `NAMES` without L;
    embeddings are of layer 0, logits of the last one. What comes after it is computed from what the edit gives, and
    so is what is captured. `head_writes` and `key_positions` are made of other arrays, so edit those. `lens.edits` has
    ready ones; an edit that is a `jax.tree_util.Partial` may have arrays as arguments, and is not compiled again for
    others.

    Args:
        model: the model.
        params: its parameters.
        tokens_BT: token ids.
        cache: the keys and values of tokens before. Then T counts the new tokens, k and v are those of the new tokens
            alone, and S of scores and weights counts what queries of the layer look at: slots of the cache, and behind
            them several new tokens.
        edits: what to change, by name.
        names: what to give, all where left out; what is not wanted is not computed.

    Returns:
        A dict of arrays, in the order of `NAMES`; with a cache, a pair of it and the cache with the new tokens in it.

    Raises:
        ValueError: a name that is not there, an edit that gives another shape or dtype, or what `Decoder` refuses.
    """
    unknown = [name for name in names or () if name not in NAMES]
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r} to capture, only {', '.join(NAMES)}")
    check_tokens(tokens_BT, model.config.vocab_size or 0)
    chains = None
    if edits is not None:
        chains = {name: edit if isinstance(edit, Sequence) else (edit,) for name, edit in edits.items()}
        chains = {name: tuple(map(_as_partial, chain)) for name, chain in chains.items()}
    wanted = tuple(NAMES) if names is None else tuple(names)
    seen, cache = _capture(model, wanted, params, jnp.asarray(tokens_BT), cache, chains)
    seen = {name: seen[name] for name in wanted}  # jit gives a dict in the order of the alphabet
    return seen if cache is None else (seen, cache)


def _as_partial(edit: Edit) -> Partial:
    """An edit as jit can take it: its function is a part of the program, its arguments are arrays."""
    return edit if isinstance(edit, Partial) else Partial(edit)


def _apply(chain: Sequence[Edit], array: jax.Array, layer: jax.Array) -> jax.Array:
    """One edit after the other."""
    return functools.reduce(lambda changed, edit: edit(changed, layer), chain, array)


@functools.partial(jax.jit, static_argnames=("model", "names"))
def _capture(
    model: Decoder,
    names: tuple[str, ...],
    params: Any,
    tokens_BT: jax.Array,
    cache: KVCache | None,
    chains: dict[str, tuple[Partial, ...]] | None,
) -> tuple[Seen, KVCache | None]:
    edits = None if chains is None else {name: functools.partial(_apply, chain) for name, chain in chains.items()}
    result, sown = model.apply({"params": params}, tokens_BT, cache, edits=edits, mutable=["intermediates"])
    logits_BTV, cache = (result, None) if cache is None else result

    sown = jax.tree.map(lambda once: once[0], sown["intermediates"], is_leaf=_is_sown)
    layers, attention = sown["layers"], sown["layers"]["attention"]
    seen = {name: _stacked(name, attention[name]) for name in _IN_ATTENTION}
    for name in ("q", "k"):
        seen[f"{name}_rotated"] = attention.get(f"{name}_rotated", seen[name])
    for name in ("scores", "weights"):  # the heads that share keys are side by side: (L, B, K, G, T, S)
        seen[name] = seen[name].reshape(*seen[name].shape[:2], -1, *seen[name].shape[-2:])
    L, _, S = seen["key_positions"].shape
    seen["key_positions"] = jnp.broadcast_to(seen["key_positions"], (L, tokens_BT.shape[0], S))
    seen |= {name: layers[name] for name in ("attention_write", "feed_forward_write", "residual")}
    seen |= {"hidden": layers["feed_forward"]["hidden"], "embeddings": sown["embeddings"], "logits": logits_BTV}
    if "head_writes" in names:
        seen["head_writes"] = _head_writes(model, params, seen["heads"], attention["out"]["output"])
    return {name: seen[name] for name in names}, cache


def _is_sown(node: Any) -> bool:
    """Whether a node of what was sown is the tuple that would hold the values of further calls."""
    return isinstance(node, tuple)


def _stacked(name: str, layers: Any) -> jax.Array:
    """An array of all layers; where these have different numbers of slots, with padding behind."""
    if not isinstance(layers, tuple):
        return layers
    most = max(layer.shape[-1] for layer in layers)
    return jnp.stack(
        [
            jnp.pad(layer, [(0, 0)] * (layer.ndim - 1) + [(0, most - layer.shape[-1])], constant_values=_PADDING[name])
            for layer in layers
        ]
    )


def _head_writes(model: Decoder, params: Any, heads_LBTNH: jax.Array, sum_LBTD: jax.Array) -> jax.Array:
    """head_writes_LBTND: each head through its rows of the output projection, in at least float32.

    Where the projection is followed by a norm, this is taken as what it did to the sum: to divide by one number, and
    for LayerNorm to subtract the mean. So the writes add up to `attention_write`, but for biases.
    """
    config, layers = model.config, params["layers"]
    own = layers if isinstance(layers, tuple) else (layers,)

    def parameter(*path: str) -> jax.Array:
        """One of all layers, whether they are stacked or not."""
        parts = [functools.reduce(lambda node, key: node[key], path, layer) for layer in own]
        stacked = jnp.stack(parts) if isinstance(layers, tuple) else parts[0]
        return stacked.astype(accumulation_dtype(heads_LBTNH.dtype))

    kernel_LNHD = parameter("attention", "out", "kernel")
    heads_LBTNH, sum_LBTD = heads_LBTNH.astype(kernel_LNHD.dtype), sum_LBTD.astype(kernel_LNHD.dtype)
    writes_LBTND = jnp.einsum("LBTNH,LNHD->LBTND", heads_LBTNH, kernel_LNHD)
    if config.norm_position not in ("both", "output"):
        return writes_LBTND
    if config.norm == "layernorm":
        sum_LBTD -= sum_LBTD.mean(-1, keepdims=True)
        writes_LBTND -= writes_LBTND.mean(-1, keepdims=True)
    inverse_LBT1 = jax.lax.rsqrt(jnp.square(sum_LBTD).mean(-1, keepdims=True) + config.norm_epsilon)
    scale_LD = parameter("attention_output_norm", "scale")
    return writes_LBTND * inverse_LBT1[..., None] * scale_LD[:, None, None, None]
