"""What is printed and written about models: their comparison, and the report of a reward model."""

import itertools
import math
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from data import labeler
from data.folders import lock
from data.records import atomic, printable, strict_json

import torch

# the columns of the comparison, and their titles in the printed table
TITLES = {"gold": "rubric", "win_rate": "win rate", "human_win_rate": "by hand", "score": "score"}
TITLES |= {"kl": "KL", "length": "length", "eos_rate": "ends", "repetition": "repeats"}
TITLES |= {"pretraining_loss": "LM loss"}
WITH_INTERVAL = ("gold", "win_rate", "human_win_rate", "score", "kl")


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean and the half-width of its 95 % interval (normal approximation)."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * x.std().item() / len(x) ** 0.5


def wins(own: list[float], other: list[float]) -> list[float]:
    """1 where our own number is higher, 1/2 where they are equal, else 0."""
    return [(a > b) / 2 + (a >= b) / 2 for a, b in zip(own, other, strict=True)]


def rubric_points(world: ModuleType | None, prompts: list[str], answers: list[str]) -> dict:
    """The points of each answer under "gold", their parts under "gold/<part>"; {} if no rubric."""
    if world is None:
        return {}
    pairs = list(zip(prompts, answers, strict=True))
    parts = [world.gold_parts(*pair) for pair in pairs]
    named = {f"gold/{name}": [part[name] for part in parts] for name in world.PARTS}
    return {"gold": [world.gold(*pair) for pair in pairs]} | named


def best_of_n(responses: list[list[int]], scores: list[float], most: int) -> dict[int, tuple]:
    """{n: (responses, scores)}, n = 1, 2, 4, ..., most: for each prompt, the response with the
    highest score of the first n. Each prompt has `most` adjacent responses."""
    by_prompt, found = torch.tensor(scores).view(-1, most), {}
    for n in (2**i for i in range(most.bit_length())):
        top = by_prompt[:, :n].max(1)
        best = [responses[p * most + i] for p, i in enumerate(top.indices.tolist())]
        found[n] = best, top.values.tolist()
    return found


def best_of_n_curve(best: dict[int, tuple], points: Callable) -> list[dict]:
    """For each n: the bound of the KL, the mean score, and the mean points of the rubric."""
    curve = []
    for n, (responses, scores) in best.items():
        gold = points(responses).get("gold")
        point = {"n": n, "kl": best_of_n_kl(n), "score": sum(scores) / len(scores)}
        curve.append(point | {"gold": sum(gold) / len(gold) if gold else None})
    return curve


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound in nats (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def distinct(responses: list[list[int]]) -> float:
    """Distinct-2 (Li et al. 2016): the share of token pairs that are the first of their kind."""
    bigrams = [pair for tokens in responses for pair in itertools.pairwise(tokens)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def row(name: str, responses: list[list[int]], eos: int, measured: dict[str, list[float]]) -> dict:
    """A model's row of results.json: the mean of each list, and its half-width as <name>_ci."""
    measured = measured | {
        "length": [len(tokens) for tokens in responses],
        "eos_rate": [float(tokens[-1] == eos) for tokens in responses],
        "repetition": [1 - distinct([tokens]) for tokens in responses],
    }
    found: dict = {"model": name} | dict.fromkeys(TITLES)
    for key, values in measured.items():
        found[key], found[f"{key}_ci"] = mean_and_interval(values)
    return found | {"distinct_2": distinct(responses)}


def judge_by_hand(rows: list, answered: dict, prompts: list[str], folder: str, seed: int) -> None:
    """A person ranks the models' answers, blind; adds each model's win rate against sft."""
    columns = zip(prompts, *answered.values(), strict=True)
    items = [{"prompt": prompt, "responses": given} for prompt, *given in columns]
    person = labeler.Person(items, folder, seed)
    person.rank_all()
    judged, sft = [item["ranks"] for item in person.comparisons()], list(answered).index("sft")
    for i, found in enumerate(rows):
        if judged and i != sft:  # rank 1 is best
            won = wins([-ranks[i] for ranks in judged], [-ranks[sft] for ranks in judged])
            found["human_win_rate"], found["human_win_rate_ci"] = mean_and_interval(won)


def finish(
    config, rows: list[dict], curve: list[dict], answered: dict, prompts: list[str], started: float
) -> None:
    """Prints the table; writes results.json and comparison.txt. answered: {model: its answers}."""
    lock(config.out)
    if config.judge == "human":
        if not config.resume:
            labeler.check_no_answers(config.out)
        judge_by_hand(rows, answered, prompts, config.out, config.seed)
    blocks = []
    for i, prompt in enumerate(prompts[:5]):
        blocks += [f"== {prompt}", *(f"[{name}] {given[i]}" for name, given in answered.items())]
    blocks = list(map(printable, blocks))
    results = {"seed": config.seed, "seconds": time.time() - started, "rows": rows}
    with atomic(Path(config.out) / "results.json") as file:
        file.write(strict_json(results | {"best_of_n": curve}, indent=1).encode())
    with atomic(Path(config.out) / "comparison.txt") as file:
        file.write(("\n\n".join(blocks) + "\n").encode())
    print("\n".join(blocks[: len(answered) + 1]) + "\n")
    print_table(rows)
    print_conclusion(rows, len(prompts))
    print(f"wrote {config.out}: results.json, comparison.txt")


def token_table(tokens: list[str], columns: dict[str, list[float]]) -> list[str]:
    """A line for each token, and above them the names of the columns."""
    width = max(map(len, tokens))
    lines = ["token".ljust(width) + "".join(f"{name:>10}" for name in columns)]
    for token, *numbers in zip(tokens, *columns.values(), strict=True):
        lines.append(token.ljust(width) + "".join(f"{x:10.3f}" for x in numbers))
    return lines


def print_table(rows: list[dict]) -> None:
    """One line per model, of at most 100 columns; then a table of the rubric's parts."""
    parts = {k: k[5:] for k in rows[0] if k.startswith("gold/") and not k.endswith("_ci")}
    for titles in (TITLES, parts):
        shown = [key for key in titles if any(found[key] is not None for found in rows)]
        lines = [["", *(titles[key] for key in shown)]]
        lines += [[found["model"], *(cell(found, key) for key in shown)] for found in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for name, *cells in lines if shown else []:
            padded = [text.rjust(width + 1) for text, width in zip(cells, widths[1:], strict=True)]
            print(name.ljust(widths[0]) + "".join(padded))
        print()


def cell(found: dict, key: str) -> str:
    mean, half_width = found[key], found.get(f"{key}_ci")
    if mean is None:
        return ""
    with_interval = half_width is not None and (key in WITH_INTERVAL or key.startswith("gold/"))
    largest = max(abs(mean), half_width if with_interval else 0)
    digits = 2 if largest < 9.995 else 1 if largest < 99.95 else 0
    return f"{mean:.{digits}f}" + (f" ± {half_width:.{digits}f}" if with_interval else "")


def print_conclusion(rows: list[dict], n: int) -> None:
    """The result in words: each policy beside the fine-tuned model, on n prompts."""
    sft = next(found for found in rows if found["model"] == "sft")
    trained = itertools.dropwhile(lambda found: not found["model"].startswith("best_of"), rows)
    for found in list(trained)[1:]:
        score, gold = found["score"], found["gold"]
        words = [f"{found['model']}, beside the fine-tuned model on {n} prompts:"]
        if gold is not None:
            words.append(f"it wins on {found['win_rate']:.0%} of them (a tie counts half),")
            words.append(f"its rubric is {gold:.2f} (fine-tuned: {sft['gold']:.2f}),")
        words.append(f"its score is {score:.2f} (fine-tuned: {sft['score']:.2f}),")
        words.append(f"at {round(found['kl'], 1) + 0:.1f} nats of KL.")  # never -0.0
        if gold is not None and score > sft["score"] and gold < sft["gold"]:
            words.append("It pleases the reward model, but does not do what was asked.")
        print(textwrap.fill(" ".join(words), 100))


def calibration(scores: list[list[float]], ranks: list[list[int]]) -> list[tuple]:
    """(predicted, observed, n) by tenths of the probability sigmoid(r_a - r_b) that the model gives
    to the order it prefers: its mean, and the share of the n pairs that the labeler ordered so."""
    tenths: dict[int, list] = {tenth: [] for tenth in range(5, 10)}
    for group in zip(scores, ranks, strict=True):
        for (r, rank), (other, other_rank) in itertools.combinations(zip(*group, strict=True), 2):
            if rank != other_rank:
                p = torch.tensor(abs(r - other)).sigmoid().item()
                tenths[min(int(p * 10), 9)].append((p, (r > other) == (rank < other_rank)))
    bins = [tuple(zip(*pairs, strict=True)) for pairs in tenths.values() if pairs]
    return [(sum(p) / len(p), sum(agrees) / len(p), len(p)) for p, agrees in bins]


def correlation(scores: list[list[float]], lengths: list[list[int]]) -> float:
    """Pearson's, over the responses to all prompts."""
    flat = torch.tensor([[x for group in lists for x in group] for lists in (scores, lengths)])
    return flat.corrcoef()[0, 1].item()


def print_reward_report(found: dict) -> None:
    for name, (share, half_width, n) in found["pairs"].items():
        shown = f"{share:.3f} ± {half_width:.3f} of {n} pairs" if n else "no pairs"
        print(f"{name:48s} {shown}")
    for predicted, observed, n in found["calibration"]:
        print(f"pairs ordered with probability {predicted:.2f}: {observed:.2f} rightly, of {n}")
    line = f"correlation of score and length {found['length_correlation']:.2f}"
    print(line.replace("nan", "is not defined: all scores or all lengths are equal"))
