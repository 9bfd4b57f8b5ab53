"""Import and export against transformers' own models: the same logits, the same state dict, bit for bit, back and forth."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from research.decoding.engine import Engine
from research.decoding.sampling import Sampling
from research.interop.families import FAMILIES
from research.interop.huggingface import _plain, export_model, import_model
from research.interop.kept import DIRECTORY
from research.models.lm import LanguageModel
from research.training.restore import load_params
from research.training.workdir import read_config
from tests.interop.models import MODELS, make, our_logits, their_logits, tokens

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """name -> (their directory, our run, the directory that was exported from it), made once."""
    made = {}

    def convert(name: str) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            make(name).save_pretrained(root / "theirs")
            import_model(str(root / "theirs"), str(root / "run"))
            export_model(str(root / "run"), str(root / "back"))
            made[name] = root / "theirs", root / "run", root / "back"
        return made[name]

    return convert


def test_every_family_has_a_model():
    transformers = pytest.importorskip("transformers")
    assert {getattr(transformers, config).model_type for config, _, _ in MODELS.values()} == set(FAMILIES)


@every_model
def test_logits_are_theirs(name, converted):
    _, run, _ = converted(name)
    expected = their_logits(make(name), tokens())
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(our_logits(run, tokens()), expected, rtol=0, atol=1e-4)


@every_model
def test_the_exported_files_are_theirs(name, converted):
    """Every tensor bit for bit, as it is stored; and transformers reads them, whole, into the same logits."""
    safetensors = pytest.importorskip("safetensors.numpy")
    transformers = pytest.importorskip("transformers")
    theirs, _, back = converted(name)
    stored = [safetensors.load_file(path / "model.safetensors") for path in (theirs, back)]
    assert set(stored[0]) == set(stored[1])
    for key, value in stored[0].items():
        assert value.dtype == stored[1][key].dtype, key
        np.testing.assert_array_equal(value, stored[1][key], err_msg=key)
    model, report = getattr(transformers, MODELS[name][1]).from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    np.testing.assert_array_equal(their_logits(model.eval(), tokens()), their_logits(make(name), tokens()))


@pytest.mark.slow
@every_model
def test_greedy_generation_is_theirs(name, converted):
    torch = pytest.importorskip("torch")
    _, run, _ = converted(name)
    engine = Engine(LanguageModel(read_config(run).model), Sampling(0.0, 0, 1.0))
    generated = engine.generate(load_params(run)[0], [[5, 17, 3]], 8, jax.random.key(0))
    ids = [5, 17, 3]
    for _ in range(8):
        scores = their_logits(make(name), np.array([ids]))[0, -1]
        ids.append(int(scores.argmax()))
    assert generated.token_ids[0] == ids[3:]
    scores = torch.log_softmax(torch.tensor(their_logits(make(name), np.array([ids]))[0]), -1).numpy()
    np.testing.assert_allclose(generated.logprobs[0], [scores[i + 2, ids[i + 3]] for i in range(8)], atol=2e-4)


@every_model
def test_config_json_goes_around(name, converted):
    """What we write is what theirs said, setting by setting, and their generation_config.json."""
    theirs, _, back = converted(name)
    for file in ("config.json", "generation_config.json"):
        written, given = (json.loads((path / file).read_text()) for path in (back, theirs))
        assert written == given, file


@every_model
def test_config_json_of_a_run_that_wasn_t_imported(name, converted, tmp_path):
    """Of settings of ours alone: reading it gives the same model, and transformers the same logits."""
    transformers = pytest.importorskip("transformers")
    theirs, run, _ = converted(name)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / DIRECTORY)
    export_model(str(tmp_path / "run"), str(tmp_path / "back"))
    configs = [json.loads((path / "config.json").read_text()) for path in (theirs, tmp_path / "back")]
    family = FAMILIES[configs[0]["model_type"]]
    assert _plain(family.model(configs[0])) == _plain(family.model(configs[1]))
    model = getattr(transformers, MODELS[name][1]).from_pretrained(tmp_path / "back").eval()
    np.testing.assert_array_equal(their_logits(model, tokens()), their_logits(make(name), tokens()))
