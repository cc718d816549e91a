"""Checks DenseCL, VADeR and MCL of tutorial.ipynb, chapter 8, on values computed by hand."""

import math

import torch
from experiments import tutorial

from pixpro import Backbone, positive_pairs


def check_densecl(chapter):
    """Its loss on four pixels, dense alone and half dense; what it pushes into the queue."""
    shuffle = [2, 0, 3, 1]
    match = torch.tensor([[1, 3, 0, 2]])
    d = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]).view(1, 2, 2, 2)
    d_prime = d.flatten(2)[:, :, shuffle].view(1, 2, 2, 2)
    up = torch.tensor([[0.0, 1.0]])
    model = chapter["DenseCL"](Backbone("resnet18", "layer1"), dim=2, queue=1, temperature=1.0)
    for weight, expected in ((1.0, 0.503204), (0.5, 0.408233)):
        model.weight = weight
        model.whole_queue = torch.tensor([[1.0, 0.0]])
        model.dense_queue = torch.tensor([[1.0, 0.0]])
        found = model.loss(up, up, d, d_prime, match).item()
        assert abs(found - expected) < 1e-6, (weight, expected, found)

    raw = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])  # [1, 2, 1, 2]: pixels (2, 0) and (0, 1)
    model.loss(up, up, raw, raw, torch.tensor([[0, 1]]))
    expected = torch.tensor([[0.8944, 0.4472]])  # pooled, then normalised
    assert torch.allclose(model.dense_queue, expected, atol=1e-4), model.dense_queue


def check_vader(chapter):
    """Pairs on maps of 4 x 4: the same box, one cell to the right, mirrored, apart."""
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    right = torch.tensor([[1.0, 0.0, 5.0, 4.0]])
    mirrored = torch.tensor([[4.0, 0.0, 0.0, 4.0]])
    apart = torch.tensor([[90.0, 90.0, 94.0, 94.0]])
    for other, count in ((box, 16), (right, 12), (mirrored, 16), (apart, 0)):
        assert positive_pairs(box, other, (4, 4), threshold=0.5).sum() == count
    for other, column_of in (
        (box, lambda column: column),
        (right, lambda column: column - 1),
        (mirrored, lambda column: 3 - column),
    ):
        _, i, j = chapter["sample_pairs"](box, other, (4, 4), count=50)
        assert len(i) == 50
        assert torch.equal(j, i // 4 * 4 + column_of(i % 4))
    assert len(chapter["sample_pairs"](box, apart, (4, 4), count=50)[1]) == 0


def check_mcl(chapter):
    """Equal logits in both directions and at all three scales: 4 log N."""
    model = chapter["MCL"](scales=(1, 2, 4), weights=(0.5, 0.25, 0.25), dim=8, hidden=8)
    for predictor in model.predictors:
        torch.nn.init.zeros_(predictor[-1].weight)
        torch.nn.init.zeros_(predictor[-1].bias)
    view_1, view_2 = torch.rand(2, 16, 3, 128, 128)
    found = model(view_1, view_2, None, None).item()
    assert abs(found - 4 * math.log(16)) < 1e-5, found


if __name__ == "__main__":
    chapter = tutorial("imports", "relatives")
    check_densecl(chapter)
    check_vader(chapter)
    check_mcl(chapter)
    print("DenseCL, VADeR and MCL: all values as by hand")
