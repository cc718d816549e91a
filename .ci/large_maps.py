"""Measures README's table of large maps: memory and time of the losses, forward and backward.

    python .ci/large_maps.py 28 10              side of the map, images; README's ImageByImage
    python .ci/large_maps.py 28 10 plain        the plain PixPro

Each call measures one case, Eq. 1 to 5 in both directions on maps of 256 channels in float32, and
prints by how much the peak of the resident memory grows, and the time.
"""

import re
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pixpro import PixPro  # noqa: E402

side, images = int(sys.argv[1]), int(sys.argv[2])
names = {}
snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
exec(next(snippet for snippet in snippets if "class ImageByImage" in snippet), names)
kind = PixPro if sys.argv[3:] == ["plain"] else names["ImageByImage"]

torch.manual_seed(0)
backbone = torch.nn.Identity()  # not called
backbone.out_channels = 256
model = kind(backbone)


def step(side, images):
    """Seconds of one step on maps of this side."""
    x_1, x_2, x_prime_1, x_prime_2 = torch.randn(4, images, 256, side, side)
    box = torch.tensor([[0.0, 0.0, 200.0, 200.0]]).expand(images, -1)
    start = time.perf_counter()
    maps = (x_1.requires_grad_(), x_2.requires_grad_(), x_prime_1, x_prime_2)
    model.pixel_level(*maps, box, box + 20).loss.backward()
    return time.perf_counter() - start


def peak():
    """Of the resident memory so far, in GiB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


step(7, 2)  # what the first call of a library takes
maps = 4 * images * 256 * side**2 * 4 / 2**30  # the maps themselves, which are not counted, in GiB
before = peak()
seconds = step(side, images)
added = peak() - before - maps
print(f"{kind.__name__}, {side} x {side}, {images} images: {added:.2f} GiB, {seconds:.1f} s")
