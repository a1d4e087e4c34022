# SPDX-License-Identifier: Apache-2.0
"""Published encoders that cannot be read, and models that cannot be published: one error each."""

import jax
import numpy as np
import pytest
from test_convert_bert import electra_folders, golden, small, write

from lmjax.convert.encoders import export_encoder, import_encoder
from lmjax.models.electra import ELECTRA
from lmjax.step import init_params


def test_electra_parts_that_do_not_belong_together_are_refused(tmp_path):
    _, config, tensors, small_config, small = electra_folders(tmp_path)
    words = "electra.embeddings.word_embeddings.weight"
    write(tmp_path / "generator", small_config, small | {words: small[words] + 1})
    with pytest.raises(ValueError, match="word_embeddings.weight differs from the discriminator"):
        import_encoder(tmp_path)
    write(tmp_path / "generator", small_config | {"layer_norm_eps": 1e-5}, small)
    with pytest.raises(ValueError, match="epsilon=1e-05, the discriminator's is 1e-12"):
        import_encoder(tmp_path)
    write(tmp_path / "generator", small_config, small)
    with pytest.raises(ValueError, match="holds no discriminator"):
        import_encoder(tmp_path / "generator")
    write(tmp_path / "generator", config, tensors)
    with pytest.raises(ValueError, match="holds no generator"):
        import_encoder(tmp_path)
    write(tmp_path / "generator", small_config, small)
    write(tmp_path / "discriminator", config, {k: x for k, x in tensors.items() if k != words})
    with pytest.raises(ValueError, match="missing: embeddings.word_embeddings.weight"):
        import_encoder(tmp_path)
    for part, content in (
        ("generator", (small_config, small)),
        ("discriminator", (config, tensors)),
    ):
        write(tmp_path / part, content[0] | {"hidden_act": "gelu_new"}, content[1])
    with pytest.raises(ValueError, match="hidden_act is not gelu"):
        import_encoder(tmp_path)


def test_export_refuses_what_it_cannot_write(tmp_path):
    model, params = small(sequence_classes=2, token_classes=3)
    with pytest.raises(ValueError, match="one name for both heads"):
        export_encoder(tmp_path / "out", model, params)
    model, params = small(position_offset=2)
    with pytest.raises(ValueError, match="RoBERTa has no pair head"):
        export_encoder(tmp_path / "out", model, params)
    model, params = small(position_offset=2, pair=False)
    with pytest.raises(ValueError, match="padding id, which is 0 here; allowed is 1"):
        export_encoder(tmp_path / "out", model, params, controls={"pad": 0})
    with pytest.raises(ValueError, match="not the model's: .*blocks/mlp/up/kernel"):
        export_encoder(tmp_path / "out", model.clone(width=16), params)
    electra = ELECTRA(30, 8, 1, 8, 2, 4, 4, 1, 1, activation="relu")
    params = jax.jit(lambda: init_params(electra, 0))()
    with pytest.raises(ValueError, match="Electra's masked-token head has gelu_erf"):
        export_encoder(tmp_path / "out", electra, params)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("bert_pair", "hidden_act", "silu", "hidden_act='silu'; allowed are gelu, gelu_new"),
        ("bert_pair", "position_embedding_type", "relative_key", 'allowed: "absolute"'),
        ("bert_pair", "is_decoder", True, "allowed: false"),
        ("bert_pair", "tie_word_embeddings", False, "allowed: true"),
        ("bert_pair", "num_attention_heads", 5, "hidden_size=24 is not a multiple of"),
        ("bert_pair", "hidden_size", None, "hidden_size=None; a whole number"),
        ("bert_pair", "hidden_dropout_prob", 1, "from 0 to below 1"),
        ("bert_pair", "layer_norm_eps", "small", "layer_norm_eps='small'"),
        ("bert_pair", "model_type", "xlnet", "allowed are bert, ernie, roberta, albert, electra"),
        ("ernie_pretraining", "use_task_id", True, "use_task_id=true; allowed: false"),
        ("roberta_masked", "hidden_act", "gelu_new", "masked-token head has in any case"),
        ("roberta_masked", "pad_token_id", None, "pad_token_id=None"),
        ("roberta_masked", "max_position_embeddings", 2, "max_position_embeddings=2"),
        ("albert_token", "num_hidden_groups", 2, "num_hidden_groups=2; allowed: 1"),
        ("albert_token", "inner_group_num", 2, "inner_group_num=2; allowed: 1"),
        ("electra_wide", "embedding_size", 0, "embedding_size=0; a whole number"),
    ],
)
def test_settings_that_cannot_be_expressed_are_named(name, key, value, said, tmp_path):
    _, config, tensors = golden(name)
    folder = write(tmp_path / "hub", config | {key: value}, tensors)
    with pytest.raises(ValueError) as caught:
        import_encoder(folder)
    assert key in str(caught.value) and said in str(caught.value)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    _, config, tensors = golden("bert_pretraining")
    moved = "encoder.layer.{}.output.LayerNorm.bias"
    tensors[f"bert.{moved.format(7)}"] = tensors.pop(f"bert.{moved.format(1)}")
    tensors["bert.pooler.dense.weight"] = tensors["bert.pooler.dense.weight"][:20].copy()
    tensors["qa_outputs.weight"] = np.zeros((2, 24), np.float32)
    with pytest.raises(ValueError) as caught:
        import_encoder(write(tmp_path / "hub", config, tensors))
    assert f"missing: {moved.format(1)};" in str(caught.value)
    assert f"extra: {moved.format(7)}, qa_outputs.weight;" in str(caught.value)
    assert "of another shape: pooler.dense.weight [20, 24], not [24, 24]" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "copy", "original"),
    [
        ("bert_pretraining", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("bert_pretraining", "cls.predictions.decoder.weight", "bert.WORDS"),
        ("roberta_masked", "lm_head.decoder.bias", "lm_head.bias"),
        ("roberta_masked", "lm_head.decoder.weight", "roberta.WORDS"),
        ("albert_pretraining", "predictions.decoder.bias", "predictions.bias"),
        ("albert_pretraining", "predictions.decoder.weight", "albert.WORDS"),
    ],
)
def test_an_untied_readout_is_refused(name, copy, original, tmp_path):
    _, config, tensors = golden(name)
    original = original.replace("WORDS", "embeddings.word_embeddings.weight")
    folder = write(tmp_path / "hub", config, tensors | {copy: tensors[original].copy()})
    import_encoder(folder)
    write(folder, config, tensors | {copy: tensors[original] + 1e-6})
    with pytest.raises(ValueError, match=f"{copy} differs from"):
        import_encoder(folder)


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        import_encoder(tmp_path)
    _, config, tensors = golden("bert_sequence")
    folder = write(tmp_path / "hub", config, tensors)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        import_encoder(folder)
    weights.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        import_encoder(folder)
    headless = {k: x for k, x in tensors.items() if "pooler" not in k}
    with pytest.raises(ValueError, match="a head on the pooled state, but no pooler"):
        import_encoder(write(folder, config, headless))
