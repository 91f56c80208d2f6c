import re
from xml.etree import ElementTree

import jax.numpy as jnp
import matplotlib
import matplotlib.image
import numpy as np
import pytest
from shape_names import checked_shape_names

from flax_decoder.errors import UserError
from flax_decoder.lens.pictures import plot_attention, visible

PNG = b"\x89PNG\r\n\x1a\n"
LABELS = ["To", " be", ",", "\n", " or"]


def causal(*shape):
    """Weights of heads in which each query sees itself and what is before it."""
    weights = np.tril(np.random.default_rng(0).random(shape) + 0.1, shape[-1] - shape[-2])
    return weights / weights.sum(-1, keepdims=True)


def read_svg(path):
    """All elements, and the texts among them."""
    elements = list(ElementTree.parse(path).getroot().iter())
    return elements, [element.text for element in elements if element.tag.endswith("}text")]


@pytest.mark.short("shape1", "shape3", "shape4")
@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 3, 5, 5), (2, 5), (1, 1)])
def test_a_picture_of_one_head_or_of_many(tmp_path, shape):
    labels = LABELS[: shape[-1]]
    with checked_shape_names() as functions:
        plot_attention(causal(*shape), labels, tmp_path / "a.png")
        plot_attention(causal(*shape), labels, str(tmp_path / "a.SVG"))
    assert "pictures.py:plot_attention" in functions
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    _, texts = read_svg(tmp_path / "a.SVG")
    heads = {(2, 3): [f"layer {i}, head {j}" for i in (0, 1) for j in (0, 1, 2)], (3,): ["head 0", "head 1", "head 2"]}
    assert [text for text in texts if "head" in text] == heads.get(shape[:-2], [])
    assert {"query position", "key position", "attention weight (grey: 0)", "0.0", "1.0"} <= set(texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.SVG", "a.png"]


def test_each_square_has_the_colour_of_its_weight(tmp_path):
    weights = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 1e-6, 0.5]])
    plot_attention(weights, ["a", "b", "c"], tmp_path / "a.svg")
    elements, _ = read_svg(tmp_path / "a.svg")
    (mesh,) = (element for element in elements if element.get("id", "").startswith("QuadMesh"))
    styles = [element.get("style", "") for element in mesh.iter()]
    fills = [match[1] for match in (re.search(r"fill: (#\w+)", style) for style in styles) if match]
    colours = matplotlib.colormaps["Blues"](weights.astype(np.float32).reshape(-1))
    expected = [matplotlib.colors.to_hex(colour) for colour in colours]
    grey = matplotlib.colors.to_hex("0.92")
    assert fills == [grey if weight == 0 else colour for weight, colour in zip(weights.flat, expected, strict=True)]


def test_the_first_query_is_on_top_and_the_first_key_on_the_left(tmp_path):
    plot_attention(np.array([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]), ["a", "b", "c", "d"], tmp_path / "a.png")
    pixels = np.round(matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255)
    dark = (np.abs(pixels - np.round(np.array(matplotlib.colormaps["Blues"](1.0)[:3]) * 255)) < 2).all(-1)
    rows, columns = np.nonzero(dark[:, : dark.shape[1] * 3 // 4])  # without the bar
    left, right = columns < columns.mean(), columns > columns.mean()
    assert rows[left].max() < rows[right].min() and columns[left].max() < columns[right].min()


def test_the_queries_are_the_last_tokens(tmp_path):
    plot_attention(causal(2, 5), LABELS, tmp_path / "a.svg")
    _, texts = read_svg(tmp_path / "a.svg")
    assert [text for text in texts if text in map(visible, LABELS)] == ["To", "␣be", ",", "\\n", "␣or", "\\n", "␣or"]


def test_arrays_of_any_kind_are_drawn(tmp_path):
    weights = jnp.asarray(causal(5, 5), jnp.bfloat16)
    plot_attention(weights, LABELS, tmp_path / "a.png")
    plot_attention(np.asarray(weights, np.float32), LABELS, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_numbers_give_the_same_file(tmp_path, ending):
    contents = []
    for name in ("a", "b"):
        plot_attention(causal(2, 5, 5), LABELS, tmp_path / f"{name}.{ending}")
        contents.append((tmp_path / f"{name}.{ending}").read_bytes())
    assert contents[0] == contents[1]
    for word in (matplotlib.__version__, "atplotlib.org/", "dc:date"):
        assert word.encode() not in contents[0], word


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" be", "␣be"),
        ("\n\t", "\\n\\t"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),  # would turn the direction of writing
        ("漢", "\\u6f22"),  # the font has no such glyph
        ("é", "é"),
        ("", ""),
        ("$x^2$", "$x^2$"),
        ("x" * 16, "x" * 16),
        ("x" * 10**6, "x" * 15 + "…"),
    ],
)
def test_a_label_can_be_seen(text, label):
    assert visible(text) == label


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_labels_are_text_and_nothing_else(tmp_path, ending):
    """Not formulas, and no elements."""
    labels = ["$\\frac{", "$x$", "<script>", "&amp;", "\\input{a}"]
    path = tmp_path / f"a.{ending}"
    plot_attention(causal(5, 5), labels, path)  # a formula that does not end would raise
    if ending == "svg":
        elements, texts = read_svg(path)
        assert [text for text in texts if text in labels] == 2 * labels
        assert not [element for element in elements if "script" in element.tag]


@pytest.mark.parametrize(
    ("large", "small"), [((99, 99), (160, 160)), pytest.param((9, 40, 40), (100, 40, 40), marks=pytest.mark.full)]
)
def test_small_squares_have_numbers_in_place_of_tokens(tmp_path, large, small):
    plot_attention(causal(*large), ["token"] * large[-1], tmp_path / "a.svg")
    _, texts = read_svg(tmp_path / "a.svg")
    assert "token" in texts
    plot_attention(causal(*small), ["token"] * small[-1], tmp_path / "a.svg")
    _, texts = read_svg(tmp_path / "a.svg")
    quarters = {str(quarter * small[-1] // 4) for quarter in range(4)}
    assert "token" not in texts and quarters <= set(texts)
    assert (tmp_path / "a.svg").stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("weights", "labels", "name", "message"),
    [
        (causal(5, 5), LABELS, "a.pdf", "a.pdf: the name of a picture must end in .png or .svg"),
        (causal(5, 5), LABELS, "a", "must end in .png or .svg"),
        (causal(5, 5), LABELS, "no/a.png", "there is no folder"),
        (causal(5, 5), LABELS[:4], "a.png", "labels: there are 4, but weights are of 5 key positions"),
        (causal(5, 5)[0], LABELS, "a.png", "weights: has the shape (5,)"),
        (np.zeros((2, 0, 5)), LABELS, "a.png", "weights: has the shape (2, 0, 5)"),
        (np.zeros((1, 1, 1, 5, 5)), LABELS, "a.png", "weights: has the shape (1, 1, 1, 5, 5)"),
        (causal(5, 5).T[:, :3], LABELS[:3], "a.png", "weights: has 5 queries and 3 keys"),
        (causal(5, 5) * 30, LABELS, "a.png", "but attention weights are from 0 to 1; are these scores?"),
        (np.full((5, 5), np.nan), LABELS, "a.png", "weights: has nan"),
        (np.full((5, 5), "x"), LABELS, "a.png", "weights: has the dtype <U1"),
        (causal(401, 2, 2), LABELS[:2], "a.png", "weights: 1 x 401 heads are more than 400"),
        (np.zeros((2001, 2001)), [""] * 2001, "a.png", "weights: 4,004,001 are more than 4,000,000"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, weights, labels, name, message):
    with pytest.raises(UserError) as caught:
        plot_attention(weights, labels, tmp_path / name)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
