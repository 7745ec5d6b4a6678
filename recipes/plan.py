"""The plan: the one typed, immutable value that everything downstream reads.

Hydra composes YAML into a tree (`recipes.compose`); this module gives that tree its types.  A plan says what is
trained (model), in which number format (precision), on what (gpu, stack), laid out how (mapping), on which data, for
how long, and where its folder lies.  It knows nothing of NeMo and imports nothing heavy: it is read on login nodes
and laptops.  What a plan allows, runs; the rules that refuse one stand in `recipes.rules`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**53)]  # exact as a float, which memory and time are reckoned in
NonNegative = Annotated[int, Field(ge=0, lt=2**53)]
Few = Annotated[int, Field(gt=0, le=10_000)]  # of what the plan goes through one by one
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Capability = Annotated[str, Field(pattern=r"^\d{1,3}\.\d{1,3}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4000)]  # no control characters: it may stand in a script
Value = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)]  # X=1 needs no quotes
Weighted = Annotated[Text, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)]  # a path or its weight


def _three_shares(value: object) -> object:
    """Return Megatron's `--split` as text: "949,50,1" or [949, 50, 1], the last 0 where left out."""
    items = value.split(",") if isinstance(value, str) else value
    try:
        shares = [float(item) for item in items] if isinstance(items, list | tuple) else []
        right = 2 <= len(shares) <= 3 and min(shares[:2]) > 0 and min(shares) >= 0
        if not right or sum(shares) == float("inf"):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError("is no split; write shares of train, held-out and test documents as [949,50,1], the first two above 0") from None
    return ",".join(f"{share:.17g}" for share in (*shares, 0.0)[:3])


Split = Annotated[Text, BeforeValidator(_three_shares)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
Seed = Annotated[int, Field(gt=0, lt=2**32)]
Scaling = Literal["delayed", "current", "subchannel", "mxfp8"]


class Frozen(BaseModel):
    """A part of the plan: immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(Frozen):
    """A decoder-only transformer; sizes in elements, `nemo_recipe` names the module under nemo.collections.llm.

    `embedding_and_loss_count_as_layers`: whether pipeline stages are cut as if the embedding and the loss were a layer each
    (NeMo's account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split).
    """

    name: Name
    nemo_recipe: Name
    num_layers: Few
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive
    vocab_size: Positive
    seq_length: Positive
    activation: Literal["swiglu", "squared_relu"]
    tied_embeddings: bool
    embedding_and_loss_count_as_layers: bool = False


class Fp8(Frozen):
    """How operands of the linear layers' GEMMs become FP8; fields that a scaling does not use keep their default.

    `param_gather`: parameters are kept and gathered in FP8 (NeMo's fp8_param_gather); it has no meaning on the CPU.
    """

    scaling: Scaling
    format: Literal["hybrid", "e4m3"] = "hybrid"
    margin: NonNegative = 0
    amax_history_len: Positive = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    power_of_two_scales: bool = False
    mx_scale_rounding: Literal["up", "ocp_floor"] = "up"
    first_layers_bf16: NonNegative = 0
    last_layers_bf16: NonNegative = 0
    param_gather: bool = False


class Precision(Frozen):
    """BF16 (`fp8` is None) or one FP8 recipe on top of it."""

    name: Name
    fp8: Fp8 | None = None


class Gpu(Frozen):
    """A device: compute capability (None: the CPU), memory in GB (1e9 bytes), dense peaks in TFLOP/s.

    `nvlink_domain`: devices joined by NVLink beyond a node (GB200: 72); None where the node is the domain.
    `gpus_per_numa_node`: by which ranks of a node are bound to processors.  `mapped_like`: the GPU whose recommended
    mappings serve this one too.  `hbm_tb_s`, `nvlink_gb_s` (both directions together) and `nic_gbit_s` (a GPU's share of its
    node's network adapters): bandwidths that predictions divide by; `tdp_w`: the power that limits its clock, in watts.  None: this GPU has
    no predictions.
    """

    name: Name
    compute_capability: Capability | None
    memory_gb: Rate | None
    devices_per_node: Positive
    gpus_per_numa_node: Positive | None = None
    nvlink_domain: Positive | None = None
    mapped_like: Name | None = None
    bf16_dense_tflops: Rate | None = None
    fp8_dense_tflops: Rate | None = None
    hbm_tb_s: Rate | None = None
    nvlink_gb_s: Rate | None = None
    nic_gbit_s: Rate | None = None
    tdp_w: Rate | None = None
    source: str


class Support(Frozen):
    """The compute capabilities on which a stack runs a scaling, both ends included, where that is written, and what to do elsewhere."""

    min_capability: Capability
    max_capability: Capability | None
    source: str
    remedy: str


class Missing(Frozen):
    """Why a stack lacks a scaling, and what to do instead."""

    reason: str
    remedy: str


class Stack(Frozen):
    """A set of versions and what it can do, by scaling.

    `recommended`: the NeMo tag whose recommended mappings it takes.  `fp8_parameters_with_fsdp`: whether FSDP can shard
    parameters kept in FP8.  `emulates_fp8`: whether FP8 on a GPU is this project's (recipes/training/fp8), not the GPU's own.
    """

    name: Name
    container: str | None
    versions: dict[str, str]
    recommended: str
    fp8_parameters_with_fsdp: bool
    emulates_fp8: bool = False
    fp8: dict[Scaling, Support]
    missing: dict[Scaling, Missing]


class Mapping(Frozen):
    """How the model is laid out: tensor, pipeline, context and virtual-pipeline sizes (vp 1: none); batches in sequences.

    `fsdp`: Megatron-Core's FSDP, which shards parameters, gradients and optimizer state over the data-parallel ranks.
    `recompute_layers`: layers a pipeline stage (a chunk of it, under vp) whose activations are computed again backward.
    `offload_layers`: layers whose activations wait in host memory.  `source`: where the layout comes from.
    """

    tp: Positive
    pp: Positive
    cp: Positive
    vp: Positive
    micro_batch: Positive
    global_batch: Positive
    cuda_graphs: bool
    fsdp: bool
    recompute_layers: NonNegative
    offload_layers: NonNegative
    source: str


class Data(Frozen):
    """Where tokens come from, and the seed of their order (apart from the run's seed, so that seeds see one order).

    text: `sources` (text, JSONL) are tokenised into `root` once, with `tokenizer` or one trained on them.
    indexed: `train` and `heldout` are prefixes of .bin/.idx files made before; a number before one is its weight.
    `split` cuts each prefix of `train` by documents in place of `heldout`: shares of train, held-out and test, as Megatron's
    --split and NeMo's PreTrainingDataModule.split.
    mock: random tokens.
    `tokenizer`: a Hugging Face folder or name, or a SentencePiece model (a .model file, or a folder with one).
    `demo_text`: whether a job on a cluster may train on the sources of Python's standard library.
    """

    kind: Literal["text", "indexed", "mock"]
    root: Text | None = None
    sources: tuple[Text, ...] = Field(default=(), strict=False)
    train: tuple[Weighted, ...] = Field(default=(), strict=False)
    heldout: tuple[Weighted, ...] = Field(default=(), strict=False)
    split: Split | None = None
    tokenizer: Text | None = None
    demo_text: bool = False
    seed: NonNegative

    @property
    def is_demo_text(self) -> bool:
        """Whether it is text, and no source is named: Python's standard library."""
        return self.kind == "text" and not self.sources


class Executor(Frozen):
    """How the job runs: on this machine, or submitted to Slurm.

    local: `max_parallel` runs of a sweep side by side; `threads` are CPU threads a process (None: the machine's cores,
    shared out).  slurm: `time_limit` as sbatch takes it; `stop_before_limit_s` seconds before it the run is told to save
    and is queued again; at most `max_restarts` times, whatever ended it; `chain` jobs are submitted, each after the last.
    """

    kind: Literal["local", "slurm"]
    max_parallel: Positive
    threads: Positive | None
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:[0-5]\d){0,2}$")]
    stop_before_limit_s: Positive
    max_restarts: NonNegative
    chain: Few


class Cluster(Frozen):
    """A site: what its Slurm wants to be told, and how containers and secrets reach the job (conf/cluster).

    `container_runtime`: pyxis (`srun --container-image`) or none, where the stack is installed on the nodes and
    `python` names its interpreter.  `token_files`: environment variable -> file on the node that holds the secret.
    """

    name: Name
    account: Text | None
    partition: Text | None
    qos: Text | None
    reservation: Text | None
    gpus_flag: Literal["gpus-per-node", "gres", "none"]
    mpi: Text | None
    exclusive: bool
    numa_binding: bool
    vboost: bool
    segment: Literal["auto"] | None
    container_runtime: Literal["pyxis", "none"]
    container_image: Text | None
    python: Text
    mounts: tuple[Text, ...] = Field(strict=False)
    extra_sbatch: tuple[Text, ...] = Field(strict=False)
    extra_srun: tuple[Text, ...] = Field(strict=False)
    environment: dict[Variable, Value]
    token_files: dict[Variable, Text]


class Logger(Frozen):
    """Where the metrics of the run folder are sent as well."""

    wandb: Literal["disabled", "offline", "online"]
    wandb_project: Name
    tensorboard: bool


class Train(Frozen):
    """The schedule: steps, learning rate (linear warm-up, cosine decay), Adam, and the intervals in steps.

    `on_non_finite`: whether NaN or Inf in loss or gradients stops the run, or the step's update is skipped.
    `step_timeout_s`: a rank that gets no further for so long ends the job.
    """

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
    on_non_finite: Literal["stop", "skip"] = "stop"
    step_timeout_s: Annotated[int, Field(gt=0, le=10**7)] = 1800  # four months, well below what the clock of a thread takes


class Settings(Frozen):
    """What NVIDIA's performance scripts set otherwise than for training that must converge (conf/settings).

    `precision_aware_optimizer`: Adam moments and main parameters as Transformer Engine's FusedAdam keeps them.
    `bf16_layers`: whether a recipe's first and last layers in BF16 are kept; the scripts drop them "for benchmarking".
    `adam_moments`: their type; BF16 needs the precision-aware optimizer.  `count_zero_gradients`: whether Megatron-Core 0.12
    may count the zeros of the gradients in each step, which nobody asked for (optimizer/optimizer.py:1144).
    `gradient_accumulation_fusion`: whether weight gradients are added to the gradient buffer inside their GEMM.
    """

    name: Name
    grad_reduce_in_fp32: bool
    precision_aware_optimizer: bool
    cross_entropy_fusion: Literal["native", "te"]
    overlap_param_gather_with_optimizer_step: bool
    bf16_layers: bool
    checkpoints: bool
    evaluation: bool
    adam_moments: Literal["fp32", "bf16"] = "fp32"
    count_zero_gradients: bool = True
    gradient_accumulation_fusion: bool = True


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
    cluster: Cluster
    logger: Logger
    train: Train
    settings: Settings
    bar: Bar
    seed: Seed
    num_gpus: Positive
    seq_length: Positive
    runs_dir: Text
    run_name: Name

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on this machine's CPU."""
        return self.gpu.compute_capability is None

    @property
    def emulated(self) -> bool:
        """Whether numbers are those of this project's numerics and not of a GPU's own: on the CPU, and in FP8 on a stack that emulates it.

        BF16 on such a stack is BF16 as on any other.
        """
        return self.on_cpu or (self.stack.emulates_fp8 and self.precision.fp8 is not None)

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
