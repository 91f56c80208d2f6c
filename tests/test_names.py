"""A map of names, theirs -> ours, is the table of a family."""

import numpy as np
import pytest
import reference

import flax_decoder as fd
from flax_decoder.errors import UserError
from flax_decoder.huggingface.names import family_of_names, left_over, read_layout
from flax_decoder.huggingface.weights import export_tensors, flatten, split, tensor_specs

L, D, N, H, V, T = 2, 12, 3, 4, 17, 11
QKV = [f"layers/attention/{name}/kernel" for name in ("query", "key", "value")]
NAMES = {
    "wte.weight": "embedding",
    "wpe": "positions",
    "h.{}.ln_1.weight": "layers/attention_norm/scale",
    "h.{}.ln_2.weight": "layers/feed_forward_norm/scale",
    "h.{}.attn.weight": QKV,
    "h.{}.proj.weight": "layers/attention/out/kernel",
    "h.{}.fc1.weight": "layers/feed_forward/up/kernel",
    "h.{}.fc2.weight": "layers/feed_forward/down/kernel",
    "ln_f.weight": "final_norm/scale",
    "head.weight": "head",
}


def of_layers(name, shape):
    return {name.replace("{}", str(layer)): shape for layer in range(L)} if "{}" in name else {name: shape}


@pytest.fixture(scope="module")
def leaves():
    sizes = {"vocab_size": V, "context_length": T, "num_layers": L, "embed_dim": D, "num_heads": N}
    return flatten(reference.random_params(fd.Decoder(fd.ModelConfig(**sizes, tied_head=False))))


@pytest.fixture
def shapes(leaves):
    return {path: leaf.shape for path, leaf in leaves.items()}


def tensors():
    shapes = {
        "wte.weight": (V, D),
        "wpe": (1, T, D),
        "h.{}.ln_1.weight": (D,),
        "h.{}.ln_2.weight": (D,),
        "h.{}.attn.weight": (3 * D, D),
        "h.{}.proj.weight": (D, D),
        "h.{}.fc1.weight": (D, 4 * D),  # as in Conv1D
        "h.{}.fc2.weight": (D, 4 * D),
        "ln_f.weight": (D,),
        "head.weight": (V, D),
    }
    return {name: one for pattern, shape in shapes.items() for name, one in of_layers(pattern, shape).items()}


def test_shapes_say_how_a_tensor_is_stored(shapes):
    family = family_of_names(NAMES, tensors(), shapes)
    rules = {rule.tensor: rule for rule in family.all_rules}
    turned = {name for name, rule in rules.items() if rule.transposed}
    # A square one is that of an nn.Linear, if nothing else is known.
    assert turned == {"h.{}.attn.weight", "h.{}.proj.weight", "h.{}.fc2.weight", "head.weight"}
    assert not any(rule.by_head for rule in rules.values()) and family.head == "head.weight"
    found = left_over(family, tensors(), shapes)
    assert not found.ours and not found.theirs
    specs = {spec.name: spec.shape for spec in tensor_specs(family, shapes)}
    assert specs.keys() == tensors().keys() and specs["h.1.attn.weight"] == (3 * D, D)


@pytest.mark.parametrize("options", [{"by_head": True}, {"transposed": False}, {"by_head": True, "transposed": False}])
def test_what_shapes_leave_open_is_said_by_hand_or_by_the_numbers(options, leaves, shapes):
    paths = QKV if "by_head" in options else ["layers/attention/out/kernel"]
    shape = (D, len(paths) * D) if options.get("transposed") is False else (len(paths) * D, D)
    name, theirs = "a.{}.w", of_layers("a.{}.w", shape)
    by_hand = family_of_names({name: {"paths": paths, **options}}, theirs, shapes)
    (rule,) = by_hand.rules
    assert (rule.by_head, rule.transposed) == (options.get("by_head", False), options.get("transposed", True))
    (tensor, *_) = export_tensors(tensor_specs(by_hand, shapes), leaves)

    def agreement(rule):
        parts = split(rule, tensor, [shapes[path][1:] for path in paths])
        return float(np.mean([part == leaves[path][0] for part, path in zip(parts, paths, strict=True)]))

    assert family_of_names({name: paths}, theirs, shapes, agreement=agreement).rules == (rule,)
    assert family_of_names({name: paths}, theirs, shapes).rules != (rule,)
    known = {name: rule.transposed}
    assert family_of_names({name: paths}, theirs, shapes, layouts=known).rules[0].transposed == rule.transposed


def test_what_is_left_on_both_sides_is_told(shapes):
    names = {name: path for name, path in NAMES.items() if name not in ("wpe", "ln_f.weight")}
    theirs = tensors() | {"h.0.mask": (1, 1, T, T), "h.1.mask": (1, 1, T, T), "extra": (5,)}
    found = left_over(family_of_names(names | {"h.{}.mask": []}, theirs, shapes), theirs, shapes)
    assert found.ours.keys() == {"positions", "final_norm/scale"}
    assert found.theirs.keys() == {"wpe", "ln_f.weight", "extra"}
    assert found.matrices().ours.keys() == {"positions"} and found.matrices().theirs.keys() == {"wpe"}
    with pytest.raises(UserError, match=r"of theirs wpe \(1, 11, 12\); of ours positions \(11, 12\)\ngive a map"):
        found.matrices().refuse("module")
    left_over(family_of_names(NAMES, tensors(), shapes), tensors(), shapes).refuse("module")


def test_a_tied_head_may_be_named(shapes):
    tied = {path: shape for path, shape in shapes.items() if path != "head"}
    family = family_of_names(NAMES, tensors(), tied)
    assert family.head == "head.weight" and not left_over(family, tensors(), tied).theirs


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"wte.weigth": "embedding"}, "there is no tensor wte.weigth; the nearest is wte.weight"),
        ({"wte.weight": "embeding"}, "no parameter embeding; the nearest is embedding"),
        ({"wte.weight": "embedding", "head.weight": "embedding"}, "embedding is given twice"),
        ({"wte.weight": "positions"}, r"wte.weight of shape \(17, 12\) cannot hold positions \(11, 12\)"),
        ({"h.{}.fc1.weight": QKV}, "cannot hold layers/attention/query/kernel"),
        ({"h.0.ln_1.weight": "layers/attention_norm/scale"}, "write {} for the number of the layer"),
        ({"h.{}.ln_1.weight": "final_norm/scale"}, "write {} for the number of the layer"),
        ({"wte.weight": 3}, "must be a path of ours"),
        ({"wte.weight": {"paths": "embedding", "layout": 1}}, "must be a path of ours"),
        ({"wte.weight": {"paths": "embedding", "by_head": 1}}, "must be true or false"),
        ({"h.{}.{}.weight": "embedding"}, "must be a path of ours"),
    ],
)
def test_a_wrong_map_is_refused(names, message, shapes):
    with pytest.raises(UserError, match=message) as refused:
        family_of_names(names, tensors(), shapes, "names.toml")
    assert str(refused.value).startswith("names.toml: ") and len(str(refused.value).splitlines()) <= 2


def test_a_map_is_a_table_of_a_file(tmp_path):
    file = tmp_path / "names.toml"
    file.write_text('[names]\n"h.{}.attn.weight" = ["a", "b"]\n"wte.weight" = "embedding"\n')
    assert read_layout(file)["names"] == {"h.{}.attn.weight": ["a", "b"], "wte.weight": "embedding"}
    for content, message in (
        ("[name]\n", "must hold a table"),
        ("[names", "is not TOML"),
        ("names = 1", "must hold a table"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_layout(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_layout(tmp_path / "none.toml")


def test_tensors_of_a_map_hold_the_parameters(leaves, shapes):
    specs = tensor_specs(family_of_names(NAMES, tensors(), shapes), shapes)
    for spec, tensor in zip(specs, export_tensors(specs, leaves), strict=True):
        assert tensor.shape == spec.shape
        for path, part in zip(spec.rule.paths, split(spec.rule, tensor, spec.param_shapes), strict=True):
            np.testing.assert_array_equal(part, leaves[path] if spec.layer is None else leaves[path][spec.layer])
