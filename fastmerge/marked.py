"""YAML text as values that know their place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from .errors import RecipeError

LARGEST = 10_000_000  # bytes of a text
_MOST = 1_000_000  # values in a document, aliases expanded
_DEEPEST = 32
_LONGEST_NUMBER = 1000  # characters: 1:0:0:0..., which counts by sixties, takes time by the square of its length
_SAID = 1000  # characters of a message, which may have text of the recipe in it


def documents(text: str, file: str) -> list[Marked]:
    """The documents of a YAML text that hold something; `file` is what errors call it."""
    if len(text) > LARGEST:
        raise RecipeError(f"the recipe has over {LARGEST // 10**6} MB; that is not a recipe", file)
    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        starts = (event for event in events if isinstance(event, yaml.DocumentStartEvent))
        nodes = [_Composer(events, file, {}).node(next(events), 0) for _ in starts]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"this is not YAML: {reason}", f"{file}:{mark.line + 1}" if mark else file) from None
    return [Marked(file, node) for node in nodes if node.value is not None]


@dataclass(frozen=True, slots=True)
class Marked:
    """A value and the way to it: its errors begin as in ``recipe.yml:4: models[1].parameters``."""

    file: str
    node: _Node
    path: str = ""

    @property
    def value(self) -> dict[str, _Node] | list[_Node] | str | bool | int | float | None:
        return self.node.value

    @property
    def place(self) -> str:
        return f"{self.file}:{self.node.line}" + (f": {self.path}" if self.path else "")

    def error(self, message: str) -> RecipeError:
        return RecipeError(f"{message:.{_SAID}}", f"{self.place:.{_SAID}}")

    def said(self) -> str:
        """The value as errors speak of it."""
        value = self.value
        return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else repr(self.node.text)

    def fields(self, known: Collection[str]) -> dict[str, Marked]:
        """The entries of a mapping that has only known keys; those without a value are as good as absent."""
        entries = self.mapping()
        for key, at in entries.items():
            if key not in known:
                raise at.error(f"unknown key {key!r}{meant(key, known)}")
        return {key: at for key, at in entries.items() if at.value is not None}

    def mapping(self) -> dict[str, Marked]:
        if not isinstance(self.value, dict):
            raise self.error(f"this must be a mapping (key: value), not {self.said()}")
        prefix = f"{self.path}." if self.path else ""
        return {key: Marked(self.file, node, prefix + printable(key)) for key, node in self.value.items()}

    def items(self) -> list[Marked]:
        if not isinstance(self.value, list):
            raise self.error(f"this must be a list, not {self.said()}")
        return [Marked(self.file, node, f"{self.path}[{i}]") for i, node in enumerate(self.value)]

    def text(self) -> str:
        if self.value is None or not self.node.text:
            raise self.error(f"this must be text, not {self.said()}")
        return self.node.text

    def integer(self) -> int:
        number = self.number()
        if number is None or not number.is_integer():
            raise self.error(f"this must be a whole number, not {self.said()}")
        return int(number)

    def number(self) -> float | None:
        """The value if it is a finite number, also one that YAML 1.1 takes for a string, such as 1e-3."""
        if isinstance(self.value, bool) or not isinstance(self.value, str | int | float):
            return None
        try:
            number = float(self.value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None


def meant(word: str, known: Collection[str]) -> str:
    """What to say after an unknown word."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it is one of {', '.join(sorted(known))}" if 0 < len(known) < 20 else ""


def printable(word: str) -> str:
    return word if word.isprintable() else repr(word)


class _Node(NamedTuple):
    value: dict[str, _Node] | list[_Node] | str | bool | int | float | None
    line: int
    size: int = 1  # values in it, aliases expanded
    text: str = ""  # of a scalar


@dataclass(frozen=True, slots=True)
class _Composer:
    """Makes nodes of parser events, so that each keeps its line and nothing is ever built from a tag."""

    events: Iterator[Any]
    file: str
    anchors: dict[str, _Node | None]

    def node(self, event: Any, depth: int) -> _Node:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            anchor = str(event.anchor)
            target = self.anchors.get(anchor)
            if target is None:
                raise self.error(line, f"the alias *{printable(anchor)} has no anchor before it, or is inside it")
            return target._replace(line=line)
        if event.tag is not None:
            raise self.error(line, f"the YAML tag {event.tag!r} has no meaning in a recipe; remove it")
        if depth > _DEEPEST:
            raise self.error(line, f"this is nested more than {_DEEPEST} deep")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = _Node(self.scalar(event, line), line, text=event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self.sequence(line, depth)
        else:
            node = self.mapping(line, depth)
        if node.size > _MOST:
            raise self.error(line, f"aliases expand this to more than {_MOST} entries")
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def sequence(self, line: int, depth: int) -> _Node:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return _Node(items, line, 1 + sum(item.size for item in items))

    def mapping(self, line: int, depth: int) -> _Node:
        entries: dict[str, _Node] = {}
        merged: dict[str, _Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if isinstance(key.value, dict | list):
                raise self.error(key.line, "a key must be plain text")
            if key.text == "<<":
                for source in value.value if isinstance(value.value, list) else [value]:
                    if not isinstance(source.value, dict):
                        raise self.error(key.line, "<< takes in a mapping, or a list of mappings")
                    merged = {**source.value, **merged}
            elif key.text in entries:
                raise self.error(key.line, f"the key {key.text!r} is already on line {entries[key.text].line}")
            else:
                entries[key.text] = value._replace(line=key.line)
        entries = {**merged, **entries}
        return _Node(entries, line, 1 + sum(entry.size for entry in entries.values()))

    def scalar(self, event: Any, line: int) -> str | bool | int | float | None:
        text: str = event.value
        tag: str = _RESOLVER.resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call]
        if tag.rpartition(":")[2] not in ("null", "bool", "int", "float"):
            return text
        try:
            if len(text) > _LONGEST_NUMBER:
                raise ValueError
            value: bool | int | float | None = _CONSTRUCTOR.construct_object(yaml.ScalarNode(tag, text))
        except ValueError:
            raise self.error(line, f"{text[:40]!r} is not a number that can be read") from None
        return value

    def error(self, line: int, message: str) -> RecipeError:
        return RecipeError(f"{message:.{_SAID}}", f"{self.file}:{line}")


_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
