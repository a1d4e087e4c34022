# SPDX-License-Identifier: Apache-2.0
"""Run directories from published weights, and published weights from run directories."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from lmjax import recipe, sharding
from lmjax.checkpoint import Checkpoints, load_params
from lmjax.convert.elmo import VOCABULARY, export_elmo, import_elmo, vocabulary_file
from lmjax.convert.encoders import PARTS, Encoder, export_encoder, import_encoder
from lmjax.convert.google import google_prefix
from lmjax.convert.gpt import export_gpt2, import_gpt2
from lmjax.convert.hub import Info, read_config
from lmjax.convert.tokenizer_files import published_files, published_spec
from lmjax.models.elmo import ELMo
from lmjax.models.gpt import GPT
from lmjax.run import Run, replace
from lmjax.step import State, abstract_params, abstract_state, initial_carry, state_from
from lmjax.steps import newest_step
from lmjax.tokenizer import load_tokenizer
from lmjax.vocabulary import read_vocabulary
from lmjax.workdir import RunLock, record

# Fields that no published folder settles: they are the recipe's.
_OURS = ("dtype", "kernel", "remat", "unroll", "truncated_init", "temperature")


def import_folder(run: Run, source: Path, workdir: Path, about: dict[str, str]) -> None:
    """Begins a run in `workdir` with the weights, and the tokeniser if any, of a published folder.

    The folder's sizes replace those of the recipe; everything else is the recipe's. The first
    checkpoint is step 0, with a fresh optimiser.

    Raises:
      ValueError: `workdir` holds a run, or the folder is none that the recipe's model can express,
        or its tokeniser has ids without a row in the model.
    """
    if newest_step(workdir) is not None:
        raise ValueError(f"{workdir} holds a run already; choose another --workdir")
    if isinstance(run.model, ELMo):
        run, rows = _with_words(run, source)
        model, params, info = import_elmo(source, run.model, rows, run.seed)
        run = _fitted_elmo(run, model, info)
    else:
        model, params, info = _read(source, run.model)
        run = _fitted(run, model, source, info)
    workdir.mkdir(parents=True, exist_ok=True)
    with sharding.use(run.mesh.mesh()), contextlib.closing(RunLock(workdir)):
        if getattr(run.data.tokenizer, "path", ""):
            run.data.tokenizer.build(iter(()), workdir / "tokenizer")
            _check_ids(load_tokenizer(workdir / "tokenizer"), model, source)
        record(run, workdir, about)
        checkpoints = Checkpoints(workdir, recipe.to_json(run), run.keep, print)
        checkpoints.save(0, _first_state(run, params))
        checkpoints.close()
    for note in info.notes:
        print(f"note: {note}")
    print(f"{source} → {workdir}: {run.parameters():,} parameters")


def _check_ids(tokenizer: Any, model: Any, source: Path) -> None:
    ids = getattr(tokenizer, "words", tokenizer.vocab)
    if ids > model.vocab:
        raise ValueError(f"{source}: the tokeniser has {ids:,} ids, the model {model.vocab:,}")


def _with_words(run: Run, source: Path) -> tuple[Run, list[int]]:
    """The recipe with the vocabulary that it names, or else the folder's, and its words' lines."""
    spec: Any = run.data.tokenizer
    path = Path(spec.path).expanduser() if spec.path else vocabulary_file(source)
    if path is None:
        return run, []
    rows = list(read_vocabulary(path).values())
    spec = replace(spec, path=str(path.absolute()), size=len(rows))
    return replace(run, data=replace(run.data, tokenizer=spec)), rows


def _fitted_elmo(run: Run, model: ELMo, info: Info) -> Run:
    """The recipe with the folder's model, and words as long as it reads."""
    examples = replace(run.data.examples, characters=info.characters)
    return replace(run, model=model, data=replace(run.data, examples=examples))


def _read(source: Path, like: Any) -> tuple[GPT | Encoder, Any, Info]:
    """The model of a folder, which must be of the recipe's class."""
    if isinstance(like, GPT):
        return import_gpt2(source)
    if (source / "config.json").is_file():
        named = read_config(source)[0].get("model_type")
        if named in ("gpt2", "openai-gpt"):
            raise ValueError(f"{source} holds {named}, the recipe {type(like).__name__}")
    model, params, info = import_encoder(source, like)
    if type(model) is not type(like):
        raise ValueError(
            f"{source} holds {type(model).__name__} ({info.model_type}), the recipe"
            f" {type(like).__name__}; choose another experiment"
        )
    return model, params, info


def _fitted(run: Run, model: GPT | Encoder, source: Path, info: Info) -> Run:
    """The recipe with the folder's model and tokeniser, and examples that its context holds."""
    mine = run.model
    model = model.clone(**{key: getattr(mine, key) for key in _OURS if hasattr(mine, key)})
    data = run.data
    found = published_spec(_tokenizer_folder(source), info.model_type, model.vocab)
    if found is not None:
        data = replace(data, tokenizer=found)
    else:
        print(f"note: {source} has no tokeniser; evaluate and generate need one")
    data = replace(data, examples=_shortened(data.examples, model.context))
    last = run.phase2
    if last is not None:
        last = replace(last, examples=_shortened(last.examples, model.context))
    return replace(run, model=model, data=data, phase2=last)


def _shortened(examples: Any, context: int) -> Any:
    return replace(examples, length=min(examples.length, context))


def _tokenizer_folder(source: Path) -> Path:
    """Where a source's tokeniser lies: ELECTRA's is beside its discriminator."""
    if (source / PARTS[0] / "config.json").is_file():
        return source / PARTS[0]
    prefix = None if (source / "config.json").is_file() else google_prefix(source)
    return source if prefix is None else prefix.parent


def _first_state(run: Run, params: Any) -> State:
    """Step 0 with these parameters, each array where it rests."""
    wanted = abstract_state(run.model, run.optimiser(), run.batch)
    rest = jax.tree.map(lambda x: x.sharding, wanted)
    params = jax.device_put(params, rest.params)

    def begin(params: Any) -> State:
        return state_from(run.optimiser(), params, initial_carry(run.model, run.batch))

    return jax.jit(begin, out_shardings=rest)(params)


def export_folder(run: Run, workdir: Path, target: Path) -> None:
    """Writes the newest checkpoint as a hub folder, the tokeniser beside it if it has that form.

    Raises:
      ValueError: no checkpoint, a model that the format cannot express, or a target in the way.
    """
    files: dict[str, bytes] = {}
    tokenizer = None
    if (workdir / "tokenizer").is_dir():
        tokenizer = load_tokenizer(workdir / "tokenizer")
        files = published_files(workdir / "tokenizer")
    with sharding.use(sharding.Layout().mesh()):
        step, params = load_params(workdir, abstract_params(run.model))
        if isinstance(run.model, GPT):
            export_gpt2(target, run.model, params, files, tokenizer.eot if tokenizer else None)
        elif isinstance(run.model, Encoder):
            export_encoder(target, run.model, params, files, tokenizer and tokenizer.controls)
        elif isinstance(run.model, ELMo):
            words = (workdir / "tokenizer" / VOCABULARY) if tokenizer else None
            longest = run.data.examples.characters
            export_elmo(target, run.model, params, longest, words and words.read_bytes())
        else:
            raise ValueError(f"a {type(run.model).__name__} has no published format")
    same = "layers" if isinstance(run.model, ELMo) else "logits"
    print(f"step {step:,} of {workdir} → {target}: its {same} are those of the checkpoint")
