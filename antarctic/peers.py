"""The processes of one run notice that another one, or torchrun, has died.

Every process keeps a connection with rank 0, which stays silent until both are done. Who connects
must send a secret that only processes of the same run have read in torchrun's store.
"""

import hmac
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

from antarctic.errors import print_safely

JOIN_TIMEOUT = timedelta(minutes=5)  # some hosts load libraries slowly
PENDING = 100  # connections that rank 0 keeps beside its peers until they have sent the secret
ACCEPTED, GOODBYE = b"+", b"."

peer_sockets = []  # connections to rank 0; on rank 0, to all others
main_done = threading.Event()  # a peer that leaves now has not died


def stop(reason):
    """Ends this process as by Ctrl-C, whatever it is doing. For threads beside the main one."""
    if not main_done.is_set():
        print_safely(reason, "stderr")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


# --------------------------------------------------------------------------------------- torchrun

def watch_launcher():
    """Ends this process, as by Ctrl-C, within seconds after torchrun has died by SIGKILL: then
    nothing else ends the processes that it started. Where it did not start this one, does nothing.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch():
        # If so, torchrun died before the line above. Another program may have taken its port.
        if not (is_orphan() or store_is_gone()):
            while os.getppid() == launcher:
                if main_done.wait(1):
                    return
        stop("this process stops, as torchrun has ended")

    threading.Thread(target=watch, daemon=True).start()


def is_orphan():
    """Whether the first process of this machine is the parent, since what started this one has
    ended. In a container torchrun may be that process, and it is a Python."""
    try:
        return os.getppid() == 1 and "python" not in os.path.basename(os.readlink("/proc/1/exe"))
    except OSError:  # it is another user's, or there is no /proc
        return True


def store_is_gone():
    """Whether nothing listens any more where torchrun's own store was when it started this process.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False  # rank 0 will open it
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
                                 timeout=10).close()
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError, OverflowError):  # it cannot be known
        pass
    return False


# ------------------------------------------------------------------------------------ one another

def watch_peers(store, rank, world):
    """Connects every process with rank 0 by a socket that stays silent until both are done.

    Where a connection breaks, the process at its other end was killed or its host is gone. Then
    this process stops as by Ctrl-C, whatever it is doing; so all processes end within a minute.
    store: torchrun's. Raises OSError where a process does not come within JOIN_TIMEOUT.
    """
    if rank == 0:
        secret = secrets.token_hex(32)
        local = os.environ.get("LOCAL_WORLD_SIZE") == str(world)  # all are on this host
        host = "127.0.0.1" if local else os.environ["MASTER_ADDR"]
        with open_server(local) as server:
            store.set("peers", f"{server.getsockname()[1]} {secret} {host}")
            peers = accept_peers(server, secret.encode(), world - 1)
    else:
        port, secret, host = store.get("peers").decode().split(" ")
        peers = [connect((host, int(port)), secret.encode())]
    peer_sockets.extend(peers)
    for peer in peers:
        # The system probes the connection, however busy the process is: 40 s without answer end it.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 5)):
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        threading.Thread(target=listen, args=(peer, rank, world), daemon=True).start()


def open_server(local):
    """A socket that listens on a free port: to this host alone, or to all, as the address under
    which other hosts reach this one need not be its own."""
    if local:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def accept_peers(server, secret, number):
    """The connections of so many processes that know the secret, a list of sockets.

    No stranger keeps them out: each connection is read as it sends, one that sends something else
    is closed, and of those that send nothing, the oldest once there are more than PENDING. Raises
    TimeoutError after JOIN_TIMEOUT.
    """
    end = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    peers, pending = [], {}  # {connection: what it has sent}, the oldest first
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        def forget(connection):
            selector.unregister(connection)
            return pending.pop(connection)

        selector.register(server, selectors.EVENT_READ)
        while len(peers) < number:
            if time.monotonic() > end:
                raise TimeoutError(f"{number - len(peers)} of {number} processes did not come")
            for key, _ in selector.select(1):
                connection = key.fileobj
                if connection is server:
                    with suppress(OSError):  # it has left again
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ)
                        pending[connection] = b""
                elif connection in pending:
                    sent = receive(connection, len(secret) - len(pending[connection]))
                    pending[connection] += sent
                    if sent and len(pending[connection]) < len(secret):
                        continue
                    if hmac.compare_digest(forget(connection), secret) and admit(connection):
                        peers.append(connection)
                    else:
                        connection.close()
            while len(pending) > PENDING + number:
                oldest = next(iter(pending))
                forget(oldest)
                oldest.close()
        for connection in pending:
            connection.close()
    return peers


def receive(connection, most):
    """Up to so many bytes of a connection, b"" where it has broken."""
    try:
        return connection.recv(most)
    except OSError:
        return b""


def admit(connection):
    """Tells a process that rank 0 knows it. Returns whether it is still there."""
    try:
        connection.setblocking(True)
        return connection.send(ACCEPTED) == 1
    except OSError:
        return False


def connect(address, secret):
    """A connection with rank 0, which has accepted it. Raises OSError where rank 0 is gone."""
    end = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while time.monotonic() < end:
        peer = socket.create_connection(address, timeout=JOIN_TIMEOUT.total_seconds())
        with suppress(OSError):
            peer.sendall(secret)
            if peer.recv(1) == ACCEPTED:
                peer.settimeout(None)
                return peer
        peer.close()  # too many strangers came with it
        time.sleep(0.1)
    raise TimeoutError("the first process does not answer")


def listen(peer, rank, world):
    """Waits until a peer says goodbye, or ends this process where it has died."""
    heard = None
    while heard not in (GOODBYE, b""):
        heard = receive(peer, 1)  # b"" also where its host does not answer
    if not heard:
        other = "another one" if rank == 0 else "the first one"
        stop(f"process {rank} of {world} stops, as {other} has ended")


def leave():
    """Tells the other processes that this one ends without having died."""
    main_done.set()
    while peer_sockets:
        with suppress(OSError):  # it left before
            peer_sockets.pop().send(GOODBYE)
