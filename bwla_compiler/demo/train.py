"""Training of the embedded model: Qwen3, float32, seeded, Muon and AdamW with a cosine schedule, on the CPU."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from bwla_compiler.demo.config import DemoConfig
from bwla_compiler.demo.muon import Muon
from bwla_compiler.demo.tokenizer import END_OF_TEXT_ID
from bwla_compiler.errors import DemoError

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]

MOST_THREADS = 8  # beyond, matrices this small gain nothing and a container's quota is soon overdrawn
RATE_STEPS = (10, 30)  # between which the machine's speed is measured
LAST_RATE = 0.02  # of the learning rate, at the end of the cosine


@dataclass(frozen=True)
class Training:
    """What a training run took: steps taken, tokens seen, seconds, last smoothed loss (nats per token)."""

    steps: int
    n_tokens: int
    seconds: float
    loss: float
    shortened: bool


def new_model(config: DemoConfig, vocab_size: int) -> Qwen3ForCausalLM:
    """Return the untrained model, its weights drawn from config.seed; the global random state is left alone."""
    qwen = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Qwen3ForCausalLM(qwen).float()


def train(
    model: Qwen3ForCausalLM, stream: Tensor, *, config: DemoConfig, progress: Progress | None = None
) -> Training:
    """Train the model in place on a stream of tokens [n_tokens] int64 and return what it took.

    The number of steps is config.steps, and the result the same at every run on one machine; where the first
    steps say that it would take over config.second_limit seconds, the schedule is shortened and that is logged.
    Raises DemoError where the stream is shorter than one batch or the loss is not finite.
    """
    n_steps, smoothed, done = config.steps, math.nan, 0
    adamw, muon = _optimizers(model, config)
    batches = _batches(stream, config)
    model.train()
    started = warm = time.monotonic()
    with _threads(), torch.enable_grad():
        while done < n_steps:
            loss = _gradients(model, next(batches))
            if not math.isfinite(loss):
                raise DemoError(f"training the embedded model: loss is {loss} at step {done}; lower learning_rate")
            rate = _schedule(done, n_steps, config.warmup_steps)
            for group in adamw.param_groups:
                group["lr"] = rate * config.learning_rate
            adamw.step()
            muon.step(rate * config.matrix_rate)
            smoothed = loss if done == 0 else 0.97 * smoothed + 0.03 * loss
            done += 1
            if done == RATE_STEPS[0]:
                warm = time.monotonic()
            elif done == RATE_STEPS[1]:
                n_steps = _affordable(n_steps, (time.monotonic() - warm) / (done - RATE_STEPS[0]), config)
            if progress is not None:
                progress("training the embedded model", done, n_steps)
    seconds = time.monotonic() - started
    model.eval()
    log.info("embedded model: %d steps in %.0f s, training loss %.3f", done, seconds, smoothed)
    return Training(done, done * config.batch * config.length, seconds, smoothed, done < config.steps)


def _optimizers(model: Qwen3ForCausalLM, config: DemoConfig) -> tuple[torch.optim.AdamW, Muon]:
    """Return AdamW for the embedding and the gains, and Muon for all other matrices."""
    embedding = model.get_input_embeddings().weight
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2 and parameter is not embedding]
    gains = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": [embedding], "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True), Muon(matrices)


def _gradients(model: Qwen3ForCausalLM, batch: Tensor) -> float:
    """Set the gradients of one batch [batch, length + 1], clipped, and return its loss in nats per token."""
    logits = model(batch[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item()


def _batches(stream: Tensor, config: DemoConfig) -> Iterator[Tensor]:
    """Yield batches [batch, length + 1] without end: every epoch cuts the stream at a new offset and shuffles."""
    if stream.numel() <= config.length * (config.batch + 1):
        raise DemoError(
            f"the training text's {stream.numel()} tokens are too few for a batch of {config.batch} sequences"
        )
    generator = torch.Generator().manual_seed(config.seed + 1)
    window = torch.arange(config.length + 1)
    while True:
        offset = int(torch.randint(0, config.length, (1,), generator=generator))
        starts = torch.arange(offset, stream.numel() - config.length, config.length)
        starts = starts[torch.randperm(starts.numel(), generator=generator)]
        for chosen in starts.split(config.batch):
            if chosen.numel() == config.batch:
                yield stream[chosen[:, None] + window]


def _schedule(step: int, n_steps: int, warmup_steps: int) -> float:
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
    return warmup * (LAST_RATE + (1 - LAST_RATE) * cosine)


def _affordable(n_steps: int, seconds_per_step: float, config: DemoConfig) -> int:
    projected = n_steps * seconds_per_step
    if projected <= config.second_limit:
        return n_steps
    fewer = max(RATE_STEPS[1] + 1, int(config.second_limit / seconds_per_step))
    log.warning(
        "embedded model: %d steps would take %.0f s here, over %.0f s: the schedule is shortened to %d steps, "
        "and perplexities will be worse than on a faster machine",
        n_steps, projected, config.second_limit, fewer,
    )
    return fewer


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(MOST_THREADS, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
