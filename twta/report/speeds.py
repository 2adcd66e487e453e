"""The tables of speed and memory in benchmarks/README.md, from the rows in benchmarks/*.json."""
import json

from twta.report.evidence import ROOT
from twta.report.markdown import table

MIB = 2 ** 20


def benchmark(name):
    return json.loads((ROOT / 'benchmarks' / f'{name}.json').read_text())


def tables():
    """Return {name of a table in benchmarks/README.md: its lines in Markdown}."""
    training, inference = benchmark('training_speed')['rows'], benchmark('inference_speed')['rows']
    torch = benchmark('training_speed_torch')['rows']
    return {'training': training_gains(training), 'beginning': beginnings(training), 'torch': torch_speeds(torch),
            'processors': torch_summary(torch), 'inference_speed': inference_summary(inference),
            'engines': inference_engines(inference), 'inference': inference_gains(inference), 'sizes': sizes(inference)}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def by_way(rows):
    """Return {network: {way: row}} in the order of the rows."""
    networks = {}
    for row in rows:
        networks.setdefault(row['network'], {})[row['way']] = row
    return networks


def per_second(row, what='training'):
    return f'{row[f"{what}_images_per_second"]:,.0f}'


def training_gains(rows):
    lines = []
    for network, row in by_way(rows).items():
        own, plain, its = row['project'], row['project float32'], row['published']
        lines.append((network, per_second(own), per_second(plain), per_second(its), f'**{its["training_ratio"]:.2f}**',
                      f'{its["training_ratio"] / plain["training_ratio"]:.2f}', f'{its["step_ratio"]:.2f}',
                      per_second(own, 'inference'), per_second(its, 'inference'), f'{its["inference_ratio"]:.2f}'))
    return table(('network', 'training, images/s', 'in float32', 'published way', 'gain', 'gain in float32',
                  'gain, steps only', 'inference', 'published way', 'gain'), lines)


def beginnings(rows):
    """Return a row per network: time to the first step, peak memory, time that the end of an epoch takes."""
    def first(row):
        return f'{row["first_step_seconds"]:.1f} ({row["import_seconds"]:.1f})'

    def memory(row):
        return f'{row["peak_memory_bytes"] / MIB:,.0f}'

    return table(('network', 'first step after, s (of them import)', 'published way', 'peak memory, MiB',
                  'published way', 'end of an epoch, s'), (
        (network, first(row['project']), first(row['published']), memory(row['project']), memory(row['published']),
         f'{row["project"]["epoch_end_seconds"]:.2f}') for network, row in by_way(rows).items()))


def by_processor(rows):
    """Return {(kind of processor, network): {way: row}} in the order of the rows.

    A kind is without the variables that narrow it: a second narrowing would need another name in the tables.
    """
    found = {}
    for row in rows:
        ways = found.setdefault((kind_of(row), row['network']), {})
        assert row['way'] not in ways, f'two rows of {row["network"]}, {row["way"]}'
        ways[row['way']] = row
    return found


def torch_speeds(rows):
    ways = [way for way in dict.fromkeys(row['way'] for row in rows) if way.startswith('torch')]
    columns = 'published', *ways, 'project float32'
    return table(('processor', 'network', 'these scripts', 'published way',
                  *(way.replace('torch', 'PyTorch') for way in ways), 'these scripts in float32'), (
        (kind, network, per_second(row['project']),
         *(f'{per_second(row[way])} ({row[way]["training_ratio"]:.2f})' if way in row else '' for way in columns))
        for (kind, network), row in by_processor(rows).items()))


def torch_summary(rows):
    """Return a row per processor and network: the speed of training beside PyTorch's fastest way."""
    lines = []
    for (kind, network), row in by_processor(rows).items():
        best = min((way for way in row if way.startswith('torch')), key=lambda way: row[way]['training_ratio'])
        lines.append((kind, network, per_second(row['project']), f'{per_second(row[best])} ({best.partition(" ")[2]})',
                      f'{row[best]["training_ratio"]:.2f}'))
    return table(('processor', 'network', 'these scripts', "PyTorch's fastest way", 'gain'), lines)


# ----------------------------------------------------------------------------------------------------------------------
# Inference


def kind_of(row):
    """Return the kind of processor without the variables that narrow it."""
    return row['processor'].partition(' by ')[0]


def by_batch(rows):
    """Return {(kind of processor, network, batch): {threads: {engine: row}}} in the order of the rows."""
    found = {}
    for row in rows:
        batch = found.setdefault((kind_of(row), row['network'], row['batch']), {})
        batch.setdefault(row['threads'], {})[row['engine']] = row
    return found


def fastest(threads):
    """Return {engine: images per second with its faster number of threads}."""
    return {engine: max(rows[engine]['images_per_second'] for rows in threads.values())
            for engine in next(iter(threads.values()))}


def inference_summary(rows):
    """Return a row per network and batch: for each processor the packed engine and the fastest int8 engine."""
    found, cells = by_batch(rows), {}
    kinds = list(dict.fromkeys(kind for kind, *_ in found))
    for (kind, network, batch), threads in found.items():
        speeds = fastest(threads)
        name = max((engine for engine in speeds if 'int8' in engine), key=speeds.get)
        cells.setdefault((network, batch), {})[kind] = (
            f'{speeds["packed"]:,.0f}', f'{speeds[name]:,.0f} ({name.removesuffix(" int8")})',
            f'**{speeds["packed"] / speeds[name]:.2f}**')
    titles = [words for kind in kinds for words in (f'{kind}: packed', 'best int8', 'gain')]
    return table(('network', 'batch', *titles), (
        (network, str(batch), *(cell for kind in kinds for cell in row.get(kind, ('', '', ''))))
        for (network, batch), row in cells.items()))


def inference_engines(rows):
    """Return a row per processor, network and batch: each engine with its faster number of threads."""
    engines = list(dict.fromkeys(row['engine'] for row in rows))
    return table(('processor', 'network', 'batch', *engines), (
        (kind, network, str(batch), *(f'{speeds[engine]:,.0f}' for engine in engines))
        for (kind, network, batch), threads in by_batch(rows).items() for speeds in [fastest(threads)]))


def inference_gains(rows):
    """Return a row per batch and threads: packed over TensorFlow, ONNX Runtime and the best int8 engine."""
    lines = []
    for (kind, network, batch), threads in by_batch(rows).items():
        for count, engines in sorted(threads.items(), reverse=True):
            speeds = {engine: row['images_per_second'] for engine, row in engines.items()}
            own, int8 = speeds['packed'], max(speed for engine, speed in speeds.items() if 'int8' in engine)
            lines.append((kind, network, str(batch), str(count), f'{own:,.0f}', f'{own / speeds["TensorFlow"]:.1f}',
                          f'{own / speeds["ONNX Runtime"]:.1f}', f'{own / int8:.2f}'))
    return table(('processor', 'network', 'batch', 'threads', 'packed, images/s', 'over TensorFlow float32',
                  'over ONNX Runtime float32', 'over the best int8 engine'), lines)


def sizes(rows):
    """Return a row per network: bytes of the model, peak memory of a process that runs only the engine."""
    found = {}
    for row in rows:
        words = f'{row["bytes"]:,} ({row["peak_memory"] / MIB:.0f})'
        found.setdefault(row['network'], {}).setdefault(row['engine'], words)
    engines = list(dict.fromkeys(row['engine'] for row in rows))
    return table(('model bytes (peak memory, MiB)', *engines), (
        (network, *(row[engine] for engine in engines)) for network, row in found.items()))
