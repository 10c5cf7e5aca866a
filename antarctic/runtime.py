"""How a script starts and stops: a user's error is one sentence, Ctrl-C takes seconds at most."""

import gc
import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

from antarctic.distributed import launched, leave_together, rank_and_world
from antarctic.errors import InputError, SafeStream, escape_control, print_safely
from antarctic.peers import main_done, watch_launcher

STOPPED = "\nstopped; finished files are whole, rerun the same command to resume"
SIGNALS = signal.SIGINT, signal.SIGTERM

cleanup = ExitStack()  # run() closes it when main() has ended: locks for the whole run
stopped = threading.Event()  # by Ctrl-C or SIGTERM


def run(main, alone=False):
    """Runs a script's main().

    An InputError, or a file that cannot be read or written, ends it with one sentence and exit code
    2. Ctrl-C, and SIGTERM, which batch systems send before they kill, end it with one sentence and
    130. alone: of torchrun's processes rank 0 does all the work.
    """
    # On busy cores, threads that spin while they wait take 3 to 60 times as long. OpenMP reads this
    # when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Loading libraries makes many objects and hardly any garbage: collecting takes a fifth of it.
    gc.set_threshold(100_000, 50, 100)
    main_done.clear()
    stopped.clear()
    with safe_output():
        rank, world = launched()
        if alone and world > 1:
            if rank > 0:
                return
            print_safely("this script uses one process of those that torchrun started", "stderr")
            os.environ["WORLD_SIZE"] = "1"
        try:
            try:
                if threading.current_thread() is threading.main_thread():  # others get no signals
                    stop_within_seconds()
                    watch_launcher()
                rank_and_world()
                main()
                leave_together()
            finally:
                main_done.set()
                cleanup.close()
        except (Exception, KeyboardInterrupt) as error:
            # A library that is stopped while it is loaded may raise an error of its own instead.
            if stopped.is_set() or isinstance(error, KeyboardInterrupt):
                print_safely(STOPPED, "stderr")
                sys.exit(130)
            if not (sentence := sentence_of(error)):
                raise
            print_safely(f"error: {sentence}", "stderr")
            sys.exit(2)


def sentence_of(error):
    """What run() says of an exception that is a user's or the system's fault; None of another."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        path = "a file" if error.filename is None else os.fsdecode(error.filename)
        return (f"cannot use {escape_control(path)} ({error.strerror}); finished files are whole, "
                "so rerun the same command once this is fixed")
    return None


@contextmanager
def safe_output():
    """Makes standard output and standard error SafeStreams: no print, bar, warning or help fails,
    whatever they are.

    A descriptor that is closed (>&-) becomes /dev/null, since a file of the results would get its
    number, and with it what libraries and other programs print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # open() takes the lowest free number, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(SafeStream, streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # so that nothing is left that Python could fail to write at exit
        sys.stdout, sys.stderr = streams


def stop_at_once():
    """Ends the process without any cleanup."""
    print_safely(STOPPED, "stderr")
    os._exit(130)


def stop_within_seconds():
    """Makes Ctrl-C and SIGTERM raise KeyboardInterrupt, and end the process if it still runs four
    seconds later: Python handles no signal in the middle of a library's long call, and what a
    library does when Python exits may wait for ever."""
    def stop(*_):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second one would only disturb the cleanup
        stopped.set()
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
            if not reader.recv(1):  # run() has closed the other end
                return
            end = time.monotonic() + 4
            if not main_done.wait(4):
                stop_at_once()
            time.sleep(max(0, end - time.monotonic()))
            os._exit(130)

    sys.unraisablehook = unraisable
    reader, writer = socket.socketpair()
    cleanup.enter_context(writer).setblocking(False)
    for number in SIGNALS:
        signal.signal(number, stop)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    cleanup.callback(signal.set_wakeup_fd, previous)
    threading.Thread(target=stop_if_late, daemon=True).start()
