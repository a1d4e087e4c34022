# SPDX-License-Identifier: Apache-2.0
"""BERT-tiny, 4.4 M parameters: 2 layers of width 128 (Turc et al. 2019).

    python -m lmjax train experiments/bert_tiny.py --workdir=runs/bert_tiny \\
        --data.corpus='files:books_and_wiki/*.txt' --data.tokenizer.path=vocab.txt

Everything but the size is experiments/bert_base.py. Not yet run.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

base = load_beside(__file__, "bert_base.py")
run = replace(base, model=base.model.clone(depth=2, width=128, heads=2))
tiny = load_beside(__file__, "bert_base.py", tiny=True)
