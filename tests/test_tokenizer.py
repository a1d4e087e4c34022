# SPDX-License-Identifier: Apache-2.0
"""Tokenizers lose nothing that they promise to keep, and agree with the published ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax import tokenizer as module
from lmjax import tokenizer_base
from lmjax.tokenizer import (
    GPT1BPE,
    ByteBPE,
    Characters,
    SentencePiece,
    Tokenizer,
    load_tokenizer,
)

SHARED = Path(__file__).parents[2] / "shared" / "data" / "fixtures"
PROSE = (
    "The quick brown fox jumps over the lazy dog. She sells sea shells by the sea shore;\n"
    "\tthe shells she sells are surely sea shells — naïve café, 中文 и русский 😀.\r\n\n"
) * 40
TEXTS = [PROSE.encode(), b"def f(x):\n    return x + 1\n" * 40]
SPECS = {
    "bpe": SentencePiece(vocab=400),
    "unigram": SentencePiece(vocab=400, model_type="unigram"),
    "byte-bpe": ByteBPE(vocab=340),
}
ODD = [
    "a\0b", "\0", "\n\n x", "  lead", "trail  ", "\ttab\t", "é😀中\u0301", "\r\n", "\r", "x\u2581y",
    "\u2581", "\u2581\u2581 \u2581", "\u2585", "<s></s><unk><pad>", "<0x0A>", "<|endoftext|>",
    "\ufeff", "\u2028\x85\x0b\x0c", " ", "", "\u200b", "\ufffd", "｡ﾟﬁ", "e\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, spec in {**SPECS, "gpt1": GPT1BPE(vocab=300), "characters": Characters()}.items():
        spec.build(iter(TEXTS), folder / name)
    return {path.name: load_tokenizer(path) for path in folder.iterdir()}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back(made: dict[str, Tokenizer], name: str, text: str):
    ids = made[name].encode(text)
    assert made[name].decode(ids) == text
    assert made[name].eot not in ids and ids.dtype == np.int32


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(made: dict[str, Tokenizer], name: str, text: str):
    assert made[name].lossless
    assert made[name].decode(made[name].encode(text)) == text


@pytest.mark.parametrize("name", ["bpe", "byte-bpe", "gpt1", "characters"])
def test_training_is_deterministic_and_learns(tmp_path: Path, made, name: str):
    again = {**SPECS, "gpt1": GPT1BPE(vocab=300), "characters": Characters()}[name]
    again.build(iter(TEXTS), tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == made[name].fingerprint
    ids = made[name].encode(PROSE)
    assert ids.max() < made[name].vocab
    assert len(ids) == len(PROSE) if name == "characters" else len(ids) < 0.6 * len(PROSE)


@pytest.mark.parametrize("name", [*SPECS, "characters"])
def test_long_documents_are_encoded_in_pieces(made, name: str, monkeypatch):
    whole = made[name].encode(PROSE)
    monkeypatch.setattr(tokenizer_base, "PIECE_BYTES", 512)
    monkeypatch.setattr(tokenizer_base, "GROUP_BYTES", 2048)
    largest = []
    inner = made[name]._encode_pieces
    monkeypatch.setattr(made[name], "_encode_pieces", lambda t: largest.append(t) or inner(t))
    one, two = made[name].encode_batch([PROSE.encode(), b"short"])
    assert made[name].decode(one) == PROSE and made[name].decode(two) == "short"
    assert max(len(t.encode()) for group in largest for t in group) <= 512
    assert max(sum(len(t.encode()) for t in group) for group in largest) <= 2048
    assert abs(len(one) - len(whole)) < 0.1 * len(whole)


def test_the_end_of_text_has_an_id_of_its_own(made: dict[str, Tokenizer]):
    assert made["byte-bpe"].eot == made["byte-bpe"].vocab - 1 == 339
    assert made["bpe"].eot == 3
    assert made["gpt1"].eot is None and made["characters"].eot is None
    for name in ("bpe", "byte-bpe"):
        tokenizer = made[name]
        assert tokenizer.eot is not None and tokenizer.decode([tokenizer.eot]) == ""


def test_sentencepiece_takes_fewer_ids_where_the_corpus_has_no_more(tmp_path: Path):
    SentencePiece(vocab=100_000).build(iter([b"a tiny corpus\n"]), tmp_path / "t")
    small = load_tokenizer(tmp_path / "t")
    assert 260 < small.vocab < 400 and small.decode(small.encode("zebra\n")) == "zebra\n"


def test_sentencepiece_leaves_rare_characters_to_bytes(tmp_path: Path):
    many = "".join(chr(0x4E00 + i) for i in range(400)).encode()
    SentencePiece(vocab=300).build(iter([many + b" the the the" * 400]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab <= 300
    assert tokenizer.decode(tokenizer.encode(many.decode())) == many.decode()


@pytest.mark.parametrize(
    "spec, message",
    [(SentencePiece(vocab=100), "needs 4 control ids, 256 bytes"), (ByteBPE(vocab=200), "257")],
)
def test_an_impossible_vocabulary_is_refused(tmp_path: Path, spec, message: str):
    with pytest.raises(ValueError, match=message):
        spec.build(iter(TEXTS), tmp_path / "t")


@pytest.mark.parametrize("spec", [SentencePiece(), Characters()])
def test_no_training_text_is_an_error(tmp_path: Path, spec):
    with pytest.raises(ValueError, match="the training split has no text"):
        spec.build(iter([]), tmp_path / "t")


def test_only_train_bytes_are_learnt_from(tmp_path: Path):
    ByteBPE(vocab=300, train_bytes=2000).build(
        iter([b"abab " * 400, b"xyxy " * 4000]), tmp_path / "t"
    )
    pieces = (tmp_path / "t" / "tokenizer.json").read_text()
    assert '"abab"' in pieces and '"xyxy"' not in pieces


def test_a_foreign_sentencepiece_model_is_taken_as_it_is(tmp_path: Path, made):
    source = made["unigram"].directory / "sentencepiece.model"
    SentencePiece(path=str(source)).build(iter([]), tmp_path / "t")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(source))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.encode(PROSE).tolist() == plain.encode(PROSE)
    assert (tokenizer.vocab, tokenizer.eot, tokenizer.lossless) == (plain.vocab_size(), 3, False)


def byte_files(folder: Path, vocab_name: str, merges_name: str) -> Path:
    # Ids of the published order: "!" is 0, and the merges follow the 256 bytes.
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "hell")]
    tokens = [*alphabet, *("".join(m) for m in merges), "<|endoftext|>"]
    folder.mkdir()
    (folder / vocab_name).write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges), ""]
    (folder / merges_name).write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_published_byte_bpe_files_are_read(tmp_path: Path, names):
    folder = byte_files(tmp_path / "gpt2", *names)
    ByteBPE(path=str(folder)).build(iter([]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.encode("hello hell").tolist() == [258, 0 + 78, 259]
    assert tokenizer.eot == 260 and tokenizer.vocab == 261
    assert 260 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


def test_a_tokenizer_json_with_control_tokens_is_read(tmp_path: Path, made):
    # What build writes is such a file: the end of text is an added token in it.
    ByteBPE(path=str(made["byte-bpe"].directory)).build(iter([]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.eot == 339 and 339 not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.encode(PROSE).tolist() == made["byte-bpe"].encode(PROSE).tolist()


def test_a_tokenizer_json_that_loses_text_is_known_as_lossy(tmp_path: Path, made):
    source = json.loads((made["byte-bpe"].directory / "tokenizer.json").read_text("utf-8"))
    blank = source | {"pre_tokenizer": source["pre_tokenizer"] | {"add_prefix_space": True}}
    bare = source | {"pre_tokenizer": None, "decoder": None}
    bare["model"] = source["model"] | {"unk_token": "!"}
    for name, spec in {"same": source, "blank": blank, "bare": bare}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
        ByteBPE(path=str(tmp_path / name)).build(iter([]), tmp_path / f"{name}-built")
        tokenizer = load_tokenizer(tmp_path / f"{name}-built")
        assert tokenizer.lossless == (name == "same")
        assert tokenizer.unknown == (source["model"]["vocab"]["!"] if name == "bare" else None)
    bare["model"] |= {"unk_token": "<|endoftext|>"}
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(bare), "utf-8")
    with pytest.raises(ValueError, match="cannot encode every text: Unk token"):
        ByteBPE(path=str(tmp_path / "bare")).build(iter([]), tmp_path / "t")


def test_a_gpt1_tokenizer_json_is_read(tmp_path: Path, made):
    # An exported folder, and what transformers saves, have no other file.
    GPT1BPE(path=str(made["gpt1"].directory)).build(iter([]), tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").fingerprint == made["gpt1"].fingerprint
    with pytest.raises(ValueError, match=r"tokenizer.json: has no <unk>; is it GPT-1's\?"):
        GPT1BPE(path=str(made["byte-bpe"].directory)).build(iter([]), tmp_path / "t")
    with pytest.raises(ValueError, match=r"no tokenizer here; .* or tokenizer.json"):
        GPT1BPE(path=str(tmp_path)).build(iter([]), tmp_path / "t")


def test_published_files_that_do_not_fit_are_refused(tmp_path: Path):
    folder = byte_files(tmp_path / "gpt2", "vocab.json", "merges.txt")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nq q\n")
    with pytest.raises(ValueError, match=r"merges.txt:3: no merge of two pieces"):
        ByteBPE(path=str(folder)).build(iter([]), tmp_path / "t")
    (folder / "vocab.json").write_text('{"a": 0, "b": 2}')
    with pytest.raises(ValueError, match="vocab.json: the ids"):
        ByteBPE(path=str(folder)).build(iter([]), tmp_path / "t")
    (folder / "vocab.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer here; wanted vocab.json"):
        ByteBPE(path=str(folder)).build(iter([]), tmp_path / "t")


def test_gpt1_lowers_splits_and_knows_what_it_does_not_know(tmp_path: Path):
    tokens = ["<unk>", "a", "b", "ab", "c</w>", "abc</w>", "ab</w>", "b</w>", "'</w>"]
    folder = tmp_path / "gpt1"
    folder.mkdir()
    (folder / "encoder_bpe_40000.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "vocab_40000.bpe").write_text("#version: 0.2\na b\nab c</w>\na b</w>\n")
    GPT1BPE(path=str(folder)).build(iter([]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.encode("ABC áb'—<unk>").tolist() == [5, 6, 8, 0, 0]
    assert isinstance(tokenizer, module.BPETokenizer)
    assert tokenizer.pieces("ABC áb'—<unk>") == ["abc</w>", "ab</w>", "'</w>", "—</w>", "<unk>"]
    assert tokenizer.decode([5, 6]) == "abc ab" and not tokenizer.lossless
    assert tokenizer.unknown == 0 and tokenizer.eot is None


def test_characters_are_in_code_point_order_and_0_is_unknown(tmp_path: Path):
    Characters().build(iter([b"cab", "é\n".encode()]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.encode("\nabcéz").tolist() == [1, 2, 3, 4, 5, 0]
    assert tokenizer.decode([1, 2, 3, 4, 5, 0]) == "\nabcé\ufffd" and tokenizer.vocab == 6


def golden(name: str) -> list[dict]:
    path = SHARED / "golden" / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def test_gpt2_ids_equal_the_golden_ones(tmp_path: Path):
    rows = golden("gpt2_bpe.jsonl")
    ByteBPE(path=str(SHARED / "gpt2_bpe")).build(iter([]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    found = tokenizer.encode_batch([row["text"].encode() for row in rows])
    assert len(rows) > 90 and [ids.tolist() for ids in found] == [row["ids"] for row in rows]
    assert tokenizer.eot == 50_256 and tokenizer.vocab == 50_257


def test_gpt1_ids_and_pieces_equal_the_golden_ones(tmp_path: Path):
    rows = golden("gpt1_bpe_hf_basic.jsonl")
    GPT1BPE(path=str(SHARED / "gpt1_bpe")).build(iter([]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert isinstance(tokenizer, module.BPETokenizer) and tokenizer.vocab == 40_478
    for row in rows:
        assert tokenizer.encode(row["text"]).tolist() == row["ids"]
        assert tokenizer.pieces(row["text"]) == row["tokens"]


ENCODERS = {
    "roberta": (ByteBPE(vocab=340, controls="roberta"), ["<s>", "<pad>", "</s>", "<mask>"]),
    "albert": (
        SentencePiece(vocab=400, model_type="unigram", controls="albert"),
        ["[CLS]", "<pad>", "[SEP]", "[MASK]"],
    ),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("encoders")
    for name, (spec, _) in ENCODERS.items():
        spec.build(iter(TEXTS), folder / name)
    return {name: load_tokenizer(folder / name) for name in ENCODERS}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_controls_that_no_text_yields(encoders, name: str):
    tokenizer, names = encoders[name], ENCODERS[name][1]
    ids = [tokenizer.controls[key] for key in ("cls", "pad", "sep", "mask")]
    assert ids == ([0, 1, 2, 339] if name == "roberta" else [2, 0, 3, 4])
    assert [tokenizer.piece(i) for i in ids] == names and tokenizer.eot == ids[2]
    assert tokenizer.decode(ids) == "" and tokenizer.word_starts[ids].all()
    for text in (*ODD, "[CLS] [SEP][MASK]<pad> <mask></s><s>", PROSE):
        found = tokenizer.encode(text)
        assert not set(ids) & set(found.tolist()) and tokenizer.decode(found) == text
    assert tokenizer.lossless and tokenizer.unknown is None


@pytest.mark.parametrize("name", ENCODERS)
def test_masks_stand_for_a_word_and_its_blank(encoders, name: str):
    tokenizer = encoders[name]
    mask = tokenizer.controls["mask"]
    for sign in ("[MASK]", "<mask>"):
        ids = tokenizer.encode_masked(f"the quick {sign} fox{sign}.")
        parts = [tokenizer.encode(part).tolist() for part in ("the quick", " fox", ".")]
        assert ids.tolist() == [*parts[0], mask, *parts[1], mask, *parts[2]]
        assert ids.dtype == np.int32
    assert tokenizer.encode_masked("the fox").tolist() == tokenizer.encode("the fox").tolist()
    assert tokenizer.encode_masked("<mask>").tolist() == [mask]


def test_decoders_have_no_controls(made: dict[str, Tokenizer]):
    for tokenizer in made.values():
        # Their descriptions are what they were before there were controls.
        described = json.loads((tokenizer.directory / "description.json").read_text())
        assert tokenizer.controls == {} and "controls" not in described
        with pytest.raises(ValueError, match="this tokenizer has no mask"):
            tokenizer.encode_masked("a [MASK]")
        with pytest.raises(ValueError, match="does not say where in the text"):
            tokenizer.offsets(["a"])


@pytest.mark.parametrize("name", ENCODERS)
def test_published_controls_are_found_by_name(tmp_path: Path, encoders, name: str):
    source = encoders[name].directory
    if name == "albert":
        spec = SentencePiece(path=str(source / "sentencepiece.model"), controls="albert")
    else:  # as RoBERTa is published: all of its pieces in one table
        model = json.loads((source / "tokenizer.json").read_text("utf-8"))
        table = model["model"]["vocab"] | {t["content"]: t["id"] for t in model["added_tokens"]}
        (tmp_path / "vocab.json").write_text(json.dumps(table))
        merges = [" ".join(pair) for pair in model["model"]["merges"]]
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), "utf-8")
        spec = ByteBPE(path=str(tmp_path), controls="roberta")
    spec.build(iter([]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.controls == encoders[name].controls and tokenizer.eot == encoders[name].eot
    assert tokenizer.encode(PROSE).tolist() == encoders[name].encode(PROSE).tolist()
    assert tokenizer.vocab == encoders[name].vocab
    assert tokenizer.controls["mask"] not in tokenizer.encode("<mask>[MASK]")


def test_files_without_controls_are_no_encoders(tmp_path: Path, made):
    model = made["bpe"].directory / "sentencepiece.model"
    with pytest.raises(ValueError, match=r"no control \[CLS\] and no \[SEP\].*is it ALBERT's"):
        SentencePiece(path=str(model), controls="albert").build(iter([]), tmp_path / "t")
    with pytest.raises(ValueError, match=r"has no <s> and no <pad>.*; is it RoBERTa's\?"):
        ByteBPE(path=str(made["byte-bpe"].directory), controls="roberta").build(
            iter([]), tmp_path / "t"
        )
    with pytest.raises(ValueError, match=r"controls='bert': allowed are '' or 'albert'"):
        SentencePiece(controls="bert")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["roberta", "albert"])
def test_words_start_at_blanks_signs_and_chinese(encoders, name: str):
    tokenizer = encoders[name]
    ids = tokenizer.encode(" shells, naïve 中文x")
    begins, word = [], ""
    for i in ids:
        word = tokenizer.piece(int(i)) if tokenizer.word_starts[i] else ""
        begins += [word] if word else []
    first = " " if name == "roberta" else "\u2581"
    assert [word[0] for word in begins[:3]] == [first, ",", first]
    whole = tokenizer.decode(ids[np.flatnonzero(tokenizer.word_starts[ids])[3] :])
    assert whole.lstrip().startswith("中") and len(begins) in (5, 6)


@pytest.mark.parametrize(
    "spelling, begins",
    [(b" a", True), (b"a", False), (b"7", False), (b",", True), ("é".encode(), False)]
    + [("中".encode(), True), (b"\xe4\xb8", True), (b"\xb8\xad", False), (b"\xc3", False)]
    + [("\u0301".encode(), False), (b"\n", True), (b"", True)],
)
def test_a_spelling_says_whether_a_word_begins(spelling: bytes, begins: bool):
    assert tokenizer_base.begins_word(spelling) == begins


def test_a_damaged_folder_names_the_file(tmp_path: Path, made):
    for name, file in (("bpe", "sentencepiece.model"), ("byte-bpe", "tokenizer.json")):
        for damage in ("flip", "missing", "description"):
            folder = tmp_path / f"{name}-{damage}"
            shutil.copytree(made[name].directory, folder)
            target = folder / ("description.json" if damage == "description" else file)
            content = bytearray(target.read_bytes())
            content[len(content) // 2] ^= 1
            target.unlink() if damage == "missing" else target.write_bytes(content)
            with pytest.raises(ValueError, match=target.name):
                load_tokenizer(folder)
    with pytest.raises(ValueError, match=r"nowhere.*description.json: cannot be read"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["bpe", "byte-bpe", "characters"])
def test_ids_beyond_the_vocabulary_are_refused(made: dict[str, Tokenizer], name: str):
    with pytest.raises(ValueError, match=f"id {made[name].vocab} is not one of"):
        made[name].decode([made[name].vocab])
