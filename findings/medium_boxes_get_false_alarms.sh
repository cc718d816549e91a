#!/usr/bin/env bash
# Software: globox 2.9.0 (COCOEvaluator), pycocotools 2.0.11, numpy 2.4.6.
# Expected: globox computes the COCO metrics, so the same boxes have the same AP in pycocotools.
# Found: AP over all sizes agrees; AP of small, medium and large objects can differ. In COCO a
#   detection may match an object out of the range of sizes, and then both are ignored. In globox
#   the detection is a false alarm as soon as the image holds an unmatched object in the range,
#   even one that it does not touch. Here AP of medium objects is 0.50 and not 0.95.
# Why it matters: a detection need only be a little smaller or larger than its object, next to a
#   limit (32 x 32, 96 x 96). The error has one direction: AP by size comes out too low for a
#   detector that is right.
# Way out: pycocotools for the metrics by size.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "globox==2.9.0" "pycocotools==2.0.11" "numpy==2.4.6"
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import contextlib
import io

import globox
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

objects = [(0, 0, 50, 50), (200, 200, 100, 100)]  # medium, large: x, y, width, height
detections = [((202, 202, 95, 95), 0.9), ((0, 0, 50, 50), 0.8)]  # medium, medium; both are good

boxes = [globox.BoundingBox.create(label="a", coords=o, box_format=globox.BoxFormat.LTWH) for o in objects]
found = [globox.BoundingBox.create(label="a", coords=b, box_format=globox.BoxFormat.LTWH, confidence=s)
         for b, s in detections]
size = (640, 480)
ours = globox.COCOEvaluator(
    ground_truths=globox.AnnotationSet([globox.Annotation("1", image_size=size, boxes=boxes)]),
    predictions=globox.AnnotationSet([globox.Annotation("1", image_size=size, boxes=found)]))

with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO()
    truth.dataset = {"info": {}, "images": [{"id": 1, "width": 640, "height": 480}],
                     "categories": [{"id": 1, "name": "a"}],
                     "annotations": [{"id": i + 1, "image_id": 1, "category_id": 1, "bbox": list(o),
                                      "area": o[2] * o[3], "iscrowd": 0} for i, o in enumerate(objects)]}
    truth.createIndex()
    guess = truth.loadRes([{"image_id": 1, "category_id": 1, "bbox": list(b), "score": s} for b, s in detections])
    coco = COCOeval(truth, guess, "bbox")
    coco.evaluate()
    coco.accumulate()
    coco.summarize()
print(f"AP, all sizes: globox {ours.ap():.3f}, pycocotools {coco.stats[0]:.3f}")
print(f"AP, medium:    globox {ours.ap_medium():.3f}, pycocotools {coco.stats[4]:.3f}")
assert abs(ours.ap() - coco.stats[0]) < 1e-6
assert coco.stats[4] > 0.94 and ours.ap_medium() < 0.55
PY
