import contextlib
import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_decoder.config import (
    SECTIONS,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Source,
    TrainingConfig,
    fields_of,
)
from flax_decoder.config_file import load_config, require_consent, to_toml
from flax_decoder.errors import UserError, did_you_mean

CONFIG_FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.fixture
def write(tmp_path):
    """A function that writes a config file and returns its path."""

    def write(text, name="tiny.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path=None, overrides=None):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


# --- What is read ---


def test_the_default_is_the_default():
    assert load_config() == dataclasses.replace(Config(), run=RunConfig(folder="runs/default"))


def test_a_file_says_what_differs(write):
    config = load_config(write('[model]\nnum_layers = 7\npositions = "rotary"\n[training]\nnum_steps = 11\n'))
    assert config.model == ModelConfig(num_layers=7, positions="rotary")
    assert config.training == TrainingConfig(num_steps=11)
    assert config.optimizer == OptimizerConfig() and config.data == DataConfig()


def test_overrides_come_first(write):
    path = write("[model]\nnum_layers = 7\nembed_dim = 44\nnum_heads = 11\n")
    config = load_config(path, {"model.num_layers": 2, "training.num-steps": 13, "model.positions": "rotary"})
    assert (config.model.num_layers, config.model.embed_dim, config.model.positions) == (2, 44, "rotary")
    assert config.training.num_steps == 13


def test_an_override_can_repair_what_the_file_says(write):
    path = write("[model]\nembed_dim = 13\nnum_heads = 4\n")
    assert load_config(path, {"model.num_heads": 13}).model.head_width == 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("training.num_steps", "100", 100),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("model.scan_layers", "true", True),
        ("model.window-pattern", "[true, false]", (True, False)),
        ("optimizer.restarts", "100", (100,)),
        ("optimizer.restarts", "[100, 200]", (100, 200)),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("data.path", "100", "100"),
        ("data.path", '["a.txt", "b.txt"]', ("a.txt", "b.txt")),
        ("data.path", Path("texts") / "a.txt", "texts/a.txt"),
        ("run.folder", "true", "true"),
        ("data.tokenizer", "byte", "byte"),
        ("training.num_steps", "1e3", 1000),
        ("training.num_steps", "1.5e3", 1500),
        ("optimizer.learning_rate", "1e1", 10.0),
        *(("model.scan_layers", word, True) for word in ("True", "TRUE", "yes", "on")),
        *(("model.tied_head", word, False) for word in ("False", "no", "Off")),
        ("model.num_kv_heads", "none", None),
        ("training.loss_chunk_tokens", "None", None),
        ("data.path", "none", None),
        ("run.wandb", "none", None),
        ("model.qk_norm", "none", "none"),
        ("data.tokenizer", "no", "no"),
        ("run.folder", "[2024]", "[2024]"),
        ("run.folder", "[a, b", "[a, b"),
        ("data.path", "[2024]", "[2024]"),
    ],
)
def test_text_is_read_as_toml_where_the_field_is_no_text(name, text, value):
    section, field = name.replace("-", "_").split(".")
    config = load_config(overrides={name: text, "model.window": "3"})
    assert getattr(getattr(config, section), field) == value
    assert type(getattr(getattr(config, section), field)) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("training.num_steps", "1.5"),
        ("training.num_steps", "1e400"),
        ("training.num_steps", "yes"),
        ("training.num_steps", "none"),
        ("training.num_steps", "1,000"),
        ("model.scan_layers", "maybe"),
        ("model.scan_layers", "2"),
        ("model.positions", "on"),
    ],
)
def test_text_that_has_no_certain_meaning_is_refused(name, text):
    assert f"{name} = " in refusal(overrides={name: text})


def test_none_takes_the_value_of_the_file_back(write):
    path = write('[model]\nwindow = 3\n[data]\npath = "a.txt"\n[run]\nwandb = "plays"\n')
    config = load_config(path, {"model.window": "none", "data.path": "none", "run.wandb": "none"})
    assert config.model.window is config.data.path is config.run.wandb is None


def test_a_tilde_is_the_home_folder(write, tmp_path, monkeypatch):
    text = '[data]\npath = ["~/a.txt", "b~"]\ntokenizer = "~/t.json"\n[run]\nfolder = "~/x"\n'
    path = write(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(path)
    assert config.data == DataConfig(path=(f"{tmp_path}/a.txt", "b~"), tokenizer=f"{tmp_path}/t.json")
    assert config.run.folder == f"{tmp_path}/x"
    assert load_config(None, {"data.path": "~/texts", "run.folder": "~"}).data.path == f"{tmp_path}/texts"
    for home in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("HOME", home)
        assert load_config(path).run.folder == "~/x"


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_every_config_file_loads(path):
    config = load_config(path)
    assert config.run.folder == f"runs/{path.stem}"
    assert hash(config) == hash(load_config(path))


@pytest.mark.parametrize(
    ("asked", "num_steps", "warmup"),
    [(100, 101, 100), (100, 100, 5), (100, 20, 1), (100, 19, 0), (3, 1, 0), (0, 1, 0), (None, 1, None)],
)
def test_a_warm_up_ends_before_the_run_does(asked, num_steps, warmup, write):
    told = f"optimizer.warmup_steps = {asked} is not under training.num_steps = {num_steps}: shortened to {warmup}, a"
    path = write("" if asked is None else f"[optimizer]\nwarmup_steps = {asked}\n")
    with contextlib.nullcontext() if warmup == asked else pytest.warns(UserWarning, match=told):
        config = load_config(path, {"training.num_steps": num_steps})
    with contextlib.nullcontext() if warmup == asked else pytest.warns(UserWarning, match=told):
        built = Config(optimizer=OptimizerConfig(warmup_steps=asked), training=TrainingConfig(num_steps=num_steps))
    assert config.optimizer == built.optimizer == OptimizerConfig(warmup_steps=warmup)
    assert load_config(write(to_toml(config))) == config  # and nothing is told any more


# --- Where a run lives ---


def test_a_run_is_named_after_its_config(write):
    assert load_config(write("", "shakespeare.toml")).run.folder == "runs/shakespeare"
    assert load_config(write('[run]\nfolder = "elsewhere"\n')).run.folder == "elsewhere"
    assert load_config(write(""), {"run.folder": "there"}).run.folder == "there"


def test_a_run_folders_own_config_means_that_folder(write, tmp_path):
    path = write("", "config.toml")
    assert load_config(path).run.folder == "runs/config"  # just a file of that name
    (tmp_path / "corpus").mkdir()
    assert load_config(path).run.folder == str(tmp_path)
    assert load_config(write("", "other.toml")).run.folder == "runs/other"


# --- What is written is what is read ---

MODELS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 10**4),
        "num_kv_heads": st.sampled_from([None, 1, 2, 4]),
        "positions": st.sampled_from(["learned", "rotary", "alibi"]),
        "rotary_base": st.floats(1, 1e9, exclude_min=True),
        "window": st.integers(1, 99),
        "window_pattern": st.lists(st.booleans(), min_size=1, max_size=4).map(tuple),
        "logit_soft_cap": st.none() | st.floats(1e-15, 1e15),
        "qk_norm": st.sampled_from(["none", "head", "each_head", "all"]),
    }
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
PATH = TEXT.filter(lambda path: not path.startswith("~"))  # which is the home folder in a file


@settings(deadline=None, max_examples=100)
@given(MODELS, PATH, st.lists(PATH).map(tuple) | PATH, st.floats(0, 1e3))
def test_settings_survive_toml(tmp_path_factory, model, folder, data_path, weight_decay):
    config = Config(
        model=ModelConfig(**model),
        data=DataConfig(path=data_path),
        optimizer=OptimizerConfig(weight_decay=weight_decay),
        run=RunConfig(folder=folder),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(path) == config


# --- A config is a value ---


def test_configs_are_frozen_and_hashable():
    config = load_config(overrides={"model.window": 3, "model.window_pattern": [True, False]})
    for part in (config, config.model, config.data, config.optimizer, config.training, config.run):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.seed = 1
        assert {part: 1}[dataclasses.replace(part)] == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_what_it_is(section):
    for name, field in fields_of(section).items():
        assert field.description and len(field.description) > 5, f"{section}.{name}"


def test_what_is_left_out_follows_from_the_rest():
    model = ModelConfig(embed_dim=60, num_heads=4)
    assert (model.kv_heads, model.head_width, model.mlp_width) == (4, 15, 240)
    model = ModelConfig(embed_dim=60, num_heads=4, num_kv_heads=2, head_dim=7, mlp_dim=11)
    assert (model.kv_heads, model.head_width, model.mlp_width) == (2, 7, 11)
    assert model.with_vocab_size(17).vocab_size == 17
    assert model.with_vocab_size(17).with_vocab_size(19).vocab_size == 17
    assert model.windows == (None,) * 4
    assert ModelConfig(window=3, num_layers=5, window_pattern=(True, True, False)).windows == (3, 3, None, 3, 3)
    assert ModelConfig(num_layers=8, init_stddev=0.5).output_stddev == pytest.approx(0.125)
    assert ModelConfig(output_init="zero").output_stddev == 0


# --- Refusals ---

# Each rule: what is set, and what the message must name.
RULES = [
    ({"model.embed_dim": 13}, "embed_dim = 13 is not a multiple of num_heads = 4"),
    ({"model.num_kv_heads": 3}, "num_heads = 4 is not a multiple of num_kv_heads = 3"),
    ({"model.positions": "rotary", "model.head_dim": 7}, "head_dim = 7 times rotary_fraction = 1.0 gives 7"),
    (
        {"model.positions": "rotary", "model.rotary_scaling": "longrope", "model.rotary_short_factors": [2.0]},
        "rotary_short_factors has 1 numbers, but 16 pairs of a head are rotated",
    ),
    (
        {"model.positions": "rotary", "model.rotary_scaling": "dynamic", "model.head_dim": 2},
        'rotary_scaling = "dynamic" stretches all pairs of a head but the first',
    ),
    ({"model.rotary_scaling": "linear"}, 'need positions = "rotary", not "learned"'),
    ({"model.qk_norm": "head", "model.qk_norm_bias": True}, 'qk_norm_bias = true needs qk_norm_kind = "layernorm"'),
    ({"model.rotary_query_scaling": 0.1}, 'need positions = "rotary", not "learned"'),
    ({"model.rotary_low_frequency_factor": 4.0}, "rotary_low_frequency_factor = 4.0 must be under"),
    (
        {"model.positions": "sinusoidal", "model.embed_dim": 13, "model.num_heads": 13},
        "embed_dim = 13 is odd",
    ),
    ({"model.norm": "rmsnorm", "model.norm_bias": True}, 'norm_bias = true needs norm = "layernorm"'),
    (
        {"model.parallel_residual": True, "model.norm_position": "post"},
        'parallel_residual = true needs norm_position = "pre", not "post"',
    ),
    ({"model.window_pattern": [True, False]}, "window is not set"),
    ({"model.rotary_window_base": 90.0, "model.window": 3}, "rotary_window_base = 90.0 needs rotary positions"),
    ({"model.rotary_window_base": 90.0, "model.positions": "rotary"}, "rotary_window_base = 90.0 needs"),
    ({"model.attention": "blockwise", "model.dropout": 0.1}, "dropout = 0.1"),
    ({"model.attention": "splash", "model.dropout": 0.1}, 'attention = "splash" never holds the weights that dropout'),
    ({"model.attention": "splash", "model.positions": "alibi"}, 'adds no bias to the scores, as positions = "alibi"'),
    ({"model.attention": "splash", "model.dtype": "float64"}, 'not in dtype = "float64"; use attention = "auto"'),
    ({"model.attention": "cudnn"}, 'computes in bfloat16, not in dtype = "float32"; use attention = "auto"'),
    (
        {"model.attention": "cudnn", "model.dtype": "bfloat16", "model.attention_soft_cap": 9.0},
        "cannot squash scores, as attention_soft_cap = 9.0 does",
    ),
    ({"model.attention": "cudnn", "model.dtype": "bfloat16", "model.head_dim": 12}, "not head_dim = 12"),
    (
        {"training.batch_size": 2**20, "model.context_length": 2**11},
        f"training.batch_size = {2**20} times model.context_length = {2**11} is {2**31} tokens per step",
    ),
    ({"optimizer.weight_decay": 2000.0}, "optimizer.learning_rate = 0.001 times weight_decay = 2000.0 is more than 1"),
    (
        {"optimizer.name": "muon", "optimizer.weight_decay": 60.0},
        "optimizer.muon_learning_rate = 0.02 times weight_decay = 60.0 is more than 1",
    ),
    ({"training.accumulation_steps": 5}, "training.batch_size = 12 is not a multiple of accumulation_steps = 5"),
    ({"optimizer.restarts": [9, 9]}, "optimizer.restarts = [9, 9] must rise and be under training.num_steps = 2000"),
    ({"optimizer.restarts": 2000}, "optimizer.restarts = [2000] must rise and be under training.num_steps = 2000"),
]


@pytest.mark.parametrize(("overrides", "message"), RULES, ids=lambda value: value if isinstance(value, str) else "")
def test_settings_that_do_not_go_together_are_refused(overrides, message, write):
    assert message in refusal(overrides=overrides)
    sections = {}
    for name, value in overrides.items():
        section, field = name.split(".")
        toml = str(value).lower() if isinstance(value, bool | list) else repr(value)
        sections.setdefault(section, []).append(f"{field} = {toml}\n")
    path = write("".join(f"[{section}]\n{''.join(lines)}" for section, lines in sections.items()))
    in_file = refusal(path)
    assert message in in_file and in_file.startswith(f"{path}: ")


# Values beyond the bounds of a field.
VALUES = {
    "model.num_layers": [0, 2.0, True, "many", 10**9],
    "model.context_length": [2**31],
    "model.dropout": [1.0, -0.1, float("nan")],
    "model.embed_dim": [10**9],
    "model.init_stddev": [1e30],
    "model.norm_epsilon": [0.0, 1e-40],
    "model.rotary_base": [1.0],
    "model.rotary_fraction": [0.0, 1.5],
    "model.rotary_scaling_factor": [0.5],
    "model.rotary_long_factors": [3.0],
    "model.window": [0],
    "model.window_pattern": [[], [1]],
    "model.positions": ["rotatory"],
    "model.dtype": ["float16"],
    "model.scan_layers": [1],
    "model.attention_soft_cap": [0.0],
    "data.bpe_vocab_size": [256],
    "data.validation_fraction": [0.0, 1.0],
    "data.path": [3],
    "optimizer.learning_rate": [0.0, 1e30, float("inf"), float("nan"), "fast"],
    "optimizer.epsilon": [1e-40],
    "optimizer.beta2": [0.99999999],
    "optimizer.decay_fraction": [0.0],
    "optimizer.final_fraction": [1.1],
    "optimizer.weight_decay": [-0.1],
    "optimizer.restarts": [1.5],
    "optimizer.ema_decay": [1.0],
    "training.batch_size": [10**12],
    "training.num_steps": [0, 2**31],
    "training.seed": [-1, 2**32],
    "training.eval_batches": [-1],
    "training.skip_spikes": [0.5, -3.0],
    "training.skip_limit": [-1],
    "lens.every": [-1],
    "lens.prompt_tokens": [0, 257],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_values_out_of_bounds_are_refused(name, value, write):
    message = refusal(overrides={name: value})
    assert message.startswith("the command line or overrides: ")
    assert name in message and (repr(value) in message or value == [1])

    section, field = name.split(".")
    toml = str(value).lower() if isinstance(value, bool) else repr(value)  # nan, inf and the rest are TOML too
    path = write(f"[{section}]\n{field} = {toml}\n")
    in_file = refusal(path)
    assert in_file.startswith(f"{path}: ") and name in in_file


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[model]\nnum_layer = 2\n", ["there is no setting model.num_layer", "did you mean model.num_layers?"]),
        ("[training]\nlearning_rate = 2\n", ["did you mean optimizer.learning_rate?"]),
        ("[run]\nxyzzy = 2\n", ["there is no setting run.xyzzy", "there are: folder, start_from, resume"]),
        ("[modle]\nnum_layers = 2\n", ["there is no section [modle]", "did you mean model?"]),
        ("num_layers = 2\n", ["there is no section [num_layers]"]),
        ("model = 2\n", ["model must be a table"]),
        ("[model\n", ["is not valid TOML", "line 1"]),
        ("[model]\nnum_layers = 0\nembed_dim = 0\nnum_heads = 0\n", ["model.num_layers = 0", "(and 2 more)"]),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(text, parts, write):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.yaml", "model:\n  num_layers: 4\n", "YAML"),
        ("a.YML", "# A run.\nmodel:\n  num_layers: 4\n", "YAML"),
        ("a", "training: {num_steps: 4}\n", "YAML"),
        ("a.json", '{"model": {"num_layers": 4}}', "JSON"),
        ("a.config", '\n{"model": {}}', "JSON"),
        ("a", "model = = 4\n", None),
        ("a.toml", "model: 4\n", None),
    ],
)
def test_a_config_in_another_format_is_called_that(write, name, text, kind):
    message = refusal(write(text, name))
    assert message.startswith(str(write(text, name)))
    assert (f"is {kind}, not TOML; in TOML" in message) if kind else ("is not valid TOML" in message)


def test_the_name_alone_of_a_file_in_configs_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny") == load_config("tiny.toml") == load_config(CONFIG_FILES[0].parent / "tiny.toml")
    assert load_config("tiny").run.folder == "runs/tiny"
    assert "tini: there is no such config file; did you mean tiny?" in refusal("tini")
    assert "other/tiny: there is no such config file" in refusal("other/tiny")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.toml").write_text("[model]\nnum_layers = 7\n")
    assert load_config("tiny").model.num_layers == 7  # that of the current folder comes first
    (tmp_path / "tiny").write_text("[model]\nnum_layers = 3\n")
    assert load_config("tiny").model.num_layers == 3


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("--training.num-stepz", "--training.num-steps"),
        ("--training.steps", "--training.num-steps"),
        ("--training.learning-rate", "--optimizer.learning-rate"),
        ("--batch-size", "--training.batch-size"),
        ("modle.num_layers", "model.num_layers"),
        ("model.vocab", "model.vocab_size"),
        ("--training.early-stopping", None),
        ("--optimizer.type", None),
        ("--model.block-size", None),
        ("--data.file", None),
        ("--lr", None),
    ],
)
def test_only_what_is_near_is_suggested(name, meant):
    settings = [f"{section}.{field}" for section in SECTIONS for field in fields_of(section)]
    known = [*settings, *(f"--{setting}".replace("_", "-") for setting in settings), "--help"]
    assert did_you_mean(name, known) == (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.num-layer", ["model.num-layer: there is no such setting", "did you mean model.num_layers?"]),
        ("modle.num_layers", ["did you mean model.num_layers?"]),
        ("num_layers", ["num_layers: there is no such setting", "did you mean model.num_layers?"]),
        ("model.num_layers.deep", ["model.num_layers.deep: there is no such setting"]),
    ],
)
def test_an_override_of_nothing_is_refused(name, parts):
    message = refusal(overrides={name: 2})
    for part in parts:
        assert part in message


def test_a_fault_in_the_file_is_not_blamed_on_the_command_line(write):
    path = write("[model]\nnum_layers = 0\n")
    assert refusal(path, {"model.embed_dim": 8}).startswith(f"{path}: ")
    assert refusal(path, {"model.num-layers": -1}).startswith("the command line or overrides: model.num_layers = -1")


DOTS = "." * 2000
# How far a reader may be in strings and comments, which have dots as they like.
STRINGS = [
    f'"{DOTS}"',
    f"'{DOTS}'",
    f'"\\"{DOTS}\\\\"',
    f"'\\' #'{DOTS}",
    f'"#" # {DOTS}',
    f'"""{DOTS}"""',
    f'"""\\"""{DOTS}"""""',
    f"'''\\''{DOTS}'''''",
    f'"""\n# "{DOTS}\n"""',
    f'["""a"""", "{DOTS}"]',
    f"['{DOTS}', \"{DOTS}\"]",
]


@pytest.mark.parametrize("string", STRINGS)
def test_dots_count_outside_of_strings_only(write, string):
    """tomllib takes hours for a key of 200,000 dots; a path is not a key."""
    path = write(f"data.path = {string}\n")
    load_config(path)
    path = write(f"data.path = {string}\na{'.a' * 1001} = 1\n")
    with pytest.raises(UserError, match=r"tiny\.toml: is not valid TOML: it has over .* 1,000 dots"):
        load_config(path)


@pytest.mark.parametrize("beside", ["corpus", "checkpoints"])
@pytest.mark.parametrize(
    ("name", "value"), [("run.wandb", "theirs"), ("run.wandb", "a b\x1b"), ("distributed.coordinator", "evil:1")]
)
def test_the_config_of_a_run_from_elsewhere_reaches_nobody_unasked(refused, tmp_path, name, value, beside):
    """Without a word a stranger's run would send metrics from the user's account, or join a job."""
    (tmp_path / "run" / beside).mkdir(parents=True)
    path = tmp_path / "run" / "config.toml"
    path.write_text(f"{name} = {json.dumps(value)}\n")
    option = f"--{name} {shlex.quote(value)}, or leave it out: --{name} none"
    assert refused("train", "run/config.toml").endswith(f"repeat it if you want it: {option}\n")
    for mine in (value, "none"):
        require_consent(path, load_config(path, {name: mine}), [name])
    own = path.rename(tmp_path / "run" / "own.toml")
    require_consent(own, load_config(own), [])


MIXTURE = '[{path = "~/a", weight = 3}, {path = ["b", "~/c"]}]'


def test_a_mixture_is_read_from_files_and_the_command_line(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(None, {"data.mixture": MIXTURE})
    assert config.data.mixture == (Source(path=f"{tmp_path}/a", weight=3.0), Source(path=("b", f"{tmp_path}/c")))
    assert [(data.path, data.mixture, weight) for data, weight in config.data.sources] == [
        (f"{tmp_path}/a", None, 0.75),
        (("b", f"{tmp_path}/c"), None, 0.25),
    ]
    tables = '[[data.mixture]]\npath = "~/a"\nweight = 3\n[[data.mixture]]\npath = ["b", "~/c"]\n'
    assert load_config(write(tables)).data == load_config(write(to_toml(config))).data == config.data


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ('[{path = "a"}, {path = "b", weight = 0}]', "data.mixture[1].weight = 0: input should be greater than"),
        ('[{path = "a", weight = "3"}, {path = "b"}]', "data.mixture[0].weight = '3': input should be a valid number"),
        ('[{path = "a", wieght = 3}, {path = "b"}]', "there is no setting data.mixture[0].wieght"),
        ('[{path = "a"}, {weight = 3}]', "data.mixture[1].path is missing"),
        ('["a", "b"]', "data.mixture: a source is a table, such as {path"),
        ("books", "data.mixture = 'books': "),
        ('[{path = "a"}]', "data: mixture has 1 sources, but it takes 2 to 64"),
        (
            '[{path = "a"}, {path = "b", weight = 1000}]',
            "data: mixture: the weight 1 of a is under a thousandth of all",
        ),
        ('[{path = "a\\u0000"}, {path = "b"}]', "data.mixture = 'a\\x00' has a NUL character"),
    ],
)
def test_what_is_no_mixture_is_refused(mixture, message):
    assert message in refusal(overrides={"data.mixture": mixture})


@pytest.mark.parametrize("name", ["path", "validation_path"])
def test_a_mixture_beside_another_text_is_refused(name):
    overrides = {"data.mixture": MIXTURE, f"data.{name}": "c"}
    assert f"data: {name} = 'c' does not go with mixture" in refusal(overrides=overrides)
