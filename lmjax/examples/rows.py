# SPDX-License-Identifier: Apache-2.0
"""From ranges of the token stream to batches: what the encoders' example makers share.

A maker says which ranges of the stream its instances are in one variant of a pass. Pass p has
variant p % duplicates, so a cycle of passes has a known number of rows and the place of any
example in the run is found by one search. Shapes: n instances of a variant, M instances of a
batch, W their longest, B rows, L row length, P scored slots, C sequences a row.
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from lmjax.examples import draws
from lmjax.examples.masks import Masks, Text
from lmjax.examples.packing import SEQUENCES, Packing, pack
from lmjax.examples.permutation import mix, permute
from lmjax.store import Split
from lmjax.tokenizer import ENTITY, WORD

_HELD_OUT_SEED = 0x4E1D  # of every run: its numbers are compared between runs
_OF_RANGES, _OF_STATIC_MASKS, _OF_MASKS, _OF_ORDER, _OF_PACKING = range(5)
_KEPT_BYTES = 1 << 28


class Ranges(NamedTuple):
    """n instances [CLS] A [SEP] B [SEP], or [CLS] A [SEP] where B is empty.

    a_from_n, b_from_n: int64, where the texts begin in the stream. a_size_n, b_size_n: int32,
    their tokens. label_n: int8.
    """

    a_from_n: np.ndarray
    a_size_n: np.ndarray
    b_from_n: np.ndarray
    b_size_n: np.ndarray
    label_n: np.ndarray

    @classmethod
    def of(cls, a_from, a_size, b_from, b_size, label) -> "Ranges":
        """Ranges of any integers, stored compactly."""
        dtypes = (np.int64, np.int32, np.int64, np.int32, np.int8)
        columns = (a_from, a_size, b_from, b_size, label)
        return cls(*(np.asarray(c).astype(d) for c, d in zip(columns, dtypes, strict=True)))

    def take(self, index: np.ndarray) -> "Ranges":
        """These instances."""
        return Ranges(*(column[index] for column in self))

    def sizes(self) -> np.ndarray:
        """Tokens of each instance, controls included, int64."""
        return self.a_size_n + np.where(self.b_size_n > 0, self.b_size_n + 3, 2).astype(np.int64)


class Variant(NamedTuple):
    """The instances of one variant, and their rows where they are packed."""

    ranges: Ranges
    packing: Packing | None

    def count(self) -> int:
        """Rows."""
        return len(self.packing.starts_R) - 1 if self.packing else len(self.ranges.a_from_n)

    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(column.nbytes for column in (*self.ranges, *(self.packing or ())))

    def members(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(instances_M, row_M): what these rows hold, row_M counting from 0 along `rows`."""
        if self.packing is None:
            return rows, np.arange(len(rows))
        first, last = self.packing.starts_R[rows], self.packing.starts_R[rows + 1]
        row = np.repeat(np.arange(len(rows)), last - first)
        place = np.arange(len(row)) + np.repeat(first - _before(last - first), last - first)
        return self.packing.instances_n[place], row


class Rows:
    """Base of the makers, which are frozen dataclasses with these fields.

    length: of the rows. masks: the scheme. duplicates: variants. static: masks are drawn for the
    variant, not for the pass. pack: several instances a row. paired: instances have labels.
    typed: instances may have a second text.
    A maker's `ranges(split, key)` gives the instances of the variant that `key` stands for.
    """

    length: int
    masks: Masks
    duplicates: int = 10
    static: bool = False
    pack: bool = False
    paired: bool = False
    typed: bool = True

    def ranges(self, split: Split, key: int) -> Ranges:
        """Every instance of one pass over the split, none of them over `length`."""
        raise NotImplementedError

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Of each array of a batch: its shape without the rows, and its type."""
        names = ["tokens_BL", "segments_BL", "masked_BP", "targets_BP", "weights_BP"]
        names += ["types_BL"] * self.typed + ["positions_BL"] * self.pack
        names += ["firsts_BC", "pairs_BC", "pair_weights_BC"] * self.paired
        columns = {"L": self.length, "P": self.masks.slots(self.length), "C": self.sequences}
        return {
            name: ((columns[name[-1]],), np.float32 if "weights" in name else np.int32)
            for name in names
        }

    @property
    def sequences(self) -> int:
        """Slots for the labels of a row's instances."""
        return SEQUENCES if self.pack else 1

    def epoch(self, split: Split, seed: int = 0) -> int:
        """Examples in the first pass over the split."""
        return self._variants(split, seed).get(split, 0).count()

    def train(self, split: Split, seed: int, examples: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these global indices (B,), as arrays (B, ...)."""
        return _assemble(split, self, self._parts(split, seed, examples), len(examples))

    def places(self, split: Split, seed: int, examples: np.ndarray) -> list[list[tuple[int, int]]]:
        """Of each row, the stretches [a, b) of the split's tokens that it reads."""
        part = self._parts(split, seed, examples)
        found: list[list[tuple[int, int]]] = [[] for _ in examples]
        a_from, a_size, b_from, b_size, _ = part.ranges
        for at, row in enumerate(part.row_M):
            for start, size in ((a_from[at], a_size[at]), (b_from[at], b_size[at])):
                if size:
                    found[row].append((int(start), int(start + size)))
        return found

    def _parts(self, split: Split, seed: int, examples: np.ndarray) -> "_Part":
        """The instances of these rows."""
        variants = self._variants(split, seed)
        passes, which, places = variants.locate(split, examples.astype(np.int64))
        parts = []
        for pass_ in np.unique(passes):  # a batch touches one pass, rarely two
            here = np.flatnonzero(passes == pass_)
            number = int(which[here[0]])
            variant = variants.get(split, number)
            order = permute(places[here], variant.count(), mix(seed, int(pass_), _OF_ORDER))
            masks = (number, _OF_STATIC_MASKS) if self.static else (int(pass_), _OF_MASKS)
            parts.append(_take(variant, order, here, mix(seed, *masks)))
        return _joined(parts)

    def held_out_count(self, split: Split) -> int:
        """Rows that show the split once."""
        return self._variants(split, _HELD_OUT_SEED).get(split, 0).count()

    def held_out(self, split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the split in order, the same in every run and at every evaluation.

        Indices past the end show the last row; whoever asks for them blanks them.
        """
        variant = self._variants(split, _HELD_OUT_SEED).get(split, 0)
        rows = np.minimum(indices.astype(np.int64), variant.count() - 1)
        key = mix(_HELD_OUT_SEED, 0, _OF_STATIC_MASKS)
        part = _take(variant, rows, np.arange(len(rows)), key)
        return _assemble(split, self, part, len(indices))

    def _variants(self, split: Split, seed: int) -> "_Variants":
        if (self, seed) not in split.memo:
            _check(self, split)
            split.memo[self, seed] = _Variants(self, seed)
        return split.memo[self, seed]

    def variant(self, split: Split, seed: int, number: int) -> Variant:
        """The rows of variant `number` of a seed. Errors: ValueError where there are none."""
        ranges = self.ranges(split, mix(seed, number, _OF_RANGES))
        if not len(ranges.a_from_n):
            raise ValueError(f"the {split.name} split has too little text for one example")
        if not self.pack:
            return Variant(ranges, None)
        sizes, slots = ranges.sizes(), self.masks.slots(self.length)
        costs = np.minimum(self.masks.most(sizes), slots)
        order = mix(seed, number, _OF_PACKING)
        return Variant(ranges, pack(sizes, costs, self.length, slots, order))


class _Variants:
    """The variants of one maker, split and seed: all counts, and what fits in _KEPT_BYTES.

    It does not hold the split, which holds it.
    """

    def __init__(self, maker: Rows, seed: int):
        self._maker, self._seed = maker, seed
        self._counts: dict[int, int] = {}
        self._kept: OrderedDict[int, Variant] = OrderedDict()

    def get(self, split: Split, number: int) -> Variant:
        """Variant `number`, made if it is not kept."""
        variant = self._kept.get(number) or self._maker.variant(split, self._seed, number)
        self._counts[number] = variant.count()
        self._kept[number] = variant
        self._kept.move_to_end(number)
        while len(self._kept) > 2 and sum(v.nbytes() for v in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return variant

    def locate(self, split: Split, examples: np.ndarray) -> tuple[np.ndarray, ...]:
        """(pass, variant, place in the pass) of each example, int64.

        Counts variants only until the last example is found.
        """
        ends: list[int] = []
        furthest = int(examples.max(initial=0))
        for number in range(self._maker.duplicates):
            if number not in self._counts:
                self.get(split, number)
            ends.append((ends[-1] if ends else 0) + self._counts[number])
            if furthest < ends[-1]:
                break
        cycles, rest = np.divmod(examples, ends[-1])
        which = np.searchsorted(ends, rest, side="right")
        places = rest - np.concatenate([[0], ends])[which]
        return cycles * self._maker.duplicates + which, which, places


class _Part(NamedTuple):
    """Instances of a batch: ranges, streams (uint64) of their masks, rows; in order of rows."""

    ranges: Ranges
    states_M: np.ndarray
    row_M: np.ndarray


def _take(variant: Variant, rows: np.ndarray, batch_rows: np.ndarray, key: int) -> _Part:
    instances, row = variant.members(rows)
    states = draws.states(key, instances)
    return _Part(variant.ranges.take(instances), states, batch_rows[row])


def _joined(parts: list[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    ranges = Ranges(*map(np.concatenate, zip(*(p.ranges for p in parts), strict=True)))
    states = np.concatenate([p.states_M for p in parts])
    return _Part(ranges, states, np.concatenate([p.row_M for p in parts]))


def _check(maker: Rows, split: Split) -> None:
    name = type(maker).__name__
    missing = [c for c in ("cls", "sep", "mask") if c not in split.controls]
    if missing:
        raise ValueError(
            f"{name} needs a tokenizer with the controls cls, sep and mask; this store's has no "
            f"{', '.join(missing)} (WordPiece(), or controls= of the other tokenizers)"
        )
    if maker.masks.reads_marks and split.marks is None:
        raise ValueError(
            f"the {split.name} split has no marks of words, which {type(maker.masks).__name__} "
            "reads: set data.units=Units() in the experiment file"
        )


def _assemble(split: Split, maker: Rows, part: _Part, rows: int) -> dict[str, np.ndarray]:
    ranges, sizes = part.ranges, part.ranges.sizes()
    tokens_MW, marks_MW = _gather(split, ranges, sizes, maker)
    width = tokens_MW.shape[1]
    real_MW = np.arange(width) < sizes[:, None]
    controls = split.controls
    free = real_MW & (tokens_MW != controls["cls"]) & (tokens_MW != controls["sep"])
    text = Text(
        tokens_MW, sizes, free, marks_MW, part.states_M, maker.length, split.vocab, controls
    )
    masked = maker.masks.draw(text)
    place = _Places(part.row_M, sizes, real_MW, rows, maker.length)
    tokens = place.put(masked.tokens_NW, controls.get("pad", 0))
    originals = place.put(tokens_MW, 0)
    weights = place.put(masked.weights_NW, 0)
    batch = {"tokens_BL": tokens, "segments_BL": place.put(place.number_M[:, None] + 1, 0)}
    batch |= _score(tokens, originals, weights, maker.masks.slots(maker.length))
    if maker.typed:
        second_MW = np.arange(width) > ranges.a_size_n[:, None] + 1
        batch["types_BL"] = place.put(second_MW, 0)
    if maker.pack:
        batch["positions_BL"] = place.put(np.arange(width)[None], 0)
    if maker.paired:
        batch |= place.pairs(ranges.label_n, maker.sequences)
    return batch


def _gather(split: Split, ranges: Ranges, sizes, maker: Rows):
    """Tokens (M, W) int32 and, where the masks read them, marks of the instances."""
    rows = np.arange(len(sizes))
    width = maker.length if not maker.pack else int(sizes.max())
    column = np.arange(width)
    middle = ranges.a_size_n.astype(np.int64) + 1  # column of the first [SEP]
    shift_a, shift_b = ranges.a_from_n - 1, ranges.b_from_n - middle - 1
    index = column + np.where(column <= middle[:, None], shift_a[:, None], shift_b[:, None])
    stream = np.asarray(split.tokens)
    tokens = stream.take(index, mode="clip").astype(np.int32)
    cls, sep = split.controls["cls"], split.controls["sep"]
    tokens[:, 0] = cls
    tokens[rows, middle] = tokens[rows, sizes - 1] = sep
    tokens[column >= sizes[:, None]] = split.controls.get("pad", 0)
    if not maker.masks.reads_marks:
        return tokens, None
    marks = np.asarray(split.marks).take(index, mode="clip")
    marks[:, 1] |= WORD | ENTITY  # a text that was cut at the front begins with half a word
    marks[rows, np.minimum(middle + 1, width - 1)] |= WORD | ENTITY
    return tokens, marks


class _Places:
    """Where M instances lie in (B, L): one behind the other in each row."""

    def __init__(self, row_M, sizes_M, real_MW, rows: int, length: int):
        self._real, self._shape, self._row = real_MW, (rows, length), row_M
        # Whole rows of the right width need no moving.
        self._alone = real_MW.shape == self._shape and np.array_equal(row_M, np.arange(rows))
        if self._alone:
            self.number_M = self._offset_M = np.zeros(rows, np.int64)
            return
        begin = np.flatnonzero(np.diff(row_M, prepend=-1) != 0)
        within = np.repeat(begin, np.diff(np.append(begin, len(row_M))))
        before = _before(sizes_M)
        self.number_M = np.arange(len(row_M)) - within
        self._offset_M = before - before[within]
        shift = np.repeat(row_M * length + self._offset_M - before, sizes_M)
        self._flat = np.arange(len(shift)) + shift

    def put(self, values_MW: np.ndarray, padding: int) -> np.ndarray:
        """Values (M, W), or what broadcasts to it, in their rows; int32 (B, L)."""
        if self._alone:
            return np.where(self._real, values_MW, padding).astype(np.int32)
        out = np.full(self._shape, padding, np.int32)
        out.reshape(-1)[self._flat] = np.broadcast_to(values_MW, self._real.shape)[self._real]
        return out

    def pairs(self, label_M: np.ndarray, sequences: int) -> dict[str, np.ndarray]:
        """Columns of [CLS], labels and weights of each sequence, (B, C)."""
        shape, at = (self._shape[0], sequences), (self._row, self.number_M)
        firsts, labels = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        firsts[at], labels[at], weights[at] = self._offset_M, label_M, 1
        return {"firsts_BC": firsts, "pairs_BC": labels, "pair_weights_BC": weights}


def _score(tokens_BL, originals_BL, weights_BL, slots: int) -> dict[str, np.ndarray]:
    """The scored tokens of each row in `slots` slots, by column.

    Those that find no slot are given back to `tokens_BL`, in place.
    """
    rows, columns = np.nonzero(weights_BL)
    count = np.bincount(rows, minlength=len(tokens_BL))
    slot = np.arange(len(rows)) - _before(count)[rows]
    over = slot >= slots
    if over.any():
        lost = rows[over], columns[over]
        tokens_BL[lost] = originals_BL[lost]
        rows, columns, slot = rows[~over], columns[~over], slot[~over]
    shape = (len(tokens_BL), slots)
    masked, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    masked[rows, slot] = columns
    targets[rows, slot] = originals_BL[rows, columns]
    weights[rows, slot] = weights_BL[rows, columns]
    return {"masked_BP": masked, "targets_BP": targets, "weights_BP": weights}


def _before(sizes: np.ndarray) -> np.ndarray:
    """The sum of the sizes before each."""
    return np.cumsum(sizes) - sizes
