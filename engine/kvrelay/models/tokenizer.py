"""Text to token ids and back, and chat templates, from a Hugging Face directory. No torch or transformers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from kvrelay.errors import InvalidRequest, ModelError
from kvrelay.models.chat_template import ChatTemplate, load_chat_template
from kvrelay.models.json_file import read_json_object_if_any

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as they are, the others as characters from U+0100 on.

    Source: `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens and chat template its directory names."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], template: ChatTemplate | None
    ) -> None:
        self._backend = backend
        self._template = template
        self.special_tokens = dict(special_tokens)
        added = backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._is_byte_level = "ByteLevel" in str(backend.decoder)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json`, its config and the chat template; raises `ModelError` naming the file."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"missing file {path}; write it with kvrelay[hf] installed: "
                f"transformers.AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the bindings raise bare Exception
            raise ModelError(f"cannot read {path}: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = read_json_object_if_any(directory / "tokenizer_config.json")
        names = read_json_object_if_any(directory / "special_tokens_map.json") | config
        return cls(backend, _special_tokens(names), load_chat_template(directory, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens spelled in the text are recognised.

        Raises `InvalidRequest` for what is no text: UTF-8 carries no lone surrogates.
        """
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            raise InvalidRequest(f"the text cannot be encoded: {error}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters; a space before it counts.

        Byte-level vocabularies spell bytes as characters, SentencePiece's as `<0x0A>` and a space as U+2581.
        """
        if token_id not in self._bytes:
            self._bytes[token_id] = self._spell(token_id)
        return self._bytes[token_id]

    def _spell(self, token_id: int) -> bytes:
        spelling = self._backend.id_to_token(token_id)
        if spelling is None:  # the model may have more rows than the vocabulary
            return b""
        if token_id in self._added:
            return str(spelling).encode()
        if self._is_byte_level and all(character in _BYTES for character in spelling):
            return bytes(_BYTES[character] for character in spelling)
        if _BYTE_TOKEN.fullmatch(spelling):
            return bytes([int(spelling[3:5], 16)])
        return str(spelling).replace("\u2581", " ").encode()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest spelling in the vocabulary: no token stands for more text."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of decoded text."""
        return token_id in self._special

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render `messages` (each with `role` and `content`) to the prompt text the model was tuned on.

        Encode the result with `add_special_tokens=False`: the template writes its own. Raises `ModelError`
        when the model has no chat template and `InvalidRequest` when the template refuses the messages.
        """
        if self._template is None:
            raise ModelError("this model has no chat template; send a plain prompt instead of messages")
        if not messages:
            raise InvalidRequest("messages must not be empty")
        return self._template.render(messages, add_generation_prompt, self.special_tokens)

    def stream(self, prompt_token_ids: Sequence[int] = ()) -> "DecodeStream":
        """Return a decoder of one request's output; give the prompt's ids to keep a leading space."""
        return DecodeStream(self, prompt_token_ids)


class DecodeStream:
    """Turns the tokens of one request into text deltas that never hold half a character.

    The joined deltas equal the text of all tokens. Each step decodes only the tokens since the last complete
    text, plus those of the piece before it, because a token's text depends on its left neighbour.
    """

    _CONTEXT = 8  # prompt tokens that stand before the output

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_token_ids[-self._CONTEXT :])
        self._num_emitted = len(self._window)  # tokens of the window whose text is out

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens and return the text that is certain now; it may be empty."""
        self._window.extend(token_ids)
        delta = self._pending_text()
        if not delta or delta.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)
        return delta

    def flush(self) -> str:
        """End the stream and return what is left; bytes that never became a character come out as U+FFFD."""
        delta = self._pending_text()
        self._num_emitted = len(self._window)
        return delta

    def _pending_text(self) -> str:
        emitted = self._tokenizer.decode(self._window[: self._num_emitted])
        return self._tokenizer.decode(self._window)[len(emitted) :]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; each is stored as a string or as an object with `content`."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found
