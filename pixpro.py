"""PixPro, the whole method in one file: pixel-level consistency for unsupervised pre-training.

In the order of the paper "Propagate Yourself" (Xie et al., CVPR 2021; arXiv 2011.10043):

Sec. 3.1  Two random crops of an image become two views, which keep their boxes in the image.
Eq. 1     Pixels (cells of the two feature maps) that lie close in the image are positive pairs.
Eq. 2     PixContrast, the baseline: InfoNCE over the pixels of the other view of the image.
Eq. 3, 4  The pixel propagation module smooths the online encoder's map.
Eq. 5     PixPro pulls it towards the momentum encoder's map of the other view, without negatives.
Eq. 6     An instance-level loss may be added. Sec. 3.3: the loss on several levels of a network.

symbol      name                          shape         meaning (pixel i = row * W + column)
x           x                             [N, C, H, W]  map of the online encoder
x'          x_prime                       [N, C, H, W]  map of the momentum encoder, other view
y           y                             [N, C, H, W]  x after propagation
A           positives, A_12               [N, HW, HW]   bool; rows: this view, columns: the other
T           threshold                     number        largest distance, in bin diagonals
s, gamma    s, gamma                      [N, HW, HW]   similarity within a map, its exponent
g           PixelPropagation.transform    module        num_layers 1x1 convolutions
tau, alpha  temperature, instance_weight  numbers       of Eq. 2 and of Eq. 6
m           m, momentum_at                number        EMA decay of the momentum encoder

Defaults are the paper's, and where it is silent the authors' code's. Different from their code:
- Eq. 1 has <=, not <, and distances in the image, not after x and y were each scaled to [0, 1].
- The loss is Eq. 5, not twice Eq. 5. PixContrast (Eq. 2) exists.
- Images without positive pairs are left out of the mean, not counted as 0.
- s is exactly 0 for cosines <= 0, also for gamma < 1. The heads are 2048 wide, not 4096.
Different from the paper:
- Eq. 2 is averaged over the pixels with a positive (69%, T = 0.7), not those in both views (59%).
- The instance-level loss has no negatives, as in the authors' code.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models, ops
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

# ------------------------------------ Views (Sec. 3.1) ------------------------------------
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB values in [0, 1]
STD = (0.229, 0.224, 0.225)


class TwoViews:
    """Two random views of an image and their boxes in it (Sec. 3.1).

    Takes uint8 RGB [3, h, w] or an 8-bit PIL image, else raises TypeError or ValueError. Returns
    view_1, view_2: float [3, size, size], normalised by MEAN and STD; box_1, box_2: [4] = (x0, y0,
    x1, y1), the crop's edges in pixels, x0 > x1 if mirrored. `scale`: the crop's share of the area.
    """

    def __init__(self, size=224, scale=(0.08, 1.0)):
        self.size = size
        self.scale = scale
        self.colour_1 = random_colour(blur=1.0, solarize=0.0)
        self.colour_2 = random_colour(blur=0.1, solarize=0.2)

    def __call__(self, image):
        if hasattr(image, "convert") and image.mode[0] not in "IF":  # PIL, 8 bits a sample
            image = v2.functional.pil_to_tensor(image.convert("RGB"))  # [3, h, w]
        if (kind := getattr(image, "dtype", image)) != torch.uint8:
            raise TypeError(f"expected a tensor of torch.uint8 or 8-bit PIL, found {kind}")
        if image.ndim != 3 or len(image) != 3:
            raise ValueError(f"expected an RGB image [3, h, w], found {list(image.shape)}")
        view_1, box_1 = self.crop(image)
        view_2, box_2 = self.crop(image)
        return self.colour_1(view_1), self.colour_2(view_2), box_1, box_2

    def crop(self, image):
        """A random crop, resized, mirrored half of the time: [3, h, w] -> [3, size, size], [4]."""
        crop = v2.RandomResizedCrop.get_params(image, self.scale, (3 / 4, 4 / 3))
        view = v2.functional.crop(image, *crop)  # [3, height, width]
        if view.stride(2) == 1:  # plane by plane, which torchvision resizes at half the speed
            view = torch.stack(view.unbind(), 2).permute(2, 0, 1)  # [h, w, 3] -> [3, h, w]
        view = v2.functional.resize(view, [self.size] * 2)  # [3, size, size]
        top, left, height, width = crop
        box = torch.tensor([left, top, left + width, top + height], device=image.device).float()
        if torch.rand(()) < 0.5:
            view = view.flip(2)
            box = box[[2, 1, 0, 3]]  # x0 and x1 change places
        return view, box


def random_colour(blur, solarize):
    """The colour changes of BYOL, then normalisation. blur, solarize: their probabilities."""
    jitter = [v2.ColorJitter(brightness=0.4), v2.ColorJitter(contrast=0.4)]
    jitter += [v2.ColorJitter(saturation=0.2), random_hue]
    steps = [
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.RandomOrder(jitter)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([random_blur], p=blur),
        v2.RandomSolarize(128 / 255, p=solarize),
        v2.Normalize(MEAN, STD),
    ]
    return v2.Compose(steps)


def random_hue(view):
    """Shifts the hue by U(-0.1, 0.1), as v2.functional.adjust_hue does, in a third of its time."""
    r, g, b = view  # [h, w] each
    value = view.amax(0)
    chroma = value - view.amin(0) + 1e-8  # grey has no hue, and must not become 0 / 0
    # The hue in sixths of the circle: red is 0, green 2, blue 4.
    hue = torch.where(value == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma)
    hue = torch.where(value == r, (g - b) / chroma, hue)
    hue += torch.empty(1).uniform_(-0.6, 0.6)
    # A channel is at `value` within a sixth of its hue, at `value - chroma` from two sixths on.
    distance = hue - torch.arange(0, 6, 2, device=view.device)[:, None, None]  # [3, h, w]
    distance = (distance - 6 * (distance / 6).round()).abs()  # the shorter way round
    return value - chroma * (distance - 1).clamp(0, 1)  # [3, h, w]


def random_blur(view):
    """Gaussian blur with sigma ~ U(0.1, 2) pixels, along the columns and then the rows."""
    sigma = torch.empty(1).uniform_(0.1, 2.0).item()
    taps = 2 * min(math.ceil(3 * sigma), view.shape[2] - 1) + 1  # few in a small view
    view = v2.functional.gaussian_blur(view, [1, taps], sigma)  # along the columns
    return v2.functional.gaussian_blur(view, [taps, 1], sigma)  # along the rows


# ------------------------------------ Eq. 1: positive pairs ------------------------------------
def positive_pairs(box_1, box_2, size, threshold=0.7):
    """Eq. 1: A(i, j) = 1 if dist(i, j) <= T, else 0.

    dist(i, j) is the distance in the image between the centres of bin i of view 1 and bin j of
    view 2, divided by the larger of the two views' bin diagonals.
    box_1, box_2: [N, 4] = (x0, y0, x1, y1) in any unit of length, x0 > x1 in a mirrored view.
    size: (H, W) of the map. Returns bool [N, HW, HW]: rows view 1, columns view 2. Raises
    ValueError for boxes of other shapes or of 16 bits, and for T < 0.
    """
    if box_1.shape != box_2.shape or box_1.shape[1:] != (4,) or box_1.dtype.itemsize < 4:
        found = f"{list(box_1.shape)}, {list(box_2.shape)}, {box_1.dtype}"
        raise ValueError(f"expected boxes [N, 4] of 32 or 64 bits, found {found}")
    if not threshold >= 0:
        raise ValueError(f"expected threshold >= 0, found {threshold}")
    centres_1, diagonal_1 = bin_centres(box_1, size)
    centres_2, diagonal_2 = bin_centres(box_2, size)
    larger_diagonal = torch.maximum(diagonal_1, diagonal_2)[..., None]  # [N, 1] -> [N, 1, 1]
    # [N, HW, HW]. The default of cdist squares and subtracts, which is too coarse near T.
    distance = torch.cdist(centres_1, centres_2, compute_mode="donot_use_mm_for_euclid_dist")
    return distance <= threshold * larger_diagonal  # Eq. 1


def bin_centres(box, size):
    """Box [N, 4] -> centres (x, y) of its H x W bins [N, HW, 2], and a bin's diagonal [N, 1]."""
    H, W = size
    x0, y0, x1, y1 = (box * 1.0).split(1, 1)  # floats, [N, 4] -> 4 of [N, 1]
    width = (x1 - x0) / W  # of a bin; negative in a mirrored view
    height = (y1 - y0) / H
    x = x0 + width * torch.arange(0.5, W, device=box.device)  # [N, W]
    y = y0 + height * torch.arange(0.5, H, device=box.device)  # [N, H]
    grid = torch.broadcast_tensors(x[:, None], y[..., None])  # [N, H, W] each
    centres = torch.stack(grid, 3).flatten(1, 2)  # [N, H, W, 2] -> [N, HW, 2]
    return centres, torch.hypot(width, height)


# ------------------------------------ Eq. 2: PixContrast ------------------------------------
def pixcontrast_loss(x, x_prime, positives, temperature=0.3):
    """Eq. 2, from one view to the other:

    L_Pix(i) = -log [ sum_{j in P} e^(cos(x_i, x'_j) / tau) / sum_j e^(cos(x_i, x'_j) / tau) ]

    j: the pixels of the other view of the same image; P: those that Eq. 1 makes positive for i.
    Mean over the pixels i with a positive, then over the images with such pixels; 0 without any.
    x, x_prime: [N, C, H, W], no gradient into x_prime. positives: bool [N, HW, HW]. Returns a
    scalar >= 0, differentiable also if 0. Raises ValueError or TypeError for other inputs.
    """
    check_maps(x, x_prime, positives)
    if not temperature > 0:
        raise ValueError(f"expected temperature > 0, found {temperature}")
    logits = pixel_cosine(x, x_prime.detach()) / temperature  # [N, HW, HW]
    # Rows without positives stay unmasked, so their loss is 0 and not NaN; the mean skips them.
    has_positive = positives.any(2)  # [N, HW, HW] -> [N, HW]
    masked = ~positives & has_positive[..., None]  # [N, HW, HW]
    log_positive = logits.masked_fill(masked, -math.inf).logsumexp(2)  # [N, HW, HW] -> [N, HW]
    log_all = logits.logsumexp(2)  # [N, HW, HW] -> [N, HW]
    return mean_over_images(log_all - log_positive, has_positive)  # Eq. 2


def pixel_cosine(x, x_prime):
    """cos(x_i, x'_j) of two maps [N, C, H, W] -> [N, HW, HW], under autocast in float32 too."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.to(dtype).flatten(2))  # over C, [N, C, H, W] -> [N, C, HW]
        x_prime = F.normalize(x_prime.to(dtype).flatten(2))
        return x.mT @ x_prime  # [N, HW, C] @ [N, C, HW] -> [N, HW, HW]


def mean_over_images(value, mask):
    """Mean of value [N, ...] where mask is True, per image, then over images with any, else 0."""
    count = mask.flatten(1).sum(1)  # [N, ...] -> [N]
    total = (value * mask).flatten(1).sum(1)  # [N, ...] -> [N]
    mean = total / count.clamp(min=1)
    return mean.sum() / count.count_nonzero().clamp(min=1)


def check_maps(x, x_prime, positives):
    """Raises an error unless x, x_prime are maps [N, C, H, W] and positives bool [N, HW, HW]."""
    if x.ndim != 4 or x.shape != x_prime.shape:
        raise ValueError(f"expected [N, C, H, W], found {list(x.shape)}, {list(x_prime.shape)}")
    HW = x.shape[2:].numel()
    if positives.shape != (len(x), HW, HW):
        raise ValueError(f"expected {[len(x), HW, HW]} for the maps, found {list(positives.shape)}")
    if positives.dtype != torch.bool:
        raise TypeError(f"expected positives of torch.bool, found {positives.dtype}")


# ------------------------------------ Eq. 3 and 4: propagation ------------------------------------
class PixelPropagation(nn.Module):
    """The pixel propagation module (PPM): x [N, dim, H, W] -> y [N, dim, H, W].

    Eq. 3: y_i = sum_j s(x_i, x_j) g(x_j), over all pixels j of the same map, i included
    Eq. 4: s(x_i, x_j) = max(cos(x_i, x_j), 0) ^ gamma

    `transform` is g: num_layers 1x1 convolutions with BatchNorm and ReLU between them; g(x_j) is
    L2-normalised (authors' code). Raises ValueError for gamma <= 0, num_layers < 0, other maps.
    """

    def __init__(self, dim=256, gamma=2.0, num_layers=1):
        super().__init__()
        if not gamma > 0 or num_layers < 0:
            raise ValueError(f"expected gamma > 0, num_layers >= 0, found {gamma}, {num_layers}")
        self.dim = dim
        self.gamma = gamma
        self.transform = nn.Sequential()
        for number in range(num_layers):
            if number > 0:
                self.transform.extend([nn.BatchNorm2d(dim), nn.ReLU(inplace=True)])
            self.transform.append(nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"expected a map [N, {self.dim}, H, W], found {list(x.shape)}")
        # For gamma < 1 the slope of pow at 0 is infinite; relu's gradient selects 0 in its place.
        s = F.relu(pixel_cosine(x, x)).pow(self.gamma)  # Eq. 4, [N, HW, HW]
        g = F.normalize(self.transform(x).flatten(2))  # [N, dim, H, W] -> [N, dim, HW]
        y = g @ s.to(g.dtype)  # Eq. 3, s is symmetric: [N, dim, HW] @ [N, HW, HW] -> [N, dim, HW]
        return y.unflatten(2, x.shape[2:])  # [N, dim, HW] -> [N, dim, H, W]


# ------------------------------------ Eq. 5 and 6: consistency ------------------------------------
def consistency_loss(y, x_prime, positives):
    """Eq. 5, from one view to the other: -cos(y_i, x'_j). Eq. 5 is the sum of both directions.

    Mean over an image's positive pairs (i, j), then over the images with any; 0 without any.
    y, x_prime: [N, C, H, W], no gradient into x_prime. positives: bool [N, HW, HW]. Returns a
    scalar in [-1, 1], differentiable also if 0. Raises ValueError or TypeError for other inputs.
    """
    check_maps(y, x_prime, positives)
    return -mean_over_images(pixel_cosine(y, x_prime.detach()), positives)  # Eq. 5


def instance_loss(p, z_prime):
    """L_inst of Eq. 6, from one view to the other: -cos(p, z'), mean over the images, no negatives.

    p: [N, C], the online prediction; z_prime: [N, C], the momentum projection, no gradient into it.
    Returns a scalar in [-1, 1]. Raises ValueError for other shapes.
    """
    if p.ndim != 2 or p.shape != z_prime.shape:
        raise ValueError(f"expected two [N, C], found {list(p.shape)} and {list(z_prime.shape)}")
    dtype = torch.promote_types(p.dtype, torch.float32)
    return -F.cosine_similarity(p.to(dtype), z_prime.detach().to(dtype)).mean()


# ------------------------------------ Networks ------------------------------------
class Backbone(nn.Module):
    """A classification network of torchvision up to a layer: image [N, 3, h, w] -> map.

    The map is [N, out_channels, H, W]. `body` is the network, under torchvision's names; residual
    blocks of ResNets start at zero (authors' code). Raises ValueError for an unknown arch or layer,
    and for a layer that is no map or leaves weights of `body` unused. A deep copy is in train mode.
    """

    def __init__(self, arch="resnet50", layer="layer4"):
        super().__init__()
        if arch not in models.list_models(models):  # without detectors, which download weights
            raise ValueError(f"expected a classification network of torchvision, found {arch!r}")
        options = {"zero_init_residual": True} if "resne" in arch else {}  # ResNet, ResNeXt, Wide
        network = models.get_model(arch, weights=None, **options)
        self.body = create_feature_extractor(network, {layer: "map"})

        # A copy on the meta device, which has shapes and no numbers, tells what the layer gives.
        trial = copy.deepcopy(self.body).to("meta").eval()
        found = trial(torch.empty(1, 3, 224, 224, device="meta"))["map"]
        found.sum().backward()
        unused = sum(p.grad is None for p in trial.parameters())
        shape = found.shape
        if len(shape) != 4 or shape[2] != shape[3] or unused:  # also tokens, or channels last
            wanted = f"a map [N, C, H, W] that uses all weights of {arch} (swin: 'permute')"
            raise ValueError(f"expected {wanted}, found {layer!r} {list(shape)}, {unused} unused")
        self.out_channels = shape[1]

    def forward(self, image):
        return self.body(image)["map"]


def projection_head(in_channels, hidden, out):
    """The projector (Sec. 3.1): [N, in_channels, H, W] -> [N, out, H, W], pixel by pixel."""
    layers = [nn.Conv2d(in_channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(hidden, out, 1))


class Heads(models.detection.backbone_utils.BackboneWithFPN):
    """Head network of Sec. 3.3: image [N, 3, h, w] -> dict of maps [N, 256, H, W], P3 to P6.

    `body`: ResNet; `fpn`: FPN; `tower`: three convolutions of an FCOS head, for all levels. From
    memory of the paper, as no code was released. Raises ValueError for an arch that is no ResNet.
    """

    def __init__(self, arch="resnet50"):
        if arch not in models.list_models(models, include="*resne*"):
            raise ValueError(f"expected a ResNet of torchvision, found {arch!r}")
        network = models.get_model(arch, weights=None, zero_init_residual=True)
        channels = [network.inplanes // k for k in (4, 2, 1)]
        top = ops.feature_pyramid_network.LastLevelP6P7(256, 256)
        super().__init__(network, {"layer2": "0", "layer3": "1", "layer4": "2"}, channels, 256, top)
        top.p7.requires_grad_(False)  # P7 is not trained
        self.tower = models.detection.fcos.FCOSClassificationHead(256, 1, 1, num_convs=3).conv

    def forward(self, image):
        levels = super().forward(image)
        return {name: self.tower(level) for name, level in levels.items() if name != "p7"}


# ------------------------------------ Momentum encoder, PixPro ------------------------------------
def momentum_at(step, total_steps, base=0.99):
    """m at step k of K (authors' code): 1 - (1 - base) (cos(pi k / K) + 1) / 2, from base to 1."""
    if total_steps < 1 or not 0 <= step <= total_steps:
        raise ValueError(f"expected a step from 0 to total_steps, found {step} of {total_steps}")
    return 1 - (1 - base) * (math.cos(math.pi * step / total_steps) + 1) / 2


@torch.no_grad()
def ema_update(online, momentum, m):
    """p' <- m p' + (1 - m) p for the parameters of two like modules; BatchNorm's buffers stay."""
    if not 0 <= m <= 1:
        raise ValueError(f"expected m in [0, 1], found {m}")
    for p, p_prime in zip(online.parameters(), momentum.parameters(), strict=True):
        if p_prime.dtype.itemsize < 4:  # rounding would swallow the small steps
            raise ValueError(f"expected weights of 32 bits (and autocast), found {p_prime.dtype}")
        p_prime.lerp_(p, 1 - m)


class Output(NamedTuple):
    """What PixPro.forward returns: scalars, of which only the loss has a gradient."""

    loss: torch.Tensor  # Eq. 5, 2 or 6, both directions; Eq. 5 lies in [-2, 2]
    similarity: torch.Tensor  # mean cos(x_i, x'_j) of the positive pairs, without propagation
    pairs: torch.Tensor  # positive pairs per image
    spread: torch.Tensor  # of the pixels x on the unit sphere: 1 spread out, 0 collapsed


def feature_spread(x):
    """Standard deviation of the unit vectors x_i / |x_i|, times sqrt(C): [N, C, H, W] -> scalar."""
    deviation = F.normalize(x.float()).std((0, 2, 3), correction=0)  # [N, C, H, W] -> [C]
    return deviation.mean() * len(deviation) ** 0.5


class PixPro(nn.Module):
    """The model that is pre-trained. Its training loop, given an optimizer and a loader of views:

        for step, (view_1, view_2, box_1, box_2) in enumerate(loader):
            model.update_momentum(momentum_at(step, total_steps))
            loss = model(view_1, view_2, box_1, box_2).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    backbone: an nn.Module, weights loaded, with `out_channels`; returns [N, out_channels, H, W].
    dim: C. objective: "pixpro" (Eq. 5), "pixcontrast" (Eq. 2, no PPM); others raise ValueError.
    """

    def __init__(
        self,
        backbone,
        dim=256,
        hidden_dim=2048,
        gamma=2.0,
        num_layers=1,
        threshold=0.7,
        instance_weight=0.0,
        objective="pixpro",
        temperature=0.3,
    ):
        super().__init__()
        if objective not in ("pixpro", "pixcontrast"):
            raise ValueError(f"expected objective 'pixpro' or 'pixcontrast', found {objective!r}")
        self.threshold = threshold
        self.instance_weight = instance_weight
        self.objective = objective
        self.temperature = temperature
        self.backbone = backbone.train()  # as its momentum copy is, whatever mode it came in
        self.projector = projection_head(backbone.out_channels, hidden_dim, dim)
        if objective == "pixpro":
            self.propagation = PixelPropagation(dim, gamma, num_layers)
        self.momentum_backbone = copy.deepcopy(backbone).requires_grad_(False)  # load weights first
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if instance_weight:
            self.instance_projector = projection_head(backbone.out_channels, hidden_dim, dim)
            self.instance_predictor = projection_head(dim, hidden_dim, dim)
            projector = copy.deepcopy(self.instance_projector)
            self.momentum_instance_projector = projector.requires_grad_(False)

    def update_momentum(self, m):
        """Moves the momentum encoder towards the online encoder; call it before each forward."""
        ema_update(self.backbone, self.momentum_backbone, m)
        ema_update(self.projector, self.momentum_projector, m)
        if self.instance_weight:
            ema_update(self.instance_projector, self.momentum_instance_projector, m)

    def forward(self, view_1, view_2, box_1, box_2):
        """view_1, view_2: [N, 3, h, w]; box_1, box_2: [N, 4], as from TwoViews. -> Output."""
        map_1 = self.backbone(view_1)  # [N, out_channels, H, W]
        map_2 = self.backbone(view_2)
        if isinstance(map_1, dict):
            raise TypeError("expected one map, found a dict of maps, which PixProOnLevels takes")
        with torch.no_grad():
            map_prime_1 = self.momentum_backbone(view_1)
            map_prime_2 = self.momentum_backbone(view_2)

        x_1 = self.projector(map_1)  # [N, dim, H, W]
        x_2 = self.projector(map_2)
        x_prime_1 = self.momentum_projector(map_prime_1)  # frozen; the losses detach it, too
        x_prime_2 = self.momentum_projector(map_prime_2)
        loss, *figures = self.pixel_level(x_1, x_2, x_prime_1, x_prime_2, box_1, box_2)
        if self.instance_weight:  # Eq. 6: L = L_PixPro + alpha L_inst
            instance = self.instance_level(map_1, map_2, map_prime_1, map_prime_2)
            loss = loss + self.instance_weight * instance
        return Output(loss, *figures)

    def pixel_level(self, x_1, x_2, x_prime_1, x_prime_2, box_1, box_2):
        """Eq. 5 (or Eq. 2) in both directions; projected maps [N, dim, H, W] of both encoders."""
        A_12 = positive_pairs(box_1, box_2, x_1.shape[2:], self.threshold)  # Eq. 1, [N, HW, HW]
        A_21 = A_12.mT  # rows: view 2, columns: view 1
        if self.objective == "pixcontrast":
            loss_1 = pixcontrast_loss(x_1, x_prime_2, A_12, self.temperature)  # Eq. 2
            loss_2 = pixcontrast_loss(x_2, x_prime_1, A_21, self.temperature)
        else:
            y_1 = self.propagation(x_1)  # Eq. 3 and 4, [N, dim, H, W]
            y_2 = self.propagation(x_2)
            loss_1 = consistency_loss(y_1, x_prime_2, A_12)  # Eq. 5
            loss_2 = consistency_loss(y_2, x_prime_1, A_21)

        with torch.no_grad():  # for the log
            both = consistency_loss(x_1, x_prime_2, A_12) + consistency_loss(x_2, x_prime_1, A_21)
            similarity = -both / 2
            pairs = A_12.sum() / len(A_12)
            spread = (feature_spread(x_1) + feature_spread(x_2)) / 2
        return Output(loss_1 + loss_2, similarity, pairs, spread)

    def instance_level(self, map_1, map_2, map_prime_1, map_prime_2):
        """L_inst of Eq. 6 in both directions; maps [N, out_channels, H, W] of both encoders."""
        p_1 = self.instance_predictor(self.instance_projector(map_1)).mean((2, 3))  # [N, dim]
        p_2 = self.instance_predictor(self.instance_projector(map_2)).mean((2, 3))
        z_prime_1 = self.momentum_instance_projector(map_prime_1).mean((2, 3))  # [N, dim]
        z_prime_2 = self.momentum_instance_projector(map_prime_2).mean((2, 3))
        return instance_loss(p_1, z_prime_2) + instance_loss(p_2, z_prime_1)


class PixProOnLevels(PixPro):
    """PixPro on a dict of maps, fine to coarse (Sec. 3.3): the mean of their losses."""

    def forward(self, view_1, view_2, box_1, box_2):
        encoders = (self.backbone, self.momentum_backbone)  # the second is frozen: no gradient
        maps = [encoder(view).values() for encoder in encoders for view in (view_1, view_2)]
        outputs = []
        for level in zip(*maps):  # its four maps
            x = map(self.projector, level[:2])
            x_prime = map(self.momentum_projector, level[2:])
            outputs.append(self.pixel_level(*x, *x_prime, box_1, box_2))
        loss, *figures = [torch.stack(field).mean() for field in zip(*outputs)]
        if self.instance_weight:
            loss = loss + self.instance_weight * self.instance_level(*level)  # the coarsest
        return Output(loss, *figures)
