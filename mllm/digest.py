"""Which model it is, in one text: results carry it, so that those of two models are not taken for one's."""

from __future__ import annotations

import hashlib
import json

import torch

from mllm.hf_config import config_to_hf
from mllm.vla import VLA
from quant.checkpoint import headers

# Its name in a policy's `provenance`.
DIGEST = "weights_sha256"


def weights_digest(model: VLA) -> str:
    """SHA-256 in hex of a model's configuration and of every tensor's name, type, shape and bytes, on any device.

    Of packed layers it covers what their codes mean as well. One tensor at a time leaves the device.
    """
    said = json.dumps([config_to_hf(model.config), headers(model)], sort_keys=True)
    digest = hashlib.sha256(said.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
