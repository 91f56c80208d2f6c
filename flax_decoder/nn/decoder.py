"""Tokens to logits: embedding, a stack of blocks, a head."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_decoder.config import PLAIN_LAYER, Adapter, LayerKind, ModelConfig
from flax_decoder.nn.arguments import checked_arguments
from flax_decoder.nn.attention import SelfAttention
from flax_decoder.nn.axes import constrain, num_parts
from flax_decoder.nn.cache import KVCache, LayerKV
from flax_decoder.nn.call import Call, Edit
from flax_decoder.nn.embedding import look_up
from flax_decoder.nn.feed_forward import FeedForward
from flax_decoder.nn.kernels.choice import keeps_heads
from flax_decoder.nn.linear import project
from flax_decoder.nn.mask import document_starts
from flax_decoder.nn.norm import norm_of
from flax_decoder.nn.positions import sinusoidal
from flax_decoder.nn.precision import accumulation_dtype, add_parameter, in_own_precision, widened_to
from flax_decoder.nn.stack import (
    per_layer,
    period_of,
    periodic_scan,
    stack_where_alike,
    stacked_or_tuple,
    unrolled,
)

# Up to this many rows, the time of the logits is that of reading the head from memory; beyond, that of the product.
FEW_ROWS = 32
# What is kept of a block for its backward pass, by `remat`; "attention" is handled in `kernels/choice.py`.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # The products with parameters; those of queries with keys and of weights with values have batch axes.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "heads": keeps_heads,
}


class Block(nn.Module):
    """One layer: attention moves information between positions, the feed-forward network works on it at each."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, call: Call, kind: LayerKind, cached: LayerKV | None = None
    ) -> tuple[jax.Array, LayerKV | None]:
        """Adds the writes of this layer to the residual stream; see `SelfAttention` for the arguments."""
        config, record = self.config, call.hook(self)
        norm = functools.partial(norm_of, config)
        before = config.norm_position in ("pre", "both")
        after = config.norm_position in ("both", "output")
        dropout = nn.Dropout(config.dropout, deterministic=call.deterministic)

        input_BTD = norm(name="attention_norm")(x_BTD) if before else x_BTD
        h_BTD, cached = SelfAttention(config, name="attention")(input_BTD, call, kind, cached)
        h_BTD = norm(name="attention_output_norm")(h_BTD) if after else h_BTD
        h_BTD = scaled(h_BTD, config.residual_scale)
        attended_BTD = x_BTD + dropout(record("attention_write", h_BTD))
        if config.norm_position == "post":
            attended_BTD = norm(name="attention_norm")(attended_BTD)

        if not config.shared_norm:
            input_BTD = x_BTD if config.parallel_residual else attended_BTD
            input_BTD = norm(name="feed_forward_norm")(input_BTD) if before else input_BTD
        h_BTD = FeedForward(config, name="feed_forward")(input_BTD, call)
        h_BTD = norm(name="feed_forward_output_norm")(h_BTD) if after else h_BTD
        h_BTD = scaled(h_BTD, config.residual_scale)
        x_BTD = attended_BTD + dropout(record("feed_forward_write", h_BTD))
        if config.norm_position == "post":
            x_BTD = norm(name="feed_forward_norm")(x_BTD)
        return record("residual", constrain(x_BTD, "batch", "length", None)), cached


class Decoder(nn.Module):
    """A decoder-only transformer: each position predicts the token that comes next.

    The parameters of the blocks are stacked: each array under "layers" has a leading layer axis, whether the layers
    are scanned or unrolled.

    Attributes:
        config: the model; its `vocab_size` must be set.
        adapter: how the low-rank adapters in its params count, `config.lora.adapter`; None for params without any.
    """

    config: ModelConfig
    adapter: Adapter | None = None

    @nn.compact
    @in_own_precision
    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        num_tokens_B: jax.Array | None = None,
        last_only: bool = False,
        hidden_only: bool = False,
        deterministic: bool = True,
        edits: Mapping[str, Edit] | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Maps tokens to the logits of the tokens that follow them.

        Args:
            tokens_BT: token ids, integers of any dtype.
            cache: keys and values of the tokens before, from `empty_cache` or an earlier call.
            positions_BT: positions of the tokens, where they are not in order; not with a cache.
            segments_BT: documents of the tokens, any integers: a token sees its own document only, and positions count
                from 0 in each. Neighbours of one id are of one document, and an id that comes back later is another
                one. With positions_BT, tokens may lie in any order: all of one id are then one document, and its
                positions are those given. Not with a cache.
            num_tokens_B: with a cache, number of real tokens of each row; those behind them are padding.
            last_only: return the logits of the last real token only, (B, 1, V).
            hidden_only: return the input of `logits`, (B, T, D): for a loss that never holds T times V numbers.
            deterministic: False applies dropout and needs `rngs={"dropout": rng}`.
            edits: by name, what replaces a value on the way; see `lens.capture` for the names.

        Returns:
            logits_BTV in at least float32; with a cache, also the cache with these tokens in it.

        Raises:
            ValueError: ids outside the vocabulary or positions that do not exist (where they are known, that is outside
                of jit), more positions than learned ones, positions or segments beside a cache, a cache or params of
                another model, what is no array of integers or has another shape, float64 where JAX has it switched
                off, arrays split over explicit axes of a mesh, or an edit of a name that does not exist.
        """
        config = self.config
        tokens_BT, positions_BT, segments_BT, num_tokens_B = checked_arguments(
            *(config, self.variables.get("params", {}), tokens_BT, cache),
            *(positions_BT, segments_BT, num_tokens_B, edits),
        )
        call = self.make_call(tokens_BT, cache, positions_BT, segments_BT, num_tokens_B, deterministic, edits)
        normal = nn.initializers.normal(config.init_stddev)
        embedding_VD: jax.Array = self.param("embedding", normal, (config.vocab_size, config.embed_dim))
        x_BTD = self.embed(embedding_VD, tokens_BT, call)
        x_BTD = call.hook(self)("embeddings", constrain(x_BTD, "batch", "length", None))
        x_BTD = nn.Dropout(config.dropout, deterministic=deterministic)(x_BTD)

        x_BTD, layers = self.run_layers(x_BTD, call, cache)

        x_BCD = last_real(x_BTD, num_tokens_B) if last_only else x_BTD  # the C positions whose logits are wanted
        if config.final_norm:
            x_BCD = norm_of(config, "final_norm")(x_BCD)
        if not config.tied_head:
            self.param("head", normal, (config.embed_dim, config.vocab_size))
        if config.head_bias:
            self.param("head_bias", nn.initializers.zeros, (config.vocab_size,))
        result = x_BCD
        if not hidden_only:
            result = constrain(self.logits(x_BCD, is_generating=cache is not None), "batch", "length", "vocab")
            result = call.at_layer(config.num_layers - 1).edit("logits", result)
        if cache is None:
            return result
        num_read_B = tokens_BT.shape[1] if num_tokens_B is None else num_tokens_B
        return result, cache.replace(layers=layers, length_B=cache.length_B + num_read_B)

    def make_call(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None,
        positions_BT: jax.Array | None,
        segments_BT: jax.Array | None,
        num_tokens_B: jax.Array | None,
        deterministic: bool,
        edits: Mapping[str, Edit] | None,
    ) -> Call:
        """What this call gives to all layers alike; see `__call__` for the arguments."""
        # A fused kernel needs whole sequences in order. Parameters do not depend on it, so they are made without one.
        in_order = positions_BT is None and cache is None and num_parts("length") == 1 and not self.is_initializing()
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
            if segments_BT is not None:
                segments_BT = document_starts(segments_BT)
                positions_BT -= segments_BT
        call = Call(
            positions_BT,
            segments_BT,
            in_order=in_order,
            deterministic=deterministic,
            adapter=self.adapter._replace(dropout=0.0) if self.adapter and deterministic else self.adapter,
            records=self.is_mutable_collection("intermediates"),
            edits=edits,
        )
        if cache is None:
            return call
        return dataclasses.replace(
            call,
            positions_BT=cache.length_B[:, None] + positions_BT,
            end_B=None if num_tokens_B is None else cache.length_B + num_tokens_B,
            rollback_slots=cache.rollback_slots,
        )

    @in_own_precision
    def logits(self, x_BCD: jax.Array, *, is_generating: bool = False) -> jax.Array:
        """Returns logits_BCV, in at least float32, of the tokens that follow hidden states, after the final norm.

        By itself it is `model.apply({"params": head_params(params)}, x_BCD, method="logits")`.

        Args:
            x_BCD: hidden states, as `hidden_only` returns them; C of the T positions.
            is_generating: takes the product that is fastest for few positions without a gradient.
        """
        config = self.config
        head_DV: jax.Array
        if config.tied_head:
            head_DV = self.get_variable("params", "embedding").astype(config.dtype).T
        else:
            head_DV = self.get_variable("params", "head").astype(config.dtype)
        dtype = accumulation_dtype(x_BCD.dtype)
        num_rows = x_BCD.shape[0] * x_BCD.shape[1]  # in `jax.export` not always a number
        if config.tied_head and is_generating and isinstance(num_rows, int) and 1 < num_rows <= FEW_ROWS:
            # The same product the other way round: on CPU this reads a transposed matrix twice as fast for few rows.
            x_RD = x_BCD.reshape(-1, config.embed_dim)
            logits_BCV = jnp.dot(head_DV.T, x_RD.T, preferred_element_type=dtype).T.reshape(*x_BCD.shape[:2], -1)
        else:
            logits_BCV = project(x_BCD, head_DV, dtype)
        if config.head_bias:
            bias_V: jax.Array = self.get_variable("params", "head_bias").astype(config.dtype)
            logits_BCV += bias_V[None, None].astype(dtype)
        logits_BCV = scaled(logits_BCV, config.logit_scale)
        if config.logit_soft_cap is not None:
            logits_BCV = config.logit_soft_cap * jnp.tanh(logits_BCV / config.logit_soft_cap)
        return logits_BCV

    def embed(self, embedding_VD: jax.Array, tokens_BT: jax.Array, call: Call) -> jax.Array:
        """x_BTD: a vector for each token, and where the config says so, one for its position."""
        config = self.config
        # Each device looks up the columns it holds, for the tokens of its neighbours, too: neither the table nor its
        # gradient then has to travel, only vectors do.
        embedding_VD = constrain(widened_to(embedding_VD, config.dtype), "vocab", "embed")
        x_BTD = look_up(embedding_VD, constrain(tokens_BT, "copies", "length")).astype(config.dtype)
        x_BTD = constrain(x_BTD, "copies", "length", "embed")
        x_BTD = scaled(x_BTD, config.embed_scale)
        if config.embedding_norm:
            x_BTD = norm_of(config, "embedding_norm")(x_BTD)
        positions_BT = call.positions_BT
        if call.end_B is not None:
            # Padding may be beyond the learned positions, and NaN there would spread by attention.
            positions_BT = jnp.minimum(positions_BT, call.end_B[:, None] - 1)
        if config.positions == "learned":
            normal = nn.initializers.normal(config.init_stddev)
            positions_SD = self.param("positions", normal, (config.context_length, config.embed_dim))
            positions_SD = widened_to(positions_SD, config.dtype)
            if call.in_order and call.segments_BT is None:
                x_BTD = add_parameter(x_BTD, positions_SD[None, : tokens_BT.shape[1]])
            else:
                x_BTD = add_parameter(x_BTD, look_up(positions_SD, positions_BT))
        elif config.positions == "sinusoidal":
            dtype = accumulation_dtype(x_BTD.dtype)
            x_BTD += sinusoidal(positions_BT, config.embed_dim, dtype).astype(config.dtype)
        return x_BTD

    def run_layers(self, x_BTD: jax.Array, call: Call, cache: KVCache | None) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """Applies the blocks one after the other, each with its part of the stacked parameters and of the cache."""
        config = self.config
        block = Block(config, parent=None)
        if self.is_initializing():
            init_rngs_L = jax.random.split(self.make_rng("params"), config.num_layers)
            layers = jax.vmap(lambda rng: block.init(rng, x_BTD, call, PLAIN_LAYER)["params"])(init_rngs_L)
            self.put_variable("params", "layers", layers)
        has_dropout = not call.deterministic and max(config.dropout, call.adapter.dropout if call.adapter else 0) > 0
        rngs_L = jax.random.split(self.make_rng("dropout"), config.num_layers) if has_dropout else None
        indices_L = None if call.edits is None else jnp.arange(config.num_layers, dtype=jnp.int32)

        def layer(kind: LayerKind, x_BTD: jax.Array, layer_inputs: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            params, rng, index, cached = layer_inputs
            (x_BTD, cached), recorded = block.apply(
                {"params": params},
                *(x_BTD, call.at_layer(index), kind, cached),
                rngs=None if rng is None else {"dropout": rng},
                mutable=["intermediates"] if call.records else [],
            )
            return x_BTD, (cached, recorded.get("intermediates"))

        params = stacked_or_tuple(self.get_variable("params", "layers"), config.num_layers)
        # Layers may differ in the slots they have, and a loop over them would copy the cache at each token.
        is_scanned = config.scan_layers and cache is None and not isinstance(params, tuple)
        if config.remat in REMAT_POLICIES:
            # Unrolled, the compiler would merge the second computation with the first; inside a scan it cannot.
            prevent_cse = not (is_scanned and config.num_layers % period_of(config.layer_kinds) == 0)
            policy = REMAT_POLICIES[config.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=prevent_cse, static_argnums=0)
        if is_scanned:
            x_BTD, (_, recorded) = periodic_scan(layer, x_BTD, (params, rngs_L, indices_L, None), config.layer_kinds)
            cached_layers: tuple[LayerKV, ...] = ()
        else:
            stacked = params, rngs_L, indices_L, None if cache is None else cache.layers
            inputs = zip(*(per_layer(tree, config.num_layers) for tree in stacked), strict=True)
            x_BTD, results = unrolled(layer, x_BTD, inputs, config.layer_kinds)
            cached_layers, recorded_layers = zip(*results, strict=True)
            recorded = jax.tree.map(stack_where_alike, *recorded_layers)
        if call.records:
            self.put_variable("intermediates", "layers", recorded)
        return x_BTD, cached_layers


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a factor, without a product where that is 1."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def last_real(x_BTD: jax.Array, num_tokens_B: jax.Array | None) -> jax.Array:
    """x_B1D: of each row the last position that is not padding."""
    B, T, _ = x_BTD.shape
    last_B = jnp.full(B, T, jnp.int32) if num_tokens_B is None else num_tokens_B
    return jnp.take_along_axis(x_BTD, jnp.maximum(last_B - 1, 0)[:, None, None], axis=1)
