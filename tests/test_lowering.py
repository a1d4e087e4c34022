# SPDX-License-Identifier: Apache-2.0
"""Every experiment at full size, traced for 16 TPUs as data=4 × fsdp=2 × tensor=2; none compiled.

Files share families, so a file of each is traced every time and all of them in the slow suite.
"""

import pytest
from commands import ROOT

from lmjax import recipe
from lmjax.plan import chips
from lmjax.plan.program import lower_step
from lmjax.run import Run, replace
from lmjax.sharding import Layout

pytestmark = pytest.mark.skipif(not chips.installed(), reason=chips.MISSING)

ALL = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
FAMILIES = ("gpt2_small", "bert_base", "albert_base", "elmo")
# Published sizes whose heads two devices cannot share; what their meshes can have instead.
UNEVEN = {"gpt2_xl": "model.heads=25", "electra_small": "model.generator_heads=1"}
TWELVE = "shakespeare_char"  # its published batch; 8 devices share 16


def full(name: str, layout: Layout) -> Run:
    run = recipe.load(str(ROOT / "experiments" / f"{name}.py"))
    return replace(run, mesh=layout, batch=16 if name == TWELVE else run.batch)


def check(name: str) -> None:
    layout = Layout(4, 4, 1) if name in UNEVEN else Layout(4, 2, 2)
    run = full(name, layout)
    for phase in range(len(run.makers())):
        text = lower_step(run, "v5e:4x4", phase).text
        assert f'"data"={layout.data}, "fsdp"={layout.fsdp}, "tensor"={layout.tensor}' in text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_each_family_lowers_on_three_axes(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in FAMILIES])
def test_every_file_lowers_on_three_axes(name):
    check(name)


@pytest.mark.parametrize("name", UNEVEN)
def test_heads_that_tensor_cannot_split_are_named_before_anything_is_traced(name):
    with pytest.raises(ValueError, match=f"{UNEVEN[name]}: .*tensor=2 does not divide"):
        lower_step(full(name, Layout(4, 2, 2)), "v5e:4x4")
