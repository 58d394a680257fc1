"""Names of a checkpoint's tensors, as OpenVLA published them, and where each lies in our modules.

Our modules carry the published names, with two exceptions: projections that one multiplication serves are stacked, and
timm's LayerScale weight `gamma` is published as `scale_factor`, since transformers renamed any `gamma` it met. Stacked
weights that are quantised stay stacked: nobody else reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from mllm.config import DecoderConfig

# Ours -> the published ones, whose rows are stacked in this order.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Place:
    """Rows `start` to `stop` of our tensor `name`; all of it where stop is None."""

    name: str
    start: int = 0
    stop: int | None = None

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        """The rows, as a view."""
        tensor = tensors[self.name]
        return tensor if self.stop is None else tensor[self.start : self.stop]


def places(names: list[str], config: DecoderConfig) -> Iterator[tuple[str, Place]]:
    """Published name and place of every tensor in `names`, our state dict's; in its order."""
    sizes = {
        "q_proj": config.num_attention_heads * config.head_dim,
        "k_proj": config.num_key_value_heads * config.head_dim,
        "v_proj": config.num_key_value_heads * config.head_dim,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
    }
    for name in names:
        stacked = next((part for part in PARTS if name.endswith(f".{part}.weight")), None)
        if stacked is None:
            published = name
            if name.startswith("vision_backbone.") and name.endswith((".ls1.gamma", ".ls2.gamma")):
                published = name.removesuffix("gamma") + "scale_factor"
            yield published, Place(name)
            continue
        start = 0
        for part in PARTS[stacked]:
            yield name.replace(stacked, part), Place(name, start, start + sizes[part])
            start += sizes[part]
