"""Which keys a query sees; and documents that share a row do not see each other, whatever computes attention."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_decoder.config import ModelConfig
from flax_decoder.nn.attention import dot_product_attention
from flax_decoder.nn.cache import empty_cache
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.kernels.blockwise import blockwise
from flax_decoder.nn.kernels.ring import find_ring
from flax_decoder.nn.kernels.ring_attention import ScoreParams, ring_attention
from flax_decoder.nn.kernels.splash import splash
from flax_decoder.nn.mask import MaskSpec, document_starts
from flax_decoder.parallel.mesh import mesh_of, use_mesh
from flax_decoder.parallel.zigzag import zigzag

V, B = 23, 2
MODEL = {
    **{"vocab_size": V, "context_length": 144, "num_layers": 2, "embed_dim": 12, "num_heads": 4, "num_kv_heads": 2},
    **{"mlp_dim": 7, "head_dim": 6},
}
# Lengths of documents in a row: one token, a border at a block's border (64), and a document across two.
LENGTHS = [[1, 63, 80], [64, 80]]
IDS = [[-4, 5, -4], [7, 2]]  # in no order, and one comes back: another document
SEGMENTS_BT = np.stack([np.repeat(ids, row) for ids, row in zip(IDS, LENGTHS, strict=True)]).astype(np.int32)
POSITIONS_BT = np.stack([np.concatenate([np.arange(length) for length in row]) for row in LENGTHS]).astype(np.int32)
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


def test_a_document_begins_where_the_id_changes():
    expected = np.arange(144) - POSITIONS_BT
    np.testing.assert_array_equal(document_starts(jnp.asarray(SEGMENTS_BT)), expected)
    assert document_starts(jnp.asarray([[3, 3, 1, 3, 3]])).tolist() == [[0, 0, 2, 3, 3]]


@pytest.mark.parametrize(
    ("queries", "keys", "expected"), [((2, 4), (5, 9), False), ((5, 9), (2, 4), False), ((2, 5), (5, 9), True)]
)
def test_blocks_of_other_documents_are_not_computed(queries, keys, expected):
    """Their positions alone would allow it."""
    positions_1T = jnp.asarray([[0, 1]])
    segments = (jnp.asarray([ids]) for ids in (queries, keys))
    assert MaskSpec(positions_1T, positions_1T, None, None, *segments).any_visible() == expected


def test_each_pair_of_blocks_drops_weights_of_its_own():
    """Positions count anew in each document, so many pairs have the same."""
    starts_1T = jnp.repeat(jnp.arange(0, 12, 3), 3)[None]
    positions_1T = jnp.arange(12)[None] - starts_1T
    mask = MaskSpec(positions_1T, positions_1T, None, None, starts_1T, starts_1T)
    params = ScoreParams(1.0, None, 0.5, 3)

    @jax.jit
    def drop(mask):
        return params.drop(jax.random.key(0), mask, jnp.ones((1, 1, 4, 3, 3)))

    pairs = [mask.block(slice(i, i + 3), slice(i, i + 3)) for i in range(0, 12, 3)]
    assert len({np.asarray(drop(pair)).tobytes() for pair in pairs}) == len(pairs)


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
    for row, lengths in enumerate(LENGTHS):
        parts = []
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            its = np.s_[row : row + 1, end - length : end]
            found = logits_and_gradients(config, TOKENS_BT[its], WEIGHTS_BTV[its])
            parts.append(found[0][0])
            total = found[1] if total is None else jax.tree.map(jnp.add, total, found[1])
        logits.append(jnp.concatenate(parts))
    return jnp.stack(logits), total


WEIGHTS_BTV = np.random.default_rng(1).standard_normal((*TOKENS_BT.shape, V)).astype(np.float32)
WINDOWED = {"positions": "alibi", "window": 20}


@pytest.mark.short("blockwise-rotary", "zigzag-rotary")
@pytest.mark.parametrize(
    "settings",
    [{"positions": "rotary"}, {"positions": "learned"}, WINDOWED],
    ids=["rotary", "learned", "alibi, window"],
)
@pytest.mark.parametrize("attention", ["reference", "blockwise", "splash", "ring", "zigzag"])
def test_a_document_is_as_if_it_were_alone(attention, settings):
    if attention == "splash" and settings is WINDOWED:
        settings = {"positions": "none", "window": 20}  # the kernel adds no bias
    expected = each_alone(**settings)
    arguments = TOKENS_BT, WEIGHTS_BTV
    if attention in ("ring", "zigzag"):
        config = ModelConfig(**MODEL, **settings)
        documents = {"segments_BT": SEGMENTS_BT}
        if attention == "zigzag":
            order_T = zigzag(144, 4)
            documents = {"segments_BT": np.arange(144) - POSITIONS_BT, "positions_BT": POSITIONS_BT}
            arguments = (array[:, order_T] for array in arguments)
            documents = {name: array[:, order_T] for name, array in documents.items()}
            expected = expected[0][:, order_T], expected[1]
        with use_mesh(mesh_of(jax.devices()[:4], context=4)):
            found = logits_and_gradients(config, *arguments, **documents)
    else:
        config = ModelConfig(**MODEL, **settings, attention=attention)
        with jax.numpy_dtype_promotion("standard"):
            found = logits_and_gradients(config, *arguments, segments_BT=SEGMENTS_BT)
    np.testing.assert_allclose(found[0], expected[0], atol=TOLERANCE)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE * float(jnp.abs(other).max()))


@pytest.mark.short("reference")
@pytest.mark.parametrize(
    ("attention", "settings"),
    [
        ("reference", {"positions": "rotary"}),
        ("reference", {"positions": "learned", "scan_layers": True, "remat": "full", "qk_norm": "head"}),
        ("blockwise", {"positions": "alibi", "remat": "attention"}),
        ("splash", {"positions": "sinusoidal", "window": 20}),
        ("ring", {"positions": "rotary", "window": 70, "scan_layers": True}),
    ],
    ids=["reference", "scanned", "blockwise", "splash", "ring"],
)
def test_neighbours_change_no_bit(attention, settings):
    """Of the logits of a document and of the gradients of its own loss, whatever tokens the other documents have."""
    is_ring = attention == "ring"
    config = ModelConfig(**MODEL, **settings, attention="reference" if is_ring else attention)
    devices = use_mesh(mesh_of(jax.devices()[:4], context=4)) if is_ring else contextlib.nullcontext()
    starts_BT = np.arange(144) - POSITIONS_BT
    kept_BT = starts_BT == starts_BT[:, 70:71]
    other_BT = np.where(kept_BT, TOKENS_BT, (TOKENS_BT + 1) % V)
    model = Decoder(config)
    params = reference.random_params(model)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def compute(params, tokens_BT, segments_BT):
        logits_BTV = model.apply({"params": params}, tokens_BT, segments_BT=segments_BT)
        return (logits_BTV * WEIGHTS_BTV * kept_BT[:, :, None]).sum(), logits_BTV

    with jax.numpy_dtype_promotion("standard"), devices:
        gradients, logits_BTV = compute(params, TOKENS_BT, SEGMENTS_BT)
        others, other_logits_BTV = compute(params, other_BT, SEGMENTS_BT)
        together, _ = compute(params, other_BT, np.zeros_like(SEGMENTS_BT))
    np.testing.assert_array_equal(logits_BTV[kept_BT], other_logits_BTV[kept_BT])
    assert (logits_BTV[~kept_BT] != other_logits_BTV[~kept_BT]).any()
    jax.tree.map(np.testing.assert_array_equal, gradients, others)
    assert (
        together["layers"]["attention"]["query"]["kernel"] != others["layers"]["attention"]["query"]["kernel"]
    ).any()


@pytest.mark.full
@pytest.mark.parametrize("attention", ["reference", "blockwise", "splash", "ring", "zigzag"])
def test_200_random_segmentations_against_loops(attention, monkeypatch):
    """Heads by plain loops over each document; gradients as the reference has them, which the loops have not."""
    monkeypatch.setattr("flax_decoder.nn.kernels.blockwise.QUERIES_PER_BLOCK", 5)
    rng = np.random.default_rng(3)
    num_rows, T, N, K, H, C = 200, 24, 2, 1, 4, 4
    window, slopes_N = (7, None) if attention == "splash" else (None, np.asarray([0.3, 0.02], np.float32))
    is_border_BT = rng.random((num_rows, T)) < rng.random((num_rows, 1))
    segments_BT = np.maximum.accumulate(np.where(is_border_BT, np.arange(T), 0), axis=1) % 5  # ids come back
    starts_BT = document_starts(jnp.asarray(segments_BT, jnp.int32))
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None] - starts_BT
    qkv = [rng.standard_normal((num_rows, T, heads, H)).astype(np.float32) for heads in (N, K, K)]
    dheads_BTNH = rng.standard_normal(qkv[0].shape).astype(np.float32)

    def heads_and_gradients(attend, arrays, positions_BT, starts_BT):
        mask = MaskSpec(positions_BT, positions_BT, slopes_N, window, starts_BT, starts_BT)

        def run(q_BTNH, k_BSKH, v_BSKH, dheads_BTNH):
            heads_BTNH, pull = jax.vjp(lambda *qkv: attend(*qkv, mask), q_BTNH, k_BSKH, v_BSKH)
            return heads_BTNH, *pull(dheads_BTNH)

        return jax.jit(run)(*arrays)

    arrays = *qkv, dheads_BTNH
    expected = heads_and_gradients(dot_product_attention, arrays, positions_BT, starts_BT)
    for row in range(num_rows):
        for start in np.unique(starts_BT[row]):
            its_T = np.asarray(starts_BT[row]) == start
            alone = reference.attention(*(array[row, its_T] for array in qkv), window, slopes_N)
            np.testing.assert_allclose(expected[0][row, its_T], alone, atol=1e-6)
    if attention in ("ring", "zigzag"):
        order_T = zigzag(T, C) if attention == "zigzag" else np.arange(T)
        moved = ([array[:, order_T] for array in arrays], positions_BT[:, order_T], starts_BT[:, order_T])
        with use_mesh(mesh_of(jax.devices()[:C], context=C)):
            ring = find_ring(qkv[0].shape, qkv[1].shape)
            found = heads_and_gradients(functools.partial(ring_attention, ring, max_tokens=2), *moved)
        found = [array[:, np.argsort(order_T)] for array in found]
    else:
        attend = {
            "reference": dot_product_attention,
            "blockwise": functools.partial(blockwise, dot_product_attention),
            "splash": splash,
        }[attention]
        with jax.numpy_dtype_promotion("standard"):
            found = heads_and_gradients(attend, arrays, positions_BT, starts_BT)
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(here, there, atol=1e-6 * max(1, np.abs(there).max()), rtol=0)


def test_documents_do_not_go_with_a_cache():
    model = Decoder(ModelConfig(**MODEL))
    params = reference.random_params(model)
    with pytest.raises(ValueError, match="one document per row"):
        model.apply({"params": params}, TOKENS_BT, empty_cache(model.config, B, 144), segments_BT=SEGMENTS_BT)
    with pytest.raises(ValueError, match=r"segments_BT has the shape \(144,\), but must have \(2, 144\)"):
        model.apply({"params": params}, TOKENS_BT, segments_BT=SEGMENTS_BT[0])
