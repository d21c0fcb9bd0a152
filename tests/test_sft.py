"""The fine-tuning loss, and that it does not depend on how a batch is cut."""

import math

import pytest
import torch
from torch import tensor

from data.tokenizer import get_tokenizer
from model import GPT, Codec, GPTConfig, fit, optimizer_step, pack
from sft import sft_loss

EOS = 0
PROMPTS = [[3, 5], [7], [1, EOS, 4, 4, 9]]
RESPONSES = [[2, 8, EOS], [EOS], [11, 12, 2, 2, 6]]


def tiny_gpt():
    """A small GPT whose every parameter, biases and layer-norm gains included, is random."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=13, block_size=24, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return gpt.eval()


def gpt_that_says(probabilities):
    """A GPT with this distribution at every position."""
    gpt = GPT(GPTConfig(len(probabilities), block_size=24, n_layer=1, n_head=1, n_embd=4)).eval()
    with torch.no_grad():
        gpt.ln_f.weight.zero_()
        gpt.ln_f.bias.copy_(tensor([1.0, 0, 0, 0]))  # the hidden state of every position
        gpt.wte.weight[:, 0] = tensor(probabilities).log()
    return gpt


def negative_log_likelihoods(model, prompt, response):
    """Of each response token, by a forward pass over just the tokens before it."""
    nll = []
    for t, token in enumerate(response):
        hidden = model(pack([prompt + response[:t]], [[]]))[-1]
        nll.append(-(model.wte.weight @ hidden).log_softmax(-1)[token])
    return torch.stack(nll)


def test_loss_by_hand():
    """#13 sft_prompt_loss: of tokens 2 and 0 after the prompt 1 1 0, (log 4 + log 2) / 2."""
    model = gpt_that_says([0.5, 0.25, 0.25])
    loss = sft_loss(model, pack([[1, 1, 0]], [[2, EOS]]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_end_of_text_is_a_target():
    """#12 sft_pad_equals_eos, #10 eos_excluded_from_mask."""
    # p(EOS) = .1: alone it costs log 10; behind a token of probability .6, the mean of both
    model = gpt_that_says([0.1, 0.6, 0.3])
    assert sft_loss(model, pack([[1]], [[EOS]])).item() == pytest.approx(math.log(10), abs=1e-6)
    both = (math.log(10) - math.log(0.6)) / 2
    assert sft_loss(model, pack([[1]], [[1, EOS]])).item() == pytest.approx(both, abs=1e-6)


def test_the_mean_is_over_tokens_not_over_responses():
    """#39 mean_of_sequence_means."""
    # three tokens of log 2, one of log 4: 5 log 2 / 4, where the mean of means is 3 log 2 / 2
    model = gpt_that_says([0.5, 0.25, 0.25])
    loss = sft_loss(model, pack([[1], [2, 2]], [[0, 0, 0], [1]]))
    assert loss.item() == pytest.approx(1.25 * math.log(2), abs=1e-6)


def test_loss_and_gradient_against_one_forward_pass_a_token():
    """#1 and #13 sft_no_shift, on a batch of unequal lengths."""
    gradients, losses = [], []
    for packed in (True, False):
        model = tiny_gpt()
        if packed:
            loss = sft_loss(model, pack(PROMPTS, RESPONSES))
        else:
            pairs = zip(PROMPTS, RESPONSES, strict=True)
            loss = torch.cat([negative_log_likelihoods(model, p, r) for p, r in pairs]).mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for packed, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, naive, atol=1e-5, rtol=1e-4)


def test_only_the_positions_that_decide_a_response_token_have_a_gradient():
    """#13 sft_prompt_loss."""
    # 5, 2 and 10 tokens; prompts of 2, 1 and 5. Position 1 decides the token at 2, ..., and the
    # last token of a sequence decides nothing.
    model, hidden = tiny_gpt(), []
    model.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    loss = sft_loss(model, pack(PROMPTS, RESPONSES))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.shape == (17, 16)
    decides = [1, 2, 3, 5, 11, 12, 13, 14, 15]
    assert (gradient.abs().sum(1) > 0).nonzero()[:, 0].tolist() == decides


def test_the_loss_of_a_batch_weighs_its_parts_by_their_tokens():
    model = tiny_gpt()
    with torch.no_grad():
        whole = sft_loss(model, pack(PROMPTS, RESPONSES))
        parts = [
            sft_loss(model, pack([p], [r])) * len(r)
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    torch.testing.assert_close(sum(parts) / 9, whole, atol=1e-6, rtol=0)


# ---- one optimiser step ----


def step(model, cuts, clip=1e9):
    """SGD at learning rate 1, so that the change is the gradient. Returns it, loss and norm."""
    before = [p.detach().clone() for p in model.parameters()]
    group = {"params": list(model.parameters()), "lr": 1.0, "peak_lr": 1.0}
    batches = [pack(PROMPTS[i:j], RESPONSES[i:j]) for i, j in cuts]
    losses = ((sft_loss(model, batch), int(batch.lengths.sum())) for batch in batches)
    total = sum(int(batch.lengths.sum()) for batch in batches)
    loss, norms = optimizer_step(torch.optim.SGD([group]), losses, total, clip=clip)
    change = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    return change, loss, norms[0]


@pytest.mark.parametrize("cuts", [[(0, 1), (1, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]])
def test_micro_batches_change_nothing(cuts):
    """#39 microbatch_mean_of_means: responses of 3, 1 and 5 tokens, whole and cut."""
    whole, whole_loss, whole_norm = step(tiny_gpt(), [(0, 3)])
    parts, loss, norm = step(tiny_gpt(), cuts)
    assert loss == pytest.approx(whole_loss, abs=1e-6)
    assert norm == pytest.approx(whole_norm, rel=1e-5)
    for own, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_a_step_follows_the_gradient_of_the_loss():
    model = tiny_gpt()
    loss = sft_loss(model, pack(PROMPTS, RESPONSES))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    change, stepped_loss, norm = step(model, [(0, 3)])
    assert stepped_loss == pytest.approx(loss.item(), abs=1e-6)
    assert norm == pytest.approx(sum(g.square().sum() for g in expected).sqrt().item(), rel=1e-5)
    for own, gradient in zip(change, expected, strict=True):
        torch.testing.assert_close(own, gradient, atol=1e-6, rtol=1e-5)


def test_the_gradient_of_all_micro_batches_is_clipped_as_one():
    """#52."""
    whole, _, norm = step(tiny_gpt(), [(0, 3)])
    clipped, _, norm_before = step(tiny_gpt(), [(0, 1), (1, 3)], clip=norm / 2)
    assert norm_before == pytest.approx(norm, rel=1e-5)
    for own, other in zip(clipped, whole, strict=True):
        torch.testing.assert_close(own, other / 2, atol=1e-6, rtol=1e-4)


def test_a_response_ends_and_its_prompt_is_cut_from_the_left():
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    assert codec.response("The end.")[-1] == codec.eos not in codec.prompt("The end.")
    assert codec.text(codec.response("The end.")) == "The end."
    assert fit([1, 2, 3, 4], [5, 6], 4) == ([3, 4], [5, 6])
    assert fit([1, 2], [5, 6], 4) == ([1, 2], [5, 6])
