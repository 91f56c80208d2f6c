"""The commands, one function each. They import JAX themselves: help and bad input do not wait for it."""

import argparse
import collections
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging
import os
import re
import signal
import stat
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from flax_decoder.config import SECTIONS, Config, DataConfig, fields_of
from flax_decoder.config_file import load_config, require_consent
from flax_decoder.errors import (
    DEVICE_FAILS,
    FaultError,
    FolderWarning,
    InUseError,
    LostProcessError,
    UserError,
    did_you_mean,
)
from flax_decoder.io.files import as_write_fault, expand_home, write_text
from flax_decoder.io.lock import refuse_if_in_use
from flax_decoder.io.terminal import print_escaped, standard_streams
from flax_decoder.parallel.launchers import find_job, in_a_job
from flax_decoder.version import __version__

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from flax_decoder.data.tokenizer import Tokenizer
    from flax_decoder.generation.sampling import Sampling
    from flax_decoder.generation.speculative import Draft, PromptLookup
    from flax_decoder.nn.decoder import Decoder
    from flax_decoder.training.start import Start

# Limit of a prompt from standard input, which may be endless: more than any model reads.
MAX_PROMPT_BYTES = 16_000_000
# Less random than 1, more varied than 0; for folders that say nothing.
DEFAULT_TEMPERATURE = 0.8
DESCRIPTION = "A decoder-only transformer in JAX and Flax Linen: train it on a text and generate from it."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code.

    0 done, 1 a fault, 2 the user's input, 73 in use, 75 a process of the job is lost, over 128 a signal.
    """
    # Training replaces these handlers once it has something to save.
    heard = [one for one in _EXCEPTION_OF if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, _raise_for_signal) for number in heard}
    hook_before = sys.unraisablehook
    sys.unraisablehook = hook = functools.partial(_resend_dropped_signal, hook_before)
    try:
        with standard_streams(), _warnings_of_folders():
            code = _run(sys.argv[1:] if arguments is None else arguments)
            if code != 0 and (processes := sys.modules.get("flax_decoder.parallel.processes")) is not None:
                processes.leave(code)
            return code
    finally:
        if sys.unraisablehook is hook:  # else reads of a checkpoint that has failed may still end, unheard
            sys.unraisablehook = hook_before
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: Sequence[str]) -> int:
    """Runs a command; exceptions become messages and exit codes."""
    try:
        options, unknown = build_parser().parse_known_args(arguments)
        if unknown:
            options.parser.refuse(unknown[0])
        command: Callable[[argparse.Namespace], int] = options.command
        _keep_threads_quiet()
        _keep_compilations()
        code = command(options)
        if code != 128 + signal.SIGHUP:  # else the terminal is gone
            sys.stdout.flush()  # a disk may be full only now
        return code
    except (UserError, InUseError) as error:
        cause = error.__context__
        is_fault = isinstance(cause, OSError) and cause.errno in DEVICE_FAILS
        print_escaped(f"{'fault' if is_fault else 'error'}: {error}", file=sys.stderr)
        return 1 if is_fault else 2 if isinstance(error, UserError) else 73
    except FaultError as error:
        print_escaped(f"fault: {error}", file=sys.stderr)
        return 1
    except LostProcessError:
        from flax_decoder.parallel.processes import end_lost

        with contextlib.suppress(OSError):
            sys.stdout.flush()
        end_lost()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_escaped(f"fault: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
        try:
            told = _shortage(error, options)
        except MemoryError:  # there is too little even for that
            told = "out of memory"
        if told is None:
            raise
        print_escaped(f"fault: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except HungUp:
        return 128 + signal.SIGHUP
    except Terminated:
        return 128 + signal.SIGTERM


def _shortage(error: Exception, options: argparse.Namespace) -> str | None:
    """What is said of an error if memory does not suffice, and what to change; None for other errors."""
    from flax_decoder.training.out_of_memory import describe_shortage, is_out_of_memory, smaller_settings

    if not is_out_of_memory(error):
        return None
    change = "give fewer samples or less text at once, or take a device with more memory"
    if hasattr(options, "config"):
        import jax

        with warnings.catch_warnings(action="ignore"):
            config = _read_config(options)
        change = f"in this order: {', '.join(smaller_settings(config, jax.device_count()))}"
        if options.command is train:
            change += "; with another --run.folder, but for remat and chunks"
        if options.command is not plan:
            change += f"; flax-decoder plan {options.config or ''}".rstrip() + " says what fits"
    return f"{describe_shortage(error)};\n{change}"


class Terminated(BaseException):
    """Raised on SIGTERM. Like KeyboardInterrupt, it is not an Exception, so `except Exception` lets it pass."""


class HungUp(BaseException):
    """The same on SIGHUP: the terminal has been closed."""


_EXCEPTION_OF = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated, signal.SIGHUP: HungUp}


def _raise_for_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Raises the exception of a signal; during an import, exits at once.

    A C extension that is being imported turns the exception into an ImportError or crashes, as those of JAX do; and
    there is nothing to clean up yet.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + number)
        frame = frame.f_back
    raise _EXCEPTION_OF[signal.Signals(number)]


def _resend_dropped_signal(hook: Callable[["UnraisableHookArgs"], Any], dropped: "UnraisableHookArgs") -> None:
    """Sends a signal again if Python has dropped its exception, as it does in garbage collector callbacks.

    JAX has such a callback. The delay lets this function return first. Other dropped exceptions go to `hook`.
    """
    numbers = {raised: number for number, raised in _EXCEPTION_OF.items()}
    if dropped.exc_type in numbers:
        threading.Timer(0.01, os.kill, (os.getpid(), numbers[dropped.exc_type])).start()
    else:
        hook(dropped)


def train(options: argparse.Namespace) -> int:
    """Trains on a text, then generates a sample."""
    config = _config_of(options)
    require_consent(options.config, config, [name for name in vars(options) if "." in name])
    folder = Path(config.run.folder or ".")
    # The lock is taken later; this refuses before JAX is imported. The processes of a job share the folder.
    if config.distributed.coordinator is None and not in_a_job(os.environ):
        refuse_if_in_use(folder)
    is_new = not (folder / "config.toml").is_file()  # a run has a copy of what it started from
    if config.lora.rank is not None and config.run.start_from is None and is_new:
        raise UserError(f"lora.rank = {config.lora.rank} needs a trained model: give --run.start-from PATH")
    from flax_decoder.training import loop

    config, start = (config, None) if config.run.start_from is None else _started(config, folder)
    return loop.train(config, folder, start)


def generate(options: argparse.Namespace) -> int:
    """Streams a continuation of a prompt."""
    from flax_decoder.generation.stream import stream
    from flax_decoder.generation.text import decode_streams

    sampling, told = _sampling_of(options)
    prompt = _prompt_of(options)
    if options.num_samples < 1 or options.max_new_tokens < 0 or "" in options.stop:
        raise UserError("--num-samples must be at least 1, --max-new-tokens at least 0, and --stop a text")
    import jax
    import numpy as np

    model, params, tokenizer = _load(options)
    if told:
        print_escaped(told, file=sys.stderr)
    tokens = tokenizer.encode_prompt(prompt) or [token for token in [tokenizer.start_id] if token is not None]
    if not tokens:
        raise UserError("the prompt is empty, and this tokenizer has no start token: give --prompt TEXT")
    written = stream(
        model,
        params,
        [np.asarray(tokens, np.int32)],
        options.max_new_tokens,
        jax.random.key(options.seed),
        dataclasses.replace(sampling, vocab_size=tokenizer.vocab_size),
        num_samples=options.num_samples,
        end_ids=tokenizer.end_ids,
        draft=_draft_of(options),
    )
    new = (part.tokens_BC for part in written)
    pieces = decode_streams(tokenizer, new, options.num_samples, options.stop, tokens if prompt else ())
    if options.no_stream:
        pieces = iter(list(pieces))
    num_prompts = 0
    for row, piece in itertools.chain([(0, "")], pieces, [(options.num_samples - 1, "")]):
        while num_prompts <= row:  # a sample may have no pieces
            print_escaped(f"\n\n{prompt}" if num_prompts else prompt, end="")
            num_prompts += 1
        print_escaped(piece, end="", flush=True)
    print()
    return 0


def chat(options: argparse.Namespace) -> int:
    """Chats with a model that has a chat template; Ctrl-C stops an answer, a second one exits."""
    sampling, told = _sampling_of(options)
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if not Path(options.path).is_dir():
        raise UserError(f"{options.path}: there is no such folder")
    from flax_decoder.data.chat_template import load_chat_template

    template = load_chat_template(Path(options.path))
    import jax

    from flax_decoder.generation.chat import Chat

    model, params, tokenizer = _load(options)
    if told:
        print_escaped(told, file=sys.stderr)
    talk = Chat(
        model,
        params,
        tokenizer,
        template,
        jax.random.key(options.seed),
        dataclasses.replace(sampling, vocab_size=tokenizer.vocab_size),
        system=options.system,
        max_new_tokens=options.max_new_tokens,
    )
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return 0
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: is not UTF-8 text: {error}") from None
        pieces = talk.answer(message)
        try:
            for piece in pieces:
                print_escaped(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()  # the conversation keeps the part that was printed
        print(flush=True)


def evaluate(options: argparse.Namespace) -> int:
    """Prints loss, perplexity and bits per byte of a model on a text, or on the answers of conversations."""
    from flax_decoder.data.batches import validation_batches
    from flax_decoder.data.corpus import read_text
    from flax_decoder.data.example_corpus import split_of
    from flax_decoder.data.plan import has_examples

    has_talks = has_examples(DataConfig(path=options.file))
    text = "" if has_talks else read_text(options.file)
    from flax_decoder.training.evaluation import evaluate_batches

    model, params, tokenizer = _load(options)
    # 4096 tokens keep two cores busy without taking much memory.
    T, start = model.config.context_length, list[int]()
    batch_size = max(4096 // T, 1)
    if has_talks:
        folder = Path(options.path)
        split = split_of(options.file, tokenizer, folder if folder.is_dir() else None, T)
        length = min(T, len(split.tokens) - 1)
        batches = split.validation_batches(batch_size=batch_size, context_length=length)
        sizes = {"num_learned": split.num_learned, "num_bytes": split.num_bytes}
    else:
        try:
            tokens = tokenizer.encode_array(text)
        except UserError as error:
            raise UserError(f"{options.file}: {error}") from None
        start = tokenizer.prompt_start()[:T]
        if len(tokens) + len(start) < 2 or not len(tokens):
            raise UserError(f"{options.file}: is a single token; there is nothing to predict")
        length = min(T, len(tokens) - 1 + len(start))
        batches = validation_batches(tokens, batch_size=batch_size, context_length=length, start=start)
        sizes = {"num_learned": len(tokens), "num_bytes": len(text.encode())}
    result = evaluate_batches(model, params, batches, **sizes)
    if options.json:
        print_escaped(json.dumps(result | ({"window_start": start} if start else {})))
    else:
        print_escaped(
            f"{options.file}: loss {result['loss']:.4f} nats per token, perplexity {result['perplexity']:.3f}, "
            f"{result['bits_per_byte']:.4f} bits per byte, over {result['num_tokens']:,} tokens"
            + (f"; each window begins with {tokenizer.decode(start)}" if start else "")
        )
    return 0


def run_tasks(options: argparse.Namespace) -> int:
    """Measures a model on tasks of lm-evaluation-harness, such as hellaswag or lambada_openai."""
    _check_file("--out", options.out)
    from flax_decoder.generation.harness import evaluate_tasks, find_tasks, harness_model

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be at least 1")
    names = [name.strip() for name in options.tasks.rstrip(", ").split(",")]
    tasks = find_tasks(names, options.include_path)  # before the model is read
    results, table = evaluate_tasks(harness_model(*_load(options)), names, tasks, limit=options.limit)
    content = json.dumps({"path": options.path, "step": options.step} | results, indent=2, default=str) + "\n"
    _write_and_show(options.out, content, table)
    return 0


def lens(options: argparse.Namespace) -> int:
    """Writes a page that shows the queries, keys, values and weights of each attention head on a text."""
    _check_file("--out", options.out)
    prompt = _prompt_of(options)
    if prompt == "" or options.max_new_tokens < 0:
        raise UserError("--prompt must be a text of at least one character, --max-new-tokens at least 0")
    import numpy as np

    from flax_decoder.lens.history import read_history
    from flax_decoder.lens.page import check_page_length, write_lens_page

    model, params, tokenizer = _load(options)
    tokens = tokenizer.encode_prompt(prompt)
    check_page_length(model.config, len(tokens) + options.max_new_tokens)
    if options.max_new_tokens > 0:
        from flax_decoder.generation.generate import complete

        greedy: dict[str, Any] = {"temperature": 0.0, "vocab_size": tokenizer.vocab_size}
        ((written,),) = complete(
            model, params, [np.asarray(tokens)], options.max_new_tokens, end_ids=tokenizer.end_ids, **greedy
        )
        tokens += written.tokens.tolist()
    history = read_history(options.path) if Path(options.path).is_dir() else None
    with as_write_fault(options.out):
        write_lens_page(options.out, model, params, tokenizer, np.asarray(tokens), history)
    print_escaped(f"{options.out}: written")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Converts a run folder to a Hugging Face folder or a checkpoint of nanoGPT, or one of these to a run folder."""
    from flax_decoder.loading import convert

    names = ("model_type", "to", "allow_nan", "strict", "tokenizer", "names", "merge", "base")
    convert(options.source, options.destination, **{name: getattr(options, name) for name in names})
    print_escaped(f"{options.destination}: written")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compares a model with PyTorch, tensor by tensor."""
    _check_file("--json", options.json)
    if options.torch is None and (options.checkpoint or options.names):
        raise UserError("--checkpoint and --names belong to a module of your own: give --torch FILE.py:FUNCTION")
    from flax_decoder.loading import compare

    names = ("steps", "batch_size", "length", "seed", "allow_nan", "strict", "checkpoint")
    settings = {name: getattr(options, name) for name in names}
    if options.names is not None:
        from flax_decoder.huggingface.names import read_layout

        settings["names"] = read_layout(options.names)["names"]
    if options.torch is not None:
        from flax_decoder.comparison.user_file import function_of

        settings["torch_model"] = function_of(options.torch)
    ledger = compare(options.path, **settings)
    _write_and_show(options.json, ledger.to_json(), ledger)
    return 0 if ledger.holds else 1


def export(options: argparse.Namespace) -> int:
    """Writes a model as one file of StableHLO, which JAX runs without this package."""
    _check_file("FILE", options.file)
    if options.file.exists():
        raise UserError(f"{options.file}: exists; give a new file")
    from flax_decoder.generation.export import write_stablehlo
    from flax_decoder.loading import load

    model, params, _ = load(options.path, step=options.step, allow_nan=options.allow_nan, strict=options.strict)
    with as_write_fault(options.file):
        write_stablehlo(options.file, model, params)
    print_escaped(f"{options.file}: written")
    return 0


def prepare(options: argparse.Namespace) -> int:
    """Tokenizes texts once, for many runs: `--data.path FOLDER` then takes the result."""
    from flax_decoder.data.corpus import prepare_folder
    from flax_decoder.data.reading_progress import ReadingProgress
    from flax_decoder.data.shards import SPLITS

    given = {name: value for name, value in vars(options).items() if "." in name}
    if "data.path" in given:
        raise UserError(f"give {given['data.path']} as DATA, without --data.path")
    data = load_config(None, given | {"data.path": [*options.data]}).data
    with ReadingProgress() as progress:
        facts = prepare_folder(data, options.out, num_processes=options.processes, progress=progress)
    train, validation = (sum(shard["tokens"] for shard in facts[split]["shards"]) for split in SPLITS)
    print_escaped(
        f"{options.out}: {facts['what_was_read']}\n{train:,} tokens to train on, {validation:,} to validate; "
        f"train with --data.path {options.out}"
    )
    return 0


def verify(options: argparse.Namespace) -> int:
    """Checks every checkpoint of a run, and the files it needs, against its manifest; or a prepared corpus."""
    from flax_decoder.data.shards import is_corpus, load_corpus

    folder = Path(options.path)
    if is_corpus(folder):
        corpus = load_corpus(folder, checks_all=True)
        print_escaped(f"ok       {folder}: {corpus.train.num_tokens:,} tokens to train on")
        return 0
    if not (folder / "config.toml").is_file():
        raise UserError(f"{folder}: is not a run folder: it has no config.toml")
    from flax_decoder.training.verification import verify_run

    holds = True
    for finding in verify_run(folder):
        print_escaped(finding, flush=True)
        holds = holds and finding.passed is not False
    return 0 if holds else 1


def bench(options: argparse.Namespace) -> int:
    """Measures the speed of training and of generation."""
    from flax_decoder.planning.speed import measure_speed

    config = _config_of(options)
    result = measure_speed(config)
    if options.json:
        print_escaped(json.dumps(result))
    else:
        for name, value in result.items():
            print_escaped(f"{name:>28}  {value if isinstance(value, str) else format(value, ',.6g')}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Checks everything that a run needs, from versions to the model itself, in some 30 seconds."""
    config = _config_of(options)
    from flax_decoder.planning.doctor import examine

    holds = True
    for finding in examine(config):
        print_escaped(finding, flush=True)
        holds = holds and finding.status != "FAILED"
    return 0 if holds else 1


def plan(options: argparse.Namespace) -> int:
    """Compiles a training step for other chips: whether it fits, the bytes it moves, the least time it takes."""
    config = _config_of(options)
    _check_file("--json", options.json)
    from flax_decoder.planning.topology import devices_of, prepare

    prepare(options.topology)  # before JAX is imported
    from flax_decoder.planning.fitting import less_remat, smallest_change
    from flax_decoder.planning.plan import make_plan

    devices = devices_of(options.topology)
    made = make_plan(config, devices)
    result = made.to_dict() | {"topology": options.topology}
    _write_and_show(options.json, json.dumps(result, indent=2) + "\n", made)
    found = None
    if made.memory.fits is not None:
        found = less_remat(config, devices, made) if made.memory.fits else smallest_change(config, devices, made)
    if found is not None:
        change, changed = found
        arguments = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())
        result |= {"change": change, "changed": changed.to_dict()}
        lead = "memory is free: it also fits, with less to compute," if made.memory.fits else "it fits"
        shown = f"\n{lead} with {arguments}:\n\n{changed}"
        _write_and_show(options.json, json.dumps(result, indent=2) + "\n", shown)
    elif made.memory.fits is False:
        print("\nnone of the changes tried (remat, accumulation, fsdp) makes it fit: use more or larger chips")
    return 1 if made.memory.fits is False else 0


def _keep_threads_quiet() -> None:
    """Silences the threads of Orbax: their errors are also raised, and reported in one line."""
    for library in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _check_file(name: str, path: Path | None) -> None:
    """Raises UserError, before any work is done, if the path of an argument cannot be a file."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{name} {path}: must name a file in a folder that exists")


def _write_and_show(path: Path | None, content: str, shown: object) -> None:
    """Writes a result to a file, if one was asked for, and prints it; neither is lost if the other fails."""
    try:
        if path is not None:
            with as_write_fault(path):
                write_text(path, content)
    finally:
        print_escaped(shown)


def _load(options: argparse.Namespace) -> "tuple[Decoder, dict[str, Any], Tokenizer]":
    from flax_decoder.loading import load, required_tokenizer

    how = {name: getattr(options, name) for name in ("step", "allow_nan", "strict", "tokenizer")}
    model, params, tokenizer = load(options.path, **how)
    return model, params, required_tokenizer(tokenizer, Path(options.path))


def _sampling_of(options: argparse.Namespace) -> "tuple[Sampling, str]":
    """How to sample: as the arguments say, else generation_config.json; and a line about what comes from there."""
    from flax_decoder.generation.sampling import Sampling
    from flax_decoder.huggingface.folder import read_sampling

    names = {field.name for field in dataclasses.fields(Sampling)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    Sampling(**given)  # an argument that is wrong is no fault of the file
    found = {name: value for name, value in read_sampling(Path(options.path)).items() if name not in given}
    source = Path(options.path) / "generation_config.json"
    told = f"sampling as {source} says: " + ", ".join(f"{name} = {value}" for name, value in found.items())
    try:
        return Sampling(**{"temperature": DEFAULT_TEMPERATURE, **found, **given}), told if found else ""
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _prompt_of(options: argparse.Namespace) -> str:
    """The prompt of --prompt or standard input; UserError if it is not text, or too long."""
    from flax_decoder.data.formats.texts import decode_text

    if options.prompt is not None:
        name = "--prompt"
        try:  # Python decodes each byte of an argument that is not UTF-8 as half a surrogate pair
            content = options.prompt.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # other halves, possible on Windows
            content = options.prompt.encode("utf-8", "surrogatepass")
    else:
        name = "standard input"
        try:
            content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}; give --prompt TEXT") from None
        if len(content) > MAX_PROMPT_BYTES:
            raise UserError(f"{name}: has over {MAX_PROMPT_BYTES:,} bytes, too many for a prompt; give its last part")
    return decode_text(content, name, "give the prompt in UTF-8")


def _draft_of(options: argparse.Namespace) -> "Draft | PromptLookup | None":
    """The drafting method of --draft or --prompt-lookup."""
    from flax_decoder.generation.speculative import Draft, PromptLookup
    from flax_decoder.loading import load

    if options.draft is None:
        return None if options.prompt_lookup == 0 else PromptLookup(options.prompt_lookup)
    if options.prompt_lookup != 0:
        raise UserError("--draft and --prompt-lookup are two ways to draft tokens; give one of them")
    model, params, _ = load(options.draft, allow_nan=options.allow_nan, strict=options.strict)
    return Draft(model, params)


@contextlib.contextmanager
def _warnings_of_folders() -> Iterator[None]:
    """Prints what is passed over in a model folder as one line; other warnings as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", FolderWarning)
        show = warnings.showwarning

        def show_in_a_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, FolderWarning):
                print_escaped(f"warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_in_a_line
        yield


def _config_of(options: argparse.Namespace) -> Config:
    """The config of a command line, whose arguments with a dot in their names are its fields.

    Its warnings are printed, by the first process of a job only.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = _read_config(options)
    if find_job(config.distributed, os.environ)[1] in (None, 0):
        for warning in caught:
            print_escaped(f"warning: {warning.message}", file=sys.stderr)
    return config


def _read_config(options: argparse.Namespace) -> Config:
    given = {name: value for name, value in vars(options).items() if "." in name}
    config = load_config(options.config, given)
    if config.run.start_from is None:
        return config
    from flax_decoder.loading import model_config_of
    from flax_decoder.training.run_folder import START_FROM

    folder = Path(config.run.folder or ".")
    # A run that has begun has a copy of what it needs; where it came from may be gone.
    source = folder if (folder / START_FROM).is_file() else Path(config.run.start_from)
    config = load_config(options.config, given, start=model_config_of(source))
    run = dataclasses.replace(config.run, start_from=os.path.abspath(config.run.start_from or ""))
    return dataclasses.replace(config, run=run)


def _started(config: Config, folder: Path) -> "tuple[Config, Start | None]":
    """The config of a run that starts from a trained model, and for a new run that model."""
    from flax_decoder.loading import read_start
    from flax_decoder.training.checkpoint import saved_steps

    path, own = Path(config.run.start_from or ""), str(folder / "tokenizer.json")
    if path.is_dir() and config.data.tokenizer not in (DataConfig().tokenizer, own) and not Path(own).exists():
        raise UserError(f"{path}: has its own tokenizer; leave out data.tokenizer = {config.data.tokenizer}")
    start = None if saved_steps(folder) else read_start(path, None if path.is_dir() else config.data.tokenizer)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=own)), start


class _Formatter(argparse.HelpFormatter):
    """Shows defaults; in the usage, one word stands for all fields of a config."""

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """Adds the usage, without the fields of a config."""
        own = [action for action in actions if "." not in action.dest]
        if len(own) < len(actions):
            own.append(argparse.Action(["--SECTION.FIELD"], "", metavar="VALUE"))
        super().add_usage(usage, own, groups, prefix)

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS)) or action.default == []
        return (action.help or "") + ("" if hidden else " (default: %(default)s)")


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, and how to get help in a second."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": _Formatter} | options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also accepts underscores in the names of options. Every other word stays as it is."""
        words = list(args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._with_hyphens, words[:end]), *words[end:]], namespace)

    def _with_hyphens(self, word: str) -> str:
        name, equals, value = word.partition("=")
        hyphenated = name.replace("_", "-")
        return hyphenated + equals + value if hyphenated in self._option_string_actions else word

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.12.5, argparse drops the value of `--prompt=--`.
        if arg_strings == ["--"] and action.option_strings and action.nargs is None:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def print_help(self, file: Any = None) -> None:
        """Raises the OSError of an output that fails, which argparse drops."""
        print_escaped(self.format_help(), end="", file=file, flush=True)

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        name = re.fullmatch("argument (--[^ ]+): expected one argument", message)
        if name is not None:
            value = self._option_string_actions[name[1]].metavar
            message += f"; if it begins with a hyphen, write {name[1]}={value}"
        raise UserError(f"{message}\nhelp: {self.prog} --help")

    def refuse(self, argument: str) -> NoReturn:
        """Raises UserError for an unknown argument, with the nearest known one."""
        name = argument.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown argument {name}{did_you_mean(name.replace('_', '-'), known)}")


class _Version(argparse.Action):
    """Prints the version of the package, that of JAX, and the devices."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints, and ends the command."""
        import jax

        kinds = collections.Counter(device.device_kind for device in jax.devices())
        devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        print_escaped(f"flax-decoder {__version__}, jax {jax.__version__}, {devices}", flush=True)
        parser.exit()


def build_parser() -> Parser:
    """The command line of `flax-decoder`."""
    parser = Parser(prog="flax-decoder", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions and the devices")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    config, data, model, prompt, sampling, reading, tokenizer = (Parser(add_help=False) for _ in range(7))
    reading.add_argument("--allow-nan", action="store_true", help="also read NaN weights, if not those of a run")
    reading.add_argument("--strict", action="store_true", help="refuse a config.json with any field that is not known")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="char:FILE|PATH",
        help="of a model without one: the characters of a text, or a tokenizer.json",
    )
    loading = Parser(add_help=False, parents=[reading, tokenizer])

    def add(name: str, command: Callable[[argparse.Namespace], int], *shared: Parser) -> Callable[..., argparse.Action]:
        made: Parser = commands.add_parser(
            name, help=command.__doc__, description=command.__doc__, parents=shared, allow_abbrev=False
        )
        made.set_defaults(command=command, parser=made)
        return made.add_argument

    # Arguments that several commands share.
    config.add_argument(
        "config",
        metavar="CONFIG.toml",
        type=expand_home,
        nargs="?",
        help="a file of the settings below, num_layers = 6 under [model] for --model.num-layers 6; NAME alone is "
        "configs/NAME.toml; without one, settings have their defaults",
    )
    _add_config_fields(config, SECTIONS)
    _add_config_fields(data, ["data"])
    kinds = "a run folder, a Hugging Face folder, or a ckpt.pt of nanoGPT"
    model.add_argument("path", metavar="PATH", type=expand_home, help=kinds)
    prompt.add_argument("--prompt", metavar="TEXT", help="a text; default: standard input")
    loading.add_argument("--step", metavar="N|best|latest", type=_step, default="latest", help="which checkpoint")
    for name, kind, default, text in (
        ("--temperature", float, DEFAULT_TEMPERATURE, "0 always takes the likeliest token"),
        ("--top-k", _count, 0, "sample from the N likeliest tokens only"),
        ("--top-p", float, 1, "sample from the likeliest tokens with a total probability of F"),
        ("--min-p", float, 0, "sample from tokens at least F times as likely as the likeliest"),
        ("--repetition-penalty", float, 1, "over 1: tokens of the text so far become less likely"),
    ):
        text += f"; default: what generation_config.json says, else {default}"
        sampling.add_argument(name, metavar="N" if kind is _count else "F", type=kind, help=text)
    for name, text in (
        ("--presence-penalty", "subtracted from the logits of tokens in the new text"),
        ("--frequency-penalty", "the same, times the count of the token"),
    ):
        sampling.add_argument(name, metavar="F", type=float, default=0.0, help=text)
    sampling.add_argument("--seed", metavar="N", type=_count, default=0, help="the same seed gives the same text")

    add("train", train, config)

    argument = add("prepare", prepare, data)
    argument("data", metavar="DATA", type=expand_home, nargs="+", help="text files, folders of them, globs")
    argument("--out", metavar="FOLDER", type=_path, required=True, help="a new folder for the tokens")
    argument("--processes", metavar="N", type=_count, help="how many read at once; default: one per core")

    argument = add("generate", generate, model, prompt, sampling, loading)
    argument("--max-new-tokens", metavar="N", type=_count, default=500, help="per text")
    argument("--num-samples", metavar="N", type=_count, default=1, help="number of texts, generated at once")
    argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated")
    argument("--no-stream", action="store_true", help="print when the whole text is generated")
    argument(
        "--prompt-lookup", metavar="N", type=_count, default=0, help="draft N tokens from the text: faster; 0 is off"
    )
    argument("--draft", metavar="PATH", type=expand_home, help="draft tokens with this smaller model: faster")

    argument = add("chat", chat, sampling, loading)
    argument("path", metavar="PATH", type=expand_home, help="a Hugging Face folder with a chat template")
    argument("--system", metavar="TEXT", help="the system message")
    argument("--max-new-tokens", metavar="N", type=_count, default=1000, help="per answer")

    argument = add("eval", evaluate, model, loading)
    argument("file", metavar="FILE", type=expand_home, help="a text, or conversations")
    argument("--json", action="store_true", help="print one JSON object")

    argument = add("evaluate", run_tasks, model, loading)
    argument("--tasks", metavar="NAME,...", required=True, help="tasks, groups or tags; `lm_eval ls tasks` lists them")
    argument("--include-path", metavar="DIR", type=_path, help="a folder with more tasks, as files of YAML")
    argument("--limit", metavar="N", type=_count, help="take N documents of each task only")
    argument("--out", metavar="FILE.json", type=_path, help="also write the results to a file")

    argument = add("lens", lens, model, prompt, loading)
    page = Path("lens.html")
    argument("--out", metavar="FILE.html", type=_path, default=page, help="the page; an existing file is replaced")
    argument("--max-new-tokens", metavar="N", type=_count, default=0, help="first append N greedy tokens to the text")

    argument = add("convert", convert, reading, tokenizer)
    argument("source", metavar="SRC", type=expand_home, help=kinds)
    argument("destination", metavar="DST", type=expand_home, help="a new run folder, or of a run the other kind")
    argument(
        "--names", metavar="FILE.toml", type=expand_home, help="what the tensors of your own PyTorch model are in ours"
    )
    argument("--to", metavar="nanogpt", help="write a ckpt.pt of nanoGPT instead of a Hugging Face folder")
    argument("--merge", action="store_true", help="of a run with adapters, write whole weights and not the adapters")
    argument("--base", metavar="PATH", type=expand_home, help="of a folder of PEFT, the model its adapters belong to")
    argument(
        "--model-type", metavar="NAME", help="Hugging Face model type to write, such as llama; by default the nearest"
    )

    argument = add("compare", compare, model, reading)
    argument("--steps", metavar="N", type=_count, default=0, help="also compare N steps of AdamW")
    argument("--json", metavar="FILE", type=_path, help="also write the rows to a file")
    argument("--batch-size", metavar="N", type=_count, default=2, help="sequences per batch, an even number")
    argument("--length", metavar="N", type=_count, help="tokens per sequence")
    argument("--seed", metavar="N", type=_count, default=0, help="of the random tokens")
    argument(
        "--torch",
        metavar="FILE.py:FUNCTION",
        type=expand_home,
        help="compare with the torch.nn.Module that this function makes; runs the file, so it must be one you trust",
    )
    argument("--checkpoint", metavar="FILE", type=_path, help="a .pt file that the module of --torch loads first")
    argument("--names", metavar="FILE.toml", type=_path, help="which tensor of the module of --torch is which of ours")

    argument = add("export", export, model, loading)
    argument("file", metavar="FILE", type=_path, help="the new file")

    argument = add("verify", verify)
    argument("path", metavar="PATH", type=expand_home, help="a run folder, or a prepared corpus")

    argument = add("plan", plan, config)
    argument(
        "--topology", metavar="NAME", default="local", help="v5p:4x4x4, v5e:4x4, h100:8, ...; local is this machine"
    )
    argument("--json", metavar="FILE", type=_path, help="also write the numbers to a file")

    add("doctor", doctor, config)

    argument = add("bench", bench, config)
    argument("--json", action="store_true", help="print one JSON object")
    return parser


def _count(text: str, alternatives: str = "") -> int:
    """A whole number of at most 32 bits, which may be written as 1e3."""
    for read in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            number = read(text)
            if number == int(number) and abs(number) < 2**32:
                return int(number)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number{alternatives}")


def _step(text: str) -> str | int:
    return text if text in ("best", "latest") else _count(text, ", best or latest")


def _path(text: str) -> Path:
    return Path(expand_home(text))


def _add_config_fields(parser: Parser, sections: Iterable[str]) -> None:
    """Adds an argument for every config field of some sections; values are TOML, strings without quotes."""
    for section in sections:
        group = parser.add_argument_group(f"[{section}]", SECTIONS[section].__doc__)
        for name, field in fields_of(section).items():
            shown = field.default if isinstance(field.default, str) else json.dumps(field.default)
            default = "" if field.default is None else f" (default: {shown})"
            group.add_argument(
                f"--{section}.{name}".replace("_", "-"),
                dest=f"{section}.{name}",
                metavar="|".join(_kinds(field.annotation)),
                default=argparse.SUPPRESS,
                help=(field.description + default).replace("%", "%%"),
            )


def _kinds(annotation: Any) -> list[str]:
    """What a field may be, such as ["INT"] or ["pre", "post"]; None is left out."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kinds(parts[0])
    if origin is typing.Literal:
        return list(parts)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in parts if part is not types.NoneType for kind in _kinds(part)]
    return ["LIST" if origin is tuple else annotation.__name__.upper()]


def _keep_compilations() -> None:
    """Makes JAX cache compiled programs in the user's cache folder; without one, prints a warning.

    Whoever can write there decides what the programs compute: it must be the user's, and closed to others.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        if folder is None:
            folder = str(cache_folder() / "flax_decoder")
        if folder and "://" not in folder:  # empty is off; JAX itself checks the URL of a bucket
            os.makedirs(folder, 0o700, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "may not be written", folder)
            status = os.stat(folder)
            if status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "belongs to another user, who could change what runs", folder)
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(
                    errno.EPERM,
                    "others may write there and so change what runs; if it is for nothing else, delete it",
                    folder,
                )
    except OSError as error:
        print_escaped(
            f"warning: compiled programs are not kept for the next start: {error.filename}: {error.strerror}; "
            "set XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to a folder of yours",
            file=sys.stderr,
        )
        folder = ""
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would warn about the same folder
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def cache_folder() -> Path:
    """The user's cache folder, by the XDG Base Directory Specification.

    Raises:
        OSError: the user has no home folder, as in many containers.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # the specification says to ignore others
        return given
    home = expand_home("~")
    if home == "~":
        raise FileNotFoundError(errno.ENOENT, "there is no such home folder", os.environ.get("HOME", home))
    return Path(home) / ".cache"
