"""The toy world: instructions, imperfect writers and a hidden rubric, learnt in minutes.

An instruction asks for a story in some mood about a subject, for a letter in some mood from one
subject to another, or for a shopping list of things with some attribute:

    Tell me a silly story about a pirate.

    Long ago there lived a ticklish pirate. Then the pirate ironed a polite sausage on a train.
    Even the mailbox giggled. The end.

One grammar serves in both directions: writers fill its templates with words, and the rubric reads
the words back. Writers differ most in whether they do what they were asked; the careless ones write
a fine story about somebody else, or in another mood. A model that imitates them all inherits their
mixture. One that learns which replies are preferred can follow instructions better than its
teachers, which is the claim of InstructGPT (https://arxiv.org/abs/2203.02155).

Everything here is text and follows from a seed. Of `random.Random` only `random()` is used: its
other methods may draw differently in another version of Python.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# ---- words ----
# No subject, mood or adjective starts with a vowel: "a" is right before all of them.
SUBJECTS = "fox|queen|dragon|robot|wizard|pirate|ghost|witch|goose|baker|goat|clown".split("|")


def slots(**words: str) -> dict[str, list[str]]:
    """The words that may fill each slot of a template, given as "one|two|three"."""
    return {slot: options.split("|") for slot, options in words.items()}


# What a mood sounds like. All have equally many words for a slot and share none, so the same dice
# write the same text in another mood.
MOODS = {
    "happy": slots(
        adjective="cheerful|merry|lucky|jolly|sunny|smiling",
        verb="hugged|shared|won|painted|admired|polished|unwrapped|danced with",
        object="a golden bun|a warm pie|a shiny balloon|a lucky coin|a wagging puppy|"
        "a birthday cake|a singing teapot|a jar of honey",
        reaction="cheered|clapped|smiled",
        closing="With hugs|Big kisses",
    ),
    "sad": slots(
        adjective="lonely|weepy|gloomy|tearful|forgotten|heartbroken",
        verb="lost|missed|buried|mourned|dropped|cried over|sighed at|waited for",
        object="a broken cup|a wilted flower|a torn letter|the last crumb|a leaky boat|"
        "a burnt potato|a single sock|an empty bowl",
        reaction="wept|sobbed|sniffled",
        closing="With tears|Alone again",
    ),
    "spooky": slots(
        adjective="haunted|creepy|shadowy|cursed|pale|ghastly",
        verb="chased|whispered to|followed|dug up|howled at|stared at|summoned|vanished with",
        object="a dusty skull|a black candle|a creaking door|a pale shadow|a hungry crow|"
        "a locked coffin|a rusty cage|a headless doll",
        reaction="shivered|screamed|trembled",
        closing="Until midnight|From the fog",
    ),
    "silly": slots(
        adjective="wobbly|ridiculous|giggling|dizzy|goofy|ticklish",
        verb="tickled|married|wore|argued with|sat on|saluted|ironed|sneezed at",
        object="a wobbly turnip|an upside-down bucket|a polite sausage|a pink moustache|"
        "a confused pancake|a rubber boot|a dancing cabbage|a bag of noodles",
        reaction="giggled|snorted|hiccuped",
        closing="Yours backwards|Bananas forever",
    ),
    "sleepy": slots(
        adjective="drowsy|yawning|dreamy|snoozing|tired|cosy",
        verb="yawned at|napped on|dreamed of|hummed to|dozed under|snuggled|tucked in|rocked",
        object="a quiet lamp|a slow cloud|a heavy blanket|a big pillow|a woolly sheep|"
        "a cup of milk|a feather bed|a lazy moonbeam",
        reaction="yawned|nodded|blinked",
        closing="Good night|Half asleep",
    ),
}
# An attribute is to a list what a mood is to a story, and is called its mood from here on.
ATTRIBUTES = {
    "red": slots(item="a tomato|a cherry|a brick|a rose|a strawberry|a fire truck|a stop sign"),
    "green": slots(item="a cucumber|a pickle|a leaf|a lettuce|a pea|a cactus|a lime"),
    "round": slots(item="a ball|a wheel|a marble|a button|a globe|an onion|a doughnut"),
    "cold": slots(item="an igloo|a glacier|a snowball|a popsicle|an ice cube|a milkshake|a fridge"),
    "loud": slots(item="a drum|a trumpet|a siren|a volcano|a tuba|an alarm clock|a chainsaw"),
    "soft": slots(item="a kitten|a scarf|a mitten|a sponge|a marshmallow|a sweater|a cushion"),
}
NEUTRAL = slots(
    once="Once there was|Long ago there lived|Far away there lived",
    when="One day|Then|Later|Every night|Suddenly",
    day="Today|Yesterday|Last week|This morning|On Monday|Last night",
    place="in the garden|on the roof|behind the bakery|under the bridge|near the castle|"
    "at the market|by the river|in the attic|on a train|outside the library",
    witness="moon|mailbox|soup|postman|carpet|mayor|piano|dentist",
    buy="Buy|Bring|Find|Borrow|Pack|Order",
    purpose="for breakfast|for grandmother|for the bathtub|for the dentist|for a wedding|"
    "for Sunday|for the parrot|just in case",
)
ALL_MOODS = MOODS | ATTRIBUTES

# ---- grammar: the wording of instructions and of replies, for each kind ----

MOODS_OF = {"story": list(MOODS), "letter": list(MOODS), "list": list(ATTRIBUTES)}
KINDS = ("story",) * 4 + ("letter",) * 3 + ("list",) * 3  # how often each is asked for
PHRASINGS = slots(
    story="Tell me a {mood} story about a {subject}.|Write a {mood} story about a {subject}.|"
    "I want a {mood} story about a {subject}.",
    letter="Write a {mood} letter from the {subject} to the {recipient}.|"
    "Help the {subject} write a {mood} letter to the {recipient}.",
    list="Make a {mood} shopping list for the {subject}.|"
    "Which {mood} things should the {subject} buy?",
)
TITLES = {  # of a text that nobody asked for
    "story": "The {mood} {subject}.",
    "letter": "From the {mood} {subject} to the {recipient}.",
    "list": "{mood} things for the {subject}.",
}
REPLIES = {
    "story": {
        "opening": "{once} a {adjective} {subject}.",
        "middle": "{when} the {subject} {verb} {object} {place}.",
        "reaction": "Even the {witness} {reaction}.",
        "ending": "The end.",
    },
    "letter": {
        "opening": "Dear {recipient}!",
        "middle": "{day} I {verb} {object} {place}.",
        "reaction": "Even the {witness} {reaction}.",
        "ending": "{closing}, the {subject}.",
    },
    "list": {
        "opening": "Shopping list of the {subject}!",
        "middle": "{buy} {item} {purpose}.",
        "ending": "The {subject} pays tomorrow.",
    },
}
SPLITS = ("train", "dev", "test")


class Task(NamedTuple):
    """What an instruction asks for."""

    kind: str
    mood: str
    subject: str
    recipient: str  # matters in letters only


def draw(deck: list[T], rng: Random) -> T:
    """A random card of the deck, which loses it."""
    return deck.pop(int(rng.random() * len(deck)))


def pick(options: Sequence[T], rng: Random) -> T:
    """One of the options at random."""
    return options[int(rng.random() * len(options))]


def split_of(mood: str, subject: str) -> str:
    """The one split whose instructions pair this mood with this subject.

    In the table of all pairs every tenth diagonal is dev, every tenth is test. So train lacks
    exactly one of the five moods of each subject, and two or three of the twelve subjects of each
    mood, while every subject and every mood occurs in every split.
    """
    diagonal = SUBJECTS.index(subject) + 3 * list(ALL_MOODS).index(mood)
    return {0: "dev", 5: "test"}.get(diagonal % 10, "train")


def random_task(rng: Random, split: str = "train", kind: str = "any") -> Task:
    """Something to ask for, of this split and kind; "any" is allowed for both."""
    if split not in (*SPLITS, "any"):
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    while True:
        which = pick(KINDS, rng) if kind == "any" else kind
        names = list(SUBJECTS)
        task = Task(which, pick(MOODS_OF[which], rng), draw(names, rng), draw(names, rng))
        if split in ("any", split_of(task.mood, task.subject)):
            return task


def ask(task: Task, rng: Random) -> str:
    """The task as an instruction, in one of its phrasings."""
    return pick(PHRASINGS[task.kind], rng).format(**task._asdict())


# ---- writers ----
# The first three write demonstrations; "page" wrote what stands on pages without an instruction,
# "forum" what stands there as an answer to one.

HOPES = "you like it|I get a good grade|nobody cries|this is long enough".split("|")
CHATTER = [f"I hope {hope}." for hope in HOPES]
DEMONSTRATORS = ("careful",) * 3 + ("average",) * 4 + ("sloppy",) * 3
# fmt: off
WRITERS =            ("careful", "average", "sloppy", "page", "forum")
FLAWS = {  # how often each befalls a reply
    "wrong subject": (   0.03,      0.20,     0.50,    0.00,   0.50),
    "wrong mood":    (   0.03,      0.20,     0.50,    0.00,   0.50),
    "repeated":      (   0.02,      0.08,     0.15,    0.05,   0.20),
    "cut off":       (   0.02,      0.08,     0.15,    0.10,   0.20),
    "too long":      (   0.03,      0.08,     0.15,    0.20,   0.25),
    "too short":     (   0.03,      0.08,     0.15,    0.10,   0.20),
    "word salad":    (   0.00,      0.04,     0.10,    0.04,   0.15),
    "chatty":        (   0.45,      0.60,     0.70,    0.00,   0.60),  # the one fault they share
}
# fmt: on


def reply(task: Task, rng: Random, writer: str) -> str:
    """A reply of this writer, with whatever flaws befall it."""
    flaws = flaws_of(writer, rng)
    return write(misread(task, rng, flaws), rng, flaws)


def flaws_of(writer: str, rng: Random) -> list[str]:
    column = WRITERS.index(writer)
    return [flaw for flaw, rates in FLAWS.items() if rng.random() < rates[column]]


def misread(task: Task, rng: Random, flaws: Collection[str]) -> Task:
    """The task as a careless reader remembers it: other names, another mood, both or neither."""
    if "wrong subject" in flaws:
        others = [name for name in SUBJECTS if name not in (task.subject, task.recipient)]
        task = task._replace(subject=draw(others, rng), recipient=draw(others, rng))
    if "wrong mood" in flaws:
        others = [mood for mood in MOODS_OF[task.kind] if mood != task.mood]
        task = task._replace(mood=pick(others, rng))
    return task


def write(task: Task, rng: Random, flaws: Collection[str] = ()) -> str:
    """A reply that does the task, perfect but for these flaws of form.

    From the same state of `rng`, replies to tasks of one kind differ only in the words for what the
    tasks differ in.
    """
    templates = REPLIES[task.kind]
    names = {"subject": task.subject, "recipient": task.recipient}
    decks = {slot: list(words) for slot, words in (NEUTRAL | ALL_MOODS[task.mood]).items()}

    def word(slot: re.Match[str]) -> str:  # drawn from a deck, so that none comes twice
        return names.get(slot[1]) or draw(decks[slot[1]], rng)

    lengths = (4, 5) if "too long" in flaws else (0, 1) if "too short" in flaws else (2, 3)
    roles = ["opening", *["middle"] * pick(lengths, rng), "ending"]
    if "reaction" in templates and len(roles) > 3 and rng.random() < 0.5:
        roles[-2] = "reaction"
    sentences = [re.sub(r"\{(\w+)\}", word, templates[role]) for role in roles]

    if "repeated" in flaws and len(roles) > 3:
        sentences[2] = sentences[1]
    if "word salad" in flaws:
        first, *rest = sentences[1].rstrip(".").split()
        sentences[1] = " ".join([draw(rest, rng) for _ in range(len(rest))] + [first]) + "."
    if "chatty" in flaws:
        sentences.append(pick(CHATTER, rng))
    text = " ".join(sentences)
    if "cut off" in flaws:  # anywhere in its last three fifths
        words = text.split()
        text = " ".join(words[: int((0.4 + 0.6 * rng.random()) * len(words))])
    return text


# ---- data sets ----

FACTS = [
    f"{thing[0].upper()}{thing[1:]} is {mood}."
    for mood, words in ALL_MOODS.items()
    for thing in words.get("item", words.get("object", []))
]
PROBES = ("wrong subject", "wrong mood", "repeated", "cut off", "word salad", "chatty")


def prompts(n: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """n instructions of a split: "train", "dev" or "test"."""
    rng = Random(f"prompts {split} {seed}")
    return [{"prompt": ask(random_task(rng, split), rng)} for _ in range(n)]


def demonstrations(n: int, seed: int) -> list[dict[str, str]]:
    """n instructions of the train split, each with the reply of a more or less careful writer."""
    rng = Random(f"demonstrations {seed}")
    tasks = [random_task(rng) for _ in range(n)]
    return [
        {"prompt": ask(task, rng), "response": reply(task, rng, pick(DEMONSTRATORS, rng))}
        for task in tasks
    ]


def pages(n: int, seed: int) -> list[str]:
    """n documents to pretrain on, none with an instruction of another split than train.

    Titles, and the texts below them, are of all splits; a title is no instruction.
    """
    rng = Random(f"pages {seed}")
    return [page(rng) for _ in range(n)]


def page(rng: Random) -> str:
    """A text with a title, an exam sheet, some facts, or questions with poor answers."""
    dice = rng.random()
    if dice < 0.34:
        task = random_task(rng, split="any")
        return TITLES[task.kind].format(**task._asdict()) + "\n" + reply(task, rng, "page")
    if dice < 0.54:  # no answers: these make a base model continue an instruction with another one
        return "\n".join(ask(random_task(rng), rng) for _ in range(pick((3, 4, 5, 6, 7), rng)))
    if dice < 0.60:
        return " ".join(pick(FACTS, rng) for _ in range(pick((3, 4, 5, 6), rng)))
    return "\n".join(thread(rng) for _ in range(pick((2, 3, 4), rng)))


def thread(rng: Random) -> str:
    """A question on a page, an answer that may not do what it asks, and what its asker thinks.

    The comment says whether the answer is about the right one, and whether its mood is right.
    """
    task = random_task(rng)
    prompt, flaws = ask(task, rng), flaws_of("forum", rng)
    answer = write(misread(task, rng, flaws), rng, flaws)
    subject = "not " * ("wrong subject" in flaws) + task.subject
    mood = "not " * ("wrong mood" in flaws) + task.mood
    return f"{question(prompt, answer)}\nComment: {subject}, {mood}."


def question(prompt: str, answer: str = "") -> str:
    """An instruction and its answer as they stand on a page."""
    return f"Question: {prompt}\nAnswer: {answer}".rstrip()


def few_shot(prompt: str, seed: int = 0) -> str:
    """A page on which two questions, the first of the prompt's own kind, have perfect answers.

    It ends in the prompt as a question, and a base model continues it; see `cut_answer`.
    """
    rng = Random(f"few shot {seed} {prompt}")
    kind = read_prompt(prompt).kind
    other = pick([name for name in REPLIES if name != kind], rng)
    tasks = [random_task(rng, kind=kind), random_task(rng, kind=other)]
    shown = [question(ask(task, rng), write(task, rng)) for task in tasks]
    return "\n".join([*shown, question(prompt)])


def cut_answer(text: str) -> str:
    """The answer in a continuation of a `few_shot` page: everything before the first line break."""
    return text.partition("\n")[0].strip()


def probe_pairs(n: int, seed: int, split: str = "dev") -> list[dict[str, str]]:
    """n perfect replies, each beside itself with one flaw: which does a reward model see?"""
    rng = Random(f"probe pairs {split} {seed}")
    rows = []
    for i in range(n):
        task, flaw, state = random_task(rng, split), PROBES[i % len(PROBES)], str(rng.random())
        good = write(task, Random(state))
        bad = write(misread(task, rng, [flaw]), Random(state), [flaw])
        rows.append({"prompt": ask(task, rng), "good": good, "bad": bad, "flaw": flaw})
    return rows


# ---- the gold rubric, which no model sees ----


def reader(template: str, words: dict[str, list[str]]) -> re.Pattern[str]:
    """The template as a pattern that reads back the word in each slot, under the slot's name."""

    def options(slot: re.Match[str]) -> str:
        return f"(?P<{slot[1]}>{'|'.join(map(re.escape, words[slot[1]]))})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", options, re.escape(template)))  # braces get escaped


NAMES = {"subject": SUBJECTS, "recipient": SUBJECTS}
ANY_MOOD = {  # for each slot the words of all moods
    slot: [word for words in ALL_MOODS.values() for word in words.get(slot, [])]
    for slot in MOODS["happy"] | ATTRIBUTES["red"]
}
MOOD_OF = {
    word: mood for mood, words in ALL_MOODS.items() for slot in words for word in words[slot]
}
READ_PROMPT = {
    kind: [reader(template, NAMES | {"mood": MOODS_OF[kind]}) for template in templates]
    for kind, templates in PHRASINGS.items()
}
READ_REPLY = {
    kind: {role: reader(text, NAMES | NEUTRAL | ANY_MOOD) for role, text in templates.items()}
    for kind, templates in REPLIES.items()
}


def read_prompt(prompt: str) -> Task:
    """What an instruction of this world asks for."""
    for kind, patterns in READ_PROMPT.items():
        for pattern in patterns:
            if match := pattern.fullmatch(prompt.strip()):
                words = match.groupdict()
                return Task(kind, words["mood"], words["subject"], words.get("recipient", ""))
    raise ValueError(f"{prompt!r} is no instruction of the toy world; see PHRASINGS in data/toy.py")


def read_reply(kind: str, response: str) -> list[tuple[str, dict[str, str]]]:
    """The role of each sentence and the word in each slot; ("", {}) for one that does not fit.

    The opening fits in the first place only, and nothing else fits there or after the ending.
    """
    parsed, ended = [], False
    for sentence in re.findall(r"[^.!?]+[.!?]*", response.strip()):
        role, words = "", {}
        for name, pattern in READ_REPLY[kind].items():
            match = pattern.fullmatch(sentence.strip())
            if match and (name == "opening") == (not parsed) and not ended:
                role, words = name, match.groupdict()
        ended = ended or role == "ending"
        parsed.append((role, words))
    return parsed


PARTS = ("form", "mood", "subject", "variety", "ending", "length")


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """Six aspects of a reply, each a share from 0 to 1.

    form     sentences that fit the grammar
    mood     words with a mood that have the mood asked for
    subject  names that are the ones asked for
    variety  verbs, objects, items and reactions that occur only once
    ending   1 if the last sentence is the ending, 1/2 if it goes on after it, 0 without one
    length   1 for two or three sentences between opening and ending, 1/2 for one or four, else 0
    """
    task = read_prompt(prompt)
    parsed = read_reply(task.kind, response)
    roles = [role for role, _ in parsed]
    words = [pair for _, found in parsed for pair in found.items()]  # (slot, word)
    deeds = Counter(word for slot, word in words if slot in ("verb", "object", "item", "reaction"))
    middle = roles.count("middle") + roles.count("reaction")
    return {
        "form": mean(role != "" for role in roles),
        "mood": mean(MOOD_OF[word] == task.mood for slot, word in words if slot in ANY_MOOD),
        "subject": mean(word == getattr(task, slot) for slot, word in words if slot in NAMES),
        "variety": mean(deeds[word] == 1 for word in deeds.elements()),
        "ending": 0.0 if "ending" not in roles else 1.0 if roles[-1] == "ending" else 0.5,
        "length": {1: 0.5, 2: 1.0, 3: 1.0, 4: 0.5}.get(middle, 0.0),
    }


def mean(truths: Iterable[bool]) -> float:
    """The share that is true; 0 of nothing."""
    values = list(truths)
    return sum(values) / max(len(values), 1)


def gold(prompt: str, response: str) -> float:
    """The worth of a reply: 10 · form · (mood + subject) / 2 · (variety + ending + length) / 3."""
    part = gold_parts(prompt, response)
    relevance = (part["mood"] + part["subject"]) / 2
    craft = (part["variety"] + part["ending"] + part["length"]) / 3
    return 10 * part["form"] * relevance * craft
