"""The tables of README.md and the figures in the docstrings of the scripts, from the records."""
import json
import re
import statistics
import textwrap

from twta.report import evidence, speeds
from twta.report.evidence import ROOT, by_protocol, protocol
from twta.report.markdown import table
from twta.report.speeds import benchmark

README, BENCHMARKS = ROOT / 'README.md', ROOT / 'benchmarks' / 'README.md'
PUBLISHED = re.compile(r'published accuracy ([\d.]+ %)')  # in a script's docstring


def tables(records):
    """Markdown by name."""
    return {
        'mnist': accuracies(records, r'(FP|TWTA)_.*MNIST'),
        'cifar10': accuracies(records, r'(FP|TWTA)_.*CIFAR10'),
        'siblings': accuracies(records, r'(TWBA|BWBA|Quant)_'),
        'architectures': architectures(records),
        'short': choices([row for row in benchmark('choices') if row['study'].startswith('short')]),
        'choices': choices([row for row in benchmark('choices') if not row['study'].startswith('short')]),
        'spikes': spikes(json.loads(file.read_text())
                         for file in sorted((evidence.RESULTS / 'spikes').glob('*.json'))),
        **speeds.readme_tables(),
    }


def percent(values):
    """Mean and, of several, standard deviation (over n - 1) in per cent, with a digit for an image in 10,000."""
    values = [100 * value for value in values if value is not None]
    if not values:
        return ''
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{spread}'


def seeds(runs):
    return ', '.join(str(run['seed']) for run in runs)


def accuracies(records, pattern):
    """A row for each protocol that a script of this name was trained with; below, the scripts that have none."""
    rows = []
    for runs in by_protocol([record for record in records if re.match(pattern, record['script'])]):
        best = [run['best_validation'] and run['best_validation']['test_accuracy'] for run in runs]
        epochs = ' + '.join(str(stage['epochs']) for stage in runs[0]['stages'])
        rows.append((runs[0]['script'], protocol(runs[0]), epochs, seeds(runs),
                     percent([run['last']['validation_accuracy'] for run in runs]),
                     '**' + percent([run['last']['test_accuracy'] for run in runs]) + '**',
                     percent(best), published(runs[0]['script']),
                     f'{statistics.median(run["wall_seconds"] for run in runs) / 60:.0f} min'))
    yield from table(('network', 'schedule, learning rate', 'epochs', 'seed', 'validation, %', 'test, %',
                      'test at best validation, %', 'published', 'training'), rows)
    done = {row[0] for row in rows}
    absent = [script for script in script_files() if re.match(pattern, script) and script not in done]
    if absent:
        yield from ('', f'Not run: {", ".join(f"{script} (published: {published(script)})" for script in absent)}.')


def script_files():
    return {file.stem: file for folder in ('MNIST', 'CIFAR10') for file in sorted((ROOT / folder).glob('*.py'))}


def published(script):
    found = PUBLISHED.search(script_files()[script].read_text())
    return found[1] if found else 'not given'


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
    images_per_second = {row['network']: row['training_images_per_second'] for row in rows
                         if row['way'] == 'project'}
    texts = {}
    for script, file in script_files().items():
        lines, own = [], [record for record in records if record['script'] == script]
        for runs in by_protocol(own):
            lines.append(f'{percent([run["last"]["test_accuracy"] for run in runs])} % test after {runs[0]["epochs"]} '
                         f'epochs ({protocol(runs[0])}; seed {seeds(runs)})')
        if not all(record['data']['published'] for record in own):
            lines.append(evidence.RECOMPRESSED)
        speed = 'not run'
        if script in images_per_second:
            speed = (f'{images_per_second[script]:,.0f} images/s in training (benchmarks/training_speed.json; 2 cores '
                     'of an AMD EPYC, bfloat16)')
        text = file.read_text()
        for label, value, end in (('Accuracy:', '; '.join(lines) or 'not run', 'Speed:'), ('Speed:', speed, '\n')):
            line = textwrap.fill(f'{label:14}{value}', 110, subsequent_indent=14 * ' ', break_on_hyphens=False)
            text = re.sub(rf'{label} .*?\n(?={end})', lambda _, line=line: line + '\n', text, count=1, flags=re.DOTALL)
        texts[file] = text
    return texts


def choices(rows):
    """A row for each variant, over its seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row['script'], row['variant'], str(row['epochs'])), []).append(row)
    return table(('network', 'choice', 'epochs', 'seed', 'validation, %', 'test, %'), (
        (*key, seeds(runs), percent([run['validation_accuracy'] for run in runs]),
         percent([run['test_accuracy'] for run in runs])) for key, runs in groups.items()))


def spikes(found):
    rows = []
    for record in found:
        total, noise = record['layers'][-1], f'{100 * record["noise_ratio"]:.3g}%'
        rows.append((record['network'], f'{record["conversion"]}, {record["steps"]}', noise,
                     percent([record['accuracy']]), f'{total["neurons"]:,}', f'{total["spikes"]:,.0f}',
                     f'{total["rate"]:.1%}', f'{total["operations"]:,.0f}', f'{total["nonzero_operations"]:,.0f}'))
    return table(('network', 'conversion, steps', 'noise', 'test, %', 'neurons', 'spikes', 'rate',
                  'synaptic operations', 'over weights not 0'), rows)
