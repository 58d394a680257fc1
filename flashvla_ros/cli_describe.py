"""`flashvla describe`: LLaVA-1.5 answers a question about an image, and says what it cost."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
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
    max_new_tokens: int = 128
    """Tokens of the answer at most."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    json: bool = False
    """Print answer and costs as JSON on stdout."""

    def run(self) -> int:
        import torch

        from mllm.checkpoint import find_folder
        from mllm.describe import Generator, Processor, llava_prompt, open_image
        from mllm.llava import load_llava

        image = open_image(self.image)
        folder = find_folder(self.checkpoint, self.revision)
        model = load_llava(folder, dtype=getattr(torch, self.dtype), device=self.device)
        processor = Processor(folder, model.config)
        ids = processor.ids(llava_prompt(self.question))
        answer = Generator(model)(processor.pixels([image]), [ids], self.max_new_tokens)
        text = processor.text(answer.tokens[0])
        visual = model.config.clip.patches
        result = {
            "answer": text,
            "prompt_tokens": answer.prompt,
            "visual_tokens": visual,
            "kept_visual_tokens": visual - answer.prompt + answer.kept,
            "new_tokens": len(answer.tokens[0]),
            "vision_s": answer.vision_s,
            "prefill_s": answer.prefill_s,
            "decode_s": answer.decode_s,
            "tokens_per_s": answer.steps / answer.decode_s if answer.steps else None,
            "cache_bytes": answer.cache_bytes,
            "full_cache_bytes": answer.full_cache_bytes,
        }
        if self.json:
            sys.stdout.write(json.dumps(result, indent=2) + "\n")
            return 0
        sys.stdout.write(text + "\n")
        rate = f"{result['tokens_per_s']:.1f} tokens/s" if answer.steps else "one token"
        sys.stderr.write(
            f"vision {answer.vision_s:.3f} s, prefill {answer.prefill_s:.3f} s of {answer.prompt} tokens, decode "
            f"{answer.decode_s:.3f} s ({rate})\n"
            f"kept {result['kept_visual_tokens']} of {visual} visual tokens\n"
            f"cache of the prompt: {answer.cache_bytes / 1e6:.2f} MB, without compression "
            f"{answer.full_cache_bytes / 1e6:.2f} MB\n"
        )
        return 0


COMMANDS = {"describe": Describe}
