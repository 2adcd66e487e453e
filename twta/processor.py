"""The processor: its name, its instruction sets, and the cores that this process may use."""
import os
import platform
from pathlib import Path

from twta import UsageError

CGROUP = Path('/sys/fs/cgroup')  # where a container sees its own limits
THREADS = 'TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS'  # TensorFlow's numbers of threads, if set
CPUINFO = Path('/proc/cpuinfo')
NARROWING = ('TF_ENABLE_ONEDNN_OPTS', 'ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA', 'XLA_FLAGS', 'NUMBA_CPU_NAME',
             'NUMBA_CPU_FEATURES', 'ATEN_CPU_CAPABILITY')


def available_cores():
    """Return the number of cores that the process may use, at least 1.

    CPU affinity (taskset, Slurm) and a container's CPU quota (docker --cpus, Kubernetes) limit this number. Quotas of
    process groups outside a container (systemd's CPUQuota) are not detected.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, min(cores, share_of_time(CGROUP) or cores))


def threads(variable):
    """Return the number of threads that the environment variable asks for; without it, one per available core.

    Raises UsageError if the value is not a whole number from 1 to 1024: TensorFlow aborts or hangs on others.
    """
    value = os.environ.get(variable)
    if value is None:
        return available_cores()
    if not (value.isascii() and value.isdigit() and len(value) < 5 and 1 <= int(value) <= 1024):
        raise UsageError(f'{variable}={value[:20]}: not a whole number from 1 to 1024; unset it, or give the number of '
                         'threads')
    return int(value)


def share_of_time(cgroup):
    """Return a cgroup's CPU quota as a number of cores, rounded up; None if it has no quota."""
    for files in (['cpu.max'], ['cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us']):  # cgroup version 2, version 1
        try:
            quota, period = map(int, ' '.join((cgroup / file).read_text() for file in files).split())
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        if quota > 0 and period > 0:  # version 1 writes -1 for no limit
            return -(-quota // period)
    return None


def flags():
    """Return the names of the processor's instruction sets, as Linux spells them on x86; elsewhere an empty set."""
    return set(cpuinfo('flags').split())


def name():
    """Return the processor's name, and on x86 Linux its family and model: one name may cover several generations."""
    model = cpuinfo('model name')
    if model and cpuinfo('cpu family'):
        return f'{model}, family {cpuinfo("cpu family")}, model {cpuinfo("model")}'
    return model or platform.processor() or platform.machine()


def kind():
    """Return the kind of processor in words: the widest instruction set that matters for speed here.

    The text also names environment variables that restrict a library to fewer instructions.
    """
    has = flags()
    widest = next((words for flag, words in (('amx_bf16', 'AMX'), ('avx512_bf16', 'AVX-512 with BF16'),
                                             ('avx512f', 'AVX-512'), ('avx2', 'AVX2')) if flag in has),
                  platform.machine())
    narrowed = ' '.join(f'{variable}={os.environ[variable]}' for variable in NARROWING if variable in os.environ
                        and (variable, os.environ[variable]) != ('TF_ENABLE_ONEDNN_OPTS', '1'))  # as graph.tf1 sets it
    return f'{widest}, narrowed by {narrowed}' if narrowed else widest


def cpuinfo(field):
    """Return the value of the first such field of /proc/cpuinfo, or ''."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(':')[2].strip() for line in lines if line.partition(':')[0].strip() == field), '')
