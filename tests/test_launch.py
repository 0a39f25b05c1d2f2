"""The launchers: what they would run, that they pass signals and exit codes on, that the shell scripts are sound."""

import json
import math
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
import yaml  # PyYAML comes with flax and orbax-checkpoint

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = ("tpu_pod.sh", "tpu_worker.sh", "slurm.sbatch", "gke/run.sh")
WHO = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['LFJAX_PROCESS_ID'], 'w'))"
# Writes a file when it is ready; at SIGTERM or SIGINT exits with 130, as a run that has saved.
SAVER = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: (open(f"{sys.argv[1]}/got", "a").write(f"{number} "), sys.exit(130)))
open(f"{sys.argv[1]}/ready{os.environ['LFJAX_PROCESS_ID']}", "w").close()
time.sleep(60)
"""


def one_leaves(code: int, program: str) -> str:
    """The program, but process 1 exits with this code as soon as process 0 is ready."""
    leave = f"""
if os.environ["LFJAX_PROCESS_ID"] == "1":
    while not os.path.exists(f"{{sys.argv[1]}}/ready0"):
        time.sleep(0.01)
    sys.exit({code})
"""
    first = "import os, signal, sys, time"
    return program.replace(first, first + leave)


def cluster(*arguments: str, **options) -> list[str]:
    return [sys.executable, str(LAUNCH / "local_cluster.py"), *arguments]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=50, **options)


def shell_words(line: str) -> list[str]:
    """The words that a shell reads from a line of printf %q."""
    return run(["bash", "-c", f"printf '%s\\0' {line}"]).stdout.split("\0")[:-1]


def fake(folder: pathlib.Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def without_slurm() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "LFJAX_"))}


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
        try:
            _, stderr = parent.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            for pid in (parent.pid, *pids[:2]):
                os.kill(pid, signal.SIGKILL)
            raise
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


def test_one_that_was_asked_to_stop_leaves_the_others_time_to_end_by_themselves(tmp_path):
    """They have agreed on the stop; a signal on top would be a second one, which means now."""
    for code, said in ((130, ""), (5, "local_cluster: process 0 ended with exit code 5 when all were asked to stop\n")):
        program = one_leaves(130, SAVER.replace("time.sleep(60)", f"time.sleep(1)\nsys.exit({code})"))
        done = run(cluster("--", sys.executable, "-c", program, str(tmp_path)))
        assert (done.returncode, done.stderr) == (code, said)
        assert not (tmp_path / "got").exists()
        (tmp_path / "ready0").unlink()


def test_survivors_of_a_failure_may_save_before_they_end(tmp_path):
    assert run(cluster("--", sys.executable, "-c", one_leaves(4, SAVER), str(tmp_path))).returncode == 4
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
    assert f"launch/{script} " in done.stderr or f"/{script} [--dry-run]" in done.stderr
    assert "--dry-run" in done.stderr or script == "tpu_worker.sh"  # which tpu_pod.sh calls


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: the shell scripts were not checked by it")
    done = run(["shellcheck", str(LAUNCH / script)])
    assert done.returncode == 0, done.stdout


TPU_INSTALL = """set -e; flock -n lfjax.lock true || exit 0; mount /mnt/x
mkdir -p lfjax; tar -xzf lfjax.tar.gz -C lfjax; python3 -m pip install -q --user uv
PATH=$HOME/.local/bin:$PATH; cd lfjax; [ -d .venv ] || uv venv -q --python 3.12; uv pip install -q -e ".[tpu]\""""
TPU_DRY_RUN = """
{tpu} describe pod --zone=us-east5-a --format=value(state)
{tpu} create pod --zone=us-east5-a {shape} --version={runtime} --spot --network=a
mkdir -p logs/pod/NOW-1
git -C {launch}/.. archive --format=tar.gz --output={here}/logs/pod/NOW-1/lfjax.tar.gz HEAD
{tpu} scp logs/pod/NOW-1/lfjax.tar.gz pod:lfjax.tar.gz --zone=us-east5-a --worker=all
{ssh} --command={install}
{ssh} '--command=bash lfjax/launch/tpu_worker.sh NOW-1 lfjax train --config=a\\ b.py '
{ssh} --output-directory=logs/pod/NOW-1 '--command=cat lfjax.log'
"""


@pytest.mark.parametrize(
    "size, shape, runtime",
    [
        ("v5p:4x4x4", "--type=v5p --topology=4x4x4", "v2-alpha-tpuv5"),
        ("v5e:4x4", "--type=v5litepod --topology=4x4", "v2-alpha-tpuv5-lite"),
        ("v6e-16", "--accelerator-type=v6e-16", "v2-alpha-tpuv6e"),
        ("v4:2x2x4", "--type=v4 --topology=2x2x4", "tpu-ubuntu2204-base"),
    ],
)
def test_tpu_dry_run_prints_every_command_and_runs_none(tmp_path, size, shape, runtime):
    bin_dir, here = tmp_path / "bin", tmp_path / "here"
    bin_dir.mkdir()
    here.mkdir()
    for program in ("gcloud", "git", "mkdir"):
        fake(bin_dir, program, f"touch {tmp_path}/ran")
    fake(bin_dir, "date", "echo NOW")
    environment = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    environment |= {"TPU_FLAGS": "--spot --network=a", "TPU_SETUP": "mount /mnt/x"}
    script = [str(LAUNCH / "tpu_pod.sh"), "--dry-run", "pod", "us-east5-a", size, "lfjax", "train", "--config=a b.py"]
    done = run(script, cwd=here, env=environment)
    assert done.returncode == 0, done.stderr
    *commands, last = done.stdout.splitlines()
    tpu = "gcloud compute tpus tpu-vm"
    names = {"tpu": tpu, "ssh": f"{tpu} ssh pod --zone=us-east5-a --worker=all --batch-size=all"}
    names |= {"shape": shape, "runtime": runtime, "launch": LAUNCH, "here": here, "install": "INSTALL"}
    expected = [shlex.split(line) for line in TPU_DRY_RUN.format(**names).strip().splitlines()]
    expected = [[word.replace("INSTALL", TPU_INSTALL) for word in command] for command in expected]
    assert [shell_words(line) for line in commands] == expected
    assert last.endswith("delete the slice: gcloud compute tpus tpu-vm delete pod --zone=us-east5-a")
    assert not (tmp_path / "ran").exists()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("workdir", [["--workdir=gs://bucket/x"], ["--workdir", "gs://bucket/x"]])
def test_tpu_refuses_a_workdir_in_an_object_store(workdir):
    script = [str(LAUNCH / "tpu_pod.sh"), "--dry-run", "pod", "zone", "v5p:2x2x2", "lfjax", "train", *workdir]
    done = run(script)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*gs://bucket/x: .*TPU_SETUP.*\n", done.stderr)
    assert done.stdout == ""


# A Cloud of one slice with two workers: its state in a file, a home folder each, commands run on both at a time.
GCLOUD = """
echo "$4" >>"$CLOUD/called"
slice=$CLOUD/slice
for word; do case $word in --command=*) command=${word#*=} ;; --output-directory=*) folder=${word#*=} ;; esac; done
case $4 in
  describe)
    echo 'WARNING: all the same' >&2
    cat "$slice/state" 2>/dev/null || { echo "ERROR: (gcloud) NOT_FOUND: Resource 'pod' was not found" >&2; exit 1; } ;;
  start) echo READY >"$slice/state" ;;
  create) mkdir -p "$slice/0" "$slice/1" && echo READY >"$slice/state" ;;
  delete) rm -r "$slice" ;;
  *)
    [ "$(cat "$slice/state")" = READY ] || exit 255
    if [ "$4" = scp ]; then cp "$5" "$slice/0" && cp "$5" "$slice/1"; exit; fi
    for k in 0 1; do
      (cd "$slice/$k" && HOME=$PWD WORKER=$k exec bash -c "$command") >"${folder:-$CLOUD}/$k.log" &
      pids[k]=$!
    done
    status=0
    for k in 0 1; do wait "${pids[k]}" || status=$?; done
    [ -n "${folder:-}" ] || cat "$CLOUD/0.log" "$CLOUD/1.log"
    exit $status ;;
esac
"""
CURL = 'case "${@: -1}" in */agent-worker-number) echo -n "$WORKER" ;; *) echo -n "$ENDPOINTS" ;; esac'


@pytest.fixture
def cloud(tmp_path):
    """Stand-ins of gcloud and of what the workers run; returns the environment. `train` is for the test to add."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (tmp_path / "shared").mkdir()
    fake(bin_dir, "gcloud", GCLOUD)
    fake(bin_dir, "curl", CURL)
    archive = f'for word; do case $word in --output=*) tar -czf "${{word#*=}}" -C {LAUNCH.parent} launch ;; esac; done'
    fake(bin_dir, "git", archive)
    fake(bin_dir, "python3", "exit 0")
    fake(bin_dir, "uv", "if [ $1 = venv ]; then mkdir .venv; fi")
    path = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "CLOUD": str(tmp_path), "TPU_WAIT": "0"}
    return without_slurm() | path | {"ENDPOINTS": "a:1:10.0.0.1,b:2:10.0.0.2"}


def called(tmp_path: pathlib.Path) -> list[str]:
    return [verb for verb in (tmp_path / "called").read_text().split() if verb != "describe"]


def logs(tmp_path: pathlib.Path) -> dict[str, str]:
    """attempt/file -> text."""
    files = sorted((tmp_path / "logs" / "pod").glob("*/*.log"))
    return {f"{file.parent.name.rpartition('-')[2]}/{file.name}": file.read_text() for file in files}


TPU = [str(LAUNCH / "tpu_pod.sh"), "pod", "zone", "v5p:2x2x2"]


def test_a_preempted_tpu_is_deleted_created_again_and_the_run_resumed(tmp_path, cloud):
    train = """
echo "process $LFJAX_PROCESS_ID of $LFJAX_NUM_PROCESSES at $LFJAX_COORDINATOR with $1"
touch "$CLOUD/shared/started$LFJAX_PROCESS_ID"
if [ -e "$CLOUD/shared/saved" ]; then echo resumed; exit 0; fi
while [ ! -e "$CLOUD/shared/started0" ] || [ ! -e "$CLOUD/shared/started1" ]; do sleep 0.05; done
sleep 0.5
touch "$CLOUD/shared/saved"
echo PREEMPTED >"$CLOUD/slice/state"
exit 143"""
    fake(tmp_path / "bin", "train", train)
    done = run([*TPU, "train", "a b"], cwd=tmp_path, env=cloud)
    assert done.returncode == 0, done
    attempt = ["create", "scp", "ssh", "ssh", "ssh"]
    assert called(tmp_path) == [*attempt, "delete", *attempt]
    assert "pod is PREEMPTED, exit code 143: going on" in done.stderr
    written = logs(tmp_path)
    assert sorted(written) == ["1/live.log", "2/0.log", "2/1.log", "2/live.log"]  # the first slice's disks are gone
    for k in range(2):
        first = f"process {k} of 2 at 10.0.0.1:8482 with a b\n"
        assert first in written["1/live.log"]
        assert written[f"2/{k}.log"] == f"{first}resumed\n"


def test_a_tpu_run_that_fails_passes_its_exit_code_on_and_leaves_all_workers_logs(tmp_path, cloud):
    fake(tmp_path / "bin", "train", 'echo "process $LFJAX_PROCESS_ID"; exit $((7 * LFJAX_PROCESS_ID))')
    done = run([*TPU, "train"], cwd=tmp_path, env=cloud | {"ENDPOINTS": "10.0.0.1,10.0.0.2"})
    assert done.returncode == 7
    assert called(tmp_path) == ["create", "scp", "ssh", "ssh", "ssh"]  # nothing is tried again
    written = logs(tmp_path)
    assert (written["1/0.log"], written["1/1.log"]) == ("process 0\n", "process 1\n")
    assert "process 1\n" in written["1/live.log"]
    assert "process 1\n" in done.stdout
    fake(tmp_path / "bin", "train", "exit 0")
    assert run([*TPU, "train"], cwd=tmp_path, env=cloud).returncode == 0
    assert called(tmp_path).count("create") == 1  # the slice was there


def test_a_tpu_that_is_lost_again_and_again_ends_the_launcher(tmp_path, cloud):
    fake(tmp_path / "bin", "train", 'echo PREEMPTED >"$CLOUD/slice/state"; exit 143')
    done = run([*TPU, "train"], cwd=tmp_path, env=cloud | {"TPU_RESTARTS": "1"})
    assert done.returncode != 0
    assert called(tmp_path).count("create") == 2


def with_slice(tmp_path: pathlib.Path, state: str) -> None:
    for k in range(2):
        (tmp_path / "slice" / str(k)).mkdir(parents=True)
    (tmp_path / "slice" / "state").write_text(f"{state}\n")
    fake(tmp_path / "bin", "train", "exit 0")


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_a_tpu_that_was_lost_before_is_deleted_and_created_again(tmp_path, cloud, state):
    with_slice(tmp_path, state)
    assert run([*TPU, "train"], cwd=tmp_path, env=cloud).returncode == 0
    assert called(tmp_path)[:3] == ["delete", "create", "scp"]


def test_a_stopped_tpu_is_started(tmp_path, cloud):
    with_slice(tmp_path, "STOPPED")
    assert run([*TPU, "train"], cwd=tmp_path, env=cloud).returncode == 0
    assert called(tmp_path)[:2] == ["start", "scp"]


@pytest.mark.parametrize("state", ["CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING", "STOPPING"])
def test_a_tpu_on_its_way_is_waited_for_but_not_for_ever(tmp_path, cloud, state):
    with_slice(tmp_path, state)
    done = run([*TPU, "train"], cwd=tmp_path, env=cloud | {"TPU_WAITS": "2"})
    assert (done.returncode, called(tmp_path)) == (1, [])
    assert done.stderr.splitlines()[-1] == f"error: pod is still {state}: waited too long"
    assert len(done.stderr.splitlines()) == 4
    fake(tmp_path / "bin", "sleep", 'echo READY >"$CLOUD/slice/state"')
    assert run([*TPU, "train"], cwd=tmp_path, env=cloud | {"TPU_WAITS": "2"}).returncode == 0
    assert called(tmp_path) == ["scp", "ssh", "ssh", "ssh"]


@pytest.mark.parametrize("state", ["HIDDEN", "STATE_UNSPECIFIED", "TOMORROWS"])
def test_a_tpu_in_an_unknown_state_ends_the_launcher(tmp_path, cloud, state):
    with_slice(tmp_path, state)
    done = run([*TPU, "train"], cwd=tmp_path, env=cloud)
    assert (done.returncode, called(tmp_path)) == (1, [])
    assert re.fullmatch(rf"error: pod is {state}, which .*\n", done.stderr)


@pytest.mark.parametrize(
    "verb, error",
    [
        ("describe", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) There was a problem refreshing your tokens"),
        ("describe", "ERROR: (gcloud.compute.tpus.tpu-vm.describe) PERMISSION_DENIED: Cloud TPU API is disabled"),
        ("create", "ERROR: (gcloud.compute.tpus.tpu-vm.create) Quota limit 'TPUV5PPerProject' has been exceeded"),
    ],
)
def test_an_error_of_gclouds_ends_the_launcher_with_its_text(tmp_path, cloud, verb, error):
    fails = f'if [ "$4" = {verb} ]; then echo "{error}" >&2; exit 3; fi\n'
    fake(tmp_path / "bin", "gcloud", fails + GCLOUD)
    done = run([*TPU, "train"], cwd=tmp_path, env=cloud)
    assert done.returncode in (1, 3)
    assert done.stderr == f"{error}\n" and done.stdout == ""
    assert not (tmp_path / "logs").exists()


def test_a_tpu_run_outlives_its_connection_and_is_watched_again(tmp_path, cloud):
    """The worker script is killed as a lost connection would; the run goes on, and is started once."""
    home = tmp_path / "home"
    (home / "lfjax").mkdir(parents=True)
    train = (
        'echo x >>"$CLOUD/starts"; echo "started"; while [ ! -e "$CLOUD/go" ]; do sleep 0.05; done; echo over; exit 5'
    )
    fake(tmp_path / "bin", "train", train)
    environment = cloud | {"HOME": str(home), "WORKER": "0"}
    worker = ["bash", str(LAUNCH / "tpu_worker.sh")]
    log = home / "lfjax.log"
    with subprocess.Popen([*worker, "one", "train"], env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "started\n"
        first.kill()
    with subprocess.Popen([*worker, "two", "train"], env=environment, stdout=subprocess.PIPE, text=True) as second:
        time.sleep(0.3)
        assert second.poll() is None
        (tmp_path / "go").touch()
        assert second.communicate(timeout=30)[0] == "started\nover\n"
        assert second.returncode == 5
    assert run([*worker, "one", "train"], env=environment).returncode == 5  # gcloud repeats what it could not end
    assert log.read_text() == "started\nover\n"
    assert (tmp_path / "starts").read_text() == "x\n"
    assert run([*worker, "three", "train"], env=environment).returncode == 5  # the launcher run once more
    assert (tmp_path / "starts").read_text() == "x\nx\n"


def test_another_command_is_refused_while_a_tpu_run_goes_on(tmp_path, cloud):
    home = tmp_path / "home"
    (home / "lfjax").mkdir(parents=True)
    train = 'echo "$*" >>"$CLOUD/starts"; while [ ! -e "$CLOUD/go" ] && [ $SECONDS -lt 30 ]; do sleep 0.05; done'
    fake(tmp_path / "bin", "train", train)
    environment = cloud | {"HOME": str(home), "WORKER": "0"}
    worker = ["bash", str(LAUNCH / "tpu_worker.sh")]
    with subprocess.Popen([*worker, "one", "train", "a b"], env=environment) as first:
        wait_for(tmp_path / "starts")
        for words in (["train", "a", "b"], ["train"], ["train", "a b", "--seed=1"]):
            done = run([*worker, "two", *words], env=environment)
            assert done.returncode == 2
            assert re.fullmatch(r"error: a run of another command is going on: train a\\ b ; stop .*\n", done.stderr)
            assert done.stdout == ""
        (tmp_path / "go").touch()
        assert first.wait(timeout=30) == 0
    assert run([*worker, "three", "train", "c"], env=environment).returncode == 0  # the other has ended
    assert (tmp_path / "starts").read_text() == "a b\nc\n"


TASK = """export LFJAX_PROCESS_ID=$SLURM_PROCID
gpus=${SLURM_GPUS_ON_NODE:-0}
[ "$gpus" = 0 ] || export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
exec "$@\""""


def test_slurm_dry_run_prints_the_step(tmp_path):
    fake(tmp_path, "hostname", "echo here")
    environment = without_slurm() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = [str(LAUNCH / "slurm.sbatch"), "--dry-run", "lfjax", "train", "--config=a b.py"]
    done = run(script, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "export LFJAX_COORDINATOR=here:20000 LFJAX_NUM_PROCESSES=1"
    assert shell_words(second) == [
        *("srun", "--kill-on-bad-exit=0", "--label", "--cpus-per-task=32"),
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


# What a JobSet may hold: every field of jobset.x-k8s.io/v1alpha2 (kubernetes-sigs/jobset, jobset_types.go) and of a
# Kubernetes 1.33 Job down to the pod; of the pod those in use. "!": required. A list has one kind of element.
STRINGS = {"*": str}
ANY = object
CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath!": str, "apiVersion": str}}}],
    "resources!": {"limits!": {"google.com/tpu": int, "nvidia.com/gpu": int}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str}],
}
POD = {
    "restartPolicy!": ("Never",),  # a podFailurePolicy allows no other
    "terminationGracePeriodSeconds": int,
    "nodeSelector!": {
        "cloud.google.com/gke-tpu-accelerator": str,
        "cloud.google.com/gke-tpu-topology": str,
        "cloud.google.com/gke-accelerator": str,
    },
    "containers!": [CONTAINER],
    "volumes": [
        {
            "name!": str,
            "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
            "emptyDir": {"medium": ("Memory",), "sizeLimit": str},
        }
    ],
}
EXIT_CODES = {"containerName": str, "operator!": ("In", "NotIn"), "values!": [int]}
POD_FAILURE_RULE = {
    "action!": ("FailJob", "FailIndex", "Ignore", "Count"),
    "onExitCodes": EXIT_CODES,
    "onPodConditions": [{"type!": str, "status": str}],
}
JOB = {
    "parallelism!": int,
    "completions!": int,
    "completionMode!": ("Indexed", "NonIndexed"),
    "backoffLimit!": int,
    "podFailurePolicy": {"rules!": [POD_FAILURE_RULE]},
    "template!": {"metadata": {"labels": STRINGS, "annotations": STRINGS}, "spec!": POD},
    **{key: int for key in ("activeDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimitPerIndex")},
    **{key: int for key in ("maxFailedIndexes",)},
    **{key: bool for key in ("suspend", "manualSelector")},
    **{key: str for key in ("managedBy", "podReplacementPolicy")},
    **{key: ANY for key in ("selector", "successPolicy")},
}
FAILURE_RULE = {
    "name!": str,
    "action!": (
        *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
        *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
    ),
    "onJobFailureReasons": [str],
    "onJobFailureMessagePatterns": [str],
    "targetReplicatedJobs": [str],
}
REPLICATED_JOB = {
    "name!": str,
    "groupName": str,
    "replicas": int,
    "dependsOn": [{"name!": str, "status!": ("Ready", "Complete")}],
    "template!": {"metadata": {"labels": STRINGS, "annotations": STRINGS}, "spec!": JOB},
}
JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": {"name!": str, "namespace": str, "labels": STRINGS, "annotations": STRINGS},
    "spec!": {
        "replicatedJobs!": [REPLICATED_JOB],
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
            "rules": [FAILURE_RULE],
        },
        "coordinator": {"replicatedJob!": str, "jobIndex": int, "podIndex": int},
        "suspend": bool,
        "managedBy": str,
        "ttlSecondsAfterFinished": int,
        **{key: ANY for key in ("successPolicy", "startupPolicy", "volumeClaimPolicies")},
    },
}


def problems(value, schema, place: str = "") -> list[str]:
    """Where `value` is not what `schema` allows."""
    if schema is ANY:
        return []
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{place}: {value!r} is none of {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place}: not a list"]
        return [found for i, item in enumerate(value) for found in problems(item, schema[0], f"{place}[{i}]")]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{place}: {value!r} is no {schema.__name__}"]
    if not isinstance(value, dict):
        return [f"{place}: not a mapping"]
    known = {key.rstrip("!"): part for key, part in schema.items()}
    found = [f"{place}.{key[:-1]}: missing" for key in schema if key.endswith("!") and key[:-1] not in value]
    for key, item in value.items():
        if key in known or "*" in known:
            found += problems(item, known.get(key, known.get("*")), f"{place}.{key}")
        else:
            found.append(f"{place}.{key}: no such field")
    return found


def gke(*arguments: str, **options) -> subprocess.CompletedProcess:
    return run([str(LAUNCH / "gke" / "run.sh"), *arguments], **options)


def filled(size: str, *more: str, **options) -> dict:
    done = gke("--dry-run", size, "trainer", "images/lfjax:1", "configs/x.py", "/mnt/lfjax/x", *more, **options)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout.split("<<'EOF'\n")[1].split("\nEOF\n")[0])


def pod_of(jobset: dict) -> dict:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


GKE_SIZES = {  # size -> template, accelerator, nodes, chips or GPUs of each
    "v5p:4x4x4": ("tpu.yaml", "tpu-v5p-slice", 16, 4),
    "v4:2x2x2": ("tpu.yaml", "tpu-v4-podslice", 2, 4),
    "v5e:4x8": ("tpu.yaml", "tpu-v5-lite-podslice", 8, 4),
    "v6e:1x1": ("tpu.yaml", "tpu-v6e-slice", 1, 1),
    "h100:2x8": ("gpu.yaml", "nvidia-h100-80gb", 2, 8),
    "l4:1x1": ("gpu.yaml", "nvidia-l4", 1, 1),
    "nvidia-h100-mega-80gb:4x8": ("gpu.yaml", "nvidia-h100-mega-80gb", 4, 8),
}


@pytest.mark.parametrize("size", GKE_SIZES)
def test_gke_jobsets_hold_what_jobset_and_kubernetes_know(size):
    template, accelerator, nodes, each = GKE_SIZES[size]
    jobset = filled(size)
    assert problems(jobset, JOBSET) == []
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (nodes, nodes, "Indexed")
    assert job["backoffLimit"] == 0  # a lost pod is a lost run: all start again
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True}
    pod = pod_of(jobset)
    (container,) = pod["containers"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "lfjax"}
    kind = "google.com/tpu" if template == "tpu.yaml" else "nvidia.com/gpu"
    assert container["resources"]["limits"] == {kind: each}
    if template == "tpu.yaml":
        topology = size.partition(":")[2]
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        }
        assert nodes * each == math.prod(int(side) for side in topology.split("x"))
    else:
        assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": accelerator}


@pytest.mark.parametrize("size", ["v5p:4x4x4", "h100:2x8"])
def test_the_check_of_jobsets_finds_a_misspelt_or_missing_field_at_every_level(size):
    text = yaml.safe_dump(filled(size))
    fields = {
        line.strip(" -").partition(":")[0] for line in text.splitlines() if re.match(r"[ -]*[\w./-]+:( |$)", line)
    }
    strings = ("alpha.jobset.sigs.k8s.io/exclusive-topology",)  # free to choose
    assert len(fields) > 35
    for field in fields.difference(strings):
        changed = re.sub(rf"^([ -]*){re.escape(field)}:", rf"\1{field}x:", text, flags=re.MULTILINE)
        assert any("no such field" in each for each in problems(yaml.safe_load(changed), JOBSET)), field
    for field in ("name", "replicatedJobs", "completions", "backoffLimit", "nodeSelector", "limits", "kind"):
        changed = re.sub(rf"^( *(- )?){field}:", r"\1unknown:", text, flags=re.MULTILINE)
        assert any("missing" in each for each in problems(yaml.safe_load(changed), JOBSET)), field
    assert problems(yaml.safe_load(text.replace("completions: ", "completions: x")), JOBSET)
    assert problems(yaml.safe_load(text.replace("v1alpha2", "v1alpha1")), JOBSET)


def test_gke_tpu_pods_learn_who_they_are_from_what_gke_tells_them(tmp_path):
    (container,) = pod_of(filled("v5p:2x2x2", "--config.stages=('a','b')"))["containers"]
    show = 'echo "$LFJAX_PROCESS_ID of $LFJAX_NUM_PROCESSES at $LFJAX_COORDINATOR: $*"; exit 7'
    fake(tmp_path, "lfjax", show)
    told = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "trainer-worker-0-0.trainer,trainer-worker-0-1.trainer"}
    environment = without_slurm() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run([*container["command"], *container["args"]], env=environment | told)
    command = "train --config=configs/x.py --workdir=/mnt/lfjax/x --config.stages=('a','b')"
    assert done.stdout == f"1 of 2 at trainer-worker-0-0.trainer:8482: {command}\n"
    assert done.returncode == 7
    (single,) = pod_of(filled("v6e:2x2"))["containers"]
    alone = run([*single["command"], *single["args"]], env=environment)
    assert alone.stdout.startswith(" of  at : train ")  # lfjax is one process, which is told nothing


def test_gke_gpu_pods_learn_who_they_are():
    (container,) = pod_of(filled("h100:2x4"))["containers"]
    environment = {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert environment == {
        "LFJAX_COORDINATOR": "trainer-worker-0-0.trainer:8482",
        "LFJAX_NUM_PROCESSES": "2",
        "LFJAX_PROCESS_ID": index,
        "JAX_LOCAL_DEVICE_IDS": "0,1,2,3",
    }
    assert container["command"] == ["lfjax", "train", "--config=configs/x.py", "--workdir=/mnt/lfjax/x"]


@pytest.mark.parametrize("size", ["v5p:4x4x4", "h100:2x8"])
def test_gke_creates_exactly_what_the_dry_run_prints(tmp_path, size):
    fake(tmp_path, "kubectl", f'echo "$@" >{tmp_path}/arguments; cat >{tmp_path}/jobset; exit $CODE')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LFJAX_CLAIM": "disk", "CODE": "0"}
    odd = """--config.x=a "b" \\c & $(d) 'e' ${NAME}\n\t- f: 'g'\r\n\\n"""
    arguments = (size, "trainer", "images/lfjax:1", "configs/x.py", "/mnt/lfjax/x", odd)
    dry = gke("--dry-run", *arguments, env=environment)
    assert not (tmp_path / "arguments").exists()

    template, accelerator, nodes, each = GKE_SIZES[size]
    words = ["lfjax", "train", "--config=configs/x.py", "--workdir=/mnt/lfjax/x", odd.replace("$(", "$$(")]
    values = {"NAME": "trainer", "IMAGE": "images/lfjax:1", "ACCELERATOR": accelerator, "NODES": nodes}
    values |= {"TOPOLOGY": size.partition(":")[2], "PER_NODE": each, "DEVICES": '"0,1,2,3,4,5,6,7"', "CLAIM": "disk"}
    values["COMMAND"] = json.dumps(words)
    jobset = (LAUNCH / "gke" / template).read_text()
    for key, value in values.items():
        jobset = jobset.replace(f"${{{key}}}", str(value))
    assert dry.stdout.startswith(f"kubectl create -f - <<'EOF'\n{jobset}EOF\n# logs: kubectl logs -f ")

    real = gke(*arguments, env=environment)
    assert real.returncode == 0, real.stderr
    assert (tmp_path / "arguments").read_text() == "create -f -\n"
    assert (tmp_path / "jobset").read_text() == jobset
    container = pod_of(yaml.safe_load(jobset))["containers"][0]
    assert container.get("args", container["command"])[-1] == odd.replace("$(", "$$(")  # Kubernetes' own escape
    assert gke(*arguments, env=environment | {"CODE": "1"}).returncode == 1


@pytest.mark.parametrize(
    "position, value, said",
    [
        (0, "v5p", "write the topology"),
        (0, "v5p:64", "write the topology"),
        (0, "v5p:3x5", "no such slice"),
        (0, "v5p:4x4", "no such slice"),
        (0, "v4:2x4x6", "no such slice"),
        (0, "v4:1x1x2", "no such slice"),
        (0, "v5e:2x2x2", "no such slice"),
        (0, "v6e:4x2", "no such slice"),
        (0, "nvidia-L4:1x1", "small letters"),
        (0, "h100:16", "write nodes x GPUs"),
        (0, "v9:2x2", "not a TPU"),
        (1, "Trainer", "small letters"),
        (4, "gs://bucket/x", "must be under /mnt/lfjax"),
        (4, "runs/x", "must be under /mnt/lfjax"),
        (5, "--config.x=\a", "holds a control character"),
    ],
)
def test_gke_refuses_what_cannot_run(position, value, said):
    arguments = ["v5p:2x2x2", "trainer", "image", "configs/x.py", "/mnt/lfjax/x", "--config.seed=1"]
    arguments[position] = value
    done = gke("--dry-run", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    shown = value.replace("--config.x=\a", "$'--config.x=\\a'")  # as a shell would write it
    assert re.fullmatch(rf"error: [A-Z]+ {re.escape(shown)}: .*{said}.*\n", done.stderr)


@pytest.mark.parametrize("claim", ["a\nb: c", "Disk", "-x", "a b"], ids=["newline", "capital", "dash", "space"])
def test_gke_refuses_a_claim_that_is_no_name(claim):
    arguments = ("--dry-run", "v5p:2x2x2", "trainer", "image", "configs/x.py", "/mnt/lfjax/x")
    done = gke(*arguments, env=os.environ | {"LFJAX_CLAIM": claim})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: LFJAX_CLAIM .*small letters.*\n", done.stderr)


@pytest.mark.parametrize("size", ["v5p:4x4x4", "h100:2x8"])
def test_gke_names_that_yaml_would_not_read_as_text_stay_text(size):
    for word in ("true", "null"):
        arguments = ("--dry-run", size, word, word, "configs/x.py", "/mnt/lfjax/x")
        done = gke(*arguments, env=os.environ | {"LFJAX_CLAIM": "123"})
        jobset = yaml.safe_load(done.stdout.split("<<'EOF'\n")[1].split("\nEOF\n")[0])
        assert problems(jobset, JOBSET) == []
        assert jobset["metadata"]["name"] == pod_of(jobset)["containers"][0]["image"] == word
        assert pod_of(jobset)["volumes"][0]["persistentVolumeClaim"]["claimName"] == "123"


def shell_blocks() -> str:
    """The shell commands of docs/cloud.md."""
    text = (LAUNCH.parent / "docs" / "cloud.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(block for language, block in blocks if language == "sh")


def documented_commands() -> list[str]:
    """The lines of docs/cloud.md that start a launcher, continuation lines joined."""
    lines = shell_blocks().replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"\blaunch/[\w./]+ ", line) and not line.startswith("git archive")]


def test_the_cloud_page_shows_every_launcher():
    shown = {name for line in documented_commands() for name in re.findall(r"\blaunch/([\w./]+) ", line)}
    assert run(["bash", "-n"], input=shell_blocks()).stderr == ""
    assert shown == {"local_cluster.py", "tpu_pod.sh", "slurm.sbatch", "gke/run.sh"}


@pytest.mark.parametrize("line", documented_commands())
def test_the_commands_of_the_cloud_page_run_dry(tmp_path, line):
    for program in ("gcloud", "kubectl", "srun", "sbatch"):
        fake(tmp_path, program, f"touch {tmp_path}/ran")
    command = re.sub(r"^.*?\blaunch/([\w./]+)( --dry-run)? ", rf"{LAUNCH}/\1 --dry-run ", line)
    environment = without_slurm() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run(["bash", "-c", command], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    config = re.search(r"configs/(quickstart|tiny|mine)\.py", done.stdout)
    assert config is not None
    assert config[1] == "mine" or (LAUNCH.parent / config[0]).is_file()
    assert not (tmp_path / "ran").exists()
