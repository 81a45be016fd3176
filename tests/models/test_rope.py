from pathlib import Path

import pytest
import torch
from tiny_models import ROPES
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvrelay.models.rope import Rope, inverse_frequencies
from kvrelay.models.rope_spec import RopeSpec, rope_spec


@pytest.mark.parametrize("theta", [500.0, 10_000.0, 1e6])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_frequencies_equal_transformers(rope: str, head_dim: int, theta: float) -> None:
    parameters = {"rope_theta": theta, **ROPES[rope], "original_max_position_embeddings": 2048}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=16_384, rope_parameters=dict(parameters))
    expected, expected_factor = ROPE_INIT_FUNCTIONS[ROPES[rope]["rope_type"]](config, torch.device("cpu"))
    spec = rope_spec({"rope_parameters": parameters, "max_position_embeddings": 16_384}, Path("config.json"))
    inverse, factor = inverse_frequencies(spec, head_dim)
    assert torch.equal(inverse, expected)
    assert factor == expected_factor


def test_default_frequencies() -> None:
    inverse, factor = inverse_frequencies(RopeSpec(theta=10_000.0), 8)
    torch.testing.assert_close(inverse, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert factor == 1.0


def test_far_positions_are_exact_in_bfloat16() -> None:
    rope = Rope(RopeSpec(theta=10_000.0), 64, torch.device("cpu"))
    positions = torch.tensor([8191, 8192])
    wide, narrow = rope.tables(positions, torch.float32), rope.tables(positions, torch.bfloat16)
    for exact, rounded in zip(wide, narrow, strict=True):
        assert torch.equal(exact.to(torch.bfloat16), rounded)
    assert not torch.equal(wide[0][0], wide[0][1])
