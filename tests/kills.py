"""Kills training at random instants until it has finished, and compares with a run left alone.

    python tests/kills.py 100      # at least so many kills over the three stages; about ten minutes

Weights, optimiser, random numbers, metrics and samples have to be the same to the last bit. Then
each stage begins anew in its folder, and is killed after the finished run has moved aside and
before anything is saved: the finished run has to be whole.
"""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TINY = ["--seed=5"]
SFT = ["--n_layer=1", "--n_embd=16", "--n_head=1", "--toy_texts=60", "--toy_demonstrations=90"]
SFT += ["--batch_size=8", "--base=base", "--out=sft"]
REWARD = ["--toy_prompts=12", "--responses=3", "--max_new_tokens=10", "--sft=sft"]
REWARD += ["--epochs=4", "--out=reward"]
PPO = ["--sft=sft", "--base=base", "--reward_model=reward", "--trust", "--iterations=8"]
PPO += ["--batch_size=8", "--minibatch_size=4", "--max_new_tokens=10", "--eval_prompts=4"]
PPO += ["--kl_target=3", "--out=ppo"]
MOST_KILLS = 5  # of a run: on a busy machine none might ever come to its end
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.distributed.fsdp", "tiktoken"])
STAGES = {"sft.py": SFT, "reward.py": REWARD, "ppo.py": PPO}


def run_stage(script: str, folder: Path, point: str = "") -> None:
    """What `python script --resume` does in the folder, in silence.

    With a point of POINTS: what happens without --resume, until that point.
    """
    os.chdir(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    tqdm.set_lock(threading.RLock())  # its own outlives a process that is killed
    sys.argv = [script, *TINY, *STAGES[script], *([] if point else ["--resume"])]
    sys.path.insert(0, str(ROOT))
    if point:
        POINTS[point]()
    runpy.run_path(str(ROOT / script), run_name="__main__")


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_moved() -> None:
    from data import folders

    move = folders.move_aside
    folders.move_aside = lambda folder: (move(folder), die())


def die_in_the_first_step() -> None:
    from data.run import Run

    Run.log = die


def die_while_saving() -> None:
    torch.save = lambda _, file: (file.write(b"half of it"), file.flush(), die())


POINTS = {"moved": die_when_moved, "begun": die_in_the_first_step, "saving": die_while_saving}


def start(script: str, folder: Path, point: str = "") -> Process:
    """Forks from a process that has imported torch, so that a kill seldom hits that import."""
    process = SERVER.Process(target=run_stage, args=(script, folder, point))
    process.start()
    return process


def left(folder: Path) -> dict[str, object]:
    """All that the runs in this folder have left, but for times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            found[name] = timeless([json.loads(line) for line in path.read_text().splitlines()])
        elif path.name == "results.json":
            found[name] = json.loads(path.read_text()) | {"seconds": 0}
        elif path.name == "checkpoint.pt":
            saved = torch.load(path, weights_only=True)
            found[name] = fingerprint(saved | {"metrics": timeless(saved["metrics"])})
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def timeless(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics]


def fingerprint(value: object) -> object:
    """The value with every tensor as bytes, so that == compares bits."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: fingerprint(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(inner) for inner in value]
    return value


def kill_until_done(script: str, folder: Path, longest: dict, rng: random.Random) -> int:
    """Runs a stage to its end; its first attempts mostly last less than `longest` seconds."""
    kills, began = 0, time.time()
    while True:
        process, patience = start(script, folder), rng.uniform(0.3, 1.15) * longest[script]
        process.join(patience if kills < MOST_KILLS else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            continue
        if process.exitcode:
            raise SystemExit(f"{script} ended with status {process.exitcode} after {kills} kills")
        if not kills:  # the machine is less busy now than it was
            longest[script] = min(longest[script], time.time() - began)
        return kills


def trial(folder: Path, expected: Path, longest: dict[str, float], rng: random.Random) -> int:
    """Kills all three stages on their way; SystemExit names the files that differ in the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kills = sum(kill_until_done(script, folder, longest, rng) for script in STAGES)
    ours, theirs = left(folder), left(expected)
    wrong = [name for name in theirs.keys() | ours.keys() if ours.get(name) != theirs.get(name)]
    if wrong:
        raise SystemExit(f"after {kills} kills these differ: {', '.join(sorted(wrong))}")
    return kills


def kill_reruns(folder: Path, rng: random.Random) -> int:
    """Kills a new run of each stage before its first save; SystemExit if the old one changes."""
    for script in STAGES:
        point, before = rng.choice(sorted(POINTS)), left(folder)
        process = start(script, folder, point)
        process.join()
        moved = list(folder.glob("*.previous"))
        for previous in moved:
            shutil.rmtree(previous.with_suffix(""), ignore_errors=True)
            previous.rename(previous.with_suffix(""))
        if process.exitcode != -signal.SIGKILL or len(moved) != 1 or left(folder) != before:
            raise SystemExit(f"{script} anew, killed when {point}: the finished run has changed")
    return len(STAGES)


def run_alone(folder: Path) -> dict[str, float]:
    """Runs all stages without a kill; the seconds that each takes."""
    folder.mkdir()
    seconds = {}
    for script in STAGES:
        began = time.time()
        process = start(script, folder)
        process.join()
        if process.exitcode:
            raise SystemExit(f"{script} ended with status {process.exitcode}, left alone")
        seconds[script] = time.time() - began
    return seconds


def main(kills: int) -> int:
    os.environ["OMP_NUM_THREADS"] = "1"  # these models are too small for more
    warm_up = SERVER.Process(target=int)
    warm_up.start(), warm_up.join()
    with tempfile.TemporaryDirectory() as temporary:
        longest, done, trials, again = run_alone(Path(temporary) / "alone"), 0, 0, 0
        while done < kills:
            rng, trials = random.Random(trials), trials + 1
            done += trial(Path(temporary) / "killed", Path(temporary) / "alone", longest, rng)
            again += kill_reruns(Path(temporary) / "killed", rng)
            print(
                f"{done} kills in {trials} passes over the stages, and {again} of runs that began "
                "anew, before their first save: not a bit differs",
                flush=True,
            )
    return done


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100)
