"""The page of what opens: for each model family, what its config.json may say, from the tables that read it."""

from typing import Any

from flax_decoder.huggingface.families import FAMILIES
from flax_decoder.huggingface.family import REQUIRED, Family
from flax_decoder.huggingface.fields import NO_BEARING, ONLY, QUANTIZED

WINDOWS = {
    None: "none",
    "all": "in all layers",
    "typed": "in all layers, or `layer_types`",
    "late": "in the layers from `max_window_layers` on, or `layer_types`",
    "periodic": "in all but every n-th layer, or `layer_types`",
    "listed": "in those that `attention_types` calls local",
}


def what_opens_page() -> str:
    """Every family with the fields that it reads, and what becomes of all others."""
    parts = [
        "# What opens\n\nA Hugging Face folder opens if its `model_type` is one of these, and its config.json says "
        "nothing that the network here cannot do. Published settings, old and new, are held to `transformers` "
        "([the table](../hugging_face.md#what-opens)).",
        "| `model_type` | Activations | `rope_type` | Windows | Must be given |\n|---|---|---|---|---|\n"
        + "\n".join(_row(family) for family in FAMILIES.values()),
        "## Other fields\n\nA field that the family does not read is one of these.",
        "**Without bearing on the logits**, whatever it says: " + _names(NO_BEARING) + ".",
        "And in single families: "
        + "; ".join(f"`{name}`: {_names(family.ignored)}" for name, family in FAMILIES.items() if family.ignored)
        + ".",
        "**Only with values that change nothing**, else refused:\n\n| Field | Values |\n|---|---|\n"
        + "\n".join(_only(name, values) for name, values in sorted(ONLY.items())),
        "And in single families:\n\n| `model_type` | Field | Values |\n|---|---|---|\n"
        + "\n".join(
            f"| `{model_type}` {_only(name, values)}"
            for model_type, family in FAMILIES.items()
            for name, values in sorted(family.supported.items())
        ),
        "**Quantised weights** are not read: " + _names(QUANTIZED) + " must be absent or empty.",
        "**Unknown**: passed over with a warning that says the value, or with `--strict` refused. A field whose name "
        "belongs to attention, positions, norms, activations, scaling or experts is always refused, unless it is null.",
    ]
    return "\n\n".join(parts) + "\n"


def _row(family: Family) -> str:
    """The family in the table."""
    activations = [setting.values for setting in family.settings if setting.fields == ("feed_forward",)] or [("gelu",)]
    required = [setting.name for setting in family.settings if setting.default is REQUIRED]
    kinds = _names(family.rotary.types) if family.rotary else f"{family.constants['positions']} positions"
    windows = WINDOWS[family.windows and family.windows.layers]
    cells = [f"`{family.model_type}`", _names(activations[0] or ()), kinds, windows, _names(required)]
    return f"| {' | '.join(cells)} |"


def _names(names: Any) -> str:
    """Names of fields; those of a set in alphabetical order."""
    return ", ".join(f"`{name}`" for name in (sorted(names) if isinstance(names, frozenset) else names))


def _only(name: str, values: tuple[Any, ...]) -> str:
    words = {None: "null", True: "true", False: "false"}
    shown = [words[value] if value is None or isinstance(value, bool) else repr(value) for value in values]
    return f"| `{name}` | {', '.join(f'`{word}`' for word in shown)} |"
