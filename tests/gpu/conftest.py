"""What needs a GPU is skipped where there is none, with the reason."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    if not here:
        return
    import torch

    for item in here:
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def transformer_engine() -> str:
    """The version of Transformer Engine; tests that ask for it are skipped where there is none."""
    from recipes.measure.gpu import te_quantizers

    version = te_quantizers.version()
    if version is None:
        pytest.skip("no Transformer Engine")
    return version
