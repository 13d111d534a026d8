"""Command lines of the corpus commands and of data/*/prepare.py."""
import argparse
import difflib
import itertools
import os
import shlex
import sys
from pathlib import Path

from corpus.readers import ERRORS, FORMATS, n_bytes_of, read_documents

ROOT = Path(__file__).resolve().parents[1]
N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
LOG_EVERY_S = 60  # progress in a log file; a terminal shows a bar


def boolean(text):
    try:
        return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f'{text}: accepted are True, False') from None


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be 1 or more')
    return int(text)


def share(text):
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must lie between 0 and 1')
    return float(text)


READING = {
    'input': dict(nargs='+', required=True, metavar='PATH', help='files, and folders of them'),
    'format': dict(choices=['auto', *FORMATS], default='auto',
                   help='of all files, see docs/DATA.md; auto: by their endings'),
    'field': dict(default='text', help='fields that make a document, as in title,text'),
    'encoding': dict(default='utf-8', help='of text files, such as gb18030'),
    'errors': dict(choices=ERRORS, default='strict',
                   help='bytes outside the encoding; replace: up to 1 percent become U+FFFD'),
}
PACKING = {
    'out': dict(type=Path, required=True, help='dataset folder'),
    'tokenizer': dict(required=True, help='char, gpt2, byte, or a folder with tokenizer.json'),
    'eot': dict(default='', metavar='TOKEN', help='ends a document, for a folder that does not name one'),
    'clean': dict(type=boolean, nargs='?', const=True, default=False,
                  help='Unicode NFC, no control characters, each text only once'),
    'min_chars': dict(type=count, default=1, help='leave shorter texts out'),
    'sample': dict(type=share, default=1.0, help='take this share of the texts, chosen by hash'),
    'max_docs': dict(type=count, help='read only this many documents, the first ones'),
    'val_fraction': dict(type=share, default=0.01, help='share for validation, chosen by hash'),
    'shard_tokens': dict(type=count, help='tokens in a .bin file; None: one file per split'),
    'workers': dict(type=count, default=N_CORES, help='threads that tokenize'),
}
OPTIONS = {**READING, **PACKING}


class Parser(argparse.ArgumentParser):
    """Parse --key=value or --key value, --switch or --switch=True. A mistake is a ValueError.

    options   names in OPTIONS; one that is given another default is not required
    """

    def __init__(self, doc, command=None, options=(), **defaults):
        super().__init__(command, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        for name in options:
            settings = dict(OPTIONS[name])
            if name in defaults:
                settings.update(default=defaults[name], required=False)
            self.add_argument(f'--{name}', **settings)

    def add_argument(self, *names, **settings):
        if settings.get('default', argparse.SUPPRESS) is not argparse.SUPPRESS:
            settings['help'] = settings.get('help', '') + ' (default: %(default)s)'
        return super().add_argument(*names, **settings)

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split('=')[0]
            remedy = '--help lists all'
            for near in difflib.get_close_matches(flag, self._option_string_actions, n=1):
                remedy = f'did you mean {near}?'
            raise ValueError(f'{flag}: unknown argument, {remedy}')
        return args

    def error(self, message):
        raise ValueError(message.removeprefix('argument '))


def run_command(doc, commands):
    """Run the command that is the first argument, {name: function of the other arguments}."""
    command, *argv = sys.argv[1:] or ['--help']
    if command in ('-h', '--help'):
        print(f'{doc.strip()}\n\n{", ".join(commands)}: each has a --help that lists its options.')
    elif command in commands:
        commands[command](argv)
    else:
        raise ValueError(f'{command}: accepted are {", ".join(commands)}')


def read_files(files, args, start=0, max_docs=None):
    """Yield documents of files of corpus/readers.py from number start on, with a progress bar."""
    from tqdm import tqdm
    every_s = LOG_EVERY_S
    if sys.stderr.isatty():
        every_s = 0.1
    documents = read_documents(files, fields=args.field.split(','), errors=args.errors,
                               encoding=args.encoding, start=start)
    with tqdm(total=sum(n_bytes_of(path) for path, _ in files), unit='B', unit_scale=True,
              mininterval=every_s, delay=every_s) as bar:
        for document in itertools.islice(documents, max_docs and max_docs - start):
            if start and not bar.n:
                bar.initial = document.n_read  # the rate is that of this run
            bar.update(document.n_read - bar.n)
            yield document


def print_next(out, config, *, own_dataset=None):
    """Print the training command, to paste into a shell. own_dataset is that of the config file."""
    out = Path(out).resolve()
    name = os.path.relpath(out)
    if out.parent == ROOT / 'data':
        name = out.name
    command = ['python', 'train.py', *config]
    if name != own_dataset:
        command += [f'--dataset={name}', f'--out_dir=out-{out.name}']
    print('next:', shlex.join(command))
