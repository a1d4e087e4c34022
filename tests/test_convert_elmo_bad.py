# SPDX-License-Identifier: Apache-2.0
"""Files in bilm-tf's form that cannot or must not be read, models that have no such form."""

import bilm
import h5py
import jax
import numpy as np
import pytest
from test_convert_elmo import assert_equal_trees

from lmjax.convert import hdf5
from lmjax.convert.elmo import export_elmo, import_elmo
from lmjax.models.elmo import ELMo
from lmjax.step import init_params


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("lstm__dim", None, "dim=None; a whole number"),
        ("lstm__dim", True, "dim=True; a whole number"),
        ("lstm__projection_dim", 11, "projection_dim=11 is above dim=10"),
        ("lstm__n_layers", 0, "n_layers=0; a whole number"),
        ("lstm__n_layer", 2, r"unknown option lstm\.n_layer; did you mean n_layers\?"),
        ("lstm__cell_clip", -3, "cell_clip=-3; a number above 0, or null"),
        ("lstm__proj_clip", float("inf"), "proj_clip=inf; a number"),
        ("lstm__proj_clip", "3", "proj_clip='3'; a number"),
        ("lstm__use_skip_connections", 1, "use_skip_connections=1; true or false"),
        ("lstm", [], r"lstm=\[\]; an object with dim, projection_dim"),
        ("char_cnn", None, "char_cnn=None; an object with n_characters"),
        ("char_cnn__n_characters", 300, "n_characters=300; allowed are 261"),
        ("char_cnn__activation", "gelu", 'activation="gelu"; allowed: "relu" or "tanh"'),
        ("char_cnn__n_highway", -1, "n_highway=-1; a whole number or null"),
        ("char_cnn__filters", [], r"filters=\[\]; a list of \[width, number\]"),
        ("char_cnn__filters", [[1, 4], [60, 5]], "no width above max_characters_per_token=50"),
        ("char_cnn__filters", [[1, 4, 5]], "a list of"),
        ("char_cnn__embedding", 5, "dim=None; a whole number"),
        ("char_cnn__max_characters_per_token", 2, "max_characters_per_token=2; at least 3"),
        ("bidirectional", False, "bidirectional=false; allowed: true"),
        ("share_embedding_softmax", True, "share_embedding_softmax=true; allowed: false"),
        ("dropout", 1, "dropout=1; allowed are numbers from 0 to below 1"),
        ("n_negative_samples_batch", 0, "n_negative_samples_batch=0; a whole number"),
    ],
)
def test_options_that_cannot_be_expressed_are_refused(key, value, text, tmp_path):
    weights = bilm.draw(bilm.options())
    bilm.write(tmp_path, bilm.options(**{key: value}), weights)
    with pytest.raises(ValueError, match=text):
        import_elmo(tmp_path)


def test_missing_options_are_named(tmp_path):
    said = bilm.options()
    del said["char_cnn"]["activation"], said["char_cnn"]["filters"]
    bilm.write(tmp_path, said, {})
    with pytest.raises(ValueError, match="char_cnn has no filters, activation"):
        import_elmo(tmp_path)
    (tmp_path / "options.json").write_text('{"lstm": ')
    with pytest.raises(ValueError, match="options.json is damaged"):
        import_elmo(tmp_path)


def broken(name, file, path):
    """One kind of damage to an open file."""
    if name == "missing":
        del file["CNN_proj/b_proj"]
    elif name == "extra":
        file["CNN_high_2/W_carry"] = np.zeros((16, 16), np.float32)
    elif name == "another shape":
        del file["char_embed"]
        file["char_embed"] = np.zeros((262, 5), np.float32)
    elif name == "doubles":
        values = file["char_embed"][()]
        del file["char_embed"]
        file["char_embed"] = values.astype(np.float64)
    elif name == "NaN":
        file["char_embed"][3, 2] = np.nan
    elif name == "a soft link":
        del file["char_embed"]
        file["char_embed"] = h5py.SoftLink("/CNN/W_cnn_0")
    elif name == "an external link":
        del file["char_embed"]
        file["char_embed"] = h5py.ExternalLink(str(path.with_name("other.h5")), "/x")
    elif name == "external values":
        del file["char_embed"]
        raw = path.with_name("raw")
        raw.write_bytes(bytes(261 * 5 * 4))
        place = [(str(raw), 0, 261 * 5 * 4)]
        file.create_dataset("char_embed", (261, 5), np.float32, external=place)
    elif name == "a virtual dataset":
        del file["char_embed"]
        layout = h5py.VirtualLayout((261, 5), np.float32)
        layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "x", (261, 5), np.float32)
        file.create_virtual_dataset("char_embed", layout)
    elif name == "one array twice":
        del file["CNN/b_cnn_0"]
        file["CNN/again"] = file["CNN"]
    elif name == "a type":
        file["char_type"] = np.dtype(np.float32)
    elif name == "never written":
        del file["char_embed"]
        file.create_dataset("char_embed", (261, 5), np.float32)
    elif name == "never written chunks":
        del file["char_embed"]
        file.create_dataset("char_embed", (261, 5), np.float32, chunks=(9, 5))
    elif name == "huge and empty":
        del file["char_embed"]
        file.create_dataset("char_embed", (1 << 40, 5), np.float32, chunks=(9, 5))
    elif name == "a filter of another library":
        del file["char_embed"]
        file.create_dataset("char_embed", (261, 5), np.float32, compression="lzf")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing", r"do not fit options.json; missing: CNN_proj/b_proj$"),
        ("extra", "extra: CNN_high_2/W_carry$"),
        ("another shape", r"of another shape: char_embed \[262, 5\], not \[261, 5\]$"),
        ("doubles", "char_embed is float64; allowed: float32"),
        ("NaN", "char_embed holds a NaN or an infinity"),
        ("a soft link", "char_embed is a SoftLink; allowed are values in the file itself"),
        ("an external link", "char_embed is a ExternalLink; allowed"),
        ("external values", "char_embed lies in other files"),
        ("a virtual dataset", "char_embed lies in other files"),
        ("one array twice", "CNN/again is stored twice"),
        ("a type", "char_type is a Datatype; allowed are datasets"),
        ("never written", "char_embed has no values; was the file written to its end?"),
        ("never written chunks", "char_embed has no values"),
        ("huge and empty", "of another shape: char_embed"),
        ("a filter of another library", r"char_embed has filters \[32000\]; allowed are gzip"),
    ],
)
def test_damaged_and_unsafe_files_are_refused(name, text, tmp_path):
    said = bilm.options()
    bilm.write(tmp_path, said, bilm.draw(said))
    path = tmp_path / "lm_weights.hdf5"
    with h5py.File(path, "r+") as file:
        broken(name, file, path)
    with pytest.raises(ValueError, match=text) as caught:
        import_elmo(tmp_path)
    assert str(path) in str(caught.value)


def test_compressed_and_big_endian_values_are_read(tmp_path):
    said = bilm.options()
    weights = bilm.draw(said)
    bilm.write(tmp_path, said, weights)
    plain = import_elmo(tmp_path)[1]
    with h5py.File(tmp_path / "lm_weights.hdf5", "r+") as file:
        for name in ("char_embed", "CNN_proj/W_proj"):
            del file[name]
        file.create_dataset("char_embed", data=weights["char_embed"], compression="gzip")
        file.create_dataset("CNN_proj/W_proj", data=weights["CNN_proj/W_proj"], dtype=">f4")
    assert_equal_trees(import_elmo(tmp_path)[1], plain)


def test_files_that_are_cut_or_none_are_refused(tmp_path):
    said = bilm.options()
    bilm.write(tmp_path, said, bilm.draw(said))
    path = tmp_path / "lm_weights.hdf5"
    content = path.read_bytes()
    for bad in (content[: len(content) // 2], b"", b"not HDF5 at all" * 99):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="lm_weights.hdf5 cannot be read as HDF5"):
            import_elmo(tmp_path)
    (tmp_path / "my_weights.hdf5").write_bytes(content)
    with pytest.raises(
        ValueError, match="one \\*weights.hdf5 is needed, found lm_weights.hdf5, my_"
    ):
        import_elmo(tmp_path)
    (tmp_path / "options.json").unlink()
    with pytest.raises(ValueError, match="one \\*options.json is needed, found none"):
        import_elmo(tmp_path)


def test_export_refuses_what_it_cannot_write(tmp_path):
    model = ELMo(vocab=5, cells=6, width=6, filters=((1, 4), (2, 3)), embedding=3, negatives=0)
    params = jax.device_get(jax.jit(lambda: init_params(model, 0))())
    with pytest.raises(ValueError, match="no projection from 6 to 6; allowed is the identity"):
        export_elmo(tmp_path / "out", model, params, 50)
    with pytest.raises(ValueError, match="not the model's: .*layer_0/bias"):
        export_elmo(tmp_path / "out", model.clone(cells=7), params, 50)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    said = bilm.options()
    model, params, _ = import_elmo(bilm.write(tmp_path / "in", said, bilm.draw(said)))
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_elmo(tmp_path / "out", model, params, 50)


def test_a_file_that_lost_a_bit_is_not_exported(tmp_path, monkeypatch):
    said = bilm.options()
    model, params, _ = import_elmo(bilm.write(tmp_path / "in", said, bilm.draw(said)))
    plain = hdf5.write

    def damaged(path, arrays):
        bent = arrays["char_embed"].copy()
        bent[1, 1] += 1e-6
        plain(path, arrays | {"char_embed": bent})

    monkeypatch.setattr(hdf5, "write", damaged)
    with pytest.raises(ValueError, match="do not give the model's characters/table"):
        export_elmo(tmp_path / "out", model, params, 50)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_no_damage_ends_in_another_error(tmp_path):
    """Bits flipped anywhere: one error, or a file that still reads."""
    said = bilm.options()
    path = bilm.write(tmp_path, said, bilm.draw(said)) / "lm_weights.hdf5"
    content, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 4):
            damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            with hdf5.opened(path) as datasets:
                dict(hdf5.values(datasets, path))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30
