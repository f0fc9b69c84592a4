"""python -m benchmarks.adamw DIR: the embedded model's architecture and text, trained by AdamW alone, without Muon.

DIR then holds the model and its tokens, for `python -m benchmarks quality --model DIR`.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from benchmarks.quality_model import FACTS
from bwla_compiler.demo import DemoConfig
from bwla_compiler.demo.model import TOKENS, text_path
from bwla_compiler.demo.train import new_model
from bwla_compiler.errors import DemoError
from bwla_compiler.inspector.progress import ProgressBars

Progress = Callable[[str, int, int], None]

CONFIG = DemoConfig(batch=8, steps=500, learning_rate=3e-3, warmup_steps=50)
LAST_RATE = 0.02
"""Of the learning rate, at the end of the cosine."""


def main(folder: Path) -> None:
    """Train, and write model, tokenizer and tokens."""
    text = text_path()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(text)
    streams = load_file(text / TOKENS)
    model = new_model(CONFIG, len(tokenizer))
    with ProgressBars(Console()) as progress:
        facts = train(model, streams["train"].to(torch.int64), config=CONFIG, progress=progress)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    save_file(streams, folder / TOKENS)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(facts)


def train(model: nn.Module, stream: Tensor, *, config: DemoConfig, progress: Progress) -> dict[str, float]:
    """Train the model in place on windows drawn from a stream of tokens [n_tokens]; return steps and the last loss.

    Raises DemoError where the loss is not finite.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(config.seed + 1)
    window, smoothed = torch.arange(config.length + 1), math.nan
    model.train()
    with torch.enable_grad():
        for step in range(config.steps):
            starts = torch.randint(0, stream.numel() - config.length, (config.batch, 1), generator=generator)
            rows = stream[starts + window]
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise DemoError(f"training by AdamW: loss is {loss.item()} at step {step}; lower learning_rate")
            smoothed = loss.item() if step == 0 else 0.97 * smoothed + 0.03 * loss.item()
            progress("training by AdamW", step + 1, config.steps)
    model.eval()
    return {"steps": config.steps, "n_tokens": config.steps * config.batch * config.length, "loss": smoothed}


def _schedule(step: int, config: DemoConfig) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return min(1.0, (step + 1) / config.warmup_steps) * (LAST_RATE + (1 - LAST_RATE) * cosine)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
