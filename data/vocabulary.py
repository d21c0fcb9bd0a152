"""The tokenizer's files in a folder that transformers reads or has written: both ways."""

import json
from itertools import pairwise
from pathlib import Path

from data.records import UserError
from data.tensors import read_json
from data.tokenizer import END, PATTERN, build, format_ranks, get_tokenizer

import tiktoken

# What splits text into chunks that no token crosses in GPT-2 and in transformers' GPT2Tokenizer
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PAD = "<|padding_of_scores|>"
FILES = ["tokenizer.json", "vocab.json", "merges.txt"]  # those that we read; and others', to refuse
FILES += ["tokenizer_config.json", "vocab.txt", "vocab.bpe", "*.model", "*.tiktoken", "meta.pkl"]
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHER = [byte for byte in range(256) if byte not in PLAIN]
# These files write every byte as a printable character.
LETTER = {byte: chr(byte) for byte in PLAIN} | {b: chr(256 + i) for i, b in enumerate(OTHER)}
BYTE = {letter: byte for byte, letter in LETTER.items()}


def read_tokenizer(source: Path) -> tiktoken.Encoding | None:
    """The tokenizer in a folder, or beside a file; None where there is no file of a tokenizer.

    Raises UserError for a tokenizer that cannot be a `tiktoken.Encoding` of the same ids.
    """
    folder = source.parent if source.is_file() else source
    found = sorted({path.name for pattern in FILES for path in folder.glob(pattern)})
    if "tokenizer.tiktoken" in found:  # our own, see hugging_face_files
        return get_tokenizer(str(folder / "tokenizer.tiktoken"))
    if not found:
        return None
    path = folder / ("tokenizer.json" if "tokenizer.json" in found else "vocab.json")
    if path.name not in found or (path.name == "vocab.json" and "merges.txt" not in found):
        wrong = f"has a tokenizer ({', '.join(found)}), but not one of GPT-2's kind"
        raise UserError(f"{folder} {wrong}: tokenizer.json, or vocab.json and merges.txt")
    try:
        return parse_tokenizer(path)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise UserError(f"{path} is no tokenizer of GPT-2's kind: {what:.200}") from None


def parse_tokenizer(path: Path) -> tiktoken.Encoding:
    """The tokenizer in tokenizer.json, or in vocab.json and merges.txt; else an error.

    tiktoken joins the pair whose token has the lowest id. So the ids of merged tokens have to be in
    the order of the merges; those of the bytes and of the special tokens may be any.
    """
    saved, config = json.loads(path.read_text("utf-8")), path.with_name("tokenizer_config.json")
    settings = json.loads(config.read_text("utf-8")) if config.exists() else {}
    if path.name == "tokenizer.json":
        check_splits(saved)
        vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
        added = saved.get("added_tokens", [])
    else:
        vocab, lines = saved, path.with_name("merges.txt").read_text("utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        added = settings.get("added_tokens_decoder", {})
        added = [token | {"id": int(i)} for i, token in added.items()]
        older = path.with_name("added_tokens.json")  # which does not tell words from special tokens
        vocab |= json.loads(older.read_text("utf-8")) if older.exists() else {}
    words = [x["content"] for x in added if not x.get("special", True)]
    if words := [word for word in words if word not in vocab]:
        raise UserError(f"its added tokens {words} stand for text; only special ones are supported")
    vocab |= {token["content"]: token["id"] for token in added}
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]

    tokens = dict.fromkeys([*BYTE, *(a + b for a, b in merges)])
    if missing := sum(type(vocab.get(token)) is not int for token in tokens):
        raise UserError(f"{missing} of the 256 bytes and of the merged tokens have no id")
    ranks = {bytes(BYTE[letter] for letter in token): vocab[token] for token in tokens}
    special = {token: i for token, i in vocab.items() if token not in tokens}
    special.setdefault(END, len(vocab))  # as transformers does
    model = path.with_name("config.json")  # whose network may have no rows for added tokens
    rows = read_json(model).get("vocab_size") if model.exists() else None
    if isinstance(rows, int):
        special = {token: i for token, i in special.items() if i < rows or token == END}
    eos = settings.get("eos_token", END)
    if (eos.get("content") if isinstance(eos, dict) else eos) != END:
        raise UserError(f"its end of text is {eos!r}; only {END} is supported")
    if settings.get("add_prefix_space"):
        raise UserError("its add_prefix_space is true; only false is supported")
    encoding = build(path.name, GPT2_PATTERN, ranks, special)
    if merges_of(ranks) != merges:
        raise UserError("its ids are not in the order of its merges")
    return encoding


def check_splits(saved: dict) -> None:
    """Raises UserError unless tokenizer.json splits text as GPT-2 does."""
    if saved["model"]["type"] != "BPE":
        raise UserError(f"it is {saved['model']['type']}; expected BPE")
    if saved.get("normalizer"):
        raise UserError(f"its normalizer is {saved['normalizer']}; expected none")
    splits = saved["pre_tokenizer"] or {}
    plain = not splits.get("add_prefix_space") and splits.get("use_regex", True)
    if splits.get("type") != "ByteLevel" or not plain:
        raise UserError(f"its pre_tokenizer is {splits}; expected GPT-2's ByteLevel")


def hugging_face_files(encoding: tiktoken.Encoding) -> dict[str, str]:
    """The tokenizer as transformers' GPT2Tokenizer reads it, and as `read_tokenizer` does.

    Ids agree on ASCII text; beyond it, our own PATTERN splits words in another way.
    """
    ranks = encoding._mergeable_ranks
    vocab = {spell(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = [" ".join(pair) for pair in merges_of(ranks)]
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END}
    config |= {"unk_token": END} | ({"pad_token": PAD} if PAD in vocab else {})
    config |= {"additional_special_tokens": sorted(encoding.special_tokens_set - {END, PAD})}
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=1),
    }
    if encoding._pat_str == PATTERN:
        files["tokenizer.tiktoken"] = format_ranks(ranks)
    return files


def with_padding(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """The tokenizer with one more special token."""
    special = encoding._special_tokens | {PAD: encoding.n_vocab}
    return build(encoding.name, encoding._pat_str, encoding._mergeable_ranks, special)


def spell(token: bytes) -> str:
    return "".join(LETTER[byte] for byte in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pair that each token is joined from, in order: the last pair when it is encoded."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            if min(pairs) >= rank:
                break  # no encoding arrives at this token
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    return merges
