"""--mode inference --engine packed: evaluation of a packed network, without TensorFlow."""
import time

import numpy as np

from twta import TwtaError, results
from twta.data import datasets
from twta.files import digest
from twta.packed import cost, engines, file_format
from twta.terminal import say


def infer(script, args):
    """Evaluate the network of --file on the test images; write result-packed.json and, for --report, its cost.

    script    name of the script, whose network the file must hold
    args      flags: file, dataset, data_dir, run_dir, threads, report

    Raises TwtaError if the file is invalid or holds another network.
    """
    packed = file_format.read(args.file)
    if (packed.network, packed.dataset) != (script, args.dataset):
        raise TwtaError(f'{args.file}: {packed.network} on {packed.dataset}, not {script} on {args.dataset}; use the '
                        'script and the --dataset of the file, or choose another --file')
    dataset = datasets.load(args.dataset, args.data_dir, None)
    check_images(packed, dataset, args)
    say(f'data: {dataset}')
    images, labels = dataset.test.images, dataset.test.labels
    engine = engines.warm_engine(packed, 'auto', args.threads, len(images))
    epoch = packed.record.get('epoch') if isinstance(packed.record.get('epoch'), int) else None
    say(f'network: {script}, {args.file}' + ('' if epoch is None else f', epoch {epoch}'))
    if (args.run_dir / 'config.json').is_file() and not is_of_run(packed, args.run_dir):
        say(f'WARNING: this network is not that of the run in {args.run_dir}; --mode export writes that one')
    start = time.perf_counter()
    values = engines.logits(engine, images)
    say(f'{len(images) / (time.perf_counter() - start):,.0f} images/s')
    values -= values.max(1, keepdims=True)
    loss = np.log(np.exp(values).sum(1)) - values[np.arange(len(labels)), labels]
    confusion = results.confusion_matrix(labels, values.argmax(1), len(packed.classes))
    results.say_accuracy(float(loss.mean()), confusion)
    results.save(args.run_dir, dataset, float(loss.mean()), confusion, 'packed', {
        'script': script, 'choices': packed.record.get('choices'), 'weights': str(args.file), 'epoch': epoch})
    if args.report:
        cost.report(engine, dataset, args.run_dir)


def is_of_run(packed, run_dir):
    """Return whether a network was exported from the run as its config.json stands, or from its model.npz."""
    hashes = packed.record.get('sha256')
    files = [run_dir / name for name in ('config.json', 'model.npz')]
    return isinstance(hashes, dict) and any(hashes.get(file.name) == digest(file) for file in files if file.is_file())


def check_images(packed, dataset, args):
    """Raise TwtaError if images or classes of a packed network (fields `image`, `classes`) are not the data set's."""
    shape = dataset.test.images.shape[1:]
    if packed.image != shape:
        raise TwtaError(f'{args.file}: for images {list(packed.image)}, but those of {args.dataset} are {list(shape)}; '
                        'choose another --file')
    if packed.classes != tuple(dataset.classes):
        raise TwtaError(f'{args.file}: its classes are {", ".join(packed.classes)[:80]}, those of {args.dataset} '
                        f'{", ".join(dataset.classes)}; choose another --file')
