"""Makes mistakes by rule on the syntax tree, at random, and shows those that no test sees.

    python tests/mutations.py --random 150 --seed 1

A comparison or a sign is flipped, a number is off by one, arguments are swapped, a statement is
dropped, a branch is the wrong one, min is max, an index is its neighbour. For each mistake run the
tests that pass through its line, the cheap ones first, up to SECONDS of them. Which ones these are
is measured by coverage when it is first needed, and kept in out/ for as long as the files stay the
same. equivalent.jsonl names mistakes that change nothing that a test could require, with reasons.
"""

import ast
import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lines_of_tests import FLAGS, SOURCES, measured_map

ROOT = Path(__file__).parents[1]
KERNELS = b"\nif triton:"  # what follows in model.py is left out
EQUIVALENT = ROOT / "tests" / "equivalent.jsonl"
SECONDS = 30  # of tests for a mistake, as the map has measured them; eight times that ends them
SLOW_IMPORTS = ("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "hypothesis")
SLOW_IMPORTS += ("torch.distributed.tensor", "tiktoken", "transformers.models.gpt2")


# ---- the mistakes

FLIPS = {ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE)}
FLIPS |= {ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,)}
FLIPS |= {ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)}
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
OTHER = {"min": "max", "max": "min"}


class Mistake(NamedTuple):
    file: str
    line: int
    function: range  # its lines
    code: str  # the lines, as one, before
    wrong: str  # and after
    start: int  # where the bytes of text stand in place of others
    end: int
    text: bytes


def wrong_versions(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in the node's place by mistake."""

    def but(**fields: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[op]) if type(op) in FLIPS:
            yield from (but(ops=[flip()]) for flip in FLIPS[type(op)])
        case ast.BinOp(op=op) if type(op) in SIGNS:
            yield but(op=SIGNS[type(op)]())
            if isinstance(op, ast.Sub):
                yield but(left=node.right, right=node.left)
        case ast.AugAssign(op=op) if type(op) in SIGNS:
            yield from (but(op=SIGNS[type(op)]()), ast.Pass())
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield node.operand
        case ast.BoolOp(op=op):
            yield but(op=ast.And() if isinstance(op, ast.Or) else ast.Or())
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Subscript(slice=ast.Name(id=name)) if len(name) == 1:  # an index, and no key
            yield but(slice=ast.BinOp(node.slice, ast.Add(), ast.Constant(1)))
        case ast.Slice(upper=ast.Name() as upper):
            yield but(upper=ast.BinOp(upper, ast.Sub(), ast.Constant(1)))
        case ast.IfExp():
            yield but(body=node.orelse, orelse=node.body)
        case ast.Name(id=name) if name in OTHER:
            yield but(id=OTHER[name])
        case ast.Attribute(attr=name) if name in OTHER:
            yield but(attr=OTHER[name])
        case ast.keyword(arg=name) if name in OTHER:
            yield but(arg=OTHER[name])
        case ast.Call(args=args):
            for i, (a, b) in enumerate(zip(args, args[1:], strict=False)):
                if type(a) is type(b) and not isinstance(a, ast.Constant | ast.Starred):
                    yield but(args=[*args[:i], b, a, *args[i + 2 :]])
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Delete():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def places(node: ast.AST, function: range) -> Iterator[tuple[ast.AST, ast.AST, range]]:
    """(node, what could stand there, lines of the function): not in annotations and decorators, the
    defaults of flags, messages, `strict` of zip, and what only runs on import."""
    yield from ((node, wrong, function) for wrong in wrong_versions(node))
    if isinstance(node, ast.If):
        yield node.test, ast.UnaryOp(ast.Not(), node.test), function
    if isinstance(node, ast.FunctionDef):
        function = range(node.lineno, node.end_lineno + 1)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            flag = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
            on_import = isinstance(node, ast.Module) and isinstance(child, ast.If | ast.Try)
            check = isinstance(child, ast.keyword) and child.arg == "strict"
            ignored = check or name in ("annotation", "returns", "decorator_list")
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                if not (flag or on_import or ignored):
                    yield from places(child, function)


def mistakes(file: str) -> list[Mistake]:
    """Every mistake that the rules can make in a file."""
    source, found = (ROOT / file).read_bytes().split(KERNELS)[0], []
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, wrong, function in places(ast.parse(source), range(0)):
        begin, stop = starts[node.lineno - 1], starts[node.end_lineno]
        start, end = begin + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(wrong).encode()
        after = source[begin:start] + text + source[end:stop]
        shown = (" ".join(code.decode().split()) for code in (source[begin:stop], after))
        found.append(Mistake(file, node.lineno, function, *shown, start, end, text))
    return found


# ---- the tests of a mistake


def chosen_tests(mistake: Mistake, known: dict) -> list[str]:
    """The tests of its line, first those of few seconds and lines; else of its function, or file.

    All tests run the lines outside of functions, though only programs are seen to import them.
    Tests that need an expensive fixture stand side by side, so that it is made once.
    """
    own_lines = [[mistake.line], mistake.function] if mistake.function else []
    for lines in (*own_lines, range(9999)):
        places = {f"{mistake.file}:{line}" for line in lines}
        found = sorted(
            (test.split("::")[0] if setup > 1 else "", seconds * len(own), test)
            for test, (seconds, setup, own) in known.items()
            if seconds < float("inf") and not places.isdisjoint(own)
        )
        if found:
            break
    chosen, spent, made = [], 0.0, {""}
    for file, _, test in found:
        spent += known[test][0] + (0 if file in made else known[test][1])
        made.add(file)
        chosen += [test] if spent <= SECONDS else []
    return chosen


# ---- running them: each mistake in a process of its own, which need not import torch anew


class Chosen:
    """Lets these tests run in this order, and notes the first that fails."""

    def __init__(self, tests: list[str]):
        self.order = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list) -> None:
        kept = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            Path("failed").write_text(report.nodeid)


def first_failure(folder: Path, tests: list[str]) -> str:
    """The first of the tests to fail in the copy, or what else went wrong; "" if all pass."""
    (folder / "failed").unlink(missing_ok=True)
    if not (child := os.fork()):
        os.setsid()  # so that its processes end with it
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        os._exit(pytest.main(["-x", "-q", *FLAGS, *files], plugins=[Chosen(tests)]))
    end = time.time() + 8 * SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        if time.time() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "the end of patience"
    named = (folder / "failed").read_text() if (folder / "failed").exists() else "an import"
    return named if ended[1] else ""


def seen_by(mistake: Mistake, folder: Path, known: dict, sound: set[str]) -> str:
    """The test that fails if the mistake is made in the copy, and passes if it is not; or ""."""
    path, tests = folder / mistake.file, chosen_tests(mistake, known)
    source = path.read_bytes()
    path.write_bytes(source[: mistake.start] + mistake.text + source[mistake.end :])
    failed = first_failure(folder, tests) if tests else ""
    path.write_bytes(source)
    if failed in tests and failed not in sound:
        if first_failure(folder, [failed]):  # it fails without a mistake, too: without it, again
            known.pop(failed)
            return seen_by(mistake, folder, known, sound)
        sound.add(failed)
    return failed.removeprefix("tests/")


def main(n: int, seed: int) -> None:
    """Makes n mistakes; the last line is `seen S of M, K equivalent`, where M + K = n."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    named = map(json.loads, EQUIVALENT.read_text("utf-8").splitlines())
    reasons = {(x["file"], x["code"], x["wrong"]): x["reason"] for x in named}
    every = [mistake for file in SOURCES for mistake in mistakes(file)]
    survivors, equivalent, sound = [], 0, set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "copy"
        outputs = shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=outputs)
        known = measured_map(folder)
        for module in SLOW_IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        for place, mistake in enumerate(random.Random(seed).sample(every, n), start=1):
            start, what = time.time(), (mistake.file, mistake.code, mistake.wrong)
            if what in reasons:
                equivalent += 1
                verdict = f"equivalent: {reasons[what]}"
            elif test := seen_by(mistake, folder, known, sound):
                verdict = f"seen by {test}"
            else:
                survivors.append(what)
                verdict = "SURVIVES"
            print(f"{place} {mistake.file}:{mistake.line}: {mistake.code}\n  -> {mistake.wrong}")
            print(f"  {time.time() - start:.0f} s, {verdict}", flush=True)
    for what in survivors:
        print(json.dumps(dict(zip(("file", "code", "wrong"), what, strict=True))))
    tested = n - equivalent
    print(f"seen {tested - len(survivors)} of {tested}, {equivalent} equivalent")
