"""The instructions that Numba has no words for.

They are LLVM's, for use inside kernels. None checks bounds: the caller has room for
what it says.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lc3.format import ZERO_BYTE

LANES = 64  # bytes compared at once

_BYTE = ir.IntType(8)
_WORD = ir.IntType(64)


def _address(context: Any, builder: Any, signature: Any, given: Any, kind: Any) -> Any:
    """Return the address of ``array[at]``, the first two arguments, of a ``kind``."""
    array, at = given[:2]
    data = context.make_array(signature.args[0])(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), kind.as_pointer())


def _nonzero_bytes(_context: Any, data: Any, _at: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        lanes = ir.VectorType(_BYTE, LANES)
        address = _address(context, builder, signature, given, lanes)
        zeros = ir.Constant(lanes, [ZERO_BYTE] * LANES)
        differs = builder.icmp_unsigned("!=", builder.load(address, align=1), zeros)
        return builder.bitcast(differs, ir.IntType(LANES))

    return types.uint64(data, types.int64), emit


def _lowest_bit(_context: Any, _word: Any) -> Any:
    def emit(_codegen: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.cttz(given[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), emit


def _write_word(_context: Any, data: Any, _at: Any, _word: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        address = _address(context, builder, signature, given, _WORD)
        builder.store(given[2], address, align=1)
        return context.get_dummy_value()

    return types.void(data, types.uint64, types.uint64), emit


def _bits_of(_context: Any, _value: Any) -> Any:
    def emit(_codegen: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.IntType(32))

    return types.int32(types.float32), emit


def _float_of(_context: Any, _bits: Any) -> Any:
    def emit(_codegen: Any, builder: Any, _signature: Any, given: Any) -> Any:
        return builder.bitcast(given[0], ir.FloatType())

    return types.float32(types.int32), emit


def _prefetch(_context: Any, data: Any, _at: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        address = _address(context, builder, signature, given, _BYTE)
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name)
        function = function or ir.Function(builder.module, kind, name)
        for_writing, keep, of_data = flag(1), flag(3), flag(1)
        builder.call(function, [address, for_writing, keep, of_data])
        return context.get_dummy_value()

    return types.void(data, types.uint64), emit


def _at_address(kind: Any, made: Any) -> Any:
    def definition(_context: Any, _address: Any) -> Any:
        def emit(_codegen: Any, builder: Any, _signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], kind.as_pointer())

        return cast(Any, types.CPointer)(made)(types.int64), emit

    return definition


def _instruction(definition: Any) -> Any:
    return cast(Any, intrinsic)(definition)


# Array, place: 64 bits; bit i says that array[place + i] is not the byte of five zeros.
nonzero_bytes: Callable[..., np.uint64] = _instruction(_nonzero_bytes)
# Word: the place of its lowest bit that is set; the word must not be 0.
lowest_bit: Callable[..., np.uint64] = _instruction(_lowest_bit)
# A float32 and its bits, as they are.
bits_of: Callable[..., np.int32] = _instruction(_bits_of)
float_of: Callable[..., np.float32] = _instruction(_float_of)
# Array, place, word: eight bytes are written, the lowest first.
write_word: Callable[..., None] = _instruction(_write_word)
# An address in memory: a pointer to values of that type there, for ``numba.carray``.
floats_at: Callable[..., Any] = _instruction(_at_address(ir.FloatType(), types.float32))
halves_at: Callable[..., Any] = _instruction(_at_address(ir.IntType(16), types.uint16))
bytes_at: Callable[..., Any] = _instruction(_at_address(_BYTE, types.uint8))
# Array, place: the line with that element is on its way, to be written soon.
prefetch: Callable[..., None] = _instruction(_prefetch)
