"""Tokenizers, always a `tiktoken.Encoding`: that of GPT-2, or a small one for the toy world.

    python -m data.tokenizer                                       # trains data/toy.tiktoken anew
    python -m data.tokenizer mine.jsonl mine.tiktoken --vocab_size 4096   # one for your own texts

Encode text with `encode_ordinary`: it spells out a literal "<|endoftext|>", which therefore never
becomes the control token `encoding.eot_token`.
"""

import argparse
import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import tiktoken

TOY = Path(__file__).with_name("toy.tiktoken")
# Chunks of text that no token crosses: GPT-2's, but for ASCII letters only, which re can spell too.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2" or "toy", or one with the ranks in a `.tiktoken` file."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:  # includes every exception of requests, with which tiktoken loads
            raise FileNotFoundError(
                f"GPT-2's vocabulary cannot be loaded ({type(error).__name__}); without a network, "
                "set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it before"
            ) from error
    path = TOY if name == "toy" else Path(name)
    if path.suffix != ".tiktoken":
        raise ValueError(f"tokenizer {name!r}; expected gpt2, toy or the path of a .tiktoken file")
    try:
        return build(path.name, PATTERN, parse_ranks(path.read_text("ascii")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_state(encoding: tiktoken.Encoding) -> dict[str, str]:
    """Everything `from_state` needs to rebuild the tokenizer, as text for a checkpoint."""
    if encoding.name == "gpt2":
        return {"name": "gpt2"}
    ranks = format_ranks(encoding._mergeable_ranks)  # underscored, yet tiktoken's README uses both
    return {"name": encoding.name, "pattern": encoding._pat_str, "ranks": ranks}


def from_state(state: dict[str, str]) -> tiktoken.Encoding:
    """The tokenizer that `to_state` wrote down."""
    if state["name"] == "gpt2":
        return get_tokenizer("gpt2")
    if not {"pattern", "ranks"} <= state.keys():
        raise ValueError(f"the tokenizer {state['name']!r} lacks its pattern or its ranks")
    return build(state["name"], state["pattern"], parse_ranks(state["ranks"]))


def build(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """A tokenizer with these ranks and, after them, the end-of-text token."""
    special_tokens = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
    )


def format_ranks(ranks: dict[bytes, int]) -> str:
    """The text of a `.tiktoken` file: a line per token, its bytes in base64 and its rank."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def parse_ranks(text: str) -> dict[bytes, int]:
    """The ranks in the text of a `.tiktoken` file, checked, since tiktoken panics on wrong ones."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number} is {line[:40]!r}; expected base64 and rank") from None
    if missing := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{missing} of the 256 single bytes have no rank")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("a rank is missing or occurs twice; expected 0, 1, 2, ... once each")
    return ranks


def hugging_face_files(encoding: tiktoken.Encoding) -> dict[str, str]:
    """The tokenizer as transformers' GPT2Tokenizer reads it, and as `get_tokenizer` does.

    These files write every byte as a printable character; a merge is the last pair that becomes the
    token. Ids agree on ASCII text; beyond it, our own pattern splits words in another way.
    """
    ranks = encoding._mergeable_ranks
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    letter = {byte: chr(byte) for byte in plain} | {b: chr(256 + i) for i, b in enumerate(other)}

    def spell(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spell, parts)))
    vocab = {spell(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    eos, config = "<|endoftext|>", {"tokenizer_class": "GPT2Tokenizer"}
    config |= {"bos_token": eos, "eos_token": eos, "unk_token": eos}
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=1),
    } | ({} if encoding.name == "gpt2" else {"tokenizer.tiktoken": format_ranks(ranks)})


def train_bpe(text: str, vocab_size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """The ranks that byte-pair encoding learns: the most frequent pair becomes a token, repeatedly.

    (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes, as in GPT-2.)
    """
    counts = Counter(re.findall(pattern, text))
    chunks = [([bytes([byte]) for byte in chunk.encode()], n) for chunk, n in counts.items()]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for tokens, n in chunks:
            for pair in pairwise(tokens):
                pairs[pair] += n
        if not pairs:
            raise ValueError(f"this text yields {len(ranks)} tokens, fewer than {vocab_size}")
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # the pair itself decides ties
        ranks[b"".join(best)] = len(ranks)
        for tokens, _ in chunks:
            merge(tokens, best)
    return ranks


def merge(tokens: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Joins the pair wherever it occurs, from the left."""
    i = 0
    while i + 1 < len(tokens):
        if (tokens[i], tokens[i + 1]) == pair:
            tokens[i : i + 2] = [b"".join(pair)]
        i += 1


def main(argv: Sequence[str] | None = None) -> None:
    from data.records import load_texts, one_line_errors, write_atomically
    from data.toy import pages  # here, since a tokenizer needs no toy world to be used

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("texts", nargs="?", help="a .txt file, a folder of them, or JSON Lines")
    parser.add_argument("out", nargs="?", type=Path, default=TOY, help=".tiktoken file to write")
    parser.add_argument("--vocab_size", type=int, default=1024, help="tokens, with the 256 bytes")
    args = parser.parse_args(argv)
    with one_line_errors():
        text = "\n".join(load_texts(args.texts) if args.texts else pages(4000, seed=0))
        ranks = train_bpe(text, args.vocab_size)
        write_atomically(args.out, lambda file: file.write(format_ranks(ranks).encode("ascii")))
        length = len(get_tokenizer(str(args.out)).encode_ordinary(text))
    print(f"wrote {args.out.name}: {len(ranks):,} ranks, {len(text) / length:.2f} characters each")


if __name__ == "__main__":
    main()
