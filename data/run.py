"""What every stage needs beside its algorithm: a command line made from a dataclass, and the run
folder with metrics, samples and an exact checkpoint."""

import argparse
import functools
import inspect
import io
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from data import folders, processes
from data.processes import gather, rank_and_world, resolve_device
from data.records import UserError, append, atomic, one_line_errors, printable, strict_json
from data.weights import unpickle

import torch
from tqdm import tqdm

Count = Annotated[int, 0, math.inf]  # the type of a field holds the bounds of its flag
Positive = Annotated[int, 1, math.inf]
Rate = Annotated[float, 0, math.inf]
Share = Annotated[float, 0, 1]
Kind = TypeVar("Kind")
Free = Annotated[Kind, "free"]  # decides no number: a resumed run may have another value
Input = Annotated[str, "input"]  # what is read: a resumed run compares what stands there


@dataclass
class RunConfig:
    """The flags that every stage has: a field is a flag, and its trailing comment is the help."""

    seed: int = 0  # every random number is a function of (seed, stage, step)
    device: Free[str] = "auto"  # cpu, cuda, cuda:1, ..., or auto: cuda where it is available
    dtype: Free[str] = "auto"  # bfloat16, float32 (on a GPU by TF32 products); auto: by the device
    attention: Free[str] = "auto"  # plain: PyTorch's; auto: our kernels on a GPU that proves them
    max_tokens: Free[Positive] = 16384  # tokens in one network pass: lower it when memory runs out
    recompute: Free[bool] = False  # recompute activations in the backward pass: less memory, slower
    shard: Free[bool] = False  # spread weights, gradients and optimiser over torchrun's processes
    save_every: Free[Count] = 0  # steps between checkpoints; 0: as often as costs 2 % of the time
    resume: Free[bool] = False  # continue the run in --out from its last checkpoint, bit for bit

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (kind, *marks) = getattr(self, field.name), (*get_args(field.type), field.type)
            value = value.item() if hasattr(value, "item") else value  # a numpy number
            value = kind(value) if kind in (str, float) else value  # of a Path, of a whole number
            setattr(self, field.name, value)
            if marks and type(marks[0]) in (int, float):
                low, high = marks[:2]
                if not (low <= value <= high and value < math.inf):
                    raise UserError(f"--{field.name} {value}: expected a number, {low} to {high}")


def parse(config_class: type, presets: dict[str, dict], argv: list[str] | None = None) -> Any:
    """The Config of a command line, which argparse checks. presets: {name: {field: default}}."""
    source = "".join(inspect.getsource(c) for c in config_class.__mro__[:-1])
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    manual, raw = sys.modules[config_class.__module__].__doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=manual, formatter_class=raw, allow_abbrev=False)
    for field in fields(config_class):
        kind = (*get_args(field.type), field.type)[0]  # without its bounds
        if kind is list:
            parser.add_argument(field.name, help=helps[field.name], nargs="+")
            continue
        help = f"{helps.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        how: dict = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name}", help=help, default=field.default, **how)
    if presets:
        help = "other defaults (data/presets.py); flags that you type override them"
        parser.add_argument("--preset", default="toy", choices=["toy", *presets], help=help)
        parser.set_defaults(**presets.get(parser.parse_args(argv).preset, {}))
    flags = vars(parser.parse_args(argv))
    return config_class(**{name: flags[name] for name in flags if name != "preset"})


def command(main: Callable[[Any], Any], config_class: type, presets: dict[str, dict]) -> None:
    """Runs a program from the command line; a wrong value or file is one line and exit status 2."""
    with one_line_errors(Run.whereabouts):
        config = parse(config_class, presets)
        if "RANK" in os.environ:  # torchrun has started this process
            processes.join(config.device)
        try:
            with redirect_stdout(sys.stdout if rank_and_world()[0] == 0 else io.StringIO()):
                main(config)
        except KeyboardInterrupt:
            print("\ninterrupted; --resume continues from the last checkpoint", file=sys.stderr)
            raise SystemExit(130) from None
        except RuntimeError as error:  # torch's own, on a GPU and on a CPU
            if "closed by peer" in str(error):
                raise UserError("another process has ended; its own message says why") from None
            if not re.search("out of memory|allocate memory", str(error)):
                raise
            line = str(error).splitlines()[0]
            raise UserError(f"{line:.200}; lower --max_tokens, then --batch_size") from None


CHOICES = {"dtype": ("auto", "float32", "bfloat16"), "attention": ("auto", "plain")}


def check_choices(config: RunConfig, choices: dict[str, tuple[str, ...]]) -> None:
    """UserError for a flag with another value than one of its choices, {flag: choices}."""
    for name, known in choices.items():
        if (value := getattr(config, name)) not in known:
            raise UserError(f"--{name} {value} is unknown; choose from {', '.join(known)}")


def resolve_dtype(config: RunConfig) -> str:
    """What --dtype auto is: bfloat16 on a GPU that has it, else float32."""
    if config.dtype != "auto":
        return config.dtype
    on_gpu = resolve_device(config.device).type == "cuda"
    has_it = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it else "float32"


def program(main: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """What surrounds main(config) of a stage: the autocast of --dtype, which decides precision.

    However main ends, the steps that were made are saved and its folders are free for others.
    """

    @functools.wraps(main)
    def wrapped(config: RunConfig) -> dict:
        check_choices(config, CHOICES)
        device, config = resolve_device(config.device), replace(config, dtype=resolve_dtype(config))
        low = config.dtype == "bfloat16"
        if device.type == "cuda":  # high: TF32; highest: the scalar heads, all that is left in fp32
            torch.set_float32_matmul_precision("highest" if low else "high")
        Run.active_run, held = None, set(folders.LOCKS)
        try:
            # no cache of cast weights: they would be stale after an optimiser step
            with torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False):
                return main(config)
        finally:
            if Run.active_run:
                Run.active_run.save_whole_step()
            folders.free([folder for folder in folders.LOCKS if folder not in held])

    return wrapped


def name_unused(config: RunConfig, because: str, *names: str) -> None:
    """Says which of these flags were given, although they have no effect here."""
    given = [f for f in fields(config) if getattr(config, f.name) != f.default]
    if unused := [f"--{f.name} {getattr(config, f.name)}" for f in given if f.name in names]:
        print(f"without effect {because}: {', '.join(unused)}")


def progress(title: str, total: int, done: int = 0) -> tqdm:
    """A progress bar, shown by rank 0 alone; every ten seconds if stderr is not a terminal."""
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    options = {"initial": done, "disable": rank_and_world()[0] > 0 or not title}
    if not sys.stderr.isatty():
        options |= {"mininterval": 10, "delay": 1e-9}  # the delay suppresses the bar at 0 %
    return tqdm(desc=title, total=total, ncols=80, bar_format=layout, **options)


# of resuming a run with other settings
INSTEAD = dict.fromkeys(("sft", "dpo", "ppo"), "train it further: --init {} --out NEW")
INSTEAD["base"] = "fine-tune it as it is: --init {}"
FORMAT = 2  # of checkpoint.pt
KEYS = {"stage": str, "config": dict, "gpt": dict, "codec": dict, "step": int, "metrics": list}
KEYS |= {"samples": str, "inputs": dict, "resolved": dict, "model": dict, "training": dict}


def load_checkpoint(folder: str | Path) -> dict:
    """The checkpoint in a stage's folder, with every key of KEYS.

    FileNotFoundError names the command that makes it; UserError if it is no such checkpoint.
    """
    path = Path(folder) / "checkpoint.pt"
    if Path(folder).is_file():
        raise UserError(f"{folder} is a file; give the folder that holds it")
    if not path.exists():
        if any(path.parent.glob("*model*")):
            raise UserError(f"{folder} holds another program's model; expected a stage's folder")
        makers = {"base": "sft", "sft": "sft", "reward": "reward", "dpo": "reward"}
        stage = makers.get(path.parent.name.rstrip("0123456789"), "ppo")  # of out/reward2 as well
        raise FileNotFoundError(f"{path} does not exist; `python {stage}.py` makes it")
    saved = found if isinstance(found := unpickle(path), dict) else {}
    version = str(saved.get("format", 1))  # as text, since it may be a tensor
    if "stage" in saved and version != str(FORMAT):
        wrong = f"{path} has format {version:.20}, expected {FORMAT}"
        raise UserError(f"{wrong}: another version of this project wrote it; train it anew")
    for key, kind in KEYS.items():
        if type(saved.get(key)) is not kind:
            raise UserError(f"{path} is no checkpoint of a stage: it has no {kind.__name__} {key}")
    codec = saved["codec"]
    parts = [(codec.get("tokenizer"), str), ({"template": codec.get("template")}, str)]
    parts += [(saved["config"], str | int | float), (saved["gpt"], int | float)]
    for part, kind in [*parts, *((line, int | float) for line in saved["metrics"])]:
        if not isinstance(part, dict) or not all(isinstance(x, kind) for x in part.values()):
            raise UserError(f"{path} is no checkpoint of a stage: it holds {part!r:.80}")
    return saved


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, a first Ctrl-C or SIGTERM is only noted, so that the step can end; a second acts."""
    caught: list[int] = []
    allowed = threading.current_thread() is threading.main_thread()  # others may set no handler
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if allowed}

    def note(number: int, _) -> None:
        caught.append(number)
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Run:
    """A stage's folder: config.json, metrics.jsonl, samples.txt and an exact checkpoint.pt.

    The checkpoint holds the networks `modules`, unsharded, of which later stages load "model"; the
    state of the optimiser; and `extra`, a dict of numbers and tensors that a stage may fill. `gpt`
    is the dataclass of the network's sizes; `codec` has a state_dict(); `read` names inputs that no
    flag of type Input names. What was read has to be the same when the run is resumed.
    """

    active_run: "Run | None" = None  # the run that is in steps()

    def __init__(
        self, stage: str, config: RunConfig, folder: str, gpt, codec, optimizer, read=(), **modules
    ):
        self.stage, self.config, self.folder = stage, config, Path(folder)
        self.gpt, self.codec, self.optimizer = gpt, codec, optimizer
        self.modules, self.extra = torch.nn.ModuleDict(modules), {}
        self.step, self.metrics, self.samples = 0, [], ""
        self.saved = None  # steps that the checkpoint holds
        self.saved_at, self.saving = -math.inf, 0.0  # when that was, and how many seconds it took
        self.changed = False  # has this step changed weights?
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "changed", True))
        rank, world = rank_and_world()
        self.is_writer = rank == 0
        places = folders.inputs(config, free=False) | dict(read)
        self.inputs = {name: folders.fingerprint(place) for name, place in places.items()}
        device, dtype = str(resolve_device(config.device)), resolve_dtype(config)
        attention = getattr(modules.get("model"), "attention", "plain")
        self.resolved = {"device": device, "dtype": dtype, "attention": attention}
        self.resolved["processes"] = world
        if config.resume and (self.folder / "checkpoint.pt").exists():
            self._restore()
        elif config.resume:
            print(f"{self.folder} has no checkpoint to resume from: {stage} begins at step 0")
        self.write("metrics.jsonl", self.metrics_lines())
        self.write("samples.txt", self.samples)

    def _restore(self) -> None:
        saved = load_checkpoint(self.folder)
        self._check_same(saved)
        training = saved["training"] | {"model": saved["model"]}
        try:
            processes.load_full_state(self.modules, self.optimizer, training)
            self.extra = dict(training["extra"])
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            what = f"it is not of this network: {' '.join(str(error).split()):.200}"
            raise UserError(f"{self.folder}/checkpoint.pt: {what}") from None
        self.step, self.metrics, self.samples = saved["step"], saved["metrics"], saved["samples"]
        self.saved = self.step

    def _check_same(self, saved: dict) -> None:
        """UserError unless the checkpoint was made with the same settings and inputs."""
        if saved["stage"] != self.stage:
            raise UserError(f"{self.folder} holds a run of {saved['stage']}, not of {self.stage}")
        marks = {field.name: get_args(field.type) for field in fields(self.config)}
        names = [name for name in marks if not {"free", "input"} & set(marks[name])]
        theirs, ours = saved["config"] | saved["resolved"], asdict(self.config) | self.resolved
        for name in [*names, "dtype", "attention"]:
            value = theirs.get(name)
            if str(value) != str(ours[name]):  # as text, since nan != nan
                way = INSTEAD.get(self.stage, "start anew without --resume").format(self.folder)
                wrong = f"{self.folder} was made with --{name} {value}, not {ours[name]}"
                raise UserError(f"{wrong}; resume it with the same value, or {way}")
        then = saved["inputs"]
        for name in [n for n, found in self.inputs.items() if then.get(n, found) != found]:
            if name != "reward":  # whose source may have been repaired
                wrong = f"{self.folder} was made with another --{name} than {ours[name] or 'now'}"
                remedy = "restore it, or start anew without --resume"
                raise UserError(f"{wrong}: what is read has changed; {remedy}")
            print(f"--reward {ours[name]} has changed since {self.folder} was saved")
        now = self.resolved["processes"]
        if str(were := theirs.get("processes", now)) != str(now):
            print(f"{were} processes before, {now} now: sampling draws other random numbers")

    def save(self, by_itself: bool = False) -> None:
        """Writes checkpoint.pt; on return it is on disk for every process.

        by_itself: this process writes, whatever the others do; a sharded run cannot.
        """
        began = time.monotonic()
        training = processes.full_state(self.modules, self.optimizer, everywhere=by_itself)
        same = ("stage", "step", "metrics", "samples", "inputs", "resolved")
        checkpoint = {"format": FORMAT} | {name: getattr(self, name) for name in same}
        checkpoint |= {"config": asdict(self.config), "gpt": asdict(self.gpt)}
        checkpoint |= {"codec": self.codec.state_dict(), "model": training.pop("model")}
        checkpoint["training"] = training | {"extra": self.extra}
        if self.is_writer or by_itself:
            with atomic(self.folder / "checkpoint.pt") as file:
                torch.save(checkpoint, file)
        self.write("config.json", strict_json(asdict(self.config), indent=1))
        self.saved = self.step
        if not by_itself:
            gather(None)  # barrier: wait for rank 0 to finish writing
        self.saved_at = time.monotonic()
        self.saving = self.saved_at - began

    def save_whole_step(self) -> None:
        """Saves what the steps before this one made, if this one has changed no weights yet."""
        if not self.changed and self.step > (self.saved or 0) and not self.config.shard:
            del self.metrics[self.step :]
            self.save(by_itself=True)

    def is_due(self) -> bool:
        """Whether to save now: that costs at most 2 % of the time, or ten minutes have passed."""
        if self.config.save_every:
            return self.step % self.config.save_every == 0
        return time.monotonic() - self.saved_at >= min(50 * self.saving, 600)

    def steps(self, total: int) -> Iterator[int]:
        """The remaining steps, with a progress bar; a step's metrics are written when it ends."""
        Run.active_run = self
        with stop_signals() as caught, progress(self.stage, total, self.step) as bar:
            for step in range(self.step, total):
                self.metrics.append({"step": step})
                yield step
                self.append("metrics.jsonl", strict_json(self.metrics[-1]) + "\n")
                bar.set_postfix_str(self.shown, refresh=False)
                bar.update()
                self.step, self.changed = step + 1, False
                # all processes save, or end, after the same step; the first one's clock decides
                signals, due = zip(*gather((caught[:1], self.is_due())), strict=True)
                stopped = [number for found in signals for number in found]
                if due[0] or self.step == total or stopped:
                    self.save()
                if stopped:
                    done = f"{self.folder}: saved after step {self.step} of {total}"
                    print(f"\n{done}; --resume continues", file=sys.stderr)
                    raise SystemExit(128 + stopped[0])
        Run.active_run = None

    @classmethod
    def whereabouts(cls) -> str:
        """What an error message adds: the step of the running stage, and its last checkpoint."""
        if (run := cls.active_run) is None:
            return ""
        held = "no checkpoint yet" if run.saved is None else f"a checkpoint of {run.saved} steps"
        return f" ({run.stage}, step {run.step}; {run.folder} has {held})"

    def log(self, metrics: dict[str, float], shown: Sequence[str] = ()) -> None:
        """Metrics of this step, for metrics.jsonl; the bar shows four of them at most."""
        self.metrics[-1] |= metrics
        line = self.metrics[-1]
        names = [name for name in shown or line if name in line and name != "step"][:4]
        self.shown = ", ".join(f"{name.split('/')[-1]} {line[name]:.3g}" for name in names)

    def amend(self, metrics: dict[str, float]) -> None:
        """Adds what is known after the last step to its line of metrics.jsonl, and saves."""
        self.metrics[-1] |= metrics
        self.write("metrics.jsonl", self.metrics_lines())
        self.save()

    def sample(self, *lines: str) -> None:
        """A block of text for a person to read, appended to samples.txt."""
        block = "\n".join(map(printable, lines)) + "\n\n"
        self.samples += block
        self.append("samples.txt", block)

    def metrics_lines(self) -> str:
        return "".join(strict_json(line) + "\n" for line in self.metrics)

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder, whole or not at all."""
        if self.is_writer:
            with atomic(self.folder / name) as file:
                file.write(text.encode())

    def append(self, name: str, text: str) -> None:
        if self.is_writer:
            append(self.folder / name, text)
