"""Both paths of attention, and decoding, against a float64 softmax of one sequence at a time.

On a GPU the kernels run there; without one, in Triton's interpreter (see conftest.py), which gets
bf16 wrong: that type is tested on a GPU only.
"""

import model

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

kernels = pytest.mark.skipif(model.triton is None, reason="needs Triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FP32 = 1e-5 if GPU else 2e-6  # a GPU multiplies fp32 as three tf32 products
TOLERANCE = {torch.float32: FP32, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
HEAD_DIMS = [16, 32, 64, 80, 128]
PATHS = [pytest.param("fused", marks=kernels), "padded"]
UNUSED = {"fused": float("nan"), "padded": 100.0}  # what cache slots hold that no row has filled


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes seconds for a large tile, and short sequences would fill just one."""
    torch.manual_seed(0)
    if model.triton and not GPU:
        small = {"forward": (32, 16, 4, 1), "dq": (16, 32, 4, 1), "dkv": (32, 16, 4, 1)}
        monkeypatch.setattr(model, "TILES", {name: [tile, tile] for name, tile in small.items()})


def ragged(lengths: list[int], H: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """-> qkv (T, 3, H, D), a gradient for the output (T, H, D), cu_seqlens."""
    T = sum(lengths)
    qkv, do = torch.randn(T, 3, H, D), torch.randn(T, H, D)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return qkv.to(DEVICE, dtype), do.to(DEVICE, dtype), cu_seqlens.to(DEVICE)


def exact(qkv: Tensor, lengths: list[int]) -> Tensor:
    """The definition, in float64."""
    out = []
    for x in qkv.double().split(lengths):
        q, k, v = x.permute(1, 2, 0, 3)  # (H, L, D)
        future = torch.ones(len(x), len(x), device=x.device).triu(1).bool()
        scores = (q @ k.mT * x.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def attend(path: str, qkv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    if path == "fused":
        return model.fused_attention(qkv, cu_seqlens, longest)[0]
    return model.padded_attention(qkv, model.length_groups(cu_seqlens.tolist(), DEVICE))


def with_gradient(function, qkv: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    out.backward(do.to(out.dtype))
    return out.detach(), qkv.grad


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return ((found.double() - expected).norm() / expected.norm()).item()


def check(path: str, lengths: list[int], H: int, D: int, dtype: torch.dtype) -> None:
    qkv, do, cu_seqlens = ragged(lengths, H, D, dtype)
    out, grad = with_gradient(lambda x: attend(path, x, cu_seqlens, max(lengths)), qkv, do)
    exact_out, exact_grad = with_gradient(lambda x: exact(x, lengths), qkv.double(), do)
    assert error(out, exact_out) < TOLERANCE[dtype]
    for part in range(3):  # q and k have no gradient where sequences are single tokens
        if exact_grad[:, part].norm() > 1e-9:
            assert error(grad[:, part], exact_grad[:, part]) < TOLERANCE[dtype], "qkv"[part]


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@kernels
def test_kernels_are_exact(D: int, dtype: torch.dtype) -> None:
    lengths = [1, *torch.randint(2, 80, (2,)).tolist(), 0, 32, 33]  # 32: a whole number of tiles
    check("fused", lengths, 2, D, dtype)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_padded_path_is_exact(D: int, dtype: torch.dtype) -> None:
    check("padded", [1, *torch.randint(2, 80, (9,)).tolist(), 0, 200], 2, D, dtype)


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(sum))
@pytest.mark.parametrize("path", PATHS)
def test_any_lengths(path: str, lengths: list[int]) -> None:
    torch.manual_seed(sum(lengths))
    check(path, lengths, 1, 16, torch.float32)


@kernels
@pytest.mark.parametrize("tile", [(128, 64, 8, 2), (64, 64, 4, 1), (16, 64, 4, 1)], ids=str)
def test_tiles_do_not_matter(tile: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "TILES", dict.fromkeys(model.TILES, [tile, tile]))
    check("fused", [130, 1, 64, 65], 1, 64, torch.float16)


@pytest.mark.parametrize("path", PATHS)
def test_neighbours_change_nothing(path: str) -> None:
    """Bit for bit, in values and gradients, even if they are NaN, and wherever they lie."""
    lengths = [33, 20, 0, 47, 30]
    qkv, do, cu_seqlens = ragged(lengths, 2, 32, torch.float32)
    out, grad = with_gradient(lambda x: attend(path, x, cu_seqlens, 47), qkv, do)
    broken = qkv.clone()
    broken[33:53] = float("nan")
    out_nan, grad_nan = with_gradient(lambda x: attend(path, x, cu_seqlens, 47), broken, do)
    assert out_nan[33:53].isnan().all()
    others = torch.cat([torch.arange(33), torch.arange(53, 130)]).to(DEVICE)
    same = torch.equal if path == "fused" or not GPU else torch.allclose  # PyTorch's own kernels
    assert same(out_nan[others], out[others])
    assert same(grad_nan[others], grad[others])
    do[33:53] = float("nan")
    _, grad_nan = with_gradient(lambda x: attend(path, x, cu_seqlens, 47), qkv, do)
    assert same(grad_nan[others], grad[others])
    if path == "fused":
        alone = torch.tensor([0, 47], device=DEVICE, dtype=torch.int32)
        assert torch.equal(attend(path, qkv[53:100], alone, 47), out[53:100])


@pytest.mark.parametrize("path", PATHS)
def test_causal(path: str) -> None:
    """No output changes when later tokens do; no later token receives a gradient from it."""
    qkv, do, cu_seqlens = ragged([50, 40], 1, 16, torch.float32)
    before = attend(path, qkv, cu_seqlens, 50)
    do[30:] = 0
    _, grad = with_gradient(lambda x: attend(path, x, cu_seqlens, 50), qkv, do)
    assert grad[:30].any() and not grad[30:].any()
    qkv[30:] += 1
    assert torch.equal(attend(path, qkv, cu_seqlens, 50)[:30], before[:30])


def test_length_groups() -> None:
    lengths = torch.randint(0, 300, (200,)).tolist()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    shapes, token, slot = model.length_groups(cu_seqlens.tolist())
    sequence = torch.arange(200).repeat_interleave(torch.tensor(lengths))  # (T,)
    assert torch.equal(token[slot], torch.arange(sum(lengths)))
    assert sum(rows for rows, _ in shapes) == sum(n > 0 for n in lengths)
    for rows, slots in zip(shapes, token.split([r * L for r, L in shapes]), strict=True):
        owner = sequence[slots.view(rows)]
        assert (owner == owner[:, :1]).all()  # a row is one sequence, pads included
    assert len(token) - len(slot) <= model.PADS * len(shapes)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=kernels)])
def test_what_the_model_calls(fused: bool) -> None:
    """Attention as the model selects it, with groups or without, and one token decoded."""
    qkv, _, cu_seqlens = ragged([5, 9], 1, 16, torch.float32)
    out = model.attention(qkv, cu_seqlens, 9, model.length_groups([0, 5, 14], DEVICE), fused)
    assert torch.equal(model.attention(qkv, cu_seqlens, 9, fused=fused), out)
    assert error(out, exact(qkv, [5, 9])) < FP32
    cache = torch.zeros(2, 1, 1, 9, 16, device=DEVICE)
    cache[:, 0, :, :8] = qkv[5:13, 1:].permute(1, 2, 0, 3)
    lengths = torch.tensor([8], device=DEVICE)
    found = model.decode_attention(qkv[13:], cache, lengths, fused)
    assert error(found, out[13:].double()) < FP32


# --------------------------------------------------------------------------------------------------
# Decoding


def decode(path: str, qkv: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    return getattr(model, f"{path}_decode")(qkv, cache, lengths)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_decode_is_exact(path: str, D: int, dtype: torch.dtype) -> None:
    """Appends, attends to no stale slot, and leaves other rows' filled slots alone."""
    if path == "fused" and dtype not in KERNEL_DTYPES:
        pytest.skip("needs a GPU")
    B, H, S = 6, 2, 400
    lengths = torch.tensor([0, 1, 63, 64, 129, 399], device=DEVICE, dtype=torch.int32)
    cache = torch.randn(2, B, H, S, D).to(DEVICE, dtype)
    new = torch.randn(B, 3, H, D).to(DEVICE, dtype)
    expected = cache.clone()
    for row, n in enumerate(lengths.tolist()):
        cache[:, row, :, n + 1 :] = UNUSED[path]
        expected[:, row, :, n] = new[row, 1:]
    out = decode(path, new, cache, lengths)
    for row, n in enumerate(lengths.tolist()):
        k, v = expected[:, row, :, : n + 1].double()  # (H, n + 1, D)
        weights = (new[row, 0].double()[:, None] @ k.mT * D**-0.5).softmax(-1)  # (H, 1, n + 1)
        assert error(out[row], (weights @ v)[:, 0]) < TOLERANCE[dtype]
        assert torch.equal(cache[:, row, :, : n + 1], expected[:, row, :, : n + 1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("S", [100, 300, 1100])  # fused: one, two and eight programs to a row
def test_decode_shares(path: str, S: int) -> None:
    """Shares merge rightly, empty ones too; and lengths may be int64, the cache a view."""
    B, H, D = 2, 1, 16
    cache, new = torch.randn(2, B + 1, H, S, D).to(DEVICE), torch.randn(B, 3, H, D).to(DEVICE)
    lengths = torch.tensor([3, S - 1], device=DEVICE)
    out = decode(path, new, cache[:, :B], lengths)
    for row, n in enumerate(lengths.tolist()):
        k, v = cache[:, row, :, : n + 1].double()
        weights = (new[row, 0].double()[:, None] @ k.mT * D**-0.5).softmax(-1)
        assert error(out[row], (weights @ v)[:, 0]) < FP32


@pytest.mark.parametrize("path", PATHS)
def test_token_by_token_equals_packed(path: str) -> None:
    T, H, D = 40, 2, 32
    qkv, _, cu_seqlens = ragged([T], H, D, torch.float32)
    cache = torch.full((2, 1, H, 64, D), UNUSED[path], device=DEVICE)
    steps = torch.arange(T, device=DEVICE)
    out = torch.cat([decode(path, qkv[t : t + 1], cache, steps[t : t + 1]) for t in range(T)])
    assert error(out, attend(path, qkv, cu_seqlens, T).double()) < FP32


# --------------------------------------------------------------------------------------------------
# The operators, as torch.compile sees them


@kernels
def test_operators_keep_their_promises() -> None:
    qkv, do, cu_seqlens = ragged([5, 7], 1, 16, torch.float32)
    o, lse = model.fused_attention(qkv, cu_seqlens, 7)
    cache, lengths = torch.zeros(2, 2, 1, 8, 16, device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    ops = torch.ops.rlhf
    torch.library.opcheck(ops.attention, (qkv.requires_grad_(), cu_seqlens, 7))
    torch.library.opcheck(ops.attention_backward, (qkv.detach(), o, lse, do, cu_seqlens, 7))
    torch.library.opcheck(ops.decode_attention, (qkv.detach()[:2], cache, lengths))


@kernels
def test_one_graph_for_all_shapes() -> None:
    """The training step and the decoding step compile without a break and never again."""
    linear, counter = torch.nn.Linear(16, 48, device=DEVICE), CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, cu_seqlens: Tensor, longest: int, cache: Tensor, lengths: Tensor) -> Tensor:
        qkv = linear(x).view(-1, 3, 1, 16)
        o = model.fused_attention(qkv, cu_seqlens, longest)[0]
        new = qkv[: len(lengths)].detach()
        return o.square().sum() + model.fused_decode(new, cache, lengths).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for sizes in ([4, 9, 5], [17, 2], [1, 5, 6, 7]):  # (a first T of 16 would count as C)
        _, _, cu_seqlens = ragged(sizes, 1, 16, torch.float32)
        x = torch.randn(sum(sizes), 16, device=DEVICE)
        cache = torch.randn(2, len(sizes), 1, 32, 16, device=DEVICE)
        lengths = torch.arange(len(sizes), device=DEVICE)
        found, expected = (
            f(x, cu_seqlens, max(sizes), cache.clone(), lengths) for f in (compiled, step)
        )
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y, linear.weight)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1
