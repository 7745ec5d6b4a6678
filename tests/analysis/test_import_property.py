"""For random plans: each harness's log gives the plan's numbers back, without a --set that the log
already answers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from analysis.import_logs import main
from analysis.runs.load import load_run
from recipes.compose.tree import compose_plan
from recipes.estimate.flops import flops_per_token
from recipes.plan import Plan
from tests.analysis.foreign import arguments, losses, write

RATE = 400e12  # FLOP/s a GPU does in the logs: no MFU above 100 %
NAMES = {"fp8_delayed": "delayed", "fp8_current": "tensorwise", "mxfp8": "mxfp8"}
PRESETS = {
    "bf16": "bf16_mixed",
    "fp8_delayed": "bf16_with_fp8_mixed",
    "fp8_current": "bf16_with_fp8_current_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
}


@dataclass(frozen=True)
class Drawn:
    """A plan, and the interval at which its run logs."""

    plan: Plan
    every: int

    @property
    def seconds(self) -> float:
        """Return a step time at RATE."""
        plan = self.plan
        return (
            plan.tokens_per_step
            / plan.num_gpus
            * flops_per_token(plan.model, plan.seq_length, causal=False)
            / RATE
        )

    @property
    def steps(self) -> list[int]:
        """Return the steps that are logged."""
        return list(range(self.every, self.plan.train.max_steps + 1, self.every))


@st.composite
def plans(draw: st.DrawFn) -> Drawn:
    tp, pp, cp = (
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2])),
    )
    vp = draw(st.sampled_from([1, 2, 4])) if pp > 1 else 1
    replicas, micro, rounds = (
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 2])),
        draw(st.integers(1, 3)),
    )
    precision = draw(st.sampled_from(["bf16", "fp8_delayed", "fp8_current", "mxfp8"]))
    sizes = {
        "tp": tp,
        "pp": pp,
        "cp": cp,
        "vp": vp,
        "micro_batch": micro,
        "global_batch": replicas * micro * pp * rounds,
        "cuda_graphs": "false",
        "fsdp": "false",
    }
    recomputed = draw(st.integers(0, 32 // pp // vp))
    overrides = [
        f"mapping.{name}={value}"
        for name, value in {**sizes, "recompute_layers": recomputed, "offload_layers": 0}.items()
    ]
    if precision == "fp8_current":
        overrides += [
            f"precision.fp8.{end}_layers_bf16={draw(st.integers(0, 2))}"
            for end in ("first", "last")
        ]
    overrides += [
        f"num_gpus={tp * pp * cp * replicas}",
        f"seq_length={draw(st.sampled_from([2048, 4096, 8192]))}",
        f"seed={draw(st.integers(1, 9999))}",
    ]
    overrides += [
        f"train.max_steps={draw(st.integers(12, 40))}",
        f"train.max_lr={draw(st.sampled_from([1e-4, 3e-4]))}",
    ]
    return Drawn(
        compose_plan(
            ["model=llama3_8b", f"precision={precision}", "gpu=b200", *overrides], rules=()
        ),
        draw(st.sampled_from([1, 2, 5])),
    )


def megatron_arguments(plan: Plan) -> dict[str, object]:
    m, model, fp8 = plan.mapping, plan.model, plan.precision.fp8
    values: dict[str, object] = {
        "world_size": plan.num_gpus,
        "tensor_model_parallel_size": m.tp,
        "pipeline_model_parallel_size": m.pp,
        "context_parallel_size": m.cp,
        "virtual_pipeline_model_parallel_size": m.vp if m.vp > 1 else None,
        "micro_batch_size": m.micro_batch,
        "global_batch_size": m.global_batch,
        "seq_length": plan.seq_length,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "group_query_attention": True,
        "recompute_granularity": "full" if m.recompute_layers else None,
        "recompute_method": "block" if m.recompute_layers else None,
        "recompute_num_layers": m.recompute_layers or None,
        "fp8": fp8.format if fp8 else None,
        "fp8_recipe": NAMES.get(plan.precision.name, "delayed"),
        "seed": plan.seed,
        "lr": plan.train.max_lr,
    }
    if fp8:
        kept = (fp8.first_layers_bf16, fp8.last_layers_bf16)
        values |= {
            "first_last_layers_bf16": any(kept),
            "num_layers_at_start_in_bf16": kept[0],
            "num_layers_at_end_in_bf16": kept[1],
        }
    return values


def megatron_lines(drawn: Drawn) -> list[str]:
    plan, loss = drawn.plan, losses(drawn.plan.train.max_steps)
    text = " [2026-03-04 08:00:01] iteration {0:8d}/{1:8d} | consumed samples: {2:12d} |"
    text += " elapsed time per iteration (ms): {3:.1f} | learning rate: 1.0E-04 |"
    text += (
        " global batch size: {4:5d} | lm loss: {5:.6E} | loss scale: 1.0 | number of skipped"
        " iterations:   0 | number of nan iterations:   0 |"
    )
    batch, total = plan.mapping.global_batch, plan.train.max_steps
    return [
        text.format(step, total, step * batch, drawn.seconds * 1000, batch, loss[step - 1])
        for step in drawn.steps
    ]


def megatron(drawn: Drawn, place: Path) -> tuple[Path, list[str]]:
    return (
        write(
            place / "log", [*arguments(**megatron_arguments(drawn.plan)), *megatron_lines(drawn)]
        ),
        [],
    )


def bridge(drawn: Drawn, place: Path) -> tuple[Path, list[str]]:
    """Its YAML, sections sorted by name; the number of processes is not in it."""
    values = megatron_arguments(drawn.plan)
    values.pop("world_size")
    lr, training = (
        values.pop("lr"),
        {name: values.pop(name) for name in ("micro_batch_size", "global_batch_size")},
    )
    sections = {
        "dataset": {"seq_length": values.pop("seq_length")},
        "model": values,
        "optimizer": {"fp8_recipe": "delayed", "lr": lr},
    }
    sections |= {
        "rng": {"seed": values.pop("seed")},
        "train": {**training, "train_iters": drawn.plan.train.max_steps},
    }
    lines = [
        line
        for name, part in sections.items()
        for line in (
            f"{name}:",
            *(f"  {k}: {'null' if v is None else str(v).lower()}" for k, v in part.items()),
        )
    ]
    return write(place / "log", [*lines, *megatron_lines(drawn)]), [
        f"num_gpus={drawn.plan.num_gpus}"
    ]


def not_in(drawn: Drawn, *names: str) -> list[str]:
    """Return settings that a format does not state."""
    plan, fp8 = drawn.plan, drawn.plan.precision.fp8
    known = {f"mapping.{name}": value for name, value in plan.mapping.model_dump().items()}
    known |= {
        "precision": plan.precision.name,
        "seq_length": plan.seq_length,
        "seed": plan.seed,
        "train.max_lr": plan.train.max_lr,
    }
    kept = [
        f"precision.fp8.{end}_layers_bf16={getattr(fp8, f'{end}_layers_bf16')}"
        for end in ("first", "last")
        if fp8
    ]
    return [*(f"{name}={known[name]}" for name in names), *kept]


def nemo(drawn: Drawn, place: Path) -> tuple[Path, list[str]]:
    """Lightning's processes, NeMo's groups and preset, and lines of four digits."""
    plan, loss = drawn.plan, losses(drawn.plan.train.max_steps)
    m, world = plan.mapping, range(plan.num_gpus)
    lines = [
        f"All distributed processes registered. Starting with {plan.num_gpus} processes",
        f"plugins={PRESETS[plan.precision.name]}",
    ]
    for what, size in (("tensor model", m.tp), ("pipeline model", m.pp), ("context", m.cp)):
        lines.append(
            f"All {what} parallel group ranks:"
            f" {[list(world[i : i + size]) for i in range(0, plan.num_gpus, size)]}"
        )
    for step in drawn.steps:
        text = (
            f"Training epoch 0, iteration {step - 1}/{plan.train.max_steps - 1} | lr: 0.0001 |"
            f" global_batch_size: {m.global_batch}"
        )
        lines.append(
            f"{text} | global_step: {step - 1} | reduced_train_loss: {loss[step - 1]:.4} |"
            f" train_step_timing in s: {drawn.seconds:.4}"
        )
    sets = not_in(
        drawn,
        "mapping.vp",
        "mapping.micro_batch",
        "mapping.recompute_layers",
        "seq_length",
        "seed",
        "train.max_lr",
    )
    return write(place / "log", lines), sets


def titan(drawn: Drawn, place: Path) -> tuple[Path, list[str]]:
    """Its mesh, its sentence, and tokens/s per device in place of step times."""
    plan, loss = drawn.plan, losses(drawn.plan.train.max_steps)
    m = plan.mapping
    mesh = {
        name: size
        for name, size in (
            ("pp", m.pp),
            ("dp_shard", plan.data_parallel),
            ("cp", m.cp),
            ("tp", m.tp),
        )
        if size > 1
    } or {"dp_shard": 1}
    lines = [
        f"[titan] - Building {len(mesh)}-D device mesh with {list(mesh)}, {list(mesh.values())}"
    ]
    lines.append(
        f"[titan] - Training starts at step 1, with local batch size {m.micro_batch}, global batch size {m.global_batch}, "  # noqa: E501
        f"sequence length {plan.seq_length}, total steps {plan.train.max_steps} (warmup 2)"
    )
    rate = plan.tokens_per_step / plan.num_gpus / drawn.seconds
    lines += [
        f"[titan] 2026-03-04 08:00:01,123 - root - INFO - step: {s:2}  loss: {loss[s - 1]:7.4f} "
        f" tps: {rate:,.3f}  mfu: 41.70%"
        for s in drawn.steps
    ]
    return write(place / "log", lines), not_in(
        drawn,
        "precision",
        "mapping.vp",
        "mapping.micro_batch",
        "mapping.recompute_layers",
        "seed",
        "train.max_lr",
    )


def dllogger(drawn: Drawn, place: Path) -> tuple[Path, list[str]]:
    """NeMo 1's configuration as parameters."""
    plan, loss = drawn.plan, losses(drawn.plan.train.max_steps)
    names = {
        "tensor_model_parallel_size": plan.mapping.tp,
        "pipeline_model_parallel_size": plan.mapping.pp,
        "context_parallel_size": plan.mapping.cp,
    }
    names |= {
        "virtual_pipeline_model_parallel_size": plan.mapping.vp,
        "micro_batch_size": plan.mapping.micro_batch,
        "encoder_seq_length": plan.seq_length,
    }
    data: dict[str, object] = {
        f"model/{name}": value
        for name, value in {**names, "seed": plan.seed, "optim/lr": plan.train.max_lr}.items()
    }
    nodes = 2 if plan.num_gpus % 2 == 0 else 1
    recomputed, block = plan.mapping.recompute_layers, "model/activations_checkpoint"
    data |= {
        "trainer/devices": plan.num_gpus // nodes,
        "trainer/num_nodes": nodes,
        f"{block}_granularity": "full" if recomputed else None,
    }
    data |= {f"{block}_method": "block", f"{block}_num_layers": recomputed}
    rows: list[dict[str, object]] = [{"type": "LOG", "step": "PARAMETER", "data": data}]
    for step in drawn.steps:
        values = {
            "reduced_train_loss": loss[step - 1],
            "train_step_timing in s": drawn.seconds,
            "global_batch_size": float(plan.mapping.global_batch),
        }
        rows.append(
            {"type": "LOG", "step": step - 1, "data": {**values, "global_step": float(step - 1)}}
        )
    log = write(place / "dllogger.json", [f"DLLL {json.dumps(row)}" for row in rows])
    return log, not_in(drawn, "precision")


def megatron_tensorboard(drawn: Drawn, place: Path) -> tuple[Path, list[str]]:
    """Scalars, and the arguments as texts (megatron/training/initialize.py:412, core_v0.12.3)."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer, loss = EventFileWriter(str(place / "events")), losses(drawn.plan.train.max_steps)
    text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    for name, value in megatron_arguments(drawn.plan).items():
        tensor = make_tensor_proto([str(value).encode()])
        writer.add_event(
            Event(
                step=0,
                wall_time=1e9,
                summary=Summary(
                    value=[Summary.Value(tag=f"{name}/text_summary", metadata=text, tensor=tensor)]
                ),
            )
        )
    for step in drawn.steps:
        for tag, number in (("lm loss", loss[step - 1]), ("iteration-time", drawn.seconds)):
            writer.add_event(
                Event(
                    step=step,
                    wall_time=1e9 + step,
                    summary=Summary(value=[Summary.Value(tag=tag, simple_value=number)]),
                )
            )
    writer.close()
    return place / "events", []


FORMATS: dict[str, Callable[[Drawn, Path], tuple[Path, list[str]]]] = {
    each.__name__: each for each in (megatron, bridge, nemo, titan, dllogger, megatron_tensorboard)
}
NUMBERS = ("num_gpus", "seq_length", "seed", "tokens_per_step", "data_parallel")
NOT_THE_RUNS = {
    "source",
    "tp_overlap",
    "cuda_graphs",
}  # of the layout: where it is from, and what follows from it


@pytest.mark.parametrize("form", FORMATS)
@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=plans())
def test_a_log_gives_the_plans_numbers_back(
    form: str, drawn: Drawn, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp(form)
    source, sets = FORMATS[form](drawn, place)
    more = [] if drawn.plan.precision.fp8 is None else ["--assert-fp8"]
    steps = (
        [f"train.max_steps={drawn.plan.train.max_steps}"]
        if form in ("dllogger", "megatron_tensorboard")
        else []
    )
    assert (
        main(
            [
                str(source),
                "--out",
                str(place / "run"),
                "--set",
                "model=llama3_8b",
                "gpu=b200",
                *sets,
                *steps,
                *more,
            ]
        )
        == 0
    )
    run, plan = load_run(place / "run"), drawn.plan
    assert {name: getattr(run.plan, name) for name in NUMBERS} == {
        name: getattr(plan, name) for name in NUMBERS
    }
    assert run.plan.mapping.model_dump(exclude=NOT_THE_RUNS) == plan.mapping.model_dump(
        exclude=NOT_THE_RUNS
    )
    assert (
        run.plan.train.max_steps == plan.train.max_steps
        and run.plan.train.max_lr == plan.train.max_lr
    )
    assert run.plan.precision.name == plan.precision.name
    if plan.precision.fp8 and run.plan.precision.fp8:
        names = ("scaling", "format", "first_layers_bf16", "last_layers_bf16")
        assert [getattr(run.plan.precision.fp8, name) for name in names] == [
            getattr(plan.precision.fp8, name) for name in names
        ]
    wanted = losses(plan.train.max_steps)
    assert run.steps["step"].tolist() == drawn.steps
    assert run.steps["loss"] == pytest.approx(
        [wanted[step - 1] for step in drawn.steps], abs=5.1e-4
    )
    assert run.steps["step_time_s"] == pytest.approx(
        [drawn.seconds] * len(drawn.steps), rel=2e-3, abs=5.1e-5
    )
    assert run.has_rate
