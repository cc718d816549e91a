"""Checks README.md and tutorial.ipynb against the project: names, links, flags, outputs, figures.

python .ci/pages.py
"""

import ast
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pixpro
import test_pixpro
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CELLS = json.loads((ROOT / "tutorial.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SOURCE = "\n".join("".join(cell["source"]) for cell in CODE)


def check_readme():
    tests = set(re.findall(r"`(test_\w+)`", README))
    assert len(tests) >= 10 and tests <= vars(test_pixpro).keys(), tests - vars(test_pixpro).keys()
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
    headings = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"\n#+ (.+)", README)}
    assert set(re.findall(r"\]\((#[^)]+)\)", README)) <= headings
    assert "pip install matplotlib ipykernel" in README


def check_exercises():
    """README and the tutorial name the exercises as the table of test_pixpro.py does."""
    text = "\n".join("".join(cell["source"]) for cell in CELLS)
    chapters = re.split(r"\n## (?=\d)", text)
    exercises = test_pixpro.EXERCISES.items()
    commands = {f"`{exercise.command()}`" for _, exercise in exercises}
    for page in (README, *chapters):
        found = set(re.findall(r"`pytest -k [^`]* -x[^`]*`", page))
        assert found <= commands, found - commands
    for word, exercise in exercises:
        functions = ", ".join(f"`{name}`" for name in exercise.functions.split())
        cells = [f"`{word}`", functions, exercise.place, str(exercise.chapter), exercise.hard]
        assert f"| {' | '.join(cells)} |" in README, word
        assert f"`{exercise.command()}`" in chapters[exercise.chapter], word


def check_flags():
    ours = {"--" + name.replace("_", "-") for name in vars(train.parse([]))} | {"--help"}
    torchruns = {"--nproc", "--nnodes", "--standalone", "--max-restarts", "--rdzv"}
    slurms = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--requeue"}
    scripts = {"--labels"}  # of .ci/experiments.py
    flags = set(re.findall(r"(?<![-|])--[a-z][a-z-]*", README))
    assert flags <= ours | torchruns | slurms | scripts, flags - ours


def check_notebook_outputs():
    counts = [cell["execution_count"] for cell in CODE]
    assert counts == list(range(1, len(CODE) + 1))  # from top to bottom
    outputs = [output for cell in CODE for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"display_data", "stream"}  # no error
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 15
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/|[A-Z]:\\", text + SOURCE)


def check_notebook_defines_nothing_again():
    nodes = list(ast.walk(ast.parse(SOURCE)))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    pixpros, trains = [
        {name for name, value in vars(module).items() if callable(value)}
        for module in (pixpro, train)
    ]
    assert len(defined) > 10 and not defined & (pixpros | trains)
    assert not assigned & pixpros  # a variable may be called as a function of train is


def check_imports():
    """What a copied function needs is torch and the standard library."""
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision"}
    for name, extra in (("pixpro", set()), ("train", {"numpy", "pixpro", "PIL"})):
        modules = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
        assert modules <= allowed | extra, modules


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(f"{name} holds")
