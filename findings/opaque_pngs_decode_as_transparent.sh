#!/usr/bin/env bash
# Software: torchvision 0.29.1 (torchvision.io), torch 2.14.1; Pillow 13.0.0 as a comparison.
# Expected: decode_image(..., ImageReadMode.RGB_ALPHA) gives 255 as alpha where a PNG is opaque, and 0
#   where it is transparent, as Pillow's convert("RGBA") does.
# Found: a grey PNG with 1, 2 or 4 bits per sample gets the alpha 1, 3 or 15 everywhere, so it is
#   almost wholly transparent; its colours are scaled to 255, its alpha is not. With 8 and 16 bits it
#   is right. The other way round, the transparent colour of a grey or RGB PNG (chunk tRNS) is
#   ignored: alpha is 255 there. There is no warning.
# Why it matters: drawings, scans, symbols and masks are stored with 1 bit, and programs that shrink
#   PNGs turn 8 bits into fewer where it costs nothing. This mode is for blending pictures over a
#   background. A black drawing on white becomes plain white with 0.4 percent of
#   the drawing left, and cut-out objects get back the colour that was to be cut out.
# Way out: decode with Pillow, convert("RGBA"), then pil_to_tensor.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6" "pillow==13.0.0"
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import io
import struct
import zlib

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor


def png(rows, bits, transparent=None):
    """A PNG, grey for numbers and RGB for triples, with one transparent colour or none."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    grey, lines = isinstance(rows[0][0], int), b""
    for row in rows:
        samples = row if grey else [sample for pixel in row for sample in pixel]
        text = "".join(format(sample, f"0{bits}b") for sample in samples)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    size = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0 if grey else 2, 0, 0, 0)
    key = [] if transparent is None else [transparent] if grey else list(transparent)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    data += chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    return data + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def both(name, data):
    """Colours and alpha of the pixels for torchvision and for Pillow, which agree on the colours."""
    found = decode_image(torch.tensor(list(data), dtype=torch.uint8), ImageReadMode.RGB_ALPHA)
    wanted = pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert found.dtype == torch.uint8 and torch.equal(found[:3], wanted[:3])
    alphas = found[3].unique().tolist(), wanted[3].unique().tolist()
    print(f"{name}: alpha {alphas[0]}, Pillow {alphas[1]}")
    return found, *alphas


for bits, alpha in ((1, 1), (2, 3), (4, 15), (8, 255)):
    top = 2**bits - 1
    found, have, want = both(f"opaque, grey, {bits} bits", png([[0, top, 0, top], [top, 0, 0, 0]], bits))
    assert have == [alpha] and want == [255]
    part = found[3:] / 255
    blended = found[:3] / 255 * part + (1 - part)  # over white
    print(f"  black on white: the darkest pixel is {blended.min():.3f}")
    assert abs(blended.min().item() - (1 - alpha / 255)) < 1e-6

for name, data in {
    "RGB, 8 bits": png([[(9, 9, 9), (0, 255, 0)]], 8),
    "the same, green is transparent": png([[(9, 9, 9), (0, 255, 0)]], 8, transparent=(0, 255, 0)),
    "grey, 8 bits, 7 is transparent": png([[5, 7]], 8, transparent=7),
}.items():
    _, have, want = both(name, data)
    assert have == [255] and want == ([0, 255] if "transparent" in name else [255])
PY
