"""Trains the tiny model and writes a Hugging Face folder: safetensors, tokenizer, chat template.

python -m forebay_exporters.tiny_lm.train .forebay/tiny-lm --text ../shared/data/text
"""

from __future__ import annotations

import argparse
import gzip
import logging
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from forebay_server.generation.templates import render
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from forebay_exporters.tiny_lm.dialogues import Dialogue, dialogue
from forebay_exporters.tiny_lm.folder import (
    CONTEXT,
    SPECIAL,
    TEMPLATE,
    train_tokenizer,
    write_tokenizer,
)

log = logging.getLogger("forebay.tiny_lm")

LENGTH = 256
PROSE_SHARE = 0.05
RATE = 2e-3


def prose(folder: Path | None) -> str:
    """Old English prose; a few lines of our own where there is none."""
    files = sorted(folder.glob("*.txt.gz")) if folder else []
    if not files:
        return "It was a bright cold day, and the river was as still as glass. " * 200
    return "\n".join(gzip.decompress(f.read_bytes()).decode("utf-8", "replace") for f in files)


class Examples:
    """Batches of packed sequences: dialogues with the loss on answers, and prose."""

    def __init__(self, tokenizer: Tokenizer, text: str, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._template = TEMPLATE.read_text()
        self._prose = np.array(tokenizer.encode(text).ids, np.int64)

    def _dialogue(self) -> tuple[list[int], list[bool]]:
        """Ids, and which of them the model is to say (assistant turns, with their end)."""
        made: Dialogue = dialogue(self._random)
        messages = made["messages"]
        extra: dict[str, Any] = {k: v for k, v in made.items() if k != "messages"}
        ids: list[int] = []
        said: list[bool] = []
        before = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = {**extra, "add_generation_prompt": True}
            prompt = render(self._template, messages[:i], asked)
            asked["add_generation_prompt"] = False
            whole = render(self._template, messages[: i + 1], asked)
            for part, mine in ((prompt[len(before) :], False), (whole[len(prompt) :], True)):
                piece = self._tokenizer.encode(part).ids
                ids += piece
                said += [mine] * len(piece)
            before = whole
        return ids, said

    def _repeats(self) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens, again and again: nothing teaches copying faster."""
        period = self._random.randint(8, 64)
        tokens = self._random.choices(
            range(len(SPECIAL), self._tokenizer.get_vocab_size()), k=period
        )
        ids = np.array((tokens * (LENGTH // period + 1))[:LENGTH], np.int64)
        labels = ids.copy()
        labels[:period] = -100
        return ids, labels

    def batch(self, rows: int, repeats: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, [rows, LENGTH]; this share of the rows are repeats."""
        inputs = np.zeros((rows, LENGTH), np.int64)
        labels = np.full((rows, LENGTH), -100, np.int64)
        for row in range(rows):
            if self._random.random() < repeats:
                inputs[row], labels[row] = self._repeats()
                continue
            if self._random.random() < PROSE_SHARE:
                at = self._random.randrange(len(self._prose) - LENGTH)
                inputs[row] = labels[row] = self._prose[at : at + LENGTH]
                continue
            ids: list[int] = []
            said: list[bool] = []
            while len(ids) < LENGTH:
                more, mine = self._dialogue()
                if len(more) > LENGTH:
                    continue
                if ids and len(ids) + len(more) > LENGTH:
                    break
                ids, said = ids + more, said + mine
            n = min(len(ids), LENGTH)
            inputs[row, :n] = ids[:n]
            labels[row, :n] = np.where(said[:n], ids[:n], -100)
        return torch.from_numpy(inputs), torch.from_numpy(labels)


def make_model(vocabulary: int, eos: list[int]) -> LlamaForCausalLM:
    """A Llama of 2.6 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=eos,
            pad_token_id=0,
        )
    )


def train(
    out: Path,
    text_folder: Path | None,
    minutes: float,
    rows: int,
    base: Path | None = None,
    seed: int = 0,
) -> None:
    """Train for so many minutes, on from `base` where it is given, and write the folder."""
    torch.manual_seed(seed)
    text = prose(text_folder)
    r = random.Random(seed + 1)
    template = TEMPLATE.read_text()
    dialogues = [
        render(template, d["messages"], {"tools": d.get("tools")})
        for d in (dialogue(r) for _ in range(4000))
    ]
    if base is None:
        tokenizer = train_tokenizer([text[:1_000_000], *dialogues])
    else:
        tokenizer, seed = Tokenizer.from_file(str(base / "tokenizer.json")), time.time_ns() % 2**32
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    model = make_model(tokenizer.get_vocab_size(), [end, 0])
    if base is not None:
        model = LlamaForCausalLM.from_pretrained(base)
    log.info("%.2f million parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    examples = Examples(tokenizer, text, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    bfloat16 = bool(torch.cpu._is_amx_tile_supported())
    started, step, told = time.monotonic(), 0, 0.0
    model.train()
    while (share := (time.monotonic() - started) / (minutes * 60)) < 1:
        rate = RATE * min(1.0, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = examples.batch(rows, 0.6 if share < 0.3 and base is None else 0.05)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - told > 15:
            told = time.monotonic()
            log.info("step %d, %3.0f %%, loss %.3f", step, share * 100, loss.item())
    write(out, model, tokenizer)


def write(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The Hugging Face folder, whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.to(torch.float32).save_pretrained(part)
    write_tokenizer(part, tokenizer)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, default=None, help="folder with *.txt.gz")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--base", type=Path, default=None, help="a folder to go on from")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(args.out, args.text, args.minutes, args.rows, args.base)


if __name__ == "__main__":
    main()
