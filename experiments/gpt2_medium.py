# SPDX-License-Identifier: Apache-2.0
"""GPT-2 medium, 355 M parameters (354,823,168; Radford et al. 2019).

    python -m lmjax train experiments/gpt2_medium.py --workdir=runs/gpt2_medium \\
        --data.corpus='files:webtext/*.jsonl.gz' --data.tokenizer.path=gpt2_bpe/ --mesh.fsdp=-1 \\
        --mesh.data=1

gpt2_small.py with 24 layers of width 1,024 and 16 heads, and the rate that GPT-3 Medium has
(Brown et al. 2020, table 2.1), since the GPT-2 paper tunes rates without naming them.
Not yet run.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

small = load_beside(__file__, "gpt2_small.py")
run = replace(
    small,
    model=small.model.clone(depth=24, width=1024, heads=16, remat="full"),
    optim=replace(small.optim, peak=3e-4),
)
tiny = replace(
    load_beside(__file__, "gpt2_small.py", tiny=True),
    model=run.model.clone(vocab=512, context=32, depth=3, width=40, heads=5),
)
