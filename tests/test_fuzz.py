# SPDX-License-Identifier: Apache-2.0
"""Random input: whatever comes, it is taken whole or refused with a ValueError of ours.

Each target is tried with a hundred fixed cases here, and with many more fresh ones in the slow
suite.
"""

import gzip
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from commands import DEMO, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmjax import recipe, store, tokenizer_base
from lmjax.__main__ import _assignments
from lmjax.document import Document, Report
from lmjax.store import build_store, open_store
from lmjax.text import BadFile, BadRecord, Files
from lmjax.tokenizer import ByteBPE, Characters, SentencePiece, Tokenizer, WordPiece, load_tokenizer

FAST, SLOW = 100, 600
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["text", "<u2", "../x", "train", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.just("text"), inner, max_size=3)
    ),
    max_leaves=8,
)


def refused(error: Exception, kinds: tuple[type, ...] = (ValueError,)) -> None:
    """An error that a user may see: one of ours, with words, not one of a library's."""
    assert type(error) in kinds, repr(error)
    assert str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- recipe overrides -----------------------------------------------------------------------------

EXPERIMENTS = (DEMO, "experiments/bert_base.py", "experiments/elmo.py", "experiments/gpt3_small.py")


@cache
def toys() -> list[Any]:
    return [recipe.load(str(ROOT / p), tiny=True) for p in EXPERIMENTS if (ROOT / p).is_file()]


@cache
def known_keys() -> list[str]:
    keys = {key for run in toys() for key, _ in recipe.flatten(recipe.to_json(run))}
    return sorted(keys | {key.rpartition(".")[0] for key in keys} - {""})


VALUES = st.one_of(
    st.text(max_size=12),
    st.integers(-(2**40), 2**40).map(str),
    st.floats().map(str),
    st.sampled_from(["none", "true", "1,2", "", "files:x", "builtin", "tfds:", "1e999", "0x10"]),
)


def check_overrides(cases: st.DataObject, folder: Path) -> None:
    run = cases.draw(st.sampled_from(toys()))
    odd = st.text(max_size=10) | st.sampled_from(["..", "model.", ".model", "__class__"])
    keys = st.sampled_from(known_keys()) | odd
    words = cases.draw(st.lists(st.tuples(keys, VALUES), min_size=1, max_size=3))
    try:
        assignments = _assignments([f"--{key}={value}" for key, value in words])
        made = recipe.override(run, assignments)
    except ValueError as error:
        return refused(error)
    recorded = json.loads(recipe.dump(recipe.to_json(made)).encode())
    assert recipe.to_json(recipe.from_json(made, recorded)) == recipe.to_json(made)


def check_recorded(cases: st.DataObject, folder: Path) -> None:
    """A recipe.json that somebody, or a disk, has changed."""
    run = cases.draw(st.sampled_from(toys()))
    recorded = json.loads(recipe.dump(recipe.to_json(run)))
    changed(cases, recorded)
    try:
        recipe.to_json(recipe.from_json(run, recorded))
    except ValueError as error:
        refused(error)


def changed(cases: st.DataObject, tree: Any) -> None:
    """Puts something else at a random place in nested JSON, or takes the place away."""
    places = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    for holder, key in places:
        value = holder[key]
        if isinstance(value, dict):
            places += [(value, inner) for inner in value]
        elif isinstance(value, list):
            places += [(value, inner) for inner in range(len(value))]
    holder, key = places[cases.draw(st.integers(0, len(places) - 1))]
    if cases.draw(st.integers(0, 4)) == 0:
        del holder[key]
    else:
        near = st.sampled_from([holder[key], 0, 1, -1, 1 << 40, True, "x", "../x", None, [], {}])
        holder[key] = cases.draw(near | JSON)


# --- files ----------------------------------------------------------------------------------------


def read(path: Path, on_bad: str, report: Report, **how: Any) -> list[Document]:
    return list(Files(str(path), on_bad=on_bad, **how).documents(report))  # type: ignore[arg-type]


def check_file(path: Path, **how: Any) -> list[Document] | None:
    """The documents of a file, or None where it is refused; skipping never ends in an error."""
    report = Report()
    skipped = read(path, "skip", report, **how)
    assert report.documents == len(skipped) and report.lines()
    for document in skipped:
        document.text.decode()
    try:
        found = read(path, "error", Report(), **how)
    except ValueError as error:
        refused(error, (BadRecord, BadFile))
        assert str(error).startswith(str(path)) and report.dropped
        return None
    assert found == skipped
    return found


def check_records(cases: st.DataObject, folder: Path) -> None:
    text = st.text(max_size=20) | st.just("good")
    record = JSON | st.fixed_dictionaries({"text": text | JSON}, optional={"x": JSON})
    line = record.map(lambda value: json.dumps(value).encode())
    odd = st.binary(max_size=12) | st.sampled_from([b"", b" ", b'{"text": 1, "text": 2}', b"{"])
    torn = st.tuples(line, st.integers(0, 30), st.binary(max_size=2)).map(
        lambda made: made[0][: made[1]] + made[2] + made[0][made[1] :]
    )
    lines = cases.draw(st.lists(line | odd | torn, max_size=5))
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    check_file(path)


ENCODINGS = ("utf-8", "ascii", "latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252", "gb18030")


def check_text(cases: st.DataObject, folder: Path) -> None:
    content = cases.draw(
        st.binary(max_size=60)
        | st.text(max_size=40).map(str.encode)
        | st.text("ab\r\n\u2028\x85\x00\ufeff\x1c é", max_size=30).map(str.encode)
        | st.text(max_size=20).map(lambda text: text.encode("utf-16"))
    )
    encoding = cases.draw(st.sampled_from(ENCODINGS))
    rule = cases.draw(st.sampled_from(["auto", "file", "blank-line", "line"]))
    path = folder / "a.txt"
    if cases.draw(st.booleans()):
        path.write_bytes(content)
    else:
        path = folder / "a.txt.gz"
        packed = gzip.compress(content, mtime=0)
        cut = cases.draw(st.sampled_from([0, 0, 0, *range(1, len(packed))]))
        path.write_bytes(
            packed[: len(packed) - cut] + cases.draw(st.sampled_from([b"", b"\0", b"x"]))
        )
    found = check_file(path, encoding=encoding, document=rule)
    if found and encoding == "utf-8" and rule == "file" and path.suffix == ".txt":
        (document,) = found
        assert document.text == content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")


@cache
def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    rows = pyarrow.table({"text": ["one", None, "three"] * 3, "n": [1, 2, 3] * 3})
    pyarrow.parquet.write_table(rows, sink)
    return sink.getvalue().to_pybytes()


def check_parquet(cases: st.DataObject, folder: Path) -> None:
    content = bytearray(parquet())
    for _ in range(cases.draw(st.integers(0, 3))):
        content[cases.draw(st.integers(0, len(content) - 1))] = cases.draw(st.integers(0, 255))
    path = folder / "a.parquet"
    path.write_bytes(content[: cases.draw(st.sampled_from([len(content), len(content) - 9, 9]))])
    check_file(path)


# --- tokenizers and stores ------------------------------------------------------------------------

PROSE = [f"document {i} é ☃ {'x' * (i % 7)}, and a bird\n".encode() for i in range(60)]
SPECS = (
    SentencePiece(vocab=350),
    SentencePiece(vocab=350, controls="albert"),
    ByteBPE(vocab=300),
    ByteBPE(vocab=300, controls="roberta"),
    WordPiece(vocab=120),
    Characters(),
)


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> list[Tokenizer]:
    for number, spec in enumerate(SPECS):
        spec.build(iter(PROSE), folder / f"tokenizer{number}")
    return [load_tokenizer(folder / f"tokenizer{number}") for number in range(len(SPECS))]


def check_round_trip(cases: st.DataObject, folder: Path) -> None:
    tokenizer = cases.draw(st.sampled_from(TOKENIZERS))
    marks = st.sampled_from(["<|endoftext|>", "<s>", "[MASK]", "[SEP]", "▁", "</s>", "<unk>", "##"])
    text = "".join(cases.draw(st.lists(st.text(max_size=12) | marks, max_size=5)))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab)
    controls = {*tokenizer.controls.values(), tokenizer.eot} - {None, tokenizer.unknown}
    assert not controls & set(ids.tolist())
    if tokenizer.lossless and tokenizer.unknown not in ids.tolist():
        assert tokenizer.decode(ids) == text
    [tokenizer.piece(i) for i in ids[:3].tolist()]


TOKENIZERS: list[Tokenizer] = []


@pytest.fixture(scope="module")
def built(folder: Path, tokenizers: list[Tokenizer]) -> Path:
    TOKENIZERS[:] = tokenizers
    documents = [Document(f"d{i}", text) for i, text in enumerate(PROSE)]
    names = ("train", "validation", "test")
    build_store(folder / "store", documents, tokenizers[2], {}, lambda d: names[int(d.id[1:]) % 3])
    build_store(folder / "characters", documents, tokenizers[5], {}, lambda d: "train")
    return folder


def check_manifest(cases: st.DataObject, folder: Path) -> None:
    """A manifest that was changed and sealed again, or damaged in its bytes."""
    path = folder / "store" / "manifest.json"
    resealed(cases, path, store._seal)
    opens_or_is_refused(folder / "store", path)


def check_description(cases: st.DataObject, folder: Path) -> None:
    """The same for a tokenizer's description, and for its files."""
    name = cases.draw(st.sampled_from(["store", "characters"]))
    path = folder / name / "tokenizer" / "description.json"
    resealed(cases, path, tokenizer_base._seal)
    try:
        load_tokenizer(path.parent).decode([0, 1])
    except ValueError as error:
        refused(error)
    finally:
        restore(path)


def resealed(cases: st.DataObject, path: Path, seal: Callable[[dict[str, Any]], str]) -> None:
    kept = path.with_name("kept")
    if not kept.exists():
        shutil.copy(path, kept)
    tree = json.loads(kept.read_bytes())
    tree.pop("seal")
    changed(cases, tree)
    tree["seal"] = seal(tree) if cases.draw(st.integers(0, 3)) else "0"
    content = bytearray(json.dumps(tree).encode())
    if not cases.draw(st.integers(0, 5)):
        content[cases.draw(st.integers(0, len(content) - 1))] = cases.draw(st.integers(0, 255))
    path.write_bytes(content)


def restore(path: Path) -> None:
    shutil.copy(path.with_name("kept"), path)


def opens_or_is_refused(directory: Path, path: Path) -> None:
    try:
        found = open_store(directory)
        for split in found.splits.values():
            assert split.n_documents == len(split.document_ids())
            assert not split.n_tokens or int(split.tokens.max()) < found.vocab
    except ValueError as error:
        refused(error)
        assert str(directory) in str(error)
    finally:
        restore(path)


TARGETS = {
    "recipe overrides": check_overrides,
    "recorded recipes": check_recorded,
    "records of JSONL": check_records,
    "text": check_text,
    "Parquet": check_parquet,
    "tokenizers": check_round_trip,
    "manifests of stores": check_manifest,
    "descriptions of tokenizers": check_description,
}


def fuzz(target: str, cases: int, fixed: bool, folder: Path) -> None:
    """Tries a target with that many random cases."""
    check = TARGETS[target]
    how = settings(
        max_examples=cases, derandomize=fixed, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    how(given(st.data())(lambda data: check(data, folder)))()


@pytest.mark.parametrize("target", TARGETS)
def test_a_hundred_fixed_cases(target: str, built: Path):
    fuzz(target, FAST, True, built)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_fresh_cases(target: str, built: Path):
    fuzz(target, SLOW, False, built)
