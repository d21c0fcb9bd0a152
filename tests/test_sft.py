"""The fine-tuning loss, that it does not depend on how a batch is cut, and what a run trains on."""

import math
from pathlib import Path

import pytest
import torch
from torch import tensor

import sft
from data.tokenizer import get_tokenizer
from model import GPT, Codec, GPTConfig, Pair, Run, ScalarModel, fit, optimizer_step, pack
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


# ---- a run: 40 demonstrations, 4 pages mixed in, 4 of the 44 held out ----


def fine_tuning(base: str, folder: Path, **flags) -> sft.Config:
    small = {"toy_demonstrations": 40, "toy_texts": 60, "batch_size": 8, "epochs": 2}
    return sft.Config(init=base, out=str(folder), held_out=0.1, **small | flags)


def test_what_is_held_out_is_not_trained_on(tiny_base, monkeypatch, tmp_path):
    trained, measured = set(), set()  # identities, since equal pairs may lie on both sides
    batch_at, mean_loss = sft.batch_at, sft.mean_loss

    def noted_batch(*place) -> list[Pair]:
        chosen = batch_at(*place)
        trained.update(map(id, chosen))
        return chosen

    def noted_loss(model: GPT, pairs: list[Pair], config: sft.Config) -> float:
        measured.update(map(id, pairs))
        return mean_loss(model, pairs, config)

    monkeypatch.setattr(sft, "batch_at", noted_batch)
    monkeypatch.setattr(sft, "mean_loss", noted_loss)
    sft.main(fine_tuning(tiny_base, tmp_path))
    assert len(trained) == 40 and len(measured) == 4
    assert trained.isdisjoint(measured)


@pytest.mark.parametrize("mix, pairs_in_all", [(0.0, 40), (0.1, 44), (0.5, 60)])
def test_documents_are_mixed_in_by_the_demonstration(
    mix, pairs_in_all, tiny_base, monkeypatch, tmp_path
):
    counts = []

    def count(run: Run, pairs: list[Pair], *_) -> dict[str, float]:
        counts.append(len(pairs))
        return {"held_out_loss": 0.0}

    monkeypatch.setattr(sft, "train", count)
    sft.main(fine_tuning(tiny_base, tmp_path, pretrain_mix=mix))
    assert counts == [pairs_in_all]


def test_every_step_draws_a_dropout_of_its_own(tiny_base, monkeypatch, tmp_path):
    seeds, step = [], sft.optimizer_step
    monkeypatch.setattr(
        sft, "optimizer_step", lambda *x: seeds.append(torch.initial_seed()) or step(*x)
    )
    sft.main(fine_tuning(tiny_base, tmp_path, dropout=0.1))
    assert len(set(seeds)) == len(seeds) == 10  # two epochs of 40 pairs, 8 a step


def test_the_kept_weights_are_those_of_the_best_epoch(tiny_base, monkeypatch):
    gpt, codec = GPT.load(tiny_base), Codec.load(tiny_base)
    monkeypatch.setattr(sft.ScalarModel, "load", lambda folder: ScalarModel(gpt))
    selection = sft.Selection("", codec, sft.Config(device="cpu"))
    for epoch, score in enumerate((0.1, 0.9, 0.5), start=1):
        gpt.wpe.weight.data.fill_(epoch)
        monkeypatch.setattr(
            selection.reward_model, "score", lambda batch, score=score: tensor([score])
        )
        selection.judge(gpt, [([1, 2], [3])])
    assert selection.load_best(gpt)["epoch"] == 2
    assert (gpt.wpe.weight == 2).all()
