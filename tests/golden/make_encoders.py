# SPDX-License-Identifier: Apache-2.0
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
"""Writes encoder_*.npz: what torch 2.13.0 and transformers 5.23.0 compute with tiny encoders.

    python tests/golden/make_encoders.py

The weights are not stored: `np.random.RandomState(seed)` draws them in the order of their names,
here and in the tests. Needs its own environment with torch and transformers.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

SMALL = {
    "vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 16,
}  # fmt: skip
DEEP = SMALL | {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
ERNIE = {"hidden_act": "relu", "layer_norm_eps": 1e-5}
ROBERTA = {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "max_position_embeddings": 18}
MODELS = {
    "bert_pretraining": ("BertForPreTraining", DEEP),
    "bert_masked_tanh": ("BertForMaskedLM", SMALL | {"hidden_act": "gelu_new"}),
    "bert_pair": ("BertForNextSentencePrediction", SMALL),
    "bert_sequence": ("BertForSequenceClassification", SMALL | {"num_labels": 4}),
    "bert_token": ("BertForTokenClassification", SMALL | {"num_labels": 5}),
    "bert_bare": ("BertModel", SMALL),
    "ernie_pretraining": ("ErnieForPreTraining", SMALL | ERNIE),
    "roberta_masked": ("RobertaForMaskedLM", DEEP | ROBERTA),
    "roberta_sequence": ("RobertaForSequenceClassification", SMALL | ROBERTA | {"num_labels": 3}),
    "roberta_token": ("RobertaForTokenClassification", SMALL | ROBERTA | {"num_labels": 5}),
    "albert_pretraining": ("AlbertForPreTraining", DEEP | {"embedding_size": 10}),
    "albert_sequence": (
        "AlbertForSequenceClassification", SMALL | {"embedding_size": 24, "num_labels": 3}
    ),
    "albert_token": ("AlbertForTokenClassification", SMALL | {"embedding_size": 8}),
    "electra_discriminator": ("ElectraForPreTraining", DEEP | {"embedding_size": 8}),
    "electra_generator": (
        "ElectraForMaskedLM",
        SMALL | {"embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2},
    ),
    "electra_wide": ("ElectraForPreTraining", SMALL | {"embedding_size": 24}),
}  # fmt: skip


def fill(model: torch.nn.Module, seed: int) -> dict[str, list[int]]:
    """Draws the weights: norm scales around 1, matrices 0.2 wide, vectors 0.1; gives shapes."""
    random = np.random.RandomState(seed)
    named = dict(model.named_parameters())
    for name in sorted(named):
        shape = tuple(named[name].shape)
        values = random.standard_normal(shape) * (0.1 if len(shape) == 1 else 0.2)
        values += "norm" in name.lower() and name.endswith("weight")
        named[name].data = torch.tensor(values.astype(np.float32))
    return {name: list(named[name].shape) for name in sorted(named)}


def inputs(config: transformers.PretrainedConfig, seed: int) -> dict[str, torch.Tensor]:
    """Two rows of 12 tokens, the last 4 of the second are padding, and types where there are."""
    random = np.random.RandomState(seed)
    ids = random.randint(5, config.vocab_size, (2, 12))
    ids[1, 8:] = config.pad_token_id
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    types = random.randint(0, config.type_vocab_size, ids.shape)
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: torch.tensor(x) for name, x in arrays.items()}


def main() -> None:
    """Writes one file a model beside this script."""
    for seed, (name, (kind, settings)) in enumerate(MODELS.items(), 20):
        cls = getattr(transformers, kind)
        config = cls.config_class(**settings)
        model = cls(config).eval()
        shapes = fill(model, seed)
        given = inputs(config, seed)
        with torch.no_grad():
            answer = model(**given, output_hidden_states=True)
        arrays = {f"in_{key}": value.numpy().astype(np.int32) for key, value in given.items()}
        for key, value in answer.items():
            value = torch.stack(value) if key == "hidden_states" else value
            arrays[f"out_{key}"] = value.numpy()
        config.architectures = [kind]
        np.savez_compressed(
            Path(__file__).parent / f"encoder_{name}.npz",
            config=np.array(json.dumps(config.to_dict())),
            shapes=np.array(json.dumps(shapes)),
            seed=seed,
            **arrays,  # pyright: ignore[reportArgumentType]
        )


if __name__ == "__main__":
    main()
