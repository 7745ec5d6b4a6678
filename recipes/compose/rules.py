"""What refuses a plan before anything runs: each rule is a small function that returns a sentence
or None.

A sentence says what is wrong, why, and what to do instead.  The order is that in which a user would
want to hear: the cell first (can this stack run this recipe on this device?), then the shapes, then
what fits.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from recipes.compose.defaults import DROPPED
from recipes.compose.fit import State, state
from recipes.compose.layout_rules import MAPPING_RULES, Rule
from recipes.compose.model_rules import MODEL_RULES
from recipes.compose.nearest import MORE_GPUS, nearest, overrides
from recipes.compose.remedies import Change, Refusal, with_batches
from recipes.compose.remedies import overrides as of_change
from recipes.data.files import read_by_job, wrong_data
from recipes.errors import InputError
from recipes.estimate.memory import estimate, usable_gb
from recipes.estimate.sizes import training_state_gb
from recipes.plan import Plan

Accepts = Callable[
    [Change], State
]  # how the plan with a change fits; refused where a rule refuses it
MOST_TRIED = 4  # changes that are composed to find a remedy, 0.1 s each
BF16_MOMENTS_SINCE = (2, 3)  # the first Transformer Engine whose FusedAdam keeps them
SECRET_WORDS = (
    "TOKEN",
    "SECRET",
    "PASSWORD",
    "PASSWD",
    "API_KEY",
    "APIKEY",
    "ACCESS_KEY",
    "CREDENTIAL",
)


def capability(text: str) -> tuple[int, int]:
    """Return a compute capability such as "9.0" as (major, minor)."""
    major, minor = text.split(".")
    return int(major), int(minor)


def cell_is_supported(plan: Plan) -> str | None:
    """The stack must know the scaling, and on this compute capability; on the CPU every scaling is
    emulated.
    """
    fp8, device = plan.precision.fp8, plan.gpu.compute_capability
    if fp8 is None or device is None:
        return None
    cell = f"{plan.precision.name} on {plan.gpu.name} with {plan.stack.name}"
    if fp8.scaling in plan.stack.missing:
        missing = plan.stack.missing[fp8.scaling]
        return _of_other_axes(f"{cell}: {missing.reason}", missing.remedy)
    if fp8.scaling not in plan.stack.fp8:
        return (
            f"{cell}: the stack does not list {fp8.scaling} scaling; choose one of"
            f" {', '.join(plan.stack.fp8)}"
        )
    support = plan.stack.fp8[fp8.scaling]
    low, high = support.min_capability, support.max_capability
    if capability(device) < capability(low) or (high and capability(device) > capability(high)):
        allowed = f"{low} or higher" if high is None else low if low == high else f"{low} to {high}"
        return _of_other_axes(
            f"{cell}: needs compute capability {allowed} and not {device} ({support.source})",
            support.remedy,
        )
    return None


def cuda_knows_the_gpu(plan: Plan) -> str | None:
    """The CUDA of the stack's container must know the GPU; where the job runs in no such container,
    the job asks (launch.preflight).
    """
    c, needed, have = plan.cluster, plan.gpu.min_cuda, plan.stack.cuda
    in_own = (
        plan.executor.kind == "slurm"
        and c.container_runtime == "pyxis"
        and c.container_image is None
    )
    if not in_own or needed is None or have is None or capability(have) >= capability(needed):
        return None
    where = f"conf/gpu/{plan.gpu.name}.yaml, min_cuda"
    what = (
        f"{plan.gpu.name} with {plan.stack.name}: needs CUDA {needed} or newer and not {have}"
        f" ({where})"
    )
    advice = f"set cluster.container_image to one that has CUDA {needed}"
    return Refusal(what, advice, {"stack": "nemo_25_07"}, any_of=True)


def cuda_is_new_enough(plan: Plan) -> str | None:
    """The stack's CUDA must have the GEMMs of the scaling; where the stack states none, the job
    asks (launch.preflight).
    """
    needed, have = _cuda_of_scaling(plan), plan.stack.cuda
    if needed is None or have is None or capability(have) >= capability(needed):
        return None
    fp8 = plan.precision.fp8
    assert fp8
    source = plan.stack.fp8[fp8.scaling].source
    cell = f"{plan.precision.name} with {plan.stack.name}"
    return (
        f"{cell}: needs CUDA {needed} or newer and not {have} ({source}); choose a stack that has"
        " it, or precision=fp8_current"
    )


def _cuda_of_scaling(plan: Plan) -> str | None:
    fp8 = plan.precision.fp8
    if fp8 is None or plan.emulated or fp8.scaling not in plan.stack.fp8:
        return None
    return plan.stack.fp8[fp8.scaling].min_cuda


def min_cuda(plan: Plan) -> str | None:
    """Return the CUDA that a plan needs for its precision and its GPU; None where it needs none in
    particular.
    """
    needed = [each for each in (_cuda_of_scaling(plan), plan.gpu.min_cuda) if each]
    return max(needed, key=capability, default=None)


def _of_other_axes(what: str, remedy: str) -> Refusal:
    """Return a refusal whose changes are the alternatives of a remedy in conf/stack; "with" joins
    two.
    """
    alternatives = re.split(r",? or |, ", remedy)
    changes = (dict(re.findall(r"\b(gpu|precision|stack)=(\w+)", one)) for one in alternatives)
    return Refusal(what, remedy, *(change for change in changes if change), any_of=True)


def delayed_keeps_no_bf16_layers(plan: Plan) -> str | None:
    """Megatron-Core 0.12 transformer_config.py refuses delayed scaling with first or last layers in
    BF16.
    """
    fp8 = plan.precision.fp8
    if fp8 and fp8.scaling == "delayed" and fp8.first_layers_bf16 + fp8.last_layers_bf16:
        what = "delayed scaling with first or last layers in BF16 is refused by Megatron-Core 0.12"
        both = {f"precision.fp8.{end}_layers_bf16": 0 for end in ("first", "last")}
        return Refusal(
            what,
            "use precision=fp8_current",
            {key: value for key, value in both.items() if getattr(fp8, key.split(".")[-1])},
        )
    return None


def bf16_layers_leave_some_fp8(plan: Plan) -> str | None:
    """At least one layer must run in FP8, or the run would carry a name that it does not
    deserve.
    """
    fp8 = plan.precision.fp8
    if fp8 and fp8.first_layers_bf16 + fp8.last_layers_bf16 >= plan.model.num_layers:
        kept = fp8.first_layers_bf16 + fp8.last_layers_bf16
        what = (
            f"precision.fp8 keeps {kept} layers in BF16 but {plan.model.name} has"
            f" {plan.model.num_layers}: nothing would run in FP8"
        )
        most = (plan.model.num_layers - 1) // 2
        ends = {"first": fp8.first_layers_bf16, "last": fp8.last_layers_bf16}
        return Refusal(
            what,
            "keep fewer",
            {
                f"precision.fp8.{end}_layers_bf16": most
                for end, layers in ends.items()
                if layers > most
            },
        )
    return None


def schedule_is_possible(plan: Plan) -> str | None:
    """The warm-up ends before the run does, and the rate decays downwards."""
    t = plan.train
    if t.warmup_steps >= t.max_steps:
        return (
            f"train.warmup_steps={t.warmup_steps} must be less than train.max_steps={t.max_steps};"
            " lower it, or set train.warmup_steps=null (the model's own, at most a tenth of the"
            " steps)"
        )
    if t.min_lr > t.max_lr:
        return (
            f"train.min_lr={t.min_lr} is above train.max_lr={t.max_lr}; lower it, or set"
            " train.min_lr=null (the model's own)"
        )
    return None


def data_is_named(plan: Plan) -> str | None:
    """Each kind of data needs its own fields, in a form that Megatron-Core reads."""
    return wrong_data(plan.data)


def documents_are_masked_where_attention_takes_a_mask(plan: Plan) -> str | None:
    """Transformer Engine 2.2 pytorch/attention.py:5664 ignores a mask under causal attention;
    rotary positions are relative.

    So on GPUs neither NeMo's reset_attention_mask nor its reset_position_ids changes a number of
    these models.
    """
    if plan.data.reset_attention_mask and not plan.on_cpu:
        return (
            f"data.reset_attention_mask has no effect on {plan.gpu.name}: Transformer Engine's"
            " causal attention takes no mask; set data.reset_attention_mask=false"
            " (data.eod_mask_loss works)"
        )
    return None


def cpu_runs_what_is_emulated(plan: Plan) -> str | None:
    """Throughput settings, CUDA graphs and the like have no meaning where FP8 is emulated, nor has
    Slurm's GPU request.
    """
    m, what = plan.mapping, None
    if not plan.on_cpu:
        return None
    gpus_own = {"cuda_graphs": False, "fsdp": False, "recompute_layers": 0, "offload_layers": 0}
    if (
        plan.settings.name == "throughput"
        or plan.settings.precision_aware_optimizer
        or plan.settings.cross_entropy_fusion == "te"
    ):
        what = "settings=throughput measures GPUs; use settings=convergence"
    elif any(getattr(m, name) for name in gpus_own):
        what = "gpu=cpu emulates FP8, CUDA graphs, FSDP, recompute and offloading are for GPUs"
        return Refusal(
            what, f"use {of_change(_differing(plan, gpus_own))}", _differing(plan, gpus_own)
        )
    elif plan.data.kind == "mock":
        what = "for the loss, and data=mock has random tokens; use data=text"
    return f"gpu=cpu emulates FP8, {what}" if what else None


def cpu_splits_bf16_alone(plan: Plan) -> str | None:
    """On the CPU, BF16 runs with tensor and pipeline parallelism; attention over parts of a
    sequence, and split FP8, do not.
    """
    m = plan.mapping
    if not plan.on_cpu:
        return None
    if m.cp > 1:
        what = f"gpu=cpu has no attention for context parallelism, mapping has cp={m.cp}"
        change = _differing(plan, {"cp": 1})
        return Refusal(what, f"use {of_change(change)}, or choose a GPU", change)
    if plan.precision.fp8 and max(m.tp, m.pp) > 1:
        what = (
            f"gpu=cpu emulates FP8 in layers that are not split, mapping has tp={m.tp} pp={m.pp}"
            f" vp={m.vp}"
        )
        change = _differing(plan, {"tp": 1, "pp": 1, "vp": 1})
        return Refusal(what, f"use {of_change(change)}, or precision=bf16, or choose a GPU", change)
    return None


UNSPLIT: dict[str, int | bool] = {"tp": 1, "pp": 1, "cp": 1, "vp": 1, "fsdp": False}
PLAIN: dict[str, int | bool] = {"cuda_graphs": False, "recompute_layers": 0, "offload_layers": 0}


def _differing(plan: Plan, mapping: dict[str, int | bool]) -> dict[str, int | bool]:
    """Return the fields of a layout that a plan has otherwise, as a change of it."""
    return {
        f"mapping.{name}": value
        for name, value in mapping.items()
        if getattr(plan.mapping, name) != value
    }


def emulated_fp8_is_plain(plan: Plan) -> str | None:
    """Emulated FP8 on a GPU: layers that are whole, kept as they are (recipes/training/layers.py),
    and no claim on speed.
    """
    m = plan.mapping
    if plan.on_cpu or not plan.emulated:
        return None
    cell = f"{plan.precision.name} on {plan.gpu.name} with {plan.stack.name}"
    if max(m.tp, m.pp, m.cp, m.vp) > 1 or m.fsdp:
        split = f"tp={m.tp} pp={m.pp} cp={m.cp} vp={m.vp} fsdp={str(m.fsdp).lower()}"
        what = (
            f"{cell} is emulated in layers that are not split (only data-parallel over num_gpus),"
            f" mapping has {split}"
        )
        whole = _differing(plan, UNSPLIT | PLAIN)
        return Refusal(what, f"use {of_change(whole)}", _differing(plan, UNSPLIT), whole)
    if m.cuda_graphs or m.recompute_layers or m.offload_layers:
        what = f"{cell} is emulated, without CUDA graphs, recompute or offloading"
        return Refusal(what, f"use {of_change(_differing(plan, PLAIN))}", _differing(plan, PLAIN))
    if plan.settings.name != "convergence":
        return (
            f"{cell} is emulated, its step times say nothing about FP8 in hardware; use"
            " settings=convergence, or precision=bf16"
        )
    return None


def narrow_moments_need_their_optimizer(plan: Plan) -> str | None:
    """Megatron-Core 0.12 optimizer_config.py asserts it, and FusedAdam of Transformer Engine 2.2
    raises (pytorch/optimizers/fused_adam.py:136).
    """
    if plan.settings.adam_moments == "bf16" and not _has_bf16_moments(plan):
        version = plan.stack.versions.get("transformer_engine", "of an unknown version")
        why = (
            f"FusedAdam of Transformer Engine {version}, which {plan.stack.name} has, keeps no BF16"
            " moments; 2.3 and later do"
        )
        return (
            f"settings.adam_moments=bf16: {why}; set settings.adam_moments=fp32, or choose a stack"
            " that has them, such as nemo_25_04_te_2_11"
        )
    if plan.settings.adam_moments != "fp32" and not plan.settings.precision_aware_optimizer:
        return (
            f"settings.adam_moments={plan.settings.adam_moments} needs"
            " settings.precision_aware_optimizer=true; set it, or settings.adam_moments=fp32"
        )
    return None


def _has_bf16_moments(plan: Plan) -> bool:
    return plan.on_cpu or plan.stack.version("transformer_engine") >= BF16_MOMENTS_SINCE


def kernels_have_their_use(plan: Plan) -> str | None:
    """Kernels that `settings` chooses beside the stack's own: each serves one case, on a GPU."""
    settings = plan.settings
    if settings.adam_kernel == "triton" and settings.adam_moments != "bf16":
        moments = (
            "set settings.adam_moments=bf16, or settings"
            if _has_bf16_moments(plan)
            else "set settings"
        )
        return (
            "settings.adam_kernel=triton updates BF16 moments;"
            f" {moments}.adam_kernel=transformer_engine"
        )
    if settings.swiglu_backward == "transformer_engine":
        if plan.on_cpu:
            return (
                "settings.swiglu_backward=transformer_engine needs a GPU; set"
                " settings.swiglu_backward=megatron_core"
            )
        if plan.model.activation != "swiglu":
            what = (
                f"settings.swiglu_backward=transformer_engine: {plan.model.name} has"
                f" {plan.model.activation} and no SwiGLU"
            )
            return f"{what}; set settings.swiglu_backward=megatron_core"
    return None


def secrets_are_not_in_the_plan(plan: Plan) -> str | None:
    """The plan is written to folders and logs: what looks like a secret belongs into a file that
    only the node reads.
    """
    name = next(
        (n for n in plan.cluster.environment if any(word in n.upper() for word in SECRET_WORDS)),
        None,
    )
    if name:
        return (
            f"cluster.environment.{name} looks like a secret and would be written to files; export"
            " it before you launch, or use cluster.token_files"
        )
    return None


def container_is_named(plan: Plan) -> str | None:
    """pyxis needs an image: the stack's, or the site's own."""
    if (
        plan.executor.kind == "slurm"
        and plan.cluster.container_runtime == "pyxis"
        and not (plan.cluster.container_image or plan.stack.container)
    ):
        return (
            f"{plan.stack.name} has no container; set cluster.container_image, or"
            " cluster.container_runtime=none and cluster.python"
        )
    return None


def time_limit_leaves_time(plan: Plan) -> str | None:
    """A time limit must leave time to train before the run is told to stop."""
    if (
        plan.executor.kind == "slurm"
        and seconds(plan.executor.time_limit) <= plan.executor.stop_before_limit_s
    ):
        return (
            f"executor.time_limit={plan.executor.time_limit} is no longer than"
            f" executor.stop_before_limit_s={plan.executor.stop_before_limit_s}: nothing would be"
            " trained; raise the limit, or set"
            f" executor.stop_before_limit_s={seconds(plan.executor.time_limit) // 2}"
        )
    return None


def seconds(limit: str) -> int:
    """Return a Slurm time limit (minutes, minutes:seconds, hours:minutes:seconds,
    days-hours[:minutes[:seconds]]) in seconds.
    """
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, (minutes, secs) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def model_fits_machine(plan: Plan) -> str | None:
    """On this machine, the training state of every process must fit in memory before a step is
    tried.
    """
    if not plan.on_cpu:
        return None
    have = plan.gpu.memory_gb or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    need = training_state_gb(plan.model) * plan.num_gpus
    if need > have:
        state = f"{plan.model.name} needs {need:,.0f} GB for weights, gradients and optimizer"
        return (
            f"{state}, this machine has {have:,.0f} GB; use model=llama3_tiny, fewer layers or"
            " a GPU"
        )
    return None


def data_is_in_the_container(plan: Plan) -> str | None:
    """In a container only the working directory, the run folders and cluster.mounts are there
    (launch/script.py).
    """
    if not _mounts_are_ours(plan):
        return None
    missing = list(_not_mounted(plan))
    if not missing:
        return None
    mounts = [*plan.cluster.mounts, *dict.fromkeys(f"{place}:{place}" for _, _, place in missing)]
    key, path, _ = missing[0]
    return (
        f"{key} names {path}, which is not mounted in the container; set"
        f" cluster.mounts=[{','.join(mounts)}]"
    )


def _mounts_are_ours(plan: Plan) -> bool:
    c = plan.cluster
    own = any(flag.startswith("--container-mounts") for flag in c.extra_srun)
    return plan.executor.kind == "slurm" and c.container_runtime == "pyxis" and not own


def _not_mounted(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield key and path of what the job reads and the container lacks, and what to mount for it.

    That is the folder it lies in, or itself where that is the root: a container keeps its own.
    """
    mounted = (Path((mount.split(":") * 2)[1]) for mount in plan.cluster.mounts)
    inside = [Path.cwd(), Path(plan.runs_dir).absolute(), *mounted]
    for key, path in read_by_job(plan):
        suffixes = (".bin", ".idx") if key in ("data.train", "data.heldout") else ("",)
        for file in (Path(f"{path}{suffix}") for suffix in suffixes):
            if file.is_absolute() and not any(file.is_relative_to(place) for place in inside):
                yield key, path, str(file.parent if file.parent.name else file)


def container_keeps_its_own_files(plan: Plan) -> str | None:
    """A mount over the container's root hides its Python, NeMo and libraries."""
    if not _mounts_are_ours(plan):
        return None
    over = next((mount for mount in plan.cluster.mounts if (mount.split(":") * 2)[1] == "/"), None)
    if over:
        return (
            f"cluster.mounts={over} hides the container's own files behind the host's root; mount"
            " the folders that the job reads"
        )
    named = {"the working folder": Path.cwd(), "runs_dir": Path(plan.runs_dir).absolute()}
    root = next((name for name, path in named.items() if path == Path("/")), None)
    return (
        f"{root} is /, and mounting it hides the container's own files; choose a folder below it"
        if root
        else None
    )


def model_fits_gpu(plan: Plan) -> str | None:
    """On GPUs, the fullest pipeline stage must not exceed the memory by more than the estimate's
    error.
    """
    if plan.on_cpu or state(plan) != "refused":
        return None
    memory, have = estimate(plan), usable_gb(plan) or 0
    largest = f"{memory.dominant} alone {memory.terms[memory.dominant] / 1e9:,.0f} GB"
    cell = f"{plan.model.name} in {plan.precision.name}"
    gave_up = [note for note in plan.mapping.source.split("; ") if note.startswith(DROPPED)]
    what = (
        f"{cell} needs about {memory.total_gb:,.0f} GB a GPU,"
        f" {largest}{''.join(f' ({note})' for note in gave_up)}"
    )
    return f"{what}; {plan.gpu.name} has {have:,.0f} GB to give; {memory_remedy(plan)}"


def memory_remedy(plan: Plan) -> str:
    """Return the nearest layout that every rule takes and that fits with a margin, as overrides."""
    found = nearest(plan, BEFORE_MEMORY, times=MORE_GPUS)
    if found is not None:
        return f"use {overrides(plan, found)} (about {estimate(found).total_gb:,.0f} GB)"
    tried = f"no recomputation, larger tp, cp or pp, or up to {MORE_GPUS[-1]} times the GPUs"
    return f"{tried} makes it fit with a margin; use a GPU with more memory or a smaller model"


BEFORE_MEMORY: tuple[Rule, ...] = (
    cell_is_supported,
    cuda_knows_the_gpu,
    cuda_is_new_enough,
    *MODEL_RULES,
    delayed_keeps_no_bf16_layers,
    bf16_layers_leave_some_fp8,
    cpu_splits_bf16_alone,
    emulated_fp8_is_plain,
    narrow_moments_need_their_optimizer,
    kernels_have_their_use,
    *MAPPING_RULES,
    schedule_is_possible,
    data_is_named,
    documents_are_masked_where_attention_takes_a_mask,
    secrets_are_not_in_the_plan,
    container_is_named,
    container_keeps_its_own_files,
    data_is_in_the_container,
    time_limit_leaves_time,
    cpu_runs_what_is_emulated,
    model_fits_machine,
)
RULES: tuple[Rule, ...] = (*BEFORE_MEMORY, model_fits_gpu)


def check(plan: Plan, rules: Sequence[Rule] = RULES, accepts: Accepts | None = None) -> Plan:
    """Return `plan` if every rule lets it pass; raise InputError with the first refusal.

    With `accepts`, the refusal names a change that is accepted, where one of its own is.
    """
    for rule in rules:
        if refusal := rule(plan):
            raise InputError(_with_remedy(plan, refusal, accepts) if accepts else refusal)
    return plan


def _with_remedy(plan: Plan, refusal: str, accepts: Accepts) -> str:
    """Return a refusal that names the first of its changes which is accepted with a margin of
    memory, or else without.
    """
    if not isinstance(refusal, Refusal):
        return refusal
    if refusal.any_of:
        found = [of_change(change) for change in refusal.changes if accepts(change) != "refused"]
        return f"{refusal.what}; use {' or '.join(found)}" if found else refusal
    all_changes = itertools.chain.from_iterable(
        with_batches(plan, change) for change in refusal.changes
    )
    possible = (
        change
        for change, candidate in all_changes
        if not any(rule(candidate) for rule in MAPPING_RULES)
    )
    best = dict[State, Change]()
    for change in itertools.islice(possible, MOST_TRIED):
        best.setdefault(accepts(change), change)
        if "fits" in best:
            break
    accepted = best.get("fits") or best.get("tight")
    return f"{refusal.what}; use {of_change(accepted)}" if accepted else refusal
