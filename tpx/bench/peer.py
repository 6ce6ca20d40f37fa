"""transformers on the same checkpoint, in its fastest form here: which experts, which cache.

Loaded by one process with the threads of all ranks. Its packages are imported here alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .asked import Question

CACHES = ("dynamic", "static")
TRIAL = 8  # tokens after which a form is judged
EAGER = "eager"


class Form(NamedTuple):
    experts: str  # an `experts_implementation`
    cache: str  # a `cache_implementation`

    def __str__(self) -> str:
        return f"{self.experts} experts, {self.cache} cache"


class Peer:
    """Calls answer questions as `contest.Ours` does."""

    name = "transformers"

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, threads: int):
        transformers: Any = import_module("transformers")
        experts: Any = import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.version, self.threads = transformers.__version__, threads
        self.device, self.form = device, Form(EAGER, CACHES[0])
        self.model = load(folder, dtype, device)
        self.experts = [EAGER, *experts.valid_keys()]
        self.refused: dict[str, str] = {}
        self.chosen: dict[int, str] = {}  # the form, by sequences at once

    def choose(self, questions: Sequence[Question]) -> None:
        """Takes the form that answers these fastest, of those that run at all."""
        short, warm = ([q._replace(tokens=n) for q in questions] for n in (TRIAL, 2))
        found: dict[Form, float] = {}
        for form in (Form(e, cache) for e in self.experts for cache in CACHES):
            if str(form._replace(cache=CACHES[0])) in self.refused:
                continue
            self.form = form
            try:
                self(warm)
                found[form] = min(self(short)[1] for _ in range(2))
            except Exception as error:  # whatever it is, this form does not run here
                self.refused[str(form)] = str(error).partition("\n")[0]
        if not found:
            raise RuntimeError(f"transformers runs in no form: {self.refused}")
        self.form = min(found, key=lambda form: found[form])
        self.chosen[len(questions)] = str(self.form)

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> tuple[list[list[int]], float]:
        """(answers, seconds). Shorter prompts are padded on the left; all answers run to the
        longest."""
        longest = max(len(question.prompt) for question in questions)
        most = max(question.tokens for question in questions)
        pads = [longest - len(question.prompt) for question in questions]
        rows = [[0] * pad + q.prompt for pad, q in zip(pads, questions, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}
        if self.form.cache != CACHES[0]:
            settings["cache_implementation"] = self.form.cache
        if self.model.config._experts_implementation != self.form.experts:
            self.model.set_experts_implementation(self.form.experts)
        with self.running():
            begin = time.perf_counter()
            ids = torch.tensor(rows, device=self.device)
            seen = torch.tensor(mask, device=self.device)
            out = self.model.generate(ids, attention_mask=seen, **settings)[:, longest:].tolist()
            seconds = time.perf_counter() - begin
        assert all(len(row) == most for row in out), f"{most=} {[len(row) for row in out]}"
        return [row[: q.tokens] for row, q in zip(out, questions, strict=True)], seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def about(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.version,
            "threads": self.threads,
            "chosen": self.chosen,
            "refused": self.refused,
        }


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Without stop tokens, so that it writes as many tokens as it is asked for. Packed experts are
    unpacked on a CPU, where transformers cannot use them."""
    transformers: Any = import_module("transformers")
    settings: dict[str, Any] = {"dtype": dtype}
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config") and device.type == "cpu":
        settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None
    return model
