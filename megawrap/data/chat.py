"""Conversations by the tokenizer's own chat template, with exactly what the assistant wrote marked as trained.

In: objects with `messages`, a list of {"role": ..., "content": ...}, and the template beside the tokenizer. Out: one
sequence per stretch of context or of assistant text, in the order of the rendered text. Spans come from the template's
`generation` blocks, or from rendering up to each turn; where neither finds them exactly, the line is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megawrap.data.fields import MESSAGES, Sequences, require_key
from megawrap.data.jsonl import KIND, LineError
from megawrap.data.tokenizer import Tokenizer
from megawrap.errors import DataError
from megawrap.io import read_json

ASSISTANT = "assistant"
Span = tuple[int, int]


class ChatTemplate:
    """A Jinja chat template in a sandbox, with what `transformers` gives templates except the clock.

    Args:
        text: the template.
        path: where it stands, for messages.
        variables: such as bos_token.

    Raises:
        DataError: it is not a template.
    """

    def __init__(self, text: str, path: Path, variables: dict[str, Any]) -> None:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.path, self.sha256 = path, hashlib.sha256(text.encode()).hexdigest()
        self._error, self._security_error = jinja2.TemplateError, jinja2.sandbox.SecurityError
        nonce = secrets.token_hex(8)
        self._open, self._close = f"open{nonce}", f"close{nonce}"
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_blocks(self._open, self._close), "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._raise
        try:
            self._template = environment.from_string(text, globals=variables)
        except self._error as error:
            raise DataError(f"{path}: the chat template cannot be compiled: {error}", corrupt=True) from error
        self.marks_spans = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template in the directory of a tokenizer: chat_template.jinja, or in tokenizer_config.json.

        Raises:
            DataError: there is none.
        """
        folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, error=DataError) if config_path.is_file() else {}
        variables = {
            name: value.get("content") if isinstance(value, dict) else value for name, value in config.items() if name.endswith("_token")
        }
        variables.setdefault("eos_token", tokenizer.eos_token)
        own = folder / "chat_template.jinja"
        if own.is_file():
            return cls(own.read_text(encoding="utf-8"), own, variables)
        found = config.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}.get("default")
        if not isinstance(found, str):
            raise DataError(
                f"{folder}: no chat template: neither chat_template.jinja nor a chat_template in tokenizer_config.json",
                hint="Take the tokenizer of a chat model, or write chat_template.jinja beside it",
            )
        return cls(found, config_path, variables)

    def _raise(self, message: str) -> NoReturn:
        raise self._error(message)

    def render(self, messages: Sequence[Any], *, prompt: bool = False, **given: Any) -> str:
        """The text of a conversation.

        Args:
            messages: as the template expects them.
            prompt: end with the opening of an assistant turn.
            given: further variables, such as `tools`.

        Raises:
            LineError: the template refuses the conversation.
            DataError: the template tries to leave its sandbox.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **given)
        except self._security_error as error:
            raise DataError(f"{self.path}: the chat template is not safe: {error}", hint="Do not use this tokenizer") from error
        except (self._error, TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError, ZeroDivisionError) as error:
            raise LineError("chat-template", f"the chat template refuses the messages: {error}") from error

    def render_marked(self, messages: Sequence[Any], **given: Any) -> tuple[str, list[Span]]:
        """The text of a conversation, and where its `generation` blocks are in it."""
        text, spans, opened = "", [], 0
        for part in re.split(f"({self._open}|{self._close})", self.render(messages, **given)):
            if part == self._open:
                opened = len(text)
            elif part == self._close:
                spans.append((opened, len(text)))
            else:
                text += part
        return text, spans


class ChatTexts:
    """Reads `messages`: the extractor of conversations.

    Args:
        template: of the tokenizer.
        first_special: the first special token in a text, as `Tokenizer.special_text`.
        policy: what becomes of special tokens that somebody wrote into a message: `allow`, `escape` or `error`.
    """

    fields: tuple[str, ...] = (MESSAGES,)
    optional = ("tools", "documents")
    width: int | None = None
    trained: tuple[bool, ...] = ()

    def __init__(self, template: ChatTemplate, first_special: Callable[[str], re.Match[str] | None], policy: str) -> None:
        self._template, self._first_special, self._policy = template, first_special, policy
        self._place = f"special{secrets.token_hex(8)}x"
        self._places = re.compile(f"{self._place}([0-9]+)z")

    def pick(self, value: dict[str, Any]) -> Sequences:
        """The sequences of a conversation.

        Raises:
            LineError: not a conversation, refused by the template, or the assistant's spans cannot be found exactly.
        """
        messages = _messages(value)
        given = {name: value[name] for name in self.optional if value.get(name) is not None}
        written: list[str] = []
        masked = [{key: item if key == "role" else self._mask(item, written) for key, item in message.items()} for message in messages]
        if written and self._policy == "error":
            raise LineError("special-token", f"the special token {written[0]!r} is spelled out in a message")
        if self._policy != "escape":
            masked = messages
        text, spans = self._spans(masked, given)
        if masked is not messages and written and self._restored(text, written) != self._text(messages, given):
            raise LineError("special-token", f"the chat template changes a message that spells out {written[0]!r}, so it cannot be escaped")
        if not any(_has_text(message) for message in messages if message["role"] == ASSISTANT):
            spans = []
        return self._sequences(text, spans, written)

    def _text(self, messages: Sequence[dict[str, Any]], given: dict[str, Any]) -> str:
        return self._template.render_marked(messages, **given)[0]

    def _mask(self, item: Any, written: list[str]) -> Any:
        """The value with every special token that is spelled out replaced by a word of its own."""
        if isinstance(item, dict):
            return {key: self._mask(inner, written) for key, inner in item.items()}
        if isinstance(item, list):
            return [self._mask(inner, written) for inner in item]
        if not isinstance(item, str):
            return item
        parts: list[str] = []
        while (found := self._first_special(item)) is not None:
            parts += [item[: found.start()], f"{self._place}{len(written)}z"]
            written.append(found.group())
            item = item[found.end() :]
        return "".join((*parts, item))

    def _restored(self, text: str, written: list[str]) -> str:
        return self._places.sub(lambda found: written[int(found[1])], text)

    def _spans(self, messages: Sequence[dict[str, Any]], given: dict[str, Any]) -> tuple[str, list[Span]]:
        text, spans = self._template.render_marked(messages, **given)
        if self._template.marks_spans:
            return text, [span for span in spans if span[0] < span[1]]
        return text, [self._turn(text, messages, number, given) for number, message in enumerate(messages) if message["role"] == ASSISTANT]

    def _turn(self, text: str, messages: Sequence[dict[str, Any]], number: int, given: dict[str, Any]) -> Span:
        """Where the turn of an assistant message is: from the end of its prompt to the special token that ends it."""
        prompt = self._template.render(messages[:number], prompt=True, **given) if number else self._opening(messages, given)
        through = self._template.render(messages[: number + 1], **given)
        content = messages[number].get("content")
        content = content.strip() if isinstance(content, str) else ""
        if not (text.startswith(through) and through.startswith(prompt)):
            raise LineError(
                "assistant-span",
                f"what the assistant wrote in message {number + 1} cannot be found: the template renders it differently in context",
            )
        at = through.rfind(content)
        if at < len(prompt):
            raise LineError(
                "assistant-span", f"what the assistant wrote in message {number + 1} is not in the rendered text as it was written"
            )
        ending = self._first_special(through[at + len(content) :])
        return len(prompt), at + len(content) + ending.end() if ending is not None else len(through)

    def _opening(self, messages: Sequence[dict[str, Any]], given: dict[str, Any]) -> str:
        """What stands before a first message of the assistant; many templates refuse to render no message."""
        content = messages[0].get("content")
        whole = self._template.render(messages[:1], **given)
        if not isinstance(content, str) or not content.strip() or whole.count(content.strip()) != 1:
            raise LineError("assistant-span", "what the assistant wrote in message 1 cannot be found exactly")
        return whole[: whole.index(content.strip())]

    def _sequences(self, text: str, spans: Sequence[Span], written: list[str]) -> Sequences:
        """The text cut at the spans, and again where a special token was written out, which is the only text not markup."""
        texts: list[str] = []
        trained: list[bool] = []
        markup: list[bool] = []
        starts: list[bool] = []
        at = 0
        for first, end, flag in [cut for span in spans for cut in ((None, span[0], False), (*span, True))] + [(None, len(text), False)]:
            if at < end or flag:
                pieces = self._places.split(text[at if first is None else first : end])
                begun = False
                for place, piece in enumerate(pieces):
                    if piece:
                        texts.append(written[int(piece)] if place % 2 else piece)
                        markup.append(place % 2 == 0)
                        trained.append(flag)
                        starts.append(not begun)
                        begun = True
            at = end
        return Sequences(tuple(texts), tuple(trained), tuple(markup), tuple(starts), special=bool(written))


def _messages(value: dict[str, Any]) -> list[dict[str, Any]]:
    require_key(value, MESSAGES)
    messages = value[MESSAGES]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else KIND[type(messages)]
        raise LineError("wrong-type", f"{MESSAGES!r} is {found}, it must be a list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise LineError("wrong-type", f"message {number} is not an object with a role")
        if not isinstance(message.get("content"), str | list | None):
            raise LineError("wrong-type", f"the content of message {number} is {KIND[type(message['content'])]}, it must be a string")
    return messages


def _has_text(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _generation_blocks(opening: str, closing: str) -> Any:
    """The extension that knows `{% generation %} ... {% endgeneration %}` and marks what stands in it."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        """Marks the output of generation blocks by two words that stand nowhere else."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            """Wrap the body of a block into a call."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{opening}{caller()}{closing}"

    return GenerationBlocks
