"""Captured activations are what their names say, in every architecture; recording costs nothing if it is not used."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import shape_names
from flax import linen as nn
from test_decoder import CHOICES, SIZES, TOKENS_BT, TOLERANCE, B, T, V, make

import flax_decoder as fd
from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.folder import write_folder
from flax_decoder.lens.capture import NAMES, capture
from flax_decoder.nn.call import Call

close = functools.partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=1e-5)


@functools.cache
def captured(name):
    """A model of that architecture, its parameters, and its activations in float64."""
    model, params = make(**CHOICES[name])
    with shape_names.checked_shape_names():
        seen = capture(model, params, TOKENS_BT)
    return model, params, {name: np.float64(array) for name, array in seen.items()}


@pytest.mark.short("default", "gpt2", "neox", "gemma", "sloped window")
@pytest.mark.parametrize("name", CHOICES)
def test_every_array_has_its_axes_and_follows_from_the_others(name):
    model, params, seen = captured(name)
    config = model.config
    sizes = {"B": B, "T": T, "S": T, "V": V, "L": config.num_layers, "D": config.embed_dim, "N": config.num_heads}
    sizes |= {"K": config.kv_heads, "H": config.head_width, "F": config.mlp_width}
    assert list(seen) == list(NAMES)
    for array, axes in zip(seen.values(), NAMES.values(), strict=True):
        assert array.shape == tuple(sizes[axis] for axis in axes)

    G = config.num_heads // config.kv_heads
    k_LBSNH, v_LBSNH = (np.repeat(seen[key], G, axis=3) for key in ("k_rotated", "v"))
    scores_LBNTS = np.einsum("LBTNH,LBSNH->LBNTS", seen["q_rotated"], k_LBSNH)
    scores_LBNTS *= config.attention_scale or config.head_width**-0.5
    if config.attention_soft_cap is not None:
        scores_LBNTS = config.attention_soft_cap * np.tanh(scores_LBNTS / config.attention_soft_cap)
    if config.positions == "alibi":
        distance_TS = np.arange(T)[:, None] - np.arange(T)
        scores_LBNTS = scores_LBNTS - np.array(reference.alibi_slopes(config.num_heads))[:, None, None] * distance_TS
    for layer, window in enumerate(config.windows):
        sees_TS = np.array([[reference.sees(t, s, window) for s in range(T)] for t in range(T)])
        close(seen["scores"][layer], np.where(sees_TS, scores_LBNTS[layer], -np.inf))
    close(seen["weights"], jax.nn.softmax(seen["scores"], axis=-1))
    close(seen["heads"], np.einsum("LBNTS,LBSNH->LBTNH", seen["weights"], v_LBSNH))
    assert (seen["key_positions"] == np.arange(T)).all()

    own = reference.map_leaves(np.float64, params)["layers"]
    if config.norm_position in ("both", "output"):
        for layer in range(config.num_layers):
            norm = reference.map_leaves(lambda leaf, layer=layer: leaf[layer], own["attention_output_norm"])
            summed_BTD = np.einsum("BTNH,NHD->BTD", seen["heads"][layer], own["attention"]["out"]["kernel"][layer])
            for b, t in np.ndindex(B, T):
                close(seen["attention_write"][layer, b, t], reference.norm(summed_BTD[b, t], norm, config))
        close(seen["head_writes"].sum(3), seen["attention_write"])
    else:
        bias_LD = own["attention"]["out"].get("bias", np.zeros((config.num_layers, config.embed_dim)))
        close(seen["head_writes"].sum(3) + bias_LD[:, None, None], seen["attention_write"])
    before_LBTD = np.concatenate([seen["embeddings"][None], seen["residual"][:-1]])
    if config.norm_position != "post":
        close(before_LBTD + seen["attention_write"] + seen["feed_forward_write"], seen["residual"])
    down = {name: leaf[:, None, None] for name, leaf in own["feed_forward"]["down"].items()}
    written_LBTD = np.einsum("LBTF,LFD->LBTD", seen["hidden"], own["feed_forward"]["down"]["kernel"])
    if config.norm_position in ("pre", "post"):
        close((written_LBTD + down.get("bias", 0)) * config.residual_scale, seen["feed_forward_write"])
    close(seen["logits"], reference.decode(params, TOKENS_BT, config))


def test_each_head_writes_through_its_own_rows_of_the_projection():
    _, params, seen = captured("gpt2")
    kernel_LNHD = np.float64(params["layers"]["attention"]["out"]["kernel"])
    for layer, head in np.ndindex(2, 6):
        close(seen["head_writes"][layer, :, :, head], seen["heads"][layer, :, :, head] @ kernel_LNHD[layer, head])


@pytest.mark.short("default")
@pytest.mark.parametrize("name", ["default", "neox", "sloped window", "llama4"])
def test_it_works_under_jit_and_for_layers_that_are_not_stacked(name):
    model, params, seen = captured(name)
    jitted = jax.jit(functools.partial(capture, model))
    for again in (jitted(params, TOKENS_BT), capture(model, fd.unstack_layers(params), TOKENS_BT)):
        assert again.keys() == seen.keys()
        for key in NAMES:
            close(again[key], seen[key])


def test_only_the_named_arrays_are_returned():
    model, params, seen = captured("default")
    few = capture(model, params, TOKENS_BT, names=["weights", "embeddings"])
    assert list(few) == ["weights", "embeddings"]
    close(few["weights"], seen["weights"])


@pytest.mark.short("pieces1-sloped window")
@pytest.mark.parametrize("name", ["default", "gemma", "sloped window", "llama4", "neox"])
@pytest.mark.parametrize("pieces", [(T,), (4, 3), (1,) * T, (3, 1, 1, 2)])
def test_a_cache_shows_the_same(name, pieces):
    """Each token's row of each array is the one it has in the whole text, each weight at the position of its key."""
    model, params, seen = captured(name)
    cache = fd.empty_cache(model.config, B, 9)
    start = 0
    for length in pieces:
        stop = start + length
        part, cache = capture(model, params, TOKENS_BT[:, start:stop], cache)
        for key, axes in NAMES.items():
            if "S" not in axes or axes == "LBSKH":
                axis = axes.replace("S", "T").index("T")
                close(part[key], np.take(seen[key], range(start, stop), axis), err_msg=key)
        for layer, b in np.ndindex(model.config.num_layers, B):
            positions_S = np.asarray(part["key_positions"][layer, b])
            is_there_S = (positions_S >= 0) & (positions_S < stop)
            num_slots = min(model.config.windows[layer] or 9, 9) + (length if length > 1 else 0)
            assert (positions_S[num_slots:] == -1).all()
            for key, nothing in (("weights", 0), ("scores", -np.inf)):
                array_NTS = np.asarray(part[key][layer, b])
                # A position whose slot is overwritten by a later one of the same piece appears twice, once masked.
                spread_NTS = np.full((model.config.num_heads, length, T), nothing, float)
                for column in np.flatnonzero(is_there_S):
                    here = spread_NTS[..., positions_S[column]]
                    spread_NTS[..., positions_S[column]] = np.maximum(here, array_NTS[..., column])
                close(spread_NTS, seen[key][layer, b, :, start:stop], err_msg=key)
                assert (array_NTS[..., ~is_there_S] == nothing).all()
        start = stop


def test_a_hugging_face_folder(tmp_path):
    model, params = make(positions="rotary", norm="rmsnorm", feed_forward="swiglu", tied_head=False)
    write_folder(tmp_path, model.config, params, None, FAMILIES["llama"])
    loaded, loaded_params, _ = fd.load(tmp_path)
    seen = capture(model, params, TOKENS_BT)
    for name, array in fd.capture(loaded, loaded_params, TOKENS_BT).items():
        close(array, seen[name])


@pytest.mark.short("none-False")
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_recording_costs_nothing_if_it_is_not_used(scan_layers, remat, monkeypatch):
    """The compiled programs of a model and its gradient are those of a model that cannot record or edit."""
    settings = CHOICES["gemma"] | {"scan_layers": scan_layers, "remat": remat}

    def programs():
        model, params = make(**settings)  # traced functions are cached, so it must be a new one

        def loss(params):
            return model.apply({"params": params}, TOKENS_BT).sum()

        for function in (loss, jax.grad(loss)):
            text = jax.jit(function).lower(params).compile().as_text()
            # Without the source locations of operations.
            text = re.sub(r", metadata=\{[^}]*\}", "", text)
            yield re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d.*\n)*", "", text)

    recordable = list(programs())
    assert all("tanh" in text and "FileNames" not in text for text in recordable)
    monkeypatch.setattr(Call, "hook", lambda call, module: lambda name, value: value)
    monkeypatch.setattr(Call, "edit", lambda call, name, value: value)
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **kwargs: False)
    assert recordable == list(programs())


def test_the_same_program_serves_texts_of_one_length():
    model, params, _ = captured("default")
    from flax_decoder.lens import capture as module

    before = module._capture._cache_size()
    for seed in range(3):
        capture(model, params, jax.random.randint(jax.random.key(seed), (1, 5), 0, V))
    assert module._capture._cache_size() == before + 1


def test_refusals():
    model, params, _ = captured("default")
    with pytest.raises(ValueError, match="there is no 'wieghts' to capture, only embeddings, q, k"):
        capture(model, params, TOKENS_BT, names=["weights", "wieghts"])
    with pytest.raises(ValueError, match=r"token id \d+ is not in the vocabulary"):
        capture(model, params, TOKENS_BT + V)
    with pytest.raises(ValueError, match="token ids must be integers"):
        capture(model, params, jnp.ones((1, 3)))
    too_long = np.zeros((1, SIZES["context_length"] + 1), np.int32)
    with pytest.raises(ValueError, match="more than context_length"):
        capture(model, params, too_long)
