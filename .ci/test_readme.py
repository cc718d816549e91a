"""README's snippets run; README and the tutorial agree with the project."""

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pixpro
import train
from pixpro import Backbone, Heads, PixelPropagation, PixPro
from test_pixpro import EXERCISES, HERE, SmallBackbone, random_boxes, small_batch, trained

README = (HERE / "README.md").read_text("utf-8")
RESULTS = (HERE / ".ci/results/README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CELLS = json.loads((HERE / "tutorial.ipynb").read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SOURCE = "\n".join("".join(cell["source"]) for cell in CODE)


def names_of(words):
    """What README's one snippet with these words defines."""
    [snippet] = [snippet for snippet in SNIPPETS if words in snippet]
    names = {}
    exec(snippet, names)
    return names


def save_authors_file(backbone, opt=None):
    """A file as the authors' code writes it, with these weights in its online encoder."""
    weights = {}
    for name, weight in backbone.body.state_dict().items():
        weights[f"module.encoder.{name}"] = weight
        weights[f"module.encoder_k.{name}"] = torch.zeros_like(weight)
    weights["module.projector.linear1.weight"] = torch.zeros(4, 4, 1, 1)
    opt = opt or argparse.Namespace(arch="resnet50", pixpro_p=2.0, batch_size=128)
    rest = {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 100}
    torch.save({"opt": opt, "model": weights} | rest, "pixpro_base_r50_100ep.pth")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Path("runs/mine").mkdir(parents=True)
    torch.save(Backbone("resnet18", "layer3").body.state_dict(), "runs/mine/backbone.pt")
    torch.save(Backbone("resnet50").body.state_dict(), "backbone.pt")
    if "heads.pt" in snippet:
        torch.save(Heads("resnet50").state_dict(), "heads.pt")
    if "module.encoder." in snippet:
        save_authors_file(Backbone("resnet50"))
    if "transformers" in snippet:
        pytest.importorskip("transformers")
    names = {}
    exec(snippet, names)
    if "loss" in names:
        assert names["loss"].isfinite() and names["loss"].requires_grad == ("model" in names)
    elif "model" in names:
        box = random_boxes(2, seed=0)
        names["model"](*torch.rand(2, 2, 3, 64, 64), box, box).loss.backward()
    if "segmenter" in names:  # of backbone.pt: in every network to the bit
        assert names["segmenter"].eval()(torch.rand(2, 3, 64, 64))["out"].shape == (2, 21, 64, 64)
        bodies = [names["segmenter"].backbone]
        if "classifier" in names:
            bodies += [names["classifier"], names["detector"].backbone.body]
        for body in bodies:
            weights = body.state_dict()
            assert all(torch.equal(weights[name], w) for name, w in names["weights"].items())


def test_readme_other_libraries_load_with_the_same_features_or_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone, image = train.with_blocks_on(Backbone("resnet50")).eval(), torch.rand(1, 3, 64, 64)
    torch.save(backbone.body.state_dict(), "backbone.pt")
    timm = pytest.importorskip("timm")
    for name, same in {"resnet50": True, "resnetblur50": False, "resnetaa50": False}.items():
        network = timm.create_model(name, num_classes=0).eval()
        network.load_state_dict(torch.load("backbone.pt"))
        assert torch.equal(network.forward_features(image), backbone(image)) == same, name


def test_readme_loads_the_authors_weights_strictly_and_without_their_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    authors = Backbone("resnet50")
    authors(torch.rand(2, 3, 64, 64))  # moves BatchNorm's statistics
    save_authors_file(authors)
    found = names_of("module.encoder.")["backbone"].body.state_dict()
    assert len(found) == 318  # all but fc: 53 convolutions, 53 BatchNorms with five entries each
    assert all(torch.equal(found[name], w) for name, w in authors.body.state_dict().items())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # ends with the block

    save_authors_file(authors, re.compile("code"))
    with pytest.raises(Exception, match="Weights only load failed"):
        names_of("module.encoder.")
    del authors.body.get_submodule("layer4.2").bn3
    save_authors_file(authors)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer4.2.bn3.bias"):
        names_of("module.encoder.")


KINDS = [{}, {"objective": "pixcontrast"}, {"gamma": 0.5, "num_layers": 0, "instance_weight": 0.5}]


@pytest.mark.parametrize("options", KINDS, ids=range(3))
@pytest.mark.parametrize("overlap", [True, False])
def test_readme_large_maps_image_by_image(options, overlap):
    """README's recipe equals the plain model: every field of Output, and every gradient."""
    view_1, view_2, box_1, box_2 = small_batch(n=5)
    box_2[2 if overlap else slice(None)] += 1000  # one image, or all, without positive pairs
    results = []
    for kind in (PixPro, names_of("class ImageByImage")["ImageByImage"]):
        torch.manual_seed(0)
        model = kind(SmallBackbone(), dim=6, hidden_dim=10, **options)
        output = model(view_1, view_2, box_1, box_2)
        output.loss.backward()
        results.append([*output, *[p.grad for p in trained(model)]])
    assert (output.pairs > 0) == overlap
    for plain, by_image in zip(*results):
        assert torch.allclose(plain, by_image, atol=1e-6)


def test_readme_large_maps_compute_again_in_the_backward_pass():
    kind, forward = names_of("class ImageByImage")["ImageByImage"], PixelPropagation.forward
    with mock.patch.object(PixelPropagation, "forward", autospec=True, side_effect=forward) as used:
        loss = kind(SmallBackbone(), dim=6, hidden_dim=10)(*small_batch(n=3)).loss
        assert [len(call.args[1]) for call in used.call_args_list] == [1] * 6  # two directions
        loss.backward()
        assert [len(call.args[1]) for call in used.call_args_list] == [1] * 12
    with pytest.raises(ValueError, match="num_layers <= 1"):
        kind(SmallBackbone(), dim=6, num_layers=2)(*small_batch())


# ------------------------------------ README and the tutorial ------------------------------------
def test_pages_name_what_exists():
    files = [HERE / "test_pixpro.py", *Path(__file__).parent.glob("test_*.py")]
    defined = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    tests = set(re.findall(r"`(test_\w+)`", README))
    assert len(tests) >= 10 and tests <= defined, tests - defined
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert links and all((HERE / link).exists() for link in links)
    titles = [title.replace(",", "").lower() for title in re.findall(r"\n#+ (.+)", README)]
    headings = {f"#{title.replace(' ', '-')}" for title in titles}
    assert set(re.findall(r"\]\((#[^)]+)\)", README)) <= headings
    assert "pip install matplotlib ipykernel" in README
    ours = {"--" + name.replace("_", "-") for name in vars(train.parse([]))} | {"--help"}
    torchruns = {"--nproc", "--nnodes", "--standalone", "--max-restarts", "--rdzv"}
    slurms = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--requeue"}
    graders = set(re.findall(r'add_argument\("(--\w+)', files[0].read_text()))
    others = {"--labels", "--index-url", *graders}  # of experiments.py, pip and test_pixpro.py
    flags = set(re.findall(r"(?<![-|])--[a-z][a-z-]*", README + RESULTS))
    assert flags <= ours | torchruns | slurms | others, flags - ours


def test_pages_name_the_exercises_as_their_table_does():
    text = "\n".join("".join(cell["source"]) for cell in CELLS)
    chapters = re.split(r"\n## (?=\d)", text)
    assert all(int(n) < len(chapters) for n in re.findall(r"chapter (\d+)", README))
    commands = {f"`{exercise.command()}`" for exercise in EXERCISES.values()}
    for page in (README, *chapters):
        found = set(re.findall(r"`(?:python -m )?pytest -k [^`]* -x[^`]*`", page))
        assert found <= commands, found - commands
    for word, exercise in EXERCISES.items():
        functions = ", ".join(f"`{name}`" for name in exercise.functions.split())
        file = "train.py: " if exercise.file() == "train.py" else ""
        row = [exercise.place, file + functions, f"`{word}`", str(exercise.chapter), exercise.hard]
        assert f"| {' | '.join(row)} |" in README, word
        assert f"`{exercise.command()}`" in chapters[exercise.chapter], word


def test_the_tutorial_was_run_from_top_to_bottom_without_errors():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"display_data", "stream"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 15
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/|[A-Z]:\\", text + SOURCE)


def test_the_tutorial_defines_nothing_again():
    nodes = list(ast.walk(ast.parse(SOURCE)))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    pixpros = {name for name, value in vars(pixpro).items() if callable(value)}
    trains = {name for name, value in vars(train).items() if callable(value)}
    assert len(defined) > 10 and not defined & (pixpros | trains)
    assert not assigned & pixpros  # a variable may be called as a function of train is
