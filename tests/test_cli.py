import io
import json
import logging
import math
import os
import re
import runpy
import shlex
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path

import code_pages
import jax
import pytest
from job import SMALL, TEXT
from limits import HANGS_SECONDS

from flax_decoder.cli import build_parser, main
from flax_decoder.config import SECTIONS, fields_of

ARGUMENTS = [*SMALL, "--training.eval-every=4", "--training.save-every=4", "--training.log-every=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run on TEXT."""
    folder = tmp_path_factory.mktemp("run") / "x"
    text = folder.parent / "hamlet.txt"
    text.write_text(TEXT)
    assert main(["train", *ARGUMENTS, f"--data.path={text}", f"--run.folder={folder}"]) == 0
    return str(folder)


@pytest.fixture
def refused(refused):
    """As in conftest.py, beside two texts."""
    Path("hamlet.txt").write_text(TEXT)
    Path("single.txt").write_text("T")
    return refused


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("", ["COMMAND"]),
        ("fly", ["fly"]),
        ("train --training.num-stepz 3", ["--training.num-stepz", "did you mean --training.num-steps?"]),
        ("train --model.embed-dim=10 --model.num-heads=4", ["embed_dim = 10", "num_heads = 4"]),
        ("train --data.path=missing.txt", ["missing.txt", "no such file"]),
        ("train --data.path=hamlet.txt --model.context-length=500", ["hamlet.txt", "context_length = 500"]),
        ("train --data.path=hamlet.txt --model.vocab-size=3", ["model.vocab_size = 3", "--model.vocab-size none"]),
        ("generate nowhere --prompt To", ["nowhere"]),
        ("generate RUN --prompt To --temperature -1", ["temperature = -1"]),
        ("generate RUN --prompt To --prompt-lookup -1", ["num_tokens = -1"]),
        ("generate RUN --prompt To --prompt-lookup 2 --draft x", ["--draft", "--prompt-lookup"]),
        ("generate RUN --prompt To --draft nowhere", ["nowhere"]),
        ("generate RUN --prompt To --prompt-lookup 2 --max-new-tokens 7", ["context_length = 8"]),
        ("generate RUN --prompt To --max-new-tokens -1", ["--max-new-tokens"]),
        ("generate RUN --prompt To --num-samples 0", ["--num-samples"]),
        ("generate RUN --prompt To --step 3", ["step 3", "there are 4"]),
        ("generate RUN --promt To", ["--promt", "did you mean --prompt?"]),
        ("eval RUN missing.txt", ["missing.txt"]),
        ("eval RUN single.txt", ["single.txt", "a single token"]),
        ("lens RUN --prompt To --out .", ["--out .", "must name a file in a folder that exists"]),
        ("lens RUN --prompt To --out missing/x.html", ["--out missing/x.html"]),
        ("lens RUN --prompt= --out x.html", ["--prompt must be a text"]),
        ("lens RUN --prompt To --out x.html --max-new-tokens -1", ["--max-new-tokens at least 0"]),
        ("lens RUN --prompt 'To be, or' --out x.html", ["9 tokens", "8 learned positions"]),
        ("lens RUN --prompt 'To be' --out x.html --max-new-tokens 4", ["9 tokens", "8 learned positions"]),
        ("lens RUN --prompt To~ --out x.html", ["'~'", "vocabulary"]),
    ],
)
def test_wrong_input_is_refused(refused, run, command, parts):
    error = refused(*shlex.split(command.replace("RUN", shlex.quote(run))))
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(("process", "count"), [(0, 1), (1, 0)])
def test_one_process_of_a_job_tells_what_was_changed(capsys, process, count):
    changes = ["--optimizer.warmup-steps=9", "--training.num-steps=9"]
    assert main(["train", *changes, f"--distributed.process-id={process}", "--distributed.num-processes=2"]) == 2
    *told, error = capsys.readouterr().err.splitlines()
    assert len(told) == count and all("warmup_steps = 9 is not under" in line for line in told)
    assert error.startswith("error: distributed.num_processes")


def test_version_names_the_devices_too(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert re.fullmatch(rf"flax-decoder \S+, jax {re.escape(jax.__version__)}, 8 x cpu\n", capsys.readouterr().out)


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["train", "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    names = [f"--{section}.{name}".replace("_", "-") for section in SECTIONS for name in fields_of(section)]
    assert len(names) > 50
    assert [name for name in names if f"{name} " not in shown] == []
    usage, *_ = shown.partition("\n\n")
    assert len(usage.splitlines()) == 1 and "[--SECTION.FIELD VALUE]" in usage
    kinds = dict(re.findall(r"^  --(\S+) (\S+)", shown, re.MULTILINE))
    assert kinds["model.num-layers"] == kinds["model.num-kv-heads"] == kinds["mesh.data"] == "INT"
    assert kinds["model.logit-soft-cap"] == "FLOAT" and kinds["model.window-pattern"] == "LIST"
    assert kinds["model.qk-norm"] == "none|head|each_head|all" and kinds["data.path"] == "STR|LIST"
    assert "[mesh]:\n  How devices share the work" in shown and "number of blocks (default: 4)" in shown


def test_help_tells_defaults():
    commands = code_pages.commands_of(build_parser())
    shown = " ".join(commands["generate"].format_help().split())
    for part in ("(default: 500)", "(default: latest)", "(default: 1)", "(default: 0)", "else 0.8"):
        assert part in shown
    assert "(default: lens.html)" in " ".join(commands["lens"].format_help().split())
    for command in commands.values():
        assert not [action.dest for action in command._actions if not action.help]


def test_underscores_and_hyphens_are_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argument in ("--training.batch-size=7", "--training.batch_size=7"):
        # Refused only after the value is understood.
        assert main(["train", argument, "--training.accumulation_steps", "2"]) == 2
        assert "training.batch_size = 7 is not a multiple of accumulation_steps = 2" in capsys.readouterr().err


# Values that look like options, and how they can be given.
ODD_VALUES = ("--- a_b/c_d", "--a_b c_d", "-- a_b", "- a_b")


@pytest.mark.parametrize(
    ("command", "name", "dest"),
    [
        ("generate x", "--prompt", "prompt"),
        ("generate x", "--stop", "stop"),
        ("generate x", "--draft", "draft"),
        ("chat x", "--system", "system"),
        ("train", "--data.path", "data.path"),
        ("train", "--lens.prompt", "lens.prompt"),
        ("eval x", "", "file"),
    ],
)
def test_a_value_that_looks_like_an_option_stays_as_it_is(command, name, dest):
    for value in (*ODD_VALUES, "--a_b", "--max_new_tokens=5 a_b", "--num_layers=2", "--", "-1_0", "a_b"):
        given = [[name, value]] if name and value in ODD_VALUES else []
        given += [[f"{name}={value}"]] if name else [["--", value]] if value != "--" else []
        for words in given:
            options, unknown = build_parser().parse_known_args([*command.split(), *words])
            assert unknown == [] and getattr(options, dest) in (value, [value]), words


def test_a_value_that_may_be_an_option_is_refused_with_the_way_to_give_it(refused):
    for value in ("--a_b", "--max_new_tokens", "-x"):
        error = refused("generate", "nowhere", "--prompt", value)
        assert error.startswith("argument --prompt: expected one argument; ") and "write --prompt=TEXT\n" in error
    assert "unknown argument --num_sample; did you mean --num-samples?" in refused("generate", "x", "--num_sample", "2")


def test_counts_and_paths_as_people_type_them(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["generate", "~/x", "--max-new-tokens=1e3", "--num-samples=2.0", "--seed=-1", "--step=1e2", "--draft=~/y"]
    options = build_parser().parse_args(words)
    assert (options.max_new_tokens, options.num_samples, options.seed, options.step) == (1000, 2, -1, 100)
    assert (options.path, options.draft) == (f"{tmp_path}/x", f"{tmp_path}/y")
    assert build_parser().parse_args(["lens", "x", "--out=~/x.html"]).out == tmp_path / "x.html"
    for number in ("1.5", "1k", "inf", "nan", "1e400", "", "--seed=1"):
        assert "is not a whole number" in refused("generate", "x", f"--max-new-tokens={number}")
    assert "is not a whole number" in refused("generate", "x", f"--seed={2**32}")
    assert "--step: 'newest' is not a whole number, best or latest" in refused("generate", "x", "--step=newest")


def generated(capsys, *arguments):
    capsys.readouterr()
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_generate_continues_a_prompt(run, capsys):
    options = ["--max-new-tokens", "30", "--temperature", "1.5"]
    text = generated(capsys, run, "--prompt", "To be", *options)
    assert text.startswith("To be") and text.endswith("\n")
    assert len(text) == len("To be") + 30 + 1 and set(text) <= set(TEXT)
    assert generated(capsys, run, "--prompt", "To be", *options) == text
    assert generated(capsys, run, "--prompt", "To be", *options, "--seed", "1") != text
    assert generated(capsys, run, "--prompt", "To be", *options, "--no-stream") == text
    assert generated(capsys, run, "--prompt", "To be", *options, "--step", "best") == text  # there is one checkpoint


def test_generate_writes_several_samples(run, capsys):
    options = ["--max_new_tokens", "12", "--temperature", "3"]
    one = generated(capsys, run, "--prompt", "To", *options)
    three = generated(capsys, run, "--prompt", "To", *options, "--num-samples", "3")
    assert three.startswith(one + "\n") and three.count("To") >= 3
    assert len(three) == 3 * (2 + 12) + 5  # empty lines between


@pytest.mark.full
@pytest.mark.parametrize("how", ["--prompt-lookup", "--draft"])
def test_generate_can_draft(run, capsys, how):
    options = ["--prompt", "To", "--max-new-tokens", "6", "--temperature", "0"]
    text = generated(capsys, run, *options)
    assert generated(capsys, run, *options, how, "3" if how == "--prompt-lookup" else run) == text


def test_every_sample_stops_before_a_text(run, capsys):
    options = ["--prompt", "To", "--max-new-tokens", "40", "--temperature", "2", "--num-samples", "3"]
    texts = [text.removeprefix("To") for text in generated(capsys, run, *options).removesuffix("\n").split("\n\nTo")]
    stop = texts[2][5:7]
    expected = [text.split(stop)[0] for text in texts]
    assert generated(capsys, run, *options, "--stop", stop) == "\n\n".join("To" + text for text in expected) + "\n"


def test_the_prompt_may_come_from_standard_input(run, capsys, monkeypatch):
    options = ["--max-new-tokens", "12"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"To be")))
    assert generated(capsys, run, *options) == generated(capsys, run, "--prompt", "To be", *options)


def test_eval_scores_a_text(run, capsys, tmp_path):
    path = tmp_path / "part.txt"
    path.write_text(TEXT[:100])
    assert main(["eval", run, str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"loss", "perplexity", "bits_per_byte", "num_tokens"}
    assert result["num_tokens"] == 99
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))  # a character is a token is a byte
    assert main(["eval", run, str(path)]) == 0
    shown = capsys.readouterr().out
    for number in (f"{result['loss']:.4f}", f"{result['perplexity']:.3f}", f"{result['bits_per_byte']:.4f}", "99"):
        assert number in shown


@pytest.mark.full
def test_without_a_text_there_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Most of its characters would be validated; one batch is enough here.
    assert main(["train", *ARGUMENTS, "--training.eval-batches=1"]) == 0
    out = capsys.readouterr().out
    assert "Python's own help texts" in out and "input.txt" in out
    assert " flax-decoder lens runs/default --prompt " in out.splitlines()[-1]
    assert (tmp_path / "runs" / "default" / "sample.txt").exists()


@pytest.mark.parametrize("old", [False, True])
def test_without_the_packages_a_line_says_how_to_install_them(monkeypatch, capsys, old):
    for module in ("flax_decoder.cli", "flax_decoder.config_file"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tomli_w", None)  # as if it were not installed
    if old:
        monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(Path(__file__).parents[1] / "train.py"))
    (line,) = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2 and "venv" in line and line.endswith("pip install -e .")
    assert ("too old" in line) if old else ("tomli_w is not installed" in line)


def test_exit_codes_reach_the_shell(tmp_path):
    """One command by each way in."""
    train = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "missing.toml"]
    module = [sys.executable, "-m", "flax_decoder", "generate", "nowhere", "--prompt", "a"]
    for command, part in ((train, "missing.toml"), (module, "nowhere")):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2 and part in result.stderr and "Traceback" not in result.stderr
    shown = subprocess.run([*module[:3], "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "generate" in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def cache_of(tmp_path, monkeypatch, capsys):
    """Runs a command in an environment; returns the folder of compiled programs and what stands before the error."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("home").mkdir()
    quiet = logging.getLogger("matplotlib")
    monkeypatch.setattr(quiet, "level", quiet.level)

    def run_command(**environment):
        for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value.replace("HERE", str(tmp_path)))
        assert main(["generate", "nowhere", "--prompt", "a"]) == 2
        *told, error = capsys.readouterr().err.splitlines()
        assert error.startswith("error: nowhere")
        return os.environ["JAX_COMPILATION_CACHE_DIR"].replace(str(tmp_path), "HERE"), told

    return run_command


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "HERE/home"}, "HERE/home/.cache/flax_decoder"),
        ({"HOME": "HERE/home", "XDG_CACHE_HOME": "relative"}, "HERE/home/.cache/flax_decoder"),
        ({"HOME": "HERE/missing", "XDG_CACHE_HOME": "HERE/new"}, "HERE/new/flax_decoder"),
        ({"JAX_COMPILATION_CACHE_DIR": "HERE/mine"}, "HERE/mine"),
        ({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/mine"}, "gs://bucket/mine"),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, ""),
    ],
)
def test_compiled_programs_are_kept_in_the_users_cache_folder(cache_of, environment, folder):
    before = set(Path().rglob("*"))
    assert cache_of(**environment) == (folder, [])
    made = Path(folder.replace("HERE", "."))
    assert set(Path().rglob("*")) - before <= {made, *made.parents}
    assert made.is_dir() == ("bucket" not in folder)
    if folder and made.is_dir():
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, "~: there is no such home folder"),
        ({"HOME": "home"}, "home: there is no such home folder"),
        ({"HOME": "HERE/home"}, "/home/.cache/flax_decoder: may not be written"),
        ({"HOME": "HERE/file"}, "/file: there is no such home folder"),
        ({"HOME": "HERE/home", "XDG_CACHE_HOME": "HERE/file"}, "/file/flax_decoder: Not a directory"),
        ({"HOME": "HERE/home", "JAX_COMPILATION_CACHE_DIR": "HERE/file"}, "/file: File exists"),
    ],
)
def test_without_a_cache_folder_a_line_says_so(cache_of, monkeypatch, environment, part):
    def missing(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr("pwd.getpwuid", missing)
    if "may not be written" in part:  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        Path("home/.cache/flax_decoder").mkdir(parents=True)
    before = set(Path().rglob("*"))
    folder, (told,) = cache_of(**environment)
    assert folder == "" and told.startswith("warning: compiled programs are not kept") and part in told
    assert told.endswith("; set XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to a folder of yours")
    assert set(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("mode", "owner", "reason"),
    [
        (0o755, 0, None),
        (0o775, 0, "others may write there and so change what runs; if it is for nothing else, delete it"),
        (0o757, 0, "others may write there and so change what runs; if it is for nothing else, delete it"),
        (0o1777, 0, "others may write there and so change what runs; if it is for nothing else, delete it"),
        (0o700, 1, "belongs to another user, who could change what runs"),
    ],
)
@pytest.mark.parametrize("is_link", [False, True])
def test_programs_from_a_folder_that_others_can_write_are_not_run(cache_of, monkeypatch, mode, owner, reason, is_link):
    """An entry of the cache is machine code."""
    Path("programs").mkdir()
    Path("programs").chmod(mode)
    Path("link").symlink_to("programs")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + owner)
    name = "HERE/link" if is_link else "HERE/programs"
    folder, told = cache_of(HOME="HERE/home", JAX_COMPILATION_CACHE_DIR=name)
    assert folder == ("" if reason else name)
    assert len(told) == bool(reason) and all(f"/{name[5:]}: {reason}; set XDG_CACHE_HOME or" in line for line in told)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_compare_without_pytorch_says_how_to_install_it(run, missing, monkeypatch, capsys):
    for module in [name for name in sys.modules if name.startswith("flax_decoder.comparison.")]:
        monkeypatch.delitem(sys.modules, module)
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else types.ModuleType(name))
    assert main(["compare", run]) == 2
    assert capsys.readouterr().err == (
        f'error: comparing needs {missing}, which is not installed: pip install "flax-decoder[torch]"\n'
    )


# A signal that comes while Python is in a callback of its garbage collector, where it drops exceptions.
IN_A_CALLBACK = """
import gc, os, sys, time
from flax_decoder import cli

def callback(phase, info):
    gc.callbacks.remove(callback)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0)

def train(options):
    gc.callbacks.append(callback)
    gc.collect()
    # Not one long sleep: a signal that comes just before one is seen only behind it. If it is lost, this has no end.
    while True:
        time.sleep(0.01)

cli.train = train
sys.exit(cli.main(["train"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_no_signal_is_lost_where_python_drops_exceptions(number):
    command = [sys.executable, "-c", IN_A_CALLBACK, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_SECONDS)
    assert done.returncode == 128 + number
    assert "Traceback" not in done.stderr


# A module whose import takes long, and which makes an ImportError of all that happens, as one in C does.
SLOW_MODULE = """
import time
print("importing", flush=True)
try:
    while True:
        time.sleep(0.01)
except BaseException as error:
    raise ImportError("initialization failed") from error
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_an_import_leaves_with_its_code(tmp_path, number):
    (tmp_path / "slow.py").write_text(SLOW_MODULE)
    script = "import sys\nfrom flax_decoder import cli\n"
    script += "def train(options):\n    import slow\ncli.train = train\nsys.exit(cli.main(['train']))"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert process.wait(timeout=HANGS_SECONDS) == 128 + number
        assert process.stderr.read() == ""


def lens_data(path):
    """What a lens page was told."""
    page = Path(path).read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_lens_writes_a_page(run, tmp_path, capsys):
    path = tmp_path / "lens.html"
    path.write_text("what was there before")
    assert main(["lens", run, "--prompt", "To be,", "--out", str(path), "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == f"{path}: written\n"
    assert list(tmp_path.iterdir()) == [path]
    data = lens_data(path)
    assert data["history"]["steps"] == [0, 4]
    assert main(["generate", run, "--prompt", "To be,", "--max-new-tokens", "2", "--temperature", "0"]) == 0
    assert "".join(data["texts"][str(token)] for token in data["tokens"]) == capsys.readouterr().out.rstrip("\n")


def test_lens_takes_the_prompt_from_standard_input(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"To")))
    assert main(["lens", run, "--step", "4"]) == 0
    assert len(lens_data("lens.html")["tokens"]) == 2


def test_lens_tells_a_disk_that_fails(run, tmp_path, monkeypatch, capsys):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flax_decoder.lens.page.write_text", fail)
    assert main(["lens", run, "--prompt", "To", "--out", str(tmp_path / "x.html")]) == 1
    assert "x.html: cannot be written" in capsys.readouterr().err
