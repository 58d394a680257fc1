"""`flashvla describe`: LLaVA-1.5 answers a question about an image, and says what it cost."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Describe:
    """Ask LLaVA-1.5 about an image. The answer goes to stdout, what it cost to stderr."""

    image: tyro.conf.Positional[Path]
    """Image file."""
    question: tyro.conf.Positional[str]
    """Such as "What is in the bowl?"."""
    checkpoint: str
    """Folder in transformers' format, such as that of llava-hf/llava-1.5-7b-hf; with --revision OWNER/NAME."""
    revision: str | None = None
    """Commit (40 digits) of a Hugging Face repository, which is fetched."""
    compress: str = "none"
    """none, flashvla, tokencarve, or what these are compared with: fastv, random, uniform."""
    keep: int = 128
    """Visual tokens that the decoder goes on with after its second layer."""
    max_new_tokens: int = 128
    """Tokens of the answer at most."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: bool = False
    """Print answer and costs as JSON on stdout."""

    def run(self) -> int:
        import torch

        from mllm.checkpoint import find_folder
        from mllm.compress import CompressConfig
        from mllm.describe import Generator, Processor, llava_prompt, open_image
        from mllm.llava import load_llava

        compress = CompressConfig(self.compress, self.keep)
        image = open_image(self.image)
        folder = find_folder(self.checkpoint, self.revision)
        model = load_llava(folder, dtype=getattr(torch, self.dtype), device=self.device)
        processor = Processor(folder, model.config)
        ids = processor.ids(llava_prompt(self.question))
        answer = Generator(model, compress)(processor.pixels([image]), [ids], self.max_new_tokens)
        text = processor.text(answer.tokens[0])
        visual = model.config.clip.patches
        costs = {name: value for name, value in asdict(answer).items() if name != "tokens"}
        rate = answer.steps / answer.decode_s if answer.steps else None
        if self.json:
            result = {"answer": text, "visual": visual, "kept": visual - answer.dropped, **costs, "tokens_per_s": rate}
            sys.stdout.write(json.dumps(result, indent=2) + "\n")
            return 0
        sys.stdout.write(text + "\n")
        kept = f"{visual - answer.dropped} of {visual} visual tokens kept ({self.compress})"
        speed = f", {rate:.1f} tokens/s" if rate else ""
        sys.stderr.write(
            f"{kept}, {answer.prompt} tokens in the prompt\n"
            f"vision {answer.vision_s:.3f} s, prefill {answer.prefill_s:.3f} s, decode {answer.decode_s:.3f} s{speed}\n"
            f"prefill {answer.prefill_flops / 1e9:.2f} GFLOP of {answer.full_prefill_flops / 1e9:.2f} without "
            f"compression; keys and values {answer.cache_bytes / 1e6:.2f} MB of {answer.full_cache_bytes / 1e6:.2f}\n"
        )
        return 0


COMMANDS = {"describe": Describe}
