# SPDX-License-Identifier: Apache-2.0
"""Next-token examples: windows cut from the packed token stream of a split.

Shapes: B examples, L window length. The stream is a circle: every document starts with the
end-of-text id, so the last window of an epoch may run on into the first document.
"""

from dataclasses import dataclass

import numpy as np

from lmjax.examples.permutation import mix, permute
from lmjax.store import Split


@dataclass(frozen=True)
class Windows:
    """Windows of `length` targets; each token is a target at most once an epoch.

    Example i is a pure function of (split, seed, i): epoch i // n takes its windows in an order,
    and from an offset, of its own.
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"data.examples.length={self.length}: must be at least 1")

    def epoch(self, split: Split, seed: int = 0) -> int:
        """Examples in one pass over the split, with any seed.

        Raises:
          ValueError: the split is shorter than one window.
        """
        if len(split.tokens) < self.length + 1:
            raise ValueError(
                f"the {split.name} split has {len(split.tokens):,} tokens, fewer than one window "
                f"of {self.length:,} + 1; add text or make --data.examples.length smaller"
            )
        return len(split.tokens) // self.length

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Of each array of a batch: its shape without the rows, and its type."""
        names = ("tokens_BL", "targets_BL", "segments_BL", "positions_BL")
        shape = (self.length,)
        return dict.fromkeys(names, (shape, np.int32)) | {"weights_BL": (shape, np.float32)}

    def train(self, split: Split, seed: int, examples: np.ndarray) -> dict[str, np.ndarray]:
        """The examples with these global indices (B,), as arrays (B, L)."""
        return self._cut(split, self._starts(split, seed, examples))

    def places(self, split: Split, seed: int, examples: np.ndarray) -> list[list[tuple[int, int]]]:
        """Of each example, the stretches [a, b) of the split's tokens that it reads."""
        total, found = len(split.tokens), []
        for start in self._starts(split, seed, examples) % total:
            end = int(start) + self.length + 1
            found.append([(int(start), min(end, total)), *([(0, end - total)] * (end > total))])
        return found

    def _starts(self, split: Split, seed: int, examples: np.ndarray) -> np.ndarray:
        """Where these windows begin in the stream, which goes on behind its end; int64 (B,)."""
        per_epoch = self.epoch(split)
        epochs, places = np.divmod(examples.astype(np.int64), per_epoch)
        starts = np.empty(len(examples), np.int64)
        for epoch in np.unique(epochs):  # a batch touches one epoch, rarely two
            here = epochs == epoch
            order = permute(places[here], per_epoch, mix(seed, int(epoch)))
            offset = mix(seed, int(epoch), 1) % self.length
            starts[here] = offset + order * self.length
        return starts

    def held_out_count(self, split: Split) -> int:
        """Windows that cover the split once."""
        self.epoch(split)
        return -(-self._targets(split) // self.length)

    def held_out(self, split: Split, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Windows of the split in order; every token is a target exactly once.

        With an end-of-text id, the end of the last document is a target too (its id is the one
        that starts the circle again). Windows past the end have weight zero.
        """
        batch = self._cut(split, windows.astype(np.int64) * self.length)
        place = windows[:, None] * self.length + np.arange(self.length)
        batch["weights_BL"] *= place < self._targets(split)
        return batch

    def _targets(self, split: Split) -> int:
        return len(split.tokens) - (split.eot is None)

    def _cut(self, split: Split, starts: np.ndarray) -> dict[str, np.ndarray]:
        tokens, total = split.tokens, len(split.tokens)
        index = starts[:, None] + np.arange(self.length + 1)
        index %= total
        cut = tokens[index].astype(np.int32)
        segments, positions = self._documents(split, starts % total)
        return {
            "tokens_BL": cut[:, :-1],
            "targets_BL": cut[:, 1:],
            "weights_BL": np.ones((len(starts), self.length), np.float32),
            "segments_BL": segments,
            "positions_BL": positions,
        }

    def _documents(self, split: Split, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segment ids from 1 and positions since the document's start in the window, (B, L)."""
        length = self.length
        circle = split.circle
        first = np.searchsorted(circle, starts, side="right")
        last = np.searchsorted(circle, starts + length, side="left")
        counts = last - first
        row = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        column = circle[np.repeat(first, counts) + within] - starts[row]
        begins = np.zeros((len(starts), length), np.int32)
        begins[row, column] = 1
        segments = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
        place = np.arange(length, dtype=np.int32)
        since = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        return segments, (place - since).astype(np.int32)
