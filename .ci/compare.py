"""Measures what README says of speed, beside a program that does the same or less.

    python .ci/compare.py views DIR                        DIR's files *.jpg, the first 200
    python .ci/compare.py statistics                       TwoViews and PIL: the same distribution?
    python .ci/compare.py step resnet50 layer4 224 8 off   a training step; bf16 or off

Each alternates the two programs in one process and prints medians and their ratio.
"""

import statistics
import sys
import time
from pathlib import Path

import PIL.Image
import PIL.ImageFilter
import torch
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

import pixpro
import train
from pixpro import Backbone, PixPro, TwoViews


class PilViews:
    """The same operations with PIL alone; not the same random numbers."""

    def __init__(self, size):
        self.size = size
        self.colour_1 = self.colour(1.0, 0.0)
        self.colour_2 = self.colour(0.1, 0.2)

    def colour(self, p_blur, p_solarize):
        def blur(image):
            sigma = torch.empty(()).uniform_(0.1, 2).item()
            return image.filter(PIL.ImageFilter.GaussianBlur(sigma))

        steps = [
            v2.RandomResizedCrop(self.size, (0.08, 1)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([blur], p_blur),
            v2.RandomSolarize(128, p_solarize),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(pixpro.MEAN, pixpro.STD),
        ]
        return v2.Compose(steps)

    def __call__(self, image):
        return self.colour_1(image), self.colour_2(image)


def compare_views(folder, rounds=5):
    """Images a second on one core, decoding included."""
    torch.set_num_threads(1)
    paths = [str(path) for path in sorted(Path(folder).rglob("*.jpg"))[:200]]
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


def compare_statistics(count=400):
    """Mean, deviation, saturation and roughness of views, beside PIL's four standard errors."""
    images = [v2.functional.to_pil_image(image) for image in train.Scenes(8, size=96).images]
    for index in (0, 1):
        both = []
        for make in (TwoViews(size=48), PilViews(size=48)):
            torch.manual_seed(index)
            views = torch.stack([make(images[k % 8])[index] for k in range(count)])
            colour = views * torch.tensor(pixpro.STD)[:, None, None]
            saturation = (colour.amax(1) - colour.amin(1)).mean((1, 2))[:, None]
            figures = [views.mean((2, 3)), views.std((2, 3)), saturation]
            figures += [views.diff(dim=dim).abs().mean((1, 2, 3))[:, None] for dim in (2, 3)]
            both.append(torch.cat(figures, 1))  # [count, 9]
        ours, pil = both
        error = ((ours.var(0) + pil.var(0)) / count).sqrt()
        worst = ((ours.mean(0) - pil.mean(0)).abs() / error).max()
        print(f"view {index + 1}: at most {worst:.1f} standard errors apart")
        assert worst < 4


def compare_step(arch, layer, size, batch, amp, rounds=10):
    """A whole step beside its networks alone: two passes with gradients, two without."""
    size, batch, amp = int(size), int(batch), amp == "bf16"
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
    what = f"{arch} {size} x {batch}, bf16 {amp}"
    print(f"{what}: {a:.3f} s, the networks alone {b:.3f} s, ratio {a / b:.3f}")


if __name__ == "__main__":
    kinds = {"views": compare_views, "statistics": compare_statistics, "step": compare_step}
    kinds[sys.argv[1]](*sys.argv[2:])
