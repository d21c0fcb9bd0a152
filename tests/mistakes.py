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
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("sft.py", "reward.py", "ppo.py", "model.py")
SOURCES += ("data/run.py", "data/report.py", "data/records.py")
KERNELS = b"\nif triton:"  # what follows in model.py is left out
TESTS = ("ppo", "reward", "sft", "report", "model", "pipeline", "closed_form", "many", "self_check")
TESTS += ("run", "data", "labeler", "toy", "weights", "tokenizer")  # those that run the sources
MAP = ROOT / "out" / "lines_of_tests.json"
EQUIVALENT = ROOT / "tests" / "equivalent.jsonl"
SECONDS = 60  # of tests for a mistake, as the map has measured them; four times that ends them
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
    start: int  # the bytes of the file from start to end become text
    end: int
    text: str


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
    defaults of flags, messages, and what only runs on import."""
    yield from ((node, wrong, function) for wrong in wrong_versions(node))
    if isinstance(node, ast.If):
        yield node.test, ast.UnaryOp(ast.Not(), node.test), function
    if isinstance(node, ast.FunctionDef):
        function = range(node.lineno, node.end_lineno + 1)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            flag = isinstance(node, ast.ClassDef) and isinstance(child, ast.AnnAssign)
            on_import = isinstance(node, ast.Module) and isinstance(child, ast.If | ast.Try)
            ignored = name in ("annotation", "returns", "decorator_list")
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
        text = ast.unparse(wrong)
        after = source[begin:start] + text.encode() + source[end:stop]
        shown = (" ".join(code.decode().split()) for code in (source[begin:stop], after))
        found.append(Mistake(file, node.lineno, function, *shown, start, end, text))
    return found


# ---- which test runs which line: with `-p mistakes`, pytest tells coverage what is running

CONTEXT = "MISTAKES_CONTEXT"  # an environment variable, so that the tests' processes know it too
SETTINGS = f"[run]\nparallel = true\nrelative_files = true\ncontext = ${{{CONTEXT}-}}\n"
measured: dict[str, float] = {}  # seconds of tests, and of fixtures that tests share
needed: dict[str, list[str]] = {}  # the fixtures of a test


def enter(context: str) -> str:
    import coverage

    coverage.Coverage.current().switch_context(context)
    before, os.environ[CONTEXT] = os.environ.get(CONTEXT, ""), context
    return before


def pytest_runtest_logstart(nodeid: str) -> None:
    enter(nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    shared = fixturedef.scope in ("module", "session")
    name, start = f"fixture {fixturedef.argname}", time.time()
    before = enter(name) if shared else ""
    found = yield
    if shared:
        measured[name] = time.time() - start
        measured[before] = measured.get(before, 0) - measured[name]  # a test has it once only
        enter(before)
    return found


def pytest_runtest_logreport(report) -> None:
    failed = float("inf") if report.failed else 0.0  # what fails anyway sees nothing
    measured[report.nodeid] = measured.get(report.nodeid, 0) + report.duration + failed


def pytest_collection_finish(session) -> None:
    for item in session.items:
        needed[item.nodeid] = [f"fixture {name}" for name in item.fixturenames]


def pytest_sessionfinish() -> None:
    Path("measured.json").write_text(json.dumps([measured, needed]))


def lines_of_tests(folder: Path, name: str) -> dict:
    """{test: [seconds, those of its fixtures, {source: lines}]} of a file of tests."""
    import coverage

    (folder / "settings").write_text(SETTINGS)
    command = [sys.executable, "-m", "coverage", "run", "--rcfile=settings", "-m", "pytest", "-q"]
    paths = {"COVERAGE_FILE": str(folder / f"{name}.coverage"), "PYTHONPATH": "tests"}
    paths["COVERAGE_PROCESS_START"] = str(folder / "settings")
    command += ["-p", "mistakes", *FLAGS, f"tests/test_{name}.py"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=folder, env=os.environ | paths, **quiet)
    seconds, fixtures = json.loads((folder / "measured.json").read_text())
    with contextlib.chdir(folder):
        merged = coverage.Coverage(data_file=paths["COVERAGE_FILE"], config_file=False)
        merged.combine()
    run: dict[str, dict[str, set]] = {what: {} for what in seconds}
    for source in SOURCES:
        for line, contexts in merged.get_data().contexts_by_lineno(source).items():
            for what in {context.split("|")[-1] for context in contexts} & run.keys():
                run[what].setdefault(source, set()).add(line)
    found = {}
    for test, own in fixtures.items():
        shared, lines = [name for name in own if name in run], run[test]
        for part in map(run.get, shared):
            lines = {f: lines.get(f, set()) | part.get(f, set()) for f in lines | part}
        setup = sum(seconds[name] for name in shared)
        found[test] = [seconds[test], setup, {file: sorted(n) for file, n in lines.items()}]
    return found


def measured_map(folder: Path) -> dict:
    """lines_of_tests of all TESTS; what has been measured of the same files is taken from MAP."""
    known = json.loads(MAP.read_text()) if MAP.exists() else {}
    paths = sorted([*folder.glob("*.py"), *folder.glob("data/*.py")])
    code = b"".join(path.read_bytes() for path in paths)
    for name in TESTS:
        content = code + (folder / f"tests/test_{name}.py").read_bytes()
        digest, start = hashlib.sha256(content).hexdigest(), time.time()
        if known.get(name, [""])[0] != digest:
            known[name] = [digest, lines_of_tests(folder, name)]
            print(f"test_{name}.py: measured in {time.time() - start:.0f} s", flush=True)
            MAP.parent.mkdir(exist_ok=True)
            MAP.write_text(json.dumps(known))
    return {test: found for _, tests in known.values() for test, found in tests.items()}


def chosen_tests(mistake: Mistake, known: dict) -> list[str]:
    """The tests of its line, the cheap ones first; if none, of its function; if none, of its file.

    Tests that need an expensive fixture stand side by side, so that it is made once.
    """
    for lines in ({mistake.line}, {*mistake.function}, None):
        found = []
        for test, (seconds, setup, files) in known.items():
            own = set(files.get(mistake.file, ()))
            if own and (lines is None or lines & own) and seconds < float("inf"):
                found.append((test.split("::")[0] if setup > 1 else "", seconds, len(own), test))
        if found:
            break
    chosen, spent, made = [], 0.0, {""}
    for file, seconds, _, test in sorted(found):
        spent += seconds + (0 if file in made else known[test][1])
        made.add(file)
        if spent <= SECONDS:
            chosen.append(test)
    return chosen


# ---- running them: each mistake in a process of its own, which need not import torch anew

FLAGS = ("-p", "no:cacheprovider", "--hypothesis-seed=0")


class Chosen:
    """Runs these tests in this order, and notes the first that fails."""

    def __init__(self, tests: list[str]):
        self.order = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list) -> None:
        kept = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(kept, key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            Path("failed").write_text(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            Path("failed").write_text(f"{report.nodeid}, on import")


def first_failure(folder: Path, tests: list[str]) -> str:
    """The first of the tests to fail in the copy, or to last too long; "" if all pass."""
    (folder / "failed").unlink(missing_ok=True)
    if not (child := os.fork()):
        os.setsid()  # so that its processes end with it
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        pytest.main(["-x", "-q", *FLAGS, *files], plugins=[Chosen(tests)])
        os._exit(0)
    end = time.time() + 4 * SECONDS
    while not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.05)
        if time.time() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"none of {len(tests)} tests, but they do not end"
    return (folder / "failed").read_text() if (folder / "failed").exists() else ""


def main(n: int, seed: int) -> None:
    """Makes n mistakes; the last line is `seen S of M, K equivalent`, where M + K = n."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    lines = EQUIVALENT.read_text("utf-8").splitlines()
    reasons = {(x["file"], x["code"], x["wrong"]): x["reason"] for x in map(json.loads, lines)}
    every = [mistake for file in SOURCES for mistake in mistakes(file)]
    drawn = random.Random(seed).sample(every, min(n, len(every)))
    seen, survivors = 0, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "copy"
        outputs = shutil.ignore_patterns("out", ".git", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=outputs)
        known = measured_map(folder)
        for module in SLOW_IMPORTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        for place, mistake in enumerate(drawn, start=1):
            file, line, _, code, wrong, start, end, text = mistake
            path, begin = folder / file, time.time()
            if reason := reasons.get((file, code, wrong)):
                what = f"equivalent: {reason}"
            else:
                source = path.read_bytes()
                path.write_bytes(source[:start] + text.encode() + source[end:])
                failed = first_failure(folder, chosen_tests(mistake, known))
                path.write_bytes(source)
                seen += bool(failed)
                survivors += [] if failed else [mistake]
                what = f"seen by {failed.removeprefix('tests/')}" if failed else "SURVIVES"
            took = time.time() - begin
            print(
                f"{place} {file}:{line}: {code}\n  -> {wrong}\n  {took:.0f} s, {what}", flush=True
            )
    for mistake in survivors:
        print(json.dumps({name: getattr(mistake, name) for name in ("file", "code", "wrong")}))
    tested = seen + len(survivors)
    print(f"seen {seen} of {tested}, {len(drawn) - tested} equivalent")
