"""An experiment: what a script does once its flags are known, from the state of the run directory to the record.

One graph holds the network twice over the same variables: as it trains (augmented images, moments of the batch,
--precision) and as it is evaluated (moving moments, float32). The loop feeds batches of uint8 images.
"""
import contextlib
import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import twta
from twta import TwtaError, UsageError, describe_fault, files, results
from twta.data import datasets
from twta.data.datasets import Dataset
from twta.graph import fast
from twta.graph.session import choose_precision, describe, describe_device, find_gpu, make_deterministic
from twta.graph.tf1 import tf
from twta.options import with_defaults
from twta.results import accuracy
from twta.terminal import say, stop_signals
from twta.training import checkpoints, cluster, records, run_directory, teacher
from twta.training.build import build_graph
from twta.training.evaluation import describe_network, evaluate, save
from twta.training.loop import follow_epochs, train_epochs
from twta.training.schedule import describe_stage, next_stage
from twta.training.state import State
from twta.training.weights import check_weights, first_weights, read_weights, set_weights, warn_of_validation

COMMON = ('epochs', 'learning_rate', 'schedule', 'augmentation', 'protocol', 'batch_size', 'seed', 'validation',
          'batch_norm', 'dataset', 'deterministic')  # flags that are the same on every worker


class Experiment(NamedTuple):
    """A network, its data and the directory of its run: what every mode works on."""
    script: str  # its name
    model: Callable  # of x and is_train, see twta.command_line.run; its options are set
    options: dict  # of the network
    dataset_name: str  # as --dataset has it
    dataset: Dataset
    run_dir: Path
    gpu: int  # index
    weights: Path | None  # of --weights
    checkpoint: str  # which checkpoint is read: 'last' or 'best'
    source: str | None  # path of that checkpoint; only worker 0 has it
    state: State | None  # of the run, as that checkpoint has it
    is_verbose: bool


def run(script, model, args, defaults, act):
    """Run the script's --mode: train, or call act(experiment).

    script      its name
    model       see twta.command_line.run
    args        the flags, from command_line.parse
    defaults    the script's own protocol
    act         what --mode does if it is not training: evaluation.infer, export.pack.export, ...
    """
    if args.deterministic:
        make_deterministic()
    gpu = find_gpu(args.gpu)
    precision = choose_precision(args.precision, gpu)
    # a run that is continued is read under the lock of its training, which worker 0 holds
    is_locked = args.mode == 'training' and args.resume and not args.workers.task
    if is_locked and not checkpoints.listed(args.run_dir, 'last'):
        run_directory.check_is_ours(args.run_dir)  # before the lock, which is a sign of a run
    try:
        with (run_directory.locked(args.run_dir) if is_locked else contextlib.nullcontext(),
              cluster.joined(args.workers, args.gpu, args.patience) as workers):
            workers.compare(lambda: describe_command(script, model, args, precision))
            experiment = open_experiment(script, model, args, workers)
            say(f'data: {experiment.dataset}')
            say(f'device: {describe(gpu)}')
            workers.compare(lambda: {'the SHA-256 of the data': experiment.dataset.sha256})
            if args.is_auto and experiment.state and workers.share(lambda: is_done(experiment, args, defaults)):
                say(f'the {experiment.state.stages[-1].epochs} epochs are done, and {args.run_dir / "record.json"} has '
                    'their result')
            elif args.mode == 'training':
                if precision == tf.bfloat16 and fast.BFLOAT16_IS_EMULATED:
                    say('WARNING: bfloat16 is emulated on this processor; --precision float32 is faster')
                train(experiment, args, defaults, precision, workers)
            else:
                act(experiment)
    except tf.errors.OpError as error:  # too little memory, a damaged checkpoint, ...
        raise TwtaError(find_cause(error)) from None


def describe_command(script, model, args, precision):
    """Return what must be the same on every worker, by name: flags, versions, code."""
    sources = [*sorted(Path(twta.__file__).parent.rglob('*.py')), Path(model.__code__.co_filename)]
    code = hashlib.sha256(b''.join(path.read_bytes() for path in sources)).hexdigest()[:16]
    flags = {'resume': 'auto' if args.is_auto else args.resume, **{name: getattr(args, name) for name in COMMON},
             **args.options}
    return {'the script': script, **{f'--{name}': value for name, value in flags.items()},
            'the type of numbers': precision.name, 'the version of TensorFlow': tf.__version__,
            'the version of numpy': np.__version__, 'the hash of the code': code,
            'the number of workers': args.workers.count}


def find_cause(error):
    """Return the line of TensorFlow's message that tells the cause: the line after the nodes, before the hints."""
    lines = [line for line in error.message.splitlines() if 'root error(s) found' not in line]
    nodes = [i for i, line in enumerate(lines[:-1]) if line.startswith('Node: ')]
    return lines[nodes[-1] + 1 if nodes else 0].strip()


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_experiment(script, model, args, workers):
    """Return the Experiment that the flags ask for; only worker 0 reads the run directory, the others get its state.

    Raises UsageError if a flag contradicts the run or the weights, TwtaError if one of these is damaged.
    """
    checkpoint, source, state = workers.share(
        lambda: open_run(script, args) if args.resume else (args.checkpoint, None, None),
        lambda opened: opened[2] and opened[2].to_json(),
        lambda entry: (args.checkpoint, None, entry and State.from_json(entry)))
    options = state.options if state else with_defaults(args.options)
    weights = None if args.resume else args.weights  # with --resume auto, the run has begun with them
    if weights:
        check_weights(weights, script, args.dataset, options, args.mode)
    dataset = datasets.load(args.dataset, args.data_dir, state.validation if state else args.validation)
    return Experiment(script, functools.partial(model, **options), options, args.dataset, dataset, args.run_dir,
                      args.gpu, weights, checkpoint, source, state, args.verbose)


def open_run(script, args):
    """Return the checkpoint to resume from or to evaluate: its kind, path and state.

    Raises UsageError if a flag contradicts the state.
    """
    which = args.checkpoint
    if which == 'best' and not checkpoints.listed(args.run_dir, 'best'):
        last = checkpoints.read_state(checkpoints.find(args.run_dir, 'last'), script, args.dataset)
        if not last.validation:
            say('the run has no validation images to choose the best epoch by: this is the last')
            which = 'last'
    source = checkpoints.find(args.run_dir, which)
    state = checkpoints.read_state(source, script, args.dataset)
    for flag in ('seed', 'validation'):
        if getattr(args, flag) not in (None, getattr(state, flag)):
            raise UsageError(f'--{flag} {getattr(args, flag)}: the run in {args.run_dir} was started with --{flag} '
                             f'{getattr(state, flag)}; leave --{flag} out, or start a new run with --resume False')
    for name in state.options.keys() - args.options.keys():
        raise TwtaError(f'{source}: not a checkpoint of this script, which has no --{name}')
    state.options = {**with_defaults(dict.fromkeys(args.options)), **state.options}
    for flag, value in args.options.items():
        if value not in (None, state.options[flag]):
            raise UsageError(f'--{flag} {value}: the network in {args.run_dir} has --{flag} {state.options[flag]}; '
                             f'leave --{flag} out, or train another with --resume False and its own --run_dir')
    return which, source, state


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(experiment, args, defaults, precision, workers):
    """Train a stage, evaluate the network and write its record; a run that is continued is locked already.

    args         the flags: those of the stage, --seed, --resume and --deterministic; config.json holds all of them
    precision    tf.float32 or tf.bfloat16
    workers      cluster.Alone or cluster.Cluster; only worker 0 evaluates and writes
    """
    dataset, run_dir = experiment.dataset, experiment.run_dir
    state = workers.share(lambda: open_stage(experiment, args, defaults, precision), State.to_json, State.from_json)
    stage, taught_by = state.stages[-1], teacher.find(state, args.teacher)
    network = build_graph(experiment.model, dataset.test.images.shape[1:], dataset.crop, state.seed, precision,
                          stage.augmentation, taught_by and teacher.model_of(taught_by, experiment.model),
                          workers.workers, workers.patience, args.batch_norm)
    of_teacher = read_weights(taught_by, network.teacher, '--teacher', f'{teacher.SCOPE}/') if taught_by else {}
    if not workers.writes:
        follow(dataset, network, of_teacher, state, workers)
        return
    weights = first_weights(experiment.weights, network.net) if experiment.weights else {}
    warn_of_validation({'--weights': experiment.weights, '--teacher': taught_by}, dataset)
    run_directory.check_is_ours(run_dir)
    files.make_folder(run_dir)
    with (contextlib.nullcontext() if args.resume else run_directory.locked(run_dir), network.graph.as_default(),
          workers.open_session(network.graph) as session):
        store = prepare(experiment, state, network, session, weights, args.is_auto)
        workers.spread(session, float_variables())
        if taught_by:
            set_weights(network.teacher, of_teacher, session)
            say(f'teacher: {taught_by}')
        describe_network(experiment, network.net, experiment.weights or run_dir)
        if state.epoch >= stage.last_epoch:
            say(f'the {state.epoch} epochs are done, but have no record: now the test images')
        else:
            say(f'training: epochs {state.epoch + 1} to {stage.last_epoch}, {describe_stage(stage)}, '
                f'seed {state.seed}, {precision.name}')
        config = describe_run(experiment, args, state, precision)
        try:
            results.write_json(run_dir / 'config.json', config)
            with stop_signals() as caught:
                stop = workers.agreed(caught)
                train_epochs(network, session, workers, store, state, dataset, run_dir, stop)
                if stop and state.epoch < stage.last_epoch:
                    say(f'stopped after {describe_end(state)}')
                    say('go on with the same command' if args.is_auto else 'go on with --resume True and the same '
                        'flags' + (', without --weights' if experiment.weights else ''))
                    sys.exit(workers.exit_code())
            loss, confusion = evaluate(network, session, dataset.test)
            results.say_accuracy(loss, confusion)
            best = evaluate_best(network, session, dataset, run_dir, state)
            records.write_record(run_dir, config, state, network.net.count_params(), loss, confusion, best)
            save(experiment, loss, confusion, state)
        except FloatingPointError as error:
            raise TwtaError(f'{error}; {where_to_go_on(run_dir, state, args)}, the other flags as before and a lower '
                            '--learning_rate') from None
        except (OSError, tf.errors.OpError) as error:
            cause = describe_fault(error) if isinstance(error, OSError) else find_cause(error)
            raise TwtaError(f'{cause}; {where_to_go_on(run_dir, state, args)}') from None
        finally:
            if state.history and run_dir.exists():
                results.save_picture(run_dir / 'curve.png', run_directory.draw_curve,
                                     f'{experiment.script} on {dataset.title}', state.history)


def follow(dataset, network, of_teacher, state, workers):
    """Train as a worker that writes nothing, with the state and the variables of worker 0.

    of_teacher    weights of the teacher; {} without one
    """
    stage = state.stages[-1]
    with network.graph.as_default(), workers.open_session(network.graph) as session, stop_signals() as caught:
        session.run(tf.global_variables_initializer())
        workers.spread(session, float_variables())
        if of_teacher:
            set_weights(network.teacher, of_teacher, session)
        stop = workers.agreed(caught)
        try:
            if state.epoch < stage.last_epoch:
                follow_epochs(network, session, workers, state, dataset, stop)
        except FloatingPointError as error:
            raise TwtaError(f'{error}; worker 0 tells how to go on') from None
        if stop and state.epoch < stage.last_epoch:
            say('stopped: worker 0 saves')
            sys.exit(workers.exit_code())
        say(f'{state.epoch} epochs are done, each with the weights of worker 0, bit for bit; worker 0 evaluates them')


def float_variables():
    """Return the variables of the graph that training changes: weights, moving averages, slots of Adam."""
    return [variable for variable in tf.global_variables() if variable.dtype.base_dtype.is_floating]


def is_done(experiment, args, defaults):
    """Return whether the stage that --resume auto repeats has its epochs and its record.

    Raises UsageError if a flag is not that of the last stage of the run: it may be a slip, or ask for another stage.
    So are --weights and --teacher, if the run has others.
    """
    state = experiment.state
    if not state.stages:
        return False
    check_images(experiment, state, args)
    if args.weights and args.weights.resolve() != (state.weights and Path(state.weights).resolve()):
        raise UsageError(f'--weights {args.weights}: --resume auto repeats the training of the run, which began with '
                         f'{state.weights or "random weights"}; leave --weights out, or choose another --run_dir')
    stage = state.stages[-1]
    for flag, value in given_flags(args, defaults).items():
        if value != getattr(stage, flag):
            raise UsageError(f'--{flag} {value}: --resume auto repeats the last training of the run, which has '
                             f'--{flag} {getattr(stage, flag)}; for another training after it use --resume True')
    has_ended = run_directory.has_ended(args.run_dir, state)
    if has_ended and args.teacher:  # a run that goes on is asked in train()
        teacher.find(state, args.teacher)
    return has_ended


def check_images(experiment, state, args):
    """Raise UsageError if a run, as its state tells, was started on other images."""
    if experiment.dataset.sha256 != state.data_sha256:
        raise UsageError(f'--data_dir {args.data_dir}: not the images that the run in {experiment.run_dir} was started '
                         'on; give those, or start a new run with --resume False')


def given_flags(args, defaults):
    """Return the flags of a stage that the command line gives, by name."""
    return {flag: getattr(args, flag) for flag in defaults if getattr(args, flag) is not None}


def open_stage(experiment, args, defaults, precision):
    """Return the state of the run with the stage to train as its last one, and warn of what changes.

    Raises UsageError if the stage cannot be trained.
    """
    dataset = experiment.dataset
    state = experiment.state or State(
        experiment.script, experiment.dataset_name, dataset.sha256, args.seed or 0, len(dataset.validation.labels),
        experiment.options, str(experiment.weights.resolve()) if experiment.weights else None,
        teacher=teacher.describe(args.teacher))
    check_images(experiment, state, args)
    has_record = run_directory.has_record(experiment.run_dir, state)
    stage = next_stage(state, given_flags(args, defaults), defaults, has_record)
    is_done = state.epoch >= stage.last_epoch
    if args.resume and not is_done:
        run_directory.warn_of_changes(experiment.run_dir, precision.name, args)
    if stage.batch_size > len(dataset.train.labels):
        raise UsageError(f'--batch_size {stage.batch_size}: more than the {len(dataset.train.labels):,} training '
                         'images')
    if stage.batch_size % args.workers.count:
        raise UsageError(f'--batch_size {stage.batch_size}: not a multiple of the {args.workers.count} workers, of '
                         'which each trains on an equal part of the batch')
    if not is_done:
        state.precision = list(dict.fromkeys([*state.precision, precision.name]))
        state.devices = list(dict.fromkeys([*state.devices, describe_device(find_gpu(args.gpu), args.workers.count)]))
        state.code = list(dict.fromkeys([*state.code, results.code_version()]))
    return state


def describe_run(experiment, args, state, precision):
    """Return the contents of config.json."""
    flags = {**vars(args), 'choices': experiment.options, 'weights': state.weights, 'teacher': state.teacher,
             'workers': args.workers.count}
    del flags['options'], flags['is_auto'], flags['patience']
    gpu = find_gpu(args.gpu)
    return {'script': experiment.script, 'command': sys.argv, 'flags': flags,
            'stages': [stage.to_json() for stage in state.stages], 'seed': state.seed, 'precision': precision.name,
            'gpu': describe(gpu) if gpu else None, 'data': results.describe_data(experiment.dataset),
            **results.environment()}


def prepare(experiment, state, network, session, weights, is_auto):
    """Give the variables their values and return the Checkpoints of the run; an earlier run is moved aside.

    state    of the run; if its first weights were moved aside with the earlier run, it gets their new path

    Raises UsageError if --resume auto found no checkpoint, and there is one now.
    """
    run_dir = experiment.run_dir
    if is_auto and not experiment.source and checkpoints.listed(run_dir, 'last'):
        raise UsageError(f'--run_dir {run_dir}: another command has begun this run meanwhile; repeat the command')
    earlier = None if experiment.source else run_directory.move_aside(run_dir)
    if earlier:
        say(f'the earlier run in {run_dir} is now in {earlier}')
        moved = earlier / Path(state.weights or '').name
        if moved.is_file() and run_dir / moved.name == Path(state.weights):
            state.weights = str(moved)
    store = checkpoints.Checkpoints(run_dir)
    if experiment.source:
        checkpoints.restore(session, experiment.source, network.net, tf.global_variables())
    else:
        session.run(tf.global_variables_initializer())
    set_weights(network.net, weights, session)
    return store


def where_to_go_on(run_dir, state, args):
    """Return what a user can do after a fault, as words."""
    if not (state.epoch or state.part) or not checkpoints.listed(run_dir, 'last'):
        return 'start again with --resume False'
    if run_directory.has_ended(run_dir, state):
        return 'record.json has the result; --mode inference writes result.json too'
    without = ' and without --weights' if args.weights else ''
    return f'go on from {describe_end(state)}, which is saved, with --resume True{without}'


def describe_end(state):
    """Return the last step of a state as words."""
    return f'step {state.part.steps} of epoch {state.epoch + 1}' if state.part else f'epoch {state.epoch}'


def evaluate_best(network, session, dataset, run_dir, state):
    """Return epoch, validation and test accuracy of the epoch that is best on validation; the session then holds it.

    Return None if there is no such checkpoint, or if it is damaged. The result of a run remains that of its last epoch,
    so that the test images choose nothing.
    """
    if not checkpoints.listed(run_dir, 'best'):
        return None
    try:
        source = checkpoints.find(run_dir, 'best')
        best = checkpoints.read_state(source, state.script, state.dataset)
        checkpoints.restore(session, source, network.net, network.net.all_params)
    except TwtaError as error:
        say(f'the record is without the best epoch on validation: {str(error).partition(";")[0]}')
        return None
    if best.history != state.history[:best.epoch]:
        say(f'the record is without the best epoch on validation: {source} is of epochs that were trained once more')
        return None
    return {'epoch': best.epoch, 'validation_accuracy': best.best_validation_accuracy,
            'test_accuracy': accuracy(evaluate(network, session, dataset.test)[1])}
