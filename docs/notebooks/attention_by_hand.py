"""Attention by hand: one layer in NumPy loops, number by number beside the library.

Run it with `python docs/notebooks/attention_by_hand.py`, or open it cell by cell in an editor that knows `# %%`.
"""

# %% [markdown]
# A language model reads tokens and says which token comes next. Between its tokens stands *attention*: each position
# asks a question (its **query**), each position has a label (its **key**), and each has something to hand over (its
# **value**). Where a label answers a question well, much of that value is handed over.
#
# All of it is a few sums. Here they are done by hand, with `for` loops, on six words; after each step the result is
# held beside what `fd.capture` saw inside the library's own model. Names of arrays end in their axes: `T` the
# position that asks, `S` the position that answers, `N` the head, `H` the width of a head, `D` the width of the
# model.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import flax_decoder as fd

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs would round the factors of products


def same(what: str, by_hand: np.ndarray, librarys: jax.Array) -> None:
    """Says how far two arrays are apart, and stops where that is more than the rounding of float32."""
    librarys = np.asarray(librarys, np.float64)
    assert by_hand.shape == librarys.shape, f"{what}: {by_hand.shape} by hand, {librarys.shape} in the library"
    difference = np.abs(by_hand - librarys).max()
    print(f"{what:>18} {by_hand.shape!s:>10}   largest difference {difference:.0e}")
    assert difference <= 1e-5 * np.abs(librarys).max(), what


# %% [markdown]
# ## A small model
# One layer, two heads of width 4, a stream of width 8. It has learned nothing: its weights are random, and large
# enough for its attention to be uneven. `D`, `N` and `H` of GPT-2 are 768, 12 and 64; nothing else would differ.

# %%
WORDS = ["the", "cat", "sat", "on", "mat"]
sentence = ["the", "cat", "sat", "on", "the", "mat"]
tokens_T = np.array([WORDS.index(word) for word in sentence])
print("tokens:", tokens_T)


def random_model(seed: int, **settings: object) -> tuple[fd.Decoder, dict]:
    """A model of one layer, and parameters of which none has a special value."""
    small = {"vocab_size": len(WORDS), "context_length": 8, "num_layers": 1, "embed_dim": 8, "mlp_dim": 16}
    settings = small | {"norm": "rmsnorm", "init_stddev": 0.5} | settings
    config = fd.load_config(None, {f"model.{name}": value for name, value in settings.items()})
    model = fd.Decoder(config.model)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), int))["params"]
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32), params)


model, params = random_model(seed=0, num_heads=2)
seen = fd.capture(model, params, tokens_T[None])  # the library sees batches; this one has a single text

# NumPy's copy of the parameters, in float64; [0] is the only layer.
embedding_VD, positions_SD = (np.asarray(params[name], np.float64) for name in ("embedding", "positions"))
layer = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params["layers"])
query_DNH, key_DNH, value_DNH, out_NHD = (
    layer["attention"][name]["kernel"] for name in ("query", "key", "value", "out")
)
T = S = len(tokens_T)
D, N, H = query_DNH.shape

# %% [markdown]
# ## From words to vectors
# A token is a row of a table. In this model its place in the text is a row of another table, and the two are added.
# The sum is the *residual stream*: all that follows reads from it and adds to it. The two "the" differ only by their
# place.

# %%
x_TD = np.zeros((T, D))
for t in range(T):
    x_TD[t] = embedding_VD[tokens_T[t]] + positions_SD[t]
same("embeddings", x_TD, seen["embeddings"][0])

# %% [markdown]
# Before a layer reads the stream, each vector is brought to unit size (root mean square 1), and each of its numbers
# is multiplied by one that was learned.

# %%
normed_TD = np.zeros((T, D))
for t in range(T):
    root_mean_square = np.sqrt(np.mean(x_TD[t] ** 2) + model.config.norm_epsilon)
    normed_TD[t] = x_TD[t] / root_mean_square * layer["attention_norm"]["scale"]

# %% [markdown]
# ## Queries, keys, values
# Three matrices turn the vector of each position into its query, its key and its value, anew for each head. That is
# all that there is to them: each number is one sum over `D`.


# %%
def project(x_TD: np.ndarray, kernel_DNH: np.ndarray) -> np.ndarray:
    """Each position's vector times the matrix of each head, one number at a time."""
    result_TNH = np.zeros((len(x_TD), *kernel_DNH.shape[1:]))
    for t, n, h in np.ndindex(result_TNH.shape):
        for d in range(len(kernel_DNH)):
            result_TNH[t, n, h] += x_TD[t, d] * kernel_DNH[d, n, h]
    return result_TNH


q_TNH, k_SNH, v_SNH = (project(normed_TD, kernel) for kernel in (query_DNH, key_DNH, value_DNH))
same("queries", q_TNH, seen["q"][0, 0])
same("keys", k_SNH, seen["k"][0, 0])
same("values", v_SNH, seen["v"][0, 0])

# %% [markdown]
# ## Scores: how well does a key match a query?
# Multiply the two number by number and add up. The more numbers there are, the larger such sums become, so they are
# divided by the square root of their count. And nobody may look ahead: a model that learns to say what comes next
# must not see it. Scores of later positions become minus infinity: this is the *causal mask*.

# %%
scores_NTS = np.zeros((N, T, S))
for n, t, s in np.ndindex(N, T, S):
    for h in range(H):
        scores_NTS[n, t, s] += q_TNH[t, n, h] * k_SNH[s, n, h]
    scores_NTS[n, t, s] /= np.sqrt(H)
    if s > t:
        scores_NTS[n, t, s] = -np.inf
finite = np.isfinite(scores_NTS)
assert (finite == np.isfinite(seen["scores"][0, 0])).all(), "the same scores are masked"
same("scores", scores_NTS[finite], seen["scores"][0, 0][finite])

# %% [markdown]
# ## Weights: scores that share out a whole
# The *softmax* makes the scores of one query into weights: take `exp`, which is positive and makes the mask's minus
# infinity 0, and divide by their sum, so that they sum to 1. (Taking off the largest score first changes nothing but
# keeps `exp` from overflowing.) Each row below says where one word looks.

# %%
weights_NTS = np.zeros((N, T, S))
for n, t in np.ndindex(N, T):
    exponentials_S = np.exp(scores_NTS[n, t] - scores_NTS[n, t].max())
    weights_NTS[n, t] = exponentials_S / exponentials_S.sum()
same("weights", weights_NTS, seen["weights"][0, 0])
assert np.allclose(weights_NTS.sum(-1), 1) and (weights_NTS[:, ~np.tri(T, dtype=bool)] == 0).all()


def show(weights_TS: np.ndarray) -> None:
    """A table of weights: a row for each word that asks."""
    print(" " * 8 + "".join(f"{word:>6}" for word in sentence))
    for word, weights_S in zip(sentence, weights_TS, strict=True):
        print(f"{word:>8}" + "".join(f"{weight:6.2f}" if weight > 0 else "     ." for weight in weights_S))


for n in range(N):
    print(f"\nhead {n}")
    show(weights_NTS[n])

# %% [markdown]
# ## The weighted sum of the values
# What a head gathers at a position is the average of all values, by these weights. Queries and keys have decided
# *where* to read; *what* is read are values alone.

# %%
heads_TNH = np.zeros((T, N, H))
for t, n in np.ndindex(T, N):
    for s in range(S):
        heads_TNH[t, n] += weights_NTS[n, t, s] * v_SNH[s, n]
same("heads", heads_TNH, seen["heads"][0, 0])

# %% [markdown]
# ## Back into the stream
# A last matrix turns the `H` numbers of each head into `D`, and what the heads write is added to the stream:
# attention is a layer that *adds what others know*.

# %%
writes_TND = np.zeros((T, N, D))
for t, n in np.ndindex(T, N):
    for h in range(H):
        writes_TND[t, n] += heads_TNH[t, n, h] * out_NHD[n, h]
same("head writes", writes_TND, seen["head_writes"][0, 0])
attention_TD = writes_TND.sum(axis=1)
same("attention", attention_TD, seen["attention_write"][0, 0])
# The feed-forward network works on each position by itself and is not by hand here; its write completes the layer.
same("residual", x_TD + attention_TD + np.asarray(seen["feed_forward_write"][0, 0]), seen["residual"][0, 0])


# %% [markdown]
# ## The same in five lines
# Each loop is a sum over the letters that are left out on the right of an `einsum`. This is how the library has it
# (`dot_product_attention` in [nn/attention.py](../../flax_decoder/nn/attention.py)), with a batch axis in front.


# %%
def attend(q_TNH: np.ndarray, k_SNH: np.ndarray, v_SNH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """heads_TNH and weights_NTS, for queries that stand at the positions of the keys."""
    scores_NTS = np.einsum("TNH,SNH->NTS", q_TNH, k_SNH) / np.sqrt(q_TNH.shape[-1])
    scores_NTS = np.where(np.tri(len(q_TNH), dtype=bool), scores_NTS, -np.inf)
    exponentials_NTS = np.exp(scores_NTS - scores_NTS.max(axis=-1, keepdims=True))
    weights_NTS = exponentials_NTS / exponentials_NTS.sum(axis=-1, keepdims=True)
    return np.einsum("NTS,SNH->TNH", weights_NTS, v_SNH), weights_NTS


again_TNH, _ = attend(q_TNH, k_SNH, v_SNH)
same("heads, by einsum", again_TNH, seen["heads"][0, 0])

# %% [markdown]
# ## What newer models change: grouped heads, rotary positions
# A model that writes keeps the keys and values of all words so far in memory. *Grouped* heads make that smaller: here
# four query heads share the keys and values of two; query heads 0 and 1 those of head 0, 2 and 3 those of head 1.
#
# *Rotary* positions add nothing to the stream. Before they meet, queries and keys are turned: numbers `i` and
# `i + H / 2` of a head are the two coordinates of a point, and it is turned by an angle that is the position times a
# speed, which is another for each pair. Two points that are turned by the same angle keep their product, so a score
# depends on *how far apart* two words are, and not on where in the text they stand.

# %%
N, K, H = 4, 2, 4
model, params = random_model(seed=1, num_heads=N, num_kv_heads=K, head_dim=H, positions="rotary")
seen = fd.capture(model, params, tokens_T[None])
q_TNH, k_SKH, v_SKH = (np.asarray(seen[name][0, 0], np.float64) for name in ("q", "k", "v"))
print("queries", q_TNH.shape, "keys", k_SKH.shape, "values", v_SKH.shape)


def turn(vector_H: np.ndarray, position: int) -> np.ndarray:
    """A query or key, turned by the angles of its position."""
    half = len(vector_H) // 2
    turned_H = np.zeros_like(vector_H)
    for i in range(half):
        angle = position * model.config.rotary_base ** (-2 * i / len(vector_H))
        turned_H[i] = vector_H[i] * np.cos(angle) - vector_H[i + half] * np.sin(angle)
        turned_H[i + half] = vector_H[i + half] * np.cos(angle) + vector_H[i] * np.sin(angle)
    return turned_H


turned_q_TNH = np.array([[turn(q_TNH[t, n], t) for n in range(N)] for t in range(T)])
turned_k_SKH = np.array([[turn(k_SKH[s, k], s) for k in range(K)] for s in range(S)])
same("turned queries", turned_q_TNH, seen["q_rotated"][0, 0])
same("turned keys", turned_k_SKH, seen["k_rotated"][0, 0])

near, far = (turn(q_TNH[5, 0], 5 + shift) @ turn(k_SKH[2, 0], 2 + shift) for shift in (0, 100))
print(f"the score of words three apart, at 5 and 2: {near:.6f}; at 105 and 102: {far:.6f}")
assert np.isclose(near, far)

# %% [markdown]
# With each key and value head repeated for the query heads of its group, the rest is the five lines from above.

# %%
group_N = np.arange(N) // (N // K)  # which key and value head serves each query head: 0, 0, 1, 1
heads_TNH, weights_NTS = attend(turned_q_TNH, turned_k_SKH[:, group_N], v_SKH[:, group_N])
same("grouped weights", weights_NTS, seen["weights"][0, 0])
same("grouped heads", heads_TNH, seen["heads"][0, 0])
print("\nhead 3, which reads the keys of head 1")
show(weights_NTS[3])

# %% [markdown]
# That is attention, all of it. What a head that has *learned* something does with it: [induction.py](induction.py).
