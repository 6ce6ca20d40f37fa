"""Which kernels run: the words that ask for them, what a machine has, and the modules."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from types import ModuleType

import pytest
from guards import ROOT
from launching import write_script
from tiny import tiny_checkpoint

import tpx
from tpx.arguments import prepare_kernels
from tpx.cli.flags import parse
from tpx.errors import RequestError
from tpx.kernels import (
    Device,
    choice,
    choose,
    describe,
    hub,
    installed,
    load,
    local,
    read_wanted,
)
from tpx.kernels.loaded import check_functions
from tpx.kernels.operations import ATTENTION, MOE, OPERATIONS, PACKAGES
from tpx.launch.options import Options
from tpx.launch.preflight import preflight

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
FOLDERS = {p: ROOT / "kernels" / p.folder / "torch-ext" / p.name for p in PACKAGES}
LOST = "the reference operations run, which are slow on a GPU"
HINT = 'give True, False, "local", "hub", "off", or `{"attention": "owner/name@1"}`'


def sources(value: object) -> set[str]:
    return set(read_wanted(value).sources.values())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "true"), (True, "true"), ("true", "true"), (False, "off"), ("false", "off"),
        ("off", "off"), ("local", "local"), ("hub", "hub"), ({"default": "hub"}, "hub"),
        ({"default": False}, "off"), ({}, "true"),
    ],
)  # fmt: skip
def test_one_word_is_for_all_operations(value, expected):
    assert sources(value) == {expected}


def test_text_and_dict_say_the_same(tmp_path):
    lock = tmp_path / "kernels.lock"
    lock.write_text("[]")
    text = f"hub, attention=some/flash,lockfile={lock},norm=false,trust_remote_code"
    found = read_wanted(text)
    assert found == read_wanted(
        {"default": "hub", "attention": "some/flash@1", "lockfile": lock, "norm": False,
         "trust_remote_code": True}
    )  # fmt: skip
    assert found.sources == {
        "attention": "some/flash@1", "linear": "hub", "sample": "hub", "route": "hub",
        "experts": "hub", "norm": "off",
    }  # fmt: skip
    assert (found.lockfile, found.trusts) == (str(lock), True)


def test_our_own_repositories_need_no_trust():
    assert read_wanted(f"experts={MOE.repo}@1").sources["experts"] == f"{MOE.repo}@1"


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        ("loacl", "`use_kernels` is `loacl`", HINT),
        ("", "`use_kernels` is ``", HINT),
        (3, "`use_kernels` is `3`", HINT),
        ("local,hub", "`use_kernels` is `local,hub`, which says `default` twice", HINT),
        ("atention=off", "`use_kernels` knows no `atention`", "did you mean `attention`?"),
        ({"xyz": "off"}, "`use_kernels` knows no `xyz`",
         "use `default`, `attention`, `linear`, `sample`, `route`, `experts`, `norm`, `lockfile` "
         "or `trust_remote_code`"),
        ("experts=fast", "`experts` is `fast`",
         "use `local`, `hub`, `off`, or a kernel of the Hub: `experts=owner/name@1`"),
        ({"experts": 3}, "`experts` is `3`",
         "use `local`, `hub`, `off`, or a kernel of the Hub: `experts=owner/name@1`"),
        ("experts=../x", "`experts` is `../x`",
         "use `local`, `hub`, `off`, or a kernel of the Hub: `experts=owner/name@1`"),
        ("attention=kernels-community/vllm-flash-attn3",
         "`attention=kernels-community/vllm-flash-attn3@1` would run code that "
         "`kernels-community` publishes",
         "add `trust_remote_code` if you trust it: "
         '`"attention=kernels-community/vllm-flash-attn3@1,trust_remote_code"`'),
        ("hub,lockfile=none.lock", "lock file `none.lock` does not exist",
         "`kernels lock` writes one: `kernels.lock`"),
        ({"trust_remote_code": "yes"}, "`trust_remote_code` is `yes`",
         "give True, or leave it out"),
    ],
)  # fmt: skip
def test_wrong_words_say_what_to_type(value, message, hint):
    with pytest.raises(RequestError) as caught:
        read_wanted(value)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_by_default_the_packages_of_this_tree_run_on_a_gpu():
    kernels = choose(read_wanted(None), H100)
    assert [made.operation for made in kernels.choices] == list(OPERATIONS)
    for made in kernels.choices:
        package = OPERATIONS[made.operation].package
        where = (package.name, package.version, str(FOLDERS[package]))
        assert made[1:] == ("local", *where, "the default")
    assert kernels.lost() == []
    assert describe(kernels.choices) == [
        f"kernels for {names}: local, {p.name} 1 in {FOLDERS[p]}, the default"
        for names, p in (("attention, linear, sample", ATTENTION), ("route, experts, norm", MOE))
    ]


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Device("cpu"), "they need a GPU"),
        (Device("cuda", "AMD Instinct MI300X"), "AMD Instinct MI300X is no NVIDIA GPU"),
        (Device("cuda", "Tesla V100", (7, 0)), "Tesla V100 has capability 7.0, and they need 7.5"),
    ],
)
@pytest.mark.parametrize("asked", [True, "local", "hub", "attention=a/b,trust_remote_code"])
def test_where_triton_cannot_run_the_references_do(device, reason, asked):
    kernels = choose(read_wanted(asked), device)
    assert describe(kernels.choices) == [f"kernels: off, {reason}; {LOST}"]
    assert kernels.lost() == list(OPERATIONS)
    by_name = ["attention"] if str(asked).startswith("attention") else list(OPERATIONS)
    assert kernels.missing() == ([] if asked is True else by_name)


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed (`pip install 'tpx[gpu]'`)"),
        ("3.2.1", "triton 3.2.1 is older than 3.6 (`pip install 'tpx[gpu]'`)"),
    ],
)
def test_without_triton_the_references_run(monkeypatch, version, reason):
    monkeypatch.setattr(installed, "installed", lambda name: version)
    assert describe(choose(read_wanted(True), H100).choices) == [f"kernels: off, {reason}; {LOST}"]


def test_off_is_nothing_lost():
    kernels = choose(read_wanted("off"), H100)
    assert describe(kernels.choices) == [f"kernels: off, as asked; {LOST}"]
    assert (kernels.lost(), kernels.missing()) == ([], [])


def test_a_folder_called_kernels_is_not_the_library(monkeypatch, tmp_path):
    """From the repository's root `import kernels` succeeds without the library."""
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert PathFinder.find_spec("kernels") is not None
    assert installed.installed("kernels") is None
    assert hub.find_cached(MOE.repo, MOE.version) is None
    with pytest.raises(RequestError) as caught:
        hub.check_library("experts", MOE.repo)
    assert caught.value.message == (
        "`experts` asks for `tpx/tpx-moe` of the Hub, and kernels is not installed"
    )
    assert caught.value.hint == "`pip install 'kernels>=0.17'`, or leave `use_kernels` out"


@pytest.fixture
def without_packages(monkeypatch):
    monkeypatch.setattr(local, "KERNELS", ROOT / "nowhere")
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)


def test_a_source_tree_has_them_in_a_folder(monkeypatch):
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)
    assert {package: local.find_local(package) for package in PACKAGES} == FOLDERS


def test_a_package_that_is_not_here(without_packages):
    with pytest.raises(RequestError) as caught:
        choose(read_wanted("local"), H100)
    assert caught.value.message == (
        "`attention` asks for the local kernels, and `tpx_attention` is not here"
    )
    assert caught.value.hint == "install tpx as a whole, or leave `use_kernels` out"


def test_without_packages_and_cache_the_references_run(without_packages, monkeypatch, caplog):
    monkeypatch.setattr(choice, "find_cached", lambda repo, version: None)
    kernels = choose(read_wanted(None), H100)
    with caplog.at_level(logging.INFO, "tpx"):
        kernels.log()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"kernels for {names}: off, {name} is not here, nor in the cache; {lost}")
        for names, name, lost in (
            ("attention, linear, sample", "tpx_attention", LOST),
            ("route, experts, norm", "tpx_moe", LOST),
        )
    ]  # fmt: skip


def test_every_operation_finds_its_functions_in_our_packages():
    loaded = load(choose(read_wanted(None), H100))
    assert {operation: module.__name__ for operation, module in loaded.modules.items()} == {
        operation: OPERATIONS[operation].package.name for operation in OPERATIONS
    }
    assert load(choose(read_wanted("experts=local,default=off"), H100)).modules.keys() == {
        "experts"
    }


def test_a_folder_is_imported_once_under_its_own_name(tmp_path, monkeypatch):
    folder = tmp_path / "tpx_fake"
    folder.mkdir()
    (folder / "__init__.py").write_text('from .part import X\n\n__version__ = "7"\n')
    (folder / "part.py").write_text("X = object()\n")
    package = MOE._replace(name="tpx_fake")
    assert local.local_version(folder) == "7"
    module = local.import_local(package, folder)
    try:
        assert sys.modules["tpx_fake"] is module
        assert local.import_local(package, folder) is module
        assert local.find_local(package) == folder
    finally:
        for name in ("tpx_fake", "tpx_fake.part"):
            sys.modules.pop(name, None)
    (folder / "part.py").write_text("raise OSError\n")
    with pytest.raises(OSError):
        local.import_local(package, folder)
    assert "tpx_fake" not in sys.modules


def test_a_kernel_that_lacks_a_function():
    [mine] = [c for c in choose(read_wanted(None), H100).choices if c.operation == "route"]
    with pytest.raises(RequestError) as caught:
        check_functions(mine, ModuleType("x"))
    assert caught.value.message == "kernel `tpx_moe` has no `route`, which `route` needs"
    assert caught.value.hint == (
        "name another kernel for `route`, or leave it out of `use_kernels`"
    )


def test_an_llm_reports_what_runs(tmp_path, monkeypatch, caplog):
    folder = tiny_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO, "tpx"), tpx.LLM(folder, "tp1", device="cpu") as llm:
        assert describe(llm.report.kernels) == [f"kernels: off, they need a GPU; {LOST}"]
        assert llm.kernels.modules == {}
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", f"kernels: off, they need a GPU; {LOST}")
    ]
    monkeypatch.setenv("TPX_KERNELS", "off")
    with tpx.LLM(folder, "tp1", device="cpu") as llm:
        assert describe(llm.report.kernels) == [f"kernels: off, as asked; {LOST}"]
    with pytest.raises(RequestError, match="`use_kernels` is `fast`"):
        tpx.LLM(folder, "tp1", device="cpu", use_kernels="fast")


def test_ranks_that_would_run_different_kernels_differ():
    on, off = (prepare_kernels(value, H100)[1]["kernels"] for value in (True, False))
    assert on.digest != off.digest
    assert (on.shown, off.shown) == ("local", "off")


def test_the_launcher_checks_the_words_and_hands_them_on(tmp_path):
    script = write_script(tmp_path, "")
    options = Options(
        target=str(script), device="cpu", run_dir=str(tmp_path / "run"), kernels="local"
    )
    assert preflight(options, {}).environment["TPX_KERNELS"] == "local"
    assert "TPX_KERNELS" not in preflight(replace(options, kernels=None), {}).environment
    with pytest.raises(RequestError) as caught:
        preflight(replace(options, kernels=None), {"TPX_KERNELS": "x"})
    assert (caught.value.message, caught.value.hint) == ("`TPX_KERNELS` is `x`", HINT)
    with pytest.raises(RequestError) as caught:
        parse(["--kernels", "x"])
    assert (caught.value.message, caught.value.hint) == ("`--kernels` is `x`", HINT)
