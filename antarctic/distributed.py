"""The processes that torchrun starts: ranks and collectives.

One process is not a special case: it is rank 0 of a world of 1. torch is imported only where
several processes run, so that --help does not wait for it.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta

from antarctic.errors import InputError, escape_control, print_safely
from antarctic.peers import JOIN_TIMEOUT, leave, watch_peers

NO_TIMEOUT = timedelta(days=7)  # others wait while rank 0 works; watch_peers notices who is gone

RANKS = "WORLD_SIZE", "RANK", "LOCAL_RANK"  # of torchrun, for each process


def is_joined():
    """Whether this process has joined others. If it has not, torch need not be loaded."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def rank_and_world():
    """(rank, number of processes). The first call joins the other processes, if there are any."""
    if not is_joined():
        if launched()[1] == 1:
            return 0, 1
        join()
    from torch import distributed
    return distributed.get_rank(), distributed.get_world_size()


def is_rank0():
    """Whether this process is rank 0. Unlike rank_and_world() this joins no other process, since
    torchrun's variables may be meant for a program that only uses the library."""
    if is_joined():
        return rank_and_world()[0] == 0
    return os.environ.get("RANK", "0") in ("", "0")


def launched():
    """(rank, number of processes) that torchrun's variables state, (0, 1) without them.

    Where they cannot be torchrun's, since some are missing, empty or impossible, a warning says so
    and they leave the environment, where libraries would read them, too.
    """
    values = {name: os.environ[name] for name in RANKS if name in os.environ}
    if not values:
        return 0, 1
    numbers = {name: int(value) for name, value in values.items()
               if value.isascii() and value.isdecimal() and len(value) < 10}
    rank, world = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 0)
    port = os.environ.get("MASTER_PORT", "")
    if (len(numbers) == len(values) and "RANK" in numbers and rank < world
            and numbers.get("LOCAL_RANK", 0) < world and os.environ.get("MASTER_ADDR", "").strip()
            and port.isascii() and port.isdecimal() and 0 < int(port[:9]) < 1 << 16):
        return rank, world
    for name in values:
        del os.environ[name]
    settings = escape_control(" ".join(f"{name}={value}" for name, value in values.items()))
    print_safely(f"warning: ignored {settings} in the environment: torchrun sets WORLD_SIZE, RANK, "
                 "MASTER_ADDR and MASTER_PORT together; this run is a single process", "stderr")
    return 0, 1


def warn(text):
    """Prints a warning, on rank 0: something that the user may not expect, and that does not stop
    the run."""
    if is_rank0():
        print_safely(f"warning: {escape_control(text)}", "stderr")


def warn_of(ids, what):
    """Says on standard error how many images `what` holds for, and the first of them."""
    if ids:
        some = ", ".join(map(repr, ids[:5])) + ", ..." * (len(ids) > 5)
        warn(f"{len(ids)} {what}: {some}")


def join():
    """Joins the processes that torchrun started. Raises InputError where one does not come."""
    import torch
    from torch import distributed
    with collective_errors():
        store, rank, world = next(distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))
        watch_peers(store, rank, world)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world,
                                       timeout=NO_TIMEOUT)


def leave_together():
    """A barrier, so that no process ends before rank 0 has written everything; then leaves."""
    if gather_lists([0])[1:]:
        leave()
        from torch import distributed
        distributed.destroy_process_group()


@contextmanager
def collective_errors():
    """Around a collective. Raises InputError where another process has ended meanwhile."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # RuntimeError: gloo's and NCCL's
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"another process of this run is not there any more ({reason}); "
                         f"rerun the same command to resume") from error


def gather_lists(items):
    """The lists of all processes, concatenated in the order of ranks, on every process."""
    rank, world = rank_and_world()
    if world == 1:
        return list(items)
    from torch import distributed
    lists = [None] * world
    with collective_errors():
        distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def all_reduce_sum(tensors):
    """Replaces each tensor by its sum over all processes, in one collective.

    tensors: float32, all on one device.
    """
    if rank_and_world()[1] == 1:
        return
    import torch
    from torch import distributed
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with collective_errors():
        distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def on_rank0(make):
    """The result of make(), called on rank 0 only, on every process. Looking at files, and writing
    them, goes through here.

    An InputError of make() is raised on rank 0 and ends the other processes with exit code 2.
    """
    rank, world = rank_and_world()
    result = error = None
    if rank == 0:
        try:
            result = make()
        except InputError as caught:
            error = caught
    if world > 1:
        from torch import distributed
        message = [result, error is not None]
        with collective_errors():
            distributed.broadcast_object_list(message)
        if rank > 0 and message[1]:
            leave()
            sys.exit(2)  # rank 0 says why
        result = message[0]
    if error:
        raise error
    return result
