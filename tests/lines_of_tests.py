"""Which test runs which line of the sources, measured by coverage, and how long each test takes.

As a plugin of pytest (`-p lines_of_tests`), this file tells coverage what is running: a test, or a
fixture that several tests share. Programs that a test starts are measured as a part of it.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCES = ("sft.py", "reward.py", "ppo.py", "model.py")
SOURCES += ("data/run.py", "data/report.py", "data/records.py")
TESTS = ("ppo", "reward", "sft", "report", "model", "pipeline", "closed_form", "many", "self_check")
TESTS += ("run", "data", "labeler", "toy", "weights", "tokenizer")  # those that run the sources
MAP = Path(__file__).parents[1] / "out" / "lines_of_tests.json"
FLAGS = ("-n0", "-p", "no:cacheprovider", "--hypothesis-seed=0")
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
    """{test: [seconds, those of its fixtures, ["file:line", ...]]} of a file of tests."""
    import coverage

    (folder / "settings").write_text(SETTINGS)
    command = [sys.executable, "-m", "coverage", "run", "--rcfile=settings", "-m", "pytest", "-q"]
    paths = {"COVERAGE_FILE": str(folder / f"{name}.coverage"), "PYTHONPATH": "tests"}
    paths["COVERAGE_PROCESS_START"] = str(folder / "settings")
    command += ["-p", "lines_of_tests", *FLAGS, f"tests/test_{name}.py"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=folder, env=os.environ | paths, **quiet)
    seconds, fixtures = json.loads((folder / "measured.json").read_text())
    with contextlib.chdir(folder):
        merged = coverage.Coverage(data_file=paths["COVERAGE_FILE"], config_file=False)
        merged.combine()
    ran: dict[str, set[str]] = {what: set() for what in seconds}
    for file in SOURCES:
        for line, contexts in merged.get_data().contexts_by_lineno(file).items():
            for what in {context.split("|")[-1] for context in contexts} & ran.keys():
                ran[what].add(f"{file}:{line}")
    found = {}
    for test, names in fixtures.items():
        shared = [name for name in names if name in ran]
        lines = ran[test].union(*(ran[name] for name in shared))
        found[test] = [seconds[test], sum(seconds[name] for name in shared), sorted(lines)]
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
