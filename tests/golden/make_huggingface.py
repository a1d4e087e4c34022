# SPDX-License-Identifier: Apache-2.0
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""Writes huggingface_*.npz: what torch 2.13.0 and transformers 4.57.6 compute with tiny models.

    python tests/golden/make_huggingface.py

The weights are not stored: `np.random.RandomState(seed)` draws them in the order of their names,
here and in the tests. Needs its own environment with torch and transformers.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

MODELS = {
    "gpt2_wide": (
        11,
        {"model_type": "gpt2", "vocab_size": 100, "n_positions": 32, "n_embd": 48, "n_layer": 3,
         "n_head": 6, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.2},
    ),
    "gpt2_padded": (
        12,
        {"model_type": "gpt2", "vocab_size": 130, "n_positions": 20, "n_embd": 40, "n_layer": 2,
         "n_head": 5, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    ),
    "gpt1": (
        13,
        {"model_type": "openai-gpt", "vocab_size": 90, "n_positions": 24, "n_embd": 32,
         "n_layer": 2, "n_head": 4},
    ),
}  # fmt: skip
NEW = 9
BEAMS = {"gpt2_wide": 4, "gpt2_padded": 5, "gpt1": 2}


def fill(model: torch.nn.Module, seed: int) -> None:
    """Weights from the seed: norm scales around 1, matrices 0.2 wide, vectors 0.1 wide."""
    random = np.random.RandomState(seed)
    named = {n.removeprefix("transformer."): p for n, p in model.named_parameters()}
    for name in sorted(named):
        shape = tuple(named[name].shape)
        values = random.standard_normal(shape) * (0.1 if len(shape) == 1 else 0.2)
        values += name.startswith("ln_f.weight") or ".ln_" in name and name.endswith("weight")
        named[name].data = torch.tensor(values.astype(np.float32))


def beam_cases(model: torch.nn.Module, ids: torch.Tensor, beams: int) -> dict[str, np.ndarray]:
    """Beam searches of each row, without an end, with one that comes early, and with a rare one."""
    found, count = {}, 0
    for row, penalty in ((0, 1.0), (1, 0.6), (0, 2.0)):
        prompt = ids[row : row + 1, :6]
        free = search(model, prompt, beams, penalty, None)
        common = int(free.sequences[0, prompt.shape[1] + 2])
        rare = int(np.setdiff1d(np.arange(80), free.sequences.numpy())[0])
        for eos in (None, common, rare):
            answer = search(model, prompt, beams, penalty, eos)
            found[f"beam_{count}_settings"] = np.array([row, penalty, -1 if eos is None else eos])
            found[f"beam_{count}_sequences"] = answer.sequences.numpy().astype(np.int32)
            found[f"beam_{count}_scores"] = answer.sequences_scores.numpy()
            count += 1
    return found


def search(model, prompt, beams, penalty, eos):
    """The library's beam search, `NEW` tokens at most."""
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = eos
    return model.generate(
        prompt, num_beams=beams, num_return_sequences=beams, do_sample=False,
        early_stopping=False, length_penalty=penalty, max_new_tokens=NEW,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip


def main() -> None:
    """Writes one file a model beside this script."""
    for name, (seed, settings) in MODELS.items():
        config = AutoConfig.for_model(**settings)
        model = AutoModelForCausalLM.from_config(config).eval()
        fill(model, seed)
        ids = torch.tensor(np.random.RandomState(seed + 100).randint(0, 80, (2, 10)))
        with torch.no_grad():
            answer = model(ids, output_hidden_states=True)
            model.generation_config.eos_token_id = None
            greedy = model.generate(ids[:1, :6], do_sample=False, max_new_tokens=NEW)
            arrays = beam_cases(model, ids, BEAMS[name])
        np.savez_compressed(
            Path(__file__).parent / f"huggingface_{name}.npz",
            config=np.array(json.dumps(config.to_dict())),
            seed=seed,
            beams=BEAMS[name],
            ids=ids.numpy().astype(np.int32),
            logits=answer.logits.numpy(),
            states=torch.stack(answer.hidden_states).numpy(),
            greedy=greedy.numpy().astype(np.int32),
            **arrays,  # pyright: ignore[reportArgumentType]
        )


if __name__ == "__main__":
    main()
