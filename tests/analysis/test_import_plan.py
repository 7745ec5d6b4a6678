"""The log is asked first: what it states is the plan's, what contradicts it is refused, what it
lacks is asked for.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis.import_logs import main
from analysis.throughput import main as throughput
from recipes.run_folder import read_plan
from tests.analysis.foreign import LLAMA3_8B, arguments, command, megatron, nemo, write

EIGHT_B = ("model=llama3_8b", "precision=bf16", "gpu=h100")
Table = Callable[[Path], dict[str, Any]]


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]) -> Table:
    """Return the throughput table's row of an imported run."""

    def row(folder: Path) -> dict[str, Any]:
        capsys.readouterr()
        assert throughput([str(folder), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        return dict(found)

    return row


def refused(
    lines: Sequence[str],
    sets: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *more: str,
) -> str:
    """Return the line that refuses an import; nothing is left of it."""
    capsys.readouterr()
    assert main(command(write(tmp_path / "log", lines), tmp_path / "run", sets, *more)) == 2
    said = capsys.readouterr()
    assert (
        not said.out
        and said.err.startswith("error: ")
        and said.err.count("\n") == 1
        and not (tmp_path / "run").exists()
    )
    return said.err


F04 = {
    **LLAMA3_8B,
    "world_size": 8,
    "micro_batch_size": 1,
    "global_batch_size": 64,
    "fp8": None,
    "bf16": True,
}
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.mark.parametrize(
    ("stated", "layers"),
    [
        (RECOMPUTED, 32),
        (
            {
                **RECOMPUTED,
                "pipeline_model_parallel_size": 4,
                "virtual_pipeline_model_parallel_size": 2,
            },
            4,
        ),
        ({**RECOMPUTED, "recompute_method": "block", "recompute_num_layers": 7}, 7),
        ({"recompute_granularity": "selective"}, 0),
        ({"recompute_granularity": None}, 0),
    ],
)
def test_a_run_that_ran_is_not_refused_by_an_estimate_and_its_recomputation_is_the_logs(
    stated: dict[str, Any], layers: int, tmp_path: Path
) -> None:
    """F04: 8B at sequence 8,192 on one GPU per replica is estimated at 110 GB, and it ran on H100s
    of 80 GB.
    """
    log = write(tmp_path / "log", [*arguments(**F04, **stated), *megatron(64, 7.424)])
    assert main(command(log, tmp_path / "run", EIGHT_B)) == 0
    plan = read_plan(tmp_path / "run")
    assert plan.mapping.recompute_layers == layers and plan.num_gpus == 8
    assert plan.mapping.vp == stated.get("virtual_pipeline_model_parallel_size", 1)


LIGHTNING = [
    "GPU available: True (cuda), used: True",
    "All distributed processes registered. Starting with 128 processes",
]
RANKS = ", ".join(str([4 * i + j for j in range(4)]) for i in range(32))
NUMBER_OF_GPUS = {
    "Lightning": LIGHTNING,
    "Lightning, a rank": ["Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/128"],
    "Megatron's arguments": arguments(world_size=128),
    "Megatron's sentence": [
        "using world size: 128, data-parallel size: 4, context-parallel size: 2,"
        " tensor-model-parallel size: 4, pipeline-model-parallel size: 4"
    ],
    "data-parallel size": arguments(
        data_parallel_size=4,
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=4,
        context_parallel_size=2,
    ),
    "torchrun's log": [
        "  min_nodes          : 16",
        "  max_nodes          : 16",
        "  nproc_per_node     : 8",
    ],
    "torchrun's command": ["+ torchrun --nproc_per_node=8 --nnodes=16 pretrain.py --lr 1e-4"],
    "torchrun's command, hyphens": ["+ torchrun --nproc-per-node 8 --nnodes 16 pretrain.py"],
    "DeepSpeed's launcher": [
        "[2026-03-04 08:00:00,000] [INFO] [launch.py:175:main] dist_world_size=128"
    ],
    "MaxText": ["Num_devices: 128, shape OrderedDict([('data', 1), ('fsdp', 128)])"],
    "Accelerate": [
        "Distributed environment: DistributedType.MULTI_GPU  Backend: nccl",
        "Num processes: 128",
    ],
    "Lightning's arguments": ["Trainer(accelerator='gpu', devices=8, num_nodes=16, max_steps=40)"],
    "arguments in Python": ["<Partial[Trainer(", "    devices=8,", "    num_nodes=16,"],
    "a namespace": ["Namespace(lr=0.0001, local_world_size=8, world_size=128)"],
    "JSON before the lines": ['{"world_size": 128, "seed": 7}'],
    "NeMo 1's YAML": ["  trainer:", "    devices: 8", "    num_nodes: 16"],
    "NeMo 2's groups": [
        "[NeMo I 2025-06-02 12:00:00 nemo_logging:393] All tensor model parallel group ranks:"
        f" [{RANKS}]"
    ],
    "an environment": ["[rank0]: WORLD_SIZE=128 LOCAL_WORLD_SIZE=8"],
    "a time before it": [f"2026-03-04T08:00:00.123Z {line}" for line in arguments(world_size=128)],
    "a rank's prefix": [f"0: {LIGHTNING[1]}", f"\x1b[32m[rank3]: {LIGHTNING[1]}\x1b[0m"],
}


@pytest.mark.parametrize("stated", NUMBER_OF_GPUS.values(), ids=NUMBER_OF_GPUS.keys())
def test_the_number_of_gpus_is_the_logs_and_not_the_recommended_layouts(
    stated: list[str], tmp_path: Path, table: Table
) -> None:
    """F05: 70B is recommended on 64 GPUs; 128 ran: 1,573 tokens/s/GPU and 76.6 %, not 3,146 and 153
    %.
    """
    log = write(tmp_path / "log", [*stated, *nemo(256, 10.4, TFLOPS_per_GPU=758.1)])
    assert (
        main(command(log, tmp_path / "run", ["model=llama3_70b", "precision=bf16", "gpu=h100"]))
        == 0
    )
    row = table(tmp_path / "run")
    assert (
        row["num_gpus"] == 128
        and row["tokens_per_s_per_gpu"] == pytest.approx(1573, rel=2e-3)
        and row["mfu"] == pytest.approx(0.766, abs=0.002)
    )


SEVENTY_B = ("model=llama3_70b", "precision=bf16", "gpu=h100")
IMPOSSIBLE = [
    (
        [],
        nemo(256, 10.4, TFLOPS_per_GPU=758.1),
        SEVENTY_B,
        "nothing states num_gpus, on which they depend; add --set num_gpus=…",
    ),
    ([], nemo(256, 10.4, tokens_per_sec_per_gpu=1573.0), SEVENTY_B, "nothing states num_gpus"),
    (
        [],
        nemo(256, 10.4, TFLOPS_per_GPU=758.1),
        (*SEVENTY_B, "num_gpus=64"),
        "num_gpus=64 (about 128 would fit)",
    ),
    (
        [],
        nemo(256, 10.4, tokens_per_sec_per_gpu=1573.0),
        (*SEVENTY_B, "num_gpus=64"),
        "prints 1,573 tokens/s per GPU, and its step time gives 3,146",
    ),
    (
        [],
        nemo(256, 10.4),
        (*SEVENTY_B, "num_gpus=64"),
        "an MFU of 143% of h100's 989 TFLOP/s, which is impossible",
    ),
    (
        LIGHTNING,
        nemo(256, 10.4),
        (*SEVENTY_B, "num_gpus=64"),
        "the log states num_gpus=128 (world_size 128), --set num_gpus=64",
    ),
    (
        [*LIGHTNING, "Starting with 64 processes"],
        nemo(256, 10.4),
        SEVENTY_B,
        "the log states num_gpus as 128 and 64",
    ),
    (
        LIGHTNING,
        nemo(256, 10.4, max_memory_allocated=500e9),
        SEVENTY_B,
        "the log's memory peaks at 500 GB, and h100 has 80",
    ),
    (
        arguments(**F04),
        megatron(64, 7.424, tflops=1022.0),
        EIGHT_B,
        "prints 1,022 TFLOP/s per GPU, and its step time gives",
    ),
    (
        ["+ torchrun --nproc_per_node 8 --nnodes=$NODES x.py"],
        nemo(256, 10.4, TFLOPS_per_GPU=758.1),
        SEVENTY_B,
        "nothing states num_gpus",
    ),
    (
        ["+ torchrun --nproc_per_node 8 --nnodes 8:16 x.py"],
        nemo(256, 10.4, TFLOPS_per_GPU=758.1),
        SEVENTY_B,
        "nothing states num_gpus",
    ),
    (
        ["[titan] - INFO - Float8 tensorwise scaled training active"],
        megatron(64, 7.424),
        (*EIGHT_B, "num_gpus=8"),
        "states FP8 (fp8 active)",
    ),
    (
        ["  Total train batch size (w. parallel, distributed & accumulation) = 1,024"],
        nemo(1024, 99.0),
        (*EIGHT_B, "mapping.global_batch=512"),
        "the log states mapping.global_batch=1024",
    ),
    (
        ["Config param max_target_length: 4096"],
        nemo(64, 7.4),
        (*EIGHT_B, "seq_length=8192"),
        "the log states seq_length=4096",
    ),
    (arguments(**F04, fp16=True), megatron(64, 7.424), EIGHT_B, "the log states fp16"),
    (arguments(**F04, fp4="e2m1"), megatron(64, 7.424), EIGHT_B, "the log states fp4 e2m1"),
    (
        arguments(**F04, num_experts=8),
        megatron(64, 7.424),
        EIGHT_B,
        "num_experts 8: a mixture of experts",
    ),
    (
        LIGHTNING,
        nemo(256, 10.4, tokens_per_sec_per_gpu=1573.0 * 128),
        SEVENTY_B,
        "that is the rate of all 128 GPUs together, or",
    ),
]


@pytest.mark.parametrize(("stated", "lines", "sets", "says"), IMPOSSIBLE)
def test_rates_that_cannot_be_are_refused_with_the_likely_cause(
    stated: list[str],
    lines: list[str],
    sets: Sequence[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert says in refused([*stated, *lines], sets, tmp_path, capsys)


def test_a_number_of_gpus_that_nothing_states_is_asked_for_and_rates_are_left_out(
    tmp_path: Path, table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    """F20: memory and step time stand without it; what would be per GPU does not."""
    log = write(
        tmp_path / "log",
        nemo(128, 12.6, max_memory_allocated=65123456000.0, max_memory_reserved=71234567168.0),
    )
    assert main(command(log, tmp_path / "run", EIGHT_B)) == 0
    assert (
        "does not state num_gpus, so tables have no rate per GPU; import it again with --set"
        " num_gpus=…" in capsys.readouterr().out
    )
    row = table(tmp_path / "run")
    assert row["memory_gb"] == pytest.approx(65.1, abs=0.05) and row[
        "step_time_s"
    ] == pytest.approx(12.615, abs=0.01)
    assert (
        row["num_gpus"],
        row["tokens_per_s_per_gpu"],
        row["mfu"],
        row["tflops_per_gpu"],
        row["share_of_published"],
    ) == (None,) * 5


TENSORWISE = {
    **F04,
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}
CONTRADICTED = [
    (
        TENSORWISE,
        ["precision=fp8_delayed"],
        "precision=fp8_current (fp8_recipe tensorwise), --set precision=fp8_delayed",
    ),
    (
        {**TENSORWISE, "fp8_recipe": "delayed"},
        ["precision=fp8_current"],
        "precision=fp8_delayed (fp8_recipe delayed), --set precision=fp8_current",
    ),
    ({**TENSORWISE, "fp8_recipe": "mxfp8"}, ["precision=fp8_current"], "precision=mxfp8"),
    (
        {**TENSORWISE, "fp8_recipe": "blockwise"},
        ["precision=fp8_current"],
        "precision=fp8_subchannel",
    ),
    (
        {**TENSORWISE, "fp8_recipe": "Fp8Recipe.tensorwise"},
        ["precision=fp8_delayed"],
        "precision=fp8_current",
    ),
    (TENSORWISE, ["precision=bf16"], "FP8 (fp8 hybrid), --set precision=bf16"),
    (F04, ["precision=fp8_current"], "precision=bf16 (fp8 None), --set precision=fp8_current"),
    (
        TENSORWISE,
        ["precision=fp8_current", "precision.fp8.first_layers_bf16=0"],
        "precision.fp8.first_layers_bf16=1",
    ),
    (
        {**F04, "num_layers": 16},
        ["precision=bf16"],
        "model.num_layers=16 (num_layers 16), the plan model.num_layers=32",
    ),
    ({**F04, "hidden_size": 8192}, ["precision=bf16"], "model.hidden_size=8192"),
    ({**F04, "ffn_hidden_size": 11008}, ["precision=bf16"], "model.ffn_hidden_size=11008"),
    ({**F04, "num_attention_heads": 64}, ["precision=bf16"], "model.num_attention_heads=64"),
    ({**F04, "num_query_groups": 4}, ["precision=bf16"], "model.num_query_groups=4"),
    (
        {**F04, **RECOMPUTED},
        ["precision=bf16", "mapping.recompute_layers=0"],
        "mapping.recompute_layers=32",
    ),
    (
        {**F04, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
        ["precision=bf16", "mapping.vp=2"],
        "mapping.vp=4",
    ),
    ({**F04, "tensor_model_parallel_size": 2}, ["precision=bf16", "mapping.tp=1"], "mapping.tp=2"),
    (F04, ["precision=bf16", "seq_length=4096"], "seq_length=8192"),
    (F04, ["precision=bf16", "mapping.micro_batch=2"], "mapping.micro_batch=1"),
    ({**F04, "lr": 3e-4}, ["precision=bf16", "train.max_lr=1e-4"], "train.max_lr=0.0003"),
]


@pytest.mark.parametrize(("stated", "sets", "says"), CONTRADICTED)
def test_a_setting_that_contradicts_the_log_is_refused_with_both_values(
    stated: dict[str, Any],
    sets: Sequence[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """F06, and every argument that the log states and the plan holds."""
    lines = [*arguments(**stated), *megatron(64, 7.424)]
    said = refused(lines, ["model=llama3_8b", "gpu=h100", *sets], tmp_path, capsys)
    assert f"the log states {says}" in said


EVERYTHING = {
    **TENSORWISE,
    "world_size": 32,
    "fp8_recipe": "delayed",
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 4,
    "train_iters": 40,
    "lr_warmup_iters": 5,
    "eval_interval": 10,
    "eval_iters": 4,
    "seed": 7,
    "lr": 3e-4,
    "min_lr": 3e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "rotary_base": 500000,
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 128256,
    "use_custom_fsdp": False,
    "enable_cuda_graph": False,
    "cpu_offloading": False,
    "tp_comm_overlap": False,
    "recompute_granularity": "full",
    "recompute_method": "block",
    "recompute_num_layers": 2,
    "fp8_param_gather": True,
    "fp8_margin": 0,
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
}
OTHERWISE = {
    "precision": "fp8_current",
    "precision.fp8.format": "e4m3",
    "model.activation": "squared_relu",
    "precision.fp8.amax_compute_algo": "most_recent",
    "mapping.global_batch": "128",
    "num_gpus": "64",
}


def test_every_setting_that_contradicts_what_a_log_states_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each key of the plan that Megatron-LM's arguments state, one at a time, the manifest says
    which those are.
    """
    lines = [*arguments(**EVERYTHING), *megatron(64, 7.424)]
    gpu = ["model=llama3_8b", "gpu=h100"]
    assert main(command(write(tmp_path / "log", lines), tmp_path / "all", gpu)) == 0
    stated = json.loads((tmp_path / "all" / "manifest.json").read_text())["imported"]["stated"]
    assert len(stated) >= 36
    for key, value in stated.items():
        on = {"true": "false", "false": "true"}.get(value)
        other = (
            OTHERWISE.get(key)
            or on
            or (f"{2 * int(value) or 1}" if value.isdigit() else f"{float(value) / 2:g}")
        )
        said = refused(lines, [*gpu, f"{key}={other}"], tmp_path, capsys)
        assert (
            f"{key}={value}" in said
            and "the log states" in said
            and said.lower().count(f"{key}=") >= 2
        ), said


TWO_WORLDS = [
    *arguments(**F04),
    *megatron(64, 7.424)[:20],
    *arguments(**{**F04, "world_size": 16}),
    *megatron(64, 7.424)[15:],
]


def test_a_setting_chooses_only_among_what_a_log_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that was requeued on other nodes."""
    assert "as 8 and 16 (world_size 8; world_size 16); choose one" in refused(
        TWO_WORLDS, EIGHT_B, tmp_path, capsys
    )
    assert "as 8 and 16, --set num_gpus=32; choose one of the log's" in refused(
        TWO_WORLDS, [*EIGHT_B, "num_gpus=32"], tmp_path, capsys
    )
    assert main(command(tmp_path / "log", tmp_path / "run", [*EIGHT_B, "num_gpus=16"])) == 0
    assert "--set chooses, and part of the log is of another plan" in capsys.readouterr().out


def test_a_log_that_states_all_but_model_and_gpu_needs_no_more(tmp_path: Path) -> None:
    stated = {
        **TENSORWISE,
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "first_last_layers_bf16": False,
        "seed": 42,
        "clip_grad": 0.5,
        "adam_beta2": 0.98,
        "lr_warmup_iters": 500,
    }
    log = write(tmp_path / "log", [*arguments(**stated), *megatron(64, 7.424)])
    assert main(command(log, tmp_path / "run", ["model=llama3_8b", "gpu=h100"])) == 0
    plan, fp8 = read_plan(tmp_path / "run"), read_plan(tmp_path / "run").precision.fp8
    assert fp8 and (fp8.scaling, fp8.first_layers_bf16, fp8.last_layers_bf16) == ("current", 0, 0)
    assert (
        plan.mapping.tp,
        plan.mapping.cp,
        plan.seed,
        plan.train.clip_grad,
        plan.train.adam_beta2,
    ) == (2, 2, 42, 0.5, 0.98)
    assert plan.train.warmup_steps == 500  # longer than the log, whose schedule is another


def test_the_model_that_has_the_sizes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused([*arguments(**F04), *megatron(64, 7.424)], SEVENTY_B, tmp_path, capsys)
    assert "(llama3_8b, mistral_7b: its sizes)" in said


BRIDGE = """model:
  num_layers: 32
  hidden_size: 4096
  fp8: hybrid
  fp8_recipe: tensorwise
  tensor_model_parallel_size: 2
  recompute_granularity: null
optimizer:
  fp8_recipe: delayed
  lr: 0.0003
ddp:
  fp8_param_gather: true
train:
  global_batch_size: 64
  micro_batch_size: 2
  train_iters: 40
dataset:
  seq_length: 4096
rng:
  seed: 7"""


def test_sections_of_a_configuration_that_repeat_a_name_do_not_count(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log", [*BRIDGE.split("\n"), *arguments(world_size=8), *megatron(64, 3.2)]
    )
    assert main(command(log, tmp_path / "run", ["model=llama3_8b", "gpu=h100"])) == 0
    plan = read_plan(tmp_path / "run")
    assert plan.precision.name == "fp8_current" and (
        plan.mapping.tp,
        plan.mapping.micro_batch,
        plan.seq_length,
    ) == (2, 2, 4096)
    assert plan.seed == 7 and plan.train.max_lr == 3e-4
