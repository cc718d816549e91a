#!/usr/bin/env bash
# Software: timm 1.0.31 (timm.data.FastCollateMixup), torch 2.14.1, torchvision 0.29.1, numpy 2.4.6.
# Expected: a collate function puts samples together and leaves the samples as they are. In the modes
#   "batch" and "elem" FastCollateMixup copies a sample before it pastes a patch into it.
# Found: with CutMix in the mode "pair" it swaps the patches in the samples themselves. A dataset
#   that keeps its images in memory and returns them (arrays or tensors, views included) is
#   overwritten, a bit more with every epoch, while its labels stay. The first epoch is right.
# Why it matters: small sets of images are often cached as uint8 arrays, which this collate function
#   takes as they are. After ten epochs nine tenths of an image come from others, the labels are
#   computed as if nothing had happened, and an evaluation on the same arrays is spoiled, too.
#   With workers it happens in each worker's own copy, as long as that lives.
# Way out: return self.images[index].copy(), or the modes "batch" and "elem".
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "numpy==2.4.6" "pillow==13.0.0"
"$dir/venv/bin/python" - <<'PY'
import numpy as np
import torch
from timm.data import FastCollateMixup
from torch.utils.data import DataLoader, Dataset

classes, epochs = 64, 10


class Cached(Dataset):
    """Image number i is grey of value i, so that each pixel says to which image it belongs."""

    def __init__(self, copy=False, tensors=False):
        self.images = np.arange(classes, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
        self.images = np.ascontiguousarray(self.images.repeat(32, 2).repeat(32, 3))
        self.copy = copy
        if tensors:
            self.images = torch.from_numpy(self.images)

    def __len__(self):
        return classes

    def __getitem__(self, index):
        image = self.images[index]
        return (image.copy() if self.copy else image), index

    def own(self):
        """The share of pixels that still belong to their image."""
        return float(np.mean(np.asarray(self.images) == np.arange(classes)[:, None, None, None]))


def train(dataset, **options):
    """Returns the own pixels after 1 epoch and after all, and the largest error of a label in each."""
    np.random.seed(0)
    torch.manual_seed(0)
    mix = FastCollateMixup(**options, prob=1.0, label_smoothing=0.0, num_classes=classes)
    loader = DataLoader(dataset, batch_size=16, shuffle=True, collate_fn=mix)
    own, error = [], []
    for _ in range(epochs):
        worst = 0.0
        for images, labels in loader:
            shares = torch.nn.functional.one_hot(images[:, 0].long(), classes).float().mean(dim=(1, 2))
            worst = max(worst, (shares - labels).abs().max().item())
        own.append(round(dataset.own(), 2))
        error.append(round(worst, 2))
    return own[0], own[-1], error[0], error[-1]


cutmix = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}
for mode in ("batch", "elem", "pair"):
    found = train(Cached(), mode=mode, **cutmix)
    print(f"CutMix, mode {mode}: own pixels after 1 and {epochs} epochs: {found[:2]}, error of labels: {found[2:]}")
    spoiled = found[1] < 0.3 and found[2] == 0.0 and found[3] > 0.5
    assert spoiled if mode == "pair" else found == (1.0, 1.0, 0.0, 0.0)
found = train(Cached(tensors=True), mode="pair", **cutmix)
print(f"the same with tensors: {found[:2]}, {found[2:]}")
assert found[1] < 0.3
assert train(Cached(), mode="pair", mixup_alpha=1.0, cutmix_alpha=0.0)[:2] == (1.0, 1.0)  # Mixup copies
assert train(Cached(copy=True), mode="pair", **cutmix) == (1.0, 1.0, 0.0, 0.0)
PY
