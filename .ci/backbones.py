"""Tries torchvision's classification networks in PixPro, and prints rows of README's table.

python .ci/backbones.py                         one network of each family, in minutes
python .ci/backbones.py convnext_base vgg16     these
"""

import bisect
import contextlib
import copy
import fnmatch
import io
import sys
from pathlib import Path

import torch
from torchvision import ops

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import Backbone, PixPro

FAMILIES = {  # the names of a family: the network that is tried, the layer to name
    "alexnet": ("alexnet", "features"),
    "convnext_*": ("convnext_tiny", "features.7"),
    "densenet*": ("densenet121", "features"),
    "efficientnet_*": ("efficientnet_b0", "features"),
    "googlenet": ("googlenet", "inception5b"),
    "inception_v3": ("inception_v3", "Mixed_7c"),
    "maxvit_t": ("maxvit_t", "blocks.3"),
    "mnasnet*": ("mnasnet0_5", "layers"),
    "mobilenet_*": ("mobilenet_v3_small", "features"),
    "regnet_*": ("regnet_y_400mf", "trunk_output"),
    "*resne[tx]*": ("resnext50_32x4d", "layer4"),
    "shufflenet_*": ("shufflenet_v2_x0_5", "conv5"),
    "squeezenet*": ("squeezenet1_0", "features"),
    "swin_?": ("swin_t", "permute"),
    "swin_v2_*": ("swin_v2_t", "permute"),
    "vgg??": ("vgg11", "features"),
    "vgg*_bn": ("vgg11_bn", "features"),
    "vit_*": ("vit_b_16", "encoder"),
}


def row(arch):
    """Family, layer, least size, side of the map at 224 and at 112, and what is special."""
    [pattern] = [pattern for pattern in FAMILIES if fnmatch.fnmatchcase(arch, pattern)]
    _, layer = FAMILIES[pattern]
    torch.manual_seed(0)
    try:
        model = PixPro(Backbone(arch, layer), hidden_dim=8)
    except ValueError as error:
        return f"| `{pattern}` | none | | | | refused: {error} |"
    trial = copy.deepcopy(model).to("meta")  # which has shapes and no numbers
    least = bisect.bisect_left(range(224), True, key=lambda size: accepts(trial, size))
    sides = [step(model, size) if accepts(trial, size) else "refused" for size in (224, 112)]
    modules, notes = [*model.backbone.modules()], []
    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in modules):
        notes.append("no BatchNorm")
    if any(isinstance(module, ops.StochasticDepth) for module in modules):
        notes.append("stochastic depth")
    for name, p in model.backbone.named_parameters():
        if p.dim() > 1 >= p.squeeze().dim():  # a vector for LARS
            notes.append(f"a vector: `{name.split('.')[-1]}`")
    cells = [f"`{pattern}`", f"`{layer}`", least, *sides, "; ".join(dict.fromkeys(notes))]
    return f"| {' | '.join(map(str, cells))} |"


def accepts(model, size):
    """Whether train.py takes views of this size."""
    with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
        train.try_network(model, 2, size)
        return True
    return False


def step(model, size):
    """One training step, in which every weight gets a gradient; the side of the map."""
    views, box = torch.randn(2, 2, 3, size, size), torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 2)
    model(*views, box, box).loss.backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in weights)
    train.LARS(weights, lr=1.0).step()
    train.weights_of(model)  # raises an error for what is not finite
    return model.backbone(views[0]).shape[2]


if __name__ == "__main__":
    for arch in sys.argv[1:] or [arch for arch, _ in FAMILIES.values()]:
        print(row(arch), flush=True)
