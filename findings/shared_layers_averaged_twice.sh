#!/usr/bin/env bash
# Software: timm 1.0.31 (utils.ModelEmaV3, utils.ModelEmaV2), torch 2.14.1.
# Expected: one update moves every weight of the average by 1 - decay towards the network.
# Found: a layer that can be reached by two names moves twice, a layer with three names three times.
#   The classes walk through state_dict(), which lists a shared tensor once for each name, and update
#   it in place each time. The decay of such layers is decay ** 2: 0.998 for 0.999, which remembers
#   half as many steps. With exclude_buffers=True, which should concern buffers only, the weights are
#   right. AveragedModel of torch, with the same decay, is right, too.
# Why it matters: "self.encoder = net" and "self.features = nn.Sequential(net, pool)" side by side, or
#   tied weights of an autoencoder, are common. Half of the network then has another momentum than
#   the head. Nothing fails, and a momentum encoder that is too fast only makes the results worse.
# Way out: exclude_buffers=True (it copies the buffers), or torch.optim.swa_utils.AveragedModel.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "numpy==2.4.6" "pillow==13.0.0"
"$dir/venv/bin/python" - <<'PY'
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

decay, steps = 0.99, 100


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.features = nn.Sequential(self.encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten())  # second name
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.features(x))


def average(name, make, update):
    """An average that starts at 0 and follows a network of ones for some steps."""
    network = Network()
    ema = make(network)
    with torch.no_grad():
        for value, module in ((0.0, ema.module), (1.0, network)):
            for parameter in module.parameters():
                parameter.fill_(value)
    for _ in range(steps):
        update(ema, network)
    encoder, head = ema.module.encoder[0].weight.mean().item(), ema.module.head.weight.mean().item()
    print(f"{name}: after {steps} steps the encoder is at {encoder:.4f}, the head at {head:.4f}")
    return encoder, head


def averaged_model(network):
    model = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    model.n_averaged += 1  # else the first update is a copy
    return model


once, twice = 1 - decay**steps, 1 - decay ** (2 * steps)
print(f"right for a decay of {decay}: {once:.4f}; for its square: {twice:.4f}")


def near(found, encoder, head):
    return abs(found[0] - encoder) < 1e-3 and abs(found[1] - head) < 1e-3


def of_timm(kind, **options):
    name = ", ".join([kind.__name__] + [f"{key}={value}" for key, value in options.items()])
    return average(name, lambda n: kind(n, decay=decay, **options), lambda ema, n: ema.update(n))


assert near(average("AveragedModel", averaged_model, lambda a, n: a.update_parameters(n)), once, once)
assert near(of_timm(ModelEmaV3), twice, once)
assert near(of_timm(ModelEmaV3, foreach=False), twice, once)
assert near(of_timm(ModelEmaV2), twice, once)
assert near(of_timm(ModelEmaV3, exclude_buffers=True), once, once)
PY
