"""The comparisons of `python -m recipes.measure.te_parity`, on a CUDA GPU with Transformer Engine:
casts, delayed scaling's state, linear layers.

Transformer Engine's quantizers are those that its linear layers have
(recipes/measure/gpu/te_quantizers.py), asked for both copies, in the layout that its GEMMs read.
Read at 2.11: transposed data for whole tensors and blocks, scales of 1x128 tiles transposed, all
padded (pytorch/tensor/*_tensor.py); those are brought to rows and columns of the operand before
they are compared.  What a GPU or Transformer Engine does not do becomes a row that says why.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recipes.compose.tree import compose_plan
from recipes.errors import InputError
from recipes.measure.gpu import byte_differences as numbers
from recipes.measure.gpu import linear_layers, te_quantizers
from recipes.measure.gpu import sample_tensors as tensors
from recipes.measure.gpu.byte_differences import Copy
from recipes.plan import Fp8
from recipes.te_parity_rows import COLUMN_WISE, ROLES, ROW_WISE, STATE, Difference, Row, facts
from recipes.training.fp8 import scaling
from recipes.training.fp8.formats import Format
from recipes.training.fp8.recipe import DelayedScaling, Operand, format_of, quantiser

PRECISIONS = ("fp8_delayed", "fp8_current", "fp8_subchannel", "mxfp8")
FP32_SCALES = "fp8_subchannel, FP32 scales"
SHAPES = (
    (4096, 4096),
    (256, 512),
    (1024, 384),
    (272, 400),
    (303, 300),
)  # the last two are no multiples of 128, and of 16
EXTREME = (256, 512)
OPERANDS = {"input": "input", "weight": "weight", "grad": "gradient"}
WARM = 0.5  # a delayed scale comes from a tensor half as large: the largest values saturate
HISTORIES = ((4, "max", 0), (1024, "max", 0), (4, "most_recent", 1))
ORDINARY, GROWING = (1.0, 8.0, 0.3, 0.0, 3.0, 1e-38), (0.1, 0.2, 1.1, 1.3, 1.7, 2.3, 3.1, 4.1, 5.3)
STEPS = (
    *((size, "") for size in ORDINARY),
    (1.0, "inf"),
    (0.7, ""),
    (2.0, "nan"),
    *((size, "") for size in GROWING),
)  # size, and a bad element


@dataclass(frozen=True)
class Recipe:
    """A precision to compare: its name in the rows, the plan's values, and where Transformer
    Engine's quantizers differ from its own.
    """

    name: str
    fp8: Fp8

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the tensor."""
        return self.fp8.scaling in ("delayed", "current")

    def block(self, role: str, what: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Return what shares a scale, rows by columns."""
        if self.per_tensor:
            return shape
        size = scaling.MX_BLOCK if self.fp8.scaling == "mxfp8" else scaling.TILE
        if self.fp8.scaling == "subchannel" and role == "weight":
            return (size, size)
        return (1, size) if what == ROW_WISE else (size, 1)


def recipes() -> list[Recipe]:
    """Return the precisions of conf/precision as they are configured, and blocks with scales that
    are no powers of two.
    """
    found = [
        Recipe(name, fp8)
        for name in PRECISIONS
        if (fp8 := compose_plan([f"precision={name}"]).precision.fp8)
    ]
    blocks = next(recipe for recipe in found if recipe.name == "fp8_subchannel")
    return [
        *found,
        Recipe(FP32_SCALES, blocks.fp8.model_copy(update={"power_of_two_scales": False})),
    ]


def check() -> None:
    """Raise InputError where there is no CUDA GPU or no Transformer Engine."""
    if not torch.cuda.is_available():
        raise InputError(
            "recipes.measure.te_parity compares with Transformer Engine on a CUDA GPU and this"
            " machine has none; run it where there is one"
        )
    if te_quantizers.version() is None:
        raise InputError(
            "recipes.measure.te_parity needs Transformer Engine, which cannot be imported here; run"
            " it in the NeMo container, on a CUDA GPU"
        )


def run(large: bool = True) -> Iterator[Row]:
    """Yield every row; `large`: also the tensors of 4096 x 4096 and the layers of training's
    size.
    """
    torch.set_float32_matmul_precision(
        "highest"
    )  # our GEMMs are FP32; a container may have asked for TF32
    found = recipes()
    for recipe in found:
        for case, shape in cases(large):
            for role in ROLES:
                yield from casts(recipe, role, case, shape)
    delayed = next(recipe for recipe in found if recipe.fp8.scaling == "delayed")
    for history in HISTORIES:
        yield from states(delayed, *history)
    for recipe in found:
        if (
            recipe.name != FP32_SCALES
        ):  # an environment variable, read at import, would have to be set
            yield from linear_layers.rows(recipe.name, recipe.fp8, large, unavailable(recipe))


def cases(large: bool) -> list[tuple[str, tuple[int, int]]]:
    """Return kinds of tensors with their shapes; the shape that no training has comes last."""
    ordinary = [("normal", shape) for shape in (SHAPES if large else SHAPES[1:])]
    return [
        *((kind, EXTREME) for kind in tensors.KINDS if kind != "normal"),
        ("heavy-tailed with outliers", SHAPES[3]),
        *ordinary,
    ]


def unavailable(recipe: Recipe) -> str:
    """Return why Transformer Engine does not run a recipe on this GPU; where it can, "".

    Asked before, because its MXFP8 kernels are empty below compute capability 10
    (quantize_mxfp8.cuh) and raise nothing.
    """
    from transformer_engine.pytorch import fp8 as te

    name = {"subchannel": "check_fp8_block_scaling_support", "mxfp8": "check_mxfp8_support"}.get(
        recipe.fp8.scaling, "check_fp8_support"
    )
    able, why = getattr(te, name, lambda: (False, f"this version has no {name}"))()
    return "" if able else f"Transformer Engine: {why}"


def casts(recipe: Recipe, role: str, case: str, shape: tuple[int, int]) -> Iterator[Row]:
    """Yield the rows of both copies of one operand."""
    fmt = format_of(recipe.fp8, role)
    for what in (ROW_WISE, COLUMN_WISE):
        row = Row(case, recipe.name, role, what, fmt.name, shape)
        try:
            yield (
                row.refuse(why)
                if (why := unavailable(recipe))
                else replace(row, **facts(_cast(recipe, role, case, shape, what, fmt)))
            )
        except Exception as error:  # whatever a library raises: one row less, not a run less
            yield row.refuse(f"{type(error).__name__}: {error}")


@torch.no_grad()
def _cast(
    recipe: Recipe, role: str, case: str, shape: tuple[int, int], what: str, fmt: Format
) -> Difference:
    x = _tensor(case, shape, fmt)
    wide, block = x.float(), recipe.block(role, what, shape)
    ours, theirs = quantiser(recipe.fp8), _te_quantizer(recipe, role)
    if isinstance(ours, DelayedScaling):
        ours = ours.to("cuda")
        scale = _stale_scale(wide, fmt)
        ours.scale[ROLES.index(role)] = scale
        theirs.scale.fill_(scale)
        theirs.amax.zero_()
        rules = numbers.fixed_rules(scale)
    elif recipe.fp8.scaling == "mxfp8":
        rules = numbers.mx_rules(wide, block, fmt, recipe.fp8.mx_scale_rounding)
    else:
        rules = numbers.tensor_or_block_rules(wide, block, fmt, recipe.fp8.power_of_two_scales)
    mine = our_copy(ours(wide, role, False), what, rules[0], block, fmt)
    return numbers.difference(
        wide, mine, te_copy(theirs(x), what, role, recipe, shape), rules, block, fmt
    )


@functools.lru_cache(maxsize=2)
def _tensor(case: str, shape: tuple[int, int], fmt: Format) -> Tensor:
    """Return a case's tensor; both copies of the roles that share a format ask for it."""
    return tensors.make(case, shape, fmt, "cuda")


def _stale_scale(x: Tensor, fmt: Format) -> Tensor:
    """Return a scale as the past would have set it."""
    finite = x[x.isfinite()].abs()
    amax = finite.max() * WARM if finite.numel() else torch.ones((), device=x.device)
    return scaling.scale_from_amax(amax, fmt)


def _te_quantizer(recipe: Recipe, role: str) -> Any:
    found = getattr(te_quantizers.quantizers(recipe.fp8.scaling), OPERANDS[role])
    if recipe.fp8.scaling == "subchannel":
        found.force_pow_2_scales = recipe.fp8.power_of_two_scales
    return found


def our_copy(
    operand: Operand, what: str, rule: numbers.Rule, block: tuple[int, int], fmt: Format
) -> Copy:
    """Return one of our copies as bytes; `rule` holds the scales that blocks were divided by."""
    values = operand.row if what == ROW_WISE else operand.col
    if operand.scale_inv is not None:
        return Copy(numbers.to_bytes(values, fmt), operand.scale_inv.reshape(1, 1))
    return Copy(
        numbers.descaled_to_bytes(values, numbers.spread(rule.scale, block, values.shape), fmt),
        rule.stored,
    )


def te_copy(quantized: Any, what: str, role: str, recipe: Recipe, shape: tuple[int, int]) -> Copy:
    """Return one of Transformer Engine's copies by the operand's own rows and columns, without
    padding.
    """
    row_wise = what == ROW_WISE
    if recipe.per_tensor:
        data = _made(quantized, "_data" if row_wise else "_transpose")
        return Copy(data if row_wise else data.t().contiguous(), quantized._scale_inv.reshape(1, 1))
    side = "rowwise" if row_wise else "columnwise"
    data, stored = _made(quantized, f"_{side}_data"), _made(quantized, f"_{side}_scale_inv")
    groups = [
        -(-length // size)
        for length, size in zip(shape, recipe.block(role, what, shape), strict=True)
    ]
    if recipe.fp8.scaling == "mxfp8":
        return Copy(data, stored[: groups[0], : groups[1]].int())
    transposed = row_wise if role != "weight" else not row_wise
    stored = (
        stored[: groups[1], : groups[0]].t() if transposed else stored[: groups[0], : groups[1]]
    )
    return Copy(data if row_wise else data.t().contiguous(), stored.contiguous())


def _made(quantized: Any, name: str) -> Tensor:
    found = getattr(quantized, name)
    if found is None:
        raise ValueError(f"Transformer Engine makes no {name.strip('_')} on this GPU")
    return found


def states(recipe: Recipe, length: int, algorithm: str, margin: int) -> Iterator[Row]:
    """Yield, for each operand, delayed scaling's history and scale after each of some steps,
    ordinary ones and bad ones.
    """
    fp8 = recipe.fp8.model_copy(
        update={"amax_history_len": length, "amax_compute_algo": algorithm, "margin": margin}
    )
    for role in ROLES:
        fmt = format_of(fp8, role)
        row = Row(
            f"{len(STEPS)} steps, history {length}, {algorithm}, margin {margin}",
            recipe.name,
            role,
            STATE,
            fmt.name,
            (64, 64),
        )
        try:
            yield replace(row, **facts(_state(fp8, role)))
        except Exception as error:
            yield row.refuse(f"{type(error).__name__}: {error}")


@torch.no_grad()
def _state(fp8: Fp8, role: str) -> Difference:
    (plain, without_nan), theirs = (
        (DelayedScaling(fp8).to("cuda") for _ in range(2)),
        TeState(fp8, role),
    )
    column, pairs = ROLES.index(role), list[tuple[Tensor, Tensor, Tensor]]()
    for number, (size, bad) in enumerate(STEPS):
        x = tensors.make("normal", (64, 64), format_of(fp8, role), "cuda", seed=number) * size
        if bad:
            x[3, 5] = float(bad)
        plain(x.float(), role, True)
        without_nan(x.float().nan_to_num(0.0, torch.inf, -torch.inf), role, True)
        theirs.step(x)
        pairs.append((_state_of(plain, column), _state_of(without_nan, column), theirs.values()))
    return state_difference(
        [mine for mine, _, _ in pairs],
        [mine for _, mine, _ in pairs],
        [other for _, _, other in pairs],
    )


def _state_of(found: DelayedScaling, column: int) -> Tensor:
    return torch.cat([found.scale[column : column + 1], found.amax_history[:, column]])


class TeState:
    """Transformer Engine's delayed scaling of one operand, updated as FP8GlobalStateManager does at
    the end of a pass (quantization.py).
    """

    def __init__(self, fp8: Fp8, role: str) -> None:
        import transformer_engine.pytorch  # noqa: F401  loads the libraries that the next two need
        from transformer_engine.common import recipe
        from transformer_engine.pytorch.fp8 import RecipeState

        form = recipe.Format.HYBRID if fp8.format == "hybrid" else recipe.Format.E4M3
        self.recipe = recipe.DelayedScaling(
            fp8_format=form,
            margin=fp8.margin,
            amax_history_len=fp8.amax_history_len,
            amax_compute_algo=fp8.amax_compute_algo,
        )
        forward = role != "grad"
        self.state = RecipeState.create(
            self.recipe,
            mode="forward" if forward else "backward",
            num_quantizers=3 if forward else 2,
        )
        self.column = ROLES.index(role) if forward else 0
        self.quantizer = self.state.make_quantizers()[self.column]
        self.quantizer.internal = True

    def step(self, x: Tensor) -> None:
        """Cast `x` and end the pass."""
        import transformer_engine_torch as tex

        self.quantizer(x)
        buffer = torch.cat([self.state.amax_history[0]])
        tex.fused_amax_and_scale_update_after_reduction(
            buffer,
            [self.state.amax_history],
            [self.state.scale],
            self.recipe.amax_compute_algo,
            self.state.dtype,
            self.recipe.margin,
        )

    def values(self) -> Tensor:
        """Return the scale and the history."""
        return torch.cat(
            [
                self.state.scale[self.column : self.column + 1],
                self.state.amax_history[:, self.column],
            ]
        )


def state_difference(
    ours: list[Tensor], without_nan: list[Tensor], theirs: list[Tensor]
) -> Difference:
    """Compare scales (entry 0 of each step) and histories; `without_nan` are ours where NaN was
    taken out of the tensors.
    """
    mine, other, clean = (torch.stack(found) for found in (ours, theirs, without_nan))
    differs = mine.view(torch.int32) != other.view(torch.int32)
    skips = differs & (clean.view(torch.int32) == other.view(torch.int32))
    one_step = [
        (found.view(torch.int32) - other.view(torch.int32)).abs() == 1 for found in (mine, clean)
    ]
    near = differs & ~skips & (one_step[0] | one_step[1])
    causes = [
        {numbers.SKIPS_NAN: int(skips[:, part].sum()), numbers.NEIGHBOUR: int(near[:, part].sum())}
        for part in (slice(1, None), slice(0, 1))
    ]
    left = differs & ~skips & ~near
    gap = ((mine - other).abs() / other.abs().clamp(min=torch.finfo(torch.float32).tiny))[differs]
    gap = gap[gap.isfinite()]
    return Difference(
        elements=mine[:, 1:].numel(),
        identical=int((~differs[:, 1:]).sum()),
        scales=mine.shape[0],
        scales_identical=int((~differs[:, 0]).sum()),
        largest=float(gap.max()) if gap.numel() else 0.0,
        unit="relative",
        explained={cause: count for cause, count in causes[0].items() if count},
        scales_explained={cause: count for cause, count in causes[1].items() if count},
        unexplained=int(left.sum()),
    )
