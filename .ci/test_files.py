"""What train.py reads and computes: files, pictures, samples, scenes, the probe."""

import os
import pickle
import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from pixpro import TwoViews


# ------------------------------------ Pictures ------------------------------------
def save_tiff(path, values):
    """Writes numbers [h, w] of any type; Pillow writes few."""
    (height, width), data = values.shape, values.tobytes()
    bits, kind = 8 * values.itemsize, "uif".index(values.dtype.kind) + 1
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(data)), (339, kind)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    head, count = struct.pack("<2sHI", b"II", 42, 8 + len(data)), struct.pack("<H", len(tags))
    path.write_bytes(b"".join([head, data, count, *entries, bytes(4)]))


def shown(path, *arguments):
    """What load_image gives: [h, w, 3]."""
    image = train.load_image(path, *arguments)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def stretched(values):
    """0 to 255 from the 0.1 to the 99.9 percentile of the finite values, without "no data"."""
    low, high = np.percentile(values[np.abs(values) < 3e38].astype(np.float64), [0.1, 99.9])
    values = np.where(np.isnan(values), low, values.astype(np.float64))
    return 255 * ((values - low) / (high - low)).clip(0, 1)[:, :, None]


UPRIGHT = {  # what a viewer does with the pixels of each orientation
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),  # clockwise
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def picture(mode="RGB", block=1):
    """An image of 6 x 10 blocks, no two of which are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    pixels = pixels.repeat(block, 0).repeat(block, 1)
    if mode == "I;16":
        return PIL.Image.fromarray(250 * pixels[:, :, 0].astype(np.uint16))
    return PIL.Image.fromarray(pixels).convert(mode)


def turned(orientation):
    exif = PIL.Image.Exif()
    exif[274] = orientation
    return exif


RAW, LZW = (".tif", {}), (".tif", {"compression": "tiff_lzw"})
PNG, WEBP = (".png", {}), (".webp", {"lossless": True, "exact": True})


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "P", "CMYK"])
def test_pictures_are_upright_pixel_for_pixel(tmp_path, mode):
    image = picture(mode)
    expected = np.asarray(image.convert("RGB")).astype(float)
    if mode == "I;16":
        expected = stretched(np.asarray(image))
    kinds = [RAW, LZW] + [PNG] * (mode != "CMYK") + [WEBP] * (mode in ("RGB", "RGBA"))
    for ending, options in kinds:
        for orientation in UPRIGHT:
            path = tmp_path / f"a{ending}"
            image.save(path, exif=turned(orientation), **options)
            found, wanted = shown(path), UPRIGHT[orientation](expected)
            assert found.shape[:2] == wanted.shape[:2], (ending, options, orientation)
            assert abs(found - wanted).max() <= (mode == "I;16"), (ending, options, orientation)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_are_upright_at_every_scale(tmp_path, mode):
    image, path = picture(mode, block=64), tmp_path / "a.jpg"  # 384 x 640
    expected = np.asarray(image.convert("RGB")).astype(float)
    for orientation in UPRIGHT:
        image.save(path, exif=turned(orientation), quality=100, subsampling=0)
        for size, factor in ((None, 1), (170, 1), (130, 2), (60, 4), (40, 8)):
            found = shown(path, size, 1.0)
            wanted = UPRIGHT[orientation](expected)[::factor, ::factor]
            assert found.shape == wanted.shape, (orientation, size)
            inside = np.s_[32 // factor :: 64 // factor, 32 // factor :: 64 // factor]
            assert abs(found[inside] - wanted[inside]).max() <= 4, (orientation, size)


# ------------------------------------ More than 8 bits ------------------------------------
RANGES = {  # the lowest and the highest of 4,096 values
    "uint16": [(0, 255), (0, 1023), (0, 4095), (0, 65535), (40000, 40400)],
    "int16": [(-32768, 32767)],
    "int32": [(0, 255), (-(2**31), 2**31 - 1)],
    "uint32": [(0, 2**32 - 1), (2**31 + 9, 2**32 - 1)],
    "float32": [(0, 1), (0, 65535), (-5, -4), (0, 1e-30), (-2.9e38, 2.9e38)],
}
SPOILED = [  # the same, and what stands in the place of the first values
    ("float32", 0, 1, [np.nan, np.inf, -np.inf]),
    ("float32", 0, 1e-9, [1]),  # a hot pixel
    ("float32", -2, 7, [1e30, -3.4e38]),
    ("float32", 100, 900, [np.finfo(np.float32).min] * 1200),  # a border without data
]
DEEP = [(kind, *ends, []) for kind in RANGES for ends in RANGES[kind]] + SPOILED


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind, low, high, spoiled", DEEP)
def test_more_than_8_bits_use_all_of_the_range(tmp_path, kind, low, high, spoiled):
    values = np.linspace(low, high, 4096).astype(kind)
    values[: len(spoiled)] = spoiled
    values = values.reshape(64, 64)
    save_tiff(tmp_path / "a.tif", values)
    for ending in (".png", ".pgm", ".jp2") if kind == "uint16" else ():
        PIL.Image.fromarray(values).save(tmp_path / f"a{ending}")
    for path in tmp_path.iterdir():
        found = shown(path)
        assert (found.min(), found.max()) == (0, 255), path.name
        assert abs(found - stretched(values)).max() <= 1, path.name


@pytest.mark.filterwarnings("error")
def test_percentiles_by_hand(tmp_path):
    # Of 0, 1, ... 999 and a hot pixel the percentiles 0.1 and 99.9 are 1 and 999: 250 becomes
    # 255 * 249 / 998. Where they are equal, the extremes count; one value is black.
    ramp = np.append(np.arange(1000), 9999).reshape(77, 13)
    extremes = np.full((77, 13), 5)
    extremes.flat[[0, 250]] = 0, 10
    for kind in ("uint16", "int32", "float32"):
        for values, expected in (
            (ramp, [0, 63, 127, 191, 255]),
            (extremes, [0, 255, 127, 127, 127]),
            (np.full((77, 13), 7), [0, 0, 0, 0, 0]),
        ):
            save_tiff(tmp_path / "a.tif", values.astype(kind))
            found = shown(tmp_path / "a.tif")[:, :, 0].flat[[0, 250, 500, 750, 1000]]
            assert found.tolist() == expected, kind


# ------------------------------------ Which files ------------------------------------
def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_every_ending_is_taken_and_what_is_left_out_is_counted(tmp_path, monkeypatch):
    """Links to files are followed, and links to folders are not."""
    endings = "jpg jpeg png ppm bmp pgm tif tiff webp gif avif jfif jpe jp2 mpo"
    taken = [f"{k % 7}/a.{ending}" for k, ending in enumerate(endings.split())]
    taken += [f"b.{ending}" for ending in endings.upper().split()]
    taken += ["album.jpg/c.d.png", "sub/deep er/ä 画.gif"]
    data = tmp_path / "data"
    touch(data, *taken, *[f"sub/{k}.heic" for k in range(5)], "b.HEIC", "README", "jpg", "c.xjpg")
    touch(data, "e.\udcff", ".cache/c.png", "sub/.git/d.png", ".e.jpg")
    for name, target in {"link.png": "b.JPG", "broken.png": "nothing", "loop.png": "."}.items():
        (data / name).symlink_to(target)
    kinds = {".heic": 6, ".xjpg": 1, ".\ufffd": 1, "without ending": 2, "hidden": 3}
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    for place in ("data", "data//", "./data", "data/../data", data, "link"):
        names, left_out = train.find_images(place)
        found = [os.fsdecode(name) for name in names]
        assert found == sorted([*taken, "link.png", "broken.png"]), place
        assert left_out == kinds | {"links to folders": 1}


@pytest.mark.parametrize("closed", ["top", "sub", "deep"])
def test_folders_that_cannot_be_read_are_errors(tmp_path, closed):
    touch(tmp_path, "top/a.png", "top/sub/deep/c.png")
    scandir = os.scandir

    def refusing(place):
        if Path(place).name == closed:
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    with mock.patch("os.scandir", refusing), pytest.raises(PermissionError, match=closed):
        train.find_images(tmp_path / "top")
    for name in ("nowhere", "top/a.png"):
        with pytest.raises(OSError, match=name):
            train.find_images(tmp_path / name)


def test_names_take_a_quarter_of_the_memory(monkeypatch):
    """What a worker is sent, for 100,000 images in 1,000 folders."""
    files = [f"n{k:08}.JPEG" for k in range(100)]
    walk = [(f"/data/imagenet/train/n{k:08}", [], files) for k in range(1000)]
    monkeypatch.setattr(os, "walk", lambda *_, **__: iter(walk))
    names, _ = train.find_images("/data/imagenet/train")
    sent = len(pickle.dumps(train.Samples(names, TwoViews(), 0, "/data/imagenet/train")))
    assert len(names) == 100_000
    assert sent <= np.array([f"{walk[0][0]}/{files[0]}"] * 100_000).nbytes / 4


# ------------------------------------ Samples ------------------------------------
def test_samples_depend_on_seed_and_number_alone():
    """In any order, and in a worker that shares no memory."""
    images = train.Scenes(5, size=48).images
    samples = train.Samples(images, TwoViews(size=16), seed=1)
    first = [samples[n] for n in range(12)]
    again = pickle.loads(pickle.dumps(train.Samples(images, TwoViews(size=16), seed=1)))
    torch.manual_seed(99)
    for n in (11, 0, 5, 3):
        assert all(torch.equal(a, b) for a, b in zip(first[n], again[n]))
    other = train.Samples(images, TwoViews(size=16), seed=2)
    assert not torch.equal(other[0][0], first[0][0])
    assert not torch.equal(first[0][2], first[1][2])  # a crop of its own for every sample
    orders = []
    for n in (0, 5, 10):
        samples.image(n)
        orders.append(samples.order.tolist())
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)  # each image once an epoch
    assert orders[0] != orders[1]


def test_samples_decode_what_their_views_need(tmp_path):
    PIL.Image.new("RGB", (640, 480)).save(tmp_path / "a.jpg")
    for size, scale, expected in ((20, 0.5, 80), (20, 0.03, 320), (200, 0.5, 640)):
        samples = train.Samples(np.array([b"a.jpg"]), TwoViews(size, (scale, 1.0)), 0, tmp_path)
        assert samples.image(0)[0].width == expected


def spoil(path, reason):
    """Writes a file that cannot be read for this reason."""
    if reason == "truncated":
        picture(block=8).save(path, "jpeg")
        os.truncate(path, 700)
    elif reason == "too large":
        picture().save(path, "png", icc_profile=bytes(3_000_000))
    elif reason == "cannot identify":
        save_tiff(path, np.ones((6, 10), np.float64))
    else:
        path.symlink_to("nothing")


@pytest.mark.parametrize("reason", ["truncated", "too large", "cannot identify", "No such file"])
def test_what_cannot_be_read_is_named_and_the_next_sample_is_used(tmp_path, reason, capsys):
    for name in ("a.png", "b.png"):
        picture(block=4).save(tmp_path / name)
    spoil(tmp_path / "\udcff.tif", reason)  # a name that is no text
    names, _ = train.find_images(tmp_path)
    samples = train.Samples(names, TwoViews(size=16), 0, tmp_path)
    drawn = [samples[n] for n in range(4)]
    order = np.random.default_rng([0, 0]).permutation(3)  # epoch 0 of seed 0
    place = [names[k] for k in order].index(b"\xff.tif")
    assert samples.image(place)[1] == place + 1
    assert all(torch.equal(a, b) for a, b in zip(drawn[place], drawn[place + 1]))
    printed = capsys.readouterr().out
    assert f"warning: cannot read {tmp_path}/\ufffd.tif: " in printed and reason in printed


def test_ten_in_a_row_end_with_the_last_reason_and_nine_do_not(tmp_path, monkeypatch):
    order = np.random.default_rng([5, 0]).permutation(12)
    last = f"{order[9]:02}.png"
    readable = [last]

    def choosy(path, *_):
        if Path(path).name not in readable:
            raise OSError(f"the reason of {Path(path).name}")
        return picture()

    monkeypatch.setattr(train, "load_image", choosy)
    names = np.array([b"%02d.png" % k for k in range(12)])
    samples = train.Samples(names, TwoViews(size=16), 5, tmp_path)
    assert samples.image(0)[1] == 9
    readable.clear()
    with pytest.raises(RuntimeError, match=f"ten .* in a row.*{last}.*the reason of {last}"):
        samples[0]


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_views_do_not_depend_on_how_an_image_lies_in_memory(size):
    """torchvision is slow on bytes in planes: the crop, and it alone, is converted."""
    planar = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    drawn, resize = [], v2.functional.resize
    with mock.patch.object(v2.functional, "resize", side_effect=resize) as used:
        for image in (planar, v2.functional.to_pil_image(planar)):
            torch.manual_seed(size)
            drawn.append(TwoViews(size, (0.1, 0.2))(image))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*drawn))
    crop = used.call_args_list[0].args[0]
    assert crop.stride()[-3] == 1
    assert crop.untyped_storage().nbytes() <= 0.25 * planar.nbytes


# ------------------------------------ Scenes and the probe ------------------------------------
def test_scenes_are_a_function_of_seed_and_number():
    scenes, again = train.Scenes(4, 3, first=10, size=64), train.Scenes(1, 3, first=12, size=64)
    assert scenes.images.shape == (4, 3, 64, 64) and scenes.images.dtype == torch.uint8
    assert scenes.masks.shape == (4, 64, 64)
    assert torch.equal(again.images[0], scenes.images[2])
    assert torch.equal(again.masks[0], scenes.masks[2])
    assert not torch.equal(train.Scenes(1, 4, first=12, size=64).images, again.images)
    assert train.Scenes(12).masks.unique().tolist() == list(range(len(train.CLASSES)))


def revealed(masks):
    """Images that show class k in channel k, and the masks."""
    images = 255 * nn.functional.one_hot(masks, 3).permute(0, 3, 1, 2)
    return images.to(torch.uint8), masks


def test_probe_does_not_depend_on_the_numbers_of_the_classes():
    # The fit lacks class 2, which looks like class 0 in the test: IoU 16 / 32 of class 0, 1 of
    # class 1, 0 of class 2, mean 50.
    torch.manual_seed(0)
    stripes = torch.tensor([0, 1, 2]).repeat_interleave(16).view(1, 6, 8)
    fit, fit_masks = revealed(stripes[:, :4])
    images, _ = revealed(stripes % 2)
    for numbers in ([0, 1, 2], [2, 1, 0], [5, 0, 9]):
        named = torch.tensor(numbers)
        part = named[fit_masks], images, named[stripes]
        assert train.linear_probe(nn.Conv2d(3, 3, 1), fit, *part) == pytest.approx(50)


def test_probe_refuses_what_would_look_like_a_result():
    images, masks = revealed(train.Scenes(2, size=48).masks % 2)
    network, nan = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    nn.init.constant_(nan.weight, np.nan)
    for words, *arguments in (
        ("beside 255", network, images, 255 * masks, images, masks),  # one class is ignored
        ("expected integers", network, images, masks / 2, images, masks),
        ("finite features", nan, images, masks, images, masks),
        (r"in \[0, 1\], found 0 to 255", network, images.float(), masks, images, masks),
        ("expected masks", network, images, masks, images, masks[:1]),
    ):
        with pytest.raises(ValueError, match=words):
            train.linear_probe(*arguments)


def test_probe_ignores_a_label():
    images, masks = revealed(train.Scenes(8, size=48).masks % 3)
    ignored = torch.zeros_like(masks, dtype=torch.bool)
    ignored[:, 8:40] = True
    torch.manual_seed(0)
    # Most pixels that look like class 1 are ignored, and the label's number does not matter.
    images = torch.where(ignored[:, None], images.new_tensor([[[0]], [[255]], [[0]]]), images)
    for label in (255, 7):
        some = masks.masked_fill(ignored, label)
        backbone = nn.Conv2d(3, 3, 1)
        found = train.linear_probe(backbone, images, some, images, some, ignore=label)
        assert found == pytest.approx(100)
        assert backbone.training  # it is as it was
