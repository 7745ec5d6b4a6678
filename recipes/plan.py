"""The plan: the one typed, immutable value that everything downstream reads.

Hydra composes YAML into a tree (`recipes.compose`); this module gives that tree its types.  A plan says what is
trained (model), in which number format (precision), on what (gpu, stack), laid out how (mapping), on which data, for
how long, and where its folder lies.  It knows nothing of NeMo and imports nothing heavy: it is read on login nodes
and laptops.  What a plan allows, runs; the rules that refuse one stand in `recipes.rules`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Capability = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Scaling = Literal["delayed", "current", "subchannel", "mxfp8"]


class Frozen(BaseModel):
    """A part of the plan: immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(Frozen):
    """A decoder-only transformer; sizes in elements, `nemo_recipe` names the module under nemo.collections.llm."""

    name: Name
    nemo_recipe: Name
    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive
    vocab_size: Positive
    seq_length: Positive
    activation: Literal["swiglu", "squared_relu"]
    tied_embeddings: bool


class Fp8(Frozen):
    """How operands of the linear layers' GEMMs become FP8; fields that a scaling does not use keep their default."""

    scaling: Scaling
    format: Literal["hybrid", "e4m3"] = "hybrid"
    margin: NonNegative = 0
    amax_history_len: Positive = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    power_of_two_scales: bool = False
    mx_scale_rounding: Literal["up", "ocp_floor"] = "up"
    first_layers_bf16: NonNegative = 0
    last_layers_bf16: NonNegative = 0


class Precision(Frozen):
    """BF16 (`fp8` is None) or one FP8 recipe on top of it."""

    name: Name
    fp8: Fp8 | None = None


class Gpu(Frozen):
    """A device: compute capability (None: the CPU), memory in GB (1e9 bytes), dense peaks in TFLOP/s."""

    name: Name
    compute_capability: Capability | None
    memory_gb: Rate | None
    devices_per_node: Positive
    bf16_dense_tflops: Rate | None = None
    fp8_dense_tflops: Rate | None = None
    source: str


class Support(Frozen):
    """The compute capabilities on which a stack runs a scaling, both ends included, and where that is written."""

    min_capability: Capability
    max_capability: Capability | None
    source: str


class Missing(Frozen):
    """Why a stack lacks a scaling, and what to do instead."""

    reason: str
    remedy: str


class Stack(Frozen):
    """A set of versions and what it can do, by scaling."""

    name: Name
    container: str
    versions: dict[str, str]
    fp8: dict[Scaling, Support]
    missing: dict[Scaling, Missing]


class Mapping(Frozen):
    """How the model is laid out: tensor, pipeline, context and virtual-pipeline sizes; batches in sequences."""

    tp: Positive
    pp: Positive
    cp: Positive
    vp: Positive | None
    micro_batch: Positive
    global_batch: Positive


class Data(Frozen):
    """Where tokens come from, and the seed of their order (apart from the run's seed, so that seeds see one order).

    text: `sources` (text, JSONL) are tokenised into `root` once, with `tokenizer` or one trained on them.
    indexed: `train` and `heldout` are prefixes of .bin/.idx files made before; a number before one is its weight.
    mock: random tokens.
    """

    kind: Literal["text", "indexed", "mock"]
    root: str | None = None
    sources: tuple[str, ...] = Field(default=(), strict=False)
    train: tuple[str, ...] = Field(default=(), strict=False)
    heldout: tuple[str, ...] = Field(default=(), strict=False)
    tokenizer: str | None = None
    seed: NonNegative


class Executor(Frozen):
    """Where the job runs; `threads` are CPU threads a process (None: the machine's cores, shared out)."""

    kind: Literal["local"]
    max_parallel: Positive
    threads: Positive | None


class Logger(Frozen):
    """Where the metrics of the run folder are sent as well."""

    wandb: Literal["disabled", "offline", "online"]
    wandb_project: Name
    tensorboard: bool


class Train(Frozen):
    """The schedule: steps, learning rate (linear warm-up, cosine decay), Adam, and the intervals in steps."""

    max_steps: Positive
    max_lr: Rate
    min_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    warmup_steps: NonNegative
    adam_beta1: Annotated[float, Field(ge=0, lt=1)]
    adam_beta2: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    clip_grad: Rate
    eval_interval: Positive
    eval_batches: Positive
    diagnostics_interval: Positive
    checkpoint_interval: Positive
    stop_after: Positive | None


class Bar(Frozen):
    """The bar that a candidate's loss is held to, fixed before the run.

    `decides` names the limit that gives the verdict; the others are reported beside it.
    """

    decides: Literal["relative", "perplexity", "absolute"]
    relative: Rate
    perplexity: Rate
    absolute: Rate
    tail_fraction: Fraction


class Plan(Frozen):
    """One run of one cell (model x precision x gpu x stack)."""

    model: Model
    precision: Precision
    gpu: Gpu
    stack: Stack
    mapping: Mapping
    data: Data
    executor: Executor
    logger: Logger
    train: Train
    bar: Bar
    seed: Positive
    num_gpus: Positive
    seq_length: Positive
    runs_dir: str
    run_name: Name

    @property
    def emulated(self) -> bool:
        """Whether FP8 is computed by this project's numerics on the CPU."""
        return self.gpu.compute_capability is None

    @property
    def data_parallel(self) -> int:
        """The number of model replicas."""
        return self.num_gpus // (self.mapping.tp * self.mapping.pp * self.mapping.cp)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.mapping.global_batch * self.seq_length


def plan_from_json(text: str) -> Plan:
    """Return the plan written in a run folder; ValidationError if it is no plan."""
    return Plan.model_validate_json(text)
