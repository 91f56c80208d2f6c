import json

import pytest

from flax_decoder.training import environment
from flax_decoder.training.environment import ENVIRONMENT, VERSIONS, changes_since, versions


@pytest.fixture
def manifest():
    """As it is read back from a checkpoint that was saved here."""
    return json.loads(json.dumps({VERSIONS: versions(), ENVIRONMENT: environment.environment()}))


def test_nothing_has_changed_here(manifest):
    assert manifest[VERSIONS].keys() >= {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert manifest[ENVIRONMENT]["devices"] == "8 x cpu"
    assert changes_since(manifest) == ""


def test_what_has_changed_is_said_in_one_line(manifest, monkeypatch):
    monkeypatch.setattr(environment, "cpu_features", lambda: ["avx2", "2-core"])
    manifest[VERSIONS]["jaxlib"] = "0.1.0"
    manifest[ENVIRONMENT] = {
        "XLA_FLAGS": "--old\n",
        "devices": "4 x TPU v4",
        "processor features": ["avx512f", "2-core"],
    }
    told = changes_since(manifest)
    assert "\n" not in told
    for part in ("jaxlib '0.1.0' -> ", "XLA_FLAGS '--old\\n' -> '--xla", "devices '4 x TPU v4' -> '8 x cpu'"):
        assert part in told
    assert "processor features without avx512f and with avx2" in told


def test_flags_in_another_order_are_the_same(manifest, monkeypatch):
    flags = manifest[ENVIRONMENT]["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", "  ".join(reversed(flags)))
    assert changes_since(manifest) == ""


@pytest.mark.parametrize("odd", [None, [], "text", {}, {"jax": 3, "devices": None, "processor features": ["a\nb", 3]}])
def test_a_manifest_of_an_earlier_version_or_of_anybody_is_no_error(odd):
    assert changes_since({}) == ""
    assert "\n" not in changes_since({VERSIONS: odd, ENVIRONMENT: odd})
