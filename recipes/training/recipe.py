"""From the plan to NeMo's own recipe object: `llm.<model>.pretrain_recipe` with the plan's values
put in.

On a GPU and on a CPU it is the same object and the same `llm.pretrain`; what is set for GPUs alone
stands in `gpu.py`, what a CPU needs in `_for_cpu`, and what FP8 by this project's numerics needs on
a GPU in `_with_emulated_fp8`.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from nemo.collections.llm.fn.activation import openai_gelu
from nemo.collections.llm.gpt.data import MockDataModule, PreTrainingDataModule
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing
from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
from nemo.lightning import NeMoLogger
from nemo.lightning.pytorch.callbacks.garbage_collection import GarbageCollectionCallback
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from recipes.data.files import tokenizer_of_job
from recipes.data.tokenizer_files import sentencepiece_file
from recipes.errors import InputError
from recipes.plan import Plan
from recipes.training.architecture import refuse_another
from recipes.training.callback import RunFolderCallback
from recipes.training.checkpoints import Checkpoints, Resume, Strategy
from recipes.training.data import prepare
from recipes.training.gpu import for_gpu
from recipes.training.layers import layer_spec, set_recipe
from recipes.training.samples import Samples

FUSIONS = (
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion",
    "persist_layer_norm",
)

# How gradients are reduced, of NeMo v2.3.2 recipes/llama3_8b.py.
REDUCTION = {
    "check_for_nan_in_grad": True,
    "grad_reduce_in_fp32": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "average_in_collective": True,
}

# NeMo's own default: a logger that gets NeMo's numbers waits for the device; the run folder's come
# in each step
LOGGED_STEPS = 10


def build(plan: Plan, folder: Path) -> run.Partial:
    """Return the NeMo recipe (a run.Partial of llm.pretrain) for a plan; `folder` is the run
    folder.
    """
    recipe = _nemo_recipe(plan, folder)
    refuse_another(recipe.model, plan)
    for part in (_model, _trainer, _optimizer):
        part(recipe, plan)
    _data(recipe, plan, folder)
    _logging(recipe, plan, folder)
    if plan.on_cpu:
        _for_cpu(recipe, plan)
    elif plan.emulated:
        _with_emulated_fp8(recipe, plan)
    else:
        for_gpu(recipe, plan)
    _non_finite(recipe, plan)
    return recipe


def _nemo_recipe(plan: Plan, folder: Path) -> run.Partial:
    """Return NeMo's recipe with what its performance mode adds; most recipes have none, then it is
    added here.

    NeMo v2.3.2 recipes/llama3_8b.py: its callbacks, and gradients reduced by Megatron-Core's
    DistributedDataParallel with overlap, which a few recipes (Qwen2, StarCoder) leave at the
    strategy's default.
    """
    make = _module(plan.model.nemo_recipe).pretrain_recipe
    nodes = -(-plan.num_gpus // plan.gpu.devices_per_node)
    mode = (
        {"performance_mode": not plan.on_cpu}
        if "performance_mode" in inspect.signature(make).parameters
        else {}
    )
    recipe: run.Partial = make(
        dir=str(folder),
        name="nemo",
        num_nodes=nodes,
        num_gpus_per_node=plan.num_gpus // nodes,
        **mode,
    )
    trainer = recipe.trainer
    trainer.callbacks = trainer.callbacks or []
    if not plan.on_cpu:
        present = [callback.__fn_or_cls__ for callback in trainer.callbacks]
        trainer.callbacks += [
            callback
            for callback in performance_callbacks()
            if callback.__fn_or_cls__ not in present
        ]
    if not isinstance(trainer.strategy.ddp, run.Config):
        trainer.strategy.ddp = run.Config(DistributedDataParallelConfig, **REDUCTION)
    return recipe


def performance_callbacks() -> list[run.Config]:
    """Return the callbacks of NeMo's performance mode."""
    garbage = run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100)
    return [garbage, run.Config(MegatronCommOverlapCallback, tp_comm_overlap=False)]


def _module(name: str) -> Any:
    """Return NeMo's module of a recipe; InputError where it has none of this name."""
    package = "nemo.collections.llm.recipes"
    try:
        module = importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError:
        module = None
    if not hasattr(module, "pretrain_recipe"):
        raise InputError(
            f"model.nemo_recipe={name}: NeMo has no such recipe; name a module of {package} that"
            " has a pretrain_recipe"
        )
    return module


def _model(recipe: run.Partial, plan: Plan) -> None:
    config, model = recipe.model.config, plan.model
    config.num_layers, config.hidden_size, config.ffn_hidden_size = (
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
    )
    config.num_attention_heads, config.num_query_groups = (
        model.num_attention_heads,
        model.num_query_groups,
    )
    config.seq_length = plan.seq_length
    config.vocab_size = model.vocab_size
    config.make_vocab_size_divisible_by = 1 if plan.on_cpu else 128
    config.share_embeddings_and_output_weights = model.tied_embeddings
    if model.head_size:
        config.kv_channels = model.head_size
    if model.sliding_window:
        config.window_size = (model.sliding_window, 0)


def _data(recipe: run.Partial, plan: Plan, folder: Path) -> None:
    sizes = {
        "seq_length": plan.seq_length,
        "micro_batch_size": plan.mapping.micro_batch,
        "global_batch_size": plan.mapping.global_batch,
    }
    if plan.data.kind == "mock":
        # NullTokenizer adds an end token to the size it is given
        tokenizer = run.Config(
            get_nmt_tokenizer,
            library="null",
            model_name="NullTokenizer",
            vocab_size=plan.model.vocab_size - 1,
        )
        samples = (
            plan.train.max_steps * plan.mapping.global_batch
        )  # one epoch, as in NeMo's performance scripts
        recipe.data = run.Config(
            MockDataModule, tokenizer=tokenizer, num_train_samples=samples, **sizes
        )
        return
    Samples.vocab_size = plan.model.vocab_size
    recipe.data = run.Config(
        PreTrainingDataModule,
        paths=_prepared(plan),
        split=plan.data.split,
        tokenizer=_tokenizer(tokenizer_of_job(plan)),
        seed=plan.data.seed,
        index_mapping_dir=str(folder / "index"),
        dataset_cls=Samples,
        **sizes,
    )
    if plan.data.reset_attention_mask:
        recipe.data.reset_attention_mask = recipe.data.create_attention_mask = True
    if plan.data.eod_mask_loss:
        recipe.data.eod_mask_loss = True


def _prepared(plan: Plan) -> dict[str, list[str]] | list[str]:
    """Return what PreTrainingDataModule takes as paths, made now where text is not prepared yet."""
    data = plan.data
    if data.kind == "text":
        root = prepare(data, plan.model.vocab_size, contents=False)
        train, heldout = [str(root / "train")], [str(root / "heldout")]
    else:
        train, heldout = list(data.train), list(data.heldout)
    return train if data.split else {"train": train, "validation": heldout, "test": heldout}


def _tokenizer(name: str) -> run.Config:
    model = sentencepiece_file(name)
    if model:
        return run.Config(SentencePieceTokenizer, model_path=str(model))
    return run.Config(AutoTokenizer, pretrained_model_name=name)


def _trainer(recipe: run.Partial, plan: Plan) -> None:
    trainer, t, m = recipe.trainer, plan.train, plan.mapping
    trainer.max_steps, trainer.val_check_interval = t.max_steps, min(t.eval_interval, t.max_steps)
    trainer.limit_val_batches, trainer.limit_test_batches = t.eval_batches, 1
    trainer.log_every_n_steps = 1 if plan.on_cpu else LOGGED_STEPS
    if not plan.settings.evaluation:
        trainer.val_check_interval, trainer.limit_val_batches = t.max_steps, 0
    trainer.num_sanity_val_steps = 0
    trainer.enable_progress_bar = False
    strategy = trainer.strategy
    strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size = m.tp, m.pp
    strategy.context_parallel_size = m.cp
    strategy.virtual_pipeline_model_parallel_size = m.vp if m.vp > 1 else None
    strategy.sequence_parallel = m.tp > 1
    counted = (
        plan.model.embedding_and_loss_count_as_layers
    )  # a recipe may have set it (llama31_405b)
    if counted != strategy.account_for_embedding_in_pipeline_split:
        strategy.account_for_embedding_in_pipeline_split = (
            strategy.account_for_loss_in_pipeline_split
        ) = counted


def _optimizer(recipe: run.Partial, plan: Plan) -> None:
    t = plan.train
    recipe.optim = distributed_fused_adam_with_cosine_annealing(
        warmup_steps=t.warmup_steps, constant_steps=0, max_lr=t.max_lr, min_lr=t.min_lr
    )
    config = recipe.optim.config
    config.adam_beta1, config.adam_beta2, config.weight_decay, config.clip_grad = (
        t.adam_beta1,
        t.adam_beta2,
        t.weight_decay,
        t.clip_grad,
    )
    recipe.optim.lr_scheduler.max_steps = t.max_steps


def _non_finite(recipe: run.Partial, plan: Plan) -> None:
    """NaN and Inf in gradients: Megatron-Core raises before they are reduced, or skips the update,
    which it does only with a loss scale.

    A constant scale of 1 changes no bit (megatron/core/optimizer/__init__.py, v0.12.3:
    ConstantGradScaler).  NeMo takes it from the precision plugin, which overwrites the optimizer's.
    """
    recipe.trainer.strategy.ddp.check_for_nan_in_grad = (
        plan.settings.check_gradients and plan.train.on_non_finite == "stop"
    )
    if plan.train.on_non_finite == "skip":
        recipe.trainer.plugins.fp16_loss_scale = 1.0


def _logging(recipe: run.Partial, plan: Plan, folder: Path) -> None:
    saved = (
        plan.settings.checkpoints and plan.data.kind != "mock"
    )  # NullTokenizer cannot be written, and noise is not worth saving
    recipe.trainer.logger = False  # else Lightning adds its own beside the plan's
    recipe.trainer.enable_checkpointing = saved
    recipe.log = run.Config(
        NeMoLogger,
        log_dir=str(folder),
        name="nemo",
        use_datetime_version=False,
        update_logger_directory=False,
        ckpt=_checkpoint(plan, folder) if saved else None,
        tensorboard=(
            run.Config(TensorBoardLogger, save_dir=str(folder), name="tensorboard", version="")
            if plan.logger.tensorboard
            else None
        ),
        wandb=_wandb(plan, folder),
    )
    fdl.update_callable(recipe.trainer.strategy, Strategy)
    recipe.resume = run.Config(
        Resume,
        resume_if_exists=saved,
        resume_ignore_no_checkpoint=True,
        resume_from_directory=str(folder / "checkpoints"),
    )
    recipe.trainer.callbacks = [
        *recipe.trainer.callbacks,
        run.Config(RunFolderCallback, folder=str(folder), plan_json=plan.model_dump_json()),
    ]


def _checkpoint(plan: Plan, folder: Path) -> run.Config:
    return run.Config(
        Checkpoints,
        dirpath=str(folder / "checkpoints"),
        every_n_train_steps=plan.train.checkpoint_interval,
        save_last=False,
        save_top_k=2,
        enable_version_counter=False,
        monitor="step",
        mode="max",
        filename="{step}",
        save_optim_on_train_end=True,
        save_weights_only=False,
    )


def _wandb(plan: Plan, folder: Path) -> run.Config | None:
    if plan.logger.wandb == "disabled":
        return None
    return run.Config(
        WandbLogger,
        project=plan.logger.wandb_project,
        name=plan.run_name,
        save_dir=str(folder),
        offline=plan.logger.wandb == "offline",
    )


def _for_cpu(recipe: run.Partial, plan: Plan) -> None:
    """Fused kernels, GPU workers and asynchronous saving have no counterpart on a CPU; FP8 comes by
    module spec.
    """
    config: Any = recipe.model.config
    for fusion in FUSIONS:
        setattr(config, fusion, False)
    if plan.model.fused_activation and plan.model.activation == "gelu":
        # The fused kernel's approximation by tanh (MCore fusions/fused_bias_gelu.py)
        config.activation_func = openai_gelu
    config.use_cpu_initialization = True
    # Virtual stages of two ranks exchange activations and gradients with one peer: a batch of both
    # mixes them up (Megatron-LM arguments.py, core_v0.12, asserts as much).
    config.overlap_p2p_comm, config.batch_p2p_comm = plan.mapping.vp > 1, plan.mapping.vp == 1
    config.deallocate_pipeline_outputs = (
        False  # gloo reads what it sends later, and no stream keeps it
    )
    _own_layers(recipe, plan)
    recipe.trainer.accelerator = "cpu"
    recipe.trainer.strategy.ckpt_async_save = False
    recipe.trainer.strategy.ddp.overlap_grad_reduce = False
    recipe.trainer.strategy.ddp.overlap_param_gather = False
    recipe.data.num_workers, recipe.data.pin_memory, recipe.data.persistent_workers = (
        0,
        False,
        False,
    )


def _with_emulated_fp8(recipe: run.Partial, plan: Plan) -> None:
    """To NeMo and Transformer Engine it is a BF16 run: FP8 comes by module spec, as on the CPU."""
    for_gpu(
        recipe,
        plan.model_copy(update={"precision": plan.precision.model_copy(update={"fp8": None})}),
    )
    _own_layers(recipe, plan)


def _own_layers(recipe: run.Partial, plan: Plan) -> None:
    recipe.model.config.transformer_layer_spec = layer_spec
    set_recipe(plan.precision.fp8, plan.data.reset_attention_mask)
