#!/usr/bin/env bash
# Software: lightly 1.6.0 (utils.benchmarking.KNNClassifier), pytorch-lightning 2.6.6, torch 2.14.1.
# Expected: feature_dtype=torch.float16 ("for memory-efficient KNN search") costs a rounding error.
# Found: with the usual temperature of 0.07 the weight exp(similarity / 0.07) leaves the range of
#   float16 once the cosine is above 0.776. The infinite weight meets the zeros of the other classes,
#   all scores of the image become NaN, and its predicted class means nothing. Only images with a
#   near neighbour are hit, so the better the features, the lower the accuracy: features that are
#   all right in float32 are all wrong here. There is no warning. A temperature of 0.1 just fits.
# Why it matters: this number watches pre-training and picks checkpoints. It rises, then falls while
#   the features improve, which looks like overfitting or collapse.
# Way out: bfloat16 or float32 features, or a temperature of 0.1 or more.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "torchvision==0.29.1" \
    "lightly==1.6.0" "pytorch-lightning==2.6.6" "numpy==2.4.6" "pillow==13.0.0"
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import logging
import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore")  # hints about data loaders with few workers
from lightly.utils.benchmarking import KNNClassifier
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
classes, dim = 10, 64


def data(noise):
    """Unit vectors around ten centres, 1000 to compare with and 300 to classify."""
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(classes, dim), dim=1)
    loaders = []
    for n in (1000, 300):
        labels = torch.randint(classes, (n,))
        features = F.normalize(centres[labels] + noise * torch.randn(n, dim), dim=1)
        loaders.append(DataLoader(TensorDataset(features, labels), batch_size=100))
    return loaders


def accuracy(loaders, dtype, temperature):
    classifier = KNNClassifier(None, classes, knn_k=20, knn_t=temperature, feature_dtype=dtype,
                               train_dataloader_idx=0, val_dataloader_idx=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)
    return list(trainer.validate(classifier, loaders, verbose=False)[-1].values())[0]


found = {}
for noise in (0.3, 0.1, 0.05):  # from poor to excellent features
    loaders = data(noise)
    features, labels = loaders[0].dataset.tensors
    cosine = (features @ features.T)[labels[:, None] == labels].mean()
    found[noise] = [accuracy(loaders, dtype, 0.07) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    found[noise].append(accuracy(loaders, torch.float16, 0.1))
    print(f"mean cosine within a class {cosine:.2f}: top-1 of float32 {found[noise][0]:.3f},", end=" ")
    print("bfloat16 {1:.3f}, float16 {2:.3f}, float16 at 0.1 {3:.3f}".format(*found[noise]))
for noise, (full, brain, half, warmer) in found.items():
    assert abs(brain - full) < 0.02 and abs(warmer - full) < 0.03
assert abs(found[0.3][2] - found[0.3][0]) < 0.02
assert found[0.05][0] > 0.99 and found[0.05][2] < 0.15
assert found[0.1][0] > 0.99 and 0.5 < found[0.1][2] < 0.95
PY
