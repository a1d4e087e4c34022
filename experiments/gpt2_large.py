# SPDX-License-Identifier: Apache-2.0
"""GPT-2 large, 774 M parameters (774,030,080; Radford et al. 2019).

    python -m lmjax train experiments/gpt2_large.py --workdir=runs/gpt2_large \\
        --data.corpus='files:webtext/*.jsonl.gz' --data.tokenizer.path=gpt2_bpe/ --mesh.fsdp=-1 \\
        --mesh.data=1

gpt2_small.py with 36 layers of width 1,280 and 20 heads, and the rate that GPT-3 Large has
(Brown et al. 2020, table 2.1), since the GPT-2 paper tunes rates without naming them.
Not yet run.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

small = load_beside(__file__, "gpt2_small.py")
run = replace(
    small,
    model=small.model.clone(depth=36, width=1280, heads=20, remat="full"),
    optim=replace(small.optim, peak=2.5e-4),
)
tiny = replace(
    load_beside(__file__, "gpt2_small.py", tiny=True),
    model=run.model.clone(vocab=512, context=32, depth=3, width=40, heads=5),
)
