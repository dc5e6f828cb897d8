"""Makes the page in this folder: `page.png`, and in `page.txt` what is on it.

    python3.11 -m venv v && v/bin/pip install pillow==13.0.0
    v/bin/python make.py

The fonts are DejaVu's (Debian: fonts-dejavu-core). No test needs this script.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
FONTS = Path("/usr/share/fonts/truetype/dejavu")
SIZE = (1240, 900)  # more than the detector takes, so that the page must shrink
PAPER, INK = 250, 20
# Left, top, font, size, text; in the order in which they are read.
LINES = (
    (80, 60, "DejaVuSans-Bold", 46, "Harbour Office Report"),
    (80, 150, "DejaVuSans", 26, "Number 2041-B"),
    (860, 150, "DejaVuSans", 26, "12 March 2025"),
    (80, 240, "DejaVuSerif", 28, "The ferry left the eastern pier at half past six and reached"),
    (80, 290, "DejaVuSerif", 28, "the island before the fog came in. Nobody on board had seen"),
    (80, 340, "DejaVuSerif", 28, "the lighthouse keeper since the storm of last October."),
    (80, 430, "DejaVuSans", 22, "Passengers: 148 (of 200), vehicles: 36, freight: 12.5 tons"),
    (80, 480, "DejaVuSans", 22, "Please write to office@harbour.example or call 555-0137."),
    (80, 580, "DejaVuSans-Bold", 30, "Fares"),
    (80, 640, "DejaVuSansMono", 26, "Adult, one way"),
    (860, 640, "DejaVuSansMono", 26, "$18.40"),
    (80, 690, "DejaVuSansMono", 26, "Child under twelve"),
    (860, 690, "DejaVuSansMono", 26, "$9.20"),
    (80, 740, "DejaVuSansMono", 26, "Bicycle"),
    (860, 740, "DejaVuSansMono", 26, "$4.75"),
    (80, 830, "DejaVuSans", 18, "Tickets that were bought on the day are valid until midnight."),
)


def main() -> None:
    page = Image.new("L", SIZE, PAPER)
    draw = ImageDraw.Draw(page)
    for left, top, font, size, text in LINES:
        face = ImageFont.truetype(str(FONTS / f"{font}.ttf"), size)
        draw.text((left, top), text, fill=INK, font=face)
    (HERE / "page.png").write_bytes(as_png(page))
    (HERE / "page.txt").write_text("".join(f"{line[-1]}\n" for line in LINES), encoding="utf-8")


def as_png(page: Image.Image) -> bytes:
    """8 bits of grey, no row filtered: what a test can read without a library."""
    width, height = page.size
    pixels = page.tobytes()
    rows = b"".join(b"\0" + pixels[row * width : (row + 1) * width] for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


if __name__ == "__main__":
    main()
