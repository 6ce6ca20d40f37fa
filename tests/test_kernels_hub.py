"""Kernels of the Hub: built variants, through LOCAL_KERNELS, a lock file and the Hub's cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from build_kernels import build, repositories, source_files
from hub_kernels import COMMIT, fill_cache, repository, write_lock
from huggingface_hub import constants

from tpx.errors import RequestError
from tpx.kernels import Device, Kernels, choose, hub, load, local, read_wanted
from tpx.kernels.operations import MOE, OPERATIONS, PACKAGES

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="the miniature is built for the CPU"
)
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The Hub's client with an empty cache and no network; -> the cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def chosen(words: str) -> Kernels:
    return choose(read_wanted(f"default=off,{words}"), H100)


def loaded(words: str) -> tuple[list[str], object]:
    """source, repo, version and path of `route`, and its module."""
    found = load(chosen(words))
    [route] = [choice for choice in found.chosen.choices if choice.operation == "route"]
    return list(route[1:5]), found.modules["route"]


def fails(words: str) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        load(chosen(words))
    return caught.value.message, caught.value.hint


def check_runs(module, folder: Path) -> None:
    assert Path(module.__file__).parent == folder
    assert module.route(torch.tensor(1)).item() == 2


def test_local_kernels_stands_in_for_the_hub(offline, monkeypatch, tmp_path):
    variant = build(repository(tmp_path))
    monkeypatch.setenv("LOCAL_KERNELS", f"{MOE.repo}={variant}")
    said, module = loaded("route=hub")
    assert said == ["hub", MOE.repo, "1", str(variant)]
    check_runs(module, variant)


def test_a_lock_file_names_the_commit(offline, tmp_path):
    variant = fill_cache(offline, repository(tmp_path), "some/route")
    lock = write_lock(tmp_path / "kernels.lock", "some/route")
    words = f"route=some/route,lockfile={lock},trust_remote_code"
    said, module = loaded(words)
    assert said == ["hub", "some/route", "1", str(variant)]
    check_runs(module, variant)
    message, _ = fails(words.replace("some/route,", "other/route,"))
    assert message == (
        "kernel `other/route` of the Hub cannot be used: Kernel `other/route` is not locked. "
        "Please lock it with `kernels lock <project>` and then reinstall the project"
    )


@pytest.mark.parametrize("version", ["1", COMMIT])
def test_a_version_or_a_commit_out_of_the_cache(offline, tmp_path, version):
    variant = fill_cache(offline, repository(tmp_path), "some/route")
    said, module = loaded(f"route=some/route@{version},trust_remote_code")
    assert said == ["hub", "some/route", "1", str(variant)]
    check_runs(module, variant)


def test_what_was_fetched_before_stands_in_for_a_missing_package(offline, monkeypatch, tmp_path):
    variant = fill_cache(offline, repository(tmp_path), MOE.repo)
    monkeypatch.setattr("tpx.kernels.choice.find_local", lambda package: None)
    [route] = [c for c in chosen("route=true").choices if c.operation == "route"]
    assert route[1:] == ("hub", MOE.repo, "1", str(variant), "tpx_moe is not here")
    said, module = loaded("route=true")
    assert said == ["hub", MOE.repo, "1", str(variant)]
    check_runs(module, variant)


def test_a_kernel_that_is_not_in_the_cache(offline):
    assert hub.find_cached(MOE.repo, "1") is None
    message, hint = fails("route=hub")
    assert message == (
        f"kernel `{MOE.repo}` of the Hub cannot be used: Version 1 of '{MOE.repo}' is not "
        "available in the local cache and Hugging Face Hub is in offline mode. Download the kernel "
        "while online first, or pass an explicit `revision=<commit>`"
    )
    assert hint == "`use_kernels` names another, or leave it out"


def test_two_builds_and_their_source_live_in_one_process(offline, monkeypatch, tmp_path):
    source = repository(tmp_path)
    first = build(source, out=tmp_path / "first")
    package = source / "torch-ext" / "tpx_moe"
    (package / "configs" / "default.json").write_text('{"x": 1}\n')
    second = build(source, out=tmp_path / "second")
    for number, folder in enumerate((first, second)):
        monkeypatch.setenv("LOCAL_KERNELS", f"some/route{number}={folder}")
        check_runs(loaded(f"route=some/route{number},trust_remote_code")[1], folder)


@pytest.mark.parametrize("source", repositories(), ids=lambda path: path.name)
@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_a_build_equals_its_source(tmp_path, source, backend):
    variant = build(source, backend, tmp_path)
    assert variant == tmp_path / f"torch-{backend}"
    [package] = [p for p in PACKAGES if p.folder == source.name]
    folder = source / "torch-ext" / package.name
    names = source_files(folder)
    held = {path.relative_to(variant) for path in variant.rglob("*.*")}
    assert held == {*names, Path("metadata.json")}
    metadata = json.loads((variant / "metadata.json").read_text())
    unique = metadata["id"]
    assert (metadata["name"], str(metadata["version"])) == (source.name, package.version)
    assert metadata["backend"] == {"type": backend}
    assert local.local_version(folder) == package.version
    for name in names:
        text = (folder / name).read_text()
        if name == Path("_ops.py"):
            text = text.replace(f'"{package.name}"', f'"{unique}"')
        assert (variant / name).read_text() == text


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_our_repositories_are_published_under_the_names_that_tpx_asks_for(package):
    text = (local.KERNELS / package.folder / "build.toml").read_text()
    assert f'repo-id = "{package.repo}"' in text


@pytest.mark.more
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_our_own_builds_offer_every_operation(offline, monkeypatch, tmp_path, package):
    variant = build(local.KERNELS / package.folder, out=tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", f"{package.repo}={variant}")
    names = [name for name, operation in OPERATIONS.items() if operation.package == package]
    found = load(chosen(",".join(f"{name}=hub" for name in names)))
    assert {Path(module.__file__).parent for module in found.modules.values()} == {variant}
