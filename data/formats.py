"""The formats of other projects: from a row of their files to examples.

To add a format, write a function that yields the examples of a row, and enter it in FORMATS with
the keys by which a row is known. The function raises Dropped for a row that is of no use, and
counts what else it leaves out, so that data/convert.py can print it. Texts begin with the space
that follows a tag in a dialogue; where there is no dialogue, it is taken away again.
"""

import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data.records import MAX_RANK, Row, as_row, pair_accuracy, ranked_responses

HUMAN, ASSISTANT, SYSTEM = "\n\nHuman:", "\n\nAssistant:", "\n\nSystem:"
PLAIN = ""  # the tag of a prompt that is a string and no message
TAGS = {"human": HUMAN, "user": HUMAN, "prompter": HUMAN, "system": SYSTEM, "developer": SYSTEM}
TAGS |= dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", "bard", "bot"), ASSISTANT)
TOOLS = {"tool", "function", "function_call", "observation"}  # roles that have no tag
CALLS = ("tool_calls", "function_call")  # keys of a message
CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", *CHATS, "question")  # where a prompt may stand
SIDES = ("chosen", "rejected")
SCORES = ("score_{}", "{}_score", "{}_rating", "{}-rating")  # names of the score of a side
GRADED = {"completions": {"responses": "response", "scores": "overall_score"}}  # UltraFeedback's
GRADED["answers"] = {"responses": "answer", "ranks": "rank"}  # Nectar's
PROMPT_WORDS = 5  # of a snippet
Turn = tuple[str, str]  # tag, text as it follows the tag: after a space
Counts = Counter[str]  # what was left out or merged: how often


class Example(NamedTuple):
    """A prompt with no response, with one, or with several and their ranks; or a document."""

    prompt: list[Turn]
    responses: list[str]  # each after a space, as in a turn
    ranks: list[int]  # 1 is best
    document: str = ""


class Dropped(Exception):
    """A row that is sound but of no use, for a reason that the summary counts."""


# ---- what was said ----


def read_turns(row: Row, key: str, counts: Counts, speaker: str | None = None) -> list[Turn]:
    """The messages under a key, in OpenAI's or ShareGPT's form; or a string that `speaker` says."""
    value = row.fields.get(key)
    if speaker is not None and not isinstance(value, list | dict):
        return [(speaker, " " + row.text(key, may_be_blank=speaker == ASSISTANT))]
    turns = []
    for item in value if isinstance(value, list) else [value]:
        message = as_row(row.path, row.line, item, f'a message of "{key}"')
        if {"input", "output"} <= message.fields.keys():  # a question and its answer, as Capybara's
            texts = zip((HUMAN, ASSISTANT), ("input", "output"), strict=True)
            turns += [(tag, " " + message.text(own, may_be_blank=True)) for tag, own in texts]
            continue
        role = message.text("from" if "from" in message.fields else "role").lower()
        if role in TOOLS or any(map(message.fields.get, CALLS)):
            raise Dropped("with tool calls")
        if message.fields.get("weight") == 0:  # OpenAI's mark of what is not to be learnt
            raise Dropped("with a message of weight 0")
        if role not in TAGS:
            raise message.error(f"the role {role:.40} is unknown", f"one of {', '.join(TAGS)}")
        turns.append((TAGS[role], " " + read_content(message, counts)))
    return turns


def read_content(message: Row, counts: Counts) -> str:
    """The text of a message, which may come in parts."""
    key = "value" if "value" in message.fields else "content"
    parts = message.fields.get(key, "missing")
    if parts is None:
        raise Dropped("with null for a message")
    if not isinstance(parts, list):
        return message.text(key, may_be_blank=True)
    rows = [as_row(message.path, message.line, part, "a part of a message") for part in parts]
    if any(part.fields.get("type", "text") != "text" for part in rows):
        raise Dropped("with images or other parts that are not text")
    counts["messages of several parts merged"] += len(rows) > 1
    return "\n".join(part.text("text", may_be_blank=True) for part in rows)


def read_transcript(row: Row, key: str) -> list[Turn]:
    """The turns of a dialogue in a single text, as in HH; what precedes them is a system prompt."""
    text = "\n\n" + row.text(key).lstrip("\n")
    before, *parts = re.split(f"({HUMAN}|{ASSISTANT}|{SYSTEM})", text)
    if ASSISTANT not in parts:
        expected = r'\n\nHuman: … \n\nAssistant: … in both, or a "prompt"'
        raise row.error(f'"{key}" is no dialogue', expected)
    system = [(SYSTEM, f" {before.strip()}")] if before.strip() else []
    return system + list(zip(parts[::2], parts[1::2], strict=True))


def read_earlier(row: Row) -> list[Turn]:
    """The system prompt, and under "history" pairs of a question and its answer."""
    given = [key for key in ("system", "system_prompt") if key in row.fields]
    turns, history = [(SYSTEM, f" {row.text(key)}") for key in given], row.fields.get("history", [])
    if not isinstance(history, list) or any(type(x) is not list or len(x) != 2 for x in history):
        raise row.error('"history" is no list of turns', "pairs [question, answer]")
    pairs = [{"input": question, "output": answer} for question, answer in history]
    return turns + read_turns(row._replace(fields={"history": pairs}), "history", Counter())


def read_prompt(row: Row, counts: Counts, keys: Sequence[str] = PROMPTS) -> list[Turn]:
    """All that precedes the reply; what an instruction is about stands below it."""
    key = next((key for key in keys if key in row.fields), "prompt")
    if key == "instruction":
        own = [key, *(extra for extra in ("input", "context") if extra in row.fields)]
        return [*read_earlier(row), (PLAIN, " " + "\n\n".join(map(row.text, own)))]
    turns = read_turns(row, key, counts, None if key in CHATS else PLAIN)
    if not turns:
        raise Dropped("without a prompt")
    return read_earlier(row) + turns


def transcript(turns: list[Turn]) -> str:
    return "".join(t[1][1:] if is_laid_out(t) else (t[0] or HUMAN) + t[1] for t in turns)


def is_laid_out(turn: Turn) -> bool:
    """Whether it is a string that is a dialogue up to where the assistant speaks."""
    tags = re.findall(f"{HUMAN}|{ASSISTANT}", "\n\n" + turn[1].lstrip())
    return turn[0] == PLAIN and HUMAN in tags and tags[-1] == ASSISTANT


def lay_out(prompt: list[Turn], dialogue: bool) -> str:
    """The prompt as text: as a dialogue, or just what it says."""
    if not dialogue:
        return "".join(text.removeprefix(" ") for _, text in prompt)
    return transcript(prompt) + ASSISTANT * (not is_laid_out(prompt[-1]))


# ---- formats: the examples in one row ----


def read_reply(row: Row, counts: Counts) -> Iterator[Example]:
    """A prompt and its completion, which may be messages; or an instruction and its output."""
    check_label(row)
    key = next((key for key in ("completion", "output") if key in row.fields), "response")
    before = read_prompt(row, counts)
    return each_reply(before + read_turns(row, key, counts, ASSISTANT), len(before))


def read_dialogue(row: Row, counts: Counts) -> Iterator[Example]:
    """Messages, of which each reply is to be learnt; or a prompt alone."""
    check_label(row)
    return each_reply(read_prompt(row, counts, (*CHATS, "prompt")))


def check_label(row: Row) -> None:
    """Drops a row whose reply is marked as a bad one, as KTO's data sets do."""
    labels = [str(row.fields.get(name)).lower() for name in ("label", "kto_tag")]
    if {"false", "0", "0.0"}.intersection(labels):
        raise Dropped("with the label false")


def each_reply(turns: list[Turn], start: int = 0) -> Iterator[Example]:
    """An example for each reply from `start` on, and for a last question without a reply."""
    for i, (tag, text) in enumerate(turns):
        if tag == ASSISTANT and i >= start:
            yield Example(turns[:i], [text], [1])
    if turns[-1][0] != ASSISTANT:
        yield Example(turns, [], [])


def read_text(row: Row, counts: Counts) -> Iterator[Example]:
    if "parent_id" in row.fields:
        raise row.error("a message without its dialogue", "a dialogue a row, as in *.trees.jsonl")
    document = row.text("text").replace("\r\n", "\n")
    counts["characters"] += len(document)
    yield Example([], [], [], document)


def read_snippet(row: Row, counts: Counts) -> Iterator[Example]:
    """A line of text, whose first words are the prompt and whose others the response."""
    words = [f" {word}" for word in row.text("snippet").split()]
    if len(words) < 2 * PROMPT_WORDS:
        raise Dropped("too short to be continued,")
    prompt, response = "".join(words[:PROMPT_WORDS]), "".join(words[PROMPT_WORDS:])
    yield Example([(PLAIN, prompt)], [f" {response}"], [1], row.text("snippet"))


def read_ranked(row: Row, counts: Counts) -> Iterator[Example]:
    """Our own comparisons, or responses with scores, of which the highest is best."""
    prompt, responses = read_prompt(row, counts), row.fields.get("responses")
    if isinstance(responses, list) and [type(text) for text in responses] in ([], [str]):
        raise Dropped("with fewer than two replies")
    ranks, scores = row.fields.get("ranks"), row.fields.get("scores")
    if isinstance(ranks, list):  # a table program makes whole numbers floats
        ranks = [int(r) if type(r) is float and r.is_integer() else r for r in ranks]
        row.fields.update(ranks=ranks)
    elif "scores" in row.fields and "ranks" not in row.fields:
        if not are_numbers(scores, responses):
            raise row.error('"scores" is no list of numbers', "a score for each of the responses")
        counts["ranked by score"] += 1
        # equal scores have the best of their ranks, which comes last
        rank = dict(zip(sorted(scores), range(len(scores), 0, -1), strict=True))
        row.fields.update(ranks=[rank[score] for score in scores])
    elif "ranks" not in row.fields:
        named = filter(re.compile("rank|rating|score|reward|grade|order").search, row.fields)
        if other := [key for key in named if are_numbers(row.fields[key], responses)]:
            expected = f'"ranks" (1 is best) or "scores" (the highest is best): rename "{other[0]}"'
            raise row.error('the responses have neither "ranks" nor "scores"', expected)
        counts["taken to be best first"] += 1
    texts, ranks = ranked_responses(row)
    if len({text.strip() for text in texts}) == 1:
        raise Dropped("without signal")
    apart = len({*zip(texts, ranks, strict=True)}) > len({*texts})
    counts["with equal replies ranked apart kept"] += apart
    if are_numbers(scores, texts):
        share, _, n = pair_accuracy([scores], [ranks])
        counts["with scores against the ranks, which stand"] += n > 0 and share < 1
    yield Example(prompt, [f" {text}" for text in texts], ranks)


def read_graded(row: Row, counts: Counts) -> Iterator[Example]:
    """Replies that are objects with a text and a score or a rank."""
    key = "completions" if "completions" in row.fields else "answers"
    replies = x if isinstance(x := row.fields.get(key, []), list) else [x]
    replies = [as_row(row.path, row.line, reply, f'a reply of "{key}"') for reply in replies]
    for ours, name in GRADED[key].items():
        row.fields[ours] = [reply.fields.get(name) for reply in replies]
    return read_ranked(row, counts)


def are_numbers(values: object, responses: object) -> bool:
    """Whether this is a list of a finite number for each response."""
    if not isinstance(values, list) or not isinstance(responses, list):
        return False
    numbers = [x for x in values if type(x) is int or (type(x) is float and math.isfinite(x))]
    return len(numbers) == len(values) == len(responses)


def read_pair(row: Row, counts: Counts) -> Iterator[Example]:
    """A chosen and a rejected reply to a prompt, or two dialogues that end in them."""
    prompt, chosen, rejected = split(*(read_side(row, side, counts) for side in SIDES))
    if chosen.strip() == rejected.strip():
        raise Dropped("without signal")
    if not chosen.strip():  # a preferred silence would teach PPO to say nothing
        raise Dropped("with an empty chosen reply")
    counts["with an empty rejected reply kept"] += not rejected.strip()
    counts["with further turns in a reply kept"] += has_turns(chosen) or has_turns(rejected)
    pairs = [[row.fields.get(name.format(side)) for side in SIDES] for name in SCORES]
    scores = next((pair for pair in pairs if pair != [None, None]), [1, 0])
    if not are_numbers(scores, [chosen, rejected]):
        wrong = (
            f"the chosen reply has the score {scores[0]!s:.20}, the rejected one {scores[1]!s:.20}"
        )
        raise row.error(wrong, "a number for each, or for neither")
    tied = scores[0] == scores[1]
    counts["with equal scores tied"] += tied
    counts["with a lower score for the chosen reply, which stands"] += scores[0] < scores[1]
    yield shuffled(prompt, [chosen, rejected], [1, 1 if tied else 2])


def read_side(row: Row, side: str, counts: Counts) -> list[Turn]:
    """The dialogue that ends in the chosen, or in the rejected, reply."""
    reply, has_prompt = row.fields.get(side), bool(row.fields.keys() & set(PROMPTS))
    if isinstance(reply, str) and (not has_prompt or reply.startswith(HUMAN)):
        turns = read_transcript(row, side)
    elif not (turns := read_turns(row, side, counts, ASSISTANT)) or turns[-1][0] != ASSISTANT:
        raise Dropped("without a reply")
    if turns[0][0] == ASSISTANT:  # the reply alone
        return read_prompt(row, counts) + turns
    if side == "chosen" and row.fields.get("prompt"):
        tag, asked = read_prompt(row, counts, ["prompt"])[-1]
        other = (tag + asked).strip() not in transcript(turns)
        counts["with another prompt than their dialogues, which stand"] += other
    return read_earlier(row) + turns


def split(a: list[Turn], b: list[Turn]) -> tuple[list[Turn], str, str]:
    """The prompt that two dialogues share, and the reply with which each goes on.

    Each side's last reply would not do: where a reply holds turns of its own, the prompts differ.
    """
    shared = len(os.path.commonprefix([a, b]))
    at = min(shared, len(a) - 1, len(b) - 1)  # the first turns that differ, if they are replies
    while at >= 0 and not a[at][0] == b[at][0] == ASSISTANT:
        at -= 1
    if at < 0:
        raise Dropped("diverging")
    return a[:at], *(turns[at][1] + transcript(turns[at + 1 :]) for turns in (a, b))


def has_turns(reply: str) -> bool:
    return HUMAN in reply or ASSISTANT in reply


def shuffled(prompt: list[Turn], responses: list[str], ranks: list[int]) -> Example:
    """In random order, so that nothing can learn a rank from a place in the list."""
    order = list(range(len(ranks)))
    seed = lay_out(prompt, dialogue=any(tag for tag, _ in prompt))
    random.Random(seed).shuffle(order)  # the same row always comes out in the same order
    return Example(prompt, [responses[i] for i in order], [ranks[i] for i in order])


def read_tree(row: Row, counts: Counts) -> Iterator[Example]:
    """Every message of a person with two or more ranked replies."""
    tree = as_row(row.path, row.line, row.fields.get("prompt"), '"prompt"')
    waiting: list[tuple[Row, list[Turn]]] = [(tree, [])]  # a thread may be deeper than the stack
    while waiting:
        message, before = waiting.pop()
        if (role := message.text("role")) not in ("prompter", "assistant"):
            raise message.error('"role" is unknown', "prompter or assistant")
        turns = [*before, (TAGS[role], " " + message.text("text"))]
        replies = standing_replies(message, counts)
        ranked = [(reply, rank) for reply, rank in replies if rank is not None]
        if role == "prompter" and replies:
            counts["groups of replies"] += 1
            if len(ranked) < 2:
                counts["groups with fewer than two ranks dropped"] += 1
            else:
                counts["replies without a rank dropped"] += len(replies) - len(ranked)
                counts["groups in synthetic trees kept"] += tree.fields.get("synthetic") is True
                texts = [" " + reply.text("text") for reply, _ in ranked]
                yield shuffled(turns, texts, [rank + 1 for _, rank in ranked])
        waiting += [(reply, turns) for reply, _ in reversed(replies)]


def standing_replies(message: Row, counts: Counts) -> list[tuple[Row, int | None]]:
    """The replies that reviewers let stand, each with its rank, 0 is best, if it has one."""
    replies = message.fields.get("replies", [])
    if not isinstance(replies, list):
        raise message.error('"replies" is no list', "a list of messages")
    rows = [as_row(message.path, message.line, reply) for reply in replies]
    kept = [r for r in rows if not r.fields.get("deleted") and r.fields.get("review_result", True)]
    counts["deleted or rejected replies dropped"] += len(rows) - len(kept)
    ranks = [reply.fields.get("rank") for reply in kept]
    if any(r is not None and (type(r) is not int or not 0 <= r < MAX_RANK) for r in ranks):
        raise message.error('a "rank" is no rank', "whole numbers, 0 is best")
    return list(zip(kept, ranks, strict=True))


class Format(NamedTuple):
    name: str
    keys: set[str]
    read: Callable[[Row, Counts], Iterator[Example]]
    unread: Sequence[str] = ()  # further keys that rows have


FORMATS = [  # a row is of the first whose keys it has; a dot leads into an object
    Format("responses with ranks or scores", {"prompt", "responses"}, read_ranked),
    Format("responses with ranks or scores", {"responses"}, read_ranked),
    Format("chosen and rejected replies", {"prompt", *SIDES}, read_pair),
    Format("chosen and rejected replies", {"instruction", *SIDES}, read_pair),
    Format("chosen and rejected replies", {"question", *SIDES}, read_pair),
    Format("UltraFeedback", {"completions.overall_score"}, read_graded),
    Format("Nectar", {"answers.rank"}, read_graded),
    Format("chosen and rejected dialogues, as in HH", {"chosen", "rejected"}, read_pair),
    Format("OpenAssistant trees", {"prompt.replies"}, read_tree),
    Format("snippets of text", {"snippet"}, read_snippet),
    Format("prompts with completions", {"prompt", "completion"}, read_reply),
    Format("demonstrations", {"prompt", "response"}, read_reply),
    Format("chat messages", {"messages"}, read_dialogue),
    Format("ShareGPT conversations", {"conversations"}, read_dialogue),
    Format("a conversation", {"conversation"}, read_dialogue),
    Format("instructions with outputs", {"instruction", "output"}, read_reply),
    Format("instructions with responses", {"instruction", "response"}, read_reply),
    Format("questions with responses", {"question", "response"}, read_reply),
    Format("prompts", {"prompt"}, read_dialogue),
    Format("texts", {"text", "parent_id"}, read_text),
    Format("texts", {"text"}, read_text),
]
