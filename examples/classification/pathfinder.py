"""Pathfinder on 32 x 32 pixels, and Path-X on 128 x 128, by the parameters of Long Range Arena (arXiv 2011.04006): are
two dots joined by a dashed path?

Every picture holds two long snakes and some short ones, drawn as dashes; two dots mark both ends of one long snake
(label 1) or one end of each (label 0). Snakes are farther from each other than the dashes of one snake are: the
picture alone decides the label. On 32 x 32 the pixels of dashes touch, and snakes keep an empty one between them.

Letters: B pictures, K candidate directions, P points along a dash.
"""

import itertools
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from synthetic import cached
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Drawing:
    """Lengths in pixels.

    Attributes:
        size: columns of a picture; height: its rows, None for as many.
        contour_length, distractor_length: dashes of a long and of a short snake.
        distractors: short snakes a picture.
        paddle_length: length of a dash; thickness: of a dash.
        gaps: between the dashes of a picture, for as many pictures each.
        padding: pixels kept empty at the border.
        marker_radius: of a dot.
        continuity: a turn by an angle is drawn with a density of |sin|^-continuity: the larger, the straighter.
        antialias: subpixels a pixel and direction.
    """

    size: int = 32
    height: int | None = None
    contour_length: int = 14
    distractor_length: int = 4
    distractors: int = 5
    paddle_length: float = 2.0
    thickness: float = 0.5
    gaps: tuple[int, ...] = (1,)
    padding: int = 1
    marker_radius: float = 1.5
    continuity: float = 1.0
    antialias: int = 2

    @property
    def clearance(self) -> int:
        """Empty pixels between snakes, and between dashes of one that do not follow each other: more than there are
        between those that do."""
        return 1 if self.gaps == (1,) else max(self.gaps) + 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height or self.size, self.size

    def strip(self, height: int | None) -> "Drawing":
        """The same in pictures of `height` rows, with short snakes as dense as before; None keeps the rows."""
        if height in (None, self.shape[0]):
            return self
        few = max(1, round(self.distractors * height / self.size)) if self.distractors else 0
        return replace(self, height=height, distractors=few)


# Pathfinder-128 of Long Range Arena's data/pathfinder.py, whose whole-number quotients 14 / 3 and 35 / 4 give the
# length and the number of the short snakes.
PATHX = Drawing(
    size=128, distractor_length=4, distractors=8, paddle_length=5.0, thickness=1.5, gaps=(2, 3), marker_radius=3.0,
    continuity=1.8,
)  # fmt: skip
# Turns are drawn from this many directions of a half-circle, without the middle one, where the density has its pole.
DIRECTIONS = 36
CANDIDATES = 12
TRIALS = 40
BLOCK = 1024


def _disc(radius: float, step: float) -> np.ndarray:
    """(points, 2) offsets that fill a disc."""
    line = np.arange(-radius, radius + step / 2, step)
    points = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    return points[(points**2).sum(1) <= radius**2 + 1e-9]


def _widen(mask: np.ndarray, pixels: int) -> np.ndarray:
    """(B, H, W) bool, True also within `pixels` columns and rows of True."""
    for _ in range(pixels):
        for axis in (1, 2):
            grown = mask.copy()
            ahead = tuple(slice(1, None) if i == axis else slice(None) for i in range(3))
            behind = tuple(slice(None, -1) if i == axis else slice(None) for i in range(3))
            grown[ahead] |= mask[behind]
            grown[behind] |= mask[ahead]
            mask = grown
    return mask


class _Canvas:
    """Which pixels of each picture are taken, and the drawing itself at the finer resolution."""

    def __init__(self, count: int, drawing: Drawing):
        self.drawing = drawing
        self.taken = np.zeros((count, *drawing.shape), dtype=bool)
        self.ink = np.zeros((count, *(side * drawing.antialias for side in drawing.shape)), dtype=bool)

    def add(self, rows: np.ndarray, points: np.ndarray) -> None:
        """Draws (len(rows), n, 2) points, which are y and x in pixels, into the pictures `rows`."""
        at = rows[:, None]
        fine = np.floor(points * self.drawing.antialias).astype(int)
        self.ink[at, fine[..., 0], fine[..., 1]] = True

    def pictures(self) -> np.ndarray:
        """(B, H, W) uint8, each pixel the mean of its subpixels."""
        d = self.drawing
        cells = self.ink.reshape(len(self.ink), d.shape[0], d.antialias, d.shape[1], d.antialias)
        return np.round(cells.mean((2, 4)) * 255).astype(np.uint8)


def _pixels(points: np.ndarray, drawing: Drawing) -> np.ndarray:
    """Row and column of each of (..., 2) points, of the nearest pixel where one lies outside."""
    return np.clip(np.floor(points).astype(int), 0, np.array(drawing.shape) - 1)


def _free(taken: np.ndarray, points: np.ndarray, drawing: Drawing) -> np.ndarray:
    """Which of (B, K, P, 2) point sets lie within the borders and on free pixels only: (B, K) bool."""
    low, high = drawing.padding, np.array(drawing.shape) - drawing.padding
    inside = ((points >= low) & (points < high)).all((2, 3))
    pixel = _pixels(points, drawing)
    rows = np.arange(len(taken))[:, None, None]
    return inside & ~taken[rows, pixel[..., 0], pixel[..., 1]].any(2)


def _grow(rng: np.random.Generator, taken: np.ndarray, dashes: int, dots: bool, d: Drawing):
    """One snake a picture, wherever it finds room.

    Returns:
        grown: (B,) bool; of the pictures where it is True, points: (G, n, 2), what to draw; ends: (G, 2, 2), where
        dots would go.
    """
    count = len(taken)
    (gap,), step = d.gaps, 0.5 / d.antialias
    along = np.arange(0, d.paddle_length + 1e-9, step)
    # Lines beside each other; one of them is as thick as a subpixel.
    half = max(0.0, d.thickness - 1 / d.antialias) / 2
    across = np.arange(-half, half + 1e-9, step)
    disc = _disc(d.marker_radius, 0.5 / d.antialias) if dots else np.zeros((1, 2))
    turns = (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS * np.pi - np.pi / 2
    density = np.abs(np.sin(turns)) ** -d.continuity
    density /= density.sum()
    position = rng.uniform(d.padding, np.array(d.shape) - d.padding, (count, 2))
    heading = rng.uniform(0, 2 * np.pi, count)
    # Random numbers are drawn for all pictures, whichever go on: what a picture shows does not depend on that.
    going = np.flatnonzero(_free(taken, (position[:, None] + disc)[:, None], d)[:, 0])
    taken, position, heading = taken[going], position[going], heading[going]
    start, drawn = position, np.zeros((len(going), 0, 2))
    # The latest dash may touch the next one, what came before it may not.
    own, later = np.zeros_like(taken), np.zeros_like(taken)
    for dash in range(dashes):
        if dash == 0:
            angles = rng.uniform(0, 2 * np.pi, (count, CANDIDATES))[going]
        else:
            angles = heading[:, None] + rng.choice(turns, p=density, size=(count, CANDIDATES))[going]
        direction = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        first = position[:, None] + direction * (gap if dash else 0)
        tips = first + along[-1] * direction
        beside = direction[..., ::-1] * np.array([1, -1])
        points = first[:, :, None] + along[:, None] * direction[:, :, None]
        points = points[:, :, :, None] + across[:, None] * beside[:, :, None, None]
        points = points.reshape(len(going), CANDIDATES, len(along) * len(across), 2)
        closed = taken | own
        free = _free(closed, points, d)
        if dash == dashes - 1 and dots:
            tip = tips[:, :, None] + disc
            apart = np.linalg.norm(tips - start[:, None], axis=-1) > 2 * d.marker_radius + d.clearance + 1
            free &= _free(closed, tip, d) & apart
        chosen = free.argmax(1)
        kept = np.flatnonzero(free[np.arange(len(going)), chosen])
        chosen, going = chosen[kept], going[kept]
        taken, start, own, drawn, later = (part[kept] for part in (taken, start, own, drawn, later))
        if dash:
            own |= _around(drawn[:, -points.shape[2] :], d)
        drawn = np.concatenate([drawn, points[kept, chosen]], axis=1)
        heading, position = angles[kept, chosen], tips[kept, chosen]
        if dash == 0 and dots:
            # The dot at the beginning covers more than the first dash.
            later = _around(start[:, None] + disc, d)
        if dash == 1 and dots:
            own |= later
    grown = np.zeros(count, dtype=bool)
    grown[going] = True
    return grown, drawn, np.stack([start, position], axis=1)


def _around(points: np.ndarray, d: Drawing) -> np.ndarray:
    """(B, H, W) bool: what lies within the clearance around (B, n, 2) points."""
    pixel = _pixels(points, d)
    mask = np.zeros((len(points), *d.shape), dtype=bool)
    mask[np.arange(len(points))[:, None], pixel[..., 0], pixel[..., 1]] = True
    return _widen(mask, d.clearance)


def draw(rng: np.random.Generator, count: int, drawing: Drawing | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` pictures (B, H, W) uint8 and labels (B,) int64; pictures without room for all snakes are left
    out."""
    d = drawing or Drawing()
    if len(d.gaps) > 1:
        shares = [count // len(d.gaps) + (place < count % len(d.gaps)) for place in range(len(d.gaps))]
        parts = [draw(rng, share, replace(d, gaps=(gap,))) for share, gap in zip(shares, d.gaps, strict=True) if share]
        pictures, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        return pictures, labels
    if d.gaps == (1,) and d.thickness * d.antialias > 1:
        raise ValueError(
            f"thickness must be at most 1/antialias where gaps are 1, got {d.thickness}: a line is as wide as a "
            "subpixel there, and snakes an empty pixel apart"
        )
    canvas, complete = _Canvas(count, d), np.ones(count, dtype=bool)
    ends = np.zeros((count, 2, 2, 2))
    disc = _disc(d.marker_radius, 0.5 / d.antialias)
    plan = [(d.contour_length, 0), (d.contour_length, 1)] + [(d.distractor_length, None)] * d.distractors
    for dashes, long in plan:
        waiting = np.flatnonzero(complete)
        for _ in range(TRIALS):
            grown, points, tips = _grow(rng, canvas.taken[waiting], dashes, long is not None, d)
            if not grown.any():
                continue
            rows = waiting[grown]
            canvas.add(rows, points)
            if long is not None:
                ends[rows, long] = tips
                dots = tips[:, :, None] + disc
                points = np.concatenate([points, dots.reshape(len(rows), -1, 2)], axis=1)
            canvas.taken[rows] |= _around(points, d)
            waiting = waiting[~grown]
            if not len(waiting):
                break
        complete[waiting] = False
    labels = rng.integers(0, 2, count)
    rows, side = np.arange(count), rng.integers(0, 2, (count, 2))
    one = ends[rows, side[:, 0], side[:, 1]]
    joined = ends[rows, side[:, 0], 1 - side[:, 1]]
    apart = ends[rows, 1 - side[:, 0], rng.integers(0, 2, count)]
    for dot in (one, np.where(labels[:, None] == 1, joined, apart)):
        canvas.add(rows[complete], (dot[:, None] + disc)[complete])
    return canvas.pictures()[complete], labels[complete]


def _block(seed: int, size: int, drawing: Drawing, block: int) -> tuple[np.ndarray, np.ndarray]:
    # Another kind of picture draws from another stream: else its contours would be the beginnings of these.
    kind = [] if drawing == Drawing() else [drawing.contour_length]
    kind += [] if drawing.size == Drawing.size and drawing.height is None else [drawing.size]
    kind += [] if drawing.height is None else [drawing.height]
    return draw(np.random.default_rng([seed, block, *kind]), size, drawing)


def generate(seed: int, count: int, drawing: Drawing | None = None) -> dict[str, np.ndarray]:
    """pixels (count, height * width) uint8 and labels (count,) int64, the same on any number of processor cores.

    Raises ValueError where hardly a picture has room for its snakes.
    """
    drawing = drawing or Drawing()
    # Blocks of about as many pixels, whatever the pictures' size, and a few pictures short of those without room.
    block = max(1, BLOCK * Drawing.size**2 // math.prod(drawing.shape))
    workers = min(os.cpu_count() or 1, -(-count // block))
    pixels, labels, made = [], [], 0
    with ExitStack() as stack:
        progress = stack.enter_context(tqdm(total=count, desc="Pathfinder pictures", unit="picture"))
        make = map
        if workers > 1:
            # Forking a process that has used torch's threads may hang.
            pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
            make = stack.enter_context(pool).map
        for first in itertools.count(0, workers):
            for drawn in make(partial(_block, seed, block, drawing), range(first, first + workers)):
                kept = min(len(drawn[0]), count - made)
                pixels.append(drawn[0][:kept])
                labels.append(drawn[1][:kept])
                made += kept
                progress.update(kept)
            if made == count:
                break
            tried = (first + workers) * block
            if tried >= 256 and made < tried / 50:
                raise ValueError(
                    f"pictures of {' x '.join(map(str, drawing.shape))} pixels hardly have room for two contours of "
                    f"{drawing.contour_length} dashes ({made} of {tried} tried): shorter ones fit"
                )
    return {"pixels": np.concatenate(pixels).reshape(count, -1), "labels": np.concatenate(labels)}


def load(
    folder: Path,
    seed: int,
    count: int,
    contour_length: int | None = None,
    drawing: Drawing | None = None,
    height: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels, generated into `folder` the first time; contours and heights other than the drawing's own
    are named."""
    own = drawing or Drawing()
    strip = own.strip(height)
    drawn = strip if contour_length is None else replace(strip, contour_length=contour_length)
    rows = "" if strip == own else f"{height}x"
    dashes = "" if drawn == strip else f"-contour{contour_length}"
    path = folder / f"pathfinder{rows}{own.size}-seed{seed}-{count}{dashes}.npz"
    arrays = cached(path, lambda: generate(seed, count, drawn))
    return arrays["pixels"], arrays["labels"]
