# SPDX-License-Identifier: Apache-2.0
"""BERT-large, 336 M parameters (Devlin et al. 2018).

    python -m lmjax train experiments/bert_large.py --workdir=runs/bert_large \\
        --data.corpus='files:books_and_wiki/*.txt' --data.tokenizer.path=vocab.txt

Everything but the size is experiments/bert_base.py. Not yet run.
"""

from lmjax.recipe import load_beside
from lmjax.run import replace

base = load_beside(__file__, "bert_base.py")
run = replace(base, model=base.model.clone(depth=24, width=1024, heads=16))
tiny = load_beside(__file__, "bert_base.py", tiny=True)
