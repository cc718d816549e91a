"""Tests of pixpro.py and train.py, which also grade exercises and hand them out.

Read: each equation has a section with a case computed by hand, the mistakes that are often made,
properties, gradients, an independent slow version in loops, and the authors' numbers.

Grade: one command for each exercise, whatever state the others are in.

    pytest -k eq5 -x                            Eq. 5; the first failure says what is wrong
    pytest -k "eq3 or eq4" -x                   Eq. 3 and 4, which share one forward

The other words are eq1 bins eq2 eq6 momentum views lars schedule. `train` selects the training
runs; the tests without any of these words are not for the exercises.

Hand out and take back:

    python test_pixpro.py                       lists the exercises
    python test_pixpro.py eq3 eq5 ../class      writes a copy of the project where these are open
    python test_pixpro.py grade FILE            grades a pixpro.py or train.py that comes back

Opening an exercise removes its slow version from the copy. Grading runs the tests of this file,
never those that came with FILE; it runs the code in FILE, so grade only code that you would run.

The authors' numbers are what github.com/zdaxie/PixPro, commit e390d6b, computes in float32 on a
CPU; its inputs are tensors of wave() below. The comment at each number names the authors' function,
and .ci/authors_numbers.py prints them all.
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
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import textwrap
import types
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import detection
from torchvision.transforms import v2

import pixpro
import train
from pixpro import (
    Backbone,
    Heads,
    PixelPropagation,
    PixPro,
    PixProOnLevels,
    TwoViews,
    consistency_loss,
    ema_update,
    instance_loss,
    momentum_at,
    pixcontrast_loss,
    positive_pairs,
    projection_head,
)

HERE = Path(__file__).parent


# ------------------------------------ Inputs ------------------------------------
def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def pixels(*columns):
    """A map [1, C, 1, W] of these pixels, each a list of C values."""
    return tensor(*columns).T[None, :, None, :]


def pairs(*images):
    """Positive pairs from text: one image is "11 01", its rows are the pixels of view 1."""
    return torch.tensor([[[int(a) for a in row] for row in image.split()] for image in images]) > 0


def random_maps(n=3, c=5, h=2, w=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, c, h, w, generator=generator) for _ in range(2)]


def random_positives(n=3, size=(6, 6)):
    """Random positives; the last image and the first pixel of the first image have none."""
    positives = torch.rand(n, *size, generator=torch.Generator().manual_seed(0)) < 0.3
    positives[-1] = False
    positives[0, 0] = False
    return positives


def random_boxes(n, seed):
    """Boxes of at least 20 x 20, every second one mirrored."""
    generator = torch.Generator().manual_seed(seed)
    x0, y0, width, height = torch.rand(4, n, generator=generator)
    edges = [100 * x0, 80 * y0, 100 * x0 + 20 + 90 * width, 80 * y0 + 20 + 90 * height]
    boxes = torch.stack(edges, 1)
    boxes[::2] = boxes[::2][:, [2, 1, 0, 3]]
    return boxes


def wave(*shape, a, b=0.0):
    """The inputs of the authors' numbers: element i, counted from 0, is sin(a (i + 1)^1.1 + b)."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(a * i**1.1 + b).float().view(shape)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def slow_pixels(x):
    """Pixels of one map [C, H, W] as a list of vectors, row by row."""
    return [x[:, row, column] for row in range(x.shape[1]) for column in range(x.shape[2])]


# ------------------------------------ Checks that explain ------------------------------------
def check(holds, message):
    __tracebackhide__ = True
    if not holds:
        pytest.fail(message)


def check_form(what, found, shape, dtype=torch.float32):
    """Fails unless found is a tensor of this shape and type."""
    __tracebackhide__ = True
    wanted = f"{what}: expected a tensor {list(shape)} of {dtype}"
    if found is None:
        pytest.fail(f"{wanted}, found None. Is `return` missing?")
    if not torch.is_tensor(found):
        hint = " A number has no gradient." if isinstance(found, float) else ""
        pytest.fail(f"{wanted}, found a {type(found).__name__}.{hint}")
    if list(found.shape) != list(shape) or found.dtype != dtype:
        pytest.fail(f"{wanted}, found {list(found.shape)} of {found.dtype}.")


def check_value(what, found, expected, mistakes=None, tolerance=1e-5):
    """Fails unless found, a number or a few, is as expected. mistakes: {wrong value: its cause}."""
    __tracebackhide__ = True
    if found is None:
        pytest.fail(f"{what}: found None. Is `return` missing?")
    expected = torch.as_tensor(expected, dtype=torch.float64).flatten()
    found = torch.as_tensor(found, dtype=torch.float64).detach().flatten()
    if len(found) != len(expected):
        pytest.fail(f"{what}: expected {len(expected)} numbers, found {len(found)}.")

    def near(value):
        value = torch.as_tensor(value, dtype=torch.float64)
        return torch.allclose(found, value, rtol=0, atol=tolerance)

    if near(expected):
        return
    if found.isnan().any():
        reasons = ["0 / 0, 0 * inf, log 0 or inf - inf makes nan, as in a mean over no pairs"]
    elif found.isinf().any():
        reasons = ["log 0, a division by 0 or exp of a large number makes inf"]
    else:
        general = {
            "the sign is wrong": -1,
            "a factor 2 is too much": 2,
            "a factor 2 is missing": 0.5,
        }
        reasons = [cause for value, cause in (mistakes or {}).items() if near(value)]
        reasons = reasons or [cause for cause, k in general.items() if near(k * expected)]
        if not reasons:  # a known mistake and a sign
            wrong = [(-torch.as_tensor(v), cause) for v, cause in (mistakes or {}).items()]
            reasons = [f"{cause}; and the sign is wrong" for v, cause in wrong if near(v)]
    perhaps = f" Perhaps {', or '.join(reasons)}." if reasons else ""
    texts = [", ".join(f"{number:.6g}" for number in numbers) for numbers in (expected, found)]
    pytest.fail(f"{what}: expected {texts[0]}, found {texts[1]}.{perhaps}")


def check_gradients(what, value, into, not_into=(), hint="detach, no_grad or item() cuts it off"):
    """Fails unless the gradient of value reaches the tensors `into` and no others.

    into, not_into: {name: tensor}, leaves that require a gradient.
    """
    __tracebackhide__ = True
    names = " and ".join(into)
    if not value.requires_grad:
        pytest.fail(f"{what}: expected a gradient into {names}, found a value without any: {hint}.")
    value.sum().backward()
    for name, leaf in into.items():
        if leaf.grad is None:
            pytest.fail(f"{what}: {name} has no gradient: {hint}, or the wrong is detached.")
        if not leaf.grad.isfinite().all():
            bad = "log 0, 0 / 0, a root or power at 0, or infinity masked after the fact"
            pytest.fail(f"{what}: the gradient of {name} has nan or inf, which comes from {bad}.")
    for name, leaf in dict(not_into).items():
        if leaf.grad is not None and leaf.grad.any():
            pytest.fail(f"{what}: no gradient may reach {name}: detach it.")


def check_derivative(what, function, x):
    """Fails unless the gradient of function at x is the slope of its values, along 8 directions."""
    __tracebackhide__ = True
    x = x.detach().clone().requires_grad_()
    [gradient] = torch.autograd.grad(function(x), x)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        direction = F.normalize(torch.randn(x.shape, generator=generator).flatten(), dim=0)
        direction = direction.view(x.shape)
        with torch.no_grad():
            rise = function(x + 0.003 * direction) - function(x - 0.003 * direction)
        slope, found = rise.item() / 0.006, (gradient * direction).sum().item()
        if not abs(slope - found) < 0.005 + 0.01 * abs(slope):
            cause = "Perhaps a part of the formula is detached, or computed under no_grad."
            what = f"{what}: along a direction the value rises by {slope:.4f}"
            pytest.fail(f"{what}, its gradient says {found:.4f}. {cause}")


def check_leaves_alone(what, function, *inputs):
    """Fails if function changes its inputs in place."""
    __tracebackhide__ = True
    before = copy.deepcopy(inputs)
    function(*inputs)
    for number, (part, old) in enumerate(zip(inputs, before)):
        if torch.is_tensor(part) and not torch.equal(part, old):
            pytest.fail(f"{what} changed its input {number} in place: others use it too.")


def check_equal(what, found, expected, tolerance=1e-5):
    """Fails unless the tensors agree, and names the element that is worst."""
    __tracebackhide__ = True
    error = (found.detach() - expected).abs()
    if not (error <= tolerance).all():
        where = np.unravel_index(int(error.nan_to_num(math.inf).argmax()), error.shape)
        where = tuple(map(int, where))
        values = f"expected {expected[where]:.6f}, found {found[where]:.6f}"
        pytest.fail(f"{what}: element {list(where)}: {values}.")


# Causes of wrong values that several equations share.
NOT_COSINES = "products are taken, not cosines: divide by the norms over C"
OVER_PIXELS = "the maps are normalised over the pixels, not over C"
VIEWED = "the map [C, H, W] is viewed as [HW, C]: flatten, then transpose"
MEAN_OF_ALL = "one mean goes over all images; it must go over each image, then over the images"
TRANSPOSED = "cosines or positives are transposed: rows must be the pixels of view 1, columns of 2"


# ------------------------------------ Eq. 1 ------------------------------------
def slow_positive_pairs(box_1, box_2, size, threshold):
    H, W = size
    A = torch.zeros(len(box_1), H * W, H * W, dtype=torch.bool)
    for n in range(len(box_1)):
        centres, diagonals = [], []
        for x0, y0, x1, y1 in (box_1[n].tolist(), box_2[n].tolist()):
            width, height = (x1 - x0) / W, (y1 - y0) / H
            cells = [(row, column) for row in range(H) for column in range(W)]
            centres.append([(x0 + (c + 0.5) * width, y0 + (r + 0.5) * height) for r, c in cells])
            diagonals.append(math.hypot(width, height))
        for i, a in enumerate(centres[0]):
            for j, b in enumerate(centres[1]):
                A[n, i, j] = math.dist(a, b) / max(diagonals) <= threshold
    return A


def check_partners(what, A, expected, mistakes):
    """For each bin of view 1 its positive bins of view 2 as text, "-" for none: "- 0 1+2"."""
    __tracebackhide__ = True
    partners = [row.nonzero().flatten().tolist() for row in A]
    found = " ".join("+".join(map(str, bins)) or "-" for bins in partners)
    if found != expected:
        cause = f" Perhaps {mistakes[found]}." if found in mistakes else ""
        bins = f"the positive bins of view 2, for bin 0, 1, ... of view 1, are {expected}"
        pytest.fail(f"{what}: {bins}; found {found}.{cause}")


def check_same_pairs(what, found, expected):
    """Compares two results of positive_pairs and names the first pair that differs."""
    __tracebackhide__ = True
    wrong = (found != expected).nonzero().tolist()
    if wrong:
        n, i, j = wrong[0]
        pair = f"image {n}, bin {i} of view 1 and bin {j} of view 2"
        values = f"expected {bool(expected[n, i, j])}, found {bool(found[n, i, j])}"
        pytest.fail(f"{what}: {pair}: {values}; {len(wrong)} of {found.numel()} pairs differ.")


def measured_distance(box_1, box_2, size, n, i, j):
    """dist(i, j) of image n, found as the smallest T that makes the pair positive."""
    low, high = 0.0, 64.0
    for _ in range(30):
        middle = (low + high) / 2
        positive = positive_pairs(box_1, box_2, size, middle)[n, i, j]
        low, high = (low, middle) if positive else (middle, high)
    return high


def test_eq1_form():
    box_1, box_2 = random_boxes(4, seed=1), random_boxes(4, seed=2)
    A = positive_pairs(box_1, box_2, (2, 3))
    check_form("positive_pairs of 4 images with maps of 2 x 3", A, [4, 6, 6], torch.bool)
    check_leaves_alone("positive_pairs", positive_pairs, box_1, box_2, (2, 3))


# One row of two bins: of 4 x 3 with centres (2, 1.5), (6, 1.5) and diagonal 5, and of 2 x 1 with
# centres (3.5, 3.5), (5.5, 3.5) and diagonal 2.236068.
LARGE = [0.0, 0.0, 8.0, 3.0]
SMALL_BOX = [2.5, 3.0, 6.5, 4.0]
# d = 4.031129 is the distance from (2, 1.5) to (5.5, 3.5); right is d / 5.
EQ1_MISTAKES = {
    1.802776: "the smaller diagonal is taken, or one view's, not the larger one",  # d / 2.236068
    1.114177: "the mean of the diagonals is taken, not the larger one",  # d / ((5 + 2.236068) / 2)
    0.557088: "the sum of the diagonals is taken, not the larger one",  # d / (5 + 2.236068)
    4.031129: "the distance is not divided by the bin's diagonal",  # d
    0.471808: "the diagonal is the crop's, not the bin's",  # d / hypot(8, 3)
    1.612452: "half of the diagonal is taken",  # d / (5 / 2)
    1.007782: "the bin's width is taken, not its diagonal",  # d / 4
    1.343710: "the bin's height is taken, not its diagonal",  # d / 3
    0.335927: "the bin's area is taken, not its diagonal",  # d / (4 * 3)
    1.1: "the distance is |dx| + |dy|, not the root of the squares",  # (3.5 + 2) / 5
    0.7: "the distance is the larger of |dx| and |dy|, not the root of squares",  # max(3.5, 2) / 5
    3.25: "the distance is squared: the root is missing",  # d^2 / 5
    0.65: "distance and diagonal are squared, and T is not",  # d^2 / 5^2
    0.875: "dx and dy are compared with width and height one by one",  # max(3.5 / 4, 2 / 3)
    1.100032: "dx and dy are divided by width and height one by one",  # hypot(3.5 / 4, 2 / 3)
    0.777840: "dx and dy are divided by width and height one by one",  # 1.100032 / sqrt(2)
    1.081665: "the bins' corners are taken, not their centres: c + 1/2",  # (0, 0) to (4.5, 3)
    0.538516: "the bins' far corners are taken, not their centres: c + 1/2",  # (4, 3), (6.5, 4)
    0.984886: "the half bin is missing in x: c + 1/2",  # (0, 1.5) to (4.5, 3.5)
    0.921954: "the half bin is missing in y: r + 1/2",  # (2, 0) to (5.5, 3)
    1.431782: "the centres run from edge to edge, W - 1 bins apart",  # (0, 0) to (6.5, 3)
    0.640312: "the result is transposed: rows belong to view 1",  # hypot(2.5, 2) / 5
    0.373661: "H and W, or x and y, are exchanged",  # hypot(0.5, 3) / hypot(8, 1.5)
    0.282843: "the boxes' corners (x0, y0) are not added",  # from (2, 1.5) to (3, 0.5)
    1.244517: "a box is read as (x, y, width, height)",  # hypot(5.375, 3.5) / hypot(3.25, 4)
    0.721110: "the boxes are rounded to whole numbers",  # hypot(3, 2) / 5
    64.0: "no T makes it positive: T is ignored, or only the nearest pair counts",
    0.0: "the pair is always positive: the comparison is the wrong way round",
}


def test_eq1_distance_by_hand():
    what = "dist of bins 0 and 1, measured as the smallest T that makes them positive"
    # From (2, 1.5) to (5.5, 3.5): hypot(3.5, 2) = 4.031129. The larger diagonal is 5.
    found = measured_distance(tensor(LARGE), tensor(SMALL_BOX), (1, 2), 0, 0, 1)
    check_value(f"{what} (view 1 has larger bins)", found, 0.806226, EQ1_MISTAKES)
    # The other way round: view 1 is the small one. From (3.5, 3.5) to (6, 1.5): hypot(2.5, 2) / 5.
    found = measured_distance(tensor(SMALL_BOX), tensor(LARGE), (1, 2), 0, 0, 1)
    mistakes = {1.431782: "view 1's diagonal is taken, not the larger one"}
    check_value(f"{what} (view 2 has larger bins)", found, 0.640312, mistakes)


def test_eq1_distance_must_be_small():
    # Equal boxes: each bin lies on itself, at distance 0, and is positive for every T, also for 0.
    box = random_boxes(1, seed=3)
    mistakes = {
        "- - - - - -": "> or < instead of <=, or distances that are never 0",
        "0 1 2 3 4 -": "bin (row, column) has number row * W + column",
        "1+2+3+4+5 0+2+3+4+5 0+1+3+4+5 0+1+2+4+5 0+1+2+3+5 0+1+2+3+4": ">= instead of <=",
    }
    for T in (0.3, 0):
        A = positive_pairs(box, box, (2, 3), T)
        check_partners(f"Equal boxes, T = {T}", A[0], "0 1 2 3 4 5", mistakes)


def test_eq1_numbers_run_row_by_row():
    # Bins of 4 x 3. View 2 lies one bin (4 units) to the right: bin (row, c) of view 1 is bin
    # (row, c - 1) of view 2, and column 0 has no partner.
    #
    #   view 1  0 1 2        view 2    0 1 2
    #           3 4 5                  3 4 5
    check_partners(
        "Map of 2 x 3, view 2 one bin to the right",
        positive_pairs(tensor([0, 0, 12, 6]), tensor([4, 0, 16, 6]), (2, 3), 0.35)[0],
        "- 0 1 - 3 4",
        {
            "1 2 - 4 5 -": "the result is transposed: rows belong to view 1",
            "- - 0 1 2 3": "the bins are numbered column by column",
            "- 0 - 2 - 4": "H and W are exchanged: size is (H, W), and x runs over W columns",
            "- 0 - 1 - 2 - 3": "H and W are exchanged: size is (H, W), and x runs over W columns",
            "0 1 2 3 4 5": "the boxes' corners are not added to the bins' offsets",
        },
    )


def test_eq1_mirrored_view():
    # x0 > x1: the first column of view 2 is at the right edge.
    check_partners(
        "The same crop, view 2 mirrored",
        positive_pairs(tensor([0, 0, 12, 6]), tensor([12, 0, 0, 6]), (2, 3), 0.35)[0],
        "2 1 0 5 4 3",
        {
            "0 1 2 3 4 5": "the mirror is ignored: where x0 > x1 columns must run leftward",
            "- - - - - -": "the bins lie beyond x0: the width must stay negative",
            "- 2 1 - 5 4": "the bins' corners are taken, not their centres: c + 1/2",
            "3 4 5 0 1 2": "the rows are mirrored, not the columns",
            "5 4 3 2 1 0": "the rows are mirrored as well as the columns",
        },
    )


def test_eq1_at_exactly_T_a_pair_is_positive():
    # From (2, 1.5) to (3.5, 3.5): hypot(1.5, 2) = 2.5, and 2.5 / 5 = 0.5, without rounding.
    A = positive_pairs(tensor(LARGE), tensor(SMALL_BOX), (1, 2), 0.5)
    what = "Bins 0 and 0 lie 2.5 apart, the larger bin diagonal is 5: distance 0.5 <= T = 0.5"
    check(A[0, 0, 0], f"{what}, so they are a positive pair; found False. Perhaps < instead of <=.")


def test_eq1_images_have_boxes_of_their_own():
    box_1, box_2 = random_boxes(4, seed=11), random_boxes(4, seed=12)
    A = positive_pairs(box_1, box_2, (3, 3))
    for n in range(4):
        alone = positive_pairs(box_1[n : n + 1], box_2[n : n + 1], (3, 3))
        what = f"Image {n} in a batch of 4 and alone (perhaps boxes or diagonals of images mix)"
        check_same_pairs(what, A[n : n + 1], alone)


def test_eq1_far_from_the_origin():
    # Distances by |a|^2 - 2 a b + |b|^2 lose their digits here; torch.cdist computes so by default.
    box = tensor([3000.7, 3001.7, 3029.1, 3029.9])
    A = positive_pairs(box, box, (7, 7), 0.05)
    what = "Equal boxes of 7 x 7 bins of about 4 x 4 near (3000, 3000), T = 0.05"
    check_same_pairs(f"{what} (perhaps rounding in the distance)", A, torch.eye(49)[None] > 0)


def test_eq1_swapping_the_boxes_transposes():
    box_1, box_2 = random_boxes(5, seed=5), random_boxes(5, seed=6)
    A = positive_pairs(box_1, box_2, (3, 4))
    check(A.any(), "These crops overlap, so there are positive pairs; found none.")
    swapped = positive_pairs(box_2, box_1, (3, 4))
    check_same_pairs("With the views swapped", swapped, A.transpose(1, 2))


AUTHORS_BOX_1 = [[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.8, 0.1, 0.3, 0.6], [0.05, 0.05, 0.2, 0.2]]
AUTHORS_BOX_2 = [[0.3, 0.1, 0.9, 0.8], [0.25, 0.25, 0.75, 0.75], [0.2, 0.2, 0.9, 0.7]]
AUTHORS_BOX_2 += [[0.7, 0.7, 0.95, 0.95]]


def test_eq1_authors_counts():
    # The sums of pos_mask in their regression_loss(q, k, box_1, box_2, pos_ratio=0.7).
    counts = positive_pairs(tensor(*AUTHORS_BOX_1), tensor(*AUTHORS_BOX_2), (7, 7)).sum((1, 2))
    check_value("The authors' numbers of positive pairs, four images", counts, [54, 121, 121, 0])


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize("threshold", [0.35, 0.7, 1.4, 2.8])
def test_eq1_equals_loops(size, threshold):
    box_1, box_2 = random_boxes(6, seed=1), random_boxes(6, seed=2)
    expected = slow_positive_pairs(box_1, box_2, size, threshold)
    check_same_pairs("Loops", positive_pairs(box_1, box_2, size, threshold), expected)


# bin_centres, of which positive_pairs is made.
def test_bins_form():
    centres, diagonal = pixpro.bin_centres(random_boxes(4, seed=1), (2, 3))
    check_form("The centres of 2 x 3 bins of 4 boxes", centres, [4, 6, 2])
    check_form("The diagonals of 4 boxes", diagonal, [4, 1])


def test_bins_centres_by_hand():
    # 2 rows and 3 columns of bins of 4 x 3; then a mirrored box, whose x runs from 16 down to 4.
    centres, _ = pixpro.bin_centres(tensor([0, 0, 12, 6], [16, 0, 4, 6]), (2, 3))
    mistakes = {
        (0, 0): "these are corners: the centre of bin c is at c + 1/2",
        (0, 1.5): "the half bin is missing in x: c + 1/2",
        (2, 0): "the half bin is missing in y: r + 1/2",
        (4, 3): "these are far corners: the centre of bin c is at c + 1/2",
        (1.5, 2): "x and y are exchanged: a centre is (x, y)",
        (3, 1): "H and W are exchanged: x runs over W columns",
    }
    check_value("The centre of bin 0", centres[0, 0], (2, 1.5), mistakes)
    mistakes = {(2, 4.5): "the bins are numbered column by column"}
    check_value("The centre of bin 1", centres[0, 1], (6, 1.5), mistakes)
    check_value("The centre of bin 5, the last", centres[0, 5], (10, 4.5))
    mistakes = {
        (6, 1.5): "the mirror is ignored: where x0 > x1 columns must run leftward",
        (18, 1.5): "the bins lie beyond x0: the width must stay negative",
        (2, 1.5): "all images take the first box",
    }
    check_value("Bin 0 of a box from x = 16 to x = 4", centres[1, 0], (14, 1.5), mistakes)


def test_bins_diagonal_by_hand():
    # hypot(4, 3)
    _, diagonal = pixpro.bin_centres(tensor([0, 0, 12, 6], [16, 0, 4, 6]), (2, 3))
    mistakes = {
        13.416408: "it is the box's, not a bin's",  # hypot(12, 6)
        6.324555: "H and W are exchanged: a bin is width / W wide",  # hypot(6, 2)
        7: "it is width + height, not the root of the squares",
        25: "the root is missing",
    }
    check_value("A bin's diagonal", diagonal[0], 5, mistakes)
    check_value("A mirrored bin's diagonal", diagonal[1], 5, {-5: "it has the width's sign"})


# ------------------------------------ Eq. 2 ------------------------------------
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


def eq2_case():
    """Three images of 1 x 3 pixels; the last image and three other pixels lack positives."""
    x = [pixels([1, 0], [0, 2], [3, 4]), pixels([1, 2], [2, -1], [1, 1])]
    x_prime = [pixels([2, 0], [1, 1], [-1, 0]), pixels([2, 1], [1, 0], [0, -3])]
    last = pixels([1, 0], [0, 1], [1, 1])
    positives = pairs("110 001 000", "000 100 000", "000 000 000")
    return torch.cat([*x, last]), torch.cat([*x_prime, last]), positives


# e_j is e^(cos(x_i, x'_j) / tau), P are the positives of i, l_i its loss.
LOG_EACH = "each positive has a log of its own; the sum over the positives must be inside the log"
ONE_LOG = "one log is taken of sums over many pixels; each pixel must have its own"
LOG_EPS = "pixels without a positive give -log(eps): leave them out; the log needs no eps"
EQ2_MISTAKES = {
    0.948667: "the temperature is ignored",  # e^cos
    0.916030: "the cosines are multiplied by the temperature",  # e^(cos tau)
    1.388851: NOT_COSINES,  # e^(x_i . x'_j / tau)
    0.841911: OVER_PIXELS,
    0.752395: VIEWED,
    1.271268: LOG_EACH,  # mean_P -log(e_j / sum e)
    1.458053: LOG_EACH,  # sum_P -log(e_j / sum e)
    -0.236867: "the positives are missing in the denominator",  # -log(sum_P e / sum_not P e)
    1.421555: "the positives are twice in the denominator",  # -log(sum_P e / (sum e + sum_P e))
    1.260695: "the mean over the positives is in the log, not their sum",  # -log(mean_P e / sum e)
    0.162082: "means are in the log, not sums",  # -log(mean_P e / mean e)
    1.198043: "only one of the positives counts",  # -log(e_j / sum e), j the first positive
    0.200290: "the pixel j = i is left out of the denominator",  # sum e without e_i
    0.556166: "the others count as e^0 = 1: mask with -inf",  # -log((sum_P e + others) / sum e)
    -0.429285: "the log is missing",  # -sum_P e / sum e
    0.570715: "the log is missing",  # 1 - sum_P e / sum e
    0.907714: "the log is taken of the mean over the pixels",  # -log(mean_i (sum_P e / sum e))
    0.472255: "the log is the decimal one",  # l_i / log 10
    1.568798: "the log is that of base 2",  # l_i / log 2
    1.009659: TRANSPOSED,  # P of j
    0.869814: "the softmax runs over the pixels of x, not over those of x'",  # e_ij / sum_i e_ij
    1.090407: "x and x' are exchanged",  # cos(x'_i, x_j)
    2.197345: "both directions are added: this is one of the two",
    1.028631: MEAN_OF_ALL,  # (l_0 + l_1 + l_1') / 3
    0.514316: "pixels without a positive count in the mean",  # sum l_i / 3 in each image
    0.342877: "pixels and images without a positive count in the mean",  # sum l_i / 9
    1.358560: "the temperature is always 0.3",  # e^(cos / 0.3)
    18.763558: LOG_EPS,  # eps 1e-12, mean over all pixels
    15.693444: LOG_EPS,  # 1e-10
    12.623331: LOG_EPS,  # 1e-8
    9.553216: LOG_EPS,  # 1e-6
    14.329826: LOG_EPS,  # eps 1e-12, mean over the pixels of images 0 and 1
    12.027241: LOG_EPS,  # 1e-10
    9.724656: LOG_EPS,  # 1e-8
    7.422069: LOG_EPS,  # 1e-6
    0.724939: "images without positives count in the mean",  # (image 0 + image 1 + 0) / 3
    1.542947: "the losses of the pixels are added; their mean is taken",  # sum l_i / 2
    2.174816: "the images are added; their mean is taken",  # l_0 + l_1
    1.839471: ONE_LOG,  # of the batch
    1.520220: ONE_LOG,  # of an image
    0.807130: ONE_LOG,  # of the pixels with a positive
    2.144161: "the pixels of other images are negatives too; Eq. 2 stays in one image",
}


def test_eq2_form():
    x, x_prime = random_maps()
    loss = pixcontrast_loss(x, x_prime, random_positives())
    check_form("Eq. 2 of three images", loss, [])
    check_leaves_alone("Eq. 2", pixcontrast_loss, x, x_prime, random_positives())


def test_eq2_by_hand():
    # Cosines of pixel i with the three x'_j; p marks the positives. tau is 0.5.
    #   image 0, pixel 0: 1 p, 0.707 p, -1     -log((e^2 + e^1.414) / (e^2 + e^1.414 + e^-2))
    #            pixel 1: 0, 0.707, 0 p        -log(e^0 / (e^0 + e^1.414 + e^0))
    #   image 1, pixel 1: 0.6 p, 0.894, 0.447  -log(e^1.2 / (e^1.2 + e^1.789 + e^0.894))
    # These are 0.011697, 1.810458 and 1.263738. Mean over the pixels, then over the images:
    # ((0.011697 + 1.810458) / 2 + 1.263738) / 2 = 1.087408. Other pixels and image 2 have no p.
    found = pixcontrast_loss(*eq2_case(), temperature=0.5)
    check_value("Eq. 2 by hand, tau 0.5", found, 1.087408, EQ2_MISTAKES)


def test_eq2_all_positive_is_0():
    x, x_prime = random_maps()
    found = pixcontrast_loss(x, x_prime, torch.ones(3, 6, 6, dtype=torch.bool))
    check_value("Eq. 2 where every pixel is positive: -log 1", found, 0, tolerance=1e-6)


def test_eq2_gradients():
    x, x_prime = [part.requires_grad_() for part in random_maps()]
    positives = random_positives()
    loss = pixcontrast_loss(x, x_prime, positives)
    check_gradients("Eq. 2", loss, {"x": x}, {"x'": x_prime})
    reached = x.grad.flatten(2).any(1)  # [N, HW]
    same = torch.equal(reached, positives.any(2))
    check(same, "The gradient reaches other pixels than those that have a positive.")
    check_derivative("Eq. 2", lambda x: pixcontrast_loss(x, x_prime, positives), x)


def test_eq2_without_any_positive_is_0_with_gradient_0():
    x, x_prime = random_maps()
    x.requires_grad_()
    loss = pixcontrast_loss(x, x_prime, torch.zeros(3, 6, 6, dtype=torch.bool))
    check_value("Eq. 2 without any positive pair", loss, 0)
    what = "Eq. 2 without any positive pair"
    hint = "the loss must stay in the graph (0 * something); a constant cannot be differentiated"
    check_gradients(what, loss, {"x": x}, hint=hint)
    check(not x.grad.any(), f"{what}: expected a gradient of zeros, found others.")


def test_eq2_does_not_overflow():
    # cos / tau = 1 / 0.002 = 500: e^500 overflows float32; logsumexp subtracts the largest.
    x = pixels([1, 0], [0, 1])
    found = pixcontrast_loss(x, x, pairs("01 10"), temperature=0.002)
    what = "Eq. 2 at tau 0.002: exp overflows; torch.logsumexp subtracts the largest first"
    mistakes = {-math.log(10.0**-k): "an eps is added inside the log" for k in range(5, 17)}
    check_value(what, found, 500, mistakes, tolerance=0.5)


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0])
def test_eq2_equals_loops(temperature):
    x, x_prime = random_maps()
    positives = random_positives()
    expected = slow_pixcontrast(x, x_prime, positives, temperature)
    found = pixcontrast_loss(x, x_prime, positives, temperature)
    check_value(f"Eq. 2 in loops, tau {temperature}", found, expected)


# ------------------------------------ Eq. 3 and 4 ------------------------------------
def slow_propagation(x, g, gamma):
    y = torch.zeros_like(g)
    for n in range(len(x)):
        vectors, values = slow_pixels(x[n]), slow_pixels(g[n])
        for i, a in enumerate(vectors):
            for b, value in zip(vectors, values):
                s = max(cosine(a, b), 0.0) ** gamma
                unit = value / math.sqrt(float(value @ value))
                y[n, :, i // x.shape[3], i % x.shape[3]] += s * unit
    return y


def eq3_case():
    """A PPM with gamma 2 and a given g, and a map of 2 x 2 pixels: (3,0), (0,1), (1,2), (-2,1)."""
    ppm = PixelPropagation(dim=2, gamma=2, num_layers=1)
    with torch.no_grad():
        ppm.transform[0].weight.copy_(tensor([3, 3], [0, 6])[:, :, None, None])
        ppm.transform[0].bias.zero_()
    return ppm, pixels([3, 0], [0, 1], [1, 2], [-2, 1]).reshape(1, 2, 2, 2)


# c is the cosine, s = max(c, 0)^2, g is normalised, h is not, u_j = x_j / |x_j|.
EQ3_MISTAKES = {
    (10.8, 2.4): "g(x_j) is not divided by its norm",  # sum s h
    (1.089443, 0.178885): "g is left out: x_j itself is propagated",  # sum s u
    (3.2, 0.4): "g is left out: x_j itself is propagated",  # sum s x
    (3.804984, 1.073313): "x_j is normalised, not g(x_j), or g is applied to the sum",  # sum s W u
    (0.762229, 0.875542): "max(cos, 0) is missing, or comes after the power",  # sum c^2 g
    (1.477771, -0.555542): "max(cos, 0) is missing: opposite pixels count",  # sum sign(c) c^2 g
    (1.668328, -0.442229): "max(cos, 0) and gamma are missing",  # sum c g
    (1.268328, 0.357771): "gamma is ignored",  # sum max(c, 0) g
    (0.868328, 1.157771): "|cos| is taken, not max(cos, 0), and gamma is ignored",  # sum |c| g
    (2.536656, 0.715542): "s is multiplied by gamma, not raised to it",  # sum gamma max(c, 0) g
    (0.688978, 0.441264): "a softmax over j is taken; Eq. 3 is a plain sum",  # sum softmax_j(c) g
    (0.838844, 0.272736): "a softmax over j is taken; Eq. 3 is a plain sum",  # of 2 c
    (43.2, 3.6): "products / sqrt(C) are taken, not cosines",  # sum max(x_i . x_j / sqrt(2), 0)^2 g
    (0.581028, 0.465677): "a softmax over j is taken; Eq. 3 is a plain sum",  # sum softmax_j(s) g
    (0.933333, 0.133333): "the sum is divided by sum s; Eq. 3 is a sum alone",  # sum s g / sum s
    (0.28, 0.04): "the mean over j is taken, not the sum",  # sum s g / 4
    (0.12, 0.16): "the pixel itself is left out",  # sum over j != i
    (1.2, 0): "g(x_i) is multiplied by sum s; the sum is over s g(x_j)",  # sum s g_i
    (3.28, 0.04): "x is added, and the mean over j is taken; Eq. 3 is the sum alone",
    (4.12, 0.16): "x is added to the sum",  # x_i + sum s g
    (0.989949, 0.141421): "y is divided by its norm",  # y / |y|
    (0.976187, 0.216930): "y is divided by its norm, not g(x_j)",  # sum s h / |sum s h|
    (0.962442, 0.271486): "g is applied to the sum, not to each x_j",  # g of the sum
    (86.4, 7.2): NOT_COSINES,  # sum max(x_i . x_j, 0)^2 g
    (1.305443, 0.466885): "the similarity is that of g(x), not of x",  # cosines of h
    (1.160997, 0.521994): "x and g are exchanged",  # cosines of h, sum of u
    (0.440816, 0.036735): OVER_PIXELS,
    (0.804984, 0.163299): "g is normalised over the pixels, not over C",
    (1.12, 1.157771): "the result [HW, C] is viewed as [C, H, W]: transpose it first",
    (0.731672, 0.894427): VIEWED,  # for s alone
    (1.617133, 0.249732): VIEWED,
    (0.948683, 0.516228): VIEWED,  # for g alone
}


def seeded_ppm(**options):
    torch.manual_seed(0)
    return PixelPropagation(dim=5, **options)


def test_eq3_form():
    y = PixelPropagation(dim=5)(random_maps()[0])
    check_form("PixelPropagation(5) of a map [3, 5, 2, 3]", y, [3, 5, 2, 3])
    check_leaves_alone("PixelPropagation", PixelPropagation(5, num_layers=0), random_maps()[0])


def test_eq3_by_hand():
    # g(x_j) = (3 a + 3 b, 6 b) for x_j = (a, b): (9, 0), (3, 6), (9, 12), (-3, 6), divided by their
    # norms (1, 0), (0.447, 0.894), (0.6, 0.8), (-0.447, 0.894). The cosines of pixel 0 with the
    # four are 1, 0, 0.447, -0.894; clamped and squared they are s = 1, 0, 0.2, 0. So
    # y_0 = 1 (1, 0) + 0.2 (0.6, 0.8) = (1.12, 0.16).
    ppm, x = eq3_case()
    y = ppm(x)[0].flatten(1).T  # [HW, C]
    check_value("Eq. 3 by hand, y of pixel (3, 0)", y[0], (1.12, 0.16), EQ3_MISTAKES)
    # 1 (-0.447, 0.894) in place of 0.2 (-0.447, 0.894)
    mistakes = {(0.48, 2.428854): "the maximum with 0 is taken of x, not of the cosine"}
    check_value("Eq. 3 by hand, y of pixel (0, 1)", y[1], (0.837771, 1.713313), mistakes)
    check_value("Eq. 3 by hand, y of pixel (1, 2)", y[2], (1.157771, 1.515542))
    check_value("Eq. 3 by hand, y of pixel (-2, 1)", y[3], (-0.357771, 1.073313))
    # With gamma 3: (1, 0) + 0.447^3 (0.6, 0.8).
    ppm.gamma = 3
    mistakes = {(1.12, 0.16): "gamma is ignored: it is always 2"}
    found = ppm(x)[0, :, 0, 0]
    check_value("Eq. 3 by hand with gamma 3, pixel (3, 0)", found, (1.053666, 0.071554), mistakes)


def test_eq3_pixel_itself_counts():
    # A single pixel: s = cos(x, x)^2 = 1, so y = g(x) / |g(x)|, here x / |x| = (0.6, 0.8).
    y = PixelPropagation(dim=2, num_layers=0)(pixels([3, 4]))
    mistakes = {(0, 0): "the pixel itself is left out", (3, 4): "g(x_j) is not divided by its norm"}
    check_value("Eq. 3 of a single pixel (3, 4) without layers", y, (0.6, 0.8), mistakes)


def test_eq3_images_do_not_mix():
    ppm = seeded_ppm()
    x = random_maps()[0]
    what = "Image 1 of a batch of 3, compared with itself alone: do images mix?"
    check_equal(what, ppm(x)[1:2], ppm(x[1:2]).detach(), tolerance=1e-6)


def test_eq3_g_is_applied_once():
    # With two layers g has a BatchNorm, which must see the whole batch, and see it once.
    ppm = seeded_ppm(num_layers=2)
    ppm(random_maps()[0])
    calls = int(ppm.transform[1].num_batches_tracked)
    what = "g must be applied once to the whole batch, so that its BatchNorm sees all images"
    check(calls == 1, f"{what}; found {calls} calls.")


def test_eq3_permuting_pixels_permutes_the_output():
    ppm = seeded_ppm()
    x = random_maps(h=1, w=6)[0]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    what = "Pixels in another order: y must be in that order, and otherwise the same"
    check_equal(what, ppm(x[..., order]), ppm(x)[..., order].detach(), tolerance=1e-6)


def test_eq3_gradients():
    ppm = seeded_ppm()
    x = random_maps()[0].requires_grad_()
    check_gradients("Eq. 3", ppm(x), {"x": x, "the weights of g": ppm.transform[0].weight})
    # Of a single pixel s is 1, whatever x is: what arrives has gone through g.
    x = random_maps(h=1, w=1)[0].requires_grad_()
    ppm(x)[:, 0].sum().backward()
    check(x.grad.abs().max() > 1e-3, "No gradient flows through g(x_j). Is it detached?")
    # If g is constant, what arrives has gone through s.
    ppm.transform[0].weight.data.zero_()
    x = random_maps()[0].requires_grad_()
    ppm(x)[:, 0].sum().backward()
    check(x.grad.abs().max() > 1e-3, "No gradient flows through s(x_i, x_j). Is it detached?")


def test_eq3_derivative():
    ppm = seeded_ppm()
    check_derivative("Eq. 3, the first channel", lambda x: ppm(x)[:, 0].sum(), random_maps()[0])


def test_eq3_transform_has_l_layers():
    def kinds(num_layers):
        return [type(layer) for layer in PixelPropagation(4, num_layers=num_layers).transform]

    assert kinds(0) == []
    assert kinds(1) == [nn.Conv2d]
    assert kinds(2) == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert kinds(3) == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2 + [nn.Conv2d]
    weights = [p for p in PixelPropagation(4, num_layers=3).parameters() if p.dim() == 4]
    assert all(weight.shape == (4, 4, 1, 1) for weight in weights)


def similarity_at(angle, gamma):
    """s of two unit pixels at this angle in degrees, read off y_0 = (1, 0) + s (cos, sin)."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    y = PixelPropagation(dim=2, gamma=gamma, num_layers=0)(pixels([1, 0], [c, s]))
    return y[0, 1, 0, 0].item() / s


def test_eq4_by_hand():
    # cos 60 degrees = 0.5, and 0.5^3 = 0.125.
    mistakes = {
        0.5: "gamma is ignored",
        0.25: "gamma is always 2",
        1.5: "the cosine is multiplied by gamma, not raised to it",
        0.793701: "the cosine is raised to 1 / gamma",
    }
    check_value("Eq. 4 at 60 degrees, gamma 3", similarity_at(60, 3), 0.125, mistakes)


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_eq4_is_0_beyond_90_degrees(gamma):
    # cos 120 degrees = -0.5: max(-0.5, 0) = 0. An even gamma hides the sign of what is not clamped.
    cause = "max(cos, 0) is missing, or comes after the power"
    mistakes = {(-0.5) ** gamma: cause, 0.5**gamma: f"the absolute value is taken, or {cause}"}
    check_value(f"Eq. 4 at 120 degrees, gamma {gamma}", similarity_at(120, gamma), 0, mistakes)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("other", [[-1, 0], [0, 1]], ids=["opposite", "orthogonal"])
def test_eq4_is_exactly_0_with_finite_gradients(gamma, other):
    # The slope of c^gamma at 0 is infinite for gamma < 1; there the gradient must be exactly 0.
    x = pixels([1, 0], other).requires_grad_()
    y = PixelPropagation(dim=2, gamma=gamma, num_layers=0)(x)
    what = f"Eq. 4, gamma {gamma}, of (1, 0) and {tuple(other)}"
    where = f"{what}: s = 0 exactly, without an eps, y_0"
    check_value(where, y[0, :, 0, 0], (1, 0), tolerance=1e-7)
    check_gradients(f"{what}, where the power has an infinite slope", y.square(), {"x": x})


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 4])
def test_eq4_equals_the_formula(gamma):
    for angle in (10, 45, 80, 100, 170):
        expected = max(math.cos(math.radians(angle)), 0) ** gamma
        what = f"Eq. 4 at {angle} degrees, gamma {gamma}"
        check_value(what, similarity_at(angle, gamma), expected)


def authors_propagation(gamma, num_layers):
    # Their PixPro.featprop, with their value_transform set as here:
    # PixPro.featprop(SimpleNamespace(pixpro_clamp_value=0, pixpro_p=gamma, value_transform=g), x)
    ppm = PixelPropagation(256, gamma, num_layers)
    with torch.no_grad():
        for conv in ppm.transform:
            conv.weight.copy_(wave(256, 256, 1, 1, a=0.07) / 16)
            conv.bias.copy_(0.01 * wave(256, a=0.19))
        y = ppm(wave(2, 256, 3, 5, a=0.23)).double()
    return [y.sum(), y.abs().sum(), y[1, 17, 2, 3], y[0, 255, 0, 0]]


def test_eq3_authors_numbers():
    total, size, one, other = authors_propagation(gamma=2.0, num_layers=1)
    check_value("The authors' sum of y", total, 10.614669, tolerance=1e-3)
    check_value("The authors' sum of |y|", size, 1277.442658, tolerance=1e-3)
    check_value("The authors' y[1, 17, 2, 3]", one, -0.1296858788, tolerance=1e-6)
    check_value("The authors' y[0, 255, 0, 0]", other, 0.0937332809, tolerance=1e-6)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize("gamma", [0.5, 1, 2, 4])
def test_eq3_equals_loops(gamma, num_layers):
    torch.manual_seed(0)
    ppm = PixelPropagation(dim=5, gamma=gamma, num_layers=num_layers)
    x = random_maps(n=2)[0]
    with torch.no_grad():
        expected = slow_propagation(x, ppm.transform(x), gamma)
    check_equal(f"Eq. 3 in loops, gamma {gamma}, l {num_layers}", ppm(x), expected)


def test_eq4_authors_numbers():
    total, size, one, other = authors_propagation(gamma=1.0, num_layers=0)
    check_value("The authors' sum of y", total, 9.232201, tolerance=1e-3)
    check_value("The authors' sum of |y|", size, 1713.817161, tolerance=1e-3)
    check_value("The authors' y[1, 17, 2, 3]", one, -0.3988923430, tolerance=1e-6)
    check_value("The authors' y[0, 255, 0, 0]", other, -0.3339273342, tolerance=1e-6)


# ------------------------------------ Eq. 5 ------------------------------------
def slow_consistency(y, x_prime, positives):
    images = []
    for n in range(len(y)):
        cosines = []
        for i, a in enumerate(slow_pixels(y[n])):
            for j, b in enumerate(slow_pixels(x_prime[n])):
                if positives[n, i, j]:
                    cosines.append(cosine(a, b))
        if cosines:
            images.append(-sum(cosines) / len(cosines))
    return sum(images) / len(images)


def eq5_case():
    """Three images of 1 x 2 pixels with three, two and no positive pairs."""
    y = [pixels([3, 0], [0, 2]), pixels([1, 2], [2, -1]), pixels([1, 0], [0, 1])]
    x_prime = [pixels([1, 0], [1, 1]), pixels([2, 1], [1, 0]), pixels([1, 0], [1, 1])]
    return torch.cat(y), torch.cat(x_prime), pairs("11 01", "10 10", "00 00")


# c are the cosines and P the positives of an image.
NO_MASK = "pairs that are not positive count too: the mask is not used"
SAME_PIXEL = "pixel i of y is paired with pixel i of x', not with its positives"
EQ5_MISTAKES = {
    -0.630839: NO_MASK,  # mean c, three images
    -0.644482: NO_MASK,  # mean c, images 0 and 1
    -0.335410: "the pairs that are not positive are taken",  # mean of c where not P
    -0.762843: MEAN_OF_ALL,  # sum of all P / 5
    -0.501579: "images without positive pairs count in the mean",  # (0.804738 + 0.7 + 0) / 3
    -0.804738: "only the first image counts",  # 0.804738
    -0.476777: "the sum is divided by all pairs, not by the positive ones",  # sum_P c / 4
    -0.317851: "the sum is divided by all pairs, not by the positive ones",  # three images
    -0.953553: "the sum is divided by the number of pixels, not of positive pairs",  # sum_P c / 2
    -0.535110: "something is added to the number of pairs",  # sum_P c / (number + 1)
    -1.907107: "the cosines of an image are added; their mean is taken",  # sum_P c
    -3.814214: "the cosines are added; their mean is taken",  # sum over all
    -1.003159: "it is twice Eq. 5, and images without positives count: the authors' loss",
    -1.504738: "the images are added, or a factor 2 is too much",  # 0.804738 + 0.7
    -0.740165: "each pixel has its mean; all positive pairs of an image must weigh the same",
    -0.776777: "the most similar positive of each pixel is taken, not the mean over all",
    -0.596321: TRANSPOSED,  # P of (j, i)
    -0.416959: "other pairs are pushed apart; Eq. 5 has no negatives",  # mean_P c - mean_not P c
    -0.327578: "other pairs are pushed apart; Eq. 5 has no negatives",  # in all three images
    -3.083333: NOT_COSINES,  # y_i . x'_j
    -1.282624: "x' is not normalised over C",  # y_i . x'_j / |y_i|
    -1.871879: "y is not normalised over C",  # y_i . x'_j / |x'_j|
    -0.814172: OVER_PIXELS,
    -0.439428: "the whole map is normalised, not each pixel",  # y_i . x'_j / (|y| |x'|)
    -0.634518: VIEWED,
    -0.696321: VIEWED,  # after the normalisation
    0.495262: "2 - 2 cos is taken; Eq. 5 is -cos",  # 2 - 2 c
    0.247631: "1 - cos is taken; Eq. 5 is -cos",  # 1 - c
    -0.850383: SAME_PIXEL,  # mean c_ii
    -0.851440: SAME_PIXEL,  # three images
    -0.826777: SAME_PIXEL,  # where P_ii
}


def test_eq5_form():
    y, x_prime = random_maps()
    check_form("Eq. 5 of three images", consistency_loss(y, x_prime, random_positives()), [])
    check_leaves_alone("Eq. 5", consistency_loss, y, x_prime, random_positives())


def test_eq5_by_hand():
    # Image 0: the positives (0,0), (0,1), (1,1) have cosines 1, 0.707107, 0.707107; mean 0.804738.
    # Image 1: (0,0), (1,0), of (1,2) and (2,-1) with (2,1), have cosines 0.8, 0.6; mean 0.7.
    # Image 2 has none. Mean over images 0 and 1: 0.752369.
    check_value("Eq. 5 by hand", consistency_loss(*eq5_case()), -0.752369, EQ5_MISTAKES)


def test_eq5_equal_and_opposite_features():
    y = random_maps()[0][:, :, :1, :1].repeat(1, 1, 2, 3)
    positives = random_positives()
    check_value("Eq. 5 where all pixels are equal", consistency_loss(y, y, positives), -1)
    mistakes = {
        -1: "the absolute value of the cosine is taken",
        0: "the cosine is clamped at 0, which belongs to Eq. 4",
    }
    check_value("Eq. 5 where they are opposite", consistency_loss(y, -y, positives), 1, mistakes)


def test_eq5_gradients():
    y, x_prime = [part.requires_grad_() for part in random_maps()]
    positives = random_positives()
    check_gradients("Eq. 5", consistency_loss(y, x_prime, positives), {"y": y}, {"x'": x_prime})
    check_derivative("Eq. 5", lambda y: consistency_loss(y, x_prime, positives), y)


def test_eq5_without_any_positive_is_0_with_gradient_0():
    y, x_prime = random_maps()
    y.requires_grad_()
    loss = consistency_loss(y, x_prime, torch.zeros(3, 6, 6, dtype=torch.bool))
    what = "Eq. 5 without any positive pair"
    check_value(what, loss, 0)
    hint = "the loss must stay in the graph (0 * something); a constant cannot be differentiated"
    check_gradients(what, loss, {"y": y}, hint=hint)
    check(not y.grad.any(), f"{what}: expected a gradient of zeros, found others.")


def test_eq5_authors_numbers():
    # regression_loss(F.normalize(q, dim=1), F.normalize(k, dim=1), box_1, box_2, pos_ratio=0.7) of
    # the boxes (0, 0, 1, 1) and (0.25, 0.25, 0.75, 0.75): column c of view 1 and c' of view 2 are
    # positive if |2 c - c' - 3| <= 1, rows likewise. Theirs is twice Eq. 5.
    q, k = wave(4, 8, 7, 7, a=0.37)[1:2], wave(4, 8, 7, 7, a=0.53, b=0.5)[1:2]
    c = torch.arange(7)
    near = ((2 * c[:, None] - c - 3).abs() <= 1).float()  # [7, 7]
    positives = torch.kron(near, near)[None] > 0  # [1, 49, 49]
    found = 2 * consistency_loss(q, k, positives)
    check_value("Twice Eq. 5, the authors' number", found, -0.0101784933, tolerance=1e-6)


def test_eq5_equals_loops():
    y, x_prime = random_maps()
    positives = random_positives()
    expected = slow_consistency(y, x_prime, positives)
    check_value("Eq. 5 in loops", consistency_loss(y, x_prime, positives), expected)


# ------------------------------------ Eq. 6 ------------------------------------
def slow_instance(p, z_prime):
    return -sum(cosine(a, b) for a, b in zip(p, z_prime)) / len(p)


def eq6_case():
    return tensor([3, 4], [0, 2], [-1, 1]), tensor([1, 0], [0, 5], [2, 0])


# c are the three cosines.
NO_NEGATIVES = "other images are negatives; this loss has none"
EQ6_MISTAKES = {
    1.404738: "2 - 2 cos is taken; it is -cos here",  # 2 - 2 mean c
    0.702369: "1 - cos, or the mean square of the difference, is taken; it is -cos here",
    -0.892893: "the images are added; their mean is taken",  # sum c
    -0.533333: "cosines below 0 are clamped",  # (0.6 + 1 + 0) / 3
    -0.769036: "the absolute value of the cosine is taken",  # (0.6 + 1 + 0.707107) / 3
    -0.254766: "every image is compared with every other: p_n belongs to z'_n alone",
    1.177240: NO_NEGATIVES,  # -log softmax c, tau 1
    2.057961: NO_NEGATIVES,  # tau 0.3
    2.879199: NO_NEGATIVES,  # tau 0.2
    5.460591: NO_NEGATIVES,  # tau 0.1
    -3.666667: NOT_COSINES,  # p . z'
    -1.395262: "z' is not normalised",  # p . z' / |p|
    -1.333333: "p is not normalised",  # p . z' / |z'|
    -0.148816: "the mean goes over the components too: a cosine is their sum",
    -0.192619: "the vectors are normalised over the images, not over C",
    -0.288929: "the cosine is taken along the images, not along C",
    -0.360704: "one cosine is taken of the whole batch",
    0.01: "the norms are squared: the roots are missing",  # p . z' / (|p|^2 |z'|^2)
    -0.309524: "the norm is the sum of absolute values; it is the root of the squares",
}


def test_eq6_form():
    check_form("instance_loss of three images", instance_loss(*eq6_case()), [])
    check_leaves_alone("instance_loss", instance_loss, *eq6_case())


def test_eq6_by_hand():
    # Cosines of (3, 4) with (1, 0): 0.6; (0, 2) with (0, 5): 1; (-1, 1) with (2, 0): -0.707107.
    # Their mean is 0.297631.
    check_value("instance_loss by hand", instance_loss(*eq6_case()), -0.297631, EQ6_MISTAKES)


def test_eq6_of_one_hot_vectors():
    eye = torch.eye(4)
    check_value("instance_loss of equal vectors", instance_loss(eye, eye), -1)
    check_value("instance_loss of opposite vectors", instance_loss(eye, -eye), 1)
    check_value("instance_loss of orthogonal vectors", instance_loss(eye, eye.roll(1, 0)), 0)


def test_eq6_gradients():
    p, z_prime = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    p, z_prime = p.clone().requires_grad_(), z_prime.clone().requires_grad_()
    check_gradients("instance_loss", instance_loss(p, z_prime), {"p": p}, {"z'": z_prime})
    check_derivative("instance_loss", lambda p: instance_loss(p, z_prime), p)


def test_eq6_equals_loops():
    p, z_prime = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    check_value("instance_loss in loops", instance_loss(p, z_prime), slow_instance(p, z_prime))


# ------------------------------------ Momentum encoder ------------------------------------
# t is 10 / 40.
MOMENTUM_MISTAKES = {
    0.829289: "the division by 2 is missing",  # 1 - (1 - base) (cos(pi t) + 1)
    0.985355: "m falls from 1 to base; it rises",  # 1 - (1 - base) (1 - cos(pi t)) / 2
    0.925: "m rises on a straight line, not along a cosine",  # base + (1 - base) t
    0.901554: "pi is missing",  # 1 - (1 - base) (cos(t) + 1) / 2
    0.923734: "the cosine is given degrees; it takes radians",  # cos(45)
    0.9: "m stays at base, as if k / K were 0",  # k // K
    0.915364: "the step is divided by K - 1; it is divided by K",  # cos(pi 10 / 39)
    0.917528: "the steps are counted from 1; they are counted from 0",  # cos(pi 11 / 40)
    0.991464: "base is ignored: 0.99 is always used",  # base 0.99
    0.95: "a whole period is taken: pi k / K, not 2 pi k / K",  # cos(2 pi t)
    0.231802: "base is taken where 1 - base belongs",  # 1 - base (cos(pi t) + 1) / 2
    0.085355: "1 - m is returned",  # (1 - base) (cos(pi t) + 1) / 2
    0.964645: "the + 1 beside the cosine is missing",  # 1 - (1 - base) cos(pi t) / 2
    0.929289: "the + 1 and the division by 2 are missing",  # 1 - (1 - base) cos(pi t)
    0.907612: "a quarter of a period is taken, not half of one",  # 1 - (1 - base) cos(pi t / 2)
    0.938268: "a sine is taken",  # base + (1 - base) sin(pi t / 2)
    0.900001: "t is turned into radians; pi t is already",  # cos of t in degrees
}


def test_momentum_at_by_hand():
    # 1 - (1 - 0.9) * (cos(pi * 10 / 40) + 1) / 2
    found = momentum_at(10, 40, base=0.9)
    check_value("m at step 10 of 40, base 0.9", found, 0.914645, MOMENTUM_MISTAKES, 1e-6)


def test_momentum_at_rises_from_base_to_1():
    check_value("m at step 0 of 7, base 0.9", momentum_at(0, 7, base=0.9), 0.9, tolerance=1e-9)
    check_value("m at step 7 of 7", momentum_at(7, 7), 1, tolerance=1e-9)
    values = [momentum_at(step, 50) for step in range(51)]
    check(values == sorted(values), "m must rise with the step.")


def test_momentum_at_authors_numbers():
    # PixPro(...)._momentum_update_key_encoder with K = 100: 1. - (1. - 0.99) * (cos(...) + 1) / 2.
    authors = {0: 0.99, 1: 0.9900024671981713, 25: 0.9914644660940672}
    authors |= {50: 0.995, 99: 0.9999975328018287}
    for step, m in authors.items():
        what = f"The authors' m at step {step} of 100"
        check_value(what, momentum_at(step, 100), m, tolerance=1e-12)


def two_networks(trainable=False):
    """Equal networks; online weights are 1, biases 10, statistics 5; momentum 3, 20, 7."""
    networks = []
    for weight, bias, statistic in ((1.0, 10.0, 5.0), (3.0, 20.0, 7.0)):
        network = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.BatchNorm1d(1)))
        for layer in (network[0], network[1][0]):
            nn.init.constant_(layer.weight, weight)
            nn.init.constant_(layer.bias, bias)
        nn.init.constant_(network[1][0].running_mean, statistic)
        networks.append(network)
    online, momentum = networks
    online[1].requires_grad_(False)  # a layer that somebody froze
    return online, momentum.requires_grad_(trainable)


MOMENTUM_UPDATES = {
    3: "the module is not changed: p' = ... only makes a new tensor of that name",
    1.2: "m and 1 - m are exchanged",  # 0.1 * 3 + 0.9 * 1
    3.1: "p' is not multiplied by m",  # 3 + 0.1 * 1
    3.7: "p is not multiplied by 1 - m",  # 0.9 * 3 + 1
    1: "p is copied",
    3.2: "the difference has the wrong sign",  # 3 - 0.1 * (1 - 3)
    2.79: "p is added before the multiplication by m",  # 0.9 * (3 + 0.1 * 1)
}


def test_momentum_ema_update_by_hand():
    online, momentum = two_networks(trainable=True)
    weight = momentum[0].weight
    ema_update(online, momentum, 0.9)
    cause = "the online encoder is updated, not the momentum encoder"
    mistakes = dict.fromkeys((1.2, 2.8, 3), cause)
    check_value("The online encoder's weight stays", online[0].weight.item(), 1, mistakes)
    what = "0.9 * 3 + 0.1 * 1, the momentum encoder's weight"
    check_value(what, weight.item(), 2.8, MOMENTUM_UPDATES)
    check(momentum[0].weight is weight, "The parameters must be changed in place, not replaced.")
    mistakes = {20: "biases are left out: every parameter moves"}
    check_value("0.9 * 20 + 0.1 * 10, its bias", momentum[0].bias.item(), 19, mistakes)


def test_momentum_ema_update_of_every_layer():
    online, momentum = two_networks()
    ema_update(online, momentum, 0.9)
    mistakes = {3: "parameters with requires_grad = False are skipped; all of these have it"}
    what = "0.9 * 3 + 0.1 * 1, a weight of a momentum encoder without gradients"
    check_value(what, momentum[0].weight.item(), 2.8, mistakes)
    mistakes = {3: "layers inside of layers, or frozen in the online encoder, are left out"}
    what = "0.9 * 3 + 0.1 * 1, the weight of an inner layer that is frozen online"
    check_value(what, momentum[1][0].weight.item(), 2.8, mistakes)
    mistakes = {6.8: "buffers are averaged", 5: "buffers are copied"}
    what = "BatchNorm's running mean stays"
    check_value(what, momentum[1][0].running_mean.item(), 7, mistakes)


def test_momentum_ema_update_keeps_and_copies():
    for m, expected, meaning in ((1, 3, "nothing moves"), (0, 1, "p is copied")):
        online, momentum = two_networks()
        ema_update(online, momentum, m)
        check_value(f"The weight at m = {m}: {meaning}", momentum[0].weight.item(), expected)
    online[0].weight.data.fill_(8.0)
    what = "At m = 0 values are copied, not shared: the weight after the online one has changed"
    check_value(what, momentum[0].weight.item(), 1)


# ------------------------------------ Two views ------------------------------------
def coordinates_image(height, width):
    """Red is the column, green the row of each pixel, blue is 255: what is added around is not."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 255)]).to(torch.uint8)


def shown_box(view):
    """(x0, y0, x1, y1) of the crop that this view of coordinates_image shows, to about a pixel."""
    size = view.shape[1]
    cells = np.arange(size)[4:-4] + 0.5  # away from the edges, where resizing averages over less
    edges = []
    for line in (view[0].float().mean(0), view[1].float().mean(1)):
        slope, start = np.polyfit(cells, line[4:-4].numpy() + 0.5, 1)
        edges.append((start, start + slope * size))
    (x0, x1), (y0, y1) = edges
    return [x0, y0, x1, y1]


@pytest.fixture(params=[(200, 250), (250, 120)], ids=["wide", "high"])
def crops(request):
    """Forty views of one image, their boxes, and the boxes that they show."""
    torch.manual_seed(0)
    image = coordinates_image(*request.param)
    results = [TwoViews(size=56).crop(image) for _ in range(40)]
    return request.param, [(view, box, shown_box(view)) for view, box in results]


def test_views_crop_form():
    result = TwoViews(size=32).crop(coordinates_image(50, 70))
    check(result is not None, "crop returned None. Is `return` missing?")
    check_form("The view of size 32", result[0], [3, 32, 32], torch.uint8)
    check_form("Its box", result[1], [4])


def test_views_are_crops_of_the_image(crops):
    (height, width), views = crops
    image = f"the image of {width} columns and {height} rows"
    for view, _, (_, y0, _, y1) in views:
        inside = view[2].min() >= 250
        check(inside, f"A crop reaches over the edge of {image}. Perhaps h and w are exchanged.")
        check(y0 < y1, f"A view shows rows {y0:.0f} to {y1:.0f}: it must not be upside down.")


def explain_box(box, shown, width):
    """The likely reason why a box differs from what its view shows in an image of this width."""
    x0, y0, x1, y1 = shown
    left, right, top, bottom = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    w, h = right - left, bottom - top
    mistakes = {  # boxes of the crop before x0 and x1 change places
        "x0 and x1 must change places in exactly the mirrored views": (left, top, right, bottom),
        "y0 and y1 change places too": (left, bottom, right, top),
        "x and y are exchanged: get_params begins with top": (top, left, bottom, right),
        "x0 is overwritten before x1 takes it": (right, top, right, bottom),
        "x1 is overwritten before x0 takes it": (left, top, left, bottom),
        "width and height are given, not the second corner": (left, top, w, h),
        "height and width are given, not the second corner": (top, left, h, w),
        "width and height are exchanged": (left, top, left + h, top + w),
        "the box is mirrored in the image: width - x": (width - right, top, width - left, bottom),
        "the box is the view's, not the crop's": (0, 0, 56, 56),
        "the box has the view's size, not the crop's": (left, top, left + 56, top + 56),
    }
    for cause, (a, b, c, d) in mistakes.items():
        if any(np.allclose(box, edges, atol=2.5) for edges in ((a, b, c, d), (c, b, a, d))):
            return cause
    if max(abs(edge) for edge in box.tolist()) < 1.5:
        return "the box is in units of the image, not in pixels"
    return "view and box come from different draws"


def test_views_show_what_their_boxes_bound(crops):
    (_, width), views = crops
    for _, box, shown in views:
        texts = [", ".join(f"{edge:.1f}" for edge in edges) for edges in (shown, box.tolist())]
        what = f"A view shows x0, y0, x1, y1 = {texts[0]}; its box says {texts[1]}"
        same = np.allclose(box, shown, atol=2.5)
        check(same, f"{what}. Perhaps {explain_box(box, shown, width)}.")


def test_views_are_sharp(crops):
    # Each pixel of a view shows the place that its box gives it, to the pixel.
    for view, box, _ in crops[1]:
        x0, y0, x1, y1 = box.tolist()
        cells = (torch.arange(56) + 0.5) / 56
        columns, rows = x0 + (x1 - x0) * cells - 0.5, y0 + (y1 - y0) * cells - 0.5
        inner = slice(4, -4)  # away from the edges
        error = (view[0] - columns).abs()[inner, inner].max()
        error = max(error, (view[1] - rows[:, None]).abs()[inner, inner].max())
        cause = "Perhaps x1 and y1 name the last pixel inside; they are edges, left + width. Or the"
        cause += " view is not resized bilinearly."
        what = f"A pixel shows a place {error:.1f} pixels from where its box puts it."
        check(error <= 1.1, f"{what} {cause}")


def test_views_are_cropped_by_scale_and_ratio():
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    views = TwoViews(size=8, scale=(0.2, 0.5))
    boxes = torch.stack([views.crop(image)[1] for _ in range(1000)])
    left, right = boxes[:, [0, 2]].amin(1), boxes[:, [0, 2]].amax(1)
    top, bottom = boxes[:, 1], boxes[:, 3]
    inside = left.min() >= 0 and right.max() <= 400 and top.min() >= 0 and bottom.max() <= 300
    check(inside, "A crop reaches over the edge of the image.")
    width, height = right - left, bottom - top
    share, ratio = width * height / (300 * 400), width / height
    mirrored = int((boxes[:, 0] > boxes[:, 2]).sum())
    # 500, and four standard deviations of 16 around it.
    wanted = "Half of the views are mirrored (torch.rand(()) < 0.5)"
    check(437 <= mirrored <= 563, f"{wanted}; found {mirrored} of 1000.")
    wanted = "Crops of scale (0.2, 0.5) take 20% to 50% of the image's area (self.scale)"
    check(0.19 < share.min() < 0.25, f"{wanted}; the smallest of 1000 takes {share.min():.0%}.")
    check(0.45 < share.max() < 0.51, f"{wanted}; the largest of 1000 takes {share.max():.0%}.")
    wanted = "Width / height lies between 3/4 and 4/3"
    check(0.74 < ratio.min() < 0.8, f"{wanted}; the smallest of 1000 is {ratio.min():.2f}.")
    check(1.25 < ratio.max() < 1.35, f"{wanted}; the largest of 1000 is {ratio.max():.2f}.")
    # The share is uniform, mean 0.35 +- 0.0027; log ratio is, too, mean 0 +- 0.0053.
    wanted = "All shares of the area from 20% to 50% are equally likely, mean 35%"
    check(abs(share.mean() - 0.35) < 0.011, f"{wanted}; found {share.mean():.1%}.")
    wanted = "log(width / height) is uniform, mean 0: 3/4 is as likely as 4/3"
    check(abs(ratio.log().mean()) < 0.021, f"{wanted}; found {ratio.log().mean():.3f}.")
    spread = (left.std(), top.std())
    check(min(spread) > 20, "The crops lie at nearly the same place: draw their corner.")


def pairs_of(result):
    view_1, view_2, box_1, box_2 = result
    return [(view_1, box_1), (view_2, box_2)]


def test_views_of_the_smallest_image():
    view, box = TwoViews(size=8).crop(torch.zeros(3, 1, 1, dtype=torch.uint8))
    check_form("The view of an image of one pixel", view, [3, 8, 8], torch.uint8)
    check_value("Its box, sorted: the whole image", box.sort()[0], (0, 0, 1, 1))


def test_views_of_every_size():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    for size in [1, 2, 3, 6] * 10:  # the blur of large views takes up to 13 pixels
        for view, _ in pairs_of(TwoViews(size)(image)):
            check_form(f"A view of size {size}", view, [3, size, size])
            check(view.isfinite().all(), f"A view of size {size} has nan or inf.")


def test_views_stay_on_the_device_of_the_image():
    # Device meta computes shapes alone. Chance decides on a change in half of the views or fewer.
    torch.manual_seed(0)
    for _ in range(20):
        result = TwoViews(size=8)(torch.zeros(3, 20, 30, dtype=torch.uint8, device="meta"))
        for name, part in zip(("view_1", "view_2", "box_1", "box_2"), result):
            check(
                part.is_meta, f"{name} of an image on meta is on {part.device}: give image.device."
            )


def test_views_of_an_image_are_two_crops_of_the_size():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    view_1, view_2, box_1, box_2 = TwoViews(size=32)(image)
    for view, box in ((view_1, box_1), (view_2, box_2)):
        check_form("A view of size 32", view, [3, 32, 32])
        check_form("Its box", box, [4])
    check(not torch.equal(box_1, box_2), "Both views are the same crop.")
    assert TwoViews().scale == (0.08, 1.0) and TwoViews().size == 224


def test_views_of_which_only_the_second_is_solarised():
    # Of a white image no other change makes anything dark: brightness keeps at least 0.6.
    # Solarised, white is black.
    white = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    std, mean = [torch.tensor(values)[:, None, None] for values in (pixpro.STD, pixpro.MEAN)]
    torch.manual_seed(0)
    dark = [0, 0]
    for _ in range(200):
        for index, (view, _) in enumerate(pairs_of(TwoViews(size=16)(white))):
            dark[index] += bool((view * std + mean).mean() < 0.5)
    assert dark[0] == 0 and 18 <= dark[1] <= 62  # 200 x 0.2 = 40, +- 4 standard deviations of 5.7


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


def test_views_colours_are_those_of_byol():
    # BYOL's: brightness and contrast 0.4, saturation 0.2, hue 0.1 (tested above), with p = 0.8.
    views = TwoViews()
    for colour, *chances in ((views.colour_1, 1.0, 0.0), (views.colour_2, 0.1, 0.2)):
        _, jitter, gray, blurring, solarizing, _ = colour.transforms
        [order] = jitter.transforms
        brightness, contrast, saturation, hue = order.transforms
        assert brightness.brightness == contrast.contrast == pytest.approx((0.6, 1.4))
        assert saturation.saturation == pytest.approx((0.8, 1.2)) and hue is pixpro.random_hue
        for change in (brightness, contrast, saturation):  # each does one thing
            values = (change.brightness, change.contrast, change.saturation, change.hue)
            assert sum(value is not None for value in values) == 1
        assert isinstance(order, v2.RandomOrder) and isinstance(gray, v2.RandomGrayscale)
        assert blurring.transforms == [pixpro.random_blur]
        assert solarizing.threshold == pytest.approx(128 / 255)
        found = [part.p for part in (jitter, gray, blurring, solarizing)]
        assert found == [0.8, 0.2, *chances]


def test_views_are_normalised():
    gray = torch.full((3, 20, 20), 128, dtype=torch.uint8)
    steps = TwoViews().colour_1.transforms
    view = v2.Compose([steps[0], steps[-1]])(gray)
    expected = [0.074065, 0.205182, 0.426492]  # (128 / 255 - mean) / std
    assert view[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_views_follow_the_seed_and_take_pil_images():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    pixel_by_pixel = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    results = []
    for form in (image, image, pixel_by_pixel, v2.functional.to_pil_image(image)):
        torch.manual_seed(5)
        results.append(TwoViews(size=24)(form))
    for first, second, third, fourth in zip(*results):
        what = "With the same seed of torch the views must be the same"
        check(torch.equal(first, second), f"{what}. Are other random numbers used?")
        check(torch.equal(first, third), f"{what}, however a tensor lies in memory.")
        check(torch.equal(first, fourth), f"{what}, of tensors and PIL images.")
    gray = v2.functional.to_pil_image(image[:1])
    assert TwoViews(size=24)(gray)[0].shape == (3, 24, 24)


# ------------------------------------ LARS, learning rate ------------------------------------
def lars_case(steps=1, **options):
    """p = [[3, 0], [0, 4]] of norm 5, g = [[0, 8], [6, 0]] of norm 10, at rates 2, then 1."""
    p = nn.Parameter(tensor([3, 0], [0, 4]))
    optimizer = train.LARS([p], lr=2.0, **{"momentum": 0.5, "trust_coefficient": 0.01} | options)
    for _ in range(steps):
        p.grad = tensor([0, 8], [6, 0])
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1.0
    return p.detach()


LARS_MISTAKES = {
    0: "nothing happened: p = ... only gives a new tensor that name",
    -16: "the trust ratio is missing: the step is that of SGD",  # -2 * 8
    -0.32: "the trust ratio is upside down; it must be |p| / |g|",  # -2 * 8 * 0.01 * 10 / 5
    -8: "the trust coefficient is missing",  # -2 * 8 * 5 / 10
    -0.8: "the division by |g| is missing",  # -2 * 8 * 0.01 * 5
    -0.016: "the factor |p| is missing",  # -2 * 8 * 0.01 / 10
    -0.06: "the norms are those of a row, not of the whole parameter",  # -2 * 8 * 0.01 * 3 / 8
    -0.04: "the learning rate is missing, or g is multiplied by 1 - m",  # -8 * 0.005
    -0.12: "v begins as g and g is added, or it is Nesterov's",  # -2 * 8 * 0.005 * 1.5
}


def test_lars_one_step_by_hand():
    # g * 0.01 * 5 / 10 = 0.005 g; times the rate 2: 0 - 0.01 * 8 = -0.08.
    p = lars_case(weight_decay=0)
    check_value("p[0, 1] after one step without decay, by hand", p[0, 1], -0.08, LARS_MISTAKES)


LARS_DECAY_MISTAKES = {
    (3, -0.08): "the weight decay is missing",  # p - 2 * 0.005 g
    (2.97, -0.08): "the trust ratio has the norm of g before the decay is added",  # 0.005 (g + p)
    (2.98, -0.053333): "|g| + decay |p| is the denominator",  # 0.01 * 5 / (10 + 5) (g + p)
    (-3, -0.08): "the decay is added after the scaling; it comes first",  # 0.005 g + p, times 2
    (3.026833, -0.071554): "the decay has the wrong sign",  # g - p
}


def test_lars_weight_decay_by_hand():
    # g + p = [[3, 8], [6, 4]] of norm 11.1803; 2 * 0.01 * 5 / 11.1803 = 0.00894427:
    # 3 - 3 * 0.00894427 and 0 - 8 * 0.00894427.
    p = lars_case(weight_decay=1)
    what = "p[0] after one step with decay, by hand"
    check_value(what, p[0], (2.973167, -0.071554), LARS_DECAY_MISTAKES)


LARS_MOMENTUM_MISTAKES = {
    -0.120008: "v is not kept from step to step",  # -0.08 - 0.005001 * 8
    -0.160008: "the rate is inside of v, or v is not multiplied by m",  # v = (0.005 + 0.005001) g
    -0.200016: "the rate of the constructor is taken, not the group's",  # the rate 2 again
    -0.08: "the second step does nothing",
}


def test_lars_velocity_by_hand():
    # v = 0.005 g, p[0, 1] = -0.08. Then |p| = 5.001, v = 0.5 * 0.005 g + 0.005001 g = 0.007501 g,
    # and with the rate 1: -0.08 - 0.007501 * 8 = -0.140008.
    p = lars_case(steps=2, weight_decay=0)
    what = "p[0, 1] after two steps, by hand"
    check_value(what, p[0, 1], -0.140008, LARS_MOMENTUM_MISTAKES, tolerance=1e-6)


def test_lars_velocity_is_not_the_gradient():
    # The same gradient tensor is filled again, as after zero_grad(set_to_none=False).
    p = nn.Parameter(tensor([1, 1], [1, 1]))
    p.grad = torch.ones(2, 2)
    optimizer = train.LARS([p], lr=1.0, momentum=0.5, weight_decay=0)
    optimizer.step()
    before = p[0, 0].item()
    p.grad.zero_()
    optimizer.step()
    moved = p[0, 0].item() < before
    check(moved, "After a gradient of 0 v must still move p. Perhaps v is p.grad itself: copy it.")


LARS_VECTOR_MISTAKES = {
    -2: "vectors are decayed; they must take plain SGD steps",  # g = 3, then 1.5
    0.998750: "vectors are scaled; they must take plain SGD steps",  # by 0.001 * 2 / 4
    -1: "vectors have no momentum",  # 0 - 0.5 * 2
    1: "vectors are skipped",
}


def test_lars_treats_vectors_like_plain_sgd():
    # Biases, norms and ConvNeXt's scales [C, 1, 1]: at most one dimension is larger than 1. They
    # have no decay and no trust ratio. v = 2, p = 1 - 0.5 * 2 = 0; v = 0.5 * 2 + 2 = 3,
    # p = 0 - 0.5 * 3 = -1.5.
    for shape in ([4], [4, 1, 1], [1, 4]):
        p = nn.Parameter(torch.ones(shape))
        optimizer = train.LARS([p], lr=0.5, momentum=0.5, weight_decay=1.0)
        for _ in range(2):
            p.grad = torch.full(shape, 2.0)
            optimizer.step()
        what = f"Ones of shape {shape} after two steps with gradient 2, rate 0.5, momentum 0.5"
        check_value(what, p.flatten()[0], -1.5, LARS_VECTOR_MISTAKES)


def test_lars_scales_matrices_and_leaves_their_gradients_alone():
    # g = 2 + 1 * 1 = 3, times 0.001 * 2 / 6 = 0.001; 1 - 0.5 * 0.001 = 0.9995.
    p = nn.Parameter(torch.ones(1, 2, 1, 2))
    p.grad = torch.full_like(p, 2.0)
    train.LARS([p], lr=0.5, weight_decay=1.0).step()
    mistakes = {0: "it is treated like a vector: two of its dimensions are larger than 1"}
    what = "Ones of shape [1, 2, 1, 2] after a gradient of 2, rate 0.5, decay 1"
    check_value(what, p[0, 0, 0, 0], 0.9995, mistakes)
    check((p.grad == 2).all(), "step() changed p.grad in place: others read it after the step.")


def test_lars_moves_what_is_0():
    # |p| = 0 would scale the step to nothing for ever: the ratio is 1 there.
    # And the other way round, |g| = 0: eps keeps |p| / |g| finite.
    mistakes = {0: "the ratio is 0 where |p| = 0, so that p can never move: it must be 1"}
    for value, gradient, expected in ((0.0, 1.0, -0.5), (1.0, 0.0, 1)):
        p = nn.Parameter(torch.full((2, 2), value))
        p.grad = torch.full((2, 2), gradient)
        train.LARS([p], lr=0.5, weight_decay=0).step()
        what = f"A matrix of {value} after a gradient of {gradient} at rate 0.5"
        check_value(what, p[0, 0], expected, mistakes)


def test_lars_skips_parameters_without_gradient():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = train.LARS([unused, used], lr=1.0)
    optimizer.step()  # none has one
    used.grad = torch.ones(2, 2)
    optimizer.step()
    check((used < 1).all(), "The parameter with a gradient did not move.")
    check((unused == 1).all(), "The parameter without gradient moved.")


def test_lars_takes_a_closure():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = train.LARS([p], lr=1.0)

    def closure():
        check(torch.is_grad_enabled(), "A closure needs gradients: run it in torch.enable_grad().")
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    check(loss is not None, "step(closure) must call it and return its loss, found None.")
    check_value("The loss that step(closure) returns", loss, 4)
    check((p < 1).all(), "step(closure) must run the closure, and then move p.")


def test_lars_parameters_have_states_of_their_own():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = train.LARS([p, q], lr=1.0, weight_decay=0)
    for scale in (1.0, 0.0):
        p.grad, q.grad = torch.ones(2, 2), scale * torch.ones(2, 2)
        optimizer.step()
    alone = nn.Parameter(torch.ones(2, 2))
    optimizer = train.LARS([alone], lr=1.0, weight_decay=0)
    for _ in range(2):
        alone.grad = torch.ones(2, 2)
        optimizer.step()
    cause = "Do parameters share one v, or one norm?"
    check(torch.equal(p, alone), f"A parameter moves otherwise beside another one. {cause}")


def test_lars_groups_have_options_of_their_own():
    # Each option of a group acts, is saved, and is shown: the same as an optimizer of its own.
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
        check(not (q == 1).all(), "The parameters of the second group do not move.")
        check(torch.equal(q, plain), f"A group's own {name} acts otherwise than an optimizer's.")
        check(not torch.allclose(q, p, atol=1e-6), f"A group's own {name} is ignored.")


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
    cause = "v must be kept in self.state[p]"
    check(torch.equal(p, q), f"An optimizer that loads state_dict() goes on otherwise: {cause}.")


def test_lars_authors_numbers():
    # contrast.lars.LARS(torch.optim.SGD(groups, lr=0.3, momentum=0.9)), groups as from their
    # add_weight_decay: b with weight decay 0 and ignore=True, w and z with 1e-2 and ignore=False.
    w, b, z = (nn.Parameter(p) for p in (wave(5, 7, a=0.9), wave(7, a=0.4), torch.zeros(3, 3)))
    optimizer = train.LARS([w, b, z], lr=0.3, momentum=0.9, weight_decay=1e-2)
    for t in range(3):
        w.grad, b.grad = wave(5, 7, a=0.31, b=t), wave(7, a=0.71, b=t)
        z.grad = torch.full((3, 3), float(t > 0))
        optimizer.step()
    first = [0.7822871804, 0.9352322221, 0.1264628023, -0.8391467333, -0.8408296704, 0.1752143502]
    bias = [-0.8305042386, -0.2755451798, 0.8271970153, 1.8314388990, 1.9535747766, 0.9095216990]
    check_value("The authors' matrix, 6 elements", w.flatten()[:6], first, tolerance=1e-6)
    check_value("The authors' vector, 6 elements", b[:6], bias, tolerance=1e-6)
    check_value("The authors' vector, the last", b[6], -0.7446691990, tolerance=1e-6)
    check_value("The authors' matrix of zeros", z[0, 0], -0.5700899959, tolerance=1e-6)


# A run of 40 steps, 10 of them warm-up, peak 2, floor 0.1.
SCHEDULE_CASE = {"total_steps": 40, "warmup_steps": 10, "peak": 2.0, "floor": 0.1}
WARM_UP_MISTAKES = {
    1.0: "the warm-up starts at 0, not at peak / 100",  # 2 * 5 / 10
    1.2: "the warm-up starts at 0, and steps are counted from 1",  # 2 * 6 / 10
    1.208: "steps are counted from 1",  # 2 * (0.01 + 0.99 * 6 / 10)
    1.02: "the warm-up ends above the peak, by peak / 100",  # 2 * (0.01 + 5 / 10)
    1.05: "the warm-up starts at the floor, not at peak / 100",  # 0.1 + 1.9 * 5 / 10
    1.1: "the warm-up starts at a tenth of the peak",  # 2 * (0.1 + 0.9 * 5 / 10)
    1.12: "the step is divided by warmup_steps - 1",  # 2 * (0.01 + 0.99 * 5 / 9)
    0.2: "the warm-up is geometric; it is linear",  # 2 * 0.01^(1 / 2)
    2: "there is no warm-up",
}
SCHEDULE_MISTAKES = {
    1.05: "the cosine begins at step 0",  # 0.1 + 1.9 * (1 + cos(pi 20 / 40)) / 2
    1.5: "the floor is ignored, or is only the smallest value",  # 2 * (1 + cos(pi / 3)) / 2
    2.95: "the division by 2 is missing",  # 0.1 + 1.9 * (1 + cos(pi / 3))
    1.721751: "total_steps divides steps after the warm-up",  # 1.9 * (1 + cos(pi / 4)) / 2 + 0.1
    1.366667: "the rate falls on a straight line",  # 0.1 + 1.9 * 2 / 3
    1.6: "the floor is added to the whole cosine",  # 0.1 + 2 * (1 + cos(pi / 3)) / 2
    0.575: "a whole period is taken, or the rate rises",  # 0.1 + 1.9 * (1 - cos(pi / 3)) / 2
    1.947709: "pi is missing",  # 0.1 + 1.9 * (1 + cos(1 / 3)) / 2
    0.145208: "the cosine is given degrees; it takes radians",  # 0.1 + 1.9 * (1 + cos(60)) / 2
    1.745448: "a quarter of a period is taken; it is half of one",  # 0.1 + 1.9 * cos(pi / 6)
    1.436400: "steps are counted from 1",  # 0.1 + 1.9 * (1 + cos(pi 11 / 30)) / 2
    1.494988: "the last step is taken as total_steps - 1",  # 0.1 + 1.9 * (1 + cos(pi 10 / 29)) / 2
    1.050001: "the 1 beside the cosine is missing",  # 0.1 + 1.9 * cos(pi / 3)
    2: "the rate stays at the peak, as if the progress were 0",  # 10 // 30
}


def test_schedule_warm_up_by_hand():
    mistakes = {
        0: "the warm-up starts at 0, not at peak / 100",
        0.218: "steps are counted from 1",
        0.1: "the warm-up starts at the floor, not at peak / 100",
        0.2: "the warm-up starts at a tenth of the peak, not at a hundredth",
        2: "there is no warm-up",
    }
    check_value("The rate at step 0: peak / 100", train.lr_at(0, **SCHEDULE_CASE), 0.02, mistakes)
    # 2 * (0.01 + 0.99 * 5 / 10)
    what = "The rate at step 5 of 10 of warm-up"
    check_value(what, train.lr_at(5, **SCHEDULE_CASE), 1.01, WARM_UP_MISTAKES)


def test_schedule_cosine_by_hand():
    mistakes = {
        # 0.1 + 1.9 * (1 + cos(pi / 4)) / 2
        1.721751: "the cosine begins at step 0, not after the warm-up",
        2.1: "the floor is added: the cosine goes from peak to floor",
        3.9: "the division by 2 is missing",
        0.1: "the rate rises after the warm-up: the cosine's sign is wrong",
    }
    check_value("The rate at step 10, the peak", train.lr_at(10, **SCHEDULE_CASE), 2, mistakes)
    # A third of the way from step 10 to step 40: 0.1 + 1.9 * (1 + cos(pi / 3)) / 2
    what = "The rate at step 20 of 40"
    check_value(what, train.lr_at(20, **SCHEDULE_CASE), 1.525, SCHEDULE_MISTAKES)
    check_value("The rate at step 40: the floor", train.lr_at(40, **SCHEDULE_CASE), 0.1)


def test_schedule_without_warmup_and_all_warmup():
    check_value("Without warm-up, step 0: the peak", train.lr_at(0, 10, 0, peak=1.0), 1.0)
    check_value("All warm-up, step 9 of 10", train.lr_at(9, 10, 10, peak=1.0), 0.901)
    check_value("All warm-up, step 10 of 10: the peak", train.lr_at(10, 10, 10, peak=1.0), 1.0)
    check_value("A run that ends in its warm-up", train.lr_at(9, 10, 30, peak=1.0), 0.307)


def test_schedule_authors_numbers():
    # contrast.lr_scheduler.get_scheduler, 20 epochs of 10 iterations, 5 of warm-up.
    authors = {0: 0.04, 1: 0.1192, 25: 2.02, 49: 3.9208, 50: 4.0, 51: 3.999561367059349}
    authors |= {100: 3.0000002500000003, 150: 1.0000007499999994, 199: 0.0004396329406507382}
    for step, lr in authors.items():
        found = train.lr_at(step, total_steps=200, warmup_steps=50, peak=4.0)
        check_value(f"The authors' rate at step {step} of 200", found, lr, tolerance=1e-12)


# ------------------------------------------------------------------------------------------------
# From here on: not for the exercises. While an exercise is open, anything below may fail.
# ------------------------------------------------------------------------------------------------


# ------------------------------------ The whole ------------------------------------
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


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def shuffle_weights(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))


def test_whole_without_instance_weight_is_exactly_pixpro():
    model = small_pixpro(instance_weight=0.0)
    assert not any("instance" in name for name, _ in model.named_parameters())
    loss = model(*small_batch()).loss
    model = small_pixpro(instance_weight=0.5)  # the same weights: its extra heads are made last
    model.instance_weight = 0.0
    assert torch.equal(model(*small_batch()).loss, loss)


def test_whole_adds_alpha_times_the_instance_loss():
    # Projector, predictor, pooling, cosine; targets from the momentum branch of the other view.
    model = small_pixpro(instance_weight=0.5)
    shuffle_weights(model.momentum_instance_projector)  # now online and momentum differ
    view_1, view_2, *boxes = small_batch()
    with torch.no_grad():
        total = model(view_1, view_2, *boxes).loss
        model.instance_weight = 0.0
        pixel = model(view_1, view_2, *boxes).loss
        p, z = [], []
        for view in (view_1, view_2):
            projected = model.instance_projector(model.backbone(view))
            p.append(model.instance_predictor(projected).mean((2, 3)))
            z.append(model.momentum_instance_projector(model.momentum_backbone(view)).mean((2, 3)))
    expected = pixel + 0.5 * (instance_loss(p[0], z[1]) + instance_loss(p[1], z[0]))
    assert total.item() == pytest.approx(expected.item(), abs=1e-5)


def momentum_pairs(model):
    """(momentum parameter, online parameter) of all three modules."""
    for name in ("backbone", "projector", "instance_projector"):
        online, momentum = getattr(model, name), getattr(model, f"momentum_{name}")
        yield from zip(momentum.parameters(), online.parameters())


def test_whole_update_moves_every_part_of_the_encoder():
    model = small_pixpro(instance_weight=1.0)
    named_so = [name for name, _ in model.named_children() if name.startswith("momentum_")]
    assert len(named_so) == 3
    for m in (1, momentum_at(0, 10)):
        model.update_momentum(m)
        for target, online in momentum_pairs(model):
            same = torch.allclose(target, online, atol=1e-6)
            assert same, "At first both encoders are equal, and an update must keep them so."
    shuffle_weights(model)
    before = [(target.clone(), online.clone()) for target, online in momentum_pairs(model)]
    model.update_momentum(0.9)
    for (target, online), (old, old_online) in zip(momentum_pairs(model), before):
        moved = torch.allclose(target, 0.9 * old + 0.1 * old_online, atol=1e-6)
        assert moved, "A parameter of the momentum encoder is not at 0.9 p' + 0.1 p."
        assert torch.equal(online, old_online), "A parameter of the online encoder has moved."


def test_whole_target_batchnorm_keeps_statistics_of_its_own():
    model = small_pixpro()
    model.backbone.body[1].running_mean.fill_(5)
    before = model.momentum_backbone.body[1].running_mean.clone()
    model.update_momentum(0.5)
    assert torch.equal(model.momentum_backbone.body[1].running_mean, before)
    model(*small_batch())
    assert not torch.equal(model.momentum_backbone.body[1].running_mean, before)


def test_whole_target_is_of_the_other_encoder():
    model = small_pixpro(instance_weight=1.0)
    for name in ("momentum_backbone", "momentum_projector", "momentum_instance_projector"):
        before = model(*small_batch()).loss.item()
        with torch.no_grad():
            next(getattr(model, name).parameters()).mul_(-2)
        assert abs(model(*small_batch()).loss.item() - before) > 1e-5, f"{name} is not used"


def test_whole_target_has_no_gradient_and_no_online_module():
    model = small_pixpro(instance_weight=1.0)
    calls = {name: [] for name, _ in model.named_children()}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, inputs, out, name=name: calls[name].append(out.requires_grad)
        )
    model(*small_batch()).loss.backward()
    for name, gradients in calls.items():  # each sees both views
        assert gradients == [not name.startswith("momentum")] * 2, name
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith("momentum"), name
        assert (p.grad is None) == name.startswith("momentum"), name


def test_whole_authors_loss():
    # regression_loss of all four images, pos_ratio T: theirs is twice Eq. 5, and counts the fourth
    # image, which has no positive pair, as 0.
    q, k = wave(4, 8, 7, 7, a=0.37), wave(4, 8, 7, 7, a=0.53, b=0.5)
    box_1, box_2 = tensor(*AUTHORS_BOX_1), tensor(*AUTHORS_BOX_2)
    for threshold, authors in ((0.35, 0.0196905155), (0.7, 0.0099607334), (1.4, 0.0051517664)):
        positives = positive_pairs(box_1, box_2, (7, 7), threshold)
        found = 2 * consistency_loss(q, k, positives).item() * 3 / 4
        assert found == pytest.approx(authors, abs=1e-7)
    positives = positive_pairs(box_1, box_2, (7, 7), 0.7)
    for n, authors in enumerate([0.0378808081, -0.0101784933, 0.0121406186, 0.0]):
        found = 2 * consistency_loss(q[n : n + 1], k[n : n + 1], positives[n : n + 1]).item()
        assert found == pytest.approx(authors, abs=1e-7)


def authors_model():
    """The authors' network of their training example, every weight a wave."""
    conv = nn.Conv2d(3, 2048, 8, stride=8, bias=False)
    backbone = nn.Sequential(conv, nn.BatchNorm2d(2048), nn.ReLU())
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
    # Their PixPro.forward with this backbone, K = 6, and their LARS over SGD(lr=0.5, momentum=0.9).
    model = authors_model()
    optimizer = train.LARS(trained(model), lr=0.5)
    box_1 = tensor(*AUTHORS_BOX_1[:3], [0.2, 0.2, 0.6, 0.6])
    box_2 = tensor(*AUTHORS_BOX_2[:3], [0.4, 0.3, 0.8, 0.7])
    for t, authors in enumerate([0.0243279077, -0.0373621881, -0.0420739502, -0.0545188114]):
        view_1, view_2 = wave(4, 3, 32, 32, a=0.013, b=t), wave(4, 3, 32, 32, a=0.017, b=0.3 * t)
        model.update_momentum(momentum_at(t, 6))
        loss = 2 * model(view_1, view_2, box_1, box_2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(authors, abs=1e-6)


def test_whole_counts_of_random_crops():
    # 20,000 simulated pairs of crops of a 500 x 375 image gave 113.9 +- 0.3 positive pairs of 2401,
    # and 2.6% without any; one pair's standard deviation is about 42, so 1,000 pairs lie within 4.
    views = TwoViews(size=8)
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500, dtype=torch.uint8)
    boxes = [[views.crop(image)[1] for _ in range(1000)] for _ in range(2)]
    counts = positive_pairs(*map(torch.stack, boxes), (7, 7)).sum((1, 2)).float()
    assert abs(counts.mean() - 113.9) < 4 and 0.01 < (counts == 0).float().mean() < 0.05


def encoded(model, batch):
    """x and x' of both views, without gradient."""
    with torch.no_grad():
        x = [model.projector(model.backbone(view)) for view in batch[:2]]
        x_prime = [model.momentum_projector(model.momentum_backbone(view)) for view in batch[:2]]
    return x, x_prime


def test_whole_figures_are_what_they_say():
    model, batch = small_pixpro(), small_batch()
    output = model(*batch)
    A = slow_positive_pairs(*batch[2:], (3, 4), 0.7)
    assert output.pairs.item() == pytest.approx(A.sum().item() / 4)

    def both(maps, x_prime):
        forth = slow_consistency(maps[0], x_prime[1], A)
        return forth + slow_consistency(maps[1], x_prime[0], A.transpose(1, 2))

    x, x_prime = encoded(model, batch)
    with torch.no_grad():
        y = [model.propagation(one) for one in x]
    assert output.loss.item() == pytest.approx(both(y, x_prime), abs=1e-5)
    assert output.similarity.item() == pytest.approx(-both(x, x_prime) / 2, abs=1e-5)
    spreads = []
    for one in x:
        vectors = [p.numpy() / math.sqrt(float(p @ p)) for image in one for p in slow_pixels(image)]
        spreads.append(np.stack(vectors).std(0).mean() * math.sqrt(6))
    assert output.spread.item() == pytest.approx(np.mean(spreads), abs=1e-5)
    assert not any(figure.requires_grad for figure in output[1:])
    assert all(value.dim() == 0 for value in output)


def test_whole_spread_is_1_for_white_features_and_0_when_collapsed():
    model = small_pixpro()
    view_1, view_2, *boxes = small_batch(n=64)
    for features, spread in ((torch.randn(64, 6, 3, 4), 1), (torch.ones(64, 6, 3, 4), 0)):
        model.projector.forward = lambda x, features=features: features
        assert model(view_1, view_2, *boxes).spread.item() == pytest.approx(spread, abs=0.02)


def test_whole_pixcontrast_objective():
    model, batch = small_pixpro(objective="pixcontrast", temperature=0.2), small_batch()
    assert not hasattr(model, "propagation")
    A = slow_positive_pairs(*batch[2:], (3, 4), 0.7)
    x, x_prime = encoded(model, batch)
    expected = slow_pixcontrast(x[0], x_prime[1], A, 0.2)
    expected += slow_pixcontrast(x[1], x_prime[0], A.transpose(1, 2), 0.2)
    assert model(*batch).loss.item() == pytest.approx(expected, rel=1e-5)


LAYERS = {"instance_weight": 1.0, "num_layers": 2}


@pytest.mark.parametrize("options", [{}, LAYERS, {"objective": "pixcontrast"}])
def test_whole_every_parameter_is_used_and_without_overlap_too(options):
    model = small_pixpro(**options)
    view_1, view_2, box_1, box_2 = small_batch()
    for apart in (0, 1000):
        model.zero_grad()
        output = model(view_1, view_2, box_1, box_2 + apart)
        output.loss.backward()
        assert (output.pairs > 0) == (apart == 0)
        for name, p in model.named_parameters():
            assert not p.requires_grad or p.grad.isfinite().all(), name
    assert output.similarity == 0


def test_whole_one_image_in_eval_mode():
    output = small_pixpro(instance_weight=1.0).eval()(*small_batch(n=1))
    assert all(value.isfinite() for value in output)


def test_whole_one_channel_images():
    model = PixPro(SmallBackbone(channels=1), dim=6, hidden_dim=10)
    view_1, view_2, *boxes = small_batch()
    assert model(view_1[:, :1], view_2[:, :1], *boxes).loss.isfinite()


def test_whole_takes_synchronised_batchnorm():
    model = PixPro(Backbone("resnet18", "layer1"), dim=4, hidden_dim=8, num_layers=2)
    kinds = [type(module) for module in nn.SyncBatchNorm.convert_sync_batchnorm(model).modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.SyncBatchNorm) == 2 * (5 + 1) + 1  # with the PPM's


def test_whole_default_is_the_paper():
    defaults = {name: p.default for name, p in inspect.signature(PixPro).parameters.items()}
    del defaults["backbone"]
    paper = {"dim": 256, "hidden_dim": 2048, "gamma": 2, "num_layers": 1, "threshold": 0.7}
    paper |= {"instance_weight": 0, "objective": "pixpro", "temperature": 0.3}
    assert defaults == paper
    flags = {"arch": "resnet50", "layer": "layer4", "size": 224, "batch": 1024, "epochs": 100}
    flags |= {"warmup_epochs": 5, "steps": None, "lr": None, "loss_scale": 2}
    assert set(train.MODEL) == paper.keys() - {"dim"}
    flags |= {name: paper[name] for name in train.MODEL}
    flags["crop_scale"] = TwoViews().scale[0]
    flags["ema_momentum"] = inspect.signature(momentum_at).parameters["base"].default
    assert vars(train.parse(["--data", "x"])).items() >= flags.items()
    assert vars(train.parse([])).items() >= (flags | train.DEMO).items()
    tau = inspect.signature(pixcontrast_loss).parameters["temperature"].default
    assert tau == defaults["temperature"]
    ppm = inspect.signature(PixelPropagation).parameters.values()
    assert [p.default for p in ppm] == [defaults[name] for name in ("dim", "gamma", "num_layers")]
    lars = train.LARS([torch.zeros(1)], lr=1.0).defaults
    assert (lars["momentum"], lars["weight_decay"]) == (0.9, 1e-5)
    assert (lars["trust_coefficient"], lars["eps"]) == (1e-3, 1e-8)


class SmallPyramid(SmallBackbone):
    """Three maps from fine to coarse, as torchvision's FPN backbones return them."""

    level = None  # a name: this map alone

    def forward(self, image):
        fine = self.body(image)  # [N, 8, H, W]
        coarse = F.avg_pool2d(fine, 2, ceil_mode=True)
        maps = {"0": fine, "1": coarse, "pool": F.max_pool2d(fine, 3)}
        return maps if self.level is None else maps[self.level]


def test_whole_several_levels():
    """Loss and figures are means over the levels; the instance branch reads the coarsest."""
    torch.manual_seed(0)
    options = {"dim": 6, "hidden_dim": 10, "instance_weight": 0.5}
    pyramid, one = [kind(SmallPyramid(), **options).eval() for kind in (PixProOnLevels, PixPro)]
    one.load_state_dict(pyramid.state_dict())
    batch, outputs = small_batch(), []
    for level in ("0", "1", "pool"):
        one.backbone.level = one.momentum_backbone.level = level
        one.instance_weight = 0.0
        outputs.append(torch.stack(one(*batch)))
    mean = torch.stack(outputs).mean(0)
    one.instance_weight = 0.5
    instance = one(*batch).loss - outputs[-1][0]
    found = pyramid(*batch)
    expected = mean + torch.stack([instance, *torch.zeros(3)])
    assert torch.allclose(torch.stack(found), expected, atol=1e-5)
    found.loss.backward()
    assert not any(figure.requires_grad for figure in found[1:])


def test_whole_compiles_in_one_graph():
    torch.compiler.reset()
    model = small_pixpro(instance_weight=1.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, output = model(*small_batch()).loss, compiled(*small_batch()).loss
    assert torch.allclose(output, expected, atol=1e-6)
    output.backward()


def test_whole_loop_of_the_docstring_runs():
    # cleandoc, as from Python 3.13 on a docstring comes without its indentation
    loop = re.search(r"\n\n((?: {4}.*\n)+)", inspect.cleandoc(PixPro.__doc__))[1]
    assert loop.count("\n") == 6
    first, model = small_pixpro(), small_pixpro()
    names = {"model": model, "loader": [small_batch(), small_batch(seed=1)], "total_steps": 2}
    names["optimizer"] = torch.optim.SGD(trained(model), lr=0.1)
    exec(textwrap.dedent(loop), vars(pixpro) | names)
    parts = first.projector, model.projector, model.momentum_projector
    values = {part[0].weight[0, 0, 0, 0].item() for part in parts}
    assert len(values) == 3  # both have moved, by different amounts


WAITING = {"item", "tolist", "numpy", "cpu", "nonzero", "equal", "allclose", "masked_select"}
WAITING |= {"unique", "__bool__", "__float__", "__int__", "__index__"}


class NoWaiting(TorchFunctionMode):
    """Fails at functions for which a GPU's results must reach the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name == "__getitem__" else None
        masks = torch.is_tensor(index) and index.dtype == torch.bool
        assert name not in WAITING and not masks, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"instance_weight": 1.0}, {"objective": "pixcontrast"}])
def test_whole_step_never_waits_for_the_device(options):
    model, batch = small_pixpro(**options), small_batch()
    optimizer = train.LARS(trained(model), lr=1.0)
    with NoWaiting():
        model.update_momentum(0.99)
        loss = model(*batch).loss
        loss.backward()
        optimizer.step()
        for waiting in (loss.item, loss.__bool__, lambda: batch[0][batch[0] > 0]):
            with pytest.raises(AssertionError, match="waits for the device"):
                waiting()


@pytest.mark.parametrize("options", [LAYERS, {"objective": "pixcontrast"}])
def test_whole_step_on_another_device(options, monkeypatch):
    """On device meta, which computes shapes alone: a tensor that is left on the CPU shows."""

    def without(*arguments, **flags):
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", without)  # it knows no meta
    model = small_pixpro(**options).to("meta")
    batch = [part.to("meta") for part in small_batch()]
    optimizer = train.LARS(trained(model), lr=1.0)
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
    "positive_pairs": lambda: (random_boxes(3, seed=1), random_boxes(3, seed=2), (2, 3)),
    "pixcontrast_loss": lambda: (*random_maps(), random_positives()),
    "PixelPropagation": lambda: (random_maps()[0],),
    "consistency_loss": lambda: (*random_maps(), random_positives()),
    "instance_loss": lambda: tuple(x[:, :, 0, 0] for x in random_maps()),
    "momentum_at": lambda: (3, 10),
}
# Numbers as ids, so that no test has the word of another group in its name.
every_function = pytest.mark.parametrize("name", FUNCTIONS, ids=range(len(FUNCTIONS)))


def function_of(module, name):
    if name == "PixelPropagation":
        torch.manual_seed(0)
        return module.PixelPropagation(dim=5)
    return getattr(module, name)


@every_function
def test_whole_copies_into_another_file(name):
    """The function and the helpers that it names, at most three, need only torch and math."""
    nodes = ast.parse(inspect.getsource(pixpro)).body
    definitions = {node.name: node for node in nodes if hasattr(node, "name")}
    needed, queue = {}, [name]
    while queue:
        current = queue.pop(0)
        node = needed[current] = definitions[current]
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        queue += sorted(names & definitions.keys() - needed.keys() - set(queue))
    assert len(needed) <= 4
    other = types.ModuleType("other")
    imports = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    exec(imports + "\n".join(ast.unparse(node) for node in needed.values()), other.__dict__)
    expected, found = [function_of(m, name)(*FUNCTIONS[name]()) for m in (pixpro, other)]
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@every_function
def test_whole_function_compiles(name):
    torch.compiler.reset()
    function = function_of(pixpro, name)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    expected, found = function(*FUNCTIONS[name]()), compiled(*FUNCTIONS[name]())
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@every_function
def test_whole_function_in_half_precision(name, dtype):
    """Under autocast the losses compute in float32, Eq. 3's product in half precision."""
    function, arguments = function_of(pixpro, name), FUNCTIONS[name]()
    expected = torch.as_tensor(function(*arguments)).float()
    half = []
    for part in arguments:
        is_map = torch.is_tensor(part) and part.is_floating_point() and name != "positive_pairs"
        half.append(part.to(dtype) if is_map else part)
    with torch.autocast("cpu", dtype):
        found, from_half = torch.as_tensor(function(*arguments)), torch.as_tensor(function(*half))
    tolerance = 0.03 if name == "PixelPropagation" else 1e-6
    assert torch.allclose(found.float(), expected, atol=tolerance)
    assert torch.allclose(from_half.float(), expected, atol=0.03)
    if name == "PixelPropagation":
        assert found.dtype == from_half.dtype == dtype
    if name.endswith("loss"):
        assert any(part.dtype == dtype for part in half if torch.is_tensor(part))
        assert found.dtype == from_half.dtype == torch.float32


LOSSES = [name for name in FUNCTIONS if name.endswith("loss")]
every_loss = pytest.mark.parametrize("name", LOSSES, ids=range(3))


@every_loss
def test_whole_losses_take_vectors_of_zeros(name):
    x, x_prime, *positives = FUNCTIONS[name]()
    x = x.clone()
    x[0] = 0
    x.requires_grad_()
    loss = getattr(pixpro, name)(x, x_prime, *positives)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


@every_loss
def test_whole_losses_take_large_numbers_of_float16(name):
    # 700^2 = 490,000 overflows float16 (65,504): the products are computed in float32.
    function, arguments = getattr(pixpro, name), FUNCTIONS[name]()
    large = [(700 * part).half() if part.is_floating_point() else part for part in arguments]
    with torch.autocast("cpu", torch.float16):
        found = function(*large)
    assert found.item() == pytest.approx(function(*arguments).item(), abs=1e-3)


def test_words_select_their_own_groups():
    groups = [exercise.tests for exercise in EXERCISES.values()]
    words = {word for tests in groups for word in tests.split(" or ")} | {"train"}
    names = [name for name in globals() if name.startswith("test_")]
    for name in names:
        assert sum(word in name for word in words) <= 1, name
    for word in words:
        assert sum(word in name for name in names) >= 3, word


# ------------------------------------ Networks ------------------------------------
def test_backbone_has_torchvisions_names():
    for layer, above in (("layer4", {"fc"}), ("layer3", {"layer4", "fc"})):
        backbone, network = Backbone("resnet18", layer), torchvision.models.resnet18(weights=None)
        missing, unexpected = network.load_state_dict(backbone.body.state_dict(), strict=False)
        assert not unexpected and {name.split(".")[0] for name in missing} == above
        x = torch.randn(2, 3, 64, 64)
        up_to = nn.Sequential(*list(network.children())[: -2 if layer == "layer4" else -3])
        with torch.no_grad():
            assert torch.equal(backbone.eval()(x), up_to.eval()(x))


def test_backbone_of_any_architecture():
    for arch, layer, channels in (
        ("resnet18", "layer1", 64),
        ("mobilenet_v3_small", "features", 576),
        ("convnext_tiny", "features.3", 192),
    ):
        backbone = Backbone(arch, layer)
        assert backbone.out_channels == channels and backbone.training
        assert backbone(torch.randn(2, 3, 64, 96)).shape[1] == channels


def test_backbone_leaves_no_trace():
    torch.manual_seed(0)
    # with dropout, stochastic depth and BatchNorm
    network = torchvision.models.get_model("efficientnet_b0", weights=None)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    backbone = Backbone("efficientnet_b0", "features")
    assert torch.equal(torch.get_rng_state(), state)
    weights = network.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in backbone.body.state_dict().items())
    assert all(module.training for module in backbone.modules())


def test_backbone_starts_residual_blocks_at_zero():
    for arch, last in (("resnet18", "bn2"), ("resnext50_32x4d", "bn3")):
        block = Backbone(arch).body.get_submodule("layer1.0")
        assert not getattr(block, last).weight.any() and block.bn1.weight.all()


def test_projection_head():
    head = projection_head(4, 6, 5)
    assert [type(layer).__name__ for layer in head] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert head(torch.randn(2, 4, 3, 2)).shape == (2, 5, 3, 2)
    assert head[0].weight.shape == (6, 4, 1, 1) and head[3].bias.shape == (5,)


def levels_of(heads, fpn, tower, image):
    """The levels P3 to P6 of another network's FPN behind its tower, beside those of heads."""
    with torch.no_grad():
        ours, theirs = heads(image), fpn(image)
        assert list(ours) == ["0", "1", "2", "p6"]
        return [(level, tower(theirs[name])) for name, level in ours.items()]


def test_heads_load_into_the_detectors_of_torchvision():
    """Strictly, and the features stay the same."""
    torch.manual_seed(0)
    heads, image = Heads("resnet50"), torch.rand(2, 3, 128, 160)
    heads(image)  # moves BatchNorm's statistics
    heads.eval()
    none = {"weights": None, "weights_backbone": None}
    fcos = detection.fcos_resnet50_fpn(**none, num_classes=5, min_size=128).eval()
    towers = fcos.head.classification_head.conv, fcos.head.regression_head.conv
    for ours, theirs in levels_of(heads, fcos.backbone, towers[0][:9], image):
        assert ours.shape == theirs.shape and not torch.allclose(ours, theirs, atol=0.1)
    weights = heads.state_dict()
    fpn = {name: w for name, w in weights.items() if not name.startswith("tower.")}
    fcos.backbone.load_state_dict(fpn)
    for tower in towers:
        tower[:9].load_state_dict(heads.tower.state_dict())
        for ours, theirs in levels_of(heads, fcos.backbone, tower[:9], image):
            assert torch.equal(ours, theirs)
    faster = detection.fasterrcnn_resnet50_fpn(**none).eval()
    faster.backbone.body.load_state_dict(heads.body.state_dict())
    with torch.no_grad():
        assert torch.equal(heads.body(image)["2"], faster.backbone.body(image)["3"])  # both C5


def test_heads_share_everything_between_four_levels():
    torch.manual_seed(0)
    heads = Heads("resnet18")
    model = PixProOnLevels(heads, dim=6, hidden_dim=10, instance_weight=1.0)
    view_1, view_2 = torch.rand(2, 4, 3, 64, 64)
    box = random_boxes(4, seed=0)
    output = model(view_1, view_2, box, box)
    shapes = [tuple(level.shape[1:]) for level in heads(view_1).values()]
    assert shapes == [(256, 8, 8), (256, 4, 4), (256, 2, 2), (256, 1, 1)]
    # more than the mean over the levels, if each pixel were positive for itself alone
    assert output.pairs.item() > (64 + 16 + 4 + 1) / 4
    output.loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    without = {name for name in without if not name.startswith("momentum_")}
    assert without == {f"backbone.fpn.extra_blocks.p7.{kind}" for kind in ("weight", "bias")}
    assert not any(p.requires_grad for p in heads.fpn.extra_blocks.p7.parameters())
    last = [block.bn2.weight for block in heads.body.modules() if hasattr(block, "bn2")]
    assert len(last) == 8 and not any(weight.any() for weight in last)  # blocks begin at zero


def test_whole_takes_the_fpn_of_torchvision():
    """Its detection backbones need no wrapper: they have `out_channels` and return maps."""
    torch.manual_seed(0)
    options = {"weights": None, "norm_layer": nn.BatchNorm2d, "trainable_layers": 5}
    fpn = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", **options)
    model = PixProOnLevels(fpn, dim=6, hidden_dim=10)
    box = random_boxes(2, seed=0)
    model(*torch.rand(2, 2, 3, 64, 64), box, box).loss.backward()
    assert all(p.grad is not None for p in trained(model))


# Calls that do not fit: the error, its words, and the call.
REFUSALS = [
    (TypeError, "found torch.float32", lambda: TwoViews()(torch.zeros(3, 20, 20))),
    (TypeError, "found <class 'str'>", lambda: TwoViews()("image.jpg")),
    (ValueError, r"found \[1, 4, 4\]", lambda: TwoViews()(torch.zeros(1, 4, 4).byte())),
    (ValueError, r"\[2, 4\], \[1, 4\]", lambda: pairs_of_boxes(2, 1)),
    (ValueError, "threshold >= 0, found -1", lambda: pairs_of_boxes(1, 1, -1)),
    (ValueError, "threshold >= 0, found nan", lambda: pairs_of_boxes(1, 1, math.nan)),
    (ValueError, "temperature > 0, found 0", lambda: losses_of(random_positives(), temperature=0)),
    (ValueError, r"\[3, 6, 6\] .* \[3, 5, 6\]", lambda: losses_of(random_positives(size=(5, 6)))),
    (TypeError, "bool, found torch.float32", lambda: losses_of(random_positives().float())),
    (ValueError, r"\[3, 5, 2, 3\], \[2, 5, 2, 3\]", lambda: losses_of(random_positives(), n=2)),
    (TypeError, "torch.bool", lambda: losses_of(random_positives().float(), 3, consistency_loss)),
    (ValueError, r", \[2, 5", lambda: losses_of(random_positives(), 2, consistency_loss)),
    (ValueError, r"\[N, 8, H, W\], found \[3, 5", lambda: PixelPropagation(8)(random_maps()[0])),
    (ValueError, "num_layers >= 0, found 2.0, -1", lambda: PixelPropagation(num_layers=-1)),
    (ValueError, "gamma > 0", lambda: PixelPropagation(gamma=0)),
    (ValueError, r"\[2, 3\] and \[3, 3\]", lambda: instance_loss(torch.eye(2, 3), torch.eye(3))),
    (ValueError, "from 0 to total_steps, found -1 of 10", lambda: momentum_at(-1, 10)),
    (ValueError, "from 0 to total_steps, found 11 of 10", lambda: momentum_at(11, 10)),
    (ValueError, "from 0 to total_steps, found 0 of 0", lambda: momentum_at(0, 0)),
    (ValueError, r"m in \[0, 1\], found -0.1", lambda: ema_update(*two_networks(), -0.1)),
    (ValueError, r"m in \[0, 1\], found 1.1", lambda: ema_update(*two_networks(), 1.1)),
    (ValueError, r"m in \[0, 1\], found nan", lambda: ema_update(*two_networks(), math.nan)),
    (ValueError, "shorter", lambda: ema_update(nn.Linear(1, 1), nn.Linear(1, 1, bias=False), 0.9)),
    (ValueError, "classification network .* 'resnet5'", lambda: Backbone("resnet5")),
    (ValueError, "found 'deeplabv3_resnet50'", lambda: Backbone("deeplabv3_resnet50")),  # downloads
    (ValueError, "'layer_4' is not present", lambda: Backbone("resnet18", "layer_4")),
    (ValueError, r"found 'encoder' \[1, 50, 768\]", lambda: Backbone("vit_b_32", "encoder")),
    (ValueError, r"swin_t .* \[1, 7, 7, 768\], 0 un", lambda: Backbone("swin_t", "features")),
    (ValueError, r"\[1, 768, 14, 14\], 134 unused", lambda: Backbone("vit_b_16", "conv_proj")),
    (ValueError, "ResNet of torchvision, found 'vgg16'", lambda: Heads("vgg16")),
    (ValueError, "found 'resnet_50'", lambda: Heads("resnet_50")),
    (ValueError, "found 'fcos_resnet50_fpn'", lambda: Heads("fcos_resnet50_fpn")),
    (ValueError, "found 'simsiam'", lambda: small_pixpro(objective="simsiam")),
    (TypeError, "PixProOnLevels", lambda: PixPro(SmallPyramid(), 6, 10)(*small_batch())),
    (ValueError, "threshold >= 0, found -1", lambda: small_pixpro(threshold=-1)(*small_batch())),
    (ValueError, r"\[4, 12, 15\] for the maps", lambda: other_view(12, 20)),  # maps 3 x 4, 3 x 5
    (ValueError, r"\[4, 12, 16\] for the maps", lambda: other_view(16, 16)),
    (ValueError, r"\[4, 12, 12\] .*nd \[1", lambda: small_pixpro()(*small_batch()[:2], BOX, BOX)),
    (ValueError, r"\[4, 4\], \[1, 4\]", lambda: small_pixpro()(*small_batch()[:3], BOX)),
]
BOX = tensor([0, 0, 10, 10])  # one crop pair for a whole batch


def pairs_of_boxes(n_1, n_2, threshold=0.7):
    positive_pairs(torch.zeros(n_1, 4), torch.zeros(n_2, 4), (7, 7), threshold)


def losses_of(positives, n=3, loss=pixcontrast_loss, **options):
    x, x_prime = random_maps()
    loss(x, x_prime[:n], positives, **options)


def other_view(height, width):
    view_1, _, *boxes = small_batch()
    small_pixpro()(view_1, torch.zeros(4, 3, height, width), *boxes)


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_whole_refuses_what_does_not_fit(number):
    error, message, call = REFUSALS[number]
    with pytest.raises(error, match=message):
        call()


# ------------------------------------ Training runs ------------------------------------
@pytest.fixture
def photographs(tmp_path):
    """A folder of twelve small images in subfolders, of several formats."""
    folder = tmp_path / "photographs"
    for number in range(12):
        generator = torch.Generator().manual_seed(number)
        image = torch.randint(0, 256, (3, 40, 30 + number), generator=generator)
        path = folder / f"kind {number % 3}" / f"{number}.{['png', 'jpg', 'bmp'][number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        v2.functional.to_pil_image(image.to(torch.uint8)).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / "._0.jpg").write_text("what another system leaves behind")
    return folder


SMALL = ["--arch", "resnet18", "--layer", "layer2", "--size", "32", "--batch", "4"]
SMALL += ["--hidden-dim", "32", "--amp", "off", "--device", "cpu", "--workers", "1"]
WRITTEN = ["backbone.pt", "features.png", "last.pt", "lock", "metrics.jsonl"]


def run_main(out, *flags):
    train.main([*SMALL, "--out", str(out), *map(str, flags)])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def checkpoint(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_run(a, b):
    one, two = checkpoint(a)["model"], checkpoint(b)["model"]
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


@pytest.fixture
def often(monkeypatch):
    """Every step is recorded and saved."""
    monkeypatch.setattr(train, "RECORD_STEPS", 1)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(train, "SCENES", 8)
    monkeypatch.setattr(train, "PROBE_SCENES", 6)


def test_train_on_scenes_writes_everything(few_scenes, tmp_path, capsys):
    run_main(tmp_path, "--steps", 12, "--lr", 1, "--keep", 6)
    printed = capsys.readouterr().out
    probes = re.findall(r"linear probe, mIoU (\d+\.\d): (.+)", printed)
    names = ["random, as the recipe starts it", "random, with its residual blocks switched on"]
    assert [name for _, name in probes] == [*names, "pre-trained"]
    assert len({miou for miou, _ in probes}) == 3 and "\n12/12 loss " in printed
    about = f"{tmp_path}: resnet18 on 8 images (left out: nothing), cpu, off, step 0"
    assert printed.startswith(f"{about}\n")
    records = metrics(tmp_path)
    assert [record["step"] for record in records] == [10, 12]
    figures = ["step", "loss", "similarity", "pairs", "spread", "lr", "m"]
    assert list(records[0]) == figures  # no wall-clock figures
    assert records[1]["m"] == momentum_at(11, 12)
    before = contents(tmp_path)
    assert sorted(before) == ["backbone-12.pt", "backbone-6.pt", *WRITTEN]
    assert before["backbone-12.pt"] == before["backbone.pt"] != before["backbone-6.pt"]
    run_main(tmp_path, "--steps", 12, "--lr", 1)  # nothing is left to do
    assert contents(tmp_path) == before
    network = torchvision.models.resnet18(weights=None)
    weights = torch.load(tmp_path / "backbone.pt", weights_only=True)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"layer3", "layer4", "fc"}


def test_train_with_heads(few_scenes, tmp_path):
    run_main(tmp_path, "--heads", "--size", 64, "--steps", 2)
    heads = Heads("resnet18")
    heads.load_state_dict(torch.load(tmp_path / "heads.pt", weights_only=True))
    model = checkpoint(tmp_path)["model"]
    assert all(torch.equal(w, model[f"backbone.{name}"]) for name, w in heads.state_dict().items())
    network = torchvision.models.resnet18(weights=None)
    body = torch.load(tmp_path / "backbone.pt", weights_only=True)
    missing, unexpected = network.load_state_dict(body, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


class Killed(Exception):
    pass


def run_killed_at(killed, monkeypatch, out, *flags):
    """A run that dies after this step and what follows it, its record and checkpoint."""

    def dying(step, *arguments):
        if step == killed:
            raise Killed
        return momentum_at(step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "momentum_at", dying)
        run_main(out, *flags)


INSTANCE = ["--amp", "bf16", "--instance-weight", 1, "--num-layers", 2]


@pytest.mark.parametrize("flags", [[], INSTANCE, ["--objective", "pixcontrast"]])
def test_train_continues_bit_for_bit(photographs, tmp_path, monkeypatch, flags, capsys):
    monkeypatch.setattr(train, "RECORD_STEPS", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    flags = ["--data", photographs, "--steps", 6, "--lr", 1, *flags]
    run_main(tmp_path / "whole", *flags)
    run_killed_at(4, monkeypatch, tmp_path / "killed", *flags)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # what a kill in the middle of writing leaves
    run_main(tmp_path / "killed", *flags, "--workers", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    run_main(tmp_path / "killed", *flags)
    printed = capsys.readouterr().out
    assert "complete: 6 steps" in printed.splitlines()[-1]
    assert "probe" not in printed  # there are no masks


def test_train_continues_at_the_step_that_was_saved(photographs, tmp_path, monkeypatch, often):
    """m goes on, too; records that are lost stay lost; without a checkpoint all begins anew."""
    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 5, "--ema-momentum", 0.9]
    used, update = [], PixPro.update_momentum
    run_killed_at(3, monkeypatch, out, *flags)
    (out / "metrics.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(PixPro, "update_momentum", lambda *a: (used.append(a[1]), update(*a)))
        run_main(out, *flags)
    assert used == [momentum_at(3, 5, base=0.9), momentum_at(4, 5, base=0.9)]
    assert [record["step"] for record in metrics(out)] == [4, 5]
    run_killed_at(2, monkeypatch, tmp_path / "anew", *flags)
    (tmp_path / "anew" / "last.pt").unlink()
    run_main(tmp_path / "anew", *flags)
    assert [record["step"] for record in metrics(tmp_path / "anew")] == [1, 2, 3, 4, 5]


def gradients(height=40, width=60):
    """Red grows downward, green to the right, so that turning and scaling show: uint8 [h, w, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y // height, 255 * x // width, 128 + 0 * x], 2).astype(np.uint8)


def test_train_reads_every_kind_of_image_as_what_it_shows(tmp_path, capfd):
    image = PIL.Image.fromarray(gradients())
    gray, rgb = image.convert("L"), np.asarray(image)
    gray_rgb = np.asarray(gray.convert("RGB"))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees
    frames = {"save_all": True, "append_images": [image.rotate(180)]}
    kinds = {
        "gray.png": (gray, {}, gray_rgb),
        "gray.jpg": (gray, {}, gray_rgb),
        "palette.png": (image.quantize(256), {}, rgb),
        "alpha.png": (image.convert("RGBA"), {}, rgb),
        "cmyk.jpg": (image.convert("CMYK"), {}, rgb),
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
    data = tmp_path / "data"
    data.mkdir()
    for name, (picture, options, expected) in kinds.items():
        picture.save(data / name, **options)
        found = train.load_image(data / name)
        assert found.mode == "RGB" and np.asarray(found).shape == expected.shape, name
        error = np.abs(np.asarray(found).astype(float) - expected).mean()
        assert error < 6, name  # JPEG and palettes are not exact
    run_main(tmp_path / "out", "--data", data, "--steps", 4, "--batch", 8)
    assert "warning" not in capfd.readouterr().out


def test_train_stretches_more_than_8_bits(tmp_path):
    # Of 0, 1, ... 999 and a hot pixel the percentiles 0.1 and 99.9 are 1 and 999: 250 becomes
    # 255 * 249 / 998. Where they are equal, the extremes count, 0 and 10; one value is black.
    ramp, places = np.append(np.arange(1000), 9999).reshape(77, 13), [0, 250, 500, 750, 1000]
    extremes = np.full((77, 26), 5)
    extremes.flat[[0, 250]] = 0, 10
    for name, values, expected in (
        ("uint16.png", ramp.astype(np.uint16), [0, 63, 127, 191, 255]),
        ("float.tif", (ramp / 1000).astype(np.float32), [0, 63, 127, 191, 255]),
        ("extremes.png", extremes.astype(np.uint16), [0, 255, 127, 127, 127]),
        ("one.png", np.full((77, 13), 7, np.uint16), [0, 0, 0, 0, 0]),
    ):
        PIL.Image.fromarray(values).save(tmp_path / name)
        found = np.asarray(train.load_image(tmp_path / name))
        assert found.shape == (*values.shape, 3) and (found == found[:, :, :1]).all(), name
        assert found[:, :, 0].flatten()[places].tolist() == expected, name


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


def test_train_replaces_what_cannot_be_read(spoiled, tmp_path, monkeypatch, capfd, often):
    out, flags = tmp_path / "out", ["--data", spoiled, "--steps", 12]  # 48 samples, 17 an epoch
    run_main(out, *flags)
    printed = capfd.readouterr().out
    warned = re.findall(r"warning: cannot read (.+?): (.+); the next sample is used", printed)
    reasons = {Path(path).name: reason.partition("(")[0] for path, reason in warned}
    unknown = dict.fromkeys(["page.jpg", "empty.png", "ü.webp"], "UnidentifiedImageError")
    assert reasons == {"half.jpg": "OSError", "broken link.jpg": "FileNotFoundError"} | unknown
    assert sorted(contents(out)) == WRITTEN
    run_killed_at(6, monkeypatch, tmp_path / "killed", *flags)
    run_main(tmp_path / "killed", *flags, "--workers", 2)
    assert_same_run(out, tmp_path / "killed")


def test_train_sample_is_the_next_one_that_can_be_read(spoiled, capsys):
    names, _ = train.find_images(spoiled)
    samples = train.Samples(names, TwoViews(16), 0, spoiled)
    drawn = [samples[n] for n in range(len(names) + 1)]
    replaced = [n for n in range(len(names)) if torch.equal(drawn[n][0], drawn[n + 1][0])]
    order = np.random.default_rng([0, 0]).permutation(len(names))  # epoch 0 of seed 0
    warned = capsys.readouterr().out
    paths = [spoiled / os.fsdecode(names[order[n]]) for n in replaced]
    assert len(paths) == 5 and all(f"read {path}: " in warned for path in paths)
    assert samples.image(replaced[0])[1] > replaced[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_train_stops_after_ten_images_in_a_row_that_cannot_be_read(tmp_path, workers, capfd):
    (tmp_path / "data").mkdir()
    for number in range(12):
        (tmp_path / "data" / f"bad {number}.png").write_text("no image")
    message = r"ten images in a row cannot be read; the last: cannot read .+png: Unidentified"
    with pytest.raises(RuntimeError, match=message):
        flags = ["--data", tmp_path / "data", "--steps", 4, "--batch", 2, "--workers", workers]
        run_main(tmp_path / "out", *flags)
    assert capfd.readouterr().out.count("warning: cannot read") >= 10


def test_train_finds_images_and_nothing_else(tmp_path):
    images = ["a.PNG", "b.jpg", "c.avif", "sub/c.tiff", "sub/deep er/ü.gif"]
    images += ["album.jpg/h.jpg"]  # a folder of that name is no image
    others = ["notes.txt", "sub/more.txt", "d.HEIC", "LICENSE", ".hidden.jpg"]
    others += [".cache/f.jpg", "sub/.git/g.png"]  # folders that are passed over
    for name in [*images, *others]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for folder in (tmp_path, f"{tmp_path}/"):
        names, left_out = train.find_images(folder)
        assert [os.fsdecode(name) for name in names] == sorted(images)
        assert left_out == {".txt": 2, ".heic": 1, "without ending": 1, "hidden": 3}


@pytest.mark.parametrize("file", ["last.pt", "metrics.jsonl"])
def test_train_keeps_its_state_on_a_full_disk(photographs, tmp_path, monkeypatch, file, often):
    # A limit on the size of files fails as a full disk does, midway.
    resource = pytest.importorskip("resource")
    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 4]
    run_main(tmp_path / "whole", *flags)
    run_killed_at(2, monkeypatch, out, *flags)
    before = (out / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = len(before) // 2 if file == "last.pt" else len(contents(out)[file]) + 20
    message = r"cannot write .*last.pt; is the disk full\?" if file == "last.pt" else "too large"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(OSError, match=message):
            run_main(out, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "last.pt").read_bytes() == before
    run_main(out, *flags)
    assert_same_run(tmp_path / "whole", out)


class Code:
    def __reduce__(self):
        return (print, ("this code must not run",))


# What replaces last.pt, made from a whole one.
NO_CHECKPOINTS = {
    "another program": lambda whole: {"epoch": 3, "state_dict": whole["model"]},
    "weights alone": lambda whole: whole["model"],
    "code": lambda whole: whole | {"step": Code()},
    "text": lambda whole: b"no checkpoint",
    "empty": lambda whole: b"",
    "truncated": lambda whole: None,
}


def test_train_refuses_what_is_no_checkpoint(photographs, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 1]
    run_main(out, *flags)
    whole, written = checkpoint(out), contents(out)["last.pt"]
    for replace in NO_CHECKPOINTS.values():
        other = replace(whole)
        if isinstance(other, dict):
            torch.save(other, out / "last.pt")
        else:
            (out / "last.pt").write_bytes(written[:-1000] if other is None else other)
        assert_refused(capsys, out, flags, "expected a checkpoint of train.py, found")


def assert_refused(capsys, out, flags, message):
    """The command ends with code 2 and one sentence, and changes nothing."""
    before = contents(out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(out, *flags)
    printed = capsys.readouterr()
    error = printed.err.splitlines()
    assert stop.value.code == 2 and message in error[-1] and len(error) <= 2
    assert "must not run" not in printed.out
    assert contents(out) == before


def test_train_refuses_other_settings(photographs, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 2]
    run_main(out, *flags)
    for more, message in (
        (["--gamma", 1, "--seed", 3], "gamma was 2.0, is 1.0; seed was 0, is 3"),
        (["--arch", "resnet34"], "arch was resnet18, is resnet34"),
        (["--layer", "layer9"], "'layer9' is not present in model"),
        (["--batch", 5000], "expected a batch of at most 12 images"),
        (["--data", "nowhere"], "No such file or directory: 'nowhere/'"),
    ):
        assert_refused(capsys, out, [*flags, *more], message)
    (photographs / "kind 0" / "0.png").rename(photographs / "kind 0" / "renamed.png")
    assert_refused(capsys, out, flags, "last.pt, but file_names was ")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--arch", "resnet19"], "classification network of torchvision, found 'resnet19'"),
        (["--arch", "alexnet", "--layer", "features"], "Output size is too small"),
        (["--layer", "layer9"], "'layer9' is not present in model"),
        (["--batch", "0"], "argument --batch: expected 1 to 1e+12, found 0"),
        (["--seed", "-1"], "argument --seed: expected 0 to 1e+12, found -1"),
        (["--crop-scale", "1.1"], "argument --crop-scale: expected 1e-09 to 1, found 1.1"),
        (["--batch", "4.5"], "argument --batch: invalid number value: '4.5'"),
        (["--batch", "13"], "expected a batch of at most 12 images, a multiple of 1, found 13"),
        (["--size", "8"], "expected a size that makes a map of at least 2 x 2, found 8"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--objective", "simclr"], "argument --objective: invalid choice: 'simclr'"),
        (["--obj", "pixpro"], "unrecognized arguments: --obj"),
        (["--lr", "nan"], "argument --lr: expected 1e-09 to 1e+12, found nan"),
        (["--data", ""], "No such file or directory: ''"),
        (["--data", "{}/none"], "none', found none; left out: 1 .csv"),
        (["--data", "{}/hidden"], "hidden', found none; left out: 1 hidden"),
        (["--out", "{}"], "expected --out outside of --data"),
        (["--out", "{}/kind 0"], "expected --out outside of --data"),
        (["--out", "{}/../file.txt"], "File exists"),
    ],
)
def test_train_refuses_bad_flags_in_one_sentence(photographs, tmp_path, capsys, flags, message):
    for name in ("none/table.csv", "hidden/.a.jpg"):
        (photographs / name).parent.mkdir()
        (photographs / name).write_text("no image")
    (tmp_path / "file.txt").write_text("no folder")
    before = sorted(tmp_path.rglob("*"))
    flags = [flag.format(photographs) for flag in flags]
    assert_refused(capsys, tmp_path / "out", ["--data", photographs, "--steps", 1, *flags], message)
    assert sorted(tmp_path.rglob("*")) == before


def test_train_refuses_ranks_that_cannot_begin_together(photographs, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 1]
    monkeypatch.setenv("RANK", "0")
    assert_refused(capsys, out, flags, "expected RANK, LOCAL_RANK and WORLD_SIZE as torchrun")

    def gather(states, state):
        states[:] = [state, state | {"step": 7}, state]

    monkeypatch.setattr(train, "join_ranks", lambda device: (0, 3))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert_refused(capsys, out, flags, "a multiple of 3, found 4")
    train.lock(out).close()  # an empty file may be there
    assert_refused(capsys, out, [*flags, "--batch", 6], "same step on all ranks, found [0, 7, 0]")


def test_train_locks_its_folder_where_it_can(tmp_path, monkeypatch):
    fcntl = mock.Mock(LOCK_EX=2, LOCK_NB=4)
    fcntl.lockf.side_effect = [BlockingIOError, PermissionError, OSError]
    monkeypatch.setattr(train, "fcntl", fcntl)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected a free --out, found a run that writes to"):
            train.lock(tmp_path)
    train.lock(tmp_path).close()  # a file system without locks
    monkeypatch.setattr(train, "fcntl", None)  # Windows
    train.lock(tmp_path).close()


def test_train_ends_with_one_line_at_ctrl_c(photographs, tmp_path):
    pytest.importorskip("fcntl")  # signals are others on Windows
    flags = [*SMALL, "--data", photographs, "--steps", "1000", "--workers", "0"]
    command = [sys.executable, HERE / "train.py", *flags, "--out", tmp_path / "out"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.stdout.readline().startswith("10/1000 loss "):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    sentence = "interrupted; the same command continues from the last checkpoint"
    assert run.returncode == 1 and errors == f"\ntrain.py: {sentence}\n"


def test_train_is_complete_with_its_picture(photographs, tmp_path, monkeypatch, capsys):
    """What is killed before it is finished by the next run. Results need their last.pt."""

    def killed(*arguments):
        raise Killed

    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 1]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_picture", killed)
        run_main(out, *flags)
    assert sorted(contents(out)) == [name for name in WRITTEN if name != "features.png"]
    run_main(out, *flags)
    assert sorted(contents(out)) == WRITTEN
    for name in ("last.pt", "backbone.pt"):
        (out / name).unlink()
        assert_refused(capsys, out, flags, f"expected last.pt beside the results in {out}")


def test_train_keeps_no_numbers_that_are_not_finite(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RECORD_STEPS", 2)
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    lars_step = train.LARS.step

    def breaking(optimizer):
        lars_step(optimizer)
        steps.append(optimizer)
        if len(steps) == broken:
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train.LARS, "step", breaking)
    # After the last step before a checkpoint, and after the one before, so that the loss shows it.
    messages = {4: "the weights are not finite; try a lower --lr", 3: "the loss is nan; lower --lr"}
    for broken, message in messages.items():
        steps, out = [], tmp_path / str(broken)
        with pytest.raises(FloatingPointError, match=message):
            run_main(out, "--data", photographs, "--steps", 6)
        assert checkpoint(out)["step"] == 2
    assert [record["step"] for record in metrics(out)] == [2]


def test_train_warns_of_collapse(tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, steps=40, batch=32, warmup_steps=10)
    for step, spread, warned in ((20, 0.2, True), (20, 0.8, False), (10, 0.2, False)):
        train.record(args, step, {"loss": 0.0, "similarity": 0.0, "spread": spread}, 1.0)
        assert ("the features may have collapsed" in capsys.readouterr().out) == warned


def test_train_line_of_the_log_has_80_columns(tmp_path, capsys):
    values = {"loss": -1.9876, "similarity": -0.123, "pairs": 1234.5, "spread": 0.9}
    args = argparse.Namespace(out=tmp_path, steps=40, batch=32, warmup_steps=0)
    train.record(args, 10, values, 0.25)
    line = "10/40 loss -1.988 similarity -0.12 spread 0.90 8 images/s 2 min left\n"
    assert capsys.readouterr().out == line and metrics(tmp_path) == [{"step": 10} | values]
    args.steps, args.batch = 125100, 1024  # the paper's; 1234 images/s, then 27 days
    for speed in (1234 / 1024, 125100 / (27 * 24 * 3600)):
        for step in (10, 99990, 100000, 125000, 125090, 125100):
            for loss in (-1.9876, -0.000012345, 15.4321):
                train.record(args, step, values | {"loss": loss}, speed)
    longest = max(capsys.readouterr().out.splitlines(), key=len)
    assert longest == longest[:80]


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
    assert torch.equal(again.images[0], scenes.images[2])
    assert torch.equal(again.masks[0], scenes.masks[2])
    assert not torch.equal(train.Scenes(1, seed=4, first=12, size=64).images, again.images)
    assert len(train.Scenes(12).masks.unique()) == len(train.CLASSES)


class Colour(nn.Module):
    """A backbone whose features are the mean colours of 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        return F.avg_pool2d(image, 4)


class Revealed(Colour):
    """Its features are the classes themselves: images hold the class in the red channel."""

    def forward(self, image):
        value = image[:, 0] * 0.229 + 0.485  # undo the normalisation
        return torch.stack([((value * 255).round() == k).float() for k in range(8)], 1)


def revealed(masks):
    """Images that show these masks, and the masks."""
    return masks[:, None].repeat(1, 3, 1, 1).to(torch.uint8), masks


def test_train_probe_finds_classes_that_are_linear_in_the_features():
    fit, test = [train.Scenes(48, first=first, size=72) for first in (0, 48)]
    found = train.linear_probe(Colour(), fit.images, fit.masks, test.images, test.masks)
    assert 5 < found < 40  # colour alone does not give the class
    assert train.linear_probe(Revealed(), *revealed(fit.masks[:6]), *revealed(test.masks[:6])) > 99


def test_train_probe_is_the_mean_over_the_classes_that_are_present_or_predicted():
    # Class 2 is in the fit alone and has no IoU. In the test a quarter of class 0 looks like class
    # 1: IoU 12 / 16 of class 0, 16 / 20 of class 1, mean 77.5.
    masks = torch.tensor([0, 1, 2]).repeat_interleave(16).view(1, 6, 8)
    images, tested = revealed(masks[:, :4])
    images[:, :, 0, :4] = 1
    found = train.linear_probe(Revealed(), *revealed(masks), images, tested)
    assert found == pytest.approx(77.5)


def test_train_probe_does_not_depend_on_the_numbers_of_the_classes():
    # The fit lacks class 2, which looks like class 0 in the test: IoU 16 / 32 of class 0, 1 of
    # class 1, 0 of class 2, mean 50.
    masks = torch.tensor([0, 1, 2]).repeat_interleave(16).view(1, 6, 8)
    fit, fit_masks = revealed(masks[:, :4])
    images, _ = revealed(masks % 2)
    for numbers in ([0, 1, 2], [2, 1, 0], [5, 0, 9]):
        named = torch.tensor(numbers)
        found = train.linear_probe(Revealed(), fit, named[fit_masks], images, named[masks])
        assert found == pytest.approx(50)


def test_train_probe_takes_any_classes_and_ignores_a_label():
    scenes = train.Scenes(16, size=48)
    images, masks = scenes.images, scenes.masks % 3
    ignored = torch.zeros_like(masks, dtype=torch.bool)
    ignored[:, 8:24, :16] = True  # whole cells of 4 x 4 pixels
    # What they show in the fit changes nothing, and neither does the label's number.
    results = []
    for label in (255, 7):
        some = masks.masked_fill(ignored, label)
        for shown in (images, images.masked_fill(ignored[:, None], 255)):
            results.append(train.linear_probe(Colour(), shown, some, images, some, ignore=label))
    assert len(set(results)) == 1
    # In the test nothing can be recognised there, and still all of the three classes is found.
    some = revealed(masks.masked_fill(ignored, 255))
    assert train.linear_probe(Revealed(), *some, *some) == pytest.approx(100)


def test_train_probe_leaves_the_backbone_as_it_was():
    backbone = Backbone("resnet18", "layer1")
    backbone.body.bn1.eval()  # frozen by somebody
    modes = [module.training for module in backbone.modules()]
    before = copy.deepcopy(backbone.state_dict())
    scenes = train.Scenes(2, size=32)
    train.linear_probe(backbone, *[scenes.images, scenes.masks] * 2)
    assert [module.training for module in backbone.modules()] == modes and not all(modes)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_train_resizes_images_for_a_network_of_one_size():
    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Unflatten(1, (4, 1, 1)))
    assert train.fitted(fixed, images, 32).shape == (2, 3, 32, 32)
    assert train.fitted(Colour(), images, 32) is images


def test_train_switches_residual_blocks_on():
    backbone = Backbone("resnet18", "layer1")
    on = train.with_blocks_on(backbone)
    for kept, block in zip(backbone.body.layer1.children(), on.body.layer1.children()):
        assert not kept.bn2.weight.any() and (block.bn2.weight == 1).all()
        assert torch.equal(kept.conv1.weight, block.conv1.weight)


def torchrun(*command):
    """Runs a script of this folder on two ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    # Without it the new ranks of torch 2.15 may look for the dead ones.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([*launch, *map(str, command)], cwd=HERE, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


DYING_SCRIPT = """
import os, pathlib, signal, sys, train
train.RECORD_STEPS, train.SAVE_SECONDS = 1, 0
momentum_at, marker = train.momentum_at, pathlib.Path(sys.argv.pop())

def dying(step, *arguments):
    if os.environ["RANK"] == "1" and step == 4 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return momentum_at(step, *arguments)

train.momentum_at = dying
train.main(sys.argv[1:])
"""


def test_train_continues_with_other_ranks_and_after_one_has_died(
    photographs, tmp_path, monkeypatch, often
):
    out, flags = tmp_path / "out", ["--data", photographs, "--steps", 6, "--lr", 1]
    run_main(tmp_path / "whole", *flags)
    run_killed_at(2, monkeypatch, out, *flags)
    script, marker = tmp_path / "dying.py", tmp_path / "marker"
    script.write_text(DYING_SCRIPT)
    printed = torchrun("--max-restarts=1", script, *SMALL, "--out", out, *flags, marker)
    assert marker.exists() and printed.count("complete: 6 steps") == 1
    assert printed.count("6/6 loss") == 1  # rank 0 alone
    starts = [int(step) for step in re.findall(r"off, step (\d+)", printed)]
    assert starts[0] == 2 and 3 <= starts[1] <= 4 and len(starts) == 2
    one, other = metrics(tmp_path / "whole"), metrics(out)
    assert [record["step"] for record in other] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, other):  # the same samples and crops in the same order
        assert b["pairs"] == pytest.approx(a["pairs"])
        assert b["loss"] == pytest.approx(a["loss"], abs=0.2)  # BatchNorm sees half batches
        assert (b["lr"], b["m"]) == (a["lr"], a["m"])


RANK_SCRIPT = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import test_pixpro, train
dist.init_process_group("gloo")
rank = dist.get_rank()
model = test_pixpro.small_pixpro(instance_weight=1.0).eval()
batch = [part[2 * rank : 2 * rank + 2] for part in test_pixpro.small_batch()]
own = torch.autograd.grad(model(*batch).loss, test_pixpro.trained(model))
wrapped = DistributedDataParallel(model)
wrapped(*batch).loss.backward()
shared = [p.grad.clone() for p in test_pixpro.trained(model)]
optimizer = train.LARS(test_pixpro.trained(model), lr=1.0)
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
    torchrun(script, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    (own_0, shared_0, after_0), (own_1, shared_1, after_1) = ranks
    model = small_pixpro(instance_weight=1.0).eval()
    whole = torch.autograd.grad(model(*small_batch()).loss, trained(model))
    for a, b, first, second, one in zip(own_0, own_1, shared_0, shared_1, whole):
        assert torch.equal(first, second)
        assert torch.allclose(first, (a + b) / 2, atol=1e-7)
        assert torch.allclose(first, one, atol=1e-6)  # eval mode, every image has positives
    assert all(torch.equal(first, second) for first, second in zip(after_0, after_1))
    assert not all(torch.equal(first, before) for first, before in zip(after_0, model.parameters()))


def test_train_amp_auto(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    kinds = {"fma avx512_bf16": "bf16", "amx_bf16 sse2": "bf16", "avx2 avx512f": "off"}
    for flags, amp in kinds.items():
        monkeypatch.setattr(Path, "read_text", lambda path, flags=flags: flags)
        assert train.auto_amp("cpu") == amp
    monkeypatch.setattr(Path, "exists", lambda path: False)  # not on Linux
    assert train.auto_amp("cpu") == "off"


def test_train_steps_seeds_and_ranks_draw_dropout_of_their_own(photographs, tmp_path, monkeypatch):
    """No two forward passes start from the same state of the generator that dropout draws from."""
    seeds, forward = [], PixPro.forward

    def recording(*arguments):
        seeds.append(torch.initial_seed())
        return forward(*arguments)

    monkeypatch.setattr(PixPro, "forward", recording)
    monkeypatch.setattr(train, "finish", lambda *arguments: None)
    for seed in (0, 1):
        for rank in (0, 1):
            monkeypatch.setattr(train, "join_ranks", lambda device, rank=rank: (rank, 1))
            out = tmp_path / f"{seed}{rank}"
            run_main(out, "--data", photographs, "--steps", 3, "--seed", seed)
    assert len(seeds) >= 10 and len(set(seeds)) == len(seeds)


def test_train_in_bf16_and_fp16(photographs, tmp_path):
    losses = {}
    for amp in ("off", "bf16", "fp16"):
        run_main(tmp_path / amp, "--data", photographs, "--steps", 2, "--amp", amp)
        losses[amp] = metrics(tmp_path / amp)[-1]["loss"]
    assert len(set(losses.values())) == 3
    assert list(losses.values()) == pytest.approx([losses["off"]] * 3, abs=0.05)


# ------------------------------------ The README ------------------------------------
README = (HERE / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def snippet_with(words):
    """README's one snippet that has these words."""
    [snippet] = [snippet for snippet in SNIPPETS if words in snippet]
    return snippet


def authors_file(path, backbone):
    """A file as the authors' code writes it, with these weights in its online encoder."""
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


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run(snippet, tmp_path, monkeypatch):
    if "import timm" in snippet:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Backbone("resnet50").body.state_dict(), "backbone.pt")
    if "runs/demo" in snippet:
        Path("runs/demo").mkdir(parents=True)
        torch.save(Backbone("resnet18", "layer3").body.state_dict(), "runs/demo/backbone.pt")
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
        bodies = [names["classifier"], names["segmenter"].backbone]
        bodies += [names["detector"].backbone.body, names["mask_rcnn"].backbone.body]
        for body in bodies:
            weights = body.state_dict()
            assert all(torch.equal(weights[name], w) for name, w in names["weights"].items())


def test_readme_loads_the_authors_weights_strictly_and_without_their_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    authors = Backbone("resnet50")
    authors(torch.rand(2, 3, 64, 64))  # moves BatchNorm's statistics
    file, names, snippet = "pixpro_base_r50_100ep.pth", {}, snippet_with("module.encoder.")
    authors_file(file, authors)
    exec(snippet, names)
    found = names["backbone"].body.state_dict()
    assert len(found) == 318  # all but fc: 53 convolutions, 53 BatchNorms with five entries each
    assert all(torch.equal(found[name], w) for name, w in authors.body.state_dict().items())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # ends with the block

    whole = torch.load(file, weights_only=False)
    del whole["model"]["module.encoder.layer4.2.bn3.bias"]
    torch.save(whole, file)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer4.2.bn3.bias"):
        exec(snippet, {})
    torch.save(whole | {"opt": Code()}, file)
    with pytest.raises(Exception, match="Weights only load failed"):
        exec(snippet, {})


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "pixcontrast"}, {"gamma": 0.5, "num_layers": 0, "instance_weight": 0.5}],
    ids=["pixpro", "pixcontrast", "no layers"],
)
@pytest.mark.parametrize("overlap", [True, False])
def test_readme_large_maps_image_by_image(options, overlap):
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
        results.append([*output, *[p.grad for p in trained(model)]])
    assert (output.pairs > 0) == overlap
    for plain, by_image in zip(*results):
        assert torch.allclose(plain, by_image, atol=1e-6)


def test_readme_large_maps_compute_again_in_the_backward_pass(monkeypatch):
    names = {}
    exec(snippet_with("class ImageByImage"), names)
    images, forward = [], PixelPropagation.forward

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


# ------------------------------------ The exercises ------------------------------------
class Exercise(NamedTuple):
    functions: str  # of which the bodies are to be written
    place: str  # in the paper
    chapter: int  # of tutorial.ipynb
    tests: str  # of pytest -k
    slow: str  # what gives the solution away in this file
    hard: str  # what makes it hard

    def command(self):
        words = f'"{self.tests}"' if " " in self.tests else self.tests
        return f"pytest -k {words} -x"

    def file(self):
        return "train.py" if self.tests in ("lars", "schedule") else "pixpro.py"


PPM = "PixelPropagation.forward"
EMA = "momentum_at ema_update"
EXERCISES = {
    "views": Exercise("TwoViews.crop", "Sec. 3.1", 1, "views", "", "the mirrored box"),
    "eq1": Exercise("positive_pairs", "Eq. 1", 2, "eq1", "slow_positive_pairs", "the unit of dist"),
    "bins": Exercise("bin_centres", "Eq. 1", 2, "bins", "slow_positive_pairs", "mirrored views"),
    "eq2": Exercise("pixcontrast_loss", "Eq. 2", 3, "eq2", "slow_pixcontrast", "no positives"),
    "eq3": Exercise(PPM, "Eq. 3 and 4", 4, "eq3 or eq4", "slow_propagation", "slopes at cosine 0"),
    "eq5": Exercise("consistency_loss", "Eq. 5", 5, "eq5", "slow_consistency", "what is averaged"),
    "eq6": Exercise("instance_loss", "Eq. 6", 5, "eq6", "slow_instance", "nothing: a first one"),
    "momentum": Exercise(EMA, "Sec. 3.1", 5, "momentum", "", "changing weights in place"),
    "lars": Exercise("LARS.step", "Sec. 4.1", 6, "lars", "", "the order of its parts"),
    "schedule": Exercise("lr_at", "Sec. 4.1", 6, "schedule", "", "where the cosine begins"),
}
HANDED_OUT = ("pixpro.py", "train.py", "test_pixpro.py", "tutorial.ipynb", "README.md")
HANDED_OUT += ("requirements.txt", "LICENSE", ".github")


def find(tree, name):
    """The function or method of this name, like "LARS.step", in a syntax tree; None without."""
    for part in name.split("."):
        tree = next((node for node in tree.body if getattr(node, "name", None) == part), None)
        if tree is None:
            return None
    return tree


def is_kept(statement):
    """Whether a statement stays in an opened body: a docstring, or a check of the arguments."""
    if isinstance(statement, ast.If):
        return isinstance(statement.body[-1], ast.Raise)
    if not isinstance(statement, ast.Expr):
        return False
    return isinstance(statement.value, ast.Constant) or "check_maps" in ast.unparse(statement)


def opened(source, name, message):
    """source, where the body of this function raises NotImplementedError(message)."""
    body = find(ast.parse(source), name).body
    first = next(k for k, statement in enumerate(body) if not is_kept(statement))
    start = body[first - 1].end_lineno if first > 0 else body[0].lineno - 1
    lines = source.splitlines(keepends=True)
    line = f"{' ' * body[0].col_offset}raise NotImplementedError({message!r})\n"
    return "".join([*lines[:start], line, *lines[body[-1].end_lineno :]])


def without(source, slow):
    """source without the function slow, and without the tests that name it."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if isinstance(node, ast.FunctionDef) and slow in names | {node.name}:
            start = min([node.lineno, *[part.lineno for part in node.decorator_list]]) - 1
            lines[start : node.end_lineno + 2] = []  # with the two lines below
    return "".join(lines)


def student_version(words):
    """{file: its text} of the files that differ where these exercises are open."""
    texts = {name: (HERE / name).read_text("utf-8") for name in HANDED_OUT[:3]}
    for word in words:
        exercise = EXERCISES[word]
        message = f"{exercise.place}, chapter {exercise.chapter} of tutorial.ipynb; "
        message += exercise.command()
        for name in exercise.functions.split():
            texts[exercise.file()] = opened(texts[exercise.file()], name, message)
        if exercise.slow:
            texts["test_pixpro.py"] = without(texts["test_pixpro.py"], exercise.slow)
    return texts


def hand_out(words, folder):
    """Writes a copy of the project into a new folder, with these exercises open."""
    for word in words:
        if word not in EXERCISES:
            known = f"{', '.join(EXERCISES)} (eq4 is in eq3)"
            sys.exit(f"expected exercises among {known}, found {word!r}")
    if not words:
        sys.exit(f"expected exercises and then a folder, found {str(folder)!r} alone")
    if folder.exists() or HERE in folder.resolve().parents or str(folder) in EXERCISES:
        sys.exit(f"expected a new folder outside of the project, found {str(folder)!r}")
    texts = student_version(words)
    folder.mkdir(parents=True)
    for name in HANDED_OUT:
        if name in texts:
            (folder / name).write_text(texts[name], "utf-8")
        elif (HERE / name).is_dir():
            shutil.copytree(HERE / name, folder / name)
        else:
            shutil.copy(HERE / name, folder)
    print(f"{folder} has the project with these exercises open:")
    for word in words:
        print(f"  {EXERCISES[word].functions}: {EXERCISES[word].command()}")


# Written beside the graded file: each test reports as data, so that what is printed is never read.
CONFTEST = """import json


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash else report.longrepr)
        row = [report.nodeid.split("::")[1].split("[")[0], report.outcome, message]
        with open("reports.jsonl", "a") as file:
            file.write(json.dumps(row) + chr(10))
"""
KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # of the teacher's environment


def verdict_of(exercise, tests, reports):
    """Passed, only if each of its tests reported that it passed, and did nothing else."""
    for test in [t for t in tests if any(w in t for w in exercise.tests.split(" or "))]:
        own = [(outcome, message) for name, outcome, message in reports if name == test]
        for outcome, message in own or [("missing", "it did not run")]:
            if outcome != "passed":
                message = message.partition("\n")[0].removeprefix("Failed: ")
                return f"failed  {test}: {message.removeprefix('AssertionError: ')}"
    return "passed"


def grade(file):
    """Prints for each exercise whether this pixpro.py or train.py passes the tests here."""
    try:
        source = Path(file).read_text("utf-8-sig")  # with or without a byte order mark
        tree = ast.parse(source, file)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        sys.exit(f"expected a file of Python that can be read, found {file}: {error}")
    name = "train.py" if find(tree, "LARS") else "pixpro.py"
    words = [word for word, exercise in EXERCISES.items() if exercise.file() == name]
    with tempfile.TemporaryDirectory() as folder:
        for other in (*HANDED_OUT[:3], "README.md"):
            shutil.copy(HERE / other, folder)
        (Path(folder) / name).write_text(source, "utf-8")
        (Path(folder) / "conftest.py").write_text(CONFTEST, "utf-8")
        (Path(folder) / "pytest.ini").write_text("[pytest]", "utf-8")  # no other one counts
        words_of_tests = " or ".join(EXERCISES[word].tests for word in words)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        environment = {key: os.environ[key] for key in KEPT if key in os.environ}
        environment |= {"HOME": folder, "PYTHONUSERBASE": site.getuserbase()}
        options = {"capture_output": True, "text": True, "timeout": 600, "env": environment}
        options |= {"cwd": folder, "stdin": subprocess.DEVNULL}
        try:
            done = subprocess.run([*command, "-k", words_of_tests], **options)
        except subprocess.TimeoutExpired:
            sys.exit(f"expected an end within ten minutes, found none: does a loop of {file} end?")
        lines = Path(folder, "reports.jsonl")
        lines.touch()  # without a test that ended there is none
        reports = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    if done.returncode not in (0, 1):
        reasons = re.findall(r"^E +(.+)$", done.stdout, re.MULTILINE) or [done.stderr]
        sys.exit(f"expected a {name} that can be imported, found {file}: {reasons[-1]}")
    nodes = ast.parse((HERE / "test_pixpro.py").read_text("utf-8")).body
    tests = [node.name for node in nodes if getattr(node, "name", "").startswith("test_")]
    for word in words:
        exercise = EXERCISES[word]
        bodies = [find(tree, function) for function in exercise.functions.split()]
        is_open = any(body is None or "NotImplementedError" in ast.unparse(body) for body in bodies)
        verdict = verdict_of(exercise, tests, reports)
        print(f"{word:9} {'open' if is_open and verdict != 'passed' else verdict}")


def list_exercises():
    for word, exercise in EXERCISES.items():
        place = f"{exercise.place}, chapter {exercise.chapter}"
        print(f"{word:9} {exercise.functions:24} {place:23} {exercise.hard}")
    print("\npython test_pixpro.py eq3 eq5 ../class    writes a copy where Eq. 3, 4 and 5 are open")
    print("python test_pixpro.py grade FILE          grades a pixpro.py or train.py")


def test_handing_out_and_grading(tmp_path, capsys):
    folder = tmp_path / "class"
    hand_out(["eq6", "lars"], folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(HANDED_OUT)
    assert "pytest -k eq6 -x" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="a new folder outside of the project"):
        hand_out(["eq6"], folder)
    with pytest.raises(SystemExit, match="among views, eq1.*found 'eq9'"):
        hand_out(["eq9"], tmp_path / "other")
    with open(folder / "train.py", "a") as file:
        rate = "def lr_at(step, total_steps, warmup_steps, peak, floor=1e-6):\n    return peak\n"
        file.write(f"\n{rate}")
    grade(folder / "train.py")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "lars      open"
    failed = "schedule  failed  test_schedule_warm_up_by_hand: The rate at step 0"
    assert printed[1].startswith(failed) and printed[1].endswith("Perhaps there is no warm-up.")
    with pytest.raises(SystemExit, match="a file of Python"):
        grade(tmp_path / "nothing.py")


def test_grading_says_passed_for_nothing_that_did_not_run(tmp_path, monkeypatch, capsys):
    """Whatever the teacher's shell asks of pytest, and for a file that ends the process."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--color=yes --no-summary -x")
    source = (HERE / "train.py").read_text("utf-8")
    peak = "    return floor + (peak - floor)"
    for name, text, verdicts in (
        (
            "wrong.py",
            source.replace(peak, "    return peak"),
            ["lars      passed", "schedule  failed"],
        ),
        ("ends.py", f"import os; os._exit(0)\n{source}", ["lars      failed", "schedule  failed"]),
    ):
        (tmp_path / name).write_text(text, "utf-8")
        grade(tmp_path / name)
        printed = capsys.readouterr().out.splitlines()
        assert [line[:16] for line in printed] == verdicts


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        list_exercises()
    elif arguments[0] == "grade":
        if len(arguments) != 2:
            sys.exit(f"expected grade and one file, found {' '.join(arguments)!r}")
        grade(arguments[1])
    else:
        hand_out(arguments[:-1], Path(arguments[-1]))
