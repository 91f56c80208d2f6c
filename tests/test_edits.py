"""An edit changes everything computed after it, as if the model had computed the edited array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from test_decoder import TOKENS_BT, TOLERANCE, B, T, V, make

from flax_decoder.lens import capture as capture_module
from flax_decoder.lens.capture import capture
from flax_decoder.lens.edits import patch, replace_weights, zero_head
from flax_decoder.nn.call import EDITABLE
from flax_decoder.nn.kernels.blockwise import QUERIES_PER_BLOCK

close = functools.partial(np.testing.assert_allclose, atol=TOLERANCE, rtol=1e-5)
# Every editable array exists, and layers differ in their window.
SETTINGS = {"positions": "rotary", "norm_position": "both", "window": 4, "window_pattern": (True, False)}
WAYS = [{"scan_layers": False}, {"scan_layers": True, "num_layers": 3}, {"remat": "full"}, {"remat": "attention"}]
OTHER_BT = (TOKENS_BT + 5) % V


@functools.cache
def captured(**way):
    model, params = make(**SETTINGS | way)
    return model, params, capture(model, params, TOKENS_BT), capture(model, params, OTHER_BT)


@pytest.mark.short("way1")
@pytest.mark.parametrize("way", WAYS)
def test_an_edit_that_changes_nothing_changes_nothing(way):
    model, params, seen, _ = captured(**way)
    same = capture(model, params, TOKENS_BT, edits={name: lambda array, layer: array for name in EDITABLE})
    for name, array in same.items():
        np.testing.assert_array_equal(array, seen[name], err_msg=name)


def squash(array):
    return array - jnp.tanh(array) / 2  # not in proportion, which a norm would undo


def squash_one(number, chosen, target, array, layer):
    """The edit of the name with this number; it changes the target layer if that is the chosen one."""
    return jnp.where((number == chosen) & (layer == target), squash(array), array)


@pytest.mark.short("way1")
@pytest.mark.parametrize("way", WAYS[:2])
def test_each_name_can_be_edited_in_one_layer(way):
    """What is captured is what the edit returns, in that layer; nothing before it changes, the logits do.

    One program for all names.
    """
    model, params, seen, _ = captured(**way)
    for chosen, name in enumerate(EDITABLE):
        target = {"embeddings": 0, "logits": model.config.num_layers - 1}.get(name, 1)
        edits = {other: Partial(squash_one, number, chosen, target) for number, other in enumerate(EDITABLE)}
        edited = capture(model, params, TOKENS_BT, edits=edits)
        if name in ("embeddings", "logits"):
            close(edited[name], squash(seen[name]))
        else:
            close(edited[name][target], squash(seen[name][target]))
            close(edited[name][:target], seen[name][:target])
            close(edited["residual"][: target - 1], seen["residual"][: target - 1])
        assert np.abs(edited["logits"] - seen["logits"]).max() > 1e-3


@pytest.mark.short("way1")
@pytest.mark.parametrize("way", WAYS)
def test_a_head_that_is_zero_is_one_whose_projection_is_zero(way):
    model, params, _, _ = captured(**way)
    for layer, head in [(0, 0), (1, 4)]:
        edited = capture(model, params, TOKENS_BT, edits={"heads": zero_head(layer, head)}, names=["logits"])
        kernel = np.array(params["layers"]["attention"]["out"]["kernel"])
        kernel[layer, head] = 0
        attention = params["layers"]["attention"]
        without = {**params, "layers": {**params["layers"], "attention": {**attention, "out": {"kernel": kernel}}}}
        close(edited["logits"], jax.jit(model.apply)({"params": without}, TOKENS_BT))


@pytest.mark.short("way0")
@pytest.mark.parametrize("way", WAYS[:2])
def test_a_pattern_is_replaced(way):
    model, params, seen, _ = captured(**way)
    pattern_TS = np.eye(T, k=-1, dtype=np.float32)
    pattern_TS[0, 0] = 1
    edited = capture(model, params, TOKENS_BT, edits={"weights": replace_weights(1, 4, pattern_TS)})
    np.testing.assert_array_equal(edited["weights"][1, :, 4], np.broadcast_to(pattern_TS, (B, T, T)))
    untouched = [head for head in range(6) if head != 4]
    close(edited["weights"][1][:, untouched], seen["weights"][1][:, untouched])
    # Head 4 of 6 has the second of two value heads; it now takes the value of the position before.
    close(edited["heads"][1, :, 1:, 4], seen["v"][1, :, :-1, 1])
    assert np.abs(edited["logits"] - seen["logits"]).max() > 1e-3


@pytest.mark.short("way1")
@pytest.mark.parametrize("way", WAYS)
def test_the_residual_stream_of_another_text_makes_its_logits(way):
    model, params, seen, other = captured(**way)
    edited = capture(model, params, TOKENS_BT, edits={"residual": patch(1, other["residual"][1])})
    close(edited["logits"], other["logits"])
    at_4 = capture(model, params, TOKENS_BT, edits={"residual": patch(0, other["residual"][0], at=np.s_[:, 4])})
    close(at_4["logits"][:, :4], seen["logits"][:, :4])
    assert (np.abs(at_4["logits"] - seen["logits"]).max(-1)[:, 4:] > 1e-4).all()


def test_edits_select_the_reference_attention():
    """A kernel has no weights that could be edited; `model.apply` without recording takes the edit, too."""
    model, params = make(attention="blockwise", positions="alibi")
    tokens_BT = np.random.default_rng(0).integers(0, V, (1, QUERIES_PER_BLOCK + 6))
    edits = {"weights": lambda weights_BNTS, layer: weights_BNTS.at[:, :, -1, 0].set(1)}
    logits_BTV = jax.jit(functools.partial(model.apply, edits=edits))({"params": params}, tokens_BT)
    close(logits_BTV, capture(model, params, tokens_BT, edits=edits)["logits"])


def test_edits_of_one_name_follow_each_other():
    model, params, seen, _ = captured()
    both = [zero_head(0, 2), lambda heads_BTNH, layer: heads_BTNH + 1]
    edited = capture(model, params, TOKENS_BT, edits={"heads": both})
    close(edited["heads"][0, :, :, 2], 1)
    close(edited["heads"][0, :, :, 3], seen["heads"][0, :, :, 3] + 1)


def test_going_through_all_heads_compiles_once():
    model, params, _, _ = captured()
    before = capture_module._capture._cache_size()
    names = ["logits", "q"]  # not asked for together elsewhere
    results = [
        capture(model, params, TOKENS_BT, edits={"heads": zero_head(layer, head)}, names=names)["logits"]
        for layer, head in np.ndindex(2, 6)
    ]
    assert capture_module._capture._cache_size() == before + 1
    assert len({result.tobytes() for result in map(np.asarray, results)}) == 12


def test_edits_work_under_jit_and_have_gradients():
    """The gradient of a logit by the scale of a head: attribution patching."""
    model, params, seen, _ = captured()

    @jax.jit
    def logit(size):
        edits = {"heads": lambda heads_BTNH, layer: heads_BTNH.at[:, :, 3].multiply(jnp.where(layer == 1, size, 1))}
        return capture(model, params, TOKENS_BT, edits=edits, names=["logits"])["logits"][0, -1, 2]

    close(logit(1.0), seen["logits"][0, -1, 2])
    step = 1e-2
    close(jax.grad(logit)(1.0), (logit(1 + step) - logit(1 - step)) / (2 * step), rtol=1e-2)
    assert abs(jax.grad(logit)(1.0)) > 1e-3


def test_refusals():
    model, params, _, _ = captured()
    with pytest.raises(ValueError, match="there is no 'head_writes' to edit, only embeddings, q, k"):
        capture(model, params, TOKENS_BT, edits={"head_writes": lambda array, layer: array})
    with pytest.raises(ValueError, match=r"the edit of q must give float32\[2, 7, 6, 10\], not float32\[2, 7, 6\]"):
        capture(model, params, TOKENS_BT, edits={"q": lambda array, layer: array.sum(-1)})
    plain, params = make()
    with pytest.raises(ValueError, match="edit q in place of q_rotated: positions are not rotary"):
        capture(plain, params, TOKENS_BT, edits={"q_rotated": lambda array, layer: array})
