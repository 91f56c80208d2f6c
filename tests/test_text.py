import numpy as np
import pytest

from flax_decoder.data.tokenizer import ByteTokenizer, CharTokenizer, SubwordTokenizer, make_tokenizer
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
    assert pieces(BYTES, BYTES.encode("one END or END"), 1, ["ENDS"])[:4] == ["o", "n", "e", " "]
    assert pieces(BYTES, BYTES.encode("axEND"), 1, ["xy", "END"]) == ["a", "x"]


# --- All kinds of tokenizers ---


def sentencepiece(kind):
    """Words with a mark before them, and tokens for bytes; as in Llama 2 the decoder strips the first space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = ["\u2581", "\u2581one", "\u2581two", "o", "n", "e", "\u2581saw", ".", ",", "END", "E", "N", "D"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    if kind == "bpe":
        vocab = {name: id for id, name in enumerate(names)}
        model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    else:
        model = models.Unigram([(name, -float(id > 256)) for id, name in enumerate(names)], 0, True)
    tokenizer = Tokenizer(model)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    if kind == "bpe":
        mark = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(mark)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return SubwordTokenizer(tokenizer)


def wordpiece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["[UNK]", "one", "two", "##s", ".", ",", "saw", "o", "##n", "##e"]
    tokenizer = Tokenizer(models.WordPiece({name: id for id, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=True)
    return SubwordTokenizer(tokenizer)


TEXT = "one two. \N{T-REX}\N{DNA DOUBLE HELIX} saw,\n \u9f98\u9750 END\U0001f1eb\U0001f1f7\ufffd é one"
KINDS = {
    "char": lambda: CharTokenizer(TEXT),
    "byte": lambda: BYTES,
    "byte-level": lambda: make_tokenizer("bpe", TEXT * 3, 270),
    "byte fallback": lambda: sentencepiece("bpe"),
    "unigram": lambda: sentencepiece("unigram"),
    "wordpiece": wordpiece,
}


@pytest.mark.short("byte-level", "byte fallback")
@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_text_of_all_tokens(kind):
    """For every length of the tokens, every cut of them in two, one by one, and with a prompt before them."""
    tokenizer = KINDS[kind]()
    texts = [tokenizer.encode(TEXT), np.random.default_rng(0).integers(0, tokenizer.vocab_size, 60).tolist()]
    texts += [tokenizer.encode("\N{T-REX}\N{DNA DOUBLE HELIX}")] if kind not in ("char", "wordpiece") else []
    for tokens in texts:
        for end in range(1, len(tokens) + 1, 1 + len(tokens) // 25):
            ids, expected = np.array(tokens[:end]), tokenizer.decode(tokens[:end])
            assert "".join(pieces(tokenizer, ids, 1)) == expected
            for cut in range(1, end, 1 + end // 5):
                chunks = [ids[None, :cut], ids[None, cut:]]
                assert "".join(piece for _, piece in decode_streams(tokenizer, chunks, 1)) == expected


@pytest.mark.parametrize("kind", ["byte fallback", "unigram", "wordpiece"])
def test_the_space_before_the_first_word_is_kept(kind):
    tokenizer = KINDS[kind]()
    tokens = tokenizer.encode("one saw two one.")
    for cut in range(1, len(tokens)):
        prompt, new = tokens[:cut], np.array([tokens[cut:]])
        written = "".join(piece for _, piece in decode_streams(tokenizer, [new], 1, (), prompt))
        assert tokenizer.decode(prompt) + written == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_the_beginning_of_a_stop_text_of_many_bytes_is_not_shown(kind):
    tokenizer = KINDS[kind]()
    for text, stop in (("one.\n\N{T-REX} two", "\n\N{T-REX}"), ("one \u9f98\u9750 two", "\u9f98\u9750")):
        for size in (1, 2, 3, 50):
            assert "".join(pieces(tokenizer, tokenizer.encode(text), size, [stop])) == text.split(stop)[0]


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
