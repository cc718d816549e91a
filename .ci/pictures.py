"""Draws README's picture of features and its two curves, from runs/demo and .ci/results.

python .ci/pictures.py
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import Backbone

ROOT = Path(__file__).parents[1]
SHOWN = (8, 34, 60, 90, 130)  # of the held-out scenes
CLOSE = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 1, "fontsize": 20}
# One colour for each of train.CLASSES.
NAMES = ["skyblue", "whitesmoke", "slategray", "yellowgreen", "dimgray", "royalblue"]
NAMES += ["darkgreen", "indianred"]
CURVES = (
    ("PixContrast", "#0072B2", "-s", "pixcontrast"),
    ("PixPro", "#009E73", "-o", "pixpro"),
    ("random, blocks on", "#777777", "--^", "random, blocks on"),
)
plt.rcParams.update({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False})


def prediction_of(backbone, fit, test):
    """What the linear probe, fitted on scenes, says of the test scenes [N, h, w]."""
    kept = []
    mean_iou = train.mean_iou
    train.mean_iou = lambda predicted, *rest: kept.append(predicted) or mean_iou(predicted, *rest)
    train.linear_probe(backbone, fit.images, fit.masks, test.images, test.masks)
    train.mean_iou = mean_iou
    return kept[0]


def draw_features():
    torch.manual_seed(0)
    before = Backbone("resnet18", "layer3")
    after = Backbone("resnet18", "layer3")
    after.body.load_state_dict(torch.load(ROOT / "runs/demo/backbone.pt", weights_only=True))
    scenes = train.Scenes(train.PROBE_SCENES, 0, train.SCENES)
    held_out = train.Scenes(train.PROBE_SCENES, 0, train.SCENES + train.PROBE_SCENES)
    predicted = prediction_of(after, scenes, held_out)

    images = v2.functional.resize(held_out.images[list(SHOWN)], [288])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "features.png")
        train.save_picture(path, images, train.with_blocks_on(before), after)
        rows = torch.from_numpy(plt.imread(path)[..., :3]).split(292)  # with a margin of 4
    fig, axes = plt.subplots(5, 1, figsize=(9, 8))
    names = ("scenes", "features,\nrandom,\nblocks on", "features,\npre-trained")
    for ax, row, name in zip(axes, rows, names):
        ax.imshow(row)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=20)
    colours = ListedColormap([*NAMES, "white"])
    masks_of = {"linear\nprobe": predicted, "truth": held_out.masks}
    for ax, (name, masks) in zip(axes[3:], masks_of.items()):
        strip = torch.full((148, 4 + 148 * len(SHOWN)), 8)
        for place, number in enumerate(SHOWN):
            strip[4:, 4 + 148 * place :][:144, :144] = masks[number]
        ax.imshow(strip, cmap=colours, vmin=0, vmax=8, interpolation="nearest")
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=20)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=n, edgecolor="black") for n in NAMES]
    fig.legend(patches, train.CLASSES, loc="lower center", ncol=4, frameon=False, **CLOSE)
    fig.subplots_adjust(hspace=0.04, bottom=0.13, top=1)
    fig.savefig(ROOT / ".github/features.png", dpi=90, bbox_inches="tight")


def rows_of(name):
    return [json.loads(line) for line in (ROOT / ".ci/results" / name).read_text().splitlines()]


def draw_labels():
    """Mean IoU after fine-tuning over the number of labels: each run, and a line for the means."""
    fig, ax = plt.subplots(figsize=(7, 4.6))
    for name, colour, style, words in CURVES:
        for prefix, width in (("", 1.5), ("long-", 3)):
            points = {}
            for row in rows_of("photographs.jsonl"):
                of_this = re.match(rf"(runs/)?{prefix}{words}[- ]\d", row["backbone"])
                if row["kind"] == "test" and "labels" in row and of_this:
                    points.setdefault(row["labels"], []).append(row["miou"])
            labels = sorted(points)
            for n in labels:
                ax.plot([n] * len(points[n]), points[n], style[-1], color=colour, markersize=4)
            mean = [np.mean(points[n]) for n in labels]
            ax.plot(labels, mean, style, color=colour, lw=width, label="" if prefix else name)
    ax.set(xscale="log", xlabel="labelled photographs", ylabel="fine-tuned, mIoU in percent")
    ax.set_xticks((12, 25, 50, 99), (12, 25, 50, 99))
    ax.minorticks_off()
    ax.legend(frameon=False)
    fig.savefig(ROOT / ".github/labels.png", dpi=80, bbox_inches="tight")


def draw_steps():
    """The probe along the runs, a line for each; those of 6,400 steps are thicker."""
    runs, random = {}, []
    for row in rows_of("photographs.jsonl"):
        if row["kind"] != "test" or "labels" in row:
            continue
        if row["backbone"].startswith("random, blocks on"):
            random.append(row["miou"])
        elif found := re.match(r"runs/(.+)/backbone-(\d+).pt", row["backbone"]):
            runs.setdefault(found[1], {})[int(found[2])] = row["miou"]

    fig, ax = plt.subplots(figsize=(7, 4.6))
    for name, colour, style, words in CURVES[:2]:
        of_this = [run for run in runs if re.fullmatch(rf"(long-)?{words}-\d", run)]
        for number, run in enumerate(of_this):
            steps, values = zip(*sorted(runs[run].items()))
            width = 3 if run.startswith("long") else 1.2
            label = name if number == 0 else None
            ax.plot(steps, values, style, color=colour, linewidth=width, label=label)
    name, colour, _, _ = CURVES[2]
    ax.axhline(np.mean(random), linestyle="--", color=colour, label=name)
    ax.set(xlabel="steps of pre-training", ylabel="linear probe, mIoU in percent")
    ax.legend(frameon=False)
    fig.savefig(ROOT / ".github/steps.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    draw_features()
    draw_labels()
    draw_steps()
