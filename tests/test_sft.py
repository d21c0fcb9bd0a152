"""The fine-tuning loss, that it does not depend on how a batch is cut, and what a run trains on."""

import functools
import math
from pathlib import Path

import sft
from data import toy
from data.processes import shuffled
from data.records import UserError, save_records
from data.run import Run
from data.tokenizer import Codec, Pair, documents, get_tokenizer
from model import GPT, GPTConfig, ScalarModel, adam, clip_and_step, pack
from sft import sft_loss

import pytest
import torch
from torch import tensor

EOS, TOY = 0, get_tokenizer("toy")
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


@pytest.mark.parametrize("max_tokens", [100, 12, 1])
def test_the_held_out_loss_weighs_micro_batches_by_their_tokens(max_tokens):
    model, pairs = tiny_gpt(), list(zip(PROMPTS, RESPONSES, strict=True))
    with torch.no_grad():
        whole = sft_loss(model, pack(PROMPTS, RESPONSES)).item()
    config = sft.Config(device="cpu", max_tokens=max_tokens)
    assert sft.mean_loss(model, pairs, config) == pytest.approx(whole, abs=1e-6)


# ---- one step of training ----


@pytest.fixture
def step(monkeypatch, tmp_path):
    """The change of every weight, the loss, the norm and the number of micro-batches of a step of
    SGD at learning rate 1 on all three responses: the change is the gradient."""

    def run_one(max_tokens=100, clip=1e9):
        model, count = tiny_gpt(), []
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "peak_lr": 1.0}])
        config = sft.Config(device="cpu", max_tokens=max_tokens)
        codec = Codec(get_tokenizer("toy"), "{prompt}")
        run = Run("sft", config, tmp_path, model.config, codec, optimizer, model=model)
        loss = sft.sft_loss
        monkeypatch.setattr(sft, "sft_loss", lambda *x: count.append(x) or loss(*x))
        monkeypatch.setattr(sft, "clip_and_step", functools.partial(clip_and_step, clip=clip))
        monkeypatch.setattr(sft, "mean_loss", lambda *_: 0.0)
        monkeypatch.setattr(sft, "answer", lambda *_: [])
        pairs = list(zip(PROMPTS, RESPONSES, strict=True))
        metrics = sft.train(run, pairs[:1], pairs, epochs=1, batch_size=3, asked=[])
        change = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        monkeypatch.undo()
        return change, metrics["loss"], metrics["grad_norm"], len(count)

    return run_one


def test_a_step_follows_the_gradient_of_the_loss(step):
    model = tiny_gpt()
    loss = sft_loss(model, pack(PROMPTS, RESPONSES))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    change, stepped_loss, norm, count = step()
    assert count == 1 and stepped_loss == pytest.approx(loss.item(), abs=1e-6)
    assert norm == pytest.approx(sum(g.square().sum() for g in expected).sqrt().item(), rel=1e-5)
    for own, gradient in zip(change, expected, strict=True):
        torch.testing.assert_close(own, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_tokens, cuts", [(15, 2), (12, 2), (1, 3)])
def test_micro_batches_change_nothing(max_tokens, cuts, step):
    """#39 microbatch_mean_of_means, #52: responses of 3, 1 and 5 tokens, whole and cut. All are
    clipped as one."""
    whole, whole_loss, whole_norm, _ = step()
    for share in (1, 0.5):
        parts, loss, norm, count = step(max_tokens, clip=share * whole_norm * (1 + 1e-6))
        assert count == cuts and loss == pytest.approx(whole_loss, abs=1e-6)
        assert norm == pytest.approx(whole_norm, rel=1e-5)
        for own, other in zip(parts, whole, strict=True):
            torch.testing.assert_close(own, other * share, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [100, 12])
def test_several_epochs_are_those_of_a_plain_loop(max_tokens, monkeypatch, tmp_path):
    """Two responses a step, the last one alone; and what is measured when."""
    pairs, held_out = list(zip(PROMPTS, RESPONSES, strict=True)), [([1, 2], [3, 4, EOS])]
    model, plain = tiny_gpt(), tiny_gpt()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "peak_lr": 0.1}])
    flags = {"seed": 3, "max_tokens": max_tokens, "device": "cpu"}
    codec, config = Codec(get_tokenizer("toy"), "{prompt}"), sft.Config(**flags)
    run = Run("sft", config, tmp_path, model.config, codec, optimizer, model=model)
    monkeypatch.setattr(sft, "answer", lambda run, prompts, step: [codec.response(f"{step}")])
    last = sft.train(run, held_out, pairs, epochs=21, batch_size=2, asked=["Why?"])
    losses, measured = [], []
    for step in range(42):
        epoch, i = divmod(step, 2)
        chosen = [pairs[b] for b in shuffled(range(3), 3, "sft", epoch)[2 * i :][:2]]
        loss = sft_loss(plain, pack(*map(list, zip(*chosen, strict=True))))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        with torch.no_grad():
            for p in plain.parameters():
                p -= 0.1 * (0.55 + 0.45 * math.cos(math.pi * step / 42)) * p.grad
                p.grad = None
            losses.append(loss.item())
            measured.append(sft_loss(plain, pack([[1, 2]], [[3, 4, EOS]])).item())
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=0)
    assert [row["loss"] for row in run.metrics] == pytest.approx(losses, abs=1e-4)
    # a quarter of the steps is ten, and the last step counts
    times = [row["step"] for row in run.metrics if "held_out_loss" in row]
    assert times == [0, 10, 20, 30, 40, 41]
    found = [run.metrics[step]["held_out_loss"] for step in times]
    assert found == pytest.approx([measured[step] for step in times], abs=1e-4)
    assert last == run.metrics[-1]
    blocks = "".join(f"[step {step}] Why?\n{step}\n\n" for step in times)
    assert (tmp_path / "samples.txt").read_text() == blocks


@pytest.mark.parametrize("stage, judged", [("sft", [1, 3, 5]), ("base", [])])
def test_an_epoch_is_judged_when_it_ends(stage, judged, monkeypatch, tmp_path):
    pairs, model, codec = (
        list(zip(PROMPTS, RESPONSES, strict=True)),
        tiny_gpt(),
        Codec(TOY, "{prompt}"),
    )
    config, epochs = sft.Config(device="cpu", reward_model="here"), []
    run = Run(stage, config, tmp_path, model.config, codec, adam([(model, 0.0)]), model=model)
    monkeypatch.setattr(sft, "answer", lambda *_: [])
    monkeypatch.setattr(
        sft, "judge_epoch", lambda run, held_out: epochs.append((run.step, held_out))
    )
    sft.train(run, pairs[:1], pairs, epochs=3, batch_size=2, asked=[])
    assert epochs == [(step, pairs[:1]) for step in judged]


def test_an_answer_fits_into_the_context_behind_its_cut_prompt(tmp_path):
    """At most 80 tokens, or half of a small context."""
    codec, gpt = Codec(get_tokenizer("toy"), "{prompt}"), tiny_gpt()
    own = (gpt.config, codec, adam([(gpt, 0.0)]))
    run = Run("sft", sft.Config(device="cpu"), tmp_path, *own, model=gpt)
    answers = sft.answer(run, [[1] * 5 + [2] * 12, [3]], "here")
    assert [len(tokens) for tokens in answers] == [12, 12]  # of 24; end of text is not drawn
    assert answers == sft.answer(run, [[2] * 12, [3]], "here")
    assert answers != sft.answer(run, [[2] * 12, [3]], "there")


def test_a_response_ends_and_its_prompt_is_cut_from_the_left():
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    assert codec.response("The end.")[-1] == codec.eos not in codec.prompt("The end.")
    assert codec.text(codec.response("The end.")) == "The end."
    prompt = codec.prompt("Tell me a story about a goose.")
    assert codec.prompt("Tell me a story about a goose.", 4) == prompt[-4:]
    assert codec.prompt("Tell me a story about a goose.", len(prompt)) == prompt
    with pytest.raises(UserError, match="2 tokens too small"):
        codec.prompt("Tell me a story about a goose.", -1)


# ---- a run: 40 demonstrations, 4 pages mixed in, 4 of the 40 held out ----


def fine_tuning(base: str, folder: Path, **flags) -> sft.Config:
    small = {"toy_demonstrations": 40, "toy_texts": 60, "batch_size": 8, "epochs": 2}
    return sft.Config(init=base, out=str(folder), held_out=0.1, **small | flags)


def test_what_both_stages_are_given(monkeypatch, tmp_path, capsys):
    """Pretraining on pieces of documents, then fine-tuning on demonstrations that fit."""
    given, sizes = [], {"n_layer": 1, "n_head": 2, "n_embd": 6, "block_size": 12}

    def train(run, held_out, pairs, epochs, batch_size, asked):
        model, (group,) = run.modules["model"], run.optimizer.param_groups
        given.append((run.stage, held_out, pairs, epochs, batch_size, group["peak_lr"], asked))
        given[-1] += (model.config, str(run.folder), model.wpe.weight.clone())
        run.save()
        return {"held_out_loss": len(given) / 8}

    monkeypatch.setattr(sft, "train", train)
    texts = [{"text": "once upon a time there was a very small hat"}] * 5
    rows = [{"prompt": f"{i} why", "response": "b"} for i in range(9)]
    rows += [{"prompt": "c", "response": "much too long for this context " * 9}]
    save_records(tmp_path / "texts.jsonl", texts)
    save_records(tmp_path / "rows.jsonl", rows)
    files = {"texts": str(tmp_path / "texts.jsonl"), "out": str(tmp_path / "sft")}
    files |= {"demonstrations": str(tmp_path / "rows.jsonl"), "base": str(tmp_path / "base")}
    flags = {"pretrain_epochs": 3, "pretrain_batch_size": 5, "pretrain_lr": 0.25, "epochs": 4}
    flags |= {"batch_size": 6, "lr": 0.5, "held_out": 0.25, "dropout": 0.1, "pretrain_mix": 0.5}
    found = sft.main(sft.Config(device="cpu", template="Q {prompt}", **sizes, **files, **flags))
    assert found == {"base": {"held_out_loss": 0.125}, "sft": {"held_out_loss": 0.25}}
    base, tuned = given
    codec = Codec(get_tokenizer("toy"), "Q {prompt}")
    pieces = documents([row["text"] for row in texts], codec, 12)
    assert len(base[1]) == len(pieces) // 4 and sorted(base[1] + base[2]) == sorted(pieces)
    assert base[1] + base[2] != pieces  # shuffled
    asked = ["0 why", "1 why", "2 why"]
    assert base[3:7] == (3, 5, 0.25, asked) and tuned[3:7] == (4, 6, 0.5, asked)
    pairs = [(codec.prompt(row["prompt"]), codec.response("b")) for row in rows[:9]]
    assert tuned[1] == pairs[:2]  # a quarter of nine
    assert tuned[2] == pairs[2:] + pieces[:4]  # half of nine is four: 4.5 is rounded to even
    for stage, dropout in ((base, 0.0), (tuned, 0.1)):
        assert stage[7] == GPTConfig(codec.tokenizer.n_vocab, 12, 1, 2, 6, dropout)
    assert [stage[8] for stage in given] == [files["base"], files["out"]]
    assert tuned[9].equal(base[9])  # it goes on from the base model
    out = capsys.readouterr().out
    assert "base: held-out loss 0.125 nats per token\nsft: held-out loss 0.250" in out
    sft.main(sft.Config(device="cpu", init=files["base"], **{**files, "out": str(tmp_path / "x")}))
    assert given[2][0] == "sft" and given[2][9].equal(base[9])


def test_the_toy_world_is_that_of_the_seed(monkeypatch, tmp_path):
    given, sizes = [], {"n_layer": 1, "n_head": 1, "n_embd": 4}

    def train(run, held_out, pairs, *_):
        given.append(held_out + pairs)
        run.save()
        return {"held_out_loss": 0.0}

    monkeypatch.setattr(sft, "train", train)
    files = {"out": str(tmp_path / "sft"), "base": str(tmp_path / "base"), "device": "cpu"}
    numbers = {"toy_texts": 30, "toy_demonstrations": 20, "seed": 4, "pretrain_mix": 0.1}
    sft.main(sft.Config(**files, **sizes, **numbers))
    codec = Codec(get_tokenizer("toy"), "{prompt}\\n")
    pieces = documents(toy.pages(30, 4), codec, 256)
    assert sorted(given[0]) == sorted(pieces)
    rows = toy.demonstrations(20, 4)
    pairs = [(codec.prompt(row["prompt"]), codec.response(row["response"])) for row in rows]
    assert given[1] == pairs + pieces[:2]


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

    def count(run: Run, held_out: list[Pair], training: list[Pair], *_) -> dict[str, float]:
        counts.append(len(held_out) + len(training))
        return {"held_out_loss": 0.0}

    monkeypatch.setattr(sft, "train", count)
    sft.main(fine_tuning(tiny_base, tmp_path, pretrain_mix=mix))
    assert counts == [pairs_in_all]


def test_a_prompt_is_on_one_side_of_the_split(tiny_base, monkeypatch, tmp_path):
    split = []
    monkeypatch.setattr(sft, "train", lambda run, *x: split.extend(x[:2]) or {"held_out_loss": 0.0})
    rows = [{"prompt": prompt, "response": "?"} for prompt in "abcdefghia"]
    save_records(rows_file := tmp_path / "rows.jsonl", rows)
    sft.main(fine_tuning(tiny_base, tmp_path / "out", demonstrations=str(rows_file)))
    codec = Codec.load(tiny_base)
    prompts = [sorted(codec.text(prompt).strip() for prompt, _ in pairs) for pairs in split]
    assert prompts == [["a", "a"], list("bcdefghi")]
    monkeypatch.undo()
    save_records(rows_file, rows[:1])
    with pytest.raises(UserError, match="none is left to train on"):
        sft.main(fine_tuning(tiny_base, tmp_path / "out", demonstrations=str(rows_file)))


def test_every_step_draws_a_dropout_of_its_own(tiny_base, monkeypatch, tmp_path):
    seeds = []
    monkeypatch.setattr(
        sft, "clip_and_step", lambda *x: seeds.append(torch.initial_seed()) or clip_and_step(*x)
    )
    sft.main(fine_tuning(tiny_base, tmp_path, dropout=0.1))
    assert len(set(seeds)) == len(seeds) == 10  # two epochs of 40 pairs, 8 a step


def test_the_kept_weights_are_those_of_the_best_epoch(tiny_base, monkeypatch, tmp_path, capsys):
    gpt, codec, score = GPT.load(tiny_base), Codec.load(tiny_base), [0.0]
    monkeypatch.setattr(sft.ScalarModel, "load", lambda folder: ScalarModel(gpt))
    prompts = []

    def noted_score(self, batch):
        prompts.append(batch.tokens[~batch.is_response].tolist())
        return tensor(score)

    monkeypatch.setattr(sft.ScalarModel, "score", noted_score)
    config = sft.Config(device="cpu", reward_model="here")
    run = Run("sft", config, tmp_path, gpt.config, codec, adam([(gpt, 0.0)]), model=gpt)
    scores = [0.1, 0.9, 0.5]
    for epoch in run.steps(3):
        gpt.wpe.weight.data.fill_(epoch + 1)
        score[0] = scores[epoch]
        run.log({"loss": 0.0})
        sft.judge_epoch(run, [([1, 2], [3])])
    assert prompts == [[1, 2]] * 3
    losses = [line["held_out_loss"] for line in run.metrics]
    assert [line["reward_score"] for line in run.metrics] == pytest.approx(scores)
    sft.keep_best_epoch(run)
    assert (gpt.wpe.weight == 2).all() and (GPT.load(tmp_path).wpe.weight == 2).all()
    assert run.metrics[-1]["reward_score"] == pytest.approx(0.9)
    assert run.metrics[-1]["held_out_loss"] == losses[1]
    out, fitted = capsys.readouterr().out, losses.index(min(losses))
    assert f"best by reward score: epoch 2, score 0.900, loss {losses[1]:.3f}" in out
    line = f"epoch {fitted + 1}, score {scores[fitted]:.3f}, loss {losses[fitted]:.3f}"
    assert f"best by held-out loss: {line}" in out


def test_a_long_prompt_is_cut_for_the_reward_model_as_for_the_answer(
    tiny_base, monkeypatch, tmp_path
):
    gpt, codec = GPT.load(tiny_base), Codec.load(tiny_base)
    monkeypatch.setattr(sft.ScalarModel, "load", lambda folder: ScalarModel(gpt))
    config = sft.Config(device="cpu", reward_model="here")
    run = Run("sft", config, tmp_path, gpt.config, codec, adam([(gpt, 0.0)]), model=gpt)
    for _ in run.steps(1):
        run.log({"loss": 0.0})
        sft.judge_epoch(run, [([1] * 254, [3])])  # of 256 tokens
    assert math.isfinite(run.metrics[0]["reward_score"])
