"""Models of Hugging Face's transformers, in and out: config, weights (safetensors) and tokenizer, one tensor at a time.

A tensor is one of theirs: a layer's matrix, an expert's, or the embedding. Beside a few copies of the largest (as read, in our
layout, compressed) a conversion holds buffers of some ten MiB: measured, in either direction and for a run that was trained
here, 31 to 77 MiB for a Llama of 388 whose largest tensor has 4, and 72 to 184 MiB where it has 16
(tests/interop/memory_test.py). Of a run that was trained here, what its checkpoint has as one chunk is held: a layer's
experts, or as much of small layers (LAYER_CHUNK in training/checkpoint.py) as a device had.
"""

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from research.config import MixerConfig, difference, nearest
from research.data.pretrained import HuggingFaceTokenizer
from research.data.tokenizer import Tokenizer
from research.errors import InputError
from research.interop import safetensors_files
from research.interop.families import FAMILIES
from research.interop.family import Family, Settings
from research.interop.kept import DIRECTORY, IDS, load_kept, read_kept, write_kept
from research.interop.parameter_store import ParameterReader, ParameterWriter
from research.interop.safetensors_files import TensorFiles, read_json
from research.interop.tensor_map import Theirs, tensor_map
from research.interop.vocabularies import export_tokenizer, import_tokenizer
from research.models.attention import Attention
from research.models.lm import LanguageModel
from research.models.mamba import Mamba
from research.models.rwkv4 import Rwkv4TimeMix
from research.schema import CONFIG_FILE, TOKENIZER, Config, DataConfig, ModelConfig, OptimConfig, Source, Stage
from research.training.workdir import is_remote, read_config, write_config

# Settings of ours that don't change the function, or only its training; theirs have no place for them.
TRAINING_ONLY = ("implementation", "balance_loss", "z_loss", "depth", "chunk", "dt_min", "dt_max", "dt_floor")
SHARD_BYTES = 5_000_000_000


def import_model(source: str, workdir: str, dtype: str | None = None) -> dict[str, Any]:
    """Makes a run directory at `workdir` of the model in the directory `source`.

    `dtype`: of the weights, in which they are computed, too. None = as they are; of float16 they are computed in float32.

    Returns:
      {"family", "params", "tensors", "tokenizer"}, the last whether there was one.

    Raises:
      InputError: of an unknown family; tensors missing, extra, misshapen or cut; pickles; paths out of the directory; a
        `workdir` that isn't empty. Nothing is left at `workdir` then.
    """
    directory, output = pathlib.Path(source).expanduser(), _new_directory(workdir)
    if not directory.is_dir():
        raise InputError("--input", f"there is no directory {source}", "name a downloaded model")
    config = read_json(directory, CONFIG_FILE)
    family = _family_named(config)
    model, kept = family.model(config), read_kept(directory, family, config)
    files = TensorFiles.open(directory)
    theirs = tensor_map(LanguageModel(model), family.rows, family.per_layer)
    names = _match(family, theirs, files, model.tie_embeddings)
    arrays = _our_arrays(model, theirs, names, files, dtype)
    tokenizer = import_tokenizer(directory, family.model_type)  # last: it may warn, and a refusal is one line
    model = dataclasses.replace(model, compute_dtype=_compute_dtype(arrays, dtype))  # training goes on with float32 weights
    with _Undone(output):
        writer = ParameterWriter(output, arrays, {part.path: len(part.index) for t in theirs.values() for part in t.parts})
        for name, tensor in _progress(theirs, "importing"):
            value = files.read(names[name])
            for part in tensor.parts:
                writer.write(part.path, part.index, part.take(value))
            del value  # its memory, before the next is read
        if tokenizer:
            tokenizer.save(output / TOKENIZER)
        write_kept(kept, output / DIRECTORY)
        data = DataConfig(sources=(Source("sourcecode"),), seq_len=min(1024, model.max_len),
                          tokenizer=str(output / TOKENIZER) if tokenizer else "bytes")
        start = Config(name=family.model_type, model=model, data=data, optim=OptimConfig(lr=1e-4, warmup_steps=100))
        write_config(epath.Path(output), start, "")
        writer.commit()
    return {"family": family.model_type, "params": LanguageModel(model).param_counts()["total"], "tensors": len(theirs),
            "tokenizer": tokenizer is not None}


def export_model(workdir: str, target: str, step: int | None = None, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Writes a run's checkpoint (the latest by default) as a model that transformers loads, to the directory `target`.

    Returns:
      {"family", "params", "tensors", "files", "step", "tokenizer"}.

    Raises:
      InputError: the model is of no known family, or its checkpoint is damaged; `target` isn't empty.
    """
    source, output = pathlib.Path(workdir).expanduser(), _new_directory(target)
    config = read_config(source)
    model = config.model
    family, settings = _family_of(model)
    theirs = tensor_map(LanguageModel(model), family.rows, family.per_layer)
    reader = ParameterReader(source, step)
    for path, weight in LanguageModel(model).weights.items():
        if path not in reader.arrays or reader.arrays[path][0] != weight.shape:
            raise InputError("--input", f"the checkpoint has no {path} of shape {list(weight.shape)}",
                             "restore the run's files")
    arrays = {name: (_promoted(reader.arrays[part.path][1] for part in t.parts), t.shape) for name, t in theirs.items()}
    held = ""

    def value(name: str) -> np.ndarray:
        nonlocal held
        parts = theirs[name].parts
        if parts[0].path != held:
            reader.release()
            held = parts[0].path
        return theirs[name].assemble([reader.read(part.path, part.index) for part in parts]).astype(arrays[name][0], copy=False)

    with _Undone(output):
        output.mkdir(parents=True, exist_ok=True)
        written = safetensors_files.write(output, arrays, value, shard_bytes)
        for _ in tqdm(written, "exporting", len(arrays), disable=None):
            pass
        reader.verify()
        tokenizer, kept = export_tokenizer(source, output), load_kept(source, config)
        described = _described(family, model, settings, kept[CONFIG_FILE] if kept else {}, tokenizer)
        described |= {"architectures": [family.architecture], "model_type": family.model_type,
                      "dtype" if "dtype" in described else "torch_dtype": str(arrays[next(iter(arrays))][0])}
        for name, content in (kept | {CONFIG_FILE: described}).items():
            (output / name).write_text(json.dumps(content, indent=2) + "\n")
    return {"family": family.model_type, "params": LanguageModel(model).param_counts()["total"], "tensors": len(theirs),
            "files": sorted(path.name for path in output.iterdir()), "step": reader.step, "tokenizer": tokenizer is not None}


class _Undone:
    """Takes a new directory back where what fills it fails."""

    def __init__(self, directory: pathlib.Path):
        self._directory, self._existed = directory, directory.exists()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            if self._existed:
                self._directory.mkdir()


def _new_directory(name: str) -> pathlib.Path:
    if is_remote(name):
        raise InputError("--output", f"{name} is not on this machine", "convert to a local directory, then copy it")
    path = pathlib.Path(name).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError("--output", f"{name} is there already", "name a new directory")
    return path


def _family_named(config: Mapping[str, Any]) -> Family:
    kind = str(config["model_type"]) if "model_type" in config else ""
    if kind not in FAMILIES:
        known = f"known: {', '.join(sorted(FAMILIES))}"
        close = nearest(kind, list(FAMILIES))
        raise InputError("config.json: model_type", f"unknown family {kind!r}", known if close == known else f"{close} {known}")
    return FAMILIES[kind]


def _match(family: Family, theirs: Mapping[str, Theirs], files: TensorFiles, tied: bool) -> dict[str, str]:
    """Name in the table -> name in the files; every tensor of both must be there, in the right shape."""
    stored = {}
    for name in files.entries:
        full = family.optional_prefix + name
        stored[full if name not in theirs and not name.startswith(family.optional_prefix) else name] = name
    extra = [name for name in stored if name not in theirs and not re.fullmatch(family.ignored, name)]
    head = [row.theirs for row in family.rows if row.ours == "unembedding/kernel"]
    head = [name for name in {*head, *(family.optional_prefix + name for name in head)} if tied and name in extra]
    missing = [name for name in theirs if name not in stored]
    for word, found, cure in (("misses", missing, "download it again"),
                              ("also has", [name for name in extra if name not in head], f"is it a {family.architecture}?")):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise InputError("--input", f"the model {word} {', '.join(found[:3])}{more}", cure)
    for name, tensor in theirs.items():
        shape = files.entries[stored[name]].shape
        if shape != tensor.shape:
            raise InputError("--input", f"{name} has shape {list(shape)}, config.json says {list(tensor.shape)}",
                             "download both again")
    table = next(name for name, tensor in theirs.items() if tensor.parts[0].path == "embedding/table")
    for name in head:
        if not np.array_equal(files.read(stored[name]), files.read(stored[table])):
            raise InputError("--input", f"{name} isn't the embedding, to which config.json ties it", "set tie_word_embeddings")
    return {name: stored[name] for name in theirs}


def _our_arrays(model: ModelConfig, theirs: Mapping[str, Theirs], names: Mapping[str, str], files: TensorFiles,
                dtype: str | None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Path -> (shape, dtype): as stored; where layers differ, one that holds all of them."""
    found: dict[str, list[np.dtype]] = {}
    for name, tensor in theirs.items():
        for part in tensor.parts:
            found.setdefault(part.path, []).append(files.dtype(names[name]))
    weights = LanguageModel(model).weights
    return {path: (weights[path].shape, np.dtype(jnp.dtype(dtype)) if dtype else _promoted(set(dtypes)))
            for path, dtypes in found.items()}


def _compute_dtype(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]], asked: str | None) -> str:
    """That of the embedding, as it is stored."""
    stored = str(arrays["embedding/table"][1])
    if asked or stored != "float16":
        return stored
    logging.info("the weights are float16 and stay so, computed in float32: gradients leave float16's range; faster: "
                 "--dtype=bfloat16, or --set model.compute_dtype=bfloat16 in training")
    return "float32"


def _promoted(dtypes: Any) -> np.dtype:
    return np.dtype(jnp.result_type(*dtypes))


def _progress(tensors: Mapping[str, Theirs], words: str) -> Iterator[tuple[str, Theirs]]:
    return iter(tqdm(tensors.items(), words, disable=None))


def _family_of(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that has a place for all of `model`, and the settings that say it."""
    problem = None
    for family in FAMILIES.values():
        settings = family.write(model)
        if settings is None or any(len(stage.pattern) % family.per_layer for stage in model.stages):
            continue
        back = family.model(settings)
        differing = difference(_plain(model), _plain(back))
        if not differing:
            return family, settings
        field, (ours, _) = next(iter(differing.items()))
        problem = problem or InputError(f"model.{field}", f"{family.model_type} has no place for {ours!r}",
                                        "export a model without it")
    if problem:
        raise problem
    kinds = "+".join(dict.fromkeys(type(mixer).__name__ for stage in model.stages for mixer in stage.pattern))
    raise InputError("--input", f"no family is made of {kinds}", f"known: {', '.join(sorted(FAMILIES))}")


def _plain(model: ModelConfig) -> ModelConfig:
    """Without what only matters in training, and with one stage of all layers, so that equal functions are equal."""
    stages = []
    for stage in model.stages:
        pattern = []
        for mixer in stage.pattern:
            fields = {field.name: 1 if field.default is dataclasses.MISSING else field.default
                      for field in dataclasses.fields(mixer) if field.name in TRAINING_ONLY}
            fields |= {name: None for name, usual in _usual(mixer, model.dim).items() if getattr(mixer, name) == usual}
            if isinstance(mixer, Attention) and mixer.rope_scaling and mixer.rope_scaling.kind != "linear":
                scaling = mixer.rope_scaling
                fields["rope_scaling"] = dataclasses.replace(scaling, high=scaling.turns_kept)
            pattern.append(dataclasses.replace(mixer, **fields))
        stages += pattern * stage.repeats
    return dataclasses.replace(model, stages=(Stage(tuple(stages)),), dropout=0.0, remat="none", unroll=1,
                               param_dtype="float32", compute_dtype="float32")


def _usual(mixer: MixerConfig, dim: int) -> dict[str, int]:
    """What None stands for in the fields that have it."""
    if isinstance(mixer, Attention):
        return {"kv_heads": mixer.heads, "head_dim": dim // mixer.heads}
    return {"width": dim} if isinstance(mixer, Rwkv4TimeMix) else {"dt_rank": -(-dim // 16)} if isinstance(mixer, Mamba) else {}


def _described(family: Family, model: ModelConfig, settings: Settings, kept: Settings, tokenizer: Tokenizer | None) -> Settings:
    """What config.json says: what the imported one said, where it still describes the model; else the model's `settings`."""
    special = dict.fromkeys(IDS) if not kept else {}
    if tokenizer is not None:
        special |= tokenizer.special_ids() if isinstance(tokenizer, HuggingFaceTokenizer) else {
            name: getattr(tokenizer, name.replace("_token_id", "_id")) for name in IDS}
    same_family = "model_type" in kept and kept["model_type"] == family.model_type
    if same_family and not difference(_plain(family.model(kept)), _plain(model)):
        return special | kept
    return special | {name: kept[name] for name in IDS if name in kept} | settings
