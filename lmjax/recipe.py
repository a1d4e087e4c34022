# SPDX-License-Identifier: Apache-2.0
"""Recipes: nested frozen dataclasses that are read, overridden, recorded and compared.

An experiment file is Python and binds `run` (and `tiny`, the same recipe at toy size). Loading it
runs it, so it is only ever loaded from a path that the user typed. What a run directory records is
JSON: values and class names, never an import path.
"""

import dataclasses
import difflib
import json
import math
import re
import runpy
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

Recipe = TypeVar("Recipe")

# Linen adds these two to every module; they are wiring there, and ordinary fields elsewhere.
_WIRING = ("parent", "name")


def load(path: str, tiny: bool = False) -> Any:
    """The `run` of the experiment file at `path`, or its `tiny`.

    Raises:
      ValueError: no such file, or a file that does not bind the name.
    """
    file = Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("experiments")
        near = nearest(file.name, [p.name for p in folder.glob("*.py")])
        hint = f"; did you mean {folder / near}?" if near else ""
        raise ValueError(f"{path}: no such experiment file{hint}")
    name = "tiny" if tiny else "run"
    bound = runpy.run_path(str(file))
    if name not in bound:
        raise ValueError(f"{path} does not define `{name}`")
    return bound[name]


def load_beside(file: str, name: str, tiny: bool = False) -> Any:
    """`load` of an experiment file in the folder of `file`: how one recipe derives from another."""
    return load(str(Path(file).with_name(name)), tiny)


def nearest(word: str, allowed: typing.Iterable[str]) -> str | None:
    """The spelling in `allowed` closest to `word`, if any is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return close[0] if close else None


def fields(value: Any) -> list[dataclasses.Field]:
    """The hyper-parameters of a dataclass or Linen module."""
    wiring = _WIRING if _is_module(value) else ()
    return [f for f in dataclasses.fields(value) if f.init and f.name not in wiring]


def _is_module(value: Any) -> bool:
    return hasattr(value, "clone")  # known by what it does, so that no recipe needs jax


def override(recipe: Recipe, assignments: typing.Iterable[tuple[str, str]]) -> Recipe:
    """`recipe` with every dotted key set to the value that its text stands for.

    All at once: their order does not matter, and only the result must be consistent.

    Raises:
      ValueError: an unknown key (names the nearest), or text that is not of the field's type.
    """
    return _set(recipe, [(key.split("."), text, key) for key, text in assignments])


def _set(value: Any, assignments: list[tuple[list[str], str, str]]) -> Any:
    by_name = {f.name: f for f in fields(value)}
    grouped: dict[str, list[tuple[list[str], str, str]]] = {}
    for path, text, key in assignments:
        if path[0] not in by_name:
            _unknown(value, path, key)
        grouped.setdefault(path[0], []).append((path[1:], text, key))
    changes = {}
    for name, given in grouped.items():
        new = getattr(value, name)
        for path, text, key in given:
            if not path:
                new = _parse_field(value, by_name[name], new, text, key)
        inner = [part for part in given if part[0]]
        if inner and not dataclasses.is_dataclass(new):
            path, _, key = inner[0]
            raise ValueError(f"--{key}: {key.rsplit('.', len(path))[0]} has no keys inside it")
        changes[name] = _set(new, inner) if inner else new
    return _replace(value, **changes) if changes else value


def _unknown(value: Any, path: list[str], key: str) -> typing.NoReturn:
    names = [f.name for f in fields(value)]
    prefix = key.split(".")[: -len(path)]
    if not names:
        kind = type(value).__name__
        raise ValueError(f"unknown key --{key}: {'.'.join(prefix)} is a {kind}, which has no keys")
    near = nearest(path[0], names)
    if near is None:  # perhaps the right key in the wrong place
        leaf = path[-1]
        elsewhere = [k for k, _ in flatten(to_json(value)) if k.rsplit(".", 1)[-1] == leaf]
        near = elsewhere[0] if elsewhere else None
    else:
        near = ".".join([near, *path[1:]])
    hint = f"; did you mean --{'.'.join([*prefix, near])}?" if near else "."
    dotted = "".join(f"{p}." for p in prefix)
    allowed = ", ".join(f"--{dotted}{n}" for n in names)
    raise ValueError(f"unknown key --{key}{hint} Allowed here: {allowed}")


def _replace(value: Any, **changes: Any) -> Any:
    return value.clone(**changes) if _is_module(value) else dataclasses.replace(value, **changes)


def _parse_field(owner: Any, field: dataclasses.Field, current: Any, text: str, key: str) -> Any:
    parse: Callable[[str, Any], Any] | None = field.metadata.get("parse")
    if parse is not None:
        return parse(text, current)
    hint = typing.get_type_hints(type(owner)).get(field.name, Any)
    if type(None) in typing.get_args(hint) and text.lower() == "none":
        return None
    if dataclasses.is_dataclass(current) or callable(current) or hint is Any:
        inner = [f.name for f in fields(current)] if dataclasses.is_dataclass(current) else []
        keys = ", ".join(f"--{key}.{n}" for n in inner)
        more = f"set its parts ({keys})" if keys else "change it in the experiment file"
        raise ValueError(f"--{key} is a {type(current).__name__} and cannot be typed; {more}")
    return _parse(text, hint, key)


def _parse(text: str, hint: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", "null", ""):
            return None
        return _parse(text, next(a for a in args if a is not type(None)), key)
    if origin is Literal:
        if text not in args:
            near = nearest(text, args)
            hint_text = f"; did you mean {near}?" if near else ""
            raise ValueError(f"--{key}={text}: allowed are {', '.join(args)}{hint_text}")
        return text
    if origin is tuple:
        parts = [p for p in text.strip("()[] ").split(",") if p.strip()]
        return tuple(_parse(p.strip(), args[0], key) for p in parts)
    return _SCALARS[hint](text, key) if hint in _SCALARS else _refuse(text, hint, key)


def _integer(text: str, key: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = float(text) if _is_number(text) else math.nan
        if not number.is_integer():
            raise ValueError(f"--{key}={text}: a whole number is needed") from None
    if abs(number) >= 1 << 63:
        raise ValueError(f"--{key}={text}: a whole number below 2**63 is needed")
    return int(number)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _float(text: str, key: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"--{key}={text}: a number is needed") from None
    if not math.isfinite(number):
        raise ValueError(f"--{key}={text}: a finite number is needed")
    return number


def _boolean(text: str, key: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise ValueError(f"--{key}={text}: allowed are true and false")
    return known[text.lower()]


def _refuse(text: str, hint: Any, key: str) -> typing.NoReturn:
    name = getattr(hint, "__name__", hint)
    raise ValueError(f"--{key}={text}: a {name} cannot be typed; change it in the experiment file")


_SCALARS: dict[Any, Callable[[str, str], Any]] = {
    int: _integer,
    float: _float,
    bool: _boolean,
    str: lambda text, key: text,
}


def to_json(value: Any) -> Any:
    """`value` as plain JSON; a dataclass becomes its fields plus its class's name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
        return {"class": type(value).__name__, **inner}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if callable(value):
        return {"function": getattr(value, "__name__", type(value).__name__)}
    return value


def from_json(recipe: Recipe, recorded: Any) -> Recipe:
    """`recipe` with the values that a run directory recorded for it.

    Where the recorded class is another one than the recipe's, the recipe's own value stays: only
    the experiment file can say what code runs.
    """
    if not isinstance(recorded, dict):
        raise ValueError(f"a recorded {type(recipe).__name__} is {_shown(recorded)}: damaged")
    hints = typing.get_type_hints(type(recipe))
    changes = {}
    for field in fields(recipe):
        if field.name not in recorded:
            continue
        current, old = getattr(recipe, field.name), recorded[field.name]
        if isinstance(old, dict) and "class" in old:
            if dataclasses.is_dataclass(current) and type(current).__name__ == old["class"]:
                changes[field.name] = from_json(current, old)
        elif callable(current) and not dataclasses.is_dataclass(current):
            continue
        elif not _fits(old, hints.get(field.name, Any), dataclasses.is_dataclass(current)):
            raise ValueError(
                f"the recorded {field.name}={_shown(old)} of a {type(recipe).__name__} is of"
                " another type than the field: damaged, or of another version"
            )
        else:
            changes[field.name] = _tuples(old)  # None: a part that the run went without
    return _replace(recipe, **changes)


def _fits(value: Any, hint: Any, part: bool = False) -> bool:
    """Whether a value of JSON is of a field's type; where a `part` stands now, only None can be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if part:
        return value is None and type(None) in args
    if origin in (Union, types.UnionType):
        return any(_fits(value, inner) for inner in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if hint in (int, float):
        whole = type(value) is int and abs(value) < 1 << 63
        return whole or (hint is float and type(value) is float and math.isfinite(value))
    if hint in (bool, str):
        return type(value) is hint
    if origin is dict:
        return isinstance(value, dict)
    return hint is Any or (value is None and hint is type(None))


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def _tuples(value: Any) -> Any:
    """Lists of JSON, also those in lists, as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaf values of nested JSON, in order."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def difference(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two recorded recipes differ; absent values are None."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = list(dict.fromkeys([*before, *after]))
    return [(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)]


def defaults(value: Any, prefix: str = "") -> dict[str, Any]:
    """The defaults of a recipe's fields by dotted key, as JSON, in all of its parts."""
    found: dict[str, Any] = {}
    for field in fields(value):
        part, key = getattr(value, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(part):
            found |= defaults(part, f"{key}.")
        elif field.default is not dataclasses.MISSING:
            found |= flatten(to_json(field.default), key)
    return found


def dump(tree: Any) -> str:
    """JSON text as every file of a run directory writes it; a NaN is "NaN", as in metrics.jsonl."""
    text = json.dumps(each_leaf(tree, strict), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Names of files that are no UTF-8 hold lone surrogates, which no file can, but an escape.
    return re.sub("[\ud800-\udfff]", lambda lone: ascii(lone[0])[1:-1], text)


def each_leaf(tree: Any, change: Callable[[Any], Any]) -> Any:
    """JSON with every value that is no object and no list changed."""
    if isinstance(tree, dict):
        return {key: each_leaf(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [each_leaf(value, change) for value in tree]
    return change(tree)


def strict(value: Any) -> Any:
    """A number that is not finite as a text, any other value as it is: JSON has no word for one."""
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value
