#!/usr/bin/env bash
# Software: Pillow 13.0.0, numpy 2.4.6.
# Expected: a 16-bit grey image (mode "I;16") rotates like any other; resize() and rotate(90) do work.
# Found: rotate(), and transform() with any geometry, do nonsense as soon as resample is BILINEAR or
#   BICUBIC. They take each row for bytes: of pixels 1000 and 60000 nothing above 255 is left, and
#   one flat grey becomes stripes. Even an angle of 5 degrees or an affine map that changes nothing
#   does it. NEAREST is right. There is no error and no warning.
# Why it matters: X-ray, depth, microscope and satellite images are 16-bit grey, and rotations and
#   affine maps are usual augmentations. torchvision's transforms call these methods for PIL images.
#   With BILINEAR, pre-training then sees nearly black stripes in place of the images.
# Way out: convert("F") or convert("I") first; both of these modes rotate as they should.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "pillow==13.0.0" "numpy==2.4.6"
"$dir/venv/bin/python" -W error - <<'PY'
import numpy as np
from PIL import Image

NEAREST, BILINEAR, BICUBIC = (Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC"))
AFFINE = Image.Transform.AFFINE
values = np.full((32, 32), 1000, np.uint16)
values[:, 16:] = 60000
image = Image.fromarray(values)
assert image.mode == "I;16"

steps = {
    "resize, BILINEAR": lambda im: im.resize((48, 48), BILINEAR),
    "rotate by 90, BILINEAR": lambda im: im.rotate(90, BILINEAR),
    "rotate by 5, NEAREST": lambda im: im.rotate(5, NEAREST),
    "rotate by 5, BILINEAR": lambda im: im.rotate(5, BILINEAR),
    "rotate by 5, BICUBIC": lambda im: im.rotate(5, BICUBIC),
    "affine map that changes nothing, BILINEAR": lambda im: im.transform(im.size, AFFINE, (1, 0, 0, 0, 1, 0), BILINEAR),
}
wrong = []
for name, step in steps.items():
    found = np.asarray(step(image)).astype(float)
    right = np.asarray(step(image.convert("F")))
    right = right.clip(0, 65535)  # BICUBIC overshoots
    print(f"{name}: highest value {found.max():.0f}, as float {right.max():.0f}", end=", ")
    print(f"largest difference {abs(found - right).max():.0f}")
    if abs(found - right).max() > 1:
        wrong.append(name)
        assert found.max() <= 255

flat = Image.fromarray(np.full((8, 8), 1000, np.uint16))
row = np.asarray(flat.rotate(5, BILINEAR))[4].tolist()
same = np.asarray(flat.transform(flat.size, AFFINE, (1, 0, 0, 0, 1, 0), BILINEAR))[4].tolist()
print("a row of a flat image of 1000, rotated by 5:", row)
print("the same after the map that changes nothing:", same)
assert same == [1000 % 256, 1000 // 256] * 4
assert wrong == list(steps)[3:]

for mode in ("I", "F"):
    good = np.asarray(image.convert(mode).rotate(5, BILINEAR))
    assert good[16, 8] == 1000 and good[16, 24] == 60000
print("converted to I or F first: right")
PY
