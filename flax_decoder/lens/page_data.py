"""The data of the lens page: arrays from one compiled program, and the texts of tokens."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import UserError
from flax_decoder.lens.attribution import attribute_activations, score_scale
from flax_decoder.lens.capture import capture, final_norm_params, normalise
from flax_decoder.lens.head_scores import head_scores
from flax_decoder.lens.origins import ORIGINS, query_and_key_origins
from flax_decoder.lens.packing import pack
from flax_decoder.lens.pushes import pushes
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import head_params
from flax_decoder.nn.positions import alibi_slopes
from flax_decoder.nn.precision import accumulation_dtype

if TYPE_CHECKING:
    from flax_decoder.lens.history import History

NUM_GUESSES = 10  # likeliest next tokens, after each layer
NUM_PUSHED = 4  # tokens whose logits a head raises most, and as many that it lowers most
# The tokens considered for that: all of a vocabulary up to this size, those on the page of a larger one.
SMALL_VOCABULARY = 1024
SCORES = ("previous_token", "first_token", "induction", "same_token")  # in the order of heads.js
NO_SCORE = -1.0  # in place of NaN, which JSON does not have
# Decimals, and maximal bits per number, of large arrays: 5 MB in all for 12 layers of 12 heads and 64 tokens.
LARGE = {
    "q": (4, 11.0),
    "k": (4, 11.0),
    "v": (4, 8.5),
    "scores": (4, 16.0),
    "part_sources": (4, 6.5),
    "pairs": (4, 10.0),
    "history_weights": (3, 8.0),
}
PAIR_NUMBERS = 600_000  # pairs of origins; of more, those of the keys that a query attends to most
HISTORY_NUMBERS = 4_000_000  # attention weights of a history; of more, every few snapshots are shown


def page_data(
    model: Decoder, params: Any, tokenizer: Tokenizer | None, tokens_T: np.ndarray, history: "History | None"
) -> dict[str, Any]:
    """The data of the page as JSON values; `lens.js` reads it.

    Computed in float32 even if the model's dtype is bfloat16.

    Raises:
        UserError: some of the model's numbers are not finite.
    """
    dtype = accumulation_dtype(model.config.dtype)
    # Scanned layers compile in the same time however many there are. The parameters are the same.
    settings: dict[str, Any] = {"dtype": dtype.name, "attention": "reference", "remat": "none", "scan_layers": True}
    config = dataclasses.replace(model.config, **settings)
    tokens_BT = jnp.asarray(tokens_T)[None]
    # Ids that the tokenizer lacks are padding of the vocabulary, which is not ranked.
    num_ids = min(config.vocab_size or 0, config.vocab_size or 0 if tokenizer is None else tokenizer.vocab_size)
    # By default, TPUs and GPUs round the factors of float32 products.
    with jax.default_matmul_precision("highest"):
        arrays = {name: np.asarray(array) for name, array in _compiled()(config, num_ids, params, tokens_BT).items()}
    if not all(np.isfinite(array).all() for name, array in arrays.items() if name != "head_scores"):
        raise UserError("the model's numbers for this prompt are not finite: there is nothing to show")
    num_candidates = int(arrays.pop("num_candidates"))
    arrays["head_scores"] = np.nan_to_num(arrays["head_scores"], nan=NO_SCORE)
    ids = [tokens_T, *(arrays[name] for name in ("targets", "guess_tokens", "push_tokens"))]
    history_facts = None
    if history is not None:
        history = _thinned(history)
        arrays |= _history_arrays(history)
        history_facts = {"steps": history.steps_M.tolist(), "tokens": history.tokens_T.tolist()}
        ids.append(history.tokens_T)
    packed = {name: _pack(name, array) for name, array in arrays.items()}
    return {
        "model": _facts(config, params, packed)
        | {"num_candidates": num_candidates, "pushes_all": num_ids <= SMALL_VOCABULARY},
        "tokens": tokens_T.tolist(),
        "texts": token_texts(tokenizer, np.unique(np.concatenate([part.ravel() for part in ids])), tokens_T),
        "history": history_facts,
        "arrays": packed,
    }


def _pack(name: str, array: np.ndarray) -> dict[str, Any]:
    return pack(array, 0) if array.dtype.kind in "iu" else pack(array, *LARGE.get(name, (5,)))


def _facts(config: ModelConfig, params: Any, packed: dict[str, Any]) -> dict[str, Any]:
    """The properties of the model that the page shows or computes with."""
    names = ("num_layers", "num_heads", "embed_dim", "vocab_size", "positions", "qk_norm", "logit_soft_cap")
    return {name: getattr(config, name) for name in names} | {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_width,
        "num_params": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)),
        "scale": score_scale(config),
        "soft_cap": config.attention_soft_cap,
        "slopes": alibi_slopes(config.num_heads).tolist() if config.positions == "alibi" else None,
        "windows": config.windows,
        "has_position_vectors": config.positions in ("learned", "sinusoidal"),
        "has_biases": config.norm_bias or config.attention_out_bias,
        "origins": [ORIGINS[number] for number in _origins_of(config)],
        "norm_position": config.norm_position,
        "has_query_bias": config.attention_in_bias,
        "has_out_bias": config.attention_out_bias,
        "digits": {name: min(packed[name]["decimals"], 3) for name in ("q", "k", "v")},
    }


def token_texts(tokenizer: Tokenizer | None, ids: np.ndarray, tokens_T: np.ndarray) -> dict[int, str]:
    """The text of each token id.

    A token is decoded after one of the prompt, because some tokenizers strip a space from the beginning of a text.
    """
    if tokenizer is None:
        return {token: f"#{token}" for token in ids.tolist()}
    size = tokenizer.vocab_size  # the model's may be larger
    anchor = [token for token in tokens_T.tolist() if token < size][-1:]
    before = tokenizer.decode(anchor)
    texts = {}
    for token in ids.tolist():
        if token >= size:
            texts[token] = f"<id {token}>"
            continue
        text = tokenizer.decode([*anchor, token])
        # Half a character before it, as in byte-level vocabularies, would change how the token is decoded.
        is_appended = text.startswith(before) and "\N{REPLACEMENT CHARACTER}" not in before
        texts[token] = text[len(before) :] if is_appended else tokenizer.decode([token])
    return texts


@functools.cache
def _compiled() -> Any:
    """`_arrays`, compiled; on CPU without optimization: it runs once, and compiling takes longer than running."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(_arrays, static_argnums=(0, 1), compiler_options=quick)


def _arrays(config: ModelConfig, num_ids: int, params: Any, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    """The arrays of the page for one text; of T x S, only the lower triangle. Ids from `num_ids` on are padding."""
    model = Decoder(config)
    activations = capture(model, params, tokens_BT)
    T = tokens_BT.shape[1]
    rows, columns = np.tril_indices(T)
    streams_MTD = jnp.concatenate([activations["embeddings"], activations["residual"][:, 0]])
    likeliest = jax.lax.top_k(activations["logits"][..., :num_ids], min(2, num_ids))[1]
    first_BT, second_BT = likeliest[..., 0], likeliest[..., -1]
    # The second target is the next token; if there is none, or it is the likeliest one, the second likeliest.
    next_BT = jnp.concatenate([tokens_BT[:, 1:], second_BT[:, -1:]], axis=1)
    second_BT = jnp.where(next_BT == first_BT, second_BT, next_BT)
    targets = jnp.stack([first_BT, second_BT])
    both = jax.vmap(lambda targets_BT: attribute_activations(config, params, activations, tokens_BT, targets_BT))(
        targets
    )
    # The page derives from the windows which scores are masked.
    scores_LBNTS = jnp.where(jnp.isneginf(activations["scores"]), 0.0, activations["scores"])
    guess_tokens, guess_shares = _guesses(model, params, streams_MTD, num_ids)
    candidates_BC = _candidates(num_ids, jnp.concatenate([guess_tokens[-1].ravel(), second_BT[0], tokens_BT[0]]))
    num_pushed = min(NUM_PUSHED, num_ids)
    pair_sources, pairs = _pairs(config, params, activations, tokens_BT)
    push_indices, push_values = pushes(config, params, activations, candidates_BC, num_pushed)
    return {
        "q": activations["q_rotated"][:, 0].swapaxes(1, 2),
        "k": activations["k_rotated"][:, 0].swapaxes(1, 2),
        "v": activations["v"][:, 0].swapaxes(1, 2),
        "scores": scores_LBNTS[:, 0][..., rows, columns],
        "pair_sources": pair_sources,
        "pairs": pairs,
        "targets": targets[:, 0],
        "part_token": both.token_BT[:, 0],
        "part_position": both.position_BT[:, 0],
        "part_heads": both.heads_LBNTS[:, :, 0].sum(-1),
        "part_sources": both.heads_LBNTS[:, :, 0][..., rows, columns],
        "part_feed_forward": both.feed_forward_LBT[:, :, 0],
        "part_bias": both.bias_BT[:, 0],
        "part_soft_cap": both.soft_cap_BT[:, 0],
        "part_logit": both.logit_BT[:, 0],
        "head_scores": _head_scores(activations["weights"], tokens_BT),
        "guess_tokens": guess_tokens,
        "guess_shares": guess_shares,
        "push_tokens": candidates_BC[0][push_indices],
        "push_values": push_values,
        "num_candidates": (candidates_BC >= 0).sum(),
    }


def _origins_of(config: ModelConfig) -> list[int]:
    """The origins that queries and keys of this model have, as places in `ORIGINS`."""
    has_biases = config.norm_bias or config.attention_in_bias or config.attention_out_bias
    is_absent = {"position": config.positions not in ("learned", "sinusoidal"), "bias": not has_biases}
    return [number for number, name in enumerate(ORIGINS) if not is_absent.get(name)]


def _pairs(config: ModelConfig, params: Any, activations: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each pair of origins gives to scores, for the R sources that a query attends to most.

    Returns:
        The sources, (L, N, T, R), and the contributions, (L, N, T, R, O, O); masked ones are 0.
    """
    L, _, N, T, _ = activations["weights"].shape
    chosen = jnp.array(_origins_of(config))
    R = min(T, max(PAIR_NUMBERS // (L * N * T * len(chosen) ** 2), 1))
    q_LBTONH, k_LBSOKH = query_and_key_origins(config, params, tokens_BT, activations)

    def of_layer(layer: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q_TONH, k_SOKH, weights_NTS = layer
        k_SONH = jnp.repeat(k_SOKH, N // config.kv_heads, axis=2)
        pairs_NTSOO = jnp.einsum("TONH,SPNH->NTSOP", q_TONH, k_SONH) * score_scale(config)
        largest_NTR, sources_NTR = jax.lax.top_k(weights_NTS, R)
        pairs_NTROO = jnp.take_along_axis(pairs_NTSOO, sources_NTR[..., None, None], axis=2)
        return sources_NTR, jnp.where(largest_NTR[..., None, None] > 0, pairs_NTROO, 0.0)

    q_LTONH, k_LSOKH = q_LBTONH[:, 0][:, :, chosen], k_LBSOKH[:, 0][:, :, chosen]
    sources_LNTR, pairs_LNTROO = jax.lax.map(of_layer, (q_LTONH, k_LSOKH, activations["weights"][:, 0]))
    return sources_LNTR, pairs_LNTROO


def _candidates(num_ids: int, tokens: jax.Array) -> jax.Array:
    """The candidates for `pushes`, (1, C): the whole vocabulary, or if it is large these tokens, padded with -1."""
    if num_ids <= SMALL_VOCABULARY:
        return jnp.arange(num_ids, dtype=jnp.int32)[None]
    tokens = jnp.where(tokens < num_ids, tokens, tokens[0])  # a prompt may have others; the first is a guess
    return jnp.unique(tokens, size=tokens.size, fill_value=-1).astype(jnp.int32)[None]


def _guesses(model: Decoder, params: Any, streams_MTD: jax.Array, num_ids: int) -> tuple[jax.Array, jax.Array]:
    """The logit lens: the likeliest next tokens after each layer and their probabilities, (M, T, NUM_GUESSES)."""

    def guess(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        normed_BTD = normalise(model.config, final_norm_params(model.config, params), x_TD[None])
        logits_BTV: Any = model.apply({"params": head_params(params)}, normed_BTD, method="logits")
        shares, tokens = jax.lax.top_k(jax.nn.softmax(logits_BTV[0])[:, :num_ids], min(NUM_GUESSES, num_ids))
        return tokens, shares

    tokens, shares = jax.lax.map(guess, streams_MTD)
    return tokens, shares


def _thinned(history: "History") -> "History":
    """The snapshots of a history that fit the page, evenly spaced, with the first and the last."""
    M, L, N, T, _ = history.weights_MLNTS.shape
    count = min(M, max(HISTORY_NUMBERS // (L * N * T * (T + 1) // 2), 2))
    kept = np.unique(np.linspace(0, M - 1, count).round().astype(int))
    names = ("steps_M", "q_MLTNH", "k_MLTKH", "weights_MLNTS")
    return dataclasses.replace(history, **{name: getattr(history, name)[kept] for name in names})


def _history_arrays(history: "History") -> dict[str, np.ndarray]:
    """The attention weights of each snapshot, as triangles, and the head scores."""
    weights_MLNTS = history.weights_MLNTS.astype(np.float32)
    M, L, N, T, _ = weights_MLNTS.shape
    rows, columns = np.tril_indices(T)
    # The layers of all snapshots as one batch of M * L layers.
    found = jax.jit(_head_scores)(weights_MLNTS.reshape(M * L, 1, N, T, T), jnp.asarray(history.tokens_T)[None])
    scores = np.nan_to_num(np.asarray(found), nan=NO_SCORE).reshape(len(SCORES), M, L, N)
    return {"history_weights": weights_MLNTS[..., rows, columns], "history_scores": scores.swapaxes(0, 1)}


def _head_scores(weights_LBNTS: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """`head_scores`, stacked in the order of SCORES."""
    found = head_scores(weights_LBNTS, tokens_BT)
    return jnp.stack([found[name] for name in SCORES])
