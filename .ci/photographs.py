"""Reads LabelMeFacade, 945 photographs of streets with labels, and probes backbones on them.

    git clone https://github.com/cvjena/labelmefacade                (for research only)
    OMP_NUM_THREADS=1 python .ci/photographs.py labelmefacade search runs/search/*/backbone.pt
    OMP_NUM_THREADS=1 python .ci/photographs.py labelmefacade test runs/*/backbone.pt

`search` fits the probe on the first 60 photographs of train.txt and tests it on the other 39,
`test` fits on all 99 and tests on the 844 of test.txt. "random SEED" and "random* SEED" stand for
the network as the recipe starts it, and with its residual blocks switched on.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import torch
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import Backbone

COLOURS = {  # of the labels; all other pixels are "various", which is ignored
    "building": (128, 0, 0),
    "car": (128, 0, 128),
    "door": (128, 128, 0),
    "pavement": (128, 128, 128),
    "road": (128, 64, 0),
    "sky": (0, 128, 128),
    "vegetation": (0, 128, 0),
    "window": (0, 0, 128),
}


def facade(folder, names, size=(192, 256)):
    """Photographs and labels of these names: images uint8 [N, 3, h, w], masks [N, h, w]."""
    images, masks = [], []
    for name in names:
        image = PIL.Image.open(folder / "images" / f"{name}.jpg").convert("RGB")
        label = PIL.Image.open(folder / "labels" / f"{name}.png").convert("RGB")
        colours = np.asarray(label.resize(size[::-1], PIL.Image.NEAREST))  # [h, w, 3]
        mask = torch.full(size, 255)
        for number, colour in enumerate(COLOURS.values()):
            mask[torch.from_numpy((colours == colour).all(2))] = number
        images.append(v2.functional.pil_to_tensor(image.resize(size[::-1], PIL.Image.BILINEAR)))
        masks.append(mask)
    return SimpleNamespace(images=torch.stack(images), masks=torch.stack(masks))


def names_in(path):
    return [Path(line).stem for line in path.read_text().split()]


def backbone_of(word):
    """The backbone of a file, or of "random 0", "random* 0"."""
    if word.startswith("random"):
        kind, seed = word.split()
        torch.manual_seed(int(seed))
        backbone = Backbone("resnet18", "layer3")
        return train.with_blocks_on(backbone) if kind == "random*" else backbone
    backbone = Backbone("resnet18", "layer3")
    backbone.body.load_state_dict(torch.load(word, weights_only=True))
    return backbone


def main(folder, kind, *words):
    folder = Path(folder)
    fit, test = names_in(folder / "train.txt"), names_in(folder / "test.txt")
    if kind == "search":
        fit, test = fit[:60], fit[60:]
    fit, test = facade(folder, fit), facade(folder, test)
    for word in words:
        print(f"{train.linear_probe(backbone_of(word), fit, test):.1f}  {word}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
