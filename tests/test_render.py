"""`tpx render`: the files are what schedulers read, and start the launchers that were meant."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from checkpoint_files import lay_out
from guards import ROOT

from tpx.cli.flags import parse
from tpx.cli.main import main
from tpx.cli.render import KINDS
from tpx.launch.rendezvous import rendezvous
from tpx.launch.slurm import from_slurm

PROMPT = 'it\'s $(HOME) & "so"'
WORDS = (
    "--model",
    "120b",
    "--tp-plan",
    "auto",
    "--world",
    "16",
    "--device=h100",
    "--prompt",
    PROMPT,
)
CLUSTER = ("lws", "pytorchjob")
TELLS = """#!{python}
import json, os, sys
kept = [name for name in os.environ if name.startswith(("SLURM", "RANK", "WORLD_SIZE"))]
print(json.dumps([sys.argv[1:], {{name: os.environ[name] for name in kept}}]))
"""
SRUN = """#!/bin/sh
export SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=1
export SLURM_STEP_NODELIST='127.0.0.[1-2]'
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the headers of a model, and programs that tell how they were called."""
    monkeypatch.chdir(tmp_path)
    lay_out(ROOT / "tests" / "data" / "gpt-oss-120b.json.gz", tmp_path / "120b")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("tpx", TELLS.format(python=sys.executable)), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def rendered(capsys, kind: str, *words: str) -> str:
    image = ("--image", "registry/tpx:1") if kind in CLUSTER else ()
    assert main(["render", kind, *image, "--name=run-1", *words]) == 0
    return capsys.readouterr().out


def called(command: list[str], **variables: str) -> tuple[list[str], dict[str, str]]:
    """What the `tpx` of this folder was given, and saw."""
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def expanded(words: list[str], variables: dict[str, str]) -> list[str]:
    """As Kubernetes does it: $(NAME) by its value, $$ by one dollar."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return [re.sub(r"\$\$|\$\((\w+)\)", value, word) for word in words]


def check(argv: list[str], environ: dict[str, str] | None = None) -> None:
    """It is the second machine of two, and runs what was asked for."""
    assert argv[0] == "launch"
    found = parse(argv[1:])
    assert found is not None
    if found.slurm:
        found = from_slurm(found, environ or {})
    assert (found.nnodes, found.node_rank, found.nproc, found.device) == ("2", 1, "8", "cuda")
    assert (rendezvous(found).backend, rendezvous(found).configs) == ("static", {"rank": 1})
    assert rendezvous(found).endpoint.startswith("127.0.0.1:")
    assert (found.model, found.prompt, found.world, found.dry_run) == (
        "120b",
        (PROMPT,),
        None,
        False,
    )


def test_slurm(here, capsys):
    text = rendered(capsys, "slurm", *WORDS)
    subprocess.run(["bash", "-n", "-c", text], check=True)
    assert re.findall(r"^#SBATCH --(.*)", text, re.MULTILINE) == [
        "job-name=run-1", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "exclusive",
        "output=%x-%j.out",
    ]  # fmt: skip
    check(*called(["bash", "-c", text], SLURM_JOB_ID="7", SLURM_CPUS_ON_NODE="4"))


def test_sky(here, capsys):
    task = yaml.safe_load(rendered(capsys, "sky", *WORDS))
    assert (task["name"], task["num_nodes"]) == ("run-1", 2)
    assert task["resources"] == {"accelerators": "H100:8"}
    check(*called(["bash", "-c", task["run"]], SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
                  SKYPILOT_NODE_IPS="127.0.0.1\n127.0.0.2"))  # fmt: skip


def test_lws(here, capsys):
    found = yaml.safe_load(rendered(capsys, "lws", *WORDS))
    template = found["spec"]["leaderWorkerTemplate"]
    assert (found["metadata"], template["size"]) == ({"name": "run-1"}, 2)
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    [container] = template["workerTemplate"]["spec"]["containers"]
    assert container["image"] == "registry/tpx:1"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    given = {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "127.0.0.1", "HOME": "wrong"}
    check(*called(expanded(container["command"], given)))


def test_pytorchjob(here, capsys):
    found = yaml.safe_load(rendered(capsys, "pytorchjob", *WORDS))
    specs = found["spec"]["pytorchReplicaSpecs"]
    assert [(role, spec["replicas"]) for role, spec in specs.items()] == [
        ("Master", 1), ("Worker", 1)
    ]  # fmt: skip
    for spec in specs.values():
        [container] = spec["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        argv, environ = called(
            expanded(container["command"], {"HOME": "wrong"}),
            RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="23456",
        )  # fmt: skip
        check(argv)
        assert environ == {}  # `tpx launch` refuses to start inside another launcher


def test_one_machine_needs_no_meeting_point(here, capsys):
    one = ("--model", "120b", "--tp-plan", "tp2-ep2", "--world", "2", "--device", "h200")
    task = yaml.safe_load(rendered(capsys, "sky", *one))
    assert task["num_nodes"] == 1
    argv, _ = called(["bash", "-c", task["run"]])
    assert argv == ["launch", "--nproc=2", "--device=cuda", "--model", "120b", "--tp-plan",
                    "tp2-ep2"]  # fmt: skip
    found = yaml.safe_load(rendered(capsys, "pytorchjob", *one))
    assert list(found["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    found = yaml.safe_load(rendered(capsys, "lws", *one))
    [container] = found["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"]
    assert not any("LWS" in word for word in container["command"])


def test_a_recipe_and_a_script_stay_as_they_were_typed(here, capsys):
    (here / "train.py").write_text("")
    recipe = next(name for name in all_recipes() if name.endswith("h200x16"))
    words = (recipe, "--model=120b", "--nnodes", "2", "train.py", "--world", "3")
    task = yaml.safe_load(rendered(capsys, "sky", *words))
    argv, _ = called(["bash", "-c", task["run"]], SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="0",
                     SKYPILOT_NODE_IPS="127.0.0.1")  # fmt: skip
    assert argv[1:4] == ["--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1"]
    assert argv[4:] == ["--nproc=8", "--device=cuda", recipe, "--model=120b", "train.py", "--world",
                        "3"]  # fmt: skip


def all_recipes() -> list[str]:
    from tpx.launch.recipe import shipped_recipes

    return list(shipped_recipes())


def test_a_file_is_written_where_it_is_asked_for(here, capsys):
    assert main(["render", "slurm", "--out", "job.sh", *WORDS]) == 0
    assert capsys.readouterr().out == "wrote job.sh\n"
    assert (here / "job.sh").read_text().startswith("#!/bin/bash\n")


@pytest.mark.parametrize(("words", "message", "hint"), [
    (["slrum"], "`tpx render` knows no `slrum`", "did you mean `slurm`?"),
    (["lws", *WORDS], "`tpx render lws` needs an image", "add `--image REGISTRY/NAME:TAG`"),
    (["sky", "--name", "Ä"], "`--name Ä` is no name of a job",
     "use a-z, 0-9 and `-`: `--name x1`"),
    (["sky", "--out"], "`--out` needs a value", "write `--out FILE`"),
    (["sky", "--model", "120b"], "which machines the file is for is not said",
     "name a recipe, or add `--world 16 --device h100`"),
    (["sky", "--out", "no/such/x", *WORDS],
     "`no/such/x` cannot be written (No such file or directory)",
     "give another file: `--out FILE`"),
    (["sky", *WORDS[:3], "tp2-ep2", *WORDS[4:]],
     "plan `plans/gpt_oss/tp2-ep2.yaml` is for 2 ranks (tp 2 x ep 2), and there are 16", None),
])  # fmt: skip
def test_mistakes_say_what_to_type(here, capsys, words, message, hint):
    assert main(["render", *words]) in (2, 3)
    error, _, said = capsys.readouterr().err.partition("\n\nhint: ")
    assert re.sub(r"^error(\[\w+\])?: ", "", error) == message
    assert hint is None or said == f"{hint}\n"


def test_every_kind_is_in_the_help(capsys):
    assert main(["render", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {kind} " in text for kind in KINDS)
