"""Trains run folders, and compares models with Hugging Face's, in one process that imports NeMo
once and forks for each.

    python -m tests.recipes.model_worker JOBS.json

JOBS.json: {"train": [folder, …], "resume": [[folder, folder with a checkpoint], …], "compare":
[[name, plan as text], …], "count": [the same]}.

A line of JSON comes out for each job.  The parent runs no
arithmetic before it forks, so that a child finds no threads that are not there.
"""

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG, BATCH = 48, 2  # tokens of a sequence, sequences


def main(jobs: dict[str, Any]) -> None:
    """Run the jobs one after another."""
    import recipes.training.run as product
    from recipes.plan import plan_from_json
    from recipes.training import cpu

    cpu.activate()
    import recipes.training.recipe  # noqa: F401  # NeMo, once

    for folder in jobs["train"]:
        _forked(
            folder,
            lambda folder=folder: {"rc": product.main(Path(folder))},
            Path(folder) / "log.txt",
        )
    for folder, base in jobs.get("resume", []):
        _forked(
            folder,
            lambda folder=folder, base=base: resumed(Path(folder), Path(base)),
            Path(folder) / "log.txt",
        )
    for name, plan in jobs["compare"]:
        _forked(
            name,
            lambda plan=plan: compared(plan_from_json(plan)),
            Path(jobs["logs"]) / f"{name}.txt",
        )
    for name, plan in jobs.get("count", []):
        answer = lambda plan=plan: counted(plan_from_json(plan))  # noqa: E731
        _forked(name, answer, Path(jobs["logs"]) / f"{name}.txt")


def counted(plan: Any) -> dict[str, Any]:
    """Return the FP8 GEMMs counted in a step of a plan with recomputation.

    Megatron-Core recomputes on the CPU; its BF16 layers stand in for Transformer Engine's.
    """
    import torch
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from recipes.training.te_layers import Watched

    def recomputed(config: Any) -> None:
        config.recompute_granularity, config.recompute_method = "full", "block"
        config.recompute_num_layers = plan.mapping.recompute_layers

    on_cpu = {"gpu": plan.gpu.model_copy(update={"compute_capability": None})}
    in_bf16 = {"precision": plan.precision.model_copy(update={"fp8": None})}
    model, watched = _ours(plan.model_copy(update=on_cpu | in_bf16), recomputed).train(), []
    for number, layer in enumerate(model.module.decoder.layers):
        for linear in layer.modules():
            if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                fp8 = plan.precision.fp8
                linear.fp8 = (
                    fp8.first_layers_bf16 <= number < plan.model.num_layers - fp8.last_layers_bf16
                )
                watched.append(Watched(linear, None))
                linear.register_forward_hook(watched[-1].forward)
    for _ in range(plan.mapping.global_batch // plan.mapping.micro_batch):
        tokens = torch.randint(plan.model.vocab_size, (plan.mapping.micro_batch, LONG))
        places = torch.arange(LONG).expand_as(tokens)
        model.module(tokens, places, None).float().mean().backward()
    return {"rc": 0, "gemms": sum(each.fp8_calls.total for each in watched)}


def resumed(folder: Path, base: Path) -> dict[str, Any]:
    """Train on from another folder's checkpoint, a forked process a rank; fail where one fails."""
    import recipes.training.run as product
    from recipes.run_folder import read_plan

    os.environ["MKL_CBWR"] = (
        "COMPATIBLE"  # else a GEMM's sums depend on where its operands lie in memory
    )
    shutil.copytree(base / "checkpoints", folder / "checkpoints")
    world, others = read_plan(folder).num_gpus, []
    os.environ["WORLD_SIZE"] = str(world)
    for rank in range(1, world):
        pid = os.fork()
        if pid == 0:
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            code = 1
            try:
                code = product.main(folder)
            finally:
                os._exit(code)
        others.append(pid)
    codes = [
        product.main(folder),
        *(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in others),
    ]
    return {"rc": int(any(codes))}


def _forked(name: str, job: Callable[[], dict[str, Any]], log: Path) -> None:
    """Print what `job` returns in a process of its own, whose output goes to `log`."""
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        answer = {"rc": 1}
        with log.open("w") as file, socket.socket() as port:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            port.bind(("127.0.0.1", 0))
            chosen = port.getsockname()[1]
            port.close()
            os.environ.update(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(chosen),
                RANK="0",
                WORLD_SIZE="1",
                LOCAL_RANK="0",
            )
            try:
                answer = job()
            except BaseException:
                traceback.print_exc()
            os.write(write, json.dumps(answer).encode())
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    print(json.dumps({"name": name, **json.loads(answer or '{"rc": 1}')}), flush=True)


# ----------------------------------------------------------------------------- Hugging Face's model


def compared(plan: Any) -> dict[str, Any]:
    """Return how far our logits are from Hugging Face's of the same weights in FP32, and both
    counts of parameters.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(1)
    ours, theirs = _ours(plan), _theirs(plan)
    _copy(theirs, ours, plan.model)
    tokens = torch.randint(plan.model.vocab_size, (BATCH, LONG))
    places = torch.arange(LONG).expand(BATCH, LONG)
    with torch.no_grad():
        a = ours.module(tokens, places, None).float()
        b = theirs(tokens).logits.float()
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    return {
        "rc": 0,
        "apart": float((a - b).abs().max()),
        "scale": float(b.abs().max()),
        "parameters": counts,
    }


def _ours(plan: Any, changed: Callable[[Any], None] = lambda _: None) -> Any:
    """Return the model that the plan's recipe builds on a CPU, in FP32, its configuration
    changed.
    """
    import fiddle as fdl
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from recipes.training.recipe import build

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model = fdl.build(build(plan, Path("RUN")).model)
    model.config.params_dtype = torch.float32  # Mistral's is BF16
    changed(model.config)
    model.configure_model()
    return model.eval()


def _theirs(plan: Any) -> Any:
    """Return Hugging Face's model of the same architecture and sizes, with random weights."""
    import transformers as hf

    m, name = plan.model, plan.model.nemo_recipe
    sizes = {
        "num_hidden_layers": m.num_layers,
        "hidden_size": m.hidden_size,
        "intermediate_size": m.ffn_hidden_size,
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_query_groups,
        "vocab_size": m.vocab_size,
        "tie_word_embeddings": m.tied_embeddings,
        "rope_theta": m.rotary_base,
        "attn_implementation": "eager",
        "max_position_embeddings": 8192,
    }
    scaled = {
        "rope_type": "llama3",
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rms = {"rms_norm_eps": 1e-6 if name.startswith(("qwen", "gemma2")) else 1e-5}
    if name.startswith("llama"):
        scaling = {"rope_scaling": {"factor": m.rope_scaling, **scaled}} if m.rope_scaling else {}
        config = hf.LlamaConfig(**sizes, **rms, **scaling)
    elif name.startswith("qwen2"):
        config = hf.Qwen2Config(**sizes, **rms)
    elif name.startswith("mistral"):
        config = hf.MistralConfig(
            **sizes,
            **rms,
            sliding_window=m.sliding_window and m.sliding_window + 1,
            head_dim=m.head,
        )
    elif name.startswith("gemma2"):
        config = hf.Gemma2Config(
            **sizes,
            **rms,
            head_dim=m.head,
            query_pre_attn_scalar=256,
            hidden_activation="gelu_pytorch_tanh",
        )
    elif name.startswith("gemma"):
        config = hf.GemmaConfig(
            **sizes, **rms, head_dim=m.head, hidden_activation="gelu_pytorch_tanh"
        )
    elif name.startswith("starcoder2"):
        config = hf.Starcoder2Config(
            **sizes,
            hidden_act="gelu_pytorch_tanh",
            use_bias=True,
            residual_dropout=0.0,
            embedding_dropout=0.0,
        )
    else:
        config = hf.NemotronConfig(
            **sizes, hidden_act="relu2", partial_rotary_factor=m.rotary_percent, norm_eps=1e-5
        )
    return hf.AutoModelForCausalLM.from_config(config).float().eval()


def _copy(theirs: Any, ours: Any, m: Any) -> None:
    """Give our model the weights of Hugging Face's, made large enough that each part of a layer
    shows in the logits.
    """
    import torch

    for name, weight in theirs.named_parameters():
        small = name.endswith("bias") or "norm" in name
        weight.data.add_(torch.randn_like(weight), alpha=0.1 if small else 0.2)
    for layer in theirs.model.layers:  # NeMo leaves the epsilon of these at TENorm's default
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            if m.post_norms:
                getattr(layer, norm).eps = 1e-5
    state, given = dict(theirs.named_parameters()), {}
    for ours_name, parameter in ours.module.named_parameters():
        given[ours_name] = weight = _weight(ours_name, state, m)
        assert weight.shape == parameter.shape, (ours_name, weight.shape, parameter.shape)
        parameter.data.copy_(weight)


def _weight(name: str, state: dict[str, Any], m: Any) -> Any:
    """Return the weight or bias of one of our parameters: its name in Megatron-Core says which of
    Hugging Face's.
    """
    import torch

    stem, kind = name.rsplit(".", 1)
    if stem == "embedding.word_embeddings":
        return state["model.embed_tokens.weight"]
    if stem == "output_layer":
        return state["lm_head.weight"]
    if stem == "decoder.final_layernorm":
        return state[f"model.norm.{kind}"]
    _, _, number, part = stem.split(".", 3)
    layer = f"model.layers.{number}."
    before_mlp = "pre_feedforward_layernorm" if m.post_norms else "post_attention_layernorm"
    alone = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": before_mlp,
        "self_attention.linear_proj": "self_attn.o_proj",
        "self_attention.linear_proj.post_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2": next(
            (f for f in ("mlp.down_proj", "mlp.c_proj") if f"{layer}{f}.weight" in state), ""
        ),
        "mlp.linear_fc2.post_layernorm": "post_feedforward_layernorm",
    }
    if part in alone:
        return state[f"{layer}{alone[part]}.{kind}"]
    if part == "mlp.linear_fc1":
        names = ("gate_proj", "up_proj") if m.gated else ("up_proj", "c_fc")
        return torch.cat(
            [state[f"{layer}mlp.{n}.{kind}"] for n in names if f"{layer}mlp.{n}.{kind}" in state]
        )
    assert part == "self_attention.linear_qkv", part
    q, k, v = (
        state[f"{layer}self_attn.{n}_proj.{kind}"].reshape(m.num_query_groups, -1, *rest(kind, m))
        for n in "qkv"
    )
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


def rest(kind: str, m: Any) -> tuple[int, ...]:
    """Return the dimensions of a projection behind its outputs."""
    return (m.hidden_size,) if kind == "weight" else ()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
