import numpy as np
import pytest

from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer
from flax_decoder.generation.text import decode_streams

BYTES = ByteTokenizer()
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 50])


def pieces(tokenizer, tokens, size, stop=()):
    tokens_1T = np.asarray(tokens, np.int32)[None]
    chunks = (tokens_1T[:, start : start + size] for start in range(0, len(tokens), size))
    return [piece for _, piece in decode_streams(tokenizer, chunks, 1, stop)]


@SIZES
def test_no_character_is_split(size):
    text = "aé\N{EURO SIGN}b\N{GRINNING FACE}\N{GRINNING FACE}ü\n"
    assert "".join(pieces(BYTES, BYTES.encode(text), size)) == text
    assert pieces(BYTES, [], size) == []


@SIZES
@pytest.mark.parametrize("seed", range(5))
def test_invalid_bytes_decode_as_in_one_piece(size, seed):
    starts = np.array([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0xFF, 0x41])
    tokens = np.random.default_rng(seed).choice(starts, 60)
    assert "".join(pieces(BYTES, tokens, size)) == BYTES.decode(tokens)


def test_text_comes_as_soon_as_it_is_settled():
    assert pieces(BYTES, BYTES.encode("a\N{GRINNING FACE}bc"), 1) == ["a", "\N{GRINNING FACE}", "b", "c"]
    # A long run of invalid bytes is not held back either.
    assert "".join(pieces(BYTES, [0xFF] * 9, 1)[:-1]) == "\N{REPLACEMENT CHARACTER}" * 6


@SIZES
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two END three END", ["END"], "one two "),
        ("one two three", ["three", "two"], "one "),  # the first in the text, not in the list
        ("so\N{GRINNING FACE}on", ["\N{GRINNING FACE}"], "so"),
        ("EN ENEN and EN", ["END"], "EN ENEN and EN"),  # only begins like a stop text
    ],
)
def test_the_text_ends_before_a_stop_text(size, text, stop, expected):
    assert "".join(pieces(BYTES, BYTES.encode(text), size, stop)) == expected


@SIZES
def test_the_end_token_ends_the_text(size):
    tokenizer = CharTokenizer("abc.")
    tokenizer.end_ids = (99, tokenizer.encode(".")[0])
    for stop, expected in ([], "abca"), (["ca"], "ab"), (["bb"], "abca"):
        assert "".join(pieces(tokenizer, tokenizer.encode("abca.bb.c"), size, stop)) == expected


@SIZES
def test_rows_are_yielded_one_after_the_other(size):
    texts = ["one END and", "two \N{GRINNING FACE} more", "so END then"]
    tokens_BT = np.array([BYTES.encode(text)[:11] for text in texts])
    chunks = [tokens_BT[:, i : i + size] for i in range(0, 11, size)]
    shown = list(decode_streams(BYTES, chunks, 3, stop=["END"]))
    assert [row for row, _ in shown] == sorted(row for row, _ in shown)
    joined = ["".join(piece for row, piece in shown if row == number) for number in range(3)]
    assert joined == ["one ", BYTES.decode(tokens_BT[1]), "so "]
    assert size > 1 or len(shown) > 5  # the first row comes piece by piece


def test_no_more_chunks_are_read_when_all_rows_have_ended():
    chunks = iter(np.array([BYTES.encode("ab.cd"), BYTES.encode(".xyzz")]).T[:, :, None])
    assert list(decode_streams(BYTES, chunks, 2, ["."])) == [(0, "a"), (0, "b")]
    assert len(list(chunks)) == 2
