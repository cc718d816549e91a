"""What train.py reads: which files it takes, and every picture as what it shows.

pytest .ci/test_files.py
"""

import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from pixpro import TwoViews


# ------------------------------------ Pictures ------------------------------------
def save_tiff(path, values, order="<", photometric=1):
    """Writes numbers of any type, [h, w] or [h, w, 3], as a TIFF. Order ">" is big-endian."""
    height, width, channels = (*values.shape, 1)[:3]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits, kind = 8 * values.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: channels}
    tags |= {278: height, 279: len(data), 339: kind}
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags.items():
        count = channels if tag in (258, 339) else 1  # these two have a value for each channel
        if count > 1:
            data += struct.pack(f"{order}{count}I", *[value] * count)
            value = 8 + len(data) - 4 * count  # where they stand
        directory += struct.pack(f"{order}HHII", tag, 4, count, value)
    mark = {"<": b"II", ">": b"MM"}[order]
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(data))
    Path(path).write_bytes(head + data + directory + bytes(4))


def shown(path, *arguments):
    """What load_image gives, uint8 [h, w, 3]."""
    image = train.load_image(path, *arguments)
    assert image.mode == "RGB", f"expected an RGB image, found {image.mode}"
    return np.asarray(image)


def grey(path):
    """What load_image gives of a grey picture: [h, w]."""
    r, g, b = np.moveaxis(shown(path), 2, 0).astype(int)
    assert (r == g).all() and (g == b).all(), "a grey picture became coloured"
    return r


def stretched(values):
    """0 to 255 from the 0.1 to the 99.9 percentile of the finite values, without "no data"."""
    ordered = np.sort(values[np.abs(values) < 3e38].astype(np.float64))
    places = np.array([0.001, 0.999]) * (len(ordered) - 1)
    low, high = np.interp(places, np.arange(len(ordered)), ordered)
    if low == high:
        low, high = ordered[0], ordered[-1]
    values = np.where(np.isnan(values), low, values.astype(np.float64))
    return 255 * ((values - low) / (high - low)).clip(0, 1)


# ------------------------------------ Upright ------------------------------------
# Where the standard says that the first row and the first column of the file are shown.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def upright(pixels, orientation):
    row, column = SIDES[orientation]
    if row in ("bottom", "right"):
        pixels = pixels[::-1]
    if column in ("bottom", "right"):
        pixels = pixels[:, ::-1]
    return pixels.swapaxes(0, 1) if row in ("left", "right") else pixels


def picture(mode, block=1):
    """An image of 6 x 10 blocks, no two of which are alike."""
    number = np.arange(60).reshape(6, 10).repeat(block, 0).repeat(block, 1)
    values = [4 * number, 255 - 3 * number, 4 * (number * 7 % 60), 100 + number]
    if mode == "I;16":
        return PIL.Image.fromarray((1000 * number).astype(np.uint16))
    if mode == "P":
        image = PIL.Image.fromarray(number.astype(np.uint8), "P")
        image.putpalette(np.random.default_rng(0).permutation(180).astype(np.uint8).tobytes())
        return image
    channels = [PIL.Image.fromarray(value.astype(np.uint8)) for value in values]
    return PIL.Image.merge(mode, channels[: len(mode)])


def saved(folder, mode, orientation, ending, **options):
    """A picture in a file that says how it is turned; its path, and what is to be seen."""
    image = picture(mode, options.pop("block", 1))
    exif = PIL.Image.Exif()
    exif[274] = orientation
    path = folder / f"turned{ending}"
    image.save(path, exif=exif, **options)
    if mode == "I;16":
        expected = np.repeat(stretched(np.asarray(image))[:, :, None], 3, 2)
    else:
        expected = np.asarray(image.convert("RGB")).astype(float)
    return path, upright(expected, orientation)


LOSSLESS = [(".tif", {}), (".tif", {"compression": "tiff_lzw"}), (".png", {})]
LOSSLESS += [(".webp", {"lossless": True, "exact": True}), (".jp2", {})]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "P", "CMYK"])
def test_pictures_are_upright_pixel_for_pixel(tmp_path, mode, orientation):
    for ending, options in LOSSLESS:
        carried = {".png": mode != "CMYK", ".webp": mode in ("RGB", "RGBA"), ".jp2": False}
        if not carried.get(ending, True):
            continue
        path, expected = saved(tmp_path, mode, orientation, ending, **options)
        found = shown(path)
        kind = f"{mode} in {ending} {options}, orientation {orientation}"
        assert found.shape == expected.shape, f"{kind}: {found.shape}, not {expected.shape}"
        rounding = 1 if mode == "I;16" else 0
        assert abs(found - expected).max() <= rounding, f"{kind}: other pixels"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_are_upright_in_every_size(tmp_path, mode, orientation):
    path, expected = saved(
        tmp_path, mode, orientation, ".jpg", block=64, quality=100, subsampling=0
    )
    for size, factor in ((None, 1), (170, 1), (130, 2), (60, 4), (40, 8)):  # of 384 x 640
        arguments = () if size is None else (size, 1.0)
        found, wanted = shown(path, *arguments), expected[::factor, ::factor]
        assert found.shape == wanted.shape, f"size {size}: {found.shape}, not {wanted.shape}"
        inside = np.s_[32 // factor :: 64 // factor, 32 // factor :: 64 // factor]
        assert abs(found[inside] - wanted[inside]).max() <= 4, f"size {size}: other colours"


def test_pictures_are_upright_in_both_orders_of_bytes(tmp_path):
    for order in "<>":
        for kind in ("uint16", "int16", "int32", "float32"):
            values = (np.arange(60).reshape(6, 10) ** 2).astype(kind)
            save_tiff(tmp_path / "a.tif", values, order)
            found = grey(tmp_path / "a.tif")
            assert abs(found - stretched(values)).max() <= 1, f"{kind}, {order}"


# ------------------------------------ More than 8 bits ------------------------------------
def ramp(kind, low, high):
    """4,096 values from low to high."""
    values = np.linspace(0, 1, 4096).reshape(64, 64)
    return (low + values * (float(high) - low)).astype(kind)


SPOILED = ramp("float32", 0, 1)
SPOILED[3, 5:9] = [np.nan, np.inf, -np.inf, np.nan]
TINY = ramp("float32", 0, 1e-9)
TINY[3, 5] = 1  # a hot pixel
LARGE = ramp("int32", 1e8, 1e8 + 512)
LARGE[3, 5] = 2e9
OUTLIERS = ramp("float32", -2, 7)
OUTLIERS[3, 5], OUTLIERS[60, 2] = 1e30, -3.4e38  # a hot pixel; the usual value of no data
BORDER = ramp("float32", 100, 900)
BORDER[:20] = np.finfo(np.float32).min  # a third of the picture has no data
DEEP = {
    "uint16, 8 bits used": ramp("uint16", 0, 255),
    "uint16, 10 bits used": ramp("uint16", 0, 1023),
    "uint16, 12 bits used": ramp("uint16", 0, 4095),
    "uint16, 16 bits used": ramp("uint16", 0, 65535),
    "uint16, around 40000": ramp("uint16", 40000, 40400),
    "int16": ramp("int16", -32768, 32767),
    "int32, 8 bits used": ramp("int32", 0, 255),
    "int32, both signs": ramp("int32", -(2**31), 2**31 - 1),
    "uint32, 8 bits used": ramp("uint32", 0, 255),
    "uint32, its whole range": ramp("uint32", 0, 2**32 - 1),
    "uint32, its upper half": ramp("uint32", 2**31 + 9, 2**32 - 1),
    "float32, 0 to 1": ramp("float32", 0, 1),
    "float32, 0 to 65535": ramp("float32", 0, 65535),
    "float32, negative": ramp("float32", -5, -4),
    "float32, tiny": ramp("float32", 0, 1e-30),
    "float32, huge": ramp("float32", -2.9e38, 2.9e38),
    "float32, nan and inf": SPOILED,
    "float32, tiny with a hot pixel": TINY,
    "int32, large with a hot pixel": LARGE,
    "float32, a hot pixel and no data": OUTLIERS,
    "float32, a border without data": BORDER,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, order",  # Pillow 13 does not read big-endian uint32
    [(name, order) for name in DEEP for order in "<>" if (name[:6], order) != ("uint32", ">")],
)
def test_deep_tiffs_use_all_of_the_range(tmp_path, name, order):
    values = DEEP[name]
    save_tiff(tmp_path / "deep.tif", values, order)
    found, expected = grey(tmp_path / "deep.tif"), stretched(values)
    assert found.min() == 0 and found.max() == 255, f"from {found.min()} to {found.max()}"
    assert abs(found - expected).max() <= 1, "not linear between the percentiles"
    numbers = np.isfinite(values)
    in_order = found[numbers][np.argsort(values[numbers])]
    assert (np.diff(in_order) >= 0).all(), "brighter in the file, darker in the image"
    assert len(np.unique(found)) > 200, f"only {len(np.unique(found))} shades are left"


@pytest.mark.parametrize("ending", [".png", ".pgm", ".jp2", ".tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_sixteen_bits_in_other_formats(tmp_path, ending, bits):
    values = ramp("uint16", 0, 2**bits - 1)
    PIL.Image.fromarray(values).save(tmp_path / f"deep{ending}")
    found = grey(tmp_path / f"deep{ending}")
    assert abs(found - stretched(values)).max() <= 1 and found.max() == 255


def test_a_pgm_of_its_own_maximum(tmp_path):
    values = ramp("uint16", 0, 1000)
    head = b"P5 64 64 1000\n"
    (tmp_path / "a.pgm").write_bytes(head + values.astype(">u2").tobytes())
    assert abs(grey(tmp_path / "a.pgm") - stretched(values)).max() <= 1


@pytest.mark.parametrize("kind", ["uint16", "int16", "int32", "uint32", "float32"])
@pytest.mark.parametrize("value", [0, 7])
@pytest.mark.filterwarnings("error")
def test_a_single_value_is_black(tmp_path, kind, value):
    save_tiff(tmp_path / "a.tif", np.full((6, 10), value, kind))
    assert not grey(tmp_path / "a.tif").any()
    if kind == "uint16":
        for ending in (".png", ".pgm"):
            PIL.Image.fromarray(np.full((6, 10), value, kind)).save(tmp_path / f"a{ending}")
            assert not grey(tmp_path / f"a{ending}").any(), ending


@pytest.mark.filterwarnings("error")
def test_percentiles_that_are_equal_give_way_to_the_extremes(tmp_path):
    for kind in ("uint16", "float32"):
        values = np.full((100, 100), 50, kind)
        values[0, :3] = [40, 45, 60]
        save_tiff(tmp_path / "a.tif", values)
        found = grey(tmp_path / "a.tif")
        assert found[0, :4].tolist() == [0, 63, 255, 127], kind


def test_eight_bits_are_not_stretched(tmp_path):
    values = np.arange(100, 160, dtype=np.uint8).reshape(6, 10)
    for ending in (".tif", ".png", ".pgm", ".bmp", ".gif"):
        PIL.Image.fromarray(values).save(tmp_path / f"a{ending}")
        assert (grey(tmp_path / f"a{ending}") == values).all(), ending


# ------------------------------------ JPEGs decoded smaller ------------------------------------
@pytest.mark.parametrize("scale", [0.08, 0.5, 1.0])
@pytest.mark.parametrize("size", [16, 33, 224])
@pytest.mark.parametrize("shape", [(640, 480), (64, 2000), (1999, 1501), (100, 100)])
def test_the_smallest_crop_has_enough_pixels(tmp_path, shape, size, scale):
    width, height = shape
    PIL.Image.new("RGB", shape).save(tmp_path / "a.jpg")
    need = size * (4 / 3 / scale) ** 0.5
    factor = max(k for k in (1, 2, 4, 8) if k == 1 or min(shape) / k >= need)
    expected = (-(-width // factor), -(-height // factor))
    found = train.load_image(tmp_path / "a.jpg", size, scale).size
    assert found == expected, f"decoded as {found}, expected {expected}"
    if factor > 1:  # the narrowest crop of the smallest area
        narrowest = (found[0] * found[1] * scale * 3 / 4) ** 0.5
        assert narrowest >= size, f"a crop has {narrowest:.0f} pixels, {size} are shown"
    assert train.load_image(tmp_path / "a.jpg").size == shape, "smaller without a size"


def smooth(width, height):
    y, x = np.mgrid[:height, :width]
    colours = [255 * y / height, 255 * x / width, 128 + 0 * x]
    return PIL.Image.fromarray(np.stack(colours, 2).astype(np.uint8))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100}])
def test_a_jpeg_decoded_smaller_shows_the_same(tmp_path, options):
    smooth(640, 480).save(tmp_path / "a.jpg", **options)
    whole = PIL.Image.open(tmp_path / "a.jpg").convert("RGB")
    found = train.load_image(tmp_path / "a.jpg", 20, 0.5)
    assert found.size == (80, 60)
    expected = np.asarray(whole.reduce(8)).astype(float)
    assert abs(np.asarray(found) - expected).max() <= 4, "another picture"


def test_small_jpegs_and_other_formats_are_decoded_whole(tmp_path):
    for ending, size in ((".jpg", 300), (".png", 20), (".tif", 20), (".webp", 20)):
        path = tmp_path / f"a{ending}"
        smooth(640, 480).save(path)
        expected = np.asarray(PIL.Image.open(path).convert("RGB"))
        assert (shown(path, size, 0.5) == expected).all(), ending


class Sizes:
    """Instead of TwoViews, with its attributes: the size of the image that it is given."""

    size, scale = 20, (0.5, 1.0)

    def __call__(self, image):
        return image.size


def test_samples_ask_for_what_their_views_need(tmp_path):
    smooth(640, 480).save(tmp_path / "a.jpg")
    names, _ = train.find_images(tmp_path)
    views = Sizes()
    assert train.Samples(names, views, 0, tmp_path)[0] == (80, 60)
    views.scale = (0.03, 1.0)
    assert train.Samples(names, views, 0, tmp_path)[0] == (320, 240)
    views.size = 200
    assert train.Samples(names, views, 0, tmp_path)[0] == (640, 480)


# ------------------------------------ Which files ------------------------------------
ENDINGS = [".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"]
ENDINGS += [".gif", ".avif", ".jfif", ".jpe", ".jp2", ".mpo"]


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def listed(folder):
    names, left_out = train.find_images(folder)
    return [os.fsdecode(name) for name in names], dict(left_out)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_in_small_and_capital_letters(tmp_path, ending):
    touch(tmp_path, f"a{ending}", f"b{ending.upper()}", f"c.x{ending[1:]}", f"d.e{ending}")
    names, left_out = listed(tmp_path)
    assert names == [f"a{ending}", f"b{ending.upper()}", f"d.e{ending}"]
    assert left_out == {f".x{ending[1:]}": 1}


def test_what_is_left_out_is_counted_by_ending(tmp_path):
    touch(tmp_path, "a.jpg", *[f"sub/{k}.heic" for k in range(5)], "b.HEIC", "README", "c.txt")
    touch(tmp_path, ".hidden.jpg", "sub/.DS_Store", "d.jpg.part", "jpg", "e.jpg~", "x.tar.gz")
    names, left_out = listed(tmp_path)
    assert names == ["a.jpg"]
    assert left_out.pop("hidden") == 2
    assert left_out.pop("without ending") == 2  # README, jpg
    assert left_out == {".heic": 6, ".txt": 1, ".part": 1, ".jpg~": 1, ".gz": 1}


def test_folders(tmp_path):
    touch(tmp_path, "album.jpg/b.png", ".cache/c.png", "sub/.git/d.png", "sub/deep er/ä 画.gif")
    assert listed(tmp_path)[0] == ["album.jpg/b.png", "sub/deep er/ä 画.gif"]


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path):
    touch(tmp_path, "elsewhere/a.png", "elsewhere/b.png", "images/c.png")
    images = tmp_path / "images"
    (images / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (images / "folder").symlink_to(tmp_path / "elsewhere")
    (images / "folder.png").symlink_to(tmp_path / "elsewhere")
    (images / "loop").symlink_to(images)
    (images / "broken.png").symlink_to(tmp_path / "nothing")
    # The broken one is not passed over without a word: Samples names it.
    assert listed(images)[0] == ["broken.png", "c.png", "link.png"]
    (tmp_path / "data").symlink_to(images)
    assert listed(tmp_path / "data")[0] == ["broken.png", "c.png", "link.png"]


@pytest.mark.parametrize("closed", ["", "sub", "sub/deep"])
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, closed):
    touch(tmp_path, "a.png", "sub/b.png", "sub/deep/c.png")
    scandir = os.scandir

    def refusing(place):
        if Path(place) == tmp_path / closed:
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="Permission denied.*" + closed):
        train.find_images(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "file.png"])
def test_what_is_no_folder_is_an_error(tmp_path, name):
    touch(tmp_path, "file.png")
    with pytest.raises(OSError, match=name):
        train.find_images(tmp_path / name)


def test_names_are_bytes_relative_and_sorted_however_the_folder_is_called(tmp_path, monkeypatch):
    wanted = [f"{k % 7}/{k * 37 % 100}.png" for k in range(100)]
    touch(tmp_path, *[f"data/{name}" for name in wanted])
    monkeypatch.chdir(tmp_path)
    places = ["data", "data/", "data//", "./data", "data/../data", tmp_path / "data"]
    for place in places:
        names, _ = train.find_images(place)
        assert names.dtype.kind == "S", f"expected bytes, found {names.dtype}"
        assert [name.decode() for name in names] == sorted(wanted), place
    monkeypatch.chdir("data")
    assert [name.decode() for name in train.find_images(".")[0]] == sorted(wanted)


def test_names_that_are_no_text(tmp_path, capsys):
    folder = os.fsencode(tmp_path)
    with open(os.path.join(folder, b"\xff\xfe \n.png"), "wb") as file:
        picture("RGB").save(file, "png")
    names, _ = train.find_images(tmp_path)
    assert names.tolist() == [b"\xff\xfe \n.png"]
    assert train.Samples(names, Sizes(), 0, tmp_path)[0] == (10, 6)
    assert capsys.readouterr().out == ""


def test_names_take_a_quarter_of_the_memory(monkeypatch):
    """What a worker is sent, for 100,000 images in 1,000 folders."""
    folder = "/data/imagenet/train"
    walk = [(folder, [f"n{k:08}" for k in range(1000)], [])]
    for k in range(1000):
        files = [f"n{k:08}_{number}.JPEG" for number in range(100)]
        walk.append((f"{folder}/n{k:08}", [], files))
    monkeypatch.setattr(os, "walk", lambda *_, **__: iter(walk))
    names, _ = train.find_images(folder)
    assert len(names) == 100_000
    paths = np.array([f"{place}/{name}" for place, _, files in walk for name in files])
    sent = len(pickle.dumps(train.Samples(names, TwoViews(), 0, folder)))
    assert sent <= paths.nbytes / 4, f"{sent / 2**20:.1f} of {paths.nbytes / 2**20:.1f} MiB"


# ------------------------------------ Samples ------------------------------------
def spoil(path, kind):
    """Writes a file that cannot be read."""
    if kind == "half a jpeg":
        smooth(64, 48).save(path, "jpeg")
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "large profile":
        picture("RGB").save(path, "png", icc_profile=bytes(3_000_000))
    elif kind == "broken link":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "RGB of floats":
        save_tiff(path, np.zeros((6, 10, 3), np.float32), photometric=2)
    elif kind == "RGB called grey":
        save_tiff(path, np.zeros((6, 10, 3), np.uint8), photometric=1)
    elif kind == "text":
        path.write_text("<html>404</html>")
    else:
        save_tiff(path, np.ones((6, 10), kind), ">")


REASONS = {
    "half a jpeg": "image file is truncated",
    "large profile": "Decompressed data too large",
    "broken link": "No such file or directory",
    "text": "cannot identify image file",
    "RGB of floats": "cannot identify image file",
    "RGB called grey": "cannot identify image file",
    "float16": "cannot identify image file",
    "float64": "cannot identify image file",
    "uint32": "cannot identify image file",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_read_is_named_with_the_decoders_reason(tmp_path, kind, capsys):
    for name in ("a.png", "b.png"):
        smooth(40, 30).save(tmp_path / name)
    spoil(tmp_path / "spoiled.tif", kind)
    names, _ = train.find_images(tmp_path)
    samples = train.Samples(names, TwoViews(size=16), 0, tmp_path)
    drawn = [samples[n] for n in range(4)]
    order = np.random.default_rng([0, 0]).permutation(3)  # epoch 0 of seed 0
    place = [names[k] for k in order].index(b"spoiled.tif")
    printed = capsys.readouterr().out
    assert str(tmp_path / "spoiled.tif") in printed, "it is not named"
    assert all(torch.equal(a, b) for a, b in zip(drawn[place], drawn[place + 1]))
    assert REASONS[kind] in printed, f"expected the decoder's reason, found {printed!r}"


def test_ten_in_a_row_end_with_the_last_reason(tmp_path, monkeypatch, capsys):
    touch(tmp_path, *[f"{k:02}.png" for k in range(12)])
    names, _ = train.find_images(tmp_path)

    def refusing(path, *_):
        raise OSError(f"the reason of {Path(path).name}")

    monkeypatch.setattr(train, "load_image", refusing)
    order = np.random.default_rng([5, 0]).permutation(12)
    last = f"{order[9]:02}.png"
    with pytest.raises(RuntimeError, match=f"ten .* in a row.*{last}.*the reason of {last}"):
        train.Samples(names, TwoViews(size=16), 5, tmp_path)[0]
    assert capsys.readouterr().out.count("warning: cannot read") == 10


def test_nine_in_a_row_do_not(tmp_path, monkeypatch):
    touch(tmp_path, *[f"{k:02}.png" for k in range(12)])
    names, _ = train.find_images(tmp_path)
    order = np.random.default_rng([5, 0]).permutation(12)

    def choosy(path, *_):
        if Path(path).name != f"{order[9]:02}.png":
            raise OSError("not this one")
        return smooth(40, 30)

    monkeypatch.setattr(train, "load_image", choosy)
    samples = train.Samples(names, TwoViews(size=16), 5, tmp_path)
    first, tenth = samples[0], samples[9]
    assert all(torch.equal(a, b) for a, b in zip(first, tenth))


def test_samples_reach_a_worker_that_shares_no_memory(tmp_path):
    for number in range(3):
        smooth(40 + number, 30).save(tmp_path / f"{number}.png")
    names, _ = train.find_images(tmp_path)
    samples = train.Samples(names, TwoViews(size=16), 0, tmp_path)
    expected = [samples[n] for n in range(4)]
    loader = DataLoader(
        samples, batch_sampler=[[0, 1], [2, 3]], num_workers=1, multiprocessing_context="spawn"
    )
    found = [torch.cat(parts) for parts in zip(*loader)]
    for part, wanted in zip(found, zip(*expected)):
        assert torch.equal(part, torch.stack(wanted)), "a worker draws other views"


# ------------------------------------ Tensors in planes ------------------------------------
@pytest.mark.parametrize("size", [2, 3, 5, 7, 16])
def test_views_do_not_depend_on_how_an_image_lies_in_memory(size):
    torch.manual_seed(0)
    planar = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    by_pixel = planar.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for number in range(20):
        views = TwoViews(size, (0.2, 1.0))
        kinds = [planar, by_pixel, v2.functional.to_pil_image(planar)]
        drawn = []
        for image in kinds:
            torch.manual_seed(number)
            drawn.append(views(image))
        assert drawn[0][0].shape == (3, size, size) and drawn[0][0].isfinite().all()
        for other in drawn[1:]:  # sums of a small view may round otherwise
            for one, two in zip(drawn[0], other):
                assert torch.allclose(one, two, rtol=0, atol=1e-5), (one - two).abs().max()


def test_what_is_resized_lies_pixel_by_pixel_and_is_the_crop_alone(monkeypatch):
    """torchvision is slow on bytes in planes, and converting all of an image takes time, too."""
    seen, resize = [], v2.functional.resize

    def watching(image, *arguments):
        seen.append(image)
        return resize(image, *arguments)

    monkeypatch.setattr(v2.functional, "resize", watching)
    image = torch.randint(0, 256, (3, 200, 300), dtype=torch.uint8)
    TwoViews(16, (0.1, 0.2))(image)
    assert len(seen) == 2
    for crop in seen:
        assert crop.stride()[-3] == 1, f"strides {crop.stride()}"
        assert crop.untyped_storage().nbytes() <= 0.25 * image.nbytes, "more than the crop"
