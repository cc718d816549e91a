"""Handing out, grading, and each exercise alone, whatever state the others are in."""

import csv
import json
import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_pixpro
from test_pixpro import EXERCISES, HANDED_OUT, HERE, hand_out

SOURCE = (HERE / "pixpro.py").read_text("utf-8")
EQ5 = "    return -mean_over_images(pixel_cosine(y, x_prime.detach()), positives)  # Eq. 5\n"
RIGHT, WRONG = EQ5.strip(), EQ5.strip().replace("-mean", "mean")
HELPER = "SIGN: int = -1\ndef negative(x: float): return math.prod([SIGN, x])"
# What a submission has in place of this line, what at its top, and the verdict.
SUBMISSIONS = [
    (RIGHT, "", "passed"),
    (RIGHT, "import os; os._exit(0)", "passed"),  # no statement at the top runs
    (RIGHT.replace("-mean", "negative(mean").replace(")  #", "))  #"), HELPER, "passed"),
    (f"print('FAILED test_pixpro.py::test_eq5_form'); {RIGHT}", "", "passed"),
    (WRONG, "torch.Tensor.tolist = lambda self: [0.0]", "failed  test_eq5_by_hand"),
    (WRONG, "", "failed  test_eq5_by_hand: Eq. 5 by hand: expected -0.752369, found 0.752369."),
    (f"import os; os._exit(0); {RIGHT}", "", "failed  test_eq5_form: the process ended with 0"),
    ("while True: pass", "", "failed  test_eq5_form: no end within 6 seconds"),
    (f"import pytest; pytest.skip(); {RIGHT}", "", "failed  test_eq5_form: skipped"),
    (f"import builtins; builtins.abs = int; {RIGHT}", "", "failed  the file: it changes abs"),
    ("return slow_consistency(y, x_prime, positives)", "", "failed  expected a body of its own"),
    (f"breakpoint(); {RIGHT}", "", "failed  test_eq5_form"),
    ("raise NotImplementedError", "", "open"),
    (f"{RIGHT}\n    raise NotImplementedError", "", "passed"),
    (RIGHT, "def lr_at(step): pass", "failed  expected pixpro.py or train.py, found both in one"),
    (f"{RIGHT}\n  x", "", "failed  cannot be read: unindent does not match"),
]


def run(*arguments, **settings):
    command = [sys.executable, HERE / "test_pixpro.py", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


def test_passed_needs_every_report_and_nothing_of_the_shell_counts(tmp_path):
    for number, (line, top, _) in enumerate(SUBMISSIONS):
        text = SOURCE.replace("import math\n", f"import math\n{top}\n")
        text = text.replace(EQ5, f"    {line}\n")
        (tmp_path / f"{number:02}.py").write_text(text, "utf-8")
    (tmp_path / "exported.ipynb").touch()
    shell = {"FORCE_COLOR": "1", "PYTEST_ADDOPTS": "--no-summary -k eq1", "PYTHONWARNINGS": "error"}
    options = ["--timeout", 6, "--csv", tmp_path / "t.csv", "--gradescope", tmp_path / "t.json"]
    done = run("grade", tmp_path, "--only", "eq5", *options, **shell)
    assert done.returncode == 1, done.stderr
    assert "(ignored in 01.py: os._exit(0))" in done.stdout
    assert done.stdout.endswith("(not graded: files of .ipynb)\n")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    scores = [test["score"] for test in json.loads((tmp_path / "t.json").read_text())["tests"]]
    for row, score, (line, _, verdict) in zip(rows, scores, SUBMISSIONS, strict=True):
        assert row["eq5"].startswith(verdict), line
        assert score == (verdict == "passed")


def test_handing_out_and_back(tmp_path):
    folder = tmp_path / "class"
    assert run("eq6", "lars", folder).returncode == 0
    expected = {folder / name for name in ("README.md", *HANDED_OUT)}
    assert {path for path in folder.rglob("*") if path.is_file()} == expected
    readme, notebook = [(folder / name).read_text() for name in ("README.md", "tutorial.ipynb")]
    assert EXERCISES["eq6"].command() in readme and '"outputs": []' in notebook
    done = run("grade", folder / "pixpro.py", "--only", "eq6", "eq5")
    assert (done.returncode, done.stdout) == (1, "eq5       passed\neq6       open\n")
    assert run("grade", folder / "pixpro.py", "--only", "eq5").returncode == 0
    for words in (["grade", __file__], ["eq9", tmp_path / "x"], ["eq6"]):
        refused = run(*words)
        assert refused.returncode != 0 and "expected" in refused.stderr, words


def test_words_select_their_own_groups():
    words = " or ".join(exercise.tests for exercise in EXERCISES.values()).split(" or ")
    names = [name for name in vars(test_pixpro) if name.startswith("test_")]
    assert all(sum(word in name for word in words) <= 1 for name in names)
    assert all(any(word in name for name in names) for word in words)


def pytest_in(folder, words):
    """The exit code of pytest in this copy, in a fork, so that torch is imported once."""
    for name in ("pixpro", "train", "test_pixpro"):
        sys.modules.pop(name)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os._exit(pytest.main(["-qx", "-k", words, "-p", "no:cacheprovider", str(folder)]))


@pytest.mark.parametrize("word", EXERCISES)
def test_an_exercise_is_tested_alone(word, tmp_path):
    """Its tests pass while all others are open, and fail where it alone is."""
    needed = {word, "bins"} if word == "eq1" else {word}  # positive_pairs needs bin_centres
    for name, words, code in (("others", EXERCISES.keys() - needed, 0), ("alone", [word], 1)):
        hand_out(list(words), tmp_path / name)
        arguments = (tmp_path / name, EXERCISES[word].tests)
        process = get_context("fork").Process(target=pytest_in, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode == code
