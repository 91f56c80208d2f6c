"""A model as EleutherAI's lm-evaluation-harness asks it: how likely texts are, and what it writes.

The harness (package `lm_eval`, extra `eval`) brings tasks such as HellaSwag or LAMBADA. It turns each into requests of
three kinds, which the three methods here answer. Texts become tokens as in its own `HFLM`, so that scores compare.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flax_decoder.data.tokenizer import Tokenizer
from flax_decoder.errors import FaultError, UserError, as_one_line, did_you_mean, require_type
from flax_decoder.generation.sampling import Sampling
from flax_decoder.generation.score import score_batches
from flax_decoder.generation.steps import cache_capacity, slot_bytes
from flax_decoder.generation.stream import stream
from flax_decoder.nn.decoder import Decoder
from flax_decoder.nn.params import unstack_layers
from flax_decoder.version import __version__

# Texts that are generated at once: the first of these numbers of rows whose cache takes no more than this.
BATCHES, CACHE_BYTES = (32, 8, 1), 2**30
# Of a request that does not say how many tokens to generate: the harness's own number.
MAX_NEW_TOKENS = 256
# Names for the number of tokens to generate, the one that counts first.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What the harness itself takes by default is 100 times as many, which takes minutes for a perplexity.
_BOOTSTRAP_DRAWS = 1000
# Those of the harness's own command, which decide which examples stand before a question.
_SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}
_MAX_REASON_CHARACTERS = 300
# Lines of progress without a terminal.
_NUM_PLAIN_LINES = 10

_Batch = TypeVar("_Batch", bound=tuple[Any, ...])


def harness_model(model: Decoder, params: Any, tokenizer: Tokenizer | None) -> Any:
    """The model as an `LM` of lm-evaluation-harness: `lm_eval.simple_evaluate(model=..., tasks=[...])` takes it.

    Args:
        model: the network.
        params: its parameters.
        tokenizer: turns the texts of tasks into tokens.

    Returns:
        An `lm_eval.api.model.LM` with `loglikelihood`, `loglikelihood_rolling` and `generate_until`.

    Raises:
        UserError: the package `lm_eval` is missing, or the model has no tokenizer.
    """
    base: Any = _lm_eval("api.model").LM
    answers = Answers(model, params, tokenizer)  # type: ignore[arg-type]

    class FlaxDecoder(base):  # type: ignore[misc]
        loglikelihood = staticmethod(answers.loglikelihood)
        loglikelihood_rolling = staticmethod(answers.loglikelihood_rolling)
        generate_until = staticmethod(answers.generate_until)
        get_model_info = staticmethod(answers.get_model_info)

    return FlaxDecoder()


class Answers:
    """The three methods of lm-evaluation-harness, without it. A request is anything with a tuple `args`."""

    def __init__(self, model: Decoder, params: Any, tokenizer: Tokenizer):
        """Raises UserError if the tokenizer is none."""
        require_type("tokenizer", tokenizer, Tokenizer, "a model without one cannot read the texts of tasks")
        self.model, self.params, self.tokenizer = model, unstack_layers(params), tokenizer
        self.context_length = model.config.context_length
        ids = {text: tokenizer.token_id(text) for text in tokenizer.special_tokens}
        self.special_ids = {text: id for text, id in ids.items() if id is not None}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the continuation's log-probability in nats, and whether it is greedy."""
        parts = [self._encode_pair(*request.args) for request in requests]
        self._tell_cut([len(before) + len(after) - 1 for before, after in parts])
        return self._score(parts, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): the log-probability of all its tokens in nats; a long one is scored a context at a time."""
        parts = [([self._first_token()], self._encode(*request.args)) for request in requests]
        return [log_prob for log_prob, _ in self._score(parts, disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): what follows, up to an end token or a text of `settings["until"]`."""
        jobs = [*self._split_by_settings([request.args for request in requests])]
        answers = [""] * len(requests)
        for indices, prompts, wanted in _shown(jobs, "generating", len(requests), disable_tqdm):
            rng = jax.random.key(indices[0])  # of its own, as a request may be repeated in another batch
            for index, text in zip(indices, self._generate(prompts, wanted, rng), strict=True):
                answers[index] = text
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        return {
            "model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            "model_dtype": self.model.config.dtype,
            "max_length": self.context_length,
        }

    def _first_token(self) -> int:
        """What stands before a text with nothing before it: the start token, else an end token, else a new line."""
        special = [token for token in (self.tokenizer.start_id, *self.tokenizer.end_ids) if token is not None]
        return special[0] if special else self.tokenizer.encode("\n")[0]

    def _encode(self, text: str) -> list[int]:
        """With what the tokenizer puts before a text, unless the text begins with it."""
        if not text:
            return self.tokenizer.prompt_start()
        special = {self.tokenizer.start_id, *self.tokenizer.end_ids} - {None}
        if special and text.startswith(self.tokenizer.decode([self._first_token()])):
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_prompt(text)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context, at least one, and those of its continuation.

        Both are encoded as one text, of which the context's tokens are cut off: at the border two characters may be one
        token. Spaces at the end of a context go to the continuation, as tokens begin with a space.
        """
        if not context:
            after = self.tokenizer.encode(continuation)
            first = self._first_token()
            return ([first], after[1:]) if after[:1] == [first] and len(after) > 1 else ([first], after)
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        before = self._encode(context)
        # Where all of the continuation has become part of the last token before it, it is encoded by itself.
        after = self._encode(context + continuation)[len(before) :] or self.tokenizer.encode(continuation)
        return before or [self._first_token()], after

    def _tell_cut(self, lengths: Sequence[int]) -> None:
        """Says how many texts do not fit in the context."""
        num_cut = sum(length > self.context_length for length in lengths)
        if num_cut:
            _console().print(
                f"{num_cut:,} of {len(lengths):,} texts are cut at their beginning to context_length = "
                f"{self.context_length}"
            )

    def _score(self, parts: Sequence[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        """Log-probabilities of tokens after others. More than the context holds are scored a context at a time."""
        windows = [
            (request, (before + after[:start])[-self.context_length :], after[start : start + self.context_length])
            for request, (before, after) in enumerate(parts)
            for start in range(0, len(after), self.context_length)
        ]
        sums, greedy = np.zeros(len(parts)), np.ones(len(parts), bool)
        if windows:  # else all texts are empty, and certain
            of_window, befores, afters = zip(*windows, strict=True)
            batches = score_batches(self.model, self.params, befores, afters)
            for rows, log_probs, is_greedy in _shown(batches, "scoring", len(windows), quiet):
                for row, log_prob, one in zip(rows, log_probs, is_greedy, strict=True):
                    sums[of_window[row]] += log_prob
                    greedy[of_window[row]] &= one
        return [*zip(sums.tolist(), greedy.tolist(), strict=True)]

    def _split_by_settings(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> Iterator["_Job"]:
        """Requests with equal settings, longest prompts first, in batches that fit in memory."""
        alike = defaultdict(list)
        for index, (_, settings) in enumerate(requests):
            alike[json.dumps(settings, sort_keys=True, default=str)].append(index)
        for indices in alike.values():
            wanted = _Wanted.read(requests[indices[0]][1])
            # Room for the new tokens; where there can be none, the text outgrows the context.
            most = max(self.context_length - wanted.max_new_tokens, 0) or self.context_length
            prompts = {index: self._encode(requests[index][0]) or [self._first_token()] for index in indices}
            self._tell_cut([len(prompt) + self.context_length - most for prompt in prompts.values()])
            prompts = {index: prompt[-most:] for index, prompt in prompts.items()}
            indices.sort(key=lambda index: -len(prompts[index]))
            num_slots = cache_capacity(self.model.config, len(prompts[indices[0]]) + wanted.max_new_tokens)
            row_bytes = num_slots * slot_bytes(self.model.config)
            size = next((size for size in BATCHES if size * row_bytes <= CACHE_BYTES), 1)
            for start in range(0, len(indices), size):
                rows = indices[start : start + size]
                yield rows, [np.array(prompts[index], np.int32) for index in rows], wanted

    def _generate(self, prompts: Sequence[np.ndarray], wanted: "_Wanted", rng: jax.Array) -> list[str]:
        """The new texts of a batch; it ends when each has met an end token or a text to stop at."""
        stop_ids = [self.special_ids[text] for text in wanted.until if text in self.special_ids]
        end_ids = [*self.tokenizer.end_ids, *stop_ids]
        sampling = Sampling(vocab_size=self.tokenizer.vocab_size, **wanted.sampling)
        new_BC = np.zeros((len(prompts), 0), np.int32)
        texts = [""] * len(prompts)
        for chunk in stream(self.model, self.params, prompts, wanted.max_new_tokens, rng, sampling, end_ids=end_ids):
            new_BC = np.concatenate([new_BC, chunk.tokens_BC], axis=1)
            found = [self._text(new_C.tolist(), end_ids, wanted.until) for new_C in new_BC]
            texts = [text for text, _ in found]
            if all(has_ended for _, has_ended in found):
                break
        return texts

    def _text(self, tokens: list[int], end_ids: Sequence[int], until: Sequence[str]) -> tuple[str, bool]:
        """The text of new tokens without special ones, up to where it ends; and whether it has ended."""
        length = next((index for index, token in enumerate(tokens) if token in end_ids), len(tokens))
        special = self.special_ids.values()
        text = self.tokenizer.decode([token for token in tokens[:length] if token not in special])
        stops = [place for place in map(text.find, until) if place >= 0]
        return text[: min(stops, default=len(text))], bool(stops) or length < len(tokens)


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a request to generate asks for."""

    max_new_tokens: int
    until: tuple[str, ...]
    sampling: dict[str, Any]

    @classmethod
    def read(cls, settings: dict[str, Any]) -> Self:
        """Reads the `generation_kwargs` of a task.

        Raises:
            UserError: it asks for something that is not there.
        """
        given = dict(settings)
        lengths = [given.pop(name, None) for name in _LENGTH_NAMES]
        until = given.pop("until", None) or []
        draws = given.pop("do_sample", None)
        if given.pop("num_beams", 1) != 1 or given.keys() - _SAMPLING_NAMES:
            raise UserError(
                f"generation_kwargs = {as_one_line(settings)}: beyond until, do_sample and max_gen_toks, only "
                f"{', '.join(_SAMPLING_NAMES)} can be asked for"
            )
        if draws is False or not given.get("temperature"):
            given = {name: value for name, value in given.items() if name == "repetition_penalty"} | {
                "temperature": 0.0
            }
        return cls(
            max_new_tokens=next((int(length) for length in lengths if length is not None), MAX_NEW_TOKENS),
            until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            sampling=given,
        )


_Job = tuple[list[int], list[np.ndarray], _Wanted]


def _shown(batches: Iterable[_Batch], what: str, total: int, quiet: bool) -> Iterator[_Batch]:
    """The batches, with a bar in a terminal and a few lines elsewhere; the first item of a batch is a list of rows."""
    console, done = _console(), 0
    columns = TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for batch in batches:
            yield batch
            before, done = done, done + len(batch[0])
            bar.update(task, completed=done)
            if (
                not (quiet or console.is_terminal)
                and before * _NUM_PLAIN_LINES // total < done * _NUM_PLAIN_LINES // total
            ):
                console.print(f"{what}: {done:,} of {total:,}")


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True, stderr=True)


def _lm_eval(name: str) -> Any:
    """A module of lm-evaluation-harness. Raises UserError where the package is missing."""
    try:
        return importlib.import_module(f"lm_eval.{name}")
    except ImportError as error:
        raise UserError(
            f'tasks come from lm-evaluation-harness, which is not there ({error}): pip install "flax-decoder[eval]"'
        ) from None


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Any:
    """The harness's manager of tasks, which has all of these. Nothing is loaded yet.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with more tasks, as files of YAML.

    Raises:
        UserError: the package `lm_eval` is missing, or there is no such task.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: there is no such folder")
    manager_type = _lm_eval("tasks").TaskManager
    for library in ("huggingface_hub", "lm_eval"):  # an error is told in one line, and defaults are no news
        logging.getLogger(library).setLevel(logging.ERROR)

    class Manager(manager_type):  # type: ignore[misc, valid-type]
        def load(self, task_list: Any) -> Any:
            try:
                loaded = super().load(task_list)
            except Exception as error:  # of any library that reads data sets
                reason = " ".join(str(error).split())[:_MAX_REASON_CHARACTERS]
                raise FaultError(
                    f"--tasks {','.join(names)}: cannot be loaded: {type(error).__name__}: {reason};\n"
                    "most tasks download their data once; one of --include-path can read files that are here"
                ) from error
            unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
            if unsafe:
                raise UserError(f"--tasks {unsafe[0]}: runs code that the model writes, which this command does not do")
            return loaded

    manager = Manager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError(f"--tasks {name}: there is no such task{hint}\n`lm_eval ls tasks` lists all")
    return manager


def evaluate_tasks(
    answering: Any, names: Sequence[str], manager: Any, *, limit: int | None = None
) -> tuple[dict[str, Any], str]:
    """Runs tasks.

    Args:
        answering: of `harness_model`.
        names: of tasks, groups or tags.
        manager: of `find_tasks`.
        limit: the number of documents to take of each task; None is all.

    Returns:
        The results, in the harness's own format, and a table of them.

    Raises:
        UserError: a task asks for what a text model has not, or for tokens that the tokenizer has not.
        FaultError: the data of a task cannot be read.
    """
    # Processes forked from one with threads, as JAX has, may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    loaded = manager.load([*names])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEEDS["fewshot"])
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    how = {"limit": limit, "bootstrap_iters": _BOOTSTRAP_DRAWS}
    results = _lm_eval("evaluator").evaluate(answering, task_dict=loaded, log_samples=False, **how)
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "jax")} | {"flax_decoder": __version__}
    results["config"] = how | {"seeds": _SEEDS, "versions": versions} | answering.get_model_info()
    make_table = _lm_eval("utils").make_table
    tables = [make_table(results, column) for column in ("results", "groups") if column in results]
    return results, "\n\n".join(table.strip() for table in tables)
