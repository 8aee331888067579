"""Compiled loops kept on disk as object code, so that a process that only runs them need not start the compiler.

numba compiles a loop once per machine and kind of arguments; afterwards llvmlite, which it is built on, loads the
result by itself. Starting numba takes ten times as long, because it prepares everything that it could compile. A loop
qualifies if it is given numbers and contiguous arrays, returns a whole number or nothing, and calls only loops of its
own file: no memory, no library. What does not qualify is left to numba, and so is everything but Linux on x86-64, where
alone this was tested.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Kinds = tuple[Any, ...]  # for each argument two: dtype and dimensions of an array, type and -1 of a number
Native = Callable[..., Any]

_SUFFIX = ".loop"
_NUMBER = -1
_NUMBERS: dict[Any, Any] = {
    int: ctypes.c_int64,
    float: ctypes.c_double,
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
    np.uint32: ctypes.c_uint32,
    np.uint16: ctypes.c_uint16,
    np.uint8: ctypes.c_uint8,
}
_RETURNS: dict[str, Any] = {"none": None, "int64": ctypes.c_int64, "uint64": ctypes.c_uint64}
# The words of an array object that numpy's C interface fixes: after the object's head its memory, the number of its
# dimensions, and where these are.
_DATA = object.__basicsize__ // ctypes.sizeof(ctypes.c_void_p)
_SHAPE = _DATA + 2


def described(arguments: Sequence[Any]) -> tuple[Kinds | None, list[Any]]:
    """Return the kinds of arguments, and the words that C passes: twice the place of an array object, or a number.

    None and no words if one is neither a number nor a contiguous array. The loop reads memory and shape from the array
    object: to ask Python for them takes longer than many a loop.
    """
    kinds: list[Any] = []
    words: list[Any] = []
    for argument in arguments:
        if type(argument) is np.ndarray:
            flags = argument.flags
            if not (flags.c_contiguous and flags.aligned):
                return None, []
            place = id(argument)
            kinds += (argument.dtype, argument.ndim)
            words += (place, place)
        elif type(argument) in _NUMBERS:
            kinds += (type(argument), _NUMBER)
            words.append(argument if type(argument) in (int, float) else argument.item())
        else:
            return None, []
    return tuple(kinds), words


def load(function: Callable[..., Any], options: dict[str, Any], kinds: Kinds) -> Native | None:
    """Return the loop for arguments of these kinds, called with the words of `described`; None if none is kept."""
    if not _qualifies(function):
        return None
    for folder in _folders(function):
        with suppress(OSError):
            found = _unpacked((folder / _file_name(function, options, kinds)).read_bytes())
            if found is not None:
                return _linked(*found, kinds)
    return None


def build(function: Callable[..., Any], loop: Any, options: dict[str, Any], kinds: Kinds) -> Native | None:
    """Compile a loop for arguments of these kinds, keep it if a folder can be written, and return it as `load` does.

    None if it does not qualify; `loop` is what numba made of `function`.
    """
    if not _qualifies(function):
        return None
    made = _object_code(loop, kinds, f"loop_{_digest(function, options, kinds)}")
    if made is None:
        return None
    for folder in _folders(function):
        with suppress(OSError):
            _write(folder / _file_name(function, options, kinds), _packed(*made))
            _drop_earlier(function, folder)
            break
    return _linked(*made, kinds)


def is_kept(function: Callable[..., Any]) -> bool:
    """Return whether object code of a function as it is now is on disk, for whatever arguments."""
    return any(any(folder.glob(f"{_stem(function)}-*{_SUFFIX}")) for folder in _folders(function))


def _qualifies(function: Callable[..., Any]) -> bool:
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return False
    compiling = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
    return compiling and bool(_source(function.__code__.co_filename)) and _arrays_as_expected()


def _dtype(kind: Any) -> np.dtype[Any]:
    """Return the type of a number or of an array's elements; Python's numbers take 8 bytes everywhere."""
    found: np.dtype[Any] = np.dtype({int: np.int64, float: np.float64}.get(kind, kind))
    return found


def _pairs(kinds: Kinds) -> Iterator[tuple[Any, int]]:
    return zip(kinds[::2], kinds[1::2], strict=True)


@cache
def _arrays_as_expected() -> bool:
    """Return whether array objects of this interpreter keep memory and shape where loops look for them."""
    probe = np.zeros((3, 5), np.uint8)
    words = ctypes.cast(id(probe), ctypes.POINTER(ctypes.c_void_p))
    if ctypes.sizeof(ctypes.c_void_p) != 8 or words[_DATA] != probe.ctypes.data or not words[_SHAPE]:
        return False
    return tuple(ctypes.cast(words[_SHAPE], ctypes.POINTER(ctypes.c_ssize_t))[:2]) == probe.shape


def _folders(function: Callable[..., Any]) -> Iterator[Path]:
    """Yield where object code is looked for, and kept in the first that can be written: as numba chooses."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        yield Path(chosen) / "vrscope-loops"
        return
    yield _beside(function)
    with suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vrscope"


def _beside(function: Callable[..., Any]) -> Path:
    return Path(function.__code__.co_filename).parent / "__pycache__"


def _drop_earlier(function: Callable[..., Any], folder: Path) -> None:
    """Remove what is kept of a function's earlier texts beside its module; other folders serve many installations."""
    if folder != _beside(function):
        return
    for path in folder.glob(f"{_begin(function)}*{_SUFFIX}"):
        if not path.name.startswith(_stem(function)):
            path.unlink(missing_ok=True)


def _begin(function: Callable[..., Any]) -> str:
    return f"{Path(function.__code__.co_filename).stem}.{function.__name__}-"


def _stem(function: Callable[..., Any]) -> str:
    """Return how the names of all object code of a function begin, and of its module's text alone."""
    text = _source(function.__code__.co_filename) + _source(__file__)
    return f"{_begin(function)}{hashlib.sha256(text).hexdigest()[:8]}"


def _file_name(function: Callable[..., Any], options: dict[str, Any], kinds: Kinds) -> str:
    return f"{_stem(function)}-{_digest(function, options, kinds)}{_SUFFIX}"


def _digest(function: Callable[..., Any], options: dict[str, Any], kinds: Kinds) -> str:
    """Return what tells one piece of object code from another: all that it was made from and for."""
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    told = sorted((name, sorted(value) if isinstance(value, set) else value) for name, value in options.items())
    arguments = [(_dtype(kind).str, dims) for kind, dims in _pairs(kinds)]
    words = (function.__code__.co_filename, function.__qualname__, enclosed, told, arguments, _machine())
    source = _source(function.__code__.co_filename) + _source(__file__)
    return hashlib.sha256(repr(words).encode() + source).hexdigest()[:32]


def remember(function: Callable[..., Any]) -> None:
    """Read the text of a function's module now: later it may be another than the one that was imported."""
    _source(function.__code__.co_filename)


def is_unchanged(function: Callable[..., Any]) -> bool:
    """Return whether the text of a function's module is still what was remembered."""
    path = function.__code__.co_filename
    return _source(path) == _source.__wrapped__(path)


@cache
def _source(path: str) -> bytes:
    """Return the text of a module when first asked; nothing if there is none: nobody could tell when it changes."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


@cache
def _machine() -> tuple[str, ...]:
    """Return compiler, processor, and what the layout of array objects depends on."""
    from llvmlite import binding

    processor = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), binding.get_process_triple()
    return version("numba"), version("llvmlite"), *processor, str(sys.implementation.cache_tag), f"{_DATA} {_SHAPE}"


def _object_code(loop: Any, kinds: Kinds, name: str) -> tuple[bytes, str, str] | None:
    """Return object code with one entry, the entry's symbol, and what it returns; None if the loop does not qualify."""
    from numba import carray, cfunc, from_dtype, types

    passed, handed, arguments, given = [], [], [], []
    for number, (kind, dims) in enumerate(_pairs(kinds)):
        scalar = from_dtype(_dtype(kind))
        if dims == _NUMBER:
            passed.append(f"a{number}")
            handed.append(f"a{number}")
            arguments.append(scalar)
            given.append(scalar)
        else:
            sizes = "".join(f"s{number}[{_SHAPE}][{dim}], " for dim in range(dims))
            passed += [f"p{number}", f"s{number}"]
            handed.append(f"carray(p{number}[{_DATA}], ({sizes}))")
            arguments += [types.CPointer(types.CPointer(scalar)), types.CPointer(types.CPointer(types.intp))]
            given.append(types.Array(scalar, dims, "C"))
    loop.compile(tuple(given))
    result = loop.overloads[tuple(given)].signature.return_type
    returned = _returned(result, types)
    if returned is None:
        return None
    call = f"loop({', '.join(handed)})"
    call = f"1 if {call} else 0" if result == types.boolean else call
    namespace: dict[str, Any] = {"loop": loop, "carray": carray}
    # The compiler wants one parameter for each word, and their number is that of the arguments.
    exec(f"def {name}({', '.join(passed)}):\n    {'return ' * (returned != 'none')}{call}\n", namespace)
    entry = cfunc(getattr(types, returned)(*arguments))(namespace[name])
    with suppress(RuntimeError):  # llvmlite's, for whatever it cannot do: numba then runs the loop
        code = _alone(entry.inspect_llvm(), entry.native_name)
        return None if code is None else (code, entry.native_name, returned)
    return None


def _alone(text: str, symbol: str) -> bytes | None:
    """Return object code of a module of which one symbol is seen; None if it needs a library that numba brings."""
    from llvmlite import binding

    module = binding.parse_assembly(text)
    for item in _items(module):
        if not item.is_declaration and item.name != symbol:
            item.linkage = "internal"  # their names occur in other pieces too
    # Now that nothing else is called from outside, what serves only exceptions, which loops do not raise, falls away.
    builder = binding.create_pass_builder(_target(), binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    if any(item.is_declaration and not item.name.startswith("llvm.") for item in _items(module)):
        return None
    return bytes(_target().emit_object(module))


def _items(module: Any) -> Iterator[Any]:
    yield from module.functions
    yield from module.global_variables


def _returned(result: Any, types: Any) -> str | None:
    """Return what C returns for what a loop returns; None if that is no whole number."""
    if result == types.none:
        return "none"
    if isinstance(result, types.Boolean):
        return "int64"
    if isinstance(result, types.Integer):
        return "int64" if result.signed else "uint64"
    return None


def _packed(code: bytes, symbol: str, returned: str) -> bytes:
    rest = f"{symbol} {returned}\n".encode() + code
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def _unpacked(packed: bytes) -> tuple[bytes, str, str] | None:
    """Return what was packed; None if it is not whole."""
    told, _, rest = packed.partition(b"\n")
    if told.decode("latin-1") != hashlib.sha256(rest).hexdigest():
        return None
    head, _, code = rest.partition(b"\n")
    symbol, returned = head.decode().split()
    return code, symbol, returned


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def _linked(code: bytes, symbol: str, returned: str, kinds: Kinds) -> Native:
    """Return object code as a function of this process."""
    from llvmlite import binding

    engine = _engine()
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    words: list[Any] = []
    for kind, dims in _pairs(kinds):
        words += [_NUMBERS[kind]] if dims == _NUMBER else [ctypes.c_void_p, ctypes.c_void_p]
    return ctypes.CFUNCTYPE(_RETURNS[returned], *words)(engine.get_function_address(symbol))


@cache
def _target() -> Any:
    """Return the processor of this machine as the compiler sees it."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    own = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(cpu=own[0], features=own[1], opt=3, codemodel="jitdefault", jit=True)


@cache
def _engine() -> Any:
    """Return what loads object code into this process; it lives as long as the process."""
    from llvmlite import binding

    return binding.create_mcjit_compiler(binding.parse_assembly(""), _target())
