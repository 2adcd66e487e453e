"""Runs as jobs of submitit: processes on this machine, or jobs of Slurm.

On this machine, submitit starts a controller per job, which starts the job's process, which starts the training. A
SIGTERM goes down that chain. Slurm signals all processes of a job itself.
"""
import contextlib
import io
import os
import re
import signal
import subprocess
import time

from twta import TwtaError, UsageError

WARNING = 'USR1'  # Slurm's signal before a time limit or a preemption: the scripts save at it
LISTS = 'setup', 'teardown', 'srun_args'  # parameters of submitit that are lists
MOST_REQUEUES = 100  # time limits per run; a limit that is shorter than an epoch's progress would go on for ever
A_YEAR = 365 * 24 * 60  # minutes
FORGOTTEN = 2  # looks at Slurm's queue in which a job without a result must be absent


class Training:
    """The command of a run, as a submitit job calls it; submitit stores it in a file."""

    def __init__(self, command, log, environment):
        """Take the command, the file that its output is added to, and variables: {name: value, or None to unset}."""
        self.command, self.log, self.environment, self.process = command, log, environment, None

    def __call__(self):
        """Run the command; return its exit code, 128 + signal if it was killed, and the line that tells the error."""
        stops = []

        def forward(number, frame):  # Slurm has sent the signal to the training, too; a second one would kill it
            stops.append(number)
            if self.process:
                self.process.terminate() if len(stops) == 1 else self.process.kill()

        if os.environ['SUBMITIT_EXECUTOR'] == 'local':
            signal.signal(signal.SIGTERM, forward)
        environment = {name: value for name, value in {**os.environ, **self.environment}.items() if value is not None}
        with open(self.log, 'ab') as log:
            start = log.tell()
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, env=environment)
        if stops:
            self.process.terminate()
        while self.process.poll() is None:  # not wait(), which a signal may not interrupt: numpy has threads
            time.sleep(0.2)
        code = self.process.returncode
        if code in (-signal.SIGUSR1, 128 + signal.SIGUSR1):
            time.sleep(30)  # submitit has the signal, too: it requeues the job meanwhile
        return code if code >= 0 else 128 - code, find_error(self.log, start)

    def checkpoint(self):
        """Let the training save; return what Slurm is to run once more. submitit calls this at the signal WARNING."""
        from submitit.helpers import DelayedSubmission  # here: submitit need not be installed to read this file

        if self.process:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                self.process.terminate()
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # poll() may hold a lock just now
        return DelayedSubmission(Training(self.command, self.log, self.environment))


def find_error(log, start):
    """Return the last line with an error in a log from that byte on, or its last line."""
    with open(log, 'rb') as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors='replace').splitlines() if line.strip()]
    return next((line for line in reversed(lines) if ': error: ' in line), lines[-1] if lines else '')


def open_executor(folder, slurm, parallel):
    """Return submitit's executor, which keeps its files in a folder.

    slurm       {parameter: text} of --slurm, or None for this machine
    parallel    how many jobs Slurm runs at once, if it has room for them

    Raises UsageError if a parameter is not valid, or Slurm is not there.
    """
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = WARNING  # submitit reads it when it is imported
    import submitit

    if slurm is None:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=A_YEAR)  # after 2 minutes otherwise
        return executor
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=MOST_REQUEUES)
    except RuntimeError:
        raise UsageError('--slurm: there is no srun on this machine; log in where Slurm is, or leave --slurm out') \
            from None
    parameters = {'job_name': 'twta-sweep', **{name: to_value(name, text) for name, text in slurm.items()}}
    parameters['setup'] = [f'export SUBMITIT_PREEMPT_SIGNAL={WARNING}', *parameters.get('setup', [])]
    try:
        executor.update_parameters(**{'array_parallelism': parallel, **parameters})
    except (ValueError, TypeError) as error:
        valid = re.findall(r'- (\w+) \(', str(error))
        raise UsageError(f'--slurm: {str(error).splitlines()[0]}' + (f'; valid are {", ".join(valid)}' if valid else '')
                         ) from None
    return executor


def to_value(name, text):
    """Return the value of a parameter of submitit. Raises UsageError for a time that submitit could not count with."""
    if name == 'time' and not text.isdigit():
        raise UsageError(f'--slurm time={text}: not a whole number of minutes')
    if name in LISTS:
        return [text]
    return int(text) if text.isdigit() else {'true': True, 'false': False}.get(text.lower(), text)


def submit(executor, trainings):
    """Start the trainings, on Slurm as one array; return their jobs. Raises TwtaError if Slurm refuses them.

    Ctrl-C and the end of the terminal are for the sweep, which then sends SIGTERM: its processes inherit that the two
    signals are blocked.
    """
    signals = {signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what sbatch writes, and raises it
            return executor.submit_array(trainings)
    except RuntimeError as error:  # what sbatch writes
        raise TwtaError(f'--slurm: {error}') from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def find_ended(jobs, absences, is_slurm):
    """Return those of the jobs that have ended.

    absences    {job: number of looks at the queue without it}, kept from call to call. Slurm's accounting, which
                submitit would ask, is not everywhere. A job that is requeued may be absent for a moment.
    """
    if not is_slurm:
        return [job for job in jobs if job.done()]
    ended = [job for job in jobs if job.paths.result_pickle.exists()]
    queue = subprocess.run(['squeue', '--noheader', '--array', '--format=%i', '--user', str(os.getuid())],
                           capture_output=True, text=True)
    if queue.returncode:  # the controller does not answer just now
        return ended
    for job in jobs:
        absences[job] = 0 if job.job_id in queue.stdout.split() else absences.get(job, 0) + 1
    return [job for job in jobs if job in ended or absences[job] >= FORGOTTEN]


def read_result(job):
    """Return what Training returned; if its process ended without a word, None and a line that says where to look."""
    if not job.paths.result_pickle.exists():
        return None, f'its process ended without a word; see {job.paths.stderr}'
    try:
        return job.result()
    except RuntimeError as error:  # a full disk, too many time limits, ...
        lines = [line for line in str(error).splitlines() if 'Error' in line]
        return None, (lines or str(error).splitlines())[-1]


def stop(job, is_slurm):
    """Ask a job to save and to end; asked again, one on this machine ends at once."""
    if is_slurm:
        job.cancel(check=False)
    elif not job.done():  # so its controller, whose number the job has, is still there
        os.kill(int(job.job_id), signal.SIGTERM)
