"""Many trainings of one script with one command: each of its flags may take several values.

    python -m twta.sweep MNIST/TWTA_4_4_MNIST.py --seed 0 1 2 --learning_rate 0.001 0.002
    python -m twta.sweep MNIST/TWTA_4_4_MNIST.py --seed 0 1 2 --slurm time=240 partition=gpu gpus_per_node=1

Every combination of the values is a run: the script's own command with --resume auto, in a folder of --sweep_dir. The
same command again skips the runs that have a record and resumes those that have a checkpoint. Ctrl-C lets all runs save
and end; a second one kills them. At the end a table is shown and written to runs.csv and means.csv.

All flags but those below are the script's; its --help explains them. The script comes first. Faults, Slurm and threads:
docs/scale.md.
"""
import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time

from twta import UsageError, files, processor
from twta.sweep import jobs, plan, table
from twta.terminal import STOPS, Parser, complain, errors_in_a_line, path, positive_integer, say, stop_signals

LOOK = {False: 0.5, True: 5}  # seconds between two looks at the runs, on this machine and on Slurm
OWN = '-h', '--help', '--sweep_dir', '--parallel', '--slurm', '--debug'  # all other flags are the script's
DONE = 'done'


def main(argv=None):
    with errors_in_a_line('twta.sweep'):
        parser = make_parser()
        os.environ.pop('TF_CONFIG', None)  # each run trains alone
        own, words = split(sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(own)
        slurm = None if args.slurm is None else dict(args.slurm)
        for key in slurm or ():
            if [given for given, _ in args.slurm].count(key) > 1:
                raise UsageError(f'--slurm {key}: it is there twice; leave one out')
        threads = count_threads(slurm)
        sweep_dir, runs, swept = plan.make_runs(args.script, words, args.sweep_dir)
        if not importlib.util.find_spec('submitit'):
            raise UsageError('the package submitit, which starts the runs, is not installed; pip install submitit')
        files.make_folder(sweep_dir)

        def refuse():
            raise UsageError(f'--sweep_dir {sweep_dir}: another sweep is running there; wait for its end, or choose '
                             'another folder')

        with files.holding(sweep_dir / 'lock', refuse):
            sys.exit(sweep(sweep_dir, runs, swept, slurm, args.parallel, threads))


def make_parser():
    usage = '%(prog)s SCRIPT [flags of the script] [--sweep_dir DIR] [--parallel N] [--slurm KEY=VALUE ...]'
    parser = Parser(prog='python -m twta.sweep', usage=usage, description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('script', type=path, metavar='SCRIPT', help='a script of MNIST/ or CIFAR10/ that trains')
    parser.add_argument('--sweep_dir', type=path, metavar='DIR',
                        help='folder for the runs and the tables (default: runs/sweep-SCRIPT beside README.md)')
    parser.add_argument('--parallel', type=positive_integer, metavar='N',
                        help='runs at once (default: the cores that the process may use, divided by the threads of a '
                             'run; on Slurm as many as it has room for). A run has TF_NUM_INTRAOP_THREADS threads, or '
                             '1 without that variable; on Slurm, cpus_per_task')
    parser.add_argument('--slurm', type=setting, nargs='*', metavar='KEY=VALUE',
                        help="run on Slurm, with these parameters of sbatch in submitit's spelling: time (minutes), "
                             'partition, cpus_per_task, mem, gres, ... (default: on this machine)')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser


def setting(text):
    key, _, value = text.partition('=')
    if not (key.isidentifier() and value):
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE, such as partition=gpu')
    return key, value


def split(argv):
    """Return the words of a command line that are for the sweep, and those that are for the script."""
    own, words = [], []
    target = own
    for word in argv:
        if word == '-h' or word.startswith('--'):
            target = own if word.partition('=')[0] in OWN else words
        target.append(word)
    return own, words


def count_threads(slurm):
    """Return the number of threads of a run.

    It depends on neither the number of runs nor --parallel: a resumed run is the same bit for bit only if it has as
    many threads as before.
    """
    if processor.THREADS[0] in os.environ:
        return processor.threads(processor.THREADS[0])
    count = (slurm or {}).get('cpus_per_task', '1')
    return int(count) if count.isdigit() and int(count) else 1


# ----------------------------------------------------------------------------------------------------------------------
# Running


def sweep(sweep_dir, runs, swept, slurm, parallel, threads):
    """Run what is not done; show tables; return the exit code.

    Exit codes: 0 if each run is done, 1 if one is not, 128 + signal after a signal.
    """
    states = {run.name: DONE if plan.find_record(run) else 'locked' if plan.is_locked(run.run_dir) else 'not started'
              for run in runs}
    todo = [run for run in runs if states[run.name] == 'not started']
    limit = parallel or (len(runs) if slurm is not None else max(1, processor.available_cores() // threads))
    say(f'{len(runs)} run{"s" * (len(runs) > 1)} in {sweep_dir}, {list(states.values()).count(DONE)} of them done; '
        f'{min(limit, len(runs))} at once, {threads} thread{"s" * (threads > 1)} each')
    for run in runs:
        if states[run.name] == 'locked':
            complain(f'{run.label}: another training is writing there; repeat the command after its end')
    with stop_signals(is_each_caught=True) as stops:
        if todo:
            run_all(sweep_dir, todo, states, slurm, limit, threads, stops)
    table.write(sweep_dir, table.measure(runs, states), swept)
    if stops:
        say('stopped; go on with the same command')
        return 128 + stops[0]
    return 0 if set(states.values()) == {DONE} else 1


def run_all(sweep_dir, todo, states, slurm, limit, threads, stops):
    """Run the runs and put their states into `states`: at most `limit` at once.

    stops    the signals so far: at the first the jobs are asked to save and end, at the second they are killed
    """
    logs, environment = sweep_dir / 'logs', {name: os.environ.get(name, str(threads)) for name in processor.THREADS}
    files.make_folder(logs)
    if slurm is None:
        environment['CUDA_VISIBLE_DEVICES'] = os.environ.get('CUDA_VISIBLE_DEVICES')  # submitit hides all GPUs
    folder = tempfile.mkdtemp(prefix='submitit-', dir=sweep_dir)  # a new one: what is in it is believed
    running = {}
    try:
        executor = jobs.open_executor(folder, slurm, limit)
        waiting = [(run, jobs.Training(run.command, logs / f'{run.name}.log', environment)) for run in todo]
        watch(executor, slurm is not None, waiting, running, states, limit, stops)
    finally:
        if not running:
            shutil.rmtree(folder, ignore_errors=True)


def watch(executor, is_slurm, waiting, running, states, limit, stops):
    """Start the (run, Training) that are waiting, put their jobs into `running`, and take out those that have ended."""
    progress, absences, heeded = table.Progress(), {}, 0
    while running or (waiting and not stops):
        count = 0 if stops else len(waiting) if is_slurm else limit - len(running)
        if batch := waiting[:count]:
            runs, trainings = zip(*batch, strict=True)
            running.update(zip(jobs.submit(executor, trainings), runs, strict=True))
            states.update((run.name, 'running') for run in runs)
            del waiting[:count]
        for job in running if heeded < len(stops) else ():
            jobs.stop(job, is_slurm)
        if is_slurm and len(stops) > 1:
            break  # Slurm kills what does not end
        heeded = len(stops)
        for job in jobs.find_ended(list(running), absences, is_slurm):
            run = running.pop(job)
            states[run.name], words = judge(run, *jobs.read_result(job), stops)
            progress.end(run, words)
        for run in running.values():
            progress.show(run)
        pause(LOOK[is_slurm] if running else 0, stops, heeded)


def pause(seconds, stops, heeded):
    """Wait so long, or until there is one more signal than those heeded."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(stops) == heeded:
        time.sleep(min(0.2, seconds))


def judge(run, code, line, stops):
    """Return state and words for a run whose job has ended with this exit code and line; see jobs.read_result."""
    if record := plan.find_record(run):
        return DONE, f'done, {record["epochs"]} epochs, test acc {record["last"]["test_accuracy"]:.4f}'
    if code in (128 + number for number in STOPS) or (code is None and stops):  # None: it had not begun
        return 'stopped', 'stopped; the same command goes on'
    if plan.is_locked(run.run_dir):
        return 'locked', 'another training is writing there; repeat the command after its end'
    if code == 128 + signal.SIGKILL:
        return 'killed', 'killed; the same command goes on'
    return 'failed', line if code is None else f'exit code {code}: {line}'


if __name__ == '__main__':
    main()
