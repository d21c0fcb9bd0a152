"""Those who rank responses: a simulated labeler with a person's noise, and a person.

The person sees each prompt's responses blind and in random order, and types letters, best first:
"b > a = c". Every answer is on disk before the next question is asked. After every ten questions
one of them comes again in another order: how often somebody agrees with themself is the most that
a reward model can learn from them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from random import Random

from data.records import Row, printable, read_rows, save_records
from data.toy import gold

REPEAT_EVERY = 10
LETTERS = "abcdefghi"  # as many as InstructGPT's K at most; not s, u or q, which are commands
HELP = """Rank the responses: letters from best to worst, = between equals, as in  b > a = c
s: skip, neither good nor bad helps    u: undo the last answer    q: quit, and continue later"""


def rank(
    prompt: str,
    responses: list[str],
    rng: Random,
    noise: float = 1.0,
    tie: float = 0.5,
    score: Callable[[str, str], float] = gold,
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
    """The ranks that "b > a = c" gives to a, b, c: [2, 1, 2]; ">" may be left out.

    Raises ValueError unless each of the k letters occurs once.
    """
    tiers = [t.split("=") for t in re.split(r"[>\s]+", re.sub(r"\s*=\s*", "=", text.strip()))]
    if sorted(letter for tier in tiers for letter in tier) != list(LETTERS[:k]):
        raise ValueError(f"expected each of {', '.join(LETTERS[:k])} once, as in  b > a = c")
    ranks: dict[str, int] = {}
    for tier in tiers:
        ranks |= dict.fromkeys(tier, 1 + len(ranks))
    return [ranks[letter] for letter in LETTERS[:k]]


def refuse_answers(folder: str | Path) -> None:
    """ValueError if somebody has begun to rank in this folder: new questions would void that."""
    path = Path(folder) / "answers.jsonl"
    if path.exists():
        raise ValueError(f"{path} holds answers; --resume continues, another --out starts anew")


class Person:
    """Ranks the items {"prompt", "responses"} at the terminal, from where they last left off.

    `answers.jsonl` in the folder holds an answer a line, in the order they were given; from it
    follows `comparisons.jsonl`, which leaves out what was skipped and the repeated questions.
    """

    def __init__(self, items: list[dict], folder: str | Path, seed: int):
        self.items, self.seed = items, seed
        self.path, self.output = (Path(folder) / f"{n}.jsonl" for n in ("answers", "comparisons"))
        largest = max(len(item["responses"]) for item in items)
        if largest > len(LETTERS):
            raise ValueError(
                f"{largest} responses to a prompt; at most {len(LETTERS)} can be ranked"
            )
        self.answers: list[dict] = []
        for (i, _), row in zip(self.questions(), self._saved(), strict=False):
            ranks, k = row.fields.get("ranks"), len(items[i]["responses"])
            fits = ranks is None or (isinstance(ranks, list) and len(ranks) == k)
            if row.fields.get("item") != i or not fits:
                raise row.error("an answer to another question", "the same run; delete the file")
            self.answers.append({"item": i, "ranks": ranks})

    def _saved(self) -> Iterable[Row]:
        return read_rows(self.path) if self.path.exists() else ()

    def questions(self) -> Iterator[tuple[int, bool]]:
        """The place of each item to rank, and whether it has been asked before."""
        for i in range(len(self.items)):
            yield i, False
            if (i + 1) % REPEAT_EVERY == 0:
                yield i - int(Random(f"{self.seed} {i}").random() * REPEAT_EVERY), True

    def rank_all(self) -> bool:
        """Asks what is not answered yet; False if the person quits before the end."""
        questions = list(self.questions())
        print(HELP)
        while len(self.answers) < len(questions):
            place = len(self.answers)
            item, _ = questions[place]
            command = self.ask(item, place, len(questions))
            if command == "q":
                break
            if command == "u":
                self.answers = self.answers[:-1]
            else:
                self.answers.append({"item": item, "ranks": command})
            self.save()
        self.summary()
        return len(self.answers) == len(questions)

    def ask(self, item: int, place: int, total: int) -> list[int] | str | None:
        """The ranks in the order of the item's responses; None to skip; or "u", or "q"."""
        row = self.items[item]
        order = list(range(len(row["responses"])))
        Random(f"{self.seed} {place}").shuffle(order)
        print(f"\n[{place + 1} of {total}] {printable(row['prompt'])}\n")
        for letter, i in zip(LETTERS, order, strict=False):
            print(f"  {letter}) {printable(row['responses'][i])}")
        while True:
            try:
                text = input("> ").strip().lower()
            except EOFError:
                return "q"
            if text in ("s", "u", "q"):
                return None if text == "s" else text
            try:
                typed = parse_ranking(text, len(order))
            except ValueError as error:
                print(error)
                continue
            return [typed[order.index(i)] for i in range(len(order))]

    def save(self) -> None:
        save_records(self.path, self.answers)
        save_records(self.output, self.comparisons())

    def comparisons(self) -> list[dict]:
        """What was ranked, at the first time of asking."""
        asked = zip(self.answers, self.questions(), strict=False)
        first = [answer for answer, (_, again) in asked if not again and answer["ranks"]]
        return [self.items[answer["item"]] | {"ranks": answer["ranks"]} for answer in first]

    def agreement(self) -> tuple[int, int]:
        """Of the pairs put in order at both times of asking, those put in the same one."""
        same = both = 0
        asked = list(zip(self.answers, self.questions(), strict=False))
        first = {answer["item"]: answer["ranks"] for answer, (_, again) in asked if not again}
        for answer in (answer for answer, (_, again) in asked if again):
            old, new = first[answer["item"]], answer["ranks"]
            for i, j in combinations(range(len(old or [])), 2) if old and new else ():
                if old[i] != old[j] and new[i] != new[j]:
                    both += 1
                    same += (old[i] < old[j]) == (new[i] < new[j])
        return same, both

    def summary(self) -> None:
        ranked, (same, both) = len(self.comparisons()), self.agreement()
        skipped = sum(answer["ranks"] is None for answer in self.answers)
        print(f"\n{ranked} of {len(self.items)} ranked, {skipped} skipped, in {self.output}")
        if both:
            print(f"asked again, you put {same} of {both} pairs in the same order")
