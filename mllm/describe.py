"""Greedy answers of LLaVA to questions about images, what they cost, and the processor that makes its inputs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mllm.compress import CompressConfig, Compressor
from mllm.decoder import KVCache, TokenHook, require_finite
from mllm.engine import JacobiLoop
from mllm.errors import PolicyError
from mllm.flops import prefill_flops
from mllm.llava import Llava, LlavaConfig, Prompt
from mllm.torchvision_import import import_beside_torchvision

IMAGE = "<image>"


def llava_prompt(question: str, images: int = 1) -> str:
    """The words around a question on which LLaVA-1.5's checkpoints for transformers rely."""
    places = f"{IMAGE}\n" * images
    return f"USER: {places}{question.strip()} ASSISTANT:"


def open_image(path: Path) -> Image.Image:
    """Raises OSError: no such file, or no image. PolicyError: an image of far too many pixels."""
    try:
        return Image.open(path).convert("RGB")
    except Image.DecompressionBombError as error:
        raise PolicyError(f"{path}: {error}") from error


class Processor:
    """A checkpoint's tokenizer and image processor, both by transformers. Runs no code from the folder.

    Raises PolicyError: files are missing or wrong, or the processor and the model disagree.
    """

    def __init__(self, folder: Path, config: LlavaConfig) -> None:
        self.config = config
        transformers = import_beside_torchvision("transformers")
        try:
            own = transformers.LlavaProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries below it raise whatever they meet
            raise PolicyError(f"{folder} has no processor that transformers can read: {error}") from error
        self.tokenizer: Any = own.tokenizer
        self.images: Any = own.image_processor
        place = self.tokenizer.convert_tokens_to_ids(IMAGE)
        if place != config.image_token_index:
            raise PolicyError(
                f"{folder}: the tokenizer's {IMAGE} is id {place}, and config.json's {config.image_token_index}"
            )
        if len(self.tokenizer) > config.decoder.vocab_size:
            raise PolicyError(
                f"{folder}: the tokenizer has {len(self.tokenizer)} tokens, and the model {config.decoder.vocab_size}"
            )

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns (n, 3, S, S) float32."""
        size = self.config.clip.image_size
        pixels = self.images(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        if pixels.shape[1:] != (3, size, size):
            raise PolicyError(
                f"the image processor makes images of {tuple(pixels.shape[1:])}: the model's are {(3, size, size)}; "
                "preprocessor_config.json and config.json do not belong together"
            )
        return pixels

    def ids(self, text: str) -> list[int]:
        """Token ids with BOS; every <image> becomes as many as its visual tokens."""
        place, patches = self.config.image_token_index, self.config.clip.patches
        ids = self.tokenizer(text)["input_ids"]
        return [token for token in ids for _ in range(patches if token == place else 1)]

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class Answer:
    """What a batch of prompts was answered, and at what cost.

    tokens: the ids of each sample's answer, without the one that stopped it.
    prompt: positions of the longest prompt.  dropped: visual tokens of each sample that its later layers did not see.
    vision_s, prefill_s, decode_s: wall time.  steps: decoding steps, each of which makes one token a sample.
    cache_bytes, full_cache_bytes: memory of the prompt's keys and values while the answer is decoded, and if no token
        had been dropped; the prefill itself takes the latter.
    prefill_flops, full_prefill_flops: operations of the decoder, by `mllm.flops`; choosing the tokens is left out.
    """

    tokens: list[list[int]]
    prompt: int
    dropped: int
    vision_s: float
    prefill_s: float
    decode_s: float
    steps: int
    cache_bytes: int
    full_cache_bytes: int
    prefill_flops: int
    full_prefill_flops: int


class Generator:
    """Greedy generation, for one prompt or a batch.

    compress: which visual tokens the decoder goes on with; see `mllm.compress`. "per_camera" means per image.
    """

    def __init__(self, model: Llava, compress: CompressConfig | None = None) -> None:
        self.model, self.compress = model, compress or CompressConfig()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor | None, texts: Sequence[Sequence[int]], most: int) -> Answer:
        """pixels: (n, 3, S, S), or None without images; texts: ids a sample, as `Processor` makes them.
        most: tokens of an answer at most.

        Raises PolicyError: see `Llava.prompt`, `CompressConfig.check` and `require_finite`; compression needs equally
        many images in every sample.
        """
        if most < 1:
            raise PolicyError(f"an answer of {most} tokens was asked for: it must be at least 1")
        model, config = self.model, self.model.config.decoder
        start = self._time()
        visual = None if pixels is None else model.visual_tokens(pixels.to(model.device, model.dtype))
        prompt = model.prompt(visual, texts, most)
        hook = self._hook(prompt)
        seen = self._time()
        cache, first = self._prefill(prompt, hook)
        filled = self._time()
        full, count, used = cache.bytes, cache.capacity, tuple(cache.used)
        answers, steps = self._decode(prompt, cache, first, most)
        tokens = int(prompt.visual[0].sum())
        flops, head = partial(prefill_flops, config, count, tokens), 2 * config.hidden_size * config.vocab_size
        return Answer(
            answers,
            count,
            count - used[-1],
            vision_s=seen - start,
            prefill_s=filled - seen,
            decode_s=self._time() - filled,
            steps=steps,
            cache_bytes=full * max(used) // count,
            full_cache_bytes=full,
            prefill_flops=len(texts) * (flops(self.compress) + head),
            full_prefill_flops=len(texts) * (flops() + head),
        )

    def _hook(self, prompt: Prompt) -> TokenHook | None:
        if self.compress.method == "none":
            return None
        config, counts = self.model.config, prompt.visual.sum(1).tolist()
        if len(set(counts)) > 1:
            raise PolicyError(
                f"the samples have {counts} visual tokens: compression needs equally many in every sample of a batch"
            )
        places = prompt.visual.nonzero()[:, 1].view(len(counts), -1)
        return Compressor(self.compress, places, config.decoder.num_hidden_layers, counts[0] // config.clip.patches)

    def _time(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _prefill(self, prompt: Prompt, hook: TokenHook | None) -> tuple[KVCache, Tensor]:
        """Returns a cache that holds the prompt, and the first token, (B, 1)."""
        model, language = self.model, self.model.language_model
        batch, count, _ = prompt.hidden.shape
        cache = KVCache(model.config.decoder, batch, count, model.dtype, model.device)
        last = language.model(prompt.hidden, prompt.positions, valid=prompt.valid, cache=cache, hook=hook, last=1)
        token, logit = language.best(last, (0, model.config.decoder.vocab_size))
        require_finite(logit)
        return cache, token

    def _decode(self, prompt: Prompt, cache: KVCache, first: Tensor, most: int) -> tuple[list[list[int]], int]:
        """Returns the answers, and how many steps they took."""
        config, batch = self.model.config, len(prompt.hidden)
        answers: list[list[int]] = [[] for _ in range(batch)]
        going = set(range(batch))
        # What the prompt's dropped tokens took becomes free before the answer needs any.
        cache.resize(max(cache.used) + most - 1)
        loop = JacobiLoop(self.model.language_model, cache, (0, config.decoder.vocab_size), 2)
        loop.load(prompt.positions[:, -1:] + 1)
        for step in range(most):
            if step:
                tokens, logits = loop(first)
                require_finite(logits)
                first = tokens[:, -1:]
                loop.slot += 1
                loop.position += 1
            for sample, (token,) in enumerate(first.tolist()):
                if sample in going and token in config.stop:
                    going.remove(sample)
                elif sample in going:
                    answers[sample].append(token)
            if not going:
                break
        return answers, step
