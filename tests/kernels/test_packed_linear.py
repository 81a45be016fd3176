"""C++ linear layers on packed weights: right for every shape, the same to the bit in every batch."""

from pathlib import Path

import pytest
import torch

import kvrelay_kernels as kk
from kvrelay_kernels.cpu.native import library
from kvrelay_kernels.cpu.native.linear import interleave, pack_linear, panel_width

pytestmark = pytest.mark.skipif(library.instruction_set() is None, reason=library.HOW_TO_BUILD)
SHAPES = [(1, 2), (31, 192), (64, 194), (97, 390), (576, 576), (200, 1536)]


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    path = Path(library.__file__).with_name(f"kernels_{request.param}.so")
    loaded = library.load_from(path) if path.exists() else None
    if loaded is None or not loaded.kvr_supported():
        pytest.skip("not for this processor")
    monkeypatch.setattr(library, "_load", lambda: (request.param, loaded))
    return str(request.param)


def random_layer(num_out: int, num_in: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_out + num_in)
    weight = torch.randn(num_out, num_in, generator=generator)
    return weight.to(dtype), torch.randn(num_out, generator=generator)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_right_and_each_row_is_the_same_alone(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = random_layer(*shape, dtype)
    packed = pack_linear(weight, bias)
    x = torch.randn(103, shape[1], generator=torch.Generator().manual_seed(1))
    exact = x.double() @ weight.double().T + bias.double()
    together = packed(x)
    plain = torch.nn.functional.linear(x, weight.float(), bias)
    tolerance = max(2 * (plain - exact).abs().max().item(), 1e-6 * shape[1] ** 0.5)
    assert (together - exact).abs().max().item() <= tolerance
    alone = torch.cat([packed(row[None]) for row in x])
    assert torch.equal(alone, together)
    for rows in (2, 3, 4, 5, 6, 7, 12, 13, 97):
        assert torch.equal(packed(x[:rows]), together[:rows]), rows


def test_threads_change_nothing() -> None:
    weight, bias = random_layer(576, 390, torch.bfloat16)
    packed = pack_linear(weight, bias)
    x = torch.randn(130, 390)
    want = [packed(x[:rows]) for rows in (1, 4, 130)]
    torch.set_num_threads(4)
    for rows, expected in zip((1, 4, 130), want, strict=True):
        assert torch.equal(packed(x[:rows]), expected)
    assert torch.equal(pack_linear(weight, bias)(x), want[-1])


@pytest.mark.parametrize("num_out", [1, 16, 37])
def test_interleaved_rows_come_by_panels_in_turn(num_out: int) -> None:
    gate, up = (random_layer(num_out, 4, torch.float32)[0] + offset for offset in (0, 100))
    width = panel_width()
    rows = interleave(gate, up)
    assert rows.shape == (2 * -(-num_out // width) * width, 4)
    for index in range(num_out):
        at = index // width * 2 * width + index % width
        assert torch.equal(rows[at], gate[index])
        assert torch.equal(rows[at + width], up[index])
    assert rows.count_nonzero() == gate.count_nonzero() + up.count_nonzero()


def test_refusals_name_the_argument() -> None:
    with pytest.raises(kk.InvalidArgument, match="weight: needed an even number of inputs"):
        pack_linear(torch.zeros(4, 3))
    with pytest.raises(kk.InvalidArgument, match="weight: needed float32 or bfloat16"):
        pack_linear(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(kk.InvalidArgument, match=r"x: needed \[rows, 4\]"):
        pack_linear(torch.zeros(4, 4))(torch.zeros(2, 6))
