"""Reading a config and writing one.

A run is one TOML file. `load_config` reads it, puts overrides on top, and either returns a `Config` in which every
setting fits the others, or raises `UserError` with the file, the field and the value.
"""

import dataclasses
import difflib
import os
import reprlib
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import ValidationError

from flax_decoder.config import SECTIONS, Config, fields_of
from flax_decoder.errors import UserError
from flax_decoder.io.files import open_regular


def load_config(path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a run's settings from a TOML file.

    Args:
        path: the file; None is the embedded default.
        overrides: values that take precedence, by dotted name: `{"model.num_layers": 2}`. Hyphens count as
            underscores. A string for a field that is no string is read as TOML, as on the command line.

    Returns:
        The settings, checked. `run.folder` is filled in; `model.vocab_size` stays None where the tokenizer decides it.
        A warm-up that is as long as the run is shortened, which a `UserWarning` tells.

    Raises:
        UserError: an unreadable file, an unknown field, a wrong type, or settings that do not go together.
    """
    settings, source = {}, "the default config"
    if path is not None:
        source = os.fspath(path)
        settings = _read_toml(Path(path))
    for name, value in (overrides or {}).items():
        section, field = _find_field(name)
        values = settings.setdefault(section, {})
        if isinstance(values, dict):
            values[field] = _plain_value(section, field, value)
    overridden = {override.replace("-", "_") for override in overrides or {}}
    config = config_of(settings, source, overridden)
    moved = _is_inside_a_run(path) and "run.folder" not in overridden
    if config.run.folder is None or moved:
        run = dataclasses.replace(config.run, folder=str(_default_folder(path)))
        config = dataclasses.replace(config, run=run)
    return config


def config_of(settings: Mapping[str, Any], source: str, overridden: Collection[str] = ()) -> Config:
    """Checks settings that were read.

    Args:
        settings: values by section and field, as in TOML or JSON.
        source: where they are from; the message of an error begins with it.
        overridden: dotted names of those that are from elsewhere.

    Raises:
        UserError: as `load_config`.
    """
    parts = {}
    for section, values in settings.items():
        if section not in SECTIONS:
            raise UserError(f"{source}: there is no section [{section}]{_nearest(section, list(SECTIONS))}")
        if not isinstance(values, dict):
            raise UserError(f"{source}: {section} must be a table, [{section}]")
        for field, value in values.items():
            name = f"{section}.{field}"
            _refuse_no_text(value, name, _source_of(name, source, overridden))
        try:
            parts[section] = SECTIONS[section](**values)
        except ValidationError as error:
            raise UserError(_first_complaint(error, section, source, overridden)) from None
    try:
        return Config(**parts)
    except ValidationError as error:
        raise UserError(_first_complaint(error, "", source, overridden)) from None


def to_toml(config: Config) -> str:
    """Writes settings so that `load_config` reads the same ones back. Fields that are None are left out."""
    sections = dataclasses.asdict(config)
    return tomli_w.dumps(
        {
            section: {name: _as_list(value) for name, value in fields.items() if value is not None}
            for section, fields in sections.items()
        }
    )


# The shipped ones have 1 kB, and one with every field has 5.
_MAX_CONFIG_BYTES = 1_000_000

# How a value stands in a message: long and deep ones are cut.
_VALUES = reprlib.Repr()
_VALUES.maxstring = _VALUES.maxother = _VALUES.maxlong = 100


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give a TOML file, such as configs/tiny.toml"
        ) from None
    if len(content) > _MAX_CONFIG_BYTES:
        raise UserError(f"{path}: has over {_MAX_CONFIG_BYTES:,} bytes, so it is no config; give a TOML file")
    try:
        return _parse_toml(content.decode("utf-8").removeprefix("\ufeff"))  # some editors begin a file with this mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(f"{path}: is not UTF-8 (byte 0x{byte:02X} at offset {error.start}, line {line})") from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid TOML: {error}") from None


def _parse_toml(text: str) -> dict[str, Any]:
    """What TOML says; ValueError, whatever is wrong with it."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse_no_text(value: Any, name: str, source: str) -> None:
    """Raises UserError where a text in a setting cannot be written to a file, or be the name of one."""
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str) and ("\0" in text or not _is_unicode(text)):
            raise UserError(f"{source}: {name} = {text!a} has a NUL character or is not UTF-8; rename the file")


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: bytes that are not come from the command line as half surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _find_field(name: str) -> tuple[str, str]:
    section, _, field = name.replace("-", "_").partition(".")
    if section not in SECTIONS or field not in fields_of(section):
        known = [f"{s}.{f}" for s in SECTIONS for f in fields_of(s)]
        raise UserError(f"{name}: there is no such setting{_nearest(name.replace('-', '_'), known)}")
    return section, field


def _plain_value(section: str, field: str, value: Any) -> Any:
    """An override as TOML would give it; text for a field that holds text is taken as it stands."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, str):
        return value
    if str in _leaf_types(fields_of(section)[field].annotation) and not value.startswith("["):
        return value
    try:
        return _parse_toml(f"value = {value}")["value"]
    except ValueError:
        return value


def _leaf_types(annotation: Any) -> set[type]:
    """The plain types a field may hold; a choice between words counts as text."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return {type(word) for word in typing.get_args(annotation)}
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_leaf_types, typing.get_args(annotation)))
    if origin is Annotated:
        return _leaf_types(typing.get_args(annotation)[0])
    return {annotation}


def _first_complaint(error: ValidationError, section: str, source: str, overridden: Collection[str]) -> str:
    complaint, *others = error.errors(include_url=False)
    fields = [str(part) for part in complaint["loc"][:1]]  # deeper parts name branches of a union
    name = ".".join(part for part in (section, *fields) if part)
    source = _source_of(name, source, overridden)
    if complaint["type"] == "unexpected_keyword_argument":
        what = f"there is no setting {name}{_nearest(fields[0], list(fields_of(section)))}"
    elif complaint["type"] == "value_error":
        what = f"{name}: {complaint['msg']}".replace("Value error, ", "").removeprefix(": ")
    else:
        what = f"{name} = {_VALUES.repr(complaint['input'])}: {complaint['msg'].lower()}"
    count = len({other["loc"][:1] for other in others} - {complaint["loc"][:1]})
    return f"{source}: {what}" + (f" (and {count} more)" if count else "")


def _source_of(name: str, source: str, overridden: Collection[str]) -> str:
    return "the command line or overrides" if name in overridden else source


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}" if len(known) < 20 else ""


def _default_folder(path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        return Path("runs/default")
    path = Path(path)
    return path.parent if _is_inside_a_run(path) else Path("runs") / path.stem


def _is_inside_a_run(path: str | os.PathLike[str] | None) -> bool:
    """Whether a config is the one that a run keeps: wherever its folder was moved to, that is the run's folder."""
    return path is not None and Path(path).name == "config.toml" and (Path(path).parent / "corpus").is_dir()


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
