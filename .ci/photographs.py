"""Reads LabelMeFacade, 945 photographs of streets with labels, and probes backbones on them.

    git clone https://github.com/cvjena/labelmefacade                (for research only)
    OMP_NUM_THREADS=1 python .ci/photographs.py labelmefacade search runs/search/*/backbone.pt
    OMP_NUM_THREADS=1 python .ci/photographs.py labelmefacade test runs/*/backbone.pt

`search` fits the probe on the first 60 photographs of train.txt and tests it on the other 39,
`test` fits on all 99 and tests on the 844 of test.txt. "random SEED" and "random* SEED" stand for
the network as the recipe starts it, and with its residual blocks switched on.

    OMP_NUM_THREADS=1 python .ci/photographs.py labelmefacade search --labels 25 --seed 0 "random 0"

With --labels the whole network, with a head of torchvision's FCN, is trained on so many of the
photographs that the probe is fitted on, in the same steps whatever their number.
"""

import argparse
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import MEAN, STD, Backbone

STEPS, BATCH, RATE = 300, 8, 1e-3  # of fine-tuning

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


def fine_tuned(backbone, fit, test, seed):
    """Mean IoU in percent on test of the network and an FCN head, trained on fit."""
    torch.manual_seed(seed)
    network = copy.deepcopy(backbone).to(memory_format=torch.channels_last).train()
    head = FCNHead(network.out_channels, len(COLOURS))
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)

    def logits_of(images):  # [N, 3, h, w] -> [N, 8, h, w]
        views = v2.functional.normalize(images / 255, MEAN, STD)
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(network(views.to(memory_format=torch.channels_last)))
        return F.interpolate(logits.float(), images.shape[2:], mode="bilinear")

    for _ in range(STEPS):
        chosen = torch.randint(len(fit.images), (BATCH,))
        images, masks = fit.images[chosen], fit.masks[chosen]
        crop = v2.RandomResizedCrop.get_params(images, (0.25, 1.0), (1.0, 16 / 9))
        size = list(images.shape[2:])
        images = v2.functional.resized_crop(images, *crop, size)
        nearest = v2.InterpolationMode.NEAREST
        masks = v2.functional.resized_crop(masks[:, None], *crop, size, nearest)[:, 0]
        if torch.rand(()) < 0.5:
            images, masks = images.flip(3), masks.flip(2)
        loss = F.cross_entropy(logits_of(images), masks, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    network.eval()
    head.eval()
    with torch.no_grad():
        predicted = torch.cat([logits_of(part).argmax(1) for part in test.images.split(16)])
    counted = test.masks != 255
    ious = []
    for number in range(len(COLOURS)):
        found, true = (predicted == number) & counted, test.masks == number
        ious.append((found & true).sum() / (found | true).sum())
    return 100 * torch.stack(ious).nanmean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=["search", "test"])
    parser.add_argument("backbones", nargs="+")
    parser.add_argument("--labels", type=int, help="fine-tune on so many photographs")
    parser.add_argument("--seed", type=int, default=0, help="of the head, the choice and the order")
    args = parser.parse_args()

    fit, test = names_in(args.folder / "train.txt"), names_in(args.folder / "test.txt")
    if args.kind == "search":
        fit, test = fit[:60], fit[60:]
    if args.labels:
        chosen = np.random.default_rng(args.seed).permutation(len(fit))[: args.labels]
        fit = [fit[number] for number in chosen]
    fit, test = facade(args.folder, fit), facade(args.folder, test)
    for word in args.backbones:
        backbone = backbone_of(word)
        if args.labels:
            miou, what = fine_tuned(backbone, fit, test, args.seed), f"{args.labels} labels, "
        else:
            miou, what = train.linear_probe(backbone, fit, test), ""
        print(f"{miou:.1f}  {what}{word}", flush=True)


if __name__ == "__main__":
    main()
