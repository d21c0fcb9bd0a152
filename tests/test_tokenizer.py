"""Tokenizers: the shipped one can be trained again, texts and states survive, bad files do not."""

import base64
import json
import re
from pathlib import Path

from data import tokenizer, toy
from data.records import UserError
from data.tokenizer import (
    END,
    PATTERN,
    TOY,
    Codec,
    build,
    documents,
    from_state,
    get_tokenizer,
    to_state,
    train_bpe,
)
from data.vocabulary import merges_of

import pytest
import requests
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

SHARED = Path(__file__).parents[2] / "shared/data"
ENCODING = get_tokenizer("toy")


def test_training_again_gives_the_shipped_file(tmp_path, monkeypatch, capsys):
    shipped = TOY.read_bytes()
    monkeypatch.setattr(tokenizer, "TOY", tmp_path / "toy.tiktoken")
    tokenizer.main([])
    assert (tmp_path / "toy.tiktoken").read_bytes() == shipped
    assert "1,024 ranks" in capsys.readouterr().out


def test_a_tokenizer_for_ones_own_texts(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("so und so und so\n" * 3)
    tokenizer.main([f"{tmp_path}/mine.txt", f"{tmp_path}/mine.tiktoken", "--vocab_size", "258"])
    assert get_tokenizer(f"{tmp_path}/mine.tiktoken").n_vocab == 259  # and end of text
    with pytest.raises(SystemExit):
        tokenizer.main([f"{tmp_path}/mine.txt", f"{tmp_path}/x.tiktoken", "--vocab_size", "9999"])
    assert "fewer than 9999" in capsys.readouterr().err and not (tmp_path / "x.tiktoken").exists()


def test_bpe_by_hand():
    # "aaab" thrice and "ab" once, in chunks of letters: the pair aa occurs 6 times, ab 4. After aa
    # is joined from the left, "aaab" is aa + a + b, and a + b occurs 4 times, aa + a 3 times.
    ranks = train_bpe("aaab\naaab\naaab\nab", 259, r"[a-z]+")
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    assert list(ranks.values()) == list(range(259))
    assert list(train_bpe("ba ab", 257, r"[a-z]+"))[256:] == [b"ba"]  # a tie: the greater pair
    with pytest.raises(ValueError, match="yields 259 tokens, fewer than 300"):
        train_bpe("aaab\naaab\naaab\nab", 300, r"[a-z]+")


def test_vocabulary():
    assert ENCODING.n_vocab == 1025 and ENCODING.eot_token == 1024
    for word in [*toy.SUBJECTS, *toy.ALL_MOODS]:
        assert len(ENCODING.encode_ordinary(f" {word}")) == 1, word
    text = "\n".join(toy.pages(500, seed=9))
    assert len(text) / len(ENCODING.encode_ordinary(text)) > 4  # characters a token


@given(st.text())
@example("I don't, it's we'll they've")
@example(" \n\n\t é 中文 \x1c 🙂\u2028")
def test_every_text_survives(text):
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text


@given(st.text(st.characters(codec="ascii", exclude_characters="\x1c\x1d\x1e\x1f")))
@example("Don't  panic!!  It's 42\n\n\n ok ")
def test_python_cuts_text_where_tiktoken_does(text):
    # (but for four control characters that only Python takes for white space)
    chunks = re.findall(PATTERN, text)
    assert "".join(chunks) == text
    assert ENCODING.encode_ordinary(text) == [
        token for chunk in chunks for token in ENCODING.encode_ordinary(chunk)
    ]


def test_a_literal_end_of_text_is_ordinary_text():
    tokens = ENCODING.encode_ordinary("The end.<|endoftext|>")
    assert ENCODING.eot_token not in tokens
    assert ENCODING.decode(tokens) == "The end.<|endoftext|>"
    assert ENCODING.decode([ENCODING.eot_token]) == "<|endoftext|>"


def test_state_rebuilds_the_tokenizer():
    state = json.loads(json.dumps(to_state(ENCODING)))  # plain text only
    assert all(type(value) is str for value in state.values())
    rebuilt = from_state(state)
    page = toy.pages(1, 0)[0] + " naïve 🙂 don't"
    assert rebuilt.encode_ordinary(page) == ENCODING.encode_ordinary(page)
    assert (rebuilt.n_vocab, rebuilt.eot_token) == (ENCODING.n_vocab, ENCODING.eot_token)
    assert to_state(rebuilt) == to_state(ENCODING)


def test_a_state_keeps_special_tokens():
    ranks = {token: rank + 2 for token, rank in train_bpe("low lower lowest", 260).items()}
    encoding = build("mine", PATTERN, ranks, {"<pad>": 0, END: 1})
    rebuilt = from_state(to_state(encoding))
    assert (rebuilt.n_vocab, rebuilt.eot_token, rebuilt.decode([0])) == (262, 1, "<pad>")
    assert rebuilt.encode_ordinary("lower<pad>") == encoding.encode_ordinary("lower<pad>")
    assert 0 not in rebuilt.encode_ordinary("lower<pad>")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"special": ""}, "a rank is missing or occurs twice"),
        ({"special": "YQ== 1024\n"}, "a rank is missing or occurs twice"),
        ({"special": "/w== 1024\n"}, "a rank is missing or occurs twice"),
        ({"ranks": "YQ== 0\n"}, "255 of the 256 single bytes have no rank"),
        ({"pattern": "(\n"}, "has an invalid pattern"),
        ({"pattern": None}, "lacks its pattern or its ranks"),
    ],
)
def test_a_malformed_state_is_refused_in_one_line(change, complaint):
    state = {name: text for name, text in (to_state(ENCODING) | change).items() if text is not None}
    with pytest.raises(UserError, match=complaint) as caught:
        from_state(state)
    assert "\n" not in str(caught.value)


def test_a_token_that_no_encoding_reaches_has_no_merge():
    ranks = {bytes([byte]): byte for byte in range(256)}
    assert merges_of(ranks | {b"ab": 256, b"abc": 257}) == [("a", "b"), ("ab", "c")]
    assert merges_of(ranks | {b"abc": 256}) == []  # neither "ab" nor "bc" is a token
    assert merges_of(ranks | {b"abc": 256, b"bc": 257}) == [("b", "c")]  # "bc" comes too late


def test_a_prompt_is_cut_from_the_left_to_its_room():
    codec = Codec(ENCODING, "Q: {prompt}\\nA:")
    tokens = codec.prompt("Who is it?")
    assert codec.text(tokens) == "Q: Who is it?\nA:"
    for room in (1, 3, len(tokens), 99):
        assert codec.prompt("Who is it?", room) == tokens[-room:]
    for room in (0, -4):
        with pytest.raises(UserError, match=f"the context is {1 - room} tokens too small for"):
            codec.prompt("Who is it?", room)


def test_a_template_needs_a_place_for_the_prompt():
    with pytest.raises(UserError, match="has no place for the {prompt}"):
        Codec(ENCODING, "Q: A:")


def test_a_model_of_another_vocabulary_is_refused():
    codec = Codec(ENCODING, "{prompt}")
    codec.check_vocabulary(1025)
    with pytest.raises(UserError, match="the tokenizer has 1025 tokens and the model has 1024"):
        codec.check_vocabulary(1024)


def test_documents_are_cut_into_pieces_that_overlap_by_one_token():
    codec = Codec(ENCODING, "{prompt}")
    text = toy.pages(1, 0)[0]
    tokens = codec.response(text)
    pairs = documents([text, "Oh."], codec, block_size=16)
    assert all(len(first) == 1 and 0 < len(rest) < 16 for first, rest in pairs)
    pieces = [first + rest for first, rest in pairs]
    n = len(documents([text], codec, block_size=16))
    assert tokens == tokens[:1] + [token for piece in pieces[:n] for token in piece[1:]]
    assert pieces[n] == codec.response("Oh.")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "gpt2.tiktoken"  # a file of this name is not GPT-2
    path.write_text(tokenizer.format_ranks(train_bpe("low lower lowest", 260)))
    encoding = from_state(to_state(get_tokenizer(str(path))))
    assert encoding.n_vocab == 261
    assert encoding.encode_ordinary("low") == [tokenizer.parse_ranks(path.read_text())[b"low"]]


BYTES = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "256 of the 256 single bytes have no rank"),
        (BYTES[:-9].encode(), "1 of the 256 single bytes have no rank"),
        (b"YQ==\n", "line 1 is 'YQ=='; expected base64 and rank"),
        (b"YQ== 0\nYg== one\n", "line 2 is 'Yg== one'"),
        (b"YQ== 0\n\nYg== 1\n", "line 2 is ''"),
        (b"Y?Q== 0\n", r"line 1 is 'Y\?Q== 0'"),
        (f"{BYTES}YWE= 255\n".encode(), "a rank is missing or occurs twice"),
        (f"{BYTES}YWE= 257\n".encode(), "a rank is missing or occurs twice"),
        (f"{BYTES}YQ== 256\n".encode(), "a rank is missing or occurs twice"),
        (f"{BYTES}YWE= -1\n".encode(), "a rank is missing or occurs twice"),
        (b"\xff\xfe\x00", "ascii"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        get_tokenizer(str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'gtp2'; expected gpt2, toy or the path"):
        get_tokenizer("gtp2")
    with pytest.raises(FileNotFoundError):
        get_tokenizer(str(tmp_path / "absent.tiktoken"))


def test_without_network_gpt2_says_what_to_do(monkeypatch):
    def offline(name: str) -> tiktoken.Encoding:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(FileNotFoundError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


@pytest.fixture
def gpt2(monkeypatch) -> tiktoken.Encoding:
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("no offline copy of GPT-2's vocabulary in ../shared/data/tiktoken_cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    return get_tokenizer("gpt2")


def test_gpt2_gives_known_tokens(gpt2):
    tokens = gpt2.encode_ordinary("Hello, I'm a language model,")
    assert tokens == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert to_state(gpt2) == {"name": "gpt2"} and from_state({"name": "gpt2"}) is gpt2


def test_gpt2_gives_nanogpts_counts_for_shakespeare(gpt2):
    text = (SHARED / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    counts = [len(gpt2.encode_ordinary(part)) for part in (text[:cut], text[cut:])]
    assert counts == [301_966, 36_059]


@pytest.mark.parametrize("out", [[], ["b.txt"]])
def test_a_tokenizer_is_written_only_where_it_is_meant_to_be(out, tmp_path, monkeypatch, capsys):
    """Not over the one that is shipped, or over a second file of text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("mine")
    shipped = tokenizer.TOY.read_bytes()
    with pytest.raises(SystemExit) as ended:
        tokenizer.main(["a.txt", *out])
    assert ended.value.code == 2 and "its name ends in .tiktoken" in capsys.readouterr().err
    assert tokenizer.TOY.read_bytes() == shipped and (tmp_path / "b.txt").read_text() == "mine"
