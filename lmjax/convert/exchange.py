# SPDX-License-Identifier: Apache-2.0
"""Run directories from published weights, and published weights from run directories."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import jax

from lmjax import recipe, sharding
from lmjax.checkpoint import Checkpoints, load_params, newest_step
from lmjax.convert.huggingface import Info, export_gpt2, import_gpt2
from lmjax.models.gpt import GPT
from lmjax.run import Run, replace
from lmjax.step import State, abstract_params, abstract_state, state_from
from lmjax.tokenizer import GPT1BPE, ByteBPE, load_tokenizer
from lmjax.workdir import RunLock, record

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "encoder.json", "encoder_bpe_40000.json")
_EXPORTED = ("tokenizer.json", "sentencepiece.model")


def import_folder(run: Run, source: Path, workdir: Path, about: dict[str, str]) -> None:
    """Begins a run in `workdir` with the weights, and the tokeniser if any, of a hub folder.

    The folder's sizes replace those of the recipe; everything else is the recipe's. The first
    checkpoint is step 0, with a fresh optimiser.

    Raises:
      ValueError: `workdir` holds a run, or the folder is none that a model here can express, or
        its tokeniser has ids without a row in the model.
    """
    if newest_step(workdir) is not None:
        raise ValueError(f"{workdir} holds a run already; choose another --workdir")
    model, params, info = import_gpt2(source)
    run = _fitted(run, model, source, info)
    workdir.mkdir(parents=True, exist_ok=True)
    with sharding.use(run.mesh.mesh()), contextlib.closing(RunLock(workdir)):
        if getattr(run.data.tokenizer, "path", ""):
            run.data.tokenizer.build(iter(()), workdir / "tokenizer")
            ids = load_tokenizer(workdir / "tokenizer").vocab
            if ids > model.vocab:
                raise ValueError(
                    f"{source}: the tokeniser has {ids:,} ids, the model {model.vocab:,}"
                )
        record(run, workdir, about)
        checkpoints = Checkpoints(workdir, recipe.to_json(run), run.keep, print)
        checkpoints.save(0, _first_state(run, params))
        checkpoints.close()
    for note in info.notes:
        print(f"note: {note}")
    print(f"{source} → {workdir}: {run.parameters():,} parameters")


def _fitted(run: Run, model: GPT, source: Path, info: Info) -> Run:
    """The recipe with the folder's model and tokeniser, and windows that its context holds."""
    mine = run.model
    model = model.clone(dtype=mine.dtype, kernel=mine.kernel, remat=mine.remat, unroll=mine.unroll)
    data = run.data
    if any((source / name).is_file() for name in _TOKENIZER_FILES):
        kind = GPT1BPE if info.model_type == "openai-gpt" else ByteBPE
        data = replace(data, tokenizer=kind(vocab=model.vocab, path=str(source.absolute())))
    else:
        print(f"note: {source} has no tokeniser; evaluate and generate need one")
    length = min(data.examples.length, model.context)
    return replace(
        run, model=model, data=replace(data, examples=replace(data.examples, length=length))
    )


def _first_state(run: Run, params: Any) -> State:
    """Step 0 with these parameters, each array where it rests."""
    wanted = abstract_state(run.model, run.optimiser())
    rest = jax.tree.map(lambda x: x.sharding, wanted)
    params = jax.device_put(params, rest.params)
    begin = jax.jit(partial(state_from, run.optimiser()), out_shardings=rest)
    return begin(params)


def export_folder(run: Run, workdir: Path, target: Path) -> None:
    """Writes the newest checkpoint as a hub folder, the tokeniser beside it if it has that form.

    Raises:
      ValueError: no checkpoint, a model that the format cannot express, or a target in the way.
    """
    files: dict[str, bytes] = {}
    eot = None
    if (workdir / "tokenizer").is_dir():
        eot = load_tokenizer(workdir / "tokenizer").eot
        for name in _EXPORTED:
            if (workdir / "tokenizer" / name).is_file():
                files[name] = (workdir / "tokenizer" / name).read_bytes()
    with sharding.use(sharding.Layout().mesh()):
        step, params = load_params(workdir, abstract_params(run.model))
        export_gpt2(target, run.model, params, files, eot)
    print(f"step {step:,} of {workdir} → {target}: its logits are those of the checkpoint")
