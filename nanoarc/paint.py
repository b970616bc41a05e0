"""
how a task shows itself: the colors, what stands over each picture, and html for a notebook. view.py draws the rest.
"""
from html import escape

import numpy as np

# the ten colors as arcprize.org paints them
PALETTE = ['#000000', '#0074d9', '#ff4136', '#2ecc40', '#ffdc00', '#aaaaaa', '#f012be', '#ff851b', '#7fdbff', '#870c25']

def captioned(task, tried=()):
    """
    a task -> list of (caption, grids), each a column of a picture: a demo or query is the input over the output, an
    attempt its grid alone. tried: of each query {'attempt_1': grid, ...}, () = there are no attempts
    """
    columns = []
    for i, (x, y) in enumerate(task.demos):
        columns.append((f"demo {i}", [x, y]))
    for i, (x, answer) in enumerate(task.queries):
        columns.append((f"query {i}", [x] if answer is None else [x, answer]))
        attempts = tried[i] if i < len(tried) else {}
        for key, grid in attempts.items():
            caption = key.replace('_', ' ')
            if answer is not None:
                caption += " right" if np.array_equal(grid, answer) else " wrong"
            columns.append((caption, [grid]))
    return columns

def grid_html(grid, side=10):
    """ a grid as inline svg, `side` pixels a cell """
    H, W = grid.shape
    cells = ""
    for r in range(H):
        for c in range(W):
            cells += (f'<rect x="{c * side}" y="{r * side}" width="{side - 1}" height="{side - 1}" '
                      f'fill="{PALETTE[grid[r, c]]}"/>')
    return f'<svg width="{W * side}" height="{H * side}" style="background:#555555">{cells}</svg>'

def task_html(task, tried=()):
    """ a task and attempts, as for captioned, as html """
    blocks = ""
    for caption, grids in captioned(task, tried):
        drawn = "".join(f'<div style="margin-top:4px">{grid_html(grid)}</div>' for grid in grids)
        blocks += f'<div style="margin:0 12px 8px 0"><small>{escape(caption)}</small>{drawn}</div>'
    title = f'<b>{escape(task.name)}</b> ({escape(task.source)})'
    return f'<div>{title}<div style="display:flex;flex-wrap:wrap">{blocks}</div></div>'
