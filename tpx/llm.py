"""LLM: a model that generates text, on one process or on all ranks of a job.

Every rank calls it alike, with the same arguments, and gets the same results. Joins plan, loader,
engine and tokenizer; decides nothing that they decide.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType

import torch

from .agree import Said, agree, digest
from .answer import Answer, make_request, stop_ids
from .arguments import (
    Arguments,
    EngineArguments,
    check_text,
    prepare_arguments,
    prepare_kernels,
    refuse_unknown,
)
from .batches import run_batch
from .engine.cache import CacheShape, check_room
from .engine.request import Request as EngineRequest
from .engine.start import start_engine
from .errors import RequestError
from .feed import Asked
from .hub import AUTO
from .launch.fetch_bar import fetch_bar
from .mesh import Mesh
from .models.load import load_model
from .models.proof import agreed, compile_trials, prove, shapes
from .params import Request, SamplingParams
from .plan.buffers import STEP_TOKENS
from .plan.fetch import fetched
from .plan.forms import stored_nbytes
from .prompts import Model, Prompt, check_params, check_prompts, check_request
from .reports import share_report
from .results import Completion, Result
from .session import Session
from .text import open_tokenizer
from .worker import Worker, describe_device, ranks_here

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model, loaded: this rank's shards of it, and the groups to the other ranks.

    path_or_hub_id: a folder or a Hub id; None takes TPX_MODEL. tp_plan: "auto", a path, a shipped
    plan's name or a dict in Hugging Face's form; None takes TPX_TP_PLAN, else "auto". dtype: what
    is computed in, "auto" for the checkpoint's. device: "cpu" or "cuda"; None takes a GPU where
    there is one. revision: of a Hub id. download: of a Hub id, "full" fetches its files whole,
    "partial" what the ranks of this machine read of them, "auto" the cheaper. use_kernels: True,
    False, "local", "hub", "off", or an operation's name -> one of these or a Hub kernel
    `owner/name@1` (see tpx.kernels.read_wanted); None takes TPX_KERNELS, else True: what ships with
    tpx where triton can run it. context: tokens that a sequence can have; None takes the plan's
    limit, else the model's positions. batch: sequences that are computed at once, over all dp
    groups; None takes the plan's limit, else 256 a group. memory_fraction: of a GPU's memory, for
    weights, cache and a step together (0.9); of what a CPU has available, for the caches of its
    ranks (0.25). prefix_cache: whether prompts that begin alike share what is computed. graphs:
    whether steps of one token each run as CUDA graphs, on GPUs. Raises PlanError, CheckpointError,
    LaunchError and RequestError, on all ranks alike.
    """

    def __init__(
        self,
        path_or_hub_id: str | os.PathLike[str] | None = None,
        tp_plan: str | os.PathLike[str] | Mapping[str, str] | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        revision: str | None = None,
        download: str | None = None,
        use_kernels: bool | str | Mapping[str, object] | None = None,
        context: int | None = None,
        batch: int | None = None,
        memory_fraction: float | None = None,
        prefix_cache: bool = True,
        graphs: bool = True,
        **unknown: object,
    ):
        refuse_unknown(unknown)
        check_text("device", device)
        self.worker = Worker(device)
        self.device = self.worker.device
        world = self.worker.place.world
        everyone = self.worker.groups(Mesh(tp=world, edp=world))["world"]
        sizes = EngineArguments(context, batch, memory_fraction, prefix_cache, graphs)
        given = Arguments(path_or_hub_id, tp_plan, dtype, revision, download, sizes)
        self.prepared, dtype_name, wanted = agree(everyone, lambda: prepare_arguments(given, world))
        self.dtype: torch.dtype = getattr(torch, dtype_name)
        kind = describe_device(self.device)
        self.kernels = agree(everyone, lambda: prepare_kernels(use_kernels, kind))
        if self.worker.place.rank == 0:
            self.kernels.chosen.log()
        self.spec = self.prepared.spec
        self.groups = self.worker.groups(self.prepared.plan.mesh)
        self.tokenizer = open_tokenizer(self.prepared.folder)
        self._stop_ids = stop_ids(self.prepared)
        rank_plan = self.prepared.rank_plan(self.worker.place.rank)
        self._cache = CacheShape(self.spec, rank_plan.cuts["KV"].size, self.dtype)
        self.context = wanted.context
        asked = shapes(rank_plan, self.dtype)
        compile_trials(self.kernels, self.device, asked, self.groups["node"])
        self.kernels = agreed(prove(self.kernels, self.device, asked), everyone)
        writer, kept = self.worker.progress(), stored_nbytes(rank_plan)
        here, told = ranks_here(self.worker.place), self.worker.place.world > 1
        with (
            fetch_bar(line=told) as bar,
            fetched(self.prepared, here, download or AUTO, bar.report) as self.prepared,
        ):
            placed = self.groups, self.dtype, self.device
            self.model, load = load_model(
                self.prepared,
                rank_plan,
                *placed,
                lambda done, total: writer.update("load", done, total, kept),
                kernels=self.kernels.modules,
            )
        if not load.bytes_read:  # else the last byte has said it
            writer.update("load", 0, 0, kept)
        writer.close()
        self.report = share_report(
            self.groups["world"], self.prepared, str(self.device), load, self.kernels.chosen.choices
        )
        where = self.groups, self.device, self.kernels.modules, rank_plan.dispatch.decode
        self.session = Session(start_engine(self.model, self._cache, wanted, *where), self.groups)
        self._borrower: object = None

    def generate(self, prompts: Sequence[Prompt], params: Params = None) -> list[Completion]:
        """Continues each prompt (text, or token ids), in the order given; params: one for all, or a
        list with one for each. Of a prompt with n > 1 the continuations follow each other. With
        dp > 1 the dp groups share the prompts out."""
        return self._finish(self._answers(prompts, params))

    def generate_batch(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Continues requests out of an iterable, and yields their results as they finish, the same
        on every rank. The first rank's iterable is taken from as room comes, and so may be long;
        what it waits for the engine waits for too (see AsyncEngine)."""
        self._check_free()
        asked = (self.check(one, number) for number, one in enumerate(requests))
        return run_batch(self.session, self.groups.host("world"), asked, self.answers_to)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[str, None, Completion]:
        """The pieces of generate([prompt])[0].text as they are written, whole characters only. All
        ranks get the same pieces, and must take the same number of them. The generator's own value
        (`completion = yield from llm.stream(...)`) is what generate would give."""
        if params is not None and params.n > 1:
            raise RequestError("`stream` writes one text, and `n` is more", "use `generate`")
        [answer] = self._answers([prompt], params)
        return self._pieces(answer)

    def logits(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """For each prompt float32 [tokens, vocab] on the CPU: what the model says comes after each
        token. The same on every rank."""
        given = agree(self.groups["world"], lambda: self._checked(prompts, None))
        requests = [EngineRequest(t, len(t), all_logits=True) for t, _ in given]
        answers = [Answer(request, (), None) for request in requests]
        self._finish(answers)
        return [self._shared(answer) for answer in answers]

    def lend(self, borrower: object) -> Session:
        """The session, for a caller that alone steps it until `take_back`. Raises RequestError."""
        self._check_free()
        self._borrower = borrower
        return self.session

    def take_back(self, borrower: object) -> None:
        if self._borrower is borrower:
            self._borrower = None

    def close(self) -> None:
        """Lets go of the model, and ends the groups made for it. All ranks call it."""
        if hasattr(self, "model"):
            self.session.engine.runner.release()
            del self.model, self.session
            self.groups.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        if error is None:  # else other ranks may be gone, and closing would wait for them
            self.close()

    def check(self, request: Request, number: int) -> Asked:
        """A request as `answers_to` takes it. number: its name, where it has none. Raises
        RequestError."""
        name, prompt, params = check_request(request, number, self._model())
        self._check_room(prompt, params, f"request `{name}`")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return Asked(name, prompt, params, seed)

    def answers_to(self, asked: Asked) -> list[Answer]:
        """A request's continuations."""
        _, prompt, params, seed = asked
        return [
            Answer(
                make_request(prompt, params, seed + i, self.context, self._stop_ids),
                params.stop,
                self.tokenizer,
                i,
            )
            for i in range(params.n)
        ]

    def _answers(self, prompts: Sequence[Prompt], params: Params) -> list[Answer]:
        """Those to prompts that every rank was given alike."""
        given = agree(self.groups["world"], lambda: self._checked(prompts, params))
        fresh = self._fresh_seed() if any(p.seed is None for _, p in given) else 0
        answers: list[Answer] = []
        for tokens, p in given:
            seed = fresh + len(answers) if p.seed is None else p.seed
            answers += self.answers_to(Asked("", tokens, p, seed))
        return answers

    def _check_free(self) -> None:
        if not hasattr(self, "model"):
            raise RequestError("the LLM is closed", "make a new one: `tpx.LLM(...)`")
        if self._borrower is not None:
            raise RequestError(
                "an AsyncEngine has the LLM", "ask it, or close it first: `await engine.close()`"
            )

    def _model(self) -> Model:
        spec = self.spec
        sizes = spec.vocab_size, self.context, spec.max_position_embeddings
        return Model(self.prepared.folder, self.tokenizer, *sizes)

    def _checked(
        self, prompts: Sequence[Prompt], params: Params
    ) -> tuple[list[tuple[tuple[int, ...], SamplingParams]], dict[str, Said]]:
        self._check_free()
        tokens = check_prompts(prompts, self._model())
        listed = check_params(params, len(tokens), self._model())
        for number, (one, p) in enumerate(zip(tokens, listed, strict=True)):
            self._check_room(one, p, f"prompt `{number}`")
        said = {"prompts": Said(digest(tokens))}
        said["sampling parameters"] = Said(digest([asdict(p) for p in listed]))
        return list(zip(tokens, listed, strict=True)), said

    def _check_room(self, prompt: tuple[int, ...], params: SamplingParams, name: str) -> None:
        request = make_request(prompt, params, 0, self.context, frozenset())
        check_room(request, name, self.session.engine.blocks, self._cache)

    def _fresh_seed(self) -> int:
        """A seed that no one has chosen; rank 0's."""
        mine = torch.tensor(secrets.randbits(63))
        return int(self.groups.host("world").broadcast(mine, 0, "engine.seed"))

    def _finish(self, answers: Sequence[Answer]) -> list[Completion]:
        """Puts them into the session and steps it until all are done."""
        try:
            self.session.put(answers)
            for answer in answers:
                while answer.done is None:
                    self.session.step()
        finally:
            self.session.cancel(answers)
        return [answer.done for answer in answers if answer.done is not None]

    def _pieces(self, answer: Answer) -> Generator[str, None, Completion]:
        try:
            self.session.put([answer], streamed=True)
            while answer.done is None or answer.said:
                text = "".join(text for text, _ in answer.take_said())
                if text:
                    yield text
                elif answer.done is None:
                    self.session.step()
            return answer.done
        finally:
            self.session.cancel([answer])

    def _shared(self, answer: Answer) -> torch.Tensor:
        """A request's logits, from the dp group that has them."""
        dp, request = self.groups["dp"], answer.request
        if dp.size == 1:
            assert answer.logits is not None
            return answer.logits
        nothing = torch.zeros(len(request.prompt), self.spec.vocab_size)
        found = nothing if answer.logits is None else answer.logits
        owner = request.id % dp.size
        told = (
            dp.broadcast(part.to(self.device), owner, "engine.results")
            for part in torch.split(found, STEP_TOKENS)
        )
        return torch.cat([part.cpu() for part in told])
