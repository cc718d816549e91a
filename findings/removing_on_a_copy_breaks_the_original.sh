#!/usr/bin/env bash
# Software: torch 2.14.1 (torch.nn.utils.parametrize, torch.optim.swa_utils).
# Expected: a deep copy is independent. Folding weight_norm into the weights of the copy, to export
#   it, leaves the network that is still being trained alone.
# Found: the copy and the original share one class, made at run time, and remove_parametrizations
#   deletes the property "weight" from that class. The copy works; the original has lost its weight:
#   its next forward pass raises AttributeError, and it cannot be folded any more either.
#   It happens in both directions, with copy.deepcopy and with AveragedModel.
# Why it matters: last layers with weight_norm are common in self-supervised heads, and the encoder
#   that is exported is a moving average, so a copy. An export in mid-training ends the training.
# Way out: save the state_dict, build a new network, load it there and fold that one.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "numpy==2.4.6"
"$dir/venv/bin/python" - <<'PY'
import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim.swa_utils import AveragedModel


def build():
    torch.manual_seed(0)
    return weight_norm(nn.Linear(3, 2))


def outcome(step):
    try:
        step()
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "works"


x = torch.ones(1, 3)

online = build()
average = AveragedModel(online)
before = online(x)
remove_parametrizations(average.module, "weight")
print("the folded average:", outcome(lambda: average(x)))
print("the network in training:", outcome(lambda: online(x)))
print("folding it as well:", outcome(lambda: remove_parametrizations(online, "weight")))
assert torch.allclose(average(x), before)
assert "no attribute 'weight'" in outcome(lambda: online(x))
assert "no attribute 'weight'" in outcome(lambda: remove_parametrizations(online, "weight"))

online = build()
momentum = copy.deepcopy(online)
remove_parametrizations(online, "weight")
print("the other way round, the copy:", outcome(lambda: momentum(x)))
assert "no attribute 'weight'" in outcome(lambda: momentum(x))

first, second = build(), build()  # built one by one: each has a class of its own
remove_parametrizations(first, "weight")
print("built anew instead of copied:", outcome(lambda: second(x)))
assert outcome(lambda: second(x)) == "works"
PY
