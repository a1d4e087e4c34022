# SPDX-License-Identifier: Apache-2.0
"""bilm-tf's format and network in plain numpy, for tests: random weights as its files, and states.

Written from the format's description alone, in float64, a sentence at a time.
"""

import json
from pathlib import Path

import h5py
import numpy as np

SHARED = Path(__file__).parents[2] / "shared/data/fixtures/elmo_bilm/model"


def options(**changes):
    """The options of a small model; `lstm__dim=3` changes one within `lstm`."""
    found = {
        "lstm": {
            "use_skip_connections": True,
            "projection_dim": 6,
            "cell_clip": 3,
            "proj_clip": 3,
            "dim": 10,
            "n_layers": 2,
        },
        "char_cnn": {
            "activation": "relu",
            "filters": [[1, 4], [2, 5], [3, 7]],
            "n_highway": 2,
            "embedding": {"dim": 5},
            "n_characters": 262,
            "max_characters_per_token": 50,
        },
    }
    for key, value in changes.items():
        *parts, name = key.split("__")
        inner = found
        for part in parts:
            inner = inner[part]
        inner[name] = value
    return found


def shapes(said, words=0):
    """The datasets of a file by the options; `words` rows of a table if they have no char_cnn."""
    lstm, found = said["lstm"], {}
    width, cells = lstm["projection_dim"], lstm["dim"]
    if "char_cnn" in said:
        cnn = said["char_cnn"]
        letters = cnn["embedding"]["dim"]
        found["char_embed"] = (261, letters)
        for i, (wide, count) in enumerate(cnn["filters"]):
            found[f"CNN/W_cnn_{i}"] = (1, wide, letters, count)
            found[f"CNN/b_cnn_{i}"] = (count,)
        top = sum(count for _, count in cnn["filters"])
        for k in range(cnn.get("n_highway") or 0):
            for gate in ("carry", "transform"):
                found[f"CNN_high_{k}/W_{gate}"] = (top, top)
                found[f"CNN_high_{k}/b_{gate}"] = (top,)
        if top != width:
            found["CNN_proj/W_proj"] = (top, width)
            found["CNN_proj/b_proj"] = (width,)
    else:
        found["embedding"] = (words, width)
    for direction in range(2):
        for layer in range(lstm.get("n_layers", 1)):
            cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
            found[f"{cell}/W_0"] = (2 * width, 4 * cells)
            found[f"{cell}/B"] = (4 * cells,)
            if width < cells:
                found[f"{cell}/W_P_0"] = (cells, width)
    return found


def draw(said, seed=0, scale=0.4, words=0):
    """Random weights, float32."""
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape) * scale).astype(np.float32)
        for name, shape in shapes(said, words).items()
    }


def write(folder, said, weights):
    """A folder in the format."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(said))
    with h5py.File(folder / "lm_weights.hdf5", "w") as file:
        for name, values in weights.items():
            file[name] = values
    return folder


def read(folder):
    """(options, weights) of a folder."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(next(folder.glob("*weights.hdf5")), "r") as file:
        file.visititems(visit)
    return json.loads((folder / "options.json").read_text()), found


def letters(word, longest=50):
    """Character ids of a word, or of a mark where `word` is a number: 256 for <S>, 257 for </S>."""
    inside = [word] if isinstance(word, int) else list(word.encode())[: longest - 2]
    ids = [258, *inside, 259]
    return ids + [260] * (longest - len(ids))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Network:
    """The network: `state` is carried from sentence to sentence until `reset`."""

    def __init__(self, said, weights, vocabulary=()):
        self.said, self.ids = said, {word: i for i, word in enumerate(vocabulary)}
        self.weights = {name: x.astype(np.float64) for name, x in weights.items()}
        self.reset()

    def reset(self):
        self.state = {}

    def word(self, word):
        """The vector of a word below the LSTMs."""
        w = self.weights
        if "char_cnn" not in self.said:
            marks = {256: "<S>", 257: "</S>"}
            return w["embedding"][self.ids.get(marks.get(word, word), 2)]
        return self.spelt(letters(word, self.said["char_cnn"]["max_characters_per_token"]))

    def spelt(self, ids):
        """The vector of a word by its characters."""
        w, cnn = self.weights, self.said["char_cnn"]
        table, found = w["char_embed"][ids], []
        for i, (wide, _) in enumerate(cnn["filters"]):
            kernel = w[f"CNN/W_cnn_{i}"][0]
            places = range(len(table) - wide + 1)
            scores = [np.einsum("we,wen->n", table[p : p + wide], kernel) for p in places]
            found.append(np.max(scores, axis=0) + w[f"CNN/b_cnn_{i}"])
        act = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}[cnn["activation"]]
        x = act(np.concatenate(found))
        for k in range(cnn.get("n_highway") or 0):
            gate = sigmoid(x @ w[f"CNN_high_{k}/W_carry"] + w[f"CNN_high_{k}/b_carry"])
            new = x @ w[f"CNN_high_{k}/W_transform"] + w[f"CNN_high_{k}/b_transform"]
            x = gate * np.maximum(new, 0) + (1 - gate) * x
        if "CNN_proj/W_proj" in w:
            x = x @ w["CNN_proj/W_proj"] + w["CNN_proj/b_proj"]
        return x

    def cell(self, direction, layer, inputs):
        """One LSTM over vectors in its own order."""
        lstm = self.said["lstm"]
        name = f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer}/LSTMCell"
        kernel, bias = self.weights[f"{name}/W_0"], self.weights[f"{name}/B"]
        project = self.weights.get(f"{name}/W_P_0")
        zeros = np.zeros(lstm["dim"]), np.zeros(lstm["projection_dim"])
        c, h = self.state.get((direction, layer), zeros)
        out = []
        for x in inputs:
            i, j, f, o = np.split(np.concatenate([x, h]) @ kernel + bias, 4)
            c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j)
            if lstm.get("cell_clip"):
                c = np.clip(c, -lstm["cell_clip"], lstm["cell_clip"])
            h = sigmoid(o) * np.tanh(c)
            if project is not None:
                h = h @ project
                if lstm.get("proj_clip"):
                    h = np.clip(h, -lstm["proj_clip"], lstm["proj_clip"])
            out.append(h)
        self.state[direction, layer] = c, h
        out = np.stack(out)
        return out + inputs if lstm.get("use_skip_connections") and layer else out

    def layers(self, words):
        """(layers and one, words, twice the width): what bilm-tf dumps of a sentence."""
        below = np.stack([self.word(word) for word in [256, *words, 257]])
        found = [[below, below]]
        for layer in range(self.said["lstm"].get("n_layers", 1)):
            forward = self.cell(0, layer, found[-1][0])
            backward = self.cell(1, layer, found[-1][1][::-1])[::-1]
            found.append([forward, backward])
        return np.stack([np.concatenate(pair, 1)[1:-1] for pair in found])
