"""Prompts whose answers are known: needles by depth, and six of RULER's tasks (arXiv 2404.06654), as tokens.

RULER's definitions and scoring (share of the expected strings that occur in the answer), in our own words.
A sample is one context and questions, each asked after some of its tokens, a whole number of selection
groups: what a prompt that ends there would have been asked. So one prefill serves several lengths.
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
HALVES = tuple((depth, depth + 50) for depth in DEPTHS[:5])
NEEDLES: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {
    (4096, 6144, 7424): HALVES,
    (1024, 2048): HALVES,
    (1024,): ((0, 62), (22, 82), (42,)),  # what comes first takes a twentieth of it
    (4096,): ((5, 55), (35, 75), (95,)),
    (6144,): ((25, 85),),
}  # by the lengths that a context is asked at, the depths of its needles: at every length all of DEPTHS
NUM_ASKED = 5  # of the many needles of a multikey context, at each length
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
    """What is asked after the context's first `length` tokens; the strings its answer should hold.

    `label` is its own among the questions of that length.
    """

    length: int
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


class Draw(random.Random):
    """What a sample is drawn with; `number` counts samples of one task, for what must come evenly."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(name)
        self.number = number


class Writer:
    """Builds samples for one tokenizer, reproducibly."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._opening, self._closing = self._chat()

    def sample(self, name: str, lengths: Sequence[int], seed: int) -> Sample:
        """Task `name` of `TASKS`, in a context of the last of `lengths`, asked at each of them.

        Lengths ascend; each is rounded down to a whole group. Tasks not in `NESTED` take one.
        """
        assert len(lengths) == 1 or name in NESTED
        whole = [length // GROUP_TOKENS * GROUP_TOKENS for length in lengths]
        return TASKS[name](self, whole, Draw(f"{name}/{seed}", seed))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text within a prompt."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def question(
        self, length: int, ask: str, begin: str, expected: Sequence[str], label: str = ""
    ) -> Question:
        """A question, and the beginning of the answer that the model goes on with."""
        tokens = self.encode(f"\n\n{ask}{self._closing}{begin}")
        return Question(length=length, token_ids=tokens, expected=tuple(expected), label=label)

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
    ) -> tuple[list[int], dict[int, range]]:
        """Filler of `num_tokens` in all, with each needle between two pieces at its depth in percent.

        Also where each needle came to lie, by that depth.
        """
        opening = self.encode(self._opening + task)
        planted = {depth: self.encode(needle) for depth, needle in needles.items()}
        room = num_tokens - len(opening) - sum(map(len, planted.values()))
        waiting, tokens, used, places = sorted(planted), list(opening), 0, dict[int, range]()
        for piece in filler:
            while waiting and used >= room * waiting[0] / 100:
                depth = waiting.pop(0)
                places[depth] = range(len(tokens), len(tokens) + len(planted[depth]))
                tokens += planted[depth]
            piece_tokens = self.encode(piece)[: room - used]
            tokens, used = tokens + piece_tokens, used + len(piece_tokens)
            if used == room:
                break
        assert not waiting, f"{num_tokens} tokens had no room for depths {waiting}"
        if len(tokens) != num_tokens:
            raise ValueError(f"the filler gives {len(tokens)} tokens; needed {num_tokens}")
        return tokens, places

    def _chat(self) -> tuple[str, str]:
        """What the model's template puts before and after a user's message."""
        template = self._tokenizer.apply_chat_template([{"role": "user", "content": "\x01"}])
        before, _, after = template.partition("\x01")
        return before, after


def _keys(draw: Draw, count: int) -> list[str]:
    pairs = [f"{a}-{b}" for a in WORDS for b in WORDS if a != b]
    return draw.sample(pairs, count)


def _number(draw: Draw) -> str:
    return str(draw.randrange(1_000_000, 10_000_000))


def _needle_text(key: str, value: str) -> str:
    return f" One of the special magic numbers for {key} is: {value}. "


def _number_question(writer: Writer, length: int, key: str, value: str, label: str = "") -> Question:
    ask = f"What is the special magic number for {key} mentioned in the provided text?"
    begin = f"The special magic number for {key} mentioned in the provided text is"
    return writer.question(length, ask, begin, [value], label)


_MEMORISE = (
    "Some special magic numbers are hidden in the following text. Memorise them: I will ask for one.\n"
)


def _needle(writer: Writer, lengths: Sequence[int], draw: Draw) -> Sample:
    """One or two needles with keys of their own in prose, at depths of `NEEDLES` by turns.

    At every length each needle that lies within it is asked for; `label` is its depth there, as the nearest
    of `DEPTHS`.
    """
    places = NEEDLES.get(tuple(lengths), HALVES)
    planted = places[draw.number % len(places)]
    keys = dict(zip(planted, draw.sample(WORDS, len(planted)), strict=True))
    values = {depth: str(draw.randrange(10_000, 100_000)) for depth in planted}
    prose = (TEXTS / "prose.txt").read_text().split("\n")
    filler = [line + "\n" for line in prose[draw.randrange(20) :] if line.strip()]
    context, found = writer.with_needles(
        "Some secret numbers are hidden in the following text. Memorise them: I will ask for one.\n",
        filler,
        {depth: f"\nThe secret number of {keys[depth]} is {values[depth]}.\n" for depth in planted},
        lengths[-1],
    )
    questions = [
        writer.question(
            length,
            f"What is the secret number of {keys[depth]}?",
            f"The secret number of {keys[depth]} is",
            [values[depth]],
            str(DEPTHS[found[depth].start * len(DEPTHS) // length]),
        )
        for length in lengths
        for depth in planted
        if found[depth].stop <= length
    ]
    return Sample(context=context, questions=tuple(questions), max_tokens=8)


def _niah_single_1(writer: Writer, lengths: Sequence[int], draw: Draw) -> Sample:
    """One needle in a repeated sentence."""
    key, value, (length,) = _keys(draw, 1)[0], _number(draw), lengths
    needle = {draw.randrange(0, 100): _needle_text(key, value)}
    context, _ = writer.with_needles(_MEMORISE, [NOISE] * length, needle, length)
    return Sample(context=context, questions=(_number_question(writer, length, key, value),), max_tokens=16)


def _niah_multikey_2(writer: Writer, lengths: Sequence[int], draw: Draw) -> Sample:
    """Needles are all there is; a few of them are asked for."""
    keys = _keys(draw, lengths[-1] // 12)
    return _all_needles(writer, {key: _number(draw) for key in keys}, lengths, draw, 16)


def _niah_multikey_3(writer: Writer, lengths: Sequence[int], draw: Draw) -> Sample:
    """The same with UUIDs for keys and values."""
    made = [str(uuid.UUID(int=draw.getrandbits(128))) for _ in range(lengths[-1] // 20)]
    pairs = dict(zip(made[::2], made[1::2], strict=False))
    return _all_needles(writer, pairs, lengths, draw, 40)


def _all_needles(
    writer: Writer, pairs: dict[str, str], lengths: Sequence[int], draw: Draw, max_tokens: int
) -> Sample:
    needles = [_needle_text(key, value).strip() + "\n" for key, value in pairs.items()]
    context = writer.context(_MEMORISE, needles, lengths[-1])
    tokens_per_needle = len(writer.encode("".join(needles[:20]))) / 20
    questions = []
    for length in lengths:
        inside = list(pairs)[: int(length / tokens_per_needle * 0.9)]  # what surely lies before
        for label, key in enumerate(draw.sample(inside, NUM_ASKED)):
            questions.append(_number_question(writer, length, key, pairs[key], str(label)))
    return Sample(context=context, questions=tuple(questions), max_tokens=max_tokens)


def _vt(writer: Writer, lengths: Sequence[int], draw: Draw) -> Sample:
    """Variable tracking: a chain of five names that all stand for one number."""
    (length,) = lengths
    names = ["".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = str(draw.randrange(10_000, 100_000))
    lines = [f" VAR {names[0]} = {value}. "]
    lines += [f" VAR {new} = VAR {old}. " for old, new in pairwise(names)]
    depths = sorted(draw.sample(range(5, 95), 5))
    task = "Follow the chain of variable assignments hidden in the following text.\n"
    needles = dict(zip(depths, lines, strict=True))
    context, _ = writer.with_needles(task, [NOISE] * length, needles, length)
    ask = f"Find all variables that are assigned the value {value} in the text above."
    begin = f"According to the chain of assignments, five variables are assigned the value {value}, they are:"
    question = writer.question(length, ask, begin, names)
    return Sample(context=context, questions=(question,), max_tokens=30)


def _cwe(writer: Writer, lengths: Sequence[int], draw: Draw) -> Sample:
    """Common words: ten appear thirty times each among others that appear three times."""
    pool = _keys(draw, 600)
    common, rare = draw.sample(WORDS, 10), pool[: max(10, lengths[-1] // 30)]
    words = common * 30 + rare * 3
    draw.shuffle(words)
    pieces = [f"{index + 1}. {word} " for index, word in enumerate(words * 4)]
    task = (
        "Below is a numbered list of words. Some appear more often than others. Memorise the common ones.\n"
    )
    context = writer.context(task, pieces, lengths[-1])
    ask = "What are the 10 most common words in the list above?"
    begin = "The ten words that appear most often in the list are:"
    questions = [writer.question(length, ask, begin, common) for length in lengths]
    return Sample(context=context, questions=tuple(questions), max_tokens=80)


def _fwe(writer: Writer, lengths: Sequence[int], draw: Draw) -> Sample:
    """Frequent words: coded words drawn from a Zeta distribution (exponent 2); the three most frequent."""
    coded = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
    weights = [1 / (rank + 1) ** 2 for rank in range(len(coded))]
    words = draw.choices(coded, weights, k=lengths[-1])
    task = "Read the following coded text and keep count of how often each coded word appears.\n"
    context = writer.context(task, [f"{word} ... " for word in words], lengths[-1])
    ask = "What are the three most frequently appearing words in the coded text above?"
    begin = "The three words that appear most frequently are:"
    questions = [writer.question(length, ask, begin, coded[:3]) for length in lengths]
    return Sample(context=context, questions=tuple(questions), max_tokens=40)


TASKS: dict[str, Callable[[Writer, Sequence[int], Draw], Sample]] = {
    "needle": _needle,
    "niah_single_1": _niah_single_1,
    "niah_multikey_2": _niah_multikey_2,
    "niah_multikey_3": _niah_multikey_3,
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
}
NESTED = ("needle", "niah_multikey_2", "niah_multikey_3", "cwe", "fwe")
RULER = tuple(name for name in TASKS if name != "needle")
