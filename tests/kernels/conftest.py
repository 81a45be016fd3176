"""Every kernel test runs on every implementation in ``IMPLS``."""

import pytest
import torch

from kernel_batches import DEVICE, INTERPRETED

IMPLS = ["reference"]
if INTERPRETED:
    IMPLS = ["triton"]
elif DEVICE.type == "cuda":
    IMPLS = ["reference", "triton"]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """``torch.empty`` gives NaN (or huge integers), so that an element no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
