"""Checks that each exercise can be graded, whatever state the others are in.

    python .ci/exercises.py

For each exercise all others are opened; its own tests must pass. Then it is opened alone; its own
tests must fail, and the first one at the open body.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_pixpro import EXERCISES, hand_out


def pytest_in(folder, words):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", words, "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


for word, exercise in EXERCISES.items():
    needed = {word, "bins"} if word == "eq1" else {word}  # positive_pairs needs bin_centres
    others = [name for name in EXERCISES if name not in needed]
    with tempfile.TemporaryDirectory() as place:
        hand_out(others, Path(place, "others"))
        done = pytest_in(Path(place, "others"), exercise.tests)
        assert done.returncode == 0, done.stdout
        hand_out([word], Path(place, "alone"))
        done = pytest_in(Path(place, "alone"), exercise.tests)
        assert done.returncode == 1 and "NotImplementedError" in done.stdout, done.stdout
    print(
        f"{word}: its tests pass beside open exercises, and fail at its own open body", flush=True
    )
