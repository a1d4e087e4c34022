# SPDX-License-Identifier: Apache-2.0
"""Of a batch, 64 hosts build every example, each its own rows, and as few or one host would."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from splits import split_of

from lmjax import sharding
from lmjax.batches import Arrays, Plan, Share, host_batches, share_of
from lmjax.document import Document
from lmjax.examples.masks import BertMasks
from lmjax.examples.pairs import SentencePairs
from lmjax.examples.streams import Streams
from lmjax.examples.windows import Windows
from lmjax.plan import chips
from lmjax.sharding import BATCH_AXES, Layout
from lmjax.store import Split, build_store, open_store
from lmjax.tokenizer import load_tokenizer
from lmjax.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)

BATCH = 512  # two rows for each of 256 devices
STEP = 3
# A torus of 64 hosts with 2 × 2 chips each; on most of these meshes the rows of a host are no
# neighbours. The last number: hosts that hold parts of one and the same row, by tensor.
POD = "v5e:16x16"
LAYOUTS = [
    ((256, 1, 1), 1),
    ((1, 256, 1), 1),
    ((32, 8, 1), 1),
    ((2, 64, 2), 1),
    ((8, 8, 4), 2),
    ((16, 1, 16), 8),
]


def shares(topology: str, layout: Layout) -> dict[int, tuple[Share, int]]:
    """Of each host its share and how many rows of `BATCH` its devices hold."""
    devices = chips.devices(topology)
    with sharding.use(layout.mesh(devices)):
        held = sharding.batch_sharding().devices_indices_map((BATCH,))
        found = {}
        for host in sorted({d.process_index for d in devices}):
            mine = {index[0].indices(BATCH)[:2] for d, index in held.items()
                    if d.process_index == host}  # fmt: skip
            found[host] = (share_of(host), sum(hi - lo for lo, hi in mine))
    return found


@pytest.mark.parametrize(("layout", "copies"), LAYOUTS)
def test_each_host_of_a_pod_builds_the_rows_of_its_devices_and_no_others(layout, copies):
    found = shares(POD, Layout(*layout))
    assert len(found) == 64
    built = np.zeros(BATCH, int)
    for share, held in found.values():
        rows = share.rows(BATCH)
        assert len(rows) == held and (np.diff(rows) > 0).all()
        built[rows] += 1
    assert (built == copies).all()


def windows() -> Callable[[np.ndarray], Arrays]:
    starts = np.array([0, 1000, 1300, 5000, 7771])
    split = Split("train", np.arange(7771, dtype=np.uint32), starts, np.diff(starts), Path("none"),
                  7771, 0)  # fmt: skip
    return partial(Windows(16).train, split, 5)


def pairs(pack: bool) -> Callable[[np.ndarray], Arrays]:
    lengths = [[3 + (d * 7 + s * 5) % 11 for s in range(4 + d % 5)] for d in range(60)]
    maker = SentencePairs(length=48, pairing="next", masks=BertMasks(), pack=pack, short=0.5)
    return partial(maker.train, split_of(lengths), 5)


def streams(folder: Path) -> Callable[[np.ndarray], Arrays]:
    words = [f"w{i}" for i in range(40)]
    (folder / "listed.txt").write_text("\n".join(["<S>", "</S>", "<UNK>", *words, ""]), "utf-8")
    Vocabulary(path=str(folder / "listed.txt")).build(iter([]), folder / "t")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice([*words, "zebra"], 9).tolist()) for _ in range(3000)]
    document = Document("d", "\n".join(lines).encode())
    build_store(folder / "s", [document], load_tokenizer(folder / "t"), {}, lambda _: "train")
    maker = Streams(length=4).of_batch(BATCH)
    return partial(maker.train, open_store(folder / "s").splits["train"], 5)


@pytest.mark.parametrize("kind", ["windows", "pairs", "packed", "streams"])
def test_64_hosts_4_hosts_and_one_make_the_same_batch(kind, tmp_path):
    make = {
        "windows": windows,
        "pairs": partial(pairs, False),
        "packed": partial(pairs, True),
        "streams": partial(streams, tmp_path),
    }[kind]()
    plan = Plan(BATCH, 16)

    def built(share: Share) -> Arrays:
        (batch,) = host_batches((make,), plan, STEP, STEP + 1, share)
        batch.pop("spellings_BXL", None)  # unknown words are numbered anew in each call
        return batch

    whole = built(Share())
    assert {len(rows) for rows in whole.values()} == {BATCH}
    for topology, layout in [(POD, Layout(32, 8, 1)), ("v5e:4x4", Layout(2, 8, 1))]:
        joined = {name: np.zeros_like(rows) for name, rows in whole.items()}
        written = np.zeros(BATCH, int)
        for share, _ in shares(topology, layout).values():
            rows = share.rows(BATCH)
            written[rows] += 1
            for name, part in built(share).items():
                joined[name][rows] = part
        assert (written == 1).all()
        for name, rows in whole.items():
            np.testing.assert_array_equal(joined[name], rows, err_msg=f"{topology} {name}")


def test_this_process_builds_the_whole_batch():
    with sharding.use(Layout(2, 2, 2).mesh()):
        share = share_of(jax.process_index())
        assert share.rows(8).tolist() == list(range(8))
        assert share.of == sharding.axis_size(*BATCH_AXES)
