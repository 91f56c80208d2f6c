"""The commands, one short function each. JAX is imported inside of them: help and refusals do not wait for it."""

import argparse
import dataclasses
import difflib
import errno
import functools
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from flax_decoder.config import SECTIONS, Config, fields_of
from flax_decoder.config_file import load_config
from flax_decoder.errors import FaultError, InUseError, UserError
from flax_decoder.io.lock import refuse_if_in_use
from flax_decoder.io.terminal import print_escaped
from flax_decoder.parallel.launchers import find_job, in_a_job

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

    from flax_decoder.generation.sampling import Sampling
    from flax_decoder.generation.speculative import Draft, PromptLookup

# A prompt from standard input may have this many bytes: more than any model reads, and an end to what has none.
MAX_PROMPT_BYTES = 16_000_000
DESCRIPTION = "A decoder-only transformer in JAX and Flax Linen: train it on a text, and let it write."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0 done, 1 a fault, 2 the user's input, 73 in use, over 128 a signal."""
    # Both unwind what is under way; training takes over when it has something to save.
    before = {number: signal.signal(number, _leave) for number in _LEAVING}
    hook_before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_send_again, hook_before)
    try:
        options, unknown = build_parser().parse_known_args(
            _with_hyphens(sys.argv[1:] if arguments is None else arguments)
        )
        if unknown:
            options.parser.refuse(unknown[0])
        command: Callable[[argparse.Namespace], int] = options.command
        _keep_compilations()
        return command(options)
    except UserError as error:
        print_escaped(f"error: {error}", file=sys.stderr)
        return 2
    except FaultError as error:
        print_escaped(f"fault: {error}", file=sys.stderr)
        return 1
    except InUseError as error:
        print_escaped(f"error: {error}", file=sys.stderr)
        return 73
    except BrokenPipeError:
        # The reader has gone, as `head` does; Python must not try to flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # those that say more than the system does have been turned into one of the above
        print_escaped(
            f"fault: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Terminated:
        return 128 + signal.SIGTERM
    finally:
        sys.unraisablehook = hook_before
        for number, handler in before.items():
            signal.signal(number, handler)


class Terminated(BaseException):
    """SIGTERM has come: as KeyboardInterrupt, it passes through all that only looks after errors."""


# What each signal raises.
_LEAVING = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ends what is under way by an exception; but at once during an import, before there is anything to end.

    A module in C that is being imported makes an ImportError of the exception, or crashes, as those of JAX do.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + number)
        frame = frame.f_back
    raise _LEAVING[signal.Signals(number)]


def _send_again(otherwise: Callable[["UnraisableHookArgs"], Any], dropped: "UnraisableHookArgs") -> None:
    """Sends a signal once more whose exception Python has dropped, as it does in callbacks of its garbage collector.

    JAX has such a callback. It is sent a little later, so that it does not come in this function.
    """
    numbers = {raised: number for number, raised in _LEAVING.items()}
    if dropped.exc_type in numbers:
        threading.Timer(0.01, os.kill, (os.getpid(), numbers[dropped.exc_type])).start()
    else:
        otherwise(dropped)


def train(options: argparse.Namespace) -> int:
    """Trains on a text, then writes new text."""
    config = _config_of(options)
    folder = Path(config.run.folder or ".")
    # Said again, and for good, when the folder is taken; but that has waited for JAX. Processes of a job share it.
    if config.distributed.coordinator is None and not in_a_job(os.environ):
        refuse_if_in_use(folder)
    from flax_decoder.training import loop

    _keep_threads_quiet()
    return loop.train(config, folder)


def generate(options: argparse.Namespace) -> int:
    """Streams text that continues a prompt."""
    from flax_decoder.generation.stream import stream
    from flax_decoder.generation.text import decode_streams

    sampling = _sampling_of(options)
    prompt = _prompt_of(options)
    if options.num_samples < 1 or options.max_new_tokens < 0 or "" in options.stop:
        raise UserError("--num-samples must be at least 1, --max-new-tokens at least 0, and --stop a text")
    import jax
    import numpy as np

    from flax_decoder.loading import load_with_tokenizer

    model, params, tokenizer = load_with_tokenizer(options.path, options.step, allow_nan=options.allow_nan)
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
        guess=_guess_of(options),
    )
    pieces = decode_streams(tokenizer, (part.tokens_BC for part in written), options.num_samples, options.stop)
    if options.no_stream:
        pieces = iter(list(pieces))
    shown = 0
    print_escaped(prompt, end="", flush=True)
    for row, piece in pieces:
        for _ in range(shown, row):
            print_escaped(f"\n\n{prompt}", end="")
        shown = row
        print_escaped(piece, end="", flush=True)
    for _ in range(shown + 1, options.num_samples):
        print_escaped(f"\n\n{prompt}", end="")
    print()
    return 0


def chat(options: argparse.Namespace) -> int:
    """Talks with a model whose tokenizer brings a chat template; Ctrl-C ends an answer, a second one leaves."""
    sampling = _sampling_of(options)
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if not Path(options.path).is_dir():
        raise UserError(f"{options.path}: there is no such folder")
    from flax_decoder.data.chat_template import load_chat_template

    template = load_chat_template(Path(options.path))
    import jax

    from flax_decoder.generation.chat import Chat
    from flax_decoder.loading import load_with_tokenizer

    model, params, tokenizer = load_with_tokenizer(options.path, options.step, allow_nan=options.allow_nan)
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
            pieces.close()  # the part that was shown stays in the conversation
        print(flush=True)


def evaluate(options: argparse.Namespace) -> int:
    """Prints loss, perplexity and bits per byte of a model on a text."""
    from flax_decoder.data.corpus import read_text

    text = read_text(options.file).text
    from flax_decoder.loading import load_with_tokenizer
    from flax_decoder.training import evaluation

    model, params, tokenizer = load_with_tokenizer(options.path, options.step, allow_nan=options.allow_nan)
    try:
        tokens = tokenizer.encode_array(text)
    except UserError as error:
        raise UserError(f"{options.file}: {error}") from None
    if len(tokens) < 2:
        raise UserError(f"{options.file}: is a single token; there is nothing to predict")
    # As many tokens at once as keep two cores busy without taking much memory.
    batch_size = max(4096 // model.config.context_length, 1)
    result = evaluation.evaluate(model, params, tokens, len(text.encode()), batch_size=batch_size)
    if options.json:
        print(json.dumps(result))
    else:
        print_escaped(
            f"{options.file}: loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.3f}, "
            f"{result['bits_per_byte']:.4f} bits per byte, over {result['num_tokens']:,} tokens"
        )
    return 0


def lens(options: argparse.Namespace) -> int:
    """Writes a page on which one can read what each attention head did with a text, and why."""
    _check_file("--out", options.out)
    prompt = _prompt_of(options)
    if prompt == "" or options.max_new_tokens < 0:
        raise UserError("--prompt must be a text of at least one character, --max-new-tokens at least 0")
    import numpy as np

    from flax_decoder.lens.history import read_history
    from flax_decoder.lens.page import check_page_length, write_lens_page
    from flax_decoder.loading import load_with_tokenizer

    model, params, tokenizer = load_with_tokenizer(options.path, options.step, allow_nan=options.allow_nan)
    tokens = tokenizer.encode_prompt(prompt)
    check_page_length(model.config, len(tokens) + options.max_new_tokens)
    if options.max_new_tokens > 0:
        from flax_decoder.generation.generate import complete

        ((written,),) = complete(
            model, params, [np.asarray(tokens)], options.max_new_tokens, end_ids=tokenizer.end_ids, temperature=0.0
        )
        tokens += written.tokens.tolist()
    history = read_history(options.path)
    try:
        write_lens_page(options.out, model, params, tokenizer, np.asarray(tokens), history)
    except OSError as error:
        raise FaultError(f"{options.out}: cannot be written: {error}") from error
    print_escaped(f"{options.out}: written")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Makes a Hugging Face folder out of a run folder, or a run folder out of a Hugging Face folder."""
    from flax_decoder.loading import convert

    convert(options.source, options.destination, model_type=options.model_type, allow_nan=options.allow_nan)
    print_escaped(f"{options.destination}: written")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Compares a model with PyTorch, tensor by tensor."""
    _check_file("--json", options.json)
    from flax_decoder.io.files import write_text
    from flax_decoder.loading import compare

    names = ("steps", "batch_size", "length", "seed", "allow_nan")
    ledger = compare(options.path, **{name: getattr(options, name) for name in names})
    print_escaped(ledger)
    if options.json is not None:
        try:
            write_text(options.json, ledger.to_json())
        except OSError as error:
            raise FaultError(f"{options.json}: cannot be written: {error}") from error
    return 0 if ledger.holds else 1


def verify(options: argparse.Namespace) -> int:
    """Checks every checkpoint of a run, and what they hang on, against their manifests."""
    folder = Path(options.path)
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
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>28}  {value if isinstance(value, str) else format(value, ',.6g')}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Checks all that a run needs, from the versions to the model itself, in under a minute."""
    config = _config_of(options)
    from flax_decoder.planning.doctor import examine

    _keep_threads_quiet()
    holds = True
    for finding in examine(config):
        print(finding, flush=True)
        holds = holds and finding.status != "FAILED"
    return 0 if holds else 1


def plan(options: argparse.Namespace) -> int:
    """Compiles a training step for chips that need not be here: does it fit, what does it move, how long at least."""
    config = _config_of(options)
    _check_file("--json", options.json)
    from flax_decoder.planning.topology import devices_of, prepare

    prepare(options.topology)  # before JAX is imported
    from flax_decoder.io.files import write_text
    from flax_decoder.planning.fitting import smallest_change
    from flax_decoder.planning.plan import make_plan

    devices = devices_of(options.topology)
    made = make_plan(config, devices)
    print(made)
    result = made.to_dict() | {"topology": options.topology}
    if made.memory.fits is False:
        found = smallest_change(config, devices, made)
        if found is None:
            print("\nnone of the changes tried (remat, accumulation, fsdp) makes it fit: it takes more or larger chips")
        else:
            change, smaller = found
            arguments = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())
            print(f"\nit fits with {arguments}:\n\n{smaller}")
            result |= {"change": change, "changed": smaller.to_dict()}
    if options.json is not None:
        try:
            write_text(options.json, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise FaultError(f"{options.json}: cannot be written: {error}") from error
    return 1 if made.memory.fits is False else 0


def _keep_threads_quiet() -> None:
    """What goes wrong in the threads of Orbax is raised, too, and told in one line: they need not log pages of it."""
    for library in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _check_file(name: str, path: Path | None) -> None:
    """Raises UserError, before any work is done, where a file cannot be at the path that an argument gives."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{name} {path}: must name a file in a folder that exists")


def _sampling_of(options: argparse.Namespace) -> "Sampling":
    """The settings of `Sampling` that a command line asks for, which go by the same names."""
    from flax_decoder.generation.sampling import Sampling

    given = vars(options)
    return Sampling(**{field.name: given[field.name] for field in dataclasses.fields(Sampling) if field.name in given})


def _prompt_of(options: argparse.Namespace) -> str:
    """The prompt, which is text; UserError where its bytes are not, or do not end."""
    from flax_decoder.data.corpus import decode_text

    if options.prompt is not None:
        name = "--prompt"
        try:  # bytes of an argument that are not UTF-8 come as half surrogates, one each
            content = options.prompt.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # other halves, which only Windows gives
            content = options.prompt.encode("utf-8", "surrogatepass")
    else:
        content = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        name = "standard input"
        if len(content) > MAX_PROMPT_BYTES:
            raise UserError(f"{name}: has over {MAX_PROMPT_BYTES:,} bytes, which is no prompt; give its last part")
    return decode_text(content, name, "give the prompt in UTF-8")


def _guess_of(options: argparse.Namespace) -> "Draft | PromptLookup | None":
    """How a command line wants tokens to be guessed."""
    from flax_decoder.generation.speculative import Draft, PromptLookup
    from flax_decoder.loading import load

    if options.draft is None:
        return None if options.prompt_lookup == 0 else PromptLookup(options.prompt_lookup)
    if options.prompt_lookup != 0:
        raise UserError("--draft and --prompt-lookup are two ways to guess tokens; give one of them")
    model, params, _ = load(options.draft, allow_nan=options.allow_nan)
    return Draft(model, params)


def _config_of(options: argparse.Namespace) -> Config:
    """The config that a command line asks for; the arguments with a dot in their names are its fields.

    What was changed in it is told in a line, by the first process of a job.
    """
    with warnings.catch_warnings(record=True) as changes:
        warnings.simplefilter("always")
        config = load_config(options.config, {name: value for name, value in vars(options).items() if "." in name})
    if find_job(config.distributed, os.environ)[1] in (None, 0):
        for change in changes:
            print_escaped(f"warning: {change.message}", file=sys.stderr)
    return config


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and where help is in a second."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing all the usage."""
        raise UserError(f"{message}\nhelp: {self.prog} --help")

    def refuse(self, argument: str) -> NoReturn:
        """Raises UserError for an argument that this command does not know, with the nearest one that it does."""
        name = argument.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(name, known, n=1)
        self.error(f"unknown argument {name}" + (f"; did you mean {near[0]}?" if near else ""))


def build_parser() -> Parser:
    """The command line of `flax-decoder`."""
    parser = Parser(prog="flax-decoder", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int]) -> Parser:
        made: Parser = commands.add_parser(name, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        made.set_defaults(command=command, parser=made)
        return made

    sub = add("train", train)
    sub.add_argument("config", metavar="CONFIG.toml", nargs="?", help="left out: the embedded default")
    _add_config_fields(sub)

    sub = add("generate", generate)
    sub.add_argument("path", metavar="PATH", help="a run folder, or a Hugging Face folder")
    sub.add_argument("--prompt", metavar="TEXT", help="what to continue; left out, it is read from standard input")
    sub.add_argument("--max-new-tokens", metavar="N", type=int, default=500)
    _add_sampling(sub)
    sub.add_argument("--num-samples", metavar="N", type=int, default=1, help="texts to write, all at once")
    sub.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated"
    )
    sub.add_argument("--no-stream", action="store_true", help="print when all is written")
    sub.add_argument("--prompt-lookup", metavar="N", type=int, default=0, help="guess N tokens from the text: faster")
    sub.add_argument("--draft", metavar="PATH", help="guess tokens with this smaller model: faster")
    _add_loading(sub)

    sub = add("chat", chat)
    sub.add_argument("path", metavar="PATH", help="a Hugging Face folder with a chat template")
    sub.add_argument("--system", metavar="TEXT", help="what the model is told before the first message")
    sub.add_argument("--max-new-tokens", metavar="N", type=int, default=1000, help="the longest answer")
    _add_sampling(sub)
    _add_loading(sub)

    sub = add("eval", evaluate)
    sub.add_argument("path", metavar="PATH", help="a run folder, or a Hugging Face folder")
    sub.add_argument("file", metavar="FILE", help="a text")
    sub.add_argument("--json", action="store_true", help="one JSON object")
    _add_loading(sub)

    sub = add("lens", lens)
    sub.add_argument("path", metavar="PATH", help="a run folder, or a Hugging Face folder")
    sub.add_argument("--prompt", metavar="TEXT", help="the text; left out, it is read from standard input")
    sub.add_argument("--out", metavar="FILE.html", type=Path, required=True, help="the page; a file there is replaced")
    sub.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=0, help="first let the model add N tokens, the likeliest"
    )
    _add_loading(sub)

    sub = add("convert", convert)
    sub.add_argument("source", metavar="SRC", help="a run folder, or a Hugging Face folder")
    sub.add_argument("destination", metavar="DST", help="a folder of the other kind, which must not exist yet")
    sub.add_argument(
        "--model-type", metavar="NAME", help="Hugging Face model type to write, such as llama; by default the nearest"
    )
    _add_allow_nan(sub)

    sub = add("compare", compare)
    sub.add_argument("path", metavar="PATH", help="a run folder, or a Hugging Face folder")
    sub.add_argument("--steps", metavar="N", type=int, default=0, help="also compare N steps of AdamW")
    sub.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to a file")
    sub.add_argument("--batch-size", metavar="N", type=int, default=2, help="sequences a batch, an even number")
    sub.add_argument("--length", metavar="N", type=int, help="tokens a sequence")
    sub.add_argument("--seed", metavar="N", type=int, default=0, help="of the random tokens")
    _add_allow_nan(sub)

    sub = add("verify", verify)
    sub.add_argument("path", metavar="PATH", help="a run folder")

    sub = add("plan", plan)
    sub.add_argument("config", metavar="CONFIG.toml", nargs="?", help="left out: the embedded default")
    sub.add_argument(
        "--topology", metavar="NAME", default="local", help="v5p:4x4x4, v5e:4x4, h100:8, ...; by default what is here"
    )
    sub.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to a file")
    _add_config_fields(sub)

    sub = add("doctor", doctor)
    sub.add_argument("config", metavar="CONFIG.toml", nargs="?", help="left out: the embedded default")
    _add_config_fields(sub)

    sub = add("bench", bench)
    sub.add_argument("config", metavar="CONFIG.toml", nargs="?", help="left out: the embedded default")
    sub.add_argument("--json", action="store_true", help="one JSON object")
    _add_config_fields(sub)
    return parser


def _add_sampling(parser: Parser) -> None:
    number = functools.partial(parser.add_argument, metavar="F", type=float)
    number("--temperature", default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top-k", metavar="N", type=int, default=0, help="draw from the N likeliest tokens only")
    number("--top-p", default=1.0, help="draw from the likeliest tokens up to F")
    number("--min-p", default=0.0, help="as likely as F times the likeliest")
    number("--repetition-penalty", default=1.0, help="over 1: what is in the text already becomes less likely")
    number("--presence-penalty", default=0.0, help="taken off the logits of what is in the new text")
    number("--frequency-penalty", default=0.0, help="the same, times how often it is there")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed writes the same text")


def _add_loading(parser: Parser) -> None:
    _add_allow_nan(parser)
    parser.add_argument(
        "--step", metavar="N|best|latest", type=_step, default="latest", help="which checkpoint; the newest by default"
    )


def _add_allow_nan(parser: Parser) -> None:
    parser.add_argument("--allow-nan", action="store_true", help="read a Hugging Face folder with NaN weights too")


def _step(text: str) -> str | int:
    return text if text in ("best", "latest") else int(text)


def _add_config_fields(parser: Parser) -> None:
    """An argument for every field of the config; values are written as in TOML, text without quotes."""
    for section in SECTIONS:
        group = parser.add_argument_group(f"[{section}]")
        for name, field in fields_of(section).items():
            default = "" if field.default is None else f" ({_shown(field.default)})"
            group.add_argument(
                f"--{section}.{name}".replace("_", "-"),
                dest=f"{section}.{name}",
                metavar=_kind(field.annotation),
                default=argparse.SUPPRESS,
                help=(field.description + default).replace("%", "%%"),
            )


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _kind(annotation: Any) -> str:
    """What a value looks like in the help, such as INT or pre|post."""
    words = getattr(annotation, "__args__", ())
    if words and all(isinstance(word, str) for word in words):
        return "|".join(words)
    names = [getattr(part, "__name__", "") for part in (*words, annotation)]
    return next((name.upper() for name in names if name in ("int", "float", "bool", "str")), "LIST")


def _with_hyphens(arguments: Sequence[str]) -> list[str]:
    """Underscores and hyphens are the same in the names of arguments."""
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        result.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return result


def _keep_compilations() -> None:
    """Keeps compiled programs in the user's cache folder: the next start of the same program need not compile.

    Where there is none, as in many containers, a line says so, and each start compiles anew.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        if folder is None:
            folder = str(cache_folder() / "flax_decoder")
        if folder and "://" not in folder:  # empty it is off, and of what is elsewhere JAX knows more
            os.makedirs(folder, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "may not be written", folder)
    except OSError as error:
        print_escaped(
            f"warning: compiled programs are not kept for the next start: {error.filename}: {error.strerror}; "
            "set XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to a folder of yours",
            file=sys.stderr,
        )
        folder = ""
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it makes a temporary folder, and would tell the same
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def cache_folder() -> Path:
    """Where the user's programs keep what they can make again, by the XDG Base Directory Specification.

    Raises:
        OSError: the user has no home; programs that run as nobody, or as a number, have none.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # the specification says to pass over others
        return given
    # Python takes an empty HOME for the root folder, and ~ stays as it is where nobody knows a home.
    home = "~" if os.environ.get("HOME") == "" else os.path.expanduser("~")
    if not (os.path.isabs(home) and os.path.isdir(home)):
        raise FileNotFoundError(errno.ENOENT, "there is no such home folder", home)
    return Path(home) / ".cache"
