"""Every value of a directory's files in turn replaced by what it can't be: taken, or refused in one line, never a traceback."""

import json
from typing import Any, Iterator

import pytest

from research.errors import InputError
from research.interop.families import FAMILIES
from research.interop.kept import read_kept
from research.interop.safetensors_files import TensorFiles
from research.interop.tensor_map import tensor_map
from research.interop.vocabularies import import_tokenizer
from research.models.lm import LanguageModel
from tests.interop.bad_input_test import SETTINGS, save, tensors
from tests.interop.convert_test import add_tokenizer
from tests.interop.settings_test import DECODER

VALUES = ([], {}, None, "x", -1, 0, float("inf"), True, ["a"], "\ud800", 10**30)
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2, "vocab_size": 61},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61},
}


def attempt(action: Any, *arguments: Any) -> bool:
    """Whether it went well. What isn't an InputError of one line fails the test."""
    try:
        action(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    return True


def variants(value: Any) -> Iterator[Any]:
    """`value` with each of its parts, one at a time, replaced by each of VALUES, or (of a table) taken out."""
    yield from VALUES
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, item in items[:12]:
        copy = dict(value) if isinstance(value, dict) else list(value)
        for other in variants(item):
            copy[key] = other
            yield copy
        if isinstance(value, dict):
            yield {name: item for name, item in value.items() if name != key}


@pytest.mark.parametrize("name", FAMILIES)
def test_settings(name, tmp_path):
    family = FAMILIES[name]
    base = {"eos_token_id": 1, "num_key_value_heads": 2} | (SMALL[name] if name in SMALL else DECODER)
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}

    def read(config: dict[str, Any]) -> None:
        read_kept(tmp_path, family, config)
        tensor_map(LanguageModel(family.model(config)), family.rows, family.per_layer)

    assert attempt(read, base)
    taken = [attempt(read, base | {key: value}) for key in (*family.known, *family.fixed, "eos_token_id") for value in VALUES]
    assert 0 < sum(taken) < len(taken) / 4
    if "rope_scaling" in family.known:
        assert attempt(read, base | {"rope_scaling": rope})
        for value in variants(rope):
            attempt(read, base | {"rope_scaling": value})


@pytest.mark.parametrize("file", [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "model.safetensors.index.json"])
def test_files(file, tmp_path):
    model = save(tmp_path / "model", tensors(), shard_bytes=1000)
    add_tokenizer(model)
    config = {"bos_token": None, "eos_token": "</s>", "add_bos_token": True, "added_tokens_decoder": {"0": {"content": "<s>"}},
              "auto_map": {"AutoTokenizer": ["a.B", None]}, "chat_template": "{{ messages }}", "model_max_length": 64}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    special = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "additional_special_tokens": ["<s>"]}
    (model / "special_tokens_map.json").write_text(json.dumps(special))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "do_sample": True}))

    def read() -> None:
        import_tokenizer(model, "llama").export(tmp_path)
        read_kept(model, FAMILIES["llama"], SETTINGS)
        TensorFiles.open(model)

    assert attempt(read)
    whole = json.loads((model / file).read_text())
    for value in variants(whole):
        (model / file).write_text(json.dumps(value))
        attempt(read)
