"""How the weights of a layer lie in memory: the order in which the kernels read them.

A tile is 16 output channels by one lane of inputs. Its four vectors of 64 bytes hold four lanes of 16 bytes each, and
lane l of vector v belongs to channel 4 l + v: so every lane is looked up in the table of its own channel, and the sums
of four vectors, added crosswise, come out in the order of the channels (our choice).

    codes of 4 bits   (blocks, ceil(K / 32), 4, 4, 16) uint8   byte j of a lane: input j low, input 16 + j high
    int8              (blocks, ..., 4, 4, 16) int8             16 inputs a lane
    int16             (blocks, ..., 4, 4, 8) int16             8 inputs a lane

N is padded to a multiple of 16 and K to one of 32, with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 16
INPUTS = 32
LANE = {torch.int8: 16, torch.int16: 8}


def tile(values: Tensor) -> Tensor:
    """values: (N, K), int8 or int16; uint8 is codes of 4 bits. Returns their tiles; see above."""
    values = F.pad(values, (0, -values.shape[1] % INPUTS, 0, -values.shape[0] % CHANNELS))
    lanes = values.unflatten(1, (-1, LANE.get(values.dtype, INPUTS))).unflatten(0, (-1, 4, 4)).permute(0, 3, 2, 1, 4)
    if values.dtype is torch.uint8:
        lanes = lanes[..., :16] | lanes[..., 16:] << 4
    return lanes.contiguous()


def untile(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `tile`. Returns (N, K) of the same type."""
    if tiles.dtype is torch.uint8:
        tiles = torch.cat((tiles & 15, tiles >> 4), -1)
    return tiles.permute(0, 3, 2, 1, 4).flatten(0, 2).flatten(1)[: shape[0], : shape[1]].contiguous()
