"""What isn't a model, or not the one it says it is: the command says so in one line, ends with 2, and leaves nothing behind."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from configs import PRESETS
from research.errors import InputError
from research.interop import safetensors_files
from research.interop.huggingface import _family_of, import_model
from research.interop.jamba import JAMBA
from research.interop.llama import LLAMA
from research.interop.tensor_map import tensor_map
from research.interop.vocabularies import TOKENIZER_FILES
from research.models.lm import LanguageModel
from research.models.mlp import GatedMlp
from research.models.moe import Moe
from research.schema import EXIT_BAD_INPUT, ModelConfig
from tests.interop.commands import convert

SETTINGS = {"model_type": "llama", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}


def tensors() -> dict[str, np.ndarray]:
    theirs = tensor_map(LanguageModel(LLAMA.model(SETTINGS)), LLAMA.rows, LLAMA.per_layer)
    random = np.random.default_rng(0)
    return {name: random.normal(size=t.shape).astype(np.float32) for name, t in theirs.items()}


def save(directory: pathlib.Path, values: dict[str, np.ndarray], shard_bytes: int = 10**9, **settings) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SETTINGS | settings))
    shapes = {name: (value.dtype, value.shape) for name, value in values.items()}
    assert list(safetensors_files.write(directory, shapes, values.__getitem__, shard_bytes)) == list(values)
    return directory


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model", tensors())


def refused(model: pathlib.Path, *words: str) -> None:
    run = model.parent / "run"
    refuses("hf", model, run, *words)
    assert not run.exists()


def refuses(kind: str, source: pathlib.Path, target: pathlib.Path, *words: str) -> None:
    code, said = convert(f"--from={kind}", f"--input={source}", f"--output={target}")
    assert code == EXIT_BAD_INPUT and said.startswith("error: ") and said.count("\n") == 1, said
    for word in words:
        assert word in said, said


def test_shards_are_one_model(tmp_path):
    """Many files and an index give what one file gives; the package safetensors reads the same from them."""
    library = pytest.importorskip("safetensors.numpy")
    one, many = save(tmp_path / "one", tensors()), save(tmp_path / "many", tensors(), shard_bytes=1000)
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 3
    read = {name: value for file in files for name, value in library.load_file(file).items()}
    found = [safetensors_files.TensorFiles.open(directory) for directory in (one, many)]
    assert set(read) == set(found[0].entries) == set(found[1].entries)
    for name, value in read.items():
        np.testing.assert_array_equal(value, found[0].read(name))
        np.testing.assert_array_equal(value, found[1].read(name))


def test_unknown_family(tmp_path):
    refused(save(tmp_path / "a", tensors(), model_type="llana"), "llana", "did you mean llama", "mixtral")
    refused(save(tmp_path / "b", tensors(), model_type="bert"), "bert", "known:", "gpt2")


@pytest.mark.parametrize("settings, words", [
    ({"hidden_act": "mish"}, ("hidden_act", "mish")),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ("rope_type", "dynamic")),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ("rope_scaling", "original_len")),
    ({"num_attention_heads": 0}, ("num_attention_heads", "below 1")),
    ({"hidden_size": "8"}, ("hidden_size", "'8'")),
    ({"num_attention_heads": 3}, ("config.json", "heads")),
    ({"rope_scaling": {"rope_type": ["a"]}}, ("rope_type", "['a']")),
    ({"eos_token_id": "</s>"}, ("eos_token_id", "'</s>'")),
    ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "above")),
])
def test_settings_that_cant_be(tmp_path, settings, words):
    refused(save(tmp_path / "model", tensors(), **settings), *words)


def test_missing_extra_and_misshapen_tensors(tmp_path):
    values = tensors()
    gone = "model.layers.1.mlp.up_proj.weight"
    refused(save(tmp_path / "a", {name: x for name, x in values.items() if name != gone}), "misses", gone)
    refused(save(tmp_path / "b", values | {"model.layers.2.mlp.up_proj.weight": values[gone]}), "also has", "layers.2.mlp.up")
    refused(save(tmp_path / "c", values | {gone: values[gone].T.copy()}), gone, "[8, 12]", "[12, 8]")
    refused(save(tmp_path / "d", values | {gone: values[gone].astype(np.float16)}, tie_word_embeddings=True), "lm_head.weight",
            "isn't the embedding")


def test_cut_and_broken_files(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-1], whole[:200], whole[:5], b"", whole + b"\0", b"\xff" * 8 + whole[8:],
                   whole.replace(b'"F32"', b'"F16"', 1)):
        file.write_bytes(broken)
        refused(model, "model.safetensors")
    file.write_bytes(whole.replace(b'"F32"', b'"I32"', 1))
    refused(model, "is I32")


@pytest.mark.parametrize("broken", [
    b"[" * 100_000, b'{"a": ' * 100_000, b"[]", b'{"a": []}',
    b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}',
    b'{"a\\nb": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}',
], ids=lambda header: header[:40].decode())
def test_headers_that_are_none(model, broken):
    (model / "model.safetensors").write_bytes(len(broken).to_bytes(8, "little") + broken + b"\0" * 4)
    refused(model, "model.safetensors", "broken header")


def test_a_tied_head_that_isn_t_of_floats(tmp_path):
    """It is compared with the embedding, to which config.json ties it, but never converted."""
    values = tensors()
    model = save(tmp_path / "model", values, tie_word_embeddings=True)
    file = model / "model.safetensors"
    whole = file.read_bytes()
    at = whole.index(b'"F32"', whole.index(b'"lm_head.weight"'))
    file.write_bytes(whole[:at] + b'"I32"' + whole[at + 5:])
    refused(model, "lm_head.weight is I32")


@pytest.mark.parametrize("name, words", [
    ("a\0b", "name of a file"), ("a\nb", "name of a file"), ("\ud800", "name of a file"), ("x" * 5000, "name of a file"),
    ("", "missing"), (".", "missing"), ("ring", "ring")], ids=range(7))  # a loop of links: Python 3.13 calls it missing
def test_names_in_an_index_that_no_file_has(model, name, words):
    os.symlink("ring", model / "ring")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(model, words)


def test_nesting_beyond_any_use(model):
    for name in ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"):
        other = save(model.parent / name, tensors())
        (other / name).write_text('{"a": ' * 100_000)
        refused(other, name)


def test_pickles(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, "pytorch_model.bin", "pickle")
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "pytorch_model.bin", "pickle")


@pytest.mark.parametrize("path", ["../other/model.safetensors", "/etc/hostname", "link.safetensors"])
def test_paths_that_leave_the_directory(model, path):
    other = save(model.parent / "other", tensors())
    os.symlink(other / "model.safetensors", model / "link.safetensors")
    index = {"weight_map": dict.fromkeys(tensors(), path)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, path, "leads out of")


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize("there", [True, False])
def test_tokenizers_that_leave_the_directory(model, name, there):
    """Whatever the link leads to: a file of another one's must not become part of a run, nor be asked for."""
    other = model.parent / "secret.json"
    if there:
        other.write_text("{}")
    os.symlink(other, model / name)
    refused(model, name, "leads out of")


def test_a_hub_cache_s_links_are_followed(tmp_path):
    """snapshots/REVISION holds links into blobs/, beside it: how every downloaded model lies on disk."""
    files = save(tmp_path / "files", tensors())
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for file in files.iterdir():
        blob = tmp_path / "models--a--b" / "blobs" / file.name.replace(".", "")
        file.rename(blob)
        os.symlink(f"../../blobs/{blob.name}", snapshot / file.name)
    assert import_model(str(snapshot), str(tmp_path / "run"))["family"] == "llama"


def test_outputs_are_never_overwritten(model):
    run = model.parent / "run"
    import_model(str(model), str(run))
    refuses("hf", model, run, "is there already")
    refuses("rung", run, model, "is there already")


def test_a_damaged_checkpoint_isn_t_exported(model):
    run, back = model.parent / "run", model.parent / "back"
    import_model(str(model), str(run))
    stored = max((run / "checkpoints" / "0" / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    refuses("rung", run, back, "step 0 is refused, params/", stored.name)
    assert not back.exists()


def test_jamba_s_activation_is_fixed():
    """Its Mamba layers go by hidden_act as much as its MLPs, and ours have SiLU."""
    with pytest.raises(InputError, match="hidden_act: 'gelu' is not implemented; only 'silu' is"):
        JAMBA.model({"hidden_act": "gelu"})


def with_gelu(model: ModelConfig) -> ModelConfig:
    stages = [dataclasses.replace(stage, pattern=tuple(
        dataclasses.replace(mixer, activation="gelu") if isinstance(mixer, (GatedMlp, Moe)) else mixer
        for mixer in stage.pattern)) for stage in model.stages]
    return dataclasses.replace(model, stages=tuple(stages))


def test_models_that_no_family_has_a_place_for():
    llama = PRESETS["llama_tiny"]().model
    attention, mlp = llama.stages[0].pattern
    capped = dataclasses.replace(llama, stages=(dataclasses.replace(
        llama.stages[0], pattern=(dataclasses.replace(attention, softcap=30.0), mlp)),))
    with pytest.raises(InputError, match=r"softcap: llama has no place for 30.0"):
        _family_of(capped)
    with pytest.raises(InputError, match="activation: jamba has no place for 'gelu'"):
        _family_of(with_gelu(PRESETS["jamba_tiny"]().model))
    with pytest.raises(InputError, match="no family is made of S4d"):
        _family_of(PRESETS["s4d_tiny"]().model)
    named = {"llama": ["llama_tiny", "llama3_405b"], "gpt2": ["gpt2_tiny", "gpt3_175b"], "qwen3": ["qwen3_tiny", "qwen3_8b"],
             "mixtral": ["mixtral_tiny", "mixtral_8x7b"], "mamba": ["mamba_tiny", "mamba_2_8b"],
             "mamba2": ["mamba2_tiny", "mamba2_2_7b"], "jamba": ["jamba_tiny", "jamba_v0_1"],
             "rwkv": ["rwkv4_tiny", "rwkv4_14b"]}
    for family, presets in named.items():
        for preset in presets:
            assert _family_of(PRESETS[preset]().model)[0].model_type == family
