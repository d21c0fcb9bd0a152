"""The network and the harness of all three stages.

Rule 1. Sequences lie end to end in one ragged `Batch`; nothing is padded. Whatever is known of a
token is a flat (N,) vector over the response tokens of the batch, indexed by the token it is about:
logprobs[n], values[n] and rewards[n] concern response token n, which the network decided one
position earlier. That shift by one stands in one place, `Batch.where`.

Rule 2. A response ends with the end-of-text token if the model emitted it. It is an action like any
other: it has a log-probability, a KL term and an advantage, and the reward model is read there.

Letters: B sequences, T tokens of all of them, N response tokens of all of them, S cache slots, and
H heads of D channels, C = H D channels, V words in the vocabulary, as in GPT-2.
"""

import argparse
import atexit
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.records import printable, remove_unfinished, write_atomically
from data.tokenizer import from_state, get_tokenizer, to_state
from data.weights import (
    is_hugging_face,
    read_hugging_face,
    refuse_not_finite,
    refuse_unusable,
    unpickle,
    write_hugging_face,
)

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large tensors on large pages

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # the padded path needs torch alone
    triton = None


# --------------------------------------------------------------------------------------------------
# Attention over ragged batches, and over the key-value cache

FUSED = False  # no GPU has run these kernels yet: flip when tests/bench_attention.py passes on one
Groups = tuple[list[tuple[int, int]], Tensor, Tensor]  # what length_groups returns


def use_kernels(x: Tensor) -> bool:
    return FUSED and triton is not None and x.is_cuda


def attention(
    qkv: Tensor, cu_seqlens: Tensor, longest: int, groups: Groups | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal within each of B sequences that lie end to end.

    qkv (T, 3, H, D), cu_seqlens (B + 1,) int32, longest: at least the longest length -> (T, H, D).
    groups = length_groups(cu_seqlens) spares the padded path from computing it in every layer.
    """
    if not len(qkv):
        return qkv[:, 0]
    if use_kernels(qkv):
        return fused_attention(qkv.contiguous(), cu_seqlens, longest)[0]
    return padded_attention(qkv, groups or length_groups(cu_seqlens))


def decode_attention(
    qkv: Tensor, cache: Tensor, lengths: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Appends each row's new key and value to its cached ones, then attends to all the row has.

    qkv (B, 3, H, D) of one new token a row, cache (2, B, H, S, D) of which each row has filled
    lengths (B,) slots -> (B, H, D). What the other slots hold does not matter and may be cleared.
    bias = decode_bias(cache, lengths) spares the padded path from computing it in every layer.
    """
    if use_kernels(qkv):
        return fused_decode(qkv.contiguous(), cache, lengths)
    bias = decode_bias(cache, lengths) if bias is None else bias
    return padded_decode(qkv, cache, lengths, bias)


# --- In plain PyTorch: pad on the right, in groups of similar length

PADS = 64  # a group may hold; more would cost more time than the operators of another group


def length_groups(cu_seqlens: Tensor) -> Groups:
    """Sorts sequences into rectangles (rows, L), longest first, with few pads in each.

    -> the rectangles; the token in each of their slots, (slots,); the slot of each token, (T,).
    A pad repeats the last token of its own sequence: no NaN can cross from one to another.
    """
    ends = cu_seqlens.long().cpu()
    lengths, order = ends.diff().sort(descending=True, stable=True)
    lengths = lengths[lengths > 0]  # (rows,)
    if not len(lengths):
        return [], ends[:0], ends[:0]
    starts = ends[order[: len(lengths)]]  # (rows,)
    width, room, widths = math.inf, 0.0, []
    for n in lengths.tolist():
        room -= width - n
        if room < 0:  # a new group, as wide as its first and longest row
            width, room = n, PADS
        widths.append(width)
    row = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))  # (slots,)
    column = torch.cat([torch.arange(width) for width in widths])  # (slots,)
    token = starts[row] + column.minimum(lengths[row] - 1)  # (slots,)
    real = (column < lengths[row]).nonzero()[:, 0]  # (T,)
    slot = torch.empty_like(real).index_copy_(0, token[real], real)  # (T,)
    shapes = [(rows, width) for width, rows in Counter(widths).items()]
    return shapes, token.to(cu_seqlens.device), slot.to(cu_seqlens.device)


def padded_attention(qkv: Tensor, groups: Groups) -> Tensor:
    """No mask: pads end their row, and a causal query never sees what follows it."""
    shapes, token, slot = groups
    rectangles = qkv.index_select(0, token).split([rows * L for rows, L in shapes])
    out = []
    for x, shape in zip(rectangles, shapes, strict=True):
        q, k, v = x.unflatten(0, shape).permute(2, 0, 3, 1, 4)  # (rows, H, L, D) each
        out.append(causal_attention(q, k, v).transpose(1, 2).flatten(0, 1))  # (rows L, H, D)
    return torch.cat(out).index_select(0, slot)


def decode_bias(cache: Tensor, lengths: Tensor) -> Tensor:
    """0 for the slots that each row has filled and the new one, -inf for the others: (B H, 1, S').

    S' slots are all that any row needs. It is S on a GPU, which would have to wait for the number,
    and in bf16, where the products would copy a part of the cache.
    """
    n, (_, _, H, S, _) = lengths.long(), cache.shape
    slots = S if cache.is_cuda or cache.dtype == torch.bfloat16 else int(n.max()) + 1
    unseen = torch.arange(slots, device=n.device) > n[:, None]  # (B, S')
    bias = torch.zeros(unseen.shape, dtype=cache.dtype, device=n.device)
    return bias.masked_fill_(unseen, float("-inf")).repeat_interleave(H, 0)[:, None]


def padded_decode(qkv: Tensor, cache: Tensor, lengths: Tensor, bias: Tensor) -> Tensor:
    rows, (_, _, H, D) = torch.arange(len(qkv), device=qkv.device), qkv.shape
    cache[:, rows, :, lengths.long()] = qkv[:, 1:]
    cache = cache[:, :, :, : bias.shape[-1]]  # (2, B, H, S', D)
    q, (k, v) = qkv[:, 0].flatten(0, 1)[:, None], cache.flatten(1, 2)  # (B H, 1 or S', D)

    def attend() -> Tensor:
        return torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1) @ v

    if cache.is_cuda or (out := attend()).isnan().any():  # a weight of 0 does not stop NaN
        cache.masked_fill_(bias.view(len(qkv), H, -1, 1) < 0, 0)
        out = attend()
    return out.view(-1, H, D)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (..., L, D) each
    if q.is_cuda or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # in bf16 on a CPU these lines run twice as fast, forward and backward
    unseen = torch.full((q.shape[-2], q.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)
    return (q * q.shape[-1] ** -0.5 @ k.mT + unseen).softmax(-1) @ v


# --- In Triton: no padding, and no (L, L) matrix in memory

if triton:
    LOG2E = constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2E x), and exp2 is the hardware's own
    # BLOCK and STEP (see fused_attention), warps that run a program, pipeline stages of its loads;
    # beyond D = 64 they need 115 KB of shared memory: an A100 or H100 has that, an RTX 4090 not
    TILES = {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkv": (64, 64, 4, 1)}
    FP32_TILE = (32, 16, 4, 1)  # larger ones do not fit into the registers

    @torch.library.custom_op("rlhf::attention", mutates_args=())
    def fused_attention(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """-> o (T, H, D) and lse (H, T), log2 of the denominator of each query's softmax.

        The GPU runs a kernel as thousands of programs, told apart by tl.program_id. One program
        owns BLOCK queries of one head of one sequence and walks over their keys, STEP at a time.
        All it needs stays on the chip: its scores are a (BLOCK, STEP) tile, never (L, L).

        Online softmax: a query keeps its greatest score so far, top, and total = sum 2^(s - top),
        acc = sum 2^(s - top) v. Before a tile that raises top is added, both are multiplied by
        fade = 2^(old top - new top). In the end o = acc / total and lse = top + log2 total.

        Backward, with do = dL/do and the weights recomputed tile by tile as p = 2^(s - lse):
            ds = p (do v^T - delta), the gradient of the scores, where delta = sum_d do o
            dq = ds k / sqrt(D)        dk = ds^T q / sqrt(D)        dv = p^T do
        dq sums over keys, dk and dv over queries: hence two kernels. In the second a program owns
        BLOCK keys and walks over queries. What a program sums is its own: no atomics, so the bits
        are the same every run. It loads nothing past its sequence: not even NaN next door matters.
        """
        o, lse = empty_outputs(qkv)
        launch("forward", forward_kernel, (qkv, o, lse), cu_seqlens, longest)
        return o, lse

    @torch.library.custom_op("rlhf::attention_backward", mutates_args=())
    def fused_backward(
        qkv: Tensor, o: Tensor, lse: Tensor, do: Tensor, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
        launch("dq", dq_kernel, (qkv, o, lse, do, delta, dqkv), cu_seqlens, longest)
        launch("dkv", dkv_kernel, (qkv, lse, do, delta, dqkv), cu_seqlens, longest)
        return dqkv

    @torch.library.custom_op("rlhf::decode_attention", mutates_args={"cache"})
    def fused_decode(qkv: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        """A few rows would leave most of a GPU idle: then programs share a row's slots."""
        (B, _, H, D), S = qkv.shape, cache.shape[3]
        shares = max(1, min(1024 // (B * H), S // 128))
        o = qkv.new_empty(B, shares, H, D, dtype=torch.float32 if shares > 1 else qkv.dtype)
        lse = qkv.new_empty(B, shares, H, 1, dtype=torch.float32)
        decode_kernel[B, H, shares](qkv, *cache, lengths, o, lse, S, H, D, STEP=32, num_warps=4)
        return o[:, 0] if shares == 1 else (lse.softmax(1) * o).sum(1).to(qkv.dtype)

    def launch(name: str, kernel, tensors: tuple[Tensor, ...], cu_seqlens: Tensor, longest: int):
        """Runs a kernel for each block of each head of each sequence; tensors[0] is qkv."""
        (_, _, H, D), B = tensors[0].shape, len(cu_seqlens) - 1
        tile = FP32_TILE if tensors[0].dtype == torch.float32 else TILES[name]
        BLOCK, STEP, warps, stages = tile
        kernel[triton.cdiv(longest, BLOCK), H, B](
            *tensors, cu_seqlens, H, D, BLOCK, STEP, num_warps=warps, num_stages=stages
        )

    def empty_outputs(qkv, *_):
        T, _, H, D = qkv.shape
        return qkv.new_empty(T, H, D), qkv.new_empty(H, T, dtype=torch.float32)

    def save(ctx, inputs, output):
        qkv, cu_seqlens, ctx.longest = inputs
        ctx.save_for_backward(qkv, *output, cu_seqlens)

    def backward(ctx, do, _):
        qkv, o, lse, cu_seqlens = ctx.saved_tensors
        return fused_backward(qkv, o, lse, do.contiguous(), cu_seqlens, ctx.longest), None, None

    fused_attention.register_fake(empty_outputs)
    fused_attention.register_autograd(backward, setup_context=save)
    fused_backward.register_fake(lambda qkv, *_: torch.empty_like(qkv))
    fused_decode.register_fake(lambda qkv, *_: qkv.new_empty(qkv[:, 0].shape))

    @triton.jit
    def load(base, i0, n, stride, ROWS, D):  # -> (ROWS, D)
        """Rows i0 to i0 + ROWS of the (n, D) matrix at base, zeros past its end."""
        i, d = i0 + tl.arange(0, ROWS)[:, None], tl.arange(0, triton.next_power_of_2(D))[None, :]
        return tl.load(base + i * stride + d, mask=(i < n) & (d < D), other=0.0)

    @triton.jit
    def store(base, i0, n, stride, tile, D):
        i, d = i0 + tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
        tl.store(base + i * stride + d, tile.to(base.dtype.element_ty), mask=(i < n) & (d < D))

    @triton.jit
    def dot(a, b, acc=None):
        """a b + acc in fp32; if a and b are fp32 too, by three tf32 products, nearly as exact."""
        return tl.dot(a, b, acc, input_precision="tf32x3")

    @triton.jit
    def scores(q, k, i0, j0):  # (M, D), (N, D) -> (M, N)
        """q k^T of queries i0... and keys j0...; -inf where the key comes after the query."""
        s = dot(q, k.T)
        if i0 < j0 + k.shape[0] - 1:  # else no key does
            i, j = i0 + tl.arange(0, q.shape[0]), j0 + tl.arange(0, k.shape[0])
            s = tl.where(i[:, None] >= j[None, :], s, float("-inf"))
        return s

    @triton.jit
    def weights(q, k, lse, i0, j0, D):  # -> (M, N)
        """softmax(q k^T / sqrt(D)), given log2 of its denominators, lse (M,)."""
        return tl.exp2(scores(q, k, i0, j0) * (LOG2E * D**-0.5) - lse[:, None])

    @triton.jit
    def locate(cu_seqlens, H, D):
        """The length of this program's sequence, and where its head begins in qkv, o and lse."""
        h, b = tl.program_id(1), tl.program_id(2)
        first = tl.load(cu_seqlens + b).to(tl.int64)
        n = (tl.load(cu_seqlens + b + 1) - first).to(tl.int32)
        T = tl.load(cu_seqlens + tl.num_programs(2))
        return n, (first * 3 * H + h) * D, (first * H + h) * D, h * T + first

    @triton.jit
    def forward_kernel(
        qkv, o, lse, cu_seqlens, H: constexpr, D: constexpr, BLOCK: constexpr, STEP: constexpr
    ):
        n, at, at_o, at_lse = locate(cu_seqlens, H, D)
        i0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK  # the longest walks start first
        if i0 >= n:
            return
        i = i0 + tl.arange(0, BLOCK)
        q = load(qkv + at, i0, n, 3 * H * D, BLOCK, D)  # (BLOCK, D)
        top = tl.full([BLOCK], float("-inf"), tl.float32)  # (BLOCK,)
        total = tl.zeros([BLOCK], tl.float32)  # (BLOCK,)
        acc = tl.zeros(q.shape, tl.float32)  # (BLOCK, D)
        for j0 in range(0, tl.minimum(i0 + BLOCK, n), STEP):
            k = load(qkv + at + H * D, j0, n, 3 * H * D, STEP, D)  # (STEP, D)
            v = load(qkv + at + 2 * H * D, j0, n, 3 * H * D, STEP, D)  # (STEP, D)
            s = scores(q, k, i0, j0)  # (BLOCK, STEP)
            new_top = tl.maximum(top, tl.max(s, 1) * (LOG2E * D**-0.5))
            p, fade = tl.exp2(s * (LOG2E * D**-0.5) - new_top[:, None]), tl.exp2(top - new_top)
            acc = dot(p.to(v.dtype), v, acc * fade[:, None])
            top, total = new_top, total * fade + tl.sum(p, 1)
        store(o + at_o, i0, n, H * D, acc / total[:, None], D)
        tl.store(lse + at_lse + i, top + tl.log2(total), mask=i < n)

    @triton.jit
    def dq_kernel(
        qkv, o, lse, do, delta, dqkv, cu_seqlens,
        H: constexpr, D: constexpr, BLOCK: constexpr, STEP: constexpr,
    ):  # fmt: skip
        n, at, at_o, at_lse = locate(cu_seqlens, H, D)
        i0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK
        if i0 >= n:
            return
        i = i0 + tl.arange(0, BLOCK)
        q = load(qkv + at, i0, n, 3 * H * D, BLOCK, D)  # (BLOCK, D)
        o_i = load(o + at_o, i0, n, H * D, BLOCK, D)  # (BLOCK, D)
        do_i = load(do + at_o, i0, n, H * D, BLOCK, D)  # (BLOCK, D)
        lse_i = tl.load(lse + at_lse + i, mask=i < n, other=0.0)  # (BLOCK,)
        delta_i = tl.sum(do_i.to(tl.float32) * o_i.to(tl.float32), 1)  # (BLOCK,)
        tl.store(delta + at_lse + i, delta_i, mask=i < n)  # for dkv_kernel
        dq = tl.zeros(q.shape, tl.float32)  # (BLOCK, D)
        for j0 in range(0, tl.minimum(i0 + BLOCK, n), STEP):
            k = load(qkv + at + H * D, j0, n, 3 * H * D, STEP, D)  # (STEP, D)
            v = load(qkv + at + 2 * H * D, j0, n, 3 * H * D, STEP, D)  # (STEP, D)
            p = weights(q, k, lse_i, i0, j0, D)  # (BLOCK, STEP)
            ds = p * (dot(do_i, v.T) - delta_i[:, None])  # (BLOCK, STEP)
            dq = dot(ds.to(k.dtype), k, dq)
        store(dqkv + at, i0, n, 3 * H * D, dq * D**-0.5, D)

    @triton.jit
    def dkv_kernel(
        qkv, lse, do, delta, dqkv, cu_seqlens,
        H: constexpr, D: constexpr, BLOCK: constexpr, STEP: constexpr,
    ):  # fmt: skip
        n, at, at_o, at_lse = locate(cu_seqlens, H, D)
        j0 = tl.program_id(0) * BLOCK
        if j0 >= n:
            return
        k = load(qkv + at + H * D, j0, n, 3 * H * D, BLOCK, D)  # (BLOCK, D)
        v = load(qkv + at + 2 * H * D, j0, n, 3 * H * D, BLOCK, D)  # (BLOCK, D)
        dk, dv = tl.zeros(k.shape, tl.float32), tl.zeros(v.shape, tl.float32)  # (BLOCK, D) each
        for i0 in range(j0, n, STEP):
            i = i0 + tl.arange(0, STEP)
            q = load(qkv + at, i0, n, 3 * H * D, STEP, D)  # (STEP, D)
            do_i = load(do + at_o, i0, n, H * D, STEP, D)  # (STEP, D)
            lse_i = tl.load(lse + at_lse + i, mask=i < n, other=0.0)  # (STEP,)
            delta_i = tl.load(delta + at_lse + i, mask=i < n, other=0.0)  # (STEP,)
            p = weights(q, k, lse_i, i0, j0, D)  # (STEP, BLOCK)
            dv = dot(p.to(q.dtype).T, do_i, dv)
            ds = p * (dot(do_i, v.T) - delta_i[:, None])  # (STEP, BLOCK)
            dk = dot(ds.to(q.dtype).T, q, dk)
        store(dqkv + at + H * D, j0, n, 3 * H * D, dk * D**-0.5, D)
        store(dqkv + at + 2 * H * D, j0, n, 3 * H * D, dv, D)

    @triton.jit
    def decode_kernel(
        qkv, keys, values, lengths, o, lse, S, H: constexpr, D: constexpr, STEP: constexpr
    ):
        """Each of STEP lanes is an online softmax of its own over every STEPth slot, so that
        threads need not wait for each other. The new token opens the first lane of share 0."""
        b, h, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        n, lane = tl.load(lengths + b).to(tl.int32), tl.arange(0, STEP)
        new, row = qkv + (b * 3 * H + h) * D, (b * H + h).to(tl.int64) * S * D
        q = load(new, 0, 1, 0, 1, D).to(tl.float32) * (LOG2E * D**-0.5)  # (1, D)
        k, v = load(new + H * D, 0, 1, 0, 1, D), load(new + 2 * H * D, 0, 1, 0, 1, D)  # (1, D)
        if share == 0:
            store(keys + row, n, S, D, k, D)
            store(values + row, n, S, D, v, D)
        opens = (lane == 0) & (share == 0)  # (STEP,)
        top = tl.where(opens, tl.sum(q * k.to(tl.float32)), -1e30)  # -inf - -inf would be NaN
        total = tl.where(opens, 1.0, 0.0)  # (STEP,)
        acc = tl.where(opens[:, None], v.to(tl.float32), 0.0)  # (STEP, D)
        slots = tl.cdiv(tl.cdiv(n, tl.num_programs(2)), STEP) * STEP  # in a share
        for j0 in range(share * slots, tl.minimum((share + 1) * slots, n), STEP):
            k_j = load(keys + row, j0, n, D, STEP, D).to(tl.float32)  # (STEP, D)
            v_j = load(values + row, j0, n, D, STEP, D).to(tl.float32)  # (STEP, D)
            s = tl.where(j0 + lane < n, tl.sum(q * k_j, 1), float("-inf"))  # (STEP,)
            new_top = tl.maximum(top, s)
            p, fade = tl.exp2(s - new_top), tl.exp2(top - new_top)
            acc = acc * fade[:, None] + p[:, None] * v_j
            top, total = new_top, total * fade + p
        weight = tl.exp2(top - tl.max(top, 0))  # (STEP,) of each lane in the sum of them all
        total = tl.maximum(tl.sum(weight * total, 0), 1e-37)  # a share may be empty
        out = tl.sum(weight[:, None] * acc, 0, keep_dims=True) / total  # (1, D)
        part = (b * tl.num_programs(2) + share) * H + h
        store(o + part * D, 0, 1, 0, out, D)
        tl.store(lse + part, (tl.max(top, 0) + tl.log2(total)) / LOG2E)


# --------------------------------------------------------------------------------------------------
# The ragged batch


@dataclass
class Batch:
    """B sequences, prompt + response each, end to end: T tokens, N of them response tokens."""

    tokens: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int32: sequence b is tokens[cu_seqlens[b]:cu_seqlens[b + 1]]
    is_response: Tensor  # (T,) bool: true on response tokens, end-of-text included
    longest: int  # length of the longest sequence

    def __post_init__(self) -> None:
        T, starts = len(self.tokens), self.cu_seqlens.long()
        before = F.pad(self.is_response.cumsum(0), (1, 0))  # (T + 1,) response tokens before i
        self.where = self.is_response.nonzero()[:, 0] - 1  # (N,) the position that decided token n
        self.lengths = before[starts].diff()  # (B,) response lengths, sum N
        first = starts[:-1].repeat_interleave(starts.diff(), output_size=T)
        self.positions = torch.arange(T, device=first.device) - first  # (T,) within its sequence
        self.groups = length_groups(self.cu_seqlens)


def refuse_empty(prompts: list[list[int]]) -> None:
    if not all(prompts):
        raise ValueError("an empty prompt decides nothing; give every prompt at least one token")


def pack(
    prompts: list[list[int]], responses: list[list[int]], device: torch.device | str = "cpu"
) -> Batch:
    """Lays B prompts and their responses end to end. ValueError for an empty prompt."""
    refuse_empty(prompts)
    pairs = list(zip(prompts, responses, strict=True))
    tokens = torch.tensor([t for p, r in pairs for t in p + r], dtype=torch.long)
    # (2B,) lengths of a prompt and its response, alternating
    sizes = torch.tensor([n for p, r in pairs for n in (len(p), len(r))], dtype=torch.long)
    is_response = torch.tensor([False, True]).repeat(len(pairs)).repeat_interleave(sizes)
    lengths = sizes.view(-1, 2).sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    tensors = (t.to(device) for t in (tokens, cu_seqlens, is_response))
    return Batch(*tensors, longest=max(lengths.tolist(), default=0))


# --------------------------------------------------------------------------------------------------
# Products and GELU on a CPU: what torch has in store is faster than what it takes by itself


def is_zen5(cpuinfo: str) -> bool:
    """Whether Linux tells of an AMD processor from Zen 5 on: of family 26 or later."""
    found = re.search(r"AuthenticAMD\s+cpu family\s+: (\d+)", cpuinfo)
    return found is not None and int(found[1]) >= 26


CPUINFO = Path("/proc/cpuinfo")
# whether oneDNN multiplies by packed weights, and by all others
PACKS = torch.backends.mkldnn.is_available() and "512" in torch.backends.cpu.get_cpu_capability()
ONEDNN = PACKS and CPUINFO.exists() and is_zen5(CPUINFO.read_text())
PRODUCT = 2**20  # multiplications that are worth what oneDNN sets up


class Linear(nn.Linear):
    packed: Tensor | None = None  # the weight in oneDNN's own order, once it no longer changes

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.packed)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None
) -> Tensor:
    """x W^T + b: (T, C), (V, C), (V,) -> (T, V).

    In fp32 F.linear calls Intel's MKL, which uses AVX-512 on Intel's processors alone; oneDNN, a
    part of torch too, uses it on all. That is twice as fast on AMD's Zen 5. Zen 4 needs two cycles
    for what Zen 5 does in one, and there only a packed weight pays.
    """
    if x.is_cuda or x.numel() * len(weight) < PRODUCT:
        return F.linear(x, weight, bias)
    if packed is not None:
        return onednn(x.to(weight.dtype), packed, bias)
    if not ONEDNN or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return (OneDNNLinear.apply if torch.is_grad_enabled() else onednn)(x, weight, bias)


def pack_weights(model: "GPT") -> None:
    """For a network that only decodes: a few rows are then a third faster."""
    model.packed = pack_weight(model.wte.weight)
    for part in model.modules():
        if isinstance(part, Linear):
            part.packed = pack_weight(part.weight)


def pack_weight(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)  # as if for 16 rows


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dx = dy W, dW = dy^T x, db = sum of dy."""
        (x, weight), (needs_dx, _, needs_db) = ctx.saved_tensors, ctx.needs_input_grad
        dx, db = onednn(dy, weight.T) if needs_dx else None, dy.sum(0) if needs_db else None
        return dx, weight_gradient(dy, x), db


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x: (T, V), (T, C) -> (V, C)."""
    if not ONEDNN or x.is_cuda or x.dtype != torch.float32 or not len(x):
        return dy.T @ x
    # oneDNN copies its first argument, transposed: the narrower one
    narrow = dy.shape[-1] <= x.shape[-1]
    return onednn(dy.T, x.T) if narrow else onednn(x.T, dy.T).T


def gelu(x: Tensor) -> Tensor:
    """GPT-2's: 0.5 x (1 + tanh(a (x + b x^3))) = x sigmoid(2 a (x + b x^3))."""
    return F.gelu(x, approximate="tanh") if x.is_cuda else SigmoidGELU.apply(x)


class SigmoidGELU(torch.autograd.Function):
    """A CPU needs half the time for a sigmoid that it needs for a tanh."""

    A = 2 * (2 / math.pi) ** 0.5  # 2 a
    AB = A * 0.044715  # 2 a b

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = x.float() if x.dtype == torch.bfloat16 else x
        a = y.new_tensor(SigmoidGELU.A)
        return torch.addcmul(a, y, y, value=SigmoidGELU.AB).mul_(y).sigmoid_().mul_(y).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(dy, *ctx.saved_tensors, approximate="tanh")


# --------------------------------------------------------------------------------------------------
# GPT-2


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest sequence
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0  # of embeddings and residual branches, as GPT-2's resid_pdrop

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd)
        if min(sizes) < 1 or max(sizes) > 2**24 or self.n_layer > 1000 or self.n_embd % self.n_head:
            raise ValueError(f"{self}: sizes are at least 1, not huge, and n_head divides n_embd")


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (T, 3, H, D)
        return self.c_proj(attend(qkv).flatten(-2))  # (T, H, D) -> (T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(gelu(self.c_fc(x)))  # tanh as GPT-2


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:  # (T, C) -> (T, C)
        x = x + self.drop(self.attn(self.ln_1(x), attend))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2 with GPT-2's parameter names, so that weights load by name; the head is tied to wte."""

    packed: Tensor | None = None  # wte, as the head's weight: see Linear
    recompute = False  # in the backward pass, a block's activations: memory for a third more time

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.is_meta:
                continue  # weights will be loaded
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # 1/sqrt(C) where GPT-2 has 0.02, which suits C = 2,500: with 0.02 a narrow model
                # takes three times the steps to learn to copy a word from its prompt
                nn.init.normal_(p, std=0.02 if name == "wpe.weight" else config.n_embd**-0.5)
                if "c_proj" in name:  # as GPT-2: residual branches start smaller
                    p.data /= (2 * config.n_layer) ** 0.5

    def forward(self, batch: Batch) -> Tensor:  # -> hidden (T, C)
        if batch.longest > self.config.block_size:
            raise ValueError(
                f"{batch.longest} tokens do not fit into block_size={self.config.block_size}; "
                "shorten the prompts or train with a larger --block_size"
            )
        return self.body(
            batch.tokens,
            batch.positions,
            lambda _, qkv: attention(qkv, batch.cu_seqlens, batch.longest, batch.groups),
        )

    def body(self, tokens: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        """(T,), (T,) -> hidden (T, C); attend(layer, qkv (T, 3, H, D)) -> (T, H, D)."""
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for layer, block in enumerate(self.h):
            arguments = block, x, functools.partial(attend, layer)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(*arguments, use_reentrant=False)
            else:
                x = block(*arguments[1:])
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., C) -> (..., V)
        return linear(hidden, self.wte.weight, packed=self.packed)

    @classmethod
    def load(cls, source: str | Path, dropout: float = 0.0, average: bool = False) -> "GPT":
        """The language model of a stage's folder (or the moving average of its weights), of a
        Hugging Face folder, or the published one called gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        """
        if is_hugging_face(source):
            sizes, weights = read_hugging_face(source)
        else:
            saved = load_checkpoint(source)
            sizes = saved["gpt"]
            weights = saved["training"]["average"] if average else saved["model"]
        config = GPTConfig(**sizes)
        config.dropout = dropout
        with torch.device("meta"):  # no memory, and no time for an initialisation
            model = cls(config)
        refuse_unusable(weights, model.state_dict(), source)
        model.load_state_dict(weights, assign=True)
        return model

    def save(self, folder: str | Path, tokenizer: tiktoken.Encoding) -> None:
        """Writes a Hugging Face folder: config.json, model.safetensors, the tokenizer's files."""
        write_hugging_face(folder, dataclasses.asdict(self.config), self.state_dict(), tokenizer)


class ScalarModel(nn.Module):
    """A GPT's body with one linear head: the reward model and the value model.

    The body is a copy; or, if shared, the GPT's own, and the head starts at 0 (Ziegler 2019).
    """

    def __init__(self, gpt: GPT, shared: bool = False):
        super().__init__()
        self.gpt = gpt if shared else copy.deepcopy(gpt)
        self.head = nn.Linear(gpt.config.n_embd, 1)
        # std 1/sqrt(C + 1): Stiennon et al. 2020, appendix B.1, as summarize-from-feedback codes it
        std = 0.0 if shared else (gpt.config.n_embd + 1) ** -0.5
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def load(cls, folder: str) -> "ScalarModel":
        """The reward model of a stage's folder."""
        saved = load_checkpoint(folder)
        with torch.device("meta"):
            model = cls(GPT(GPTConfig(**saved["gpt"])))
        refuse_unusable(saved["model"], model.state_dict(), folder)
        model.load_state_dict(saved["model"], assign=True)
        return model

    def forward(self, batch: Batch) -> Tensor:  # -> (T,)
        return self.read(self.gpt(batch))

    def values(self, batch: Batch) -> Tensor:  # -> (N,) value of the state before response token n
        return self.read(self.gpt(batch)[batch.where])

    def score(self, batch: Batch) -> Tensor:  # -> (B,) read at the last token of each sequence
        return self.read(self.gpt(batch)[batch.cu_seqlens[1:].long() - 1])

    def read(self, hidden: Tensor) -> Tensor:  # (n, C) -> (n,)
        return torch.squeeze_copy(self.head(hidden), -1).float()  # of views FSDP2 warns


# --------------------------------------------------------------------------------------------------
# Scoring and sampling


def rows_at_once(weight: Tensor) -> int:
    """Rows of logits to hold when scoring: on a CPU what its cache holds, or 256 for a product."""
    return max(256, (2**27 if weight.is_cuda else 2**20) // len(weight))


def token_logprobs(model: GPT, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(token | all before) of every response token, and the entropy of pi there: (N,), (N,).

    Entropy carries no gradient: InstructGPT has no entropy bonus.
    """
    hidden, tokens = model(batch)[batch.where], batch.tokens[batch.where + 1]
    return LogProbs.apply(hidden, model.wte.weight, tokens, temperature)


class LogProbs(torch.autograd.Function):
    """hidden (N, C), weight (V, C), tokens (N,) -> log-probabilities (N,), entropy (N,).

    The head sees a chunk of rows at a time and is computed anew in the backward pass, so that the
    (N, V) logits never exist. With p = softmax(z / temperature), of log p[token] the gradient is
        dz = (1[token] - p) / temperature,    dhidden = dz W,    dW = dz^T hidden
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        low = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if low else weight.dtype
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.temperature, parts = temperature, [(weight.new_empty(0, dtype=torch.float32),) * 2]
        for _, token, z in LogProbs.chunks(ctx, hidden, weight, tokens):
            logprobs = z.log_softmax(-1)
            entropy = -logprobs.exp().mul_(logprobs).sum(-1)
            parts.append((logprobs.gather(-1, token[:, None])[:, 0], entropy))
        logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor | None, ...]:
        (hidden, weight, _), at = ctx.saved_tensors, 0
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        weight = weight.to(ctx.dtype)
        for h, token, z in LogProbs.chunks(ctx, *ctx.saved_tensors):
            rows = slice(at, at := at + len(h))
            g = gradient[rows, None] / ctx.temperature
            dz = (z.softmax(-1) * -g).scatter_add_(1, token[:, None], g).to(ctx.dtype)
            dhidden[rows] = linear(dz, weight.T)
            dweight += weight_gradient(dz, h)
        return dhidden, dweight, None, None

    @staticmethod
    def chunks(ctx, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """(n, C) hidden states and (n,) tokens of a chunk, and its (n, V) z / temperature."""
        n = rows_at_once(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            weight, hidden = weight.to(ctx.dtype), hidden.to(ctx.dtype)
            for h, token in zip(hidden.split(n), tokens.split(n), strict=True):
                z = linear(h, weight).float()
                yield h, token, z if ctx.temperature == 1 else z / ctx.temperature


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0) -> Tensor:
    """One token per row by inverting the cumulative distribution: (B, V), (B,) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    cdf = logits.softmax(-1).cumsum(-1)
    level = uniform[:, None] * cdf[:, -1:]  # < the total: no token of probability 0 is drawn
    tokens = torch.searchsorted(cdf, level, right=True)[:, 0]
    return tokens.clamp_(max=logits.shape[-1] - 1)  # of logits that are no numbers


def prefill(model: GPT, prompts: list[list[int]], cache: Tensor) -> Tensor:
    """Writes keys and values of prompt r to cache row r; returns the last hidden states (B, C)."""
    batch = pack(prompts, [[]] * len(prompts), device=cache.device)
    rows = torch.arange(len(prompts), device=cache.device)
    rows = rows.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(batch.tokens))  # (T,)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        cache[layer][:, rows, :, batch.positions] = qkv[:, 1:].to(cache.dtype)  # (T, 2, H, D)
        return attention(qkv, batch.cu_seqlens, batch.longest, batch.groups)

    return model.body(batch.tokens, batch.positions, attend)[batch.cu_seqlens[1:].long() - 1]


@torch.inference_mode(False)  # inside it a sharded model has no state_dict
def sampling_copy(model: GPT, rows: int) -> GPT:
    """The network that generate decodes with: whole if the model is sharded, and in eval mode.

    Its weights have autocast's precision: it would cast them anew for every token.
    """
    device = model.wte.weight.device.type
    low = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if low else model.wte.weight.dtype
    with torch.device("meta"):
        copied = GPT(model.config)
    weights = {name: w.to(dtype) for name, w in state_of(model).items()}
    copied.load_state_dict(weights, assign=True)  # shares them if nothing has to be changed
    if PACKS and rows >= 8 and device == "cpu" and dtype != torch.float64:
        pack_weights(copied)  # for fewer rows it would not pay
    return copied.eval()


def ask_every(device: torch.device) -> int:
    """Steps until we ask who has ended, for which a GPU has to wait."""
    return 16 if device.type == "cuda" else 1


class Rows:
    """The rows that decode together: row r answers prompt who[r], and so far with step[r] tokens.

    Everything is changed in place and `decode` asks the device for nothing, so that a GPU records
    it once as a CUDA graph, for each power of two of rows, and then replays it, a launch a step.
    Rows that have ended go on, without effect, until drop_ended takes them out.
    """

    def __init__(
        self, model: GPT, R: int, S: int, choose: Callable[..., Tensor], new: int, eos: int
    ):
        config, weight = model.config, model.wte.weight
        H, D = config.n_head, config.n_embd // config.n_head
        self.model, self.choose, self.new, self.eos, self.live = model, choose, new, eos, 0
        self.who, self.step, self.lengths, self.last = weight.new_zeros(4, R, dtype=torch.long)
        self.alive = weight.new_zeros(R, dtype=torch.bool)
        # sampled tokens, and one column for what rows sample that have ended
        self.tokens = weight.new_zeros(R, new + 1, dtype=torch.long)
        self.cache = weight.new_zeros(config.n_layer, 2, R, H, S, D)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def admit(self, first: int, prompts: list[list[int]]) -> None:
        """Puts prompts first, first + 1, ... into free rows, and samples their first tokens."""
        rows, device = slice(self.live, self.live + len(prompts)), self.cache.device
        hidden = prefill(self.model, prompts, self.cache[:, :, rows])
        self.who[rows] = torch.arange(first, first + len(prompts), device=device)
        self.lengths[rows] = torch.tensor([len(p) for p in prompts], device=device)
        self.step[rows], self.alive[rows], self.live = 0, True, rows.stop
        self.sample(rows, hidden)

    def sample(self, rows: slice, hidden: Tensor) -> None:
        """The next token of these rows, from the hidden states that decide it."""
        who, step, alive = self.who[rows], self.step[rows], self.alive[rows]
        tokens = self.choose(self.model.logits(hidden), who, step)
        self.tokens[rows].scatter_(1, step[:, None], tokens[:, None])
        self.last[rows] = tokens
        step += alive
        alive &= (tokens != self.eos) & (step < self.new)

    def advance(self) -> None:
        """One token for every row."""
        if not self.cache.is_cuda:
            return self.decode(self.live)
        n = min(1 << (self.live - 1).bit_length(), len(self.who))
        if n in self.graphs:
            return self.graphs[n].replay()
        self.decode(n)  # this step; it also loads all kernels, which recording must not
        self.graphs[n] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[n]):
            self.decode(n)

    def decode(self, n: int) -> None:
        """Feeds the first n rows their last tokens and samples the next ones."""
        cache, lengths = self.cache[:, :, :n], self.lengths[:n]
        bias = None if use_kernels(cache) else decode_bias(cache[0], lengths)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            return decode_attention(qkv.to(cache.dtype), cache[layer], lengths, bias)

        hidden = self.model.body(self.last[:n], lengths, attend)
        lengths += self.alive[:n]
        self.sample(slice(n), hidden)

    def drop_ended(self) -> dict[int, list[int]]:
        """Takes out the rows that have ended; the last live ones move into the holes they leave.

        -> the responses by the numbers of their prompts.
        """
        alive = self.alive[: self.live]
        ended = (~alive).nonzero()[:, 0]
        if not len(ended):
            return {}
        columns = [x[ended].tolist() for x in (self.who, self.step, self.tokens)]
        live = self.live - len(ended)
        holes, movers = ended[ended < live], alive[live:].nonzero()[:, 0] + live
        for x in (self.who, self.step, self.lengths, self.last, self.alive, self.tokens):
            x[holes] = x[movers]
        for x in self.cache.flatten(0, 1):
            x[holes] = x[movers]
        self.alive[live : self.live] = False
        self.live = live
        return {who: tokens[:step] for who, step, tokens in zip(*columns, strict=True)}


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_token: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    max_rows: int = 256,
    title: str = "",
) -> list[list[int]]:
    """Samples a response to every prompt: tokens up to and with eos_token, or max_new_tokens.

    Prompts of all lengths decode together, each row against its own stretch of the key-value cache.
    The last live row moves into the hole a finished one leaves; waiting prompts follow when there
    are more than max_rows. Token t of prompt b is drawn with uniform[b, t], whatever its row.
    A title is that of a progress bar. ValueError if the longest prompt and max_new_tokens exceed
    block_size.
    """
    refuse_empty(prompts)
    R, block_size = min(max_rows, len(prompts)), model.config.block_size
    model = sampling_copy(model, R)
    device = model.wte.weight.device
    S = max(map(len, prompts), default=1) + max_new_tokens
    if S > block_size:
        raise ValueError(
            f"longest prompt + max_new_tokens = {S} exceeds block_size={block_size}; "
            "shorten the prompts or lower max_new_tokens"
        )
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator).to(device)
    uniform = F.pad(uniform, (0, 1))  # for rows that have ended

    def choose(logits: Tensor, who: Tensor, step: Tensor) -> Tensor:
        return draw(logits, uniform[who, step], temperature, top_k)

    rows, admitted = Rows(model, R, S, choose, max_new_tokens, eos_token), 0
    responses: dict[int, list[int]] = {}
    with progress(title, len(prompts), leave=False) as bar:
        while len(responses) < len(prompts):
            if admitted < len(prompts) and rows.live <= R * 3 // 4:  # in bulk, not one at a time
                new = prompts[admitted : admitted + R - rows.live]
                rows.admit(admitted, new)
                admitted += len(new)
            responses |= rows.drop_ended()
            bar.update(len(responses) - bar.n)
            for _ in range(ask_every(device) if rows.live else 0):
                rows.advance()
    return [responses[b] for b in range(len(prompts))]


# --------------------------------------------------------------------------------------------------
# The harness the stages share: skip on first reading


RANGES = {  # of flags; else floats are at least 0, and so are integers whose default is 0, others 1
    "gamma": (0, 1),
    "lam": (0, 1),
    "ema_decay": (0, 1),
    "dropout": (0, 0.99),
    "held_out": (0, 0.9),
    "temperature": (0.01, 100),
    "responses": (2, 1000),
    "eval_prompts": (2, math.inf),  # an interval needs two
    "iterations": (0, math.inf),
    "warmup": (0, math.inf),
}


@dataclass
class RunConfig:
    """The flags of every stage; a field's trailing comment is its --help."""

    seed: int = 0  # every random number is a function of (seed, stage, step)
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    dtype: str = "float32"  # precision of the network passes: float32 or bfloat16 (autocast)
    max_tokens: int = 16384  # tokens in one network pass: lower it when memory runs out
    recompute: bool = False  # keep no activations within blocks: less memory, a third more time
    shard: bool = False  # spread weights, gradients and optimiser states over torchrun's processes
    save_every: int = 100  # steps between checkpoints
    resume: bool = False  # continue the run in --out from its last checkpoint, bit for bit

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and field.name not in ("seed", "missing_eos_score"):
                least = 1 if field.type is int and field.default > 0 else 0
                low, high = RANGES.get(field.name, (least, math.inf))
                if not (low <= value <= high and value < math.inf):
                    raise ValueError(f"--{field.name} {value}: expected a number, {low} to {high}")


Presets = dict[str, dict[str, Any]]  # name: {field: default}


def parse(config_class: type, presets: Presets, argv: list[str] | None = None) -> Any:
    """The command line of a dataclass: --name for each field, its trailing comment as help."""
    helps: dict[str, str] = {}
    for c in config_class.__mro__[:-1]:
        helps |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(c), re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(config_class):
        flag: dict = {"default": field.default, "type": field.type}
        if field.type is bool:
            flag = {"default": field.default, "action": argparse.BooleanOptionalAction}
        help = f"{helps[field.name]} (default: {field.default!r})".replace("%", "%%")
        if field.type is list:
            parser.add_argument(field.name, help=helps[field.name], nargs="+")
        else:
            parser.add_argument(f"--{field.name}", help=help, **flag)
    if presets:
        help = "other defaults, from the literature; flags of your own come first"
        parser.add_argument("--preset", default="toy", choices=["toy", *presets], help=help)
        parser.set_defaults(**presets.get(parser.parse_args(argv).preset, {}))
    flags = vars(parser.parse_args(argv))
    flags.pop("preset", None)
    return config_class(**flags)


def command(main: Callable[[Any], Any], config_class: type, presets: Presets) -> None:
    """Runs a program from the command line; a wrong value or file is one line and exit status 2."""
    try:
        config = parse(config_class, presets)
        if "RANK" in os.environ:  # torchrun has started us
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(torch.distributed.destroy_process_group)  # else its threads may abort
        with redirect_stdout(sys.stdout if rank_and_world()[0] == 0 else io.StringIO()):
            main(config)
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved is whole, and --resume continues it", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print(f"error: {error}{Run.whereabouts()}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:  # torch's own, on a GPU and on a CPU
        if "memory" not in str(error):
            raise
        line = str(error).splitlines()[0]
        remedy = "lower --max_tokens, then --batch_size"
        print(f"error: {line:.200}; {remedy}{Run.whereabouts()}", file=sys.stderr)
        raise SystemExit(2) from None


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not to be had here: {line:.100}") from None


def precision(main: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """Runs main(config) under the autocast of --dtype: the one place that decides precision."""

    @functools.wraps(main)
    def wrapped(config: RunConfig) -> dict:
        if config.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype {config.dtype} is unknown; choose float32 or bfloat16")
        device, low = resolve_device(config.device).type, config.dtype == "bfloat16"
        # no cache of cast weights: it would outlive an optimiser step
        with torch.autocast(device, torch.bfloat16, enabled=low, cache_enabled=False):
            return main(config)

    return wrapped


def seed_of(*place: int | str) -> int:
    """A 63-bit seed that is a function of the place alone, e.g. (seed, stage, step)."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest()) >> 1


def generator(*place: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*place))


@functools.lru_cache(maxsize=2)  # every step of an epoch asks for the same one
def permutation(n: int, *place: int | str) -> list[int]:
    return torch.randperm(n, generator=generator(*place)).tolist()


def shuffled(items: Sequence, *place: int | str) -> list:
    return [items[i] for i in permutation(len(items), *place)]


def steps_per_epoch(items: Sequence, batch_size: int) -> int:
    return -(-len(items) // batch_size)


def batch_at(step: int, items: Sequence, batch_size: int, *place: int | str) -> list:
    """The items of this step: every epoch goes through all of them in a new order."""
    epoch, i = divmod(step, steps_per_epoch(items, batch_size))
    order = permutation(len(items), *place, epoch)
    return [items[j] for j in order[i * batch_size :][:batch_size]]


def split_by_tokens(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Cuts the sequences 0..B-1 into runs of at most max_tokens tokens, or of one sequence."""
    parts: list[list[int]] = []
    room = 0
    for b, n in enumerate(lengths):
        if not parts or n > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(b)
        room -= n
    return parts


def passes(lengths: list[int], config: RunConfig) -> list[list[int]]:
    """split_by_tokens; of sharded networks, whose passes are joint, as many on every process."""
    parts = split_by_tokens(lengths, config.max_tokens)
    most = max(all_shares(len(parts))) if config.shard else 0
    return parts + [[]] * (most - len(parts))


def batches(prompts: list[list[int]], responses: list[list[int]], config: RunConfig):
    """Yields the sequences in order as ragged batches of at most config.max_tokens tokens."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    for part in passes(lengths, config):
        device = resolve_device(config.device)
        yield pack([prompts[b] for b in part], [responses[b] for b in part], device)


def progress(title: str, total: int, done: int = 0, leave: bool = True) -> tqdm:
    """A bar on the process that writes; in a file, which keeps all that it shows, it is slow."""
    pause, quiet = 0.1 if sys.stderr.isatty() else 10, rank_and_world()[0] > 0 or not title
    return tqdm(None, title, total, leave, mininterval=pause, disable=quiet, initial=done)


def rank_and_world() -> tuple[int, int]:
    """The number of this process among those that torchrun has started, and their number."""
    d = torch.distributed
    return (d.get_rank(), d.get_world_size()) if d.is_initialized() else (0, 1)


def my_place(*place: int | str) -> tuple[int | str, ...]:
    """A place for random numbers that differ between processes."""
    rank, _ = rank_and_world()
    return (*place, rank) if rank else place


def my_share(items: Sequence) -> Sequence:
    """This process's part of what all have: consecutive, and the parts in order are the whole."""
    rank, world = rank_and_world()
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def all_shares(mine: Any) -> list:
    """What every process calls with, in order, for all of them."""
    rank, world = rank_and_world()
    shares = [mine] * world
    if world > 1:
        torch.distributed.all_gather_object(shares, mine)
    return shares


def placed(model: nn.Module, config: RunConfig) -> Any:
    """The network on its device; with --shard, an equal part of every tensor on each process's.

    FSDP2: a block's weights are together for its pass only, and its gradients are added up and
    divided by the number of processes as they arise. Sharding is the last thing done to a network.
    """
    device, (_, world) = resolve_device(config.device), rank_and_world()
    model = model.to(device)
    for part in model.modules():
        if isinstance(part, GPT):
            part.recompute = config.recompute
    if config.shard:
        if not torch.distributed.is_initialized():
            raise ValueError("--shard needs several processes: torchrun --nproc_per_node=2 ...")
        mesh = init_device_mesh(device.type, (world,))
        for part in [m for m in model.modules() if isinstance(m, Block)] + [model]:
            # token_logprobs uses a GPT's embeddings once more after the pass
            fully_shard(part, mesh=mesh, reshard_after_forward=not isinstance(part, GPT))
        for method in ("values", "score"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model


def gathered(state: Any, keep: Callable[[Tensor], Any] = Tensor.detach) -> Any:
    """A tensor, or all in nested dicts and lists, with no part on another process; all call it.

    Of what was in parts, keep(whole) is returned, before the next one is put together.
    """
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep) for value in state]
    return keep(state.full_tensor()) if isinstance(state, DTensor) else state


def state_of(thing: Any, keep: Callable[[Tensor], Any] = Tensor.detach) -> Any:
    """Its state_dict, gathered."""
    if isinstance(thing, FSDPModule):
        thing.reshard()  # what its last pass left together
    return gathered(thing.state_dict(), keep)


def whole(model: GPT) -> GPT:
    """The network itself or, of a sharded one, a copy to sample from: every process at its pace."""
    if not isinstance(model, FSDPModule):
        return model
    with torch.device("meta"):
        copied = GPT(model.config)
    copied.load_state_dict(state_of(model), assign=True)
    return copied.eval()


def restore(thing: Any, state: Any) -> None:
    """Loads what state_of returned into the thing, of which every process keeps its part."""

    def part(full: Any, like: Any) -> Any:
        if isinstance(like, DTensor) and like.shape == full.shape:
            full = full.to(like.device)
            return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
        return full

    if isinstance(thing, nn.Module):
        ours = thing.state_dict()
        state = {name: part(full, ours[name]) for name, full in state.items()}
    thing.load_state_dict(state)
    if isinstance(thing, torch.optim.Optimizer):
        for p, found in thing.state.items():
            found.update({name: part(value, p) for name, value in found.items()})


def add_up(loss: float, parameters: list[nn.Parameter]) -> float:
    """Sums gradients and loss over the processes, each of which has seen its share of the batch."""
    if rank_and_world()[1] > 1 and not isinstance(parameters[0], DTensor):
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        parts = flat.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad.copy_(part.view_as(p))
    return sum(all_shares(loss))


def adam(models: list[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    """One optimiser for all (model, peak learning rate): InstructGPT's betas, no weight decay."""
    groups = [{"params": list(m.named_parameters()), "lr": lr, "peak_lr": lr} for m, lr in models]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True)


def budget(
    models: dict[str, Any], optimizer: torch.optim.Optimizer, rows: int = 0, length: int = 0
) -> str:
    """One line: the networks' parameters, and the bytes of all that a run holds but activations.

    rows, length: of the key-value cache.
    """
    networks = {name: m for name, m in models.items() if isinstance(m, nn.Module)}
    gpt = next(m for m in next(iter(networks.values())).modules() if isinstance(m, GPT))
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    distinct = {id(p): p.numel() for m in networks.values() for p in m.parameters()}
    numbers = {
        "weights": sum(distinct.values()),
        "gradients": trained,
        "Adam's moments": 2 * trained,
        "key-value cache": 2 * gpt.config.n_layer * gpt.config.n_embd * rows * length,
    }
    sizes = [f"{k} {sum(p.numel() for p in m.parameters()) / 1e6:.1f}" for k, m in networks.items()]
    parts = [f"{k} {4 * n / 2**20:.1f}" for k, n in numbers.items() if n]
    return f"million parameters: {', '.join(sizes)}; MB in fp32: {', '.join(parts)}"


def lr_schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak: linear warm-up over `warmup` steps, then cosine decay to a tenth."""
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / (warmup + 1)) * (0.55 + 0.45 * math.cos(math.pi * progress))


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    losses: Iterable[tuple[Tensor, int]],
    total: int,
    lr: float = 1.0,
    clip: float = 1.0,
) -> tuple[float, list[float]]:
    """One step on sum_i loss_i n_i / total, where loss_i is a mean over n_i of `total` tokens.

    So the gradient does not depend on how a batch is cut into micro-batches. `lr` is the share of
    the peak learning rate; each model's gradient is clipped to norm `clip`. Returns the loss and
    the norms before clipping. ValueError if either is not finite, before the weights change.
    """
    optimizer.zero_grad(set_to_none=True)
    groups, loss_sum = optimizer.param_groups, 0.0
    parameters = [p for group in groups for p in group["params"]]
    divided_by = rank_and_world()[1] if isinstance(parameters[0], DTensor) else 1  # by FSDP2
    for loss, n in losses:
        (loss * (n / total * divided_by)).backward()
        loss_sum += loss.item() * n / total if n else 0.0
    loss_sum = add_up(loss_sum, parameters)
    norms = [nn.utils.get_total_norm(gradients(g).values()) for g in groups]
    found = [gathered(norm).item() for norm in norms]
    if not all(map(math.isfinite, (loss_sum, *found))):
        for group in groups:
            refuse_not_finite(
                f"the loss is {loss_sum}, the gradient of", gathered(gradients(group))
            )
        raise ValueError(f"the loss is {loss_sum}, gradient norms {found}: not finite")
    for group, norm in zip(groups, norms, strict=True):
        nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
        group["lr"] = group["peak_lr"] * lr
    optimizer.step()
    return loss_sum, found


def gradients(group: dict[str, Any]) -> dict[str, Tensor]:
    """Of an optimiser's group of parameters, by their names."""
    names = group.get("param_names", map(str, itertools.count()))
    named = zip(names, group["params"], strict=False)
    return {name: p.grad for name, p in named if p.grad is not None}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half-width of its 95 % interval (normal approximation)."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), 1.96 * x.std().item() / len(x) ** 0.5


@dataclass
class Codec:
    """Text to tokens and back: a tokenizer, and the template a prompt is put into."""

    tokenizer: tiktoken.Encoding
    template: str

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"the template {self.template!r} has no place for the {{prompt}}")
        self.template = self.template.replace("\\n", "\n")  # as it is typed in a shell
        self.eos = self.tokenizer.eot_token

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode_ordinary(self.template.replace("{prompt}", text))

    def response(self, text: str) -> list[int]:
        return [*self.tokenizer.encode_ordinary(text), self.eos]

    def refuse_other_vocabulary(self, model: "GPT") -> None:
        if self.tokenizer.n_vocab != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.n_vocab} tokens and the model has "
                f"{model.config.vocab_size}; they belong to different models"
            )

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode([t for t in tokens if t != self.eos])

    def state_dict(self) -> dict:
        return {"tokenizer": to_state(self.tokenizer), "template": self.template}

    @classmethod
    def load(cls, source: str | Path, template: str = "{prompt}") -> "Codec":
        """The codec of a stage's folder; of another model, its tokenizer, and this template."""
        if not is_hugging_face(source):
            state = load_checkpoint(source)["codec"]
            return cls(from_state(state["tokenizer"]), state["template"])
        ranks = Path(source) / "tokenizer.tiktoken"
        return cls(get_tokenizer(str(ranks) if ranks.exists() else "gpt2"), template)


Pair = tuple[list[int], list[int]]  # tokens of a prompt and of its response


def documents(texts: list[str], codec: Codec, block_size: int) -> list[Pair]:
    """Documents in pieces of at most block_size tokens; a piece begins with the last one's end."""
    pairs = []
    for text in texts:
        tokens = codec.response(text)
        for i in range(0, len(tokens) - 1, block_size - 1):
            pairs.append((tokens[i : i + 1], tokens[i + 1 : i + block_size]))
    return pairs


def fit(prompt: list[int], response: list[int], block_size: int) -> Pair:
    """The pair with its prompt cut from the left until both fit; the response is never cut."""
    room = block_size - len(response)
    if room < 1:
        raise ValueError(f"{len(response)} tokens of response need a larger --block_size")
    return prompt[-room:], response


def load_checkpoint(folder: str | Path) -> dict:
    """The checkpoint in a stage's folder. FileNotFoundError names the command that makes it."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        maker = {"base": "sft.py", "sft": "sft.py", "reward": "reward.py"}
        raise FileNotFoundError(
            f"{path} does not exist; `python {maker.get(path.parent.name, 'ppo.py')}` makes it"
        )
    saved = unpickle(path)
    if wrong := misfits(saved, CHECKPOINT):
        what = f"its {wrong[0]} is missing or no such value"
        raise ValueError(f"{path} is no checkpoint of a stage: {what}")
    return saved


SIZES = {f.name: f.type for f in dataclasses.fields(GPTConfig)}
CHECKPOINT: dict = {  # the keys of checkpoint.pt and the types of their values; ...: all others'
    "stage": str,
    "config": {},
    "gpt": SIZES | {...: None},  # no others
    "codec": {"tokenizer": {"name": str, ...: str}, "template": str},
    "step": int,
    "metrics": {},
    "sizes": {"metrics.jsonl": int, "samples.txt": int},
    "model": {...: Tensor},
    "training": {},
}


def misfits(found: Any, kinds: dict) -> list[str]:
    """The keys of found, nested ones too, that are missing or have a value of another type."""
    if not isinstance(found, dict):
        return ["type"]
    every = dict.fromkeys(found, kinds[...]) if ... in kinds else {}
    wrong = []
    for key, kind in (every | {k: v for k, v in kinds.items() if k is not ...}).items():
        value = found.get(key)
        if isinstance(kind, dict):
            wrong += [f"{key}.{name}" for name in misfits(value, kind)]
        elif type(value) is not kind:
            wrong.append(str(key))
    return wrong


def size_on_disk(path: Path) -> int:
    """In bytes, none of which a loss of power would take away."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())
        return file.tell()


LOCKS: dict[Path, Any] = {}  # open files: a lock ends with its process


def lock(folder: str | Path) -> None:
    """Makes the folder and keeps other processes out of it; ValueError if another one has it."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl and folder not in LOCKS and rank_and_world()[0] == 0:
        LOCKS[folder] = open(folder / ".lock", "ab")
        try:
            fcntl.lockf(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            LOCKS.pop(folder).close()
            raise ValueError(f"{folder} is in use by another run; choose another --out") from None
        remove_unfinished(folder)  # by a run that was killed


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, a first Ctrl-C or SIGTERM is only noted, so that the step can end; a second acts."""
    caught: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _) -> None:
        caught.append(number)
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Run:
    """A stage's folder: config.json, metrics.jsonl, samples.txt and an exact checkpoint.pt.

    `state` names all that has a state_dict; later stages load "model".
    """

    going_on: "Run | None" = None  # the one whose steps are under way

    def __init__(
        self, stage: str, config: RunConfig, folder: str, gpt: GPTConfig, codec: Codec, **state: Any
    ):
        self.stage, self.config, self.folder = stage, config, Path(folder)
        self.gpt, self.codec, self.state = gpt, codec, state
        self.step, self.metrics = 0, {}
        self.first = rank_and_world()[0] == 0  # the process that writes
        lock(folder)
        self.files = [self.folder / "metrics.jsonl", self.folder / "samples.txt"]
        resumed = config.resume and (self.folder / "checkpoint.pt").exists()
        sizes = self._restore() if resumed else {}
        self.saved = self.step if resumed else None  # steps that the checkpoint holds
        if config.resume and not resumed:
            print(f"{self.folder} has no checkpoint to resume from: {stage} begins at step 0")
        if not self.first:
            return
        for path in self.files:
            with open(path, "ab") as file:
                # what came after the checkpoint is done again
                file.truncate(sizes.get(path.name, 0))
        text = json.dumps(dataclasses.asdict(config), indent=1).encode()
        write_atomically(self.folder / "config.json", lambda file: file.write(text))

    def _restore(self) -> dict[str, int]:
        saved, ours = load_checkpoint(self.folder), dataclasses.asdict(self.config)
        for name, value in saved["config"].items():
            if name not in ("resume", "save_every") and ours.get(name) != value:
                raise ValueError(
                    f"{self.folder} was made with --{name} {value}, not {ours.get(name)}; "
                    "resume it with the same value, or choose another folder"
                )
        for path in self.files:
            if not path.exists() or path.stat().st_size < saved["sizes"][path.name]:
                raise ValueError(
                    f"{path} lacks lines that it had when {self.folder}/checkpoint.pt was written: "
                    "a run that began anew has replaced it; begin anew too, without --resume"
                )
        for name, thing in self.state.items():
            try:
                restore(thing, saved["model"] if name == "model" else saved["training"][name])
            except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                what = f"its {name} is not this one: {' '.join(str(error).split()):.200}"
                raise ValueError(f"{self.folder}/checkpoint.pt: {what}") from None
        self.step, self.metrics = saved["step"], saved["metrics"]
        return saved["sizes"]

    def save(self) -> None:
        keep = (lambda whole: whole.detach().cpu()) if self.first else lambda whole: None
        state = {name: state_of(thing, keep) for name, thing in self.state.items()}
        if self.first:
            self._write(state)
        all_shares(None)  # nobody goes on to read what is not there yet

    def _write(self, state: dict[str, Any]) -> None:
        checkpoint = {
            "stage": self.stage,
            "config": dataclasses.asdict(self.config),
            "gpt": dataclasses.asdict(self.gpt),
            "codec": self.codec.state_dict(),
            "step": self.step,
            "metrics": self.metrics,
            "sizes": {path.name: size_on_disk(path) for path in self.files},
            "model": state.pop("model"),
            "training": state,
        }
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.saved = self.step

    def steps(self, total: int) -> Iterator[int]:
        """The steps that remain, behind a progress bar; what a step logs is written as it ends."""
        Run.going_on = self
        with stop_signals() as caught, progress(self.stage, total, self.step) as bar:
            for step in range(self.step, total):
                self.metrics = {"step": step}
                yield step
                self._append(self.files[0], json.dumps(self.metrics) + "\n")
                shown = [f"{name.split('/')[-1]} {self.metrics[name]:.3g}" for name in self.shown]
                bar.set_postfix_str(", ".join(shown), refresh=False)
                bar.update()
                self.step = step + 1
                stopped = any(all_shares(bool(caught)))  # all of them end, after the same step
                if self.step % self.config.save_every == 0 or self.step == total or stopped:
                    self.save()
                if stopped:
                    done = f"{self.folder}: saved after step {self.step} of {total}"
                    print(f"\n{done}; --resume continues", file=sys.stderr)
                    raise SystemExit(128 + (caught or [signal.SIGTERM])[0])
        Run.going_on = None

    @classmethod
    def whereabouts(cls) -> str:
        """For an error's line: the step that the run has come to, and what its checkpoint holds."""
        if (run := cls.going_on) is None:
            return ""
        held = "no checkpoint yet" if run.saved is None else f"a checkpoint of {run.saved} steps"
        return f" ({run.stage}, step {run.step}; {run.folder} has {held})"

    def log(self, metrics: dict[str, float], shown: Sequence[str] = ()) -> None:
        """Metrics of this step, for metrics.jsonl; the shown ones stand behind the bar."""
        self.metrics |= metrics
        self.shown = [name for name in shown or metrics if name in metrics][:6]

    def sample(self, *lines: str) -> None:
        """A block of text for a person to read, appended to samples.txt."""
        self._append(self.files[1], "\n".join(map(printable, lines)) + "\n\n")

    def _append(self, path: Path, text: str) -> None:
        if self.first:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)


# --------------------------------------------------------------------------------------------------
# python model.py <model> ...: ask a model, or several side by side


@dataclass
class AskConfig:
    models: list  # folders of stages or of Hugging Face, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
    prompt: str = ""  # answer this; default: ask at the terminal until it is empty
    raw: bool = False  # continue the prompt as it is, without the template
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens only; 0: from all
    max_new_tokens: int = 80  # longest response
    seed: int = 0  # all models draw with the same random numbers
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one
    export: str = ""  # write the model to this folder as transformers reads it, and ask nothing


def ask(config: AskConfig) -> None:
    """Prints the answer of every model to every prompt."""
    device, asked = resolve_device(config.device), 0
    models = [(name, GPT.load(name).to(device), Codec.load(name)) for name in config.models]
    for name, model, codec in models:
        codec.refuse_other_vocabulary(model)
        if config.export:
            model.save(config.export, codec.tokenizer)
            print(f"wrote {name} to {config.export}")
    while not config.export and (prompt := config.prompt or input("> ")):
        for name, model, codec in models:
            encode = codec.tokenizer.encode_ordinary if config.raw else codec.prompt
            tokens = encode(prompt)[-(model.config.block_size - config.max_new_tokens) :]
            seed = generator(config.seed, asked)
            limits = (config.max_new_tokens, codec.eos, config.temperature, config.top_k)
            (response,) = generate(model, [tokens], *limits, generator=seed)
            print(f"[{name}] " * (len(models) > 1) + printable(codec.text(response)))
        if config.prompt:
            break
        asked += 1


if __name__ == "__main__":
    try:
        command(ask, AskConfig, {})
    except (EOFError, KeyboardInterrupt):  # Ctrl-D or Ctrl-C at the prompt
        print()
