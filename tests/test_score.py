"""Log-probabilities of continuations: those of the model, token by token, whatever else is in the batch."""

import functools

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.errors import UserError
from flax_decoder.generation import score as score_module

V, CONTEXT = 31, 24


@functools.cache
def make():
    sizes = {"model.num_layers": 2, "model.embed_dim": 16, "model.num_heads": 2, "model.context_length": CONTEXT}
    config = fd.load_config(overrides=sizes | {"model.vocab_size": V})
    model = fd.Decoder(config.model)
    params = fd.init_state(model, config, rng=jax.random.key(0)).params
    return model, jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params)


def logits_of(tokens):
    model, params = make()
    tokens_1T = np.pad(tokens, (0, CONTEXT - len(tokens)))[None]
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens_1T)[0, : len(tokens)], np.float64)


def greedy_by_hand(context, count):
    text = context
    for _ in range(count):
        text = np.append(text, logits_of(text)[-1].argmax())
    return text[len(context) :]


def by_hand(context, continuation):
    """One text at a time, in float64 from the logits on."""
    text = np.concatenate([context, continuation])[-CONTEXT - 1 :]
    logits_TV = logits_of(text[:-1])[-len(continuation) :]
    log_z_T = np.log(np.exp(logits_TV).sum(axis=1))
    found_T = logits_TV[np.arange(len(continuation)), continuation] - log_z_T
    return found_T.sum(), bool((logits_TV.argmax(axis=1) == continuation).all())


def random_rows(count, longest):
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, rng.integers(1, longest + 1)) for _ in range(count)]


def test_a_score_is_the_sum_of_the_log_probabilities_of_its_tokens():
    contexts, continuations = random_rows(9, 30), random_rows(9, 11)  # some longer than the model's context
    model, params = make()
    contexts[2], continuations[3] = np.array([4]), np.arange(CONTEXT)
    continuations[2] = greedy_by_hand(contexts[2], 5)
    log_probs, greedy = fd.score(model, params, contexts, continuations)
    expected = [by_hand(*texts) for texts in zip(contexts, continuations, strict=True)]
    np.testing.assert_allclose(log_probs, [one for one, _ in expected], rtol=1e-5)
    assert greedy.tolist() == [one for _, one in expected] and greedy[2] and not greedy.all()


def test_few_programs_serve_all_lengths(monkeypatch):
    monkeypatch.setattr(score_module, "LOGITS_BYTES", 4 * V * 16 * 5)  # 4 rows of 16 tokens, 2 of 24
    lengths = [1, 3, 7, 15, 16, 17, 20, 23, 24, 5, 6]
    batches = list(score_module._batches(lengths, CONTEXT, V))
    assert sorted(index for rows, _, _ in batches for index in rows) == list(range(len(lengths)))
    assert all(lengths[index] <= T for rows, T, _ in batches for index in rows)
    assert {(T, size) for _, T, size in batches} == {(16, 4), (24, 2)}


@pytest.mark.parametrize(
    ("contexts", "continuations", "message"),
    [
        ([[1], [2]], [[3]], "there are 2 contexts, but 1 continuations"),
        ([[]], [[3]], "at least one per row"),
        ([[1]], [[]], "at least one per row"),
        ([[1]], [[V]], "not in the vocabulary"),
        ([[1]], [[0.5]], "must be integers"),
        ([[1]], [[3] * (CONTEXT + 1)], "25 tokens is longer than context_length = 24"),
    ],
)
def test_what_cannot_be_scored_is_refused(contexts, continuations, message):
    with pytest.raises(
        UserError if "integers" not in message and "vocab" not in message else ValueError, match=message
    ):
        fd.score(*make(), contexts, continuations)
