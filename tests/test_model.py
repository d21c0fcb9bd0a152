"""The network against GPT-2, and the ragged batch, scoring and sampling against naive loops; at
the end, what all stages share: the order of the data, documents, signals and locks."""

import copy
import functools
import itertools
import math
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import model as model_module
from data.folders import lock
from data.processes import batch_at
from data.records import UserError
from data.report import mean_and_interval
from data.run import RunConfig, stop_signals
from data.tokenizer import Codec, documents, get_tokenizer
from model import (
    GPT,
    GPTConfig,
    ScalarModel,
    adam,
    attention,
    batches,
    clip_and_step,
    close_gaps,
    decode_attention,
    draw,
    generate,
    head_logprobs,
    lr_schedule,
    micro_batches,
    pack,
    sampling_copy,
    to_device,
    token_logprobs,
)

import numpy as np
import pytest
import torch
from fake_gpu import fake_gpu
from torch import tensor
from torch.utils._python_dispatch import TorchDispatchMode

REFERENCE = Path(__file__).parents[2] / "shared/data/gpt2_reference/tiny_random_gpt2.npz"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PROMPTS = [[3, 5], [7], [1, 0, 4, 4, 9]]
RESPONSES = [[2, 8, 0], [0], [10, 6, 2, 2, 6]]


def close(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def randomised(model):
    """The model in float64 with every parameter, biases and layer-norm gains included, random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.double().eval()


def tiny_gpt(**overrides):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return randomised(GPT(GPTConfig(**sizes | overrides))).float()


def gpt_that_says(probabilities):
    """A GPT with this distribution at every position."""
    gpt = GPT(GPTConfig(len(probabilities), block_size=24, n_layer=1, n_head=1, n_embd=16)).eval()
    with torch.no_grad():
        gpt.ln_f.weight.zero_()
        gpt.ln_f.bias.copy_(torch.eye(16)[0])  # the hidden state of every position
        gpt.wte.weight[:, 0] = tensor(probabilities).clamp(min=1e-30).log()
    return gpt


def next_logits(gpt, tokens):
    """By a forward pass over just these tokens: (V,)."""
    with torch.no_grad():
        return gpt.wte.weight @ gpt(pack([tokens], [[]]))[-1]


# ---- the ragged batch ----


def test_pack_by_hand():
    batch = pack([[5, 6], [7]], [[8, 9, 0], [1]])
    #     index   0  1  2  3  4   5  6
    assert batch.tokens.tolist() == [5, 6, 8, 9, 0, 7, 1]
    assert batch.is_response.tolist() == [False, False, True, True, True, False, True]
    assert batch.cu_seqlens.tolist() == [0, 5, 7]
    assert batch.decided_at.tolist() == [1, 2, 3, 5]  # one before each response token
    assert batch.lengths.tolist() == [3, 1]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.last.tolist() == [4, 6]
    assert batch.longest == 5 and type(batch.longest) is int
    dtypes = [batch.tokens.dtype, batch.cu_seqlens.dtype, batch.is_response.dtype]
    assert dtypes == [torch.int64, torch.int32, torch.bool]


def test_pack_takes_empty_responses():
    batch = pack([[5, 6], [7], [8]], [[], [1], []])
    assert batch.tokens.tolist() == [5, 6, 7, 1, 8]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5]
    assert batch.decided_at.tolist() == [2]
    assert batch.lengths.tolist() == [0, 1, 0]
    assert pack([[5]], [[]]).decided_at.tolist() == []
    assert pack([], []).longest == 0


def test_pack_refuses_an_empty_prompt_and_one_without_its_response():
    with pytest.raises(UserError):
        pack([[1], []], [[2], [3]])
    with pytest.raises(ValueError):
        pack([[1], [2]], [[3]])


@pytest.mark.parametrize(
    "lengths, parts",
    [
        ([4, 6, 1, 9, 3], [[0, 1], [2, 3], [4]]),  # exactly full, twice
        ([12, 2, 30, 1], [[0], [1], [2], [3]]),  # longer than a pass: alone
        ([1] * 12, [list(range(10)), [10, 11]]),
        ([], []),
    ],
)
def test_micro_batches_by_hand(lengths, parts):
    assert micro_batches(lengths, RunConfig(max_tokens=10)) == parts


def test_every_prompt_has_a_response_in_its_batch():
    with pytest.raises(ValueError):
        list(batches([[1], [2]], [[3]], RunConfig(device="cpu")))


def test_decided_at_never_crosses_into_a_neighbour():
    """#1 shift_off_by_one."""
    batch = pack(PROMPTS, RESPONSES)
    starts, ends = batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()
    decided_at = batch.decided_at.split(batch.lengths.tolist())
    for own, start, end, response in zip(decided_at, starts, ends, RESPONSES, strict=True):
        assert start <= own.min() and own.max() == end - 2
        assert batch.tokens[own + 1].tolist() == response


# ---- attention ----


def naive_attention(q, k, v):  # each (L, H, D), causal
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


LENGTHS = [3, 1, 17, 2, 9, 1, 40]
CU_SEQLENS = tensor([0, 3, 4, 21, 23, 32, 33, 73], dtype=torch.int32)


def test_attention_and_its_gradient_are_causal_within_each_sequence():
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(73, 3, 2, 16, generator=g, requires_grad=True)
    weight = torch.randn(73, 2, 16, generator=g)
    out = attention(qkv, CU_SEQLENS, 40)
    (gradient,) = torch.autograd.grad((out * weight).sum(), qkv)
    naive = torch.cat([naive_attention(*x.unbind(1)) for x in qkv.split(LENGTHS)])
    (naive_gradient,) = torch.autograd.grad((naive * weight).sum(), qkv)
    close(out, naive, 1e-5)
    close(gradient, naive_gradient, 1e-5)


def test_attention_lets_no_nan_of_a_neighbour_in():
    """#41 nan_times_zero, forward and backward."""
    g = torch.Generator().manual_seed(0)
    clean = torch.randn(73, 3, 2, 16, generator=g)
    real = torch.zeros(73, dtype=torch.bool)
    real[4:21] = True  # the sequence of 17
    qkv = clean.masked_fill(~real[:, None, None, None], math.nan).requires_grad_()
    out = attention(qkv, CU_SEQLENS, 40)[real]
    close(out, attention(clean, CU_SEQLENS, 40)[real])
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient[real].isfinite().all()


def test_decoding_appends_and_attends_to_each_rows_own_tokens():
    """#5 no_attn_mask: what finite numbers the unused slots hold does not matter."""
    g = torch.Generator().manual_seed(0)
    sequences = [torch.randn(n + 1, 3, 2, 16, generator=g) for n in (0, 5, 2)]
    cache = 100 * torch.randn(2, 3, 2, 9, 16, generator=g)
    for row, qkv in enumerate(sequences):
        cache[:, row, :, : len(qkv) - 1] = qkv[:-1, 1:].permute(1, 2, 0, 3)
    out = decode_attention(torch.stack([qkv[-1] for qkv in sequences]), cache, tensor([0, 5, 2]))
    for row, qkv in enumerate(sequences):
        close(out[row], naive_attention(*qkv.unbind(1))[-1], 1e-5)
        close(cache[:, row, :, : len(qkv)], qkv[:, 1:].permute(1, 2, 0, 3), 0)


# ---- GPT-2 ----


def ours_from(theirs, config):
    """Our GPT with the state of a transformers GPT-2, whose four linears lie transposed."""
    gpt = GPT(config)
    state = {
        name.removeprefix("transformer."): x.T if name.endswith(TRANSPOSED) else x
        for name, x in theirs.items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    gpt.load_state_dict(state)  # strict: the names are the same
    return gpt.eval()


def test_logits_and_gradients_are_gpt2s():
    """In float64, so that a layer norm's epsilon shows, and the exact GELU, 1e-4 from GPT-2's."""
    library = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "n_layer": 3, "n_head": 2, "n_embd": 32}
    theirs = randomised(library.GPT2LMHeadModel(library.GPT2Config(n_positions=24, **sizes)))
    ours = ours_from(theirs.state_dict(), GPTConfig(block_size=24, **sizes)).double()
    batch = pack(PROMPTS, RESPONSES)
    logits = ours.logits(ours(batch))
    sequences = batch.tokens.split(batch.cu_seqlens.diff().tolist())
    expected = torch.cat([theirs(tokens[None]).logits[0] for tokens in sequences])
    assert logits.shape == (17, 11)
    close(logits, expected, 1e-8)

    weight = torch.randn(17, 11, dtype=torch.float64)
    (logits.log_softmax(-1) * weight).sum().backward()
    (expected.log_softmax(-1) * weight).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        gradient = gradients[f"transformer.{name}"]
        close(p.grad, gradient.T if name.endswith(TRANSPOSED) else gradient, 1e-8)


@pytest.fixture(scope="module")
def reference():
    """A published GPT-2 of 5 layers and 4 heads, its logits and its greedy continuation."""
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE} is not here")
    arrays = {name: torch.from_numpy(x) for name, x in np.load(REFERENCE).items()}
    weights = {name: x for name, x in arrays.items() if name.endswith((".weight", ".bias"))}
    config = GPTConfig(vocab_size=1000, block_size=512, n_layer=5, n_head=4, n_embd=32)
    return ours_from(weights, config), arrays


@torch.no_grad()
def test_logits_of_a_published_gpt2(reference):
    gpt, arrays = reference
    rows = [*arrays["ids_small"], *arrays["ids_long"]]
    batch = pack([row.tolist() for row in rows], [[]] * len(rows))
    logits = gpt.logits(gpt(batch)).split([len(row) for row in rows])
    expected = [*arrays["logits_small"], *arrays["logits_long_f32"]]
    for own, published in zip(logits, expected, strict=True):
        close(own, published, 1e-4)


def test_greedy_tokens_of_a_published_gpt2(reference):
    gpt, arrays = reference
    prompts, published = arrays["ids_small"].tolist(), arrays["published_greedy"].tolist()
    responses = generate(gpt, prompts, 6, eos_token=999, temperature=0)
    assert [p + r for p, r in zip(prompts, responses, strict=True)] == published


@pytest.mark.parametrize("recompute", [True, False])
def test_a_network_is_put_on_the_device_with_its_flags(recompute):
    config = RunConfig(device="cpu", recompute=recompute)
    model = to_device(ScalarModel(tiny_gpt()), config)
    assert model.gpt.recompute is recompute and to_device(tiny_gpt(), config).recompute is recompute
    assert not GPT.recompute  # of no other network


def test_attention_is_told_where_sequences_begin(monkeypatch):
    """The kernels need this, which only a GPU runs; here it would not be missed."""
    told, attend = [], model_module.attention
    monkeypatch.setattr(
        model_module, "attention", lambda qkv, *x: told.append(x) or attend(qkv, *x)
    )
    batch = pack(PROMPTS, RESPONSES)
    tiny_gpt()(batch)
    for cu_seqlens, longest, groups, fused in told:
        assert cu_seqlens is batch.cu_seqlens and longest == batch.longest
        assert groups is batch.groups and not fused
    assert len(told) == len(tiny_gpt().h)


def test_a_sequence_longer_than_the_context_is_refused():
    """#54."""
    gpt = tiny_gpt(block_size=4)
    assert gpt(pack([[1, 2]], [[3, 4]])).shape == (4, 32)
    with pytest.raises(UserError):
        gpt(pack([[1], [1, 2]], [[3], [3, 4, 5]]))


@pytest.mark.parametrize("wrong", [{"n_layer": 0}, {"n_head": 3}, {"vocab_size": 2**25}])
def test_sizes_of_no_network_are_refused(wrong):
    sizes = {"vocab_size": 11, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
    with pytest.raises(UserError):
        GPTConfig(**sizes | wrong)


@torch.no_grad()
def test_dropout_acts_in_training_only():
    """#6 dropout_on."""
    gpt, batch = tiny_gpt(dropout=0.5), pack(PROMPTS, RESPONSES)
    assert torch.equal(gpt(batch), tiny_gpt()(batch))
    gpt.train()
    assert not torch.equal(gpt(batch), gpt(batch))


# ---- a token sees what stands before it in its own sequence, and nothing else ----


@torch.no_grad()
@pytest.mark.parametrize("j", range(5))
def test_a_token_changes_nothing_before_it(j):
    """#3 future_leak."""
    gpt, tokens = tiny_gpt(), [3, 5, 2, 8, 0]
    changed = [*tokens[:j], 9, *tokens[j + 1 :]]
    before, after = (gpt(pack([x], [[]])) for x in (tokens, changed))
    assert torch.equal(before[:j], after[:j])
    assert ((before[j:] - after[j:]).abs().amax(1) > 1e-3).all()


def test_a_neighbour_changes_neither_hidden_states_nor_gradients():
    """#4 no_position_ids, #5 no_attn_mask, #38: three sequences alone, and in any order."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 32, generator=g, dtype=torch.float64) for n in (5, 2, 10)]
    sequences = list(zip(PROMPTS, RESPONSES, weights, strict=True))

    def hidden_and_gradients(groups):
        gpt, hidden = tiny_gpt().double(), {}
        for group in groups:
            prompts, responses, weight = map(list, zip(*group, strict=True))
            out = gpt(pack(prompts, responses))
            (out * torch.cat(weight)).sum().backward()
            for own, prompt in zip(out.split(list(map(len, weight))), prompts, strict=True):
                hidden[tuple(prompt)] = own.detach()
        return hidden, [p.grad for p in gpt.parameters()]

    alone, alone_gradients = hidden_and_gradients([[s] for s in sequences])
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        packed, gradients = hidden_and_gradients([[sequences[i] for i in order]])
        for prompt, own in packed.items():
            close(own, alone[prompt])
        for own, expected in zip(gradients, alone_gradients, strict=True):
            close(own, expected)


@torch.no_grad()
def test_a_changed_neighbour_changes_not_one_bit():
    gpt = tiny_gpt()
    before = gpt(pack([[1, 2], [3, 4], [9, 9]], [[5], [6, 7], [9]]))[3:7]
    after = gpt(pack([[8, 8], [3, 4], [10, 0]], [[0], [6, 7], [1]]))[3:7]
    assert torch.equal(before, after)


@torch.no_grad()
def test_a_nan_in_a_neighbour_stays_there():
    """#41 nan_times_zero."""
    gpt = tiny_gpt()
    clean, _ = token_logprobs(gpt, pack([[3, 4]], [[6, 7]]))
    expected = gpt(pack([[1, 2], [3, 4], [9]], [[5], [6, 7], [9, 2]]))
    gpt_nan = copy.deepcopy(gpt)
    gpt_nan.wpe.weight[4:] = math.nan  # a neighbour of five tokens has a NaN at its end
    hidden = gpt_nan(pack([[1, 2], [3, 4], [9]], [[5, 1, 1], [6, 7], [9, 2]]))
    assert hidden[4].isnan().all()
    close(hidden[5:], expected[3:], 1e-5)
    logprobs, _ = token_logprobs(gpt_nan, pack([[1, 2, 1, 1], [3, 4]], [[5], [6, 7]]))
    close(logprobs[1:], clean, 1e-5)


# ---- scoring ----


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_against_one_forward_pass_a_token(temperature):
    """#1 shift_off_by_one, #8 temp_missing, #10 eos_excluded_from_mask."""
    gpt = tiny_gpt()
    logprobs, entropy = token_logprobs(gpt, pack(PROMPTS, RESPONSES), temperature)
    expected, expected_entropy = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        for t, token in enumerate(response):
            p = (next_logits(gpt, prompt + response[:t]) / temperature).softmax(0)
            expected.append(p[token].log().item())
            expected_entropy.append(-(p * p.log()).sum().item())
    close(logprobs, expected, 1e-5)
    close(entropy, expected_entropy, 1e-5)


def test_logprobs_and_entropy_by_hand():
    # 1/2 1/4 1/4: entropy 1.5 log 2. At temperature 1/2 the squares 4 : 1 : 1, entropy
    # 2/3 log 1.5 + 1/3 log 6; at temperature 2 the roots sqrt 2 : 1 : 1.
    gpt, batch = gpt_that_says([0.5, 0.25, 0.25]), pack([[2, 1]], [[0, 1]])
    logprobs, entropy = token_logprobs(gpt, batch)
    close(logprobs, [-math.log(2), -math.log(4)])
    close(entropy, [1.5 * math.log(2)] * 2)
    logprobs, entropy = token_logprobs(gpt, batch, temperature=0.5)
    close(logprobs, [math.log(2 / 3), math.log(1 / 6)])
    close(entropy, [2 / 3 * math.log(1.5) + math.log(6) / 3] * 2)
    logprobs, _ = token_logprobs(gpt, batch, temperature=2.0)
    close(logprobs, [math.log(2**0.5 / (2 + 2**0.5)), -math.log(2 + 2**0.5)])


def test_logprobs_of_all_next_tokens_sum_to_1():
    logprobs, _ = token_logprobs(tiny_gpt(), pack([[3, 5]] * 11, [[t] for t in range(11)]), 0.7)
    close(logprobs.exp().sum(), 1.0, 1e-5)


def test_an_empty_response_has_no_logprobs():
    logprobs, _ = token_logprobs(tiny_gpt(), pack([[3], [4], [5]], [[], [2, 6], []]))
    alone, _ = token_logprobs(tiny_gpt(), pack([[4]], [[2, 6]]))
    close(logprobs, alone, 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_scoring_in_chunks_changes_nothing(rows, monkeypatch):
    """Nine response tokens, `rows` at a time: values and gradients."""
    results = []
    for at_once in (2**24, rows):
        monkeypatch.setattr(model_module, "rows_at_once", lambda _, n=at_once: n)
        gpt = tiny_gpt()
        logprobs, entropy = token_logprobs(gpt, pack(PROMPTS, RESPONSES), 0.7)
        (logprobs * torch.arange(9) / 36).sum().backward()
        results.append([logprobs, entropy, *(p.grad for p in gpt.parameters())])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("prompt, response, at_once", [(40, 3, 2), (3, 40, 4)])
def test_the_logits_of_all_tokens_never_exist(prompt, response, at_once, monkeypatch):
    """Of 43 tokens only those of the response, 2 or 4 at a time: forward and backward."""
    monkeypatch.setattr(model_module, "rows_at_once", lambda _: at_once)
    gpt = tiny_gpt(vocab_size=997, block_size=43, n_embd=16)
    batch, kept = pack([[1] * prompt], [[2] * response]), []

    def keep(x):
        kept.append(x.shape)
        return x

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logprobs, _ = token_logprobs(gpt, batch)
        logprobs.sum().backward()
    assert largest.numel == 16 * 997  # the embedding, and not 40 rows of logits
    assert all(shape[1:] != (997,) for shape in kept)  # for the backward pass: none of any chunk
    assert gpt.wte.weight.grad.abs().sum() > 0


def test_the_gradient_of_logprobs():
    """Against autograd through all logits, in float64; at a temperature, in chunks of 4 rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    tokens, factors = torch.randint(9, (10,)), torch.randn(10)
    expected = (hidden[:-1].double() @ weight.double().T / 0.7).log_softmax(-1)
    expected_gradients = torch.autograd.grad(
        (expected[torch.arange(10), tokens] * factors).sum(), (hidden, weight)
    )
    network, batch = (
        mock.Mock(return_value=hidden, head_weight=weight),
        pack([[1]], [tokens.tolist()]),
    )
    with mock.patch.object(model_module, "rows_at_once", lambda _: 4):
        logprobs, entropy = token_logprobs(network, batch, 0.7)
    gradients = torch.autograd.grad((logprobs * factors).sum(), (hidden, weight))
    close(logprobs, expected[torch.arange(10), tokens], 1e-5)  # of up to 20
    close(entropy, -(expected.exp() * expected).sum(-1))
    for found, exact in zip(gradients, expected_gradients, strict=True):
        close(found, exact, 1e-5)
    assert not entropy.requires_grad


# ---- bfloat16 ----


def test_under_autocast_the_softmax_is_in_fp32():
    """#51: in bf16 a log-probability would be off by 1e-2."""
    gpt = gpt_that_says([0.5, 0.25, 0.25])
    logits = tensor([3.0, 1.25, -0.5])  # bf16 has them exactly
    gpt.wte.weight.data[:, 0] = logits
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = token_logprobs(gpt, pack([[2, 1]], [[0, 1, 2]]))
    assert logprobs.dtype == entropy.dtype == torch.float32
    close(logprobs, logits.log_softmax(0))


@torch.no_grad()
def test_under_autocast_equal_models_agree_and_scalars_are_fp32():
    """#51."""
    gpt, batch = tiny_gpt(), pack(PROMPTS, RESPONSES)
    exact, _ = token_logprobs(gpt, batch)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(gpt, batch)
        ref_logprobs, _ = token_logprobs(copy.deepcopy(gpt), batch)
        scalar = ScalarModel(gpt)
        outputs = [scalar(batch), scalar.values(batch), scalar.score(batch)]
    assert torch.equal(logprobs, ref_logprobs)
    assert 1e-4 < (logprobs - exact).abs().max() < 0.3  # bf16 was used, and is near
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in outputs)


def head_at(mean, V=5003, C=64, N=200):
    """Hidden states and a head whose logits have this mean, as the published GPT-2's have one near
    -65 (in float64: log-probabilities of drawn tokens, before and after a small step)."""
    g = torch.Generator().manual_seed(0)
    on = torch.randn(C, generator=g)  # what all hidden states have in common
    hidden = torch.randn(N, C, generator=g) + on
    weight = torch.randn(V, C, generator=g) * 3 / C**0.5 + mean * on / (on @ on)
    moved = hidden + 1e-3 * torch.randn(N, C, generator=g)
    exact = [(h.double() @ weight.double().T).log_softmax(-1) for h in (hidden, moved)]
    tokens = torch.multinomial(exact[0].exp(), 1, generator=g)[:, 0]
    return hidden, moved, weight, tokens, [x[torch.arange(N), tokens] for x in exact]


@pytest.mark.parametrize("mean", [0, -65, -100])
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_log_probabilities_in_bf16_do_not_depend_on_the_mean_logit(mean, gpu):
    """A GPU multiplies factors in bf16, which are off by a constant of the weights; the ratio of
    two policies, which PPO clips at 0.2, is off by little."""
    hidden, moved, weight, tokens, exact = head_at(mean)
    with fake_gpu() if gpu else nullcontext():
        device = "cuda" if gpu else "cpu"
        hidden, moved, weight, tokens = (x.to(device) for x in (hidden, moved, weight, tokens))
        with torch.autocast(device, torch.bfloat16):
            found = [head_logprobs(h, weight, tokens, 1.0)[0].cpu() for h in (hidden, moved)]
    errors = (found[0] - exact[0]).abs()
    off = ((found[1] - found[0]) - (exact[1] - exact[0])).expm1().abs()
    assert errors.mean() < (0.012 if gpu else 1e-5)
    assert off.mean() < (0.012 if gpu else 1e-5) and off.max() < 0.1


def test_a_product_in_bf16_would_lose_log_probabilities():
    """What the test above guards against: the share of ratios that are off by more than 0.2."""
    hidden, moved, weight, tokens, exact = head_at(-100)
    rounded = [
        (h.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1) for h in (hidden, moved)
    ]
    found = [x[torch.arange(len(tokens)), tokens] for x in rounded]
    off = ((found[1] - found[0]) - (exact[1] - exact[0])).expm1().abs()
    assert (found[0] - exact[0]).abs().mean() > 0.05 and (off > 0.2).double().mean() > 0.01


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_the_gradient_of_a_head_in_bf16(gpu):
    hidden, _, weight, tokens, _ = head_at(-65)

    def gradients(device, dtype):
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden.clone(), weight.clone()))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.float32):
            head_logprobs(h, w, tokens.to(device), 1.0)[0].sum().backward()
        assert h.grad.dtype == w.grad.dtype == dtype
        return h.grad.cpu(), w.grad.cpu()

    exact = gradients("cpu", torch.float64)
    with fake_gpu() if gpu else nullcontext():
        found = gradients("cuda" if gpu else "cpu", torch.float32)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@torch.no_grad()
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_in_bf16_sampling_and_scoring_agree_to_1e_4_nats(gpu):
    """KL of the distributions that tokens are drawn from, and those that score them: a network of
    twelve layers whose logits lie near -65, prompts at once and responses token by token."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=997, block_size=40, n_layer=12, n_head=2, n_embd=64)).eval()
    gpt.ln_f.bias.normal_(std=3.0)
    gpt.wte.weight.sub_(65 * gpt.ln_f.bias / gpt.ln_f.bias.square().sum())
    sampled, real = [], model_module.draw

    def noted(logits, *rest):
        sampled.append(logits.log_softmax(-1).cpu())
        return real(logits, *rest)

    prompts = torch.randint(997, (16, 5)).tolist()
    with fake_gpu() if gpu else nullcontext():
        gpt = gpt.to("cuda" if gpu else "cpu")
        with (
            torch.autocast("cuda" if gpu else "cpu", torch.bfloat16),
            mock.patch.object(model_module, "draw", noted),
        ):
            responses = generate(gpt, prompts, 20, 997, generator=seeded(0))
            batch = pack(prompts, responses, "cuda" if gpu else "cpu")
            logits = gpt.logits(gpt(batch)[batch.decided_at]).cpu()
    assert logits.dtype == torch.float32 and logits.mean() < -40 or gpu  # there up to a constant
    scored = logits.log_softmax(-1).view(16, 20, 997).transpose(0, 1)
    drawn = torch.stack(sampled)  # (20, 16, 997), a row for each prompt in order
    kl = (drawn.exp() * (drawn - scored)).sum(-1)
    assert kl.mean() < 1e-4


def test_scores_and_values_are_read_in_fp32():
    """In bf16 a score of 3 would be a multiple of 1/64."""
    torch.manual_seed(0)
    scalar, hidden = ScalarModel(tiny_gpt()), torch.randn(50, 32)
    scalar.head.bias.data.fill_(3.0)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found = scalar.read(hidden)
        expected = hidden.double() @ scalar.head.weight[0].double() + 3
    close(found.double(), expected)
    assert (found * 64 % 1).abs().max() > 0.1


def test_generate_runs_under_autocast():
    gpt, seed = tiny_gpt(), torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        responses = generate(gpt, PROMPTS * 9, 6, 0, generator=seed)
    assert len(responses) == 27
    for response in responses:
        assert len(response) == 6 or response[-1] == 0
        assert all(0 <= token < 11 for token in response)


def test_under_autocast_weights_are_cast_once_for_sampling(monkeypatch):
    """Autocast would cast them anew for every token."""
    gpt, low = tiny_gpt(), tiny_gpt().to(torch.bfloat16)
    low.load_state_dict(gpt.state_dict())
    expected = generate(low, PROMPTS, 6, 0, generator=torch.Generator().manual_seed(0))
    kinds = []
    real = model_module.decode_attention
    monkeypatch.setattr(
        model_module,
        "decode_attention",
        lambda *x: kinds.extend([x[0].dtype, x[1].dtype]) or real(*x),
    )
    with torch.autocast("cpu", torch.bfloat16):
        responses = generate(gpt, PROMPTS, 6, 0, generator=torch.Generator().manual_seed(0))
    assert responses == expected
    assert set(kinds) == {torch.bfloat16}  # the cache too
    assert gpt.wte.weight.dtype == torch.float32


# ---- memory ----


def test_recompute_keeps_less_and_changes_no_gradient():
    gpt, batch = tiny_gpt(n_layer=6, dropout=0.5).train(), pack(PROMPTS * 5, RESPONSES * 5)

    def pass_(recompute):
        """The bytes kept for the backward pass, but for weights; and the gradients."""
        kept, gpt.recompute = {}, recompute
        torch.manual_seed(0)

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = token_logprobs(gpt, batch)[0].sum()
        for p in gpt.parameters():
            kept.pop(p.untyped_storage().data_ptr(), None)
        gpt.zero_grad()
        loss.backward()
        return sum(kept.values()), [p.grad for p in gpt.parameters()]

    (every, gradients), (few, same) = pass_(False), pass_(True)
    assert few < every / 4
    assert all(map(torch.equal, gradients, same))


# ---- sampling: one token ----

BELOW_1 = 1 - 2.0**-24  # the largest number that torch.rand returns


@pytest.mark.parametrize(
    "temperature, top_k, counts",
    [
        (1.0, 0, [512, 256, 128, 128]),
        (1.0, 9, [512, 256, 128, 128]),  # more than there are
        (0.5, 0, [744.7, 186.2, 46.5, 46.5]),  # squares, 16 : 4 : 1 : 1
        (1.0, 2, [682.7, 341.3, 0, 0]),
        (1.0, 1, [1024, 0, 0, 0]),
        (0.0, 0, [1024, 0, 0, 0]),
    ],
)
def test_draw_gives_each_token_its_share_of_the_unit_interval(temperature, top_k, counts):
    """#7 topk_sampling, #8: 1,024 evenly spaced numbers, p = 1/2 1/4 1/8 1/8."""
    logits = tensor([0.5, 0.25, 0.125, 0.125]).log().expand(1024, 4)
    uniform = (torch.arange(1024) + 0.5) / 1024
    tokens = draw(logits, uniform, temperature, top_k)
    assert tokens.shape == (1024,) and tokens.dtype == torch.int64
    close(tokens.bincount(minlength=4).float(), counts, 1.0)


def test_draw_inverts_the_cumulative_distribution():
    # p = 1/4 1/4 1/2: tokens 0, 1 and 2 own [0, 1/4), [1/4, 1/2) and [1/2, 1)
    uniform = tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, BELOW_1])
    logits = tensor([0.25, 0.25, 0.5]).log().expand(6, 3)
    assert draw(logits, uniform, 1.0).tolist() == [0, 0, 1, 1, 2, 2]


def test_draw_never_yields_a_token_of_probability_0():
    logits = tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log()
    uniform = torch.cat([tensor([0.0, 0.5, BELOW_1]), torch.rand(2000)])
    tokens = draw(logits.expand(2003, 5), uniform, 1.0)
    assert set(tokens.tolist()) == {1, 3}
    assert tokens[:3].tolist() == [1, 3, 3]


@pytest.mark.parametrize("V", [2, 997, 50257])
def test_draw_stays_within_the_vocabulary_when_rounding_leaves_a_gap(V):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(50, V, generator=g)
    logits[:, V // 2 + 1 :] = -math.inf
    tokens = draw(logits, torch.full((50,), BELOW_1), 1.0)
    assert (tokens <= V // 2).all()


def test_draw_of_what_is_no_number_is_a_token():
    logits = tensor([[0.0, math.nan, 0.0], [math.inf, math.inf, 0.0]])
    assert all(0 <= token < 3 for token in draw(logits, torch.full((2,), 0.5), 1.0).tolist())


def test_draw_takes_rows_apart():
    logits = tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    assert draw(logits, torch.full((3,), 0.5), 1.0).tolist() == [1, 0, 2]
    assert draw(logits, torch.zeros(3), 0.0).tolist() == [1, 0, 2]
    assert logits[0].tolist() == [0, 9, 0]  # temperature is not divided in place


# ---- sampling: responses ----

MANY = [[(7 * b + 3 * i) % 11 for i in range(1 + b * 5 % 9)] for b in range(30)]  # 1 to 9 tokens
NEW = 8


@pytest.fixture
def unset_memory_is_nan():
    """torch.empty is filled with NaN, as it may be by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@functools.cache
def naive_responses(temperature, top_k):
    """A forward pass over everything for each token; token t of prompt b has uniform[b, t]. And the
    end-of-text token: the first one with which some responses end and others do not."""
    gpt = tiny_gpt()
    responses = []
    for prompt, numbers in zip(MANY, torch.rand(len(MANY), NEW, generator=seeded(3)), strict=True):
        response = []
        while len(response) < NEW:
            logits = next_logits(gpt, prompt + response).double()
            if temperature == 0:
                response.append(int(logits.argmax()))
                continue
            p = (logits / temperature).softmax(0)
            if top_k:
                p[logits < logits.sort().values[-top_k]] = 0
            cdf = (p / p.sum()).cumsum(0)
            response.append(int((cdf <= numbers[len(response)]).sum()))
        responses.append(response)
    eos = next(t for t in range(11) if 0 < sum(t in r[:-1] for r in responses) < len(MANY))
    return gpt, [r[: (*r, eos).index(eos) + 1] for r in responses], eos


@pytest.mark.usefixtures("unset_memory_is_nan")
@pytest.mark.parametrize("max_rows", [256, 7, 1])
@pytest.mark.parametrize(
    "temperature, top_k",
    [(0, 0), (1.0, 0), (0.7, 0), (1.3, 3)],
)
def test_generate_is_the_naive_loop(temperature, top_k, max_rows):
    """#4, #5, #8: thirty prompts of 1 to 9 tokens, all in the cache or a few at a time."""
    gpt, expected, eos = naive_responses(temperature, top_k)
    prompts = copy.deepcopy(MANY)
    responses = generate(
        gpt, prompts, NEW, eos, temperature, top_k, generator=seeded(3), max_rows=max_rows
    )
    assert responses == expected
    assert prompts == MANY
    assert any(r[-1] == eos and len(r) < NEW for r in responses)  # some end by themselves,
    assert any(r[-1] != eos and len(r) == NEW for r in responses)  # some are cut


def test_close_gaps_by_hand():
    """Rows 0 and 2 of five have ended: 3 and 4 take their places, in the cache too."""
    cache = torch.arange(6.0).expand(2, 2, 1, 1, 3, 6).movedim(-1, 2).contiguous()
    assert close_gaps(cache, [10, 11, 12, 13, 14], [True, False, True, False, False]) == [
        13,
        11,
        14,
    ]
    assert (cache[:, :, :3].movedim(2, -1) == tensor([3.0, 1, 4])).all()
    assert (cache[:, :, 5] == 5).all()  # a free row
    before = cache.clone()
    assert close_gaps(cache, [3, 4, 5], [False, False, True]) == [3, 4]
    assert close_gaps(cache, [3, 4], [False, False]) == [3, 4]
    assert close_gaps(cache, [3], [True]) == []
    assert cache.equal(before)


def test_a_row_is_clean_for_its_next_prompt():
    """Whatever the one before has left there: here NaN, which a weight of 0 does not stop."""
    gpt, prompts = tiny_gpt(), [[1] * 12, [1] * 12, [3, 4], [1] * 12]
    expected = generate(gpt, prompts, 4, 0, generator=seeded(0))[2]
    gpt.wpe.weight.data[8:] = math.nan  # only the third response ends before
    assert generate(gpt, prompts, 4, 0, generator=seeded(0), max_rows=2)[2] == expected


def test_sampling_shares_weights_where_nothing_has_to_change():
    gpt = tiny_gpt(dropout=0.5).train()
    copied = sampling_copy(gpt)
    pairs = zip(gpt.state_dict().values(), copied.state_dict().values(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)
    assert gpt.training and not copied.training


@pytest.mark.parametrize("eos_token", [0, 1, 2])
def test_end_of_text_ends_a_response_and_is_kept(eos_token):
    """#14: 0 is an id like any other."""
    p = [0.0, 0.0, 0.0]
    p[eos_token] = 1.0
    prompts = [[1], [eos_token, 2], [0, eos_token]]  # in a prompt it ends nothing
    assert generate(gpt_that_says(p), prompts, 5, eos_token) == [[eos_token]] * 3
    assert generate(gpt_that_says(p), prompts, 5, eos_token, temperature=0) == [[eos_token]] * 3


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_a_response_is_cut_after_max_new_tokens(max_new_tokens):
    gpt = gpt_that_says([0.0, 1.0, 0.0])
    expected = [[1] * max_new_tokens] * 2
    assert generate(gpt, [[1], [1, 2, 0]], max_new_tokens, eos_token=0) == expected


def test_what_does_not_fit_into_the_context_is_refused_and_an_empty_prompt():
    """#54."""
    gpt = tiny_gpt(block_size=8).train()
    assert len(generate(gpt, [[1], [1, 2, 3]], 5, eos_token=0)) == 2
    for prompts, new in (([[1], [1, 2, 3]], 6), ([[1], []], 2)):
        with pytest.raises(UserError):
            generate(gpt, prompts, new, eos_token=0)
    assert gpt.training


@pytest.mark.parametrize("training", [True, False])
def test_generate_samples_without_dropout_and_restores_the_mode(training):
    """#6 dropout_on."""
    _, expected, eos = naive_responses(1.0, 0)
    gpt = tiny_gpt(dropout=0.5).train(training)
    assert generate(gpt, MANY, NEW, eos, generator=seeded(3)) == expected
    assert all(module.training == training for module in gpt.modules())


def test_a_bar_counts_the_responses_that_have_ended(monkeypatch):
    bars = []

    def progress(title, total):
        bars.append((title, total, mock.MagicMock()))
        return bars[-1][2]

    monkeypatch.setattr(model_module, "progress", progress)
    generate(tiny_gpt(), MANY, NEW, 0, generator=seeded(0), max_rows=7, title="answers")
    ((title, total, bar),) = bars
    assert (title, total) == ("answers", len(MANY))
    updates = [call.args[0] for call in bar.__enter__().update.call_args_list]
    assert sum(updates) == len(MANY) and max(updates) <= 7


def test_the_generator_alone_decides():
    gpt, results = tiny_gpt(), []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        results.append(generate(gpt, MANY, NEW, 0, generator=seeded(seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1] != results[2]


def test_equal_prompts_are_answered_independently():
    responses = generate(tiny_gpt(), [[3, 5]] * 50, NEW, 0, generator=seeded(0))
    assert len(set(map(tuple, responses))) > 10


def test_top_k_1_is_greedy():
    gpt = tiny_gpt()
    greedy = generate(gpt, MANY, NEW, 0, temperature=0)
    assert generate(gpt, MANY, NEW, 0, temperature=5.0, top_k=1) == greedy


def within_6_sigma(counts, p):
    n = counts.sum()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert ((counts / n - p).abs() < 6 * (p * (1 - p) / n).sqrt()).all(), (counts / n, p)


def test_a_token_is_as_frequent_as_its_logprob_says():
    """#7 topk_sampling, #8 temp_missing, #9 end-of-text is suppressed."""
    gpt, prompt = tiny_gpt(), [3, 5]
    with torch.no_grad():
        gpt.wte.weight *= 0.3  # so that every token is drawn now and then
    sampled = generate(gpt, [prompt] * 4000, 1, 0, temperature=0.7, generator=seeded(0))
    batch = pack([prompt] * 11, [[t] for t in range(11)])
    p = token_logprobs(gpt, batch, temperature=0.7)[0].detach().exp()
    assert (p > 0.005).sum() > 5  # there is something to count
    within_6_sigma(tensor([r[0] for r in sampled]).bincount(minlength=11), p)


def test_a_response_is_as_frequent_as_the_sum_of_its_logprobs_says():
    """#8 temp_twice, #9, #35: all 15 responses of at most 3 of the tokens 0, 1 and end-of-text."""
    gpt, prompt = tiny_gpt(vocab_size=3), [0, 1, 2, 1]
    every = [[2], [0, 2], [1, 2]] + [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1, 2)]
    sampled = generate(gpt, [prompt] * 4000, 3, 2, temperature=0.7, generator=seeded(0))
    batch = pack([prompt] * 15, every)
    logprobs = token_logprobs(gpt, batch, temperature=0.7)[0].detach()
    p = torch.stack([own.sum() for own in logprobs.split(batch.lengths.tolist())]).exp()
    counts = tensor([every.index(r) for r in sampled]).bincount(minlength=15)
    within_6_sigma(counts, p)


# ---- what all stages share ----


def test_how_the_weights_start():
    """1/sqrt(C), positions 0.02, residual branches less by sqrt(2 layers), biases 0, gains 1."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=300, block_size=300, n_layer=2, n_head=1, n_embd=64))
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.dim() == 1:
            assert (p == 1).all()
        else:
            std = 0.02 if name == "wpe.weight" else 1 / 8 / (2 if "c_proj" in name else 1)
            # 4,096 numbers at least know their standard deviation to 1.1 %
            assert p.std().item() == pytest.approx(std, rel=0.065), name
            assert abs(p.mean().item()) < 6 * std / p.numel() ** 0.5


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [lr_schedule(step, 10, 3) for step in range(11)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10] == pytest.approx(0.1)
    assert lr_schedule(0, 10, 0) == 1


def test_a_step_clips_each_model_by_itself():
    # gradients 3, 4 and 0.3, 0.4: norms 5 and 0.5, of which the first is clipped to 1
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "peak_lr": lr} for lr in (1.0, 10.0)]
    (one,), (other,) = (group["params"] for group in groups)
    one.grad, other.grad = tensor([3.0, 4.0]), tensor([0.3, 0.4])
    assert clip_and_step(torch.optim.SGD(groups), 7.0, lr=0.5) == (7.0, pytest.approx([5, 0.5]))
    close(one.detach(), [-0.3, -0.4])
    close(other.detach(), [-1.5, -2.0])
    assert one.grad is None and other.grad is None


@pytest.mark.parametrize(
    "gradient, loss, message",
    [
        (math.nan, 1.0, "the loss is 1.0, the gradient of h.0.mlp.c_fc.weight"),
        (math.inf, 1.0, "the loss is 1.0, the gradient of h.0.mlp.c_fc.weight"),
        (1.0, math.nan, "the loss is nan"),
        (1.0, -math.inf, "the loss is -inf"),
    ],
)
def test_what_is_not_finite_is_refused_before_the_weights_change(gradient, loss, message):
    gpt = tiny_gpt(n_layer=1)
    before = copy.deepcopy(gpt.state_dict())
    for p in gpt.parameters():
        p.grad = torch.ones_like(p)
    gpt.h[0].mlp.c_fc.weight.grad[0, 0] = gradient
    with pytest.raises(UserError, match=message):
        clip_and_step(adam([(gpt, 0.1)]), loss)
    assert all(w.equal(before[name]) for name, w in gpt.state_dict().items())


def test_every_epoch_goes_through_all_items_in_an_order_of_its_own():
    batches = [batch_at(step, range(10), 3, 0, "x") for step in range(8)]  # 3, 3, 3 and 1 twice
    first, second = sum(batches[:4], []), sum(batches[4:], [])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_pieces_of_a_document_predict_each_of_its_tokens_once():
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    text = "Once upon a time there was a goose who had a very small hat."
    pairs = documents([text, "x"], codec, block_size=4)[:-1]  # the last is the whole of "x"
    assert all(len(first) == 1 and len(first + rest) <= 4 for first, rest in pairs)
    assert pairs[0][0] + sum((rest for _, rest in pairs), []) == codec.response(text)
    for (_, rest), (first, _) in itertools.pairwise(pairs):
        assert rest[-1:] == first


def test_an_interval_by_hand():
    # a hundred zeros and ones: the unbiased variance is 25 / 99, its root 0.50252
    expected = (0.5, 1.96 * 0.50252 / 10)
    assert mean_and_interval([0.0, 1.0] * 50) == pytest.approx(expected, abs=1e-5)


def test_a_second_signal_acts():
    # a shell may have started us with Ctrl-C ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stop_signals() as caught:
            signal.raise_signal(signal.SIGINT)
            assert caught == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_that_is_refused_removes_nothing(tmp_path):
    """The other run may be writing just now."""
    code = f"import sys; from data.folders import lock; lock({str(tmp_path)!r})\n"
    code += "print('held', flush=True); sys.stdin.read()"
    unfinished = tmp_path / ".checkpoint.pt.1.tmp"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        unfinished.touch()
        with pytest.raises(UserError, match="in use by another run"):
            lock(tmp_path)
        assert unfinished.exists()
        other.communicate("")
