"""What every layer needs to know about the columns of one forward.

Letters: B batch, L columns, Z query/key width.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_layout_seqboat import ScanPlan, build_scan_plan


@dataclass
class SequenceContext:
    """What every layer needs to know about the columns of one forward.

    Attributes:
        real: (B, L) bool, False at pads; None when every column is real.
        reset: (B, L) bool, True at real tokens whose segment starts there; None when none does.
        segment: (B, L) int64, segments started in the row up to each column; None with `reset`.
        positions: (B, L) int64, places among the segment's real tokens, or the caller's `position_ids`.
        cos, sin: (B, L, Z/2) float32 rotary tables, or None.
        places: (B, L) int64, real tokens of the segment before each, where a router asks for them; else None.
        plan, reverse_plan: layouts of the EMA scan and of the one that runs backwards, or None.
        bounds: what `segment_bounds` found, once asked.
    """

    real: Tensor | None
    reset: Tensor | None
    segment: Tensor | None
    positions: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    places: Tensor | None = None
    plan: ScanPlan | None = None
    reverse_plan: ScanPlan | None = None
    bounds: Tensor | None = None

    def segment_bounds(self) -> Tensor | None:
        """First and last column of each token's segment as places among all B * L: (2, B * L) int64; None where every
        row is one segment. Pads behind the last token of a segment count to it."""
        if self.reset is None or self.bounds is not None:
            return self.bounds
        batch, length = self.reset.shape
        columns = torch.arange(length, device=self.reset.device)
        first = torch.where(self.reset, columns, 0).cummax(1).values
        following = F.pad(torch.where(self.reset, columns - 1, length - 1)[:, 1:], (0, 1), value=length - 1)
        last = following.flip(1).cummin(1).values.flip(1)
        row = torch.arange(batch, device=columns.device)[:, None] * length
        self.bounds = torch.stack([first + row, last + row]).flatten(1)
        return self.bounds

    def reversed_marks(self) -> tuple[Tensor | None, Tensor | None]:
        """Real marks and segment starts of the row read backwards: a segment then starts at its last real token."""
        real = None if self.real is None else self.real.flip(1)
        if self.segment is None:
            return real, None
        segment = self.segment.flip(1)
        if real is None:
            ends = segment[:, 1:] != segment[:, :-1]
            return None, F.pad(ends, (1, 0))
        # Compared with the nearest real token already read; pads in between carry no segment of their own.
        length = segment.shape[1]
        columns = torch.arange(length, device=segment.device)
        latest = torch.where(real, columns, -1).cummax(1).values
        before = F.pad(latest[:, :-1], (1, 0), value=-1)
        previous = segment.gather(1, before.clamp_min(0))
        return real, real & (before >= 0) & (segment != previous)

    def reversed_plan(self, chunk_size: int) -> ScanPlan:
        """The layout of the scan that runs from the last column to the first."""
        real, ends = self.reversed_marks()
        batch, length = self.positions.shape
        return build_scan_plan(batch, length, chunk_size, self.positions.device, real, ends)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SequenceContext":
        """A copy on `device`: layers of one model may live on several."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
            elif isinstance(value, ScanPlan):
                tensors = {
                    part.name: getattr(value, part.name).to(device, non_blocking=non_blocking)
                    for part in fields(value)
                    if isinstance(getattr(value, part.name), Tensor)
                }
                moved[field.name] = replace(value, **tensors)
        return replace(self, **moved)
