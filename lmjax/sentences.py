# SPDX-License-Identifier: Apache-2.0
"""Text cut into sentences, English and Chinese, by lines or by punctuation. Nothing but blanks is
lost."""

import re
from collections.abc import Iterator
from typing import Literal

from lmjax.tokenizer_base import is_chinese

Rule = Literal["auto", "lines", "rules"]
LINES_SHARE = 0.6
SENTENCES_A_LINE = 1.5
_CLOSERS = "\"'”’»)\\]}」』）】》〉"
_OPENERS = "\"'“‘«([{「『（【《〈`"
_CHINESE_ENDS = "。！？；｡．"
# Tokenised text has blanks before what closes a sentence: ". ''".
_SENTENCE_END = re.compile(rf"[.!?…{_CHINESE_ENDS}][{_CLOSERS}\s]*$")
_CUTS = re.compile(
    rf"[{_CHINESE_ENDS}…][!?{_CHINESE_ENDS}…]*[{_CLOSERS}]*"
    rf"|[.!?]+(?P<western>[{_CLOSERS}]*(?: '')?)(?=\s)"
)
_BLANKS = re.compile(r"\s*")
_LAST_WORD = re.compile(r"\S+$")
_INITIALS = re.compile(r"[^\W\d_](?:\.[^\W\d_])+|[A-Z]")
_LONGEST_WORD = 40
_ABBREVIATIONS = frozenset(
    "mr mrs ms messrs mme mlle dr prof rev hon st sr jr mt ft gen col maj capt lt sgt gov sen rep"
    " pres supt adm cmdr vs etc cf al viz approx dept inc ltd co corp bros ave blvd rd"
    " jan feb mar apr jun jul aug sep sept oct nov dec e.g i.e a.m p.m ph.d".split()
)
_NUMBERED = frozenset("no nos vol vols ch chap fig figs p pp art sec eq ver".split())


def split_sentences(text: str, rule: Rule) -> list[str]:
    """The sentences of a document, without the blanks around them.

    "lines": every line that is not blank. "rules": paragraphs end at blank lines, their lines are
    joined, and cut after sentences. "auto": the lines where at least 60 % end as sentences do and
    hold no more than 1.5 sentences each, else the rules.
    """
    lines = [line.strip() for line in re.split(r"\r\n?|\n", text)]
    full = [line for line in lines if line]
    if rule == "lines" or (rule == "auto" and _are_sentences(full)):
        return full
    return [sentence for block in _paragraphs(lines) for sentence in _cut(block)]


def _are_sentences(lines: list[str]) -> bool:
    ending = sum(_SENTENCE_END.search(line[-16:]) is not None for line in lines)
    if ending < LINES_SHARE * len(lines):
        return False
    # Paragraphs that stand on one line each end so as well.
    return sum(len(_cut(line)) for line in lines) <= SENTENCES_A_LINE * len(lines)


def _paragraphs(lines: list[str]) -> Iterator[str]:
    block: list[str] = []
    for line in [*lines, ""]:
        if not line and block:
            yield "".join(block)
            block = []
        elif line:
            # Chinese is wrapped without a blank.
            tight = block and _is_wide(block[-1][-1]) and _is_wide(line[0])
            block += [line] if tight or not block else [" ", line]


def _is_wide(character: str) -> bool:
    """Chinese, or one of its full-width signs."""
    return (
        is_chinese(character)
        or character in "“”‘’…—"
        or "\u3000" <= character <= "\u30ff"
        or ("\uff00" <= character <= "\uffef")
    )


def _cut(paragraph: str) -> list[str]:
    sentences, start = [], 0
    for found in _CUTS.finditer(paragraph):
        if _ends_sentence(paragraph, start, found):
            sentences.append(paragraph[start : found.end()].strip())
            start = found.end()
    return [s for s in (*sentences, paragraph[start:].strip()) if s]


def _ends_sentence(text: str, start: int, found: re.Match[str]) -> bool:
    """Whether a sentence that begins at `start` ends with these signs."""
    blanks = _BLANKS.match(text, found.end())
    assert blanks is not None
    ahead = text[blanks.end() : blanks.end() + 1]
    signs = found[0]
    if found["western"] is None and any(c in _CHINESE_ENDS for c in signs):
        around = text[max(start, found.start() - 1) : found.start()] + ahead
        return signs != "．" or not around.isdigit()
    if found["western"] is None and (_is_wide(text[found.start() - 1]) or _is_wide(ahead or "a")):
        return True  # an ellipsis among Chinese
    begins = ahead.isupper() or ahead.isdigit() or ahead in _OPENERS or _is_wide(ahead)
    if not (ahead and blanks[0] and begins):
        return False
    return signs != "." or not _is_abbreviated(text, start, found.start(), ahead)


def _is_abbreviated(text: str, start: int, end: int, ahead: str) -> bool:
    """Whether the point at `end` belongs to the word before it."""
    last = _LAST_WORD.search(text, max(start, end - _LONGEST_WORD), end)
    if last is None:
        return False
    word = last[0].lstrip(_OPENERS)
    if word == "I":  # a king or a chapter, but not where one speaks of oneself
        before = text[max(start, last.start() - _LONGEST_WORD) : last.start()].split()
        return not before or not before[-1].islower()
    if word.isdigit():
        return not text[start : last.start()].strip()  # the number of a list's item
    known = word.lower() in _ABBREVIATIONS or (word.lower() in _NUMBERED and ahead.isdigit())
    return known or _INITIALS.fullmatch(word) is not None
