"""The records of finished runs in results/ and their networks in pretrained/: taken in, read, evaluated again.

A record is a file results/SCRIPT-DATASET-SEED-PROTOCOL.json (twta.training.records.write_record). A network is a file
pretrained/SCRIPT.twta, or SCRIPT-OPTIONS.twta if its options are not the default; it holds the name of its record.
"""
import functools
import json
import shutil
from pathlib import Path
from types import NoneType

import numpy as np

from twta import TwtaError, UsageError, describe_fault
from twta.data import datasets
from twta.files import replacing
from twta.packed import cost, engines, file_format
from twta.results import accuracy, confusion_matrix, write_json
from twta.terminal import say
from twta.training.records import list_options, name_options, name_schedule, without_places
from twta.training.state import FIELDS, STAGE_KEYS, check_keys, check_options, is_finite, is_natural

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PRETRAINED = ROOT / 'results', ROOT / 'pretrained'
TITLES = {'mnist': 'MNIST', 'cifar10': 'CIFAR-10'}  # only records of these data sets are taken in
HELD_OUT = {'mnist': 10000, 'cifar10': 0}  # validation images without --validation
IS_PUBLISHED = {'mnist': True, 'cifar10': False}  # whether a row without a remark is of the published files
RECOMPRESSED = 'JPEG-recompressed, NOT the published files'  # true of CIFAR-10 in all records
BATCH_SIZE = 200
KEYS = {'name': str, 'script': str, 'dataset': str, 'seed': is_natural, 'stages': list, 'choices': dict,
        'epochs': is_natural, 'last': dict, 'best_validation': (dict, NoneType), 'curve': dict, 'data': dict,
        'parameters': is_natural, 'wall_seconds': is_finite, 'confusion': list, 'shares': dict, 'flags': dict,
        'precision': str}


def read_record(path):
    """Return the record of a finished run. Raises TwtaError if the file holds none."""
    try:
        record = json.loads(path.read_text())
        check_keys('the record', record, KEYS)
        check_options(record['choices'])
        for what, epoch in (('its last epoch', record['last']), ('its best', record['best_validation'])):
            check_keys(what, epoch or record['last'], {
                'test_accuracy': is_fraction, 'validation_accuracy': lambda value: value is None or is_fraction(value)})
        check_keys('its data', record['data'], {'validation_images': is_natural, 'sha256': str, 'origin': str,
                                                'published': bool})
        check_keys('its flags', record['flags'], {'weights': (str, NoneType)})
        check_keys('its curve', record['curve'], dict.fromkeys(FIELDS, list))
        for stage in record['stages']:
            check_keys('a stage', stage, STAGE_KEYS)
        if not record['stages'] or any(len(record['curve'][field]) != record['epochs'] for field in FIELDS):
            raise ValueError(f'its curve is not that of {record["epochs"]} epochs')
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise TwtaError(f'{path}: not a record of a finished run, or damaged ({reason}); a training writes record.json '
                        'when it ends') from None
    return record


def is_fraction(value):
    return is_finite(value) and 0 <= value <= 1


def load_records():
    """Return the records in the order of data set, script, protocol (the longest first) and seed."""
    records = [read_record(file) for file in RESULTS.glob('*.json')]
    return sorted(records, key=lambda record: (list(TITLES).index(record['dataset']), record['script'],
                                               -record['epochs'], protocol(record), record['seed']))


def schedule(stage):
    """Return schedule, augmentation and learning rate of a stage in words."""
    rate = np.format_float_positional(stage['learning_rate'], trim='-')
    return f'{name_schedule(stage["schedule"], stage["augmentation"])} {rate}'


def protocol(record):
    """Return in words all that was chosen for a run but its seed.

    Runs with the same words and the same teacher share a row.
    """
    words = []
    for stage in record['stages']:
        words.append(schedule(stage))
        words += [] if stage['batch_size'] == BATCH_SIZE else [f'batches of {stage["batch_size"]}']
    words += list_options(record['choices'])
    held_out = record['data']['validation_images']
    words += [] if held_out == HELD_OUT[record['dataset']] else [f'validation {held_out}']
    if record['data']['published'] != IS_PUBLISHED[record['dataset']]:
        words.append('the published files' if record['data']['published'] else 'NOT the published files')
    words += [] if record['precision'] == 'bfloat16' else [record['precision']]
    count = record['flags'].get('workers', 1)
    words += [f'{count} workers, batch_norm {record["flags"]["batch_norm"]}'] if count > 1 else []
    return ', '.join([*words, *helpers(record)])


def helpers(record):
    """Return in words what a network began with or learned from beside its images."""
    return (['from other weights'] if record['flags']['weights'] else []) + (
        ['with a teacher'] if record['flags'].get('teacher') else [])


def unusual_device(record):
    """Return the devices that a run trained on, in words; None if it was two threads with AVX-512 and BF16.

    Records of older versions have no devices: they tell of the GPU, or the kind of processor, of the last command; the
    oldest of none.
    """
    devices = ' and '.join(record.get('devices', []))
    device = devices or record.get('gpu') or record.get('machine', {}).get('kind')
    return None if device in ('AVX-512 with BF16', 'AVX-512 with BF16, 2 threads') else device


def is_whole(record):
    """Return whether the run quantised all that its script does: see --quantize."""
    return record['choices'].get('quantize', 'both') == 'both'


def by_protocol(records):
    """Return lists of records; records in one list have the same teacher and differ in their seed alone."""
    groups = {}
    for record in records:
        epochs = tuple(stage['epochs'] for stage in record['stages'])
        key = record['script'], record['dataset'], protocol(record), epochs, record['flags'].get('teacher')
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def add(run_dir, file, data_dir):
    """Take in the record of a finished run and, if `file` is given, its packed network with its costs.

    Raises UsageError if the run, the file or the images do not belong together.
    """
    record = without_places(read_record(run_dir / 'record.json'))
    name = record['name']
    if record['dataset'] not in TITLES:
        raise UsageError(f'--add {run_dir}: a run on {record["dataset"]}, valid are {", ".join(TITLES)}')
    for text in (name, record['script']):
        if text != Path(text).name:
            raise UsageError(f'--add {run_dir}: its record has the name {text}, which is no file name')
    path = RESULTS / f'{name}.json'
    earlier = read_record(path) if path.exists() else {}
    if earlier and earlier['curve'] != record['curve']:
        raise UsageError(f'--add {run_dir}: {path} holds another run of that name, which does not '
                         'tell learning rate, batch size, precision and held-out images; move that file elsewhere '
                         'first')
    if 'packed' in earlier:
        record['packed'] = earlier['packed']
    taken = None
    if file:
        network = file_format.read(file)
        if (network.network, network.dataset) != (record['script'], record['dataset']):
            raise UsageError(f'--packed {file}: of {network.network} on {network.dataset}, not of {record["script"]} '
                             f'on {record["dataset"]}')
        found = network.record.get('run'), network.record.get('epoch')
        if found != (name, record['epochs']):
            raise UsageError(f'--packed {file}: of the run {found[0]}, epoch {found[1]}, not of {name}, epoch '
                             f'{record["epochs"]}; export it with --mode export --run_dir {run_dir}')
        dataset = datasets.load(network.dataset, data_dir, record['data']['validation_images'])
        if dataset.sha256 != record['data']['sha256']:
            raise UsageError(f'--data_dir {data_dir}: not the images of {name}; give the folder that holds them, '
                             'so that the network can be compared with its record')
        if evaluate(network, dataset).tolist() != record['confusion']:
            raise UsageError(f'--packed {file}: does not predict the test images as {name} did, so it is of another '
                             f'run; export it with --mode export --run_dir {run_dir}')
        record['packed'] = {'bytes': file.stat().st_size, **count_operations(network, dataset.test.images)}
        taken = PRETRAINED / f'{network.network}{name_options(record["choices"])}.twta'
    write_json(path, record)  # first: no network in pretrained/ is without its record
    say(f'{path}')
    if taken:
        before = f', in place of that of {file_format.read(taken).record.get("run")}' if taken.exists() else ''
        with replacing(taken) as part:
            shutil.copyfile(file, part)
        say(f'{taken}{before}')


def evaluate(network, dataset):
    """Return the confusion matrix [true class, predicted class] of a packed network on the test images."""
    predicted = engines.logits(engines.open_engine(network), dataset.test.images).argmax(1)
    return confusion_matrix(dataset.test.labels, predicted, len(network.classes))


def count_operations(network, images):
    """Return operations per image, the mean of some images.

    The result is empty if levels or pooling have become neurons: these layers are not those of the training.
    """
    if file_format.is_expanded(network):
        return {}
    images = images[:cost.IMAGES]
    rows = cost.measure(engines.open_engine(network), images)
    return {'images': len(images), 'additions': rows[-1]['additions'],
            'multiply_adds': cost.remaining_multiply_adds(rows),
            'float_multiply_adds': rows[-1]['multiply_adds']}


def reproduce(data_dir):
    """Evaluate every network in pretrained/ on its test images.

    Raises TwtaError if one does not have the confusion matrix of its record, or if none could be compared.
    """
    verdicts, load, absent = [], functools.cache(datasets.load), {}
    for file in sorted(PRETRAINED.glob('*.twta')):
        network = file_format.read(file)
        record = read_record(RESULTS / f'{network.record.get("run")}.json')
        recorded = record['last']['test_accuracy']
        try:
            if network.dataset in absent:  # do not look for it, or download it, once more
                raise absent[network.dataset]
            dataset = load(network.dataset, data_dir, record['data']['validation_images'])
        except (TwtaError, OSError) as error:
            absent[network.dataset] = error
            say(f'{file.stem:35} recorded {recorded:.2%}  not compared: {describe_fault(error).partition(";")[0]}')
            verdicts.append('not compared')
            continue
        confusion = evaluate(network, dataset)
        found = accuracy(confusion)
        verdict, why = 'the same' if found == recorded else 'DIFFERENT', ''
        if found == recorded and confusion.tolist() != record['confusion']:
            verdict, why = 'DIFFERENT', ': other images recognised'
        if dataset.sha256 != record['data']['sha256']:
            verdict, why = 'not compared', f': the record is of other images ({record["data"]["origin"]})'
        verdicts.append(verdict)
        say(f'{file.stem:35} recorded {recorded:.2%}  here {found:.2%}  {verdict}{why}')
    counts = ', '.join(f'{verdicts.count(verdict)} {verdict}' for verdict in ('the same', 'not compared', 'DIFFERENT'))
    say(f'{len(verdicts)} networks: {counts}')
    if 'DIFFERENT' in verdicts:
        raise TwtaError(f'{PRETRAINED}: not the recorded predictions')
    if 'the same' not in verdicts:
        raise TwtaError(f'{PRETRAINED}: nothing was compared; put the images of the records into --data_dir {data_dir}')
