"""Checks that each exercise can be graded, whatever state the others are in.

    python .ci/exercises.py

For each exercise all others are opened; its own tests must pass. Then it is opened alone: its body
and its slow version must be gone, and nothing else; its own tests must fail at the open body.
"""

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_pixpro import EXERCISES, HERE, find, hand_out, is_kept


def pytest_in(folder, words):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", words, "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def check_open(folder, exercise):
    """Signature, docstring and checks of the functions stay; the rest of the body is one raise."""
    original = (HERE / exercise.file()).read_text("utf-8")
    source = (folder / exercise.file()).read_text("utf-8")
    for name in exercise.functions.split():
        before, after = find(ast.parse(original), name), find(ast.parse(source), name)
        assert ast.unparse(after.args) == ast.unparse(before.args)
        *kept, last = after.body
        assert ast.unparse(last).startswith("raise NotImplementedError")
        assert [*map(ast.unparse, kept)] == [ast.unparse(s) for s in before.body if is_kept(s)]
    others = {line for line in source.splitlines() if "NotImplementedError" not in line}
    assert others <= set(original.splitlines())
    tests = ast.parse((folder / "test_pixpro.py").read_text("utf-8"))
    names = [node.name for node in tests.body if isinstance(node, ast.FunctionDef)]
    assert exercise.slow not in names
    own = [name for name in names if any(w in name for w in exercise.tests.split(" or "))]
    assert len(own) >= 3
    assert not exercise.slow or any("authors" in name or "by_hand" in name for name in own)


for word, exercise in EXERCISES.items():
    needed = {word, "bins"} if word == "eq1" else {word}  # positive_pairs needs bin_centres
    others = [name for name in EXERCISES if name not in needed]
    with tempfile.TemporaryDirectory() as place:
        hand_out(others, Path(place, "others"))
        done = pytest_in(Path(place, "others"), exercise.tests)
        assert done.returncode == 0, done.stdout
        hand_out([word], Path(place, "alone"))
        check_open(Path(place, "alone"), exercise)
        done = pytest_in(Path(place, "alone"), exercise.tests)
        assert done.returncode == 1 and "NotImplementedError" in done.stdout, done.stdout
    print(
        f"{word}: its tests pass beside open exercises, and fail at its own open body", flush=True
    )
