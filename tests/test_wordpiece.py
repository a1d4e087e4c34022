# SPDX-License-Identifier: Apache-2.0
"""WordPiece follows BERT's rules to the letter, whatever the library's own tables say."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.tokenizer import Tokenizer, WordPiece, load_tokenizer
from lmjax.wordpiece import CONTROLS

SHARED = Path(__file__).parents[2] / "shared" / "data" / "fixtures"
PROSE = (
    "The unaffable fox was running; she sells sea shells, naïve CAFÉ! 中文維基, [MASK] and"
    " Ὀδυσσεύς sells them again.\n"
) * 30
VOCAB = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "un", "##aff", "##able", "runn", "##ing",
    "[", "]", "mask", "##", "中", "文", ",", "a", "##a", "οδος", "naive", "Naive", "Naïve", "aa",
    "\ue000", "$",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("wordpiece")
    WordPiece(vocab=260).build(iter([PROSE.encode()]), folder)
    return load_tokenizer(folder)


def write(path: Path, pieces: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*pieces, ""]), "utf-8")
    return path


def read(folder: Path, path: Path, **settings) -> Tokenizer:
    WordPiece(path=str(path), **settings).build(iter([]), folder)
    return load_tokenizer(folder)


@pytest.fixture
def small(tmp_path: Path) -> Tokenizer:
    return read(tmp_path / "t", write(tmp_path / "vocab.txt", VOCAB))


def spelt(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("The UNAFFABLE, running", ["the", "un", "##aff", "##able", ",", "runn", "##ing"]),
        ("ЖЖ a", ["[UNK]", "a"]),
        ("a中文a", ["a", "中", "文", "a"]),
        ("NAÏVE nai\u0308ve", ["naive", "naive"]),
        ("a\u200da\u00ada\0a\ufffd", ["aa", "##a", "##a"]),  # controls vanish, so the word goes on
        ("a\u00a0a\u3000a\u2028a\ta", ["a"] * 5),
        ("a\u0085a\x0ba", ["aa", "##a"]),
        ("ΟΔΟΣ", ["οδος"]),  # a capital sigma at the end of a word
        ("\ue000", ["\ue000"]),  # private use: no control to BERT, one to the library
        ("a$a", ["a", "$", "a"]),  # a symbol of ASCII counts as punctuation
        ("a" * 200, ["aa"] + ["##a"] * 198),
        ("a" * 201, ["[UNK]"]),
        ("[MASK] [PAD]", ["[", "mask", "]", "[", "[UNK]", "]"]),
        ("", []),
        (" \n", []),
    ],
)
def test_words_are_made_and_cut_as_bert_does(small: Tokenizer, text: str, pieces: list[str]):
    assert spelt(small, text) == pieces


def test_a_cased_vocabulary_keeps_case_and_accents(tmp_path: Path):
    cased = read(tmp_path / "t", write(tmp_path / "vocab.txt", VOCAB), lowercase=False)
    assert spelt(cased, "Naive Naïve naïve THE") == ["Naive", "Naïve", "[UNK]", "[UNK]"]


def reference(text: str, vocab: dict[str, int], lowercase: bool) -> list[int]:
    """BERT's rules step by step over whole strings, as its paper's code orders them."""

    def category(c: str) -> str:
        return unicodedata.category(c)

    cleaned = ""
    for c in text:
        blank = c in " \t\n\r" or category(c) == "Zs"
        if not blank and (c in "\0\ufffd" or category(c) in ("Cc", "Cf")):
            continue
        chinese = unicodedata.name(c, "").startswith("CJK UNIFIED IDEOGRAPH")
        cleaned += " " if blank else f" {c} " if chinese else c
    ids = []
    for word in cleaned.split():
        if lowercase:
            word = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in word if category(c) != "Mn")
        signs = "".join(
            f" {c} "
            if category(c)[0] == "P" or (c.isascii() and not c.isalnum() and c.isprintable())
            else c
            for c in word
        )
        for part in signs.split():
            ids += greedy(part, vocab)
    return ids


def greedy(word: str, vocab: dict[str, int]) -> list[int]:
    found: list[int] = []
    start = 0
    while start < len(word):
        head = "##" if start else ""
        ends = [e for e in range(len(word), start, -1) if head + word[start:e] in vocab]
        if not ends or len(word) > 200:
            return [vocab["[UNK]"]]
        found.append(vocab[head + word[start : ends[0]]])
        start = ends[0]
    return found


@pytest.mark.parametrize("lowercase", [True, False])
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        st.one_of(
            st.sampled_from("aAbeéÉïΣσßİ中文, .'\t\n\u00a0\u0301\u200d-—$^"),
            st.characters(min_codepoint=1, max_codepoint=0x33FF, exclude_categories=["Cs", "Cn"]),
        ),
        max_size=30,
    )
)
def test_any_text_gives_what_the_step_by_step_rules_give(tmp_path_factory, text, lowercase):
    letters = [chr(c) for c in range(0x21, 0x500)] + ["中", "文", "—", "ς", "σ"]
    pieces = dict.fromkeys([*CONTROLS, *letters, *("##" + c for c in letters)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    folder = tmp_path_factory.mktemp("t")
    tokenizer = read(folder / "t", write(folder / "vocab.txt", list(pieces)), lowercase=lowercase)
    wanted = reference(text, vocab, lowercase)
    assert tokenizer.encode(text).tolist() == wanted
    ids, starts = tokenizer.offsets([text])[0]
    assert ids.tolist() == wanted and starts.dtype == np.int64


def test_offsets_name_the_character_where_a_token_begins(small: Tokenizer):
    text = "  The\0 UNAFFÁBLE, 中a"
    (ids, starts), (none, empty) = small.offsets([text, ""])
    assert [text[at] for at in starts] == ["T", "U", "A", "Á", ",", "中", "a"]
    assert ids.tolist() == small.encode(text).tolist() and len(none) == len(empty) == 0


def test_controls_stand_first_and_no_text_yields_them(trained: Tokenizer):
    assert [trained.piece(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert trained.controls == {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    assert (trained.eot, trained.unknown, trained.lossless) == (3, 1, False)
    assert not {0, 2, 3, 4} & set(trained.encode("[MASK] [CLS][SEP] [PAD]").tolist())
    assert trained.decode([2, *trained.encode("sea shells"), 3]) == "sea shells"


def test_masks_in_a_text_become_the_mask(trained: Tokenizer):
    ids = trained.encode_masked("she [MASK] sea <mask>[MASK]").tolist()
    assert [i for i in ids if i == 4] == [4, 4, 4]
    assert trained.decode([i for i in ids if i != 4]) == "she sea"
    assert trained.encode_masked("[MASK]").tolist() == [4]


def test_training_is_deterministic_and_a_chinese_character_is_one_piece(tmp_path, trained):
    for name in "ab":
        WordPiece(vocab=260).build(iter([PROSE.encode()]), tmp_path / name)
        assert load_tokenizer(tmp_path / name).fingerprint == trained.fingerprint
    assert trained.vocab <= 260
    assert spelt(trained, "中文維") == ["中", "文", "維"]
    assert "sells" in spelt(trained, "Sells") and "##中" not in {
        trained.piece(i) for i in range(trained.vocab)
    }
    assert trained.unknown not in trained.encode(PROSE)


def test_a_small_vocabulary_keeps_the_common_characters(tmp_path: Path):
    text = "".join(chr(0x4E00 + i) * (500 - i) for i in range(400)).encode()
    WordPiece(vocab=105).build(iter([text]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab <= 105
    assert spelt(tokenizer, "\u4e00\u4e01\u4f00") == ["\u4e00", "\u4e01", "[UNK]"]


def test_a_cased_vocabulary_is_trained(tmp_path: Path):
    WordPiece(vocab=300, lowercase=False).build(iter([PROSE.encode()]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.decode(tokenizer.encode("The CAFÉ")) == "The CAFÉ"


def test_words_start_where_no_piece_goes_on(small: Tokenizer):
    inside = {small.piece(i) for i in range(small.vocab) if not small.word_starts[i]}
    assert inside == {"##aff", "##able", "##ing", "##a"}
    assert small.word_starts.dtype == bool and len(small.word_starts) == small.vocab


def test_baidus_two_columns_and_folders_are_read(tmp_path: Path, small: Tokenizer):
    rows = [f"{piece}\t{i}" for i, piece in enumerate(VOCAB)]
    two = read(tmp_path / "two", write(tmp_path / "ernie.txt", rows))
    folder = read(tmp_path / "folder", write(tmp_path / "bert" / "vocab.txt", VOCAB).parent)
    whole = read(tmp_path / "whole", small.directory)  # holds a tokenizer.json and no vocab.txt
    prints = {t.fingerprint for t in (two, folder, whole)}
    assert prints == {small.fingerprint}
    write(tmp_path / "ernie.txt", [*rows, "x\t99"])
    with pytest.raises(ValueError, match=r"ernie.txt:28: wanted a piece, a tab and its id 27"):
        read(tmp_path / "x", tmp_path / "ernie.txt")


def test_a_vocabulary_of_the_other_case_is_refused(tmp_path: Path, small: Tokenizer):
    with pytest.raises(ValueError, match=r"lower-cases: set data.tokenizer.lowercase=true"):
        read(tmp_path / "x", small.directory, lowercase=False)
    folder = write(tmp_path / "bert" / "vocab.txt", VOCAB).parent
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(ValueError, match=r"keeps the case: set data.tokenizer.lowercase=false"):
        read(tmp_path / "x", folder)
    assert spelt(read(tmp_path / "y", folder, lowercase=False), "Naïve") == ["Naïve"]


@pytest.mark.parametrize(
    "pieces, message",
    [
        (["the", "[UNK]"], r"has no \[CLS\] and no \[SEP\]; is it a BERT vocabulary"),
        ([], r"has no \[UNK\]"),
    ],
)
def test_no_bert_vocabulary_is_refused(tmp_path: Path, pieces, message: str):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x", write(tmp_path / "vocab.txt", pieces))


def test_other_files_are_refused_by_name(tmp_path: Path, small: Tokenizer):
    with pytest.raises(ValueError, match="no tokenizer here; wanted vocab.txt or tokenizer.json"):
        read(tmp_path / "x", tmp_path.parent)
    with pytest.raises(ValueError, match="gone.txt: cannot be read"):
        read(tmp_path / "x", tmp_path / "gone.txt")
    (tmp_path / "latin.txt").write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(ValueError, match="latin.txt: not UTF-8"):
        read(tmp_path / "x", tmp_path / "latin.txt")
    spec = json.loads((small.directory / "tokenizer.json").read_text("utf-8"))
    target = tmp_path / "tokenizer.json"
    target.write_text(json.dumps(spec | {"pre_tokenizer": None}), "utf-8")
    with pytest.raises(ValueError, match="its words are not made by BERT's rules"):
        read(tmp_path / "x", target)
    with pytest.raises(ValueError, match="has no text to learn"):
        WordPiece().build(iter([b" \n"]), tmp_path / "x")
    with pytest.raises(ValueError, match="vocab=5: a WordPiece needs 5 controls"):
        WordPiece(vocab=5).build(iter([b"a"]), tmp_path / "x")


@pytest.mark.parametrize(
    "name, file", [("uncased", "uncased_en"), ("cased", "cased_en"), ("zh", "zh")]
)
def test_ids_equal_the_golden_ones(tmp_path: Path, name: str, file: str):
    path = SHARED / "golden" / "bert_wordpiece.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    vocab = SHARED / "vocabs" / f"bert_{file}_vocab.txt"
    tokenizer = read(tmp_path / "t", vocab, lowercase=name != "cased")
    assert len(rows) > 70 and tokenizer.controls["mask"] == 103
    for row, (ids, _) in zip(rows, tokenizer.offsets([r["text"] for r in rows]), strict=True):
        assert tokenizer.encode(row["text"]).tolist() == row[f"{name}_ids"] == ids.tolist()
        assert spelt(tokenizer, row["text"]) == row[name]
