#!/usr/bin/env bash
# Software: datasets 5.2.0, Pillow 13.0.0, numpy 2.4.6.
# Expected: Dataset.map with a function that looks at an image and returns another column (here its
#   brightness) adds that column and leaves the images alone.
# Found: as soon as the function has looked at the image, map decodes it and stores it encoded again,
#   in the format that the file had, with Pillow's defaults. JPEG is compressed anew at quality 75;
#   a lossless WebP becomes a lossy one. Each further map loses more. It happens where the images are
#   bytes in the table, as in Parquet files and on the Hub. PNG keeps its pixels, and so does an
#   image that the function does not look at.
# Why it matters: lengths, hashes, labels and filters are added by map before training. Pixels then
#   depend on which columns were added, and two runs with different preparations do not see the same
#   images. A mask in lossless WebP loses whole classes: here labels 0, 1, 2, 3 become 1 and 2.
# Way out: map on dataset.cast_column("image", Image(decode=False)) and decode inside the function;
#   or remove the image column before, and join the new column afterwards.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "datasets==5.2.0" "pillow==13.0.0" "numpy==2.4.6"
cd "$dir"
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$dir/venv/bin/python" - <<'PY'
import io

import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as Pillow

rng = np.random.default_rng(0)
photo = Pillow.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((96, 96), Pillow.BICUBIC)
labels = Pillow.fromarray(np.repeat(rng.integers(0, 4, (96, 96, 1), dtype=np.uint8), 3, axis=2))
undecoded = Image(decode=False)


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def brightness(row):
    return {"brightness": float(np.asarray(row["image"]).mean())}


def from_bytes(row):
    return brightness({"image": Pillow.open(io.BytesIO(row["image"]["bytes"]))})


def pixels(dataset):
    return np.asarray(dataset[0]["image"]).astype(int)


def change(one, two):
    return int(abs(pixels(one) - pixels(two)).max())


for name, data in {
    "JPEG": encode(photo, "JPEG", quality=95, subsampling=0),
    "PNG": encode(photo, "PNG"),
    "WebP": encode(labels, "WEBP", lossless=True),
}.items():
    before = Dataset.from_dict({"image": [{"bytes": data, "path": None}]}, features=Features({"image": Image()}))
    after = before.map(brightness)
    untouched = before.map(lambda row: {"brightness": 0.0})
    raw = before.cast_column("image", undecoded).map(from_bytes).cast_column("image", Image())
    size = len(after.cast_column("image", undecoded)[0]["image"]["bytes"])
    print(f"{name}: {len(data)} bytes, after map {size}; pixels differ by up to {change(before, after)}, "
          f"after a second map {change(before, after.map(brightness))}; if the image is not looked at: {change(before, untouched)}")
    assert after.column_names == ["image", "brightness"] == raw.column_names and raw[0]["brightness"] > 0
    assert change(before, untouched) == 0 and change(before, raw) == 0
    if name == "PNG":
        assert change(before, after) == 0
    elif name == "JPEG":
        assert change(before, after) >= 10 and size < 0.6 * len(data)
    else:
        print("labels before and after:", found := [np.unique(pixels(d)).tolist() for d in (before, after)])
        assert found == [[0, 1, 2, 3], [1, 2]]
PY
