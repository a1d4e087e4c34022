# SPDX-License-Identifier: Apache-2.0
"""What may stand nowhere in the tree: reading data as code, shells, text of no stated encoding."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("lmjax", "experiments", "benchmarks", "tpu", "tests")
# Modules that turn bytes into objects by running what the bytes say.
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "jsonpickle", "imp",
}  # fmt: skip
# Functions of Python itself, and others by their last name; what is wrong with each.
BUILTINS = {"eval": "runs text", "exec": "runs text", "__import__": "imports any name"}
CALLS = {
    "unsafe_load": "YAML that makes any object",
    "full_load": "YAML that makes objects",
    "msgpack_restore": "takes another shape or dtype in silence",
    "deserialize_and_load": "unpickles a compiled program",
    "read_pickle": "unpickles",
    "run_path": "runs a file",
    "run_module": "runs a module",
    "extractall": "writes where the archive says",
    "getstatusoutput": "a shell",
    "getoutput": "a shell",
}
FULL_NAMES = {
    "yaml.load": "makes any object",
    "yaml.load_all": "makes any object",
    "torch.load": "unpickles",
    "serialization.from_bytes": "flax: takes another shape or dtype in silence",
    "os.system": "a shell",
    "os.popen": "a shell",
    "tempfile.mktemp": "a name that another may take first",
}
# Calls that need one argument to be so: (name, keyword) → the constants that are right.
KEYWORDS = {"allow_pickle": (False,), "shell": (False,), "trust_remote_code": (False,)}
# Where a rule does not hold, and why. (file, what) → reason.
EXCEPTIONS = {
    ("lmjax/recipe.py", "run_path"): "an experiment file is Python, from the path that was typed",
    ("lmjax/verb.py", "run_path"): "the same file once more, for its docstring",
    (
        "lmjax/executables.py",
        "jax.experimental.serialize_executable",
    ): "compiled steps, only out of a folder that is the user's own and closed to others",
    ("lmjax/executables.py", "deserialize_and_load"): "the same",
    ("tests/test_plan_search.py", "eval"): "lines for an experiment file, as Python reads them",
    ("tests/test_permutation_windows.py", "pickle"): "how a split travels to a worker of its own",
    ("tests/test_streams.py", "pickle"): "how a split travels to a worker of its own",
    ("tests/test_units.py", "pickle"): "how a split travels to a worker of its own",
}


def called(node: ast.Call) -> str:
    """`np.load` for np.load(…), `load` for load(…); the last two names of a longer one."""
    function = node.func
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        owner = function.value
        name = getattr(owner, "attr", getattr(owner, "id", ""))
        return f"{name}.{function.attr}"
    return ""


def keyword(node: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in node.keywords if k.arg == name), None)


def faults(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, what, why) of everything in a module that may stand nowhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                if name.split(".")[0] in MODULES or name.endswith(".serialize_executable"):
                    yield node.lineno, name, "reads data as code"
                    break
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, *fault) for fault in call_faults(node))


def call_faults(node: ast.Call) -> Iterator[tuple[str, str]]:
    name = called(node)
    last = name.rpartition(".")[2]
    for known, word in ((BUILTINS, name), (CALLS, last), (FULL_NAMES, name)):
        if word in known:
            yield word, known[word]
    for word, right in KEYWORDS.items():
        value = keyword(node, word)
        if value is not None and not (isinstance(value, ast.Constant) and value.value in right):
            yield word, "is not plainly False"


def text_faults(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, what, why) of text that is read, written or cut by rules that nobody stated."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = called(node), len(node.args)
        last = name.rpartition(".")[2]
        named = keyword(node, "encoding") is not None
        if last == "splitlines":
            yield node.lineno, last, "ends lines at characters of the text; split on newlines"
        elif last in ("read_text", "write_text"):
            if not named and given < 1 + (last == "write_text"):
                yield node.lineno, last, "names no encoding"
        elif last == "open" and name.split(".")[0] not in NO_TEXT:
            place = 1 if name in ("open", "gzip.open", "io.open") else 0
            mode = node.args[place] if given > place else keyword(node, "mode")
            binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
            if not (binary or named):
                yield node.lineno, last, "names no encoding"


# `open` of these is no text file.
NO_TEXT = ("os", "archive")


def sources(folders: tuple[str, ...]) -> Iterator[tuple[str, ast.AST]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))


def test_nothing_runs_what_data_says():
    found, used = [], set()
    for name, tree in sources(FOLDERS):
        for line, what, why in faults(tree):
            if (name, what) in EXCEPTIONS:
                used.add((name, what))
            else:
                found.append(f"{name}:{line}: {what} {why}")
    assert not found, "\n".join(found)
    assert used == set(EXCEPTIONS)  # an exception that nothing needs is none


def test_text_has_an_encoding_and_lines_end_at_newlines():
    found = [
        f"{name}:{line}: {what} {why}"
        for name, tree in sources(FOLDERS[:-1])
        for line, what, why in text_faults(tree)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import jax.experimental.serialize_executable",
        "from jax.experimental import serialize_executable",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=unsure)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "flax.serialization.from_bytes(target, data)",
        "serialization.msgpack_restore(data)",
        "torch.load(path)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "tokenizer = load(name, trust_remote_code=True)",
        "runpy.run_path(name)",
        "tarfile.open(path, 'rb').extractall()",
    ],
)
def test_what_runs_data_is_found(source: str):
    assert list(faults(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "np.load(path)",
        "yaml.safe_load(text)",
        "model.eval()",
        "Model().eval()",
        "int.from_bytes(data, 'big')",
    ],
)
def test_what_runs_nothing_is_let_pass(source: str):
    assert not list(faults(ast.parse(source)))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("path.open()", True),
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("text.splitlines()", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open('a', encoding='utf-8')", False),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text, 'utf-8')", False),
    ],
)
def test_text_without_a_rule_is_found(source: str, fault: bool):
    assert bool(list(text_faults(ast.parse(source)))) == fault
