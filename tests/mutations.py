"""Injects known bugs into a copy of the code, one at a time, and shows that the tests see each.

    python tests/mutations.py             # all; about 30 minutes on one core, a line for each bug
    python tests/mutations.py kl_sign     # those whose name contains this
    python tests/mutations.py --random 150 --seed 1   # mistakes made by rule, of mistakes.py

Many of the bugs have stood in a published implementation. A test of its own makes sure that each of
them can still be put into the code as it is.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mistakes

ROOT = Path(__file__).parents[1]
PPO, MODEL, REWARD, SFT, RUNS = "ppo", "model", "reward", "sft", "pipeline"  # tests/test_*.py
MANY, CHECK, REPORT, WEIGHTS = "many", "self_check", "report", "weights"
ESTIMATORS, FOLDERS = "estimators", "folders"
R_T = "-kl_coef * (logprobs - ref_logprobs)"
POLICY = "torch.max(-advantages * ratio, -advantages * clipped).mean()"
ROLLOUT = "token_logprobs(model, batch, config.temperature)[0]"
RANKING = "-F.logsigmoid(r[:, None] - r[None, :])[better].mean()"
SFT_LOSS = "-token_logprobs(model, batch)[0].mean()"
SCORE = "self.gpt(batch)[batch.last]"
OWN_SHARES = "[int(n.sum()) for n in lengths.chunk(processes.rank_and_world()[1])]"
LOCK = 'LOCKS[folder] = open(folder / ".lock", "ab")'
# fmt: off
BUGS = [  # name, the tests that must see it, file, correct code, wrong code
    # rewards and advantages
    ("kl_sign", PPO, "ppo.py", R_T, R_T.replace("-kl", "kl")),
    ("kl_mean_per_response", PPO, "ppo.py", R_T, f"{R_T} / lengths.repeat_interleave(lengths)"),
    ("kl_absolute", PPO, "ppo.py", R_T, "-kl_coef * (logprobs - ref_logprobs).abs()"),
    ("kl_written_over_logprobs", PPO, "ppo.py", R_T, "logprobs.sub_(ref_logprobs) * -kl_coef"),
    ("score_at_first_token", PPO, "ppo.py", "lengths.cumsum(0) - 1, scores",
     "lengths.cumsum(0) - lengths, scores"),
    ("score_at_every_token", PPO, "ppo.py", "rewards.index_add(0, lengths.cumsum(0) - 1, scores)",
     "rewards + scores.repeat_interleave(lengths)"),
    ("missing_end_ignored", PPO, "ppo.py", "ended == 1,", "ended < 2,"),
    ("gae_crosses_the_end", PPO, "ppo.py", "if t in last else", "if t == len(r) - 1 else"),
    ("lam_missing", PPO, "ppo.py", "gamma * lam * next_advantage", "gamma * next_advantage"),
    ("gamma_missing", PPO, "ppo.py", "r[t] + gamma * next_value", "r[t] + next_value"),
    ("returns_without_values", PPO, "ppo.py", "result, result + values.detach()", "result, result"),
    ("returns_carry_gradient", PPO, "ppo.py", "result + values.detach()", "result + values"),
    ("whiten_unbiased", PPO, "ppo.py", "unbiased=False", "unbiased=True"),
    ("whiten_keeps_mean", PPO, "ppo.py", "whitened if shift", "whitened if not shift"),
    ("advantages_not_whitened", PPO, "ppo.py", "whiten(advantages)", "advantages"),
    ("whiten_by_process", MANY, "ppo.py", "whiten(advantages)",
     f"torch.cat([whiten(x) for x in advantages.split({OWN_SHARES})])"),
    ("kl_controller_unclipped", PPO, "ppo.py", "min(max(kl / target - 1, -0.2), 0.2)",
     "kl / target - 1"),
    ("kl_controller_inverted", PPO, "ppo.py", "max(kl / target - 1", "max(target / kl - 1"),
    ("k3_sign", ESTIMATORS, "ppo.py", "log_ratio.expm1() - log_ratio",
     "(-log_ratio).expm1() + log_ratio"),
    # advantages without a value model, and DPO
    ("k3_cancels", ESTIMATORS, "ppo.py", "log_ratio.expm1() - log_ratio",
     "log_ratio.exp() - 1 - log_ratio"),
    ("rloo_own_reward_in_the_baseline", ESTIMATORS, "ppo.py",
     "(groups.sum(1, keepdim=True) - groups) / (samples - 1)", "groups.mean(1, keepdim=True)"),
    ("rloo_baseline_of_the_batch", ESTIMATORS, "ppo.py", "groups.sum(1, keepdim=True) - groups",
     "rewards.sum() - groups"),
    ("rloo_sign", ESTIMATORS, "ppo.py", "(groups - others)", "(others - groups)"),
    ("grpo_not_normalised", ESTIMATORS, "ppo.py",
     " / (deviation + 1e-8)", ""),
    ("grpo_biased_deviation", ESTIMATORS, "ppo.py", "groups.std(1, keepdim=True)",
     "groups.std(1, keepdim=True, unbiased=False)"),
    ("grpo_penalty_twice", ESTIMATORS, "ppo.py", 'penalty = 0.0 if config.advantage == "grpo" else',
     'penalty = 0.0 if config.advantage == "" else'),
    ("grpo_penalty_missing", ESTIMATORS, "ppo.py",
     "pg_loss + config.kl_coef * kl_k3(logprobs, old.ref_logprobs).mean()", "pg_loss"),
    ("grpo_penalty_of_the_old_policy", ESTIMATORS, "ppo.py",
     "kl_k3(logprobs, old.ref_logprobs)", "kl_k3(logprobs, old.old_logprobs)"),
    ("penalty_not_in_rloos_reward", ESTIMATORS, "ppo.py",
     'penalty = 0.0 if config.advantage == "grpo"', 'penalty = 0.0 if config.advantage != "gae"'),
    ("a_prompt_for_each_response", ESTIMATORS, "ppo.py", "[i // config.samples for i",
     "[i for i"),
    ("the_policy_learns_in_the_warm_up", ESTIMATORS, "ppo.py", "key[-1] >= config.value_warmup",
     "True"),
    ("dpo_without_beta", ESTIMATORS, "reward.py", "self.beta * (torch.stack", "1.0 * (torch.stack"),
    ("dpo_without_the_reference", ESTIMATORS, "reward.py",
     "(logprobs - ref_logprobs).split", "logprobs.split"),
    ("dpo_means_over_tokens", ESTIMATORS, "reward.py", "sums = [part.sum()",
     "sums = [part.mean()"),
    ("the_table_shows_the_old_ratio", ESTIMATORS, "ppo.py",
     "(logprobs - own.old_logprobs).exp()", "own.old_logprobs.exp()"),
    # the clipped objectives
    ("ratio_inverted", PPO, "ppo.py", "(logprobs - old_logprobs).exp()",
     "(old_logprobs - logprobs).exp()"),
    ("policy_min_for_max", PPO, "ppo.py", POLICY, POLICY.replace("max", "min")),
    ("policy_clip_only", PPO, "ppo.py", POLICY, "(-advantages * clipped).mean()"),
    ("policy_sum", PPO, "ppo.py", POLICY, POLICY.replace("mean", "sum")),
    ("advantage_sign", PPO, "ppo.py", POLICY, POLICY.replace("-adv", "adv")),
    ("value_without_half", PPO, "ppo.py", "0.5 * torch.max", "torch.max"),
    ("value_min_for_max", PPO, "ppo.py", "0.5 * torch.max", "0.5 * torch.min"),
    ("value_clipped_around_the_batch", PPO, "ppo.py",
     "old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)",
     "values.clamp(old_values.min() - cliprange_value, old_values.max() + cliprange_value)"),
    ("value_unclipped", PPO, "ppo.py", "(clipped - returns)", "(values - returns)"),
    ("old_logprobs_anew", PPO, "ppo.py", "policy_loss(logprobs, old.old_logprobs,",
     "policy_loss(logprobs, logprobs.detach(),"),
    ("old_values_anew", PPO, "ppo.py", "value_loss(values, old.old_values,",
     "value_loss(values, values.detach(),"),
    ("tokens_of_other_responses", PPO, "ppo.py", "range(ends[b] - int(self.lengths[b]), ends[b])",
     "range(int(self.lengths[b]))"),
    ("scores_of_other_responses", PPO, "ppo.py", "x[chosen if", "x[sorted(chosen) if"),
    ("a_minibatch_all_the_time", PPO, "ppo.py", "order[i : i + config.minibatch_size]",
     "order[: config.minibatch_size]"),
    ("same_minibatches_every_epoch", PPO, "ppo.py", "len(rollout.prompts)), *key, epoch)",
     "len(rollout.prompts)), *key)"),
    ("update_weighs_by_responses", PPO, "ppo.py", "(pg_loss * (n / total))",
     "(pg_loss * (len(old.prompts) / len(chosen)))"),
    ("ptx_weighs_passes_equally", PPO, "ppo.py", "ptx_coef * loss * (n / total)",
     "ptx_coef * loss"),
    ("average_swapped", PPO, "ppo.py", "lerp_(weight, 1 - decay)", "lerp_(weight, decay)"),
    ("reference_is_the_policy", CHECK, "ppo.py", "ref_policy = GPT.load(config.sft)",
     "ref_policy = policy"),
    ("temperature_in_scoring_only", PPO, "ppo.py", "eos, config.temperature)", "eos)"),
    ("temperature_in_sampling_only", PPO, "ppo.py", ROLLOUT, "token_logprobs(model, batch)[0]"),
    ("temperature_not_in_the_reference", PPO, "ppo.py", ROLLOUT,
     "token_logprobs(model, batch, config.temperature if name == 'old' else 1.0)[0]"),
    ("temperature_not_in_the_update", PPO, "ppo.py",
     "entropy = token_logprobs(models.policy, batch, config.temperature)",
     "entropy = token_logprobs(models.policy, batch)"),
    ("same_samples_every_iteration", PPO, "ppo.py", "generator(*rank_key(*key))",
     "generator(*rank_key(*key[:2]))"),
    # the comparison
    ("temperature_not_in_the_measured_kl", PPO, "ppo.py",
     "token_logprobs(ref_policy, batch, config.temperature)", "token_logprobs(ref_policy, batch)"),
    ("ppo_trains_on_held_out_prompts", PPO, "data/__init__.py", "training[::-1]", "rows"),
    ("prompted_answer_not_cut", PPO, "ppo.py", "codec.response(world.cut_answer(text))",
     "codec.response(text)"),
    ("pretraining_loss_of_seen_pages", PPO, "ppo.py", "pages(300, -1)", "pages(300, config.seed)"),
    ("a_tie_is_a_win", REPORT, "data/report.py", "(a > b) / 2 + (a >= b) / 2", "float(a >= b)"),
    ("human_win_rate_reversed", REPORT, "data/report.py",
     "[-ranks[i] for ranks in judged], [-ranks", "[ranks[i] for ranks in judged], [ranks"),
    ("interval_of_90_percent", REPORT, "data/report.py", "1.96 * x.std()", "1.64 * x.std()"),
    ("best_of_the_last_n", REPORT, "data/report.py", "[:, :n].max(1)", "[:, -n:].max(1)"),
    ("best_of_n_bound", REPORT, "data/report.py", "math.log(n) - (n - 1) / n", "math.log(n)"),
    ("repetition_of_all_responses", REPORT, "data/report.py", "1 - distinct([tokens])",
     "1 - distinct(responses)"),
    ("calibration_reversed", REPORT, "data/report.py", "(r > other) == (rank < other_rank)",
     "(r > other) == (rank > other_rank)"),
    # reward model and fine-tuning
    ("ranking_sum", REWARD, "reward.py", RANKING, RANKING.replace("mean", "sum")),
    ("ranking_normalised_twice", REWARD, "reward.py", RANKING,
     f"{RANKING} / max(1, int(better.sum()))"),
    ("ranking_counts_ties", REWARD, "reward.py", "[:, None] < rank[", "[:, None] <= rank["),
    ("ranking_reversed", REWARD, "reward.py", "[:, None] < rank[", "[:, None] > rank["),
    ("log_of_sigmoid", REWARD, "reward.py", "-F.logsigmoid(r[:, None] - r[None, :])",
     "-(r[:, None] - r[None, :]).sigmoid().log()"),
    ("no_pair_without_gradient", REWARD, "reward.py", "else 0 * scores.sum()",
     "else torch.tensor(0.0)"),
    ("ties_alone_weigh_in", REWARD, "reward.py", "sum(c.decides for c in own) / total",
     "len(own) / len(chosen)"),
    ("not_centred", REWARD, "reward.py", "model.head.bias -=", "model.head.bias -= 0 *"),
    ("centred_on_all_ranks", REWARD, "reward.py", "if rank == min(c", "if rank >= min(c"),
    ("merged_comparisons_held_out", REWARD, "reward.py", "new + earlier, config",
     "earlier + new, config"),
    ("rubric_ranks_reversed", REWARD, "reward.py", "1 + sum(x > own for", "1 + sum(x < own for"),
    ("accuracy_reversed", REWARD, "data/records.py", "(signs[0] * signs[1] < 0)",
     "(signs[0] * signs[1] > 0)"),
    ("score_before_the_end", REWARD, "model.py", SCORE, SCORE.replace("last", "last - 1")),
    ("score_mean_pooled", REWARD, "model.py", SCORE,
     "torch.stack([h.mean(0) for h in "
     "self.gpt(batch).split(batch.cu_seqlens.diff().tolist())])"),
    ("value_after_its_token", REWARD, "model.py", "self.gpt(batch)[batch.decided_at]",
     "self.gpt(batch)[batch.decided_at + 1]"),
    ("reward_model_shares_the_body", REWARD, "model.py", "gpt if shared else copy.deepcopy(gpt)",
     "gpt"),
    ("sft_mean_of_means", SFT, "sft.py", SFT_LOSS,
     "-torch.stack([x.mean() for x in "
     "token_logprobs(model, batch)[0].split(batch.lengths.tolist())]).mean()"),
    ("prompt_in_the_loss", MODEL, "model.py", "torch.tensor([False, True]).repeat",
     "torch.tensor([True, True]).repeat"),
    ("sft_weighs_by_responses", SFT, "sft.py", "sft_loss(model, batch) * (n / total)",
     "sft_loss(model, batch) * (len(batch.last) / len(chosen))"),
    ("no_end_of_text", SFT, "data/tokenizer.py",
     "[*self.tokenizer.encode_ordinary(text), self.eos]", "self.tokenizer.encode_ordinary(text)"),
    ("prompt_cut_from_the_right", SFT, "data/tokenizer.py", "tokens[-room:]", "tokens[:room]"),
    ("sft_trains_on_held_out", SFT, "data/records.py", " if key(row) in groups]", "]"),
    ("a_prompt_on_both_sides", SFT, "data/records.py",
     "[row for row in rows if key(row) in groups]", "rows[len(held_out) :]"),
    ("mix_is_a_share_of_the_pages", SFT, "sft.py", "round(config.pretrain_mix * len(pairs))",
     "round(config.pretrain_mix * config.toy_texts)"),
    ("same_dropout_every_step", SFT, "sft.py", "rank_key(config.seed, run.stage, step)",
     "rank_key(config.seed, run.stage)"),
    ("last_epoch_kept", SFT, "sft.py", "{name: w.clone() for", "{name: w for"),
    ("same_order_every_epoch", MODEL, "data/processes.py",
     "permutation(len(items), *key, epoch)", "permutation(len(items), *key)"),
    ("document_loses_a_token_at_a_cut", MODEL, "data/tokenizer.py",
     "len(tokens) - 1, block_size - 1)", "len(tokens) - 1, block_size)"),
    # the batch, the network, log-probabilities
    ("shift_off_by_one", MODEL, "model.py", "self.is_response.nonzero()[:, 0] - 1",
     "self.is_response.nonzero()[:, 0].clamp(max=T - 2)"),
    ("positions_not_reset", MODEL, "model.py", "torch.arange(T, device=first.device) - first",
     "torch.arange(T, device=first.device) % 24"),
    ("not_causal", MODEL, "model.py", "(q, k, v, is_causal=True)", "(q, k, v)"),
    ("neighbour_leaks_in", MODEL, "model.py", "[start + n - 1] * (width - n)",
     "[min(i, starts[-1] - 1) for i in range(start + n, start + width)]"),
    ("gelu_exact", MODEL, "model.py", ', approximate="tanh")', ")"),
    ("last_layer_norm_dropped", MODEL, "model.py", "return self.ln_f(x)", "return x"),
    ("head_untied", MODEL, "model.py", "return self.wte.weight", "return self.wte.weight.detach()"),
    ("temperature_ignored_in_scoring", MODEL, "model.py", "hidden / temperature, weight",
     "hidden, weight"),
    ("softmax_in_bfloat16", MODEL, "model.py", "HeadProduct.apply(hidden, weight)",
     "F.linear(hidden, weight)"),
    ("entropy_sign", MODEL, "model.py", "-(all_logprobs.exp()", "(all_logprobs.exp()"),
    ("entropy_carries_gradient", MODEL, "model.py", "with torch.no_grad():\n        entropy =",
     "if True:\n        entropy ="),
    ("gradient_of_the_drawn_token_only", MODEL, "model.py", ".log_softmax(-1)",
     "; all_logprobs = all_logprobs - all_logprobs.logsumexp(-1, True).detach()"),
    ("weight_gradient_of_the_first_chunk", MODEL, "model.py", "(h, weight, token, temperature)",
     "(h, weight.detach() if chunks else weight, token, temperature)"),
    ("logits_of_all_tokens_kept", MODEL, "model.py",
     "checkpoint(head_logprobs, *inputs, **how)", "head_logprobs(*inputs)"),
    ("pass_beyond_the_context", MODEL, "model.py", "if batch.longest > self.config.block_size",
     "if batch.longest > self.config.block_size + 1"),
    # sampling
    ("context_not_checked", MODEL, "model.py", "if S > model.config.block_size",
     "if S > model.config.block_size + 1"),
    ("dropout_in_sampling", MODEL, "model.py", "return copied.eval()", "return copied"),
    ("always_top_k", MODEL, "model.py", "step], temperature, top_k)",
     "step], temperature, top_k or 8)"),
    ("temperature_twice", MODEL, "model.py", "logits.float() / temperature",
     "logits.float() / temperature / temperature"),
    ("end_suppressed", MODEL, "model.py", "draw(head_logits(hidden, head), ",
     "draw(head_logits(hidden, head).index_fill(1, torch.tensor([eos_token]), -30.0), "),
    ("end_token_0_is_false", MODEL, "model.py", "eos_token in responses[b][-1:]",
     "eos_token and eos_token in responses[b][-1:]"),
    ("end_dropped", MODEL, "model.py", "return responses",
     "return [r[:-1] if r[-1] == eos_token else r for r in responses]"),
    ("ended_rows_grow", MODEL, "model.py", "eos_token in responses[b][-1:] or", ""),
    ("cache_rows_not_moved", MODEL, "model.py", "cache[:, :, gaps] = cache[:, :, movers]", "pass"),
    ("rows_answer_other_prompts", MODEL, "model.py", "rows[moved.get(r, r)]", "rows[r]"),
    ("cache_row_not_cleaned", MODEL, "model.py", "cache.zero_()", "cache.shape"),
    ("stale_cache_seen", MODEL, "model.py", "device=n.device) > n[:, None]",
     "device=n.device) > n.max() + 0 * n[:, None]"),
    ("a_position_too_early", MODEL, "model.py", "model.body(tokens, lengths, attend)",
     "model.body(tokens, lengths - 1, attend)"),
    ("same_number_every_step", MODEL, "model.py", "uniform[chosen, step]", "uniform[chosen, 0]"),
    ("global_random_numbers", MODEL, "model.py", "max_new_tokens, generator=generator)",
     "max_new_tokens)"),
    # the optimiser's step, on one process and on several
    ("adam_betas", PPO, "model.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.9)"),
    ("models_clipped_as_one", MODEL, "model.py", '"params"], clip, norm)',
     '"params"], clip, max(norms))'),
    ("gradients_pile_up", MODEL, "model.py", "optimizer.zero_grad(set_to_none=True)", "pass"),
    ("any_loss_is_finite", MODEL, "model.py", "(loss, *numbers))", "numbers)"),
    ("gradients_not_summed", MANY, "data/processes.py", "torch.distributed.all_reduce(p.grad)",
     "pass"),
    ("gradients_of_shards_averaged", MANY, "data/processes.py",
     "part.set_gradient_divide_factor(1.0)", "part.set_gradient_divide_factor(2.0)"),
    # signals, locks, checks
    ("second_signal_ignored", MODEL, "data/run.py", "signal.signal(number, handlers[number])",
     "pass"),
    ("unfinished_files_of_others_removed", MODEL, "data/folders.py", LOCK,
     f"remove_unfinished(folder); {LOCK}"),
    ("a_rerun_overwrites", FOLDERS, "data/folders.py", "        move_aside(folder)",
     "        pass"),
    ("a_resumed_run_moves_aside", FOLDERS, "data/folders.py", "for name in found) and not resume",
     "for name in found)"),
    ("an_input_in_out_passes", FOLDERS, "data/folders.py", "(path, path.resolve(), *path",
     "(*path"),
    ("changed_inputs_pass", FOLDERS, "data/run.py", "if then.get(n, found) != found]",
     "if False]"),
    ("an_error_loses_whole_steps", FOLDERS, "data/run.py", "if not self.changed and",
     "if False and"),
    ("half_a_step_is_saved", FOLDERS, "data/run.py", "if not self.changed and", "if"),
    ("saving_takes_all_the_time", FOLDERS, "data/run.py", "min(50 * self.saving, 600)",
     "min(self.saving, 600)"),
    ("half_a_line_on_a_full_disk", FOLDERS, "data/records.py", "            file.truncate(size)\n",
     ""),
    ("no_second_call_of_a_reward", "python_reward", "data/python_reward.py",
     "range(self.retries + 1)", "range(1)"),
    ("surplus_layers_pass", WEIGHTS, "data/weights.py", "sorted(found.keys() | ours.keys())",
     "sorted(ours)"),
    ("failed_check_is_status_0", CHECK, "tests/self_check.py", "raise SystemExit(2)",
     "raise SystemExit(0)"),
    ("saving_check_always_passes", CHECK, "tests/self_check.py", "return x == 0, f",
     "return x >= 0, f"),
    # what a checkpoint holds
    ("resume_forgets_the_extra_numbers", MANY, "data/run.py",
     'self.extra = dict(training["extra"])', "pass"),
    ("resume_forgets_the_optimiser", MANY, "data/processes.py",
     'dcp.set_optimizer_state_dict(modules, optimizer, state["optimizer"], options=FULL)', "pass"),
    ("resume_forgets_the_kl_coefficient", RUNS, "ppo.py",
     'run.extra.setdefault("kl_coef", config.kl_coef)', "config.kl_coef"),
    ("resume_forgets_the_metrics", RUNS, "data/run.py", 'saved["step"], saved["metrics"]',
     'saved["step"], []'),
    ("resume_takes_half_a_network", RUNS, "data/processes.py",
     "model.state_dict().keys() - weights.keys()", "weights.keys() - model.state_dict().keys()"),
]
# fmt: on


def failures(folder: Path, tests: str) -> list[str]:
    """Runs a file of tests, or one of them, up to the first that fails; those that failed."""
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "--tb=no"]
    command += ["--show-capture=no"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"tests/{tests}"],
        cwd=folder,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    return re.findall(r"^(?:FAILED|ERROR) tests/([\w.:]+)", result.stdout, re.MULTILINE)


def seen(bug: tuple[str, str, str, str, str], folder: Path) -> list[str]:
    """Puts the bug into the copy, runs the tests and mends the copy; the tests that failed."""
    _, tests, name, correct, wrong = bug
    path = folder / name
    source = path.read_text("utf-8")
    path.write_text(source.replace(correct, wrong), "utf-8")
    failed = failures(folder, f"test_{tests}.py")
    path.write_text(source, "utf-8")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    if flags.random:
        return mistakes.main(flags.random, flags.seed)
    chosen = [bug for bug in BUGS if flags.name in bug[0]]
    with tempfile.TemporaryDirectory() as temporary:
        folder, survivors, sound = Path(temporary) / "copy", [], set()
        outputs = shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=outputs)
        for bug in chosen:
            start, failed = time.time(), seen(bug, folder)
            for test in set(failed) - sound:  # what fails anyway has seen nothing
                if failures(folder, test):
                    raise SystemExit(f"{test} fails without {bug[0]} too; mend it first")
                sound.add(test)
            what = f"seen by {failed[0]}" if failed else "SURVIVES"
            print(f"{bug[0]:36s} {time.time() - start:4.0f} s  {what}", flush=True)
            survivors += [] if failed else [bug[0]]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} bugs are seen")
    if survivors:
        raise SystemExit(f"not seen: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
