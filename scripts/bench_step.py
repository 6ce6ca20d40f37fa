"""One decode step of a whole model in a CUDA graph, beside its floor in the same run.

    python scripts/make_checkpoint.py --size 20b --out /tmp/gpt-oss-20b
    python scripts/bench_step.py /tmp/gpt-oss-20b

A step is model.forward(Batch): embedding, layers and logits, one token a sequence, each sequence
`--context` tokens long. Keys and values are random. floor: the bytes of the weights that the step's
routing touches and of the keys and values that it sees, at the rate of a plain read.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

from tpx.batch import Batch, KVCache
from tpx.comm import Groups
from tpx.kernels import Device, choose, load, read_wanted
from tpx.models.load import load_model
from tpx.models.proof import prove, shapes
from tpx.moe.layer import MoELayer
from tpx.plan.buffers import PAGE
from tpx.plan.prepare import prepare

GPU = torch.device("cuda")
BAR, REPLAYS, FLUSH = 1.80, 50, 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16], help="sequences")
    parser.add_argument("--kernels", default=True, help="as of use_kernels")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel")
    options = parser.parse_args()
    model, spec, kv_heads = load_here(options.model, options.kernels)
    rate = read_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {rate / 1e12:.2f} TB/s")
    for sequences in options.batch:
        caches = make_caches(spec, kv_heads, sequences, options.context)
        batch = decode_batch(sequences, options.context, spec.vocab_size)
        found = measure(model, batch, caches, options.profile)
        floor = 1000 * step_bytes(model, batch, caches, options.context) / rate
        told = {"sequences": sequences, "ms": found, "floor_ms": floor, "times": found / floor}
        told["tokens_per_second"] = 1000 * sequences / found
        print(json.dumps(told), flush=True)


def load_here(folder: Path, kernels: object):
    prepared = prepare(str(folder), "tp1", 1)
    device = Device("cuda", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    rank_plan = prepared.rank_plan(0)
    loaded = load(choose(read_wanted(kernels), device))
    loaded = prove(loaded, GPU, shapes(rank_plan, torch.bfloat16))
    loaded.chosen.log()
    given = prepared, rank_plan, Groups.alone(GPU), torch.bfloat16, GPU
    model, report = load_model(*given, kernels=loaded.modules)
    print(json.dumps(report._asdict()))
    return model, prepared.spec, rank_plan.cuts["KV"].size


def make_caches(spec, kv_heads: int, sequences: int, context: int) -> list[KVCache]:
    shape = (sequences * -(-context // PAGE), PAGE, kv_heads, spec.head_dim)
    return [
        KVCache(*(torch.randn(shape, device=GPU).bfloat16() for _ in "kv"))
        for _ in spec.layer_types
    ]


def decode_batch(sequences: int, context: int, vocabulary: int) -> Batch:
    """The last token of each; pages in order."""
    pages = -(-context // PAGE)
    tables = torch.arange(sequences * pages, dtype=torch.int32, device=GPU).view(sequences, pages)
    last = context - 1
    slots = tables[:, last // PAGE].long() * PAGE + last % PAGE
    return Batch(
        ids_T=torch.randint(vocabulary, (sequences,), device=GPU),
        positions_T=torch.full((sequences,), last, device=GPU),
        starts_B=torch.arange(sequences + 1, dtype=torch.int32, device=GPU),
        lengths_B=torch.full((sequences,), context, dtype=torch.int32, device=GPU),
        slots_T=(slots, slots),
        tables_BN=(tables, tables),
        logits_at=torch.arange(sequences, device=GPU),
        longest=sequences,
        decode=True,
    )


@torch.inference_mode()
def measure(model: nn.Module, batch: Batch, caches: Sequence[KVCache], profile: bool) -> float:
    """Milliseconds of a step: the median of replays, with another token in each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # for the batch and the caches
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(batch, caches)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(batch, caches)
    graph.replay()
    assert torch.isfinite(logits).all(), "logits are not finite"
    times = []
    for number in range(REPLAYS):
        batch.ids_T.copy_((batch.ids_T * 31 + number) % 1000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    if profile:
        show_profile(graph)
    return median(times)


def show_profile(graph: torch.cuda.CUDAGraph) -> None:
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        graph.replay()
        torch.cuda.synchronize()
    spent, calls = Counter[str](), Counter[str]()
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name[:60]] += event.device_time
            calls[event.name[:60]] += 1
    for name, microseconds in spent.most_common(24):
        print(f"{microseconds:9.1f} us{calls[name]:5d} x  {name}")
    print(f"{sum(spent.values()):9.1f} us{sum(calls.values()):5d} x  in all")


@torch.inference_mode()
def step_bytes(model: nn.Module, batch: Batch, caches: Sequence[KVCache], context: int) -> int:
    """Of the weights and of the cache that the step reads."""
    chosen = []
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]

    def look(layer: MoELayer, args: tuple) -> None:
        h = args[2](args[0])
        logits = nn.functional.linear(h, layer.router.weight, layer.router.bias)
        chosen.append(len(logits.topk(layer.top_k).indices.unique()))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    model(batch, caches)
    for hook in hooks:
        hook.remove()
    total = 0
    for layer, count in zip(layers, chosen, strict=True):
        experts = list(layer.experts.parameters())
        total += sum(p.nbytes * count // p.shape[0] for p in experts)
    of_experts = {p.data_ptr() for layer in layers for p in layer.experts.parameters()}
    table = model.get_parameter("model.embed_tokens.weight")
    for parameter in model.parameters():
        if parameter.data_ptr() not in of_experts and parameter is not table:
            total += parameter.nbytes
    for layer, cache in zip(model.get_submodule("model.layers"), caches, strict=True):
        seen = min(context, layer.self_attn.window or context)
        total += 2 * len(batch.ids_T) * seen * cache.k[0, 0].nbytes
    return total


def read_rate() -> float:
    """Bytes a second of a sum over 2 GiB."""
    data = torch.ones(1 << 29, dtype=torch.float32, device=GPU)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        data.sum()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return data.nbytes / min(times) * 1000


if __name__ == "__main__":
    main()
