# SPDX-License-Identifier: Apache-2.0
"""WordPiece: words by BERT's rules, each cut greedily into the longest pieces of a vocabulary.

The `tokenizers` library cuts the words and keeps the files. The rules that make words of a text
run here, by the Unicode of the running Python as the original did (google-research/bert,
tokenization.py): the library's own tables are older and drop what they do not know.
"""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lmjax import bpe
from lmjax.tokenizer_base import (
    Tokenizer,
    is_chinese,
    load_tokenizer,
    read_bytes,
    training_texts,
    write_tokenizer,
)

PAD, UNKNOWN, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
CONTROLS = (PAD, UNKNOWN, CLS, SEP, MASK)
INSIDE = "##"
LONGEST_WORD = 200
_REMEMBERED = 1 << 19
_AT_ONCE = 4096  # texts whose offsets the library holds at a time
_TOKENIZER = "tokenizer.json"
_CASES = {True: "lower-cases", False: "keeps the case"}


@dataclass(frozen=True)
class WordPiece:
    """BERT's WordPiece. Lossy; a document begins with [SEP] in the store.

    vocab: ids to learn, [PAD] [UNK] [CLS] [SEP] [MASK] at 0 to 4 included. path: a vocabulary to
    take instead, one piece a line (or Baidu's `piece<tab>id`), or a folder with a vocab.txt or
    tokenizer.json. lowercase: lower-case and without accents, as in the uncased models.
    """

    vocab: int = 30_522
    path: str = ""
    lowercase: bool = True
    train_bytes: int = 10_000_000

    def build(self, train_texts: Iterator[bytes], directory: Path) -> None:
        """Trains (or copies) the vocabulary into `directory`."""
        if self.path:
            made = read(Path(self.path).expanduser(), self.lowercase)
        else:
            made = train(training_texts(train_texts, self.train_bytes), self.vocab, self.lowercase)
        write(directory, made, "wordpiece", made.token_to_id(SEP))

    def load(self, directory: Path) -> Tokenizer:
        """Opens what `build` wrote."""
        return load_tokenizer(directory)


class WordPieceTokenizer(Tokenizer, kinds=("wordpiece",)):
    """BERT's words in the pieces of a tokenizer.json."""

    def __init__(self, directory: Path, description: dict[str, Any]):
        super().__init__(directory, description)
        made = bpe.parse_tokenizer(directory / _TOKENIZER, models.WordPiece)
        self._rules = _Rules(**_options(made, directory / _TOKENIZER))
        self._encoder, _ = bpe.without_controls(made, normalised=True)
        self._encoder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
        self._words = _Words(self._encoder)

    def _encode_pieces(self, texts: list[str]) -> list[Any]:
        if len(self._words) > _REMEMBERED:
            self._words.clear()
        words = (self._rules.apply(text).split() for text in texts)
        return [list(chain.from_iterable(map(self._words.__getitem__, w))) for w in words]

    def offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, the character where each begins) of each text, as `Tokenizer.offsets`."""
        return [
            found
            for start in range(0, len(texts), _AT_ONCE)
            for found in self._offsets(texts[start : start + _AT_ONCE])
        ]

    def _offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        parts = [self._rules.parts(text) for text in texts]
        found = self._encoder.encode_batch(["".join(p) for p in parts], add_special_tokens=False)
        out = []
        for made, encoding in zip(parts, found, strict=True):
            origin = np.repeat(np.arange(len(made)), [len(part) for part in made])
            begins = np.array([begin for begin, _ in encoding.offsets], np.int64)
            out.append((np.asarray(encoding.ids, np.int32), origin[begins]))
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        silent = {self.controls[name] for name in self.controls}
        pieces = [self.piece(i) for i in self._known(ids) if i not in silent]
        return " ".join(pieces).replace(f" {INSIDE}", "").removeprefix(INSIDE)

    def piece(self, token: int) -> str:
        return self._encoder.id_to_token(token) or ""

    def _begins_word(self, token: int) -> bool:
        piece = self.piece(token)
        return piece == INSIDE or not piece.startswith(INSIDE)


class _Words(dict[str, tuple[int, ...]]):
    """The ids of every word so far: most of a text is the same few thousand words."""

    def __init__(self, encoder: Library):
        self._encoder = encoder

    def __missing__(self, word: str) -> tuple[int, ...]:
        self[word] = ids = tuple(self._encoder.encode(word, add_special_tokens=False).ids)
        return ids


class _Rules(dict[int, str]):
    """What each character becomes, by code point: all of BERT's rules but one treat characters on
    their own, so a text is translated in one pass and then only split at blanks."""

    def __init__(self, clean: bool, chinese: bool, lowercase: bool, strip: bool):
        self._clean, self._chinese, self._lowercase, self._strip = clean, chinese, lowercase, strip

    def __missing__(self, point: int) -> str:
        self[point] = made = self._made(chr(point))
        return made

    def _made(self, character: str) -> str:
        if character.isspace() and (not self._clean or character not in "\v\f\x1c\x1d\x1e\x1f\x85"):
            return " "
        if self._clean and (
            character in "\0\ufffd" or unicodedata.category(character) in ("Cc", "Cf")
        ):
            return ""
        made = character.lower() if self._lowercase else character
        if self._strip:
            made = "".join(
                c for c in unicodedata.normalize("NFD", made) if unicodedata.category(c) != "Mn"
            )
        made = "".join(f" {c} " if _is_punctuation(c) else c for c in made)
        return f" {made} " if self._chinese and is_chinese(character) else made

    def apply(self, text: str) -> str:
        """The words of a text between blanks."""
        return self._final_sigmas(text).translate(self)

    def parts(self, text: str) -> list[str]:
        """What each character of a text becomes; together they are `apply`."""
        return [self[ord(character)] for character in self._final_sigmas(text)]

    def _final_sigmas(self, text: str) -> str:
        # The one rule that looks at its neighbours: a capital sigma that ends a word.
        if not self._lowercase or "Σ" not in text:
            return text
        return re.sub(r"\S*Σ\S*", lambda found: _with_final_sigma(found[0]), text)


def _with_final_sigma(word: str) -> str:
    lower = word.lower()
    if len(lower) != len(word):
        return word
    return "".join(low if c == "Σ" else c for c, low in zip(word, lower, strict=True))


def _is_punctuation(character: str) -> bool:
    point = ord(character)
    ascii_sign = 33 <= point <= 47 or 58 <= point <= 64 or 91 <= point <= 96 or 123 <= point <= 126
    return ascii_sign or unicodedata.category(character).startswith("P")


def write(directory: Path, made: Library, kind: str, eot: int | None) -> None:
    """Writes a WordPiece as a tokenizer folder of that kind."""
    vocab = max(made.get_vocab(with_added_tokens=True).values()) + 1
    names = {"cls": CLS, "sep": SEP, "mask": MASK, "pad": PAD}
    ids = {name: made.token_to_id(piece) for name, piece in names.items()}
    write_tokenizer(
        directory,
        {_TOKENIZER: made.to_str(pretty=False).encode()},
        {name: i for name, i in ids.items() if i is not None},
        kind=kind,
        vocab=vocab,
        eot=eot,
        unknown=made.token_to_id(UNKNOWN),
        lossless=False,
    )


def read(path: Path, lowercase: bool) -> Library:
    """A published WordPiece: a vocabulary file, or a folder with vocab.txt or tokenizer.json.

    Raises:
      ValueError: names the file that is missing, damaged, no WordPiece, or of the other case.
    """
    if path.is_dir():
        found = [path / name for name in ("vocab.txt", _TOKENIZER) if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: no tokenizer here; wanted vocab.txt or {_TOKENIZER}")
        path = found[0]
    if path.name == _TOKENIZER:
        made = bpe.parse_tokenizer(path, models.WordPiece)
        _check_case(path, _options(made, path)["lowercase"], lowercase)
        _check_controls(path, made.get_vocab(with_added_tokens=True))
        return made
    settings = _settings(path.with_name("tokenizer_config.json"))
    _check_case(path, settings.get("do_lower_case", lowercase), lowercase)
    vocab = _read_vocab(path)
    _check_controls(path, vocab)
    chinese, strip = settings.get("tokenize_chinese_chars", True), settings.get("strip_accents")
    return _make(vocab, lowercase, chinese, strip)


def _settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from None


def _check_case(path: Path, published: bool, asked: bool) -> None:
    if published != asked:
        raise ValueError(
            f"{path}: this vocabulary's tokenizer {_CASES[published]}:"
            f" set data.tokenizer.lowercase={str(published).lower()}"
        )


def _check_controls(path: Path, vocab: dict[str, int]) -> None:
    if missing := [name for name in (UNKNOWN, CLS, SEP) if name not in vocab]:
        raise ValueError(f"{path}: has no {' and no '.join(missing)}; is it a BERT vocabulary?")


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        lines = read_bytes(path).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from None
    rows = [line.strip().split("\t") for line in lines]
    if len(rows[0]) == 1:
        # Of a piece that stands there twice the later id is used, as in the original.
        return {row[0]: i for i, row in enumerate(rows) if row[0]}
    vocab = {}
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or row[1] != str(number - 1):
            raise ValueError(f"{path}:{number}: wanted a piece, a tab and its id {number - 1}")
        vocab[row[0]] = number - 1
    return vocab


def _make(
    vocab: dict[str, int], lowercase: bool, chinese: bool = True, strip: bool | None = None
) -> Library:
    model = models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD)
    made = Library(model)
    made.normalizer = normalizers.BertNormalizer(True, chinese, strip, lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(INSIDE, cleanup=False)
    made.post_processor = processors.BertProcessing((SEP, vocab[SEP]), (CLS, vocab[CLS]))
    made.add_special_tokens([name for name in CONTROLS if name in vocab])
    return made


def _options(made: Library, path: Path) -> dict[str, bool]:
    """The rules of a tokenizer.json. Errors: ValueError naming the file, for other ones."""
    spec = json.loads(made.to_str())
    rules, model = spec["normalizer"] or {}, spec["model"]
    words = (spec["pre_tokenizer"] or {}).get("type")
    if rules.get("type") != "BertNormalizer" or words != "BertPreTokenizer":
        raise ValueError(f"{path}: its words are not made by BERT's rules")
    if (model["unk_token"], model["continuing_subword_prefix"]) != (UNKNOWN, INSIDE):
        raise ValueError(f"{path}: wanted {UNKNOWN} for the unknown, and {INSIDE} inside of words")
    strip = rules["lowercase"] if rules["strip_accents"] is None else rules["strip_accents"]
    return {
        "clean": rules["clean_text"],
        "chinese": rules["handle_chinese_chars"],
        "lowercase": rules["lowercase"],
        "strip": strip,
    }


def train(texts: Iterable[str], vocab: int, lowercase: bool) -> Library:
    """A WordPiece learnt from texts: [PAD] [UNK] [CLS] [SEP] [MASK], characters, merges.

    The most common characters take at most nine tenths of the vocabulary; words with others are
    unknown. Errors: ValueError for no text, and for no room.
    """
    rules = _Rules(clean=True, chinese=True, lowercase=lowercase, strip=lowercase)
    split = [rules.apply(text) for text in texts]
    counts = Counter(chain.from_iterable(text.split() for text in split))
    if not counts:
        raise ValueError("the training split has no text to learn a tokenizer from")
    if vocab < len(CONTROLS) + 2:
        raise ValueError(f"vocab={vocab}: a WordPiece needs {len(CONTROLS)} controls and some room")
    always = rules.apply(string.ascii_letters + string.digits + string.punctuation)
    counts.update(dict.fromkeys(set(always.replace(" ", "")), 0))
    kept, rare = _alphabet(counts, max(1, (vocab - len(CONTROLS)) * 9 // 10))
    # The trainer numbers what it meets in the order of its hash table, which differs from run to
    # run: naming every character in both forms leaves it nothing to number but its merges.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[*CONTROLS, *kept],
        limit_alphabet=0,
        show_progress=False,
    )
    library = Library(models.WordPiece(unk_token=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    blank = str.maketrans(dict.fromkeys(rare, " "))
    library.train_from_iterator((text.translate(blank) for text in split), trainer)
    return _make(library.get_vocab(with_added_tokens=True), lowercase)


def _alphabet(counts: Counter[str], room: int) -> tuple[list[str], list[str]]:
    """(one-character pieces that fit in `room`, the characters left out), the common ones first.

    Signs and Chinese characters are words by themselves, so they need one piece; others have one
    to begin a word and one to go on with it.
    """
    characters: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            characters[character] += count
    kept: list[str] = []
    ranked = sorted(characters, key=lambda c: (-characters[c], c))
    for place, character in enumerate(ranked):
        alone = is_chinese(character) or _is_punctuation(character)
        forms = [character] if alone else [character, INSIDE + character]
        if len(kept) + len(forms) > room:
            return kept, ranked[place:]
        kept += forms
    return kept, []
