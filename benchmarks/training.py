"""`bench train`: a model of another family from the embedded model's text, or more, until its time is up; resumable.

FOLDER holds tokenizer, tokens and `checkpoint.pt` while it is trained, and the model itself when it is done. The same
command goes on from the checkpoint. Which sequences a step reads follows from the seed and the step's number, so that
a run that was stopped reads what it would have read. How many steps fit into the minutes does depend on the machine;
`steps` in their place makes a run of a fixed length. Where the processor multiplies bfloat16 natively, products are of
bfloat16 (autocast); weights, optimizers' states and the loss are float32 everywhere.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from benchmarks.families import Size, new_model
from benchmarks.package_text import package_version
from benchmarks.quality_model import FACTS, TOKENS, texts
from bwla_compiler.demo.config import DemoConfig
from bwla_compiler.demo.corpus import Document
from bwla_compiler.demo.muon import Muon
from bwla_compiler.demo.tokenizer import encode_documents, train_tokenizer
from bwla_compiler.errors import ModelError
from bwla_compiler.numerics.products import native_bfloat16

Progress = Callable[[str, int, int], None]
Products = Literal["bfloat16", "float32"]
Optimizer = Literal["muon", "adamw"]
Schedule = Literal["level", "cosine"]

CHECKPOINT = "checkpoint.pt"
SAVE_SECONDS = 60.0
WEIGHT_DECAY = 0.1
"""Of matrices and embeddings, where AdamW alone trains."""
WARMUP, DECAY = 0.02, 0.3
"""Shares of the run: in which the rate rises, and in which a level one falls at the end."""
LAST = 0.02
"""The rate at the end."""


def native_products() -> Products:
    """Return the type in which this processor multiplies fastest."""
    return "bfloat16" if native_bfloat16() else "float32"


@dataclass(frozen=True)
class Job:
    """What is trained. minutes: of training, all runs together; steps: in their place where above 0.

    packages: installed ones, whose docstrings are read beside the standard library's; batch: sequences a step;
    optimizer: "muon" for the blocks' matrices and AdamW, at learning_rate, for the rest; or "adamw" for all, at
    adamw_rate, as models that are published are trained. schedule: of the rates, see `rate_at`. products: type of the
    factors of matrix products, by default what the processor multiplies fastest. compiled: steps go through
    `torch.compile`, about 1.6 times as fast after a minute of compiling; the weights differ by the order of sums alone.
    """

    family: str
    folder: Path
    minutes: float = 20.0
    steps: int = 0
    size: Size = field(default_factory=Size)
    vocab_size: int = 4096
    packages: tuple[str, ...] = ()
    batch: int = 8
    length: int = 256
    seed: int = 0
    optimizer: Optimizer = "muon"
    schedule: Schedule = "level"
    learning_rate: float = 4e-3
    matrix_rate: float = 0.02
    adamw_rate: float = 3e-3
    products: Products = field(default_factory=native_products)
    compiled: bool = False

    def fixed(self) -> dict[str, Any]:
        """Return what may not change between the runs of one training."""
        changing = ("folder", "minutes", "steps", "compiled")
        return {name: value for name, value in asdict(self).items() if name not in changing}


def train_family(job: Job, *, progress: Progress, documents: list[Document] | None = None) -> dict[str, Any]:
    """Train, or go on, and return {"steps", "seconds", "loss", "n_parameters", ...}; the folder is then a model.

    documents: the text, by default the embedded model's without what the seed holds out, which is kept beside it for
    `bench quality --model`. Raises ModelError where the
    folder holds another training, or the loss is not finite.
    """
    tokenizer, stream = _text(job, documents)
    trainer = _Trainer(job, len(tokenizer))
    if (job.folder / CHECKPOINT).is_file():
        trainer.resume()
    facts = trainer.run(stream, progress)
    trainer.model.save_pretrained(job.folder)  # type: ignore[operator]
    tokenizer.save_pretrained(job.folder)
    (job.folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return facts


def _text(job: Job, documents: list[Document] | None) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """Return the tokenizer and the stream of tokens, made at the first run and read again at the next ones."""
    if (job.folder / TOKENS).is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(job.folder)
        return tokenizer, load_file(job.folder / TOKENS)["train"].to(torch.int64)
    parts = {"train": documents or []}
    if documents is None:
        found = texts(job.seed, fraction=DemoConfig().held_out, packages=job.packages)
        parts = dict(zip(("train", "test", "ood"), found, strict=True))
    job.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(parts["train"], job.vocab_size)
    tokenizer.save_pretrained(job.folder)
    streams = {name: encode_documents(tokenizer, found) for name, found in parts.items()}
    save_file({name: stream.to(torch.int32) for name, stream in streams.items()}, job.folder / TOKENS)
    return tokenizer, streams["train"]


class _Trainer:
    """Model, optimizers and how far they are."""

    def __init__(self, job: Job, vocab_size: int) -> None:
        self.job = job
        self.model = new_model(job.family, job.size, vocab_size, seed=job.seed).train()
        self.adamw, self.muon = _alone(self.model, job) if job.optimizer == "adamw" else _beside_muon(self.model, job)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        if job.compiled:
            # its compiled gradient outruns that of the fused kernel
            self.model.set_attn_implementation("eager")  # type: ignore[operator]
            self.model.compile()

    def resume(self) -> None:
        """Go on from the folder's checkpoint. Raises ModelError where it is of another job."""
        state = torch.load(self.job.folder / CHECKPOINT, weights_only=True)
        if json.loads(state["job"]) != json.loads(json.dumps(self.job.fixed())):
            raise ModelError(f"{self.job.folder}: holds another training; give its options, or another folder")
        self.model.load_state_dict(state["model"])
        self.adamw.load_state_dict(state["adamw"])
        for (_, momentum), saved in zip(self.muon.groups, state["muon"], strict=True):
            momentum.copy_(saved)
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "job": json.dumps(self.job.fixed()),
            "model": self.model.state_dict(),
            "adamw": self.adamw.state_dict(),
            "muon": [momentum for _, momentum in self.muon.groups],
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        beside = self.job.folder / f".{CHECKPOINT}"
        torch.save(state, beside)
        beside.replace(self.job.folder / CHECKPOINT)

    def _autocast(self) -> torch.autocast:
        """Return a context in which matrix products are the job's."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.job.products == "bfloat16")

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        done = self.step / self.job.steps if self.job.steps else self.seconds / (60 * self.job.minutes)
        return min(1.0, done)

    def run(self, stream: Tensor, progress: Progress) -> dict[str, Any]:
        """Train until the run is done, with a checkpoint now and then, and return its facts."""
        saved, before = time.monotonic(), self.seconds
        start = time.monotonic()
        with torch.enable_grad():
            while self.share < 1:
                self._step(batch_at(stream, self.step, job=self.job))
                self.seconds = before + time.monotonic() - start
                progress(f"training {self.job.family}", int(1000 * self.share), 1000)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.model.eval()
        facts = {"steps": self.step, "seconds": round(self.seconds, 1), "loss": round(self.loss, 4)}
        return {
            **self.job.fixed(),
            **facts,
            "n_parameters": sum(p.numel() for p in self.model.parameters()),
            "n_tokens": self.step * self.job.batch * self.job.length,
            "n_tokens_of_text": stream.numel(),
            "versions": {name: package_version(name) for name in self.job.packages},
        }

    def _step(self, batch: Tensor) -> None:
        with self._autocast():
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        value = loss.item()
        if not math.isfinite(value):
            raise ModelError(f"training {self.job.family}: loss is {value} at step {self.step}; lower the rates")
        rate = rate_at(self.share, self.job.schedule)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["full_rate"]
        self.adamw.step()
        with self._autocast():  # its polar factor as well
            self.muon.step(rate * self.job.matrix_rate)
        self.loss = value if math.isnan(self.loss) else 0.97 * self.loss + 0.03 * value
        self.step += 1


def _beside_muon(model: nn.Module, job: Job) -> tuple[torch.optim.AdamW, Muon]:
    """Return AdamW for embeddings, head, routers and all vectors, and Muon for the other matrices."""
    ends = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    ends |= {id(p) for name, p in model.named_parameters() if name.startswith("lm_head")}
    routers = {id(p) for name, p in model.named_parameters() if "gate.weight" in name and "proj" not in name}
    inner = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in ends | routers]
    chosen = {id(p) for p in inner}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return _adamw(job.learning_rate, (others, 0.0)), Muon(inner)


def _alone(model: nn.Module, job: Job) -> tuple[torch.optim.AdamW, Muon]:
    """Return AdamW for everything, vectors without decay, and a Muon of nothing."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return _adamw(job.adamw_rate, (matrices, WEIGHT_DECAY), (vectors, 0.0), fused=True), Muon(())


def _adamw(rate: float, *groups: tuple[list[nn.Parameter], float], fused: bool = False) -> torch.optim.AdamW:
    """Return AdamW at this full rate over (parameters, weight decay)."""
    parts = [{"params": parameters, "weight_decay": decay, "full_rate": rate} for parameters, decay in groups]
    return torch.optim.AdamW(parts, lr=rate, betas=(0.9, 0.95), fused=fused)


def rate_at(share: float, schedule: Schedule) -> float:
    """Return the learning rate, relative, when this share of the run is done.

    It rises in a line, stays level, and falls in a line to LAST; or rises in a line and falls in half a cosine to LAST.
    """
    rising = max(share, 1e-3) / WARMUP
    if schedule == "cosine":
        return min(1.0, rising) * (LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * share)))
    return min(1.0, rising, max(LAST, (1 - share) / DECAY))


def batch_at(stream: Tensor, step: int, *, job: Job) -> Tensor:
    """Return the sequences [batch, length + 1] that a step reads. Raises ModelError where the text is too short."""
    last = stream.numel() - job.length - 1
    if last < 0:
        raise ModelError(f"{stream.numel()} tokens of text are fewer than one sequence of {job.length}")
    generator = torch.Generator().manual_seed(job.seed * 1_000_003 + step)
    starts = torch.randint(0, last + 1, (job.batch, 1), generator=generator)
    return stream[starts + torch.arange(job.length + 1)]
