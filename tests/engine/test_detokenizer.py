"""Detokenizer: stop strings across tokens, nothing of a stop emitted, and pieces that add up."""

import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.outputs import Detokenizer
from kvrelay.sampling_params import MAX_STOP_STRINGS


class FakeStream:
    """Token i is `words[i]`; a word that starts with `~` is kept back until the next token or the flush."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._kept = words, ""

    def push(self, token_ids: Iterable[int]) -> str:
        text = self._kept
        self._kept = ""
        for token in token_ids:
            word = self._words[token]
            if word.startswith("~"):
                self._kept = word[1:]
            else:
                text += word
        return text

    def flush(self) -> str:
        text, self._kept = self._kept, ""
        return text


class FakeTokenizer:
    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.prompts = words, list[list[int]]()

    def stream(self, prompt_token_ids: list[int]) -> FakeStream:
        self.prompts.append(prompt_token_ids)
        return FakeStream(self.words)


def run(words: Sequence[str], *stops: str) -> tuple[list[str], Detokenizer]:
    """Push every word as one token, the last as last; pieces and the detokenizer, until it stops."""
    detokenizer = Detokenizer(FakeTokenizer(words), [9], stops)  # type: ignore[arg-type]
    pieces = []
    for token in range(len(words)):
        pieces.append(detokenizer.push([token], is_last=token == len(words) - 1))
        if detokenizer.is_stopped:
            break
    return pieces, detokenizer


@pytest.mark.parametrize(
    ("words", "stops", "text", "is_stopped"),
    [
        (["Hello", " world"], (), "Hello world", False),
        (["Hello", " END", "x"], ("END",), "Hello ", True),
        (["Hel", "loE", "N", "D more"], ("END",), "Hello", True),
        (["a", "E", "N", "x"], ("END",), "aENx", False),
        (["a", "E", "N"], ("END",), "aEN", False),
        (["aa", "a", "b"], ("aab",), "a", True),
        (["x", "ab", "c"], ("abd", "bc"), "xa", True),
        (["one STOP two HALT"], ("HALT", "STOP"), "one ", True),
        (["STOP"], ("STOP",), "", True),
        (["x~", "\n", "\n", "y"], ("\n\n",), "x~", True),
        (["é", "日", "本"], ("日本",), "é", True),
        ([""], ("x",), "", False),
    ],
)
def test_text_ends_before_the_first_stop(
    words: list[str], stops: tuple[str, ...], text: str, is_stopped: bool
) -> None:
    pieces, detokenizer = run(words, *stops)
    assert detokenizer.text == text
    assert "".join(pieces) == text
    assert detokenizer.is_stopped is is_stopped


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    pieces, _ = run(["abc", "E", "N", "x", "EN", ""], "END", "Nope")
    assert pieces == ["abc", "", "", "ENx", "", "EN"]


def test_without_stops_everything_goes_out_at_once() -> None:
    pieces, _ = run(["a", "b", "c"])
    assert pieces == ["a", "b", "c"]


def test_the_flush_comes_with_the_last_token_and_may_complete_a_stop() -> None:
    assert run(["a", "~b"])[0] == ["a", "b"]
    pieces, detokenizer = run(["aE", "~ND"], "END")
    assert (pieces, detokenizer.is_stopped) == (["a", ""], True)


def test_an_end_without_a_token_still_flushes() -> None:
    detokenizer = Detokenizer(FakeTokenizer(["aEN"]), [], ("END",))  # type: ignore[arg-type]
    assert detokenizer.push([0], is_last=False) == "a"
    assert detokenizer.push([], is_last=True) == "EN"


def test_nothing_comes_after_a_stop() -> None:
    detokenizer = Detokenizer(FakeTokenizer(["a END", "more"]), [], ("END",))  # type: ignore[arg-type]
    assert detokenizer.push([0], is_last=False) == "a "
    assert detokenizer.push([1], is_last=True) == ""
    assert detokenizer.text == "a "


def test_the_stream_starts_from_the_prompt() -> None:
    tokenizer = FakeTokenizer([])
    Detokenizer(tokenizer, [4, 5], ())  # type: ignore[arg-type]
    assert tokenizer.prompts == [[4, 5]]


def stopped_text(pieces: Sequence[str], stops: Sequence[str]) -> str:
    """The specification: as soon as the text so far holds a stop, it ends before the leftmost."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)]
    return text


alphabet = st.text("ab", min_size=0, max_size=4)


@given(
    st.lists(alphabet, min_size=1, max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)
)
def test_any_pieces_and_stops_agree_with_the_specification(words: list[str], stops: list[str]) -> None:
    pieces, detokenizer = run(words, *stops)
    expected = stopped_text(words, stops)
    assert detokenizer.text == expected
    assert "".join(pieces) == expected, "the pieces are the text"
    sofar = ""
    for i, piece in enumerate(pieces):
        sofar += piece
        pending = "".join(words[: i + 1])
        assert detokenizer.is_stopped or pending.startswith(sofar)
        undecided = len(pending) - len(sofar)
        assert undecided < max(map(len, stops), default=1) or detokenizer.is_stopped, (
            "held back for no reason"
        )


@given(
    st.text("abc", max_size=20),
    st.text("abc", min_size=1, max_size=4),
    st.lists(st.integers(0, 20), max_size=5),
)
def test_one_stop_gives_one_text_however_it_is_cut(text: str, stop: str, cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    words = [text[a:b] for a, b in pairwise(borders)] or [""]
    pieces, detokenizer = run(words, stop)
    assert detokenizer.text == "".join(pieces) == text.partition(stop)[0]


def seconds(words: Sequence[str], stops: tuple[str, ...]) -> float:
    """CPU seconds of the last hundred tokens of many."""
    detokenizer = Detokenizer(FakeTokenizer(words), [], stops)  # type: ignore[arg-type]
    for token in range(len(words) - 100):
        detokenizer.push([token], is_last=False)
    begin_s = time.thread_time()
    for token in range(len(words) - 100, len(words)):
        detokenizer.push([token], is_last=False)
    assert not detokenizer.is_stopped
    return time.thread_time() - begin_s


@pytest.mark.parametrize("start", ["a b", ""])
def test_text_that_repeats_the_start_of_a_stop_costs_as_much_as_any_other(start: str) -> None:
    words = ["a "] * 700
    hostile = tuple(start + "a " * 510 + chr(98 + number) for number in range(MAX_STOP_STRINGS))
    harmless = tuple("z" * 1000 + chr(98 + number) for number in range(MAX_STOP_STRINGS))
    assert min(seconds(words, hostile) for _ in range(3)) < 10 * min(
        seconds(words, harmless) for _ in range(3)
    )


def test_what_comes_before_the_fewest_tokens_is_not_held_back() -> None:
    detokenizer = Detokenizer(FakeTokenizer(["xE", "ND", "END"]), [], ("END",))  # type: ignore[arg-type]
    assert detokenizer.push([0], is_last=False, may_stop=False) == "xE"
    assert detokenizer.push([1], is_last=False) == "ND"
    assert (detokenizer.push([2], is_last=False), detokenizer.is_stopped) == ("", True)
