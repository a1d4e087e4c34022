# SPDX-License-Identifier: Apache-2.0
"""The architecture: what each module may import, as a list of floors."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lmjax"

# From the ground up. A module imports only what stands below it, never its own floor.
FLOORS = (
    "document watch manifest steps compilation roll",
    "hosts",
    "process_flags",
    "text_bytes",
    "text_files",
    "text",
    "tokenizer_base bpe spm",
    "wordpiece",
    "pretokenized",
    "sentences words",
    "vocabulary",
    "tokenizer",
    "units",
    "store_build",
    "store",
    "data",
    "recipe",
    "sharding peaks executables",
    "cpu disk fingerprint",
    "attention",
    "layers",
    "blocks sparse mix recurrent spelling_cpu word_chunks",
    "characters encoder sampled",
    "sampled_loss",
    "models.*",
    "losses",
    "examples.permutation",
    "examples.draws",
    "examples.masks examples.packing examples.sentences",
    "examples.rows",
    "examples.*",
    "batches",
    "optim",
    "step",
    "hardware run",
    "programs",
    "workdir seen",
    "checkpoint skips",
    "metrics progress charts report_page verify witness",
    "report",
    "evaluator pseudo",
    "masked_scores word_scores",
    "evaluate",
    "vectors",
    "generate fill embed word_vectors",
    "embed_flags",
    "convert.hub convert.hdf5 convert.tf_checkpoint",
    "convert.encoder_names convert.google convert.tokenizer_files",
    "convert.encoder_config convert.elmo_options",
    "convert.*",
    "convert.exchange",
    "sample",
    "train",
    "drill_runs",
    "drill",
    "plan.chips plan.hlo plan.kept plan.table",
    "plan.program plan.crashes",
    "plan.facts",
    "plan.predict plan.memory",
    "plan.plan plan.roofline",
    "plan.search plan.winners",
    "plan.flags",
    "verb",
    "verbs",
    "__main__",
)
HOST_ONLY = (
    "document text_bytes text_files text bpe spm vocabulary tokenizer units store data recipe "
    "examples.permutation examples.windows examples.pairs examples.full_sentences "
    "examples.instances examples.streams vectors metrics progress charts report_page report"
).split()
ACCELERATOR = {"jax", "jaxlib", "flax", "optax", "orbax"}


def name_of(path: Path) -> str:
    """`models.gpt` for lmjax/models/gpt.py; a package is named for its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(p): ast.parse(p.read_text("utf-8")) for p in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that is imported anywhere, in functions and type checks as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules of lmjax that are imported, without the prefix."""
    found = set()
    for dotted in imported(tree):
        if dotted == "lmjax" or not dotted.startswith("lmjax."):
            continue
        inner = dotted.removeprefix("lmjax.")
        while inner and inner not in modules:  # lmjax.text.Files is lmjax.text
            inner = inner.rpartition(".")[0]
        assert inner, f"{dotted} is no module of lmjax"
        found.add(inner)
    return found


def floor(module: str) -> int | None:
    """The height of a module: its own name counts before its folder's."""
    folder = f"{module.rpartition('.')[0]}.*"
    for wanted in (module, folder):
        for height, names in enumerate(FLOORS):
            if wanted in names.split():
                return height
    return None


def violations(module: str, tree: ast.AST, modules: set[str]) -> list[str]:
    height = floor(module)
    assert height is not None, f"lmjax/{module} stands on no floor: add it to FLOORS"
    heights = {other: floor(other) for other in ours(tree, modules)}
    return [f"{module} → {other}" for other, h in heights.items() if h is None or h >= height]


def modules() -> set[str]:
    packages = {"", "models", "examples", "convert", "plan"}
    return {name for name in TREES if name not in packages}


def test_every_module_imports_only_what_stands_below_it():
    found = [v for name in sorted(modules()) for v in violations(name, TREES[name], modules())]
    assert not found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("text", "from lmjax.train import train"),
        ("models.gpt", "from lmjax import losses"),
        ("models.gpt", "import lmjax.models.gpt"),
        ("store", "def late():\n    from lmjax import step"),
        ("examples.windows", "if TYPE_CHECKING:\n    from lmjax.batches import Plan"),
    ],
)
def test_an_import_that_runs_upstream_is_found(module: str, source: str):
    assert violations(module, ast.parse(source), modules())


def test_packages_import_nothing():
    for name in ("", "models", "examples", "convert"):
        assert not list(imported(TREES[name])), f"lmjax/{name}/__init__.py"


def test_host_modules_reach_no_jax_even_through_others():
    direct = {name: ours(TREES[name], modules()) for name in modules()}
    for name in HOST_ONLY:
        reached, ahead = set(), [name]
        while ahead:
            module = ahead.pop()
            if module not in reached:
                reached.add(module)
                ahead += direct[module]
        for module in reached:
            roots = {dotted.split(".")[0] for dotted in imported(TREES[module])}
            assert not roots & ACCELERATOR, f"{name} reaches {roots & ACCELERATOR} by {module}"


def test_one_module_imports_orbax():
    users = {n for n, tree in TREES.items() if any(d.startswith("orbax") for d in imported(tree))}
    assert users == {"disk"}


@pytest.mark.parametrize("banned", ["tensorflow", "torch", "transformers", "pickle", "yaml"])
def test_nothing_imports(banned: str):
    for name, tree in TREES.items():
        assert banned not in {dotted.split(".")[0] for dotted in imported(tree)}, name


def test_nothing_allows_pickles():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, name


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def axis_names(tree: ast.AST) -> set[str]:
    """Mesh axes written as strings; "data" is a word of its own, so it counts in specs only."""
    found = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
    }
    calls = {"P", "PartitionSpec", "constrain", "axis_size", "psum", "pmean", "pmax", "all_gather"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) in calls:
            inner = [n for arg in node.args for n in ast.walk(arg)]
            found |= {n.value for n in inner if isinstance(n, ast.Constant) and n.value == "data"}
    return found


def test_only_the_sharding_module_names_mesh_axes():
    assert {name for name, tree in TREES.items() if axis_names(tree)} == {"sharding"}


def test_a_mesh_axis_in_a_spec_is_found():
    assert axis_names(ast.parse("spec = P(None, ('data',))")) == {"data"}
    assert not axis_names(ast.parse("folder = workdir / 'data'"))
