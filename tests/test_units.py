# SPDX-License-Identifier: Apache-2.0
"""Sentences, words and entities of documents, and how the store keeps them."""

import gzip
import json
import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.data import Data, hold_out
from lmjax.document import Document
from lmjax.sentences import split_sentences
from lmjax.store import Split, Store, build_store, open_store
from lmjax.text import Files
from lmjax.tokenizer import (
    ENTITY,
    LABEL,
    WORD,
    ByteBPE,
    PretokenizedERNIE,
    SentencePiece,
    Tokenizer,
    WordPiece,
    load_tokenizer,
)
from lmjax.units import Units, reader

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
TEXT = (
    "The unbelievable fox ran. It was 3.5 p.m. when Mr. Fox stopped!\n\n"
    "“Why?” she asked. 诸葛亮任益州刺史。他喜欢北京！\n"
) * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("wordpiece")
    WordPiece(vocab=250).build(iter([TEXT.encode()]), folder)
    return load_tokenizer(folder)


# --- sentences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One two. Three! Four? Five", ["One two.", "Three!", "Four?", "Five"]),
        ("wrapped\nlines. Go\n on\n\nnext", ["wrapped lines.", "Go on", "next"]),
        ("Mr. Fox, e.g. Dr. Who, met J. R. Smith.", None),
        ("at 4 P.M. The U.S. Army etc. No. 5 of vol. 2 in Oct. 1914.", None),
        ("It cost 3.50 dollars. 20 men came.", ["It cost 3.50 dollars.", "20 men came."]),
        ("taller than I. Then", ["taller than I.", "Then"]),
        ("Nicholas I. Then", None),
        ("1. An item. 2. Another.", ["1. An item.", "2. Another."]),
        (
            '"Why?" she asked. (So he said.) "Yes."',
            ['"Why?" she asked.', "(So he said.)", '"Yes."'],
        ),
        ("She stopped . '' Then `` he ran .", ["She stopped . ''", "Then `` he ran ."]),
        ("no. not here... and so on", None),
        ("Well… he said. Well… Then", ["Well… he said.", "Well…", "Then"]),
        ("他来了。她说：“好！”走了；你呢？", ["他来了。", "她说：“好！”", "走了；", "你呢？"]),
        ("（他来了。）好……真的", ["（他来了。）", "好……", "真的"]),
        ("他来\n了，走\r\n了。end", ["他来了，走了。", "end"]),
        ("版本１．５好．真的", ["版本１．５好．", "真的"]),
        ("", []),
        (" \n\t\n", []),
    ],
)
def test_rules_cut_where_sentences_end(text: str, sentences: list[str] | None):
    assert split_sentences(text, "rules") == (sentences or ([text] if text.strip() else []))


def test_lines_are_sentences_where_they_look_so():
    lines = ["It ran. '' ", "No end", "他来了。”", "Why?"]
    listed = [line.strip() for line in lines]
    assert split_sentences("\n".join(lines), "auto") == listed
    assert split_sentences("\n\n".join(lines), "lines") == listed
    wrapped = "A long sentence that\nis wrapped to be\nshort. It ends.\nAnd so on."
    assert len(split_sentences(wrapped, "auto")) == 3
    paragraphs = "One. Two. Three.\nFour. Five. Six."
    assert len(split_sentences(paragraphs, "auto")) == 6 > len(split_sentences(paragraphs, "lines"))


pieces_of_text = st.sampled_from(
    ["a", "Mr", "B", ".", "!", "…", "。", "”", "“", '"', "(", "中", "３", "．", " ", "\n", "\r\n"]
    + ["\n\n", "\u3000", "\x1c", "\u2028", "；", "1", "''", "I", "e.g", "\0", "é"]
)


@pytest.mark.parametrize("rule", ["auto", "lines", "rules"])
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(pieces_of_text, max_size=40))
def test_no_text_is_lost(rule, parts: list[str]):
    text = "".join(parts)
    sentences = split_sentences(text, rule)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence.strip() == sentence != "" for sentence in sentences)


def test_long_paragraphs_are_cut_in_linear_time():
    text = "J. Then " * 200_000  # never a sentence's end
    assert split_sentences(text, "rules") == [text.strip()]


# --- marks ----------------------------------------------------------------------------------------


def shown(tokenizer: Tokenizer, units: Units, text: str) -> str:
    """The pieces, with | before words, ^ before entities and a line for each sentence."""
    (encoded,) = reader(units, tokenizer)([Document("d", text.encode())])
    assert encoded.sentences is not None and encoded.marks is not None
    assert encoded.ids.dtype == np.int32 and encoded.marks.dtype == np.uint8
    assert encoded.sentences.dtype == np.int64
    words = []
    for at, (i, mark) in enumerate(zip(encoded.ids, encoded.marks, strict=True)):
        line = "\n" if at in encoded.sentences[1:] else ""
        signs = "|" * bool(mark & WORD) + "^" * bool(mark & ENTITY)
        words.append(line + signs + tokenizer.piece(int(i)).removeprefix("##"))
    return "".join(words)


def test_words_by_spelling(tokenizer: Tokenizer):
    text = "The unbelievable fox.\n\n\0\n\n北京"
    found = shown(tokenizer, Units(), text)
    assert found == "|^the|^unbelievable|^fox|^.\n|^北|^京"


def test_a_sentence_begins_a_word_in_every_tokenizer(tmp_path: Path):
    for spec in (ByteBPE(vocab=300), SentencePiece(vocab=330)):
        spec.build(iter([TEXT.encode()]), tmp_path / type(spec).__name__)
        made = load_tokenizer(tmp_path / type(spec).__name__)
        document = Document("d", b"fox ran.\n\nfox stopped")
        (encoded,) = reader(Units(), made)([document])
        assert encoded.sentences is not None and encoded.marks is not None
        assert len(encoded.sentences) == 2 and (encoded.marks[encoded.sentences] == 3).all()
        alone = [made.encode("fox ran."), made.encode("fox stopped")]
        assert encoded.ids.tolist() == np.concatenate(alone).tolist()
        inner = np.delete(np.arange(len(encoded.ids)), encoded.sentences)
        expected = made.word_starts[encoded.ids[inner]]
        assert ((encoded.marks[inner] & WORD > 0) == expected).all() and expected.sum() < len(inner)


def test_jieba_joins_chinese_and_leaves_latin_words(tokenizer: Tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("jieba")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    units = Units(words="jieba")
    assert shown(tokenizer, units, "他喜欢北京") == "|^他|^喜欢|^北京"
    assert shown(tokenizer, units, "unbelievable 北京 ran") == "|^unbelievable|^北京|^ran"
    assert not list(tmp_path.iterdir())  # jieba's own cache would be shared and trusted


def test_jieba_is_silent(tmp_path: Path):
    pytest.importorskip("jieba")
    code = (  # compiled anew, which is when Python warns of what jieba's sources hold
        "import sys, warnings, lmjax.words; warnings.simplefilter('error');"
        f"sys.pycache_prefix = {str(tmp_path)!r}; lmjax.words.Jieba().word_starts('他喜欢北京')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_without_jieba_the_remedy_is_named(tokenizer: Tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match="needs a package: pip install jieba"):
        reader(Units(words="jieba"), tokenizer)


@pytest.fixture
def entities(tmp_path: Path) -> Path:
    path = tmp_path / "entities.txt"
    path.write_text("诸葛\n诸葛亮\n\n益州刺\nfox ran\nFox\nThe\n北\n 刺史 \n", "utf-8")
    return path


@pytest.mark.parametrize(
    "text, found",
    [
        ("诸葛亮任诸葛", "|^诸|葛|亮|^任|^诸|葛"),  # the longest one
        ("益州刺史", "|^益|州|刺|^史"),  # from the left, so 刺史 is torn
        ("The fox ran.", "|^the|^fox|ran|^."),
        ("fox Fox fox.", "|^fox|^fox|^fox|^."),
        ("There aFox ran", "|^there|^afox|^ran"),  # "The" and "Fox" are no words there
        ("北京", "|^北|^京"),
    ],
)
def test_entities_are_units(tokenizer: Tokenizer, entities: Path, text: str, found: str):
    assert shown(tokenizer, Units(entities=str(entities)), text) == found


def test_an_entity_overrides_the_words_inside_it_only_as_a_unit(tokenizer, entities: Path):
    pytest.importorskip("jieba")
    units = Units(words="jieba", entities=str(entities))
    plain = shown(tokenizer, Units(words="jieba"), "任益州刺史")
    assert plain == "|^任|^益州|^刺史"
    assert shown(tokenizer, units, "任益州刺史") == "|^任|^益州|刺^史"


@pytest.mark.parametrize(
    "content, message",
    [(b"\xff\n", "not UTF-8"), (b"\n \n", "holds no entity"), (None, "cannot be read")],
)
def test_bad_entities_are_refused_by_name(tokenizer, tmp_path: Path, content, message: str):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt: {message}"):
        reader(Units(entities=str(path)), tokenizer)


def test_units_that_a_tokenizer_cannot_have_are_refused(tmp_path: Path, entities: Path):
    ByteBPE(vocab=300).build(iter([TEXT.encode()]), tmp_path / "t")
    with pytest.raises(ValueError, match=r"BPETokenizer does not say where .*; WordPiece\(\) does"):
        reader(Units(entities=str(entities)), load_tokenizer(tmp_path / "t"))
    with pytest.raises(ValueError, match="data.units.words='jeiba': .* did you mean 'jieba'"):
        Units(words="jeiba")  # pyright: ignore[reportArgumentType]


# --- the store ------------------------------------------------------------------------------------


DOCUMENTS = [Document(f"d{i}", (TEXT[: 7 * i + 1] or " ").encode()) for i in range(30)]


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> Store:
    folder = tmp_path / "store"
    build_store(folder, DOCUMENTS, tokenizer, {}, lambda _: "train", units=Units())
    return open_store(folder)


def test_a_store_keeps_sentences_and_marks(store: Store, tokenizer: Tokenizer):
    split = store.splits["train"]
    assert split.sentences is not None and split.marks is not None
    assert isinstance(split.marks, np.memmap) and split.marks.dtype == np.uint8
    assert (split.vocab, split.controls) == (tokenizer.vocab, tokenizer.controls)
    for i, (document, encoded) in enumerate(
        zip(DOCUMENTS, reader(Units(), tokenizer)(DOCUMENTS), strict=True)
    ):
        start, end = split.starts[i : i + 2]
        assert split.tokens[start] == tokenizer.eot and split.marks[start] == 0, document.id
        assert split.tokens[start + 1 : end].tolist() == encoded.ids.tolist()
        assert split.marks[start + 1 : end].tolist() == encoded.marks.tolist()  # pyright: ignore
        inside = split.sentences[(split.sentences >= start) & (split.sentences < end)]
        assert (inside - start - 1).tolist() == encoded.sentences.tolist()  # pyright: ignore


def test_a_split_travels_as_paths_and_without_what_it_computed(store: Store):
    split = store.splits["train"]
    split.memo["maker"] = np.zeros(1000)
    assert split.memo is store.splits["train"].memo
    packed = pickle.dumps(split)
    again = pickle.loads(packed)
    assert isinstance(again, Split) and again.memo == {} and b"maker" not in packed
    assert (again.marks == split.marks).all() and isinstance(again.marks, np.memmap)
    assert (again.sentences == split.sentences).all() and again.controls == split.controls
    assert packed.count(b"train.marks") == 1 and len(packed) < 4000


@pytest.mark.parametrize("column", ["sentences", "marks"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_the_manifest_covers_the_units(store: Store, column: str, damage: str):
    path = store.directory / f"train.{column}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content) if damage == "flipped" else path.unlink()
    with pytest.raises(ValueError, match=f"train.{column}"):
        open_store(store.directory)


def test_a_store_without_units_is_what_it_was(tmp_path: Path, tokenizer: Tokenizer):
    build_store(tmp_path / "s", DOCUMENTS, tokenizer, {}, lambda _: "train")
    split = open_store(tmp_path / "s").splits["train"]
    assert split.sentences is None and split.marks is None
    names = {"manifest.json", "tokenizer", *(f"train.{c}" for c in ("tokens", "starts", "bytes"))}
    assert {p.name for p in (tmp_path / "s").iterdir()} == names | {"train.ids"}


def test_the_spec_names_units_only_where_there_are_some(tmp_path: Path):
    data = Data(Files("a"), ByteBPE(), None)
    # As it was before there were units or controls: such stores exist.
    assert data.spec() == {
        "corpus": {"class": "Files", "glob": "a", "document": "auto", "field": "text"}
        | {"encoding": "utf-8", "on_bad": "error"},
        "tokenizer": {"class": "ByteBPE", "vocab": 50_257, "path": "", "train_bytes": 10_000_000},
        "validation": 0.05,
        "test": 0.05,
        "split": "documents",
    }
    assert "controls" not in Data(Files("a"), SentencePiece(), None).spec()["tokenizer"]
    assert Data(Files("a"), ByteBPE(controls="roberta"), None).spec()["tokenizer"]["controls"]
    (tmp_path / "e.txt").write_text("a b\n")
    (tmp_path / "moved.txt").write_text("a b\n")
    first, moved = (
        replace(data, units=Units(entities=str(tmp_path / name))).spec()
        for name in ("e.txt", "moved.txt")
    )
    assert first == moved != replace(data, units=Units()).spec()
    (tmp_path / "e.txt").write_text("a c\n")
    assert replace(data, units=Units(entities=str(tmp_path / "e.txt"))).spec() != first


def test_data_and_other_corpora_are_prepared_with_units(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Sentence {i} here. And one more." for i in range(40)))
    data = Data(Files(str(path)), WordPiece(vocab=120), None, units=Units())
    made = data.prepare(tmp_path, say=lambda line: None)
    for split in made.store.splits.values():
        assert split.sentences is not None and len(split.sentences) == 2 * split.n_documents
    with pytest.raises(ValueError, match=r"units {.*} -> absent"):
        replace(data, units=None).prepare(tmp_path, say=lambda line: None)
    with pytest.raises(ValueError, match=r'units.sentences "auto" -> "lines"'):
        replace(data, units=Units("lines")).prepare(tmp_path, say=lambda line: None)
    held = hold_out(data.corpus, made.tokenizer, tmp_path, units=Units()).store.splits["test"]
    bare = hold_out(data.corpus, made.tokenizer, tmp_path).store.splits["test"]
    assert held.sentences is not None and len(held.sentences) == 80 and bare.sentences is None


# --- corpora that are tokenised already -----------------------------------------------------------


LINE = "2 5 6 3 7 3;0 0 0 0 1 1;0 1 2 3 4 5;-1 0 1 -1 0 -1;1"


@pytest.fixture
def ernie(tmp_path: Path, tokenizer: Tokenizer) -> PretokenizedERNIE:
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab)]
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{piece}\t{i}\n" for i, piece in enumerate(pieces)), "utf-8")
    return PretokenizedERNIE(str(path))


def test_pretokenised_lines_become_documents(tmp_path: Path, ernie: PretokenizedERNIE):
    with gzip.open(tmp_path / "a.gz", "wt") as file:
        file.write(f"{LINE}\n{LINE[:-1]}0\n" * 10)
    corpus = Files(str(tmp_path / "a.gz"), document="line")
    data = Data(corpus, ernie, None, validation=0, test=0)
    made = data.prepare(tmp_path, say=lambda line: None)
    split = made.store.splits["train"]
    assert split.sentences is not None and split.marks is not None and split.n_documents == 20
    assert split.eot is None and split.controls == {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    assert split.tokens[:6].tolist() == [2, 5, 6, 3, 7, 3]
    assert split.sentences[:4].tolist() == [0, 4, 6, 10]
    assert split.marks[:6].tolist() == [LABEL, 3, 0, 0, 3, 0] and split.marks[6] == 0
    assert made.tokenizer.encode("The fox").tolist()  # plain text is encoded by the vocabulary
    with pytest.raises(ValueError, match="tokenised already and hold their units"):
        reader(Units(), made.tokenizer)


@pytest.mark.parametrize(
    "line, message",
    [
        (LINE.replace(";1", ""), "4 fields between semicolons, not 5"),
        (LINE.replace("2 5", "2 x"), "no whole number"),
        (LINE.replace("-1 0 1", "-1 0"), "its fields have 6, 6, 6, 5 numbers"),
        (LINE.replace("2 5", "2 5000"), "id 5000 is not one of the vocabulary's"),
        (LINE.replace("2 5", "2 -5"), "id -5 is not one"),
        (LINE.replace("0 0 0 0 1 1", "0 0 1 0 1 1"), "sentence ids must be 0 for a while"),
        (LINE.replace("0 0 0 0 1 1", "0 0 0 0 0 0"), "sentence ids must be 0 for a while"),
        (LINE.replace("0 1 2 3 4 5", "0 1 2 3 4 9"), "positions must be 0, 1, 2"),
        (LINE.replace("-1 0 1", "-1 0 2"), "segmentation labels must be -1, 0 and 1"),
        (LINE[:-1] + "7", "label must be 0 or 1"),
        (";;;;", "its fields have 0, 0, 0, 0 numbers"),
    ],
)
def test_a_bad_line_is_named_with_its_fault(tmp_path, ernie, line: str, message: str):
    ernie.build(iter([]), tmp_path / "t")
    made = load_tokenizer(tmp_path / "t")
    good, bad = Document("a.gz:1", LINE.encode()), Document("a.gz:2", line.encode())
    with pytest.raises(ValueError, match=f"document 'a.gz:2' is no pre-tokenised .*{message}"):
        made.encode_documents([good, bad])


def test_baidus_demo_is_read(tmp_path: Path):
    path = SHARED / "fixtures" / "ernie" / "demo_train_set.gz"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    vocabulary = str(path.with_name("vocab.txt"))
    data = Data(Files(str(path), document="line"), PretokenizedERNIE(vocabulary), None, 0, 0)
    split = data.prepare(tmp_path, say=lambda line: None).store.splits["train"]
    golden = SHARED / "fixtures" / "golden" / "ernie_masking_stats_trainset.json"
    stats = json.loads(golden.read_text())
    assert split.sentences is not None and split.marks is not None
    assert split.n_documents == stats["instances"] and len(split.sentences) == 20_000
    assert (split.marks & WORD > 0).sum() == stats["words"]
    assert (split.marks & LABEL > 0).mean() * split.n_tokens / 10_000 == pytest.approx(
        stats["next_sentence_mean"]
    )
