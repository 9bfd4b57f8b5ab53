"""RWKV-4 is transformers' RwkvForCausalLM: the same initial values, the same logits and steps from the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.context import one_document
from research.models.lm import LanguageModel
from research.models.rwkv4 import Rwkv4ChannelMix, Rwkv4TimeMix
from research.params import flatten, unflatten
from research.schema import ModelConfig, Norm, Stage
from tests.models.harness import QUICK

LAYERS, DIM, WIDTH, HIDDEN, VOCAB = 3, 12, 20, 28, 17
PATTERN = (Rwkv4TimeMix(width=WIDTH, depth=LAYERS), Rwkv4ChannelMix(hidden=HIDDEN, depth=LAYERS))
MODEL = LanguageModel(ModelConfig(
    vocab_size=VOCAB, dim=DIM, stages=(Stage(PATTERN, LAYERS),), norm=Norm(kind="layernorm", eps=1e-5),
    embedding_norm=True))  # fmt: skip
STAGE = "decoder/stage_0"


@functools.cache
def theirs():
    """transformers' model, evaluated; its weights and norms drawn anew where they are constant."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=LAYERS, attention_hidden_size=WIDTH,
        intermediate_size=HIDDEN, layer_norm_epsilon=1e-5, rescale_every=0)  # fmt: skip
    return transformers.RwkvForCausalLM(config).eval()


def ours(tensors: dict) -> dict:
    """Our parameters from their tensors: linear weights transposed, layers stacked."""
    layer = lambda name, of=lambda x: x: np.stack(
        [of(tensors[f"rwkv.blocks.{i}.{name}"]) for i in range(LAYERS)])
    flat = {
        "embedding/table": tensors["rwkv.embeddings.weight"],
        "embedding/norm/gain": tensors["rwkv.blocks.0.pre_ln.weight"],
        "embedding/norm/bias": tensors["rwkv.blocks.0.pre_ln.bias"],
        "decoder/final_norm/gain": tensors["rwkv.ln_out.weight"],
        "decoder/final_norm/bias": tensors["rwkv.ln_out.bias"],
        "unembedding/kernel": tensors["head.weight"].T,
    }
    for index, (mixer, module) in enumerate((("rwkv4_time_mix_0", "attention"), ("rwkv4_channel_mix_1", "feed_forward"))):
        for kind, name in (("gain", "weight"), ("bias", "bias")):
            flat[f"{STAGE}/norm_{index}/{kind}"] = layer(f"ln{index + 1}.{name}")
        for path in MODEL.weights:
            *owner, name = path.split("/")
            if owner[-1] == mixer:
                vector = name.startswith("time_")
                flat[path] = layer(f"{module}.{name}", np.ravel) if vector else layer(f"{module}.{name}.weight", np.transpose)
    return flat


def random_tensors() -> dict:
    random = np.random.default_rng(0)
    tensors = {}
    for name, tensor in theirs().state_dict().items():
        value = random.normal(size=tuple(tensor.shape)).astype(np.float32)
        tensors[name] = value / np.sqrt(tensor.shape[-1]) if tensor.ndim == 2 else 0.5 + 0.5 * value
    return tensors


def test_logits_and_steps_are_theirs():
    torch = pytest.importorskip("torch")

    tensors = random_tensors()
    theirs().load_state_dict({name: torch.tensor(x) for name, x in tensors.items()})
    flat = ours(tensors)
    assert set(flat) == set(MODEL.weights)
    assert {path: x.shape for path, x in flat.items()} == {path: w.shape for path, w in MODEL.weights.items()}
    params = unflatten({path: jnp.asarray(x) for path, x in flat.items()})
    tokens = np.random.default_rng(1).integers(0, VOCAB, size=(2, 11))
    with torch.no_grad():
        expected = theirs()(torch.tensor(tokens), use_cache=False).logits.numpy()

    @jax.jit
    def logits(params, tokens, ctx, state):
        hidden, state, _ = MODEL.hidden(params, tokens, ctx, state)
        return hidden @ MODEL.unembedding(params), state

    ctx = one_document(2, 11)
    got, _ = logits(params, tokens, ctx, None)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    prompt = jax.tree.map(lambda x: x[:, :7], ctx)
    _, state = logits(params, tokens[:, :7], prompt, MODEL.init_state(2, 11))
    for t in range(7, 11):
        got, state = logits(params, tokens[:, t : t + 1], jax.tree.map(lambda x: x[:, t : t + 1], ctx), state)
        np.testing.assert_allclose(got[:, 0], expected[:, t], rtol=0, atol=1e-4)


def test_initial_values_are_published():
    """transformers draws as the authors do, but for time_first, which its code sets to one by mistake."""
    init = flatten(jax.jit(MODEL.init, compiler_options=QUICK)(jax.random.key(0)))
    pytest.importorskip("torch")
    drawn = ours({name: tensor.numpy() for name, tensor in fresh().items()})
    for path, value in init.items():
        name = path.rsplit("/", 1)[1]
        if name.startswith("time_") and name != "time_first":
            np.testing.assert_allclose(value, drawn[path], rtol=0, atol=1e-5, err_msg=path)
    first = np.log(0.3) + np.resize([0.0, 0.5, -0.5], WIDTH)
    np.testing.assert_allclose(init[f"{STAGE}/rwkv4_time_mix_0/time_first"], np.tile(first, (LAYERS, 1)), atol=1e-6)
    value = np.asarray(init[f"{STAGE}/rwkv4_time_mix_0/value"][1])  # (inputs, outputs)
    np.testing.assert_allclose(value @ value.T, np.eye(DIM) * WIDTH / DIM, atol=1e-5)
    for name in ("time_mix_0/key", "time_mix_0/receptance", "time_mix_0/output", "channel_mix_1/value"):
        assert not np.any(init[f"{STAGE}/rwkv4_{name}"]), name


def test_layers_beyond_the_depth_are_as_the_last():
    deeper = dataclasses.replace(MODEL.cfg, stages=(Stage(PATTERN, LAYERS + 2),))
    init = flatten(jax.jit(LanguageModel(deeper).init, compiler_options=QUICK)(jax.random.key(0)))
    for path, value in init.items():
        if "/time_" in path:
            np.testing.assert_array_equal(value[LAYERS:], np.broadcast_to(value[LAYERS - 1], value[LAYERS:].shape))


def fresh() -> dict:
    transformers = pytest.importorskip("transformers")
    return transformers.RwkvForCausalLM(theirs().config).state_dict()
