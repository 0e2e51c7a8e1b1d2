"""Rows -> documents: which fields of a row are its text, and how a conversation is written down.

Conversations go through the tokenizer's own chat template, so that a model is calibrated on what it sees when it is used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, NamedTuple

from uniprune.data.rows import SPEAKER, is_conversation
from uniprune.errors import InputError, first_line

logger = logging.getLogger(__name__)

JOIN = "\n\n"
Message = dict[str, Any]


class Form(NamedTuple):
    """``fields``: what a row of this form has, in the order of a conversation. ``optional``: what it may have as well."""

    kind: Literal["text", "chat", "turns"]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMS = (  # the first whose fields are all there
    Form("text", ("text",)),
    Form("chat", ("messages",), ("system", "tools")),
    Form("chat", ("conversations",), ("system", "tools")),
    Form("chat", ("conversation",), ("system", "tools")),
    Form("turns", ("prompt", "completion"), ("system", "tools")),
    Form("turns", ("prompt", "response"), ("system", "tools")),
    Form("turns", ("prompt", "chosen"), ("system", "tools")),
    Form("turns", ("instruction", "output"), ("input", "system")),
    Form("turns", ("instruction", "response"), ("context", "input", "system")),
    Form("turns", ("question", "answer"), ("system",)),
    Form("text", ("content",)),
)
SPOKEN = SPEAKER | {"content", "value"}  # of a message; what else it has, tool calls say, goes to the template as it is
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}


DAY = date(2024, 7, 26)
SPELT = {"-d": str(DAY.day), "-m": str(DAY.month)} | {form: DAY.strftime(f"%{form}") for form in "dbBYmyaAjHMSIp"}
DATED = "{%- macro strftime_now(format) -%}{{ format"
DATED += "".join(f"|replace('%{form}', '{spelt}')" for form, spelt in SPELT.items())
DATED += " }}{%- endmacro %}"  # a template sees what it defines before what there is beside it


@dataclass
class Reader:
    """Writes the rows of one source as documents; they have the form of the first, unless they lack its field.

    wanted: the field that is the text, dots for fields in fields (``meta.text``); by default that of the first of ``FORMS``.
    tokenizer: whose chat template conversations are written in; without one their turns are joined.
    """

    wanted: str | None = None
    tokenizer: Any = None
    form: Form | None = None
    others: Sequence[str] = ()
    skipped: int = 0
    refused: int = 0
    warned: bool = False

    def choose(self, where: str, names: Sequence[str]) -> list[str]:
        """The columns that are read, of all there are. where: of what, for messages."""
        form = self._form(names, where)
        wanted = {key if key in names else key.partition(".")[0] for key in (*form.fields, *form.optional)}
        self.others = [name for name in names if name not in wanted]
        return [name for name in names if name in wanted]

    def __call__(self, rows: Iterator[tuple[str, Any]]) -> Iterator[str]:
        """The documents of rows; those without text are left out, and counted in ``skipped``; in ``refused`` those of them
        that the chat template does not take."""
        for where, row in rows:
            document = self.document(row, where)
            if document is None:
                self.skipped += 1
            else:
                yield document

    def document(self, row: Any, where: str) -> str | None:
        """The document of a row, None if it has none. Raises InputError, with what there is, if it is of another form."""
        if isinstance(row, str) and self.wanted is None:
            return row
        if self.wanted is None and is_conversation(row):
            row = {"messages": row}
        if not isinstance(row, dict):
            raise InputError(f"{where}: a row is an object with a field of text, or a string, not {_kind(row)}")
        form = self.form or self._form(list(row), where)
        if self.wanted is None and not set(form.fields) <= row.keys():  # rows of several sources in one file
            form = next((other for other in FORMS if set(other.fields) <= row.keys()), form)
        if self.form is None and self.wanted is not None and not _has(row, self.wanted):
            raise self._missing(row, where)
        values = [_at(row, name) for name in form.fields]
        if values[0] is None:
            return None
        self.form = self.form or form
        if form.kind == "text" and not (self.wanted and is_conversation(values[0])):
            return self._text(values[0], row, where, form.fields[0])
        messages = _turns(form, row, where) if form.kind == "turns" else _with_system(row, _messages(values[0], where))
        return self._written(messages, _tools(row) if "tools" in form.optional else [], where) if messages else None

    def _form(self, names: Sequence[str], where: str) -> Form:
        if self.wanted is not None:
            if not {self.wanted, self.wanted.partition(".")[0]} & set(names):
                raise self._missing(names, where)
            chat = self.wanted in ("messages", "conversations", "conversation")
            return Form("chat" if chat else "text", (self.wanted,), ("system", "tools"))
        for form in FORMS:
            if set(form.fields) <= set(names):
                return form
        raise self._missing(names, where)

    def _missing(self, names: Any, where: str) -> InputError:
        there = ", ".join(map(str, names))[:300] or "no field"
        if self.wanted is not None:
            return InputError(f'{where}: no field "{self.wanted}", only {there}; give one of them with --field')
        return InputError(f'{where}: no string field "text", only {there}; say with --field which is the text')

    def _text(self, value: Any, row: dict[str, Any], where: str, field: str) -> str:
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
        if isinstance(value, str):
            return value
        there = ", ".join([*(f"{name} ({_kind(inner)})" for name, inner in row.items()), *self.others])[:300]
        raise InputError(f'{where}: no string field "{field}", it is {_kind(value)}; say with --field which is one: {there}')

    def _written(self, messages: list[Message], tools: list[Any], where: str) -> str | None:
        if self.tokenizer is None or getattr(self.tokenizer, "chat_template", None) is None:
            if self.tokenizer is not None:
                self._warn("the tokenizer has no chat template: conversations are read as plain text, their turns joined")
            return JOIN.join(message["content"] for message in messages)
        options: dict[str, Any] = {"tools": tools} if tools else {}
        reason = ""
        for attempt in _attempts(messages):
            try:
                written: str = self.tokenizer.apply_chat_template(
                    attempt, tokenize=False, **options, **undated(self.tokenizer, tools)
                )
            except Exception as error:  # templates are programs, and say in their own ways what they do not take
                reason = reason or first_line(error)
                continue
            # Which windows begin with BOS is another question.
            return written.removeprefix(self.tokenizer.bos_token or "")
        self.refused += 1
        self._warn(f"the chat template refuses conversations, which are left out: the first is {where}: {reason}")
        return None

    def _warn(self, message: str) -> None:
        if not self.warned:
            logger.warning(message)
        self.warned = True


def undated(writer: Any, tools: Sequence[Any] = ()) -> dict[str, str]:
    """What has ``apply_chat_template`` of a tokenizer, or of a processor, write the date of one day, always the same.

    Some templates (Llama 3.2, SmolLM3, gpt-oss) tell the model what day it is: the same text would be other tokens tomorrow.
    """
    if "strftime_now" not in str(writer.chat_template):
        return {}
    named = getattr(writer, "get_chat_template", None)
    template = named(None, list(tools) or None) if named else writer.chat_template
    return {"chat_template": DATED + (template["default"] if isinstance(template, dict) else template)}


def _at(row: Any, name: str) -> Any:
    """The value of a field, which may be in another (``meta.text``), or whose name may have a dot."""
    if isinstance(row, dict) and name in row:
        return row[name]
    first, _, rest = name.partition(".")
    return _at(row[first], rest) if rest and isinstance(row, dict) and first in row else None


def _has(row: Any, name: str) -> bool:
    """Whether there is such a field, or what it would be in is null."""
    if row is None or not isinstance(row, dict) or name in row:
        return row is None or isinstance(row, dict)
    first, _, rest = name.partition(".")
    return bool(rest) and first in row and _has(row[first], rest)


def _messages(value: Any, where: str) -> list[Message]:
    """Turns in the form that chat templates take, from that or from ShareGPT's (``from``, ``value``)."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{where}: a conversation is a list of messages, not {_kind(value)}; see docs/text.md")
    messages = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        more = {name: found for name, inner in turn.items() if name not in SPOKEN and (found := _without_nulls(inner))}
        if isinstance(content, list):  # parts, of which images and the like are no text
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise InputError(f"{where}: a message needs role and content (or from and value), this has {', '.join(turn)}")
        messages.append({"role": ROLES.get(role, role), "content": content or "", **more})
    return messages


def _without_nulls(value: Any) -> Any:
    """The same without fields that are null: tables give every object all the fields that any has."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _tools(row: dict[str, Any]) -> list[Any]:
    """The tools that a conversation may call, as chat templates take them; in tables they are often JSON in a text."""
    found = _without_nulls(_parsed(row.get("tools")))
    found = [found] if isinstance(found, dict) else list(map(_parsed, found)) if isinstance(found, list) else None
    return found if isinstance(found, list) and all(isinstance(tool, dict) for tool in found) else []


def _attempts(messages: list[Message]) -> list[list[Message]]:
    """The ways to tell a template a conversation, the likeliest first, each once."""
    called, found = list(map(_with_arguments, messages)), list[list[Message]]()
    for attempt in (called, _without_system(called), messages, _without_system(messages)):
        if attempt not in found:
            found.append(attempt)
    return found


def _with_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as objects, as most templates write them; interfaces give JSON."""
    calls = _parsed(message.get("tool_calls"))
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": list(map(_called, calls))}


def _called(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    inner = {"function": _called(call["function"])} if isinstance(call.get("function"), dict) else {}
    return call | inner | ({"arguments": _parsed(call["arguments"])} if "arguments" in call else {})


def _parsed(value: Any) -> Any:
    """The object or the list that a text is the JSON of; anything else as it is."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def _turns(form: Form, row: dict[str, Any], where: str) -> list[Message]:
    """One question and its answer, each text or a conversation itself; what the question refers to stands after it."""
    asked, answer = (row.get(name) for name in form.fields)
    if isinstance(asked, list) or isinstance(answer, list):
        before = _messages([{"role": "user", "content": asked}] if isinstance(asked, str) else asked or [], where)
        after = _messages([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer or [], where)
        said, again = ([message for message in some if message["role"] != "system"] for some in (before, after))
        if said and again[: len(said)] == said:  # an answer may begin with what was asked
            before = [message for message in before if message["role"] == "system" and message not in after]
        return _with_system(row, [*before, *after])
    if not isinstance(asked, str) or not isinstance(answer, str | None):
        raise InputError(f"{where}: {' and '.join(form.fields)} are not text; say with --field which field is")
    extra = [value for name in form.optional if name not in ("system", "tools") and (value := row.get(name))]
    messages = [{"role": "user", "content": JOIN.join([asked, *map(str, extra)])}]
    messages = _with_system(row, messages)
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages


def _with_system(row: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The messages after what a field beside them tells the system, unless one of them does so itself."""
    system = row.get("system")
    if not system or not messages or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": str(system)}, *messages]


def _without_system(messages: list[Message]) -> list[Message]:
    """The same, with what the system says before what the user says first: some templates know no system."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{"role": user["role"], "content": JOIN.join([system["content"], user["content"]])}, *rest]


def _kind(value: Any) -> str:
    names: dict[type, str] = {str: "text", bytes: "text", list: "a list", dict: "an object", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number" if isinstance(value, int | float) else "no text")
