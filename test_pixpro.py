"""Tests of pixpro.py and train.py, which also grade exercises and hand them out.

Each equation has a section with a case computed by hand, the mistakes that are often made,
properties, gradients, an independent slow version in loops, and the authors' numbers.

An exercise is a function to write again, whatever state the others are in.

    python test_pixpro.py                               lists the exercises
    python test_pixpro.py eq3 eq5 ../class              writes a copy where these are open
    python -m pytest -k eq5 -x                          its first failure says what is wrong
    python test_pixpro.py grade FILE                    grades a pixpro.py or train.py
    python test_pixpro.py grade FILE --only eq3 eq5     ends with code 0 if these passed, else 1
    python test_pixpro.py grade FOLDER --csv grades.csv

Grading puts the bodies of the exercises in FILE, and what they need, into the pixpro.py or train.py
beside this file, and runs these tests, a process for each exercise. It stops mistakes and cheap
tricks; grade strangers' code in a container.

The authors' numbers are what github.com/zdaxie/PixPro, commit e390d6b, computes in float32 on a
CPU; its inputs are tensors of wave() below. The comment at each number names the authors' function,
and .ci/authors_numbers.py prints them all.
"""

import argparse
import ast
import builtins
import contextlib
import copy
import csv
import gc
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import site
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import warnings
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


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
        return f"python -m pytest -k {words} -x"

    def names(self):
        """(class or "", name) of each function."""
        return [tuple(name.rpartition(".")[::2]) for name in self.functions.split()]

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
    "eq6": Exercise("instance_loss", "Eq. 6", 6, "eq6", "slow_instance", "nothing: a first one"),
    "momentum": Exercise(EMA, "Sec. 3.1", 5, "momentum", "", "changing weights in place"),
    "lars": Exercise("LARS.step", "Sec. 4.1", 7, "lars", "", "the order of its parts"),
    "schedule": Exercise("lr_at", "Sec. 4.1", 7, "schedule", "", "where the cosine begins"),
}


def list_exercises():
    for word, exercise in EXERCISES.items():
        place = f"{exercise.place}, chapter {exercise.chapter}"
        print(f"{word:9} {exercise.functions:24} {place:23} {exercise.hard}")
    print("\nThe first lines of this file say how they are handed out and graded.")


def in_a_clean_process(arguments):
    """Runs this command again where no setting of the shell reaches it. Returns its exit code."""
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
    with tempfile.TemporaryDirectory() as home:
        clean = {name: os.environ[name] for name in kept if name in os.environ}
        clean |= dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP"), home)
        clean |= {"PYTHONUSERBASE": site.getuserbase(), "OMP_NUM_THREADS": "1"}
        clean |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PIXPRO_CLEAN": home}
        return subprocess.run([sys.executable, __file__, *arguments], env=clean).returncode


if __name__ == "__main__":  # before torch is imported, which takes seconds
    if len(sys.argv) == 1:
        list_exercises()
        sys.exit()
    if sys.argv[1] == "grade" and "PIXPRO_CLEAN" not in os.environ:
        sys.exit(in_a_clean_process(sys.argv[1:]))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
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
)


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


def random_vectors():
    return [x[:, :, 0, 0].clone() for x in random_maps()]


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
class Mistake(AssertionError):
    """What the checks raise. No submission can change it as it could pytest.fail."""


def check(holds, message):
    __tracebackhide__ = True
    if not holds:
        raise Mistake(message)


def check_form(what, found, shape, dtype=torch.float32):
    """Fails unless found is a tensor of this shape and type."""
    __tracebackhide__ = True
    wanted = f"{what}: expected a tensor {list(shape)} of {dtype}"
    check(found is not None, f"{wanted}, found None. Is `return` missing?")
    hint = " A number has no gradient." if isinstance(found, float) else ""
    check(torch.is_tensor(found), f"{wanted}, found a {type(found).__name__}.{hint}")
    same = list(found.shape) == list(shape) and found.dtype == dtype
    check(same, f"{wanted}, found {list(found.shape)} of {found.dtype}.")


def check_value(what, found, expected, mistakes=None, tolerance=1e-5):
    """Fails unless found, a number or a few, is as expected. mistakes: {wrong value: its cause}."""
    __tracebackhide__ = True
    check(found is not None, f"{what}: found None. Is `return` missing?")
    found, expected = numbers_of(found), numbers_of(expected)
    count = f"{what}: expected {len(expected)} numbers, found {len(found)}."
    check(len(found) == len(expected), count)

    def near(value, factor=1):
        return all(abs(a - factor * b) <= tolerance for a, b in zip(found, numbers_of(value)))

    if near(expected):
        return
    if any(map(math.isnan, found)):
        reasons = ["0 / 0, 0 * inf, log 0 or inf - inf makes nan, as in a mean over no pairs"]
    elif any(map(math.isinf, found)):
        reasons = ["log 0, a division by 0 or exp of a large number makes inf"]
    else:
        known = list((mistakes or {}).items())
        factors = {-1: "the sign is wrong", 2: "it is doubled", 0.5: "it is halved"}
        reasons = [cause for value, cause in known if near(value)]
        reasons = reasons or [cause for factor, cause in factors.items() if near(expected, factor)]
        also = "; and the sign is wrong"
        reasons = reasons or [cause + also for value, cause in known if near(value, -1)]
    perhaps = f" Perhaps {', or '.join(reasons)}." if reasons else ""
    texts = [", ".join(f"{number:.6g}" for number in numbers) for numbers in (expected, found)]
    raise Mistake(f"{what}: expected {texts[0]}, found {texts[1]}.{perhaps}")


def numbers_of(values):
    return torch.as_tensor(values, dtype=torch.float64).flatten().tolist()


def check_gradients(what, value, into, not_into=(), hint="detach, no_grad or item() cuts it off"):
    """Fails unless the gradient of value reaches the tensors `into` and no others.

    into, not_into: {name: tensor}, leaves that require a gradient.
    """
    __tracebackhide__ = True
    wanted = f"{what}: expected a gradient into {' and '.join(into)}"
    check(value.requires_grad, f"{wanted}, found a value without any: {hint}.")
    value.sum().backward()
    bad = "nan or inf, which comes from log 0, 0 / 0, a root at 0, or infinity masked too late"
    for name, leaf in into.items():
        missing = f"{what}: {name} has no gradient: {hint}, or the wrong is detached."
        check(leaf.grad is not None, missing)
        check(leaf.grad.isfinite().all(), f"{what}: the gradient of {name} has {bad}.")
    for name, leaf in dict(not_into).items():
        none = leaf.grad is None or not leaf.grad.any()
        check(none, f"{what}: no gradient may reach {name}: detach it.")


def check_derivative(what, function, x):
    """Fails unless the gradient of function at x is the slope of its values."""
    __tracebackhide__ = True
    options = {"eps": 3e-3, "atol": 5e-3, "rtol": 0.01, "check_undefined_grad": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float32, as in training
        same = torch.autograd.gradcheck(function, x, **options, raise_exception=False)
    cause = "Perhaps a part of the formula is detached, or computed under no_grad."
    check(same, f"{what}: the gradient is not the slope of the values. {cause}")


def check_call(what, function, inputs, shape, dtype=torch.float32):
    """Fails unless function(*inputs) is a tensor of this shape and type, and inputs stay."""
    __tracebackhide__ = True
    before = copy.deepcopy(inputs)
    check_form(what, function(*inputs), shape, dtype)
    for number, (part, old) in enumerate(zip(inputs, before)):
        same = not torch.is_tensor(part) or torch.equal(part, old)
        check(same, f"{what}: input {number} is changed in place: others use it too.")


def check_without_pairs(what, loss):
    """Fails unless a batch without positive pairs gives 0, and gradients of 0."""
    __tracebackhide__ = True
    x, x_prime = random_maps()
    value = loss(x.requires_grad_(), x_prime, torch.zeros(3, 6, 6, dtype=torch.bool))
    what = f"{what} without any positive pair"
    check_value(what, value, 0)
    hint = "the loss must stay in the graph (0 * something); a constant cannot be differentiated"
    check_gradients(what, value, {"its map": x}, hint=hint)
    check(not x.grad.any(), f"{what}: expected a gradient of zeros, found others.")


def check_loss_gradients(what, loss, names, x, x_prime, *positives):
    """Fails unless gradients reach x alone, and are the slope of the loss. names: of x and x'."""
    __tracebackhide__ = True
    value = loss(x.requires_grad_(), x_prime.requires_grad_(), *positives)
    name, name_prime = names.split()
    check_gradients(what, value, {name: x}, {name_prime: x_prime})
    check_derivative(what, lambda x: loss(x, x_prime, *positives), x)


NOT_COSINES = "products are taken, not cosines: divide by the norms over C"
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
        raise Mistake(f"{what}: {bins}; found {found}.{cause}")


def check_same_pairs(what, found, expected):
    """Compares two results of positive_pairs and names the first pair that differs."""
    __tracebackhide__ = True
    wrong = (found != expected).nonzero().tolist()
    if wrong:
        n, i, j = wrong[0]
        pair = f"image {n}, bin {i} of view 1 and bin {j} of view 2"
        values = f"expected {bool(expected[n, i, j])}, found {bool(found[n, i, j])}"
        raise Mistake(f"{what}: {pair}: {values}; {len(wrong)} of {found.numel()} pairs differ.")


def measured_distance(box_1, box_2, size, n, i, j):
    """dist(i, j) of image n, found as the smallest T that makes the pair positive."""
    low, high = 0.0, 64.0
    for _ in range(30):
        middle = (low + high) / 2
        positive = positive_pairs(box_1, box_2, size, middle)[n, i, j]
        low, high = (low, middle) if positive else (middle, high)
    return high


def test_eq1_form():
    inputs = random_boxes(4, seed=1), random_boxes(4, seed=2), (2, 3)
    what = "positive_pairs of 4 images with maps of 2 x 3"
    check_call(what, positive_pairs, inputs, [4, 6, 6], torch.bool)


# One row of two bins: of 4 x 3 with centres (2, 1.5), (6, 1.5) and diagonal 5, and of 2 x 1 with
# centres (3.5, 3.5), (5.5, 3.5) and diagonal 2.236068.
LARGE = [0.0, 0.0, 8.0, 3.0]
SMALL_BOX = [2.5, 3.0, 6.5, 4.0]
# d = 4.031129 is the distance from (2, 1.5) to (5.5, 3.5); right is d / 5.
EQ1_MISTAKES = {
    1.802776: "the smaller diagonal is taken, or one view's, not the larger one",  # d / 2.236068
    4.031129: "the distance is not divided by the bin's diagonal",  # d
    0.471808: "the diagonal is the crop's, not the bin's",  # d / hypot(8, 3)
    3.25: "the distance is squared: the root is missing",  # d^2 / 5
    1.081665: "the bins' corners are taken, not their centres: c + 1/2",  # (0, 0) to (4.5, 3)
    0.640312: "the result is transposed: rows belong to view 1",  # hypot(2.5, 2) / 5
    0.373661: "H and W, or x and y, are exchanged",  # hypot(0.5, 3) / hypot(8, 1.5)
    0.282843: "the boxes' corners (x0, y0) are not added",  # from (2, 1.5) to (3, 0.5)
    64.0: "no T makes it positive: T is ignored, or only the nearest pair counts",
    0.0: "the pair is always positive: the comparison is the wrong way round",
    1.114177: "the mean of the diagonals is taken, not the larger one",  # d / ((5 + 2.236068) / 2)
    0.777840: "dx and dy are divided by width and height one by one",  # 1.100032 / sqrt(2)
    1.1: "the distance is |dx| + |dy|, not the root of the squares",  # (3.5 + 2) / 5
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
        "- - - - - -": "> or < instead of <=",
        "0 1 2 3 4 -": "bin (row, column) has number row * W + column",
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
        },
    )


def test_eq1_far_from_the_origin():
    # Distances by |a|^2 - 2 a b + |b|^2 lose their digits here; torch.cdist computes so by default.
    box = tensor([3000.7, 3001.7, 3029.1, 3029.9])
    A = positive_pairs(box, box, (7, 7), 0.05)
    what = "Equal boxes of 7 x 7 bins of about 4 x 4 near (3000, 3000), T = 0.05"
    check_same_pairs(f"{what} (perhaps rounding in the distance)", A, torch.eye(49)[None] > 0)


AUTHORS_BOX_1 = [[0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0.8, 0.1, 0.3, 0.6], [0.05, 0.05, 0.2, 0.2]]
AUTHORS_BOX_2 = [[0.3, 0.1, 0.9, 0.8], [0.25, 0.25, 0.75, 0.75], [0.2, 0.2, 0.9, 0.7]]
AUTHORS_BOX_2 += [[0.7, 0.7, 0.95, 0.95]]


def test_eq1_authors_counts():
    # The sums of pos_mask in their regression_loss(q, k, box_1, box_2, pos_ratio=0.7).
    counts = positive_pairs(tensor(*AUTHORS_BOX_1), tensor(*AUTHORS_BOX_2), (7, 7)).sum((1, 2))
    check_value(
        "Positive pairs of the authors' four images (do boxes of images mix?)",
        counts,
        [54, 121, 121, 0],
    )


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (4, 1)])
@pytest.mark.parametrize("threshold", [0.35, 0.7, 1.4, 2.8])
def test_eq1_equals_loops(size, threshold):
    box_1, box_2 = random_boxes(6, seed=1), random_boxes(6, seed=2)
    expected = slow_positive_pairs(box_1, box_2, size, threshold)
    check_same_pairs(
        "Loops (do boxes of images mix?)", positive_pairs(box_1, box_2, size, threshold), expected
    )


def test_bins_form():
    inputs = random_boxes(4, seed=1), (2, 3)
    what = "The centres of 2 x 3 bins of 4 boxes"
    check_call(what, lambda *inputs: pixpro.bin_centres(*inputs)[0], inputs, [4, 6, 2])
    check_form("Their diagonals", pixpro.bin_centres(*inputs)[1], [4, 1])


def test_bins_centres_by_hand():
    # 2 rows and 3 columns of bins of 4 x 3; then a mirrored box, whose x runs from 16 down to 4.
    centres, _ = pixpro.bin_centres(tensor([0, 0, 12, 6], [16, 30, 4, 36]), (2, 3))
    mistakes = {
        (0, 0): "these are corners: the centre of bin c is at c + 1/2",
        (1.5, 2): "x and y are exchanged: a centre is (x, y)",
        (3, 1): "H and W are exchanged: x runs over W columns",
    }
    check_value("The centre of bin 0", centres[0, 0], (2, 1.5), mistakes)
    mistakes = {(2, 4.5): "the bins are numbered column by column"}
    check_value("The centre of bin 1", centres[0, 1], (6, 1.5), mistakes)
    check_value("The centre of bin 5, the last", centres[0, 5], (10, 4.5))
    mistakes = {
        (6, 31.5): "the mirror is ignored: where x0 > x1 columns must run leftward",
        (18, 31.5): "the bins lie beyond x0: the width must stay negative",
        (2, 1.5): "all images take the first box",
        (-2, 1.5): "the box's corner (x0, y0) is not added",
        (14, 1.5): "y0 is not added",
    }
    check_value("Bin 0 of a box from (16, 30) to (4, 36)", centres[1, 0], (14, 31.5), mistakes)
    centres, _ = pixpro.bin_centres(tensor([1, 0, 2, 1]), (2, 4))
    check_value("Bin 0 of 2 x 4 in a box of 1 x 1 pixels", centres[0, 0], (1.125, 0.25))


def test_bins_diagonal_by_hand():
    _, diagonal = pixpro.bin_centres(tensor([0, 0, 12, 6], [16, 30, 4, 36]), (2, 3))
    mistakes = {
        13.416408: "it is the box's, not a bin's",  # hypot(12, 6)
        7: "it is width + height, not the root of the squares",
        25: "the root is missing",
    }
    check_value("A bin's diagonal", diagonal[0], 5, mistakes)  # hypot(4, 3)
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
EQ2_MISTAKES = {
    0.948667: "the temperature is ignored",  # e^cos
    1.388851: NOT_COSINES,  # e^(x_i . x'_j / tau)
    1.271268: "each positive has a log of its own; their sum must be inside the log",
    -0.236867: "the positives are missing in the denominator",  # -log(sum_P e / sum_not P e)
    1.260695: "the mean over the positives is in the log, not their sum",  # -log(mean_P e / sum e)
    1.009659: TRANSPOSED,  # P of j
    0.869814: "the softmax runs over the pixels of x, not over those of x'",  # e_ij / sum_i e_ij
    1.028631: MEAN_OF_ALL,  # (l_0 + l_1 + l_1') / 3
    0.514316: "pixels without a positive count in the mean",  # sum l_i / 3 in each image
    0.724939: "images without positives count in the mean",  # (image 0 + image 1 + 0) / 3
    2.144161: "the pixels of other images are negatives too; Eq. 2 stays in one image",
    0.916030: "the cosines are multiplied by the temperature",  # e^(cos tau)
    0.841911: "the maps are normalised over the pixels, not over C",
    1.568798: "the log is that of base 2",  # l_i / log 2
}


def test_eq2_form():
    inputs = *random_maps(), random_positives()
    check_call("Eq. 2 of three images", pixcontrast_loss, inputs, [])


def test_eq2_by_hand():
    # Cosines of pixel i with the three x'_j; p marks the positives. tau is 0.5.
    #   image 0, pixel 0: 1 p, 0.707 p, -1     -log((e^2 + e^1.414) / (e^2 + e^1.414 + e^-2))
    #            pixel 1: 0, 0.707, 0 p        -log(e^0 / (e^0 + e^1.414 + e^0))
    #   image 1, pixel 1: 0.6 p, 0.894, 0.447  -log(e^1.2 / (e^1.2 + e^1.789 + e^0.894))
    # These are 0.011697, 1.810458 and 1.263738. Mean over the pixels, then over the images:
    # ((0.011697 + 1.810458) / 2 + 1.263738) / 2 = 1.087408. Other pixels and image 2 have no p.
    found = pixcontrast_loss(*eq2_case(), temperature=0.5)
    check_value("Eq. 2 by hand, tau 0.5", found, 1.087408, EQ2_MISTAKES)


def test_eq2_gradients():
    x, x_prime = random_maps()
    positives = random_positives()
    check_loss_gradients("Eq. 2", pixcontrast_loss, "x x'", x, x_prime, positives)
    reached = x.grad.flatten(2).any(1)  # [N, HW]
    same = torch.equal(reached, positives.any(2))
    check(same, "The gradient reaches other pixels than those that have a positive.")


def test_eq2_without_any_positive_is_0_with_gradient_0():
    check_without_pairs("Eq. 2", pixcontrast_loss)


def test_eq2_does_not_overflow():
    # cos / tau = 1 / 0.002 = 500: e^500 overflows float32; logsumexp subtracts the largest.
    x = pixels([1, 0], [0, 1])
    found = pixcontrast_loss(x, x, pairs("01 10"), temperature=0.002)
    what = "Eq. 2 at tau 0.002: exp overflows; torch.logsumexp subtracts the largest first"
    mistakes = {-math.log(10.0**-k): "an eps is added inside the log" for k in range(5, 17)}
    check_value(what, found, 500, mistakes, tolerance=0.5)


@pytest.mark.parametrize("given", [[0.1], [], [1.0]])
def test_eq2_equals_loops(given):
    x, x_prime = random_maps()
    positives = random_positives()
    expected = slow_pixcontrast(x, x_prime, positives, *(given or [0.3]))
    found = pixcontrast_loss(x, x_prime, positives, *given)
    check_value(f"Eq. 2 in loops, tau {given or 'by default 0.3'}", found, expected)


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
    (0.762229, 0.875542): "max(cos, 0) is missing, or comes after the power",  # sum c^2 g
    (1.268328, 0.357771): "gamma is ignored",  # sum max(c, 0) g
    (0.933333, 0.133333): "the sum is divided by sum s; Eq. 3 is a sum alone",  # sum s g / sum s
    (0.28, 0.04): "the mean over j is taken, not the sum",  # sum s g / 4
    (0.12, 0.16): "the pixel itself is left out",  # sum over j != i
    (4.12, 0.16): "x is added to the sum",  # x_i + sum s g
    (86.4, 7.2): NOT_COSINES,  # sum max(x_i . x_j, 0)^2 g
    (1.305443, 0.466885): "the similarity is that of g(x), not of x",  # cosines of h
    (0.581028, 0.465677): "a softmax over j is taken; Eq. 3 is a plain sum",  # sum softmax_j(s) g
    (2.536656, 0.715542): "s is multiplied by gamma, not raised to it",  # sum gamma max(c, 0) g
    (0.804984, 0.163299): "g is normalised over the pixels, not over C",
}


def seeded_ppm(**options):
    torch.manual_seed(0)
    return PixelPropagation(dim=5, **options)


def test_eq3_form():
    what = "PixelPropagation(5) of a map [3, 5, 2, 3]"
    for num_layers in (1, 0):
        ppm = PixelPropagation(5, num_layers=num_layers)
        check_call(what, ppm, random_maps()[:1], [3, 5, 2, 3])


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
    mistakes[1.157771, 1.515542] = "H and W are exchanged in the result"
    check_value("Eq. 3 by hand, y of pixel (0, 1)", y[1], (0.837771, 1.713313), mistakes)
    check_value("Eq. 3 by hand, y of pixel (1, 2)", y[2], (1.157771, 1.515542))
    check_value("Eq. 3 by hand, y of pixel (-2, 1)", y[3], (-0.357771, 1.073313))
    # With gamma 3: (1, 0) + 0.447^3 (0.6, 0.8).
    ppm.gamma = 3
    mistakes = {(1.12, 0.16): "gamma is ignored: it is always 2"}
    found = ppm(x)[0, :, 0, 0]
    check_value("Eq. 3 by hand with gamma 3, pixel (3, 0)", found, (1.053666, 0.071554), mistakes)


def test_eq3_images_do_not_mix():
    ppm = seeded_ppm()
    x = random_maps()[0]
    what = "Image 1 of a batch of 3 has another y than it has alone. Do images mix?"
    check(torch.allclose(ppm(x)[1:2], ppm(x[1:2]), atol=1e-6), what)


def test_eq3_g_is_applied_once():
    # With two layers g has a BatchNorm, which must see the whole batch, and see it once.
    ppm = seeded_ppm(num_layers=2)
    ppm(random_maps()[0])
    calls = int(ppm.transform[1].num_batches_tracked)
    what = "g must be applied once to the whole batch, so that its BatchNorm sees all images"
    check(calls == 1, f"{what}; found {calls} calls.")


def test_eq3_gradients():
    ppm = seeded_ppm()
    x = random_maps()[0].requires_grad_()
    check_gradients("Eq. 3", ppm(x), {"x": x, "the weights of g": ppm.transform[0].weight})
    check_derivative("Eq. 3, the first channel", lambda x: ppm(x)[:, 0].sum(), x)


def test_eq3_transform_has_l_layers():
    middle = ["Conv2d", "BatchNorm2d", "ReLU"]
    for num_layers, expected in enumerate(([], ["Conv2d"], [*middle, "Conv2d"])):
        transform = PixelPropagation(4, num_layers=num_layers).transform
        assert [type(layer).__name__ for layer in transform] == expected
    assert transform[0].weight.shape == transform[3].weight.shape == (4, 4, 1, 1)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1, 2])
@pytest.mark.parametrize("other", [[-1, 0], [0, 1]], ids=["opposite", "orthogonal"])
def test_eq4_is_exactly_0_with_finite_gradients(gamma, other):
    # The slope of c^gamma at 0 is infinite for gamma < 1; there the gradient must be exactly 0.
    x = pixels([1, 0], other).requires_grad_()
    y = PixelPropagation(dim=2, gamma=gamma, num_layers=0)(x)
    what = f"Eq. 4, gamma {gamma}, of (1, 0) and {tuple(other)}"
    where = f"{what}: s = 0 exactly, without an eps, y_0"
    mistakes = dict.fromkeys([(2, 0), (0, 0)], "max(cos, 0) is missing, or comes after the power")
    check_value(where, y[0, :, 0, 0], (1, 0), mistakes, tolerance=1e-7)
    check_gradients(f"{what}, where the power has an infinite slope", y.square(), {"x": x})


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize("gamma", [0.5, 1, 2, 4])
def test_eq3_equals_loops(gamma, num_layers):
    torch.manual_seed(0)
    ppm = PixelPropagation(dim=5, gamma=gamma, num_layers=num_layers)
    x = random_maps(n=2)[0]
    with torch.no_grad():
        expected = slow_propagation(x, ppm.transform(x), gamma)
    same = torch.allclose(ppm(x), expected, atol=1e-5)
    check(same, f"Eq. 3 in loops, with gamma {gamma} and l {num_layers}, gives another y.")


# Sum of y, sum of |y|, y[1, 17, 2, 3] and y[0, 255, 0, 0] of their PixPro.featprop, with their
# value_transform set as here:
# PixPro.featprop(SimpleNamespace(pixpro_clamp_value=0, pixpro_p=gamma, value_transform=g), x)
AUTHORS_Y = [
    (2.0, 1, [10.614669, 1277.442658, -0.1296858788, 0.0937332809]),
    (1.0, 0, [9.232201, 1713.817161, -0.3988923430, -0.3339273342]),
]


@pytest.mark.parametrize("gamma, num_layers, authors", AUTHORS_Y, ids=range(2))
def test_eq3_authors_numbers(gamma, num_layers, authors):
    ppm = PixelPropagation(256, gamma, num_layers)
    with torch.no_grad():
        for conv in ppm.transform:
            conv.weight.copy_(wave(256, 256, 1, 1, a=0.07) / 16)
            conv.bias.copy_(0.01 * wave(256, a=0.19))
        y = ppm(wave(2, 256, 3, 5, a=0.23)).double()
    check_value("The authors' sums of y and |y|", [y.sum(), y.abs().sum()], authors[:2], None, 1e-3)
    found = [y[1, 17, 2, 3], y[0, 255, 0, 0]]
    check_value("The authors' y[1, 17, 2, 3], y[0, 255, 0, 0]", found, authors[2:], None, 1e-6)


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
EQ5_MISTAKES = {
    -0.630839: NO_MASK,  # mean c, three images
    -0.762843: MEAN_OF_ALL,  # sum of all P / 5
    -0.501579: "images without positive pairs count in the mean",  # (0.804738 + 0.7 + 0) / 3
    -0.476777: "the sum is divided by all pairs, not by the positive ones",  # sum_P c / 4
    -1.504738: "the images are added, or a factor 2 is too much",  # 0.804738 + 0.7
    -0.740165: "each pixel has its mean; all positive pairs of an image must weigh the same",
    -0.776777: "the most similar positive of each pixel is taken, not the mean over all",
    -3.083333: NOT_COSINES,  # y_i . x'_j
    0.495262: "2 - 2 cos is taken; Eq. 5 is -cos",  # 2 - 2 c
    0.247631: "1 - cos is taken; Eq. 5 is -cos",  # 1 - c
    -0.850383: "pixel i of y is paired with pixel i of x', not with its positives",  # mean c_ii
    -0.596321: TRANSPOSED,  # P of (j, i)
    -1.871879: "y is not normalised over C",  # y_i . x'_j / |x'_j|
    -0.814172: "the maps are normalised over the pixels, not over C",
}


def test_eq5_form():
    inputs = *random_maps(), random_positives()
    check_call("Eq. 5 of three images", consistency_loss, inputs, [])


def test_eq5_by_hand():
    # Image 0: the positives (0,0), (0,1), (1,1) have cosines 1, 0.707107, 0.707107; mean 0.804738.
    # Image 1: (0,0), (1,0), of (1,2) and (2,-1) with (2,1), have cosines 0.8, 0.6; mean 0.7.
    # Image 2 has none. Mean over images 0 and 1: 0.752369.
    check_value("Eq. 5 by hand", consistency_loss(*eq5_case()), -0.752369, EQ5_MISTAKES)


def test_eq5_gradients():
    check_loss_gradients("Eq. 5", consistency_loss, "y x'", *random_maps(), random_positives())


def test_eq5_without_any_positive_is_0_with_gradient_0():
    check_without_pairs("Eq. 5", consistency_loss)


def test_eq5_authors_numbers():
    # regression_loss(F.normalize(q, dim=1), F.normalize(k, dim=1), box_1, box_2, pos_ratio=0.7) of
    # the boxes (0, 0, 1, 1) and (0.25, 0.25, 0.75, 0.75): column c of view 1 and c' of view 2 are
    # positive if |2 c - c' - 3| <= 1, rows likewise. Theirs is twice Eq. 5.
    q, k = wave(4, 8, 7, 7, a=0.37)[1:2], wave(4, 8, 7, 7, a=0.53, b=0.5)[1:2]
    c = torch.arange(7)
    near = ((2 * c[:, None] - c - 3).abs() <= 1).float()  # [7, 7]
    positives = torch.kron(near, near)[None] > 0  # [1, 49, 49]
    mistakes = {
        -0.421148: "the absolute value of the cosine is taken",
        -0.215663: "cosines below 0 are clamped",
    }
    found = 2 * consistency_loss(q, k, positives)
    check_value("Twice Eq. 5, the authors' number", found, -0.0101784933, mistakes, 1e-6)


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
EQ6_MISTAKES = {
    -0.965843: "the mean over the images is taken before the cosine",
    1.404738: "2 - 2 cos is taken; it is -cos here",  # 2 - 2 mean c
    0.702369: "1 - cos, or the mean square of the difference, is taken; it is -cos here",
    -0.892893: "the images are added; their mean is taken",  # sum c
    -0.254766: "every image is compared with every other: p_n belongs to z'_n alone",
    1.177240: "other images are negatives; this loss has none",  # -log softmax c, tau 1
    -3.666667: NOT_COSINES,  # p . z'
    -0.148816: "the mean goes over the components too: a cosine is their sum",
    -0.360704: "one cosine is taken of the whole batch",
    -0.288929: "the cosine is taken along the images, not along C",
}


def test_eq6_form():
    check_call("instance_loss of three images", instance_loss, eq6_case(), [])


def test_eq6_by_hand():
    # Cosines of (3, 4) with (1, 0): 0.6; (0, 2) with (0, 5): 1; (-1, 1) with (2, 0): -0.707107.
    # Their mean is 0.297631.
    check_value("instance_loss by hand", instance_loss(*eq6_case()), -0.297631, EQ6_MISTAKES)


def test_eq6_gradients():
    check_loss_gradients("instance_loss", instance_loss, "p z'", *random_vectors())


def test_eq6_equals_loops():
    p, z_prime = random_vectors()
    check_value("instance_loss in loops", instance_loss(p, z_prime), slow_instance(p, z_prime))


# ------------------------------------ Momentum encoder ------------------------------------
# t is 10 / 40.
MOMENTUM_MISTAKES = {
    0.829289: "the division by 2 is missing",  # 1 - (1 - base) (cos(pi t) + 1)
    0.985355: "m falls from 1 to base; it rises",  # 1 - (1 - base) (1 - cos(pi t)) / 2
    0.925: "m rises on a straight line, not along a cosine",  # base + (1 - base) t
    0.901554: "pi is missing",  # 1 - (1 - base) (cos(t) + 1) / 2
    0.9: "m stays at base, as if k / K were 0",  # k // K
    0.991464: "base is ignored: 0.99 is always used",  # base 0.99
    0.917528: "the steps are counted from 1; they are counted from 0",  # cos(pi 11 / 40)
}


def test_momentum_at_by_hand():
    # 1 - (1 - 0.9) * (cos(pi * 10 / 40) + 1) / 2
    found = momentum_at(10, 40, base=0.9)
    check_value("m at step 10 of 40, base 0.9", found, 0.914645, MOMENTUM_MISTAKES, 1e-6)


def test_momentum_at_authors_numbers():
    # PixPro(...)._momentum_update_key_encoder with K = 100: 1. - (1. - 0.99) * (cos(...) + 1) / 2.
    authors = {0: 0.99, 1: 0.9900024671981713, 25: 0.9914644660940672}
    authors |= {50: 0.995, 99: 0.9999975328018287, 100: 1}
    for step, m in authors.items():
        check_value(f"The authors' m at step {step} of 100", momentum_at(step, 100), m, None, 1e-12)
    check_value("m at step 0 of 1", momentum_at(0, 1), 0.99)


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
    1: "p is copied",
    3.2: "the difference has the wrong sign",  # 3 - 0.1 * (1 - 3)
    1.2: "m and 1 - m are exchanged",  # 0.1 * 3 + 0.9 * 1
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


def explain_box(box, shown, width):
    """The likely reason why a box differs from what its view shows in an image of this width."""
    x0, y0, x1, y1 = shown
    left, right, top, bottom = min(x0, x1), max(x0, x1), y0, y1
    mistakes = {  # boxes of the crop before x0 and x1 change places
        "x0 and x1 must change places in exactly the mirrored views": (left, top, right, bottom),
        "the rows are mirrored, too: the view is upside down": (left, bottom, right, top),
        "a, b = b, a overwrites one of two elements of a tensor": (right, top, right, bottom),
        "x1 and y1 name the last pixel; they are edges": (left, top, right - 1, bottom - 1),
        "x and y are exchanged: get_params begins with top": (top, left, bottom, right),
        "width and height are given, not the corner": (left, top, right - left, bottom - top),
        "width and height are exchanged": (left, top, left + bottom - top, top + right - left),
        "the box is mirrored in the image: width - x": (width - right, top, width - left, bottom),
    }
    for cause, (a, b, c, d) in mistakes.items():
        if any(np.allclose(box, edges, atol=0.75) for edges in ((a, b, c, d), (c, b, a, d))):
            return cause
    if box.abs().max() < 1.5:
        return "the box is in units of the image, not in pixels"
    return "view and box come from different draws"


def check_box(name, view, box, width):
    """Fails unless the box bounds what its view of coordinates_image shows."""
    __tracebackhide__ = True
    shown = shown_box(view)
    texts = [", ".join(f"{edge:.1f}" for edge in edges) for edges in (shown, box.tolist())]
    what = f"{name} shows x0, y0, x1, y1 = {texts[0]}; its box says {texts[1]}"
    same = np.allclose(box, shown, atol=0.75)
    check(same, f"{what}. Perhaps {explain_box(box, shown, width)}.")


def test_views_show_what_their_boxes_bound(crops):
    (_, width), views = crops
    for view, box, _ in views:
        check_box("A view", view, box, width)


def test_views_are_cropped_by_scale_and_ratio():
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    views = TwoViews(size=8, scale=(0.2, 0.5))
    boxes = torch.stack([views.crop(image)[1] for _ in range(500)])
    left, right = boxes[:, [0, 2]].amin(1), boxes[:, [0, 2]].amax(1)
    width, height = right - left, boxes[:, 3] - boxes[:, 1]
    share, ratio = width * height / (300 * 400), width / height
    mirrored = int((boxes[:, 0] > boxes[:, 2]).sum())
    # 250, and four standard deviations of 11 around it.
    wanted = "Half of the views are mirrored (torch.rand(()) < 0.5)"
    check(205 <= mirrored <= 295, f"{wanted}; found {mirrored} of 500.")
    ranges = {
        "Crops of scale (0.2, 0.5) take 20% to 50% of the area (self.scale)": (share, 0.2, 0.5),
        "Width / height lies between 3/4 and 4/3": (ratio, 3 / 4, 4 / 3),
    }
    for wanted, (values, low, high) in ranges.items():
        found = f"found {values.min():.2f} to {values.max():.2f} in 500 crops"
        check(0.95 * low < values.min() < 1.25 * low, f"{wanted}; {found}.")
        check(0.9 * high < values.max() < 1.05 * high, f"{wanted}; {found}.")
    spread = min(left.std(), boxes[:, 1].std())
    check(spread > 20, "The crops lie at nearly the same place: draw their corner.")


def test_views_come_with_their_own_colours_and_boxes():
    torch.manual_seed(0)
    views = TwoViews(size=56)
    views.colour_1, views.colour_2 = (lambda view: (1, view)), (lambda view: (2, view))
    for _ in range(10):
        (first, view_1), (second, view_2), box_1, box_2 = views(coordinates_image(120, 250))
        check((first, second) == (1, 2), "colour_1 belongs to view_1, colour_2 to view_2.")
        check(not torch.equal(box_1, box_2), "Both views are the same crop.")
        check_box("view_1", view_1, box_1, 250)
        check_box("view_2", view_2, box_2, 250)


def test_views_follow_the_seed_and_take_pil_images():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    pixel_by_pixel = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    torch.manual_seed(5)
    expected = TwoViews(size=24)(image)
    for form in (image, pixel_by_pixel, v2.functional.to_pil_image(image)):
        torch.manual_seed(5)
        same = all(map(torch.equal, TwoViews(size=24)(form), expected))
        check(same, "The views must follow torch's seed, and show the same for tensor and PIL.")
    gray = v2.functional.to_pil_image(image[:1])
    assert TwoViews(size=24)(gray)[0].shape == (3, 24, 24)


# The colours of the views, which no exercise changes.
def test_colours_blur_is_gaussian():
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        torch.manual_seed(seed)
        blurred = pixpro.random_blur(image)
        torch.manual_seed(seed)
        sigma = torch.empty(()).uniform_(0.1, 2.0).item()
        expected = v2.functional.gaussian_blur(image, 17, sigma)  # ours is cut at 3 sigma
        assert torch.allclose(blurred, expected, atol=3e-3)


def test_colours_hue_is_shifted_as_in_torchvision():
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0))
    image[:, :10] = image[:1, :10]  # gray has no hue
    image[0, 10:20] = image[1, 10:20]  # two largest channels that are equal
    for seed in range(20):
        torch.manual_seed(seed)
        shifted = pixpro.random_hue(image)
        torch.manual_seed(seed)
        shift = torch.empty(()).uniform_(-0.6, 0.6).item() / 6
        assert torch.allclose(shifted, v2.functional.adjust_hue(image, shift), atol=3e-6)


def test_colours_are_those_of_byol():
    # BYOL's: brightness and contrast 0.4, saturation 0.2, hue 0.1 (tested above), with p = 0.8.
    views = TwoViews()
    assert views.scale == (0.08, 1.0) and views.size == 224
    for colour, *chances in ((views.colour_1, 1.0, 0.0), (views.colour_2, 0.1, 0.2)):
        to_float, jitter, gray, blurring, solarizing, normalize = colour.transforms
        [order] = jitter.transforms
        assert isinstance(order, v2.RandomOrder) and isinstance(gray, v2.RandomGrayscale)
        brightness, contrast, saturation, hue = order.transforms
        assert brightness.brightness == contrast.contrast == pytest.approx((0.6, 1.4))
        assert saturation.saturation == pytest.approx((0.8, 1.2)) and hue is pixpro.random_hue
        assert brightness.contrast is contrast.brightness is saturation.hue is None
        assert blurring.transforms == [pixpro.random_blur]
        assert solarizing.threshold == pytest.approx(128 / 255)
        assert [part.p for part in (jitter, gray, blurring, solarizing)] == [0.8, 0.2, *chances]
        view = normalize(to_float(torch.full((3, 2, 2), 128, dtype=torch.uint8)))
        expected = [0.074065, 0.205182, 0.426492]  # (128 / 255 - mean) / std
        assert view[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


# ------------------------------------ LARS, learning rate ------------------------------------
def stepped(p, *gradients, lr=2.0, **options):
    """A parameter after a step of LARS with each gradient, at rates lr, lr / 2, ..."""
    p = nn.Parameter(p.clone())
    optimizer = train.LARS([p], lr=lr, **options)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        check(torch.equal(p.grad, gradient), "step() changed p.grad: others may read it later.")
        optimizer.param_groups[0]["lr"] /= 2
    return p.detach()


P, G = tensor([3, 0], [0, 4]), tensor([0, 8], [6, 0])  # of norms 5 and 10
HAND = {"momentum": 0.5, "trust_coefficient": 0.01}
LARS_MISTAKES = {
    0: "nothing happened: p = ... only gives a new tensor that name",
    -16: "the trust ratio is missing: the step is that of SGD",  # -2 * 8
    -0.32: "the trust ratio is upside down; it must be |p| / |g|",  # -2 * 8 * 0.01 * 10 / 5
    -0.8: "the division by |g| is missing",  # -2 * 8 * 0.01 * 5
    -0.04: "the learning rate is missing, or g is multiplied by 1 - m",  # -8 * 0.005
    -0.12: "v begins as g and g is added, or it is Nesterov's",  # -2 * 8 * 0.005 * 1.5
}


def test_lars_one_step_by_hand():
    # g * 0.01 * 5 / 10 = 0.005 g; times the rate 2: 0 - 0.01 * 8 = -0.08.
    p = stepped(P, G, weight_decay=0, **HAND)
    check_value("p[0, 1] after one step without decay, by hand", p[0, 1], -0.08, LARS_MISTAKES)


LARS_DECAY_MISTAKES = {
    (3, -0.08): "the weight decay is missing",  # p - 2 * 0.005 g
    (2.97, -0.08): "the trust ratio has the norm of g before the decay is added",  # 0.005 (g + p)
    (2.98, -0.053333): "|g| + decay |p| is the denominator",  # 0.01 * 5 / (10 + 5) (g + p)
    (-3, -0.08): "the decay is added after the scaling; it comes first",  # 0.005 g + p, times 2
}


def test_lars_weight_decay_by_hand():
    # g + p = [[3, 8], [6, 4]] of norm 11.1803; 2 * 0.01 * 5 / 11.1803 = 0.00894427:
    # 3 - 3 * 0.00894427 and 0 - 8 * 0.00894427.
    p = stepped(P, G, weight_decay=1, **HAND)
    what = "p[0] after one step with decay, by hand"
    check_value(what, p[0], (2.973167, -0.071554), LARS_DECAY_MISTAKES)


LARS_MOMENTUM_MISTAKES = {
    -0.120008: "v is not kept from step to step",  # -0.08 - 0.005001 * 8
    -0.160008: "the rate is inside of v, or v is not multiplied by m",  # v = (0.005 + 0.005001) g
    -0.200016: "the rate of the constructor is taken, not the group's",  # the rate 2 again
}


def test_lars_velocity_by_hand():
    # v = 0.005 g, p[0, 1] = -0.08. Then |p| = 5.001, v = 0.5 * 0.005 g + 0.005001 g = 0.007501 g,
    # and with the rate 1: -0.08 - 0.007501 * 8 = -0.140008.
    p = stepped(P, G, G, weight_decay=0, **HAND)
    what = "p[0, 1] after two steps, by hand"
    check_value(what, p[0, 1], -0.140008, LARS_MOMENTUM_MISTAKES, tolerance=1e-6)


def test_lars_velocity_is_not_the_gradient():
    # The same gradient tensor is filled again, as after zero_grad(set_to_none=False).
    for shape in ([2, 2], [4]):
        p = nn.Parameter(torch.ones(shape))
        p.grad = torch.ones(shape)
        optimizer = train.LARS([p], lr=1.0)
        optimizer.step()
        before = p.detach().clone()
        p.grad.zero_()
        optimizer.step()
        cause = "Perhaps v is p.grad itself: copy it."
        check((p < before).all(), f"After a gradient of 0 v must still move p {shape}. {cause}")


LARS_VECTOR_MISTAKES = {
    -1.25: "vectors are decayed; they must take plain SGD steps",  # g = 3, then 1.5
    0.999125: "vectors are scaled; they must take plain SGD steps",  # by 0.001 * 2 / 4
    -0.5: "vectors have no momentum",  # 0 - 0.25 * 2
    1: "vectors are skipped",
    -0.75: "it is treated like a vector: two of its dimensions are larger than 1",
}


def test_lars_treats_vectors_like_plain_sgd():
    # Biases, norms and ConvNeXt's scales [C, 1, 1]: at most one dimension is larger than 1. They
    # have no decay and no trust ratio. v = 2, p = 1 - 0.5 * 2 = 0; v = 0.5 * 2 + 2 = 3,
    # p = 0 - 0.25 * 3 = -0.75. The last is a matrix.
    shapes = {(4,): -0.75, (4, 1, 1): -0.75, (1, 4): -0.75, (1, 2, 1, 2): 0.999125}
    for shape, expected in shapes.items():
        g = torch.full(shape, 2.0)
        p = stepped(torch.ones(shape), g, g, lr=0.5, momentum=0.5, weight_decay=1.0)
        what = f"Ones of shape {shape} after gradients of 2, rates 0.5 and 0.25, momentum 0.5"
        check_value(what, p.flatten()[0], expected, LARS_VECTOR_MISTAKES)


def test_lars_moves_what_is_0():
    # |p| = 0 would scale the step to nothing for ever: the ratio is 1 there.
    # And the other way round, |g| = 0: eps keeps |p| / |g| finite.
    one = torch.ones(2, 2)
    mistakes = {0: "the ratio is 0 where |p| = 0, so that p can never move: it must be 1"}
    found = stepped(0 * one, one, weight_decay=0)[0, 0]
    check_value("A matrix of 0 after a gradient of 1 at rate 2", found, -2, mistakes)
    found = stepped(one, 0 * one, weight_decay=0)[0, 0]
    check_value("A matrix of 1 after a gradient of 0", found, 1)
    found = stepped(one, one, weight_decay=0, eps=2.0)[0, 0]  # 1 - 2 * 0.001 * 2 / (2 + 2)
    check_value("A matrix of 1 after a gradient of 1 with eps 2", found, 0.999)


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
        loss = p.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    check(loss is not None, "step(closure) must call it and return its loss, found None.")
    check_value("The loss that step(closure) returns", loss, 4)
    check((p < 1).all(), "step(closure) must run the closure, and then move p.")


def test_lars_groups_have_states_and_options_of_their_own():
    other = {"momentum": 0.5, "weight_decay": 0.3, "trust_coefficient": 0.1, "eps": 1.0}
    for name, value in other.items():
        alone = stepped(P, G, G, **{name: value})
        p, q = nn.Parameter(P.clone()), nn.Parameter(P.clone())
        optimizer = train.LARS([{"params": [p], name: value}, {"params": [q]}], lr=2.0)
        for scale in (1, 2):
            p.grad, q.grad = G.clone(), scale * G
            optimizer.step()
            optimizer.param_groups[0]["lr"] /= 2
        cause = "Do parameters share one v, or one norm?"
        same = torch.equal(p, alone)
        check(same, f"A group with its own {name} moves otherwise beside another one. {cause}")
        check(not torch.allclose(p, q, atol=1e-6), f"A group's own {name} is ignored.")


def test_lars_continues_from_its_state():
    p = nn.Parameter(P.clone())
    first = train.LARS([p], lr=2.0)
    p.grad = G
    first.step()
    q = nn.Parameter(p.detach().clone())
    second = train.LARS([q], lr=2.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    q.grad = G
    first.step()
    second.step()
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
    authors = [0.7822871804, 0.9352322221, 0.1264628023, -0.8391467333, -0.8408296704, 0.1752143502]
    check_value("The authors' matrix, 6 elements", w.flatten()[:6], authors, tolerance=1e-6)
    authors = [-0.8305042386, -0.2755451798, 0.8271970153, 1.8314388990, 1.9535747766, 0.9095216990]
    authors += [-0.7446691990]
    check_value("The authors' vector", b, authors, tolerance=1e-6)
    check_value("The authors' matrix of zeros", z[0, 0], -0.5700899959, tolerance=1e-6)


# A run of 40 steps, 10 of them warm-up, peak 2, floor 0.1.
SCHEDULE_CASE = {"total_steps": 40, "warmup_steps": 10, "peak": 2.0, "floor": 0.1}
WARM_UP_MISTAKES = {
    1.0: "the warm-up starts at 0, not at peak / 100",  # 2 * 5 / 10
    1.208: "steps are counted from 1",  # 2 * (0.01 + 0.99 * 6 / 10)
    1.02: "the warm-up ends above the peak, by peak / 100",  # 2 * (0.01 + 5 / 10)
    1.1: "the warm-up starts at a tenth of the peak",  # 2 * (0.1 + 0.9 * 5 / 10)
    0.2: "the warm-up is geometric; it is linear",  # 2 * 0.01^(1 / 2)
    2: "there is no warm-up",
}
SCHEDULE_MISTAKES = {
    1.6: "the floor is added to the whole cosine",  # 0.1 + 2 * (1 + cos(pi / 3)) / 2
    1.5: "the floor is ignored, or is only the smallest value",  # 2 * (1 + cos(pi / 3)) / 2
    1.721751: "total_steps divides steps after the warm-up",  # 1.9 * (1 + cos(pi / 4)) / 2 + 0.1
    1.366667: "the rate falls on a straight line",  # 0.1 + 1.9 * 2 / 3
    0.575: "a whole period is taken, or the cosine's sign is wrong",  # 0.1 + 1.9 * (1 - 1/2) / 2
    1.947709: "pi is missing",  # 0.1 + 1.9 * (1 + cos(1 / 3)) / 2
    0.145208: "the cosine is given degrees; it takes radians",  # 0.1 + 1.9 * (1 + cos(60)) / 2
    2: "the rate stays at the peak, as if the progress were 0",  # 10 // 30
}


def test_schedule_by_hand():
    # 2 * (0.01 + 0.99 * 5 / 10)
    what = "The rate at step 5 of 10 of warm-up"
    check_value(what, train.lr_at(5, **SCHEDULE_CASE), 1.01, WARM_UP_MISTAKES)
    # A third of the way from step 10 to step 40: 0.1 + 1.9 * (1 + cos(pi / 3)) / 2
    what = "The rate at step 20 of 40"
    check_value(what, train.lr_at(20, **SCHEDULE_CASE), 1.525, SCHEDULE_MISTAKES)
    ends = {0: "peak / 100", 10: "the peak", 40: "the floor"}
    for (step, name), expected in zip(ends.items(), (0.02, 2, 0.1)):
        check_value(f"Rate at step {step}: {name}", train.lr_at(step, **SCHEDULE_CASE), expected)


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
        found = train.lr_at(step, 200, 50, peak=4.0)
        check_value(f"The authors' rate at step {step} of 200", found, lr, tolerance=1e-12)


# ------------------------------------ The whole ------------------------------------
# Not for the exercises. While an exercise is open, tests named `whole` may fail.
class SmallBackbone(nn.Module):
    """A hand-made network: PixPro needs nothing but a map and out_channels."""

    def __init__(self):
        super().__init__()
        self.out_channels = 8
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())

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


def shuffle_momentum_encoder(model):
    """Now it differs from the online encoder, as it does after a few steps."""
    for name, module in model.named_children():
        for p in module.parameters() if name.startswith("momentum") else ():
            nn.init.normal_(p)


def test_whole_adds_alpha_times_the_instance_loss():
    # Projector, predictor, pooling, cosine; targets from the momentum branch of the other view.
    assert not hasattr(small_pixpro(), "instance_projector")
    model, batch = small_pixpro(instance_weight=0.5), small_batch()
    shuffle_momentum_encoder(model)
    with torch.no_grad():
        total = model(*batch).loss
        model.instance_weight = 0.0
        pixel = model(*batch).loss
        p, z = [], []
        for view in batch[:2]:
            projected = model.instance_projector(model.backbone(view))
            p.append(model.instance_predictor(projected).mean((2, 3)))
            z.append(model.momentum_instance_projector(model.momentum_backbone(view)).mean((2, 3)))
    expected = pixel + 0.5 * (instance_loss(p[0], z[1]) + instance_loss(p[1], z[0]))
    assert total.item() == pytest.approx(expected.item(), abs=1e-5)


def test_whole_update_moves_every_part_of_the_encoder():
    model = small_pixpro(instance_weight=1.0)
    old = copy.deepcopy(model)
    shuffle_momentum_encoder(model)
    before = copy.deepcopy(model)
    model.update_momentum(0.9)
    modules = {name for name, _ in model.named_children() if name.startswith("momentum_")}
    assert modules == {f"momentum_{n}" for n in ("backbone", "projector", "instance_projector")}
    for name, p in model.named_parameters():
        online, expected = name.removeprefix("momentum_"), before.get_parameter(name)
        assert p.requires_grad == (online == name)
        if online != name:
            assert torch.equal(old.get_parameter(name), old.get_parameter(online))
            expected = 0.9 * expected + 0.1 * before.get_parameter(online)
        assert torch.allclose(p, expected, atol=1e-6)


def test_whole_authors_loss():
    # regression_loss of all four images, pos_ratio T: theirs is twice Eq. 5, and counts the fourth
    # image, which has no positive pair, as 0.
    q, k = wave(4, 8, 7, 7, a=0.37), wave(4, 8, 7, 7, a=0.53, b=0.5)
    box_1, box_2 = tensor(*AUTHORS_BOX_1), tensor(*AUTHORS_BOX_2)
    for threshold, authors in ((0.35, 0.0196905155), (0.7, 0.0099607334), (1.4, 0.0051517664)):
        positives = positive_pairs(box_1, box_2, (7, 7), threshold)
        found = 2 * consistency_loss(q, k, positives).item() * 3 / 4
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


def encoded(model, batch):
    """x and x' of both views, without gradient; the momentum encoder is another one."""
    shuffle_momentum_encoder(model)
    with torch.no_grad():
        x = [model.projector(model.backbone(view)) for view in batch[:2]]
        x_prime = [model.momentum_projector(model.momentum_backbone(view)) for view in batch[:2]]
    return x, x_prime


def test_whole_figures_are_what_they_say():
    model, batch = small_pixpro(), small_batch()
    x, x_prime = encoded(model, batch)
    output = model(*batch)
    A = slow_positive_pairs(*batch[2:], (3, 4), 0.7)
    assert output.pairs.item() == pytest.approx(A.sum().item() / 4)

    def both(maps, x_prime):
        forth = slow_consistency(maps[0], x_prime[1], A)
        return forth + slow_consistency(maps[1], x_prime[0], A.transpose(1, 2))

    with torch.no_grad():
        y = [model.propagation(one) for one in x]
    assert output.loss.item() == pytest.approx(both(y, x_prime), abs=1e-5)
    assert output.similarity.item() == pytest.approx(-both(x, x_prime) / 2, abs=1e-5)
    vectors = [F.normalize(one).transpose(0, 1).flatten(1) for one in x]  # [6, N HW] each
    spreads = [one.numpy().std(1).mean() * math.sqrt(6) for one in vectors]
    assert output.spread.item() == pytest.approx(np.mean(spreads), abs=1e-5)
    assert not any(figure.requires_grad for figure in output[1:])
    assert all(value.dim() == 0 for value in output)


def test_whole_pixcontrast_objective():
    model, batch = small_pixpro(objective="pixcontrast", temperature=0.2), small_batch()
    assert not hasattr(model, "propagation")
    A = slow_positive_pairs(*batch[2:], (3, 4), 0.7)
    x, x_prime = encoded(model, batch)
    expected = slow_pixcontrast(x[0], x_prime[1], A, 0.2)
    expected += slow_pixcontrast(x[1], x_prime[0], A.transpose(1, 2), 0.2)
    assert model(*batch).loss.item() == pytest.approx(expected, rel=1e-5)


LAYERS = {"instance_weight": 1.0, "num_layers": 2}
CONTRAST = {"objective": "pixcontrast"}


@pytest.mark.parametrize("options", [{}, LAYERS, CONTRAST], ids=range(3))
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


def test_whole_default_is_the_paper():
    defaults = {name: p.default for name, p in inspect.signature(PixPro).parameters.items()}
    paper = {"dim": 256, "hidden_dim": 2048, "gamma": 2, "num_layers": 1, "threshold": 0.7}
    paper |= {"instance_weight": 0, "objective": "pixpro", "temperature": 0.3}
    assert defaults.items() >= paper.items() and pixcontrast_loss.__defaults__ == (0.3,)
    others = [kind.__init__.__defaults__ for kind in (PixelPropagation, train.LARS)]
    assert others == [(256, 2, 1), (0.9, 1e-5, 1e-3, 1e-8)]
    del paper["dim"]  # no flag
    assert set(train.MODEL) == paper.keys() and vars(train.parse([])).items() >= paper.items()


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


@pytest.mark.parametrize("options", [LAYERS, CONTRAST], ids=range(2))
def test_whole_compiles_in_one_graph(options):
    torch.compiler.reset()
    model = small_pixpro(**options)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, output = model(*small_batch()).loss, compiled(*small_batch()).loss
    assert torch.allclose(output, expected, atol=1e-6)
    output.backward()


def test_whole_loop_of_the_docstring_runs():
    # cleandoc, as from Python 3.13 on a docstring comes without its indentation
    loop = re.search(r"\n\n((?: {4}.*\n)+)", inspect.cleandoc(PixPro.__doc__))[1]
    first, model = small_pixpro(), small_pixpro()
    names = {"model": model, "loader": [small_batch(), small_batch(seed=1)], "total_steps": 2}
    names["optimizer"] = torch.optim.SGD(trained(model), lr=0.1)
    exec(textwrap.dedent(loop), vars(pixpro) | names)
    parts = first.projector, model.projector, model.momentum_projector
    values = {part[0].weight[0, 0, 0, 0].item() for part in parts}
    assert len(values) == 3  # both have moved, by different amounts


@pytest.mark.parametrize("options", [LAYERS, CONTRAST], ids=range(2))
def test_whole_step_on_another_device(options, monkeypatch):
    """On device meta, which computes shapes alone: a tensor left on the CPU shows, and so does
    what a GPU's results would have to reach the host for."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # not on meta
    model = small_pixpro(**options).to("meta")
    batch = [part.to("meta") for part in small_batch()]
    optimizer = train.LARS(trained(model), lr=1.0)
    for _ in range(2):
        model.update_momentum(0.99)
        output = model(*batch)
        output.loss.backward()
        optimizer.step()
    states = [state["v"] for state in optimizer.state.values()]
    assert all(part.is_meta for part in [*output, *model.state_dict().values(), *states])
    with pytest.raises(RuntimeError):  # the test itself: boxes that stayed behind
        model(*batch[:2], *small_batch()[2:])


FUNCTIONS = {  # that others copy, and the arguments of one call
    "positive_pairs": lambda: (random_boxes(3, seed=1), random_boxes(3, seed=2), (2, 3)),
    "pixcontrast_loss": lambda: (*random_maps(), random_positives()),
    "PixelPropagation": lambda: (random_maps()[0],),
    "consistency_loss": lambda: (*random_maps(), random_positives()),
    "instance_loss": random_vectors,
    "momentum_at": lambda: (3, 10),
}
LOSSES = [name for name in FUNCTIONS if name.endswith("loss")]


def function_of(module, name):
    if name == "PixelPropagation":
        torch.manual_seed(0)
        return module.PixelPropagation(dim=5)
    return getattr(module, name)


@pytest.mark.parametrize("name", FUNCTIONS, ids=range(len(FUNCTIONS)))
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_whole_in_half_precision(dtype):
    """Under autocast the losses compute in float32, Eq. 3's product in half precision."""
    for name in (*LOSSES, "PixelPropagation"):
        function, (x, *others) = function_of(pixpro, name), FUNCTIONS[name]()
        expected = function(x, *others)
        with torch.autocast("cpu", dtype):
            found, from_half = function(x, *others), function(x.to(dtype), *others)
        is_loss = name in LOSSES
        assert torch.allclose(found.float(), expected, atol=1e-6 if is_loss else 0.03)
        assert torch.allclose(from_half.float(), expected, atol=0.03)
        assert found.dtype == from_half.dtype == (torch.float32 if is_loss else dtype)


def test_whole_losses_take_zeros_and_large_numbers():
    for name in LOSSES:
        function, (x, x_prime, *positives) = getattr(pixpro, name), FUNCTIONS[name]()
        # 700^2 = 490,000 overflows float16 (65,504): the products are computed in float32.
        with torch.autocast("cpu", torch.float16):
            found = function((700 * x).half(), (700 * x_prime).half(), *positives)
        assert found.item() == pytest.approx(function(x, x_prime, *positives).item(), abs=1e-3)
        x[0] = 0
        loss = function(x.requires_grad_(), x_prime, *positives)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()


# ------------------------------------ Networks ------------------------------------
def test_backbone_is_torchvisions_and_leaves_no_trace():
    for layer, above in (("layer4", {"fc"}), ("layer3", {"layer4", "fc"})):
        torch.manual_seed(0)
        network = torchvision.models.resnet18(weights=None)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        backbone = Backbone("resnet18", layer)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in backbone.modules())
        assert backbone.out_channels == (512 if layer == "layer4" else 256)
        missing, unexpected = network.load_state_dict(backbone.body.state_dict(), strict=False)
        assert not unexpected and {name.split(".")[0] for name in missing} == above
        x = torch.randn(2, 3, 64, 64)
        up_to = nn.Sequential(*list(network.children())[: -2 if layer == "layer4" else -3])
        with torch.no_grad():
            assert torch.equal(backbone.eval()(x), up_to.eval()(x))


def test_backbone_starts_residual_blocks_at_zero():
    for arch, last in (("resnet18", "bn2"), ("resnext50_32x4d", "bn3")):
        block = Backbone(arch, "layer1").body.get_submodule("layer1.0")
        assert not getattr(block, last).weight.any() and block.bn1.weight.all()


def test_heads_load_into_a_detector_of_torchvision():
    """Strictly, and the features of the levels P3 to P6 are the same to the last bit."""
    torch.manual_seed(0)
    heads, image = Heads("resnet50"), torch.rand(2, 3, 64, 64)
    heads(image)  # moves BatchNorm's statistics
    heads.eval()
    fcos = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5).eval()
    tower = fcos.head.classification_head.conv[:9]
    weights = heads.state_dict()
    fcos.backbone.load_state_dict({n: w for n, w in weights.items() if not n.startswith("tower.")})
    tower.load_state_dict(heads.tower.state_dict())
    with torch.no_grad():
        levels, theirs = heads(image), fcos.backbone(image)
        assert list(levels) == ["0", "1", "2", "p6"]
        assert all(torch.equal(level, tower(theirs[name])) for name, level in levels.items())
    assert not any(p.requires_grad for p in heads.fpn.extra_blocks.p7.parameters())  # of no level
    last = [block.bn3.weight for block in heads.body.modules() if hasattr(block, "bn3")]
    assert len(last) == 16 and not any(weight.any() for weight in last)  # blocks begin at zero


# Calls that do not fit: the error, its words, and the call.
REFUSALS = [
    (TypeError, "found torch.float32", lambda: TwoViews()(torch.zeros(3, 20, 20))),
    (TypeError, "I;16", lambda: TwoViews()(v2.functional.to_pil_image(GREY))),
    (ValueError, r"found \[1, 4, 4\]", lambda: TwoViews()(torch.zeros(1, 4, 4).byte())),
    (ValueError, r"\[2, 4\], \[1, 4\]", lambda: positive_pairs(BOX[[0, 0]], BOX, (7, 7))),
    (ValueError, "32 or 64 bits, .*float16", lambda: positive_pairs(BOX.half(), BOX, (7, 7))),
    (ValueError, "threshold >= 0, found nan", lambda: positive_pairs(BOX, BOX, (7, 7), math.nan)),
    (ValueError, "temperature > 0, found 0", lambda: losses_of(random_positives(), temperature=0)),
    (ValueError, r"\[3, 6, 6\] .* \[3, 5, 6\]", lambda: losses_of(random_positives(size=(5, 6)))),
    (ValueError, r"\[3, 5, 2, 3\], \[2, 5, 2, 3\]", lambda: losses_of(random_positives(), n=2)),
    (TypeError, "torch.bool", lambda: losses_of(random_positives().float(), 3, consistency_loss)),
    (ValueError, r"4\], .* 1\]", lambda: consistency_loss(BOX[None, None], BOX.T[None, None], 0)),
    (ValueError, r"\[N, 8, H, W\], found \[3, 5", lambda: PixelPropagation(8)(random_maps()[0])),
    (ValueError, "gamma > 0", lambda: PixelPropagation(gamma=0)),
    (ValueError, r"\[2, 3\] and \[3, 3\]", lambda: instance_loss(torch.eye(2, 3), torch.eye(3))),
    (ValueError, "from 0 to total_steps, found 11 of 10", lambda: momentum_at(11, 10)),
    (ValueError, r"m in \[0, 1\], found 1.1", lambda: ema_update(*two_networks(), 1.1)),
    (ValueError, "bfloat16", lambda: ema_update(*[nn.Linear(1, 1).bfloat16()] * 2, 0.9)),
    (ValueError, "shorter", lambda: ema_update(nn.Linear(1, 1), nn.Linear(1, 1, bias=False), 0.9)),
    (ValueError, "found 'deeplabv3_resnet50'", lambda: Backbone("deeplabv3_resnet50")),  # downloads
    (ValueError, r"swin_t .* \[1, 7, 7, 768\], 0 un", lambda: Backbone("swin_t", "features")),
    (ValueError, r"\[1, 768, 14, 14\], 134 unused", lambda: Backbone("vit_b_16", "conv_proj")),
    (ValueError, "found 'fcos_resnet50_fpn'", lambda: Heads("fcos_resnet50_fpn")),
    (ValueError, "found 'simsiam'", lambda: small_pixpro(objective="simsiam")),
    (TypeError, "PixProOnLevels", lambda: PixPro(SmallPyramid(), 6, 10)(*small_batch())),
]
BOX = tensor([0, 0, 10, 10])  # one crop pair for a whole batch
GREY = torch.zeros(1, 9, 9).short()


def losses_of(positives, n=3, loss=pixcontrast_loss, **options):
    x, x_prime = random_maps()
    loss(x, x_prime[:n], positives, **options)


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_whole_refuses_what_does_not_fit(number):
    error, message, call = REFUSALS[number]
    with pytest.raises(error, match=message):
        call()


# ------------------------------------ Handing out ------------------------------------
HANDED_OUT = ("pixpro.py", "train.py", "test_pixpro.py", "tutorial.ipynb", "requirements.txt")
HANDED_OUT += ("LICENSE", ".gitignore", ".ruff.toml", ".github/architecture.svg")
README_OF_A_COPY = """# Exercises on PixPro

PixPro ([arXiv 2011.10043](https://arxiv.org/abs/2011.10043)) is pixpro.py, trained by train.py.
The bodies of these functions are yours to write, where `NotImplementedError` is raised:

| word | function | in the paper | chapter of tutorial.ipynb | test |
|---|---|---|---|---|
{rows}

1. `pip install -r requirements.txt matplotlib ipykernel scikit-image` (three for the notebook)
2. Read the docstring of a function: it says what goes in and what comes out. Write the body.
3. Run its test. The first failure says what is wrong, in words.
4. {commands} shows how it will be graded.

Hand in {files}. These bodies count, and new functions, constants and imports (torch, torchvision,
numpy, Python's own); other changes are ignored. Tests named `whole` use several functions, and fail
while one is open. When all are written, `python train.py` trains on drawn scenes.
"""


def find(tree, name):
    """The function or method of this name, like "LARS.step", in a syntax tree."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


def is_kept(statement):
    """Whether a statement stays in an opened body: a docstring, or a check of the arguments."""
    if isinstance(statement, ast.If):
        return isinstance(statement.body[-1], ast.Raise)
    return ast.unparse(statement).startswith(("'", '"', "check_maps("))


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


def without_outputs(notebook):
    cells = json.loads(notebook)
    for cell in cells["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(cells, indent=1, ensure_ascii=False) + "\n"


def student_version(words):
    """{file: its text} of a copy of the project where these exercises are open."""
    texts = {name: (HERE / name).read_text("utf-8") for name in HANDED_OUT}
    texts["tutorial.ipynb"] = without_outputs(texts["tutorial.ipynb"])
    rows = []
    for word in words:
        exercise = EXERCISES[word]
        message = f"{exercise.place}, chapter {exercise.chapter} of tutorial.ipynb; "
        message += exercise.command()
        for name in exercise.functions.split():
            texts[exercise.file()] = opened(texts[exercise.file()], name, message)
        if exercise.slow:
            texts["test_pixpro.py"] = without(texts["test_pixpro.py"], exercise.slow)
        cells = [word, f"`{exercise.functions}` in {exercise.file()}", exercise.place]
        cells += [str(exercise.chapter), f"`{exercise.command()}`"]
        rows.append(f"| {' | '.join(cells)} |")
    files = sorted({EXERCISES[word].file() for word in words})
    own = {file: [word for word in words if EXERCISES[word].file() == file] for file in files}
    commands = [f"`python test_pixpro.py grade {f} --only {' '.join(own[f])}`" for f in files]
    fields = {"commands": " or ".join(commands), "files": " and ".join(files)}
    return texts | {"README.md": README_OF_A_COPY.format(rows="\n".join(rows), **fields)}


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
    Path(folder, ".github").mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    print(f"{folder} has the project with {' '.join(words)} open; begin with its README.md")


# ------------------------------------ Grading ------------------------------------
ALLOWED = {"torch", "torchvision", "numpy", *sys.stdlib_module_names}  # imports
DECORATORS = r"(torch\.)?no_grad(\(\))?|staticmethod"
SOLUTIONS = {"test_pixpro", *[exercise.slow for exercise in EXERCISES.values() if exercise.slow]}


def definitions(tree):
    """{(its class or "", its name): statement} of a module and of its classes.

    The name of what has none is its first line. Of two with one name the last counts.
    """
    found = {}
    for statement in tree.body:
        is_class = isinstance(statement, ast.ClassDef)
        for part in statement.body if is_class else [statement]:
            line = ast.unparse(part).partition("\n")[0]
            name = getattr(part, "name", line.partition(" = ")[0])
            found[statement.name if is_class else "", name] = part
    return found


def is_constant(node):
    """Whether an expression calls nothing but float("inf") and the like."""
    calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)] if node else []
    return all(re.fullmatch(r"float\('\S+'\)", ast.unparse(call)) for call in calls)


def runs_no_code(statement):
    """Whether this is an import of what is allowed, a constant, or a function with constants."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        module = getattr(statement, "module", None)
        names = [module] if module else [alias.name for alias in statement.names]
        return all(name.partition(".")[0] in ALLOWED for name in names)
    if isinstance(statement, ast.FunctionDef):
        return all(map(is_constant, statement.args.defaults + statement.args.kw_defaults))
    assigns = isinstance(statement, (ast.Assign, ast.AnnAssign))
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    to_names = all(isinstance(target, ast.Name) for target in targets)
    return assigns and to_names and is_constant(statement.value)


def plain(statement):
    """Takes from a statement its annotations, and its decorators but those that are allowed."""
    for node in ast.walk(statement):
        if hasattr(node, "annotation"):
            node.annotation = ast.Constant(None) if isinstance(node, ast.AnnAssign) else None
    if isinstance(statement, ast.FunctionDef):
        statement.returns = None
        kept = [d for d in statement.decorator_list if re.fullmatch(DECORATORS, ast.unparse(d))]
        statement.decorator_list = kept


def read(path, words):
    """A submission's {word: verdict, or statements to graft}, and the names of what is ignored."""
    try:
        own = definitions(ast.parse(path.read_bytes(), path.name))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return dict.fromkeys(words, f"failed  cannot be read: {error}"), []
    exercises = [exercise for exercise in EXERCISES.values() if own.keys() & set(exercise.names())]
    if not exercises:
        return {}, []
    file, *others = {exercise.file() for exercise in exercises}
    if others:
        return dict.fromkeys(words, "failed  expected pixpro.py or train.py, found both in one"), []
    reference = definitions(ast.parse((HERE / file).read_bytes()))
    classes = {owner for owner, _ in reference}
    graded = {key for exercise in EXERCISES.values() for key in exercise.names()}
    taken, ignored = {}, []
    for key, statement in own.items():
        if key not in reference and key[0] in classes and runs_no_code(statement):
            taken[key] = statement
        elif key not in graded and ast.dump(statement) != ast.dump(reference.get(key, ast.Pass())):
            ignored.append(key[1])
    results = {}
    for word, exercise in EXERCISES.items():
        if word in words and exercise.file() == file:
            bodies = {key: own.get(key) for key in exercise.names()}
            results[word] = problem_of(bodies, taken) or taken | bodies
    return results, ignored


def problem_of(bodies, taken):
    """The verdict on bodies that cannot be run, else None."""
    for (_, name), body in bodies.items():
        if not isinstance(body, ast.FunctionDef):
            return f"failed  there is no {name}"
        own = next((part for part in body.body if not is_kept(part)), body.body[-1])
        if ast.unparse(own).startswith("raise NotImplementedError"):
            return "open"
        if not runs_no_code(body):
            return f"failed  expected constants as the defaults of {name}"
    for statement in (taken | bodies).values():
        plain(statement)
        for node in ast.walk(statement):
            fields = ("id", "attr", "name", "module", "value")
            solution = SOLUTIONS & {getattr(node, field, None) for field in fields}
            if solution:
                return f"failed  expected a body of its own, found {solution.pop()} in it"
    return None


def graft(module, statements):
    """Defines a submission's statements in this module of the reference."""
    for (owner, _), statement in statements.items():
        made, place = {}, getattr(module, owner) if owner else module
        code = ast.fix_missing_locations(ast.Module([statement], []))
        exec(compile(code, "the submission", "exec"), vars(module), made)
        for name, value in made.items():
            old = vars(place).get(name)
            if old is None or isinstance(statement, ast.FunctionDef):
                setattr(place, name, value)
                for other in (sys.modules["train"], sys.modules["test_pixpro"]):
                    if old is not None and vars(other).get(name) is old:
                        setattr(other, name, value)


def surroundings():
    """{(module, name): value} of what a body must leave as it is."""
    modules = (builtins, math, torch, torch.Tensor, F, pytest, sys.modules["test_pixpro"])
    return {(m.__name__, name): value for m in modules for name, value in vars(m).items()}


class Reporter:
    """A plugin of pytest that grafts before the first test, and sends each report at once."""

    def __init__(self, send, module, statements):
        self.send, self.module, self.statements = send, module, statements

    def pytest_collection_finish(self, session):
        try:
            graft(sys.modules[self.module], self.statements)
            self.before = surroundings()
        except Exception as error:
            self.send(("the file", "failed", f"{type(error).__name__}: {error}"))
            raise

    def pytest_sessionfinish(self):
        after = surroundings()
        for (module, name), value in self.before.items():
            if after.get((module, name)) is not value:
                self.send(("the file", "failed", f"it changes {name} of {module}"))

    def pytest_runtest_logstart(self, nodeid):
        self.send((nodeid, "started", ""))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash else report.longrepr)
            self.send((report.nodeid, report.outcome, message[:500]))


class Collector:
    def pytest_collection_finish(self, session):
        self.tests = [item.nodeid for item in session.items]


def run_pytest(plugin, *options):
    """pytest on this file, whatever files of settings lie around it."""
    ini = Path(tempfile.gettempdir(), "pytest.ini")
    ini.write_text("[pytest]\n")
    command = ["-c", ini, "--rootdir", HERE, "--noconftest", "-p", "no:cacheprovider", "-qs"]
    command += ["--tb=short", *options, HERE / "test_pixpro.py"]
    return pytest.main([str(part) for part in command], [plugin])


def expected_tests():
    """{word: the tests of the exercise}. Imports the tests, once for all forked processes."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        run_pytest(collector, "--collect-only")
    tests = {}
    for word, exercise in EXERCISES.items():
        words = exercise.tests.split(" or ")
        tests[word] = [t for t in collector.tests if any(w in t.partition("[")[0] for w in words)]
    return tests


def run_exercise(sender, word, statements):
    """In a process of its own: runs the tests of one exercise. What it prints goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.chdir(tempfile.mkdtemp())
    torch.set_num_threads(1)
    reporter = Reporter(sender.send, EXERCISES[word].file().removesuffix(".py"), statements)
    sys.exit(run_pytest(reporter, "-x", "-k", EXERCISES[word].tests))


def verdict_of(tests, reports, end):
    """Of reports (test, outcome, message): passed only if each of these tests reported so."""
    for test, outcome, message in reports:
        if outcome not in ("started", "passed"):
            message = re.sub(r"^(test_pixpro\.)?(Mistake|AssertionError): ", "", message)
            skipped = "" if outcome == "failed" else f"{outcome}, "
            return f"failed  {test.rpartition('::')[2]}: {skipped}{message.splitlines()[0]}"
    passed = [test for test, outcome, _ in reports if outcome == "passed"]
    if tests and passed == tests and end == 0:
        return "passed"
    last = reports[-1][0].rpartition("::")[2] if reports else "no test began"
    return f"failed  {last}: {end if isinstance(end, str) else f'the process ended with {end}'}"


def run_all(tasks, jobs, timeout):
    """{(path, word): verdict} of tasks {(path, word): statements}, in a process each."""
    tests = expected_tests()
    gc.freeze()  # so that no process walks through all of torch again
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting, running, verdicts = list(tasks.items()), [], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task, statements = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, task[1], statements)
            process = context.Process(target=run_exercise, args=arguments)
            process.start()
            # Both ends stay open here, so that an empty pipe is no error.
            running.append((task, process, (receiver, sender), time.monotonic() + timeout))
        time.sleep(0.01)
        for run in list(running):
            task, process, (receiver, _), deadline = run
            late = time.monotonic() > deadline
            if late or not process.is_alive():
                process.kill()
                process.join()
                reports = [receiver.recv() for _ in iter(receiver.poll, False)]
                end = f"no end within {timeout:g} seconds" if late else process.exitcode
                verdicts[task] = verdict_of(tests[task[1]], reports, end)
                running.remove(run)
    return verdicts


def files_of(path, pattern="*.py"):
    """A file, or such files of a folder without those of hidden folders and environments."""
    if not path.is_dir():
        return [path] if path.exists() else []
    parts = {file: file.relative_to(path).parts for file in sorted(path.rglob(pattern))}
    hidden = re.compile(r"\..*|site-packages|__MACOSX")
    return [file for file in parts if not any(map(hidden.fullmatch, parts[file]))]


def grade(arguments):
    """Prints a verdict for each exercise of each submission. Returns 0 if all passed, else 1."""
    parser = argparse.ArgumentParser(prog="python test_pixpro.py grade", allow_abbrev=False)
    parser.add_argument("path", type=Path, help="a pixpro.py or train.py, or a folder of them")
    parser.add_argument("--only", nargs="+", choices=EXERCISES, help="these exercises")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each exercise")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--csv", type=Path, help="writes a table: a row for each file")
    parser.add_argument("--gradescope", type=Path, help="writes Gradescope's results.json")
    args = parser.parse_args(arguments)
    files = files_of(args.path)
    verdicts, ignored = {}, {}
    for path in files:
        results, ignored[path] = read(path, args.only or EXERCISES)
        verdicts |= {(path, word): result for word, result in results.items()}
    missing = set(args.only or []) - {word for _, word in verdicts}
    if missing or not verdicts:
        wanted = " ".join(missing) or "a pixpro.py or train.py with exercises"
        parser.error(f"expected {wanted}, found none in {args.path}")
    tasks = {task: result for task, result in verdicts.items() if not isinstance(result, str)}
    verdicts |= run_all(tasks, args.jobs, args.timeout)
    for path in files:
        if len(files) > 1:
            print(path if any(path == file for file, _ in verdicts) else f"{path}: no exercise")
        for word in EXERCISES:
            if (path, word) in verdicts:
                print(f"{word:9} {verdicts[path, word]}")
        if ignored[path]:
            print(f"(ignored in {path.name}: {', '.join(ignored[path])})")
    left_out = {path.suffix for path in files_of(args.path, "*.*")} - {".py", ".pyc", ""}
    if args.path.is_dir() and left_out:
        print(f"(not graded: files of {', '.join(sorted(left_out))})")
    if args.csv:
        write_csv(args.csv, files, verdicts)
    if args.gradescope:
        write_gradescope(args.gradescope, verdicts)
    return int(set(verdicts.values()) != {"passed"})


def write_csv(path, files, verdicts):
    words = [word for word in EXERCISES if any(word == other for _, other in verdicts)]
    rows = [[file, *[verdicts.get((file, word), "") for word in words]] for file in files]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", *words], *rows])


def write_gradescope(path, verdicts):
    tests = []
    for (file, word), verdict in verdicts.items():
        name = f"{word}: {EXERCISES[word].functions} of {file.name}"
        score = float(verdict == "passed")
        tests.append({"name": name, "score": score, "max_score": 1.0, "output": verdict})
    path.write_text(json.dumps({"tests": tests}, indent=1), "utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "grade":
        sys.exit(grade(sys.argv[2:]))
    hand_out(sys.argv[1:-1], Path(sys.argv[-1]))
