# SPDX-License-Identifier: Apache-2.0
"""The verbs of the command line: the flags of each, and what it does with them and the recipe."""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from lmjax import process_flags, recipe
from lmjax.verb import (
    Assignments,
    Verb,
    about,
    add_workdir,
    folder,
    load_recorded,
    load_run,
    one_voice,
)


def _train_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    process_flags.add_flags(parser)
    parser.add_argument(
        "--allow", default="", metavar="KEYS", help="recipe keys that may differ on resuming"
    )
    text = "steps that `plan --save` compiled; only from a folder that is yours alone (0700)"
    parser.add_argument("--compiled", metavar="DIR", help=text)
    parser.add_argument(
        "--until", type=int, default=0, metavar="STEP", help="save after this step and leave"
    )
    parser.add_argument(
        "--witness", metavar="FILE", help="write each step's batch and loss there, for comparison"
    )


def _train(arguments: argparse.Namespace, keys: Assignments) -> None:
    run = load_run(arguments, keys)
    process_flags.join_by_flags(arguments)
    from lmjax.progress import Unbreakable
    from lmjax.train import train

    if arguments.until < 0:
        raise ValueError(f"--until={arguments.until}: a step from 1 up")
    allow = tuple(k for k in arguments.allow.split(",") if k)
    witness = None if arguments.witness is None else Path(arguments.witness)
    # A run goes on when nobody reads its output any more.
    with contextlib.redirect_stdout(Unbreakable(sys.stdout)), one_voice():
        train(
            run, folder("workdir", arguments.workdir), about(arguments), allow,
            compiled=None if arguments.compiled is None else folder("compiled", arguments.compiled),
            stop_at=arguments.until, witness=witness,
        )  # fmt: skip


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    process_flags.add_flags(parser)
    parser.add_argument("--split", default="", help="default: test, or validation without one")
    text = "encoders: tokens to mask one at a time, at most (default %(default)s)"
    parser.add_argument("--pseudo", type=int, default=1024, metavar="N", help=text)


def _evaluate(arguments: argparse.Namespace, keys: Assignments) -> None:
    run = load_recorded(arguments, keys)
    process_flags.join_by_flags(arguments)
    from lmjax.evaluate import evaluate

    other = any(key.startswith("data.corpus") for key, _ in keys)
    corpus = run.data.corpus if other else None
    workdir = folder("workdir", arguments.workdir)
    with one_voice():
        evaluate(run, workdir, arguments.split, corpus, arguments.pseudo)


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    add = parser.add_argument
    add("--prompt", default="", help="text to go on from")
    add("--tokens", type=int, default=200, help="how many tokens at most (default %(default)s)")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--beams", type=int, default=1, help="beam search with that many beams")
    add("--temperature", type=float, default=1.0, help="flattens (>1) or sharpens (<1)")
    add("--top_k", type=int, default=0, help="draw among the k likeliest only; 0 is all")
    add("--top_p", type=float, default=1.0, help="draw among the likeliest that hold this mass")
    add("--stop", action="append", default=[], help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="of the draws")


def _text(flag: str, text: str) -> str:
    """A text that was typed, whatever the locale made of its bytes."""
    try:
        return os.fsencode(text).decode()
    except ValueError:
        raise ValueError(f"--{flag}={ascii(text)}: not valid UTF-8") from None


def _generate(arguments: argparse.Namespace, keys: Assignments) -> None:
    prompt = _text("prompt", arguments.prompt)
    run = load_recorded(arguments, keys)
    from lmjax.generate import Sampling
    from lmjax.sample import sample

    how = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        greedy=arguments.greedy,
        seed=arguments.seed,
    )
    sample(
        run, folder("workdir", arguments.workdir), prompt, how, tokens=arguments.tokens,
        beams=arguments.beams, stop=[_text("stop", stop) for stop in arguments.stop],
    )  # fmt: skip


def _fill_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument("--text", required=True, help="a text with [MASK] where words are wanted")
    parser.add_argument("--top", type=int, default=5, help="words a mask (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _fill(arguments: argparse.Namespace, keys: Assignments) -> None:
    text = _text("text", arguments.text)
    run = load_recorded(arguments, keys)
    from lmjax.fill import fill

    fill(run, folder("workdir", arguments.workdir), text, arguments.top, arguments.json)


def _embed_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    from lmjax.embed_flags import add_flags

    add_flags(parser)


def _embed(arguments: argparse.Namespace, keys: Assignments) -> None:
    text = _text("text", arguments.text or "")
    run = load_recorded(arguments, keys)
    from lmjax.embed_flags import embed_by_flags
    from lmjax.vectors import lines_of

    texts = [text] if arguments.file is None else lines_of(Path(arguments.file))
    target = Path(arguments.target) if arguments.target else None
    workdir = folder("workdir", arguments.workdir)
    count = embed_by_flags(run, workdir, texts, target, arguments)
    if target:
        print(f"{count:,} texts → {target}")


def _describe_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _describe(arguments: argparse.Namespace, keys: Assignments) -> None:
    run = load_run(arguments, keys)
    from lmjax.document import redacted
    from lmjax.run import describe

    def shown(value: Any) -> Any:
        """Without the secrets in URLs."""
        return redacted(value) if isinstance(value, str) else value

    resolved, summary = recipe.each_leaf(recipe.to_json(run), shown), describe(run)
    if not arguments.json:
        print(redacted(about(arguments)["description"]) + "\n")
        for key, value in recipe.flatten(resolved):
            if not key.endswith(("class", "function")):
                print(f"--{key}={value}")
        print()
        width = max(16, *map(len, summary))
        for key, value in summary.items():
            print(f"{key:>{width}}  {value:,}")
    print(json.dumps({**summary, "run": resolved}, ensure_ascii=False))


def _import_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FOLDER",
        help="a hub folder, Google's or bilm-tf's",
    )


def _import(arguments: argparse.Namespace, keys: Assignments) -> None:
    run = load_run(arguments, keys)
    from lmjax.convert.exchange import import_folder

    import_folder(
        run,
        folder("from", arguments.source),
        folder("workdir", arguments.workdir),
        about(arguments),
    )


def _export_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument("--to", dest="target", required=True, metavar="FOLDER", help="a new folder")


def _export(arguments: argparse.Namespace, keys: Assignments) -> None:
    run = load_recorded(arguments, keys)
    from lmjax.convert.exchange import export_folder

    export_folder(run, folder("workdir", arguments.workdir), folder("to", arguments.target))


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    from lmjax.plan.flags import add_flags

    add_flags(parser)


def _plan(arguments: argparse.Namespace, keys: Assignments) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # whatever is here, nothing is asked of it
    run = load_run(arguments, keys)
    from lmjax.plan.flags import plan_by_flags

    plan_by_flags(run, arguments)


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", metavar="DIR", help="a run's directory")
    text = "rename damaged steps, so that nothing reads them again"
    parser.add_argument("--set-aside", action="store_true", help=text)


def _verify(arguments: argparse.Namespace, keys: Assignments) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the arrays are read here, wherever they were trained
    if keys:
        raise ValueError(f"unknown flag --{keys[0][0]}: verify reads no recipe")
    from lmjax.verify import verify

    verify(folder("workdir", arguments.workdir), arguments.set_aside)


def _batch_flags(parser: argparse.ArgumentParser) -> None:
    add_workdir(parser)
    parser.add_argument("step", type=int, metavar="STEP", help="as metrics.jsonl counts, from 1")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _batch(arguments: argparse.Namespace, keys: Assignments) -> None:
    run = load_recorded(arguments, keys)
    from lmjax.seen import show_batch

    show_batch(run, folder("workdir", arguments.workdir), arguments.step, arguments.json)


def _drill_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kills", type=int, default=3, metavar="N", help="SIGKILLs (default %(default)s)")
    add("--draw", type=int, default=0, metavar="SEED", help="of the moments and the damage")
    add("--folder", metavar="DIR", help="a new folder to leave all runs in")


def _drill(arguments: argparse.Namespace, keys: Assignments) -> None:
    env = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator is for the runs that it starts
    run = load_run(arguments, keys)
    if arguments.kills < 0:
        raise ValueError(f"--kills={arguments.kills}: must be 0 or more")
    from lmjax.drill import drill

    typed = [arguments.experiment, *(["--tiny"] if arguments.tiny else [])]
    typed += [f"--{key}={value}" for key, value in keys]
    keep = None if arguments.folder is None else folder("folder", arguments.folder)
    if not drill(run, typed, arguments.kills, arguments.draw, keep, env):
        sys.exit(1)


_EXAMPLE = "python -m lmjax {} experiments/gpt2_small.py "
VERBS = {
    "train": Verb(
        "Trains, resuming by itself what DIR holds.",
        _EXAMPLE.format("train") + "--tiny --workdir=runs/tiny --steps=50",
        _train,
        _train_flags,
    ),
    "evaluate": Verb(
        "Scores the newest checkpoint on a held-out split.",
        _EXAMPLE.format("evaluate") + "--workdir=runs/tiny --split=test",
        _evaluate,
        _evaluate_flags,
    ),
    "generate": Verb(
        "Continues a prompt with the newest checkpoint.",
        _EXAMPLE.format("generate") + '--workdir=runs/tiny --prompt="The module" --top_k=40',
        _generate,
        _generate_flags,
    ),
    "fill": Verb(
        "Names the likeliest words for the masks of a text.",
        "python -m lmjax fill experiments/bert_base.py --workdir=runs/bert"
        ' --text="The [MASK] sat on the mat."',
        _fill,
        _fill_flags,
    ),
    "embed": Verb(
        "Writes vectors of texts, words or tokens from any layer.",
        "python -m lmjax embed experiments/bert_base.py --workdir=runs/bert --file=texts.txt"
        " --to=vectors.npz",
        _embed,
        _embed_flags,
    ),
    "describe": Verb(
        "Shows the resolved recipe and what it costs; allocates nothing.",
        _EXAMPLE.format("describe") + "--batch=256",
        _describe,
        _describe_flags,
        caches=False,
    ),
    "plan": Verb(
        "Compiles the step for TPUs that are not here: fit, speed, price.",
        _EXAMPLE.format("plan") + "--topology=v5e:4x4 --topology=v5p:2x2x2",
        _plan,
        _plan_flags,
        caches=False,
    ),
    "drill": Verb(
        "Kills, damages, moves and resumes a run, and compares it with one left in peace.",
        _EXAMPLE.format("drill") + "--tiny --kills=3",
        _drill,
        _drill_flags,
        caches=False,
    ),
    "import": Verb(
        "Starts a run directory from a folder of Hugging Face, Google (BERT) or bilm-tf (ELMo).",
        _EXAMPLE.format("import") + "--workdir=runs/gpt2 --from=gpt2/",
        _import,
        _import_flags,
    ),
    "export": Verb(
        "Writes the newest checkpoint as a Hugging Face (ELMo: bilm-tf) folder and checks it.",
        _EXAMPLE.format("export") + "--workdir=runs/gpt2 --to=exported/",
        _export,
        _export_flags,
    ),
    "batch": Verb(
        "Prints the documents that a step saw.",
        _EXAMPLE.format("batch") + "1234 --workdir=runs/tiny",
        _batch,
        _batch_flags,
    ),
    "verify": Verb(
        "Reads every step of DIR whole and says which are what was saved.",
        "python -m lmjax verify runs/gpt2",
        _verify,
        _verify_flags,
        of_experiment=False,
        caches=False,
    ),
}
