import math

import jax
import numpy as np
import pytest

import flax_decoder as fd
from flax_decoder.data.batches import validation_batches
from flax_decoder.training.evaluation import evaluate_batches

T, V = 5, 7
MODEL = {"vocab_size": V, "context_length": T, "num_layers": 1, "embed_dim": 8, "num_heads": 2, "init_stddev": 0.5}


@pytest.fixture(scope="module")
def model_and_params():
    model = fd.Decoder(fd.load_config(None, {f"model.{name}": value for name, value in MODEL.items()}).model)
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


def evaluate(model, params, tokens, num_bytes, start=(), **how):
    """The loss on a text, in windows of T, or of the text if that is shorter."""
    batches = validation_batches(tokens, context_length=min(T, len(tokens) - 1 + len(start)), start=start, **how)
    return evaluate_batches(model, params, batches, num_learned=len(tokens), num_bytes=num_bytes)


def loss_of_each(model, params, tokens):
    """Minus the log probability of each token but the first, windows of T read one by one, in float64."""
    forward = jax.jit(lambda inputs_1T: model.apply({"params": params}, inputs_1T))
    losses = []
    for start in range(0, len(tokens) - 1, T):
        inputs, targets = tokens[start : start + T], tokens[start + 1 : start + 1 + T]
        padded_1T = np.pad(inputs, (0, T - len(inputs)))[None]
        for logits_V, target in zip(np.asarray(forward(padded_1T)[0], np.float64), targets, strict=False):
            losses.append(math.log(np.exp(logits_V).sum()) - logits_V[target])
    return losses


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(2, 3), (31, 3), (48, 2)])
def test_each_token_but_the_first_is_predicted_once(model_and_params, num_tokens, batch_size):
    tokens = np.random.default_rng(0).integers(0, V, num_tokens, np.int32)
    losses = loss_of_each(*model_and_params, tokens)
    assert len(losses) == num_tokens - 1
    result = evaluate(*model_and_params, tokens, 100, batch_size=batch_size)
    assert result.keys() == {"loss", "perplexity", "bits_per_byte", "num_tokens"}
    assert result["num_tokens"] == num_tokens - 1
    mean = sum(losses) / len(losses)
    assert result["loss"] == pytest.approx(mean, rel=1e-6)  # float32 sums of a batch
    assert result["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(mean / math.log(2) * num_tokens / 100, rel=1e-6)


@pytest.mark.short("29-start2")
@pytest.mark.parametrize(("num_tokens", "start"), [(1, [6]), (31, [6]), (29, [6, 2, 1])])
def test_with_a_start_the_first_token_is_predicted_too(model_and_params, num_tokens, start):
    """Each window begins with the start, and predicts what follows its last token."""
    model, params = model_and_params
    tokens, losses = np.random.default_rng(0).integers(0, V, num_tokens, np.int32), []
    size, forward = T - len(start) + 1, jax.jit(model.apply)
    for first in range(0, num_tokens, size):
        window = tokens[first : first + size]
        inputs = np.pad([*start, *window], (0, T))[:T].astype(np.int32)
        logits_TV = np.asarray(forward({"params": params}, inputs[None])[0], np.float64)
        for logits_V, target in zip(logits_TV[len(start) - 1 :], window, strict=False):
            losses.append(math.log(np.exp(logits_V).sum()) - logits_V[target])
    result = evaluate(model, params, tokens, 100, batch_size=3, start=start)
    assert result["num_tokens"] == num_tokens == len(losses)
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("start", [[], [6, 2]])
def test_padding_does_not_lengthen_a_text_that_is_turned_by_its_length(start):
    """The last window has 3 tokens, within the original context; those before it have 5."""
    settings = MODEL | {"positions": "rotary", "rotary_scaling": "longrope", "rotary_original_context": 3}
    settings |= {"rotary_short_factors": (1.0, 1.3), "rotary_long_factors": (9.0, 40.0)}
    model = fd.Decoder(fd.load_config(None, {f"model.{name}": value for name, value in settings.items()}).model)
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    tokens, losses = np.random.default_rng(2).integers(0, V, 6 if start else 9, np.int32), []
    before, first = (start, 0) if start else (tokens[:1], 1)
    while first < len(tokens):
        targets = tokens[first : first + T - len(before) + 1]
        inputs = np.concatenate([before, targets[:-1]]).astype(np.int32)
        logits_TV = np.asarray(model.apply({"params": params}, inputs[None])[0], np.float64)
        for logits_V, target in zip(logits_TV[len(before) - 1 :], targets, strict=True):
            losses.append(math.log(np.exp(logits_V).sum()) - logits_V[target])
        first += len(targets)
        before = start or tokens[first - 1 : first]
    result = evaluate(model, params, tokens, 100, batch_size=3, start=start)
    assert result["num_tokens"] == len(losses)
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_no_loss_is_asked_across_a_border(model_and_params):
    tokens = np.random.default_rng(0).integers(0, V, 2 * T + 1, np.int32)
    segments = np.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 4]], np.int32)
    batches = validation_batches(tokens, batch_size=2, context_length=T)
    batches = (batch | {"segments": segments} for batch in batches)
    assert evaluate_batches(*model_and_params, batches, num_learned=11, num_bytes=11)["num_tokens"] == 2 * T - 2


def test_a_limit_reads_some_batches(model_and_params):
    tokens = np.random.default_rng(0).integers(0, V, 48, np.int32)
    losses = loss_of_each(*model_and_params, tokens)
    result = evaluate(*model_and_params, tokens, 100, batch_size=2, limit=1)
    assert result["num_tokens"] == 10
    assert result["loss"] == pytest.approx(sum(losses[:10]) / 10, rel=1e-6)


def test_a_model_that_is_far_off_has_a_loss_and_no_crash(model_and_params):
    """exp(loss) is no float64 beyond 709."""
    model, params = model_and_params
    huge = params | {"embedding": params["embedding"] * 1e6}
    tokens = np.random.default_rng(0).integers(0, V, 31, np.int32)
    result = evaluate(model, huge, tokens, 31, batch_size=2)
    assert result["loss"] > 709 and result["perplexity"] == math.inf
