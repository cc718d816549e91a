"""Probes and fine-tunes backbones on LabelMeFacade, 945 photographs of streets with labels.

    git clone https://github.com/cvjena/labelmefacade                (for research only)
    OMP_NUM_THREADS=1 python .ci/photographs.py labelmefacade test runs/*/backbone.pt

fits the linear probe on the 100 photographs of train.txt and tests it on the 845 of test.txt; with
`search` instead, on the first 60 and the other 40 of train.txt. "random SEED" and "random* SEED"
stand for the network as the recipe starts it, and with its residual blocks switched on.

    OMP_NUM_THREADS=1 python .ci/photographs.py labelmefacade test --labels 25 --seed 0 "random 0"

With --labels N, all layers and a head of torchvision's FCN are trained for 300 steps on N of the
photographs that the probe is fitted on. The functions are those of chapter 9 of tutorial.ipynb.
Each result is a line in .ci/results/photographs.jsonl.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import Backbone

ROOT = Path(__file__).parents[1]
STEPS = 300  # of fine-tuning


def tutorial(*tags):
    """What the cells of tutorial.ipynb with these tags define."""
    names = {}
    for cell in json.loads((ROOT / "tutorial.ipynb").read_text())["cells"]:
        if set(tags) & set(cell["metadata"].get("tags", [])):
            exec("".join(cell["source"]), names)
    return names


def names_in(path):
    return [Path(line).stem for line in path.read_text().split()]


def backbone_of(word):
    """The backbone of a file, or of "random 0", "random* 0"."""
    backbone = Backbone("resnet18", "layer3")
    if not word.startswith("random"):
        backbone.body.load_state_dict(torch.load(word, weights_only=True))
        return backbone
    kind, seed = word.split()
    torch.manual_seed(int(seed))
    backbone = Backbone("resnet18", "layer3")
    return train.with_blocks_on(backbone) if kind == "random*" else backbone


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=["search", "test"])
    parser.add_argument("backbones", nargs="+")
    parser.add_argument("--labels", type=int, help="fine-tune on so many photographs")
    parser.add_argument("--rate", type=float, default=3e-3, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0, help="of the head, the choice and the order")
    args = parser.parse_args()

    chapter = tutorial("imports", "photographs")
    fit, test = names_in(args.folder / "train.txt"), names_in(args.folder / "test.txt")
    if args.kind == "search":
        fit, test = fit[:60], fit[60:]
    if args.labels:
        chosen = np.random.default_rng(args.seed).permutation(len(fit))[: args.labels]
        fit = [fit[number] for number in chosen]
    fit, test = chapter["facade"](args.folder, fit), chapter["facade"](args.folder, test)
    classes = len(chapter["COLOURS"])
    for word in args.backbones:
        row = {"kind": args.kind, "backbone": word}
        backbone, began = backbone_of(word), time.monotonic()
        if args.labels:
            row |= {"labels": args.labels, "rate": args.rate, "seed": args.seed}
            weights = backbone.body.state_dict()
            network = chapter["fine_tuned"](weights, fit, classes, STEPS, args.rate, args.seed)
            predicted = chapter["segmented"](network, test.images)
            row["miou"] = round(train.mean_iou(predicted, test.masks, classes), 1)
        else:
            row["miou"] = round(train.linear_probe(backbone, fit, test), 1)
        row["seconds"] = round(time.monotonic() - began)
        print(row, flush=True)
        with open(ROOT / ".ci/results/photographs.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
