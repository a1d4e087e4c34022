# SPDX-License-Identifier: Apache-2.0
"""BERT-medium, 42 M parameters: 8 layers of width 512 (Turc et al. 2019).

    python -m lmjax train experiments/bert_medium.py --workdir=runs/bert_medium \\
        --data.corpus='files:books_and_wiki/*.txt' --data.tokenizer.path=vocab.txt

Everything but the size is experiments/bert_base.py. Not yet run.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

base = load_beside(__file__, "bert_base.py")
run = replace(base, model=base.model.clone(depth=8, width=512, heads=8))
tiny = load_beside(__file__, "bert_base.py", tiny=True)
