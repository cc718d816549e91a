#!/usr/bin/env bash
# Software: albumentationsx 2.5.1 (albucore 0.2.21, opencv-python-headless 5.0.0.93), torch 2.14.1,
#   numpy 2.4.6.
# Expected: two pipelines that were built without a seed draw different numbers. The documentation
#   of Compose says so, and so it is in one process.
# Found: in the workers of a DataLoader they draw the same numbers, for every image, for ever. Every
#   pipeline without a seed takes the seed of the worker, and only that. Two pipelines that begin
#   with a random crop cut the same crop from an image, whatever follows in each. It happens with
#   fork and with spawn, with one worker and with many. Nothing warns.
# Why it matters: BYOL, DINO and others use one pipeline per view. With num_workers = 0, where one
#   looks at the views, they differ. In training both views are the same crop and the same flip: the
#   task is far too easy, and the low loss looks like success. A dataset with one pipeline for
#   images and one for pasted objects or for negatives is tied together in the same way.
# Way out: give each pipeline a seed of its own, far apart (the seed of the worker is added), or call
#   one pipeline twice. A deep copy is no way out: it repeats the original in one process, too.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "numpy==2.4.6" \
    "albumentationsx==2.5.1" "albucore==0.2.21" "opencv-python-headless==5.0.0.93"
"$dir/venv/bin/python" - <<'PY'
import copy

import albumentations as A
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

rows, columns = np.mgrid[:128, :128]
image = np.stack([2 * rows, 2 * columns, rows + columns], axis=-1).astype(np.uint8)  # each crop looks different


def pipeline(*more, seed=None):
    crop = A.RandomResizedCrop(size=(32, 32), scale=(0.1, 0.6))
    return A.Compose([crop, A.HorizontalFlip(p=0.5), *more], seed=seed, telemetry=False)


class Pairs(Dataset):
    """Says for each index whether the two views are one crop (the second may be inverted)."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __len__(self):
        return 40

    def __getitem__(self, index):
        first, second = self.first(image=image)["image"], self.second(image=image)["image"]
        return float(np.array_equal(first, second) or np.array_equal(first, 255 - second))


def equal(first, second, workers):
    context = "fork" if workers else None
    loader = DataLoader(Pairs(first, second), batch_size=4, num_workers=workers, multiprocessing_context=context)
    torch.manual_seed(0)
    return int(sum(flag.sum().item() for flag in loader))


def report(name, make, expected):
    found = [equal(*make(), workers) for workers in (0, 1, 2)]
    print(f"{name}: same crop in {found[0]}, {found[1]}, {found[2]} of 40 pairs (0, 1, 2 workers)")
    assert found == expected, (found, expected)


def copied():
    original = pipeline()
    return original, copy.deepcopy(original)


invert = A.InvertImg(p=1)  # stands for what only one view gets
report("two pipelines without a seed", lambda: (pipeline(), pipeline()), [0, 40, 40])
report("the second one inverts, too ", lambda: (pipeline(), pipeline(invert)), [0, 40, 40])
report("seeds 0 and 1000000         ", lambda: (pipeline(seed=0), pipeline(seed=1000000)), [0, 0, 0])
report("one pipeline called twice   ", lambda: (pipeline(),) * 2, [0, 0, 0])
report("a pipeline and its deep copy", copied, [40, 40, 40])
PY
