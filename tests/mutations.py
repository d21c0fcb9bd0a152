"""Injects known bugs into a copy of the code, one at a time, and shows that the tests see each.

    python tests/mutations.py             # all; about 30 minutes on one core, a line for each bug
    python tests/mutations.py kl_sign     # those whose name contains this

Many of the bugs have stood in a published implementation. A test of its own makes sure that each of
them can still be put into the code as it is.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PPO, MODEL, REWARD, SFT, RUNS = "ppo", "model", "reward", "sft", "pipeline"  # tests/test_*.py
MANY, CHECK, WEIGHTS = "many", "self_check", "weights"
R_T = "rewards = -kl_coef * (logprobs - ref_logprobs)"
SCORE = "return self.read(self.gpt(batch)[batch.cu_seqlens[1:].long() - 1])"
POLICY = "return torch.max(-advantages * ratio, -advantages * clipped).mean()"
RANKING = "losses.append(-F.logsigmoid(r[:, None] - r[None, :])[better].mean())"
SFT_LOSS = "return -token_logprobs(model, batch)[0].mean()"
WHITENED = "whiten(advantages), returns)"
OWN_SHARES = "[int(n.sum()) for n in lengths.chunk(rank_and_world()[1])]"
REFERENCE = "ref_policy = GPT.load(config.sft).to(device).eval()"
UNSEEN = "unseen = torch.arange(slots, device=n.device) > n[:, None]"
# fmt: off
BUGS = [  # name, the tests that must see it, file, correct code, wrong code
    # rewards and advantages
    ("kl_sign", PPO, "ppo.py", R_T, R_T.replace("-kl", "kl")),
    ("kl_mean_per_response", PPO, "ppo.py", R_T, f"{R_T} / lengths.repeat_interleave(lengths)"),
    ("kl_absolute", PPO, "ppo.py", R_T, f"{R_T}.abs()"),
    ("kl_written_over_logprobs", PPO, "ppo.py", R_T,
     "rewards = logprobs.sub_(ref_logprobs) * -kl_coef"),
    ("score_at_first_token", PPO, "ppo.py", "lengths.cumsum(0) - 1, scores",
     "lengths.cumsum(0) - lengths, scores"),
    ("score_at_every_token", PPO, "ppo.py",
     "return rewards.index_add(0, lengths.cumsum(0) - 1, scores)",
     "return rewards + scores.repeat_interleave(lengths)"),
    ("missing_end_ignored", PPO, "ppo.py", "torch.where(ended == 1, scores,",
     "torch.where(ended < 2, scores,"),
    ("gae_crosses_the_end", PPO, "ppo.py", "if t in last else", "if t == len(r) - 1 else"),
    ("lam_missing", PPO, "ppo.py", "gamma * lam * next_advantage", "gamma * next_advantage"),
    ("gamma_missing", PPO, "ppo.py", "r[t] + gamma * next_value", "r[t] + next_value"),
    ("returns_without_values", PPO, "ppo.py", "result, result + values.detach()", "result, result"),
    ("returns_carry_gradient", PPO, "ppo.py", "result + values.detach()", "result + values"),
    ("whiten_unbiased", PPO, "ppo.py", "unbiased=False", "unbiased=True"),
    ("whiten_keeps_mean", PPO, "ppo.py", "whitened if shift", "whitened if not shift"),
    ("advantages_not_whitened", PPO, "ppo.py", WHITENED, "advantages, returns)"),
    ("whiten_by_process", MANY, "ppo.py", WHITENED,
     f"torch.cat([whiten(x) for x in advantages.split({OWN_SHARES})]), returns)"),
    ("kl_controller_unclipped", PPO, "ppo.py", "min(max(kl / target - 1, -0.2), 0.2)",
     "kl / target - 1"),
    ("kl_controller_inverted", PPO, "ppo.py", "max(kl / target - 1",
     "max(target / kl - 1"),
    ("k3_sign", PPO, "ppo.py", "(log_ratio.expm1() - log_ratio)",
     "((-log_ratio).expm1() + log_ratio)"),
    # the clipped objectives
    ("ratio_inverted", PPO, "ppo.py", "(logprobs - old_logprobs).exp()\n    clipped",
     "(old_logprobs - logprobs).exp()\n    clipped"),
    ("policy_min_for_max", PPO, "ppo.py", POLICY, POLICY.replace("max", "min")),
    ("policy_clip_only", PPO, "ppo.py", POLICY, "return (-advantages * clipped).mean()"),
    ("policy_sum", PPO, "ppo.py", POLICY, POLICY.replace("mean", "sum")),
    ("advantage_sign", PPO, "ppo.py", POLICY, POLICY.replace("-adv", "adv")),
    ("value_without_half", PPO, "ppo.py", "return 0.5 * torch.max", "return torch.max"),
    ("value_min_for_max", PPO, "ppo.py", "0.5 * torch.max", "0.5 * torch.min"),
    ("value_clipped_around_the_batch", PPO, "ppo.py",
     "old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)",
     "values.clamp(old_values.min() - cliprange_value, old_values.max() + cliprange_value)"),
    ("value_unclipped", PPO, "ppo.py", "torch.max((values - returns) ** 2, (clipped - returns)",
     "torch.max((values - returns) ** 2, (values - returns)"),
    ("old_logprobs_anew", RUNS, "ppo.py", "policy = policy_loss(logprobs, old_logprobs,",
     "policy = policy_loss(logprobs, logprobs.detach(),"),
    ("log_ratio_of_other_rows", PPO, "ppo.py", "        at += n\n", "        at += 0\n"),
    ("a_minibatch_all_epochs", PPO, "ppo.py", "order = shuffled(range(len(known)), *seed, epoch)",
     "order = [0] * len(known)"),
    ("ptx_scaled_by_its_tokens", PPO, "ppo.py",
     "config.ptx_coef * total / sum(len(rest) for _, rest in drawn)", "config.ptx_coef"),
    ("average_swapped", PPO, "ppo.py", "lerp_(weight, 1 - decay)", "lerp_(weight, decay)"),
    ("best_of_n_bound", PPO, "ppo.py", "math.log(n) - (n - 1) / n", "math.log(n) - n / (n - 1)"),
    ("reference_is_the_policy", RUNS, "ppo.py", REFERENCE, "ref_policy = policy"),
    ("temperature_in_sampling_only", RUNS, "ppo.py",
     "logprobs, entropy = token_logprobs(models.policy, batch, config.temperature)",
     "logprobs, entropy = token_logprobs(models.policy, batch, 0.9)"),
    ("temperature_not_in_the_reference", PPO, "ppo.py",
     "token_logprobs(models.ref_policy, batch, config.temperature)",
     "token_logprobs(models.ref_policy, batch)"),
    ("same_samples_every_iteration", PPO, "ppo.py", "generator(*my_place(*seed))",
     "generator(*my_place(*seed[:2]))"),
    # the comparison
    ("temperature_not_in_the_measured_kl", PPO, "ppo.py",
     "token_logprobs(self.sft, batch, self.config.temperature)",
     "token_logprobs(self.sft, batch)"),
    ("ppo_trains_on_held_out_prompts", PPO, "ppo.py",
     "load_prompts(config.prompts)[: -config.eval_prompts]", "load_prompts(config.prompts)"),
    ("a_tie_is_a_win", PPO, "ppo.py", "(own > other) / 2 + (own >= other) / 2",
     "float(own >= other)"),
    ("human_win_rate_reversed", PPO, "ppo.py",
     "(ranks[i] < ranks[sft]) / 2 + (ranks[i] <= ranks[sft]) / 2",
     "(ranks[i] > ranks[sft]) / 2 + (ranks[i] >= ranks[sft]) / 2"),
    ("interval_of_90_percent", MODEL, "model.py", "1.96 * x.std()", "1.64 * x.std()"),
    ("best_of_the_last_n", PPO, "ppo.py", "scores[:, :n].max(1)", "scores[:, -n:].max(1)"),
    ("prompted_answer_not_cut", PPO, "ppo.py", "self.codec.response(toy.cut_answer(text))",
     "self.codec.response(text)"),
    ("pretraining_loss_of_seen_pages", PPO, "ppo.py", "toy.pages(300, -1)",
     "toy.pages(300, config.seed)"),
    # reward model and fine-tuning
    ("ranking_sum", REWARD, "reward.py", RANKING, RANKING.replace("mean", "sum")),
    ("ranking_normalised_twice", REWARD, "reward.py", RANKING,
     RANKING.replace(".mean()", ".mean() / max(1, int(better.sum()))")),
    ("ranking_counts_ties", REWARD, "reward.py", "[:, None] < rank[", "[:, None] <= rank["),
    ("ranking_reversed", REWARD, "reward.py", "[:, None] < rank[", "[:, None] > rank["),
    ("log_of_sigmoid", REWARD, "reward.py", "-F.logsigmoid(r[:, None] - r[None, :])",
     "-(r[:, None] - r[None, :]).sigmoid().log()"),
    ("no_pair_without_gradient", REWARD, "reward.py", "else 0 * scores.sum()",
     "else torch.tensor(0.0)"),
    ("not_centred", RUNS, "reward.py", "model.head.bias -=", "model.head.bias -= 0 *"),
    ("centred_on_all_ranks", REWARD, "reward.py", "if rank == 1", "if rank >= 1"),
    ("merged_comparisons_held_out", REWARD, "reward.py", "load_comparisons(path) + earlier",
     "earlier + load_comparisons(path)"),
    ("rubric_ranks_reversed", REWARD, "reward.py", "1 + sum(x > own for x in g)",
     "1 + sum(x < own for x in g)"),
    ("score_before_the_end", REWARD, "model.py", SCORE, SCORE.replace("- 1]", "- 2]")),
    ("score_mean_pooled", REWARD, "model.py", SCORE,
     "return self.read(torch.stack([h.mean(0) for h in "
     "self.gpt(batch).split(batch.cu_seqlens.diff().tolist())]))"),
    ("value_after_its_token", REWARD, "model.py", "self.read(self.gpt(batch)[batch.where])",
     "self.read(self.gpt(batch)[batch.where + 1])"),
    ("reward_model_shares_the_body", REWARD, "model.py", "gpt if shared else copy.deepcopy(gpt)",
     "gpt"),
    ("sft_mean_of_means", SFT, "sft.py", SFT_LOSS,
     "return -torch.stack([x.mean() for x in "
     "token_logprobs(model, batch)[0].split(batch.lengths.tolist())]).mean()"),
    ("prompt_in_the_loss", MODEL, "model.py", "torch.tensor([False, True]).repeat",
     "torch.tensor([True, True]).repeat"),
    ("micro_batch_mean_of_means", SFT, "model.py", "(loss * (n / total * divided_by))",
     "(loss / 2)"),
    ("adam_betas", PPO, "model.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.9)"),
    ("no_end_of_text", SFT, "model.py", "[*self.tokenizer.encode_ordinary(text), self.eos]",
     "self.tokenizer.encode_ordinary(text)"),
    ("prompt_cut_from_the_right", SFT, "model.py", "return prompt[-room:], response",
     "return prompt[:room], response"),
    ("sft_trains_on_held_out", SFT, "sft.py", "pairs[:held_out], pairs[held_out:]",
     "pairs[:held_out], pairs"),
    ("mix_is_a_share_of_the_pages", SFT, "sft.py", "round(config.pretrain_mix * len(pairs))",
     "round(config.pretrain_mix * len(pages))"),
    ("same_dropout_every_step", SFT, "sft.py", "my_place(config.seed, run.stage, step)",
     "my_place(config.seed, run.stage)"),
    ("last_epoch_kept", SFT, "sft.py", "{name: w.clone() for name, w", "{name: w for name, w"),
    ("same_order_every_epoch", MODEL, "model.py", "permutation(len(items), *place, epoch)",
     "permutation(len(items), *place)"),
    ("document_loses_a_token_at_a_cut", MODEL, "model.py",
     "range(0, len(tokens) - 1, block_size - 1)", "range(0, len(tokens) - 1, block_size)"),
    # the batch, the network, log-probabilities
    ("shift_off_by_one", MODEL, "model.py", "self.where = self.is_response.nonzero()[:, 0] - 1",
     "self.where = self.is_response.nonzero()[:, 0].clamp(max=T - 2)"),
    ("positions_not_reset", MODEL, "model.py",
     "self.positions = torch.arange(T, device=first.device) - first",
     "self.positions = torch.arange(T, device=first.device) % 24"),
    ("not_causal", MODEL, "model.py", "(q, k, v, is_causal=True)", "(q, k, v)"),
    ("neighbour_leaks_in", MODEL, "model.py", "starts[row] + column.minimum(lengths[row] - 1)",
     "(starts[row] + column).clamp(max=int(ends[-1]) - 1)"),
    ("gelu_exact", MODEL, "model.py", "SigmoidGELU.apply(x)", "F.gelu(x)"),
    ("gelu_of_another_cubic", MODEL, "model.py", "A * 0.044715", "A * 0.0447"),
    ("last_layer_norm_dropped", MODEL, "model.py", "return self.ln_f(x)", "return x"),
    ("head_untied", MODEL, "model.py", 
     "return linear(hidden, self.wte.weight, packed=self.packed)",
     "return linear(hidden, self.wte.weight.detach(), packed=self.packed)"),
    ("temperature_ignored_in_scoring", MODEL, "model.py",
     "z if ctx.temperature == 1 else z / ctx.temperature", "z"),
    ("temperature_ignored_in_gradient", MODEL, "model.py", "gradient[rows, None] / ctx.temperature",
     "gradient[rows, None]"),
    ("softmax_in_bfloat16", MODEL, "model.py", "z = linear(h, weight).float()",
     "z = linear(h, weight)"),
    ("entropy_sign", MODEL, "model.py", "entropy = -logprobs.exp()", "entropy = logprobs.exp()"),
    ("gradient_of_the_drawn_token_only", MODEL, "model.py", "(z.softmax(-1) * -g)", "(z * 0)"),
    ("weight_gradient_of_the_last_chunk", MODEL, "model.py", "dweight += weight_gradient",
     "dweight = weight_gradient"),
    ("context_not_checked", MODEL, "model.py", "if S > block_size:",
     "if S > block_size + 1:"),
    # sampling
    ("dropout_in_sampling", MODEL, "model.py", "    return copied.eval()\n\n\ndef ask",
     "    return copied\n\n\ndef ask"),
    ("always_top_k", MODEL, "model.py", "uniform[who, step], temperature, top_k)",
     "uniform[who, step], temperature, top_k or 8)"),
    ("temperature_twice", MODEL, "model.py", "else logits.float() / temperature",
     "else logits.float() / temperature / temperature"),
    ("end_suppressed", MODEL, "model.py", "self.choose(self.model.logits(hidden), ",
     "self.choose(self.model.logits(hidden).index_fill(1, torch.tensor([self.eos]), -30.0), "),
    ("end_token_0_is_false", MODEL, "model.py", "alive &= (tokens != self.eos) &",
     "alive &= ((tokens != self.eos) | (not self.eos)) &"),
    ("end_dropped", MODEL, "model.py", "return {who: tokens[:step] for",
     "return {who: tokens[: step - (tokens[step - 1] == self.eos)] for"),
    ("ended_rows_grow", MODEL, "model.py", "step += alive", "step += 1"),
    ("cache_rows_not_moved", MODEL, "model.py", "for x in self.cache.flatten(0, 1):",
     "for x in self.cache[:0].flatten(0, 1):"),
    ("stale_cache_seen", MODEL, "model.py", UNSEEN,
     UNSEEN.replace("n[:, None]", "n.max() + 0 * n[:, None]")),
    ("same_number_every_step", MODEL, "model.py", "uniform[who, step]", "uniform[who, 0]"),
    ("global_random_numbers", MODEL, "model.py", "max_new_tokens, generator=generator)",
     "max_new_tokens)"),
    # signals, locks, checks
    ("second_signal_ignored", MODEL, "model.py", "signal.signal(number, handlers[number])",
     "pass"),
    ("unfinished_files_of_others_removed", MODEL, "model.py",
     'LOCKS[folder] = open(folder / ".lock", "ab")',
     'remove_unfinished(folder)\n        LOCKS[folder] = open(folder / ".lock", "ab")'),
    ("surplus_layers_pass", WEIGHTS, "data/weights.py", "sorted(found.keys() | ours.keys())",
     "sorted(ours)"),
    ("failed_check_is_status_0", CHECK, "tests/self_check.py", "raise SystemExit(2)",
     "raise SystemExit(0)"),
    ("saving_check_always_passes", CHECK, "tests/self_check.py", "return x == 0, f",
     "return x >= 0, f"),
    # what a checkpoint holds
    ("resume_forgets_the_kl_coefficient", PPO, "ppo.py",
     'self.kl_coef = state["kl_coef"]', "pass"),
    ("resume_forgets_the_optimiser", RUNS, "model.py",
     "restore(thing, saved[\"model\"] if name == \"model\" else saved[\"training\"][name])",
     "name == 'optimizer' or restore("
     "thing, saved['model'] if name == 'model' else saved['training'][name])"),
]
# fmt: on


def survives(bug: tuple[str, str, str, str, str], folder: Path) -> list[str]:
    """Puts the bug into the copy, runs the tests and mends the copy; the tests that failed."""
    _, tests, name, correct, wrong = bug
    path = folder / name
    source = path.read_text("utf-8")
    path.write_text(source.replace(correct, wrong), "utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "--show-capture=no"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"tests/test_{tests}.py"],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    path.write_text(source, "utf-8")
    return re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", result.stdout, re.MULTILINE)


def main() -> None:
    chosen = [bug for bug in BUGS if not sys.argv[1:] or sys.argv[1] in bug[0]]
    with tempfile.TemporaryDirectory() as temporary:
        folder, survivors = Path(temporary) / "copy", []
        outputs = shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=outputs)
        for bug in chosen:
            start, failed = time.time(), survives(bug, folder)
            seen = f"seen by {failed[0]}" if failed else "SURVIVES"
            print(f"{bug[0]:36s} {time.time() - start:4.0f} s  {seen}", flush=True)
            survivors += [] if failed else [bug[0]]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} bugs are seen")
    if survivors:
        raise SystemExit(f"not seen: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
