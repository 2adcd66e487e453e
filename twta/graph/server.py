"""TensorFlow's server of a worker: its port, who may connect to it, and the wait for the other workers.

The server listens on every interface and does what any caller asks. So a filter of the kernel (Linux, SO_ATTACH_FILTER)
on the listening socket drops every packet that does not come from the address of a worker: other machines cannot
connect. It is no replacement of a firewall: an address can be forged.
"""
import ctypes
import math
import os
import socket
import struct
import time
from functools import partial
from pathlib import Path

from twta import TwtaError, UsageError
from twta.graph.tf1 import native_chatter_hidden, tf
from twta.terminal import say

AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h, "the user is invited to retry"
TELL = 15  # seconds between lines about an absent worker
SO_ATTACH_FILTER = 26  # the socket module has no name for it
NETWORK = 0xFFF00000  # offset of the packet's IP header in a filter
# instructions of a filter: load a byte, load a word, mask, compare and skip, return
LOAD_BYTE, LOAD, AND, EQUAL, RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
WHOLE, NOTHING = 0xFFFFFFFF, 0  # bytes of a packet to let through


class LostWorkerError(TwtaError):
    """Another worker has ended, or does not answer; the same command resumes the run."""

    exit_code = AGAIN


def split(address):
    """Return host and port of an address."""
    host, _, port = address.rpartition(':')
    return host, int(port)


def until(deadline, where, attempt):
    """Return what attempt() returns once it raises no OSError; raises LostWorkerError at the deadline.

    where    words for what is waited for; a line says so every TELL seconds
    """
    told = -math.inf
    while True:
        try:
            return attempt()
        except OSError as error:
            reason = error.strerror or str(error)
        now = time.monotonic()
        if now > deadline:
            raise LostWorkerError(f'{where} cannot be reached ({reason}); start it, or look at its address and the '
                                  'firewalls')
        if now - told > TELL:
            told = now
            say(f'waiting for {where}, for {deadline - now:.0f} seconds at most')
        time.sleep(0.2)


def start(workers, config, deadline):
    """Return TensorFlow's server of this worker, which listens; raises UsageError if its port is taken.

    Only the workers can connect, if the kernel has filters and the addresses are not translated on the way.
    """
    host, port = split(workers.addresses[workers.task])
    with socket.socket() as probe:  # TensorFlow itself would share the port with another server
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that just ended does not matter
        try:
            probe.bind(('', port))
        except OSError as error:
            raise UsageError(f'{host}:{port}: this worker cannot use the port ({error.strerror}); end the program that '
                             'uses it, or give the worker another port') from None
    hosts = [split(address)[0] for address in workers.addresses]
    for task, name in enumerate(hosts):
        until(deadline, f'the address of worker {task}, {name}', partial(socket.getaddrinfo, name, None))
    with native_chatter_hidden():
        server = tf.distribute.Server(tf.train.ClusterSpec({'worker': list(workers.addresses)}), job_name='worker',
                                      task_index=workers.task, config=config, start=False)
    try:
        family, *_, own = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(own)  # fails if the address is not one of this machine
        admit_only(hosts, port)
    except OSError as error:
        say(f'WARNING: whoever reaches port {port} of this machine can run code here: {host} is not one of its '
            f'addresses, or the kernel has no filter ({error.strerror or error}); is --task right?')
    with native_chatter_hidden():
        server.start()
    return server


def find_others(workers, deadline):
    """Wait until every other worker listens; raises LostWorkerError at the deadline."""
    for task, address in enumerate(workers.addresses):
        if task != workers.task:
            until(deadline, f'worker {task} at {address}', partial(knock, *split(address)))


def find_lost(workers):
    """Return the index of the first other worker that no longer listens; None if all do."""
    for task, address in enumerate(workers.addresses):
        if task != workers.task:
            try:
                knock(*split(address))
            except OSError:
                return task
    return None


def knock(host, port):
    """Raise OSError if nothing listens there."""
    socket.create_connection((host, port), timeout=5).close()


# ----------------------------------------------------------------------------------------------------------------------
# The filter


def admit_only(hosts, port):
    """Let only the hosts connect to a port of this process; raises OSError if that cannot be had.

    hosts    names or addresses
    """
    sources = {(family, address[0]) for host in hosts
               for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    program = [step for source in sorted(sources) for step in admit(*source)] + [(RETURN, 0, 0, NOTHING)]
    code = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *step) for step in program))
    is_found = False
    for found in own_sockets():
        if is_listening(found, port):
            found.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER,
                             struct.pack('HxxxxxxP', len(program), ctypes.addressof(code)))
            is_found = True
    if not is_found:
        raise OSError(f'no socket of this process listens on port {port}')


def admit(family, address):
    """Return the instructions (code, skip if equal, skip if not, operand) that let packets from an address through."""
    version, at = (0x40, 12) if family == socket.AF_INET else (0x60, 8)  # first byte; where the source address is
    packed = socket.inet_pton(family, address.partition('%')[0])
    words = struct.unpack(f'!{len(packed) // 4}I', packed)
    tests = [(LOAD_BYTE, NETWORK), (AND, 0xF0), (EQUAL, version)]
    for i, word in enumerate(words):
        tests += [(LOAD, NETWORK + at + 4 * i), (EQUAL, word)]
    return [(code, 0, len(tests) - i if code == EQUAL else 0, operand)
            for i, (code, operand) in enumerate(tests)] + [(RETURN, 0, 0, WHOLE)]


def own_sockets():
    """Yield the sockets of this process, as copies of their descriptors."""
    for path in Path('/proc/self/fd').iterdir():
        try:
            if os.readlink(path).startswith('socket:'):
                with socket.socket(fileno=os.dup(int(path.name))) as found:
                    yield found
        except OSError:  # closed meanwhile
            continue


def is_listening(found, port):
    return (found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
            and found.getsockname()[1] == port
            and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
