"""How a script starts and stops: errors of the user in one sentence, Ctrl-C and SIGTERM within
seconds."""

import gc
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack

from antarctic.distributed import leave_together, main_done, rank_and_world
from antarctic.errors import InputError

STOPPED = "\nstopped; finished files are whole, rerun the same command to resume"
SIGNALS = signal.SIGINT, signal.SIGTERM

cleanup = ExitStack(
)  # what run() closes when main() has ended: locks that are held for the whole run


def run(main, alone=False):
    """Runs a script's main().

    InputError becomes one sentence and exit code 2; Ctrl-C one sentence and 130, and SIGTERM, which
    batch systems send before they kill, the same. alone: rank 0 of torchrun's processes does it
    all.
    """
    # Threads that spin while they wait for one another take 3 to 60 times as long where other work
    # keeps the cores busy. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # While libraries load, a fifth of the time goes into looking for garbage that is not there.
    gc.set_threshold(100_000, 50, 100)
    main_done.clear()
    if alone and "RANK" in os.environ:
        if int(os.environ["RANK"]) > 0:
            return
        if os.environ["WORLD_SIZE"] != "1":
            print("this script uses one process of those that torchrun started", file=sys.stderr)
        os.environ["WORLD_SIZE"] = "1"
    try:
        try:
            if threading.current_thread() is threading.main_thread():  # the only one that may
                stop_within_seconds()
            rank_and_world()
            main()
            leave_together()
        finally:
            main_done.set()
            cleanup.close()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)


def stop_at_once():
    print(STOPPED, file=sys.stderr, flush=True)
    os._exit(130)


def stop_within_seconds():
    """Has Ctrl-C and SIGTERM raise KeyboardInterrupt, and end the process where it still runs four
    seconds later: Python hears of no signal in the middle of a library's long call."""
    def stop(*_):
        for number in SIGNALS:
            signal.signal(number,
                          signal.SIG_IGN)  # one is enough: a second would only disturb the cleanup
        raise KeyboardInterrupt

    def unraisable(unraised):
        if unraised.exc_type is not KeyboardInterrupt:
            return sys.__unraisablehook__(unraised)
        signal.signal(
            signal.SIGINT,
            stop)  # lost while an object was deleted, where nothing can be raised: so once more
        threading.Timer(0.1, signal.pthread_kill,
                        (threading.main_thread().ident, signal.SIGINT)).start()

    def stop_if_late():
        with reader:
            if reader.recv(1) and not main_done.wait(4):  # b"": run() has closed the other end
                stop_at_once()

    sys.unraisablehook = unraisable
    reader, writer = socket.socketpair()
    cleanup.enter_context(writer).setblocking(False)
    for number in SIGNALS:
        signal.signal(number, stop)
    cleanup.callback(signal.set_wakeup_fd,
                     signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False))
    threading.Thread(target=stop_if_late, daemon=True).start()
