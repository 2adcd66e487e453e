#!/usr/bin/env python3
"""Copy the int8 engines so that they take this x86 for one with AVX2 and nothing newer.

    python benchmarks/narrow.py /tmp/narrow
    env $(cat /tmp/narrow/environment) python benchmarks/inference_speed.py --all

ONNX Runtime, LiteRT and OpenVINO choose their kernels by the instruction cpuid, and have no variable for it. In the
copies each cpuid is another instruction of two bytes, ud2, which the processor refuses. A small preloaded library
catches that and answers as cpuid would, without AVX-512, AMX, VNNI and what came after AVX2. The kernels that then run
are those of such a processor; clock, caches and memory are not. `environment` also narrows oneDNN, XLA and numba.

Needs Linux, objdump and a C compiler. Engines that are not installed are left out.
"""
import argparse
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

CPUID, UD2 = b'\x0f\xa2', b'\x0f\x0b'
PACKAGES = 'onnxruntime', 'ai_edge_litert', 'openvino'
LIBRARIES = ('onnxruntime_pybind11_state', 'libonnxruntime', 'libLiteRt.so', 'libpywrap_litert_common',
             'libopenvino.so', 'libopenvino_intel_cpu_plugin')
VARIABLES = {'ONEDNN_MAX_CPU_ISA': 'AVX2', 'XLA_FLAGS': '--xla_cpu_max_isa=AVX2', 'NUMBA_CPU_NAME': 'haswell',
             'NUMBA_CPU_FEATURES': ''}
ANSWER = r'''
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <ucontext.h>

static uint32_t without(uint32_t bits, int count, const int *cleared) {
    for (int i = 0; i < count; i++) bits &= ~(1u << cleared[i]);
    return bits;
}
#define WITHOUT(bits, ...) without(bits, sizeof (int[]){__VA_ARGS__} / sizeof(int), (int[]){__VA_ARGS__})

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)registers[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0x0b) { signal(SIGILL, SIG_DFL); return; }
    uint32_t leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) {  /* AVX-512 in b, c and d; GFNI, VAES, VPCLMULQDQ in c; AMX in d */
        b = WITHOUT(b, 16, 17, 21, 26, 27, 28, 30, 31);
        c = WITHOUT(c, 1, 6, 8, 9, 10, 11, 12, 14);
        d = WITHOUT(d, 2, 3, 8, 22, 23, 24, 25);
    }
    if (leaf == 7 && part == 1) { a = WITHOUT(a, 4, 5, 21, 22, 23); d = 0; }  /* AVX-VNNI, BF16, FP16, IFMA; AVX10 */
    if (leaf == 0xd && part == 0) a = WITHOUT(a, 5, 6, 7, 17, 18);  /* the state of AVX-512 and AMX */
    if (leaf == 0x24) a = b = c = d = 0;  /* AVX10 */
    registers[REG_RAX] = a; registers[REG_RBX] = b; registers[REG_RCX] = c; registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, 0);
}
'''


def patch(library):
    """Replace each cpuid in a library; return how many there were."""
    sections = subprocess.run(['objdump', '-h', library], check=True, capture_output=True, text=True).stdout
    _, address, _, offset = (int(value, 16) for value in
                             re.search(r' \.text +(\w+) +(\w+) +(\w+) +(\w+)', sections).groups())
    code, count = bytearray(library.read_bytes()), 0
    with subprocess.Popen(['objdump', '-d', '-j', '.text', '--no-show-raw-insn', library], stdout=subprocess.PIPE,
                          text=True) as listing:
        for line in listing.stdout:
            found = re.match(r' *([0-9a-f]+):\s+cpuid', line)
            if found:
                place = int(found[1], 16) - address + offset
                assert code[place:place + 2] == CPUID, f'{library}: no cpuid at {found[1]}'
                code[place:place + 2] = UD2
                count += 1
    library.write_bytes(code)
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='a new folder for the copies')
    folder = parser.parse_args().folder.resolve()
    if folder.exists():
        parser.error(f'{folder} exists; name a new folder')
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if not found:
            print(f'{package}: not installed')
            continue
        shutil.copytree(Path(found.origin).parent, folder / package)
        total = 0
        for library in sorted((folder / package).rglob('*.so*')):
            if library.name.startswith(LIBRARIES):
                count = patch(library)
                total += count
                print(f'{library.name}: {count} cpuid')
        if not total:
            raise SystemExit(f'narrow.py: error: {package}: no cpuid found; LIBRARIES lacks the names of this version')
    folder.mkdir(exist_ok=True)
    (folder / 'answer.c').write_text(ANSWER)
    subprocess.run(['cc', '-O2', '-shared', '-fPIC', '-o', folder / 'answer.so', folder / 'answer.c'], check=True)
    variables = {**VARIABLES, 'PYTHONPATH': folder, 'LD_PRELOAD': folder / 'answer.so'}
    (folder / 'environment').write_text(' '.join(f'{name}={value}' for name, value in variables.items()) + '\n')
    print(f'environment: {folder / "environment"}')


if __name__ == '__main__':
    main()
