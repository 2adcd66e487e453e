"""The tables of the pages and the figures in the docstrings of the scripts, from the records."""
import json
import re
import statistics
import textwrap

from twta import TwtaError
from twta.options import is_fp, is_full_precision
from twta.report import evidence, scaling, speeds
from twta.report.evidence import ROOT, by_protocol, is_whole, protocol
from twta.report.markdown import table
from twta.report.speeds import benchmark
from twta.scripts import find_scripts
from twta.training.records import list_options

README, RESULTS, EXPERIMENTS, SPIKES, BENCHMARKS, SCALE = (ROOT / page for page in (
    'README.md', 'results/README.md', 'docs/experiments.md', 'docs/spikes.md', 'benchmarks/README.md',
    'docs/scale.md'))
PUBLISHED = {  # test accuracy in per cent, by script, as the README of the published code writes it
    'TWTA_4_4_MNIST': '99.38', 'TWTA_5_5_MNIST': '99.32', 'Quant_MNIST': '99.37',
    'TWTA_3_3_CIFAR10_Group_V2': '88.1', 'TWTA_4_4_CIFAR10_VGG13': '90.1', 'Quant_CIFAR10': '91.91',
    'BWBA_CIFAR10_Model2': '86.50', 'TWBA_CIFAR10_Model2': '88.19',
}


def pages(records):
    """Return {page: {name of a table: its lines in Markdown}}."""
    rows = benchmark('choices')
    is_short = [row['study'].startswith('short') for row in rows]
    spiking = [json.loads(file.read_text()) for file in sorted((evidence.RESULTS / 'spikes').glob('*.json'))]
    return {
        README: {'scripts': scripts(records)},
        RESULTS: {'mnist': accuracies(records, r'(FP|TWTA)_.*MNIST'),
                  'cifar10': accuracies(records, r'(FP|TWTA)_.*CIFAR10'), 'distances': distances(records),
                  'architectures': architectures(records)},
        EXPERIMENTS: {'siblings': accuracies(records, r'(TWBA|BWBA|Quant)_'),
                      'short': ablations([row for row, short in zip(rows, is_short, strict=True) if short]),
                      'choices': ablations([row for row, short in zip(rows, is_short, strict=True) if not short])},
        SPIKES: {'spikes': spikes(spiking)},
        BENCHMARKS: speeds.tables(),
        SCALE: scaling.tables(benchmark('scaling')['rows']),
    }


def percent(values):
    """Return the mean in per cent, with a digit per image in 10,000; of several values with standard deviation.

    The deviation is over n - 1. None stands for no value.
    """
    values = [100 * value for value in values if value is not None]
    if not values:
        return ''
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def seeds(runs):
    return ', '.join(str(run['seed']) for run in runs)


def best_trained(records, script):
    """Return the runs of the script's protocol that is best on validation images, a list, empty without a record.

    If no protocol held images out, the one with the highest accuracy on training images is taken, then the longest,
    then the one with the most seeds: on CIFAR-10, where none are held out, networks underfit. The accuracy on the test
    images never counts. Networks of which only a part is quantised are not that of the script.
    """
    return best([record for record in records if record['script'] == script and is_whole(record)])


def best(records):
    """Return the runs of the best protocol, as best_trained has it."""
    def rank(runs):
        validation = [run['last']['validation_accuracy'] for run in runs]
        return 0 if None in validation else statistics.mean(validation), training(runs), runs[0]['epochs'], len(runs)

    return max(by_protocol(records), key=rank, default=[])


def training(runs):
    """Return the mean accuracy on training images in the last epoch."""
    return statistics.mean(run['curve']['training_accuracy'][-1] for run in runs)


def test_accuracy(runs):
    return percent([run['last']['test_accuracy'] for run in runs])


def choices(record):
    """Return in words what of a run is not the script's default: options, first weights and teacher."""
    return *list_options(record['choices']), *evidence.helpers(record)


def is_recompressed(runs):
    return not all(run['data']['published'] for run in runs)


def scripts(records):
    """Return the README's table: a row per TWTA or FP script that has a record."""
    rows = []
    for script, file in find_scripts().items():
        runs = best_trained(records, script)
        if runs and script.startswith(('TWTA', 'FP')):
            note = ''.join(f', {word}' for word in choices(runs[0])) + (', JPEG' if is_recompressed(runs) else '')
            rows.append((f'[{script}]({file.relative_to(ROOT)})', architecture(file), f'{runs[0]["parameters"]:,}',
                         f'{test_accuracy(runs)} ({runs[0]["epochs"]} epochs{note})', PUBLISHED.get(script, '')))
    return table(('script', 'architecture', 'parameters', 'test %', 'published %'), rows)


def accuracies(records, pattern):
    """Yield a row per protocol of the scripts of this name, then a line that names the scripts without a record."""
    rows = []
    for runs in by_protocol([record for record in records if re.match(pattern, record['script'])]):
        best = [run['best_validation'] and run['best_validation']['test_accuracy'] for run in runs]
        epochs = ' + '.join(str(stage['epochs']) for stage in runs[0]['stages'])
        rows.append((runs[0]['script'], protocol(runs[0]), epochs, seeds(runs),
                     percent([run['last']['validation_accuracy'] for run in runs]), f'**{test_accuracy(runs)}**',
                     percent(best), published(runs[0]['script']), training_time(runs)))
    yield from table(('network', 'schedule, learning rate', 'epochs', 'seed', 'validation, %', 'test, %',
                      'test at best validation, %', 'published', 'training'), rows)
    done = {row[0] for row in rows}
    absent = [script for script in find_scripts() if re.match(pattern, script) and script not in done]
    if absent:
        yield from ('', f'Not run: {", ".join(f"{script} (published: {published(script)})" for script in absent)}.')


def distances(records):
    """Return a row per quantised network on CIFAR-10: published, quantised here, in full precision on the same images.

    A network in full precision is of any script with this architecture. Each is the best_trained of its kind.
    """
    rows, in_full = [], [record for record in records
                         if is_fp(record['script']) or is_full_precision(record['choices'])]
    files = find_scripts()
    networks = {script: architecture(file) for script, file in files.items()}
    for script, file in files.items():
        if file.parent.name == 'CIFAR10' and not is_fp(script):
            ours = best_trained(records, script)
            full = best([record for record in in_full if networks.get(record['script']) == networks[script]])
            rows.append((script, published(script), *(
                f'{test_accuracy(runs)} ({percent([training(runs)])}, {runs[0]["epochs"]})' if runs else 'not run'
                for runs in (ours, full))))
    return table(('network', 'published', 'quantised, %', 'full precision, %'), rows)


def training_time(runs):
    """Return the median time of the training steps in words, with what is not 2 cores of an AMD EPYC with bfloat16."""
    devices = set(map(evidence.unusual_device, runs)) - {None}
    minutes = f'{statistics.median(run["wall_seconds"] for run in runs) / 60:.0f} min'
    return ', '.join((minutes, *(f'on {device}' for device in sorted(devices))))


def published(script):
    return f'{PUBLISHED[script]} %' if script in PUBLISHED else 'not given'


def architecture(file):
    """Return the architecture string of a script's docstring, without remarks in brackets.

    Raises TwtaError if there is none.
    """
    found = re.search(r'Architecture: +(.+?)\n[A-Z]', file.read_text(encoding='utf-8'), re.DOTALL)
    if not found:
        raise TwtaError(f'{file}: its docstring has no line "Architecture: ..."; write one, as the other scripts do')
    return ' '.join(found[1].partition('(')[0].split())


def architectures(records):
    parameters = {record['script']: f'{record["parameters"]:,}' for record in records}
    return table(('script', 'architecture', 'parameters'), (
        (f'`{file.relative_to(ROOT)}`', architecture(file), parameters.get(script, ''))
        for script, file in find_scripts().items()))


def docstrings(records):
    """Return {file of a script: its text, with the lines Accuracy and Speed as the records have them}."""
    rows = benchmark('training_speed')['rows']
    images_per_second = {row['network']: row['training_images_per_second'] for row in rows
                         if row['way'] == 'project'}
    texts = {}
    for script, file in find_scripts().items():
        runs, accuracy, speed = best_trained(records, script), 'not run', 'not run'
        if runs:
            images = ' on JPEG-recompressed images' if is_recompressed(runs) else ''
            several = f'{len(runs)} seeds' if len(runs) > 1 else '1 seed'
            words = ', '.join((f'{runs[0]["epochs"]} epochs', *choices(runs[0]), several))
            accuracy = f'{test_accuracy(runs)} % test{images} ({words}; published {published(script)})'
        if script in images_per_second:
            speed = f'{images_per_second[script]:,.0f} images/s in training (bfloat16, 2 cores of an AMD EPYC)'
        text = file.read_text(encoding='utf-8')
        for label, value, end in (('Accuracy:', accuracy, 'Speed:'), ('Speed:', speed, '\n')):
            line = textwrap.fill(value, 120, initial_indent=f'{label:14}', subsequent_indent=14 * ' ',
                                 break_on_hyphens=False) + '\n'
            text = re.sub(rf'{label} .*?\n(?={end})', lambda _, line=line: line, text, count=1, flags=re.DOTALL)
        texts[file] = text
    return texts


def ablations(rows):
    """Return a row per variant, over its seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row['script'], row['variant'], str(row['epochs'])), []).append(row)
    return table(('network', 'choice', 'epochs', 'seed', 'validation, %', 'test, %'), (
        (*key, seeds(runs), percent([run['validation_accuracy'] for run in runs]),
         percent([run['test_accuracy'] for run in runs])) for key, runs in groups.items()))


def spikes(found):
    """Return a row per simulation, all figures per image."""
    rows = []
    for record in found:
        total, noise = record['layers'][-1], f'{100 * record["noise_ratio"]:.3g}%'
        name = ', '.join([record['network'], *list_options(record['record'].get('choices') or {})])
        rows.append((name, f'{record["conversion"]}, {record["steps"]}', noise,
                     percent([record['accuracy']]), f'{total["neurons"]:,}', f'{total["spikes"]:,.0f}',
                     f'{total["rate"]:.1%}', f'{total["operations"]:,.0f}', f'{total["nonzero_operations"]:,.0f}'))
    return table(('network', 'conversion, steps', 'noise', 'test, %', 'neurons', 'spikes', 'rate',
                  'synaptic operations', 'over weights not 0'), rows)
