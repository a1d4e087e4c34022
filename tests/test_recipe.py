# SPDX-License-Identifier: Apache-2.0
"""Recipes are overridden by typed keys, recorded as JSON, read back and compared."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import pytest
from commands import ROOT

from lmjax import recipe
from lmjax.batches import Ramp
from lmjax.data import Data
from lmjax.examples.windows import Windows
from lmjax.losses import next_token
from lmjax.models.gpt import GPT
from lmjax.optim import AdamW
from lmjax.run import Run
from lmjax.text import TFDS, Builtin, Files
from lmjax.tokenizer import ByteBPE, SentencePiece

RUN = Run(
    model=GPT(vocab=512, context=32, depth=2, width=32, heads=2),
    data=Data(corpus=Builtin(), tokenizer=SentencePiece(vocab=512), examples=Windows(length=32)),
    loss=next_token,
    optim=AdamW(peak=2e-3, warmup=5),
    batch=8,
    steps=20,
)


@dataclass(frozen=True)
class Part:
    sizes: tuple[int, ...] = (1, 2)
    rates: tuple[float, ...] = ()
    on: bool = False
    limit: int | None = 3
    rate: float | None = None
    kind: Literal["cosine", "linear"] = "cosine"
    title: str = ""
    other: Any = 1
    path: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    part: Part = Part()
    count: int = 1


def set_part(key: str, text: str) -> Any:
    return getattr(recipe.override(Whole(), [(f"part.{key}", text)]).part, key)


def refusal(recipe_: Any, key: str, text: str = "1") -> str:
    with pytest.raises(ValueError) as error:
        recipe.override(recipe_, [(key, text)])
    return str(error.value)


# --- overriding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("sizes", "4,5,6", (4, 5, 6)),
        ("sizes", "(4, 5)", (4, 5)),
        ("sizes", "7", (7,)),
        ("sizes", "()", ()),
        ("rates", "1e-3,2", (1e-3, 2.0)),
        ("on", "true", True),
        ("on", "True", True),
        ("on", "no", False),
        ("on", "0", False),
        ("limit", "none", None),
        ("limit", "None", None),
        ("limit", "12", 12),
        ("limit", "1e6", 1_000_000),
        ("limit", "-4", -4),
        ("rate", "none", None),
        ("rate", "6e-4", 6e-4),
        ("rate", "2", 2.0),
        ("kind", "linear", "linear"),
        ("title", "a=b, c", "a=b, c"),
        ("title", "none", "none"),
    ],
)
def test_text_becomes_the_type_of_its_field(key: str, text: str, value: Any):
    result = set_part(key, text)
    assert result == value and type(result) is type(value)
    if isinstance(value, tuple):
        assert [type(x) for x in result] == [type(x) for x in value]


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("limit", "2.5", "whole number"),
        ("limit", "many", "whole number"),
        ("limit", "inf", "whole number"),
        ("limit", "nan", "whole number"),
        ("rate", "fast", "a number"),
        ("on", "maybe", "true and false"),
        ("kind", "cosin", "did you mean cosine"),
        ("kind", "linaer", "allowed are cosine, linear; did you mean linear"),
        ("sizes", "1,b", "whole number"),
        ("path", "{}", "cannot be typed"),
        ("other", "1", "cannot be typed"),
    ],
)
def test_text_of_another_type_is_refused_by_its_key(key: str, text: str, says: str):
    message = refusal(Whole(), f"part.{key}", text)
    assert f"--part.{key}" in message and says in message


def test_nested_keys_change_their_leaf_and_nothing_else():
    changed = recipe.override(
        RUN, [("steps", "100"), ("model.depth", "3"), ("optim.clip", "none"), ("steps", "200")]
    )
    assert changed == replace(
        RUN, steps=200, model=RUN.model.clone(depth=3), optim=replace(RUN.optim, clip=None)
    )
    assert RUN.steps == 20 and RUN.model.depth == 2
    assert recipe.override(RUN, []) == RUN


def test_overriding_runs_the_checks_of_the_recipe():
    assert "batch=0" in refusal(RUN, "batch", "0")
    assert "model.context=16" in refusal(RUN, "model.context", "16")
    assert "heads=3" in refusal(RUN, "model.heads", "3")


@pytest.mark.parametrize(
    "keys",
    [
        [("model.heads", "3"), ("model.width", "48")],
        [("data.examples.length", "64"), ("model.context", "64")],
        [("data.corpus.encoding", "latin-1"), ("data.corpus", "files:a.txt")],
    ],
)
def test_keys_are_set_at_once_in_any_order(keys: list[tuple[str, str]]):
    assert recipe.override(RUN, keys) == recipe.override(RUN, keys[::-1]) != RUN


def test_the_last_of_a_repeated_key_counts():
    assert recipe.override(RUN, [("steps", "3"), ("steps", "4")]).steps == 4


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
def test_numbers_must_be_finite(text: str):
    assert "--optim.peak" in refusal(RUN, "optim.peak", text)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("evaluate_every", "-1"),
        ("evaluate_windows", "-1"),
        ("workers", "-1"),
        ("workers", "257"),
        ("seed", "-1"),
        ("seed", str(1 << 32)),
        ("steps", str(1 << 31)),
        ("data.examples.length", "0"),
        ("data.examples.length", "-3"),
    ],
)
def test_numbers_out_of_range_are_refused_by_their_key(key: str, text: str):
    assert refusal(RUN, key, text).startswith(f"{key}={text}: ")


def test_an_unknown_key_is_corrected_whole():
    assert "did you mean --model.depth?" in refusal(RUN, "modle.depth")


def test_a_key_inside_what_has_none_says_so():
    assert "data.corpus is a Builtin, which has no keys" in refusal(RUN, "data.corpus.field")


def test_a_corpus_is_named_by_kind_and_place():
    def corpus(text: str) -> Any:
        return recipe.override(RUN, [("data.corpus", text)]).data.corpus

    assert corpus("files:books/*.txt") == Files("books/*.txt")
    assert corpus("tfds:wiki40b/en:1.3.0") == TFDS("wiki40b/en:1.3.0")
    assert corpus("builtin") == Builtin()
    assert "files:GLOB" in refusal(RUN, "data.corpus", "file:x")


def test_naming_other_files_keeps_how_the_recipe_reads_them():
    run = recipe.override(RUN, [("data.corpus", "files:a"), ("data.corpus.document", "file")])
    run = recipe.override(run, [("data.corpus", "files:b")])
    assert run.data.corpus == Files("b", document="file")
    assert recipe.override(run, [("data.corpus", "builtin")]).data.corpus == Builtin()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("stepz", "--steps"),
        ("model.dpeth", "--model.depth"),
        ("modle.depth", "--model"),
        ("optim.decy", "--optim.decay"),
        ("data.exampels.length", "--data.examples"),
        ("data.examples.lenght", "--data.examples.length"),
        ("depth", "--model.depth"),
        ("data.data", None),
        ("model.model", None),
        ("learning_rate", None),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str | None):
    message = refusal(RUN, key)
    assert message.startswith(f"unknown key --{key}") and " Allowed here: --" in message
    if nearest:
        assert f"did you mean {nearest}" in message
    else:
        assert f"unknown key --{key}. " in message
    for part in message.partition("Allowed here: ")[2].split(", "):  # what is offered exists
        at: Any = RUN
        for name in part.removeprefix("--").split("."):
            at = getattr(at, name)


def test_a_part_that_may_be_absent_is_taken_away_and_stays_away():
    bert = recipe.load(str(ROOT / "experiments/bert_base.py"))
    run = recipe.override(bert, [("phase2", "none"), ("data.units", "None")])
    assert run.phase2 is None and run.data.units is None
    again = recipe.from_json(bert, json.loads(json.dumps(recipe.to_json(run))))
    assert again.phase2 is None and again.data.units is None
    assert recipe.from_json(bert, recipe.to_json(bert)) == bert
    assert "data.corpus" in refusal(bert, "data", "none")  # a part that must be there


def test_keys_beyond_a_leaf_and_whole_parts_are_refused():
    assert "--steps.more" in refusal(RUN, "steps.more") and "no keys inside" in refusal(
        RUN, "steps.more"
    )
    assert "--model.depth" in refusal(RUN, "model", "GPT")
    assert "experiment file" in refusal(RUN, "loss", "next_token")


def test_wiring_of_linen_modules_is_no_key():
    names = {f.name for f in recipe.fields(RUN.model)}
    assert {"vocab", "depth"} <= names and not {"parent", "name"} & names
    assert "unknown key --model.parent" in refusal(RUN, "model.parent")


# --- recording ------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_words():
    tree = {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, 3: None}}
    words = {"a": ["NaN", ["Infinity", 1.5]], "b": {"c": "-Infinity", "3": None}}
    assert json.loads(recipe.dump(tree), parse_constant=pytest.fail) == words


def test_json_holds_values_and_class_names_only():
    tree = json.loads(recipe.dump(recipe.to_json(RUN)))
    assert tree["model"]["class"] == "GPT" and tree["model"]["width"] == 32
    assert tree["loss"] == {"function": "next_token"} and tree["optim"]["peak"] == 2e-3
    assert tree["ramp"] is None and "parent" not in tree["model"]
    assert "lmjax" not in recipe.dump(tree)  # no import path


def test_a_recorded_recipe_comes_back_from_the_file_s_own():
    changed = recipe.override(
        RUN,
        [("model.depth", "5"), ("optim.clip", "none"), ("steps", "77"), ("mesh.fsdp", "4")]
        + [
            ("data.tokenizer.vocab", "300"),
            ("optim.decay", "linear"),
            ("data.examples.length", "8"),
        ],
    )
    recorded = json.loads(recipe.dump(recipe.to_json(changed)))
    assert recipe.from_json(RUN, recorded) == changed
    assert recipe.to_json(recipe.from_json(RUN, recorded)) == recorded


def test_tuples_come_back_as_tuples():
    part = Part(sizes=(3, 4, 5), limit=None)
    assert recipe.from_json(Part(), json.loads(recipe.dump(recipe.to_json(part)))) == part


def test_a_recorded_class_cannot_choose_what_code_runs():
    other = replace(RUN, data=replace(RUN.data, tokenizer=ByteBPE(vocab=999)))
    recorded = json.loads(recipe.dump(recipe.to_json(other)))
    assert recipe.from_json(RUN, recorded).data.tokenizer == SentencePiece(vocab=512)
    recorded["loss"] = {"function": "system"}
    recorded["unheard_of"] = 1
    assert recipe.from_json(RUN, recorded).loss is next_token


def test_difference_lists_what_changed_by_dotted_key():
    other = recipe.override(RUN, [("model.depth", "3"), ("optim.peak", "1e-3")])
    other = replace(other, ramp=Ramp(2, 2, 100))
    found = recipe.difference(recipe.to_json(RUN), recipe.to_json(other))
    assert ("model.depth", 2, 3) in found and ("optim.peak", 2e-3, 1e-3) in found
    assert ("ramp.start", None, 2) in found
    assert {key.split(".")[0] for key, _, _ in found} == {"model", "optim", "ramp"}
    assert recipe.difference(recipe.to_json(RUN), recipe.to_json(RUN)) == []


def test_a_changed_class_or_loss_is_a_difference():
    old = recipe.to_json(RUN)
    other_tokenizer = replace(RUN, data=replace(RUN.data, tokenizer=ByteBPE(vocab=512)))
    found = recipe.difference(old, recipe.to_json(other_tokenizer))
    assert ("data.tokenizer.class", "SentencePiece", "ByteBPE") in found

    def label_smoothing(outputs: Any, batch: Any) -> Any:
        return {}

    found = recipe.difference(old, recipe.to_json(replace(RUN, loss=label_smoothing)))
    assert found == [("loss.function", "next_token", "label_smoothing")]


def test_a_field_called_name_is_recorded_unless_linen_put_it_there():
    named = recipe.override(RUN, [("data.corpus", "tfds:ag_news")])
    assert recipe.to_json(named)["data"]["corpus"]["name"] == "ag_news"
    assert recipe.override(named, [("data.corpus.name", "lm1b")]).data.corpus == TFDS("lm1b")
    other = recipe.override(RUN, [("data.corpus", "tfds:lm1b")])
    found = recipe.difference(recipe.to_json(named), recipe.to_json(other))
    assert found == [("data.corpus.name", "ag_news", "lm1b")]


# --- loading --------------------------------------------------------------------------------------


def test_an_experiment_file_gives_run_and_tiny(tmp_path: Path):
    file = tmp_path / "some.py"
    file.write_text("run, tiny = {'steps': 100}, {'steps': 1}\n")
    assert recipe.load(str(file)) == {"steps": 100}
    assert recipe.load(str(file), tiny=True) == {"steps": 1}


def test_a_missing_experiment_names_the_nearest_file(tmp_path: Path):
    (tmp_path / "gpt2_small.py").write_text("run = 1\n")
    with pytest.raises(ValueError, match="no such experiment.*did you mean.*gpt2_small.py"):
        recipe.load(str(tmp_path / "gpt2_smal.py"))
    with pytest.raises(ValueError, match="does not define `tiny`"):
        recipe.load(str(tmp_path / "gpt2_small.py"), tiny=True)
    with pytest.raises(ValueError, match="no such experiment"):
        recipe.load(str(tmp_path))


def test_a_linen_module_is_overridden_like_a_dataclass():
    class Small(nn.Module):
        width: int = 4

    assert recipe.override(Small(), [("width", "9")]).width == 9


@pytest.mark.parametrize(
    "key, text",
    [
        *((f"model.{name}", str((1 << 30) + 1)) for name in ("vocab", "context")),
        *((f"model.{name}", str((1 << 20) + 1)) for name in ("width", "heads")),
        *(("model.depth", text) for text in ("10001", "1000000000000000000")),
        ("model.position_std", "-1.0"),
        ("model.unroll", "-1"),
        *((f"model.{name}", "0") for name in ("vocab", "context", "depth", "width", "heads")),
        ("model.depth", "-1"),
        ("model.dropout", "1.5"),
        *((f"optim.{name}", "-1") for name in ("peak", "warmup", "clip", "weight_decay")),
        ("optim.b1", "1"),
        ("optim.decay_parameters", "("),
    ],
)
def test_impossible_values_are_refused_by_their_key(key: str, text: str):
    run = recipe.load("experiments/demo.py", tiny=True)
    with pytest.raises(ValueError, match=rf"^{key}={'.' if text == '(' else text}"):
        recipe.override(run, [(key, text)])


@pytest.mark.parametrize(
    "file, key, text",
    [
        ("bert_base", "model.inner", "-1"),
        ("bert_base", "model.epsilon", "-1.0"),
        ("albert_base", "model.embedding_width", "1048577"),
        ("electra_small", "model.generator_depth", "10001"),
        ("elmo", "model.cells", "1048577"),
        ("elmo", "model.highways", "10001"),
        ("elmo", "model.negatives", "-1"),
    ],
)
def test_impossible_sizes_of_other_models_are_refused_by_their_key(file: str, key: str, text: str):
    run = recipe.load(f"experiments/{file}.py", tiny=True)
    with pytest.raises(ValueError, match=rf"^{key}={text}: must be "):
        recipe.override(run, [(key, text)])
