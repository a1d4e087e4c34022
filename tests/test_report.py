# SPDX-License-Identifier: Apache-2.0
"""What report.html promises: whole, escaped, self-contained, the same for the same run."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lmjax.charts import chart, smoothed, thin
from lmjax.recipe import dump
from lmjax.report import write_report

EVALUATION = {
    "loss": 3.03124,
    "perplexity": 20.7228,
    "bits_per_byte": 1.18192,
    "tokens": 183_421,
    "bytes": 678_901,
    "documents": 412,
    "step": 60,
    "baselines": {"unigram_bits_per_byte": 2.47121, "xz_bits_per_byte": 1.95343},
}
RECIPE = {
    "name": "small",
    "title": "A small <run> & more",
    "description": "What it is for.",
    "summary": {"parameters": 124_439_808, "steps": 61},
    "run": {
        "model": {"class": "GPT", "depth": 12, "norm": {"class": "LayerNorm", "epsilon": 1e-05}}
    },
}
SCORES = ["3.0312", "20.72", "1.1819", "183,421", "678,901", "412", "2.4712", "1.9534"]


def fill(workdir: Path, steps: int = 60) -> None:
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 10 / step, "learning_rate": 1e-4 * step}
        record |= {"gradient_norm": 1.0, "tokens_per_second": 41_181.0, "tokens": step * 4096}
        lines.append(record | ({"held_out_loss": 11 / step} if step % 20 == 0 else {}))
    samples = [
        {"step": 30, "prompt": "Early", "text": " words"},
        {"step": 60, "prompt": "A", "text": "A <script>alert(1)</script>\n    indented \ud800"},
    ]
    for name, records in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        (workdir / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    environment = {"versions": {"jax": "0.10.2"}, "devices": ["cpu:<0>"]}
    for name, content in (
        ("recipe", RECIPE),
        ("evaluation-test", EVALUATION),
        ("evaluation-validation", EVALUATION | {"loss": 2.99543}),
        ("environment", environment),
    ):
        (workdir / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    fill(workdir)
    return write_report(workdir).read_text("utf-8")


class Elements(HTMLParser):
    """Checks that elements are closed in order, and gathers tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_holds_every_number_and_setting(full):
    text = Elements(full).text
    numbers = [*SCORES, "2.9954", "124,439,808", "60", "of 61", "245,760", "41,181"]
    settings = ["GPT", "depth", "12", "LayerNorm", "epsilon", "1e-05", "0.10.2", 'cpu:<0>"']
    words = ["What it is for.", "unigram model", "xz", "test", "validation", "Step 60"]
    for expected in numbers + settings + words:
        assert expected in text, expected
    # What is rounded for reading is there in full.
    assert '<data value="3.03124">' in full and '<data value="1.95343">' in full


def test_every_curve_is_drawn(full):
    # The loss twice, for broad and for slim pages, and the three others.
    assert Elements(full).tags.count("svg") == 5
    for label in ("Loss, nats per token", "held out", "Learning rate", "Gradient norm"):
        assert label in full


def test_text_is_escaped_and_keeps_its_whitespace(full):
    elements = Elements(full)
    assert "script" not in elements.tags and "run" not in elements.tags
    assert "<b>A</b> &lt;script&gt;alert(1)&lt;/script&gt;\n    indented" in full
    assert "A small &lt;run&gt; &amp; more" in full


def test_nothing_outside_the_file_is_referred_to(full):
    assert "http" not in full and "@import" not in full and "url(//" not in full
    for name, value in Elements(full).attributes:
        assert name != "src"
        if name in ("href", "xlink:href"):
            assert value is not None and value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full))


def test_ids_are_unique_and_found(full):
    attributes = Elements(full).attributes
    ids = [value for name, value in attributes if name == "id"]
    referred = re.findall(r"url\(#([^)]*)\)", full)
    referred += [value[1:] for name, value in attributes if name == "href" and value]
    assert len(ids) == len(set(ids)) and set(referred) <= set(ids) and referred


def test_charts_take_the_colours_of_the_page(full):
    for drawing in re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL):
        assert "var(--ink)" in drawing and "var(--main)" in drawing
        # A fixed colour would vanish on one of the two backgrounds.
        assert not re.findall(r"(?:fill|stroke): ?#\w+", drawing)
    assert "prefers-color-scheme: dark" in full


def test_the_same_run_gives_the_same_bytes(tmp_path):
    fill(tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


FILES = {
    "recipe.json": "There is no recipe.json",
    "metrics.jsonl": "There is no metrics.jsonl",
    "samples.jsonl": "There is no samples.jsonl",
    "environment.json": "There is no environment.json",
}


def test_an_empty_folder_gives_a_report_of_what_is_missing(tmp_path):
    page = write_report(tmp_path).read_text("utf-8")
    Elements(page)
    for said in (*FILES.values(), "There is no evaluation-"):
        assert said in page
    assert f"<h1>{tmp_path.name}</h1>" in page


@pytest.mark.parametrize("absent", FILES)
def test_a_report_without_one_part_says_so_and_keeps_the_others(tmp_path, absent):
    fill(tmp_path)
    (tmp_path / absent).unlink()
    page = write_report(tmp_path).read_text("utf-8")
    Elements(page)
    assert [name for name, said in FILES.items() if said in page] == [absent]
    assert all(number in page for number in SCORES)


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    fill(tmp_path)
    (tmp_path / "recipe.json").write_text('{"model": ')
    (tmp_path / "environment.json").write_bytes(b"\xff\xfe")
    (tmp_path / "evaluation-test.json").write_text("[1]")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    page = write_report(tmp_path).read_text("utf-8")
    for name in ("recipe.json", "environment.json", "evaluation-test.json"):
        assert f"{name} cannot be read" in page
    assert "2.9954" in page and "<svg" in page


def test_a_run_without_evaluation_shows_its_last_held_out_loss(tmp_path):
    fill(tmp_path)
    for path in tmp_path.glob("evaluation-*.json"):
        path.unlink()
    page = write_report(tmp_path).read_text("utf-8")
    assert "Held-out loss" in page and "0.1833" in page and "at step 60" in page


def test_scores_that_are_not_defined_are_dashes(tmp_path):
    undefined = {"bits_per_byte": None, "baselines": None}
    (tmp_path / "evaluation-test.json").write_text(json.dumps(EVALUATION | undefined))
    page = write_report(tmp_path).read_text("utf-8")
    assert "<td>–</td>" in page and "null" not in page and '<table class="bars">' not in page


def test_scores_that_are_not_finite_are_shown(tmp_path):
    scores = {key: math.nan for key in EVALUATION if key != "baselines"} | {"perplexity": math.inf}
    (tmp_path / "evaluation-test.json").write_text(dump(EVALUATION | scores))
    page = write_report(tmp_path).read_text("utf-8")
    assert "<td>NaN</td>" in page and "<td>Infinity</td>" in page


def test_one_step_and_a_diverged_run_are_drawn(tmp_path):
    records = [{"step": 1, "loss": 4.0}]
    for losses in ([], ["NaN", "Infinity", 3.0], [1e30]):
        records = records[:1] + [{"step": 2 + i, "loss": loss} for i, loss in enumerate(losses)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "metrics.jsonl").write_text(lines)
        page = write_report(tmp_path).read_text("utf-8")
        assert Elements(page).tags.count("svg") == 2
        assert "Not in metrics.jsonl: held_out_loss, learning_rate" in page


def test_without_matplotlib_all_but_the_charts_is_there(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_report(tmp_path).read_text("utf-8")
    assert "pip install matplotlib" in page and "<svg" not in page
    assert all(number in page for number in SCORES)


def test_a_flat_recipe_is_read_as_well(tmp_path):
    recipe = {"parameters": 124_439_808, "steps": 61, "model": {"class": "GPT", "depth": 12}}
    fill(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    text = Elements(write_report(tmp_path).read_text("utf-8")).text
    assert "124,439,808" in text and "of 61" in text and "depth" in text


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_thinning_keeps_order_and_extremes():
    steps = np.arange(100_000.0)
    values = np.sin(steps / 5000)
    values[[777, 50_001]] = 9.0, -9.0
    few_steps, few = thin((steps, values))
    assert len(few_steps) <= 2000 and (np.diff(few_steps) > 0).all()
    assert few.max() == 9.0 and few.min() == -9.0
    assert thin((steps[:50], values[:50]))[0].size == 50


def test_smoothing_removes_noise_and_keeps_the_first_value():
    noise = np.where(np.arange(5000) % 2, 1.0, -1.0)
    curve = smoothed(3.0 + noise)
    assert curve.shape == (5000,) and curve[0] == 2.0
    assert np.abs(curve[200:] - 3.0).max() < 0.05


def test_a_chart_counts_the_outliers_that_it_cuts_off():
    steps = np.arange(1.0, 101.0)
    values = np.ones(100)
    assert chart("plain", (400, 250), (steps, values))[1] == 0
    values[[40, 60]] = 1e6
    drawing, cut = chart("spiky", (400, 250), (steps, values))
    assert cut == 2 and ">1M<" not in drawing and ">1<" in drawing


def test_an_encoder_is_told_by_its_own_scores_and_what_they_compare_with(tmp_path):
    fill(tmp_path)
    scores = {
        "masked_loss": 2.5171, "masked_accuracy": 0.4213, "pair_accuracy": 0.9127,
        "pseudo_perplexity": 12.3456, "loss": 2.9, "step": 60,
        "baselines": {"unigram_masked_loss": 6.7, "unigram_masked_accuracy": 0.06},
        "comparable_with": {"masked_loss": "masked models of the same <vocabulary>"},
    }  # fmt: skip
    (tmp_path / "evaluation-test.json").write_text(json.dumps(scores))
    lines = [
        {"step": step, "loss": 3.0, "held_out_loss": 3.0, "held_out_masked_accuracy": step / 100}
        for step in (1, 2, 3)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    page = write_report(tmp_path).read_text("utf-8")
    for shown in ("Masked accuracy", "0.4213", "Pair accuracy", "0.9127", "12.35"):
        assert shown in page
    assert "masked loss: masked models of the same &lt;vocabulary&gt;" in page
    assert "Held-out masked accuracy" in page and "Held-out pair accuracy" not in page
    assert "fewer is better" not in page  # those bars are bits per byte
