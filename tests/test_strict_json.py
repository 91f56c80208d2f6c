"""JSON that means one thing: the bounds hold exactly where they should. Attacks are in faults/test_foreign_json.py."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_decoder.errors import UserError
from flax_decoder.io import strict_json
from flax_decoder.io.strict_json import LISTING, SETTINGS, VOCABULARY, Limits, parse_object, shown

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


def depth_of(value):
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


@pytest.mark.parametrize("num_examples", [40, pytest.param(300, marks=pytest.mark.full)])
def test_what_is_well_formed_is_read(num_examples):
    @settings(deadline=None, max_examples=num_examples)
    @given(st.dictionaries(st.text('"\\[]{},:a', max_size=6) | st.text(), VALUES, max_size=4), st.booleans())
    def is_read(document, is_ascii):
        content = json.dumps(document, ensure_ascii=is_ascii).encode()
        assert parse_object(content, "x", VOCABULARY) == document
        assert strict_json._depth(content) == depth_of(document)

    is_read()


@pytest.mark.parametrize(("depth", "is_read"), [(31, True), (32, False)])
def test_the_deepest_is_32(depth, is_read):
    content = b'{"[[[\\"{": ' + b"[" * depth + b"]" * depth + b"}"
    if is_read:
        parse_object(content, "x", VOCABULARY)
    else:
        with pytest.raises(UserError, match="x: is nested more than 32 levels deep"):
            parse_object(content, "x", VOCABULARY)


def test_the_largest_is_as_said():
    content = b'{"a": [1, 2]}'
    limits = Limits(num_bytes=len(content), memory_bytes=2 * 90 + 160 + 60)
    assert parse_object(content, "x", limits) == {"a": [1, 2]}
    with pytest.raises(UserError, match="x: has 14 bytes, over the limit of 13"):
        parse_object(content + b" ", "x", limits)
    with pytest.raises(UserError, match="x: would take 490 bytes of memory, over the limit of 400"):
        parse_object(b'{"a":[[],2]}', "x", limits)


def test_real_files_have_room():
    """As many tokens as Gemma 3 has, with merges; all characters; as many tensors as the largest header may have."""
    vocab = {f"\u2581token{number}": number for number in range(262_144)}
    merges = [[f"\u2581to{number}", "ken"] for number in range(514_000)]
    content = json.dumps({"model": {"vocab": vocab, "merges": merges}}, ensure_ascii=False).encode()
    assert strict_json.excess_of(content, VOCABULARY) is None
    characters = b'"": 0000000, ' * (0x110000 - 0x800) + b" " * (4 * 0x110000)  # a token each, of up to four bytes
    assert strict_json.excess_of(characters, VOCABULARY) is None
    entry = {"dtype": "BF16", "shape": [16384, 53248], "data_offsets": [811706089472, 813450919936]}
    header = {f"model.layers.{number}.self_attn.q_proj.weight": entry for number in range(25_000)}
    assert strict_json.excess_of(json.dumps(header).encode(), LISTING) is None


def test_a_pair_of_surrogates_is_a_character():
    assert parse_object(b'{"\\ud83d\\ude00": "\\u0041"}', "x", SETTINGS) == {"\U0001f600": "A"}


def test_long_values_are_cut_short_in_messages():
    assert shown("a\n\x1b") == r"'a\n\x1b'" and shown([1, "a"]) == "[1, 'a']" and shown(2**31) == "2147483648"
    for value in (
        "a" * 10**6,
        list(range(10**6)),
        {str(n): n for n in range(10**5)},
        10**4000,
        [["a" * 999] * 99] * 99,
    ):
        assert len(shown(value)) <= 400
