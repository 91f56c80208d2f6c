"""Reads and writes the TOML file of a run."""

import dataclasses
import os
import re
import shlex
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from flax_decoder.config import IS_PATH, NOT_IN_WEIGHTS, SECTIONS, Config, ModelConfig, fields_of
from flax_decoder.errors import UserError, as_path, did_you_mean, require_type
from flax_decoder.io.files import expand_home, open_regular
from flax_decoder.io.strict_json import shown


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    start: ModelConfig | None = None,
) -> Config:
    """Reads a config from a TOML file.

    Args:
        path: the file, or its name in `configs/` without the ending; None is the embedded default.
        overrides: values that take precedence, by dotted name: `{"model.num_layers": 2}`. Hyphens are the same as
            underscores. A string for a field of another type is parsed as TOML, as on the command line, where `1e3` is
            a count too, `yes`, `on`, `no` and `off` are switches, and `none` takes the value of the file back.
        start: the model whose weights a run starts from. What the file and the overrides leave out is as in it; they
            may differ only in what weights do not depend on.

    Returns:
        The checked config. `run.folder` is filled in; `model.vocab_size` stays None if the tokenizer decides it. A
        warm-up as long as the run is shortened, with a `UserWarning`.

    Raises:
        UserError: an unreadable file, an unknown field, a wrong type, or incompatible settings; names file, field and
            value.
    """
    require_type("overrides", overrides or {}, Mapping, 'such as {"model.num_layers": 2}')
    settings, source = {}, "the default config"
    if path is not None:
        path = _find_file(Path(as_path(path)))
        source = str(path)
        settings = _read_toml(path)
    for name, value in (overrides or {}).items():
        section, field = _find_field(name)
        values = settings.setdefault(section, {})
        if isinstance(values, dict):
            values[field] = _parse_override(section, field, value)
    overridden = {override.replace("-", "_") for override in overrides or {}}
    for section in SECTIONS:
        values = settings.get(section)
        if isinstance(values, dict):
            paths = [name for name, field in fields_of(section).items() if IS_PATH in field.metadata]
            values |= {name: _with_home(values[name]) for name in paths if name in values}
    if start is not None and isinstance(settings.get("model", {}), dict):
        settings["model"] = _continued(start, settings.get("model", {}))
    config = config_of(settings, source, overridden)
    if config.run.folder is None or (_is_inside_a_run(path) and "run.folder" not in overridden):
        run = dataclasses.replace(config.run, folder=str(_default_folder(path)))
        config = dataclasses.replace(config, run=run)
    return config


def _continued(start: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that starts from the weights of another, with those that are given.

    Raises:
        UserError: they contradict the weights; a table of both.
    """
    saved, fields = dataclasses.asdict(start), fields_of("model")
    fixed = {name for name, field in fields.items() if NOT_IN_WEIGHTS not in field.metadata}
    if start.positions == "learned":
        fixed.add("context_length")  # there is a vector for each position
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    rows = [(name, saved[name], value) for name, value in plain.items() if name in fixed and value != saved[name]]
    if rows:
        table = "\n".join(f"model.{name}: {old} there, {new} asked" for name, old, new in rows)
        raise UserError(f"run.start_from: these settings are not those of its weights; leave them out:\n{table}")
    return saved | dict(given)


def _with_home(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_with_home(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _with_home(part) for name, part in value.items()}
    return expand_home(value) if isinstance(value, str) else value


def config_of(settings: Mapping[str, Any], source: str, overridden: Collection[str] = ()) -> Config:
    """Builds a config from parsed TOML or JSON.

    Error messages begin with `source`, from which all values are but those of the dotted names in `overridden`.

    Raises:
        UserError: as `load_config`.
    """
    parts = {}
    for section, values in settings.items():
        if section not in SECTIONS:
            near = did_you_mean(section, SECTIONS) or _choices(SECTIONS)
            raise UserError(f"{source}: there is no section [{section:.100}]{near}")
        if not isinstance(values, dict):
            raise UserError(f"{source}: {section} must be a table, [{section}]")
        for field, value in values.items():
            name = f"{section}.{field}"
            _check_text(value, name, _source_of(name, source, overridden))
        try:
            parts[section] = SECTIONS[section](**values)
        except ValidationError as error:
            raise UserError(_first_error(error, section, source, overridden)) from None
    try:
        return Config(**parts)
    except ValidationError as error:
        raise UserError(_first_error(error, "", source, overridden)) from None


# What reaches beyond files: to an account of the user at a service, and to a machine that leads the job.
_REACHING_OUT = ("run.wandb", "distributed.coordinator")


def require_consent(path: str | os.PathLike[str] | None, config: Config, overridden: Collection[str]) -> None:
    """Raises UserError if the config in a run folder, which may be somebody else's, reaches beyond this machine.

    `load_config` has read it at `path`. What is overridden, by dotted names, is the user's own.
    """
    if path is None or Path(path).name != "config.toml":
        return
    if not any((Path(path).parent / name).is_dir() for name in ("corpus", "checkpoints")):
        return
    for name in _REACHING_OUT:
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if value is not None and name not in overridden:
            raise UserError(
                f"{path}: {name} = {shown(value)} reaches beyond this machine, and a run folder may come from somebody "
                f"else;\nrepeat it if you want it: --{name} {shlex.quote(value)}, or leave it out: --{name} none"
            )


def to_toml(config: Config) -> str:
    """The TOML text from which `load_config` reads the same config. Fields that are None are left out."""
    sections = dataclasses.asdict(config)
    return tomli_w.dumps(
        {
            section: {name: value for name, value in fields.items() if value is not None}
            for section, fields in sections.items()
        }
    )


# A config with every field has 5 kB, 100 settings, and a dot in some of its numbers; data.path may be a long list.
_MAX_CONFIG_BYTES = 500_000
# tomllib takes time that grows with the square of the dots in a key, and with the product of those in the name of a
# table and its settings: at these limits a third of a second.
_MAX_DOTS = _MAX_SETTINGS = 1000
# A comment or a string. An open one ends the text: what is behind it is never parsed.
_NO_SYNTAX = re.compile(
    r"""
    \#[^\n]*
    | \"{3} (?:\\(?:.|\Z)|[^\\])*? (?:\"{3,}|\Z)
    | \'{3} .*? (?:\'{3,}|\Z)
    | "(?:\\.|[^"\\\n])*"?
    | \'[^'\n]*\'?
    """,
    re.DOTALL | re.VERBOSE,
)


# The current folder, and that of the checkout.
_CONFIG_FOLDERS = (Path("configs"), Path(__file__).parent.parent / "configs")


def _find_file(path: Path) -> Path:
    """The file that a path names; the name alone of a file in configs/ will do."""
    if path.exists() or len(path.parts) != 1:
        return path
    found = [folder / f"{path.name.removesuffix('.toml')}.toml" for folder in _CONFIG_FOLDERS]
    return next((file for file in found if file.is_file()), path)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        names = {file.stem for folder in _CONFIG_FOLDERS for file in folder.glob("*.toml")}
        near = did_you_mean(path.name, sorted(names))
        raise UserError(f"{path}: there is no such config file{near}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give a TOML file, such as configs/tiny.toml"
        ) from None
    if len(content) > _MAX_CONFIG_BYTES:
        raise UserError(f"{path}: has over {_MAX_CONFIG_BYTES:,} bytes, so it is no config; give a TOML file")
    try:
        return _parse_toml(content.decode("utf-8").removeprefix("\ufeff"))  # the byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(f"{path}: is not UTF-8 (byte 0x{byte:02X} at offset {error.start}, line {line})") from None
    except ValueError as error:
        raise UserError(f"{path}: {_other_format(path, content) or f'is not valid TOML: {error}'}") from None


def _other_format(path: Path, content: bytes) -> str:
    """What to say of a config that is YAML or JSON, by its name or else by its first line; nothing of another one."""
    first = next((line for line in content.splitlines() if line.strip() and not line.startswith(b"#")), b"").strip()
    found = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}.get(path.suffix.lower())
    if found is None and path.suffix.lower() != ".toml":
        found = "JSON" if first.startswith(b"{") else "YAML" if re.match(rb"[\w.]+:(\s|$)", first) else None
    return f"is {found}, not TOML; in TOML, num_layers of the model is num_layers = 4 under [model]" if found else ""


def _parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML; every error is a ValueError."""
    syntax = _NO_SYNTAX.sub("", text)
    if syntax.count(".") > _MAX_DOTS or syntax.count("=") > _MAX_SETTINGS:
        raise ValueError(f"it has over {_MAX_SETTINGS:,} settings, or over {_MAX_DOTS:,} dots outside of strings")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _check_text(value: Any, name: str, source: str) -> None:
    """Raises UserError if a string cannot be the name of a file, or be written to one."""
    for text in _texts_in(value):
        # Bytes of the command line that are not UTF-8 are half surrogates, U+D800 to U+DFFF.
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{source}: {name} = {text!a} has a NUL character or is not UTF-8; rename the file")


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            yield from _texts_in(part)
    elif isinstance(value, str):
        yield value


def _find_field(name: str) -> tuple[str, str]:
    require_type("the name of an override", name, str, 'such as "model.num_layers"')
    section, _, field = name.replace("-", "_").partition(".")
    if section not in SECTIONS or field not in fields_of(section):
        raise UserError(f"{name}: there is no such setting{did_you_mean(name.replace('-', '_'), _settings())}")
    return section, field


def _parse_override(section: str, field: str, value: Any) -> Any:
    """The value of an override: of the ways to read a string, the first that the field accepts."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str):
        is_number = hasattr(value, "dtype") and getattr(value, "shape", None) == ()
        return value.item() if is_number else value  # a number of NumPy or JAX as Python's
    adapter = TypeAdapter(fields_of(section)[field].rebuild_annotation())
    readings = list(_readings(value))
    for reading in readings:
        try:
            adapter.validate_python(reading, strict=True)
            return reading
        except ValidationError:
            pass
    return readings[-1]


_WORDS = {"none": None} | dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


def _readings(text: str) -> Iterator[Any]:
    """The ways to read a string of the command line; the last one is for messages."""
    word = text.strip().lower()
    if word == "none":  # before the text itself: it takes back the text of a file
        yield None
    if not text.startswith("["):  # a list of paths, not a path
        yield text
    if word in _WORDS:
        yield _WORDS[word]
    try:
        value = _parse_toml(f"value = {text}")["value"]
    except ValueError:
        yield text
        return
    if isinstance(value, float) and value.is_integer():  # 1e3
        yield int(value)
    if isinstance(value, list):
        yield value
        yield text
    yield value


def _first_error(error: ValidationError, section: str, source: str, overridden: Collection[str]) -> str:
    first, *others = error.errors(include_url=False)
    fields = [str(part) for part in first["loc"][:1]]  # deeper parts name branches of a union
    name = ".".join(part for part in (section, *fields) if part)
    source = _source_of(name, source, overridden)
    match first["loc"]:
        case (_, int(index), str(inner), *_):  # of a table in a list
            name += f"[{index}].{inner}"
    if first["type"] == "unexpected_keyword_argument":
        near = did_you_mean(name, _settings()) or _choices([] if "[" in name else fields_of(section))
        what = f"there is no setting {name:.100}{near}"
    elif first["type"] == "missing":
        what = f"{name} is missing"
    elif first["type"] == "value_error":
        what = f"{name}: {first['msg']}".replace("Value error, ", "").removeprefix(": ")
    else:
        what = f"{name} = {shown(first['input'])}: {first['msg'].lower()}"
    count = len({other["loc"][:1] for other in others} - {first["loc"][:1]})
    return f"{source}: {what}" + (f" (and {count} more)" if count else "")


def _source_of(name: str, source: str, overridden: Collection[str]) -> str:
    return "the command line or overrides" if name in overridden else source


def _settings() -> list[str]:
    return [f"{section}.{field}" for section in SECTIONS for field in fields_of(section)]


def _choices(known: Collection[str]) -> str:
    return f"; there are: {', '.join(known)}" if 0 < len(known) < 20 else ""


def _default_folder(path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        return Path("runs/default")
    path = Path(path)
    return path.parent if _is_inside_a_run(path) else Path("runs") / path.stem


def _is_inside_a_run(path: str | os.PathLike[str] | None) -> bool:
    """Whether a config lies in a run folder, which may have been moved: its `run.folder` is where it is now."""
    return path is not None and Path(path).name == "config.toml" and (Path(path).parent / "corpus").is_dir()
