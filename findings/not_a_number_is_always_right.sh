#!/usr/bin/env bash
# Software: torcheval 0.0.7 (metrics.MulticlassAccuracy with k above 1), torch 2.14.1.
# Expected: a top-5 accuracy counts an image as right if its class is one of five that were chosen.
# Found: the image is right if fewer than five classes have a strictly larger score. So the right
#   class wins every tie, and nothing is larger than NaN. A network that has diverged to NaN reaches
#   1.0, and so does one that says the same for all 1000 classes. With votes of nearest neighbours
#   most classes have none: every image with fewer than five classes among its neighbours is right.
#   For k = 1 the same metric takes the argmax and sees the failure.
# Why it matters: top-5 accuracy is reported for probes and nearest neighbours, and chooses
#   checkpoints. Collapse, overflow in float16 and votes give numbers that are too good to be noticed
#   as a bug: here 1.0 in place of 0.6 for votes.
# Way out: scores.topk(5).indices == labels[:, None], and a check that all scores are finite.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "torcheval==0.0.7" "numpy==2.4.6"
"$dir/venv/bin/python" -W ignore - <<'PY'
import torch
import torch.nn.functional as F
from torcheval.metrics import MulticlassAccuracy

torch.manual_seed(0)
classes, n = 1000, 2000
labels = torch.randint(classes, (n,))


def report(name, scores, k=5):
    """The accuracy of torcheval, and by choosing k classes for each image."""
    metric = MulticlassAccuracy(k=k)
    for part, target in zip(scores.split(500), labels.split(500)):
        metric.update(part, target)
    found = metric.compute().item()
    chosen = (scores.topk(k).indices == labels[:, None]).any(1).float().mean().item()
    print(f"{name}: top-{k} of torcheval {found:.4f}, of topk {chosen:.4f}")
    return found, chosen


logits = torch.randn(n, classes) + 3 * F.one_hot(labels, classes)
found, chosen = report("ordinary scores", logits)
assert 0.5 < found < 0.99 and abs(found - chosen) < 1e-6

for name, scores in (("NaN", torch.full((n, classes), torch.nan)), ("all the same", torch.zeros(n, classes))):
    found, chosen = report(name, scores)
    assert found == 1 and chosen < 0.02
    found, chosen = report(name, scores, k=1)
    assert found < 0.02 and chosen < 0.02

# Twenty neighbours each, of three classes. For four images of ten the right class is not among them.
votes = torch.zeros(n, classes)
for row, label in enumerate(labels.tolist()):
    others = torch.randperm(classes)
    others = others[others != label][:3]
    if row % 10 < 6:
        others[0] = label
    votes[row, others] = torch.tensor([12.0, 5.0, 3.0])
found, chosen = report("votes of twenty neighbours", votes)
assert found == 1 and 0.6 <= chosen < 0.63
PY
