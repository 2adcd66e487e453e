"""The workers of a training that is spread over processes or machines: TensorFlow's own server and collectives.

Worker 0 alone reads and writes the run directory. The others get the run's state and every variable from it, so no
folder need be shared and every worker starts with the same bits. From then on, each step sums one vector over the
workers (twta.graph.collectives), and each applies the same Adam to it. Whatever befalls a worker ends all of them with
the exit code AGAIN: the same commands, given again, resume the run.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np

from twta import TwtaError, UsageError, describe_fault
from twta.graph import collectives, server
from twta.graph.server import AGAIN, LostWorkerError
from twta.graph.session import open_session, session_config
from twta.graph.tf1 import native_chatter_hidden, tf
from twta.terminal import complain, say
from twta.training import loop
from twta.workers import Workers

GRACE = 10  # seconds after `patience` in which TensorFlow itself may notice; then a thread ends the process
FACTS = 1 << 14  # bytes of the facts that workers compare
GONE = 'has ended, or cannot be reached any more'
REMEDY = 'run the same command again on every worker, with --resume auto'
FIRST_KEY = 1_000_000  # of the collectives outside of the network's graph
LOST = (tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError, tf.errors.CancelledError,
        tf.errors.FailedPreconditionError, tf.errors.InternalError)  # what a lost or a strange worker raises


@contextlib.contextmanager
def joined(workers, gpu_index, patience):
    """Join the workers of a training; give the Cluster, or Alone if there is one worker. At the end, leave together."""
    if workers.count == 1:
        yield Alone(gpu_index)
        return
    cluster = Cluster(workers, gpu_index, patience)
    try:
        yield cluster
    except SystemExit:  # all have stopped after the same step
        cluster.leave()
        raise
    cluster.leave()


class Alone:
    """A training in one process; the methods are those of Cluster."""

    writes, workers, patience = True, Workers(), 0

    def __init__(self, gpu_index=0):
        self.gpu_index = gpu_index

    def open_session(self, graph):
        return open_session(graph, self.gpu_index)

    def share(self, compute, pack=None, unpack=None):
        return compute()

    def compare(self, describe):
        pass

    def compare_weights(self, network, session, epoch):
        pass

    def spread(self, session, variables):
        pass

    def agreed(self, caught):
        self.caught = caught
        return caught

    def exit_code(self):
        """Return the exit code of a training that is stopped: 128 + signal, or AGAIN if another worker got it."""
        return 128 + self.caught[0] if self.caught else AGAIN

    def step_callable(self, network, session, stop):
        return loop.step_callable(network, session)


class Cluster(Alone):
    """The workers of a training, as one of them sees them."""

    def __init__(self, workers, gpu_index, patience):
        """Start the server of this worker and wait until all others listen; raises UsageError or LostWorkerError."""
        self.workers, self.writes = workers, not workers.task
        self.patience, self.group = patience, collectives.Group(workers.count, patience)
        self.keys, self.deadline = FIRST_KEY, math.inf
        self.config = session_config(gpu_index)
        self.config.experimental.collective_group_leader = '/job:worker/replica:0/task:0'
        self.config.device_filters.append(f'/job:worker/task:{workers.task}')
        say(f'worker {workers.task} of {workers.count}, at {workers.addresses[workers.task]}'
            + ('' if self.writes else '; worker 0 writes the run directory'))
        deadline = time.monotonic() + patience
        self.server = server.start(workers, self.config, deadline)
        server.find_others(workers, deadline)
        threading.Thread(target=self.watch, daemon=True).start()

    def open_session(self, graph):
        """Return a session of this worker's server on the graph."""
        with native_chatter_hidden():
            return tf.Session(self.server.target, graph, self.config)

    # ------------------------------------------------------------------------------------------------------------------
    # Waiting for the others

    @contextlib.contextmanager
    def waiting(self):
        """Do something that waits for all workers; raises LostWorkerError if one of them fails or takes too long."""
        self.deadline = time.monotonic() + self.patience + GRACE
        try:
            yield
        except LOST as error:
            raise LostWorkerError(f'{describe_loss(error, self.patience, self.workers)}; {REMEDY}') from None
        finally:
            self.deadline = math.inf

    def watch(self):
        """End the process if it waits for too long: parts of TensorFlow's runtime know no timeout."""
        while time.monotonic() < self.deadline:
            time.sleep(1)
        complain(f'{Path(sys.argv[0]).name}: error: {describe_silence(self.patience + GRACE, self.workers)}; {REMEDY}')
        os._exit(AGAIN)

    def add_up(self, values):
        """Return an int32 array summed over the workers, who all call this in the same order."""
        self.keys += 1
        with tf.Graph().as_default() as graph, self.open_session(graph) as session, self.waiting():
            x = tf.placeholder(tf.int32, values.shape)
            return session.run(collectives.add_up(x, self.group, self.keys), {x: values}, collectives.run_options())

    def leave(self):
        """Wait for the others, and do not mind if they are gone already: they wait for this worker as well."""
        self.add_up(np.zeros(1, np.int32))
        with contextlib.suppress(LostWorkerError):
            self.add_up(np.zeros(1, np.int32))

    # ------------------------------------------------------------------------------------------------------------------
    # Agreeing

    def spread_values(self, values):
        """Return on every worker the int32 array of worker 0; others give one of the same size."""
        return self.add_up(values if self.writes else np.zeros_like(values))

    def share(self, compute, pack=lambda value: value, unpack=lambda value: value):
        """Return on every worker what compute() returns on worker 0, or raise what it raises; no other worker calls it.

        pack, unpack    make JSON of the value, and the value of JSON again
        """
        answer, value = {}, None
        if self.writes:
            try:
                value = compute()
                answer = {'value': pack(value)}
            except (TwtaError, OSError) as error:
                code = getattr(error, 'exit_code', TwtaError.exit_code)
                answer = {'error': describe_fault(error), 'is_usage': code == UsageError.exit_code}
        text = json.dumps(answer).encode()
        text += b' ' * (-len(text) % 4)
        length = int(self.spread_values(np.array([len(text)], np.int32))[0])
        text = self.spread_values(np.frombuffer(text, np.int32) if self.writes else np.zeros(length // 4, np.int32))
        answer = json.loads(text.tobytes())
        if 'error' in answer:
            self.leave()
            raise (UsageError if answer['is_usage'] else TwtaError)(answer['error'])
        return value if self.writes else unpack(answer['value'])

    def compare(self, describe):
        """Raise UsageError on every worker if describe() returns another dictionary on one; name what differs first."""
        text = json.dumps(describe(), default=str).encode().ljust(FACTS)
        rows = np.zeros([self.workers.count, FACTS // 4], np.int32)
        rows[self.workers.task] = np.frombuffer(text[:FACTS], np.int32)
        found = [json.loads(row.tobytes()) for row in self.add_up(rows)]
        for name, value in found[0].items():
            for task, its in enumerate(found):
                if its.get(name) != value:
                    self.leave()
                    raise UsageError(f'{name} is {value} on worker 0 and {its.get(name)} on worker {task}; it must be '
                                     'the same on every worker')

    def compare_weights(self, network, session, epoch):
        """Raise UsageError on every worker if one has other weights after the epoch; the processors may differ."""
        weights = hashlib.sha256(b''.join(value.tobytes() for value in session.run(network.net.all_params)))
        self.compare(lambda: {f'the hash of the weights after epoch {epoch}': weights.hexdigest()[:16]})

    def spread(self, session, variables):
        """Give variables the values that they have on worker 0, bit for bit."""
        values = session.run(variables)
        flat = np.concatenate([np.ravel(value) for value in values]).view(np.int32)
        flat = self.spread_values(flat).view(np.float32)
        if not self.writes:
            parts = np.split(flat, np.cumsum([value.size for value in values])[:-1])
            for variable, value, part in zip(variables, values, parts, strict=True):
                variable.load(part.reshape(value.shape), session)

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def agreed(self, caught):
        """Return a list that gets an item once a worker is to stop, on every worker after the same step.

        caught    the signals that this worker gets
        """
        self.caught = caught
        return []

    def step_callable(self, network, session, stop):
        """Return a training step as loop.step_callable does; its images are this worker's, its results those of all.

        If a worker is to stop, `stop` gets an item.
        """
        reduced = network.reduced
        run = session.make_callable([reduced.loss, reduced.correct, reduced.stopping, reduced.step],
                                    [network.images, network.labels, network.learning_rate, network.step,
                                     reduced.stop], accept_options=True)
        options = collectives.run_options()

        def step(images, labels, rate, number):
            with self.waiting():
                loss, correct, stopping, _ = run(images, labels, rate, number, len(self.caught), options=options)
            if stopping:
                stop.append(stopping)
            if not math.isfinite(loss):
                self.leave()  # the loss is that of all workers, who now end one by one
            return loss, int(correct)

        return step


def describe_loss(error, patience, workers):
    """Return in words what has happened to another worker."""
    if isinstance(error, tf.errors.DeadlineExceededError):
        return describe_silence(patience, workers)
    if isinstance(error, tf.errors.UnavailableError):
        named = re.search(r'remote target \S+/task:(\d+)', error.message)
        return f'{f"worker {named[1]}" if named else "another worker"} {GONE}'
    causes = [line.strip() for line in error.message.splitlines() if 'ollective' in line and 'Node: ' not in line]
    return f'the workers do not fit together, or one was started again ({(causes or [error.message])[-1][:200]})'


def describe_silence(seconds, workers):
    """Return in words what has happened if no answer has come for so long: TensorFlow may miss that a worker ended."""
    lost = server.find_lost(workers)
    return f'another worker has not answered for {seconds:g} seconds' if lost is None else f'worker {lost} {GONE}'
