"""Checks chapter 9 of tutorial.ipynb on values by hand, and the grader of its exercise."""

import torch
from experiments import tutorial

from pixpro import positive_pairs

names = tutorial("imports", "relatives")
one_hot, q, k = torch.eye(5), torch.eye(3)[:1], torch.tensor([[0.8, 0.6, 0.0]])
d, negatives = torch.eye(2).repeat(2, 1), torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
for tau, inputs, expected in (
    (0.2, (one_hot[:1], one_hot[:1], one_hot[1:]), 0.026595),
    (1.0, (q, k, negatives), 0.818925),
    (0.2, (q, k, negatives), 0.326563),
    (1.0, (d, d, d[:1]), 0.503204),
    (0.2, (q[:0], k[:0], negatives), 0),  # no pair, and no NaN
):
    assert abs(names["info_nce"](*inputs, tau).item() - expected) < 1e-6, expected

# DenseCL: its loss on two pixels, which view 2 has in the other order, and what it pushes.
backbone = torch.nn.Identity()
backbone.out_channels = 2
densecl = names["DenseCL"](backbone, dim=2, queue=1)
for parts in (densecl.online, densecl.momentum):
    parts.update({"whole": backbone, "dense": backbone})
densecl.whole_queue, densecl.dense_queue = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
view = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])  # [1, 2, 1, 2]: pixels (2, 0) and (0, 1)
# log(1 + e^(negative - positive)) of the mean (2, 1) / sqrt 5, and of both pixels
logs = torch.tensor([(2 / 5**0.5 - 1) / 0.2, 0, -5]).exp().log1p() * torch.tensor([0.5, 0.25, 0.25])
assert abs(densecl(view, view.flip(3), None, None) - logs.sum()) < 1e-6
assert torch.allclose(densecl.dense_queue, torch.tensor([[0.8944, 0.4472]]), atol=1e-4)

# VADeR: on maps of 4 x 4 the same box, one cell to the right, mirrored, apart.
box, size, pairs = torch.tensor([[0.0, 0, 4, 4]]), torch.Size([4, 4]), names["VADeR"]().pairs
for other, columns in (([0, 0, 4, 4], "0123"), ([1, 0, 5, 4], " 012"), ([4, 0, 0, 4], "3210")):
    _, i, j = pairs(box, torch.tensor([other]), size)
    assert len(i) == 32
    assert all(f"{b % 4}" == columns[a % 4] and a // 4 == b // 4 for a, b in zip(i, j))
assert len(pairs(box, box + 90, size)[1]) == 0

# MCL: every cell of a montage finds its image, each of one colour.
plain = torch.rand(16, 3, 1, 1).expand(-1, -1, 64, 64)
for s in (1, 2, 4):
    found = names["cells"](names["montage"](plain, s), s).mean((2, 3))  # [16, 3]
    assert torch.allclose(found, plain[:, :, 0, 0], atol=1e-5)


def solution(least):  # keeps the pixels with at least so many positives
    class Solution(names["DenseCL"]):
        def pairs(self, f, f_prime, box_1, box_2):
            A = positive_pairs(box_1, box_2, f.shape[2:])
            image, i = (A.sum(2) >= least).nonzero().T
            return image, i, A[image, i].float().argmax(1)

    return Solution


views = torch.rand(2, 3, 64, 64), box.expand(2, 4)
assert names["grade_pairs"](solution(1), *views) == "pairs: passed"
found = names["grade_pairs"](solution(0), *views)
assert found.endswith("expected ij '10 21 43 54', found '00 10 21 30 43 54'"), found
