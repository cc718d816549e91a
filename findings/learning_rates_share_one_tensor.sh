#!/usr/bin/env bash
# Software: torch 2.14.1 (torch.optim and its lr_scheduler).
# Expected: an optimizer with two groups has two learning rates. lr=torch.tensor(0.1), the form that
#   avoids recompilation under torch.compile, behaves like lr=0.1.
# Found: all groups without a rate of their own hold the same tensor object, and rates that are
#   tensors are changed in place. So the rate of the last group is written to all of them: LambdaLR
#   with one function for the backbone and one for the head gives both the rate of the head. And the
#   usual line for a decay by hand, "group["lr"] *= 0.1" for each group, divides by 10 once for each
#   group: by 100 with two groups, one with weight decay and one without. There is no warning.
# Why it matters: two groups (with and without weight decay, or backbone and head) are the usual case
#   in pre-training and fine-tuning. A backbone that should rest is trained at the rate of the head, or
#   all rates fall much faster than planned. An optimizer that was saved and loaded shares it, too.
# Way out: give each group a tensor of its own: {"params": ..., "lr": torch.tensor(0.1)}.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "numpy==2.4.6"
"$dir/venv/bin/python" -W error - <<'PY'
import copy

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR


def optimizer(lr, own=False):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    groups[1]["weight_decay"] = 0.0
    if own:
        for group in groups:
            group["lr"] = lr.clone()
    return torch.optim.AdamW(groups, lr=lr)


def rates(opt):
    return [round(float(group["lr"]), 6) for group in opt.param_groups]


def frozen_backbone(opt):
    """The backbone at rate 0, the head at the full rate."""
    LambdaLR(opt, [lambda step: 0.0, lambda step: 1.0])


def one_cycle(opt):
    """Two maxima, a factor of 100 apart; the rates of the first step are a 25th of them."""
    OneCycleLR(opt, max_lr=[0.001, 0.1], total_steps=100)


def by_hand(opt):
    for group in opt.param_groups:
        group["lr"] *= 0.1


def restored(opt):
    """Saved, loaded into a copy, and decayed there."""
    other = copy.deepcopy(opt)
    other.load_state_dict(opt.state_dict())
    by_hand(other)
    opt.param_groups = other.param_groups


right = {frozen_backbone: [0.0, 0.1], one_cycle: [0.00004, 0.004], by_hand: [0.01, 0.01], restored: [0.01, 0.01]}
wrong = {frozen_backbone: [0.1, 0.1], one_cycle: [0.004, 0.004], by_hand: [0.001, 0.001], restored: [0.001, 0.001]}
for change in right:
    kinds = {"0.1": optimizer(0.1), "tensor(0.1)": optimizer(torch.tensor(0.1))}
    kinds["a tensor for each group"] = optimizer(torch.tensor(0.1), own=True)
    for name, opt in kinds.items():
        change(opt)
        print(f"{change.__name__}, lr={name}: {rates(opt)}")
        assert rates(opt) == (wrong if name == "tensor(0.1)" else right)[change]
PY
