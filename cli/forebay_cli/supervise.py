"""The process that stays of `forebay up`: starts server and gateway, ends both when one ends.

It is run by its path, `python -I -S supervise.py SPEC`, and uses the standard library alone: 6 MB
stay resident, where `up` with its settings and command line held 32.

A process's standard input is a pipe whose other end is here alone: a line on it says that the end
is near (see supervised), and its end, that this process is gone, by kill -9 too.

SPEC is JSON: `commands` (lists of arguments, in the order of their start; ended in reverse),
`environment`, `door` (the address that the server closes when the end is near), `patience_s` (from a
signal to SIGKILL), `ready` (arguments of `answers`), `said` (printed when `ready` answers), `since`
(seconds of the monotonic clock), `remove` (a folder, at the end).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

READY_TIMEOUT_S = 300.0
#: For the server to close its HTTP port; a server that starts may take longer than is worth waiting.
CLOSED_TIMEOUT_S = 2.0
POLL_S = 0.1
#: What tells a process that it will be ended soon: who balances is to send no more calls.
LEAVE = b"leave\n"


def tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Write to a process's standard input. One that has ended hears nothing."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(line)


def end(process: subprocess.Popen[bytes], patience_s: float) -> int:
    """SIGTERM, then SIGKILL. Gives the exit status; 0 for one that ends by the signal that it got."""
    if process.poll() is None:
        process.terminate()
    try:
        status = process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    # The gateway's server raises the signal again when it has drained.
    return 0 if status == -signal.SIGTERM else status


def answers(address: str, path: str = "", tls: bool = False) -> bool:
    """True when host:port, or a Unix socket's path, takes a connection, and a path gives 200.

    Args:
        tls: ask by TLS. Whose the certificate is does not matter: nothing is told.
    """
    with contextlib.suppress(OSError), connected(address) as plain:
        if not path:
            return True
        with secured(plain) if tls else plain as s:
            s.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            return s.recv(64).split(b" ")[1:2] == [b"200"]
    return False


def closed(address: str) -> None:
    """Wait until nobody listens there, CLOSED_TIMEOUT_S at most: requests that still came in would find
    their gateway gone."""
    ends = time.monotonic() + CLOSED_TIMEOUT_S
    while time.monotonic() < ends and answers(address):
        time.sleep(POLL_S / 10)


def connected(address: str) -> socket.socket:
    """A connection that waits a second at most. Raises OSError: there is none."""
    if not address.startswith("/"):
        host, _, port = address.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), 1)
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(1)
    try:
        s.connect(address)
    except OSError:
        s.close()
        raise
    return s


def secured(plain: socket.socket) -> socket.socket:
    """The connection by TLS. Raises OSError: the other side does not speak it."""
    import ssl  # megabytes, which most do without

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(plain)


def main() -> int:
    """Serve until a signal, or until a process ends by itself."""
    spec = json.loads(sys.argv[1])
    if spec.get("remove"):
        atexit.register(shutil.rmtree, spec["remove"], ignore_errors=True)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # `nohup` has SIGHUP ignored, and it stays so.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    environment = {**os.environ, **spec["environment"]}
    # Sessions of their own: the terminal's Ctrl-C reaches this process alone, which ends them in order.
    processes = [
        subprocess.Popen(
            command, env=environment, start_new_session=True, stdin=subprocess.PIPE, bufsize=0
        )
        for command in spec["commands"]
    ]
    said, status = False, 0
    while not stopped:
        if not said and time.monotonic() < spec["since"] + READY_TIMEOUT_S:
            said = answers(**spec["ready"])
            if said:
                took = time.monotonic() - spec["since"]
                print(f"Forebay is ready ({took:.1f} s).\n{spec['said']}", flush=True)
        ended = [p for p in processes if p.poll() is not None]
        if ended:
            status = ended[0].returncode
            print(f"forebay: a process ended with status {status}", file=sys.stderr, flush=True)
            break
        time.sleep(POLL_S)
    # Health says NOT_SERVING from now on, and not only once the server's own turn has come.
    for process in processes:
        tell(process, LEAVE)
    if spec.get("door"):
        closed(spec["door"])
    # The gateway first, all its workers at once: their calls in flight need the server.
    for process in processes[1:]:
        if process.poll() is None:
            process.terminate()
    for process in reversed(processes):
        status = end(process, spec["patience_s"]) or status
    return status


if __name__ == "__main__":
    sys.exit(main())
