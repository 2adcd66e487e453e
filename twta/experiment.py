"""Training, inference and export: build the graph, open the session, loop.

One graph holds the network twice over the same variables: as it trains (augmented images, moments of the batch,
--precision) and as it is evaluated (moving moments, float32). The loop feeds batches of uint8 images.
"""
import contextlib
import functools
import itertools
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from twta import TwtaError, UsageError, checkpoints, datasets, describe_fault, fast, packing, preprocessing, records
from twta.interchange import check_format
from twta.options import complete
from twta.records import accuracy
from twta.schedule import describe_stage, next_stage, scheduled_rate, shuffled_batches
from twta.session import choose_precision, describe, find_gpu, make_deterministic, open_session, stop_signals
from twta.terminal import say
from twta.tf1 import tf

EVALUATION_BATCH = 500  # images; it decides on memory and speed, not on the result
NOTHING = {'steps': 0, 'loss': 0.0, 'correct': 0, 'seconds': 0.0}  # of an epoch is done


def run(script, model, args, defaults, evaluate=None):
    """Trains or evaluates the network of a script, as the flags say, or as a function does that stands for infer."""
    if args.deterministic:
        make_deterministic()
    gpu = find_gpu(args.gpu)
    is_continued = args.mode == 'training' and args.resume  # its state is read under the lock of its training
    try:
        with records.locked(args.run_dir) if is_continued else contextlib.nullcontext():
            source, state = open_run(script, args) if args.resume else (None, None)
            args.choices = state['choices'] if state else complete(args.choices)
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
                evaluate = evaluate or {'inference': infer, 'export': export}[args.mode]
                evaluate(script, model, args, dataset, source, state)
    except tf.errors.OpError as error:  # too little memory, a damaged checkpoint, ...
        raise TwtaError(find_cause(error)) from None


def find_cause(error):
    """The line that tells the cause in a message of TensorFlow: after the nodes, before the hints."""
    lines = [line for line in error.message.splitlines() if 'root error(s) found' not in line]
    nodes = [i for i, line in enumerate(lines[:-1]) if line.startswith('Node: ')]
    return lines[nodes[-1] + 1 if nodes else 0].strip()


# ----------------------------------------------------------------------------------------------------------------------
# The graph


def build(model, image_shape, crop, seed, precision=None, augmentation='published'):
    """Return the graph: placeholders, the network for evaluation and, if a precision is given, the one for training.

    images         uint8 [batch, *image_shape]: height, width, channels; crop: the side that the network sees, or 0
    labels         int32 [batch]
    step           of the run: with the seed, it decides on the augmentation of training images
    evaluation     .loss the summed cross-entropy over the batch and .predicted, the classes [batch]
    training       the same, as it trains; .step applies Adam with learning_rate to the mean cross-entropy
    shares         of negative and positive values, see packing.shares, where a precision is given
    net            the network as a TensorLayer layer
    """
    graph = tf.Graph()
    with graph.as_default():
        tf.set_random_seed(seed)
        images = tf.placeholder(tf.uint8, [None, *image_shape], 'images')
        labels = tf.placeholder(tf.int32, [None], 'labels')
        learning_rate = tf.placeholder(tf.float32, [], 'learning_rate')
        step = tf.placeholder(tf.int32, [], 'step')
        net = model(preprocessing.for_evaluation(images, crop), False)
        evaluation = measure(net, labels)
        training = shares = None
        if precision:
            shares = packing.shares(net)
            x = preprocessing.for_training(images, crop, seed, step, augmentation)
            with tf.variable_scope(tf.get_variable_scope(), reuse=True):
                training = measure(model(tf.cast(x, precision), True), labels)
            with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
                mean_loss = training.loss / tf.cast(tf.size(labels), tf.float32)
                training.step = tf.train.AdamOptimizer(learning_rate).minimize(mean_loss)
    return SimpleNamespace(graph=graph, images=images, labels=labels, learning_rate=learning_rate, step=step, net=net,
                           evaluation=evaluation, training=training, shares=shares)


def measure(net, labels):
    logits = tf.cast(net.outputs, tf.float32)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return SimpleNamespace(loss=tf.reduce_sum(loss), predicted=tf.argmax(logits, 1, output_type=tf.int32))


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def train(script, model, args, defaults, dataset, precision, source, state):
    """Trains for the epochs of a stage, from the checkpoint source and its state or, without, from the start.

    Each epoch ends with a line, a checkpoint and a row of log.csv. A run that is continued is locked already.
    """
    if not state:
        state = new_run(script, args, dataset)
    elif dataset.sha256 != state['data_sha256']:
        say('WARNING: these are not the images that the run was started on')
    stage = next_stage(state, args, defaults, records.is_judged(args.run_dir, state))
    last = stage['first_epoch'] + stage['epochs'] - 1
    epochs = range(state['epoch'] + 1, last + 1)
    if args.resume and epochs:
        records.warn_of_changes(args.run_dir, precision.name, args.deterministic)
    if stage['batch_size'] > len(dataset.train.labels):
        raise UsageError(f'--batch_size {stage["batch_size"]}: more than the {len(dataset.train.labels):,} training '
                         'images')
    network = build(model, dataset.test.images.shape[1:], dataset.crop, state['seed'], precision,
                    stage['augmentation'])
    weights = records.read_weights(args.weights, network.net) if args.weights else {}
    args.run_dir.mkdir(parents=True, exist_ok=True)
    with (contextlib.nullcontext() if args.resume else records.locked(args.run_dir), network.graph.as_default(),
          open_session(network.graph, args.gpu) as session):
        earlier = None if args.resume else records.move_aside(args.run_dir)
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
                  'data': records.describe_data(dataset), **records.environment()}
        try:
            records.write_json(args.run_dir / 'config.json', config)
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
                records.save_picture(args.run_dir / 'curve.png', records.draw_curve, title, state['history'])


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


def train_epochs(network, session, store, state, stage, epochs, dataset, run_dir, stop):
    """Trains until the last epoch or, where stop gets an item, the next step has ended; saved, either way."""
    last, seed, batch_size = epochs[-1], state['seed'], stage['batch_size']
    run_step = step_callable(network, session)
    records.write_log(run_dir / 'log.csv', state['history'])
    events = records.Events(run_dir, epochs[0])
    n_steps = len(dataset.train.labels) // batch_size
    n_images = n_steps * batch_size
    part = state['part'] or NOTHING
    bar = tqdm(total=len(epochs) * n_steps, initial=part['steps'], unit='step', leave=False,
               disable=not sys.stderr.isatty())
    with bar:
        for epoch in epochs:
            bar.set_description(f'epoch {epoch}/{last}')
            part = train_epoch(run_step, dataset.train, stage, epoch, part, seed, bar, stop)
            if part['steps'] < n_steps:
                store.save(session, {**state, 'part': part}, is_best=False)
                state['part'] = part
                return
            loss, train_accuracy, speed = (part['loss'] / n_images, part['correct'] / n_images,
                                           n_images / part['seconds'])
            rate = scheduled_rate(stage, (epoch - stage['first_epoch'] + 1) * n_steps - 1, n_steps)
            validation = None  # without validation images no epoch is better than another: never by the test images
            if len(dataset.validation.labels):
                validation = accuracy(evaluate(network, session, dataset.validation)[1])
            row = dict(zip(records.FIELDS, (epoch, rate, loss, train_accuracy, validation, round(speed, 1),
                                            round(part['seconds'], 3)), strict=True))
            row['shares'] = measure_shares(network, session, dataset)
            is_best = validation is not None and validation > state['best_validation_accuracy']
            after = {**state, 'epoch': epoch, 'part': None, 'history': state['history'] + [row],
                     'best_validation_accuracy': validation if is_best else state['best_validation_accuracy']}
            store.save(session, after, is_best)
            state.update(after)
            records.write_log(run_dir / 'log.csv', state['history'])
            records.save_weights(run_dir / 'model.npz', network.net, session)
            events.add(row)
            say(f'epoch {epoch}/{last}  loss {loss:.4f}  train acc {train_accuracy:.4f}  '
                + ('' if validation is None else f'val acc {validation:.4f}  ') + f'{speed:,.0f} images/s')
            part = NOTHING
            if stop:
                return


def step_callable(network, session):
    """A training step as a function of images, labels, rate and number; it returns loss, predictions and None."""
    training = network.training
    return session.make_callable([training.loss, training.predicted, training.step],
                                 [network.images, network.labels, network.learning_rate, network.step])


def train_epoch(run_step, split, stage, epoch, part, seed, bar, stop):
    """The steps of an epoch after those of `part`, or only the next one where stop has an item; returns the sum.

    That is steps, cross-entropy (loss) and right predictions (correct) of the images as they were trained on, seconds.
    """
    start = time.perf_counter()
    steps, loss, correct = part['steps'], part['loss'], part['correct']
    n_steps = len(split.labels) // stage['batch_size']
    batches = shuffled_batches(len(split.labels), stage['batch_size'], seed, epoch)
    for batch in itertools.islice(batches, steps, None):
        labels = split.labels[batch]
        rate = scheduled_rate(stage, (epoch - stage['first_epoch']) * n_steps + steps, n_steps)
        batch_loss, predicted, _ = run_step(split.images[batch], labels, rate, (epoch - 1) * n_steps + steps)
        steps += 1
        if not math.isfinite(batch_loss):
            raise FloatingPointError(f'the loss is {batch_loss} at step {steps} of epoch {epoch}')
        loss += float(batch_loss)
        correct += int(np.sum(predicted == labels))
        bar.update()
        if stop:
            break
    return {'steps': steps, 'loss': loss, 'correct': correct, 'seconds': part['seconds'] + time.perf_counter() - start}


def evaluate(network, session, split):
    """Mean cross-entropy and confusion matrix [true class, predicted class] over a split."""
    loss, predicted = 0.0, []
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        batch_loss, batch_predicted = session.run(
            [network.evaluation.loss, network.evaluation.predicted],
            {network.images: split.images[batch], network.labels: split.labels[batch]})
        loss += float(batch_loss)
        predicted.append(batch_predicted)
    n_classes = int(network.net.outputs.shape[-1])
    return loss / len(split.labels), records.confuse(split.labels, np.concatenate(predicted), n_classes)


def measure_shares(network, session, dataset):
    """network.shares on a batch of validation images (training images where there are none), rounded to 4 decimals."""
    split = dataset.validation if len(dataset.validation.labels) else dataset.train
    shares = session.run(network.shares, {network.images: split.images[:EVALUATION_BATCH]})
    return {kind: {name: [round(float(share), 4) for share in pair] for name, pair in layers.items()}
            for kind, layers in shares.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The state of a run


def new_run(script, args, dataset):
    return {'format': checkpoints.FORMAT, 'script': script, 'dataset': args.dataset, 'data_sha256': dataset.sha256,
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
    state['choices'] = {**complete(dict.fromkeys(args.choices)), **state['choices']}
    for flag, value in args.choices.items():
        if value not in (None, state['choices'][flag]):
            raise UsageError(f'--{flag} {value}: the network in {args.run_dir} has --{flag} {state["choices"][flag]}; '
                             f'leave --{flag} out, or train another with --resume False and its own --run_dir')
    return source, state


def check_choices(args):
    """UsageError where the config.json beside --weights tells of other choices than the flags."""
    trained_with = records.read_config(args.weights.parent)['flags'].get('choices', {})
    for flag, value in args.choices.items():  # weights may lie anywhere, without a config.json
        if trained_with.get(flag, value) != value:
            raise UsageError(f'--{flag} {value}: the weights in {args.weights} were trained with --{flag} '
                             f'{trained_with[flag]}; give that')


# ----------------------------------------------------------------------------------------------------------------------
# Inference


def infer(script, model, args, dataset, source, state):
    """Evaluates the network of a checkpoint, source, or of --weights on the test images."""
    with trained(script, model, args, dataset, source) as (network, session):
        report(script, network, session, dataset, args, state['epoch'] if state else None)


def export(script, model, args, dataset, source, state):
    """Writes the network of a checkpoint or of --weights as integers, once it has been seen to compute the same."""
    with trained(script, model, args, dataset, source) as (network, session):
        packed = packing.pack(network, session, script, args.dataset, dataset, packing.describe_run(args, state))
        check_format(args.format, packed)
        packing.compare(packed, network, session, dataset)
    packing.write(packed, dataset, args)


@contextlib.contextmanager
def trained(script, model, args, dataset, source):
    """The network for evaluation and a session in which it has the weights of a checkpoint, source, or of --weights."""
    network = build(model, dataset.test.images.shape[1:], dataset.crop, seed=0)
    with network.graph.as_default(), open_session(network.graph, args.gpu) as session:
        if args.weights:
            set_weights(network.net, records.read_weights(args.weights, network.net), session)
        else:
            checkpoints.restore(session, source, network.net, network.net.all_params)
        describe_network(script, network.net, args.choices, source or args.weights, args.verbose)
        yield network, session


def set_weights(net, weights, session):
    for variable in net.all_params:
        if variable.name in weights:
            variable.load(weights[variable.name], session)


def report(script, network, session, dataset, args, epoch):
    """Evaluates the weights after an epoch, or, where that is None, of --weights, on the test images; returns that."""
    loss, confusion = evaluate(network, session, dataset.test)
    kind, weights = ('weights', args.weights.resolve()) if epoch is None else (args.checkpoint, args.checkpoint)
    records.report(script, args, args.choices, dataset, kind, weights, epoch, loss, confusion)
    return loss, confusion


def describe_network(script, net, choices, source, verbose):
    if verbose:
        net.print_layers()
        net.print_params(details=False)
    chosen = ''.join(f', {name} {value}' for name, value in choices.items())
    say(f'network: {script}{chosen}, {net.count_params():,} parameters, {source}')
