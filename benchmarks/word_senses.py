# SPDX-License-Identifier: Apache-2.0
"""How alike ELMo's vectors of "bank" are in sentences about money and about rivers, as a picture.

    python -m benchmarks.word_senses experiments/elmo_cpu.py --workdir=runs/elmo_cpu \\
        --out=benchmarks/bank.svg

Prints, as JSON, the mean cosine of each layer between sentences of one sense and of two. Vectors of
a layer are compared by what sets them apart from their mean over all words of the sentences: all
words of a trained model share a direction.

Shapes: K layers, S sentences, T words of all sentences, D width.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from lmjax import recipe
from lmjax.workdir import recorded_run

WORD = "bank"
SENSES = {
    "money": (
        "He put all his money in the bank .",
        "She went to the bank to borrow ten thousand dollars .",
        "The bank lent the company the money at six per cent .",
        "The president of the bank said that business was good .",
        "The state owed a large sum to the bank .",
    ),
    "river": (
        "We tied the canoe to the bank and slept .",
        "They sat on the grass by the bank of the river .",
        "The horses came down the steep bank to the water .",
        "I swam to the other bank of the stream .",
        "The boat drifted slowly along the muddy bank .",
    ),
}
SENTENCES = [sentence for group in SENSES.values() for sentence in group]


def vectors(experiment: str, workdir: Path) -> np.ndarray:
    """(K, S, D): the word in each sentence, less the mean of all words."""
    from lmjax.word_vectors import embed_words

    run = recipe.from_json(recipe.load(experiment), recorded_run(workdir))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "words.npz"
        embed_words(run, workdir, SENTENCES, target, layer="all", blanks=True)
        with np.load(target) as found:
            all_TKD, pieces = found["vectors"], found["pieces"].tolist()
    places = [t for t, piece in enumerate(pieces) if piece == WORD]
    assert len(places) == len(SENTENCES), places
    return (all_TKD[places] - all_TKD.mean(0)).transpose(1, 0, 2)


def cosines(vectors_KSD: np.ndarray) -> np.ndarray:
    """(K, S, S)."""
    unit_KSD = vectors_KSD / np.linalg.norm(vectors_KSD, axis=-1, keepdims=True)
    return unit_KSD @ unit_KSD.swapaxes(1, 2)


def summary(cosines_KSS: np.ndarray) -> list[dict[str, float]]:
    """Of each layer the mean cosine of two sentences of one sense, and of two senses."""
    sense = np.repeat(range(len(SENSES)), [len(group) for group in SENSES.values()])
    same = sense[:, None] == sense
    other = ~np.eye(len(sense), dtype=bool)
    return [
        {
            "layer": layer,
            "one_sense": round(float(found[same & other].mean()), 3),
            "two_senses": round(float(found[~same].mean()), 3),
        }
        for layer, found in enumerate(cosines_KSS)
    ]


def draw(cosines_KSS: np.ndarray, target: Path) -> None:
    """A square a pair of sentences and layer, the darker the more alike."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": WORD, "font.size": 9})
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        panels = figure.subplots(1, len(cosines_KSS), sharey=True)
        for layer, (axes, found) in enumerate(zip(panels, cosines_KSS, strict=True)):
            image = axes.imshow(found, cmap="Blues", vmin=-0.5, vmax=1)
            axes.set_title(f"layer {layer}" if layer else "layer 0: the spelling alone")
            axes.set_xticks([2, 7], SENSES)
            axes.axhline(4.5, color="white")
            axes.axvline(4.5, color="white")
        panels[0].set_yticks(range(len(SENTENCES)), SENTENCES)
        figure.colorbar(image, ax=panels, label="cosine", shrink=0.8)
        figure.savefig(target, format="svg", metadata={"Date": None})


def main() -> None:
    """Prints one JSON object and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = cosines(vectors(arguments.experiment, arguments.workdir))
    draw(found, arguments.out)
    print(json.dumps({"word": WORD, "layers": summary(found)}))


if __name__ == "__main__":
    main()
