"""Draws what `train.py --curves` wrote: memory reserved in each step by each allocator, over what was live.

    python3 examples/gpu_plugin/plot.py curves.json benches/training
"""

import json
import sys

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 360, 60, 40, 130, 40
COLOURS = {
    "native": "#c0392b",
    "expandable": "#2874a6",
    "plugin": "#1e8449",
    "driver": "#b7950b",
    "rmm": "#ca6f1e",
}
NAMES = {
    "native": "PyTorch",
    "expandable": "expandable segments",
    "plugin": "this pool",
    "driver": "cudaMallocAsync",
    "rmm": "RMM pool",
}


def draw(title, along, end, unit, curves):
    """One picture: a line for each allocator, and an area for what was live. `along` is what the points are, which end
    at `end`; sizes are shown in `unit` bytes."""
    steps = len(curves["plugin"])
    highest = max(reserved for curve in curves.values() for _, reserved in curve) / unit
    grid = next(step for step in (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000) if highest / step <= 7)

    def at(step, mib):
        x = LEFT + step * (WIDTH - LEFT - RIGHT) / (steps - 1)
        y = HEIGHT - BOTTOM - mib * (HEIGHT - TOP - BOTTOM) / (highest * 1.05)
        return f"{x:.1f},{y:.1f}"

    def text(x, y, words, more=""):
        return f'<text x="{x}" y="{y}" {more}>{words}</text>'

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 22, title, 'font-size="14"'),
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, along, 'text-anchor="middle"'),
    ]
    for mib in range(0, int(highest) + 1, grid):
        y = at(0, mib).split(",")[1]
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        lines.append(text(LEFT - 6, float(y) + 4, mib, 'text-anchor="end"'))
    for step in range(0, end + 1, max(10, end // 60 * 10)):
        x = at(min(step * steps / end, steps - 1), 0).split(",")[0]
        lines.append(text(x, HEIGHT - BOTTOM + 16, step, 'text-anchor="middle"'))
    live = [at(step, live / unit) for step, (live, _) in enumerate(curves["plugin"])]
    lines.append(f'<polygon points="{at(0, 0)} {" ".join(live)} {at(steps - 1, 0)}" fill="#e8daef"/>')
    lines.append(text(WIDTH - RIGHT + 8, float(live[-1].split(",")[1]) + 4, "live", 'fill="#7d3c98"'))
    names = []
    for name, curve in curves.items():
        points = [at(step, reserved / unit) for step, (_, reserved) in enumerate(curve)]
        lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        names.append((float(points[-1].split(",")[1]) + 4, name))
    below = 0.0
    for y, name in sorted(names):
        # Names of lines that meet stand below each other.
        below = max(y, below + 13)
        lines.append(text(WIDTH - RIGHT + 8, below, NAMES[name], f'fill="{COLOURS[name]}"'))
    return "\n".join(lines + ["</svg>", ""])


def main():
    with open(sys.argv[1]) as file:
        models = json.load(file)
    for model, curves in models.items():
        with open(f"{sys.argv[2]}_{model}.svg", "w") as file:
            title = f"Training a {model} network: MiB reserved after each step, and most live in it"
            file.write(draw(title, "step", len(curves["plugin"]), 2**20, curves))


if __name__ == "__main__":
    main()
