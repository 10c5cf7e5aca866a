"""How a script starts and stops: a user's error is one sentence, Ctrl-C takes seconds at most."""

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

cleanup = ExitStack()  # run() closes it when main() has ended: locks for the whole run


def run(main, alone=False):
    """Runs a script's main().

    An InputError ends it with one sentence and exit code 2. Ctrl-C, and SIGTERM, which batch
    systems send before they kill, end it with one sentence and 130. alone: of torchrun's processes
    rank 0 does all the work.
    """
    # On busy cores, threads that spin while they wait take 3 to 60 times as long. OpenMP reads this
    # when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Loading libraries makes many objects and hardly any garbage: collecting takes a fifth of it.
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
            if threading.current_thread() is threading.main_thread():  # others get no signals
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
    """Ends the process without any cleanup."""
    print(STOPPED, file=sys.stderr, flush=True)
    os._exit(130)


def stop_within_seconds():
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt, and end the process if it still runs four
    seconds later: Python handles no signal in the middle of a library's long call."""
    def stop(*_):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second one would only disturb the cleanup
        raise KeyboardInterrupt

    def unraisable(unraised):
        if unraised.exc_type is not KeyboardInterrupt:
            return sys.__unraisablehook__(unraised)
        # Nothing can be raised while an object is deleted, so the signal is sent again.
        signal.signal(signal.SIGINT, stop)
        main_thread = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT)).start()

    def stop_if_late():
        with reader:
            # b"" means that run() has closed the other end.
            if reader.recv(1) and not main_done.wait(4):
                stop_at_once()

    sys.unraisablehook = unraisable
    reader, writer = socket.socketpair()
    cleanup.enter_context(writer).setblocking(False)
    for number in SIGNALS:
        signal.signal(number, stop)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    cleanup.callback(signal.set_wakeup_fd, previous)
    threading.Thread(target=stop_if_late, daemon=True).start()
