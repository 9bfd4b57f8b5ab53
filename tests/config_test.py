"""Config trees: strict nodes, strict overrides, JSON both ways. Each bad input is one line that names the
field and the cure."""

import dataclasses
import json
import math
import typing

import pytest

from research.config import (
    Fraction,
    Node,
    Positive,
    Range,
    difference,
    flatten,
    from_json,
    nearest,
    override,
    parse_assignments,
    to_json,
)
from research.errors import InputError
from research.models.attention import Attention
from research.models.mixers import Parallel, kinds
from research.models.mlp import GatedMlp
from research.schema import (
    Config,
    DataConfig,
    ModelConfig,
    Norm,
    OptimConfig,
    Source,
    Stage,
    TrainConfig,
    Validation,
)
from tests.models.cases import FLAT

CONFIG = Config(
    name="test",
    model=ModelConfig(
        vocab_size=64,
        dim=16,
        stages=(
            Stage((Attention(heads=4), GatedMlp(hidden=32)), 2),
            Stage((Parallel((Attention(heads=2, window=8), GatedMlp(hidden=8))),)),
        ),
    ),
    data=DataConfig(
        sources=(Source("synthetic", {"documents": 5}), Source("text", {"paths": ("a", "b")}, 2.0))
    ),
    train=TrainConfig(batch_size=8, microbatches=2),
)

GOOD = [  # assignment, path, value
    ("optim.lr=3e-4", "optim.lr", 3e-4),
    ("optim.lr=1", "optim.lr", 1.0),
    ("optim.lr= 0.5 ", "optim.lr", 0.5),
    ("train.steps=1e3", "train.steps", 1000),
    ("train.steps=20", "train.steps", 20),
    ("model.tie_embeddings=True", "model.tie_embeddings", True),
    ("model.norm.kind=layernorm", "model.norm.kind", "layernorm"),
    ("model.stages.0.repeats=6", "model.stages.0.repeats", 6),
    ("model.stages.0.pattern.0.window=256", "model.stages.0.pattern.0.window", 256),
    ("model.stages.1.pattern.0.mixers.0.window=none", "model.stages.1.pattern.0.mixers.0.window", None),
    ("model.stages.0.pattern.0.kv_heads=2", "model.stages.0.pattern.0.kv_heads", 2),
    ("train.init_from=runs/a=b", "train.init_from", "runs/a=b"),
    ("train.init_from=None", "train.init_from", None),
    ("data.sources.0.args.documents=7", "data.sources.0.args.documents", 7),
    ("data.sources.0.args.paths=x,y", "data.sources.0.args.paths.1", "y"),
    ("data.sources.1.weight=3", "data.sources.1.weight", 3.0),
    ("data.validation.0.name=other", "data.validation.0.name", "other"),
    ("seed=7", "seed", 7),
    ("name=a b", "name", "a b"),
]


@pytest.mark.parametrize("assignment, path, value", GOOD)
def test_override(assignment, path, value):
    changed = override(CONFIG, parse_assignments([assignment]))
    found = flatten(changed)[path]
    assert found == value and type(found) is type(value)
    assert set(difference(changed, CONFIG)) <= {path, path.rsplit(".", 1)[0] + ".0"}


BAD = [  # assignments, the whole message as a pattern
    ("optim.lrr=1", r"optim\.lrr: unknown key; did you mean lr\?"),
    ("optm.lr=1", r"optm: unknown key; did you mean optim\?"),
    ("zzz=1", r"zzz: unknown key; known: checkpoint, data, .*"),
    ("optim.lr=fast", r"optim\.lr: 'fast' is not a number; give a number"),
    ("optim.lr=", r"optim\.lr: '' is not a number; give a number"),
    ("optim.lr=-1", r"optim\.lr: -1\.0 must be at least 0\.0; choose a value in range"),
    ("optim.lr=nan", r"optim\.lr: nan is not a finite number; .*"),
    ("optim.lr=inf", r"optim\.lr: inf is not a finite number; .*"),
    ("optim.eps=0", r"optim\.eps: 0\.0 must be above 0\.0; .*"),
    ("optim.b1=1.0", r"optim\.b1: 1\.0 must be below 1\.0; .*"),
    ("optim.schedule=cosin", r"optim\.schedule: unknown 'cosin'; did you mean cosine\?"),
    ("optim.lr.x=1", r"optim\.lr: has no fields, it is a number; set optim\.lr= itself"),
    ("train.steps=0", r"train\.steps: 0 must be at least 1; .*"),
    ("train.steps=1.5", r"train\.steps: '1\.5' is not a whole number; give a whole number"),
    ("train.steps=1e-1", r"train\.steps: '1e-1' is not a whole number; .*"),
    ("train.steps=1e999", r"train\.steps: '1e999' is not a whole number; .*"),
    ("train.steps=many", r"train\.steps: 'many' is not a whole number; .*"),
    ("train.steps=true", r"train\.steps: 'true' is not a whole number; .*"),
    ("train.microbatches=3", r"train\.microbatches: 3 does not divide train\.batch_size=8; choose a divisor"),
    ("model.tie_embeddings=yes", r"model\.tie_embeddings: 'yes' is not true or false; give true or false"),
    ("model.compute_dtype=bf16", r"model\.compute_dtype: unknown 'bf16'; did you mean bfloat16.*\?"),
    (
        "model.norm=rmsnorm",
        r"model\.norm: is a node, not a value; set one of its fields: kind, placement, eps",
    ),
    ("model=1", r"model: is a node, not a value; set one of its fields: vocab_size, .*"),
    (
        "model.dim=18",
        r"model\.stages\.0\.pattern\.0\.heads: 4 does not divide dim=18; choose a divisor or set head_dim",
    ),
    (
        "model.stages=1",
        r"model\.stages: the shape of a list of nodes is set in code; set its numbers: model\.stages\.0\.N.*",
    ),
    ("model.stages.2.repeats=1", r"model\.stages\.2: no such item; there are 2; count from 0"),
    ("model.stages.x.repeats=1", r"model\.stages\.x: no such item; there are 2; count from 0"),
    ("model.stages.-1.repeats=1", r"model\.stages\.-1: no such item; there are 2; count from 0"),
    ("model.stages.0.repeat=1", r"model\.stages\.0\.repeat: unknown key; did you mean repeats\?"),
    (
        "model.stages.0.pattern.0.heads=3",
        r"model\.stages\.0\.pattern\.0\.heads: 3 does not divide dim=16; .*",
    ),
    (
        "model.stages.0.pattern.0.head_dim=3",
        r"model\.stages\.0\.pattern\.0\.head_dim: RoPE rotates pairs, not 3 features; .*",
    ),
    ("model.stages.0.pattern.0.window=0", r"model\.stages\.0\.pattern\.0\.window: 0 must be at least 1; .*"),
    (
        "model.stages.0.pattern.0.window=wide",
        r"model\.stages\.0\.pattern\.0\.window: 'wide' is not a whole number; .*",
    ),
    (
        "model.stages.0.pattern.0.kv_heads=3",
        r"model\.stages\.0\.pattern\.0\.kv_heads: 3 does not divide heads=4; .*",
    ),
    (
        "model.stages.0.pattern.1.heads=3",
        r"model\.stages\.0\.pattern\.1\.heads: unknown key; known: activation, bias, hidden",
    ),
    (
        "model.stages.1.pattern.0.mixers.0.heads=3",
        r"model\.stages\.1\.pattern\.0\.heads: 3 does not divide dim=16; .*",
    ),
    (
        "model.stages.0.pattern.0.cross=true",
        r"model\.stages\.0\.pattern\.0\.cross: a memory has no positions; .*",
    ),
    (
        "data.seq_len=4096",
        r"data\.seq_len: 4096 is above model\.max_len=2048; raise model\.max_len or shorten the rows",
    ),
    ("data.sources.0.args.a.b=1", r"data\.sources\.0\.args\.a: is a value, not a node; .*"),
    ("data.sources.0.weight=0", r"data\.sources\.0\.weight: 0\.0 must be above 0\.0; .*"),
    ("optim.warmup_steps=1000", r"optim\.warmup_steps: 1000 leaves nothing of train\.steps=1000; .*"),
    ("seed=-1", r"seed: -1 must be at least 0; .*"),
    ("optim.lr", r"--set: 'optim\.lr' is not KEY=VALUE; write --set optim\.lr=3e-4"),
    ("=3", r"--set: '=3' is not KEY=VALUE; .*"),
    ("optim=1 optim.lr=1", r"optim\.lr: is set twice, as a value and as a node; keep one of the two"),
    ("optim.lr=1 optim=1", r"optim: is set twice, as a value and as a node; keep one of the two"),
]


@pytest.mark.parametrize("assignments, message", BAD, ids=[a for a, _ in BAD])
def test_a_bad_override_is_one_line(assignments, message):
    with pytest.raises(InputError, match=f"^{message}$") as caught:
        override(CONFIG, parse_assignments(assignments.split(" ")))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_overrides_apply_together():
    """Rules that span fields see all changes at once, in any order; the last of two assignments counts."""
    changed = override(
        CONFIG,
        parse_assignments(
            [
                "model.stages.0.pattern.0.heads=3",
                "model.dim=24",
                "train.microbatches=3",
                "train.batch_size=9",
                "model.stages.1.pattern.0.mixers.0.heads=3",
                "train.steps=1",
                "train.steps=5",
            ]
        ),
    )
    assert (changed.model.dim, changed.train.batch_size, changed.train.steps) == (24, 9, 5)
    assert CONFIG.model.dim == 16 and changed.model.stages[0].pattern[1] is CONFIG.model.stages[0].pattern[1]


def test_typed_values_are_checked_too():
    assert override(CONFIG, {"optim.lr": 1, "data.sources.0.args.documents": 9}).optim.lr == 1.0
    for changes, field in (
        ({"optim.lr": None}, "optim.lr"),
        ({"train.steps": 2.0}, "train.steps"),
        ({"train.steps": True}, "train.steps"),
        ({"model.tie_embeddings": 1}, "model.tie_embeddings"),
        ({"name": 3}, "name"),
        ({"model.norm": OptimConfig()}, "model.norm"),
        ({"data.sources": ()}, "data.sources"),
        ({"optim.lr": math.inf}, "optim.lr"),
    ):
        with pytest.raises(InputError) as caught:
            override(CONFIG, changes)
        assert caught.value.field == field


@dataclasses.dataclass(frozen=True)
class Leafy(Node):
    sizes: tuple[Positive, ...] = (1,)
    share: Fraction | None = None
    level: typing.Literal[1, 2] = 1
    names: tuple[str, ...] = ()
    free: typing.Annotated[float, Range(least=-1.0, most=1.0)] = 0.0


NODES = [  # arguments, field and a piece of the problem; None: fine
    (dict(sizes=[2, 3]), None, ""),
    (dict(sizes=(2, 0)), "sizes.1", "must be at least 1"),
    (dict(sizes=3), "sizes", "is not a list of a whole number"),
    (dict(sizes=(1.0,)), "sizes.0", "is not a whole number"),
    (dict(share=0), None, ""),
    (dict(share=1), "share", "must be below 1.0"),
    (dict(share="0.5"), "share", "is not a number"),
    (dict(level=3), "level", "unknown 3"),
    (dict(level="1"), "level", "unknown '1'"),
    (dict(level=True), "level", "unknown True"),
    (dict(names=("a", 1)), "names.1", "is not text"),
    (dict(names="ab"), "names", "is not a list of text"),
    (dict(free=1.5), "free", "must be at most 1.0"),
]


@pytest.mark.parametrize("arguments, field, problem", NODES)
def test_nodes_check_themselves(arguments, field, problem):
    if field is None:
        assert Leafy(**arguments)
        return
    with pytest.raises(InputError) as caught:
        Leafy(**arguments)
    assert caught.value.field == field and problem in caught.value.problem and caught.value.cure


def test_canonical_values():
    leafy = Leafy(sizes=[2, 3], share=0)
    assert leafy.sizes == (2, 3) and type(leafy.share) is float
    assert hash(leafy) == hash(Leafy(sizes=(2, 3), share=0.0))
    changed = override(leafy, {"sizes": "4,5", "share": "none", "names": "a,b", "level": 2})
    assert (changed.sizes, changed.share, changed.names, changed.level) == ((4, 5), None, ("a", "b"), 2)
    assert override(leafy, {"sizes.1": "9"}).sizes == (2, 9)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ModelConfig(vocab_size=8, dim=16, stages=()), r"^stages: is empty; "),
        (lambda: Stage(()), r"^pattern: is empty; "),
        (lambda: DataConfig(sources=()), r"^sources: is empty; "),
        (
            lambda: DataConfig(sources=(Source("a"),), validation=(Validation(), Validation())),
            r"^validation: names repeat: ",
        ),
        (
            lambda: ModelConfig(vocab_size=8, dim=16, stages=(Attention(heads=2),)),
            r"^stages\.0: .* is not Stage",
        ),
        (lambda: Stage((Norm(),)), r"^pattern\.0: .* is not MixerConfig"),
        (lambda: Attention(heads=0), r"^heads: 0 must be at least 1"),
    ],
)
def test_models_check_themselves(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_json_round_trip():
    data = json.loads(json.dumps(to_json(CONFIG)))
    assert data["model"]["stages"][0]["pattern"][0]["type"] == "Attention"
    back = from_json(Config, data, kinds())
    assert back == CONFIG and difference(back, CONFIG) == {}


@pytest.mark.parametrize("case", FLAT.values(), ids=FLAT.keys())
def test_json_round_trip_of_every_mixer(case):
    stage = Stage((case.cfg,), 3)
    assert from_json(Stage, json.loads(json.dumps(to_json(stage))), kinds()) == stage


def edited(path: str, value: object = None, delete: bool = False) -> dict:
    data = to_json(CONFIG)
    *parents, last = path.split(".")
    node = data
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    if delete:
        del node[last]
    else:
        node[last] = value
    return data


BAD_FILES = [
    (edited("optim.lr", delete=True), r"^optim\.lr: missing; the file was written by another version$"),
    (edited("optim.lrr", 1), r"^optim\.lrr: unknown key; did you mean lr\?$"),
    (edited("optim.lr", "1"), r"^optim\.lr: '1' is not a number; "),
    (edited("optim", 3), r"^optim: is not a table of fields; "),
    (edited("model.stages", {}), r"^model\.stages: is not a list; "),
    (
        edited("model.stages.0.pattern.0.type", "Atention"),
        r"^model\.stages\.0\.pattern\.0\.type: unknown mixer 'Atention'; did you mean Attention or LatentAttention\?$",
    ),
    (
        edited("model.stages.0.pattern.0.heads", 3),
        r"^model\.stages\.0\.pattern\.0\.heads: 3 does not divide dim=16; ",
    ),
    (
        edited("model.stages.1.pattern.0.mixers.0.window", 0),
        r"^model\.stages\.1\.pattern\.0\.mixers\.0\.window: 0 must be at least 1; ",
    ),
    (edited("train.microbatches", 3), r"^train\.microbatches: 3 does not divide train\.batch_size=8; "),
    ([], r"^config: is not a table of fields; "),
]


@pytest.mark.parametrize("data, message", BAD_FILES)
def test_a_bad_file_is_one_line(data, message):
    with pytest.raises(InputError, match=message):
        from_json(Config, data, kinds())


def test_difference_and_flatten():
    changed = override(CONFIG, {"optim.lr": 0.5, "model.stages.0.pattern.0.window": 4})
    assert difference(changed, CONFIG) == {
        "optim.lr": (0.5, 0.001),
        "model.stages.0.pattern.0.window": (4, None),
    }
    flat = flatten(CONFIG)
    assert flat["model.stages.0.pattern.1.type"] == "GatedMlp" and flat["data.sources.1.args.paths.0"] == "a"
    shorter = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, sources=CONFIG.data.sources[:1])
    )
    assert difference(shorter, CONFIG)["data.sources.1.name"] == (None, "text")


def test_nearest():
    assert nearest("lrr", ["lr", "steps"]) == "did you mean lr?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b" and nearest("zzz", []) == "there are none"
