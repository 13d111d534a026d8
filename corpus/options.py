"""Command lines of the corpus commands and of data/*/prepare.py."""
import argparse
import difflib
import os
import shlex
from pathlib import Path

from corpus.readers import ERRORS, FORMATS

ROOT = Path(__file__).resolve().parents[1]


def boolean(text):
    if text.lower() not in ('true', 'false', '1', '0'):
        raise argparse.ArgumentTypeError(f'{text}: accepted are True, False')
    return text.lower() in ('true', '1')


def n_cores():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


# the options that several commands share, as add_argument takes them
OPTIONS = {
    'input': dict(nargs='+', required=True, metavar='PATH', help='files, and folders of them'),
    'out': dict(type=Path, required=True, help='dataset folder'),
    'tokenizer': dict(required=True, metavar='NAME',
                      help='char, gpt2, byte, or a folder with tokenizer.json'),
    'eot': dict(default='', metavar='TOKEN',
                help='the token that ends a document, for a folder that names none'),
    'format': dict(choices=['auto', *FORMATS], default='auto',
                   help='format of all files (default: by the ending of each file)'),
    'field': dict(default='text',
                  help='fields that make a document, as in title,text (default: %(default)s)'),
    'encoding': dict(default='utf-8', help='of text files, such as gb18030 (default: %(default)s)'),
    'errors': dict(choices=ERRORS, default='strict',
                   help='bytes outside the encoding end the run, or become U+FFFD'),
    'clean': dict(type=boolean, nargs='?', const=True, default=False, metavar='True',
                  help='Unicode NFC, no control characters, each text only once'),
    'min_chars': dict(type=int, default=1, help='leave shorter texts out (default: %(default)s)'),
    'sample': dict(type=float, default=1.0, metavar='FRACTION',
                   help='take this share of the texts, chosen by hash'),
    'max_docs': dict(type=int, help='take only this many documents, the first ones'),
    'val_fraction': dict(type=float, default=0.01, help='share for validation (default: %(default)s)'),
    'shard_tokens': dict(type=int, help='tokens in a .bin file (default: %(default)s)'),
    'workers': dict(type=int, default=n_cores(),
                    help='threads that tokenize (default: one per core, %(default)s)'),
}
READING = ['input', 'format', 'field', 'encoding', 'errors']
PACKING = ['max_docs', 'val_fraction', 'shard_tokens', 'workers']
BUILDING = ['out', 'tokenizer', 'eot', 'clean', 'min_chars', 'sample', *PACKING]


def add_options(parser, names, **defaults):
    """Add shared options to a parser; with another default where one is given, which may replace a need."""
    for name in names:
        settings = dict(OPTIONS[name])
        if name in defaults:
            settings.update(default=defaults[name], required=False)
        parser.add_argument(f'--{name}', **settings)


class Parser(argparse.ArgumentParser):
    """argparse in the project's dialect: --key=value or --key value, --switch or --switch=True."""

    def __init__(self, doc, command=None):
        super().__init__(command, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            remedy = f'did you mean {near[0]}?' if near else '--help lists all'
            raise ValueError(f'{flag}: unknown argument, {remedy}')
        check_ranges(vars(args))
        return args

    def error(self, message):
        raise ValueError(message.removeprefix('argument '))


def check_ranges(values):
    for name in ('max_docs', 'shard_tokens', 'workers', 'min_chars', 'tokens', 'block_size'):
        if values.get(name) is not None and values[name] < 1:
            raise ValueError(f'--{name}={values[name]} must be 1 or more')
    if not 0 < values.get('val_fraction', 0.5) < 1:
        raise ValueError(f'--val_fraction={values["val_fraction"]} must lie between 0 and 1')
    if not 0 < values.get('sample', 1) <= 1:
        raise ValueError(f'--sample={values["sample"]} must be above 0, and at most 1')


def print_next(out, config, *, own_dataset=None):
    """Print the training command for a dataset, quoted so that it can be pasted into a shell.

    own_dataset  name of the dataset that the config file trains on anyway, into an out_dir of its own
    """
    out = Path(out).resolve()
    name = out.name if out.parent == ROOT / 'data' else os.path.relpath(out)
    command = ['python', 'train.py', *config]
    if name != own_dataset:
        command += [f'--dataset={name}', f'--out_dir=out-{out.name}']
    print('next:', shlex.join(command))
