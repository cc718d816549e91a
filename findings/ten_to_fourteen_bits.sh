#!/usr/bin/env bash
# Software: opencv-python-headless 5.0.0.93, Pillow 13.0.0, numpy 2.4.6.
# Expected: cv2.imread with IMREAD_UNCHANGED returns the numbers in the file.
# Found: in TIFF files with 10, 12 or 14 bits per sample it multiplies them by 64, 16 or 4, so that
#   they fill 16 bits. The same measurements stored with 16 bits per sample come back as they are.
#   Pillow reads 12-bit files too, and returns them as they are. Nothing in the array tells.
# Why it matters: cameras and scanners pack 12 bits, and an export of the same images often uses 16.
#   A folder of both has two brightness scales, a factor of 16 apart, and statistics for
#   normalisation, thresholds and "no data" values are those of the reader, not of the data.
#   A network pre-trained with one reader and used with the other sees images that are nearly black.
# Way out: ask another reader for the bits per sample (Pillow: image.tag_v2[258]) and divide.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "opencv-python-headless==5.0.0.93" "pillow==13.0.0" "numpy==2.4.6"
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import struct

import cv2
import numpy as np
from PIL import Image


def write_tiff(path, rows, bits):
    """A grey TIFF without compression; below 16 bits each row is padded to whole bytes."""
    data = b""
    for row in rows:
        if bits == 16:
            data += struct.pack(f"<{len(row)}H", *row)
        else:
            text = "".join(format(value, f"0{bits}b") for value in row)
            text += "0" * (-len(text) % 8)
            data += int(text, 2).to_bytes(len(text) // 8, "big")
    width, height, size = len(rows[0]), len(rows), len(data)
    data += b"\0" * (size % 2)
    # width, height, bits, no compression, black is zero, offset, samples, rows per strip, bytes
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with open(path, "wb") as file:
        file.write(b"II*\0" + struct.pack("<I", 8 + len(data)) + data)
        file.write(struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))


rows = [[0, 1, 100, 1023], [512, 7, 8, 9]]  # fits into 10 bits
factor = {}
for bits in (10, 12, 14, 16):
    write_tiff("image.tif", rows, bits)
    found = cv2.imread("image.tif", cv2.IMREAD_UNCHANGED)
    factor[bits] = int(found[0, 1])
    print(f"{bits} bits per sample, OpenCV: {found.dtype}, {found[0].tolist()}")
    assert found.dtype == np.uint16
    assert np.array_equal(found, np.array(rows) * factor[bits])
    if bits in (12, 16):  # Pillow does not read grey of 10 or 14 bits
        with Image.open("image.tif") as image:
            other = np.asarray(image)
            print(f"{bits} bits per sample, Pillow: {other.dtype}, {other[0].tolist()}, tag {image.tag_v2[258]}")
            assert other.tolist() == rows
assert factor == {10: 64, 12: 16, 14: 4, 16: 1}
PY
