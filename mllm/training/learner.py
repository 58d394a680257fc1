"""The model with what only training needs: augmentation, labels, losses, and heads that read privileged state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.actions import ActionTokens, gripper_from_command
from mllm.diffusion.head import DiffusionHead
from mllm.errors import PolicyError
from mllm.training.config import TrainConfig
from mllm.training.data import Batch
from mllm.training.pointing import Watch, attention_of_words, naming_loss, places_of_words, pointing_loss
from mllm.training.thinning import thinning
from mllm.vla import VLA

TARGET_SCALE = 0.1  # m, that count as 1 in the auxiliary loss; our choice


class Learner(nn.Module):
    """forward(batch, generator) -> losses by name; "loss" is what to descend.

    phases: how many.  objects: token id of the word for each object of a batch.

    Where the model answers with numbers the main loss is their L1 distance (OpenVLA-OFT, arXiv 2502.19645); where it
    draws them from noise, the squared error of the noise (DDPM, arXiv 2006.11239); where it answers with tokens, the
    cross-entropy against the label's bin and its neighbours.  Raises PolicyError: the model cannot drop tokens.
    """

    def __init__(self, model: VLA, config: TrainConfig, phases: int, objects: Sequence[int] = ()) -> None:
        super().__init__()
        if config.thin_share and model.config.decoder.num_hidden_layers < 2:
            raise PolicyError(
                f"TrainConfig.thin_share is {config.thin_share}: the model's decoder has one layer, and tokens are "
                "dropped between two; set it to 0"
            )
        self.model, self.config = model, config
        hidden = model.config.decoder.hidden_size
        self.target_head, self.phase_head = nn.Linear(hidden, 6), nn.Linear(hidden, phases)
        self.register_buffer("objects", torch.tensor(objects, dtype=torch.int64), persistent=False)
        vla = model.config
        self.tokens = ActionTokens(vla.action_bins, vla.token_vocab)
        self.register_buffer("soft", soft_labels(vla.action_bins, config.smoothing), persistent=False)
        weights = torch.ones(vla.action_dim)
        weights[-1] = config.gripper_weight
        self.register_buffer("weights", weights / weights.mean(), persistent=False)
        planes = [(tower.mean, tower.std) for tower in vla.towers]
        self.register_buffer("mean", torch.tensor([v for mean, _ in planes for v in mean]), persistent=False)
        self.register_buffer("std", torch.tensor([v for _, std in planes for v in std]), persistent=False)

    def pointing(self, visual: Tensor, watch: Watch, batch: Batch, prompt: int) -> Tensor | None:
        """See `mllm.training.pointing`; None where nothing says where objects are."""
        words: Tensor = self.objects  # type: ignore[assignment]
        if not len(words) or not self.config.pointing_weight:
            return None
        places = batch.objects
        if self.model.config.images.mirror:
            places = np.stack([places[..., 0], 1 - places[..., 1]], -1)
        scores = attention_of_words(self.model, visual, words, places.shape[2])
        loss = pointing_loss(scores.float(), places)
        if watch.second is not None:
            prompt -= watch.dropped
            named = places_of_words(batch.texts, words.tolist(), prompt).to(visual.device)
            loss = loss + naming_loss(watch.second, prompt, named)
        return loss

    def pixels(self, images: np.ndarray, generator: np.random.Generator | None) -> Tensor:
        """images: (B, cameras, S, S, 3) uint8. Returns (B, cameras, 3 * towers, S, S) float32, normalised, and moved
        and lit at random where there is a generator.
        """
        config, options = self.model.config, self.config
        if generator is not None and options.shift:
            images = shift(images, options.shift, generator)
        if config.images.mirror:
            images = images[..., ::-1, :]
        device = self.model.device
        x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 1, 4, 2, 3).float() / 255
        if generator is not None and options.jitter:
            bright, contrast = (
                torch.from_numpy(generator.uniform(-options.jitter, options.jitter, (2, *x.shape[:3], 1, 1)))
                .to(device, torch.float32)
                .unbind(0)
            )
            x = (x + 0.5 * bright) * (1 + contrast)
        x = x.repeat(1, 1, len(config.towers), 1, 1)
        return (x - self.mean[:, None, None]) / self.std[:, None, None]  # type: ignore[index]

    def proprio(self, batch: Batch, generator: np.random.Generator | None) -> Tensor | None:
        statistics = self.model.config.proprio_statistics
        if statistics is None:
            return None
        values = statistics.normalise(batch.proprio)
        if generator is not None:
            values = values + self.config.proprio_noise * generator.standard_normal(values.shape)
        return torch.from_numpy(values).to(self.model.device, torch.float32)

    def forward(self, batch: Batch, generator: np.random.Generator | None = None) -> dict[str, Tensor]:
        model, config = self.model, self.config
        device = model.device
        actions = torch.from_numpy(self.normalised(batch.actions)).to(device, torch.float32)
        known = torch.from_numpy(batch.known).to(device, torch.float32)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype is torch.bfloat16):
            visual = model.visual_tokens(self.pixels(batch.images, generator))
            prompt = model.prompt(visual, batch.texts, self.proprio(batch, generator))
            watch = Watch()
            if generator is not None and config.thin_share and generator.random() < config.thin_share:
                watch = Watch(thinning(model, generator))
            if model.action_head is not None:
                hidden = model.one_pass(*prompt, hook=watch)
                if isinstance(model.action_head, DiffusionHead):
                    drawn = np.random.default_rng(0) if generator is None else generator
                    descended = model.action_head.loss(hidden, actions, drawn)
                    with torch.no_grad():
                        answer = model.action_head(hidden.detach())
                else:
                    answer = model.action_head(hidden)
                    descended = (answer.float() - actions).abs()
            else:
                ids = torch.from_numpy(self.tokens.encode(actions.cpu().numpy())).to(device)
                if model.config.decoding == "causal":
                    hidden = model.teacher_forced(*prompt, ids.flatten(1), hook=watch)
                else:
                    hidden = model.one_pass(*prompt, hook=watch)
                answer = model.language_model.logits(hidden, model.config.action_ids)
            targets, phases = self.target_head(hidden[:, 0]), self.phase_head(hidden[:, 0])
            pointed = self.pointing(visual, watch, batch, prompt[0].shape[1])
        answer = answer.float()
        if model.action_head is not None:
            error = (answer - actions).abs()
            action_loss = weighted(descended, known, self.weights)  # type: ignore[arg-type]
        else:
            bins = ids - model.config.action_ids[0]
            entropy = -(self.soft[bins.flatten(1)] * F.log_softmax(answer, -1)).sum(-1)  # type: ignore[index]
            action_loss = weighted(entropy.view(actions.shape), known, self.weights)  # type: ignore[arg-type]
            chosen = self.tokens.decode((answer.argmax(-1) + model.config.action_ids[0]).cpu().numpy())
            error = (torch.from_numpy(chosen).to(device).view(actions.shape) - actions).abs()
        target_loss = F.smooth_l1_loss(
            targets.float(), torch.from_numpy(batch.targets).to(device) / TARGET_SCALE, beta=0.3
        )
        phase_loss = F.cross_entropy(phases.float(), torch.from_numpy(batch.phases).to(device))
        with torch.no_grad():
            first = error[:, 0].detach()
            report = {
                "move_error": first[:, :3].mean(),
                "turn_error": first[:, 3:6].mean(),
                "grip_wrong": (first[:, 6] > 1).float().mean(),
            }
        loss = action_loss + config.target_weight * target_loss + config.phase_weight * phase_loss
        losses = {"action": action_loss, "target": target_loss, "phase": phase_loss}
        if pointed is not None:
            losses["pointing"] = pointed
            loss = loss + config.pointing_weight * pointed
        return {"loss": loss, **losses, **report}

    def normalised(self, actions: np.ndarray) -> np.ndarray:
        """Commands to what the model is to say, by the inverse of the policy's transforms."""
        config = self.model.config
        values = gripper_from_command(actions, config.gripper)
        statistics = next(iter(config.statistics.values()), None)
        return values if statistics is None else statistics.normalise(values)


def weighted(loss: Tensor, known: Tensor, weights: Tensor) -> Tensor:
    """The mean over known actions; loss: (B, chunk, 7), known: (B, chunk), weights: (7,) of mean 1."""
    return ((loss * weights).mean(-1) * known).sum() / known.sum().clamp(min=1)


def soft_labels(bins: int, spread: float) -> Tensor:
    """(bins, bins): row i is a label of bin i, a Gaussian of `spread` bins over its neighbours; 0 is the bin alone."""
    places = torch.arange(bins, dtype=torch.float32)
    if spread == 0:
        return torch.eye(bins)
    rows = torch.exp(-0.5 * ((places[:, None] - places) / spread) ** 2)
    return rows / rows.sum(1, keepdim=True)


def shift(images: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    """(B, cameras, S, S, 3) moved by up to `most` pixels each way, every image by its own; the edge is repeated."""
    batch, cameras, size = images.shape[:3]
    by = generator.integers(-most, most, (batch, cameras, 2), endpoint=True)
    places = np.clip(np.arange(size) + by[..., None], 0, size - 1)  # (B, cameras, 2, S)
    rows, columns = places[:, :, 0, :, None], places[:, :, 1, None, :]
    return images[np.arange(batch)[:, None, None, None], np.arange(cameras)[None, :, None, None], rows, columns]
