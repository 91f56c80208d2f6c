"""Which keys a query sees; and documents that share a row do not see each other, whatever computes attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_decoder.config import ModelConfig
from flax_decoder.nn.cache import empty_cache
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.mask import MaskSpec, positions_in_segments
from flax_decoder.parallel.mesh import mesh_of, use_mesh

V, B = 23, 2
MODEL = {
    **{"vocab_size": V, "context_length": 144, "num_layers": 2, "embed_dim": 12, "num_heads": 4, "num_kv_heads": 2},
    **{"mlp_dim": 7, "head_dim": 6},
}
# Lengths of documents in a row: one token, a border at a block's border (64), and a document across two.
LENGTHS = [[1, 63, 80], [64, 80]]
SEGMENTS_BT = np.stack([np.repeat(np.arange(len(row)) * 3 - 4, row) for row in LENGTHS]).astype(np.int32)
TOKENS_BT = np.random.default_rng(0).integers(0, V, SEGMENTS_BT.shape).astype(np.int32)

# float32 rounds at 6e-8; logits of order 1 after two layers.
TOLERANCE = 1e-5


def picture(mask):
    return ["".join("#" if sees else "." for sees in row_S) for row_S in np.asarray(mask.visible_BTS())[0]]


def test_a_mask_as_a_picture():
    positions_1T = jnp.arange(6)[None]
    segments_1T = jnp.asarray([[7, 7, 7, 7, 0, 0]])
    assert picture(
        MaskSpec(positions_1T, positions_1T, window=3, segments_BT=segments_1T, key_segments_BS=segments_1T)
    ) == [
        "#.....",
        "##....",
        "###...",
        ".###..",
        "....#.",
        "....##",
    ]
    slots_1S = jnp.asarray([[4, -3, 2, 3]])  # of a cache that rolls, one of them empty
    assert picture(MaskSpec(jnp.asarray([[3, 4]]), slots_1S)) == ["..##", "#.##"]


def test_positions_count_from_0_in_each_document():
    expected = [np.concatenate([np.arange(length) for length in row]) for row in LENGTHS]
    np.testing.assert_array_equal(positions_in_segments(jnp.asarray(SEGMENTS_BT)), expected)


def logits_and_gradients(config, tokens_BT, weights_BTV, **arguments):
    model = Decoder(config)
    params = reference.random_params(Decoder(dataclasses.replace(config, attention="reference", scan_layers=False)))

    def weighted(params):
        logits_BTV = model.apply({"params": params}, tokens_BT, **arguments)
        return (logits_BTV * weights_BTV).sum(), logits_BTV

    gradients, logits_BTV = jax.jit(jax.grad(weighted, has_aux=True))(params)
    return logits_BTV, gradients


@functools.cache
def each_alone(**settings):
    """Logits of each document by itself, and the sum of the gradients."""
    config = ModelConfig(**MODEL, **settings, attention="reference")
    logits, total = [], None
    for row, (tokens_T, segments_T) in enumerate(zip(TOKENS_BT, SEGMENTS_BT, strict=True)):
        parts = []
        for segment in dict.fromkeys(segments_T.tolist()):
            is_its_T = segments_T == segment
            found = logits_and_gradients(config, tokens_T[None, is_its_T], WEIGHTS_BTV[row, is_its_T][None])
            parts.append(found[0][0])
            total = found[1] if total is None else jax.tree.map(jnp.add, total, found[1])
        logits.append(jnp.concatenate(parts))
    return jnp.stack(logits), total


WEIGHTS_BTV = np.random.default_rng(1).standard_normal((*TOKENS_BT.shape, V)).astype(np.float32)
WINDOWED = {"positions": "alibi", "window": 20}


@pytest.mark.short("blockwise-rotary", "ring-rotary")
@pytest.mark.parametrize(
    "settings",
    [{"positions": "rotary"}, {"positions": "learned"}, WINDOWED],
    ids=["rotary", "learned", "alibi, window"],
)
@pytest.mark.parametrize("attention", ["reference", "blockwise", "splash", "ring"])
def test_a_document_is_as_if_it_were_alone(attention, settings):
    if attention == "splash" and settings is WINDOWED:
        settings = {"positions": "none", "window": 20}  # the kernel adds no bias
    expected = each_alone(**settings)
    arguments = TOKENS_BT, WEIGHTS_BTV
    if attention == "ring":
        config = ModelConfig(**MODEL, **settings)
        with use_mesh(mesh_of(jax.devices()[:4], context=4)):
            found = logits_and_gradients(config, *arguments, segments_BT=SEGMENTS_BT)
    else:
        config = ModelConfig(**MODEL, **settings, attention=attention)
        with jax.numpy_dtype_promotion("standard"):
            found = logits_and_gradients(config, *arguments, segments_BT=SEGMENTS_BT)
    np.testing.assert_allclose(found[0], expected[0], atol=TOLERANCE)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE * float(jnp.abs(other).max()))


def test_neighbours_change_no_bit():
    config = ModelConfig(**MODEL, positions="rotary", attention="reference")
    other_BT = np.where(SEGMENTS_BT == SEGMENTS_BT[:, 70:71], TOKENS_BT, (TOKENS_BT + 1) % V)
    model = Decoder(config)
    apply = jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT, segments_BT=SEGMENTS_BT))
    params = reference.random_params(model)
    kept_BT = SEGMENTS_BT == SEGMENTS_BT[:, 70:71]
    one, two = (np.asarray(apply(params, tokens_BT)) for tokens_BT in (TOKENS_BT, other_BT))
    np.testing.assert_array_equal(one[kept_BT], two[kept_BT])
    assert (one[~kept_BT] != two[~kept_BT]).any()


def test_documents_do_not_go_with_a_cache():
    model = Decoder(ModelConfig(**MODEL))
    params = reference.random_params(model)
    with pytest.raises(ValueError, match="one document per row"):
        model.apply({"params": params}, TOKENS_BT, empty_cache(model.config, B, 144), segments_BT=SEGMENTS_BT)
    with pytest.raises(ValueError, match=r"segments_BT has the shape \(144,\), but must have \(2, 144\)"):
        model.apply({"params": params}, TOKENS_BT, segments_BT=SEGMENTS_BT[0])
