"""An experiment: what a script does once its flags are known, from the run directory's state to the record.

One graph holds the network twice over the same variables: as it trains (augmented images, moments of the batch,
--precision) and as it is evaluated (moving moments, float32). The loop feeds batches of uint8 images.
"""
import contextlib
import functools
import sys

from twta import TwtaError, UsageError, describe_fault, results
from twta.data import datasets
from twta.graph import fast
from twta.graph.build import build_graph
from twta.graph.session import choose_precision, describe, find_gpu, make_deterministic, open_session, stop_signals
from twta.graph.tf1 import tf
from twta.options import with_defaults
from twta.results import accuracy
from twta.terminal import say
from twta.training import checkpoints, records, run_directory
from twta.training.evaluation import describe_network, evaluate, infer, report
from twta.training.loop import train_epochs
from twta.training.schedule import describe_stage, next_stage
from twta.training.state import FORMAT
from twta.training.weights import read_weights, set_weights


def run(script, model, args, defaults, evaluate=infer):
    """Trains or evaluates the network of a script, as the flags say, or as a function does that stands for infer."""
    if args.deterministic:
        make_deterministic()
    gpu = find_gpu(args.gpu)
    is_continued = args.mode == 'training' and args.resume  # its state is read under the lock of its training
    try:
        with run_directory.locked(args.run_dir) if is_continued else contextlib.nullcontext():
            source, state = open_run(script, args) if args.resume else (None, None)
            args.choices = state['choices'] if state else with_defaults(args.choices)
            model = functools.partial(model, **args.choices)
            if args.weights:
                check_choices(args)
            dataset = datasets.load(args.dataset, args.data_dir, state['validation'] if state else args.validation)
            say(f'data: {dataset}')
            say(f'device: {describe(gpu)}')
            if args.mode == 'training':
                precision = choose_precision(args.precision, gpu)
                if precision == tf.bfloat16 and fast.BFLOAT16_IS_EMULATED:
                    say('WARNING: bfloat16 is emulated on this processor; --precision float32 is faster')
                train(script, model, args, defaults, dataset, precision, source, state)
            else:
                evaluate(script, model, args, dataset, source, state)
    except tf.errors.OpError as error:  # too little memory, a damaged checkpoint, ...
        raise TwtaError(find_cause(error)) from None


def find_cause(error):
    """The line that tells the cause in a message of TensorFlow: after the nodes, before the hints."""
    lines = [line for line in error.message.splitlines() if 'root error(s) found' not in line]
    nodes = [i for i, line in enumerate(lines[:-1]) if line.startswith('Node: ')]
    return lines[nodes[-1] + 1 if nodes else 0].strip()


def train(script, model, args, defaults, dataset, precision, source, state):
    """Trains for the epochs of a stage, from the checkpoint source and its state or, without, from the start.

    Each epoch ends with a line, a checkpoint and a row of log.csv. A run that is continued is locked already.
    """
    if not state:
        state = new_run(script, args, dataset)
    elif dataset.sha256 != state['data_sha256']:
        say('WARNING: these are not the images that the run was started on')
    stage = next_stage(state, args, defaults, run_directory.is_judged(args.run_dir, state))
    last = stage['first_epoch'] + stage['epochs'] - 1
    epochs = range(state['epoch'] + 1, last + 1)
    if args.resume and epochs:
        run_directory.warn_of_changes(args.run_dir, precision.name, args.deterministic)
    if stage['batch_size'] > len(dataset.train.labels):
        raise UsageError(f'--batch_size {stage["batch_size"]}: more than the {len(dataset.train.labels):,} training '
                         'images')
    network = build_graph(model, dataset.test.images.shape[1:], dataset.crop, state['seed'], precision,
                    stage['augmentation'])
    weights = read_weights(args.weights, network.net) if args.weights else {}
    args.run_dir.mkdir(parents=True, exist_ok=True)
    with (contextlib.nullcontext() if args.resume else run_directory.locked(args.run_dir), network.graph.as_default(),
          open_session(network.graph, args.gpu) as session):
        earlier = None if args.resume else run_directory.move_aside(args.run_dir)
        if earlier:
            say(f'the earlier run in {args.run_dir} is now in {earlier}')
        store = checkpoints.Checkpoints(args.run_dir)
        if args.resume:
            checkpoints.restore(session, source, network.net, tf.global_variables())
        else:
            session.run(tf.global_variables_initializer())
        set_weights(network.net, weights, session)
        describe_network(script, network.net, args.choices, args.weights or args.run_dir, args.verbose)
        if not epochs:
            say(f'the {last} epochs are done, but have no record: now the test images')
        else:
            say(f'training: epochs {epochs[0]} to {last}, {describe_stage(stage)}, seed {state["seed"]}, '
                f'{precision.name}')
        if epochs and precision.name not in state['precision']:
            state['precision'].append(precision.name)
        config = {'script': script, 'command': sys.argv, 'flags': {**vars(args), 'weights': state['weights']},
                  'stages': state['stages'], 'seed': state['seed'], 'precision': precision.name,
                  'data': results.describe_data(dataset), **results.environment()}
        try:
            results.write_json(args.run_dir / 'config.json', config)
            with stop_signals() as stop:
                if epochs:
                    train_epochs(network, session, store, state, stage, epochs, dataset, args.run_dir, stop)
                if stop and state['epoch'] < last:
                    say(f'stopped after {describe_end(state)}')
                    say('go on with --resume True and the same flags' + (', without --weights' if args.weights else ''))
                    sys.exit(128 + stop[0])
            loss, confusion = report(script, network, session, dataset, args, state['epoch'])
            best = test_best(network, session, dataset, args.run_dir, state)
            records.write_record(args.run_dir, config, state, network.net.count_params(), loss, confusion, best)
        except FloatingPointError as error:
            raise TwtaError(f'{error}; {where_to_go_on(args.run_dir, state)} and a lower --learning_rate') from None
        except (OSError, tf.errors.OpError) as error:
            cause = describe_fault(error) if isinstance(error, OSError) else find_cause(error)
            raise TwtaError(f'{cause}; {where_to_go_on(args.run_dir, state)}') from None
        finally:
            if state['history'] and args.run_dir.exists():
                title = f'{script} on {dataset.title}'
                results.save_picture(args.run_dir / 'curve.png', run_directory.draw_curve, title, state['history'])


def where_to_go_on(run_dir, state):
    """What a user can do after a fault, as words."""
    if not (state['epoch'] or state['part']) or not checkpoints.listed(run_dir, 'last'):
        return 'start again with --resume False'
    return f'go on from {describe_end(state)}, which is saved, with --resume True'


def describe_end(state):
    """The last step that a state has, as words."""
    if state['part']:
        return f'step {state["part"]["steps"]} of epoch {state["epoch"] + 1}'
    return f'epoch {state["epoch"]}'


def test_best(network, session, dataset, run_dir, state):
    """Epoch, validation and test accuracy of the best on validation, whose weights the session has after it.

    None where there is no such checkpoint, or a damaged one. The test images do not choose it: the run's result remains
    that of its last epoch.
    """
    if not checkpoints.listed(run_dir, 'best'):
        return None
    try:
        source = checkpoints.find(run_dir, 'best')
        best = checkpoints.read_state(source, state['script'], state['dataset'])
        checkpoints.restore(session, source, network.net, network.net.all_params)
    except TwtaError as error:
        say(f'the record is without the best epoch on validation: {str(error).partition(";")[0]}')
        return None
    return {'epoch': best['epoch'], 'validation_accuracy': best['best_validation_accuracy'],
            'test_accuracy': accuracy(evaluate(network, session, dataset.test)[1])}


def new_run(script, args, dataset):
    return {'format': FORMAT, 'script': script, 'dataset': args.dataset, 'data_sha256': dataset.sha256,
            'seed': args.seed or 0, 'validation': len(dataset.validation.labels),
            'choices': args.choices, 'weights': str(args.weights) if args.weights else None, 'precision': [],
            'epoch': 0, 'part': None,
            'stages': [], 'history': [], 'best_validation_accuracy': -1.0}


def open_run(script, args):
    """The checkpoint to resume from or to evaluate, and its state; UsageError where flags say otherwise than that."""
    if args.checkpoint == 'best' and not checkpoints.listed(args.run_dir, 'best'):
        last = checkpoints.read_state(checkpoints.find(args.run_dir, 'last'), script, args.dataset)
        if not last['validation']:
            say('the run has no validation images to choose the best epoch by: this is the last')
            args.checkpoint = 'last'
    source = checkpoints.find(args.run_dir, args.checkpoint)
    state = checkpoints.read_state(source, script, args.dataset)
    for flag in ('seed', 'validation'):
        if getattr(args, flag) not in (None, state[flag]):
            raise UsageError(f'--{flag} {getattr(args, flag)}: the run in {args.run_dir} was started with --{flag} '
                             f'{state[flag]}; leave --{flag} out, or start a new run with --resume False')
    for name in state['choices'].keys() - args.choices.keys():
        raise TwtaError(f'{source}: not a checkpoint of this script, which has no --{name}')
    state['choices'] = {**with_defaults(dict.fromkeys(args.choices)), **state['choices']}
    for flag, value in args.choices.items():
        if value not in (None, state['choices'][flag]):
            raise UsageError(f'--{flag} {value}: the network in {args.run_dir} has --{flag} {state["choices"][flag]}; '
                             f'leave --{flag} out, or train another with --resume False and its own --run_dir')
    return source, state


def check_choices(args):
    """UsageError where the config.json beside --weights tells of other choices than the flags."""
    trained_with = run_directory.read_config(args.weights.parent)['flags'].get('choices', {})
    for flag, value in args.choices.items():  # weights may lie anywhere, without a config.json
        if trained_with.get(flag, value) != value:
            raise UsageError(f'--{flag} {value}: the weights in {args.weights} were trained with --{flag} '
                             f'{trained_with[flag]}; give that')
