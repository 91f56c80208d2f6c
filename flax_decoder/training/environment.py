"""What the last bits of a run's numbers depend on besides its settings: versions, flags of XLA, devices, processor."""

import collections
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax

from flax_decoder.errors import as_one_line
from flax_decoder.training.hardware import cpu_features
from flax_decoder.training.manifest import Manifest
from flax_decoder.version import __version__

ENVIRONMENT, VERSIONS = "environment", "versions"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_NUM_SHOWN = 6  # of the differences


def versions() -> dict[str, str]:
    """The versions of this package and of those that compute and write."""
    return {"flax-decoder": __version__} | {package: version(package) for package in _PACKAGES}


def environment() -> dict[str, Any]:
    """The manifest entries about this machine, JSON values."""
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    return {
        "XLA_FLAGS": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        "devices": ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())),
        "processor features": cpu_features(),
    }


def changes_since(manifest: Manifest) -> str:
    """What differs from when a checkpoint was saved, in one line; empty if nothing does.

    What its manifest lacks, as those of earlier versions do, is not compared.
    """
    found = []
    for part, now in ((VERSIONS, versions()), (ENVIRONMENT, environment())):
        saved = manifest.get(part)
        if isinstance(saved, Mapping):
            found += [_change(name, saved[name], now[name]) for name in now if saved.get(name, now[name]) != now[name]]
    return ", ".join(found[:_NUM_SHOWN])


def _change(name: str, saved: Any, now: Any) -> str:
    if isinstance(saved, list) and isinstance(now, list):
        gone, come = ([str(one) for one in some if one not in others] for some, others in ((saved, now), (now, saved)))
        parts = [f"{word} {' '.join(some)}" for word, some in (("without", gone), ("with", come)) if some]
        return f"{name} " + " ".join(" and ".join(parts).split())[:100]
    return f"{name} {as_one_line(saved)} -> {as_one_line(now)}"
