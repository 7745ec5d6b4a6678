"""The GEMM measurement on a CUDA GPU: its products and casts are right, and the command writes what
analysis reads.
"""

import json
from pathlib import Path

import pytest
import torch

from analysis.speed.gemm import load, load_more, speedups
from recipes.errors import InputError
from recipes.estimate.sizes import Shape
from recipes.gemm_rows import OPERANDS, ROLES
from recipes.measure.gemm import main
from recipes.measure.gpu import te_quantizers
from recipes.measure.gpu.gemm import TE_SCALINGS, bytes_of_cast, check, kinds

pytestmark = pytest.mark.gpu
ROUNDING = {
    "bf16": 0.01,
    "fprop": 0.05,
    "dgrad": 0.08,
    "wgrad": 0.08,
}  # relative; backward the gradient may be E5M2, with a bit less
needs_te = pytest.mark.skipif(te_quantizers.version() is None, reason="needs Transformer Engine")


@pytest.mark.parametrize("role", ROLES)
def test_every_kind_multiplies_to_what_bf16_does_within_fp8s_precision(role: str) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) for rows in (256, 384))
    exact = a.double() @ b.double().t()
    for kind in kinds(role):
        error = (kind.make(a, b)().double() - exact).norm() / exact.norm()
        assert error < ROUNDING["bf16" if kind.precision == "bf16" else role], (
            kind.granularity,
            kind.accumulation,
        )


def test_shapes_that_are_no_multiple_of_a_tile_are_refused() -> None:
    with pytest.raises(InputError, match="multiple of 128"):
        check([Shape("odd", 128, 128, 100)])


@needs_te
@pytest.mark.parametrize("granularity", TE_SCALINGS)
@pytest.mark.parametrize("operand", OPERANDS)
def test_transformer_engine_writes_both_copies_and_they_hold_the_operand(
    granularity: str, operand: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    quantized = getattr(te_quantizers.quantizers(TE_SCALINGS[granularity]), operand)(x)
    error = (quantized.dequantize(dtype=torch.float32) - x.float()).norm() / x.float().norm()
    assert 0 < error < ROUNDING["dgrad"]
    written = (
        bytes_of_cast(granularity, x, quantized)
        - (2 if granularity == "tensor, current" else 1) * x.nbytes
    )
    copies = (
        2 if torch.cuda.get_device_capability() < (10, 0) or granularity == "sub-channel" else 1
    )
    assert copies * x.numel() < written < (copies + 0.2) * x.numel()


def test_the_command_writes_rows_with_their_device_that_analysis_reads(tmp_path: Path) -> None:
    assert main(["--k", "1024", "--rounds", "2", "--bandwidth", "--out", str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (
        manifest["device"] == torch.cuda.get_device_name() and manifest["settings"]["rounds"] == 2
    )
    assert speedups(load(tmp_path)).loc[("tensor", "fast"), 1024] > 1
    copies = load_more(tmp_path, "bandwidth")
    assert (
        copies["bytes"].tolist() == [2**power for power in range(20, 32)]
        and copies["gb_per_s"].max() > 500
    )
    layers = load_more(tmp_path, "layers")
    channel = layers[layers["granularity"] == "channel"]
    assert (
        not channel.empty
        and (channel["seconds_with_casts"] > channel["seconds_weights_amortised"]).all()
    )
    te = layers[layers["granularity"].isin(TE_SCALINGS)]
    assert (
        te["seconds_with_casts"].notna().all()
        if te_quantizers.version()
        else te["refused"].str.contains("transformer_engine").all()
    )
