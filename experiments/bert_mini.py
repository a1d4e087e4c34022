# SPDX-License-Identifier: Apache-2.0
"""BERT-mini, 11 M parameters: 4 layers of width 256 (Turc et al. 2019).

    python -m lmjax train experiments/bert_mini.py --workdir=runs/bert_mini \\
        --data.corpus='files:books_and_wiki/*.txt' --data.tokenizer.path=vocab.txt

Everything but the size is experiments/bert_base.py. Not yet run in full; bert_mini_cpu.py is what a
CPU can do of it.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

base = load_beside(__file__, "bert_base.py")
run = replace(base, model=base.model.clone(depth=4, width=256, heads=4))
tiny = load_beside(__file__, "bert_base.py", tiny=True)
