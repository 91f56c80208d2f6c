import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.generation.generate import CHUNK_TOKENS, SHORTEST_PREFILL_TOKENS, pad_right, stream
from flax_decoder.generation.sampling import Sampling
from flax_decoder.nn.cache import empty_cache

V = 23
BASE = {
    "model.vocab_size": V,
    "model.context_length": 11,
    "model.num_layers": 1,
    "model.embed_dim": 12,
    "model.num_heads": 3,
    "model.mlp_dim": 14,
    # Weights of order 1: logits lie so far apart that roundings do not change which is the largest.
    "model.init_stddev": 0.6,
    # The input token is not by itself the likeliest next one.
    "model.tied_head": False,
}
KINDS = {
    "learned": {},
    "rotary grouped": {"model.positions": "rotary", "model.num_kv_heads": 1, "model.head_dim": 6},
    "alibi window": {
        "model.positions": "alibi",
        "model.num_layers": 2,
        "model.window": 4,
        "model.window_pattern": [True, False],
    },
    "none": {"model.positions": "none"},
}


@functools.cache
def make(kind="learned", **changes):
    changes = {f"model.{name}": value for name, value in changes.items()}
    model = fd.Decoder(fd.load_config(None, BASE | KINDS[kind] | changes).model)
    return model, jax.jit(model.init)(jax.random.key(1), np.zeros((1, 1), np.int32))["params"]


def prompts(B, T, seed=0):
    return np.random.default_rng(seed).integers(0, V, (B, T), np.int32)


def plain_greedy(model, params, prompt_BT, max_new_tokens, penalty=1.0):
    """Reads the whole text again for each token, without a cache: the rule in its plainest form.

    The window is all of the text; where that would outgrow the context, it starts again at the last half context.
    """
    capacity = model.config.context_length
    forward = jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT))
    text_BT, start = prompt_BT, 0
    for _ in range(max_new_tokens):
        if text_BT.shape[1] - start > capacity:
            start = text_BT.shape[1] - max(capacity // 2, 1)
        window_BT = text_BT[:, start:]
        # Padded to one length, so that one program is compiled; what stands behind is not seen.
        padded_BT = np.pad(window_BT, ((0, 0), (0, capacity - window_BT.shape[1])))
        logits_BV = np.array(forward(padded_BT))[:, window_BT.shape[1] - 1]
        for row, logits_V in zip(text_BT, logits_BV, strict=True):
            for token in set(row.tolist()):
                logits_V[token] *= penalty if logits_V[token] < 0 else 1 / penalty
        token_B = logits_BV.argmax(-1)
        text_BT = np.concatenate([text_BT, token_B[:, None].astype(np.int32)], axis=1)
    return text_BT


@pytest.mark.parametrize("kind", ["learned", "rotary grouped", "alibi window"])
def test_greedy_within_the_context_equals_a_plain_loop(kind):
    model, params = make(kind)
    prompt_BT = prompts(6, 4)
    tokens_BT = fd.generate(model, params, prompt_BT, max_new_tokens=7, temperature=0.0)
    assert tokens_BT.shape == (6, 11) and tokens_BT.dtype == jnp.int32
    np.testing.assert_array_equal(tokens_BT[:, :4], prompt_BT)
    expected_BT = plain_greedy(model, params, prompt_BT, 7)
    np.testing.assert_array_equal(tokens_BT, expected_BT)
    assert len(np.unique(expected_BT[:, 4:])) > 4  # not one token over and over, which would hide much


@pytest.mark.parametrize("kind", ["learned", "rotary grouped"])
@pytest.mark.parametrize("num_prompt_tokens", [1, 11, 12, 30])
def test_past_the_context_the_last_half_is_read_again(kind, num_prompt_tokens):
    model, params = make(kind)
    prompt_BT = prompts(2, num_prompt_tokens)
    tokens_BT = fd.generate(model, params, prompt_BT, max_new_tokens=26, temperature=0.0)
    np.testing.assert_array_equal(tokens_BT, plain_greedy(model, params, prompt_BT, 26))


def test_a_context_of_one_token():
    model, params = make("none", context_length=1)
    tokens_BT = fd.generate(model, params, prompts(2, 3), max_new_tokens=4, temperature=0.0)
    np.testing.assert_array_equal(tokens_BT, plain_greedy(model, params, prompts(2, 3), 4))


def test_the_text_does_not_depend_on_how_much_of_it_is_asked_for():
    """Chunks end in different places for each length; borders are at 1 + a multiple of CHUNK_TOKENS."""
    model, params = make("rotary grouped", context_length=3 * CHUNK_TOKENS)
    rng, prompt_BT = jax.random.key(5), prompts(2, 3)
    longest = 2 * CHUNK_TOKENS + 3
    whole_BT = np.asarray(fd.generate(model, params, prompt_BT, longest, rng))
    for length in (1, 2, CHUNK_TOKENS, CHUNK_TOKENS + 1, CHUNK_TOKENS + 2, 2 * CHUNK_TOKENS + 1):
        np.testing.assert_array_equal(fd.generate(model, params, prompt_BT, length, rng), whole_BT[:, : 3 + length])
    chunks = list(stream(model, params, prompt_BT, longest, rng, Sampling()))
    assert [chunk.shape[1] for chunk in chunks] == [1, CHUNK_TOKENS, CHUNK_TOKENS, 2]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole_BT[:, 3:])


def test_the_seed_makes_the_text():
    model, params = make()
    prompt_BT = prompts(2, 3)

    def text(seed):
        return fd.generate(model, params, prompt_BT, 20, jax.random.key(seed), temperature=1.5).tolist()

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_each_token_is_drawn_anew():
    """So hot that logits do not matter: a random key that came twice would draw the same token twice."""
    model, params = make("rotary grouped", context_length=3 * CHUNK_TOKENS)
    tokens = fd.generate(model, params, prompts(1, 3), 2 * CHUNK_TOKENS, jax.random.key(0), temperature=1e9)[0, 3:]
    # 32 draws of 23 tokens show about 23 (1 - (22/23)^32) = 17 of them.
    assert len(set(tokens.tolist())) > 12
    assert tokens[:CHUNK_TOKENS].tolist() != tokens[CHUNK_TOKENS:].tolist()


def test_rows_are_drawn_by_themselves():
    model, params = make()
    rng, same_BT = jax.random.key(0), np.repeat(prompts(1, 3), 3, axis=0)
    tokens_BT = np.asarray(fd.generate(model, params, same_BT, 20, rng, temperature=3.0))
    assert len({tuple(row) for row in tokens_BT.tolist()}) == 3
    other_BT = np.concatenate([same_BT[:1], prompts(2, 3, seed=9)])
    np.testing.assert_array_equal(fd.generate(model, params, other_BT, 20, rng, temperature=3.0)[0], tokens_BT[0])


def test_the_repetition_penalty_knows_the_prompt_and_what_was_written():
    model, params = make()
    prompt_BT = prompts(2, 4)
    tokens_BT = fd.generate(model, params, prompt_BT, 20, temperature=0.0, repetition_penalty=2.0)
    np.testing.assert_array_equal(tokens_BT, plain_greedy(model, params, prompt_BT, 20, penalty=2.0))
    assert not np.array_equal(tokens_BT, plain_greedy(model, params, prompt_BT, 20))


def test_padding_of_a_vocabulary_is_never_written():
    model, params = make()
    tokens_BT = fd.generate(model, params, prompts(2, 3) % 5, 40, jax.random.key(0), temperature=9.0, vocab_size=5)
    assert tokens_BT.max() < 5


def test_no_new_tokens_give_the_prompt():
    model, params = make()
    np.testing.assert_array_equal(fd.generate(model, params, prompts(2, 3), 0, temperature=0), prompts(2, 3))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (np.zeros((2, 0), np.int32), {"temperature": 0}, "at least one"),
        (np.zeros((0, 2), np.int32), {"temperature": 0}, "at least one"),
        (np.zeros(3, np.int32), {"temperature": 0}, r"\(B, T\)"),
        ([[0, V]], {"temperature": 0}, f"token id {V} is not in the vocabulary: 0 to 22"),
        ([[-1, 0]], {"temperature": 0}, "token id -1 is not"),
        ([[0.5, 1.0]], {"temperature": 0}, "must be integers"),
        ([[1]], {"temperature": 0, "max_new_tokens": -1}, "max_new_tokens = -1"),
        ([[1]], {}, "needs rng"),
        ([[1]], {"temperature": -1}, "temperature = -1"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompt, options, message):
    model, params = make()
    with pytest.raises(ValueError, match=message):
        fd.generate(model, params, prompt, **{"max_new_tokens": 3} | options)


def test_a_long_context_costs_no_memory_for_a_short_text(monkeypatch):
    """A model made for 100,000 tokens would else need gigabytes to write ten."""
    module, capacities = importlib.import_module("flax_decoder.generation.generate"), []

    def recorded(config, batch_size, capacity):
        capacities.append(capacity)
        return empty_cache(config, batch_size, capacity)

    monkeypatch.setattr(module, "empty_cache", recorded)
    model, params = make("rotary grouped", context_length=99_991)
    fd.generate(model, params, prompts(2, 3), max_new_tokens=30, temperature=0.0)
    assert capacities == [64]


@pytest.mark.parametrize(
    ("T", "longest", "padded"),
    [(1, 64, SHORTEST_PREFILL_TOKENS), (16, 64, 16), (17, 64, 32), (33, 40, 40), (40, 40, 40)],
)
def test_prompts_are_padded_to_few_lengths(T, longest, padded):
    tokens_BT = pad_right(np.ones((2, T), np.int32), longest)
    assert tokens_BT.shape == (2, padded) and tokens_BT.sum() == 2 * T and (tokens_BT[:, :T] == 1).all()
