"""The changes of logits by a head agree with attribution, which computes them in the other direction."""

import functools

import jax
import numpy as np
import pytest
from shape_names import checked_shape_names
from test_attribution import ORDERS, make
from test_decoder import V

import flax_decoder as fd
from flax_decoder.lens.pushes import pushes

TOKENS_BT = np.random.default_rng(5).integers(0, V, (1, 7)).astype(np.int32)


def pushed(settings, tokens_BC, count):
    model, params = make(**settings)
    seen = fd.capture(model, params, TOKENS_BT)
    found = jax.jit(functools.partial(pushes, model.config, count=count))(params, seen, tokens_BC=tokens_BC)
    return model, params, found


@pytest.mark.short("post")
@pytest.mark.parametrize("order", ORDERS)
def test_each_token_is_pushed_as_its_attribution_says(order):
    """Writes forward through the norms, and the head's columns back to the values."""
    settings = ORDERS[order]
    everything_BC = np.arange(V, dtype=np.int32)[None]
    model, params, (places, values) = pushed(settings, everything_BC, V)
    attribute = jax.jit(functools.partial(fd.attribute, model))
    for token in (0, 3, V - 1):
        parts = attribute(params, TOKENS_BT, np.full_like(TOKENS_BT, token))
        expected_LNT = np.asarray(parts.heads_LBNTS[:, 0].sum(-1))
        given = np.where(places[..., :V] == token, values[..., :V], 0).sum(-1)
        assert np.abs(expected_LNT).max() > 0.01
        np.testing.assert_allclose(given, expected_LNT, atol=2e-5)


def test_the_most_raised_come_first_and_the_most_lowered_last():
    _, _, (places, values) = pushed({}, np.arange(V, dtype=np.int32)[None], 3)
    _, _, (_, all_values) = pushed({}, np.arange(V, dtype=np.int32)[None], V)
    assert places.shape == values.shape == (2, 6, 7, 6)
    assert (np.diff(values) <= 0).all()
    np.testing.assert_array_equal(values[..., :3], all_values[..., :3])
    np.testing.assert_array_equal(values[..., 3:], all_values[..., -3:])


def test_only_the_tokens_asked_for():
    _, _, (places, values) = pushed({}, np.array([[-1, 4, 2, -1]], np.int32), 2)
    _, _, (all_places, all_values) = pushed({}, np.arange(V, dtype=np.int32)[None], V)
    assert set(np.unique(places)) == {1, 2}
    for place, token in ((1, 4), (2, 2)):
        given = np.where(places[..., :2] == place, values[..., :2], 0).sum(-1)
        expected = np.where(all_places[..., :V] == token, all_values[..., :V], 0).sum(-1)
        np.testing.assert_allclose(given, expected, atol=1e-6)


def test_names_are_right():
    jax.clear_caches()
    with checked_shape_names() as functions:
        pushed(ORDERS["post"], np.arange(V, dtype=np.int32)[None], 2)
    assert functions >= {"pushes.py:pushes", "capture.py:through_norm", "pushes.py:through_later_norms"}
