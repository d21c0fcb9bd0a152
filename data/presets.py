"""Settings that replace a stage's defaults: python ppo.py --preset instructgpt.

The defaults are for PPO in the toy world. Flags that you type override a preset. The first three
are published settings for models and data of real size; the others are for the toy world.

instructgpt  Ouyang et al. 2022, https://arxiv.org/abs/2203.02155
tldr         Huang et al. 2024, The N+ Implementation Details of RLHF with PPO,
             https://arxiv.org/abs/2403.17031
sentiment    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, and lm-human-preferences
rloo, grpo   other advantages, without a value model
dpo          a policy from the reward model's comparisons
"""

import math

SFT = {
    "instructgpt": {"epochs": 2, "batch_size": 32, "lr": 1.04e-5, "pretrain_mix": 0.1},  # C.3, 6B
    "tldr": {"epochs": 1, "batch_size": 128, "lr": 3e-6},  # Huang et al. 2024
}
REWARD = {
    "dpo": {
        "objective": "dpo",
        "comparisons": "out/reward/comparisons.jsonl",
        "out": "out/dpo",
        "beta": 0.5,
        "epochs": 1,
        "lr": 3e-4,
    },
    # C.2, with K = 4 to 9
    "instructgpt": {"responses": 9, "epochs": 1, "batch_size": 64, "lr": 9e-6, "cue": ""},
    # Huang et al. 2024
    "tldr": {"responses": 2, "epochs": 1, "batch_size": 64, "lr": 3e-6, "cue": ""},
}
# a million episodes, four passes over 512 at a time: tldr and sentiment
MILLION = {"iterations": 1953, "batch_size": 512, "minibatch_size": 512, "ppo_epochs": 4}
MILLION |= {"warmup": 0, "temperature": 0.7, "ema_decay": 0.0}
# several responses to a prompt: rloo and grpo
GROUPED = {"iterations": 44, "ppo_epochs": 2, "lr": 1.2e-3, "ablation": False}
PPO = {
    "instructgpt": {  # C.4; PPO-ptx with --ptx_coef 27.8
        "iterations": 500,  # 256,000 episodes
        "batch_size": 512,
        "minibatch_size": 64,
        "ppo_epochs": 1,
        "lr": 9.65e-6,  # within the range swept, 2.55e-6 to 2.55e-5
        "value_lr": 9e-6,  # of the 1.3 and 6 billion parameter models
        "warmup": 10,
        "kl_coef": 0.02,
        "ema_decay": 0.992,
        "ptx_ratio": 8.0,
        "max_new_tokens": 1000,
    },
    "tldr": {**MILLION, "lr": 3e-6, "value_lr": 3e-6, "kl_coef": 0.05, "max_new_tokens": 53},
    "rloo": {**GROUPED, "advantage": "rloo", "samples": 4, "out": "out/rloo"},
    "grpo": {**GROUPED, "advantage": "grpo", "samples": 8, "kl_coef": 0.1, "out": "out/grpo"},
    "sentiment": {  # launch.py
        **MILLION,
        "lr": 1e-5,
        "value_lr": 1e-5,
        "value": "head",
        "vf_coef": 0.1,
        "kl_coef": 0.15,
        "kl_target": 6.0,
        "max_new_tokens": 24,
        "missing_eos_score": math.nan,  # all its continuations have 24 tokens
    },
}
