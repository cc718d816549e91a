#!/usr/bin/env bash
# Software: torchvision 0.29.1 (tv_tensors.KeyPoints, transforms.v2), torch 2.14.1.
# Expected: KeyPoints and BoundingBoxes count in one system, so that a corner of a box and a point on
#   it stay together, and mirroring and resizing give the same whichever comes first.
# Found: flips send x to W - 1 - x (x counts pixel centres), but resizing multiplies x, and rotation
#   turns around W / 2 (x counts from the edge). Boxes count from the edge everywhere. No reading of
#   x fits all of them: a rotation by 180 degrees and two flips differ by one pixel.
# Why it matters: pixel-level pre-training and its evaluation follow points through crop, resize and
#   flip. One pixel of a small crop becomes many: here the centre of a 16-pixel crop, mirrored and
#   enlarged to 224, lands 14 pixels beside the centre. Views that are not mirrored are right.
# Way out: follow the edges of boxes, or flip points by hand with W - x.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6" "pillow==13.0.0"
"$dir/venv/bin/python" - <<'PY'
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

size = 16
point = tv_tensors.KeyPoints(torch.tensor([[8.0, 8.0]]), canvas_size=(size, size))
box = tv_tensors.BoundingBoxes(torch.tensor([[8.0, 8.0, 16.0, 16.0]]), format="XYXY", canvas_size=(size, size))


def xy(p):
    return [round(v, 3) for v in p[0].tolist()]


def enlarge(p):
    return F.resize(p, [224, 224])


flip_first = xy(enlarge(F.horizontal_flip(point)))
flip_last = xy(F.horizontal_flip(enlarge(point)))
flipped_box = enlarge(F.horizontal_flip(box))[0].tolist()  # the edge x = 8 is now the right one
print("point (8, 8) of 16 x 16, mirrored, then enlarged to 224:", flip_first)
print("enlarged, then mirrored:", flip_last)
print("corner (8, 8) of a box, mirrored and enlarged, in either order:", [flipped_box[2], flipped_box[1]])

turned = xy(F.rotate(point, 180))
twice = xy(F.vertical_flip(F.horizontal_flip(point)))
print("turned by 180 degrees:", turned, "mirrored both ways:", twice)

assert flip_first == [98.0, 112.0]
assert flip_last == [111.0, 112.0]
assert [flipped_box[2], flipped_box[1]] == [112.0, 112.0]
assert F.horizontal_flip(enlarge(box))[0].tolist() == flipped_box
assert turned == [8.0, 8.0] and twice == [7.0, 7.0]

# The other reading, x counts pixel centres, fails too: the centre of the image is then 7.5.
centre = tv_tensors.KeyPoints(torch.tensor([[7.5, 7.5]]), canvas_size=(size, size))
print("as pixel centres, (7.5, 7.5) mirrored:", xy(F.horizontal_flip(centre)), "turned:", xy(F.rotate(centre, 180)))
assert xy(F.horizontal_flip(centre)) == [7.5, 7.5]
assert xy(F.rotate(centre, 180)) == [8.5, 8.5]
PY
