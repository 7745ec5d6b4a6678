"""Every rule refuses what it is there for, in one line that names a way out; and lets every
published layout pass.
"""

import re

import pytest

from recipes.compose import rules
from recipes.compose.defaults import recommended
from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.run_folder import comparable, differences

H100_8B = ["model=llama3_8b", "gpu=h100"]
H100_70B = ["model=llama3_70b", "gpu=h100"]
C4 = [
    "data=indexed",
    "data.train=[0.3,/data/c4/part0]",
    "data.heldout=[/data/c4/valid]",
    "data.tokenizer=/tokenizers/llama3",
]
EMULATED = ["gpu=h200", "stack=emulated", "executor=local"]
TE_2_11 = ["stack=nemo_25_04_te_2_11", "executor=local"]
WORKSTATION = ["gpu.compute_capability='12.0'", "cluster.container_runtime=none"]
TP8 = ["model=llama3_8b", "gpu=h100", "mapping=single", "mapping.tp=8", "mapping.micro_batch=1"]
TP8 += [
    "mapping.global_batch=8",
    "num_gpus=8",
    "cluster.container_runtime=none",
    "cluster.python=python",
]
BLOCKS = [*H100_70B, "precision=fp8_subchannel", "stack=nemo_25_07"]
NO_FSDP = "stack.fp8_parameters_with_fsdp=false"

# rule -> overrides that it alone should refuse, and a part of the way out that it names
CASES: dict[str, list[tuple[list[str], str]]] = {
    "cell_is_supported": [
        ([*H100_8B, "precision=mxfp8"], "gpu=b200 or gpu=gb200"),
        ([*H100_8B, "precision=fp8_subchannel"], "stack=nemo_25_07"),
        (
            ["model=llama3_8b", "gpu=b200", "precision=fp8_subchannel", "stack=nemo_25_07"],
            "gpu=h100",
        ),
        ([*H100_8B, "precision=fp8_delayed", "gpu.compute_capability='8.0'"], "precision=bf16"),
        (
            ["gpu=h200", "precision=mxfp8", "stack=nemo_25_04_te_2_11", "executor=local"],
            "stack=emulated",
        ),
        (["gpu=h200", "precision=fp8_subchannel", "executor=local"], "stack=emulated"),
        ([*EMULATED, "precision=mxfp8", "gpu.compute_capability='7.5'"], "gpu=cpu"),
        *(
            (
                ["model=llama3_8b", "gpu=b200", "precision=mxfp8", f"stack={stack}", *WORKSTATION],
                "precision=bf16" if stack == "nemo_25_04" else "precision=fp8_current",
            )
            for stack, remedy in (
                ("nemo_25_04", "precision=bf16"),
                ("nemo_25_04_te_2_11", "=fp8_current"),
                ("nemo_25_07", "=fp8_current"),
            )
        ),
        ([*H100_8B, "precision=fp8_delayed", *WORKSTATION], "stack=nemo_25_07"),
        ([*H100_8B, "precision=fp8_current", *WORKSTATION], "stack=nemo_25_07"),
    ],
    "cuda_knows_the_gpu": [
        (
            ["model=llama3_8b", f"gpu={gpu}", "precision=bf16"],
            "needs CUDA 12.9 or newer and not 12.8 (conf/gpu",
        )
        for gpu in ("b300", "gb300")
    ]
    + [
        (
            ["model=llama3_8b", "gpu=b300", "precision=bf16", "gpu.min_cuda='13.1'", stack],
            "min_cuda); set cluster.container_image to one that has CUDA 13.1",
        )
        for stack in ("stack=nemo_25_04", "stack=nemo_25_07")
    ],
    "cuda_is_new_enough": [
        ([*BLOCKS, "stack.cuda='12.8'"], "needs CUDA 12.9 or newer and not 12.8"),
        ([*BLOCKS, "stack.cuda='12.8'"], "precision=fp8_current"),
        ([*BLOCKS, "stack.cuda='11.10'"], "not 11.10"),
        (
            [
                "model=llama3_8b",
                "gpu=b200",
                "precision=mxfp8",
                "stack.cuda='12.6'",
                "cluster.container_image=/own.sqsh",
            ],
            "needs CUDA 12.8",
        ),
    ],
    "recipe_is_trained": [
        ([*H100_8B, "model.nemo_recipe=llama3_9b"], "use llama3_8b"),
        ([*H100_8B, "model.nemo_recipe=mixtral_8x7b"], "docs/models.md"),
        (["model=qwen3_8b", "gpu=h100"], "stack=nemo_25_07"),
    ],
    "architecture_is_the_recipes": [([*H100_8B, "model.qk_norm=true"], "set model.qk_norm=false")],
    "softcapped_attention_is_possible": [
        (["model=gemma2_9b", "gpu=b200", "mapping.cp=2", "num_gpus=2"], "set mapping.cp=1"),
        (["model=gemma2_9b", "gpu=b200", "seq_length=8192"], "use seq_length=4096"),
    ],
    "windowed_attention_divides": [
        (
            ["model=mistral_7b", "gpu=b200", "mapping.tp=4", "mapping.cp=4", "num_gpus=16"],
            "mapping.cp=2",
        )
    ],
    "delayed_keeps_no_bf16_layers": [
        (
            [*H100_8B, "precision=fp8_delayed", "precision.fp8.last_layers_bf16=1"],
            "last_layers_bf16=0",
        )
    ],
    "bf16_layers_leave_some_fp8": [
        (["precision=fp8_current", "precision.fp8.last_layers_bf16=9"], "last_layers_bf16=1")
    ],
    "heads_divide": [
        (["model.num_query_groups=3"], "use model.num_query_groups=4"),
        (
            ["model.num_attention_heads=12", "model.num_query_groups=4"],
            "use model.num_attention_heads=16",
        ),
    ],
    "devices_divide": [
        ([*H100_8B, "num_gpus=9"], "num_gpus"),
        ([*H100_8B, "num_gpus=12"], "num_gpus=16"),
    ],
    "tensor_parallel_divides": [
        ([*H100_8B, "mapping.tp=16", "num_gpus=32"], "use mapping.tp=8"),
        (["gpu=h100", "mapping=single", "mapping.tp=4", "num_gpus=4"], "use mapping.tp=2"),
        ([*H100_8B, "model.ffn_hidden_size=14338", "mapping.tp=4"], "use mapping.tp=2"),
    ],
    "layers_divide": [
        (
            [*H100_70B, "mapping.pp=3", "num_gpus=48", "mapping.global_batch=96"],
            "use mapping.pp=4 num_gpus=64",
        ),
        ([*H100_70B, "mapping.vp=3"], "use mapping.vp=4"),
        (
            ["model=llama31_405b", "gpu=h100", "mapping.vp=5"],
            "128 layers, embedding and loss counted,",
        ),
    ],
    "interleaving_has_a_pipeline": [
        ([*H100_8B, "mapping.vp=2"], "mapping.vp=1"),
        (
            [*H100_70B, "mapping.global_batch=36", "precision=fp8_current"],
            "mapping.global_batch=48",
        ),
    ],
    "batch_divides": [
        ([*H100_70B, "mapping.global_batch=127"], "mapping.global_batch=128"),
        ([*H100_8B, "num_gpus=1024", "mapping.global_batch=128"], "=512"),
    ],
    "sequence_divides": [
        ([*H100_8B, "seq_length=1022"], "use seq_length=1020"),
        ([*H100_70B, "seq_length=8200"], "use seq_length=8192"),
    ],
    "fp8_features_divide": [
        ([*H100_8B, "precision=fp8_current", "model.ffn_hidden_size=14344"], "precision=bf16"),
        (
            [*BLOCKS, "model.hidden_size=8000", "model.head_size=128"],
            "hidden_size=8000 to be a multiple of 128",
        ),
    ],
    "fp8_tokens_divide": [
        (
            [
                "model=llama3_8b",
                "gpu=b200",
                "precision=mxfp8",
                "seq_length=24",
                "mapping.micro_batch=1",
            ],
            "use seq_length=32",
        ),
        # 1,000 tokens a rank of 8 pass, 8,000 in all; 1,004 of 8,032 do not
        ([*TP8, "precision=fp8_delayed", "seq_length=8032"], "the 1004 tokens of a rank"),
        ([*TP8, "precision=fp8_current", "seq_length=8032"], "use seq_length=8064"),
        (
            [*TP8, "precision=fp8_delayed", "seq_length=4128", "mapping.cp=2", "num_gpus=16"],
            "use seq_length=4224",
        ),
        ([*TP8, "precision=mxfp8", "seq_length=8000", "gpu=b200"], "the 1000 tokens of a rank"),
        ([*TP8, "precision=mxfp8", "seq_length=8000", "gpu=b200"], "use seq_length=8192"),
        (
            [*TP8, "precision=fp8_subchannel", "seq_length=8000", "stack=nemo_25_07"],
            "use seq_length=8192",
        ),
        (
            [
                *TP8,
                "precision=fp8_subchannel",
                "seq_length=3584",
                "stack=nemo_25_04_te_2_11",
                "executor=local",
            ],
            "multiple of 128",
        ),
    ],
    "bf16_layers_fit_a_stage": [
        (
            [*H100_70B, "precision=fp8_current", "precision.fp8.first_layers_bf16=11"],
            "first_layers_bf16=10",
        )
    ],
    "recompute_fits_a_stage": [
        ([*H100_70B, "mapping.recompute_layers=5"], "use mapping.recompute_layers=4")
    ],
    "fields_exclude_no_other": [
        ([*H100_70B, "mapping.offload_layers=2", "mapping.pp=4"], "mapping.offload_layers=0"),
        (
            [*H100_8B, "mapping.offload_layers=2", "mapping.recompute_layers=2"],
            "use mapping.offload_layers=0",
        ),
        *(
            (
                [*H100_8B, "mapping.cuda_graphs=true", f"mapping.{other}"],
                "mapping.cuda_graphs=true does not work with",
            )
            for other in ("fsdp=true", "recompute_layers=1", "offload_layers=1")
        ),
    ],
    "offload_leaves_a_layer": [([*H100_8B, "mapping.offload_layers=32"], "less than the 32")],
    "cuda_graphs_keep_bf16_layers": [
        (
            ["model=llama3_8b", "gpu=b200", "precision=fp8_current", "mapping.cuda_graphs=true"],
            "precision.fp8.first_layers_bf16=0",
        )
    ],
    "fp8_parameters_are_possible": [
        (
            ["model=llama3_8b", "gpu=b200", "precision=mxfp8", "precision.fp8.param_gather=true"],
            "param_gather=false",
        ),
        (
            [
                *H100_8B,
                "precision=fp8_subchannel",
                "stack=nemo_25_07",
                "precision.fp8.param_gather=true",
            ],
            "param_gather=false",
        ),
        (
            [*EMULATED, "precision=fp8_delayed", "precision.fp8.param_gather=true"],
            "param_gather=false",
        ),
        (
            [
                *H100_8B,
                "settings=tuned",
                "precision=fp8_current",
                "precision.fp8.param_gather=true",
            ],
            "param_gather=false",
        ),
        (
            [
                *H100_8B,
                "precision=fp8_current",
                "mapping.fsdp=true",
                "precision.fp8.param_gather=true",
                "stack.fp8_parameters_with_fsdp=false",
            ],
            "gather=false",
        ),
    ],
    "fsdp_gives_the_optimizer_its_gradients": [
        (
            [*H100_8B, "settings=tuned", "mapping.fsdp=true"],
            "settings.precision_aware_optimizer=false",
        ),
    ],
    "gather_overlap_is_possible": [
        ([*H100_8B, "settings.overlap_param_gather_with_optimizer_step=true"], "vp > 1"),
        (
            [*H100_70B, "settings.overlap_param_gather_with_optimizer_step=true"],
            "settings.checkpoints=false",
        ),
    ],
    "tp_overlap_is_possible": [
        (
            [*H100_70B, "precision=fp8_current", "mapping.tp_overlap=true"],
            "mapping.tp_overlap=false",
        ),
        (
            ["model=llama3_70b", "gpu=b200", "precision=mxfp8", "mapping.tp_overlap=true"],
            "mapping.tp_overlap=false",
        ),
        ([*H100_8B, "mapping.tp_overlap=true"], "mapping.tp=1"),
        (
            [
                *H100_70B,
                "mapping.fsdp=true",
                "mapping.pp=1",
                "mapping.vp=1",
                "mapping.tp_overlap=true",
            ],
            "jitter",
        ),
    ],
    "schedule_is_possible": [
        (["train.warmup_steps=100"], "set train.warmup_steps=null"),
        (["train.min_lr=1.0"], "lower it"),
    ],
    "data_is_named": [
        (["data.root=null"], "set it"),
        (["data=indexed", "data.train=[]", "data.heldout=[a]", "data.tokenizer=t"], "set it"),
        ([*H100_8B, "data=mock", "+data.eod_mask_loss=true"], "use data=text or data=indexed"),
        (
            [*H100_8B, "data=mock", "+data.reset_attention_mask=true"],
            "use data=text or data=indexed",
        ),
        ([*H100_8B, "data=mock", "+data.tokenizer=t"], "leave it out"),
        (
            [*H100_8B, *C4, "+data.sources=[/texts/a]", "cluster.container_runtime=none"],
            "use data=text",
        ),
        (["+data.train=[/data/c4/part0]"], "use data=indexed"),
    ],
    "documents_are_masked_where_attention_takes_a_mask": [
        ([*H100_8B, "data.reset_attention_mask=true"], "data.eod_mask_loss"),
        ([*EMULATED, "data.reset_attention_mask=true"], "data.reset_attention_mask=false"),
    ],
    "secrets_are_not_in_the_plan": [
        ([*H100_8B, "+cluster.environment.MY_API_KEY=x"], "cluster.token_files"),
        (
            [*H100_8B, f"cluster.extra_srun=['--export=AZURE_STORAGE_KEY=/{'aB3+' * 20}==']"],
            "cluster.token_files",
        ),
    ],
    "container_is_named": [
        (
            ["model=llama3_8b", "gpu=h100", "stack=nemo_25_04_te_2_11", "executor=slurm"],
            "cluster.container_image",
        )
    ],
    "container_keeps_its_own_files": [
        ([*H100_8B, "cluster.mounts=[/:/]"], "mount the folders"),
        ([*H100_8B, "cluster.mounts=[/data:/]"], "mount the folders"),
        ([*H100_8B, "runs_dir=/"], "a folder below it"),
    ],
    "data_is_in_the_container": [
        ([*H100_8B, *C4], "cluster.mounts=[/data/c4:/data/c4,/tokenizers:/tokenizers]"),
        (
            [*H100_8B, *C4, "cluster.mounts=[/data:/corpora]"],
            "cluster.mounts=[/data:/corpora,/data/c4:",
        ),
        ([*H100_8B, "data.root=/texts"], "cluster.mounts=[/texts:/texts]"),
        (
            [
                *H100_8B,
                "data=indexed",
                "data.train=[/c4]",
                "data.split=[9,1,0]",
                "data.tokenizer=x",
            ],
            "cluster.mounts=[/c4.bin:/c4.bin,/c4.idx:/c4.idx]",
        ),
        ([*H100_8B, "data=text", "data.sources=[/texts/a]", "data.root=data/mine"], "data.sources"),
    ],
    "time_limit_leaves_time": [([*H100_8B, "executor.time_limit='00:05:00'"], "raise the limit")],
    "cpu_splits_bf16_alone": [
        (["mapping.cp=2", "num_gpus=2"], "use mapping.cp=1"),
        (["precision=mxfp8", "mapping.tp=2", "num_gpus=2"], "use mapping.tp=1"),
        (
            ["precision=fp8_current", "mapping.pp=2", "mapping.vp=2", "num_gpus=2"],
            "use mapping.pp=1 mapping.vp=1",
        ),
    ],
    "emulated_fp8_is_plain": [
        ([*EMULATED, "precision=mxfp8", "mapping.tp=2", "num_gpus=2"], "use mapping.tp=1"),
        ([*EMULATED, "precision=fp8_current", "mapping.fsdp=true"], "data-parallel"),
        (
            [*EMULATED, "precision=mxfp8", "mapping.cuda_graphs=true"],
            "use mapping.cuda_graphs=false",
        ),
        (
            [*EMULATED, "precision=mxfp8", "mapping.recompute_layers=1"],
            "use mapping.recompute_layers=0",
        ),
        ([*EMULATED, "precision=mxfp8", "experiment=throughput"], "settings=convergence"),
    ],
    "narrow_moments_need_their_optimizer": [
        ([*H100_8B, *TE_2_11, "settings.adam_moments=bf16"], "adam_moments=fp32"),
        (
            [*H100_8B, "settings=tuned", "settings.adam_moments=bf16"],
            "Transformer Engine 2.2, which nemo_25_04 has, keeps no BF16 moments",
        ),
    ],
    "kernels_have_their_use": [
        (
            [*H100_8B, "settings=tuned", "settings.adam_kernel=triton"],
            "set settings.adam_kernel=transformer_engine",
        ),
        (
            [*H100_8B, *TE_2_11, "settings=tuned", "settings.adam_kernel=triton"],
            "settings.adam_moments=bf16",
        ),
        (["settings.swiglu_backward=transformer_engine"], "megatron_core"),
        (
            ["model=nemotron4_15b", "gpu=h100", "settings.swiglu_backward=transformer_engine"],
            "squared_relu",
        ),
    ],
    "cpu_runs_what_is_emulated": [
        (["settings=throughput"], "settings=convergence"),
        (["mapping.recompute_layers=1"], "use mapping.recompute_layers=0"),
        (["data=mock"], "data=text"),
    ],
    "model_fits_machine": [(["model=llama31_405b"], "model=llama3_tiny")],
    "model_fits_gpu": [([*H100_8B, "mapping.cp=1", "num_gpus=8"], "mapping.")],
}

H200_405B = ["model=llama31_405b", "gpu=h200", "experiment=throughput", "num_gpus=576"]
# Further command lines whose remedies are applied: neighbours of the cases above.
MORE: list[list[str]] = [
    [
        *H200_405B,
        "mapping.tp=8",
        "mapping.pp=9",
        "mapping.cp=1",
        "mapping.vp=14",
        "mapping.global_batch=2016",
    ],
    [
        *H200_405B,
        "mapping.tp=8",
        "mapping.pp=9",
        "mapping.cp=1",
        "mapping.vp=7",
        "mapping.global_batch=2016",
    ],
    [
        "model=llama31_405b",
        "gpu=gb200",
        "mapping.pp=7",
        "mapping.vp=1",
        "mapping.fsdp=false",
        "num_gpus=448",
    ],
    [*H100_70B, "mapping.pp=3"],
    [*H100_70B, "mapping.pp=6", "mapping.vp=1", "experiment=throughput"],
    ["model=nemotron4_340b", "gpu=b200", "mapping.pp=5", "experiment=throughput"],
    [*H100_70B, "mapping.tp=3", "num_gpus=96"],
    [*H100_70B, "num_gpus=100"],
    ["model=qwen25_7b", "gpu=h100", "mapping.tp=8"],
    ["model=llama3_8b", "gpu=gb200", "num_gpus=6"],
    ["model=llama3_8b", "gpu=b200", "precision=mxfp8", "seq_length=4100"],
    [*H100_8B, "experiment=throughput", "num_gpus=24", "mapping.global_batch=100"],
    [*H100_8B, *C4, "data.heldout=[/other/valid]", "cluster.mounts=[/scratch:/scratch]"],
]


# Advice that cannot be a value: names and paths that only the user knows.
IN_WORDS = (
    "needs it; set it",
    "cluster.token_files",
    "docs/models.md",
    "use llama3_8b or",
    "mount the folders",
    "below it",
    "set cluster.container_image to one that has",
)
VALUE = re.compile(r"(?<![\w.])([a-z][\w.]*)=(\[[^]]*\]|[^\s,;()]+)")


def remedies(line: str) -> list[list[str]]:
    """Return the overrides that a refusal advises: what stands after its reason, a list for each
    alternative.

    `KEY=` stands for a key that is to be left out; what other data need beside is not the refusal's
    matter.
    """
    if "leave it out" in line:
        return [[f"{line.partition(' ')[0]}="]]
    advice = re.split(r", or | or (?=[a-z_.]+=)|, (?=[a-z_.]+=)", line.rpartition("; ")[2])
    return [
        [f"{key}={value}" for key, value in VALUE.findall(one)]
        for one in advice
        if VALUE.search(one)
    ]


def applied(overrides: list[str], remedy: list[str]) -> list[str]:
    """Return a command line that follows a remedy: another GPU comes with its own properties."""
    keys = [override.partition("=")[0] for override in remedy]

    def is_replaced(override: str) -> bool:
        key = override.partition("=")[0].lstrip("+")
        return key in keys or ("gpu" in keys and key.startswith("gpu."))

    return [
        *(o for o in overrides if not is_replaced(o)),
        *(o for o in remedy if not o.endswith("=")),
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "way_out"),
    [
        *((name, *case) for name, cases in CASES.items() for case in cases),
        *(("", case, "") for case in MORE),
    ],
    ids=str,
)
def test_each_rule_refuses_in_one_line_with_a_remedy_that_is_accepted(
    name: str, overrides: list[str], way_out: str
) -> None:
    """What a line advises composes at the first attempt, or at the second where it then lacks
    memory.
    """
    with pytest.raises(InputError) as caught:
        compose_plan(overrides)
    line = str(caught.value)
    assert way_out in line and "\n" not in line
    if name:  # it is this rule that refused, and without it nothing before it does
        alone = tuple(rule for rule in rules.RULES if rule.__name__ == name)
        with pytest.raises(InputError, match=re.escape(line.partition("; ")[0])):
            compose_plan(overrides, rules=alone)
    assert remedies(line) or any(words in line for words in IN_WORDS), line
    for remedy in remedies(line):
        try:
            compose_plan(applied(overrides, remedy))
        except InputError as next_one:  # memory has remedies of its own, for another layout
            assert "GB to give" in str(next_one)
            compose_plan(applied(applied(overrides, remedy), remedies(str(next_one))[0]))


def test_a_reference_that_does_not_resolve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(InputError, match=r"^runs_dir: .*variable 'NOT_SET' not found"):
        compose_plan(["runs_dir=${oc.env:NOT_SET}"])


@pytest.mark.parametrize(
    "asked",
    [
        ["model=llama2_7b", "gpu=h800", "precision=mxfp8", "stack=emulated", "mapping.tp=2"],
        ["model=llama31_405b", "gpu=cpu", "mapping.cuda_graphs=true"],
    ],
    ids=" ".join,
)
def test_who_follows_a_remedy_is_not_told_the_same_again(asked: list[str]) -> None:
    """Also where the model then has no room: mapping=single would leave a field that the command
    line names.
    """
    site = ["cluster.container_runtime=none", "cluster.python=python"]
    with pytest.raises(InputError) as caught:
        compose_plan([*asked, *site])
    remedy, *_ = remedies(str(caught.value))
    with pytest.raises(InputError, match="GB"):
        compose_plan(applied([*asked, *site], remedy))


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in rules.RULES} == set(CASES)


@pytest.mark.parametrize(
    "row",
    [r for r in recommended() if r["source"].startswith("NVIDIA")],
    ids=lambda r: ".".join(r[k] for k in ("nemo_ref", "model", "gpu", "dtype")),
)
def test_every_recommended_mapping_passes(row: dict[str, str]) -> None:
    stack = {"v2.3.0": "nemo_25_04", "v2.4.0": "nemo_25_07"}[row["nemo_ref"]]
    precision = {"bf16": "bf16", "fp8": "fp8_delayed", "mxfp8": "mxfp8"}[row["dtype"]]
    cell = [
        f"model={row['model']}",
        f"gpu={row['gpu']}",
        f"stack={stack}",
        f"precision={precision}",
        "experiment=throughput",
    ]
    plan = compose_plan(cell)
    assert plan.num_gpus == int(row["num_gpus"])
    assert {
        k: int(getattr(plan.mapping, k))
        for k in ("tp", "pp", "cp", "micro_batch", "global_batch", "fsdp", "cuda_graphs")
    } == {
        k: int(row[k])
        for k in ("tp", "pp", "cp", "micro_batch", "global_batch", "fsdp", "cuda_graphs")
    }
    assert plan.mapping.vp == int(row["vp"] or 1)


def test_other_numbers_of_gpus_scale_data_parallelism_and_are_checked() -> None:
    assert [compose_plan([*H100_70B, f"num_gpus={n}"]).data_parallel for n in (32, 64, 128)] == [
        1,
        2,
        4,
    ]
    with pytest.raises(InputError, match="global_batch"):
        compose_plan([*H100_70B, "num_gpus=1536", "experiment=throughput"])


def test_iso_mapping_is_that_of_bf16_in_every_precision() -> None:
    plans = [
        compose_plan(["model=llama3_70b", "gpu=gb200", "mapping=iso", f"precision={p}"])
        for p in ("bf16", "fp8_delayed", "fp8_current")
    ]
    assert len({plan.mapping for plan in plans}) == 1 and plans[0].mapping.recompute_layers == 10
    best = compose_plan(["model=llama3_70b", "gpu=gb200", "precision=fp8_delayed"])
    assert best.mapping != plans[0].mapping


def test_what_the_user_gives_is_kept_and_the_rest_filled() -> None:
    plan = compose_plan([*H100_70B, "mapping.tp=8", "mapping.cp=1", "settings.batch=layout"])
    assert (plan.mapping.tp, plan.mapping.cp, plan.mapping.pp, plan.mapping.vp, plan.num_gpus) == (
        8,
        1,
        4,
        5,
        64,
    )
    assert plan.mapping.source.endswith("h100.csv@v2.3.0; changed: tp, cp")


def test_what_was_changed_of_a_recommended_mapping_is_named() -> None:
    whole = compose_plan(H100_70B)
    same = compose_plan([*H100_70B, f"mapping.tp={whole.mapping.tp}", f"num_gpus={whole.num_gpus}"])
    layout = whole.mapping.source.removesuffix("; global batch: the model's")
    assert same.mapping.source == whole.mapping.source and "changed" not in layout
    every = [
        f"mapping.{key}={value}"
        for key, value in whole.mapping.model_dump().items()
        if key not in ("source", "global_batch")
    ]
    plan = compose_plan([*H100_70B, *every, "mapping.global_batch=256"])
    assert (
        plan.num_gpus == 32 and plan.mapping.source == f"{layout}; changed: global_batch, num_gpus"
    )
    assert not differences(
        comparable(same), comparable(whole)
    ) and "mapping.source" not in comparable(plan)


def test_a_cell_without_a_recommended_mapping_has_no_model_parallelism_and_says_so() -> None:
    plan = compose_plan(["model=llama3_tiny", "gpu=b200"])
    assert (plan.mapping.tp, plan.num_gpus) == (
        1,
        1,
    ) and "none for this cell" in plan.mapping.source
    assert (
        compose_plan(["model=llama3_70b", "gpu=h200"]).mapping
        == compose_plan(["model=llama3_70b", "gpu=h100"]).mapping
    )


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("30", 1800), ("5:30", 330), ("04:00:00", 14400), ("1-12", 129600), ("2-00:30", 174600)],
)
def test_time_limits_are_read_as_slurm_reads_them(limit: str, expected: int) -> None:
    assert rules.seconds(limit) == expected


@pytest.mark.parametrize(
    "site",
    [
        "cluster.mounts=[/data:/data:ro,/tokenizers]",
        "cluster.mounts=[/data,/tokenizers:/tokenizers]",
        "cluster.mounts=[/lustre/us:/data/c4,/:/host,/t:/tokenizers/llama3]",
        "cluster.extra_srun=['--container-mounts=/d']",
    ],
)
def test_data_that_is_mounted_is_let_pass(site: str) -> None:
    compose_plan([*H100_8B, *C4, site])


def test_data_need_no_mount_without_a_container() -> None:
    compose_plan(
        [*H100_8B, *C4, "cluster.container_runtime=none", "cluster.python=/opt/nemo/bin/python"]
    )


@pytest.mark.parametrize("gpu", ["b200", "gb200"])
@pytest.mark.parametrize("mapping", ["recommended", "iso"])
@pytest.mark.parametrize("stack", ["nemo_25_04", "nemo_25_07"])
def test_recommended_graphs_are_off_where_layers_are_kept_in_bf16(
    gpu: str, mapping: str, stack: str
) -> None:
    asked = [
        "model=llama3_8b",
        "precision=fp8_current",
        f"gpu={gpu}",
        f"mapping={mapping}",
        f"stack={stack}",
        "gpu.memory_gb=1000",
    ]
    plan = compose_plan(asked)
    assert not plan.mapping.cuda_graphs and "CUDA graphs off: Megatron-Core" in plan.mapping.source
    for more in (["settings.bf16_layers=false"], ["precision=bf16"], ["experiment=throughput"]):
        plan = compose_plan([*asked, *more])
        shared = mapping == "iso" and more == [
            "precision=bf16"
        ]  # with fp8_current, which cannot have them
        assert (
            plan.mapping.cuda_graphs != shared
            and ("CUDA graphs off" in plan.mapping.source) == shared
        )


@pytest.mark.parametrize(
    ("precision", "seq_length", "more"),
    [
        ("fp8_delayed", 8064, []),  # 1,008 tokens a rank
        ("fp8_current", 8000, []),
        ("mxfp8", 8192, ["gpu=b200"]),
        ("fp8_subchannel", 8192, ["stack=nemo_25_07"]),
        ("bf16", 8008, []),
    ],
)
def test_shares_of_tokens_that_transformer_engine_takes_pass(
    precision: str,
    seq_length: int,
    more: list[str],
) -> None:
    compose_plan([*TP8, f"precision={precision}", f"seq_length={seq_length}", *more])


def test_without_sequence_parallelism_only_the_tokens_of_a_gemm_count() -> None:
    small = [
        "mapping=single",
        "mapping.micro_batch=1",
        "mapping.global_batch=1",
        "model.num_layers=2",
    ]
    compose_plan(
        [*H100_8B, *small, "precision=fp8_subchannel", "stack=nemo_25_07", "seq_length=48"]
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data=mock", "data.eod_mask_loss=true"], "data=indexed or data=text"),
        (["data.train=[a]"], "data=indexed"),
        (["precision=bf16", "precision.fp8.margin=1"], "precision=fp8_delayed"),
    ],
)
def test_a_key_of_another_option_is_refused_with_that_option(
    overrides: list[str], says: str
) -> None:
    with pytest.raises(InputError) as caught:
        compose_plan([*H100_8B, *overrides])
    assert str(caught.value) == f"{overrides[-1]}: no such key with these options; it takes {says}"


@pytest.mark.parametrize("stack", ["nemo_25_04", "nemo_25_07"])
@pytest.mark.parametrize("precision", ["bf16", "fp8_current"])
def test_no_plan_has_an_optimizer_that_fsdp_gives_no_gradients(stack: str, precision: str) -> None:
    """On two H200s such runs had a gradient norm of 0 in every step, and their losses stood
    still.
    """
    fsdp = ["model=llama31_405b", f"stack={stack}", f"precision={precision}", "gpu=gb200"]
    fsdp += ["mapping.fsdp=true", "settings=throughput", "data=mock", "gpu.memory_gb=1000"]
    trains = stack == "nemo_25_07"
    filled = compose_plan(fsdp)
    assert filled.settings.precision_aware_optimizer == (trains and precision == "bf16")
    asked = [*fsdp, "settings.precision_aware_optimizer=true"]
    asked += ["precision.fp8.param_gather=false"] * (precision != "bf16")
    if trains:
        assert compose_plan(asked).settings.precision_aware_optimizer
    else:
        with pytest.raises(
            InputError, match=r"no weight is updated .*set settings.precision_aware_optimizer=false"
        ):
            compose_plan(asked)
