"""Proves that a checkpoint's headers hold what config.json promises: names, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import CheckpointError, nearest, or_list
from ..families.layout import Layout, Parameter
from ..index import CheckpointIndex, TensorMeta
from .patterns import generalised, matching
from .values import Box, tiles

OTHER = "config.json and the tensors are of different checkpoints, or of a model tpx does not run"


def check_checkpoint(layout: Layout, index: CheckpointIndex) -> tuple[str, int]:
    """-> (what was proved, on how many tensors). Raises CheckpointError."""
    for clash in layout.contradictions:
        found = matching(clash.pattern, index.tensors)
        if found:
            meta = index.tensors[found[0]]
            raise CheckpointError(
                f"{clash.message}, but `{meta.file}` holds tensor `{meta.name}`",
                clash.hint,
                code="P106",
            )
    wanted = _wanted_shapes(layout)
    for parameter in layout.parameters.values():
        for source in parameter.sources:
            if source.tensor not in index.tensors:
                raise _missing(source.tensor, index)
            meta = index.tensors[source.tensor]
            if meta.dtype not in parameter.dtypes:
                raise CheckpointError(
                    f"tensor `{meta.name}` in `{meta.file}` has dtype `{meta.dtype}`",
                    f"tpx reads it in {or_list(parameter.dtypes)}; convert the checkpoint",
                    code="P103",
                )
            if meta.shape != wanted[meta.name]:
                raise _shape(parameter, meta, wanted[meta.name], layout)
        _check_one_dtype(parameter, index)
    _check_pieces(layout, wanted)
    _check_unused(layout, index, wanted.keys())
    return "every checkpoint tensor is used, in the shape that config.json gives it", len(wanted)


def _wanted_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Of each checkpoint tensor: it ends where the last of the parameters that it fills does."""
    found: dict[str, tuple[int, ...]] = {}
    for parameter in layout.parameters.values():
        for source in parameter.sources:
            ends = tuple(b + n for b, n in zip(source.begin, source.shape, strict=True))
            found[source.tensor] = tuple(map(max, ends, found.get(source.tensor, ends)))
    return found


def _check_pieces(layout: Layout, wanted: dict[str, tuple[int, ...]]) -> None:
    """Each element of a tensor goes to one place, and each place of a parameter is filled once."""
    used: dict[str, list[Box]] = {}
    for parameter in layout.parameters.values():
        filled = []
        for source in parameter.sources if parameter.tied_to is None else ():
            stacked = (1,) * (len(parameter.dims) - len(source.shape))
            filled.append(_box(source.at, stacked + source.shape))
            used.setdefault(source.tensor, []).append(_box(source.begin, source.shape))
        if filled and not tiles(filled, _box((0,) * len(parameter.shape), parameter.shape)):
            raise _pieces(f"the tensors of parameter `{parameter.name}`")
    for name, boxes in used.items():
        if not tiles(boxes, _box((0,) * len(wanted[name]), wanted[name])):
            raise _pieces(f"the parameters of tensor `{name}`")


def _box(begin: tuple[int, ...], shape: tuple[int, ...]) -> Box:
    return tuple((b, b + n) for b, n in zip(begin, shape, strict=True))


def _pieces(what: str) -> CheckpointError:
    hint = "no checkpoint is at fault: the family's layout is"
    return CheckpointError(f"{what} leave a gap or overlap", hint, code="P108")


def _check_one_dtype(parameter: Parameter, index: CheckpointIndex) -> None:
    stored = {index.tensors[source.tensor].dtype: source.tensor for source in parameter.sources}
    if len(stored) > 1:
        (first, one), (second, two) = list(stored.items())[:2]
        raise CheckpointError(
            f"tensors `{one}` and `{two}` have dtypes `{first}` and `{second}`, and belong to one "
            f"parameter, `{parameter.name}`",
            "convert them to one dtype",
            code="P107",
        )


def _missing(name: str, index: CheckpointIndex) -> CheckpointError:
    close = nearest(name, index.tensors)
    hint = f"there is `{close[0]}`: {OTHER}" if close else OTHER
    return CheckpointError(
        f"the checkpoint has no tensor `{name}`, which config.json implies", hint, code="P102"
    )


def _shape(
    parameter: Parameter, meta: TensorMeta, wanted: tuple[int, ...], layout: Layout
) -> CheckpointError:
    """Names the config key of the first wrong dimension, where the tensor is one parameter."""
    keys = []
    if parameter.shape == wanted:
        sizes = (*meta.shape, *[None] * len(wanted))
        for dim, size in zip(parameter.dims, sizes, strict=False):
            key = layout.dims[dim.logical].config_key if dim.logical else dim.key
            if dim.size != size and key:
                keys.append(f"{key} {dim.units}")
    because = f" (from {keys[0]})" if keys else ""
    return CheckpointError(
        f"tensor `{meta.name}` in `{meta.file}` has shape `{list(meta.shape)}`, and config.json "
        f"makes it `{list(wanted)}`{because}",
        OTHER,
        code="P104",
    )


def _check_unused(layout: Layout, index: CheckpointIndex, used: Collection[str]) -> None:
    ignored = {name for pattern in layout.ignored for name in matching(pattern, index.tensors)}
    for name, meta in index.tensors.items():
        if name not in used and name not in ignored:
            alike = sum(generalised(name) == generalised(other) for other in index.tensors)
            more = f" and {alike - 1} more like it" if alike > 1 else ""
            raise CheckpointError(
                f"tensor `{name}` in `{meta.file}`{more} is in the checkpoint, and config.json "
                "implies no such parameter",
                OTHER,
                code="P105",
            )
