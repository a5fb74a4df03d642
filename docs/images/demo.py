"""Draw demo.png, the README's picture, from the report of `make demo`: python docs/images/demo.py demo-report"""

import base64
import io
import re
import sys
from pathlib import Path

from PIL import Image

WIDTH = 1100  # pixels; colours of a palette keep the file small
ROWS = 3  # of the report's first picture: titles and images


def draw(report: Path) -> Image.Image:
    """The first rows of the report's pairs above its PCA maps."""
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", report.read_text(encoding="utf-8"))
    opened = [Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in (pictures[0], pictures[-1])]
    opened[0] = opened[0].crop((0, 0, opened[0].width, round(opened[0].height * ROWS / 4)))
    scaled = [picture.resize((WIDTH, round(picture.height * WIDTH / picture.width))) for picture in opened]
    page = Image.new("RGB", (WIDTH, sum(picture.height for picture in scaled) + 12), "white")
    page.paste(scaled[0], (0, 0))
    page.paste(scaled[1], (0, scaled[0].height + 12))
    return page.quantize(192)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) / "report.html").save(Path(__file__).with_suffix(".png"), optimize=True)
