#!/usr/bin/env bash
# Software: ensemble-boxes 1.0.9 (soft_nms, nms), numba 0.68.1, numpy 2.4.6, pandas 3.1.1.
# Expected: Soft-NMS lowers the score of a box that overlaps a better one; this is the method. A
#   function that combines boxes leaves its arguments alone.
# Found: soft_nms returns the scores as they came in. The lowered ones are only compared with thresh
#   (0.001 by default), so nearly every duplicate is kept, with its full score. With weights, nms
#   and soft_nms also write the weighted scores into the caller's lists: each further call on the
#   same lists weights them again.
# Why it matters: duplicates with full scores are false alarms, so Soft-NMS looks far worse than NMS
#   in a comparison. A search over iou_thr calls the function on the same lists again and again: two
#   equal weights halve all scores at each call, and the result depends on the order of the search.
# Way out: none for soft_nms in this package. With weights, hand over copies of the lists.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "ensemble-boxes==1.0.9" "numba==0.68.1" \
    "numpy==2.4.6" "pandas==3.1.1"
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import numpy as np
from ensemble_boxes import nms, soft_nms

boxes = [[[0.1, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]], [[0.1, 0.1, 0.5, 0.5]]]
labels = [[0, 0], [0]]


def scores():
    return [[0.9, 0.7], [0.8]]


for method, factor in [(1, 0.0), (2, np.exp(-1 / 0.5))]:  # linear, Gaussian with sigma 0.5
    print(f"Method {method}: the second of two equal boxes should go from 0.8 to {0.8 * factor:.2f}.")
_, found, _ = soft_nms(boxes, scores(), labels, method=2, sigma=0.5)
print("soft_nms (Gaussian) returns", sorted(found.tolist(), reverse=True))
assert sorted(found.tolist()) == [0.7, 0.8, 0.9]
_, found, _ = nms(boxes, scores(), labels, iou_thr=0.5)
print("nms returns", sorted(found.tolist(), reverse=True))
assert sorted(found.tolist()) == [0.7, 0.9]

mine = scores()
best = [nms(boxes, mine, labels, iou_thr=t, weights=[1, 1])[1].max() for t in (0.4, 0.5, 0.6)]
print("Best score of three calls with weights [1, 1] on the same lists:", [round(float(b), 4) for b in best])
assert np.allclose(best, [0.45, 0.225, 0.1125])
best = [nms(boxes, scores(), labels, iou_thr=t, weights=[1, 1])[1].max() for t in (0.4, 0.5, 0.6)]
assert np.allclose(best, 0.45)
PY
