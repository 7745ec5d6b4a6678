"""The heavy half of `python -m recipes.evaluation.evaluate`: load a checkpoint as training had it,
measure loss, export, ask questions.

The model is built by the same recipe as in training (`recipes.training.recipe`), on one device, and
filled from the distributed checkpoint, so its evaluation is training's own: same layers, same
precision, FP8 with its quantisers in inference mode.  Two numbers guard against a wrong reading:
the loss on the very batches of training's last evaluation, which the run logged, and the loss of
the exported weights, which must be that of NeMo.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import default_collate

from recipes.data.files import Part, parts_of, tokenizer_of_job
from recipes.data.indexed import open_indexed
from recipes.data.tokenizer_files import sentencepiece_file
from recipes.errors import InputError, one_line
from recipes.evaluation.heavy.tasks import Tasks, quiet, run_tasks, task_dtype
from recipes.plan import Plan
from recipes.run_folder import append_line, rows_of, write_json
from recipes.training import cpu
from recipes.training.tokenizers import Tokenizer, within
from recipes.training.tokenizers import load as load_tokenizer

HELDOUT = "heldout"
ITEMS = "evaluation_items.jsonl"
EXPORTS = "export_hf"
CHECKED_WINDOWS = 32  # sequences on which the exported weights are held against NeMo
# What rounding activations to BF16 in NeMo, and not in the export, explains (with FP8: its noise
# too), as relative differences.  Logits see what the loss of a barely trained model does not: a
# RoPE base 50 times too small moved the loss of a small Llama by 0.0009 and its logits by 0.06, the
# right export by 0.00002 and 0.002.
TOLERANCE = {False: {"loss": 1e-3, "logits": 0.05}, True: {"loss": 2e-2, "logits": 0.2}}
Tokens = NDArray[np.integer[Any]]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on `device`: `forward` as training wraps it, `module` the GPTModel
    inside, `data` NeMo's module.
    """

    plan: Plan
    step: int
    forward: torch.nn.Module
    module: torch.nn.Module
    data: Any
    device: torch.device


@dataclass(frozen=True)
class Loss:
    """Mean loss in nats a token, its standard error from the spread between sequences, and the
    number of tokens.
    """

    loss: float
    stderr: float
    tokens: int


def evaluate_run(
    folder: Path,
    plan: Plan,
    step: int,
    checkpoint: Path,
    sets: dict[str, Path],
    max_tokens: int | None,
    tasks: Tasks | None,
    limit: int | None,
    accuracy_bar: float,
) -> dict[str, Any]:
    """Evaluate `checkpoint` of the run in `folder`, write evaluation.json and the items, and return
    what was written.
    """
    streams: dict[str, Sequence[Path | Part]] = {HELDOUT: _heldout(plan, folder)}
    streams |= {name: [path] for name, path in sets.items()}
    if tasks and sentencepiece_file(tokenizer_of_job(plan)):
        raise InputError(
            f"{folder} was trained with a SentencePiece tokenizer, and tasks need one of Hugging "
            "Face; evaluate --sets alone, or prepare and train with a folder that transformers' "
            "LlamaTokenizer(vocab_file=MODEL, add_bos_token=False).save_pretrained(FOLDER) writes"
        )
    loaded = load(folder, plan, step, checkpoint)
    found = {name: _of_set(loaded, name, paths, max_tokens) for name, paths in streams.items()}
    asked, items = {}, list[dict[str, Any]]()
    exported = _export(loaded, folder, checkpoint) if tasks else None
    if tasks and exported:
        asked, items = run_tasks(exported["folder"], tasks, limit)
    result = {
        **_provenance(loaded, checkpoint),
        "sets": found,
        "training_evaluation": training_evaluation(loaded, folder),
        "export": exported,
        "tasks": asked,
        "limit": limit,
        "accuracy_bar": accuracy_bar,
        "items": _write_items(folder / ITEMS, items),
    }
    write_json(folder / "evaluation.json", result)
    return result


def _provenance(loaded: Loaded, checkpoint: Path) -> dict[str, Any]:
    from recipes.code import code
    from recipes.training.layers import fp8_modules
    from recipes.training.manifest import device

    plan, packages = (
        loaded.plan,
        (
            "nemo-toolkit",
            "megatron-core",
            "torch",
            "transformers",
            "lm_eval",
        ),
    )
    return {
        "run": plan.run_name,
        "model": plan.model.name,
        "precision": plan.precision.name,
        "step": loaded.step,
        "checkpoint": checkpoint.name,
        "time": datetime.now(UTC).isoformat(),
        "code": code(),
        "versions": {name: version(name) for name in packages},
        "device": device(),
        "label": "emulated" if plan.emulated else "measured",
        "arithmetic": {
            "sets": _arithmetic(plan),
            "tasks": f"exported BF16 weights, {task_dtype()} arithmetic, no FP8",
        },
        "fp8_layers": len(fp8_modules(loaded.module)),
    }


def _arithmetic(plan: Plan) -> str:
    if plan.precision.fp8 is None:
        return "BF16"
    return (
        f"{plan.precision.name},"
        f" {'emulated, quantisers' if plan.emulated else 'Transformer Engine'} in inference mode"
    )


# Loading


def load(folder: Path, plan: Plan, step: int, checkpoint: Path) -> Loaded:
    """Return the model of a checkpoint, on one device whatever it was trained on; InputError where
    it cannot be loaded.
    """
    cpu.activate()
    if plan.executor.threads:
        torch.set_num_threads(plan.executor.threads)
    quiet()
    try:
        trainer, data = _built(plan, folder)
        restored = trainer.strategy.load_checkpoint(checkpoint)
    except InputError:
        raise
    except (
        Exception
    ) as error:  # torch, Megatron-Core and NeMo each raise their own for a cut or foreign file
        cause = _root_cause(error)
        reason = one_line(f"{type(cause).__name__}: {cause}")[:200]
        raise InputError(
            f"{checkpoint} cannot be loaded as {plan.model.name} in {plan.precision.name}"
            f" ({reason})"
        ) from None
    if restored["global_step"] != step:
        raise InputError(
            f"{checkpoint} holds step {restored['global_step']}, its name says {step}; the folder"
            " was renamed"
        )
    _same_tokenizer(checkpoint, plan, data.tokenizer)
    forward = trainer.strategy.megatron_parallel[0].eval()
    device = next(forward.parameters()).device
    return Loaded(plan, step, forward, _innermost(forward), data, device)


def _root_cause(error: BaseException) -> BaseException:
    """Return the first error under those that were raised while it was handled; PyTorch wraps it by
    rank, with its traceback as text.
    """
    while error.__context__ is not None or getattr(error, "failures", None):
        failures = getattr(error, "failures", None)
        error = next(iter(failures.values()))[0] if failures else error.__context__  # type: ignore[assignment]
    return error


def _built(plan: Plan, folder: Path) -> tuple[Any, Any]:
    """Return trainer and data of the plan's recipe, ready to load a checkpoint.

    The stage is "testing", in which NeMo (lightning/megatron_parallel.py:635) makes no gradient
    buffers.
    """
    import fiddle as fdl
    from lightning.pytorch.trainer.states import TrainerFn

    from recipes.training.recipe import build

    recipe = build(_on_one_device(plan), folder)
    recipe.trainer.callbacks, recipe.trainer.enable_checkpointing = [], False
    recipe.trainer.strategy.setup_optimizers = False
    trainer, model, data = (fdl.build(part) for part in (recipe.trainer, recipe.model, recipe.data))
    data.trainer = trainer
    trainer.state.fn = TrainerFn.TESTING
    trainer.strategy.connect(model)
    trainer.strategy.setup_environment()
    model.configure_model()
    trainer.strategy.setup(trainer)
    return trainer, data


def _on_one_device(plan: Plan) -> Plan:
    """Return the plan without parallelism: a distributed checkpoint is put together in whatever
    layout asks for it.
    """
    alone = {
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "vp": 1,
        "fsdp": False,
        "cuda_graphs": False,
        "recompute_layers": 0,
        "offload_layers": 0,
    }
    alone["tp_overlap"] = False
    return plan.model_copy(update={"num_gpus": 1, "mapping": plan.mapping.model_copy(update=alone)})


def _innermost(module: torch.nn.Module) -> Any:
    while hasattr(module, "module"):
        module = module.module
    return module


def _same_tokenizer(checkpoint: Path, plan: Plan, tokenizer: Any) -> None:
    """Raise InputError where the checkpoint was trained with another tokenizer than the data's."""
    pieces = sentencepiece_file(tokenizer_of_job(plan))
    context = checkpoint / "context"
    kept = context / (
        pieces.name if pieces else "tokenizer"
    )  # as nemo/lightning/io/registry.py copies
    try:
        found = load_tokenizer(str(kept))
    except InputError:
        raise InputError(
            f"{kept} holds no tokenizer that can be read; restore the checkpoint's context"
        ) from None
    if found.vocabulary() != within(tokenizer).vocabulary():
        raise InputError(
            f"{kept} is another tokenizer than that of the run's data; its token numbers mean other"
            " text"
        )


# Held-out loss


def _heldout(plan: Plan, folder: Path) -> list[Part]:
    """Return the run's own held-out split; InputError where the data are gone or not those it was
    trained on.
    """
    from recipes.training.data import facts

    if plan.data.kind == "mock":
        raise InputError(
            f"{folder} was trained on random tokens (data=mock): there is no held-out text and no"
            " tokenizer"
        )
    try:
        parts = parts_of(plan.data, plan.model.vocab_size)[HELDOUT]
        found = facts(plan.data, plan.model.vocab_size)["sha256"]
    except InputError as error:
        where = "start in the folder it was launched in"
        raise InputError(
            f"{folder}: the held-out data of its plan are not here; {where} ({error})"
        ) from None
    trained_on = json.loads((folder / "manifest.json").read_text()).get("data", {}).get("sha256")
    if found != trained_on:
        raise InputError(
            f"{folder}: the data at {parts[0].data.prefix} changed since the run was trained"
            " (sha256 in its manifest); prepare them again"
        )
    return parts


def _of_set(
    loaded: Loaded, name: str, sources: Sequence[Path | Part], max_tokens: int | None
) -> dict[str, Any]:
    stream = _stream(sources, within(loaded.data.tokenizer), name)
    whole = len(stream) - 1
    if max_tokens and max_tokens < whole:
        stream = stream[: max_tokens + 1]
    found = mean_loss(
        loaded, windows(stream, loaded.plan.seq_length, loaded.plan.mapping.micro_batch), name
    )
    return {
        "loss": found.loss,
        "stderr": found.stderr,
        "perplexity": math.exp(found.loss),
        "tokens": found.tokens,
        "of_tokens": whole,
        "sha256": hashlib.sha256(np.ascontiguousarray(stream, dtype=np.int64).data).hexdigest(),
        "source": [str(source) for source in sources],
    }


def _stream(sources: Sequence[Path | Part], tokenizer: Tokenizer, name: str) -> Tokens:
    """Return the documents of a set as one row of tokens, each document ended by the end-of-text
    token, as in training.
    """
    parts = [_tokens(source, tokenizer) for source in sources]
    stream: Tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(stream) < 2:
        raise InputError(f"set {name} ({sources[0]}) has fewer than two tokens: nothing to predict")
    return stream


def _tokens(source: Path | Part, tokenizer: Tokenizer) -> Tokens:
    from recipes.evaluation.evaluate import is_indexed

    if isinstance(source, Part):
        return source.data.ids()[source.start : source.stop]
    return open_indexed(str(source)).ids() if is_indexed(source) else _tokenised(source, tokenizer)


def _tokenised(path: Path, tokenizer: Tokenizer) -> Tokens:
    from recipes.training.text import documents, source_files

    texts = [d.text for file in source_files((str(path),)) for d in documents(file)]
    rows = tokenizer.encode(texts) if texts else []
    return np.array(
        list(itertools.chain.from_iterable([*row, tokenizer.end] for row in rows)), dtype=np.int64
    )


def windows(stream: Tokens, length: int, batch: int) -> Iterator[Batch]:
    """Yield batches (at most `batch` sequences of `length` tokens) in which every token but the
    first is predicted once.
    """
    for start in range(0, len(stream) - 1, length * batch):
        piece = torch.from_numpy(
            np.asarray(stream[start : start + length * batch + 1], dtype=np.int64)
        )
        predicted = len(piece) - 1
        rows = -(-predicted // length)
        padded = pad(piece, (0, rows * length + 1 - len(piece)))
        mask = (torch.arange(rows * length) < predicted).float()
        yield {
            "tokens": padded[:-1].view(rows, length),
            "labels": padded[1:].view(rows, length),
            "loss_mask": mask.view(rows, length),
        }


def mean_loss(loaded: Loaded, batches: Iterator[Batch], name: str) -> Loss:
    """Return the loss over `batches`, summed in FP64 from the FP32 losses of tokens."""
    sums, counts = list[torch.Tensor](), list[torch.Tensor]()
    for batch in batches:
        largest = int(max(batch["tokens"].max(), batch["labels"].max()))
        if largest >= loaded.plan.model.vocab_size:
            raise InputError(
                f"set {name} holds token {largest}, the model has {loaded.plan.model.vocab_size}:"
                " another tokenizer made it"
            )
        mask = batch["loss_mask"].double()
        sums.append((_forward(loaded, batch, batch["labels"]).double().cpu() * mask).sum(dim=1))
        counts.append(mask.sum(dim=1))
    total, tokens = torch.cat(sums), torch.cat(counts)
    mean = float(total.sum() / tokens.sum())
    if not math.isfinite(mean):
        raise InputError(f"the loss on {name} is no finite number: the checkpoint diverged")
    return Loss(
        mean, float(((total - mean * tokens) ** 2).sum().sqrt() / tokens.sum()), int(tokens.sum())
    )


@torch.no_grad()
def _forward(loaded: Loaded, batch: Batch, labels: torch.Tensor | None) -> torch.Tensor:
    """Return the losses of a batch in nats, (sequences, tokens), or its logits where there are no
    labels.

    The batch's mask, where it has one, holds the ends of documents (data.reset_attention_mask).
    """
    tokens = batch["tokens"].to(loaded.device)
    positions = torch.arange(tokens.shape[1], device=loaded.device).expand_as(tokens)
    labels = None if labels is None else labels.to(loaded.device)
    mask = batch["attention_mask"].to(loaded.device) if "attention_mask" in batch else None
    found: torch.Tensor = loaded.forward(
        input_ids=tokens, position_ids=positions, attention_mask=mask, labels=labels
    )
    return found


def training_evaluation(loaded: Loaded, folder: Path) -> dict[str, float] | None:
    """Return the loss on the batches of training's own evaluation, and what training logged at this
    step; None if it did not.
    """
    logged = [
        r["heldout_loss"]
        for r in rows_of(folder / "metrics.jsonl")
        if r["step"] == loaded.step and "heldout_loss" in r
    ]
    if not logged:
        return None
    loaded.data.setup()
    samples, size = loaded.data._validation_ds, loaded.plan.mapping.micro_batch
    starts = range(0, loaded.plan.train.eval_batches * loaded.plan.mapping.global_batch, size)
    found = mean_loss(
        loaded,
        (default_collate([samples[i] for i in range(j, j + size)]) for j in starts),
        "training's evaluation",
    )
    return {"loss": found.loss, "logged": logged[-1], "tokens": found.tokens}


# Export


def _export(loaded: Loaded, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """Export the weights; return where they lie, and their loss and logits beside NeMo's on the
    same sequences.

    InputError where they differ by more than rounding explains.
    """
    from recipes.evaluation.heavy.export import export

    target = export(
        loaded.module, loaded.module.config, checkpoint, folder / EXPORTS / f"step{loaded.step}"
    )
    stream = _stream(_heldout(loaded.plan, folder), within(loaded.data.tokenizer), HELDOUT)[
        : CHECKED_WINDOWS * loaded.plan.seq_length + 1
    ]
    found = agreement(
        loaded, target, windows(stream, loaded.plan.seq_length, loaded.plan.mapping.micro_batch)
    )
    allowed = TOLERANCE[loaded.plan.precision.fp8 is not None]
    if not (
        abs(found["loss_difference"]) <= allowed["loss"]
        and found["logits_difference"] <= allowed["logits"]
    ):
        losses = (
            f"loss {found['loss']:.4f}, NeMo {found['nemo_loss']:.4f} on the same text, logits"
            f" {found['logits_difference']:.1%} apart"
        )
        raise InputError(
            f"{target}: the exported weights have {losses}: they are not the same model"
        )
    return {"folder": str(target), **found, "allowed": allowed}


@torch.no_grad()
def agreement(loaded: Loaded, target: Path, batches: Iterator[Batch]) -> dict[str, float]:
    """Return the mean losses of NeMo's model and of the exported one, and the relative RMS
    difference of their logits.

    Logits are compared over the exported vocabulary, each position's mean taken out, which no
    probability depends on.
    """
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(str(target), torch_dtype=task_dtype())
        .to(loaded.device)
        .eval()
    )
    tokens = losses = nemo_losses = error = power = 0.0
    for batch in batches:
        theirs = model(batch["tokens"].to(loaded.device)).logits.float()
        ours = _forward(loaded, batch, None).float()[..., : theirs.shape[-1]]
        mask = batch["loss_mask"].bool()
        ours, theirs, labels = ours.cpu()[mask], theirs.cpu()[mask], batch["labels"][mask]
        tokens += len(labels)
        losses += float(cross_entropy(theirs, labels, reduction="sum"))
        nemo_losses += float(cross_entropy(ours, labels, reduction="sum"))
        ours, theirs = (x - x.mean(dim=-1, keepdim=True) for x in (ours, theirs))
        error += float((ours - theirs).double().square().sum())
        power += float(ours.double().square().sum())
    difference = (losses - nemo_losses) / nemo_losses
    return {
        "loss": losses / tokens,
        "nemo_loss": nemo_losses / tokens,
        "loss_difference": difference,
        "logits_difference": math.sqrt(error / power),
    }


def _write_items(path: Path, items: list[dict[str, Any]]) -> dict[str, Any]:
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    part.touch()
    for item in items:
        append_line(part, item)
    part.replace(path)
    return {
        "file": path.name,
        "count": len(items),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
