"""The network of all three stages, and what one does with it: score, sample, take a step.

Rule 1. Sequences lie end to end in one ragged `Batch`; nothing is padded. Every per-token quantity
is a flat (N,) vector over the response tokens of the batch, indexed by the token it is about:
logprobs[n], values[n] and rewards[n] concern response token n, which the network decided one
position earlier. The shift by one stands in one place, `Batch.decided_at`.

Rule 2. A response ends with the end-of-text token if the model emitted it. It is an action like any
other: it has a log-probability, a KL term and an advantage, and the reward model is read there.

Letters: B sequences, T tokens of all of them, N response tokens of all of them, S cache slots, and
H heads of D channels, C = H D channels, V words in the vocabulary, as in GPT-2.

    python model.py out/sft out/ppo --prompt "Tell me a silly story about a ghost."
    python model.py out/ppo --export FOLDER                         # as transformers reads it
"""

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from data import processes, weights
from data.processes import gather, generator, move, rank_and_world, resolve_device, send
from data.records import UserError, atomic, printable
from data.run import Count, Positive, Rate, RunConfig, command, load_checkpoint, progress
from data.tokenizer import Codec, Pairs, columns

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # attention in plain PyTorch does not need it
    triton = None


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
        # (N,) the position that decided response token n: where its logits and its value are read
        self.decided_at = self.is_response.nonzero()[:, 0] - 1
        self.lengths = before[starts].diff()  # (B,) response lengths, sum N
        first = starts[:-1].repeat_interleave(starts.diff(), output_size=T)
        self.positions = torch.arange(T, device=first.device) - first  # (T,) within its sequence
        self.last = starts[1:] - 1  # (B,) the last token of each sequence
        self.starts = starts.tolist()

    @functools.cached_property
    def groups(self) -> "Groups":
        return length_groups(self.starts, self.tokens.device)


def pack(
    prompts: list[list[int]], responses: list[list[int]], device: torch.device | str = "cpu"
) -> Batch:
    """Lays B prompts and their responses end to end, on the CPU. UserError for an empty prompt."""
    if not all(prompts):
        raise UserError("an empty prompt decides nothing; give every prompt at least one token")
    pairs = list(zip(prompts, responses, strict=True))
    tokens = torch.tensor([t for p, r in pairs for t in p + r], dtype=torch.long)
    # (2B,) lengths of a prompt and its response, alternating
    sizes = torch.tensor([n for p, r in pairs for n in (len(p), len(r))], dtype=torch.long)
    is_response = torch.tensor([False, True]).repeat(len(pairs)).repeat_interleave(sizes)
    lengths = sizes.view(-1, 2).sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    longest = max(lengths.tolist(), default=0)
    return move(Batch(tokens, cu_seqlens, is_response, longest), device)


def batches(
    prompts: list[list[int]], responses: list[list[int]], config: RunConfig
) -> Iterator[Batch]:
    """The sequences in order as ragged batches of at most config.max_tokens tokens."""
    pairs = zip(prompts, responses, strict=True)
    return (batch for _, batch in grouped([[pair] for pair in pairs], config))


def grouped(groups: list[Pairs], config: RunConfig) -> Iterator[tuple[list[int], Batch]]:
    """Likewise for groups of (prompt, response) that stay together: (indices of groups, batch)."""
    lengths = [sum(len(p) + len(r) for p, r in group) for group in groups]
    for part in micro_batches(lengths, config):
        prompts, responses = columns([pair for i in part for pair in groups[i]])
        yield part, pack(prompts, responses, resolve_device(config.device))


def micro_batches(lengths: list[int], config: RunConfig) -> list[list[int]]:
    """Cuts items 0, 1, ... into runs of at most config.max_tokens tokens, or of one item.

    With --shard all processes must make the same number of passes: some add empty runs.
    """
    parts: list[list[int]] = []
    room = 0
    for b, n in enumerate(lengths):
        if not parts or n > room:
            parts.append([])
            room = config.max_tokens
        parts[-1].append(b)
        room -= n
    most = max(gather(len(parts))) if config.shard else 0
    return parts + [[]] * (most - len(parts))


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
            raise UserError(f"{self}: sizes are at least 1, not huge, and n_head divides n_embd")


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        x = x.to(self.c_attn.weight.dtype)  # fp32 between layers, while products are in bf16
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (T, 3, H, D)
        return self.c_proj(attend(qkv).flatten(-2))  # (T, H, D) -> (T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.c_fc.weight.dtype)
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # tanh as GPT-2


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

    recompute = False  # a block's activations in the backward pass: less memory, 4/3 the time
    attention = "plain"  # PyTorch's, or "fused": our kernels; to_device decides

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

    @property
    def head_weight(self) -> Tensor:  # (V, C)
        return self.wte.weight

    def forward(self, batch: Batch) -> Tensor:  # -> hidden (T, C)
        if batch.longest > self.config.block_size:
            raise UserError(
                f"{batch.longest} tokens do not fit into block_size={self.config.block_size}; "
                "shorten the prompts or train with a larger --block_size"
            )
        attend = self.attend_within(batch)
        return self.body(batch.tokens, batch.positions, lambda _, qkv: attend(qkv))

    def attend_within(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Causal attention within each of the batch's sequences: qkv (T, 3, H, D) -> (T, H, D)."""
        fused = self.attention == "fused"
        groups = None if fused else batch.groups  # for the padding of the plain path
        return lambda qkv: attention(qkv, batch.cu_seqlens, batch.longest, groups, fused)

    def body(self, tokens: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        """(T,), (T,) -> hidden (T, C); attend(layer, qkv (T, 3, H, D)) -> (T, H, D)."""
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for layer, block in enumerate(self.h):
            attend_here = functools.partial(attend, layer)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, attend_here, use_reentrant=False)
            else:
                x = block(x, attend_here)
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:  # (n, C) -> (n, V)
        return head_logits(hidden, self.head_weight)

    @classmethod
    def load(cls, source: str | Path, dropout: float = 0.0, average: bool = False) -> "GPT":
        """The language model of a stage's folder (or the moving average of its weights), of a
        Hugging Face folder, or the published one called gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        """
        if weights.is_hugging_face(source):
            sizes, found = weights.read_hugging_face(source)
        else:
            saved = load_checkpoint(source)
            sizes, found = saved["gpt"], saved["model"]
            if average:
                found = saved["training"].get("average")
        return with_weights(cls, sizes | {"dropout": dropout}, found, source)

    def save(self, folder: str | Path, tokenizer: tiktoken.Encoding) -> None:
        """Writes a Hugging Face folder: config.json, model.safetensors, the tokenizer's files."""
        weights.write_hugging_face(folder, asdict(self.config), self.state_dict(), tokenizer)


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
    def load(cls, folder: str | Path) -> "ScalarModel":
        """The reward model of a stage's folder. UserError if it holds another model."""
        saved = load_checkpoint(folder)
        if saved["stage"] != "reward":
            raise UserError(f"{folder} is a checkpoint of {saved['stage']}, not a reward model")
        return with_weights(lambda sizes: cls(GPT(sizes)), saved["gpt"], saved["model"], folder)

    def save(self, folder: str | Path, tokenizer: tiktoken.Encoding) -> None:
        """Writes a Hugging Face folder of a GPT2ForSequenceClassification with the same scores."""
        weights.write_hugging_face(folder, asdict(self.gpt.config), self.state_dict(), tokenizer)

    def forward(self, batch: Batch) -> Tensor:  # -> (T,)
        return self.read(self.gpt(batch))

    def values(self, batch: Batch) -> Tensor:  # -> (N,) value of the state before response token n
        return self.read(self.gpt(batch)[batch.decided_at])

    def score(self, batch: Batch) -> Tensor:  # -> (B,) read at the last token of each sequence
        return self.read(self.gpt(batch)[batch.last])

    def read(self, hidden: Tensor) -> Tensor:  # (n, C) -> (n,)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 steps by 1/64 beyond 2
            out = self.head(hidden.to(self.head.weight.dtype))
        return torch.squeeze_copy(out, -1)  # FSDP2 warns of views


def with_weights(make: Callable, sizes: dict, found: dict, source: str | Path) -> nn.Module:
    """The network make(GPTConfig) with the weights found; UserError if they are not its own."""
    try:
        with torch.device("meta"):  # no memory, and no time for an initialisation
            model = make(GPTConfig(**sizes))
    except (TypeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{source}: {sizes!s:.200} are no sizes of a GPT: {what:.200}") from None
    weights.check_weights(found, model.state_dict(), source)
    model.load_state_dict(found, assign=True)
    return model


# --------------------------------------------------------------------------------------------------
# Scoring and sampling


def token_logprobs(model: GPT, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(token | all before) of every response token, and the entropy of pi there: (N,), (N,).

    The head sees a chunk of rows at a time. If there are several, the (N, V) logits never exist:
    the backward pass computes them anew. Entropy has no gradient: InstructGPT has no entropy bonus.
    """
    hidden, tokens = model(batch)[batch.decided_at], batch.tokens[batch.decided_at + 1]
    weight, chunks = model.head_weight, []
    n = rows_at_once(weight)
    if len(tokens) <= n:  # the backward pass begins here, so that it has no need to compute anew
        return head_logprobs(hidden, weight, tokens, temperature)
    for h, token in zip(hidden.split(n), tokens.split(n), strict=True):
        inputs = (h, weight, token, temperature)
        how = {"use_reentrant": False, "preserve_rng_state": False}
        chunks.append(checkpoint(head_logprobs, *inputs, **how))
    logprobs, entropy = map(torch.cat, zip(*chunks, strict=True))
    return logprobs, entropy


def head_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(n, C), (V, C), (n,) -> log-probabilities (n,) of the tokens, entropy (n,)."""
    all_logprobs = head_logits(hidden / temperature, weight).log_softmax(-1)  # (n, V)
    logprobs = all_logprobs.gather(-1, tokens[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    return logprobs, entropy


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden weight^T, in fp32 even while other products are in bf16: (n, C), (V, C) -> (n, V).

    The logits of the published GPT-2 lie near -65, where bf16 has steps of 0.25 to 0.5.
    """
    if torch.bfloat16 in (precision_of(hidden), weight.dtype):
        return HeadProduct.apply(hidden, weight)
    return F.linear(hidden, weight)


class HeadProduct(torch.autograd.Function):
    """a b^T, up to a constant in each row, in fp32; its gradients are products in bf16."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:  # (n, C), (V, C) -> (n, V)
        ctx.dtypes = a.dtype, b.dtype
        if a.is_cuda:  # autograd knows no gradient of this product
            a, b = a.bfloat16(), centred(b)
            out = torch.mm(a, b.T, out_dtype=torch.float32)
        else:
            with torch.autocast(a.device.type, enabled=False):
                out = F.linear(a.float(), b.float())
        ctx.save_for_backward(a, b)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (x.bfloat16() for x in ctx.saved_tensors)
        grad = grad.bfloat16()
        return (grad @ b).to(ctx.dtypes[0]), (grad.T @ a).to(ctx.dtypes[1])


def centred(weight: Tensor) -> Tensor:
    """A head in bf16 without its mean row, which adds no more than a constant to each row."""
    return weight if weight.dtype == torch.bfloat16 else (weight - weight.mean(0)).bfloat16()


def precision_of(x: Tensor) -> torch.dtype:
    """What products of x are computed in: autocast's type, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def rows_at_once(weight: Tensor) -> int:
    """Rows of logits per chunk: on a CPU they fit in its cache."""
    return max(256, (2**27 if weight.is_cuda else 2**21) // len(weight))


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0) -> Tensor:
    """One token per row by inverting the cumulative distribution: (B, V), (B,) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    cdf = logits.softmax(-1).cumsum(-1)
    uniform = send(uniform, logits.device)
    level = uniform[:, None] * cdf[:, -1:]  # < the total: no token of probability 0 is drawn
    tokens = torch.searchsorted(cdf, level, right=True)[:, 0]
    return tokens.clamp_(max=logits.shape[-1] - 1)  # guards against NaN logits


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

    Prompts of all lengths decode together, each with a row of the key-value cache. Rows that have
    ended leave, and waiting prompts take their place, many at a time. Token t of prompt b is drawn
    with uniform[b, t], so max_rows does not change the result. `title` is that of a progress bar.
    UserError if the longest prompt and max_new_tokens exceed block_size.
    """
    S = max(map(len, prompts), default=1) + max_new_tokens
    if S > model.config.block_size:
        raise UserError(
            f"longest prompt + max_new_tokens = {S} exceeds block_size={model.config.block_size}; "
            "shorten the prompts or lower max_new_tokens"
        )
    model = sampling_copy(model)
    config, weight = model.config, model.h[0].attn.c_attn.weight
    R, H = min(max_rows, len(prompts), rows_that_fit(model, S)), config.n_head
    cache = weight.new_empty(config.n_layer, 2, R, H, S, config.n_embd // H)
    in_bf16 = cache.is_cuda and cache.dtype == torch.bfloat16
    head = centred(model.head_weight) if in_bf16 else model.head_weight
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator)
    responses: list[list[int]] = [[] for _ in prompts]
    rows: list[int] = []  # row r of the cache answers prompt rows[r]
    admitted = 0  # prompts 0, 1, ... that have a row, or had one

    def sample(hidden: Tensor, chosen: list[int]) -> None:
        """The next token of each chosen prompt, from the hidden states (R, C) that decide it."""
        step = [len(responses[b]) for b in chosen]
        tokens = draw(head_logits(hidden, head), uniform[chosen, step], temperature, top_k)
        for b, token in zip(chosen, tokens.tolist(), strict=True):
            responses[b].append(token)

    with torch.autocast(weight.device.type, enabled=False), progress(title, len(prompts)) as bar:
        while admitted < len(prompts) or rows:
            if admitted < len(prompts) and len(rows) <= R * 3 // 4:  # in bulk, not one at a time
                new = list(range(admitted, min(admitted + R - len(rows), len(prompts))))
                free = cache[:, :, len(rows) : len(rows) + len(new)]
                sample(prefill(model, [prompts[b] for b in new], free), new)
                rows, admitted = rows + new, admitted + len(new)
            ended = [eos_token in responses[b][-1:] or len(responses[b]) == max_new_tokens
                     for b in rows]  # fmt: skip
            rows = close_gaps(cache, rows, ended)
            bar.update(sum(ended))
            if rows:
                newest = send([responses[b][-1] for b in rows], weight.device)
                cached = [len(prompts[b]) + len(responses[b]) - 1 for b in rows]
                lengths = send(cached, weight.device)
                sample(decode(model, newest, cache[:, :, : len(rows)], lengths), rows)
    return responses


def rows_that_fit(model: GPT, S: int) -> int:
    """Rows of S slots that fit into half of a GPU's free memory. UserError if none does."""
    weight, config = model.h[0].attn.c_attn.weight, model.config
    size = 2 * config.n_layer * S * config.n_embd * weight.element_size()
    free = processes.free_memory(weight.device) // 2
    if free < size:
        raise UserError(
            f"the key-value cache of one response takes {size / 1e9:.1f} GB for {S} tokens, and "
            f"the GPU has {free / 1e9:.1f} GB for it; lower --max_new_tokens"
        )
    return free // size


def prefill(model: GPT, prompts: list[list[int]], cache: Tensor) -> Tensor:
    """Writes keys and values of prompt r to cache row r; returns the last hidden states (R, C)."""
    cache.zero_()  # decoding needs finite numbers in the slots that it does not use
    batch = pack(prompts, [[]] * len(prompts), device=cache.device)
    rows = torch.arange(len(prompts), device=cache.device)
    rows = rows.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(batch.tokens))  # (T,)
    within = model.attend_within(batch)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        cache[layer][:, rows, :, batch.positions] = qkv[:, 1:]  # (T, 2, H, D)
        return within(qkv)

    return model.body(batch.tokens, batch.positions, attend)[batch.last]


def decode(model: GPT, tokens: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """Feeds each row its newest token: (R,), (n_layer, 2, R, H, S, D), (R,) -> hidden (R, C)."""

    def attend(layer: int, qkv: Tensor) -> Tensor:
        return decode_attention(qkv, cache[layer], lengths, model.attention == "fused")

    return model.body(tokens, lengths, attend)


def close_gaps(cache: Tensor, rows: list[int], ended: list[bool]) -> list[int]:
    """Takes ended rows out of the cache: the last live rows move into their places."""
    live = len(rows) - sum(ended)
    gaps = [r for r in range(live) if ended[r]]
    movers = [r for r in range(live, len(rows)) if not ended[r]]
    if gaps:
        cache[:, :, gaps] = cache[:, :, movers]
    moved = dict(zip(gaps, movers, strict=True))
    return [rows[moved.get(r, r)] for r in range(live)]


@torch.inference_mode(False)  # inside it a sharded model has no state_dict
def sampling_copy(model: GPT, dtype: torch.dtype | None = None) -> GPT:
    """The network from which every process samples by itself: unsharded, and in eval mode.

    The weights of its layers' products have autocast's precision by default, which would otherwise
    cast them anew for every token. It shares the weights that do not change.
    """
    dtype = dtype or precision_of(model.head_weight)
    with torch.device("meta"):
        copied = GPT(model.config)
    whole = processes.unsharded_weights(model)
    layers = {name: w.to(dtype) for name, w in whole.items() if ".attn." in name or ".mlp." in name}
    copied.load_state_dict(whole | layers, assign=True)
    copied.attention = model.attention
    return copied.eval()


# --------------------------------------------------------------------------------------------------
# Training


def to_device(model: nn.Module, config: RunConfig) -> nn.Module:
    """The network on its device; with --shard, an equal part of every tensor on each process's."""
    gpt, model = getattr(model, "gpt", model), model.to(resolve_device(config.device))
    gpt.attention = model.attention = choose_attention(gpt, config.attention)
    gpt.recompute = config.recompute
    if config.shard:
        # token_logprobs uses the weights of a GPT's head once more after its pass
        processes.shard(model, keep=isinstance(model, GPT), methods=("values", "score"))
    return model


def adam(models: list[tuple[nn.Module, float]]) -> torch.optim.AdamW:
    """One optimiser for all (model, peak learning rate): InstructGPT's betas, no weight decay."""
    groups = [{"params": list(m.named_parameters()), "lr": lr, "peak_lr": lr} for m, lr in models]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True)


def lr_schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak: linear warm-up over `warmup` steps, then cosine decay to a tenth."""
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min(1.0, (step + 1) / (warmup + 1)) * (0.55 + 0.45 * math.cos(math.pi * progress))


def clip_and_step(
    optimizer: torch.optim.Optimizer, loss: Tensor | float, lr: float = 1.0, clip: float = 1.0
) -> tuple[float, list[float]]:
    """Clips each model's gradient to norm `clip`, steps at `lr` times its peak rate, clears it.

    First, gradients and `loss` are summed over the processes, each of which has its share.
    Returns the loss and the norms before clipping. UserError, before the weights change, if one of
    them is not finite.
    """
    groups, whole = optimizer.param_groups, processes.whole
    processes.sum_gradients([p for group in groups for p in group["params"]])
    gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in groups]
    device = groups[0]["params"][0].device  # without gradients, their norm is a 0 on the CPU
    norms = [send(whole(nn.utils.get_total_norm(found)), device) for found in gradients]
    numbers = [torch.as_tensor(loss, device=device), *norms]
    # here the CPU waits for the device, once in a step
    loss, *numbers = torch.stack([x.float() for x in numbers]).tolist()
    loss = sum(gather(loss))
    if not all(map(math.isfinite, (loss, *numbers))):
        for group in groups:
            named = zip(group["param_names"], group["params"], strict=True)
            found = {name: whole(p.grad) for name, p in named if p.grad is not None}
            weights.check_finite(f"the loss is {loss}, the gradient of", found)
        raise UserError(f"the loss is {loss}, gradient norms {numbers}: not finite")
    for group, norm in zip(groups, norms, strict=True):
        nn.utils.clip_grads_with_norm_(group["params"], clip, norm)
        group["lr"] = group["peak_lr"] * lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, numbers


# --------------------------------------------------------------------------------------------------
# Attention over ragged batches and over the key-value cache, in plain PyTorch

Groups = tuple[list[tuple[int, int]], Tensor, Tensor]  # what length_groups returns


def attention(
    qkv: Tensor, cu_seqlens: Tensor, longest: int, groups: Groups | None = None, fused: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal within each of B sequences that lie end to end.

    qkv (T, 3, H, D), cu_seqlens (B + 1,) int32, longest: at least the longest length -> (T, H, D).
    groups, what length_groups returns, spares the plain path from computing it in every layer.
    """
    if not len(qkv):
        return qkv[:, 0]
    if fused:
        return fused_attention(qkv.contiguous(), cu_seqlens, longest)[0]
    return padded_attention(qkv, groups or length_groups(cu_seqlens.tolist(), qkv.device))


def decode_attention(qkv: Tensor, cache: Tensor, lengths: Tensor, fused: bool = False) -> Tensor:
    """Appends each row's new key and value to its cached ones, then attends to all the row has.

    qkv (B, 3, H, D) of one new token a row, cache (2, B, H, S, D) of which each row has filled
    lengths (B,) slots -> (B, H, D). Other slots may hold any finite numbers.
    """
    if fused:
        return fused_decode(qkv.contiguous(), cache, lengths)
    return padded_decode(qkv, cache, lengths)


PADS = 64  # max padding tokens per group


def length_groups(starts: list[int], device: torch.device | str = "cpu") -> Groups:
    """Sorts sequences into rectangles (rows, L), longest first, with few padding tokens in each.

    starts, cu_seqlens as a list -> the rectangles; the token in each of their slots, (slots,); the
    slot of each token, (T,). Padding repeats the last token of its own sequence: no NaN can cross
    from one to another.
    """
    lengths = [end - start for start, end in pairwise(starts)]
    shapes, token, slot, room = [], [], [0] * starts[-1], 0
    full = [b for b, n in enumerate(lengths) if n]
    for b in sorted(full, key=lengths.__getitem__, reverse=True):
        start, n = starts[b], lengths[b]
        rows, width = shapes[-1] if shapes else (0, 0)
        room -= width - n
        if room < 0 or not shapes:  # a new group, as wide as its first and longest row
            rows, width, room = 0, n, PADS
            shapes.append((rows, width))
        shapes[-1] = (rows + 1, width)
        slot[start : start + n] = range(len(token), len(token) + n)
        token += [*range(start, start + n), *[start + n - 1] * (width - n)]
    return shapes, send(token, device), send(slot, device)


def padded_attention(qkv: Tensor, groups: Groups) -> Tensor:
    """No mask: padding ends its row, and a causal query never sees what follows it."""
    shapes, token, slot = groups
    rectangles = qkv.index_select(0, token).split([rows * L for rows, L in shapes])
    out = []
    for x, shape in zip(rectangles, shapes, strict=True):
        q, k, v = x.unflatten(0, shape).permute(2, 0, 3, 1, 4)  # (rows, H, L, D) each
        out.append(causal_attention(q, k, v).transpose(1, 2).flatten(0, 1))  # (rows L, H, D)
    return torch.cat(out).index_select(0, slot)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (..., L, D) each
    if q.is_cuda or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # in bf16 on a CPU these lines run twice as fast, forward and backward
    unseen = torch.full((q.shape[-2], q.shape[-2]), float("-inf"), dtype=q.dtype).triu(1)
    return (q * q.shape[-1] ** -0.5 @ k.mT + unseen).softmax(-1) @ v


def padded_decode(qkv: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """A row attends to slots up to its own new one; the others get a bias of -inf."""
    n, rows, (_, _, H, D) = lengths.long(), torch.arange(len(qkv), device=qkv.device), qkv.shape
    cache[:, rows, :, n] = qkv[:, 1:]
    # a GPU would have to wait for the longest length; in bf16 the products would copy a part
    slots = cache.shape[3] if cache.is_cuda or cache.dtype == torch.bfloat16 else int(n.max()) + 1
    unseen = torch.arange(slots, device=n.device) > n[:, None]  # (B, slots)
    bias = torch.zeros(unseen.shape, dtype=cache.dtype, device=n.device)
    bias = bias.masked_fill_(unseen, float("-inf")).repeat_interleave(H, 0)[:, None]
    q = qkv[:, 0].flatten(0, 1)[:, None]  # (B H, 1, D)
    k, v = cache[:, :, :, :slots].flatten(1, 2)  # (B H, slots, D) each
    out = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5).softmax(-1) @ v
    return out.view(-1, H, D)


# --------------------------------------------------------------------------------------------------
# Attention in Triton: skip on first reading. No padding, and no (L, L) matrix in memory

if triton:
    LOG2E = constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2E x), and exp2 is the hardware's own
    # BLOCK and STEP (see fused_attention), warps that run a program, pipeline stages of its loads
    TILES = {  # of heads with D <= 64, and larger ones
        "forward": [(128, 64, 8, 3), (128, 64, 8, 2)],
        "dq": [(128, 64, 8, 2), (64, 64, 4, 2)],
        "dkv": [(64, 64, 4, 1), (64, 64, 8, 1)],
    }
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
        tile = FP32_TILE if tensors[0].dtype == torch.float32 else TILES[name][D > 64]
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
    def softmax_weights(q, k, lse, i0, j0, D):  # -> (M, N)
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
        H: constexpr, D: constexpr, BLOCK: constexpr, STEP: constexpr
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
            p = softmax_weights(q, k, lse_i, i0, j0, D)  # (BLOCK, STEP)
            ds = p * (dot(do_i, v.T) - delta_i[:, None])  # (BLOCK, STEP)
            dq = dot(ds.to(k.dtype), k, dq)
        store(dqkv + at, i0, n, 3 * H * D, dq * D**-0.5, D)

    @triton.jit
    def dkv_kernel(
        qkv, lse, do, delta, dqkv, cu_seqlens,
        H: constexpr, D: constexpr, BLOCK: constexpr, STEP: constexpr
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
            p = softmax_weights(q, k, lse_i, i0, j0, D)  # (STEP, BLOCK)
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
# The trial of the kernels: python -m model --trial TYPE D DEVICE

TRIAL_SECONDS = 300


def choose_attention(gpt: GPT, flag: str) -> str:
    """Fused where a trial has found the kernels right, else plain; rank 0 decides for all."""
    weight, D, verdict = gpt.head_weight, gpt.config.n_embd // gpt.config.n_head, ""
    if not (triton and weight.is_cuda and flag == "auto"):
        return "plain"
    if rank_and_world()[0] == 0:
        verdict = trial(str(precision_of(weight))[6:], D, str(weight.device))
    return "fused" if gather(verdict)[0] == "right" else "plain"


@functools.cache
def trial(dtype: str, D: int, device: str) -> str:
    """What is wrong with the kernels on this GPU, or right; the verdict is kept in torch's cache.

    Another process tries them: a kernel may never end, or leave the GPU unusable.
    """
    gpu, versions = torch.cuda.get_device_name(device), (torch.__version__, triton.__version__)
    here = (gpu, *versions, Path(__file__).read_text("utf-8"), dtype, D)
    known = Path(torch.hub.get_dir()) / f"picorlhf/trial-{processes.seed_of(*here):x}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        verdict = f"{gpu} has less than compute capability 8.0"
    elif known.exists():
        verdict = known.read_text("utf-8")
    else:
        command = [sys.executable, "-m", "model", "--trial", dtype, str(D), device]
        verdict, final = processes.last_line(command, Path(__file__).parent, TRIAL_SECONDS)
        if final:
            with contextlib.suppress(OSError):  # where nothing can be kept, it is asked every time
                known.parent.mkdir(parents=True, exist_ok=True)
                with atomic(known) as file:
                    file.write(verdict.encode())
    if verdict != "right":
        print(f"attention in plain PyTorch; a trial of our kernels says: {verdict} ({known})")
    return verdict


def judge_kernels(dtype: torch.dtype, D: int, device: torch.device) -> str:
    """The first result in which the kernels err more than twice as much as plain PyTorch; or right.

    Errors are relative, against float64. In fp32, three tf32 products may err by 1e-5.
    """
    for seed, longest in enumerate((255, 1024, 1024)):
        torch.manual_seed(seed)
        lengths = torch.tensor([1, 0, 63, 129, 200, longest])
        B, T, H = len(lengths), int(lengths.sum()), 3
        shapes = (T, 3, H, D), (T, H, D), (B, 3, H, D), (2, B, H, longest + 1, D)
        tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
        tensors += [F.pad(lengths.cumsum(0), (1, 0)).int().to(device), lengths.to(device)]
        exact, plain, ours = (
            attention_results(*tensors, kind, fused)
            for kind, fused in ((torch.float64, False), (dtype, False), (dtype, True))
        )
        for name, x in exact.items():
            limit, error = (((y[name] - x).norm() / x.norm()).item() for y in (plain, ours))
            if not error <= max(2 * limit, 1e-5 if dtype == torch.float32 else 0.0):
                return f"{name} has an error of {error:.1e}, {limit:.1e} in PyTorch"
    return "right"


def attention_results(qkv, do, new, cache, cu_seqlens, lengths, kind: torch.dtype, fused: bool):
    """Everything that attention computes, by name, from inputs of this kind."""
    qkv, do, new, cache = (x.to(kind, copy=True) for x in (qkv, do, new, cache))
    out = attention(qkv.requires_grad_(), cu_seqlens, cache.shape[3] - 1, fused=fused)
    out.backward(do)
    dq, dk, dv = qkv.grad.unbind(1)
    decoded = decode_attention(new, cache, lengths, fused)
    return {"o": out.detach(), "dq": dq, "dk": dk, "dv": dv, "decoding": decoded, "cache": cache}


# --------------------------------------------------------------------------------------------------
# python model.py MODEL ...: ask a model, or several side by side


@dataclass
class AskConfig:
    models: list  # folders of stages or of Hugging Face, or gpt2, gpt2-medium, gpt2-large, gpt2-xl
    prompt: str = ""  # answer this; default: ask at the terminal until an empty line
    raw: bool = False  # continue the prompt as it is, without the template
    temperature: Rate = 1.0  # 0 takes the likeliest token
    top_k: Count = 0  # draw from the k likeliest tokens only; 0: from all
    max_new_tokens: Positive = 80  # longest response
    seed: int = 0  # all models draw with the same random numbers
    device: str = "auto"  # cpu, cuda, or auto: cuda where it is available
    export: str = ""  # write the model to this folder as transformers reads it, and ask nothing

    __post_init__ = RunConfig.__post_init__  # which checks the bounds of the flags


def load_any(source: str) -> GPT | ScalarModel:
    """The reward model of a folder that reward.py has made, else the language model."""
    ours = not weights.is_hugging_face(source)
    is_reward_model = ours and load_checkpoint(source)["stage"] == "reward"
    return ScalarModel.load(source) if is_reward_model else GPT.load(source)


def ask(config: AskConfig) -> None:
    """Prints the answer of every model to every prompt; or exports the models."""
    device = resolve_device(config.device)
    models = [(name, load_any(name).to(device), Codec.load(name)) for name in config.models]
    if config.export and len(models) > 1:
        raise UserError(f"--export {config.export} takes one model, not {len(models)}")
    for name, model, codec in models:
        codec.check_vocabulary(getattr(model, "gpt", model).config.vocab_size)
        if config.export:
            model.save(config.export, codec.tokenizer)
            print(f"wrote {name} to {config.export}")
        elif isinstance(model, ScalarModel):
            raise UserError(f"{name} is a reward model; use --export, or reward.py --score FILE")
    prompts = [config.prompt] if config.prompt else iter(lambda: input("> "), "")
    for asked, prompt in enumerate([] if config.export else prompts):
        for name, model, codec in models:
            codec = Codec(codec.tokenizer, "{prompt}") if config.raw else codec
            tokens = codec.prompt(prompt, model.config.block_size - config.max_new_tokens)
            seed = generator(config.seed, asked)
            limits = (config.max_new_tokens, codec.eos, config.temperature, config.top_k)
            (response,) = generate(model, [tokens], *limits, generator=seed)
            print(f"[{name}] " * (len(models) > 1) + printable(codec.text(response)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trial"]:
        name, D, place = sys.argv[2:]
        print(judge_kernels(getattr(torch, name), int(D), resolve_device(place)))
        raise SystemExit
    try:
        command(ask, AskConfig, {})
    except (EOFError, KeyboardInterrupt):  # Ctrl-D or Ctrl-C at the prompt
        print()
