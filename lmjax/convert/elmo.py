# SPDX-License-Identifier: Apache-2.0
"""ELMo in the form of bilm-tf: the sizes in options.json, the weights in lm_weights.hdf5.

Their kernels are (in, out) as ours are. An LSTM's kernel has the rows of the layer's input, then
those of its state, and the columns of the gates i, j, f and o; the 1 that is added to the forget
gate is stored by neither. So each dataset is our arrays under another name, or two of them one
above the other. The file has no softmax: the original kept that in its own checkpoints.

Shapes: D width, H cells, F filters of all widths, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lmjax.convert import elmo_options, hdf5, hub
from lmjax.convert.hub import Info
from lmjax.models.elmo import ELMo
from lmjax.recipe import dump
from lmjax.step import init_params

WEIGHTS, OPTIONS, VOCABULARY = "lm_weights.hdf5", "options.json", "vocab.txt"
_TABLE = "embedding"  # a dataset: the words' vectors where they are not spelt
_MARKS = 3  # <S>, </S> and <UNK>: the rows of a softmax that nobody named words for


def import_elmo(
    folder: Path | str, like: ELMo | None = None, rows: Sequence[int] = (), seed: int = 0
) -> tuple[ELMo, Any, Info]:
    """The model of a folder with one *options.json and one *weights.hdf5, with a new softmax.

    like: what the files leave open, as dropout and the negatives of training. rows: each word's
    line in the vocabulary (`read_vocabulary`); none if there is no vocabulary, which is no matter
    to a model that reads characters. seed: of the softmax.

    Returns:
      The model, its parameters as float32 numpy arrays in our layout, and what else was said.

    Raises:
      ValueError: a file is missing or damaged; an option is missing, unknown or one that `ELMo`
        cannot express; datasets are missing, extra or of another shape or type.
    """
    folder = Path(folder)
    path, weights = _one(folder, "*options.json"), _one(folder, "*weights.hdf5", "*.hdf5")
    fields, characters, notes = elmo_options.read(hub.read_object(path), path)
    model = (like or ELMo(vocab=_MARKS)).clone(**fields)
    with hdf5.opened(weights) as datasets:
        model = model.clone(vocab=_vocab(model, datasets, rows, weights))
        flat = {name: np.zeros(shape, np.float32) for name, shape in hub.our_shapes(model).items()}
        layout = _layout(model, flat)
        wanted = {name: _shape(parts) for name, parts in layout.items()}
        hub.check_names(datasets, wanted, weights, path.name)
        for name, found in hdf5.values(datasets, weights):
            _put(layout[name], found[np.array(rows)] if name == _TABLE else found)
    for kernel, bias in _identities(model, flat):
        np.fill_diagonal(kernel, 1)
        bias[:] = 0
    flat |= _new_softmax(model, seed)
    if not rows:
        notes += ("no vocabulary was given: the model names no words, and only embed is of use",)
    notes += ("the softmax is new, so perplexity means nothing until it is trained",)
    info = Info("elmo", None, notes, characters)
    return model, traverse_util.unflatten_dict(flat, sep="/"), info


def export_elmo(
    folder: Path | str,
    model: ELMo,
    params: Any,
    characters: int,
    vocabulary: bytes | None = None,
) -> None:
    """Writes options.json, lm_weights.hdf5 and vocab.txt as bilm-tf and AllenNLP read them.

    What was written is read again and must be the same arrays, bit for bit; the folder appears
    whole or not at all. The softmax has no place in this form.

    Raises:
      ValueError: the folder exists and is not empty, the form cannot express the model, or the
        parameters are not the model's.
    """
    flat = hub.our_arrays(model, params)
    for kernel, bias in _identities(model, flat):
        if bias.any() or not np.array_equal(kernel, np.eye(len(kernel))):
            raise ValueError(
                f"this form has no projection from {len(kernel)} to {len(kernel)}; allowed is the"
                " identity, or another model.width"
            )
    options = elmo_options.written(model, characters)
    arrays = {name: np.concatenate(parts) for name, parts in _layout(model, flat).items()}
    with hub.appearing(folder) as temporary:
        hdf5.write(temporary / WEIGHTS, arrays)
        (temporary / OPTIONS).write_bytes(dump(options).encode())
        if vocabulary is not None:
            (temporary / VOCABULARY).write_bytes(vocabulary)
        # Rows of the softmax, which is not there, are only drawn where the input has as many.
        rows = range(model.vocab if model.input == "words" else 0)
        again, read, _ = import_elmo(temporary, model, rows)
        assert again.clone(vocab=model.vocab) == model, (again, model)
        found = hub.our_arrays(again, read)
        kept = {name: x for name, x in flat.items() if name not in _softmax(model)}
        hub.check_equal(temporary, kept, found)


def vocabulary_file(folder: Path) -> Path | None:
    """The vocabulary in a folder, or None.

    Raises:
      ValueError: there are several.
    """
    found = sorted(folder.glob("vocab*.txt"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds {names}; name one by --data.tokenizer.path=")
    return found[0] if found else None


def _one(folder: Path, *patterns: str) -> Path:
    """The only file of the first pattern that any is of."""
    found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder}: one {patterns[0]} is needed, found {names}")
    return found[0]


def _vocab(model: ELMo, datasets: Mapping[str, Any], rows: Sequence[int], path: Path) -> int:
    """The vocabulary's size, which for words as input the table of the file must have."""
    if model.input == "characters":
        return len(rows) or _MARKS
    table = datasets.get(_TABLE)
    if table is None or len(table.shape) != 2:
        raise ValueError(
            f"{path}: options.json has no char_cnn, so the words' vectors are needed: a dataset"
            f" `{_TABLE}` with a row a word; the file has none"
        )
    if -1 in rows:
        raise ValueError(f"{path}: `{_TABLE}` has no row for <UNK>, which the vocabulary lacks")
    if len(rows) != table.shape[0]:
        said = f"{len(rows):,} words" if rows else "no vocabulary"
        raise ValueError(
            f"{path}: `{_TABLE}` has {table.shape[0]:,} rows, there is {said}; name the file of"
            " its words by --data.tokenizer.path="
        )
    return len(rows)


# A dataset's parts: views of our arrays in its shape, which stand in it one above the other.
Parts = tuple[np.ndarray, ...]


def _layout(model: ELMo, flat: Mapping[str, np.ndarray]) -> dict[str, Parts]:
    """Every dataset of the file, in the original's order."""
    found: dict[str, Parts] = {}
    if model.input == "characters":
        found["char_embed"] = (flat["characters/table"],)
        for i in range(len(model.filters)):
            found[f"CNN/W_cnn_{i}"] = (flat[f"characters/conv_{i}/kernel"][None],)
            found[f"CNN/b_cnn_{i}"] = (flat[f"characters/conv_{i}/bias"],)
        for k in range(model.highways):
            for gate in ("carry", "transform"):
                ours = f"characters/highway_{k}/{gate}"
                found[f"CNN_high_{k}/W_{gate}"] = (flat[f"{ours}/kernel"],)
                found[f"CNN_high_{k}/b_{gate}"] = (flat[f"{ours}/bias"],)
        if _filters(model) != model.width:
            found["CNN_proj/W_proj"] = (flat["characters/project/kernel"],)
            found["CNN_proj/b_proj"] = (flat["characters/project/bias"],)
    else:
        table = "softmax/embedding" if model.tied else "words/embedding"
        found[_TABLE] = (flat[table][: model.vocab],)
    for x in range(2):
        for n in range(model.depth):
            found |= _cell(model, flat, x, n)
    return found


def _cell(model: ELMo, flat: Mapping[str, np.ndarray], x: int, n: int) -> dict[str, Parts]:
    """The datasets of one layer in one direction."""
    prefix = f"RNN_{x}/RNN/MultiRNNCell/Cell{n}/LSTMCell"
    kernels = (flat[f"layer_{n}/{part}/kernel"][x] for part in ("input", "recurrent"))
    found = {
        f"{prefix}/B": (flat[f"layer_{n}/bias"][x].reshape(-1),),
        f"{prefix}/W_0": tuple(kernel.reshape(len(kernel), -1) for kernel in kernels),
    }
    if model.cells != model.width:
        found[f"{prefix}/W_P_0"] = (flat[f"layer_{n}/out/kernel"][x],)
    return found


def _identities(model: ELMo, flat: Mapping[str, np.ndarray]) -> list[Parts]:
    """(kernel, bias) of projections between equal sizes, which the original does not have."""
    found = []
    if model.input == "characters" and _filters(model) == model.width:
        found.append((flat["characters/project/kernel"], flat["characters/project/bias"]))
    if model.cells == model.width:
        kernels = (flat[f"layer_{n}/out/kernel"][x] for n in range(model.depth) for x in range(2))
        found += [(kernel, np.zeros(0)) for kernel in kernels]
    return found


def _filters(model: ELMo) -> int:
    return sum(count for _, count in model.filters)


def _shape(parts: Parts) -> tuple[int, ...]:
    first, *_ = parts
    return (sum(map(len, parts)), *first.shape[1:])


def _put(parts: Parts, values: np.ndarray) -> None:
    start = 0
    for part in parts:
        part[...] = values[start : start + len(part)]
        start += len(part)


def _softmax(model: ELMo) -> tuple[str, ...]:
    """Our arrays that the file does not have."""
    bias = "softmax/output_bias"
    return (bias,) if model.tied else ("softmax/embedding", bias)


def _new_softmax(model: ELMo, seed: int) -> dict[str, np.ndarray]:
    def draw() -> dict[str, Any]:
        flat = traverse_util.flatten_dict(init_params(model, seed), sep="/")
        return {name: flat[name] for name in _softmax(model)}

    return {name: np.asarray(x, np.float32) for name, x in jax.jit(draw)().items()}
