#!/usr/bin/env bash
# Software: transformers 5.24.0 (DetrModel), timm 1.0.31, torch 2.14.1.
# Expected: DETR freezes the BatchNorm of its backbone: same weights, same features in eval mode.
# Found: it puts a frozen norm in the place of every module that is a BatchNorm2d. In many networks
#   of timm (EfficientNet, RegNet, MobileNet) that module is a BatchNormAct2d, a subclass which also
#   applies the activation, and the activation goes with it: two of three in a RegNet, nearly all in
#   an EfficientNet. All weights load, strictly, and nothing warns. A ResNet is not affected.
# Why it matters: a backbone pre-trained in timm goes into DETR, all keys match, and what it computes
#   has little to do with what it has learned. Fine-tuning hides it: the detector is only worse.
# Way out: a backbone with activations of its own. timm's freeze_batch_norm_2d does it right.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "transformers==5.24.0" "numpy==2.4.6"
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'PY'
import copy

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from transformers import DetrConfig, DetrModel, TimmBackboneConfig


def detr(arch):
    """A small DETR on a random backbone; nothing is downloaded."""
    backbone = TimmBackboneConfig(backbone=arch, use_pretrained_backbone=False, out_indices=[4])
    small = dict(d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
    small |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    return DetrModel(DetrConfig(backbone_config=backbone, **small)).eval()


def timm_part(model):
    """The network of timm in it."""
    return next(m for m in model.modules() if type(m).__module__.startswith("timm."))


def activations_in_norms(network):
    """Norms that also apply an activation."""
    norms = [m for m in network.modules() if type(m).__name__ == "BatchNormAct2d"]
    return sum(not isinstance(m.act, torch.nn.Identity) for m in norms)


difference = {}
image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
for arch in ("resnet18", "regnety_002", "efficientnet_b0"):
    torch.manual_seed(0)
    trained = timm.create_model(arch, features_only=True, out_indices=(4,))
    with torch.no_grad():
        for _ in range(30):  # BatchNorm statistics of its own
            trained(torch.rand(4, 3, 128, 128))
        trained.eval()
        part = timm_part(detr(arch))
        print(f"{arch}: {part.load_state_dict(trained.state_dict(), strict=True)}", end=" ")
        a, b = trained(image)[-1], part(image)[-1]
        control = freeze_batch_norm_2d(copy.deepcopy(trained))(image)[-1]
    difference[arch] = ((a - b).norm() / a.norm()).item()
    assert (a - control).norm() / a.norm() < 1e-4  # timm's own way to freeze
    inside = activations_in_norms(trained), activations_in_norms(part)
    print(f"Norms with an activation inside: {inside[0]} in timm, {inside[1]} in DETR.", end=" ")
    print(f"The features differ by {difference[arch]:.2g} times their norm.")
    assert inside[1] == 0 and (inside[0] > 0) == (arch != "resnet18")

assert difference["resnet18"] < 1e-4
assert difference["regnety_002"] > 0.3 and difference["efficientnet_b0"] > 0.3
PY
