"""Prompts whose answers are known: needles by depth, and six of RULER's tasks (arXiv 2404.06654), as tokens.

RULER's definitions and scoring (share of the expected strings that occur in the answer), in our own words.
Every sample is a context of a whole number of selection groups, so that several questions may share its KV.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kvrelay.models.tokenizer import Tokenizer
from kvrelay.sparse import GROUP_TOKENS

TEXTS = Path(__file__).parent / "texts"
DEPTHS = tuple(range(5, 100, 10))  # percent of the context before the needle
NOISE = (
    "The river runs past the mill. The miller sleeps at noon. The wheel turns slowly. Here it goes again. "
)
_WORDS = """
amber basket candle desert engine forest garden hammer island jacket kettle ladder market needle
orange pencil quarry rocket saddle timber urchin velvet window yellow zipper anchor bridge copper
dragon ember falcon goblet harbor insect jungle kernel lemon mirror nickel oyster pepper quartz
ribbon silver temple
"""
WORDS = _WORDS.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked after the context, as tokens; the strings its answer should hold; `label` names it."""

    token_ids: list[int]
    expected: tuple[str, ...]
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One context, the questions asked of it, and how many tokens an answer may have."""

    context: list[int]
    questions: tuple[Question, ...]
    max_tokens: int


def score(answer: str, expected: Sequence[str]) -> float:
    """RULER's `string_match_all`: share of the expected strings in the answer, case ignored."""
    return sum(text.lower() in answer.lower() for text in expected) / len(expected)


class Writer:
    """Builds samples for one tokenizer, reproducibly."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._opening, self._closing = self._chat()

    def sample(self, name: str, num_tokens: int, seed: int) -> Sample:
        """Task `name` of `TASKS` or `"needle"`, its context `num_tokens` rounded down to a whole group."""
        return TASKS[name](self, num_tokens // GROUP_TOKENS * GROUP_TOKENS, random.Random(f"{name}/{seed}"))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text within a prompt."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def question(self, ask: str, begin: str, expected: Sequence[str], label: str = "") -> Question:
        """A question, and the beginning of the answer that the model goes on with."""
        tokens = self.encode(f"\n\n{ask}{self._closing}{begin}")
        return Question(token_ids=tokens, expected=tuple(expected), label=label)

    def context(self, task: str, pieces: Sequence[str], num_tokens: int) -> list[int]:
        """The opening and as many pieces as there is room for; a last one is cut."""
        tokens = self.encode(self._opening + task)
        for piece in pieces:
            tokens += self.encode(piece)
            if len(tokens) >= num_tokens:
                return tokens[:num_tokens]
        raise ValueError(f"the pieces give {len(tokens)} tokens; needed {num_tokens}")

    def with_needles(
        self, task: str, filler: Sequence[str], needles: dict[int, str], num_tokens: int
    ) -> list[int]:
        """Filler of `num_tokens` in all, with each needle between two pieces at its depth in percent."""
        opening = self.encode(self._opening + task)
        planted = {depth: self.encode(needle) for depth, needle in needles.items()}
        room = num_tokens - len(opening) - sum(map(len, planted.values()))
        waiting, tokens, used = sorted(planted), list(opening), 0
        for piece in filler:
            while waiting and used >= room * waiting[0] / 100:
                tokens += planted[waiting.pop(0)]
            piece_tokens = self.encode(piece)[: room - used]
            tokens, used = tokens + piece_tokens, used + len(piece_tokens)
            if used == room:
                break
        assert not waiting, f"{num_tokens} tokens had no room for depths {waiting}"
        if len(tokens) != num_tokens:
            raise ValueError(f"the filler gives {len(tokens)} tokens; needed {num_tokens}")
        return tokens

    def _chat(self) -> tuple[str, str]:
        """What the model's template puts before and after a user's message."""
        template = self._tokenizer.apply_chat_template([{"role": "user", "content": "\x01"}])
        before, _, after = template.partition("\x01")
        return before, after


def _keys(generator: random.Random, count: int) -> list[str]:
    pairs = [f"{a}-{b}" for a in WORDS for b in WORDS if a != b]
    return generator.sample(pairs, count)


def _number(generator: random.Random) -> str:
    return str(generator.randrange(1_000_000, 10_000_000))


def _needle_text(key: str, value: str) -> str:
    return f" One of the special magic numbers for {key} is: {value}. "


def _number_question(writer: Writer, key: str, value: str, label: str = "") -> Question:
    ask = f"What is the special magic number for {key} mentioned in the provided text?"
    return writer.question(
        ask, f"The special magic number for {key} mentioned in the provided text is", [value], label
    )


_MEMORISE = (
    "Some special magic numbers are hidden in the following text. Memorise them: I will ask for one.\n"
)


def _needle(writer: Writer, num_tokens: int, generator: random.Random) -> Sample:
    """Ten needles with keys of their own, one at each depth of prose; every one is asked for."""
    keys = generator.sample(WORDS, len(DEPTHS))
    values = {key: str(generator.randrange(10_000, 100_000)) for key in keys}
    planted = {depth: (key, values[key]) for depth, key in zip(DEPTHS, keys, strict=True)}
    needles = {
        depth: f"\nThe secret number of {key} is {value}.\n" for depth, (key, value) in planted.items()
    }
    prose = (TEXTS / "prose.txt").read_text().split("\n")
    filler = [line + "\n" for line in prose[generator.randrange(20) :] if line.strip()]
    questions = [
        writer.question(
            f"What is the secret number of {key}?", f"The secret number of {key} is", [value], str(depth)
        )
        for depth, (key, value) in planted.items()
    ]
    task = "Some secret numbers are hidden in the following text. Memorise them: I will ask for one.\n"
    context = writer.with_needles(task, filler, needles, num_tokens)
    return Sample(context=context, questions=tuple(questions), max_tokens=8)


def _niah_single_1(writer: Writer, num_tokens: int, generator: random.Random) -> Sample:
    """One needle in a repeated sentence."""
    key, value = _keys(generator, 1)[0], _number(generator)
    depth = generator.randrange(0, 100)
    filler = [NOISE] * num_tokens
    context = writer.with_needles(_MEMORISE, filler, {depth: _needle_text(key, value)}, num_tokens)
    return Sample(context=context, questions=(_number_question(writer, key, value),), max_tokens=24)


def _niah_multikey_2(writer: Writer, num_tokens: int, generator: random.Random) -> Sample:
    """Needles are all there is; a few of them are asked for."""
    keys = _keys(generator, num_tokens // 12)
    return _all_needles(writer, {key: _number(generator) for key in keys}, num_tokens, generator)


def _niah_multikey_3(writer: Writer, num_tokens: int, generator: random.Random) -> Sample:
    """The same with UUIDs for keys and values."""
    made = [str(uuid.UUID(int=generator.getrandbits(128))) for _ in range(num_tokens // 20)]
    pairs = dict(zip(made[::2], made[1::2], strict=False))
    return _all_needles(writer, pairs, num_tokens, generator)


def _all_needles(
    writer: Writer, pairs: dict[str, str], num_tokens: int, generator: random.Random, num_questions: int = 5
) -> Sample:
    needles = [_needle_text(key, value).strip() + "\n" for key, value in pairs.items()]
    context = writer.context(_MEMORISE, needles, num_tokens)
    length = len(writer.encode("".join(needles[:20]))) / 20
    inside = list(pairs)[: int(num_tokens / length * 0.9)]  # what surely was not cut
    asked = generator.sample(inside, num_questions)
    questions = [_number_question(writer, key, pairs[key]) for key in asked]
    return Sample(context=context, questions=tuple(questions), max_tokens=48)


def _vt(writer: Writer, num_tokens: int, generator: random.Random) -> Sample:
    """Variable tracking: a chain of five names that all stand for one number."""
    names = ["".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = str(generator.randrange(10_000, 100_000))
    lines = [f" VAR {names[0]} = {value}. "]
    lines += [f" VAR {new} = VAR {old}. " for old, new in pairwise(names)]
    depths = sorted(generator.sample(range(5, 95), 5))
    task = "Follow the chain of variable assignments hidden in the following text.\n"
    needles = dict(zip(depths, lines, strict=True))
    context = writer.with_needles(task, [NOISE] * num_tokens, needles, num_tokens)
    ask = f"Find all variables that are assigned the value {value} in the text above."
    begin = f"According to the chain of assignments, five variables are assigned the value {value}, they are:"
    return Sample(context=context, questions=(writer.question(ask, begin, names),), max_tokens=30)


def _cwe(writer: Writer, num_tokens: int, generator: random.Random) -> Sample:
    """Common words: ten appear thirty times each among others that appear three times."""
    pool = _keys(generator, 600)
    common, rare = generator.sample(WORDS, 10), pool[: max(10, num_tokens // 30)]
    words = common * 30 + rare * 3
    generator.shuffle(words)
    pieces = [f"{index + 1}. {word} " for index, word in enumerate(words * 4)]
    task = (
        "Below is a numbered list of words. Some appear more often than others. Memorise the common ones.\n"
    )
    context = writer.context(task, pieces, num_tokens)
    question = writer.question(
        "What are the 10 most common words in the list above?",
        "The ten words that appear most often in the list are:",
        common,
    )
    return Sample(context=context, questions=(question,), max_tokens=80)


def _fwe(writer: Writer, num_tokens: int, generator: random.Random) -> Sample:
    """Frequent words: coded words drawn from a Zeta distribution (exponent 2); the three most frequent."""
    coded = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
    weights = [1 / (rank + 1) ** 2 for rank in range(len(coded))]
    words = generator.choices(coded, weights, k=num_tokens)
    task = "Read the following coded text and keep count of how often each coded word appears.\n"
    context = writer.context(task, [f"{word} ... " for word in words], num_tokens)
    question = writer.question(
        "What are the three most frequently appearing words in the coded text above?",
        "The three words that appear most frequently are:",
        coded[:3],
    )
    return Sample(context=context, questions=(question,), max_tokens=40)


TASKS: dict[str, Callable[[Writer, int, random.Random], Sample]] = {
    "needle": _needle,
    "niah_single_1": _niah_single_1,
    "niah_multikey_2": _niah_multikey_2,
    "niah_multikey_3": _niah_multikey_3,
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
}
RULER = tuple(name for name in TASKS if name != "needle")
