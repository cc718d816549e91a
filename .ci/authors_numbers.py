"""Prints the authors' numbers of test_pixpro.py, computed by the authors' code.

    git clone https://github.com/zdaxie/PixPro     (commit e390d6b)
    python .ci/authors_numbers.py PixPro

All in float32 on a CPU, from the function wave() of test_pixpro.py. In the order of the tests.
"""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, sys.argv[1])

from contrast.lars import LARS, add_weight_decay
from contrast.lr_scheduler import get_scheduler

from test_pixpro import AUTHORS_BOX_1, AUTHORS_BOX_2, tensor, wave

authors = importlib.import_module("contrast.models.PixPro")  # the module, not the class
authors.get_world_size = lambda: 1
box_1, box_2 = tensor(*AUTHORS_BOX_1), tensor(*AUTHORS_BOX_2)

q = F.normalize(wave(4, 8, 7, 7, a=0.37), dim=1)
k = F.normalize(wave(4, 8, 7, 7, a=0.53, b=0.5), dim=1)
for T in (0.35, 0.7, 1.4):
    print(f"Eq. 5, T {T}: {authors.regression_loss(q, k, box_1, box_2, T).item():.10f}")
for n in range(4):
    one = slice(n, n + 1)
    loss = authors.regression_loss(q[one], k[one], box_1[one], box_2[one], 0.7)
    print(f"Eq. 5, image {n}: {loss.item():.10f}")

for gamma, layers in ((2.0, 1), (1.0, 0)):
    g = nn.Conv2d(256, 256, 1) if layers else nn.Identity()
    if layers:
        g.weight.data = wave(256, 256, 1, 1, a=0.07) / 16
        g.bias.data = 0.01 * wave(256, a=0.19)
    ppm = SimpleNamespace(pixpro_clamp_value=0.0, pixpro_p=gamma, value_transform=g)
    with torch.no_grad():
        y = authors.PixPro.featprop(ppm, wave(2, 256, 3, 5, a=0.23)).double()
    y = y.view(2, 256, 3, 5)
    figures = [y.sum(), y.abs().sum(), y[1, 17, 2, 3], y[0, 255, 0, 0]]
    print(f"Eq. 3, gamma {gamma}, l {layers}:", *(f"{figure.item():.10f}" for figure in figures))


def base_encoder(**options):
    convolution = nn.Conv2d(3, 2048, 8, stride=8, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(2048), nn.ReLU())


def model(steps):
    """Their PixPro for a run of so many steps of one image, every weight a wave."""
    options = {"p": 2.0, "momentum": 0.99, "pos_ratio": 0.7, "clamp_value": 0.0}
    options |= {"transform_layer": 1, "ins_loss_weight": 0.0}
    args = SimpleNamespace(**{f"pixpro_{name}": value for name, value in options.items()})
    args.feature_dim, args.head_type = 256, "early_return"
    args.num_instances, args.batch_size, args.epochs, args.start_epoch = steps, 1, 1, 1
    with torch.no_grad():
        net = authors.PixPro(base_encoder, args)
        for name, p in net.named_parameters():
            if "encoder" in name and p.dim() > 1:
                p.copy_(0.1 * wave(*p.shape, a=0.11))
            elif p.dim() > 1:
                p.copy_(wave(*p.shape, a=0.07) / math.sqrt(p.shape[1]))
            elif ".bn" not in name and "encoder" not in name:
                p.copy_(0.01 * wave(*p.shape, a=0.19))
    return net


net = model(100)
for step in range(100):
    p, p_k = next(net.projector.parameters()), next(net.projector_k.parameters())
    p.data.fill_(1.0)
    p_k.data.fill_(0.0)
    net._momentum_update_key_encoder()
    if step in (0, 1, 25, 50, 99):
        print(f"m at step {step}: {1 - p_k.flatten()[0].item():.7f}")

w, b, z = (nn.Parameter(p) for p in (wave(5, 7, a=0.9), wave(7, a=0.4), torch.zeros(3, 3)))
vectors = {"params": [b], "weight_decay": 0, "ignore": True}
matrices = {"params": [w, z], "weight_decay": 1e-2, "ignore": False}
optimizer = LARS(torch.optim.SGD([vectors, matrices], lr=0.3, momentum=0.9))
for t in range(3):
    w.grad, b.grad = wave(5, 7, a=0.31, b=t), wave(7, a=0.71, b=t)
    z.grad = torch.full((3, 3), float(t > 0))
    optimizer.step()
print("LARS:", w.flatten()[:6].tolist(), b.tolist(), z[0, 0].item())

schedule = SimpleNamespace(lr_scheduler="cosine", epochs=20, warmup_epoch=5)
schedule.warmup_multiplier, schedule.lr_decay_rate = 100, 0.1
optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4.0)
scheduler = get_scheduler(optimizer, 10, schedule)
for step in range(200):
    if step in (0, 1, 25, 49, 50, 51, 100, 150, 199):
        print(f"rate at step {step}: {optimizer.param_groups[0]['lr']:.10f}")
    optimizer.step()
    scheduler.step()

net = model(6)
groups = add_weight_decay(net, 1e-5)
optimizer = LARS(torch.optim.SGD(groups, lr=0.5, momentum=0.9))
box_1 = tensor(*AUTHORS_BOX_1[:3], [0.2, 0.2, 0.6, 0.6])
box_2 = tensor(*AUTHORS_BOX_2[:3], [0.4, 0.3, 0.8, 0.7])
for t in range(4):
    view_1, view_2 = wave(4, 3, 32, 32, a=0.013, b=t), wave(4, 3, 32, 32, a=0.017, b=0.3 * t)
    loss = net(view_1, view_2, box_1, box_2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"training step {t}: {loss.item():.10f}")
