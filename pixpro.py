"""PixPro, the whole method in one file: pixel-level consistency for unsupervised pre-training.

"Propagate Yourself", Xie, Lin, Zhang, Cao, Lin, Hu; CVPR 2021; arXiv 2011.10043. In the paper's order:
1. Two random crops of an image become two views; each remembers its box in the image (Sec. 3.1).
2. A "pixel" is a cell of the encoder's map. Pixels of both views that lie close in the image are positives (Eq. 1).
3. PixContrast is InfoNCE over the pixels of one image (Eq. 2). PixPro has no negatives: the online map, smoothed by
   the pixel propagation module (Eq. 3, 4), is pulled towards the other view's map from a momentum encoder (Eq. 5).
4. An instance-level loss may share the backbone (Eq. 6); a head network's levels may share the loss (Sec. 3.3).

symbol      name                         shape          what it is (N: batch; pixel i = row * W + column)
x           x                            [N, C, H, W]   map of the online encoder (backbone and projector)
x'          x_prime                      [N, C, H, W]   map of the momentum encoder for the other view
y           y                            [N, C, H, W]   x after propagation
A, T        positives, threshold         [N, HW, HW]    bool, rows this view, columns the other; T in bin diagonals
s, gamma    s, gamma                     [N, HW, HW]    similarity within one map, and its exponent
g           PixelPropagation.transform   module         num_layers 1x1 convolutions
tau, alpha  temperature, instance_weight numbers        of Eq. 2 and of Eq. 6
m           m, momentum_at               number         share of itself that the momentum encoder keeps

The paper overrules the authors' code: Eq. 1 has <=, not <, and measures in the image, not on axes normalised one by
one; the loss is Eq. 5, not twice it; images without positives are left out, not counted as 0; s is 0 for cosines <= 0;
heads are 2048 wide, not 4096; PixContrast exists. The code decides where the paper is silent (g(x_j) is normalised in
Eq. 3, the larger of two bin diagonals counts in Eq. 1), and once where it is not: no negatives in the instance loss.
"""

import argparse
import copy
import difflib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.models
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

# ------------------------------------ Views (Sec. 3.1) ------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB values in [0, 1]


class TwoViews:
    """Two random views of an image, and where they lie in it (Sec. 3.1; colours of BYOL, as in the authors' code).

    Takes an RGB uint8 tensor [3, H, W] or a PIL image, else raises TypeError or ValueError. Returns view_1, view_2:
    float [3, size, size], normalised by MEAN and STD; and box_1, box_2: [4] = (x0, y0, x1, y1), the crop's edges in
    pixels of the image, x0 > x1 for a mirrored view. Draws from torch's global generator.
    """

    def __init__(self, size=224, scale=(0.08, 1.0)):
        self.size, self.scale = size, scale
        self.colour_1 = random_colour(blur=1.0, solarize=0.0)
        self.colour_2 = random_colour(blur=0.1, solarize=0.2)

    def __call__(self, image):
        image = v2.functional.pil_to_tensor(image.convert("RGB")) if hasattr(image, "convert") else image  # from PIL
        if not torch.is_tensor(image) or image.dtype != torch.uint8:
            raise TypeError(f"expected a uint8 tensor or PIL image, found {type(image)} {getattr(image, 'dtype', '')}")
        if image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(f"expected an RGB image [3, H, W], found {list(image.shape)}")
        (view_1, box_1), (view_2, box_2) = self.crop(image), self.crop(image)
        return self.colour_1(view_1), self.colour_2(view_2), box_1, box_2

    def crop(self, image):
        """A random crop, resized and half of the time mirrored: [3, H, W] -> view [3, size, size], box [4]."""
        top, left, height, width = v2.RandomResizedCrop.get_params(image, self.scale, ratio=(3 / 4, 4 / 3))
        view = v2.functional.resized_crop(image, top, left, height, width, [self.size, self.size])  # [3, size, size]
        box = torch.tensor([left, top, left + width, top + height], dtype=torch.float32)  # [4]
        if torch.rand(()) < 0.5:
            view, box = v2.functional.horizontal_flip(view), box[[2, 1, 0, 3]]
        return view, box


def random_colour(blur, solarize):
    """Colour changes with these probabilities of blur and solarisation, then normalisation."""
    jitter = [v2.ColorJitter(brightness=0.4), v2.ColorJitter(contrast=0.4), v2.ColorJitter(saturation=0.2), random_hue]
    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.RandomOrder(jitter)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([random_blur], p=blur),
        v2.RandomSolarize(threshold=128 / 255, p=solarize),
        v2.Normalize(MEAN, STD),
    ])


def random_hue(view):
    """v2.functional.adjust_hue of a float view by U(-0.1, 0.1), three times as fast; hues are sixths of the circle."""
    (r, g, b), top, chroma = view, view.amax(0), view.amax(0) - view.amin(0) + 1e-8  # [h, w] each
    hue = torch.where(top == r, (g - b) / chroma, torch.where(top == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma))
    hue = hue + torch.empty(()).uniform_(-0.6, 0.6) - torch.tensor([0.0, 2.0, 4.0])[:, None, None]  # [3, h, w]
    return top - chroma * ((hue - 6 * (hue / 6).round()).abs() - 1).clamp(0, 1)  # |hue|: to red, green, blue


def random_blur(view):
    """Gaussian blur with sigma ~ U(0.1, 2) pixels: along the columns, then along the rows."""
    sigma = torch.empty(()).uniform_(0.1, 2.0).item()
    taps = 2 * math.ceil(3 * sigma) + 1
    return v2.functional.gaussian_blur(v2.functional.gaussian_blur(view, [1, taps], sigma), [taps, 1], sigma)


# ------------------------------------ Eq. 1: positive pairs ------------------------------------
def positive_pairs(box_1, box_2, size, threshold=0.7):
    """Eq. 1: A(i, j) = 1 if dist(i, j) <= T, else 0.

    dist: between the centres of the bins i and j in the image, divided by the diagonal of a bin, the larger of the two.
    box_1, box_2: [N, 4] = (x0, y0, x1, y1) in any unit of length, x0 > x1 for a mirrored view. size: (H, W) of the map.
    Returns bool [N, HW, HW]: row i of view 1, column j of view 2. Raises ValueError for other boxes, no map, T < 0.
    """
    if box_1.shape != box_2.shape or box_1.dim() != 2 or box_1.shape[1] != 4:
        raise ValueError(f"expected two boxes [N, 4], found {list(box_1.shape)} and {list(box_2.shape)}")
    if min(size) < 1 or not threshold >= 0:
        raise ValueError(f"expected size >= (1, 1) and threshold >= 0, found {tuple(size)} and {threshold}")
    centres_1, diagonal_1 = bin_centres(box_1, size)
    centres_2, diagonal_2 = bin_centres(box_2, size)
    distance = torch.cdist(centres_1, centres_2, compute_mode="donot_use_mm_for_euclid_dist")  # [N, HW, HW]
    return distance <= threshold * torch.maximum(diagonal_1, diagonal_2)[:, :, None]  # Eq. 1; [N, 1] -> [N, 1, 1]


def bin_centres(box, size):
    """Centres (x, y) of the H x W bins of a box [N, 4]: [N, HW, 2]; and the diagonal of a bin: [N, 1]."""
    H, W = size
    x0, y0, x1, y1 = box.float().split(1, dim=1)  # [N, 4] -> 4 of [N, 1]
    width, height = (x1 - x0) / W, (y1 - y0) / H  # of a bin; a mirrored one has a negative width
    x = x0 + width * (torch.arange(W, device=box.device) + 0.5)  # [N, W]
    y = y0 + height * (torch.arange(H, device=box.device) + 0.5)  # [N, H]
    grid = torch.broadcast_tensors(x[:, None, :], y[:, :, None])  # [N, 1, W] and [N, H, 1] -> 2 of [N, H, W]
    return torch.stack(grid, 3).flatten(1, 2), torch.hypot(width, height)  # [N, H, W, 2] -> [N, HW, 2]


# ------------------------------------ Eq. 2: PixContrast ------------------------------------
def pixcontrast_loss(x, x_prime, positives, temperature=0.3):
    """Eq. 2, from one view to the other:

    L_Pix(i) = -log [ sum_{j in P} e^(cos(x_i, x'_j) / tau) / sum_j e^(cos(x_i, x'_j) / tau) ]
    j: the pixels of the other view, P: those that Eq. 1 makes positive for i, the others being its negatives. Mean
    over the pixels i that have a positive, then over the images that have such pixels; 0 if none has.
    x, x_prime: [N, C, H, W], no gradient into x_prime; positives: bool [N, HW, HW]. Returns a scalar >= 0.
    Raises ValueError or TypeError for inputs that do not fit, ValueError for temperature <= 0.
    """
    check_maps(x, x_prime, positives)
    if not temperature > 0:
        raise ValueError(f"expected temperature > 0, found {temperature}")
    logits = pixel_cosine(x, x_prime.detach()) / temperature  # [N, HW, HW]
    matched = positives.any(2)  # [N, HW, HW] -> [N, HW]
    left_out = ~positives & matched[:, :, None]  # a row without positives stays whole: log 1, where log 0 gave nan
    log_positive = logits.masked_fill(left_out, -math.inf).logsumexp(2)  # [N, HW, HW] -> [N, HW]
    log_all = logits.logsumexp(2)  # [N, HW, HW] -> [N, HW]
    return mean_over_images(log_all - log_positive, matched)  # Eq. 2


def pixel_cosine(x, x_prime):
    """cos(x_i, x'_j) for all pixels of two maps [N, C, H, W] -> [N, HW, HW]; in float32 under autocast too."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, x_prime = [F.normalize(m.to(dtype).flatten(2), dim=1) for m in (x, x_prime)]  # [N, C, H, W] -> [N, C, HW]
        return x.transpose(1, 2) @ x_prime  # [N, HW, C] @ [N, C, HW] -> [N, HW, HW]


def mean_over_images(value, mask):
    """Mean of value [N, ...] where mask [N, ...] holds, then over the images where it does anywhere; else 0."""
    count = mask.flatten(1).sum(1)  # [N, ...] -> [N]
    total = (value * mask).flatten(1).sum(1)  # [N, ...] -> [N]
    return (total / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def check_maps(x, x_prime, positives):
    """ValueError or TypeError unless x and x_prime are maps [N, C, H, W] and positives is bool [N, HW, HW]."""
    if x.dim() != 4 or x_prime.dim() != 4 or x.shape[:2] != x_prime.shape[:2]:
        raise ValueError(f"expected two maps [N, C, H, W], found {list(x.shape)} and {list(x_prime.shape)}")
    pairs = [len(x), x.shape[2:].numel(), x_prime.shape[2:].numel()]
    if list(positives.shape) != pairs:
        raise ValueError(f"expected positives {pairs} for these maps, found {list(positives.shape)}")
    if positives.dtype != torch.bool:
        raise TypeError(f"expected positives of torch.bool, found {positives.dtype}")


# ------------------------------------ Eq. 3 and 4: propagation ------------------------------------
class PixelPropagation(nn.Module):
    """The pixel propagation module (PPM): x [N, dim, H, W] -> y [N, dim, H, W].

    Eq. 3: y_i = sum_j s(x_i, x_j) g(x_j), over all pixels j of the map, i included
    Eq. 4: s(x_i, x_j) = max(cos(x_i, x_j), 0) ^ gamma

    g is `transform`: num_layers 1x1 convolutions with BatchNorm and ReLU between two of them, or the identity; g(x_j)
    is L2-normalised, as in the authors' code. Raises ValueError for gamma <= 0, num_layers < 0, another map.
    """

    def __init__(self, dim=256, gamma=2.0, num_layers=1):
        super().__init__()
        if not gamma > 0 or num_layers < 0:
            raise ValueError(f"expected gamma > 0 and num_layers >= 0, found {gamma} and {num_layers}")
        self.dim, self.gamma = dim, gamma
        layers = [nn.Conv2d(dim, dim, 1)] if num_layers else []
        for _ in range(num_layers - 1):
            layers += [nn.BatchNorm2d(dim), nn.ReLU(inplace=True), nn.Conv2d(dim, dim, 1)]
        self.transform = nn.Sequential(*layers)

    def forward(self, x, g=None):  # g: transform(x), where it is known already
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"expected a map [N, {self.dim}, H, W], found {list(x.shape)}")
        g = self.transform(x) if g is None else g  # [N, dim, H, W]
        s = F.relu(pixel_cosine(x, x)).pow(self.gamma)  # Eq. 4, [N, HW, HW]; relu also stops a root's slope at 0
        g = F.normalize(g.flatten(2), dim=1)  # [N, dim, H, W] -> [N, dim, HW]
        y = g @ s.to(g.dtype)  # Eq. 3, s being symmetric: [N, dim, HW] @ [N, HW, HW] -> [N, dim, HW]
        return y.unflatten(2, x.shape[2:])  # [N, dim, HW] -> [N, dim, H, W]


# ------------------------------------ Eq. 5 and 6: consistency ------------------------------------
def consistency_loss(y, x_prime, positives):
    """Eq. 5, from one view to the other: -cos(y_i, x'_j); Eq. 5 itself is the sum of both directions.

    Mean over the positive pairs (i, j) of an image, then over the images that have any; 0 if none has.
    y, x_prime: [N, C, H, W], no gradient into x_prime; positives: bool [N, HW, HW]. Returns a scalar in [-1, 1].
    Raises ValueError or TypeError for inputs that do not fit.
    """
    check_maps(y, x_prime, positives)
    return -mean_over_images(pixel_cosine(y, x_prime.detach()), positives)  # Eq. 5


def instance_loss(p, z_prime):
    """L_inst of Eq. 6, from one view to the other: -cos(p, z'), mean over the images; no negatives.

    p: predicted from the online map, z_prime: from the momentum map of the other view, pooled to [N, C]; no gradient
    into z_prime. Returns a scalar in [-1, 1]. Raises ValueError for other shapes.
    """
    if p.dim() != 2 or p.shape != z_prime.shape:
        raise ValueError(f"expected two tensors [N, C], found {list(p.shape)} and {list(z_prime.shape)}")
    dtype = torch.promote_types(p.dtype, torch.float32)
    return -F.cosine_similarity(p.to(dtype), z_prime.detach().to(dtype), dim=1).mean()  # Eq. 6


# ------------------------------------ Networks ------------------------------------
class Backbone(nn.Module):
    """A torchvision classification network cut behind one layer: image [N, 3, h, w] -> map [N, out_channels, H, W].

    `body` is the cut network; its state dict has torchvision's own names. ResNets begin with zeros in the last
    BatchNorm weight of each block (the authors' code). Raises ValueError for an unknown arch or layer, or no map.
    """

    def __init__(self, arch="resnet50", layer="layer4"):
        super().__init__()
        check_name("arch", arch, torchvision.models.list_models(module=torchvision.models))
        options = {"zero_init_residual": True} if "resne" in arch else {}  # ResNet, ResNeXt, Wide ResNet
        network = torchvision.models.get_model(arch, weights=None, **options)
        check_name("layer", layer, [name for name, _ in network.named_modules() if name])
        self.body = create_feature_extractor(network, {layer: "map"}).eval()
        with torch.no_grad():  # zeros in eval mode: neither BatchNorm's buffers nor a random generator move
            shape = self(torch.zeros(1, 3, 224, 224)).shape
        self.body.train()
        if len(shape) != 4 or shape[2] != shape[3]:  # tokens [N, L, C] or channels last [N, H, W, C]
            raise ValueError(f"expected a map [N, C, H, W] from layer {layer!r} of {arch}, found {list(shape)}")
        self.out_channels = shape[1]

    def forward(self, image):
        return self.body(image)["map"]


def check_name(kind, name, names):
    """ValueError with the names that come close, unless the name is one of them."""
    if name not in names:
        close = difflib.get_close_matches(name, names) or names
        raise ValueError(f"expected a torchvision {kind} such as {', '.join(close[:3])}; found {name!r}")


def projection_head(in_channels, hidden, out):
    """1x1 convolution, BatchNorm, ReLU, 1x1 convolution (Sec. 3.1): [N, in_channels, H, W] -> [N, out, H, W]."""
    first, last = nn.Conv2d(in_channels, hidden, 1), nn.Conv2d(hidden, out, 1)
    return nn.Sequential(first, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), last)


# ------------------------------------ Momentum encoder, PixPro ------------------------------------
def momentum_at(step, total_steps, base=0.99):
    """m at step k of K: 1 - (1 - base) (cos(pi k / K) + 1) / 2, which rises from base to 1 (the authors' code)."""
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"expected 0 <= step <= total_steps and total_steps >= 1, found {step} and {total_steps}")
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


class Output(NamedTuple):
    """Scalars from PixPro.forward; only the loss carries a gradient."""
    loss: torch.Tensor  # Eq. 5 or Eq. 6, sum of both directions; Eq. 5 lies in [-2, 2]
    similarity: torch.Tensor  # mean of cos(x_i, x'_j) over the positive pairs, without propagation
    positives: torch.Tensor  # positive pairs per image
    spread: torch.Tensor  # of the pixels x on the unit sphere: near 1 spread out, 0 collapsed to a point


class PixPro(nn.Module):
    """The model that is pre-trained. One's own loop around it:

        model = PixPro(Backbone("resnet50"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step, (view_1, view_2, box_1, box_2) in enumerate(loader):  # a dataset that ends in TwoViews
            model.update_momentum(momentum_at(step, total_steps))  # who forgets it has a frozen target
            loss = model(view_1, view_2, box_1, box_2).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    backbone: an nn.Module with `out_channels` that returns a map [N, out_channels, H, W], or a dict of them from fine
    to coarse: then the loss is the mean over the maps, with the same heads, PPM and T (Sec. 3.3), and the
    instance-level loss reads the coarsest. objective: "pixpro" (Eq. 5) or "pixcontrast" (Eq. 2; no PPM is built).
    Raises ValueError for unknown names, values out of range, and views and boxes whose shapes do not fit.
    """

    pairs_at_once = 2**23  # pairs of pixels; beyond, a batch goes in pieces, computed again in the backward pass

    def __init__(self, backbone, dim=256, hidden_dim=2048, gamma=2.0, num_layers=1, threshold=0.7,
                 instance_weight=0.0, objective="pixpro", temperature=0.3):
        super().__init__()
        if objective not in ("pixpro", "pixcontrast"):
            raise ValueError(f"expected objective 'pixpro' or 'pixcontrast', found {objective!r}")
        if not (instance_weight >= 0 and threshold >= 0 and temperature > 0):
            found = f"{instance_weight}, {threshold} and {temperature}"
            raise ValueError(f"expected instance_weight and threshold >= 0 and temperature > 0, found {found}")
        self.threshold, self.temperature, self.instance_weight = threshold, temperature, instance_weight
        self.backbone = backbone
        self.projector = projection_head(backbone.out_channels, hidden_dim, dim)
        self.propagation = PixelPropagation(dim, gamma, num_layers) if objective == "pixpro" else None
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if instance_weight > 0:
            self.instance_projector = projection_head(backbone.out_channels, hidden_dim, dim)
            self.instance_predictor = projection_head(dim, hidden_dim, dim)
            self.momentum_instance_projector = copy.deepcopy(self.instance_projector).requires_grad_(False)

    @torch.no_grad()
    def update_momentum(self, m):
        """Momentum parameters become m * themselves + (1 - m) * the online ones; BatchNorm's buffers stay."""
        if not 0 <= m <= 1:
            raise ValueError(f"expected m in [0, 1], found {m}")
        weights = dict(self.named_parameters())
        momentum = {name.removeprefix("momentum_"): p for name, p in weights.items() if name.startswith("momentum_")}
        torch._foreach_lerp_(list(momentum.values()), [weights[name] for name in momentum], weight=1 - m)

    def forward(self, view_1, view_2, box_1, box_2):
        """view_1, view_2: [N, 3, h, w]; box_1, box_2: [N, 4], as from TwoViews. Returns an Output."""
        if view_1.dim() != 4 or view_1.shape != view_2.shape or len(box_1) != len(view_1):
            found = f"{list(view_1.shape)}, {list(view_2.shape)} and {len(box_1)} boxes"
            raise ValueError(f"expected two views [N, 3, h, w] and N boxes, found {found}")
        maps = [self.backbone(view_1), self.backbone(view_2)]  # each [N, out_channels, H, W], or a dict of them
        with torch.no_grad():
            maps += [self.momentum_backbone(view_1), self.momentum_backbone(view_2)]
        levels = list(zip(*(m.values() for m in maps))) if isinstance(maps[0], dict) else [maps]  # fine to coarse
        loss, *figures = torch.stack([self.pixel_level(*level, box_1, box_2) for level in levels]).mean(0)  # [4]
        if self.instance_weight > 0:
            loss = loss + self.instance_weight * self.instance_level(*levels[-1])  # Eq. 6
        return Output(loss, *(figure.detach() for figure in figures))

    def pixel_level(self, map_1, map_2, map_prime_1, map_prime_2, box_1, box_2):
        """The fields of Output for one level, from both encoders' maps [N, out_channels, H, W] of both views: [4]."""
        x_1, x_2 = self.projector(map_1), self.projector(map_2)  # [N, dim, H, W]
        x_prime_1, x_prime_2 = self.momentum_projector(map_prime_1), self.momentum_projector(map_prime_2)  # no gradient
        both = self.one_way(x_1, x_prime_2, box_1, box_2) + self.one_way(x_2, x_prime_1, box_2, box_1)
        return torch.cat([both[:1], both[1:] / 2])  # the sum of the losses, the mean of the figures

    def one_way(self, x, x_prime, box, box_prime):
        """The fields of Output from x to x_prime, [N, dim, H, W] each: [4]; large maps a few images at a time."""
        g = x if self.propagation is None else self.propagation.transform(x)  # its BatchNorm sees the whole batch
        at_once = max(1, self.pairs_at_once // x.shape[2:].numel() ** 2)  # images
        pieces = list(zip(*(tensor.split(at_once) for tensor in (x, g, x_prime, box, box_prime))))
        sums = [self.piece(*p) if len(pieces) == 1 else checkpoint(self.piece, *p, use_reentrant=False) for p in pieces]
        loss, similarity, positives, matched = sum(sums)
        unit = F.normalize(x.detach().float(), dim=1)  # [N, dim, H, W]
        variance = unit.square().mean((0, 2, 3)) - unit.mean((0, 2, 3)).square()  # [dim]; var() is slow on CPUs
        spread = variance.clamp(min=0).sqrt().mean() * math.sqrt(len(variance))
        return torch.stack([loss / matched.clamp(min=1), similarity / matched.clamp(min=1), positives / len(x), spread])

    def piece(self, x, g, x_prime, box, box_prime):
        """Sums over some images: of loss and similarity, of positive pairs, and of images that have any; [4]."""
        A = positive_pairs(box, box_prime, x.shape[2:], self.threshold)  # [N, HW, HW]
        matched = A.flatten(1).any(1).sum()
        if self.propagation is None:
            loss = pixcontrast_loss(x, x_prime, A, self.temperature)
        else:
            loss = consistency_loss(self.propagation(x, g), x_prime, A)
        similarity = -consistency_loss(x.detach(), x_prime, A)
        return torch.stack([loss * matched, similarity * matched, A.sum(), matched])

    def instance_level(self, map_1, map_2, map_prime_1, map_prime_2):
        """L_inst of Eq. 6 in both directions, from maps of both encoders; pooled to [N, dim] after the convolutions."""
        p_1, p_2 = (self.instance_predictor(self.instance_projector(m)).mean((2, 3)) for m in (map_1, map_2))
        z_prime_1, z_prime_2 = (self.momentum_instance_projector(m).mean((2, 3)) for m in (map_prime_1, map_prime_2))
        return instance_loss(p_1, z_prime_2) + instance_loss(p_2, z_prime_1)


# ------------------------------------ The authors' weights ------------------------------------
PARTS = {"encoder": "backbone.body", "projector": "projector", "value_transform": "propagation.transform",
         "projector_instance": "instance_projector", "predictor": "instance_predictor"}  # their names: ours
LAYERS = {"linear1": "0", "bn1": "1", "linear2": "3"}  # of every part but the encoder


def load_authors_checkpoint(model, path):
    """Fills a PixPro from a file of the authors' code; returns the names that were left out: those of the instance
    branch, where the model has none. Raises ValueError, with the keywords that the file asks for, if any other name or
    shape differs; the model is then as it was. (Names as in contrast/models/PixPro.py of their repository.)
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # "opt", their command line
        file = torch.load(path, map_location="cpu", weights_only=True)
    ours, theirs = {}, file.get("model", {}) if isinstance(file, dict) else {}  # their name: ours; their name: weight
    for name in theirs:
        part, *rest = name.removeprefix("module.").split(".")
        if not part.startswith("encoder"):
            rest = [LAYERS.get(layer, layer) for layer in rest[:-1] or ["linear1"]] + rest[-1:]  # one layer has no name
        part = ("momentum_" if part.endswith("_k") else "") + PARTS.get(part.removesuffix("_k"), part)
        ours[name] = ".".join([part, *rest])
    left_out = [name for name in ours if "instance" in ours[name] and model.instance_weight == 0]
    weights = {ours[name]: weight for name, weight in theirs.items() if name not in left_out}
    if not {"projector.0.weight", "projector.3.weight"} <= weights.keys():
        raise ValueError(f"expected a checkpoint of the authors' code, with an entry 'model', found {path}")
    expected, found = ({(name, *w.shape) for name, w in s.items()} for s in (model.state_dict(), weights))
    if expected != found:
        hidden_dim, dim = len(weights["projector.0.weight"]), len(weights["projector.3.weight"])
        num_layers = sum(w.dim() == 4 for name, w in weights.items() if name.startswith("propagation"))
        fitting = f"PixPro(Backbone({getattr(file.get('opt'), 'arch', '?')!r}), {dim=}, {hidden_dim=}, {num_layers=})"
        raise ValueError(f"expected {fitting} for {path}, found a model that differs in {min(expected ^ found)}")
    model.load_state_dict(weights)
    return left_out
