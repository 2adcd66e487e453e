"""An experiment: what a script does once its flags are known, from the state of the run directory to the record.

One graph holds the network twice over the same variables: as it trains (augmented images, moments of the batch,
--precision) and as it is evaluated (moving moments, float32). The loop feeds batches of uint8 images.
"""
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from twta import TwtaError, UsageError, describe_fault, files, results
from twta.data import datasets
from twta.data.datasets import Dataset
from twta.graph import fast
from twta.graph.session import choose_precision, describe, find_gpu, make_deterministic, open_session, stop_signals
from twta.graph.tf1 import tf
from twta.options import with_defaults
from twta.results import accuracy
from twta.terminal import say
from twta.training import checkpoints, records, run_directory, teacher
from twta.training.build import build_graph
from twta.training.evaluation import describe_network, evaluate, save
from twta.training.loop import train_epochs
from twta.training.schedule import describe_stage, next_stage
from twta.training.state import State
from twta.training.weights import read_weights, set_weights


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
    source: str | None  # path of that checkpoint
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
    is_continued = args.mode == 'training' and args.resume  # its state is read under the lock of its training
    try:
        with run_directory.locked(args.run_dir) if is_continued else contextlib.nullcontext():
            experiment = open_experiment(script, model, args)
            say(f'data: {experiment.dataset}')
            say(f'device: {describe(gpu)}')
            if args.is_auto and experiment.state and is_done(experiment.state, args, defaults):
                say(f'the {experiment.state.stages[-1].epochs} epochs are done, and {args.run_dir / "record.json"} has '
                    'their result')
            elif args.mode == 'training':
                precision = choose_precision(args.precision, gpu)
                if precision == tf.bfloat16 and fast.BFLOAT16_IS_EMULATED:
                    say('WARNING: bfloat16 is emulated on this processor; --precision float32 is faster')
                train(experiment, args, defaults, precision)
            else:
                act(experiment)
    except tf.errors.OpError as error:  # too little memory, a damaged checkpoint, ...
        raise TwtaError(find_cause(error)) from None


def find_cause(error):
    """Return the line of TensorFlow's message that tells the cause: the line after the nodes, before the hints."""
    lines = [line for line in error.message.splitlines() if 'root error(s) found' not in line]
    nodes = [i for i, line in enumerate(lines[:-1]) if line.startswith('Node: ')]
    return lines[nodes[-1] + 1 if nodes else 0].strip()


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def open_experiment(script, model, args):
    """Return the Experiment that the flags ask for.

    Raises UsageError if a flag contradicts the run or the weights, TwtaError if one of these is damaged.
    """
    checkpoint, source, state = open_run(script, args) if args.resume else (args.checkpoint, None, None)
    options = state.options if state else with_defaults(args.options)
    weights = None if args.resume else args.weights  # with --resume auto, the run has begun with them
    if weights:
        check_options_of_weights(weights, options)
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


def check_options_of_weights(weights, options):
    """Raise UsageError if the config.json beside the weights tells of other options; other weights have none there."""
    trained_with = run_directory.read_config(weights.parent)['flags'].get('choices', {})
    for flag, value in options.items():
        if trained_with.get(flag, value) != value:
            raise UsageError(f'--{flag} {value}: the weights in {weights} were trained with --{flag} '
                             f'{trained_with[flag]}; give that')


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(experiment, args, defaults, precision):
    """Train a stage, evaluate the network and write its record; a run that is continued is locked already.

    args         the flags: those of the stage, --seed, --resume and --deterministic; config.json holds all of them
    precision    tf.float32 or tf.bfloat16
    """
    script, dataset, run_dir = experiment.script, experiment.dataset, experiment.run_dir
    state = experiment.state or State(
        script, experiment.dataset_name, dataset.sha256, args.seed or 0, len(dataset.validation.labels),
        experiment.options, str(experiment.weights) if experiment.weights else None,
        teacher=teacher.describe(args.teacher))
    stage = open_stage(state, experiment, args, defaults, precision)
    taught_by = teacher.find(state, args.teacher)
    network = build_graph(experiment.model, dataset.test.images.shape[1:], dataset.crop, state.seed, precision,
                          stage.augmentation, taught_by and teacher.model_of(taught_by, experiment.model))
    weights = read_weights(experiment.weights, network.net) if experiment.weights else {}
    of_teacher = read_weights(taught_by, network.teacher, '--teacher', f'{teacher.SCOPE}/') if taught_by else {}
    run_directory.check_is_ours(run_dir)
    files.make_folder(run_dir)
    with (contextlib.nullcontext() if args.resume else run_directory.locked(run_dir), network.graph.as_default(),
          open_session(network.graph, experiment.gpu) as session):
        store = prepare(experiment, network, session, weights, args.is_auto)
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
            with stop_signals() as stop:
                if state.epoch < stage.last_epoch:
                    train_epochs(network, session, store, state, dataset, run_dir, stop)
                if stop and state.epoch < stage.last_epoch:
                    say(f'stopped after {describe_end(state)}')
                    say('go on with the same command' if args.is_auto else 'go on with --resume True and the same '
                        'flags' + (', without --weights' if experiment.weights else ''))
                    sys.exit(128 + stop[0])
            loss, confusion = evaluate(network, session, dataset.test)
            results.say_accuracy(loss, confusion)
            best = evaluate_best(network, session, dataset, run_dir, state)
            records.write_record(run_dir, config, state, network.net.count_params(), loss, confusion, best)
            save(experiment, loss, confusion, state.epoch)
        except FloatingPointError as error:
            raise TwtaError(f'{error}; {where_to_go_on(run_dir, state)} and a lower --learning_rate') from None
        except (OSError, tf.errors.OpError) as error:
            cause = describe_fault(error) if isinstance(error, OSError) else find_cause(error)
            raise TwtaError(f'{cause}; {where_to_go_on(run_dir, state)}') from None
        finally:
            if state.history and run_dir.exists():
                results.save_picture(run_dir / 'curve.png', run_directory.draw_curve, f'{script} on {dataset.title}',
                                     state.history)


def is_done(state, args, defaults):
    """Return whether the stage that --resume auto repeats has its epochs and its record.

    Raises UsageError if a flag is not that of the last stage of the run: it may be a slip, or ask for another stage.
    """
    if not state.stages:
        return False
    stage = state.stages[-1]
    for flag, value in given_flags(args, defaults).items():
        if value != getattr(stage, flag):
            raise UsageError(f'--{flag} {value}: --resume auto repeats the last training of the run, which has '
                             f'--{flag} {getattr(stage, flag)}; for another training after it use --resume True')
    return state.epoch >= stage.last_epoch and run_directory.has_record(args.run_dir, state)


def given_flags(args, defaults):
    """Return the flags of a stage that the command line gives, by name."""
    return {flag: getattr(args, flag) for flag in defaults if getattr(args, flag) is not None}


def open_stage(state, experiment, args, defaults, precision):
    """Return the stage to train, the last of the state; warn of what changes, and raise UsageError if it cannot be."""
    dataset = experiment.dataset
    if dataset.sha256 != state.data_sha256:
        say('WARNING: these are not the images that the run was started on')
    has_record = run_directory.has_record(experiment.run_dir, state)
    stage = next_stage(state, given_flags(args, defaults), defaults, has_record)
    is_done = state.epoch >= stage.last_epoch
    if args.resume and not is_done:
        run_directory.warn_of_changes(experiment.run_dir, precision.name, args.deterministic)
    if stage.batch_size > len(dataset.train.labels):
        raise UsageError(f'--batch_size {stage.batch_size}: more than the {len(dataset.train.labels):,} training '
                         'images')
    if not is_done and precision.name not in state.precision:
        state.precision.append(precision.name)
    return stage


def describe_run(experiment, args, state, precision):
    """Return the contents of config.json."""
    flags = {**vars(args), 'choices': experiment.options, 'weights': state.weights, 'teacher': state.teacher}
    del flags['options'], flags['is_auto']
    return {'script': experiment.script, 'command': sys.argv, 'flags': flags,
            'stages': [stage.to_json() for stage in state.stages], 'seed': state.seed, 'precision': precision.name,
            'data': results.describe_data(experiment.dataset), **results.environment()}


def prepare(experiment, network, session, weights, is_auto):
    """Give the variables their values and return the Checkpoints of the run; an earlier run is moved aside.

    Raises UsageError if --resume auto found no checkpoint, and there is one now.
    """
    run_dir = experiment.run_dir
    if is_auto and not experiment.source and checkpoints.listed(run_dir, 'last'):
        raise UsageError(f'--run_dir {run_dir}: another command has begun this run meanwhile; repeat the command')
    earlier = None if experiment.source else run_directory.move_aside(run_dir)
    if earlier:
        say(f'the earlier run in {run_dir} is now in {earlier}')
    store = checkpoints.Checkpoints(run_dir)
    if experiment.source:
        checkpoints.restore(session, experiment.source, network.net, tf.global_variables())
    else:
        session.run(tf.global_variables_initializer())
    set_weights(network.net, weights, session)
    return store


def where_to_go_on(run_dir, state):
    """Return what a user can do after a fault, as words."""
    if not (state.epoch or state.part) or not checkpoints.listed(run_dir, 'last'):
        return 'start again with --resume False'
    return f'go on from {describe_end(state)}, which is saved, with --resume True'


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
    return {'epoch': best.epoch, 'validation_accuracy': best.best_validation_accuracy,
            'test_accuracy': accuracy(evaluate(network, session, dataset.test)[1])}
