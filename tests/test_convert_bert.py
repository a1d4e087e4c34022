# SPDX-License-Identifier: Apache-2.0
"""Published BERT, ERNIE, RoBERTa, ALBERT, ELECTRA: equal numbers in, the same bits out, errors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmjax.convert.encoders import export_encoder, hub_tensors, import_encoder
from lmjax.models.albert import ALBERT
from lmjax.models.bert import BERT
from lmjax.models.electra import ELECTRA
from lmjax.step import init_params

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared/data/fixtures/golden/hf_tiny"
NAMES = sorted(p.stem.removeprefix("encoder_") for p in GOLDEN.glob("encoder_*.npz"))
SINGLE = [name for name in NAMES if not name.startswith("electra")]
# Where the last layer differs by 6e-4 with the other GELU, 2e-5 tells them apart.
CLOSE = 2e-5


def golden(name):
    """What make_encoders.py stored, the config, and the weights that it drew."""
    found = dict(np.load(GOLDEN / f"encoder_{name}.npz"))
    config = json.loads(str(found.pop("config")))
    random = np.random.RandomState(found["seed"])
    tensors = {}
    for key, shape in json.loads(str(found.pop("shapes"))).items():
        values = random.standard_normal(shape) * (0.1 if len(shape) == 1 else 0.2)
        values += "norm" in key.lower() and key.endswith("weight")
        tensors[key] = values.astype(np.float32)
    return found, config, tensors


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(model, params, found, types=True):
    """States (N, B, L, D) and the heads' scores, every token being scored."""
    ids = jnp.asarray(found["in_input_ids"], jnp.int32)
    rows, length = ids.shape
    batch = {
        "tokens_BL": ids,
        "segments_BL": jnp.asarray(found["in_attention_mask"], jnp.int32),
        "masked_BP": jnp.tile(jnp.arange(length), (rows, 1)),
        "firsts_BC": jnp.zeros((rows, 1), jnp.int32),
    }
    if types:
        batch["types_BL"] = jnp.asarray(found["in_token_type_ids"], jnp.int32)

    @jax.jit
    def forward(params, batch):
        outputs = model.apply({"params": params}, batch, states=True)
        heads = dict(outputs.heads)
        if "masked_BPE" in heads:
            heads["masked"] = outputs.readout.logits(heads["masked_BPE"])
        return outputs.states_NBLD, heads

    return forward(params, batch)


def differences(name, model, params, found):
    """max |Δ| of the states and of each head against what the library computed."""
    states, heads = run(model, params, found)
    seen = found["in_attention_mask"].astype(bool)
    pairs = {"states": (states[:, seen], found["out_hidden_states"][:, seen])}
    for key in ("prediction_logits", "logits"):
        if f"out_{key}" in found and "masked" in heads:
            pairs[key] = (heads["masked"][seen], found[f"out_{key}"][seen])
    for key in ("seq_relationship_logits", "sop_logits"):
        if f"out_{key}" in found:
            pairs[key] = (heads["pair_BCT"][:, 0], found[f"out_{key}"])
    if name.endswith("_pair"):
        pairs["logits"] = (heads["pair_BCT"][:, 0], found["out_logits"])
    if name.endswith("_sequence"):
        pairs["logits"] = (heads["sequence_BCT"][:, 0], found["out_logits"])
    if name.endswith("_token"):
        pairs["logits"] = (heads["token_BLT"][seen], found["out_logits"][seen])
    if "out_pooler_output" in found:
        pairs["pooled"] = (heads["pooled_BCD"][:, 0], found["out_pooler_output"])
    if name.startswith("electra"):
        pairs["logits"] = (heads["replaced_BL"][seen], found["out_logits"][seen])
    return {key: float(np.abs(ours - theirs).max()) for key, (ours, theirs) in pairs.items()}


def assert_equal_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "electra_generator"])
def test_states_and_heads_equal_those_of_transformers(name, tmp_path):
    found, config, tensors = golden(name)
    model, params, info = import_encoder(write(tmp_path / "hub", config, tensors))
    far = differences(name, model, params, found)
    assert len(far) >= 2 and max(far.values()) < CLOSE, far
    assert info.model_type == config["model_type"]
    assert model.dropout == config["hidden_dropout_prob"]
    table = params["embeddings"]["embedding"]
    assert len(table) % 128 == 0 and not table[model.vocab :].any()
    if model.activation != "relu":
        other = {"gelu_erf": "gelu_tanh", "gelu_tanh": "gelu_erf"}[model.activation]
        mixed = differences(name, model.clone(activation=other), params, found)
        assert min(mixed["states"], max(mixed.values())) > 5 * CLOSE, "the other GELU is seen"


def electra_folders(folder):
    """A discriminator and a generator over the generator's embeddings."""
    found, small_config, small = golden("electra_generator")
    _, config, tensors = golden("electra_discriminator")
    tensors |= {k: x for k, x in small.items() if k.startswith("electra.embeddings.")}
    write(folder / "generator", small_config, small)
    write(folder / "discriminator", config, tensors)
    return found, config, tensors, small_config, small


def test_electra_is_read_from_its_two_folders(tmp_path):
    found, *_ = electra_folders(tmp_path)
    model, params, info = import_encoder(tmp_path)
    assert isinstance(model, ELECTRA) and info.notes == ()
    sizes = (model.generator_width, model.generator_heads, model.generator_depth)
    assert sizes == (16, 2, 2) and model.embedding_width == 8
    _, heads = run(model, params, found)
    seen = found["in_attention_mask"].astype(bool)
    far = np.abs(heads["masked"][seen] - found["out_logits"][seen]).max()
    assert far < CLOSE, far


def test_a_discriminator_alone_gets_a_new_generator(tmp_path):
    found, config, tensors = golden("electra_discriminator")
    folder = write(tmp_path / "hub", config, tensors)
    model, params, info = import_encoder(folder)
    assert "no generator" in info.notes[0]
    assert model.generator_width == 12 and model.generator_heads == 1
    again = import_encoder(folder)[1]
    assert_equal_trees(again, params)
    like = model.clone(generator_width=16, generator_heads=4, generator_depth=1)
    model, params, _ = import_encoder(folder, like)
    assert (model.generator_width, model.generator_heads, model.generator_depth) == (16, 4, 1)
    assert max(differences("electra", model, params, found).values()) < CLOSE


@pytest.mark.parametrize(
    "part", ["attention.self.query", "attention.output.dense", "cls.predictions.transform.dense"]
)
def test_a_kernel_read_the_other_way_round_is_seen(part, tmp_path):
    found, config, tensors = golden("bert_pretraining")
    names = [name for name in tensors if name.endswith(f"{part}.weight")]
    assert names
    for name in names:
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    model, params, _ = import_encoder(write(tmp_path / "hub", config, tensors))
    assert max(differences("bert", model, params, found).values()) > 1e-2


def hub_forms(tensors):
    """The forms in which the hub has the same weights."""
    words = tensors["bert.embeddings.word_embeddings.weight"]
    old = {}
    for name, x in tensors.items():
        if "LayerNorm" in name:
            name = name.replace("weight", "gamma").replace("bias", "beta")
        old[name] = x
    return {
        "gamma and beta": old,
        "copies": tensors
        | {
            "cls.predictions.decoder.weight": words.copy(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy(),
        },
        "buffers": tensors | {"bert.embeddings.position_ids": np.arange(16)[None]},
        "half": {name: x.astype(np.float16).astype(np.float32) for name, x in tensors.items()},
    }


@pytest.mark.parametrize("form", ["gamma and beta", "copies", "buffers"])
def test_forms_of_the_hub_give_the_same_parameters(form, tmp_path):
    _, config, tensors = golden("bert_pretraining")
    plain = import_encoder(write(tmp_path / "plain", config, tensors))
    other = import_encoder(write(tmp_path / "other", config, hub_forms(tensors)[form]))
    assert other[0] == plain[0]
    assert_equal_trees(other[1], plain[1])


def test_names_without_the_family_are_read(tmp_path):
    _, config, tensors = golden("bert_bare")
    assert "pooler.dense.weight" in tensors
    plain = import_encoder(write(tmp_path / "plain", config, tensors))
    full = {f"bert.{name}": x for name, x in tensors.items()}
    assert_equal_trees(import_encoder(write(tmp_path / "full", config, full))[1], plain[1])


def test_heads_are_those_whose_tensors_are_there(tmp_path):
    heads = {}
    for name in SINGLE:
        model, _, _ = import_encoder(write(tmp_path / name, *golden(name)[1:]))
        heads[name] = (
            model.masked, model.pooler, model.pair, model.sequence_classes, model.token_classes
        )  # fmt: skip
    assert heads == {
        "albert_pretraining": (True, True, True, 0, 0),
        "albert_sequence": (False, True, False, 3, 0),
        "albert_token": (False, False, False, 0, 2),
        "bert_bare": (False, True, False, 0, 0),
        "bert_masked_tanh": (True, False, False, 0, 0),
        "bert_pair": (False, True, True, 0, 0),
        "bert_pretraining": (True, True, True, 0, 0),
        "bert_sequence": (False, True, False, 4, 0),
        "bert_token": (False, False, False, 0, 5),
        "ernie_pretraining": (True, True, True, 0, 0),
        "roberta_masked": (True, False, False, 0, 0),
        "roberta_sequence": (False, True, False, 3, 0),
        "roberta_token": (False, False, False, 0, 5),
    }


def test_classes_of_an_old_folder_with_an_unused_pooler_are_of_tokens(tmp_path):
    _, config, tensors = golden("bert_token")
    tensors["bert.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    tensors["bert.pooler.dense.bias"] = np.zeros(24, np.float32)
    model, _, _ = import_encoder(write(tmp_path / "named", config, tensors))
    assert (model.sequence_classes, model.token_classes) == (0, 5)
    model, _, _ = import_encoder(write(tmp_path / "not", config | {"architectures": None}, tensors))
    assert (model.sequence_classes, model.token_classes) == (5, 0)


def test_robertas_unused_pooler_gives_way_to_its_classifier(tmp_path):
    _, config, tensors = golden("roberta_sequence")
    plain = import_encoder(write(tmp_path / "plain", config, tensors))[1]
    tensors["roberta.pooler.dense.weight"] = np.ones((24, 24), np.float32)
    tensors["roberta.pooler.dense.bias"] = np.ones(24, np.float32)
    _, params, info = import_encoder(write(tmp_path / "hub", config, tensors))
    assert "pooler is not read" in info.notes[0]
    assert_equal_trees(params, plain)


@pytest.mark.parametrize("name", SINGLE)
def test_round_trip_is_bit_equal(name, tmp_path):
    _, config, tensors = golden(name)
    model, params, info = import_encoder(write(tmp_path / "hub", config, tensors))
    out = tmp_path / "deep" / "out"
    controls = {"cls": 3, "sep": 4, "pad": config["pad_token_id"], "mask": 6}
    export_encoder(out, model, params, {"vocab.txt": b"[PAD]\n"}, controls)
    written = load_file(out / "model.safetensors")
    prefix = {"ernie": "bert"}.get(info.model_type, info.model_type)
    expected = {name.replace("ernie.", "bert."): x for name, x in tensors.items()}
    if name == "bert_bare":
        expected = {f"bert.{name}": x for name, x in tensors.items()}
    assert sorted(written) == sorted(expected)
    for key in expected:
        np.testing.assert_array_equal(written[key], expected[key])
    again, read, _ = import_encoder(out)
    assert again == model
    assert_equal_trees(read, params)
    said = json.loads((out / "config.json").read_text())
    assert said["model_type"] == prefix and said["pad_token_id"] == config["pad_token_id"]
    kind = config["architectures"][0].replace("Ernie", "Bert")
    assert said["architectures"] == [kind]
    for key in ("vocab_size", "hidden_act", "layer_norm_eps", "max_position_embeddings"):
        assert said[key] == config[key]
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1


def test_electra_is_exported_as_its_two_folders(tmp_path):
    *_, tensors, _, small = electra_folders(tmp_path / "in")
    model, params, _ = import_encoder(tmp_path / "in")
    export_encoder(tmp_path / "out", model, params, {"vocab.txt": b"x"})
    for part, wanted in (("discriminator", tensors), ("generator", small)):
        written = load_file(tmp_path / "out" / part / "model.safetensors")
        assert sorted(written) == sorted(wanted)
        for key in wanted:
            np.testing.assert_array_equal(written[key], wanted[key])
        assert (tmp_path / "out" / part / "vocab.txt").read_bytes() == b"x"
    again, read, _ = import_encoder(tmp_path / "out")
    assert again == model
    assert_equal_trees(read, params)


def small(**changes):
    fields = {"vocab": 30, "context": 8, "depth": 1, "width": 8, "heads": 2}
    model = BERT(**fields | {"activation": "gelu_erf", "epsilon": 1e-12} | changes)
    return model, jax.jit(lambda: init_params(model, 0))()


def test_a_model_without_types_is_exported_with_a_row_of_zeros(tmp_path):
    model, params = small(types=0, position_offset=2, pooler=False, pair=False)
    export_encoder(tmp_path / "out", model, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not written["roberta.embeddings.token_type_embeddings.weight"].any()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["pad_token_id"], config["max_position_embeddings"]) == (1, 10)


def test_what_only_training_chooses_is_no_matter_to_an_export(tmp_path):
    model, params = small()
    trained = model.clone(kernel="cudnn", dtype="bfloat16", unroll=1, remat="full")
    export_encoder(tmp_path / "out", trained, params)
    assert_equal_trees(import_encoder(tmp_path / "out")[1], jax.device_get(params))


@pytest.mark.parametrize("name", ["cls.seq_relationship.weight", "cls.predictions.bias"])
def test_a_file_that_lost_a_bit_is_not_exported(name, tmp_path, monkeypatch):
    model, params = small()

    def damaged(tensors, path, metadata):
        bent = tensors[name].copy()
        bent[1] += 1e-3
        save_file(tensors | {name: bent}, path, metadata)

    monkeypatch.setattr("lmjax.convert.hub.save_file", damaged)
    with pytest.raises(ValueError, match="do not give the model's (pair_BCT|logits)"):
        export_encoder(tmp_path / "out", model, params)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
@pytest.mark.parametrize(
    "name", ["bert_pretraining_gelu_erf", "bert_pretraining_gelu_tanh", "bert_seqcls3"]
)
def test_the_shared_models_equal_transformers_in_everything(name):
    found = dict(np.load(SHARED / name / "io.npz"))
    model, params, _ = import_encoder(SHARED / name)
    assert isinstance(model, BERT)
    batch = {
        "tokens_BL": jnp.asarray(found["in_input_ids"], jnp.int32),
        "segments_BL": jnp.asarray(found["in_attention_mask"], jnp.int32),
        "types_BL": jnp.asarray(found["in_token_type_ids"], jnp.int32),
        "masked_BP": jnp.tile(jnp.arange(14), (3, 1)),
        "firsts_BC": jnp.zeros((3, 1), jnp.int32),
    }

    def forward(model, params):
        outputs = model.apply({"params": params}, batch, states=True)
        log_p = jax.nn.log_softmax
        if model.sequence_classes:
            logits = {"logits": outputs.heads["sequence_BCT"][:, 0]}
            loss = -log_p(logits["logits"])[jnp.arange(3), found["in_labels"]].mean()
        else:
            scores = outputs.readout.logits(outputs.heads["masked_BPE"])
            pair = outputs.heads["pair_BCT"][:, 0]
            logits = {"prediction_logits": scores, "seq_relationship_logits": pair}
            used = found["in_labels"] >= 0
            labels = np.where(used, found["in_labels"], 0)
            nll = -jnp.take_along_axis(log_p(scores), labels[..., None], -1)[..., 0]
            next_nll = -log_p(pair)[jnp.arange(3), found["in_next_sentence_label"]].mean()
            loss = (nll * used).sum() / used.sum() + next_nll
        return loss, (outputs.states_NBLD, logits)

    value = jax.jit(jax.value_and_grad(forward, argnums=1, has_aux=True), static_argnums=0)
    (loss, (states, logits)), gradient = value(model, params)
    seen = found["in_attention_mask"].astype(bool)
    far = {"loss": abs(float(loss) - float(found["out_loss"]))}
    for i, state in enumerate(states):
        far[f"state {i}"] = np.abs(state - found[f"out_hidden_states_{i}"])[seen].max()
    for key, ours in logits.items():
        off = np.abs(ours - found[f"out_{key}"])
        far[key] = (off[seen] if off.shape[:2] == seen.shape else off).max()
    norms = json.loads((SHARED / name / "grad_norms.json").read_text())
    for key, x in hub_tensors(model, gradient).items():
        if key in norms:
            far[f"gradient of {key}"] = abs(np.linalg.norm(x) - norms.pop(key))
    assert max(far.values()) < CLOSE, far
    assert not norms

    other = {"gelu_erf": "gelu_tanh", "gelu_tanh": "gelu_erf"}[model.activation]
    (_, (mixed, _)), _ = value(model.clone(activation=other), params)
    assert np.abs(mixed[-1] - found["out_hidden_states_2"])[seen].max() > 1e-4


def test_albert_is_one_block(tmp_path):
    _, config, tensors = golden("albert_pretraining")
    model, params, _ = import_encoder(write(tmp_path / "hub", config, tensors))
    assert isinstance(model, ALBERT) and model.depth == 3 and "block" in params
