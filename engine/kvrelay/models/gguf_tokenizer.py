"""Rebuilds a Hugging Face tokenizer from GGUF metadata: byte-level BPE and SentencePiece BPE. No torch.

Split patterns: llama.cpp `src/llama-vocab.cpp` and the `tokenizer.json` each model was published with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from kvrelay.errors import ModelError

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_WORDS_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_WORDS_AND_SPACES}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteLevelStyle:
    """How text is cut before byte-level merges. `split` None means GPT-2's own pattern."""

    split: str | None = None
    single_digits: bool = False
    whole_words_first: bool = False  # a piece that is in the vocabulary skips the merges (`ignore_merges`)
    compose: bool = False  # Unicode NFC
    add_bos: bool = False  # when the file does not say


_LLAMA3_STYLE = ByteLevelStyle(split=_LLAMA3, whole_words_first=True, add_bos=True)
_DIGITS_STYLE = ByteLevelStyle(single_digits=True)
_QWEN2_STYLE = ByteLevelStyle(split=_QWEN2, compose=True)

STYLES: dict[str, ByteLevelStyle] = {
    "gpt-2": ByteLevelStyle(),
    "smollm": _DIGITS_STYLE,
    "starcoder": _DIGITS_STYLE,
    "refact": _DIGITS_STYLE,
    "llama-bpe": _LLAMA3_STYLE,
    "llama3": _LLAMA3_STYLE,
    "llama-v3": _LLAMA3_STYLE,
    "qwen2": _QWEN2_STYLE,
    "deepseek-r1-qwen": _QWEN2_STYLE,
    "tekken": ByteLevelStyle(split=_TEKKEN, whole_words_first=True, add_bos=True),
}


def write_tokenizer(metadata: Mapping[str, Any], directory: Path, source: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` (with the chat template) and `special_tokens_map.json`.

    Raises `ModelError`, naming `source`, for a tokenizer or pre-tokenizer that we cannot rebuild.
    """
    tokenizer = tokenizer_from_metadata(metadata, source)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = _special_tokens(metadata)
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = special | {
        "add_bos_token": _adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def tokenizer_from_metadata(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """Build the tokenizer a GGUF file describes; `ModelError` names `source` and what is supported."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{source}: tokenizer {kind!r} is not supported; supported: ['gpt2', 'llama']")
    if not metadata.get("tokenizer.ggml.tokens"):
        raise ModelError(f"{source}: GGUF key 'tokenizer.ggml.tokens' is missing")
    tokenizer = _byte_level(metadata, source) if kind == "gpt2" else _sentence_piece(metadata, source)
    _add_whole_tokens(tokenizer, metadata)
    tokenizer.post_processor = _post_processor(metadata, tokenizer, source)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    style = _style(metadata, source)
    tokens = metadata["tokenizer.ggml.tokens"]
    if "tokenizer.ggml.merges" not in metadata:
        raise ModelError(f"{source}: GGUF key 'tokenizer.ggml.merges' is missing")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    model = BPE(vocab=_vocabulary(tokens, source), merges=merges, ignore_merges=style.whole_words_first)
    tokenizer = Tokenizer(model)
    if style.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(style)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _style(metadata: Mapping[str, Any], source: Path) -> ByteLevelStyle:
    name = metadata.get("tokenizer.ggml.pre")
    if name not in STYLES:
        raise ModelError(f"{source}: pre-tokenizer {name!r} is not supported; supported: {sorted(STYLES)}")
    return STYLES[name]


def _vocabulary(tokens: list[str], source: Path) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError(f"{source}: {len(tokens) - len(vocabulary)} tokens of the vocabulary repeat")
    return vocabulary


def _pre_tokenizer(style: ByteLevelStyle) -> Any:
    steps: list[Any] = []
    if style.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if style.split is not None:
        steps.append(pre_tokenizers.Split(Regex(style.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style.split is None))
    return pre_tokenizers.Sequence(steps)


def _sentence_piece(metadata: Mapping[str, Any], source: Path) -> Tokenizer:
    """Build the BPE that Llama 2 and Mistral publish: spaces as U+2581, unknown characters as bytes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise ModelError(f"{source}: GGUF key 'tokenizer.ggml.scores' is missing or of another length")
    vocabulary = _vocabulary(tokens, source)
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = BPE(
        vocab=vocabulary,
        merges=merges_from_scores(vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_from_scores(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Recover merges from SentencePiece scores: each way to cut a token into two tokens, best score first.

    Same order as transformers' `generate_merges`, which its own Llama conversion uses.
    """
    found = []
    for token, index in vocabulary.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[index], left, right) for left, right in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_whole_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Keep control tokens (special) and user-defined tokens whole wherever they stand in a text."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or []
    marked = list(zip(tokens, types, strict=False))
    special = [
        AddedToken(token, normalized=False, special=True) for token, kind in marked if kind == _CONTROL
    ]
    defined = [
        AddedToken(token, normalized=False, special=False) for token, kind in marked if kind == _USER_DEFINED
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(defined)


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """SentencePiece files add a beginning-of-sequence token unless they say otherwise, as in llama.cpp."""
    style = STYLES.get(metadata.get("tokenizer.ggml.pre", ""))
    default = metadata["tokenizer.ggml.model"] == "llama" or (style is not None and style.add_bos)
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _post_processor(metadata: Mapping[str, Any], tokenizer: Tokenizer, source: Path) -> Any:
    if not _adds_bos(metadata):
        return (
            processors.ByteLevel(trim_offsets=False) if metadata["tokenizer.ggml.model"] == "gpt2" else None
        )
    bos = _special_tokens(metadata).get("bos_token")
    if bos is None:
        raise ModelError(f"{source}: add_bos_token is set but 'tokenizer.ggml.bos_token_id' is missing")
    return processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}
