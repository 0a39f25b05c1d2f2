"""The `lfjax` command. Exit codes: 0 done, 1 training failed, 2 bad input (one line), 130 interrupted (state saved)."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

import lfjax
from lfjax import cache, files
from lfjax.config import BadLines, InputError
from lfjax.signals import handled
from lfjax.terminal import line, note, show, visible

BEGAN = time.perf_counter()  # of this process, but for what Python itself needs to start
HEARTBEAT_SECONDS = 40  # without a sign of life from another process
LEAVE_SECONDS = 10.0  # for the others to end as well, where this process has failed


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    if argv is None:
        huge_pages()
    if sys.stdout is None:  # closed, as `>&-` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    code = 1
    try:
        code = _command(argv)
        return code
    finally:
        if code:
            _leave_soon(code)


def _command(argv: list[str] | None) -> int:
    parser = _Parser(prog="lfjax", description="Language feedback to better language models, in JAX.")
    parser.add_argument("--version", action="version", version=f"lfjax {lfjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train_arguments(commands.add_parser("train", help="run or resume the stages of a config"))
    commands.add_parser("configs", help="the configs that come with lfjax").set_defaults(run=_configs)
    methods = commands.add_parser("methods", help="every stage: what it learns from, its steps, sources, keys")
    methods.add_argument("name", nargs="?", help="a stage, or module:STAGE: all its keys with their defaults")
    methods.add_argument("--markdown", action="store_true", help="as docs/methods.md")
    methods.set_defaults(run=_methods)
    _sample_arguments(commands.add_parser("sample", help="continue prompts with a model"))
    _score_arguments(commands.add_parser("score", help="what a reward model or a classifier says of texts"))
    _eval_arguments(commands.add_parser("eval", help="perplexity of a text, or log-probabilities of completions"))
    _import_arguments(commands.add_parser("import", help="read and check a model folder, and write it in our layout"))
    _export_arguments(commands.add_parser("export", help="write a model for transformers and what reads its layout"))
    report = commands.add_parser("report", help="write WORKDIR/report.html")
    report.add_argument("workdir")
    report.set_defaults(run=_report)
    _feedback_arguments(commands.add_parser("feedback", help="convert published feedback to records"))
    commands.add_parser("doctor", help="versions, devices, memory, caches, and what is wrong").set_defaults(run=_doctor)
    arguments = argparse.Namespace(command="")
    spare_threads()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model writes what a terminal's encoding may not have
    sys.stderr, stderr = Unfailing(sys.stderr), sys.stderr
    try:
        for argument in argv or ():
            if "\0" in argument:
                raise InputError(f"lfjax: argument {argument!r} holds a NUL character, which no path can; take it out")
        arguments, rest = parser.parse_known_args(argv)
        if rest and arguments.command != "train":
            raise InputError(f"lfjax {arguments.command}: unknown argument {rest[0]}; see lfjax {arguments.command} -h")
        code = arguments.run(arguments, rest)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _refuse(*(error.lines if isinstance(error, BadLines) else [str(error)]))
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from what is saved" if arguments.command == "train" else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has enough, as in `lfjax sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's own flush at exit fails no more
        return 0
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        place = error.filename or getattr(arguments, "workdir", f"lfjax {arguments.command}")
        fix = "free some space or mend what stands in the way, then start the same command again"
        return _refuse(f"{place}: {error.strerror}; {fix}")
    except Exception as error:
        if _is_lost_process(error):
            lost = "another process of this run has ended, see what it says; start the same command again, it goes on"
            cause = " ".join(str(error).split())[:200]
            note(f"error: {lost} from the last checkpoint: {cause}")
            return 1
        if not _is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:200] or "MemoryError"
        fix = "take a smaller batch_size, shorter sequences, a smaller model, or more devices"
        return _refuse(f"lfjax {arguments.command}: out of memory: {cause}; {fix}")
    finally:
        sys.stderr = stderr


class Unfailing:
    """A stream for notes and progress that goes on when nobody takes them: a closed pipe, a full disk, none at all."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """What cannot be written is lost."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As `write`."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether NumPy, Python or XLA says that memory is too small; XLA has no kind of its own for it."""
    signs = ("RESOURCE_EXHAUSTED", "Out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in signs))


_LOST_SIGNS = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "Connection reset", "Connection closed", "Barrier")


def _is_lost_process(error: Exception) -> bool:
    """Whether a collective or a barrier failed because a process is there no more; jax raises several kinds for it."""
    return _is_one_of_several() and any(sign in str(error) for sign in _LOST_SIGNS)


def _leave_soon(code: int) -> None:
    """At its exit jax waits minutes for processes that may be waiting for this one; ends this one before that."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    if _is_one_of_several():
        watch = threading.Timer(LEAVE_SECONDS, leave)
        watch.daemon = True
        watch.start()


def _is_one_of_several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _refuse(*messages: str) -> int:
    print("\n".join(f"error: {line(message)}" for message in messages), file=sys.stderr, flush=True)
    return 2


SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed")


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2."""

    def error(self, message: str):
        raise InputError(f"{self.prog}: {message}; see {self.prog} -h")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_config(), or a name")
    parser.add_argument("--workdir", required=True, metavar="FOLDER", help="the run directory; resumes what is there")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="trace so many steps of every stage")
    parser.add_argument("--follow-links", action="store_true", help="links in the workdir may lead out of it")
    parser.epilog = "Any leaf of the config can be set: --config.data.path=mine.jsonl --config.optim.learning_rate=1e-3"
    parser.set_defaults(run=_train)


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, or a run directory (its last model)")
    parser.add_argument("--stage", help="of a run directory: the stage whose model is meant")
    _base_argument(parser)
    parser.add_argument("--prompt", action="append", help="text to continue; repeatable; default: start from nothing")
    parser.add_argument("--prompts", metavar="FILE", help="records, or a prompt a line; with --output: records to rate")
    parser.add_argument("--output", metavar="FILE", help="the records to write, each with --n responses")
    parser.add_argument("--batch-size", type=int, default=32, help="of --prompts: samples written at a time")
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--max-new-tokens", type=int, help="default: 64, or what fits the model's context")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="text of one token that ends a sample; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_sample)


def _score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, or a run directory (its last model of scores)")
    parser.add_argument("file", help="records (JSON lines, gzipped or not), or a text a line")
    parser.add_argument("--stage", help="of a run directory: the stage whose model is meant")
    _base_argument(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="texts computed at a time")
    parser.add_argument("--output", metavar="FILE", help="write the JSON lines here; default: print them")
    parser.set_defaults(run=_score)


def _base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="FOLDER", help="of a LoRA adapter: the model it is for; default: as it says")


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, or a run directory (its last model)")
    parser.add_argument("--stage", help="of a run directory: the stage whose model is meant")
    _base_argument(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="a text, read as one document: its perplexity, beside an n-gram's")
    what.add_argument("--completions", metavar="FILE", help="JSON lines with prompt and responses: log-probabilities")
    parser.add_argument("--train-text", metavar="FILE", help="what the n-gram learns from; default: FILE as it is read")
    parser.add_argument("--order", type=int, default=3, help="of the n-gram")
    parser.add_argument("--context", type=int, help="tokens of a window; default: the model's context, at most 2048")
    parser.add_argument("--stride", type=int, help="targets of a window; default: half of it")
    parser.add_argument("--batch-size", type=int, default=8, help="windows or completions computed at a time")
    parser.add_argument("--json", action="store_true", help="print JSON: one object, or one a response")
    parser.add_argument("--output", metavar="FILE", help="write that JSON here")
    parser.set_defaults(run=_eval)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder with config.json and safetensors, or a LoRA adapter of one")
    parser.add_argument("target", help="a new folder, or one that lfjax wrote")
    parser.add_argument("--task", choices=("lm", "sequence", "token"), help="the head; default: by 'architectures'")
    _base_argument(parser)
    parser.set_defaults(run=_convert, stage=None, dtype=None, max_shard_size=None)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a model folder, or a run directory (its last language model)")
    parser.add_argument("target", help="a new folder, or one that lfjax wrote")
    parser.add_argument("--stage", help="of a run directory: the stage whose model is meant")
    _base_argument(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what loses nothing")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB: several files and an index")
    parser.set_defaults(run=_convert, task=None)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    with handled(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, whoever catches it
        return _run_config(arguments, overrides)


def _run_config(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from lfjax import config as configs

    for item in overrides:
        if item.startswith("--config.") and "=" not in item:
            raise InputError(f"{item}: no value; write {item}=VALUE")
        if not item.startswith("--config."):
            raise InputError(f"lfjax train: unknown argument {item}; overrides are --config.section.key=value")
    if arguments.profile < 0:
        raise InputError(f"--profile: {arguments.profile}; allowed: 0 (none) or more steps")
    file = configs.find(arguments.config)
    try:
        config = configs.load(file, overrides)
    except SystemExit as stop:
        raise InputError(f"{arguments.config}: mend the config file: it ends the program (exit {stop.code})") from stop
    from lfjax import report, stages

    declared = stages.declared(config.outside)
    configs.validate(config, declared)
    _set_up_jax(config.run.matmul_precision, config.run.compile_cache)

    from lfjax.report import ending, rundir
    from lfjax.report.costs import cost_lines
    from lfjax.run.chain import run_stages
    from lfjax.run.run import Interrupted, Run, TrainingFailed

    run = Run(
        config,
        arguments.workdir,
        declared,
        search=(file.resolve().parent,),
        profile=arguments.profile,
        follow_links=arguments.follow_links,
    )
    try:
        run_stages(run)
    except Interrupted as stop:
        note(f"{stop}; start the same command to go on")
        return 130
    except TrainingFailed as error:
        note(f"error: {error}")
        return 1
    import jax

    if jax.process_index() == 0:
        ended = time.perf_counter()
        path = report.build(arguments.workdir, stages.described)
        done = rundir.read(arguments.workdir)
        costs = cost_lines(done, run.began - BEGAN, time.perf_counter() - ended)
        figures = f"all {len(done.summary)} figures: {Path(arguments.workdir) / 'summary.json'}"
        for row in (*ending.lines(done), f"report: {path}", figures, *costs):
            print(line(row))
    return 0


def _configs(arguments: argparse.Namespace, _) -> int:
    """Prints each config's name and what it is, and where the files lie."""
    from lfjax import config as configs

    known = configs.shipped()
    for name, path in known.items():
        print(f"{name:<{max(map(len, known))}}  {configs.summary(path)}")
    for folder in {path.parent for path in known.values()}:
        print(f"lfjax train --config=NAME; to change one, copy its file: {folder}")
    return 0


def _methods(arguments: argparse.Namespace, _) -> int:
    """Prints what every stage is, or one of them with its keys."""
    from lfjax import methods, stages
    from lfjax.modules import is_named

    outside = (arguments.name,) if is_named(arguments.name) else ()
    declared = stages.declared(outside, key="lfjax methods")
    if arguments.name is not None:
        print(methods.of(declared, list(declared)[-1] if outside else arguments.name), end="")
    else:
        print(methods.markdown(declared) if arguments.markdown else methods.overview(declared), end="")
    return 0


def _set_up_jax(precision: str, compile_cache: bool) -> None:
    """Precision, the compile cache, and where this process is one of several, the others."""
    import jax

    jax.config.update("jax_default_matmul_precision", precision)
    if compile_cache and cache.can_keep(cache.location(), "xla"):
        jax.config.update("jax_compilation_cache_dir", str(cache.location() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _join_processes()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that a named platform is there
        named = os.environ.get("JAX_PLATFORMS", "")
        cause = " ".join(str(error).split())[:200] or "jax has no such platform here"
        raise InputError(f"JAX_PLATFORMS={named}: no device: {cause}; unset it, or see lfjax doctor") from None


def _join_processes() -> None:
    """Where LFJAX_COORDINATOR is set, waits for the other processes, at most LFJAX_COORDINATOR_TIMEOUT seconds.

    jax ends a process that waits in vain with a dump of its C++ stack, so a watch of our own ends it before.
    """
    import jax

    address = os.environ.get("LFJAX_COORDINATOR", "")
    if not address:
        for name in ("LFJAX_NUM_PROCESSES", "LFJAX_PROCESS_ID"):
            if name in os.environ:
                raise InputError(
                    f"{name}: set, but not LFJAX_COORDINATOR=HOST:PORT, where process 0 is; set both or none"
                )
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"LFJAX_COORDINATOR: {address!r}; write HOST:PORT, where process 0 is and may listen")
    processes = _from_environment("LFJAX_NUM_PROCESSES", 1, 2**20)
    process = _from_environment("LFJAX_PROCESS_ID", 0, processes - 1)
    seconds = _from_environment("LFJAX_COORDINATOR_TIMEOUT", 1, 10**6, "300")
    if process == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        _check_free(int(port))

    def give_up() -> None:
        _refuse(_why_alone(host.strip("[]"), int(port), process, processes, seconds))
        os._exit(2)  # the main thread is inside jax and would not hear of an exception

    watch = threading.Timer(seconds, give_up)
    watch.daemon = True
    watch.start()
    jax.distributed.initialize(
        address,
        processes,
        process,
        cluster_detection_method="deactivate",  # else it gives a Slurm task one device of its node
        initialization_timeout=seconds + 60,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    watch.cancel()


def huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> None:
    """Starts this process once more with glibc told to ask for huge pages, where the kernel gives them on request.

    XLA's CPU client takes a step's memory anew each time; in pages of 4 KiB the kernel spends a seventh of a training
    step on handing it out. glibc reads GLIBC_TUNABLES only when a process starts; a glibc.malloc.hugetlb already there
    stays as it is.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    on_request = setting.exists() and "[madvise]" in setting.read_text()
    if "glibc.malloc.hugetlb" in tunables or not on_request or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def spare_threads() -> None:
    """Gives XLA's CPU client more threads than virtual devices, before jax starts.

    With one for each, collectives that meet the next dispatch there can deadlock.
    """
    devices = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if devices:
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 4 * int(devices[1]))))


def _from_environment(name: str, low: int, high: int, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None:
        raise InputError(f"{name}: not set, but LFJAX_COORDINATOR is; give a whole number from {low} to {high}")
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InputError(f"{name}: {text!r}; give a whole number from {low} to {high}")
    return int(text)


def _check_free(port: int) -> None:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        cause = os.strerror(error.errno or 0)
        raise InputError(
            f"LFJAX_COORDINATOR: process 0 cannot listen on port {port}: {cause}; choose another"
        ) from error


def _why_alone(host: str, port: int, process: int, processes: int, seconds: int) -> str:
    """What to say once the time to find the other processes is over."""
    where = f"LFJAX_COORDINATOR={host}:{port}: after {seconds} s"
    more = "or give them more time: LFJAX_COORDINATOR_TIMEOUT (seconds)"
    if process != 0:
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            return (
                f"{where} process {process} has found no process 0 there ({error.strerror or error}); correct the"
                f" address, see whether process 0 has started, {more}"
            )
    return (
        f"{where} not all of LFJAX_NUM_PROCESSES={processes} processes have come; see why the others did not start,"
        f" correct that number, {more}"
    )


def _sample(arguments: argparse.Namespace, _) -> int:
    for name, low in (("n", 1), ("batch_size", 1), ("max_new_tokens", 1), ("temperature", 0.0), ("top_k", 0)):
        value = getattr(arguments, name)
        if value is not None and not value >= low:  # also true of NaN
            raise InputError(f"--{name.replace('_', '-')}: {value}; allowed: at least {low}")
    if not 0 <= arguments.seed < 2**31:
        raise InputError(f"--seed: {arguments.seed}; allowed: 0 up to 2^31 - 1")
    if not 0.0 < arguments.top_p <= 1.0:
        raise InputError(f"--top-p: {arguments.top_p}; allowed: above 0, at most 1")
    for prompt in arguments.prompt or ():
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"--prompt: {prompt!a} is not UTF-8 text; write it in UTF-8, in a UTF-8 locale")
    if bool(arguments.prompts) != bool(arguments.output) or (arguments.prompts and arguments.prompt):
        raise InputError("--prompts: needs --output, the records to write, and goes without --prompt")
    output = _output(arguments.output, arguments.prompts)
    folder = _model_folder(Path(arguments.model), arguments.stage)
    _set_up_jax("highest", True)

    from lfjax.data.sources import records_or_lines
    from lfjax.interop import hf
    from lfjax.records import write_records
    from lfjax.run.samples import sample_records
    from lfjax.sampling.text import sample_texts

    asked = list(records_or_lines(arguments.prompts, prompts=True)) if arguments.prompts else []

    loaded = hf.load(folder, base=arguments.base)
    if loaded.tokenizer is None:
        raise InputError(f"{folder}: no tokenizer in the folder; sampling needs one: put its files there")
    hf.check_language_model(loaded, folder)
    prompts = [prompt for prompt in arguments.prompt or [""] for _ in range(arguments.n)]
    options = {name: getattr(arguments, name) for name in SAMPLING}
    try:
        if output:
            how = {"n": arguments.n, "source": str(folder), "batch_size": arguments.batch_size}
            count = write_records(output, sample_records(loaded, asked, **how, **options))
            print(visible(f"{output}: {count} records of {arguments.n} responses, to rate"), file=_beside(output))
            return 0
        responses = sample_texts(loaded, prompts, **options)
    except InputError as error:
        key, _, rest = str(error).partition(":")
        if key not in ("prompt", *SAMPLING):
            raise
        raise InputError(f"--{key.replace('_', '-')}:{rest}") from error
    for prompt, response in zip(prompts, responses, strict=True):
        show(prompt + response)
    return 0


def _output(name: str | None, *read: str | None) -> Path | None:
    """The file that --output names; raises InputError where it cannot be, or is one of those read."""
    output = Path(name) if name else None
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output: {output}: no file can be written there; name one in a folder that exists")
    if output and any(path and Path(path).resolve() == output.resolve() for path in read):
        raise InputError(f"--output: {output}: is a file to read as well; name another")
    return output


def _score(arguments: argparse.Namespace, _) -> int:
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size: {arguments.batch_size}; allowed: at least 1")
    output = _output(arguments.output, arguments.file)
    folder = _model_folder(Path(arguments.model), arguments.stage, "scorer", "classifier")
    _set_up_jax("highest", True)

    from lfjax.data.sources import records_or_lines
    from lfjax.interop import hf
    from lfjax.run import scores

    records = list(records_or_lines(arguments.file, prompts=False))
    loaded = hf.load(folder, base=arguments.base)
    said = scores.told(loaded, folder)
    if loaded.tokenizer is None:
        raise InputError(f"{folder}: no tokenizer in the folder; scoring text needs one: put its files there")
    rows = list(scores.score_records(loaded, records, said, batch_size=arguments.batch_size))
    if cut := sum(row.get("cut", False) for row in rows):
        note(f"note: {cut} of {len(rows)} texts are longer than the model's context and are cut")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output:
        files.write_text(output, lines, pipe=True)
        print(visible(f"{output}: {len(rows)} scores"), file=_beside(output))
    else:
        show(lines.removesuffix("\n"))
    return 0


def _eval(arguments: argparse.Namespace, _) -> int:
    for name in ("order", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: {getattr(arguments, name)}; allowed: at least 1")
    if arguments.train_text and not arguments.text:
        raise InputError("--train-text: is for --text; completions have no n-gram beside them")
    output = _output(arguments.output, arguments.text, arguments.train_text, arguments.completions)
    folder = _model_folder(Path(arguments.model), arguments.stage)
    _set_up_jax("highest", True)

    from lfjax.interop import hf
    from lfjax.records import read_records
    from lfjax.run import scoring

    texts = [scoring.read_text(path) if path else None for path in (arguments.text, arguments.train_text)]
    records = [] if arguments.text else list(read_records(arguments.completions, feedback=False, responses=True))
    loaded = hf.load(folder, base=arguments.base)
    if loaded.tokenizer is None:
        raise InputError(f"{folder}: no tokenizer in the folder; scoring text needs one: put its files there")
    hf.check_language_model(loaded, folder)
    if texts[0] is not None:
        options = {name: getattr(arguments, name) for name in ("context", "stride", "batch_size", "order")}
        figures = scoring.score_text(loaded, texts[0], name=arguments.text, train_text=texts[1], **options)
        rows = [{"model": str(folder), "text": arguments.text, **figures, "ngram_text": arguments.train_text}]
        shown = scoring.text_table(rows[0])
        if figures["tokens"] < scoring.FEW:
            caution = f"{figures['tokens']} tokens: too few to judge a model by; give {scoring.FEW} or more"
            note(f"note: {arguments.text}: {caution}")
    else:
        rows = scoring.score_completions(loaded, records, batch_size=arguments.batch_size)
        shown = scoring.completions_table(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    beside = _beside(output) if output else sys.stdout
    if output:
        files.write_text(output, lines, pipe=True)
    print(lines if arguments.json else visible(shown), end="", file=beside)
    return 0


def _convert(arguments: argparse.Namespace, _) -> int:
    size = None if arguments.max_shard_size is None else _bytes("--max-shard-size", arguments.max_shard_size)
    folder = Path(arguments.source)
    if arguments.command == "export":
        folder = _model_folder(folder, arguments.stage)
    target = Path(arguments.target).resolve()
    if (
        target != folder.resolve()
        and target.parent.name == "models"
        and (target.parent.parent / "checkpoints").is_dir()
    ):
        raise InputError(f"{arguments.target}: is a run's own model; name a folder outside of {target.parent}")

    import jax

    from lfjax.interop import hf, merge

    options = {"base": arguments.base, "task": arguments.task, "dtype": arguments.dtype, "shard_bytes": size}
    loaded = hf.convert(folder, arguments.target, **options)
    count = sum(x.size for x in jax.tree.leaves(loaded.params))
    tokens = "no tokenizer" if loaded.tokenizer is None else f"a tokenizer of {loaded.tokenizer.vocab_size} tokens"
    place = merge.locate(folder, arguments.base)
    merged = "".join(f", the adapter in {adapter.folder} merged into {place.folder}" for adapter in place.adapters)
    print(visible(f"{arguments.target}: {loaded.config['model_type']}, {count} parameters, {tokens}{merged}"))
    return 0


def _bytes(flag: str, text: str) -> int:
    """A size such as 5GB, 500MiB or 1000000."""
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMG", 1)}
    units |= {f"{p}iB": 1024**i for i, p in enumerate("KMG", 1)}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?i?B?)", text)
    if not found or found[2] not in units or float(found[1]) * units[found[2]] < 1:
        raise InputError(f"{flag}: {text!r}; write a size such as 5GB, 500MB or 200KB")
    return int(float(found[1]) * units[found[2]])


def _model_folder(path: Path, stage: str | None = None, *kinds: str) -> Path:
    """The folder itself; of a run directory the stage's model, or the last one of such a kind ("language model")."""
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; name a model folder or a run directory")
    if stage is not None:
        known = sorted(entry.parent.name for entry in files.inside(path, "models").glob("*/config.json"))
        if stage not in known:
            found = f"its models are of {', '.join(known)}" if known else "it is no run directory with models"
            raise InputError(f"--stage: {path} has no model of {stage!r}; {found}")
        return files.inside(path, f"models/{stage}")
    if not (path / "models").is_dir():
        return path

    from lfjax import stages
    from lfjax.report import rundir

    kinds = kinds or ("language model",)
    for stage in reversed(rundir.stages_that_make(path, kinds, stages.described)):
        if (path / "models" / stage).is_dir():
            return files.inside(path, f"models/{stage}")
    raise InputError(f"{path}/models: no {' or '.join(kinds)} in it yet; finish the stage that makes one first")


def _report(arguments: argparse.Namespace, _) -> int:
    from lfjax import report, stages

    print(visible(str(report.build(arguments.workdir, stages.described))))
    return 0


def _feedback_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    convert = actions.add_parser("convert", help="feedback as others have it -> a JSONL file of records")
    convert.add_argument("format", help="trl, csv, hh, gsm8k or ilf (docs/records.md)")
    convert.add_argument("source", help="the file, gzipped or not")
    convert.add_argument("output", help="the file to write")
    convert.add_argument(
        "--map", action="append", default=[], metavar="FIELD=COLUMN,...", help="csv: rating=score:1..5"
    )
    convert.add_argument("--max-chars", type=int, default=0, help="leave out longer prompts with a response; 0: none")
    parser.set_defaults(run=_feedback)


def _feedback(arguments: argparse.Namespace, _) -> int:
    """Writes the records and says how many, and what was left out."""
    from lfjax.feedback.conversion import convert
    from lfjax.records import write_records

    output = Path(arguments.output)
    if not output.parent.is_dir() or output.is_dir():
        raise InputError(f"{output}: name a file in a folder that is there")
    if Path(arguments.source).resolve() == output.resolve():
        raise InputError(f"{output}: is the file to read as well; name another to write")
    if arguments.max_chars < 0:
        raise InputError(f"--max-chars: {arguments.max_chars}; allowed: 0 (no limit) or more")
    left_out: collections.Counter[str] = collections.Counter()
    records = convert(
        arguments.source, arguments.format, left_out, max_chars=arguments.max_chars, columns=arguments.map
    )
    beside = _beside(output)
    print(visible(f"{output}: {write_records(output, records)} records"), file=beside)
    for reason, count in left_out.items():
        print(visible(f"left out: {count}: {reason}"), file=beside)
    return 0


def _beside(output: Path) -> TextIO:
    """Where to say what was written to `output`: stderr where that is stdout."""
    try:
        same = os.path.samestat(os.stat(output), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        same = False
    return sys.stderr if same else sys.stdout


def _doctor(arguments: argparse.Namespace, _) -> int:
    """Prints what this machine has; returns 1 where something is wrong."""
    from lfjax import doctor

    lines, problems = doctor.examine(cache.location())
    print(visible("\n".join([*lines, *(f"problem: {problem}" for problem in problems)])))
    print("all is well" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
