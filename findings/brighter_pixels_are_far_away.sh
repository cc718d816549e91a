#!/usr/bin/env bash
# Software: scikit-learn 1.9.1 (feature_extraction.image.img_to_graph), numpy 2.4.6, scipy 1.17.1.
# Expected: img_to_graph weighs the edge between two neighbouring pixels by the size of their
#   difference. A photograph in uint8, as readers give it, and in float64 gives one graph.
# Found: the difference is taken in the type of the image. In uint8 it wraps around before the
#   absolute value: a step down of 10 weighs 10, and a step up of 10 weighs 246, so an image and its
#   mirror image differ. dtype=float does not help, as it applies to the finished weights.
# Why it matters: the graph goes into spectral clustering, as in the user guide, where exp(-weight)
#   says which pixels belong together. In photographs of uint8 smooth rises become cuts, and noise of
#   one grey level becomes the strongest edge.
# Way out: img_to_graph(image.astype(float)).
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "scikit-learn==1.9.1" "numpy==2.4.6" "scipy==1.17.1"
cd "$dir"
"$dir/venv/bin/python" -W error - <<'PY'
import numpy as np
from sklearn.feature_extraction.image import img_to_graph

row = np.array([[10, 20, 10]], np.uint8)
right = img_to_graph(row.astype(float), return_as=np.ndarray)
for graph in (img_to_graph(row, return_as=np.ndarray), img_to_graph(row, return_as=np.ndarray, dtype=float)):
    print("Edges of the row 10, 20, 10:", graph[0, 1], graph[1, 2], "in float:", right[0, 1], right[1, 2])
    assert (graph[0, 1], graph[1, 2]) == (246, 10) and (right[0, 1], right[1, 2]) == (10, 10)

noise = np.random.default_rng(0)
photo = np.clip(np.linspace(60, 190, 64)[None] + noise.normal(0, 2, (64, 64)), 0, 255).astype(np.uint8)


def weights(image):
    graph = img_to_graph(image, return_as=np.ndarray).astype(float)
    return graph[np.arange(4095), np.arange(1, 4096)].reshape(-1)[np.arange(4095) % 64 != 63]


wrong, right = weights(photo), weights(photo.astype(float))
steps = np.abs(np.diff(photo.astype(int), axis=1)).ravel()
assert np.array_equal(right, steps)
print(f"A smooth photo: largest edge {right.max():.0f} in float, {wrong.max():.0f} in uint8;")
print(f"{(wrong != right).mean():.0%} of the horizontal edges are wrong.")
assert right.max() < 20 and wrong.max() > 250 and (wrong != right).mean() > 0.5
PY
