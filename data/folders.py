"""The folder of a run: locked while it is in use, never overwritten, and apart from its inputs."""

import hashlib
import itertools
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from data.processes import gather, rank_and_world
from data.records import UserError, remove_unfinished
from data.weights import PUBLISHED

import torch

try:
    import fcntl
except ImportError:  # Windows: no locks, and so no open file that keeps a folder from moving
    fcntl = None

LOCKS: dict[Path, Any] = {}  # the open lock files of this process
RESULTS = ("checkpoint.pt", "metrics.jsonl", "comparisons.jsonl", "responses.jsonl")
RESULTS += ("answers.jsonl", "results.json", "config.json")  # any of them makes a folder a run's


def lock(folder: str | Path) -> None:
    """Makes the folder and keeps other processes out of it; UserError if another one has it."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl and folder not in LOCKS and rank_and_world()[0] == 0:
        LOCKS[folder] = open(folder / ".lock", "ab")
        try:
            fcntl.lockf(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            LOCKS.pop(folder).close()
            raise UserError(f"{folder} is in use by another run; choose another --out") from None
        remove_unfinished(folder)


def free(folders: list[Path]) -> None:
    """Lets other processes use the folders; one in which nothing was written is removed."""
    for folder in folders:
        LOCKS.pop(folder).close()
        if folder.exists() and os.listdir(folder) == [".lock"]:
            shutil.rmtree(folder)


def claim(folder: str | Path, resume: bool) -> None:
    """Locks the folder for a run. A run that stands in it moves aside, unless it is resumed."""
    lock(folder)
    folder = Path(folder).resolve()
    found = [name for name in RESULTS if (folder / name).is_file()]
    if any((folder / name).stat().st_size for name in found) and not resume:
        if rank_and_world()[0] == 0:
            move_aside(folder)
        gather(None)  # barrier: wait for rank 0
        lock(folder)


def move_aside(folder: Path) -> None:
    """Renames the folder to the first free of <folder>.previous, <folder>.previous2, ..."""
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"--out {folder} holds a run and is where you are; choose another folder")
    endings = itertools.chain([""], itertools.count(2))
    names = (folder.with_name(f"{folder.name}.previous{ending}") for ending in endings)
    previous = next(name for name in names if not os.path.lexists(name))
    folder.rename(previous)
    free([held for held in LOCKS if held == folder])
    print(f"{folder} held a run, which is now {previous} (--resume would continue it)")


def inputs(config, free: bool) -> dict[str, str]:
    """The flags of type data.run.Input, with their values; `free`: also those of Free[Input]."""
    marks = {field.name: get_args(field.type) for field in fields(config)}
    named = [name for name, found in marks.items() if "input" in found]
    return {name: getattr(config, name) for name in named if free or "free" not in marks[name]}


NAMES = ("toy", "scratch", *PUBLISHED)  # they are no paths, whatever folders are called so


def path_of(value: str) -> Path | None:
    """The path that a flag names, if it exists; the flag may say path.py:function."""
    if value in NAMES and not Path(value, "checkpoint.pt").exists():
        return None
    texts = (value, value.rpartition(":")[0])
    return next((Path(text) for text in texts if text and Path(text).exists()), None)


def keep_apart(config, folders: dict[str, str]) -> None:
    """UserError for an input that is, or lies in, a folder {flag: path} that the run writes to."""
    for name, value in inputs(config, free=True).items():
        for flag, folder in folders.items():
            if (path := path_of(value)) and flag != name and Path(folder).exists():
                around = (path, path.resolve(), *path.resolve().parents)
                if any(Path(folder).samefile(p) for p in around):
                    wrong = f"--{name} {value} lies in --{flag} {folder}, which this run writes to"
                    raise UserError(f"{wrong}; choose another --{flag}")


def fingerprint(value: str) -> str:
    """A hash of what a flag names: a stage's model and tokenizer, or the bytes of all files.

    A name that is no path, such as toy or gpt2, stands for itself.
    """
    from data.run import load_checkpoint  # here, since data.run imports this file

    if (path := path_of(value)) is None:
        return value
    digest = hashlib.blake2b(digest_size=16)
    if (path / "checkpoint.pt").exists():
        saved = load_checkpoint(path)
        digest.update(repr(sorted(saved["codec"]["tokenizer"].items())).encode())
        for name, weight in sorted(saved["model"].items()):
            digest.update(name.encode())
            digest.update(weight.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
    for file in [path] if path.is_file() else sorted(path.rglob("[!.]*")):
        if file.is_file():
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()
