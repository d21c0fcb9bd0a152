"""A simulated labeler, who ranks responses by the gold rubric with a person's noise."""

import math
from collections.abc import Callable
from random import Random

from data.toy import gold


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
