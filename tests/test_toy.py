"""The toy world: rubric by hand, writers, splits, probes, and the labeler."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from random import Random

from data import toy
from data.labeler import rank

import pytest

GHOST = "Tell me a spooky story about a ghost."
GOOSE = "Write a sad letter from the goose to the pirate."
QUEEN = "Which soft things should the queen buy?"


# ------------------------------------------------------------------------------------------------
# The rubric


def parts(prompt: str, response: str) -> list[float]:
    return [toy.gold_parts(prompt, response)[name] for name in toy.PARTS]


@pytest.mark.parametrize(
    "prompt, response",
    [
        (
            GHOST,
            "Far away there lived a creepy ghost. Then the ghost chased a rusty cage in the attic. "
            "Even the soup screamed. The end.",
        ),
        (
            GOOSE,
            "Dear pirate! Today I lost a single sock on a train. Even the moon wept. "
            "With tears, the goose.",
        ),
        (
            QUEEN,
            "Shopping list of the queen! Buy a kitten for Sunday. Borrow a scarf just in case. "
            "The queen pays tomorrow.",
        ),
    ],
)
def test_a_good_reply_scores_ten(prompt, response):
    assert tuple(toy.gold_parts(prompt, response)) == toy.PARTS
    assert parts(prompt, response) == [1.0] * 6
    assert toy.gold(prompt, response) == 10.0


def test_story_by_hand():
    response = (
        "Once there was a merry ghost. Then the fox chased a rusty cage on a train. "
        "Then the fox chased a rusty cage on a train. I like soup. The end. I hope you like it."
    )
    # form: "I like soup." and what follows the ending do not fit, 4 of 6. mood: merry is happy, the
    # four other words are spooky. subject: ghost, fox, fox. variety: chased and cage occur twice,
    # so nothing occurs once. ending: it goes on after it. length: two middle sentences.
    assert parts(GHOST, response) == pytest.approx([4 / 6, 4 / 5, 1 / 3, 0, 1 / 2, 1])
    # 10 · 2/3 · (4/5 + 1/3)/2 · (0 + 1/2 + 1)/3 = 10 · 2/3 · 17/30 · 1/2
    assert toy.gold(GHOST, response) == pytest.approx(17 / 9)


def test_letter_by_hand():
    response = "Dear pirate! Today I lost a broken cup on a train. With hugs, the goose."
    # mood: lost and cup are sad, hugs are not. length: one middle sentence is half as good as two.
    assert parts(GOOSE, response) == pytest.approx([1, 2 / 3, 1, 1, 1, 1 / 2])
    assert toy.gold(GOOSE, response) == pytest.approx(10 * (5 / 6) * (5 / 6))
    # the names must be in their places
    response = "Dear goose! Today I lost a broken cup on a train. With hugs, the pirate."
    assert toy.gold_parts(GOOSE, response)["subject"] == 0


def test_list_by_hand():
    response = (
        "Shopping list of the witch! Buy a kitten for Sunday. Pack a drum for the dentist. "
        "Order a scarf just in case. Borrow a kitten for breakfast. The queen pays"
    )
    # form: the last sentence is cut off, 5 of 6. mood: all items but the drum. subject: witch
    # only. variety: drum and scarf of four items. ending: none. length: four middle sentences.
    assert parts(QUEEN, response) == pytest.approx([5 / 6, 3 / 4, 0, 2 / 4, 0, 1 / 2])
    assert toy.gold(QUEEN, response) == pytest.approx(10 * (5 / 6) * (3 / 8) * (1 / 3))


def test_every_sentence_has_its_place():
    opening, end = "Once there was a pale ghost.", "The end."
    middle = "Then the ghost chased a rusty cage in the attic."
    other = "Later the ghost haunted a rusty cage in the attic."  # an adjective here, no verb
    for response, form in [
        (f"{opening} {middle} {end}", 3 / 3),
        (f"{middle} {end}", 1 / 2),  # without an opening the first sentence does not count
        (f"{opening} {opening} {end}", 2 / 3),
        (f"{opening} {end} {middle} {end}", 2 / 4),
        (f"{opening} {other} {end}", 2 / 3),
        (f"  {opening}\n{middle}\n{end}\n", 3 / 3),  # white space is no matter
        (f"{opening} {middle} The end", 2 / 3),
        (f"{opening} {middle.upper()} {end}", 2 / 3),
    ]:
        assert toy.gold_parts(GHOST, response)["form"] == pytest.approx(form), response


@pytest.mark.parametrize(
    "response",
    ["", " \n", "...", "ghost", "The end.", "spooky ghost " * 50, "\x00é<|endoftext|>", GHOST],
)
def test_nothing_and_garbage_score_zero(response):
    assert toy.gold(GHOST, response) == 0


def test_a_reply_of_another_kind_scores_next_to_nothing():
    rng = Random(0)
    for kind, other in itertools.permutations(toy.REPLIES, 2):
        for _ in range(50):
            task = toy.random_task(rng, kind=kind)
            reply = toy.write(toy.random_task(rng, kind=other), rng)
            # one sentence may fit, "Even the moon giggled.": 10 · 1/4 · 1/2 · (1 + 1/2)/3
            assert toy.gold(toy.ask(task, rng), reply) <= 0.625


def test_the_docstring_tells_the_truth():
    paragraphs = [" ".join(text.split()) for text in toy.__doc__.split("\n\n")]
    assert toy.gold(paragraphs[2], paragraphs[3]) == 10


# ------------------------------------------------------------------------------------------------
# Instructions and splits


def test_an_instruction_is_read_back():
    rng = Random(1)
    for _ in range(500):
        task = toy.random_task(rng, "any")
        read = toy.read_prompt(toy.ask(task, rng))
        assert read == task._replace(recipient=task.recipient if task.kind == "letter" else "")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Tell me a spooky story about a unicorn.",
        "Tell me a red story about a ghost.",
        "Make a spooky shopping list for the ghost.",
        GHOST + " Please.",
    ],
)
def test_any_other_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="no instruction of the toy world"):
        toy.gold(prompt, "The end.")


def test_splits_share_out_the_pairs():
    table = {(m, s): toy.split_of(m, s) for m in toy.ALL_MOODS for s in toy.SUBJECTS}
    # The row of a mood holds twelve successive diagonals, the last digits of the first two twice.
    # The rows start at 0 3 6 9 2 5 8 1 4 7 0: three of the eleven (at 0, 9 and 0) have a second
    # pair for dev (digit 0), two (at 5 and 4) one for test (digit 5). 132 pairs - 14 - 13 = 105.
    assert Counter(table.values()) == {"train": 105, "dev": 14, "test": 13}
    rows = [Counter(table[mood, subject] for subject in toy.SUBJECTS) for mood in toy.ALL_MOODS]
    columns = [Counter(table[mood, subject] for mood in toy.ALL_MOODS) for subject in toy.SUBJECTS]
    for counts in rows + columns:
        assert {counts["dev"], counts["test"]} <= {1, 2}
    assert {counts["train"] for counts in rows} == {9, 10}  # of twelve subjects
    for subject in toy.SUBJECTS:
        assert sum(table[mood, subject] == "train" for mood in toy.MOODS) == 4
        assert sum(table[mood, subject] == "train" for mood in toy.ATTRIBUTES) in (4, 5)


def instructions_in(text: str) -> list[toy.Task]:
    """Every instruction that stands anywhere in the text."""
    patterns = [pattern for patterns in toy.READ_PROMPT.values() for pattern in patterns]
    return [toy.read_prompt(m[0]) for pattern in patterns for m in pattern.finditer(text)]


@pytest.mark.parametrize("split", toy.SPLITS)
def test_prompts_are_of_their_split(split):
    tasks = [toy.read_prompt(row["prompt"]) for row in toy.prompts(300, 0, split)]
    assert {toy.split_of(task.mood, task.subject) for task in tasks} == {split}
    assert {task.kind for task in tasks} == set(toy.REPLIES)
    assert all(task.subject != task.recipient for task in tasks)


def test_held_out_instructions_occur_nowhere_else():
    documents = toy.pages(2000, 0)
    documents += [row["prompt"] for row in toy.demonstrations(1000, 0)]
    documents += [toy.few_shot(GHOST, seed).removesuffix(f"{GHOST}\nAnswer:") for seed in range(99)]
    tasks = [task for document in documents for task in instructions_in(document)]
    assert len(tasks) > 5000
    assert {toy.split_of(task.mood, task.subject) for task in tasks} == {"train"}


def titles() -> dict[str, toy.Task]:
    """Every title that a text can have, and what the text does."""
    tasks = (
        toy.Task(kind, mood, *names)
        for kind in toy.TITLES
        for mood in toy.MOODS_OF[kind]
        for names in itertools.permutations(toy.SUBJECTS, 2)
    )
    return {toy.TITLES[task.kind].format(**task._asdict()): task for task in tasks}


def test_a_title_is_no_instruction():
    # 5 moods · 12 subjects, in letters · 11 recipients; 6 attributes · 12 subjects
    counts = Counter(task.kind for task in titles().values())
    assert counts == {"story": 60, "letter": 660, "list": 72}
    for title in titles():
        assert not instructions_in(title)
        with pytest.raises(ValueError, match="no instruction of the toy world"):
            toy.read_prompt(title)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'; expected one of train, dev, test"):
        toy.prompts(1, 0, "validation")


def test_the_same_seed_gives_the_same_data_on_every_machine():
    def digest(rows: list[str] | list[dict[str, str]]) -> str:
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    assert digest(toy.pages(100, 0)) == "ce5be4e64455a5d7"
    assert digest(toy.demonstrations(100, 0)) == "cb44dbf479ec4bea"
    assert digest(toy.prompts(100, 0, "test")) == "36f5f1dcdecfbb59"
    assert digest(toy.probe_pairs(60, 0)) == "fbfc02b62f993926"
    assert toy.prompts(20, 0) == toy.prompts(30, 0)[:20]
    assert toy.prompts(20, 0) != toy.prompts(20, 1)


# ------------------------------------------------------------------------------------------------
# Words and writers


def test_words_allow_what_is_done_with_them():
    words = [word for slots in toy.ALL_MOODS.values() for slot in slots for word in slots[slot]]
    assert len(words) == len(set(words)) == len(toy.MOOD_OF)  # a word has one mood
    for moods in (toy.MOODS, toy.ATTRIBUTES):
        shapes = [{slot: len(words) for slot, words in slots.items()} for slots in moods.values()]
        assert all(shape == shapes[0] for shape in shapes)  # the same dice fit every mood
    for slot in ("verb", "object", "item", "when", "day", "place", "buy", "purpose"):
        assert len((toy.ANY_MOOD | toy.NEUTRAL)[slot]) >= 5  # the longest reply draws five
    before_a = toy.SUBJECTS + list(toy.MOODS) + toy.ANY_MOOD["adjective"]
    assert not [word for word in before_a if word[0] in "aeiou"]
    assert len(toy.SUBJECTS) == len(set(toy.SUBJECTS)) == 12


@pytest.mark.parametrize("kind", toy.REPLIES)
def test_a_flawless_reply_is_perfect(kind):
    rng = Random(2)
    for _ in range(300):
        task = toy.random_task(rng, "any", kind)
        assert toy.gold(toy.ask(task, rng), toy.write(task, rng)) == 10


LOWERS = {  # what each flaw always lowers, and what it may lower besides
    "wrong subject": ({"subject"}, set()),
    "wrong mood": ({"mood"}, set()),
    "repeated": ({"variety"}, set()),
    "cut off": ({"ending"}, set(toy.PARTS)),
    "word salad": ({"form"}, {"length"}),  # a sentence that does not fit is not counted
    "chatty": ({"form", "ending"}, set()),
    "too long": ({"length"}, set()),
    "too short": ({"length"}, {"variety", "mood"}),  # there may be no verb and no item at all
}


@pytest.mark.parametrize("flaw", toy.FLAWS)
def test_a_flaw_lowers_the_parts_it_should(flaw):
    rng = Random(3)
    for _ in range(300):
        task = toy.random_task(rng)
        prompt, reply = toy.ask(task, rng), toy.write(toy.misread(task, rng, [flaw]), rng, [flaw])
        lowered = {part for part, value in toy.gold_parts(prompt, reply).items() if value < 1}
        always, sometimes = LOWERS[flaw]
        assert always <= lowered <= always | sometimes, reply


def test_a_misread_task_misses_entirely():
    rng = Random(4)
    for _ in range(200):
        task = toy.random_task(rng)
        prompt = toy.ask(task, rng)
        reply = toy.write(toy.misread(task, rng, ["wrong subject"]), rng)
        assert toy.gold_parts(prompt, reply)["subject"] == 0 and toy.gold(prompt, reply) == 5
        reply = toy.write(toy.misread(task, rng, ["wrong mood"]), rng)
        assert toy.gold_parts(prompt, reply)["mood"] == 0 and toy.gold(prompt, reply) == 5


def test_writers_are_as_good_as_their_names():
    def mean_gold(writer: str) -> float:
        rng = Random(5)
        tasks = [toy.random_task(rng) for _ in range(600)]
        return sum(toy.gold(toy.ask(t, rng), toy.reply(t, rng, writer)) for t in tasks) / 600

    golds = {writer: mean_gold(writer) for writer in toy.WRITERS}
    assert golds["careful"] > 7.5 > golds["average"] > 5 > golds["sloppy"]


def test_demonstrations_miss_the_point_more_often_than_anything_else():
    scores = [toy.gold_parts(**row) for row in toy.demonstrations(2000, 0)]
    missed = sum(min(score["mood"], score["subject"]) < 1 for score in scores) / 2000
    # 1 - (0.3 · 0.97² + 0.4 · 0.8² + 0.3 · 0.5²) = 0.39, and 5.5 standard errors
    assert missed == pytest.approx(0.39, abs=0.06)
    golds = [toy.gold(**row) for row in toy.demonstrations(2000, 0)]
    assert 5 < sum(golds) / 2000 < 6


# ------------------------------------------------------------------------------------------------
# Pages for the base model, probes for the reward model


def test_pages_mix_four_kinds_of_document():
    pages = toy.pages(4000, 1)
    asked = [page for page in pages if page.startswith("Question: ")]
    facts = [page for page in pages if page.split(". ")[0].strip(".") + "." in toy.FACTS]
    exams = [page for page in pages if all(instructions_in(line) for line in page.split("\n"))]
    known = titles()
    titled = [page for page in pages if page.split("\n")[0] in known]
    groups = (titled, exams, facts, asked)
    assert all(sum(page in group for group in groups) == 1 for page in pages)
    shares = [len(group) / 4000 for group in groups]  # the steps between 0, 0.34, 0.54, 0.60 and 1
    assert shares == pytest.approx([0.34, 0.20, 0.06, 0.40], abs=0.045)  # 5.8 standard errors


def test_a_comment_says_whether_the_answer_does_what_was_asked():
    seen = Counter()
    for page in toy.pages(1000, 2):
        for thread in page.split("Question: ")[1:]:
            prompt, answer, comment = thread.strip().split("\n")
            task = toy.read_prompt(prompt)
            parsed = toy.read_reply(task.kind, answer.removeprefix("Answer: "))
            words = [pair for _, found in parsed for pair in found.items()]
            wrong_subject = {word != task.subject for slot, word in words if slot == "subject"}
            wrong_mood = {toy.MOOD_OF[w] != task.mood for slot, w in words if slot in toy.ANY_MOOD}
            said = re.fullmatch(r"Comment: (not )?(\w+), (not )?(\w+)\.", comment)
            assert (said[2], said[4]) == (task.subject, task.mood)
            assert wrong_subject <= {bool(said[1])} and wrong_mood <= {bool(said[3])}
            seen[bool(said[1]), bool(said[3])] += 1
    assert min(seen.values()) > 0.2 * seen.total()  # all four combinations


def test_a_text_is_what_its_title_says():
    known, splits = titles(), Counter()
    for page in toy.pages(2000, 1):
        title, _, text = page.partition("\n")
        if task := known.get(title):
            assert "\n" not in text and not instructions_in(page)
            splits[toy.split_of(task.mood, task.subject)] += 1
            for _, words in toy.read_reply(task.kind, text):
                for slot, word in words.items():
                    assert slot not in toy.ANY_MOOD or toy.MOOD_OF[word] == task.mood
                    assert slot not in toy.NAMES or word == getattr(task, slot)
    assert set(splits) == set(toy.SPLITS) and splits.total() > 560  # 680 - 5.6 standard errors


@pytest.mark.parametrize("prompt", [GHOST, GOOSE, QUEEN])
def test_few_shot_shows_two_perfect_answers(prompt):
    first, second, last = toy.few_shot(prompt).split("Question: ")[1:]
    assert last == f"{prompt}\nAnswer:"
    for shown in (first, second):
        question, answer = shown.strip().split("\nAnswer: ")
        assert toy.gold(question, answer) == 10
    kinds = [toy.read_prompt(shown.split("\n")[0]).kind for shown in (first, second, last)]
    assert kinds[0] == kinds[2] != kinds[1]
    assert toy.few_shot(prompt) == toy.few_shot(prompt, seed=0) != toy.few_shot(prompt, seed=1)


def test_cut_answer_stops_at_the_line_break():
    assert toy.cut_answer(" Once there was. The end.\nQuestion: Why?") == "Once there was. The end."
    assert toy.cut_answer("no line break ") == "no line break"
    assert toy.cut_answer("\nQuestion: Why?") == ""


@pytest.mark.parametrize("split", ["dev", "test"])
def test_probes_differ_in_one_flaw(split):
    rows = toy.probe_pairs(240, 0, split)
    assert Counter(row["flaw"] for row in rows) == {flaw: 40 for flaw in toy.PROBES}
    for row in rows:
        prompt, good, bad, flaw = row.values()
        task = toy.read_prompt(prompt)
        assert toy.split_of(task.mood, task.subject) == split
        assert toy.gold(prompt, good) == 10
        before, after = (toy.gold_parts(prompt, text) for text in (good, bad))
        lowered = {part for part in toy.PARTS if after[part] < before[part]}
        assert LOWERS[flaw][0] <= lowered <= LOWERS[flaw][0] | LOWERS[flaw][1]
        if flaw == "wrong subject":
            same = zip(good.split(), bad.split(), strict=True)
            changed = {a.strip(".!") for a, b in same if a != b}
            assert changed == {task.subject, task.recipient} - {""}
        elif flaw == "wrong mood":
            pairs = zip(
                toy.read_reply(task.kind, good), toy.read_reply(task.kind, bad), strict=True
            )
            for (_, a), (_, b) in pairs:  # every word with a mood is exchanged, every other stays
                assert all((a[slot] == b[slot]) != (slot in toy.ANY_MOOD) for slot in a | b)
        elif flaw == "cut off":
            assert good.startswith(bad) and len(bad) < len(good)
        elif flaw == "chatty":
            assert bad.removeprefix(good).strip() in toy.CHATTER
        elif flaw == "word salad":
            salad, dressing = bad.replace(".", "").split(), good.replace(".", "").split()
            assert sorted(salad) == sorted(dressing) and salad != dressing


# ------------------------------------------------------------------------------------------------
# The labeler


def by_length(prompt: str, response: str) -> float:
    return float(len(response))


def frequency_above(a: str, b: str, noise: float) -> float:
    rng, n = Random(6), 4000
    ranks = [rank("", [a, b], rng, noise, tie=0, score=by_length) for _ in range(n)]
    return sum(first < second for first, second in ranks) / n


@pytest.mark.parametrize("gap, noise", [(0, 1.0), (1, 1.0), (2, 1.0), (2, 4.0), (1, 0.25)])
def test_labeler_follows_bradley_and_terry(gap, noise):
    expected = 1 / (1 + math.exp(-gap / noise))
    tolerance = 5.5 * math.sqrt(expected * (1 - expected) / 4000)  # exceeded in 4e-8 of all seeds
    measured = frequency_above("a" * (1 + gap), "b", noise)
    assert measured == pytest.approx(expected, abs=tolerance)


def test_labeler_follows_plackett_and_luce():
    rng, n = Random(7), 4000
    texts, e = ["aaa", "b", "c"], math.exp
    ranks = Counter(rank("", texts, rng, tie=0, score=by_length)[0] for _ in range(n))
    # "aaa" is chosen first among all, or last: after one of the others and then the other
    first = e(3) / (e(3) + 2 * e(1))
    last = 2 * e(1) / (e(3) + 2 * e(1)) * e(1) / (e(3) + e(1))
    assert ranks[1] / n == pytest.approx(first, abs=0.036)  # 0.787; here and below 5.5 standard
    assert ranks[3] / n == pytest.approx(last, abs=0.014)  # errors. 0.025; with -Gumbel 0.063


def test_without_noise_the_labeler_is_the_rubric():
    pair = toy.probe_pairs(1, 0)[0]
    replies = ["", pair["bad"], pair["good"], pair["bad"]]  # 0, 5, 10 and 5 points
    assert rank(pair["prompt"], replies, Random(0), noise=0) == [4, 2, 1, 2]
    assert rank(pair["prompt"], replies, Random(0), noise=0, tie=0) == [4, 2, 1, 2]
    assert rank(pair["prompt"], replies, Random(0), noise=0, tie=100) == [1, 1, 1, 1]
    assert rank(pair["prompt"], [], Random(0)) == []


def test_ties():
    rng = Random(8)
    texts = ["a", "bb", "a", "cc", "dd", "bb"]
    share = {0.0: 0, 0.5: 0, 2.0: 0}  # how often "cc" and "dd", of equal worth, are tied
    for tie in share:
        for _ in range(1000):
            ranks = rank("", texts, rng, tie=tie, score=by_length)
            assert ranks[0] == ranks[2] and ranks[1] == ranks[5]  # identical texts, always
            assert all(r == 1 + sum(other < r for other in ranks) for r in ranks)
            share[tie] += ranks[3] == ranks[4]
    assert 0 == share[0.0] < share[0.5] < share[2.0] < 1000
