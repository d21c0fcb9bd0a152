"""Those who rank responses: a simulated labeler with a person's noise, and a person.

The person sees the responses to each prompt blind and in random order, and types letters, best
first: "b > a = c". Every answer is on disk before the next question is asked. After every ten
questions one of them comes again in another order: a reward model cannot learn more from people
than how often they agree with themselves.
"""

import math
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from random import Random

from data import records
from data.records import UserError, load_comparisons, pair_accuracy, printable, save_records
from data.toy import gold

REPEAT_EVERY = 10
LETTERS = "abcdefghi"  # as many as InstructGPT's K at most; not s, u or q, which are commands
HELP = """Rank the responses: letters from best to worst, = between equals:  b > a = c  or  ba=c
s: skip, neither good nor bad helps    u: undo the last answer    q: quit, and continue later"""


def rank(
    prompt: str, responses: list[str], rng: Random, noise: float = 1.0, tie: float = 0.5, score=gold
) -> list[int]:
    """The rank of each response, 1 = best, equal = tied, by noisy utility u = score + noise · g.

    The g are independent Gumbel variables. The difference of two is logistic, so that pairs follow
    the Bradley-Terry model (1952) and whole rankings that of Plackett and Luce (Yellott 1977):

        P(a above b) = P(u(a) > u(b)) = sigmoid((score(a) - score(b)) / noise)    if tie = 0

    What is compared is u in whole steps of `tie`, like marks on a scale: the same mark is a tie, so
    ties are transitive. Identical texts share one mark.
    """
    marks: dict[str, float] = {}
    for text in dict.fromkeys(responses):
        gumbel = -math.log(-math.log(rng.random() or 0.5))  # log(0), one draw in 2^53, is avoided
        utility = score(prompt, text) + noise * gumbel
        marks[text] = utility // tie if tie else utility
    return [1 + sum(marks[other] > marks[text] for other in responses) for text in responses]


def parse_ranking(text: str, k: int) -> list[int]:
    """The ranks that "b > a = c" gives to a, b, c: [2, 1, 2]; blanks and ">" may be left out."""
    typed = re.sub(r"\s*([>=]?)\s*", r"\1", text.strip())
    letters = re.sub("[>=]", "", typed)
    if not re.fullmatch(r"\w([>=]?\w)*", typed) or sorted(letters) != list(LETTERS[:k]):
        expected = f"each of {', '.join(LETTERS[:k])} once"
        raise UserError(f"expected {expected}, best first, as in  b > a = c  or  bac")
    ranks: dict[str, int] = {}
    for tier in re.findall(r"\w(?:=\w)*", typed.replace(">", "")):
        ranks |= dict.fromkeys(tier.split("="), 1 + len(ranks))
    return [ranks[letter] for letter in LETTERS[:k]]


def hanging(lead: str, text: str) -> str:
    """The text wrapped at words to the terminal's width, each line indented as far as `lead`."""
    width, indent = max(shutil.get_terminal_size().columns, 40), " " * len(lead.strip("\n"))
    wrapper = textwrap.TextWrapper(width, initial_indent=indent, subsequent_indent=indent)
    lines = map(wrapper.fill, printable(text).split("\n"))
    return lead + "\n".join(lines).removeprefix(indent)


def saved_answers(folder: str | Path) -> list[records.Row]:
    path = Path(folder) / "answers.jsonl"
    return list(records.read_rows(path)) if path.exists() and path.stat().st_size else []


def check_no_answers(folder: str | Path) -> None:
    """Refuses a folder in which somebody has begun to rank: new questions would void that."""
    if answers := saved_answers(folder):
        path = answers[0].path
        raise UserError(f"{path} holds answers; --resume continues, another --out starts anew")


def check_number(k: int) -> None:
    """UserError if a person cannot rank k responses."""
    if k > len(LETTERS):
        raise UserError(f"{k} responses to a prompt; at most {len(LETTERS)} can be ranked")


class Person:
    """Ranks the items {"prompt", "responses"} at the terminal, from where they last left off.

    `answers.jsonl` in the folder holds an answer a line, in the order they were given; from it
    follows `comparisons.jsonl`, which leaves out what was skipped and the repeated questions.
    """

    def __init__(self, items: list[dict], folder: str | Path, seed: int):
        self.items, self.folder, self.seed = items, Path(folder), seed
        self.output = self.folder / "comparisons.jsonl"
        check_number(max(len(item["responses"]) for item in items))
        self.questions = []  # (which item to rank, whether once more)
        for i in range(len(items)):
            self.questions.append((i, False))
            if (i + 1) % REPEAT_EVERY == 0:
                back = int(Random(f"{seed} {i}").random() * REPEAT_EVERY)
                self.questions.append((i - back, True))
        self.answers: list[dict] = []
        for (i, _), row in zip(self.questions, saved_answers(folder), strict=False):
            ranks, k = row.fields.get("ranks"), len(items[i]["responses"])
            fits = ranks is None or (isinstance(ranks, list) and len(ranks) == k)
            if row.fields.get("item") != i or not fits:
                raise row.error("an answer to another question", "the same run; delete the file")
            self.answers.append({"item": i, "ranks": ranks})

    def rank_all(self) -> bool:
        """Asks what is not answered yet; False if the person quits before the end."""
        print(HELP)
        while (place := len(self.answers)) < len(self.questions):
            item, _ = self.questions[place]
            command = self.ask(item, place, len(self.questions))
            if command == "q":
                break
            if command == "u":
                self.answers = self.answers[:-1]
            else:
                self.answers.append({"item": item, "ranks": command})
            save_records(self.folder / "answers.jsonl", self.answers)
            save_records(self.output, self.comparisons())
        ranked, (same, both) = len(self.comparisons()), self.agreement()
        skipped = sum(answer["ranks"] is None for answer in self.answers)
        print(f"\n{ranked} of {len(self.items)} ranked, {skipped} skipped, in {self.output}")
        if both:
            print(f"asked again, you put {same} of {both} pairs in the same order")
        return len(self.answers) == len(self.questions)

    def ask(self, item: int, place: int, total: int) -> list[int] | str | None:
        """The ranks in the order of the item's responses; None to skip; or "u", or "q"."""
        row = self.items[item]
        order = list(range(len(row["responses"])))
        Random(f"{self.seed} {place}").shuffle(order)
        print(hanging(f"\n[{place + 1} of {total}] ", row["prompt"]) + "\n")
        for letter, i in zip(LETTERS, order, strict=False):
            print(hanging(f"  {letter}) ", row["responses"][i]))
        while True:
            try:
                text = input("> ").strip().lower()
                if text in ("s", "u", "q"):
                    return None if text == "s" else text
                typed = parse_ranking(text, len(order))
                return [typed[order.index(i)] for i in range(len(order))]
            except EOFError:
                return "q"
            except UserError as error:
                print(error)

    def answered(self, again: bool) -> dict[int, list[int]]:
        """The ranks given to each item when it was first asked, or when it was asked again."""
        asked = zip(self.answers, self.questions, strict=False)
        return {a["item"]: a["ranks"] for a, (_, was) in asked if was == again and a["ranks"]}

    def comparisons(self) -> list[dict]:
        """What was ranked when it was first asked."""
        return [self.items[i] | {"ranks": ranks} for i, ranks in self.answered(again=False).items()]

    def agreement(self) -> tuple[int, int]:
        """(same, both): of the pairs put in order both times, how many in the same, and all."""
        first, again = self.answered(again=False), self.answered(again=True)
        twice = [item for item in again if item in first]
        scores = [[-rank for rank in first[item]] for item in twice]  # the best rank is 1
        share, _, both = pair_accuracy(scores, [again[item] for item in twice])
        return round(share * both), both


def rank_by_hand(sample: Callable[[], list[dict]], folder: str | Path, seed: int) -> None:
    """A person ranks the items of sample(); quitting before the last one ends the program.

    The items stay in responses.jsonl, since who resumes must be asked about the same ones.
    """
    path = Path(folder) / "responses.jsonl"
    if not path.exists():
        save_records(path, sample())
    person = Person(load_comparisons(path), folder, seed)
    if not person.rank_all():
        trains = f"; or --labeler file --comparisons {person.output} --out NEW trains now"
        print("--resume continues" + (trains if person.comparisons() else ""))
        raise SystemExit(0)
