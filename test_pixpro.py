"""Tests of pixpro.py and train.py. `pytest -k eq3` runs those of one equation; the other words are
eq1 eq2 eq4 eq5 eq6 momentum views lars schedule train. Tests without such a word are about the
whole.

For each equation: a case computed by hand, an independent slow version in loops, properties, and
where there are any the authors' numbers: what github.com/zdaxie/PixPro, commit e390d6b, computes
in float32 on a CPU from wave() below.
"""

import argparse
import ast
import contextlib
import copy
import inspect
import json
import math
import os
import re
import statistics
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import detection
from torchvision.transforms import v2

import pixpro
import train
from pixpro import (
    Backbone,
    Heads,
    PixelPropagation,
    PixPro,
    TwoViews,
    consistency_loss,
    ema_update,
    instance_loss,
    momentum_at,
    pixcontrast_loss,
    positive_pairs,
    projection_head,
)

GROUPS = (
    "eq1",
    "eq2",
    "eq3",
    "eq4",
    "eq5",
    "eq6",
    "momentum",
    "views",
    "lars",
    "schedule",
    "train",
)
HERE = Path(__file__).parent


def wave(*shape, a, b=0.0):
    """The inputs of the authors' numbers: element i, counted from 0, is sin(a (i + 1)^1.1 + b)."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(a * i**1.1 + b).float().view(shape)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


AUTHORS_BOX_1 = tensor(
    [0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.8, 0.1, 0.3, 0.6], [0.05, 0.05, 0.2, 0.2]
)
AUTHORS_BOX_2 = tensor(
    [0.3, 0.1, 0.9, 0.8], [0.25, 0.25, 0.75, 0.75], [0.2, 0.2, 0.9, 0.7], [0.7, 0.7, 0.95, 0.95]
)


def pixels(*columns):
    """A map [1, C, 1, W] of these pixels, each a list of C values."""
    return torch.tensor(columns, dtype=torch.float32).T[None, :, None, :]


def assert_same(found, expected):
    """For positives: says which pair differs first."""
    wrong = (found != expected).nonzero().tolist()
    if wrong:
        n, i, j = wrong[0]
        pytest.fail(
            f"pair ({i}, {j}) of image {n}: found {bool(found[n, i, j])}, "
            f"expected {bool(expected[n, i, j])}; "
            f"{len(wrong)} of {found.numel()} pairs differ"
        )


def random_maps(n=3, c=5, h=2, w=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, h, w, generator=generator, dtype=dtype) for _ in range(2)]


def random_positives(n=3, pairs=(6, 6), seed=0):
    """Random positives; the last image and the first pixel of the first image have none."""
    positives = torch.rand(n, *pairs, generator=torch.Generator().manual_seed(seed)) < 0.3
    positives[-1] = False
    positives[0, 0] = False
    return positives


def random_boxes(n, seed):
    """Boxes of at least 20 x 20, every second one mirrored."""
    generator = torch.Generator().manual_seed(seed)
    x0, y0, width, height = torch.rand(4, n, generator=generator)
    boxes = torch.stack(
        [100 * x0, 80 * y0, 100 * x0 + 20 + 90 * width, 80 * y0 + 20 + 90 * height], 1
    )
    boxes[::2] = boxes[::2][:, [2, 1, 0, 3]]
    return boxes


# ------------------------------------ Slow versions, in loops ------------------------------------
def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def slow_pixels(x):
    """Pixels of one map [C, H, W] as a list of vectors, row by row."""
    return [x[:, row, column] for row in range(x.shape[1]) for column in range(x.shape[2])]


def slow_positive_pairs(box_1, box_2, size, threshold):
    H, W = size
    A = torch.zeros(len(box_1), H * W, H * W, dtype=torch.bool)
    for n in range(len(box_1)):
        centres, diagonals = [], []
        for x0, y0, x1, y1 in (box_1[n].tolist(), box_2[n].tolist()):
            width, height = (x1 - x0) / W, (y1 - y0) / H
            centres.append(
                [
                    (x0 + (c + 0.5) * width, y0 + (r + 0.5) * height)
                    for r in range(H)
                    for c in range(W)
                ]
            )
            diagonals.append(math.hypot(width, height))
        for i, a in enumerate(centres[0]):
            for j, b in enumerate(centres[1]):
                A[n, i, j] = math.dist(a, b) / max(diagonals) <= threshold
    return A


def slow_pixcontrast(x, x_prime, positives, temperature):
    images = []
    for n in range(len(x)):
        losses = []
        for i, a in enumerate(slow_pixels(x[n])):
            e = [math.exp(cosine(a, b) / temperature) for b in slow_pixels(x_prime[n])]
            positive = sum(value for j, value in enumerate(e) if positives[n, i, j])
            negative = sum(value for j, value in enumerate(e) if not positives[n, i, j])
            if positive > 0:
                losses.append(-math.log(positive / (positive + negative)))
        if losses:
            images.append(sum(losses) / len(losses))
    return sum(images) / len(images)


def slow_propagation(x, g, gamma):
    y = torch.zeros_like(g)
    for n in range(len(x)):
        vectors, values = slow_pixels(x[n]), slow_pixels(g[n])
        for i, a in enumerate(vectors):
            for b, value in zip(vectors, values):
                s = max(cosine(a, b), 0.0) ** gamma
                y[n, :, i // x.shape[3], i % x.shape[3]] += (
                    s * value / math.sqrt(float(value @ value))
                )
    return y


def slow_consistency(y, x_prime, positives):
    images = []
    for n in range(len(y)):
        cosines = [
            cosine(a, b)
            for i, a in enumerate(slow_pixels(y[n]))
            for j, b in enumerate(slow_pixels(x_prime[n]))
            if positives[n, i, j]
        ]
        if cosines:
            images.append(-sum(cosines) / len(cosines))
    return sum(images) / len(images)


# ------------------------------------ Eq. 1 ------------------------------------
def test_eq1_by_hand():
    # A box of 6 x 8 with 2 x 2 bins: bins of 3 x 4, diagonal 5. Distance to the right 3 / 5 = 0.6,
    # downward 4 / 5 = 0.8, across 5 / 5 = 1. Exactly T is positive. With axes normalised one by one
    # both would be 0.5 / 0.707 = 0.707.
    box = tensor([0, 0, 6, 8])
    near = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    not_across = [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]
    for threshold, expected in (
        (0.599, torch.eye(4)),
        (0.6, near),
        (0.799, near),
        (0.8, not_across),
        (1, torch.ones(4, 4)),
    ):
        A = positive_pairs(box, box, (2, 2), threshold)
        assert A.dtype == torch.bool and A.shape == (1, 4, 4)
        assert A[0].tolist() == torch.as_tensor(expected).bool().tolist(), f"T = {threshold}"


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize("threshold", [0.35, 0.7, 1.4, 2.8])
def test_eq1_equals_loops(size, threshold):
    box_1, box_2 = random_boxes(6, seed=1), random_boxes(6, seed=2)
    expected = slow_positive_pairs(box_1, box_2, size, threshold)
    assert_same(positive_pairs(box_1, box_2, size, threshold), expected)


def test_eq1_authors_counts():
    assert positive_pairs(AUTHORS_BOX_1, AUTHORS_BOX_2, (7, 7)).sum((1, 2)).tolist() == [
        54,
        121,
        121,
        0,
    ]


def test_eq1_identical_boxes_give_the_diagonal():
    box = random_boxes(4, seed=3)
    for threshold in (0, 0.1, 0.3):
        assert_same(
            positive_pairs(box, box, (3, 4), threshold), torch.eye(12).bool().expand(4, -1, -1)
        )


def test_eq1_centres_lie_inside_the_box():
    box = random_boxes(8, seed=4)
    centres, diagonal = pixpro.bin_centres(box, (3, 5))
    x, y = centres.unbind(2)
    left, right = box[:, [0, 2]].amin(1, keepdim=True), box[:, [0, 2]].amax(1, keepdim=True)
    assert ((x > left) & (x < right) & (y > box[:, 1:2]) & (y < box[:, 3:4])).all()
    # and symmetrically: their mean is the middle of the box
    assert torch.allclose(x.mean(1), box[:, [0, 2]].mean(1)) and torch.allclose(
        y.mean(1), box[:, [1, 3]].mean(1)
    )
    assert torch.allclose(
        diagonal[:, 0], torch.hypot((right - left)[:, 0] / 5, (box[:, 3] - box[:, 1]) / 3)
    )


def test_eq1_swapping_the_boxes_transposes():
    box_1, box_2 = random_boxes(5, seed=5), random_boxes(5, seed=6)
    A = positive_pairs(box_1, box_2, (3, 4))
    assert A.any()
    assert_same(positive_pairs(box_2, box_1, (3, 4)), A.transpose(1, 2))


def test_eq1_mirroring_permutes_columns():
    box_1, box_2 = random_boxes(5, seed=7), random_boxes(5, seed=8)
    A = positive_pairs(box_1, box_2, (3, 4)).view(5, 12, 3, 4)
    mirrored = positive_pairs(box_1, box_2[:, [2, 1, 0, 3]], (3, 4)).view(5, 12, 3, 4)
    assert A.any() and torch.equal(mirrored, A.flip(3)) and not torch.equal(mirrored, A)


def test_eq1_unit_and_origin_do_not_matter():
    box_1, box_2 = random_boxes(5, seed=9), random_boxes(5, seed=10)
    A = positive_pairs(box_1, box_2, (4, 4))
    assert_same(positive_pairs(box_1 * 3, box_2 * 3, (4, 4)), A)
    assert_same(positive_pairs(box_1 + 50, box_2 + 50, (4, 4)), A)


def test_eq1_larger_diagonal_counts():
    # Bins of 4 x 4 (diagonal 5.657) against bins of 1 x 1 (1.414). The first centre (2, 2) is
    # 2.121, 1.581, 1.581, 0.707 from the small ones: at most 0.375 of the larger diagonal, but up
    # to 0.6 of their mean and 1.5 of the smaller one. The other large centres are at least
    # hypot(4.5, 0.5) / 5.657 = 0.8 away.
    A = positive_pairs(tensor([0, 0, 8, 8]), tensor([0, 0, 2, 2]), (2, 2), threshold=0.5)
    assert A[0].tolist() == [[True] * 4, [False] * 4, [False] * 4, [False] * 4]


def test_eq1_disjoint_boxes_give_none():
    assert not positive_pairs(tensor([0, 0, 10, 10]), tensor([50, 50, 60, 60]), (7, 7)).any()


def test_eq1_every_image_has_its_own_boxes():
    box_1, box_2 = random_boxes(4, seed=11), random_boxes(4, seed=12)
    A = positive_pairs(box_1, box_2, (3, 3))
    for n in range(4):
        assert torch.equal(A[n], positive_pairs(box_1[n : n + 1], box_2[n : n + 1], (3, 3))[0])


def test_eq1_counts_of_random_crops():
    # 20,000 simulated pairs of crops of a 500 x 375 image gave 113.9 +- 0.3 positive pairs of 2401,
    # and 2.6% without any; one pair's standard deviation is about 42, so 1,000 pairs lie within 4.
    views = TwoViews(size=8)
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500, dtype=torch.uint8)
    boxes = torch.stack(
        [torch.stack([views.crop(image)[1], views.crop(image)[1]]) for _ in range(1000)], 1
    )
    counts = positive_pairs(boxes[0], boxes[1], (7, 7)).sum((1, 2)).float()
    assert abs(counts.mean() - 113.9) < 4 and 0.01 < (counts == 0).float().mean() < 0.05


def test_eq1_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"boxes \[N, 4\], found \[2, 4\] and \[1, 4\]"):
        positive_pairs(torch.zeros(2, 4), torch.zeros(1, 4), (7, 7))
    for threshold in (-1, math.nan):
        with pytest.raises(ValueError, match=f"threshold >= 0, found {threshold}"):
            positive_pairs(torch.zeros(1, 4), torch.zeros(1, 4), (7, 7), threshold)


# ------------------------------------ Eq. 2 ------------------------------------
def test_eq2_by_hand():
    # x = x' = two orthogonal pixels, each its own positive: -log(e / (e + 1)) = log(1 + 1/e) =
    # 0.313262 at tau 1, log(1 + e^-5) = 0.006715 at tau 0.2.
    x = pixels([1, 0], [0, 1])
    positives = torch.eye(2, dtype=torch.bool)[None]
    assert pixcontrast_loss(x, x, positives, temperature=1).item() == pytest.approx(
        0.313262, abs=1e-6
    )
    assert pixcontrast_loss(x, x, positives, temperature=0.2).item() == pytest.approx(
        0.006715, abs=1e-6
    )


def test_eq2_sums_the_positives_inside_the_log():
    # Pixel 0 has cosines 1, 0, -1 and the positives 0 and 1: -log((e + 1) / (e + 1 + 1/e)) =
    # 0.094344. The mean of two logs would be (log(4.08616 / e) + log 4.08616) / 2 = 0.907606.
    # Pixels 1 and 2 have no positive.
    x = pixels([1, 0], [0, 1], [1, 1])
    x_prime = pixels([1, 0], [0, 1], [-1, 0])
    positives = torch.tensor([[[True, True, False], [False] * 3, [False] * 3]])
    assert pixcontrast_loss(x, x_prime, positives, temperature=1).item() == pytest.approx(
        0.094344, abs=1e-6
    )


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
def test_eq2_equals_loops(temperature):
    x, x_prime = random_maps()
    positives = random_positives()  # some pixels and an image without any
    expected = slow_pixcontrast(x, x_prime, positives, temperature)
    assert pixcontrast_loss(x, x_prime, positives, temperature).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_eq2_temperature_is_0_3():
    x, x_prime = random_maps()
    positives = random_positives()
    assert pixcontrast_loss(x, x_prime, positives) == pixcontrast_loss(
        x, x_prime, positives, temperature=0.3
    )


def test_eq2_leaves_out_pixels_and_images_without_positives():
    x, x_prime = random_maps()
    positives = random_positives()
    alone = pixcontrast_loss(x[:2], x_prime[:2], positives[:2])  # the third image has none
    assert torch.allclose(pixcontrast_loss(x, x_prime, positives), alone)
    changed = x.clone()
    changed[0, :, 0, 0] = 100.0  # the first pixel of the first image has none
    assert torch.equal(
        pixcontrast_loss(changed, x_prime, positives), pixcontrast_loss(x, x_prime, positives)
    )


def test_eq2_without_any_positive_is_0_with_gradient_0():
    x, x_prime = random_maps()
    x.requires_grad_()
    loss = pixcontrast_loss(x, x_prime, torch.zeros(3, 6, 6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_eq2_gradient_is_finite_where_some_have_no_positive():
    x, x_prime = random_maps()
    x.requires_grad_()
    positives = random_positives()
    pixcontrast_loss(x, x_prime, positives).backward()
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad.flatten(2).any(1), positives.any(2)) and not positives.any(2).all()


def test_eq2_all_positive_is_0():
    x, x_prime = random_maps()
    assert pixcontrast_loss(
        x, x_prime, torch.ones(3, 6, 6, dtype=torch.bool)
    ).item() == pytest.approx(0, abs=1e-6)


def test_eq2_does_not_overflow_in_half_precision():
    # cos / tau = 1 / 0.002 = 500: e^500 overflows even float32. 700^2 = 490,000 overflows float16
    # (65,504).
    x = 700 * pixels([1, 0], [0, 1]).half()
    with torch.autocast("cpu", torch.float16):
        loss = pixcontrast_loss(
            x, x, torch.tensor([[[False, True], [True, False]]]), temperature=0.002
        )
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(500, rel=1e-3)


def test_eq2_target_receives_no_gradient():
    x, x_prime = random_maps()
    x.requires_grad_(), x_prime.requires_grad_()
    pixcontrast_loss(x, x_prime, random_positives()).backward()
    assert x.grad is not None and x_prime.grad is None


def test_eq2_gradcheck():
    x, x_prime = random_maps(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: pixcontrast_loss(x, x_prime, random_positives()), x.requires_grad_()
    )


def test_eq2_refuses_what_does_not_fit():
    x, x_prime = random_maps()
    with pytest.raises(ValueError, match="temperature > 0, found 0"):
        pixcontrast_loss(x, x_prime, random_positives(), temperature=0)
    with pytest.raises(
        ValueError, match=r"expected positives \[3, 6, 6\] for the maps, found \[3, 5, 6\]"
    ):
        pixcontrast_loss(x, x_prime, random_positives(pairs=(5, 6)))
    with pytest.raises(TypeError, match="torch.bool, found torch.float32"):
        pixcontrast_loss(x, x_prime, random_positives().float())


# ------------------------------------ Eq. 3 and 4 ------------------------------------
def test_eq3_by_hand():
    # Pixels (1,0), (0,1), (1,1); g the identity: g(x_j) / |g(x_j)| = (1,0), (0,1), (r,r) with r =
    # 0.707107. gamma = 2: s = r^2 = 0.5 between the third and the others, 0 between the first two.
    # No denominator: y_0 = (1,0) + 0.5 (r,r) = (1.353553, 0.353553), y_1 likewise, y_2 = 0.5 (1,0)
    # + 0.5 (0,1) + (r,r) = (1.207107, 1.207107).
    y = PixelPropagation(dim=2, gamma=2, num_layers=0)(pixels([1, 0], [0, 1], [1, 1]))
    expected = pixels([1.353553, 0.353553], [0.353553, 1.353553], [1.207107, 1.207107])
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize("gamma", [0.5, 1, 2, 4])
def test_eq3_equals_loops(gamma, num_layers):
    torch.manual_seed(0)
    ppm = PixelPropagation(dim=5, gamma=gamma, num_layers=num_layers)
    x = random_maps(n=2)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            ppm(x), slow_propagation(x, ppm.transform(x), gamma), atol=1e-5, rtol=0
        )


def test_eq3_transform_has_l_layers():
    kinds = {
        n: [type(layer).__name__ for layer in PixelPropagation(4, num_layers=n).transform]
        for n in range(4)
    }
    assert kinds[0] == []
    assert kinds[1] == ["Conv2d"]
    assert kinds[2] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert kinds[3] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["Conv2d"]
    assert all(
        p.shape[:2] == (4, 4)
        for p in PixelPropagation(4, num_layers=3).parameters()
        if p.dim() == 4
    )


def authors_propagation(gamma, num_layers):
    ppm = PixelPropagation(256, gamma, num_layers)
    with torch.no_grad():
        for conv in ppm.transform:
            conv.weight.copy_(wave(256, 256, 1, 1, a=0.07) / 16)
            conv.bias.copy_(0.01 * wave(256, a=0.19))
        return ppm(wave(2, 256, 3, 5, a=0.23))


def test_eq3_authors_numbers():
    y = authors_propagation(gamma=2.0, num_layers=1)
    assert y.double().sum().item() == pytest.approx(10.614669, abs=1e-3)
    assert y.double().abs().sum().item() == pytest.approx(1277.442658, abs=1e-3)
    assert y[1, 17, 2, 3].item() == pytest.approx(-0.1296858788, abs=1e-6)
    assert y[0, 255, 0, 0].item() == pytest.approx(0.0937332809, abs=1e-6)


def test_eq3_self_counts():
    ppm = PixelPropagation(dim=5, num_layers=0)
    x = random_maps(h=1, w=1)[0]
    assert torch.allclose(ppm(x), F.normalize(x, dim=1))


def test_eq3_permuting_pixels_permutes_the_output():
    ppm = PixelPropagation(dim=5)
    x = random_maps(h=1, w=6)[0]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(ppm(x[..., order]), ppm(x)[..., order], atol=1e-6)


def test_eq3_scaling_changes_nothing_without_layers():
    ppm = PixelPropagation(dim=5, num_layers=0)
    x = random_maps()[0]
    assert torch.allclose(ppm(7 * x), ppm(x), atol=1e-6)


def test_eq3_gradient_flows_through_g():
    x = random_maps(h=1, w=1)[
        0
    ].requires_grad_()  # one pixel: s = cos(x, x)^gamma = 1, whatever x is
    PixelPropagation(dim=5)(x)[:, 0].sum().backward()
    assert x.grad.abs().max() > 1e-3


def test_eq3_images_do_not_mix():
    ppm = PixelPropagation(dim=5)
    x = random_maps()[0]
    assert torch.allclose(ppm(x)[1:2], ppm(x[1:2]), atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_eq3_gradcheck(gamma):
    ppm = PixelPropagation(dim=5, gamma=gamma).double()
    x = random_maps(n=2, dtype=torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(ppm, x)


def test_eq3_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[N, 8, H, W\], found \[3, 5, 2, 3\]"):
        PixelPropagation(dim=8, num_layers=0)(random_maps()[0])
    with pytest.raises(ValueError, match="num_layers >= 0, found 2.0, -1"):
        PixelPropagation(num_layers=-1)


def similarity_at(angle, gamma):
    """s of two unit pixels at this angle in degrees, read off y_0 = (1, 0) + s (cos, sin)."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    y = PixelPropagation(dim=2, gamma=gamma, num_layers=0)(pixels([1, 0], [c, s]))
    return y[0, 1, 0, 0].item() / s


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 4])
def test_eq4_by_hand(gamma):
    # cos 60 degrees = 0.5: s = 0.5^gamma = 0.707107, 0.5, 0.25, 0.0625
    expected = {0.5: 0.707107, 1: 0.5, 2: 0.25, 4: 0.0625}[gamma]
    assert similarity_at(60, gamma) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 4])
def test_eq4_equals_the_formula(gamma):
    for angle in (10, 45, 80, 100, 170):
        expected = max(math.cos(math.radians(angle)), 0) ** gamma
        assert similarity_at(angle, gamma) == pytest.approx(expected, abs=1e-5)


def test_eq4_authors_numbers():
    y = authors_propagation(gamma=1.0, num_layers=0)
    assert y.double().sum().item() == pytest.approx(9.232201, abs=1e-3)
    assert y.double().abs().sum().item() == pytest.approx(1713.817161, abs=1e-3)
    assert y[1, 17, 2, 3].item() == pytest.approx(-0.3988923430, abs=1e-6)
    assert y[0, 255, 0, 0].item() == pytest.approx(-0.3339273342, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("other", [[-1, 0], [0, 1]], ids=["opposite", "orthogonal"])
def test_eq4_is_exactly_0_with_finite_gradients(gamma, other):
    x = pixels([1, 0], other).requires_grad_()
    y = PixelPropagation(dim=2, gamma=gamma, num_layers=0)(x)
    assert torch.equal(y, pixels([1, 0], other))  # nothing propagates
    y.square().sum().backward()
    assert x.grad.isfinite().all()


def test_eq4_gradient_flows_through_s():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    ppm = PixelPropagation(dim=5)
    ppm.transform = Constant()
    x = random_maps()[0].requires_grad_()
    ppm(x)[:, 0].sum().backward()
    assert x.grad.abs().max() > 1e-3


def test_eq4_refuses_gamma_0():
    with pytest.raises(ValueError, match="gamma > 0"):
        PixelPropagation(gamma=0)


# ------------------------------------ Eq. 5 ------------------------------------
def test_eq5_by_hand():
    # y = (3,0), (0,2); x' = (1,0), (1,1). Positives (0,0), (0,1), (1,1): cosines 1, 0.707107,
    # 0.707107; mean 0.804738.
    positives = torch.tensor([[[True, True], [False, True]]])
    loss = consistency_loss(pixels([3, 0], [0, 2]), pixels([1, 0], [1, 1]), positives)
    assert loss.item() == pytest.approx(-0.804738, abs=1e-6)


def test_eq5_equals_loops():
    y, x_prime = random_maps()
    positives = random_positives()
    assert consistency_loss(y, x_prime, positives).item() == pytest.approx(
        slow_consistency(y, x_prime, positives), rel=1e-5
    )


@pytest.mark.parametrize(
    "threshold, authors", [(0.35, 0.0196905155), (0.7, 0.0099607334), (1.4, 0.0051517664)]
)
def test_eq5_authors_numbers(threshold, authors):
    # Theirs is twice Eq. 5, and counts the fourth image, which has no positive pair, as 0.
    q, k = wave(4, 8, 7, 7, a=0.37), wave(4, 8, 7, 7, a=0.53, b=0.5)
    positives = slow_positive_pairs(AUTHORS_BOX_1, AUTHORS_BOX_2, (7, 7), threshold)
    assert 2 * consistency_loss(q, k, positives).item() * 3 / 4 == pytest.approx(authors, abs=1e-7)


def test_eq5_authors_numbers_image_by_image():
    q, k = wave(4, 8, 7, 7, a=0.37), wave(4, 8, 7, 7, a=0.53, b=0.5)
    positives = slow_positive_pairs(AUTHORS_BOX_1, AUTHORS_BOX_2, (7, 7), 0.7)
    for n, authors in enumerate([0.0378808081, -0.0101784933, 0.0121406186, 0.0]):
        one = slice(n, n + 1)
        assert 2 * consistency_loss(q[one], k[one], positives[one]).item() == pytest.approx(
            authors, abs=1e-7
        )


def test_eq5_equal_and_opposite_features():
    y = random_maps()[0][:, :, :1, :1].expand(-1, -1, 2, 3)
    positives = random_positives()
    assert consistency_loss(y, y, positives).item() == pytest.approx(-1)
    assert consistency_loss(y, -y, positives).item() == pytest.approx(1)


def test_eq5_scale_does_not_matter():
    y, x_prime = random_maps()
    loss = consistency_loss(y, x_prime, random_positives())
    assert torch.allclose(consistency_loss(9 * y, 0.1 * x_prime, random_positives()), loss)


def test_eq5_mean_per_image_then_over_images():
    # Image 0 has three positive pairs of cosine 1, image 1 one of cosine 0: (1 + 0) / 2, not 3 / 4.
    y = torch.cat([pixels([1, 0], [1, 0]), pixels([0, 1], [0, 1])])
    x_prime = torch.cat([pixels([1, 0], [1, 0]), pixels([1, 0], [1, 0])])
    positives = torch.tensor([[[True, True], [True, False]], [[False, False], [False, True]]])
    assert consistency_loss(y, x_prime, positives).item() == pytest.approx(-0.5)


def test_eq5_leaves_out_images_without_positives():
    y, x_prime = random_maps()
    positives = random_positives()  # the third image has none
    assert torch.allclose(
        consistency_loss(y, x_prime, positives), consistency_loss(y[:2], x_prime[:2], positives[:2])
    )


def test_eq5_without_any_positive_is_0_with_gradient_0():
    y, x_prime = random_maps()
    y.requires_grad_()
    loss = consistency_loss(y, x_prime, torch.zeros(3, 6, 6, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and torch.equal(y.grad, torch.zeros_like(y))


def test_eq5_target_receives_no_gradient():
    y, x_prime = random_maps()
    y.requires_grad_(), x_prime.requires_grad_()
    consistency_loss(y, x_prime, random_positives()).backward()
    assert y.grad is not None and x_prime.grad is None


def test_eq5_gradcheck():
    y, x_prime = random_maps(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda y: consistency_loss(y, x_prime, random_positives()), y.requires_grad_()
    )


def test_eq5_refuses_what_does_not_fit():
    y, x_prime = random_maps()
    with pytest.raises(ValueError, match=r"found \[3, 5, 2, 3\], \[2, 5, 2, 3\]"):
        consistency_loss(y, x_prime[:2], random_positives())
    with pytest.raises(TypeError, match="torch.bool"):
        consistency_loss(y, x_prime, random_positives().float())


# ------------------------------ PixPro on a small backbone ------------------------------
class SmallBackbone(nn.Module):
    """A hand-made network: PixPro needs nothing but a map and out_channels."""

    def __init__(self, channels=3):
        super().__init__()
        self.out_channels = 8
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, image):
        return self.body(image)


def small_pixpro(seed=0, **options):
    torch.manual_seed(seed)
    return PixPro(SmallBackbone(), dim=6, hidden_dim=10, **options)


def small_batch(n=4, seed=0, height=12, width=16):
    generator = torch.Generator().manual_seed(seed)
    view_1, view_2 = torch.randn(2, n, 3, height, width, generator=generator)
    return view_1, view_2, random_boxes(n, seed=1), random_boxes(n, seed=1) + 5


@pytest.fixture
def plain_pixel_equations(monkeypatch):
    """Trivial stand-ins for Eq. 1 to 5, to test how PixPro connects its parts, whatever state the
    equations are in.
    """

    def everything(box_1, box_2, size, threshold):
        return torch.ones(len(box_1), size.numel(), size.numel(), dtype=torch.bool)

    def product(x, x_prime, *rest):
        return -(x * x_prime.detach()).mean()

    class Plain(nn.Module):
        def __init__(self, dim, gamma, num_layers):
            super().__init__()
            self.transform = nn.Conv2d(dim, dim, 1)

        def forward(self, x):
            return x + self.transform(x)

    monkeypatch.setattr(pixpro, "positive_pairs", everything)
    monkeypatch.setattr(pixpro, "PixelPropagation", Plain)
    monkeypatch.setattr(pixpro, "consistency_loss", product)
    monkeypatch.setattr(pixpro, "pixcontrast_loss", product)


@pytest.fixture
def plain_equations(plain_pixel_equations, monkeypatch):
    monkeypatch.setattr(pixpro, "instance_loss", lambda p, z_prime: -(p * z_prime.detach()).mean())


# ------------------------------------ Eq. 6 ------------------------------------
def test_eq6_instance_loss_by_hand():
    # cosines of (3,4) with (1,0): 0.6; of (0,2) with (0,5): 1. Mean 0.8.
    assert instance_loss(tensor([3, 4], [0, 2]), tensor([1, 0], [0, 5])).item() == pytest.approx(
        -0.8
    )


def test_eq6_instance_loss_of_one_hot_vectors():
    eye = torch.eye(4)
    assert instance_loss(eye, eye).item() == -1
    assert instance_loss(eye, -eye).item() == 1
    assert instance_loss(eye, eye.roll(1, 0)).item() == 0
    assert instance_loss(eye, eye[[0, 1, 3, 2]]).item() == -0.5


def test_eq6_instance_loss_equals_loops():
    p, z_prime = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = -sum(cosine(a, b) for a, b in zip(p, z_prime)) / 5
    assert instance_loss(p, z_prime).item() == pytest.approx(expected, rel=1e-5)


def test_eq6_target_receives_no_gradient():
    p, z_prime = torch.randn(2, 5, 7).unbind()
    p.requires_grad_(), z_prime.requires_grad_()
    instance_loss(p, z_prime).backward()
    assert p.grad is not None and z_prime.grad is None


def test_eq6_without_weight_is_exactly_pixpro(plain_pixel_equations):
    model = small_pixpro(instance_weight=0.0)
    assert not any("instance" in name for name, _ in model.named_parameters())
    loss = model(*small_batch()).loss
    model = small_pixpro(instance_weight=0.5)  # the same weights: its extra heads are made last
    model.instance_weight = 0.0
    assert torch.equal(model(*small_batch()).loss, loss)


def test_eq6_adds_alpha_times_the_instance_loss(plain_pixel_equations):
    # One-hot pooled vectors, equal in both views: each direction gives -1, so Eq. 6 is the pixel
    # loss - 2 alpha.
    for alpha in (0.5, 1.0):
        model = small_pixpro(instance_weight=alpha)

        class OneHot(nn.Module):
            def forward(self, x):
                return torch.eye(6)[: len(x), :, None, None].expand(-1, -1, 3, 4)

        for name in ("instance_projector", "instance_predictor", "momentum_instance_projector"):
            setattr(model, name, OneHot())
        total = model(*small_batch()).loss
        model.instance_weight = 0.0
        assert (total - model(*small_batch()).loss).item() == pytest.approx(-2 * alpha, abs=1e-6)


def test_eq6_branch_in_the_authors_order(plain_pixel_equations):
    # projector, predictor, pooling, cosine; targets from the momentum branch of the other view
    model = small_pixpro(instance_weight=1.0)
    for p in model.momentum_instance_projector.parameters():
        nn.init.normal_(p)  # now online and momentum differ
    view_1, view_2, *boxes = small_batch()
    with torch.no_grad():
        difference = model(view_1, view_2, *boxes).loss
        model.instance_weight = 0.0
        difference = difference - model(view_1, view_2, *boxes).loss
        p = [
            model.instance_predictor(model.instance_projector(model.backbone(v))).mean((2, 3))
            for v in (view_1, view_2)
        ]
        z = [
            model.momentum_instance_projector(model.momentum_backbone(v)).mean((2, 3))
            for v in (view_1, view_2)
        ]
    expected = instance_loss(p[0], z[1]) + instance_loss(p[1], z[0])
    assert difference.item() == pytest.approx(expected.item(), abs=1e-5)


def test_eq6_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"found \[2, 3\] and \[2, 4\]"):
        instance_loss(torch.ones(2, 3), torch.ones(2, 4))


# ------------------------------------ Momentum encoder ------------------------------------
def test_momentum_at_authors_numbers():
    authors = {
        0: 0.99,
        1: 0.9900024671981713,
        25: 0.9914644660940672,
        50: 0.995,
        99: 0.9999975328018287,
    }
    for step, m in authors.items():
        assert momentum_at(step, 100) == pytest.approx(m, abs=1e-12)


def test_momentum_at_rises_from_base_to_1():
    assert momentum_at(0, 7, base=0.9) == pytest.approx(0.9) and momentum_at(7, 7) == 1
    values = [momentum_at(step, 50) for step in range(51)]
    assert values == sorted(values)
    for step, total in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(ValueError, match=f"total_steps >= 1, found {step}, {total}"):
            momentum_at(step, total)


def momentum_pairs(model):
    yield from zip(model.momentum_backbone.parameters(), model.backbone.parameters())
    yield from zip(model.momentum_projector.parameters(), model.projector.parameters())
    yield from zip(
        model.momentum_instance_projector.parameters(), model.instance_projector.parameters()
    )


def test_momentum_update_is_the_convex_combination(plain_equations):
    model = small_pixpro(instance_weight=1.0)
    assert all(
        torch.equal(target, online) for target, online in momentum_pairs(model)
    )  # equal at the start
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    before = [(target.clone(), online.clone()) for target, online in momentum_pairs(model)]
    model.update_momentum(0.9)
    for (target, online), (old, old_online) in zip(momentum_pairs(model), before):
        assert torch.allclose(target, 0.9 * old + 0.1 * old_online, atol=1e-6)
        assert torch.equal(online, old_online)
    model.update_momentum(0)
    assert all(torch.equal(target, online) for target, online in momentum_pairs(model))
    kept = [target.clone() for target, _ in momentum_pairs(model)]
    model.update_momentum(1)
    assert all(torch.equal(target, old) for (target, _), old in zip(momentum_pairs(model), kept))


def test_momentum_update_changes_nothing_at_the_first_step(plain_equations):
    model = small_pixpro()
    before = [p.clone() for p in model.parameters()]
    model.update_momentum(momentum_at(0, 10))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_momentum_leaves_batchnorm_buffers_alone(plain_equations):
    model = small_pixpro()
    with torch.no_grad():
        for buffer in model.backbone.buffers():
            buffer.fill_(5)
    before = [buffer.clone() for buffer in model.momentum_backbone.buffers()]
    model.update_momentum(0.5)
    assert all(
        torch.equal(buffer, old) for buffer, old in zip(model.momentum_backbone.buffers(), before)
    )
    model(*small_batch())  # in train mode it keeps statistics of its own
    assert not torch.equal(model.momentum_backbone.body[1].running_mean, before[0])


def test_momentum_weights_make_the_target(plain_equations):
    model = small_pixpro(instance_weight=1.0)
    for name in ("momentum_backbone", "momentum_projector", "momentum_instance_projector"):
        before = model(*small_batch()).loss.item()
        with torch.no_grad():
            next(getattr(model, name).parameters()).mul_(-2)
        assert abs(model(*small_batch()).loss.item() - before) > 1e-5, f"{name} is not used"


def test_momentum_path_never_calls_online_modules(plain_equations):
    model = small_pixpro(instance_weight=1.0)
    calls = {name: [] for name, _ in model.named_children()}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, inputs, out, name=name: calls[name].append(out.requires_grad)
        )
    model(*small_batch())
    for name, gradients in calls.items():
        assert gradients == [not name.startswith("momentum")] * 2, (
            name
        )  # both views; gradient for online modules alone


def test_momentum_receives_no_gradient(plain_equations):
    model = small_pixpro(instance_weight=1.0)
    model(*small_batch()).loss.backward()
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith("momentum"), name
        assert (p.grad is None) == name.startswith("momentum"), name


def test_momentum_moves_every_module_that_is_named_so(plain_equations):
    model = small_pixpro(instance_weight=1.0)
    modules = [name for name, _ in model.named_children() if name.startswith("momentum_")]
    assert len(modules) == 3
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    before = copy.deepcopy(model)
    model.update_momentum(0.5)
    for name in modules:
        own = zip(getattr(model, name).parameters(), getattr(before, name).parameters())
        assert all(not torch.equal(p, old) for p, old in own), name


def test_momentum_ema_update_by_hand():
    online, momentum = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, weight, bias in ((online, 1.0, 10.0), (momentum, 3.0, 20.0)):
        nn.init.constant_(module.weight, weight)
        nn.init.constant_(module.bias, bias)
    ema_update(online, momentum, 0.9)  # 0.9 * 3 + 0.1 * 1 and 0.9 * 20 + 0.1 * 10
    assert momentum.weight.item() == pytest.approx(2.8) and momentum.bias.item() == pytest.approx(
        19
    )
    assert online.weight.item() == 1 and online.bias.item() == 10
    with pytest.raises(ValueError):  # modules of another structure
        ema_update(nn.Linear(1, 1, bias=False), momentum, 0.9)


def test_momentum_refuses_values_out_of_range(plain_equations):
    for m in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"m in \[0, 1\]"):
            small_pixpro().update_momentum(m)


# ------------------------------------ Two views ------------------------------------
def coordinates_image(height, width):
    """Red is the column, green is the row of each pixel."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).to(torch.uint8)


def pairs_of(result):
    view_1, view_2, box_1, box_2 = result
    return [(view_1, box_1), (view_2, box_2)]


@pytest.mark.parametrize("height, width", [(200, 250), (250, 120)])
def test_views_show_what_their_boxes_bound(height, width):
    views = TwoViews(size=56)
    views.colour_1 = views.colour_2 = v2.ToDtype(torch.float32)  # colours off
    torch.manual_seed(0)
    mirrored = 0
    for _ in range(20):
        for view, box in pairs_of(views(coordinates_image(height, width))):
            x0, y0, x1, y1 = box.tolist()
            mirrored += x0 > x1
            step_x, step_y = (
                (x1 - x0) / 56,
                (y1 - y0) / 56,
            )  # pixels of the image per pixel of the view
            cells = torch.arange(56) + 0.5
            # The pixel at coordinate p has its centre at p + 0.5; the resize averages over its
            # support at the edges.
            support_x, support_y = max(1, abs(step_x)) + 1, max(1, abs(step_y)) + 1
            assert (view[0] - (x0 + step_x * cells - 0.5)[None, :]).abs().max() <= support_x
            assert (view[1] - (y0 + step_y * cells - 0.5)[:, None]).abs().max() <= support_y
            inner = slice(
                3, -3
            )  # away from the edges the support is symmetric: only rounding is left
            assert (view[0] - (x0 + step_x * cells - 0.5)[None, :])[inner, inner].abs().max() <= 1
            assert (view[1] - (y0 + step_y * cells - 0.5)[:, None])[inner, inner].abs().max() <= 1
    assert 8 <= mirrored <= 32  # of 40


def test_views_have_the_promised_form():
    torch.manual_seed(0)
    view_1, view_2, box_1, box_2 = TwoViews(size=32)(
        torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    )
    for view, box in ((view_1, box_1), (view_2, box_2)):
        assert view.shape == (3, 32, 32) and view.dtype == torch.float32
        assert box.shape == (4,) and box.dtype == torch.float32
    assert not torch.equal(box_1, box_2)


def test_views_are_cropped_by_scale_and_ratio():
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    boxes = torch.stack([TwoViews(size=8, scale=(0.2, 0.5)).crop(image)[1] for _ in range(300)])
    width, height = (boxes[:, 2] - boxes[:, 0]).abs(), boxes[:, 3] - boxes[:, 1]
    share = width * height / (300 * 400)
    assert 0.19 < share.min() < 0.25 and 0.45 < share.max() < 0.51
    assert 0.74 < (width / height).min() < 0.8 and 1.25 < (width / height).max() < 1.35
    assert TwoViews().scale == (0.08, 1.0) and TwoViews().size == 224


def test_views_of_which_only_the_second_is_solarised():
    # Of a white image no other change makes anything dark: brightness keeps at least 0.6.
    # Solarised, white is black.
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    dark = [0, 0]
    for _ in range(200):
        for index, (view, _) in enumerate(pairs_of(TwoViews(size=16)(white))):
            value = (
                view * torch.tensor(pixpro.STD)[:, None, None]
                + torch.tensor(pixpro.MEAN)[:, None, None]
            )
            dark[index] += bool(value.mean() < 0.5)
    assert dark[0] == 0 and 20 <= dark[1] <= 62  # 200 x 0.2 = 40, +- 4 standard deviations of 5.7


def test_views_of_which_the_first_is_always_blurred():
    noise = torch.randint(
        0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    views = TwoViews(size=64, scale=(1.0, 1.0))
    torch.manual_seed(0)
    rough = torch.tensor(
        [
            [view.diff(dim=2).std() / view.std() for view, _ in pairs_of(views(noise))]
            for _ in range(100)
        ]
    )
    # Neighbours in white noise differ by 1.41 standard deviations, by less than 1 when blurred with
    # sigma > 0.6: 74% of U(0.1, 2). The second view is blurred in 1 of 10.
    assert (rough[:, 0] < 1).float().mean() > 0.6 and (rough[:, 1] < 1).float().mean() < 0.2


def test_views_blur_is_gaussian():
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    torch.manual_seed(0)
    sigma = torch.empty(()).uniform_(0.1, 2.0).item()
    torch.manual_seed(0)
    blurred = pixpro.random_blur(point)[0]
    distance = torch.arange(41) - 20.0
    assert blurred.sum().item() == pytest.approx(1, abs=1e-4)
    for axis in (0, 1):
        variance = (blurred.sum(axis) * distance**2).sum().item()
        assert sigma > 1 and variance == pytest.approx(sigma**2, rel=0.05)  # cut at 3 sigma


class PilViews:
    """The same operations with PIL alone, for comparison; not the same random numbers."""

    def __init__(self, size):
        def blur(image):
            return image.filter(
                PIL.ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2).item())
            )

        def colour(p_blur, p_solarize):
            return v2.Compose(
                [
                    v2.RandomResizedCrop(size, (0.08, 1)),
                    v2.RandomHorizontalFlip(),
                    v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                    v2.RandomGrayscale(0.2),
                    v2.RandomApply([blur], p_blur),
                    v2.RandomSolarize(128, p_solarize),
                    v2.PILToTensor(),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.Normalize(pixpro.MEAN, pixpro.STD),
                ]
            )

        self.colour_1, self.colour_2 = colour(1.0, 0.0), colour(0.1, 0.2)

    def __call__(self, image):
        return self.colour_1(image), self.colour_2(image)


def test_views_hue_is_shifted_as_in_torchvision():
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    image[:, :10] = image[:1, :10]  # gray has no hue
    image[0, 10:20] = image[1, 10:20]  # two largest channels that are equal
    for seed in range(20):
        torch.manual_seed(seed)
        shifted = pixpro.random_hue(image)
        torch.manual_seed(seed)
        shift = torch.empty(()).uniform_(-0.6, 0.6).item() / 6
        assert torch.allclose(shifted, v2.functional.adjust_hue(image, shift), atol=3e-6)
        assert not torch.allclose(shifted[:, 20:], image[:, 20:], atol=1e-3) or abs(shift) < 0.005


def test_views_have_the_statistics_of_the_same_operations_in_pil():
    # Mean, deviation, saturation and roughness of 400 views of each kind, within four standard
    # errors of PIL's.
    images = [v2.functional.to_pil_image(image) for image in train.Scenes(8, size=96).images]
    for index in (0, 1):
        both = []
        for make in (TwoViews(size=48), PilViews(size=48)):
            torch.manual_seed(index)
            views = torch.stack(
                [make(images[k % 8])[index] for k in range(400)]
            )  # [400, 3, 48, 48]
            colour = views * torch.tensor(pixpro.STD)[:, None, None]
            figures = [
                views.mean((2, 3)),
                views.std((2, 3)),
                (colour.amax(1) - colour.amin(1)).mean((1, 2))[:, None],
            ]
            figures += [views.diff(dim=dim).abs().mean((1, 2, 3))[:, None] for dim in (2, 3)]
            both.append(torch.cat(figures, 1))  # [400, 9]
        ours, pil = both
        error = ((ours.var(0) + pil.var(0)) / 400).sqrt()
        assert ((ours.mean(0) - pil.mean(0)).abs() < 4 * error).all()
        assert (error < 0.1 * pil.mean(0).abs() + 0.1).all()  # small enough to mean something


def test_views_are_normalised():
    gray = torch.full((3, 20, 20), 128, dtype=torch.uint8)
    view = v2.Compose(TwoViews().colour_1.transforms[:1] + TwoViews().colour_1.transforms[-1:])(
        gray
    )
    expected = [
        (128 / 255 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ]
    assert view[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_views_follow_the_seed_and_take_pil_images():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    results = []
    for form in (image, image, v2.functional.to_pil_image(image)):
        torch.manual_seed(5)
        results.append(TwoViews(size=24)(form))
    for first, second, third in zip(*results):
        assert torch.equal(first, second) and torch.equal(first, third)
    gray = v2.functional.to_pil_image(image[:1])
    assert TwoViews(size=24)(gray)[0].shape == (3, 24, 24)


def test_views_refuse_what_does_not_fit():
    with pytest.raises(TypeError, match="found torch.float32"):
        TwoViews()(torch.zeros(3, 20, 20))
    with pytest.raises(TypeError, match="found <class 'str'>"):
        TwoViews()("image.jpg")
    with pytest.raises(ValueError, match=r"expected an RGB image \[3, h, w\], found \[1, 20, 20\]"):
        TwoViews()(torch.zeros(1, 20, 20, dtype=torch.uint8))


# ------------------------------ LARS and the learning rate ------------------------------
def lars_steps(optimizer_class=train.LARS, **options):
    """The authors' three steps on a matrix, a vector and a matrix of zeros."""
    w, b, z = (nn.Parameter(p) for p in (wave(5, 7, a=0.9), wave(7, a=0.4), torch.zeros(3, 3)))
    optimizer = optimizer_class([w, b, z], lr=0.3, **options)
    for t in range(3):
        w.grad, b.grad = wave(5, 7, a=0.31, b=t), wave(7, a=0.71, b=t)
        z.grad = torch.full((3, 3), float(t > 0))
        optimizer.step()
    return w, b, z


def test_lars_authors_numbers():
    w, b, z = lars_steps(momentum=0.9, weight_decay=1e-2)
    first = [0.7822871804, 0.9352322221, 0.1264628023, -0.8391467333, -0.8408296704, 0.1752143502]
    bias = [
        -0.8305042386,
        -0.2755451798,
        0.8271970153,
        1.8314388990,
        1.9535747766,
        0.9095216990,
        -0.7446691990,
    ]
    assert w.flatten()[:6].tolist() == pytest.approx(first, abs=1e-6)
    assert b.tolist() == pytest.approx(bias, abs=1e-6)
    assert z[0, 0].item() == pytest.approx(-0.5700899959, abs=1e-6)


def test_lars_equals_the_formula():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    expected, velocity = p.detach().clone(), torch.zeros_like(p)
    optimizer = train.LARS([p], lr=0.2)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        g = p.grad + 1e-5 * expected
        g = g * 1e-3 * expected.norm() / (g.norm() + 1e-8)
        velocity = 0.9 * velocity + g
        expected = expected - 0.2 * velocity
        optimizer.step()
        assert torch.allclose(p, expected, atol=1e-12)


def test_lars_treats_vectors_like_plain_sgd():
    b = lars_steps(weight_decay=1.0)[1]
    plain = lars_steps(torch.optim.SGD, momentum=0.9)[1]
    assert torch.equal(b, plain)


def test_lars_step_size_does_not_depend_on_the_scale_of_the_gradient():
    moved = []
    for scale in (1, 1000):
        p = nn.Parameter(torch.ones(3, 3))
        p.grad = scale * torch.eye(3)
        train.LARS([p], lr=1.0, weight_decay=0).step()
        moved.append((p - 1).norm().item())
    assert moved == pytest.approx([3e-3, 3e-3], rel=1e-4)  # trust coefficient x |p|


def test_lars_skips_parameters_without_gradient_and_takes_a_closure():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = train.LARS([used, unused], lr=1.0)
    optimizer.step()  # none has one

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert (used < 1).all() and (unused == 1).all()


def test_lars_groups_have_options_of_their_own():
    """Each option of a group acts, is saved, and is shown: the same as an optimizer of its own."""
    defaults = inspect.signature(train.LARS).parameters
    names = [name for name in defaults if name not in ("params", "lr")]
    assert names == ["momentum", "weight_decay", "trust_coefficient", "eps"]
    other = {"momentum": 0.5, "weight_decay": 0.3, "trust_coefficient": 0.1, "eps": 1.0}
    for name, value in other.items():
        p, q, plain = (nn.Parameter(torch.ones(3, 3)) for _ in range(3))
        together = train.LARS([{"params": [p]}, {"params": [q], name: value}], lr=0.5)
        alone = train.LARS([plain], lr=0.5, **{name: value})
        assert together.state_dict()["param_groups"][1][name] == value
        for step in range(2):
            for parameter in (p, q, plain):
                parameter.grad = torch.eye(3) + step
            together.step()
            alone.step()
        assert torch.equal(q, plain) and not torch.allclose(q, p, atol=1e-6), name


def test_lars_continues_from_its_state():
    torch.manual_seed(0)
    gradients = torch.randn(4, 3, 3)
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = train.LARS([p], lr=0.5)
    for k in range(4):
        if k == 2:
            q.data.copy_(p.data)
            other = train.LARS([q], lr=0.5)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        p.grad = gradients[k].clone()
        optimizer.step()
        if k >= 2:
            q.grad = gradients[k].clone()
            other.step()
    assert torch.equal(p, q)


def test_schedule_authors_numbers():
    authors = {0: 0.04, 1: 0.1192, 25: 2.02, 49: 3.9208, 50: 4.0, 51: 3.999561367059349}
    authors |= {100: 3.0000002500000003, 150: 1.0000007499999994, 199: 0.0004396329406507382}
    for step, lr in authors.items():
        assert train.lr_at(step, total_steps=200, warmup_steps=50, peak=4.0) == pytest.approx(
            lr, abs=1e-12
        )


def test_schedule_ends_at_the_floor_and_never_leaves_its_range():
    assert train.lr_at(80, 80, 10, peak=2.0, floor=0.5) == pytest.approx(0.5)
    rates = [train.lr_at(step, 80, 10, peak=2.0) for step in range(81)]
    assert max(rates) == rates[10] == 2.0 and rates == sorted(rates[:11]) + sorted(
        rates[11:], reverse=True
    )


def test_schedule_without_warmup_and_all_warmup():
    assert train.lr_at(0, 10, 0, peak=1.0) == 1.0
    assert train.lr_at(9, 10, 10, peak=1.0) == pytest.approx(0.01 + 0.99 * 0.9)
    assert train.lr_at(9, 10, 30, peak=1.0) == pytest.approx(0.01 + 0.99 * 0.3)


# ------------------------------------ Training runs ------------------------------------
@pytest.fixture
def photographs(tmp_path):
    """A folder of twelve small images in subfolders, of several formats."""
    folder = tmp_path / "photographs"
    for number in range(12):
        image = torch.randint(
            0, 256, (3, 40, 30 + number), generator=torch.Generator().manual_seed(number)
        )
        path = folder / f"kind {number % 3}" / f"{number}.{['png', 'jpg', 'bmp'][number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        v2.functional.to_pil_image(image.to(torch.uint8)).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / "._0.jpg").write_text("what another system leaves behind")
    return folder


SMALL = ["--arch", "resnet18", "--layer", "layer2", "--size", "32", "--batch", "4"]
SMALL += ["--hidden-dim", "32", "--amp", "off", "--device", "cpu", "--workers", "1"]


def run_main(out, *flags):
    train.main([*SMALL, "--out", str(out), *map(str, flags)])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_weights(a, b):
    one, two = (torch.load(out / "last.pt", weights_only=True)["model"] for out in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(train, "SCENES", 8)
    monkeypatch.setattr(train, "PROBE_SCENES", 6)


def test_train_on_scenes_writes_everything(few_scenes, tmp_path, capsys):
    run_main(tmp_path, "--steps", 12, "--lr", 1)
    printed = capsys.readouterr().out
    probes = re.findall(r"linear probe, mIoU (\d+\.\d): (.+)", printed)
    assert [name for _, name in probes] == [
        "random, as the recipe starts it",
        "random, with its residual blocks switched on",
        "pre-trained",
    ]
    assert len({miou for miou, _ in probes}) == 3 and "step 12/12" in printed
    records = metrics(tmp_path)
    assert [record["step"] for record in records] == [10, 12]
    assert set(records[0]) == {
        "step",
        "loss",
        "similarity",
        "positives",
        "spread",
        "lr",
        "m",
    }  # no wall-clock figures
    assert records[1]["m"] == momentum_at(11, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "backbone.pt",
        "features.png",
        "last.pt",
        "metrics.jsonl",
    ]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run_main(tmp_path, "--steps", 12, "--lr", 1)  # nothing is left to do
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    network = torchvision.models.resnet18(weights=None)
    missing, unexpected = network.load_state_dict(
        torch.load(tmp_path / "backbone.pt", weights_only=True), strict=False
    )
    assert not unexpected and {name.split(".")[0] for name in missing} == {"layer3", "layer4", "fc"}


def test_train_on_photographs(photographs, tmp_path, capsys):
    run_main(tmp_path / "out", "--data", photographs, "--steps", 2)
    assert (tmp_path / "out" / "features.png").exists() and metrics(tmp_path / "out")[-1][
        "step"
    ] == 2
    assert "probe" not in capsys.readouterr().out  # there are no masks


def test_train_with_heads(few_scenes, tmp_path):
    run_main(tmp_path, "--heads", "--size", 64, "--steps", 2)
    heads = Heads("resnet18")
    heads.load_state_dict(torch.load(tmp_path / "heads.pt", weights_only=True))
    model = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(w, model[f"backbone.{name}"]) for name, w in heads.state_dict().items())
    body = torch.load(tmp_path / "backbone.pt", weights_only=True)
    missing, unexpected = torchvision.models.resnet18(weights=None).load_state_dict(
        body, strict=False
    )
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


class Killed(Exception):
    pass


def run_killed_at(killed, monkeypatch, out, *flags):
    """A run that dies after this step and what follows it, its record and checkpoint."""

    def dying(step, total_steps):
        if step == killed:
            raise Killed
        return momentum_at(step, total_steps)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "momentum_at", dying)
        run_main(out, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--amp", "bf16", "--instance-weight", 1, "--num-layers", 2],
        ["--objective", "pixcontrast"],
    ],
)
def test_train_continues_bit_for_bit(photographs, tmp_path, monkeypatch, flags, capsys):
    monkeypatch.setattr(train, "RECORD_STEPS", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    flags = ["--data", photographs, "--steps", 6, "--lr", 1, *flags]
    run_main(tmp_path / "whole", *flags)
    run_killed_at(4, monkeypatch, tmp_path / "killed", *flags)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # what a kill in the middle of writing leaves
    run_main(tmp_path / "killed", *flags, "--workers", 2)
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (
        tmp_path / "killed" / "metrics.jsonl"
    ).read_bytes()
    run_main(tmp_path / "killed", *flags)
    assert "complete: 6 steps" in capsys.readouterr().out.splitlines()[-1]


def test_train_continues_without_metrics(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RECORD_STEPS", 1)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    run_killed_at(2, monkeypatch, tmp_path / "out", "--data", photographs, "--steps", 3)
    (tmp_path / "out" / "metrics.jsonl").unlink()
    run_main(tmp_path / "out", "--data", photographs, "--steps", 3)
    assert [record["step"] for record in metrics(tmp_path / "out")] == [3]


def gradients(height=40, width=60):
    """Red grows downward, green to the right, so that turning and scaling show: uint8 [height,
    width, 3].
    """
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y // height, 255 * x // width, 128 + 0 * x], 2).astype(np.uint8)


def test_train_reads_every_kind_of_image_as_what_it_shows(tmp_path, capfd):
    image = PIL.Image.fromarray(gradients())
    gray, rgb = image.convert("L"), np.asarray(image)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees
    sixteen = PIL.Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [image.rotate(180)]}
    kinds = {
        "gray.png": (gray, {}, np.asarray(gray.convert("RGB"))),
        "gray.jpg": (gray, {}, np.asarray(gray.convert("RGB"))),
        "palette.png": (image.quantize(256), {}, rgb),
        "alpha.png": (image.convert("RGBA"), {}, rgb),
        "cmyk.jpg": (image.convert("CMYK"), {}, rgb),
        "sixteen.png": (sixteen, {}, np.asarray(gray.convert("RGB"))),
        "sixteen.tif": (sixteen, {}, np.asarray(gray.convert("RGB"))),
        "turned.jpg": (image, {"exif": turned}, np.rot90(rgb, -1)),
        "frames.gif": (image, frames, rgb),
        "frames.webp": (image, frames | {"lossless": True}, rgb),
        "one pixel.png": (image.crop((0, 0, 1, 1)), {}, rgb[:1, :1]),
        "line.png": (image.resize((1, 4000)), {}, np.asarray(image.resize((1, 4000)))),
        "b.bmp": (image, {}, rgb),
        "t.TIFF": (image, {}, rgb),
        "w.webp": (image, {"lossless": True}, rgb),
        "Ä ö 画像.png": (image, {}, rgb),
    }
    for name, (picture, options, expected) in kinds.items():
        picture.save(tmp_path / name, **options)
        found = train.load_image(tmp_path / name)
        assert found.mode == "RGB" and np.asarray(found).shape == expected.shape, name
        assert np.abs(np.asarray(found).astype(float) - expected).mean() < 6, (
            name
        )  # JPEG and palettes are not exact
    run_main(tmp_path / "out", "--data", tmp_path, "--steps", 4, "--batch", 8)
    assert "warning" not in capfd.readouterr().out


@pytest.fixture
def spoiled(photographs):
    """The twelve photographs, and five files that are none."""
    whole = (photographs / "kind 1" / "1.jpg").read_bytes()
    (photographs / "page.jpg").write_text("<html>404</html>")
    (photographs / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (photographs / "empty.png").write_bytes(b"")
    (photographs / "broken link.jpg").symlink_to(photographs / "nothing")
    (photographs / "ü.webp").write_bytes(bytes(range(256)))
    return photographs


def test_train_replaces_what_cannot_be_read(spoiled, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train, "RECORD_STEPS", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    flags = ["--data", spoiled, "--steps", 12]  # 48 samples, 17 an epoch
    run_main(tmp_path / "out", *flags)
    printed = capfd.readouterr().out
    warned = re.findall(r"warning: cannot read (.+), the next sample is used", printed)
    bad = {"page.jpg", "half.jpg", "empty.png", "broken link.jpg", "ü.webp"}
    assert {Path(path).name for path in warned} == bad
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "backbone.pt",
        "features.png",
        "last.pt",
        "metrics.jsonl",
    ]
    run_killed_at(6, monkeypatch, tmp_path / "killed", *flags)
    run_main(tmp_path / "killed", *flags, "--workers", 2)
    assert same_weights(tmp_path / "out", tmp_path / "killed")


def test_train_sample_is_the_next_one_that_can_be_read(spoiled, tmp_path, capsys):
    paths = train.find_images(spoiled, tmp_path / "out")
    samples = train.Samples(paths, TwoViews(size=16), 0)
    drawn = [samples[n] for n in range(len(paths) + 1)]
    replaced = [n for n in range(len(paths)) if torch.equal(drawn[n][0], drawn[n + 1][0])]
    order = np.random.default_rng([0, 0]).permutation(len(paths))  # epoch 0 of seed 0
    warned = capsys.readouterr().out
    assert len(replaced) == 5 and all(f"read {paths[order[n]]}," in warned for n in replaced)


@pytest.mark.parametrize("workers", [0, 1])
def test_train_stops_after_ten_photographs_in_a_row_that_cannot_be_read(tmp_path, workers, capfd):
    for number in range(12):
        (tmp_path / f"bad {number}.png").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        flags = ["--data", tmp_path, "--steps", 4, "--batch", 2, "--workers", workers]
        run_main(tmp_path / "out", *flags)
    sentence = "ten photographs in a row cannot be read; mend them, and the same command continues"
    assert stop.value.code.startswith(f"\ntrain.py: {sentence}")
    assert len(stop.value.code.splitlines()) == 2  # an empty one, and the sentence
    assert capfd.readouterr().out.count("warning: cannot read") >= 10


def test_train_finds_images_and_nothing_else(tmp_path):
    images = ["b.jpg", "a.PNG", "sub/c.tiff", "sub/deep er/d.gif", "out.jpg/e.webp"]
    others = ["notes.txt", ".hidden.jpg", ".cache/f.jpg", "sub/.git/g.png", "out/features.png"]
    for name in [*images, *others]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "album.jpg").mkdir()  # a folder of that name is no image
    (tmp_path / "album.jpg" / "h.jpg").write_text("")
    found = train.find_images(str(tmp_path), tmp_path / "out")
    expected = sorted(str(tmp_path / name) for name in [*images, "album.jpg/h.jpg"])
    assert found.tolist() == expected


@pytest.mark.parametrize("full", ["checkpoint", "metrics"])
def test_train_keeps_the_last_state_when_the_disk_is_full(photographs, tmp_path, monkeypatch, full):
    resource = pytest.importorskip(
        "resource"
    )  # a limit on the size of files fails as a full disk does, midway
    monkeypatch.setattr(train, "RECORD_STEPS", 1)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    flags = ["--data", photographs, "--steps", 4]
    run_main(tmp_path / "whole", *flags)
    run_killed_at(2, monkeypatch, tmp_path / "out", *flags)
    before = (tmp_path / "out" / "last.pt").read_bytes()
    size = (tmp_path / "out" / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limit = len(before) // 2 if full == "checkpoint" else size + 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(
            SystemExit, match="the disk is full .*File too large.*, and the same command continues"
        ) as stop:
            run_main(tmp_path / "out", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(stop.value.code.splitlines()) == 2  # an empty one, and the sentence
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    run_main(tmp_path / "out", *flags)
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (
        tmp_path / "out" / "metrics.jsonl"
    ).read_bytes()


def test_train_writes_into_the_folder_that_it_reads(photographs, monkeypatch):
    monkeypatch.chdir(photographs)
    for _ in range(2):  # the second time it does not take its own picture for a photograph
        run_main(Path("run"), "--data", ".", "--steps", 1)
    settings = torch.load(photographs / "run" / "last.pt", weights_only=True)["settings"]
    assert settings["images"] == 12 and (photographs / "run" / "features.png").exists()


class Code:
    def __reduce__(self):
        return (print, ("this code must not run",))


@pytest.mark.parametrize(
    "kind", ["another program", "weights alone", "truncated", "text", "empty", "code"]
)
def test_train_refuses_what_is_no_checkpoint(photographs, tmp_path, capsys, kind):
    out = tmp_path / "out"
    run_main(out, "--data", photographs, "--steps", 1)
    whole = torch.load(out / "last.pt", weights_only=True)
    if kind == "truncated":
        (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-1000])
    elif kind in ("text", "empty"):
        (out / "last.pt").write_text("no checkpoint" if kind == "text" else "")
    else:
        other = {
            "another program": {"epoch": 3, "state_dict": whole["model"]},
            "weights alone": whole["model"],
        }
        torch.save(other.get(kind, whole | {"step": Code()}), out / "last.pt")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(out, "--data", photographs, "--steps", 1)
    printed = capsys.readouterr()
    error = printed.err.splitlines()
    assert (
        stop.value.code == 2
        and "expected a checkpoint of train.py, found" in error[-1]
        and len(error) <= 2
    )
    assert "must not run" not in printed.out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_train_refuses_another_architecture(photographs, tmp_path, capsys):
    run_main(tmp_path / "out", "--data", photographs, "--steps", 1)
    before = (tmp_path / "out" / "last.pt").read_bytes()
    with pytest.raises(SystemExit):
        run_main(tmp_path / "out", "--data", photographs, "--steps", 1, "--arch", "resnet34")
    assert "arch was resnet18, is resnet34" in capsys.readouterr().err
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


def test_train_refuses_a_file_as_output(photographs, tmp_path, capsys):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path / "out", "--data", photographs, "--steps", 1)
    assert stop.value.code == 2 and "out" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("place", ["PixPro", "lr_at", "print_progress", "finish"])
def test_train_ends_with_one_line_at_ctrl_c(photographs, tmp_path, monkeypatch, place):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    flags = ["--data", photographs, "--steps", 1]
    run_main(tmp_path / "whole", *flags)
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, place, interrupted)
        run_main(out, *flags)
    sentence = "interrupted; the same command continues from the last checkpoint"
    assert stop.value.code == f"\ntrain.py: {sentence}"
    run_main(out, *flags)
    assert same_weights(tmp_path / "whole", out)


def test_train_lets_other_errors_through(photographs, tmp_path, monkeypatch):
    """What was not foreseen keeps its own type and traceback, also without a message."""
    for error in (RuntimeError("NCCL"), RuntimeError(), OSError("too many open files"), OSError()):

        def failing(*arguments, error=error):
            raise error

        with monkeypatch.context() as patch, pytest.raises(type(error)) as found:
            patch.setattr(train, "lr_at", failing)
            run_main(tmp_path / "out", "--data", photographs, "--steps", 1)
        assert found.value is error


def test_train_deletes_nothing_before_the_command_is_checked(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    run_main(out, "--data", photographs, "--steps", 2)
    (out / "unreadable.txt").write_text("of somebody")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for flags in (["--gamma", 1], ["--layer", "layer9"], ["--batch", 5000], ["--data", "nowhere"]):
        with pytest.raises(SystemExit) as stop:
            run_main(out, "--data", photographs, "--steps", 2, *flags)
        assert stop.value.code == 2
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_train_does_not_take_the_backbone_of_an_earlier_run_for_its_own(
    photographs, tmp_path, monkeypatch
):
    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 1]
    run_main(out, *flags)
    (out / "last.pt").unlink()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "finish", interrupted)
        run_main(out, *flags, "--seed", 1)
    run_main(out, *flags, "--seed", 1)  # finishes what was interrupted
    model = torch.load(out / "last.pt", weights_only=True)["model"]
    for name, weight in torch.load(out / "backbone.pt", weights_only=True).items():
        assert torch.equal(weight, model[f"backbone.body.{name}"]), name


def test_train_refuses_a_checkpoint_of_the_first_edition(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    run_main(out, "--data", photographs, "--steps", 1)
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    checkpoint["core"] = checkpoint.pop("model")
    del checkpoint["settings"]["format"]
    torch.save(checkpoint, out / "last.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(out, "--data", photographs, "--steps", 1)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1
    assert "last.pt has other settings: format was None, is 2" in error[0]


def test_train_keeps_the_checkpoint_from_weights_that_are_not_finite(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "RECORD_STEPS", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    step = train.LARS.step

    def breaking(optimizer):
        step(optimizer)
        if optimizer.param_groups[0]["lr"] == train.lr_at(
            3, 6, 1, 4 / 256
        ):  # in the last step of a window
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train.LARS, "step", breaking)
    with pytest.raises(SystemExit, match="the weights are not finite at step 4"):
        run_main(tmp_path / "out", "--data", photographs, "--steps", 6)
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 2


def test_train_continues_from_the_start_without_a_checkpoint(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RECORD_STEPS", 1)
    run_killed_at(2, monkeypatch, tmp_path / "out", "--data", photographs, "--steps", 3)
    assert len(metrics(tmp_path / "out")) == 2 and not (tmp_path / "out" / "last.pt").exists()
    run_main(tmp_path / "out", "--data", photographs, "--steps", 3)
    assert [record["step"] for record in metrics(tmp_path / "out")] == [1, 2, 3]


def test_train_does_not_restart_m(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RECORD_STEPS", 1)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    run_killed_at(3, monkeypatch, tmp_path / "out", "--data", photographs, "--steps", 5)
    used = []
    update = PixPro.update_momentum
    monkeypatch.setattr(
        PixPro, "update_momentum", lambda model, m: (used.append(m), update(model, m))
    )
    run_main(tmp_path / "out", "--data", photographs, "--steps", 5)
    assert used == [momentum_at(3, 5), momentum_at(4, 5)]


def test_train_refuses_other_settings(photographs, tmp_path, capsys):
    flags = ["--data", photographs, "--steps", 1]
    run_main(tmp_path / "out", *flags)
    before = (tmp_path / "out" / "last.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path / "out", *flags, "--gamma", 1, "--seed", 3)
    assert stop.value.code == 2
    assert (
        "gamma was 2.0, is 1.0" in (error := capsys.readouterr().err)
        and "seed was 0, is 3" in error
    )
    assert (tmp_path / "out" / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arch", "resnet19"], "classification network of torchvision, found 'resnet19'"),
        (["--arch", "deeplabv3_resnet50"], "found 'deeplabv3_resnet50'"),
        (["--layer", "layer9"], "'layer9' is not present in model"),
        (["--heads", "--arch", "vgg16"], "expected a ResNet of torchvision, found 'vgg16'"),
        (["--batch", "0"], "expected --batch > 0, found 0"),
        (["--batch", "13"], "expected a batch <= 12, a multiple of 1, found 13"),
        (["--steps", "0"], "expected --steps > 0, found 0"),
        (["--epochs", "-1"], "expected --epochs > 0, found -1"),
        (["--size", "0"], "expected --size > 0, found 0"),
        (["--size", "8"], "expected a size that makes a map of at least 2 x 2, found 8"),
        (["--seed", "-1"], "expected --seed >= 0, found -1"),
        (["--workers", "-1"], "expected --workers >= 0, found -1"),
        (["--warmup-epochs", "-9"], "expected --warmup-epochs >= 0, found -9"),
        (["--loss-scale", "nan"], "expected --loss-scale > 0, found nan"),
        (["--threshold", "-1"], "expected --threshold >= 0, found -1"),
        (["--instance-weight", "-1"], "expected --instance-weight >= 0, found -1"),
        (["--temperature", "0"], "expected --temperature > 0, found 0"),
        (["--hidden-dim", "-1"], "expected --hidden-dim > 0, found -1"),
        (["--hidden-dim", "0"], "expected --hidden-dim > 0, found 0"),
        (["--num-layers", "-1"], "expected --num-layers >= 0, found -1"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--gamma", "-1"], "expected --gamma > 0, found -1"),
        (["--objective", "simclr"], "found 'simclr'"),
        (["--obj", "pixpro"], "unrecognized arguments: --obj"),
        (["--lr", "0"], "expected --lr > 0, found 0"),
        (["--lr", "-1"], "expected --lr > 0, found -1"),
        (["--lr", "nan"], "expected --lr > 0, found nan"),
        (["--lr", "inf"], "expected --lr > 0, found inf"),
        (["--data", ""], "expected images below '', found none"),
        (["--arch", "alexnet", "--layer", "features"], "Output size is too small"),
        (["--data", "no-such-folder"], "expected images below 'no-such-folder', found none"),
    ],
)
def test_train_refuses_bad_flags_in_one_sentence(photographs, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path / "out", "--data", photographs, "--steps", "1", *flags)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in error[-1] and len(error) <= 2
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.parametrize("files", [[], ["notes.txt", "table.csv"], [".hidden.jpg"]])
def test_train_refuses_a_folder_without_images(tmp_path, capsys, files):
    (tmp_path / "data").mkdir()
    for name in files:
        (tmp_path / "data" / name).write_text("no image")
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path / "out", "--data", tmp_path / "data", "--steps", 1)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error[-1].endswith(
        f"expected images below '{tmp_path / 'data'}', found none"
    )
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_batch_that_ranks_cannot_share(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda: None)
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path / "out", "--data", photographs, "--steps", 1)
    assert (
        stop.value.code == 2
        and "a multiple of 3, found 4" in capsys.readouterr().err.splitlines()[-1]
    )


def test_train_stops_at_a_loss_that_is_not_finite(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RECORD_STEPS", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    forward = PixPro.forward
    calls = []

    def breaking(model, *batch):
        calls.append(1)
        output = forward(model, *batch)
        return output._replace(loss=output.loss * math.nan) if len(calls) == 3 else output

    monkeypatch.setattr(PixPro, "forward", breaking)
    with pytest.raises(SystemExit, match="the loss is nan before step 4; lower --lr"):
        run_main(tmp_path / "out", "--data", photographs, "--steps", 6)
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["step"] == 2
    assert [record["step"] for record in metrics(tmp_path / "out")] == [2]


def test_train_warns_of_collapse(photographs, tmp_path, monkeypatch, capsys):
    forward = PixPro.forward
    for spread, warned in ((0.2, True), (0.8, False)):

        def spreading(*arguments, spread=spread):
            return forward(*arguments)._replace(spread=torch.tensor(spread))

        monkeypatch.setattr(PixPro, "forward", spreading)
        flags = ["--data", photographs, "--steps", 2, "--warmup-epochs", 0]
        run_main(tmp_path / str(spread), *flags)
        assert ("the features may have collapsed" in capsys.readouterr().out) == warned


def test_train_samples_depend_on_seed_and_number_alone():
    images = train.Scenes(5, size=48).images
    samples = train.Samples(images, TwoViews(size=16), seed=1)
    first = [samples[n] for n in range(12)]
    again = train.Samples(images, TwoViews(size=16), seed=1)
    torch.manual_seed(99)
    for n in (11, 0, 5, 3):
        assert all(torch.equal(a, b) for a, b in zip(first[n], again[n]))
    other = train.Samples(images, TwoViews(size=16), seed=2)
    assert not torch.equal(other[0][0], first[0][0])
    assert not torch.equal(first[0][2], first[1][2])  # a crop of its own for every sample


def test_train_sees_every_image_once_an_epoch():
    images = [torch.full((3, 20, 20), 10 * k, dtype=torch.uint8) for k in range(6)]
    samples = train.Samples(images, lambda image: int(image[0, 0, 0]) // 10, seed=0)
    orders = [[samples[n] for n in range(6 * epoch, 6 * epoch + 6)] for epoch in range(3)]
    assert all(sorted(order) == list(range(6)) for order in orders) and orders[0] != orders[1]


def test_train_scenes_are_a_function_of_seed_and_number():
    scenes = train.Scenes(4, seed=3, first=10, size=64)
    assert scenes.images.shape == (4, 3, 64, 64) and scenes.images.dtype == torch.uint8
    assert scenes.masks.shape == (4, 64, 64) and scenes.masks.max() < len(train.CLASSES)
    again = train.Scenes(1, seed=3, first=12, size=64)
    assert torch.equal(again.images[0], scenes.images[2]) and torch.equal(
        again.masks[0], scenes.masks[2]
    )
    assert not torch.equal(train.Scenes(1, seed=4, first=12, size=64).images, again.images)
    assert len(train.Scenes(12).masks.unique()) == len(train.CLASSES)


def test_train_scenes_colour_alone_does_not_give_the_class():
    # The best linear classifier of the mean colour of 4 x 4 pixels stays below 40% mean IoU.
    class Colour(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, image):
            return F.avg_pool2d(image, 4)

    miou = train.linear_probe(
        Colour(), train.Scenes(48, first=0, size=72), train.Scenes(48, first=48, size=72)
    )
    assert 5 < miou < 40


class Revealed(nn.Module):
    """Its features are the classes themselves: images hold the class in the red channel."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        value = image[:, 0] * 0.229 + 0.485  # undo the normalisation
        return torch.stack([((value * 255).round() == k).float() for k in range(8)], 1)


def revealed(masks):
    images = masks[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    return types.SimpleNamespace(images=images, masks=masks)


def test_train_probe_finds_classes_that_are_linear_in_the_features():
    first, second = (revealed(train.Scenes(6, first=number, size=48).masks) for number in (0, 6))
    assert train.linear_probe(Revealed(), first, second) > 99


def test_train_probe_is_the_mean_over_the_classes_that_are_present_or_predicted():
    # Of eight classes 0 and 1 alone occur. In the test a quarter of class 0 looks like class 1:
    # IoU 12 / 16 of class 0, 16 / 20 of class 1, mean 77.5; the other six have no IoU.
    masks = torch.tensor([0, 1]).repeat_interleave(16).view(1, 4, 8)
    fitted, tested = revealed(masks), revealed(masks)
    tested.images = tested.images.clone()
    tested.images[:, :, 0, :4] = 1
    with torch.no_grad():
        assert train.linear_probe(Revealed(), fitted, tested) == pytest.approx(77.5)


def test_train_probe_leaves_the_backbone_as_it_was():
    backbone = Backbone("resnet18", "layer1")
    backbone.body.bn1.eval()  # frozen by somebody
    modes = [module.training for module in backbone.modules()]
    before = copy.deepcopy(backbone.state_dict())
    scenes = train.Scenes(2, size=32)
    train.linear_probe(backbone, scenes, scenes)
    assert [module.training for module in backbone.modules()] == modes and not all(modes)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_train_switches_residual_blocks_on():
    backbone = Backbone("resnet18", "layer1")
    on = train.with_blocks_on(backbone)
    for kept, block in zip(backbone.body.layer1.children(), on.body.layer1.children()):
        assert not kept.bn2.weight.any() and (block.bn2.weight == 1).all()
        assert torch.equal(kept.conv1.weight, block.conv1.weight)


def torchrun(ranks, out, *flags):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "train.py",
    ]
    command += [*SMALL, "--out", str(out), *map(str, flags)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=200)


def test_train_on_two_ranks(photographs, tmp_path):
    flags = ["--data", photographs, "--steps", 2, "--lr", 1]
    done = torchrun(2, tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1 and done.stdout.count("complete: 2 steps") == 1
    run_main(tmp_path / "one", *flags)
    one, two = metrics(tmp_path / "one")[0], metrics(tmp_path / "two")[0]
    assert two["positives"] == pytest.approx(one["positives"])  # the same samples and crops
    assert two["loss"] == pytest.approx(
        one["loss"], abs=0.2
    )  # BatchNorm saw half batches: near, not equal


DYING_SCRIPT = """
import os, pathlib, signal, sys, train
train.RECORD_STEPS, train.SAVE_SECONDS = 1, 0
momentum_at, marker = train.momentum_at, pathlib.Path(sys.argv.pop())

def dying(step, total_steps):
    if os.environ["RANK"] == "1" and step == 4 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return momentum_at(step, total_steps)

train.momentum_at = dying
train.main(sys.argv[1:])
"""


def test_train_continues_with_other_ranks_and_after_one_has_died(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "RECORD_STEPS", 1)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    flags = ["--data", photographs, "--steps", 6, "--lr", 1]
    run_main(tmp_path / "whole", *flags)
    run_killed_at(2, monkeypatch, tmp_path / "out", *flags)
    (tmp_path / "dying.py").write_text(DYING_SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
    ]
    command += [
        tmp_path / "dying.py",
        *SMALL,
        "--out",
        tmp_path / "out",
        *flags,
        tmp_path / "marker",
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and (tmp_path / "marker").exists(), done.stderr
    assert done.stdout.count("complete: 6 steps") == 1
    starts = [int(step) for step in re.findall(r"off, step (\d+)", done.stdout)]
    assert starts[0] == 2 and 3 <= starts[1] <= 4 and len(starts) == 2
    one, other = metrics(tmp_path / "whole"), metrics(tmp_path / "out")
    assert [record["step"] for record in other] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, other):
        assert b["positives"] == pytest.approx(
            a["positives"]
        )  # the same samples and crops in the same order
        assert (b["lr"], b["m"]) == (a["lr"], a["m"])


RANK_SCRIPT = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import test_pixpro, train
dist.init_process_group("gloo")
rank = dist.get_rank()
model = test_pixpro.small_pixpro(instance_weight=1.0).eval()
batch = [part[2 * rank : 2 * rank + 2] for part in test_pixpro.small_batch()]
own = torch.autograd.grad(model(*batch).loss, [p for p in model.parameters() if p.requires_grad])
wrapped = DistributedDataParallel(model)
wrapped(*batch).loss.backward()
shared = [p.grad for p in model.parameters() if p.requires_grad]
shared = [gradient.clone() for gradient in shared]
optimizer = train.LARS([p for p in model.parameters() if p.requires_grad], lr=1.0)
wrapped.train()  # BatchNorm by each rank's own half
for m in (0.99, 0.999):
    optimizer.step()
    optimizer.zero_grad()
    model.update_momentum(m)
    wrapped(*batch).loss.backward()
torch.save((own, shared, list(model.parameters())), f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_train_gradient_of_two_ranks_is_the_mean(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANK_SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (own_0, shared_0, after_0), (own_1, shared_1, after_1) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    model = small_pixpro(instance_weight=1.0).eval()
    whole = torch.autograd.grad(
        model(*small_batch()).loss, [p for p in model.parameters() if p.requires_grad]
    )
    for a, b, first, second, one in zip(own_0, own_1, shared_0, shared_1, whole):
        assert torch.equal(first, second)
        assert torch.allclose(first, (a + b) / 2, atol=1e-7)
        assert torch.allclose(
            first, one, atol=1e-6
        )  # BatchNorm in eval mode, every image has positives
    assert all(torch.equal(first, second) for first, second in zip(after_0, after_1))
    assert not all(torch.equal(first, before) for first, before in zip(after_0, model.parameters()))


def test_train_amp_auto(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    for flags, amp in (
        ("fma avx512_bf16", "bf16"),
        ("amx_bf16 sse2", "bf16"),
        ("avx2 avx512f", "off"),
    ):
        monkeypatch.setattr(Path, "read_text", lambda path, flags=flags: flags)
        assert train.auto_amp("cpu") == amp
    monkeypatch.setattr(Path, "exists", lambda path: False)  # not on Linux
    assert train.auto_amp("cpu") == "off"


def test_train_steps_seeds_and_ranks_draw_dropout_of_their_own(photographs, tmp_path, monkeypatch):
    """No two forward passes start from the same state of the generator that dropout draws from."""
    seeds = []
    forward = PixPro.forward

    def recording(*arguments):
        seeds.append(torch.initial_seed())
        return forward(*arguments)

    monkeypatch.setattr(PixPro, "forward", recording)
    monkeypatch.setattr(train, "finish", lambda *arguments: None)
    for seed in (0, 1):
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            out = tmp_path / f"{seed}{rank}"
            run_main(out, "--data", photographs, "--steps", 3, "--seed", seed)
    assert len(seeds) >= 10 and len(set(seeds)) == len(seeds)


def test_train_in_bf16_and_fp16(photographs, tmp_path):
    losses = {}
    for amp in ("off", "bf16", "fp16"):
        run_main(tmp_path / amp, "--data", photographs, "--steps", 2, "--amp", amp)
        losses[amp] = metrics(tmp_path / amp)[-1]["loss"]
    assert (
        losses["bf16"] == pytest.approx(losses["off"], abs=0.05) and losses["bf16"] != losses["off"]
    )
    assert (
        losses["fp16"] == pytest.approx(losses["off"], abs=0.05) and losses["fp16"] != losses["off"]
    )


# ------------------------------------ Networks ------------------------------------
def test_backbone_has_torchvisions_names():
    for layer, above in (("layer4", {"fc"}), ("layer3", {"layer4", "fc"})):
        backbone, network = Backbone("resnet18", layer), torchvision.models.resnet18(weights=None)
        missing, unexpected = network.load_state_dict(backbone.body.state_dict(), strict=False)
        assert not unexpected and {name.split(".")[0] for name in missing} == above
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            up_to = nn.Sequential(*list(network.children())[: -2 if layer == "layer4" else -3])
            assert torch.equal(backbone.eval()(x), up_to.eval()(x))


@pytest.mark.parametrize(
    "arch, layer, channels",
    [
        ("resnet18", "layer1", 64),
        ("mobilenet_v3_small", "features", 576),
        ("convnext_tiny", "features.3", 192),
    ],
)
def test_backbone_of_any_architecture(arch, layer, channels):
    backbone = Backbone(arch, layer)
    assert backbone.out_channels == channels and backbone.training
    assert backbone(torch.randn(2, 3, 64, 96)).shape[1] == channels


def test_backbone_leaves_no_trace():
    torch.manual_seed(0)
    network = torchvision.models.get_model(
        "efficientnet_b0", weights=None
    )  # dropout, stochastic depth, BatchNorm
    state = torch.get_rng_state()
    torch.manual_seed(0)
    backbone = Backbone("efficientnet_b0", "features")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(value, network.state_dict()[name])
        for name, value in backbone.body.state_dict().items()
    )
    assert all(module.training for module in backbone.modules())


def test_backbone_starts_residual_blocks_at_zero():
    for arch, last in (("resnet18", "bn2"), ("resnext50_32x4d", "bn3")):
        block = Backbone(arch).body.get_submodule("layer1.0")
        assert not getattr(block, last).weight.any() and block.bn1.weight.all()


def test_backbone_refuses_what_gives_no_map():
    for arch in ("resnet5", "deeplabv3_resnet50"):  # the second would download weights
        with pytest.raises(ValueError, match=f"classification network .* found '{arch}'"):
            Backbone(arch)
    with pytest.raises(ValueError, match="'layer_4' is not present in model"):
        Backbone("resnet18", "layer_4")
    with pytest.raises(ValueError, match=r"from 'encoder' of vit_b_32, found \[1, 50, 768\]"):
        Backbone("vit_b_32", "encoder")
    with pytest.raises(ValueError, match=r"from 'features' of swin_t, found \[1, 7, 7, 768\]"):
        Backbone("swin_t", "features")


def test_projection_head():
    head = projection_head(4, 6, 5)
    assert [type(layer).__name__ for layer in head] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert head(torch.randn(2, 4, 3, 2)).shape == (2, 5, 3, 2)
    assert head[0].weight.shape == (6, 4, 1, 1) and head[3].bias.shape == (5,)


# ------------------------------------ The whole ------------------------------------
def authors_model():
    """The authors' network of their training example, every weight a wave."""
    backbone = nn.Sequential(
        nn.Conv2d(3, 2048, 8, stride=8, bias=False), nn.BatchNorm2d(2048), nn.ReLU()
    )
    backbone.out_channels = 2048
    model = PixPro(backbone, hidden_dim=4096)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "backbone.0" in name:
                p.copy_(0.1 * wave(2048, 3, 8, 8, a=0.11))
            elif p.dim() > 1:
                p.copy_(wave(*p.shape, a=0.07) / math.sqrt(p.shape[1]))
            elif not isinstance(model.get_submodule(name.rsplit(".", 1)[0]), nn.BatchNorm2d):
                p.copy_(0.01 * wave(*p.shape, a=0.19))
    return model


def test_whole_four_steps_equal_the_authors():
    model = authors_model()
    optimizer = train.LARS([p for p in model.parameters() if p.requires_grad], lr=0.5)
    box_1 = tensor([0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.8, 0.1, 0.3, 0.6], [0.2, 0.2, 0.6, 0.6])
    box_2 = tensor(
        [0.3, 0.1, 0.9, 0.8], [0.25, 0.25, 0.75, 0.75], [0.2, 0.2, 0.9, 0.7], [0.4, 0.3, 0.8, 0.7]
    )
    for t, authors in enumerate([0.0243279077, -0.0373621881, -0.0420739502, -0.0545188114]):
        view_1, view_2 = wave(4, 3, 32, 32, a=0.013, b=t), wave(4, 3, 32, 32, a=0.017, b=0.3 * t)
        model.update_momentum(momentum_at(t, 6))
        loss = 2 * model(view_1, view_2, box_1, box_2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(authors, abs=1e-6)


def test_whole_figures_are_what_they_say():
    model = small_pixpro()
    view_1, view_2, box_1, box_2 = small_batch()
    output = model(view_1, view_2, box_1, box_2)
    A = slow_positive_pairs(box_1, box_2, (3, 4), 0.7)
    assert output.positives.item() == pytest.approx(A.sum().item() / 4)
    with torch.no_grad():
        x = [model.projector(model.backbone(view)) for view in (view_1, view_2)]
        x_prime = [
            model.momentum_projector(model.momentum_backbone(view)) for view in (view_1, view_2)
        ]
        y = [model.propagation(one) for one in x]
    forth = slow_consistency(y[0], x_prime[1], A)
    back = slow_consistency(y[1], x_prime[0], A.transpose(1, 2))
    assert output.loss.item() == pytest.approx(forth + back, abs=1e-5)
    forth = slow_consistency(x[0], x_prime[1], A)
    back = slow_consistency(x[1], x_prime[0], A.transpose(1, 2))
    assert output.similarity.item() == pytest.approx(-(forth + back) / 2, abs=1e-5)
    units = [
        [p.numpy() / math.sqrt(float(p @ p)) for image in one for p in slow_pixels(image)]
        for one in x
    ]
    spreads = [np.stack(unit).std(0).mean() * math.sqrt(6) for unit in units]
    assert output.spread.item() == pytest.approx(np.mean(spreads), abs=1e-5)
    assert not any(figure.requires_grad for figure in output[1:]) and all(
        value.dim() == 0 for value in output
    )


def test_whole_spread_is_1_for_white_features_and_0_when_collapsed():
    model = small_pixpro()
    view_1, view_2, *boxes = small_batch(n=64)
    for features, spread in ((torch.randn(64, 6, 3, 4), 1), (torch.ones(64, 6, 3, 4), 0)):
        model.projector.forward = lambda x, features=features: features
        assert model(view_1, view_2, *boxes).spread.item() == pytest.approx(spread, abs=0.02)


def test_whole_pixcontrast_objective():
    model = small_pixpro(objective="pixcontrast", temperature=0.2)
    assert not hasattr(model, "propagation")
    view_1, view_2, box_1, box_2 = small_batch()
    A = slow_positive_pairs(box_1, box_2, (3, 4), 0.7)
    output = model(view_1, view_2, box_1, box_2)
    with torch.no_grad():
        x = [model.projector(model.backbone(view)) for view in (view_1, view_2)]
        x_prime = [
            model.momentum_projector(model.momentum_backbone(view)) for view in (view_1, view_2)
        ]
    expected = slow_pixcontrast(x[0], x_prime[1], A, 0.2) + slow_pixcontrast(
        x[1], x_prime[0], A.transpose(1, 2), 0.2
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"instance_weight": 1.0, "num_layers": 2}, {"objective": "pixcontrast"}]
)
def test_whole_every_parameter_is_used(options):
    model = small_pixpro(**options)
    model(*small_batch()).loss.backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


@pytest.mark.parametrize("options", [{"instance_weight": 1.0}, {"objective": "pixcontrast"}])
def test_whole_without_any_overlap(options):
    model = small_pixpro(**options)
    view_1, view_2, box_1, box_2 = small_batch()
    output = model(view_1, view_2, box_1, box_2 + 1000)
    output.loss.backward()
    assert output.positives == 0 and output.similarity == 0
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


def test_whole_one_image_in_eval_mode():
    model = small_pixpro(instance_weight=1.0).eval()
    output = model(*small_batch(n=1))
    assert all(value.isfinite() for value in output)


def test_whole_takes_synchronised_batchnorm():
    model = PixPro(Backbone("resnet18", "layer1"), dim=4, hidden_dim=8, num_layers=2)
    kinds = [type(module) for module in nn.SyncBatchNorm.convert_sync_batchnorm(model).modules()]
    assert (
        nn.BatchNorm2d not in kinds and kinds.count(nn.SyncBatchNorm) == 2 * (5 + 1) + 1
    )  # with the PPM's


def test_whole_default_is_the_paper():
    defaults = {name: p.default for name, p in inspect.signature(PixPro).parameters.items()}
    assert defaults["dim"] == 256 and defaults["hidden_dim"] == 2048
    assert defaults["gamma"] == 2 and defaults["num_layers"] == 1 and defaults["threshold"] == 0.7
    assert (
        defaults["temperature"] == 0.3
        and defaults["objective"] == "pixpro"
        and defaults["instance_weight"] == 0
    )
    paper = train.PAPER
    assert (paper["arch"], paper["layer"], paper["size"], paper["batch"]) == (
        "resnet50",
        "layer4",
        224,
        1024,
    )
    assert (paper["epochs"], paper["warmup_epochs"], paper["lr"], paper["loss_scale"]) == (
        100,
        5,
        None,
        2,
    )
    for name in train.MODEL:
        assert paper[name] == defaults[name]


class SmallPyramid(SmallBackbone):
    """Three maps from fine to coarse, as torchvision's FPN backbones return them."""

    def forward(self, image):
        fine = self.body(image)  # [N, 8, H, W]
        return {
            "0": fine,
            "1": F.avg_pool2d(fine, 2, ceil_mode=True),
            "pool": F.max_pool2d(fine, 3),
        }


def test_whole_several_levels():
    """Loss and figures are means over the levels; the instance branch reads the coarsest."""

    class OneLevel(SmallPyramid):
        def forward(self, image):
            return super().forward(image)[self.level]

    torch.manual_seed(0)
    pyramid = PixPro(
        SmallPyramid(), dim=6, hidden_dim=10, instance_weight=0.5
    ).eval()  # BatchNorm sees each level alike
    one, batch, outputs = copy.deepcopy(pyramid), small_batch(), {}
    for level in ("0", "1", "pool"):
        for name in ("backbone", "momentum_backbone"):
            getattr(one, name).__class__ = OneLevel
            getattr(one, name).level = level
        one.instance_weight = 0.0
        outputs[level] = torch.stack(one(*batch))
    mean = torch.stack(list(outputs.values())).mean(0)
    one.instance_weight = 0.5
    instance = one(*batch).loss - outputs["pool"][0]
    found = pyramid(*batch)
    assert torch.allclose(
        torch.stack(found), mean + torch.stack([instance, *torch.zeros(3)]), atol=1e-5
    )
    found.loss.backward()
    assert not any(figure.requires_grad for figure in found[1:])


def test_whole_one_channel_images():
    torch.manual_seed(0)
    model = PixPro(SmallBackbone(channels=1), dim=6, hidden_dim=10)
    view_1, view_2, *boxes = small_batch()
    assert model(view_1[:, :1], view_2[:, :1], *boxes).loss.isfinite()


def test_whole_refuses_what_does_not_fit():
    view_1, view_2, box_1, box_2 = small_batch()
    with pytest.raises(ValueError, match="found 'simsiam'"):
        small_pixpro(objective="simsiam")
    with pytest.raises(ValueError, match="threshold >= 0, found -1"):
        small_pixpro(threshold=-1)(view_1, view_2, box_1, box_2)
    with pytest.raises(ValueError, match="temperature > 0, found 0"):
        model = small_pixpro(objective="pixcontrast", temperature=0)
        model(view_1, view_2, box_1, box_2)
    for height, width in ((12, 20), (16, 16)):  # another map for view 2: 3 x 5, 4 x 4
        other = torch.zeros(4, 3, height, width)
        with pytest.raises(ValueError, match=r"expected positives \[4, 12, 1[56]\] for the maps"):
            model = small_pixpro()
            model(view_1, other, box_1, box_2)
    with pytest.raises(
        ValueError, match=r"expected positives \[4, 12, 12\] for the maps, found \[1"
    ):
        small_pixpro()(view_1, view_2, box_1[:1], box_2[:1])  # one crop pair for a whole batch
    with pytest.raises(ValueError, match=r"boxes \[N, 4\], found \[4, 4\] and \[1, 4\]"):
        small_pixpro()(view_1, view_2, box_1, box_2[:1])


def test_whole_learns_on_a_fixed_batch():
    model = small_pixpro()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    batch = small_batch()
    first = model(*batch).loss.item()
    for step in range(40):
        model.update_momentum(momentum_at(step, 40))
        loss = model(*batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.5


def test_whole_compiles_in_one_graph():
    torch._dynamo.reset()
    model = small_pixpro(instance_weight=1.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, output = model(*small_batch()).loss, compiled(*small_batch()).loss
    assert torch.allclose(output, expected, atol=1e-6)
    output.backward()


def test_whole_loop_of_the_docstring_runs():
    loop = textwrap.dedent(re.search(r"\n\n((?: {8}.*\n)+)", PixPro.__doc__)[1])
    box = random_boxes(2, seed=0)
    batches = [(*torch.rand(2, 2, 3, 64, 64), box, box) for _ in range(2)]
    names = {**vars(pixpro), "loader": batches, "total_steps": 2}
    exec(loop.replace("resnet50", "resnet18"), names)
    assert names["loss"].isfinite()
    online, momentum = names["model"].projector[0], names["model"].momentum_projector[0]
    assert not torch.equal(online.weight, momentum.weight)  # both moved, by different amounts
    trained = sum(len(group["params"]) for group in names["optimizer"].param_groups)
    assert trained == sum(p.requires_grad for p in names["model"].parameters())


class NoWaiting(TorchDispatchMode):
    """Fails at operations for which a GPU's results must reach the host: item(), bool(), tolist(),
    nonzero(), ...
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not name.startswith(
            ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")
        ), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"instance_weight": 1.0}, {"objective": "pixcontrast"}])
def test_whole_step_never_waits_for_the_device(options):
    model, batch = small_pixpro(**options), small_batch()
    optimizer = train.LARS([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with NoWaiting():
        model.update_momentum(0.99)
        loss = model(*batch).loss
        loss.backward()
        optimizer.step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            loss.item()


@pytest.mark.parametrize(
    "options",
    [{"instance_weight": 1.0, "num_layers": 2}, {"objective": "pixcontrast"}],
    ids=["pixpro", "pixcontrast"],
)
def test_whole_step_on_another_device(options, monkeypatch):
    """On device meta, which computes shapes alone: a tensor that is left on the CPU shows."""
    monkeypatch.setattr(
        torch, "autocast", lambda *a, **k: contextlib.nullcontext()
    )  # knows no meta
    model = small_pixpro(**options).to("meta")
    batch = [part.to("meta") for part in small_batch()]
    optimizer = train.LARS([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model.update_momentum(0.99)
        output = model(*batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = [*output, *model.state_dict().values()]
    tensors += [state["v"] for state in optimizer.state.values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    with pytest.raises(RuntimeError):  # the test itself: boxes that stayed behind
        model(*batch[:2], *small_batch()[2:])


# Each function that others copy, and the arguments of one call.
FUNCTIONS = {
    "pairs": ("positive_pairs", lambda: (random_boxes(3, seed=1), random_boxes(3, seed=2), (2, 3))),
    "contrast": ("pixcontrast_loss", lambda: (*random_maps(), random_positives())),
    "propagation": ("PixelPropagation", lambda: (random_maps()[0],)),
    "consistency": ("consistency_loss", lambda: (*random_maps(), random_positives())),
    "instance": ("instance_loss", lambda: tuple(x[:, :, 0, 0] for x in random_maps())),
    "m": ("momentum_at", lambda: (3, 10)),
}
every_function = pytest.mark.parametrize(
    "name, arguments", FUNCTIONS.values(), ids=FUNCTIONS.keys()
)


def call(module, name, arguments):
    if name == "PixelPropagation":
        torch.manual_seed(0)
        return module.PixelPropagation(dim=5)(*arguments)
    return getattr(module, name)(*arguments)


@every_function
def test_whole_copies_into_another_file(name, arguments):
    """The function and the helpers that it names, at most three, run with only torch and the
    standard library.
    """
    definitions = {
        node.name: node
        for node in ast.parse(inspect.getsource(pixpro)).body
        if hasattr(node, "name")
    }
    needed, queue = {}, [name]
    while queue:
        needed[queue[0]] = definitions[queue[0]]
        names = {
            node.id for node in ast.walk(definitions[queue.pop(0)]) if isinstance(node, ast.Name)
        }
        queue += sorted(names & definitions.keys() - needed.keys() - set(queue))
    assert len(needed) <= 4
    other = types.ModuleType("other")
    imports = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    exec(imports + "\n".join(ast.unparse(node) for node in needed.values()), other.__dict__)
    expected, found = call(pixpro, name, arguments()), call(other, name, arguments())
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@every_function
def test_whole_in_half_precision(name, arguments, dtype):
    expected = call(pixpro, name, arguments())
    with torch.autocast("cpu", dtype):
        found = call(pixpro, name, arguments())
        half = call(
            pixpro,
            name,
            [a.to(dtype) if torch.is_tensor(a) and a.dim() == 4 else a for a in arguments()],
        )
    exact = (
        name != "PixelPropagation"
    )  # the losses compute in float32, Eq. 3's product in half precision
    tolerance = 1e-6 if exact else 0.03
    assert torch.allclose(
        torch.as_tensor(found).float(), torch.as_tensor(expected).float(), atol=tolerance
    )
    assert torch.allclose(
        torch.as_tensor(half).float(), torch.as_tensor(expected).float(), atol=0.03
    )
    if name.endswith("loss"):
        assert found.dtype == half.dtype == torch.float32


@every_function
def test_whole_function_compiles(name, arguments):
    torch._dynamo.reset()
    if name == "PixelPropagation":
        torch.manual_seed(0)
        function = PixelPropagation(dim=5)
    else:
        function = getattr(pixpro, name)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(
        torch.as_tensor(compiled(*arguments())), torch.as_tensor(function(*arguments()))
    )


def test_groups_share_no_word(request):
    """Each word of GROUPS selects its own tests and no others."""
    groups = [
        (item.name, [word for word in GROUPS if word in item.name])
        for item in request.session.items
    ]
    assert [(name, words) for name, words in groups if len(words) > 1] == []


def test_files_import_little():
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision"}
    for name, extra in (("pixpro", set()), ("train", {"numpy", "pixpro", "PIL"})):
        source = (HERE / f"{name}.py").read_text()
        nodes = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        modules = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in modules} <= allowed | extra


# ------------------------------------ Head networks ------------------------------------
def levels_of(heads, fpn, tower, image):
    """The levels P3 to P6 of another network's FPN behind its tower, beside those of heads."""
    with torch.no_grad():
        ours, theirs = heads(image), fpn(image)
    assert list(ours) == ["0", "1", "2", "p6"]
    for name, level in ours.items():
        with torch.no_grad():
            yield level, tower(theirs[name])


def test_heads_load_into_the_detectors_of_torchvision():
    """Strictly; the features stay the same; and the detector can be trained."""
    torch.manual_seed(0)
    heads, image = Heads("resnet50"), torch.rand(2, 3, 128, 160)
    heads(image)  # moves BatchNorm's statistics
    heads.eval()
    fcos = detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=128
    ).eval()
    towers = fcos.head.classification_head.conv, fcos.head.regression_head.conv
    for ours, theirs in levels_of(heads, fcos.backbone, towers[0][:9], image):
        assert ours.shape == theirs.shape and not torch.allclose(ours, theirs, atol=0.1)
    weights = heads.state_dict()
    fcos.backbone.load_state_dict(
        {name: w for name, w in weights.items() if not name.startswith("tower.")}
    )
    for tower in towers:
        tower[:9].load_state_dict(heads.tower.state_dict())
        for ours, theirs in levels_of(heads, fcos.backbone, tower[:9], image):
            assert torch.equal(ours, theirs)
    faster = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    faster.backbone.body.load_state_dict(heads.body.state_dict())
    with torch.no_grad():
        assert torch.equal(heads.body(image)["2"], faster.backbone.body(image)["3"])  # both C5
    targets = [{"boxes": tensor([10, 20, 90, 110]), "labels": torch.tensor([1])} for _ in range(2)]
    losses = fcos.train()(list(image), targets)
    optimizer = torch.optim.SGD(fcos.parameters(), lr=0.001)
    sum(losses.values()).backward()
    optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    for p in [fcos.backbone.body.conv1.weight, towers[0][0].weight, towers[1][6].weight]:
        assert p.isfinite().all() and p.grad.abs().sum() > 0


def test_whole_heads_share_everything_between_four_levels():
    torch.manual_seed(0)
    heads = Heads("resnet18")
    model = PixPro(heads, dim=6, hidden_dim=10, instance_weight=1.0)
    view_1, view_2 = torch.rand(2, 4, 3, 64, 64)
    box = random_boxes(4, seed=0)
    output = model(view_1, view_2, box, box)
    assert [level.shape[1:] for level in heads(view_1).values()] == [
        (256, 8, 8),
        (256, 4, 4),
        (256, 2, 2),
        (256, 1, 1),
    ]
    itself = (
        64 + 16 + 4 + 1
    ) / 4  # the mean over the levels, if each pixel were positive for itself alone
    assert output.positives.item() > itself
    output.loss.backward()
    frozen = {
        name
        for name, p in model.named_parameters()
        if p.grad is None and not name.startswith("momentum_")
    }
    assert frozen == {f"backbone.fpn.extra_blocks.p7.{kind}" for kind in ("weight", "bias")}
    assert not any(p.requires_grad for p in heads.fpn.extra_blocks.p7.parameters())
    last = [block.bn2.weight for block in heads.body.modules() if hasattr(block, "bn2")]
    assert len(last) == 8 and all(
        weight.abs().sum() == 0 for weight in last
    )  # residual blocks begin at zero


def test_heads_refuse_what_is_no_resnet():
    for arch in ("vgg16", "resnet_50", "fcos_resnet50_fpn"):
        with pytest.raises(ValueError, match=f"expected a ResNet of torchvision, found '{arch}'"):
            Heads(arch)


def test_whole_takes_the_fpn_of_torchvision():
    """Its detection backbones need no wrapper: any module with `out_channels` that returns a dict
    of maps will do.
    """
    torch.manual_seed(0)
    fpn = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    model = PixPro(fpn, dim=6, hidden_dim=10)
    box = random_boxes(2, seed=0)
    model(*torch.rand(2, 2, 3, 64, 64), box, box).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ------------------------------------ The authors' weights ------------------------------------
def authors_file(path, backbone):
    """A file as the authors' code writes it, with these weights in both of its encoders."""
    weights = {}
    for name, weight in backbone.body.state_dict().items():
        weights[f"module.encoder.{name}"] = weight
        weights[f"module.encoder_k.{name}"] = torch.zeros_like(weight)
    for part in ("projector", "projector_k", "projector_instance", "predictor"):
        weights[f"module.{part}.linear1.weight"] = torch.zeros(4, 4, 1, 1)
    weights["module.value_transform.weight"] = torch.zeros(4, 4, 1, 1)
    opt = argparse.Namespace(arch="resnet50", pixpro_p=2.0, batch_size=128)
    rest = {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 100}
    torch.save({"opt": opt, "model": weights} | rest, path)


class Harm:
    def __reduce__(self):
        return os.system, ("true",)


def snippet_with(words):
    """README's one snippet that has these words."""
    [snippet] = [snippet for snippet in SNIPPETS if words in snippet]
    return snippet


def test_authors_weights_load_strictly_and_without_their_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    authors = Backbone("resnet50")
    authors(torch.rand(2, 3, 64, 64))  # moves BatchNorm's statistics
    authors_file("pixpro_base_r50_100ep.pth", authors)
    names = {}
    exec(snippet_with("module.encoder."), names)
    found = names["backbone"].body.state_dict()
    assert len(found) == 318  # all but fc: 53 convolutions, 53 BatchNorms with five entries each
    assert all(torch.equal(found[name], w) for name, w in authors.body.state_dict().items())
    assert (
        argparse.Namespace not in torch.serialization.get_safe_globals()
    )  # it ends with the block

    whole = torch.load("pixpro_base_r50_100ep.pth", weights_only=False)
    del whole["model"]["module.encoder.layer4.2.bn3.bias"]
    torch.save(whole, "pixpro_base_r50_100ep.pth")
    with pytest.raises(RuntimeError, match="Missing key.*layer4.2.bn3.bias"):
        exec(snippet_with("module.encoder."), {})
    torch.save(whole | {"opt": Harm()}, "pixpro_base_r50_100ep.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        exec(snippet_with("module.encoder."), {})


# ------------------------------------ Large maps ------------------------------------
@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "pixcontrast"}, {"gamma": 0.5, "num_layers": 0, "instance_weight": 0.5}],
    ids=["pixpro", "pixcontrast", "no layers"],
)
@pytest.mark.parametrize("overlap", [True, False])
def test_large_maps_image_by_image(options, overlap):
    """README's recipe equals the plain model: every field of Output, and every gradient."""
    names = {}
    exec(snippet_with("class ImageByImage"), names)
    view_1, view_2, box_1, box_2 = small_batch(n=5)
    box_2[2 if overlap else slice(None)] += 1000  # one image, or all, without positive pairs
    results = []
    for kind in (PixPro, names["ImageByImage"]):
        torch.manual_seed(0)
        model = kind(SmallBackbone(), dim=6, hidden_dim=10, **options)
        output = model(view_1, view_2, box_1, box_2)
        output.loss.backward()
        results.append((output, [p.grad for p in model.parameters() if p.requires_grad]))
    (plain, gradients), (by_image, gradients_by_image) = results
    assert (plain.positives > 0) == overlap
    for name in plain._fields:
        assert torch.allclose(getattr(plain, name), getattr(by_image, name), atol=1e-6), name
    for a, b in zip(gradients, gradients_by_image):
        assert torch.allclose(a, b, atol=1e-6)


def test_large_maps_compute_again_in_the_backward_pass(monkeypatch):
    names = {}
    exec(snippet_with("class ImageByImage"), names)
    images = []
    forward = PixelPropagation.forward

    def counting(module, x):
        images.append(len(x))
        return forward(module, x)

    monkeypatch.setattr(PixelPropagation, "forward", counting)
    model = names["ImageByImage"](SmallBackbone(), dim=6, hidden_dim=10)
    loss = model(*small_batch(n=3)).loss
    assert images == [1] * 6  # two directions
    loss.backward()
    assert images == [1] * 12
    with pytest.raises(ValueError, match="num_layers <= 1"):
        names["ImageByImage"](SmallBackbone(), dim=6, num_layers=2)(*small_batch())


# ------------------------------------ The README ------------------------------------
README = (HERE / "README.md").read_text()


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run(snippet, tmp_path, monkeypatch):
    if "import timm" in snippet:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Backbone("resnet50").body.state_dict(), "backbone.pt")
    if "heads.pt" in snippet:
        torch.save(Heads("resnet50").state_dict(), "heads.pt")
    if "module.encoder." in snippet:
        authors_file("pixpro_base_r50_100ep.pth", Backbone("resnet50"))
    names = {}
    exec(snippet, names)
    if "loss" in names:
        assert names["loss"].isfinite() and names["loss"].requires_grad == ("model" in names)
    elif "model" in names:
        box = random_boxes(2, seed=0)
        names["model"](*torch.rand(2, 2, 3, 64, 64), box, box).loss.backward()
    if "classifier" in names:  # of backbone.pt: in every network to the bit
        networks = [names[name] for name in ("classifier", "detector", "mask_rcnn", "segmenter")]
        bodies = [
            networks[0],
            networks[1].backbone.body,
            networks[2].backbone.body,
            networks[3].backbone,
        ]
        for body in bodies:
            assert all(
                torch.equal(body.state_dict()[name], weight)
                for name, weight in names["weights"].items()
            )


def test_readme_names_what_exists():
    tests = set(re.findall(r"`(test_\w+)`", README))
    assert len(tests) >= 10 and tests <= globals().keys()
    links = re.findall(r"\]\(((?!http|#)[^)]+)\)", README)
    assert links and all((HERE / link).exists() for link in links)
    headings = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"\n#+ (.+)", README)}
    assert set(re.findall(r"\]\((#[^)]+)\)", README)) <= headings


def test_readme_flags_exist():
    flags = {"--" + name.replace("_", "-") for name in vars(train.parse([]))} | {"--help"}
    pytests = {"--tb"}
    torchruns = {
        "--nproc",
        "--nnodes",
        "--standalone",
        "--max-restarts",
        "--rdzv",
    }  # up to an underscore
    slurms = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--requeue"}
    assert (
        set(re.findall(r"(?<![-|])--[a-z][a-z-]*", README)) - pytests - torchruns - slurms <= flags
    )


# ------------------------------------ The notebook ------------------------------------
NOTEBOOK = HERE / "tutorial.ipynb"
INSTALL = "pip install matplotlib ipykernel"


def test_notebook_is_saved_with_its_outputs():
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(
        range(1, len(cells) + 1)
    )  # from top to bottom
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(
        output["output_type"] in ("display_data", "stream") for output in outputs
    )  # no error
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 15
    text = "".join("".join(output.get("text", "")) for output in outputs)
    sources = "".join("".join(cell["source"]) for cell in cells)
    assert not re.search(r"(?<![\w.])(/(home|root|tmp|work|usr|Users)/|[A-Z]:\\)", text + sources)


def test_notebook_defines_nothing_again():
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    defined = {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    assigned = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    ours = {
        name
        for module in (pixpro, train)
        for name, value in vars(module).items()
        if callable(value)
    }
    assert len(defined) > 10 and not (defined | assigned) & ours


def test_readme_names_what_the_notebook_needs():
    assert INSTALL in README and "(tutorial.ipynb)" in README


# ------------------------------ Measurements for the README ------------------------------
def compare_views(folder, rounds=5):
    """Images a second on one core, decoding included: TwoViews beside the same operations with PIL
    alone.
    """
    torch.set_num_threads(1)
    paths = sorted(path for path in Path(folder).rglob("*.jpg"))[:200]
    samples, pil_views = train.Samples(paths, TwoViews(224), 0), PilViews(224)
    kinds = {
        "TwoViews": lambda n: samples[n],
        "PIL": lambda n: pil_views(PIL.Image.open(paths[n]).convert("RGB")),
    }
    speeds = {name: [] for name in kinds}
    for k in range(rounds):
        for name in sorted(kinds, reverse=k % 2):  # alternating
            start = time.perf_counter()
            for n in range(len(paths)):
                kinds[name](n)
            speeds[name].append(len(paths) / (time.perf_counter() - start))
    ours, pil = (statistics.median(speeds[name]) for name in ("TwoViews", "PIL"))
    print(f"TwoViews {ours:.0f}, PIL {pil:.0f} images/s, ratio {ours / pil:.2f}")


def compare_step(arch, layer, size, batch, amp, rounds=10):
    """A whole training step beside its networks alone: two passes with gradients and backward, two
    without.
    """
    model = PixPro(Backbone(arch, layer)).to(memory_format=torch.channels_last)
    optimizer = train.LARS([p for p in model.parameters() if p.requires_grad], 1.0)
    views, (box_1, box_2) = torch.randn(2, batch, 3, size, size), 60 * torch.rand(2, batch, 4)
    box_1[:, 2:] += 160
    box_2[:, 2:] += 160

    def whole():
        model.update_momentum(0.99)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = model(*views, box_1, box_2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def bare():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            maps = [model.projector(model.backbone(view)) for view in views]
            with torch.no_grad():
                [model.momentum_projector(model.momentum_backbone(view)) for view in views]
        sum(x.float().mean() for x in maps).backward()
        optimizer.zero_grad()

    seconds = {whole: [], bare: []}
    for k in range(rounds + 2):  # the first two do not count
        for step in (whole, bare) if k % 2 else (bare, whole):  # alternating
            start = time.perf_counter()
            step()
            seconds[step].append(time.perf_counter() - start)
    a, b = (statistics.median(seconds[step][2:]) for step in (whole, bare))
    print(
        f"{arch} {size} x {batch}, bf16 {amp}: {a:.3f} s, the networks alone {b:.3f} s, "
        f"ratio {a / b:.3f}"
    )
