"""LLVM's generic vectors: what the kernels of the compiled engines are made of.

LLVM compiles them to AVX-512, AVX2, SSE2 or NEON. Addresses are int64.
"""
import functools

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic

BYTE, INT, LONG = (ir.IntType(bits) for bits in (8, 32, 64))
FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()


def processor_of_code():
    """Return the architecture that numba compiles for, such as 'x86_64', and its features, such as '+avx512f'."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.split('-')[0], features.split(',')


@functools.cache
@global_compiler_lock  # a fork waits for it: see twta.packed.pool
def has_avx2():
    """Return whether numba compiles for AVX2.

    If the features are those that the processor's name implies, only the code tells.
    """
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    if not triple.startswith('x86_64'):
        return False
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=name, features=features)
    code = 'define <32 x i8> @sum(<32 x i8> %a, <32 x i8> %b) { %c = add <32 x i8> %a, %b ret <32 x i8> %c }'
    return 'vpaddb\t%ymm' in machine.emit_assembly(binding.parse_assembly(code))


def vector(kind, lanes):
    return ir.VectorType(kind, lanes)


def load(builder, address, kind, alignment):
    instruction = builder.load(builder.inttoptr(address, kind.as_pointer()), typ=kind)
    instruction.align = alignment
    return instruction


def offset_address(builder, base, table, index):
    """Return base + table[index]; table is the address of int64 numbers."""
    return builder.add(base, load(builder, builder.add(table, LONG(8 * index)), LONG, 8))


def splat(builder, scalar, lanes):
    """Return a vector with the scalar in every lane."""
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, INT(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(vector(INT, lanes), [0] * lanes))


def accumulator(builder, kind):
    """Return a stack slot that holds 0; LLVM keeps it in a register."""
    cell = cgutils.alloca_once(builder, kind)
    builder.store(ir.Constant(kind, [0] * kind.count), cell)
    return cell


def concatenate(builder, vectors):
    """Return one vector of the lanes of several vectors; their number is a power of two."""
    while len(vectors) > 1:
        order = ir.Constant(vector(INT, 2 * vectors[0].type.count), list(range(2 * vectors[0].type.count)))
        vectors = [builder.shuffle_vector(*pair, order) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def population_count(builder, bits):
    """Return the number of ones in each lane of a vector of int64."""
    name = f'llvm.ctpop.v{bits.type.count}i64'
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(bits.type, [bits.type]), name)
    return builder.call(function, [bits])


def multiply_add(builder, x, w, total):
    """Return x * w + total of floats, rounded once if the processor can, else twice."""
    return builder.fadd(builder.fmul(x, w, flags=['contract']), total, flags=['contract'])


def distance(builder, a, b):
    """Return |a - b| of vectors of float32."""
    difference = builder.bitcast(builder.fsub(a, b), vector(INT, a.type.count))
    positive = ir.Constant(difference.type, [0x7fffffff] * a.type.count)
    return builder.bitcast(builder.and_(difference, positive), a.type)


def minimum(builder, a, b):
    """Return the smaller of each two floats; b if they cannot be compared."""
    return builder.select(builder.fcmp_ordered('<', a, b), a, b)


def store_bits(builder, bits, places):
    """Store a vector of bits: equal parts of it, in whole bytes, at each of the addresses."""
    bits = builder.bitcast(bits, ir.IntType(bits.type.count))
    kind = ir.IntType(bits.type.width // len(places))
    for index, place in enumerate(places):
        part = bits if len(places) == 1 else builder.trunc(builder.lshr(bits, bits.type(kind.width * index)), kind)
        builder.store(part, builder.inttoptr(place, kind.as_pointer())).align = 1


@intrinsic
def peek(context, address):
    """Return the int64 at an address."""
    def emit(context, builder, signature, arguments):
        return load(builder, arguments[0], LONG, 8)

    return types.int64(types.int64), emit


@intrinsic
def peek_byte(context, address):
    """Return the byte at an address."""
    def emit(context, builder, signature, arguments):
        return builder.zext(load(builder, arguments[0], BYTE, 1), LONG)

    return types.int64(types.int64), emit


@intrinsic
def read(context, address):
    """Return the int64 at an address, to which other threads write."""
    def emit(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], LONG.as_pointer()), 'acquire', 8)

    return types.int64(types.int64), emit


@intrinsic
def fetch_add(context, address, number):
    """Add to the int64 at an address and return what it was before, as one step that no other thread can part."""
    def emit(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], LONG.as_pointer())
        return builder.atomic_rmw('add', place, arguments[1], 'seq_cst')

    return types.int64(types.int64, types.int64), emit


@intrinsic
def poke(context, address, word):
    """Store the lowest byte of a word at an address."""
    def emit(context, builder, signature, arguments):
        byte = builder.trunc(arguments[1], BYTE)
        builder.store(byte, builder.inttoptr(arguments[0], BYTE.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), emit


@intrinsic
def poke_four(context, address, four):
    """Store the four bytes of a uint32 at an address."""
    def emit(context, builder, signature, arguments):
        address, four = arguments
        builder.store(four, builder.inttoptr(address, INT.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32), emit


@intrinsic
def pointer(context, address):
    """Return an address as a pointer to uint64."""
    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], LONG.as_pointer())

    return types.CPointer(types.uint64)(types.int64), emit
