"""Chat templates, rendered in a sandbox with the names transformers gives them.

A template comes with the model, so it is untrusted code: Jinja's immutable sandbox runs it.
Reference: transformers `utils/chat_template_utils.py`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.errors import InvalidRequest, ModelError


class ChatTemplate:
    """One compiled template."""

    def __init__(self, text: str, source: Path) -> None:
        """Compile `text`; `ModelError` names `source` when it is not valid Jinja."""
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{source}: the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
    ) -> str:
        """Render the prompt text; `InvalidRequest` carries what the template objected to."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}") from error


def load_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Return the template of `chat_template.jinja`, else the default one of `tokenizer_config.json`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), path)
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return ChatTemplate(template, directory / "tokenizer_config.json") if isinstance(template, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML characters, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
