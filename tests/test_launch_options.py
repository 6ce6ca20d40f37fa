"""The command line of `tpx launch`: which word is a flag, and what each value means."""

from __future__ import annotations

import pytest

from tpx.cli.flags import all_flags, parse
from tpx.errors import PlanError
from tpx.launch.command import command, generation
from tpx.launch.options import Options


def test_flags_end_where_the_script_begins():
    found = parse(["--nproc", "4", "train.py", "--nproc", "8", "--model=x", "-m"])
    assert found == Options(nproc="4", target="train.py", args=("--nproc", "8", "--model=x", "-m"))


def test_a_module_takes_all_that_follows():
    found = parse(["--device=cpu", "-m", "package.train", "--lr", "1"])
    assert found == Options(device="cpu", target="package.train", module=True, args=("--lr", "1"))


def test_two_dashes_end_the_flags():
    assert parse(["--chat", "--", "-odd.py", "x"]) == Options(
        chat=True, target="-odd.py", args=("x",)
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nproc_per_node=2"], Options(nproc="2")),
        (["--nproc-per-node", "gpu"], Options(nproc="gpu")),
        (["--node_rank", "1", "--nnodes", "1:4"], Options(node_rank=1, nnodes="1:4")),
        (["--rdzv_backend=c10d", "--rdzv_endpoint", "h:1"],
         Options(rdzv_backend="c10d", rdzv_endpoint="h:1")),
        (["--rdzv-id", "7", "--rdzv-conf", "a=1,b=2"], Options(rdzv_id="7", rdzv_conf="a=1,b=2")),
        (["--master_addr=h", "--master_port=29501"], Options(master_addr="h", master_port=29501)),
        (["--max_restarts", "3", "--standalone"], Options(max_restarts=3, standalone=True)),
    ],
)  # fmt: skip
def test_torchruns_spellings_work(words, expected):
    assert parse(words) == expected


def test_prompts_add_up_and_the_last_of_another_flag_counts():
    found = parse(["--prompt", "a", "--seed", "1", "--prompt=b", "--seed", "2"])
    assert found == Options(prompt=("a", "b"), seed=2)


def test_a_value_may_begin_with_a_dash():
    assert parse(["--prompt", "--x"]) == Options(prompt=("--x",))


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--nproc", "2", "--help"]])
def test_help_is_asked_for(words):
    assert parse(words) is None


def test_every_flag_fills_an_option():
    assert {flag.field for flag in all_flags().values()} == set(Options.__slots__) - {
        "target", "module", "args", "recipe", "hardware", "environment"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--nporc", "2"], "`tpx launch` has no flag `--nporc`", "did you mean `--nproc`?"),
        (["--xyz"], "`tpx launch` has no flag `--xyz`", "`tpx launch --help` lists them"),
        (["-n", "2"], "`tpx launch` has no flag `-n`", "`tpx launch --help` lists them"),
        (["--nproc"], "`--nproc` needs a value", "write `--nproc N|auto`"),
        (["--chat=1"], "`--chat` takes no value", "write `--chat`"),
        (["-m"], "`-m` needs a module", "`tpx launch -m MODULE`"),
        (["--nproc", "two"], "`--nproc two` is no number of ranks",
         "give a whole number from 1 up, or `auto`: one rank a GPU, two on CPU"),
        (["--nproc-per-node=0"], "`--nproc-per-node 0` is no number of ranks",
         "give a whole number from 1 up, or `auto`: one rank a GPU, two on CPU"),
        (["--device", "tpu"], "`--device tpu` is unknown",
         "use `cpu`, `cuda`, `h100` or `h200`"),
        (["--nnodes", "3:2"], "`--nnodes 3:2` is no number of nodes", "give `N`, or `MIN:MAX`"),
        (["--nnodes", "0"], "`--nnodes 0` is no number of nodes", "give `N`, or `MIN:MAX`"),
        (["--master-port", "70000"], "`--master-port 70000` is no port",
         "give a number from 1 to 65535"),
        (["--rdzv-conf", "x"], "`--rdzv-conf x` cannot be read", "write `key=value,key=value`"),
        (["--temperature", "hot"], "`--temperature hot` is no number", None),
        (["--max-new-tokens", "0"], "`--max-new-tokens 0` is no whole number from 1 up", None),
        (["--seed", "-1"], "`--seed -1` is no whole number from 0 up", None),
        (["--model", ""], "`--model` is empty", "give it a value, or leave it out"),
    ],
)  # fmt: skip
def test_mistakes_say_what_to_type(words, message, hint):
    with pytest.raises(PlanError) as raised:
        parse(words)
    assert (raised.value.message, raised.value.hint) == (message, hint)


def test_sizes_of_the_engine_go_to_the_text_that_is_generated():
    options = parse(["--context", "99", "--batch", "4", "--memory-fraction", "0.5"])
    assert generation(options).engine == {"context": 99, "batch": 4, "memory_fraction": 0.5}
    assert generation(parse([])).engine == {}
    with pytest.raises(PlanError) as caught:
        command(parse(["--batch", "4", "-m", "timeit"]))
    assert caught.value.message == "`--batch` is for text generation, and `timeit` is run instead"
