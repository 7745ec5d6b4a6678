"""The loss that is trained with: NeMo's to the bit, without waiting for the device."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from recipes.training import cpu

cpu.activate()
from megatron.core import parallel_state  # noqa: E402
from nemo.collections.nlp.modules.common.megatron import utils  # noqa: E402
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction  # noqa: E402

from recipes.training.compat import loss  # noqa: E402

pytestmark = pytest.mark.nemo
SHAPE = (2, 64)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank: there is nobody to average with."""
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 1)
    for module in (utils, loss):
        monkeypatch.setattr(
            module,
            "average_losses_across_data_parallel_group",
            lambda losses: torch.cat([one.clone().detach().view(1) for one in losses]),
        )
    yield


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_it_is_nemos_to_the_bit(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    losses, mask = (
        torch.rand(SHAPE, generator=generator) * 11,
        (torch.rand(SHAPE, generator=generator) < share).float(),
    )
    ours, theirs = (
        made.forward({"loss_mask": mask.clone()}, losses)
        for made in (loss.MaskedLoss(), MaskedTokenLossReduction())
    )
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[2]["avg"], theirs[2]["avg"])
    assert (
        torch.equal(ours[1], theirs[1])
        and ours[1].dtype == theirs[1].dtype
        and ours[1] == max(1, mask.sum())
    )


def test_no_value_is_asked_for_on_the_host_as_nemos_is() -> None:
    with FakeTensorMode():
        losses, mask = torch.rand(SHAPE), torch.ones(SHAPE)
        loss.MaskedLoss().forward({"loss_mask": mask}, losses)
        with pytest.raises(DataDependentOutputException):
            MaskedTokenLossReduction().forward({"loss_mask": mask}, losses)


def test_newer_nemo_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo 2.4's masked_token_loss takes (tensor, mask) alone, and its loss does not wait."""
    model = SimpleNamespace(_training_loss_reduction=None)
    loss.set_loss(model)
    assert isinstance(model._training_loss_reduction, loss.MaskedLoss)
    monkeypatch.setattr(loss, "masked_token_loss", lambda tensor, mask: None)
    newer = SimpleNamespace(_training_loss_reduction=None)
    loss.set_loss(newer)
    assert newer._training_loss_reduction is None
