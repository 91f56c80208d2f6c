"""The requests of lm-evaluation-harness: by hand, and beside the harness's own adapter of PyTorch."""

import functools
import json
import sys
import types

import jax
import numpy as np
import pytest
import reference

import flax_decoder as fd
from flax_decoder.cli import main
from flax_decoder.config import ModelConfig
from flax_decoder.data.tokenizer import CharTokenizer, make_tokenizer, parse_tokenizer
from flax_decoder.errors import UserError
from flax_decoder.generation import harness, score
from flax_decoder.generation.harness import Answers
from flax_decoder.training.run_folder import write_run

TEXT = "\nthe cat sat on the mat; the dog sat on the cat.\n"
CONTEXT = 17


@functools.cache
def make():
    tokenizer = CharTokenizer(TEXT)
    sizes = {"context_length": CONTEXT, "num_layers": 1, "embed_dim": 12, "num_heads": 2}
    model = fd.Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    params = jax.tree.map(lambda leaf: 3 * leaf, reference.random_params(model))
    return model, params, tokenizer


def request(*args):
    return types.SimpleNamespace(args=args)


def log_probs_of(text):
    """Of each character but the first, and whether it is the likeliest; of the last of a text up to one too long."""
    model, params, tokenizer = make()
    tokens = tokenizer.encode(text)[-CONTEXT - 1 :]
    tokens_1T = np.pad(tokens[:-1], (0, CONTEXT + 1 - len(tokens)))[None]
    logits_TV = np.asarray(jax.jit(model.apply)({"params": params}, tokens_1T)[0, : len(tokens) - 1], np.float64)
    log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    return log_probs_TV[np.arange(len(tokens) - 1), tokens[1:]], logits_TV.argmax(axis=1) == tokens[1:]


# --- How likely ---


def test_a_continuation_has_the_log_probability_of_its_tokens():
    pairs = [("the cat", " sat"), ("", "the"), ("the ", "dog"), ("the cat sat on the mat; ", "the"), ("", "\n")]
    pairs += [("the", ""), ("a", "b" if "b" in TEXT else "t"), ("  ", "c")]
    found = Answers(*make()).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (log_prob, is_greedy) in zip(pairs, found, strict=True):
        num = len(continuation) + (len(context) - len(context.rstrip()) if context else 0)
        expected, likeliest = log_probs_of(("" if context.strip() else "\n") + context + continuation)
        np.testing.assert_allclose(log_prob, expected[len(expected) - num :].sum(), rtol=1e-5, err_msg=context)
        assert is_greedy == likeliest[len(likeliest) - num :].all()


def test_a_long_text_is_scored_a_context_at_a_time_each_token_once():
    text = TEXT[1:]  # 2 contexts and a rest
    (found,) = Answers(*make()).loglikelihood_rolling([request(text)])
    pieces = [log_probs_of("\n" + text[:CONTEXT])[0], log_probs_of(text[: 2 * CONTEXT])[0][-CONTEXT:]]
    pieces.append(log_probs_of(text)[0][2 * CONTEXT - len(text) :])
    assert sum(map(len, pieces)) == len(text) and len(text) > 2 * CONTEXT
    np.testing.assert_allclose(found, sum(piece.sum() for piece in pieces), rtol=1e-5)
    # So is a continuation that does not fit.
    ((log_prob, _),) = Answers(*make()).loglikelihood([request("", text)])
    np.testing.assert_allclose(log_prob, found)
    follows = text[:CONTEXT] + greedy(text[:CONTEXT], 1)  # its last context alone is greedy
    assert [one for _, one in Answers(*make()).loglikelihood([request("", follows)])] == [False]
    assert Answers(*make()).loglikelihood_rolling([request("")]) == [0.0]


def test_one_program_serves_requests_of_many_lengths(capsys):
    answers, before = Answers(*make()), score._log_probs._cache_size()
    pairs = [(TEXT[:start], TEXT[start : start + size]) for start in range(9) for size in range(1, 8)]
    answers.loglikelihood([request(*pair) for pair in pairs])
    answers.loglikelihood_rolling([request(TEXT[:size]) for size in range(1, 1 + len(pairs))])
    assert score._log_probs._cache_size() - before <= 3  # 64 rows of 16 and 17 tokens, and a few rows of 16
    assert "cut" not in capsys.readouterr().err
    answers.loglikelihood([request(TEXT[:30], "a"), request(TEXT[:CONTEXT], "a")])
    assert "1 of 2 texts are cut at their beginning to context_length = 17" in capsys.readouterr().err


# --- What it writes ---


def greedy(prompt, count):
    model, params, tokenizer = make()
    rows = fd.generate(model, params, [tokenizer.encode(prompt)], count, temperature=0)
    return tokenizer.decode(rows[0])[len(prompt) :]


def test_what_is_written_ends_before_a_stop_text():
    first, second = greedy("the", 9), greedy("the mat", 9)
    stop = second[3:5]
    requests = [
        request("the", {"until": [], "max_gen_toks": 9}),
        request("the mat", {"until": [stop, "zzz"], "max_gen_toks": 9}),
        request(
            "the mat", {"until": stop, "max_new_tokens": 9, "do_sample": False, "temperature": 1.0, "num_beams": 1}
        ),
        request("the mat", {"max_gen_toks": 0}),
    ]
    assert Answers(*make()).generate_until(requests) == [
        first,
        second[: second.index(stop)],
        second[: second.index(stop)],
        "",
    ]
    # As much of the prompt as leaves room is seen.
    (found,) = Answers(*make()).generate_until([request(TEXT[:30], {"max_gen_toks": 9})])
    assert found == greedy(TEXT[30 - CONTEXT + 9 : 30], 9)


def test_a_special_token_ends_a_text_and_is_no_part_of_it():
    document = json.loads(make_tokenizer("char", TEXT, 0).to_json())
    vocab = document["model"]["vocab"]
    document["added_tokens"] = [
        {"id": vocab["t"], "content": "t", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    tokenizer = parse_tokenizer(json.dumps(document).encode(), "x")
    model, params, chars = make()
    answers = Answers(model, params, tokenizer)
    tokens = chars.encode("he cat")
    assert answers._text(tokens, [], []) == ("he ca", False)
    assert answers._text(tokens, [chars.encode("c")[0]], []) == ("he ", True)
    assert answers._text(tokens, [], [" c", "e"]) == ("h", True)


@pytest.mark.short("1")
@pytest.mark.parametrize("rows_at_once", [8, 1])
def test_a_repeated_request_draws_anew(monkeypatch, rows_at_once):
    monkeypatch.setattr(harness, "BATCHES", (rows_at_once,))
    drawn = request("the", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 9})
    found = Answers(*make()).generate_until([drawn] * 3)
    assert len(set(found)) == 3 and found == Answers(*make()).generate_until([drawn] * 3)


def test_what_cannot_be_asked_for_is_refused():
    with pytest.raises(UserError, match=r"num_beams.*4.*temperature, top_k"):
        Answers(*make()).generate_until([request("the", {"num_beams": 4})])
    with pytest.raises(UserError, match="tokenizer must be of type Tokenizer, a model without one cannot read"):
        Answers(*make()[:2], None)


# --- The command ---


@pytest.fixture
def run(tmp_path):
    model, params, tokenizer = make()
    write_run(tmp_path / "run", model.config, params, tokenizer, {})
    return tmp_path / "run"


def refusal(capsys, *arguments):
    code = main(["evaluate", *map(str, arguments)])
    return code, capsys.readouterr().err


def test_no_documents_are_refused(run, capsys):
    code, error = refusal(capsys, run, "--tasks", "hellaswag", "--limit", "0")
    assert code == 2 and error == "error: --limit 0: must be at least 1\n"


def test_without_the_package_the_extra_is_named(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, error = refusal(capsys, run, "--tasks", "hellaswag")
    assert code == 2 and 'pip install "flax-decoder[eval]"' in error and error.count("\n") == 1


@pytest.mark.full
def test_no_task_and_no_folder_are_told_before_the_model_is_read(capsys, tmp_path):
    pytest.importorskip("lm_eval")
    for arguments, message in (
        (["--tasks", "helaswag"], "--tasks helaswag: there is no such task; did you mean hellaswag?"),
        (
            ["--tasks", "hellaswag", "--include-path", tmp_path / "no"],
            f"--include-path {tmp_path}/no: there is no such",
        ),
    ):
        code, error = refusal(capsys, tmp_path / "none", *arguments)
        assert code == 2 and message in error and error.count("\n") <= 2


# --- Beside the harness's own adapter of PyTorch ---

CLOZE = """
task: cloze
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{before}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORDS = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{before}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{before}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "sat"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
DOCUMENTS = [
    {"before": "the cat", "choices": [" sat on", "nip", "s"], "answer": 0},
    {"before": "", "choices": ["the cat", "a", "on the mat"], "answer": 1},
    {"before": "on the m", "choices": ["at", "e", "at; the dog"], "answer": 0},
    {"before": "the dog ", "choices": ["sat", " ", "t"], "answer": 2},
    {"before": TEXT, "choices": ["the", " the cat sat on the mat", "<x>"], "answer": 1},
    {"before": 3 * TEXT, "choices": ["the", " the cat", "."], "answer": 2},
    {"before": "<s>the", "choices": [" cat", "</s>"], "answer": 0},
]


def torch_folder(folder, kind):
    """A small model of transformers with a tokenizer that merges, as GPT-2 without or as Llama with a start token."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    special = {"gpt2": ["<|endoftext|>"], "llama": ["<s>", "</s>"]}[kind]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator([TEXT, "the mats; cats sat on"] * 3, trainer)
    if kind == "llama":
        parts = {"single": "<s> $A", "special_tokens": [("<s>", library.token_to_id("<s>"))]}
        library.post_processor = tokenizers.processors.TemplateProcessing(**parts)
    ends = {"bos_token": special[0], "eos_token": special[-1]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, **ends).save_pretrained(folder)
    ids = {"bos_token_id": 0, "eos_token_id": len(special) - 1, "vocab_size": library.get_vocab_size()}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=19, **ids)
    else:
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 19}
        config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **ids)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(folder)


def encoded_apart(theirs, context, continuation):
    return theirs.tok_encode(context) + theirs.tok_encode(continuation, add_special_tokens=False)


@pytest.mark.full
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_request_has_the_answer_of_hflm(kind, tmp_path):
    pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    torch_folder(tmp_path, kind)
    # Its cache gives a continuation of one token the first logits of a longer one with the same tokens before the last.
    how = {"device": "cpu", "dtype": "float32", "logits_cache": False}
    theirs = huggingface.HFLM(pretrained=str(tmp_path), batch_size=3, **how)
    ours = harness.harness_model(*fd.load(tmp_path))
    pairs = [(one["before"], choice) for one in DOCUMENTS for choice in one["choices"]]
    # Where the last token of the context swallows the continuation, HFLM stops; ours scores the continuation by itself.
    swallowed = [pair for pair in pairs if pair[0] and not theirs._encode_pair(*pair)[1]]
    assert (
        swallowed and np.isfinite([one for one, _ in ours.loglikelihood([request(*pair) for pair in swallowed])]).all()
    )
    merged = [pair for pair in pairs if pair[0] and encoded_apart(theirs, *pair) != theirs.tok_encode("".join(pair))]
    assert merged
    requests = [request(*pair) for pair in pairs if pair not in swallowed]
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=0, atol=1e-5)
    assert [one for _, one in found] == [one for _, one in expected]
    texts = [request(context + continuation) for context, continuation in pairs]
    found, expected = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
    settings = [{"until": ["\n"], "max_gen_toks": 9}, {"until": ["t", " c"], "max_gen_toks": 6, "do_sample": False}]
    prompts = [request(one["before"], one_setting) for one in DOCUMENTS if one["before"] for one_setting in settings]
    theirs.batch_size_per_gpu = 1  # whether a batch is given start tokens, it decides by its first prompt
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


@pytest.mark.full
@pytest.mark.filterwarnings("default")
def test_the_command_measures_local_tasks_as_hflm_does(tmp_path, capsys):
    lm_eval = pytest.importorskip("lm_eval")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    torch_folder(tmp_path / "model", "llama")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS if "s" not in one["choices"]))
    (tmp_path / "tasks").mkdir()
    for name, text in {"cloze": CLOZE, "words": WORDS, "write": WRITE}.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    arguments = ["--tasks", "cloze,words,write", "--include-path", tmp_path / "tasks", "--out", tmp_path / "out.json"]
    assert refusal(capsys, tmp_path / "model", *arguments)[0] == 0
    found = json.loads((tmp_path / "out.json").read_text())
    theirs = huggingface.HFLM(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32", logits_cache=False)
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=["cloze", "words", "write"], task_manager=manager)["results"]
    for task, results in expected.items():
        for metric, value in results.items():
            if not metric.startswith(("alias", "name")) and "stderr" not in metric:
                np.testing.assert_allclose(found["results"][task][metric], value, rtol=1e-5, err_msg=metric)
