"""Random variants of training rows, drawn for a whole batch on the device it lies on.

They read the generator that a checkpoint keeps, so that a resumed run draws what an uninterrupted one would have
drawn.
Letters: B rows, H and W height and width of a picture, L samples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Pixels that a picture is moved by at most, up or down and sideways.
SHIFT = 2
# Share of a text's bytes that others of it take the place of.
REPLACED = 0.1
# Recordings: relative speed, samples that they are moved by, and standard deviations of the rest.
SPEED = 0.15
DELAY = 1600
GAIN = 0.2
TILT = 0.3
NOISE = 0.05


def vary_pictures(pictures: Tensor, shift: int = SHIFT, cutout: int = 0) -> Tensor:
    """(B, 1, H, W), each mirrored left to right in half of the cases and moved by up to `shift` pixels; edges are
    repeated. Then a square of side `cutout` around a random pixel is 0, the mean of all pictures."""
    batch, _, height, width = pictures.shape
    device = pictures.device
    down, right = torch.randint(-shift, shift + 1, (2, batch, 1), device=device).unbind()
    rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + right).clamp(0, width - 1)
    mirrored = torch.rand(batch, 1, device=device) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns)
    row = torch.arange(batch, device=device)[:, None, None]
    varied = pictures[row, 0, rows[:, :, None], columns[:, None, :]][:, None]
    if not cutout:
        return varied

    def within(size: int) -> Tensor:
        """(B, size) bool: rows or columns of the square."""
        places = torch.arange(size, device=device) - torch.randint(size, (batch, 1), device=device) + cutout // 2
        return (places >= 0) & (places < cutout)

    return varied.masked_fill(within(height)[:, None, :, None] & within(width)[:, None, None], 0)


def vary_texts(ids: Tensor, mask: Tensor) -> Tensor:
    """(B, L) ids, a tenth of each row's real ones replaced by others of the row; mask (B, L), 1 at real ones, which
    come first."""
    lengths = mask.sum(1, keepdim=True)
    others = ids.gather(1, (torch.rand(ids.shape, device=ids.device) * lengths).long())
    chosen = (torch.rand(ids.shape, device=ids.device) < REPLACED) & mask.bool()
    return torch.where(chosen, others, ids)


def turn_pictures(pictures: Tensor) -> Tensor:
    """(B, 1, H, W), each in one of the eight positions that turns and mirrors bring a square to; a picture that is no
    square in one of four."""
    batch = pictures.shape[0]
    transposed, upside_down, mirrored = (torch.rand(3, batch, 1, 1, 1, device=pictures.device) < 0.5).unbind()
    if pictures.shape[2] == pictures.shape[3]:
        pictures = torch.where(transposed, pictures.transpose(2, 3), pictures)
    pictures = torch.where(upside_down, pictures.flip(2), pictures)
    return torch.where(mirrored, pictures.flip(3), pictures)


def vary_recordings(recordings: Tensor) -> Tensor:
    """(B, L), each played faster or slower, moved in time, with another sign, volume and tone, and with noise."""
    batch, length = recordings.shape
    device = recordings.device
    speed, delay = (2 * torch.rand(2, batch, 1, device=device) - 1).unbind()
    sign, volume, tone, level = torch.randn(4, batch, 1, device=device).unbind()
    centre = (length - 1) / 2
    places = torch.arange(length, device=device) - centre
    places = places * (1 + SPEED * speed) + centre + min(DELAY, length // 10) * delay
    # Between two samples on a line, and silence beyond the ends.
    padded = F.pad(recordings, (1, 2))
    places = (places + 1).clamp(0, length + 1)
    before = places.long()
    share = places - before
    varied = padded.gather(1, before) * (1 - share) + padded.gather(1, before + 1) * share
    # A filter of two taps, which lifts the low tones or the high ones.
    varied = varied + (TILT * tone).clamp(-0.9, 0.9) * F.pad(varied[:, :-1], (1, 0))
    varied = varied * torch.exp(GAIN * volume) * sign.sign()
    return varied + NOISE * level.abs() * torch.randn_like(varied)
