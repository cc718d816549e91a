#!/usr/bin/env bash
# Software: imageio 2.38.1, with and without opencv-python-headless 5.0.0.93; Pillow 13.0.0,
#   numpy 2.4.6.
# Expected: which packages happen to be installed does not change what imageio.v3.imread returns.
# Found: a PFM file of float32 numbers is read through Pillow as float32. Once OpenCV is installed,
#   the same line of code gets uint8: rounded, cut off at 255, negative numbers 0. imageio tries
#   OpenCV before Pillow for this ending, and reads 8 bits with it. There is no warning.
# Why it matters: PFM holds depth, disparity and height maps. OpenCV is installed by many packages
#   for augmentation and detection, so two machines with one script read different data. A depth map
#   in metres keeps its shape and loses all its digits; one in [0, 1] becomes a mask of 0 and 1.
# Way out: imread(path, plugin="pillow").
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
cd "$dir"
cat > read.py <<'PY'
import sys

import imageio.v3 as iio
import numpy as np

depth = np.array([[0.25, 0.75, 3.7], [-2.0, 254.6, 1000.5]], "<f4")
with open("depth.pfm", "wb") as file:
    file.write(b"Pf\n3 2\n-1.0\n" + depth[::-1].tobytes())  # rows of PFM files go from bottom to top

found = iio.imread("depth.pfm")
print(f"{sys.argv[1]}: {found.dtype}, {found.tolist()}")
if sys.argv[1] == "without OpenCV":
    assert found.dtype == np.float32 and np.array_equal(found, depth)
else:
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 1, 4], [0, 255, 255]]
    named = iio.imread("depth.pfm", plugin="pillow")
    assert named.dtype == np.float32 and np.array_equal(named, depth)
    print(f"{sys.argv[1]}, plugin named: {named.dtype}, {named.tolist()}")
PY
pip=("$dir/venv/bin/pip" install -q --disable-pip-version-check)
"${pip[@]}" "imageio==2.38.1" "pillow==13.0.0" "numpy==2.4.6"
"$dir/venv/bin/python" read.py "without OpenCV"
"${pip[@]}" "opencv-python-headless==5.0.0.93"
"$dir/venv/bin/python" read.py "with OpenCV"
