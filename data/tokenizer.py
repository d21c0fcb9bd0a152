"""Text to tokens and back: tokenizers, always a `tiktoken.Encoding`, and the prompt's template.

    python -m data.tokenizer                                       # trains data/toy.tiktoken anew
    python -m data.tokenizer mine.jsonl mine.tiktoken --vocab_size 4096   # one for your own texts

Encode text with `encode_ordinary`: it spells out a literal "<|endoftext|>", which therefore never
becomes the control token `encoding.eot_token`.
"""

import argparse
import base64
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from data.records import UserError, atomic, load_texts, one_line_errors

import tiktoken

Pair = tuple[list[int], list[int]]  # tokens of a prompt and of its response
Pairs = list[Pair]
TOY = Path(__file__).with_name("toy.tiktoken")
END = "<|endoftext|>"
# Chunks of text that no token crosses: GPT-2's, but for ASCII letters only, which re can spell too.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"


@dataclass
class Codec:
    """Text to tokens and back: a tokenizer, and the template that a prompt is put into."""

    tokenizer: tiktoken.Encoding
    template: str

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise UserError(f"the template {self.template!r} has no place for the {{prompt}}")
        self.template = self.template.replace("\\n", "\n")  # as it is typed in a shell
        self.eos = self.tokenizer.eot_token

    def prompt(self, text: str, room: int | None = None) -> list[int]:
        """The prompt in its template, cut from the left to the last `room` tokens."""
        tokens = self.tokenizer.encode_ordinary(self.template.replace("{prompt}", text))
        return tokens if room is None else cut_left(tokens, room)

    def response(self, text: str) -> list[int]:
        """The response and the end-of-text token."""
        return [*self.tokenizer.encode_ordinary(text), self.eos]

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode([t for t in tokens if t != self.eos])

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError unless a model of this vocabulary can read the tokens."""
        if (n := self.tokenizer.n_vocab) != vocab_size:
            own = f"the tokenizer has {n} tokens and the model has {vocab_size}"
            raise UserError(f"{own}; they belong to different models")

    def check_same(self, folder: str | Path) -> None:
        """Raises UserError unless the tokens of the model in the folder are these."""
        ours, theirs = self.tokenizer, Codec.load(folder).tokenizer
        if (ours.n_vocab, ours._mergeable_ranks) != (theirs.n_vocab, theirs._mergeable_ranks):
            raise UserError(
                f"{folder} has another tokenizer than the fine-tuned model; name another"
            )

    def state_dict(self) -> dict:
        return {"tokenizer": to_state(self.tokenizer), "template": self.template}

    @classmethod
    def load(cls, source: str | Path, template: str = "{prompt}") -> "Codec":
        """The codec of a stage's folder; of another model, its tokenizer, and this template."""
        from data.run import load_checkpoint  # here, since these files import this one
        from data.weights import is_hugging_face, tokenizer_of

        if is_hugging_face(source):
            return cls(tokenizer_of(source), template)
        state = load_checkpoint(source)["codec"]
        return cls(from_state(state["tokenizer"]), state["template"])


def cut_left(tokens: list[int], room: int) -> list[int]:
    """The last `room` tokens. UserError if there is no room at all."""
    if room < 1:
        wrong = f"the context is {1 - room} tokens too small for a prompt and its response"
        raise UserError(f"{wrong}; take a larger --block_size or fewer --max_new_tokens")
    return tokens[-room:]


def documents(texts: list[str], codec: Codec, block_size: int) -> Pairs:
    """Documents in pieces of at most block_size tokens; a piece begins with the last one's end."""
    pairs = []
    for text in texts:
        tokens = codec.response(text)
        for i in range(0, len(tokens) - 1, block_size - 1):
            pairs.append((tokens[i : i + 1], tokens[i + 1 : i + block_size]))
    return pairs


def fitting(records: list[dict], codec: Codec, block_size: int) -> list[tuple[dict, Pairs]]:
    """The records whose responses fit into the context, each with its (prompt, response) pairs.

    All responses of a record follow the same prompt, cut from the left to fit the longest one.
    """
    found = []
    for record in records:
        texts = record["responses"] if "responses" in record else [record["response"]]
        responses = [codec.response(text) for text in texts]
        room = block_size - max(map(len, responses))
        if room > 0:
            prompt = codec.prompt(record["prompt"], room)
            found.append((record, [(prompt, response) for response in responses]))
    if len(found) < len(records):
        print(f"{len(records) - len(found)} records longer than the context are left out")
    return found


def columns(pairs: Sequence[Pair]) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts and the responses."""
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def get_tokenizer(name: str) -> tiktoken.Encoding:
    """The tokenizer "gpt2", "toy", or that of a `.tiktoken` file."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:  # includes every exception of requests, with which tiktoken loads
            wrong = f"GPT-2's vocabulary cannot be loaded ({type(error).__name__})"
            remedy = "set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it before"
            raise FileNotFoundError(f"{wrong}; without a network, {remedy}") from error
    path = {"toy": TOY}.get(name, Path(name))
    if path.suffix != ".tiktoken":
        raise UserError(f"tokenizer {name!r}; expected gpt2, toy or the path of a .tiktoken file")
    try:
        return build(path.name, PATTERN, parse_ranks(path.read_text("ascii")))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def to_state(encoding: tiktoken.Encoding) -> dict[str, str]:
    """Everything `from_state` needs to rebuild the tokenizer, as text for a checkpoint."""
    if encoding.name == "gpt2":
        return {"name": "gpt2"}
    return {
        "name": encoding.name,
        "pattern": encoding._pat_str,  # underscored, yet tiktoken's README uses all three
        "ranks": format_ranks(encoding._mergeable_ranks),
        "special": format_ranks({k.encode(): v for k, v in encoding._special_tokens.items()}),
    }


def from_state(state: dict[str, str]) -> tiktoken.Encoding:
    """The tokenizer that `to_state` wrote down."""
    if state.get("name") == "gpt2":
        return get_tokenizer("gpt2")
    if not {"name", "pattern", "ranks", "special"} <= state.keys():
        raise UserError(f"the tokenizer {state.get('name')!r} lacks its pattern or its ranks")
    special = {k.decode("utf-8", "replace"): i for k, i in parse_ranks(state["special"]).items()}
    return build(state["name"], state["pattern"], parse_ranks(state["ranks"]), special)


def build(
    name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int] | None = None
) -> tiktoken.Encoding:
    """A tokenizer; unless others are given, its only special token is end of text, the last one.

    Ranks and special tokens are checked, since tiktoken panics on wrong ones.
    """
    special = {END: len(ranks)} if special is None else special
    if missing := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{missing} of the 256 single bytes have no rank")
    ids = [*ranks.values(), *special.values()]
    if END not in special or sorted(ids) != list(range(len(ids))):
        raise UserError("a rank is missing or occurs twice; expected 0, 1, 2, ... once each")
    tokens = {"mergeable_ranks": ranks, "special_tokens": special}
    try:
        return tiktoken.Encoding(name, pat_str=pattern, **tokens)
    except ValueError as error:
        what = " ".join(str(error).split())
        raise UserError(f"the tokenizer {name!r} has an invalid pattern: {what}") from None


def format_ranks(ranks: dict[bytes, int]) -> str:
    """The text of a `.tiktoken` file: a line per token, its bytes in base64 and its rank."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def parse_ranks(text: str) -> dict[bytes, int]:
    """The ranks in the text of a `.tiktoken` file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"line {number} is {line[:40]!r}; expected base64 and rank") from None
    return ranks


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
            raise UserError(f"this text yields {len(ranks)} tokens, fewer than {vocab_size}")
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
    from data.toy import pages  # here, since a tokenizer needs no toy world to be used

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("texts", nargs="?", help="a .txt file, a folder of them, or JSON Lines")
    parser.add_argument("out", nargs="?", type=Path, default=TOY, help=".tiktoken file to write")
    parser.add_argument("--vocab_size", type=int, default=1024, help="tokens, with the 256 bytes")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.out.suffix != ".tiktoken" or (args.texts and args.out == TOY):
            raise UserError("name a file to write after the texts; its name ends in .tiktoken")
        text = "\n".join(load_texts(args.texts) if args.texts else pages(4000, seed=0))
        ranks = train_bpe(text, args.vocab_size)
        with atomic(args.out) as file:
            file.write(format_ranks(ranks).encode("ascii"))
        length = len(get_tokenizer(str(args.out)).encode_ordinary(text))
    print(f"wrote {args.out.name}: {len(ranks):,} ranks, {len(text) / length:.2f} characters each")


if __name__ == "__main__":
    main()
