import contextlib
import functools
import importlib
import itertools

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.errors import UserError
from flax_decoder.generation.sampling import Sampling
from flax_decoder.generation.steps import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    SHORT_PREFILL_TOKENS,
    batch_capacity,
    cache_capacity,
)
from flax_decoder.generation.stream import stream, supports_rolling_context

stream_module = importlib.import_module("flax_decoder.generation.stream")
steps = importlib.import_module("flax_decoder.generation.steps")

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
    "window": {"model.positions": "rotary", "model.num_layers": 2, "model.window": 3},
    "sinusoidal": {"model.positions": "sinusoidal"},
    "none": {"model.positions": "none"},
}


@functools.cache
def make(kind="learned", **changes):
    changes = {f"model.{name}": value for name, value in changes.items()}
    model = fd.Decoder(fd.load_config(None, BASE | KINDS[kind] | changes).model)
    return model, jax.jit(model.init)(jax.random.key(1), np.zeros((1, 1), np.int32))["params"]


def prompts(B, T, seed=0):
    return np.random.default_rng(seed).integers(0, V, (B, T), np.int32)


@contextlib.contextmanager
def rolling(config):
    """Every layer has a window, at most as long as the context: the rule for texts that outgrow it."""
    windows = tuple(min(window or config.context_length, config.context_length) for window in config.windows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "windows", property(lambda self: windows))
        yield


@functools.cache
def forward_of(model):
    """The model without a cache, compiled once for all that compare with it; the windows are part of the program."""

    @functools.partial(jax.jit, static_argnums=0)
    def forward(windows, params, tokens_BT):
        return model.apply({"params": params}, tokens_BT)

    return lambda params, tokens_BT: forward(model.config.windows, params, tokens_BT)


def plain_greedy(model, params, texts, max_new_tokens, repetition_penalty=1, presence_penalty=0, frequency_penalty=0):
    """Computes the whole text again for each token, without a cache, each row by itself: the rule in its plainest form.

    Relative positions let the context roll over the text. Others end with it: where the text would outgrow the
    context, it starts again at the last half of it.
    """
    context, texts, starts = model.config.context_length, list(texts), np.zeros(len(texts), int)
    num_prompt_tokens = list(map(len, texts))
    width = max(num_prompt_tokens) + max_new_tokens if supports_rolling_context(model.config) else context
    for _ in range(max_new_tokens):
        starts = [
            start if len(text) - start <= width else len(text) - max(context // 2, 1)
            for text, start in zip(texts, starts, strict=True)
        ]
        windows = [text[start:] for text, start in zip(texts, starts, strict=True)]
        # Padded to one length, so that one program is compiled; padding is not seen.
        padded_BT = np.stack([np.pad(window, (0, width - len(window))) for window in windows])
        with rolling(model.config):
            logits_BTV = np.array(forward_of(model)(params, padded_BT))
        for row, window in enumerate(windows):
            logits_V = logits_BTV[row, len(window) - 1]
            for token in set(texts[row].tolist()):
                logits_V[token] *= repetition_penalty if logits_V[token] < 0 else 1 / repetition_penalty
            count_V = np.bincount(texts[row][num_prompt_tokens[row] :], minlength=V)
            logits_V -= presence_penalty * (count_V > 0) + frequency_penalty * count_V
            texts[row] = np.append(texts[row], np.int32(logits_V.argmax()))
    return texts


def assert_equal_rows(ours, expected):
    """The same, for rows of different lengths."""
    assert [row.tolist() for row in map(np.asarray, ours)] == [row.tolist() for row in map(np.asarray, expected)]


def record_prefill(monkeypatch):
    """A list that will have, for each chunk that is prefilled, the number of tokens of each row."""
    counts, prefill_chunk = [], steps.prefill_chunk

    def recorded(*args):
        counts.append(args[-1].tolist())
        return prefill_chunk(*args)

    monkeypatch.setattr(steps, "prefill_chunk", recorded)
    return counts


@pytest.mark.short("12-learned", "30-rotary grouped", "12-alibi window", "12-sinusoidal")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_prompt_tokens", [1, 11, 12, 30])
def test_greedy_text_equals_a_plain_loop_past_the_context(kind, num_prompt_tokens):
    model, params = make(kind)
    prompt_BT = prompts(6, num_prompt_tokens)
    tokens_BT = fd.generate(model, params, prompt_BT, max_new_tokens=26, temperature=0.0)
    assert tokens_BT.dtype == np.int32
    assert_equal_rows(tokens_BT, plain_greedy(model, params, prompt_BT, 26))
    assert len(np.unique(tokens_BT[:, num_prompt_tokens:])) > 3  # not one token over and over, which would hide much


@pytest.mark.short("learned")
@pytest.mark.parametrize("kind", ["learned", "rotary grouped", "alibi window"])
def test_ten_times_the_context_in_constant_memory(kind, monkeypatch):
    sizes, decode = set(), steps.decode_chunk

    def recorded(model, params, state, **options):
        sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        return decode(model, params, state=state, **options)

    monkeypatch.setattr(steps, "decode_chunk", recorded)
    model, params = make(kind)
    tokens_BT = fd.generate(model, params, prompts(2, 3), max_new_tokens=110, temperature=0.0)
    assert_equal_rows(tokens_BT, plain_greedy(model, params, prompts(2, 3), 110))
    assert len(sizes) == 1


@functools.cache
def two_hundred_prompts(context):
    """Lengths at, below and above the ends of chunks and of the context."""
    edges = [end + offset for end in (SHORT_PREFILL_TOKENS, PREFILL_TOKENS, context) for offset in (-3, -1, 0, 1)]
    rng = np.random.default_rng(7)
    lengths = [1, 2, *edges, *rng.integers(1, 2 * context, 198 - len(edges))]
    return [rng.integers(0, V, length).astype(np.int32) for length in lengths]


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_ragged_prompts_equal_the_model_without_a_cache(kind):
    """A row's tokens depend on neither its neighbours nor padding: the reference knows each row alone."""
    model, params = make(kind, context_length=71)
    ours = fd.generate(model, params, two_hundred_prompts(71), 5, temperature=0.0)
    assert isinstance(ours, list)
    assert_equal_rows(ours, plain_greedy(model, params, two_hundred_prompts(71), 5))


def test_a_context_of_one_token():
    model, params = make("none", context_length=1)
    tokens_BT = fd.generate(model, params, prompts(2, 3), max_new_tokens=4, temperature=0.0)
    assert_equal_rows(tokens_BT, plain_greedy(model, params, prompts(2, 3), 4))


def test_the_text_does_not_depend_on_how_much_of_it_is_asked_for():
    """Chunks end at different positions for each length."""
    model, params = make("rotary grouped", context_length=3 * DECODE_TOKENS)
    rng, prompt_BT = jax.random.key(5), prompts(2, 3)
    longest = 2 * DECODE_TOKENS + 3
    whole_BT = np.asarray(fd.generate(model, params, prompt_BT, longest, rng))
    for length in (0, 1, 2, DECODE_TOKENS, DECODE_TOKENS + 1, 2 * DECODE_TOKENS + 1):
        np.testing.assert_array_equal(fd.generate(model, params, prompt_BT, length, rng), whole_BT[:, : 3 + length])


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        ([0.0095], [1, 1, 3, 3, 9, 9, 28, 28, 55]),  # 0.03 seconds are 3.2 times as much
        ([0.04], [1] * 137),
        ([0.0001] * 5 + [0.96], [1, 1, 64, 64, 2, 2, 1, 1, 1]),  # a slow chunk is followed by a smaller one
    ],
)
def test_streamed_chunks_take_as_long_as_the_eye_does_not_notice(seconds, sizes, monkeypatch):
    # A clock that advances at each call: two calls per chunk, and one chunk is always computed ahead.
    clock = itertools.accumulate(itertools.chain(seconds, itertools.repeat(seconds[-1])))
    monkeypatch.setattr(stream_module.time, "perf_counter", lambda: next(clock))
    model, params = make("rotary grouped", context_length=3 * DECODE_TOKENS)
    rng, prompt_BT = jax.random.key(5), prompts(2, 3)
    pieces = [chunk.tokens_BC for chunk in stream(model, params, list(prompt_BT), 137, rng, Sampling())]
    assert [piece.shape[1] for piece in pieces] == sizes
    expected_BT = fd.generate(model, params, prompt_BT, 137, rng)
    np.testing.assert_array_equal(np.concatenate([prompt_BT, *pieces], axis=1), expected_BT)


def test_the_seed_makes_the_text():
    model, params = make()
    prompt_BT = prompts(2, 3)

    def text(seed):
        return fd.generate(model, params, prompt_BT, 20, jax.random.key(seed), temperature=1.5).tolist()

    assert text(0) == text(0)
    assert text(0) != text(1)


def test_each_token_is_drawn_anew():
    """So hot that logits do not matter: a random key that came twice would draw the same token twice."""
    model, params = make("rotary grouped", context_length=3 * DECODE_TOKENS)
    tokens = fd.generate(model, params, prompts(1, 3), 2 * DECODE_TOKENS, jax.random.key(0), temperature=1e9)[0, 3:]
    # 32 draws of 23 tokens show about 23 (1 - (22/23)^32) = 17 of them.
    assert len(set(tokens.tolist())) > 12
    assert tokens[:DECODE_TOKENS].tolist() != tokens[DECODE_TOKENS:].tolist()


@pytest.mark.parametrize(
    "penalties", [{"repetition_penalty": 2.0}, {"presence_penalty": 0.7, "frequency_penalty": 0.4}], ids=str
)
def test_penalties_count_the_prompt_and_the_new_text(penalties):
    model, params = make()
    prompt_BT = prompts(2, 4)
    tokens_BT = fd.generate(model, params, prompt_BT, 20, temperature=0.0, **penalties)
    assert_equal_rows(tokens_BT, plain_greedy(model, params, prompt_BT, 20, **penalties))
    assert not np.array_equal(tokens_BT, plain_greedy(model, params, prompt_BT, 20))


@pytest.mark.short("None")
@pytest.mark.parametrize("draft", [None, fd.PromptLookup(3)], ids=str)
def test_a_bfloat16_model_generates_what_it_would_without_a_cache(draft):
    model, params = make("rotary grouped", dtype="bfloat16", context_length=64)
    prompt_BT = prompts(3, 5)
    tokens_BT = np.asarray(fd.generate(model, params, prompt_BT, 12, temperature=0.0, draft=draft))
    logits_BTV = np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT[:, :-1]))[:, 4:]
    chosen_BT = np.take_along_axis(logits_BTV, tokens_BT[:, 5:, None], axis=2)[:, :, 0]
    # Rounded to 8 bits, in other shapes: the chosen token is the likeliest, or nearly.
    assert (logits_BTV.max(-1) - chosen_BT).max() <= 2**-5 * np.abs(logits_BTV).max()
    assert len(np.unique(tokens_BT[:, 5:])) > 4


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (np.zeros((2, 0), np.int32), {}, "at least one"),
        (np.zeros((0, 2), np.int32), {}, "at least one"),
        (np.zeros(3, np.int32), {}, r"\(B, T\)"),
        ([[1, 2], []], {}, "at least one per row"),
        ([[1]], {"num_samples": 0}, "num_samples = 0"),
        ([[1]], {"bad_tokens": (V,)}, f"bad_tokens: token id {V}"),
        ([[0, V]], {}, f"token id {V} is not in the vocabulary: 0 to 22"),
        ([[-1, 0]], {}, "token id -1 is not"),
        ([[0.5, 1.0]], {}, "must be integers"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens = -1"),
        ([[1]], {"temperature": 1}, "needs rng"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompt, options, message):
    model, params = make()
    with pytest.raises(ValueError, match=message):
        fd.generate(model, params, prompt, **{"max_new_tokens": 3, "temperature": 0} | options)


def test_the_result_is_the_same_whatever_the_batch():
    """The key of a row is made of its prompt and the number of the sample, not of its neighbours or its index."""
    model, params = make("rotary grouped")
    rng = jax.random.key(0)
    one, two, three = prompts(3, 4)
    alone = np.asarray(fd.generate(model, params, two[None], 9, rng, num_samples=3))
    assert len({tuple(row) for row in alone.tolist()}) == 3
    among = fd.generate(model, params, [three, two, one[:2], two, two], 9, rng)
    np.testing.assert_array_equal([among[1], *among[3:]], alone)
    pairs = np.asarray(fd.generate(model, params, np.stack([one, two]), 9, rng, num_samples=2))
    np.testing.assert_array_equal(pairs[2:], alone[:2])
    # and rows with different prompts do not share their randomness
    hot = np.asarray(fd.generate(model, params, np.stack([one, two]), 30, rng, temperature=1e9))[:, 4:]
    assert (hot[0] == hot[1]).mean() < 0.3


def test_samples_of_a_prompt_share_its_prefill(monkeypatch):
    counts = record_prefill(monkeypatch)
    model, params = make("alibi window")
    fd.generate(model, params, prompts(2, 5), 3, jax.random.key(0), num_samples=7)
    assert counts == [[5, 5] + [0] * 6]


def test_an_end_token_ends_its_row():
    model, params = make()
    prompt_BT = prompts(3, 3)
    plain_BT = np.asarray(fd.generate(model, params, prompt_BT, 40, temperature=0.0))
    end = plain_BT[0, 9]
    ended_BT = np.asarray(fd.generate(model, params, prompt_BT, 40, temperature=0.0, end_ids=[V - 1, end]))
    for plain_T, ended_T in zip(plain_BT, ended_BT, strict=True):
        places = 3 + np.flatnonzero(np.isin(plain_T[3:], [V - 1, end]))
        first = places[0] if len(places) else 42
        np.testing.assert_array_equal(ended_T[: first + 1], plain_T[: first + 1])
        assert (ended_T[first:] == ended_T[first]).all()
    assert (ended_BT[0, 9:] == end).all() and (ended_BT[0] != plain_BT[0]).any()


def test_no_more_is_computed_when_all_rows_have_ended():
    model, params = make("rotary grouped", context_length=200)
    prompt_BT = prompts(2, 3)
    first_B = np.asarray(fd.generate(model, params, prompt_BT, 1, temperature=0.0))[:, -1]
    ends = first_B.tolist()
    chunks = list(stream(model, params, list(prompt_BT), 150, None, Sampling(temperature=0), end_ids=ends))
    assert sum(chunk.tokens_BC.shape[1] for chunk in chunks) <= 1 + 2 + DECODE_TOKENS
    tokens_BT = np.asarray(fd.generate(model, params, prompt_BT, 150, temperature=0.0, end_ids=ends))
    assert tokens_BT.shape == (2, 153) and (tokens_BT[:, 3:] == first_B[:, None]).all()


def test_completions_know_their_log_probabilities():
    model, params = make("rotary grouped")
    texts, rng = [prompts(1, 3)[0], prompts(1, 6, seed=1)[0]], jax.random.key(2)
    options = {"temperature": 1.7, "top_k": 9, "repetition_penalty": 1.3}
    rows = fd.generate(model, params, texts, 5, rng, num_samples=2, **options)
    completions = fd.complete(model, params, texts, 5, rng, num_samples=2, top_logprobs=3, **options)
    assert [len(samples) for samples in completions] == [2, 2]
    for row, completion in zip(rows, [one for samples in completions for one in samples], strict=True):
        num_prompt_tokens = len(row) - 5
        np.testing.assert_array_equal(completion.tokens, row[num_prompt_tokens:])
        padded_BT = np.pad(row, (0, 11 - len(row)))[None]  # to one length, so that one program is compiled
        logits_TV = forward_of(model)(params, padded_BT)[0, num_prompt_tokens - 1 : len(row) - 1]
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
        # The same float32 products in other shapes.
        np.testing.assert_allclose(completion.logprobs, logprobs_TV[np.arange(5), completion.tokens], atol=1e-4)
        np.testing.assert_array_equal(completion.top_tokens, np.argsort(-logprobs_TV)[:, :3])
        np.testing.assert_allclose(completion.top_logprobs, -np.sort(-logprobs_TV)[:, :3], atol=1e-4)
        assert not completion.ended


@pytest.mark.full
def test_padding_of_the_vocabulary_is_not_among_the_likeliest():
    model, params = make("rotary grouped")
    texts, num_ids = [prompts(1, 3)[0] % 4], 5
    ((completion,),) = fd.complete(model, params, texts, 5, temperature=0.0, top_logprobs=num_ids, vocab_size=num_ids)
    assert (np.sort(completion.top_tokens) == np.arange(num_ids)).all() and np.isfinite(completion.top_logprobs).all()
    assert (completion.top_tokens[:, 0] == completion.tokens).all()
    with pytest.raises(fd.UserError, match="top_logprobs"):
        fd.complete(model, params, texts, 5, temperature=0.0, top_logprobs=num_ids + 1, vocab_size=num_ids)


def test_a_completion_is_cut_behind_its_end():
    model, params = make()
    new = np.asarray(fd.generate(model, params, prompts(1, 3), 20, temperature=0.0))[0, 3:]
    ((completion,),) = fd.complete(model, params, prompts(1, 3), 20, temperature=0.0, end_ids=[int(new[6])])
    length = new.tolist().index(new[6]) + 1
    assert completion.ended and completion.tokens.tolist() == new[:length].tolist()
    assert completion.logprobs.shape == (length,) and completion.top_logprobs.shape == (length, 0)
    ((nothing,),) = fd.complete(model, params, prompts(1, 3), 0, temperature=0.0)
    assert len(nothing.tokens) == 0 and not nothing.ended


@pytest.mark.full
@pytest.mark.parametrize("kind", ["learned", "rotary grouped", "alibi window", "window"])
@pytest.mark.parametrize("num_prefix_tokens", [1, 8, 10, 30])
def test_a_prefix_changes_nothing_but_the_time(kind, num_prefix_tokens):
    model, params = make(kind, context_length=40)
    text = prompts(1, num_prefix_tokens)[0]
    prefix = fd.prefill(model, params, text)
    longer = np.append(text, 3), np.append(text, prompts(1, 90, seed=4))
    for row in (text, *longer, text[:-1], text[: len(text) // 2]):
        if len(row) > 0:
            expected = fd.generate(model, params, row[None], 6, temperature=0.0)
            assert_equal_rows(fd.generate(model, params, row[None], 6, temperature=0.0, prefix=prefix), expected)
    batch = [np.append(text, 3), np.append(text, [5, 1, 2])]
    expected = fd.generate(model, params, batch, 6, temperature=0.0)
    assert_equal_rows(fd.generate(model, params, batch, 6, temperature=0.0, prefix=prefix), expected)
    longer = fd.prefill(model, params, batch[1], prefix=prefix)
    np.testing.assert_allclose(longer.logits_BV, fd.prefill(model, params, batch[1]).logits_BV, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_where_turns_depend_on_the_length_a_text_is_as_if_it_were_alone(scaling):
    """Beyond the original context, whatever stands beside it, behind it or was computed before."""
    settings = {"context_length": 97, "rotary_scaling": scaling, "rotary_original_context": 40, "head_dim": 4}
    settings |= (
        {"rotary_short_factors": (1.0, 1.3), "rotary_long_factors": (3.0, 90.0)} if scaling == "longrope" else {}
    )
    model, params = make("rotary grouped", **settings)
    texts = [prompts(1, length, seed=length)[0] for length in (37, 39, 40, 41, 70)]
    alone = [fd.generate(model, params, text[None], 7, temperature=0.0)[0] for text in texts]
    assert_equal_rows(fd.generate(model, params, texts, 7, temperature=0.0), alone)
    for text, expected in zip(texts, alone, strict=True):
        logits_1TV = np.asarray(model.apply({"params": params}, text[None]))
        for length in (20, len(text) - 1):
            prefix = fd.prefill(model, params, text[:length])
            np.testing.assert_array_equal(
                fd.generate(model, params, text[None], 7, temperature=0.0, prefix=prefix)[0], expected
            )
        np.testing.assert_allclose(fd.prefill(model, params, text).logits_BV[0], logits_1TV[0, -1], atol=1e-4)
        if scaling == "longrope":  # its text is that of the model without a cache
            whole = text
            for _ in range(7):
                logits_1TV = np.asarray(model.apply({"params": params}, whole[None]))
                whole = np.append(whole, logits_1TV[0, -1].argmax())
            np.testing.assert_array_equal(whole, expected)
    others = [text[-1:] for text in texts]
    scores, _ = fd.score(model, params, [text[:-1] for text in texts], others)
    for text, found in zip(texts, scores, strict=True):
        log_probs_TV = jax.nn.log_softmax(model.apply({"params": params}, text[None, :-1])[0])
        np.testing.assert_allclose(found, log_probs_TV[-1, text[-1]], rtol=1e-4)
    with pytest.raises(fd.UserError, match=f'rotary_original_context = 40; with rotary_scaling = "{scaling}"'):
        fd.generate(model, params, texts[:1], 3, temperature=0.0, draft=fd.PromptLookup(4))


def test_a_prefix_is_not_prefilled_again(monkeypatch):
    counts = record_prefill(monkeypatch)
    model, params = make("rotary grouped", context_length=200)
    text = prompts(1, 150)[0]
    prefix = fd.prefill(model, params, text)
    fd.generate(model, params, np.append(text, [1, 2])[None], 4, temperature=0, prefix=prefix)
    fd.generate(model, params, np.append(text[:100], 1)[None], 4, temperature=0, prefix=prefix)
    assert counts == [[128], [22], [2], [1]]


def test_bad_tokens_never_come_and_forced_ones_first():
    model, params = make()
    plain = np.asarray(fd.generate(model, params, prompts(2, 3), 30, temperature=0.0))[:, 3:]
    bad = tuple(set(plain[:, 5].tolist()))
    options = {"temperature": 0.0, "bad_tokens": bad, "forced_tokens": (4, 0, 9)}
    tokens = np.asarray(fd.generate(model, params, prompts(2, 3), 30, **options))[:, 3:]
    assert tokens[:, :3].tolist() == [[4, 0, 9]] * 2
    assert not np.isin(tokens[:, 3:], bad).any() and np.isin(plain, bad).any()


@pytest.mark.parametrize("num_batches", [12, pytest.param(60, marks=pytest.mark.full)])
def test_two_hundred_prompts_compile_few_programs(num_batches):
    """Lengths, sizes of the batch and numbers of the settings all change; nothing compiles beside, not even eagerly."""
    # A model for each case: what another one has compiled is not compiled again.
    model, params = make("rotary grouped", context_length=150, mlp_dim=num_batches + 1)
    rng = np.random.default_rng(0)
    settings = [{"temperature": t, "top_p": p, "top_k": k} for t, p, k in ((0.7, 0.9, 5), (1.3, 0.5, 7), (1.0, 0.8, 8))]
    key = jax.random.key(0)
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for number in range(num_batches):
            batch = [rng.integers(0, V, rng.integers(1, 145)) for _ in range(1 + number % 7)]
            fd.complete(model, params, batch, int(rng.integers(1, 40)), key, **settings[number % 3])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # One to unstack the params; reading and writing for a batch of 1, with pieces of two lengths, and of 8.
    assert 1 <= len(compiled) <= 6


def test_a_long_context_costs_no_memory_for_a_short_text():
    """A model made for 100,000 tokens would else need gigabytes to write ten."""
    config = fd.load_config(None, BASE | {"model.context_length": 99_991, "model.embed_dim": 768}).model
    assert cache_capacity(config, 10) == cache_capacity(config, 256) == 256
    assert [cache_capacity(config, n) for n in (257, 1024, 1025, 70_000)] == [1024, 1024, 4096, 99_991]
    assert [batch_capacity(n) for n in (1, 2, 8, 9, 32, 33)] == [1, 8, 8, 32, 32, 128]


def test_the_decode_loop_copies_no_cache():
    """What a step needs beside cache and weights does not grow with the slots."""

    def temporary_bytes(capacity):
        model, params = make("rotary grouped", context_length=4096, num_layers=3)
        cache, logits_BV = steps.empty_prefill(model, 8, capacity)
        state = steps.DecodeState(cache, logits_BV, np.zeros(8, np.int32), np.zeros(8, bool), None)
        filters = Sampling(temperature=0).filters(V)
        arguments = (model, fd.unstack_layers(params), state, filters, None, np.zeros((8, 2), np.uint32), None, 0, 16)
        return steps.decode_chunk.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    # Scores and weights of one layer at a time: 3 query heads in 8 rows, and what goes with them.
    assert temporary_bytes(4096) - temporary_bytes(1024) < 8 * 3072 * 4 * 3 * 6


@pytest.mark.parametrize("name", ["generate", "complete", "prefill"])
@pytest.mark.parametrize("traced", ["params", "prompt"])
def test_inside_of_a_transformation_generation_says_where_it_runs(name, traced):
    model, params = make()

    def call(params, prompts_BT):
        arguments = (prompts_BT[0],) if name == "prefill" else (prompts_BT, 3)
        options = {} if name == "prefill" else {"temperature": 0.0}
        return getattr(fd, name)(model, params, *arguments, **options)

    with pytest.raises(UserError, match=f"{name} runs a compiled loop of its own: call it outside of jax.jit"):
        if traced == "params":
            jax.jit(lambda params: call(params, prompts(2, 5)))(params)
        else:
            jax.vmap(lambda prompts_BT: call(params, prompts_BT))(prompts(2, 5)[None])
