# SPDX-License-Identifier: Apache-2.0
"""Manifests: what was sealed opens, what was changed or is something else does not."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.manifest import Damaged, Manifest, check_name, differences, opened, seal

ARRAYS = {"params/a": [[2, 3], "float32"], "step": [[], "int32"]}
PRINTS = {"params/a": "0123456789abcdef", "step": "fedcba9876543210"}
SEALED = seal(7, {"rate": 0.1, "spans": ((1, 2),), "name": "é"}, ARRAYS, PRINTS)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
keys = st.sampled_from([*SEALED, "other"])


def test_what_was_sealed_opens_after_a_way_through_json():
    assert opened(json.loads(json.dumps(SEALED)), 7) == Manifest(
        ARRAYS, PRINTS, {"rate": 0.1, "spans": [[1, 2]], "name": "é"}
    )
    with pytest.raises(Damaged, match="its manifest is of step 7"):
        opened(SEALED, 8)


def places(content, path=()) -> list[tuple]:
    """Paths of all values in nested JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in inner:
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(places(SEALED)), json_values)
def test_no_value_can_be_another(place, value):
    content = copy.deepcopy(SEALED)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if json.dumps(parent[place[-1]]) == json.dumps(value):
        return
    parent[place[-1]] = value
    with pytest.raises(Damaged):
        opened(content, 7)


@settings(max_examples=200, deadline=None)
@given(json_values | st.dictionaries(keys, json_values))
def test_whatever_else_is_there_is_damaged(content):
    with pytest.raises(Damaged):
        opened(content, 7)


@pytest.mark.parametrize("key", SEALED)
def test_nothing_can_be_missing(key):
    content = {k: v for k, v in SEALED.items() if k != key}
    with pytest.raises(Damaged):
        opened(content, 7)


def test_a_manifest_older_than_fingerprints_has_none():
    assert opened({"recipe": {}, "arrays": ARRAYS}, 7) == Manifest(ARRAYS, None, {})


def test_differences_are_the_paths_that_are_not_alike():
    assert differences(PRINTS, dict(PRINTS)) == []
    assert differences(PRINTS, {"step": PRINTS["step"], "b": "0" * 16}) == ["b", "params/a"]


@pytest.mark.parametrize("name", ["../x", "a.b", "a/b", "", " ", "é", "x" * 101, "a\n"])
def test_names_are_plain(name):
    with pytest.raises(ValueError, match="is no name of a parameter"):
        check_name(name)
    check_name("layer_0-A")
