"""Names, units and files that the rooms share: the run's config tree and the run directory. `docs/interfaces.md` in code.

Sizes are counts or bytes, times seconds, losses nats per token, learning rates the peak. `train.batch_size` is
sequences per optimizer step over all hosts.
"""

import dataclasses
from typing import Literal

from research.config import Fraction, MixerConfig, Natural, Node, NonNegative, Positive, PositiveFloat
from research.errors import InputError

SCHEMA_VERSION = 1

EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_INTERRUPTED = 0, 2, 3, 75

HEARTBEAT = 10.0  # seconds without a sign of life after which a process of several is lost; jax's own waits BACKSTOP as long
BACKSTOP = 3

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
PREDICTION_FILE = "prediction.json"
GOODPUT_FILE = "goodput.json"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"  # under CHECKPOINTS
TOKENIZER = "tokenizer"
COMPILED = "compiled"
METRICS_PREFIX = "metrics-"
LEDGER_PREFIX = "ledger-"
EVALUATION_PREFIX = "evaluation-"
LEDGER_EVENTS = ("started", "resumed", "preempted", "saved", "quarantined", "rolled_back", "skipped",
                 "alarm", "predicted", "scored", "finished")


def evaluation_file(name: str) -> str:
    """The file of a set's last evaluation by document: `heldout/average` is in evaluation-heldout.average.jsonl."""
    return f"{EVALUATION_PREFIX}{name.replace('/', '.')}.jsonl"


DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Norm(Node):
    """The normalisation around each mixer. pre: x + f(norm(x)); post: norm(x + f(x)) (Vaswani et al. 2017)."""

    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    placement: Literal["pre", "post"] = "pre"
    eps: PositiveFloat = 1e-6


@dataclasses.dataclass(frozen=True)
class Scales(Node):
    """Multipliers on the embedding's output, on each residual branch and on the logits; a parametrisation sets them."""

    embedding: PositiveFloat = 1.0
    residual: PositiveFloat = 1.0
    logits: PositiveFloat = 1.0


@dataclasses.dataclass(frozen=True)
class Stage(Node):
    """`repeats` scanned copies of a flat pattern of residual mixers."""

    pattern: tuple[MixerConfig, ...]
    repeats: Positive = 1

    def validate(self):
        if not self.pattern:
            raise InputError("pattern", "is empty", "name at least one mixer")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Node):
    """A model is a tuple of stages. `positions` is what is added to the embedding; RoPE and ALiBi belong to Attention.

    `embedding_norm`: one more norm, after the embedding (RWKV's ln0, BERT). `unroll`: layers of a stage in one turn of its
    scan; more compile longer and, on CPUs, run up to a tenth faster. `remat`: what of a layer the backward pass keeps: `full`
    its input alone, `offload` that in the host's memory, `dots` also its products with weights.
    """

    vocab_size: Positive
    dim: Positive
    stages: tuple[Stage, ...]
    encoder_stages: tuple[Stage, ...] = ()
    norm: Norm = Norm()
    embedding_norm: bool = False
    tie_embeddings: bool = False
    positions: Literal["none", "sinusoidal", "learned"] = "none"
    dropout: Fraction = 0.0
    remat: Literal["none", "full", "dots", "offload"] = "none"
    unroll: Positive = 1
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"
    max_len: Positive = 2048
    scales: Scales = Scales()

    def validate(self):
        if not self.stages:
            raise InputError("stages", "is empty", "name at least one stage")
        for field in ("stages", "encoder_stages"):
            for i, stage in enumerate(getattr(self, field)):
                for j, mixer in enumerate(stage.pattern):
                    try:
                        mixer.check(self.dim)
                    except InputError as error:
                        raise error.within(f"{field}.{i}.pattern.{j}") from None


@dataclasses.dataclass(frozen=True)
class Source(Node):
    """A row of SOURCES by name, its arguments, and its share of the mixture (weights need not sum to one).

    The weight may change while training: from `weight` at sample 0 it goes in straight lines through `later_weights`, one
    at each of `at_samples` (a sample is a row of data.seq_len tokens), and stays at the last. A point at sample 0 replaces
    `weight`: at_samples=(0, 5000), later_weights=(0, 1) fades a source in.
    """

    name: str
    args: dict = dataclasses.field(default_factory=dict)
    weight: PositiveFloat = 1.0
    at_samples: tuple[Natural, ...] = ()
    later_weights: tuple[NonNegative, ...] = ()

    def validate(self):
        if len(self.at_samples) != len(self.later_weights):
            raise InputError("later_weights", f"{len(self.later_weights)} weights at {len(self.at_samples)} points "
                             "(at_samples)", "give one weight for each point")
        if list(self.at_samples) != sorted(set(self.at_samples)):
            raise InputError("at_samples", f"{', '.join(map(str, self.at_samples))} don't rise", "put them in order")


@dataclasses.dataclass(frozen=True)
class Validation(Node):
    """A named evaluation set: the held-out documents of `data.sources`, or the whole of `sources` where given.

    `groups`: of their documents, those of these groups alone (a source's `group_by`; one without groups goes by its number
    and name, "0:text", as tools.prepare_data shows it). `by_group`: beside the set, each of its groups is one, called
    NAME-GROUP, of at most `max_rows` rows, too.
    """

    name: str = "heldout"
    sources: tuple[Source, ...] = ()
    max_rows: Positive = 256
    groups: tuple[str, ...] = ()
    by_group: bool = False


@dataclasses.dataclass(frozen=True)
class DataConfig(Node):
    """`holdout` is the share of documents, by a hash of their names, that training never sees."""

    sources: tuple[Source, ...]
    tokenizer: str = "bytes"
    seq_len: Positive = 256
    packed: bool = True
    holdout: Fraction = 0.01
    validation: tuple[Validation, ...] = (Validation(),)
    cache_dir: str = "~/.cache/rung"

    def validate(self):
        names = [v.name for v in self.validation]
        if not self.sources:
            raise InputError("sources", "is empty", "name at least one source")
        if len(set(names)) != len(names):
            raise InputError("validation", f"names repeat: {', '.join(names)}", "name each set differently")


@dataclasses.dataclass(frozen=True)
class RoleLr(Node):
    """Factors on the learning rate (and with it the decay) of the weights of a role; 0 freezes it. A tied embedding takes
    input * output."""

    input: NonNegative = 1.0
    output: NonNegative = 1.0
    vector: NonNegative = 1.0


@dataclasses.dataclass(frozen=True)
class OptimConfig(Node):
    """`lr` is the peak. `decay_steps`: length of the final decay (wsd), time scale (rsqrt; 0 = warmup_steps) or, for the
    others, of the decay after the warm-up, 0 = until the last step. `offload`: the state rests in the host's memory and comes
    to the device for the update."""

    name: str = "adamw"
    lr: NonNegative = 1e-3
    schedule: Literal["constant", "linear", "cosine", "wsd", "rsqrt"] = "cosine"
    warmup_steps: Natural = 0
    decay_steps: Natural = 0
    weight_decay: NonNegative = 0.0
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    clip_norm: NonNegative = 1.0
    z_loss: NonNegative = 0.0
    role_lr: RoleLr = RoleLr()
    offload: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig(Node):
    """`*_every` are in steps, 0 = never; `init_from` is a run directory whose parameters are loaded by path; `branch_from`,
    RUN@STEP, one whose checkpoint of that step this run goes on from: state, data and step number.

    `ema`: decay of the moving average of the parameters that is evaluated, sampled and exported instead of them, 0 = off.
    `stop_after_flat`: end the run ("saturated") after so many evaluations of the first set without an improvement beyond
    its standard error, 0 = off. `average`: the mean of the parameters of so many last checkpoints is evaluated at the end,
    too, 0 = off.
    """

    objective: str = "next_token"
    steps: Positive = 1000
    batch_size: Positive = 8
    microbatches: Positive = 1
    log_every: Positive = 10
    eval_every: Natural = 0
    sample_every: Natural = 0
    sample_prompt: str = "def "
    init_from: str | None = None
    branch_from: str | None = None
    ema: Fraction = 0.0
    average: Natural = 0
    stop_after_flat: Natural = 0

    def validate(self):
        if self.batch_size % self.microbatches:
            raise InputError("microbatches", f"{self.microbatches} does not divide train.batch_size={self.batch_size}",
                             "choose a divisor")
        if self.branch_from and self.init_from:
            raise InputError("branch_from", "and init_from both say what the run begins with", "give one of the two")
        if self.stop_after_flat and not self.eval_every:
            raise InputError("stop_after_flat", f"{self.stop_after_flat} counts evaluations, and eval_every is 0",
                             "set train.eval_every")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Node):
    """Sizes of the mesh axes; 0 = automatic: what is left for the axis that `rules` scales over, 1 for the others."""

    rules: str = "dp"
    data: Natural = 0
    fsdp: Natural = 0
    tensor: Natural = 0
    expert: Natural = 0
    context: Natural = 0
    slices: Positive = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Node):
    """When to save (0 = never by that clock; always at the end) and what to keep: the `keep_last` newest good ones,
    multiples of `keep_every`, and the steps `keep_at`, which are saved, too.

    `on_full`: when a save finds the disk full, go on training (and try again when the next is due), or stop with exit code 75.
    """

    every_steps: Natural = 0
    every_minutes: NonNegative = 5.0
    keep_last: Positive = 2
    keep_every: Natural = 0
    keep_at: tuple[Natural, ...] = ()
    on_full: Literal["continue", "stop"] = "continue"


@dataclasses.dataclass(frozen=True)
class GuardConfig(Node):
    """When the run goes back, and how often (training/guard.py).

    A loss is a spike if for `patience` steps in a row it is more than `spike_zscore` robust standard deviations above the
    median of the last `window` (0 = spikes are not looked for); a weight of `data.sources` that jumps can look like one. Not
    finite is always an alarm. If it comes again on the same data: from a checkpoint `rollback_steps` before it, without
    `skip_batches` batches. After `max_rollbacks` for one place the run ends (0 = at the first alarm).
    """

    spike_zscore: NonNegative = 8.0
    window: Positive = 128
    patience: Positive = 3
    rollback_steps: Natural = 100
    skip_batches: Positive = 200
    max_rollbacks: Natural = 4


@dataclasses.dataclass(frozen=True)
class Config(Node):
    """Everything a run is; written whole to the run directory."""

    name: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    seed: Natural = 0

    def validate(self):
        if self.data.seq_len > self.model.max_len:
            raise InputError("data.seq_len", f"{self.data.seq_len} is above model.max_len={self.model.max_len}",
                             "raise model.max_len or shorten the rows")
        if self.train.stop_after_flat and not self.data.validation:
            raise InputError("train.stop_after_flat", "needs an evaluation set", "name one in data.validation")
        if self.optim.warmup_steps >= self.train.steps and self.optim.warmup_steps:
            raise InputError("optim.warmup_steps", f"{self.optim.warmup_steps} leaves nothing of train.steps="
                             f"{self.train.steps}", "warm up for fewer steps")
