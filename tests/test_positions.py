import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_decoder.config import ModelConfig
from flax_decoder.nn.call import Call
from flax_decoder.nn.positions import alibi_slopes, rotary_frequencies, rotate, sinusoidal

B, T, N, H = 2, 7, 3, 10
ROTARY = ModelConfig(embed_dim=N * H, num_heads=N, positions="rotary")
X_BTNH = np.random.default_rng(0).standard_normal((B, T, N, H)).astype(np.float32)
POSITIONS_BT = np.array([[0, 1, 2, 3, 4, 5, 6], [11, 12, 13, 30, 31, 97, 98]], np.int32)

# Angles are float32: near position 98 they are off by 98 * 6e-8, and so are sine and cosine.
TOLERANCE = 1e-5

# A short original context puts waves of a small head into each of llama3's three cases.
LLAMA3 = {
    "rotary_scaling": "llama3",
    "rotary_original_context": 97,
    "rotary_scaling_factor": 5.0,
    "rotary_low_frequency_factor": 1.5,
    "rotary_high_frequency_factor": 6.0,
}
ROTARY_KINDS = {
    "plain": {},
    "base": {"rotary_base": 501.0},
    "partial": {"rotary_fraction": 0.4},
    "linear": {"rotary_scaling": "linear", "rotary_scaling_factor": 3.0},
    "llama3": LLAMA3,
    "llama3 partial": LLAMA3 | {"rotary_fraction": 0.6},
    "yarn": LLAMA3 | {"rotary_scaling": "yarn", "rotary_low_frequency_factor": 0.4},
    "yarn of fractions": LLAMA3 | {"rotary_scaling": "yarn", "rotary_truncate": False},
    "dynamic": {"rotary_scaling": "dynamic", "rotary_original_context": 50, "rotary_scaling_factor": 3.0},
    "longrope": {
        **{"rotary_scaling": "longrope", "rotary_original_context": 50, "rotary_fraction": 0.6},
        **{"rotary_short_factors": (1.0, 1.3, 2.0), "rotary_long_factors": (1.5, 4.0, 9.0)},
    },
    "interleaved": {"rotary_layout": "interleaved", "rotary_fraction": 0.6},
}


def test_sinusoidal():
    waves_BTD = sinusoidal(jnp.asarray(POSITIONS_BT), 14)
    expected_BTD = [[reference.sinusoidal(t, 14) for t in row] for row in POSITIONS_BT]
    np.testing.assert_allclose(waves_BTD, expected_BTD, atol=TOLERANCE)


@pytest.mark.short(*(kind for kind in ROTARY_KINDS if kind not in ("llama3 partial", "base", "partial")))
@pytest.mark.parametrize("kind", ROTARY_KINDS)
def test_rotary(kind):
    config = dataclasses.replace(ROTARY, **ROTARY_KINDS[kind])
    frequencies = rotary_frequencies(config)
    expected = reference.rotary_frequencies(H, config)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)  # float64, rounded once

    layout = config.rotary_layout
    turned_BTNH = rotate(jnp.asarray(X_BTNH), jnp.asarray(POSITIONS_BT), frequencies, layout)
    for b, t, n in np.ndindex(B, T, N):
        expected_H = reference.rotate(X_BTNH[b, t, n], POSITIONS_BT[b, t], expected, layout)
        np.testing.assert_allclose(turned_BTNH[b, t, n], expected_H, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_text_is_turned_by_its_own_length(kind):
    """Not by that of its neighbours: in other rows, behind the end of a row, or in other documents of its row."""
    config = dataclasses.replace(ROTARY, **ROTARY_KINDS[kind])
    positions_BT, lengths = jnp.array([[46, 47, 48, 49], [52, 53, 54, 55]]), ([50], [56])

    def expected(lengths_BT):
        return [[[reference.rotary_frequencies(H, config, None, length)] for length in row] for row in lengths_BT]

    frequencies = rotary_frequencies(config, call=Call(positions_BT))
    np.testing.assert_allclose(frequencies, expected(lengths), rtol=1e-6)
    frequencies = rotary_frequencies(config, call=Call(positions_BT, end_B=jnp.array([49, 53])))
    np.testing.assert_allclose(frequencies, expected([[49], [53]]), rtol=1e-6)

    positions_BT, segments_BT = jnp.array([[49, 0, 50, 3, 48]]), jnp.array([[-7, 4, -7, 4, 9]])
    frequencies = rotary_frequencies(config, call=Call(positions_BT, segments_BT))
    np.testing.assert_allclose(frequencies, expected([[51, 4, 51, 4, 49]]), rtol=1e-6)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between():
    """The numbers of Llama 3.1 8B itself: head width 128, base 500,000, factor 8, 8192 tokens."""
    plain = ModelConfig(embed_dim=128, num_heads=1, positions="rotary", rotary_base=500_000.0)
    ratio = rotary_frequencies(dataclasses.replace(plain, rotary_scaling="llama3")) / rotary_frequencies(plain)
    wavelengths = 2 * np.pi / rotary_frequencies(plain)
    np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 1 / 8, rtol=1e-6)
    between = ratio[(wavelengths > 8192 / 4) & (wavelengths < 8192)]
    assert len(between) >= 2 and ((between > 1 / 8) & (between < 1)).all() and (np.diff(between) < 0).all()


@pytest.mark.parametrize("kind", ["plain", "partial", "llama3"])
def test_rotated_scores_depend_on_the_distance_alone(kind):
    frequencies = rotary_frequencies(dataclasses.replace(ROTARY, **ROTARY_KINDS[kind]))

    def scores_BNTT(offset):
        turned_BTNH = rotate(jnp.asarray(X_BTNH), jnp.asarray(POSITIONS_BT[:1] + offset), frequencies)
        return jnp.einsum("BTNH,BSNH->BNTS", turned_BTNH, turned_BTNH)

    # Angles up to 60 in float32, times 10 products of order 1.
    np.testing.assert_allclose(scores_BNTT(0), scores_BNTT(53), atol=1e-4)
    assert np.abs(scores_BNTT(0) - jnp.einsum("BTNH,BSNH->BNTS", X_BTNH, X_BTNH)).max() > 0.5


def test_the_part_beyond_the_rotary_fraction_is_left_as_it_is():
    config = dataclasses.replace(ROTARY, rotary_fraction=0.4)
    turned_BTNH = rotate(jnp.asarray(X_BTNH), jnp.asarray(POSITIONS_BT), rotary_frequencies(config))
    np.testing.assert_array_equal(turned_BTNH[..., 4:], X_BTNH[..., 4:])
    changed = np.asarray(turned_BTNH != X_BTNH)[..., :4]
    assert changed[POSITIONS_BT > 0].all() and not changed[POSITIONS_BT == 0].any()


def test_rotation_of_bfloat16_is_done_in_float32():
    frequencies = rotary_frequencies(ROTARY)
    x_BTNH = jnp.asarray(X_BTNH, jnp.bfloat16)
    turned_BTNH = rotate(x_BTNH, jnp.asarray(POSITIONS_BT + 1000), frequencies)
    assert turned_BTNH.dtype == jnp.bfloat16
    for b, t, n in np.ndindex(B, T, N):
        expected_H = reference.rotate(np.float64(x_BTNH[b, t, n]), POSITIONS_BT[b, t] + 1000, frequencies)
        # One rounding of the result (2^-9), and angles of 1000 radians known to 1000 * 6e-8.
        np.testing.assert_allclose(np.float64(turned_BTNH[b, t, n]), expected_H, rtol=2**-8, atol=5e-4)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 8, 12, 16, 17])
def test_alibi_slopes(num_heads):
    np.testing.assert_allclose(alibi_slopes(num_heads), reference.alibi_slopes(num_heads), rtol=1e-6)


def test_alibi_slopes_of_the_paper():
    """Section 3: for 8 heads 1/2, 1/4, ... 1/256; the 12 heads of BLOOM's smallest continue with the odd ones of 16."""
    powers_of_two = [2.0**-n for n in range(1, 9)]
    np.testing.assert_allclose(alibi_slopes(8), powers_of_two, rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(12), powers_of_two + [2.0 ** (-n / 2) for n in (1, 3, 5, 7)], rtol=1e-6)


def test_positions_work_under_jit():
    frequencies = rotary_frequencies(ROTARY)
    x_BTNH, positions_BT = jnp.asarray(X_BTNH), jnp.asarray(POSITIONS_BT)
    np.testing.assert_allclose(
        jax.jit(lambda x, p: rotate(x, p, frequencies))(x_BTNH, positions_BT),
        rotate(x_BTNH, positions_BT, frequencies),
        atol=TOLERANCE,
    )
