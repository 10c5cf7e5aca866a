"""How a run starts, stops and shares its work: signals, errors in one sentence, and the processes of torchrun.

Scripts import this first: from then on Ctrl-C ends with a sentence, also while the libraries load.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

STOPPED = "\nstopped; finished files are whole, run the same command again to go on"


def stop_at_once(*_):
    print(STOPPED, file=sys.stderr, flush=True)
    os._exit(130)


if Path(sys.argv[0]).resolve() in Path(__file__).resolve().parent.glob("*.py"):  # a script: until run() nothing has begun
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, stop_at_once)

# Threads that spin while they wait for one another take 3 to 60 times as long where other work keeps the cores busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded
import torch
from torch import distributed

JOINING = timedelta(minutes=5)  # torchrun's processes start together, but some hosts load libraries slowly
lifelines = []  # connections to the first process; of the first one to all others


class InputError(Exception):
    """What a user gave cannot be used. The message is one sentence that says what was tried and what to do."""

    def __init__(self, message):
        super().__init__(shown(message))


def shown(text):
    """A text of a user's as a terminal may get it: control characters, and marks that turn the reading direction, as escapes; the
    beginning of a very long one."""
    text = str(text)
    if len(text) > 2000:
        text = text[:2000] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text):
    """Prints a line, whatever standard output is, since no print may cost a result: an encoding
    that lacks a character gets its escape, and a pipe that nobody reads any more, or a full disk,
    nothing from then on. Returns the error that kept it from being printed, else None."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # or Python would try again as it ends
        return error
    return None


def run(main, alone=False):
    """Runs a script's main(). InputError becomes one sentence and exit code 2, Ctrl-C one sentence and 130, and SIGTERM, which
    batch systems send before they kill, the same. alone: of torchrun's processes the first does it all."""
    over.clear()
    if alone and "RANK" in os.environ:
        if int(os.environ["RANK"]) > 0:
            return
        if os.environ["WORLD_SIZE"] != "1":
            print("of the processes that torchrun started this script uses one", file=sys.stderr)
        os.environ["WORLD_SIZE"] = "1"
    try:
        try:
            if threading.current_thread() is threading.main_thread():  # the only one that may
                stop_within_seconds()
            process()
            main()
            if gather([0])[1:]:  # none leaves before the first one has written everything
                say_goodbye()
                distributed.destroy_process_group()
        finally:
            over.set()
            held.close()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)


over, held = threading.Event(), ExitStack()  # of run(): whether main() has ended, and the locks that it holds until then


def stop_within_seconds():
    """Has Ctrl-C and SIGTERM raise KeyboardInterrupt, and end the process where it has not ended four seconds later: in the
    middle of a long call of a library Python hears of no signal."""
    def stop(*_):
        for sent in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sent, signal.SIG_IGN)  # one is enough: a second would only disturb the cleaning up
        raise KeyboardInterrupt

    def swallowed(what):
        if what.exc_type is not KeyboardInterrupt:
            return sys.__unraisablehook__(what)
        signal.signal(signal.SIGINT, stop)  # while an object was deleted, where nothing can be raised: so once more
        threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()

    def wait():
        with heard:
            if heard.recv(1) and not over.wait(4):  # nothing comes where run() has closed the other end
                stop_at_once()

    sys.unraisablehook = swallowed
    heard, told = socket.socketpair()
    held.enter_context(told).setblocking(False)
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, stop)
    held.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False))
    threading.Thread(target=wait, daemon=True).start()


# --------------------------------------------------------------------------------------------- processes

def process():
    """(rank, number of processes). It is (0, 1) unless torchrun started several; then this one joins the others."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        with together():
            store, rank, world = next(distributed.rendezvous("env://", timeout=JOINING))
            hold_together(store, rank, world)
            # No limit to a wait: the first may work for hours where the others have nothing to do. Who is gone, lifelines tell.
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                                           world_size=world, timeout=timedelta(days=7))
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def hold_together(store, rank, world):
    """Ties every process to the first by a connection on which nothing is said until both are done. Where one breaks, its other
    end was killed or its host is gone, and this process stops as by Ctrl-C, whatever it is doing: so all end, within a minute.
    """
    if rank == 0:
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        with socket.create_server(("", 0), **both) as server:
            store.set("lifelines", str(server.getsockname()[1]))
            server.settimeout(JOINING.total_seconds())
            lifelines.extend(server.accept()[0] for _ in range(world - 1))
    else:
        lifelines.append(socket.create_connection((os.environ["MASTER_ADDR"], int(store.get("lifelines")))))

    def listen(line):
        try:
            told = line.recv(1)
        except OSError:  # its host does not answer
            told = b""
        if not told and not over.is_set():
            other = "another one" if rank == 0 else "the first one"
            print(f"process {rank} of {world} stops, as {other} has ended", file=sys.stderr, flush=True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    for line in lifelines:
        line.settimeout(None)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # the system asks, however busy the processes are
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 5)):  # 40 s without an answer: gone
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=listen, args=(line,), daemon=True).start()


def say_goodbye():
    over.set()
    while lifelines:
        with suppress(OSError):  # gone before
            lifelines.pop().send(b".")


@contextmanager
def together():
    """Around what all processes do at once. Raises InputError where one of them is not there any more."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # RuntimeError: gloo's and NCCL's
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"another process of this run is not there any more ({reason}); run the same command again to go on") from error


def gather(things):
    """The lists of all processes one behind the other, by rank; on all of them."""
    lists = [things] * process()[1]
    if len(lists) > 1:
        with together():
            distributed.all_gather_object(lists, things)
    return [thing for some in lists for thing in some]


def add_up(tensors):
    """Replaces each tensor by its sum over all processes, in one go; they all have one device and float32."""
    if process()[1] > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with together():
            distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def first(make):
    """What make() gives on the first process, which alone looks at and writes files; on all of them. Its InputError ends all.
    """
    rank, world = process()
    thing = error = None
    if rank == 0:
        try:
            thing = make()
        except InputError as caught:
            error = caught
    both = [thing, error]
    if world > 1:
        with together():
            distributed.broadcast_object_list(both)
    if error:
        raise error
    if both[1]:
        say_goodbye()
        sys.exit(2)  # the first one says why
    return both[0]
