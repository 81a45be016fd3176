import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import byte_level_metadata, sentence_piece_metadata
from transformers import AutoTokenizer

from kvrelay.errors import InvalidRequest, ModelError
from kvrelay.models.gguf_tokenizer import tokenizer_from_metadata, write_tokenizer
from kvrelay.models.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "the <b> é"}, {"role": "assistant", "content": "in"}]


def written(directory: Path, template: str | None = None) -> Path:
    metadata = byte_level_metadata("smollm", **({"tokenizer.chat_template": template} if template else {}))
    write_tokenizer(metadata, directory, directory)
    return directory


def bare(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer(tokenizer_from_metadata(metadata, Path("t.gguf")), {}, None)


BYTE_LEVEL = bare(byte_level_metadata("smollm"))
NUM_TOKENS = len(byte_level_metadata("smollm")["tokenizer.ggml.tokens"])
SENTENCE_PIECE = bare(sentence_piece_metadata(**{"tokenizer.ggml.add_bos_token": False}))
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCE_PIECE], ids=["bytes", "sentencepiece"]
)


def streamed(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]], prompt: Sequence[int] = ()) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*(stream.push(piece) for piece in pieces), stream.flush()]


@TOKENIZERS
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30), data=st.data())
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    pieces = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    deltas = streamed(tokenizer, pieces)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert all("\ufffd" not in delta for delta in deltas) or "\ufffd" in text


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, NUM_TOKENS - 1), max_size=30))
def test_streaming_bytes_that_are_no_text(ids: list[int]) -> None:
    deltas = streamed(BYTE_LEVEL, [[token_id] for token_id in ids])
    assert "".join(deltas) == BYTE_LEVEL.decode(ids)
    assert not any(delta.endswith("\ufffd") for delta in deltas[:-1])


@TOKENIZERS
def test_half_characters_wait(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀")
    deltas = streamed(tokenizer, [[token_id] for token_id in ids])
    assert [delta for delta in deltas if delta] == ["a", "😀"]
    unfinished = streamed(tokenizer, [[token_id] for token_id in ids[:-1]])
    assert "".join(unfinished[:-1]) == "a"
    assert set(unfinished[-1]) == {"\ufffd"}


@TOKENIZERS
def test_spaces_between_words_survive(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("in the  a the")
    assert "".join(streamed(tokenizer, [[token_id] for token_id in ids])) == "in the  a the"


def test_leading_space_survives_after_a_prompt() -> None:
    prompt, answer = SENTENCE_PIECE.encode("in"), SENTENCE_PIECE.encode("the")
    assert "".join(streamed(SENTENCE_PIECE, [answer], prompt)) == " the"
    assert "".join(streamed(SENTENCE_PIECE, [answer])) == "the"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=12), text=st.text(max_size=12))
def test_output_follows_its_prompt(prompt: str, text: str) -> None:
    before, after = BYTE_LEVEL.encode(prompt), BYTE_LEVEL.encode(text)
    assert "".join(streamed(BYTE_LEVEL, [after], before)) == text


def test_flush_twice_gives_nothing_more() -> None:
    stream = BYTE_LEVEL.stream()
    stream.push(BYTE_LEVEL.encode("日")[:1])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens_are_read_and_left_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(written(tmp_path))
    ids = tokenizer.encode("<|start|>the")
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>the"


TEMPLATES = [
    "{% for m in messages %}\n  {{- m.role }}: {{ m.content | tojson }}\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}[{{ loop.index0 }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'assistant' %}{% break %}"
    "{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{% if tools %}x{% endif %}",
    "{% for m in messages %}\n{{ m.content }}\n    {% endfor %}\nend",
    "{{ messages | tojson(indent=2) }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_chat_template_equals_transformers(
    template: str, add_generation_prompt: bool, tmp_path: Path
) -> None:
    directory = written(tmp_path, template)
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert (
        Tokenizer.from_directory(directory).apply_chat_template(MESSAGES, add_generation_prompt) == expected
    )


def test_template_in_its_own_file_comes_first(tmp_path: Path) -> None:
    (written(tmp_path, "old") / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES) == "new"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.missing.deeper }}", "refused the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_template_errors_reach_the_caller(template: str, words: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(written(tmp_path, template))
    with pytest.raises(InvalidRequest, match=words):
        tokenizer.apply_chat_template(MESSAGES)


def test_broken_template_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(written(tmp_path, "{% for %}"))


def test_no_template_and_no_messages(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        BYTE_LEVEL.apply_chat_template(MESSAGES)
    with pytest.raises(InvalidRequest, match="empty"):
        Tokenizer.from_directory(written(tmp_path)).apply_chat_template([])


def test_missing_or_corrupt_tokenizer_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json.*save_pretrained"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
