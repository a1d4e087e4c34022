# SPDX-License-Identifier: Apache-2.0
"""Google's BERT checkpoints: names, settings, what is passed over, the original graph's numbers."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tf_checkpoint import write_checkpoint

from lmjax.convert.encoders import export_encoder, hub_tensors, import_encoder
from lmjax.convert.google import hub_name
from lmjax.models.bert import BERT
from lmjax.step import init_params

SHARED = Path(__file__).parents[2] / "shared/data/fixtures/golden/bert_tf_tiny"
CONFIG = {
    "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 12, "type_vocab_size": 2,
    "initializer_range": 0.02,
}  # fmt: skip


def google_tensors(model, params):
    """A model's weights by Google's names and in its layout."""
    found = {}
    for name, x in hub_tensors(model, params).items():
        name = name.replace(".", "/").replace("/layer/", "/layer_")
        if name.startswith("cls/") and "transform" not in name:
            name = name.replace("/weight", "/output_weights").replace("/bias", "/output_bias")
        elif "LayerNorm" in name:
            name = name.replace("/weight", "/gamma").replace("/bias", "/beta")
        elif "_embeddings/" in name:
            name = name.removesuffix("/weight")
        elif name.endswith("/weight"):
            name, x = name.replace("/weight", "/kernel"), x.T
        found[name] = x
    return found


def google_folder(folder, config=None, **changes):
    folder.mkdir(exist_ok=True)
    model = BERT(30, 12, 2, 8, 2, "gelu_tanh", 1e-12, inner=20, **changes)
    params = jax.jit(lambda: init_params(model, 3))()
    tensors = google_tensors(model, params)
    write_checkpoint(folder / "bert_model.ckpt", tensors)
    (folder / "bert_config.json").write_text(json.dumps(CONFIG | (config or {})))
    return model, params, tensors


def assert_equal_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_names_of_google_become_the_hubs():
    pairs = {
        "bert/embeddings/word_embeddings": "embeddings.word_embeddings.weight",
        "bert/embeddings/LayerNorm/gamma": "embeddings.LayerNorm.weight",
        "bert/encoder/layer_11/attention/self/query/kernel":
            "encoder.layer.11.attention.self.query.weight",
        "bert/encoder/layer_0/output/LayerNorm/beta": "encoder.layer.0.output.LayerNorm.bias",
        "bert/pooler/dense/bias": "pooler.dense.bias",
        "cls/predictions/transform/dense/kernel": "cls.predictions.transform.dense.weight",
        "cls/predictions/output_bias": "cls.predictions.bias",
        "cls/seq_relationship/output_weights": "cls.seq_relationship.weight",
        "cls/seq_relationship/output_bias": "cls.seq_relationship.bias",
    }  # fmt: skip
    assert {name: hub_name(name) for name in pairs} == pairs


def test_a_checkpoint_of_google_is_read(tmp_path):
    model, params, tensors = google_folder(tmp_path)
    assert "bert/encoder/layer_1/attention/self/value/kernel" in tensors
    found, read, info = import_encoder(tmp_path)
    assert found == model and "read as gelu_tanh" in info.notes[0]
    assert "--model.activation=gelu_erf" in info.notes[0]
    assert_equal_trees(read, params)
    exact, read, info = import_encoder(
        tmp_path / "bert_model.ckpt", model.clone(activation="gelu_erf")
    )
    assert exact.activation == "gelu_erf" and "--model.activation=gelu_tanh" in info.notes[0]
    assert_equal_trees(read, params)
    export_encoder(tmp_path / "hub", found, read)
    assert_equal_trees(import_encoder(tmp_path / "hub")[1], params)


def test_state_and_heads_of_other_tasks_are_passed_over(tmp_path):
    model, params, tensors = google_folder(tmp_path, {"hidden_act": "relu"}, masked=False)
    state = {f"{name}/adam_{m}": x for name, x in tensors.items() for m in "mv"}
    others = {
        "global_step": np.array(9, np.int64),
        "cls/squad/output_bias": np.zeros(2, np.float32),
    }
    write_checkpoint(tmp_path / "bert_model.ckpt", tensors | state | others)
    found, read, info = import_encoder(tmp_path)
    assert found == model.clone(activation="relu") and not found.masked and found.pair
    assert info.notes == ("not read: cls/squad/output_bias",)
    assert_equal_trees(read, params)


def test_folders_of_google_that_are_not_whole_are_refused(tmp_path):
    _, _, tensors = google_folder(tmp_path)
    write_checkpoint(
        tmp_path / "bert_model.ckpt", tensors | {"bert/pooler/dense/bias": np.zeros(9, "f4")}
    )
    with pytest.raises(ValueError, match=r"of another shape: pooler.dense.bias \[9\], not \[8\]"):
        import_encoder(tmp_path)
    write_checkpoint(
        tmp_path / "bert_model.ckpt", {n: x for n, x in tensors.items() if "key" not in n}
    )
    with pytest.raises(ValueError, match="missing: encoder.layer.0.attention.self.key.weight"):
        import_encoder(tmp_path)
    halves = {n: x.astype(np.float16) for n, x in tensors.items()}
    write_checkpoint(tmp_path / "bert_model.ckpt", halves)
    with pytest.raises(ValueError, match="is not of float32"):
        import_encoder(tmp_path)
    for name in ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"bert_model\.ckpt\.index: No such file"):
        import_encoder(tmp_path)
    for step in (1, 2):
        write_checkpoint(tmp_path / f"model.ckpt-{step}", tensors)
    with pytest.raises(ValueError, match=r"several checkpoints; .*\(model.ckpt-1, model.ckpt-2\)"):
        import_encoder(tmp_path)
    import_encoder(tmp_path / "model.ckpt-2")
    (tmp_path / "bert_config.json").unlink()
    with pytest.raises(ValueError, match="bert_config.json does not exist"):
        import_encoder(tmp_path / "model.ckpt-2")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_the_shared_bert_equals_the_original_graph():
    stored = np.load(SHARED / "io.npz")
    model, params, _ = import_encoder(SHARED)

    @partial(jax.jit, static_argnums=0)
    def forward(model, params, batch):
        outputs = model.apply({"params": params}, batch, states=True)
        scores = outputs.readout.logits(outputs.heads["masked_BPE"])
        return outputs.states_NBLD, outputs.heads, jax.nn.log_softmax(scores)

    def differences(model, batch_number):
        found = {k[3:]: stored[k] for k in stored.files if k.startswith(f"b{batch_number}_")}
        seen = found["in_input_mask"].astype(bool)
        batch = {
            "tokens_BL": found["in_input_ids"],
            "segments_BL": found["in_input_mask"],
            "types_BL": found["in_segment_ids"],
            "masked_BP": found["in_masked_lm_positions"],
            "firsts_BC": np.zeros((len(seen), 1), np.int32),
        }
        states, heads, log_p = forward(model, params, {k: jnp.asarray(x) for k, x in batch.items()})
        nsp = jax.nn.log_softmax(heads["pair_BCT"][:, 0])
        pairs = {
            "embedding": (states[0][seen], found["out_embedding"][seen]),
            "layers": (states[1:][:, seen], found["out_layers"][:, seen]),
            "pooled": (heads["pooled_BCD"][:, 0], found["out_pooled"]),
            "masked": (log_p.reshape(-1, 211), found["out_mlm_log_probs"]),
            "pair": (nsp, found["out_nsp_log_probs"]),
        }
        return {key: float(np.abs(a - b).max()) for key, (a, b) in pairs.items()}

    for number in range(4):
        far = differences(model, number)
        assert max(far.values()) < 1e-5, far
    exact = differences(model.clone(activation="gelu_erf"), 0)
    assert exact["layers"] > 1e-4, "the other GELU is seen"
