"""The processes that torchrun starts: their ranks, what they exchange, and how each notices that
another has died.

One process is not a special case: rank 0 of a world of 1. torch is imported only where several
processes run, so that `--help` and everything else that is light does not wait for it.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import timedelta

from antarctic.errors import InputError

JOIN_TIMEOUT = timedelta(
    minutes=5)  # torchrun starts all together, but some hosts load libraries slowly
NO_TIMEOUT = timedelta(
    days=7)  # rank 0 may work for hours while the others wait; peer_sockets tell who is gone

peer_sockets = []  # connections to rank 0; on rank 0, to all others
main_done = threading.Event()  # a peer that leaves now has not died


def is_joined():
    """Whether this process has joined others. Only then torch.distributed is loaded."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def rank_and_world():
    """(rank, number of processes). It is (0, 1) unless torchrun started several; then this one
    joins the others."""
    if not is_joined():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        join()
    from torch import distributed
    return distributed.get_rank(), distributed.get_world_size()


def join():
    """Joins the processes that torchrun started. Raises InputError where one of them does not
    come."""
    import torch
    from torch import distributed
    with collective_errors():
        store, rank, world = next(distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))
        watch_peers(store, rank, world)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world,
                                       timeout=NO_TIMEOUT)


def watch_peers(store, rank, world):
    """Ties every process to rank 0 by a connection that stays silent until both are done.

    Where a connection breaks, its other end was killed or its host is gone. This process then
    stops as by Ctrl-C, whatever it is doing; so all processes end within a minute.
    """
    if rank == 0:
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True
                } if socket.has_dualstack_ipv6() else {}
        with socket.create_server(("", 0), **both) as server:
            store.set("peer_port", str(server.getsockname()[1]))
            server.settimeout(JOIN_TIMEOUT.total_seconds())
            peer_sockets.extend(server.accept()[0] for _ in range(world - 1))
    else:
        peer_sockets.append(
            socket.create_connection((os.environ["MASTER_ADDR"], int(store.get("peer_port")))))

    def listen(peer):
        try:
            goodbye = peer.recv(1)
        except OSError:  # its host does not answer
            goodbye = b""
        if not goodbye and not main_done.is_set():
            other = "another one" if rank == 0 else "the first one"
            print(f"process {rank} of {world} stops, as {other} has ended", file=sys.stderr,
                  flush=True)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    for peer in peer_sockets:
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE,
                        1)  # the system asks, however busy the processes are
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5),
                            ("TCP_KEEPCNT", 5)):  # no answer for 40 s: gone
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=listen, args=(peer,), daemon=True).start()


def leave():
    """Tells the other processes that this one ends without having died."""
    main_done.set()
    while peer_sockets:
        with suppress(OSError):  # it left before
            peer_sockets.pop().send(b".")


def leave_together():
    """Waits for all processes, so that none ends before rank 0 has written everything; then
    leaves."""
    if gather_lists([0])[1:]:
        leave()
        from torch import distributed
        distributed.destroy_process_group()


@contextmanager
def collective_errors():
    """Around what all processes do at once. Raises InputError where one of them is not there any
    more."""
    try:
        yield
    except (RuntimeError, OSError) as error:  # RuntimeError: gloo's and NCCL's
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"another process of this run is not there any more ({reason}); "
                         f"rerun the same command to resume") from error


def gather_lists(items):
    """The lists of all processes one behind the other, by rank; on all of them."""
    rank, world = rank_and_world()
    if world == 1:
        return list(items)
    from torch import distributed
    lists = [None] * world
    with collective_errors():
        distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def all_reduce_sum(tensors):
    """Replaces each tensor by its sum over all processes, in one collective. All have one device
    and are float32."""
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
    """The result of make(), which rank 0 alone calls, on all processes. What looks at files or
    writes them goes through here.

    An InputError of make() is raised on rank 0 and ends the others with exit code 2.
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
