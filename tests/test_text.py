import numpy as np
import pytest

from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer
from flax_decoder.generation.text import decode_streams

BYTES = ByteTokenizer()


def pieces(tokenizer, tokens, size, stop=()):
    tokens = np.asarray(tokens)
    chunks = (tokens[None, i : i + size] for i in range(0, len(tokens), size))
    return [piece for _, piece in decode_streams(tokenizer, chunks, 1, stop)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_no_character_is_cut(size):
    text = "aé\N{EURO SIGN}b\N{GRINNING FACE}\N{GRINNING FACE}ü\n"
    shown = pieces(BYTES, BYTES.encode(text), size)
    assert "".join(shown) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_joined_pieces_equal_the_whole_for_bytes_that_are_no_text(size, seed):
    starts = np.array([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0xFF, 0x41])
    tokens = np.random.default_rng(seed).choice(starts, 60)
    assert "".join(pieces(BYTES, tokens, size)) == BYTES.decode(tokens)


def test_text_comes_as_soon_as_it_is_settled():
    assert pieces(BYTES, BYTES.encode("abc"), 1)[:3] == ["a", "b", "c"]
    assert pieces(BYTES, BYTES.encode("a\N{GRINNING FACE}b"), 1)[:3] == ["a", "\N{GRINNING FACE}", "b"]
    # A long run of bytes that are no text must not be waited for either.
    assert "".join(pieces(BYTES, [0xFF] * 9, 1)[:-1]) == "\N{REPLACEMENT CHARACTER}" * 6


@pytest.mark.parametrize("size", [1, 2, 3, 4, 50])
def test_the_text_ends_before_a_stop_string(size):
    shown = pieces(BYTES, BYTES.encode("one two END three END"), size, stop=["END"])
    assert "".join(shown) == "one two "
    shown = pieces(BYTES, BYTES.encode("one two three"), size, stop=["three", "two"])
    assert "".join(shown) == "one "  # the first in the text, not in the list
    shown = pieces(BYTES, BYTES.encode("so\N{GRINNING FACE}on"), size, stop=["\N{GRINNING FACE}"])
    assert "".join(shown) == "so"


@pytest.mark.parametrize("size", [1, 3, 50])
def test_what_only_begins_as_a_stop_string_is_shown(size):
    assert "".join(pieces(BYTES, BYTES.encode("EN ENEN and EN"), size, stop=["END"])) == "EN ENEN and EN"


@pytest.mark.parametrize("size", [1, 2, 50])
def test_the_end_token_ends_the_text(size):
    tokenizer = CharTokenizer("abc.")
    tokenizer.end_ids = (99, tokenizer.encode(".")[0])
    assert "".join(pieces(tokenizer, tokenizer.encode("abca.bb.c"), size)) == "abca"
    assert "".join(pieces(tokenizer, tokenizer.encode("abca.bb"), size, stop=["ca"])) == "ab"
    assert "".join(pieces(tokenizer, tokenizer.encode("abca.bb"), size, stop=["bb"])) == "abca"


def test_no_more_is_asked_for_than_needed():
    asked = []

    def chunks():
        for chunk in np.array(BYTES.encode("ab.cd")):
            asked.append(chunk)
            yield np.array([[chunk]])

    assert list(decode_streams(BYTES, chunks(), 1, ["."])) == [(0, "a"), (0, "b")]
    assert len(asked) == 3  # generating goes on only while someone asks


def test_no_tokens_are_no_text():
    assert "".join(pieces(BYTES, [], 1)) == ""


@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_rows_that_are_made_at_once_are_read_one_after_the_other(size):
    texts = ["one END and", "two \N{GRINNING FACE} more", "so END then"]
    rows = [BYTES.encode(text)[:11] for text in texts]
    tokens_BT = np.array([row + [65] * (11 - len(row)) for row in rows])
    chunks = [tokens_BT[:, i : i + size] for i in range(0, 11, size)]
    shown = list(decode_streams(BYTES, chunks, 3, stop=["END"]))
    assert [row for row, _ in shown] == sorted(row for row, _ in shown)
    joined = ["".join(piece for row, piece in shown if row == number) for number in range(3)]
    assert joined == ["one ", BYTES.decode(tokens_BT[1]), "so "]
    assert size > 1 or len(shown) > 5  # the first row comes piece by piece


def test_rows_ask_for_no_more_when_all_have_ended():
    asked = []

    def chunks():
        for column in np.array([BYTES.encode("ab.cd"), BYTES.encode(".xyzz")]).T:
            asked.append(column)
            yield column[:, None]

    assert list(decode_streams(BYTES, chunks(), 2, ["."])) == [(0, "a"), (0, "b")]
    assert len(asked) == 3
