"""The network in plain Python loops and float64, written from the papers: what the library must agree with.

Nothing here is fast and nothing is shared with the library, which is the point: two ways to the same numbers. A
function works on one vector, or on the vectors of one sequence; `decode` puts them together. Params are the library's.
"""

import functools
import math

import jax
import numpy as np


def layer_norm(x_D, scale_D, bias_D, epsilon):
    """Ba et al. 2016, equation 3: mean 0 and variance 1 over the numbers of one position."""
    mean = sum(x_D) / len(x_D)
    variance = sum((x - mean) ** 2 for x in x_D) / len(x_D)
    return np.array([(x - mean) / math.sqrt(variance + epsilon) for x in x_D]) * scale_D + bias_D


def rms_norm(x_D, scale_D, epsilon):
    """Zhang and Sennrich 2019, equation 4: root mean square 1 over the numbers of one position."""
    mean_square = sum(x**2 for x in x_D) / len(x_D)
    return np.array([x / math.sqrt(mean_square + epsilon) for x in x_D]) * scale_D


def norm(x_D, params, config):
    """The norm a model has chosen."""
    scale_D = params["scale"] if config.norm_scale else 1.0
    if config.norm == "rmsnorm":
        return rms_norm(x_D, scale_D, config.norm_epsilon)
    return layer_norm(x_D, scale_D, params["bias"] if config.norm_bias else 0.0, config.norm_epsilon)


def qk_norm(x, params, name, config):
    """A norm of queries or keys, over one head or all (Henry et al. 2020; with LayerNorm, Dehghani et al. 2023)."""
    learned = params.get(name, {})
    if config.qk_norm_kind == "rmsnorm":
        return rms_norm(x, learned.get("scale", 1.0), config.norm_epsilon)
    return layer_norm(x, learned.get("scale", 1.0), learned.get("bias", 0.0), config.norm_epsilon)


def of_head(params, name, head, config):
    """What the norm of a head has learned: the same as that of others, or its own."""
    if config.qk_norm == "each_head":
        return params | {name: {leaf: array[head] for leaf, array in params.get(name, {}).items()}}
    return params


def sinusoidal(position, width):
    """Vaswani et al. 2017, section 3.5: a sine and a cosine for each of width / 2 wavelengths."""
    wave_D = np.zeros(width)
    for i in range(width // 2):
        angle = position / 10_000 ** (2 * i / width)
        wave_D[2 * i] = math.sin(angle)
        wave_D[2 * i + 1] = math.cos(angle)
    return wave_D


def rotary_frequencies(head_width, config, window=None, length=1):
    """Su et al. 2021, equation 15, and how linear scaling (Chen et al. 2023) and Llama 3.1 stretch the waves.

    LongRoPE (Ding et al. 2024) and dynamic NTK scaling depend on the length of the text.

    Gemma 3 (section 2) has another base, and no stretching, in its layers with a window.
    """
    rotated = round(head_width * config.rotary_fraction)
    if window is not None and config.rotary_window_base is not None:
        return [config.rotary_window_base ** (-2 * i / rotated) for i in range(rotated // 2)]
    frequencies = []
    for i in range(rotated // 2):
        frequency = config.rotary_base ** (-2 * i / rotated)
        if config.rotary_scaling == "linear":
            frequency = frequency / config.rotary_scaling_factor
        if config.rotary_scaling == "llama3":
            frequency = llama3_frequency(frequency, config)
        if config.rotary_scaling == "yarn":
            frequency = yarn_frequency(i, frequency, rotated, config)
        is_long = length > config.rotary_original_context
        if config.rotary_scaling == "longrope":
            frequency /= (config.rotary_long_factors if is_long else config.rotary_short_factors)[i]
        if config.rotary_scaling == "dynamic" and is_long:
            growth = config.rotary_scaling_factor * length / config.rotary_original_context
            growth -= config.rotary_scaling_factor - 1
            frequency = (config.rotary_base * growth ** (rotated / (rotated - 2))) ** (-2 * i / rotated)
        frequencies.append(frequency)
    return frequencies


def yarn_frequency(i, frequency, rotated, config):
    """Peng et al. 2023, and `yarn_find_correction_range` and `yarn_linear_ramp_mask` in their code."""

    def pair(turns):
        log = math.log(config.rotary_original_context / (turns * 2 * math.pi))
        return rotated * log / (2 * math.log(config.rotary_base))

    low, high = pair(config.rotary_high_frequency_factor), pair(config.rotary_low_frequency_factor)
    if config.rotary_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    stretched = min(max((i - low) / (high - low), 0.0), 1.0)
    return frequency / config.rotary_scaling_factor * stretched + frequency * (1 - stretched)


def query_growth(position, config):
    """Llama 4's "attention temperature tuning" (`attn_scale` and `floor_scale`), counted from 0 as in Ministral 3."""
    return 1 + config.rotary_query_scaling * math.log(1 + position // config.rotary_original_context)


def magnitude(config, window):
    """The other half of YaRN: rotated numbers grow, so that the softmax stays as sharp; not in windows of Gemma 3."""
    if config.rotary_scaling not in ("yarn", "longrope") or (
        window is not None and config.rotary_window_base is not None
    ):
        return 1.0
    return config.rotary_magnitude


def llama3_frequency(frequency, config):
    """The scaling published with Llama 3.1 (`apply_scaling` in its model.py): by wavelength, in three cases."""
    original_context, factor = config.rotary_original_context, config.rotary_scaling_factor
    low, high = config.rotary_low_frequency_factor, config.rotary_high_frequency_factor
    wavelength = 2 * math.pi / frequency
    if wavelength < original_context / high:
        return frequency
    if wavelength > original_context / low:
        return frequency / factor
    smooth = (original_context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotary_pair(i, rotated, layout):
    """The two numbers that frequency i turns: one from each half (Llama), or neighbours (Su et al. 2021)."""
    return (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + rotated // 2)


def rotate(x_H, position, frequencies, layout="half"):
    """Turns each pair as a point in the plane; what is beyond the rotated part stays."""
    turned_H = np.array(x_H)
    for i, frequency in enumerate(frequencies):
        a, b = rotary_pair(i, 2 * len(frequencies), layout)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned_H[a] = x_H[a] * cos - x_H[b] * sin
        turned_H[b] = x_H[a] * sin + x_H[b] * cos
    return turned_H


def alibi_slopes(num_heads):
    """Press et al. 2021, section 3, and their code for a number of heads that is no power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    start = 2 ** (-8 / power)
    slopes = [start**n for n in range(1, power + 1)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def sees(t, s, window):
    """Whether the query at t may look at the key at s: not into the future, not beyond the window."""
    return s <= t and (window is None or t - s < window)


def kv_head_of(n, num_heads, num_kv_heads):
    """Ainslie et al. 2023, figure 2: neighbouring query heads share a key/value head."""
    return n // (num_heads // num_kv_heads)


def score_scale(head_width):
    """Vaswani et al. 2017, equation 1; a model may have its own scale instead (Gemma 2)."""
    return 1 / math.sqrt(head_width)


def softmax(scores_TS):
    """Each query's weights sum to one."""
    weights_TS = np.zeros_like(scores_TS)
    for t, scores_S in enumerate(scores_TS):
        exponentials_S = np.exp(scores_S - max(scores_S))
        weights_TS[t] = exponentials_S / sum(exponentials_S)
    return weights_TS


def attention(q_TNH, k_SKH, v_SKH, window=None, slopes_N=None, soft_cap=None, scale=None):
    """Vaswani et al. 2017, equation 1, head by head; the cap (Gemma 2) comes before ALiBi's slope."""
    T, N, H = q_TNH.shape
    S, K = k_SKH.shape[:2]
    heads_TNH = np.zeros((T, N, H))
    for n in range(N):
        k = kv_head_of(n, N, K)
        scores_TS = np.full((T, S), -np.inf)
        for t in range(T):
            for s in range(S):
                if sees(t, s, window):
                    score = np.dot(q_TNH[t, n], k_SKH[s, k]) * (scale or score_scale(H))
                    if soft_cap is not None:
                        score = soft_cap * math.tanh(score / soft_cap)
                    if slopes_N is not None:
                        score = score - slopes_N[n] * (t - s)
                    scores_TS[t, s] = score
        weights_TS = softmax(scores_TS)
        for t in range(T):
            for s in range(S):
                heads_TNH[t, n] += weights_TS[t, s] * v_SKH[s, k]
    return heads_TNH


def gelu(x):
    """Hendrycks and Gimpel 2016: x times the normal distribution function."""
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    """The approximation in the same paper, which GPT-2 uses."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + math.exp(-x))


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "swiglu": silu,
    "geglu": gelu,
    "geglu_tanh": gelu_tanh,
}


def linear(x, params):
    """x W + b, where x may be a matrix (heads), which is then read row by row."""
    kernel = params["kernel"]
    summed = math.prod(np.shape(x))
    matrix = kernel.reshape(summed, -1)
    y = np.zeros(matrix.shape[1])
    for i, number in enumerate(np.ravel(x)):
        y += number * matrix[i]
    return y.reshape(kernel.shape[np.ndim(x) :]) + params.get("bias", 0.0)


def feed_forward(x_D, params, config):
    """Two matrices with a function between them, or (Shazeer 2020) three with a gate."""
    activation = ACTIVATIONS[config.feed_forward]
    up_F = linear(x_D, params["up"])
    if "gate" in params:
        gate_F = linear(x_D, params["gate"])
        hidden_F = np.array([activation(gate) * up for gate, up in zip(gate_F, up_F, strict=True)])
    else:
        hidden_F = np.array([activation(up) for up in up_F])
    return linear(hidden_F, params["down"])


def self_attention(x_TD, params, config, window, rotates=True):
    """Queries, keys and values of one sequence, what the heads make of them, and the way back to the width D."""
    q_TNH = np.array([linear(x_D, params["query"]) for x_D in x_TD])
    k_TKH = np.array([linear(x_D, params["key"]) for x_D in x_TD])
    v_TKH = np.array([linear(x_D, params["value"]) for x_D in x_TD])
    if config.qkv_clip is not None:
        q_TNH, k_TKH, v_TKH = (np.clip(x, -config.qkv_clip, config.qkv_clip) for x in (q_TNH, k_TKH, v_TKH))
    for name, array in (("query_norm", q_TNH), ("key_norm", k_TKH)):
        for t in range(len(array)):
            if config.qk_norm == "all" and config.qk_norm_position == "before":
                whole = qk_norm(array[t].reshape(-1), params, name, config)
                array[t] = whole.reshape(array[t].shape)
        for t, head in np.ndindex(array.shape[:2]):
            if config.qk_norm in ("head", "each_head") and config.qk_norm_position == "before":
                array[t, head] = qk_norm(array[t, head], of_head(params, name, head, config), name, config)
            if config.positions == "rotary" and rotates:
                frequencies = rotary_frequencies(array.shape[2], config, window, len(x_TD))
                array[t, head] = rotate(array[t, head], t, frequencies, config.rotary_layout)
                array[t, head, : 2 * len(frequencies)] *= magnitude(config, window)
            if config.qk_norm in ("head", "each_head") and config.qk_norm_position == "after":
                array[t, head] = qk_norm(array[t, head], of_head(params, name, head, config), name, config)
        for t in range(len(array)):
            if config.qk_norm == "all" and config.qk_norm_position == "after":
                whole = qk_norm(array[t].reshape(-1), params, name, config)
                array[t] = whole.reshape(array[t].shape)
    q_TNH = np.array([query_growth(t, config) * q_NH for t, q_NH in enumerate(q_TNH)])
    slopes_N = alibi_slopes(config.num_heads) if config.positions == "alibi" else None
    heads_TNH = attention(q_TNH, k_TKH, v_TKH, window, slopes_N, config.attention_soft_cap, config.attention_scale)
    return np.array([linear(heads_NH, params["out"]) for heads_NH in heads_TNH])


def block(x_TD, params, config, window, rotates=True):
    """One layer; the four places for norms as the config describes them, and PaLM's parallel form."""

    def normed(x_TD, name):
        return np.array([norm(x_D, params.get(name), config) for x_D in x_TD])

    def attend(x_TD):
        return self_attention(x_TD, params["attention"], config, window, rotates)

    def feed(x_TD):
        return np.array([feed_forward(x_D, params["feed_forward"], config) for x_D in x_TD])

    scale = config.residual_scale
    if config.parallel_residual:
        second = "attention_norm" if config.shared_norm else "feed_forward_norm"
        return x_TD + scale * attend(normed(x_TD, "attention_norm")) + scale * feed(normed(x_TD, second))
    if config.norm_position == "pre":
        x_TD = x_TD + scale * attend(normed(x_TD, "attention_norm"))
        return x_TD + scale * feed(normed(x_TD, "feed_forward_norm"))
    if config.norm_position == "post":
        x_TD = normed(x_TD + scale * attend(x_TD), "attention_norm")
        return normed(x_TD + scale * feed(x_TD), "feed_forward_norm")
    if config.norm_position == "both":
        x_TD = x_TD + scale * normed(attend(normed(x_TD, "attention_norm")), "attention_output_norm")
        return x_TD + scale * normed(feed(normed(x_TD, "feed_forward_norm")), "feed_forward_output_norm")
    x_TD = x_TD + scale * normed(attend(x_TD), "attention_output_norm")
    return x_TD + scale * normed(feed(x_TD), "feed_forward_output_norm")


def decode_row(params, tokens_T, config):
    """The logits of one sequence."""
    x_TD = np.array([config.embed_scale * params["embedding"][token] for token in tokens_T])
    if config.embedding_norm:
        x_TD = np.array([norm(x_D, params.get("embedding_norm"), config) for x_D in x_TD])
    for t in range(len(tokens_T)):
        if config.positions == "learned":
            x_TD[t] += params["positions"][t]
        if config.positions == "sinusoidal":
            x_TD[t] += sinusoidal(t, x_TD.shape[1])
    for layer in range(config.num_layers):
        has_window = config.window_pattern[layer % len(config.window_pattern)]
        own = map_leaves(lambda stacked, layer=layer: stacked[layer], params["layers"])
        rotates = config.rotary_pattern[layer % len(config.rotary_pattern)]
        x_TD = block(x_TD, own, config, config.window if has_window else None, rotates)
    if config.final_norm:
        x_TD = np.array([norm(x_D, params.get("final_norm"), config) for x_D in x_TD])
    head_DV = params["embedding"].T if config.tied_head else params["head"]
    logits_TV = x_TD @ head_DV + (params["head_bias"] if config.head_bias else 0.0)
    logits_TV = config.logit_scale * logits_TV
    if config.logit_soft_cap is not None:
        logits_TV = config.logit_soft_cap * np.tanh(logits_TV / config.logit_soft_cap)
    return logits_TV


def decode(params, tokens_BT, config):
    """The logits of a batch, as the library's Decoder should give them without dropout."""
    params = map_leaves(lambda leaf: np.asarray(leaf, np.float64), params)
    return np.array([decode_row(params, tokens_T, config) for tokens_T in np.asarray(tokens_BT)])


def map_leaves(function, tree):
    """The same nested dictionary with the function applied to each array."""
    if isinstance(tree, dict):
        return {name: map_leaves(function, branch) for name, branch in tree.items()}
    return function(tree)


@functools.cache
def shapes_of(model):
    """The shapes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def random_params(model, seed=0, stddev=0.3):
    """Random float32 params for a model: all differ, no scale is 1 and no bias 0, so that nothing hides.

    With stddev 0.3 and widths of about 10, activations and scores are of order 1: the softmax is neither flat nor hard.
    """
    shapes = shapes_of(model)

    def randomised(path, leaf):
        name = "/".join(part.key for part in path)
        mean = 1.0 if name.endswith("scale") else 0.0
        rng = np.random.default_rng([seed, *name.encode()])  # the same numbers whatever else the model has
        # Not by jnp.asarray, which compiles a program for each shape.
        return jax.device_put(np.float32(mean + stddev * rng.standard_normal(leaf.shape)))

    return jax.tree_util.tree_map_with_path(randomised, shapes)
