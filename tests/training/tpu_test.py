"""The sharded quickstart step, compiled for TPU v5e 2x2 by the TPU's own compiler on this CPU; its collectives are pinned.

A change that makes the compiler gather activations, or adds a collective, shows here. The counts are those of the versions in
constraints.txt, by jax's minor version; other versions are held to the rules alone.
"""

import collections
import dataclasses
import math
import re

import jax
import pytest
from jax.experimental import topologies

from configs import preset
from research.aot import hlo
from research.aot.compile import no_cache
from research.config import override
from research.models.attention import Attention
from research.models.lm import LanguageModel
from research.models.moe import Moe
from research.schema import Stage
from research.training.program import make_program
from tests.spikes.pallas_scale import PallasScale

pytest.importorskip("libtpu", reason="the extra tpu is not installed")

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BATCH, LENGTH = 8, 256


@pytest.fixture(scope="module", autouse=True)
def no_persistent_cache():
    with no_cache():
        yield


@pytest.fixture(scope="module")
def chips():
    return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices


def quickstart(rules: str, stages=None, **mesh):
    config = override(preset("quickstart"), {"train.batch_size": BATCH, "mesh.rules": rules, "model.compute_dtype": "bfloat16",
                                             **{f"mesh.{axis}": size for axis, size in mesh.items()}})
    model = dataclasses.replace(config.model, stages=stages or config.model.stages)
    return dataclasses.replace(config, model=model)


MOE = (Stage((Attention(heads=4), Moe(experts=4, top_k=2, hidden=128, capacity_factor=1.5)), 2),)
DROPLESS = (Stage((Attention(heads=4), Moe(experts=4, top_k=2, hidden=128)), 2),)
PALLAS = (Stage((Attention(heads=4), PallasScale()), 2),)
CASES = {
    "dp": quickstart("dp"),
    "fsdp": quickstart("fsdp"),
    "fsdp_tp": quickstart("fsdp_tp", tensor=2),
    "ep": quickstart("ep", MOE, expert=2),
    "ep_dropless": quickstart("ep", DROPLESS, expert=2),
    "cp": quickstart("cp", context=2),
    "ring": quickstart("ring", context=2),
    "pallas": quickstart("fsdp", PALLAS),
}


def collectives(text: str) -> dict[str, dict[int, int]]:
    """Kind -> {channel: elements of the largest result}; the compiler's copies of one collective share a channel."""
    found = collections.defaultdict(dict)
    pattern = re.compile(rf"= (\(?[a-z0-9]+\[.*?) ({'|'.join(KINDS)})(?:-start)?\(.*?channel_id=(\d+)")
    for line in text.splitlines():
        if match := pattern.search(line):
            shapes = re.findall(r"[a-z0-9]+\[([\d,]*)\]", match[1])
            sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for dims in shapes]
            channels = found[match[2]]
            channel = int(match[3])
            channels[channel] = max(sizes + ([channels[channel]] if channel in channels else []))
    return found


@pytest.fixture(scope="module")
def compiled(chips):
    texts = {}

    def get(name: str):
        if name not in texts:
            texts[name] = make_program(CASES[name], chips).compile()
        return texts[name]

    return get


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_step_compiles_for_v5e_and_its_collectives_are_pinned(name, compiled):
    weights, found = LanguageModel(CASES[name].model).weights, collectives(compiled(name).as_text())
    counts = {kind: len(channels) for kind, channels in found.items()}
    minor = ".".join(jax.__version__.split(".")[:2])
    if minor in PINNED:
        assert counts == PINNED[minor][name]
    largest_weight = max(weight.size for weight in weights.values())
    activations = BATCH * LENGTH * CASES[name].model.dim
    for channel, size in (found["all-gather"] if "all-gather" in found else {}).items():
        # Weights, token ids and (context parallel) one row's keys are gathered; whole activations never, but for the
        # gradient of the embedding's lookup where rows are split over experts (docs/design.md, section 5).
        limit = activations + name.startswith("ep")
        assert size < limit or size <= largest_weight, f"all-gather {channel} of {size} elements"
    if name == "dp":
        assert set(counts) == {"all-reduce"}


@pytest.mark.parametrize("name", ["ep", "ep_dropless"])
def test_experts_are_not_gathered(name, chips, compiled):
    """Expert weights stay on their devices: no layer gathers anything over the expert axis."""
    text = compiled(name).as_text()
    mesh = dict(make_program(CASES[name], chips).layout.mesh.shape)
    in_layers = [found for found in hlo.collectives(hlo.parse(text), mesh) if found.times == 2]
    gathered = [found.axis for found in in_layers if found.kind == "all-gather"]
    assert set(gathered) == {"fsdp"}, gathered
    if name == "ep":
        assert "all-to-all" in collectives(text)  # rows go to their experts and back
    else:  # there and back, forward and backward; the compiler gives them one channel
        assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", text)) == 4
        assert "ragged-dot" in text and "tgmm" in text  # the grouped kernels


def test_the_pallas_kernel_is_in_the_program(compiled):
    assert "tpu_custom_call" in compiled("pallas").as_text()


@pytest.mark.parametrize("name", ["fsdp", "fsdp_tp", "cp", "ring"])
def test_flash_attention_is_in_the_sharded_step(name, compiled):
    """Forward and backward, though nothing names it and this is a CPU."""
    text = compiled(name).as_text()
    assert "flash_attention_forward" in text and "flash_attention_backward" in text


def test_memory_is_sharded(chips, compiled):
    """Under fsdp a chip holds a quarter of parameters and optimizer state, and the compiler was given no more than that.

    At this width its tiles (8 x 128) pad the quarters, so its own count is held to the tiles, not to the bytes.
    """
    program = make_program(CASES["fsdp"], chips)
    leaves = jax.tree.leaves(program.abstract)
    quarter = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    assert quarter < 0.26 * sum(x.size * x.dtype.itemsize for x in leaves)
    assert compiled("fsdp").memory_analysis().argument_size_in_bytes < 4 * quarter


def test_two_slices_put_data_across_the_slow_network():
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
    assert len(devices) == 8
    program = make_program(override(CASES["fsdp"], {"mesh.slices": 2, "mesh.data": 2}), devices)
    for index in range(2):
        assert {d.slice_index for d in program.layout.mesh.devices[index].flat} == {index}


# Collectives of one step by kind: distinct channels.
PINNED: dict[str, dict[str, dict[str, int]]] = {
    "0.10": {
        "dp": {"all-reduce": 4},
        "fsdp": {"all-gather": 16, "all-reduce": 10, "all-to-all": 2},
        "fsdp_tp": {"all-gather": 17, "all-reduce": 22, "collective-permute": 1, "all-to-all": 2},
        "ep_dropless": {"all-gather": 20, "ragged-all-to-all": 1, "all-reduce": 18, "collective-permute": 2, "all-to-all": 1},
        "ep": {"all-gather": 20, "all-reduce": 17, "all-to-all": 5, "collective-permute": 2},
        "cp": {"all-gather": 26, "collective-permute": 2, "all-reduce": 13, "all-to-all": 2},
        "ring": {"all-gather": 18, "collective-permute": 3, "all-reduce": 13, "all-to-all": 2},
        "pallas": {"all-gather": 10, "all-reduce": 10, "all-to-all": 2},
    },
    "0.12": {
        "dp": {"all-reduce": 4},
        "fsdp": {"all-gather": 16, "all-reduce": 10, "all-to-all": 2},
        "fsdp_tp": {"all-gather": 17, "all-reduce": 22, "collective-permute": 1, "all-to-all": 2},
        "ep_dropless": {"all-gather": 19, "ragged-all-to-all": 1, "all-reduce": 18, "collective-permute": 2, "all-to-all": 1},
        "ep": {"all-gather": 19, "all-reduce": 17, "all-to-all": 5, "collective-permute": 2},
        "cp": {"all-gather": 26, "collective-permute": 2, "all-reduce": 13, "all-to-all": 2},
        "ring": {"all-gather": 18, "collective-permute": 3, "all-reduce": 13, "all-to-all": 2},
        "pallas": {"all-gather": 10, "all-reduce": 10, "all-to-all": 2},
    },
}
