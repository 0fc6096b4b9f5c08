"""Draw the pictures of docs/architecture.md: python docs/pictures.py. They are plain SVG, without scripts or fonts."""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
BLUE, GRAY, GREEN, ORANGE, INK = "#2b6cb0", "#718096", "#2f855a", "#c05621", "#1a202c"


class Picture:
    """SVG elements on white."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="14">\n<title>{escape(title)}</title>\n'
            f'<rect width="{width}" height="{height}" fill="#fff"/>'
        )
        self._parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, title: str = "", color: str = BLUE) -> None:
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{color}" fill-opacity="0.07" '
            f'stroke="{color}"/>'
        )
        if title:
            self.text(x + width / 2, y + 22, title, bold=True)

    def text(
        self, x: float, y: float, text: str, *, bold: bool = False, color: str = INK, anchor: str = "middle"
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}"{weight}>{escape(text)}</text>')

    def bars(self, x: float, y: float, values: list[float], color: str, *, faint: list[float] | None = None) -> None:
        """Values as bars around a line; `faint` draws others behind them."""
        for shown, opacity in ((faint or [], 0.25), (values, 1.0)):
            for i, value in enumerate(shown):
                top, height = y - max(value, 0) * 40, abs(value) * 40
                self._parts.append(
                    f'<rect x="{x + 14 * i}" y="{top:g}" width="10" height="{height:g}" fill="{color}" '
                    f'opacity="{opacity:g}"/>'
                )
        self._parts.append(f'<path d="M{x - 4} {y}h{14 * len(values) + 4}" stroke="{GRAY}"/>')

    def pixels(self, x: float, y: float, rows: list[str]) -> None:
        """A small image: digits 0 (white) to 9 (black), 9 units a pixel."""
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                shade = 255 - 26 * int(value)
                fill = f"rgb({shade},{shade},{shade})"
                self._parts.append(f'<rect x="{x + 9 * j}" y="{y + 9 * i}" width="9" height="9" fill="{fill}"/>')
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{9 * len(rows[0])}" height="{9 * len(rows)}" fill="none" stroke="{GRAY}"/>'
        )

    def arrow(self, x: float, y: float, dx: float, dy: float = 0, color: str = BLUE) -> None:
        length = (dx**2 + dy**2) ** 0.5
        ux, uy = dx / length, dy / length
        tip = (x + dx, y + dy)
        wings = [(tip[0] - 10 * ux - s * 5 * uy, tip[1] - 10 * uy + s * 5 * ux) for s in (1, -1)]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (tip, *wings))
        self._parts.append(f'<path d="M{x} {y}l{dx} {dy}" stroke="{color}" stroke-width="2"/>')
        self._parts.append(f'<polygon points="{points}" fill="{color}"/>')

    def save(self, name: str) -> None:
        text = "\n".join([self._head, *self._parts, "</svg>"]) + "\n"
        (FOLDER / name).write_text(text, encoding="utf-8")


UPDATE = [0.9, -0.5, 0.3, 0.7, -0.8, 0.1, -0.2, 0.5]
EXPLAINED = [0.75, -0.45, 0.25, 0.2, -0.6, 0.08, -0.15, 0.4]


def proxies() -> None:
    """Encode, send, decode."""
    picture = Picture(820, 340, "A client finds images whose gradients add up to its update; the server computes them.")
    correction = [0, 0, 0, 0.5, 0, 0, 0, 0]
    picture.box(10, 10, 350, 320, "client")
    picture.text(25, 80, "update of its weights", anchor="start")
    picture.bars(235, 90, UPDATE, BLUE)
    picture.text(25, 150, "search images whose", anchor="start")
    picture.text(25, 168, "gradients add up to it", anchor="start")
    for x, rows in ((240, ["2748", "9163", "4829", "1570"]), (290, ["8214", "3795", "0682", "5941"])):
        picture.pixels(x, 140, rows)
    picture.text(25, 230, "what these explain", anchor="start")
    picture.bars(235, 240, EXPLAINED, GREEN, faint=UPDATE)
    picture.text(25, 296, "largest entry of the rest", anchor="start")
    picture.bars(235, 306, correction, ORANGE)
    picture.text(415, 120, "a few kB", bold=True)
    picture.text(415, 152, "2 proxies")
    picture.arrow(368, 165, 94)
    picture.text(415, 190, "1 entry and")
    picture.text(415, 207, "its position")
    picture.box(470, 10, 340, 320, "server")
    picture.text(485, 62, "the same weights as the client", anchor="start")
    for x, rows in ((500, ["2748", "9163", "4829", "1570"]), (550, ["8214", "3795", "0682", "5941"])):
        picture.pixels(x, 85, rows)
    picture.arrow(600, 103, 70)
    picture.text(635, 93, "gradient")
    picture.bars(682, 110, EXPLAINED, GREEN)
    picture.text(640, 200, "+", bold=True)
    picture.bars(682, 200, correction, ORANGE)
    picture.text(640, 285, "=", bold=True)
    picture.text(485, 285, "decoded update", anchor="start")
    picture.bars(682, 285, [a + b for a, b in zip(EXPLAINED, correction, strict=True)], BLUE)
    picture.save("how-proxies.svg")


def secure() -> None:
    """Masks that cancel."""
    picture = Picture(860, 300, "Each pair of clients agrees on a mask; masks cancel in the sum.")
    for i, (name, value, masks, sent) in enumerate(
        (
            ("client A", "3", "+ 71 - 20", "54"),
            ("client B", "5", "- 71 + 48", "82"),
            ("client C", "1", "+ 20 - 48", "73"),
        )
    ):
        y = 10 + 97 * i
        picture.box(10, y, 330, 82, name)
        picture.text(30, y + 46, f"its update, one entry: {value}", anchor="start")
        picture.text(30, y + 67, f"masked: {value} {masks} = {sent}  (mod 100)", anchor="start", color=ORANGE)
        picture.arrow(350, y + 41, 110, 97 * (1 - i) * 0.6)
        picture.text(400, y + 41 + 97 * (1 - i) * 0.3 - 10, sent, bold=True, color=ORANGE)
    picture.box(470, 70, 380, 150, "server")
    picture.text(490, 120, "sees 54, 82, 73: each could be anything", anchor="start")
    picture.text(490, 150, "54 + 82 + 73 = 209 = 9  (mod 100)", anchor="start", bold=True)
    picture.text(490, 175, "= 3 + 5 + 1: every mask is there twice,", anchor="start")
    picture.text(490, 195, "once added and once subtracted", anchor="start")
    picture.text(490, 262, "A and B share 71, B and C 48, A and C 20,", anchor="start", color=GRAY)
    picture.text(490, 280, "agreed by keys that the server does not have", anchor="start", color=GRAY)
    picture.save("how-secure.svg")


def feedback() -> None:
    """What one round leaves out goes with the next."""
    picture = Picture(800, 300, "What compression leaves out in one round is added to the update of the next.")
    updates = ([0.8, -0.3, 0.5, 0.2], [0.6, -0.3, 0.1, 0.3], [0.3, -0.4, 0.2, 0.1])
    left = [0.0] * 4
    for x, title in ((120, "progress"), (275, "+ left before"), (430, "= target"), (585, "sent"), (735, "left over")):
        picture.text(x, 22, title, bold=True)
    for i, update in enumerate(updates):
        y = 80 + 82 * i
        target = [a + b for a, b in zip(update, left, strict=True)]
        largest = max(range(4), key=lambda j: abs(target[j]))
        sent = [value if j == largest else 0.0 for j, value in enumerate(target)]
        picture.text(20, y + 5, f"round {i + 1}", anchor="start")
        for x, values, color in ((95, update, BLUE), (250, left, GRAY), (405, target, BLUE), (560, sent, GREEN)):
            picture.bars(x, y, values, color)
        left = [a - b for a, b in zip(target, sent, strict=True)]
        picture.bars(710, y, left, GRAY)
    picture.save("how-error-feedback.svg")


if __name__ == "__main__":
    proxies()
    secure()
    feedback()
