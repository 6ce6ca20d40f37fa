"""LLM: a model that generates text, on one process or on all ranks of a job.

Every rank calls it alike, with the same arguments, and gets the same results. Joins plan, loader,
engine and tokenizer; decides nothing that they decide.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType

import torch

from .agree import Said, agree, digest
from .answer import Answer, stop_ids
from .arguments import Arguments, check_text, prepare_arguments, prepare_kernels, refuse_unknown
from .engine.blocks import Blocks
from .engine.cache import (
    CacheShape,
    Pages,
    cache_limit,
    check_room,
    make_caches,
    plan_pages,
    step_tokens,
)
from .engine.engine import Engine, Step
from .engine.request import Request
from .engine.runner import Runner, captures
from .errors import RequestError
from .hub import AUTO
from .kernels import Choice
from .launch.fetch_bar import fetch_bar
from .mesh import Mesh
from .models.load import LoadReport, load_model
from .models.proof import prove, shapes
from .params import SamplingParams
from .plan.buffers import STEP_TOKENS
from .plan.fetch import fetched
from .plan.forms import stored_nbytes
from .prompts import Model, Prompt, check_params, check_prompts
from .results import Completion, RankReport, Report
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
    tpx where triton can run it. Raises PlanError, CheckpointError, LaunchError and RequestError, on
    all ranks alike.
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
        **unknown: object,
    ):
        refuse_unknown(unknown)
        check_text("device", device)
        self.worker = Worker(device)
        self.device = self.worker.device
        world = self.worker.place.world
        everyone = self.worker.groups(Mesh(tp=world, edp=world))["world"]
        given = Arguments(path_or_hub_id, tp_plan, dtype, revision, download)
        self.prepared, dtype_name = agree(everyone, lambda: prepare_arguments(given, world))
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
        self.kernels = prove(self.kernels, self.device, shapes(rank_plan, self.dtype))
        writer, kept = self.worker.progress(), stored_nbytes(rank_plan)
        here, told = ranks_here(self.worker.place), self.worker.place.world > 1
        with (
            fetch_bar(line=told) as bar,
            fetched(self.prepared, here, download or AUTO, bar.report) as self.prepared,
        ):
            self.model, load = load_model(
                self.prepared,
                rank_plan,
                self.groups,
                self.dtype,
                self.device,
                lambda done, total: writer.update("load", done, total, kept),
                kernels=self.kernels.modules,
            )
        if not load.bytes_read:  # else the last byte has said it
            writer.update("load", 0, 0, kept)
        writer.close()
        self.report, self._cache_limit = self._share(load)
        self._static = captures(self.device, self.spec, self.groups, self.kernels.modules)
        self._idle: Runner | None = None

    def generate(self, prompts: Sequence[Prompt], params: Params = None) -> list[Completion]:
        """Continues each prompt (text, or token ids), in the order given; params: one for all, or a
        list with one for each. With dp > 1 the dp groups share the prompts out."""
        answers = self._answers(prompts, params)
        engine = self._engine(answers)
        for step in self._steps(engine):
            self._hear(engine, answers, step)
        return self._results(answers)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[str, None, Completion]:
        """The pieces of generate([prompt])[0].text as they are written, whole characters only. All
        ranks get the same pieces, and must take the same number of them. The generator's own value
        (`completion = yield from llm.stream(...)`) is what generate would give."""
        [answer] = self._answers([prompt], params)
        return self._pieces(answer, self._engine([answer]))

    def logits(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """For each prompt float32 [tokens, vocab] on the CPU: what the model says comes after each
        token. The same on every rank."""
        given = agree(self.groups["world"], lambda: self._checked(prompts, None))
        requests = [
            Request(number, tokens, len(tokens), all_logits=True)
            for number, (tokens, _) in enumerate(given)
        ]
        engine = self._engine([Answer(request, SamplingParams(), None) for request in requests])
        parts: list[list[torch.Tensor]] = [[] for _ in requests]
        for step in self._steps(engine):
            for request, part in step.logits:
                parts[request.id].append(part.cpu())
        return [self._shared(request, parts[request.id]) for request in requests]

    def close(self) -> None:
        """Lets go of the model, and ends the groups made for it. All ranks call it."""
        if hasattr(self, "model"):
            del self.model
            self._idle = None
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

    def _answers(self, prompts: Sequence[Prompt], params: Params) -> list[Answer]:
        """A request for each prompt, on all ranks alike."""
        given = agree(self.groups["world"], lambda: self._checked(prompts, params))
        fresh = self._fresh_seed() if any(p.seed is None for _, p in given) else 0
        return [
            Answer(self._request(number, tokens, p, fresh + number), p, self.tokenizer)
            for number, (tokens, p) in enumerate(given)
        ]

    def _checked(
        self, prompts: Sequence[Prompt], params: Params
    ) -> tuple[list[tuple[tuple[int, ...], SamplingParams]], dict[str, Said]]:
        if not hasattr(self, "model"):
            raise RequestError("the LLM is closed", "make a new one: `tpx.LLM(...)`")
        positions = self.spec.max_position_embeddings
        model = Model(self.prepared.folder, self.tokenizer, self.spec.vocab_size, positions)
        tokens = check_prompts(prompts, model)
        listed = check_params(params, len(tokens), model)
        for number, (one, p) in enumerate(zip(tokens, listed, strict=True)):
            request = self._request(number, one, p, 0)
            check_room(request, self._cache, step_tokens(tokens), self._cache_limit)
        said = {"prompts": Said(digest(tokens))}
        said["sampling parameters"] = Said(digest([asdict(p) for p in listed]))
        return list(zip(tokens, listed, strict=True)), said

    def _request(
        self, number: int, tokens: tuple[int, ...], params: SamplingParams, fresh: int
    ) -> Request:
        return Request(
            id=number,
            prompt=tokens,
            limit=min(len(tokens) + params.max_tokens, self.spec.max_position_embeddings),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=params.seed if params.seed is not None else fresh % 2**64,
            stop_ids=frozenset() if params.ignore_eos else self._stop_ids,
        )

    def _fresh_seed(self) -> int:
        """A seed that no one has chosen; rank 0's."""
        mine = torch.tensor(secrets.randbits(63), device=self.device)
        return int(self.groups["world"].broadcast(mine, 0, "engine.seed"))

    def _is_mine(self, request: Request) -> bool:
        dp = self.groups["dp"]
        return request.id % dp.size == dp.rank

    def _engine(self, answers: Sequence[Answer], most: int = STEP_TOKENS) -> Engine:
        """An engine with this dp group's requests, and a cache as large as they need. most: tokens
        in one step."""
        requests = [answer.request for answer in answers if self._is_mine(answer.request)]
        in_one_step = step_tokens([request.prompt for request in requests], most)
        pages = plan_pages(requests, self._cache, in_one_step, self._cache_limit)
        blocks = Blocks(*pages, self.spec.sliding_window, in_one_step)
        engine = Engine(self._runner(pages), blocks, self.groups)
        for request in requests:
            engine.add(request)
        return engine

    def _runner(self, pages: Pages) -> Runner:
        """A runner with at least these pages: the one that the last engine has given back, where
        it has as many, so that what it has captured still holds."""
        runner, self._idle = self._idle, None
        if runner is None or not pages.fit(runner.pages):
            runner = None  # its cache makes room for the next one
            caches = make_caches(pages, self._cache, self.device)
            kernels = self.kernels.modules
            runner = Runner(self.model, caches, pages, self.device, self._static, kernels)
        return runner

    def _steps(self, engine: Engine) -> Iterator[Step]:
        """All that are left."""
        while (step := engine.step()) is not None:
            yield step
        self._idle = engine.runner

    def _hear(self, engine: Engine, answers: Sequence[Answer], step: Step) -> list[str]:
        """Turns a step's tokens into text, and ends what a stop string ends; -> the pieces."""
        pieces = []
        for request, token in step.drawn:
            piece, stopped = answers[request.id].hear(token)
            if stopped:
                engine.end(request)
            pieces.append(piece)
        return pieces

    def _pieces(self, answer: Answer, engine: Engine) -> Generator[str, None, Completion]:
        for step in self._steps(engine):
            piece = "".join(self._hear(engine, [answer], step)).encode()
            piece = self.groups["dp"].gather_bytes(piece, "engine.results")[0]
            if piece:
                yield piece.decode()
        return self._results([answer])[0]

    def _results(self, answers: Sequence[Answer]) -> list[Completion]:
        """What every dp group has, in the order of the prompts."""
        done = [[a.request.id, *a.completion()] for a in answers if self._is_mine(a.request)]
        told = self.groups["dp"].gather_bytes(json.dumps(done).encode(), "engine.results")
        found = sorted(result for part in told for result in json.loads(part))
        return [Completion(*result) for _, *result in found]

    def _shared(self, request: Request, parts: list[torch.Tensor]) -> torch.Tensor:
        """A request's logits, from the dp group that has them, in the chunks they came in."""
        dp = self.groups["dp"]
        if dp.size == 1:
            return torch.cat(parts)
        found = torch.zeros(len(request.prompt), self.spec.vocab_size)
        if self._is_mine(request):
            torch.cat(parts, out=found)
        rows = torch.split(found, STEP_TOKENS)
        owner = request.id % dp.size
        told = (dp.broadcast(part.to(self.device), owner, "engine.results") for part in rows)
        return torch.cat([part.cpu() for part in told])

    def _share(self, load: LoadReport) -> tuple[Report, int]:
        """The loads of all ranks, and the smallest cache that any of them has room for."""
        limit = cache_limit(self.device, self.worker.place.local_world)
        mine = [str(self.device), load._asdict(), limit, self.kernels.chosen.choices]
        told = self.groups["world"].gather_bytes(json.dumps(mine).encode(), "engine.report")
        said = [json.loads(one) for one in told]
        mesh = self.prepared.plan.mesh
        ranks = [
            RankReport(rank, mesh.coords(rank), on, **loaded)
            for rank, (on, loaded, *_) in enumerate(said)
        ]
        plan, notes = self.prepared.plan.path, self.prepared.report
        kernels = tuple(Choice(*choice) for choice in said[0][3])
        return Report(mesh, plan, notes, tuple(ranks), kernels), min(one[2] for one in said)
