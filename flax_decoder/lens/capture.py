"""Every activation between tokens and logits, by name, of all layers and heads."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from flax_decoder.config import ModelConfig
from flax_decoder.nn.arguments import as_integers, check_shape, check_tokens
from flax_decoder.nn.cache import KVCache
from flax_decoder.nn.call import Edit
from flax_decoder.nn.decoder import Decoder, scaled
from flax_decoder.nn.norm import norm_of
from flax_decoder.nn.params import layers_of
from flax_decoder.nn.precision import accumulation_dtype

Activations = dict[str, jax.Array]
"""Arrays by name; `NAMES` has the axes of each."""
Edits = Mapping[str, Edit | Sequence[Edit]]
"""By the name of the edited array: a function `(array, layer) -> array`, or several, applied in order."""

NAMES = {
    "embeddings": "BTD",  # input of the first layer
    "q": "LBTNH",  # queries, before the rotation
    "k": "LBSKH",  # keys, before the rotation
    "v": "LBSKH",  # values
    "q_rotated": "LBTNH",  # queries as they meet keys, after the rotation; equal to q if positions are not rotary
    "k_rotated": "LBSKH",  # keys after the rotation
    "scores": "LBNTS",  # scaled, soft-capped and with position bias; minus infinity if masked
    "weights": "LBNTS",  # softmax of the scores over S
    "key_positions": "LBS",  # position of each key; negative for an empty slot of a cache
    "heads": "LBTNH",  # values averaged by these weights
    "head_writes": "LBTND",  # what each head adds to the residual stream
    "attention_write": "LBTD",  # the sum over heads, with the bias of the output projection
    "hidden": "LBTF",  # input of the feed-forward network's last projection
    "feed_forward_write": "LBTD",  # what the feed-forward network adds to the residual stream
    "residual": "LBTD",  # the residual stream after the layer
    "logits": "BTV",
}
# Pads layers whose cache has fewer slots than others.
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
    """Runs a model and returns its activations, with the names and axes of `NAMES`.

    It compiles once per shape of tokens, and can be called inside `jax.jit`. Dropout is off.

    An edit is a pure function `(array, layer) -> array`; `layer` is an int32 scalar, traced if layers are scanned, so
    compare it with `jnp.where`. The array has the axes of `NAMES` without L; embeddings belong to layer 0, logits to
    the last layer. Everything after it, captured arrays included, is computed from the edited array. `head_writes` and
    `key_positions` are derived and cannot be edited. `lens.edits` has ready-made edits. Arrays bound to an edit by
    `jax.tree_util.Partial` are arguments of the compiled program: other values do not recompile it.

    Args:
        model: the model.
        params: its parameters.
        tokens_BT: token ids.
        cache: keys and values of earlier tokens. T then counts the new tokens, and q, k and v are those of the new
            tokens; S of scores and weights counts the slots of the cache and, after them, several new tokens.
        edits: what to change, by name.
        names: what to return; None returns everything. Other arrays are not computed.

    Returns:
        The arrays, in the order of `NAMES`; with a cache, also the cache that includes the new tokens.

    Raises:
        ValueError: an unknown name, an edit that returns another shape or dtype, or what `Decoder` refuses.
    """
    unknown = [name for name in names or () if name not in NAMES]
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r} to capture, only {', '.join(NAMES)}")
    check_shape(tokens_BT)
    tokens_BT = as_integers(check_tokens(tokens_BT, model.config.vocab_size or 0))
    chains = None if edits is None else {name: _as_partials(edit) for name, edit in edits.items()}
    wanted = tuple(NAMES) if names is None else tuple(names)
    activations, cache = _capture(model, wanted, params, tokens_BT, cache, chains)
    activations = {name: activations[name] for name in wanted}  # jit sorts a dict by name
    return activations if cache is None else (activations, cache)


def _as_partials(edits: Edit | Sequence[Edit]) -> tuple[Partial, ...]:
    """Edits as pytrees: a function is static, the arrays bound to it are arguments of the program."""
    chain = edits if isinstance(edits, Sequence) else (edits,)
    return tuple(edit if isinstance(edit, Partial) else Partial(edit) for edit in chain)


def _apply(chain: Sequence[Edit], array: jax.Array, layer: jax.Array) -> jax.Array:
    return functools.reduce(lambda changed, edit: edit(changed, layer), chain, array)


@functools.partial(jax.jit, static_argnames=("model", "names"))
def _capture(
    model: Decoder,
    names: tuple[str, ...],
    params: Any,
    tokens_BT: jax.Array,
    cache: KVCache | None,
    chains: dict[str, tuple[Partial, ...]] | None,
) -> tuple[Activations, KVCache | None]:
    edits = None if chains is None else {name: functools.partial(_apply, chain) for name, chain in chains.items()}
    result, sown = model.apply({"params": params}, tokens_BT, cache, edits=edits, mutable=["intermediates"])
    logits_BTV, cache = (result, None) if cache is None else result

    sown = without_tuples(sown["intermediates"])
    layers, attention = sown["layers"], sown["layers"]["attention"]
    found = {name: _stacked(name, attention[name]) for name in _IN_ATTENTION}
    for name in ("q", "k"):
        found[f"{name}_rotated"] = attention.get(f"{name}_rotated", found[name])
    for name in ("scores", "weights"):  # (L, B, K, G, T, S): heads that share keys are adjacent
        found[name] = found[name].reshape(*found[name].shape[:2], -1, *found[name].shape[-2:])
    L, _, S = found["key_positions"].shape
    found["key_positions"] = jnp.broadcast_to(found["key_positions"], (L, tokens_BT.shape[0], S))
    found |= {name: layers[name] for name in ("attention_write", "feed_forward_write", "residual")}
    found |= {"hidden": layers["feed_forward"]["hidden"], "embeddings": sown["embeddings"], "logits": logits_BTV}
    if "head_writes" in names:
        found["head_writes"] = _head_writes(model.config, params, found["heads"], attention["out"]["output"])
    return {name: found[name] for name in names}, cache


def without_tuples(sown: Any) -> Any:
    """Sown values without the tuples that `sow` appends to: every module is called once."""
    return jax.tree.map(lambda once: once[0], sown, is_leaf=lambda node: isinstance(node, tuple))


def _stacked(name: str, layers: Any) -> jax.Array:
    """An array with its layer axis; layers with fewer slots than others are padded."""
    if not isinstance(layers, tuple):
        return layers
    S = max(layer.shape[-1] for layer in layers)

    def padded(layer: jax.Array) -> jax.Array:
        widths = [(0, 0)] * (layer.ndim - 1) + [(0, S - layer.shape[-1])]
        return jnp.pad(layer, widths, constant_values=_PADDING[name])

    return jnp.stack([padded(layer) for layer in layers])


def _head_writes(config: ModelConfig, params: Any, heads_LBTNH: jax.Array, sum_LBTD: jax.Array) -> jax.Array:
    """head_writes_LBTND: each head through its rows of the output projection, in at least float32.

    They add up to `attention_write`, except for biases. `sum_LBTD` is the output of the projection, before any norm.
    """
    layers, dtype = stacked_layers(params), accumulation_dtype(heads_LBTNH.dtype)
    kernel_LNHD = layers["attention"]["out"]["kernel"].astype(dtype)
    writes_LBTND = jnp.einsum("LBTNH,LNHD->LBTND", heads_LBTNH.astype(dtype), kernel_LNHD)
    if config.norm_position in ("both", "output"):
        norm, params = functools.partial(through_norm, config), norm_params(layers, "attention_output_norm")
        writes_LBTND = jax.vmap(norm)(params, sum_LBTD.astype(dtype), writes_LBTND)
    return scaled(writes_LBTND, config.residual_scale)


def stacked_layers(params: Any) -> Any:
    """The parameters of all layers, each array with a leading layer axis; undoes `unstack_layers`."""
    layers = layers_of(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if isinstance(layers, tuple) else layers


def norm_params(params: Any, name: str) -> Any:
    """The parameters of a norm, of which there may be none."""
    return params.get(name, {})


def final_norm_params(config: ModelConfig, params: Any) -> Any:
    """The parameters of the last norm; None if there is no such norm."""
    return norm_params(params, "final_norm") if config.final_norm else None


def normalise(config: ModelConfig, params: Any, x_BTD: jax.Array) -> jax.Array:
    """Applies one of the model's norms; none if `params` is None."""
    if params is None:
        return x_BTD
    return norm_of(config).apply({"params": params}, x_BTD)  # type: ignore[return-value]


def through_norm(config: ModelConfig, params: Any, x_BTD: jax.Array, writes_BTND: jax.Array) -> jax.Array:
    """Applies a norm to summands of its input x, with the divisor of x; without the norm's bias.

    With the divisor fixed, also in derivatives, a norm is linear: it scales, and LayerNorm also subtracts the mean.
    There is no norm if `params` is None.
    """
    if params is None:
        return writes_BTND
    if config.norm == "layernorm":
        x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        writes_BTND = writes_BTND - writes_BTND.mean(-1, keepdims=True)
    inverse_BT1 = jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + config.norm_epsilon)
    writes_BTND = writes_BTND * jax.lax.stop_gradient(inverse_BT1)[..., None]
    return writes_BTND * params["scale"].astype(x_BTD.dtype)[None, None, None] if "scale" in params else writes_BTND
