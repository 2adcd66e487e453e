"""What a sweep shows: the progress of its runs, and at its end a table of the runs and one of the means over seeds."""
import csv
import statistics
import sys

from tqdm import tqdm

from twta.results import write_csv
from twta.sweep.plan import find_record
from twta.terminal import say

ACCURACIES = 'validation_accuracy', 'training_accuracy', 'test_accuracy'


class Progress:
    """A line per run, from its log.csv: a bar on a terminal, else a line per epoch."""

    def __init__(self):
        self.is_terminal = sys.stderr.isatty()
        self.bars, self.shown = {}, {}

    def show(self, run):
        """Show the last epoch of a run if it is another than before."""
        row = last_row(run.run_dir / 'log.csv')
        if self.shown.get(run.name) == row:
            return
        self.shown[run.name] = row
        words = describe(row)
        if not self.is_terminal:
            say(f'{run.label}: epoch {row.get("epoch", 0)}/{run.epochs}  {words}'.rstrip())
            return
        epoch = int(row.get('epoch', 0))
        if run.name not in self.bars:
            self.bars[run.name] = tqdm(total=run.epochs, initial=epoch, desc=run.label, unit='epoch', leave=False)
        self.bars[run.name].n = epoch
        self.bars[run.name].set_postfix_str(words)

    def end(self, run, words):
        """Put a line with these words in place of the bar of a run."""
        if run.name in self.bars:
            self.bars.pop(run.name).close()
        say(f'{run.label}: {words}')


def last_row(path):
    """Return the last row of a log.csv as a dictionary; empty if there is none."""
    try:
        with open(path, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
        return rows[-1] if rows and float(rows[-1]['epoch']) and rows[-1]['training_accuracy'] else {}
    except (OSError, ValueError, TypeError, KeyError):  # not there yet, or of something else
        return {}


def describe(row):
    """Return the accuracies of a row of log.csv as words."""
    if not row:
        return ''
    validation = f'  val acc {float(row["validation_accuracy"]):.4f}' if row['validation_accuracy'] else ''
    return f'train acc {float(row["training_accuracy"]):.4f}{validation}'


def measure(runs, states):
    """Return a row per run: flags, state, epochs, accuracies from its record, minutes; None where there is no record.

    The rows are sorted by the accuracy on held-out images, if every record has it; else they keep their order. The test
    images never choose anything.
    """
    rows = []
    for run in runs:
        record = find_record(run)
        row = {'run': run.name, **run.values, 'epochs': run.epochs, 'state': states[run.name],
               **dict.fromkeys((*ACCURACIES, 'minutes'))}
        if record:
            row.update(minutes=round(record['wall_seconds'] / 60, 2),
                       validation_accuracy=record['last']['validation_accuracy'],
                       training_accuracy=record['curve']['training_accuracy'][-1],
                       test_accuracy=record['last']['test_accuracy'])
        rows.append(row)
    return by_validation(rows)


def by_validation(rows):
    """Return the rows that have results sorted by validation accuracy, if each has one, then those without results."""
    done = [row for row in rows if row['test_accuracy'] is not None]
    if all(row['validation_accuracy'] is not None for row in done):
        done.sort(key=lambda row: -row['validation_accuracy'])
    return done + [row for row in rows if row['test_accuracy'] is None]


def average(rows):
    """Return a row per combination of flags but --seed: number of seeds, means, standard deviations over n - 1."""
    groups = {}
    for row in rows:
        if row['test_accuracy'] is not None:
            flags = {name: value for name, value in row.items()
                     if name not in ('run', 'seed', 'state', 'minutes', *ACCURACIES)}
            groups.setdefault(tuple(flags.items()), []).append(row)
    means = []
    for flags, members in groups.items():
        mean = {**dict(flags), 'seeds': len(members)}
        for name in ACCURACIES:
            values = [row[name] for row in members if row[name] is not None]
            mean[name] = statistics.mean(values) if values else None
            mean[f'{name}_deviation'] = statistics.stdev(values) if len(values) > 1 else None
        means.append(mean)
    return by_validation(means)


def write(sweep_dir, rows, swept):
    """Write runs.csv and means.csv into the folder, and show their tables.

    swept    the flags that have several values
    """
    means = average(rows)
    write_csv(sweep_dir / 'runs.csv', list(rows[0]), rows)
    if means:
        write_csv(sweep_dir / 'means.csv', list(means[0]), means)
    else:  # no run has ended yet
        (sweep_dir / 'means.csv').unlink(missing_ok=True)
    show_table([*(swept or ['run']), 'state', *(['epochs'] if 'epochs' not in swept else []), *ACCURACIES, 'minutes'],
               rows)
    if any(mean['seeds'] > 1 for mean in means):
        say('')
        for mean in means:
            for name in ACCURACIES:
                mean[name] = with_deviation(mean[name], mean[f'{name}_deviation'])
        show_table([*(flag for flag in swept if flag != 'seed'), 'seeds', *ACCURACIES], means)
    say(f'tables: {sweep_dir / "runs.csv"}' + (', means.csv' if means else ''))


def with_deviation(mean, deviation):
    """Return an accuracy in per cent as words."""
    if mean is None:
        return None
    return f'{100 * mean:.2f}' + ('' if deviation is None else f' ± {100 * deviation:.2f}')


def show_table(columns, rows):
    """Print columns of rows, aligned; accuracies in per cent."""
    titles = [name.replace('_accuracy', ' %') for name in columns]
    cells = [[f'{100 * row[name]:.2f}' if name in ACCURACIES and isinstance(row[name], float) else
              '' if row[name] is None else str(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    for line in [titles, *cells]:
        say('  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
