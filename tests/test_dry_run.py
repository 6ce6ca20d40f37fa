"""`tpx launch --dry-run`: what it says of hardware here and elsewhere, and that it is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from checkpoint_files import lay_out
from dry_runs import dry_run, stable
from guards import ROOT
from headers import write_folder
from launching import environment, tpx, write_script

from tpx.cli import dry_run as drawing
from tpx.cli.flags import parse
from tpx.cli.main import main
from tpx.errors import TpxError
from tpx.launch import checks, preflight as module
from tpx.launch.checks import Check
from tpx.launch.hardware import on_paper
from tpx.launch.preflight import preflight
from tpx.launch.room import Room
from tpx.plan.device import DEVICES, device_of

HEADERS = ROOT / "tests" / "data" / "gpt-oss-120b.json.gz"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, no GPU, and a machine of which every check says the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "count_gpus", lambda environ: 0)
    monkeypatch.setattr(checks, "memory_room", lambda: Room(10**11, "this machine"))
    monkeypatch.setattr(checks, "open_files", lambda: 4096)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# What torch's launcher sets beside them, for itself.
OF_THE_LAUNCHER = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"}
ON_TWO_RANKS = """\
tpx VERSION  dry run: nothing was started or written
  model     small: 2 layers, 8 experts
  plan      plans/gpt_oss/tp2-ep2.yaml: tp 2 x ep 2
  machines  one machine of 2 ranks, on cpu
  meet at   a free port of this machine

ranks
   rank  machine  GPU  place                             weights       left
      0        0    -  tp 0, ep 0                      143.66 kB          -
      1        0    -  tp 1, ep 1                      143.41 kB          -

mesh
  dense: dp 1 x tp 2
    dp 0   0 1
  experts: edp 1 x ep 2 x etp 1
    edp 0   0 1

groups
  1 group of 2       inside a machine                  1 GB/s  tp, ep, expert, slice
  links: stated figures: not measured; `tpx bench links` on the ranks themselves measures them

checks
  ok     plan           11 proofs, 232 facts
  ok     checkpoint     41 tensors, 0.28 MB in 1 file, each as long as its
                        header says
  ok     port           a free one of this machine
  ok     memory         100.00 GB free on this machine, and 2 ranks need about
                        600.41 MB
  ok     open files     4,096 a process

each rank runs
  python tpx/launch/shim.py '<launcher'"'"'s pid>' script train.py --lr '$x'

with the environment
  TPX_RUN_DIR=./runs/RUN
  TPX_MODEL=small
  TPX_TP_PLAN=tp2-ep2
  CUDA_VISIBLE_DEVICES=''
  WORLD_SIZE=2
  LOCAL_WORLD_SIZE=2
  MASTER_ADDR=127.0.0.1
  MASTER_PORT=<chosen at the start>
  GROUP_WORLD_SIZE=1
  ROLE_NAME=tpx
  ROLE_WORLD_SIZE=2
  TORCHELASTIC_RESTART_COUNT=0
  TORCHELASTIC_MAX_RESTARTS=0
  TORCHELASTIC_RUN_ID=<chosen at the start>
  TORCHELASTIC_USE_AGENT_STORE=True
  TORCH_NCCL_ASYNC_ERROR_HANDLING=1
  and of its own
           RANK   LOCAL_RANK   GROUP_RANK    ROLE_RANK
              0            0            0            0
              1            1            0            1
"""


def test_all_of_it_on_this_machine_and_nothing_is_written(here, capsys):
    write_folder(here / "small")
    write_script(here, "", "train.py")
    before = sorted(here.rglob("*"))
    words = ("--model", "small", "--tp-plan", "tp2-ep2", "--nproc", 2, "train.py", "--lr", "$x")
    code, text = dry_run(capsys, *words)
    assert text.splitlines() == ON_TWO_RANKS.splitlines()
    assert code == 0
    assert sorted(here.rglob("*")) == before


def test_no_line_is_wider_than_a_terminal_but_those_to_copy(here, capsys):
    lay_out(HEADERS, here / "120b")
    _, text = dry_run(capsys, "--model", "120b", "--world", 16, "--device", "h200")
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert [line.split()[0] for line in wide] == ["links:", "python"]


def test_a_fault_here_ends_with_its_exit_code_and_the_report(here, capsys, monkeypatch):
    write_folder(here / "small")
    monkeypatch.setattr(checks, "memory_room", lambda: Room(10**5, "this machine"))
    words = ("--model", "small", "--tp-plan", "tp2-ep2", "--nproc", 2)
    code, text = dry_run(capsys, *words)
    assert code == 3
    assert "  fault  memory         0.10 MB free on this machine, and 2 ranks need 0.29 MB" in text
    assert main(["launch", *map(str, words)]) == 3
    assert capsys.readouterr().err == (
        "error: 0.10 MB free on this machine, and 2 ranks need 0.29 MB to load\n\n"
        "hint: use more machines, or a smaller model; the kernel kills a rank that takes too much\n"
    )


def test_faults_start_nevertheless_where_they_shall_only_be_told(here, monkeypatch):
    write_folder(here / "small")
    monkeypatch.setattr(checks, "memory_room", lambda: Room(10**5, "this machine"))
    words = ["--model", "small", "--tp-plan", "tp2-ep2", "--nproc", "2"]
    with pytest.raises(TpxError):
        preflight(parse(words), {})
    warned = preflight(parse(["--preflight", "warn", *words]), {})
    assert [check.name for check in warned.survey.checks if check.state == "fault"] == ["memory"]
    off = preflight(parse(["--preflight", "off", *words]), {})
    assert [check.name for check in off.survey.checks] == ["plan", "checkpoint"]


def test_what_was_checked_is_kept_in_the_runs_folder(here):
    write_folder(here / "small")
    job = preflight(parse(["--model", "small", "--tp-plan", "tp2-ep2", "--nproc", "2"]), {})
    kept = json.loads((job.run_dir / "preflight.json").read_text())
    assert [check["name"] for check in kept["checks"]] == [
        "plan", "checkpoint", "port", "memory", "open files"
    ]  # fmt: skip
    assert [rank["coords"]["ep"] for rank in kept["ranks"]] == [0, 1]
    assert sum(rank["need"]["weights"] for rank in kept["ranks"]) > 287_000
    assert kept["groups"][0]["span"] == {"ranks": 2, "nodes": 1, "per_node": 2}


@pytest.mark.parametrize(("words", "nodes", "nproc", "device"), [
    (["--world", "16", "--device", "h200"], 2, 8, "cuda"),
    (["--world", "4", "--device", "h100"], 1, 4, "cuda"),
    (["--world", "12", "--device", "h100"], 1, 12, "cuda"),
    (["--world", "12", "--device", "h100", "--nnodes", "3"], 3, 4, "cuda"),
    (["--world", "12", "--device", "h100", "--nproc", "12"], 1, 12, "cuda"),
    (["--device", "h100", "--nnodes", "3", "--nproc", "4"], 3, 4, "cuda"),
    (["--world", "24", "--device", "cpu"], 1, 24, "cpu"),
])  # fmt: skip
def test_hardware_that_is_elsewhere(words, nodes, nproc, device):
    found = on_paper(parse(["--dry-run", *words]))
    assert found is not None
    assert (found.nodes, found.nproc, found.device) == ((nodes, nodes), nproc, device)


def test_hardware_that_is_here():
    assert on_paper(parse(["--dry-run", "--device", "cpu", "--nproc", "3"])) is None
    assert on_paper(parse(["--dry-run"])) is None
    assert on_paper(parse([])) is None


@pytest.mark.parametrize(("words", "message", "hint"), [
    (["--world", "8"], "`--world 8` is for `--dry-run`",
     "the ranks of this machine are `--nproc`, and the machines `--nnodes`"),
    (["--device", "h200"],
     "`--device h200` is for `--dry-run`, which asks nothing of this machine",
     "write `--device cuda` for the GPUs of this machine"),
    (["--dry-run", "--world", "8"],
     "`--world 8` is for hardware that is elsewhere, and it is not named",
     "add `--device h100`, `--device h200` or `--device cpu`"),
    (["--dry-run", "--world", "8", "--device", "cuda"],
     "`--world 8` is for hardware that is elsewhere, and it is not named",
     "add `--device h100`, `--device h200` or `--device cpu`"),
    (["--dry-run", "--device", "h200"],
     "`--device h200` is elsewhere, and the number of ranks is not said", "add `--world 8`"),
    (["--dry-run", "--device", "h200", "--world", "9", "--nnodes", "2"],
     "`--world 9` is not 2 machines of 4 ranks",
     "give `--world 8`, or leave `--nnodes` and `--nproc` out"),
    (["--dry-run", "--device", "h200", "--world", "8", "--nnodes", "1:2"],
     "`--nnodes 1:2` leaves open how many machines there are", "give one number"),
])  # fmt: skip
def test_hardware_that_cannot_be_told(words, message, hint):
    with pytest.raises(TpxError) as raised:
        on_paper(parse(words))
    assert (raised.value.message, raised.value.hint, raised.value.exit_code) == (message, hint, 2)


def test_a_plan_that_does_not_fit_the_device_is_a_fault(here, capsys, monkeypatch):
    lay_out(HEADERS, here / "120b")
    words = ("--model", "120b", "--world", 1, "--device", "h100")
    assert dry_run(capsys, *words, "--tp-plan", "tp1")[0] == 0
    monkeypatch.setitem(DEVICES, "h100", device_of("h100", 60 * 10**9))
    code, text = dry_run(capsys, *words, "--tp-plan", "tp1")
    assert code == 3
    assert " needs 66.32 GB of 60.00 GB that" in text


def test_a_doubt_is_told_before_the_ranks_start(capsys):
    doubt = Check("open files", "doubt", "few", "`ulimit -n 9`")
    assert checks.warnings([doubt, Check("x", "ok", "y")]) == ["warning: few; `ulimit -n 9`"]
    [line] = drawing.check_lines([doubt])
    assert line.plain == "doubt  open files     few; `ulimit -n 9`"


def test_a_dry_run_needs_no_torch_and_no_network(here):
    lay_out(HEADERS, here / "120b")
    code = (
        "import socket, sys; socket.socket.connect = None; from tpx.cli.main import main;"
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = ("launch", "--dry-run", "--model", "120b", "--world", "16", "--device", "h200")
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=here, env=environment(), capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_preflight_of_a_large_model_is_fast(here):
    """The CPU's seconds, which others on this machine do not lengthen much."""
    lay_out(HEADERS, here / "120b")
    began = time.process_time()
    job = preflight(parse(["--model", "120b", "--tp-plan", "tp4-ep4", "--nproc", "4"]), {})
    assert time.process_time() - began < 2
    assert job.survey.seconds < 2


@pytest.mark.more
def test_ranks_see_the_environment_and_the_command_that_were_said(tmp_path):
    script = write_script(tmp_path, """
        import json, os, sys
        with open(f"{os.environ['RANK']}.json", "w") as file:
            json.dump([sys.orig_argv, dict(os.environ)], file)
    """)  # fmt: skip
    flags = ("--nproc", 2, "--device", "cpu", "--run-dir", "run", script, "a b", "$x")
    told = tpx("launch", "--dry-run", *flags, cwd=tmp_path)
    assert tpx("launch", *flags, cwd=tmp_path).returncode == 0
    lines = told.stdout.splitlines()
    at = lines.index("with the environment")
    stop = lines.index("  and of its own")
    names, *rows = [line.split() for line in lines[stop + 1 :]]
    for rank, row in enumerate(rows):
        argv, environ = json.loads((tmp_path / f"{rank}.json").read_text())
        for line in lines[at + 1 : stop]:
            name, _, value = line.strip().partition("=")
            assert environ[name] == value.strip("'") or value == "<chosen at the start>", name
        assert [environ[name] for name in names] == row
        said = lines[lines.index("each rank runs") + 1].strip()
        assert stable(said) == (
            f"python tpx/launch/shim.py '<launcher'\"'\"'s pid>' script {script} 'a b' '$x'"
        )
        assert [*argv[:2], *argv[3:]] == [
            sys.executable, str(ROOT / "tpx/launch/shim.py"), "script", str(script), "a b", "$x"
        ]  # fmt: skip
        added = {name for name in environ if name.startswith(("TORCHELASTIC", "TPX_"))}
        assert added - OF_THE_LAUNCHER <= {line.split("=")[0].strip() for line in lines}
    assert os.path.exists(tmp_path / "run/preflight.json")
