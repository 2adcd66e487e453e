"""Sweeps: names, skipped and resumed runs, signals, tables; submitit's local executor and its Slurm executor."""
import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import QUICK, ROOT, SCRIPTS, load_script, log

from twta import UsageError, command_line, files
from twta.sweep import __main__ as sweep
from twta.sweep import jobs, plan, table

SCRIPT = ROOT / 'MNIST' / 'TWTA_4_4_MNIST.py'
pytest.importorskip('submitit', reason='needs submitit: pip install submitit')

# A script that trains nothing. --seed 8 fails; --seed 9 waits for a signal, unless Slurm resumes it. Each start
# is a line in the file "starts".
STUB = '''
    import csv, os, signal, sys, time
    from pathlib import Path
    from twta import UsageError, command_line, files, results, terminal

    DATASETS, OPTIONS = ('mnist', 'digits'), ('rest', 'threshold_value')
    LEARNING_RATE, EPOCHS, BATCH_SIZE = 1e-4, 150, 200
    DEFAULTS = {'learning_rate': LEARNING_RATE, 'epochs': EPOCHS, 'batch_size': BATCH_SIZE, 'schedule': 'constant',
                'augmentation': 'published', 'protocol': 'published'}

    def model(x, is_train, **options):
        pass

    def refuse():
        raise UsageError('another training is writing there')

    def train(args):
        stage = {'first_epoch': 1, 'epochs': args.epochs or EPOCHS}
        rows = [{'epoch': epoch, 'training_accuracy': 0.5, 'validation_accuracy': 0.25} for epoch in (1, 2)]
        results.write_csv(args.run_dir / 'log.csv', list(rows[0]), rows)
        if args.seed == 8:
            raise UsageError('no such luck')
        if args.seed == 9 and not ('SLURM_JOB_ID' in os.environ and (args.run_dir / 'waits').exists()):
            signal.signal(signal.SIGTERM, lambda *arguments: sys.exit(143))
            signal.signal(signal.SIGUSR1, lambda *arguments: sys.exit(138))
            (args.run_dir / 'waits').touch()
            for _ in range(600):  # a signal that another thread gets would not end one long sleep
                time.sleep(0.1)
        accuracy = 0.9 + args.seed / 100
        results.write_json(args.run_dir / 'record.json', {
            'flags': {**vars(args), 'choices': args.options}, 'choices': args.options, 'stages': [stage],
            'seed': args.seed or 0, 'data': {'validation_images': 0}, 'epochs': stage['epochs'], 'wall_seconds': 90.0,
            'last': {'validation_accuracy': accuracy, 'test_accuracy': 0.99 - accuracy / 10},
            'curve': {'training_accuracy': [0.95]}})

    if __name__ == '__main__':
        with terminal.errors_in_a_line('stub'):
            args = command_line.parse(Path(__file__).resolve(), '', DATASETS, DEFAULTS, OPTIONS)
            args.run_dir.mkdir(exist_ok=True)
            with files.holding(args.run_dir / 'lock', refuse):
                with open(Path(__file__).parent / 'starts', 'a') as starts:
                    starts.write(args.run_dir.name + chr(10))
                train(args)
    '''


@pytest.fixture
def stub(tmp_path):
    """The path of the script STUB, in a folder with a space in its name."""
    path = tmp_path / 'my scripts' / 'Stub.py'
    path.parent.mkdir()
    path.write_text(textwrap.dedent(STUB))
    return path


def command(*arguments):
    return [sys.executable, '-m', 'twta.sweep', *map(str, arguments)]


def run(*arguments, **environment):
    """Run a sweep as a user does; return the finished process."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, cwd=ROOT,
                          env={**os.environ, **environment})


def rows_of(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def starts(stub):
    return (stub.parent / 'starts').read_text().splitlines()


def plan_of(tmp_path, *words, script=SCRIPT):
    """Return the names of the runs."""
    return [run.name for run in plan.make_runs(script, list(map(str, words)), tmp_path / 'sweep')[1]]


# ----------------------------------------------------------------------------------------------------------------------
# Which runs there are


def test_the_product_of_the_values_is_the_sweep(tmp_path):
    names = plan_of(tmp_path, '--seed', 0, 1, '--learning_rate', 0.001, '2e-3', '--dataset', 'digits')
    assert names == [f'TWTA_4_4_MNIST-dataset_digits-learning_rate_{rate}-seed_{seed}'
                     for seed in (0, 1) for rate in ('0.001', '0.002')]
    assert not (tmp_path / 'sweep').exists()


@pytest.mark.parametrize('words', [
    ('--learning_rate', '1e-3', '--seed', 0), ('--seed=0', '--learning_rate=0.001'), ('--seed', 0, 0, '--learning_rate',
     '0.0010', '1e-3'), ('--seed', 0, '--seed', 0, '--learning_rate', '.001', '--gpu', 0, '--data_dir', '/absent')])
def test_the_same_flags_are_the_same_run(tmp_path, words):
    assert plan_of(tmp_path, *words) == ['TWTA_4_4_MNIST-learning_rate_0.001-seed_0']


def test_negative_values_and_flags_without_a_value(tmp_path):
    names = plan_of(tmp_path, '--rest', -1, 0, '--deterministic')
    assert names == ['TWTA_4_4_MNIST-deterministic-rest_-1', 'TWTA_4_4_MNIST-deterministic-rest_0']


def test_names_are_safe_and_differ(tmp_path):
    long = tmp_path / ('x' * 200)
    long.mkdir()
    paths = [tmp_path / 'a b.npz', tmp_path / 'a_b.npz', tmp_path / 'Прогон.npz', long / 'a.npz', long / 'b.npz']
    for path in paths:
        path.touch()
    names = plan_of(tmp_path, '--weights', *paths)
    assert len(set(names)) == 5 and all(name.isascii() and len(name) < 200 and '/' not in name for name in names)


def test_the_command_is_the_ordinary_one(tmp_path):
    _, (run,), _ = plan.make_runs(SCRIPT, ['--seed', '3', '--deterministic', '--gpu', '1'], tmp_path)
    assert run.command == [sys.executable, str(SCRIPT), '--seed=3', '--deterministic', '--gpu=1', '--run_dir',
                           str(tmp_path / 'TWTA_4_4_MNIST-deterministic-seed_3'), '--resume', 'auto']
    assert run.epochs == 150
    assert plan.make_runs(SCRIPT, ['--protocol', 'short'], tmp_path)[1][0].epochs == 30


def test_a_command_gives_a_small_negative_value(tmp_path):
    path = SCRIPTS['TWBA_5_5_MNIST']
    _, (run,), _ = plan.make_runs(path, ['--beta_init', '-0.00005'], tmp_path)
    args, _ = command_line.parse_script(path, load_script('TWBA_5_5_MNIST'), run.command[2:])
    assert args.options['beta_init'] == -5e-5


@pytest.mark.parametrize('words, message', [
    (['--seed', '0', 'x'], "argument --seed: 'x' is not a whole number"),
    (['--rest', '0', '-1', '--pooling', 'conv', 'max'], '--rest -1 with --pooling max'),
    (['--learning', '1'], 'unrecognized arguments: --learning=1'),
    (['--seed'], 'argument --seed: expected one argument'),
    (['--deterministic', 'True'], "ignored explicit argument 'True'"),
    (['--resume', 'auto'], '--resume: each run has --resume auto; leave it out'),
    (['--run_dir', 'a', 'b'], '--run_dir: each run has its own, in --sweep_dir; leave it out'),
    (['--mode', 'inference'], '--mode: a sweep trains; leave it out'),
    (['--workers', 'a:1,b:2', '--task', '0', '1'], '--workers: each run trains alone; leave it out'),
    (['--batch_norm', 'shard', 'global'], '--batch_norm: each run trains alone; leave it out'),
    (['--patience', '10'], '--patience: each run trains alone; leave it out'),
    (['--gpu', '0', '1'], '--gpu 0 1: it changes no result and has one value in a sweep'),
    (['--', 'x'], '-- is no flag'),
    (['--seed', *map(str, range(1001))], '1,001 combinations of values: a sweep has 1,000 at most'),
])
def test_a_mistake_is_told_before_anything_starts(tmp_path, words, message):
    with pytest.raises(UsageError) as error:
        plan_of(tmp_path, *words)
    assert message in str(error.value) and not (tmp_path / 'sweep').exists()


@pytest.mark.parametrize('words, message', [
    ([], 'the following arguments are required: SCRIPT'),
    (['--seed', '0', SCRIPT], 'the following arguments are required: SCRIPT'),
    ([SCRIPT, '--parallel', '0'], "--parallel: '0' is not a whole number from 1"),
    ([SCRIPT, '--slurm', 'gpu'], "--slurm: 'gpu' is not KEY=VALUE"),
    ([SCRIPT, '--slurm', 'time=5', 'mem=1GB', 'time=9'], '--slurm time: it is there twice'),
    ([ROOT / 'MNIST'], 'not a Python file'),
    ([ROOT / 'MNIST' / 'Spiking_MNIST.py'], 'has no model(x, is_train)'),
    ([SCRIPT, '--sweep_dir', __file__], 'is not a directory that can be written to'),
    ([SCRIPT, '--sweep_dir', '/proc/none'], 'No such file or directory'),
])
def test_a_mistake_is_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        sweep.main(list(map(str, words)))
    line = capsys.readouterr().err
    assert ended.value.code in (1, 2) and message in line and line.count('\n') == 1


def test_without_submitit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        sweep.main([str(SCRIPT), '--sweep_dir', str(tmp_path / 'sweep')])
    assert 'not installed; pip install submitit' in capsys.readouterr().err and not (tmp_path / 'sweep').exists()


@pytest.mark.parametrize('environment, slurm, count', [
    ({}, None, 1), ({'TF_NUM_INTRAOP_THREADS': '3'}, None, 3), ({}, {'cpus_per_task': '4'}, 4), ({}, {'time': '9'}, 1)])
def test_threads_depend_on_neither_runs_nor_cores(monkeypatch, environment, slurm, count):
    monkeypatch.delenv('TF_NUM_INTRAOP_THREADS', raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sweep.count_threads(slurm) == count


# ----------------------------------------------------------------------------------------------------------------------
# On this machine


def test_runs_are_done_once_and_a_failure_stops_no_other(stub, tmp_path):
    words = stub, '--seed', 0, 8, 1, '--epochs', 2, '--sweep_dir', tmp_path / 'the sweep', '--parallel', 2
    for _ in range(2):
        finished = run(*words)
        assert finished.returncode == 1 and finished.stderr == ''
        assert 'seed 8: exit code 2: stub: error: no such luck' in finished.stdout
        assert [(row['seed'], row['state']) for row in rows_of(tmp_path / 'the sweep' / 'runs.csv')] == [
            ('1', 'done'), ('0', 'done'), ('8', 'failed')]
    name = 'Stub-epochs_2-seed_{}'.format
    assert sorted(starts(stub)) == [name(0), name(1), name(8), name(8)]
    assert not list((tmp_path / 'the sweep').glob('submitit-*'))


def test_everything_done_starts_nothing(stub, tmp_path):
    """A repeated sweep imports neither submitit nor TensorFlow, and outlives a reader that stops reading."""
    words = stub, '--seed', 0, 1, '--sweep_dir', tmp_path / 'sweep'
    assert run(*words).returncode == 0
    code = (f'import sys; from twta.sweep.__main__ import main\ntry: main({list(map(str, words))})\n'
            'except SystemExit as ended: print(ended.code, {"tensorflow", "submitit"} & set(sys.modules))')
    finished = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout.splitlines()[-1] == '0 set()', finished.stderr
    finished = subprocess.run(['bash', '-c', 'set -o pipefail; "$@" | head -1; exit $?', '-', *command(*words)],
                              capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0 and finished.stderr == '' and len(starts(stub)) == 2


def as_a_shell_starts_it():
    """Let a child heed Ctrl-C and SIGHUP, which are ignored if the suite itself runs in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize('number, times, code', [(signal.SIGINT, 1, 130), (signal.SIGTERM, 1, 143),
                                                 (signal.SIGHUP, 1, 129), (signal.SIGINT, 2, 130)])
def test_a_signal_stops_all_runs(stub, tmp_path, number, times, code):
    """The runs get SIGTERM, and the sweep waits for their end; a second signal kills a run that ignores the first."""
    if times == 2:
        stub.write_text(stub.read_text().replace('lambda *arguments: sys.exit(143)', 'signal.SIG_IGN'))
    folder = tmp_path / 'sweep'
    process = subprocess.Popen(command(stub, '--seed', 9, '--rest', 0, -1, '--sweep_dir', folder, '--parallel', 1),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               preexec_fn=as_a_shell_starts_it)
    wait_for(lambda: list(folder.glob('*/waits')))
    for _ in range(times):
        process.send_signal(number)
        time.sleep(1.5)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and err == '' and out.endswith('stopped; go on with the same command\n')
    assert len(starts(stub)) == 1 and not plan.is_locked(folder / starts(stub)[0])
    states = {row['state'] for row in rows_of(folder / 'runs.csv')}
    assert states == {'not started', 'stopped' if times == 1 else 'killed'}


def test_a_killed_sweep_leaves_its_runs_which_are_not_started_again(stub, tmp_path):
    folder = tmp_path / 'sweep'
    words = stub, '--seed', 9, 0, '--sweep_dir', folder, '--parallel', 1
    process = subprocess.Popen(command(*words), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(folder.glob('*/waits')))
    process.kill()
    process.wait()
    finished = run(*words)
    assert finished.returncode == 1 and 'seed 9: another training is writing there' in finished.stderr
    assert starts(stub) == ['Stub-seed_9', 'Stub-seed_0']
    stop_orphans(folder)


def stop_orphans(folder):
    """Send SIGTERM to the controllers that submitit has started in a folder: their numbers are in its file names."""
    for path in folder.glob('submitit-*/*_submitted.pkl'):
        os.kill(int(path.name.partition('_')[0]), signal.SIGTERM)
    wait_for(lambda: not any(map(plan.is_locked, folder.iterdir())))


def test_two_sweeps_do_not_share_a_folder(stub, tmp_path):
    with sweep.files.holding(tmp_path / 'lock', None):
        finished = run(stub, '--seed', 0, '--sweep_dir', tmp_path)
    assert finished.returncode == 2 and 'another sweep is running there' in finished.stderr


def test_real_trainings_are_resumed_and_skipped(tmp_path):
    """Two trainings of one epoch; one has lost its record, then its evaluation is done again."""
    words = SCRIPT, *QUICK, '--epochs', 1, '--seed', 0, 1, '--sweep_dir', tmp_path
    assert run(*words).returncode == 0
    first, second = sorted(path for path in tmp_path.iterdir() if path.name.startswith('TWTA'))
    before = {path: path.stat().st_mtime_ns for folder in (first, second) for path in folder.iterdir()}
    (second / 'record.json').unlink()
    finished = run(*words)
    assert finished.returncode == 0 and len(rows_of(tmp_path / 'runs.csv')) == len(log(second)) + 1 == 2
    assert all(path.stat().st_mtime_ns == before[path] for path in first.iterdir())
    assert json.loads((second / 'record.json').read_text())['seed'] == 1
    assert 'the 1 epochs are done, but have no record' in (tmp_path / 'logs' / f'{second.name}.log').read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Slurm: its commands are replaced by scripts that start the tasks of a job as processes


COMMANDS = {
    'sbatch': """cp "$1" "$QUEUE/job.sh"
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
        exec 3>&1 > /dev/null 2>&1
        [ "$last" ] || { export SLURM_JOB_ID=77; setsid bash "$QUEUE/job.sh" 3>&- & }
        for i in $([ "$last" ] && seq 0 "$last"); do
            SLURM_JOB_ID=$((i + 77)) SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i setsid bash "$QUEUE/job.sh" \\
                3>&- &
        done
        echo Submitted batch job 77 >&3""",
    'srun': 'echo $$ >> "$QUEUE/tasks"; exec "${@:6}"',
    'squeue': 'echo 77 77_0 77_1',
    'scontrol': 'echo "$@" >> "$QUEUE/requeued"; setsid bash "$QUEUE/job.sh" > /dev/null 2>&1 &',
    'scancel': 'for task in $(cat "$QUEUE/tasks"); do kill -TERM -- "-$(ps -o pgid= "$task" | tr -d " ")"; done',
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a machine with Slurm; QUEUE in it is a folder with what the scripts write."""
    for name, text in COMMANDS.items():
        (tmp_path / 'bin' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'bin' / name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    return {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'QUEUE': str(tmp_path)}


def test_a_sweep_on_slurm_is_an_array(stub, slurm, tmp_path):
    finished = run(stub, '--seed', 0, 8, '--sweep_dir', tmp_path / 'sweep', '--parallel', 1, '--slurm',
                   'partition=fast', 'time=60', 'cpus_per_task=3', 'setup=module load it', **slurm)
    assert finished.returncode == 1 and finished.stderr == ''
    assert 'seed 0: done' in finished.stdout and 'seed 8: exit code 2: stub: error: no such luck' in finished.stdout
    job = (tmp_path / 'job.sh').read_text()
    for line in ('--partition=fast', '--time=60', '--cpus-per-task=3', '--array=0-1%1', '--signal=USR1@90'):
        assert f'#SBATCH {line}\n' in job
    assert 'module load it\n' in job


def test_a_preempted_job_is_requeued_and_goes_on(stub, slurm, tmp_path):
    """Send SIGUSR1, as Slurm does before a time limit, to all processes of the only task."""
    process = subprocess.Popen(command(stub, '--seed', 9, '--sweep_dir', tmp_path / 'sweep', '--slurm', 'time=60'),
                               stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **slurm})
    wait_for(lambda: list((tmp_path / 'sweep').glob('*/waits')))
    os.killpg(os.getpgid(int((tmp_path / 'tasks').read_text())), signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and 'done' in out, out
    assert (tmp_path / 'requeued').read_text() == 'requeue 77\n' and starts(stub) == ['Stub-seed_9'] * 2


def test_ctrl_c_cancels_the_jobs(stub, slurm, tmp_path):
    process = subprocess.Popen(command(stub, '--seed', 9, '--sweep_dir', tmp_path / 'sweep', '--slurm'),
                               stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **slurm},
                               preexec_fn=as_a_shell_starts_it)
    wait_for(lambda: list((tmp_path / 'sweep').glob('*/waits')))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and out.endswith('stopped; go on with the same command\n')
    assert not plan.is_locked(tmp_path / 'sweep' / 'Stub-seed_9')


@pytest.mark.parametrize('words, message', [
    (['time=1:00:00'], '--slurm time=1:00:00: not a whole number of minutes'),
    (['color=red'], "Unavailable parameter(s): ['color']; valid are account, "), ([], 'there is no srun')])
def test_parameters_that_slurm_does_not_have(stub, slurm, tmp_path, words, message):
    if not words:
        (tmp_path / 'bin' / 'srun').unlink()
        slurm['PATH'] = f'{tmp_path / "bin"}:{Path(sys.executable).parent}:/nowhere'
    finished = run(stub, '--seed', 0, '--sweep_dir', tmp_path / 'sweep', '--slurm', *words, **slurm)
    assert finished.returncode == 2 and message in finished.stderr and finished.stderr.count('\n') == 1


def test_what_sbatch_refuses(stub, slurm, tmp_path):
    (tmp_path / 'bin' / 'sbatch').write_text('#!/bin/bash\necho "sbatch: error: invalid partition: x" >&2; exit 1\n')
    finished = run(stub, '--seed', 0, '--sweep_dir', tmp_path / 'sweep', '--slurm', 'partition=x', **slurm)
    assert finished.returncode == 1 and 'invalid partition: x' in finished.stderr and finished.stderr.count('\n') == 1


def test_a_job_that_slurm_forgot_has_ended(slurm, tmp_path, monkeypatch):
    class Job:
        job_id = '5'

        class paths:
            result_pickle = stderr = tmp_path / 'absent'

    monkeypatch.setenv('PATH', slurm['PATH'])
    absences, job = {}, Job()
    assert jobs.find_ended([job], absences, True) == [] and jobs.find_ended([job], absences, True) == [job]
    (tmp_path / 'bin' / 'squeue').write_text('#!/bin/bash\nexit 1\n')  # the controller does not answer
    assert jobs.find_ended([job], {}, True) == []
    assert jobs.read_result(job) == (None, f'its process ended without a word; see {tmp_path / "absent"}')


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def row(validation, test, **flags):
    return {'run': 'x', **flags, 'epochs': 2, 'state': 'done', 'validation_accuracy': validation,
            'training_accuracy': 0.5, 'test_accuracy': test, 'minutes': 1.0}


def test_the_test_images_choose_nothing():
    rows = [row(0.7, 0.99, seed=0), row(None, None, seed=3), row(0.9, 0.1, seed=1), row(0.8, 0.5, seed=2)]
    assert [r['seed'] for r in table.by_validation(rows)] == [1, 2, 0, 3]
    rows = [row(None, 0.1, seed=0), row(None, 0.9, seed=1), row(None, 0.5, seed=2)]
    assert [r['seed'] for r in table.by_validation(rows)] == [0, 1, 2]


def test_means_are_over_the_seeds_alone():
    rows = [row(0.5, 0.1, seed=0, rate=1), row(0.7, 0.2, seed=1, rate=1), row(0.9, 0.3, seed=0, rate=2),
            row(None, None, seed=1, rate=2)]
    best, other = table.average(rows)
    assert (best['rate'], best['seeds'], best['validation_accuracy_deviation']) == (2, 1, None)
    assert (other['rate'], other['seeds'], round(other['validation_accuracy'], 9)) == (1, 2, 0.6)
    assert round(other['validation_accuracy_deviation'], 6) == 0.141421
    assert table.with_deviation(0.6, 0.1414) == '60.00 ± 14.14'


def test_weights_behind_a_link_are_given_by_the_link(tmp_path):
    (tmp_path / 'elsewhere.npz').touch()
    (tmp_path / 'twin').mkdir()
    (tmp_path / 'twin' / 'model.npz').symlink_to(tmp_path / 'elsewhere.npz')
    _, (run,), _ = plan.make_runs(SCRIPT, ['--weights', f'{tmp_path}/twin/../twin/model.npz'], tmp_path / 'sweep')
    assert f'--weights={tmp_path.resolve()}/twin/model.npz' in run.command


def test_means_of_an_earlier_sweep_do_not_stay(tmp_path):
    table.write(tmp_path, [row(0.5, 0.1, seed=0)], [])
    assert (tmp_path / 'means.csv').exists()
    table.write(tmp_path, [row(None, None, seed=7)], [])
    assert [path.name for path in tmp_path.iterdir()] == ['runs.csv']


def test_a_record_of_other_flags_is_not_the_run(stub, tmp_path):
    words = '--seed', '0', '--rest', '0', '--epochs', '2'
    assert run(stub, *words, '--sweep_dir', tmp_path / 'sweep').returncode == 0
    _, (planned,), _ = plan.make_runs(stub, words, tmp_path / 'sweep')
    record = plan.find_record(planned)
    assert record
    for change in ({'seed': 1}, {'epochs': 1}, {'stages': []}, {'stages': None}, {'flags': None},
                   {'choices': {'rest': -1}}):
        (planned.run_dir / 'record.json').write_text(json.dumps({**record, **change}))
        assert plan.find_record(planned) is None, change
    teacher = tmp_path / 'model.npz'
    teacher.write_text('a')
    taught = planned._replace(values={**planned.values, 'teacher': teacher})
    flags = {**record['flags'], 'teacher': files.digest(teacher)}
    (planned.run_dir / 'record.json').write_text(json.dumps({**record, 'flags': flags}))
    assert plan.find_record(taught)
    teacher.write_text('b')  # the file of another teacher
    assert plan.find_record(taught) is None
    teacher.unlink()
    assert plan.find_record(taught) is None


def test_the_last_row_of_a_log(tmp_path):
    path = tmp_path / 'log.csv'
    assert table.last_row(path) == {}
    for text in ('', 'epoch,x\n', 'epoch,training_accuracy\na,b\n', 'epoch,training_accuracy\n3\n', 'x\0\n'):
        path.write_text(text)
        assert table.last_row(path) == {}
    path.write_text('epoch,training_accuracy,validation_accuracy\n1,0.5,\n2,0.75,0.5\n')
    assert table.describe(table.last_row(path)) == 'train acc 0.7500  val acc 0.5000'
