# SPDX-License-Identifier: Apache-2.0
"""GPT-1 and GPT-2 in the hub's format: equal numbers in, the same bits back out, errors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmjax import losses, recipe
from lmjax.convert.exchange import import_folder
from lmjax.convert.gpt import export_gpt2, hub_shapes, hub_tensors, import_gpt2
from lmjax.generate import Sampling, beam_search, stream
from lmjax.models.gpt import GPT
from lmjax.sample import sample
from lmjax.tokenizer import GPT1BPE, ByteBPE, load_tokenizer

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared/data/fixtures/golden/hf_tiny/gpt2_lm"
NAMES = ("gpt2_wide", "gpt2_padded", "gpt1")


def golden(name):
    """What make_huggingface.py stored, its config, and the weights that it drew."""
    stored = dict(np.load(GOLDEN / f"huggingface_{name}.npz"))
    config = json.loads(str(stored.pop("config")))
    width, vocab, context = config["n_embd"], config["vocab_size"], config["n_positions"]
    tables = ("tokens_embed", "positions_embed") if name == "gpt1" else ("wte", "wpe")
    shapes = {f"{tables[0]}.weight": (vocab, width), f"{tables[1]}.weight": (context, width)}
    for i in range(config["n_layer"]):
        dense = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4)}
        for part, (inner, outer) in (dense | {"mlp.c_proj": (4, 1)}).items():
            shapes[f"h.{i}.{part}.weight"] = (inner * width, outer * width)
            shapes[f"h.{i}.{part}.bias"] = (outer * width,)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    if name != "gpt1":
        shapes |= {f"ln_f.{part}": (width,) for part in ("weight", "bias")}
    random = np.random.RandomState(stored["seed"])
    tensors = {}
    for key in sorted(shapes):
        values = random.standard_normal(shapes[key]) * (0.1 if len(shapes[key]) == 1 else 0.2)
        tensors[key] = (values + ("ln_" in key and key.endswith("weight"))).astype(np.float32)
    return stored, config, tensors


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(model, params, ids):
    """(states, logits over tokens) of a model."""

    @jax.jit
    def forward(params, ids):
        outputs = model.apply({"params": params}, {"tokens_BL": ids}, states=True)
        states = outputs.states_NBLD.at[-1].set(outputs.hidden_BLD)
        return states, outputs.readout.logits(outputs.hidden_BLD)[..., : model.vocab]

    return forward(params, jnp.asarray(ids, jnp.int32))


def assert_equal_trees(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_states_and_logits_equal_those_of_transformers(name, tmp_path):
    stored, config, tensors = golden(name)
    model, params, info = import_gpt2(write(tmp_path / "hub", config, tensors))
    states, logits = run(model, params, stored["ids"])
    np.testing.assert_allclose(states, stored["states"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=2e-5)
    assert info.model_type == config["model_type"] and info.notes == ()
    assert model.dropout == config["resid_pdrop"]
    assert model.attention_dropout == config["attn_pdrop"]
    table = params["embedding"]
    assert len(table) % 128 == 0 and not table[model.rows :].any()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_and_beams_equal_those_of_transformers(name, tmp_path):
    stored, config, tensors = golden(name)
    model, params, _ = import_gpt2(write(tmp_path / "hub", config, tensors))
    prompt = stored["ids"][0, :6]
    new = stream(model, params, prompt, Sampling(greedy=True), 9, model.vocab)
    assert np.concatenate([prompt, *new]).tolist() == stored["greedy"][0].tolist()
    full = early = 0
    for i in range(9):
        row, penalty, eos = stored[f"beam_{i}_settings"]
        sequences, scores = beam_search(
            model, params, stored["ids"][int(row), :6], int(stored["beams"]), 9,
            eos=None if eos < 0 else int(eos), length_penalty=float(penalty),
        )  # fmt: skip
        np.testing.assert_array_equal(sequences, stored[f"beam_{i}_sequences"])
        np.testing.assert_allclose(scores, stored[f"beam_{i}_scores"], rtol=0, atol=2e-5)
        full += not (sequences[:, 6:] == eos).any()
        early += (sequences[:, 6:-1] == eos).any()
    assert full and early, "the fixture has searches that meet their end early and never"


@pytest.mark.parametrize("part", ["attn.c_proj", "attn.c_attn", "mlp.c_proj"])
def test_a_kernel_read_the_other_way_round_is_seen(part, tmp_path):
    stored, config, tensors = golden("gpt2_wide")
    name = f"h.1.{part}.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T).reshape(tensors[name].shape)
    model, params, _ = import_gpt2(write(tmp_path / "hub", config, tensors))
    assert np.abs(run(model, params, stored["ids"])[1] - stored["logits"]).max() > 1e-2


def hub_variants(tensors):
    """The forms in which the hub has the same weights."""
    prefixed = {f"transformer.{name}": x for name, x in tensors.items()}
    buffers = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 32, 32), np.uint8)),
        "h.2.attn.masked_bias": np.full((), -1e4, np.float32),
    }
    head = {"lm_head.weight": tensors["wte.weight"].copy()}
    return {"prefix": prefixed, "buffers": tensors | buffers, "tied head": prefixed | head}


@pytest.mark.parametrize("form", ["prefix", "buffers", "tied head"])
def test_forms_of_the_hub_give_the_same_parameters(form, tmp_path):
    _, config, tensors = golden("gpt2_wide")
    _, plain, _ = import_gpt2(write(tmp_path / "plain", config, tensors))
    other = write(tmp_path / "other", config, hub_variants(tensors)[form])
    assert_equal_trees(import_gpt2(other)[1], plain)


def test_weights_in_several_files_are_read(tmp_path):
    _, config, tensors = golden("gpt2_wide")
    _, plain, _ = import_gpt2(write(tmp_path / "plain", config, tensors))
    folder = write(tmp_path / "split", config, {})
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: x for n, x in tensors.items() if files[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_equal_trees(import_gpt2(folder)[1], plain)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors cannot be read"):
        import_gpt2(folder)
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="elsewhere"):
        import_gpt2(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match="files of this folder"):
        import_gpt2(folder)
    index.write_text('{"weight_map": {"a": 1, "b": ["x"]}}')
    with pytest.raises(ValueError, match="split/1 cannot be read"):
        import_gpt2(folder)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_read_as_float32(dtype, tmp_path):
    _, config, tensors = golden("gpt2_wide")
    half = {name: x.astype(dtype) for name, x in tensors.items()}
    model, params, _ = import_gpt2(write(tmp_path / "hub", config, half))
    again = hub_tensors(model, params)
    for name in tensors:
        assert again[name].dtype == np.float32
        np.testing.assert_array_equal(again[name], half[name].astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(name, tmp_path):
    _, config, tensors = golden(name)
    model, params, _ = import_gpt2(write(tmp_path / "hub", config, tensors))
    export_gpt2(tmp_path / "deep" / "out", model, params, {"tokenizer.json": b"{}"}, eot=7)
    written = load_file(tmp_path / "deep" / "out" / "model.safetensors")
    assert sorted(written) == sorted(tensors)
    for key in tensors:
        np.testing.assert_array_equal(written[key], tensors[key])
    again, read, info = import_gpt2(tmp_path / "deep" / "out")
    assert again == model and info.eos == 7
    assert_equal_trees(read, params)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == names
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    modes = {p.stat().st_mode for p in (tmp_path / "deep" / "out").iterdir()}
    assert len(modes) == 1, "the weights are as readable as the rest"


def test_what_only_training_chooses_is_no_matter_to_an_export(tmp_path):
    model, params = small()
    trained = model.clone(cross_documents=False, kernel="cudnn", dtype="bfloat16", unroll=1)
    export_gpt2(tmp_path / "out", trained, params)
    assert_equal_trees(import_gpt2(tmp_path / "out")[1], jax.device_get(params))


def test_exported_config_describes_the_model(tmp_path):
    _, config, tensors = golden("gpt2_padded")
    model, params, _ = import_gpt2(write(tmp_path / "hub", config, tensors))
    export_gpt2(tmp_path / "out", model, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": None, "eos_token_id": None}
    assert written == {key: config[key] for key in written}
    assert {"model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head"} <= set(
        written
    )


def small():
    model = GPT(vocab=30, context=8, depth=1, width=8, heads=2)
    batch = {"tokens_BL": jnp.zeros((1, 2), jnp.int32)}
    return model, jax.jit(model.init)(jax.random.key(0), batch)["params"]


def test_a_file_that_lost_a_bit_is_not_exported(tmp_path, monkeypatch):
    model, params = small()

    def damaged(tensors, path, metadata):
        bent = tensors["h.0.mlp.c_fc.weight"].copy()
        bent[3, 3] += 1e-3
        save_file(tensors | {"h.0.mlp.c_fc.weight": bent}, path, metadata)

    monkeypatch.setattr("lmjax.convert.hub.save_file", damaged)
    with pytest.raises(ValueError, match="do not give the model's logits"):
        export_gpt2(tmp_path / "out", model, params)
    assert not list(tmp_path.iterdir())


def test_export_refuses_what_it_cannot_write(tmp_path):
    model, params = small()
    with pytest.raises(ValueError, match="not empty"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("mine")
        export_gpt2(tmp_path / "full", model, params)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="norm='post'"):
        export_gpt2(tmp_path / "out", model.clone(norm="post"), params)
    with pytest.raises(ValueError, match="not the model's: .*blocks/mlp/up/kernel"):
        export_gpt2(tmp_path / "out", model.clone(width=16), params)
    with pytest.raises(ValueError, match="config.json"):
        export_gpt2(tmp_path / "out", model, params, {"config.json": b"{}"})
    with pytest.raises(ValueError, match="eot=30: allowed are 0 to 29"):
        export_gpt2(tmp_path / "out", model, params, eot=30)
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    export_gpt2(tmp_path / "empty", model, params, tokenizer_files=tmp_path / "full")
    assert (tmp_path / "empty" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("gpt2_wide", "n_inner", 100, "n_inner=100; allowed: null or 192"),
        ("gpt2_wide", "activation_function", "gelu", '"gelu_new" or "gelu_pytorch_tanh"'),
        ("gpt2_wide", "scale_attn_weights", False, "allowed: true"),
        ("gpt2_wide", "scale_attn_by_inverse_layer_idx", True, "allowed: false"),
        ("gpt2_wide", "reorder_and_upcast_attn", True, "allowed: false"),
        ("gpt2_wide", "add_cross_attention", True, "allowed: false"),
        ("gpt2_wide", "layer_norm_epsilon", 1e-6, "allowed: 1e-05"),
        ("gpt2_wide", "tie_word_embeddings", False, "allowed: true"),
        ("gpt2_wide", "n_ctx", 16, "n_ctx=16; allowed: 32"),
        ("gpt2_wide", "n_head", 5, "n_embd=48 is not a multiple of n_head=5"),
        ("gpt2_wide", "n_layer", "3", "n_layer='3'; a whole number"),
        ("gpt2_wide", "resid_pdrop", 1.5, "from 0 to below 1"),
        ("gpt2_wide", "model_type", "llama", "allowed are gpt2, openai-gpt"),
        ("gpt1", "afn", "relu", 'allowed: "gelu"'),
    ],
)
def test_settings_that_cannot_be_expressed_are_named(name, key, value, said, tmp_path):
    _, config, tensors = golden(name)
    folder = write(tmp_path / "hub", config | {key: value}, tensors)
    with pytest.raises(ValueError) as caught:
        import_gpt2(folder)
    assert key in str(caught.value) and said in str(caught.value)


def test_the_other_tanh_gelu_and_unequal_dropout_are_read(tmp_path):
    _, config, tensors = golden("gpt2_wide")
    config |= {"activation_function": "gelu_pytorch_tanh", "n_inner": 192, "embd_pdrop": 0.3}
    model, _, info = import_gpt2(write(tmp_path / "hub", config, tensors))
    assert model.dropout == 0.0
    assert info.notes == ("embd_pdrop=0.3 is read as resid_pdrop=0.0",)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    _, config, tensors = golden("gpt2_wide")
    tensors["h.3.ln_1.bias"] = tensors.pop("h.1.ln_1.bias")
    tensors["wpe.weight"] = tensors["wpe.weight"][:20].copy()
    with pytest.raises(ValueError) as caught:
        import_gpt2(write(tmp_path / "hub", config, tensors))
    for part in ("missing: h.1.ln_1.bias;", "extra: h.3.ln_1.bias;"):
        assert part in str(caught.value)
    assert "of another shape: wpe.weight [20, 48], not [32, 48]" in str(caught.value)


def test_tensors_of_another_kind_are_refused(tmp_path):
    _, config, tensors = golden("gpt2_wide")
    untied = tensors | {"lm_head.weight": tensors["wte.weight"] + 1}
    with pytest.raises(ValueError, match="lm_head.weight differs from wte.weight"):
        import_gpt2(write(tmp_path / "hub", config, untied))
    twice = tensors | {"transformer.ln_f.bias": tensors["ln_f.bias"] + 1}
    with pytest.raises(ValueError, match="ln_f.bias is stored twice"):
        import_gpt2(write(tmp_path / "hub", config, twice))
    integers = tensors | {"wte.weight": tensors["wte.weight"].astype(np.int8)}
    with pytest.raises(ValueError, match="wte.weight is I8; allowed: F32"):
        import_gpt2(write(tmp_path / "hub", config, integers))


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        import_gpt2(tmp_path)
    _, config, tensors = golden("gpt2_wide")
    folder = write(tmp_path / "hub", config, tensors)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        import_gpt2(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="only safetensors are read"):
        import_gpt2(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        import_gpt2(folder)


def test_a_gpt1_run_is_exported_and_imported_with_its_tokeniser(tmp_path):
    GPT1BPE(vocab=60).build(iter([b"the cat sat on the mat, the hat\n" * 9]), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    model = GPT(tokenizer.vocab, 8, 1, 8, 2, norm="post", one_table=True)
    params = jax.jit(model.init)(jax.random.key(0), {"tokens_BL": jnp.zeros((1, 2), jnp.int32)})
    files = {"tokenizer.json": (tmp_path / "t" / "tokenizer.json").read_bytes()}
    export_gpt2(tmp_path / "hub", model, params["params"], files)
    run = recipe.load(str(EXPERIMENTS / "gpt1.py"), tiny=True)
    import_folder(run, tmp_path / "hub", tmp_path / "run", {})
    assert load_tokenizer(tmp_path / "run" / "tokenizer").fingerprint == tokenizer.fingerprint


def test_a_tokeniser_with_more_ids_than_the_model_is_refused(tmp_path):
    model, params = small()
    ByteBPE(vocab=257).build(iter([b"a"]), tmp_path / "t")
    files = {"tokenizer.json": (tmp_path / "t" / "tokenizer.json").read_bytes()}
    export_gpt2(tmp_path / "hub", model, params, files)
    run = recipe.load(str(EXPERIMENTS / "gpt2_small.py"), tiny=True)
    with pytest.raises(ValueError, match="the tokeniser has 257 ids, the model 30"):
        import_folder(run, tmp_path / "hub", tmp_path / "run", {})


def test_beams_below_one_are_refused(tmp_path):
    run = recipe.load(str(EXPERIMENTS / "gpt2_small.py"), tiny=True)
    with pytest.raises(ValueError, match="beams=0: allowed are 1"):
        sample(run, tmp_path, "a", Sampling(), beams=0)


def test_names_cover_the_published_sizes():
    shapes = hub_shapes(GPT(vocab=50_257, context=1024, depth=12, width=768, heads=12))
    assert len(shapes) == 148
    assert sum(np.prod(s, dtype=int) for s in shapes.values()) == 124_439_808
    first = GPT(40_478, 512, 12, 768, 12, norm="post", one_table=True)
    assert sum(np.prod(s, dtype=int) for s in hub_shapes(first).values()) == 116_534_784


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_the_shared_model_equals_transformers_in_everything():
    io = np.load(SHARED / "io.npz")
    model, params, info = import_gpt2(SHARED)
    states, logits = run(model, params, io["in_input_ids"])
    np.testing.assert_allclose(logits, io["out_logits"], rtol=0, atol=2e-5)
    for i in range(3):
        np.testing.assert_allclose(states[i], io[f"out_hidden_states_{i}"], rtol=0, atol=2e-5)

    # The library shifts the labels itself: the place before a label predicts it.
    targets_BL = jnp.asarray(np.pad(io["in_labels"][:, 1:], ((0, 0), (0, 1)))).astype(jnp.int32)
    weights_BL = jnp.ones(targets_BL.shape).at[:, -1].set(0)
    batch = {"tokens_BL": jnp.asarray(io["in_input_ids"], jnp.int32)}
    batch |= {"targets_BL": targets_BL, "weights_BL": weights_BL}

    def loss(params):
        nll, weight = losses.next_token(model.apply({"params": params}, batch), batch)["loss"]
        return nll / weight

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, io["out_loss"], rtol=0, atol=2e-5)
    norms = json.loads((SHARED / "grad_norms.json").read_text())
    found = {k: np.linalg.norm(x) for k, x in hub_tensors(model, gradient).items()}
    for name, norm in norms.items():
        assert abs(found.pop(name.removeprefix("transformer.")) - norm) < 2e-5, name
    assert not found

    prompt = io["gen_prompt"][0]
    greedy = stream(model, params, prompt, Sampling(greedy=True), 12, model.vocab, info.eos)
    assert np.concatenate([prompt, *greedy]).tolist() == io["gen_greedy"][0].tolist()
    sequences, scores = beam_search(model, params, prompt, 4, 12, info.eos)
    np.testing.assert_array_equal(sequences, io["gen_beam4"])
    np.testing.assert_allclose(scores, io["gen_beam4_scores"], rtol=0, atol=2e-5)
