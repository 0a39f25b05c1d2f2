#!/usr/bin/env python3
"""Runs a command as several processes on this machine, a rehearsal of a cluster: N processes of M virtual devices each.

    launch/local_cluster.py -n 2 --devices 4 -- lfjax train --config=configs/tiny.py --workdir=runs/tiny

LFJAX_COORDINATOR, LFJAX_NUM_PROCESSES and LFJAX_PROCESS_ID tell each where the others are. SIGTERM and SIGINT are
passed on. If a process fails or is killed, one line says which and how, and the rest are ended: SIGTERM, and SIGKILL 20
seconds later. One that ends with 130 was asked to stop and has agreed on it with the others: they get those 20 seconds,
and no signal, which would be a second one for some. Exit code: the first that is not 0 (128 + number for a signal).
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

STOPPED = 130  # the exit code of a run that has saved because it was asked to stop
GRACE_SECONDS = 20.0  # from the first failure to the SIGKILL of those still there


def environments(processes: int, devices: int) -> list[dict[str, str]]:
    """What each process's environment gets on top of this one's."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # port 0: any free one
        port = server.getsockname()[1]
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
    shared = {
        "LFJAX_COORDINATOR": f"127.0.0.1:{port}",
        "LFJAX_NUM_PROCESSES": str(processes),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
    }
    return [shared | {"LFJAX_PROCESS_ID": str(index)} for index in range(processes)]


def run(command: list[str], extra: list[dict[str, str]]) -> int:
    """Runs one process for each environment until all have ended; returns the first exit code that is not 0."""
    children, received, code, deadline = [], [], 0, 0.0

    def send(number: int) -> None:
        for child in children:
            child.send_signal(number)  # nothing happens to one that has ended

    def tell(code: int, more: str) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(f"local_cluster: process {codes.index(code)} {how}{more}", file=sys.stderr)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: (received.append(number), send(number)))
    for environment in extra:  # a session each: a terminal's Ctrl-C reaches them once, through here
        children.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))
        if received:  # while the first were starting
            children[-1].send_signal(received[0])
    while None in (codes := [child.poll() for child in children]) or (any(codes) and not deadline):
        if any(codes) and not deadline:
            deadline = time.monotonic() + GRACE_SECONDS
            code = min(filter(None, codes))  # one killed by a signal, before those that failed because of it
            if code != STOPPED and not (received and code == -received[0]):
                tell(code, "; ending the others")
                if not received:  # after a signal they are saving already
                    send(signal.SIGTERM)
        if deadline and time.monotonic() > deadline:
            send(signal.SIGKILL)
        time.sleep(0.05)
    if code == STOPPED and (failed := [late for late in codes if late not in (0, STOPPED)]):
        code = failed[0]
        tell(code, " when all were asked to stop")
    return 128 - code if code < 0 else code


def main(argv: list[str]) -> int:
    """Parses the command line, runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-n", type=int, default=2, help="processes (2)")
    parser.add_argument("--devices", type=int, default=4, help="virtual devices of each (4)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("command", nargs="+", help="after --: what every process runs")
    args = parser.parse_args(argv)
    if min(args.n, args.devices) < 1:
        parser.error("-n and --devices must be at least 1")
    if not args.dry_run and not shutil.which(args.command[0]):
        parser.error(f"{args.command[0]}: no such program; give its path or put its folder on PATH")
    extra = environments(args.n, args.devices)
    for environment in extra if args.dry_run else ():
        print("env", shlex.join([*(f"{key}={value}" for key, value in environment.items()), *args.command]))
    return 0 if args.dry_run else run(args.command, extra)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
