"""Who joins the processes of a run: whoever knows its secret, and nobody else can be in the way."""

import socket
import threading
import time
from contextlib import ExitStack, suppress
from datetime import timedelta

import pytest

from antarctic import peers

SECRET = b"0123456789abcdef" * 4


@pytest.fixture
def joining(monkeypatch):
    """joining(number) starts rank 0, which waits for so many processes. Returns its address, and
    wait(), which returns what accept_peers() returns or raises its exception."""
    with ExitStack() as stack:
        def run(number):
            server = stack.enter_context(peers.open_server(local=True))
            result = []

            def accept():
                try:
                    result.append(peers.accept_peers(server, SECRET, number))
                except OSError as error:
                    result.append(error)

            def wait():
                thread.join(20)
                assert result, "it waits for ever"
                if isinstance(result[0], OSError):
                    raise result[0]
                for connection in result[0]:
                    stack.enter_context(connection)
                return result[0]

            thread = threading.Thread(target=accept, daemon=True)
            thread.start()
            return server.getsockname(), wait
        yield run


def ends(connection):
    """Whether the other end has closed a connection."""
    connection.settimeout(10)
    return peers.receive(connection, 1) == b""


STRANGERS = {
    "says nothing": b"",
    "says too little": SECRET[:-1],
    "says something else": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"x" * 100,
    "knows all but the end": SECRET[:-1] + b"x",
    "is no text": bytes(range(128, 256)),
}


@pytest.mark.parametrize("sent", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_neither_joins_nor_keeps_a_process_out(joining, sent):
    address, wait = joining(2)
    with socket.create_connection(address) as early, socket.create_connection(address) as later:
        early.sendall(sent)
        first = peers.connect(address, SECRET)
        later.sendall(sent)
        second = peers.connect(address, SECRET)
        joined = wait()
        assert len(joined) == 2 and ends(early) and ends(later)
    names = {connection.getpeername() for connection in joined}
    assert names == {first.getsockname(), second.getsockname()}
    for connection in (first, second):
        connection.sendall(peers.GOODBYE)
        connection.close()
    assert {connection.recv(1) for connection in joined} == {peers.GOODBYE}


def test_a_flood_of_strangers_neither_joins_nor_keeps_a_process_out(joining, monkeypatch):
    monkeypatch.setattr(peers, "PENDING", 3)
    address, wait = joining(2)
    with ExitStack() as stack:
        done = threading.Event()

        def flood():
            while not done.is_set():
                with suppress(OSError), socket.create_connection(address) as connection:
                    connection.sendall(b"x")

        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(20)]
        assert ends(silent[0])  # the oldest one of too many
        threads = [threading.Thread(target=flood, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            stack.enter_context(peers.connect(address, SECRET))
        done.set()
        assert len(wait()) == 2 and all(map(ends, silent))


def test_a_process_that_does_not_come_ends_the_wait(joining, monkeypatch):
    monkeypatch.setattr(peers, "JOIN_TIMEOUT", timedelta(seconds=0.5))
    address, wait = joining(2)
    with socket.create_connection(address), peers.connect(address, SECRET):
        with pytest.raises(TimeoutError, match="1 of 2 processes did not come"):
            wait()


def test_a_process_that_rank_0_has_turned_away_comes_again():
    with peers.open_server(local=True) as server, ExitStack() as stack:
        result = []
        thread = threading.Thread(target=lambda: result.append(
            peers.connect(server.getsockname(), SECRET)), daemon=True)
        thread.start()
        for answer in (b"", b"HTTP", peers.ACCEPTED):
            connection = stack.enter_context(server.accept()[0])
            assert connection.recv(100) == SECRET
            connection.sendall(answer)
            if answer != peers.ACCEPTED:
                connection.close()
        thread.join(10)
        assert result[0].gettimeout() is None
        result[0].close()


def test_a_process_does_not_wait_for_a_rank_0_that_has_gone():
    with peers.open_server(local=True) as server:
        address = server.getsockname()
    with pytest.raises(ConnectionRefusedError):
        peers.connect(address, SECRET)


@pytest.mark.parametrize("sent, stops", [(peers.GOODBYE, False), (b"", True), (b"x", True),
                                         (b"x" + peers.GOODBYE, False)])
def test_only_an_end_without_goodbye_stops_a_process(monkeypatch, sent, stops):
    reasons = []
    monkeypatch.setattr(peers, "stop", reasons.append)
    mine, other = socket.socketpair()
    with mine:
        with other:
            other.sendall(sent)
        peers.listen(mine, 0, 2)
    assert bool(reasons) == stops


def test_bytes_that_are_no_goodbye_change_nothing(monkeypatch):
    monkeypatch.setattr(peers, "stop", pytest.fail)
    mine, other = socket.socketpair()
    with mine, other:
        thread = threading.Thread(target=peers.listen, args=(mine, 0, 2), daemon=True)
        thread.start()
        other.sendall(b"anything")
        time.sleep(0.1)
        assert thread.is_alive()
        other.sendall(peers.GOODBYE)
        thread.join(10)
        assert not thread.is_alive()


class Store(dict):
    """What is used of torch's Store."""

    def set(self, name, text):
        self[name] = text.encode()


@pytest.mark.parametrize("local, master, told, bound", [
    ("2", "example.invalid", "127.0.0.1", {"127.0.0.1"}),
    ("1", "example.invalid", "example.invalid", {"::", "0.0.0.0"}),
    ("", "localhost", "localhost", {"::", "0.0.0.0"}),
])
def test_only_where_a_run_has_several_hosts_others_reach_it_and_only_until_all_have_joined(
        monkeypatch, local, master, told, bound):
    """Of several hosts it is not known by which address they reach one another."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("MASTER_ADDR", master)
    monkeypatch.setattr(peers, "peer_sockets", [])
    store, servers = Store(), []

    def accept(server, secret, number):
        servers.append(server.getsockname())
        expected = f"{server.getsockname()[1]} {secret.decode()} {told}"
        assert store["peers"].decode() == expected and len(secret) == 64 and number == 1
        return []

    monkeypatch.setattr(peers, "accept_peers", accept)
    peers.watch_peers(store, 0, 2)
    assert servers[0][0] in bound
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", servers[0][1]))


def test_two_processes_watch_one_another(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    reasons, store, sockets = [], Store(), []
    monkeypatch.setattr(peers, "stop", reasons.append)
    monkeypatch.setattr(peers, "peer_sockets", sockets)
    thread = threading.Thread(target=peers.watch_peers, args=(store, 0, 2), daemon=True)
    thread.start()
    while "peers" not in store:
        time.sleep(0.01)
    peers.watch_peers(store, 1, 2)
    thread.join(10)
    one, other = sockets
    assert one.getpeername() == other.getsockname()
    one.shutdown(socket.SHUT_RDWR)
    end = time.monotonic() + 10
    while len(reasons) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(reasons) == ["process 0 of 2 stops, as another one has ended",
                               "process 1 of 2 stops, as the first one has ended"]
    one.close()
    other.close()
