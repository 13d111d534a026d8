"""Tuning on conversations, and the tuned model in sample.py: --chat, --prompts and --answers."""

import contextlib
import io
import json
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_checkpoint, train_here
from test_conversations import BYTES, other, write  # noqa: F401 (other is a fixture)

from corpus import conversations
from corpus.pack import write_dataset
from corpus.template import Template
from model import GPT


@pytest.fixture(scope='module')
def tuned(tmp_path_factory, other):
    """(base, tuned): out_dirs of a model of plain text, and of one that goes on from it with ten answers."""
    folder = tmp_path_factory.mktemp('tuned')
    write_dataset(folder / 'plain', BYTES, {'train': ['the cat sat by the sea. ' * 80], 'val': ['the cat ' * 20]}, 'a test')
    size = '--arch=modern', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=64', '--device=cpu', '--dtype=float32', '--warmup_iters=0'
    speed = '--optimizer=muon', '--matrix_lr=0.03', '--embedding_lr=0.3', '--head_lr=0.01', '--weight_decay=0', '--eval_iters=2', '--log_interval=50'
    code, _, error, _ = train_here(*size, *speed, f'--dataset={folder / "plain"}', '--batch_size=4', '--gradient_accumulation_steps=1',
                                   '--max_iters=20', out_dir=folder / 'base')
    assert code == 0, error
    file = write(folder / 'x.jsonl', '\n'.join(json.dumps({'messages': [{'role': 'user', 'content': f'{animal}?'}, {'role': 'assistant', 'content': sound}]})
                                               for animal, sound in SOUNDS.items()))
    conversations.build(folder / 'chat', BYTES, [file], block_size=64, val=[other])
    code, out, error, metrics = train_here(str(ROOT / 'config/finetune_dolly.py'), *speed, f'--init_from={folder / "base/ckpt.pt"}', '--isolate_documents=True',
                                           f'--dataset={folder / "chat"}', '--decay_lr=False', '--max_iters=150', '--device=cpu', '--dtype=float32',
                                           out_dir=folder / 'tuned')
    assert code == 0, error
    return folder, metrics


SOUNDS = {'cow': 'moo', 'cat': 'meow', 'dog': 'woof', 'hen': 'cluck', 'owl': 'hoot', 'bee': 'buzz', '羊': '咩'}


def ask(folder, *flags, stdin='', out_dir='tuned'):
    """sample.py as a user runs it, in this process: (exit code, what it prints below the model, stderr)."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, 'stdin', io.StringIO(stdin))
        patch.setattr(sys, 'argv', ['sample.py', f'--out_dir={folder / out_dir}', '--device=cpu', '--dtype=float32', '--temperature=0', *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        except SystemExit as stop:
            code = stop.code
    return code, stdout.getvalue().partition(' tokenizer\n')[2], stderr.getvalue()


def test_tuning_learns_the_answers_and_the_checkpoint_says_how_to_ask(tuned):
    folder, metrics = tuned
    losses = [line['train_loss'] for line in metrics if 'val_loss' in line]
    assert losses[-1] < 0.05 < 2 < losses[0]
    state = read_checkpoint(folder / 'tuned/ckpt.pt')
    assert (state['style'], state['iter_num'], state['config']['block_size']) == ('chat', 150, 64)
    assert read_checkpoint(folder / 'base/ckpt.pt')['style'] is None
    assert [path.name for path in sorted((folder / 'tuned').glob('ckpt_*.pt'))] == ['ckpt_00000050.pt', 'ckpt_00000100.pt']


def test_a_tuned_models_export_chats_in_transformers(tuned, tmp_path):
    transformers = pytest.importorskip('transformers')
    folder, _ = tuned
    code, _, error = ask(folder, f'--export={tmp_path / "exported"}')
    assert code == 0, error
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    turns = [('user', 'cow?'), ('assistant', 'moo'), ('user', '羊?')]
    messages = [{'role': role, 'content': text} for role, text in turns]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=False)
    assert ids.tolist() == [Template(BYTES, 'chat').fit(turns, 64).ids.tolist()]


@pytest.mark.parametrize('name', ['exported', 'exported.npz'])
def test_an_export_knows_that_it_was_tuned_on_conversations(tuned, tmp_path, monkeypatch, name):
    folder, _ = tuned
    monkeypatch.chdir(tmp_path)
    assert ask(folder, f'--export={name}')[0] == 0
    code, out, error = ask(folder, '--chat', f'--init_from={name}', stdin='cow?\n/reset\n羊?\n')
    assert (code, out) == (0, 'moo\n咩\n'), error
    if name == 'exported':  # its model card says so, too, and its example runs
        pytest.importorskip('transformers')
        card = (tmp_path / 'exported/README.md').read_text(encoding='utf-8')
        assert '- updates: 150\n- best validation loss: ' in card and '- dataset: `chat`\n' in card and '--init_from=exported --chat`' in card
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout):
            exec(card.partition('```python\n')[2].partition('```')[0].replace('Hello', 'cow?'), {})
        assert '<|assistant|>moo<|endoftext|>' in stdout.getvalue()


def test_settings_that_would_train_on_something_else(tuned, tmp_path):
    folder, _ = tuned
    conversations.build(tmp_path / 'alpaca', BYTES, [folder / 'x.jsonl'], block_size=64, style='alpaca', val=0.5)
    for flags, text in (([f'--dataset={folder / "chat"},{tmp_path / "alpaca"}'], ' has conversations in the styles alpaca and chat: pack them in one\n'),
                        (['--dataset=stream:x', '--isolate_documents=True'], 'isolate_documents=True is for packed datasets, a stream does not ')):
        code, _, error, _ = train_here(f'--init_from={folder / "base/ckpt.pt"}', *flags, '--device=cpu', out_dir=tmp_path / 'out')
        assert code == 2 and text in error and not (tmp_path / 'out').exists(), error


def test_tuning_is_resumed_by_the_same_command(tuned, tmp_path):
    folder, _ = tuned
    code, out, error, _ = train_here(str(ROOT / 'config/finetune_dolly.py'), f'--init_from={folder / "base/ckpt.pt"}', f'--dataset={folder / "chat"}',
                                     '--max_iters=152', '--device=cpu', out_dir=shutil.copytree(folder / 'tuned', tmp_path / 'tuned'))
    assert code == 0 and '(iteration 150)' in out, error
    assert read_checkpoint(tmp_path / 'tuned/ckpt.pt')['iter_num'] == 152


def test_a_pipe_of_questions_is_answered_line_by_line(tuned):
    folder, _ = tuned
    path = write(folder / 'saved.jsonl', '{"messages": []}')  # without a line end
    code, out, error = ask(folder, '--chat', stdin=f'cow?\n\n/reset\n羊?\n/save {path}\n/what\n/reset\n/save {path}\n/quit\ncow?\n')
    assert (code, out) == (0, 'moo\n咩\n')
    assert error == f'{path}: 2 turns saved\n/what: accepted are /reset, /save FILE, /quit\n{path}: 0 turns saved\n'
    saved = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert saved == [{'messages': []}, {'messages': [{'role': 'user', 'content': '羊?'}, {'role': 'assistant', 'content': '咩'}]}, {'messages': []}]


def test_the_oldest_turns_leave_a_full_context_and_that_is_said_once(tuned):
    folder, _ = tuned
    code, out, error = ask(folder, '--chat', '--max_new_tokens=8', stdin='dog?\n' * 12)
    assert code == 0 and len(out.splitlines()) == 12 and out.startswith('woof\n')
    left_out, cut = ('(the oldest turns no longer fit into the context of 64 tokens and are left out)\n',
                     '(the question is too long for the context of 64 tokens: its beginning is cut off)\n')
    assert error == left_out
    assert ask(folder, '--chat', '--max_new_tokens=8', stdin=('q' * 99 + '\n') * 3)[2] == cut + left_out


def test_answers_in_batches_are_those_of_one_at_a_time(tuned):
    folder, _ = tuned
    questions = [{'prompt': f'{animal}?', 'response': sound} for animal, sound in SOUNDS.items()] + [{'prompt': 'q' * n} for n in (1, 30, 47, 80)]
    file = write(folder / 'questions.json', questions)
    files = []
    for n in (1, 16):
        code, out, error = ask(folder, f'--prompts={file}', f'--answers={folder / "answers.jsonl"}', f'--batch_size={n}')
        assert (code, out) == (0, '2 of 11 questions are too long for the context of 64 tokens: their beginnings are cut off\n'
                               f'{folder / "answers.jsonl"}: 11 answers, 7 of 7 (100.0%) exactly as expected\n'), error
        files.append((folder / 'answers.jsonl').read_text(encoding='utf-8'))
    assert files[0] == files[1]
    lines = [json.loads(line) for line in files[0].splitlines()]
    assert lines[6] == {'question': '羊?', 'answer': '咩', 'expected': ['咩'], 'exact': True}
    assert [line['question'] for line in lines] == [q['prompt'] for q in questions] and 'exact' not in lines[-1]


def test_each_answer_is_drawn_with_numbers_of_its_own(tuned):
    folder, _ = tuned
    file, answers = folder / 'same.txt', folder / 'same.jsonl'
    file.write_text('cow?\n' * 8, encoding='utf-8')
    found = []
    for flags in (['--temperature=5', '--top_k=0', '--batch_size=1'], ['--temperature=5', '--top_k=0', '--batch_size=1000000'], ['--max_new_tokens=0']):
        assert ask(folder, f'--prompts={file}', f'--answers={answers}', *flags)[0] == 0
        found.append([json.loads(line)['answer'] for line in answers.read_text(encoding='utf-8').splitlines()])
    assert found[0] == found[1] and len(set(found[0])) > 1 and found[2] == [''] * 8


def test_lines_of_a_text_file_are_questions(tuned):
    folder, _ = tuned
    file, answers = folder / 'lines.txt', folder / 'lines.jsonl'
    file.write_bytes('\ufeffcow?\r\n\r\n羊?\r\n'.encode())
    assert ask(folder, f'--prompts={file}', f'--answers={answers}')[:2] == (0, f'{answers}: 2 answers\n')
    assert [json.loads(line) for line in answers.read_text(encoding='utf-8').splitlines()] == [
        {'question': 'cow?', 'answer': 'moo'}, {'question': '羊?', 'answer': '咩'}]


def test_chat_is_a_script_of_its_own_and_needs_stdin(tuned):
    folder, _ = tuned
    flags = sys.executable, str(ROOT / 'chat.py'), f'--out_dir={folder / "tuned"}', '--device=cpu', '--dtype=float32', '--temperature=0'
    done = subprocess.run(flags, input='cow?\n', capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(' tokenizer\nmoo\n') and done.stderr == ''
    prompts = sys.executable, str(ROOT / 'sample.py'), *flags[2:], f'--prompts={folder / "x.jsonl"}', f'--answers={folder / "y.jsonl"}'
    assert subprocess.run(['sh', '-c', 'exec "$@" 2>&-', '-', *prompts], capture_output=True).returncode == 0  # its progress bar has no stderr
    done = subprocess.run(['sh', '-c', 'exec "$@" <&-', '-', *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, 'a chat reads stdin and writes to stdout: one of them is closed\n')


def test_control_characters_of_an_answer_are_escaped_on_the_terminal_and_saved_as_they_are(tuned, monkeypatch):
    folder, _ = tuned
    monkeypatch.setattr(GPT, 'stream', lambda *arguments, **settings: (torch.tensor([token]) for token in b'a\x1b[2J\x07'))
    saved = folder / 'escapes.jsonl'
    assert ask(folder, '--chat', stdin=f'cow?\n/save {saved}\n')[1] == 'a\\x1b[2J\\x07\n'
    assert json.loads(saved.read_text(encoding='utf-8'))['messages'][1]['content'] == 'a\x1b[2J\x07'


def test_questions_that_cannot_be_asked(tuned):
    folder, _ = tuned
    empty = write(folder / 'empty.jsonl', '')
    for flags, text in ((['--prompts=x'], '--prompts=FILE and --answers=FILE go together, and without --chat'),
                        ([f'--prompts={empty}', '--answers=y', '--compile=True'], '--compile=True: accepted is auto or False with --prompts'),
                        ([f'--prompts={empty}', '--answers=no/y'], '--answers=no/y: accepted is a file in an existing folder'),
                        ([f'--prompts={empty}', '--answers=y'], f'{empty}: there is no question')):
        assert ask(folder, *flags) == (2, '', text + '\n')
    code, _, error = ask(folder, '--chat', out_dir='base')
    base = folder / 'base/ckpt.pt'
    assert code == 2 and error == (f'{base} was not tuned on conversations: tune it with python train.py config/finetune_dolly.py --init_from={base}, '
                                   'or name the template of its prompts, --style=chat or --style=alpaca\n')


def test_ctrl_c_stops_the_answer_and_not_the_program(tuned, monkeypatch):
    folder, _ = tuned
    stream, interrupted = GPT.stream, []

    def stream_and_interrupt(*arguments, **settings):
        for n, ids in enumerate(stream(*arguments, **settings)):
            if n == 2 and not interrupted:
                interrupted.append(True)
                signal.raise_signal(signal.SIGINT)
            yield ids
    monkeypatch.setattr(GPT, 'stream', stream_and_interrupt)
    assert ask(folder, '--chat', stdin='owl?\n/reset\nowl?\n')[:2] == (0, 'ho [stopped]\nhoot\n')


def test_ctrl_c_at_the_prompt_does_not_end_a_conversation(tuned, monkeypatch):
    folder, _ = tuned
    typed = iter([KeyboardInterrupt, 'bee?', EOFError])

    def type_in(prompt):
        text = next(typed)
        if isinstance(text, str):
            return text
        raise text
    monkeypatch.setattr('builtins.input', type_in)
    assert ask(folder, '--chat') == (0, 'buzz\n', '\n/quit ends\n')
