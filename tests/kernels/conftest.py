"""Every kernel test runs on every implementation in ``IMPLS``."""

import pytest
import torch

from kernel_batches import DEVICE, INTERPRETED
from kvrelay_kernels.cpu.native.library import HOW_TO_BUILD, instruction_set

IMPLS = ["reference", "cpu-torch", "cpu-native"]
if INTERPRETED:
    IMPLS = ["triton"]
elif DEVICE.type == "cuda":
    IMPLS = ["reference", "triton"]
NO_FLOAT64 = {"cpu-native", "triton"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what an implementation does not compute, rather than skip it."""
    computed = [item for item in items if not _uncomputed(getattr(item, "callspec", None))]
    config.hook.pytest_deselected(items=[item for item in items if item not in computed])
    items[:] = computed


def _uncomputed(callspec) -> bool:
    params = callspec.params if callspec else {}
    return params.get("impl") in NO_FLOAT64 and params.get("dtype") == torch.float64


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu-native" and instruction_set() is None:
        pytest.skip(f"the C++ extension is not built: {HOW_TO_BUILD}")
    return request.param


@pytest.fixture
def working_dtype(impl: str) -> torch.dtype:
    """The most precise dtype of the implementation, for tests of more than precision."""
    return torch.float32 if impl in NO_FLOAT64 else torch.float64


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
