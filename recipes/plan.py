"""The plan: the one typed, immutable value that everything downstream reads.

Hydra composes YAML into a tree (`recipes.compose.tree`); this module gives that tree its types.  A
plan says what is trained (model), in which number format (precision), on what (gpu, stack), laid
out how (mapping), on which data, for how long, and where its folder lies.  It knows nothing of NeMo
and imports nothing heavy: it is read on login nodes and laptops.  What a plan allows, runs; the
rules that refuse one stand in `recipes.compose.rules`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import from_json

from recipes.nemo_recipes import with_architecture

Positive = Annotated[
    int, Field(gt=0, lt=2**53)
]  # exact as a float, which memory and time are reckoned in
NonNegative = Annotated[int, Field(ge=0, lt=2**53)]
Few = Annotated[int, Field(gt=0, le=10_000)]  # of what the plan goes through one by one
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Capability = Annotated[str, Field(pattern=r"^\d{1,3}\.\d{1,3}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Text = Annotated[
    str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4000)
]  # no control characters: it may stand in a script
Value = Annotated[
    Text, BeforeValidator(lambda value: str(value) if type(value) is int else value)
]  # X=1 needs no quotes
Weighted = Annotated[
    Text, BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)
]  # a path or its weight


def _three_shares(value: object) -> object:
    """Return Megatron's `--split` as text: "949,50,1" or [949, 50, 1], the last 0 where left
    out.
    """
    items = value.split(",") if isinstance(value, str) else value
    try:
        shares = [float(item) for item in items] if isinstance(items, list | tuple) else []
        right = (
            2 <= len(shares) <= 3 and all(s > 0 for s in shares[:2]) and all(s >= 0 for s in shares)
        )
        if not right or not math.isfinite(sum(shares)):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            "is no split; write shares of train, held-out and test documents as [949,50,1], the"
            " first two above 0"
        ) from None
    return ",".join(f"{share:.17g}" for share in (*shares, 0.0)[:3])


Split = Annotated[Text, BeforeValidator(_three_shares)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
Seed = Annotated[int, Field(gt=0, lt=2**32)]
Scaling = Literal["delayed", "current", "subchannel", "mxfp8"]


class Frozen(BaseModel):
    """A part of the plan: immutable, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Convergence(Frozen):
    """How a model was trained, as published: linear warm-up, then cosine decay.

    `batch_tokens`: tokens in a global batch; None where nothing is published.  `source`: where the
    values are from.
    """

    max_lr: Rate
    min_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    warmup_steps: NonNegative
    batch_tokens: Positive | None = None
    source: Text


class Model(Frozen):
    """A decoder-only transformer; sizes in elements, `nemo_recipe` names the module under
    nemo.collections.llm.

    `embedding_and_loss_count_as_layers`: whether pipeline stages are cut as if the embedding and
    the loss were a layer each (NeMo's account_for_embedding_in_pipeline_split and
    account_for_loss_in_pipeline_split). `convergence`: the published schedule, for what `train` and
    the global batch leave null; None: recipes/estimate/schedule.py's.

    The fields from `head_size` on are the architecture of the NeMo recipe
    (recipes/nemo_recipes.py); null takes the recipe's value.  `head_size`: of an attention head,
    where it is not hidden_size / num_attention_heads. `sliding_window`: keys that a query sees
    before its own.  `fused_activation`: one kernel for the activation function. `normalization`: 1p
    is a gain that is stored less one.  `post_norms`: a norm behind attention and MLP too.
    `rope_scaling`: the factor of Llama 3.1's frequencies.  `*_softcap`: c in c tanh(x / c), of
    attention scores and logits. `embedding_scaling`: embeddings times the root of hidden_size.
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
    activation: Literal["swiglu", "geglu", "gelu", "squared_relu"]
    tied_embeddings: bool
    embedding_and_loss_count_as_layers: bool = False
    convergence: Convergence | None = None
    head_size: Positive | None = None
    sliding_window: Positive | None = None
    fused_activation: bool | None = None
    normalization: Literal["rmsnorm", "rmsnorm1p", "layernorm", "layernorm1p"] | None = None
    post_norms: bool | None = None
    linear_bias: bool | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    position_embedding: Literal["rope", "learned_absolute"] | None = None
    rotary_base: Rate | None = None
    rotary_percent: Fraction | None = None
    rope_scaling: Rate | None = None
    attention_softcap: Rate | None = None
    logit_softcap: Rate | None = None
    embedding_scaling: bool | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None

    def is_built_as(self, other: Model) -> bool:
        """Whether both are one network: all fields but the published schedule, which plans of older
        runs lack.
        """
        return self.model_copy(update={"convergence": None}) == other.model_copy(
            update={"convergence": None}
        )

    @property
    def head(self) -> int:
        """The size of an attention head."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two halves of its first linear map, one of them through the
        activation function.
        """
        return self.activation in ("swiglu", "geglu")


class Fp8(Frozen):
    """How operands of the linear layers' GEMMs become FP8; fields that a scaling does not use keep
    their default.

    `param_gather`: parameters are kept and gathered in FP8 (NeMo's fp8_param_gather); it has no
    meaning on the CPU.
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
    """A device: compute capability (None: the CPU), memory in GB (1e9 bytes), dense peaks in
    TFLOP/s.

    `min_cuda`: the first CUDA whose compiler knows the device; None: any that a stack has.
    `nvlink_domain`: devices joined by NVLink beyond a node (GB200: 72); None where the node is the
    domain. `device_name`: what nvidia-smi's name of it holds; None: the job does not ask.
    `nvlink_multicast`: whether an NVSwitch joins them, which multicast needs. `gpus_per_numa_node`:
    by which ranks of a node are bound to processors.  `mapped_like`: the GPU whose recommended
    mappings serve this one too.  `hbm_tb_s`, `nvlink_gb_s` (both directions together) and
    `nic_gbit_s` (a GPU's share of its node's network adapters): bandwidths that predictions divide
    by; `tdp_w`: the power that limits its clock, in watts.  None: this GPU has no predictions.
    """

    name: Name
    compute_capability: Capability | None
    min_cuda: Capability | None = None
    memory_gb: Rate | None
    devices_per_node: Positive
    gpus_per_numa_node: Positive | None = None
    device_name: Text | None = None
    nvlink_domain: Positive | None = None
    nvlink_multicast: bool = True
    mapped_like: Name | None = None
    bf16_dense_tflops: Rate | None = None
    fp8_dense_tflops: Rate | None = None
    hbm_tb_s: Rate | None = None
    nvlink_gb_s: Rate | None = None
    nic_gbit_s: Rate | None = None
    tdp_w: Rate | None = None
    source: str


class Support(Frozen):
    """Where a stack runs a scaling, where that is written, and what to do elsewhere.

    Compute capabilities have both ends included.  `min_cuda`: the CUDA that its GEMMs need of the
    stack (None: any that the stack's GPUs run on).
    """

    min_capability: Capability
    max_capability: Capability | None
    min_cuda: Capability | None = None
    source: str
    remedy: str


class Missing(Frozen):
    """Why a stack lacks a scaling, and what to do instead."""

    reason: str
    remedy: str


class CannotOverlap(Frozen):
    """Why tensor-parallel communication cannot overlap with GEMMs, and where that is written."""

    reason: str
    source: str


class Userbuffers(Frozen):
    """What a stack can overlap of tensor-parallel communication with GEMMs (Transformer Engine's
    userbuffers).

    `bootstrap`: the torch.distributed backend that sets them up.  `sizes`: the tensor-parallel
    sizes that have kernels.  `overlaps`: "bf16" or a scaling -> where it is written that it
    overlaps in all three GEMMs of a layer (output, input gradient, weight gradient).  `fails`:
    those that do not overlap; "bf16_layers" are layers kept in BF16 beside FP8 ones, "fsdp" is
    Megatron-Core's FSDP.
    """

    bootstrap: Literal["nccl", "gloo", "mpi"]
    bootstrap_source: str
    sizes: tuple[Positive, ...] = Field(strict=False)
    sizes_source: str
    overlaps: dict[Literal["bf16"] | Scaling, str]
    fails: dict[Literal["bf16_layers", "fsdp"] | Scaling, CannotOverlap]


class Where(Frozen):
    """Which plans something is for: all, or those on some GPUs, of some NeMo recipes, with or
    without FSDP.

    `gpus` and `not_gpus` are names of conf/gpu; a GPU counts as the one that it is `mapped_like`
    too.  `recipes` are the models' `nemo_recipe`.  `several_gpus`: not where a single GPU trains,
    as nothing is communicated there.
    """

    gpus: tuple[Name, ...] | None = Field(default=None, strict=False)
    not_gpus: tuple[Name, ...] = Field(default=(), strict=False)
    recipes: tuple[Name, ...] | None = Field(default=None, strict=False)
    fsdp: bool | None = None
    several_gpus: bool = False

    def holds(self, plan: Plan) -> bool:
        """Whether the plan is one of them."""
        names = {plan.gpu.name, plan.gpu.mapped_like}
        return (
            (self.gpus is None or not names.isdisjoint(self.gpus))
            and names.isdisjoint(self.not_gpus)
            and (self.recipes is None or plan.model.nemo_recipe in self.recipes)
            and self.fsdp in (None, plan.mapping.fsdp)
            and not (self.several_gpus and plan.num_gpus == 1)
        )


class ScriptVariable(Frozen):
    """An environment variable that a stack's performance scripts set, why, and where that is
    written.
    """

    name: Variable
    value: Value
    why: Text
    source: Text
    where: Where = Where()


class WholeBuffers(Frozen):
    """GEMMs of a layer whose userbuffers are gathered in pieces as they are, not two at once
    (`aggregate` is off).
    """

    gemms: tuple[Name, ...] = Field(strict=False)
    source: Text
    where: Where


class OptimizerInstances(Frozen):
    """How many GPUs share one copy of the optimizer's state; more GPUs have more copies."""

    gpus_per_instance: Positive
    source: Text
    where: Where


class Scripts(Frozen):
    """What the performance scripts of a stack's NeMo set beside the layout, where versions differ.

    `check_gradients`: Megatron-Core's check_for_nan_in_grad under settings that measure speed.
    `mxfp8_parameters`: whether parameters under MXFP8 are kept in FP8 and gathered, without
    overlap, through the gradient buffer. `fsdp_average_in_collective`: whether FSDP averages BF16
    gradients in the collective (FP32 ones it never does).
    """

    variables: tuple[ScriptVariable, ...] = Field(default=(), strict=False)
    check_gradients: bool = True
    mxfp8_parameters: bool = False
    fsdp_average_in_collective: bool = False
    without_aggregate: tuple[WholeBuffers, ...] = Field(default=(), strict=False)
    optimizer_instances: tuple[OptimizerInstances, ...] = Field(default=(), strict=False)


class Stack(Frozen):
    """A set of versions and what it can do, by scaling.

    `recommended`: the NeMo tag whose recommended mappings it takes.  `fp8_parameters_with_fsdp`:
    whether FSDP can shard parameters kept in FP8.  `emulates_fp8`: whether FP8 on a GPU is this
    project's (recipes/training/fp8), not the GPU's own. `userbuffers`: None where the stack's file
    does not say what they can do.  `graphs_drop_bf16_layers`: why CUDA graphs run layers in FP8
    that are kept in BF16 (None: they do not).  `fsdp_drops_gradients`: why a precision-aware
    optimizer updates nothing under FSDP (None: it does).  `cuda`: the container's; None where there
    is no container.  The job asks for the real one (launch.preflight).  `scripts`: what its
    performance scripts set. `offloads_swiglu`: whether activation offloading takes SwiGLU's input
    along, which Megatron-Core keeps and not Transformer Engine.
    """

    name: Name
    container: str | None
    versions: dict[str, str]
    recommended: str
    fp8_parameters_with_fsdp: bool
    emulates_fp8: bool = False
    fp8: dict[Scaling, Support]
    missing: dict[Scaling, Missing]
    userbuffers: Userbuffers | None = None
    graphs_drop_bf16_layers: str | None = None
    fsdp_drops_gradients: str | None = None
    cuda: Capability | None = None
    offloads_swiglu: bool = False
    scripts: Scripts = Scripts()

    @field_validator("versions")
    @classmethod
    def _names_nemo(cls, versions: dict[str, str]) -> dict[str, str]:
        if "nemo" not in versions:
            raise ValueError("it names no version of nemo, which decides the recipes; add nemo: …")
        return versions

    def version(self, package: str) -> tuple[int, ...]:
        """Return major and minor version of a package; () where the stack names none."""
        return tuple(int(part) for part in re.findall(r"\d+", self.versions.get(package, ""))[:2])


class Mapping(Frozen):
    """How the model is laid out: tensor, pipeline, context and virtual-pipeline sizes (vp 1: none);
    batches in sequences.

    `fsdp`: Megatron-Core's FSDP, which shards parameters, gradients and optimizer state over the
    data-parallel ranks. `recompute_layers`: layers a pipeline stage (a chunk of it, under vp) whose
    activations are computed again backward. `offload_layers`: layers whose activations wait in host
    memory.  `source`: where the layout comes from. `tp_overlap`: whether tensor-parallel
    communication overlaps with GEMMs; None: where the stack can (recipes.overlap).
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
    tp_overlap: bool | None = None


class Data(Frozen):
    """Where tokens come from, and the seed of their order (apart from the run's seed, so that seeds
    see one order).

    text: `sources` (text, JSONL) are tokenised into `root` once, with `tokenizer` or one trained on
    them. indexed: `train` and `heldout` are prefixes of .bin/.idx files made before; a number
    before one is its weight. `split` cuts each prefix of `train` by documents in place of
    `heldout`: shares of train, held-out and test, as Megatron's --split and NeMo's
    PreTrainingDataModule.split. mock: random tokens. `reset_attention_mask`: a token attends to its
    own document alone (NeMo's PreTrainingDataModule).  `eod_mask_loss`: the end of a document is no
    token of the loss, in training and held out. `tokenizer`: a Hugging Face folder or name, or a
    SentencePiece model (a .model file, or a folder with one). `demo_text`: whether a job on a
    cluster may train on the sources of Python's standard library.
    """

    kind: Literal["text", "indexed", "mock"]
    root: Text | None = None
    sources: tuple[Text, ...] = Field(default=(), strict=False)
    train: tuple[Weighted, ...] = Field(default=(), strict=False)
    heldout: tuple[Weighted, ...] = Field(default=(), strict=False)
    split: Split | None = None
    tokenizer: Text | None = None
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    demo_text: bool = False
    seed: NonNegative

    @property
    def is_demo_text(self) -> bool:
        """Whether it is text, and no source is named: Python's standard library."""
        return self.kind == "text" and not self.sources


class Executor(Frozen):
    """How the job runs: on this machine, or submitted to Slurm.

    local: `max_parallel` runs of a sweep side by side; `threads` are CPU threads a process (None:
    the machine's cores, shared out).  slurm: `time_limit` as sbatch takes it; `stop_before_limit_s`
    seconds before it the run is told to save and is queued again; at most `max_restarts` times,
    whatever ended it; `chain` jobs are submitted, each after the last.
    """

    kind: Literal["local", "slurm"]
    max_parallel: Positive
    threads: Positive | None
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:[0-5]\d){0,2}$")]
    stop_before_limit_s: Positive
    max_restarts: NonNegative
    chain: Few


class Cluster(Frozen):
    """A site: what its Slurm wants to be told, and how containers and secrets reach the job
    (conf/cluster).

    `container_runtime`: pyxis (`srun --container-image`) or none, where the stack is installed on
    the nodes and `python` names its interpreter.  `token_files`: environment variable -> file on
    the node that holds the secret.
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
    """The schedule: steps, learning rate (linear warm-up, cosine decay), Adam, and the intervals in
    steps.

    `on_non_finite`: whether NaN or Inf in loss or gradients stops the run, or the step's update is
    skipped. `step_timeout_s`: a rank that gets no further for so long ends the job. `log_interval`:
    steps between training lines in the job's log, at most a tenth of the run (`is_printed`).
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
    step_timeout_s: Annotated[int, Field(gt=0, le=10**7)] = (
        1800  # four months, well below what the clock of a thread takes
    )
    log_interval: Positive = 10

    def is_printed(self, step: int) -> bool:
        """Return whether the job's log gets a line for a step: each `log_interval`, at least ten,
        and the last.
        """
        interval = min(self.log_interval, max(1, self.max_steps // 10))
        return step % interval == 0 or step == self.max_steps


class Settings(Frozen):
    """What NVIDIA's performance scripts set otherwise than for training that must converge
    (conf/settings).

    `precision_aware_optimizer`: Adam moments and main parameters as Transformer Engine's FusedAdam
    keeps them. `bf16_layers`: whether a recipe's first and last layers in BF16 are kept; the
    scripts drop them "for benchmarking". `adam_moments`: their type; BF16 needs the precision-aware
    optimizer.  `count_zero_gradients`: whether Megatron-Core 0.12 may count the zeros of the
    gradients in each step, which nobody asked for (optimizer/optimizer.py:1144).
    `gradient_accumulation_fusion`: whether weight gradients are added to the gradient buffer inside
    their GEMM. `layout`: whether a recommended layout that leaves no margin of memory gives way to
    the nearest that does (recipes.compose.fitting). `batch`: which global batch a plan takes that
    names none: the one that the model was trained with, or the layout's. `adam_kernel`: what
    updates parameters with BF16 moments, Transformer Engine's FusedAdam or this project's Triton
    kernel. `swiglu_backward`: whose kernel computes SwiGLU's gradient, the one that Megatron-Core
    has PyTorch compile or Transformer Engine's. `check_gradients`: whether Megatron-Core looks for
    NaN and Inf in gradients before they are reduced, which waits for the device; without it the
    loss of the next step shows them.
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
    batch: Literal["model", "layout"] = "layout"
    adam_kernel: Literal["transformer_engine", "triton"] = "transformer_engine"
    swiglu_backward: Literal["megatron_core", "transformer_engine"] = "megatron_core"
    check_gradients: bool = True
    layout: Literal["fitting", "recommended"] = "recommended"


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
        """Whether numbers are those of this project's numerics and not of a GPU's own: on the CPU,
        and in FP8 on a stack that emulates it.

        BF16 on such a stack is BF16 as on any other.
        """
        return self.on_cpu or (self.stack.emulates_fp8 and self.precision.fp8 is not None)

    @property
    def data_parallel(self) -> int:
        """The number of model replicas."""
        return self.num_gpus // (self.mapping.tp * self.mapping.pp * self.mapping.cp)

    @property
    def optimizer_instances(self) -> int:
        """Copies of what FSDP shards, each over its own share of the data-parallel ranks; 1 where
        the stack's scripts make none.
        """
        found = (each for each in self.stack.scripts.optimizer_instances if each.where.holds(self))
        copies = next(
            (
                self.num_gpus // each.gpus_per_instance
                for each in found
                if self.num_gpus % each.gpus_per_instance == 0
            ),
            1,
        )
        return copies if copies and self.data_parallel * self.mapping.cp % copies == 0 else 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one global batch."""
        return self.mapping.global_batch * self.seq_length


def plan_from_json(text: str) -> Plan:
    """Return the plan written in a run folder, of this version or an older one; ValueError if it is
    no plan.
    """
    tree = from_json(text)
    return Plan.model_validate(with_architecture(tree) if isinstance(tree, dict) else tree)
