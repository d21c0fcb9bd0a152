"""Is the fused attention right on this GPU, and how fast is it beside what PyTorch offers?

    python tests/bench_attention.py --out bench.json        # under 9 minutes on an H200

First correctness against float64 (an error stops the run), then a small search for tiles, then
tables: milliseconds, useful TFLOP/s (padding is no use) and time as a multiple of ours. Without a
GPU it only rehearses, in Triton's interpreter, in under a minute: no number means anything then.
"""

import argparse
import functools
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

GPU = torch.cuda.is_available()
if not GPU:  # before the kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"

import model  # noqa: E402

import triton.testing  # noqa: E402
from triton.runtime.errors import TritonError  # noqa: E402

DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)
CANNOT = (RuntimeError, NotImplementedError, ImportError, TypeError, ValueError, TritonError)
FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
START = time.monotonic()
Table = dict[str, float | str]  # milliseconds, or why there are none


# --------------------------------------------------------------------------------------------------
# Measuring


def milliseconds(function: Callable, gradients: list[Tensor] | None = None) -> float | str:
    """The median over repetitions; where the function cannot run here, the reason."""
    try:
        function()
        if GPU:
            return triton.testing.do_bench(
                function, warmup=20, rep=80, grad_to_none=gradients, return_mode="median"
            )
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    except CANNOT as reason:
        return f"{type(reason).__name__}: {reason}"[:80].replace("\n", " ")


def graph_milliseconds(function: Callable) -> float | str:
    """The same from a CUDA graph, without the launch overhead of the single operators."""
    if not GPU:
        return milliseconds(function)
    try:
        function()
        return triton.testing.do_bench_cudagraph(function, rep=60, return_mode="median")
    except CANNOT as reason:
        return f"{type(reason).__name__}: {reason}"[:80].replace("\n", " ")


def forward_and_backward(
    function: Callable[[], Tensor], inputs: list[Tensor], do: Tensor
) -> tuple[float | str, float | str]:
    """Milliseconds of the forward pass, and of forward and backward."""
    with torch.no_grad():
        forward = milliseconds(function)
    return forward, milliseconds(lambda: function().backward(do), inputs)


class Report:
    """Prints tables and keeps them for --out."""

    def __init__(self, seconds: float):
        self.seconds, self.rows = seconds, []

    def row(self, title: str, times: Table, flop: float = 0.0) -> None:
        self.rows.append({"title": title, "flop": flop, "ms": times})
        cells, ours = [], times.get("ours")
        for name, ms in times.items():
            cell = f"{name} n/a"
            if isinstance(ms, float):
                rate = f" {flop / ms / 1e9:.0f}T" if flop else ""
                ratio = f" x{ms / ours:.2f}" if isinstance(ours, float) and name != "ours" else ""
                cell = f"{name} {ms:.3f}{rate}{ratio}"
            cells.append(cell)
        print(f"{title:36s}" + " | ".join(cells), flush=True)

    def late(self, title: str) -> bool:
        late = time.monotonic() - START > self.seconds
        if late:
            print(f"{title:36s}skipped: the time is up", flush=True)
        return late


# --------------------------------------------------------------------------------------------------
# The machine


def machine() -> dict[str, float | str | None]:
    """Versions, what SDPA picks by itself, and the two rates that bound everything below."""
    found = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version() if GPU else None,
        "device": torch.cuda.get_device_name() if GPU else "no GPU: a rehearsal",
    }
    size, side = (2**30, 8192) if GPU else (2**22, 256)
    source = torch.zeros(size, device=DEVICE, dtype=torch.int32)
    target = torch.empty_like(source)
    found["copy TB/s"] = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9
    a, b = torch.randn(2, side, side, device=DEVICE).to(DTYPE)
    found["matmul TFLOP/s"] = 2 * side**3 / milliseconds(lambda: a @ b) / 1e9
    if GPU:
        q = torch.randn(1, 4, 1024, 64, device=DEVICE, dtype=DTYPE)
        mask = torch.ones(1, 1, 1024, 1024, device=DEVICE, dtype=torch.bool).tril()
        for name, how in (("causal", {"is_causal": True}), ("mask", {"attn_mask": mask})):
            found[f"SDPA picks, {name}"] = SDPBackend(torch._fused_sdp_choice(q, q, q, **how)).name
    print(" | ".join(f"{key} {x:.2f}" if isinstance(x, float) else f"{key} {x}"
                     for key, x in found.items()), flush=True)  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------------
# Correctness


def ragged(lengths: list[int], H: int, D: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, ...]:
    """-> qkv (T, 3, H, D), a gradient for the output (T, H, D), cu_seqlens (B + 1,)."""
    qkv = torch.randn(sum(lengths), 3, H, D, device=DEVICE).to(dtype)
    do = torch.randn(sum(lengths), H, D, device=DEVICE).to(dtype)
    return qkv, do, torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def exact(qkv: Tensor, lengths: list[int]) -> Tensor:
    """The definition in float64, one sequence at a time."""
    out = []
    for x in qkv.double().split(lengths):
        q, k, v = x.permute(1, 2, 0, 3)
        future = torch.ones(len(x), len(x), device=x.device).triu(1).bool()
        scores = (q @ k.mT * x.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def errors(function: Callable, qkv: Tensor, do: Tensor, expected: list[Tensor]) -> list[float]:
    """Relative errors of o, dq, dk, dv."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    out.backward(do)
    found = [out.detach(), *qkv.grad.unbind(1)]
    return [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)
    ]


def check_attention(D: int, dtype: torch.dtype, limit: float) -> None:
    lengths = [1, *torch.randint(2, 700 if GPU else 50, (5,)).tolist(), 0, 128, 1]
    qkv, do, cu_seqlens = ragged(lengths, 4 if GPU else 1, D, dtype)
    x = qkv.double().requires_grad_()
    out = exact(x, lengths)
    out.backward(do.double())
    expected = [out.detach(), *x.grad.unbind(1)]
    ours = errors(
        lambda y: model.fused_attention(y, cu_seqlens, max(lengths))[0], qkv, do, expected
    )
    groups = model.length_groups(cu_seqlens.tolist(), DEVICE)
    theirs = errors(lambda y: model.padded_attention(y, groups), qkv, do, expected)
    line = f"check D {D:3d} {str(dtype)[6:]:8s} relative errors of o, dq, dk, dv: "
    line += "ours " + " ".join(f"{e:.1e}" for e in ours)
    print(line + "  SDPA " + " ".join(f"{e:.1e}" for e in theirs), flush=True)
    if not max(ours) < limit:  # NaN is not less
        raise SystemExit(f"WRONG: an error above {limit}")


def check_decode(D: int, dtype: torch.dtype, limit: float) -> None:
    H, S = 4, 2048 if GPU else 300
    lengths = torch.tensor([0, 1, S // 2, S - 2, S - 1], device=DEVICE)
    for copies in (1, 60 if GPU else 1):  # so few rows that programs share them, and so many
        n = lengths.repeat(copies)
        cache = torch.randn(2, len(n), H, S, D, device=DEVICE).to(dtype)
        new = torch.randn(len(n), 3, H, D, device=DEVICE).to(dtype)
        expected_cache = cache.double()
        expected = model.padded_decode(new.double(), expected_cache, n)
        out = model.fused_decode(new, cache, n)
        for row, filled in enumerate(n.tolist()):
            written = cache[:, row, :, : filled + 1].double()
            if not torch.equal(written, expected_cache[:, row, :, : filled + 1]):
                raise SystemExit("WRONG: decoding wrote to the wrong slots")
        error = ((out.double() - expected).norm() / expected.norm()).item()
        if not error < limit:
            raise SystemExit(f"WRONG: decode D {D} {dtype} has an error of {error:.1e}")


def check() -> None:
    limits = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
    for D in (32, 64, 80, 128) if GPU else (16,):
        for dtype, limit in limits.items():
            if GPU or dtype != torch.bfloat16:  # which Triton's interpreter gets wrong
                check_attention(D, dtype, limit)
                check_decode(D, dtype, limit)
    print("correct\n")


# --------------------------------------------------------------------------------------------------
# Tiles

CANDIDATES = {  # BLOCK, STEP, warps, stages
    "forward": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 2),
                (64, 64, 4, 3), (128, 32, 4, 3)],
    "dq": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 2)],
    "dkv": [(64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2),
            (64, 128, 8, 1)],
}  # fmt: skip


def best_tiles(D: int, report: Report) -> dict[str, tuple]:
    """Changes model.TILES one kernel at a time; returns the fastest, for the caller to install."""
    lengths = [1024] * 32 if GPU else [40]
    qkv, do, cu_seqlens = ragged(lengths, 1024 // D if GPU else 1, D)
    installed = {name: tiles[D > 64] for name, tiles in model.TILES.items()}
    o, lse = model.fused_attention(qkv, cu_seqlens, max(lengths))
    for name, candidates in CANDIDATES.items():
        times: Table = {}
        for tile in candidates if GPU else candidates[:1]:
            model.TILES[name][D > 64] = tile
            run = model.fused_attention if name == "forward" else model.fused_backward
            inputs = (qkv,) if name == "forward" else (qkv, o, lse, do)
            times[str(tile)] = milliseconds(
                functools.partial(run, *inputs, cu_seqlens, max(lengths))
            )
        timed = {t: ms for t, ms in times.items() if isinstance(ms, float)}
        fastest = min(timed, key=timed.__getitem__)
        model.TILES[name][D > 64] = next(tile for tile in candidates if str(tile) == fastest)
        report.row(f"tiles D {D} {name}: {fastest}", times)
    found = {name: tiles[D > 64] for name, tiles in model.TILES.items()}
    install(D, installed)
    return found


def install(D: int, tiles: dict[str, tuple]) -> None:
    for name, tile in tiles.items():
        model.TILES[name][D > 64] = tile


# --------------------------------------------------------------------------------------------------
# The rivals


def sdpa(backend: SDPBackend, *qkv: Tensor, **how) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, **how)


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """PyTorch's own packed attention; how it is told to be causal depends on the version."""
    from torch.nn.attention.varlen import varlen_attn

    old = "is_causal" in inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if old else {"window_size": (-1, 0)}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal)


def flex(qkv: Tensor, lengths: list[int], do: Tensor) -> tuple[float | str, float | str]:
    """FlexAttention over the packed tokens with a document mask; its mask is made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(DEVICE)

    def visible(b, h, i, j):
        return (document[i] == document[j]) & (i >= j)

    T = len(qkv)
    mask = torch.compile(create_block_mask)(visible, None, None, T, T, device=DEVICE)
    attend = torch.compile(flex_attention, dynamic=False)
    q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # (1, H, T, D) each
    return forward_and_backward(
        lambda: attend(q, k, v, block_mask=mask), [qkv], do.transpose(0, 1)[None]
    )


def contestants(
    lengths: list[int], H: int, D: int, dense: bool
) -> Iterator[tuple[str, Callable[[], Tensor], list[Tensor], Tensor]]:
    """Name, function, the inputs it differentiates, the gradient of its output."""
    qkv, do, cu_seqlens = ragged(lengths, H, D)
    longest = max(lengths)
    qkv.requires_grad_()
    yield "ours", lambda: model.fused_attention(qkv, cu_seqlens, longest)[0], [qkv], do
    q, k, v = (x.contiguous().requires_grad_() for x in qkv.detach().unbind(1))
    yield "varlen", lambda: varlen(q, k, v, cu_seqlens, longest), [q, k, v], do
    shape = len(lengths), H, longest, D
    Q, K, V, DO = (torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(4))
    rest = [x.requires_grad_() for x in (Q, K, V)], DO
    for name, backend in (("flash", FLASH), ("cudnn", CUDNN), ("efficient", EFFICIENT)):
        yield name, functools.partial(sdpa, backend, Q, K, V, is_causal=True), *rest
    if dense:
        return
    groups = model.length_groups(cu_seqlens.tolist(), DEVICE)
    yield "our padded path", lambda: model.padded_attention(qkv, groups), [qkv], do
    length = torch.tensor(lengths, device=DEVICE)[:, None, None, None]
    mask = torch.ones(longest, longest, device=DEVICE, dtype=torch.bool).tril()
    mask = mask & (torch.arange(longest, device=DEVICE) < length)  # (B, 1, L, L)
    for name, backend in (("mask efficient", EFFICIENT), ("mask cudnn", CUDNN)):
        yield name, functools.partial(sdpa, backend, Q, K, V, attn_mask=mask), *rest


def compare(report: Report, title: str, lengths: list[int], D: int, dense: bool) -> None:
    if report.late(title):
        return
    H = (2048 if dense else 768) // D if GPU else 1
    flop = 2 * sum(n * n for n in lengths) * H * D  # half of 4 n^2 D: causal
    forward: Table = {}
    both: Table = {}
    for name, function, inputs, do in contestants(lengths, H, D, dense):
        forward[name], both[name] = forward_and_backward(function, inputs, do)
    if GPU and (not dense or max(lengths) == 4096) and not report.late("FlexAttention"):
        qkv, do, _ = ragged(lengths, H, D)
        try:
            forward["flex"], both["flex"] = flex(qkv.requires_grad_(), lengths, do)
        except CANNOT as reason:
            forward["flex"] = both["flex"] = f"{type(reason).__name__}: {reason}"[:80]
    report.row(title + " forward", forward, flop)
    report.row(title + " with backward", both, 3.5 * flop)


def batches() -> Iterator[tuple[str, list[int], int, bool]]:
    """Title, lengths, head dim, dense."""
    if not GPU:
        yield "rehearsal", [20, 3, 33], 16, False
        return
    uniform = torch.randint(64, 1025, (64,)).tolist()
    lognormal = torch.empty(128).log_normal_(5.52, 0.6).long().clamp(16, 1024).tolist()  # mean 300
    answers = (torch.randint(100, 513, (64,)) + torch.randint(8, 54, (64,))).tolist()
    yield "uniform 64-1024, D 64", uniform, 64, False
    yield "log-normal, mean 300, D 64", lognormal, 64, False
    yield "prompt 100-512 + response <54, D 64", answers, 64, False
    yield "uniform 64-1024, D 128", uniform, 128, False
    for D in (64, 128):
        for L in (512, 1024, 2048, 4096, 8192, 16384):
            yield f"{16384 // L} x {L}, D {D}", [L] * (16384 // L), D, True


# --------------------------------------------------------------------------------------------------
# Decoding


def compare_decode(report: Report, B: int, S: int, copy_rate: float) -> None:
    """One layer, H 12, D 64; caches in turn, so that the GPU's own cache cannot hold them."""
    title = f"decode B {B}, S {S}"
    if report.late(title):
        return
    H, D = 12, 64
    lengths = torch.randint(1, S - 1, (B,), device=DEVICE)
    cache_bytes = 4 * B * H * S * D
    count = max(1, min(8, int(2e8 // cache_bytes))) if GPU else 1
    caches = [torch.randn(2, B, H, S, D, device=DEVICE).to(DTYPE) for _ in range(count)]
    new = torch.randn(B, 3, H, D, device=DEVICE).to(DTYPE)
    seen = (torch.arange(S, device=DEVICE) <= lengths[:, None])[:, None, None]  # (B, 1, 1, S)
    q = new[:, 0, :, None]  # (B, H, 1, D)

    def each(function: Callable[[Tensor], Tensor]) -> float | str:
        ms = graph_milliseconds(lambda: [function(cache) for cache in caches])
        return ms / count if isinstance(ms, float) else ms

    times: Table = {"ours": each(lambda cache: model.fused_decode(new, cache, lengths))}
    for name, backend in (("efficient", EFFICIENT), ("cudnn", CUDNN), ("math", MATH)):
        call = functools.partial(sdpa, backend, q, attn_mask=seen)
        times[f"mask {name}"] = each(lambda cache, call=call: call(*cache))
    times["flash, all slots"] = each(lambda cache: sdpa(FLASH, q, *cache))
    floor = 2 * 2 * (int(lengths.sum()) + B) * H * D / copy_rate / 1e9
    times["floor"] = floor
    report.row(title, times)
    if isinstance(times["ours"], float):
        print(f"{'':36s}ours reads at {floor / times['ours']:.0%} of the copy rate", flush=True)


# --------------------------------------------------------------------------------------------------
# Log-probabilities without (N, V) logits


def compare_logprobs(report: Report) -> None:
    """Time and peak memory, forward and backward, at N = 16k and V = 50,257."""
    N, V, C = (16384, 50257, 768) if GPU else (64, 1000, 32)
    hidden = torch.randn(N + 1, C, device=DEVICE).to(DTYPE).requires_grad_()
    weight = (torch.randn(V, C, device=DEVICE) * C**-0.5).to(DTYPE).requires_grad_()
    tokens = torch.randint(V, (N,), device=DEVICE)
    network = mock.Mock(return_value=hidden, head_weight=weight)
    batch = model.pack([[0]], [tokens.tolist()], DEVICE)
    rivals = {
        "ours": lambda: model.token_logprobs(network, batch),
        "naive": lambda: model.head_logprobs(hidden[:-1], weight, tokens, 1.0),
    }
    times: Table = {}
    for name, function in rivals.items():

        def run(function: Callable = function) -> None:
            function()[0].sum().backward()

        times[name] = milliseconds(run, [hidden, weight])
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            print(f"{'':36s}{name}: {peak:.2f} GiB at the peak", flush=True)
            report.rows.append({"title": f"log-probabilities, {name}", "GiB": peak})
    report.row(f"log-probabilities N {N}, V {V}", times)


def main(seconds: float, out: Path | None) -> None:
    torch.manual_seed(0)
    report = Report(seconds)
    rates = machine()
    check()
    tiles = {}
    for D in (64, 128) if GPU else (16,):
        tiles[D] = best_tiles(D, report)
        install(D, tiles[D])
        check_attention(D, DTYPE, 2e-2)  # as the fastest tiles compute it
    print("\nms, useful TFLOP/s, multiple of our time")
    for title, lengths, D, dense in batches():
        install(D, tiles[D])
        compare(report, title, lengths, D, dense)
    print("\nms, multiple of our time; floor: what must be read, at the copy rate")
    sizes = [(B, 1024) for B in (1, 8, 64, 256, 512)] + [(64, 4096)] if GPU else [(2, 64)]
    for B, S in sizes:
        compare_decode(report, B, S, rates["copy TB/s"])
    compare_logprobs(report)
    print(f"\n{time.monotonic() - START:.0f} s")
    if out:
        found = {"machine": rates, "tiles": {str(D): t for D, t in tiles.items()}}
        out.write_text(json.dumps(found | {"rows": report.rows}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=480, help="start no table after this")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    args = parser.parse_args()
    main(args.seconds, args.out)
