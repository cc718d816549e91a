#!/usr/bin/env bash
# Software: lightly 1.6.0 (RandomResizedCropAndFlip, VICRegLTransform), torch 2.14.1,
#   torchvision 0.29.1.
# Expected: the transform cuts a crop and returns, for each cell of an N x N grid on it, where the
#   centre of the cell lies in the image, as its documentation says.
# Found: only the first centre from the left and from the top is right. The error grows from cell to
#   cell, and the last centre is one whole cell off, outside of the crop, at times outside of the
#   image. The N centres are spread over the full width of the crop, not over N - 1 cells, and
#   then moved by half a cell. The mean error is half a cell; a flip does not change it.
# Why it matters: VICRegL pairs the cells of two crops by these places. Both grids are stretched,
#   each by its own crop's size, so the errors do not cancel. Below, of the cells of one crop that
#   lie in the other one, three in ten are paired with another cell than the nearest.
# Way out: shrink the grid towards its smallest corner by (N - 1) / N; this gives the right centres.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "lightly==1.6.0" "numpy==2.4.6" "pillow==13.0.0"
"$dir/venv/bin/python" -W ignore - <<'PY'
import numpy as np
import torch
from lightly.transforms.random_crop_and_flip_with_grid import RandomResizedCropAndFlip
from PIL import Image

torch.manual_seed(0)
cells, pixels, side = 7, 32, 224
rows, columns = np.mgrid[:side, :side]
image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))  # says where it came from
transform = RandomResizedCropAndFlip(cells, cells * pixels, 0.2, 0.8, hf_prob=0.5, vf_prob=0.0)


def view():
    """The centres that the transform returns, those that the crop shows, and the size of a cell."""
    crop, grid = transform(image)
    shown = torch.from_numpy(np.asarray(crop).copy())[..., :2].double()
    true = shown.reshape(cells, pixels, cells, pixels, 2).mean(dim=(1, 3)) + 0.5
    size = (true[-1, -1] - true[0, 0]).abs() / (cells - 1)
    return grid.double(), true, size


def mended(grid):
    corner = grid.amin(dim=(0, 1))
    return corner + (grid - corner) * (cells - 1) / cells


grid, true, size = view()
print("centres in the first row, as returned:", [round(x, 1) for x in grid[0, :, 0].tolist()])
print("centres in the first row, as seen:    ", [round(x, 1) for x in true[0, :, 0].tolist()])

errors, pairs, other, outside = [], 0, 0, 0
for _ in range(200):
    (grid, true, size), (second_grid, second_true, second_size) = view(), view()
    error, order = (grid - true) / size, true[0, :, 0].argsort()
    assert ((mended(grid) - true) / size).abs().max() < 0.1
    errors.append(error[0, order, 0])  # from the left of the image to its right
    outside += int((grid.amax(dim=(0, 1)) > side).any())
    low, high = second_true.amin(dim=(0, 1)) - second_size / 2, second_true.amax(dim=(0, 1)) + second_size / 2
    shared = ((true > low) & (true < high)).all(dim=-1).flatten()
    nearest = torch.cdist(true.reshape(-1, 2), second_true.reshape(-1, 2)).argmin(dim=1)
    paired = torch.cdist(grid.reshape(-1, 2), second_grid.reshape(-1, 2)).argmin(dim=1)
    pairs, other = pairs + int(shared.sum()), other + int((nearest != paired)[shared].sum())
mean = torch.stack(errors).mean(dim=0)
print("mean error from left to right, in cells:", [round(x, 2) for x in mean.tolist()])
print(f"{outside} of 200 grids reach beyond the image")
print(f"{other} of {pairs} cells that lie in both crops are paired with another cell than the nearest one")
assert torch.allclose(mean, torch.linspace(0, 1, cells).double(), atol=0.03)
assert outside > 20 and 0.2 < other / pairs < 0.4
PY
