"""The launchers: what they would run, that they pass signals and exit codes on, that the shell scripts are sound."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = ("tpu_pod.sh", "slurm.sbatch")
WHO = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['LFJAX_PROCESS_ID'], 'w'))"
# Writes a file when it is ready; at SIGTERM or SIGINT exits with 130, as a run that has saved.
SAVER = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: (open(f"{sys.argv[1]}/got", "a").write(f"{number} "), sys.exit(130)))
open(f"{sys.argv[1]}/ready{os.environ['LFJAX_PROCESS_ID']}", "w").close()
time.sleep(60)
"""


def cluster(*arguments: str, **options) -> list[str]:
    return [sys.executable, str(LAUNCH / "local_cluster.py"), *arguments]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=50, **options)


def shell_words(line: str) -> list[str]:
    """The words that a shell reads from a line of printf %q."""
    return run(["bash", "-c", f"printf '%s\\0' {line}"]).stdout.split("\0")[:-1]


def wait_for(*files: pathlib.Path) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"{files} did not appear"
        time.sleep(0.02)


def test_each_process_learns_who_it_is_and_gets_its_virtual_devices(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_foo=1 --xla_force_host_platform_device_count=8"}
    done = run(cluster("-n", "3", "--devices", "5", "--", sys.executable, "-c", WHO, f"{tmp_path}/"), env=environment)
    assert done.returncode == 0, done.stderr
    seen = [json.loads((tmp_path / str(index)).read_text()) for index in range(3)]
    assert [each["LFJAX_PROCESS_ID"] for each in seen] == ["0", "1", "2"]
    assert {each["LFJAX_NUM_PROCESSES"] for each in seen} == {"3"}
    assert {each["XLA_FLAGS"] for each in seen} == {"--xla_foo=1 --xla_force_host_platform_device_count=5"}
    assert len({each["LFJAX_COORDINATOR"] for each in seen}) == 1
    assert seen[0]["LFJAX_COORDINATOR"].startswith("127.0.0.1:")


def test_one_failure_ends_all_and_its_code_is_returned():
    script = "import os, sys, time\nif os.environ['LFJAX_PROCESS_ID'] == '1': sys.exit(3)\ntime.sleep(60)"
    start = time.monotonic()
    done = run(cluster("-n", "3", "--", sys.executable, "-c", script))
    assert done.returncode == 3
    assert done.stderr == "local_cluster: process 1 ended with exit code 3; ending the others\n"
    assert time.monotonic() - start < 15


def test_a_process_killed_from_outside_is_named_and_those_that_ignore_sigterm_are_killed_too(tmp_path):
    """The survivors of a real run wait for the dead one in a collective and cannot answer SIGTERM."""
    stubborn = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: open(f"{sys.argv[1]}/asked{os.environ['LFJAX_PROCESS_ID']}", "w").close())
with open(f"{sys.argv[1]}/{os.environ['LFJAX_PROCESS_ID']}.tmp", "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, file.name.replace(".tmp", ".pid"))
while True:
    time.sleep(0.1)
"""
    launcher = (LAUNCH / "local_cluster.py").read_text().replace("GRACE_SECONDS = 20.0", "GRACE_SECONDS = 1.0")
    (tmp_path / "quick.py").write_text(launcher)  # as it is, in all but the wait
    assert "GRACE_SECONDS = 1.0" in launcher
    command = [sys.executable, str(tmp_path / "quick.py"), "-n", "3", "--", sys.executable, "-c", stubborn]
    files = [tmp_path / f"{index}.pid" for index in range(3)]
    with subprocess.Popen([*command, str(tmp_path)], stderr=subprocess.PIPE, text=True) as parent:
        wait_for(*files)
        pids = [int(file.read_text()) for file in files]
        os.kill(pids[2], signal.SIGKILL)
        _, stderr = parent.communicate(timeout=30)
    assert parent.returncode == 128 + signal.SIGKILL
    assert stderr == "local_cluster: process 2 was killed by SIGKILL; ending the others\n"
    assert sorted(file.name for file in tmp_path.glob("asked*")) == ["asked0", "asked1"]  # SIGTERM came first
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_survivors_of_a_killed_process_are_gone_within_a_minute():
    grace = re.search(r"GRACE_SECONDS = ([\d.]+)", (LAUNCH / "local_cluster.py").read_text())
    assert grace is not None
    assert float(grace[1]) <= 50


def test_local_cluster_names_a_program_that_is_not_there():
    done = run(cluster("--", "no-such-program"))
    assert done.returncode == 2
    assert "no-such-program: no such program" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_once(tmp_path, number):
    command = cluster("-n", "2", "--", sys.executable, "-c", SAVER, str(tmp_path))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        wait_for(tmp_path / "ready0", tmp_path / "ready1")
        parent.send_signal(number)
        _, stderr = parent.communicate(timeout=30)
    assert parent.returncode == 130
    assert stderr == ""  # nothing failed
    assert (tmp_path / "got").read_text() == f"{int(number)} " * 2


def test_survivors_of_a_failure_may_save_before_they_end(tmp_path):
    failing = """
if os.environ["LFJAX_PROCESS_ID"] == "1":
    while not os.path.exists(f"{sys.argv[1]}/ready0"):
        time.sleep(0.01)
    sys.exit(4)
"""
    script = SAVER.replace("import os, signal, sys, time", f"import os, signal, sys, time\n{failing}")
    assert run(cluster("--", sys.executable, "-c", script, str(tmp_path))).returncode == 4
    assert (tmp_path / "got").read_text() == f"{int(signal.SIGTERM)} "


def test_local_cluster_dry_run_prints_each_process_and_starts_none(tmp_path):
    done = run(cluster("-n", "2", "--dry-run", "--", "touch", str(tmp_path / "a b")))
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[-2:] for line in lines] == [["touch", str(tmp_path / "a b")]] * 2
    assert [f"LFJAX_PROCESS_ID={index}" in line for index, line in enumerate(lines)] == [True, True]
    assert list(tmp_path.iterdir()) == []


def test_local_cluster_refuses_no_processes():
    done = run(cluster("-n", "0", "--", "true"))
    assert done.returncode == 2
    assert "at least 1" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_parse_and_explain_themselves(script):
    assert run(["bash", "-n", str(LAUNCH / script)]).stderr == ""
    done = run(["bash", str(LAUNCH / script)])
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: the shell scripts were not checked by it")
    done = run(["shellcheck", str(LAUNCH / script)])
    assert done.returncode == 0, done.stdout


def test_tpu_dry_run_creates_installs_and_runs_on_all_workers(tmp_path):
    script = [str(LAUNCH / "tpu_pod.sh"), "--dry-run", "pod", "us-east5-a", "v5p-64"]
    environment = os.environ | {"TPU_FLAGS": "--spot --network=a"}
    done = run([*script, "lfjax", "train", "--config=a b.py"], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    commands = [
        shlex.split(line.replace("$'", "'")) for line in done.stdout.splitlines() if not line.startswith("log:")
    ]
    verbs = [next(word for word in command if word in ("create", "archive", "scp", "ssh")) for command in commands]
    assert verbs == ["create", "archive", "scp", "ssh", "ssh"]
    assert {"--accelerator-type=v5p-64", "--version=v2-alpha-tpuv5", "--spot", "--network=a"} <= set(commands[0])
    assert all("--worker=all" in command and "--zone=us-east5-a" in command for command in commands[2:])
    assert all(f"LFJAX_{key}=" in done.stdout for key in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID"))
    assert list(tmp_path.iterdir()) == []


def fake(folder: pathlib.Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("endpoints", ["a:1:10.0.0.1,b:2:10.0.0.2", "10.0.0.1,10.0.0.2"])
def test_tpu_workers_learn_who_they_are_from_the_metadata(tmp_path, endpoints):
    """The real script against a gcloud that runs the last remote command here, and a curl that is the metadata."""
    bin_dir, home = tmp_path / "bin", tmp_path / "home"
    bin_dir.mkdir()
    (home / "lfjax").mkdir(parents=True)
    fake(bin_dir, "curl", f'case "${{@: -1}}" in */agent-worker-number) echo -n 1 ;; *) echo -n "{endpoints}" ;; esac')
    fake(bin_dir, "git", 'for word; do case $word in --output=*) touch "${word#*=}" ;; esac; done')
    remote = '*--command=*attribute*) bash -c "cd \\"$HOME\\"; ${all##*--command=}" ;; *describe*) exit 0 ;;'
    fake(bin_dir, "gcloud", f'all="$*"; echo "$all" >> {tmp_path}/called; case $all in {remote} esac')
    fake(bin_dir, "show", 'echo "$LFJAX_PROCESS_ID of $LFJAX_NUM_PROCESSES at $LFJAX_COORDINATOR: $1"; exit 7')
    environment = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(home)}
    done = run([str(LAUNCH / "tpu_pod.sh"), "pod", "zone", "v5p-16", "show", "a b"], cwd=tmp_path, env=environment)
    assert "1 of 2 at 10.0.0.1:8476: a b" in done.stdout, done
    assert "1 of 2 at 10.0.0.1:8476: a b" in (tmp_path / "logs" / "pod.log").read_text()
    assert done.returncode == 7
    assert " create " not in (tmp_path / "called").read_text()  # describe found it


TASK = """export LFJAX_PROCESS_ID=$SLURM_PROCID
gpus=${SLURM_GPUS_ON_NODE:-0}
[ "$gpus" = 0 ] || export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
exec "$@\""""


def without_slurm() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "LFJAX_"))}


def test_slurm_dry_run_prints_the_step(tmp_path):
    fake(tmp_path, "hostname", "echo here")
    environment = without_slurm() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = [str(LAUNCH / "slurm.sbatch"), "--dry-run", "lfjax", "train", "--config=a b.py"]
    done = run(script, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "export LFJAX_COORDINATOR=here:20000 LFJAX_NUM_PROCESSES=1"
    assert shell_words(second) == [
        *("srun", "--kill-on-bad-exit=1", "--label", "--cpus-per-task=32"),
        *("bash", "-c", TASK, "lfjax", "lfjax", "train", "--config=a b.py"),
    ]


def test_slurm_tasks_learn_who_they_are_and_keep_all_gpus_of_their_node(tmp_path):
    """The real script against an scontrol that expands the node list and an srun that is task 1 of 2."""
    fake(tmp_path, "scontrol", "printf 'node-3\\nnode-7\\n'")
    fake(tmp_path, "srun", 'while [ "${1#-}" != "$1" ]; do shift; done; SLURM_PROCID=1 exec "$@"')
    show = (
        'echo "$LFJAX_PROCESS_ID of $LFJAX_NUM_PROCESSES at $LFJAX_COORDINATOR, GPUs $JAX_LOCAL_DEVICE_IDS: $1"; exit 7'
    )
    fake(tmp_path, "show", show)
    slurm = {"SLURM_JOB_NODELIST": "node-[3,7]", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "20005"}
    environment = without_slurm() | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for gpus, ids in (("4", "0,1,2,3"), ("1", "0")):
        command = ["bash", str(LAUNCH / "slurm.sbatch"), "show", "a b"]
        done = run(command, env=environment | {"SLURM_GPUS_ON_NODE": gpus})
        assert done.stdout == f"1 of 2 at node-3:20005, GPUs {ids}: a b\n", done.stderr
        assert done.returncode == 7
