"""Byte-pair encoding: the rules by which new words are reached in a vocabulary that has rules of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

Rule = tuple[str, str]
_NONE = sys.maxsize  # the rank of what is no rule


class Rules:
    """Makes the rules of BPE by which new words are reached. `new` are in the order in which they apply."""

    def __init__(
        self, model: Mapping[str, Any], merges: Sequence[Rule], words: Collection[str], ids: Collection[str]
    ) -> None:
        self.ranks = {rule: rank for rank, rule in enumerate(merges)}
        self.words = words
        self.ids = ids
        self.joined = joining(model)
        self.prefix: str = model.get("continuing_subword_prefix") or ""
        self.suffix: str = model.get("end_of_word_suffix") or ""
        self.new: list[Rule] = []

    def take(self, merges: Sequence[Rule]) -> None:
        """Takes over what makes a new word of two tokens."""
        for rule in merges:
            self.add(rule)

    def complete(self) -> list[str]:
        """Adds rules that join what is left in pieces, as long as that makes new words; returns those not reached."""
        left = list(self.words)
        while True:
            before = len(self.new)
            split = {word: pieces for word in left if len(pieces := self.pieces(word)) > 1}
            for pieces in split.values():
                for rule in pairwise(pieces):
                    self.add(rule)
            left = list(split)
            if len(self.new) == before:
                return left

    def add(self, rule: Rule) -> None:
        if self.joined(*rule) in self.words and rule not in self.ranks and all(part in self.ids for part in rule):
            self.ranks[rule] = len(self.ranks)
            self.new.append(rule)

    def pieces(self, word: str) -> list[str]:
        """What a word is split into; always the leftmost of the rules of lowest rank applies first."""
        pieces = self.letters(word)
        rank = self.ranks.get
        ranks = [rank(rule, _NONE) for rule in pairwise(pieces)]
        while ranks and (lowest := min(ranks)) < _NONE:
            at = ranks.index(lowest)
            pieces[at : at + 2] = [self.joined(pieces[at], pieces[at + 1])]
            del ranks[at]
            if at > 0:
                ranks[at - 1] = rank((pieces[at - 1], pieces[at]), _NONE)
            if at < len(ranks):
                ranks[at] = rank((pieces[at], pieces[at + 1]), _NONE)
        return pieces

    def letters(self, word: str) -> list[str]:
        """The tokens of single letters that a word begins as."""
        begins = not self.prefix or not word.startswith(self.prefix)
        ends = bool(self.suffix) and word.endswith(self.suffix)
        letters = list(word[0 if begins else len(self.prefix) : len(word) - (len(self.suffix) if ends else 0)])
        if self.prefix:
            letters = [letter if begins and i == 0 else self.prefix + letter for i, letter in enumerate(letters)]
        if ends and letters:
            letters[-1] += self.suffix
        return letters


def joining(model: Mapping[str, Any]) -> Callable[[str, str], str]:
    """What a rule of a model makes of two tokens; `model` is that part of a tokenizer.json."""
    cut = len(model.get("continuing_subword_prefix") or "")
    return (lambda a, b: a + b[cut:]) if cut else str.__add__
