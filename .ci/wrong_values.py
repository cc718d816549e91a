"""Computes the tables of known wrong values in test_pixpro.py from the formulas of the mistakes.

    python .ci/wrong_values.py            fails if a value there is not what its formula gives

It stays out of the folder that students get: a formula with one mistake is nearly the solution.
"""

import sys
from math import cos, degrees, hypot, log, pi, radians, sin, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_pixpro as tests


def unit(x):
    return F.normalize(x, dim=-1)


def images_of(case):
    """Maps [1, C, H, W] of a hand case as pixels [HW, C] in float64, one pair for each image."""
    x, x_prime, positives = case
    maps = [m.double().flatten(2).transpose(1, 2) for m in (x, x_prime)]
    return list(zip(*maps, positives))


def eq1():
    d = hypot(3.5, 2)
    return [
        d / hypot(2, 1),
        d / ((5 + hypot(2, 1)) / 2),
        d / (5 + hypot(2, 1)),
        d,
        d / hypot(8, 3),
        d / 2.5,
        d / 4,
        d / 3,
        d / 12,
        5.5 / 5,
        3.5 / 5,
        d**2 / 5,
        d**2 / 25,
        max(3.5 / 4, 2 / 3),
        hypot(3.5 / 4, 2 / 3),
        hypot(3.5 / 4, 2 / 3) / sqrt(2),
        hypot(4.5, 3) / 5,
        hypot(2.5, 1) / 5,
        hypot(4.5, 2) / 5,
        hypot(3.5, 3) / 5,
        hypot(6.5, 3) / 5,
        hypot(2.5, 2) / 5,
        hypot(0.5, 3) / hypot(8, 1.5),
        hypot(1, 1) / 5,
        hypot(5.375, 3.5) / hypot(3.25, 4),
        hypot(3, 2) / 5,
        64,
        0,
    ]


def per_image(loss, cosines, positives):
    """The mean of loss(row of e, row of positives) over the pixels with a positive, or None."""
    rows = [loss(e, p) for e, p in zip(cosines, positives) if p.any()]
    return sum(rows) / len(rows) if rows else None


def eq2():
    images = images_of(tests.eq2_case())

    def with_cosines(cosines, loss=None, transpose=False):
        loss = loss or (lambda e, p: -(e[p].sum() / e.sum()).log())
        values = []
        for x, x_prime, p in images:
            values.append(per_image(loss, cosines(x, x_prime).exp(), p.T if transpose else p))
        values = [value for value in values if value is not None]
        return sum(values) / len(values)

    def c(x, x_prime):
        return unit(x) @ unit(x_prime).T / 0.5

    losses = []  # of the pixels with a positive, image by image
    for x, x_prime, p in images:
        e = c(x, x_prime).exp()
        losses.append([-(e[i][p[i]].sum() / e[i].sum()).log() for i in range(3) if p[i].any()])
    flat = [loss for image in losses for loss in image]
    first, second = sum(losses[0]), sum(losses[1])
    right = (first / 2 + second) / 2

    def viewed(x):
        return x.T.reshape(x.shape)

    def over_i(x, x_prime):
        return c(x, x_prime) - c(x, x_prime).logsumexp(0)

    def image_sums(rows):
        values = []
        for x, x_prime, p in images:
            e, has = c(x, x_prime).exp(), p.any(1)
            if has.any():
                values.append(-(e[p].sum() / (e[has].sum() if rows else e.sum())).log())
        return sum(values) / 2

    def batch_sums():
        es = [c(x, x_prime).exp() for x, x_prime, _ in images]
        positive = sum(e[p].sum() for e, (_, _, p) in zip(es, images))
        return -(positive / sum(e.sum() for e in es)).log()

    def other_images():
        keys, values = torch.cat([unit(x_prime) for _, x_prime, _ in images]), []
        for n, (x, _, p) in enumerate(images):
            e = (unit(x) @ keys.T / 0.5).exp()
            p_all = torch.zeros(3, 9, dtype=torch.bool)
            p_all[:, 3 * n : 3 * n + 3] = p
            values.append(per_image(lambda e, p: -(e[p].sum() / e.sum()).log(), e, p_all))
        return (values[0] + values[1]) / 2

    def mean_p():
        values = []
        for x, x_prime, p in images[:2]:
            e = c(x, x_prime).exp()
            shares = [e[i][p[i]].sum() / e[i].sum() for i in range(3) if p[i].any()]
            values.append(-(sum(shares) / len(shares)).log())
        return sum(values) / 2

    def both():
        back = []
        for x, x_prime, p in images[:2]:
            log_share = lambda e, p: -(e[p].sum() / e.sum()).log()  # noqa: E731
            back.append(per_image(log_share, c(x_prime, x).exp(), p.T))
        return right + sum(back) / 2

    def without_diagonal():
        values = []
        for x, x_prime, p in images[:2]:
            e, rows = c(x, x_prime).exp(), []
            for i in range(3):
                if p[i].any():
                    rows.append(-(e[i][p[i]].sum() / (e[i].sum() - e[i, i])).log())
            values.append(sum(rows) / len(rows))
        return sum(values) / 2

    return [
        with_cosines(lambda x, y: c(x, y) * 0.5),
        with_cosines(lambda x, y: c(x, y) * 0.25),
        with_cosines(lambda x, y: x @ y.T / 0.5),
        with_cosines(lambda x, y: F.normalize(x, dim=0) @ F.normalize(y, dim=0).T / 0.5),
        with_cosines(lambda x, y: c(viewed(x), viewed(y))),
        with_cosines(c, lambda e, p: -(e[p] / e.sum()).log().mean()),
        with_cosines(c, lambda e, p: -(e[p] / e.sum()).log().sum()),
        with_cosines(c, lambda e, p: -(e[p].sum() / e[~p].sum()).log()),
        with_cosines(c, lambda e, p: -(e[p].sum() / (e.sum() + e[p].sum())).log()),
        with_cosines(c, lambda e, p: -(e[p].mean() / e.sum()).log()),
        with_cosines(c, lambda e, p: -(e[p].mean() / e.mean()).log()),
        with_cosines(c, lambda e, p: -(e[p][0] / e.sum()).log()),
        without_diagonal(),
        with_cosines(c, lambda e, p: -(e.where(p, e.new_ones(())).sum() / e.sum()).log()),
        with_cosines(c, lambda e, p: -(e[p].sum() / e.sum())),
        with_cosines(c, lambda e, p: 1 - e[p].sum() / e.sum()),
        mean_p(),
        right / log(10),
        right / log(2),
        with_cosines(c, transpose=True),
        with_cosines(over_i, lambda e, p: -e[p].sum().log()),
        with_cosines(lambda x, y: c(y, x)),
        both(),
        sum(flat) / 3,
        (first / 3 + second / 3) / 2,
        sum(flat) / 9,
        with_cosines(lambda x, y: c(x, y) * 0.5 / 0.3),
        *[(sum(flat) - 6 * log(eps)) / 9 for eps in (1e-12, 1e-10, 1e-8, 1e-6)],
        *[(sum(flat) - 3 * log(eps)) / 6 for eps in (1e-12, 1e-10, 1e-8, 1e-6)],
        (first / 2 + second) / 3,
        (first + second) / 2,
        first / 2 + second,
        batch_sums(),
        image_sums(rows=False),
        image_sums(rows=True),
        other_images(),
    ]


def eq3():
    ppm, x = tests.eq3_case()
    x = x[0].double().flatten(1).T  # [HW, C]
    W = ppm.transform[0].weight[:, :, 0, 0].double()
    h = x @ W.T
    g, u = unit(h), unit(x)
    c = u @ u.T
    s = c.clamp(min=0) ** 2

    def viewed(x):
        return x.T.reshape(x.shape)

    x_v, h_v = viewed(x), viewed(h)
    s_v = (unit(x_v) @ unit(x_v).T).clamp(min=0) ** 2
    c_h = g @ g.T
    pixels_x, pixels_h = F.normalize(x, dim=0), F.normalize(h, dim=0)
    values = [
        s @ h,
        s @ u,
        s @ x,
        s @ u @ W.T,
        c**2 @ g,
        c.sign() * c**2 @ g,
        c @ g,
        c.clamp(min=0) @ g,
        c.abs() @ g,
        2 * c.clamp(min=0) @ g,
        c.softmax(1) @ g,
        (2 * c).softmax(1) @ g,
        (x @ x.T / sqrt(2)).clamp(min=0) ** 2 @ g,
        s.softmax(1) @ g,
        s @ g / s.sum(1, keepdim=True),
        s @ g / 4,
        (s - torch.eye(4)) @ g,
        s.sum(1, keepdim=True) * g,
        x + s @ g / 4,
        x + s @ g,
        unit(s @ g),
        unit(s @ h),
        unit(s @ u @ W.T),
        (x @ x.T).clamp(min=0) ** 2 @ g,
        c_h.clamp(min=0) ** 2 @ g,
        c_h.clamp(min=0) ** 2 @ u,
        (pixels_x @ pixels_x.T).clamp(min=0) ** 2 @ g,
        s @ pixels_h,
        (s @ g).reshape(2, 4).T,
        s_v @ g,
        s_v @ unit(x_v @ W.T),
        s @ unit(h_v),
    ]
    return [tuple(value[0].tolist()) for value in values]


def eq5():
    images = images_of(tests.eq5_case())
    c = [unit(y) @ unit(x_prime).T for y, x_prime, _ in images]
    P = [p for _, _, p in images]

    def mean(value, count=2):
        return -sum(value(c, p) for c, p in list(zip(c, P))[:2]) / count

    def of_products(product, count=2):
        return -sum(product(y, x)[p].mean() for y, x, p in images[:2]) / count

    def viewed(x):
        return x.T.reshape(x.shape)

    right = mean(lambda c, p: c[p].mean())
    positive = torch.cat([c[p] for c, p in zip(c, P)])

    def rows(c, p, value):
        found = [value(c[i][p[i]]) for i in range(2) if p[i].any()]
        return sum(found) / len(found)

    return [
        -sum(c.mean() for c in c) / 3,
        mean(lambda c, p: c.mean()),
        mean(lambda c, p: c[~p].mean()),
        -positive.mean(),
        mean(lambda c, p: c[p].mean(), 3),
        -c[0][P[0]].mean(),
        mean(lambda c, p: (c * p).mean()),
        mean(lambda c, p: (c * p).mean(), 3),
        mean(lambda c, p: (c * p).sum() / 2),
        mean(lambda c, p: (c * p).sum() / (p.sum() + 1)),
        mean(lambda c, p: (c * p).sum()),
        mean(lambda c, p: (c * p).sum(), 1),
        2 * mean(lambda c, p: c[p].mean(), 3),
        mean(lambda c, p: c[p].mean(), 1),
        mean(lambda c, p: rows(c, p, torch.mean)),
        mean(lambda c, p: rows(c, p, torch.max)),
        mean(lambda c, p: c[p.T].mean()),
        mean(lambda c, p: c[p].mean() - c[~p].mean()),
        right + sum(c[~p].mean() for c, p in zip(c, P)) / 3,
        of_products(lambda y, x: y @ x.T),
        of_products(lambda y, x: unit(y) @ x.T),
        of_products(lambda y, x: y @ unit(x).T),
        of_products(lambda y, x: F.normalize(y, dim=0) @ F.normalize(x, dim=0).T),
        of_products(lambda y, x: y @ x.T / (y.norm() * x.norm())),
        of_products(lambda y, x: unit(viewed(y)) @ unit(viewed(x)).T),
        of_products(lambda y, x: viewed(unit(y)) @ viewed(unit(x)).T),
        2 + 2 * right,
        1 + right,
        mean(lambda c, p: c.diagonal().mean()),
        -sum(c.diagonal().mean() for c in c) / 3,
        mean(lambda c, p: c.diagonal()[p.diagonal()].mean()),
    ]


def eq6():
    p, z = [vectors.double() for vectors in tests.eq6_case()]
    c = (unit(p) * unit(z)).sum(1)
    logits = unit(p) @ unit(z).T
    n = torch.arange(3)
    return [
        2 - 2 * c.mean(),
        1 - c.mean(),
        -c.sum(),
        -c.clamp(min=0).mean(),
        -c.abs().mean(),
        -logits.mean(),
        F.cross_entropy(logits, n),
        F.cross_entropy(logits / 0.3, n),
        F.cross_entropy(logits / 0.2, n),
        F.cross_entropy(logits / 0.1, n),
        -(p * z).sum(1).mean(),
        -(unit(p) * z).sum(1).mean(),
        -(p * unit(z)).sum(1).mean(),
        -(unit(p) * unit(z)).mean(),
        -(F.normalize(p, dim=0) * F.normalize(z, dim=0)).sum(1).mean(),
        -F.cosine_similarity(p, z, dim=0).mean(),
        -F.cosine_similarity(p.flatten(), z.flatten(), dim=0),
        -((p * z).sum(1) / (p.square().sum(1) * z.square().sum(1))).mean(),
        -(F.normalize(p, p=1) * F.normalize(z, p=1)).sum(1).mean(),
    ]


def momentum():
    b, t = 0.9, 10 / 40
    return [
        1 - (1 - b) * (cos(pi * t) + 1),
        1 - (1 - b) * (1 - cos(pi * t)) / 2,
        b + (1 - b) * t,
        1 - (1 - b) * (cos(t) + 1) / 2,
        1 - (1 - b) * (cos(degrees(pi * t)) + 1) / 2,
        b,
        1 - (1 - b) * (cos(pi * 10 / 39) + 1) / 2,
        1 - (1 - b) * (cos(pi * 11 / 40) + 1) / 2,
        1 - (1 - 0.99) * (cos(pi * t) + 1) / 2,
        1 - (1 - b) * (cos(2 * pi * t) + 1) / 2,
        1 - b * (cos(pi * t) + 1) / 2,
        (1 - b) * (cos(pi * t) + 1) / 2,
        1 - (1 - b) * cos(pi * t) / 2,
        1 - (1 - b) * cos(pi * t),
        1 - (1 - b) * cos(pi * t / 2),
        b + (1 - b) * sin(pi * t / 2),
        1 - (1 - b) * (cos(radians(t)) + 1) / 2,
    ]


def lars_one():
    ratio = 0.01 * 5 / 10
    return [
        0,
        -2 * 8,
        -2 * 8 * 0.01 * 10 / 5,
        -2 * 8 * 5 / 10,
        -2 * 8 * 0.01 * 5,
        -2 * 8 * 0.01 / 10,
        -2 * 8 * 0.01 * 3 / 8,
        -8 * ratio,
        -2 * 8 * ratio * 1.5,
    ]


def lars_decay():
    norm = hypot(3, 8, 6, 4)  # of g + p
    return [
        (3, -0.08),
        (3 - 2 * 3 * 0.01 * 5 / 10, -2 * 8 * 0.01 * 5 / 10),
        (3 - 2 * 3 * 0.01 * 5 / 15, -2 * 8 * 0.01 * 5 / 15),
        (3 - 2 * 3, -0.08),
        (3 + 2 * 3 * 0.01 * 5 / norm, -2 * 8 * 0.01 * 5 / norm),
    ]


def lars_momentum():
    first, second = 0.01 * 5 / 10, 0.01 * hypot(3, 0.08, 0.06, 4) / 10
    p = -2 * 8 * first
    return [
        p - 8 * second,
        p - 8 * (0.5 * 2 * first + second),
        p - 2 * 8 * (0.5 * first + second),
        p,
    ]


def lars_vectors():
    ratio = 0.001 * 2 / 4
    p = 1 - 0.5 * 2 * ratio
    velocity = 0.5 * 2 * ratio + 2 * 0.001 * 2 * p / 4
    return [-2, p - 0.5 * velocity, -1, 1]


def warm_up():
    return [
        2 * 5 / 10,
        2 * 6 / 10,
        2 * (0.01 + 0.99 * 6 / 10),
        2 * (0.01 + 5 / 10),
        0.1 + 1.9 * 5 / 10,
        2 * (0.1 + 0.9 * 5 / 10),
        2 * (0.01 + 0.99 * 5 / 9),
        2 * 0.01**0.5,
        2,
    ]


def schedule():
    def half(t):
        return 0.1 + 1.9 * (1 + cos(pi * t)) / 2

    return [
        half(20 / 40),
        2 * (1 + cos(pi / 3)) / 2,
        0.1 + 1.9 * (1 + cos(pi / 3)),
        half(10 / 40),
        0.1 + 1.9 * 2 / 3,
        0.1 + 2 * (1 + cos(pi / 3)) / 2,
        0.1 + 1.9 * (1 - cos(pi / 3)) / 2,
        0.1 + 1.9 * (1 + cos(1 / 3)) / 2,
        0.1 + 1.9 * (1 + cos(60)) / 2,
        0.1 + 1.9 * cos(pi / 6),
        half(11 / 30),
        half(10 / 29),
        0.1 + 1.9 * cos(pi / 3),
        2,
    ]


TABLES = {
    "EQ1_MISTAKES": eq1,
    "EQ2_MISTAKES": eq2,
    "EQ3_MISTAKES": eq3,
    "EQ5_MISTAKES": eq5,
    "EQ6_MISTAKES": eq6,
    "MOMENTUM_MISTAKES": momentum,
    "LARS_MISTAKES": lars_one,
    "LARS_DECAY_MISTAKES": lars_decay,
    "LARS_MOMENTUM_MISTAKES": lars_momentum,
    "LARS_VECTOR_MISTAKES": lars_vectors,
    "WARM_UP_MISTAKES": warm_up,
    "SCHEDULE_MISTAKES": schedule,
}

if __name__ == "__main__":
    wrong = 0
    for name, formulas in TABLES.items():
        table = getattr(tests, name)
        values = [tuple(map(float, v)) if isinstance(v, tuple) else float(v) for v in formulas()]
        if len(values) != len(table):
            print(f"{name}: {len(table)} values, {len(values)} formulas")
            wrong += 1
        for (stored, cause), value in zip(table.items(), values):
            if not torch.allclose(
                torch.tensor(stored).double(), torch.tensor(value).double(), rtol=0, atol=2e-6
            ):
                print(f"{name}: {stored} should be {value}: {cause}")
                wrong += 1
    print(f"{sum(len(getattr(tests, name)) for name in TABLES)} known wrong values, {wrong} differ")
    sys.exit(wrong > 0)
