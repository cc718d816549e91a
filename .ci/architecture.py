"""Draws .github/architecture.svg: two views, two encoders, and where the gradient stops.

python .ci/architecture.py
"""

from pathlib import Path

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E66100", "#009E73", "#555555"
parts = []


def box(x, y, width, text, colour, note="", dash="", height=64):
    style = f'fill="white" stroke="{colour}" stroke-width="4" stroke-dasharray="{dash}"'
    parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" {style}/>')
    label(x + width / 2, y + (41 if not note else 30), text)
    label(x + width / 2, y + 54, note, size=21, colour=GREY)


def label(x, y, text, size=26, colour="black", anchor="middle"):
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    parts.append(f'<text x="{x}" y="{y}" {style}>{text}</text>')


def arrow(start, end, colour="black", dash=""):
    """Straight, across or down: its head is a triangle whose tip is the end."""
    (x0, y0), (x1, y1) = start, end
    length = abs(x1 - x0) + abs(y1 - y0)
    dx, dy = (x1 - x0) / length, (y1 - y0) / length
    x, y = x1 - 14 * dx, y1 - 14 * dy  # where the line ends and the head begins
    style = f'stroke="{colour}" stroke-width="4" stroke-dasharray="{dash}"'
    parts.append(f'<line x1="{x0}" y1="{y0}" x2="{x}" y2="{y}" {style}/>')
    head = f"M{x1} {y1} L{x - 7 * dy} {y - 7 * dx} L{x + 7 * dy} {y + 7 * dx} z"
    parts.append(f'<path d="{head}" fill="{colour}"/>')


# The online encoder, with the gradient
label(20, 40, "online encoder", colour=GREY, anchor="start")
box(20, 60, 110, "view 1", BLUE)
box(170, 60, 150, "backbone", BLUE)
box(360, 60, 150, "projector", BLUE)
box(590, 60, 110, "PPM", BLUE, "Eq. 3, 4")
for start, end in ((130, 166), (320, 356), (510, 586), (700, 780)):
    arrow((start, 92), (end, 92))
label(548, 82, "x")
label(730, 82, "y")

# The momentum encoder, without
box(20, 340, 110, "view 2", ORANGE)
box(170, 340, 150, "backbone", ORANGE, dash="12 7")
box(360, 340, 150, "projector", ORANGE, dash="12 7")
for start, end in ((130, 166), (320, 356)):
    arrow((start, 372), (end, 372))
arrow((510, 372), (780, 372))
label(548, 362, "x&#8242;")
parts.append('<path d="M640 350 v44 M656 350 v44" stroke="#D00000" stroke-width="6"/>')
label(648, 424, "no gradient", size=22, colour="#D00000")
label(20, 440, "momentum encoder", colour=GREY, anchor="start")

# The moving average, from weight to weight
for x in (245, 435):
    arrow((x, 128), (x, 332), colour=GREY, dash="4 7")
label(452, 300, "p&#8242; ← m p&#8242; + (1 &#8722; m) p", size=24, colour=GREY, anchor="start")

# The pairs from the boxes, and the loss
for y in (130, 334):
    arrow((75, y), (75, 206 if y == 130 else 248), colour=GREEN)
label(75, 237, "boxes", colour=GREEN)
arrow((122, 228), (586, 228), colour=GREEN)
box(590, 196, 110, "pairs", GREEN, "Eq. 1")
arrow((700, 228), (780, 228), colour=GREEN)
box(784, 60, 100, "", GREEN, height=344)
label(834, 226, "loss")
label(834, 250, "Eq. 5", size=21, colour=GREY)

svg = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 460" font-family="sans-serif">
<rect width="900" height="460" rx="14" fill="white"/>
{chr(10).join(parts)}
</svg>
"""
Path(__file__).parents[1].joinpath(".github/architecture.svg").write_text(svg)
