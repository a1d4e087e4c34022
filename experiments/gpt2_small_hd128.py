# SPDX-License-Identifier: Apache-2.0
"""GPT-2 small with 6 heads of 128 where the paper has 12 of 64 (Radford et al. 2019).

    python -m lmjax train experiments/gpt2_small_hd128.py --workdir=runs/gpt2_small_hd128 \\
        --data.corpus='files:webtext/*.jsonl.gz' --data.tokenizer.path=gpt2_bpe/

gpt2_small.py with the head width that a TPU's 128 lanes are made for; heads of 64 fill half of
them. Parameters and FLOPs are the same. Not yet run, and the loss beside heads of 64 is not known.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

small = load_beside(__file__, "gpt2_small.py")
run = replace(small, model=small.model.clone(heads=6))
tiny = replace(
    load_beside(__file__, "gpt2_small.py", tiny=True),
    model=run.model.clone(vocab=512, context=32, depth=2, width=32, heads=1),
)
