"""The command, and what it makes in other commands' hands: generate, train, AutoTokenizer."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from research.config import override
from research.data.tokenizer import load_tokenizer
from research.decoding.engine import Engine
from research.decoding.sampling import Sampling
from research.interop.huggingface import export_model, import_model
from research.interop.kept import end_ids
from research.models.lm import LanguageModel
from research.params import flatten
from research.schema import EXIT_BAD_INPUT
from research.training.restore import load_params
from research.training.workdir import read_config, write_config
from tests.interop.bad_input_test import SETTINGS, save, tensors
from tests.interop.models import our_logits

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TEXT = 'def f(x):\n    return "Größe, 你好" + str(x)\n'


def call(home: pathlib.Path, module: str, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "RUNG_CACHE": str(home), "XLA_FLAGS": ""}
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=REPOSITORY, env=env)


def add_tokenizer(directory: pathlib.Path) -> None:
    """A byte-level BPE of 300 pieces, as models bring theirs."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT * 20, pathlib.Path(__file__).read_text()], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def test_a_tokenizer_goes_around(tmp_path):
    """Imported, in the run, exported, and read by transformers: the same ids and text; its ids are in config.json."""
    model = save(tmp_path / "model", tensors())
    add_tokenizer(model)
    import_model(str(model), str(tmp_path / "run"))
    done = export_model(str(tmp_path / "run"), str(tmp_path / "back"))
    assert done["tokenizer"] and "tokenizer.json" in done["files"]
    ours = load_tokenizer(tmp_path / "run" / "tokenizer")
    written, given = (json.loads((path / "tokenizer.json").read_text()) for path in (tmp_path / "back", model))
    assert written == given
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.bos_id, ours.eos_id) == (0, 1)
    transformers = pytest.importorskip("transformers")
    for directory in (model, tmp_path / "back"):
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        assert theirs.encode(TEXT, add_special_tokens=False) == ours.encode(TEXT).tolist()
        assert theirs.decode(ours.encode(TEXT)) == TEXT == ours.decode(ours.encode(TEXT))


# What a model brings that isn't ours to read, in config.json and in generation_config.json.
UNREAD = {"eos_token_id": [2, 5], "bos_token_id": 1, "pad_token_id": None, "attention_dropout": 0.0, "initializer_range": 0.02,
          "use_cache": True, "_name_or_path": "a/b", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
GENERATION = {"eos_token_id": [2, 7, 5], "do_sample": True, "temperature": 0.6, "suppress_tokens": None}
# As Qwen3's: no token begins a text; and what a chat needs.
TOKENIZER = {"bos_token": None, "add_bos_token": False, "eos_token": "</s>", "pad_token": None, "unk_token": None,
             "additional_special_tokens": ["<s>"], "chat_template": "{{ messages }} Größe", "model_max_length": 32,
             "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_what_isn_t_read_goes_around(with_tokenizer, tmp_path):
    """File by file, as JSON; but nothing that names their Python files."""
    code = {"auto_map": {"AutoConfig": "configuration_a.A"}}
    files = {"config.json": SETTINGS | UNREAD, "generation_config.json": GENERATION}
    model = save(tmp_path / "model", tensors(), **UNREAD, **code)
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    if with_tokenizer:
        add_tokenizer(model)
        (model / "tokenizer_config.json").write_text(json.dumps(TOKENIZER | code))
        (model / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
        (model / "chat_template.jinja").write_text("{{ messages }}\n\n")
        files |= {name: json.loads((model / name).read_text()) for name in ("tokenizer.json", "special_tokens_map.json")}
        files["tokenizer_config.json"] = TOKENIZER
    run, back = tmp_path / "run", tmp_path / "back"
    import_model(str(model), str(run))
    export_model(str(run), str(back))
    assert {name: json.loads((back / name).read_text()) for name in files} == files
    assert {path.name for path in back.iterdir()} == {path.name for path in model.iterdir()}
    if with_tokenizer:
        assert (back / "chat_template.jinja").read_text() == "{{ messages }}\n\n"
        tokenizer = load_tokenizer(run / "tokenizer")
        assert tokenizer.begins == () and tokenizer.eos_id == tokenizer.bos_id == 1


def test_settings_of_a_model_that_was_changed_are_ours(tmp_path):
    """What config.json said of another model isn't said of this one; its token ids still are."""
    model = save(tmp_path / "model", tensors(), layer_types=["full_attention"] * 2, eos_token_id=[2, 5], rms_norm_eps=1e-6)
    import_model(str(model), str(tmp_path / "run"))
    config = override(read_config(tmp_path / "run"), {"model.norm.eps": 1e-3})
    write_config(epath.Path(tmp_path / "run"), config, "")
    export_model(str(tmp_path / "run"), str(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rms_norm_eps"] == 1e-3 and written["eos_token_id"] == [2, 5] and "layer_types" not in written


@pytest.mark.parametrize("said, expected", [
    (dict(TOKENIZER), ()), ({"bos_token": "<s>", "eos_token": "</s>"}, (0,)), ({"eos_token": "</s>"}, (0,)),
    ({"bos_token": "<s>", "add_bos_token": False}, ()), ({"bos_token": None, "eos_token": "</s>"}, ())])
def test_what_stands_before_a_prompt(said, expected, tmp_path):
    """Also of the run's copy of the tokenizer, and what it never had is not in an export of that alone."""
    add_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    found = load_tokenizer(tmp_path)
    found.save(tmp_path / "run")
    (tmp_path / "back").mkdir()
    load_tokenizer(tmp_path / "run").export(tmp_path / "back")
    assert found.begins == load_tokenizer(tmp_path / "run").begins == expected
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == said
    assert "pad_token_id" not in found.special_ids()


def test_roles_without_a_config_are_those_of_the_vocabulary(tmp_path):
    add_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "back").mkdir()
    load_tokenizer(tmp_path).export(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def test_every_end_token_ends_a_row(tmp_path):
    """Those of generation_config.json, else of config.json, of a run that has no tokenizer."""
    model = save(tmp_path / "model", tensors(), eos_token_id=[2, 5, -1, 13])
    import_model(str(model), str(tmp_path / "run"))
    config = read_config(tmp_path / "run")
    assert end_ids(tmp_path / "run", config) == (2, 5)
    (model / "generation_config.json").write_text(json.dumps(GENERATION))
    import_model(str(model), str(tmp_path / "other"))
    assert end_ids(tmp_path / "other", config) == (2, 7, 5)
    other = str(tmp_path / "other")
    on = override(config, {"train.init_from": other})  # with another tokenizer, whose ids mean something else
    assert end_ids(tmp_path / "nowhere", on) == ()
    assert end_ids(tmp_path / "nowhere", override(on, {"data.tokenizer": f"{other}/tokenizer"})) == (2, 7, 5)
    lm, params = LanguageModel(read_config(tmp_path / "run").model), load_params(tmp_path / "run")[0]

    def generate(ends: tuple[int, ...]) -> list[int]:
        return Engine(lm, Sampling(0.0, 0, 1.0), ends).generate(params, [[5, 7, 3]], 9, jax.random.key(0)).token_ids[0]

    free = generate(())
    assert len(free) == 9
    unused = next(i for i in range(13) if i not in free)
    for ends in ((unused, free[0]), (free[-1], unused)):
        assert generate(ends) == free[:min(i for i, token in enumerate(free) if token in ends) + 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_another_dtype_are_those_that_are_loaded(dtype, tmp_path):
    """Converted on import: the checkpoint is whole by its own checksums, and has the values, rounded."""
    model = save(tmp_path / "model", tensors())
    import_model(str(model), str(tmp_path / "as_it_is"))
    import_model(str(model), str(tmp_path / "converted"), dtype)
    plain, found = (flatten(load_params(tmp_path / name)[0]) for name in ("as_it_is", "converted"))
    for path, value in plain.items():
        assert found[path].dtype == dtype, path
        np.testing.assert_array_equal(found[path], value.astype(dtype), path)


def test_float16_weights_are_computed_in_float32(tmp_path, caplog):
    """As they are in the file, and in the export; a run trains in float16 only where it was asked for by name."""
    caplog.set_level("INFO", logger="absl")
    stored = {name: x.astype(np.float16) for name, x in tensors().items()}
    model = save(tmp_path / "model", stored)
    import_model(str(model), str(tmp_path / "run"))
    assert read_config(tmp_path / "run").model.compute_dtype == "float32"
    assert "the weights are float16" in caplog.text
    assert {str(x.dtype) for x in flatten(load_params(tmp_path / "run")[0]).values()} == {"float16"}
    wide = save(tmp_path / "wide", {name: x.astype(np.float32) for name, x in stored.items()})
    import_model(str(wide), str(tmp_path / "exact"))
    words = np.random.default_rng(1).integers(0, 13, size=(2, 9))
    np.testing.assert_array_equal(our_logits(tmp_path / "run", words), our_logits(tmp_path / "exact", words))
    export_model(str(tmp_path / "run"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    for dtype in ("float16", "bfloat16"):
        import_model(str(model), str(tmp_path / dtype), dtype)
        assert read_config(tmp_path / dtype).model.compute_dtype == dtype


def test_a_run_of_unrolled_layers_is_exported(tmp_path):
    """`model.unroll` is how a scan is compiled: the weights are the same, layer by layer."""
    model = save(tmp_path / "model", tensors())
    import_model(str(model), str(tmp_path / "run"))
    config = read_config(tmp_path / "run")
    write_config(epath.Path(tmp_path / "run"), override(config, {"model.unroll": 2}), "")
    assert read_config(tmp_path / "run").model.unroll == 2
    export_model(str(tmp_path / "run"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    unrolled, plain = (LanguageModel(override(config, {"model.unroll": n}).model).weights for n in (2, 1))
    assert unrolled == plain


@pytest.mark.slow
def test_the_commands(tmp_path):
    """Import, generate, go on training, export."""
    model, run = save(tmp_path / "model", tensors()), tmp_path / "run"
    done = call(tmp_path, "tools.convert", "--from=hf", f"--input={model}", f"--output={run}", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["family"] == "llama", done.stderr
    done = call(tmp_path, "tools.generate", f"--workdir={run}", "--prompt_ids=5,7,3", "--max_new_tokens=8",
                "--temperature=0", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 8
    kept = run / "huggingface" / "config.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"eos_token_id": [12, answer["token_ids"][0]]}))
    done = call(tmp_path, "tools.generate", f"--workdir={run}", "--prompt_ids=5,7,3", "--max_new_tokens=8",
                "--temperature=0", "--json")
    assert json.loads(done.stdout)["token_ids"] == answer["token_ids"][:1], done.stderr
    done = call(tmp_path, "experiments.train", f"--init_from={run}", f"--workdir={tmp_path / 'on'}", "--set", "train.steps=1",
                "--set", "optim.warmup_steps=0", "--set", "optim.lr=0", "--set", "data.sources.0.args.packages=false",
                "--set", "data.sources.0.args.max_bytes=100000", "--set", "data.holdout=0.3",
                "--set", "model.vocab_size=264", "--set", "data.seq_len=32", f"--set=data.cache_dir={tmp_path}")
    assert done.returncode == 0 and "unembedding/kernel has shape" in done.stderr, done.stderr
    old, new = (load_params(path)[0]["decoder"]["stage_0"]["gated_mlp_1"]["up"] for path in (run, tmp_path / "on"))
    np.testing.assert_array_equal(old, new)
    done = call(tmp_path, "tools.convert", "--from=rung", f"--input={run}", f"--output={tmp_path / 'back'}")
    assert done.returncode == 0 and (tmp_path / "back" / "model.safetensors").exists(), done.stderr
    done = call(tmp_path, "tools.convert", "--from=hf", f"--input={tmp_path / 'nowhere'}", f"--output={tmp_path / 'x'}")
    assert done.returncode == EXIT_BAD_INPUT and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_the_memory_of_a_conversion(tmp_path):
    """It reads each tensor of theirs once and writes it at once: chunks are layers, so that none waits for another."""
    import tensorstore

    model = save(tmp_path / "model", tensors())
    import_model(str(model), str(tmp_path / "run"))
    base = (tmp_path / "run" / "checkpoints" / "0" / "params").as_uri() + "/"
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": "decoder.stage_0.gated_mlp_1.up/"}}
    store = tensorstore.open(spec, read=True).result()
    assert store.shape == (2, 8, 12) and store.chunk_layout.read_chunk.shape == (1, 8, 12)
