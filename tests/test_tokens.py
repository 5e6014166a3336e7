"""Vocabularies: whose row each token has in each model, and output tokenizers as transformers loads them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_mergekit import DRIVER, mergekit_python
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastmerge.checkpoint import tokenizer_files
from fastmerge.errors import CheckpointError, FastmergeWarning, RecipeError
from fastmerge.marked import documents
from fastmerge.sources.rows import MEAN, PADDING, ZERO, RowMap
from fastmerge.vocabulary.setting import TokenizerSetting, TokenRow, read_tokenizer
from fastmerge.vocabulary.templates import TEMPLATES, chat_template, read_chat_template, template_in, with_template
from fastmerge.vocabulary.tokens import Tokenized, Vocabulary, vocabulary

UNION = TokenizerSetting("union", {}, 1, "recipe.yml:1")
BASE = TokenizerSetting("base", {}, 1, "recipe.yml:1")


# --- tokenizers to try ---

ENGLISH = (
    "the cat sat on the mat and the dog lay on the rug while the rain fell on the town",
    "a cat and a dog and a bird and a mouse went to town to buy a hat",
)
CODE = (
    "def matrix(rows, columns): return [[0] * columns for row in range(rows)]",
    "for row in matrix: print(row[0], row[1]); dogmatic = matrix[0][1] + 100",
)
LATIN = ("gallia est omnis divisa in partes tres, quarum unam incolunt belgae, aliam aquitani",)


def byte_level(lines: Sequence[str], size: int, *added: AddedToken) -> Fast:
    fast = Fast(BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(list(lines) * 4, trainer)
    fast.add_tokens(list(added))
    return fast


def unigram(lines: Sequence[str], size: int) -> Fast:
    fast = Fast(Unigram())
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    fast.train_from_iterator(list(lines) * 4, trainer)
    return fast


def word_piece(lines: Sequence[str], size: int) -> Fast:
    fast = Fast(WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    fast.train_from_iterator(list(lines) * 4, trainer)
    ids = [("[CLS]", fast.token_to_id("[CLS]")), ("[SEP]", fast.token_to_id("[SEP]"))]
    fast.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return fast


def words(*tokens: str) -> Fast:
    fast = Fast(WordLevel({token: id_ for id_, token in enumerate(tokens)}, unk_token=tokens[0]))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast


def saved(folder: Path, fast: Fast, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=fast, **special).save_pretrained(folder)
    return folder


def model(folder: Path, size: int | None = None) -> Tokenized:
    """A model whose tokenizer is in a folder, with as many rows as it has tokens when nothing else is said."""
    count = len(AutoTokenizer.from_pretrained(folder)) if size is None else size
    return Tokenized(folder.name, tokenizer_files(folder), count)


def written(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


class Merged(NamedTuple):
    """A vocabulary, its tokenizer as transformers loads it, and what the warnings said."""

    vocabulary: Vocabulary
    tokenizer: Any
    warned: list[str]

    @property
    def ids(self) -> dict[str, int]:
        found = self.tokenizer.get_vocab()
        return dict(sorted(found.items(), key=lambda entry: entry[1]))


@pytest.fixture
def merged(tmp_path: Path) -> Any:
    def merge(models: Sequence[Tokenized], setting: TokenizerSetting = UNION, base: int = 0) -> Merged:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FastmergeWarning)
            made = vocabulary(models, setting, base)
        said = [str(one.message) for one in caught if issubclass(one.category, FastmergeWarning)]
        folder = written(tmp_path / f"merged-{len(list(tmp_path.iterdir()))}", made.files)
        return Merged(made, AutoTokenizer.from_pretrained(folder), said)

    return merge


@pytest.fixture(scope="module")
def byte_levels(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tokenized], list[Any], Vocabulary, Fast]:
    """Three models with their tokenizers, and the union."""
    place = tmp_path_factory.mktemp("byte-level")
    pad = AddedToken("<|pad|>", special=True, normalized=False)
    folders = [
        saved(
            place / "english",
            byte_level(ENGLISH, 330, AddedToken("<x>", lstrip=True, normalized=False)),
            eos_token="</s>",
        ),
        saved(place / "code", byte_level(CODE, 340, pad, AddedToken("<y>", normalized=False)), eos_token="</s>"),
        saved(place / "latin", byte_level(LATIN, 320, pad), eos_token="</s>"),
    ]
    models = [model(folder) for folder in folders]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastmergeWarning)
        union = vocabulary(models, UNION)
    fast = Fast.from_str(union.files["tokenizer.json"].decode())
    return models, [AutoTokenizer.from_pretrained(folder) for folder in folders], union, fast


# --- a union of byte-level BPE ---


def test_a_union_has_the_ids_of_the_base_then_what_each_model_adds_in_its_order(byte_levels: Any, merged: Any) -> None:
    models, tokenizers, _, _ = byte_levels
    found = merged(models)
    expected: list[str] = []
    for tokenizer in tokenizers:
        by_id = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        expected += [token for token, _ in by_id if token not in expected]
    assert list(found.ids) == expected
    assert list(found.ids.values()) == list(range(len(expected)))
    assert found.vocabulary.tokens == found.vocabulary.size == len(expected)
    assert [map_.size for map_ in found.vocabulary.maps] == [len(expected)] * 3


TEXT = st.text(st.sampled_from("abcdeghilmnorstw ()[]=,0\n"), max_size=40) | st.lists(
    st.sampled_from(" ".join((*ENGLISH, *CODE, *LATIN)).split()), max_size=8
).map(" ".join)


@given(TEXT)
def test_a_union_splits_a_text_as_the_base_does_then_joins_neighbours_to_new_tokens(
    byte_levels: Any, text: str
) -> None:
    _, (base, *_), _, union = byte_levels
    ours, theirs = union.encode(text), base._tokenizer.encode(text)
    assert {end for _, end in ours.offsets} <= {end for _, end in theirs.offsets}
    old = [(id_, place) for id_, place in zip(ours.ids, ours.offsets, strict=True) if id_ < len(base)]
    assert set(old) <= set(zip(theirs.ids, theirs.offsets, strict=True))


@pytest.mark.parametrize("text", ENGLISH)
def test_text_of_the_base_is_split_as_by_the_base(byte_levels: Any, text: str) -> None:
    _, (base, *_), _, union = byte_levels
    assert union.encode(text).tokens == base.tokenize(text)


@pytest.mark.parametrize("text", [*ENGLISH, *CODE, *LATIN])
def test_a_union_takes_no_more_tokens_than_the_base(byte_levels: Any, text: str) -> None:
    _, (base, *_), _, union = byte_levels
    assert len(union.encode(text)) <= len(base.tokenize(text))
    assert union.decode(union.encode(text).ids) == text


def test_a_new_token_is_reached_by_its_own_text(byte_levels: Any, merged: Any) -> None:
    models, (base, *_), union, fast = byte_levels
    found = merged(models)
    lost = [token for token, id_ in found.ids.items() if id_ >= len(base) and not reached(fast, id_)]
    assert len(lost) <= 0.05 * (union.tokens - len(base))
    said = [warning for warning in found.warned if "splits elsewhere" in warning]
    assert len(said) == (1 if lost else 0)
    assert all(lost[0] in warning for warning in said)


def reached(fast: Fast, id_: int) -> bool:
    return fast.encode(fast.decode([id_], skip_special_tokens=False)).ids == [id_]


def test_a_token_whose_rules_the_base_undoes_is_reached_by_a_rule_of_its_own(tmp_path: Path, merged: Any) -> None:
    base = plain_bpe(["a", "b", "c", "ab"], [("a", "b")])
    donor = plain_bpe(["a", "b", "c", "bc", "abc"], [("b", "c"), ("a", "bc")])
    found = merged([model(saved(tmp_path / "base", base)), model(saved(tmp_path / "donor", donor))])
    assert found.tokenizer.tokenize("abc") == ["abc"]
    assert found.tokenizer.tokenize("ab") == ["ab"]
    assert found.tokenizer.tokenize("bc") == ["bc"]
    assert found.warned == []


def test_a_token_that_no_rule_can_reach_has_a_row_and_a_warning(tmp_path: Path, merged: Any) -> None:
    base = plain_bpe(["a", "b", "c", "d", "bc"], [("b", "c")])
    donor = plain_bpe(["a", "b", "c", "d", "ab", "cd", "abcd"], [("a", "b"), ("c", "d"), ("ab", "cd")])
    found = merged([model(saved(tmp_path / "base", base)), model(saved(tmp_path / "donor", donor))])
    assert found.tokenizer.tokenize("abcd") == ["a", "bc", "d"]
    assert found.ids["abcd"] == 7
    assert found.warned == [
        "no text gives the token 'abcd', which the tokenizer of 'base' splits elsewhere; the rows are there"
    ]


def test_a_token_of_letters_that_nobody_knows_has_a_row(tmp_path: Path, merged: Any) -> None:
    base, donor = plain_bpe(["a", "b"], []), plain_bpe(["a", "xy"], [])
    found = merged([model(saved(tmp_path / "base", base)), model(saved(tmp_path / "donor", donor))])
    assert found.ids == {"a": 0, "b": 1, "xy": 2}
    assert rows(found.vocabulary.maps[0]) == ["0:0", "0:1", "1:1"]


def test_ends_of_words_are_kept_apart(tmp_path: Path, merged: Any) -> None:
    def ended(vocab: Sequence[str], merges: list[tuple[str, str]]) -> Fast:
        fast = plain_bpe(vocab, merges, end_of_word_suffix="</w>")
        fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return fast

    letters = ["a", "b", "a</w>", "b</w>"]
    base = ended([*letters, "ab</w>"], [("a", "b</w>")])
    donor = ended([*letters, "ab", "abb</w>"], [("a", "b"), ("ab", "b</w>")])
    found = merged([model(saved(tmp_path / "base", base)), model(saved(tmp_path / "donor", donor))])
    assert found.tokenizer.tokenize("ab aba abb") == ["ab</w>", "ab", "a</w>", "abb</w>"]


def plain_bpe(vocab: Sequence[str], merges: list[tuple[str, str]], **options: Any) -> Fast:
    return Fast(BPE({token: id_ for id_, token in enumerate(vocab)}, merges, **options))


def test_rules_written_as_text_stay_so(tmp_path: Path, merged: Any) -> None:
    def older(folder: Path) -> Tokenized:
        path = folder / "tokenizer.json"
        said = json.loads(path.read_text())
        said["model"]["merges"] = [" ".join(rule) for rule in said["model"]["merges"]]
        path.write_text(json.dumps(said))
        return model(folder)

    base = plain_bpe(["a", "b", "c", "ab"], [("a", "b")])
    donor = plain_bpe(["a", "b", "c", "ab", "abc"], [("a", "b"), ("ab", "c")])
    found = merged([older(saved(tmp_path / "base", base)), older(saved(tmp_path / "donor", donor))])
    assert json.loads(found.vocabulary.files["tokenizer.json"])["model"]["merges"] == ["a b", "ab c"]
    assert found.tokenizer.tokenize("abc") == ["abc"]


# --- unions of other kinds ---


def test_a_union_of_word_pieces_knows_the_words_of_both(tmp_path: Path, merged: Any) -> None:
    base = saved(tmp_path / "base", word_piece(ENGLISH, 60), cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    donor = saved(tmp_path / "donor", word_piece(CODE, 120), cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    found = merged([model(base), model(donor)])
    own = AutoTokenizer.from_pretrained(base)
    assert own.get_vocab().items() <= found.ids.items()
    assert found.ids.keys() == own.get_vocab().keys() | AutoTokenizer.from_pretrained(donor).get_vocab().keys()
    assert found.tokenizer.tokenize("matrix") == ["matrix"]
    assert own.tokenize("matrix") != ["matrix"]
    assert found.tokenizer("the cat")["input_ids"] == own("the cat")["input_ids"]


def test_a_union_of_unigrams_has_the_pieces_of_both_with_their_scores(tmp_path: Path, merged: Any) -> None:
    base = saved(tmp_path / "base", unigram(ENGLISH, 60), unk_token="<unk>")
    donor = saved(tmp_path / "donor", unigram(CODE, 90), unk_token="<unk>")
    found = merged([model(base), model(donor)])
    ours, first, second = (
        json.loads(data)["model"]
        for data in (
            found.vocabulary.files["tokenizer.json"],
            *((at / "tokenizer.json").read_bytes() for at in (base, donor)),
        )
    )
    assert ours["vocab"][: len(first["vocab"])] == first["vocab"]
    assert ours["unk_id"] == first["unk_id"]
    lowest, scores = min(score for _, score in first["vocab"]), dict(second["vocab"])
    new = ours["vocab"][len(first["vocab"]) :]
    assert new == [[piece, max(scores[piece], lowest)] for piece, _ in new]
    assert {piece for piece, _ in ours["vocab"]} == {piece for piece, _ in (*first["vocab"], *second["vocab"])}
    own = AutoTokenizer.from_pretrained(base)
    assert len(found.tokenizer.tokenize(CODE[0])) < len(own.tokenize(CODE[0]))


def test_an_unknown_character_costs_what_it_did(tmp_path: Path, merged: Any) -> None:
    def of(pieces: list[tuple[str, float]]) -> Fast:
        return Fast(Unigram([("<unk>", 0.0), *pieces], unk_id=0))

    base = saved(tmp_path / "base", of([("a", -1.0), ("b", -2.0)]), unk_token="<unk>")
    donor = saved(tmp_path / "donor", of([("ab", -1.5), ("bb", -50.0)]), unk_token="<unk>")
    vocab = json.loads(merged([model(base), model(donor)]).vocabulary.files["tokenizer.json"])["model"]["vocab"]
    assert vocab == [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -1.5], ["bb", -2.0]]


def test_a_union_of_words_splits_as_both_do(tmp_path: Path, merged: Any) -> None:
    base, donor = saved(tmp_path / "base", words("?", "a", "b")), saved(tmp_path / "donor", words("?", "c", "a"))
    found = merged([model(base), model(donor)])
    assert found.tokenizer("a b c d")["input_ids"] == [1, 2, 3, 0]


def test_tokenizers_that_split_differently_are_told_of(tmp_path: Path, merged: Any) -> None:
    base = saved(tmp_path / "base", byte_level(ENGLISH, 300))
    donor = saved(tmp_path / "donor", word_piece(CODE, 100))
    found = merged([model(base), model(donor)])
    said = "the tokenizers of 'base' and 'donor' split text differently (normalizer, pre_tokenizer, model)"
    assert any(said in warning for warning in found.warned)
    assert found.tokenizer.tokenize(ENGLISH[0]) == AutoTokenizer.from_pretrained(base).tokenize(ENGLISH[0])


# --- added tokens ---


def flags(tokenizer: Any) -> dict[str, tuple[bool, bool, bool]]:
    added = tokenizer.added_tokens_decoder.values()
    return {str(token): (token.special, token.lstrip, token.normalized) for token in added}


def test_added_tokens_keep_their_flags_and_stay_whole_in_any_text(byte_levels: Any, merged: Any) -> None:
    models, _, _, _ = byte_levels
    tokenizer = merged(models).tokenizer
    assert flags(tokenizer)["<x>"] == (False, True, False)
    assert flags(tokenizer)["<|pad|>"] == (True, False, False)
    assert flags(tokenizer)["<y>"] == (False, False, False)
    around = [tokenizer.tokenize(text) for text in ("the", "cat")]
    assert tokenizer.tokenize("the <x><y>cat<|pad|>") == [*around[0], " <x>", "<y>", *around[1], "<|pad|>"]


def test_the_first_definition_of_an_added_token_is_kept_with_a_warning(tmp_path: Path, merged: Any) -> None:
    base, donor = byte_level(ENGLISH, 300), byte_level(ENGLISH, 300)
    base.add_tokens([AddedToken("<x>", lstrip=True, normalized=False)])
    donor.add_tokens([AddedToken("<x>", rstrip=True, normalized=False), AddedToken("<y>", normalized=False)])
    found = merged([model(saved(tmp_path / "base", base)), model(saved(tmp_path / "donor", donor))])
    assert found.tokenizer.added_tokens_decoder[found.ids["<x>"]].lstrip
    assert not found.tokenizer.added_tokens_decoder[found.ids["<x>"]].rstrip
    (said,) = found.warned
    assert said.startswith("the tokenizer of 'donor' defines the token '<x>' with other flags than one before it; the")


def test_added_tokens_decoder_of_older_files_says_the_same(tmp_path: Path, merged: Any) -> None:
    base = saved(tmp_path / "base", byte_level(ENGLISH, 300, AddedToken("<x>", lstrip=True, normalized=False)))
    donor = saved(tmp_path / "donor", byte_level(CODE, 300, AddedToken("<y>", special=True, normalized=False)))
    config = base / "tokenizer_config.json"
    said = json.loads(config.read_text())
    entry = {
        "content": "<x>",
        "lstrip": True,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
    config.write_text(json.dumps({**said, "added_tokens_decoder": {"300": entry}}))
    found = merged([model(base), model(donor)])
    written = json.loads(found.vocabulary.files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {token["content"]: int(id_) for id_, token in written.items()} == {
        token: found.ids[token] for token in ("<s>", "</s>", "<x>", "<y>")
    }
    assert written[str(found.ids["<x>"])]["lstrip"]
    assert written[str(found.ids["<y>"])]["special"]


def test_an_added_token_that_only_the_config_knows_is_one(tmp_path: Path, merged: Any) -> None:
    base, donor = saved(tmp_path / "base", words("?", "a")), saved(tmp_path / "donor", words("?", "a"))
    config = donor / "tokenizer_config.json"
    entry = {"content": "<late>", "special": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "added_tokens_decoder": {"2": entry}}))
    found = merged([model(base), model(donor)])
    assert found.ids == {"?": 0, "a": 1, "<late>": 2}
    assert rows(found.vocabulary.maps[1]) == ["1:0", "1:1", "1:2"]


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_the_class_that_the_config_names_loads_the_union(byte_levels: Any, merged: Any, kind: str) -> None:
    models, _, _, fast = byte_levels
    special = {f"{role}_token": "</s>" for role in ("bos", "eos", "unk", "pad")}
    config = json.dumps({"tokenizer_class": kind, **special})
    first = models[0]._replace(files={**models[0].files, "tokenizer_config.json": config.encode()})
    found = merged([first, *models[1:]])
    assert type(found.tokenizer).__name__ in (kind, "TokenizersBackend")
    assert found.ids == dict(sorted(fast.get_vocab().items(), key=lambda entry: entry[1]))
    for text in (*ENGLISH, *LATIN):
        assert found.tokenizer(text)["input_ids"] == fast.encode(text).ids


# --- whose rows ---


def rows(map_: RowMap) -> list[str]:
    """The map as text: model:row, or what stands for it."""
    assert (map_.model.dtype, map_.row.dtype) == (np.int32, np.int64)

    def said(model: int, row: int) -> str:
        if model == MEAN:
            return f"mean of {' '.join(f'{a}:{b}' for a, b in map_.means[row])}"
        return {ZERO: "zero", PADDING: "padding"}.get(model, f"{model}:{row}")

    return [said(int(model), int(row)) for model, row in zip(map_.model, map_.row, strict=True)]


@pytest.fixture
def three(tmp_path: Path) -> list[Tokenized]:
    """`all` is in all models, `one` in the first, `two` in the second alone, `both` in the last two."""
    return [
        model(saved(tmp_path / "base", words("all", "one", "some"))),
        model(saved(tmp_path / "second", words("all", "two", "some", "both"))),
        model(saved(tmp_path / "third", words("both", "all"))),
    ]


def test_a_model_that_lacks_a_token_has_the_row_of_others(three: list[Tokenized], merged: Any) -> None:
    found = merged(three)
    assert found.ids == {"all": 0, "one": 1, "some": 2, "two": 3, "both": 4}
    first, second, third = map(rows, found.vocabulary.maps)
    assert first == ["0:0", "0:1", "0:2", "1:1", "mean of 1:3 2:0"]
    assert second == ["1:0", "0:1", "1:2", "1:1", "1:3"]
    assert third == ["2:1", "0:1", "0:2", "1:1", "2:0"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("base", {"all": 0, "one": 1, "some": 2}),
        (1, {"all": 0, "two": 1, "some": 2, "both": 3}),
        (2, {"both": 0, "all": 1}),
    ],
)
def test_a_tokenizer_of_one_model_is_copied_as_it_is(
    three: list[Tokenized], merged: Any, source: Any, expected: dict[str, int]
) -> None:
    found = merged(three, TokenizerSetting(source, {}, 1, ""))
    assert found.ids == expected
    assert found.vocabulary.files == three[0 if source == "base" else source].files


def test_the_base_may_be_any_of_the_models(three: list[Tokenized], merged: Any) -> None:
    found = merged(three, BASE, base=2)
    assert found.ids == {"both": 0, "all": 1}
    assert [rows(map_) for map_ in found.vocabulary.maps] == [["2:0", "0:0"], ["1:3", "1:0"], ["2:0", "2:1"]]


def entry(model: int | None = None, token: str | int | None = None, force: bool = False) -> TokenRow:
    return TokenRow(model, token, force, "recipe.yml:9: tokenizer.tokens")


@pytest.mark.parametrize(
    ("token", "given", "expected"),
    [
        ("some", entry(), ["0:2", "1:2", "zero"]),
        ("some", entry(force=True), ["zero", "zero", "zero"]),
        ("some", entry(1), ["0:2", "1:2", "1:2"]),
        ("two", entry(2, "both"), ["2:0", "1:1", "2:0"]),
        ("two", entry(0, 2), ["0:2", "1:1", "0:2"]),
        ("all", entry(1, "two", force=True), ["1:1", "1:1", "1:1"]),
        ("<new>", entry(0, "one"), ["0:1", "0:1", "0:1"]),
        ("<new>", None, ["zero", "zero", "zero"]),
        ("both", None, ["mean of 1:3 2:0", "1:3", "2:0"]),
    ],
    ids=str,
)
def test_the_recipe_says_whose_row_a_token_has(
    three: list[Tokenized], merged: Any, token: str, given: TokenRow | None, expected: list[str]
) -> None:
    found = merged(three, TokenizerSetting("union", {token: given}, 1, ""))
    assert [rows(map_)[found.ids[token]] for map_ in found.vocabulary.maps] == expected


def test_a_token_that_the_recipe_names_is_added_and_found_in_text(three: list[Tokenized], merged: Any) -> None:
    found = merged(three, TokenizerSetting("base", {"<new>": None, "both": None, "one": None}, 1, ""))
    assert found.ids == {"all": 0, "one": 1, "some": 2, "both": 3, "<new>": 4}
    assert found.tokenizer("all<new> both")["input_ids"] == [0, 4, 3]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (entry(2), "'third' has no row for the token 'one'; name a model that has, or {kind: zero}"),
        (entry(1, "absent"), "'second' has no row for the token 'absent'"),
        (entry(1, 4), "'second' has rows 0 to 3, and so no row 4"),
        (entry(1, -1), "'second' has rows 0 to 3, and so no row -1"),
    ],
    ids=["own", "token", "id", "negative"],
)
def test_a_row_that_is_nowhere_is_an_error_at_its_place(three: list[Tokenized], given: TokenRow, fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        vocabulary(three, TokenizerSetting("base", {"one": given}, 1, ""))
    assert str(caught.value).startswith(f"recipe.yml:9: tokenizer.tokens: {fault}")


@pytest.mark.parametrize(("multiple", "size"), [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_rows_are_padded_to_a_multiple(three: list[Tokenized], merged: Any, multiple: int, size: int) -> None:
    found = merged(three, TokenizerSetting("union", {}, multiple, ""))
    assert (found.vocabulary.tokens, found.vocabulary.size) == (5, size)
    for map_ in found.vocabulary.maps:
        assert rows(map_)[5:] == ["padding"] * (size - 5)
        assert map_.size == size


def test_a_token_beyond_the_rows_of_a_model_is_missing_there(three: list[Tokenized], merged: Any) -> None:
    second = three[1]._replace(vocab_size=3)  # so it has no row for `both`
    found = merged([three[0], second, three[2]], TokenizerSetting("union", {}, 1, ""))
    assert [rows(map_)[found.ids["both"]] for map_ in found.vocabulary.maps] == ["2:0"] * 3
    found = merged([three[0], second, three[2]], TokenizerSetting(1, {}, 1, ""))
    assert found.vocabulary.size == 4, "the tokenizer is as it is"
    assert [rows(map_)[3] for map_ in found.vocabulary.maps] == ["2:0"] * 3


@pytest.mark.parametrize("make", [byte_level, unigram, word_piece])
def test_tokens_beyond_the_rows_of_the_base_are_stripped(tmp_path: Path, merged: Any, make: Any) -> None:
    fast = make(ENGLISH, 300 if make is byte_level else 60)
    fast.add_special_tokens([AddedToken("<|pad|>", normalized=False)])
    folder = saved(tmp_path / "base", fast, pad_token="<|pad|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    listed = {**config, "additional_special_tokens": ["<|pad|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(listed))
    end = fast.get_vocab_size() - 6
    found = merged([model(folder, end)], BASE)
    assert found.vocabulary.size == end == len(found.tokenizer)
    assert found.ids == {
        token: id_ for token, id_ in sorted(fast.get_vocab().items(), key=lambda one: one[1]) if id_ < end
    }
    assert max(found.tokenizer(ENGLISH[0])["input_ids"]) < end
    assert found.tokenizer.pad_token is None


def test_rows_without_a_token_are_those_of_the_model_whose_ids_they_are(tmp_path: Path, merged: Any) -> None:
    gap = Fast(WordLevel({"a": 0, "b": 3}, unk_token="a"))
    gap.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base, donor = saved(tmp_path / "base", gap), saved(tmp_path / "donor", words("a", "c"))
    found = merged([model(base, 4), model(donor)])
    assert found.ids == {"a": 0, "b": 3, "c": 4}
    assert rows(found.vocabulary.maps[0]) == ["0:0", "0:1", "0:2", "0:3", "1:1"]
    assert rows(found.vocabulary.maps[1]) == ["1:0", "0:1", "0:2", "0:3", "1:1"]
    found = merged([model(base, 4), model(donor)], TokenizerSetting("base", {"<new>": None}, 1, ""))
    assert found.ids == {"a": 0, "b": 3, "<new>": 4}, "an added token gets its own id, not one that is taken"


# --- files ---


def test_files_that_hold_the_old_vocabulary_are_left_out_of_a_union(three: list[Tokenized]) -> None:
    beside = dict.fromkeys(("vocab.json", "added_tokens.json", "special_tokens_map.json"), b"{}")
    beside |= {"merges.txt": b"", "tokenizer.model": b"", "chat_template.jinja": b"{{ messages }}"}
    base = three[0]._replace(files={**three[0].files, **beside})
    made = vocabulary([base, *three[1:]], UNION)
    assert set(made.files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    assert vocabulary([base, *three[1:]], BASE).files == base.files


def test_special_tokens_that_are_stripped_are_in_no_setting(three: list[Tokenized]) -> None:
    said = {"pad_token": {"content": "some"}, "eos_token": "all", "additional_special_tokens": ["one", "some"]}
    base = three[0]._replace(
        files={**three[0].files, "special_tokens_map.json": json.dumps(said).encode()}, vocab_size=2
    )
    made = vocabulary([base], BASE)
    assert json.loads(made.files["special_tokens_map.json"]) == {
        "eos_token": "all",
        "additional_special_tokens": ["one"],
    }


def test_the_ids_of_special_tokens_follow_the_tokenizer(three: list[Tokenized]) -> None:
    config = {
        "bos_token_id": 0,
        "eos_token_id": [0, 2],
        "pad_token_id": None,
        "text_config": {"eos_token_id": 0},
        "n": 0,
    }
    assert vocabulary(three, UNION).token_ids(config) == {}
    assert vocabulary(three, TokenizerSetting(2, {}, 1, "")).token_ids(config) == {
        "bos_token_id": 1,
        "eos_token_id": [1, 2],
        "text_config": {"eos_token_id": 1},
    }


def test_the_same_whatever_the_hash_seed(three: list[Tokenized], tmp_path: Path, byte_levels: Any) -> None:
    for place, files in enumerate(entry.files for entry in (*three, *byte_levels[0])):
        written(tmp_path / str(place), files)
    assert len({in_process(tmp_path, seed) for seed in ("0", "1", "2")}) == 1


def in_process(place: Path, seed: str) -> str:
    code = """
import hashlib, sys, warnings
from pathlib import Path
from fastmerge.checkpoint import tokenizer_files
from fastmerge.vocabulary.tokens import Tokenized, vocabulary
from fastmerge.vocabulary.setting import TokenizerSetting
warnings.simplefilter("ignore")
digest = hashlib.sha256()
for group in ("012", "345", "503"):
    models = [Tokenized(name, tokenizer_files(Path(sys.argv[1], name)), 310) for name in group]
    made = vocabulary(models, TokenizerSetting("union", {"<b>": None, "<a>": None}, 8, ""))
    for name, data in made.files.items():
        digest.update(name.encode() + data)
    for map_ in made.maps:
        digest.update(map_.model.tobytes() + map_.row.tobytes() + repr(map_.means).encode())
print(digest.hexdigest())
"""
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", code, place], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


# --- models without a tokenizer.json ---


def pieces(*entries: tuple[str, float, int]) -> bytes:
    """A sentencepiece model of some pieces: text, score, type."""

    def piece(text: str, score: float, kind: int) -> bytes:
        data = text.encode()
        body = bytes([0x0A, len(data)]) + data + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind])
        return bytes([0x0A, len(body)]) + body

    return b"".join(piece(*entry) for entry in entries) + bytes([0x12, 2, 8, 1])


OTHERS = {
    "sentencepiece": {"tokenizer.model": pieces(("?", 0.0, 2), ("<c>", 0.0, 3), ("two", -1.0, 1), ("all", -2.0, 1))},
    "vocab-and-merges": {
        "vocab.json": json.dumps({"all": 3, "two": 2, "?": 0, "<c>": 1}).encode(),
        "merges.txt": b"#version: 0.2\nt wo\n",
        "special_tokens_map.json": json.dumps({"bos_token": "<c>"}).encode(),
    },
    "lines": {
        "vocab.txt": b"?\n<c>\ntwo\nall\n",
        "special_tokens_map.json": json.dumps({"cls_token": {"content": "<c>"}}).encode(),
    },
    "lines-and-added": {"vocab.txt": b"?\r\ntwo\r\n", "added_tokens.json": b'{"all": 3, "<c>": 1}'},
}


@pytest.mark.parametrize("kind", ["sentencepiece", "vocab-and-merges", "lines"])
def test_tokens_of_a_model_without_tokenizer_json_are_read(three: list[Tokenized], merged: Any, kind: str) -> None:
    found = merged([three[0], Tokenized("other", OTHERS[kind], 4)])
    assert list(found.ids) == ["all", "one", "some", "?", "<c>", "two"]
    assert rows(found.vocabulary.maps[1]) == ["1:3", "0:1", "0:2", "1:0", "1:1", "1:2"]
    assert flags(found.tokenizer)["<c>"] == (True, False, False)


def test_a_source_without_tokenizer_json_is_copied_and_cannot_be_changed(three: list[Tokenized]) -> None:
    other = Tokenized("other", OTHERS["lines"], 4)
    assert vocabulary([other, three[0]], BASE).files == other.files
    with pytest.raises(
        CheckpointError, match=r"'other' has no tokenizer\.json, so its tokens cannot change; save it as"
    ):
        vocabulary([other, three[0]], UNION)


def test_a_model_without_a_tokenizer_is_taken_for_the_base(three: list[Tokenized], merged: Any) -> None:
    found = merged([three[0], Tokenized("bare", {}, 2)])
    assert found.warned == ["'bare' has no tokenizer: its tokens are taken for those of 'base'"]
    assert rows(found.vocabulary.maps[1]) == ["1:0", "1:1", "0:2"]
    with pytest.raises(CheckpointError, match="'bare' has no tokenizer, and the recipe asks for one"):
        vocabulary([Tokenized("bare", {}, 2), three[0]], BASE)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"tekken.json": b"{}"}, r"'bad' has no tokenizer\.json, and tekken\.json cannot be read; save it as a fast"),
        ({"tokenizer.json": b"{"}, r"the tokenizer\.json of 'bad' cannot be read \(JSONDecodeError"),
        ({"tokenizer.json": b"[" * 100_000}, r"the tokenizer\.json of 'bad' cannot be read \(RecursionError"),
        ({"tokenizer.json": b"[]"}, r"the tokenizer\.json of 'bad' cannot be read \(TypeError"),
        ({"tokenizer.json": b'{"model": {}}'}, r"the tokenizer\.json of 'bad' cannot be read \(KeyError: 'vocab'"),
        ({"tokenizer.json": b'{"model": {"vocab": {"a": "b"}}}'}, "cannot be read .*an id is not a whole number"),
        ({"tokenizer.json": b'{"model": {"vocab": {"a": 0}, "merges": ["abc"]}}'}, "cannot be read .*ValueError"),
        ({"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\n"}, r"tokenizer\.json of 'bad' is a git-LFS"),
        ({"vocab.txt": b"\xff"}, r"the vocab\.txt of 'bad' cannot be read \(UnicodeDecodeError"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, r"the tokenizer\.model of 'bad' cannot be read"),
        ({"tokenizer.model": b"\x0a"}, r"the tokenizer\.model of 'bad' cannot be read"),
        ({"vocab.txt": b"a", "tokenizer_config.json": b"[]"}, r"tokenizer_config\.json beside it is no JSON object"),
    ],
    ids=[
        "unknown-kind",
        "no-json",
        "deep",
        "no-object",
        "no-vocabulary",
        "text-as-id",
        "half-a-rule",
        "lfs-pointer",
        "no-utf8",
        "tiktoken",
        "cut",
        "config",
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_an_error(
    three: list[Tokenized], files: dict[str, bytes], fault: str
) -> None:
    with pytest.raises(CheckpointError, match=fault):
        vocabulary([three[0], Tokenized("bad", files, 4)], UNION)


# --- chat templates ---

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi.</s>\n\n### Instruction:\nBye\n\n### Response:\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi.[|endofturn|]\n[|user|]Bye\n[|assistant|]"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHello [/INST] Hi.</s>[INST] Bye [/INST]",
}
JINJA = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_every_named_format_has_its_text() -> None:
    assert RENDERED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", RENDERED)
def test_a_named_format_is_rendered_as_its_models_expect(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model", byte_level(ENGLISH, 300), bos_token="<s>", eos_token="</s>")
    out = written(tmp_path / "out", with_template(tokenizer_files(folder), TEMPLATES[name]))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == RENDERED[name]


@pytest.mark.parametrize(
    "before",
    ["nowhere", "in-the-config", "in-a-file", "in-both", "by-name", "a-processor-s", "in-config-and-processor-s"],
)
def test_a_template_lands_where_transformers_finds_it(tmp_path: Path, before: str) -> None:
    folder = saved(tmp_path / "model", byte_level(ENGLISH, 300))
    files = tokenizer_files(folder)
    config = json.loads(files["tokenizer_config.json"])
    old = "{{ messages[0].content }}, the old one"
    if before in ("in-the-config", "in-both", "in-config-and-processor-s"):
        config["chat_template"] = old
    if before == "by-name":
        config["chat_template"] = [{"name": "default", "template": old}, {"name": "tool_use", "template": "other"}]
    files["tokenizer_config.json"] = json.dumps(config).encode()
    if before in ("in-a-file", "in-both"):
        files["chat_template.jinja"] = old.encode()
    if before in ("a-processor-s", "in-config-and-processor-s"):
        files["chat_template.json"] = json.dumps({"chat_template": old}).encode()
    assert template_in(files) == (None if before == "nowhere" else old)
    out = with_template(files, JINJA)
    assert AutoTokenizer.from_pretrained(written(tmp_path / "out", out)).chat_template == JINJA
    assert template_in(out) == JINJA
    assert sum(JINJA.encode() in data for data in out.values()) == 1, "said once"
    assert not any(b"the old one" in data for data in out.values())
    assert out["tokenizer.json"] == files["tokenizer.json"]
    assert ("chat_template.jinja" in out) == (before not in ("in-the-config", "by-name"))


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (["a", "b", "b "], "b"),
        (["a", "b"], "a"),
        ([None, "b", "a"], "b"),
        (["a ", "b", "a"], "a "),
        ([None, None], None),
    ],
    ids=["most-common", "tie", "one-has-none", "as-it-is", "none"],
)
def test_auto_is_the_template_of_most_models(templates: list[str | None], expected: str | None) -> None:
    files = [{} if text is None else {"chat_template.jinja": text.encode()} for text in templates]
    assert chat_template("auto", files) == expected
    assert chat_template(JINJA, files) == JINJA


# --- the recipe ---


def fields(text: str) -> Any:
    (root,) = documents(text, "recipe.yml")
    return root.mapping()


def setting(text: str) -> TokenizerSetting | None:
    return read_tokenizer(fields(text), lambda at: at.text(), ("base", "a", "b"))


def test_what_a_recipe_says_of_the_tokenizer() -> None:
    assert setting("merge_method: linear") is None
    for source, expected in (("union", "union"), ("base", "base"), ("a", 1)):
        for text in (f"tokenizer_source: {source}", f"tokenizer: {{source: {source}}}"):
            found = setting(text)
            assert found is not None
            assert (found.source, found.tokens, found.pad_to_multiple_of) == (expected, {}, 1)
    found = setting("tokenizer: {pad_to_multiple_of: 64}")
    assert found is not None
    assert (found.source, found.pad_to_multiple_of) == ("union", 64)


def test_what_a_recipe_says_of_single_tokens() -> None:
    found = setting(
        """
tokenizer:
  source: base
  tokens:
    <own>: {source: a}
    <zero>: {source: {kind: zero}, force: true}
    <token>: {source: {kind: model_token, model: b, token: other}}
    <id>: {source: {kind: model_token, model: b, token_id: 7}, force: false}
    <there>:
    "1": {force: false}
"""
    )
    assert found is not None
    places = {token: row.place for token, row in found.tokens.items() if row is not None}
    assert found.tokens == {
        "<own>": TokenRow(1, None, False, places["<own>"]),
        "<zero>": TokenRow(None, None, True, places["<zero>"]),
        "<token>": TokenRow(2, "other", False, places["<token>"]),
        "<id>": TokenRow(2, 7, False, places["<id>"]),
        "<there>": None,
        "1": None,
    }
    assert places["<zero>"] == "recipe.yml:6: tokenizer.tokens.<zero>.source"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("tokenizer: union", "1: tokenizer: tokenizer must be a mapping"),
        ("tokenizer: {sorce: union}", "1: tokenizer.sorce: unknown key 'sorce'; did you mean 'source'?"),
        (
            "tokenizer: {source: base}\ntokenizer_source: base",
            "2: tokenizer_source: tokenizer and tokenizer_s",
        ),
        ("tokenizer_source: c", "1: tokenizer_source: 'c' is none of the models that are merged"),
        (
            "tokenizer_source: unoin",
            "1: tokenizer_source: 'unoin' is none of the models that are merged; did you mean 'union'?",
        ),
        (
            "tokenizer: {pad_to_multiple_of: 0}",
            "1: tokenizer.pad_to_multiple_of: pad_to_multiple_of must be 1",
        ),
        (
            "tokenizer: {pad_to_multiple_of: 1.5}",
            "1: tokenizer.pad_to_multiple_of: this must be a whole number",
        ),
        ("tokenizer: {tokens: [x]}", "1: tokenizer.tokens: this must be a mapping"),
        ("tokenizer: {tokens: {x: {source: c}}}", "1: tokenizer.tokens.x.source: 'c' is none of the models"),
        ("tokenizer: {tokens: {x: {force: true}}}", "1: tokenizer.tokens.x: force needs a source"),
        (
            "tokenizer: {tokens: {x: {source: a, force: 2}}}",
            "1: tokenizer.tokens.x.force: force must be true",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: one}}}}",
            "1: tokenizer.tokens.x.source.kind: kind must be",
        ),
        ("tokenizer: {tokens: {'': {source: a}}}", "1: tokenizer.tokens.: a token cannot be empty"),
        (
            "tokenizer: {tokens: {x: {source: {kind: zero, token: y}}}}",
            "1: tokenizer.tokens.x.source.token: unknown key 'token'",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "1: tokenizer.tokens.x.source: model_token needs model, and either token or token_id",
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: y, token_id: 1}}}}",
            "1: tokenizer.tokens.x.source: model_token needs model, and either token or token_id",
        ),
    ],
)
def test_a_mistake_is_reported_at_its_place(text: str, fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        setting(text)
    assert str(caught.value).startswith(f"recipe.yml:{fault}")


def test_what_a_recipe_says_of_the_chat_template() -> None:
    assert read_chat_template(fields("merge_method: linear")) is None
    assert read_chat_template(fields("chat_template: auto")) == "auto"
    assert read_chat_template(fields("chat_template: chatml")) == TEMPLATES["chatml"]
    assert read_chat_template(fields(f"chat_template: '{JINJA}'")) == JINJA


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("chat-ml", "'chat-ml' is neither the name nor the text of a chat template (Jinja); did you mean 'chatml'?"),
        ("'{{ messages }}'", "'{{ messages }}' is neither the name nor the text"),
        ("no template, however long it may be", "'no template, however long it may be' is neither the name"),
    ],
    ids=["name", "short", "no-jinja"],
)
def test_what_is_no_chat_template_is_an_error(text: str, fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_chat_template(fields(f"chat_template: {text}"))
    assert str(caught.value).startswith(f"recipe.yml:1: chat_template: {fault}")


# --- beside mergekit ---

HIDDEN = 8
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
LINEAR = "merge_method: linear\nbase_model: english\nmodels: [model: english, model: code, model: latin]\n"
SETTINGS = {
    "union": "tokenizer_source: union\n",
    "base": "tokenizer_source: base\n",
    "a-model": "tokenizer_source: code\n",
    "padded": "tokenizer: {source: union, pad_to_multiple_of: 64}\n",
    "a-row-of-another-model": "tokenizer: {tokens: {<|pad|>: {source: latin}, a: {source: latin, force: true}}}\n",
    "a-row-of-another-token": """
tokenizer:
  source: union
  tokens:
    </s>: {source: {kind: model_token, model: code, token: <s>}, force: true}
    <x>: {source: {kind: model_token, model: latin, token_id: 9}}
    <y>: {source: {kind: zero}}
""",
}


class Parity(NamedTuple):
    models: list[Tokenized]
    embeddings: list[np.ndarray]
    out: Path


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory, byte_levels: Any) -> Parity:
    """Each setting through mergekit, on tiny models of the three tokenizers."""
    python = mergekit_python()
    place = tmp_path_factory.mktemp("vocabularies")
    rng = np.random.default_rng(3)
    embeddings = []
    for held in byte_levels[0]:
        folder = written(place / held.name, held.files)
        (folder / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": held.vocab_size}))
        embeddings.append(rng.standard_normal((held.vocab_size, HIDDEN), np.float32))
        layer = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        layer |= {f"mlp.{name}_proj": (8, HIDDEN) for name in ("gate", "up", "down")}
        layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        tensors = {f"model.layers.0.{name}.weight": torch.ones(shape) for name, shape in layer.items()}
        tensors |= {"model.norm.weight": torch.ones(HIDDEN), "model.embed_tokens.weight": torch.tensor(embeddings[-1])}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    arguments = []
    for name, text in SETTINGS.items():
        (place / f"{name}.yml").write_text(f"{LINEAR}parameters: {{weight: 1}}\ndtype: float32\n{text}")
        arguments += [f"{name}.yml", f"out/{name}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [python, "-c", DRIVER, *arguments], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Parity(list(byte_levels[0]), embeddings, place / "out")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_rows_as_mergekit_by_token(parity: Parity, merged: Any, name: str) -> None:
    setting_ = read_tokenizer(fields(SETTINGS[name]), lambda at: at.text(), ("english", "code", "latin"))
    assert setting_ is not None
    found = merged(parity.models, setting_)
    theirs = AutoTokenizer.from_pretrained(parity.out / name)
    their_rows = load_file(parity.out / name / "model.safetensors")["model.embed_tokens.weight"].numpy()
    our_rows = np.mean([gathered(map_, parity.embeddings) for map_ in found.vocabulary.maps], axis=0)
    assert our_rows.shape == their_rows.shape
    assert found.ids.keys() == theirs.get_vocab().keys()
    base = parity.models[0].vocab_size
    assert all(found.ids[token] == id_ for token, id_ in theirs.get_vocab().items() if id_ < base)
    for token, id_ in theirs.get_vocab().items():
        np.testing.assert_allclose(our_rows[found.ids[token]], their_rows[id_], atol=1e-6, err_msg=token)
    np.testing.assert_allclose(our_rows[len(theirs) :], their_rows[len(theirs) :], atol=1e-6)


def gathered(map_: RowMap, embeddings: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((map_.size, HIDDEN), np.float32)
    for at, (model, row) in enumerate(zip(map_.model, map_.row, strict=True)):
        if model == MEAN:
            out[at] = np.mean([embeddings[one][there] for one, there in map_.means[row]], axis=0)
        elif model >= 0:
            out[at] = embeddings[model][row]
    out[map_.model == PADDING] = out[map_.model != PADDING].mean(axis=0)
    return out
