"""Induction: a small model learns to copy, and the lens finds the two heads that do it.

Run it with `python docs/notebooks/induction.py` (half a minute on two CPU cores), or open it cell by cell in an editor
that knows `# %%`.
"""

# %% [markdown]
# Who reads "Captain Orlova smiled. ... Captain" goes on with "Orlova", without ever having heard of her: the text has
# said it before. Language models learn this early, and they do it by two heads, one in a layer below the other:
#
# * a **previous-token head** writes at each position which token stands before it;
# * an **induction head** asks "who has my token before it?", finds the position *after* the earlier copy of its own
#   token, and hands over what stands there: A B ... A, so B.
#
# (Olsson et al. 2022, "In-context Learning and Induction Heads".) Here they grow in half a minute, on a task that
# cannot be solved otherwise; and the lens shows which heads they are, that they are the cause, and what they write.

# %%
import time

import jax
import jax.numpy as jnp
import numpy as np

import flax_decoder as fd
from flax_decoder.lens.edits import zero_head
from flax_decoder.lens.head_scores import repeated_tokens

SEED = 0
NUM_STEPS, BATCH_SIZE = 1500, 32
VOCAB_SIZE, LENGTH = 32, 48

# %% [markdown]
# ## A task that only copying solves
# Each text is a random piece of 8 to 24 tokens that is said again and again. Nothing can be foreseen while the piece
# is said for the first time: there the best possible loss is log 32 = 3.47 nats, a blind guess. From then on
# everything can, but only by looking back. As the pieces differ in length, "look back by 12" is no solution, and as
# they are drawn anew for each batch, neither is learning them by heart.


# %%
def make_batch(rng: jax.Array) -> dict[str, jax.Array]:
    """Texts that repeat themselves, each with a period of its own."""
    rng_tokens, rng_periods = jax.random.split(rng)
    pieces_BT = jax.random.randint(rng_tokens, (BATCH_SIZE, LENGTH + 1), 0, VOCAB_SIZE)
    periods_B1 = jax.random.randint(rng_periods, (BATCH_SIZE, 1), LENGTH // 6, LENGTH // 2 + 1)
    tokens_BT = jnp.take_along_axis(pieces_BT, jnp.arange(LENGTH + 1)[None] % periods_B1, axis=1)
    return {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}


print("a text:", *make_batch(jax.random.key(SEED))["inputs"][0])

# %% [markdown]
# ## The smallest model that can
# Two layers of two heads. Rotary positions, and biases on queries and keys, let a head look one position back whatever
# the tokens are. Weight decay is strong, until it fades with the learning rate in the last steps. Without it the heads
# of a layer learn the same and share the work; with it, holding one skill in two heads costs more than in one.

# %%
config = fd.load_config(
    None,
    {
        "model.vocab_size": VOCAB_SIZE,
        "model.context_length": LENGTH,
        "model.num_layers": 2,
        "model.embed_dim": 64,
        "model.num_heads": 2,
        "model.mlp_dim": 16,
        "model.norm": "rmsnorm",
        "model.positions": "rotary",
        "model.rotary_base": 100.0,  # waves that fit into 48 tokens; the usual 10,000 is for thousands
        "model.attention_in_bias": True,
        "model.init_stddev": 0.05,
        "optimizer.learning_rate": 3e-3,
        "optimizer.schedule": "wsd",
        "optimizer.decay_fraction": 0.4,
        "optimizer.weight_decay": 10.0,  # a hundred times the default
        "training.num_steps": NUM_STEPS,
        "training.batch_size": BATCH_SIZE,
    },
)
model = fd.Decoder(config.model)
state = fd.init_state(model, config, rng=jax.random.key(SEED))
untrained = jax.tree.map(jnp.copy, state.params)

# %% [markdown]
# ## Learning
# The probe is text that the model never sees in training: 24 random tokens said twice. Watch the loss on its two
# halves. The first stays at a blind guess or worse. The second gets a little better at first, as what was said is
# likelier to be said again, and then falls at once: the two heads are of no use without each other, and when both have
# begun to form, each makes the other better.

# %%
probe_BT = repeated_tokens(jax.random.key(1_000_000 + SEED), VOCAB_SIZE, LENGTH // 2, batch_size=64)
HALF = probe_BT.shape[1] // 2


def halves(params: dict, edits: dict | None = None) -> tuple[float, float]:
    """Mean loss, in nats per token, on the first and on the second saying of the probe."""
    logits_BTV = fd.capture(model, params, probe_BT, edits=edits, names=("logits",))["logits"]
    targets_BT1 = probe_BT[:, 1:, None]
    loss_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV[:, :-1]), targets_BT1, axis=-1)[..., 0]
    # Position t says token t + 1, so the token that begins the second saying belongs to none: it cannot be foreseen.
    return float(loss_BT[:, : HALF - 1].mean()), float(loss_BT[:, HALF:].mean())


step = jax.jit(lambda state, rng: fd.train_step(state, make_batch(rng)), donate_argnums=0)
rng = jax.random.key(SEED + 1)
start = time.perf_counter()
for i in range(NUM_STEPS + 1):
    if i % 100 == 0:
        first, second = halves(state.params)
        losses = f"loss on the first half {first:.2f}, on the second {second:.2f}"
        print(f"step {i:4}   {losses}   {time.perf_counter() - start:3.0f} s", flush=True)
    if i < NUM_STEPS:
        state, metrics = step(state, jax.random.fold_in(rng, i))

params = state.params
assert second < 1.0 < 3.0 < first, "the second half is copied, the first is not"

# %% [markdown]
# ## Which heads?
# `fd.capture` gives the attention of all heads, and `fd.head_scores` says how much of it goes where a simple rule
# points: to the token before, or to the token after an earlier copy. Before training no head follows either rule.

# %%
KINDS = ("previous_token", "induction")


def scores_of(params: dict) -> dict[str, np.ndarray]:
    """How far each head follows each rule on the probe."""
    weights_LBNTS = fd.capture(model, params, probe_BT, names=("weights",))["weights"]
    scores = fd.head_scores(weights_LBNTS, probe_BT)
    return {kind: np.asarray(scores[kind]) for kind in KINDS}


before, after = scores_of(untrained), scores_of(params)
print("               " + "".join(f"{kind:>26}" for kind in KINDS))
for layer, head in np.ndindex(after["induction"].shape):
    changes = (f"{before[kind][layer, head]:.2f} -> {after[kind][layer, head]:.2f}" for kind in KINDS)
    print(f"layer {layer}, head {head}" + "".join(f"{change:>26}" for change in changes))

previous_head = int(after["previous_token"][0].argmax())
induction_head = int(after["induction"][1].argmax())
print(f"previous-token head: 0.{previous_head}; induction head: 1.{induction_head}")
assert after["induction"][1, induction_head] > 0.5 and before["induction"].max() < 0.2
assert after["previous_token"][0, previous_head] > 0.5 and before["previous_token"].max() < 0.2
assert after["induction"][0].max() < 0.2, "a head of the first layer has nothing to read the token before from"

# %% [markdown]
# ## Are they the cause?
# A head that looks at the right place need not be the one that the model uses. So take each away in turn: the edit
# `zero_head` makes what a head gathered count for nothing, and all that follows is computed again.

# %%
print(f"loss on the second half: {second:.2f}")
zeroed_LN = np.zeros(after["induction"].shape)
for layer, head in np.ndindex(zeroed_LN.shape):
    zeroed_LN[layer, head] = halves(params, edits={"heads": zero_head(layer, head)})[1]
    print(f"   without head {layer}.{head}: {zeroed_LN[layer, head]:.2f}")

other_head = 1 - induction_head
rise, others_rise = zeroed_LN[1, induction_head] - second, zeroed_LN[1, other_head] - second
assert rise > 2.0, "without the induction head there is no copying"
assert others_rise < rise / 2, "it is that head, and not any head of its layer"
assert zeroed_LN[0, previous_head] - second > 2.0, "and it needs the previous-token head"

# %% [markdown]
# Why does taking away a head of the *first* layer hurt as much? Look at what is left of the induction head then: it
# still asks, but no key says any more what stood before it, so the question finds no answer.

# %%
weights_LBNTS = fd.capture(model, params, probe_BT, edits={"heads": zero_head(0, previous_head)})["weights"]
left = float(fd.head_scores(weights_LBNTS, probe_BT)["induction"][1, induction_head])
print(f"induction score of head 1.{induction_head}: {after['induction'][1, induction_head]:.2f}", end="; ")
print(f"without head 0.{previous_head}: {left:.2f}")
assert left < after["induction"][1, induction_head] / 2

# %% [markdown]
# ## Why this token?
# `fd.attribute` splits the logit of a token into what each part of the model gave, and for heads, through which token
# they gave it. Take one text, and a position in its second half: the model is to say what came next the first time.

# %%
inputs_BT, targets_BT = probe_BT[:, :-1], probe_BT[:, 1:]
why = fd.attribute(model, params, inputs_BT, targets_BT)
assert np.abs(why.total_BT() - why.logit_BT).max() <= 1e-4 * np.abs(why.logit_BT).max(), "the parts sum to the logit"

t = HALF + HALF // 2
copied_from = t - HALF + 1  # the earlier copy is HALF positions back, and the token after it is what comes next
print("text:", *np.asarray(probe_BT[0]))
token, target = inputs_BT[0, t], targets_BT[0, t]
print(f"position {t} holds {token}, which also stood at {t - HALF}, before the {target} at {copied_from}")
print(f"the logit of {target} there is {why.logit_BT[0, t]:.1f}; its largest parts:")
for part, logit in why.largest(0, t, count=5):
    print(f"   {logit:+6.2f}   {part}")

# %% [markdown]
# And that is no lucky pick. Over all texts and all positions of the second half, this is how much of the logit comes
# from the induction head through the one token after the earlier copy, and how often nothing else gave more.

# %%
second_half = np.arange(HALF, 2 * HALF - 1)
from_copy_BT = np.asarray(why.heads_LBNTS)[1, :, induction_head, second_half, second_half - HALF + 1].T
logit_BT = np.asarray(why.logit_BT)[:, second_half]
print(f"of a mean logit of {logit_BT.mean():.1f}, {from_copy_BT.mean():.1f} is from there")

heads_BLNTS = np.moveaxis(np.asarray(why.heads_LBNTS), 0, 1)[:, :, :, second_half]
feed_forward_LBT = np.asarray(why.feed_forward_LBT)[:, :, second_half]
rest = [np.asarray(why.token_BT)[:, second_half], *feed_forward_LBT, heads_BLNTS.max(axis=(1, 2, 4))]
is_largest = from_copy_BT >= np.max(rest, axis=0)
print(f"it is the largest part at {is_largest.mean():.0%} of {is_largest.size} positions")
assert from_copy_BT.mean() > logit_BT.mean() / 2 and is_largest.mean() > 0.8

# %% [markdown]
# So the answer is complete: *where* is in the weights of head 0 and head 1, *that* it matters is in the edits, and
# *what* was written is in the parts of the logit. Change `SEED` and other heads take the two roles, but the roles are
# there.
