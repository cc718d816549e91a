#!/usr/bin/env bash
# Software: torchvision 0.29.1 (models.feature_extraction), torch 2.14.1.
# Expected: copy.deepcopy keeps what a network is: its mode (train or eval) and its hooks, as it does
#   for the ResNet from which the extractor was made.
# Found: the copy of a network from create_feature_extractor is in training mode, all of its layers,
#   although the original was in eval mode. Inside a larger module it is worse to see: the copy of
#   the larger module says training = False, and the extractor in it trains. AveragedModel copies
#   this way, too. Hooks that were registered on the extractor are gone from the copy.
# Why it matters: frozen targets, momentum encoders and evaluation copies are made by deepcopy. Such
#   a copy normalises by the batch, and every forward pass changes its BatchNorm statistics. Nothing
#   fails. The features are others, and depend on what else is in the batch.
# Way out: call eval() on the copy (on the whole of it) each time, and register its hooks again.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6" "pillow==13.0.0"
"$dir/venv/bin/python" - <<'PY'
import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

torch.manual_seed(0)
images = torch.rand(4, 3, 64, 64)
calls = []


def report(name, network):
    """Prints the network's mode, how many of its layers train, and what a forward pass does."""
    layers = [module for module in network.modules() if not list(module.children())]
    training = sum(layer.training for layer in layers)
    norm = next(module for module in layers if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    calls.clear()
    with torch.no_grad():
        network(images)
    moved = not torch.equal(before, norm.running_mean)
    print(f"{name}: training = {network.training}, {training} of {len(layers)} layers train,", end=" ")
    print(f"statistics moved: {moved}, hook called: {bool(calls)}")
    return network.training, training, moved, bool(calls)


def hook(module, inputs):
    calls.append(1)


plain = resnet18().eval()
plain.register_forward_pre_hook(hook)
quiet = (False, 0, False, True)
assert report("ResNet", plain) == quiet
assert report("its copy", copy.deepcopy(plain)) == quiet

extractor = create_feature_extractor(resnet18().eval(), {"layer3": "map"})
extractor.register_forward_pre_hook(hook)
assert report("extractor", extractor) == quiet
awake = report("its copy", copy.deepcopy(extractor))
assert awake[0] and awake[1] > 0 and awake[2:] == (True, False)

network = nn.Sequential(extractor).eval()
assert report("module around the extractor", network) == quiet
awake = report("its copy", copy.deepcopy(network))
assert not awake[0] and awake[1] > 0 and awake[2:] == (True, False)
average = AveragedModel(network)
awake = report("its AveragedModel", average.module)
assert not awake[0] and awake[1] > 0 and awake[2:] == (True, False)

again = report("its copy after eval()", copy.deepcopy(network).eval())
assert again == (False, 0, False, False)
PY
