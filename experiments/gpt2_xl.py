# SPDX-License-Identifier: Apache-2.0
"""GPT-2 xl, 1.56 B parameters (1,557,611,200; Radford et al. 2019).

    python -m lmjax train experiments/gpt2_xl.py --workdir=runs/gpt2_xl \\
        --data.corpus='files:webtext/*.jsonl.gz' --data.tokenizer.path=gpt2_bpe/ --mesh.fsdp=-1 \\
        --mesh.data=1

gpt2_small.py with 48 layers of width 1,600 and 25 heads, and the rate that GPT-3 XL has
(Brown et al. 2020, table 2.1), since the GPT-2 paper tunes rates without naming them.
Not yet run.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

small = load_beside(__file__, "gpt2_small.py")
run = replace(
    small,
    model=small.model.clone(depth=48, width=1600, heads=25, remat="full"),
    optim=replace(small.optim, peak=2e-4),
)
tiny = replace(
    load_beside(__file__, "gpt2_small.py", tiny=True),
    model=run.model.clone(vocab=512, context=32, depth=3, width=40, heads=5),
)
