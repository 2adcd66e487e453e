"""The evidence: tables of README.md and pictures, made from the records of finished runs.

    python -m twta.report                                  # writes README.md's tables and results/pictures
    python -m twta.report --add runs/TWTA_4_4_MNIST-mnist  # a finished run becomes a record in results/
    python -m twta.report --add RUN_DIR --packed TWTA_4_4_MNIST.twta  # and its network one in pretrained/
    python -m twta.report --reproduce                      # the networks in pretrained/, evaluated and compared

A record is results/SCRIPT-DATASET-SEED-PROTOCOL.json (twta.records.write_record); results/spikes has what the Spiking
scripts write, benchmarks/*.json what the benchmarks do. README.md holds the tables between two comments each.
"""
import argparse
import json
import re
import shutil
import statistics
import textwrap
from itertools import groupby
from pathlib import Path

from twta import TwtaError, UsageError, datasets, packed, packed_file, packed_report, replacing
from twta.command_line import errors_in_a_line, path
from twta.records import accuracy, confuse, say, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PRETRAINED, README = ROOT / 'results', ROOT / 'pretrained', ROOT / 'README.md'
TITLES = {'mnist': 'MNIST', 'cifar10': 'CIFAR-10'}
PUBLISHED = re.compile(r'published accuracy ([\d.]+ %)')  # in a script's docstring


def main(argv=None):
    parser = argparse.ArgumentParser(prog='python -m twta.report', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--add', type=path, metavar='RUN_DIR', help='a finished run, whose record.json to take in')
    parser.add_argument('--packed', type=path, metavar='FILE', help='with --add: its network, from --mode export')
    parser.add_argument('--reproduce', action='store_true', help='evaluate pretrained/ and compare with the records')
    parser.add_argument('--data_dir', type=path, default=ROOT / 'data', help='default: data/ beside README.md')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    with errors_in_a_line('twta.report'):
        args = parser.parse_args(argv)
        if args.packed and not args.add:
            raise UsageError(f'--packed {args.packed}: with --add RUN_DIR only, the run that it comes from')
        if args.reproduce:
            reproduce(args.data_dir)
            return
        if args.add:
            add(args.add, args.packed, args.data_dir)
        from twta import pictures

        records = load_records()
        write_tables(records)
        for file, text in docstrings(records).items():
            with replacing(file) as part:
                part.write_text(text)
                shutil.copymode(file, part)
        pictures.write_all(records, args.data_dir)


# ----------------------------------------------------------------------------------------------------------------------
# Records


def load_records(folder=RESULTS):
    """The records, in the order of the scripts' names, protocols and seeds."""
    records = [json.loads(file.read_text()) for file in folder.glob('*.json')]
    return sorted(records, key=lambda record: (record['dataset'] != 'mnist', record['script'], *protocol(record),
                                               record['seed']))


def protocol(record):
    """How a run was trained, its seed apart: epochs, words, choices; runs that agree in it share a row."""
    stages = record['stages']
    names = ['short' if stage['protocol'] == 'short' else stage['schedule'] for stage in stages]
    words = [f'{name} {stage["learning_rate"]:.8f}'.rstrip('0') for name, stage in zip(names, stages, strict=True)]
    epochs = ' + '.join(str(stage['epochs']) for stage in stages)
    return -record['epochs'], epochs, ', '.join(words), json.dumps(record['choices'])


def by_protocol(records):
    """Lists of records that differ in their seed alone."""
    return [list(group) for _, group in groupby(records, lambda record: (record['script'], record['dataset'],
                                                                         protocol(record)))]


def add(run_dir, file, data_dir):
    """Takes the record of a finished run, and its packed network with what that costs, into the repository."""
    try:
        record = json.loads((run_dir / 'record.json').read_text())
        name = record['name']
    except (OSError, ValueError, KeyError):
        raise UsageError(f'--add {run_dir}: no record.json there; a training writes it when it ends') from None
    if file:
        network = packed_file.read(file)
        found = network.record.get('run'), network.record.get('epoch')
        if found != (name, record['epochs']):
            raise UsageError(f'--packed {file}: of the run {found[0]}, epoch {found[1]}, not of {name}, epoch '
                             f'{record["epochs"]}; export it with --mode export --run_dir {run_dir}')
        images = datasets.load(record['dataset'], data_dir, None).test.images[:packed_report.IMAGES]
        *layers, total = packed_report.measure(packed.open_engine(network), images)
        record['packed'] = {  # operations are of an image
            'bytes': file.stat().st_size, 'float_multiply_adds': total['multiply_adds'], 'images': len(images),
            'additions': total['additions'],
            'multiply_adds': sum(layer['multiply_adds'] for layer in layers if layer['additions'] is None)}
        with replacing(PRETRAINED / f'{network.network}.twta') as part:
            shutil.copyfile(file, part)
    write_json(RESULTS / f'{name}.json', record)
    say(f'{RESULTS / f"{name}.json"}')


def reproduce(data_dir):
    """Evaluates every network in pretrained/ on its test images; TwtaError where one is not what its record says."""
    different = []
    for file in sorted(PRETRAINED.glob('*.twta')):
        network = packed_file.read(file)
        record = json.loads((RESULTS / f'{network.record["run"]}.json').read_text())
        dataset = datasets.load(network.dataset, data_dir, None)
        predicted = packed.logits(packed.open_engine(network), dataset.test.images).argmax(1)
        found = accuracy(confuse(dataset.test.labels, predicted, len(network.classes)))
        recorded = record['last']['test_accuracy']
        same = found == recorded
        if dataset.sha256 != record['data']['sha256']:
            verdict = 'on other images: ' + dataset.origin
        else:
            verdict = 'the same' if same else 'DIFFERENT'
            different += [] if same else [network.network]
        say(f'{network.network:28} recorded {recorded:.2%}  here {found:.2%}  {verdict}')
    if different:
        raise TwtaError(f'{", ".join(different)}: not the recorded accuracy')


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def write_tables(records, readme=README):
    """README.md with its tables as the records have them."""
    text = fill(readme.read_text(), tables(records))
    with replacing(readme) as part:
        part.write_text(text)


def tables(records):
    """Markdown by name."""
    return {
        'mnist': accuracies(records, r'(FP|TWTA)_.*MNIST'),
        'cifar10': accuracies(records, r'(FP|TWTA)_.*CIFAR10'),
        'siblings': accuracies(records, r'(TWBA|BWBA|Quant)_'),
        'short': choices(benchmark('short')),
        'architectures': architectures(records),
        'choices': choices(benchmark('choices')),
        'spikes': spikes([json.loads(file.read_text()) for file in sorted((RESULTS / 'spikes').glob('*.json'))]),
        'training_speed': training_speed(benchmark('training_speed')['rows']),
        'inference_speed': inference_speed(benchmark('inference_speed')['rows']),
    }


def benchmark(name):
    return json.loads((ROOT / 'benchmarks' / f'{name}.json').read_text())


def fill(text, found):
    """The text with each table between its comments; TwtaError where one has no place or a place no table."""
    places = re.findall(r'<!-- table (\w+)', text)
    if sorted(places) != sorted(found):
        raise TwtaError(f'README.md has places for the tables {sorted(places)}, valid are {sorted(found)}')
    for name, lines in found.items():
        text = re.sub(rf'(<!-- table {name}[^>]*-->\n).*?(<!-- end -->)',
                      lambda match, lines=lines: match[1] + '\n'.join(lines) + '\n' + match[2], text, flags=re.DOTALL)
    return text


def table(header, rows):
    yield '| ' + ' | '.join(header) + ' |'
    yield '|---' * len(header) + '|'
    for row in rows:
        yield '| ' + ' | '.join(row) + ' |'


def percent(values):
    """Mean and, of several, standard deviation (over n - 1) in per cent, with a digit for an image in 10,000."""
    values = [100 * value for value in values if value is not None]
    if not values:
        return ''
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def accuracies(records, pattern):
    """A row for each protocol that a script of this name was trained with; 'not run' where there is none."""
    of_data = [record for record in records if record['dataset'] in TITLES and re.match(pattern, record['script'])]
    absent = [script for script in script_files() if re.match(pattern, script)
              and script not in {record['script'] for record in of_data}]
    rows = [(script, '', '', '', '', 'not run', '', published(script), '') for script in absent]
    for runs in by_protocol(of_data):
        first = runs[0]
        _, epochs, words, _ = protocol(first)
        best = [run['best_validation'] and run['best_validation']['test_accuracy'] for run in runs]
        rows.append((first['script'], words, epochs, ', '.join(str(run['seed']) for run in runs),
                     percent([run['last']['validation_accuracy'] for run in runs]),
                     '**' + percent([run['last']['test_accuracy'] for run in runs]) + '**',
                     percent(best), published(first['script']),
                     f'{statistics.median(run["wall_seconds"] for run in runs) / 60:.0f} min'))
    return table(('network', 'learning rate', 'epochs', 'seeds', 'validation, %', 'test, %',
                  'test at best validation, %', 'published', 'training'), sorted(rows, key=lambda row: row[0]))


def script_files():
    return {file.stem: file for folder in ('MNIST', 'CIFAR10') for file in sorted((ROOT / folder).glob('*.py'))}


def published(script):
    found = PUBLISHED.search(script_files()[script].read_text())
    return found[1] if found else ''


def architectures(records):
    parameters = {record['script']: f'{record["parameters"]:,}' for record in records}
    rows = []
    for script, file in script_files().items():
        found = re.search(r'Architecture: +(.+?)\n[A-Z]', file.read_text(), re.DOTALL)
        if found:
            tokens = found[1].partition('(')[0].split()
            rows.append((f'`{file.parent.name}/{file.name}`', ' '.join(tokens), parameters.get(script, '')))
    return table(('script', 'architecture', 'parameters'), rows)


def docstrings(records):
    """By a script's file: its text, with Accuracy and Speed in the docstring as the records have them."""
    rows = benchmark('training_speed')['rows']
    speeds = {row['network']: row['training_images_per_second'] for row in rows if row['way'] == 'project'}
    texts = {}
    for script, file in script_files().items():
        lines = []
        for runs in by_protocol([record for record in records if record['script'] == script]):
            _, epochs, words, _ = protocol(runs[0])
            seeds = ', '.join(str(run['seed']) for run in runs)
            lines.append(f'{percent([run["last"]["test_accuracy"] for run in runs])} % test after {epochs} epochs '
                         f'(learning rate {words}; seed {seeds})')
        if lines and 'CIFAR10' in script:
            lines.append('JPEG-recompressed images, NOT the published files')
        speed = 'not run'
        if script in speeds:
            speed = (f'{speeds[script]:,.0f} images/s in training (benchmarks/training_speed.json; 2 cores of an AMD '
                     'EPYC, bfloat16)')
        text = file.read_text()
        for label, value, end in (('Accuracy:', '; '.join(lines) or 'not run', 'Speed:'), ('Speed:', speed, '\n')):
            line = textwrap.fill(f'{label:14}{value}', 110, subsequent_indent=14 * ' ', break_on_hyphens=False)
            text = re.sub(rf'{label} .*?\n(?={end})', lambda _, line=line: line + '\n', text, count=1, flags=re.DOTALL)
        texts[file] = text
    return texts


def choices(rows):
    groups = groupby(rows, lambda row: (row['script'], row['variant'], row['epochs']))
    return table(('network', 'choice', 'epochs', 'seeds', 'validation, %', 'test, %'), (
        (script, variant, str(epochs), str(len(runs)), percent([run['validation_accuracy'] for run in runs]),
         percent([run.get('test_accuracy') for run in runs]))
        for (script, variant, epochs), runs in ((key, list(group)) for key, group in groups)))


def spikes(found):
    rows = []
    for record in found:
        total = record['layers'][-1]
        rows.append((record['network'], f'{record["conversion"]}, {record["steps"]}', f'{record["noise_ratio"]:.0%}',
                     percent([record['accuracy']]), f'{total["neurons"]:,}', f'{total["spikes"]:,.0f}',
                     f'{total["rate"]:.1%}', f'{total["operations"]:,.0f}', f'{total["nonzero_operations"]:,.0f}'))
    return table(('network', 'conversion, steps', 'noise', 'test, %', 'neurons', 'spikes', 'rate',
                  'synaptic operations', 'over weights not 0'), rows)


def training_speed(rows):
    speeds = {(row['network'], row['way']): row for row in rows}
    networks = dict.fromkeys(row['network'] for row in rows)
    ways = 'project', 'project float32', 'published'
    return table(('', 'these scripts', 'the same with `--precision float32`', 'published way', 'gain'), (
        (network, *(f'{speeds[network, way]["training_images_per_second"]:,.0f}' for way in ways),
         f'{speeds[network, "published"]["training_ratio"]:.1f}') for network in networks))


def inference_speed(rows):
    """Each engine with the number of threads that it is fastest with."""
    best = {}
    for row in rows:
        key = row['network'], row['batch'], row['engine']
        if key not in best or row['images_per_second'] > best[key]['images_per_second']:
            best[key] = row
    engines = list(dict.fromkeys(row['engine'] for row in rows))
    keys = dict.fromkeys((network, batch) for network, batch, _ in best)
    lines = []
    for network, batch in keys:
        own = best[network, batch, 'packed']['images_per_second']
        speeds = [best[network, batch, engine]['images_per_second'] for engine in engines]
        lines.append((network, str(batch), *(f'{speed:,.0f}' + ('' if engine == 'packed' else f' ({own / speed:.1f})')
                                             for engine, speed in zip(engines, speeds, strict=True))))
    return table(('', 'batch', *engines), lines)


if __name__ == '__main__':
    main()
