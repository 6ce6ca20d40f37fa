"""What `tpx launch` refuses before a rank starts, and the job that passes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment, write_script
from tiny import tiny_checkpoint

from tpx.cli.flags import parse
from tpx.cli.main import main
from tpx.errors import TpxError
from tpx.launch import hardware, preflight as module
from tpx.launch.devices import Gpu
from tpx.launch.preflight import preflight


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a script, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "count_gpus", lambda environ: 0)
    write_script(tmp_path, "", "train.py")
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def job(*words: object, environ=None):
    options = parse([str(word) for word in words])
    assert options is not None
    return preflight(options, environ or {})


def refusal(*words: object, environ=None) -> tuple[str, str | None, int]:
    with pytest.raises(TpxError) as raised:
        job(*words, environ=environ)
    assert not Path("runs").exists()
    return raised.value.message, raised.value.hint, raised.value.exit_code


@pytest.mark.parametrize(
    ("gpus", "words", "expected"),
    [
        (0, [], ("cpu", 2)),
        (0, ["--nproc", "auto"], ("cpu", 2)),
        (0, ["--nproc", "5"], ("cpu", 5)),
        (4, [], ("cuda", 4)),
        (4, ["--nproc", "3"], ("cuda", 3)),
        (4, ["--nproc-per-node", "gpu"], ("cuda", 4)),
        (4, ["--device", "cpu"], ("cpu", 2)),
        (1, ["--device", "cpu", "--nproc", "4"], ("cpu", 4)),
        (1, ["--device", "cuda"], ("cuda", 1)),
    ],
)
def test_a_rank_a_gpu_or_two_on_cpu(here, monkeypatch, gpus, words, expected):
    monkeypatch.setattr(module, "count_gpus", lambda environ: gpus)
    found = job(*words, "train.py")
    assert (found.device, found.nproc) == expected


def test_more_ranks_than_gpus(here, monkeypatch):
    monkeypatch.setattr(module, "count_gpus", lambda environ: 2)
    assert refusal("--nproc", 4, "train.py") == (
        "4 ranks need 4 GPUs, and 2 are visible", "use `--device cpu`, or `--nproc 2`", 3
    )  # fmt: skip


def test_a_gpu_is_asked_for_and_there_is_none(here):
    assert refusal("--device", "cuda", "train.py") == (
        "`--device cuda` needs a GPU, and none is visible", "use `--device cpu`", 3
    )  # fmt: skip
    assert refusal("--nproc", "gpu", "train.py", environ={"CUDA_VISIBLE_DEVICES": "7"}) == (
        "`--nproc gpu` needs a GPU, and none is visible",
        "use `--device cpu`, or change `CUDA_VISIBLE_DEVICES`, which is `7`",
        3,
    )


def test_a_script_that_does_not_exist(here):
    assert refusal("trian.py") == (
        "script `trian.py` does not exist", "did you mean `train.py`?", 3
    )  # fmt: skip
    assert refusal("none/of/it.py") == (
        "script `none/of/it.py` does not exist", "give the path of a Python file", 3
    )  # fmt: skip


def test_a_word_that_is_neither_script_nor_recipe(here):
    assert refusal("train") == (
        "`train` is neither a script nor a recipe", "did you mean `train.py`?", 2
    )  # fmt: skip
    assert refusal(".") == ("`.` is a folder, not a script", "name a file in it", 3)


def test_a_file_is_a_script_whatever_its_name(here):
    write_script(here, "", "train_it")
    assert job("train_it").command.name == "train_it"


def test_a_module_that_does_not_exist(here):
    hint = "`-m` takes a name such as `package.module`; a file is given without `-m`"
    assert refusal("-m", "trian") == ("there is no module `trian` here", hint, 3)
    assert refusal("-m", "json.nothing") == ("there is no module `json.nothing` here", hint, 3)
    assert job("-m", "train").command.kind == "module"
    assert job("-m", "json.tool").command.name == "json.tool"


def test_text_flags_are_not_for_a_script(here):
    assert refusal("--max-new-tokens", 3, "train.py") == (
        "`--max-new-tokens` is for text generation, and `train.py` is run instead",
        "put the script's own arguments after it, or leave out `--max-new-tokens`",
        2,
    )


def test_no_model(here):
    assert refusal() == (
        "there is no model to generate text with",
        "type `tpx launch --model FOLDER_OR_HUB_ID`, or name a script to run",
        2,
    )


def test_a_launcher_inside_a_launcher(here):
    assert refusal("train.py", environ={"RANK": "3"}) == (
        "`tpx launch` was started by another launcher: `RANK` is `3`",
        "under torchrun run the script itself, `tpx.LLM` works there; elsewhere `unset RANK`",
        3,
    )


def test_a_port_that_is_in_use(here):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert refusal("--master-port", port, "train.py") == (
            f"port {port} of `127.0.0.1` is in use",
            "leave out `--master-port`, and a free port is found, or name another one",
            3,
        )
    assert job("--master-port", port, "train.py").rendezvous.endpoint == f"127.0.0.1:{port}"


def test_several_machines_need_a_meeting_point(here):
    assert refusal("--nnodes", 2, "train.py") == (
        "`--nnodes 2` needs an address at which the machines meet",
        "on every machine `--master-addr HOST_OF_NODE_0 --node-rank 0` (1, 2, ...), "
        "or `--rdzv-backend c10d --rdzv-endpoint HOST:PORT`",
        2,
    )
    message, hint, code = refusal(
        "--nnodes", 2, "--master-addr", "no.such.host.invalid", "train.py"
    )
    assert message.startswith("host `no.such.host.invalid` is unknown here (")
    assert (hint, code) == ("give an address that every machine can reach", 7)


def test_a_meeting_point_is_handed_on_as_torchrun_would(here):
    found = job("--nnodes=2", "--node_rank=1", "--master-addr=127.0.0.1", "train.py").rendezvous
    assert found[:4] == ("static", "127.0.0.1:29500", "none", {"rank": 1})
    found = job("--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1",
                "--rdzv-id=7", "--rdzv-conf=timeout=9", "train.py").rendezvous  # fmt: skip
    assert found[:4] == ("c10d", "127.0.0.1:1", "7", {"timeout": "9"})


def test_machines_that_share_a_run_folder_have_parts_of_it(here, monkeypatch):
    words = ("--nnodes=2", "--run-dir=out", "--master-addr=127.0.0.1", "--node-rank=1", "train.py")
    assert job(*words).run_dir == here / "out/machine1"
    monkeypatch.setattr(socket, "gethostname", lambda: "host7")
    met = ("--nnodes=1:2", "--run-dir=out", "--rdzv-endpoint=127.0.0.1:1", "--rdzv-backend=c10d")
    assert job(*met, "train.py").run_dir == here / "out/host7"


def test_a_run_folder_that_cannot_be_written(here):
    (here / "taken").write_text("")
    assert refusal("--run-dir", "taken", "train.py") == (
        f"the run's folder `{here}/taken` cannot be written (Not a directory)",
        "give another one: `--run-dir DIR`",
        3,
    )
    (here / "runs").write_text("")
    with pytest.raises(TpxError, match="cannot be written"):
        job("train.py")


def test_records_of_an_earlier_run_are_removed(here):
    (here / "out/errors").mkdir(parents=True)
    (here / "out/errors/0-0.json").write_text("{}")
    (here / "out/mine").write_text("")
    job("--run-dir", "out", "train.py")
    assert not list((here / "out/errors").iterdir())
    assert (here / "out/mine").exists()


def test_auto_is_resolved_once_and_handed_on_as_a_file(here, tiny):
    found = job("--model", tiny, "--tp-plan", "auto", "train.py")
    plan = found.run_dir / "plan.yaml"
    assert found.environment["TPX_TP_PLAN"] == str(plan)
    assert found.environment["TPX_MODEL"] == str(tiny)
    assert found.run_dir.parent == here / "runs"
    again = job("--model", tiny, "--tp-plan", plan, "train.py")
    assert (again.run_dir / "plan.yaml").read_text().splitlines()[-1:] == (
        plan.read_text().splitlines()[-1:]
    )
    assert again.environment["TPX_TP_PLAN"] == str(plan)


def test_auto_says_in_a_line_why_and_where(here, tiny):
    found = job("--model", tiny, "--tp-plan", "auto", "train.py")
    plan = found.run_dir / "plan.yaml"
    assert found.note == f"plan: chosen for 2 ranks by memory: tp 2 x ep 2; {plan}"
    assert plan.read_text().startswith("# Chosen for 2 ranks by memory: tp 2 x ep 2.\n")
    assert job("--model", tiny, "--tp-plan", "tp2", "train.py").note == ""


def test_on_gpus_auto_plans_for_their_speed_and_memory(here, tiny, monkeypatch):
    monkeypatch.setattr(module, "count_gpus", lambda environ: 4)
    for memory, mesh in ((80 * 2**30, "dp 4 x edp 4"), (1000, None)):
        gpu = Gpu("NVIDIA H100 80GB HBM3", memory)
        monkeypatch.setattr(hardware, "smallest_gpu", lambda gpu=gpu: gpu)
        words = ("--model", tiny, "--tp-plan", "auto", "train.py")
        if mesh is None:
            with pytest.raises(TpxError, match="no plan for 4 ranks fits 1,000 bytes"):
                job(*words)
        else:
            assert job(*words).note.startswith(f"plan: chosen for 4 ranks by time on h100: {mesh};")


def test_a_gpu_with_room_for_a_short_context_alone_is_not_refused(here, tiny, monkeypatch):
    """`auto` plans for long contexts; where they do not fit it plans for what does."""
    monkeypatch.setattr(module, "count_gpus", lambda environ: 2)
    gpu = Gpu("NVIDIA H100 80GB HBM3", 10**9 + 600_000)
    monkeypatch.setattr(hardware, "smallest_gpu", lambda: gpu)
    text = job("--model", tiny, "--tp-plan", "auto", "train.py").run_dir / "plan.yaml"
    assert "(at 1 sequence of 1 token in all)." in text.read_text()


def test_a_plan_is_proved_for_the_world_of_all_machines(here, tiny):
    words = ("--model", tiny, "--tp-plan", "tp4", "train.py")
    assert refusal(*words)[0].endswith("is for 4 ranks (tp 4 x edp 4), and there are 2")
    job("--nnodes=2", "--node-rank=1", "--master-addr=127.0.0.1", *words)


def test_a_number_of_machines_that_may_change_has_no_plan(here, tiny):
    words = ("--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1")
    assert refusal(*words, "--model", tiny, "--tp-plan", "tp2", "train.py") == (
        "`--nnodes 1:2` leaves open how many ranks the plan is for", "give one number of nodes", 2
    )  # fmt: skip


def test_a_script_sees_what_the_command_line_named(here):
    found = job("--model", "some/model", "train.py").environment
    assert (found["TPX_MODEL"], "TPX_TP_PLAN" in found) == ("some/model", False)
    found = job("--tp-plan", "tp2", "train.py", environ={"TPX_TP_PLAN": "other"}).environment
    assert (found["TPX_TP_PLAN"], "TPX_MODEL" in found) == ("tp2", False)
    assert found["CUDA_VISIBLE_DEVICES"] == ""


def test_threads_are_dealt_to_the_ranks_unless_said(here, monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(9)))
    assert job("--nproc=2", "train.py").environment["OMP_NUM_THREADS"] == "4"
    assert job("--nproc=20", "train.py").environment["OMP_NUM_THREADS"] == "1"
    said = job("train.py", environ={"OMP_NUM_THREADS": "3"}).environment
    assert "OMP_NUM_THREADS" not in said


def test_checks_need_no_torch(here, tiny):
    code = (
        "import sys; from tpx.cli.main import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for words, expected in (
        (("launch", "--model", tiny, "--tp-plan", "tp4"), 2),
        (("launch", "none.py"), 3),
        (("launch", "--help"), 0),
        (("--version",), 0),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            cwd=here,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == expected, done.stderr


def test_sampling_is_checked_before_the_model(here, capsys):
    assert main(["launch", "--model", "none", "--top-p", "2"]) == 2
    assert capsys.readouterr().err == (
        "error: `top_p` is `2.0`, and must be a number above 0 and at most 1\n\n"
        "hint: 1 keeps every token\n"
    )
