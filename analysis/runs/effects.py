"""What does a difference between two runs do to their comparison?  One declaration for each field
of plan and manifest.

`analysis.runs.pairing` acts on it.  Keys are dotted; `versions.*` stands for every entry of a
dictionary.  A field of recipes/plan.py or recipes/manifest_record.py that is missing here fails a
test (tests/analysis/test_pairing.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from fnmatch import fnmatchcase


class Effect(Enum):
    """The consequence of a difference.

    ASKED, LAYOUT and PLATFORM have columns and labels of their own.
    """

    ASKED = "what the comparison is about"
    REFUSED = "the losses are not comparable: the pair is refused"
    TOLERANCE = (
        "what is judged, not what is trained: the base's holds, and a candidate with another is"
        " refused"
    )
    LAYOUT = "the same training, laid out otherwise: the pair is best-mapping"
    PLATFORM = "another GPU or stack: named"
    NAMED = "the loss may move for it, by rounding at least: compared and named"
    SPEED = "only step time may move for it: named where speed is compared"
    NONE = "no number moves for it, or another field shows what does"


# Fields of the plan, by part.
PLAN: Mapping[Effect, Mapping[str, str]] = {
    Effect.ASKED: {
        "": "seed",
        "precision": "name",
        "precision.fp8": (
            "scaling format margin amax_history_len amax_compute_algo power_of_two_scales"
            " mx_scale_rounding first_layers_bf16 last_layers_bf16 param_gather"
        ),
    },
    Effect.REFUSED: {
        "": "seq_length",
        "model": (
            "name nemo_recipe num_layers hidden_size ffn_hidden_size num_attention_heads"
            " num_query_groups vocab_size seq_length activation tied_embeddings"
            " embedding_and_loss_count_as_layers head_size sliding_window fused_activation"
            " normalization post_norms linear_bias qkv_bias qk_norm position_embedding rotary_base"
            " rotary_percent rope_scaling attention_softcap logit_softcap embedding_scaling dropout"
        ),
        "mapping": "global_batch",
        "data": (
            "kind sources train heldout split tokenizer reset_attention_mask eod_mask_loss seed"
        ),
        "train": (
            "max_steps max_lr min_lr warmup_steps adam_beta1 adam_beta2 weight_decay clip_grad"
            " eval_batches on_non_finite"
        ),
        "settings": (
            "grad_reduce_in_fp32 precision_aware_optimizer cross_entropy_fusion bf16_layers"
            " adam_moments gradient_accumulation_fusion adam_kernel swiglu_backward"
        ),
    },
    Effect.TOLERANCE: {"bar": "decides relative perplexity absolute tail_fraction"},
    Effect.LAYOUT: {
        "": "num_gpus",
        "mapping": (
            "tp pp cp vp micro_batch cuda_graphs fsdp recompute_layers offload_layers tp_overlap"
        ),
    },
    Effect.PLATFORM: {
        "gpu": (
            "name compute_capability memory_gb devices_per_node gpus_per_numa_node nvlink_domain"
            " mapped_like min_cuda bf16_dense_tflops fp8_dense_tflops"
        ),
        "stack": (
            "name container versions.* recommended fp8_parameters_with_fsdp emulates_fp8"
            " fsdp_drops_gradients"
        ),
        "stack.scripts": (
            "variables check_gradients mxfp8_parameters fsdp_average_in_collective"
            " without_aggregate optimizer_instances"
        ),
    },
    Effect.NAMED: {
        "executor": "threads",  # sums on a CPU are shared out among them
        "cluster": (
            "container_runtime container_image mounts"
        ),  # a mount may lie over the container's packages
    },
    Effect.SPEED: {
        "settings": "overlap_param_gather_with_optimizer_step count_zero_gradients check_gradients",
        "train": "diagnostics_interval",
        "cluster": "mpi exclusive numa_binding vboost segment extra_srun",
        "logger": "wandb tensorboard",
    },
    Effect.NONE: {
        "": "runs_dir run_name",
        "model.convergence": (
            "max_lr min_lr warmup_steps batch_tokens source"
        ),  # `train` and the global batch hold what came of it
        "gpu": "device_name nvlink_multicast hbm_tb_s nvlink_gb_s nic_gbit_s tdp_w source",
        "stack": "fp8.* missing.* graphs_drop_bf16_layers cuda offloads_swiglu",
        "stack.userbuffers": "bootstrap bootstrap_source sizes sizes_source overlaps.* fails.*",
        "mapping": "source",
        "data": "root demo_text",  # the manifest's hashes show what was read
        "executor": "kind max_parallel time_limit stop_before_limit_s max_restarts chain",
        "cluster": (  # the job's own is recorded
            "name account partition qos reservation gpus_flag python extra_sbatch token_files.*"
            " environment.*"
        ),
        "logger": "wandb_project",
        "train": "eval_interval checkpoint_interval stop_after step_timeout_s log_interval",
        "settings": "name checkpoints evaluation batch layout",
    },
}

# Fields of the manifest, by part.
MANIFEST: Mapping[Effect, Mapping[str, str]] = {
    Effect.REFUSED: {"": "order_sha256", "data": "sha256.* sampled_sha256.*"},
    Effect.NAMED: {
        "": "device attention versions.* cudnn.* environment.*",
        "code": "commit dirty sha256",
        "data": (
            "tokenizer_sha256"
        ),  # indexed tokens stay what they are, but for the id that ends a document
    },
    Effect.SPEED: {
        "": "gpus_before",
        "gpus": (
            "uuid name driver power_limit_w max_sm_clock_mhz others_at_start others_during"
            " others_at_end"
        ),
    },
    Effect.NONE: {
        "": (
            "num_gpus labels.* imported.* environment_looked_at before"
        ),  # sessions before the last are compared with it
        "gpus": "rank power_capped_share",
        "data": "source asked.* tokens.* vocab_size unigram_entropy_nats",
    },
}

# Entries of the manifest's dictionaries that have another effect than the rest; the first pattern
# that fits.
ENTRIES: Mapping[str, Effect] = {
    **dict.fromkeys(
        ("versions.python", "versions.wandb", "versions.nemo-run", "versions.hydra-core"),
        Effect.NONE,
    ),
    **dict.fromkeys(
        ("versions.transformers", "versions.tokenizers", "versions.sentencepiece"), Effect.NONE
    ),
    "cudnn.torch_built_with": Effect.NONE,
    **dict.fromkeys(
        (
            "environment.SLURM_*",
            "environment.CUDA_VISIBLE_DEVICES",
            "environment.CUDA_DEVICE_ORDER",
        ),
        Effect.NONE,
    ),
    **dict.fromkeys(
        ("environment.CUDA_HOME", "environment.CUDA_PATH", "environment.TORCH_HOME"), Effect.NONE
    ),
    **dict.fromkeys(("environment.*_CACHE_*", "environment.TORCH_EXTENSIONS_DIR"), Effect.NONE),
    **dict.fromkeys(
        (
            "environment.PYTORCH_NVML_BASED_CUDA_CHECK",
            "environment.TORCH_SHOW_*",
            "environment.TORCH_LOGS*",
        ),
        Effect.NONE,
    ),
    **dict.fromkeys(
        ("environment.NCCL_DEBUG*", "environment.NVTE_DEBUG*", "environment.NVTE_NVTX_ENABLED"),
        Effect.NONE,
    ),
    **dict.fromkeys(
        ("environment.CUDA_DEVICE_MAX_CONNECTIONS", "environment.CUDA_LAUNCH_BLOCKING"),
        Effect.SPEED,
    ),
    **dict.fromkeys(
        (
            "environment.TORCH_NCCL_*",
            "environment.PYTORCH_*ALLOC_CONF",
            "environment.NCCL_P2P_NET_CHUNKSIZE",
        ),
        Effect.SPEED,
    ),
}


def expanded(table: Mapping[Effect, Mapping[str, str]]) -> dict[str, Effect]:
    """Return the effect of each field by its dotted key.

    ValueError where one stands in a table twice.
    """
    found: dict[str, Effect] = {}
    for effect, parts in table.items():
        for part, fields in parts.items():
            for field in fields.split():
                key = f"{part}.{field}" if part else field
                if key in found:
                    raise ValueError(f"{key} has two effects")
                found[key] = effect
    return found


PLAN_FIELDS, MANIFEST_FIELDS = expanded(PLAN), expanded(MANIFEST)


def plan_effect(key: str) -> Effect:
    """Return the effect of a key of a flattened plan: its own, or that of the dictionary or the
    part that it stands in.

    A part that is None in one of the plans (precision.fp8, stack.userbuffers) has the strictest
    effect of its fields.
    """
    if key in PLAN_FIELDS:
        return PLAN_FIELDS[key]
    inside = [
        effect
        for field, effect in PLAN_FIELDS.items()
        if field.endswith(".*") and key.startswith(field[:-1])
    ]
    below = {
        effect for field, effect in PLAN_FIELDS.items() if field.startswith((f"{key}.", f"{key}.*"))
    }
    return next(iter(inside), None) or next(
        (effect for effect in Effect if effect in below), Effect.REFUSED
    )


def entry_effect(key: str) -> Effect:
    """Return the effect of an entry of one of the manifest's dictionaries."""
    own = next((effect for pattern, effect in ENTRIES.items() if fnmatchcase(key, pattern)), None)
    return own or MANIFEST_FIELDS[f"{key.partition('.')[0]}.*"]
