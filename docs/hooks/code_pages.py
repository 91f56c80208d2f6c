"""The pages that are written from the code itself: every setting, every command, and the modules of the library."""

import argparse
import ast
import json
import types
import typing
from pathlib import Path
from typing import Any

import annotated_types

from flax_decoder.cli import build_parser
from flax_decoder.config import SECTIONS, Source, fields_of, fixed_fields

# The packages that have a page of their own, lowest floor first.
PACKAGES = (
    *("io", "nn", "data", "parallel", "generation", "lens", "huggingface", "training", "planning", "comparison"),
)

# The public names by what one wants, in the order in which one needs them.
API = {
    "Settings": ("load_config", "Config", "ModelConfig"),
    "Train": ("Decoder", "init_state", "train_step", "eval_step", "TrainState", "plot_losses"),
    "Load": ("load", "load_corpus", "register_family", "unstack_layers"),
    "Generate and score": (
        "generate",
        "complete",
        "prefill",
        "score",
        "harness_model",
        "Draft",
        "PromptLookup",
        "empty_cache",
        "KVCache",
    ),
    "Compare": ("compare", "adamw_from_torch", "adamw_to_torch"),
    "Look inside": (
        *("capture", "attribute", "Attribution", "head_scores", "plot_attention", "write_lens_page"),
        *("read_history", "History"),
    ),
    "Shard": (),
    "Errors": ("UserError", "FaultError"),
}
API_TEXT = {
    "Train": "`train_step` is a pure function: wrap it in `jax.jit`, `jax.pmap` or `jax.shard_map`.",
    "Look inside": "[The lens](../lens.md) shows what these are for.",
    "Shard": "Give `init_state` a mesh, and the state is split over it: [Many devices](../many_devices.md).",
}

# What stands on top of a page that a search shows before others.
FOUND_FIRST = "---\nsearch:\n  boost: 2\n---\n\n"

EXIT_CODES = """## Exit codes

| Code | Meaning |
|---|---|
| 0 | done |
| 1 | a fault, such as a disk, a damaged checkpoint or NaN; or what was checked does not hold |
| 2 | something to mend in what was given; nothing was written |
| 73 | another process uses the run folder |
| 129, 130, 143 | ended by SIGHUP (the terminal was closed), Ctrl-C or SIGTERM; training saves first |"""

BOUNDS = {annotated_types.Gt: "over", annotated_types.Ge: "from", annotated_types.Lt: "under", annotated_types.Le: "to"}


def config_page() -> str:
    """Every field of a config: what it may be, what it is by default, and what it means."""
    parts = [
        f"{FOUND_FIRST}# Every setting\n\nA setting is a line in its section of a TOML file, or an argument of a "
        "command: `num_layers = 6` under `[model]` is `--model.num-layers 6`. There, `1e3` is a count too, `yes`, "
        "`on`, `no` and `off` are switches, and `none` takes the value of the file back. `~` at the start of a path is "
        "your home folder. Settings that do not go together are refused with the reason."
    ]
    fixed = fixed_fields()
    for section, home in SECTIONS.items():
        rows = [
            f"| `{name}`{{ #{section}.{name} }}<br>{default_of(field.default)} "
            f"| {_cell(field.description)}<br>*{kind_of(field.annotation, field.metadata)}"
            f"{'; may change on resume' if (section, name) not in fixed else ''}* |"
            for name, field in fields_of(section).items()
        ]
        doc = " ".join((home.__doc__ or "").split())
        parts.append(
            f"## [{section}] {{ #{section} }}\n\n{doc}\n\n| Setting, default | What it does, *and what it may be* |\n"
            "|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


def kind_of(annotation: Any, metadata: typing.Iterable[Any] = ()) -> str:
    """What a setting may be, in words: its type or choices, and its bounds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(args[0], [*_flat(args[1:]), *metadata])
    if origin is typing.Literal:
        return " · ".join(f"`{word}`" for word in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_of(part, metadata) for part in args if part is not types.NoneType)
    bounds = [
        f"{word} {_number(getattr(bound, type(bound).__name__.lower()))}"
        for bound in _flat(metadata)
        for kind, word in BOUNDS.items()
        if isinstance(bound, kind)
    ]
    if origin is tuple:
        return f"list of {kind_of(args[0])}"
    words = {int: "whole number", float: "number", bool: "`true` · `false`", str: "text", Source: "tables"}
    return ", ".join([words[annotation], *bounds])


def default_of(value: Any) -> str:
    """A default as it stands in a TOML file."""
    if value is None:
        return "left out"
    return f"`{json.dumps(value)}`"


def _flat(metadata: typing.Iterable[Any]) -> list[Any]:
    """Constraints one by one: a pydantic Field holds several."""
    return [part for entry in metadata for part in getattr(entry, "metadata", [entry])]


def _number(value: float) -> str:
    """A bound; large powers of two as such."""
    if isinstance(value, int) and value >= 2**16 and value.bit_count() == 1:
        return "2" + str(value.bit_length() - 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _cell(text: str) -> str:
    """Text as it can stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def commands_page() -> str:
    """Every command: how it is called, and each of its options."""
    parser = build_parser()
    parts = [f"{FOUND_FIRST}# Every command\n\n`flax-decoder COMMAND --help` says the same. Underscores are hyphens."]
    for name, sub in commands_of(parser).items():
        own, takes_config = own_actions(sub)
        calls = [*map(_usage_of, own), *(["[--SECTION.FIELD VALUE]..."] * takes_config)]
        parts.append(f"## {name}\n\n{sub.description}\n\n```text\n{_wrapped(f'flax-decoder {name}', calls)}\n```")
        rows = [f"| {_call_of(action)} | {_default_of_action(action)} | {_help_of(sub, action)} |" for action in own]
        parts.append("\n".join(["| Argument | Default | What it does |", "|---|---|---|", *rows]))
        if takes_config:
            example = "--data.tokenizer bpe" if name == "prepare" else "--model.num-layers 6"
            which = "the settings of `[data]`" if name == "prepare" else "every setting of a config"
            parts.append(f"And [{which}](config.md), such as `{example}`.")
    parts.append(EXIT_CODES)
    return "\n\n".join(parts) + "\n"


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by its name."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def own_actions(parser: argparse.ArgumentParser) -> tuple[list[argparse.Action], bool]:
    """The arguments of a command but for the fields of a config and --help, and whether it takes those fields."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    own = [action for action in actions if "." not in action.dest]
    return own, len(own) < len(actions)


def _usage_of(action: argparse.Action) -> str:
    call = " ".join([*action.option_strings[:1], *([action.metavar or ""] if action.nargs != 0 else [])])
    return call if not action.option_strings and action.nargs != "?" else f"[{call}]"


def _wrapped(command: str, calls: list[str]) -> str:
    """A command and its arguments on lines of 76 characters, which no argument is broken over."""
    lines = [command]
    for call in calls:
        if len(lines[-1]) + len(call) > 75:
            lines.append("   ")
        lines[-1] += f" {call}"
    return "\n".join(lines)


def _call_of(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings)
    call = " ".join(filter(None, [names, action.metavar if action.nargs != 0 else ""]))
    return f"`{call}`".replace("|", "\\|")


def _default_of_action(action: argparse.Action) -> str:
    default = action.default  # 0 is one, and equals False
    hidden = any(default is value for value in (None, False, argparse.SUPPRESS)) or default == []
    return "" if hidden else f"`{default}`"


def _help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return _cell((action.help or "") % {**vars(action), "prog": parser.prog})


def api_page(root: Path) -> str:
    """The public names, those that `import flax_decoder as fd` gives."""
    parts = ["# The library\n\nAfter `import flax_decoder as fd`, these names are `fd.NAME`. All else may change."]
    homes = homes_of((root / "flax_decoder/__init__.py").read_text(encoding="utf-8"))
    for wish, names in API.items():
        parts += [f"## {wish}", *([API_TEXT[wish]] if wish in API_TEXT else [])]
        for name in names:
            parts.append(f"::: flax_decoder.{name}\n    options:\n      heading_level: 3")
            parts.append(f"In [`{homes[name]}`](../../{homes[name]}#{name}).")
    return "\n\n".join(parts) + "\n"


def homes_of(init: str) -> dict[str, str]:
    """The file that defines each name that the `__init__.py` of the package imports."""
    return {
        name.name: node.module.replace(".", "/") + ".py"
        for node in ast.walk(ast.parse(init))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in node.names
    }


def package_pages(root: Path) -> dict[str, str]:
    """A page for each package, with all of its modules, by the path of the page."""
    pages = {}
    for package in PACKAGES:
        folder = root / "flax_decoder" / package
        if folder.is_dir():
            modules = sorted(module for module in folder.rglob("*.py") if module.stem != "__init__")
            doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
            parts = [f"# flax_decoder.{package}", doc]
            for module in modules:
                path = module.relative_to(root).as_posix()
                parts += [f"::: {path.removesuffix('.py').replace('/', '.')}", f"In [`{path}`](../../{path})."]
            pages[f"reference/{package}.md"] = "\n\n".join(parts) + "\n"
    return pages
