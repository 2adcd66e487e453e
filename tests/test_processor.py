"""Kernels, precision and threads on each kind of processor; other kinds than this machine's are simulated."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS, run_script, start

from twta import UsageError, processor
from twta.graph import fast, session
from twta.graph.tf1 import tf
from twta.packed import pool

pytestmark = pytest.mark.processor


def onednn_after_import(machine, **environment):
    """Return TF_ENABLE_ONEDNN_OPTS and tf1.ONEDNN in a new process on a simulated machine."""
    code = (f'import os, platform; platform.machine = lambda: {machine!r}; from twta.graph import tf1; '
            'print(os.environ.get("TF_ENABLE_ONEDNN_OPTS"), tf1.ONEDNN)')
    inherited = {name: value for name, value in os.environ.items() if name != 'TF_ENABLE_ONEDNN_OPTS'}
    done = subprocess.run([sys.executable, '-c', code], env={**inherited, **environment}, cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout.split()


@pytest.mark.parametrize('machine, environment, expected', [
    ('x86_64', {}, ['1', 'True']), ('AMD64', {}, ['1', 'True']), ('aarch64', {}, ['None', 'False']),
    ('x86_64', {'TF_ENABLE_ONEDNN_OPTS': '0'}, ['0', 'False'])])
def test_onednn_is_on_for_x86_unless_the_user_says_otherwise(machine, environment, expected):
    assert onednn_after_import(machine, **environment) == expected


def test_float32_on_a_gpu_is_float32():
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


@pytest.mark.parametrize('flags, onednn, limit, native', [
    ('fpu avx2 avx512f avx512_bf16', True, None, True), ('avx512_bf16', True, 'AVX512_CORE_BF16', True),
    ('amx_bf16', True, 'default', True), ('fpu avx2', True, None, False), ('avx512f avx512_vnni', True, None, False),
    ('avx512_bf16', False, None, False), ('avx512_bf16', True, 'AVX2', False),
    ('amx_bf16', True, 'avx512_core', False)])
def test_bfloat16_is_taken_if_the_processor_multiplies_it_and_onednn_is_on(
        tmp_path, monkeypatch, flags, onednn, limit, native):
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text('processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: A Processor\n'
                       f'flags\t\t: {flags}\n\nprocessor\t: 1\n')
    monkeypatch.setattr(processor, 'CPUINFO', cpuinfo)
    monkeypatch.setattr(session, 'ONEDNN', onednn)
    monkeypatch.delenv('ONEDNN_MAX_CPU_ISA', raising=False)
    if limit:
        monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', limit)
    assert session.multiplies_bfloat16(None) == native
    assert session.choose_precision('auto', None) == (tf.bfloat16 if native else tf.float32)
    assert session.choose_precision('bfloat16', None) == tf.bfloat16
    assert processor.name() == 'A Processor, family 26, model 2'


@pytest.mark.parametrize('flags, kind', [
    ('avx2 avx512f avx512_bf16', 'AVX-512 with BF16'), ('avx2 avx512f', 'AVX-512'), ('sse4_2 avx2', 'AVX2'),
    ('amx_bf16 avx512_bf16', 'AMX'), ('sse4_2', 'x86_64')])
def test_the_kind_of_processor_in_words(tmp_path, monkeypatch, flags, kind):
    monkeypatch.setattr(processor, 'CPUINFO', tmp_path / 'cpuinfo')
    monkeypatch.setattr(processor.platform, 'machine', lambda: 'x86_64')
    for variable in processor.NARROWING:
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / 'cpuinfo').write_text(f'flags : {flags}\n')
    assert processor.kind() == kind
    monkeypatch.setenv('TF_ENABLE_ONEDNN_OPTS', '1')
    assert processor.kind() == kind
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2')
    assert processor.kind() == f'{kind}, narrowed by ONEDNN_MAX_CPU_ISA=AVX2'
    (tmp_path / 'cpuinfo').unlink()  # as on other systems than Linux
    assert processor.kind().startswith('x86_64')


def test_an_emulated_bfloat16_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fast, 'BFLOAT16_IS_EMULATED', True)
    flags = '--epochs', 1, '--batch_size', 600, '--precision'
    start(tmp_path / 'bfloat16', *flags, 'bfloat16')
    assert 'WARNING: bfloat16 is emulated on this processor; --precision float32 is faster' in capsys.readouterr().out
    start(tmp_path / 'float32', *flags, 'float32')
    assert 'WARNING' not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Cores


@pytest.mark.parametrize('files, cores, without_affinity', [
    ({}, 6, 64), ({'cpu.max': 'max 100000\n'}, 6, 64), ({'cpu.max': '200000 100000\n'}, 2, 2),
    ({'cpu.max': '50000 100000\n'}, 1, 1), ({'cpu.max': '150000 100000\n'}, 2, 2),
    ({'cpu.max': '900000 100000\n'}, 6, 9), ({'cpu.max': 'nonsense'}, 6, 64),
    ({'cpu/cpu.cfs_quota_us': '300000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 3, 3),
    ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 6, 64)])
def test_cores_are_those_that_the_process_may_use(tmp_path, monkeypatch, files, cores, without_affinity):
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    monkeypatch.setattr(processor, 'CGROUP', tmp_path)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    assert processor.available_cores() == cores
    monkeypatch.delattr(os, 'sched_getaffinity')  # as on macOS
    assert processor.available_cores() == without_affinity


def configured_threads(monkeypatch):
    """Return the numbers of intra-op and inter-op threads of a session by open_session."""
    monkeypatch.setattr(session.tf, 'Session', lambda graph, config: config)
    config = session.open_session(None, 0)
    return config.intra_op_parallelism_threads, config.inter_op_parallelism_threads


def test_tensorflow_and_numba_take_as_many_threads_as_there_are_cores(monkeypatch):
    for variable in ('TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(processor, 'available_cores', lambda: 1)
    assert configured_threads(monkeypatch) == (1, 1)
    threads = SimpleNamespace(NUMBA_NUM_THREADS=8)
    monkeypatch.setattr(pool.numba, 'config', threads)
    assert [pool.count_threads(given) for given in (None, 1, 5, 99)] == [1, 1, 5, 8]
    monkeypatch.setenv('TF_NUM_INTRAOP_THREADS', '3')
    assert configured_threads(monkeypatch) == (3, 1)


@pytest.mark.parametrize('script', ['TWTA_5_5_MNIST', 'Spiking_MNIST'])
def test_every_script_refuses_threads_on_which_tensorflow_aborts(tmp_path, script):
    run_dir = tmp_path / 'run'
    run_dir.mkdir()
    (run_dir / 'checkpoint').touch()  # so that the Spiking script goes on to TensorFlow
    finished = run_script(ROOT / 'MNIST' / f'{script}.py', '--dataset', 'digits', '--run_dir', run_dir,
                          TF_NUM_INTRAOP_THREADS='-1')
    assert (finished.returncode, finished.stdout) == (2, '')
    assert finished.stderr.startswith(f'{script}.py: error: TF_NUM_INTRAOP_THREADS=-1: not a whole number')


@pytest.mark.parametrize('value', ['two', '-1', '', '0', '1025', '99999999999'])
def test_a_number_of_threads_that_is_none_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.setenv('TF_NUM_INTEROP_THREADS', value)
    finished = run_script(SCRIPTS['TWTA_5_5_MNIST'], '--dataset', 'digits', '--run_dir', tmp_path / 'run')
    assert (finished.returncode, finished.stdout) == (2, '') and not (tmp_path / 'run').exists()
    with pytest.raises(UsageError, match=f'TF_NUM_INTEROP_THREADS={value}: not a whole number from 1 to 1024'):
        configured_threads(monkeypatch)
