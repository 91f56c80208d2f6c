"""The lens page: its numbers are the model's, also in a real browser, where clicks and keys work.

The tests of the browser need Playwright and Chromium, and are skipped without them, unless REQUIRE_BROWSER=1.
"""

import functools
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import reference
from shape_names import checked_shape_names
from test_attribution import ORDERS
from test_decoder import SIZES
from test_packing import unpack

import flax_decoder as fd
from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer
from flax_decoder.lens import page_data as page_data_module
from flax_decoder.lens.history import History
from flax_decoder.lens.origins import score_origins
from flax_decoder.lens.page import MAX_TOKENS, render
from flax_decoder.lens.page_data import SCORES, page_data, token_texts

# Among the characters are those that HTML, JavaScript and terminals act on, and some that cannot be seen.
TOKENIZER = CharTokenizer("</script>&\"'\x1b\u202e\u200d \n\tab`${}")
PROMPT = "a </script>\n<b>a </s\u202e"
MODELS = ORDERS | {
    "llama": {"positions": "rotary", "norm": "rmsnorm", "feed_forward": "swiglu", "qk_norm": "head"},
    "gemma": {"positions": "rotary", "window": 4, "window_pattern": (True, False), "attention_soft_cap": 2.3},
    "bloom": {"positions": "alibi", "attention_scale": 0.4, "num_kv_heads": None, "attention_out_bias": True},
}
LAYER, HEAD, QUERY = 1, 4, 9


@functools.cache
def make(name):
    config = ModelConfig(**SIZES | {"context_length": 29, "vocab_size": TOKENIZER.vocab_size} | MODELS[name])
    model = fd.Decoder(config)
    return model, reference.random_params(model)


def tokens_T():
    return np.array(TOKENIZER.encode(PROMPT), np.int32)


@functools.cache
def look(name):
    """What the library says of the prompt, as NumPy arrays."""
    model, params = make(name)
    return {key: np.asarray(array) for key, array in fd.capture(model, params, tokens_T()[None]).items()}


def history(name):
    seen = look(name)
    weights_LNTS = seen["weights"][:, 0].astype(np.float16)
    q_LTNH, k_LTKH = seen["q_rotated"][:, 0].astype(np.float16), seen["k_rotated"][:, 0].astype(np.float16)
    flat_LNTS = np.broadcast_to(np.tril(np.ones(weights_LNTS.shape[2:])), weights_LNTS.shape)
    flat_LNTS = (flat_LNTS / flat_LNTS.sum(-1, keepdims=True)).astype(np.float16)
    snapshots = [flat_LNTS, 0.5 * flat_LNTS + 0.5 * weights_LNTS, weights_LNTS]
    twice = [np.stack([array] * 3) for array in (q_LTNH, k_LTKH)]
    return History(np.array([0, 100, 200]), tokens_T(), *twice, np.stack(snapshots))


@functools.cache
def data_of(name):
    model, params = make(name)
    return page_data(model, params, TOKENIZER, tokens_T(), history(name))


# ---- the numbers


@pytest.mark.short("pre")
@pytest.mark.parametrize("name", MODELS)
def test_the_packed_arrays_are_the_model_s(name):
    seen, data = look(name), data_of(name)
    arrays = {key: unpack(packed) for key, packed in data["arrays"].items()}
    for key, source in (("q", "q_rotated"), ("k", "k_rotated"), ("v", "v")):
        np.testing.assert_allclose(arrays[key], seen[source][:, 0].swapaxes(1, 2), atol=2e-4)
    T = len(tokens_T())
    rows, columns = np.tril_indices(T)
    scores = seen["scores"][:, 0][..., rows, columns]
    np.testing.assert_allclose(arrays["scores"], np.where(np.isneginf(scores), 0, scores), atol=2e-4)
    found = fd.head_scores(seen["weights"], tokens_T()[None])
    np.testing.assert_allclose(
        arrays["head_scores"], np.nan_to_num(np.stack([found[key] for key in SCORES]), nan=-1), atol=2e-5
    )
    assert_targets(seen["logits"][0], arrays["targets"].astype(int))
    assert_parts(name, arrays)
    np.testing.assert_allclose(arrays["history_weights"], history(name).weights_MLNTS[..., rows, columns], atol=6e-4)
    assert data["history"]["steps"] == [0, 100, 200]


def assert_targets(logits_TV, targets):
    """The likeliest token, and the one that came, or the runner-up where that is the same or nothing came."""
    order = np.argsort(-logits_TV)
    for t, next_token in enumerate([*tokens_T()[1:], -1]):
        second = order[t, 1] if next_token in (order[t, 0], -1) else next_token
        assert targets[:, t].tolist() == [order[t, 0], second]


def assert_parts(name, arrays):
    """Each part is that of `fd.attribute`, and all parts sum to the model's logit."""
    model, params = make(name)
    for which in (0, 1):
        parts = fd.attribute(model, params, tokens_T()[None], arrays["targets"][which].astype(np.int32)[None])
        for key in ("token", "position", "bias", "soft_cap", "logit"):
            np.testing.assert_allclose(arrays[f"part_{key}"][which], getattr(parts, f"{key}_BT")[0], atol=2e-5)
        np.testing.assert_allclose(arrays["part_heads"][which], parts.heads_LBNTS[:, 0].sum(-1), atol=2e-5)
        np.testing.assert_allclose(arrays["part_feed_forward"][which], parts.feed_forward_LBT[:, 0], atol=2e-5)
        rows, columns = np.tril_indices(len(tokens_T()))
        np.testing.assert_allclose(
            arrays["part_sources"][which], parts.heads_LBNTS[:, 0][..., rows, columns], atol=2e-4
        )


def guesses(name):
    """The probabilities after each layer, in NumPy: the final norm and the head on the residual stream."""
    model, params = make(name)
    config, seen = model.config, look(name)
    streams = np.concatenate([seen["embeddings"], seen["residual"][:, 0]])
    if config.final_norm:
        streams = np.array([[reference.norm(x, params["final_norm"], config) for x in stream] for stream in streams])
    logits = streams @ np.asarray(params["embedding"].T if config.tied_head else params["head"])
    logits += np.asarray(params["head_bias"]) if config.head_bias else 0.0
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * np.tanh(logits / config.logit_soft_cap)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.mark.short("pre")
@pytest.mark.parametrize("name", ["pre", "both", "rms"])
def test_guesses_after_each_layer(name):
    arrays, shares = data_of(name)["arrays"], guesses(name)
    tokens, given = unpack(arrays["guess_tokens"]).astype(int), unpack(arrays["guess_shares"])
    np.testing.assert_allclose(given, -np.sort(-shares)[..., :10], atol=2e-5)
    np.testing.assert_allclose(given, np.take_along_axis(shares, tokens, -1), atol=2e-5)


@pytest.mark.full
def test_a_large_vocabulary_shows_the_tokens_of_the_page():
    settings = {"vocab_size": 1500, "num_kv_heads": 6}
    model = fd.Decoder(ModelConfig(**SIZES | settings))
    data = page_data(model, reference.random_params(model), None, np.array([7, 1300, 7], np.int32), None)
    pushed = set(unpack(data["arrays"]["push_tokens"]).astype(int).ravel().tolist())
    shown = {7, 1300} | {
        int(token) for name in ("guess_tokens", "targets") for token in unpack(data["arrays"][name]).ravel()
    }
    assert not data["model"]["pushes_all"]
    assert 8 < data["model"]["num_candidates"] <= 10 * 3 + 5
    assert pushed <= shown
    assert data["texts"][1300] == "#1300"


@pytest.mark.full
def test_a_vocabulary_of_one_token():
    model = fd.Decoder(ModelConfig(**SIZES | {"vocab_size": 1}))
    data = page_data(model, reference.random_params(model), None, np.zeros(3, np.int32), None)
    assert unpack(data["arrays"]["targets"]).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_tokens_have_the_text_they_have_within_a_text():
    class Stripping(CharTokenizer):
        """As tokenizers of the kind of Llama's, which leave out a space at the beginning."""

        def _decode(self, ids):
            return super()._decode(ids).removeprefix(" ")

    tokenizer = Stripping("ab ")
    assert token_texts(tokenizer, np.array([0, 1, 2, 5]), np.array([1])) == {0: " ", 1: "a", 2: "b", 5: "<id 5>"}


@pytest.mark.parametrize("prompt", [[104, 105], [104, 0xC3], [104, 258], [258]])
def test_a_vocabulary_larger_than_the_tokenizer(tmp_path, prompt):
    """Whatever the prompt ends with: text, half a character, or an id that the tokenizer does not have.

    Only the prompt can have such ids: they are not ranked, though this model likes them best.
    """
    model = fd.Decoder(ModelConfig(**SIZES | {"vocab_size": 259, "tied_head": False}))
    path = tmp_path / "x.html"
    params = reference.random_params(model)
    params["head"] = np.array(params["head"])
    params["head"][:, 256:] *= 50
    fd.write_lens_page(path, model, params, ByteTokenizer(), np.array(prompt))
    assert set(re.findall(r"\\u003cid (\d+)", path.read_text())) == ({"258"} if 258 in prompt else set())
    texts = token_texts(ByteTokenizer(), np.array([104, 256, 258]), np.array(prompt))
    assert texts == {104: "h", 256: "<id 256>", 258: "<id 258>"}


def test_names_of_arrays_are_right():
    jax.clear_caches()
    model, params = make("pre")
    with checked_shape_names() as functions:
        page_data(model, params, TOKENIZER, tokens_T(), history("pre"))
    assert functions >= {"page_data.py:page_data", "page_data.py:_arrays", "page_data.py:_history_arrays"}


# ---- the file


def refusal(tmp_path, *arguments, error=fd.UserError, **changes):
    model, params = make("pre")
    settings = {"path": tmp_path / "x.html", "tokens_T": tokens_T()} | changes
    with pytest.raises(error) as raised:
        fd.write_lens_page(settings.pop("path"), model, params, TOKENIZER, settings.pop("tokens_T"), **settings)
    assert list(tmp_path.iterdir()) == []
    return str(raised.value)


def test_refusals(tmp_path):
    assert "no tokens" in refusal(tmp_path, tokens_T=[])
    assert "30 tokens, more than the model's 29" in refusal(tmp_path, tokens_T=[1] * 30)
    too_many = [1] * (MAX_TOKENS + 1)
    assert f"{MAX_TOKENS + 1} tokens, and a page at most {MAX_TOKENS}" in refusal(tmp_path, tokens_T=too_many)
    assert "(1, 2)" in refusal(tmp_path, tokens_T=[[1, 2]])
    assert "token id 99" in refusal(tmp_path, tokens_T=[99], error=ValueError)
    assert "must name a file" in refusal(tmp_path, path=tmp_path)
    assert "must name a file" in refusal(tmp_path, path=tmp_path / "missing" / "x.html")
    other = history("pre")
    other = History(other.steps_M, other.tokens_T, other.q_MLTNH, other.k_MLTKH, other.weights_MLNTS[:, :1])
    assert "(1, 6) layers and heads" in refusal(tmp_path, history=other)


def test_a_model_whose_numbers_are_not_finite(tmp_path):
    model, params = make("pre")
    broken = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), params)
    with pytest.raises(fd.UserError, match="not finite"):
        fd.write_lens_page(tmp_path / "x.html", model, broken, TOKENIZER, tokens_T())
    assert list(tmp_path.iterdir()) == []


def test_no_text_gets_out_of_the_data():
    page = render(data_of("pre"))
    assert page.count("</script>") == 2
    assert "/*{" not in page
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(embedded[1])["texts"] == {str(id): text for id, text in data_of("pre")["texts"].items()}
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")


# ---- in the browser


@pytest.fixture(scope="module")
def browser():
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        chromium = None
    if chromium is None:
        assert os.environ.get("REQUIRE_BROWSER") != "1", "Playwright or Chromium is missing"
        pytest.skip('the browser tests need pip install "flax-decoder[browser]" and Chromium')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens the page of a model; at the end it must have complained of nothing and asked nobody for anything."""
    contexts, complaints, requests = [], [], []

    def open_it(name="pre", width=1280, height=900, scheme="light", history_too=True):
        data = data_of(name) if history_too else data_of(name) | {"history": None}
        (tmp_path / "lens.html").write_text(render(data), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "lens.html").as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
    assert requests == [(tmp_path / "lens.html").as_uri()] * len(contexts)


def choose(page, layer=LAYER, head=HEAD, query=QUERY):
    page.locator(f'#heads [data-head="{layer}.{head}"]').click()
    page.locator(f'[data-token="{query}"]').click()


def number(text):
    return float(text.replace("\u2212", "-").replace("\u00a0%", "").replace("%", "").replace("+", "").strip())


def assert_shown(text, true, slack=1e-4):
    """A number as text is the array's, rounded to the digits it has; `slack` is what packing may take."""
    digits = len(text.replace("\u00a0%", "").partition(".")[2])
    assert abs(number(text) - true) <= 0.5 * 10.0**-digits + slack, (text, true)


def texts(locator):
    return [text.strip() for text in locator.all_text_contents()]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_shown_are_the_arrays(open_page, name):
    page, seen = open_page(name), look(name)
    choose(page)
    for button in page.get_by_role("button", name="Show all").all():  # none if there are few sources
        button.click()
    model, _ = make(name)
    config = model.config
    q_H = seen["q_rotated"][LAYER, 0, QUERY, HEAD]
    kv_head = HEAD * config.kv_heads // config.num_heads
    scale = config.attention_scale or config.head_width**-0.5
    scores_S, weights_S = seen["scores"][LAYER, 0, HEAD, QUERY], seen["weights"][LAYER, 0, HEAD, QUERY]
    visible = np.flatnonzero(np.isfinite(scores_S))
    rows = page.locator(".meeting tbody tr")
    assert rows.count() == len(visible)
    for s in visible:
        cells = texts(page.locator(f'.meeting tr[data-source="{s}"] td.number'))
        k_H = seen["k_rotated"][LAYER, 0, s, kv_head]
        assert_shown(cells[0], q_H @ k_H * scale, 5e-3)
        assert_shown(cells[-3], scores_S[s])
        assert_shown(cells[-2], np.exp(scores_S[s] - scores_S[visible].max()))
        assert_shown(cells[-1], 100 * weights_S[s], 0.01)
        chip = page.locator(f'[data-token="{s}"]').get_attribute("aria-label")
        assert_shown(re.search(r"([\d.]+)\u00a0%", chip)[1], 100 * weights_S[s], 0.01)
    total = np.exp(scores_S[visible] - scores_S[visible].max()).sum()
    assert_shown(page.locator('[data-value="sum"]').text_content(), total, 1e-3)
    source = visible[0]
    page.locator(f'.meeting tr[data-source="{source}"] .pick').click()
    k_H = seen["k_rotated"][LAYER, 0, source, kv_head]
    shown = {}
    for row in page.locator("#dimensions [data-dimension]").all():
        h = int(row.get_attribute("data-dimension"))
        shown[h] = row.locator(".number").text_content()
        assert_shown(shown[h], q_H[h] * k_H[h] * scale)
    assert set(shown) == set(np.argsort(-np.abs(q_H * k_H))[:8].tolist())
    parts = [number(text) for text in texts(page.locator("#dimensions .part:not(.total) .number"))[:9]]
    assert abs(sum(parts) - q_H @ k_H * scale) <= 0.05  # nine numbers, each rounded to a hundredth
    first_sum = page.locator("#dimensions .total .number").first.text_content()
    assert_shown(first_sum, q_H @ k_H * scale, 5e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_origins_shown_sum_to_the_score(open_page, name):
    model, params = make(name)
    page = open_page(name)
    choose(page)
    source = int(np.argmax(look(name)["weights"][LAYER, 0, HEAD, QUERY]))
    page.locator(f'.meeting tr[data-source="{source}"] .pick').click()
    parts = score_origins(model, params, tokens_T()[None], look(name), LAYER, HEAD, 0, QUERY, source)
    rows = page.locator("#origins .part:not(.total)").all()
    shown = {row.get_attribute("data-origin"): row.locator(".number").text_content() for row in rows}
    pairs_OO = np.asarray(parts.pairs_OO)
    has_position = model.config.positions in ("learned", "sinusoidal")
    assert_shown(shown["token"], pairs_OO[0, 0])
    assert ("position" in shown) == ("mixed" in shown) == has_position
    if has_position:
        assert_shown(shown["position"], pairs_OO[1, 1])
        assert_shown(shown["mixed"], pairs_OO[0, 1] + pairs_OO[1, 0], 2e-4)
    assert_shown(shown["earlier"], pairs_OO[:4, :4].sum() - pairs_OO[:2, :2].sum(), 2e-3)
    for key, true in (("rotation", parts.rotation), ("cap", parts.soft_cap), ("distance", parts.position)):
        assert key in shown or true == 0
        if key in shown:
            assert_shown(shown[key], true, 5e-3)
    score = page.locator("#origins .total .number").text_content()
    assert_shown(score, parts.score)
    assert abs(sum(map(number, shown.values())) - number(score)) <= 0.005 * (len(shown) + 1) + 5e-3
    page.locator("#layer-now").locator("xpath=..").locator("button").first.click()
    assert page.locator('#origins [data-origin="earlier"]').count() == 0  # in layer 0 nothing was written before


@pytest.mark.full
def test_a_large_page_keeps_the_origins_of_what_is_attended_to_most(open_page, monkeypatch):
    monkeypatch.setattr(page_data_module, "PAIR_NUMBERS", 2 * 6 * len(PROMPT) * 25 * 3)
    jax.clear_caches()  # of programs with the other constant
    data_of.cache_clear()
    page = open_page("pre")
    choose(page)
    page.locator("[data-key=all-rows]").click()
    order = np.argsort(-look("pre")["weights"][LAYER, 0, HEAD, QUERY])
    page.locator(f'.meeting tr[data-source="{order[2]}"] .pick').click()
    assert page.locator("#origins .total").count() == 1
    page.locator(f'.meeting tr[data-source="{order[3]}"] .pick').click()
    assert "the 3 most attended tokens" in page.locator("#origins").text_content()
    jax.clear_caches()  # of programs with the other constant
    data_of.cache_clear()


def test_a_negative_score_is_explained(open_page):
    page, scores_LNTS = open_page("pre"), look("pre")["scores"][:, 0]
    for is_negative in (True, False):
        layer, head, t, s = np.argwhere(np.isfinite(scores_LNTS) & ((scores_LNTS < 0) == is_negative))[5].tolist()
        choose(page, layer, head, t)
        page.locator(f'.meeting tr[data-source="{s}"] .pick').click()
        told = page.locator("#dimensions").locator("xpath=..").text_content()
        assert ("only the difference to the other scores counts" in told) == is_negative


def test_both_axes_of_the_pattern_have_the_tokens(open_page):
    page = open_page("pre")
    choose(page, 0, 0, 3)
    for axis in "xy":
        labels = page.locator(f"#pattern .labels-{axis} [data-at]")
        assert labels.count() == len(PROMPT)
        assert texts(labels)[:6] == ["a", "\u2423", "</script>"[:1], "/", "s", "c"]
        box = labels.nth(4).bounding_box()
        canvas = page.locator("#pattern canvas").bounding_box()
        start, size = ("x", "width") if axis == "x" else ("y", "height")
        centre = box[start] + box[size] / 2
        assert abs(centre - canvas[start] - 4.5 / len(PROMPT) * canvas[size]) <= 2
    assert page.locator("#pattern .labels-y .chosen").get_attribute("data-at") == "3"
    page.set_viewport_size({"width": 170, "height": 700})  # no room for all; the chosen one stays
    page.wait_for_function(f"document.querySelectorAll('#pattern .labels-y [data-at]').length < {len(PROMPT)}")
    assert page.locator("#pattern .labels-y .chosen").get_attribute("data-at") == "3"


@pytest.mark.parametrize("name", ["pre", "gemma"])
def test_the_vectors_shown_are_the_arrays(open_page, name):
    page, seen = open_page(name), look(name)
    choose(page)
    for summary in page.locator(".story .all-numbers summary").all():
        summary.click()
    page.locator(".story code.numbers").nth(4).wait_for()
    lists = [
        [number(part) for part in text.strip("[]").split(", ")] for text in texts(page.locator(".story code.numbers"))
    ]
    np.testing.assert_allclose(lists[0], seen["q_rotated"][LAYER, 0, QUERY, HEAD], atol=6e-4)
    np.testing.assert_allclose(lists[-1], seen["heads"][LAYER, 0, QUERY, HEAD], atol=1e-3)
    weights_S = seen["weights"][LAYER, 0, HEAD, QUERY]
    kv_head = HEAD * make(name)[0].config.kv_heads // 6
    for numbers, s in zip(lists[1:-1], np.argsort(-weights_S)[:3], strict=True):
        np.testing.assert_allclose(numbers, weights_S[s] * seen["v"][LAYER, 0, s, kv_head], atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_waterfall_sums_to_the_logit(open_page, name):
    page = open_page(name)
    choose(page)
    logits_V = look(name)["logits"][0, QUERY]
    first, second = unpack(data_of(name)["arrays"]["targets"])[:, QUERY].astype(int)
    logits = {"first": logits_V[first], "second": logits_V[second], "difference": logits_V[first] - logits_V[second]}
    for target, logit in logits.items():
        page.locator(f'#why input[value="{target}"]').check(force=True)
        parts = [number(text) for text in texts(page.locator("#waterfall .part:not(.total):not(.inner) .number"))]
        assert len(parts) == 11
        assert_shown(page.locator("#parts-sum").text_content(), logit, 6e-4)
        assert_shown(page.locator("#logit").text_content(), logit)
        assert abs(sum(parts) - logit) <= 11 * 0.0005 + 1e-3
    opener = page.locator("#waterfall .opener").first
    opener.press("Enter")
    assert opener.get_attribute("aria-expanded") == "true"
    inner = [number(text) for text in texts(page.locator("#waterfall .inner .number"))]
    whole = number(opener.locator("xpath=../..").locator(".number").text_content())
    assert 1 <= len(inner) <= 6
    assert abs(sum(inner) - whole) <= 6 * 0.0005 + 1e-3


def test_the_guesses_shown_are_the_probabilities(open_page):
    page, shares = open_page("rms"), guesses("rms")
    choose(page)
    for layer in range(shares.shape[0]):
        cells = texts(page.locator(f'#layers tr[data-layer="{layer}"] td .number'))
        assert len(cells) == 5
        for cell, share in zip(cells, -np.sort(-shares[layer, QUERY]), strict=False):
            assert_shown(cell, 100 * share, 0.002)


@pytest.mark.parametrize("score", SCORES)
def test_the_map_of_heads(open_page, score):
    page = open_page("llama")
    page.locator(f'#heads-choice input[value="{score}"]').check(force=True)
    expected_LN = np.asarray(fd.head_scores(look("llama")["weights"], tokens_T()[None])[score])
    for (layer, head), expected in np.ndenumerate(expected_LN):
        assert_shown("0" + page.locator(f'#heads [data-head="{layer}.{head}"]').text_content(), expected)


def test_the_three_answers(open_page):
    page, seen = open_page("pre"), look("pre")
    choose(page)
    weights_S, scores_S = seen["weights"][LAYER, 0, HEAD, QUERY], seen["scores"][LAYER, 0, HEAD, QUERY]
    best, second = np.argsort(-weights_S)[:2]
    read, why, wrote = texts(page.locator("#answers p"))
    figures = re.findall(r"[\d.]+(?=\u00a0%)", read)
    for figure, true in zip(figures, (weights_S[best], weights_S[second]), strict=False):
        assert_shown(figure, 100 * true, 0.01)
    positions = page.locator("#answers p").first.locator(".at sub").all_text_contents()
    assert positions == [str(QUERY), str(best), str(second)]
    score, lead = re.findall(r"[\u2212\d.]+", why)[:2]
    assert_shown(score, scores_S[best])
    assert_shown(lead, scores_S[best] - scores_S[second], 2e-4)
    given = unpack(data_of("pre")["arrays"]["part_heads"])[0, LAYER, HEAD, QUERY]
    assert_shown(re.findall(r"[+\u2212][\d.]+", wrote)[-1], given)


def test_keys_move_token_head_and_layer(open_page):
    page = open_page("pre")
    choose(page, 0, 0, 3)
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.token") == "4"
    assert "4" in page.locator("#query-now").text_content()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.token") == str(len(PROMPT) - 1)
    page.locator('#heads [tabindex="0"]').focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.head") == "1.1"
    assert (page.locator("#layer-now").text_content(), page.locator("#head-now").text_content()) == ("1", "1")
    page.keyboard.press("L")
    page.keyboard.press("h")
    assert (page.locator("#layer-now").text_content(), page.locator("#head-now").text_content()) == ("0", "2")
    page.locator("#pattern .pattern").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert page.locator("#query-now").text_content().startswith(str(len(PROMPT) - 2))
    assert page.locator(".meeting tr.chosen").get_attribute("data-source") == "1"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_every_control_is_reached_by_tab_and_has_a_name(open_page):
    page = open_page("pre")
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("""() => {
            const e = document.activeElement;
            if (e === document.body) return "|1";
            const name = e.getAttribute("aria-label") || e.textContent || e.labels?.[0]?.textContent || "";
            return (e.closest("[id]")?.id ?? "") + "|" + name.trim().length;
        }""")
        )
    assert {name.partition("|")[0] for name in reached} >= {
        *("theme", "chooser", "prompt", "heads-choice", "heads", "pattern", "story", "waterfall", "snapshot", "play")
    }
    assert all(not name.endswith("|0") for name in reached)


def test_a_click_on_the_pattern_picks_query_and_source(open_page):
    page = open_page("pre")
    choose(page, 0, 0, 3)
    box = page.locator("#pattern canvas").bounding_box()
    cell = box["width"] / len(PROMPT)
    page.locator("#pattern .pattern").click(position={"x": 2.5 * cell, "y": 9.5 * cell})
    assert page.locator("#query-now").text_content().startswith("9")
    assert page.locator(".meeting tr.chosen").get_attribute("data-source") == "2"
    weight = look("pre")["weights"][0, 0, 0, 9, 2]
    assert_shown(re.search(r"([\d.]+)\u00a0%", page.locator("#pattern .readout").text_content())[1], 100 * weight, 0.01)


def test_the_pattern_s_pixels_grow_with_the_weight(open_page):
    page = open_page("pre")
    choose(page, 0, 0, 3)
    T = len(PROMPT)
    context = "document.querySelector('#pattern canvas').getContext('2d')"
    pixels = page.evaluate(f"Array.from({context}.getImageData(0, 0, {T}, {T}).data)")
    pixels = np.array(pixels).reshape(T, T, 4)
    weights_TS = look("pre")["weights"][0, 0, 0]
    assert (pixels[..., 3] == 255 * np.tril(np.ones((T, T)))).all()
    luminance = pixels[..., :3].astype(float) @ [0.2126, 0.7152, 0.0722]
    rows, columns = np.tril_indices(T)
    order = np.argsort(weights_TS[rows, columns])
    assert (np.diff(luminance[rows, columns][order]) <= 1.5).all()  # darker and darker, up to rounding
    assert luminance[rows, columns].max() - luminance[rows, columns].min() > 100


def test_hostile_text_stays_text(open_page):
    page = open_page("pre")
    shown = "".join(texts(page.locator("#prompt .token")))
    assert shown == "a\u2423</script>\u21b5<b>a\u2423</sU+202E"
    assert page.locator("#prompt b, #prompt script").count() == 0


def test_watching_it_learn(open_page):
    page = open_page("pre")
    choose(page)
    slider = page.locator("#snapshot")
    assert page.locator("#snapshot-step").text_content() == "200"
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.locator("#snapshot-step").text_content() == "100"
    snapshots = history("pre").weights_MLNTS.astype(np.float32)
    pattern = page.locator("#learning .pattern")
    pattern.focus()
    page.keyboard.press("Home")
    last = len(PROMPT) - 1
    readout = page.locator("#learning .readout").text_content()
    weight = snapshots[1, LAYER, HEAD, last, 0]
    assert_shown(re.search(r"([\d.]+)\u00a0%", readout)[1], 100 * weight, 0.06)
    expected = np.asarray(fd.head_scores(snapshots[1][:, None], tokens_T()[None])["previous_token"])[LAYER, HEAD]
    assert_shown("0" + page.locator(f'#learning [data-head="{LAYER}.{HEAD}"]').text_content(), expected)
    slider.focus()
    page.keyboard.press("Home")
    page.locator("#play").click()
    page.locator("#snapshot-step", has_text="200").wait_for()
    assert page.locator("#play").text_content() == "Play"


def test_without_a_history_there_is_no_slider(open_page):
    assert not open_page("pre", history_too=False).locator("#learning-section").is_visible()


@pytest.mark.parametrize("name", ["pre", "bloom"])
def test_a_phone_scrolls_down_only(open_page, name):
    page = open_page(name, width=320, height=640)  # the narrowest that are in use
    for part in (".weight", ".value svg", ".key svg"):  # the keys as cards
        box = page.locator(f".meeting tr {part}").first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 320
    cells = page.evaluate("[...document.querySelectorAll('.meeting td')].map(e => [e.scrollWidth, e.clientWidth])")
    assert all(needed <= there for needed, there in cells), cells
    page.locator(".opener").first.click()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    # Nor is anything cut off, but within the boxes that scroll by themselves.
    boxes = "'.scroll, .tokens, .visually-hidden'"
    outside = f"[...document.querySelectorAll('main *')].filter(e => !e.closest({boxes}))"
    assert page.evaluate(f"Math.max(...{outside}.map(e => e.getBoundingClientRect().right))") <= 320


def test_dark_and_light(open_page):
    page = open_page("pre", scheme="dark")
    lightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert page.evaluate(lightness) < 60
    page.locator("#theme").click()
    assert page.evaluate(lightness) > 200
    page.locator("#theme").click()
    assert page.evaluate(lightness) < 60
