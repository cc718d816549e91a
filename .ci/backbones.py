"""Tries torchvision's classification networks in PixPro, and prints rows of README's table.

python .ci/backbones.py [convnext_base ...]   these networks, or one of each family in minutes
"""

import fnmatch
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import Backbone, PixPro

FAMILIES = {  # names: the network that is tried, the layer to name, the least size of its views
    "alexnet": ("alexnet", "features", 95),
    "convnext_*": ("convnext_tiny", "features.7", 64),
    "densenet*": ("densenet121", "features", 61),
    "efficientnet_*": ("efficientnet_b0", "features", 33),
    "googlenet": ("googlenet", "inception5b", 47),
    "inception_v3": ("inception_v3", "Mixed_7c", 107),
    "maxvit_t": ("maxvit_t", "blocks.3", 221),
    "mnasnet*": ("mnasnet0_5", "layers", 33),
    "mobilenet_*": ("mobilenet_v3_small", "features", 33),
    "regnet_*": ("regnet_y_400mf", "trunk_output", 33),
    "*resne*": ("resnext50_32x4d", "layer4", 33),
    "shufflenet_*": ("shufflenet_v2_x0_5", "conv5", 33),
    "squeezenet*": ("squeezenet1_0", "features", 37),
    "swin_?": ("swin_t", "permute", 36),
    "swin_v2_*": ("swin_v2_t", "permute", 36),
    "vgg??": ("vgg11", "features", 64),
    "vgg*_bn": ("vgg11_bn", "features", 64),
    "vit_*": ("vit_b_16", "encoder", 224),
}


def row(arch):
    """Family, layer, least size, sides of the map at 224 and 112, what is special."""
    [family] = [family for family in FAMILIES if fnmatch.fnmatchcase(arch, family)]
    _, layer, least = FAMILIES[family]
    try:
        model = PixPro(Backbone(arch, layer), hidden_dim=8)
    except ValueError as error:
        return f"| `{family}` | none | | | refused: {error} |"
    sides = [train_step(model, size) if size >= least else "refused" for size in (224, 112)]
    kinds = {type(module).__name__ for module in model.backbone.modules()}
    notes = ["no BatchNorm"] * ("BatchNorm2d" not in kinds)
    notes += ["stochastic depth"] * ("StochasticDepth" in kinds)
    for name, p in model.backbone.named_parameters():
        if p.dim() > 1 >= p.squeeze().dim():  # for LARS, as biases and norms are
            notes.append(f"`{name.split('.')[-1]}` is a vector")
    special = ", ".join(dict.fromkeys(notes))
    return f"| `{family}` | `{layer}` | {least} | {sides[0]}, {sides[1]} | {special} |"


def train_step(model, size):
    """One training step, in which every weight gets a gradient; the side of the map."""
    views, box = torch.randn(2, 2, 3, size, size), torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 2)
    model(*views, box, box).loss.backward()
    weights = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in weights)
    train.LARS(weights, lr=1.0).step()
    train.weights_of(model)  # raises an error if one is not finite
    return model.backbone(views[0]).shape[2]


if __name__ == "__main__":
    for arch in sys.argv[1:] or [arch for arch, *_ in FAMILIES.values()]:
        print(row(arch), flush=True)
