"""How the weights of a layer lie in memory: the order in which the kernels read them.

A tile is 16 output channels by one lane of inputs. Its four vectors of 64 bytes hold four lanes of 16 bytes each, and
lane l of vector v belongs to channel 4 l + v: so every lane is looked up in the table of its own channel, and the sums
of four vectors, added crosswise, come out in the order of the channels (our choice).

    codes of 4 bits   (blocks, ceil(K / 32), 4, 4, 16) uint8   byte j of a lane: input j low, input 16 + j high
    bytes             (blocks, 2 ceil(K / 32), 4, 4, 16) int8  16 inputs a lane

N is padded to a multiple of 16 and K to one of 32, with zeros. Integers beyond a byte lie in planes of bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16
INPUTS = 32
LANE = 16
LARGEST = 127 * (1 + 256 + 65536)


def split(whole: Tensor) -> Tensor:
    """whole: (N, K), integers of at most LARGEST, either way. Returns (planes, N, K) int8; plane p counts 256^p.

    As few planes as hold the largest: one up to 127, two up to 32639, else three.
    """
    planes: list[Tensor] = []
    while not planes or bool(whole.any()):
        planes.append(((whole + 128) & 255) - 128)
        whole = (whole - planes[-1]) >> 8
    return torch.stack(planes).to(torch.int8)


def tile(values: Tensor) -> Tensor:
    """values: (..., N, K), int8; uint8 is codes of 4 bits. Returns their tiles, after the same leading axes."""
    values = F.pad(values, (0, -values.shape[-1] % INPUTS, 0, -values.shape[-2] % CHANNELS))
    inputs = INPUTS if values.dtype is torch.uint8 else LANE
    blocks, lanes = values.shape[-2] // CHANNELS, values.shape[-1] // inputs
    values = values.unflatten(-1, (lanes, inputs)).unflatten(-3, (blocks, 4, 4)).movedim(-2, -4).transpose(-2, -3)
    if values.dtype is torch.uint8:
        values = values[..., :LANE] | values[..., LANE:] << 4
    return values.contiguous()


def untile(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `tile`. Returns (..., N, K) of the same type."""
    if tiles.dtype is torch.uint8:
        tiles = torch.cat((tiles & 15, tiles >> 4), -1)
    values = tiles.transpose(-2, -3).movedim(-4, -2).flatten(-5, -3).flatten(-2)
    return values[..., : shape[0], : shape[1]].contiguous()
