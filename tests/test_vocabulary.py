# SPDX-License-Identifier: Apache-2.0
"""Whole words: bilm-tf's vocabulary files and characters, and unknown words that lose nothing."""

import gzip
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.tokenizer import load_tokenizer
from lmjax.vocabulary import (
    _BLANK,
    BYTES,
    CHARACTERS,
    MARKS,
    Vocabulary,
    VocabularyTokenizer,
    character_ids,
    characters_of,
    read_vocabulary,
    spelt_characters,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
TRAIN = SHARED / "fixtures" / "elmo_bilm" / "train"
CHINESE = SHARED / "fixtures" / "ernie" / "elmo_zh"
TEXT = "the cat saw the dog\nthe dog , naïve , ran\n\n  a   cat\tran \n"


def made(folder: Path, text: str = TEXT, **settings) -> VocabularyTokenizer:
    Vocabulary(**settings).build(iter([text.encode()]), folder)
    found = load_tokenizer(folder)
    assert isinstance(found, VocabularyTokenizer)
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> VocabularyTokenizer:
    """the , cat dog ran; a, naïve and saw found no room."""
    return made(tmp_path_factory.mktemp("small"), size=8)


@pytest.fixture(scope="module")
def cutters(tmp_path_factory) -> dict[str, VocabularyTokenizer]:
    return {
        split: made(tmp_path_factory.mktemp(split), split=split)
        for split in ("blanks", "words", "chinese")
    }


def shared(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_words_come_by_frequency_then_by_code_point(tmp_path: Path):
    tokenizer = made(tmp_path)
    assert tokenizer.spellings == [*MARKS, "the", ",", "cat", "dog", "ran", "a", "naïve", "saw"]
    assert (tokenizer.words, tokenizer.vocab) == (11, 11 + 512)
    lines = "<S>\n</S>\n<UNK>\nthe\n,\ncat\ndog\nran\na\nnaïve\nsaw\n"
    assert (tmp_path / "vocab.txt").read_text("utf-8") == lines


def test_the_size_counts_the_marks_and_cuts_the_rare_words(small: VocabularyTokenizer):
    assert small.spellings == [*MARKS, "the", ",", "cat", "dog", "ran"] and small.words == 8


def test_the_order_of_the_documents_does_not_change_the_vocabulary(tmp_path: Path):
    lines = TEXT.encode().split(b"\n")
    for folder, texts in (("a", lines), ("b", lines[::-1])):
        Vocabulary().build(iter(texts), tmp_path / folder)
    assert (tmp_path / "a/vocab.txt").read_bytes() == (tmp_path / "b/vocab.txt").read_bytes()


def test_sentences_end_in_a_mark_and_unknown_words_are_spelt(small: VocabularyTokenizer):
    first, inside = small.words, small.words + BYTES
    naive = [first + ord("n"), *(inside + byte for byte in "aïve".encode())]
    saw = [first + ord("s"), inside + ord("a"), inside + ord("w")]
    stream = [
        *(3, 5, *saw, 3, 6, 1),
        *(3, 6, 4, *naive, 4, 7, 1),
        *(first + ord("a"), 5, 7, 1),
    ]
    assert small.encode(TEXT).tolist() == stream
    assert small.decode(stream) == "the cat saw the dog\nthe dog , naïve , ran\na cat ran\n"
    assert small.decode([0, 3, 2]) == "the <UNK>"
    assert [small.piece(i) for i in (1, 3, *saw[:2], naive[2])] == [
        *("</S>", "the", "s", "##a", "##<0xC3>")
    ]


def test_a_mark_in_the_text_is_only_its_letters(small: VocabularyTokenizer, tmp_path: Path):
    text = "<S> the </S> <UNK>\n"
    ids = small.encode(text)
    assert (ids < small.words).sum() == 2  # "the", and the sentence's end
    assert small.decode(ids) == text
    assert made(tmp_path, "a </S> b </S>").spellings == [*MARKS, "a", "b"]


def test_a_word_begins_where_the_id_is_below_the_further_bytes(small: VocabularyTokenizer):
    starts = small.word_starts
    assert starts[: small.words + BYTES].all() and not starts[small.words + BYTES :].any()


@pytest.mark.parametrize(
    "text, words",
    [
        ("I don't know.", ["I", "don't", "know", "."]),
        ("it’s 3.5, or 1,000", ["it’s", "3.5", ",", "or", "1,000"]),
        ("in the U.S. at 10:30", ["in", "the", "U.S.", "at", "10:30"]),
        ("e.g. a.m., U.S.A", ["e.g.", "a.m.", ",", "U.S.A"]),
        ("(well-known -- $2.50...)", ["(", "well-known", "--", "$", "2.50", "...", ")"]),
        ("dogs' 'tis ''so''", ["dogs", "'", "'", "tis", "''", "so", "''"]),
        ("end.Next x.yz", ["end", ".", "Next", "x", ".", "yz"]),
        ("cafe\u0301 नमस्ते", ["cafe\u0301", "नमस्ते"]),  # accents belong to their letters
        ("¡Olé! «oui»", ["¡", "Olé", "!", "«", "oui", "»"]),
    ],
)
def test_raw_text_is_cut_into_words_and_signs(cutters, text: str, words: list[str]):
    assert [w for sentence in cutters["words"].sentences(text) for w in sentence] == words


def test_raw_text_is_cut_into_sentences(cutters):
    text = "Dr. Smith came\nlate and sat\ndown. He left.\n\nWhy?"
    assert list(cutters["words"].sentences(text)) == [
        ["Dr", ".", *"Smith came late and sat down .".split()],
        ["He", "left", "."],
        ["Why", "?"],
    ]
    assert list(cutters["blanks"].sentences(text))[0] == ["Dr.", "Smith", "came"]


def test_each_chinese_character_is_a_word_where_asked(cutters):
    text = "我爱TPU v5e，3.5倍！“好”……对"
    words = [w for sentence in cutters["chinese"].sentences(text) for w in sentence]
    assert words == [*"我爱", "TPU", "v5e", "，", "3.5", "倍", "！", "“", "好", "”", "……", "对"]
    assert next(cutters["words"].sentences("我爱你。")) == ["我爱你", "。"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_no_character_but_blanks_is_lost(cutters, text: str):
    for split, tokenizer in cutters.items():
        back = tokenizer.decode(tokenizer.encode(text))
        if split == "blanks":
            lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            assert back == "".join(" ".join(w) + "\n" for w in map(str.split, lines) if w)
        assert "".join(back.split()) == "".join(text.split())
        assert tokenizer.decode(tokenizer.encode(back)).split() == back.split()


def test_blanks_are_what_the_original_splits_at():
    every = [chr(point) for point in range(0x110000)]
    assert [bool(_BLANK.match(c)) for c in every] == [not c.split() for c in every]


def test_a_long_line_is_one_sentence_and_a_long_word_one_word(small: VocabularyTokenizer):
    rng = random.Random(0)
    words = rng.choices(["the", "cat", "zebra"], k=100_000)
    ids = small.encode(" ".join(words))
    assert (ids == 1).sum() == 1 and ids[-1] == 1
    assert small.decode(ids).split() == words
    ids = small.encode("é" * 70_000)
    assert small.word_starts[ids].sum() == 2 and len(ids) == 140_001
    for empty in ("", "\n \n", " "):
        assert len(small.encode(empty)) == 0


@pytest.mark.parametrize("text", ["a " + 3 * f"{'b' * 1001} ", "b" * 1001])
def test_what_has_no_blanks_for_long_is_no_word_of_the_vocabulary(tmp_path: Path, text: str):
    found = made(tmp_path, text)
    assert found.spellings[len(MARKS) :] == ["a"] * ("a" in text)
    assert found.decode(found.encode(text)).split() == text.split()
    assert "b" * 1000 in made(tmp_path, "b" * 1000).spellings


def test_character_ids_are_the_originals():
    assert character_ids("né", 8).tolist() == [258, ord("n"), 0xC3, 0xA9, 259, 260, 260, 260]
    assert character_ids("<S>", 6).tolist() == [258, 256, 259, 260, 260, 260]
    assert character_ids("</S>", 6).tolist() == [258, 257, 259, 260, 260, 260]
    assert character_ids("<UNK>", 8).tolist() == [258, *b"<UNK>", 259, 260]
    assert character_ids("", 4).tolist() == [258, 259, 260, 260]
    word = character_ids("x" * 60)
    assert word.shape == (50,) and word.dtype == np.int16
    assert word.tolist() == [258, *[ord("x")] * 48, 259]
    assert character_ids("né", 8, shifted=True).tolist() == [259, 111, 0xC4, 0xAA, 260, *[261] * 3]
    assert characters_of([], 5).shape == (0, 5) and word.max() < CHARACTERS
    with pytest.raises(ValueError, match="characters=2: must be at least 3"):
        character_ids("a", 2)


words = st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), min_size=1, max_size=70)


@settings(max_examples=50, deadline=None)
@given(listed=st.lists(words, min_size=1, max_size=8, unique=True), length=st.integers(3, 60))
def test_the_table_of_a_vocabulary_and_the_stream_spell_alike(tmp_path_factory, listed, length):
    text = " ".join(listed)
    known = made(tmp_path_factory.mktemp("known"), text)
    table = known.character_table(length)
    for word, row in zip(known.spellings, table, strict=True):
        assert np.array_equal(row, character_ids(word, length))
    unknown = made(tmp_path_factory.mktemp("unknown"), "\uffff")
    ids = unknown.encode(text).astype(np.uint16)[:-1]  # the last word ends the stream
    places = np.flatnonzero(unknown.word_starts[ids])
    spelt = spelt_characters(ids, places, unknown.words, length)
    expected = [character_ids(w, length) if w not in MARKS else letters(w, length) for w in listed]
    assert np.array_equal(spelt, expected)


def letters(mark: str, length: int) -> np.ndarray:
    """A mark's spelling, as a text has it."""
    row = character_ids("?" + mark, length + 1)[1:]
    row[0] = 258
    return row


def test_a_published_vocabulary_is_taken_as_it_is(tmp_path: Path):
    lines = b"\xef\xbb\xbf<S>\r\n</S>\r\n<UNK>\r\nrare\r\nthe \r\n"
    path = written(tmp_path / "v", lines)
    tokenizer = made(tmp_path / "t", "the the the", path=path, size=4)
    assert tokenizer.spellings == [*MARKS, "rare", "the"]
    assert tokenizer.encode("the rare").tolist() == [4, 3, 1]


def test_marks_come_first_wherever_a_vocabulary_has_them(tmp_path: Path):
    path = written(tmp_path / "v", b"a\n</S>\nb\n<S>\n<UNK>\n")
    assert read_vocabulary(Path(path)) == {"<S>": 3, "</S>": 1, "<UNK>": 4, "a": 0, "b": 2}
    tokenizer = made(tmp_path, path=path)
    assert tokenizer.spellings == [*MARKS, "a", "b"]
    assert tokenizer.encode("b a").tolist() == [4, 3, 1]
    path = written(tmp_path / "w", b"a\n</S>\nb\n<S>\n")
    assert read_vocabulary(Path(path)) == {"<S>": 3, "</S>": 1, "<UNK>": -1, "a": 0, "b": 2}
    assert made(tmp_path, path=path).spellings == [*MARKS, "a", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"the\nof\n", r"v: no line is <S>: a vocabulary has the lines <S>, </S>, <UNK>"),
        (b"<S>\n</s>\nthe\n", r"v: no line is </S>; line 2 is </s>"),
        (b"<S>\n</S>\na\n<unk>\n", r"v: no line is <UNK>; line 4 is <unk>"),
        (b"<S>\n</S>\n<UNK>\na\nb\na\n", r"v:6: 'a' stands on line 4 already"),
        (b"<S>\n</S>\n<UNK>\na\n\nb\n", r"v:5: a blank line"),
        (b"<S>\n</S>\n<UNK>\na\n\n", r"v:5: a blank line"),
        (b"<S>\n</S>\n<UNK>\na\nb\xff\n", r"v:5:2: not UTF-8"),
        (b"<S>\n</S>\n<UNK>\n", r"v: holds no word"),
        (b"", r"v:1: a blank line"),
    ],
)
def test_a_bad_vocabulary_is_refused_by_line(tmp_path: Path, content: bytes, message: str):
    path = written(tmp_path / "v", content)
    with pytest.raises(ValueError, match=message):
        Vocabulary(path=path).build(iter([]), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_settings_and_texts_that_cannot_be_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.tokenizer.size=3: must be at least 4"):
        Vocabulary(size=3)
    with pytest.raises(ValueError, match=r"split='word': one of blanks, words.* mean 'words'"):
        Vocabulary(split="word")  # pyright: ignore
    with pytest.raises(ValueError, match="no words to make a vocabulary of"):
        Vocabulary().build(iter([b" \n</S>"]), tmp_path)
    with pytest.raises(ValueError, match="nowhere: cannot be read"):
        Vocabulary(path=str(tmp_path / "nowhere")).build(iter([]), tmp_path)


def test_the_vocabulary_of_bilm_tf_and_its_text(tmp_path: Path):
    path = shared(TRAIN / "vocab.txt")
    tokenizer = made(tmp_path, path=str(path))
    text = (TRAIN / "data.txt").read_text("utf-8")
    lines = path.read_text("utf-8").split()
    assert tokenizer.spellings == lines and tokenizer.words == 32
    ids = tokenizer.encode(text)
    originals = [lines.index(w) if w in lines else 2 for w in text.split()]
    begins = ids[tokenizer.word_starts[ids] & (ids != 1)]
    assert np.where(begins < 32, begins, 2).tolist() == originals
    assert tokenizer.decode(ids) == text + "\n"


def test_a_chinese_vocabulary_of_fifty_thousand_words(tmp_path: Path):
    path = shared(CHINESE / "vocabulary_min5k.txt")
    assert len(read_vocabulary(path)) == 52_445
    tokenizer = made(tmp_path, path=str(path))
    text = (CHINESE / "dev_sentence_file.txt").read_text("utf-8")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).split() == text.split()
    known = ids < tokenizer.words
    full = [line for line in text.split("\n") if line.strip()]
    assert (ids == 1).sum() == len(full) and known.sum() > 0.9 * tokenizer.word_starts[ids].sum()


def test_raw_books_lose_nothing_but_blanks(tmp_path: Path):
    path = shared(SHARED / "corpora" / "en" / "brown_tokenised.txt.gz")
    text = gzip.open(path).read()[: 1 << 18].decode()
    for split in ("blanks", "words", "chinese"):
        tokenizer = made(tmp_path / split, text, size=2000, split=split)
        back = tokenizer.decode(tokenizer.encode(text))
        assert "".join(back.split()) == "".join(text.split())
