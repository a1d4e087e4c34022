# SPDX-License-Identifier: Apache-2.0
"""The words of Chinese text, and the entities of a dictionary."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.tokenizer_base import is_chinese, read_bytes


class Jieba:
    """jieba's words. Errors: ValueError where it is not installed."""

    def __init__(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it imports what setuptools has deprecated
                import jieba
        except ImportError:
            raise ValueError(
                "data.units.words='jieba' needs a package: pip install jieba==0.42.1"
            ) from None
        self._cut = _dictionary(jieba).cut

    def word_starts(self, text: str) -> np.ndarray:
        """bool[characters]: where a word begins."""
        starts = np.zeros(len(text), bool)
        at = 0
        for word in self._cut(text):
            starts[at] = True
            at += len(word)
        assert at == len(text), "jieba lost a character"
        return starts


def _dictionary(jieba: Any) -> Any:
    """A segmenter with jieba's own dictionary, read here: jieba itself would log, and would trust
    and leave a cache in the shared temporary folder."""
    segmenter = jieba.Tokenizer()
    with segmenter.get_dict_file() as file:
        segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(file)
    segmenter.initialized = True
    return segmenter


class Entities:
    """A dictionary of entities: a UTF-8 file, one a line. Errors: ValueError naming the file."""

    def __init__(self, path: Path):
        try:
            lines = read_bytes(path).decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
        self._names = {line.strip() for line in lines} - {""}
        if not self._names:
            raise ValueError(f"{path}: holds no entity; wanted one a line")
        sizes: dict[str, set[int]] = {}
        for name in self._names:
            sizes.setdefault(name[:2], set()).add(len(name))
        self._sizes = {head: sorted(found, reverse=True) for head, found in sizes.items()}

    def find(self, text: str) -> list[tuple[int, int]]:
        """(first character, the one after the last) of the entities in a text: the longest at each
        place, from the left, case as written, never a part of a word in letters."""
        found, at = [], 0
        while at < len(text):
            end = at + self._length(text, at)
            if end > at:
                found.append((at, end))
            at = max(end, at + 1)
        return found

    def _length(self, text: str, at: int) -> int:
        sizes = [*self._sizes.get(text[at : at + 2], ()), *self._sizes.get(text[at], ())]
        if not sizes or _is_inside_word(text, at):
            return 0
        for size in sizes:
            if text[at : at + size] in self._names and not _is_inside_word(text, at + size):
                return size
        return 0


def _is_inside_word(text: str, at: int) -> bool:
    """Whether a cut before the character `at` would tear a word in letters or digits."""
    if not 0 < at < len(text):
        return False
    return all(c.isalnum() and not is_chinese(c) for c in text[at - 1 : at + 1])
