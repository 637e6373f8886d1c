"""Draw the rooms of the package and the imports between them, as the test of the layout finds them.

python .ci/docs/house.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from test_layout import FILES, ORDER, needed, room  # noqa: E402

PICTURE = ROOT / "docs" / "explanation" / "house.svg"
BOX, FLOOR, WIDE = 130, 34, 24
STYLE = """text { font: 15px sans-serif; fill: #222 } .room { fill: #eef1fb; stroke: #8b97c9 }
path { fill: none; stroke: #4453a5; stroke-width: 1.3; marker-end: url(#head) }"""


def arrows() -> dict[str, set[str]]:
    """Rooms that each room imports from, without those that it also reaches through another."""
    imports: dict[str, set[str]] = {name: set() for name in ORDER}
    for path in FILES:
        if room(path) in imports:
            imports[room(path)] |= {room(other) for other in needed(path)} - {room(path)}
    reached: dict[str, set[str]] = {}
    for name in ORDER:
        reached[name] = imports[name].union(*(reached[other] for other in imports[name]))
    return {
        name: {other for other in others if not any(other in reached[between] for between in others)}
        for name, others in imports.items()
    }


def picture() -> str:
    """Stack the rooms, the ground at the bottom; each arrow leads from a room down to one that it imports from."""
    middle = {name: FLOOR * (len(ORDER) - at - 0.5) + 8 for at, name in enumerate(ORDER)}
    width, height = BOX + WIDE * 11, FLOOR * len(ORDER) + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#4453a5"/></marker>',
        f'<rect width="{width}" height="{height}" rx="8" fill="white"/>',
    ]
    for name, y in middle.items():
        lines.append(f'<rect class="room" x="10" y="{y - 13:g}" width="{BOX}" height="26" rx="4"/>')
        lines.append(f'<text x="{10 + BOX / 2:g}" y="{y + 5:g}" text-anchor="middle">{name}</text>')
    for name, others in arrows().items():
        for other in sorted(others, key=ORDER.index):
            # Arrows leave above the middle and arrive below it, bent further the further they go.
            begin, end, edge = middle[name] + 5, middle[other] - 5, BOX + 11
            bend = edge + WIDE * ((end - begin) / FLOOR) ** 0.9
            lines.append(f'<path d="M{edge},{begin:g} C{bend:.0f},{begin:g} {bend:.0f},{end:g} {edge},{end:g}"/>')
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
