"""Settings of a script: its module-level names, overridden by config files, overridden by flags.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False
    python train.py --help

A script calls this under its __main__ guard, before it binds other plain names at module level:

    with one_line_errors():
        explicit = configure(globals())

A setting is a module-level name, lower case and without leading underscore, that holds a bool, int, float or
str. It accepts the type of its default, or what an annotation says; None needs one:

    top_k: int | None = 200
    compile: bool | Literal['auto'] = 'auto'

A config file whose settings follow from others defines a function, which is called once the flags are known:

    def derive(depth: int = 12, head_dim: int = 128, max_iters=None):
        return dict(n_layer=depth, n_head=depth * 64 // head_dim, ...)

A parameter with an annotation is a setting of the file's own, which flags may give as well; any other is a
setting of the script. Its value is the flag's or file's, else its default here, else the script's. The
settings that derive() returns override the files, and flags override them.
"""

import ast
import contextlib
import difflib
import inspect
import io
import numbers
import os
import runpy
import symtable
import sys
import tokenize
import traceback
import types
import typing
from pathlib import Path

WORDS = {bool: 'True, False', int: 'a whole number', float: 'a number', str: 'text', types.NoneType: 'None'}
BOOLS = {'True': True, 'true': True, '1': True, 'False': False, 'false': False, '0': False}


def configure(settings: dict, argv: list[str] | None = None) -> set[str]:
    """Override settings by config files, in their order, and then by flags. Print the changes.

    settings  the script's globals(), changed in place, and only if all arguments are right
    argv      the arguments, sys.argv[1:] if None
    returns   names of the settings that a file or flag gave, even if it gave the default
    raises    ValueError, FileNotFoundError: one line with source, name, value and what is accepted
    """
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print(help_text(settings), flush=True)
        raise SystemExit(0)
    accepted, defaults, given = accepted_by(settings), config_of(settings), {}
    known = dict(accepted)  # with the settings of the files' own
    for file in parse(argv, known, strict=False)[0]:
        values, derive = read_config(file, settings.get('__file__', ''), {**defaults, **given}, accepted)
        given.update(values)
        known = {**own_settings(derive), **known}
        _, flags = parse(argv, known, strict=False)
        given.update(call_derive(file, derive, given, flags, defaults, accepted))
    _, flags = parse(argv, known)
    given.update((name, value) for name, value in flags.items() if name in accepted)
    settings.update(given)
    changed = [f'{name} = {settings[name]!r}' for name in defaults if settings[name] != defaults[name]]
    if changed and os.environ.get('RANK', '0') == '0':
        print('overrides: ' + ', '.join(changed))
    return set(given)


def config_of(settings: dict) -> dict:
    """Return the values of all settings by name."""
    return {name: settings[name] for name in accepted_by(settings)}


# -----------------------------------------------------------------------------
# accepted values


def accepted_by(settings: dict) -> dict[str, list]:
    """Return the types and literal strings that each setting in a script's globals() accepts."""
    annotated = types.SimpleNamespace(__annotations__=settings.get('__annotations__', {}))
    hints = typing.get_type_hints(annotated, settings)  # resolves `from __future__ import annotations`
    accepted = {}
    for name, value in settings.items():
        is_setting = type(value) in WORDS and (value is not None or name in hints)
        if is_setting and not name.startswith('_') and not name.isupper():
            accepted[name] = options_of(hints.get(name, type(value)))
    return accepted


def options_of(hint):
    """bool | Literal['auto'] -> [bool, 'auto']"""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
    return [option for member in members for option in typing.get_args(member) or [member]]


def phrase(options):
    """'is a whole number or None', 'are auto, float32, bfloat16, float16'"""
    words = [WORDS.get(option, option) for option in options]
    return 'is ' + ' or '.join(words) if len(words) < 3 and bool not in options else 'are ' + ', '.join(words)


def from_text(text, options):
    """Return the value that the text of a flag stands for, or the text itself."""
    if bool in options and text in BOOLS:
        return BOOLS[text]
    if types.NoneType in options and text == 'None':
        return None
    if int in options or float in options:
        for number in (int, float):
            with contextlib.suppress(ValueError):
                return number(text)
    return text


def checked(value, options: list, source: str):
    """Return the value in the type of the setting: 1 as 1.0 for a float, 1e3 as 1000 for an int.

    source  the value's origin for the error: '--dtype=bf16' or "config/x.py: dtype = 'bf16'"
    """
    if isinstance(value, str) and (str in options or value in options):
        return str(value)
    if type(value) in (bool, types.NoneType) and type(value) in options:
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # NumPy's too
        whole = isinstance(value, numbers.Integral) or (abs(value) <= 2**53 and value == int(value))
        if int in options and whole:
            return int(value)
        if float in options and value == value:  # nan is not
            with contextlib.suppress(OverflowError):
                return float(value)
    words = [option for option in options if isinstance(option, str)]
    near = nearest(str(value), words, '; did you mean {}?')
    raise ValueError(f'{source}: accepted {phrase(options)}{near}')


def nearest(word, choices, remedy, otherwise=''):
    """Return the remedy with the choice that is spelled most like the word; `otherwise` if none is close."""
    near = difflib.get_close_matches(word, choices, n=1)
    return remedy.format(near[0]) if near else otherwise


# -----------------------------------------------------------------------------
# flags and config files


def parse(argv, accepted, strict=True):
    """Split the command line into config files, in order, and flags by name. The last of several equal
    flags wins.

    strict  False: skip unknown flags, which may belong to the files
    """
    files, flags, rest = [], {}, list(argv)
    while rest:
        arg = rest.pop(0)
        key, equals, text = arg.partition('=')
        name = key.lstrip('-').replace('-', '_')
        if not key.startswith('-') and name not in accepted:
            files.append(arg)
            continue
        if not strict and name not in accepted:
            if not equals and rest and not rest[0].startswith('--'):
                rest.pop(0)
            continue
        if not key.startswith('--') or name not in accepted:
            near = nearest(name, accepted, ', did you mean --{}?', ', --help lists all')
            raise ValueError(f'{key}: unknown setting{near}')
        options = accepted[name]
        if not equals:
            following = rest[0] if rest and not rest[0].startswith('--') else None
            if bool in options and following not in (*BOOLS, 'None', *options):
                text = 'True'  # a bare --flag; the next word may be a config file
            elif following is None:
                raise ValueError(f'{key}: no value, write {key}=VALUE: accepted {phrase(options)}')
            else:
                text = rest.pop(0)
        flags[name] = checked(from_text(text, options), options, f'{key}={text}')
    return files, flags


def read_config(file, script, current, accepted):
    """Run a config file that sees the current settings. Return the values that it gives by name, and its
    derive().

    Imports, functions, classes and names with a leading underscore are the file's own. Any other unknown
    name is an error.
    """
    folder = os.path.dirname(script)
    path = next(filter(os.path.isfile, (file, os.path.join(folder, file))), None)
    if path is None:
        stems = [p.stem for base in ('', folder) for p in Path(base, 'config').glob('*.py')]
        near = nearest(Path(file).stem, stems, ', did you mean config/{}.py?')
        raise FileNotFoundError(f'{file}: no such config file{near}')
    source = Path(path).read_bytes()
    try:
        symbols = symtable.symtable(source, path, 'exec').get_symbols()
        result = runpy.run_path(path, init_globals=current)
    except (Exception, SystemExit) as e:
        raise ValueError(where(file, path, e)) from e
    # a file gives the settings that it assigns, even the default, and those that an `import *` changed
    assigned = [symbol.get_name() for symbol in symbols if symbol.is_assigned()]
    for name in assigned:
        value = result.get(name)
        is_own = name.startswith('_') or name not in result or callable(value) or inspect.ismodule(value)
        if name not in accepted and not is_own:
            near = nearest(name, accepted, ', did you mean {}?', ' (a name of its own begins with _)')
            raise ValueError(f'{file}: unknown setting {name}{near}')
    values = {}
    for name in current.keys() & result.keys():
        value = result[name]
        if name in assigned or value is not current[name]:
            values[name] = checked(value, accepted[name], f'{file}: {name} = {value!r}')
    derive = result.get('derive')
    return values, derive if inspect.isfunction(derive) else None


def where(file, path, error):
    """'config/x.py:3: ZeroDivisionError: division by zero', with the last line of the file in the
    traceback.
    """
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = lines[-1] if lines else getattr(error, 'lineno', None)  # of a SyntaxError
    return f'{file}:{line or 1}: {type(error).__name__}: {getattr(error, "msg", error)}'


def own_settings(derive):
    """Return the accepted values of the annotated parameters of a file's derive()."""
    hints = typing.get_type_hints(derive) if derive else {}
    return {name: options_of(hint) for name, hint in hints.items()}


def call_derive(file, derive, given, flags, defaults, accepted):
    """Return the settings that follow from the others, by name."""
    if derive is None:
        return {}
    arguments = {}
    for name, parameter in inspect.signature(derive).parameters.items():
        known = [values[name] for values in (flags, given) if name in values]
        own = parameter.default if parameter.default is not parameter.empty else defaults.get(name)
        arguments[name] = known[0] if known else own
    try:
        values = derive(**arguments)
    except Exception as e:
        raise ValueError(where(file, derive.__code__.co_filename, e)) from e
    for name in values:
        if name not in accepted:
            near = nearest(name, accepted, ', did you mean {}?')
            raise ValueError(f'{file}: derive() gives {name}, an unknown setting{near}')
    return {name: checked(value, accepted[name], f'{file}: {name} = {value!r}')
            for name, value in values.items()}


# -----------------------------------------------------------------------------
# --help


def help_text(settings):
    """Return the script's docstring and its settings: default, remark and accepted values, under their
    headings.
    """
    remarks = read_remarks(settings['__file__']) if '__file__' in settings else {}
    lines = [(settings.get('__doc__') or '').strip(), '', 'Settings, as flags or in a config file:']
    for name, options in accepted_by(settings).items():
        default, (heading, remark) = settings[name], remarks.get(name, ([], ''))
        lines += ['', *heading] if heading else []
        shown = default if isinstance(default, str) and default.isprintable() else repr(default)
        limits = '' if options == [type(default)] else f'[{phrase(options).partition(" ")[2]}]'
        lines.append(' '.join([f'  --{name}={shown}'.ljust(38), *filter(None, (remark, limits))]))
    return '\n'.join(line.rstrip() for line in lines)


def read_remarks(script):
    """Return the comment lines above, and the comment after, each top-level assignment of a script, by
    name.
    """
    with tokenize.open(script) as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {}
    for token in tokens:
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('#').strip()
    lines, remarks = source.split('\n'), {}
    for node in ast.parse(source).body:
        start = node.lineno
        while start > 1 and (lines[start - 2].startswith('#') or not lines[start - 2].strip()):
            start -= 1
        heading = [comments[line] for line in range(start, node.lineno) if comments.get(line, '').strip('-')]
        for target in getattr(node, 'targets', [getattr(node, 'target', None)]):
            if isinstance(target, ast.Name):
                remarks[target.id] = heading, comments.get(node.end_lineno, '')
    return remarks


