"""Several machines: what Slurm says of them, and the roll call before ranks start."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from launching import environment, finish, start, write_script

from tpx.errors import TpxError
from tpx.launch.options import Options
from tpx.launch.roll_call import Call, differences, roll_call
from tpx.launch.slurm import PORTS, first_host, from_slurm

STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_NNODES": "8", "SLURM_NODEID": "1"}  # fmt: skip


def test_a_step_says_where_this_machine_stands():
    found = from_slurm(Options(slurm=True), STEP)
    assert (found.nnodes, found.node_rank, found.master_addr) == ("2", 1, "gpu07")
    assert found.master_port in PORTS
    again = from_slurm(Options(slurm=True), STEP | {"SLURM_NODEID": "0"})
    assert again.master_port == found.master_port
    other = from_slurm(Options(slurm=True), STEP | {"SLURM_STEP_ID": "1"})
    assert other.master_port != found.master_port


def test_a_step_of_one_machine_needs_no_meeting_point():
    one = STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert from_slurm(Options(slurm=True), one) == Options(slurm=True)


@pytest.mark.parametrize(("listed", "host"), [
    ("gpu7", "gpu7"), ("gpu7,gpu8", "gpu7"), ("gpu[07-09,12],other1", "gpu07"),
    ("gpu[3,5]", "gpu3"), ("rack[2-4]n[01-16]", "rack2n01"), ("a-b[1-2].x,c", "a-b1.x"),
])  # fmt: skip
def test_the_first_host_of_a_list(listed, host):
    assert first_host(listed) == host


@pytest.mark.parametrize(("changes", "options", "message", "hint"), [
    ({"SLURM_JOB_ID": None}, {},
     "`--slurm` reads the variables of a Slurm step, and `SLURM_JOB_ID` is not set",
     "start it by `srun`, or leave out `--slurm`"),
    ({"SLURM_STEP_NODELIST": None}, {},
     "this is the batch script of a job on 2 machines, which runs on the first alone",
     "start it by `srun --ntasks-per-node=1 tpx launch --slurm ...`"),
    ({"SLURM_STEP_NUM_TASKS": "16"}, {},
     "this step has 16 tasks on 2 machines, and each task would start all ranks of its machine",
     "`srun --nodes=2 --ntasks=2 --ntasks-per-node=1 tpx launch --slurm ...`"),
    ({"SLURM_NODEID": None}, {},
     "`--slurm` reads `SLURM_NODEID`, and it is `not set`",
     "start it by `srun --ntasks-per-node=1`"),
    ({}, {"master_addr": "x"}, "`--master-addr` and `--slurm` say the same",
     "leave out `--master-addr`"),
    ({}, {"nnodes": "4"}, "this step has 2 machines, and 4 are asked for",
     "`srun --nodes=4 --ntasks-per-node=1 tpx launch --slurm ...`"),
])  # fmt: skip
def test_what_slurm_says_is_not_enough(changes, options, message, hint):
    environ = {name: value for name, value in (STEP | changes).items() if value is not None}
    with pytest.raises(TpxError) as raised:
        from_slurm(replace(Options(slurm=True), **options), environ)
    assert (raised.value.message, raised.value.hint) == (message, hint)


# the roll call


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def call(port: int, node: int, nodes: int = 3, patience: float = 20.0, **facts: str) -> Call:
    return Call("127.0.0.1", port, node, nodes, {"tpx": "1", "torch": "2.13.0"} | facts, patience)


def ended(one: Call) -> object:
    """What a machine hears, or its error."""
    try:
        return roll_call(one, lambda line: None)
    except TpxError as error:
        return error


def together(*calls: Call) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(ended, calls))


def test_all_machines_hear_the_same_whoever_comes_first():
    port = free_port()
    found = together(call(port, 2), call(port, 1), call(port, 0))
    assert found == [{node: {"tpx": "1", "torch": "2.13.0"} for node in range(3)}] * 3


def test_machines_that_differ_are_named_alike_on_all():
    port = free_port()
    found = together(call(port, 0, 2), call(port, 1, 2, torch="2.11.0"))
    assert [differences(each) for each in found] == [
        ["torch is `2.13.0` on machine 0 and `2.11.0` on machine 1"]
    ] * 2
    assert differences({0: {"plan": "a"}, 1: {"plan": "b"}, 2: {"plan": "c"}}) == [
        "the plan is `a` on machine 0 and `b` on machine 1"
    ]
    assert differences({0: {"nccl": "2"}, 1: {}}) == [
        "nccl is `2` on machine 0 and `none` on machine 1"
    ]


def test_a_machine_that_does_not_come_is_named():
    port = free_port()
    found = together(call(port, 0, patience=0.5), call(port, 2, patience=0.5))
    first, other = found
    assert isinstance(first, TpxError)
    assert (first.message, first.hint, first.exit_code) == (
        f"machine 1 did not come to `127.0.0.1:{port}` in 0.5 s",
        "start `tpx launch ... --node-rank 1` there, and let it reach that port",
        7,
    )
    assert isinstance(other, TpxError)
    assert other.exit_code == 7


def test_a_first_machine_that_does_not_answer_is_named():
    port = free_port()
    found = ended(call(port, 1, patience=0.3))
    assert isinstance(found, TpxError)
    assert (found.message, found.hint, found.exit_code) == (
        f"machine 0 does not answer at `127.0.0.1:{port}`: Connection refused, for 0.3 s",
        "start `tpx launch ... --node-rank 0` there, and open that port",
        7,
    )


def test_two_machines_of_the_same_number_hear_of_it():
    port = free_port()
    found = together(call(port, 0), call(port, 1), call(port, 1))
    assert {str(each.args[0]) for each in found if isinstance(each, TpxError)} >= {
        "machine 1 came twice"
    }
    assert found[0].hint == "`--node-rank` is 0 to 2, another one on each machine"
    found = together(call(port, 0, 2), call(port, 5, 2))
    assert [each.message for each in found] == ["there is no machine 5"] * 2


def test_a_stranger_at_the_port_is_not_heard():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ended, call(port, 0, 2))
        while first.running():
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
            except ConnectionRefusedError:
                continue
        second = pool.submit(ended, call(port, 1, 2))
        assert sorted(second.result()) == sorted(first.result()) == [0, 1]


def test_what_answers_may_be_no_launcher():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        found = pool.submit(ended, call(port, 1))
        caller, _ = server.accept()
        with caller:
            assert json.loads(caller.makefile().readline())["node"] == 1
            caller.sendall(b"HTTP/1.1 400 Bad Request\r\n")
        error = found.result()
    assert isinstance(error, TpxError)
    assert error.message == (
        f"machine 0 ended, or what answers at `127.0.0.1:{port}` is no `tpx launch`"
    )


@pytest.mark.soak
def test_two_launchers_start_a_job_together(tmp_path):
    """Two machines that are one: the real launcher twice, a rank each."""
    script = write_script(tmp_path, """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        x = torch.tensor([dist.get_rank() + 1])
        dist.all_reduce(x)
        print(os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"], x.item())
        dist.destroy_process_group()
    """)  # fmt: skip
    flags = ("--nnodes=2", "--nproc=1", "--device=cpu", "--master-addr=127.0.0.1",
             f"--master-port={free_port()}")  # fmt: skip
    nodes = [
        start("launch", *flags, f"--node-rank={node}", f"--run-dir=run{node}", script,
              cwd=tmp_path, env=environment(GLOO_SOCKET_IFNAME="lo"))
        for node in (1, 0)
    ]  # fmt: skip
    done = [finish(node) for node in nodes]
    assert [(each.returncode, each.stdout, each.stderr) for each in done] == [
        (0, "1 0 3\n", ""), (0, "0 0 3\n", "")
    ]  # fmt: skip
