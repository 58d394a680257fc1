"""From an instruction to token ids: Llama's tokenizer with OpenVLA's prompt, or the mini's words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mllm.errors import PolicyError
from mllm.hf_config import read_any, read_text

MAX_INSTRUCTION = 2000
# OpenVLA was trained with this token, Llama's lone space, between "Out:" and the action.
BEFORE_ACTION = 29871
# Every word of LIBERO's 130 instructions.
_LIBERO = """
    akita alphabet and at back basket bbq between black book both bottle bottom bowl box butter cabinet caddy center
    cheese chocolate close compartment cookies cream drawer dressing from front frying in inside it juice ketchup
    layer left microwave middle milk moka mug next of off on open orange pan pick place plate pot pots pudding push
    put rack ramekin red right salad sauce shelf soup stack stove table the them to tomato top tray turn under up
    white wine wooden yellow
"""
LIBERO_WORDS = tuple(_LIBERO.split())


class Tokenizer(Protocol):
    def prompt(self, instruction: str) -> list[int]:
        """The ids of a whole prompt, beginning with BOS. Raises PolicyError: no words, or far too many."""
        ...

    def word(self, text: str) -> int:
        """The id with which a word begins inside of a prompt."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the file from which `load_tokenizer` reads it again."""
        ...


def check_instruction(instruction: str) -> str:
    """The instruction without surrounding space. Raises PolicyError unless it is text of 1 to 2,000 characters."""
    if not isinstance(instruction, str) or not 0 < len(instruction.strip()) <= MAX_INSTRUCTION:
        shown = repr(instruction)[:60]
        raise PolicyError(f"the instruction is {shown}: it must be text of 1 to {MAX_INSTRUCTION} characters")
    return instruction.strip()


def openvla_prompt(instruction: str) -> str:
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


UNKNOWN = 2  # of `WordTokenizer`, any word that is not listed; no word of Llama's


class WordTokenizer:
    """One id a word: 0 is padding, 1 BOS, `UNKNOWN`, then `words` in their order."""

    FILE = "words.json"

    def __init__(self, words: Sequence[str] = LIBERO_WORDS) -> None:
        if not all(isinstance(word, str) and word for word in words) or len(set(words)) != len(words):
            raise PolicyError("a vocabulary must be a list of different words")
        self.words = tuple(words)
        self._ids = {word: index + 3 for index, word in enumerate(self.words)}

    @property
    def size(self) -> int:
        return len(self.words) + 3

    def prompt(self, instruction: str) -> list[int]:
        words = re.findall(r"[a-z0-9]+", check_instruction(instruction).lower())
        return [1, *(self._ids.get(word, UNKNOWN) for word in words)]

    def word(self, text: str) -> int:
        return self._ids.get(text.lower(), UNKNOWN)

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(json.dumps(list(self.words)), encoding="utf-8")


class LlamaTokenizer:
    """Llama's tokenizer from the `tokenizer.json` of a checkpoint, and OpenVLA's prompt around the instruction."""

    FILE = "tokenizer.json"

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self._text = read_text(path)
        try:
            self._fast = Fast.from_str(self._text)
        except Exception as error:  # the library raises nothing more specific
            raise PolicyError(f"{path} is no tokenizer: {error}") from error
        bos = self._fast.token_to_id("<s>")
        if bos is None:
            raise PolicyError(f"{path} has no token '<s>', with which a prompt begins")
        self._bos: int = bos

    @property
    def size(self) -> int:
        return 1 + max(BEFORE_ACTION, *self._fast.get_vocab().values())

    def prompt(self, instruction: str) -> list[int]:
        ids = self._fast.encode(openvla_prompt(check_instruction(instruction)), add_special_tokens=False).ids
        return [self._bos, *ids, *([] if ids[-1] == BEFORE_ACTION else [BEFORE_ACTION])]

    def word(self, text: str) -> int:
        return int(self._fast.encode(text.lower(), add_special_tokens=False).ids[0])

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(self._text, encoding="utf-8")


TOKENIZERS = WordTokenizer.FILE, LlamaTokenizer.FILE


def load_tokenizer(folder: Path, ids: int) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, for a model that knows so many ids.

    Raises PolicyError: it has none, or one that cannot be read or makes other ids.
    """
    words, fast = (folder / name for name in TOKENIZERS)
    if words.is_file():
        listed = read_any(words)
        if not isinstance(listed, list):
            raise PolicyError(f"{words} holds a {type(listed).__name__}: it must be a list of words")
        return _fitting(WordTokenizer(listed), words, ids)
    if fast.is_file():
        return _fitting(LlamaTokenizer(fast), fast, ids)
    raise PolicyError(f"{folder} has neither {' nor '.join(TOKENIZERS)}: it lacks its tokenizer")


def _fitting(tokenizer: WordTokenizer | LlamaTokenizer, path: Path, ids: int) -> Tokenizer:
    if tokenizer.size > ids:
        raise PolicyError(
            f"{path} makes ids up to {tokenizer.size - 1}: the model's vocabulary ends at {ids - 1}; "
            "use the file that the model was trained with"
        )
    return tokenizer
