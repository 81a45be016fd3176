"""Every kernel test runs on every implementation in ``IMPLS``."""

import pytest
import torch

IMPLS = ["reference", "cpu-torch", "cpu-native"]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
