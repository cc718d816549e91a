#!/usr/bin/env bash
# Software: lightly 1.6.0 (AddGridTransform, as in DetCon), torch 2.14.1, torchvision 0.29.1.
# Expected: AddGridTransform replaces boxes and masks of a sample by one regular grid. Box k and the
#   pixels of value k in the mask are the same cell, since nothing else names the cells.
# Found: it counts the boxes column by column and the mask row by row. In a grid of 5 x 5, as in the
#   paper, only the 5 cells of the diagonal agree. And where the size of the image is no
#   multiple of the grid, the mask is cut out of a larger one, so that cells at the border get
#   smaller or vanish: of 10 x 10 cells on 14 x 14 pixels 36 are in no mask, but have boxes.
# Why it matters: one pools features by boxes (roi_align) or by masks and matches regions of two views
#   by number. With boxes on one side and masks on the other the pairs are wrong, and in a square
#   grid all shapes fit. Regions that the documentation promises are never seen.
# Way out: take both from one side, for instance boxes by torchvision.ops.masks_to_boxes (add 1 to
#   the upper ends); choose a grid that divides the size.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "lightly==1.6.0" "numpy==2.4.6" "pillow==13.0.0"
"$dir/venv/bin/python" -W ignore - <<'PY'
import torch
from lightly.transforms import AddGridTransform
from torchvision.ops import masks_to_boxes
from torchvision.tv_tensors import BoundingBoxes, Mask


def grid(rows, columns, height, width):
    boxes = BoundingBoxes(torch.zeros(1, 4), format="XYXY", canvas_size=(height, width))
    mask = Mask(torch.zeros(1, height, width, dtype=torch.long))
    boxes, mask = AddGridTransform(rows, columns)(boxes, mask)
    assert len(boxes) == rows * columns
    return torch.as_tensor(boxes), torch.as_tensor(mask)[0]


for rows, columns, height, width, agree, present in (
    (5, 5, 320, 320, 5, 25),
    (7, 7, 224, 224, 7, 49),
    (2, 3, 64, 96, 2, 6),
    (1, 6, 32, 96, 6, 6),  # one row: both orders are one
    (10, 10, 14, 14, None, 64),
    (14, 14, 24, 24, None, 144),
):
    boxes, mask = grid(rows, columns, height, width)
    seen = mask.unique()
    print(f"{rows} x {columns} cells on {height} x {width}: {len(seen)} of {rows * columns} in the mask", end="")
    assert len(seen) == present
    if agree is not None:
        own = masks_to_boxes(mask == seen[:, None, None]) + torch.tensor([0, 0, 1, 1])
        same = int((own == boxes).all(dim=1).sum())
        transposed = boxes.reshape(columns, rows, 4).transpose(0, 1).reshape(-1, 4)
        other = int((own == transposed).all(dim=1).sum())
        print(f"; box k is cell k for {same} of them, in the other order for {other}", end="")
        assert same == agree and torch.equal(own, transposed)
    print()
PY
